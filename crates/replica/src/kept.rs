//! States of a replica that are kept before it is overwritten, as snapshots of this node's store alone.
//!
//! * W9: the last state that a replica held before it fell out is kept while it is brought up to date, because a replica in the
//!   middle of that is of no use if the others die. It goes when the replica is in sync again, or first of all when anybody
//!   waits for space.
//! * W10: what a diverged replica holds is kept as evidence when a human gives it up. It stays as long as the replica.
//!
//! It can be read here, and deleted, by order.

use crate::Output;
use crate::data_plane::DataPlane;
use crate::group::Group;
use crate::node::{Node, Purpose};
use crate::note::Note;
use pollux_base::kept::EVIDENCE_MAX;
use pollux_base::pool::KeptReport;
use pollux_base::unit::{BLOCK_BYTES, BlockRange};
use pollux_base::{
    BlockError, BlockIndex, ByteCount, Data, GroupId, Kept, KeyId, Op, Reply, Report, Request, RequestId, VolumeId,
};
use pollux_store::{StoreError, StoreOp, StoreReply};
use std::collections::{BTreeMap, BTreeSet};

/// A resync may take as much space anew as the replica has: with less free than this part of the pool nothing is kept.
const FREE_PART_MIN: u64 = 10;
/// What is told of; more is kept all the same, and told of when there is less.
const KEPT_TOLD_MAX: usize = 256;

fn is_before_resync(volume: VolumeId) -> bool {
    matches!(Kept::in_volume(volume), Some(Kept::BeforeResync { .. }))
}

impl Group {
    /// What keeps the state here before it is overwritten under the record that is being adopted, if it is to be kept.
    pub(crate) fn keep_op(&mut self, node: &Node, note: Option<&Note>, is_discarded: bool) -> Option<StoreOp> {
        // Adopting may begin anew before its note is durable: then what was to be kept is kept already, or still to be.
        if let Some((_, of)) = self.keeping.as_ref().filter(|(loser, _)| is_discarded && self.discard == Some(*loser)) {
            return Some(StoreOp::Snapshot { of: of.clone() });
        }
        let spec = self.spec.as_ref()?;
        let here: BTreeSet<VolumeId> = node.store.volumes().map(|(volume, ..)| volume).collect();
        let volumes = spec.volumes.keys().copied().filter(|volume| here.contains(volume));
        // A later record finds it kept, or already written over.
        let just_fell_out = note.is_some_and(|note| !note.born && note.in_sync_at == Some(note.newest));
        let of: Vec<(VolumeId, VolumeId)> = if is_discarded {
            let first_free = |volume| {
                (0..EVIDENCE_MAX)
                    .map(move |number| Kept::Evidence { of: volume, number }.volume())
                    .find(|kept| !here.contains(kept))
            };
            volumes.filter_map(|volume| Some((volume, first_free(volume)?))).collect()
        } else if just_fell_out && node.store.free().0 > node.store.capacity().0 / FREE_PART_MIN {
            volumes.map(|of| (of, Kept::BeforeResync { of }.volume())).collect()
        } else {
            Vec::new()
        };
        if is_discarded {
            self.keeping = self.discard.map(|loser| (loser, of.clone()));
        }
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

/// What is kept here, as it was last told of.
#[derive(Debug, Default)]
pub(crate) struct Shelf {
    /// Changes of the catalog when it was looked through.
    changes: Option<u64>,
    kept: BTreeMap<VolumeId, (GroupId, ByteCount)>,
    /// Grows with every change of what is kept.
    pub revision: u64,
}

impl Shelf {
    pub(crate) fn reports(&self) -> Vec<KeptReport> {
        let report = |(volume, (group, size)): (&VolumeId, &(GroupId, ByteCount))| KeptReport {
            volume: *volume,
            group: *group,
            size_bytes: size.0,
        };
        self.kept.iter().take(KEPT_TOLD_MAX).map(report).collect()
    }
}

impl DataPlane {
    /// What is kept is served to whoever is let in, whoever is primary: it never changes, and no other node has it.
    pub(crate) fn refresh_kept(&mut self) {
        let changes = self.node.store.catalog_changes();
        if self.shelf.changes == changes {
            return;
        }
        self.shelf.changes = changes;
        let volumes = self.node.store.volumes().filter(|(volume, ..)| Kept::in_volume(*volume).is_some());
        let kept: BTreeMap<VolumeId, (GroupId, ByteCount)> =
            volumes.map(|(volume, group, size)| (volume, (group, size))).collect();
        if kept == self.shelf.kept {
            return;
        }
        for volume in kept.keys().filter(|volume| !self.shelf.kept.contains_key(volume)) {
            self.node.out.push_back(Output::Served { volume: *volume, served: true });
        }
        for volume in self.shelf.kept.keys().filter(|volume| !kept.contains_key(volume)) {
            self.node.out.push_back(Output::Served { volume: *volume, served: false });
        }
        self.shelf.kept = kept;
        self.shelf.revision += 1;
    }

    /// A request for something that is kept: it can be read.
    pub(crate) fn on_kept_request(&mut self, request: Request) {
        let Request { id, volume, op } = request;
        let mut reply = |reply| self.node.out.push_back(Output::Reply(id, reply));
        let Some((group, size)) = self.shelf.kept.get(&volume).copied() else {
            return reply(Reply::Failed(BlockError::NoVolume));
        };
        let is_inside =
            |range: BlockRange| range.start.0.checked_add(range.count.0).is_some_and(|end| end <= size.0 / BLOCK_BYTES);
        match op {
            Op::Write { .. } | Op::Patch { .. } | Op::Zero { .. } => reply(Reply::Failed(BlockError::ReadOnly)),
            Op::Flush => reply(Reply::Done),
            Op::Read { range } | Op::Status { range } if !is_inside(range) => {
                reply(Reply::Failed(BlockError::OutOfRange));
            }
            Op::Read { range } if range.count.0 == 0 => reply(Reply::Data(Data::zeroed(0))),
            Op::Status { range } => reply(Reply::Status(vec![(range, true)])),
            Op::Read { range } => {
                let spec = self.groups.get(&group).and_then(|group| group.spec.as_ref());
                let key = Kept::in_volume(volume).and_then(|kept| spec?.key(kept.of()));
                let purpose = Purpose::ReadKept { id, start: range.start, key };
                self.node.request(group, purpose, StoreOp::Read { volume, range });
            }
        }
    }

    /// `key`: of a volume that is encrypted. Without it what is there cannot be read.
    pub(crate) fn on_kept_read(
        &mut self,
        id: RequestId,
        start: BlockIndex,
        key: Option<KeyId>,
        result: Result<StoreReply, StoreError>,
    ) {
        let reply = match result {
            Ok(StoreReply::Read { data, .. }) => match key.map(|key| self.node.keys.get(key)) {
                None => Reply::Data(data),
                Some(Some(cipher)) => Reply::Data(cipher.decrypt(start, &data)),
                Some(None) => Reply::Failed(BlockError::Unreadable),
            },
            Err(StoreError::NoVolume) => Reply::Failed(BlockError::NoVolume),
            // There is no other copy of it anywhere.
            Ok(_) | Err(_) => Reply::Failed(BlockError::Unreadable),
        };
        self.node.out.push_back(Output::Reply(id, reply));
    }

    /// A human needs it no more.
    pub(crate) fn on_drop_kept(&mut self, id: u64, volume: VolumeId) {
        let refusal = match (&self.node.pool_failed, self.shelf.kept.get(&volume)) {
            (Some(reason), _) => Err(format!("the pool is out of use: {reason}")),
            (None, None) => Err("it is not kept here any more".to_string()),
            (None, Some((group, _))) => Ok(*group),
        };
        match refusal {
            Ok(group) => self.node.request(group, Purpose::DropKept(id), StoreOp::Delete { volume }),
            Err(reason) => self.node.report(Report::DiskChanged { id, result: Err(reason) }),
        }
    }

    pub(crate) fn on_kept_dropped(&mut self, id: u64, result: Result<StoreReply, StoreError>) {
        // It is told of behind the pool as it is now.
        self.changes.end(id, result.map(drop).map_err(|error| error.to_string()));
    }
}
