//! Project chores: check, fix, sim, bench.

fn main() {}
