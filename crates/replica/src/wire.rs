//! The replication wire: `docs/wire-format.md`.
//!
//! A connection begins with a `Hello` each way, then frames and words of the links. A frame is a fixed header with its
//! own checksum, a small body (postcard), then block checksums, then blocks. The codec is pure: bytes in, frames out.
//!
//! Within one session frames arrive in the order in which they were sent, each at most once; a session may end at any
//! point. The numbers in the headers see to that over several connections (`links`), and the order is relied upon.
//!
//! Nothing a peer sends is trusted further than this: lengths are bounded before memory is taken, bodies are parsed, and
//! ranges are held against the volume's size by whoever handles the message.

mod codec;
mod hello;

pub use codec::{Decoder, WireError, encode, encode_onto, encode_word};
pub use hello::{HELLO_BYTES, Hello, KEYS_MAX, KeyId, agree, check_start, decode_hello, encode_hello};

use crate::image::Mark;
use pollux_base::record::GroupSpec;
use pollux_base::unit::{BlockRange, EXTENT_BYTES};
use pollux_base::{BlockChecksum, Data, ExtentIndex, GroupId, Stamp, VolumeId};
use serde::{Deserialize, Serialize};

/// The version this program speaks. Fixtures in `tests/wire.rs` freeze it: another layout is another version.
pub const WIRE_VERSION: u16 = 3;
/// Largest body. A `Join` that lists extents is the only long one and is widened until it fits (`JOIN_RUNS_MAX`).
pub const BODY_BYTES_MAX: usize = 1 << 20;
/// Most data in one frame: an extent.
pub const DATA_BYTES_MAX: usize = EXTENT_BYTES as usize;
/// Most block checksums in one frame: those of an extent.
pub const CHECKSUMS_MAX: usize = DATA_BYTES_MAX / pollux_base::unit::BLOCK_BYTES as usize;
/// Most runs of extents in one `Join`, over all volumes: at most 10 bytes each, so that they fit into a body.
pub const JOIN_RUNS_MAX: usize = 64 << 10;

/// One message with the blocks it carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub message: Message,
    /// One per block of `data`, or of the range of a `Compare`.
    pub checksums: Vec<BlockChecksum>,
    /// Whole blocks, in order.
    pub data: Option<Data>,
}

impl Frame {
    /// A message that carries no blocks.
    pub fn bare(message: Message) -> Frame {
        Frame { message, checksums: Vec::new(), data: None }
    }
    /// Checks each block against the checksum that travelled with it (W11). The error says which block is wrong.
    pub fn verify(&self) -> Result<(), WireError> {
        let Some(data) = &self.data else { return Ok(()) };
        let blocks = data.as_slice().chunks(pollux_base::unit::BLOCK_BYTES as usize);
        for (index, (block, expected)) in blocks.zip(&self.checksums).enumerate() {
            let actual = BlockChecksum::of(block);
            if actual != *expected {
                return Err(WireError::Block { index, expected: *expected, actual });
            }
        }
        Ok(())
    }
}

/// Where a frame stands in its channel, and what of the other direction has arrived at its sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub number: u64,
    /// Frames below this number have arrived.
    pub received: u64,
}

/// What a connection carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Carried {
    pub place: Place,
    pub what: What,
}

#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(clippy::large_enum_variant, reason = "nearly all are frames")]
pub enum What {
    Frame(Frame),
    Word(Word),
}

/// What the links of two nodes say to each other, unnumbered, of the connection on which it is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Word {
    /// From the node with the lower id: this connection is to carry the channel. `fresh`: the receiver may not know it yet.
    /// Answered by the same or by `Unknown`.
    Begin {
        channel: u64,
        fresh: bool,
    },
    /// The channel is over here.
    Unknown {
        channel: u64,
    },
    /// Answered at once by `Pong`.
    Ping,
    Pong,
    /// Only to say what has been received.
    Ack,
    /// Said on another path: on those of this rank nothing is heard. What is heard on them proves nothing then.
    Silent {
        rank: u8,
    },
}

/// Matches an answer to its question: unique among all questions of one sender's run.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Sequence(pub u64);

impl From<Sequence> for u64 {
    fn from(sequence: Sequence) -> u64 {
        sequence.0
    }
}

/// What is said. Apart from leases, which are between nodes, every message names its group and the stamp of the record
/// under which it was said; what was said under an older record than the newest known is refused (W2).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// A primary asks for the right to serve for `timing::LEASE` from when it sent this (W5).
    LeaseAsk {
        number: u64,
    },
    /// Granted, but for the groups of which the giver knows a newer record under which the asker is not primary.
    LeaseGrant {
        number: u64,
        refused: Vec<GroupId>,
    },
    /// The newest record the sender knows. If the sender is its primary, it asks the receiver for a `Join`.
    Announce {
        spec: Box<GroupSpec>,
    },
    /// The sender knows of a newer record than was announced, but (just started) not what it says.
    Newer {
        group: GroupId,
        stamp: Stamp,
    },
    /// To the primary of the record `stamp`, which the sender has durably adopted: how the sender's replica stands, and
    /// the extents which are hot there or changed there beyond its standing (W8).
    Join {
        group: GroupId,
        stamp: Stamp,
        standing: Standing,
        extents: Vec<(VolumeId, Vec<ExtentRun>)>,
    },
    /// Data for the blocks of `range`, which lies in one extent. Answered by `Done`. `fua`: flush before answering.
    Write {
        group: GroupId,
        stamp: Stamp,
        sequence: Sequence,
        volume: VolumeId,
        range: BlockRange,
        fua: bool,
    },
    /// The range reads as zeros afterwards. Answered by `Done`.
    Zero {
        group: GroupId,
        stamp: Stamp,
        sequence: Sequence,
        volume: VolumeId,
        range: BlockRange,
        fua: bool,
    },
    /// Everything answered before this survives a power cut. Answered by `Done`.
    Flush {
        group: GroupId,
        stamp: Stamp,
        sequence: Sequence,
    },
    /// Asked of a member when the primary has no good copy. Answered by `ReadData` or `Refused`.
    ReadAsk {
        group: GroupId,
        stamp: Stamp,
        sequence: Sequence,
        volume: VolumeId,
        range: BlockRange,
    },
    ReadData {
        group: GroupId,
        stamp: Stamp,
        sequence: Sequence,
    },
    /// The sender's checksums of the blocks of `range`, which lies in one extent. Answered by `Differs`.
    Compare {
        group: GroupId,
        stamp: Stamp,
        sequence: Sequence,
        volume: VolumeId,
        range: BlockRange,
    },
    /// Blocks of the compared range that are not the same here, as runs in the volume.
    Differs {
        group: GroupId,
        stamp: Stamp,
        sequence: Sequence,
        runs: Vec<BlockRange>,
    },
    /// The extents are the same on every replica that counts, and nothing is in flight: their marks may be taken back.
    /// `reap`: every replica counts, so that nothing needs to be kept of extents that were emptied.
    Cool {
        group: GroupId,
        stamp: Stamp,
        volume: VolumeId,
        extents: Vec<ExtentIndex>,
        reap: bool,
    },
    /// The receiver holds every acknowledged write and is needed for every further one: it flushes, notes this, and
    /// answers `Done`. Only then may a record name it (W9).
    Current {
        group: GroupId,
        stamp: Stamp,
        sequence: Sequence,
    },
    /// What was asked is done.
    Done {
        group: GroupId,
        stamp: Stamp,
        sequence: Sequence,
    },
    /// The pool here is full: what was asked is held and done when there is space.
    Held {
        group: GroupId,
        stamp: Stamp,
        sequence: Sequence,
    },
    /// What was asked is not done.
    Refused {
        group: GroupId,
        stamp: Stamp,
        sequence: Sequence,
        why: Refusal,
    },
    /// From a replica in mode `Memory`: a change was checked and has its place in the order of its blocks; it is written
    /// whatever becomes of session and record. `Done` follows when it is.
    Received {
        group: GroupId,
        stamp: Stamp,
        sequence: Sequence,
    },
    /// Asked of a member by a scrub: which extents are stored there. Answered by `Stored`.
    StoredAsk {
        group: GroupId,
        stamp: Stamp,
        sequence: Sequence,
    },
    Stored {
        group: GroupId,
        stamp: Stamp,
        sequence: Sequence,
        extents: Vec<(VolumeId, Vec<ExtentRun>)>,
    },
    /// Asked of a member by a scrub: to read its own copy of the range, which lies in one extent. Answered by `Verified`.
    Verify {
        group: GroupId,
        stamp: Stamp,
        sequence: Sequence,
        volume: VolumeId,
        range: BlockRange,
    },
    /// Blocks of the range that do not match their checksums there.
    Verified {
        group: GroupId,
        stamp: Stamp,
        sequence: Sequence,
        bad: Vec<BlockRange>,
    },
    /// To a replica that is about to be compared: it notes that it is no cut (any more), forgets what it has not applied, and
    /// answers `Done`. If it is to trail, changes after `from` in this run follow.
    TrailReset {
        group: GroupId,
        stamp: Stamp,
        sequence: Sequence,
        run: TrailRun,
        from: TrailPoint,
    },
    /// To a trailing replica: a piece of a change (inside one extent), or without data a range that reads as zeros. In the
    /// order in which changes were acknowledged; `end` is the newest of them, `is_last` the end of a change. Answered by
    /// `Trailed` when it is durable.
    Trail {
        group: GroupId,
        stamp: Stamp,
        run: TrailRun,
        point: TrailPoint,
        end: TrailPoint,
        volume: VolumeId,
        range: BlockRange,
        is_last: bool,
    },
    /// To a trailing replica: having applied what was sent before this, it holds everything of the generations before that
    /// of `at`, and a prefix of what was acknowledged since: it is a cut.
    TrailMark {
        group: GroupId,
        stamp: Stamp,
        run: TrailRun,
        at: Stamp,
    },
    /// To the primary: everything up to this position is durable here.
    Trailed {
        group: GroupId,
        stamp: Stamp,
        run: TrailRun,
        position: u64,
    },
    /// The receiver freezes each volume under the second name. It has flushed what it holds, and nothing was written since.
    /// Answered by `Done` when that is durable; asked again it answers at once.
    Snapshot {
        group: GroupId,
        stamp: Stamp,
        sequence: Sequence,
        of: Vec<(VolumeId, VolumeId)>,
    },
    /// The first message of a session, and again with leases: how far the sender's pool has come, and how far it has seen
    /// the receiver's.
    Pool {
        mark: Box<Mark>,
        known: Option<Box<Mark>>,
    },
    /// The extents are about to be written: their marks may be made durable while the primary makes its own. No promise: a
    /// change marks what is not.
    Heat {
        group: GroupId,
        stamp: Stamp,
        volume: VolumeId,
        extents: Vec<ExtentIndex>,
    },
}

/// How a replica stands to the record it joins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Standing {
    /// The record names it, and it was last in sync by the record `at` (which may be older). `blank`: nothing was ever
    /// written to it. `continuous`: since it was last told that it is current, its node has not lost power, so it has
    /// everything that was acknowledged, flushed or not.
    InSync { at: Stamp, blank: bool, continuous: bool },
    /// The record names it because nothing exists yet, which the other replicas have not confirmed (W12).
    Born,
    /// It lacks writes since it was last in sync; `None`: it never was.
    Stale { since: Option<Stamp> },
    /// The record names it, but there is nothing here: its disk was replaced. It must not count (W12).
    Empty,
    /// It holds writes that the lineage lacks (W10).
    Diverged { own: Stamp },
    /// Its disk is out of use.
    Failed { reason: String },
    /// It carries no replica of the group, or not any more.
    Absent,
    /// Not in sync, but a state that the group had: it holds everything of the generations before that of `at`, and in the
    /// primary's `run` everything up to `position`.
    Trailing { at: Stamp, run: TrailRun, position: u64 },
}

/// One run of a primary, within which positions count its acknowledged changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrailRun {
    /// The record under which it began.
    pub stamp: Stamp,
    /// The boot of its machine, and when in it its process began, in nanoseconds.
    pub boot: u128,
    pub started: u64,
}

/// A place in the stream of acknowledged changes of one run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrailPoint {
    /// Number of the change, from 1.
    pub position: u64,
    /// Bytes of all changes up to it.
    pub bytes: u64,
    /// When it was acknowledged, since the run began.
    pub ms: u64,
}

/// Why something was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// Said under an older record than is known here, whose stamp the answer names (W2).
    Outdated,
    /// The replica here does not take part (diverged, empty or failed).
    Unfit,
    /// The blocks here do not match their checksums.
    Corrupt,
    /// The range is outside the volume or the message contradicts itself.
    Invalid,
    /// There is no room here for what was asked, and waiting would not help.
    NoRoom,
}

/// Adjoining extents: `start .. start + count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtentRun {
    pub start: ExtentIndex,
    pub count: u32,
}
