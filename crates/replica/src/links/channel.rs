//! What is carried between two nodes, over whichever paths there are: every frame once and in order.
//!
//! base <= next: frames below `base` have arrived at the peer, those from `base` on are kept until they have.
//! Whatever is kept is in flight on some path, or homeless. `received` counts what arrived here in order; what came early
//! waits for what comes before it.

use super::{EARLY_BYTES_MAX, KEPT_BYTES_MAX};
use crate::wire::{Frame, Message};
use pollux_base::{Instant, Session};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// A message without blocks is about so long on the wire, and longer in memory.
const FRAME_BYTES: usize = 256;

pub(super) struct Channel {
    /// The same on both nodes.
    pub id: u64,
    /// This node's number for it.
    pub session: Session,
    /// The peer knows it, too.
    pub is_established: bool,
    /// Since when it has no path.
    pub alone_since: Option<Instant>,
    base: u64,
    kept: VecDeque<Frame>,
    kept_bytes: usize,
    /// Kept, and in flight on no path.
    pub homeless: BTreeSet<u64>,
    received: u64,
    early: BTreeMap<u64, Frame>,
    early_bytes: usize,
}

/// What becomes of a frame that has arrived.
#[expect(clippy::large_enum_variant, reason = "it lives for one match; a box would be an allocation for each frame")]
pub(super) enum Arrival {
    /// This one, and then what `take_early` gives.
    InOrder(Frame),
    Early,
    /// It came before, on another path.
    Again,
    /// More is missing in between than the peer may have under way.
    TooFar,
}

impl Channel {
    pub fn new(id: u64, session: Session, now: Instant) -> Channel {
        Channel {
            id,
            session,
            is_established: false,
            alone_since: Some(now),
            base: 0,
            kept: VecDeque::new(),
            kept_bytes: 0,
            homeless: BTreeSet::new(),
            received: 0,
            early: BTreeMap::new(),
            early_bytes: 0,
        }
    }

    /// Keeps a frame to be sent, and gives its number. `None`: the peer has not taken what was sent for so long that it
    /// must be given up.
    pub fn keep(&mut self, frame: Frame) -> Option<u64> {
        self.kept_bytes += bytes_of(&frame);
        self.kept.push_back(frame);
        (self.kept_bytes <= KEPT_BYTES_MAX).then(|| self.base + self.kept.len() as u64 - 1)
    }

    /// A frame that is kept.
    pub fn kept(&self, number: u64) -> Option<&Frame> {
        self.kept.get(usize::try_from(number.checked_sub(self.base)?).ok()?)
    }

    /// Everything below `received` has arrived at the peer. `false`: more than was ever sent.
    pub fn on_received(&mut self, received: u64) -> bool {
        if received > self.base + self.kept.len() as u64 {
            return false;
        }
        while self.base < received {
            let frame = self.kept.pop_front().expect("no more than was sent has arrived, as just checked");
            self.kept_bytes -= bytes_of(&frame);
            self.homeless.remove(&self.base);
            self.base += 1;
        }
        true
    }

    /// Everything below has arrived at the peer.
    pub fn base(&self) -> u64 {
        self.base
    }

    pub fn received(&self) -> u64 {
        self.received
    }

    pub fn on_frame(&mut self, number: u64, frame: Frame) -> Arrival {
        match number {
            number if number < self.received || self.early.contains_key(&number) => Arrival::Again,
            number if number == self.received => {
                self.received += 1;
                Arrival::InOrder(frame)
            }
            number => {
                self.early_bytes += bytes_of(&frame);
                self.early.insert(number, frame);
                if self.early_bytes > EARLY_BYTES_MAX { Arrival::TooFar } else { Arrival::Early }
            }
        }
    }

    /// What came early and is next now.
    pub fn take_early(&mut self) -> Option<Frame> {
        let entry = self.early.first_entry().filter(|entry| *entry.key() == self.received)?;
        let frame = entry.remove();
        self.early_bytes -= bytes_of(&frame);
        self.received += 1;
        Some(frame)
    }

    pub fn check(&self) {
        assert_eq!(self.kept_bytes, self.kept.iter().map(bytes_of).sum::<usize>());
        assert!(self.early.keys().all(|number| *number > self.received), "what is next is never kept waiting");
        assert!(self.homeless.iter().all(|number| self.kept(*number).is_some()), "only what is kept needs a path");
    }
}

/// What a frame takes of a channel's bounds.
pub(super) fn bytes_of(frame: &Frame) -> usize {
    FRAME_BYTES + frame.checksums.len() * 8 + frame.data.as_ref().map_or(0, |data| data.len())
}

/// Answers that the peer acknowledges with its next frame, not at once: whoever asks for a lease asks again soon, and an
/// idle pair of nodes says no more than it must.
pub(super) fn is_quiet(frame: &Frame) -> bool {
    matches!(frame.message, Message::LeaseGrant { .. })
}
