//! Requests cut into one part per extent; writes and zeroing.
//!
//! A part claims its blocks (see `lanes`), has the extent's checksums loaded, does its disk operations, tells the journal if
//! the extent's blocks begin or cease to hold data, and ends. A write over blocks that hold data already is one disk
//! write and nothing else.
//!
//! A write to a block for the first time is told to the journal after its data is on the disk, with its checksum: after a
//! power cut a block whose bytes do not match never arrived, and what a recycled unit held before is never shown. The
//! unit that it lies in is told of before it, in the same batch.

use crate::hot::{Checksums, Fresh, HotExtent};
use crate::lanes::{Key, LaneKey};
use crate::layout::BLOCK;
use crate::layout::{LEAF_BLOCKS_MAX, UNIT_BLOCKS};
use crate::leaf::{HOLE_CHECKSUM, LOST_CHECKSUM, SUMS, is_data};
use crate::merging::Merged;
use crate::pool::{DiskThen, LogThen, Pool};
use crate::reading::Reading;
use crate::record::{Record, VALID_BLOCKS_MAX};
use crate::slab::SlabId;
use crate::slots::{LayerId, SlotState};
use crate::units::{NO_UNIT, UnitRun, Units, units_of};
use crate::{StoreError, StoreReply, StoreRequestId};
use pollux_base::unit::{BlockRange, EXTENT_BLOCKS};
use pollux_base::{BlockChecksum, BlockCount, BlockIndex, Data, DiskOpKind, ExtentIndex, VolumeId};
use std::collections::BTreeSet;
use std::ops::Range;

pub type RequestId = SlabId<Request>;
/// Names a part of a request, the part that falls into one extent.
pub type PartId = SlabId<Part>;

/// A request under way.
pub struct Request {
    pub id: StoreRequestId,
    /// Things it waits for.
    pub left: usize,
    /// Whether it ends when the store fails.
    pub changes: bool,
    pub error: Option<StoreError>,
    pub reading: Option<Reading>,
}

impl Request {
    pub fn change(id: StoreRequestId, left: usize) -> Request {
        Request { id, left, changes: true, error: None, reading: None }
    }

    pub fn read(id: StoreRequestId, left: usize, reading: Reading) -> Request {
        Request { id, left, changes: false, error: None, reading: Some(reading) }
    }

    pub fn result(self) -> Result<StoreReply, StoreError> {
        match (self.error, self.reading) {
            (Some(error), _) => Err(error),
            (None, Some(reading)) => reading.result(),
            (None, None) => Ok(StoreReply::Done),
        }
    }
}

/// What a part does.
pub enum Work {
    /// `expected` from the moment its disk reads are under way.
    Read {
        expected: Vec<BlockChecksum>,
    },
    Checksums,
    Write {
        data: Data,
        checksums: Vec<BlockChecksum>,
    },
    Zero,
    /// Of no block of the extent is anything known any more.
    Lose,
    /// All that any layer has of the extent goes.
    Forget,
    /// The store's own: makes the slot of a layer that is given up a part of the one above.
    /// `None` until it is known what the extent becomes.
    Merge(Option<Box<Merged>>),
}

impl Work {
    /// Whether it ends when the store fails.
    pub fn changes(&self) -> bool {
        matches!(self, Work::Write { .. } | Work::Zero | Work::Lose)
    }
}

/// The part of a request that falls into one extent.
pub struct Part {
    pub request: RequestId,
    pub key: Key,
    pub lane: LaneKey,
    /// The layers beneath, from the top.
    pub below: Vec<LayerId>,
    pub first: u16,
    pub count: u16,
    /// Place in the request, in blocks.
    pub at: usize,
    pub work: Work,
    /// Disk operations under way.
    pub ops_left: u32,
}

impl Work {
    /// Whether nobody else may have the blocks meanwhile.
    pub fn is_exclusive(&self) -> bool {
        self.changes() || matches!(self, Work::Merge(_) | Work::Forget)
    }
}

impl Part {
    pub fn blocks(&self) -> Range<usize> {
        usize::from(self.first)..usize::from(self.first) + usize::from(self.count)
    }
    pub fn units(&self) -> Range<usize> {
        units_of(usize::from(self.first), usize::from(self.count))
    }
}

/// Blocks of an extent that lie side by side on the disk.
pub struct Piece {
    /// Blocks of the extent.
    pub blocks: Range<usize>,
    pub unit: u32,
    /// Block of the unit with which it begins.
    pub block: usize,
}

/// The range as pieces, without what has no unit.
pub fn pieces(units: &Units, range: Range<usize>) -> impl Iterator<Item = Piece> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        loop {
            if at >= range.end {
                return None;
            }
            let index = at / UNIT_BLOCKS;
            let Some(unit) = units.get(index) else {
                at = (index + 1) * UNIT_BLOCKS;
                continue;
            };
            let start = at;
            let mut last = index;
            while (last + 1) * UNIT_BLOCKS < range.end && units.get(last + 1) == Some(unit + (last + 1 - index) as u32)
            {
                last += 1;
            }
            at = range.end.min((last + 1) * UNIT_BLOCKS);
            return Some(Piece { blocks: start..at, unit, block: start % UNIT_BLOCKS });
        }
    })
}

impl Pool {
    pub fn begin_write(
        &mut self,
        id: StoreRequestId,
        volume: VolumeId,
        range: BlockRange,
        data: Data,
        mut checksums: Vec<BlockChecksum>,
    ) -> Result<(), StoreError> {
        let layer = self.checked_range(volume, range)?;
        assert_eq!(data.len() as u64, range.count.bytes().0, "a write brings its blocks, no more and no less");
        assert_eq!(checksums.len() as u64, range.count.0, "a write brings a checksum for each block");
        assert!(
            checksums.iter().all(|sum| is_data(*sum)),
            "no written block has a checksum that stands for something else"
        );
        self.has_room(layer, range)?;
        let parts = range.split_by_extent().count();
        if parts == 0 {
            self.end(id, Ok(StoreReply::Done));
            return Ok(());
        }
        let request = self.requests.insert(Request::change(id, parts));
        for part in range.split_by_extent() {
            let key = (layer, part.start.extent());
            self.give_space(key, part);
            let work = match parts {
                1 => Work::Write { data: data.clone(), checksums: std::mem::take(&mut checksums) },
                _ => {
                    let places = part.places_in(range);
                    let data = data.slice(places.start * BLOCK..places.end * BLOCK);
                    Work::Write { data, checksums: checksums[places].to_vec() }
                }
            };
            self.add_part(request, layer, range, part, work);
        }
        Ok(())
    }

    /// Whether all that a write to the range still needs can be had: slots, units, places for leaves.
    pub fn has_room(&self, layer: LayerId, range: BlockRange) -> Result<(), StoreError> {
        let (mut slots, mut units, mut leaves) = (0, 0, 0);
        for part in range.split_by_extent() {
            let hot = marked(self.hot.get(&(layer, part.start.extent())), layer, part.start.extent());
            slots += usize::from(hot.slot.is_none());
            leaves += usize::from(hot.spare_leaf.is_none());
            let wanted = units_of(part.start.in_extent(), part.count.0 as usize);
            units += wanted.filter(|index| hot.descriptor.units.get(*index).is_none()).count();
        }
        let leaf_units = leaves.saturating_sub(self.space.leaf_room());
        let fits = slots <= self.table.vacant() && units + leaf_units <= self.space.free() as usize;
        if fits { Ok(()) } else { Err(StoreError::Full) }
    }

    /// Takes what `has_room` found.
    fn give_space(&mut self, key: Key, part: BlockRange) {
        self.writer_arrives(key);
        self.give_slot(key);
        let hot = self.hot.get_mut(&key).expect("it is marked");
        if hot.spare_leaf.is_none() {
            let place = self.space.take_leaf(LEAF_BLOCKS_MAX as u8);
            hot.spare_leaf = Some(place.expect("room for leaves was counted"));
        }
        let units = units_of(part.start.in_extent(), part.count.0 as usize);
        for index in units.clone() {
            if hot.descriptor.units.get(index).is_none() {
                let unit = self.space.take(index, hot.descriptor.units.nearest(index));
                hot.descriptor.units.set(index, unit.expect("free units were counted"));
            }
        }
        hot.pin(units);
    }

    pub fn give_slot(&mut self, key: Key) {
        let hot = self.hot.get_mut(&key).expect("it is marked");
        if hot.slot.is_none() {
            let slot = self.table.take().expect("vacant slots were counted");
            hot.slot = Some(slot);
            hot.descriptor.leaf_sequence = self.table.get(slot).leaf_sequence;
            self.layers.get_mut(&key.0).expect("the layer is known").extents.insert(key.1, slot);
        }
        if matches!(hot.checksums, Checksums::Absent) {
            hot.checksums = Checksums::Loaded(Box::new([BlockChecksum::ZERO; SUMS]));
        }
    }

    pub fn begin_zero(&mut self, id: StoreRequestId, volume: VolumeId, range: BlockRange) -> Result<(), StoreError> {
        let layer = self.checked_range(volume, range)?;
        // What has no slot reads as zeros already.
        let mapped: BTreeSet<ExtentIndex> = match range.count.0 {
            0 => BTreeSet::new(),
            _ => {
                let extents = range.start.extent()..=BlockIndex(range.end().0 - 1).extent();
                let pool = &*self;
                let of = |beneath: LayerId| {
                    let mapped = pool.layers[&beneath].extents.range(extents.clone()).map(|(extent, _)| *extent);
                    // In its own layer a first write may be under way of which the journal was not told yet.
                    let counts = move |extent: &ExtentIndex| pool.says_something((beneath, *extent));
                    mapped.filter(move |extent| beneath == layer || counts(extent))
                };
                pool.catalog.chain(layer).flat_map(of).collect()
            }
        };
        let parts: Vec<BlockRange> = mapped.into_iter().map(|extent| within(range, extent)).collect();
        let slotless = |part: &&BlockRange| !self.layers[&layer].extents.contains_key(&part.start.extent());
        if parts.iter().filter(slotless).count() > self.table.vacant() {
            return Err(StoreError::Full);
        }
        if parts.is_empty() {
            self.end(id, Ok(StoreReply::Done));
            return Ok(());
        }
        let request = self.requests.insert(Request::change(id, parts.len()));
        for part in parts {
            let key = (layer, part.start.extent());
            marked(self.hot.get(&key), key.0, key.1);
            self.writer_arrives(key);
            self.give_slot(key);
            self.add_part(request, layer, range, part, Work::Zero);
        }
        Ok(())
    }

    pub fn writer_arrives(&mut self, key: Key) {
        self.cancel_cooling(key);
        self.hot.get_mut(&key).expect("it is marked").writers += 1;
    }

    pub fn add_part(
        &mut self,
        request: RequestId,
        layer: LayerId,
        whole: BlockRange,
        part: BlockRange,
        work: Work,
    ) -> PartId {
        let key = (layer, part.start.extent());
        let lane = (self.catalog.layers[&layer].family, key.1);
        let (first, count) = (part.start.in_extent() as u16, part.count.0 as u16);
        let exclusive = work.is_exclusive();
        let below: Vec<LayerId> = self.catalog.chain(layer).skip(1).collect();
        for layer in below.iter().chain([&layer]) {
            self.layers.get_mut(layer).expect("the layer is known").busy += 1;
        }
        let at = (part.start.0 - whole.start.0) as usize;
        let id = self.parts.insert(Part { request, key, lane, below, first, count, at, work, ops_left: 0 });
        if self.lanes.enter(lane, id, first, count, exclusive) {
            self.ready.push_back(id);
        }
        id
    }

    /// The part goes on as far as it can; it holds its blocks.
    pub fn advance(&mut self, id: PartId) {
        let Some(part) = self.parts.get(id) else { return };
        let (key, range) = (part.key, part.blocks());
        let reads = !part.work.changes();
        let compares = matches!(part.work, Work::Checksums);
        let is_there = |key: Key| if compares { self.is_known(key) } else { self.is_loaded(key) };
        let unloaded = |layer: &LayerId| Some((*layer, key.1)).filter(|key| !is_there(*key));
        let wanted = unloaded(&key.0).or_else(|| part.below.iter().filter(|_| reads).find_map(unloaded));
        match &part.work {
            Work::Merge(_) => self.advance_merge(id),
            Work::Forget => self.advance_forget(id),
            _ if wanted.is_some() => wanted.into_iter().for_each(|key| self.load(key, Some(id))),
            Work::Read { .. } | Work::Checksums => self.advance_read(id),
            Work::Write { .. } => self.advance_write(id),
            Work::Zero => self.advance_zero(id, key, range),
            Work::Lose => self.advance_lose(id, key, range),
        }
    }

    fn advance_write(&mut self, id: PartId) {
        let recorded = self.journal.recorded();
        let geometry = self.superblock.geometry;
        let part = self.parts.get_mut(id).expect("the part is under way");
        let hot = self.hot.get_mut(&part.key).expect("what is written to stays hot");
        if let Some(wanted) = hot.settle(part.first..part.first + part.count, recorded) {
            self.journal.want_recorded(wanted);
            self.settling.push(id);
            return;
        }
        hot.dirty = true;
        let start = usize::from(part.first);
        let Work::Write { data, .. } = &part.work else { unreachable!("told apart by the caller") };
        for piece in pieces(&hot.descriptor.units, part.blocks()) {
            let data = match piece.blocks.len() == usize::from(part.count) {
                true => data.clone(),
                false => data.slice((piece.blocks.start - start) * BLOCK..(piece.blocks.end - start) * BLOCK),
            };
            let offset = geometry.offset(piece.unit, piece.block);
            part.ops_left += 1;
            self.io.submit(DiskOpKind::Write { offset, data: vec![data], sync: false }, DiskThen::Written(id));
        }
    }

    fn advance_zero(&mut self, id: PartId, key: Key, range: Range<usize>) {
        let covers = self.parts.get(id).is_some_and(|part| self.shows_through(&part.below, key.1));
        let hot = self.hot.get_mut(&key).expect("what is written to stays hot");
        let Checksums::Loaded(sums) = &mut hot.checksums else { return self.finish_part(id) };
        // A zero above data of another layer must be told from a block that was never written here.
        let zero = if covers { HOLE_CHECKSUM } else { BlockChecksum::ZERO };
        let changes = |block: &usize| sums[*block] != zero;
        let Some((first, last)) = range.clone().find(changes).zip(range.clone().rfind(changes)) else {
            return self.finish_part(id);
        };
        sums[first..=last].fill(zero);
        hot.fresh.retain(|block, _| !(first..=last).contains(&usize::from(*block)));
        hot.dirty = true;
        let slot = hot.slot.expect("a slot was given when the zeroing arrived");
        let count = last + 1 - first;
        let (first_block, blocks) = (first as u16, count as u16);
        let mut last_record = match covers {
            true => Record::Hole { slot, first: first_block, count: blocks },
            false => Record::Zero { slot, first: first_block, count: blocks },
        };
        self.tell_slot(key);
        let hot = self.hot.get_mut(&key).expect("it was just there");
        for (index, unit, told) in hot.drop_empty_units(units_of(first, count)) {
            if !told {
                self.space.drop_unit(unit);
                continue;
            }
            match &mut last_record {
                Record::Unit { run, .. } if usize::from(run.first + run.count) == index => run.count += 1,
                _ => {
                    let run = UnitRun { first: index as u16, count: 1, unit: NO_UNIT };
                    self.journal.queue(std::mem::replace(&mut last_record, Record::Unit { slot, run }));
                }
            }
        }
        self.journal.queue_then(last_record, LogThen::Part(id));
    }

    pub fn on_piece_written(&mut self, id: PartId) {
        // A part that is not there was dropped when the store failed.
        let Some(part) = self.parts.get_mut(id) else { return };
        part.ops_left -= 1;
        if part.ops_left == 0 {
            self.on_data_written(id);
        }
    }

    fn on_data_written(&mut self, id: PartId) {
        let part = self.parts.get(id).expect("the part is under way");
        let key = part.key;
        let Work::Write { checksums, .. } = &part.work else { unreachable!("told apart by the caller") };
        let hot = self.hot.get_mut(&key).expect("what is written to stays hot");
        let slot = hot.slot.expect("what is written to has a slot");
        let sums = match &mut hot.checksums {
            Checksums::Loaded(sums) => sums,
            Checksums::Absent | Checksums::Unloaded => unreachable!("checksums are loaded before the data is written"),
        };
        let mut records: Vec<Record> = Vec::new();
        for (block, sum) in (part.first..).zip(checksums) {
            let old = std::mem::replace(&mut sums[usize::from(block)], *sum);
            if is_data(old) && old != LOST_CHECKSUM {
                continue;
            }
            hot.fresh.insert(block, Fresh { told: u64::MAX, before: old });
            match records.last_mut() {
                Some(Record::Valid { first, checksums, .. })
                    if usize::from(*first) + checksums.len() == usize::from(block)
                        && checksums.len() < VALID_BLOCKS_MAX =>
                {
                    checksums.push(*sum);
                }
                _ => records.push(Record::Valid { slot, first: block, checksums: vec![*sum] }),
            }
        }
        let Some(last) = records.pop() else { return self.finish_part(id) };
        if hot.slot_told {
            for run in hot.tell_units(part.units()) {
                self.journal.queue(Record::Unit { slot, run });
            }
        } else {
            self.tell_slot(key);
        }
        for record in records {
            self.journal.queue(record);
        }
        self.journal.queue_then(last, LogThen::Part(id));
    }

    /// The slot holds blocks of the extent from now on.
    pub fn tell_slot(&mut self, key: Key) {
        let hot = self.hot.get_mut(&key).expect("what is written to stays hot");
        if hot.slot_told {
            return;
        }
        hot.slot_told = true;
        hot.descriptor.state = SlotState::Data;
        (hot.descriptor.layer, hot.descriptor.extent) = (key.0, key.1.0);
        hot.descriptor.generation = hot.generation;
        hot.all_units_told();
        let (slot, descriptor) = (hot.slot.expect("it was given one"), hot.descriptor.clone());
        self.log_slot(slot, descriptor);
    }

    /// What the part had to tell is in the journal, up to its block `last`.
    pub fn on_part_logged(&mut self, id: PartId, last: u64) {
        let Some(part) = self.parts.get(id) else { return };
        let range = part.first..part.first + part.count;
        if let Some(hot) = self.hot.get_mut(&part.key) {
            for (_, fresh) in hot.fresh.range_mut(range).filter(|(_, fresh)| fresh.told == u64::MAX) {
                fresh.told = last;
            }
        }
        self.finish_part(id);
    }

    pub fn finish_part(&mut self, id: PartId) {
        let part = self.parts.remove(id).expect("a part ends once");
        self.ready.extend(self.lanes.leave(part.lane, id));
        if part.work.changes()
            && let Some(hot) = self.hot.get_mut(&part.key)
        {
            hot.writers -= 1;
            if matches!(part.work, Work::Write { .. }) {
                hot.unpin(part.units());
            }
        }
        self.finish_one(part.request);
        part.below.into_iter().for_each(|layer| self.no_longer_busy(layer));
        self.no_longer_busy(part.key.0);
    }
}

/// W7: the caller must have had the extent marked before it changes it.
pub fn marked(hot: Option<&HotExtent>, layer: LayerId, extent: ExtentIndex) -> &HotExtent {
    let hot = hot.filter(|hot| hot.marked.is_some());
    hot.unwrap_or_else(|| panic!("{extent:?} of {layer:?} is not marked hot: Heat must precede what changes it"))
}

/// The blocks of `range` that lie in `extent`.
fn within(range: BlockRange, extent: ExtentIndex) -> BlockRange {
    let start = range.start.max(extent.first_block());
    let end = range.end().0.min(extent.first_block().0 + EXTENT_BLOCKS);
    BlockRange::new(start, BlockCount(end - start.0))
}
