//! What goes into the core and what comes out: the seam that `noded` and the simulator both carry.

use crate::entry::{Change, Entry, NodeSpec, VmSpec};
use crate::kept::KeptCommand;
use pollux_base::config::PowerConfig;
use pollux_base::guard::{GuardCommand, GuardView};
use pollux_base::order::{Differences, DiskCommand};
use pollux_base::pool::PoolReport;
use pollux_base::{
    Epoch, ExtentIndex, GroupId, ImageId, Incarnation, KeyId, NodeId, Order, Report, SealedKey, VmId, VolumeId,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The value of the cluster's register at the witness.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Register {
    pub epoch: Epoch,
    /// `None`: both (all members). `Some`: this node went on alone.
    pub alone: Option<NodeId>,
}

/// This node's own durable word on the authority under which it last acted; kept outside the log, because the log is
/// forced by it. Saved before it is acted upon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochRecord {
    pub epoch: Epoch,
    /// This node holds the grant for `epoch` alone.
    pub alone: bool,
    /// This node gave up (or is about to give up) its log in favour of that newer epoch: it has no right to anything until
    /// it is a member again.
    pub gave_up: Option<Epoch>,
}

/// How a peer introduces itself, both ways, on the control connection; sent anew whenever it changes, at least each second.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerHello {
    pub node: NodeId,
    pub epoch: Epoch,
    pub alone: bool,
    /// Since when (wall clock, for people) the sender acts under this epoch.
    pub since_unix_ms: u64,
    /// A fresh or outdated node that has no log (any more), whose guests are dead, and that asks to be taken in.
    pub wants_to_join: bool,
    /// How its pool is doing, once its data plane has said so.
    #[serde(default)]
    pub pool: Option<PoolReport>,
    /// Name of the master key that it has, for volumes that are encrypted at rest.
    #[serde(default)]
    pub master: Option<KeyId>,
    /// Name of the one that it has beside it, to follow it.
    #[serde(default)]
    pub master_successor: Option<KeyId>,
}

/// What a core is told at its start.
#[derive(Clone, Debug)]
pub struct Setup {
    pub node: NodeId,
    /// The cluster as configured: its first state, and later who is waited for.
    pub name: String,
    pub nodes: BTreeMap<NodeId, NodeSpec>,
    /// Whether a witness is configured.
    pub witness: bool,
    /// What `Output::SaveEpoch` last saved. `None`: this node was never a member of anything.
    pub record: Option<EpochRecord>,
    /// Name of the master key that this node has, if it has one, and of the one that is to follow it.
    pub master: Option<KeyId>,
    pub master_successor: Option<KeyId>,
    /// Random number of this run of `noded`.
    pub run: u64,
    pub unix_ms: u64,
}

#[derive(Clone, Debug)]
pub enum Input {
    /// An entry is committed; they come in order, each once, also those replayed after a restart.
    Committed {
        index: u64,
        entry: Entry,
    },
    /// The state as of `index`, when the log before it is gone. Replaces everything applied.
    Snapshot {
        index: u64,
        state: Box<crate::State>,
    },
    /// The log's leader and voters as this node knows them.
    Log {
        leader: Option<NodeId>,
        voters: Vec<NodeId>,
        learners: Vec<NodeId>,
    },
    /// `Output::GiveUpLog` is done: what is committed from now on belongs to the new log, told from its beginning. What comes
    /// before this is ignored.
    LogGivenUp {
        epoch: Epoch,
    },
    /// An API request that changes something: validated here, answered by exactly one `Output::Answer`. A `node` of 0 in
    /// a creation lets the core choose. Numbers are not used twice within one run.
    Request {
        request: u64,
        unix_ms: u64,
        change: Box<Change>,
    },
    /// What the guard sees. Where several are waiting, only the newest is given: an old one would look like silence.
    Guard(GuardView),
    /// The connection to the guard is lost.
    GuardGone,
    Peer(PeerHello),
    /// The control connection to the peer is lost.
    PeerGone(NodeId),
    /// The witness' answer to the newest `AskWitness`; `Err`: not reached or refused, with the reason for people.
    Witness {
        ask: u64,
        result: Result<WitnessAnswer, String>,
    },
    EpochSaved(EpochRecord),
    Fence {
        node: NodeId,
        result: Result<(), String>,
    },
    /// The connection to `blockd` is up: everything is ordered anew, `ReportAll` first.
    DataConnected,
    /// What the local data plane reports; `None`: the connection to `blockd` is lost.
    Data(Option<Report>),
    Vm(VmEvent),
    /// A human confirms, with the token shown by `State::confirm_token`, that a node is down.
    ConfirmDown {
        request: u64,
        node: NodeId,
        token: String,
    },
    /// A human changes the disks of this node's pool. Answered like a request. `accepts_loss`: also if no other replica has what is lost.
    Disk {
        request: u64,
        command: DiskCommand,
        accepts_loss: bool,
    },
    /// `Output::OpenKey` came to nothing.
    KeyRefused {
        key: KeyId,
        reason: String,
    },
    /// A human wants something of what this node keeps of replicas. Answered like a request.
    Kept {
        request: u64,
        command: KeptCommand,
    },
    /// The metadata of this node's pool is to be verified while it is used. Answered like a request, with the number of the run, as
    /// soon as it is ordered; `Cluster::verified` tells how far it is.
    Verify {
        request: u64,
    },
    /// In which blocks do these two volumes of snapshots differ, from this extent on? Answered like a request.
    Compare {
        request: u64,
        group: GroupId,
        one: VolumeId,
        two: VolumeId,
        from: ExtentIndex,
    },
    /// Time passed.
    Tick {
        unix_ms: u64,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WitnessAnswer {
    /// The swap was made, or had been made before by us.
    Swapped(Register),
    /// The register holds something else.
    Holds(Register),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// The cluster is born: make a log with these voters. Asked of one node, when all nodes are fresh and in contact.
    InitLog {
        voters: Vec<NodeId>,
    },
    /// Put this into the log (forwarded to the leader if that is another node). May be lost: asked again when still needed.
    Propose(Entry),
    Answer {
        request: u64,
        result: Result<Answer, Refusal>,
    },
    /// Compare-and-swap at the witness; with `set: None` only read, answered by `Holds`. A cluster that the witness has not
    /// seen has the register `(0, None)`. Answered within seconds, with `Err` if the witness is not reached.
    AskWitness {
        ask: u64,
        expect: Register,
        set: Option<Register>,
    },
    SaveEpoch(EpochRecord),
    /// Make this node the only voter of its own log, now, whatever the others say (after `EpochSaved` of an `alone`).
    /// Doing it twice changes nothing; repeated until seen in `Input::Log`.
    ForceAlone {
        epoch: Epoch,
    },
    /// This node is outdated: give up the log and state, which `from` will send anew; then `Input::LogGivenUp`. The log's
    /// store keeps the epoch for which it was last emptied, and does not do it twice for one epoch.
    GiveUpLog {
        from: NodeId,
        epoch: Epoch,
    },
    /// Take the peer in, first as a learner, then as a voter. Repeated until seen in `Input::Log`.
    TakeIn {
        node: NodeId,
    },
    /// Switch this node off and read back that it is off.
    Fence {
        node: NodeId,
        power: PowerConfig,
    },
    Guard(GuardCommand),
    Data(Order),
    /// Open this key and hand it to the data plane (`Order::VolumeKey`), before what comes after this.
    OpenKey(SealedKey),
    Vm(VmCommand),
    /// Copy an image's volume into a VM's first disk, by their export names, then answer `VmEvent::Filled`. Asked of the
    /// node that is primary of the VM's group; the image may be served by another.
    Fill {
        vm: VmId,
        from: (ImageId, String),
        to: (VolumeId, String),
    },
}

/// The end of a request that changed something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Done,
    Created {
        id: u64,
    },
    /// Of `Input::Compare`.
    Differ(Differences),
}

/// Why a request is refused; each becomes one exit code and a hint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(tag = "refusal", content = "text", rename_all = "snake_case")]
pub enum Refusal {
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    Conflict(String),
    /// It would endanger data or run something twice.
    #[error("{0}")]
    Unsafe(String),
    /// Nobody may decide at present.
    #[error("{0}")]
    NoQuorum(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmCommand {
    /// Run the VM under this incarnation. If it already runs under it, nothing is done.
    Start { vm: VmId, incarnation: Incarnation, spec: VmSpec, volumes: Vec<(VolumeId, String)> },
    /// Ask the guest to shut down (ACPI power button).
    Shutdown { vm: VmId },
    /// End QEMU now.
    Stop { vm: VmId },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmEvent {
    /// QEMU runs and was told to go on. Also for those found again after a restart of `noded`.
    Running {
        vm: VmId,
        incarnation: Incarnation,
    },
    /// QEMU is gone. `by_guest`: the guest shut itself down.
    Ended {
        vm: VmId,
        incarnation: Incarnation,
        by_guest: bool,
        detail: String,
    },
    /// Every QEMU found when `noded` started, complete; sent once, before any other event. A VM that the log says runs
    /// here and that is not named has ended.
    Found {
        running: Vec<(VmId, Incarnation)>,
    },
    StartFailed {
        vm: VmId,
        incarnation: Incarnation,
        reason: String,
    },
    /// The volume holds the image (or could not be filled).
    Filled {
        vm: VmId,
        result: Result<(), String>,
    },
}
