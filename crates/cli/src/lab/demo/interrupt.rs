//! Ctrl-C and its kin, seen between two looks instead of ending the program on the spot, so that the demo can clean up.

use crate::failure::{Doing, Failure, Outcome};
use nix::sys::signal::{SigSet, Signal};
use std::sync::atomic::{AtomicBool, Ordering};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on interrupts are only noted. Must be called before any thread is started, because threads inherit it; so do
/// programs that are started, and `forget_inherited` undoes it in ours.
pub fn note() -> Outcome {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block().doing("cannot hold signals back")?;
    std::thread::spawn(move || {
        while signals.wait().is_ok() {
            INTERRUPTED.store(true, Ordering::SeqCst);
        }
    });
    Ok(())
}

/// Whatever the program that started us held back, we do not.
pub fn forget_inherited() {
    let _ = SigSet::empty().thread_set_mask();
}

/// An error once an interrupt came.
pub fn check() -> Outcome {
    if INTERRUPTED.load(Ordering::SeqCst) { Err(Failure::other("interrupted")) } else { Ok(()) }
}
