//! What the store asks of a disk and what it hears back. The shell carries these out with io_uring, the simulator with
//! a disk that tears, loses and rots.
//!
//! Promises a disk gives: operations complete in any order. A write that completed survives the death of the process.
//! It survives a power cut only when a `Flush` that was *issued after it completed* has completed, or when it was
//! itself `sync`. A write not yet completed may be there, in part, or not, 512 bytes at a time.

use crate::data::Data;
use crate::unit::ByteCount;

/// Which of the pool's disks, by the order in which the shell gave them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct DiskIndex(pub u8);

impl DiskIndex {
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// Names an operation between its issue and its completion, and the disk that it is on; never used twice while one is
/// under way.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DiskOpId {
    pub disk: DiskIndex,
    pub number: u64,
}

impl DiskOpId {
    /// On a pool's first disk.
    pub fn new(number: u64) -> DiskOpId {
        DiskOpId { disk: DiskIndex::default(), number }
    }
}

/// One operation on one of the pool's disks. Offsets and lengths are multiples of 4096, memory is aligned likewise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskOp {
    pub id: DiskOpId,
    pub kind: DiskOpKind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskOpKind {
    /// Read `len` bytes at `offset`.
    Read { offset: ByteCount, len: usize },
    /// Write `data` (gathered in order) at `offset`. With `sync` it is on stable storage when done (RWF_DSYNC).
    Write { offset: ByteCount, data: Vec<Data>, sync: bool },
    /// Make every write completed so far survive a power cut (fdatasync).
    Flush,
    /// Give the space back (hole punched in a file, discard on a device). What is read there later is undefined.
    Discard { offset: ByteCount, len: u64 },
}

/// The end of an operation. Reads carry their bytes; a short read or write is an error, never a success.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskDone {
    pub id: DiskOpId,
    pub result: Result<Option<Data>, DiskError>,
}

/// Why a disk operation failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiskError {
    #[error("disk I/O failed: {0} (errno {1})")]
    Io(String, i32),
    #[error("the disk is full")]
    NoSpace,
    #[error("transferred {actual} of {expected} bytes")]
    Short { expected: usize, actual: usize },
}
