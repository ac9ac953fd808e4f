//! CORE: many volumes' bytes on one pool.
//!
//! Thin map, checksums, hot extents, disk format (`docs/disk-format.md`). Pure: disk operations go out through `poll`,
//! their ends come in through `handle`. Three promises everything here serves:
//!
//! * what was acknowledged survives the death of the process at any point, what was flushed survives a power cut;
//! * a block that does not match its checksum is never returned;
//! * an extent that may differ between replicas is in `hot` or `changed_since` (W7, W8). Too many is allowed, too few
//!   never.

mod catalog;
mod checkpoint;
mod columns;
mod control;
mod cooling;
mod disks;
pub mod faulty_disk;
#[doc(hidden)]
pub mod fuzz;
mod hot;
mod journal;
mod lanes;
mod layer_map;
mod layers;
mod layout;
mod leaf;
mod loading;
mod merging;
mod opening;
mod pool;
mod reading;
mod record;
mod recovery;
mod slab;
mod slots;
mod space;
mod store;
mod superblock;
mod transfer;
mod units;
pub mod verify;

pub use catalog::{CatalogCopy, Member, MemberState};
pub use disks::{DISKS_MAX, DiskChange, Disks, Position};
pub use layout::UNIT_BYTES;
pub use leaf::LOST_CHECKSUM;
pub use store::Store;

use pollux_base::disk::{DiskDone, DiskOp};
use pollux_base::unit::BlockRange;
use pollux_base::{
    BlockChecksum, ByteCount, ClusterId, Data, DiskId, DiskIndex, ExtentIndex, Generation, GroupId, NodeId, PoolId,
    VolumeId,
};
use std::collections::BTreeMap;

/// Names a store request between its issue and its end; chosen by the caller.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct StoreRequestId(pub u64);

impl From<StoreRequestId> for u64 {
    fn from(id: StoreRequestId) -> u64 {
        id.0
    }
}

/// What the pool's superblock must say for it to be opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PoolIdentity {
    pub cluster: ClusterId,
    pub node: NodeId,
    pub pool: PoolId,
    pub disk: DiskId,
}

#[derive(Clone, Debug)]
pub enum Input {
    Disk(DiskDone),
    Request(StoreRequestId, StoreOp),
}

#[derive(Clone, Debug)]
pub enum StoreOp {
    /// Makes the volume known, or grows it. Ends in `Done` when durable. The same again changes nothing; a smaller size
    /// neither. `OutOfRange`: a size of zero, beyond `VOLUME_BYTES_MAX`, or not a multiple of a block. `Full`: the catalog
    /// is full.
    Create { volume: VolumeId, group: GroupId, size: ByteCount },
    /// Erases a volume, snapshot or clone, in any order. When this ends it is gone for good, and the space that it shared with
    /// none is free. What others show through stays; where only one other does, the two are made one in the background.
    Delete { volume: VolumeId },
    /// Freezes volumes: each pair is a volume and the snapshot that is to be. All at one point: the snapshots hold what was
    /// asked for before this, and nothing of what is asked for after it (which waits until this has ended; what is under
    /// way ends first). It takes as long for a large volume as for a small one. Ends in `Done` when durable, for all or for
    /// none. A snapshot that is there already is left as it is, so the same again changes nothing. A snapshot is a volume like any
    /// other: it is read, deleted, and can be written to (for whoever brings it up to date); that shows in what was born of
    /// it, where that has nothing of its own. Extents that were hot are hot for the volume as before. `NoVolume`: one of the
    /// volumes is not there. `Full`: the catalog is full. Whoever keeps replicas alike asks when all hold the same, durably,
    /// and nothing is under way: which extents of the snapshot may differ between them is not remembered for long.
    Snapshot { of: Vec<(VolumeId, VolumeId)> },
    /// A new volume, as large as `of` (a snapshot, or any volume that is not written to any more), that begins as a copy of
    /// it and shares its space. All of it counts as changed in `generation`. Ends in `Done` when durable. A volume that is there already is left as it is. `NoVolume`,
    /// `Full` as for `Snapshot`.
    Clone { of: VolumeId, volume: VolumeId, group: GroupId, generation: Generation },
    /// The volume holds what its snapshot holds (or another volume of the same origin; else `NoVolume`), and goes on from there;
    /// both stay as large as they are.
    /// At one point in the order of requests, like `Snapshot`; ends in `Done` when durable. Everything that this may
    /// have changed counts as changed in `generation`, and `also` what is named here. The same again, in the same generation and before any other rollback or
    /// snapshot, changes nothing.
    Rollback { volume: VolumeId, snapshot: VolumeId, generation: Generation, also: Vec<ExtentIndex> },
    /// Keeps a small text of the caller (at most `NOTE_BYTES_MAX`) for a group, durable when this ends. `None` erases it.
    /// `Full`: the catalog is full.
    PutNote { group: GroupId, note: Option<Vec<u8>> },
    /// W7: marks the extents hot under `generation` durably, allocating nothing yet. Ends in `Done` when every one of
    /// them is hot with at least this generation on disk. Must precede `Write`, and `Zero` of what is allocated
    /// (asserted). Beyond `hot_extents_max` it waits. Calls off a cooling that is under way.
    Heat { volume: VolumeId, extents: Vec<ExtentIndex>, generation: Generation },
    /// The caller states that the extents hold the same on every in-sync replica and that nothing is in flight: their
    /// derived metadata is written and the mark taken back, in the background. Ends in `Done` when cold on disk. An
    /// extent that is written to again meanwhile, or of whose volume a snapshot is just being taken, stays hot.
    Cool { volume: VolumeId, extents: Vec<ExtentIndex> },
    /// Raises the generation of every hot extent of the group to `generation`, durably. Part of adopting a new record.
    Remark { group: GroupId, generation: Generation },
    /// Every replica of the group is in sync: extents that hold nothing but were kept to tell of their change are freed.
    Reap { group: GroupId },
    /// Reads and verifies. Ends in `Read`. Blocks never written are zeros with `BlockChecksum::ZERO`. A read waits for
    /// earlier writes that it overlaps. Spots of the medium that cannot be read are `Corrupt`, like those that read wrong.
    Read { volume: VolumeId, range: BlockRange },
    /// `checksums` has one entry per block, none ZERO. Ends in `Done` when on disk (not flushed). The caller never has
    /// two writes to the same block under way.
    Write { volume: VolumeId, range: BlockRange, data: Data, checksums: Vec<BlockChecksum> },
    /// The range reads as zeros. Ends in `Done` when recorded (not flushed).
    Zero { volume: VolumeId, range: BlockRange },
    /// What the volume itself has of the extent is lost with a disk: each block is corrupt until it is written or zeroed
    /// again, also after a crash. The extent must be hot.
    Lose { volume: VolumeId, extent: ExtentIndex },
    /// What the volume, and whatever shares its origin, has of the extent is lost with another disk: in each of those volumes every
    /// block is corrupt until it is written or zeroed there. Nothing of the extent is here yet. Ends in `Done` when
    /// durable. `Full`: no room to say so.
    LoseColumn { volume: VolumeId, extent: ExtentIndex, generation: Generation },
    /// All that the volume, and whatever shares its origin, has of the extent is gone from here, all of it or nothing: it
    /// lives on another disk. Ends in `Done` when durable.
    Forget { volume: VolumeId, extent: ExtentIndex },
    /// Which disks the pool has, and which extents may have been on one that is out, for each origin by one of its volumes.
    PutMembers { members: BTreeMap<DiskId, Member>, lost: BTreeMap<VolumeId, Vec<(u32, u32)>> },
    /// Remembers durably that an extent of the volume, and of whatever shares its origin, is on its way here; `None`: nothing is.
    PutArriving { column: Option<(VolumeId, ExtentIndex)> },
    /// Changes of the pool that this disk missed.
    Adopt(CatalogCopy),
    /// Everything that ended before this was asked survives a power cut.
    Flush,
    /// Verifies a piece of the metadata of one disk while the pool is used; ends in `Looked`, which names the next one. Waits for
    /// nothing and holds up nothing. One piece of a disk at a time (asserted). `NoVolume`: the pool has no such disk (any more).
    Look { disk: DiskIndex, piece: verify::Piece },
    /// Stored checksums of a whole extent, for comparing replicas. Ends in `Checksums`; `LOST_CHECKSUM` stands for one
    /// that is damaged itself.
    Checksums { volume: VolumeId, extent: ExtentIndex },
}

/// Largest note, in bytes.
pub const NOTE_BYTES_MAX: usize = 1024;

#[derive(Clone, Debug)]
pub enum Output {
    Disk(DiskOp),
    /// The pool is open (or not): nothing else is answered before.
    Opened(Result<(), OpenError>),
    Ended(StoreRequestId, Result<StoreReply, StoreError>),
    /// A change of the pool's disks is done, or why it is not.
    Changed(StoreRequestId, Result<(), String>),
    /// Nothing more is asked of this disk: the shell may close it.
    Close(DiskIndex),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreReply {
    Done,
    Read {
        data: Data,
        checksums: Vec<BlockChecksum>,
    },
    /// `EXTENT_BLOCKS` entries.
    Checksums(Vec<BlockChecksum>),
    Looked(Box<verify::Looked>),
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    #[error("no such volume")]
    NoVolume,
    #[error("outside the volume")]
    OutOfRange,
    /// Nothing was changed; the caller holds the write and tries again when space was freed or added.
    #[error("the pool is full")]
    Full,
    /// These blocks do not match their checksums; a good copy must come from a peer. Other blocks of the request are fine.
    #[error("{} blocks do not match their checksums", .0.len())]
    Corrupt(Vec<BlockRange>),
    /// The disk failed. A failed write or flush is never retried into success: the store takes no more writes.
    #[error("the disk failed: {0}")]
    Disk(String),
    #[error("a note of {0} bytes is longer than {NOTE_BYTES_MAX}")]
    NoteTooLong(usize),
}

/// Why a pool was not opened. The pool is left untouched.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    #[error("not a Pollux pool: neither superblock has the magic number")]
    NotAPool,
    #[error("both superblocks are damaged")]
    SuperblocksDamaged,
    #[error("disk format version {found} is not known to this program (knows {known})")]
    Version { found: u32, known: u32 },
    #[error("the pool belongs to cluster {found}, this node to {expected}")]
    OtherCluster { found: ClusterId, expected: ClusterId },
    #[error("the pool belongs to node {found}, this node is {expected}")]
    OtherNode { found: NodeId, expected: NodeId },
    #[error("the pool is {found} bytes long, its superblock says {expected}")]
    Truncated { found: u64, expected: u64 },
    #[error("metadata is damaged: {0}")]
    Damaged(String),
    /// One of several disks, by its place in the configuration from 0 on.
    #[error("disk number {disk} of the pool: {error}")]
    OneDisk { disk: usize, error: Box<OpenError> },
    #[error("disks number {} and {} of the pool are the same one ({id}): one of them is a copy, leave it out", .disks[0], .disks[1])]
    Twice { disks: [usize; 2], id: DiskId },
    #[error("disk number {disk} belongs to pool {found}, the first one to {expected}")]
    OtherPool { disk: usize, found: PoolId, expected: PoolId },
    #[error(
        "disk number {disk} ({id}) is no longer a part of the pool: leave it out, or erase it and add it as a new one"
    )]
    Out { disk: usize, id: DiskId },
    #[error(
        "disk number {disk} ({id}) is an image of an earlier day: it was opened {openings} times, the others remember \
         {expected}; put the real one back"
    )]
    OldImage { disk: usize, id: DiskId, openings: u64, expected: u64 },
    #[error(
        "the pool is an image of an earlier day ({why}). Put the real disks back; or, if they are lost, stop blockd and run \
         `blockd take-old-image`: what the image holds is then compared with the other servers, block by block"
    )]
    EarlierDay { why: String },
    #[error(
        "disk {id} of the pool is missing (last seen at {path:?}): attach it; if it has another path now, name that under \
         `pool.more` in the node's configuration; if it is lost for good, let it go with `pollux pool remove-disk --lost`"
    )]
    DiskMissing { id: DiskId, path: String },
    #[error("the disk failed: {0}")]
    Disk(String),
}

/// Smallest pool: room for the metadata and a few extents.
pub const POOL_BYTES_MIN: u64 = 64 << 20;
/// Largest pool: 64 TiB, of whose slot table 512 MiB would be in memory.
pub const POOL_BYTES_MAX: u64 = 1 << 46;

/// Why a pool cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    #[error("a pool of {size} is too small, it needs {min}")]
    TooSmall { size: ByteCount, min: ByteCount },
    #[error("a pool of {size} is too large, the limit is {max}")]
    TooLarge { size: ByteCount, max: ByteCount },
}
