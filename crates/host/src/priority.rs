//! This process's share of the processor.

#![allow(unsafe_code)]

use nix::libc;
use std::io;

/// Guests wait for every turn of a daemon that calls this, and peers take its silence for death, while it needs little
/// of the processor: so it goes before guests and tools, but behind real-time processes such as the guard. Threads
/// that the kernel makes for its disk operations follow suit. Needs CAP_SYS_NICE.
pub fn raise() -> io::Result<()> {
    const NICE: i32 = -15;
    // SAFETY: no memory is involved; the call only changes how this process is scheduled.
    match unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
