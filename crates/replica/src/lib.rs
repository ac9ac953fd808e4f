//! CORE: replication of groups on one node.
//!
//! `DataPlane` owns the node's `Store` and one small machine per group and per peer. The shell carries disk operations,
//! frames and requests; the simulator carries the same values. Rules W1-W12 of `docs/ARCHITECTURE.md` live here; each is
//! named where it is kept.

pub mod cipher;
mod cooling;
mod data_plane;
mod diff;
mod disks;
#[doc(hidden)]
pub mod fuzz;
mod group;
mod handshake;
mod image;
mod kept;
mod key_map;
mod lease;
pub mod links;
mod local;
mod loss;
mod memory;
mod names;
mod node;
mod note;
mod pace;
mod primary;
mod range_queue;
mod repair;
mod report;
mod requests;
mod resync;
mod scrub;
mod secondary;
mod showing;
mod snapshot;
mod space;
mod spool;
mod touched;
mod trail;
mod trailing;
mod verdict;
mod verifying;
pub mod wire;

pub use data_plane::DataPlane;
pub use image::{Mark, take_as_stale};
pub use names::names;
pub use note::{Newer, Noted, noted};

use pollux_base::{
    ByteCount, ClusterId, DiskDone, DiskId, DiskIndex, DiskOp, NodeId, Order, Reply, Report, Request, RequestId,
    Session, VolumeId,
};
use pollux_store::{DiskChange, Position};
use std::collections::BTreeMap;
use wire::Frame;

/// Who this node is and where its pool ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub cluster: ClusterId,
    pub node: NodeId,
    /// Sizes of the pool's disks, in the order of their numbers.
    pub disks: Vec<ByteCount>,
    /// Where they were found, for people; may be empty.
    pub paths: Vec<String>,
    /// Random number of this boot of the machine. What was written in the same boot is still there, flushed or not: the
    /// process may have died since, the power has not gone.
    pub boot: u128,
    /// How far the shell has seen the pool's disks.
    pub seen: BTreeMap<DiskId, Position>,
}

#[derive(Clone, Debug)]
pub enum Input {
    Disk(DiskDone),
    /// A connection to the peer is up and both sides have named cluster, node and wire version to each other. `session`
    /// is larger than any before for this peer on this node; an earlier session of the peer is thereby over.
    LinkUp {
        peer: NodeId,
        session: Session,
    },
    LinkDown {
        peer: NodeId,
        session: Session,
    },
    /// A frame that arrived whole and undamaged on this session.
    Frame {
        peer: NodeId,
        session: Session,
        frame: Frame,
    },
    Order(Box<Order>),
    /// Of the pool's disks; answered by a report of this number. What joins is open under the number that `next_disk` of the store gave.
    DiskChange {
        id: u64,
        change: DiskChange,
    },
    /// Held while the group is frozen; answered by exactly one `Reply` unless the client goes away.
    Request(Request),
    /// The client is gone: its replies need not be given. What was begun is still finished.
    Abandon(RequestId),
    /// Time has passed; to be given when `deadline` is reached.
    Tick,
}

#[derive(Clone, Debug)]
pub enum Output {
    Disk(DiskOp),
    Send {
        peer: NodeId,
        session: Session,
        frame: Frame,
    },
    /// The connection is of no use (a protocol error, a late peer): end it, and connect anew.
    Disconnect {
        peer: NodeId,
        session: Session,
        reason: String,
    },
    Report(Report),
    /// Nothing more is asked of this disk.
    CloseDisk(DiskIndex),
    Reply(RequestId, Reply),
    /// Whether front ends may take clients for this volume here: this node is (or was just ordered to be) its primary.
    /// Requests may be held for a while after `served: true`. After `false` its clients are to be disconnected.
    Served {
        volume: VolumeId,
        served: bool,
    },
}
