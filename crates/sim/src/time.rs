//! Virtual time of the world, and the clocks of its nodes, which see it each a little differently.

use pollux_base::Instant;
use pollux_base::timing::DRIFT_PERCENT;
use pollux_store::faulty_disk::Luck;
use std::fmt;
use std::ops::Add;
use std::time::Duration;

/// A moment of the world, in nanoseconds since its beginning. No node ever sees it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Time(pub u64);

impl Time {
    /// Time since `earlier`; zero when `earlier` is later.
    pub fn since(self, earlier: Time) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Time {
    type Output = Time;
    fn add(self, duration: Duration) -> Time {
        Time(self.0.saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)))
    }
}

impl fmt::Debug for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:10.6}", self.0 as f64 / 1e9)
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

const MILLION: i128 = 1_000_000;

/// The monotonic clock of one boot of a node. It starts anywhere and runs a little fast or slow, so that two clocks
/// drift apart by no more than `DRIFT_PERCENT`.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    booted: Time,
    at_boot: u64,
    drift_ppm: i64,
}

impl Clock {
    /// The largest drift of one clock: half of what two may drift apart, less the square of it.
    const DRIFT_PPM_MAX: i64 = DRIFT_PERCENT as i64 * 10_000 / 2 - 100;

    /// A clock that starts now at any value. Drift is a property of the hardware: `drift_ppm` stays over boots.
    pub fn boot(now: Time, drift_ppm: i64, luck: &mut Luck) -> Clock {
        // Never near zero: a moment before the boot (an expired lease) must be expressible.
        Clock { booted: now, at_boot: 1_000_000_000_000 + luck.below(1_000_000_000_000_000), drift_ppm }
    }
    /// A drift within bounds; often at the bounds, because that is where mistakes show.
    pub fn drift(luck: &mut Luck) -> i64 {
        match luck.below(4) {
            0 => Clock::DRIFT_PPM_MAX,
            1 => -Clock::DRIFT_PPM_MAX,
            _ => luck.below(2 * Clock::DRIFT_PPM_MAX as u64 + 1) as i64 - Clock::DRIFT_PPM_MAX,
        }
    }
    /// What the clock shows at this moment.
    pub fn read(&self, now: Time) -> Instant {
        let passed = i128::from(now.0) - i128::from(self.booted.0);
        let shown = passed * (MILLION + i128::from(self.drift_ppm)) / MILLION;
        Instant((i128::from(self.at_boot) + shown).max(0) as u64)
    }
    /// The first moment at which the clock shows `instant` or more.
    pub fn when(&self, instant: Instant) -> Time {
        let shown = i128::from(instant.0) - i128::from(self.at_boot);
        let rate = MILLION + i128::from(self.drift_ppm);
        let passed = (shown * MILLION).div_euclid(rate) + 1;
        let at = i128::from(self.booted.0) + passed;
        Time(at.clamp(0, i128::from(u64::MAX)) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_is_over_on_the_nodes_clock_when_the_world_says_so() {
        let mut luck = Luck::new(1);
        for _ in 0..1000 {
            let drift = Clock::drift(&mut luck);
            let clock = Clock::boot(Time(luck.below(1 << 40)), drift, &mut luck);
            let now = Time(clock.booted.0 + luck.below(1 << 40));
            let deadline = clock.read(now) + Duration::from_nanos(luck.below(1 << 34));
            let at = clock.when(deadline);
            assert!(clock.read(at) >= deadline, "not too early");
            assert!(clock.read(Time(at.0.saturating_sub(3))) <= deadline, "not late");
        }
    }

    #[test]
    fn two_clocks_drift_apart_by_no_more_than_promised() {
        let fast = Clock { booted: Time(0), at_boot: 0, drift_ppm: Clock::DRIFT_PPM_MAX };
        let slow = Clock { booted: Time(0), at_boot: 0, drift_ppm: -Clock::DRIFT_PPM_MAX };
        let hour = Time(3_600_000_000_000);
        let (fast, slow) = (fast.read(hour).0, slow.read(hour).0);
        assert!(fast * 100 <= slow * u64::from(100 + DRIFT_PERCENT));
    }
}
