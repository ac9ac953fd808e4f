//! What goes wrong, and when: the plan of a seed.
//!
//! Within what Pollux promises to survive: the guard alone is never away for as long as it may take to kill
//! (`timing::GUARD_KILL`; longer needs a hardware watchdog), and only one replica's medium fails or decays.

use crate::net::NETWORKS;
use crate::node::{PROCESSES, Process};
use crate::world::{Event, World};
use pollux_base::guard::Network;
use pollux_base::{DiskError, NodeId, VmId};
use pollux_store::faulty_disk::{Luck, OpClass};
use std::time::Duration;

/// How long a node is off whose disk failed.
const DISK_LOOKED_AT: Duration = Duration::from_secs(20);

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    Kill {
        node: NodeId,
        process: Process,
        restart_after: Duration,
    },
    Stop {
        node: NodeId,
        process: Process,
        length: Duration,
    },
    /// Everything on the node stands still, guests included.
    StopNode {
        node: NodeId,
        length: Duration,
    },
    /// A QEMU crashes.
    KillGuest {
        node: NodeId,
    },
    PowerCut {
        node: NodeId,
        on_after: Option<Duration>,
    },
    Cut {
        network: Network,
        from: NodeId,
        to: NodeId,
    },
    Join {
        network: Network,
        from: NodeId,
        to: NodeId,
    },
    CutWitness {
        node: NodeId,
    },
    JoinWitness {
        node: NodeId,
    },
    Witness {
        delay: Duration,
        lost_one_in: u64,
    },
    Network {
        delay: Duration,
        lost_one_in: u64,
        doubled_one_in: u64,
    },
    Switch {
        node: NodeId,
        reachable: bool,
        delay: Duration,
    },
    /// The next operation of this kind fails.
    FailDisk {
        node: NodeId,
        class: OpClass,
    },
    /// Somebody changes the disks of the node's pool.
    ChangeDisks {
        node: NodeId,
    },
    /// A bit of what a guest wrote rots.
    Rot {
        node: NodeId,
    },
    JumpWallClock {
        node: NodeId,
        ms: i64,
    },
    Want {
        vm: usize,
        running: bool,
    },
}

impl World {
    pub fn on_fault(&mut self, fault: Fault) {
        if self.healed {
            return;
        }
        self.counts.faults += 1;
        self.trace.line(self.now, || format!("** {fault:?}"));
        // Guests come to other places just as something goes wrong: that is when it is hardest to know what changed.
        let World { nodes, luck, .. } = self;
        let guests = nodes.values_mut().flat_map(|node| node.guests.values_mut());
        guests.for_each(|guest| guest.go_to_fresh_places(luck));
        match fault {
            Fault::Kill { node, process, restart_after } => self.kill(node, process, restart_after),
            Fault::Stop { node, process, length } => {
                self.stop(node, process);
                self.at(length, Event::Resume { node, process });
            }
            Fault::StopNode { node, length } => {
                for process in PROCESSES {
                    self.stop(node, process);
                }
                self.stop_guests(node, true);
                // They wake in any order.
                let mut order = PROCESSES.to_vec();
                while !order.is_empty() {
                    let process = order.swap_remove(self.luck.below(order.len() as u64) as usize);
                    let after = length + Duration::from_micros(self.luck.below(200));
                    self.at(after, Event::Resume { node, process });
                }
                let after = length + Duration::from_micros(self.luck.below(200));
                self.at(after, Event::ResumeGuests { node });
            }
            Fault::KillGuest { node } => {
                let vm: Option<VmId> = self.nodes[&node].guests.keys().next().copied();
                if let Some(vm) = vm {
                    self.end_guest(node, vm, false, "crashed");
                }
            }
            Fault::PowerCut { node, on_after } => {
                self.power_cut(node);
                if let Some(after) = on_after {
                    self.at(after, Event::PowerOn { node });
                }
            }
            Fault::Cut { network, from, to } => self.net.cut(network, from, to),
            Fault::Join { network, from, to } => {
                self.net.join(network, from, to);
                self.release_streams();
            }
            Fault::CutWitness { node } => self.net.cut_witness(node),
            Fault::JoinWitness { node } => self.net.join_witness(node),
            Fault::Witness { delay, lost_one_in } => {
                self.witness.delay = delay;
                self.witness.lost_one_in = lost_one_in;
            }
            Fault::Network { delay, lost_one_in, doubled_one_in } => {
                self.net.delay = delay;
                self.net.lost_one_in = lost_one_in;
                self.net.doubled_one_in = doubled_one_in;
            }
            Fault::Switch { node, reachable, delay } => {
                if let Some(switch) = &mut self.node(node).switch {
                    switch.reachable = reachable;
                    switch.delay = delay;
                }
            }
            Fault::FailDisk { node, class } => {
                if self.may_lose_a_disk(node) {
                    let count = self.nodes[&node].disks.len();
                    let chosen = if count > 1 { self.luck.below(count as u64) as usize } else { 0 };
                    let node = self.node(node);
                    node.disks[chosen].fail_next(class, DiskError::Io("the medium fails".into(), 5));
                    node.disk_failed = true;
                }
            }
            Fault::ChangeDisks { node } => self.change_disks(node),
            Fault::Rot { node } => self.rot(node),
            Fault::JumpWallClock { node, ms } => self.node(node).wall_skew_ms += ms,
            Fault::Want { vm, running } => self.operator.wanted[vm] = running,
        }
    }

    /// Everything outside Pollux is well again, and everything that was to run runs.
    pub fn heal(&mut self) {
        self.trace.line(self.now, || "** all is healed".into());
        self.healed = true;
        self.net.heal();
        self.witness.delay = Duration::from_millis(5);
        self.witness.lost_one_in = 0;
        self.release_streams();
        self.operator.wanted.fill(true);
        for node in self.ids() {
            if let Some(switch) = &mut self.node(node).switch {
                switch.reachable = true;
                switch.delay = Duration::from_millis(400);
            }
            for process in PROCESSES {
                self.resume(node, process);
            }
            self.stop_guests(node, false);
            // A pool whose disk failed is out of use. Somebody comes, pulls the plug, looks at it, and later starts it anew:
            // long enough for the other node to take over.
            if std::mem::take(&mut self.node(node).disk_failed) {
                self.power_cut(node);
                let until = self.now + DISK_LOOKED_AT;
                let found = self.node(node);
                found.off_until = until;
                found.disks.iter_mut().for_each(|disk| disk.kill(0));
                self.at(DISK_LOOKED_AT, Event::PowerOn { node });
            } else {
                self.at(Duration::ZERO, Event::PowerOn { node });
            }
        }
    }

    /// A bit of what a guest wrote changes on this node's medium.
    ///
    /// Not to be followed by a crash of the same node: the checksums of extents that are hot then are derived anew from
    /// what the medium holds (architecture, section 6), and rot among it counts as written.
    pub fn rot(&mut self, node: NodeId) {
        let pages = self.guests_pages(node);
        if pages.is_empty() {
            return;
        }
        self.rotted = true;
        let page = pages[self.luck.below(pages.len() as u64) as usize];
        let byte = page * 4096 + self.luck.below(4096);
        self.trace.line(self.now, || format!("{node} disk: page {page} rots"));
        self.node(node).disks[0].rot(byte);
    }
}

/// Changes of disks beside the faults of a plan, and now and then a disk that fails for good.
pub fn disk_plan(luck: &mut Luck, nodes: &[NodeId], witness: bool, length: Duration) -> Vec<(Duration, Fault)> {
    let at = |luck: &mut Luck| Duration::from_nanos(luck.below(length.as_nanos() as u64));
    let mut plan = Vec::new();
    for _ in 0..2 + luck.below(12) {
        let node = nodes[luck.below(nodes.len() as u64) as usize];
        plan.push((at(luck), Fault::ChangeDisks { node }));
    }
    if witness && luck.one_in(3) {
        let node = nodes[luck.below(nodes.len() as u64) as usize];
        let class = if luck.one_in(2) { OpClass::Write } else { OpClass::Flush };
        plan.push((at(luck), Fault::FailDisk { node, class }));
    }
    plan
}

/// A plan of faults for `length`, from `luck`. Times count from the plan's beginning.
pub fn plan(luck: &mut Luck, nodes: &[NodeId], vms: usize, witness: bool, length: Duration) -> Vec<(Duration, Fault)> {
    let mut plan = Vec::new();
    let some = |luck: &mut Luck| nodes[luck.below(nodes.len() as u64) as usize];
    let ms = |luck: &mut Luck, least: u64, most: u64| Duration::from_millis(least + luck.below(most - least + 1));
    // Few at a time and far apart, or many at once: both find different things.
    let count = 1 + luck.below(8);
    // Without a witness nobody takes over from a node whose disk is looked at.
    let fails = witness && luck.one_in(6);
    let decaying = some(luck);
    for _ in 0..count {
        let at = Duration::from_nanos(luck.below(length.as_nanos() as u64));
        let node = some(luck);
        let others: Vec<NodeId> = nodes.iter().copied().filter(|other| *other != node).collect();
        let peer = others[luck.below(others.len() as u64) as usize];
        let away = match luck.below(3) {
            0 => ms(luck, 50, 1000),
            1 => ms(luck, 1000, 5000),
            _ => ms(luck, 5000, 15000),
        };
        match luck.below(18) {
            0 => plan.push((at, Fault::Kill { node, process: Process::Blockd, restart_after: ms(luck, 50, 800) })),
            1 => plan.push((at, Fault::Kill { node, process: Process::Blockd, restart_after: away })),
            2 => plan.push((at, Fault::Kill { node, process: Process::Noded, restart_after: away })),
            3 => plan.push((at, Fault::Kill { node, process: Process::Guard, restart_after: ms(luck, 20, 900) })),
            4 => plan.push((at, Fault::Stop { node, process: Process::Blockd, length: away })),
            5 => plan.push((at, Fault::Stop { node, process: Process::Noded, length: away })),
            6 => plan.push((at, Fault::Stop { node, process: Process::Guard, length: ms(luck, 50, 900) })),
            7 => plan.push((at, Fault::StopNode { node, length: away })),
            8 | 9 => plan.push((at, Fault::PowerCut { node, on_after: Some(away) })),
            10 => {
                // All lose power, not quite together, and return one by one.
                for node in nodes {
                    let at = at + ms(luck, 0, 600);
                    plan.push((at, Fault::PowerCut { node: *node, on_after: Some(ms(luck, 500, 12000)) }));
                }
            }
            11 => {
                // All links between two nodes.
                for network in NETWORKS {
                    let (at, until) = (at + ms(luck, 0, 3), at + away + ms(luck, 4, 20));
                    for (from, to) in [(node, peer), (peer, node)] {
                        plan.push((at, Fault::Cut { network, from, to }));
                        plan.push((until, Fault::Join { network, from, to }));
                    }
                }
                if luck.one_in(4) {
                    plan.push((at, Fault::CutWitness { node }));
                    plan.push((at + away, Fault::JoinWitness { node }));
                }
            }
            12 => {
                let network = NETWORKS[luck.below(2) as usize];
                for (from, to) in [(node, peer), (peer, node)] {
                    plan.push((at, Fault::Cut { network, from, to }));
                    plan.push((at + away, Fault::Join { network, from, to }));
                }
            }
            13 => {
                // One way only, on one network or on both.
                let both = luck.one_in(2);
                let first = luck.below(2) as usize;
                for network in NETWORKS.into_iter().enumerate().filter(|(i, _)| both || *i == first).map(|(_, n)| n) {
                    plan.push((at, Fault::Cut { network, from: node, to: peer }));
                    plan.push((at + away, Fault::Join { network, from: node, to: peer }));
                }
            }
            14 => {
                plan.push((at, Fault::CutWitness { node }));
                if luck.one_in(2) {
                    plan.push((at, Fault::CutWitness { node: peer }));
                    plan.push((at + away, Fault::JoinWitness { node: peer }));
                }
                plan.push((at + away, Fault::JoinWitness { node }));
            }
            15 => {
                let (delay, lost_one_in) = (ms(luck, 1, 1200), luck.below(4));
                plan.push((at, Fault::Witness { delay, lost_one_in }));
                let (lost_one_in, doubled_one_in) = (luck.below(6), luck.below(6));
                let delay = Duration::from_micros(luck.below(20_000));
                plan.push((at, Fault::Network { delay, lost_one_in, doubled_one_in }));
                let reachable = luck.one_in(2);
                plan.push((at, Fault::Switch { node, reachable, delay: ms(luck, 50, 2500) }));
            }
            16 => {
                plan.push((at, Fault::KillGuest { node }));
                plan.push((at, Fault::JumpWallClock { node, ms: luck.below(7_200_000) as i64 - 3_600_000 }));
            }
            _ => {
                let vm = luck.below(vms.max(1) as u64) as usize;
                plan.push((at, Fault::Want { vm, running: false }));
                plan.push((at + away, Fault::Want { vm, running: true }));
            }
        }
        if fails && luck.one_in(2) {
            let class = [OpClass::Any, OpClass::Read, OpClass::Write, OpClass::Flush][luck.below(4) as usize];
            plan.push((at + ms(luck, 0, 1000), Fault::FailDisk { node: decaying, class }));
        }
    }
    // What would still be away at the end is healed then; the plan need not be sorted.
    plan
}
