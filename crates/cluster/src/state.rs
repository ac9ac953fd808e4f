//! The state that the log makes: the same on every node after the same entries.
//!
//! `check()` holds what must always be so: an in-sync set is never empty, a group's stamp is the last of its lineage, an
//! id is minted once, a run has exactly one node. Wall-clock times in here are for people and decide nothing.

use crate::entry::{FenceProof, Holder, NodePhase, NodeSpec, Proof, Subject, VmPhase, VmSpec, Wanted};
use crate::master_key::Sealing;
use crate::scrubs::Scrubs;
use pollux_base::record::{GroupNames, GroupSpec, LagBound, Lineage, Mode, Snapshots};
use pollux_base::{
    ByteCount, Epoch, GroupId, GroupRecord, ImageId, Incarnation, KeyId, NodeId, SealedKey, SnapshotId, Stamp, VmId,
    VolumeId,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Events kept for one subject: some dozens of failovers of one VM.
pub const EVENTS_PER_SUBJECT: usize = 64;
/// Events kept in all; with the size of a text this bounds a snapshot to about a megabyte of history.
pub const EVENTS_MAX: usize = 4096;
/// Requests remembered so that a proposal which arrives twice is done once: far more than may be under way.
pub const REQUESTS_MAX: usize = 256;

/// Everything the cluster log says, applied.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Index of the last entry applied.
    pub applied: u64,
    /// Empty until `Init`.
    pub name: String,
    pub nodes: BTreeMap<NodeId, Node>,
    pub witness: bool,
    pub authority: Authority,
    pub groups: BTreeMap<GroupId, Group>,
    pub volumes: BTreeMap<VolumeId, Volume>,
    pub snapshots: BTreeMap<SnapshotId, Snapshot>,
    pub images: BTreeMap<ImageId, Image>,
    pub vms: BTreeMap<VmId, Vm>,
    /// Of all volumes that are encrypted at rest; gone with the last volume that has it.
    #[serde(default)]
    pub keys: BTreeMap<KeyId, SealedKey>,
    /// Since the master key was exchanged.
    #[serde(default)]
    pub sealing: Option<Sealing>,
    /// Oldest first.
    pub events: VecDeque<Event>,
    /// Newest requests done: proposer, number, wall clock.
    pub requests: VecDeque<(NodeId, u64, u64)>,
    /// The last id minted; groups, volumes, images and VMs share one counter.
    pub last_id: u64,
    /// Index of the last event.
    pub last_event: u64,
}

/// Who may decide, since when and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Authority {
    pub epoch: Epoch,
    pub holder: Holder,
    pub proof: Proof,
    pub since_unix_ms: u64,
}

impl Default for Authority {
    fn default() -> Authority {
        Authority { epoch: Epoch(0), holder: Holder::Members, proof: Proof::Members, since_unix_ms: 0 }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    pub spec: NodeSpec,
    pub phase: NodePhase,
    /// Evidence of `Fenced`.
    pub proof: Option<FenceProof>,
    pub since_unix_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    pub owner: Owner,
    pub replicas: BTreeSet<NodeId>,
    /// Modes of replicas that are not `sync`.
    pub modes: BTreeMap<NodeId, Mode>,
    pub lag: LagBound,
    /// Those of snapshots apart.
    pub volumes: BTreeMap<VolumeId, ByteCount>,
    pub snapshots: Snapshots,
    pub record: GroupRecord,
    pub lineage: Lineage,
    /// Diverged replicas that a human gave up, until they are in sync again.
    pub discards: BTreeMap<NodeId, Stamp>,
    pub scrubs: Scrubs,
    /// A replica that is on its way to another node.
    pub moving: Option<Move>,
}

/// A replica on its way (`moves.rs`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Move {
    pub from: NodeId,
    pub to: NodeId,
}

/// What a group is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "owner", content = "id", rename_all = "snake_case")]
pub enum Owner {
    Vm(VmId),
    Image(ImageId),
    Volume(VolumeId),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// As exported: the user's name, `vm/NAME/diskN` or `image/NAME`; of a snapshot followed by `@` and its name.
    pub name: String,
    pub size: ByteCount,
    pub group: GroupId,
    /// Offered to other machines by the user's wish (a volume of the user's own, or of a snapshot).
    pub exported: bool,
    /// It is one of this snapshot, and read only.
    pub snapshot: Option<SnapshotId>,
    /// It is encrypted at rest with this key. Snapshots and clones share what is stored, and have the same.
    #[serde(default)]
    pub key: Option<KeyId>,
}

/// A snapshot of a group as its user sees it; what replicas need of it is in the group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Unique within its group.
    pub name: String,
    pub group: GroupId,
    pub unix_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    pub name: String,
    pub size: ByteCount,
    pub volume: VolumeId,
    pub group: GroupId,
    /// `None` until the upload is complete.
    pub sha256: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    pub spec: VmSpec,
    pub group: GroupId,
    /// In the order of the disks.
    pub volumes: Vec<VolumeId>,
    pub wanted: Wanted,
    pub phase: VmPhase,
    pub incarnation: Incarnation,
    /// Node of the present or last run.
    pub node: NodeId,
    /// The first disk holds the image (or none was asked for).
    pub filled: bool,
    /// Why the VM is in its phase.
    pub reason: String,
    pub since_unix_ms: u64,
}

/// One line of history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Grows with every event; none is used twice.
    pub index: u64,
    pub unix_ms: u64,
    pub by: NodeId,
    pub subject: Subject,
    pub text: String,
}

impl State {
    /// Whether the first entry was applied.
    pub fn is_initialised(&self) -> bool {
        !self.name.is_empty()
    }

    /// The node that goes on alone, if one does.
    pub fn alone(&self) -> Option<NodeId> {
        match self.authority.holder {
            Holder::Members => None,
            Holder::Alone { node } => Some(node),
        }
    }

    pub fn node_name(&self, node: NodeId) -> String {
        self.nodes.get(&node).map_or_else(|| node.to_string(), |node| node.spec.name.clone())
    }

    pub fn node_named(&self, name: &str) -> Option<NodeId> {
        self.nodes.iter().find(|(_, node)| node.spec.name == name).map(|(id, _)| *id)
    }

    pub fn vm_named(&self, name: &str) -> Option<(VmId, &Vm)> {
        self.vms.iter().find(|(_, vm)| vm.spec.name == name).map(|(id, vm)| (*id, vm))
    }

    pub fn image_named(&self, name: &str) -> Option<(ImageId, &Image)> {
        self.images.iter().find(|(_, image)| image.name == name).map(|(id, image)| (*id, image))
    }

    /// A volume by the name under which it is exported.
    pub fn volume_named(&self, name: &str) -> Option<(VolumeId, &Volume)> {
        self.volumes.iter().find(|(_, volume)| volume.name == name).map(|(id, volume)| (*id, volume))
    }

    /// A snapshot by `OWNER@NAME`.
    pub fn snapshot_named(&self, name: &str) -> Option<(SnapshotId, &Snapshot)> {
        self.snapshots.iter().find(|(id, _)| self.snapshot_name(**id) == name).map(|(id, found)| (*id, found))
    }

    /// `OWNER@NAME`.
    pub fn snapshot_name(&self, id: SnapshotId) -> String {
        let Some(found) = self.snapshots.get(&id) else { return id.to_string() };
        let owner = self.groups.get(&found.group).map(|group| self.group_name(group)).unwrap_or_default();
        format!("{owner}@{}", found.name)
    }

    /// What replicas of the group are told.
    pub fn group_spec(&self, group: GroupId) -> Option<GroupSpec> {
        self.groups.get(&group).map(|found| GroupSpec {
            group,
            replicas: found.replicas.clone(),
            modes: found.modes.clone(),
            lag: found.lag,
            volumes: found.volumes.clone(),
            keys: self.keys_of(found.volumes.keys()),
            snapshots: found.snapshots.clone(),
            record: found.record.clone(),
            lineage: found.lineage.clone(),
        })
    }

    /// What people call the group and its volumes, and the sealed keys of these.
    pub fn group_names(&self, group: &Group) -> GroupNames {
        let of_snapshots = group.snapshots.volumes().map(|(volume, _)| volume);
        let volumes = group.volumes.keys().copied().chain(of_snapshots);
        let named = |volume| Some((volume, self.volumes.get(&volume)?.name.clone()));
        let sealed = |volume: &VolumeId| Some((*volume, self.keys.get(&self.volumes.get(volume)?.key?)?.clone()));
        GroupNames {
            owner: self.group_name(group),
            volumes: volumes.filter_map(named).collect(),
            keys: group.volumes.keys().filter_map(sealed).collect(),
        }
    }

    /// History of these subjects, oldest first.
    pub fn events_of<'a>(&'a self, subjects: &'a [Subject]) -> impl Iterator<Item = &'a Event> {
        self.events.iter().filter(move |event| subjects.contains(&event.subject))
    }

    /// Memory taken by guests that run, or are about to run, on the node.
    pub fn memory_taken(&self, node: NodeId) -> ByteCount {
        let taken = self.vms.values().filter(|vm| vm.node == node && vm.phase.may_run());
        ByteCount(taken.map(|vm| vm.spec.memory.0).fold(0, u64::saturating_add))
    }

    /// Keeps the event under the next index.
    pub(crate) fn push_event(&mut self, event: Event) {
        self.last_event += 1;
        let event = Event { index: self.last_event, ..event };
        let of_subject = self.events.iter().filter(|other| other.subject == event.subject).count();
        if of_subject >= EVENTS_PER_SUBJECT {
            if let Some(oldest) = self.events.iter().position(|other| other.subject == event.subject) {
                self.events.remove(oldest);
            }
        } else if self.events.len() >= EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    /// Asserts what must always be so.
    pub fn check(&self) {
        for (id, group) in &self.groups {
            assert!(!group.record.in_sync.is_empty(), "{id}: no replica is in sync");
            assert!(group.record.in_sync.is_subset(&group.replicas), "{id}: a stranger is in sync");
            assert!(self.nodes.contains_key(&group.record.primary), "{id}: the primary is unknown");
            let moves = group.moving.is_none_or(|moving| group.replicas.contains(&moving.from));
            assert!(moves, "{id}: what is not there does not move");
            let trails = |node: &NodeId| group.modes.get(node) == Some(&Mode::Async);
            assert!(!group.record.in_sync.iter().any(trails), "{id}: a trailing replica is in sync");
            assert!(group.modes.keys().all(|node| group.replicas.contains(node)), "{id}: a mode without a replica");
            assert!(group.lineage.contains(group.record.stamp), "{id}: the record is not of its own history");
            assert!(id.0 <= self.last_id, "{id}: was never minted");
            for (snapshot, frozen) in &group.snapshots.each {
                assert!(
                    self.snapshots.get(snapshot).is_some_and(|found| found.group == *id),
                    "{snapshot}: in no group"
                );
                let minted = group.snapshots.minted;
                assert!(frozen.volumes.keys().all(|volume| volume.0 <= minted), "{snapshot}: not known to its group");
                assert!(
                    frozen.volumes.values().all(|frozen| group.volumes.contains_key(&frozen.of)),
                    "{snapshot}: of whom"
                );
            }
            assert!(
                group.snapshots.each.values().filter(|snapshot| snapshot.taken.is_none()).count() <= 1,
                "{id}: one at a time"
            );
            for (copy, of) in &group.snapshots.origins {
                assert!(group.volumes.contains_key(copy), "{id}: a copy that it has not");
                assert!(self.volumes.get(of).is_some_and(|of| of.snapshot.is_some()), "{copy}: a copy of what is gone");
            }
            for volume in group.volumes.keys().copied().chain(group.snapshots.volumes().map(|(volume, _)| volume)) {
                let volume = &volume;
                assert!(self.volumes.get(volume).is_some_and(|found| found.group == *id), "{volume}: in no group");
            }
        }
        for (id, volume) in &self.volumes {
            let group = self.groups.get(&volume.group);
            let is_there = group.is_some_and(|group| match volume.snapshot {
                None => group.volumes.contains_key(id),
                Some(of) => group.snapshots.each.get(&of).is_some_and(|snapshot| snapshot.volumes.contains_key(id)),
            });
            assert!(is_there, "{id}: group");
        }
        self.check_keys();
        for (id, snapshot) in &self.snapshots {
            let group = self.groups.get(&snapshot.group);
            assert!(group.is_some_and(|group| group.snapshots.each.contains_key(id)), "{id}: group");
        }
        for (id, vm) in &self.vms {
            assert!(self.groups.contains_key(&vm.group), "{id}: its disks are gone");
            assert!(self.nodes.contains_key(&vm.node), "{id}: its node is unknown");
            assert!(!vm.phase.may_run() || vm.incarnation.0 > 0, "{id}: runs without an incarnation");
        }
        assert!(self.events.len() <= EVENTS_MAX && self.requests.len() <= REQUESTS_MAX);
    }
}
