//! Taking a snapshot of the group: all volumes at one point of the write stream, the same on every replica
//! (`docs/design/0007-snapshots.md`).
//!
//! The record carries the snapshot before it is taken, and its primary does not serve before that is so: from when nothing
//! is under way until every required replica and this node's own have it, nothing is acknowledged. So whoever takes it
//! later, or answers that it has it already, has it at the same point, also under another primary.

use crate::group::Group;
use crate::node::{Node, Purpose};
use crate::primary::{Primary, What};
use crate::secondary::Asker;
use crate::verdict::Verdict;
use crate::wire::{Message, Refusal};
use pollux_base::order::FreezeReason;
use pollux_base::record::Snapshot;
use pollux_base::{Instant, NodeId, Report, Session, SnapshotId, VolumeId};
use pollux_store::{StoreError, StoreOp};
use std::collections::BTreeSet;
use std::time::Duration;

/// How often the end of a snapshot is reported until the log knows.
const REPORT_REPEAT: Duration = Duration::from_millis(500);

/// The life of a snapshot at the primary reads downwards; under a newer record it begins anew. First all make durable what
/// they hold, and only then anybody takes it: else a loss of power could take from one replica's snapshot what another's has.
#[derive(Debug, Default)]
pub(crate) struct Taking {
    id: SnapshotId,
    flush_asked: BTreeSet<NodeId>,
    flushed: BTreeSet<NodeId>,
    asked: BTreeSet<NodeId>,
    done: BTreeSet<NodeId>,
}

/// How it ended, told until the record says so.
#[derive(Debug)]
pub(crate) struct Ended {
    id: SnapshotId,
    result: Result<(), String>,
    reported: Instant,
}

impl Group {
    /// Whether a snapshot is still to be taken before this primary serves.
    pub(crate) fn awaits_snapshot(&self) -> bool {
        let Some((id, _)) = self.spec.as_ref().and_then(|spec| spec.snapshots.untaken()) else { return false };
        let ended = self.primary.as_ref().and_then(|primary| primary.ended.as_ref());
        !ended.is_some_and(|ended| ended.id == id && ended.result.is_ok())
    }

    /// Goes on with the snapshot that the record wants; called whenever something may have made that possible.
    pub(crate) fn step_snapshot(&mut self, node: &mut Node) {
        let untaken =
            self.acting().and_then(|spec| spec.snapshots.untaken()).map(|(id, snapshot)| (id, snapshot.clone()));
        let Some(primary) = &mut self.primary else { return };
        let Some((id, snapshot)) = untaken else {
            primary.taking = None;
            primary.ended = None;
            return;
        };
        if primary.ended.as_ref().is_some_and(|ended| ended.id == id) {
            return self.report_snapshot(node);
        }
        if !primary.is_still() || self.freeze(node) != Some(FreezeReason::Snapshot) {
            return;
        }
        let mut needed = self.required(node.me);
        if self.is_member(node) {
            needed.insert(node.me);
        }
        let is_here = |volume: &VolumeId| node.store.volumes().any(|(here, ..)| here == *volume);
        let Some(primary) = &mut self.primary else { return };
        if primary.taking.is_none() && snapshot.volumes.keys().all(is_here) {
            primary.compares_anew = true; // taken here in an earlier run, and written over since, maybe
        }
        let taking = primary.taking.get_or_insert_with(|| Taking { id, ..Taking::default() });
        if needed.is_subset(&taking.done) {
            primary.taking = None;
            return self.end_snapshot(node, id, Ok(()));
        }
        if !needed.is_subset(&taking.flushed) {
            let next: Vec<NodeId> = needed.into_iter().filter(|replica| taking.flush_asked.insert(*replica)).collect();
            for replica in next {
                if replica == node.me {
                    node.request(self.id, Purpose::SnapshotFlush(id), StoreOp::Flush);
                } else {
                    let Some((sequence, stamp)) = self.ask(node, replica, What::SnapshotFlush(id)) else { return };
                    node.send_bare(replica, Message::Flush { group: self.id, stamp, sequence });
                }
            }
            return;
        }
        let of: Vec<(VolumeId, VolumeId)> =
            snapshot.volumes.iter().map(|(volume, frozen)| (frozen.of, *volume)).collect();
        let next: Vec<NodeId> = needed.into_iter().filter(|replica| taking.asked.insert(*replica)).collect();
        for replica in next {
            if replica == node.me {
                node.request(self.id, Purpose::Snapshot(id), StoreOp::Snapshot { of: of.clone() });
            } else {
                let Some((sequence, stamp)) = self.ask(node, replica, What::Snapshot(id)) else { return };
                node.send_bare(replica, Message::Snapshot { group: self.id, stamp, sequence, of: of.clone() });
            }
        }
    }

    /// What a replica holds is durable.
    pub(crate) fn on_snapshot_flushed(&mut self, node: &mut Node, id: SnapshotId, replica: NodeId) {
        let taking = self.primary.as_mut().and_then(|primary| primary.taking.as_mut());
        if let Some(taking) = taking.filter(|taking| taking.id == id && taking.flush_asked.contains(&replica)) {
            taking.flushed.insert(replica);
            self.step_snapshot(node);
        }
    }

    /// The same of this node's own.
    pub(crate) fn on_own_flush(&mut self, node: &mut Node, id: SnapshotId, result: Result<(), StoreError>) {
        match result {
            Ok(()) => self.on_snapshot_flushed(node, id, node.me),
            Err(error) => self.on_store_error(node, &error),
        }
    }

    /// A replica has it, durably.
    pub(crate) fn on_snapshot_done(&mut self, node: &mut Node, id: SnapshotId, replica: NodeId) {
        let taking = self.primary.as_mut().and_then(|primary| primary.taking.as_mut());
        if let Some(taking) = taking.filter(|taking| taking.id == id && taking.asked.contains(&replica)) {
            taking.done.insert(replica);
            self.step_snapshot(node);
        }
    }

    /// This node's own store has taken it, or can not.
    pub(crate) fn on_own_snapshot(&mut self, node: &mut Node, id: SnapshotId, result: Result<(), StoreError>) {
        match result {
            Ok(()) => self.on_snapshot_done(node, id, node.me),
            Err(StoreError::Full) => {
                self.on_snapshot_refused(node, id, node.me, "its pool has no room for more snapshots");
            }
            Err(error) => self.on_store_error(node, &error),
        }
    }

    /// A replica can not have it. It is given up by the log, and until then nothing is written: those that have it must
    /// hear that it does not count.
    pub(crate) fn on_snapshot_refused(&mut self, node: &mut Node, id: SnapshotId, replica: NodeId, reason: &str) {
        let taking = self.primary.as_ref().and_then(|primary| primary.taking.as_ref());
        if taking.is_some_and(|taking| taking.id == id) {
            self.end_snapshot(node, id, Err(format!("on {replica}: {reason}")));
        }
    }

    /// The session with a replica is over: it is asked again in the next one.
    pub(crate) fn snapshot_without(&mut self, peer: NodeId) {
        if let Some(taking) = self.primary.as_mut().and_then(|primary| primary.taking.as_mut()) {
            for set in [&mut taking.flush_asked, &mut taking.flushed, &mut taking.asked, &mut taking.done] {
                set.remove(&peer);
            }
        }
    }

    fn end_snapshot(&mut self, node: &mut Node, id: SnapshotId, result: Result<(), String>) {
        let Some(primary) = &mut self.primary else { return };
        primary.taking = None;
        primary.ended = Some(Ended { id, result, reported: Instant(0) });
        self.report_snapshot(node);
        self.begin_joined(node);
    }

    fn report_snapshot(&mut self, node: &mut Node) {
        let (group, generation) = (self.id, self.generation());
        let Some(ended) = self.primary.as_mut().and_then(|primary| primary.ended.as_mut()) else { return };
        if ended.reported == Instant(0) || node.now >= ended.reported + REPORT_REPEAT {
            ended.reported = node.now;
            let (snapshot, result) = (ended.id, ended.result.clone());
            node.report(Report::Snapshot { group, generation, snapshot, result });
        }
    }

    /// When the end of a snapshot is to be reported again.
    pub(crate) fn snapshot_wake(&self) -> Option<Instant> {
        let ended = self.primary.as_ref()?.ended.as_ref()?;
        Some(ended.reported + REPORT_REPEAT)
    }

    /// Volumes of the group that are kept alike, in the order in which they must be compared: those of snapshots from the
    /// oldest on, because newer layers let older ones be seen through, then those that are written. `false`: frozen.
    pub(crate) fn ordered_volumes(&self) -> Vec<(VolumeId, bool)> {
        let Some(spec) = &self.spec else { return Vec::new() };
        let frozen =
            spec.snapshots.taken().flat_map(|(_, snapshot)| snapshot.volumes.keys()).map(|volume| (*volume, false));
        frozen.chain(spec.volumes.keys().map(|volume| (*volume, true))).collect()
    }

    /// Whether the volume is one of a snapshot, and is not written to.
    pub(crate) fn is_snapshot(&self, volume: VolumeId) -> bool {
        self.spec.as_ref().is_some_and(|spec| !spec.volumes.contains_key(&volume))
    }

    /// The volume that this is, or is a snapshot of.
    pub(crate) fn origin_of(&self, volume: VolumeId) -> VolumeId {
        let mut frozen = self.spec.iter().flat_map(|spec| spec.snapshots.volumes());
        frozen.find(|(snapshot, _)| *snapshot == volume).map_or(volume, |(_, frozen)| frozen.of)
    }

    /// Whether the record names this as a snapshot of that volume.
    pub(crate) fn is_snapshot_of(&self, volume: VolumeId, snapshot: VolumeId) -> bool {
        let mut frozen = self.spec.iter().flat_map(|spec| spec.snapshots.volumes());
        frozen.any(|(other, frozen)| other == snapshot && frozen.of == volume)
    }

    /// What makes the store's volumes those of the record. A replica that is not in sync makes the snapshots that it lacks over
    /// what it holds: wrong content, which is compared later, in the right shape. Only those that were taken: of any other
    /// it is asked by its primary at the right moment if it counts by then, and would answer that it has it already.
    pub(crate) fn shape_ops(&self, node: &Node, is_in_sync: bool) -> Vec<StoreOp> {
        let Some(spec) = &self.spec else { return Vec::new() };
        let here: BTreeSet<VolumeId> = node.store.volumes().map(|(volume, ..)| volume).collect();
        let mut ops = Vec::new();
        for (volume, size) in &spec.volumes {
            if let Some(of) = spec.snapshots.origins.get(volume).filter(|_| self.verdict == Verdict::Born) {
                let generation = spec.record.stamp.generation;
                ops.push(StoreOp::Clone { of: *of, volume: *volume, group: self.id, generation });
            }
            ops.push(StoreOp::Create { volume: *volume, group: self.id, size: *size });
        }
        let lacks = |snapshot: &Snapshot| snapshot.volumes.keys().any(|volume| !here.contains(volume));
        for (_, snapshot) in spec.snapshots.taken().filter(|(_, snapshot)| !is_in_sync && lacks(snapshot)) {
            let of = snapshot.volumes.iter().map(|(volume, frozen)| (frozen.of, *volume)).collect();
            ops.push(StoreOp::Snapshot { of });
        }
        if let Some(rollback) = spec.snapshots.rollback.as_ref().filter(|_| is_in_sync && self.is_to_roll_back()) {
            for (volume, snapshot) in &rollback.to {
                let generation = rollback.at.generation;
                ops.push(StoreOp::Rollback { volume: *volume, snapshot: *snapshot, generation, also: Vec::new() });
            }
        }
        ops
    }

    /// Whether the record's rollback is newer than what was adopted here. A replica in sync makes it before it notes the record,
    /// so noted is made; any other gets it as it gets everything that was written.
    pub(crate) fn is_to_roll_back(&self) -> bool {
        let rollback = self.spec.as_ref().and_then(|spec| spec.snapshots.rollback.as_ref());
        rollback.is_some_and(|rollback| self.note.as_ref().is_some_and(|note| note.newest < rollback.at))
    }

    /// Born as a copy, but what it is to be a copy of is not here: its disk was replaced since.
    pub(crate) fn lacks_origin(&self, node: &Node) -> bool {
        let here: BTreeSet<VolumeId> = node.store.volumes().map(|(volume, ..)| volume).collect();
        let origins = self.spec.iter().flat_map(|spec| &spec.snapshots.origins);
        origins.into_iter().any(|(volume, of)| !here.contains(volume) && !here.contains(of))
    }

    /// A replica in sync has every snapshot that was taken. If it lacks one, this record's text is from before its deletion (a
    /// control plane that has just started and not read all of its log): the one that says so comes.
    pub(crate) fn forget_lacking_snapshots(&mut self, node: &Node) {
        if !self.is_member(node) {
            return;
        }
        let here: BTreeSet<VolumeId> = node.store.volumes().map(|(volume, ..)| volume).collect();
        let is_here = |snapshot: &Snapshot| snapshot.volumes.keys().all(|volume| here.contains(volume));
        if let Some(spec) = &mut self.spec {
            spec.snapshots.each.retain(|_, snapshot| snapshot.taken.is_none() || is_here(snapshot));
        }
    }

    /// What is answered to a primary that has not heard yet that a snapshot was deleted or given up: nothing of it matters.
    pub(crate) fn answer_of_deleted(
        &self,
        peer: NodeId,
        session: Session,
        message: &Message,
    ) -> Option<(Asker, Message)> {
        let spec = self.spec.as_ref()?;
        let is_deleted = |volume: VolumeId| volume.0 <= spec.snapshots.minted && spec.size(volume).is_none();
        let group = self.id;
        let (volume, stamp, sequence) = match message {
            Message::Write { volume, stamp, sequence, .. }
            | Message::Zero { volume, stamp, sequence, .. }
            | Message::Compare { volume, stamp, sequence, .. }
            | Message::Verify { volume, stamp, sequence, .. }
            | Message::ReadAsk { volume, stamp, sequence, .. } => (*volume, *stamp, *sequence),
            Message::Snapshot { of, stamp, sequence, .. } => (of.first()?.1, *stamp, *sequence),
            _ => return None,
        };
        if !is_deleted(volume) {
            return None;
        }
        let answer = match message {
            Message::Compare { .. } => Message::Differs { group, stamp, sequence, runs: Vec::new() },
            Message::Verify { .. } => Message::Verified { group, stamp, sequence, bad: Vec::new() },
            Message::ReadAsk { .. } => Message::Refused { group, stamp, sequence, why: Refusal::Corrupt },
            _ => Message::Done { group, stamp, sequence },
        };
        Some((Asker { peer, session, sequence, stamp }, answer))
    }

    /// Volumes of snapshots that were deleted. What the record's writer did not know yet stays.
    pub(crate) fn deleted_snapshots(&self, node: &Node) -> Vec<VolumeId> {
        let Some(spec) = &self.spec else { return Vec::new() };
        let known: BTreeSet<VolumeId> =
            spec.volumes.keys().copied().chain(spec.snapshots.volumes().map(|(volume, _)| volume)).collect();
        let of_group = node.store.volumes().filter(|(_, group, _)| *group == self.id).map(|(volume, ..)| volume);
        of_group.filter(|volume| !known.contains(volume) && volume.0 <= spec.snapshots.minted).collect()
    }
}

impl Primary {
    /// Nothing is under way that a snapshot could cut in two.
    fn is_still(&self) -> bool {
        self.requests.is_empty() && self.unwritten.is_empty() && self.repairs.is_empty() && self.noting.is_none()
    }
}
