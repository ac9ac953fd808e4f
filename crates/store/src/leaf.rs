//! Leaves: the checksums of one extent on disk, and a bounded cache of them for reads of cold extents.
//!
//! A leaf is the truth about which blocks of a cold extent hold data: `BlockChecksum::ZERO` means none. It has checksums
//! only for the units about which there is something to say. It is never overwritten where it lies, and counts only once
//! the journal names its place. A damaged block of a leaf makes its checksums `LOST_CHECKSUM`: those blocks read as
//! corrupt, never as zeros.

use crate::layout::{BLOCK, BlockKind, HEADER_BYTES, Header, LEAF_MAP_BYTES, LEAF_UNITS_PER_BLOCK, UNIT_BLOCKS, UNITS};
use crate::layout::{seal, unseal};
use crate::units::Units;
use pollux_base::data::Buffer;
use pollux_base::unit::EXTENT_BLOCKS;
use pollux_base::{BlockChecksum, Data, PoolId};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Stands for a checksum that was itself lost: the block may hold data, but nothing can vouch for it. It matches no
/// content, so that the block is corrupt until it is written again.
pub const LOST_CHECKSUM: BlockChecksum = BlockChecksum(u64::MAX);

/// The block reads as zeros whatever lies beneath: it was zeroed above data of a layer further down.
pub const HOLE_CHECKSUM: BlockChecksum = BlockChecksum(u64::MAX - 1);

/// Of a block that holds data in an extent that was hot at the last crash: whatever is on the disk counts, and nobody has
/// read it yet. Only in memory.
pub const UNREAD_CHECKSUM: BlockChecksum = BlockChecksum(u64::MAX - 2);

/// Whether the block has data of its own here.
pub fn is_data(sum: BlockChecksum) -> bool {
    !sum.is_zero() && sum != HOLE_CHECKSUM
}

pub const SUMS: usize = EXTENT_BLOCKS as usize;

/// Checksums of the blocks of one extent.
pub type Sums = [BlockChecksum; SUMS];

/// Whose leaf it is. The sequence of a slot goes on when the slot changes hands, so the owner need not be named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeafOwner {
    pub slot: u32,
    pub sequence: u64,
}

/// Without a leaf: the first `lost` blocks are lost, and of all others there is nothing.
pub fn leafless(lost: u16) -> Box<Sums> {
    let mut sums = Box::new([BlockChecksum::ZERO; SUMS]);
    sums[..usize::from(lost)].fill(LOST_CHECKSUM);
    sums
}

/// The checksums of one unit.
fn of_unit(unit: usize) -> std::ops::Range<usize> {
    unit * UNIT_BLOCKS..(unit + 1) * UNIT_BLOCKS
}

/// The units about which there is something to say.
fn told_units(sums: &Sums) -> impl Iterator<Item = usize> {
    (0..UNITS).filter(|unit| sums[of_unit(*unit)].iter().any(|sum| !sum.is_zero()))
}

fn header_of(owner: LeafOwner, part: usize, len: usize) -> Header {
    let two = u64::from(owner.slot);
    Header { kind: BlockKind::Leaf, part: part as u32, sequence: owner.sequence, one: 0, two, len }
}

/// The leaf; empty if there is nothing to say.
pub fn encode(sums: &Sums, owner: LeafOwner, pool: PoolId) -> Data {
    assert!(!sums.contains(&UNREAD_CHECKSUM), "a leaf knows its blocks");
    let units: Vec<usize> = told_units(sums).collect();
    let parts = units.chunks(LEAF_UNITS_PER_BLOCK);
    let mut buffer = Buffer::zeroed(parts.len() * BLOCK);
    for ((part, units), block) in parts.enumerate().zip(buffer.as_mut_slice().chunks_exact_mut(BLOCK)) {
        let mut payload = vec![0; LEAF_MAP_BYTES];
        for unit in units {
            payload[unit / 8] |= 1 << (unit % 8);
            sums[of_unit(*unit)].iter().for_each(|sum| payload.extend_from_slice(&sum.0.to_le_bytes()));
        }
        seal(block, pool, header_of(owner, part, payload.len()), &payload);
    }
    buffer.freeze()
}

/// The checksums of a leaf as read. What a damaged block was about cannot be told, so every unit of the extent that no
/// whole block is about is lost then; the rest is as it was.
pub fn decode(bytes: &[u8], owner: LeafOwner, pool: PoolId, units: &Units) -> Box<Sums> {
    let mut sums = Box::new([BlockChecksum::ZERO; SUMS]);
    let mut told = [false; UNITS];
    let mut is_whole = true;
    for part in parts(bytes, owner, pool) {
        match part {
            Some(found) => {
                for (unit, part) in found {
                    told[unit] = true;
                    sums[of_unit(unit)].copy_from_slice(&part);
                }
            }
            None => is_whole = false,
        }
    }
    // No leaf was written with it.
    sums.iter_mut().filter(|sum| **sum == UNREAD_CHECKSUM).for_each(|sum| *sum = LOST_CHECKSUM);
    if !is_whole {
        for (unit, _) in units.iter().filter(|(unit, _)| !told[*unit]) {
            sums[of_unit(unit)].fill(LOST_CHECKSUM);
        }
    }
    sums
}

/// Whether all of a leaf is as it was written.
pub fn is_whole(bytes: &[u8], owner: LeafOwner, pool: PoolId) -> bool {
    parts(bytes, owner, pool).all(|part| part.is_some())
}

/// What each block of a leaf says, of those that are whole.
fn parts(bytes: &[u8], owner: LeafOwner, pool: PoolId) -> impl Iterator<Item = Option<Part>> {
    bytes.chunks_exact(BLOCK).enumerate().map(move |(part, block)| {
        let (header, _) = unseal(block, BlockKind::Leaf, Some(pool)).ok()?;
        let payload = (header == header_of(owner, part, header.len)).then_some(header.len)?;
        decode_part(&block[HEADER_BYTES..HEADER_BYTES + payload])
    })
}

/// Units, and their checksums.
type Part = Vec<(usize, [BlockChecksum; UNIT_BLOCKS])>;

fn decode_part(payload: &[u8]) -> Option<Part> {
    let (map, sums) = payload.split_at_checked(LEAF_MAP_BYTES)?;
    let units: Vec<usize> = (0..UNITS).filter(|unit| map[unit / 8] & 1 << (unit % 8) != 0).collect();
    if sums.len() != units.len() * UNIT_BLOCKS * 8 {
        return None;
    }
    let of = |bytes: &[u8]| {
        let mut sums = [BlockChecksum::ZERO; UNIT_BLOCKS];
        for (sum, bytes) in sums.iter_mut().zip(bytes.chunks_exact(8)) {
            *sum = BlockChecksum(u64::from_le_bytes(bytes.try_into().expect("chunks of 8 bytes")));
        }
        sums
    };
    Some(units.into_iter().zip(sums.chunks_exact(UNIT_BLOCKS * 8).map(of)).collect())
}

/// Leaves kept for reads of cold extents: 8 KiB each, so 32 MiB at most, enough for 16 GiB read at random. A miss
/// costs one read of at most 12 KiB.
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
    use crate::layout::LEAF_BLOCKS_MAX;

    const OWNER: LeafOwner = LeafOwner { slot: 3, sequence: 4 };

    fn all_units() -> Units {
        let mut units = Units::default();
        (0..UNITS).for_each(|unit| units.set(unit, unit as u32));
        units
    }

    #[test]
    fn a_damaged_part_of_a_leaf_loses_its_checksums_and_no_others() {
        let mut sums = Box::new([BlockChecksum::ZERO; SUMS]);
        for (at, sum) in sums.iter_mut().enumerate() {
            *sum = BlockChecksum(at as u64);
        }
        let mut bytes = encode(&sums, OWNER, PoolId(9)).as_slice().to_vec();
        assert_eq!(bytes.len(), LEAF_BLOCKS_MAX * BLOCK);
        assert_eq!(decode(&bytes, OWNER, PoolId(9), &all_units()), sums);
        bytes[BLOCK + 100] ^= 1;
        let damaged = decode(&bytes, OWNER, PoolId(9), &all_units());
        let per_block = LEAF_UNITS_PER_BLOCK * UNIT_BLOCKS;
        for (at, sum) in damaged.iter().enumerate() {
            let lost = (per_block..2 * per_block).contains(&at);
            assert_eq!(*sum, if lost { LOST_CHECKSUM } else { sums[at] });
        }
    }

    #[test]
    fn a_leaf_says_nothing_of_units_that_hold_nothing() {
        let mut sums = Box::new([BlockChecksum::ZERO; SUMS]);
        assert!(encode(&sums, OWNER, PoolId(9)).is_empty());
        sums[SUMS - 1] = BlockChecksum(5);
        let bytes = encode(&sums, OWNER, PoolId(9));
        assert_eq!(bytes.len(), BLOCK);
        assert_eq!(decode(bytes.as_slice(), OWNER, PoolId(9), &all_units()), sums);
        // Where it is damaged only what has a unit is lost: the rest cannot hold data.
        let mut units = Units::default();
        units.set(UNITS - 1, 0);
        let lost = decode(&[0; BLOCK], OWNER, PoolId(9), &units);
        assert_eq!(lost.iter().filter(|sum| **sum == LOST_CHECKSUM).count(), UNIT_BLOCKS);
    }

    #[test]
    fn a_leaf_of_another_owner_or_time_is_not_taken() {
        let sums = [BlockChecksum(7); SUMS];
        let bytes = encode(&sums, OWNER, PoolId(9));
        for other in [LeafOwner { slot: 4, ..OWNER }, LeafOwner { sequence: 5, ..OWNER }] {
            assert_eq!(*decode(bytes.as_slice(), other, PoolId(9), &all_units()), [LOST_CHECKSUM; SUMS]);
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
