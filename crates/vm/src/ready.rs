//! File descriptors whose readiness is waited for.

use std::io;
use std::os::fd::OwnedFd;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Waits for this descriptor to become readable in tokio's reactor.
pub fn readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // The successor of this function is `unsafe`, because a descriptor that its owner closes or replaces would leave the
    // reactor with another file; an `OwnedFd` that nobody else has can do neither.
    #[allow(deprecated)]
    AsyncFd::with_interest(fd, Interest::READABLE)
}
