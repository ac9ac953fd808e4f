//! The authority record of a group, and how a replica's own last record is told apart from another history.

use crate::id::{GroupId, KeyId, NodeId, SnapshotId, VolumeId};
use crate::secret::SealedKey;
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
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
    /// Forgets this record and all after it: what was written under them is given up, and who holds it has diverged. What
    /// is pushed next is of a later epoch.
    pub fn cut_back_to_before(&mut self, stamp: Stamp) {
        self.0.retain(|epoch, _| *epoch <= stamp.epoch);
        let before = self.0.range(..stamp.epoch).next_back().map_or(Generation(0), |(_, generation)| *generation);
        let last = Generation(stamp.generation.0.saturating_sub(1));
        if last > before {
            self.0.insert(stamp.epoch, last);
        } else {
            self.0.remove(&stamp.epoch);
        }
    }
    /// Adds the stamp of a newly committed record.
    pub fn push(&mut self, stamp: Stamp) {
        self.0.insert(stamp.epoch, stamp.generation);
    }
}

/// When a replica counts as having a write (W1). A property of a replica as a secondary; a primary always writes to its own
/// disk first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// C: when it has it on disk.
    #[default]
    Sync,
    /// B: when it has it in memory, checked and in order.
    Memory,
    /// A: it is not waited for and never in sync; it trails, always at a state that the group had.
    Async,
}

/// How far a trailing replica may be behind, and what happens at the bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LagBound {
    /// Bytes of acknowledged writes that it lacks.
    pub bytes: ByteCount,
    /// Age of the oldest acknowledged write that it lacks.
    pub ms: u64,
    pub at_bound: AtBound,
}

/// What a primary does when a trailing replica is as far behind as it may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AtBound {
    /// New writes wait, as long as the replica gets on.
    #[default]
    Slow,
    /// The replica is given up, to be brought up to date later.
    Drop,
}

/// 64 MiB are half a second of a fast disk and most of a minute of a slow line; the primary keeps them in memory. 30 s are what
/// a human would call "a moment ago".
impl Default for LagBound {
    fn default() -> LagBound {
        LagBound { bytes: ByteCount(64 << 20), ms: 30_000, at_bound: AtBound::Slow }
    }
}

/// What a rescue from a pool's disks alone needs to know of a group: what people call it and its volumes, those of its snapshots
/// among them, and the sealed keys of those that are encrypted at rest. It decides nothing and may be out of date.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupNames {
    /// Of the VM, image or volume that it is for.
    pub owner: String,
    pub volumes: BTreeMap<VolumeId, String>,
    /// Of the group's own volumes; what shares their units (snapshots, clones, what is kept) has the same key.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub keys: BTreeMap<VolumeId, SealedKey>,
}

/// The snapshots that a group has, or is to have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshots {
    /// Grows with every change of what is below; of two texts under one stamp the later one counts.
    pub revision: u64,
    /// Every snapshot of which a volume has this number or a lower one is below, or was deleted. Of later ones this text
    /// knows nothing.
    pub minted: u64,
    pub each: BTreeMap<SnapshotId, Snapshot>,
    /// The newest rollback.
    pub rollback: Option<Rollback>,
    /// The group is being born as a copy: its volumes, and the snapshots' volumes that they are made of. Forgotten when it is
    /// there; till then these are not deleted.
    pub origins: BTreeMap<VolumeId, VolumeId>,
}

/// Volumes went back to what a snapshot holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rollback {
    /// A replica that is in sync and has adopted this record, or a later one, has gone back.
    pub at: Stamp,
    /// Each volume, and the one that it holds since.
    pub to: BTreeMap<VolumeId, VolumeId>,
}

/// All volumes of a group at one point of the write stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Every replica that was in sync under this generation has it, and all of it. `None`: it is still to be taken, and the
    /// group's primary does not serve before that is so.
    pub taken: Option<Generation>,
    /// By the volumes under which it can be read.
    pub volumes: BTreeMap<VolumeId, Frozen>,
}

/// A volume of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frozen {
    /// The volume that it was.
    pub of: VolumeId,
    /// The size that it had.
    pub size: ByteCount,
}

impl Snapshots {
    /// The snapshot that is still to be taken. One at a time: the log refuses another meanwhile.
    pub fn untaken(&self) -> Option<(SnapshotId, &Snapshot)> {
        self.each.iter().find(|(_, snapshot)| snapshot.taken.is_none()).map(|(id, snapshot)| (*id, snapshot))
    }

    /// Those that were taken, oldest first.
    pub fn taken(&self) -> impl Iterator<Item = (SnapshotId, &Snapshot)> {
        self.each.iter().filter(|(_, snapshot)| snapshot.taken.is_some()).map(|(id, snapshot)| (*id, snapshot))
    }

    /// Volumes of all snapshots, oldest snapshot first.
    pub fn volumes(&self) -> impl Iterator<Item = (VolumeId, Frozen)> {
        self.each.values().flat_map(|snapshot| snapshot.volumes.iter().map(|(volume, frozen)| (*volume, *frozen)))
    }
}

/// What a node must know of a group to carry a replica of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupSpec {
    pub group: GroupId,
    /// Every node that carries or should carry a replica, in sync or not.
    pub replicas: BTreeSet<NodeId>,
    /// Modes of replicas that are not `Sync`. They change only with the record's generation.
    pub modes: BTreeMap<NodeId, Mode>,
    pub lag: LagBound,
    /// Volumes and their sizes (multiples of a block).
    pub volumes: BTreeMap<VolumeId, ByteCount>,
    /// Volumes that are encrypted at rest, and with which key. A volume never comes here or goes from here while it exists.
    pub keys: BTreeMap<VolumeId, KeyId>,
    pub snapshots: Snapshots,
    pub record: GroupRecord,
    pub lineage: Lineage,
}

impl GroupSpec {
    pub fn mode(&self, replica: NodeId) -> Mode {
        self.modes.get(&replica).copied().unwrap_or_default()
    }

    /// Size of a volume of the group, or of one of its snapshots.
    pub fn size(&self, volume: VolumeId) -> Option<ByteCount> {
        let frozen = || self.snapshots.volumes().find(|(frozen, _)| *frozen == volume).map(|(_, frozen)| frozen.size);
        self.volumes.get(&volume).copied().or_else(frozen)
    }

    /// The key of a volume of the group; a snapshot's volume has the key of the one that it is of. `None`: in the clear.
    pub fn key(&self, volume: VolumeId) -> Option<KeyId> {
        if self.keys.is_empty() {
            return None;
        }
        let frozen = || self.snapshots.volumes().find(|(frozen, _)| *frozen == volume).map(|(_, frozen)| frozen.of);
        let of = if self.volumes.contains_key(&volume) { Some(volume) } else { frozen() };
        of.and_then(|of| self.keys.get(&of)).copied()
    }
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

    #[test]
    fn what_a_promotion_gives_up_is_of_another_history_from_then_on() {
        let mut lineage = Lineage::default();
        for (epoch, generation) in [(1, 1), (1, 2), (1, 3), (2, 4)] {
            lineage.push(stamp(epoch, generation));
        }
        lineage.cut_back_to_before(stamp(1, 3));
        lineage.push(stamp(3, 5));
        assert!(lineage.contains(stamp(1, 2)) && lineage.contains(stamp(3, 5)));
        assert!(!lineage.contains(stamp(1, 3)) && !lineage.contains(stamp(2, 4)));
        lineage.cut_back_to_before(stamp(3, 5));
        assert!(lineage.contains(stamp(1, 2)) && !lineage.contains(stamp(3, 5)));
    }
}
