//! Pools of several disks: what each promises, one promise a test. (Random histories with them are in `crashes`.)

mod common;

use common::*;
use pollux_base::pool::DiskState;
use pollux_base::{ByteCount, DiskError, DiskId, GroupId, PoolId, VolumeId};
use pollux_store::faulty_disk::{FaultyDisk, OpClass};
use pollux_store::{DiskChange, Disks, LOST_CHECKSUM, OpenError, PoolIdentity, Store, StoreError, StoreOp, StoreReply};

const SNAPSHOT: VolumeId = VolumeId(50);
const SECOND: DiskId = DiskId(2);
/// Blocks of an extent.
const X: u64 = 1024;

fn blank() -> FaultyDisk {
    FaultyDisk::new(SIZE, 9)
}

fn join(rig: &mut Rig, disk: u128) {
    rig.more.push(blank());
    let change = DiskChange::Join {
        disk: DiskId(disk),
        size: ByteCount(SIZE),
        path: format!("/dev/{disk}"),
        may_overwrite: false,
    };
    assert_eq!(rig.end_disks(change), Ok(()));
}

#[test]
fn a_pool_can_be_made_of_several_disks_at_once() {
    let sizes = [SIZE, SIZE * 2, SIZE];
    let of = |at: usize| (DiskId(at as u128 + 1), ByteCount(sizes[at]), format!("/dev/{at}"));
    let ops = Disks::format(IDENTITY, &[of(0), of(1), of(2)]).expect("legal sizes");
    let mut disks: Vec<FaultyDisk> = sizes.iter().map(|size| FaultyDisk::new(*size, 1)).collect();
    for (disk, ops) in disks.iter_mut().zip(ops) {
        for op in ops {
            let id = op.id;
            disk.submit(op);
            disk.complete(id);
        }
    }
    let mut rig = Rig::open_all(disks).expect("it opens");
    rig.done(StoreOp::Create { volume: VOLUME, group: GROUP, size: ByteCount(64 << 20) });
    rig.heat(&[0, 1, 2, 3, 4, 5, 6, 7], 1);
    assert_eq!(extents(&rig).iter().sum::<u64>(), 8);
    assert!(extents(&rig)[1] > extents(&rig)[0] && extents(&rig)[0] > 0, "the larger takes more: {:?}", extents(&rig));
    rig.write(X - 1, &[1, 2]);
    assert_eq!(rig.reopen().bytes(X - 1, 2), [1, 2]);
}

/// Two disks, and a volume of eight extents with a block in each: half of them live on each disk.
fn two() -> Rig {
    let mut rig = Rig::fresh();
    join(&mut rig, 2);
    rig.heat(&[0, 1, 2, 3, 4, 5, 6, 7], 1);
    (0..8).for_each(|extent| rig.write(extent * X, &[extent as u8 + 1]));
    rig
}

fn extents(rig: &Rig) -> Vec<u64> {
    rig.store.disks().iter().filter(|disk| disk.state != DiskState::Failed).map(|disk| disk.extents).collect()
}

fn assert_whole(rig: &mut Rig) {
    for extent in 0..8 {
        assert_eq!(rig.bytes(extent * X, 2), [extent as u8 + 1, 0], "extent {extent}");
    }
}

/// Runs until the disk has given up all that it had.
fn drained(rig: &mut Rig, disk: DiskId) {
    assert_eq!(rig.end_disks(DiskChange::Drain { disk }), Ok(()));
    let left = |rig: &Rig| rig.store.disks().iter().find(|known| known.disk == disk).map_or(0, |known| known.extents);
    while left(rig) > 0 {
        assert!(rig.step(), "it goes on until nothing is left");
    }
    rig.settle();
}

#[test]
fn extents_are_spread_over_the_disks_and_found_again() {
    let mut rig = two();
    assert_eq!(extents(&rig), [4, 4]);
    // Across the seams of extents that live on different disks.
    rig.write(X - 1, &[7, 8, 9]);
    assert_eq!(rig.bytes(X - 2, 5), [0, 7, 8, 9, 0]);
    let whole = rig.read_of(VOLUME, 0, 8 * X);
    assert!(matches!(whole, Ok(StoreReply::Read { data, .. }) if data.len() == 8 * 1024 * BLOCK));
    rig.zero(X - 1, 3);
    rig.write(X, &[2]);
    rig.flush();
    rig.disks_mut().for_each(|disk| disk.power_cut(5));
    let mut rig = rig.reopen();
    assert_eq!(extents(&rig), [4, 4]);
    assert_whole(&mut rig);
    assert_eq!(rig.store.allocated(VOLUME).len(), 8);
    assert_eq!(rig.store.volumes().count(), 1);
}

#[test]
fn a_disk_joins_under_load_and_takes_its_share() {
    let mut rig = Rig::fresh();
    rig.heat(&[0, 1, 2], 1);
    let free = rig.store.free();
    for at in 0..20 {
        rig.ask(write_op(VOLUME, at, filled(&[1])));
    }
    rig.more.push(blank());
    let joined = rig.ask_disks(DiskChange::Join {
        disk: SECOND,
        size: ByteCount(SIZE),
        path: "/dev/second".into(),
        may_overwrite: false,
    });
    let created = rig.ask(StoreOp::Create { volume: VolumeId(2), group: GROUP, size: ByteCount(8 << 20) });
    rig.ask(StoreOp::Snapshot { of: vec![(VOLUME, SNAPSHOT)] });
    for at in 20..40 {
        rig.ask(write_op(VOLUME, at, filled(&[2])));
    }
    rig.settle();
    assert_eq!(rig.changed.remove(&joined), Some(Ok(())));
    assert_eq!(rig.ended.remove(&created), Some(Ok(StoreReply::Done)));
    assert!(rig.store.free().0 > free.0 + SIZE / 2, "there is more room");
    rig.heat(&[3, 4, 5], 1);
    assert!(extents(&rig).iter().all(|extents| *extents >= 3), "{:?}", extents(&rig));
    let mut rig = rig.reopen();
    assert_eq!((rig.bytes(0, 1), rig.bytes(39, 1)), (vec![1], vec![2]));
    assert_eq!(rig.store.volumes().count(), 3);
}

#[test]
fn a_join_that_is_cut_short_leaves_the_pool_as_it_was() {
    for steps in 0..400 {
        let mut rig = Rig::fresh();
        rig.thorough = false;
        rig.heat(&[0], 1);
        rig.write(0, &[1]);
        rig.more.push(blank());
        let change =
            DiskChange::Join { disk: SECOND, size: ByteCount(SIZE), path: String::new(), may_overwrite: false };
        let joined = rig.ask_disks(change);
        for _ in 0..steps {
            rig.step();
        }
        let ended = rig.changed.contains_key(&joined);
        rig.disks_mut().for_each(|disk| disk.kill(steps));
        let disks = rig.into_disks();
        let alone = Rig::open(disks[0].clone());
        match alone {
            Ok(mut rig) => {
                assert!(!ended, "it had joined");
                assert_eq!(rig.bytes(0, 1), [1]);
            }
            // Some disk knows that it has joined already.
            Err(error) => assert!(matches!(error, OpenError::DiskMissing { id: SECOND, .. }), "{error}"),
        }
        match Rig::open_all(disks) {
            Ok(mut rig) => assert_eq!(rig.bytes(0, 1), [1]),
            Err(error) => assert!(!ended && matches!(error, OpenError::OneDisk { disk: 1, .. }), "{error}"),
        }
        if ended {
            break;
        }
        assert!(steps < 399, "it ends at last");
    }
}

#[test]
fn a_drained_disk_gives_everything_up_and_leaves() {
    let mut rig = two();
    rig.cool(&[4, 5, 6, 7]);
    rig.done(StoreOp::Snapshot { of: vec![(VOLUME, SNAPSHOT)] });
    rig.write(0, &[101]);
    rig.write(X, &[102]);
    rig.zero(2 * X, 1);
    rig.heat(&[4], 3);
    rig.write(4 * X, &[105]);
    rig.cool(&[4]);
    let hot = rig.store.hot(VOLUME);
    let changed = rig.store.changed_since(VOLUME, gen_(2));
    let refused = rig.end_disks(DiskChange::Remove { disk: SECOND });
    assert!(matches!(&refused, Err(text) if text.contains("drain it first")), "{refused:?}");
    drained(&mut rig, SECOND);
    assert_eq!(extents(&rig)[1], 0);
    let look = |rig: &mut Rig| {
        let read = |rig: &mut Rig, volume, extent| match rig.read_of(volume, extent * X, 1) {
            Ok(StoreReply::Read { data, .. }) => uniform(data.as_slice()),
            other => panic!("{other:?}"),
        };
        let now: Vec<u8> = (0..8).map(|extent| read(rig, VOLUME, extent)).collect();
        let then: Vec<u8> = (0..8).map(|extent| read(rig, SNAPSHOT, extent)).collect();
        assert_eq!(now, [101, 102, 0, 4, 105, 6, 7, 8]);
        assert_eq!(then, [1, 2, 3, 4, 5, 6, 7, 8]);
    };
    look(&mut rig);
    assert!(hot.iter().all(|extent| rig.store.hot(VOLUME).contains(extent)), "marks move, too");
    assert!(changed.iter().all(|extent| rig.store.changed_since(VOLUME, gen_(2)).contains(extent)));
    assert_eq!(rig.end_disks(DiskChange::Remove { disk: SECOND }), Ok(()));
    rig.flush();
    // It is nobody's any more.
    let disks = rig.into_disks();
    assert!(matches!(Rig::open(disks[1].clone()).err(), Some(OpenError::NotAPool)));
    let mut rig = Rig::open(disks[0].clone()).expect("one disk is a pool");
    look(&mut rig);
    rig.write(3 * X, &[4]);
}

#[test]
fn requests_go_on_while_a_disk_is_drained() {
    let mut rig = two();
    let drain = rig.ask_disks(DiskChange::Drain { disk: SECOND });
    let mut value = 0;
    let mut asked = Vec::new();
    while extents(&rig)[1] > 0 {
        value = value % 100 + 1;
        for extent in 0..8 {
            asked.push(rig.ask(write_op(VOLUME, extent * X + 1, filled(&[value]))));
        }
        // All of this round, so that no block has two writes under way.
        while asked.iter().any(|id| !rig.ended.contains_key(id)) {
            assert!(rig.step(), "every write ends");
        }
        for id in asked.drain(..) {
            assert_eq!(rig.ended.remove(&id), Some(Ok(StoreReply::Done)));
        }
        for extent in 0..8 {
            assert_eq!(rig.bytes(extent * X, 3), [extent as u8 + 1, value, 0]);
        }
    }
    assert_eq!(rig.changed.remove(&drain), Some(Ok(())));
    // It can be used again.
    assert_eq!(rig.end_disks(DiskChange::Undrain { disk: SECOND }), Ok(()));
    let mut rig = rig.reopen();
    rig.heat(&[0], 1);
    for extent in 0..8 {
        assert_eq!(rig.bytes(extent * X, 3), [extent as u8 + 1, value, 0]);
    }
}

#[test]
fn a_crash_at_any_moment_of_a_move_finds_each_extent_once_and_whole() {
    for steps in 0..500 {
        let mut rig = Rig::fresh();
        rig.thorough = false;
        join(&mut rig, 2);
        rig.heat(&[0, 1], 1);
        rig.write(0, &[1; 12]);
        rig.write(X, &[2; 12]);
        rig.done(StoreOp::Snapshot { of: vec![(VOLUME, SNAPSHOT)] });
        rig.write(1, &[3]);
        rig.write(X + 1, &[3]);
        rig.zero(X + 2, 1);
        rig.flush();
        rig.ask_disks(DiskChange::Drain { disk: SECOND });
        for _ in 0..steps {
            rig.step();
        }
        let is_over = rig.disks_mut().all(|disk| disk.pending().next().is_none());
        if steps % 2 == 0 {
            rig.disks_mut().for_each(|disk| disk.kill(steps));
        } else {
            rig.disks_mut().for_each(|disk| disk.power_cut(steps));
        }
        let mut rig = rig.reopen();
        rig.thorough = true;
        rig.settle();
        assert_eq!((rig.bytes(0, 4), rig.bytes(X, 4)), (vec![1, 3, 1, 1], vec![2, 3, 0, 2]), "after {steps} steps");
        let Ok(StoreReply::Read { data, .. }) = rig.read_of(SNAPSHOT, 0, X + 12) else { panic!("it reads") };
        let bytes: Vec<u8> = data.as_slice().chunks_exact(BLOCK).map(uniform).collect();
        assert!(bytes[..12] == [1; 12] && bytes[X as usize..] == [2; 12], "after {steps} steps");
        if is_over {
            return;
        }
    }
    panic!("the move ends");
}

#[test]
fn a_snapshot_is_one_point_on_all_disks_whenever_a_crash_comes() {
    for steps in 0..120 {
        let mut rig = Rig::fresh();
        rig.thorough = false;
        join(&mut rig, 2);
        rig.heat(&[0, 1], 1);
        assert_eq!(extents(&rig), [1, 1]);
        rig.write(0, &[1]);
        rig.write(X, &[1]);
        rig.flush();
        let snapshot = rig.ask(StoreOp::Snapshot { of: vec![(VOLUME, SNAPSHOT)] });
        rig.ask(write_op(VOLUME, 0, filled(&[2])));
        rig.ask(write_op(VOLUME, X, filled(&[2])));
        for _ in 0..steps {
            rig.step();
        }
        let ended = rig.ended.contains_key(&snapshot);
        rig.disks_mut().for_each(|disk| disk.kill(steps));
        let mut rig = rig.reopen();
        let found = rig.store.volumes().any(|(volume, _, _)| volume == SNAPSHOT);
        assert!(found || !ended, "after {steps} steps it is gone");
        if found {
            for start in [0, X] {
                let Ok(StoreReply::Read { data, .. }) = rig.read_of(SNAPSHOT, start, 1) else { panic!("it reads") };
                assert_eq!(uniform(data.as_slice()), 1, "after {steps} steps");
            }
        }
        // Whoever was hot is hot.
        assert_eq!(rig.store.hot(VOLUME), [x(0), x(1)]);
        rig.done(StoreOp::Create { volume: VolumeId(9), group: GROUP, size: ByteCount(8 << 20) });
        rig.reopen();
    }
}

/// The second disk fails; the pool is opened again with the first.
fn with_a_disk_lost(rig: &mut Rig) -> Rig {
    rig.flush();
    rig.more[0].fail_next(OpClass::Write, DiskError::Io("gone".into(), 5));
    let hit: Vec<u32> = (0..8)
        .filter(|extent| {
            matches!(rig.end(write_op(VOLUME, u64::from(*extent) * X + 5, filled(&[9]))), Err(StoreError::Disk(_)))
        })
        .collect();
    assert!(!hit.is_empty() && rig.store.failed().is_some());
    while !rig.store.wants_reopening() {
        assert!(rig.step(), "the other disk is told");
    }
    rig.disk.kill(3);
    Rig::open(rig.disk.clone()).expect("the pool opens without the lost disk")
}

#[test]
fn a_failing_disk_takes_only_its_own_extents_and_they_can_be_healed() {
    let mut rig = two();
    rig.cool(&[0, 1, 2, 3, 4, 5, 6, 7]);
    rig.heat(&[0, 1, 2, 3, 4, 5, 6, 7], 2);
    let mut rig = with_a_disk_lost(&mut rig);
    let lost: Vec<u64> = (0..8).filter(|extent| rig.read_of(VOLUME, extent * X, 1).is_err()).collect();
    assert_eq!(lost.len(), 4, "half of them lived there");
    let kept: Vec<u64> = (0..8).filter(|extent| !lost.contains(extent)).collect();
    for round in 0..3 {
        for extent in &kept {
            assert_eq!(rig.bytes(extent * X, 1), [*extent as u8 + 1]);
        }
        for extent in &lost {
            assert_eq!(rig.corrupt(extent * X, 1), [range(extent * X, 1)]);
            assert!(rig.store.hot(VOLUME).contains(&x(*extent as u32)), "it may differ from the other replicas");
            assert_eq!(rig.store.status(VOLUME, range(extent * X, 1)), [(range(extent * X, 1), true)]);
            let sums = rig.end(StoreOp::Checksums { volume: VOLUME, extent: x(*extent as u32) });
            assert_eq!(sums, Ok(StoreReply::Checksums(vec![LOST_CHECKSUM; 1024])));
        }
        if round < 2 {
            rig.disk.power_cut(round);
            rig = rig.reopen();
        }
    }
    // One block of an extent was healed, then a crash: the others are lost still.
    let first = lost[0];
    rig.heat(&[first as u32], 3);
    rig.write(first * X, &[first as u8 + 1]);
    rig.flush();
    rig.disk.power_cut(7);
    let mut rig = rig.reopen();
    assert_eq!(rig.bytes(first * X, 1), [first as u8 + 1]);
    assert_eq!(rig.corrupt(first * X + 1, 1), [range(first * X + 1, 1)]);
    for extent in &lost {
        rig.heat(&[*extent as u32], 3);
        rig.zero(extent * X, X);
        rig.write(extent * X, &[*extent as u8 + 1]);
        rig.cool(&[*extent as u32]);
    }
    rig.settle();
    assert_whole(&mut rig);
    let mut rig = rig.reopen();
    assert_whole(&mut rig);
    assert_eq!(rig.store.disks().iter().filter(|disk| disk.state == DiskState::Failed).count(), 1);
    rig.done(StoreOp::Snapshot { of: vec![(VOLUME, SNAPSHOT)] });
    // And the pool can grow again.
    join(&mut rig, 3);
    assert_whole(&mut rig);
}

#[test]
fn disks_that_are_not_what_they_should_be_are_refused_with_a_clear_word() {
    let mut rig = two();
    rig.flush();
    let old = rig.more[0].clone();
    let disks = rig.into_disks();
    let open = |disks: &[&FaultyDisk]| Rig::open_all(disks.iter().map(|disk| (*disk).clone()).collect()).err();
    assert_eq!(open(&[&disks[0]]), Some(OpenError::DiskMissing { id: SECOND, path: "/dev/2".into() }));
    assert_eq!(
        open(&[&disks[0], &disks[1], &disks[1]]),
        Some(OpenError::Twice { disks: [1, 2], id: SECOND }),
        "a copy"
    );
    let other = PoolIdentity { pool: PoolId(5), disk: DiskId(7), ..IDENTITY };
    let mut stranger = blank();
    for op in Store::format(other, ByteCount(SIZE)).expect("a legal size") {
        let id = op.id;
        stranger.submit(op);
        stranger.complete(id);
    }
    let refused = open(&[&disks[0], &disks[1], &stranger]);
    assert_eq!(refused, Some(OpenError::OtherPool { disk: 2, found: PoolId(5), expected: IDENTITY.pool }));
    // The order does not matter.
    assert_eq!(open(&[&disks[1], &disks[0]]), None);
    // An image of an earlier day, when the pool was opened twice since.
    let mut rig = Rig::open_all(disks).expect("it opens").reopen();
    assert_whole(&mut rig);
    let disks = rig.into_disks();
    let refused = open(&[&disks[0], &old]);
    assert!(matches!(refused, Some(OpenError::OldImage { disk: 1, id: SECOND, .. })), "{refused:?}");
    let text = refused.map(|error| error.to_string()).unwrap_or_default();
    assert!(text.contains("image of an earlier day") && text.contains("put the real one back"), "{text}");
}

#[test]
fn a_disk_that_failed_is_not_taken_back_with_what_it_had() {
    let mut rig = two();
    let rig_now = with_a_disk_lost(&mut rig);
    let mut back = rig.more[0].clone();
    back.kill(1);
    let refused = Rig::open_all(vec![rig_now.disk, back]).err();
    assert_eq!(refused, Some(OpenError::Out { disk: 1, id: SECOND }));
}

#[test]
fn changes_of_disks_that_cannot_be_are_refused() {
    let mut rig = Rig::fresh();
    let refused = |ended: Result<(), String>, what: &str| match ended {
        Err(text) => assert!(text.contains(what), "{text}"),
        other => panic!("{other:?}"),
    };
    refused(rig.end_disks(DiskChange::Drain { disk: DiskId(1) }), "only disk");
    join(&mut rig, 2);
    refused(rig.end_disks(DiskChange::Drain { disk: DiskId(9) }), "no disk");
    rig.more.push(blank());
    let twice = DiskChange::Join { disk: SECOND, size: ByteCount(SIZE), path: String::new(), may_overwrite: false };
    refused(rig.end_disks(twice), "already");
    let small =
        DiskChange::Join { disk: DiskId(3), size: ByteCount(1 << 20), path: String::new(), may_overwrite: false };
    refused(rig.end_disks(small), "too small");
    rig.more.pop();
    // More than the other disk has room for.
    rig.done(StoreOp::Create { volume: VolumeId(2), group: GroupId(2), size: ByteCount(SIZE) });
    let volume = VolumeId(2);
    let mut extent = 0;
    while rig.store.free().0 > SIZE / 2 {
        rig.done(StoreOp::Heat { volume, extents: vec![x(extent)], generation: gen_(1) });
        rig.done(write_op(volume, u64::from(extent) * X, pollux_base::Data::zeroed(1024 * BLOCK)));
        extent += 1;
    }
    refused(rig.end_disks(DiskChange::Drain { disk: SECOND }), "add a disk first");
}

#[test]
fn a_write_over_two_disks_of_which_one_fails_is_an_error_whichever_ends_last() {
    for failing in 0..2 {
        for seed in 0..6 {
            let mut rig = two();
            rig.flush();
            let id = rig.ask(write_op(VOLUME, X - 1, filled(&[9, 9])));
            // The one that is to fail does so first or last.
            let mut order = [failing, 1 - failing];
            if seed % 2 == 1 {
                order.reverse();
            }
            let failure = DiskError::Io("gone".into(), 5);
            rig.disks_mut().nth(failing).expect("there are two").fail_next(OpClass::Write, failure);
            for at in order {
                let done = rig.disks_mut().nth(at).and_then(FaultyDisk::complete_any);
                done.into_iter()
                    .for_each(|done| rig.store.handle(pollux_base::Instant(0), pollux_store::Input::Disk(done)));
                rig.drain();
            }
            rig.settle();
            assert!(matches!(rig.ended.remove(&id), Some(Err(StoreError::Disk(_)))), "disk {failing}, {order:?}");
        }
    }
}

/// Found by random histories: a copy that had arrived counted as half when the disk that it came from was gone, and was forgotten.
#[test]
fn what_has_arrived_is_kept_when_the_disk_that_it_came_from_has_left() {
    for steps in 0.. {
        let mut rig = two();
        join(&mut rig, 3);
        assert_eq!(rig.end_disks(DiskChange::Drain { disk: SECOND }), Ok(()));
        let left = |rig: &Rig| extents(rig)[1];
        let is_drained = (0..steps).any(|_| !rig.step());
        let mut rig = rig.reopen();
        assert_whole(&mut rig);
        if left(&rig) > 0 {
            assert_eq!(rig.end_disks(DiskChange::Undrain { disk: SECOND }), Ok(()));
        } else {
            assert_eq!(rig.end_disks(DiskChange::Remove { disk: SECOND }), Ok(()));
            rig.more.remove(0);
        }
        assert_whole(&mut rig.reopen());
        if is_drained {
            return;
        }
    }
}

const CLONE: VolumeId = VolumeId(60);
const OTHERS: GroupId = GroupId(60);

fn is_lost(rig: &mut Rig, volume: VolumeId, extent: u64) -> bool {
    match rig.read_of(volume, extent * X, 1) {
        Ok(_) => false,
        Err(StoreError::Corrupt(ranges)) if ranges == [range(extent * X, 1)] => true,
        other => panic!("{volume} {extent}: {other:?}"),
    }
}

/// Zeroes what was lost of an extent of a volume, as a copy from another replica would.
fn heal(rig: &mut Rig, volume: VolumeId, extent: u64, byte: u8) {
    rig.done(StoreOp::Heat { volume, extents: vec![x(extent as u32)], generation: gen_(3) });
    rig.done(StoreOp::Zero { volume, range: range(extent * X, X) });
    rig.done(write_op(volume, extent * X, filled(&[byte])));
    rig.done(StoreOp::Cool { volume, extents: vec![x(extent as u32)] });
    rig.settle();
}

/// A replica that lost a disk makes snapshots when it comes back, so that its volumes have the right shape to be healed. Found by the
/// simulator: it could not, and stayed stale for ever.
#[test]
fn snapshots_clones_and_rollbacks_of_what_is_lost_are_lost_too_and_healed_each_by_itself() {
    let mut rig = two();
    let mut rig = with_a_disk_lost(&mut rig);
    let lost: Vec<u64> = (0..8).filter(|extent| is_lost(&mut rig, VOLUME, *extent)).collect();
    let (one, two) = (lost[0], lost[1]);
    rig.done(StoreOp::Snapshot { of: vec![(VOLUME, SNAPSHOT)] });
    rig.done(StoreOp::Clone { of: SNAPSHOT, volume: CLONE, group: OTHERS, generation: gen_(1) });
    let all = [VOLUME, SNAPSHOT, CLONE];
    let mut rig = rig.reopen();
    for volume in all {
        assert!(lost.iter().all(|extent| is_lost(&mut rig, volume, *extent)), "{volume}");
    }
    // The clone first: what it shares is lost for the others still.
    heal(&mut rig, CLONE, one, 7);
    for _ in 0..2 {
        assert!(!is_lost(&mut rig, CLONE, one) && is_lost(&mut rig, SNAPSHOT, one) && is_lost(&mut rig, VOLUME, one));
        assert!(rig.store.changed_since(SNAPSHOT, gen_(99)).contains(&x(one as u32)), "what is lost is to be compared");
        rig.disk.power_cut(1);
        rig = rig.reopen();
    }
    heal(&mut rig, SNAPSHOT, one, one as u8 + 1);
    assert!(is_lost(&mut rig, VOLUME, one), "nobody can tell any more that it is the same");
    assert!(!rig.store.changed_since(SNAPSHOT, gen_(99)).contains(&x(one as u32)), "nothing is lost there any more");
    // What was lost of the volume is not found in an older snapshot.
    rig.done(StoreOp::Rollback { volume: VOLUME, snapshot: SNAPSHOT, generation: gen_(4), also: Vec::new() });
    assert!(is_lost(&mut rig, VOLUME, two) && !is_lost(&mut rig, VOLUME, one));
    heal(&mut rig, VOLUME, two, two as u8 + 1);
    rig.done(StoreOp::Delete { volume: SNAPSHOT });
    rig.done(StoreOp::Delete { volume: CLONE });
    rig.settle();
    let mut rig = rig.reopen();
    for extent in &lost[2..] {
        assert!(is_lost(&mut rig, VOLUME, *extent));
        heal(&mut rig, VOLUME, *extent, *extent as u8 + 1);
    }
    assert_whole(&mut rig);
    assert_whole(&mut rig.reopen());
}

/// Of a volume that was written to after its snapshot both are lost; the older state, when it is healed, is not the newer one.
#[test]
fn a_volume_that_is_lost_does_not_show_its_healed_snapshot() {
    let mut rig = two();
    rig.done(StoreOp::Snapshot { of: vec![(VOLUME, SNAPSHOT)] });
    (0..8).for_each(|extent| rig.write(extent * X, &[99]));
    let mut rig = with_a_disk_lost(&mut rig);
    let extent = (0..8).find(|extent| is_lost(&mut rig, VOLUME, *extent)).expect("half of them are");
    heal(&mut rig, SNAPSHOT, extent, 1);
    let shown = rig.read_of(VOLUME, extent * X, 1).is_ok();
    assert!(!shown, "it held 99");
}

/// At each moment of the first healing a crash leaves it lost or healed, for each volume.
#[test]
fn a_crash_while_what_is_lost_gets_a_home_forgets_nothing_of_it() {
    for steps in 0..40 {
        let mut rig = two();
        let mut rig = with_a_disk_lost(&mut rig);
        rig.done(StoreOp::Snapshot { of: vec![(VOLUME, SNAPSHOT)] });
        let extent = (0..8).find(|extent| is_lost(&mut rig, VOLUME, *extent)).expect("half of them are");
        let heat = rig.ask(StoreOp::Heat { volume: VOLUME, extents: vec![x(extent as u32)], generation: gen_(3) });
        rig.ask(StoreOp::Snapshot { of: vec![(VOLUME, VolumeId(51))] });
        for _ in 0..steps {
            rig.step();
        }
        let is_done = rig.ended.contains_key(&heat);
        rig.disk.power_cut(steps);
        let mut rig = rig.reopen();
        assert!(is_lost(&mut rig, VOLUME, extent) && is_lost(&mut rig, SNAPSHOT, extent), "after {steps} steps");
        assert!(!is_done || rig.store.hot(VOLUME).contains(&x(extent as u32)), "after {steps} steps");
    }
}

/// A snapshot is smaller than its volume that has grown since: what lies behind its end nobody could ever heal.
#[test]
fn a_replica_is_whole_again_when_snapshots_of_a_smaller_size_are_healed() {
    let (size, grown) = (ByteCount(5 << 20), ByteCount(8 << 20));
    let of = |number: u64| (VolumeId(70 + number), VolumeId(80 + number));
    let mut rig = two();
    for (volume, snapshot) in (0..4).map(of) {
        rig.done(StoreOp::Create { volume, group: OTHERS, size });
        rig.done(StoreOp::Heat { volume, extents: vec![x(0), x(1)], generation: gen_(1) });
        rig.done(write_op(volume, X, filled(&[4])));
        rig.done(StoreOp::Snapshot { of: vec![(volume, snapshot)] });
        rig.done(StoreOp::Create { volume, group: OTHERS, size: grown });
    }
    let mut rig = with_a_disk_lost(&mut rig);
    assert!(rig.store.is_incomplete(OTHERS) && rig.store.is_incomplete(GROUP));
    let mut healed = 0;
    for (volume, blocks) in (0..4).map(of).flat_map(|(volume, snapshot)| [(snapshot, 1280), (volume, 2048)]) {
        for extent in (0..2).filter(|extent| is_lost(&mut rig, volume, *extent)).collect::<Vec<_>>() {
            rig.done(StoreOp::Heat { volume, extents: vec![x(extent as u32)], generation: gen_(3) });
            rig.done(StoreOp::Zero { volume, range: range(extent * X, X.min(blocks - extent * X)) });
            rig.done(StoreOp::Cool { volume, extents: vec![x(extent as u32)] });
            healed += extent;
        }
    }
    rig.settle();
    assert!(healed > 0, "some of the last extents lived there");
    assert!(!rig.store.is_incomplete(OTHERS), "all of it is healed");
    assert!(rig.store.is_incomplete(GROUP), "nothing of that is");
}

/// A second disk fails before what the first one had is healed: all of it is remembered.
#[test]
fn what_two_disks_had_is_missed_until_all_of_it_is_healed() {
    for last in 0..8 {
        let mut rig = Rig::fresh();
        join(&mut rig, 2);
        join(&mut rig, 3);
        rig.heat(&[0, 1, 2, 3, 4, 5, 6, 7], 1);
        (0..8).for_each(|extent| rig.write(extent * X, &[extent as u8 + 1]));
        let fail = |rig: &mut Rig, at: usize, extents: &[u64]| {
            rig.flush();
            rig.more[at].fail_next(OpClass::Write, DiskError::Io("gone".into(), 5));
            for extent in extents {
                drop(rig.end(write_op(VOLUME, extent * X + 5, filled(&[9]))));
            }
            while !rig.store.wants_reopening() {
                assert!(rig.step(), "the others are told");
            }
        };
        fail(&mut rig, 0, &[0, 1, 2, 3, 4, 5, 6, 7]);
        let mut disks = rig.into_disks();
        disks.remove(1);
        disks.iter_mut().for_each(|disk| disk.kill(3));
        let mut rig = Rig::open_all(disks).expect("two are left");
        let mut lost: Vec<u64> = (0..8).filter(|extent| is_lost(&mut rig, VOLUME, *extent)).collect();
        // They get homes, on both disks, and are not healed.
        let before = extents(&rig);
        lost.iter().for_each(|extent| rig.heat(&[*extent as u32], 2));
        assert!(extents(&rig).iter().zip(before).all(|(now, before)| *now > before), "each disk has some");
        fail(&mut rig, 0, &[0, 1, 2, 3, 4, 5, 6, 7]);
        let mut disks = rig.into_disks();
        disks.truncate(1);
        disks.iter_mut().for_each(|disk| disk.kill(4));
        let mut rig = Rig::open_all(disks).expect("one is left");
        let kept = lost.len();
        lost.extend((0..8).filter(|extent| is_lost(&mut rig, VOLUME, *extent)));
        lost.sort_unstable();
        lost.dedup();
        assert!(lost.len() > kept, "the third disk had some of its own");
        lost.sort_by_key(|extent| *extent == last);
        for extent in &lost {
            assert!(rig.store.is_incomplete(GROUP), "{extent} is not healed");
            heal(&mut rig, VOLUME, *extent, 1);
        }
        assert!(!rig.store.is_incomplete(GROUP));
    }
}
