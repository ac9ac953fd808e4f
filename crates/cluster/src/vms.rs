//! The runs of VMs: who decides on a start, and what becomes of an end.
//!
//! One node decides for a VM at any time: a new run is proposed by the node where its disks are primary (it has the
//! disks, the memory and the lease that the run needs), a step of a run by the node on which it runs; when that node is lost,
//! by whoever goes on alone. So two proposers can not race for one VM, and if they did, the log's expectations let one win.
//!
//! A start is given to the shell only for a committed `Starting` of this node, once per incarnation, under the lease.

use crate::core::Cluster;
use crate::entry::{Change, NodePhase, VmPhase, Wanted};
use crate::seam::{Output, Refusal, VmCommand, VmEvent};
use crate::state::Vm;
use pollux_base::unit::bytes_text;
use pollux_base::{ImageId, Incarnation, Instant, NodeId, VmId, VolumeId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

/// A guest that was asked to shut down is ended after this long.
const SHUTDOWN_WAIT: Duration = Duration::from_secs(60);
/// The power button is pressed again this often: a guest that is booting does not hear the first one.
const SHUTDOWN_AGAIN: Duration = Duration::from_secs(5);
/// A command to end a QEMU is repeated until its end is seen.
const STOP_AGAIN: Duration = Duration::from_secs(2);
/// Runs that end unasked within `RESTART_WINDOW` before the VM is given up: a guest that cannot live must not keep a node busy.
const RESTARTS_MAX: usize = 5;
const RESTART_WINDOW: Duration = Duration::from_secs(600);
/// Pause before the first restart on the same node; doubled with each.
const RESTART_PAUSE: Duration = Duration::from_secs(1);
/// A failed copy of an image is begun anew after this long.
const FILL_AGAIN: Duration = Duration::from_secs(30);

#[derive(Default)]
pub(crate) struct Vms {
    /// The shell has said which QEMUs there are.
    is_found: bool,
    /// QEMUs of this node and how they ended.
    runs: BTreeMap<VmId, Run>,
    /// Runs of this node whose `Starting` was committed while this run of `noded` was awake: nobody started them before.
    new: BTreeMap<VmId, Incarnation>,
    /// Starts given to the shell.
    started: BTreeMap<VmId, Incarnation>,
    /// Ends that nobody asked for, on this node.
    crashes: BTreeMap<VmId, VecDeque<Instant>>,
    stopping: BTreeMap<VmId, (Incarnation, Instant)>,
    filling: BTreeSet<VmId>,
    filled: BTreeSet<VmId>,
    fill_trouble: BTreeMap<VmId, (Instant, String)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Run {
    incarnation: Incarnation,
    end: Option<End>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum End {
    ByGuest,
    Unasked(String),
}

impl Cluster {
    pub(crate) fn on_vm_event(&mut self, now: Instant, event: VmEvent) {
        match event {
            VmEvent::Found { running } => {
                self.vms.is_found = true;
                for (vm, incarnation) in running {
                    self.vms.runs.insert(vm, Run { incarnation, end: None });
                }
            }
            VmEvent::Running { vm, incarnation } => self.on_run(vm, Run { incarnation, end: None }),
            VmEvent::Ended { vm, incarnation, by_guest, detail } => {
                let end = if by_guest { End::ByGuest } else { End::Unasked(detail) };
                self.on_run(vm, Run { incarnation, end: Some(end) });
            }
            VmEvent::StartFailed { vm, incarnation, reason } => {
                self.on_run(
                    vm,
                    Run { incarnation, end: Some(End::Unasked(format!("it could not be started: {reason}"))) },
                );
            }
            VmEvent::Filled { vm, result } => {
                self.vms.filling.remove(&vm);
                match result {
                    Ok(()) => {
                        self.vms.fill_trouble.remove(&vm);
                        self.vms.filled.insert(vm);
                    }
                    Err(reason) => {
                        self.vms.fill_trouble.insert(vm, (now + FILL_AGAIN, reason));
                    }
                }
            }
        }
    }

    fn on_run(&mut self, vm: VmId, run: Run) {
        // Late news of an earlier run do not hide a later one.
        if self.vms.runs.get(&vm).is_none_or(|known| known.incarnation <= run.incarnation) {
            self.vms.runs.insert(vm, run);
        }
    }

    pub(crate) fn reconcile_vms(&mut self, now: Instant) {
        if !self.is_awake || !self.vms.is_found {
            return;
        }
        self.stop_strays(now);
        let vms: Vec<(VmId, Vm)> = self.state.vms.iter().map(|(id, vm)| (*id, vm.clone())).collect();
        for (id, vm) in &vms {
            if vm.node == self.me && vm.phase.may_run() {
                self.steer_run(now, *id, vm);
            } else if self.may_act() {
                self.decide_next_run(now, *id, vm);
            }
            if self.may_act() && !vm.filled {
                self.fill(now, *id, vm);
            }
        }
        let known = |vm: &VmId| self.state.vms.contains_key(vm);
        self.vms.new.retain(|vm, _| known(vm));
        self.vms.started.retain(|vm, _| known(vm));
        self.vms.crashes.retain(|vm, _| known(vm));
        self.vms.stopping.retain(|vm, _| known(vm));
        self.vms.fill_trouble.retain(|vm, _| known(vm));
        self.vms.filled.retain(|vm| known(vm));
        self.vms.runs.retain(|vm, run| run.end.is_none() || known(vm));
    }

    /// QEMUs that the log does not know of, or not any more (regression 72).
    fn stop_strays(&mut self, now: Instant) {
        let is_right = |vm: &VmId, run: &Run| {
            self.state.vms.get(vm).is_some_and(|found| {
                found.node == self.me && found.incarnation == run.incarnation && found.phase.may_run()
            })
        };
        let alive = self.vms.runs.iter().filter(|(_, run)| run.end.is_none());
        let strays: Vec<(VmId, Incarnation)> =
            alive.filter(|(vm, run)| !is_right(vm, run)).map(|(vm, run)| (*vm, run.incarnation)).collect();
        for (vm, incarnation) in strays {
            if self.is_due(now, ("stop stray", vm.0, incarnation.0), STOP_AGAIN) {
                self.output(Output::Vm(VmCommand::Stop { vm }));
            }
        }
    }

    /// A run of this node, in `Starting`, `Running` or `Stopping`.
    fn steer_run(&mut self, now: Instant, id: VmId, vm: &Vm) {
        let run = self.vms.runs.get(&id).filter(|run| run.incarnation == vm.incarnation).cloned();
        let was_started = self.vms.started.get(&id) == Some(&vm.incarnation);
        match (vm.phase, run) {
            (_, Some(Run { end: Some(end), .. })) => self.end_run(now, id, vm, end),
            (VmPhase::Starting, None) if was_started => {} // The shell will tell.
            (VmPhase::Starting, None) if vm.wanted != Wanted::Running => {
                self.propose_step(now, id, vm, VmPhase::Stopped, "not wanted any more before it began");
            }
            // It may have run and have gone with its node before anybody was told; an incarnation runs once.
            (VmPhase::Starting, None) if self.vms.new.get(&id) != Some(&vm.incarnation) => {
                let end = End::Unasked("noded was restarted before it was known to run".into());
                self.end_run(now, id, vm, end);
            }
            (VmPhase::Starting, None) => {
                if self.lease_held() && self.may_act() {
                    let volumes = vm.volumes.iter();
                    let name = |volume: &VolumeId| self.state.volumes.get(volume).map(|found| found.name.clone());
                    let volumes = volumes.filter_map(|volume| name(volume).map(|name| (*volume, name))).collect();
                    self.vms.started.insert(id, vm.incarnation);
                    let (incarnation, spec) = (vm.incarnation, vm.spec.clone());
                    self.output(Output::Vm(VmCommand::Start { vm: id, incarnation, spec, volumes }));
                }
            }
            (VmPhase::Starting, Some(_)) => self.propose_step(now, id, vm, VmPhase::Running, "its QEMU runs"),
            (VmPhase::Running, Some(_)) => {
                if vm.wanted != Wanted::Running {
                    self.propose_step(now, id, vm, VmPhase::Stopping, "the user wants it to stop");
                }
            }
            (VmPhase::Stopping, Some(_)) => self.shut_down(now, id, vm),
            // Not steps of a run: `stop_strays` ends what should not be there.
            (VmPhase::Stopped | VmPhase::Recovering | VmPhase::Failed, _) => {}
            (VmPhase::Running | VmPhase::Stopping, None) => {
                let end = End::Unasked("its QEMU is gone: node or noded was restarted".into());
                self.end_run(now, id, vm, end);
            }
        }
    }

    fn shut_down(&mut self, now: Instant, id: VmId, vm: &Vm) {
        let since = match self.vms.stopping.get(&id) {
            Some((incarnation, since)) if *incarnation == vm.incarnation => *since,
            _ => now,
        };
        self.vms.stopping.insert(id, (vm.incarnation, since));
        if vm.wanted == Wanted::Off || self.has_come(now, since + SHUTDOWN_WAIT) {
            if self.is_due(now, ("stop", id.0, vm.incarnation.0), STOP_AGAIN) {
                self.output(Output::Vm(VmCommand::Stop { vm: id }));
            }
        } else if self.is_due(now, ("shutdown", id.0, vm.incarnation.0), SHUTDOWN_AGAIN) {
            self.output(Output::Vm(VmCommand::Shutdown { vm: id }));
        }
    }

    fn end_run(&mut self, now: Instant, id: VmId, vm: &Vm, end: End) {
        if !self.may_act() {
            return;
        }
        match (vm.phase, end) {
            (VmPhase::Stopping, _) => self.propose_step(now, id, vm, VmPhase::Stopped, "as the user wanted"),
            (VmPhase::Starting, _) if vm.wanted != Wanted::Running => {
                self.propose_step(now, id, vm, VmPhase::Stopped, "as the user wanted");
            }
            (_, End::ByGuest) => self.propose_step(now, id, vm, VmPhase::Stopped, "its guest shut down"),
            (_, End::Unasked(detail)) => {
                let recent = self.vms.crashes.entry(id).or_default();
                recent.retain(|at| now.since(*at) < RESTART_WINDOW);
                if recent.len() >= RESTARTS_MAX {
                    let reason = format!(
                        "ended {} times within {} min; last: {detail}",
                        RESTARTS_MAX + 1,
                        RESTART_WINDOW.as_secs() / 60
                    );
                    self.propose_step(now, id, vm, VmPhase::Failed, &reason);
                } else {
                    self.propose_step(now, id, vm, VmPhase::Recovering, &detail);
                }
            }
        }
    }

    /// A VM that does not run here: perhaps its node is lost, perhaps it is to start.
    fn decide_next_run(&mut self, now: Instant, id: VmId, vm: &Vm) {
        let node_phase = self.state.nodes.get(&vm.node).map(|node| node.phase);
        if vm.phase.may_run() {
            if self.acts_alone() && node_phase != Some(NodePhase::Online) {
                let reason = format!("`{}` is lost", self.name_of(vm.node));
                self.propose_step(now, id, vm, VmPhase::Recovering, &reason);
            }
            return;
        }
        if !self.is_primary_here(vm) {
            return;
        }
        match (vm.phase, vm.wanted) {
            (VmPhase::Recovering, Wanted::Stopped | Wanted::Off) if node_phase != Some(NodePhase::Lost) => {
                self.propose_step(now, id, vm, VmPhase::Stopped, "not wanted any more");
            }
            (VmPhase::Stopped | VmPhase::Recovering, Wanted::Running) => {
                let not_before = self.restart_at(id, vm);
                let is_time = not_before.is_none_or(|at| self.has_come(now, at));
                // Else `hand_over_to_data` moves the disks first.
                let group = self.state.groups.get(&vm.group);
                let has_data = group.is_some_and(|group| group.record.in_sync.contains(&self.me));
                if is_time && has_data && self.start_obstacle(vm).is_none() && self.lease_held() {
                    self.start(now, id, vm);
                }
            }
            _ => {}
        }
    }

    fn start(&mut self, now: Instant, id: VmId, vm: &Vm) {
        let reason = match (vm.phase, self.state.nodes.get(&vm.node)) {
            (VmPhase::Recovering, Some(node)) if vm.node != self.me => match &node.proof {
                Some(proof) => format!("`{}` is proven unable to act: {}", node.spec.name, proof.text()),
                None => format!("restarts; its last run was on `{}`", node.spec.name),
            },
            (VmPhase::Recovering, _) => format!("restarts: {}", vm.reason),
            _ => "the user wants it running".to_owned(),
        };
        let change = Change::VmPhase {
            vm: id,
            expect: vm.incarnation,
            incarnation: vm.incarnation.next(),
            node: self.me,
            phase: VmPhase::Starting,
            reason,
        };
        self.propose(now, ("vm start", id.0, vm.incarnation.0), change);
    }

    /// After an end that nobody asked for on this node, a pause that doubles.
    fn restart_at(&self, id: VmId, vm: &Vm) -> Option<Instant> {
        if vm.phase != VmPhase::Recovering || vm.node != self.me {
            return None;
        }
        let crashes = self.vms.crashes.get(&id)?;
        let doublings = u32::try_from(crashes.len().saturating_sub(1)).unwrap_or(0).min(5);
        crashes.back().map(|last| *last + RESTART_PAUSE * 2u32.pow(doublings))
    }

    fn propose_step(&mut self, now: Instant, id: VmId, vm: &Vm, phase: VmPhase, reason: &str) {
        if !self.may_act() {
            return;
        }
        let change = Change::VmPhase {
            vm: id,
            expect: vm.incarnation,
            incarnation: vm.incarnation,
            node: vm.node,
            phase,
            reason: reason.to_owned(),
        };
        self.propose(now, (phase.name(), id.0, vm.incarnation.0), change);
    }

    /// A new run of this node is committed.
    pub(crate) fn note_new_run(&mut self, vm: VmId, incarnation: Incarnation) {
        self.vms.new.insert(vm, incarnation);
    }

    /// Counts an end that nobody asked for, once it is committed.
    pub(crate) fn note_crash(&mut self, now: Instant, vm: VmId) {
        let crashes = self.vms.crashes.entry(vm).or_default();
        crashes.push_back(now);
        while crashes.len() > RESTARTS_MAX + 1 {
            crashes.pop_front();
        }
    }

    fn is_primary_here(&self, vm: &Vm) -> bool {
        self.state.groups.get(&vm.group).is_some_and(|group| group.record.primary == self.me)
    }

    /// What keeps a VM that is wanted from starting, by the log alone.
    fn start_obstacle(&self, vm: &Vm) -> Option<String> {
        let group = self.state.groups.get(&vm.group)?;
        let target = group.record.primary;
        let name = |node: NodeId| self.state.node_name(node);
        if !vm.filled {
            return Some("its first disk is being filled from the image".into());
        }
        let Some(node) = self.state.nodes.get(&target) else {
            return Some(format!("its disks are on {target}, which is unknown"));
        };
        if node.phase != NodePhase::Online {
            return Some(format!("the only good copy of its disks is on `{}`, which is lost", node.spec.name));
        }
        let old = self.state.nodes.get(&vm.node).map(|node| node.phase);
        if vm.phase == VmPhase::Recovering && old == Some(NodePhase::Lost) {
            return Some(format!("waits for proof that `{}` can not act", name(vm.node)));
        }
        let (taken, has) = (self.state.memory_taken(target).0, node.spec.memory_bytes);
        if taken.saturating_add(vm.spec.memory.0) > has {
            let free = has.saturating_sub(taken);
            return Some(format!(
                "it needs {} of memory; `{}` has {} free of {}",
                bytes_text(vm.spec.memory.0),
                node.spec.name,
                bytes_text(free),
                bytes_text(has)
            ));
        }
        None
    }

    /// A start that can not be is refused at once, with the arithmetic.
    pub(crate) fn refuse_start(&self, change: &Change) -> Result<(), Refusal> {
        let Change::WantVm { vm, wanted: Wanted::Running } = change else {
            return Ok(());
        };
        let Some(found) = self.state.vms.get(vm).filter(|found| !found.phase.may_run()) else {
            return Ok(());
        };
        // What passes by itself is no reason to refuse.
        let passes = !found.filled || found.phase == VmPhase::Recovering;
        match self.start_obstacle(found).filter(|_| !passes) {
            Some(obstacle) => Err(Refusal::Conflict(format!("VM `{}` can not start: {obstacle}", found.spec.name))),
            None => Ok(()),
        }
    }

    /// Why a VM that is wanted does not run, if something holds it back.
    pub fn vm_blocked(&self, vm: VmId) -> Option<String> {
        let found = self.state.vms.get(&vm)?;
        if found.wanted != Wanted::Running || found.phase.may_run() || found.phase == VmPhase::Failed {
            return None;
        }
        if let Some((_, reason)) = self.vms.fill_trouble.get(&vm) {
            return Some(format!("its disk could not be filled: {reason}; tried again"));
        }
        self.start_obstacle(found).or_else(|| self.why_not_acting())
    }

    /// The node with the primary copies the image into the new disk.
    fn fill(&mut self, now: Instant, id: VmId, vm: &Vm) {
        if self.vms.filled.contains(&id) {
            self.propose(now, ("filled", id.0, 0), Change::VmFilled { vm: id });
            return;
        }
        if !self.is_primary_here(vm) || self.vms.filling.contains(&id) {
            return;
        }
        if let Some((again, _)) = self.vms.fill_trouble.get(&id) {
            let again = *again;
            if !self.has_come(now, again) {
                return;
            }
        }
        let Some((from, to)) = self.fill_ends(vm) else {
            return;
        };
        self.vms.filling.insert(id);
        self.output(Output::Fill { vm: id, from, to });
    }

    fn fill_ends(&self, vm: &Vm) -> Option<((ImageId, String), (VolumeId, String))> {
        let image = vm.spec.image?;
        let source = self.state.images.get(&image).and_then(|found| self.state.volumes.get(&found.volume))?;
        let first = *vm.volumes.first()?;
        let target = self.state.volumes.get(&first)?;
        Some(((image, source.name.clone()), (first, target.name.clone())))
    }
}
