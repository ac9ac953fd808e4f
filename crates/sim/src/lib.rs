//! Whole clusters in one thread, from a seed.
//!
//! The cores (`store`, `replica`, `cluster`, `guard`) run as they are; everything around them is a model that fails in
//! every way the real thing may: disks that tear and lose, links that cut one way, clocks that drift, processes that die
//! or stand still, power that goes. First a safety phase with faults, then everything is healed and must come to rest.
//! `invariant` says what must be true whatever happens. The same seed gives the same run, step by step.

pub mod blocks;
mod content;
mod copies;
mod disks;
pub mod faults;
mod guest;
pub mod history;
pub mod invariant;
mod keys;
pub mod log;
mod net;
mod node;
mod old_image;
mod operator;
mod outside;
mod peek;
mod promoted;
pub mod run;
pub mod sabotage;
pub mod scenario;
mod scrub;
mod shell_blockd;
mod shell_guard;
mod shell_noded;
mod snapshots;
mod stream;
pub mod time;
pub mod trace;
mod world;

pub use faults::Fault;
pub use node::Process;
pub use run::{Outcome, Scenario, Script};
pub use sabotage::Sabotage;
pub use trace::Trace;
pub use world::{Counts, Failure, Settings, World};
