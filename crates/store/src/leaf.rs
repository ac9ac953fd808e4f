//! Leaves: the 1024 checksums of one extent on disk, and a bounded cache of them for reads of cold extents.
//!
//! A leaf is the truth about which blocks of a cold extent hold data: `BlockChecksum::ZERO` means none. It is never
//! overwritten where it lies: each slot has two places, used in turn, and a leaf counts only once the journal names it.
//! A damaged block of a leaf makes its checksums `LOST_CHECKSUM`: those blocks read as corrupt, never as zeros.

use crate::layout::{BLOCK, BlockKind, HEADER_BYTES, Header, LEAF_BLOCKS, LEAF_BYTES, seal, unseal};
use pollux_base::data::Buffer;
use pollux_base::unit::EXTENT_BLOCKS;
use pollux_base::{BlockChecksum, Data, PoolId};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Stands for a checksum that was itself lost: the block may hold data, but nothing can vouch for it. It matches no
/// content (but for one in 2^64), so that the block is corrupt until it is written again.
pub const LOST_CHECKSUM: BlockChecksum = BlockChecksum(u64::MAX);

pub const SUMS: usize = EXTENT_BLOCKS as usize;
const SUMS_PER_BLOCK: usize = SUMS.div_ceil(LEAF_BLOCKS);

/// Checksums of the blocks of one extent.
pub type Sums = [BlockChecksum; SUMS];

/// Whose leaf it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeafOwner {
    pub volume: u64,
    pub extent: u32,
    pub slot: u32,
    pub sequence: u64,
}

fn part_of(sums: &Sums, part: usize) -> &[BlockChecksum] {
    &sums[part * SUMS_PER_BLOCK..SUMS.min((part + 1) * SUMS_PER_BLOCK)]
}

fn header_of(owner: LeafOwner, part: usize) -> Header {
    let len = part_of(&[BlockChecksum::ZERO; SUMS], part).len() * 8;
    let place = u64::from(owner.extent) << 32 | u64::from(owner.slot);
    Header { kind: BlockKind::Leaf, part: part as u32, sequence: owner.sequence, one: owner.volume, two: place, len }
}

pub fn encode(sums: &Sums, owner: LeafOwner, pool: PoolId) -> Data {
    let mut buffer = Buffer::zeroed(LEAF_BYTES);
    for (part, block) in buffer.as_mut_slice().chunks_exact_mut(BLOCK).enumerate() {
        let payload: Vec<u8> = part_of(sums, part).iter().flat_map(|sum| sum.0.to_le_bytes()).collect();
        seal(block, pool, header_of(owner, part), &payload);
    }
    buffer.freeze()
}

/// The checksums of a leaf as read. What is damaged is lost, the rest is as it was.
pub fn decode(bytes: &[u8], owner: LeafOwner, pool: PoolId) -> Box<Sums> {
    let mut sums = Box::new([LOST_CHECKSUM; SUMS]);
    for (part, block) in bytes.chunks_exact(BLOCK).enumerate().take(LEAF_BLOCKS) {
        let expected = header_of(owner, part);
        if unseal(block, BlockKind::Leaf, Some(pool)).is_ok_and(|(header, _)| header == expected) {
            let payload = block[HEADER_BYTES..HEADER_BYTES + expected.len].chunks_exact(8);
            for (at, bytes) in payload.enumerate() {
                let value = u64::from_le_bytes(bytes.try_into().expect("chunks of 8 bytes"));
                sums[part * SUMS_PER_BLOCK + at] = BlockChecksum(value);
            }
        }
    }
    sums
}

/// Leaves kept for reads of cold extents: 8 KiB each, so 32 MiB at most, enough for 16 GiB read at random. A miss
/// costs one read of 12 KiB.
const CACHED_MAX: usize = 4096;

/// Least recently used goes first.
#[derive(Default)]
pub struct LeafCache {
    leaves: BTreeMap<u32, (Arc<Sums>, u64)>,
    order: BTreeMap<u64, u32>,
    clock: u64,
}

impl LeafCache {
    pub fn get(&mut self, slot: u32) -> Option<Arc<Sums>> {
        let (sums, used) = self.leaves.get_mut(&slot)?;
        self.clock += 1;
        self.order.remove(used);
        self.order.insert(self.clock, slot);
        *used = self.clock;
        Some(sums.clone())
    }

    /// Without counting it as a use.
    pub fn peek(&self, slot: u32) -> Option<&Sums> {
        self.leaves.get(&slot).map(|(sums, _)| &**sums)
    }

    pub fn insert(&mut self, slot: u32, sums: Arc<Sums>) {
        self.remove(slot);
        self.clock += 1;
        self.leaves.insert(slot, (sums, self.clock));
        self.order.insert(self.clock, slot);
        if self.leaves.len() > CACHED_MAX
            && let Some((_, oldest)) = self.order.pop_first()
        {
            self.leaves.remove(&oldest);
        }
    }

    pub fn remove(&mut self, slot: u32) {
        if let Some((_, used)) = self.leaves.remove(&slot) {
            self.order.remove(&used);
        }
    }

    pub fn check(&self) {
        assert!(self.leaves.len() <= CACHED_MAX && self.leaves.len() == self.order.len(), "the cache is bounded");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: LeafOwner = LeafOwner { volume: 1, extent: 2, slot: 3, sequence: 4 };

    #[test]
    fn a_damaged_part_of_a_leaf_loses_its_checksums_and_no_others() {
        let mut sums = Box::new([BlockChecksum::ZERO; SUMS]);
        for (at, sum) in sums.iter_mut().enumerate() {
            *sum = BlockChecksum(at as u64);
        }
        let mut bytes = encode(&sums, OWNER, PoolId(9)).as_slice().to_vec();
        assert_eq!(decode(&bytes, OWNER, PoolId(9)), sums);
        bytes[BLOCK + 100] ^= 1;
        let damaged = decode(&bytes, OWNER, PoolId(9));
        for (at, sum) in damaged.iter().enumerate() {
            let lost = (SUMS_PER_BLOCK..2 * SUMS_PER_BLOCK).contains(&at);
            assert_eq!(*sum, if lost { LOST_CHECKSUM } else { sums[at] });
        }
    }

    #[test]
    fn a_leaf_of_another_owner_or_time_is_not_taken() {
        let sums = [BlockChecksum(7); SUMS];
        let bytes = encode(&sums, OWNER, PoolId(9));
        for other in [
            LeafOwner { volume: 2, ..OWNER },
            LeafOwner { extent: 3, ..OWNER },
            LeafOwner { slot: 4, ..OWNER },
            LeafOwner { sequence: 5, ..OWNER },
        ] {
            assert_eq!(*decode(bytes.as_slice(), other, PoolId(9)), [LOST_CHECKSUM; SUMS]);
        }
    }

    #[test]
    fn the_cache_forgets_the_least_recently_used() {
        let mut cache = LeafCache::default();
        let leaf = Arc::new([BlockChecksum(1); SUMS]);
        for slot in 0..CACHED_MAX as u32 {
            cache.insert(slot, leaf.clone());
        }
        assert!(cache.get(0).is_some());
        cache.insert(u32::MAX, leaf);
        assert!(cache.peek(0).is_some() && cache.peek(1).is_none());
        cache.check();
    }
}
