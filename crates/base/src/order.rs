//! Orders from the control plane to the data plane, and reports back. They travel as JSON lines over a unix socket, and
//! as plain values in the simulator. Orders state what is to hold, not steps: giving one twice changes nothing.

use crate::id::{DiskId, GroupId, KeyId, NodeId, SnapshotId, VolumeId};
use crate::pool::{PoolReport, VerifyReport};
use crate::record::{GroupNames, GroupSpec, Stamp};
use crate::secret::{Secret, VolumeSecret};
use crate::unit::{BlockRange, ExtentIndex, Generation};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case")]
#[allow(clippy::large_enum_variant)] // few exist at a time, and most of these are the large one
pub enum Order {
    /// The group as the cluster log has it. A record of an older generation than the newest known is ignored (W2).
    Group(GroupSpec),
    /// What people call the group and its volumes: kept on the pool, for whoever has nothing but its disks.
    Names { group: GroupId, names: GroupNames },
    /// The group is deleted from the log: its volumes and note are erased here.
    Forget { group: GroupId },
    /// This node's power was read back as off, so no process of it serves anything: a promise given to it binds no longer
    /// (W5). Valid for promises given before this order was made. That its guard's bound has run out does not mean so
    /// much: its QEMUs are dead, but its `blockd` may be serving other clients under that very promise.
    Fenced { node: NodeId },
    /// Where peers listen for replication, most wanted first. Complete: a peer not named is gone.
    Peers { addresses: BTreeMap<NodeId, Vec<String>> },
    /// A key that this node's and the peer's `noded` have agreed on, newer than all before. Of the earlier ones the last
    /// still counts, for the peer may not have this one yet.
    LinkKey { peer: NodeId, key: u64, secret: Secret },
    /// A key of volumes that are encrypted at rest. What does not fit its name is not taken. Kept until no group has it.
    VolumeKey { key: KeyId, secret: VolumeSecret },
    /// Offer these volumes under these names at the node's NBD addresses. Complete: a name not given is withdrawn. Front
    /// ends serve a volume only while this node is primary of its group.
    Exports { names: BTreeMap<String, Offer> },
    /// A diverged replica on this node may be overwritten: a human chose so (W10).
    Discard { group: GroupId, loser: Stamp },
    /// The replicas of the group are to be scrubbed, if this node is its primary. The number tells a new wish from the same
    /// told again.
    Scrub { group: GroupId, scrub: u64 },
    /// In which blocks do two snapshots' volumes differ, from this extent on? Answered by `Compared` with the same number.
    Compare { id: u64, group: GroupId, one: VolumeId, two: VolumeId, from: ExtentIndex },
    /// A human changes the disks of this node's pool. Answered by `DiskChanged` with the same number.
    Disk {
        id: u64,
        #[serde(flatten)]
        change: DiskCommand,
    },
    /// A human needs this no more that is kept of a replica (`Kept`). Answered by `DiskChanged` with the same number.
    DropKept { id: u64, volume: VolumeId },
    /// The metadata of this node's pool is to be verified while it is used. Told of by `Verified` with the same number; a run
    /// under way begins anew.
    Verify { id: u64 },
    /// Report everything anew; sent after (re)connecting.
    ReportAll,
}

/// What a human asks of the disks of a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "snake_case")]
pub enum DiskCommand {
    /// The disk at this path joins. What is on it may be lost only if the human said so.
    Add {
        path: PathBuf,
        may_overwrite: bool,
    },
    /// What is on the disk goes to the others.
    Drain {
        disk: DiskId,
    },
    Undrain {
        disk: DiskId,
    },
    /// A disk that is drained leaves; one that failed is not spoken of any more.
    Remove {
        disk: DiskId,
    },
    /// A disk that is missing is let go for good, with what only it had.
    LetGo {
        disk: DiskId,
    },
}

/// Blocks in which two volumes differ, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Differences {
    pub runs: Vec<BlockRange>,
    /// Where the next page begins, if there is one.
    pub next: Option<ExtentIndex>,
}

/// A volume under a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    pub volume: VolumeId,
    /// To other machines, too; else to this node's own guests and tools only.
    pub is_public: bool,
    pub is_read_only: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "snake_case")]
pub enum Report {
    /// State of a group on this node; sent when it changes, progress at most once a second.
    Group(Box<GroupReport>),
    /// Groups of which this node's pool holds anything, known by a record or not; after `ReportAll`.
    Holds { groups: BTreeSet<GroupId> },
    /// The primary lost this member of the in-sync set and is frozen until a record without it is committed (W3).
    ReplicaLost { group: GroupId, generation: Generation, node: NodeId, reason: String },
    /// The primary has brought this replica up to date and completes writes only with it: a record with it may be
    /// committed (W9). It holds every snapshot up to the text's `minted`; of later ones the primary does not know.
    ReplicaCurrent { group: GroupId, generation: Generation, node: NodeId, minted: u64 },
    /// Every required replica has this snapshot (said again until the log says so), or one can not have it.
    Snapshot { group: GroupId, generation: Generation, snapshot: SnapshotId, result: Result<(), String> },
    /// The answer to `Compare`: a page of it, or why there is none.
    Compared { id: u64, result: Result<Differences, String> },
    /// How far a verification is, once a second, and its end. Not told anew by `ReportAll`.
    Verified(Box<VerifyReport>),
    /// A change of the pool's disks, or of what is kept on them, is done, or why it is not.
    DiskChanged { id: u64, result: Result<(), String> },
    /// The pool cannot be used; nothing is served from it.
    PoolFailed { reason: String },
    /// How the pool is doing; sent when that has changed noticeably.
    Pool(PoolReport),
    /// The connections to the peers, all of them, whenever one has changed.
    Paths { is_encrypted: bool, paths: Vec<PathReport> },
}

/// A connection to a peer: one for each address at which the node with the higher id listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathReport {
    pub peer: NodeId,
    /// The address of the node with the higher id, be it this one or the peer.
    pub address: String,
    #[serde(flatten)]
    pub state: PathState,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum PathState {
    /// Works in both directions.
    Up,
    /// Does not answer; another one is used.
    Silent,
    Down {
        reason: String,
    },
    /// The peer is there, but is not talked to: a human must mend it.
    Refused {
        reason: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupReport {
    pub group: GroupId,
    /// Newest record this node knows.
    pub stamp: Option<Stamp>,
    pub state: ReplicaState,
    /// As far as this replica knows nothing was ever written: the group's birth is not confirmed by all replicas yet (W12).
    /// A record that lets one of them go would take from the others the proof that they lack nothing.
    pub is_unborn: bool,
    /// Parts of it were lost with a disk and are not healed yet: it does not hold every acknowledged write, and a record with it
    /// alone would give up what the others have.
    pub is_incomplete: bool,
    /// Bytes of the pool taken by the group.
    pub used_bytes: u64,
    /// Blocks healed from a peer since start.
    pub healed_blocks: u64,
    /// Replicas that are being brought up to date from here.
    pub resync: BTreeMap<NodeId, ResyncProgress>,
    /// As primary: the scrub that runs, or else the last since start.
    pub scrub: Option<ScrubReport>,
    /// Bad blocks found since start, the newest last; at most some dozen.
    pub findings: Vec<Finding>,
    /// Peers of the group that are connected.
    pub connected: BTreeSet<NodeId>,
    /// How far trailing replicas are behind: of a primary all of them, of a trailing replica its own, as it was last told.
    pub lag: BTreeMap<NodeId, Lag>,
    /// New writes wait for a trailing replica.
    pub is_slowed: bool,
}

/// What a trailing replica lacks of what was acknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lag {
    pub bytes: u64,
    /// Of a primary: the age of the oldest write that the replica lacks. Of the replica: the time between the newest write that
    /// it holds and the newest that it was told of.
    pub ms: u64,
}

/// What this node's replica of a group is doing. A primary's life reads downwards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum ReplicaState {
    /// The pool is being opened.
    Opening,
    /// Primary, but may not serve yet.
    Frozen { reason: FreezeReason },
    /// Primary, I/O goes on.
    Serving,
    /// Follows the primary and holds every acknowledged write.
    Secondary,
    /// Mode `async`: holds a state that the group had, by this record or a little before.
    Trailing { at: Stamp },
    /// There is none here any more: it was erased.
    Absent,
    /// Lacks writes; waits for the primary, or is being brought up to date.
    Stale,
    /// Holds writes that the truth lacks; left untouched until a human chooses (W10).
    Diverged { own: Stamp },
    /// This node's disk failed; the replica is out of use.
    Failed { reason: String },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "freeze", rename_all = "snake_case")]
pub enum FreezeReason {
    /// A promise given to the old primary has not run out yet (W5).
    OldPrimaryLease { node: NodeId },
    /// A member of the in-sync set has not granted or not renewed the lease (W5).
    NoLease { node: NodeId },
    /// A member of the in-sync set is gone and the record without it is not committed yet (W3).
    ReplicaLost { node: NodeId },
    /// In-flight writes of before a restart are being settled with this peer.
    Settling { node: NodeId },
    /// The record is being made durable here.
    Recording,
    /// Writes wait for a snapshot to be on every required replica.
    Snapshot,
    /// The authority moved on; waiting for the order that says where to.
    Outdated,
    /// The pool has no space left; goes on when there is.
    PoolFull,
    /// This node has not been given the key with which this volume is encrypted. Only clients wait for it: replication goes on.
    NoKey { volume: VolumeId },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResyncProgress {
    /// Candidate extents at the start and still to do.
    pub extents_total: u64,
    pub extents_left: u64,
    /// Bytes of differing blocks sent so far, and of late per second.
    pub sent_bytes: u64,
    pub bytes_per_second: u64,
    /// What is left takes so long at the present rate; none while there is none.
    pub seconds_left: Option<u64>,
}

/// A scrub: everything that is stored was read on every replica in sync, and compared by checksums.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubReport {
    /// As it was ordered.
    pub id: u64,
    pub is_done: bool,
    pub extents_total: u64,
    pub extents_left: u64,
    /// None while there is no rate yet.
    pub seconds_left: Option<u64>,
    /// Read so far, over all replicas.
    pub checked_bytes: u64,
    /// Whose copies were looked at from beginning to end.
    pub replicas: BTreeSet<NodeId>,
    /// Blocks that did not match their own checksum, and blocks that differed although both sides match theirs.
    pub rotten_blocks: u64,
    pub differing_blocks: u64,
    /// Of these: mended from a good copy, and those of which no good copy is left.
    pub healed_blocks: u64,
    pub lost_blocks: u64,
}

/// Bad blocks that were found: the evidence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Unique together with `boot`, and growing.
    pub number: u64,
    pub boot: u32,
    /// Where the bad copy was.
    pub node: NodeId,
    pub volume: VolumeId,
    pub range: BlockRange,
    pub kind: FindingKind,
    pub by: FoundBy,
    /// Mended from a good copy; else there is none.
    pub healed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FindingKind {
    /// The blocks did not match their own checksums: the medium decayed, or a write was lost, torn or led astray.
    Rot,
    /// They matched, and were not what the primary holds.
    Difference,
}

/// In doing what bad blocks were found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FoundBy {
    Read,
    Resync,
    Scrub,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SealedKey;
    use crate::record::{GroupRecord, LagBound, Lineage, Mode, Snapshots};
    use crate::unit::{BlockCount, BlockIndex, ByteCount, Epoch};

    /// Orders hold maps with numbers as keys inside tagged enums.
    #[test]
    fn orders_and_reports_survive_their_text_form() {
        let stamp = Stamp { epoch: Epoch(1), generation: Generation(2) };
        let group = GroupSpec {
            group: GroupId(7),
            replicas: BTreeSet::from([NodeId(1), NodeId(2)]),
            modes: BTreeMap::from([(NodeId(2), Mode::Async)]),
            lag: LagBound::default(),
            volumes: BTreeMap::from([(VolumeId(9), ByteCount(4096))]),
            keys: BTreeMap::from([(VolumeId(9), KeyId(8))]),
            snapshots: Snapshots::default(),
            record: GroupRecord { stamp, primary: NodeId(1), in_sync: BTreeSet::from([NodeId(1)]) },
            lineage: Lineage(BTreeMap::from([(stamp.epoch, stamp.generation)])),
        };
        let addresses = BTreeMap::from([(NodeId(2), vec!["192.0.2.2:7001".to_string()])]);
        let key = Order::LinkKey { peer: NodeId(2), key: 7, secret: Secret::new([9; 32]) };
        let volume_key = Order::VolumeKey { key: KeyId(8), secret: Secret::new([9; 64]) };
        let add = DiskCommand::Add { path: "/dev/x".into(), may_overwrite: true };
        let drain = DiskCommand::Drain { disk: DiskId(7) };
        let [add, drain] = [add, drain].map(|change| Order::Disk { id: 9, change });
        let volumes = BTreeMap::from([(VolumeId(9), "vm/web1/disk0".to_string())]);
        let keys = BTreeMap::from([(VolumeId(9), SealedKey::of_bytes(KeyId(8), KeyId(1), &[7; 92]))]);
        let names = Order::Names { group: GroupId(7), names: GroupNames { owner: "web1".to_string(), volumes, keys } };
        for order in [Order::Group(group), Order::Peers { addresses }, key, volume_key, add, drain, names] {
            let text = serde_json::to_string(&order).expect("an order always becomes text");
            assert_eq!(serde_json::from_str::<Order>(&text).map_err(|error| error.to_string()), Ok(order));
        }
        let (bytes_per_second, seconds_left) = (4096, Some(1));
        let progress =
            ResyncProgress { extents_total: 2, extents_left: 1, sent_bytes: 4096, bytes_per_second, seconds_left };
        let report = Report::Group(Box::new(GroupReport {
            group: GroupId(7),
            stamp: Some(stamp),
            state: ReplicaState::Serving,
            used_bytes: 0,
            is_unborn: false,
            is_incomplete: false,
            healed_blocks: 0,
            resync: BTreeMap::from([(NodeId(2), progress)]),
            scrub: Some(ScrubReport { id: 1, replicas: BTreeSet::from([NodeId(1)]), ..ScrubReport::default() }),
            findings: vec![Finding {
                number: 5,
                boot: 6,
                node: NodeId(2),
                volume: VolumeId(9),
                range: BlockRange::new(BlockIndex(3), BlockCount(1)),
                kind: FindingKind::Rot,
                by: FoundBy::Scrub,
                healed: true,
            }],
            connected: BTreeSet::new(),
            lag: BTreeMap::from([(NodeId(2), Lag { bytes: 4096, ms: 3 })]),
            is_slowed: true,
        }));
        let path = |state| PathReport { peer: NodeId(2), address: "192.0.2.2:7001".to_string(), state };
        let down = PathState::Down { reason: "no answer".to_string() };
        let paths = Report::Paths { is_encrypted: true, paths: vec![path(PathState::Up), path(down)] };
        let text = serde_json::to_string(&paths).expect("a report always becomes text");
        assert_eq!(serde_json::from_str::<Report>(&text).map_err(|error| error.to_string()), Ok(paths));
        let text = serde_json::to_string(&report).expect("a report always becomes text");
        assert_eq!(serde_json::from_str::<Report>(&text).map_err(|error| error.to_string()), Ok(report));
    }
}
