//! What this node sees and what is wrong, for people.

use crate::Alert;
use crate::authority::Stand;
use crate::core::Cluster;
use crate::entry::{Holder, NodePhase, Subject, VmPhase};
use crate::headline::Sight;
use crate::seam::Register;
use crate::state::Group;
use pollux_base::order::{PathReport, ReplicaState};
use pollux_base::pool::{PoolLevel, PoolReport};
use pollux_base::{GroupId, NodeId};
use std::collections::BTreeMap;

impl Cluster {
    /// What this node sees beside the log.
    pub fn sight(&self) -> Sight {
        Sight {
            log_works: self.may_act(),
            witness: self.witness.sight(),
            register_is_right: self.witness.known == Some(self.right_register()),
            peers_heard: self.peers.each.iter().map(|(node, peer)| (*node, peer.is_up)).collect(),
            guard: self.guard.is_some(),
            pools: self.pools(),
            paths: self.groups.paths.clone(),
            is_encrypted: self.groups.is_encrypted.unwrap_or(true),
            data_plane: self.groups.is_connected && self.groups.pool_failure.is_none(),
            isolated: self.why_not_acting(),
            isolated_fix: self.partner().and_then(|node| self.confirm_fix(node)),
        }
    }

    /// Pools, of this node and of those that are heard.
    pub fn pools(&self) -> BTreeMap<NodeId, PoolReport> {
        let own = self.groups.pool.clone().map(|pool| (self.me, pool));
        let others = self.peers.each.iter().filter_map(|(node, peer)| {
            let (_, hello) = peer.hello.as_ref()?;
            Some((*node, hello.pool.clone()?))
        });
        own.into_iter().chain(others).collect()
    }

    /// Connections between this node's data plane and that of a peer.
    pub fn paths(&self, peer: NodeId) -> &[PathReport] {
        self.groups.paths.get(&peer).map_or(&[], Vec::as_slice)
    }

    /// Whether replication is encrypted here; `None`: `blockd` has not said so yet.
    pub fn is_replication_encrypted(&self) -> Option<bool> {
        self.groups.is_encrypted
    }

    fn right_register(&self) -> Register {
        let authority = &self.state.authority;
        let alone = match authority.holder {
            Holder::Members => None,
            Holder::Alone { node } => Some(node),
        };
        Register { epoch: authority.epoch, alone }
    }

    /// The word for a node, as this node knows it.
    pub fn node_word(&self, node: NodeId) -> &'static str {
        if node == self.me {
            return match self.stand {
                Stand::Forming | Stand::Rejoining { .. } => "joining",
                Stand::Outdated { .. } if self.gave_up => "joining",
                Stand::Outdated { .. } => "isolated",
                _ if self.may_act() => "online",
                _ => "suspect",
            };
        }
        let asks = self.peers.each.get(&node).and_then(|peer| peer.hello.as_ref());
        let wants_to_join = asks.is_some_and(|(_, hello)| hello.wants_to_join);
        match self.state.nodes.get(&node).map(|node| node.phase) {
            Some(NodePhase::Online) if self.is_up(node) => "online",
            Some(NodePhase::Online) => "suspect",
            Some(NodePhase::Lost) => "fencing",
            Some(NodePhase::Fenced) if wants_to_join || self.log.learners.contains(&node) => "joining",
            Some(NodePhase::Fenced) => "down",
            None => "joining",
        }
    }

    /// Of a replica here that lost parts with a disk: who is waited for, and what a human can do.
    fn incomplete_text(&self, id: GroupId, group: &Group) -> Option<(String, Option<String>)> {
        self.groups.reports.get(&id).filter(|report| report.is_incomplete)?;
        let (own, others): (Vec<NodeId>, Vec<NodeId>) = group.record.in_sync.iter().partition(|node| **node == self.me);
        if own.is_empty() || others.is_empty() {
            return None;
        }
        let name = self.state.group_name(group);
        let is_lost = |node: &&NodeId| self.state.nodes.get(*node).is_some_and(|node| node.phase == NodePhase::Fenced);
        let lost: Vec<String> = others.iter().filter(is_lost).map(|node| self.name_of(*node)).collect();
        let lacks = format!("parts of `{name}` were lost with a disk here");
        if lost.is_empty() {
            return Some((format!("{lacks} and are being healed"), None));
        }
        let text = format!("{lacks}, and `{}`, which has them, is lost: it waits for it", lost.join("`, `"));
        let fix = format!("bring it back; or give up what was lost: pollux group promote {name}");
        Some((text, (lost.len() == others.len()).then_some(fix)))
    }

    /// What is wrong at present, each with the command that mends it where there is one.
    pub fn alerts(&self) -> Vec<Alert> {
        let mut alerts = Vec::new();
        let by = self.me;
        let mut alert = |subject: Subject, text: String, fix: Option<String>| {
            alerts.push(Alert { subject, by, text, fix });
        };
        if let Some(reason) = self.why_not_acting() {
            let fix = self.partner().and_then(|node| self.confirm_fix(node));
            alert(Subject::Cluster, reason, fix);
        }
        if let Some(Err((since, reason))) = self.witness.sight() {
            let since = crate::headline::since_text(since);
            alert(
                Subject::Cluster,
                format!("the witness is not reachable{since}: {reason}"),
                Some("pollux witness test".into()),
            );
        }
        if self.guard.is_none() {
            let fix = "systemctl restart pollux-guard".to_owned();
            alert(Subject::Node(by), "the guard does not run".into(), Some(fix));
        }
        if !self.groups.is_connected {
            alert(Subject::Node(by), "blockd does not run".into(), Some("systemctl restart blockd".into()));
        }
        for (node, pool) in self.pools().iter().filter(|(_, pool)| pool.level() > PoolLevel::Good) {
            let name = self.name_of(*node);
            let text = crate::headline::pool_text(&name, pool);
            alert(Subject::Node(*node), text, Some(format!("pollux pool show {name}")));
        }
        for (node, pool) in self.pools() {
            alerts.extend(crate::disks::disk_alerts(by, node, &self.name_of(node), &pool));
        }
        let mut alert = |subject: Subject, text: String, fix: Option<String>| {
            alerts.push(Alert { subject, by, text, fix });
        };
        for (peer, paths) in &self.groups.paths {
            let name = self.name_of(*peer);
            if let Some(text) = crate::headline::path_text(&name, paths) {
                alert(Subject::Node(*peer), text, Some(format!("pollux node show {name}")));
            }
        }
        // A pool that could not be opened says nothing else.
        if let Some(reason) = self.groups.pool_failure.as_ref().filter(|_| self.groups.pool.is_none()) {
            alert(Subject::Node(by), format!("the pool can not be used: {reason}"), None);
        }
        for (node, peer) in &self.peers.each {
            let name = self.name_of(*node);
            if peer.is_up && !peer.is_connected {
                let text = format!("noded of `{name}` is not reached, though the node lives");
                alert(Subject::Node(*node), text, Some(format!("on `{name}`: systemctl restart noded")));
            }
            if let Some(trouble) = self.fencing.trouble(*node) {
                alert(Subject::Node(*node), format!("`{name}` could not be switched off: {trouble}"), None);
            }
        }
        for report in self.group_reports() {
            let text = match &report.state {
                ReplicaState::Diverged { .. } => {
                    "the replica here holds writes that the others lack; a human must choose".into()
                }
                ReplicaState::Failed { reason } => format!("the replica here failed: {reason}"),
                _ => continue,
            };
            alert(Subject::Group(report.group), text, None);
        }
        for (id, group) in &self.state.groups {
            let lost = group.scrubs.last.as_ref().map_or(0, |last| last.report.lost_blocks);
            if lost > 0 {
                let text = format!("the last scrub found {lost} bad blocks without a good copy");
                alert(
                    Subject::Group(*id),
                    text,
                    Some("pollux event list tells which; restore them from a backup".into()),
                );
            }
            let is_lost =
                |node: &NodeId| self.state.nodes.get(node).is_some_and(|node| node.phase == NodePhase::Fenced);
            if let Some((text, fix)) = self.incomplete_text(*id, group) {
                alert(Subject::Group(*id), text, fix);
            }
            if group.record.in_sync.iter().all(is_lost) && self.promote_token(*id).is_some() {
                let name = self.state.group_name(group);
                let text = format!("every replica of `{name}` that is in sync is lost; the one here trails");
                alert(Subject::Group(*id), text, Some(format!("pollux group promote {name}")));
            }
        }
        for (id, vm) in &self.state.vms {
            let name = &vm.spec.name;
            if let Some(reason) = self.vm_blocked(*id).filter(|_| self.may_act()) {
                alert(Subject::Vm(*id), format!("VM `{name}` waits: {reason}"), Some(format!("pollux vm why {name}")));
            }
            if vm.phase == VmPhase::Failed {
                let fix = format!("pollux vm start {name}");
                alert(Subject::Vm(*id), format!("VM `{name}` was given up: {}", vm.reason), Some(fix));
            }
        }
        alerts
    }

    /// What a human may do when nobody else can decide.
    fn confirm_fix(&self, node: NodeId) -> Option<String> {
        let is_stuck = self.stand == Stand::Asking && (!self.setup.witness || self.witness.is_unreachable());
        let name = self.name_of(node);
        is_stuck.then(|| format!("make sure that `{name}` is off, then: pollux node confirm-down {name}"))
    }
}
