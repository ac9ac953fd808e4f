//! DAEMON: the control plane of one node; and pollux-witness.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod log;
pub mod logging;
pub mod peers;
pub mod server;
pub mod tls;
pub mod witness;
