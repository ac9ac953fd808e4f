//! Order among requests to the same blocks: a write has its blocks for itself, reads share theirs, and nobody overtakes an
//! earlier request that overlaps. So a read never sees a block while it is being written, and a checksum that does not
//! match is damage, never a race.

use crate::slots::LayerId;
use crate::transfer::PartId;
use pollux_base::ExtentIndex;
use std::collections::{BTreeMap, VecDeque};

/// One extent of one layer.
pub type Key = (LayerId, ExtentIndex);

/// All layers that grew from one volume: a request may read through several of them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct FamilyId(pub u64);

/// One extent of all layers of a family.
pub type LaneKey = (FamilyId, ExtentIndex);

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
pub struct Lanes {
    lanes: BTreeMap<LaneKey, Lane>,
    /// Empty ones, kept for their memory.
    spare: Vec<Lane>,
}

/// Enough for what is usually under way at once.
const SPARE_MAX: usize = 64;

impl Lanes {
    /// Claims blocks of an extent. `true`: they are held; otherwise `leave` of another part gives them later.
    pub fn enter(&mut self, key: LaneKey, part: PartId, first: u16, count: u16, exclusive: bool) -> bool {
        let lane = self.lanes.entry(key).or_insert_with(|| self.spare.pop().unwrap_or_default());
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
    pub fn leave(&mut self, key: LaneKey, part: PartId) -> Vec<PartId> {
        let Some(lane) = self.lanes.get_mut(&key) else { return Vec::new() };
        lane.held.retain(|claim| claim.part != part);
        lane.waiting.retain(|claim| claim.part != part);
        let mut granted = Vec::new();
        if !lane.waiting.is_empty() {
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
        }
        if lane.held.is_empty()
            && lane.waiting.is_empty()
            && let Some(lane) = self.lanes.remove(&key)
            && self.spare.len() < SPARE_MAX
        {
            self.spare.push(lane);
        }
        granted
    }

    pub fn is_empty(&self) -> bool {
        self.lanes.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_requests_keep_their_order_and_others_pass() {
        let key = (FamilyId(1), ExtentIndex(0));
        let [one, two, three, four] = [1, 2, 3, 4].map(PartId::from_raw);
        let mut lanes = Lanes::default();
        assert!(lanes.enter(key, one, 0, 8, true));
        assert!(!lanes.enter(key, two, 4, 8, false), "a read waits for the write it overlaps");
        assert!(!lanes.enter(key, three, 11, 1, true), "a write waits behind an earlier read");
        assert!(lanes.enter(key, four, 12, 4, true), "what overlaps nothing passes");
        assert_eq!(lanes.leave(key, one), [two]);
        assert_eq!(lanes.leave(key, two), [three]);
        lanes.leave(key, three);
        lanes.leave(key, four);
        assert!(lanes.is_empty());
    }
}
