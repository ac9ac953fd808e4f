//! Applying an entry: a pure function of state and entry, the same on every node.
//!
//! An entry that names what it expects changes nothing when it is not so; one that came twice changes nothing the second
//! time. Every change of authority leaves an event that tells its reason and proof.

use crate::entry::{Change, Entry, FenceProof, Holder, NodePhase, Proof, Subject, VmPhase, VmSpec, Wanted};
use crate::requests::refuse;
use crate::scrubs::Scrubs;
use crate::seam::{Answer, Refusal};
use crate::state::{Authority, Event, Group, Image, Node, Owner, REQUESTS_MAX, State, Vm, Volume};
use crate::vm_life::Step;
use pollux_base::record::{LagBound, Lineage, Mode, Snapshots};
use pollux_base::unit::bytes_text;
use pollux_base::{
    ByteCount, Epoch, Generation, GroupId, GroupRecord, ImageId, Incarnation, KeyId, NodeId, SealedKey, Stamp, VmId,
    VolumeId,
};
use std::collections::{BTreeMap, BTreeSet};

impl State {
    /// Applies the entry at `index`. What it was answered matters only to whoever asked.
    pub fn apply(&mut self, index: u64, entry: &Entry) -> Result<Answer, Refusal> {
        self.applied = index;
        if let Some(request) = entry.request {
            let key = (entry.by, request, entry.unix_ms);
            if self.requests.contains(&key) {
                return Ok(Answer::Done);
            }
            if self.requests.len() == REQUESTS_MAX {
                self.requests.pop_front();
            }
            self.requests.push_back(key);
        }
        let answer = Applying { state: self, entry }.change();
        debug_assert!({
            self.check();
            true
        });
        answer
    }
}

/// A volume that is about to be.
pub(crate) struct Birth {
    pub id: VolumeId,
    pub name: String,
    pub size: ByteCount,
    pub key: Option<KeyId>,
}

pub(crate) struct Applying<'a> {
    pub(crate) state: &'a mut State,
    pub(crate) entry: &'a Entry,
}

impl Applying<'_> {
    fn change(&mut self) -> Result<Answer, Refusal> {
        let entry = self.entry;
        if !self.state.is_initialised() && !matches!(entry.change, Change::Init { .. }) {
            return Err(Refusal::Conflict("the cluster has no first entry yet".into()));
        }
        refuse(self.state, &entry.change)?;
        match &entry.change {
            Change::Init { name, nodes, witness } => {
                if self.state.is_initialised() || name.is_empty() || nodes.is_empty() {
                    return Err(Refusal::Conflict("the cluster exists already".into()));
                }
                self.state.name = name.clone();
                self.state.witness = *witness;
                self.state.nodes = nodes
                    .iter()
                    .map(|(id, spec)| {
                        let spec = spec.clone();
                        (*id, Node { spec, phase: NodePhase::Online, proof: None, since_unix_ms: entry.unix_ms })
                    })
                    .collect();
                self.state.authority = Authority {
                    epoch: Epoch(1),
                    holder: Holder::Members,
                    proof: Proof::Members,
                    since_unix_ms: entry.unix_ms,
                };
                let names: Vec<&str> = nodes.values().map(|node| node.name.as_str()).collect();
                self.tell(Subject::Cluster, format!("cluster `{name}` was born with nodes {}", names.join(", ")));
                Ok(Answer::Done)
            }
            Change::RaiseEpoch { expect, epoch, holder, proof } => self.raise_epoch(*expect, *epoch, *holder, proof),
            Change::NodePhase { node, epoch, phase, proof } => self.node_phase(*node, *epoch, *phase, proof.clone()),
            Change::CreateImage { name, size, node, key } => {
                let id = ImageId(self.mint());
                let volume = (format!("image/{name}"), *size, self.keep_key(key.as_ref()));
                let (group, volumes) = self.create_group(Owner::Image(id), *node, vec![volume]);
                let image = Image { name: name.clone(), size: *size, volume: volumes[0], group, sha256: None };
                self.state.images.insert(id, image);
                self.tell(Subject::Image(id), format!("image `{name}` ({}) is being uploaded", bytes_text(size.0)));
                Ok(Answer::Created { id: id.0 })
            }
            Change::ImageReady { image, sha256 } => {
                if let Some(found) = self.state.images.get_mut(image).filter(|found| found.sha256.is_none()) {
                    found.sha256 = Some(sha256.clone());
                    let text = format!("image `{}` is complete", found.name);
                    self.tell(Subject::Image(*image), text);
                }
                Ok(Answer::Done)
            }
            Change::DeleteImage { image } => {
                if let Some(found) = self.state.images.remove(image) {
                    self.delete_group(found.group);
                    self.tell(Subject::Image(*image), format!("image `{}` was deleted", found.name));
                }
                Ok(Answer::Done)
            }
            Change::CreateVm { spec, node, keys } => self.create_vm(spec, *node, keys),
            Change::DeleteVm { vm } => {
                if let Some(found) = self.state.vms.remove(vm) {
                    self.delete_group(found.group);
                    self.tell(Subject::Vm(*vm), format!("VM `{}` was deleted", found.spec.name));
                }
                Ok(Answer::Done)
            }
            Change::WantVm { vm, wanted } => self.want_vm(*vm, *wanted),
            Change::VmPhase { vm, expect, incarnation, node, phase, reason } => {
                self.vm_phase(*vm, *expect, *incarnation, *node, *phase, reason)
            }
            Change::CreateVolume { name, size, node, key } => {
                let id = VolumeId(self.mint());
                let volume = Birth { id, name: name.clone(), size: *size, key: self.keep_key(key.as_ref()) };
                self.create_group_of(Owner::Volume(id), *node, vec![volume]);
                let how = if key.is_some() { "was created, encrypted" } else { "was created" };
                let text = format!("volume `{name}` ({}) {how}", bytes_text(size.0));
                self.tell(Subject::Volume(id), text);
                Ok(Answer::Created { id: id.0 })
            }
            Change::DeleteVolume { volume } => {
                if let Some(found) = self.state.volumes.get(volume).cloned() {
                    self.delete_group(found.group);
                    self.tell(Subject::Volume(*volume), format!("volume `{}` was deleted", found.name));
                }
                Ok(Answer::Done)
            }
            Change::ExportVolume { volume, exported } => {
                if let Some(found) = self.state.volumes.get_mut(volume).filter(|found| found.exported != *exported) {
                    found.exported = *exported;
                    let text = match exported {
                        true => format!("volume `{}` is exported", found.name),
                        false => format!("volume `{}` is no longer exported", found.name),
                    };
                    self.tell(Subject::Volume(*volume), text);
                }
                Ok(Answer::Done)
            }
            Change::CreateSnapshot { .. }
            | Change::SnapshotEnded { .. }
            | Change::DeleteSnapshot { .. }
            | Change::RollBack { .. }
            | Change::CloneVolume { .. }
            | Change::CloneVm { .. }
            | Change::Cloned { .. }
            | Change::ResizeVolume { .. } => self.change_snapshots(&entry.change),
            Change::SetGroup { group, expect, primary, in_sync, reason } => {
                self.set_group(*group, *expect, *primary, in_sync, reason)
            }
            Change::SetMode { .. }
            | Change::SetLag { .. }
            | Change::AddReplica { .. }
            | Change::RemoveReplica { .. }
            | Change::MoveReplica { .. }
            | Change::CancelMove { .. }
            | Change::FinishMove { .. }
            | Change::PromoteReplica { .. } => {
                let (group, text) = self.state.change_replicas(&entry.change)?;
                self.tell(Subject::Group(group), text);
                Ok(Answer::Done)
            }
            Change::DiscardReplica { group, node, loser } => {
                if let Some(found) = self.state.groups.get_mut(group) {
                    found.discards.insert(*node, *loser);
                    let name = self.state.node_name(*node);
                    self.tell(
                        Subject::Group(*group),
                        format!("a human gave up the diverged replica on `{name}` ({:?})", loser.generation),
                    );
                }
                Ok(Answer::Done)
            }
            Change::ScrubGroup { group, expect } => {
                let number = self.state.applied;
                if self.state.want_scrub(*group, *expect, number) {
                    let why = if expect.is_some() { "it is time for a scrub" } else { "a user wants a scrub" };
                    self.tell(Subject::Group(*group), why.into());
                }
                let id = self.state.groups.get(group).map_or(number, |found| found.scrubs.wanted);
                Ok(Answer::Created { id })
            }
            Change::ScrubEvery { group, days } => {
                if let Some(found) = self.state.groups.get_mut(group).filter(|found| found.scrubs.every_days != *days) {
                    found.scrubs.every_days = *days;
                    let text = match days {
                        0 => "it is scrubbed only when somebody asks".into(),
                        days => format!("it is scrubbed every {days} days"),
                    };
                    self.tell(Subject::Group(*group), text);
                }
                Ok(Answer::Done)
            }
            Change::Scrubbed { group, report } => {
                if self.state.end_scrub(*group, entry.unix_ms, report) {
                    let text = self.state.scrubbed_text(report);
                    self.tell(Subject::Group(*group), text);
                }
                Ok(Answer::Done)
            }
            Change::Found { group, finding } => {
                if self.state.tell_finding(entry.by, *group, finding) {
                    let text = self.state.finding_text(finding);
                    self.tell(Subject::Group(*group), text);
                }
                Ok(Answer::Done)
            }
            Change::VmFilled { vm } => {
                if let Some(found) = self.state.vms.get_mut(vm).filter(|found| !found.filled) {
                    found.filled = true;
                    self.tell(Subject::Vm(*vm), "its first disk holds the image".into());
                }
                Ok(Answer::Done)
            }
            Change::Awake { node, .. } => {
                let text = format!("noded of `{}` follows the log", self.state.node_name(*node));
                self.tell(Subject::Node(*node), text);
                Ok(Answer::Done)
            }
            Change::SealKeys { master, keys, .. } => Ok(self.seal_keys(*master, keys)),
            Change::Note { subject, text } => {
                self.tell(*subject, text.clone());
                Ok(Answer::Done)
            }
        }
    }

    fn raise_epoch(&mut self, expect: Epoch, epoch: Epoch, holder: Holder, proof: &Proof) -> Result<Answer, Refusal> {
        if self.state.authority.epoch != expect || epoch <= expect {
            return Err(stale(format!("{:?} follows {expect:?}; present is {:?}", epoch, self.state.authority.epoch)));
        }
        let by_what = match proof {
            Proof::Witness => "the witness' register was swapped".to_owned(),
            Proof::Human { token } => format!("a human confirmed `{token}`"),
            Proof::Members => "all members are there".to_owned(),
        };
        let text = match holder {
            Holder::Members => format!("{epoch:?}: all members decide again ({by_what})"),
            Holder::Alone { node } => {
                if !self.state.nodes.contains_key(&node) {
                    return Err(Refusal::NotFound(format!("no node {node}")));
                }
                format!("{epoch:?}: `{}` goes on alone ({by_what})", self.state.node_name(node))
            }
        };
        let since_unix_ms = self.entry.unix_ms;
        self.state.authority = Authority { epoch, holder, proof: proof.clone(), since_unix_ms };
        self.tell(Subject::Cluster, text);
        Ok(Answer::Done)
    }

    fn node_phase(
        &mut self,
        node: NodeId,
        epoch: Epoch,
        phase: NodePhase,
        proof: Option<FenceProof>,
    ) -> Result<Answer, Refusal> {
        if epoch != self.state.authority.epoch {
            return Err(stale(format!("of {epoch:?}; present is {:?}", self.state.authority.epoch)));
        }
        let alone = self.state.alone();
        let unix_ms = self.entry.unix_ms;
        let Some(found) = self.state.nodes.get_mut(&node) else {
            return Err(Refusal::NotFound(format!("no node {node}")));
        };
        let name = found.spec.name.clone();
        let text = match (found.phase, phase, &proof) {
            (NodePhase::Online, NodePhase::Lost, None) if alone != Some(node) => {
                format!("`{name}` is lost; its VMs wait for proof that it can not act")
            }
            (NodePhase::Lost, NodePhase::Fenced, Some(proof)) => {
                format!("`{name}` is proven unable to act: {}", proof.text())
            }
            // A node that came back, was taken in and is a member again; or it was a member for so short a time that it has the
            // grant before anybody said so.
            (NodePhase::Fenced, NodePhase::Online, None) if alone.is_none_or(|alone| alone == node) => {
                format!("`{name}` is back")
            }
            (from, to, _) => return Err(stale(format!("`{name}` does not go from {from:?} to {to:?}"))),
        };
        found.phase = phase;
        found.proof = proof;
        found.since_unix_ms = unix_ms;
        self.tell(Subject::Node(node), text);
        Ok(Answer::Done)
    }

    fn create_vm(&mut self, spec: &VmSpec, node: NodeId, keys: &[SealedKey]) -> Result<Answer, Refusal> {
        let id = VmId(self.mint());
        let mut spec = spec.clone();
        if spec.mac.is_empty() {
            spec.mac = mac_of(&self.state.name, id);
        }
        let disks = spec.disks.iter().enumerate();
        let disks = disks
            .map(|(number, size)| (format!("vm/{}/disk{number}", spec.name), *size, self.keep_key(keys.get(number))))
            .collect();
        let (group, volumes) = self.create_group(Owner::Vm(id), node, disks);
        let text = format!(
            "VM `{}` was created on `{}`: {} CPUs, {} of memory, {} {}disks",
            spec.name,
            self.state.node_name(node),
            spec.cpus,
            bytes_text(spec.memory.0),
            spec.disks.len(),
            if keys.is_empty() { "" } else { "encrypted " }
        );
        let vm = Vm {
            filled: spec.image.is_none(),
            spec,
            group,
            volumes,
            wanted: Wanted::Stopped,
            phase: VmPhase::Stopped,
            incarnation: Incarnation(0),
            node,
            reason: "never started".into(),
            since_unix_ms: self.entry.unix_ms,
        };
        self.state.vms.insert(id, vm);
        self.tell(Subject::Vm(id), text);
        Ok(Answer::Created { id: id.0 })
    }

    fn want_vm(&mut self, vm: VmId, wanted: Wanted) -> Result<Answer, Refusal> {
        let by = self.state.node_name(self.entry.by);
        let Some(found) = self.state.vms.get_mut(&vm) else {
            return Err(Refusal::NotFound(format!("no VM {vm}")));
        };
        // A new wish is a new chance.
        let is_retry = found.phase == VmPhase::Failed;
        if found.wanted == wanted && !is_retry {
            return Ok(Answer::Done);
        }
        found.wanted = wanted;
        if is_retry {
            found.phase = VmPhase::Stopped;
        }
        self.tell(Subject::Vm(vm), format!("the user wants it {} (asked of `{by}`)", wanted.name()));
        Ok(Answer::Done)
    }

    fn vm_phase(
        &mut self,
        vm: VmId,
        expect: Incarnation,
        incarnation: Incarnation,
        node: NodeId,
        phase: VmPhase,
        reason: &str,
    ) -> Result<Answer, Refusal> {
        let unix_ms = self.entry.unix_ms;
        let nodes: BTreeMap<NodeId, NodePhase> = self.state.nodes.iter().map(|(id, node)| (*id, node.phase)).collect();
        let Some(found) = self.state.vms.get(&vm) else {
            return Err(Refusal::NotFound(format!("no VM {vm}")));
        };
        if found.incarnation != expect {
            return Err(stale(format!("of {expect:?}; present is {:?}", found.incarnation)));
        }
        match found.phase.step(phase) {
            None => return Err(stale(format!("a VM that is {} does not become {}", found.phase.name(), phase.name()))),
            Some(Step::SameRun) if incarnation != expect || node != found.node => {
                return Err(stale("this step keeps run and node".into()));
            }
            Some(Step::SameRun) => {}
            Some(Step::NewRun) => {
                if incarnation != expect.next() {
                    return Err(stale(format!("after {expect:?} comes {:?}", expect.next())));
                }
                if nodes.get(&node) != Some(&NodePhase::Online) {
                    return Err(stale("a VM starts on a node that is online".into()));
                }
                // Section 5: while the last run's node may still act, nothing of its unfinished runs starts anew.
                if found.phase == VmPhase::Recovering && nodes.get(&found.node) == Some(&NodePhase::Lost) {
                    return Err(stale("the node of the last run is not proven unable to act".into()));
                }
                if self.state.groups.get(&found.group).is_none_or(|group| group.record.primary != node) {
                    return Err(stale("a VM starts where its disks are primary".into()));
                }
                if !found.filled || found.wanted != Wanted::Running {
                    return Err(stale("the VM is not to start now".into()));
                }
            }
        }
        let name = self.state.node_name(node);
        let is_shutdown_from_inside = found.phase == VmPhase::Running && phase == VmPhase::Stopped;
        let Some(found) = self.state.vms.get_mut(&vm) else {
            return Ok(Answer::Done);
        };
        found.phase = phase;
        found.incarnation = incarnation;
        found.node = node;
        found.reason = reason.to_owned();
        found.since_unix_ms = unix_ms;
        if is_shutdown_from_inside {
            // Regression 71: what its user shut down from inside stays down.
            found.wanted = Wanted::Stopped;
        }
        let text = format!("{} on `{name}`, {incarnation:?}: {reason}", phase.name());
        self.tell(Subject::Vm(vm), text);
        Ok(Answer::Done)
    }

    /// W3, W4, W9: the record of a group.
    fn set_group(
        &mut self,
        group: GroupId,
        expect: Stamp,
        primary: NodeId,
        in_sync: &BTreeSet<NodeId>,
        reason: &str,
    ) -> Result<Answer, Refusal> {
        let epoch = self.state.authority.epoch;
        let Some(found) = self.state.groups.get_mut(&group) else {
            return Err(Refusal::NotFound(format!("no group {group}")));
        };
        let old = &found.record;
        if old.stamp != expect {
            return Err(stale(format!("of {:?}; present is {:?}", expect.generation, old.stamp.generation)));
        }
        if in_sync.is_empty() || !in_sync.is_subset(&found.replicas) {
            return Err(stale("the in-sync set is never empty and holds replicas only".into()));
        }
        if in_sync.iter().any(|node| found.mode(*node) == Mode::Async) {
            return Err(stale("a trailing replica is never in sync".into()));
        }
        if primary != old.primary && !(old.in_sync.contains(&primary) && in_sync.contains(&primary)) {
            return Err(stale("only a member of the in-sync set becomes primary (W4)".into()));
        }
        // Without a common member nobody is left who has every acknowledged write.
        if in_sync.is_disjoint(&old.in_sync) {
            return Err(stale("a new in-sync set keeps a member of the old one".into()));
        }
        // The same record anew is a change, too: its generation ends what was reported under the one before.
        let stamp = Stamp { epoch, generation: expect.generation.next() };
        found.record = GroupRecord { stamp, primary, in_sync: in_sync.clone() };
        found.lineage.push(stamp);
        found.discards.retain(|node, _| !in_sync.contains(node));
        let names: Vec<String> = in_sync.iter().map(|node| format!("`{}`", self.state.node_name(*node))).collect();
        let primary = self.state.node_name(primary);
        let text = format!("{:?}: primary `{primary}`, in sync {}; {reason}", stamp.generation, names.join(" and "));
        self.tell(Subject::Group(group), text);
        Ok(Answer::Done)
    }

    /// A new group with new volumes.
    fn create_group(
        &mut self,
        owner: Owner,
        node: NodeId,
        volumes: Vec<(String, ByteCount, Option<KeyId>)>,
    ) -> (GroupId, Vec<VolumeId>) {
        let born = |(name, size, key)| Birth { id: VolumeId(self.mint()), name, size, key };
        let volumes: Vec<Birth> = volumes.into_iter().map(born).collect();
        let ids = volumes.iter().map(|volume| volume.id).collect();
        (self.create_group_of(owner, node, volumes), ids)
    }

    /// W12: the first generation is minted here, once. Nodes that are out of the membership get a replica too, but are
    /// not in sync: they join like any stale one.
    fn create_group_of(&mut self, owner: Owner, node: NodeId, volumes: Vec<Birth>) -> GroupId {
        let replicas = self.state.birth_replicas(node);
        let is_online = |node: &NodeId| self.state.nodes.get(node).is_some_and(|node| node.phase == NodePhase::Online);
        let in_sync: BTreeSet<NodeId> = replicas.iter().copied().filter(is_online).collect();
        self.bear(owner, node, (replicas, in_sync), volumes, BTreeMap::new())
    }

    /// The first pair: where its replicas are, and which of them are in sync. `origins`: what volumes are copies of.
    pub(crate) fn bear(
        &mut self,
        owner: Owner,
        node: NodeId,
        (replicas, in_sync): (BTreeSet<NodeId>, BTreeSet<NodeId>),
        volumes: Vec<Birth>,
        origins: BTreeMap<VolumeId, VolumeId>,
    ) -> GroupId {
        let group = GroupId(self.mint());
        let stamp = Stamp { epoch: self.state.authority.epoch, generation: Generation(1) };
        let mut lineage = Lineage::default();
        lineage.push(stamp);
        let sizes = volumes.iter().map(|volume| (volume.id, volume.size)).collect();
        for Birth { id, name, size, key } in volumes {
            self.state.volumes.insert(id, Volume { name, size, group, exported: false, snapshot: None, key });
        }
        let record = GroupRecord { stamp, primary: node, in_sync };
        let found = Group {
            owner,
            replicas,
            modes: BTreeMap::new(),
            lag: LagBound::default(),
            volumes: sizes,
            snapshots: Snapshots { revision: self.state.applied, origins, ..Snapshots::default() },
            record,
            lineage,
            discards: BTreeMap::new(),
            scrubs: Scrubs::born(self.entry.unix_ms),
            moving: None,
        };
        self.state.groups.insert(group, found);
        group
    }

    fn delete_group(&mut self, group: GroupId) {
        self.state.groups.remove(&group);
        self.state.volumes.retain(|_, volume| volume.group != group);
        self.state.snapshots.retain(|_, snapshot| snapshot.group != group);
        self.state.drop_unused_keys();
    }

    pub(crate) fn mint(&mut self) -> u64 {
        self.state.last_id += 1;
        self.state.last_id
    }

    pub(crate) fn tell(&mut self, subject: Subject, text: String) {
        let event = Event { index: 0, unix_ms: self.entry.unix_ms, by: self.entry.by, subject, text };
        self.state.push_event(event);
    }
}

/// What was expected is not so (any more): nothing was changed.
fn stale(text: String) -> Refusal {
    Refusal::Conflict(text)
}

/// A locally administered address, the same for this VM on every node and hardly the same in another cluster: FNV-1a of the
/// cluster's name, then the VM's number.
pub(crate) fn mac_of(cluster: &str, vm: VmId) -> String {
    let fnv = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let hash = cluster.bytes().fold(0xcbf2_9ce4_8422_2325, fnv);
    let number = vm.0.to_be_bytes();
    let [a, b] = [(hash >> 8) as u8, hash as u8];
    format!("52:{a:02x}:{b:02x}:{:02x}:{:02x}:{:02x}", number[5], number[6], number[7])
}

impl FenceProof {
    /// For people.
    pub fn text(&self) -> String {
        match self {
            FenceProof::PowerOff { uuid } => format!("its power ({uuid}) was switched off and read back as off"),
            FenceProof::GuardBound { waited_ms } => {
                format!("its guard's lease ran out and its guests are dead: {waited_ms} ms have passed")
            }
            FenceProof::Human { token } => format!("a human confirmed `{token}`"),
        }
    }
}

impl VmPhase {
    /// The word shown to people.
    pub fn name(self) -> &'static str {
        match self {
            VmPhase::Stopped => "stopped",
            VmPhase::Starting => "starting",
            VmPhase::Running => "running",
            VmPhase::Stopping => "stopping",
            VmPhase::Recovering => "recovering",
            VmPhase::Failed => "failed",
        }
    }
}

impl Wanted {
    /// The word shown to people.
    pub fn name(self) -> &'static str {
        match self {
            Wanted::Running => "running",
            Wanted::Stopped => "stopped",
            Wanted::Off => "off",
        }
    }
}
