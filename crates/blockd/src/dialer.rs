//! When to dial a peer, and at which of its addresses. Pure.
//!
//! Addresses are tried in the order wanted. When a connection is lost, the next address is tried at once, so that
//! replication moves to another network before anybody asks for a record without the peer. After a round of failures
//! there is a pause, which grows to a second: a peer that is back is found within about that.

use pollux_base::Instant;
use std::net::SocketAddr;
use std::time::Duration;

const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_millis(1000);
/// A connection on an address that is not the most wanted is replaced when that one works again; looked for this often.
const BETTER_EVERY: Duration = Duration::from_secs(20);

/// A connection that lived this long was a good one: it is made anew at once when it is lost. One that died younger may
/// die of the same cause again, and is not made anew in a hurry.
const GOOD_AFTER: Duration = Duration::from_secs(2);

/// Dials one peer.
#[derive(Debug)]
pub struct Dialer {
    addresses: Vec<SocketAddr>,
    state: State,
    pause: Duration,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    /// The address at this place is to be dialled at this moment, the first after a round of `tried` failures.
    Idle {
        next: usize,
        tried: usize,
        at: Instant,
    },
    /// An attempt is under way.
    Dialling {
        index: usize,
        tried: usize,
    },
    Up {
        index: usize,
        since: Instant,
        better_at: Instant,
    },
    /// Up, and the most wanted address is being dialled as well.
    Bettering {
        index: usize,
        since: Instant,
    },
}

impl Dialer {
    pub fn new(addresses: Vec<SocketAddr>, now: Instant) -> Dialer {
        Dialer { addresses, state: State::Idle { next: 0, tried: 0, at: now }, pause: PAUSE_MIN }
    }

    /// Other addresses. A connection that is up stays.
    pub fn set_addresses(&mut self, addresses: Vec<SocketAddr>, now: Instant) {
        if self.addresses == addresses {
            return;
        }
        self.addresses = addresses;
        match &mut self.state {
            State::Idle { next, tried, at } => (*next, *tried, *at) = (0, 0, now),
            State::Dialling { index, tried } => (*index, *tried) = (0, 0),
            State::Up { index, better_at, .. } => (*index, *better_at) = (usize::MAX, now),
            State::Bettering { index, .. } => *index = usize::MAX,
        }
    }

    /// When `dial` is to be called.
    pub fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Idle { at, .. } if !self.addresses.is_empty() => Some(at),
            State::Up { index, better_at, .. } if index != 0 && !self.addresses.is_empty() => Some(better_at),
            _ => None,
        }
    }

    /// The address to be dialled now, if any; the attempt ends in `on_up` or `on_failed`.
    pub fn dial(&mut self, now: Instant) -> Option<SocketAddr> {
        if self.deadline().is_none_or(|at| at > now) {
            return None;
        }
        match self.state {
            State::Idle { next, tried, .. } => {
                let index = if next < self.addresses.len() { next } else { 0 };
                self.state = State::Dialling { index, tried };
                self.addresses.get(index).copied()
            }
            State::Up { index, since, .. } => {
                self.state = State::Bettering { index, since };
                self.addresses.first().copied()
            }
            State::Dialling { .. } | State::Bettering { .. } => None,
        }
    }

    /// The attempt has led to a connection with the peer.
    pub fn on_up(&mut self, now: Instant) {
        let index = match self.state {
            State::Dialling { index, .. } => index,
            State::Bettering { .. } => 0,
            State::Idle { .. } | State::Up { .. } => {
                panic!("only an attempt can lead to a connection: {:?}", self.state)
            }
        };
        self.pause = PAUSE_MIN;
        self.state = State::Up { index, since: now, better_at: now + BETTER_EVERY };
    }

    /// The attempt has failed.
    pub fn on_failed(&mut self, now: Instant) {
        self.state = match self.state {
            State::Dialling { index, tried } if tried + 1 < self.addresses.len() => {
                State::Idle { next: (index + 1) % self.addresses.len(), tried: tried + 1, at: now }
            }
            State::Dialling { .. } => {
                let at = now + self.pause;
                self.pause = (self.pause * 2).min(PAUSE_MAX);
                State::Idle { next: 0, tried: 0, at }
            }
            State::Bettering { index, since } => State::Up { index, since, better_at: now + BETTER_EVERY },
            State::Idle { .. } | State::Up { .. } => panic!("only an attempt can fail: {:?}", self.state),
        };
    }

    /// The connection is lost.
    pub fn on_down(&mut self, now: Instant) {
        let count = self.addresses.len().max(1);
        self.state = match self.state {
            State::Up { index, since, .. } => {
                let next = if index < count { (index + 1) % count } else { 0 };
                let at = if now.since(since) >= GOOD_AFTER { now } else { now + PAUSE_MAX };
                State::Idle { next, tried: 0, at }
            }
            // The attempt that was to better it is now the attempt.
            State::Bettering { .. } => State::Dialling { index: 0, tried: 0 },
            State::Idle { .. } | State::Dialling { .. } => {
                panic!("only a connection can be lost: {:?}", self.state)
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Instant = Instant(1_000_000_000);

    fn address(last: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, last], 7000))
    }

    fn dialer() -> Dialer {
        Dialer::new(vec![address(1), address(2)], START)
    }

    #[test]
    fn the_other_address_is_tried_at_once_then_there_is_a_growing_pause() {
        let mut dialer = dialer();
        let mut now = START;
        let mut pauses = Vec::new();
        for _ in 0..8 {
            assert_eq!(dialer.dial(now), Some(address(1)));
            assert_eq!(dialer.dial(now), None, "one attempt at a time");
            dialer.on_failed(now);
            assert_eq!(dialer.dial(now), Some(address(2)));
            dialer.on_failed(now);
            let next = dialer.deadline().expect("it goes on trying");
            pauses.push(next.since(now).as_millis());
            now = next;
        }
        assert_eq!(pauses, [50, 100, 200, 400, 800, 1000, 1000, 1000]);
    }

    #[test]
    fn a_lost_connection_moves_to_the_other_network_and_later_back() {
        let mut dialer = dialer();
        dialer.dial(START);
        dialer.on_up(START);
        assert_eq!(dialer.deadline(), None);
        let now = START + GOOD_AFTER;
        dialer.on_down(now);
        assert_eq!(dialer.dial(now), Some(address(2)));
        dialer.on_up(now);
        let later = dialer.deadline().expect("the wanted address is tried again");
        assert_eq!(dialer.dial(now), None);
        assert_eq!(dialer.dial(later), Some(address(1)));
        dialer.on_failed(later);
        let later = dialer.deadline().expect("and again");
        assert_eq!(dialer.dial(later), Some(address(1)));
        dialer.on_up(later);
        assert_eq!(dialer.deadline(), None, "nothing is better than the most wanted");
    }

    #[test]
    fn losing_the_connection_while_bettering_it_leaves_the_attempt() {
        let mut dialer = dialer();
        dialer.dial(START);
        dialer.on_failed(START);
        dialer.dial(START);
        dialer.on_up(START);
        let later = dialer.deadline().expect("the wanted address is tried again");
        dialer.dial(later);
        dialer.on_down(later);
        dialer.on_up(later);
        assert_eq!(dialer.deadline(), None);
    }

    #[test]
    fn a_peer_whose_connections_die_young_is_not_dialled_in_a_loop() {
        let mut dialer = dialer();
        dialer.dial(START);
        dialer.on_up(START);
        dialer.on_down(START);
        assert_eq!(dialer.dial(START), None);
    }

    #[test]
    fn new_addresses_are_dialled_at_once() {
        let mut dialer = dialer();
        dialer.dial(START);
        dialer.on_failed(START);
        dialer.dial(START);
        dialer.on_failed(START);
        dialer.set_addresses(vec![address(3)], START);
        assert_eq!(dialer.dial(START), Some(address(3)));
        dialer.set_addresses(Vec::new(), START);
        dialer.on_failed(START);
        assert_eq!(dialer.deadline(), None);
    }
}
