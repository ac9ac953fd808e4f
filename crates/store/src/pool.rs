//! An open pool: everything that is in memory of it, and where each event goes.
//!
//! The parts, each a file: `transfer` (reads, writes, zeroing), `cooling` (marks and leaves), `checkpoint` (keeping the
//! journal short), `control` (volumes and notes). What follows from an event is a `Then`, so that reading the three
//! enums below tells everything the pool ever waits for.

use crate::catalog::Catalog;
use crate::checkpoint::Checkpoint;
use crate::control::{CatalogCommit, CatalogQueue, Deletion};
use crate::hot::HotExtent;
use crate::journal::{Committed, Journal, Wrote};
use crate::lanes::{Key, Lanes, PartId};
use crate::layout::Geometry;
use crate::leaf::LeafCache;
use crate::record::Record;
use crate::recovery::Found;
use crate::slots::{Slot, SlotState, SlotTable};
use crate::superblock::{Anchor, Superblock};
use crate::transfer::{Load, Part, Request};
use crate::{HOT_EXTENTS_MAX, Output, StoreError, StoreOp, StoreReply, StoreRequestId};
use pollux_base::unit::BlockRange;
use pollux_base::{Data, DiskDone, DiskError, DiskOp, DiskOpId, DiskOpKind, ExtentIndex, Generation, PoolId, VolumeId};
use std::collections::{BTreeMap, VecDeque};

/// What a completed disk operation is for.
#[derive(Clone, Copy, Debug)]
pub enum DiskThen {
    Part(PartId),
    /// A leaf was read, for the checksums of this extent.
    Leaf(Key),
    /// One block of it.
    LeafBlock(Key, usize),
    /// Blocks of a recovered extent were read, from this one on.
    Rebuild(Key, u16, u16),
    LeafWritten(Key, u64),
    Journal,
    Flush,
    Table,
    Anchor,
    Catalog,
    /// Slots of a deleted volume were given back.
    Discard {
        volume: VolumeId,
        first: u32,
        count: u32,
    },
}

/// Who waits for a flush.
#[derive(Clone, Copy, Debug)]
pub enum FlushThen {
    Nothing,
    Request(StoreRequestId),
    Journal,
    Cooled(Key, u64),
    Checkpoint,
}

/// Who waits for a record of the journal.
#[derive(Clone, Copy, Debug)]
pub enum LogThen {
    Nothing,
    Part(PartId),
    Marked { key: Key, number: u64, generation: Generation, request: StoreRequestId },
    Cooled(Key, u64),
    Request(StoreRequestId),
    Deleted(VolumeId),
    Restated,
}

/// Disk operations under way.
pub struct Io {
    next: u64,
    then: BTreeMap<DiskOpId, DiskThen>,
    pub out: VecDeque<Output>,
}

impl Io {
    pub fn submit(&mut self, kind: DiskOpKind, then: DiskThen) {
        let id = DiskOpId(self.next);
        self.next += 1;
        self.then.insert(id, then);
        self.out.push_back(Output::Disk(DiskOp { id, kind }));
    }
}

/// One flush is under way at a time; whoever asks meanwhile shares the next one.
#[derive(Default)]
struct Flushes {
    /// The journal was written up to here when it began.
    under_way: Option<(u64, Vec<FlushThen>)>,
    next: Vec<FlushThen>,
}

/// A volume's extents that have a slot.
#[derive(Default)]
pub struct VolumeMap {
    pub extents: BTreeMap<ExtentIndex, u32>,
    /// Parts, loads and leaf writes under way.
    pub busy: u32,
    pub deleting: bool,
}

/// First writes that no flush covered: beyond this many blocks (64 MiB) the store flushes by itself, so that what an
/// opening after a power cut has to verify takes a fraction of a second.
const UNFLUSHED_BLOCKS_MAX: u64 = 16384;

pub struct Pool {
    pub superblock: Superblock,
    pub io: Io,
    /// Why no more changes are taken.
    pub failed: Option<String>,
    pub catalog: Catalog,
    pub catalog_sequence: u64,
    pub catalog_queue: CatalogQueue,
    pub catalog_commit: Option<CatalogCommit>,
    pub deletions: BTreeMap<VolumeId, Deletion>,
    pub volumes: BTreeMap<VolumeId, VolumeMap>,
    pub table: SlotTable,
    pub leaves: LeafCache,
    pub hot: BTreeMap<Key, HotExtent>,
    /// Extents that wait for room among the hot ones, first come first served.
    pub heat_waiting: VecDeque<(StoreRequestId, Key, Generation)>,
    pub lanes: Lanes,
    pub parts: BTreeMap<PartId, Part>,
    /// Parts that may go on.
    pub ready: VecDeque<PartId>,
    /// Writes that wait until the journal says durably that their blocks were flushed.
    pub settling: Vec<PartId>,
    settled: u64,
    pub loads: BTreeMap<Key, Load>,
    pub requests: BTreeMap<StoreRequestId, Request>,
    pub journal: Journal<LogThen>,
    flushes: Flushes,
    pub unflushed_blocks: u64,
    pub checkpoint: Option<Checkpoint>,
    pub anchor: Anchor,
    counter: u64,
}

impl Pool {
    pub fn new(
        superblock: Superblock,
        found: Found,
        table: SlotTable,
        anchor: Anchor,
        mut journal: Journal<LogThen>,
        next_op: u64,
    ) -> Pool {
        journal.on_anchor(anchor.tail, anchor.durable);
        let mut volumes: BTreeMap<VolumeId, VolumeMap> =
            found.catalog.volumes.keys().map(|volume| (*volume, VolumeMap::default())).collect();
        for (number, slot) in table.iter().filter(|(_, slot)| slot.state != SlotState::Free) {
            let (volume, extent) = slot.owner();
            volumes.entry(volume).or_default().extents.insert(extent, number);
        }
        let hot = found.hot.into_iter().map(|(key, found)| {
            let holds_data = found.slot.is_some_and(|slot| table.get(slot).state == SlotState::Data);
            let mut hot = HotExtent::new(found.generation, found.slot, holds_data);
            hot.marked = Some(found.generation);
            hot.recovered = holds_data.then(|| Box::new(found.recovered));
            // Whether it was changed under its mark nobody knows.
            hot.dirty = found.slot.is_some();
            (key, hot)
        });
        Pool {
            superblock,
            io: Io { next: next_op, then: BTreeMap::new(), out: VecDeque::new() },
            failed: None,
            catalog: found.catalog,
            catalog_sequence: found.catalog_sequence,
            catalog_queue: CatalogQueue::new(),
            catalog_commit: None,
            deletions: BTreeMap::new(),
            volumes,
            hot: hot.collect(),
            table,
            leaves: LeafCache::default(),
            heat_waiting: VecDeque::new(),
            lanes: Lanes::default(),
            parts: BTreeMap::new(),
            ready: VecDeque::new(),
            settling: Vec::new(),
            settled: 0,
            loads: BTreeMap::new(),
            requests: BTreeMap::new(),
            journal,
            flushes: Flushes::default(),
            unflushed_blocks: 0,
            checkpoint: None,
            anchor,
            counter: 0,
        }
    }

    pub fn geometry(&self) -> &Geometry {
        &self.superblock.geometry
    }

    pub fn pool_id(&self) -> PoolId {
        self.superblock.identity.pool
    }

    /// A number never given before.
    pub fn count(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    pub fn on_request(&mut self, id: StoreRequestId, op: StoreOp) {
        assert!(!self.requests.contains_key(&id), "{id:?} is already under way");
        let reads = matches!(op, StoreOp::Read { .. } | StoreOp::Checksums { .. });
        if let Some(reason) = self.failed.clone().filter(|_| !reads) {
            return self.end(id, Err(StoreError::Disk(reason)));
        }
        let begun = match op {
            StoreOp::Create { volume, group, size } => self.begin_create(id, volume, group, size),
            StoreOp::Snapshot { .. } => Err(StoreError::Full),
            StoreOp::Delete { volume } => self.begin_delete(id, volume),
            StoreOp::PutNote { group, note } => self.begin_note(id, group, note),
            StoreOp::Heat { volume, extents, generation } => self.begin_heat(id, volume, &extents, generation),
            StoreOp::Cool { volume, extents } => self.begin_cool(id, volume, &extents),
            StoreOp::Remark { group, generation } => self.begin_remark(id, group, generation),
            StoreOp::Reap { group } => self.begin_reap(id, group),
            StoreOp::Read { volume, range } => self.begin_read(id, volume, range),
            StoreOp::Write { volume, range, data, checksums } => self.begin_write(id, volume, range, data, checksums),
            StoreOp::Zero { volume, range } => self.begin_zero(id, volume, range),
            StoreOp::Flush => {
                self.requests.insert(id, Request::change(1));
                self.flush(FlushThen::Request(id));
                Ok(())
            }
            StoreOp::Checksums { volume, extent } => self.begin_checksums(id, volume, extent),
        };
        if let Err(error) = begun {
            self.end(id, Err(error));
        }
    }

    pub fn on_disk(&mut self, done: DiskDone) {
        let Some(then) = self.io.then.remove(&done.id) else { return };
        match then {
            DiskThen::Part(part) => self.on_part_done(part, done.result),
            DiskThen::Leaf(key) => self.on_leaf_read(key, done.result.ok().flatten()),
            DiskThen::LeafBlock(key, part) => self.on_leaf_block(key, part, done.result.ok().flatten()),
            DiskThen::Rebuild(key, first, count) => self.on_rebuilt(key, first, count, done.result.ok().flatten()),
            DiskThen::Discard { volume, first, count } => self.on_slots_discarded(volume, first..first + count),
            DiskThen::LeafWritten(..)
            | DiskThen::Journal
            | DiskThen::Flush
            | DiskThen::Table
            | DiskThen::Anchor
            | DiskThen::Catalog => match done.result {
                Err(error) => self.fail(&error),
                Ok(_) if self.failed.is_some() => {}
                Ok(_) => self.on_written(then),
            },
        }
    }

    fn on_written(&mut self, then: DiskThen) {
        match then {
            DiskThen::LeafWritten(key, number) => self.on_leaf_written(key, number),
            DiskThen::Journal => match self.journal.on_wrote() {
                Wrote::More => {}
                Wrote::Flush => self.flush(FlushThen::Journal),
                Wrote::Committed(committed) => self.on_committed(committed),
            },
            DiskThen::Flush => self.on_flushed(),
            DiskThen::Table => self.on_table_written(),
            DiskThen::Anchor => self.on_anchor_written(),
            DiskThen::Catalog => self.on_catalog_written(),
            DiskThen::Part(_)
            | DiskThen::Leaf(_)
            | DiskThen::LeafBlock(..)
            | DiskThen::Rebuild(..)
            | DiskThen::Discard { .. } => unreachable!("told apart by the caller"),
        }
    }

    /// Takes part in the next flush.
    pub fn flush(&mut self, then: FlushThen) {
        self.flushes.next.push(then);
        self.start_flush();
    }

    fn start_flush(&mut self) {
        if self.flushes.under_way.is_none() && !self.flushes.next.is_empty() {
            self.flushes.under_way = Some((self.journal.written(), std::mem::take(&mut self.flushes.next)));
            self.unflushed_blocks = 0;
            self.io.submit(DiskOpKind::Flush, DiskThen::Flush);
        }
    }

    fn on_flushed(&mut self) {
        let (covered, waiting) = self.flushes.under_way.take().expect("a flush was under way");
        self.journal.on_durable(covered);
        self.start_flush();
        for then in waiting {
            match then {
                FlushThen::Nothing => {}
                FlushThen::Request(id) => self.finish_one(id),
                FlushThen::Journal => {
                    let committed = self.journal.on_batch_flushed();
                    self.on_committed(committed);
                }
                FlushThen::Cooled(key, number) => self.on_leaf_flushed(key, number),
                FlushThen::Checkpoint => self.on_checkpoint_flushed(),
            }
        }
    }

    fn on_committed(&mut self, committed: Committed<LogThen>) {
        for record in committed.records {
            match record {
                Record::Slot { slot, descriptor } => self.table.committed(slot, descriptor),
                Record::Valid { checksums, .. } => self.unflushed_blocks += checksums.len() as u64,
                Record::Hot { .. } | Record::Cold { .. } | Record::Zero { .. } | Record::Mask(_) => {}
            }
        }
        for then in committed.then {
            match then {
                LogThen::Nothing => {}
                LogThen::Part(part) => self.on_part_logged(part, committed.last),
                LogThen::Marked { key, number, generation, request } => {
                    self.on_marked(key, number, generation);
                    self.finish_one(request);
                }
                LogThen::Cooled(key, number) => self.on_cold(key, number),
                LogThen::Request(id) => self.finish_one(id),
                LogThen::Deleted(volume) => self.on_slots_freed(volume),
                LogThen::Restated => self.on_restated(),
            }
        }
    }

    /// Changes a slot's descriptor, through the journal.
    pub fn log_slot(&mut self, slot: u32, descriptor: Slot) {
        self.table.queued(slot, descriptor);
        self.journal.queue(Record::Slot { slot, descriptor });
    }

    /// Does whatever has become possible. Called after every event.
    pub fn pump(&mut self) {
        loop {
            while let Some(part) = self.ready.pop_front() {
                self.advance(part);
            }
            if self.settled == self.journal.recorded() {
                break;
            }
            self.settled = self.journal.recorded();
            self.ready.extend(std::mem::take(&mut self.settling));
        }
        if self.failed.is_some() {
            return;
        }
        self.heat_waiting_extents();
        self.start_catalog_commit();
        if self.checkpoint.is_none() && self.journal.checkpoint_due() {
            self.begin_checkpoint();
        }
        for write in self.journal.start().into_iter().flatten() {
            self.io.submit(write, DiskThen::Journal);
        }
        let wants_flush = self.journal.wants_flush() || self.unflushed_blocks > UNFLUSHED_BLOCKS_MAX;
        if wants_flush && self.flushes.under_way.is_none() {
            self.flush(FlushThen::Nothing);
        }
    }

    pub fn end(&mut self, id: StoreRequestId, result: Result<StoreReply, StoreError>) {
        self.io.out.push_back(Output::Ended(id, result));
    }

    /// One thing that the request waited for is done.
    pub fn finish_one(&mut self, id: StoreRequestId) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        request.left -= 1;
        if request.left == 0
            && let Some(request) = self.requests.remove(&id)
        {
            self.end(id, request.result());
        }
    }

    /// A write or flush failed: nothing is retried, no change is taken any more. What was acknowledged is on the disk or
    /// was lost by the disk; reads go on.
    pub fn fail(&mut self, error: &DiskError) {
        if self.failed.is_some() {
            return;
        }
        let reason = error.to_string();
        self.failed = Some(reason.clone());
        self.heat_waiting.clear();
        self.catalog_queue.clear();
        let ended: Vec<StoreRequestId> =
            self.requests.iter().filter(|(_, request)| request.changes).map(|(id, _)| *id).collect();
        for id in ended {
            self.requests.remove(&id);
            self.end(id, Err(StoreError::Disk(reason.clone())));
        }
        let dropped: Vec<(PartId, Key)> =
            self.parts.iter().filter(|(_, part)| part.work.changes()).map(|(id, part)| (*id, part.key)).collect();
        for (id, key) in dropped {
            self.parts.remove(&id);
            self.ready.extend(self.lanes.leave(key, id));
        }
    }

    pub fn known_volume(&self, volume: VolumeId) -> Result<crate::catalog::Volume, StoreError> {
        let live = self.volumes.get(&volume).is_some_and(|map| !map.deleting);
        self.catalog.volumes.get(&volume).copied().filter(|_| live).ok_or(StoreError::NoVolume)
    }

    pub fn checked_range(&self, volume: VolumeId, range: BlockRange) -> Result<(), StoreError> {
        let blocks = self.known_volume(volume)?.size.0 / pollux_base::unit::BLOCK_BYTES;
        let end = range.start.0.checked_add(range.count.0).ok_or(StoreError::OutOfRange)?;
        if end > blocks { Err(StoreError::OutOfRange) } else { Ok(()) }
    }

    /// The invariants that cost next to nothing to check.
    pub fn check_step(&self) {
        self.journal.check();
        assert!(self.hot.len() <= HOT_EXTENTS_MAX, "the hot set is bounded");
    }

    /// Asserts what must always hold; see the heads of the files.
    pub fn check(&self) {
        self.journal.check();
        self.table.check();
        self.leaves.check();
        assert!(self.hot.len() <= HOT_EXTENTS_MAX, "the hot set is bounded");
        assert_eq!(self.parts.is_empty(), self.lanes.is_empty(), "who holds blocks is under way");
        let mut owned = BTreeMap::new();
        for (volume, map) in &self.volumes {
            for (extent, slot) in &map.extents {
                let key = (*volume, *extent);
                assert_eq!(owned.insert(*slot, key), None, "slot {slot} belongs to one extent");
                let descriptor = self.table.get(*slot);
                let untold =
                    descriptor.state == SlotState::Free && self.hot.get(&key).is_some_and(|hot| !hot.slot_told);
                assert!(untold || descriptor.owner() == key, "slot {slot} knows its owner");
            }
        }
        let taken = self.table.iter().filter(|(number, slot)| {
            slot.state != SlotState::Free || owned.contains_key(number) || self.table.is_discarding(*number)
        });
        assert_eq!(taken.count() + self.table.vacant(), self.geometry().slots as usize, "every slot is accounted for");
        for (key, hot) in &self.hot {
            let mapped = self.volumes.get(&key.0).and_then(|map| map.extents.get(&key.1)).copied();
            assert_eq!(hot.slot, mapped, "the hot set and the map agree on {key:?}");
            assert!(hot.cooling.is_none() || hot.writers == 0, "what is written to is not cooled");
            assert!(hot.recovered.is_none() || hot.loaded().is_none(), "a recovered extent is rebuilt before use");
            if let Some(sums) = hot.loaded() {
                let fresh = hot.fresh.keys().all(|block| !sums[usize::from(*block)].is_zero());
                assert!(fresh, "a fresh block holds data");
            }
        }
    }
}

/// Bytes of `data` for block `at` of it.
pub fn block_of(data: &Data, at: usize) -> &[u8] {
    &data.as_slice()[at * crate::layout::BLOCK..][..crate::layout::BLOCK]
}
