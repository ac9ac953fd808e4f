//! Two nodes in virtual time: the real cluster cores and the real guards, and models of all they lean on (the log, the
//! witness, power switches, QEMUs, data planes), each with the same promises and the same ways to fail.
//!
//! After every step: no VM runs twice, and no log goes on after another was forced out of it.

#![allow(dead_code)]

mod data;
mod log;
mod words;

use log::Log;
use pollux_base::config::PowerConfig;
use pollux_base::guard::{Heartbeat, Network};
use pollux_base::record::GroupSpec;
use pollux_base::{Epoch, Generation, GroupId, Incarnation, Instant, KeyId, NodeId, Order, SealedKey, Secret, VmId};
use pollux_cluster::entry::{Change, NodeSpec};
use pollux_cluster::{
    Answer, Cluster, EpochRecord, Input, Output, Refusal, Register, Setup, State, VmCommand, VmEvent, WitnessAnswer,
};
use pollux_guard::{Guard, Input as GuardInput, Output as GuardOutput, Setup as GuardSetup};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use words::weighty;

pub const A: NodeId = NodeId(1);
pub const B: NodeId = NodeId(2);
pub const GIB: u64 = 1 << 30;
const STEP: Duration = Duration::from_millis(5);
const NETWORKS: [Network; 2] = [Network(0), Network(1)];
/// 2026-11-22 14:00:00 UTC.
const UNIX_MS: u64 = 1_795_356_000_000;

pub fn other(node: NodeId) -> NodeId {
    if node == A { B } else { A }
}

pub fn name(node: NodeId) -> &'static str {
    if node == A { "a" } else { "b" }
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// One server.
pub struct Server {
    pub noded: Option<Cluster>,
    guard: Option<Guard>,
    runs: BTreeMap<VmId, Incarnation>,
    // What survives.
    pub record: Option<EpochRecord>,
    log: Option<usize>,
    /// Entries of the log that this node has.
    has: usize,
    emptied_for: Epoch,
    // What noded was told.
    given: usize,
    told: Option<(Option<NodeId>, Vec<NodeId>, Vec<NodeId>)>,
    hello_at: Instant,
    inbox: Vec<(Instant, Input)>,
    data: BTreeMap<GroupId, GroupSpec>,
    reported: BTreeSet<(GroupId, Generation)>,
    exports: Vec<String>,
    /// Nodes whose promises its data plane was told to forget.
    pub fenced: Vec<NodeId>,
    boots: u64,
    pub memory: u64,
    pub has_power_switch: bool,
    /// Name of the master key that it has.
    pub master: Option<KeyId>,
    /// And of the one beside it.
    pub master_successor: Option<KeyId>,
    pub power_switch_fails: bool,
}

impl Server {
    fn has_master(&self, master: KeyId) -> bool {
        [self.master, self.master_successor].contains(&Some(master))
    }
}

pub struct World {
    pub now: Instant,
    start: Instant,
    pub servers: BTreeMap<NodeId, Server>,
    logs: Vec<Log>,
    pub register: Register,
    pub with_witness: bool,
    pub witness_cut: BTreeSet<NodeId>,
    /// The networks between the nodes are cut.
    pub cut: bool,
    /// Only the connection between the nodeds is cut.
    pub control_cut: bool,
    packets: Vec<(Instant, NodeId, Network, Heartbeat)>,
    /// VM ends that come later: shutdowns.
    ends: Vec<(Instant, NodeId, VmId, Incarnation)>,
    power_cuts: Vec<(Instant, NodeId, NodeId)>,
    pub answers: BTreeMap<u64, Result<Answer, Refusal>>,
    next_request: u64,
    pub trace: Vec<String>,
    pub starts: Vec<(Duration, NodeId, Incarnation)>,
    /// Crash this node when it has put out that many more outputs of weight.
    pub crash_after: Option<(NodeId, u32)>,
    pub crashed_at: Option<String>,
    /// Guests do not hear their power button.
    pub guests_are_deaf: bool,
    pub fills_take: Duration,
    /// What the witness says is on its way and does not arrive.
    pub hold_witness_answers: bool,
    /// New groups are not confirmed by all their replicas.
    pub births_hang: bool,
    /// Nodes that lost a part of their replicas with a disk.
    pub incomplete: BTreeSet<NodeId>,
    /// Orders given to data planes.
    pub orders: Vec<(NodeId, Order)>,
    /// So much later than at first the wall clocks go, compared with the others.
    wall_ahead: Duration,
}

impl World {
    pub fn new(with_witness: bool, with_power: bool) -> World {
        let start = Instant(1_000_000_000_000);
        let server = || Server {
            noded: None,
            guard: None,
            runs: BTreeMap::new(),
            record: None,
            log: None,
            has: 0,
            emptied_for: Epoch(0),
            given: 0,
            told: None,
            hello_at: start,
            inbox: vec![],
            data: BTreeMap::new(),
            reported: BTreeSet::new(),
            exports: vec![],
            fenced: vec![],
            boots: 0,
            memory: 8 * GIB,
            has_power_switch: with_power,
            master: Some(KeyId(1)),
            master_successor: None,
            power_switch_fails: false,
        };
        World {
            now: start,
            start,
            servers: [(A, server()), (B, server())].into(),
            logs: vec![],
            register: Register { epoch: Epoch(0), alone: None },
            with_witness,
            witness_cut: BTreeSet::new(),
            cut: false,
            control_cut: false,
            packets: vec![],
            ends: vec![],
            power_cuts: vec![],
            answers: BTreeMap::new(),
            next_request: 0,
            trace: vec![],
            starts: vec![],
            crash_after: None,
            crashed_at: None,
            guests_are_deaf: false,
            fills_take: ms(500),
            hold_witness_answers: false,
            births_hang: false,
            incomplete: BTreeSet::new(),
            orders: Vec::new(),
            wall_ahead: Duration::ZERO,
        }
    }

    /// Both nodes are up and one cluster; nothing is in the trace.
    pub fn formed(with_witness: bool, with_power: bool) -> World {
        let mut world = World::new(with_witness, with_power);
        world.boot(A);
        world.boot(B);
        world.run_until("formed", |world| world.is_settled());
        world.run(ms(2000));
        world.forget();
        world
    }

    /// The same with VM `web1` (1 GiB) running on `node`.
    pub fn with_vm(with_witness: bool, with_power: bool, node: NodeId) -> World {
        let mut world = World::formed(with_witness, with_power);
        world.create_vm("web1", GIB, node);
        world.start_vm("web1");
        world.run_until("web1 runs", |world| world.runs_on("web1") == Some(node));
        world.run(ms(1000));
        world.forget();
        world
    }

    pub fn forget(&mut self) {
        self.trace.clear();
        self.starts.clear();
        self.start = self.now;
    }

    fn setup(&self, node: NodeId) -> Setup {
        let spec = |node: NodeId| NodeSpec {
            name: name(node).into(),
            api: vec![],
            replication: vec![format!("10.0.0.{}:7000", node.0)],
            nbd: None,
            power: self.servers[&node].has_power_switch.then(|| PowerConfig {
                url: "http://power".into(),
                system: "1".into(),
                uuid: format!("uuid-{}", name(node)),
            }),
            memory_bytes: self.servers[&node].memory,
        };
        let server = &self.servers[&node];
        Setup {
            node,
            name: "lab".into(),
            nodes: [(A, spec(A)), (B, spec(B))].into(),
            witness: self.with_witness,
            record: server.record.clone(),
            master: server.master,
            master_successor: server.master_successor,
            run: node.0 * 1000 + server.boots,
            unix_ms: self.unix_ms(),
        }
    }

    fn unix_ms(&self) -> u64 {
        let since = self.now.since(self.start) + self.wall_ahead;
        UNIX_MS + u64::try_from(since.as_millis()).expect("a short test")
    }

    fn server(&mut self, node: NodeId) -> &mut Server {
        self.servers.get_mut(&node).expect("a node of the pair")
    }

    pub fn server_mut(&mut self, node: NodeId) -> &mut Server {
        self.server(node)
    }

    pub fn has_noded(&self, node: NodeId) -> bool {
        self.servers[&node].noded.is_some()
    }

    /// Settled, but for VMs that died so often that they were given up.
    pub fn is_settled_or_given_up(&self) -> bool {
        let has_failed = |node: NodeId| {
            let core = self.servers[&node].noded.as_ref();
            core.is_some_and(|core| {
                core.state().vms.values().any(|vm| vm.phase == pollux_cluster::entry::VmPhase::Failed)
            })
        };
        self.is_settled() || (has_failed(A) && has_failed(B))
    }

    pub fn is_powered(&self, node: NodeId) -> bool {
        self.servers[&node].guard.is_some()
    }

    pub fn state(&self, node: NodeId) -> &State {
        self.servers[&node].noded.as_ref().expect("noded runs").state()
    }

    pub fn core(&self, node: NodeId) -> &Cluster {
        self.servers[&node].noded.as_ref().expect("noded runs")
    }

    /// Power on: guard, noded, blockd.
    pub fn boot(&mut self, node: NodeId) {
        assert!(self.servers[&node].guard.is_none(), "{} runs", name(node));
        let now = self.now;
        let server = self.server(node);
        server.boots += 1;
        let peers = [(other(node), NETWORKS.to_vec())].into();
        let boot = node.0 * 100 + server.boots;
        server.guard = Some(Guard::new(GuardSetup { node, peers, boot, left: None }, now));
        self.start_noded(node);
    }

    pub fn start_noded(&mut self, node: NodeId) {
        let setup = self.setup(node);
        let now = self.now;
        let server = self.server(node);
        server.boots += 1;
        server.given = 0;
        server.told = None;
        server.hello_at = now;
        server.inbox.clear();
        server.data.clear();
        server.reported.clear();
        let found = VmEvent::Found { running: server.runs.iter().map(|(vm, run)| (*vm, *run)).collect() };
        server.inbox.push((now, Input::Vm(found)));
        server.inbox.push((now, Input::DataConnected));
        server.noded = Some(Cluster::new(setup, now));
        if let Some(guard) = server.guard.as_mut() {
            guard.handle(now, GuardInput::Connected);
        }
        self.drain(node);
    }

    /// The disk with everything that noded keeps is replaced by an empty one.
    pub fn wipe(&mut self, node: NodeId) {
        let server = self.server(node);
        server.record = None;
        server.log = None;
        server.has = 0;
        server.emptied_for = Epoch(0);
    }

    /// noded dies; guard, guests and data plane go on.
    pub fn stop_noded(&mut self, node: NodeId) {
        self.server(node).noded = None;
        if let Some(core) = self.servers.get_mut(&other(node)).and_then(|server| server.noded.as_mut()) {
            core.handle(self.now, Input::PeerGone(node));
        }
    }

    /// The plug is pulled.
    pub fn crash(&mut self, node: NodeId) {
        self.stop_noded(node);
        let server = self.server(node);
        server.guard = None;
        server.runs.clear();
    }

    pub fn request(&mut self, node: NodeId, change: Change) -> u64 {
        self.next_request += 1;
        let (request, unix_ms) = (self.next_request, self.unix_ms());
        self.give(node, Input::Request { request, unix_ms, change: Box::new(change) });
        request
    }

    /// A request that is answered.
    pub fn ask(&mut self, node: NodeId, change: Change) -> Result<Answer, Refusal> {
        let request = self.request(node, change);
        self.run_until("an answer", |world| world.answers.contains_key(&request));
        self.answers[&request].clone()
    }

    pub fn create_vm(&mut self, vm: &str, memory: u64, node: NodeId) {
        let spec = pollux_cluster::entry::VmSpec {
            name: vm.into(),
            cpus: 1,
            memory: pollux_base::ByteCount(memory),
            image: None,
            disks: vec![pollux_base::ByteCount(GIB)],
            mac: String::new(),
        };
        self.ask(node, Change::CreateVm { spec, node, keys: Vec::new() }).expect("created");
    }

    pub fn start_vm(&mut self, vm: &str) {
        let node = self.an_acting_node();
        let (vm, _) = self.state(node).vm_named(vm).expect("the VM exists");
        self.ask(node, Change::WantVm { vm, wanted: pollux_cluster::entry::Wanted::Running }).expect("wanted");
    }

    pub fn an_acting_node(&self) -> NodeId {
        let acts = |node: &NodeId| self.servers[node].noded.as_ref().is_some_and(|core| core.sight().log_works);
        [A, B].into_iter().find(acts).expect("a node may act")
    }

    pub fn runs_on(&self, vm: &str) -> Option<NodeId> {
        let acts: Vec<NodeId> = [A, B].into_iter().filter(|node| self.servers[node].noded.is_some()).collect();
        let id = acts.iter().find_map(|node| self.state(*node).vm_named(vm).map(|(id, _)| id))?;
        [A, B].into_iter().find(|node| self.servers[node].runs.contains_key(&id))
    }

    /// Both act, as members of one epoch, with everything in sync and the register set.
    pub fn is_settled(&self) -> bool {
        let acts = |node| self.servers[&node].noded.as_ref().is_some_and(|core: &Cluster| core.sight().log_works);
        if !acts(A) || !acts(B) || self.state(A) != self.state(B) || self.state(A).alone().is_some() {
            return false;
        }
        let state = self.state(A);
        let register = Register { epoch: state.authority.epoch, alone: None };
        (!self.with_witness || self.register == register)
            && state.groups.values().all(|group| group.record.in_sync.len() == 2)
            && state.nodes.values().all(|node| node.phase == pollux_cluster::entry::NodePhase::Online)
            && state.vms.values().all(|vm| {
                (vm.wanted == pollux_cluster::entry::Wanted::Running)
                    == (vm.phase == pollux_cluster::entry::VmPhase::Running)
            })
    }

    pub fn run_until(&mut self, what: &str, done: impl Fn(&World) -> bool) {
        for _ in 0..60_000 / 5 {
            if done(self) {
                return;
            }
            self.step();
        }
        panic!("not within a minute: {what}\n{}\n{}", self.trace.join("\n"), self.tell());
    }

    pub fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.step();
        }
    }

    /// The wall clocks of both jump, and all goes on for a while.
    pub fn jump(&mut self, time: Duration) {
        self.wall_ahead += time;
        let unix_ms = self.unix_ms();
        for node in [A, B] {
            self.give(node, Input::Tick { unix_ms });
        }
        self.run(Duration::from_secs(3));
    }

    pub fn give(&mut self, node: NodeId, input: Input) {
        let now = self.now;
        if let Some(core) = self.server(node).noded.as_mut() {
            core.handle(now, input);
            self.drain(node);
        }
    }

    pub fn tell(&self) -> String {
        let mut text = format!(
            "register {:?}; logs {:?}\n",
            self.register,
            self.logs.iter().map(|l| (&l.voters, &l.learners, l.is_dead, l.entries.len())).collect::<Vec<_>>()
        );
        for (node, server) in &self.servers {
            let Some(core) = &server.noded else {
                continue;
            };
            text += &format!("{}: {:?} log {:?} {}\n", name(*node), core.record(), server.log, core.headline().text);
            text += &format!(
                "   {:?} {:?} {:?}\n",
                core.state().authority,
                core.state().nodes.values().map(|n| n.phase).collect::<Vec<_>>(),
                core.sight()
            );
            for (vm, found) in &core.state().vms {
                text += &format!("   {vm} {:?} {:?} blocked: {:?}\n", found.phase, found.node, core.vm_blocked(*vm));
            }
        }
        text
    }

    fn step(&mut self) {
        self.now = self.now + STEP;
        self.move_log();
        for node in [A, B] {
            self.step_guard(node);
            self.step_noded(node);
        }
        self.step_hardware();
        self.check();
    }

    fn step_guard(&mut self, node: NodeId) {
        let now = self.now;
        let ready: Vec<_>;
        (ready, self.packets) =
            std::mem::take(&mut self.packets).into_iter().partition(|(at, to, ..)| *to == node && *at <= now);
        let Some(guard) = self.server(node).guard.as_mut() else {
            return;
        };
        if guard.deadline().is_some_and(|due| due <= now) {
            guard.tick(now);
        }
        for (_, _, network, heartbeat) in ready {
            guard.handle(now, GuardInput::Heartbeat { network, heartbeat });
        }
        self.drain_guard(node);
    }

    fn drain_guard(&mut self, node: NodeId) {
        let now = self.now;
        while let Some(output) = self.server(node).guard.as_mut().and_then(Guard::poll) {
            match output {
                GuardOutput::Send { to, network, heartbeat } => {
                    if !self.cut {
                        self.packets.push((now + ms(1), to, network, heartbeat));
                    }
                }
                GuardOutput::KillGuests => {
                    let killed = std::mem::take(&mut self.server(node).runs);
                    if !killed.is_empty() {
                        self.note(node, format!("the guard kills {} guests", killed.len()));
                    }
                    for (vm, incarnation) in killed {
                        self.end(node, vm, incarnation, false, "killed");
                    }
                }
                GuardOutput::Lease { until, .. } => assert!(until > now),
                GuardOutput::View(view) => self.give(node, Input::Guard(view)),
            }
        }
    }

    fn end(&mut self, node: NodeId, vm: VmId, incarnation: Incarnation, by_guest: bool, detail: &str) {
        let at = self.now + STEP;
        let event = VmEvent::Ended { vm, incarnation, by_guest, detail: detail.into() };
        self.server(node).inbox.push((at, Input::Vm(event)));
    }

    /// The guest shuts itself down.
    pub fn shut_down_from_inside(&mut self, node: NodeId) {
        for (vm, incarnation) in std::mem::take(&mut self.server(node).runs) {
            self.end(node, vm, incarnation, true, "shut down");
        }
    }

    /// A QEMU that nobody asked for.
    pub fn plant_run(&mut self, node: NodeId, vm: VmId) {
        self.server(node).runs.insert(vm, Incarnation(1));
    }

    pub fn has_run(&self, node: NodeId, vm: VmId) -> bool {
        self.servers[&node].runs.contains_key(&vm)
    }

    pub fn exports(&self, node: NodeId) -> Vec<String> {
        self.servers[&node].exports.clone()
    }

    /// Groups of which the node's data plane has a replica.
    pub fn groups(&self, node: NodeId) -> usize {
        self.servers[&node].data.len()
    }

    /// QEMU dies.
    pub fn crash_guests(&mut self, node: NodeId) {
        for (vm, incarnation) in std::mem::take(&mut self.server(node).runs) {
            self.end(node, vm, incarnation, false, "QEMU died");
        }
    }

    fn connected(&self) -> bool {
        !self.cut && !self.control_cut && self.servers.values().all(|server| server.noded.is_some())
    }

    fn step_noded(&mut self, node: NodeId) {
        let now = self.now;
        if self.servers[&node].noded.is_none() {
            return;
        }
        // Hellos.
        if self.connected() && now >= self.servers[&node].hello_at {
            let hello = self.core(node).hello();
            self.server(node).hello_at = now + ms(1000);
            self.give(other(node), Input::Peer(hello));
        }
        let ready: Vec<(Instant, Input)>;
        {
            let holds = self.hold_witness_answers;
            let server = self.server(node);
            (ready, server.inbox) = std::mem::take(&mut server.inbox)
                .into_iter()
                .partition(|(at, input)| *at <= now && !(holds && matches!(input, Input::Witness { .. })));
        }
        for (_, input) in ready {
            self.give(node, input);
        }
        if self.servers[&node].noded.as_ref().and_then(Cluster::deadline).is_some_and(|due| due <= now) {
            let unix_ms = self.unix_ms();
            self.give(node, Input::Tick { unix_ms });
            let due = self.servers[&node].noded.as_ref().and_then(Cluster::deadline);
            assert!(due.is_none_or(|due| due > now), "the deadline does not move on: {due:?} at {now:?}");
        }
        self.run_data_plane(node);
    }

    fn step_hardware(&mut self) {
        let now = self.now;
        let (cuts, later): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.power_cuts).into_iter().partition(|(at, ..)| *at <= now);
        self.power_cuts = later;
        for (_, by, node) in cuts {
            let result = if self.servers[&node].power_switch_fails { Err("timed out".into()) } else { Ok(()) };
            if result.is_ok() && self.servers[&node].guard.is_some() {
                self.note(node, "power off".into());
                self.crash(node);
            }
            self.give(by, Input::Fence { node, result });
        }
        let (ends, later): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.ends).into_iter().partition(|(at, ..)| *at <= now);
        self.ends = later;
        for (_, node, vm, incarnation) in ends {
            if self.servers[&node].runs.get(&vm) == Some(&incarnation) {
                self.server(node).runs.remove(&vm);
                self.end(node, vm, incarnation, true, "shut down");
            }
        }
    }

    fn drain(&mut self, node: NodeId) {
        while let Some(output) = self.server(node).noded.as_mut().and_then(Cluster::poll) {
            let text = weighty(&output);
            if let (Some(text), Some((who, left))) = (&text, self.crash_after)
                && who == node
            {
                if left == 0 {
                    self.crash_after = None;
                    self.crashed_at = Some(text.clone());
                    self.note(node, format!("CRASH before: {text}"));
                    self.crash(node);
                    return;
                }
                self.crash_after = Some((who, left - 1));
            }
            if let Some(text) = text {
                self.note(node, text);
            }
            self.carry_out(node, output);
        }
        if self.servers[&node].guard.is_some() {
            self.drain_guard_commands(node);
        }
    }

    fn drain_guard_commands(&mut self, node: NodeId) {
        // Outputs of the guard are drained in its own step, or at once where a command caused them.
        if self.servers[&node].noded.is_some() {
            self.drain_guard(node);
        }
    }

    fn carry_out(&mut self, node: NodeId, output: Output) {
        let now = self.now;
        match output {
            Output::InitLog { voters } => {
                if self.logs.is_empty() && self.connected() {
                    let voters: BTreeSet<NodeId> = voters.into_iter().collect();
                    for voter in &voters {
                        self.server(*voter).log = Some(0);
                    }
                    self.logs.push(Log { voters, ..Log::default() });
                }
            }
            Output::Propose(entry) => {
                let id = self.servers[&node].log;
                let leader = id.and_then(|id| self.leader(id));
                let can = leader.is_some_and(|leader| leader == node || self.connected());
                if let (Some(id), true) = (id, can) {
                    assert!(!self.logs[id].is_dead, "a log went on after another was forced out of it");
                    self.logs[id].entries.push(entry);
                }
            }
            Output::Answer { request, result } => {
                assert!(self.answers.insert(request, result).is_none(), "answered twice");
            }
            Output::AskWitness { ask, expect, set } => {
                let input = if self.witness_cut.contains(&node) || !self.with_witness {
                    (now + ms(500), Input::Witness { ask, result: Err("connection timed out".into()) })
                } else {
                    let answer = match set {
                        Some(set) if self.register == expect => {
                            self.register = set;
                            WitnessAnswer::Swapped(set)
                        }
                        _ => WitnessAnswer::Holds(self.register),
                    };
                    (now + ms(10), Input::Witness { ask, result: Ok(answer) })
                };
                self.server(node).inbox.push(input);
            }
            Output::SaveEpoch(record) => {
                let server = self.server(node);
                server.record = Some(record.clone());
                server.inbox.push((now + STEP, Input::EpochSaved(record)));
            }
            Output::ForceAlone { .. } => {
                let server = &self.servers[&node];
                assert!(server.record.as_ref().is_some_and(|record| record.alone), "forced without a durable grant");
                if let Some(old) = server.log {
                    let mut log = self.logs[old].clone();
                    log.voters = [node].into();
                    log.learners.clear();
                    self.logs[old].is_dead = true;
                    self.logs.push(log);
                    let id = self.logs.len() - 1;
                    self.server(node).log = Some(id);
                    self.server(node).has = self.logs[id].entries.len();
                }
            }
            Output::GiveUpLog { epoch, .. } => {
                let server = self.server(node);
                if server.emptied_for != epoch {
                    server.emptied_for = epoch;
                    server.log = None;
                    server.has = 0;
                }
                server.given = 0;
                self.give(node, Input::LogGivenUp { epoch });
            }
            Output::TakeIn { node: joiner } => {
                let Some(id) = self.servers[&node].log.filter(|_| self.connected()) else {
                    return;
                };
                if self.servers[&joiner].log != Some(id) {
                    let server = self.server(joiner);
                    server.log = Some(id);
                    server.given = 0;
                }
                if self.logs[id].learners.remove(&joiner) {
                    self.logs[id].voters.insert(joiner);
                } else if !self.logs[id].voters.contains(&joiner) {
                    self.logs[id].learners.insert(joiner);
                }
            }
            Output::Fence { node: target, .. } => self.power_cuts.push((now + ms(300), node, target)),
            Output::Guard(command) => {
                if let Some(guard) = self.server(node).guard.as_mut() {
                    guard.handle(now, GuardInput::Command(command));
                }
            }
            Output::Data(order) => self.on_order(node, order),
            Output::OpenKey(sealed) if self.servers[&node].has_master(sealed.master) => {
                self.orders.push((node, Order::VolumeKey { key: sealed.key, secret: Secret::new([0; 64]) }));
            }
            Output::OpenKey(SealedKey { key, .. }) => {
                self.server(node).inbox.push((now, Input::KeyRefused { key, reason: "another master key".into() }));
            }
            Output::Vm(VmCommand::Start { vm, incarnation, .. }) => {
                let at = now.since(self.start);
                self.starts.push((at, node, incarnation));
                let server = self.server(node);
                server.runs.insert(vm, incarnation);
                server.inbox.push((now + ms(200), Input::Vm(VmEvent::Running { vm, incarnation })));
            }
            Output::Vm(VmCommand::Shutdown { vm }) => {
                if let Some(incarnation) = self.servers[&node].runs.get(&vm).filter(|_| !self.guests_are_deaf) {
                    self.ends.push((now + ms(1000), node, vm, *incarnation));
                }
            }
            Output::Vm(VmCommand::Stop { vm }) => {
                if let Some(incarnation) = self.server(node).runs.remove(&vm) {
                    self.end(node, vm, incarnation, false, "ended");
                }
            }
            Output::Fill { vm, .. } => {
                let at = now + self.fills_take;
                self.server(node).inbox.push((at, Input::Vm(VmEvent::Filled { vm, result: Ok(()) })));
            }
        }
    }

    fn on_order(&mut self, node: NodeId, order: Order) {
        let now = self.now;
        self.orders.push((node, order.clone()));
        match order {
            Order::Group(spec) => {
                let data = &self.servers[&node].data;
                let is_newer = |old: &GroupSpec| old.record.stamp <= spec.record.stamp;
                assert!(data.get(&spec.group).is_none_or(is_newer), "generations only grow");
                let report = self.report(node, &spec);
                let server = self.server(node);
                server.data.insert(spec.group, spec);
                server.inbox.push((now + STEP, Input::Data(Some(report))));
            }
            Order::Forget { group } => {
                self.server(node).data.remove(&group);
            }
            Order::Fenced { node: fenced } => self.server(node).fenced.push(fenced),
            Order::Exports { names } => self.server(node).exports = names.into_keys().collect(),
            _ => {}
        }
    }

    fn note(&mut self, node: NodeId, text: String) {
        let at = self.now.since(self.start);
        self.trace.push(format!("{:7.2} {}: {text}", at.as_secs_f64(), name(node)));
    }

    fn check(&self) {
        let mut runs = BTreeMap::new();
        for (node, server) in &self.servers {
            for vm in server.runs.keys() {
                if let Some(twin) = runs.insert(*vm, *node) {
                    panic!("{vm} runs on {} and {}\n{}", name(twin), name(*node), self.trace.join("\n"));
                }
            }
        }
        let alone = self.servers.values().filter_map(|server| server.noded.as_ref());
        let deciders: Vec<NodeId> =
            alone.filter(|core| core.sight().log_works).filter_map(|core| core.state().alone()).collect();
        assert!(deciders.iter().collect::<BTreeSet<_>>().len() <= 1, "both go on alone\n{}", self.trace.join("\n"));
    }
}
