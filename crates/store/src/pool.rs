//! An open pool: everything that is in memory of it, and where each event goes.
//!
//! The parts, each a file: `transfer` (writes, zeroing), `reading`, `loading` (checksums into memory), `cooling` (marks and
//! leaves), `checkpoint` (keeping the journal short), `control` (volumes and notes), `space` (units). What follows from an event is a `Then`, so that reading the three
//! enums below tells everything the pool ever waits for.

use crate::catalog::{Catalog, CatalogCopy};
use crate::checkpoint::Checkpoint;
use crate::control::{CatalogCommit, CatalogQueue, Change, Leaving};
use crate::hot::HotExtent;
use crate::journal::{Committed, Journal, Wrote};
use crate::lanes::{Key, LaneKey, Lanes};
use crate::layer_map::LayerMap;
use crate::layers::{Held, Turn, Turning};
use crate::layout::{Geometry, LeafPlace, UNIT_BLOCKS};
use crate::leaf::{LeafCache, SUMS, UNREAD_CHECKSUM};
use crate::loading::Load;
use crate::merging::Merging;
use crate::reading::is_bad_spot;
use crate::record::Record;
use crate::recovery::Found;
use crate::slab::{Slab, SlabId};
use crate::slots::{LayerId, Slot, SlotState, SlotTable};
use crate::space::{Space, Ticket};
use crate::superblock::{Anchor, Superblock};
use crate::transfer::{Part, PartId, Request, RequestId, Work};
use crate::units::{NO_UNIT, Units};
use crate::verify::Looking;
use crate::{Output, Position, StoreError, StoreOp, StoreReply, StoreRequestId};
use pollux_base::unit::BlockRange;
use pollux_base::{Data, DiskDone, DiskError, DiskOp, DiskOpId, DiskOpKind, Generation, PoolId, VolumeId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// What a completed disk operation is for.
#[derive(Clone, Copy, Debug)]
pub enum DiskThen {
    /// A piece of a write part.
    Written(PartId),
    /// Blocks of a read part, from this one of the extent on.
    Read(PartId, u16, u16),
    /// A leaf was read, for the checksums of this extent.
    Leaf(Key),
    /// One block of it.
    LeafBlock(Key, usize),
    /// Blocks of an extent were read, from this one on, because some are unread.
    Reread(Key, u16, u16),
    LeafWritten(Key, u64),
    /// Blocks of a layer that is given up were read, from this one of the extent on.
    MergeRead(PartId, u16, u16),
    MergeCopied(PartId),
    MergeLeaf(PartId),
    Journal,
    Flush,
    Table,
    Anchor,
    Catalog,
    /// Blocks from this place on were read, so many bytes, because somebody looks at the metadata.
    Look(u64, usize),
    /// The space of units was given back.
    Discard(u32, u32, Ticket),
}

/// Who waits for a flush.
#[derive(Clone, Copy, Debug)]
pub enum FlushThen {
    Nothing,
    Request(RequestId),
    Journal,
    Cooled(Key, u64),
    MergeLeaf(PartId),
    Merged(PartId),
    Checkpoint,
}

/// Who waits for a record of the journal.
#[derive(Clone, Copy, Debug)]
pub enum LogThen {
    Nothing,
    Part(PartId),
    Marked {
        key: Key,
        number: u64,
        generation: Generation,
        request: RequestId,
    },
    Cooled(Key, u64),
    Request(RequestId),
    /// Slots of a layer that is gone were freed.
    Freed(LayerId),
    /// New layers have the marks of the old ones.
    Turned,
    Merged(PartId),
    Restated,
}

/// Disk operations under way.
#[derive(Default)]
pub struct Io {
    then: Slab<DiskThen>,
    pub out: VecDeque<Output>,
}

impl Io {
    pub fn is_idle(&self) -> bool {
        self.then.is_empty() && self.out.is_empty()
    }

    pub fn submit(&mut self, kind: DiskOpKind, then: DiskThen) {
        let id = DiskOpId::new(self.then.insert(then).0);
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

/// First writes that no flush covered: beyond this many blocks (64 MiB) the store flushes by itself, so that what an
/// opening after a power cut has to verify takes a fraction of a second.
const UNFLUSHED_BLOCKS_MAX: u64 = 16384;

/// Units that wait for a flush before they are free: beyond so many (8 MiB), or when there are few free ones left, the
/// store flushes by itself.
const UNITS_WAITING_MAX: u32 = (8 << 20) / crate::layout::UNIT_BYTES as u32;
const UNITS_FREE_LOW: u32 = (64 << 20) / crate::layout::UNIT_BYTES as u32;

pub struct Pool {
    pub superblock: Superblock,
    pub io: Io,
    /// Why no more changes are taken.
    pub failed: Option<String>,
    /// Blocks that did not match their checksums, and reads that brought nothing, since this was opened.
    pub checksum_errors: u64,
    pub io_errors: u64,
    pub catalog: Catalog,
    pub catalog_sequence: u64,
    pub catalog_queue: CatalogQueue,
    pub catalog_commit: Option<CatalogCommit>,
    /// Volumes whose deletion was asked for and is not in the catalog yet.
    pub deleting: BTreeSet<VolumeId>,
    /// A snapshot or rollback under way, and what waits for its end.
    pub turning: Option<Turning>,
    pub held: Held,
    /// Extents of layers beneath that are to cool by themselves.
    pub freezing: BTreeSet<Key>,
    /// Two layers that are being made one; whether there may be others.
    pub merging: Option<Merging>,
    pub may_merge: bool,
    /// Layers that could not be made one with that above because the disk did not give what they hold.
    pub unmerged: BTreeSet<LayerId>,
    /// Parts that wait for something other than their blocks.
    pub stalled: Vec<PartId>,
    /// Changes of the extent that is just being made one.
    pub merge_held: Vec<(StoreRequestId, StoreOp)>,
    /// Layers that are gone from the catalog and whose slots are being freed.
    pub leaving: BTreeMap<LayerId, Leaving>,
    /// Slots that tell of what is lost, on their way to the journal.
    pub losing: BTreeSet<Key>,
    pub layers: BTreeMap<LayerId, LayerMap>,
    pub table: SlotTable,
    pub space: Space,
    pub leaves: LeafCache,
    pub hot: BTreeMap<Key, HotExtent>,
    /// Extents that wait for room among the hot ones, first come first served.
    pub heat_waiting: VecDeque<(RequestId, Key, Generation)>,
    /// Who waits for a mark that somebody else asked for, by its number.
    pub joined: Vec<(u64, RequestId)>,
    pub lanes: Lanes,
    pub parts: Slab<Part>,
    /// Parts that may go on.
    pub ready: VecDeque<PartId>,
    /// Writes that wait until the journal says durably that their blocks were flushed.
    pub settling: Vec<PartId>,
    settled: u64,
    pub loads: BTreeMap<Key, Load>,
    /// Those of them for which coolings wait.
    pub cooling_loads: u32,
    /// Extents that are to cool, and the number of the cooling.
    pub cool_waiting: VecDeque<(Key, u64)>,
    /// Leaves that are being written for coolings.
    pub leaves_under_way: u32,
    pub requests: Slab<Request>,
    pub journal: Journal<LogThen>,
    flushes: Flushes,
    pub unflushed_blocks: u64,
    pub checkpoint: Option<Checkpoint>,
    pub anchor: Anchor,
    /// Where it was when it was opened.
    pub found_at: Position,
    pub looking: Looking,
    counter: u64,
}

impl Pool {
    pub fn new(
        superblock: Superblock,
        found: Found,
        table: SlotTable,
        anchor: Anchor,
        mut journal: Journal<LogThen>,
    ) -> Pool {
        journal.on_anchor(anchor.tail, anchor.durable);
        let found_at = Position { changes: found.catalog.changes, journal: found.journal_end };
        let mut layers: BTreeMap<LayerId, LayerMap> =
            found.catalog.layers.keys().map(|layer| (*layer, LayerMap::default())).collect();
        for (number, slot) in table.iter().filter(|(_, slot)| slot.state != SlotState::Free) {
            let (layer, extent) = slot.owner();
            let map = layers.entry(layer).or_default();
            map.extents.insert(extent, number);
            map.count(slot);
        }
        let hot = found.hot.into_iter().map(|(key, found)| {
            let slot = found.slot.map(|slot| (slot, table.get(slot).clone()));
            let holds_data = slot.as_ref().is_some_and(|(_, slot)| slot.state.holds_data());
            // Whether it was changed under its mark nobody knows.
            let dirty = slot.is_some();
            let mut hot = HotExtent::new(found.generation, slot);
            hot.marked = Some(found.generation);
            hot.recovered = holds_data.then(|| Box::new(found.recovered));
            hot.dirty = dirty;
            (key, hot)
        });
        Pool {
            superblock,
            io: Io::default(),
            failed: None,
            checksum_errors: 0,
            io_errors: 0,
            catalog: found.catalog,
            catalog_sequence: found.catalog_sequence,
            catalog_queue: CatalogQueue::new(),
            catalog_commit: None,
            deleting: BTreeSet::new(),
            turning: None,
            held: Held::default(),
            freezing: BTreeSet::new(),
            merging: None,
            may_merge: true,
            unmerged: BTreeSet::new(),
            stalled: Vec::new(),
            merge_held: Vec::new(),
            leaving: BTreeMap::new(),
            losing: BTreeSet::new(),
            layers,
            hot: hot.collect(),
            table,
            space: found.space,
            leaves: LeafCache::default(),
            heat_waiting: VecDeque::new(),
            joined: Vec::new(),
            lanes: Lanes::default(),
            parts: Slab::default(),
            ready: VecDeque::new(),
            settling: Vec::new(),
            settled: 0,
            loads: BTreeMap::new(),
            cooling_loads: 0,
            cool_waiting: VecDeque::new(),
            leaves_under_way: 0,
            requests: Slab::default(),
            journal,
            flushes: Flushes::default(),
            unflushed_blocks: 0,
            checkpoint: None,
            anchor,
            found_at,
            looking: Looking::default(),
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
        let reads = matches!(op, StoreOp::Read { .. } | StoreOp::Checksums { .. });
        if let Some(reason) = self.failed.clone().filter(|_| !reads) {
            return self.end(id, Err(StoreError::Disk(reason)));
        }
        let Some(op) = self.hold(id, op) else { return };
        if self.meets_merge(&op) {
            return self.merge_held.push((id, op));
        }
        let begun = match op {
            StoreOp::Snapshot { of } => self.begin_turn(id, Turn::Snapshot { of }),
            StoreOp::Rollback { volume, snapshot, generation, also } => {
                self.begin_turn(id, Turn::Rollback { volume, snapshot, generation, also })
            }
            StoreOp::Clone { of, volume, group, generation } => self.begin_clone(id, of, volume, group, generation),
            StoreOp::Create { volume, group, size } => self.begin_create(id, volume, group, size),
            StoreOp::Delete { volume } => self.begin_delete(id, volume),
            StoreOp::PutNote { group, note } => self.begin_note(id, group, note),
            StoreOp::Heat { volume, extents, generation } => self.begin_heat(id, volume, &extents, generation),
            StoreOp::Cool { volume, extents } => self.begin_cool(id, volume, &extents),
            StoreOp::Remark { group, generation } => self.begin_remark(id, group, generation),
            StoreOp::Reap { group } => self.begin_reap(id, group),
            StoreOp::Read { volume, range } => self.begin_read(id, volume, range),
            StoreOp::Write { volume, range, data, checksums } => self.begin_write(id, volume, range, data, checksums),
            StoreOp::Zero { volume, range } => self.begin_zero(id, volume, range),
            StoreOp::Lose { volume, extent } => self.begin_lose(id, volume, extent),
            StoreOp::LoseColumn { volume, extent, generation } => {
                self.begin_lose_column(id, volume, extent, generation)
            }
            StoreOp::Forget { volume, extent } => self.begin_forget(id, volume, extent),
            StoreOp::PutMembers { members, lost } => {
                let family = |volume| Some(self.catalog.layers.get(&self.layer_of(volume)?)?.family);
                let lost = lost.into_iter().filter_map(|(volume, ranges)| Some((family(volume)?, ranges))).collect();
                self.change_catalog(id, Change::Members { members, lost });
                Ok(())
            }
            StoreOp::PutArriving { column } => {
                let family = |volume| Some(self.catalog.layers.get(&self.layer_of(volume)?)?.family);
                let column = column.and_then(|(volume, extent)| Some((family(volume)?, extent)));
                self.change_catalog(id, Change::Arriving(column));
                Ok(())
            }
            StoreOp::Adopt(CatalogCopy(ahead)) => self.begin_turn(id, Turn::Adopt(ahead)),
            StoreOp::Flush => {
                let request = self.requests.insert(Request::change(id, 1));
                self.flush(FlushThen::Request(request));
                Ok(())
            }
            StoreOp::Checksums { volume, extent } => self.begin_checksums(id, volume, extent),
            StoreOp::Look { piece, .. } => {
                self.begin_look(id, piece);
                Ok(())
            }
        };
        if let Err(error) = begun {
            self.end(id, Err(error));
        }
    }

    pub fn on_disk(&mut self, done: DiskDone) {
        let Some(then) = self.io.then.remove(SlabId::from_raw(done.id.number)) else { return };
        let reads = matches!(
            then,
            DiskThen::Read(..)
                | DiskThen::Leaf(_)
                | DiskThen::LeafBlock(..)
                | DiskThen::Reread(..)
                | DiskThen::MergeRead(..)
                | DiskThen::Look(..)
        );
        let read_error = done.result.as_ref().err().filter(|_| reads).cloned();
        self.on_disk_ended(then, done);
        if let Some(error) = read_error {
            self.io_errors += 1;
            if !is_bad_spot(&error) {
                self.fail(&error);
            }
        }
    }

    fn on_disk_ended(&mut self, then: DiskThen, done: DiskDone) {
        match then {
            DiskThen::Read(part, first, count) => self.on_piece_read(part, first, count, done.result),
            DiskThen::Leaf(key) => self.on_leaf_read(key, done.result.ok().flatten()),
            DiskThen::LeafBlock(key, part) => self.on_leaf_block(key, part, done.result.ok().flatten()),
            DiskThen::Reread(key, first, count) => self.on_reread(key, first, count, done.result.ok().flatten()),
            DiskThen::Discard(first, count, ticket) => self.on_discarded(first, count, ticket),
            DiskThen::Look(offset, len) => self.on_look_read(offset, len, done.result.ok().flatten()),
            DiskThen::MergeRead(part, first, count) => {
                self.on_merge_read(part, first, count, done.result.ok().flatten());
            }
            DiskThen::Written(_)
            | DiskThen::MergeCopied(_)
            | DiskThen::MergeLeaf(_)
            | DiskThen::LeafWritten(..)
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
            DiskThen::Written(part) => self.on_piece_written(part),
            DiskThen::MergeCopied(part) => self.on_merge_copied(part),
            DiskThen::MergeLeaf(part) => self.on_merge_leaf_written(part),
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
            DiskThen::Read(..)
            | DiskThen::MergeRead(..)
            | DiskThen::Leaf(_)
            | DiskThen::LeafBlock(..)
            | DiskThen::Reread(..)
            | DiskThen::Look(..)
            | DiskThen::Discard(..) => unreachable!("told apart by the caller"),
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
        let marked = self.journal.take_marked();
        self.run_logged(marked, covered);
        for then in waiting {
            match then {
                FlushThen::Nothing => {}
                FlushThen::Request(id) => self.finish_one(id),
                FlushThen::Journal => {
                    let committed = self.journal.on_batch_flushed();
                    self.on_committed(committed);
                }
                FlushThen::Cooled(key, number) => self.on_leaf_flushed(key, number),
                FlushThen::MergeLeaf(part) => self.on_merge_flushed(part),
                FlushThen::Merged(part) => self.end_merge(part),
                FlushThen::Checkpoint => self.on_checkpoint_flushed(),
            }
        }
    }

    fn on_committed(&mut self, committed: Committed<LogThen>) {
        for record in committed.records {
            match record {
                Record::Slot { slot, descriptor } => self.on_slot_committed(slot, *descriptor, committed.last),
                Record::Unit { slot, run } => {
                    let before = self.table.committed_units(slot, run);
                    let given_back: Vec<(u32, u32)> = before.iter().map(|unit| (*unit, 1)).collect();
                    if let Some(map) = self.layers.get_mut(&self.table.get(slot).layer) {
                        map.units -= before.len() as u64;
                        map.units += if run.unit == NO_UNIT { 0 } else { u64::from(run.count) };
                    }
                    self.space.give_back(committed.last, given_back, Vec::new());
                }
                Record::Valid { checksums, .. } => self.unflushed_blocks += checksums.len() as u64,
                Record::Merge { into, descriptor, from, leaf_sequence } => {
                    let freed = Slot { leaf_sequence, ..Slot::default() };
                    self.on_slots_committed(vec![(into, *descriptor), (from, freed)], committed.last);
                }
                Record::Forget { slots } => {
                    let freed = |(slot, leaf_sequence)| (slot, Slot { leaf_sequence, ..Slot::default() });
                    self.on_slots_committed(slots.into_iter().map(freed).collect(), committed.last);
                }
                Record::Lose { extent, generation, slots } => {
                    let mut lost = Vec::new();
                    for (slot, layer, blocks) in slots {
                        let sequence = self.table.get(slot).leaf_sequence;
                        self.losing.remove(&(layer, extent));
                        lost.push((slot, Record::lost_slot(layer, extent, blocks, generation, sequence)));
                    }
                    self.on_slots_committed(lost, committed.last);
                }
                Record::Hot { .. }
                | Record::Cold { .. }
                | Record::Zero { .. }
                | Record::Hole { .. }
                | Record::Mask(_) => {}
            }
        }
        self.run_logged(committed.then, committed.last);
    }

    /// `last`: the block of the journal up to which it is said.
    fn run_logged(&mut self, logged: Vec<LogThen>, last: u64) {
        for then in logged {
            match then {
                LogThen::Nothing => {}
                LogThen::Part(part) => self.on_part_logged(part, last),
                LogThen::Marked { key, number, generation, request } => {
                    self.on_marked(key, number, generation);
                    self.finish_one(request);
                    for (_, request) in self.joined.extract_if(.., |(joined, _)| *joined == number).collect::<Vec<_>>()
                    {
                        self.finish_one(request);
                    }
                }
                LogThen::Cooled(key, number) => self.on_cold(key, number),
                LogThen::Request(id) => self.finish_one(id),
                LogThen::Freed(layer) => self.on_slots_freed(layer),
                LogThen::Turned => self.on_turn_marked(),
                LogThen::Merged(part) => self.on_merged(part),
                LogThen::Restated => self.on_restated(),
            }
        }
    }

    /// What the descriptor before named and this one does not is given back.
    fn on_slot_committed(&mut self, slot: u32, descriptor: Slot, told: u64) {
        let (units, leaf) = (descriptor.units.clone(), descriptor.leaf);
        let before = self.table.committed(slot, descriptor);
        self.recount(std::slice::from_ref(&before), &[slot]);
        let leaves: Vec<LeafPlace> = before.leaf.filter(|place| Some(*place) != leaf).into_iter().collect();
        self.space.give_back(told, lost_units(&before.units, &units), leaves);
    }

    /// What none of the slots names any more is given back.
    fn on_slots_committed(&mut self, slots: Vec<(u32, Slot)>, told: u64) {
        let (mut kept_units, mut kept_leaves) = (BTreeSet::new(), Vec::new());
        let (mut before, mut numbers) = (Vec::new(), Vec::new());
        for (number, descriptor) in slots {
            kept_units.extend(descriptor.units.iter().map(|(_, unit)| unit));
            kept_leaves.extend(descriptor.leaf);
            before.push(self.table.committed(number, descriptor));
            numbers.push(number);
        }
        self.recount(&before, &numbers);
        let units = before.iter().flat_map(|slot| slot.units.iter()).map(|(_, unit)| unit);
        let lost = units.filter(|unit| !kept_units.contains(unit)).map(|unit| (unit, 1)).collect();
        let leaves = before.iter().filter_map(|slot| slot.leaf).filter(|place| !kept_leaves.contains(place)).collect();
        self.space.give_back(told, lost, leaves);
    }

    /// Changes a slot's descriptor, through the journal.
    pub fn log_slot(&mut self, slot: u32, descriptor: Slot) {
        self.journal.queue(Record::Slot { slot, descriptor: Box::new(descriptor) });
    }

    fn on_discarded(&mut self, first: u32, count: u32, ticket: Ticket) {
        self.space.on_discarded(first, count, ticket);
        self.finish_leaving();
    }

    /// The extent's slot and descriptor as far as they are queued for the journal.
    pub fn view(&self, key: Key) -> Option<(u32, &Slot)> {
        if let Some(hot) = self.hot.get(&key) {
            return hot.slot.map(|slot| (slot, &hot.descriptor));
        }
        let slot = *self.layers.get(&key.0)?.extents.get(&key.1)?;
        Some((slot, self.table.get(slot)))
    }

    /// Does whatever has become possible. Called after every event.
    pub fn pump(&mut self) {
        // What they found in their way may be gone now.
        self.ready.extend(std::mem::take(&mut self.stalled));
        loop {
            self.advance_ready();
            if self.failed.is_some() {
                return;
            }
            self.discard_given_back();
            self.step_turn();
            self.step_merge();
            self.cool_waiting_extents();
            self.heat_waiting_extents();
            let changes_ended = self.start_catalog_commit();
            let turn_ended = self.end_turn();
            self.freeze_some();
            // What was held, or a turn that waited for changes, may go on now.
            if self.ready.is_empty() && !turn_ended && !changes_ended {
                break;
            }
        }
        if self.checkpoint.is_none() && self.journal.checkpoint_due() {
            self.begin_checkpoint();
        }
        for write in self.journal.start().into_iter().flatten() {
            self.io.submit(write, DiskThen::Journal);
        }
        let wants_flush = self.journal.wants_flush()
            || self.unflushed_blocks > UNFLUSHED_BLOCKS_MAX
            || self.space.waiting() > UNITS_WAITING_MAX
            || (self.space.waiting() > 0 && self.space.free() < UNITS_FREE_LOW);
        if wants_flush && self.flushes.under_way.is_none() {
            self.flush(FlushThen::Nothing);
        }
    }

    fn advance_ready(&mut self) {
        loop {
            while let Some(part) = self.ready.pop_front() {
                self.advance(part);
            }
            if self.settled == self.journal.recorded() {
                return;
            }
            self.settled = self.journal.recorded();
            self.ready.extend(std::mem::take(&mut self.settling));
        }
    }

    fn discard_given_back(&mut self) {
        for (first, count, ticket) in self.space.on_durable(self.journal.durable()) {
            let len = u64::from(count) * crate::layout::UNIT_BYTES;
            let offset = self.geometry().offset(first, 0);
            self.io.submit(DiskOpKind::Discard { offset, len }, DiskThen::Discard(first, count, ticket));
        }
        // What was given back may have been part of a unit only, which is not discarded.
        if !self.leaving.is_empty() {
            self.finish_leaving();
        }
    }

    pub fn end(&mut self, id: StoreRequestId, result: Result<StoreReply, StoreError>) {
        self.io.out.push_back(Output::Ended(id, result));
    }

    /// One thing that the request waited for is done.
    pub fn finish_one(&mut self, id: RequestId) {
        let Some(request) = self.requests.get_mut(id) else { return };
        request.left -= 1;
        if request.left == 0
            && let Some(request) = self.requests.remove(id)
        {
            self.end(request.id, request.result());
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
        self.joined.clear();
        self.catalog_queue.clear();
        let ended: Vec<RequestId> =
            self.requests.iter().filter(|(_, request)| request.changes).map(|(id, _)| id).collect();
        for id in ended {
            if let Some(request) = self.requests.remove(id) {
                self.end(request.id, Err(StoreError::Disk(reason.clone())));
            }
        }
        let dropped: Vec<(PartId, LaneKey)> =
            self.parts.iter().filter(|(_, part)| part.work.is_exclusive()).map(|(id, part)| (id, part.lane)).collect();
        for (id, lane) in dropped {
            self.parts.remove(id);
            self.ready.extend(self.lanes.leave(lane, id));
        }
        self.merging = None;
        self.release_merge_held();
        self.fail_held();
    }

    pub fn known_volume(&self, volume: VolumeId) -> Result<crate::catalog::Volume, StoreError> {
        let known = self.catalog.volumes.get(&volume).copied();
        known.filter(|_| !self.deleting.contains(&volume)).ok_or(StoreError::NoVolume)
    }

    /// The layer to which a volume's writes go.
    pub fn layer_of(&self, volume: VolumeId) -> Option<LayerId> {
        self.catalog.volumes.get(&volume).map(|known| known.layer)
    }

    /// The same, if the range lies in the volume.
    pub fn checked_range(&self, volume: VolumeId, range: BlockRange) -> Result<LayerId, StoreError> {
        let known = self.known_volume(volume)?;
        let blocks = known.size.0 / pollux_base::unit::BLOCK_BYTES;
        let end = range.start.0.checked_add(range.count.0).ok_or(StoreError::OutOfRange)?;
        if end > blocks { Err(StoreError::OutOfRange) } else { Ok(known.layer) }
    }

    /// The invariants that cost next to nothing to check.
    pub fn check_step(&self) {
        self.journal.check();
        assert!(self.hot.len() <= self.geometry().ring.hot_marks_max(), "the hot set is bounded");
    }

    /// Asserts what must always hold; see the heads of the files.
    pub fn check(&self) {
        self.journal.check();
        self.table.check();
        self.leaves.check();
        self.space.check();
        assert!(self.hot.len() <= self.geometry().ring.hot_marks_max(), "the hot set is bounded");
        assert_eq!(self.parts.is_empty(), self.lanes.is_empty(), "who holds blocks is under way");
        let mut owned = BTreeMap::new();
        for (layer, map) in &self.layers {
            for (extent, slot) in &map.extents {
                let key = (*layer, *extent);
                assert_eq!(owned.insert(*slot, key), None, "slot {slot} belongs to one extent");
                let descriptor = self.table.get(*slot);
                let untold =
                    descriptor.state == SlotState::Free && (self.hot.contains_key(&key) || self.losing.contains(&key));
                assert!(untold || descriptor.owner() == key, "slot {slot} knows its owner");
            }
        }
        let taken =
            self.table.iter().filter(|(number, slot)| slot.state != SlotState::Free || owned.contains_key(number));
        // One that was taken and not told of belongs to nobody from when its layer is deleted until that is on record.
        if self.leaving.is_empty() {
            assert_eq!(
                taken.count() + self.table.vacant(),
                self.geometry().slots as usize,
                "every slot is accounted for"
            );
        }
        self.check_space();
        for (key, hot) in &self.hot {
            let mapped = self.layers.get(&key.0).and_then(|map| map.extents.get(&key.1)).copied();
            assert_eq!(hot.slot, mapped, "the hot set and the map agree on {key:?}");
            assert!(hot.cooling.is_none() || hot.writers == 0, "what is written to is not cooled");
            assert!(
                hot.recovered.is_none() || hot.loaded().is_none(),
                "what is loaded has taken over what was recovered"
            );
            if let Some(sums) = hot.loaded() {
                let fresh = hot.fresh.keys().all(|block| !sums[usize::from(*block)].is_zero());
                assert!(fresh, "a fresh block holds data");
                let has_place = |block: usize| hot.descriptor.units.get(block / UNIT_BLOCKS).is_some();
                let placed = (0..SUMS).all(|block| sums[block] != UNREAD_CHECKSUM || has_place(block));
                assert!(placed, "an unread block has a place");
            }
        }
    }

    /// Every unit has one owner: a slot, as committed or as its hot extent has it, or leaves.
    fn check_space(&self) {
        let mut owned = vec![false; self.geometry().units() as usize];
        let mut count = 0;
        for (_, slot) in self.table.iter() {
            for (_, unit) in slot.units.iter() {
                assert!(!std::mem::replace(&mut owned[unit as usize], true), "unit {unit} is named by two slots");
                count += 1;
            }
        }
        for (_, unit) in self.hot.values().flat_map(|hot| hot.descriptor.units.iter()) {
            count += usize::from(!std::mem::replace(&mut owned[unit as usize], true));
        }
        // What is on its way to the journal or from it belongs to nobody for a while.
        let merges = self.parts.iter().any(|(_, part)| matches!(part.work, Work::Merge(_)));
        if self.space.leaving() || !self.journal.is_idle() || self.failed.is_some() || merges {
            return;
        }
        let (leaf_units, leaf_blocks) = self.space.leaf_units();
        assert_eq!(count + leaf_units, self.space.taken_units() as usize, "every unit is accounted for");
        let stored = self.table.iter().filter_map(|(_, slot)| slot.leaf);
        let spare = self.hot.values().filter_map(|hot| hot.spare_leaf);
        let blocks: u32 = stored.chain(spare).map(|leaf| u32::from(leaf.blocks)).sum();
        assert_eq!(blocks, leaf_blocks, "every leaf is accounted for");
    }
}

/// Runs of units that are in the first and not at the same place in the second.
fn lost_units(before: &Units, now: &Units) -> Vec<(u32, u32)> {
    let mut lost: Vec<(u32, u32)> = Vec::new();
    for (_, unit) in before.iter().filter(|(index, unit)| now.get(*index) != Some(*unit)) {
        match lost.last_mut() {
            Some((first, count)) if *first + *count == unit => *count += 1,
            _ => lost.push((unit, 1)),
        }
    }
    lost
}

/// Bytes of `data` for block `at` of it.
pub fn block_of(data: &Data, at: usize) -> &[u8] {
    &data.as_slice()[at * crate::layout::BLOCK..][..crate::layout::BLOCK]
}
