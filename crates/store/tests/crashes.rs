//! Crashes at every moment: what was acknowledged survives the death of the process, what was flushed survives a power
//! cut, and nothing that may differ between replicas is forgotten.

mod common;

use common::history::{Crash, History};
use pollux_store::faulty_disk::Luck;

fn or_fail<T>(seed: u64, what: &str, result: Result<T, String>) -> T {
    result.unwrap_or_else(|error| panic!("seed {seed}, {what}: {error}"))
}

/// Some seeds from `first` on; more of them when POLLUX_SEEDS says by what factor.
#[allow(clippy::disallowed_methods)]
fn seeds(first: u64, count: u64) -> std::ops::Range<u64> {
    let factor = std::env::var("POLLUX_SEEDS").ok().and_then(|factor| factor.parse().ok()).unwrap_or(1);
    first..first + count * factor
}

#[test]
fn a_crash_at_every_step_of_a_history_loses_nothing() {
    for steps in 0..250 {
        for (seed, crash) in [(1, Crash::Kill), (2, Crash::PowerCut)] {
            let mut history = History::new(seed);
            or_fail(seed, "run", history.run(steps));
            or_fail(seed, &format!("{crash:?} after {steps}"), history.crash(crash));
        }
    }
}

#[test]
fn long_histories_of_many_crashes_lose_nothing() {
    let mut full = 0;
    for seed in seeds(1000, 40) {
        let mut luck = Luck::new(seed);
        let mut history = History::new(seed);
        for _ in 0..8 {
            or_fail(seed, "run", history.run(luck.below(500)));
            let crash = if luck.one_in(2) { Crash::Kill } else { Crash::PowerCut };
            history = or_fail(seed, "crash", history.crash(crash));
        }
        full += history.full;
    }
    assert!(full > 0, "the pool is small enough to be full at times");
}

#[test]
fn a_crash_at_any_step_of_a_checkpoint_loses_nothing() {
    for seed in seeds(2_000_000, 15) {
        let mut luck = Luck::new(seed);
        let mut history = History::new(seed);
        or_fail(seed, "run", history.run(luck.below(200)));
        history.fill_journal(960 + luck.below(64));
        or_fail(seed, "run", history.run(20 + luck.below(150)));
        let crash = if luck.one_in(2) { Crash::Kill } else { Crash::PowerCut };
        let mut history = or_fail(seed, "crash", history.crash(crash));
        or_fail(seed, "run", history.run(100));
        or_fail(seed, "second crash", history.crash(Crash::PowerCut));
    }
}

#[test]
fn histories_in_which_disks_join_and_leave_lose_nothing() {
    for seed in seeds(4_000_000, 25) {
        let mut luck = Luck::new(seed);
        let mut history = History::with_disks(seed);
        for _ in 0..8 {
            or_fail(seed, "run", history.run(luck.below(700)));
            let crash = if luck.one_in(2) { Crash::Kill } else { Crash::PowerCut };
            history = or_fail(seed, "crash", history.crash(crash));
        }
    }
}

/// Short ones, so that more crashes come in the middle of a change of the catalog.
#[test]
fn short_histories_in_which_disks_join_and_leave_lose_nothing() {
    for seed in seeds(5_000_000, 60).chain(seeds(6_000_000, 60)) {
        let mut luck = Luck::new(seed);
        let mut history = History::with_disks(seed);
        for _ in 0..5 {
            or_fail(seed, "run", history.run(luck.below(500)));
            let crash = if luck.one_in(2) { Crash::Kill } else { Crash::PowerCut };
            for _ in history.rig.disks_mut() {
                luck.draw();
            }
            history = or_fail(seed, "crash", history.crash(crash));
        }
    }
}

/// The checker is of use: on a disk whose flushes do nothing it must find losses.
#[test]
fn a_disk_that_lies_about_flushes_is_found_out() {
    let lies = seeds(3_000_000, 40).filter(|seed| {
        let mut history = History::new(*seed);
        history.rig.disk.ignore_flushes();
        history.run(400).and_then(|()| history.crash(Crash::PowerCut)).is_err()
    });
    assert!(lies.count() > 10, "a lie is seen most of the time");
}
