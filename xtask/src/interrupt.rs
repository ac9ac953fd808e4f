//! Ctrl-C and its kin, seen between two looks instead of ending the program on the spot, so that a chore can clean up.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{SigSet, Signal};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on interrupts are only noted. Must be called before any thread is started, because threads inherit it.
pub fn note() -> Result<()> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block().context("cannot hold signals back")?;
    std::thread::spawn(move || {
        while signals.wait().is_ok() {
            INTERRUPTED.store(true, Ordering::SeqCst);
        }
    });
    Ok(())
}

/// An error once an interrupt came.
pub fn check() -> Result<()> {
    ensure!(!INTERRUPTED.load(Ordering::SeqCst), "interrupted");
    Ok(())
}

/// A program that does not see the terminal's Ctrl-C: how it ends is for whoever started it.
pub fn out_of_reach(mut command: Command) -> Command {
    command.process_group(0).stdin(Stdio::null());
    command
}
