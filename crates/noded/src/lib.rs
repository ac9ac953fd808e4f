//! DAEMON: the control plane of one node; and pollux-witness.
//!
//! It carries the core (`pollux_cluster`) on a real machine and decides nothing. Each part has a file: `core` the task
//! that owns the core, `hands` what carries out its outputs, `log` the cluster log, `greet` and `peers` the way to other
//! nodes, `lines` the way to the guard and `blockd`, `vms`, `fence`, `fill`, `witness_client`, and `api` for clients.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod api;
pub mod core;
pub mod fence;
pub mod fill;
#[doc(hidden)]
pub mod fuzz;
pub mod greet;
pub mod hands;
pub mod lines;
pub mod link_keys;
pub mod log;
pub mod logging;
pub mod node;
pub mod peers;
pub mod server;
pub mod tls;
pub mod vms;
pub mod witness;
pub mod witness_client;
