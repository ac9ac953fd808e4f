//! One connection as a path of a channel: what is in flight on it, and whether it can still be trusted.
//!
//! A path that does not answer is first suspected, then, if another path answers meanwhile, passed over: what was in
//! flight on it goes over the other. That the other must answer tells a dead path from a peer that stands still.
//!
//! ```text
//!  Good ──(silent for SUSPECT_AFTER while something is in flight)──► Suspect ──(another path answers)──► PassedOver
//!    ▲                                                                  │                                   │
//!    └──────────────────────────(it is heard again)─────────────────────┴───────────────────────────────────┘
//!                                       either for PATH_DEAD: closed, to be dialled anew
//! ```

use super::{ACK_AFTER, PATH_DEAD, PING_EVERY, RIVAL_LEAD, SETTLED_AFTER, SUSPECT_AFTER};
use pollux_base::{Instant, NodeId};
use std::collections::VecDeque;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trust {
    Good {
        since: Instant,
    },
    /// `rival`: when another path was heard meanwhile.
    Suspect {
        since: Instant,
        rival: Option<Instant>,
    },
    PassedOver {
        since: Instant,
    },
}

pub(super) struct Path {
    pub peer: NodeId,
    /// Place of its address in the configuration: the lowest is the most wanted.
    pub rank: u8,
    /// Channels that the node with the lower id names on this path: random at first, then counted up.
    pub next_channel: u64,
    /// Both sides have agreed on the channel that it carries.
    pub is_joined: bool,
    pub up_since: Instant,
    pub trust: Trust,
    pub heard: Instant,
    /// In the order in which they were sent, with their lengths. Those below the channel's base have arrived.
    flight: VecDeque<(u64, Instant, usize)>,
    /// In flight, but acknowledged only by and by.
    quiet: VecDeque<u64>,
    pub flight_bytes: usize,
    pinged: Option<Instant>,
    ack_at: Option<Instant>,
    /// A newer path over the same addresses has taken its place.
    pub retire_at: Option<Instant>,
}

impl Path {
    pub fn new(peer: NodeId, rank: u8, random: u64, now: Instant) -> Path {
        Path {
            peer,
            rank,
            next_channel: random,
            is_joined: false,
            up_since: now,
            trust: Trust::Good { since: now },
            heard: now,
            flight: VecDeque::new(),
            quiet: VecDeque::new(),
            flight_bytes: 0,
            pinged: None,
            ack_at: None,
            retire_at: None,
        }
    }

    /// Which path is to be taken: the lowest. A path that was just mended waits a little before it is wanted again.
    pub fn preference(&self, now: Instant) -> (u8, bool, u8) {
        let is_retiring = self.retire_at.is_some();
        match self.trust {
            Trust::Good { since } => (0, is_retiring || now < since + SETTLED_AFTER, self.rank),
            Trust::Suspect { .. } => (1, is_retiring, self.rank),
            Trust::PassedOver { .. } => (2, is_retiring, self.rank),
        }
    }

    pub fn on_sent(&mut self, number: u64, bytes: usize, is_quiet: bool, now: Instant) {
        if is_quiet {
            self.quiet.push_back(number);
        } else {
            self.flight.push_back((number, now, bytes));
            self.flight_bytes += bytes;
        }
        self.ack_at = None;
    }

    /// Something says what has been received: no word of its own is needed for that.
    pub fn on_spoken(&mut self) {
        self.ack_at = None;
    }

    /// What has been received is to be said soon.
    pub fn want_ack(&mut self, now: Instant) {
        self.ack_at.get_or_insert(now + ACK_AFTER);
    }

    pub fn on_pinged(&mut self, now: Instant) -> bool {
        let is_new = self.pinged.is_none();
        self.pinged.get_or_insert(now);
        is_new
    }

    /// Whether it has become one that can be trusted again.
    pub fn on_heard(&mut self, now: Instant) -> bool {
        self.heard = now;
        let was_passed_over = matches!(self.trust, Trust::PassedOver { .. });
        match self.trust {
            Trust::Good { .. } => {}
            // Only slow: nothing has moved.
            Trust::Suspect { since, .. } => self.trust = Trust::Good { since: self.up_since.min(since) },
            Trust::PassedOver { .. } => self.trust = Trust::Good { since: now },
        }
        was_passed_over
    }

    pub fn on_pong(&mut self) {
        self.pinged = None;
    }

    /// Everything below `base` has arrived.
    pub fn on_received(&mut self, base: u64) {
        while let Some((_, _, bytes)) = self.flight.pop_front_if(|(number, ..)| *number < base) {
            self.flight_bytes -= bytes;
        }
        while self.quiet.pop_front_if(|number| *number < base).is_some() {}
    }

    /// Gives away what was in flight.
    pub fn take_flight(&mut self) -> impl Iterator<Item = u64> + use<> {
        self.flight_bytes = 0;
        let flight = std::mem::take(&mut self.flight).into_iter().map(|(number, ..)| number);
        flight.chain(std::mem::take(&mut self.quiet))
    }

    /// Since when it owes an answer.
    fn owes_since(&self) -> Option<Instant> {
        let sent = self.flight.front().map(|(_, sent, _)| *sent);
        sent.into_iter().chain(self.pinged).min()
    }

    /// When it becomes suspect.
    fn suspect_at(&self, awake_since: Instant) -> Option<Instant> {
        Some(self.owes_since()?.max(self.heard).max(awake_since) + SUSPECT_AFTER)
    }

    pub fn ack_is_due(&self, now: Instant) -> bool {
        self.ack_at.is_some_and(|at| at <= now)
    }

    pub fn ping_is_due(&self, now: Instant) -> bool {
        self.pinged.is_none() && self.heard + PING_EVERY <= now
    }

    pub fn suspicion_is_due(&self, now: Instant, awake_since: Instant) -> bool {
        matches!(self.trust, Trust::Good { .. }) && self.suspect_at(awake_since).is_some_and(|at| at <= now)
    }

    /// Another path has answered while this one still does not.
    pub fn is_outdone(&self, now: Instant) -> bool {
        matches!(self.trust, Trust::Suspect { rival: Some(rival), .. } if rival + RIVAL_LEAD <= now)
    }

    /// When `PATH_DEAD` is over.
    fn dead_at(&self, awake_since: Instant) -> Option<Instant> {
        match self.trust {
            Trust::Good { .. } => None,
            Trust::Suspect { since, .. } | Trust::PassedOver { since } => Some(since.max(awake_since) + PATH_DEAD),
        }
    }

    pub fn is_dead(&self, now: Instant, awake_since: Instant) -> bool {
        self.dead_at(awake_since).is_some_and(|at| at <= now)
    }

    /// When it is to be looked at. `pings`: this node looks after idle paths.
    pub fn deadline(&self, pings: bool, awake_since: Instant) -> Option<Instant> {
        let suspicion = match self.trust {
            Trust::Good { .. } => self.suspect_at(awake_since),
            Trust::Suspect { rival: Some(rival), .. } => Some(rival + RIVAL_LEAD),
            Trust::Suspect { rival: None, .. } | Trust::PassedOver { .. } => None,
        };
        let ping = (pings && self.pinged.is_none()).then(|| self.heard + PING_EVERY);
        let dead = self.dead_at(awake_since);
        self.ack_at.into_iter().chain(self.retire_at).chain(suspicion).chain(ping).chain(dead).min()
    }
}
