//! Which pools are opened, which damage is healed, and what is refused without a single write.

mod common;

use common::*;
use pollux_base::checksum::crc32c;
use pollux_base::{ByteCount, ClusterId, DiskError, DiskOpKind, NodeId, PoolId};
use pollux_store::faulty_disk::{FaultyDisk, Luck, OpClass};
use pollux_store::{FormatError, OpenError, POOL_BYTES_MIN, PoolIdentity, Store, StoreOp};

const SUPERBLOCKS: [u64; 2] = [0, 1 << 20];
const ANCHORS: [u64; 2] = [4096, (1 << 20) + 4096];
const CATALOGS: [u64; 2] = [2 << 20, 3 << 20];
const JOURNAL: u64 = 4 << 20;
const TABLES: [u64; 2] = [12 << 20, (12 << 20) + 55 * 4096];

fn content(disk: &FaultyDisk) -> Vec<(u64, Vec<u8>)> {
    disk.blocks().map(|(number, block)| (number, block.to_vec())).collect()
}

fn refused(disk: FaultyDisk, cluster: ClusterId, node: NodeId) -> OpenError {
    let before = content(&disk);
    let mut rig = Rig::opening_as(disk, cluster, node);
    rig.settle();
    let error = rig.opened.expect("an opening ends").expect_err("it is refused");
    assert_eq!(rig.issued, [], "a refused pool is not touched");
    assert_eq!(content(&rig.disk), before);
    assert!(!error.to_string().is_empty());
    error
}

/// A pool with a bit of everything.
fn used() -> FaultyDisk {
    // Opened once more, so that the slot table is in use.
    used_and(Rig::reopen)
}

fn used_and(then: impl FnOnce(Rig) -> Rig) -> FaultyDisk {
    let mut rig = Rig::fresh();
    rig.done(StoreOp::PutNote { group: GROUP, note: Some(b"note".to_vec()) });
    rig.heat(&[0, 1, 2], 3);
    rig.write(0, &[1; 8]);
    rig.write(1024, &[2; 8]);
    rig.cool(&[0]);
    rig.flush();
    let mut rig = then(rig);
    rig.write(1030, &[3; 8]);
    rig.disk
}

fn is_whole(rig: &mut Rig) {
    assert_eq!(rig.bytes(0, 9), [1, 1, 1, 1, 1, 1, 1, 1, 0]);
    assert_eq!(rig.bytes(1028, 11), [2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 0]);
    assert_eq!(rig.store.hot(VOLUME), [x(1), x(2)]);
    assert_eq!(rig.store.notes().count(), 1);
}

#[test]
fn one_damaged_superblock_is_healed_from_the_other() {
    for place in SUPERBLOCKS {
        for damage in [0, 8, 100, 4095] {
            let mut disk = used();
            let good = disk.read_now(place, 4096);
            disk.rot(place + damage);
            let mut rig = Rig::open(disk).expect("one good copy is enough");
            assert_eq!(rig.disk.read_now(place, 4096), good);
            is_whole(&mut rig);
        }
    }
}

#[test]
fn two_damaged_superblocks_are_refused() {
    let mut disk = used();
    SUPERBLOCKS.iter().for_each(|place| disk.rot(place + 100));
    assert_eq!(refused(disk, CLUSTER, NODE), OpenError::SuperblocksDamaged);
    assert_eq!(refused(FaultyDisk::new(SIZE, 1), CLUSTER, NODE), OpenError::NotAPool);
    assert_eq!(refused(FaultyDisk::new(4096, 1), CLUSTER, NODE), OpenError::NotAPool);
    let none = refused(FaultyDisk::new(0, 1), CLUSTER, NODE);
    assert!(matches!(none, OpenError::Disk(_)));
}

#[test]
fn pools_of_others_are_refused_even_when_a_copy_is_damaged() {
    for damaged in [None, Some(SUPERBLOCKS[0]), Some(SUPERBLOCKS[1])] {
        let mut disk = used();
        damaged.into_iter().for_each(|place| disk.rot(place));
        let other = ClusterId(7);
        assert_eq!(refused(disk.clone(), other, NODE), OpenError::OtherCluster { found: CLUSTER, expected: other });
        assert_eq!(refused(disk, CLUSTER, NodeId(2)), OpenError::OtherNode { found: NODE, expected: NodeId(2) });
    }
}

#[test]
fn a_pool_of_another_length_is_refused() {
    for size in [SIZE / 2, SIZE - 4096, SIZE * 2] {
        let mut other = FaultyDisk::new(size, 1);
        let disk = used();
        disk.blocks()
            .filter(|(number, _)| (number + 1) * 4096 <= size)
            .for_each(|(n, block)| other.write_now(n * 4096, block));
        assert_eq!(refused(other, CLUSTER, NODE), OpenError::Truncated { found: size, expected: SIZE });
    }
}

#[test]
fn a_version_of_the_future_is_refused_by_name() {
    let mut disk = used();
    for place in SUPERBLOCKS {
        let mut block = disk.read_now(place, 4096);
        block[8] = 9;
        block[60..64].fill(0);
        let crc = crc32c(&block);
        block[60..64].copy_from_slice(&crc.to_le_bytes());
        disk.write_now(place, &block);
    }
    assert_eq!(refused(disk, CLUSTER, NODE), OpenError::Version { found: 9, known: 5 });
}

#[test]
fn superblocks_of_two_pools_are_refused() {
    let mut disk = used();
    let other = PoolIdentity { pool: PoolId(5), ..IDENTITY };
    let ops = Store::format(other, ByteCount(SIZE)).expect("a legal size");
    let mut second = FaultyDisk::new(SIZE, 1);
    for op in ops {
        let id = op.id;
        second.submit(op);
        second.complete(id);
    }
    disk.write_now(SUPERBLOCKS[1], &second.read_now(SUPERBLOCKS[1], 4096));
    assert!(matches!(refused(disk, CLUSTER, NODE), OpenError::Damaged(_)));
}

#[test]
fn one_damaged_copy_of_any_metadata_is_healed_and_two_are_refused() {
    for copies in [ANCHORS, CATALOGS, TABLES] {
        for place in copies {
            let mut disk = used();
            disk.rot(place + 70);
            let mut rig = Rig::open(disk).expect("one good copy is enough");
            is_whole(&mut rig);
            // The other copy may now be lost.
            let other = if place == copies[0] { copies[1] } else { copies[0] };
            rig.disk.rot(other + 70);
            is_whole(&mut rig.reopen());
        }
        let mut disk = used();
        copies.iter().for_each(|place| disk.rot(place + 70));
        assert!(matches!(refused(disk, CLUSTER, NODE), OpenError::Damaged(_)));
    }
}

#[test]
fn an_unreadable_copy_is_like_a_damaged_one() {
    // Reads of the opening fail one after the other; each block that matters has a second copy or is read again.
    let mut refusals = 0;
    for nth in 0.. {
        let mut rig = Rig::opening(used());
        for _ in 0..nth {
            rig.step();
        }
        if !rig.disk.pending().any(|op| matches!(op.kind, DiskOpKind::Read { .. })) {
            break;
        }
        rig.disk.fail_next(OpClass::Read, DiskError::Io("medium error".into(), 5));
        rig.settle();
        match rig.opened.take() {
            Some(Ok(())) => is_whole(&mut rig),
            Some(Err(error)) => {
                refusals += 1;
                assert!(matches!(error, OpenError::Damaged(_) | OpenError::Disk(_)), "{error}");
            }
            None => panic!("an opening ends"),
        }
    }
    assert_eq!(refusals, 0, "no single failed read stops an opening");
}

#[test]
fn a_hole_in_the_journal_is_refused() {
    // From the block that the last checkpoint or opening wrote to the last that a later block vouches for.
    let disk = used_and(|rig| rig);
    let blocks: Vec<u64> =
        disk.blocks().map(|(n, _)| n * 4096).filter(|at| (JOURNAL..TABLES[0]).contains(at)).collect();
    assert!(blocks.len() > 4);
    let mut refusals = 0;
    for place in &blocks {
        let mut disk = disk.clone();
        disk.rot(place + 80);
        match Rig::open(disk.clone()) {
            Err(OpenError::Damaged(text)) => {
                assert!(text.contains("journal"), "{text}");
                assert!(matches!(refused(disk, CLUSTER, NODE), OpenError::Damaged(_)));
                refusals += 1;
            }
            Err(error) => panic!("{error}"),
            // The end of the journal cannot be told from a batch that was torn.
            Ok(mut rig) => assert_eq!(rig.bytes(0, 2).len(), 2),
        }
    }
    assert!(refusals >= blocks.len() - 3, "{refusals} of {}", blocks.len());
}

#[test]
fn no_garbage_in_the_metadata_makes_it_panic() {
    let disk = used();
    let places: Vec<u64> = disk.blocks().map(|(n, _)| n * 4096).collect();
    let mut luck = Luck::new(1);
    for _ in 0..150 {
        let mut disk = disk.clone();
        for _ in 0..1 + luck.below(3) {
            let place = places[luck.below(places.len() as u64) as usize];
            let mut block = disk.read_now(place, 4096);
            let at = luck.below(200) as usize;
            block[at] = luck.draw() as u8;
            // With a right checksum, so that it is looked at.
            block[60..64].fill(0);
            let crc = crc32c(&block);
            block[60..64].copy_from_slice(&crc.to_le_bytes());
            disk.write_now(place, &block);
        }
        let opened = Rig::open(disk);
        if let Ok(mut rig) = opened {
            for (volume, _, size) in rig.store.volumes().collect::<Vec<_>>() {
                let _ = rig.read_of(volume, 0, (size.0 / 4096).min(2048));
            }
        }
    }
}

#[test]
fn a_write_that_fails_while_opening_is_told() {
    for nth in 0..10 {
        let mut rig = Rig::opening(used());
        let mut failing = false;
        while rig.opened.is_none() {
            if !failing && rig.issued.len() > nth {
                rig.disk.fail_next(OpClass::Write, DiskError::Io("broken".into(), 5));
                failing = true;
            }
            assert!(rig.step());
        }
        if let Some(Err(error)) = &rig.opened {
            assert!(matches!(error, OpenError::Disk(_)));
        }
        // Nothing is lost by it.
        rig.disk.kill(nth as u64);
        is_whole(&mut rig.reopen());
    }
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    let format = |size: u64| Store::format(IDENTITY, ByteCount(size)).err();
    assert!(matches!(format(0), Some(FormatError::TooSmall { .. })));
    assert!(matches!(format(POOL_BYTES_MIN - 1), Some(FormatError::TooSmall { .. })));
    assert!(matches!(format(u64::MAX), Some(FormatError::TooLarge { .. })));
    assert_eq!(format(POOL_BYTES_MIN + 513), None);
}

#[test]
fn a_pool_that_was_formatted_again_shows_nothing_of_the_old_one() {
    let mut disk = used();
    for op in Store::format(IDENTITY, ByteCount(SIZE)).expect("a legal size") {
        let id = op.id;
        disk.submit(op);
        disk.complete(id);
    }
    let mut rig = Rig::open(disk).expect("it is a fresh pool");
    assert_eq!((rig.store.volumes().count(), rig.store.notes().count()), (0, 0));
    rig.done(StoreOp::Create { volume: VOLUME, group: GROUP, size: ByteCount(32 << 20) });
    assert_eq!(rig.bytes(0, 9), [0; 9]);
}
