//! Somebody who takes and deletes snapshots while things fail, and a look at what they hold.

use crate::history::Seen;
use crate::peek::Peek;
use crate::world::World;
use pollux_base::{GroupId, NodeId, SnapshotId, VolumeId};
use pollux_cluster::state::Owner;
use pollux_cluster::{Change, Input};
use std::collections::BTreeMap;
use std::time::Duration;

/// A group has so many at most.
const SNAPSHOTS_KEPT: usize = 3;

impl World {
    /// Now and then asks this node for a snapshot of a group, or to delete one.
    pub fn operate_snapshots(&mut self, id: NodeId) {
        if !self.settings.snapshots || self.quiet {
            return;
        }
        let Some(noded) = &self.nodes[&id].noded else { return };
        // Clones are for others to look at.
        let groups = noded.core.state().groups.iter().filter(|(_, group)| matches!(group.owner, Owner::Vm(_)));
        let groups: Vec<(GroupId, Vec<SnapshotId>)> =
            groups.map(|(id, group)| (*id, group.snapshots.each.keys().copied().collect())).collect();
        for (group, snapshots) in groups {
            if !self.luck.one_in(3) {
                continue;
            }
            if snapshots.len() < SNAPSHOTS_KEPT {
                self.ask_snapshot(id, group);
            } else {
                let snapshot = snapshots[self.luck.below(snapshots.len() as u64) as usize];
                self.look_at_snapshot(id, group, snapshot);
                self.ask(id, Change::DeleteSnapshot { snapshot });
            }
        }
    }

    pub fn ask_snapshot(&mut self, id: NodeId, group: GroupId) {
        let name = format!("s{}", self.number());
        self.see(Seen::SnapshotAsked { group, name: name.clone() });
        self.ask(id, Change::CreateSnapshot { group, name });
    }

    pub fn ask(&mut self, id: NodeId, change: Change) {
        let (request, unix_ms) = (self.number(), self.unix_ms(id));
        self.tell_core(id, Duration::ZERO, Input::Request { request, unix_ms, change: Box::new(change) });
    }

    /// Takes note of the snapshots that this node's state says are taken.
    pub fn look_for_taken(&mut self, id: NodeId) {
        let Some(noded) = &self.nodes[&id].noded else { return };
        let state = noded.core.state();
        let each =
            state.groups.iter().flat_map(|(group, found)| found.snapshots.each.iter().map(|each| (*group, each)));
        let taken = each.filter(|(_, (_, snapshot))| snapshot.taken.is_some());
        let new: Vec<(GroupId, SnapshotId, String)> = taken
            .filter(|(_, (id, _))| !self.taken.contains(*id))
            .filter_map(|(group, (id, _))| Some((group, *id, state.snapshots.get(id)?.name.clone())))
            .collect();
        let revisions = state.groups.iter().map(|(group, found)| (*group, found.snapshots.revision));
        for (group, revision) in revisions.collect::<Vec<_>>() {
            let newest = self.revisions.entry(group).or_default();
            *newest = revision.max(*newest);
        }
        for (group, snapshot, name) in new {
            self.taken.insert(snapshot);
            self.counts.snapshots += 1;
            self.see(Seen::SnapshotTaken { group, name });
        }
    }

    /// Shows what every replica in sync holds of this snapshot, which this node's state names.
    pub fn look_at_snapshot(&mut self, id: NodeId, group: GroupId, snapshot: SnapshotId) {
        let Some(noded) = self.nodes[&id].noded.as_ref().filter(|_| !self.rotted) else { return };
        let state = noded.core.state();
        let Some(found) = state.groups.get(&group).and_then(|found| found.snapshots.each.get(&snapshot)) else {
            return;
        };
        let Some(name) = state.snapshots.get(&snapshot).map(|found| found.name.clone()) else { return };
        if found.taken.is_none() {
            return;
        }
        let volumes = found.volumes.clone();
        // Somebody may have deleted it since; a log that is just being read does not say so yet.
        let revision = state.groups.get(&group).map(|group| group.snapshots.revision);
        if revision != self.revisions.get(&group).copied() {
            return;
        }
        let members: Vec<NodeId> =
            self.newest.get(&group).into_iter().flat_map(|record| record.in_sync.clone()).collect();
        for node in members {
            let mut peek = match Peek::open(&self.nodes[&node].disks, node) {
                Ok(peek) => peek,
                Err(text) => return self.trace.line(self.now, || format!("{node}: {text}")),
            };
            let mut values = BTreeMap::new();
            let mut is_there = true;
            for (volume, frozen) in &volumes {
                is_there &= peek.known(*volume);
                match peek.contents(*volume, frozen.of, self.cipher_of(frozen.of).as_deref(), false) {
                    Ok(blocks) => {
                        values.extend(blocks.into_iter().map(|(block, (value, _))| ((frozen.of, block), value)))
                    }
                    Err(text) => return self.trace.line(self.now, || format!("{node}: {text}")),
                }
            }
            let values = is_there.then_some(values);
            self.see(Seen::Snapshot { node, group, name: name.clone(), values });
        }
    }

    /// The same of all snapshots that there are.
    pub fn look_at_snapshots(&mut self) {
        let Some(id) = self.ids().into_iter().find(|id| self.nodes[id].noded.is_some()) else { return };
        let state = self.nodes[&id].noded.as_ref().map(|noded| noded.core.state());
        let groups = state.into_iter().flat_map(|state| &state.groups);
        let all: Vec<(GroupId, SnapshotId)> =
            groups.flat_map(|(group, found)| found.snapshots.each.keys().map(|id| (*group, *id))).collect();
        for (group, snapshot) in all {
            self.look_at_snapshot(id, group, snapshot);
        }
    }

    /// Of which volume this is a snapshot, if it is one.
    pub fn origin_of(&self, volume: VolumeId) -> VolumeId {
        let states = self.nodes.values().filter_map(|node| Some(node.noded.as_ref()?.core.state()));
        let mut groups = states.flat_map(|state| state.groups.values());
        let found = groups.find_map(|group| group.snapshots.volumes().find(|(frozen, _)| *frozen == volume));
        found.map_or(volume, |(_, frozen)| frozen.of)
    }
}
