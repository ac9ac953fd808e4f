//! Runs the committed corpus through the targets of one crate. Included by the test `corpus` of each crate that has any.
//!
//! Files named `seed-*` are what the target's own generator makes, and must be what it makes now: after a change of a format
//! they are written anew with POLLUX_BLESS set. All others came out of a fuzzer: inputs that once found a fault, or
//! that reach code which nothing else reaches.

use pollux_base::fuzz::Target;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

#[allow(clippy::disallowed_methods)] // a test may read its environment and its files
pub fn all(targets: &[Target]) {
    for target in targets {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target.name);
        let mut made = BTreeMap::new();
        for (number, seed) in (target.seeds)().into_iter().enumerate() {
            made.insert(folder.join(format!("seed-{number:02}")), seed);
        }
        assert!(!made.is_empty(), "{}: a fuzzer needs something to begin with", target.name);
        if std::env::var_os("POLLUX_BLESS").is_some() {
            bless(&folder, &made);
        }
        let found: BTreeMap<PathBuf, Vec<u8>> = read(&folder);
        let seeds: BTreeMap<_, _> = found.iter().filter(|(path, _)| is_seed(path)).collect();
        assert!(
            seeds == made.iter().collect(),
            "{}: the seeds are not those that are made now; see them made anew by POLLUX_BLESS=1",
            target.name
        );
        for (path, bytes) in &found {
            // Told by the test's output if the target panics.
            println!("{}", path.display());
            (target.run)(bytes);
        }
    }
}

fn is_seed(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("seed-"))
}

#[allow(clippy::disallowed_methods)]
fn read(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let paths = entries.map(|entry| entry.expect("the folder can be read").path());
    paths.map(|path| (path.clone(), fs::read(&path).expect("a file of the corpus can be read"))).collect()
}

#[allow(clippy::disallowed_methods)]
fn bless(folder: &Path, made: &BTreeMap<PathBuf, Vec<u8>>) {
    fs::create_dir_all(folder).expect("the folder can be made");
    for path in read(folder).keys().filter(|path| is_seed(path)) {
        fs::remove_file(path).expect("an old seed can be removed");
    }
    for (path, bytes) in made {
        fs::write(path, bytes).expect("a seed can be written");
    }
}
