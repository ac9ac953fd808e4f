//! The replication wire: `docs/wire-format.md`.
//!
//! A frame is a fixed header with its own checksum, then a small body (postcard), then blocks. Blocks travel beside
//! their 64-bit checksums and are checked on arrival (W11). The codec is pure: bytes in, frames out.

/// One message.
#[derive(Clone, Debug)]
pub struct Frame {}
