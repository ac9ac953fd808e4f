//! The world: everything that exists, and what will happen to it next, in virtual time.
//!
//! One queue of events, one source of luck; the same seed gives the same world, step by step. The shells' work (what the
//! daemons do around the cores) is in `shell_guard`, `shell_blockd` and `shell_noded`: they carry values and decide nothing.

use crate::faults::Fault;
use crate::history::Seen;
use crate::invariant::{self, Invariant};
use crate::log::{LogNode, Message};
use crate::net::Net;
use crate::node::{Contacts, Input, Node, PROCESSES, Process};
use crate::outside::{PowerSwitch, Witness};
use crate::sabotage::Sabotage;
use crate::stream::Streams;
use crate::time::{Clock, Time};
use crate::trace::Trace;
use pollux_base::guard::{Heartbeat, Network};
use pollux_base::{
    ClusterId, DiskOpId, GroupId, GroupRecord, Incarnation, NodeId, RequestId, SnapshotId, Stamp, VmId, VolumeId,
};
use pollux_cluster::{Entry, EpochRecord, PeerHello, Register};
use pollux_replica::cipher::Cipher;
use pollux_store::faulty_disk::{FaultyDisk, Luck};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

pub const CLUSTER: ClusterId = ClusterId(0x5151);
/// Some sixty extents: enough for the volumes twice over.
pub const POOL_BYTES: u64 = 256 << 20;
/// Wall-clock time at the beginning.
const UNIX_MS: u64 = 1_790_000_000_000;

/// What is fixed about a world from its beginning.
#[derive(Clone, Debug)]
pub struct Settings {
    pub nodes: u64,
    pub witness: bool,
    pub switches: bool,
    /// Sizes of the disks of each VM, in bytes.
    pub vms: Vec<Vec<u64>>,
    /// Mean time between two requests of a guest.
    pub think: Duration,
    /// Somebody takes and deletes snapshots all the time.
    pub snapshots: bool,
    /// Somebody rolls back, lets disks grow and (with `clones`) clones, too.
    pub copies: bool,
    pub clones: bool,
    /// Disks join pools and leave them, and some pools begin with two.
    pub disks: bool,
    /// The first VM's disks are encrypted at rest.
    pub encrypted: bool,
    pub sabotage: Option<Sabotage>,
}

/// Why a run was ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub at: Time,
    /// Name of the invariant, or `liveness`, `panic`.
    pub rule: String,
    pub text: String,
}

pub enum Event {
    Input {
        node: NodeId,
        process: Process,
        life: u64,
        input: Input,
    },
    Timer {
        node: NodeId,
        process: Process,
        life: u64,
        at: Time,
    },
    Heartbeat {
        to: NodeId,
        network: Network,
        heartbeat: Heartbeat,
    },
    DiskDone {
        node: NodeId,
        life: u64,
        op: DiskOpId,
    },
    Stream {
        session: u64,
        to: NodeId,
    },
    /// Data planes that have no connection try to make one.
    Connect,
    Hello {
        to: NodeId,
        hello: PeerHello,
    },
    PeerGone {
        to: NodeId,
        peer: NodeId,
    },
    LogMessage {
        from: NodeId,
        to: NodeId,
        message: Message<Entry>,
    },
    WitnessAsked {
        node: NodeId,
        life: u64,
        ask: u64,
        expect: Register,
        set: Option<Register>,
    },
    Saved {
        node: NodeId,
        life: u64,
        record: EpochRecord,
    },
    Fence {
        by: NodeId,
        life: u64,
        node: NodeId,
    },
    /// The guard's signals reach its guests.
    Kill {
        node: NodeId,
    },
    Exec {
        node: NodeId,
        life: u64,
        run: crate::shell_noded::Exec,
    },
    ShutDown {
        node: NodeId,
        vm: VmId,
        incarnation: Incarnation,
    },
    Guest {
        node: NodeId,
        vm: VmId,
        incarnation: Incarnation,
    },
    Request {
        node: NodeId,
        attempt: RequestId,
    },
    Start {
        node: NodeId,
        process: Process,
    },
    Resume {
        node: NodeId,
        process: Process,
    },
    ResumeGuests {
        node: NodeId,
    },
    PowerOn {
        node: NodeId,
    },
    Fault(Fault),
    Operator,
}

pub struct World {
    pub now: Time,
    pub luck: Luck,
    queue: BTreeMap<(Time, u64), Event>,
    next_event: u64,
    next_number: u64,
    pub settings: Settings,
    pub nodes: BTreeMap<NodeId, Node>,
    pub net: Net,
    pub streams: Streams,
    pub witness: Witness,
    pub operator: crate::operator::Operator,
    pub copies: crate::copies::Copies,
    /// Every record that was ever committed, and the newest.
    pub records: BTreeMap<(GroupId, Stamp), GroupRecord>,
    pub newest: BTreeMap<GroupId, GroupRecord>,
    /// Snapshots that were seen to be taken.
    pub taken: BTreeSet<SnapshotId>,
    /// Of volumes that are encrypted.
    pub ciphers: BTreeMap<VolumeId, Arc<Cipher>>,
    /// The newest text that any log ever held of a group's snapshots.
    pub revisions: BTreeMap<GroupId, u64>,
    invariants: Vec<Box<dyn Invariant>>,
    pub failure: Option<Failure>,
    pub trace: Trace,
    pub steps: u64,
    /// Guests make no new requests.
    pub quiet: bool,
    /// Nothing goes wrong any more.
    pub healed: bool,
    /// Something was done to the disks that may leave a block without any good copy.
    pub rotted: bool,
    pub counts: Counts,
    /// Every run of a VM, in the order of their beginnings.
    pub runs: Vec<Run>,
}

/// One run of a VM.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    pub vm: VmId,
    pub incarnation: Incarnation,
    pub node: NodeId,
    pub began: Time,
    pub ended: Option<Time>,
}

/// How much happened; tells whether a batch of seeds tries what it should.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub writes_acked: u64,
    pub reads: u64,
    pub flushes: u64,
    pub records: u64,
    pub runs: u64,
    pub kills: u64,
    pub fences: u64,
    pub grants: u64,
    pub faults: u64,
    pub snapshots: u64,
    pub rollbacks: u64,
    pub clones: u64,
    /// Changes of disks that were asked for, and disks that pools went on without.
    pub disk_changes: u64,
    pub disks_lost: u64,
}

impl World {
    pub fn new(seed: u64, settings: Settings, trace: Trace) -> World {
        let mut luck = Luck::new(seed);
        let mut nodes = BTreeMap::new();
        for number in 1..=settings.nodes {
            let id = NodeId(number);
            let drift_ppm = Clock::drift(&mut luck);
            let mut seeds = vec![luck.draw()];
            if settings.disks && (seed / 3 + number).is_multiple_of(2) {
                seeds.push(luck.draw());
            }
            let mut disks = crate::disks::new_pool(id, &seeds);
            if settings.sabotage == Some(Sabotage::DiskLies) {
                disks.iter_mut().for_each(FaultyDisk::ignore_flushes);
            }
            let node = Node {
                id,
                on: false,
                off_until: Time(0),
                boot: 0,
                drift_ppm,
                clock: Clock::boot(Time(0), drift_ppm, &mut luck),
                wall_skew_ms: 0,
                disks,
                log: LogNode::new(id, luck.draw()),
                record: None,
                snapshot: None,
                disk_failed: false,
                left: None,
                guests: BTreeMap::new(),
                guard: None,
                blockd: None,
                noded: None,
                stopped: BTreeMap::new(),
                contacts: Contacts::default(),
                served: BTreeSet::new(),
                serving: BTreeMap::new(),
                answering: BTreeMap::new(),
                attempts: BTreeMap::new(),
                switch: settings.switches.then_some(PowerSwitch { delay: Duration::from_millis(400), reachable: true }),
            };
            nodes.insert(id, node);
        }
        let mut world = World {
            now: Time(0),
            luck,
            queue: BTreeMap::new(),
            next_event: 0,
            next_number: 1,
            operator: crate::operator::Operator::new(settings.vms.len()),
            copies: crate::copies::Copies::default(),
            settings,
            nodes,
            net: Net::new(),
            streams: Streams::default(),
            witness: Witness::new(),
            records: BTreeMap::new(),
            newest: BTreeMap::new(),
            taken: BTreeSet::new(),
            ciphers: BTreeMap::new(),
            revisions: BTreeMap::new(),
            invariants: invariant::all(),
            failure: None,
            trace,
            steps: 0,
            quiet: false,
            healed: false,
            rotted: false,
            counts: Counts::default(),
            runs: Vec::new(),
        };
        for node in world.ids() {
            world.at(Duration::ZERO, Event::PowerOn { node });
        }
        world.at(Duration::ZERO, Event::Connect);
        world.at(Duration::from_millis(500), Event::Operator);
        world
    }

    pub fn ids(&self) -> Vec<NodeId> {
        self.nodes.keys().copied().collect()
    }
    pub fn peers(&self, node: NodeId) -> Vec<NodeId> {
        self.nodes.keys().copied().filter(|other| *other != node).collect()
    }
    pub fn node(&mut self, id: NodeId) -> &mut Node {
        self.nodes.get_mut(&id).expect("events name nodes that exist")
    }
    pub fn unix_ms(&self, node: NodeId) -> u64 {
        UNIX_MS.saturating_add_signed(self.nodes[&node].wall_skew_ms) + self.now.0 / 1_000_000
    }
    /// A number that was never given before: for lives, sessions, requests, random numbers of runs.
    pub fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }
    /// Luck between two durations.
    pub fn between(&mut self, least: Duration, most: Duration) -> Duration {
        least + Duration::from_nanos(self.luck.below((most - least).as_nanos() as u64 + 1))
    }
    /// Has the event happen `after` this moment. Events of the same moment happen in the order in which they were made.
    pub fn at(&mut self, after: Duration, event: Event) {
        self.next_event += 1;
        self.queue.insert((self.now + after, self.next_event), event);
    }

    /// Lets the world go on until this moment, or until something is wrong.
    pub fn run_until(&mut self, end: Time) {
        while self.failure.is_none() {
            let Some(entry) = self.queue.first_entry() else { break };
            let (at, _) = *entry.key();
            if at > end {
                break;
            }
            let event = entry.remove();
            self.now = at;
            self.steps += 1;
            self.happen(event);
            if self.steps > STEPS_MAX {
                self.fail("liveness", "the world does not come to rest: something is busy for ever".into());
            }
        }
        self.now = self.now.max(end);
    }

    pub fn fail(&mut self, rule: &str, text: String) {
        let failure = Failure { at: self.now, rule: rule.into(), text };
        self.trace.line(self.now, || format!("!! {}: {}", failure.rule, failure.text));
        self.failure.get_or_insert(failure);
    }

    /// Writes the event down and shows it to every invariant.
    pub fn see(&mut self, seen: Seen) {
        let now = self.now;
        self.trace.line(now, || format!("   {seen:?}"));
        match &seen {
            Seen::WriteAcked { .. } => self.counts.writes_acked += 1,
            Seen::ReadAnswered { .. } => self.counts.reads += 1,
            Seen::FlushAcked { .. } => self.counts.flushes += 1,
            Seen::Record { .. } => self.counts.records += 1,
            Seen::RunStarted { vm, incarnation, node } => {
                self.counts.runs += 1;
                let run = Run { vm: *vm, incarnation: *incarnation, node: *node, began: now, ended: None };
                self.runs.push(run);
            }
            Seen::RunEnded { vm, incarnation, .. } => {
                let run = self.runs.iter_mut().find(|run| run.vm == *vm && run.incarnation == *incarnation);
                run.expect("a run that ends has begun").ended = Some(now);
            }
            _ => {}
        }
        let wrong = self
            .invariants
            .iter_mut()
            .find_map(|invariant| invariant.see(now, &seen).err().map(|text| (invariant.name(), text)));
        if let Some((rule, text)) = wrong {
            self.fail(rule, text);
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Input { node, process, life, input } => self.give(node, process, life, input),
            Event::Timer { node, process, life, at } => self.on_timer(node, process, life, at),
            Event::Heartbeat { to, network, heartbeat } => self.on_heartbeat(to, network, heartbeat),
            Event::DiskDone { node, life, op } => self.on_disk_done(node, life, op),
            Event::Stream { session, to } => self.on_stream(session, to),
            Event::Connect => self.connect(),
            Event::Hello { to, hello } => self.on_hello(to, hello),
            Event::PeerGone { to, peer } => self.on_peer_gone(to, peer),
            Event::LogMessage { from, to, message } => {
                if let Some(life) = self.nodes[&to].life(Process::Noded) {
                    self.give(to, Process::Noded, life, Input::Log(from, message));
                }
            }
            Event::WitnessAsked { node, life, ask, expect, set } => self.on_witness_asked(node, life, ask, expect, set),
            Event::Saved { node, life, record } => self.on_saved(node, life, record),
            Event::Fence { by, life, node } => self.on_fence(by, life, node),
            Event::Kill { node } => self.kill_guests(node, "the guard's lease is over"),
            Event::Exec { node, life, run } => self.on_exec(node, life, run),
            Event::ShutDown { node, vm, incarnation } => {
                if self.nodes[&node].guests.get(&vm).is_some_and(|guest| guest.incarnation == incarnation) {
                    self.end_guest(node, vm, true, "shut down");
                }
            }
            Event::Guest { node, vm, incarnation } => self.on_guest(node, vm, incarnation),
            Event::Request { node, attempt } => self.on_request(node, attempt),
            Event::Start { node, process } => self.start(node, process),
            Event::Resume { node, process } => self.resume(node, process),
            Event::ResumeGuests { node } => self.stop_guests(node, false),
            Event::PowerOn { node } => self.power_on(node),
            Event::Fault(fault) => self.on_fault(fault),
            Event::Operator => self.on_operator(),
        }
    }

    /// Hands an input to the process, or lets it wait while the process is stopped. Lost if that run is over.
    pub fn give(&mut self, node: NodeId, process: Process, life: u64, input: Input) {
        let found = self.node(node);
        if found.life(process) != Some(life) {
            return;
        }
        if let Some(waiting) = found.stopped.get_mut(&process) {
            waiting.push(input);
            return;
        }
        match process {
            Process::Guard => self.step_guard(node, input),
            Process::Blockd => self.step_blockd(node, input),
            Process::Noded => self.step_noded(node, input),
        }
    }

    /// Sets the process's timer, unless an earlier one is set. Timers fire a little late, as they do.
    pub fn set_timer(&mut self, node: NodeId, process: Process, at: Time) {
        let slack = Duration::from_nanos(1_000 + self.luck.below(150_000));
        let now = self.now;
        let found = self.node(node);
        let (life, wake_at) = match process {
            Process::Guard => found.guard.as_mut().map(|running| (running.life, &mut running.wake_at)),
            Process::Blockd => found.blockd.as_mut().map(|running| (running.life, &mut running.wake_at)),
            Process::Noded => found.noded.as_mut().map(|running| (running.life, &mut running.wake_at)),
        }
        .expect("only a process that runs sets a timer");
        let at = at.max(now) + slack;
        if wake_at.is_none_or(|set| set <= now || at < set) {
            *wake_at = Some(at);
            self.at(at.since(now), Event::Timer { node, process, life, at });
        }
    }

    fn on_timer(&mut self, node: NodeId, process: Process, life: u64, at: Time) {
        let found = self.node(node);
        if found.life(process) != Some(life) {
            return;
        }
        let wake_at = match process {
            Process::Guard => found.guard.as_mut().map(|running| &mut running.wake_at),
            Process::Blockd => found.blockd.as_mut().map(|running| &mut running.wake_at),
            Process::Noded => found.noded.as_mut().map(|running| &mut running.wake_at),
        };
        // A timer that was set anew since is not this one.
        if let Some(wake_at) = wake_at.filter(|wake_at| **wake_at == Some(at)) {
            *wake_at = None;
            self.give(node, process, life, Input::Timer);
        }
    }

    fn power_on(&mut self, id: NodeId) {
        let drift_ppm = self.nodes[&id].drift_ppm;
        let clock = Clock::boot(self.now, drift_ppm, &mut self.luck);
        let (now, boot) = (self.now, u128::from(self.number()));
        let node = self.node(id);
        if node.on || now < node.off_until {
            return;
        }
        node.on = true;
        node.boot = boot;
        node.clock = clock;
        self.trace.line(self.now, || format!("{id} is switched on"));
        for process in PROCESSES {
            let after = self.between(Duration::from_millis(200), Duration::from_millis(2000));
            self.at(after, Event::Start { node: id, process });
        }
    }

    /// Everything on the node ends at once, and its disk loses what was not flushed.
    pub fn power_cut(&mut self, id: NodeId) {
        if !self.nodes[&id].on {
            return;
        }
        self.trace.line(self.now, || format!("{id} loses power"));
        let vms: Vec<VmId> = self.nodes[&id].guests.keys().copied().collect();
        for vm in vms {
            self.end_guest(id, vm, false, "power cut");
        }
        self.blockd_gone(id);
        self.streams.power_cut(id);
        let seed = self.luck.draw();
        let node = self.node(id);
        node.on = false;
        node.guard = None;
        node.blockd = None;
        node.noded = None;
        node.stopped.clear();
        node.contacts = Contacts::default();
        node.left = None;
        (0..).zip(&mut node.disks).for_each(|(number, disk)| disk.power_cut(seed ^ number));
        self.see(Seen::PowerCut { node: id });
    }

    /// The supervisor (re)starts a process.
    fn start(&mut self, id: NodeId, process: Process) {
        let node = &self.nodes[&id];
        if !node.on || node.life(process).is_some() {
            return;
        }
        self.trace.line(self.now, || format!("{id} {process:?} starts"));
        match process {
            Process::Guard => self.start_guard(id),
            Process::Blockd => self.start_blockd(id),
            Process::Noded => self.start_noded(id),
        }
    }

    /// The process dies; the supervisor starts it again after a while.
    pub fn kill(&mut self, id: NodeId, process: Process, restart_after: Duration) {
        if self.nodes[&id].life(process).is_none() {
            return;
        }
        self.trace.line(self.now, || format!("{id} {process:?} is killed"));
        self.node(id).stopped.remove(&process);
        match process {
            Process::Guard => {
                self.node(id).guard = None;
                self.guard_gone(id);
            }
            Process::Blockd => {
                self.blockd_gone(id);
                self.close_streams(id);
                let seed = self.luck.draw();
                let node = self.node(id);
                (0..).zip(&mut node.disks).for_each(|(number, disk)| disk.kill(seed ^ number));
                node.blockd = None;
            }
            Process::Noded => self.noded_gone(id),
        }
        self.at(restart_after, Event::Start { node: id, process });
    }

    /// The process stands still (SIGSTOP) until it is resumed.
    pub fn stop(&mut self, id: NodeId, process: Process) {
        if !self.nodes[&id].is_active(process) {
            return;
        }
        self.trace.line(self.now, || format!("{id} {process:?} is stopped"));
        self.node(id).stopped.insert(process, Vec::new());
        if process == Process::Blockd {
            self.see(Seen::Stopped { node: id, stopped: true });
        }
    }

    pub fn resume(&mut self, id: NodeId, process: Process) {
        let Some(mut waiting) = self.node(id).stopped.remove(&process) else { return };
        self.trace.line(self.now, || format!("{id} {process:?} goes on"));
        if process == Process::Blockd {
            self.see(Seen::Stopped { node: id, stopped: false });
        }
        let Some(life) = self.nodes[&id].life(process) else { return };
        // Its timer is long due; it may look at it first or last.
        let at = if self.luck.one_in(2) { 0 } else { waiting.len() };
        waiting.insert(at, Input::Timer);
        if process == Process::Noded {
            crate::shell_noded::keep_newest_view(&mut waiting);
        }
        for input in waiting {
            self.give(id, process, life, input);
        }
    }

    /// Takes note of the authority records that this node's state holds.
    pub fn look_at_records(&mut self, id: NodeId) {
        let Some(noded) = &self.nodes[&id].noded else { return };
        let groups = noded.core.state().groups.iter();
        let records: Vec<_> = groups
            .map(|(group, found)| (*group, found.record.clone(), found.volumes.keys().copied().collect::<Vec<_>>()))
            .collect();
        for (group, record, volumes) in records {
            match self.records.get(&(group, record.stamp)) {
                Some(known) if *known == record => continue,
                Some(known) => {
                    let text = format!("{group} has two records of one stamp: {known:?} and {record:?}");
                    self.fail("one_writer_per_generation", text);
                }
                None => {}
            }
            self.records.insert((group, record.stamp), record.clone());
            if self.newest.get(&group).is_none_or(|newest| newest.stamp < record.stamp) {
                self.newest.insert(group, record.clone());
                self.spare_last_disks(&record.in_sync);
            }
            self.see(Seen::Record { group, volumes, record });
        }
    }

    /// Who holds what is acknowledged now under this stamp: those that its record names, unless they were dropped since.
    pub fn holders(&self, group: GroupId, stamp: Stamp) -> BTreeSet<NodeId> {
        let named = self.records.get(&(group, stamp)).map(|record| record.in_sync.clone()).unwrap_or_default();
        let newest = self.newest.get(&group).map(|record| record.in_sync.clone()).unwrap_or_default();
        let both: BTreeSet<NodeId> = named.intersection(&newest).copied().collect();
        if both.is_empty() { named } else { both }
    }
}

/// A seed takes some hundred thousand steps; one that takes so many is going round in circles.
const STEPS_MAX: u64 = 20_000_000;
