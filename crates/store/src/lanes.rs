//! Order among requests to the same blocks: a write has its blocks for itself, reads share theirs, and nobody overtakes an
//! earlier request that overlaps. So a read never sees a block while it is being written, and a checksum that does not
//! match is damage, never a race.

use pollux_base::{ExtentIndex, VolumeId};
use std::collections::{BTreeMap, VecDeque};

/// One extent of one volume.
pub type Key = (VolumeId, ExtentIndex);

/// Names a part of a request, the part that falls into one extent.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct PartId(pub u64);

#[derive(Clone, Copy)]
struct Claim {
    part: PartId,
    first: u16,
    count: u16,
    exclusive: bool,
}

impl Claim {
    fn conflicts(&self, other: &Claim) -> bool {
        (self.exclusive || other.exclusive)
            && self.first < other.first + other.count
            && other.first < self.first + self.count
    }
}

#[derive(Default)]
struct Lane {
    held: Vec<Claim>,
    waiting: VecDeque<Claim>,
}

#[derive(Default)]
pub struct Lanes(BTreeMap<Key, Lane>);

impl Lanes {
    /// Claims blocks of an extent. `true`: they are held; otherwise `leave` of another part gives them later.
    pub fn enter(&mut self, key: Key, part: PartId, first: u16, count: u16, exclusive: bool) -> bool {
        let lane = self.0.entry(key).or_default();
        let claim = Claim { part, first, count, exclusive };
        let blocked = lane.held.iter().chain(&lane.waiting).any(|other| claim.conflicts(other));
        if blocked {
            lane.waiting.push_back(claim);
        } else {
            lane.held.push(claim);
        }
        !blocked
    }

    /// Gives up what the part holds or waits for. Gives the parts that now hold their blocks.
    pub fn leave(&mut self, key: Key, part: PartId) -> Vec<PartId> {
        let Some(lane) = self.0.get_mut(&key) else { return Vec::new() };
        lane.held.retain(|claim| claim.part != part);
        lane.waiting.retain(|claim| claim.part != part);
        let mut granted = Vec::new();
        let mut still: VecDeque<Claim> = VecDeque::new();
        for claim in std::mem::take(&mut lane.waiting) {
            if lane.held.iter().chain(&still).any(|other| claim.conflicts(other)) {
                still.push_back(claim);
            } else {
                lane.held.push(claim);
                granted.push(claim.part);
            }
        }
        lane.waiting = still;
        if lane.held.is_empty() && lane.waiting.is_empty() {
            self.0.remove(&key);
        }
        granted
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_requests_keep_their_order_and_others_pass() {
        let key = (VolumeId(1), ExtentIndex(0));
        let mut lanes = Lanes::default();
        assert!(lanes.enter(key, PartId(1), 0, 8, true));
        assert!(!lanes.enter(key, PartId(2), 4, 8, false), "a read waits for the write it overlaps");
        assert!(!lanes.enter(key, PartId(3), 11, 1, true), "a write waits behind an earlier read");
        assert!(lanes.enter(key, PartId(4), 12, 4, true), "what overlaps nothing passes");
        assert_eq!(lanes.leave(key, PartId(1)), [PartId(2)]);
        assert_eq!(lanes.leave(key, PartId(2)), [PartId(3)]);
        lanes.leave(key, PartId(3));
        lanes.leave(key, PartId(4));
        assert!(lanes.is_empty());
    }
}
