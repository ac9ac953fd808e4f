//! Two or three data planes in virtual time: disks that tear and lose, links that delay and break, and a control plane
//! that decides by the same reports as the real one, at once or never. One seed decides everything.
#![allow(dead_code)] // each test file uses another part

mod requests;

use pollux_base::order::{FreezeReason, GroupReport, ReplicaState};
use pollux_base::record::{Frozen, GroupRecord, GroupSpec, LagBound, Lineage, Mode, Rollback, Snapshot};
use pollux_base::unit::{BLOCK_BYTES, BlockRange};
use pollux_base::{
    BlockChecksum, BlockCount, BlockIndex, ByteCount, ClusterId, Data, DiskId, DiskOpId, Epoch, Generation, GroupId,
    Instant, KeyId, NodeId, Op, Order, PoolId, Reply, Report, Request, RequestId, Session, SnapshotId, Stamp, VolumeId,
    VolumeSecret,
};
use pollux_replica::wire::{Carried, Decoder, Frame, Message, Place, What, encode};
use pollux_replica::{Config, DataPlane, Input, Output};
use pollux_store::faulty_disk::{FaultyDisk, Luck};
use pollux_store::{PoolIdentity, Store, StoreOp};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

pub const CLUSTER: ClusterId = ClusterId(7);
pub const GROUP: GroupId = GroupId(1);
pub const VOLUME: VolumeId = VolumeId(11);
pub const A: NodeId = NodeId(1);
pub const B: NodeId = NodeId(2);
pub const C: NodeId = NodeId(3);
/// Blocks of the volume: five extents, the last in part.
pub const BLOCKS: u64 = 4 * 1024 + 100;
const POOL: u64 = 128 << 20;

pub fn ms(value: u64) -> Duration {
    Duration::from_millis(value)
}

pub fn range(start: u64, count: u64) -> BlockRange {
    BlockRange::new(BlockIndex(start), BlockCount(count))
}

/// Blocks that all say `value`.
pub fn blocks(value: u64, count: u64) -> Data {
    let mut bytes = Vec::with_capacity((count * BLOCK_BYTES) as usize);
    for _ in 0..count * BLOCK_BYTES / 8 {
        bytes.extend_from_slice(&value.to_le_bytes());
    }
    Data::copy_of(&bytes)
}

/// What each sector of a block says; 0 if it was never written. A block is torn only between sectors.
pub fn values_of(block: &[u8]) -> [u64; 8] {
    let mut sectors = block.chunks(512).map(|sector| {
        assert!(sector.chunks(8).all(|part| part == &sector[..8]), "a torn sector was given out");
        u64::from_le_bytes(sector[..8].try_into().expect("eight bytes"))
    });
    std::array::from_fn(|_| sectors.next().expect("a block has eight sectors"))
}

/// What a block says that is not torn.
pub fn value_of(block: &[u8]) -> u64 {
    let values = values_of(block);
    assert!(values.iter().all(|value| *value == values[0]), "a torn block: {values:?}");
    values[0]
}

/// What the wire does to a frame between two nodes; `false`: it is lost.
pub type Mischief = Box<dyn FnMut(NodeId, NodeId, &mut Frame) -> bool>;

pub struct Machine {
    pub plane: Option<DataPlane>,
    pub disk: FaultyDisk,
    /// Counts boots.
    boot: u128,
    /// Counts starts, so that what was meant for an earlier run is not delivered to a later one.
    run: u64,
    pub served: BTreeSet<VolumeId>,
    pub report: Option<GroupReport>,
    /// The disk answers nothing.
    pub is_disk_stuck: bool,
    /// It gets no orders.
    pub is_deaf: bool,
    /// I/O that has come and is given together with what comes until the turn begins.
    waiting: Vec<Input>,
}

struct Cable {
    session: Option<u64>,
    /// Frames vanish without a word.
    is_silent: bool,
    is_cut: bool,
    /// When the last frame in each direction arrives: later ones do not overtake it.
    last: BTreeMap<NodeId, Instant>,
}

enum Event {
    Disk { node: NodeId, run: u64, op: DiskOpId },
    Frame { to: NodeId, from: NodeId, session: u64, frame: Frame },
    Connect { a: NodeId, b: NodeId },
    Order { node: NodeId, run: u64, order: Order },
    Turn { node: NodeId, run: u64 },
}

pub struct World {
    pub now: Instant,
    pub machines: BTreeMap<NodeId, Machine>,
    cables: BTreeMap<(NodeId, NodeId), Cable>,
    events: BTreeMap<(Instant, u64), Event>,
    next: u64,
    luck: Luck,
    pub spec: GroupSpec,
    /// Which key each node is given when it starts.
    pub secrets: BTreeMap<NodeId, VolumeSecret>,
    /// The control plane acts upon reports.
    pub decides: bool,
    pub replies: BTreeMap<RequestId, Reply>,
    /// Requests in the order of their answers.
    pub answered: Vec<RequestId>,
    pub reports: Vec<(Instant, NodeId, Report)>,
    pub disconnects: Vec<(NodeId, String)>,
    /// Bytes of blocks sent between nodes, in all.
    pub sent_bytes: u64,
    /// Bytes of frames in all, but for leases.
    pub wire_bytes: u64,
    /// Frames take so much longer.
    pub delay: Duration,
    /// Bytes per second that a link carries each way; 0: any.
    pub rate: u64,
    /// The wire's own mischief, for a checker that must notice: what it says `false` to is lost, and it may change a frame.
    pub lets_through: Mischief,
    /// Messages as they were sent, for transcripts.
    pub messages: Vec<String>,
    next_request: u64,
    /// I/O is gathered for up to so long and given at once, as a busy shell does.
    pub turn_time: Duration,
}

pub fn stamp(epoch: u64, generation: u64) -> Stamp {
    Stamp { epoch: Epoch(epoch), generation: Generation(generation) }
}

fn pair(a: NodeId, b: NodeId) -> (NodeId, NodeId) {
    (a.min(b), a.max(b))
}

impl World {
    /// Nodes with empty pools, connected, and a group of which the first is primary and all are in sync.
    pub fn new(seed: u64, nodes: &[NodeId]) -> World {
        World::with_key(seed, nodes, None)
    }

    /// The same, and the volume is encrypted at rest.
    pub fn encrypted(seed: u64, nodes: &[NodeId]) -> World {
        let secret = VolumeSecret::new(std::array::from_fn(|at| (at as u64 * 7 + seed) as u8));
        World::with_key(seed, nodes, Some(secret))
    }

    fn with_key(seed: u64, nodes: &[NodeId], secret: Option<VolumeSecret>) -> World {
        let mut lineage = Lineage::default();
        lineage.push(stamp(1, 1));
        let all: BTreeSet<NodeId> = nodes.iter().copied().collect();
        let spec = GroupSpec {
            group: GROUP,
            replicas: all.clone(),
            modes: BTreeMap::new(),
            lag: LagBound::default(),
            volumes: BTreeMap::from([(VOLUME, ByteCount(BLOCKS * BLOCK_BYTES))]),
            keys: secret.iter().map(|secret| (VOLUME, KeyId::of(secret))).collect(),
            record: GroupRecord { stamp: stamp(1, 1), primary: nodes[0], in_sync: all },
            snapshots: Default::default(),
            lineage,
        };
        let mut world = World {
            now: Instant(1_000_000_000),
            machines: BTreeMap::new(),
            cables: BTreeMap::new(),
            events: BTreeMap::new(),
            next: 0,
            luck: Luck::new(seed),
            spec,
            secrets: nodes.iter().filter_map(|node| Some((*node, secret.clone()?))).collect(),
            decides: true,
            replies: BTreeMap::new(),
            answered: Vec::new(),
            reports: Vec::new(),
            disconnects: Vec::new(),
            sent_bytes: 0,
            wire_bytes: 0,
            delay: Duration::ZERO,
            rate: 0,
            lets_through: Box::new(|_, _, _| true),
            messages: Vec::new(),
            next_request: 1,
            turn_time: Duration::ZERO,
        };
        for node in nodes {
            let machine = Machine {
                plane: None,
                disk: FaultyDisk::new(POOL, seed),
                boot: 0,
                run: 0,
                served: BTreeSet::new(),
                report: None,
                is_disk_stuck: false,
                is_deaf: false,
                waiting: Vec::new(),
            };
            world.machines.insert(*node, machine);
            world.format(*node);
            for other in nodes.iter().filter(|other| *other < node) {
                let cable = Cable { session: None, is_silent: false, is_cut: false, last: BTreeMap::new() };
                world.cables.insert(pair(*node, *other), cable);
            }
        }
        for node in nodes {
            world.start(*node);
        }
        world
    }

    /// Two nodes that serve.
    pub fn pair(seed: u64) -> World {
        let mut world = World::new(seed, &[A, B]);
        world.until_serving(A);
        world
    }

    /// Puts an empty pool into the node's (stopped) machine.
    pub fn format(&mut self, node: NodeId) {
        let machine = self.machines.get_mut(&node).expect("the node exists");
        assert!(machine.plane.is_none(), "stop it first");
        machine.disk = FaultyDisk::new(POOL, self.luck.draw());
        let identity =
            PoolIdentity { cluster: CLUSTER, node, pool: PoolId(u128::from(self.luck.draw())), disk: DiskId(1) };
        for op in Store::format(identity, ByteCount(POOL)).expect("the size is right") {
            let id = op.id;
            machine.disk.submit(op);
            machine.disk.complete(id).expect("it was submitted").result.expect("the disk is well");
        }
    }

    pub fn machine(&mut self, node: NodeId) -> &mut Machine {
        self.machines.get_mut(&node).expect("the node exists")
    }

    /// Starts the node's data plane; it is ordered the newest record and connected to those that run.
    pub fn start(&mut self, node: NodeId) {
        let now = self.now;
        let machine = self.machine(node);
        assert!(machine.plane.is_none(), "it runs already");
        machine.run += 1;
        let (disks, boot) = (vec![ByteCount(machine.disk.size())], machine.boot);
        let config = Config { cluster: CLUSTER, node, disks, paths: Vec::new(), boot, seen: BTreeMap::new() };
        machine.plane = Some(DataPlane::new(config, now));
        self.collect(node);
        if let (Some(key), Some(secret)) = (self.spec.keys.get(&VOLUME), self.secrets.get(&node)) {
            self.order(node, Order::VolumeKey { key: *key, secret: secret.clone() });
        }
        self.order(node, Order::Group(self.spec.clone()));
        let others: Vec<NodeId> = self.machines.keys().copied().filter(|other| *other != node).collect();
        for other in others {
            self.later(ms(20), Event::Connect { a: node, b: other });
        }
    }

    /// The data plane dies; its disk keeps what completed.
    pub fn kill(&mut self, node: NodeId) {
        let luck = self.luck.draw();
        self.stop(node);
        self.machine(node).disk.kill(luck);
    }

    /// The node loses power.
    pub fn power_cut(&mut self, node: NodeId) {
        let luck = self.luck.draw();
        self.stop(node);
        let machine = self.machine(node);
        machine.boot += 1;
        machine.disk.power_cut(luck);
        // Nobody says goodbye.
    }

    fn stop(&mut self, node: NodeId) {
        let machine = self.machine(node);
        machine.plane = None;
        machine.waiting.clear();
        machine.served.clear();
        machine.report = None;
        let ended: Vec<(NodeId, NodeId)> =
            self.cables.keys().copied().filter(|(a, b)| *a == node || *b == node).collect();
        for (a, b) in ended {
            self.disconnect(a, b);
        }
    }

    /// Cuts the cable; both ends notice.
    pub fn cut(&mut self, a: NodeId, b: NodeId) {
        self.cables.get_mut(&pair(a, b)).expect("there is a cable").is_cut = true;
        self.disconnect(a, b);
    }

    /// What is sent between them vanishes; nobody is told.
    pub fn silence(&mut self, a: NodeId, b: NodeId) {
        let cable = self.cables.get_mut(&pair(a, b)).expect("there is a cable");
        cable.is_silent = true;
        cable.is_cut = true;
    }

    /// The cable is good again.
    pub fn heal(&mut self, a: NodeId, b: NodeId) {
        let cable = self.cables.get_mut(&pair(a, b)).expect("there is a cable");
        if !cable.is_cut {
            return;
        }
        cable.is_cut = false;
        cable.is_silent = false;
        self.disconnect(a, b);
        self.later(ms(5), Event::Connect { a, b });
    }

    /// Ends the connection, both ends notice, and comes back unless the cable is cut.
    pub fn flap(&mut self, a: NodeId, b: NodeId) {
        self.disconnect(a, b);
        self.later(ms(5), Event::Connect { a, b });
    }

    fn disconnect(&mut self, a: NodeId, b: NodeId) {
        let cable = self.cables.get_mut(&pair(a, b)).expect("there is a cable");
        let Some(session) = cable.session.take() else { return };
        for (node, peer) in [(a, b), (b, a)] {
            self.input(node, Input::LinkDown { peer, session: Session(session) });
        }
    }

    fn connect(&mut self, a: NodeId, b: NodeId) {
        let both_run = self.machines[&a].plane.is_some() && self.machines[&b].plane.is_some();
        self.next += 1;
        let session = self.next;
        let cable = self.cables.get_mut(&pair(a, b)).expect("there is a cable");
        if !both_run || cable.is_cut || cable.session.is_some() {
            return;
        }
        cable.session = Some(session);
        for (node, peer) in [(a, b), (b, a)] {
            self.input(node, Input::LinkUp { peer, session: Session(session) });
        }
    }

    fn later(&mut self, after: Duration, event: Event) {
        self.next += 1;
        self.events.insert((self.now + after, self.next), event);
    }

    /// Gives an order as the control plane would, a little later.
    pub fn order(&mut self, node: NodeId, order: Order) {
        let run = self.machines[&node].run;
        let after = Duration::from_micros(500 + self.luck.below(2000));
        self.later(after, Event::Order { node, run, order });
    }

    /// Gives one input, behind those that wait: now, or (I/O, when turns take time) soon.
    pub fn input(&mut self, node: NodeId, input: Input) {
        let is_io = matches!(input, Input::Disk(_) | Input::Frame { .. } | Input::Request(_));
        let turn_time = self.turn_time;
        let machine = self.machine(node);
        if machine.plane.is_none() {
            return;
        }
        machine.waiting.push(input);
        if !is_io || turn_time.is_zero() {
            self.turn(node);
        } else if machine.waiting.len() == 1 {
            let run = machine.run;
            let after = Duration::from_nanos(self.luck.below(turn_time.as_nanos() as u64));
            self.later(after, Event::Turn { node, run });
        }
    }

    fn turn(&mut self, node: NodeId) {
        let now = self.now;
        let machine = self.machine(node);
        let Some(plane) = &mut machine.plane else { return };
        plane.handle_all(now, machine.waiting.drain(..));
        plane.check();
        self.collect(node);
    }

    fn collect(&mut self, node: NodeId) {
        while let Some(output) = self.machine(node).plane.as_mut().and_then(DataPlane::poll) {
            match output {
                Output::Disk(op) => {
                    let (id, run) = (op.id, self.machines[&node].run);
                    self.machine(node).disk.submit(op);
                    let after = Duration::from_micros(20 + self.luck.below(300));
                    self.later(after, Event::Disk { node, run, op: id });
                }
                Output::Send { peer, session, frame } => self.send(node, peer, session.0, frame),
                Output::Disconnect { peer, session, reason } => {
                    self.disconnects.push((node, reason));
                    let cable = self.cables.get_mut(&pair(node, peer)).expect("there is a cable");
                    if cable.session == Some(session.0) {
                        self.disconnect(node, peer);
                        self.later(ms(50), Event::Connect { a: node, b: peer });
                    }
                }
                Output::Report(report) => self.on_report(node, report),
                Output::Reply(id, reply) => {
                    self.answered.push(id);
                    let before = self.replies.insert(id, reply);
                    assert!(before.is_none(), "{id:?} was answered twice");
                }
                Output::CloseDisk(_) => unreachable!("nobody changes its disks"),
                Output::Served { volume, served } => {
                    let machine = self.machine(node);
                    if served {
                        machine.served.insert(volume)
                    } else {
                        machine.served.remove(&volume)
                    };
                }
            }
        }
    }

    fn send(&mut self, from: NodeId, to: NodeId, session: u64, mut frame: Frame) {
        let passes = (self.lets_through)(from, to, &mut frame);
        self.messages.push(format!("{from}>{to} {}", summary(&frame)));
        let after = self.delay + Duration::from_micros(30 + self.luck.below(400));
        let arrives = self.now + after;
        let cable = self.cables.get_mut(&pair(from, to)).expect("there is a cable");
        if cable.session != Some(session) || cable.is_silent || !passes {
            return;
        }
        self.sent_bytes += frame.data.as_ref().map_or(0, |data| data.len() as u64);
        let last = cable.last.entry(to).or_default();
        *last = arrives.max(*last);
        if let Some(takes) = (frame_bytes(&frame) * 1_000_000_000).checked_div(self.rate) {
            *last = *last + Duration::from_nanos(takes);
        }
        let at = *last;
        // Through the codec, in two pieces.
        let place = Place { number: self.next, received: session };
        let bytes: Vec<u8> = encode(place, &frame).iter().flat_map(|segment| segment.as_slice().to_vec()).collect();
        if !matches!(frame.message, Message::LeaseAsk { .. } | Message::LeaseGrant { .. } | Message::Pool { .. }) {
            self.wire_bytes += bytes.len() as u64;
        }
        let mut decoder = Decoder::new();
        let (first, second) = bytes.split_at(bytes.len() / 3);
        decoder.push(first);
        decoder.push(second);
        let decoded = decoder.next_frame().expect("what was encoded is decoded").expect("it is whole");
        assert_eq!(decoded, Carried { place, what: What::Frame(frame.clone()) });
        self.next += 1;
        self.events.insert((at, self.next), Event::Frame { to, from, session, frame });
    }

    fn on_report(&mut self, node: NodeId, report: Report) {
        self.reports.push((self.now, node, report.clone()));
        let spec = &self.spec;
        match report {
            Report::Group(report) => self.machine(node).report = Some(*report),
            Report::ReplicaLost { generation, node: lost, .. }
                if self.decides && generation == spec.record.stamp.generation && node == spec.record.primary =>
            {
                let mut in_sync = spec.record.in_sync.clone();
                in_sync.remove(&lost);
                if !in_sync.is_empty() {
                    self.decide(spec.record.primary, in_sync);
                }
            }
            Report::ReplicaCurrent { generation, node: current, .. }
                if self.decides && generation == spec.record.stamp.generation && node == spec.record.primary =>
            {
                let mut in_sync = spec.record.in_sync.clone();
                in_sync.insert(current);
                self.decide(spec.record.primary, in_sync);
            }
            Report::Snapshot { snapshot, result, .. } if self.decides && node == spec.record.primary => {
                self.end_snapshot(snapshot, result.is_ok());
            }
            _ => {}
        }
    }

    /// Commits the next record and orders it everywhere.
    pub fn decide(&mut self, primary: NodeId, in_sync: BTreeSet<NodeId>) {
        let last = self.spec.record.stamp;
        self.decide_under(Epoch(last.epoch.0), primary, in_sync);
    }

    pub fn decide_under(&mut self, epoch: Epoch, primary: NodeId, in_sync: BTreeSet<NodeId>) {
        let generation = self.spec.record.stamp.generation.next();
        let stamp = Stamp { epoch, generation };
        self.spec.record = GroupRecord { stamp, primary, in_sync };
        self.spec.lineage.push(stamp);
        self.order_all();
    }

    /// Commits that the group is to have a snapshot, and gives the volume under which it can be read.
    pub fn take_snapshot(&mut self) -> VolumeId {
        let number = self.spec.snapshots.minted.max(100) + 2;
        let snapshots = &mut self.spec.snapshots;
        (snapshots.revision, snapshots.minted) = (snapshots.revision + 1, number);
        let frozen = Frozen { of: VOLUME, size: ByteCount(BLOCKS * BLOCK_BYTES) };
        let volume = VolumeId(number);
        let snapshot = Snapshot { taken: None, volumes: BTreeMap::from([(volume, frozen)]) };
        snapshots.each.insert(SnapshotId(number - 1), snapshot);
        self.order_all();
        volume
    }

    fn end_snapshot(&mut self, id: SnapshotId, is_taken: bool) {
        let generation = self.spec.record.stamp.generation;
        let snapshots = &mut self.spec.snapshots;
        let Some(found) = snapshots.each.get_mut(&id).filter(|found| found.taken.is_none()) else { return };
        found.taken = Some(generation);
        if !is_taken {
            snapshots.each.remove(&id);
        }
        snapshots.revision += 1;
        self.order_all();
    }

    pub fn delete_snapshot(&mut self, volume: VolumeId) {
        self.spec.snapshots.each.retain(|_, snapshot| !snapshot.volumes.contains_key(&volume));
        self.spec.snapshots.revision += 1;
        self.order_all();
    }

    /// Commits that the volume holds again what the snapshot does.
    pub fn roll_back(&mut self, snapshot: VolumeId) {
        let Stamp { epoch, generation } = self.spec.record.stamp;
        let at = Stamp { epoch, generation: generation.next() };
        self.spec.record.stamp = at;
        self.spec.lineage.push(at);
        self.spec.snapshots.revision += 1;
        self.spec.snapshots.rollback = Some(Rollback { at, to: BTreeMap::from([(VOLUME, snapshot)]) });
        self.order_all();
    }

    /// Until the log knows that every snapshot was taken.
    pub fn until_taken(&mut self) {
        self.until("the snapshot is taken", |world| world.spec.snapshots.untaken().is_none());
    }

    /// Until a primary has said that a replica counts; whether a record follows is another matter.
    pub fn until_said_current(&mut self) {
        let is_current = |(_, _, report): &(_, _, Report)| matches!(report, Report::ReplicaCurrent { .. });
        self.until("a replica is said to be current", |world| world.reports.iter().any(is_current));
    }

    /// Gives every node the record as it is now.
    pub fn order_all(&mut self) {
        let spec = self.spec.clone();
        let nodes: Vec<NodeId> = self.machines.keys().copied().collect();
        for node in nodes {
            if !self.machines[&node].is_deaf {
                self.order(node, Order::Group(spec.clone()));
            }
        }
    }

    /// The next record with another mode of a replica; a trailing one is not in sync.
    pub fn set_mode(&mut self, node: NodeId, mode: Mode) {
        match mode {
            Mode::Sync => self.spec.modes.remove(&node),
            mode => self.spec.modes.insert(node, mode),
        };
        let mut in_sync = self.spec.record.in_sync.clone();
        in_sync.retain(|member| self.spec.mode(*member) != Mode::Async);
        self.decide(self.spec.record.primary, in_sync);
    }

    /// The disk's answer to something that was asked while it was stuck.
    pub fn give_disk(&mut self, node: NodeId, done: pollux_base::DiskDone) {
        self.input(node, Input::Disk(done));
    }

    /// Extents of the volume that are hot at the node.
    pub fn hot(&self, node: NodeId) -> Vec<pollux_base::ExtentIndex> {
        self.machines[&node].plane.as_ref().map(|plane| plane.store().hot(VOLUME)).unwrap_or_default()
    }

    /// The next record with this primary and in-sync set.
    pub fn take_over(&mut self, primary: NodeId, in_sync: &[NodeId]) {
        self.decide(primary, in_sync.iter().copied().collect());
    }

    /// So many steps on, a node dies or loses power, and the other of the pair takes over. Gives that one.
    pub fn lose_after(&mut self, steps: u64, victim: NodeId, by_power: bool) -> NodeId {
        for _ in 0..steps {
            let end = self.now + ms(20);
            self.step(end);
        }
        if by_power {
            self.power_cut(victim)
        } else {
            self.kill(victim)
        }
        let other = if victim == A { B } else { A };
        self.take_over(other, &[other]);
        self.until_serving(other);
        other
    }

    /// Advances to the next event and handles it; `false` if there is none before `end`.
    pub fn step(&mut self, end: Instant) -> bool {
        let event = self.events.keys().next().map(|(at, _)| *at);
        let tick =
            self.machines.iter().filter_map(|(node, machine)| Some((machine.plane.as_ref()?.deadline()?, *node))).min();
        let next = event.into_iter().chain(tick.map(|(at, _)| at)).min();
        let Some(at) = next.filter(|at| *at <= end) else { return false };
        self.now = self.now.max(at);
        if let Some((due, node)) = tick.filter(|(due, _)| event.is_none_or(|event| *due <= event)) {
            self.input(node, Input::Tick);
            let again = self.machines[&node].plane.as_ref().and_then(DataPlane::deadline);
            assert!(again.is_none_or(|again| again > due || again > self.now), "{node} asks to be woken for ever");
            return true;
        }
        let (_, event) = self.events.pop_first().expect("looked at above");
        match event {
            Event::Disk { node, run, op } => {
                let machine = self.machine(node);
                if machine.run == run
                    && machine.plane.is_some()
                    && !machine.is_disk_stuck
                    && let Some(done) = machine.disk.complete(op)
                {
                    self.input(node, Input::Disk(done));
                }
            }
            Event::Frame { to, from, session, frame } => {
                let cable = &self.cables[&pair(to, from)];
                if cable.session == Some(session) && !cable.is_silent {
                    self.input(to, Input::Frame { peer: from, session: Session(session), frame });
                }
            }
            Event::Connect { a, b } => self.connect(a, b),
            Event::Order { node, run, order } => {
                if self.machines[&node].run == run {
                    self.input(node, Input::Order(Box::new(order)));
                }
            }
            Event::Turn { node, run } => {
                if self.machines[&node].run == run {
                    self.turn(node);
                }
            }
        }
        true
    }

    pub fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        while self.step(end) {}
        self.now = end;
    }

    /// Runs until `condition`, at most ten virtual seconds.
    pub fn until(&mut self, what: &str, mut condition: impl FnMut(&World) -> bool) {
        let end = self.now + ms(10_000);
        while !condition(self) {
            assert!(self.step(end), "not within ten seconds: {what}\n{}", self.describe());
        }
    }

    pub fn describe(&self) -> String {
        let reports = self.machines.iter().map(|(node, machine)| format!("{node}: {:?}", machine.report));
        let tail = self.messages.iter().rev().take(12).rev().cloned();
        reports.chain([format!("{:?}", self.spec.record)]).chain(tail).collect::<Vec<_>>().join("\n")
    }

    pub fn state(&self, node: NodeId) -> Option<&ReplicaState> {
        self.machines[&node].report.as_ref().map(|report| &report.state)
    }

    pub fn is_serving(&self, node: NodeId) -> bool {
        self.state(node) == Some(&ReplicaState::Serving)
    }

    pub fn frozen(&self, node: NodeId) -> Option<&FreezeReason> {
        match self.state(node) {
            Some(ReplicaState::Frozen { reason }) => Some(reason),
            _ => None,
        }
    }

    pub fn until_serving(&mut self, node: NodeId) {
        self.until("serving", |world| world.is_serving(node));
    }

    /// Until it serves, and nobody else is in sync.
    pub fn until_serving_alone(&mut self, node: NodeId) {
        self.until("serving alone", |world| world.spec.record.in_sync == [node].into() && world.is_serving(node));
    }

    /// Until every replica is named in sync, whether or not anybody serves.
    pub fn until_whole(&mut self) {
        self.until("whole", |world| world.spec.record.in_sync == world.spec.replicas);
    }

    /// Until every replica is named in sync and the primary serves.
    pub fn until_healthy(&mut self) {
        self.until("healthy", |world| {
            let stamp = Some(world.spec.record.stamp);
            world.spec.record.in_sync == world.spec.replicas
                && world.is_serving(world.spec.record.primary)
                && world
                    .machines
                    .values()
                    .all(|machine| machine.report.as_ref().is_some_and(|report| report.stamp == stamp))
        });
    }
}

fn frame_bytes(frame: &Frame) -> u64 {
    100 + frame.checksums.len() as u64 * 8 + frame.data.as_ref().map_or(0, |data| data.len() as u64)
}

/// A message in a few words.
pub fn summary(frame: &Frame) -> String {
    let gen_of = |stamp: &Stamp| format!("e{}g{}", stamp.epoch.0, stamp.generation.0);
    match &frame.message {
        Message::LeaseAsk { .. } => "lease?".to_string(),
        Message::LeaseGrant { refused, .. } => format!("lease! refused {refused:?}"),
        Message::Pool { .. } => "lease: how far the pool is".to_string(),
        Message::Announce { spec } => {
            let record = &spec.record;
            format!("announce {} primary {} in sync {:?}", gen_of(&record.stamp), record.primary, record.in_sync)
        }
        Message::Newer { stamp, .. } => format!("newer {}", gen_of(stamp)),
        Message::Join { stamp, standing, extents, .. } => {
            let extents: u32 = extents.iter().flat_map(|(_, runs)| runs).map(|run| run.count).sum();
            format!("join {} {standing:?} extents {extents}", gen_of(stamp))
        }
        Message::Write { stamp, range, .. } => format!("write {} {range:?}", gen_of(stamp)),
        Message::Zero { stamp, range, .. } => format!("zero {} {range:?}", gen_of(stamp)),
        Message::Flush { stamp, .. } => format!("flush {}", gen_of(stamp)),
        Message::ReadAsk { range, .. } => format!("read? {range:?}"),
        Message::ReadData { .. } => "read!".to_string(),
        Message::Compare { range, .. } => format!("compare {range:?}"),
        Message::Differs { runs, .. } => format!("differs {runs:?}"),
        Message::Cool { extents, .. } => format!("cool {extents:?}"),
        Message::Heat { extents, .. } => format!("heat {extents:?}"),
        Message::Current { stamp, .. } => format!("current {}", gen_of(stamp)),
        Message::Snapshot { of, .. } => format!("snapshot {of:?}"),
        Message::Done { stamp, .. } => format!("done {}", gen_of(stamp)),
        Message::Held { .. } => "held".to_string(),
        Message::Received { .. } => "received".to_string(),
        Message::TrailReset { from, .. } => format!("reset, from {}", from.position),
        Message::Trail { point, range, .. } => format!("trail {} {range:?}", point.position),
        Message::TrailMark { .. } => "cut".to_string(),
        Message::Trailed { position, .. } => format!("trailed {position}"),
        Message::Refused { why, .. } => format!("refused {why:?}"),
        Message::StoredAsk { .. } => "stored?".to_string(),
        Message::Stored { .. } => "stored!".to_string(),
        Message::Verify { range, .. } => format!("verify {range:?}"),
        Message::Verified { bad, .. } => format!("verified {bad:?}"),
    }
}

impl World {
    /// The session between two connected nodes.
    pub fn session(&self, a: NodeId, b: NodeId) -> Session {
        Session(self.cables[&pair(a, b)].session.expect("they are connected"))
    }
}
