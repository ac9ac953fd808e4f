//! States of a replica that are kept before it is overwritten, as snapshots of this node's store alone.
//!
//! * W9: the last state that a replica held before it fell out is kept while it is brought up to date, because a replica in the
//!   middle of that is of no use if the others die. It goes when the replica is in sync again, or first of all when anybody
//!   waits for space.
//! * W10: what a diverged replica holds is kept as evidence when a human gives it up. It stays as long as the replica.

use crate::group::Group;
use crate::node::{Node, Purpose};
use crate::note::Note;
use pollux_base::VolumeId;
use pollux_store::StoreOp;
use std::collections::BTreeSet;

/// Set in the numbers of volumes that hold the last state before a resync. No log mints such numbers.
const BEFORE_RESYNC: u64 = 1 << 62;
/// Set in those of evidence; which of them it is lies in the bits from `EVIDENCE_SHIFT` on.
const EVIDENCE: u64 = 1 << 61;
const EVIDENCE_SHIFT: u32 = 48;
/// Evidence of one volume: a human's decisions, each about a split that lost writes.
const EVIDENCE_MAX: u64 = 1 << 12;
/// A resync may take as much space anew as the replica has: with less free than this part of the pool nothing is kept.
const FREE_PART_MIN: u64 = 10;

/// The volume that keeps another's state before a resync.
pub(crate) fn before_resync(volume: VolumeId) -> VolumeId {
    VolumeId(BEFORE_RESYNC | volume.0)
}

fn is_before_resync(volume: VolumeId) -> bool {
    volume.0 & BEFORE_RESYNC != 0 && volume.0 & (1 << 63) == 0
}

/// The volume that keeps another's state as evidence, the first or a later one.
pub(crate) fn evidence(volume: VolumeId, number: u64) -> VolumeId {
    VolumeId(EVIDENCE | number << EVIDENCE_SHIFT | volume.0)
}

impl Group {
    /// What keeps the state here before it is overwritten under the record that is being adopted, if it is to be kept.
    pub(crate) fn keep_op(&self, node: &Node, note: Option<&Note>, is_discarded: bool) -> Option<StoreOp> {
        let spec = self.spec.as_ref()?;
        let here: BTreeSet<VolumeId> = node.store.volumes().map(|(volume, ..)| volume).collect();
        let volumes = spec.volumes.keys().copied().filter(|volume| here.contains(volume));
        // A later record finds it kept, or already written over.
        let just_fell_out = note.is_some_and(|note| !note.born && note.in_sync_at == Some(note.newest));
        let of: Vec<(VolumeId, VolumeId)> = if is_discarded {
            let first_free =
                |volume| (0..EVIDENCE_MAX).map(move |n| evidence(volume, n)).find(|kept| !here.contains(kept));
            volumes.filter_map(|volume| Some((volume, first_free(volume)?))).collect()
        } else if just_fell_out && node.store.free().0 > node.store.capacity().0 / FREE_PART_MIN {
            volumes.map(|volume| (volume, before_resync(volume))).collect()
        } else {
            Vec::new()
        };
        (!of.is_empty()).then_some(StoreOp::Snapshot { of })
    }

    /// What was kept before a resync is needed no more, or its space is needed more.
    pub(crate) fn drop_kept(&mut self, node: &mut Node) {
        let kept = node.store.volumes().filter(|(volume, group, _)| *group == self.id && is_before_resync(*volume));
        let kept: BTreeSet<VolumeId> = kept.map(|(volume, ..)| volume).collect();
        for volume in kept.difference(&self.dropping) {
            node.request(self.id, Purpose::Background, StoreOp::Delete { volume: *volume });
        }
        self.dropping = kept;
    }
}

/// Whether this keeps what may as well be lost.
pub(crate) fn is_optional(op: &StoreOp) -> bool {
    matches!(op, StoreOp::Snapshot { of } if of.iter().all(|(_, kept)| is_before_resync(*kept)))
}
