//! A pool that was in use is changed in places, opened and used. Whatever was changed, it is either refused untouched, or it
//! opens, keeps its invariants, keeps what is written from then on, and opens again.
//!
//! The pool is made anew by this program, so that an input stays of use when the format changes: it says which blocks of
//! metadata are changed (by their order on the disk), and where in them.

use super::IDENTITY;
use crate::faulty_disk::FaultyDisk;
use crate::layout::{BLOCK, CATALOG_BYTES, CATALOGS};
use crate::{Input, OpenError, Output, POOL_BYTES_MIN, Store, StoreError, StoreOp, StoreReply, StoreRequestId};
use pollux_base::checksum::crc32c;
use pollux_base::fuzz::Tape;
use pollux_base::unit::{BLOCK_BYTES, BlockRange};
use pollux_base::{
    BlockChecksum, BlockCount, BlockIndex, ByteCount, Data, DiskOpKind, ExtentIndex, Generation, GroupId, Instant,
    VolumeId,
};
use std::sync::OnceLock;

const GROUP: GroupId = GroupId(1);
const VOLUME: VolumeId = VolumeId(1);
/// Made after the opening, so that there is one whose blocks nothing was done to.
const FRESH: VolumeId = VolumeId(77);
const CHANGES_MAX: usize = 8;
const STEPS_MAX: usize = 24;
/// Most that one request of the store may need of the disk here; more would be one that never ends.
const OPS_MAX: usize = 20_000;

/// A store on its disk.
struct Rig {
    store: Store,
    disk: FaultyDisk,
    opened: Option<Result<(), OpenError>>,
    ended: Option<Result<StoreReply, StoreError>>,
    writes: usize,
    next_id: u64,
}

impl Rig {
    fn open(disk: FaultyDisk) -> Rig {
        let store = Store::open(IDENTITY.cluster, IDENTITY.node, ByteCount(disk.size()));
        let mut rig = Rig { store, disk, opened: None, ended: None, writes: 0, next_id: 0 };
        rig.drain();
        rig.run_until(|rig| rig.opened.is_some());
        rig
    }

    fn drain(&mut self) {
        while let Some(output) = self.store.poll() {
            match output {
                Output::Disk(op) => {
                    self.writes += usize::from(!matches!(op.kind, DiskOpKind::Read { .. }));
                    self.disk.submit(op);
                }
                Output::Opened(result) => self.opened = Some(result),
                Output::Ended(_, result) => self.ended = Some(result),
                Output::Changed(..) | Output::Close(_) => unreachable!("one disk does not change"),
            }
        }
    }

    fn step(&mut self) -> bool {
        let Some(done) = self.disk.complete_any() else { return false };
        self.store.handle(Instant(0), Input::Disk(done));
        self.drain();
        true
    }

    fn run_until(&mut self, is_over: impl Fn(&Rig) -> bool) {
        for _ in 0..OPS_MAX {
            if is_over(self) {
                return;
            }
            assert!(self.step(), "the store waits for nothing");
        }
        panic!("the store comes to no end");
    }

    fn ask(&mut self, op: StoreOp) -> Result<StoreReply, StoreError> {
        self.next_id += 1;
        self.ended = None;
        self.store.handle(Instant(0), Input::Request(StoreRequestId(self.next_id), op));
        self.drain();
        self.run_until(|rig| rig.ended.is_some());
        self.store.check();
        self.ended.take().expect("it has just ended")
    }

    /// Marks the extents of the range and writes it.
    fn write(&mut self, volume: VolumeId, start: u64, data: Data) -> Result<StoreReply, StoreError> {
        let checksums = BlockChecksum::of_all(data.as_slice());
        let range = BlockRange::new(BlockIndex(start), BlockCount(checksums.len() as u64));
        let extents: Vec<ExtentIndex> = range.extents().collect();
        self.ask(StoreOp::Heat { volume, extents, generation: Generation(9) })?;
        self.ask(StoreOp::Write { volume, range, data, checksums })
    }

    fn read(&mut self, volume: VolumeId, start: u64, count: u64) -> Result<Data, StoreError> {
        let range = BlockRange::new(BlockIndex(start), BlockCount(count));
        match self.ask(StoreOp::Read { volume, range })? {
            StoreReply::Read { data, checksums } => {
                for (block, sum) in data.as_slice().chunks_exact(BLOCK).zip(checksums) {
                    let is_right = if sum.is_zero() { block == [0; BLOCK] } else { BlockChecksum::of(block) == sum };
                    assert!(is_right, "a block that does not match its checksum is never returned");
                }
                Ok(data)
            }
            other => panic!("a read ends in {other:?}"),
        }
    }
}

fn filled(value: u8, blocks: usize) -> Data {
    Data::copy_of(&vec![value; blocks * BLOCK])
}

/// A bit of everything: extents that are hot, cold and emptied, a leaf, a table in use and a journal that goes on after it.
pub(crate) fn used() -> &'static FaultyDisk {
    static USED: OnceLock<FaultyDisk> = OnceLock::new();
    USED.get_or_init(|| {
        let mut disk = FaultyDisk::new(POOL_BYTES_MIN, 1);
        for op in Store::format(IDENTITY, ByteCount(POOL_BYTES_MIN)).expect("a legal size") {
            let id = op.id;
            disk.submit(op);
            disk.complete(id);
        }
        let done = |result: Result<StoreReply, StoreError>| assert_eq!(result, Ok(StoreReply::Done));
        let mut rig = Rig::open(disk);
        done(rig.ask(StoreOp::Create { volume: VOLUME, group: GROUP, size: ByteCount(32 << 20) }));
        done(rig.ask(StoreOp::Create { volume: VolumeId(2), group: GroupId(2), size: ByteCount(8 << 20) }));
        done(rig.ask(StoreOp::PutNote { group: GROUP, note: Some(b"note".to_vec()) }));
        for (at, start) in [0, 1020, 2048, 3072, 4096].into_iter().enumerate() {
            done(rig.write(VOLUME, start, filled(1 + at as u8, 8)));
        }
        done(rig.write(VolumeId(2), 5, filled(9, 2)));
        let range = BlockRange::new(BlockIndex(2048), BlockCount(1024));
        done(rig.ask(StoreOp::Zero { volume: VOLUME, range }));
        done(rig.ask(StoreOp::Cool { volume: VOLUME, extents: [0, 2, 3].map(ExtentIndex).into() }));
        done(rig.ask(StoreOp::Flush));
        rig.disk.kill(1);
        let mut rig = Rig::open(rig.disk);
        done(rig.write(VOLUME, 1, filled(7, 1)));
        done(rig.write(VOLUME, 5120, filled(8, 3)));
        done(rig.ask(StoreOp::Flush));
        done(rig.write(VOLUME, 5130, filled(10, 3)));
        rig.disk.kill(2);
        rig.disk
    })
}

/// Blocks that the fuzzer may change: all that hold anything.
fn places(disk: &FaultyDisk) -> Vec<u64> {
    disk.blocks().map(|(number, _)| number * BLOCK_BYTES).collect()
}

/// What is done to a block.
struct Change<'a> {
    place: usize,
    offset: usize,
    is_sealed: bool,
    bytes: &'a [u8],
}

impl Change<'_> {
    fn read<'a>(tape: &mut Tape<'a>) -> Change<'a> {
        let (place, offset) = (usize::from(tape.u8()), usize::from(tape.u16()));
        let head = tape.u8();
        Change { place, offset, is_sealed: head & 0x80 == 0, bytes: tape.bytes(usize::from(head & 0x3f)) }
    }

    fn encode(&self) -> Vec<u8> {
        let head = self.bytes.len() as u8 | if self.is_sealed { 0 } else { 0x80 };
        [&[self.place as u8][..], &(self.offset as u16).to_le_bytes(), &[head], self.bytes].concat()
    }

    fn make(&self, disk: &mut FaultyDisk, places: &[u64]) {
        let place = places[self.place % places.len()];
        let mut block = disk.read_now(place, BLOCK);
        let offset = self.offset % BLOCK;
        let len = self.bytes.len().min(BLOCK - offset);
        block[offset..offset + len].copy_from_slice(&self.bytes[..len]);
        if self.is_sealed && block.starts_with(b"PolluxMB") {
            block[60..64].fill(0);
            let crc = crc32c(&block);
            block[60..64].copy_from_slice(&crc.to_le_bytes());
        }
        disk.write_now(place, &block);
        if self.is_sealed {
            CATALOGS.iter().filter(|start| (**start..**start + CATALOG_BYTES as u64).contains(&place)).for_each(
                |start| {
                    seal_catalog(disk, *start);
                },
            );
        }
    }
}

/// The head of a catalog holds a checksum of its body, too.
fn seal_catalog(disk: &mut FaultyDisk, start: u64) {
    let mut head = disk.read_now(start, BLOCK);
    let len = u32::from_le_bytes([head[56], head[57], head[58], head[59]]) as usize;
    let body = disk.read_now(start + BLOCK_BYTES, len.min(CATALOG_BYTES - BLOCK));
    head[40..48].copy_from_slice(&u64::from(crc32c(&body)).to_le_bytes());
    head[60..64].fill(0);
    let crc = crc32c(&head);
    head[60..64].copy_from_slice(&crc.to_le_bytes());
    disk.write_now(start, &head);
}

pub fn run(bytes: &[u8]) {
    let mut tape = Tape(bytes);
    let mut disk = used().clone();
    let places = places(&disk);
    for _ in 0..tape.below(CHANGES_MAX + 1) {
        Change::read(&mut tape).make(&mut disk, &places);
    }
    let mut rig = Rig::open(disk);
    if let Some(Err(error)) = &rig.opened {
        assert!(rig.writes == 0 && !error.to_string().is_empty(), "a refused pool is not touched: {error}");
        return;
    }
    rig.store.check();
    use_it(&mut rig, &mut tape);
    keep(rig);
}

/// Some steps in the life of the pool. Errors are answers; what may be wrong with the old volumes is not known.
fn use_it(rig: &mut Rig, tape: &mut Tape<'_>) {
    for _ in 0..STEPS_MAX {
        if tape.is_empty() {
            return;
        }
        let volumes: Vec<(VolumeId, u64)> = rig.store.volumes().map(|(volume, _, size)| (volume, size.0)).collect();
        let (what, which) = (tape.u8(), tape.below(volumes.len().max(1)));
        let Some((volume, size)) = volumes.get(which).copied() else { return };
        let start = u64::from(tape.u16());
        let (blocks, extent) = (size / BLOCK_BYTES, ExtentIndex(start as u32 % 8));
        let is_inside = start + 16 <= blocks;
        let _ = match what % 9 {
            0 => rig.read(volume, start, 16).map(|_| StoreReply::Done),
            1 if is_inside => rig.write(volume, start, filled(what, 16)),
            2 if is_inside => {
                let range = BlockRange::new(BlockIndex(start), BlockCount(16));
                let heat = StoreOp::Heat { volume, extents: range.extents().collect(), generation: Generation(9) };
                rig.ask(heat).and_then(|_| rig.ask(StoreOp::Zero { volume, range }))
            }
            3 => rig.ask(StoreOp::Cool { volume, extents: rig.store.hot(volume) }),
            4 => rig.ask(StoreOp::Flush),
            5 => rig.ask(StoreOp::Delete { volume }),
            6 if is_inside => rig.ask(StoreOp::Checksums { volume, extent }),
            7 => rig.ask(StoreOp::Reap { group: GROUP }),
            8 => rig.ask(StoreOp::Remark { group: GROUP, generation: Generation(12) }),
            _ => Ok(StoreReply::Done),
        };
        if is_inside && what % 9 != 5 {
            let range = BlockRange::new(BlockIndex(start), BlockCount(16));
            let runs = rig.store.status(volume, range);
            assert_eq!(runs.iter().map(|(run, _)| run.count.0).sum::<u64>(), 16, "a status covers what was asked");
        }
    }
}

/// From now on nothing is lost.
fn keep(mut rig: Rig) {
    let _ = rig.ask(StoreOp::Delete { volume: FRESH });
    let created = rig.ask(StoreOp::Create { volume: FRESH, group: GroupId(78), size: ByteCount(8 << 20) });
    let written = created.and_then(|_| rig.write(FRESH, 1000, filled(0xf5, 40)));
    let flushed = written.and_then(|_| rig.ask(StoreOp::Flush));
    let volumes: Vec<_> = rig.store.volumes().collect();
    rig.disk.power_cut(3);
    let mut again = Rig::open(rig.disk);
    if let Some(Err(error)) = again.opened.take() {
        panic!("a pool that was open opens again: {error}");
    }
    again.store.check();
    assert_eq!(again.store.volumes().collect::<Vec<_>>(), volumes);
    if flushed.is_ok() {
        assert_eq!(again.read(FRESH, 1000, 40), Ok(filled(0xf5, 40)));
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let places = places(used());
    let with = |changes: &[Change<'_>], steps: &[u8]| {
        let mut bytes = vec![changes.len() as u8];
        changes.iter().for_each(|change| bytes.extend(change.encode()));
        bytes.extend_from_slice(steps);
        bytes
    };
    let steps: Vec<u8> = (0..9).flat_map(|what| [what, 0, 0, 4 * what]).collect();
    let mut seeds = vec![with(&[], &steps)];
    // A word in the middle of each block of metadata, sealed or not.
    for (place, offset) in places.into_iter().enumerate() {
        if used().read_now(offset, 8) == b"PolluxMB" {
            let change = |is_sealed| Change { place, offset: 72, is_sealed, bytes: &[1, 0, 0, 0] };
            seeds.push(with(&[change(true)], &steps));
            if place < 8 {
                seeds.push(with(&[change(false)], &steps));
            }
        }
    }
    seeds.truncate(30);
    // Anchors that count for more than the other, and say what cannot be.
    let newer = [0xff, 0xff, 0xff];
    for offset in [32, 64, 72, 80, 88, 96, 104] {
        for value in [[0xff; 8], [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f], [0, 1, 0, 0, 0, 0, 0, 0]] {
            let sequence = Change { place: 1, offset: 32, is_sealed: true, bytes: &newer };
            let field = Change { place: 1, offset, is_sealed: true, bytes: &value };
            seeds.push(with(&[sequence, field], &[]));
        }
    }
    seeds
}
