//! Snapshots, what is made of them, and the sizes of volumes (`docs/design/0007-snapshots.md`): pure functions of the state.
//!
//! A snapshot is wanted by one entry and counts by another, when its group's primary says that every required replica has
//! it. A rollback is a record of the next generation: a replica in sync goes back when it adopts it. A group that is born
//! as a copy says of what until its primary says that the copies are there; till then its source is not deleted.

use crate::apply::{Applying, Birth, mac_of};
use crate::core::Cluster;
use crate::entry::{Change, NodePhase, Subject, VmPhase, VmSpec, Wanted};
use crate::requests::{check_name, check_size};
use crate::seam::{Answer, Output, Refusal};
use crate::state::{Group, Owner, Snapshot, State, Vm, Volume};
use pollux_base::order::{Differences, ReplicaState};
use pollux_base::record::{self, Frozen, Mode, Rollback};
use pollux_base::unit::bytes_text;
use pollux_base::{ByteCount, ExtentIndex, GroupId, Incarnation, Instant, NodeId, Order, SnapshotId, VmId, VolumeId};
use std::collections::{BTreeMap, BTreeSet};

/// Snapshots of one group: a day of quarter hours, a month of hours or a year of days and more. Bounds the text of an order.
pub const SNAPSHOTS_MAX: usize = 1024;

fn conflict<T>(text: String) -> Result<T, Refusal> {
    Err(Refusal::Conflict(text))
}

impl State {
    /// Why the state does not allow the change, if it is one of these.
    pub(crate) fn refuse_snapshots(&self, change: &Change) -> Result<(), Refusal> {
        match change {
            Change::CreateSnapshot { group, name } => self.refuse_snapshot(*group, name),
            Change::DeleteSnapshot { snapshot } => {
                self.taken_snapshot(*snapshot)?;
                let own = |volume: &VolumeId| self.volumes.get(volume).is_some_and(|v| v.snapshot == Some(*snapshot));
                if let Some(volume) = self.volumes.values().find(|v| v.snapshot == Some(*snapshot) && v.exported) {
                    let volume = &volume.name;
                    return conflict(format!(
                        "volume `{volume}` is exported; first: pollux volume export {volume} --off"
                    ));
                }
                match self.groups.values().find(|other| other.snapshots.origins.values().any(own)) {
                    Some(copy) => conflict(format!("`{}` is still being made from it", self.group_name(copy))),
                    None => Ok(()),
                }
            }
            Change::RollBack { snapshot } => {
                let (group, _) = self.taken_snapshot(*snapshot)?;
                if let Some((other, _)) = group.snapshots.untaken() {
                    return conflict(format!("snapshot `{}` is still being taken", self.snapshot_name(other)));
                }
                self.refuse_used(group)
            }
            Change::CloneVolume { of, name } => {
                check_name("volume", name)?;
                let found = self.volumes.get(of).ok_or_else(|| Refusal::NotFound(format!("no volume {of}")))?;
                let Some(snapshot) = found.snapshot else {
                    let of = &found.name;
                    return conflict(format!(
                        "volume `{of}` is written to; clone a snapshot of it: pollux volume snapshot {of} NAME"
                    ));
                };
                let (group, _) = self.taken_snapshot(snapshot)?;
                self.birthplaces(group)?;
                match self.volume_named(name) {
                    Some(_) => conflict(format!("a volume `{name}` exists already")),
                    None => Ok(()),
                }
            }
            Change::CloneVm { snapshot, name } => {
                check_name("VM", name)?;
                let (group, of) = self.taken_snapshot(*snapshot)?;
                self.birthplaces(group)?;
                match group.owner {
                    _ if self.vm_named(name).is_some() => conflict(format!("a VM `{name}` exists already")),
                    Owner::Vm(_) => Ok(()),
                    Owner::Volume(_) | Owner::Image(_) => {
                        conflict(format!("`{of}` is of no VM; a volume is cloned by: pollux volume clone {of} NAME"))
                    }
                }
            }
            Change::ResizeVolume { volume, size } => self.refuse_size(*volume, *size),
            _ => Ok(()),
        }
    }

    fn refuse_snapshot(&self, group: GroupId, name: &str) -> Result<(), Refusal> {
        check_name("snapshot", name)?;
        let found = self.groups.get(&group).ok_or_else(|| Refusal::NotFound(format!("no group {group}")))?;
        if let Some((other, _)) = found.snapshots.untaken() {
            return conflict(format!("snapshot `{}` is still being taken", self.snapshot_name(other)));
        }
        if self.snapshots.values().any(|other| other.group == group && other.name == *name) {
            return conflict(format!("a snapshot `{}@{name}` exists already", self.group_name(found)));
        }
        if let Some(node) = found.replicas.iter().find(|node| found.mode(**node) == Mode::Async) {
            let node = self.node_name(*node);
            return conflict(format!("its replica on `{node}` is async, and such a group has no snapshots"));
        }
        match found.owner {
            Owner::Vm(vm) if self.vms.get(&vm).is_some_and(|vm| !vm.filled) => {
                return conflict("its first disk is still being filled from the image".into());
            }
            Owner::Image(_) => return conflict("an image does not change; it needs no snapshot".into()),
            Owner::Vm(_) | Owner::Volume(_) => {}
        }
        let count = found.snapshots.each.len();
        if count >= SNAPSHOTS_MAX {
            return conflict(format!("it has {count} snapshots, which is the most; delete one first"));
        }
        Ok(())
    }

    /// The group of a snapshot that counts, and the snapshot's name.
    fn taken_snapshot(&self, snapshot: SnapshotId) -> Result<(&Group, String), Refusal> {
        let missing = || Refusal::NotFound(format!("no snapshot {snapshot}"));
        let found = self.snapshots.get(&snapshot).ok_or_else(missing)?;
        let group = self.groups.get(&found.group).ok_or_else(missing)?;
        let name = self.snapshot_name(snapshot);
        match group.snapshots.untaken() {
            Some((id, _)) if id == snapshot => conflict(format!("snapshot `{name}` is still being taken")),
            _ => Ok((group, name)),
        }
    }

    /// Nobody may hold on to what changes beneath.
    fn refuse_used(&self, group: &Group) -> Result<(), Refusal> {
        if let Owner::Vm(id) = group.owner
            && let Some(vm) = self.vms.get(&id)
        {
            let name = &vm.spec.name;
            if !matches!(vm.phase, VmPhase::Stopped | VmPhase::Failed) {
                return conflict(format!("VM `{name}` is {}; stop it first: pollux vm stop {name}", vm.phase.name()));
            }
            if vm.phase == VmPhase::Stopped && vm.wanted == Wanted::Running {
                return conflict(format!("VM `{name}` is about to start; stop it first: pollux vm stop {name}"));
            }
        }
        let exported = group.volumes.keys().filter_map(|volume| self.volumes.get(volume)).find(|v| v.exported);
        match exported {
            Some(Volume { name, .. }) => {
                conflict(format!("volume `{name}` is exported; first: pollux volume export {name} --off"))
            }
            None => Ok(()),
        }
    }

    /// Where a copy of the group's snapshot can be born: the primary, the replicas, and which of them are in sync. All that
    /// are hold every snapshot that was taken.
    fn birthplaces(&self, group: &Group) -> Result<(NodeId, BTreeSet<NodeId>, BTreeSet<NodeId>), Refusal> {
        let is_online = |node: &NodeId| self.nodes.get(node).is_some_and(|node| node.phase == NodePhase::Online);
        let in_sync: BTreeSet<NodeId> = group.record.in_sync.iter().copied().filter(is_online).collect();
        let primary =
            [group.record.primary].into_iter().chain(in_sync.iter().copied()).find(|node| in_sync.contains(node));
        match primary {
            Some(primary) => Ok((primary, group.replicas.clone(), in_sync)),
            None => conflict("no node that holds the snapshot is online".into()),
        }
    }

    fn refuse_size(&self, volume: VolumeId, size: ByteCount) -> Result<(), Refusal> {
        check_size("volume", size)?;
        let found = self.volumes.get(&volume).ok_or_else(|| Refusal::NotFound(format!("no volume {volume}")))?;
        let name = &found.name;
        if found.snapshot.is_some() {
            return conflict(format!("volume `{name}` is of a snapshot, and stays as it is"));
        }
        if self.groups.get(&found.group).is_some_and(|group| matches!(group.owner, Owner::Image(_))) {
            return conflict(format!("volume `{name}` is an image, and stays as it is"));
        }
        if size < found.size {
            return conflict(format!(
                "volume `{name}` has {} and does not shrink: what lies beyond {} would be lost",
                bytes_text(found.size.0),
                bytes_text(size.0)
            ));
        }
        Ok(())
    }

    /// What would take snapshots with it is not deleted by the way.
    pub(crate) fn refuse_with_snapshots(&self, group: GroupId) -> Result<(), Refusal> {
        let of_group = self.snapshots.iter().filter(|(_, snapshot)| snapshot.group == group);
        let found: Vec<String> = of_group.map(|(id, _)| self.snapshot_name(*id)).collect();
        match found.first() {
            None => Ok(()),
            Some(first) => {
                conflict(format!("it has {} snapshots; delete them first: pollux snapshot delete {first}", found.len()))
            }
        }
    }
}

impl Applying<'_> {
    /// Makes a change that was not refused.
    pub(crate) fn change_snapshots(&mut self, change: &Change) -> Result<Answer, Refusal> {
        match change {
            Change::CreateSnapshot { group, name } => return Ok(self.create_snapshot(*group, name)),
            Change::SnapshotEnded { snapshot, result } => self.end_snapshot(*snapshot, result),
            Change::DeleteSnapshot { snapshot } => {
                let name = self.state.snapshot_name(*snapshot);
                if let Some(group) = self.remove_snapshot(*snapshot) {
                    self.tell(Subject::Group(group), format!("snapshot `{name}` was deleted"));
                }
            }
            Change::RollBack { snapshot } => self.roll_back(*snapshot),
            Change::CloneVolume { of, name } => return self.clone_volume(*of, name),
            Change::CloneVm { snapshot, name } => return self.clone_vm(*snapshot, name),
            Change::Cloned { group } => {
                let revision = self.state.applied;
                let found = self.state.groups.get_mut(group).filter(|found| !found.snapshots.origins.is_empty());
                if let Some(found) = found {
                    found.snapshots.origins.clear();
                    found.snapshots.revision = revision;
                    self.tell(Subject::Group(*group), "the copy is there".into());
                }
            }
            Change::ResizeVolume { volume, size } => self.resize(*volume, *size),
            _ => {}
        }
        Ok(Answer::Done)
    }

    /// Wanted from now on; it counts when it is taken.
    fn create_snapshot(&mut self, group: GroupId, name: &str) -> Answer {
        let id = SnapshotId(self.mint());
        let revision = self.state.applied;
        let Some(of) = self.state.groups.get(&group).map(|found| found.volumes.clone()) else { return Answer::Done };
        let mut volumes = BTreeMap::new();
        for (of, size) in of {
            let volume = VolumeId(self.mint());
            let (origin, key) = match self.state.volumes.get(&of) {
                Some(volume) => (volume.name.clone(), volume.key),
                None => (of.to_string(), None),
            };
            volumes.insert(volume, Frozen { of, size });
            let name = format!("{origin}@{name}");
            self.state.volumes.insert(volume, Volume { name, size, group, exported: false, snapshot: Some(id), key });
        }
        let minted = self.state.last_id;
        if let Some(found) = self.state.groups.get_mut(&group) {
            found.snapshots.revision = revision;
            found.snapshots.minted = minted;
            found.snapshots.each.insert(id, record::Snapshot { taken: None, volumes });
        }
        let snapshot = Snapshot { name: name.to_owned(), group, unix_ms: self.entry.unix_ms };
        self.state.snapshots.insert(id, snapshot);
        Answer::Created { id: id.0 }
    }

    fn end_snapshot(&mut self, id: SnapshotId, result: &Result<(), String>) {
        let (name, revision) = (self.state.snapshot_name(id), self.state.applied);
        let Some(group) = self.state.snapshots.get(&id).map(|found| found.group) else { return };
        let Some(Group { snapshots, record, .. }) = self.state.groups.get_mut(&group) else { return };
        let Some(found) = snapshots.each.get_mut(&id).filter(|found| found.taken.is_none()) else { return };
        match result {
            Ok(()) => {
                found.taken = Some(record.stamp.generation);
                snapshots.revision = revision;
                self.tell(Subject::Group(group), format!("snapshot `{name}` was taken"));
            }
            Err(reason) => {
                self.remove_snapshot(id);
                self.tell(Subject::Group(group), format!("snapshot `{name}` could not be taken: {reason}"));
            }
        }
    }

    /// Its group, if there was such a snapshot.
    fn remove_snapshot(&mut self, id: SnapshotId) -> Option<GroupId> {
        let group = self.state.snapshots.remove(&id)?.group;
        self.state.volumes.retain(|_, volume| volume.snapshot != Some(id));
        let found = self.state.groups.get_mut(&group)?;
        found.snapshots.revision = self.state.applied;
        found.snapshots.each.remove(&id);
        Some(group)
    }

    /// The next record says it; all that is in sync by it goes back before it counts there.
    fn roll_back(&mut self, snapshot: SnapshotId) {
        let (name, revision) = (self.state.snapshot_name(snapshot), self.state.applied);
        let Some(group) = self.state.snapshots.get(&snapshot).map(|found| found.group) else { return };
        let Some(found) = self.state.groups.get(&group) else { return };
        let Some(volumes) = found.snapshots.each.get(&snapshot).map(|snapshot| snapshot.volumes.clone()) else {
            return;
        };
        let (primary, in_sync) = (found.record.primary, found.record.in_sync.clone());
        let generation = self.state.next_record(group, primary, in_sync);
        if let Some(found) = self.state.groups.get_mut(&group) {
            let to = volumes.iter().map(|(volume, frozen)| (frozen.of, *volume)).collect();
            found.snapshots.rollback = Some(Rollback { at: found.record.stamp, to });
            found.snapshots.revision = revision;
        }
        self.tell(Subject::Group(group), format!("{generation:?}: it goes back to snapshot `{name}`"));
    }

    fn clone_volume(&mut self, of: VolumeId, name: &str) -> Result<Answer, Refusal> {
        let gone = || Refusal::NotFound(format!("no volume {of}"));
        let found = self.state.volumes.get(&of).cloned().ok_or_else(gone)?;
        let group = self.state.groups.get(&found.group).ok_or_else(gone)?;
        let (primary, replicas, in_sync) = self.state.birthplaces(group)?;
        let id = VolumeId(self.mint());
        let volumes = vec![Birth { id, name: name.to_owned(), size: found.size, key: found.key }];
        self.bear(Owner::Volume(id), primary, (replicas, in_sync), volumes, BTreeMap::from([(id, of)]));
        let text = format!("volume `{name}` ({}) was cloned from `{}`", bytes_text(found.size.0), found.name);
        self.tell(Subject::Volume(id), text);
        Ok(Answer::Created { id: id.0 })
    }

    fn clone_vm(&mut self, snapshot: SnapshotId, name: &str) -> Result<Answer, Refusal> {
        let gone = || Refusal::NotFound(format!("no VM of snapshot {snapshot}"));
        let of = self.state.snapshot_name(snapshot);
        let group = self.state.snapshots.get(&snapshot).map(|found| found.group).ok_or_else(gone)?;
        let group = self.state.groups.get(&group).ok_or_else(gone)?;
        let frozen = group.snapshots.each.get(&snapshot).map(|found| found.volumes.clone()).ok_or_else(gone)?;
        let Owner::Vm(source) = group.owner else { return Err(gone()) };
        let source = self.state.vms.get(&source).cloned().ok_or_else(gone)?;
        let (primary, replicas, in_sync) = self.state.birthplaces(group)?;
        let id = VmId(self.mint());
        let (mut volumes, mut origins) = (Vec::new(), BTreeMap::new());
        for (number, disk) in source.volumes.iter().enumerate() {
            let (from, Frozen { size, .. }) = frozen.iter().find(|(_, frozen)| frozen.of == *disk).ok_or_else(gone)?;
            let volume = VolumeId(self.mint());
            origins.insert(volume, *from);
            let key = self.state.volumes.get(disk).and_then(|disk| disk.key);
            volumes.push(Birth { id: volume, name: format!("vm/{name}/disk{number}"), size: *size, key });
        }
        let disks = volumes.iter().map(|volume| volume.size).collect();
        let ids = volumes.iter().map(|volume| volume.id).collect();
        let group = self.bear(Owner::Vm(id), primary, (replicas, in_sync), volumes, origins);
        let mac = mac_of(&self.state.name, id);
        let vm = Vm {
            spec: VmSpec { name: name.to_owned(), image: None, disks, mac, ..source.spec },
            group,
            volumes: ids,
            wanted: Wanted::Stopped,
            phase: VmPhase::Stopped,
            incarnation: Incarnation(0),
            node: primary,
            filled: true,
            reason: "never started".into(),
            since_unix_ms: self.entry.unix_ms,
        };
        self.state.vms.insert(id, vm);
        self.tell(Subject::Vm(id), format!("VM `{name}` was cloned from `{of}`"));
        Ok(Answer::Created { id: id.0 })
    }

    fn resize(&mut self, volume: VolumeId, size: ByteCount) {
        let Some(found) = self.state.volumes.get_mut(&volume).filter(|found| found.size < size) else { return };
        found.size = size;
        let (group, text) = (found.group, format!("volume `{}` has {} now", found.name, bytes_text(size.0)));
        if let Some(group) = self.state.groups.get_mut(&group) {
            group.volumes.insert(volume, size);
        }
        for vm in self.state.vms.values_mut() {
            let disk = vm.volumes.iter().position(|other| *other == volume);
            if let Some(disk) = disk.and_then(|disk| vm.spec.disks.get_mut(disk)) {
                *disk = size;
            }
        }
        self.tell(Subject::Volume(volume), text);
    }
}

impl Cluster {
    /// What the primary here says of snapshots goes to the log, until the log knows.
    pub(crate) fn end_snapshots(&mut self, now: Instant) {
        let groups = &self.state.groups;
        let waits =
            |id: &SnapshotId| groups.values().any(|g| g.snapshots.untaken().is_some_and(|(other, _)| other == *id));
        self.groups.snapshots.retain(|id, _| waits(id));
        for (snapshot, result) in self.groups.snapshots.clone() {
            let change = Change::SnapshotEnded { snapshot, result };
            self.propose(now, ("snapshot", snapshot.0, 0), change);
        }
    }

    /// A primary here that serves a group born as a copy: every replica in sync has it.
    pub(crate) fn end_births(&mut self, now: Instant) {
        let is_born = |group: &GroupId| {
            self.groups
                .reports
                .get(group)
                .is_some_and(|report| report.state == ReplicaState::Serving && !report.is_unborn)
        };
        let copies = self.state.groups.iter().filter(|(id, group)| {
            group.record.primary == self.me && !group.snapshots.origins.is_empty() && is_born(id)
        });
        for group in copies.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.propose(now, ("cloned", group.0, 0), Change::Cloned { group });
        }
    }

    pub(crate) fn on_compare(&mut self, request: u64, group: GroupId, one: VolumeId, two: VolumeId, from: ExtentIndex) {
        if !self.groups.is_connected {
            let result = conflict("this node's data plane does not run; ask again in a moment".into());
            return self.output(Output::Answer { request, result });
        }
        self.groups.comparing.insert(request);
        self.output(Output::Data(Order::Compare { id: request, group, one, two, from }));
    }

    pub(crate) fn on_compared(&mut self, request: u64, result: Result<Differences, String>) {
        if self.groups.comparing.remove(&request) {
            let result = result.map(Answer::Differ).map_err(Refusal::Conflict);
            self.output(Output::Answer { request, result });
        }
    }

    /// The data plane is gone, and what it was asked with it.
    pub(crate) fn forget_comparisons(&mut self) {
        for request in std::mem::take(&mut self.groups.comparing) {
            let result = conflict("this node's data plane was restarted; ask again".into());
            self.output(Output::Answer { request, result });
        }
    }
}
