//! A disk of several that is full: what finds no room there moves to a disk that has some, and wherever a move is cut short each
//! extent is found whole, or known to be lost.

mod common;

use common::*;
use pollux_base::{ByteCount, DiskError, DiskId, VolumeId};
use pollux_store::faulty_disk::{FaultyDisk, OpClass};
use pollux_store::{DiskChange, StoreError, StoreOp, StoreReply};

/// Blocks of an extent.
const X: u64 = 1024;
/// Half of each of its extents is filled until there is no room.
const WIDE: VolumeId = VolumeId(7);
/// Takes what is left.
const FILLER: VolumeId = VolumeId(8);

fn join(rig: &mut Rig, disk: u128, size: u64) {
    rig.more.push(FaultyDisk::new(size, 9));
    let path = format!("/dev/{disk}");
    let change = DiskChange::Join { disk: DiskId(disk), size: ByteCount(size), path, may_overwrite: false };
    assert_eq!(rig.end_disks(change), Ok(()));
}

fn create(rig: &mut Rig, volume: VolumeId) {
    rig.done(StoreOp::Create { volume, group: GROUP, size: ByteCount(256 << 20) });
}

fn write(rig: &mut Rig, volume: VolumeId, start: u64, count: u64, byte: u8) -> Ended {
    let extents = range(start, count).extents().collect();
    rig.done(StoreOp::Heat { volume, extents, generation: gen_(1) });
    rig.end(write_op(volume, start, filled(&vec![byte; count as usize])))
}

fn is_full(ended: &Ended) -> bool {
    match ended {
        Ok(_) => false,
        Err(StoreError::Full) => true,
        other => panic!("{other:?}"),
    }
}

/// Writes the first `count` blocks of one extent after the other until there is no room. Gives how many it were.
fn fill(rig: &mut Rig, volume: VolumeId, count: u64) -> u64 {
    (0..).find(|extent| is_full(&write(rig, volume, extent * X, count, *extent as u8 + 1))).expect("it is full at last")
}

fn filled_up() -> (Rig, u64) {
    let mut rig = Rig::fresh();
    rig.thorough = false;
    create(&mut rig, WIDE);
    let extents = fill(&mut rig, WIDE, X / 2);
    assert!(extents > 4, "{extents}");
    (rig, extents)
}

/// Whatever is left is taken by a last extent.
fn fill_rest(rig: &mut Rig, volume: VolumeId, extent: u64) {
    (0..X / 8)
        .find(|part| is_full(&write(rig, volume, extent * X + part * 8, 8, 9)))
        .expect("there is less than an extent");
}

fn first_byte(rig: &mut Rig, volume: VolumeId, block: u64) -> Result<u8, StoreError> {
    rig.read_of(volume, block, 1).map(|reply| match reply {
        StoreReply::Read { data, .. } => uniform(data.as_slice()),
        other => panic!("{other:?}"),
    })
}

fn columns(rig: &Rig) -> Vec<u64> {
    rig.store.disks().into_iter().map(|disk| disk.extents).collect()
}

/// Found by a client of a site: a write into an extent of the full disk waited for ever, however many disks joined.
#[test]
fn what_finds_no_room_on_its_own_disk_goes_on_after_a_disk_has_joined() {
    let (mut rig, extents) = filled_up();
    // By then the disk has room for some; not for all.
    let second_half = |rig: &mut Rig, extent: u64| write(rig, WIDE, extent * X + X / 2, X / 2, 100 + extent as u8);
    let mut waits: Vec<u64> = (0..extents).filter(|extent| is_full(&second_half(&mut rig, *extent))).collect();
    assert!(!waits.is_empty());
    join(&mut rig, 2, 2 * SIZE);
    let before = columns(&rig);
    rig.thorough = true;
    let mut tries = 0;
    while !waits.is_empty() {
        tries += 1;
        assert!(tries < 10, "{waits:?} wait for ever");
        waits.retain(|extent| is_full(&second_half(&mut rig, *extent)));
        rig.settle();
    }
    assert!(columns(&rig)[1] > 0, "{before:?}, {:?}", columns(&rig));
    let mut rig = rig.reopen();
    for extent in 0..extents {
        assert_eq!(first_byte(&mut rig, WIDE, extent * X + 5), Ok(extent as u8 + 1));
        assert_eq!(first_byte(&mut rig, WIDE, extent * X + X - 1), Ok(100 + extent as u8));
    }
    assert_eq!(rig.look(), []);
}

#[test]
fn nothing_moves_to_and_fro_where_no_disk_has_room() {
    let (mut rig, _) = filled_up();
    join(&mut rig, 2, SIZE);
    rig.flush();
    create(&mut rig, FILLER);
    let mut at = 0;
    // Until everything is full, each extent as far as it goes.
    while rig.store.free().0 > 0 && at < 64 {
        (0..4).for_each(|part| _ = write(&mut rig, FILLER, at * X + part * (X / 4), X / 4, 9));
        at += 1;
    }
    rig.settle();
    let before = columns(&rig);
    for _ in 0..3 {
        assert!(is_full(&write(&mut rig, WIDE, X / 2, X / 2, 9)));
        rig.settle();
    }
    assert_eq!(columns(&rig), before);
}

/// Two disks of which `from` is full and the other empty, and an extent there in which something waits to be written.
fn about_to_move(from: usize) -> (Vec<FaultyDisk>, u64) {
    let mut rig = Rig::fresh();
    rig.thorough = false;
    if from == 1 {
        create(&mut rig, FILLER);
        let extents = fill(&mut rig, FILLER, X);
        fill_rest(&mut rig, FILLER, extents);
        join(&mut rig, 2, SIZE);
    }
    create(&mut rig, WIDE);
    // What will move is small, so that all moments of it can be tried.
    assert!(!is_full(&write(&mut rig, WIDE, 0, 12, 1)));
    rig.done(StoreOp::Snapshot { of: vec![(WIDE, VolumeId(50))] });
    rig.done(StoreOp::Heat { volume: WIDE, extents: vec![x(0)], generation: gen_(1) });
    rig.done(write_op(WIDE, 1, filled(&[3])));
    let mut extents = 1;
    while !is_full(&write(&mut rig, WIDE, extents * X, X, extents as u8 + 1)) {
        extents += 1;
    }
    fill_rest(&mut rig, WIDE, extents);
    if from == 1 {
        rig.done(StoreOp::Delete { volume: FILLER });
    } else {
        join(&mut rig, 2, SIZE);
    }
    rig.flush();
    rig.settle();
    (rig.into_disks(), extents)
}

/// What is there of the extent that moves, and of another: right, or known to be lost.
fn judge(rig: &mut Rig, extents: u64, may_be_lost: bool, when: &str) {
    let expected =
        [(WIDE, 0, 1), (WIDE, 1, 3), (WIDE, 2, 1), (VolumeId(50), 1, 1), (WIDE, (extents - 1) * X, extents as u8)];
    for (volume, block, byte) in expected {
        match first_byte(rig, volume, block) {
            Err(StoreError::Corrupt(_)) if may_be_lost => {}
            other => assert_eq!(other, Ok(byte), "block {block} of {volume} {when}"),
        }
    }
}

fn wait_for_room(rig: &mut Rig) -> bool {
    is_full(&write(rig, WIDE, X / 2, X / 2, 9))
}

#[test]
fn a_crash_at_any_moment_of_such_a_move_finds_the_extent_once_and_whole() {
    for from in 0..2 {
        let (disks, extents) = about_to_move(from);
        for steps in 0.. {
            assert!(steps < 400, "the move ends");
            let mut rig = Rig::open_all(disks.clone()).expect("it opens");
            rig.thorough = false;
            assert!(wait_for_room(&mut rig), "disk {from} is full");
            let is_over = (0..steps).any(|_| !rig.step());
            match steps % 2 {
                0 => rig.disks_mut().for_each(|disk| disk.kill(steps)),
                _ => rig.disks_mut().for_each(|disk| disk.power_cut(steps)),
            }
            let mut rig = rig.reopen();
            rig.store.check();
            let when = format!("after {steps} steps from disk {from}");
            judge(&mut rig, extents, false, &when);
            if is_over {
                assert!(!wait_for_room(&mut rig), "it has room where it is now");
                judge(&mut rig, extents, false, &when);
                break;
            }
        }
    }
}

/// The disk that something leaves fails at its next write: what had not arrived is known to be lost, and nothing shows as zeros.
fn fail_and_judge(mut rig: Rig, from: usize, extents: u64, steps: u64) -> Rig {
    let failing = rig.disks_mut().nth(from).expect("two disks");
    failing.fail_next(OpClass::Write, DiskError::Io("gone".into(), 5));
    // A write comes by itself while something moves; else this one.
    rig.settle();
    if !rig.store.wants_reopening() {
        _ = rig.end(StoreOp::PutNote { group: GROUP, note: Some(vec![1]) });
        rig.settle();
    }
    assert!(rig.store.wants_reopening(), "after {steps} steps: {:?}", rig.store.failed());
    let mut disks = rig.into_disks();
    disks.iter_mut().for_each(|disk| disk.kill(1));
    disks.remove(from);
    let mut rig = Rig::open_all(disks).expect("it opens without the disk");
    judge(&mut rig, extents, true, &format!("after {steps} steps from disk {from}, which failed"));
    rig
}

#[test]
fn a_disk_that_fails_while_something_leaves_it_takes_that_with_it_or_it_has_arrived() {
    for from in 0..2 {
        let (disks, extents) = about_to_move(from);
        for steps in 0.. {
            assert!(steps < 400, "the move ends");
            let mut rig = Rig::open_all(disks.clone()).expect("it opens");
            rig.thorough = false;
            assert!(wait_for_room(&mut rig), "disk {from} is full");
            let is_over = (0..steps).any(|_| !rig.step());
            let mut rig = fail_and_judge(rig, from, extents, steps);
            if is_over {
                assert_eq!(first_byte(&mut rig, WIDE, 1), Ok(3), "it had arrived");
                break;
            }
        }
    }
}

#[test]
fn a_disk_that_fails_while_it_is_drained_takes_with_it_what_has_not_arrived() {
    // What comes after its first extents is no different.
    let (disks, extents) = about_to_move(0);
    for steps in 0..120 {
        let mut rig = Rig::open_all(disks.clone()).expect("it opens");
        rig.thorough = false;
        rig.ask_disks(DiskChange::Drain { disk: DiskId(1) });
        (0..steps).for_each(|_| _ = rig.step());
        fail_and_judge(rig, 0, extents, steps);
    }
}
