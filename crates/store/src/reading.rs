//! Reads: what is asked for is put together from pieces that lie here and there, each block checked.

use crate::hot::Checksums;
use crate::lanes::Key;
use crate::layout::{BLOCK, UNIT_BLOCKS};
use crate::leaf::{HOLE_CHECKSUM, LOST_CHECKSUM, SUMS, Sums, UNREAD_CHECKSUM, is_data};
use crate::pool::{DiskThen, Pool, block_of};
use crate::slots::{LayerId, Slot};
use crate::transfer::{PartId, Request, Work, pieces};
use crate::units::Units;
use crate::{StoreError, StoreReply, StoreRequestId};
use pollux_base::data::Buffer;
use pollux_base::unit::{BlockRange, EXTENT_BLOCKS, EXTENT_BYTES};
use pollux_base::{BlockChecksum, BlockCount, BlockIndex, Data, DiskError, DiskOpKind, ExtentIndex, VolumeId};
use std::ops::Range;

/// What a read has gathered.
pub struct Reading {
    whole_extent: bool,
    checksums: Vec<BlockChecksum>,
    /// Runs of blocks that hold data, by place in the request.
    runs: Vec<(usize, Data)>,
    corrupt: Vec<BlockRange>,
}

impl Reading {
    fn new(blocks: usize, whole_extent: bool) -> Reading {
        let checksums = vec![BlockChecksum::ZERO; blocks];
        Reading { whole_extent, checksums, runs: Vec::new(), corrupt: Vec::new() }
    }

    pub fn result(mut self) -> Result<StoreReply, StoreError> {
        if self.whole_extent {
            return Ok(StoreReply::Checksums(self.checksums));
        }
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

impl Pool {
    pub fn begin_read(&mut self, id: StoreRequestId, volume: VolumeId, range: BlockRange) -> Result<(), StoreError> {
        let layer = self.checked_range(volume, range)?;
        let parts = range.split_by_extent().count();
        if parts == 0 {
            self.end(id, Ok(StoreReply::Read { data: Data::zeroed(0), checksums: Vec::new() }));
            return Ok(());
        }
        let reading = Reading::new(range.count.0 as usize, false);
        let request = self.requests.insert(Request::read(id, parts, reading));
        for part in range.split_by_extent() {
            self.add_part(request, layer, range, part, Work::Read { expected: Vec::new() });
        }
        Ok(())
    }

    pub fn begin_checksums(
        &mut self,
        id: StoreRequestId,
        volume: VolumeId,
        extent: ExtentIndex,
    ) -> Result<(), StoreError> {
        let known = self.known_volume(volume)?;
        if u64::from(extent.0) * EXTENT_BYTES >= known.size.0 {
            return Err(StoreError::OutOfRange);
        }
        let range = BlockRange::new(extent.first_block(), BlockCount(EXTENT_BLOCKS));
        let request = self.requests.insert(Request::read(id, 1, Reading::new(SUMS, true)));
        self.add_part(request, known.layer, range, range, Work::Checksums);
        Ok(())
    }

    /// Lays the checksums of a layer beneath those found above it. `source`: for each block the number of its layer from the
    /// top; none if there is but one layer.
    fn lay_beneath(
        &mut self,
        key: Key,
        range: Range<usize>,
        sums: &mut [BlockChecksum],
        source: Option<(u16, &mut Vec<u16>)>,
    ) {
        let is_hot = self.hot.contains_key(&key);
        let slot = self.view(key).filter(|(_, slot)| slot.state.holds_data()).map(|(number, _)| number);
        let leaf = slot.filter(|_| !is_hot).map(|slot| self.leaves.get(slot).expect("the leaf was loaded"));
        let found = match &leaf {
            Some(leaf) => Some(&**leaf),
            None => self.hot.get(&key).and_then(|hot| hot.loaded()),
        };
        let Some(found) = found else { return };
        match source {
            None => sums.copy_from_slice(&found[range]),
            Some((number, source)) => {
                for ((sum, source), found) in sums.iter_mut().zip(source).zip(&found[range]) {
                    if sum.is_zero() && !found.is_zero() {
                        (*sum, *source) = (*found, number);
                    }
                }
            }
        }
    }

    /// Checksums of a part's blocks as its volume shows them, holes as zeros, and for each the number of the layer that
    /// holds it. All of them are in memory.
    fn flattened(&mut self, id: PartId) -> (Vec<BlockChecksum>, Vec<u16>) {
        let part = self.parts.get(id).expect("the part is under way");
        let (key, range, below) = (part.key, part.blocks(), part.below.clone());
        let mut sums = vec![BlockChecksum::ZERO; range.len()];
        let mut source = Vec::new();
        self.lay_beneath(key, range.clone(), &mut sums, None);
        if !below.is_empty() {
            source = vec![0; range.len()];
            for (number, layer) in (1..).zip(below) {
                self.lay_beneath((layer, key.1), range.clone(), &mut sums, Some((number, &mut source)));
            }
        }
        sums.iter_mut().filter(|sum| **sum == HOLE_CHECKSUM).for_each(|sum| *sum = BlockChecksum::ZERO);
        (sums, source)
    }

    pub fn advance_read(&mut self, id: PartId) {
        let (sums, source) = self.flattened(id);
        let geometry = self.superblock.geometry;
        let part = self.parts.get(id).expect("the part is under way");
        let (key, range, request) = (part.key, part.blocks(), part.request);
        let reading = self.requests.get_mut(request).and_then(|request| request.reading.as_mut());
        let reading = reading.expect("reads belong to a read request");
        reading.checksums[part.at..part.at + sums.len()].copy_from_slice(&sums);
        if matches!(part.work, Work::Checksums) || !sums.iter().any(|sum| !sum.is_zero()) {
            return self.finish_part(id);
        }
        let start = range.start;
        let (mut reads, mut placeless) = (Vec::new(), Vec::new());
        for (number, layer) in (0..).zip([key.0].into_iter().chain(part.below.iter().copied())) {
            let is_here = |block: usize| source.get(block - start).is_none_or(|source| *source == number);
            let is_held = |block: &usize| !sums[*block - start].is_zero() && is_here(*block);
            if !range.clone().any(|block| is_held(&block)) {
                continue;
            }
            // What has lost its checksum may have no place either.
            let none = Units::default();
            let units = self.view((layer, key.1)).map_or(&none, |(_, slot)| &slot.units);
            placeless.extend(range.clone().filter(|block| is_held(block) && units.get(block / UNIT_BLOCKS).is_none()));
            for piece in pieces(units, range.clone()) {
                // Over blocks that hold nothing one reads on, never over those of another layer.
                let stops = |block: &usize| !sums[*block - start].is_zero() && !is_here(*block);
                let mut at = piece.blocks.start;
                while let Some(from) = (at..piece.blocks.end).find(is_held) {
                    at = (from..piece.blocks.end).find(stops).unwrap_or(piece.blocks.end);
                    let to = (from..at).rfind(is_held).expect("the first one is held");
                    let block = piece.block + from - piece.blocks.start;
                    let offset = geometry.offset(piece.unit + (block / UNIT_BLOCKS) as u32, block % UNIT_BLOCKS);
                    reads.push((from, to + 1 - from, offset));
                }
            }
        }
        if let Some(reading) = self.requests.get_mut(request).and_then(|request| request.reading.as_mut()) {
            let place = |block: usize| BlockIndex(key.1.first_block().0 + block as u64);
            reading.corrupt.extend(placeless.into_iter().map(|block| BlockRange::new(place(block), BlockCount(1))));
        }
        if reads.is_empty() {
            return self.finish_part(id);
        }
        let part = self.parts.get_mut(id).expect("it was just there");
        part.ops_left = reads.len() as u32;
        part.work = Work::Read { expected: sums };
        for (from, count, offset) in reads {
            let read = DiskOpKind::Read { offset, len: count * BLOCK };
            self.io.submit(read, DiskThen::Read(id, from as u16, count as u16));
        }
    }

    pub fn on_piece_read(&mut self, id: PartId, first: u16, count: u16, result: Result<Option<Data>, DiskError>) {
        self.check_piece(id, first, count, result);
        let part = self.parts.get_mut(id).expect("a read goes on when the store has failed");
        part.ops_left -= 1;
        if part.ops_left == 0 {
            self.finish_part(id);
        }
    }

    fn check_piece(&mut self, id: PartId, first: u16, count: u16, result: Result<Option<Data>, DiskError>) {
        let part = self.parts.get(id).expect("a read goes on when the store has failed");
        let start = BlockIndex(part.key.1.first_block().0 + u64::from(first));
        let within = usize::from(first - part.first);
        let at = part.at + within;
        let Work::Read { expected } = &part.work else { unreachable!("only reads have pieces to read") };
        let expected = &expected[within..within + usize::from(count)];
        let Some(request) = self.requests.get_mut(part.request) else { return };
        let reading = request.reading.as_mut().expect("reads belong to a read request");
        let block = |at: usize| BlockRange::new(BlockIndex(start.0 + at as u64), BlockCount(1));
        let data = match result {
            Ok(Some(data)) if data.len() == expected.len() * BLOCK => data,
            Ok(_) => {
                request.error = Some(StoreError::Disk("a read brought too few bytes".into()));
                return;
            }
            // A spot of the medium that cannot be read is healed like one that reads wrong.
            Err(error) if is_bad_spot(&error) => {
                reading.corrupt.extend((0..expected.len()).filter(|at| !expected[*at].is_zero()).map(block));
                return;
            }
            Err(error) => {
                request.error = Some(StoreError::Disk(error.to_string()));
                return;
            }
        };
        let mut run_start = 0;
        let mut reread: Vec<(usize, BlockChecksum)> = Vec::new();
        for at_run in 0..=expected.len() {
            let held = expected.get(at_run).is_some_and(|sum| !sum.is_zero());
            let found = held.then(|| BlockChecksum::of(block_of(&data, at_run)));
            match found.filter(|found| *found != expected[at_run]) {
                None => {}
                Some(found) if expected[at_run] == UNREAD_CHECKSUM => {
                    reading.checksums[at + at_run] = found;
                    reread.push((usize::from(first) + at_run, found));
                }
                Some(_) => {
                    // What was lost with a disk is not this one's fault.
                    self.checksum_errors += u64::from(expected[at_run] != LOST_CHECKSUM);
                    reading.corrupt.push(block(at_run));
                }
            }
            if !held {
                if at_run > run_start {
                    reading.runs.push((at + run_start, data.slice(run_start * BLOCK..at_run * BLOCK)));
                }
                run_start = at_run + 1;
            }
        }
        // Of a layer beneath, which is about to cool, it is not remembered.
        if !reread.is_empty()
            && let Some(Checksums::Loaded(sums)) = self.hot.get_mut(&part.key).map(|hot| &mut hot.checksums)
        {
            for (block, found) in reread {
                if sums[block] == UNREAD_CHECKSUM {
                    sums[block] = found;
                }
            }
        }
    }

    /// Runs of the range that may hold data and that do not.
    pub fn status(&self, volume: VolumeId, range: BlockRange) -> Vec<(BlockRange, bool)> {
        let Some(known) = self.catalog.volumes.get(&volume) else { return Vec::new() };
        let mut runs: Vec<(BlockRange, bool)> = Vec::new();
        let mut push = |run: BlockRange, held: bool| match runs.last_mut() {
            Some((last, last_held)) if *last_held == held => last.count.0 += run.count.0,
            _ => runs.push((run, held)),
        };
        for part in range.split_by_extent() {
            let extent = part.start.extent();
            let of = |layer: LayerId| {
                let (number, slot) = self.view((layer, extent))?;
                let sums = match self.hot.get(&(layer, extent)) {
                    Some(hot) => hot.loaded(),
                    None => self.leaves.peek(number),
                };
                Some((slot, sums))
            };
            let layers: Vec<(&Slot, Option<&Sums>)> = self.catalog.chain(known.layer).filter_map(of).collect();
            let held = |block: BlockIndex| {
                let found = layers.iter().find_map(|(slot, sums)| match sums {
                    Some(sums) => Some(sums[block.in_extent()]).filter(|sum| !sum.is_zero()).map(is_data),
                    None => slot.units.get(block.in_extent() / UNIT_BLOCKS).map(|_| true),
                });
                found.unwrap_or(false)
            };
            match layers.is_empty() {
                true => push(part, false),
                false => part.split_by(held).into_iter().for_each(|(run, held)| push(run, held)),
            }
        }
        runs
    }
}

/// EIO, ENODATA, EILSEQ, EREMOTEIO: the disk works, this spot does not.
const MEDIUM_ERRORS: [i32; 4] = [5, 61, 84, 121];

/// Any other error of a read says that the disk is gone.
pub fn is_bad_spot(error: &DiskError) -> bool {
    matches!(error, DiskError::Io(_, errno) if MEDIUM_ERRORS.contains(errno))
}
