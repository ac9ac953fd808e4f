//! Reads, writes and zeroing, cut into one part per extent.
//!
//! A part claims its blocks (see `lanes`), has the extent's checksums loaded, does its disk operation, tells the journal if
//! the extent's blocks begin or cease to hold data, and ends. A write over blocks that hold data already is one disk
//! write and nothing else.
//!
//! A write to a block for the first time is told to the journal after its data is on the disk, with its checksum: after a
//! power cut a block whose bytes do not match never arrived, and what a recycled slot held before is never shown.

use crate::hot::{Base, Checksums, Fresh};
use crate::lanes::{Key, PartId};
use crate::layout::{BLOCK, LEAF_BLOCKS, LEAF_BYTES};
use crate::leaf::{self, LOST_CHECKSUM, LeafOwner, SUMS, Sums};
use crate::pool::{DiskThen, LogThen, Pool, block_of};
use crate::record::{Record, VALID_BLOCKS_MAX};
use crate::slots::{Slot, SlotState};
use crate::{StoreError, StoreReply, StoreRequestId};
use pollux_base::data::Buffer;
use pollux_base::unit::{BlockRange, EXTENT_BLOCKS};
use pollux_base::{
    BlockChecksum, BlockCount, BlockIndex, ByteCount, Data, DiskError, DiskOpKind, ExtentIndex, VolumeId,
};
use std::sync::Arc;

/// A request under way.
pub struct Request {
    /// Things it waits for.
    pub left: usize,
    /// Whether it ends when the store fails.
    pub changes: bool,
    pub error: Option<StoreError>,
    reading: Option<Reading>,
}

/// What a read has gathered.
struct Reading {
    whole_extent: bool,
    checksums: Vec<BlockChecksum>,
    /// Runs of blocks that hold data, by place in the request.
    runs: Vec<(usize, Data)>,
    corrupt: Vec<BlockRange>,
}

impl Request {
    pub fn change(left: usize) -> Request {
        Request { left, changes: true, error: None, reading: None }
    }

    fn read(left: usize, blocks: usize, whole_extent: bool) -> Request {
        let checksums = vec![BlockChecksum::ZERO; blocks];
        let reading = Reading { whole_extent, checksums, runs: Vec::new(), corrupt: Vec::new() };
        Request { left, changes: false, error: None, reading: Some(reading) }
    }

    pub fn result(self) -> Result<StoreReply, StoreError> {
        if let Some(error) = self.error {
            return Err(error);
        }
        match self.reading {
            None => Ok(StoreReply::Done),
            Some(reading) if reading.whole_extent => Ok(StoreReply::Checksums(reading.checksums)),
            Some(reading) => reading.result(),
        }
    }
}

impl Reading {
    fn result(mut self) -> Result<StoreReply, StoreError> {
        if !self.corrupt.is_empty() {
            self.corrupt.sort();
            return Err(StoreError::Corrupt(joined(self.corrupt)));
        }
        let len = self.checksums.len() * BLOCK;
        let data = match self.runs.as_slice() {
            [(0, data)] if data.len() == len => data.clone(),
            runs => {
                let mut buffer = Buffer::zeroed(len);
                for (at, data) in runs {
                    buffer.as_mut_slice()[at * BLOCK..][..data.len()].copy_from_slice(data.as_slice());
                }
                buffer.freeze()
            }
        };
        Ok(StoreReply::Read { data, checksums: self.checksums })
    }
}

/// Sorted ranges, neighbours made one.
fn joined(ranges: Vec<BlockRange>) -> Vec<BlockRange> {
    let mut joined: Vec<BlockRange> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.end() == range.start => last.count.0 += range.count.0,
            _ => joined.push(range),
        }
    }
    joined
}

/// What a part does.
pub enum Work {
    /// `expected` from the moment its disk read is under way; the read begins at `from` of the extent.
    Read {
        expected: Vec<BlockChecksum>,
        from: u16,
    },
    Checksums,
    Write {
        data: Data,
        checksums: Vec<BlockChecksum>,
    },
    Zero,
    /// Gives back the space of an empty slot.
    Discard {
        slot: u32,
    },
}

impl Work {
    /// Whether it ends when the store fails.
    pub fn changes(&self) -> bool {
        matches!(self, Work::Write { .. } | Work::Zero)
    }
    fn is_exclusive(&self) -> bool {
        !matches!(self, Work::Read { .. } | Work::Checksums)
    }
}

/// The part of a request that falls into one extent.
pub struct Part {
    /// `None`: the store's own.
    pub request: Option<StoreRequestId>,
    pub key: Key,
    pub first: u16,
    pub count: u16,
    /// Place in the request, in blocks.
    at: usize,
    pub work: Work,
}

/// Checksums of an extent on their way into memory.
pub struct Load {
    slot: u32,
    sums: Box<Sums>,
    /// The leaf, when it had to be read block by block.
    leaf: Vec<u8>,
    reads_left: u32,
    parts: Vec<PartId>,
}

/// Blocks of one read that rebuilds checksums.
const REBUILD_BLOCKS: usize = 256;

impl Pool {
    pub fn begin_read(&mut self, id: StoreRequestId, volume: VolumeId, range: BlockRange) -> Result<(), StoreError> {
        self.checked_range(volume, range)?;
        let parts: Vec<BlockRange> = range.split_by_extent().collect();
        if parts.is_empty() {
            self.end(id, Ok(StoreReply::Read { data: Data::zeroed(0), checksums: Vec::new() }));
            return Ok(());
        }
        self.requests.insert(id, Request::read(parts.len(), range.count.0 as usize, false));
        for part in parts {
            self.add_part(Some(id), volume, range, part, Work::Read { expected: Vec::new(), from: 0 });
        }
        Ok(())
    }

    pub fn begin_checksums(
        &mut self,
        id: StoreRequestId,
        volume: VolumeId,
        extent: ExtentIndex,
    ) -> Result<(), StoreError> {
        if u64::from(extent.0) * pollux_base::unit::EXTENT_BYTES >= self.known_volume(volume)?.size.0 {
            return Err(StoreError::OutOfRange);
        }
        let range = BlockRange::new(extent.first_block(), BlockCount(EXTENT_BLOCKS));
        self.requests.insert(id, Request::read(1, SUMS, true));
        self.add_part(Some(id), volume, range, range, Work::Checksums);
        Ok(())
    }

    pub fn begin_write(
        &mut self,
        id: StoreRequestId,
        volume: VolumeId,
        range: BlockRange,
        data: Data,
        checksums: Vec<BlockChecksum>,
    ) -> Result<(), StoreError> {
        self.checked_range(volume, range)?;
        assert_eq!(data.len() as u64, range.count.bytes().0, "a write brings its blocks, no more and no less");
        assert_eq!(checksums.len() as u64, range.count.0, "a write brings a checksum for each block");
        assert!(checksums.iter().all(|sum| !sum.is_zero()), "no written block has the checksum ZERO");
        let parts: Vec<BlockRange> = range.split_by_extent().collect();
        let keys: Vec<Key> = parts.iter().map(|part| (volume, part.start.extent())).collect();
        let slotless = keys.iter().filter(|key| self.marked(key).slot.is_none()).count();
        if slotless > self.table.vacant() {
            return Err(StoreError::Full);
        }
        if parts.is_empty() {
            self.end(id, Ok(StoreReply::Done));
            return Ok(());
        }
        self.requests.insert(id, Request::change(parts.len()));
        for (key, part) in keys.into_iter().zip(parts) {
            self.give_slot(key);
            self.writer_arrives(key);
            let at = (part.start.0 - range.start.0) as usize;
            let (from, to) = (at, at + part.count.0 as usize);
            let work =
                Work::Write { data: data.slice(from * BLOCK..to * BLOCK), checksums: checksums[from..to].to_vec() };
            self.add_part(Some(id), volume, range, part, work);
        }
        Ok(())
    }

    pub fn begin_zero(&mut self, id: StoreRequestId, volume: VolumeId, range: BlockRange) -> Result<(), StoreError> {
        self.checked_range(volume, range)?;
        // What has no slot reads as zeros already.
        let parts: Vec<BlockRange> = match range.count.0 {
            0 => Vec::new(),
            _ => {
                let extents = range.start.extent()..=BlockIndex(range.end().0 - 1).extent();
                let mapped = self.volumes[&volume].extents.range(extents);
                mapped.map(|(extent, _)| within(range, *extent)).collect()
            }
        };
        if parts.is_empty() {
            self.end(id, Ok(StoreReply::Done));
            return Ok(());
        }
        self.requests.insert(id, Request::change(parts.len()));
        for part in parts {
            let key = (volume, part.start.extent());
            self.marked(&key);
            self.writer_arrives(key);
            self.add_part(Some(id), volume, range, part, Work::Zero);
        }
        Ok(())
    }

    /// W7: the caller must have had the extent marked before it changes it.
    fn marked(&self, key: &Key) -> &crate::hot::HotExtent {
        let hot = self.hot.get(key).filter(|hot| hot.marked.is_some());
        hot.unwrap_or_else(|| panic!("{key:?} is not marked hot: Heat must precede what changes it"))
    }

    fn give_slot(&mut self, key: Key) {
        let hot = self.hot.get_mut(&key).expect("it is marked");
        if hot.slot.is_none() {
            let slot = self.table.take().expect("vacant slots were counted");
            hot.slot = Some(slot);
            self.volumes.get_mut(&key.0).expect("the volume is known").extents.insert(key.1, slot);
        }
        if matches!(hot.checksums, Checksums::Absent) {
            hot.checksums = Checksums::Loaded(Box::new([BlockChecksum::ZERO; SUMS]));
        }
    }

    fn writer_arrives(&mut self, key: Key) {
        self.cancel_cooling(key);
        self.hot.get_mut(&key).expect("it is marked").writers += 1;
    }

    pub fn add_part(
        &mut self,
        request: Option<StoreRequestId>,
        volume: VolumeId,
        whole: BlockRange,
        part: BlockRange,
        work: Work,
    ) {
        let id = PartId(self.count());
        let key = (volume, part.start.extent());
        let (first, count) = (part.start.in_extent() as u16, part.count.0 as u16);
        let exclusive = work.is_exclusive();
        let at = (part.start.0 - whole.start.0) as usize;
        self.parts.insert(id, Part { request, key, first, count, at, work });
        self.volumes.get_mut(&volume).expect("the volume is known").busy += 1;
        if self.lanes.enter(key, id, first, count, exclusive) {
            self.ready.push_back(id);
        }
    }

    /// The part goes on as far as it can; it holds its blocks.
    pub fn advance(&mut self, id: PartId) {
        let Some(part) = self.parts.get(&id) else { return };
        let (key, first, count) = (part.key, part.first, part.count);
        let range = usize::from(first)..usize::from(first) + usize::from(count);
        match &part.work {
            Work::Discard { slot } => self.advance_discard(id, key, *slot),
            _ if !self.is_loaded(key) => self.load(key, Some(id)),
            Work::Read { .. } | Work::Checksums => self.advance_read(id, key, range),
            Work::Write { .. } => self.advance_write(id, key, first..first + count),
            Work::Zero => self.advance_zero(id, key, range),
        }
    }

    /// Whether the checksums of the extent are in memory.
    fn is_loaded(&self, key: Key) -> bool {
        if let Some(hot) = self.hot.get(&key) {
            return !matches!(hot.checksums, Checksums::Unloaded);
        }
        match self.volumes.get(&key.0).and_then(|map| map.extents.get(&key.1)) {
            Some(slot) => self.table.get(*slot).state != SlotState::Data || self.leaves.peek(*slot).is_some(),
            None => true,
        }
    }

    /// The checksums of some blocks of an extent; they are in memory.
    fn sums(&mut self, key: Key, range: std::ops::Range<usize>) -> Vec<BlockChecksum> {
        if let Some(hot) = self.hot.get(&key) {
            return match hot.loaded() {
                Some(sums) => sums[range].to_vec(),
                None => vec![BlockChecksum::ZERO; range.len()],
            };
        }
        let slot = self.volumes.get(&key.0).and_then(|map| map.extents.get(&key.1));
        match slot.filter(|slot| self.table.get(**slot).state == SlotState::Data) {
            Some(slot) => self.leaves.get(*slot).expect("the leaf was loaded")[range].to_vec(),
            None => vec![BlockChecksum::ZERO; range.len()],
        }
    }

    fn advance_read(&mut self, id: PartId, key: Key, range: std::ops::Range<usize>) {
        let sums = self.sums(key, range);
        let part = self.parts.get_mut(&id).expect("the part is under way");
        let first = part.first;
        let request = part.request.and_then(|request| self.requests.get_mut(&request));
        let reading = request.and_then(|request| request.reading.as_mut()).expect("reads belong to a request");
        reading.checksums[part.at..part.at + sums.len()].copy_from_slice(&sums);
        let is_data = |sum: &BlockChecksum| !sum.is_zero();
        let held = sums.iter().position(is_data).zip(sums.iter().rposition(is_data));
        let Some((from, to)) = held.filter(|_| matches!(part.work, Work::Read { .. })) else {
            return self.finish_part(id);
        };
        let (from_block, len) = (first + from as u16, (to + 1 - from) * BLOCK);
        part.work = Work::Read { expected: sums[from..=to].to_vec(), from: from_block };
        let slot = self.volumes[&key.0].extents[&key.1];
        let offset = self.geometry().data_offset(slot, from_block);
        self.io.submit(DiskOpKind::Read { offset, len }, DiskThen::Part(id));
    }

    fn advance_write(&mut self, id: PartId, key: Key, range: std::ops::Range<u16>) {
        let first = range.start;
        let recorded = self.journal.recorded();
        let hot = self.hot.get_mut(&key).expect("what is written to stays hot");
        if let Some(wanted) = hot.settle(range, recorded) {
            self.journal.want_recorded(wanted);
            self.settling.push(id);
            return;
        }
        hot.dirty = true;
        let slot = hot.slot.expect("a slot was given when the write arrived");
        let Work::Write { data, .. } = &self.parts[&id].work else { unreachable!("told apart by the caller") };
        let write = DiskOpKind::Write {
            offset: self.geometry().data_offset(slot, first),
            data: vec![data.clone()],
            sync: false,
        };
        self.io.submit(write, DiskThen::Part(id));
    }

    fn advance_zero(&mut self, id: PartId, key: Key, range: std::ops::Range<usize>) {
        let hot = self.hot.get_mut(&key).expect("what is written to stays hot");
        let Checksums::Loaded(sums) = &mut hot.checksums else { return self.finish_part(id) };
        let held = range.clone().find(|block| !sums[*block].is_zero());
        let Some((first, last)) = held.zip(range.rev().find(|block| !sums[*block].is_zero())) else {
            return self.finish_part(id);
        };
        sums[first..=last].fill(BlockChecksum::ZERO);
        hot.fresh.retain(|block, _| !(first..=last).contains(&usize::from(*block)));
        hot.dirty = true;
        let slot = hot.slot.expect("what holds data has a slot");
        let (first, count) = (first as u16, (last + 1 - first) as u16);
        self.journal.queue_then(Record::Zero { slot, first, count }, LogThen::Part(id));
    }

    fn advance_discard(&mut self, id: PartId, key: Key, slot: u32) {
        let mapped = self.volumes.get(&key.0).and_then(|map| map.extents.get(&key.1));
        let still_empty = mapped == Some(&slot) && self.table.get(slot).state == SlotState::Empty;
        if !still_empty || self.hot.contains_key(&key) {
            return self.finish_part(id);
        }
        self.table.discard_begins(slot);
        let offset = self.geometry().data_offset(slot, 0);
        self.io.submit(DiskOpKind::Discard { offset, len: pollux_base::unit::EXTENT_BYTES }, DiskThen::Part(id));
    }

    pub fn on_part_done(&mut self, id: PartId, result: Result<Option<Data>, DiskError>) {
        let Some(part) = self.parts.get_mut(&id) else {
            // It was dropped when the store failed.
            return;
        };
        match &mut part.work {
            Work::Read { expected, from } => {
                let (expected, from) = (std::mem::take(expected), *from);
                self.on_data_read(id, &expected, from, result);
                self.finish_part(id);
            }
            // Giving space back is a kindness to the file system; the slot is as good without it.
            Work::Discard { slot } => {
                let slot = *slot;
                self.table.discard_ended(slot);
                self.finish_part(id);
            }
            Work::Write { .. } => match result {
                Err(error) => self.fail(&error),
                Ok(_) if self.failed.is_some() => {}
                Ok(_) => self.on_data_written(id),
            },
            Work::Checksums | Work::Zero => unreachable!("they have no disk operation of their own"),
        }
    }

    fn on_data_read(
        &mut self,
        id: PartId,
        expected: &[BlockChecksum],
        from: u16,
        result: Result<Option<Data>, DiskError>,
    ) {
        let part = &self.parts[&id];
        let start = BlockIndex(part.key.1.first_block().0 + u64::from(from));
        let at = part.at + usize::from(from - part.first);
        let request = part.request.and_then(|request| self.requests.get_mut(&request));
        let Some(request) = request else { return };
        let reading = request.reading.as_mut().expect("reads belong to a read request");
        let mut corrupt =
            |at: usize| reading.corrupt.push(BlockRange::new(BlockIndex(start.0 + at as u64), BlockCount(1)));
        let data = match result {
            Ok(Some(data)) if data.len() == expected.len() * BLOCK => data,
            Ok(_) => {
                request.error = Some(StoreError::Disk("a read brought too few bytes".into()));
                return;
            }
            // A spot of the medium that cannot be read is healed like one that reads wrong.
            Err(DiskError::Io(_, errno)) if MEDIUM_ERRORS.contains(&errno) => {
                (0..expected.len()).filter(|at| !expected[*at].is_zero()).for_each(corrupt);
                return;
            }
            Err(error) => {
                request.error = Some(StoreError::Disk(error.to_string()));
                return;
            }
        };
        let mut run_start = 0;
        for at_run in 0..=expected.len() {
            let held = expected.get(at_run).is_some_and(|sum| !sum.is_zero());
            if held && BlockChecksum::of(block_of(&data, at_run)) != expected[at_run] {
                corrupt(at_run);
            }
            if !held {
                if at_run > run_start {
                    reading.runs.push((at + run_start, data.slice(run_start * BLOCK..at_run * BLOCK)));
                }
                run_start = at_run + 1;
            }
        }
    }

    fn on_data_written(&mut self, id: PartId) {
        let part = &self.parts[&id];
        let (key, first) = (part.key, part.first);
        let Work::Write { checksums, .. } = &part.work else { unreachable!("told apart by the caller") };
        let hot = self.hot.get_mut(&key).expect("what is written to stays hot");
        let slot = hot.slot.expect("what is written to has a slot");
        let sums = match &mut hot.checksums {
            Checksums::Loaded(sums) => sums,
            Checksums::Absent | Checksums::Unloaded => unreachable!("checksums are loaded before the data is written"),
        };
        let mut records: Vec<Record> = Vec::new();
        for (block, sum) in (first..).zip(checksums) {
            let old = std::mem::replace(&mut sums[usize::from(block)], *sum);
            if !old.is_zero() && old != LOST_CHECKSUM {
                continue;
            }
            hot.fresh.insert(block, Fresh { told: u64::MAX, was_lost: old == LOST_CHECKSUM });
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
        if !hot.slot_told {
            hot.slot_told = true;
            let descriptor = Slot {
                state: SlotState::Data,
                volume: key.0.0,
                extent: key.1.0,
                generation: hot.generation,
                leaf_place: None,
                leaf_sequence: self.table.get(slot).leaf_sequence,
            };
            self.log_slot(slot, descriptor);
        }
        for record in records {
            self.journal.queue(record);
        }
        self.journal.queue_then(last, LogThen::Part(id));
    }

    /// What the part had to tell is in the journal, up to its block `last`.
    pub fn on_part_logged(&mut self, id: PartId, last: u64) {
        let Some(part) = self.parts.get(&id) else { return };
        let range = part.first..part.first + part.count;
        if let Some(hot) = self.hot.get_mut(&part.key) {
            for (_, fresh) in hot.fresh.range_mut(range).filter(|(_, fresh)| fresh.told == u64::MAX) {
                fresh.told = last;
            }
        }
        self.finish_part(id);
    }

    fn finish_part(&mut self, id: PartId) {
        let part = self.parts.remove(&id).expect("a part ends once");
        self.ready.extend(self.lanes.leave(part.key, id));
        if part.work.changes()
            && let Some(hot) = self.hot.get_mut(&part.key)
        {
            hot.writers -= 1;
        }
        if let Some(request) = part.request {
            self.finish_one(request);
        }
        self.no_longer_busy(part.key.0);
    }

    /// Brings the checksums of an extent with data into memory; the part goes on when they are there.
    pub fn load(&mut self, key: Key, part: Option<PartId>) {
        if let Some(load) = self.loads.get_mut(&key) {
            load.parts.extend(part);
            return;
        }
        let slot = self.volumes[&key.0].extents[&key.1];
        let sums = Box::new([BlockChecksum::ZERO; SUMS]);
        self.loads.insert(key, Load { slot, sums, leaf: Vec::new(), reads_left: 0, parts: part.into_iter().collect() });
        self.volumes.get_mut(&key.0).expect("the volume is known").busy += 1;
        match self.table.get(slot).leaf_place {
            None => self.on_leaf_known(key),
            Some(place) => {
                let offset = self.geometry().leaf_offset(slot, place);
                self.io.submit(DiskOpKind::Read { offset, len: LEAF_BYTES }, DiskThen::Leaf(key));
            }
        }
    }

    pub fn on_leaf_read(&mut self, key: Key, data: Option<Data>) {
        let slot = self.loads[&key].slot;
        if let Some(data) = data {
            return self.on_leaf_bytes(key, data.as_slice());
        }
        // One bad block must not hide its neighbours.
        let Some(place) = self.table.get(slot).leaf_place else { unreachable!("the leaf was just read there") };
        let start = self.geometry().leaf_offset(slot, place).0;
        let load = self.loads.get_mut(&key).expect("it was just there");
        load.leaf = vec![0; LEAF_BYTES];
        load.reads_left = LEAF_BLOCKS as u32;
        for part in 0..LEAF_BLOCKS {
            let offset = ByteCount(start + (part * BLOCK) as u64);
            self.io.submit(DiskOpKind::Read { offset, len: BLOCK }, DiskThen::LeafBlock(key, part));
        }
    }

    pub fn on_leaf_block(&mut self, key: Key, part: usize, data: Option<Data>) {
        let load = self.loads.get_mut(&key).expect("a load is under way");
        if let Some(data) = data {
            load.leaf[part * BLOCK..(part + 1) * BLOCK].copy_from_slice(data.as_slice());
        }
        load.reads_left -= 1;
        if load.reads_left == 0 {
            let leaf = std::mem::take(&mut load.leaf);
            self.on_leaf_bytes(key, &leaf);
        }
    }

    fn on_leaf_bytes(&mut self, key: Key, bytes: &[u8]) {
        let owner = self.leaf_owner(self.loads[&key].slot);
        let sums = leaf::decode(bytes, owner, self.pool_id());
        self.loads.get_mut(&key).expect("it was just there").sums = sums;
        self.on_leaf_known(key);
    }

    /// As its descriptor names it.
    fn leaf_owner(&self, slot: u32) -> LeafOwner {
        let descriptor = self.table.get(slot);
        LeafOwner { volume: descriptor.volume, extent: descriptor.extent, slot, sequence: descriptor.leaf_sequence }
    }

    /// The leaf is there. What was hot at the last crash may have been overwritten since: its data is read again.
    fn on_leaf_known(&mut self, key: Key) {
        let load = self.loads.get_mut(&key).expect("a load is under way");
        let recovered = self.hot.get(&key).and_then(|hot| hot.recovered.as_ref());
        let Some(recovered) = recovered else { return self.finish_load(key) };
        let mut rebuild = vec![false; SUMS];
        for (block, base) in recovered.base.iter().enumerate() {
            let sum = &mut load.sums[block];
            match base {
                Base::Leaf => rebuild[block] = !sum.is_zero() && *sum != LOST_CHECKSUM,
                Base::Zero => *sum = BlockChecksum::ZERO,
                Base::Lost => *sum = LOST_CHECKSUM,
                Base::Valid => {
                    // Any value but zero, until the data was read.
                    *sum = BlockChecksum(1);
                    rebuild[block] = true;
                }
            }
        }
        let slot = load.slot;
        let mut reads = Vec::new();
        for start in (0..SUMS).step_by(REBUILD_BLOCKS) {
            let piece = &rebuild[start..start + REBUILD_BLOCKS];
            if let Some((from, to)) = piece.iter().position(|held| *held).zip(piece.iter().rposition(|held| *held)) {
                reads.push(((start + from) as u16, (to + 1 - from) as u16));
            }
        }
        load.reads_left = reads.len() as u32;
        if reads.is_empty() {
            return self.finish_load(key);
        }
        for (first, count) in reads {
            let read =
                DiskOpKind::Read { offset: self.geometry().data_offset(slot, first), len: usize::from(count) * BLOCK };
            self.io.submit(read, DiskThen::Rebuild(key, first, count));
        }
    }

    pub fn on_rebuilt(&mut self, key: Key, first: u16, count: u16, data: Option<Data>) {
        let load = self.loads.get_mut(&key).expect("a load is under way");
        if data.is_none() && count > 1 {
            load.reads_left += u32::from(count) - 1;
            let slot = load.slot;
            for block in first..first + count {
                let read = DiskOpKind::Read { offset: self.geometry().data_offset(slot, block), len: BLOCK };
                self.io.submit(read, DiskThen::Rebuild(key, block, 1));
            }
            return;
        }
        for at in 0..usize::from(count) {
            let sum = &mut load.sums[usize::from(first) + at];
            if !sum.is_zero() && *sum != LOST_CHECKSUM {
                *sum = data.as_ref().map_or(LOST_CHECKSUM, |data| BlockChecksum::of(block_of(data, at)));
            }
        }
        load.reads_left -= 1;
        if load.reads_left == 0 {
            self.finish_load(key);
        }
    }

    fn finish_load(&mut self, key: Key) {
        let load = self.loads.remove(&key).expect("a load is under way");
        self.ready.extend(load.parts);
        match self.hot.get_mut(&key) {
            Some(hot) if matches!(hot.checksums, Checksums::Unloaded) => {
                hot.checksums = Checksums::Loaded(load.sums);
                hot.recovered = None;
            }
            Some(_) => {}
            None => self.leaves.insert(load.slot, Arc::from(load.sums)),
        }
        self.on_loaded(key);
        self.no_longer_busy(key.0);
    }

    /// Runs of the range that may hold data and that do not.
    pub fn status(&self, volume: VolumeId, range: BlockRange) -> Vec<(BlockRange, bool)> {
        let mut runs: Vec<(BlockRange, bool)> = Vec::new();
        let mut push = |run: BlockRange, held: bool| match runs.last_mut() {
            Some((last, last_held)) if *last_held == held => last.count.0 += run.count.0,
            _ => runs.push((run, held)),
        };
        for part in range.split_by_extent() {
            let key = (volume, part.start.extent());
            let slot = self.volumes.get(&volume).and_then(|map| map.extents.get(&key.1)).copied();
            let hot = self.hot.get(&key);
            let sums = match hot {
                Some(hot) => hot.loaded(),
                None => slot.and_then(|slot| self.leaves.peek(slot)),
            };
            match sums {
                Some(sums) => {
                    for at in 0..part.count.0 {
                        let start = BlockIndex(part.start.0 + at);
                        push(BlockRange::new(start, BlockCount(1)), !sums[start.in_extent()].is_zero());
                    }
                }
                None => push(part, slot.is_some_and(|slot| self.table.get(slot).state == SlotState::Data)),
            }
        }
        runs
    }
}

/// EIO, ENODATA, EILSEQ, EREMOTEIO: the disk works, this spot does not.
const MEDIUM_ERRORS: [i32; 4] = [5, 61, 84, 121];

/// The blocks of `range` that lie in `extent`.
fn within(range: BlockRange, extent: ExtentIndex) -> BlockRange {
    let start = range.start.max(extent.first_block());
    let end = range.end().0.min(extent.first_block().0 + EXTENT_BLOCKS);
    BlockRange::new(start, BlockCount(end - start.0))
}
