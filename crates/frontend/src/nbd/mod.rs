//! The NBD protocol, server side: fixed newstyle, as `doc/proto.md` of the NetworkBlockDevice project has it.
//!
//! What a client gets: GO, INFO, LIST, EXPORT_NAME, structured replies and `base:allocation`; reads, writes, flush, FUA,
//! trim, write-zeroes and block status; any number of connections to one export, because what one connection flushed
//! is flushed for all.
//!
//! What it does not get:
//!
//! * Requests that are not multiples of 4 KiB. A front end does not decide, and widening a write needs a decision about
//!   what else is written meanwhile. Clients that ask for the block sizes (QEMU, libnbd and all that build on it) align
//!   by themselves; one that does not ask is told `ERR_BLOCK_SIZE_REQD`, or EINVAL where it got in by EXPORT_NAME. TRIM
//!   alone is a hint, and is rounded inwards.
//! * FAST_ZERO (not advertised: EINVAL), TLS, CACHE, resize, extended headers.
//! * Room kept by NO_HOLE: the flag is taken, but zeros stay unallocated. What it is to prevent, a later failure for
//!   lack of space, does not exist here: a full pool freezes its writers.

mod connection;
mod handshake;
mod outbox;
mod proto;
mod transmission;

pub use connection::{Connection, End, Input, Output, Slot};
pub use proto::{BLOCK_SIZE_PREFERRED, PAYLOAD_MAX_ACCEPTED, PAYLOAD_MAX_ADVERTISED};
