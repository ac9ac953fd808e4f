//! The NBD protocol, server side: fixed newstyle, as `doc/proto.md` of the NetworkBlockDevice project has it.
//!
//! What a client gets: GO, INFO, LIST, EXPORT_NAME, STARTTLS, structured replies and `base:allocation`; reads, writes,
//! flush, FUA, trim, write-zeroes and block status, of any bytes; any number of connections to one export, because what
//! one connection flushed is flushed for all.
//!
//! * Whole blocks are what is stored, replicated and fast. A write that covers a block in part is handed on as a patch of
//!   it, which the data plane orders; so a write is one change per block, and never less than a sector of a disk.
//! * A resize is seen by connections made after it: what an earlier one agreed on holds as long as it lasts.
//! * NO_HOLE is taken, but zeros stay unallocated. What it is to prevent, a later failure for lack of space, does not
//!   exist here: a full pool freezes its writers. So zeroing is never slower than writing, and FAST_ZERO is always done.
//! * CACHE does nothing: there is no cache.
//! * Over TLS nothing but STARTTLS is answered before it, and a client that came over the network sees only exports that
//!   are public.
//!
//! What it does not get: extended headers and the 64-bit forms that come with them (the clients of Debian 12 do not ask
//! for them; ERR_UNSUP makes others fall back), and RESIZE.

mod connection;
mod handshake;
mod outbox;
mod proto;
mod span;
mod tls;
mod transmission;

pub use connection::{Connection, End, Input, Output, Reach, Slot};
pub use proto::{BLOCK_SIZE_PREFERRED, PAYLOAD_MAX_ACCEPTED, PAYLOAD_MAX_ADVERTISED};
pub use tls::{Pem, TlsError, TlsServer};
