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

/// What of the pool may be news.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    pub is_full: bool,
    pub is_failed: bool,
    /// Another number when a disk's state may be another.
    pub disks: u64,
    pub free: u64,
    pub errors: u64,
    /// Another number when something else is kept.
    pub kept: u64,
}

/// The pool as it was last reported, and how its space went.
#[derive(Debug, Default)]
pub(crate) struct Space {
    reported: Option<(Instant, Seen, u64)>,
    /// Free bytes at times `REPORT_EVERY` or more apart, over `WINDOW`.
    samples: VecDeque<(Instant, u64)>,
    due: Option<Instant>,
}

impl Space {
    /// Whether there is something to report now. Cheap, because it is asked after every event.
    pub(crate) fn is_news(&mut self, now: Instant, seen: Seen) -> bool {
        let Some((at, known, growth)) = &self.reported else { return true };
        let states = |seen: &Seen| (seen.is_full, seen.is_failed, seen.disks, seen.kept);
        if states(known) != states(&seen) {
            return true;
        }
        if *known == seen && *growth == 0 {
            self.due = None;
            return false;
        }
        let due = *at + REPORT_EVERY;
        self.due = Some(due);
        now >= due
    }

    /// The pool as it is now; growth is filled in here.
    pub(crate) fn report(&mut self, now: Instant, seen: Seen, present: PoolReport) -> Report {
        if self.samples.back().is_none_or(|(at, _)| now >= *at + REPORT_EVERY) {
            self.samples.push_back((now, present.free_bytes));
        }
        while self.samples.len() > 1 && self.samples.front().is_some_and(|(at, _)| now > *at + WINDOW) {
            self.samples.pop_front();
        }
        let report = PoolReport { growth_bytes_per_s: self.growth(now, present.free_bytes), ..present };
        self.due = (report.growth_bytes_per_s > 0).then(|| now + REPORT_EVERY);
        self.reported = Some((now, seen, report.growth_bytes_per_s));
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
        look_at(space, now, pool, 0, 0)
    }

    fn look_at(space: &mut Space, now: Instant, pool: PoolReport, disks: u64, errors: u64) -> Option<u64> {
        let (is_full, is_failed, free) = (pool.is_full, pool.failed.is_some(), pool.free_bytes);
        let seen = Seen { is_full, is_failed, disks, free, errors, kept: 0 };
        if !space.is_news(now, seen) {
            return None;
        }
        match space.report(now, seen, pool) {
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
    fn the_state_of_a_disk_is_told_at_once_and_its_errors_soon() {
        let mut space = Space::default();
        look_at(&mut space, at(0), pool(5), 1, 0);
        assert!(look_at(&mut space, at(1), pool(5), 2, 0).is_some());
        assert!(look_at(&mut space, at(2), pool(5), 2, 7).is_none());
        assert_eq!(space.due(), Some(at(11)), "errors may come in thousands");
        assert!(look_at(&mut space, at(11), pool(5), 2, 9).is_some());
        assert!(look_at(&mut space, at(30), pool(5), 2, 9).is_none());
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
