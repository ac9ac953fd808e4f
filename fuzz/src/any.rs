//! Every target of every crate in one program, so that it is built and linked once. POLLUX_FUZZ names the one that is run.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pollux_base::fuzz::Target;
use std::sync::LazyLock;

const TARGETS: &[&[Target]] = &[
    pollux_store::fuzz::TARGETS,
    pollux_replica::fuzz::TARGETS,
    pollux_frontend::fuzz::TARGETS,
    pollux_blockd::fuzz::TARGETS,
    pollux_guard::fuzz::TARGETS,
    pollux_noded::fuzz::TARGETS,
    pollux_cli::fuzz::TARGETS,
];

static CHOSEN: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("POLLUX_FUZZ").expect("POLLUX_FUZZ names a target");
    let mut all = TARGETS.iter().copied().flatten();
    *all.find(|target| target.name == name).unwrap_or_else(|| panic!("there is no target `{name}`"))
});

fuzz_target!(|bytes: &[u8]| (CHOSEN.run)(bytes));
