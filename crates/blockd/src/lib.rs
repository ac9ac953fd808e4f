//! DAEMON: the data plane of one node: replica, store, front ends and the machine, wired together.
//!
//! It decides nothing. Events of the reactor become inputs of the `DataPlane`, its outputs become operations; who may
//! serve what, and when, is said by the core and by orders.
//!
//! One client, peer or control connection that misbehaves loses its connection, never the daemon. A broken promise of
//! our own code ends the process: it is restarted, and clients see a pause.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod clients;
mod connection;
pub mod control;
pub mod daemon;
pub mod dialer;
pub mod directory;
mod disk_list;
mod disks;
mod door;
#[doc(hidden)]
pub mod fuzz;
mod keeper;
pub mod keyring;
pub mod look;
pub mod peers;
pub mod pool;
pub mod sealed;
pub mod seen;
mod state_file;
pub mod ticket;

use pollux_base::Instant;
use pollux_host::reactor::Reactor;
use pollux_replica::Input;

/// Random bytes for what must never be the same twice.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).expect("the kernel gives random bytes to every process once it has booted");
    bytes
}

/// One turn of the loop, as its parts see it.
pub struct Turn<'a> {
    pub now: Instant,
    pub reactor: &'a mut Reactor,
    /// What the core is to be told, in order.
    pub inputs: &'a mut Vec<Input>,
}
