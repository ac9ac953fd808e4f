//! What happened, as the invariants are told it: what clients saw of their disks, who served, which guests ran, and what
//! lies on the disks. The world writes it down as it happens; the tests of the invariants write broken ones by hand.

use pollux_base::unit::BlockRange;
use pollux_base::{BlockChecksum, ExtentIndex, GroupId, GroupRecord, Incarnation, NodeId, Stamp, VmId, VolumeId};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;

/// Sectors in a block: what a disk writes whole or not at all.
pub const SECTORS: usize = 8;

/// Sectors of a block, as a write of its whole names them.
pub const ALL: Range<usize> = 0..SECTORS;

/// What a block holds: for each of its sectors the number of the write that it comes from, 0 for zeros. All the same
/// unless a write was torn, or was of a part of the block.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Value(pub [u64; SECTORS]);

impl Value {
    pub const ZERO: Value = Value([0; SECTORS]);
    /// What stands for bytes that nobody ever wrote.
    pub const GARBAGE: u64 = u64::MAX;
    /// Stands for a sector of which nothing is said.
    const NOTHING: u64 = u64::MAX - 1;

    /// The block as this write leaves it.
    pub fn of(write: u64) -> Value {
        Value([write; SECTORS])
    }

    /// These sectors of the value, and nothing of the others.
    pub fn part(mut self, sectors: &Range<usize>) -> Value {
        for (sector, value) in self.0.iter_mut().enumerate() {
            if !sectors.contains(&sector) {
                *value = Value::NOTHING;
            }
        }
        self
    }

    /// The block as a write leaves it that says this of its sectors, and found `below`.
    pub fn over(mut self, below: Value) -> Value {
        for (value, below) in self.0.iter_mut().zip(below.0) {
            if *value == Value::NOTHING {
                *value = below;
            }
        }
        self
    }
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [0, rest @ ..] if rest == [0; SECTORS - 1] => write!(f, "zeros"),
            [first, rest @ ..] if rest == [first; SECTORS - 1] && first == Value::GARBAGE => write!(f, "garbage"),
            [first, rest @ ..] if rest == [first; SECTORS - 1] => write!(f, "w{first}"),
            mixed => write!(f, "torn{mixed:?}"),
        }
    }
}

/// One event of the history.
#[derive(Clone, Debug)]
pub enum Seen {
    /// A client asks for a write (`zero`: of zeros) of these sectors of each block. Numbers grow with time and are never
    /// used twice.
    Write {
        write: u64,
        volume: VolumeId,
        range: BlockRange,
        sectors: Range<usize>,
        zero: bool,
    },
    /// The write is acknowledged: every replica of `in_sync` claims to have it. `fua`: on stable storage.
    WriteAcked {
        write: u64,
        node: NodeId,
        group: GroupId,
        stamp: Stamp,
        in_sync: BTreeSet<NodeId>,
        fua: bool,
    },
    /// The client was told that the write failed.
    WriteFailed {
        write: u64,
    },
    Flush {
        flush: u64,
        volume: VolumeId,
    },
    FlushAcked {
        flush: u64,
        node: NodeId,
        group: GroupId,
        stamp: Stamp,
    },
    Read {
        read: u64,
        volume: VolumeId,
        range: BlockRange,
    },
    /// One value per block of the range.
    ReadAnswered {
        read: u64,
        node: NodeId,
        group: GroupId,
        stamp: Stamp,
        in_sync: BTreeSet<NodeId>,
        values: Vec<Value>,
    },
    /// The client of these volumes is gone, with everything it had under way.
    ClientGone {
        volumes: Vec<VolumeId>,
    },
    /// The node lost power, and its disk what was not flushed.
    PowerCut {
        node: NodeId,
    },
    /// An authority record counts: it is committed in the log of some node.
    Record {
        group: GroupId,
        volumes: Vec<VolumeId>,
        record: GroupRecord,
    },
    /// The data plane of the node says that it serves the group as primary, or does no longer (dead ones do not).
    Serving {
        node: NodeId,
        group: GroupId,
        stamp: Stamp,
        serving: bool,
    },
    /// The node's data plane stands still (its process is stopped) or goes on.
    Stopped {
        node: NodeId,
        stopped: bool,
    },
    RunStarted {
        vm: VmId,
        incarnation: Incarnation,
        node: NodeId,
    },
    /// The guest's processor stands still, or goes on.
    RunStopped {
        vm: VmId,
        incarnation: Incarnation,
        node: NodeId,
        stopped: bool,
    },
    RunEnded {
        vm: VmId,
        incarnation: Incarnation,
        node: NodeId,
    },
    /// All is healed and quiet: this is what the replica holds. Blocks not named are not stored.
    Replica {
        node: NodeId,
        volume: VolumeId,
        in_sync: bool,
        blocks: BTreeMap<u64, (Value, BlockChecksum)>,
    },
    /// What a trailing replica would serve if it were promoted now, after a power cut. What is not named reads as zeros.
    Cut {
        node: NodeId,
        group: GroupId,
        values: BTreeMap<(VolumeId, u64), Value>,
    },
    /// Somebody asks for a snapshot of the group.
    SnapshotAsked {
        group: GroupId,
        name: String,
    },
    /// The log of some node says that it is taken.
    SnapshotTaken {
        group: GroupId,
        name: String,
    },
    /// What a replica in sync holds of a snapshot that was taken, by the volumes that it is of. What is not named reads as zeros.
    /// None: it does not have it.
    Snapshot {
        node: NodeId,
        group: GroupId,
        name: String,
        values: Option<BTreeMap<(VolumeId, u64), Value>>,
    },
    /// A disk or a peer is given a block of an encrypted volume as a guest wrote it.
    InTheClear {
        node: NodeId,
        volume: VolumeId,
        block: u64,
    },
    /// The log of some node says that the volumes went back: from now on they hold this, for certain. What is not named reads as
    /// zeros. Numbers are of those of writes.
    RolledBack {
        rollback: u64,
        group: GroupId,
        volumes: Vec<VolumeId>,
        values: BTreeMap<(VolumeId, u64), Value>,
    },
    /// All is healed and quiet: what a replica of a clone holds, and what the snapshot held of which it was made.
    Clone {
        node: NodeId,
        volume: VolumeId,
        expected: BTreeMap<u64, Value>,
        found: BTreeMap<u64, Value>,
    },
    /// What the disks of an in-sync replica and of one that is behind say at some moment: extents that differ, and those
    /// that a resync would compare.
    Behind {
        volume: VolumeId,
        source: NodeId,
        behind: NodeId,
        differing: BTreeSet<ExtentIndex>,
        candidates: BTreeSet<ExtentIndex>,
    },
}
