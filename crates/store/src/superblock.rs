//! The superblock (whose pool this is, and its geometry) and the anchor (where the journal begins).
//!
//! Both exist twice. The superblock is written when the pool is formatted and to heal a damaged copy, never else. The
//! anchor is written at open and at every checkpoint, one copy after the other, so that one of them is always whole.

use crate::layout::{
    BLOCK, BlockFault, BlockKind, FORMAT_VERSION, Geometry, HEADER_BYTES, Header, Ring, SUPERBLOCKS, UNIT_BYTES, seal,
    unseal,
};
use crate::{OpenError, PoolIdentity};
use pollux_base::data::Buffer;
use pollux_base::{ByteCount, ClusterId, Data, DiskId, NodeId, PoolId};
use zerocopy::little_endian::{U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawSuperblock {
    cluster: U128,
    node: U64,
    size: U64,
    unit_bytes: U32,
    regions: U32,
    slots: U32,
    table_blocks: U32,
    table_first: U64,
    table_second: U64,
    data: U64,
    disk: U128,
    journal_blocks: U32,
}

/// What a superblock says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    pub identity: PoolIdentity,
    pub geometry: Geometry,
}

impl Superblock {
    pub fn encode(&self) -> Data {
        let g = &self.geometry;
        let raw = RawSuperblock {
            cluster: self.identity.cluster.0.into(),
            node: self.identity.node.0.into(),
            size: g.size.into(),
            unit_bytes: (UNIT_BYTES as u32).into(),
            regions: g.regions.into(),
            slots: g.slots.into(),
            table_blocks: g.table_blocks.into(),
            table_first: g.tables[0].into(),
            table_second: g.tables[1].into(),
            data: g.data.into(),
            disk: self.identity.disk.0.into(),
            journal_blocks: (g.ring.blocks as u32).into(),
        };
        let len = size_of::<RawSuperblock>();
        let header = Header { kind: BlockKind::Superblock, part: 0, sequence: 1, one: 0, two: 0, len };
        sealed(self.identity.pool, header, raw.as_bytes())
    }

    pub fn decode(block: &[u8]) -> Result<Superblock, BlockFault> {
        let (_, pool) = unseal(block, BlockKind::Superblock, None)?;
        let (raw, _) = RawSuperblock::ref_from_prefix(&block[HEADER_BYTES..]).map_err(|_| BlockFault::Misplaced)?;
        let cluster = ClusterId(raw.cluster.get());
        let found = Geometry {
            size: raw.size.get(),
            ring: Ring { blocks: raw.journal_blocks.get().into() },
            regions: raw.regions.get(),
            slots: raw.slots.get(),
            table_blocks: raw.table_blocks.get(),
            tables: [raw.table_first.get(), raw.table_second.get()],
            data: raw.data.get(),
        };
        // The geometry follows from the size. It is on disk for whoever has to mend a pool by hand.
        if Geometry::of(ByteCount(found.size)) != Ok(found) || u64::from(raw.unit_bytes.get()) != UNIT_BYTES {
            return Err(BlockFault::Misplaced);
        }
        let (node, disk) = (NodeId(raw.node.get()), DiskId(raw.disk.get()));
        Ok(Superblock { identity: PoolIdentity { cluster, node, pool, disk }, geometry: found })
    }

    /// Judges both copies (`None`: could not be read). Gives the superblock and which copies need healing, or why the
    /// pool is not ours to touch.
    pub fn judge(
        copies: [Option<&[u8]>; 2],
        cluster: ClusterId,
        node: NodeId,
        size: ByteCount,
    ) -> Result<(Superblock, [bool; 2]), OpenError> {
        // A disk too short for a second copy never had one.
        let missing = if size.0 <= SUPERBLOCKS[1] { BlockFault::NoMagic } else { BlockFault::Crc };
        let judged = copies.map(|copy| copy.map_or(Err(missing), Superblock::decode));
        let superblock = match &judged {
            [Ok(first), Ok(second)] if first != second => {
                return Err(OpenError::Damaged("the two superblocks are of different pools".into()));
            }
            [Ok(superblock), _] | [_, Ok(superblock)] => *superblock,
            [Err(first), Err(second)] => return Err(neither(*first, *second)),
        };
        let identity = superblock.identity;
        if identity.cluster != cluster {
            return Err(OpenError::OtherCluster { found: identity.cluster, expected: cluster });
        }
        if identity.node != node {
            return Err(OpenError::OtherNode { found: identity.node, expected: node });
        }
        if superblock.geometry.size != size.0 {
            return Err(OpenError::Truncated { found: size.0, expected: superblock.geometry.size });
        }
        Ok((superblock, judged.map(|copy| copy.is_err())))
    }
}

fn neither(first: BlockFault, second: BlockFault) -> OpenError {
    match (first, second) {
        (BlockFault::Version(found), _) | (_, BlockFault::Version(found)) => {
            OpenError::Version { found: u32::from(found), known: u32::from(FORMAT_VERSION) }
        }
        (BlockFault::NoMagic, BlockFault::NoMagic) => OpenError::NotAPool,
        _ => OpenError::SuperblocksDamaged,
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawAnchor {
    tail: U64,
    durable: U64,
    log_life: U64,
    life: U64,
    end: U64,
    slots: U64,
}

/// Where the journal begins. A life is one opening of the pool; blocks of the journal carry theirs, so that what an
/// earlier life left behind is not taken for a part of this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Anchor {
    pub sequence: u64,
    /// First block of the journal that is still needed.
    pub tail: u64,
    /// Blocks before this were durable when the anchor was written: a hole among them is damage.
    pub durable: u64,
    /// The life whose blocks make up the journal.
    pub log_life: u64,
    /// The newest life. It differs from `log_life` only while the pool is being opened.
    pub life: u64,
    /// While the pool is being opened: where the journal of `log_life` ends. Otherwise 0: it ends where it ends.
    pub end: u64,
    /// The slot table holds so many slots; those beyond were never used but by what the journal says.
    pub slots: u32,
}

/// Beyond what is ever counted to: a million a second for a hundred thousand years.
pub const COUNT_MAX: u64 = 1 << 62;

impl Anchor {
    pub fn encode(&self, pool: PoolId) -> Data {
        let raw = RawAnchor {
            tail: self.tail.into(),
            durable: self.durable.into(),
            log_life: self.log_life.into(),
            life: self.life.into(),
            end: self.end.into(),
            slots: u64::from(self.slots).into(),
        };
        let len = size_of::<RawAnchor>();
        let header = Header { kind: BlockKind::Anchor, part: 0, sequence: self.sequence, one: 0, two: 0, len };
        sealed(pool, header, raw.as_bytes())
    }

    pub fn decode(block: &[u8], pool: PoolId) -> Option<Anchor> {
        let (header, _) = unseal(block, BlockKind::Anchor, Some(pool)).ok()?;
        let (raw, _) = RawAnchor::ref_from_prefix(&block[HEADER_BYTES..]).ok()?;
        let anchor = Anchor {
            sequence: header.sequence,
            tail: raw.tail.get(),
            durable: raw.durable.get(),
            log_life: raw.log_life.get(),
            life: raw.life.get(),
            end: raw.end.get(),
            slots: u32::try_from(raw.slots.get()).ok()?,
        };
        anchor.can_be().then_some(anchor)
    }

    /// Whether a store can have written it: everything is counted up from 1, one at a time. What could not is damage, and
    /// nothing later runs over.
    fn can_be(&self) -> bool {
        let counted = [self.sequence, self.tail, self.durable, self.end];
        let lives = 1..u64::from(u32::MAX);
        counted.iter().all(|number| *number < COUNT_MAX) && lives.contains(&self.life) && self.log_life <= self.life
    }
}

/// One sealed block, ready to be written.
pub fn sealed(pool: PoolId, header: Header, payload: &[u8]) -> Data {
    let mut buffer = Buffer::zeroed(BLOCK);
    seal(buffer.as_mut_slice(), pool, header, payload);
    buffer.freeze()
}
