//! What people do to the disks of a pool: what may join, what is let go, and what is told of each disk.

mod common;

use common::*;
use pollux_base::pool::{DiskReport, DiskState};
use pollux_base::{ByteCount, DiskError, DiskId, DiskOp, DiskOpId, DiskOpKind, PoolId, VolumeId};
use pollux_store::faulty_disk::{FaultyDisk, OpClass};
use pollux_store::{DiskChange, LOST_CHECKSUM, OpenError, PoolIdentity, Store, StoreError, StoreOp, StoreReply};

const SECOND: DiskId = DiskId(2);
/// Blocks of an extent.
const X: u64 = 1024;

fn blank() -> FaultyDisk {
    FaultyDisk::new(SIZE, 9)
}

fn perform(disk: &mut FaultyDisk, ops: impl IntoIterator<Item = DiskOp>) {
    for op in ops {
        let id = op.id;
        disk.submit(op);
        disk.complete(id);
    }
}

fn write_raw(disk: &mut FaultyDisk, offset: u64, byte: u8) {
    let kind = DiskOpKind::Write { offset: ByteCount(offset), data: vec![filled(&[byte])], sync: true };
    perform(disk, [DiskOp { id: DiskOpId::new(1), kind }]);
}

fn join_as(disk: u128, may_overwrite: bool) -> DiskChange {
    DiskChange::Join { disk: DiskId(disk), size: ByteCount(SIZE), path: format!("/dev/{disk}"), may_overwrite }
}

/// Two disks, and a volume of eight extents with a block in each: half of them live on each disk.
fn two() -> Rig {
    let mut rig = Rig::fresh();
    rig.more.push(blank());
    assert_eq!(rig.end_disks(join_as(2, false)), Ok(()));
    rig.heat(&[0, 1, 2, 3, 4, 5, 6, 7], 1);
    (0..8).for_each(|extent| rig.write(extent * X, &[extent as u8 + 1]));
    rig
}

fn told(rig: &Rig, disk: DiskId) -> Option<DiskReport> {
    rig.store.disks().into_iter().find(|told| told.disk == disk)
}

fn state(rig: &Rig, disk: DiskId) -> Option<DiskState> {
    told(rig, disk).map(|told| told.state)
}

fn refused(ended: Result<(), String>, what: &str) {
    match ended {
        Err(text) => assert!(text.contains(what), "{text}"),
        Ok(()) => panic!("not refused: {what}"),
    }
}

#[test]
fn what_is_on_a_disk_decides_whether_it_may_join() {
    let mut rig = two();
    rig.flush();
    // A file system, or whatever it is: at its very beginning, or elsewhere in what is looked at.
    for offset in [0, 512 << 10, 1 << 20] {
        let mut used = blank();
        write_raw(&mut used, offset, 7);
        rig.more.truncate(1);
        rig.more.push(used);
        refused(rig.end_disks(join_as(3, false)), "not empty");
        assert_eq!(rig.store.next_disk().map(|next| next.index()), Some(2), "its number is free again");
    }
    // A copy of one of the pool's own, whatever is asked for.
    for may_overwrite in [false, true] {
        rig.more.truncate(1);
        let copy = rig.more[0].clone();
        rig.more.push(copy);
        refused(rig.end_disks(join_as(3, may_overwrite)), "belongs to this pool already");
        let mut stranger = blank();
        let other = PoolIdentity { pool: PoolId(5), disk: DiskId(7), ..IDENTITY };
        perform(&mut stranger, Store::format(other, ByteCount(SIZE)).expect("a legal size"));
        rig.more.truncate(1);
        rig.more.push(stranger);
        refused(
            rig.end_disks(join_as(3, may_overwrite)),
            "belongs to pool 00000000000000000000000000000005 of node n1",
        );
    }
    // One that cannot be read is not taken for blank.
    rig.more.truncate(1);
    let mut broken = blank();
    broken.fail_next(OpClass::Read, DiskError::Io("gone".into(), 5));
    rig.more.push(broken);
    refused(rig.end_disks(join_as(3, true)), "gone");
    let mut used = blank();
    write_raw(&mut used, 0, 7);
    rig.more.truncate(1);
    rig.more.push(used);
    assert_eq!(rig.end_disks(join_as(3, true)), Ok(()), "it was asked for");
    assert_eq!(state(&rig, DiskId(3)), Some(DiskState::Healthy));
    let mut rig = rig.reopen();
    (0..8).for_each(|extent| assert_eq!(rig.bytes(extent * X, 1), [extent as u8 + 1]));
}

#[test]
fn requests_are_not_held_up_while_a_disk_is_looked_at() {
    let mut rig = Rig::fresh();
    rig.heat(&[0], 1);
    rig.more.push(blank());
    let joined = rig.ask_disks(join_as(2, false));
    assert_eq!(rig.store.next_disk(), None, "one at a time");
    let write = rig.ask(write_op(VOLUME, 0, filled(&[5])));
    // The new disk does not answer yet.
    while !rig.ended.contains_key(&write) {
        let done = rig.disk.complete_any().expect("the write is under way");
        rig.store.handle(pollux_base::Instant(0), pollux_store::Input::Disk(done));
        rig.drain();
    }
    assert!(!rig.changed.contains_key(&joined));
    rig.settle();
    assert_eq!(rig.changed.remove(&joined), Some(Ok(())));
    assert_eq!(rig.bytes(0, 1), [5]);
}

#[test]
fn a_disk_is_told_of_from_when_it_joins_until_it_has_left() {
    let mut rig = two();
    let healthy = told(&rig, SECOND).expect("it is a member");
    assert_eq!((healthy.state, healthy.extents, healthy.path.as_str()), (DiskState::Healthy, 4, "/dev/2"));
    assert!(healthy.used_bytes > 0 && healthy.used_bytes < healthy.capacity_bytes);
    assert!(healthy.capacity_bytes < healthy.size_bytes && healthy.size_bytes == SIZE);
    refused(rig.end_disks(DiskChange::Remove { disk: SECOND }), "drain it first");
    let word = rig.store.state_word();
    assert_eq!(rig.end_disks(DiskChange::Drain { disk: SECOND }), Ok(()));
    assert_eq!(state(&rig, SECOND), Some(DiskState::Draining));
    assert_ne!(rig.store.state_word(), word);
    refused(rig.end_disks(DiskChange::Remove { disk: SECOND }), "wait until it is drained");
    rig.settle();
    let drained = told(&rig, SECOND).expect("it is a member");
    assert_eq!((drained.state, drained.extents, drained.used_bytes), (DiskState::Drained, 0, 0));
    assert_eq!(rig.end_disks(DiskChange::Remove { disk: SECOND }), Ok(()));
    assert_eq!(state(&rig, SECOND), None);
    refused(rig.end_disks(DiskChange::Drain { disk: SECOND }), "no disk");
    // The same disk may come again; what it held is still there, so it must be asked for.
    assert_eq!(rig.store.next_disk().map(|next| next.index()), Some(2));
    let back = rig.more[0].clone();
    rig.more.push(back);
    refused(rig.end_disks(join_as(4, false)), "not empty");
    assert_eq!(rig.end_disks(join_as(4, true)), Ok(()));
    (0..8).for_each(|extent| assert_eq!(rig.bytes(extent * X, 1), [extent as u8 + 1]));
}

/// Seen in the lab: of a disk with nothing on it, which was drained, it was told for ever that it is healthy.
#[test]
fn whenever_a_disk_is_told_otherwise_the_word_is_another() {
    for extents in [0u32, 8] {
        let mut rig = Rig::fresh();
        rig.more.push(blank());
        let mut last = None;
        let mut look = |rig: &Rig| {
            let told: Vec<(DiskId, DiskState)> = rig.store.disks().iter().map(|disk| (disk.disk, disk.state)).collect();
            let now = (rig.store.state_word(), told);
            if let Some((word, before)) = last.replace(now.clone()) {
                assert!(word != now.0 || before == now.1, "{before:?} became {:?} without a word", now.1);
            }
        };
        let drains = [DiskChange::Drain { disk: SECOND }, DiskChange::Undrain { disk: SECOND }];
        let drained = [DiskChange::Drain { disk: SECOND }, DiskChange::Remove { disk: SECOND }];
        for (at, change) in [join_as(2, false)].into_iter().chain(drains).chain(drained).enumerate() {
            let id = rig.ask_disks(change);
            look(&rig);
            while rig.step() {
                look(&rig);
            }
            assert_eq!(rig.changed.remove(&id), Some(Ok(())));
            if at == 0 {
                rig.heat(&(0..extents).collect::<Vec<u32>>(), 1);
                (0..u64::from(extents)).for_each(|extent| rig.write(extent * X, &[1]));
                look(&rig);
            }
        }
    }
}

#[test]
fn a_removal_that_is_cut_short_leaves_a_pool_that_opens_with_and_without_the_disk() {
    let mut is_over = false;
    for steps in 0..200 {
        let mut rig = two();
        rig.thorough = false;
        assert_eq!(rig.end_disks(DiskChange::Drain { disk: SECOND }), Ok(()));
        rig.settle();
        let removed = rig.ask_disks(DiskChange::Remove { disk: SECOND });
        (0..steps).for_each(|_| _ = rig.step());
        is_over = rig.changed.contains_key(&removed);
        rig.disks_mut().for_each(|disk| disk.power_cut(steps));
        let disks = rig.into_disks();
        let alone = Rig::open(disks[0].clone());
        if let Err(error) = &alone {
            assert!(!is_over && matches!(error, OpenError::DiskMissing { id: SECOND, .. }), "{error}");
        }
        let both = Rig::open_all(disks);
        if let Err(error) = &both {
            assert!(alone.is_ok() && matches!(error, OpenError::OneDisk { disk: 1, .. }), "{error}");
        }
        for mut rig in [alone.ok(), both.ok()].into_iter().flatten() {
            (0..8).for_each(|extent| assert_eq!(rig.bytes(extent * X, 1), [extent as u8 + 1]));
        }
        if is_over {
            break;
        }
    }
    assert!(is_over, "it ends at last");
}

#[test]
fn errors_are_counted_for_the_disk_that_made_them() {
    let mut rig = two();
    rig.cool(&[0, 1, 2, 3, 4, 5, 6, 7]);
    assert!(rig.store.disks().iter().all(|disk| (disk.checksum_errors, disk.io_errors) == (0, 0)));
    let before = rig.store.errors();
    rig.disk.fail_next(OpClass::Read, DiskError::Io("bad spot".into(), 5));
    let bad: Vec<u64> = (0..8).filter(|extent| rig.read_of(VOLUME, extent * X, 1).is_err()).collect();
    assert_eq!(bad.len(), 1);
    let io_errors: Vec<u64> = [DiskId(1), SECOND].iter().filter_map(|id| Some(told(&rig, *id)?.io_errors)).collect();
    assert_eq!(io_errors, [1, 0]);
    assert_eq!(rig.store.errors(), before + 1);
}

#[test]
fn a_disk_that_is_gone_when_it_is_read_is_out_like_one_that_cannot_be_written() {
    let mut rig = two();
    rig.cool(&[0, 1, 2, 3, 4, 5, 6, 7]);
    rig.flush();
    rig.more[0].fail_next(OpClass::Read, DiskError::Short { expected: BLOCK, actual: 0 });
    let hit: Vec<u64> = (0..8).filter(|extent| rig.read_of(VOLUME, extent * X, 1).is_err()).collect();
    assert_eq!(hit.len(), 4, "what lived there");
    while !rig.store.wants_reopening() {
        assert!(rig.step(), "the other disk is told");
    }
    assert_eq!(state(&rig, SECOND), Some(DiskState::Failed));
    let mut rig = Rig::open(rig.disk.clone()).expect("the pool opens without it");
    assert_eq!((0..8).filter(|extent| rig.read_of(VOLUME, extent * X, 1).is_err()).count(), 4);
}

/// The pool is opened with its first disk only, and the other is let go.
fn let_go(disk: FaultyDisk) -> Rig {
    let mut rig = Rig::opening(disk);
    rig.settle();
    assert!(matches!(rig.opened, Some(Err(OpenError::DiskMissing { id: SECOND, .. }))));
    assert_eq!(state(&rig, SECOND), Some(DiskState::Missing));
    refused(rig.end_disks(DiskChange::LetGo { disk: DiskId(1) }), "is missing");
    refused(rig.end_disks(DiskChange::Remove { disk: SECOND }), "is missing");
    assert_eq!(rig.store.next_disk(), None);
    assert_eq!(rig.end_disks(DiskChange::LetGo { disk: SECOND }), Ok(()));
    assert!(rig.store.wants_reopening());
    Rig::open_all(rig.into_disks()).expect("it opens without the disk")
}

#[test]
fn a_disk_that_is_missing_for_good_is_let_go_and_what_it_had_is_known_to_be_lost() {
    let mut rig = two();
    rig.cool(&[0, 1, 2, 3, 4, 5, 6, 7]);
    rig.flush();
    refused(rig.end_disks(DiskChange::LetGo { disk: SECOND }), "not missing");
    let mut disks = rig.into_disks();
    let gone = disks.remove(1);
    let mut rig = let_go(disks.remove(0));
    assert_eq!(state(&rig, SECOND), None);
    let lost: Vec<u64> = (0..8).filter(|extent| rig.read_of(VOLUME, extent * X, 1).is_err()).collect();
    assert_eq!(lost.len(), 4, "half of them lived there");
    for extent in 0..8 {
        match lost.contains(&extent) {
            true => {
                assert!(rig.store.hot(VOLUME).contains(&x(extent as u32)), "it may differ from the other replicas");
                let sums = rig.end(StoreOp::Checksums { volume: VOLUME, extent: x(extent as u32) });
                assert_eq!(sums, Ok(StoreReply::Checksums(vec![LOST_CHECKSUM; 1024])));
            }
            false => assert_eq!(rig.bytes(extent * X, 1), [extent as u8 + 1]),
        }
    }
    for extent in &lost {
        rig.heat(&[*extent as u32], 3);
        rig.zero(extent * X, X);
        rig.write(extent * X, &[*extent as u8 + 1]);
        rig.cool(&[*extent as u32]);
    }
    rig.flush();
    let mut rig = rig.reopen();
    (0..8).for_each(|extent| assert_eq!(rig.bytes(extent * X, 1), [extent as u8 + 1]));
    // Should it turn up after all, it is no part of the pool.
    let mut disks = rig.into_disks();
    disks.push(gone);
    let mut rig = Rig::open_all(disks).expect("it opens");
    assert_eq!(rig.store.strangers().map(|disk| disk.index()).collect::<Vec<_>>(), [1]);
    (0..8).for_each(|extent| assert_eq!(rig.bytes(extent * X, 1), [extent as u8 + 1]));
}

#[test]
fn letting_go_that_is_cut_short_is_done_or_can_be_asked_for_again() {
    for steps in 0..60 {
        let mut rig = two();
        rig.thorough = false;
        rig.flush();
        let mut rig = Rig::opening(rig.into_disks().remove(0));
        rig.settle();
        let id = rig.ask_disks(DiskChange::LetGo { disk: SECOND });
        (0..steps).for_each(|_| _ = rig.step());
        let is_over = rig.changed.contains_key(&id);
        rig.disk.power_cut(steps);
        let mut rig = match Rig::open(rig.disk.clone()) {
            Ok(rig) => rig,
            Err(error) => {
                assert!(!is_over && matches!(error, OpenError::DiskMissing { .. }), "{error}");
                let_go(rig.disk)
            }
        };
        let lost = (0..8).filter(|extent| rig.read_of(VOLUME, extent * X, 1).is_err()).count();
        assert_eq!(lost, 4, "after {steps} steps");
        if is_over {
            return;
        }
    }
    panic!("it ends at last");
}

#[test]
fn a_disk_that_failed_is_spoken_of_until_it_is_removed() {
    let mut rig = two();
    rig.flush();
    rig.more[0].fail_next(OpClass::Write, DiskError::Io("gone".into(), 5));
    let hit = (0..8)
        .any(|extent| matches!(rig.end(write_op(VOLUME, extent * X + 5, filled(&[9]))), Err(StoreError::Disk(_))));
    assert!(hit);
    while !rig.store.wants_reopening() {
        assert!(rig.step(), "the other disk is told");
    }
    assert_eq!(state(&rig, SECOND), Some(DiskState::Failed));
    let mut disks = rig.into_disks();
    disks.iter_mut().for_each(|disk| disk.kill(1));
    let failed = disks.remove(1);
    let mut rig = Rig::open(disks.remove(0)).expect("the pool opens without the failed disk");
    assert_eq!(state(&rig, SECOND), Some(DiskState::Failed));
    rig.more.push(failed.clone());
    refused(rig.end_disks(join_as(3, false)), "failed; give --overwrite");
    rig.more.pop();
    assert_eq!(rig.end_disks(DiskChange::Remove { disk: SECOND }), Ok(()));
    assert_eq!(state(&rig, SECOND), None);
    refused(rig.end_disks(DiskChange::Remove { disk: SECOND }), "no disk");
    let lost = |rig: &mut Rig| (0..8).filter(|extent| rig.read_of(VOLUME, extent * X, 1).is_err()).count();
    assert_eq!(lost(&mut rig), 4, "what it had is still known to be lost");
    let mut rig = rig.reopen();
    assert_eq!((lost(&mut rig), state(&rig, SECOND)), (4, None));
    rig.more.push(failed);
    assert_eq!(rig.end_disks(join_as(3, false)), Ok(()));
    assert_eq!(lost(&mut rig.reopen()), 4);
}

#[test]
fn the_path_that_is_told_is_the_one_where_a_disk_was_found_last() {
    let mut rig = two();
    rig.flush();
    let mut rig = Rig::opening_all(rig.into_disks(), CLUSTER, NODE);
    rig.store.found_at(&["/dev/x".into(), "/dev/y".into()]);
    rig.settle();
    assert_eq!(told(&rig, SECOND).map(|told| told.path), Some("/dev/y".into()));
    let missed = Rig::open(rig.into_disks().remove(0)).err();
    assert_eq!(missed, Some(OpenError::DiskMissing { id: SECOND, path: "/dev/y".into() }), "all remember it");
}

#[test]
fn nothing_is_lost_behind_the_end_of_a_volume() {
    let mut rig = Rig::fresh();
    rig.more.push(blank());
    assert_eq!(rig.end_disks(join_as(2, false)), Ok(()));
    // A volume that ends within an extent, on the disk that will be gone.
    let (volume, blocks) = (VolumeId(9), 5);
    rig.done(StoreOp::Create { volume, group: GROUP, size: ByteCount(blocks * BLOCK as u64) });
    let heat = |generation| StoreOp::Heat { volume, extents: vec![x(0)], generation: gen_(generation) };
    rig.heat(&[0, 1], 1);
    rig.done(heat(1));
    rig.done(write_op(volume, 0, filled(&[1, 2, 3, 4, 5])));
    rig.flush();
    let disks = rig.into_disks();
    for gone in 0..2 {
        let mut rig = Rig::opening(disks[1 - gone].clone());
        rig.settle();
        let disk = DiskId(gone as u128 + 1);
        assert_eq!(rig.end_disks(DiskChange::LetGo { disk }), Ok(()));
        let mut rig = Rig::open_all(rig.into_disks()).expect("it opens without the disk");
        if rig.read_of(volume, 0, blocks).is_ok() {
            continue;
        }
        let lost = |rig: &mut Rig| match rig.end(StoreOp::Checksums { volume, extent: x(0) }) {
            Ok(StoreReply::Checksums(sums)) => sums.iter().filter(|sum| **sum == LOST_CHECKSUM).count(),
            other => panic!("{other:?}"),
        };
        assert_eq!(lost(&mut rig), blocks as usize);
        rig.done(heat(2));
        assert_eq!(lost(&mut rig), blocks as usize);
        let mut rig = rig.reopen();
        assert_eq!(lost(&mut rig), blocks as usize);
        // It can be moved while it is lost.
        rig.more.push(blank());
        assert_eq!(rig.end_disks(join_as(7, false)), Ok(()));
        let present = DiskId(2 - gone as u128);
        assert_eq!(rig.end_disks(DiskChange::Drain { disk: present }), Ok(()));
        rig.settle();
        assert_eq!(state(&rig, present), Some(DiskState::Drained));
        assert_eq!(lost(&mut rig), blocks as usize);
        rig.done(heat(3));
        rig.done(write_op(volume, 0, filled(&[1, 2, 3, 4, 5])));
        assert_eq!(lost(&mut rig), 0);
        return;
    }
    panic!("it lived on one of them");
}

#[test]
fn nothing_joins_a_pool_whose_only_disk_has_failed() {
    let mut rig = Rig::fresh();
    rig.heat(&[0], 1);
    rig.disk.fail_next(OpClass::Write, DiskError::Io("gone".into(), 5));
    assert!(matches!(rig.end(write_op(VOLUME, 0, filled(&[1]))), Err(StoreError::Disk(_))));
    assert_eq!(rig.store.next_disk(), None);
    refused(rig.end_disks(DiskChange::Drain { disk: DiskId(1) }), "gone");
    assert_eq!(state(&rig, DiskId(1)), Some(DiskState::Failed));
}
