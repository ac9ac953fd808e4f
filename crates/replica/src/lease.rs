//! The right to serve, between two nodes (W5): what the peer granted us, and what we promised it. Per peer, not per
//! group, so that an idle node sends the same few messages for one group as for a thousand; a group that must not be
//! served is named in the grant as refused.
//!
//! The lease runs from when the question was *sent*, the promise from when it was *received*, and the promise is longer by
//! the allowed drift: so it always outlasts the lease.

use pollux_base::Instant;
use pollux_base::timing::{LEASE, promise};
use std::collections::BTreeMap;

/// Questions that may be unanswered. An answer to an older one would come too late to be of use: `LEASE` has passed.
const ASKS_MAX: usize = 8;

#[derive(Debug)]
pub(crate) struct Lease {
    /// Until when the peer's grant lets us serve.
    until: Instant,
    /// Until when we keep away from what the peer may be serving.
    promised_until: Instant,
    asked: BTreeMap<u64, Instant>,
    next_number: u64,
}

impl Lease {
    /// Whoever just started may have made a promise right before; it counts as made to everybody.
    pub(crate) fn new(started: Instant) -> Lease {
        Lease { until: Instant(0), promised_until: started + promise(LEASE), asked: BTreeMap::new(), next_number: 1 }
    }

    /// The number of a question sent now.
    pub(crate) fn ask(&mut self, now: Instant) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        self.asked.insert(number, now);
        while self.asked.len() > ASKS_MAX {
            self.asked.pop_first();
        }
        number
    }

    /// The peer answered question `number`. An unknown number is ignored: it was asked in an earlier run, or too long ago.
    pub(crate) fn on_grant(&mut self, number: u64) {
        let Some(sent) = self.asked.remove(&number) else { return };
        self.asked = self.asked.split_off(&number);
        self.until = self.until.max(sent + LEASE);
    }

    /// The peer asked us: from now on we are bound.
    pub(crate) fn promise(&mut self, now: Instant) {
        self.promised_until = self.promised_until.max(now + promise(LEASE));
    }

    /// The peer is proven unable to act: promises made to it until now bind no more.
    pub(crate) fn on_fenced(&mut self) {
        self.promised_until = Instant(0);
    }

    /// Questions of an ended connection are not answered any more.
    pub(crate) fn forget_asks(&mut self) {
        self.asked.clear();
    }

    pub(crate) fn holds(&self, now: Instant) -> bool {
        now < self.until
    }

    pub(crate) fn until(&self) -> Instant {
        self.until
    }

    pub(crate) fn promised_until(&self) -> Instant {
        self.promised_until
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_lease_runs_from_its_question_and_a_promise_outlasts_it() {
        let at = |ms: u64| Instant(ms * 1_000_000) + Duration::from_secs(10);
        let (mut asker, mut giver) = (Lease::new(at(0)), Lease::new(at(0)));
        assert!(!asker.holds(at(0)));
        let number = asker.ask(at(100));
        giver.promise(at(300));
        asker.on_grant(number);
        assert!(asker.holds(at(1599)) && !asker.holds(at(1600)));
        assert!(giver.promised_until() >= at(1800));
        asker.on_grant(number);
        assert!(!asker.holds(at(1600)), "the same answer again is worth nothing");
    }

    #[test]
    fn whoever_just_started_keeps_the_promises_it_may_have_made() {
        let started = Instant(5_000_000_000);
        assert_eq!(Lease::new(started).promised_until(), started + promise(LEASE));
    }
}
