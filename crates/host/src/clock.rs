//! The node's own monotonic clock.
//!
//! CLOCK_BOOTTIME, because it goes on while the machine is suspended: a lease that ran out during a suspend is over at
//! the first look at the clock after waking. CLOCK_MONOTONIC stands still meanwhile, and such a lease would look fresh.
//! It never jumps with the wall clock and starts anew at each boot.

use nix::time::{ClockId, clock_gettime};
use pollux_base::Instant;

/// This moment.
pub fn now() -> Instant {
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("CLOCK_BOOTTIME exists since Linux 2.6.39");
    // Both parts are never negative on this clock, and 2^64 ns are 584 years of uptime.
    Instant(time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}

#[cfg(test)]
mod tests {
    #[test]
    fn time_does_not_run_backwards() {
        let first = super::now();
        assert!(super::now() >= first);
    }
}
