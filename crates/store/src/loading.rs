//! Bringing the checksums of an extent into memory: from its leaf. Of what was hot at the last crash the leaf does not tell, so
//! its blocks are *unread* at first: the first read of each gives its checksum, and what wants to know all of them reads the rest.
//! So a request to such an extent waits for a leaf and not for 4 MiB.

use crate::hot::Checksums;
use crate::lanes::Key;
use crate::layout::{BLOCK, UNIT_BLOCKS};
use crate::leaf::{self, LOST_CHECKSUM, LeafOwner, SUMS, Sums, UNREAD_CHECKSUM, is_data};
use crate::pool::{DiskThen, Pool, block_of};
use crate::transfer::{PartId, pieces};
use pollux_base::{BlockChecksum, ByteCount, Data, DiskOpKind};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Checksums of an extent on their way into memory.
#[derive(Default)]
pub struct Load {
    /// The leaf, when it had to be read block by block.
    leaf: Vec<u8>,
    reads_left: u32,
    /// A cooling waits for it.
    is_for_cooling: bool,
    parts: Vec<PartId>,
}

/// Blocks of one read of what is unread.
const REREAD_BLOCKS: usize = 256;

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

    /// Whether they are, and of every block.
    pub fn is_known(&self, key: Key) -> bool {
        let sums = self.hot.get(&key).and_then(|hot| hot.loaded());
        self.is_loaded(key) && sums.is_none_or(|sums| !sums.contains(&UNREAD_CHECKSUM))
    }

    /// Brings the checksums of an extent with data into memory, or if they are there reads what is unread; then the part goes
    /// on, or without one the extent's cooling.
    pub fn load(&mut self, key: Key, part: Option<PartId>) {
        let is_under_way = self.loads.contains_key(&key);
        let load = self.loads.entry(key).or_default();
        if part.is_none() && !load.is_for_cooling {
            load.is_for_cooling = true;
            self.cooling_loads += 1;
        }
        load.parts.extend(part);
        if is_under_way {
            return;
        }
        self.layers.get_mut(&key.0).expect("the layer is known").busy += 1;
        if self.is_loaded(key) {
            return self.reread(key);
        }
        let (_, descriptor) = self.view(key).expect("what has checksums has a slot");
        match descriptor.leaf {
            None => self.on_sums(key, leaf::leafless(descriptor.lost)),
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
        self.on_sums(key, sums);
    }

    /// What the leaf says is known.
    fn on_sums(&mut self, key: Key, mut sums: Box<Sums>) {
        let recovered = self.hot.get_mut(&key).and_then(|hot| hot.recovered.take());
        if let Some(recovered) = recovered {
            recovered.lay_over(&mut sums);
        }
        let (slot, descriptor) = self.view(key).expect("a load is under way");
        // Data without a place is lost data; a pool that is whole has none.
        for (block, sum) in sums.iter_mut().enumerate() {
            if is_data(*sum) && descriptor.units.get(block / UNIT_BLOCKS).is_none() {
                *sum = LOST_CHECKSUM;
            }
        }
        match self.hot.get_mut(&key) {
            Some(hot) if matches!(hot.checksums, Checksums::Unloaded) => hot.checksums = Checksums::Loaded(sums),
            Some(_) => {}
            None => self.leaves.insert(slot, Arc::from(sums)),
        }
        self.finish_load(key);
    }

    fn reread(&mut self, key: Key) {
        let geometry = self.superblock.geometry;
        let hot = self.hot.get(&key).expect("only what is hot has unread blocks");
        let sums = hot.loaded().expect("it is loaded");
        let is_unread = |block: &usize| sums[*block] == UNREAD_CHECKSUM;
        let load = self.loads.get_mut(&key).expect("it was just put there");
        for piece in pieces(&hot.descriptor.units, 0..SUMS) {
            for start in piece.blocks.clone().step_by(REREAD_BLOCKS) {
                let mut blocks = start..piece.blocks.end.min(start + REREAD_BLOCKS);
                let Some((from, to)) = blocks.clone().find(is_unread).zip(blocks.rfind(is_unread)) else { continue };
                let (unit, block) = place_of(&hot.descriptor.units, from);
                let (offset, count) = (geometry.offset(unit, block), to + 1 - from);
                let then = DiskThen::Reread(key, from as u16, count as u16);
                self.io.submit(DiskOpKind::Read { offset, len: count * BLOCK }, then);
                load.reads_left += 1;
            }
        }
        if load.reads_left == 0 {
            self.finish_load(key);
        }
    }

    pub fn on_reread(&mut self, key: Key, first: u16, count: u16, data: Option<Data>) {
        let geometry = self.superblock.geometry;
        // Others may have written meanwhile, or read; what they know counts.
        let mut unread = BTreeMap::new();
        if let Some(hot) = self.hot.get_mut(&key)
            && let Checksums::Loaded(sums) = &mut hot.checksums
        {
            let blocks = usize::from(first)..usize::from(first) + usize::from(count);
            for (at, block) in blocks.enumerate() {
                match &data {
                    _ if sums[block] != UNREAD_CHECKSUM => {}
                    Some(data) => sums[block] = BlockChecksum::of(block_of(data, at)),
                    // One bad block must not hide its neighbours.
                    None if count > 1 => {
                        unread.insert(block, place_of(&hot.descriptor.units, block));
                    }
                    None => sums[block] = LOST_CHECKSUM,
                }
            }
        }
        let load = self.loads.get_mut(&key).expect("a load is under way");
        load.reads_left += unread.len() as u32;
        load.reads_left -= 1;
        for (block, (unit, at)) in unread {
            let read = DiskOpKind::Read { offset: geometry.offset(unit, at), len: BLOCK };
            self.io.submit(read, DiskThen::Reread(key, block as u16, 1));
        }
        if load.reads_left == 0 {
            self.finish_load(key);
        }
    }

    fn finish_load(&mut self, key: Key) {
        let load = self.loads.remove(&key).expect("a load is under way");
        self.cooling_loads -= u32::from(load.is_for_cooling);
        self.ready.extend(load.parts);
        self.on_loaded(key);
        self.no_longer_busy(key.0);
    }
}

/// Unit and block in it of a block that has a place.
fn place_of(units: &crate::units::Units, block: usize) -> (u32, usize) {
    let unit = units.get(block / UNIT_BLOCKS).expect("only blocks with a place are read");
    (unit, block % UNIT_BLOCKS)
}
