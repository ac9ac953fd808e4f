//! What can be looked at. Ids are numbers of the cluster log; nodes, VMs, volumes and images are also known by name.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use utoipa::ToSchema;

/// A set of words: one meaning each, the same in JSON, tables and logs.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$word_doc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($(#[$word_doc])* $variant,)* }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(match self { $($name::$variant => $word,)* })
            }
        }
    };
}

/// Everything at one look, as the answering node sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// 32 hexadecimal digits.
    pub cluster: String,
    pub cluster_name: String,
    /// If a node dies now, what happens?
    pub headline: Headline,
    pub epoch: u64,
    /// The node that went on alone under a grant, while it does.
    pub alone: Option<String>,
    /// The node that leads the cluster log, if one is known.
    pub leader: Option<String>,
    /// The node that answered.
    pub answered_by: String,
    pub unix_ms: u64,
    pub nodes: Vec<Node>,
    pub groups: Vec<Group>,
    pub vms: Vec<Vm>,
    pub witness: Option<Witness>,
}

/// The answer to "if a node dies now, what happens?".
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Headline {
    pub protection: Protection,
    /// One sentence for people.
    pub text: String,
    /// What mends it: a command, or what is waited for.
    pub hint: Option<String>,
}

words! {
    /// The state of the cluster as a whole.
    Protection {
        /// Any one node may die: its VMs restart on the others with every acknowledged write.
        Protected = "protected",
        /// It would go on, with something less than promised.
        Degraded = "degraded",
        /// The death of a node would stop VMs or leave a decision to a human.
        Unprotected = "unprotected",
        /// Takeover is switched off by the operator.
        Disarmed = "disarmed",
    }
}

/// One server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Node {
    pub id: u64,
    pub name: String,
    pub state: NodeState,
    /// Why, when it is not `online`.
    pub reason: Option<String>,
    /// The command that mends it.
    pub hint: Option<String>,
    /// Whether it leads the cluster log.
    pub leader: bool,
    /// Whether it has a vote in the cluster log.
    pub voter: bool,
    /// Where its API listens.
    pub api: Vec<String>,
    /// Whether a power switch is configured for it.
    pub power_switch: bool,
    /// Connections between its data plane and that of the node that answers; none for that node itself.
    pub replication: Vec<ReplicationPath>,
    /// Whether replication is encrypted, as the node that answers is configured; none: not known yet.
    pub replication_encrypted: Option<bool>,
    /// Memory that guests may have together, and what the VMs placed here have.
    pub memory_bytes: u64,
    pub memory_used_bytes: u64,
}

/// A connection over which replicas follow each other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReplicationPath {
    /// Where the node with the higher id listens.
    pub address: String,
    pub state: PathState,
    /// Why, when it is not `up`.
    pub reason: Option<String>,
}

words! {
    PathState {
        /// Works in both directions.
        Up = "up",
        /// Does not answer; another one is used.
        Silent = "silent",
        Down = "down",
        /// The other side is there, but is not talked to.
        Refused = "refused",
    }
}

words! {
    NodeState {
        Online = "online",
        Maintenance = "maintenance",
        /// Not heard at present; nothing was decided yet.
        Suspect = "suspect",
        /// Being made provably unable to act.
        Fencing = "fencing",
        /// Proven unable to act.
        Down = "down",
        /// Alive but cut off from who decides.
        Isolated = "isolated",
        /// Being taken in.
        Joining = "joining",
    }
}

/// The space that a node gives to volumes. Sizes are of what volumes can take: metadata is not counted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Pool {
    pub node: String,
    pub state: PoolState,
    /// Why, when it is not `good`.
    pub reason: Option<String>,
    /// What mends it.
    pub hint: Option<String>,
    pub size_bytes: u64,
    pub used_bytes: u64,
    pub free_bytes: u64,
    /// Sizes of all volumes with a replica here: what they would take if they were filled.
    pub promised_bytes: u64,
    /// Bytes per second by which free space has been shrinking over the last minutes.
    pub growth_bytes_per_s: u64,
    /// Seconds until it is full at that rate, while it shrinks.
    pub full_in_s: Option<u64>,
    /// Blocks that did not match their checksums and were healed from a peer, since the data plane started.
    pub healed_blocks: u64,
    pub disks: Vec<PoolDisk>,
}

/// A state of a volume's replica that a node keeps, for itself alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Kept {
    /// What it is called: `v7-before-resync`, `v7-evidence-1`.
    pub kept: String,
    pub node: String,
    /// Name of the volume that it was.
    pub volume: String,
    /// The volume's group, by id.
    pub group: u64,
    pub reason: KeptReason,
    /// Size of the volume; it shares its space with the volume as far as both hold the same.
    pub size_bytes: u64,
    /// NBD addresses while it is exported, as far as the answering node knows: its own node does.
    pub uris: Vec<String>,
}

words! {
    /// Why it is kept.
    KeptReason {
        /// The last state before it fell out, while it is brought up to date; goes by itself then, and when space is needed.
        BeforeResync = "before_resync",
        /// What a diverged replica held that a human gave up; stays until it is deleted, or the replica is removed.
        Evidence = "evidence",
    }
}

/// The verification of a pool's metadata, while it is used.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PoolVerification {
    pub node: String,
    pub done: bool,
    /// Why it was given up.
    pub failed: Option<String>,
    pub percent: f64,
    /// Of each code the first few.
    pub findings: Vec<PoolFinding>,
    /// How many there are of each code; none: the pool is clean, as far as it was looked at.
    pub counts: BTreeMap<String, u64>,
    /// Disks that were looked at from beginning to end.
    pub disks: u64,
    /// Volumes and snapshots, and extents that hold anything.
    pub volumes: u64,
    pub extents: u64,
}

/// Something that is wrong with a pool's metadata.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PoolFinding {
    /// Keeps its meaning for good; all are in `docs/operating/pools.md`.
    pub code: String,
    pub severity: Severity,
    /// Path of the disk.
    pub disk: String,
    pub what: String,
    /// What to do about it.
    pub fix: String,
}

words! {
    Severity {
        /// Something is lost, or contradicts itself.
        Error = "error",
        /// Nothing is lost: of two copies one is gone, or something is to be known.
        Warning = "warning",
    }
}

/// A disk of a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PoolDisk {
    pub id: String,
    /// Where it was found, or was last seen.
    pub path: String,
    pub state: PoolDiskState,
    /// Why it failed, or why it can not be drained further.
    pub reason: Option<String>,
    /// The whole disk, metadata included.
    pub size_bytes: u64,
    /// What volumes can take of it, and have taken. Of a disk that is drained this is what is left to be moved.
    pub capacity_bytes: u64,
    pub used_bytes: u64,
    /// Extents of 4 MiB that live on it, in whole or in part.
    pub extents: u64,
    /// Blocks that did not match their checksums, and reads that failed, since the data plane started. Both are healed from
    /// other replicas.
    pub checksum_errors: u64,
    pub io_errors: u64,
}

words! {
    PoolDiskState {
        Healthy = "healthy",
        /// Takes nothing new, and gives up what it has to the other disks.
        Draining = "draining",
        /// Nothing is left on it: it can be removed.
        Drained = "drained",
        /// Out of use for good; what was on it comes from the other replicas.
        Failed = "failed",
        /// Not found when the pool was opened; the pool waits for it.
        Missing = "missing",
    }
}

words! {
    PoolState {
        Good = "good",
        /// Space should be found soon.
        Low = "low",
        /// Space must be found now.
        Scarce = "scarce",
        /// Writes wait for space; reads work and nothing is lost.
        Full = "full",
        Failed = "failed",
        /// The node is not heard, or its data plane has not said.
        Unknown = "unknown",
    }
}

/// Volumes that stay consistent together; the unit of replication authority.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Group {
    pub id: u64,
    /// Name of the VM, volume or image it belongs to.
    pub name: String,
    pub kind: GroupKind,
    pub state: GroupState,
    /// Why, when it is not `healthy`.
    pub reason: Option<String>,
    /// While `resyncing`.
    pub resync: Option<Resync>,
    pub scrub: Scrub,
    pub generation: u64,
    pub epoch: u64,
    /// Node whose replica accepts I/O.
    pub primary: String,
    /// Nodes whose replicas hold every acknowledged write.
    pub in_sync: Vec<String>,
    /// All nodes that carry a replica.
    pub replicas: Vec<String>,
    /// Mode of each replica, in the order of `replicas`.
    pub modes: Vec<Mode>,
    /// How far trailing replicas are behind, as far as the answering node knows.
    pub lag: Vec<Lag>,
    pub lag_bound: LagBound,
    /// A replica that is on its way to another node.
    pub moving: Option<Moving>,
    pub volumes: Vec<u64>,
    /// Bytes of the answering node's pool taken by it.
    pub used_bytes: Option<u64>,
}

words! {
    /// When a replica counts as having a write.
    Mode {
        /// C: on its disk.
        Sync = "sync",
        /// B: in its memory.
        Memory = "memory",
        /// A: it is not waited for; it trails.
        Async = "async",
    }
}

words! {
    /// What happens when a trailing replica is as far behind as it may be.
    AtBound {
        /// Writers wait.
        Slow = "slow",
        /// It is given up and brought up to date later.
        Drop = "drop",
    }
}

/// What a trailing replica lacks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Lag {
    pub node: String,
    pub bytes: u64,
    pub ms: u64,
    /// Writers wait for it.
    pub slows: bool,
}

/// How far trailing replicas may be behind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LagBound {
    pub bytes: u64,
    pub seconds: u64,
    pub at_bound: AtBound,
}

/// A replica on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Moving {
    pub from: String,
    pub to: String,
}

/// What a human types to make a replica the truth that trails, or lost parts with a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PromoteToken {
    pub group: String,
    pub node: String,
    pub token: String,
    /// What the promotion means and what is lost by it.
    pub text: String,
}

words! {
    GroupKind {
        Vm = "vm",
        Volume = "volume",
        Image = "image",
    }
}

words! {
    GroupState {
        /// Every replica is in sync and connected, and I/O goes on.
        Healthy = "healthy",
        /// I/O goes on with fewer replicas than wanted.
        Degraded = "degraded",
        /// A replica is being brought up to date.
        Resyncing = "resyncing",
        /// The answering node's replica lacks writes and the primary is not known to serve.
        Stale = "stale",
        /// I/O is held, not failed.
        Frozen = "frozen",
        Failed = "failed",
    }
}

/// How far a resync is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Resync {
    /// The node whose replica is brought up to date.
    pub node: String,
    pub percent: f64,
    /// Candidate extents (4 MiB each) at the start and still to do.
    pub extents_total: u64,
    pub extents_left: u64,
    /// Bytes of differing blocks sent so far, and of late per second.
    pub sent_bytes: u64,
    pub bytes_per_second: u64,
    /// What is left takes so long at the present rate; null while there is none.
    pub seconds_left: Option<u64>,
}

/// Scrubs of a group: everything stored is read on every replica, and their checksums are compared.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Scrub {
    /// How often it is scrubbed by itself; 0: never.
    pub every_days: u32,
    /// One is wanted or under way.
    pub running: bool,
    /// How far it is, as the primary's node knows.
    pub percent: Option<f64>,
    pub seconds_left: Option<u64>,
    /// The last that ended; null if there was none.
    pub last: Option<ScrubResult>,
}

/// What a scrub found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ScrubResult {
    pub ended_unix_ms: u64,
    /// Nodes whose replicas were read, and how much over all of them.
    pub replicas: Vec<String>,
    pub checked_bytes: u64,
    /// Blocks that did not match their own checksums.
    pub rotten_blocks: u64,
    /// Blocks that matched theirs and were not what the primary holds.
    pub differing_blocks: u64,
    pub healed_blocks: u64,
    /// Blocks of which no good copy is left.
    pub lost_blocks: u64,
}

/// A virtual machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    pub id: u64,
    pub name: String,
    pub state: VmState,
    /// Why, when there is something to say.
    pub reason: Option<String>,
    /// What the user wants of it.
    pub wanted: Wanted,
    /// Where it runs or ran last.
    pub node: String,
    /// Number of its newest run.
    pub incarnation: u64,
    pub cpus: u32,
    pub memory_bytes: u64,
    pub image: Option<String>,
    pub mac: String,
    pub group: u64,
    pub disks: Vec<u64>,
    /// What is stored of its disks is encrypted.
    pub encrypted: bool,
    /// While a replica of its disks is brought up to date.
    pub resync: Option<Resync>,
}

words! {
    VmState {
        Running = "running",
        Starting = "starting",
        Stopping = "stopping",
        Stopped = "stopped",
        Migrating = "migrating",
        /// Its node was lost; it starts elsewhere when that node is proven unable to act.
        Recovering = "recovering",
        /// Wanted, but something must happen first; the reason says what.
        Blocked = "blocked",
        Failed = "failed",
    }
}

words! {
    Wanted {
        Running = "running",
        Stopped = "stopped",
    }
}

/// A virtual disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Volume {
    pub id: u64,
    pub name: String,
    pub size_bytes: u64,
    pub group: u64,
    /// State of its group.
    pub state: GroupState,
    /// While a replica of it is brought up to date.
    pub resync: Option<Resync>,
    pub scrub: Scrub,
    pub primary: String,
    /// The snapshot that it is of, as `OWNER@NAME`; then it is read only.
    pub snapshot: Option<String>,
    /// What is stored of it is encrypted.
    pub encrypted: bool,
    /// Whose disk it is.
    pub vm: Option<String>,
    pub image: Option<String>,
    /// NBD addresses while it is exported, the serving node's first. A client that loses one connects to the other.
    pub uris: Vec<String>,
}

/// All disks of a VM, or a volume, frozen at one point of the stream of writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Snapshot {
    pub id: u64,
    /// `OWNER@NAME`.
    pub name: String,
    pub state: SnapshotState,
    /// The VM or volume that it is of.
    pub of: String,
    /// When it was asked for.
    pub unix_ms: u64,
    pub group: u64,
    /// Names of its volumes, which can be exported.
    pub volumes: Vec<String>,
}

/// In what two snapshots differ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotDiff {
    pub from: String,
    pub to: String,
    /// One for each volume that both are of.
    pub volumes: Vec<VolumeDiff>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeDiff {
    pub volume: String,
    /// In order, in whole blocks of 4096 bytes.
    pub ranges: Vec<ByteRange>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ByteRange {
    pub offset_bytes: u64,
    pub length_bytes: u64,
}

words! {
    SnapshotState {
        /// Writes are about to wait, or waiting, for it to be on every replica that is in sync.
        Taking = "taking",
        /// Every replica that is in sync has it.
        Taken = "taken",
    }
}

/// A disk image from which VMs are made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    pub id: u64,
    pub name: String,
    pub size_bytes: u64,
    /// Whether it is filled and can be used.
    pub ready: bool,
    /// Of the bytes that were uploaded, once they can be used.
    pub sha256: Option<String>,
    pub group: u64,
    pub volume: u64,
    /// What is stored of it is encrypted.
    pub encrypted: bool,
}

/// The master key, under which the keys of encrypted volumes are sealed: by name, which tells nothing of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MasterKeys {
    /// That of new keys; none: the node that answers has none.
    pub master_key: Option<String>,
    pub nodes: Vec<NodeMasterKeys>,
    /// Which volumes' keys are sealed under which; more than one: an exchange is under way.
    pub sealed: Vec<SealedUnder>,
    /// What is to be done next, if anything.
    pub hint: Option<String>,
}

/// What a node had when its `noded` started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeMasterKeys {
    pub node: String,
    /// Whether it says so at present.
    pub heard: bool,
    pub master_key: Option<String>,
    /// The one that is to follow it.
    pub successor: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SealedUnder {
    pub master_key: String,
    /// Those of snapshots apart, which have the keys of what they are of.
    pub volumes: Vec<String>,
}

/// Something that happened, with its reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Grows with every event; the argument of `since`.
    pub index: u64,
    pub unix_ms: u64,
    /// The node that proposed it.
    pub by: String,
    pub subject: Subject,
    pub text: String,
}

/// What an event is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Subject {
    pub kind: SubjectKind,
    pub id: Option<u64>,
    pub name: String,
}

words! {
    SubjectKind {
        Cluster = "cluster",
        Node = "node",
        Group = "group",
        Volume = "volume",
        Vm = "vm",
        Image = "image",
    }
}

/// A request on its way to the state it asked for. Kept by the node that took it, for a while after it ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Task {
    /// Names the node that keeps it, such as `n1-17`.
    pub task: String,
    /// Such as `vm start`.
    pub action: String,
    /// Name of what it is about.
    pub subject: String,
    pub state: TaskState,
    /// What it waits for, how it ended, or why it failed.
    pub detail: String,
    /// The id of what was created.
    pub id: Option<u64>,
    pub started_unix_ms: u64,
    pub ended_unix_ms: Option<u64>,
    /// Set when it failed.
    pub error: Option<crate::error::ApiError>,
}

words! {
    TaskState {
        Running = "running",
        Done = "done",
        Failed = "failed",
    }
}

/// The register outside the nodes that decides who goes on alone, as the answering node last saw it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Witness {
    pub address: String,
    /// `None`: not asked yet.
    pub reachable: Option<bool>,
    /// Since when `reachable` is what it is.
    pub since_unix_ms: Option<u64>,
    pub epoch: Option<u64>,
    /// The node that holds the grant; none: all members.
    pub alone: Option<String>,
    /// Why it is not reachable.
    pub error: Option<String>,
    pub hint: Option<String>,
}

/// What a human types to say that a node is down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ConfirmToken {
    pub node: String,
    pub token: String,
    /// What the confirmation means and what may be lost.
    pub text: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_the_same_in_tables_and_in_json() {
        for word in [NodeState::Online, NodeState::Fencing, NodeState::Isolated] {
            assert_eq!(serde_json::to_value(word).unwrap(), word.to_string());
        }
        for word in [VmState::Recovering, VmState::Blocked] {
            assert_eq!(serde_json::to_value(word).unwrap(), word.to_string());
        }
        assert_eq!(format!("{:>9}|", GroupState::Healthy), "  healthy|");
    }
}
