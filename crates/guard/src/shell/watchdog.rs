//! A hardware watchdog: resets the machine when it is not fed. Fed by the guard and nobody else.

use super::sys;
use pollux_base::timing::GUARD_KILL;
use std::fs::File;
use std::io::Write;
use std::path::Path;

pub struct Watchdog {
    device: File,
}

impl Watchdog {
    /// Opening the device arms it. It fires within the time that others grant a guard to kill its guests.
    pub fn open(path: &Path) -> std::io::Result<Watchdog> {
        let device = File::options().write(true).open(path)?;
        let seconds = i32::try_from(GUARD_KILL.as_secs()).expect("some seconds");
        match sys::set_watchdog_timeout(&device, seconds) {
            Ok(set) if set <= seconds => {}
            Ok(set) => eprintln!("pollux-guard: the watchdog fires after {set} s at the earliest; wanted {seconds} s"),
            Err(error) => eprintln!("pollux-guard: the watchdog keeps its own time-out: {error}"),
        }
        Ok(Watchdog { device })
    }

    pub fn feed(&mut self) {
        if let Err(error) = self.device.write_all(b"\0") {
            eprintln!("pollux-guard: cannot feed the watchdog: {error}");
        }
    }

    /// The magic close: without the `V` closing the device would reset the machine.
    pub fn disarm(mut self) {
        if let Err(error) = self.device.write_all(b"V") {
            eprintln!("pollux-guard: cannot disarm the watchdog: {error}");
        }
    }
}
