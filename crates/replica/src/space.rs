//! What the control plane hears of the pool: at once when writes begin or cease to wait, otherwise when free space has
//! moved noticeably. An idle pool is looked at once after the last change, to say that it does not fill any more, and then
//! not again.

use pollux_base::pool::PoolReport;
use pollux_base::{Instant, Report};
use std::collections::VecDeque;
use std::time::Duration;

/// How often figures that move are reported at most.
const REPORT_EVERY: Duration = Duration::from_secs(10);
/// Growth is taken over so much time: long enough to smooth bursts, short enough to warn of a runaway guest.
const WINDOW: Duration = Duration::from_secs(300);
/// Before it has been watched this long nothing is said of growth.
const WATCHED_MIN: Duration = Duration::from_secs(30);

/// The pool as it was last reported, and how its space went.
#[derive(Debug, Default)]
pub(crate) struct Space {
    reported: Option<(Instant, PoolReport)>,
    /// Free bytes at times `REPORT_EVERY` or more apart, over `WINDOW`.
    samples: VecDeque<(Instant, u64)>,
    due: Option<Instant>,
}

impl Space {
    /// Whether there is something to report now. Cheap, because it is asked after every event.
    pub(crate) fn is_news(&mut self, now: Instant, free: u64, is_full: bool, is_failed: bool) -> bool {
        let Some((at, known)) = &self.reported else { return true };
        if (known.is_full, known.failed.is_some()) != (is_full, is_failed) {
            return true;
        }
        if known.free_bytes == free && known.growth_bytes_per_s == 0 {
            self.due = None;
            return false;
        }
        let due = *at + REPORT_EVERY;
        self.due = Some(due);
        now >= due
    }

    /// The pool as it is now; growth is filled in here.
    pub(crate) fn report(&mut self, now: Instant, present: PoolReport) -> Report {
        if self.samples.back().is_none_or(|(at, _)| now >= *at + REPORT_EVERY) {
            self.samples.push_back((now, present.free_bytes));
        }
        while self.samples.len() > 1 && self.samples.front().is_some_and(|(at, _)| now > *at + WINDOW) {
            self.samples.pop_front();
        }
        let report = PoolReport { growth_bytes_per_s: self.growth(now, present.free_bytes), ..present };
        self.due = (report.growth_bytes_per_s > 0).then(|| now + REPORT_EVERY);
        self.reported = Some((now, report.clone()));
        Report::Pool(report)
    }

    fn growth(&self, now: Instant, free: u64) -> u64 {
        let Some((at, before)) = self.samples.front() else { return 0 };
        let watched = now.since(*at);
        if watched < WATCHED_MIN {
            return 0;
        }
        before.saturating_sub(free) / watched.as_secs().max(1)
    }

    /// Everything is to be said anew.
    pub(crate) fn forget(&mut self) {
        self.reported = None;
    }

    /// When to look again at the latest.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Instant {
        Instant(0) + Duration::from_secs(seconds)
    }

    fn pool(free: u64) -> PoolReport {
        PoolReport { size_bytes: 1 << 30, free_bytes: free << 20, ..PoolReport::default() }
    }

    fn look(space: &mut Space, now: Instant, pool: PoolReport) -> Option<u64> {
        if !space.is_news(now, pool.free_bytes, pool.is_full, pool.failed.is_some()) {
            return None;
        }
        match space.report(now, pool) {
            Report::Pool(report) => Some(report.growth_bytes_per_s),
            other => panic!("{other:?} is no report of a pool"),
        }
    }

    #[test]
    fn growth_is_measured_over_minutes_and_ends_when_nothing_is_written() {
        let mut space = Space::default();
        assert_eq!(look(&mut space, at(0), pool(1000)), Some(0));
        for second in 1..=120 {
            let growth = look(&mut space, at(second), pool(1000 - second));
            assert_eq!(growth.is_some(), second % 10 == 0, "at most each 10 s");
            if second >= 30 && second % 10 == 0 {
                assert_eq!(growth, Some(1 << 20), "1 MiB each second");
            }
        }
        let mut last = None;
        while let Some(due) = space.due() {
            assert!(due < at(1000), "an idle pool is left alone");
            last = look(&mut space, due, pool(880)).or(last);
        }
        assert_eq!(last, Some(0), "the last word is that it does not grow");
    }

    #[test]
    fn a_full_pool_is_told_at_once() {
        let mut space = Space::default();
        look(&mut space, at(0), pool(1));
        let full = PoolReport { is_full: true, ..pool(0) };
        assert!(look(&mut space, at(1), full.clone()).is_some());
        assert!(look(&mut space, at(1), full).is_none(), "and once");
        assert!(look(&mut space, at(2), pool(10)).is_some(), "and that it is not any more");
    }
}
