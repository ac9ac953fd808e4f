//! What `noded`'s shell does around its core: the log, the connections to peers, guard and data plane, the witness, the
//! power switches, and QEMU's life.

use crate::guest::Guest;
use crate::keys;
use crate::log::LogOutput;
use crate::net::{MANAGEMENT, STORAGE};
use crate::node::{Contacts, Input, Process, Running};
use crate::sabotage::Sabotage;
use crate::shell_guard::LOCAL;
use crate::time::Time;
use crate::world::{Event, World};
use pollux_base::config::PowerConfig;
use pollux_base::guard::GuardCommand;
use pollux_base::unit::BLOCK_BYTES;
use pollux_base::{GroupId, Incarnation, NodeId, Order, VmId, VolumeId};
use pollux_cluster::entry::NodeSpec;
use pollux_cluster::{Cluster, EpochRecord, Output, PeerHello, Register, Setup, VmCommand, VmEvent};
use std::time::Duration;

/// Peers say hello at least this often.
const HELLO: Duration = Duration::from_secs(1);
/// A peer that said nothing for so long is gone.
const HELLO_MISSED: Duration = Duration::from_secs(3);
/// A question to the witness is given up after this.
const WITNESS_TIMEOUT: Duration = Duration::from_millis(1500);
/// An order to a power switch is given up after this.
const FENCE_TIMEOUT: Duration = Duration::from_secs(3);

/// A QEMU that is about to run.
pub struct Exec {
    vm: VmId,
    incarnation: Incarnation,
    volumes: Vec<VolumeId>,
}

impl World {
    pub fn start_noded(&mut self, id: NodeId) {
        let life = self.number();
        let (run, unix_ms) = (self.luck.draw(), self.unix_ms(id));
        let nodes = self.ids().into_iter().map(|node| (node, self.spec_of(node))).collect();
        let setup = Setup {
            node: id,
            name: "sim".into(),
            nodes,
            witness: self.settings.witness,
            record: self.nodes[&id].record.clone(),
            master: Some(keys::MASTER),
            master_successor: None,
            run,
            unix_ms,
        };
        let (now, local_now) = (self.now, self.nodes[&id].clock.read(self.now));
        let with_snapshot = self.luck.one_in(2);
        let node = self.node(id);
        node.noded = Some(Running::new(life, Cluster::new(setup, local_now)));
        node.contacts = Contacts::default();
        let snapshot = node.snapshot.clone().filter(|_| with_snapshot);
        node.log.restart(now, snapshot.as_ref().map_or(0, |(index, _)| *index as usize));
        if let Some((index, state)) = snapshot {
            self.tell_core(id, LOCAL, pollux_cluster::Input::Snapshot { index, state: Box::new(state) });
        }
        let running = self.nodes[&id].guests.values().map(|guest| (guest.vm, guest.incarnation)).collect();
        self.tell_core(id, LOCAL, pollux_cluster::Input::Vm(VmEvent::Found { running }));
        self.drain_log(id);
        self.drain_noded(id);
        self.connect_guard(id);
        self.connect_blockd(id);
    }

    fn spec_of(&self, node: NodeId) -> NodeSpec {
        let power = PowerConfig {
            url: format!("http://192.0.2.{node}:8000"),
            system: node.to_string(),
            uuid: format!("00000000-0000-0000-0000-{:012}", node.0),
        };
        NodeSpec {
            name: format!("node{}", node.0),
            api: vec![format!("192.0.2.{}:7443", node.0)],
            replication: vec![format!("192.0.2.{}:7001", node.0)],
            nbd: None,
            power: self.settings.switches.then_some(power),
            memory_bytes: 64 << 30,
        }
    }

    pub fn noded_gone(&mut self, id: NodeId) {
        // What was applied may have been put into a snapshot before.
        let one_in = self.luck.one_in(2);
        let node = self.node(id);
        if let Some(running) = node.noded.take().filter(|_| one_in) {
            let state = running.core.state().clone();
            if state.applied > 0 && state.applied <= node.log.applied() as u64 {
                node.snapshot = Some((state.applied, state));
            }
        }
        self.node(id).contacts = Contacts::default();
        for peer in self.peers(id) {
            if self.net.path([MANAGEMENT, STORAGE], id, peer).is_some() {
                let after = self.net.some_delay(&mut self.luck);
                self.at(after, Event::PeerGone { to: peer, peer: id });
            }
        }
    }

    /// Tells the core something after a while, if the same run of `noded` is there then.
    pub fn tell_core(&mut self, id: NodeId, after: Duration, input: pollux_cluster::Input) {
        if let Some(life) = self.nodes[&id].life(Process::Noded) {
            let input = Input::Core(input);
            self.at(after, Event::Input { node: id, process: Process::Noded, life, input });
        }
    }

    pub fn step_noded(&mut self, id: NodeId, input: Input) {
        let world_now = self.now;
        let unix_ms = self.unix_ms(id);
        let now = self.nodes[&id].clock.read(world_now);
        let World { nodes, trace, .. } = self;
        let Some(node) = nodes.get_mut(&id) else { return };
        let Some(running) = node.noded.as_mut() else { return };
        let mut applied = false;
        match input {
            Input::Core(input) => {
                applied =
                    matches!(input, pollux_cluster::Input::Committed { .. } | pollux_cluster::Input::Snapshot { .. });
                trace.line(world_now, || format!("{id} noded <- {}", brief(&input)));
                running.core.handle(now, input);
            }
            Input::Log(from, message) => node.log.receive(world_now, from, message),
            Input::Timer => {
                if running.core.deadline().is_some_and(|deadline| deadline <= now) {
                    running.core.handle(now, pollux_cluster::Input::Tick { unix_ms });
                }
                if node.log.deadline() <= world_now {
                    node.log.tick(world_now);
                }
            }
            Input::Guard(_) | Input::Blockd(_) | Input::Links(_) => {}
        }
        if let Some(running) = &self.node(id).noded {
            running.core.check();
        }
        if applied {
            self.look_at_records(id);
            self.look_for_taken(id);
            self.look_for_keys(id);
            self.look_for_copies(id);
        }
        self.drain_noded(id);
    }

    fn drain_noded(&mut self, id: NodeId) {
        while let Some(output) = self.node(id).noded.as_mut().and_then(|running| running.core.poll()) {
            self.trace.line(self.now, || format!("{id} noded -> {output:?}"));
            self.carry_out(id, output);
        }
        self.drain_log(id);
        self.lose_silent_peers(id);
        self.say_hello(id);
        let node = &self.nodes[&id];
        let Some(running) = &node.noded else { return };
        let core = running.core.deadline().map_or(Time(u64::MAX), |deadline| node.clock.when(deadline));
        let at = core.min(node.log.deadline()).min(node.contacts.tell_at);
        self.set_timer(id, Process::Noded, at);
    }

    fn drain_log(&mut self, id: NodeId) {
        while let Some(output) = self.node(id).log.poll() {
            match output {
                LogOutput::Send { to, message } => {
                    if !message.is_idle() {
                        self.trace.line(self.now, || format!("{id} log -> {to}: {}", message.name()));
                    }
                    // A call needs both ways; the log's disk takes its time too.
                    if self.net.path([MANAGEMENT, STORAGE], id, to).is_some() {
                        let disk = Duration::from_micros(100 + self.luck.below(1500));
                        let after = self.net.some_delay(&mut self.luck) + disk;
                        self.at(after, Event::LogMessage { from: id, to, message });
                    }
                }
                LogOutput::Committed { index, entry } => {
                    self.tell_core(id, LOCAL, pollux_cluster::Input::Committed { index, entry });
                }
                LogOutput::View { leader, voters, learners } => {
                    self.tell_core(id, LOCAL, pollux_cluster::Input::Log { leader, voters, learners });
                }
            }
        }
    }

    fn carry_out(&mut self, id: NodeId, output: Output) {
        let now = self.now;
        let Some(life) = self.nodes[&id].life(Process::Noded) else { return };
        match output {
            Output::InitLog { voters } => self.node(id).log.init(now, &voters),
            Output::Propose(entry) => {
                if !self.luck.one_in(100) {
                    self.node(id).log.propose(entry);
                }
            }
            Output::Answer { request, result } => self.on_api_answer(id, request, result),
            Output::AskWitness { ask, expect, set } => {
                let after = self.witness.delay / 2;
                self.at(after, Event::WitnessAsked { node: id, life, ask, expect, set });
            }
            Output::SaveEpoch(record) => {
                let after = self.between(Duration::from_micros(200), Duration::from_millis(4));
                self.at(after, Event::Saved { node: id, life, record });
            }
            Output::ForceAlone { epoch } => {
                self.counts.grants += 1;
                self.node(id).log.force_alone(now, epoch);
            }
            Output::GiveUpLog { from: _, epoch } => {
                let node = self.node(id);
                node.log.give_up(now, epoch);
                node.snapshot = None;
                self.tell_core(id, LOCAL, pollux_cluster::Input::LogGivenUp { epoch });
            }
            Output::TakeIn { node } => self.node(id).log.take_in(node),
            Output::Fence { node, power: _ } => {
                if self.node(id).contacts.fencing.insert(node) {
                    let after = self.nodes[&node].switch.as_ref().map_or(FENCE_TIMEOUT, |switch| switch.delay);
                    self.at(after, Event::Fence { by: id, life, node });
                }
            }
            Output::Guard(command) => self.tell_guard(id, command),
            Output::Data(order) => self.tell_blockd(id, order),
            Output::OpenKey(sealed) => self.tell_blockd(id, keys::order(&sealed)),
            Output::Vm(command) => self.on_vm_command(id, life, command),
            Output::Fill { vm, .. } => {
                let result = Err("there are no images here".into());
                self.tell_core(id, LOCAL, pollux_cluster::Input::Vm(VmEvent::Filled { vm, result }));
            }
        }
    }

    fn tell_guard(&mut self, id: NodeId, command: GuardCommand) {
        if let Some(life) = self.nodes[&id].life(Process::Guard).filter(|_| self.nodes[&id].contacts.guard) {
            let input = Input::Guard(pollux_guard::Input::Command(command));
            self.at(LOCAL, Event::Input { node: id, process: Process::Guard, life, input });
        }
    }

    fn tell_blockd(&mut self, id: NodeId, mut order: Order) {
        self.forget_keys(&mut order);
        if let Some(life) = self.nodes[&id].life(Process::Blockd).filter(|_| self.nodes[&id].contacts.data) {
            if self.settings.sabotage == Some(Sabotage::LeaseIgnored) {
                for node in self.peers(id) {
                    let input = Input::Blockd(pollux_replica::Input::Order(Box::new(Order::Fenced { node })));
                    self.at(LOCAL, Event::Input { node: id, process: Process::Blockd, life, input });
                }
            }
            let input = Input::Blockd(pollux_replica::Input::Order(Box::new(order)));
            self.at(LOCAL, Event::Input { node: id, process: Process::Blockd, life, input });
        }
    }

    fn say_hello(&mut self, id: NodeId) {
        let now = self.now;
        let node = self.node(id);
        let Some(running) = &node.noded else { return };
        let hello = running.core.hello();
        if now < node.contacts.tell_at && node.contacts.told.as_ref() == Some(&hello) {
            return;
        }
        node.contacts.tell_at = now + HELLO;
        node.contacts.told = Some(hello.clone());
        for peer in self.peers(id) {
            if self.net.path([MANAGEMENT, STORAGE], id, peer).is_some() {
                let after = self.net.some_delay(&mut self.luck);
                self.at(after, Event::Hello { to: peer, hello: hello.clone() });
            }
        }
    }

    pub fn on_hello(&mut self, to: NodeId, hello: PeerHello) {
        let now = self.now;
        let node = self.node(to);
        if node.is_active(Process::Noded) {
            node.contacts.peers.insert(hello.node, now);
        }
        self.tell_core(to, Duration::ZERO, pollux_cluster::Input::Peer(hello));
    }

    pub fn on_peer_gone(&mut self, to: NodeId, peer: NodeId) {
        if self.node(to).contacts.peers.remove(&peer).is_some() {
            self.tell_core(to, Duration::ZERO, pollux_cluster::Input::PeerGone(peer));
        }
    }

    fn lose_silent_peers(&mut self, id: NodeId) {
        let now = self.now;
        let peers = self.nodes[&id].contacts.peers.iter();
        let silent: Vec<NodeId> =
            peers.filter(|(_, at)| now.since(**at) > HELLO_MISSED).map(|(peer, _)| *peer).collect();
        for peer in silent {
            self.on_peer_gone(id, peer);
        }
    }

    pub fn on_witness_asked(&mut self, id: NodeId, life: u64, ask: u64, expect: Register, set: Option<Register>) {
        let half = self.witness.delay / 2;
        let lost = self.witness.lost_one_in;
        let mut answer = None;
        if self.settings.witness && self.net.reaches_witness(id) {
            let before = self.witness.register();
            answer = Some(self.witness.answer(expect, set));
            if self.settings.sabotage == Some(Sabotage::WitnessGrantsBoth)
                && let Some(set) = set
            {
                answer = Some(pollux_cluster::WitnessAnswer::Swapped(set));
            }
            let after = self.witness.register();
            self.trace.line(self.now, || format!("witness: {id} asks {expect:?} -> {set:?}: {before:?} -> {after:?}"));
            if lost > 0 && self.luck.one_in(lost) {
                answer = None;
            }
        }
        let (after, result) = match answer {
            Some(answer) => (half, Ok(answer)),
            None => (WITNESS_TIMEOUT, Err("the witness is not reached".into())),
        };
        let input = Input::Core(pollux_cluster::Input::Witness { ask, result });
        self.at(after, Event::Input { node: id, process: Process::Noded, life, input });
    }

    /// The record is on stable storage, whether or not who asked for it still runs.
    pub fn on_saved(&mut self, id: NodeId, life: u64, record: EpochRecord) {
        let node = self.node(id);
        if node.on && node.life(Process::Noded) == Some(life) {
            node.record = Some(record.clone());
            self.tell_core(id, LOCAL, pollux_cluster::Input::EpochSaved(record));
        }
    }

    pub fn on_fence(&mut self, by: NodeId, life: u64, node: NodeId) {
        let reached = self.nodes[&node].switch.as_ref().is_some_and(|switch| switch.reachable);
        let result = if reached && self.net.reaches_witness(by) {
            self.counts.fences += 1;
            self.trace.line(self.now, || format!("{by} has {node} switched off"));
            self.power_cut(node);
            // Somebody looks after it and switches it on again.
            let after = self.between(Duration::from_secs(3), Duration::from_secs(12));
            self.at(after, Event::PowerOn { node });
            Ok(())
        } else {
            Err("the power switch is not reached".into())
        };
        if self.nodes[&by].life(Process::Noded) == Some(life) {
            self.node(by).contacts.fencing.remove(&node);
        }
        let input = Input::Core(pollux_cluster::Input::Fence { node, result });
        self.at(LOCAL, Event::Input { node: by, process: Process::Noded, life, input });
    }

    fn on_vm_command(&mut self, id: NodeId, life: u64, command: VmCommand) {
        match command {
            VmCommand::Start { vm, incarnation, spec: _, volumes } => {
                let volumes = volumes.into_iter().map(|(volume, _)| volume).collect();
                let after = self.between(Duration::from_millis(50), Duration::from_millis(700));
                self.at(after, Event::Exec { node: id, life, run: Exec { vm, incarnation, volumes } });
            }
            VmCommand::Shutdown { vm } => {
                if let Some(incarnation) = self.nodes[&id].guests.get(&vm).map(|guest| guest.incarnation) {
                    let after = self.between(Duration::from_millis(100), Duration::from_millis(2000));
                    self.at(after, Event::ShutDown { node: id, vm, incarnation });
                }
            }
            VmCommand::Stop { vm } => self.end_guest(id, vm, false, "ended"),
        }
    }

    /// QEMU is started, if the run of `noded` that was about to do it still goes on.
    pub fn on_exec(&mut self, id: NodeId, life: u64, run: Exec) {
        let Exec { vm, incarnation, volumes } = run;
        let node = &self.nodes[&id];
        if node.life(Process::Noded) != Some(life) {
            return;
        }
        let event = match node.guests.get(&vm) {
            Some(guest) if guest.incarnation == incarnation => Some(VmEvent::Running { vm, incarnation }),
            Some(_) => Some(VmEvent::StartFailed { vm, incarnation, reason: "another run of it exists here".into() }),
            None => None,
        };
        let event = event.unwrap_or_else(|| {
            let sizes: Vec<(VolumeId, u64)> =
                volumes.iter().map(|volume| (*volume, self.blocks_of(id, *volume))).collect();
            match volumes.first().and_then(|volume| self.group_of(*volume)) {
                Some(group) => {
                    self.begin_guest(id, Guest::new(vm, incarnation, group, sizes));
                    VmEvent::Running { vm, incarnation }
                }
                None => VmEvent::StartFailed { vm, incarnation, reason: "no disk".into() },
            }
        });
        self.tell_core(id, LOCAL, pollux_cluster::Input::Vm(event));
    }

    fn state_with(&self, volume: VolumeId) -> Option<&pollux_cluster::state::Volume> {
        self.nodes.values().find_map(|node| node.noded.as_ref()?.core.state().volumes.get(&volume))
    }
    pub fn group_of(&self, volume: VolumeId) -> Option<GroupId> {
        self.state_with(volume).map(|found| found.group)
    }
    /// As large as the node knows it to be: it may have grown since.
    fn blocks_of(&self, id: NodeId, volume: VolumeId) -> u64 {
        let own = self.nodes[&id].noded.as_ref().and_then(|noded| noded.core.state().volumes.get(&volume));
        own.or_else(|| self.state_with(volume)).map_or(0, |found| found.size.0 / BLOCK_BYTES)
    }
}

/// An old view would look like silence: of several that wait only the newest is given.
pub fn keep_newest_view(waiting: &mut Vec<Input>) {
    let is_view = |input: &Input| matches!(input, Input::Core(pollux_cluster::Input::Guard(_)));
    let Some(newest) = waiting.iter().rposition(is_view) else { return };
    let mut place = 0;
    waiting.retain(|input| {
        place += 1;
        !is_view(input) || place - 1 == newest
    });
}

fn brief(input: &pollux_cluster::Input) -> String {
    match input {
        pollux_cluster::Input::Snapshot { index, .. } => format!("Snapshot {{ index: {index} }}"),
        pollux_cluster::Input::Guard(view) => {
            let held = if view.lease_held { "held" } else { "over" };
            let heard = |peer: &pollux_base::guard::PeerView| {
                format!(" {} heard {:?} ms ago on {:?} {:?}", peer.node, peer.heard_ms, peer.networks, peer.epoch)
            };
            format!("Guard: lease {held}{}", view.peers.iter().map(heard).collect::<String>())
        }
        other => format!("{other:?}"),
    }
}
