//! What `pollux-guard`'s shell does around its core: heartbeats as datagrams, the lease on tmpfs, signals to the guests.

use crate::net::NETWORKS;
use crate::node::{Input, Process, Running};
use crate::sabotage::Sabotage;
use crate::world::{Event, World};
use pollux_base::NodeId;
use pollux_base::guard::{Heartbeat, Network};
use pollux_guard::{Guard, Left, Output, Setup};
use std::time::Duration;

/// To a process of the same node, through a socket.
pub const LOCAL: Duration = Duration::from_micros(40);

impl World {
    pub fn start_guard(&mut self, id: NodeId) {
        let (life, boot) = (self.number(), self.luck.draw());
        let peers = self.peers(id).into_iter().map(|peer| (peer, NETWORKS.to_vec())).collect();
        let now = self.nodes[&id].clock.read(self.now);
        let node = self.node(id);
        let setup = Setup { node: id, peers, boot, left: node.left.clone() };
        node.guard = Some(Running::new(life, Guard::new(setup, now)));
        self.drain_guard(id);
        self.connect_guard(id);
    }

    /// `noded` and the guard find each other, if both run.
    pub fn connect_guard(&mut self, id: NodeId) {
        let node = self.node(id);
        if node.contacts.guard || node.noded.is_none() {
            return;
        }
        if let Some(life) = node.life(Process::Guard) {
            node.contacts.guard = true;
            let input = Input::Guard(pollux_guard::Input::Connected);
            self.at(LOCAL, Event::Input { node: id, process: Process::Guard, life, input });
        }
    }

    /// The guard's process is gone.
    pub fn guard_gone(&mut self, id: NodeId) {
        if std::mem::take(&mut self.node(id).contacts.guard) {
            self.tell_core(id, LOCAL, pollux_cluster::Input::GuardGone);
        }
    }

    pub fn step_guard(&mut self, id: NodeId, input: Input) {
        let now = self.nodes[&id].clock.read(self.now);
        let Some(running) = self.node(id).guard.as_mut() else { return };
        match input {
            Input::Guard(input) => running.core.handle(now, input),
            _ => running.core.tick(now),
        }
        running.core.check();
        self.drain_guard(id);
    }

    fn drain_guard(&mut self, id: NodeId) {
        while let Some(output) = self.node(id).guard.as_mut().and_then(|running| running.core.poll()) {
            match output {
                Output::Send { to, network, heartbeat } => self.send_heartbeat(id, to, network, heartbeat),
                Output::KillGuests => {
                    self.trace.line(self.now, || format!("{id} guard: the lease is over, guests are killed"));
                    self.counts.kills += 1;
                    let command = self.node(id).left.take().and_then(|left| left.command);
                    self.node(id).left = Some(Left { until: None, command });
                    if self.settings.sabotage != Some(Sabotage::GuardDoesNotKill) {
                        let after = self.between(Duration::from_millis(1), Duration::from_millis(60));
                        self.at(after, Event::Kill { node: id });
                    }
                }
                Output::Lease { until, command } => {
                    self.node(id).left = Some(Left { until: Some(until), command });
                }
                Output::View(view) => {
                    if self.nodes[&id].contacts.guard {
                        self.tell_core(id, LOCAL, pollux_cluster::Input::Guard(view));
                    }
                }
            }
        }
        let node = &self.nodes[&id];
        let deadline = node.guard.as_ref().and_then(|running| running.core.deadline());
        if let Some(deadline) = deadline {
            let at = node.clock.when(deadline);
            self.set_timer(id, Process::Guard, at);
        }
    }

    fn send_heartbeat(&mut self, from: NodeId, to: NodeId, network: Network, heartbeat: Heartbeat) {
        if !self.net.delivers(network, from, to) {
            return;
        }
        let (lost, doubled) = (self.net.lost_one_in, self.net.doubled_one_in);
        let copies = match () {
            () if lost > 0 && self.luck.one_in(lost) => 0,
            () if doubled > 0 && self.luck.one_in(doubled) => 2,
            () => 1,
        };
        for _ in 0..copies {
            let after = self.net.some_delay(&mut self.luck);
            self.at(after, Event::Heartbeat { to, network, heartbeat: heartbeat.clone() });
        }
    }

    pub fn on_heartbeat(&mut self, to: NodeId, network: Network, heartbeat: Heartbeat) {
        if let Some(life) = self.nodes[&to].life(Process::Guard) {
            let input = Input::Guard(pollux_guard::Input::Heartbeat { network, heartbeat });
            self.give(to, Process::Guard, life, input);
        }
    }
}
