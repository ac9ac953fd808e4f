//! Who carries a group, in which mode, and how that changes (`docs/design/0005-modes.md`): pure functions of the state.
//!
//! Every change is a record of the next generation, so that no two texts of one stamp differ. No change leaves a group
//! without an in-sync replica, and none but a human's promotion names one that was not in sync before.

use crate::entry::{Change, NodePhase};
use crate::seam::Refusal;
use crate::state::{Group, Move, Owner, State};
use pollux_base::record::{AtBound, LagBound, Mode};
use pollux_base::unit::bytes_text;
use pollux_base::{Generation, GroupId, GroupRecord, NodeId, Stamp};
use std::collections::BTreeSet;

/// Replicas of one group; while one is moved, one more. Each write costs every one of them.
pub const REPLICAS_MAX: usize = 3;
/// Bounds of a lag's bound: below, every hiccup is felt; above, a primary's memory and nobody's patience would do.
const LAG_BYTES: std::ops::RangeInclusive<u64> = (1 << 20)..=(4 << 30);
const LAG_MS: std::ops::RangeInclusive<u64> = 1_000..=3_600_000;

/// The word shown to people.
fn word(mode: Mode) -> &'static str {
    match mode {
        Mode::Sync => "sync",
        Mode::Memory => "memory",
        Mode::Async => "async",
    }
}

impl Group {
    pub fn mode(&self, node: NodeId) -> Mode {
        self.modes.get(&node).copied().unwrap_or_default()
    }

    fn set_mode(&mut self, node: NodeId, mode: Mode) {
        match mode {
            Mode::Sync => self.modes.remove(&node),
            mode => self.modes.insert(node, mode),
        };
    }

    /// The in-sync set without this node.
    fn in_sync_without(&self, nodes: &BTreeSet<NodeId>) -> BTreeSet<NodeId> {
        self.record.in_sync.difference(nodes).copied().collect()
    }
}

impl State {
    fn group(&self, group: GroupId) -> Result<&Group, Refusal> {
        self.groups.get(&group).ok_or_else(|| Refusal::NotFound(format!("no group {group}")))
    }

    /// The name of whatever the group belongs to.
    pub fn group_name(&self, group: &Group) -> String {
        match group.owner {
            Owner::Vm(id) => self.vms.get(&id).map_or_else(|| id.to_string(), |vm| vm.spec.name.clone()),
            Owner::Image(id) => self.images.get(&id).map_or_else(|| id.to_string(), |image| image.name.clone()),
            Owner::Volume(id) => self.volumes.get(&id).map_or_else(|| id.to_string(), |volume| volume.name.clone()),
        }
    }

    fn is_online(&self, node: NodeId) -> bool {
        self.nodes.get(&node).is_some_and(|node| node.phase == NodePhase::Online)
    }

    /// Nodes on which a new group is born: the one that was chosen and, in a larger cluster, the next that is online.
    pub(crate) fn birth_replicas(&self, node: NodeId) -> BTreeSet<NodeId> {
        if self.nodes.len() <= 2 {
            return self.nodes.keys().copied().collect();
        }
        let after = self.nodes.range(node..).chain(self.nodes.range(..node)).map(|(id, _)| *id);
        let second = after.filter(|id| *id != node && self.is_online(*id)).take(1);
        [node].into_iter().chain(second).collect()
    }

    /// Whether a guest that may use the group may run on the node.
    fn is_used_on(&self, group: GroupId, node: NodeId) -> bool {
        self.vms.values().any(|vm| vm.group == group && vm.node == node && vm.phase.may_run())
    }

    /// Commits the next record of the group. The present epoch may be newer than the one before.
    pub(crate) fn next_record(&mut self, group: GroupId, primary: NodeId, in_sync: BTreeSet<NodeId>) -> Generation {
        let epoch = self.authority.epoch;
        let found = self.groups.get_mut(&group).expect("looked up by the caller");
        let stamp = Stamp { epoch, generation: found.record.stamp.generation.next() };
        found.discards.retain(|node, _| !in_sync.contains(node));
        found.record = GroupRecord { stamp, primary, in_sync };
        found.lineage.push(stamp);
        stamp.generation
    }

    /// Takes the node's replica out: by a record without it, before its space is free.
    fn without_replica(&mut self, group: GroupId, node: NodeId) -> Result<Generation, Refusal> {
        let found = self.group(group)?;
        let in_sync = found.in_sync_without(&BTreeSet::from([node]));
        let next = in_sync.iter().copied().find(|other| self.is_online(*other)).or(in_sync.first().copied());
        let Some(next) = next else { return Err(last_copy(self, node)) };
        // A guest there goes on and is served through another replica (W6); the primary follows when it has ended.
        let stays = found.record.primary != node || self.is_used_on(group, node);
        let primary = if stays { found.record.primary } else { next };
        let found = self.groups.get_mut(&group).expect("looked up above");
        found.replicas.remove(&node);
        found.modes.remove(&node);
        found.discards.remove(&node);
        Ok(self.next_record(group, primary, in_sync))
    }

    /// A trailing replica would have to take each snapshot at its own place in the stream, which it can not.
    fn refuse_async_with_snapshots(&self, group: &Group, mode: Mode) -> Result<(), Refusal> {
        match group.snapshots.each.keys().next() {
            Some(snapshot) if mode == Mode::Async => {
                let name = self.snapshot_name(*snapshot);
                conflict(format!("a group with snapshots has no async replica; first: pollux snapshot delete {name}"))
            }
            _ => Ok(()),
        }
    }

    /// Why the state does not allow the change, if it is one of replicas.
    pub(crate) fn refuse_replicas(&self, change: &Change) -> Result<(), Refusal> {
        match change {
            Change::SetMode { group, nodes, mode } => {
                let found = self.group(*group)?;
                if let Some(stranger) = nodes.iter().find(|node| !found.replicas.contains(node)) {
                    return Err(no_replica(self, *group, *stranger));
                }
                if nodes.is_empty() {
                    return Err(Refusal::Invalid("a mode is set for at least one replica".into()));
                }
                if *mode == Mode::Async && nodes.contains(&found.record.primary) {
                    let name = self.node_name(found.record.primary);
                    return conflict(format!("`{name}` is the group's primary, which is never async"));
                }
                if *mode == Mode::Async && found.in_sync_without(nodes).is_empty() {
                    return Err(Refusal::Unsafe("no replica would be left in sync".into()));
                }
                self.refuse_async_with_snapshots(found, *mode)?;
                Ok(())
            }
            Change::SetLag { group, lag } => {
                self.group(*group)?;
                if !LAG_BYTES.contains(&lag.bytes.0) || !LAG_MS.contains(&lag.ms) {
                    let (least, most) = (bytes_text(*LAG_BYTES.start()), bytes_text(*LAG_BYTES.end()));
                    return Err(Refusal::Invalid(format!("a lag is bound to {least} to {most}, and to 1 s to 1 h")));
                }
                Ok(())
            }
            Change::AddReplica { group, node, mode } => {
                let found = self.group(*group)?;
                self.refuse_async_with_snapshots(found, *mode)?;
                self.refuse_target(*node)?;
                if found.replicas.contains(node) {
                    return conflict(format!("`{}` carries a replica already", self.node_name(*node)));
                }
                if found.replicas.len() >= REPLICAS_MAX {
                    return conflict(format!("a group has at most {REPLICAS_MAX} replicas"));
                }
                Ok(())
            }
            Change::RemoveReplica { group, node } => {
                let found = self.group(*group)?;
                if !found.replicas.contains(node) {
                    return Err(no_replica(self, *group, *node));
                }
                if found.moving.is_some_and(|moving| moving.from == *node || moving.to == *node) {
                    return conflict("this replica is being moved; first: pollux group move --cancel".into());
                }
                if found.in_sync_without(&BTreeSet::from([*node])).is_empty() {
                    return Err(last_copy(self, *node));
                }
                Ok(())
            }
            Change::MoveReplica { group, from, to } => {
                let found = self.group(*group)?;
                self.refuse_target(*to)?;
                if let Some(moving) = found.moving {
                    let (from, to) = (self.node_name(moving.from), self.node_name(moving.to));
                    return conflict(format!("a replica is being moved already, from `{from}` to `{to}`"));
                }
                if !found.replicas.contains(from) {
                    return Err(no_replica(self, *group, *from));
                }
                if found.replicas.contains(to) {
                    return conflict(format!("`{}` carries a replica already", self.node_name(*to)));
                }
                Ok(())
            }
            Change::CancelMove { group } => match self.group(*group)?.moving {
                Some(_) => Ok(()),
                None => conflict("no replica of it is being moved".into()),
            },
            Change::PromoteReplica { group, node, at, .. } => {
                let found = self.group(*group)?;
                // One that is in sync lost parts with a disk: its node has seen to that.
                let is_in_sync = found.record.in_sync.contains(node);
                if !found.replicas.contains(node) || (found.mode(*node) != Mode::Async && !is_in_sync) {
                    return conflict(format!("the replica on `{}` does not trail", self.node_name(*node)));
                }
                let acts =
                    |id: &NodeId| id != node && self.nodes.get(id).is_none_or(|known| known.phase != NodePhase::Fenced);
                if let Some(member) = found.record.in_sync.iter().chain([&found.record.primary]).find(|id| acts(id)) {
                    return Err(Refusal::Unsafe(format!(
                        "`{}` holds every acknowledged write and is not proven unable to act",
                        self.node_name(*member)
                    )));
                }
                // `at` is filled in by the node that holds the replica; before, it is the default.
                if at.epoch >= self.authority.epoch {
                    return conflict("this replica trails by a record of the present epoch".into());
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn refuse_target(&self, node: NodeId) -> Result<(), Refusal> {
        if !self.nodes.contains_key(&node) {
            return Err(Refusal::NotFound(format!("no node {node}")));
        }
        if !self.is_online(node) {
            return conflict(format!("node `{}` is not online", self.node_name(node)));
        }
        Ok(())
    }

    /// Makes a change of replicas that was not refused. What it did, for people.
    pub(crate) fn change_replicas(&mut self, change: &Change) -> Result<(GroupId, String), Refusal> {
        let (group, text) = match change {
            Change::SetMode { group, nodes, mode } => {
                let names: Vec<String> = nodes.iter().map(|node| format!("`{}`", self.node_name(*node))).collect();
                let found = self.groups.get_mut(group).ok_or_else(|| Refusal::NotFound(format!("no group {group}")))?;
                let in_sync = match mode {
                    Mode::Async => found.in_sync_without(nodes),
                    Mode::Sync | Mode::Memory => found.record.in_sync.clone(),
                };
                nodes.iter().for_each(|node| found.set_mode(*node, *mode));
                let primary = found.record.primary;
                let generation = self.next_record(*group, primary, in_sync);
                (*group, format!("{generation:?}: the replica on {} is {}", names.join(", "), word(*mode)))
            }
            Change::SetLag { group, lag } => {
                let found = self.groups.get_mut(group).ok_or_else(|| Refusal::NotFound(format!("no group {group}")))?;
                found.lag = *lag;
                let (primary, in_sync) = (found.record.primary, found.record.in_sync.clone());
                let generation = self.next_record(*group, primary, in_sync);
                (*group, format!("{generation:?}: {}", lag_text(*lag)))
            }
            Change::AddReplica { group, node, mode } => {
                let found = self.groups.get_mut(group).ok_or_else(|| Refusal::NotFound(format!("no group {group}")))?;
                found.replicas.insert(*node);
                found.set_mode(*node, *mode);
                let (primary, in_sync) = (found.record.primary, found.record.in_sync.clone());
                let generation = self.next_record(*group, primary, in_sync);
                (*group, format!("{generation:?}: `{}` gets a replica ({})", self.node_name(*node), word(*mode)))
            }
            Change::RemoveReplica { group, node } => {
                let generation = self.without_replica(*group, *node)?;
                (*group, format!("{generation:?}: the replica on `{}` is removed", self.node_name(*node)))
            }
            Change::MoveReplica { group, from, to } => {
                let found = self.groups.get_mut(group).ok_or_else(|| Refusal::NotFound(format!("no group {group}")))?;
                let mode = found.mode(*from);
                found.moving = Some(Move { from: *from, to: *to });
                found.replicas.insert(*to);
                found.set_mode(*to, mode);
                let (primary, in_sync) = (found.record.primary, found.record.in_sync.clone());
                let generation = self.next_record(*group, primary, in_sync);
                let (from, to) = (self.node_name(*from), self.node_name(*to));
                (*group, format!("{generation:?}: a replica moves from `{from}` to `{to}`"))
            }
            Change::CancelMove { group } => {
                let found = self.groups.get_mut(group).ok_or_else(|| Refusal::NotFound(format!("no group {group}")))?;
                found.moving = None;
                (*group, "the move of a replica was cancelled; what is there stays".into())
            }
            Change::FinishMove { group, expect } => {
                let found = self.group(*group)?;
                let Some(Move { from, to }) = found.moving else { return conflict("no replica is being moved".into()) };
                let is_there = match found.mode(to) {
                    Mode::Sync | Mode::Memory => found.record.in_sync.contains(&to),
                    Mode::Async => found.replicas.contains(&to),
                };
                if found.record.stamp != *expect || !is_there {
                    return conflict("the replica that is to stay is not ready by this record".into());
                }
                let generation = self.without_replica(*group, from)?;
                if let Some(found) = self.groups.get_mut(group) {
                    found.moving = None;
                }
                let (from, to) = (self.node_name(from), self.node_name(to));
                (*group, format!("{generation:?}: the replica has moved from `{from}` to `{to}`"))
            }
            Change::PromoteReplica { group, node, at, token } => {
                let found = self.groups.get_mut(group).ok_or_else(|| Refusal::NotFound(format!("no group {group}")))?;
                let which = match found.record.in_sync.contains(node) {
                    // What is not lost of it is what the others have.
                    true => "what is left of the replica",
                    false => {
                        // Whoever holds what is given up has diverged (W10).
                        found.lineage.cut_back_to_before(*at);
                        found.set_mode(*node, Mode::Sync);
                        "the trailing replica"
                    }
                };
                let generation = self.next_record(*group, *node, BTreeSet::from([*node]));
                let name = self.node_name(*node);
                (*group, format!("{generation:?}: a human made {which} on `{name}` the truth: `{token}`"))
            }
            _ => return conflict("no change of replicas".into()),
        };
        Ok((group, text))
    }
}

/// For people.
pub fn lag_text(lag: LagBound) -> String {
    let what = match lag.at_bound {
        AtBound::Slow => "then writers wait",
        AtBound::Drop => "then it is dropped and brought up to date later",
    };
    format!("a trailing replica may be behind by {} and {} s; {what}", bytes_text(lag.bytes.0), lag.ms / 1000)
}

fn conflict<T>(text: String) -> Result<T, Refusal> {
    Err(Refusal::Conflict(text))
}

fn no_replica(state: &State, group: GroupId, node: NodeId) -> Refusal {
    Refusal::NotFound(format!("group {group} has no replica on node `{}`", state.node_name(node)))
}

fn last_copy(state: &State, node: NodeId) -> Refusal {
    Refusal::Unsafe(format!("the only replica that holds every acknowledged write is on `{}`", state.node_name(node)))
}
