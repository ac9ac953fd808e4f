//! The target for fuzzers (`pollux_base::fuzz`): sizes as people write them.

use crate::size;
use pollux_base::fuzz::Target;
use pollux_base::unit::VOLUME_BYTES_MAX;

pub const TARGETS: &[Target] = &[Target { name: "cli_size", run: sizes, seeds: size_seeds }];

/// A size that is taken is one that a volume can have, and is the same when written out in bytes.
pub fn sizes(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    match size::parse(&text) {
        Ok(bytes) => {
            assert!((1..=VOLUME_BYTES_MAX).contains(&bytes), "{text:?} is {bytes}");
            assert_eq!(size::parse(&bytes.to_string()), Ok(bytes));
            assert!(!size::show(bytes).is_empty());
        }
        Err(reason) => assert!(!reason.is_empty()),
    }
}

fn size_seeds() -> Vec<Vec<u8>> {
    ["10G", "4096", "1 GiB", "2tb", "18446744073709551615", "1.5M"].map(|text| text.as_bytes().to_vec()).into()
}
