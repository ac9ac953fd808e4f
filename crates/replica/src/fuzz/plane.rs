//! A data plane whose peers know the wire format and nothing else: they ask out of turn, answer what was never asked, and name
//! places that do not exist. It goes on with its invariants, or ends the connection.

use super::fixtures;
use crate::wire::{Carried, Decoder, Frame, Message, Refusal, Sequence, Standing, What};
use crate::{Config, DataPlane, Input, Output};
use pollux_base::fuzz::Tape;
use pollux_base::record::{GroupRecord, GroupSpec, LagBound, Lineage, Mode, Snapshots};
use pollux_base::unit::{BLOCK_BYTES, BlockRange, EXTENT_BLOCKS};
use pollux_base::{
    BlockChecksum, BlockCount, BlockIndex, ByteCount, ClusterId, Data, DiskId, Epoch, Generation, GroupId, Instant,
    NodeId, Op, Order, PoolId, Request, RequestId, Session, Stamp, VolumeId,
};
use pollux_store::faulty_disk::FaultyDisk;
use pollux_store::{PoolIdentity, Store};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::OnceLock;
use std::time::Duration;

const CLUSTER: ClusterId = ClusterId(7);
const GROUP: GroupId = GroupId(1);
const VOLUME: VolumeId = VolumeId(11);
const OWN: NodeId = NodeId(2);
const PEERS: [NodeId; 2] = [NodeId(1), NodeId(3)];
/// Two extents, the second in part.
const BLOCKS: u64 = 1024 + 100;
const POOL_BYTES: u64 = 64 << 20;
const STEPS_MAX: usize = 60;
/// Questions of the plane that may still be answered.
const ASKED_MAX: usize = 32;

struct Rig {
    plane: DataPlane,
    disk: FaultyDisk,
    now: Instant,
    spec: GroupSpec,
    sessions: BTreeMap<NodeId, Session>,
    last_session: u64,
    asked: VecDeque<(NodeId, Message)>,
    next_request: u64,
    replied: BTreeSet<RequestId>,
}

fn formatted() -> &'static FaultyDisk {
    static DISK: OnceLock<FaultyDisk> = OnceLock::new();
    DISK.get_or_init(|| {
        let mut disk = FaultyDisk::new(POOL_BYTES, 1);
        let identity = PoolIdentity { cluster: CLUSTER, node: OWN, pool: PoolId(9), disk: DiskId(1) };
        for op in Store::format(identity, ByteCount(POOL_BYTES)).expect("a legal size") {
            let id = op.id;
            disk.submit(op);
            disk.complete(id);
        }
        disk
    })
}

fn range(start: u64, count: u64) -> BlockRange {
    BlockRange::new(BlockIndex(start), BlockCount(count))
}

impl Rig {
    /// A group at its birth, of which this node or another is the primary.
    fn new(setup: u8) -> Rig {
        let now = Instant(1_000_000_000);
        let disks = vec![ByteCount(POOL_BYTES)];
        let config = Config { cluster: CLUSTER, node: OWN, disks, paths: Vec::new(), boot: 1, seen: BTreeMap::new() };
        let stamp = Stamp { epoch: Epoch(1), generation: Generation(1) };
        let mut lineage = Lineage::default();
        lineage.push(stamp);
        let replicas = BTreeSet::from([PEERS[0], OWN, PEERS[1]]);
        let mut in_sync = replicas.clone();
        let mut modes = BTreeMap::new();
        match setup >> 1 & 3 {
            1 => drop(modes.insert(OWN, Mode::Memory)),
            2 => {
                modes.insert(PEERS[1], Mode::Async);
                in_sync.remove(&PEERS[1]);
            }
            3 if setup & 1 == 0 => {
                modes.insert(OWN, Mode::Async);
                in_sync.remove(&OWN);
            }
            _ => {}
        }
        let primary = if setup & 1 == 0 { PEERS[0] } else { OWN };
        let volumes = BTreeMap::from([(VOLUME, ByteCount(BLOCKS * BLOCK_BYTES))]);
        let record = GroupRecord { stamp, primary, in_sync };
        let (lag, snapshots) = (LagBound::default(), Snapshots::default());
        let keys = BTreeMap::new();
        let spec = GroupSpec { group: GROUP, replicas, modes, lag, volumes, keys, snapshots, record, lineage };
        let mut rig = Rig {
            plane: DataPlane::new(config, now),
            disk: formatted().clone(),
            now,
            spec: spec.clone(),
            sessions: BTreeMap::new(),
            last_session: 0,
            asked: VecDeque::new(),
            next_request: 0,
            replied: BTreeSet::new(),
        };
        rig.run();
        rig.give(Input::Order(Box::new(Order::Group(spec))));
        PEERS.into_iter().for_each(|peer| rig.connect(peer));
        rig
    }

    fn give(&mut self, input: Input) {
        self.plane.handle(self.now, input);
        self.run();
        self.plane.check();
    }

    /// Until the disk has nothing left to do.
    fn run(&mut self) {
        loop {
            while let Some(output) = self.plane.poll() {
                self.on_output(output);
            }
            match self.disk.complete_any() {
                Some(done) => self.plane.handle(self.now, Input::Disk(done)),
                None => return,
            }
        }
    }

    fn on_output(&mut self, output: Output) {
        match output {
            Output::Disk(op) => self.disk.submit(op),
            Output::Send { peer, frame, .. } => {
                assert_eq!(frame.verify(), Ok(()), "what is sent is right");
                self.asked.push_back((peer, frame.message));
                if self.asked.len() > ASKED_MAX {
                    self.asked.pop_front();
                }
            }
            Output::Disconnect { peer, session, .. } => {
                if self.sessions.get(&peer) == Some(&session) {
                    self.sessions.remove(&peer);
                }
            }
            Output::Reply(id, _) => assert!(self.replied.insert(id), "{id:?} was answered twice"),
            Output::Report(_) | Output::Served { .. } | Output::CloseDisk(_) => {}
        }
    }

    fn connect(&mut self, peer: NodeId) {
        self.last_session += 1;
        let session = Session(self.last_session);
        self.sessions.insert(peer, session);
        self.give(Input::LinkUp { peer, session });
    }

    fn say(&mut self, peer: NodeId, message: Message, data: Option<Data>, checksums: Vec<BlockChecksum>) {
        if !self.sessions.contains_key(&peer) {
            self.connect(peer);
        }
        let session = self.sessions[&peer];
        self.give(Input::Frame { peer, session, frame: Frame { message, checksums, data } });
    }

    /// Any message, mostly about the present record and sometimes about what was asked.
    fn say_any(&mut self, tape: &mut Tape<'_>) {
        let (aim, blocks, len) = (tape.u8(), tape.u8(), usize::from(tape.u8()));
        let Ok((mut message, _)) = postcard::take_from_bytes::<Message>(tape.bytes(len)) else { return };
        let (stamp, number) = fields(&mut message);
        if let (Some(stamp), 0) = (stamp, aim & 2) {
            *stamp = self.spec.record.stamp;
        }
        let wanted = self.asked.get(usize::from(aim >> 4)).and_then(|(_, asked)| fields(&mut asked.clone()).1.copied());
        if let (Some(number), Some(wanted), 4) = (number, wanted, aim & 4) {
            *number = wanted;
        }
        let count = usize::from(blocks % 4);
        let data = (count > 0).then(|| Data::copy_of(&vec![aim; count * BLOCK_BYTES as usize]));
        let checksums = match &data {
            Some(data) if blocks & 0x80 == 0 => BlockChecksum::of_all(data.as_slice()),
            Some(_) => vec![BlockChecksum::ZERO; count],
            None if blocks & 0x40 != 0 => vec![BlockChecksum(u64::from(aim)); EXTENT_BLOCKS as usize],
            None => Vec::new(),
        };
        self.say(PEERS[usize::from(aim & 1)], message, data, checksums);
    }

    /// What a good peer would say to something that it was asked, or nearly so.
    fn answer(&mut self, tape: &mut Tape<'_>) {
        let at = tape.below(ASKED_MAX) % self.asked.len().max(1);
        let Some((peer, asked)) = self.asked.remove(at) else { return };
        let runs = |tape: &mut Tape<'_>| match tape.u8() {
            0 => Vec::new(),
            1 => vec![range(u64::from(tape.u16() % 1500), u64::from(tape.u8()))],
            _ => vec![range(tape.u64(), tape.u64())],
        };
        let (message, data) = match asked {
            Message::LeaseAsk { number } => (Message::LeaseGrant { number, refused: Vec::new() }, None),
            Message::Write { group, stamp, sequence, .. }
            | Message::Zero { group, stamp, sequence, .. }
            | Message::Flush { group, stamp, sequence }
            | Message::Current { group, stamp, sequence }
            | Message::TrailReset { group, stamp, sequence, .. } => {
                let answer = match tape.u8() % 8 {
                    0 => Message::Refused { group, stamp, sequence, why: Refusal::Corrupt },
                    1 => Message::Held { group, stamp, sequence },
                    2 => Message::Received { group, stamp, sequence },
                    _ => Message::Done { group, stamp, sequence },
                };
                (answer, None)
            }
            Message::Compare { group, stamp, sequence, .. } => {
                (Message::Differs { group, stamp, sequence, runs: runs(tape) }, None)
            }
            Message::Verify { group, stamp, sequence, .. } => {
                (Message::Verified { group, stamp, sequence, bad: runs(tape) }, None)
            }
            Message::StoredAsk { group, stamp, sequence } => {
                (Message::Stored { group, stamp, sequence, extents: Vec::new() }, None)
            }
            Message::ReadAsk { group, stamp, sequence, range, .. } => {
                let count = if tape.u8() == 0 { range.count.0 } else { 1 };
                let data = Data::copy_of(&vec![5; (count * BLOCK_BYTES) as usize]);
                (Message::ReadData { group, stamp, sequence }, Some(data))
            }
            Message::Trail { group, stamp, run, point, .. } => {
                (Message::Trailed { group, stamp, run, position: point.position }, None)
            }
            Message::Announce { spec } => {
                let (group, at) = (spec.group, spec.record.stamp);
                let standing = match tape.u8() % 5 {
                    0 => Standing::Born,
                    1 => Standing::InSync { at, blank: false, continuous: true },
                    2 => Standing::Stale { since: Some(at) },
                    3 => Standing::Stale { since: None },
                    _ => Standing::Empty,
                };
                (Message::Join { group, stamp: at, standing, extents: Vec::new() }, None)
            }
            _ => return,
        };
        let checksums = data.as_ref().map_or_else(Vec::new, |data| BlockChecksum::of_all(data.as_slice()));
        self.say(peer, message, data, checksums);
    }

    fn request(&mut self, tape: &mut Tape<'_>) {
        self.next_request += 1;
        let (what, start) = (tape.u8(), u64::from(tape.u16()));
        let range = range(start % BLOCKS, (1 + u64::from(what >> 4)).min(BLOCKS - start % BLOCKS));
        let fua = what & 8 != 0;
        let filled = |len: u64| Data::copy_of(&vec![what; len as usize]);
        let op = match what % 6 {
            0 => Op::Read { range },
            1 => Op::Write { range, data: filled(range.count.bytes().0), fua },
            2 => Op::Zero { range, fua },
            3 => Op::Flush,
            4 => Op::Status { range },
            _ => Op::Patch { block: range.start, offset: 512, data: filled(512), fua },
        };
        self.give(Input::Request(Request { id: RequestId(self.next_request), volume: VOLUME, op }));
    }

    /// The log has moved on.
    fn order(&mut self, tape: &mut Tape<'_>) {
        let what = tape.u8();
        let record = &mut self.spec.record;
        record.stamp.generation = record.stamp.generation.next();
        record.primary = [PEERS[0], OWN, PEERS[1], record.primary][usize::from(what & 3)];
        let modes = &self.spec.modes;
        let may_be_in_sync = |node: &NodeId| modes.get(node) != Some(&Mode::Async);
        let all = [PEERS[0], OWN, PEERS[1]];
        let wanted = all.into_iter().enumerate().filter(|(at, _)| what >> (2 + at) & 1 == 0).map(|(_, node)| node);
        record.in_sync = wanted.filter(may_be_in_sync).collect();
        if record.in_sync.is_empty() {
            record.in_sync.insert(PEERS[0]);
        }
        if !record.in_sync.contains(&record.primary) {
            record.primary = *record.in_sync.first().expect("it was just seen to");
        }
        self.spec.lineage.push(record.stamp);
        self.give(Input::Order(Box::new(Order::Group(self.spec.clone()))));
        if what & 0x80 != 0 {
            self.give(Input::Order(Box::new(Order::Scrub { group: GROUP, scrub: u64::from(what) })));
        }
    }

    fn step(&mut self, tape: &mut Tape<'_>) {
        match tape.u8() % 10 {
            0..=2 => self.say_any(tape),
            3..=5 => self.answer(tape),
            6 => {
                let after = Duration::from_millis(4 * u64::from(tape.u8()));
                self.now = self.now + after;
                self.give(Input::Tick);
            }
            7 => self.request(tape),
            8 => self.order(tape),
            _ => {
                let peer = PEERS[usize::from(tape.u8() & 1)];
                if let Some(session) = self.sessions.remove(&peer) {
                    self.give(Input::LinkDown { peer, session });
                }
                self.connect(peer);
            }
        }
    }
}

/// What a message says of the record and of the question that it belongs to.
fn fields(message: &mut Message) -> (Option<&mut Stamp>, Option<&mut Sequence>) {
    match message {
        Message::LeaseAsk { .. } | Message::LeaseGrant { .. } | Message::Pool { .. } | Message::Announce { .. } => {
            (None, None)
        }
        Message::Newer { stamp, .. }
        | Message::Join { stamp, .. }
        | Message::Cool { stamp, .. }
        | Message::Heat { stamp, .. }
        | Message::Trail { stamp, .. }
        | Message::TrailMark { stamp, .. }
        | Message::Trailed { stamp, .. } => (Some(stamp), None),
        Message::Write { stamp, sequence, .. }
        | Message::Zero { stamp, sequence, .. }
        | Message::Flush { stamp, sequence, .. }
        | Message::ReadAsk { stamp, sequence, .. }
        | Message::ReadData { stamp, sequence, .. }
        | Message::Compare { stamp, sequence, .. }
        | Message::Differs { stamp, sequence, .. }
        | Message::Current { stamp, sequence, .. }
        | Message::Done { stamp, sequence, .. }
        | Message::Held { stamp, sequence, .. }
        | Message::Refused { stamp, sequence, .. }
        | Message::Received { stamp, sequence, .. }
        | Message::StoredAsk { stamp, sequence, .. }
        | Message::Stored { stamp, sequence, .. }
        | Message::Verify { stamp, sequence, .. }
        | Message::Verified { stamp, sequence, .. }
        | Message::Snapshot { stamp, sequence, .. }
        | Message::TrailReset { stamp, sequence, .. } => (Some(stamp), Some(sequence)),
    }
}

pub fn run(bytes: &[u8]) {
    let mut tape = Tape(bytes);
    let mut rig = Rig::new(tape.u8());
    for _ in 0..STEPS_MAX {
        if tape.is_empty() {
            return;
        }
        rig.step(&mut tape);
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    let bodies: Vec<Vec<u8>> = fixtures()
        .into_iter()
        .filter_map(|(_, bytes)| {
            let mut decoder = Decoder::new();
            decoder.push(&bytes);
            match decoder.next_frame() {
                Ok(Some(Carried { what: What::Frame(frame), .. })) => postcard::to_stdvec(&frame.message).ok(),
                _ => None,
            }
        })
        .collect();
    // As a secondary of each mode: every message once, with two blocks, then with the checksums of an extent.
    for setup in [0, 2, 6] {
        for blocks in [2, 0x40] {
            let say = |body: &Vec<u8>| [&[0, 0, blocks, body.len() as u8], &body[..]].concat();
            let said: Vec<u8> = bodies.iter().flat_map(say).collect();
            seeds.push([&[setup][..], &said].concat());
        }
    }
    // As a primary: everything is answered, requests of each kind, the log moves on, a scrub, a replica returns.
    let answers: Vec<u8> = (0..12).flat_map(|_| [3, 0, 3]).collect();
    let requests: Vec<u8> = (0..6).flat_map(|what| [7, what, 4, 0]).collect();
    for setup in [1, 3, 5] {
        let parts: [&[u8]; 8] =
            [&[setup], &answers, &requests, &answers, &[8, 0x93], &answers, &[9, 0, 6, 200], &answers];
        seeds.push(parts.concat());
    }
    seeds
}
