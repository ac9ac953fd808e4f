//! Block requests as front ends make them and replies as they get them.
//!
//! Ranges are in blocks. What of a client's request is not a multiple of 4 KiB its front end turns into these: reads are
//! widened, writes become patches of the blocks that they cover in part. While a group is frozen requests are held, not
//! failed.

use crate::data::Data;
use crate::id::VolumeId;
use crate::unit::{BlockCount, BlockIndex, BlockRange};

/// Names a request between its issue and its reply; chosen by the shell, unique among those under way.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RequestId(pub u64);

/// One request of a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub id: RequestId,
    pub volume: VolumeId,
    pub op: Op,
}

/// What is asked. `fua`: like the request followed by a flush of just it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    Read {
        range: BlockRange,
    },
    /// `data` holds exactly `range.count` blocks.
    Write {
        range: BlockRange,
        data: Data,
        fua: bool,
    },
    /// Bytes inside one block: those of `data`, from the byte `offset` of the block on. The rest of the block stays as the
    /// change before left it: a patch is ordered against every overlapping request as if it wrote the whole block.
    Patch {
        block: BlockIndex,
        offset: usize,
        data: Data,
        fua: bool,
    },
    /// The range reads as zeros afterwards and its space is given back where it can be.
    Zero {
        range: BlockRange,
        fua: bool,
    },
    /// Everything acknowledged before this was asked survives a power cut of every member of the in-sync set.
    Flush,
    /// Which parts of the range hold data.
    Status {
        range: BlockRange,
    },
}

impl Op {
    /// The blocks it touches; none for a flush.
    pub fn range(&self) -> Option<BlockRange> {
        match self {
            Op::Read { range } | Op::Write { range, .. } | Op::Zero { range, .. } | Op::Status { range } => {
                Some(*range)
            }
            Op::Patch { block, .. } => Some(BlockRange::new(*block, BlockCount(1))),
            Op::Flush => None,
        }
    }
}

/// The end of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    Done,
    Data(Data),
    /// Adjoining runs that together are the asked range: the run, and whether it may hold data (`false`: reads as zeros).
    Status(Vec<(BlockRange, bool)>),
    Failed(BlockError),
}

/// Why a request failed. These are the only errors a client can see; trouble that passes is a freeze instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    #[error("no such volume")]
    NoVolume,
    #[error("the range is outside the volume")]
    OutOfRange,
    /// This node does not serve the group (any more); the client should connect to the node that does.
    #[error("the volume is not served here")]
    NotServed,
    /// The volume is of a snapshot.
    #[error("the volume is read only")]
    ReadOnly,
    /// No copy has the data.
    #[error("no copy of the data could be read")]
    Unreadable,
}
