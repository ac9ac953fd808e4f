//! Entries of the cluster log. Applying one is a pure function of the state and the entry, so every node comes to the
//! same state. Entries that change authority name what they expect and change nothing when it is not so: proposing one
//! twice, or late, is harmless.

use pollux_base::config::PowerConfig;
use pollux_base::order::{Finding, ScrubReport};
use pollux_base::record::{LagBound, Mode};
use pollux_base::{
    ByteCount, Epoch, GroupId, ImageId, Incarnation, KeyId, NodeId, SealedKey, SnapshotId, Stamp, VmId, VolumeId,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// An entry, who proposed it and when by that node's wall clock (for people; decides nothing).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    pub by: NodeId,
    pub unix_ms: u64,
    /// Answers the API request that caused it, if one did.
    pub request: Option<u64>,
    pub change: Change,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "snake_case")]
pub enum Change {
    /// First entry: the cluster and its nodes.
    Init {
        name: String,
        nodes: BTreeMap<NodeId, NodeSpec>,
        witness: bool,
    },
    /// The membership authority changed hands. `expect` is the epoch it follows.
    RaiseEpoch {
        expect: Epoch,
        epoch: Epoch,
        holder: Holder,
        proof: Proof,
    },
    /// A node was proven unable to act, or came back.
    NodePhase {
        node: NodeId,
        epoch: Epoch,
        phase: NodePhase,
        proof: Option<FenceProof>,
    },
    /// An image is a mirrored volume of its own group, filled by the node that took the upload. Not usable before ready.
    CreateImage {
        name: String,
        size: ByteCount,
        node: NodeId,
        /// Encrypted at rest with this new key.
        #[serde(default)]
        key: Option<SealedKey>,
    },
    ImageReady {
        image: ImageId,
        sha256: String,
    },
    DeleteImage {
        image: ImageId,
    },
    /// A VM with its disks: one group, one volume per disk. The primary of the new group and the VM's first node: `node`.
    CreateVm {
        spec: VmSpec,
        node: NodeId,
        /// Its disks are encrypted at rest, each with a new key of its own; or none is.
        #[serde(default)]
        keys: Vec<SealedKey>,
    },
    /// Only when no run of it can exist.
    DeleteVm {
        vm: VmId,
    },
    /// What the user wants of the VM.
    WantVm {
        vm: VmId,
        wanted: Wanted,
    },
    /// What became of the VM. Changes nothing unless `expect` is the VM's present incarnation and phase change is legal.
    VmPhase {
        vm: VmId,
        expect: Incarnation,
        incarnation: Incarnation,
        node: NodeId,
        phase: VmPhase,
        reason: String,
    },
    /// A volume of its own group, not of a VM.
    CreateVolume {
        name: String,
        size: ByteCount,
        node: NodeId,
        /// Encrypted at rest with this new key.
        #[serde(default)]
        key: Option<SealedKey>,
    },
    DeleteVolume {
        volume: VolumeId,
    },
    ExportVolume {
        volume: VolumeId,
        exported: bool,
    },
    /// All volumes of the group at one point, under a name that is unique within it. It counts when it is taken.
    CreateSnapshot {
        group: GroupId,
        name: String,
    },
    /// Every required replica has it; or one can not have it, and it is given up. Changes nothing if that is known already.
    SnapshotEnded {
        snapshot: SnapshotId,
        result: Result<(), String>,
    },
    DeleteSnapshot {
        snapshot: SnapshotId,
    },
    /// All volumes that it is of hold again what it holds. Nobody may use them meanwhile.
    RollBack {
        snapshot: SnapshotId,
    },
    /// A volume of its own group that begins as a copy of a snapshot's.
    CloneVolume {
        of: VolumeId,
        name: String,
    },
    /// A VM like the one that the snapshot is of, whose disks begin as copies of it.
    CloneVm {
        snapshot: SnapshotId,
        name: String,
    },
    /// The copies are there, on every replica in sync. Changes nothing if that is known already.
    Cloned {
        group: GroupId,
    },
    /// It never shrinks.
    ResizeVolume {
        volume: VolumeId,
        size: ByteCount,
    },
    /// New authority record of a group. Changes nothing unless `expect` is the group's present stamp. The new stamp is the
    /// present epoch and the generation after `expect`'s.
    SetGroup {
        group: GroupId,
        expect: Stamp,
        primary: NodeId,
        in_sync: BTreeSet<NodeId>,
        reason: String,
    },
    /// The group's replicas are to be scrubbed. Changes nothing while a scrub is wanted already, or if the number of the newest
    /// wish is not `expect` (a scrub that is due is proposed again and again).
    ScrubGroup {
        group: GroupId,
        expect: Option<u64>,
    },
    /// How often the group is scrubbed by itself; 0: never.
    ScrubEvery {
        group: GroupId,
        days: u32,
    },
    /// The scrub that was wanted has ended so.
    Scrubbed {
        group: GroupId,
        report: ScrubReport,
    },
    /// Bad blocks were found by the data plane of this entry's node. Changes nothing when that was told already.
    Found {
        group: GroupId,
        finding: Finding,
    },
    /// The mode of some replicas of a group. One that becomes `async` leaves the in-sync set.
    SetMode {
        group: GroupId,
        nodes: BTreeSet<NodeId>,
        mode: Mode,
    },
    /// How far trailing replicas of the group may be behind.
    SetLag {
        group: GroupId,
        lag: LagBound,
    },
    /// One more node carries a replica; it is filled like any stale one.
    AddReplica {
        group: GroupId,
        node: NodeId,
        mode: Mode,
    },
    /// The node carries none any more: erased there when it hears of this record.
    RemoveReplica {
        group: GroupId,
        node: NodeId,
    },
    /// `to` is to carry what `from` carries; `from` is removed when it does (`moves.rs`).
    MoveReplica {
        group: GroupId,
        from: NodeId,
        to: NodeId,
    },
    /// Both replicas stay as they are.
    CancelMove {
        group: GroupId,
    },
    /// The new replica is ready by the record `expect`. Changes nothing unless that is the present one.
    FinishMove {
        group: GroupId,
        expect: Stamp,
    },
    /// A human makes a trailing replica the truth, because every replica in sync is lost. `at`: the record by which it trails,
    /// filled in by its node, which alone holds the token against what it knows.
    PromoteReplica {
        group: GroupId,
        node: NodeId,
        at: Stamp,
        token: String,
    },
    /// A human lets a diverged replica be overwritten (W10).
    DiscardReplica {
        group: GroupId,
        node: NodeId,
        loser: Stamp,
    },
    /// The VM's first disk holds its image; from now on it may be started.
    VmFilled {
        vm: VmId,
    },
    /// This run of a node's `noded` follows the log. When it sees its own entry committed it has applied everything that
    /// was decided before, and may act on it; until then it replays, and acts on nothing.
    Awake {
        node: NodeId,
        run: u64,
    },
    /// Keys of volumes, sealed anew under this master key, which is that of all keys from now on. Changes nothing unless `expect` is
    /// the number of the last such entry.
    SealKeys {
        expect: Option<u64>,
        master: KeyId,
        keys: Vec<SealedKey>,
    },
    /// Something worth telling `pollux why`, without other effect.
    Note {
        subject: Subject,
        text: String,
    },
}

/// Who may decide for the cluster under an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "holder", rename_all = "snake_case")]
pub enum Holder {
    /// All members, by majority of the log.
    Members,
    /// This node alone, under a grant.
    Alone { node: NodeId },
}

/// Why a side may go on alone (section 3).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "proof", rename_all = "snake_case")]
pub enum Proof {
    /// The witness' register was swapped from `(epoch, both)` to `(epoch + 1, me)`.
    Witness,
    /// A human typed the token that names what may be lost.
    Human { token: String },
    /// The members were all there.
    Members,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeSpec {
    pub name: String,
    /// Where the node's `noded` is reached by peers and clients, host:port.
    pub api: Vec<String>,
    /// Where its `blockd` listens for replication, most wanted first.
    pub replication: Vec<String>,
    /// Where its `blockd` serves NBD to other machines.
    pub nbd: Option<String>,
    /// Its power switch, if it has one.
    pub power: Option<PowerConfig>,
    pub memory_bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "snake_case")]
pub enum NodePhase {
    Online,
    /// Out of the membership; may still be acting until fenced or its bounds have run out.
    Lost,
    /// Proven unable to act.
    Fenced,
}

/// Evidence that a node can not act.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "evidence", rename_all = "snake_case")]
pub enum FenceProof {
    /// Power was switched off and read back as off.
    PowerOff { uuid: String },
    /// The guard's lease has run out by our clock: this many milliseconds since it was last heard.
    GuardBound { waited_ms: u64 },
    /// A human said so, with the token.
    Human { token: String },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpec {
    pub name: String,
    pub cpus: u32,
    pub memory: ByteCount,
    pub image: Option<ImageId>,
    pub disks: Vec<ByteCount>,
    /// Fixed at creation, so that the guest keeps its address. Empty in a request: made from the VM's id.
    pub mac: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wanted {
    Running,
    /// Shut down by the guest itself, or ended if it takes too long.
    Stopped,
    /// Ended at once, like a pulled plug.
    Off,
}

/// The life of a VM reads downwards; from `Recovering` it goes back to `Starting` under the next incarnation. The legal
/// steps are one table: `vm_life`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmPhase {
    Stopped,
    /// The node may start it, once, under this incarnation, while it holds its lease.
    Starting,
    Running,
    Stopping,
    /// Its run ended unasked, or its node was lost: then it starts elsewhere when that node is proven unable to act.
    Recovering,
    /// Given up after repeated failures; no run exists. A wish of the user makes it `Stopped` again.
    Failed,
}

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "subject", content = "id", rename_all = "snake_case")]
pub enum Subject {
    Cluster,
    Node(NodeId),
    Group(GroupId),
    Volume(VolumeId),
    Vm(VmId),
    Image(ImageId),
}
