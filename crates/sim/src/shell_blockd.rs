//! What `blockd`'s shell does around its core: the disk, the peers' connections (`stream`), orders and reports, and the
//! front end through which guests reach their volumes.

use crate::content::value_of;
use crate::guest::{Ask, Guest};
use crate::history::{ALL, Seen, Value};
use crate::node::{Blockd, Input, Process, Running};
use crate::peek::Peek;
use crate::sabotage::Sabotage;
use crate::shell_guard::LOCAL;
use crate::world::{CLUSTER, Event, POOL_BYTES, World};
use pollux_base::order::{ReplicaState, Report};
use pollux_base::unit::{BLOCK_BYTES, BlockRange};
use pollux_base::{
    BlockCount, BlockError, ByteCount, DiskDone, DiskOpId, DiskOpKind, Incarnation, NodeId, Reply, Request, RequestId,
    VmId, VolumeId,
};
use pollux_replica::links::{self, Links, Use};
use pollux_replica::wire::{Carried, Place, What};
use pollux_replica::{Config, DataPlane, Output};
use std::collections::BTreeMap;
use std::time::Duration;

impl World {
    pub fn start_blockd(&mut self, id: NodeId) {
        self.look_behind(id);
        let life = self.number();
        let now = self.nodes[&id].clock.read(self.now);
        let boot = self.nodes[&id].boot;
        if let Some(kept) = Peek::kept(&self.nodes[&id].disks, id) {
            let mut places = 0..;
            self.node(id).disks.retain(|_| places.next().is_some_and(|place| kept.contains(&place)));
        }
        let disks = vec![ByteCount(POOL_BYTES); self.nodes[&id].disks.len()];
        let config = Config { cluster: CLUSTER, node: id, disks, paths: Vec::new(), boot, seen: BTreeMap::new() };
        let usage = if self.luck.one_in(3) { Use::Spread } else { Use::Best };
        let core = Blockd { plane: DataPlane::new(config, now), links: Links::new(id, usage, now) };
        self.node(id).blockd = Some(Running::new(life, core));
        self.drain_blockd(id);
        self.connect_blockd(id);
    }

    /// `noded` and `blockd` find each other, if both run.
    pub fn connect_blockd(&mut self, id: NodeId) {
        let node = self.node(id);
        if !node.contacts.data && node.noded.is_some() && node.blockd.is_some() {
            node.contacts.data = true;
            self.tell_core(id, LOCAL, pollux_cluster::Input::DataConnected);
        }
    }

    /// The data plane's process is gone, with all it had said.
    pub fn blockd_gone(&mut self, id: NodeId) {
        let node = self.node(id);
        let contact = std::mem::take(&mut node.contacts.data);
        node.served.clear();
        node.attempts.clear();
        node.answering.clear();
        for guest in node.guests.values_mut() {
            guest.asked.values_mut().for_each(|asked| asked.sent = None);
        }
        for (group, stamp) in std::mem::take(&mut node.serving) {
            self.see(Seen::Serving { node: id, group, stamp, serving: false });
        }
        if contact {
            self.tell_core(id, LOCAL, pollux_cluster::Input::Data(None));
        }
    }

    pub fn step_blockd(&mut self, id: NodeId, input: Input) {
        let now = self.nodes[&id].clock.read(self.now);
        let Some(Running { core: Blockd { plane, links }, .. }) = self.node(id).blockd.as_mut() else { return };
        match input {
            Input::Blockd(input) => plane.handle(now, input),
            Input::Links(input) => links.handle(now, input),
            _ => {
                links.handle(now, links::Input::Tick);
                plane.handle(now, pollux_replica::Input::Tick);
            }
        }
        self.drain_blockd(id);
        if let Some(Running { core: Blockd { plane, links }, .. }) = &self.node(id).blockd {
            plane.check();
            links.check();
        }
        self.reopen_if_wanted(id);
    }

    /// Carries out what the links want, among it what the data plane is to hear.
    fn drain_links(&mut self, id: NodeId) {
        let now = self.nodes[&id].clock.read(self.now);
        while let Some(Running { core: Blockd { plane, links }, .. }) = self.node(id).blockd.as_mut()
            && let Some(output) = links.poll()
        {
            match output {
                links::Output::Plane(input) => plane.handle(now, input),
                links::Output::Send { path, number } => {
                    let Some((place, frame)) = links.frame(path, number) else { continue };
                    let carried = Carried { place, what: What::Frame(frame.clone()) };
                    if let Some(data) = frame.data.clone() {
                        self.look_for_plain_text(id, data.as_slice());
                    }
                    self.send(id, path, carried);
                }
                links::Output::Word { path, received, word } => {
                    self.send(id, path, Carried { place: Place { number: 0, received }, what: What::Word(word) });
                }
                links::Output::Close { path, reason } => {
                    self.trace.line(self.now, || format!("{id} closes {path:?}: {reason}"));
                    self.close(id, path);
                }
                links::Output::Changed { path, state } => {
                    self.trace.line(self.now, || format!("{id} {path:?} is {state:?}"));
                }
            }
        }
    }

    fn drain_blockd(&mut self, id: NodeId) {
        let now = self.nodes[&id].clock.read(self.now);
        loop {
            self.drain_links(id);
            let Some(Running { core: Blockd { plane, links }, .. }) = self.node(id).blockd.as_mut() else { return };
            let Some(output) = plane.poll() else { break };
            match output {
                Output::Disk(op) => self.submit(id, op),
                Output::Send { peer, session, frame } => {
                    links.handle(now, links::Input::Send { peer, session, frame });
                }
                Output::Disconnect { peer, session, reason } => {
                    links.handle(now, links::Input::Disconnect { peer, session });
                    self.trace.line(self.now, || format!("{id} disconnects {peer}: {reason}"));
                }
                Output::Report(report) => self.on_report(id, report),
                Output::Reply(request, reply) => self.on_answer(id, request, reply),
                Output::CloseDisk(_) => {}
                Output::Served { volume, served } => self.on_served(id, volume, served),
            }
        }
        let node = &self.nodes[&id];
        let deadline = node.blockd.as_ref().and_then(|running| {
            let Blockd { plane, links } = &running.core;
            plane.deadline().into_iter().chain(links.deadline()).min()
        });
        if let Some(deadline) = deadline {
            let at = node.clock.when(deadline);
            self.set_timer(id, Process::Blockd, at);
        }
    }

    fn submit(&mut self, id: NodeId, op: pollux_base::DiskOp) {
        let micros = match &op.kind {
            DiskOpKind::Read { .. } => 60 + self.luck.below(100),
            DiskOpKind::Write { sync, .. } => 30 + self.luck.below(if *sync { 600 } else { 150 }),
            DiskOpKind::Flush => 100 + self.luck.below(1500),
            DiskOpKind::Discard { .. } => 20 + self.luck.below(100),
        };
        let hiccup = if self.luck.one_in(200) { self.luck.below(30_000) } else { 0 };
        let Some(life) = self.nodes[&id].life(Process::Blockd) else { return };
        let op_id = op.id;
        if let DiskOpKind::Write { data, .. } = &op.kind {
            data.iter().for_each(|data| self.look_for_plain_text(id, data.as_slice()));
        }
        self.node(id).disks[op.id.disk.index()].submit(op);
        self.at(Duration::from_micros(micros + hiccup), Event::DiskDone { node: id, life, op: op_id });
    }

    pub fn on_disk_done(&mut self, id: NodeId, life: u64, op: DiskOpId) {
        let node = self.node(id);
        if node.life(Process::Blockd) != Some(life) {
            return;
        }
        let done = node.disks.get_mut(op.disk.index()).and_then(|disk| disk.complete(op));
        let Some(DiskDone { id: op, result }) = done else { return };
        if let Err(error) = &result {
            self.trace.line(self.now, || format!("{id} disk: {op:?} fails: {error}"));
        }
        let input = Input::Blockd(pollux_replica::Input::Disk(DiskDone { id: op, result }));
        self.give(id, Process::Blockd, life, input);
    }

    fn on_report(&mut self, id: NodeId, report: Report) {
        self.trace.line(self.now, || format!("{id} reports {report:?}"));
        if let Report::Group(group) = &report {
            let before = self.nodes[&id].serving.get(&group.group).copied();
            let after = if group.state == ReplicaState::Serving { group.stamp } else { None };
            if before != after {
                let (group, node) = (group.group, id);
                match after {
                    Some(stamp) => {
                        self.node(id).serving.insert(group, stamp);
                        self.node(id).answering.insert(group, stamp);
                        self.see(Seen::Serving { node, group, stamp, serving: true });
                    }
                    None => {
                        self.node(id).serving.remove(&group);
                        let stamp = before.expect("before differs from None");
                        self.see(Seen::Serving { node, group, stamp, serving: false });
                    }
                }
            }
        }
        if self.nodes[&id].contacts.data {
            self.tell_core(id, LOCAL, pollux_cluster::Input::Data(Some(report)));
        }
    }

    /// Clients may connect to the volume here, or are disconnected.
    fn on_served(&mut self, id: NodeId, volume: VolumeId, served: bool) {
        self.trace.line(self.now, || format!("{id} {} {volume}", if served { "offers" } else { "withdraws" }));
        if served {
            self.node(id).served.insert(volume);
            let vms: Vec<VmId> = self.nodes[&id].guests.keys().copied().collect();
            for vm in vms {
                self.send_asked(id, vm);
            }
            return;
        }
        self.node(id).served.remove(&volume);
        let vms: Vec<VmId> = self.nodes[&id].guests.keys().copied().collect();
        for vm in vms {
            self.withdraw(id, vm, |asked| asked.volume() == volume);
        }
    }

    /// The connection of a guest to these requests' volume is gone: nobody waits for their answers any more.
    fn withdraw(&mut self, id: NodeId, vm: VmId, which: impl Fn(&Ask) -> bool) {
        let Some(life) = self.nodes[&id].life(Process::Blockd) else { return };
        let node = self.node(id);
        let Some(guest) = node.guests.get_mut(&vm) else { return };
        let sent = guest.asked.values_mut().filter(|asked| which(&asked.ask)).filter_map(|asked| asked.sent.take());
        let sent: Vec<RequestId> = sent.collect();
        for attempt in sent {
            self.node(id).attempts.remove(&attempt);
            let input = Input::Blockd(pollux_replica::Input::Abandon(attempt));
            self.at(LOCAL, Event::Input { node: id, process: Process::Blockd, life, input });
        }
    }

    /// Sends what the guest asks and its data plane does not have yet, of volumes that are served.
    fn send_asked(&mut self, id: NodeId, vm: VmId) {
        let node = &self.nodes[&id];
        let Some(guest) = node.guests.get(&vm).filter(|_| node.blockd.is_some()) else { return };
        let waits =
            guest.asked.iter().filter(|(_, asked)| asked.sent.is_none() && node.served.contains(&asked.ask.volume()));
        let waiting: Vec<u64> = waits.map(|(number, _)| *number).collect();
        for number in waiting {
            let attempt = RequestId(self.number());
            let node = self.node(id);
            node.attempts.insert(attempt, (vm, number));
            let asked = node.guests.get_mut(&vm).and_then(|guest| guest.asked.get_mut(&number));
            asked.expect("just seen").sent = Some(attempt);
            self.at(LOCAL, Event::Request { node: id, attempt });
        }
    }

    /// A request reaches the data plane, unless its connection was lost before.
    pub fn on_request(&mut self, id: NodeId, attempt: RequestId) {
        let node = &self.nodes[&id];
        let Some((vm, number)) = node.attempts.get(&attempt).copied() else { return };
        let Some(asked) = node.guests.get(&vm).and_then(|guest| guest.asked.get(&number)) else { return };
        let request = Request { id: attempt, volume: asked.ask.volume(), op: asked.ask.op(number) };
        let Some(life) = node.life(Process::Blockd) else { return };
        let early = self.settings.sabotage == Some(Sabotage::AckEarly) && asked.ask.changes().is_some();
        self.give(id, Process::Blockd, life, Input::Blockd(pollux_replica::Input::Request(request)));
        if early {
            self.on_answer(id, attempt, Reply::Done);
        }
    }

    /// The data plane answers: this is the moment that counts for the client.
    fn on_answer(&mut self, id: NodeId, attempt: RequestId, reply: Reply) {
        let node = self.node(id);
        let Some((vm, number)) = node.attempts.remove(&attempt) else { return };
        let Some(guest) = node.guests.get(&vm) else { return };
        let (group, Some(asked)) = (guest.group, guest.asked.get(&number)) else { return };
        let ask = asked.ask.clone();
        self.trace.line(self.now, || format!("{id} answers {vm} #{number} {ask:?}: {}", name_of(&reply)));
        let stamp = self.nodes[&id].answering.get(&group).copied();
        if let Reply::Failed(error) = &reply {
            match error {
                // Its client connects to the node that does, and asks again.
                BlockError::NotServed => {
                    self.node(id)
                        .guests
                        .get_mut(&vm)
                        .and_then(|guest| guest.asked.get_mut(&number))
                        .expect("seen")
                        .sent = None;
                    return;
                }
                // The last good copy, on a disk that fails.
                BlockError::Unreadable if self.rotted || self.nodes.values().any(|node| node.disk_failed) => {}
                BlockError::Unreadable | BlockError::NoVolume | BlockError::OutOfRange | BlockError::ReadOnly => {
                    self.fail("errors_only_without_any_copy", format!("{vm} #{number} {ask:?} fails: {error}"));
                }
            }
            if ask.changes().is_some() {
                self.see(Seen::WriteFailed { write: number });
            }
            self.forget(id, vm, number);
            return;
        }
        let Some(stamp) = stamp else {
            self.fail("one_writer_per_generation", format!("{id} answers for {group} without ever having served it"));
            return;
        };
        let in_sync = self.holders(group, stamp);
        match (&ask, &reply) {
            (Ask::Write { fua, .. } | Ask::Patch { fua, .. }, Reply::Done) => {
                self.see(Seen::WriteAcked { write: number, node: id, group, stamp, in_sync, fua: *fua });
            }
            (Ask::Flush { .. }, Reply::Done) => self.see(Seen::FlushAcked { flush: number, node: id, group, stamp }),
            (Ask::Read { volume, range }, Reply::Data(data)) => {
                let values = values_of(*volume, *range, data.as_slice());
                if values.len() as u64 != range.count.0 {
                    self.fail("block_reads_linearizable", format!("{range:?} was answered with {} B", data.len()));
                    return;
                }
                self.see(Seen::ReadAnswered { read: number, node: id, group, stamp, in_sync, values });
            }
            _ => self.fail("block_reads_linearizable", format!("{ask:?} was answered with {}", name_of(&reply))),
        }
        self.forget(id, vm, number);
    }

    fn forget(&mut self, id: NodeId, vm: VmId, number: u64) {
        if let Some(guest) = self.node(id).guests.get_mut(&vm) {
            guest.asked.remove(&number);
            guest.answered += 1;
        }
    }

    /// The guest runs: it asks something now and then.
    pub fn on_guest(&mut self, id: NodeId, vm: VmId, incarnation: Incarnation) {
        let quiet = self.quiet;
        let World { nodes, luck, .. } = self;
        let Some(guest) = nodes.get_mut(&id).and_then(|node| node.guests.get_mut(&vm)) else { return };
        if guest.incarnation != incarnation {
            return;
        }
        let ask = if guest.stopped { None } else { guest.next_ask(luck, !quiet) };
        if let Some(ask) = ask {
            let number = self.number();
            self.see(match ask.clone() {
                Ask::Write { volume, range, zero, .. } => {
                    Seen::Write { write: number, volume, range, sectors: ALL, zero }
                }
                Ask::Patch { volume, block, sectors, .. } => {
                    let range = BlockRange::new(block, BlockCount(1));
                    Seen::Write { write: number, volume, range, sectors, zero: false }
                }
                Ask::Read { volume, range } => Seen::Read { read: number, volume, range },
                Ask::Flush { volume } => Seen::Flush { flush: number, volume },
            });
            let guest = self.node(id).guests.get_mut(&vm).expect("just seen");
            guest.asked.insert(number, crate::guest::Asked { ask, sent: None });
            self.send_asked(id, vm);
        }
        let think = self.settings.think;
        // Bursts: at times the next request comes at once.
        let after = if self.luck.one_in(3) { LOCAL } else { self.between(Duration::ZERO, think * 2) };
        self.at(after, Event::Guest { node: id, vm, incarnation });
    }

    /// QEMU begins to run the guest.
    pub fn begin_guest(&mut self, id: NodeId, guest: Guest) {
        let (vm, incarnation) = (guest.vm, guest.incarnation);
        // A run before this one may stand still on a stopped node. Nothing that it asked counts any more.
        self.see(Seen::ClientGone { volumes: guest.volumes.iter().map(|(volume, _)| *volume).collect() });
        self.node(id).guests.insert(vm, guest);
        self.see(Seen::RunStarted { vm, incarnation, node: id });
        self.at(LOCAL, Event::Guest { node: id, vm, incarnation });
    }

    /// QEMU is gone, and with it everything that its guest asked.
    pub fn end_guest(&mut self, id: NodeId, vm: VmId, by_guest: bool, why: &str) {
        self.withdraw(id, vm, |_| true);
        let Some(guest) = self.node(id).guests.remove(&vm) else { return };
        self.trace.line(self.now, || format!("{id} {vm} ends: {why}"));
        let incarnation = guest.incarnation;
        self.see(Seen::ClientGone { volumes: guest.volumes.iter().map(|(volume, _)| *volume).collect() });
        self.see(Seen::RunEnded { vm, incarnation, node: id });
        let event = pollux_cluster::VmEvent::Ended { vm, incarnation, by_guest, detail: why.into() };
        let after = self.between(Duration::from_micros(100), Duration::from_millis(20));
        self.tell_core(id, after, pollux_cluster::Input::Vm(event));
    }

    pub fn kill_guests(&mut self, id: NodeId, why: &str) {
        let vms: Vec<VmId> = self.nodes[&id].guests.keys().copied().collect();
        for vm in vms {
            self.end_guest(id, vm, false, why);
        }
    }

    /// All processors of the node's guests stand still, or go on.
    pub fn stop_guests(&mut self, id: NodeId, stopped: bool) {
        let vms: Vec<VmId> = self.nodes[&id].guests.keys().copied().collect();
        for vm in vms {
            let guest = self.node(id).guests.get_mut(&vm).expect("just listed");
            guest.stopped = stopped;
            let incarnation = guest.incarnation;
            self.see(Seen::RunStopped { vm, incarnation, node: id, stopped });
        }
    }
}

fn values_of(volume: VolumeId, range: BlockRange, bytes: &[u8]) -> Vec<Value> {
    let blocks = bytes.chunks_exact(BLOCK_BYTES as usize).zip(range.start.0..);
    blocks.map(|(bytes, block)| value_of(volume, block, bytes)).collect()
}

fn name_of(reply: &Reply) -> String {
    match reply {
        Reply::Done => "done".into(),
        Reply::Data(data) => format!("{} B", data.len()),
        Reply::Status(runs) => format!("{} runs", runs.len()),
        Reply::Failed(error) => format!("error: {error}"),
    }
}
