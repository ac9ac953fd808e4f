//! What was seen during a demo, and what follows from it. Pure: observers put sightings in, figures come out.
//!
//! All times are milliseconds since the start of the demo, on this machine's one clock.

use super::console::Said;
use pollux_api::{Group, GroupState, NodeState, Protection, Status, VmState};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// Everything seen so far.
#[derive(Debug, Default)]
pub struct Record {
    /// Runs of the guest's writer, in the order in which they began.
    pub runs: Vec<Run>,
    /// QEMU processes of the guest, in the order in which they were seen first.
    pub qemus: Vec<Qemu>,
    /// What each node's API showed, when it changed.
    pub views: Vec<(u64, String, View)>,
    /// Moments at which more than one QEMU ran the guest; must stay empty.
    pub overlaps: Vec<String>,
}

/// One run of the writer: from its `found` to the last thing it said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Run {
    pub node: String,
    pub found: u64,
    pub found_ms: u64,
    pub first_ack_ms: Option<u64>,
    pub last_ack: Option<u64>,
    pub damaged: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Qemu {
    pub node: String,
    pub pid: i32,
    pub started_ms: u64,
    /// It was gone at this moment.
    pub ended_ms: Option<u64>,
}

/// The part of a node's status that a demo is about.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    pub protection: Protection,
    pub headline: String,
    pub epoch: u64,
    pub alone: Option<String>,
    pub nodes: BTreeMap<String, NodeState>,
    pub vm: Option<(VmState, String, u64)>,
    pub groups: Vec<Group>,
}

impl View {
    pub fn of(status: &Status, vm: &str) -> View {
        View {
            protection: status.headline.protection,
            headline: status.headline.text.clone(),
            epoch: status.epoch,
            alone: status.alone.clone(),
            nodes: status.nodes.iter().map(|node| (node.name.clone(), node.state)).collect(),
            vm: status.vms.iter().find(|seen| seen.name == vm).map(|vm| (vm.state, vm.node.clone(), vm.incarnation)),
            groups: status.groups.clone(),
        }
    }
    pub fn group(&self, name: &str) -> Option<&Group> {
        self.groups.iter().find(|group| group.name == name)
    }
    /// Everything is as it should be: nothing is missing, nothing is behind, and a node may die.
    pub fn is_healthy(&self, nodes: usize) -> bool {
        self.protection == Protection::Protected
            && self.nodes.len() == nodes
            && self.nodes.values().all(|state| *state == NodeState::Online)
            && self.groups.iter().all(|group| group.state == GroupState::Healthy && group.in_sync.len() == nodes)
    }
    pub fn line(&self, vm: &str) -> String {
        let nodes: Vec<String> = self.nodes.iter().map(|(name, state)| format!("{name} {state}")).collect();
        let group = self.group(vm).map_or("no group".into(), |group| {
            format!(
                "group {} gen {} at {} in sync {}",
                group.state,
                group.generation,
                group.primary,
                group.in_sync.join("+")
            )
        });
        let vm =
            self.vm.as_ref().map_or("no vm".into(), |(state, node, run)| format!("vm {state} on {node} run {run}"));
        let alone = self.alone.as_ref().map_or(String::new(), |node| format!(" ({node} alone)"));
        format!("{}; epoch {}{alone}; {}; {group}; {vm}", self.protection, self.epoch, nodes.join(", "))
    }
}

/// Seconds of a takeover, from the accident.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Figures {
    /// The survivor knows that the other is gone.
    pub detected: Option<f64>,
    /// It has the grant to go on alone.
    pub granted: Option<f64>,
    /// Its replica accepts I/O.
    pub io_back: Option<f64>,
    /// The guest's QEMU runs there.
    pub restarted: Option<f64>,
    /// The guest has written durably again.
    pub guest_writing: Option<f64>,
}

impl Record {
    pub fn on_said(&mut self, at_ms: u64, node: &str, said: Said) {
        if let Said::Found(found) = said {
            self.runs.push(Run {
                node: node.into(),
                found,
                found_ms: at_ms,
                first_ack_ms: None,
                last_ack: None,
                damaged: None,
            });
            return;
        }
        let Some(run) = self.runs.iter_mut().rev().find(|run| run.node == node) else { return };
        match said {
            Said::Ack(number) => {
                run.first_ack_ms.get_or_insert(at_ms);
                run.last_ack = Some(run.last_ack.unwrap_or(0).max(number));
            }
            Said::Damaged(number) => run.damaged = Some(number),
            Said::Found(_) => {}
        }
    }

    /// The guest's QEMU processes that were there at one moment.
    pub fn on_qemus(&mut self, at_ms: u64, present: &BTreeSet<(String, i32)>) {
        for qemu in self.qemus.iter_mut().filter(|qemu| qemu.ended_ms.is_none()) {
            if !present.contains(&(qemu.node.clone(), qemu.pid)) {
                qemu.ended_ms = Some(at_ms);
            }
        }
        for (node, pid) in present {
            if !self.qemus.iter().any(|qemu| qemu.ended_ms.is_none() && qemu.node == *node && qemu.pid == *pid) {
                self.qemus.push(Qemu { node: node.clone(), pid: *pid, started_ms: at_ms, ended_ms: None });
            }
        }
        if present.len() > 1 {
            self.overlaps.push(format!("at {at_ms} ms: {present:?}"));
        }
    }

    pub fn on_view(&mut self, at_ms: u64, answered_by: &str, view: View) {
        let last = self.views.iter().rev().find(|(_, node, _)| node == answered_by);
        if last.is_none_or(|(_, _, last)| *last != view) {
            self.views.push((at_ms, answered_by.into(), view));
        }
    }

    /// The newest view of a node.
    pub fn view(&self, node: &str) -> Option<&View> {
        self.views.iter().rev().find(|(_, answered_by, _)| answered_by == node).map(|(_, _, view)| view)
    }

    /// The highest number that was acknowledged by any run.
    pub fn acknowledged(&self) -> u64 {
        self.runs.iter().filter_map(|run| run.last_ack).max().unwrap_or(0)
    }

    /// The first run of the writer on `node` that began after `since_ms`.
    pub fn run_since(&self, node: &str, since_ms: u64) -> Option<&Run> {
        self.runs.iter().find(|run| run.node == node && run.found_ms >= since_ms)
    }

    /// The first QEMU on `node` that was seen after `since_ms`.
    pub fn qemu_since(&self, node: &str, since_ms: u64) -> Option<&Qemu> {
        self.qemus.iter().find(|qemu| qemu.node == node && qemu.started_ms >= since_ms)
    }

    /// How the takeover by `survivor` went, after the accident to `lost` at `since_ms`.
    pub fn figures(&self, vm: &str, lost: &str, survivor: &str, since_ms: u64) -> Figures {
        let seen = |holds: &dyn Fn(&View) -> bool| {
            let mut views = self.views.iter().filter(|(at, node, _)| *at >= since_ms && node == survivor);
            views.find(|(_, _, view)| holds(view)).map(|(at, _, _)| *at)
        };
        let seconds = |at: Option<u64>| at.map(|at| at.saturating_sub(since_ms) as f64 / 1000.0);
        Figures {
            detected: seconds(seen(&|view| view.nodes.get(lost).is_some_and(|state| *state != NodeState::Online))),
            granted: seconds(seen(&|view| view.alone.as_deref() == Some(survivor))),
            io_back: seconds(seen(&|view| {
                view.group(vm).is_some_and(|group| {
                    group.primary == survivor
                        && matches!(group.state, GroupState::Healthy | GroupState::Degraded | GroupState::Resyncing)
                })
            })),
            restarted: seconds(seen(&|view| {
                view.vm.as_ref().is_some_and(|(state, node, _)| *state == VmState::Running && node == survivor)
            })),
            guest_writing: seconds(self.run_since(survivor, since_ms).and_then(|run| run.first_ack_ms)),
        }
    }

    /// The most bytes that a resync of this group to `node` was seen to send, if any was seen.
    pub fn resent_bytes(&self, group: &str, node: &str, since_ms: u64) -> Option<u64> {
        let views = self.views.iter().filter(|(at, _, _)| *at >= since_ms);
        let resyncs = views.filter_map(|(_, _, view)| view.group(group)?.resync.as_ref());
        resyncs.filter(|resync| resync.node == node).map(|resync| resync.sent_bytes).max()
    }

    /// The time line, for the JSON file.
    pub fn time_line(&self, vm: &str) -> Vec<(u64, String)> {
        let mut lines: Vec<(u64, String)> =
            self.views.iter().map(|(at, node, view)| (*at, format!("{node} shows: {}", view.line(vm)))).collect();
        for run in &self.runs {
            lines.push((run.found_ms, format!("guest on {}: found {}", run.node, run.found)));
            lines
                .extend(run.first_ack_ms.map(|at| (at, format!("guest on {}: first write after its start", run.node))));
        }
        for qemu in &self.qemus {
            lines.push((qemu.started_ms, format!("QEMU {} runs on {}", qemu.pid, qemu.node)));
            lines.extend(qemu.ended_ms.map(|at| (at, format!("QEMU {} on {} is gone", qemu.pid, qemu.node))));
        }
        lines.sort();
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qemus(list: &[(&str, i32)]) -> BTreeSet<(String, i32)> {
        list.iter().map(|(node, pid)| (node.to_string(), *pid)).collect()
    }

    fn view(alone: Option<&str>, peer: NodeState, vm: (VmState, &str, u64)) -> View {
        View {
            protection: Protection::Unprotected,
            headline: String::new(),
            epoch: 1,
            alone: alone.map(String::from),
            nodes: BTreeMap::from([("a".into(), peer), ("b".into(), NodeState::Online)]),
            vm: Some((vm.0, vm.1.into(), vm.2)),
            groups: Vec::new(),
        }
    }

    #[test]
    fn two_qemus_at_one_moment_are_caught_and_one_after_the_other_are_not() {
        let mut record = Record::default();
        record.on_qemus(0, &qemus(&[("a", 1)]));
        record.on_qemus(10, &qemus(&[]));
        record.on_qemus(20, &qemus(&[("b", 2)]));
        assert!(record.overlaps.is_empty());
        assert_eq!(record.qemus[0].ended_ms, Some(10));
        assert_eq!(record.qemu_since("b", 5).map(|qemu| qemu.started_ms), Some(20));
        record.on_qemus(30, &qemus(&[("a", 3), ("b", 2)]));
        assert_eq!(record.overlaps.len(), 1);
    }

    #[test]
    fn a_lost_write_shows_as_fewer_found_than_acknowledged() {
        let mut record = Record::default();
        for said in [Said::Found(0), Said::Ack(1), Said::Ack(2), Said::Ack(3)] {
            record.on_said(0, "a", said);
        }
        assert_eq!(record.acknowledged(), 3);
        record.on_said(100, "b", Said::Found(2));
        let run = record.run_since("b", 50).expect("a run");
        assert!(run.found < record.acknowledged());
        assert_eq!(record.acknowledged(), 3, "what another run finds changes nothing about what was acknowledged");
    }

    #[test]
    fn figures_count_only_what_the_survivor_showed_after_the_accident() {
        let mut record = Record::default();
        record.on_view(10, "b", view(None, NodeState::Joining, (VmState::Running, "a", 1)));
        record.on_view(20, "b", view(None, NodeState::Online, (VmState::Running, "a", 1)));
        record.on_view(1900, "a", view(Some("b"), NodeState::Down, (VmState::Running, "b", 2)));
        record.on_view(2000, "b", view(None, NodeState::Suspect, (VmState::Running, "a", 1)));
        record.on_view(2200, "b", view(Some("b"), NodeState::Fencing, (VmState::Recovering, "a", 1)));
        record.on_view(3000, "b", view(Some("b"), NodeState::Down, (VmState::Running, "b", 2)));
        record.on_said(5000, "b", Said::Found(9));
        record.on_said(5500, "b", Said::Ack(10));
        assert_eq!(
            record.figures("web1", "a", "b", 1000),
            Figures {
                detected: Some(1.0),
                granted: Some(1.2),
                io_back: None,
                restarted: Some(2.0),
                guest_writing: Some(4.5)
            }
        );
    }
}
