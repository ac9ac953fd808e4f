//! The authority record of a group, and how a replica's own last record is told apart from another history.

use crate::id::{GroupId, NodeId, VolumeId};
use crate::unit::{ByteCount, Epoch, Generation};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Who may accept I/O for a group and who holds every acknowledged write. Changed only by a committed entry of the
/// cluster log (W3, W4, W9), each time under a higher generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupRecord {
    /// The epoch under which this record was committed, and its generation.
    pub stamp: Stamp,
    /// Replica that accepts I/O.
    pub primary: NodeId,
    /// Replicas that hold every acknowledged write. Never empty. May lack the primary when its own disk is lost (W6).
    pub in_sync: BTreeSet<NodeId>,
}

/// Names one record of a group for good: two histories that split may both have a generation 7, but never under the
/// same epoch, because an epoch has one log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Stamp {
    pub epoch: Epoch,
    pub generation: Generation,
}

/// The history of a group's records as the cluster log has it: for each epoch that has records, the last generation
/// reached in it. A stamp belongs to this history if its epoch is here and its generation is not beyond.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lineage(pub BTreeMap<Epoch, Generation>);

impl Lineage {
    /// Whether a record with this stamp was ever committed in this history. If not, the replica that carries it has
    /// `diverged` (W10).
    pub fn contains(&self, stamp: Stamp) -> bool {
        self.0.get(&stamp.epoch).is_some_and(|last| {
            let before = self.0.range(..stamp.epoch).next_back().map_or(Generation(0), |(_, generation)| *generation);
            stamp.generation <= *last && stamp.generation > before
        })
    }
    /// Adds the stamp of a newly committed record.
    pub fn push(&mut self, stamp: Stamp) {
        self.0.insert(stamp.epoch, stamp.generation);
    }
}

/// What a node must know of a group to carry a replica of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupSpec {
    pub group: GroupId,
    /// Every node that carries or should carry a replica, in sync or not.
    pub replicas: BTreeSet<NodeId>,
    /// Volumes and their sizes (multiples of a block).
    pub volumes: BTreeMap<VolumeId, ByteCount>,
    pub record: GroupRecord,
    pub lineage: Lineage,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(epoch: u64, generation: u64) -> Stamp {
        Stamp { epoch: Epoch(epoch), generation: Generation(generation) }
    }

    #[test]
    fn a_generation_minted_under_another_epoch_is_another_history() {
        let mut lineage = Lineage::default();
        for (epoch, generation) in [(1, 1), (1, 2), (3, 3)] {
            lineage.push(stamp(epoch, generation));
        }
        assert!(lineage.contains(stamp(1, 1)) && lineage.contains(stamp(1, 2)) && lineage.contains(stamp(3, 3)));
        assert!(!lineage.contains(stamp(2, 3)), "epoch 2 had no record in this history");
        assert!(!lineage.contains(stamp(1, 3)), "generation 3 was not reached under epoch 1");
        assert!(!lineage.contains(stamp(3, 2)), "generation 2 was not minted under epoch 3");
    }
}
