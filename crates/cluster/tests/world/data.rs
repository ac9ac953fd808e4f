//! Data planes as the control plane knows them: what they report, and when.

use super::{Input, World, ms, other};
use pollux_base::order::{GroupReport, ReplicaState};
use pollux_base::record::GroupSpec;
use pollux_base::{NodeId, Report};
use std::collections::{BTreeMap, BTreeSet};

impl World {
    /// What a data plane says of a group that it was told of.
    pub(super) fn report(&self, node: NodeId, spec: &GroupSpec) -> Report {
        Report::Group(Box::new(GroupReport {
            group: spec.group,
            stamp: Some(spec.record.stamp),
            state: if spec.record.primary == node { ReplicaState::Serving } else { ReplicaState::Secondary },
            is_unborn: self.births_hang,
            is_incomplete: self.incomplete.contains(&node),
            used_bytes: 0,
            healed_blocks: 0,
            resync: BTreeMap::new(),
            scrub: None,
            findings: Vec::new(),
            connected: BTreeSet::new(),
            lag: BTreeMap::new(),
            is_slowed: false,
        }))
    }

    /// The data plane of a primary: loses a dead peer, and finds a living one up to date after a second.
    pub(super) fn run_data_plane(&mut self, node: NodeId) {
        let now = self.now;
        let is_peer_there = !self.cut && self.servers[&other(node)].guard.is_some();
        let mut reports = vec![];
        for (group, spec) in &self.servers[&node].data {
            let is_in = spec.record.in_sync.contains(&other(node));
            let generation = spec.record.stamp.generation;
            if spec.record.primary != node || self.servers[&node].reported.contains(&(*group, generation)) {
                continue;
            }
            let peer = other(node);
            match (is_in, is_peer_there) {
                (true, false) => reports.push((
                    ms(900),
                    Report::ReplicaLost {
                        group: *group,
                        generation,
                        node: peer,
                        reason: "its connection is gone".into(),
                    },
                )),
                (false, true)
                    if self.servers[&peer].data.get(group).is_some_and(|other| other.record == spec.record) =>
                {
                    reports.push((
                        ms(1000),
                        Report::ReplicaCurrent { group: *group, generation, node: peer, minted: spec.snapshots.minted },
                    ));
                }
                _ => {}
            }
        }
        for (after, report) in reports {
            let (Report::ReplicaLost { group, generation, .. } | Report::ReplicaCurrent { group, generation, .. }) =
                &report
            else {
                continue;
            };
            let key = (*group, *generation);
            let server = self.server(node);
            server.reported.insert(key);
            server.inbox.push((now + after, Input::Data(Some(report))));
        }
    }
}
