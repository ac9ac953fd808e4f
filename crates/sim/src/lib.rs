//! Whole clusters in one thread, from a seed.

pub mod blocks;
pub mod history;
pub mod invariant;
pub mod log;
pub mod time;
