//! Targets for fuzzers (`pollux_base::fuzz`): each parser of the disk format alone, and a whole pool.
//!
//! A CRC over every block keeps accidents from the parsers, and fuzzers too. So the parsers' targets take a block without its
//! frame and seal it here: what is tried is a block that was written so, by a program with a fault or by someone's hand.
//! The frame itself is tried by `pool`.

pub(crate) mod pool;

use crate::catalog::{Catalog, Member, MemberState, Volume};
use crate::journal;
use crate::lanes::FamilyId;
use crate::layout::{
    BLOCK, BlockKind, DESCRIPTORS_PER_BLOCK, Geometry, HEADER_BYTES, Header, LeafPlace, PAYLOAD_BYTES, UNIT_BLOCKS,
    UNITS, unseal,
};
use crate::leaf::{self, LOST_CHECKSUM, LeafOwner, SUMS};
use crate::record::{Mask, Record, pack, set_bit};
use crate::slots::{LayerId, Slot, SlotState, SlotTable, decode_block};
use crate::superblock::{Anchor, COUNT_MAX, Superblock, sealed};
use crate::units::{NO_UNIT, UnitRun, Units};
use crate::{POOL_BYTES_MIN, PoolIdentity};
use pollux_base::checksum::crc32c;
use pollux_base::fuzz::{Tape, Target};
use pollux_base::{
    BlockChecksum, ByteCount, ClusterId, Data, DiskId, ExtentIndex, Generation, GroupId, NodeId, PoolId, VolumeId,
};
use std::collections::BTreeMap;

pub const TARGETS: &[Target] = &[
    Target { name: "store_superblock", run: superblock, seeds: superblock_seeds },
    Target { name: "store_anchor", run: anchor, seeds: anchor_seeds },
    Target { name: "store_catalog", run: catalog, seeds: catalog_seeds },
    Target { name: "store_record", run: record, seeds: record_seeds },
    Target { name: "store_journal", run: journal, seeds: journal_seeds },
    Target { name: "store_table", run: table, seeds: table_seeds },
    Target { name: "store_leaf", run: leaf, seeds: leaf_seeds },
    Target { name: "store_pool", run: pool::run, seeds: pool::seeds },
];

pub(crate) const IDENTITY: PoolIdentity =
    PoolIdentity { cluster: ClusterId(0xc1), node: NodeId(1), pool: PoolId(0x9001), disk: DiskId(7) };

fn geometry() -> Geometry {
    Geometry::of(ByteCount(POOL_BYTES_MIN)).expect("the smallest pool is a pool")
}

/// A block that says of itself what the tape says, with a right checksum.
fn block(kind: BlockKind, tape: &mut Tape<'_>) -> Data {
    let (sequence, one, two) = (tape.u64(), tape.u64(), tape.u64());
    let (part, len) = (tape.u32(), usize::from(tape.u16()) % (PAYLOAD_BYTES + 1));
    let payload = tape.bytes(PAYLOAD_BYTES);
    sealed(IDENTITY.pool, Header { kind, part, sequence, one, two, len }, payload)
}

/// The input of which `block` makes this block.
fn unframed(block: &[u8], kind: BlockKind) -> Vec<u8> {
    let (header, _) = unseal(block, kind, Some(IDENTITY.pool)).expect("it was just encoded");
    let mut bytes = Vec::new();
    [header.sequence, header.one, header.two].iter().for_each(|number| bytes.extend(number.to_le_bytes()));
    bytes.extend(header.part.to_le_bytes());
    bytes.extend((header.len as u16).to_le_bytes());
    bytes.extend(&block[HEADER_BYTES..HEADER_BYTES + header.len]);
    bytes
}

/// What is taken for a superblock is written anew as the same, and its geometry lies inside the pool.
pub fn superblock(bytes: &[u8]) {
    let made = block(BlockKind::Superblock, &mut Tape(bytes));
    let _ = Superblock::decode(bytes);
    let Ok(found) = Superblock::decode(made.as_slice()) else { return };
    assert_eq!(Superblock::decode(found.encode().as_slice()), Ok(found));
    let (identity, size) = (found.identity, ByteCount(found.geometry.size));
    let judged = Superblock::judge([None, Some(made.as_slice())], identity.cluster, identity.node, size);
    assert_eq!(judged, Ok((found, [true, false])), "one good copy is enough");
    let last = found.geometry.offset(found.geometry.units() - 1, UNIT_BLOCKS - 1);
    assert!(last.0 + BLOCK as u64 <= size.0);
}

fn superblock_seeds() -> Vec<Vec<u8>> {
    let of = |size| {
        let geometry = Geometry::of(ByteCount(size)).expect("a legal size");
        unframed(Superblock { identity: IDENTITY, geometry }.encode().as_slice(), BlockKind::Superblock)
    };
    vec![of(POOL_BYTES_MIN), of((1 << 40) + 512)]
}

pub fn anchor(bytes: &[u8]) {
    let made = block(BlockKind::Anchor, &mut Tape(bytes));
    assert_eq!(Anchor::decode(made.as_slice(), PoolId(1)), None, "an anchor of another pool");
    let Some(found) = Anchor::decode(made.as_slice(), IDENTITY.pool) else { return };
    assert_eq!(Anchor::decode(found.encode(IDENTITY.pool).as_slice(), IDENTITY.pool), Some(found));
}

fn anchor_seeds() -> Vec<Vec<u8>> {
    let settled = Anchor { sequence: 9, tail: 70, durable: 71, log_life: 3, life: 3, end: 0, slots: 14 };
    let opening = Anchor { life: 4, end: 80, ..settled };
    [settled, opening].map(|a| unframed(a.encode(IDENTITY.pool).as_slice(), BlockKind::Anchor)).into()
}

/// A body with a right checksum. What is taken for a catalog fits into its place, and is written anew as the same.
pub fn catalog(bytes: &[u8]) {
    let one = u64::from(crc32c(bytes));
    let header = Header { kind: BlockKind::Catalog, part: 0, sequence: 5, one, two: 0, len: bytes.len() };
    let mut copy = sealed(IDENTITY.pool, header, &[]).as_slice().to_vec();
    copy.extend_from_slice(bytes);
    assert!(Catalog::body_len(&copy[..BLOCK], IDENTITY.pool).is_some_and(|len| len <= bytes.len()));
    let Some((sequence, found)) = Catalog::decode(&copy, IDENTITY.pool) else { return };
    let again = found.encode(sequence + 1, IDENTITY.pool);
    assert_eq!(Catalog::decode(again.as_slice(), IDENTITY.pool), Some((6, found)));
}

fn catalog_seeds() -> Vec<Vec<u8>> {
    let mut catalog = Catalog::default();
    let body = |catalog: &Catalog| {
        let copy = catalog.encode(5, IDENTITY.pool);
        let (header, _) = unseal(&copy.as_slice()[..BLOCK], BlockKind::Catalog, None).expect("it was just encoded");
        copy.as_slice()[BLOCK..BLOCK + header.len].to_vec()
    };
    let empty = body(&catalog);
    for id in 1..4 {
        let layer = catalog.new_layer(None);
        let volume = Volume { group: GroupId(id), size: ByteCount(id << 30), layer };
        catalog.volumes.insert(VolumeId(id), volume);
    }
    catalog.notes.insert(GroupId(1), b"a note".to_vec());
    let plain = body(&catalog);
    catalog.snapshot(&[(VolumeId(1), VolumeId(9))]);
    catalog.clone_of(VolumeId(9), VolumeId(10), GroupId(4), Generation(5));
    catalog.roll_back(VolumeId(1), VolumeId(9), Generation(6), &[ExtentIndex(3), ExtentIndex(4), ExtentIndex(9)]);
    let member = Member { size: ByteCount(1 << 30), path: "/dev/sdb".into(), state: MemberState::Draining, life: 3 };
    catalog.members.insert(DiskId(7), member);
    catalog.lost.insert(FamilyId(1), vec![(0, 4), (9, 1)]);
    catalog.arriving = Some((FamilyId(1), ExtentIndex(2)));
    catalog.changes = 12;
    vec![empty, plain, body(&catalog)]
}

/// Records one after the other, as in a block of the journal. What is a record is written anew as the same, and as long as it
/// said it would be.
pub fn record(bytes: &[u8]) {
    let mut rest = bytes;
    let mut records = Vec::new();
    while let Some((record, after)) = Record::decode(rest) {
        assert!(after.len() < rest.len(), "a record takes bytes");
        let mut again = Vec::new();
        record.encode(&mut again);
        assert_eq!(again.len(), record.encoded_len());
        assert_eq!(Record::decode(&again), Some((record.clone(), [].as_slice())));
        records.push(record);
        rest = after;
    }
    let is_short = |record: &&Record| record.encoded_len() <= PAYLOAD_BYTES;
    let (blocks, packed) = pack(records.iter().filter(is_short), 4);
    assert!(packed <= records.len() && blocks.iter().all(|block| block.len() <= PAYLOAD_BYTES));
}

fn examples() -> Vec<Record> {
    let mut mask = Mask::new(3);
    (0..40).for_each(|block| set_bit(&mut mask.stated, block));
    (8..32).for_each(|block| set_bit(&mut mask.valid, block));
    set_bit(&mut mask.keep, 1023);
    let (layer, extent) = (LayerId(1), ExtentIndex(2));
    vec![
        Record::Hot { layer, extent, generation: Generation(3) },
        Record::Cold { layer, extent },
        Record::Slot { slot: 3, descriptor: Box::new(slot(7)) },
        Record::Unit { slot: 3, run: UnitRun { first: 5, count: 2, unit: 100 } },
        Record::Unit { slot: 3, run: UnitRun { first: 0, count: 9, unit: NO_UNIT } },
        Record::Valid { slot: 3, first: 40, checksums: vec![BlockChecksum(5); 4] },
        Record::Zero { slot: 3, first: 0, count: 1024 },
        Record::Hole { slot: 3, first: 8, count: 8 },
        Record::Merge { into: 3, descriptor: Box::new(slot(9)), from: 4, leaf_sequence: 6 },
        Record::Forget { slots: vec![(3, 4), (5, 6)] },
        Record::Lose { extent, generation: Generation(4), slots: vec![(7, layer, 1024)] },
        Record::Mask(Box::new(mask)),
    ]
}

/// Data here and there.
fn slot(first_unit: u32) -> Slot {
    let leaf = Some(LeafPlace { unit: 77, block: 1, blocks: 3 });
    let mut slot =
        Slot { state: SlotState::Data, layer: LayerId(1), extent: 2, leaf, leaf_sequence: 4, ..Slot::default() };
    [(3, first_unit), (4, first_unit + 1), (6, 2)].into_iter().for_each(|(index, unit)| slot.units.set(index, unit));
    slot
}

fn record_seeds() -> Vec<Vec<u8>> {
    let mut seeds: Vec<Vec<u8>> = examples().iter().map(encoded).collect();
    seeds.push(seeds.concat());
    seeds
}

fn encoded(record: &Record) -> Vec<u8> {
    let mut bytes = Vec::new();
    record.encode(&mut bytes);
    bytes
}

/// A ring in which some blocks are there: what is found of the journal is in order and without a hole, and no less than
/// what was said to be durable.
pub fn journal(bytes: &[u8]) {
    let mut tape = Tape(bytes);
    let (tail, durable, life) = (tape.u64() % COUNT_MAX, tape.u64(), u64::from(tape.u8() % 4));
    let end = Some(tape.u64()).filter(|end| *end != 0);
    let ring = geometry().ring;
    let mut blocks: BTreeMap<u64, Data> = BTreeMap::new();
    while !tape.is_empty() {
        let sequence = tail.wrapping_add(u64::from(tape.u8()));
        let (one, two) = (u64::from(tape.u8() % 4), durable.wrapping_add(u64::from(tape.u8() % 8)));
        let len = usize::from(tape.u16()) % (PAYLOAD_BYTES + 1);
        let payload = tape.bytes(len);
        let header = Header { kind: BlockKind::Journal, part: 0, sequence, one, two, len: payload.len() };
        blocks.insert(ring.offset(sequence), sealed(IDENTITY.pool, header, payload));
    }
    let at = |offset: u64| blocks.get(&offset).map(Data::as_slice);
    let found = journal::find(at, IDENTITY.pool, ring, life, tail, durable, end);
    if found.fault.is_some() {
        return;
    }
    assert!(found.end >= tail && found.end >= found.durable && found.durable >= durable);
    assert!(end.is_none_or(|end| found.end >= end));
    assert!(found.records.is_sorted_by_key(|(block, _)| *block));
    assert!(found.records.iter().all(|(block, _)| (tail..found.end).contains(block)));
}

fn journal_seeds() -> Vec<Vec<u8>> {
    let begin = |tail: u64, durable: u64, end: u64| {
        [&tail.to_le_bytes()[..], &durable.to_le_bytes(), &[2], &end.to_le_bytes()].concat()
    };
    let block = |at: u8, records: &[Record]| {
        let payload: Vec<u8> = records.iter().flat_map(encoded).collect();
        [&[at, 2, 0][..], &(payload.len() as u16).to_le_bytes(), &payload].concat()
    };
    let examples = examples();
    let two = [block(0, &examples[..3]), block(1, &examples[3..])].concat();
    // The last block of the ring and the first; one that is known to have ended; one with a hole.
    let over = [begin(2047, 2048, 0), two.clone()].concat();
    let ended = [begin(70, 70, 71), two].concat();
    let hole = [begin(1, 1, 0), block(0, &examples[..1]), block(2, &examples[1..2])].concat();
    vec![begin(1, 1, 0), over, ended, hole]
}

/// A block of the slot table: what is taken for one is written anew as the same.
pub fn table(bytes: &[u8]) {
    let geometry = geometry();
    let made = block(BlockKind::Table, &mut Tape(bytes));
    let Some((_, slots)) = decode_block(made.as_slice(), IDENTITY.pool, &geometry, 0) else { return };
    assert_eq!(slots.len(), DESCRIPTORS_PER_BLOCK);
    let again = table_of(slots.clone());
    assert_eq!(decode_block(&again, IDENTITY.pool, &geometry, 0).map(|(_, slots)| slots), Some(slots));
}

fn table_of(slots: Vec<Slot>) -> Vec<u8> {
    let mut table = SlotTable::new(geometry(), slots, 1);
    table.check();
    table.mark_dirty(0);
    table.take_dirty(IDENTITY.pool)[0].1.as_slice().to_vec()
}

fn table_seeds() -> Vec<Vec<u8>> {
    let empty = Slot { state: SlotState::Empty, leaf: None, units: Units::default(), ..slot(0) };
    let slots = vec![slot(7), Slot::default(), empty];
    vec![unframed(&table_of(Vec::new()), BlockKind::Table), unframed(&table_of(slots), BlockKind::Table)]
}

/// A leaf of up to four blocks. Units that no whole block is about are lost, none other; and what was read is written anew
/// as the same.
pub fn leaf(bytes: &[u8]) {
    const OWNER: LeafOwner = LeafOwner { slot: 3, sequence: 4 };
    let mut tape = Tape(bytes);
    let mut units = Units::default();
    let has: u128 = u128::from(tape.u64()) | u128::from(tape.u64()) << 64;
    (0..UNITS).filter(|unit| has >> (unit % 128) & 1 != 0).for_each(|unit| units.set(unit, unit as u32));
    let parts = usize::from(tape.u8() % 5);
    let mut made = Vec::new();
    for part in 0..parts as u32 {
        let len = usize::from(tape.u16()) % (PAYLOAD_BYTES + 1);
        let payload = tape.bytes(len);
        let (sequence, two, len) = (OWNER.sequence, u64::from(OWNER.slot), payload.len());
        let header = Header { kind: BlockKind::Leaf, part, sequence, one: 0, two, len };
        made.extend_from_slice(sealed(IDENTITY.pool, header, payload).as_slice());
    }
    let sums = leaf::decode(&made, OWNER, IDENTITY.pool, &units);
    let again = leaf::encode(&sums, OWNER, IDENTITY.pool);
    assert_eq!(leaf::decode(again.as_slice(), OWNER, IDENTITY.pool, &units), sums);
    // Of another time: everything that has a place is lost.
    let late = LeafOwner { sequence: 5, ..OWNER };
    let lost = leaf::decode(&made, late, IDENTITY.pool, &units);
    let count = lost.iter().filter(|sum| **sum == LOST_CHECKSUM).count();
    assert_eq!(count, if parts == 0 { 0 } else { units.count() * UNIT_BLOCKS });
}

fn leaf_seeds() -> Vec<Vec<u8>> {
    let of = |units: std::ops::Range<usize>| {
        let mut sums = Box::new([BlockChecksum::ZERO; SUMS]);
        (units.start * UNIT_BLOCKS..units.end * UNIT_BLOCKS).for_each(|at| sums[at] = BlockChecksum(1 + at as u64));
        let leaf = leaf::encode(&sums, LeafOwner { slot: 3, sequence: 4 }, IDENTITY.pool);
        let blocks = leaf.as_slice().chunks_exact(BLOCK);
        let mut bytes = vec![0xff; 16];
        bytes.push(blocks.len() as u8);
        for block in blocks {
            let (header, _) = unseal(block, BlockKind::Leaf, None).expect("it was just encoded");
            bytes.extend((header.len as u16).to_le_bytes());
            bytes.extend(&block[HEADER_BYTES..HEADER_BYTES + header.len]);
        }
        bytes
    };
    vec![of(0..0), of(3..5), of(0..70)]
}
