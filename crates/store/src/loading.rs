//! Bringing the checksums of an extent into memory: from its leaf, and for an extent that was hot at the last crash from
//! its data.

use crate::hot::{Base, Checksums};
use crate::lanes::Key;
use crate::layout::{BLOCK, UNIT_BLOCKS};
use crate::leaf::{self, HOLE_CHECKSUM, LOST_CHECKSUM, LeafOwner, SUMS, Sums, is_data};
use crate::pool::{DiskThen, Pool, block_of};
use crate::transfer::{PartId, pieces};
use pollux_base::{BlockChecksum, ByteCount, Data, DiskOpKind};
use std::sync::Arc;

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
    /// Whether the checksums of the extent are in memory.
    pub fn is_loaded(&self, key: Key) -> bool {
        if let Some(hot) = self.hot.get(&key) {
            return !matches!(hot.checksums, Checksums::Unloaded);
        }
        match self.view(key) {
            Some((slot, descriptor)) => !descriptor.state.holds_data() || self.leaves.peek(slot).is_some(),
            None => true,
        }
    }

    /// Brings the checksums of an extent with data into memory; the part goes on when they are there.
    pub fn load(&mut self, key: Key, part: Option<PartId>) {
        if let Some(load) = self.loads.get_mut(&key) {
            load.parts.extend(part);
            return;
        }
        let (slot, descriptor) = self.view(key).expect("what has checksums has a slot");
        let leaf = descriptor.leaf;
        let sums = leaf::leafless(descriptor.lost);
        self.loads.insert(key, Load { slot, sums, leaf: Vec::new(), reads_left: 0, parts: part.into_iter().collect() });
        self.layers.get_mut(&key.0).expect("the layer is known").busy += 1;
        match leaf {
            None => self.on_leaf_known(key),
            Some(place) => {
                let (offset, len) = (self.geometry().leaf_offset(place), usize::from(place.blocks) * BLOCK);
                self.io.submit(DiskOpKind::Read { offset, len }, DiskThen::Leaf(key));
            }
        }
    }

    pub fn on_leaf_read(&mut self, key: Key, data: Option<Data>) {
        if let Some(data) = data {
            return self.on_leaf_bytes(key, data.as_slice());
        }
        // One bad block must not hide its neighbours.
        let place = self.view(key).and_then(|(_, slot)| slot.leaf).expect("the leaf was just read there");
        let start = self.geometry().leaf_offset(place).0;
        let blocks = usize::from(place.blocks);
        let load = self.loads.get_mut(&key).expect("it was just there");
        load.leaf = vec![0; blocks * BLOCK];
        load.reads_left = blocks as u32;
        for part in 0..blocks {
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
        let (slot, descriptor) = self.view(key).expect("a load is under way");
        let owner = LeafOwner { slot, sequence: descriptor.leaf_sequence };
        let sums = leaf::decode(bytes, owner, self.pool_id(), &descriptor.units);
        self.loads.get_mut(&key).expect("it was just there").sums = sums;
        self.on_leaf_known(key);
    }

    /// The leaf is there. What was hot at the last crash may have been overwritten since: its data is read again.
    fn on_leaf_known(&mut self, key: Key) {
        let geometry = self.superblock.geometry;
        let units = self.view(key).expect("a load is under way").1.units.clone();
        let load = self.loads.get_mut(&key).expect("a load is under way");
        let recovered = self.hot.get(&key).and_then(|hot| hot.recovered.as_ref());
        let mut rebuild = vec![false; SUMS];
        for (block, sum) in load.sums.iter_mut().enumerate() {
            match recovered.map(|recovered| recovered.base[block]) {
                None => {}
                Some(Base::Leaf) => rebuild[block] = is_data(*sum) && *sum != LOST_CHECKSUM,
                Some(Base::Zero) => *sum = BlockChecksum::ZERO,
                Some(Base::Hole) => *sum = HOLE_CHECKSUM,
                Some(Base::Lost) => *sum = LOST_CHECKSUM,
                Some(Base::Valid) => {
                    // Any value but zero, until the data was read.
                    *sum = BlockChecksum(1);
                    rebuild[block] = true;
                }
            }
            // Data without a place is lost data; a pool that is whole has none.
            if is_data(*sum) && units.get(block / UNIT_BLOCKS).is_none() {
                (*sum, rebuild[block]) = (LOST_CHECKSUM, false);
            }
        }
        let mut reads = Vec::new();
        for piece in pieces(&units, 0..SUMS) {
            for start in piece.blocks.clone().step_by(REBUILD_BLOCKS) {
                let end = piece.blocks.end.min(start + REBUILD_BLOCKS);
                let wanted = &rebuild[start..end];
                let Some(from) = wanted.iter().position(|wanted| *wanted) else { continue };
                let to = wanted.iter().rposition(|wanted| *wanted).expect("there is one");
                reads.push(((start + from) as u16, (to + 1 - from) as u16));
            }
        }
        load.reads_left = reads.len() as u32;
        if reads.is_empty() {
            return self.finish_load(key);
        }
        for (first, count) in reads {
            let (unit, block) = place_of(&units, usize::from(first));
            let read = DiskOpKind::Read { offset: geometry.offset(unit, block), len: usize::from(count) * BLOCK };
            self.io.submit(read, DiskThen::Rebuild(key, first, count));
        }
    }

    pub fn on_rebuilt(&mut self, key: Key, first: u16, count: u16, data: Option<Data>) {
        let geometry = self.superblock.geometry;
        if data.is_none() && count > 1 {
            let units = self.view(key).expect("a load is under way").1.units.clone();
            self.loads.get_mut(&key).expect("a load is under way").reads_left += u32::from(count) - 1;
            for block in first..first + count {
                let (unit, at) = place_of(&units, usize::from(block));
                let read = DiskOpKind::Read { offset: geometry.offset(unit, at), len: BLOCK };
                self.io.submit(read, DiskThen::Rebuild(key, block, 1));
            }
            return;
        }
        let load = self.loads.get_mut(&key).expect("a load is under way");
        for at in 0..usize::from(count) {
            let sum = &mut load.sums[usize::from(first) + at];
            if is_data(*sum) && *sum != LOST_CHECKSUM {
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
}

/// Unit and block in it of a block that has a place.
fn place_of(units: &crate::units::Units, block: usize) -> (u32, usize) {
    let unit = units.get(block / UNIT_BLOCKS).expect("only blocks with a place are read");
    (unit, block % UNIT_BLOCKS)
}
