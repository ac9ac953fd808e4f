//! When to dial a peer at one of its addresses. Pure.
//!
//! Each address has a connection of its own, kept up all the time. A lost one is made anew at once; after failures there
//! are pauses, which grow to a quarter of a second: a path that works again is found within about that.

use pollux_base::Instant;
use std::net::SocketAddr;
use std::time::Duration;

const PAUSE_MIN: Duration = Duration::from_millis(50);
/// An attempt costs a few small packets; guests may be waiting for what it finds.
const PAUSE_MAX: Duration = Duration::from_millis(250);
/// The pause after a connection that died young.
const PAUSE_YOUNG: Duration = Duration::from_millis(1000);
/// A connection that lived this long was a good one: it is made anew at once when it is lost. One that died younger may
/// die of the same cause again, and is not made anew in a hurry.
const GOOD_AFTER: Duration = Duration::from_secs(2);

/// Dials one address.
#[derive(Debug)]
pub struct Dialer {
    pub address: SocketAddr,
    state: State,
    pause: Duration,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    /// To be dialled at this moment.
    Idle {
        at: Instant,
    },
    /// An attempt is under way.
    Dialling,
    Up {
        since: Instant,
    },
    /// Up, and a connection that is to take its place is being made.
    Renewing {
        since: Instant,
    },
}

impl Dialer {
    pub fn new(address: SocketAddr, now: Instant) -> Dialer {
        Dialer { address, state: State::Idle { at: now }, pause: PAUSE_MIN }
    }

    /// When `dial` is to be called.
    pub fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Idle { at } => Some(at),
            _ => None,
        }
    }

    /// Whether it is to be dialled now; the attempt ends in `on_up` or `on_failed`.
    pub fn dial(&mut self, now: Instant) -> bool {
        let is_due = self.deadline().is_some_and(|at| at <= now);
        if is_due {
            self.state = State::Dialling;
        }
        is_due
    }

    /// What kept it from being dialled has changed.
    pub fn hurry(&mut self, now: Instant) {
        if let State::Idle { at } = &mut self.state {
            *at = now.min(*at);
        }
    }

    /// Asks for a connection that takes the place of the one that is up. Whether there is one: it is to be dialled now.
    pub fn renew(&mut self) -> bool {
        let State::Up { since } = self.state else { return false };
        self.state = State::Renewing { since };
        true
    }

    /// The attempt has led to a connection with the peer.
    pub fn on_up(&mut self, now: Instant) {
        self.pause = PAUSE_MIN;
        self.state = State::Up { since: now };
    }

    /// The attempt has failed.
    pub fn on_failed(&mut self, now: Instant) {
        self.state = match self.state {
            State::Renewing { since } => State::Up { since },
            State::Dialling => {
                let at = now + self.pause;
                self.pause = (self.pause * 2).min(PAUSE_MAX);
                State::Idle { at }
            }
            State::Idle { .. } | State::Up { .. } => panic!("only an attempt can fail: {:?}", self.state),
        };
    }

    /// The connection is lost.
    pub fn on_down(&mut self, now: Instant) {
        self.state = match self.state {
            State::Up { since } if now.since(since) >= GOOD_AFTER => State::Idle { at: now },
            State::Up { .. } => State::Idle { at: now + PAUSE_YOUNG },
            // The attempt that was to renew it is now the attempt.
            State::Renewing { .. } => State::Dialling,
            State::Idle { .. } | State::Dialling => panic!("only a connection can be lost: {:?}", self.state),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Instant = Instant(1_000_000_000);

    fn dialer() -> Dialer {
        Dialer::new(SocketAddr::from(([192, 0, 2, 1], 7000)), START)
    }

    #[test]
    fn after_failures_there_are_growing_pauses() {
        let mut dialer = dialer();
        let mut now = START;
        let mut pauses = Vec::new();
        for _ in 0..8 {
            assert!(dialer.dial(now));
            assert!(!dialer.dial(now), "one attempt at a time");
            dialer.on_failed(now);
            let next = dialer.deadline().expect("it goes on trying");
            pauses.push(next.since(now).as_millis());
            now = next;
        }
        assert_eq!(pauses, [50, 100, 200, 250, 250, 250, 250, 250]);
        dialer.hurry(START);
        assert!(dialer.dial(START));
    }

    #[test]
    fn a_lost_connection_is_made_anew_at_once_but_not_in_a_loop() {
        let mut dialer = dialer();
        dialer.dial(START);
        dialer.on_up(START);
        assert_eq!(dialer.deadline(), None);
        let now = START + GOOD_AFTER;
        dialer.on_down(now);
        assert!(dialer.dial(now));
        dialer.on_up(now);
        dialer.on_down(now);
        assert!(!dialer.dial(now), "it died young");
    }

    #[test]
    fn a_connection_is_renewed_without_a_gap() {
        let mut dialer = dialer();
        assert!(!dialer.renew(), "there is none");
        dialer.dial(START);
        dialer.on_up(START);
        assert!(dialer.renew());
        dialer.on_failed(START);
        assert_eq!(dialer.deadline(), None, "the old one is still there");
        assert!(dialer.renew());
        dialer.on_down(START);
        assert!(!dialer.dial(START), "the attempt goes on");
        dialer.on_up(START);
    }
}
