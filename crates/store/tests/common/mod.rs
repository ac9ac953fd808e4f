//! A store on a faulty disk, driven step by step.
#![allow(dead_code)]

pub mod history;
pub mod shelf;

use pollux_base::unit::BlockRange;
use pollux_base::{
    BlockChecksum, BlockCount, BlockIndex, ByteCount, ClusterId, Data, DiskId, DiskIndex, DiskOpKind, ExtentIndex,
    Generation, GroupId, Instant, NodeId, PoolId, VolumeId,
};
use pollux_store::faulty_disk::{FaultyDisk, Luck};
use pollux_store::verify::{Finding, Piece};
use pollux_store::{
    DiskChange, Disks, Input, OpenError, Output, PoolIdentity, Store, StoreError, StoreOp, StoreReply, StoreRequestId,
};
use std::collections::{BTreeMap, BTreeSet};

pub const SIZE: u64 = 64 << 20;
pub const CLUSTER: ClusterId = ClusterId(0xc1);
pub const NODE: NodeId = NodeId(1);
pub const IDENTITY: PoolIdentity = PoolIdentity { cluster: CLUSTER, node: NODE, pool: PoolId(0x9001), disk: DiskId(1) };
pub const GROUP: GroupId = GroupId(1);
pub const VOLUME: VolumeId = VolumeId(1);
pub const BLOCK: usize = 4096;

/// Requests of whoever watches have this in their numbers.
const WATCH: u64 = 1 << 40;

pub type Ended = Result<StoreReply, StoreError>;

pub fn formatted() -> FaultyDisk {
    formatted_with(SIZE)
}

/// A disk so long; memory is taken only for what is written.
pub fn formatted_with(size: u64) -> FaultyDisk {
    let mut disk = FaultyDisk::new(size, 1);
    for op in Store::format(IDENTITY, ByteCount(size)).expect("a legal size") {
        let id = op.id;
        disk.submit(op);
        disk.complete(id).expect("it was just submitted").result.expect("nothing fails here");
    }
    disk
}

pub fn gen_(generation: u64) -> Generation {
    Generation(generation)
}
pub fn x(extent: u32) -> ExtentIndex {
    ExtentIndex(extent)
}
pub fn range(start: u64, count: u64) -> BlockRange {
    BlockRange::new(BlockIndex(start), BlockCount(count))
}
/// Blocks of one byte each.
pub fn filled(bytes: &[u8]) -> Data {
    Data::copy_of(&bytes.iter().flat_map(|byte| [*byte; BLOCK]).collect::<Vec<u8>>())
}
pub fn write_op(volume: VolumeId, start: u64, data: Data) -> StoreOp {
    let checksums = BlockChecksum::of_all(data.as_slice());
    StoreOp::Write { volume, range: range(start, checksums.len() as u64), data, checksums }
}

pub struct Rig {
    /// The pool's first disk, and the others.
    pub disk: FaultyDisk,
    pub more: Vec<FaultyDisk>,
    pub store: Disks,
    luck: Luck,
    pub ended: BTreeMap<StoreRequestId, Ended>,
    pub changed: BTreeMap<StoreRequestId, Result<(), String>>,
    pub opened: Option<Result<(), OpenError>>,
    /// Nothing may be asked of these any more.
    closed: BTreeSet<DiskIndex>,
    /// Writes, flushes and discards that the store has issued since it was opened, oldest first.
    pub issued: Vec<DiskOpKind>,
    /// Bytes that the store has asked the disks for since it was opened.
    pub read_bytes: usize,
    /// Whether all invariants are checked after every step, which takes long when a thousand extents are hot.
    pub thorough: bool,
    /// Somebody verifies the metadata all the time, as fast as it goes.
    pub watch: Option<Watch>,
    watch_answers: BTreeMap<StoreRequestId, Ended>,
    next_id: u64,
}

/// A verification that goes on beside everything else.
#[derive(Default)]
pub struct Watch {
    asked: Option<StoreRequestId>,
    disk: usize,
    piece: Piece,
    /// Disks that were looked at from beginning to end.
    pub ended: u64,
    pub findings: Vec<Finding>,
}

impl Rig {
    pub fn opening(disk: FaultyDisk) -> Rig {
        Rig::opening_as(disk, CLUSTER, NODE)
    }
    pub fn opening_as(disk: FaultyDisk, cluster: ClusterId, node: NodeId) -> Rig {
        Rig::opening_all(vec![disk], cluster, node)
    }
    pub fn opening_all(mut disks: Vec<FaultyDisk>, cluster: ClusterId, node: NodeId) -> Rig {
        let sizes: Vec<ByteCount> = disks.iter().map(|disk| ByteCount(disk.size())).collect();
        let store = Disks::open(cluster, node, &sizes);
        let more = disks.split_off(1);
        let disk = disks.remove(0);
        let mut rig = Rig {
            disk,
            more,
            store,
            luck: Luck::new(1),
            ended: BTreeMap::new(),
            changed: BTreeMap::new(),
            opened: None,
            closed: BTreeSet::new(),
            issued: Vec::new(),
            read_bytes: 0,
            thorough: true,
            watch: None,
            watch_answers: BTreeMap::new(),
            next_id: 0,
        };
        rig.drain();
        rig
    }
    /// Runs the opening of several disks to its end.
    pub fn open_all(disks: Vec<FaultyDisk>) -> Result<Rig, OpenError> {
        let mut rig = Rig::opening_all(disks, CLUSTER, NODE);
        rig.settle();
        rig.opened.take().expect("an opening ends").map(|()| rig)
    }
    pub fn into_disks(self) -> Vec<FaultyDisk> {
        std::iter::once(self.disk).chain(self.more).collect()
    }
    pub fn disks_mut(&mut self) -> impl Iterator<Item = &mut FaultyDisk> {
        std::iter::once(&mut self.disk).chain(&mut self.more)
    }
    /// Runs the opening to its end.
    pub fn open(disk: FaultyDisk) -> Result<Rig, OpenError> {
        let mut rig = Rig::opening(disk);
        rig.settle();
        rig.opened.take().expect("an opening ends").map(|()| rig)
    }
    /// A fresh pool with a volume of 32 MiB.
    pub fn fresh() -> Rig {
        let mut rig = Rig::open(formatted()).expect("a fresh pool opens");
        rig.done(StoreOp::Create { volume: VOLUME, group: GROUP, size: ByteCount(32 << 20) });
        rig
    }
    pub fn reopen(self) -> Rig {
        Rig::open_all(self.into_disks()).expect("the pool opens again")
    }

    pub fn drain(&mut self) {
        while let Some(output) = self.store.poll() {
            match output {
                Output::Disk(op) => {
                    match &op.kind {
                        DiskOpKind::Read { len, .. } => self.read_bytes += len,
                        other => self.issued.push(other.clone()),
                    }
                    assert!(!self.closed.contains(&op.id.disk), "{op:?} is for a disk that may be closed");
                    match op.id.disk.index() {
                        0 => self.disk.submit(op),
                        other => self.more[other - 1].submit(op),
                    }
                }
                Output::Opened(result) => self.opened = Some(result),
                Output::Changed(id, result) => drop(self.changed.insert(id, result)),
                Output::Close(disk) => drop(self.closed.insert(disk)),
                Output::Ended(id, result) if id.0 > WATCH => drop(self.watch_answers.insert(id, result)),
                Output::Ended(id, result) => {
                    assert!(self.ended.insert(id, result).is_none(), "{id:?} ended twice");
                }
            }
        }
    }
    /// Completes one operation of the disk. `false`: there was none.
    pub fn step(&mut self) -> bool {
        let busy: Vec<usize> = self
            .disks_mut()
            .enumerate()
            .filter(|(_, disk)| disk.pending().next().is_some())
            .map(|(at, _)| at)
            .collect();
        let chosen = match busy.as_slice() {
            [] => return false,
            [only] => *only,
            several => several[self.luck.below(several.len() as u64) as usize],
        };
        let done = self.disks_mut().nth(chosen).and_then(FaultyDisk::complete_any).expect("it has something to do");
        self.store.handle(Instant(0), Input::Disk(done));
        self.drain();
        if self.thorough {
            self.store.check();
        }
        self.step_watch();
        true
    }
    /// Asks for the next piece when the one before has ended.
    fn step_watch(&mut self) {
        let Some(watch) = &mut self.watch else { return };
        if let Some(asked) = watch.asked {
            let Some(ended) = self.watch_answers.remove(&asked) else { return };
            watch.asked = None;
            let looked = match ended {
                Ok(StoreReply::Looked(looked)) => *looked,
                // The disk has left, or failed.
                Err(StoreError::NoVolume | StoreError::Disk(_)) => {
                    (watch.piece, watch.disk) = (Piece::default(), watch.disk + 1);
                    return;
                }
                other => panic!("{other:?}"),
            };
            // What is said of a disk that has left meanwhile is said of no pool.
            if self.store.in_use().any(|(disk, _)| disk.index() == watch.disk) {
                watch.findings.extend(looked.findings);
            }
            watch.piece = looked.next.unwrap_or_default();
            if looked.next.is_none() {
                watch.ended += 1;
                watch.disk += 1;
            }
        }
        let disks: Vec<DiskIndex> = self.store.in_use().map(|(disk, _)| disk).collect();
        if self.store.failed().is_some() || disks.is_empty() || self.opened != Some(Ok(())) && self.opened.is_some() {
            return;
        }
        let disk = disks.iter().copied().find(|disk| disk.index() >= watch.disk).unwrap_or(disks[0]);
        watch.disk = disk.index();
        self.next_id += 1;
        let id = StoreRequestId(WATCH + self.next_id);
        watch.asked = Some(id);
        let piece = watch.piece;
        self.store.handle(Instant(0), Input::Request(id, StoreOp::Look { disk, piece }));
        self.drain();
    }
    /// Looks at all metadata of the first disk.
    pub fn look(&mut self) -> Vec<Finding> {
        let (mut piece, mut findings) = (Piece::default(), Vec::new());
        loop {
            let Ok(StoreReply::Looked(looked)) = self.end(StoreOp::Look { disk: DiskIndex(0), piece }) else {
                panic!("a look ends in what was seen")
            };
            findings.extend(looked.findings);
            match looked.next {
                Some(next) => piece = next,
                None => return findings,
            }
        }
    }
    pub fn settle(&mut self) {
        while self.step() {}
    }
    pub fn ask(&mut self, op: StoreOp) -> StoreRequestId {
        self.next_id += 1;
        let id = StoreRequestId(self.next_id);
        self.store.handle(Instant(0), Input::Request(id, op));
        self.drain();
        if self.thorough {
            self.store.check();
        }
        id
    }
    pub fn ask_disks(&mut self, change: DiskChange) -> StoreRequestId {
        self.next_id += 1;
        let id = StoreRequestId(self.next_id);
        if let (DiskChange::Join { .. }, Some(next)) = (&change, self.store.next_disk()) {
            self.closed.remove(&next);
        }
        self.store.change_disks(id, change);
        self.drain();
        id
    }
    pub fn end_disks(&mut self, change: DiskChange) -> Result<(), String> {
        let id = self.ask_disks(change);
        while !self.changed.contains_key(&id) {
            assert!(self.step(), "a change of disks never ends");
        }
        self.changed.remove(&id).expect("it has ended")
    }
    /// Asks and runs until it has ended.
    pub fn end(&mut self, op: StoreOp) -> Ended {
        let id = self.ask(op.clone());
        while !self.ended.contains_key(&id) {
            assert!(self.step(), "{op:?} never ends");
        }
        self.ended.remove(&id).expect("it has ended")
    }
    pub fn done(&mut self, op: StoreOp) {
        assert_eq!(self.end(op), Ok(StoreReply::Done));
    }
    pub fn heat(&mut self, extents: &[u32], generation: u64) {
        let extents = extents.iter().copied().map(ExtentIndex).collect();
        self.done(StoreOp::Heat { volume: VOLUME, extents, generation: gen_(generation) });
    }
    pub fn cool(&mut self, extents: &[u32]) {
        self.done(StoreOp::Cool { volume: VOLUME, extents: extents.iter().copied().map(ExtentIndex).collect() });
    }
    pub fn write(&mut self, start: u64, bytes: &[u8]) {
        self.done(write_op(VOLUME, start, filled(bytes)));
    }
    pub fn zero(&mut self, start: u64, count: u64) {
        self.done(StoreOp::Zero { volume: VOLUME, range: range(start, count) });
    }
    pub fn flush(&mut self) {
        self.done(StoreOp::Flush);
    }
    pub fn read_of(&mut self, volume: VolumeId, start: u64, count: u64) -> Ended {
        self.end(StoreOp::Read { volume, range: range(start, count) })
    }
    /// First byte of each block; all bytes of a block must be the same.
    pub fn bytes(&mut self, start: u64, count: u64) -> Vec<u8> {
        match self.read_of(VOLUME, start, count) {
            Ok(StoreReply::Read { data, .. }) => data.as_slice().chunks_exact(BLOCK).map(uniform).collect(),
            other => panic!("{other:?}"),
        }
    }
    pub fn corrupt(&mut self, start: u64, count: u64) -> Vec<BlockRange> {
        match self.read_of(VOLUME, start, count) {
            Err(StoreError::Corrupt(ranges)) => ranges,
            other => panic!("{other:?}"),
        }
    }
}

pub fn uniform(block: &[u8]) -> u8 {
    assert!(block.iter().all(|byte| *byte == block[0]), "a block of several values");
    block[0]
}
