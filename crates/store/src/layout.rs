//! Where things lie on the pool's disk, and the frame around every block of metadata.
//!
//! Field by field in `docs/disk-format.md`; frozen by the fixtures under `tests/fixtures`. Invariants: every number is
//! little-endian; every block of metadata says what it is, whose pool it belongs to and carries a CRC-32C over all its
//! 4 KiB, so that a block that is torn, rotten, misplaced or of an earlier pool is never taken for a good one.

use crate::{FormatError, POOL_BYTES_MAX, POOL_BYTES_MIN};
use pollux_base::checksum::crc32c;
use pollux_base::unit::{BLOCK_BYTES, EXTENT_BYTES};
use pollux_base::{ByteCount, Data, PoolId};
use std::ops::Range;
use zerocopy::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub const FORMAT_VERSION: u16 = 5;
pub const BLOCK: usize = BLOCK_BYTES as usize;
const MAGIC: [u8; 8] = *b"PolluxMB";

/// What a block of metadata is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum BlockKind {
    Superblock = 1,
    Anchor = 2,
    Catalog = 3,
    Journal = 4,
    Table = 5,
    Leaf = 6,
}

/// First bytes of every block of metadata. What `one` and `two` mean depends on the kind.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U16,
    kind: U16,
    part: U32,
    pool: U128,
    sequence: U64,
    one: U64,
    two: U64,
    len: U32,
    crc: U32,
}

pub const HEADER_BYTES: usize = size_of::<RawHeader>();
const CRC_OFFSET: usize = HEADER_BYTES - 4;
/// Room after the header.
pub const PAYLOAD_BYTES: usize = BLOCK - HEADER_BYTES;

/// The header of a metadata block, parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub kind: BlockKind,
    pub part: u32,
    pub sequence: u64,
    pub one: u64,
    pub two: u64,
    /// Bytes of payload in use.
    pub len: usize,
}

/// Why a block of metadata is of no use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockFault {
    NoMagic,
    Crc,
    Version(u16),
    /// Another kind, another pool, or a length that cannot be.
    Misplaced,
}

/// One block: header, then `payload`, then zeros; sealed with its checksum. `block` must be zeroed.
pub fn seal(block: &mut [u8], pool: PoolId, header: Header, payload: &[u8]) {
    let raw = RawHeader {
        magic: MAGIC,
        version: FORMAT_VERSION.into(),
        kind: (header.kind as u16).into(),
        part: header.part.into(),
        pool: pool.0.into(),
        sequence: header.sequence.into(),
        one: header.one.into(),
        two: header.two.into(),
        len: u32::try_from(header.len).expect("a length within a region fits").into(),
        crc: 0.into(),
    };
    block[..HEADER_BYTES].copy_from_slice(raw.as_bytes());
    block[HEADER_BYTES..HEADER_BYTES + payload.len()].copy_from_slice(payload);
    let crc = crc32c(block);
    block[CRC_OFFSET..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
}

/// Checks the frame of a block. `pool`: whose it must be, where that is known already.
pub fn unseal(block: &[u8], kind: BlockKind, pool: Option<PoolId>) -> Result<(Header, PoolId), BlockFault> {
    let (raw, _) = RawHeader::ref_from_prefix(block).map_err(|_| BlockFault::Misplaced)?;
    if block.len() != BLOCK || raw.magic != MAGIC {
        return Err(BlockFault::NoMagic);
    }
    let mut zeroed = [0; BLOCK];
    zeroed.copy_from_slice(block);
    zeroed[CRC_OFFSET..HEADER_BYTES].fill(0);
    if crc32c(&zeroed) != raw.crc.get() {
        return Err(BlockFault::Crc);
    }
    if raw.version.get() != FORMAT_VERSION {
        return Err(BlockFault::Version(raw.version.get()));
    }
    let owner = PoolId(raw.pool.get());
    let len = raw.len.get() as usize;
    if raw.kind.get() != kind as u16 || pool.is_some_and(|pool| pool != owner) {
        return Err(BlockFault::Misplaced);
    }
    if len > PAYLOAD_BYTES && kind != BlockKind::Catalog {
        return Err(BlockFault::Misplaced);
    }
    let header = Header {
        kind,
        part: raw.part.get(),
        sequence: raw.sequence.get(),
        one: raw.one.get(),
        two: raw.two.get(),
        len,
    };
    Ok((header, owner))
}

/// The two copies of the superblock. The second is at a fixed place, so that it is found when the first is gone, and
/// far from the first, so that whatever overwrites the head of the disk leaves it.
pub const SUPERBLOCKS: [u64; 2] = [0, 1 << 20];
/// The two copies of the journal's anchor, next to the superblocks.
pub const ANCHORS: [u64; 2] = [BLOCK_BYTES, (1 << 20) + BLOCK_BYTES];
/// The two copies of the catalog.
pub const CATALOGS: [u64; 2] = [2 << 20, 3 << 20];
/// Bytes of one copy of the catalog: some 900 groups with the longest note, or 10,000 with short ones.
pub const CATALOG_BYTES: usize = 1 << 20;
pub const JOURNAL: u64 = 4 << 20;
/// The journal takes so much of the disk, within bounds: what can be hot depends on it.
const JOURNAL_PART: u64 = 128;
const JOURNAL_BLOCKS_MIN: u64 = 2048;
const JOURNAL_BLOCKS_MAX: u64 = 32768;

/// Data space is taken in units of this size. Small, so that scattered writes take little; large enough that the map of
/// an extent that lies here and there stays small. Reckoned, not measured yet against 16, 64 and 128 KiB.
pub const UNIT_BYTES: u64 = 32 << 10;
pub const UNIT_BLOCKS: usize = (UNIT_BYTES / BLOCK_BYTES) as usize;
/// Units of an extent, and of a region: the stretch of the disk in which an extent likes to lie.
pub const UNITS: usize = (EXTENT_BYTES / UNIT_BYTES) as usize;

/// Bytes of a slot's descriptor in the table: what it is, then a number for each unit.
pub const DESCRIPTOR_BYTES: usize = 64 + 4 * UNITS;
pub const DESCRIPTORS_PER_BLOCK: usize = PAYLOAD_BYTES / DESCRIPTOR_BYTES;
/// One slot per so many bytes of data. A slot is needed for each extent in which anything lies, so they run out before
/// the space does only if most extents hold less than this; they cost 1 % of the pool.
const BYTES_PER_SLOT: u64 = 128 << 10;
/// Blocks of the longest leaf.
pub const LEAF_BLOCKS_MAX: usize = UNITS.div_ceil(LEAF_UNITS_PER_BLOCK);
/// A block of a leaf says which units it is about, then gives their checksums.
pub const LEAF_MAP_BYTES: usize = UNITS / 8;
pub const LEAF_UNITS_PER_BLOCK: usize = (PAYLOAD_BYTES - LEAF_MAP_BYTES) / (8 * UNIT_BLOCKS);

/// Where a leaf lies: `blocks` blocks of one unit.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct LeafPlace {
    pub unit: u32,
    pub block: u8,
    pub blocks: u8,
}

impl LeafPlace {
    /// One bit for each block of the unit.
    pub fn bits(self) -> u32 {
        ((1 << self.blocks) - 1) << self.block
    }
}

/// Where the journal lies: a ring of blocks, each known by its number in the order in which they are written.
///
/// Half of it is written before a checkpoint is due: then the cost of a checkpoint (what is hot, and the changed blocks of the
/// table twice) is a small part of what was written anyway. Reading it back at open takes some 10 ms for 8 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring {
    pub blocks: u64,
}

impl Ring {
    /// That of a disk so long: from 8 MiB up to 128 MiB, a power of two.
    fn of(size: u64) -> Ring {
        let wanted = (size / JOURNAL_PART / BLOCK_BYTES).clamp(JOURNAL_BLOCKS_MIN, JOURNAL_BLOCKS_MAX);
        Ring { blocks: 1 << wanted.ilog2() }
    }

    pub fn bytes(self) -> u64 {
        self.blocks * BLOCK_BYTES
    }

    /// Block of the ring in which the journal's block of this number lies.
    pub fn place(self, number: u64) -> u64 {
        number % self.blocks
    }

    pub fn offset(self, number: u64) -> u64 {
        JOURNAL + self.place(number) * BLOCK_BYTES
    }

    /// Extents that may be hot at one time.
    pub fn hot_extents_max(self) -> usize {
        self.blocks as usize / 2
    }

    /// Marks at one time: twice the hot extents, because a snapshot puts a layer with marks of its own on top of one whose
    /// extents have yet to cool.
    pub fn hot_marks_max(self) -> usize {
        2 * self.hot_extents_max()
    }

    /// Blocks that only a checkpoint (or an opening) may use for what it must write anew: a mark of 24 bytes and a mask of
    /// 520 bytes for each of them, so 13 and 293 of 2048 blocks.
    pub fn restated_blocks_max(self) -> usize {
        self.blocks as usize * 5 / 32
    }
}

/// The regions whose size depends on that of the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size of the pool, as found when it was formatted.
    pub size: u64,
    pub ring: Ring,
    /// Regions of `UNITS` units.
    pub regions: u32,
    pub slots: u32,
    pub table_blocks: u32,
    pub tables: [u64; 2],
    pub data: u64,
}

impl Geometry {
    /// As many regions as fit.
    pub fn of(size: ByteCount) -> Result<Geometry, FormatError> {
        if size.0 < POOL_BYTES_MIN {
            return Err(FormatError::TooSmall { size, min: ByteCount(POOL_BYTES_MIN) });
        }
        if size.0 > POOL_BYTES_MAX {
            return Err(FormatError::TooLarge { size, max: ByteCount(POOL_BYTES_MAX) });
        }
        let mut regions = (size.0 - JOURNAL - Ring::of(size.0).bytes()) / EXTENT_BYTES;
        loop {
            let geometry = Geometry::with_regions(size.0, regions);
            let over = (geometry.data + regions * EXTENT_BYTES).saturating_sub(size.0);
            if over == 0 {
                return Ok(geometry);
            }
            // Fewer regions have a shorter table, too: half of what is over is never too much to take away.
            regions -= (over / EXTENT_BYTES / 2).max(1);
        }
    }

    fn with_regions(size: u64, regions: u64) -> Geometry {
        let slots = regions * (EXTENT_BYTES / BYTES_PER_SLOT);
        let table_blocks = slots.div_ceil(DESCRIPTORS_PER_BLOCK as u64);
        let ring = Ring::of(size);
        let first = JOURNAL + ring.bytes();
        let second = first + table_blocks * BLOCK_BYTES;
        Geometry {
            size,
            ring,
            regions: u32::try_from(regions).expect("POOL_BYTES_MAX keeps region numbers in 32 bits"),
            slots: u32::try_from(slots).expect("POOL_BYTES_MAX keeps slot numbers in 32 bits"),
            table_blocks: u32::try_from(table_blocks).expect("there are fewer table blocks than slots"),
            tables: [first, second],
            data: (second + table_blocks * BLOCK_BYTES).next_multiple_of(EXTENT_BYTES),
        }
    }

    pub fn units(&self) -> u32 {
        self.regions * UNITS as u32
    }

    /// Where block `block` of a unit lies.
    pub fn offset(&self, unit: u32, block: usize) -> ByteCount {
        assert!(unit < self.units() && block < UNIT_BLOCKS, "unit {unit} of {}, block {block}", self.units());
        ByteCount(self.data + u64::from(unit) * UNIT_BYTES + block as u64 * BLOCK_BYTES)
    }

    pub fn leaf_offset(&self, place: LeafPlace) -> ByteCount {
        self.offset(place.unit, usize::from(place.block))
    }

    /// A leaf, as its blocks are read; of one that cannot be read zeros stand in, which are no part of a leaf.
    pub fn leaf_bytes(&self, place: LeafPlace, mut read: impl FnMut(u64) -> Option<Data>) -> Vec<u8> {
        let mut bytes = vec![0; usize::from(place.blocks) * BLOCK];
        for (at, block) in (self.leaf_offset(place).0..).step_by(BLOCK).zip(bytes.chunks_exact_mut(BLOCK)) {
            if let Some(data) = read(at) {
                block.copy_from_slice(data.as_slice());
            }
        }
        bytes
    }

    /// Where a block of the slot table lies.
    pub fn table_offset(&self, copy: usize, block: u32) -> ByteCount {
        ByteCount(self.tables[copy] + u64::from(block) * BLOCK_BYTES)
    }

    /// The slots that a block of the table describes.
    pub fn slots_of_block(&self, block: u32) -> Range<u32> {
        let per = DESCRIPTORS_PER_BLOCK as u32;
        block * per..((block + 1) * per).min(self.slots)
    }
}

/// The block of the table that describes a slot.
pub fn table_block_of(slot: u32) -> u32 {
    slot / DESCRIPTORS_PER_BLOCK as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_do_not_overlap_and_stay_inside_the_pool() {
        for size in [POOL_BYTES_MIN, POOL_BYTES_MIN + 4097, 1 << 30, (1 << 40) + 512, POOL_BYTES_MAX] {
            let g = Geometry::of(ByteCount(size)).expect("a legal size");
            let table = u64::from(g.table_blocks) * BLOCK_BYTES;
            assert!(CATALOGS[1] + CATALOG_BYTES as u64 <= JOURNAL && g.tables[0] + table <= g.tables[1]);
            assert!(g.tables[1] + table <= g.data);
            assert!(g.offset(g.units() - 1, UNIT_BLOCKS - 1).0 + BLOCK_BYTES <= size);
            assert_eq!(g.slots_of_block(g.table_blocks - 1).end, g.slots);
            assert!(
                u64::from(g.regions) * EXTENT_BYTES + (160 << 20).min((32 << 20) + size / 64) + size / 64 >= size,
                "little is wasted"
            );
        }
        assert!(Geometry::of(ByteCount(POOL_BYTES_MIN - 1)).is_err());
        assert!(Geometry::of(ByteCount(POOL_BYTES_MAX + 1)).is_err());
    }

    #[test]
    fn a_block_that_was_changed_or_belongs_elsewhere_is_not_taken() {
        let header = Header { kind: BlockKind::Leaf, part: 1, sequence: 2, one: 3, two: 4, len: 5 };
        let mut block = vec![0; BLOCK];
        seal(&mut block, PoolId(7), header, &[9; 5]);
        assert_eq!(unseal(&block, BlockKind::Leaf, Some(PoolId(7))), Ok((header, PoolId(7))));
        assert_eq!(unseal(&block, BlockKind::Table, Some(PoolId(7))), Err(BlockFault::Misplaced));
        assert_eq!(unseal(&block, BlockKind::Leaf, Some(PoolId(8))), Err(BlockFault::Misplaced));
        block[BLOCK - 1] ^= 1;
        assert_eq!(unseal(&block, BlockKind::Leaf, Some(PoolId(7))), Err(BlockFault::Crc));
        assert_eq!(unseal(&[0; BLOCK], BlockKind::Leaf, None), Err(BlockFault::NoMagic));
    }
}
