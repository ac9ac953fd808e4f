//! Words between guards, and between a guard and its `noded`.

use crate::id::NodeId;
use crate::unit::Epoch;
use serde::{Deserialize, Serialize};

/// One of the node's networks, by its place in the configuration (0: storage, 1: management).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Network(pub u8);

/// What a node tells its peers several times a second, on each network. The shell signs and checks it (keyed blake3
/// with the cluster's secret) and drops what does not verify.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    pub from: NodeId,
    /// Random number of this run of the guard: numbers of an earlier run are told apart.
    pub boot: u64,
    /// Grows with each heartbeat sent to this peer.
    pub sequence: u64,
    pub epoch: Epoch,
    /// Newest heartbeat of the receiver that was heard by the sender, on this network: its boot and sequence.
    pub heard: Option<(u64, u64)>,
}

/// What `noded` tells its guard, as JSON lines on a unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum GuardCommand {
    /// The members of the cluster, and under which epoch this node acts.
    Members { epoch: Epoch, peers: Vec<NodeId> },
    /// This node goes on alone under a grant for this epoch: its lease needs no peer. An older epoch changes nothing.
    Alone { epoch: Epoch },
    /// This node is known to be outdated (a newer epoch exists without it): the lease ends now.
    Surrender { epoch: Epoch },
}

/// What the guard sees, for `noded`: sent at each change, and at least twice a second while `noded` is connected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuardView {
    pub peers: Vec<PeerView>,
    /// Whether guests may run on this node now.
    pub lease_held: bool,
    /// How often this guard has killed the node's guests since it started.
    pub kills: u64,
    /// The newest command that is in effect; `None`: no `noded` has spoken since this boot of the node. Tells `noded` what
    /// to say again, and proves to it that the guard acts under an epoch before others are told of it.
    pub command: Option<GuardCommand>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerView {
    pub node: NodeId,
    /// Milliseconds since the peer was last heard on any network; `None`: never since this guard started.
    pub heard_ms: Option<u64>,
    /// Networks that work in both directions.
    pub networks: Vec<Network>,
    /// The newest epoch the peer named.
    pub epoch: Epoch,
}
