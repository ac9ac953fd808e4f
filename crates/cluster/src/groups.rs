//! Records of groups (W3, W4, W6, W9) and orders to the data plane.
//!
//! A record is proposed by one node only: that of the group's primary, or whoever goes on alone. Orders state what is to
//! hold; they are given when the log changes and anew after each connection.

use crate::core::Cluster;
use crate::disks::DiskCommands;
use crate::entry::{Change, FenceProof, NodePhase, Subject};
use crate::scrubs::SentScrubs;
use crate::seam::Output;
use crate::state::{Event, Owner};
use pollux_base::order::{GroupReport, Offer, PathReport, PathState, ReplicaState};
use pollux_base::pool::{PoolLevel, PoolReport, VerifyReport};
use pollux_base::record::{GroupNames, GroupSpec};
use pollux_base::{
    Epoch, Generation, GroupId, Instant, Kept, KeyId, NodeId, Order, Report, SealedKey, SnapshotId, Stamp,
};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Default)]
pub(crate) struct Groups {
    pub is_connected: bool,
    pub reports: BTreeMap<GroupId, GroupReport>,
    pub pool_failure: Option<String>,
    /// This node's pool, as last reported.
    pub pool: Option<PoolReport>,
    /// The worst level since the pool was last well, and what the event of it says.
    pool_told: Option<(PoolLevel, String)>,
    /// Connections to the peers' data planes, as last reported, and whether they are encrypted.
    pub paths: BTreeMap<NodeId, Vec<PathReport>>,
    pub is_encrypted: Option<bool>,
    /// The primary here is frozen until these are out of the in-sync set.
    lost: BTreeMap<(GroupId, NodeId), (Generation, String)>,
    /// The primary here writes to these too: they may enter the in-sync set.
    current: BTreeMap<(GroupId, NodeId), (Generation, u64)>,
    /// Groups of which the data plane held anything when it was connected: some may have been deleted while it was away.
    held: BTreeSet<GroupId>,
    pub disk_commands: DiskCommands,
    /// What of what this node keeps is offered, until this process ends.
    pub kept_exports: BTreeSet<Kept>,
    /// The verification of this node's pool that was asked for last.
    pub verified: Option<VerifyReport>,
    /// Comparisons that the data plane was asked for.
    pub comparing: BTreeSet<u64>,
    /// Snapshots of which the primary here says how they ended.
    pub snapshots: BTreeMap<SnapshotId, Result<(), String>>,
    /// Keys that could not be opened here, and why.
    pub refused_keys: BTreeMap<KeyId, String>,
    pub to_discard: BTreeMap<GroupId, Stamp>,
    sent: Sent,
}

/// What the data plane was told on this connection.
#[derive(Default)]
struct Sent {
    groups: BTreeMap<GroupId, GroupSpec>,
    names: BTreeMap<GroupId, GroupNames>,
    exports: Option<BTreeMap<String, Offer>>,
    fenced: BTreeSet<(NodeId, Epoch)>,
    forgotten: BTreeSet<GroupId>,
    scrubs: SentScrubs,
    /// Keys of volumes, and under which master key each was sealed then.
    keys: BTreeMap<KeyId, KeyId>,
}

impl Groups {
    pub(crate) fn sent_scrubs(&mut self) -> &mut SentScrubs {
        &mut self.sent.scrubs
    }

    /// Under which master key a key was sealed when the data plane was last to be given it.
    pub(crate) fn opened_under(&self, key: KeyId) -> Option<KeyId> {
        self.sent.keys.get(&key).copied()
    }

    pub(crate) fn note_opened(&mut self, sealed: &SealedKey) {
        self.sent.keys.insert(sealed.key, sealed.master);
    }
}

impl Cluster {
    pub(crate) fn on_data_connected(&mut self) {
        self.groups.is_connected = true;
        self.groups.sent = Sent::default();
        self.groups.reports.clear();
        self.groups.pool_failure = None;
        self.groups.pool = None;
        self.groups.paths.clear();
        self.groups.refused_keys.clear();
        self.output(Output::Data(Order::ReportAll));
        let others = self.setup.nodes.iter().filter(|(node, _)| **node != self.me);
        let addresses = others.map(|(node, spec)| (*node, spec.replication.clone())).collect();
        self.output(Output::Data(Order::Peers { addresses }));
    }

    pub(crate) fn on_data(&mut self, report: Option<Report>) {
        match report {
            None => {
                self.groups.is_connected = false;
                self.groups.held.clear();
                self.groups.sent = Sent::default();
                self.groups.pool = None;
                self.groups.paths.clear();
                // A restarted data plane reports what still holds.
                self.groups.lost.clear();
                self.groups.current.clear();
                self.groups.snapshots.clear();
                self.forget_comparisons();
                self.forget_disk_commands();
                self.groups.verified = None;
            }
            Some(Report::Group(report)) if report.state == ReplicaState::Absent => {
                self.groups.reports.remove(&report.group);
            }
            Some(Report::Group(report)) => {
                self.groups.reports.insert(report.group, *report);
            }
            Some(Report::Holds { groups }) => self.groups.held = groups,
            Some(Report::ReplicaLost { group, generation, node, reason }) => {
                self.groups.current.remove(&(group, node));
                self.groups.lost.insert((group, node), (generation, reason));
            }
            Some(Report::ReplicaCurrent { group, generation, node, minted }) => {
                self.groups.lost.remove(&(group, node));
                self.groups.current.insert((group, node), (generation, minted));
            }
            Some(Report::Snapshot { snapshot, result, .. }) => {
                self.groups.snapshots.insert(snapshot, result);
            }
            Some(Report::Compared { id, result }) => self.on_compared(id, result),
            Some(Report::Verified(report)) => self.on_verified(*report),
            Some(Report::DiskChanged { id, result }) => self.on_disk_changed(id, result),
            Some(Report::PoolFailed { reason }) => self.groups.pool_failure = Some(reason),
            Some(Report::Pool(report)) => self.groups.pool = Some(report),
            Some(Report::Paths { is_encrypted, paths }) => {
                self.groups.is_encrypted = Some(is_encrypted);
                self.groups.paths.clear();
                for path in paths {
                    self.groups.paths.entry(path.peer).or_default().push(path);
                }
            }
        }
    }

    /// Newest reports of the local data plane.
    pub fn group_reports(&self) -> impl Iterator<Item = &GroupReport> {
        self.groups.reports.values()
    }

    pub(crate) fn reconcile_groups(&mut self, now: Instant) {
        let groups = &self.state.groups;
        // A report about an older record than the present one asks for nothing any more.
        let is_present = |group: &GroupId, generation: Generation| {
            groups.get(group).is_some_and(|found| found.record.stamp.generation <= generation)
        };
        self.groups.lost.retain(|(group, _), (generation, _)| !self.is_awake || is_present(group, *generation));
        self.groups.current.retain(|(group, _), (generation, _)| !self.is_awake || is_present(group, *generation));
        if self.may_act() {
            self.drop_lost_nodes(now);
            self.drop_lost_replicas(now);
            self.add_current_replicas(now);
            self.finish_moves(now);
            self.hand_over_to_data(now);
            self.end_snapshots(now);
            self.end_births(now);
            self.tell_of_pool(now);
            self.tell_of_disks(now);
            self.reconcile_scrubs(now);
            self.tell_of_paths(now);
        }
        if self.groups.is_connected && self.is_awake {
            self.order_groups();
            self.order_scrubs();
        }
    }

    /// Alone: every group that has a good copy here goes on with it, and without the lost node.
    fn drop_lost_nodes(&mut self, now: Instant) {
        if !self.acts_alone() {
            return;
        }
        let me = self.me;
        let mut changes = Vec::new();
        for (id, group) in &self.state.groups {
            let record = &group.record;
            let has_others = record.primary != me || record.in_sync.iter().any(|node| *node != me);
            // A birth that is not confirmed waits for the other node: nothing was ever written. Who cannot say waits, too. And what
            // was lost here with a disk only the other node has.
            let report = self.groups.reports.get(id).filter(|_| self.groups.is_connected);
            let waits = report.is_none_or(|report| report.is_unborn || report.is_incomplete);
            if record.in_sync.contains(&me) && has_others && !waits {
                let others = record.in_sync.iter().chain([&record.primary]).find(|node| **node != me);
                let name = others.map_or_else(String::new, |node| self.name_of(*node));
                let reason = format!("`{name}` is lost, `{}` goes on alone", self.name_of(me));
                changes.push((*id, record.stamp, reason));
            }
        }
        for (group, expect, reason) in changes {
            self.set_group(now, group, expect, me, BTreeSet::from([me]), reason);
        }
    }

    /// W3, W6: the primary's node has the record without the lost replica committed.
    fn drop_lost_replicas(&mut self, now: Instant) {
        for ((id, node), (generation, reason)) in self.groups.lost.clone() {
            let Some(group) = self.state.groups.get(&id) else {
                continue;
            };
            let record = group.record.clone();
            let mut in_sync = record.in_sync.clone();
            // It may be lost right after it was reported as current and before a record named it. Then the same set is
            // committed anew: under the next generation the primary knows that no record with the replica can come.
            in_sync.remove(&node);
            let is_asked = record.primary == self.me && record.stamp.generation == generation;
            let is_incomplete = self.groups.reports.get(&id).is_some_and(|report| report.is_incomplete);
            let gives_up = is_incomplete && in_sync == BTreeSet::from([self.me]);
            if is_asked && !in_sync.is_empty() && !gives_up {
                let reason = format!("`{}` is out: {reason}", self.name_of(node));
                self.set_group(now, id, record.stamp, record.primary, in_sync, reason);
            }
        }
    }

    /// W9: a replica enters when the primary says that it is up to date, and its node is a member.
    fn add_current_replicas(&mut self, now: Instant) {
        for ((id, node), (generation, minted)) in self.groups.current.clone() {
            let Some(group) = self.state.groups.get(&id) else {
                continue;
            };
            let record = group.record.clone();
            let is_online = self.state.nodes.get(&node).is_some_and(|node| node.phase == NodePhase::Online);
            let mut in_sync = record.in_sync.clone();
            // A primary that does not know of a snapshot yet has not compared it; it says so anew when it does.
            let is_whole = group.snapshots.minted <= minted;
            let is_asked = record.primary == self.me && record.stamp.generation == generation && is_whole;
            if is_asked && is_online && group.replicas.contains(&node) && in_sync.insert(node) {
                let reason = format!("`{}` is up to date", self.name_of(node));
                self.set_group(now, id, record.stamp, record.primary, in_sync, reason);
            }
        }
    }

    /// W6: a primary whose own replica fell out serves from a peer's only for the sake of a guest that runs on its node. When
    /// none does (any more), a node that has the data takes over, and the replica here is brought up to date.
    fn hand_over_to_data(&mut self, now: Instant) {
        let mut changes = Vec::new();
        for (id, group) in &self.state.groups {
            let record = &group.record;
            let is_online =
                |node: &NodeId| self.state.nodes.get(node).is_some_and(|node| node.phase == NodePhase::Online);
            let is_used = self.state.vms.values().any(|vm| vm.group == *id && vm.phase.may_run());
            if record.primary == self.me
                && !record.in_sync.contains(&self.me)
                && !is_used
                && let Some(next) = record.in_sync.iter().copied().find(is_online)
            {
                changes.push((*id, record.stamp, next, record.in_sync.clone()));
            }
        }
        for (group, expect, next, in_sync) in changes {
            let reason = format!("`{}` has the data, `{}` has not", self.name_of(next), self.name_of(self.me));
            self.set_group(now, group, expect, next, in_sync, reason);
        }
    }

    /// Each level that this node's pool falls to becomes an event, once until it is well again.
    fn tell_of_pool(&mut self, now: Instant) {
        let Some(pool) = &self.groups.pool else { return };
        let level = pool.level();
        if level == PoolLevel::Good {
            self.groups.pool_told = None;
            return;
        }
        if self.groups.pool_told.as_ref().is_none_or(|(told, _)| level > *told) {
            self.groups.pool_told = Some((level, crate::headline::pool_text(&self.name_of(self.me), pool)));
        }
        let Some((level, text)) = self.groups.pool_told.clone() else { return };
        let subject = Subject::Node(self.me);
        // Proposals may be lost: it is told when the log has it.
        if !self.state.events.iter().any(|event| event.subject == subject && event.text == text) {
            self.propose(now, ("pool", self.me.0, level as u64), Change::Note { subject, text });
        }
    }

    /// A path that is refused, or that failed while another works, becomes an event, and so does that it works again.
    fn tell_of_paths(&mut self, now: Instant) {
        let mut news = Vec::new();
        for (peer, path) in self.groups.paths.iter().flat_map(|(peer, paths)| paths.iter().map(|path| (*peer, path))) {
            let (name, address, subject) = (self.name_of(peer), &path.address, Subject::Node(peer));
            let is_about = |event: &&Event| event.subject == subject && event.text.contains(address.as_str());
            let last = self.state.events.iter().rev().find(is_about).map(|event| event.text.as_str());
            let works = self.groups.paths[&peer].iter().any(|path| path.state == PathState::Up);
            // One of the two nodes tells what both see.
            let tells = self.me < peer;
            let text = match &path.state {
                PathState::Refused { reason } => {
                    format!("replication with `{name}` over {address} is refused: {reason}")
                }
                PathState::Silent | PathState::Down { .. } if works && tells => {
                    format!("the path over {address} to `{name}` has failed; replication goes on over another")
                }
                PathState::Up if tells && last.is_some() => format!("the path over {address} to `{name}` works again"),
                PathState::Silent | PathState::Down { .. } | PathState::Up => continue,
            };
            // Proposals may be lost: it is told when the log has it.
            if last != Some(&text) {
                news.push((peer, Change::Note { subject, text }));
            }
        }
        for (number, (peer, change)) in (0..).zip(news) {
            self.propose(now, ("path", peer.0, number), change);
        }
    }

    fn set_group(
        &mut self,
        now: Instant,
        group: GroupId,
        expect: Stamp,
        primary: NodeId,
        in_sync: BTreeSet<NodeId>,
        reason: String,
    ) {
        let change = Change::SetGroup { group, expect, primary, in_sync, reason };
        self.propose(now, ("group", group.0, expect.generation.0), change);
    }

    fn order_groups(&mut self) {
        let mut orders = Vec::new();
        // What was promised to a node that was switched off binds no longer; before the records that lean on it.
        for (id, node) in self.state.nodes.iter().filter(|(_, node)| node.phase == NodePhase::Fenced) {
            if *id != self.me
                && matches!(node.proof, Some(FenceProof::PowerOff { .. }))
                && self.groups.sent.fenced.insert((*id, self.state.authority.epoch))
            {
                orders.push(Order::Fenced { node: *id });
            }
        }
        for (id, group) in &self.state.groups {
            // A node that carries none any more is told so as long as its data plane has one.
            let concerns = group.replicas.contains(&self.me) || group.record.primary == self.me;
            if !concerns && !self.groups.reports.contains_key(id) {
                continue;
            }
            let Some(spec) = self.state.group_spec(*id) else {
                continue;
            };
            if self.groups.sent.groups.get(id) != Some(&spec) {
                self.groups.sent.groups.insert(*id, spec.clone());
                orders.push(Order::Group(spec));
            }
            let names = self.state.group_names(group);
            if self.groups.sent.names.get(id) != Some(&names) {
                self.groups.sent.names.insert(*id, names.clone());
                orders.push(Order::Names { group: *id, names });
            }
        }
        // Ids are never minted twice, so what the log does not know but must have minted is deleted. What it can not have
        // minted is none of ours to erase.
        let known = self.groups.reports.keys().chain(self.groups.sent.groups.keys()).chain(&self.groups.held);
        let gone: BTreeSet<GroupId> =
            known.copied().filter(|id| !self.state.groups.contains_key(id) && id.0 <= self.state.last_id).collect();
        for group in gone {
            self.groups.sent.groups.remove(&group);
            self.groups.sent.names.remove(&group);
            self.groups.reports.remove(&group);
            if self.groups.sent.forgotten.insert(group) {
                orders.push(Order::Forget { group });
            }
        }
        // The data plane forgets a key with its last group.
        let used: BTreeSet<KeyId> =
            self.groups.sent.groups.values().flat_map(|spec| spec.keys.values().copied()).collect();
        self.groups.sent.keys.retain(|key, _| used.contains(key));
        let keys = self.keys_to_open(&used);
        let names = self.exports();
        if self.groups.sent.exports.as_ref() != Some(&names) {
            self.groups.sent.exports = Some(names.clone());
            orders.push(Order::Exports { names });
        }
        for (group, loser) in std::mem::take(&mut self.groups.to_discard) {
            orders.push(Order::Discard { group, loser });
        }
        // First: who is served finds its key there.
        for sealed in keys {
            self.output(Output::OpenKey(sealed));
        }
        for order in orders {
            self.output(Output::Data(order));
        }
    }

    /// Names under which volumes with a replica here are offered: those of VMs and images always, the user's own by wish.
    /// A VM's disks are for the VM alone. Images are for all nodes, which fill disks from them, and no longer change.
    fn exports(&self) -> BTreeMap<String, Offer> {
        let mut names = BTreeMap::new();
        for (id, volume) in &self.state.volumes {
            let Some(group) = self.state.groups.get(&volume.group) else {
                continue;
            };
            let is_complete = |image| self.state.images.get(&image).is_some_and(|image| image.sha256.is_some());
            let (is_offered, is_public, is_read_only) = match group.owner {
                _ if volume.snapshot.is_some() => (volume.exported, true, true),
                Owner::Vm(_) => (true, volume.exported, false),
                Owner::Image(image) => (true, true, is_complete(image)),
                Owner::Volume(_) => (volume.exported, true, false),
            };
            if is_offered && (group.replicas.contains(&self.me) || group.record.primary == self.me) {
                names.insert(volume.name.clone(), Offer { volume: *id, is_public, is_read_only });
            }
        }
        names.extend(self.kept_offers());
        names
    }
}
