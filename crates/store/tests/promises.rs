//! What the store promises its user, one promise a test, without crashes at odd moments (those are in `crashes`).

mod common;

use common::*;
use pollux_base::{BlockChecksum, ByteCount, DiskError, DiskOp, DiskOpKind, GroupId, Instant, VolumeId};
use pollux_store::faulty_disk::OpClass;
use pollux_store::{Input, LOST_CHECKSUM, NOTE_BYTES_MAX, StoreError, StoreOp, StoreReply, UNIT_BYTES};

const UNIT_BLOCKS: u64 = UNIT_BYTES / BLOCK as u64;

#[test]
fn what_was_written_is_read_and_what_was_not_is_zeros() {
    let mut rig = Rig::fresh();
    rig.heat(&[0, 1], 1);
    rig.write(1022, &[1, 2, 3, 4]);
    assert_eq!(rig.bytes(1020, 8), [0, 0, 1, 2, 3, 4, 0, 0]);
    rig.cool(&[0, 1]);
    assert_eq!(rig.bytes(1020, 8), [0, 0, 1, 2, 3, 4, 0, 0]);
    let mut rig = rig.reopen();
    assert_eq!(rig.bytes(1020, 8), [0, 0, 1, 2, 3, 4, 0, 0]);
    let Ok(StoreReply::Read { checksums, .. }) = rig.read_of(VOLUME, 1021, 2) else { panic!("it was read before") };
    assert_eq!(checksums, [BlockChecksum::ZERO, BlockChecksum::of(&[1; BLOCK])]);
    let Ok(StoreReply::Checksums(sums)) = rig.end(StoreOp::Checksums { volume: VOLUME, extent: x(1) }) else {
        panic!("checksums can be had")
    };
    assert_eq!((sums[1], sums[2]), (BlockChecksum::of(&[4; BLOCK]), BlockChecksum::ZERO));
}

#[test]
fn an_overwrite_costs_one_data_write_and_nothing_else() {
    let mut rig = Rig::fresh();
    rig.heat(&[0], 1);
    rig.write(0, &[1; 64]);
    // The first overwrite of a fresh block puts on record that it was flushed.
    rig.write(0, &[2; 64]);
    rig.issued.clear();
    for round in 0..10 {
        rig.write(round * 3, &[9; 3]);
    }
    assert_eq!(rig.issued.len(), 10, "{:?}", rig.issued);
    let plain = |kind: &DiskOpKind| matches!(kind, DiskOpKind::Write { data, sync: false, .. } if data.len() == 1);
    assert!(rig.issued.iter().all(plain));
    // Also after the extent has cooled and is hot again.
    rig.cool(&[0]);
    rig.heat(&[0], 1);
    rig.issued.clear();
    rig.write(0, &[3; 64]);
    assert_eq!(rig.issued.len(), 1, "{:?}", rig.issued);
}

#[test]
fn neighbouring_blocks_are_read_in_one_operation() {
    let mut rig = Rig::fresh();
    rig.heat(&[0], 1);
    rig.write(0, &[7; 256]);
    let before = rig.disk.counts().reads;
    assert_eq!(rig.bytes(0, 256), [7; 256]);
    assert_eq!(rig.disk.counts().reads, before + 1);
}

#[test]
fn each_heat_that_ends_has_its_extent_hot_whoever_else_asks_for_it() {
    let mut rig = Rig::fresh();
    let heat = || StoreOp::Heat { volume: VOLUME, extents: vec![x(1)], generation: gen_(5) };
    let mut asked = vec![rig.ask(heat())];
    for _ in 0..8 {
        // Another one asks before the one before has ended.
        asked.push(rig.ask(heat()));
        let first = asked.remove(0);
        while !rig.ended.contains_key(&first) {
            assert!(rig.step(), "a heat never ends");
        }
        assert!(rig.store.is_hot(VOLUME, x(1), gen_(5)));
    }
    // A mark that is taken back while it is on its way says nothing.
    rig.settle();
    rig.ask(StoreOp::Cool { volume: VOLUME, extents: vec![x(1)] });
    let heated = rig.ask(heat());
    while !rig.ended.contains_key(&heated) {
        assert!(rig.step(), "a heat never ends");
    }
    assert!(rig.store.is_hot(VOLUME, x(1), gen_(5)));
    rig.settle();
    assert_eq!(rig.reopen().store.hot(VOLUME), [x(1)]);
}

#[test]
fn a_mark_is_durable_before_heat_ends_and_gone_when_cool_ends() {
    for seed in 0..20 {
        let mut rig = Rig::fresh();
        rig.heat(&[1, 2], 5);
        assert!(rig.store.is_hot(VOLUME, x(1), gen_(5)) && !rig.store.is_hot(VOLUME, x(1), gen_(6)));
        rig.disk.power_cut(seed);
        let mut rig = rig.reopen();
        assert_eq!(rig.store.hot(VOLUME), [x(1), x(2)]);
        assert_eq!(rig.store.changed_since(VOLUME, gen_(9)), [x(1), x(2)]);
        rig.cool(&[2]);
        rig.disk.power_cut(seed);
        assert_eq!(rig.reopen().store.hot(VOLUME), [x(1)]);
    }
}

/// A bounded number, so that what goes round for ever is seen.
fn complete_all_but_flushes(rig: &mut Rig) {
    let next = |rig: &Rig| rig.disk.pending().find(|op| !matches!(op.kind, DiskOpKind::Flush)).map(|op| op.id);
    for _ in 0..100 {
        let Some(id) = next(rig) else { return };
        let done = rig.disk.complete(id).expect("it is pending");
        rig.store.handle(Instant(0), Input::Disk(done));
        rig.drain();
    }
    panic!("there is always more to do: {:?}", rig.issued);
}

#[test]
fn a_first_write_does_not_wait_for_the_flush_of_another_extents_mark() {
    let mut rig = Rig::fresh();
    rig.heat(&[0], 1);
    // Something that is not flushed: a mark behind it cannot be made durable alone.
    rig.write(0, &[1]);
    let heat = |extent| StoreOp::Heat { volume: VOLUME, extents: vec![x(extent)], generation: gen_(1) };
    let marks = [rig.ask(heat(1)), rig.ask(heat(1)), rig.ask(heat(2))];
    let write = rig.ask(write_op(VOLUME, 1, filled(&[2])));
    complete_all_but_flushes(&mut rig);
    assert_eq!(rig.disk.pending().count(), 1, "the marks wait for a flush");
    assert_eq!(rig.ended.remove(&write), Some(Ok(StoreReply::Done)));
    assert!(marks.iter().all(|mark| !rig.ended.contains_key(mark)) && !rig.store.is_hot(VOLUME, x(1), gen_(1)));
    rig.settle();
    assert!(marks.iter().all(|mark| rig.ended.remove(mark) == Some(Ok(StoreReply::Done))));
    rig.disk.power_cut(1);
    let mut rig = rig.reopen();
    assert_eq!(rig.store.hot(VOLUME), [x(0), x(1), x(2)]);
    assert_eq!(rig.bytes(0, 1), [1]);
}

#[test]
fn an_overwrite_of_a_first_write_costs_the_journal_one_block_however_long_the_flush_takes() {
    let mut rig = Rig::fresh();
    rig.heat(&[0], 1);
    rig.write(0, &[1]);
    rig.issued.clear();
    let overwrite = rig.ask(write_op(VOLUME, 0, filled(&[2])));
    // It waits for a flush. Another first write meanwhile, so that what is to be said then needs a flush of its own.
    let other = rig.ask(write_op(VOLUME, 1, filled(&[3])));
    complete_all_but_flushes(&mut rig);
    assert!(rig.ended.contains_key(&other) && !rig.ended.contains_key(&overwrite));
    let flush = rig.disk.pending().map(|op| op.id).next().expect("a flush is under way");
    let done = rig.disk.complete(flush).expect("it is pending");
    rig.store.handle(Instant(0), Input::Disk(done));
    rig.drain();
    complete_all_but_flushes(&mut rig);
    // Two of data-less blocks: the other write's record, and that everything before is durable.
    let is_journal =
        |op: &&DiskOpKind| matches!(op, DiskOpKind::Write { offset, .. } if (4 << 20..12 << 20).contains(&offset.0));
    assert!(rig.issued.iter().filter(is_journal).count() <= 2, "{:?}", rig.issued);
    rig.settle();
    assert_eq!(rig.ended.remove(&overwrite), Some(Ok(StoreReply::Done)));
    assert_eq!(rig.bytes(0, 2), [2, 3]);
}

#[test]
fn a_raised_mark_survives_and_names_the_change() {
    let mut rig = Rig::fresh();
    rig.heat(&[0, 1], 5);
    rig.write(0, &[1]);
    rig.done(StoreOp::Remark { group: GROUP, generation: gen_(7) });
    assert!(rig.store.is_hot(VOLUME, x(0), gen_(7)));
    rig.cool(&[0, 1]);
    let rig = rig.reopen();
    assert_eq!(rig.store.hot(VOLUME), []);
    assert_eq!(rig.store.changed_since(VOLUME, gen_(6)), [x(0)], "an extent that was only hot was not changed");
    assert_eq!(rig.store.changed_since(VOLUME, gen_(7)), []);
}

#[test]
fn an_extent_that_is_written_to_while_it_cools_stays_hot() {
    // At whichever step of the cooling the write comes.
    for steps in 0..12 {
        let mut rig = Rig::fresh();
        rig.heat(&[0], 1);
        rig.write(0, &[1, 1]);
        let cool = rig.ask(StoreOp::Cool { volume: VOLUME, extents: vec![x(0)] });
        for _ in 0..steps {
            rig.step();
        }
        if !rig.store.is_hot(VOLUME, x(0), gen_(1)) {
            rig.heat(&[0], 2);
        }
        let write = rig.ask(write_op(VOLUME, 1, filled(&[2])));
        rig.settle();
        assert_eq!(rig.ended.remove(&cool), Some(Ok(StoreReply::Done)));
        assert_eq!(rig.ended.remove(&write), Some(Ok(StoreReply::Done)));
        assert!(rig.store.is_hot(VOLUME, x(0), gen_(1)), "after {steps} steps");
        rig.disk.kill(steps);
        let mut rig = rig.reopen();
        assert_eq!(rig.store.hot(VOLUME), [x(0)]);
        assert_eq!(rig.bytes(0, 3), [1, 2, 0]);
        rig.cool(&[0]);
        assert_eq!(rig.reopen().bytes(0, 3), [1, 2, 0]);
    }
}

#[test]
fn a_full_pool_refuses_before_anything_is_changed_and_goes_on_when_there_is_room() {
    let mut rig = Rig::fresh();
    rig.thorough = false;
    let all = rig.store.free().0;
    let other = VolumeId(2);
    rig.done(StoreOp::Create { volume: other, group: GroupId(2), size: ByteCount(1 << 30) });
    let extents: Vec<_> = (0..(all >> 22) as u32).map(x).collect();
    rig.done(StoreOp::Heat { volume: other, extents: extents.clone(), generation: gen_(1) });
    rig.heat(&[0, 1], 1);
    let mut at = 0;
    while rig.store.free().0 > 2 * UNIT_BYTES {
        rig.done(write_op(other, at, filled(&[5; UNIT_BLOCKS as usize])));
        at += UNIT_BLOCKS;
    }
    // Two units and two places for leaves are needed, and there is not as much: nothing of it is written.
    assert_eq!(rig.end(write_op(VOLUME, 1023, filled(&[1, 1]))), Err(StoreError::Full));
    assert_eq!(rig.store.allocated(VOLUME), []);
    assert_eq!(rig.bytes(1023, 2), [0, 0]);
    // What has its place already goes on, and reads do.
    rig.done(write_op(other, 0, filled(&[6])));
    rig.store.check();
    rig.done(StoreOp::Cool { volume: other, extents });
    rig.settle();
    assert_eq!(rig.store.used(GroupId(2)).0 / UNIT_BYTES, at / UNIT_BLOCKS + leaf_units(at));
    rig.done(StoreOp::Delete { volume: other });
    assert_eq!(rig.store.free().0, all, "it is all free at once");
    rig.write(1023, &[1, 1]);
    assert_eq!(rig.bytes(1023, 2), [1, 1]);
    rig.store.check();
}

/// Units that the leaves of so many blocks fill, if there were no gaps between them.
fn leaf_units(blocks: u64) -> u64 {
    let leaf_blocks = |blocks: u64| (blocks / UNIT_BLOCKS).div_ceil(62);
    (blocks / 1024 * leaf_blocks(1024) + leaf_blocks(blocks % 1024)) / UNIT_BLOCKS
}

#[test]
fn scattered_writes_take_a_unit_each_and_what_is_filled_lies_in_line() {
    let mut rig = Rig::fresh();
    let free = rig.store.free().0;
    rig.heat(&[0, 1], 1);
    for unit in [7, 3, 100] {
        rig.write(unit * UNIT_BLOCKS, &[unit as u8]);
    }
    // One more unit holds the places of leaves to be.
    assert_eq!(rig.store.free().0, free - 4 * UNIT_BYTES);
    let writes = |rig: &Rig| rig.issued.iter().filter(|kind| matches!(kind, DiskOpKind::Write { .. })).count();
    rig.write(1024, &[1; 64]);
    rig.write(1088, &[1; 64]);
    rig.write(1024, &[2; 128]);
    let before = writes(&rig);
    rig.write(1024, &[3; 128]);
    assert_eq!(writes(&rig), before + 1, "it lies side by side");
    rig.cool(&[0, 1]);
    assert_eq!(rig.store.used(GROUP).0, (3 + 128 / UNIT_BLOCKS) * UNIT_BYTES + 2 * 4096);
    let mut rig = rig.reopen();
    assert_eq!(rig.bytes(7 * UNIT_BLOCKS, 2), [7, 0]);
    assert_eq!(rig.bytes(1024, 128), [3; 128]);
}

#[test]
fn a_unit_is_free_when_its_last_block_is_zeroed_and_that_is_durable() {
    let mut rig = Rig::fresh();
    rig.heat(&[0], 1);
    rig.write(0, &[1; 3 * UNIT_BLOCKS as usize]);
    rig.flush();
    let free = rig.store.free().0;
    rig.zero(0, UNIT_BLOCKS - 1);
    rig.flush();
    rig.settle();
    assert_eq!(rig.store.free().0, free);
    rig.zero(UNIT_BLOCKS - 1, 2);
    assert_eq!(rig.store.free().0, free, "a power cut might still bring it back");
    rig.flush();
    rig.settle();
    assert_eq!(rig.store.free().0, free + UNIT_BYTES);
    assert!(rig.issued.iter().any(|kind| matches!(kind, DiskOpKind::Discard { len: UNIT_BYTES, .. })));
    assert_eq!(rig.bytes(0, UNIT_BLOCKS + 2), [vec![0; UNIT_BLOCKS as usize + 1], vec![1]].concat());
    rig.write(1, &[9]);
    assert_eq!(rig.reopen().bytes(0, 3), [0, 9, 0]);
}

#[test]
fn a_unit_into_which_is_being_written_is_not_given_back() {
    let mut rig = Rig::fresh();
    rig.heat(&[0], 1);
    rig.write(0, &[1]);
    rig.flush();
    let write = rig.ask(write_op(VOLUME, 3, filled(&[2])));
    rig.zero(0, 1);
    rig.flush();
    rig.settle();
    rig.ended.remove(&write).expect("it ended").expect("it succeeded");
    rig.heat(&[1], 1);
    rig.write(1024, &[7; 8]);
    assert_eq!(rig.bytes(0, 5), [0, 0, 0, 2, 0]);
}

#[test]
fn a_recycled_unit_shows_zeros_where_nothing_was_written() {
    let mut rig = Rig::fresh();
    rig.heat(&[0], 1);
    rig.write(0, &[9; 1024]);
    rig.cool(&[0]);
    let other = VolumeId(2);
    rig.done(StoreOp::Delete { volume: VOLUME });
    rig.done(StoreOp::Create { volume: other, group: GROUP, size: ByteCount(8 << 20) });
    rig.done(StoreOp::Heat { volume: other, extents: vec![x(0)], generation: gen_(1) });
    rig.done(write_op(other, 5, filled(&[1])));
    for cool in [false, true] {
        if cool {
            rig.done(StoreOp::Cool { volume: other, extents: vec![x(0)] });
        }
        rig = rig.reopen();
        let Ok(StoreReply::Read { data, .. }) = rig.read_of(other, 0, 1024) else { panic!("it can be read") };
        let held: Vec<u8> = data.as_slice().chunks_exact(BLOCK).map(uniform).collect();
        assert_eq!(held.iter().filter(|byte| **byte != 0).count(), 1);
        assert_eq!(held[5], 1);
    }
    assert_eq!(rig.end(StoreOp::Read { volume: VOLUME, range: range(0, 1) }), Err(StoreError::NoVolume));
}

#[test]
fn an_emptied_extent_is_remembered_as_changed_until_it_is_reaped() {
    let mut rig = Rig::fresh();
    rig.heat(&[0], 1);
    rig.write(0, &[1; 8]);
    rig.cool(&[0]);
    rig.heat(&[0], 4);
    rig.zero(0, 1024);
    rig.done(StoreOp::Reap { group: GROUP });
    assert_eq!(rig.store.allocated(VOLUME), [x(0)], "what is hot is not reaped");
    rig.cool(&[0]);
    rig.settle();
    assert!(rig.issued.iter().any(|kind| matches!(kind, DiskOpKind::Discard { .. })), "its space is given back");
    let mut rig = rig.reopen();
    assert_eq!(rig.store.changed_since(VOLUME, gen_(3)), [x(0)]);
    assert_eq!(rig.bytes(0, 8), [0; 8]);
    assert_eq!(rig.store.status(VOLUME, range(0, 2048)), [(range(0, 2048), false)]);
    assert_eq!(rig.store.used(GROUP).0, 0);
    rig.done(StoreOp::Reap { group: GROUP });
    let rig = rig.reopen();
    assert_eq!((rig.store.allocated(VOLUME), rig.store.changed_since(VOLUME, gen_(0))), (vec![], vec![]));
}

#[test]
fn an_emptied_extent_can_be_written_again() {
    let mut rig = Rig::fresh();
    rig.heat(&[0], 1);
    rig.write(0, &[1; 8]);
    rig.zero(0, 1024);
    rig.cool(&[0]);
    rig.heat(&[0], 2);
    rig.write(3, &[2]);
    rig.disk.kill(1);
    let mut rig = rig.reopen();
    assert_eq!(rig.bytes(0, 8), [0, 0, 0, 2, 0, 0, 0, 0]);
}

#[test]
fn zeroed_blocks_stay_zeros_after_a_crash() {
    for seed in 0..20 {
        let mut rig = Rig::fresh();
        rig.heat(&[0], 1);
        rig.write(0, &[1; 8]);
        rig.zero(2, 3);
        rig.flush();
        rig.disk.power_cut(seed);
        let mut rig = rig.reopen();
        assert_eq!(rig.bytes(0, 8), [1, 1, 0, 0, 0, 1, 1, 1]);
        assert_eq!(
            rig.store.status(VOLUME, range(0, 8)),
            [(range(0, 2), true), (range(2, 3), false), (range(5, 3), true)]
        );
    }
}

#[test]
fn rotten_data_is_reported_and_healed_by_a_write() {
    let mut rig = Rig::fresh();
    rig.heat(&[0], 1);
    rig.write(0, &[1, 2, 3, 4]);
    rig.cool(&[0]);
    let place = place_of(&rig, 2);
    rig.disk.rot(place * BLOCK as u64 + 100);
    assert_eq!(rig.corrupt(0, 4), [range(1, 1)]);
    assert_eq!(rig.bytes(2, 2), [3, 4], "other blocks are fine");
    rig.heat(&[0], 2);
    rig.write(1, &[2]);
    assert_eq!(rig.bytes(0, 4), [1, 2, 3, 4]);
}

#[test]
fn a_misdirected_write_is_noticed_where_it_should_have_gone_and_where_it_went() {
    let mut rig = Rig::fresh();
    rig.heat(&[0], 1);
    rig.write(0, &[1; 16]);
    rig.write(0, &[2; 16]);
    rig.disk.misdirect_next_write(8 * BLOCK as u64);
    rig.write(0, &[3; 4]);
    assert_eq!(rig.corrupt(0, 16), [range(0, 4), range(8, 4)]);
}

#[test]
fn a_rotten_leaf_makes_its_blocks_corrupt_and_never_zeros() {
    let mut rig = Rig::fresh();
    rig.heat(&[0], 1);
    for unit in 0..70 {
        rig.write(unit * UNIT_BLOCKS, &[1, 2]);
    }
    rig.write(1000, &[3]);
    rig.cool(&[0]);
    let leaf = rig.issued.iter().rev().find_map(|kind| match kind {
        DiskOpKind::Write { offset, data, .. } if data[0].len() == 2 * BLOCK => Some(offset.0),
        _ => None,
    });
    rig.disk.rot(leaf.expect("cooling wrote a leaf") + 2000);
    let mut rig = rig.reopen();
    assert_eq!(rig.corrupt(0, 4), [range(0, 4)], "whether the last two held data nobody knows");
    assert_eq!(rig.bytes(1000, 2), [3, 0], "the other parts of the leaf are whole");
    rig.heat(&[0], 1);
    let Ok(StoreReply::Checksums(sums)) = rig.end(StoreOp::Checksums { volume: VOLUME, extent: x(0) }) else {
        panic!("checksums can be had")
    };
    assert_eq!(sums[0], LOST_CHECKSUM);
    // Healed by writing and by zeroing; what was not healed stays corrupt over cooling and crashes.
    rig.write(0, &[1]);
    rig.zero(2, 1);
    rig.disk.kill(3);
    let mut rig = rig.reopen();
    rig.cool(&[0]);
    let mut rig = rig.reopen();
    assert_eq!(rig.corrupt(0, 4), [range(1, 1), range(3, 1)]);
    assert_eq!((rig.bytes(0, 1), rig.bytes(2, 1)), (vec![1], vec![0]));
}

#[test]
fn a_spot_that_cannot_be_read_is_corrupt_and_other_read_errors_are_errors() {
    let mut rig = Rig::fresh();
    rig.heat(&[0], 1);
    rig.write(0, &[1, 2]);
    rig.disk.fail_next(OpClass::Read, DiskError::Io("medium error".into(), 5));
    assert_eq!(rig.corrupt(0, 4), [range(0, 2)]);
    rig.disk.fail_next(OpClass::Read, DiskError::Io("gone".into(), 19));
    assert!(matches!(rig.read_of(VOLUME, 0, 4), Err(StoreError::Disk(_))));
    assert_eq!(rig.bytes(0, 2), [1, 2]);
    // Neither the data of an extent that was hot nor a leaf is given up for one failed read.
    let mut rig = rig.reopen();
    rig.disk.fail_next(OpClass::Read, DiskError::Io("medium error".into(), 5));
    assert_eq!(rig.corrupt(0, 4), [range(0, 2)]);
    rig.disk.fail_next(OpClass::Read, DiskError::Io("medium error".into(), 5));
    rig.cool(&[0]);
    assert_eq!(rig.bytes(0, 2), [1, 2]);
    let mut rig = rig.reopen();
    rig.disk.fail_next(OpClass::Read, DiskError::Io("medium error".into(), 5));
    assert_eq!(rig.bytes(0, 2), [1, 2]);
}

#[test]
fn what_was_hot_at_a_crash_is_read_only_as_far_as_somebody_asks() {
    let mut rig = Rig::fresh();
    rig.heat(&[0, 1], 1);
    rig.write(0, &[1; 1024]);
    rig.flush();
    rig.cool(&[0]);
    rig.heat(&[0], 1);
    rig.write(0, &[2]);
    rig.write(1024, &[3; 1024]);
    rig.flush();
    let mut rig = rig.reopen();
    rig.read_bytes = 0;
    rig.write(5, &[4]);
    assert_eq!(rig.read_bytes, 3 * BLOCK, "a leaf");
    assert_eq!(rig.bytes(0, 2), [2, 1]);
    assert_eq!(rig.read_bytes, 5 * BLOCK, "and what was asked for");
    rig.write(1030, &[5]);
    assert_eq!(rig.bytes(1029, 2), [3, 5]);
    assert_eq!(rig.read_bytes, 7 * BLOCK, "where there is no leaf not even that");
    let Ok(StoreReply::Checksums(sums)) = rig.end(StoreOp::Checksums { volume: VOLUME, extent: x(0) }) else {
        panic!("checksums can be had")
    };
    let is = |byte: u8| BlockChecksum::of(&[byte; BLOCK]);
    assert_eq!((sums[0], sums[1], sums[5], sums[1023]), (is(2), is(1), is(4), is(1)));
    assert_eq!(rig.read_bytes, (7 + 1022) * BLOCK, "who compares reads the rest");
    rig.cool(&[0, 1]);
    let mut rig = rig.reopen();
    assert_eq!(rig.store.hot(VOLUME), []);
    let expected: Vec<u8> = [vec![2, 1, 1, 1, 1, 4], vec![1; 1018], vec![3; 6], vec![5], vec![3; 1017]].concat();
    assert_eq!(rig.bytes(0, 2048), expected);
}

#[test]
fn a_failed_write_or_flush_is_never_retried_into_success() {
    for class in [OpClass::Write, OpClass::Flush] {
        let mut rig = Rig::fresh();
        rig.heat(&[0, 1], 1);
        rig.write(0, &[1, 2]);
        rig.disk.fail_next(class, DiskError::Io("broken".into(), 5));
        let failing = [write_op(VOLUME, 5, filled(&[7])), StoreOp::Flush].map(|op| rig.ask(op));
        rig.settle();
        for id in failing {
            let ended = rig.ended.remove(&id);
            assert!(matches!(ended, Some(Err(StoreError::Disk(_))) | Some(Ok(StoreReply::Done))), "{ended:?}");
        }
        rig.issued.clear();
        let extents = vec![x(1)];
        for op in [
            write_op(VOLUME, 0, filled(&[7])),
            StoreOp::Flush,
            StoreOp::Zero { volume: VOLUME, range: range(0, 1) },
            StoreOp::Heat { volume: VOLUME, extents: extents.clone(), generation: gen_(9) },
            StoreOp::Cool { volume: VOLUME, extents },
            StoreOp::PutNote { group: GROUP, note: None },
            StoreOp::Delete { volume: VOLUME },
        ] {
            assert!(matches!(rig.end(op), Err(StoreError::Disk(_))));
        }
        assert_eq!(rig.issued, [], "nothing is written any more");
        assert_eq!(rig.bytes(0, 2), [1, 2], "reads go on");
        let mut rig = rig.reopen();
        assert_eq!(rig.store.hot(VOLUME), [x(0), x(1)]);
        assert_eq!(rig.bytes(0, 2), [1, 2]);
    }
}

#[test]
fn a_read_waits_for_the_write_it_overlaps() {
    let mut rig = Rig::fresh();
    rig.heat(&[0], 1);
    rig.write(0, &[1; 4]);
    rig.write(0, &[2; 4]);
    for _ in 0..20 {
        let write = rig.ask(write_op(VOLUME, 1, filled(&[3, 3])));
        let read = rig.ask(StoreOp::Read { volume: VOLUME, range: range(0, 4) });
        rig.settle();
        rig.ended.remove(&write).expect("it ended").expect("it succeeded");
        let Some(Ok(StoreReply::Read { data, .. })) = rig.ended.remove(&read) else { panic!("it can be read") };
        assert_eq!(data, filled(&[2, 3, 3, 2]));
    }
}

#[test]
fn notes_are_kept_replaced_and_erased() {
    let mut rig = Rig::fresh();
    let put =
        |group: u64, note: Option<&[u8]>| StoreOp::PutNote { group: GroupId(group), note: note.map(<[u8]>::to_vec) };
    rig.done(put(1, Some(b"one")));
    rig.done(put(2, Some(b"two")));
    rig.done(put(1, Some(b"uno")));
    assert_eq!(rig.end(put(3, Some(&[0; NOTE_BYTES_MAX + 1]))), Err(StoreError::NoteTooLong(NOTE_BYTES_MAX + 1)));
    rig.disk.power_cut(1);
    let mut rig = rig.reopen();
    assert_eq!(rig.store.notes().collect::<Vec<_>>(), [(GroupId(1), &b"uno"[..]), (GroupId(2), b"two")]);
    rig.done(put(1, None));
    rig.disk.power_cut(2);
    assert_eq!(rig.reopen().store.notes().collect::<Vec<_>>(), [(GroupId(2), &b"two"[..])]);
}

#[test]
fn a_catalog_that_is_full_refuses_and_loses_nothing() {
    let mut rig = Rig::fresh();
    let put = |group| StoreOp::PutNote { group: GroupId(group), note: Some(vec![7; NOTE_BYTES_MAX]) };
    let asked: Vec<_> = (0..1100).map(|group| rig.ask(put(group))).collect();
    rig.settle();
    let ended: Vec<_> = asked.iter().map(|id| rig.ended.remove(id).expect("it ended")).collect();
    let fits = ended.iter().filter(|ended| **ended == Ok(StoreReply::Done)).count();
    assert!(ended[fits..].iter().all(|ended| *ended == Err(StoreError::Full)));
    assert!(fits > 900, "{fits}");
    assert_eq!(rig.reopen().store.notes().count(), fits);
}

#[test]
fn a_volume_grows_and_never_shrinks() {
    let mut rig = Rig::fresh();
    let create = |size: u64| StoreOp::Create { volume: VOLUME, group: GROUP, size: ByteCount(size) };
    rig.done(create(64 << 20));
    rig.done(create(4096));
    let rig = &mut rig.reopen();
    assert_eq!(rig.store.volumes().collect::<Vec<_>>(), [(VOLUME, GROUP, ByteCount(64 << 20))]);
    for wrong in [0, 4095, 1 << 51] {
        assert_eq!(rig.end(create(wrong)), Err(StoreError::OutOfRange));
    }
}

#[test]
fn requests_outside_the_volume_are_refused() {
    let mut rig = Rig::fresh();
    let blocks = 32 << 8;
    for (start, count) in [(blocks, 1), (blocks - 1, 2), (u64::MAX, 1), (1, u64::MAX)] {
        assert_eq!(rig.read_of(VOLUME, start, count), Err(StoreError::OutOfRange));
        let zero = StoreOp::Zero { volume: VOLUME, range: range(start, count) };
        assert_eq!(rig.end(zero), Err(StoreError::OutOfRange));
    }
    let heat = StoreOp::Heat { volume: VOLUME, extents: vec![x(8)], generation: gen_(1) };
    assert_eq!(rig.end(heat), Err(StoreError::OutOfRange));
    assert_eq!(rig.end(StoreOp::Checksums { volume: VOLUME, extent: x(8) }), Err(StoreError::OutOfRange));
    assert_eq!(rig.end(StoreOp::Cool { volume: VolumeId(9), extents: vec![] }), Err(StoreError::NoVolume));
}

#[test]
fn heat_beyond_the_bound_waits_until_others_have_cooled() {
    let mut rig = Rig::fresh();
    rig.thorough = false;
    rig.done(StoreOp::Create { volume: VOLUME, group: GROUP, size: ByteCount(1 << 40) });
    let extents = |range: std::ops::Range<u32>| range.map(x).collect::<Vec<_>>();
    let all = rig.store.hot_extents_max() as u32;
    rig.done(StoreOp::Heat { volume: VOLUME, extents: extents(0..all), generation: gen_(1) });
    let more = StoreOp::Heat { volume: VOLUME, extents: extents(all..all + 2), generation: gen_(1) };
    let waiting = rig.ask(more);
    rig.settle();
    assert!(!rig.ended.contains_key(&waiting) && rig.store.hot(VOLUME).len() == all as usize);
    rig.cool(&[5, 6]);
    rig.settle();
    assert_eq!(rig.ended.remove(&waiting), Some(Ok(StoreReply::Done)));
    assert!(rig.store.is_hot(VOLUME, x(all + 1), gen_(1)));
}

#[test]
fn on_a_large_disk_a_large_working_set_is_hot_and_survives_a_power_cut() {
    let mut rig = Rig::open(formatted_with(16 << 30)).expect("a fresh pool opens");
    rig.thorough = false;
    let all = rig.store.hot_extents_max() as u32;
    assert_eq!(all, 16384, "64 GiB");
    rig.done(StoreOp::Create { volume: VOLUME, group: GROUP, size: ByteCount(1 << 40) });
    rig.done(StoreOp::Heat { volume: VOLUME, extents: (0..all).map(x).collect(), generation: gen_(1) });
    let (written, rounds) = (3000, 4);
    for round in 0..rounds {
        for extent in 0..written {
            rig.ask(write_op(VOLUME, extent * 1024 + round, filled(&[round as u8 + 1])));
        }
        rig.settle();
    }
    // A block of the journal each, so that a checkpoint is made, which says anew all that is hot.
    for round in 0..17_000u64 {
        match round % 2 {
            0 => rig.write(100, &[1]),
            _ => rig.zero(100, 1),
        }
    }
    let anchors = rig
        .issued
        .iter()
        .filter(|op| matches!(op, DiskOpKind::Write { offset, sync: true, .. } if offset.0 == BLOCK as u64));
    assert!(anchors.count() > 0, "the tail moved");
    rig.flush();
    rig.disk.power_cut(3);
    let mut rig = rig.reopen();
    rig.thorough = false;
    assert_eq!(rig.store.hot(VOLUME).len(), all as usize);
    for extent in [0, 1, 1500, written - 1] {
        let expected: Vec<u8> = (1..=rounds as u8).collect();
        assert_eq!(rig.bytes(extent * 1024, rounds), expected, "extent {extent}");
    }
}

#[test]
fn very_many_extents_cool_a_few_at_a_time() {
    let mut rig = Rig::open(formatted_with(16 << 30)).expect("a fresh pool opens");
    rig.thorough = false;
    rig.done(StoreOp::Create { volume: VOLUME, group: GROUP, size: ByteCount(4 << 30) });
    let all: Vec<_> = (0..500).map(x).collect();
    let write_all = |rig: &mut Rig| {
        rig.done(StoreOp::Heat { volume: VOLUME, extents: all.clone(), generation: gen_(1) });
        all.iter().for_each(|extent| rig.write(extent.first_block().0, &[7]));
        rig.flush();
    };
    // The largest number of reads and writes that were under way at once.
    let most_at_once = |rig: &mut Rig| {
        let cooling = rig.ask(StoreOp::Cool { volume: VOLUME, extents: all.clone() });
        let (mut reads, mut writes) = (0, 0);
        loop {
            let is_read = |op: &&DiskOp| matches!(op.kind, DiskOpKind::Read { .. });
            let under_way = rig.disk.pending().count();
            let being_read = rig.disk.pending().filter(is_read).count();
            (reads, writes) = (reads.max(being_read), writes.max(under_way - being_read));
            if !rig.step() {
                break;
            }
        }
        assert_eq!(rig.ended.remove(&cooling), Some(Ok(StoreReply::Done)));
        assert_eq!(rig.store.hot(VOLUME), []);
        (reads, writes)
    };
    write_all(&mut rig);
    let (reads, writes) = most_at_once(&mut rig);
    assert!(reads == 0 && (64..80).contains(&writes), "{reads} reads, {writes} writes at once");
    write_all(&mut rig);
    let mut rig = rig.reopen();
    rig.thorough = false;
    let (reads, _) = most_at_once(&mut rig);
    assert!((1..=4).contains(&reads), "{reads} reads at once");
    assert_eq!(rig.bytes(499 * 1024, 1), [7]);
}

#[test]
fn the_journal_goes_round_many_times_with_everything_hot() {
    let mut rig = Rig::fresh();
    rig.thorough = false;
    rig.done(StoreOp::Create { volume: VOLUME, group: GROUP, size: ByteCount(1 << 40) });
    let extents: Vec<_> = (0..rig.store.hot_extents_max() as u32).map(x).collect();
    rig.done(StoreOp::Heat { volume: VOLUME, extents, generation: gen_(1) });
    let slots = rig.store.free().0 >> 22;
    for extent in 0..slots {
        rig.write(extent * 1024, &[extent as u8 + 1; 3]);
    }
    for round in 0..6000u64 {
        // Each makes a block hold nothing, or data again: a record in the journal.
        let extent = round % slots;
        if (round / slots).is_multiple_of(2) {
            rig.zero(extent * 1024 + 1, 1);
        } else {
            rig.write(extent * 1024 + 1, &[extent as u8 + 1]);
        }
    }
    rig.store.check();
    rig.disk.kill(7);
    let mut rig = rig.reopen();
    assert_eq!(rig.store.hot(VOLUME).len(), rig.store.hot_extents_max());
    for extent in 0..slots {
        let full = [extent as u8 + 1, extent as u8 + 1, extent as u8 + 1, 0];
        let holed = [extent as u8 + 1, 0, extent as u8 + 1, 0];
        let is_full = (5999 - (5999 + slots - extent) % slots) / slots % 2 == 1;
        assert_eq!(rig.bytes(extent * 1024, 4), if is_full { full } else { holed });
    }
}

#[test]
fn a_deletion_that_was_cut_short_is_finished_at_open() {
    let mut rig = Rig::fresh();
    let all = rig.store.free();
    for steps in 0..40 {
        let volume = VolumeId(100 + steps);
        rig.done(StoreOp::Create { volume, group: GROUP, size: ByteCount(16 << 20) });
        rig.done(StoreOp::Heat { volume, extents: vec![x(0), x(1), x(2)], generation: gen_(1) });
        rig.done(write_op(volume, 1000, filled(&[1; 1048])));
        rig.done(StoreOp::Cool { volume, extents: vec![x(0)] });
        rig.ask(StoreOp::Delete { volume });
        for _ in 0..steps % 20 {
            rig.step();
        }
        rig.disk.power_cut(steps);
        rig = rig.reopen();
        if rig.store.volumes().any(|(known, _, _)| known == volume) {
            rig.done(StoreOp::Delete { volume });
        }
        assert_eq!(rig.store.free(), all);
        assert_eq!(rig.store.hot(volume), []);
    }
}

/// Block of the disk that holds the only block filled with `byte`.
fn place_of(rig: &Rig, byte: u8) -> u64 {
    let mut places = rig.disk.blocks().filter(|(_, block)| block.iter().all(|found| *found == byte));
    let (place, _) = places.next().expect("it is on the disk");
    assert_eq!(places.count(), 0);
    place
}
