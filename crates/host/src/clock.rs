//! The node's own monotonic clock.
//!
//! CLOCK_BOOTTIME, because it goes on while the machine is suspended: a lease that ran out during a suspend is over at
//! the first look at the clock after waking. CLOCK_MONOTONIC stands still meanwhile, and such a lease would look fresh.
//! It never jumps with the wall clock and starts anew at each boot.

use nix::time::{ClockId, clock_gettime};
use pollux_base::Instant;
use std::io;

/// This moment.
pub fn now() -> Instant {
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("CLOCK_BOOTTIME exists since Linux 2.6.39");
    // Both parts are never negative on this clock, and 2^64 ns are 584 years of uptime.
    Instant(time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}

/// The random number that the kernel gives each boot of the machine.
pub fn boot_id() -> io::Result<u128> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    u128::from_str_radix(&digits, 16).map_err(|_| io::Error::other(format!("`{}` is no boot id", text.trim())))
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_boot_has_one_number() {
        let first = super::boot_id().expect("the kernel gives one");
        assert_eq!(super::boot_id().expect("and gives it again"), first);
        assert_ne!(first, 0);
    }

    #[test]
    fn time_does_not_run_backwards() {
        let first = super::now();
        assert!(super::now() >= first);
    }
}
