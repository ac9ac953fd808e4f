//! Requests and leases: what clients see of a group while its members come and go (W1 to W7, W11).
#![allow(clippy::unwrap_used)]

mod world;

use pollux_base::order::FreezeReason;
use pollux_base::{BlockError, DiskError, Op, Order, Reply, Report, VolumeId};
use pollux_replica::Input;
use pollux_replica::wire::{Frame, Message, Sequence};
use pollux_store::faulty_disk::OpClass;
use world::*;

#[test]
fn a_write_is_acknowledged_when_both_have_it() {
    let mut world = World::pair(1);
    world.write_done(A, 3, 2, 42);
    let (a, b) = (world.contents(A), world.contents(B));
    assert_eq!(a[3..5], [42, 42]);
    assert_eq!(a, b);
    assert_eq!(world.read_value(A, 4), 42);
    assert_eq!(world.read_value(A, 5), 0);
}

#[test]
fn a_write_over_two_extents_with_fua_is_whole_on_both() {
    let mut world = World::pair(2);
    let id = world.request(A, Op::Write { range: range(1020, 10), data: blocks(7, 10), fua: true });
    world.until("acknowledged", |world| world.answer(id).is_some());
    for node in [A, B] {
        world.power_cut(node);
        assert_eq!(world.contents(node)[1019..1031], [0, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 0]);
    }
}

/// A patch of one sector of the block.
fn patch(block: u64, sector: usize, value: u64) -> Op {
    let data = blocks(value, 1).slice(0..512);
    Op::Patch { block: range(block, 1).start, offset: sector * 512, data, fua: false }
}

#[test]
fn patches_of_one_block_at_the_same_time_all_last_and_leave_the_rest_alone() {
    let mut world = World::pair(2);
    world.write_done(A, 3, 1, 9);
    // A whole write in between, too: what comes after it lasts, what came before does not.
    let mut ids: Vec<_> = [1, 2, 5].map(|sector| world.request(A, patch(3, sector, 100 + sector as u64))).into();
    ids.push(world.write(A, 3, 1, 10));
    ids.extend([6, 2, 7].map(|sector| world.request(A, patch(3, sector, 200 + sector as u64))));
    world.until("all acknowledged", |world| ids.iter().all(|id| world.answer(*id) == Some(&Reply::Done)));
    for node in [A, B] {
        assert_eq!(world.sectors(node)[3], [10, 10, 202, 10, 10, 10, 206, 207]);
        assert_eq!(world.contents(node)[2..5], [0, 10, 0]);
    }
}

#[test]
fn a_patch_of_a_block_never_written_finds_zeros() {
    let mut world = World::pair(2);
    let id = world.request(A, patch(1030, 7, 5));
    world.until("acknowledged", |world| world.answer(id).is_some());
    assert_eq!(world.sectors(B)[1030], [0, 0, 0, 0, 0, 0, 0, 5]);
}

#[test]
fn what_was_flushed_survives_a_power_cut_of_both() {
    let mut world = World::pair(3);
    for block in 0..20 {
        world.write_done(A, block * 200, 3, block + 1);
    }
    world.flush_done(A);
    world.power_cut(A);
    world.power_cut(B);
    world.start(A);
    world.start(B);
    world.until_serving(A);
    for block in 0..20 {
        assert_eq!(world.read_value(A, block * 200), block + 1);
    }
}

#[test]
fn a_zeroed_range_reads_as_zeros_and_takes_no_space_on_either() {
    let mut world = World::pair(4);
    world.write_done(A, 0, 1024, 9);
    let id = world.request(A, Op::Zero { range: range(0, 1024), fua: false });
    world.until("zeroed", |world| world.answer(id).is_some());
    assert_eq!(world.read_value(A, 5), 0);
    world.run_for(ms(15_000));
    for node in [A, B] {
        assert_eq!(world.machines[&node].plane.as_ref().unwrap().store().used(GROUP).0, 0);
    }
}

#[test]
fn nothing_is_acknowledged_without_a_lost_member_before_the_record_without_it() {
    let mut world = World::pair(5);
    world.decides = false;
    world.cut(A, B);
    let id = world.write(A, 0, 1, 1);
    world.run_for(ms(5000));
    assert_eq!(world.answer(id), None);
    assert_eq!(world.frozen(A), Some(&FreezeReason::ReplicaLost { node: B }));
    let lost = world.reports.iter().filter(|(_, _, report)| matches!(report, Report::ReplicaLost { .. })).count();
    assert!(lost > 3, "the loss is reported until it is decided");
    world.take_over(A, &[A]);
    world.until("acknowledged", |world| world.answer(id).is_some());
}

#[test]
fn a_member_that_is_back_in_time_is_settled_and_nothing_is_lost() {
    let mut world = World::pair(6);
    world.decides = false;
    world.write_done(A, 0, 1, 1);
    world.cut(A, B);
    let id = world.write(A, 0, 1, 2);
    world.run_for(ms(300));
    world.heal(A, B);
    world.until("acknowledged", |world| world.answer(id).is_some());
    assert_eq!(world.contents(B)[0], 2);
    assert_eq!(world.spec.record.stamp, stamp(1, 1));
}

#[test]
fn a_write_in_flight_when_the_link_broke_is_acknowledged_once() {
    for seed in 0..20 {
        let mut world = World::pair(seed);
        let ids: Vec<_> = (0..30).map(|block| world.write(A, block, 1, block + 1)).collect();
        world.run_for(std::time::Duration::from_micros(seed * 40));
        world.flap(A, B);
        world.until("all acknowledged", |world| ids.iter().all(|id| world.answer(*id) == Some(&Reply::Done)));
        assert_eq!(world.contents(A), world.contents(B));
    }
}

#[test]
fn a_silent_peer_is_noticed_and_dropped() {
    let mut world = World::pair(7);
    world.silence(A, B);
    let start = world.now;
    let id = world.write(A, 0, 1, 1);
    world.until("acknowledged", |world| world.answer(id).is_some());
    assert!(world.now.since(start) < ms(2000), "{:?}", world.now.since(start));
    assert!(world.disconnects.iter().any(|(_, reason)| reason.contains("nothing was heard")));
}

#[test]
fn no_read_is_served_beyond_the_lease() {
    let mut world = World::pair(8);
    world.write_done(A, 0, 1, 1);
    world.machine(A).is_deaf = true;
    world.decides = false;
    world.silence(A, B);
    // Whatever A's end of the link believes, its lease is over; B may be primary by now.
    world.run_for(ms(1600));
    let id = world.request(A, Op::Read { range: range(0, 1) });
    world.run_for(ms(3000));
    assert_eq!(world.answer(id), None);
    assert!(world.frozen(A).is_some());
}

#[test]
fn a_new_primary_waits_out_its_promise_to_the_old() {
    let mut world = World::pair(9);
    world.machine(A).is_deaf = true;
    world.silence(A, B);
    let start = world.now;
    world.take_over(B, &[B]);
    world.until("waiting", |world| world.frozen(B) == Some(&FreezeReason::OldPrimaryLease { node: A }));
    world.until_serving(B);
    let waited = world.now.since(start);
    assert!(waited > ms(1100) && waited < ms(1600), "{waited:?}");
}

#[test]
fn a_promise_is_kept_over_a_restart() {
    let mut world = World::pair(10);
    world.machine(A).is_deaf = true;
    world.cut(A, B);
    world.take_over(B, &[B]);
    world.until("waiting", |world| world.frozen(B) == Some(&FreezeReason::OldPrimaryLease { node: A }));
    world.run_for(ms(500));
    world.kill(B);
    world.start(B);
    let start = world.now;
    world.until_serving(B);
    assert!(world.now.since(start) > ms(1500), "whoever just started may have promised right before");
}

#[test]
fn the_proof_that_the_old_primary_is_fenced_ends_the_wait() {
    let mut world = World::pair(11);
    world.power_cut(A);
    world.take_over(B, &[B]);
    world.until("waiting", |world| world.frozen(B) == Some(&FreezeReason::OldPrimaryLease { node: A }));
    let start = world.now;
    world.order(B, Order::Fenced { node: A });
    world.until_serving(B);
    assert!(world.now.since(start) < ms(10));
}

#[test]
fn authority_is_handed_over_without_a_wait_when_the_old_primary_steps_down() {
    let mut world = World::pair(12);
    world.write_done(A, 0, 1, 1);
    let start = world.now;
    world.take_over(B, &[A, B]);
    world.until_serving(B);
    assert!(world.now.since(start) < ms(50), "{:?}", world.now.since(start));
    assert_eq!(world.read_value(B, 0), 1);
    assert!(world.machines[&A].served.is_empty() && world.machines[&B].served.contains(&VOLUME));
    let id = world.request(A, Op::Read { range: range(0, 1) });
    assert_eq!(world.answer(id), Some(&Reply::Failed(BlockError::NotServed)));
}

#[test]
fn the_old_generation_is_refused_even_after_a_restart() {
    let mut world = World::pair(13);
    world.machine(A).is_deaf = true;
    world.cut(A, B);
    world.take_over(B, &[B]);
    world.run_for(ms(100));
    world.kill(B);
    world.machine(B).is_deaf = true;
    let spec = world.spec.clone();
    world.spec.record.stamp = stamp(1, 1);
    world.spec.record.primary = A;
    world.start(B); // B is ordered the old record, as by a control plane that lags
    world.heal(A, B);
    let id = world.write(A, 0, 1, 5);
    world.run_for(ms(3000));
    assert_eq!(world.answer(id), None);
    assert_eq!(world.contents(B)[0], 0);
    assert_eq!(world.frozen(A), Some(&FreezeReason::Outdated));
    world.spec = spec;
    for node in [A, B] {
        world.machine(node).is_deaf = false;
        world.order(node, Order::Group(world.spec.clone()));
    }
    world.until_healthy();
}

#[test]
fn a_late_frame_of_an_older_record_or_an_earlier_session_changes_nothing() {
    let mut world = World::pair(14);
    let late = |generation| {
        let (sequence, volume) = (Sequence(1 << 40), VOLUME);
        let message = Message::Write {
            group: GROUP,
            stamp: stamp(1, generation),
            sequence,
            volume,
            range: range(0, 1),
            fua: false,
        };
        let data = blocks(99, 1);
        let checksums = pollux_base::BlockChecksum::of_all(data.as_slice());
        Frame { message, checksums, data: Some(data) }
    };
    world.take_over(A, &[A, B]);
    world.until_healthy();
    let session = world.session(A, B);
    world.input(B, Input::Frame { peer: A, session, frame: late(1) });
    world.run_for(ms(20));
    assert_eq!(world.contents(B)[0], 0, "an older record");
    world.flap(A, B);
    world.until_healthy();
    world.input(B, Input::Frame { peer: A, session, frame: late(2) });
    world.run_for(ms(20));
    assert_eq!(world.contents(B)[0], 0, "an earlier session");
    // The same under the present record and session is taken: the frame was right but for those.
    let session = world.session(A, B);
    world.input(B, Input::Frame { peer: A, session, frame: late(2) });
    world.run_for(ms(20));
    assert_eq!(world.contents(B)[0], 99);
}

#[test]
fn blocks_damaged_on_the_wire_end_the_connection_and_are_not_written() {
    let mut world = World::pair(15);
    let mut damage = true;
    world.lets_through = Box::new(move |_, _, frame| {
        if let (true, Some(data)) = (damage, &frame.data) {
            let mut bytes = data.as_slice().to_vec();
            bytes[100] ^= 1;
            frame.data = Some(pollux_base::Data::copy_of(&bytes));
            damage = false;
        }
        true
    });
    world.write_done(A, 0, 4, 6);
    assert!(world.disconnects.iter().any(|(node, reason)| *node == B && reason.contains("checksum")));
    assert_eq!(world.machines[&B].plane.as_ref().unwrap().damaged_frames(A), 1);
    assert_eq!(world.contents(B)[..5], [6, 6, 6, 6, 0]);
}

#[test]
fn overlapping_writes_reach_both_in_the_same_order() {
    for seed in 20..40 {
        let mut world = World::pair(seed);
        let ids: Vec<_> = (1..40).map(|value| world.write(A, value % 3, 2 + value % 2, value)).collect();
        world.until("all acknowledged", |world| ids.iter().all(|id| world.answer(*id) == Some(&Reply::Done)));
        let (a, b) = (world.contents(A), world.contents(B));
        assert_eq!(a[..6], b[..6]);
        assert_eq!(a[39 % 3], 39, "the last one asked is the last one made");
    }
}

#[test]
fn a_restart_of_either_data_plane_is_a_pause() {
    for (seed, node) in [(41, A), (42, B), (43, A), (44, B)] {
        let mut world = World::pair(seed);
        world.decides = false;
        world.write_done(A, 0, 1, 1);
        for block in 0..20 {
            world.write(A, block * 150, 1, block + 2);
        }
        world.run_for(std::time::Duration::from_micros(400));
        world.kill(node);
        world.run_for(ms(200));
        world.start(node);
        world.until_serving(A);
        world.write_done(A, 1, 1, 77);
        world.run_for(ms(10));
        assert_eq!(world.contents(A), world.contents(B));
        assert_eq!(world.contents(B)[1], 77);
    }
}

#[test]
fn a_block_that_is_bad_on_the_primarys_disk_is_healed_from_the_peer() {
    let mut world = World::pair(16);
    world.write_done(A, 0, 64, 11);
    world.run_for(ms(15_000)); // cold: its checksums are on disk
    let place = place_of(&world, A, 11);
    world.machine(A).disk.rot(place * 4096 + 5);
    let id = world.request(A, Op::Read { range: range(0, 64) });
    world.until("answered", |world| world.answer(id).is_some());
    match world.answer(id) {
        Some(Reply::Data(data)) => assert_eq!(*data, blocks(11, 64)),
        other => panic!("{other:?}"),
    }
    world.until("reported", |world| world.machines[&A].report.as_ref().is_some_and(|report| report.healed_blocks == 1));
    let a = world.contents(A);
    assert_eq!(a[..64], [11; 64], "mended on the disk, too");
}

#[test]
fn a_block_that_no_copy_has_is_an_error_of_just_that_read() {
    let mut world = World::pair(17);
    world.write_done(A, 0, 2, 11);
    world.run_for(ms(15_000));
    for node in [A, B] {
        let place = place_of(&world, node, 11);
        world.machine(node).disk.rot(place * 4096);
    }
    let id = world.request(A, Op::Read { range: range(0, 1) });
    world.until("answered", |world| world.answer(id).is_some());
    assert_eq!(world.answer(id), Some(&Reply::Failed(BlockError::Unreadable)));
    assert_eq!(world.read_value(A, 1), 11);
}

/// The place of the block that says `value` on the node's disk.
fn place_of(world: &World, node: pollux_base::NodeId, value: u64) -> u64 {
    let expected = blocks(value, 1);
    world.machines[&node].disk.blocks().find(|(_, bytes)| *bytes == expected.as_slice()).unwrap().0
}

#[test]
fn a_patch_of_a_bad_block_goes_into_the_peers_copy_of_it() {
    let mut world = World::pair(16);
    world.write_done(A, 0, 2, 11);
    world.run_for(ms(15_000)); // cold: its checksums are on disk
    let place = place_of(&world, A, 11);
    world.machine(A).disk.rot(place * 4096 + 5);
    let id = world.request(A, patch(0, 3, 5));
    world.until("acknowledged", |world| world.answer(id) == Some(&Reply::Done));
    for node in [A, B] {
        assert_eq!(world.sectors(node)[0], [11, 11, 11, 5, 11, 11, 11, 11]);
    }
}

#[test]
fn a_patch_of_a_block_that_no_copy_has_fails_and_changes_nothing() {
    let mut world = World::pair(17);
    world.write_done(A, 0, 2, 11);
    world.run_for(ms(15_000));
    for node in [A, B] {
        let place = place_of(&world, node, 11);
        world.machine(node).disk.rot(place * 4096);
    }
    let id = world.request(A, patch(0, 3, 5));
    world.until("answered", |world| world.answer(id).is_some());
    assert_eq!(world.answer(id), Some(&Reply::Failed(BlockError::Unreadable)));
    // Written whole, it is good again.
    world.write_done(A, 0, 1, 12);
    let id = world.request(A, patch(0, 3, 5));
    world.until("acknowledged", |world| world.answer(id) == Some(&Reply::Done));
    assert_eq!(world.read_values(A, 0), [12, 12, 12, 5, 12, 12, 12, 12]);
    assert_eq!(world.read_value(A, 1), 11);
}

#[test]
fn a_patch_is_made_whether_the_own_disk_fails_at_its_read_or_at_its_write() {
    for class in [OpClass::Read, OpClass::Write] {
        let mut world = World::pair(18);
        world.write_done(A, 0, 1, 1);
        world.run_for(ms(15_000));
        world.machine(A).disk.fail_next(class, DiskError::Io("medium error".to_string(), 5));
        let ids = [1, 2].map(|sector| world.request(A, patch(0, sector, 5)));
        world.until("acknowledged", |world| ids.iter().all(|id| world.answer(*id) == Some(&Reply::Done)));
        assert_eq!(world.read_values(A, 0), [1, 5, 5, 1, 1, 1, 1, 1]);
        assert_eq!(world.sectors(B)[0], [1, 5, 5, 1, 1, 1, 1, 1]);
    }
}

#[test]
fn a_patch_held_by_a_freeze_is_made_once_it_thaws() {
    let mut world = World::pair(5);
    world.write_done(A, 0, 1, 1);
    world.decides = false;
    world.cut(A, B);
    let ids = [1, 2].map(|sector| world.request(A, patch(0, sector, 5)));
    world.run_for(ms(5000));
    assert!(ids.iter().all(|id| world.answer(*id).is_none()));
    world.take_over(A, &[A]);
    world.until("acknowledged", |world| ids.iter().all(|id| world.answer(*id) == Some(&Reply::Done)));
    assert_eq!(world.read_values(A, 0), [1, 5, 5, 1, 1, 1, 1, 1]);
}

#[test]
fn a_failing_disk_of_the_primary_does_not_stop_the_guest() {
    let mut world = World::pair(18);
    world.write_done(A, 0, 1, 1);
    let error = DiskError::Io("medium error".to_string(), 5);
    world.machine(A).disk.fail_next(OpClass::Write, error);
    world.write_done(A, 1, 1, 2);
    assert_eq!(world.spec.record.in_sync, [B].into());
    assert!(world.reports.iter().any(|(_, node, report)| *node == A && matches!(report, Report::PoolFailed { .. })));
    assert_eq!((world.read_value(A, 0), world.read_value(A, 1)), (1, 2));
    world.write_done(A, 1023, 4, 3);
    world.flush_done(A);
    assert_eq!(world.read_value(A, 1025), 3);
    assert_eq!(world.contents(B)[1], 2);
}

#[test]
fn who_was_stopped_itself_calls_nobody_late() {
    let mut world = World::pair(20);
    world.write_done(A, 0, 1, 1);
    for value in 2..6 {
        let write = world.write(A, value, 1, value);
        // Both machines stand still; what was under way is done in that time, and heard of only afterwards.
        world.now = world.now + ms(6000);
        world.until("answered", |world| world.answer(write).is_some());
        world.run_for(ms(2000));
        assert_eq!(world.spec.record.in_sync, [A, B].into());
    }
}

#[test]
fn a_hanging_disk_of_the_primary_does_not_stop_the_guest_for_good() {
    let mut world = World::pair(19);
    world.write_done(A, 0, 1, 1);
    world.machine(A).is_disk_stuck = true;
    let write = world.write(A, 1, 1, 2);
    let read = world.request(A, Op::Read { range: range(0, 1) });
    world.until("both answered", |world| world.answer(write).is_some() && world.answer(read).is_some());
    assert_eq!(world.answer(write), Some(&Reply::Done));
    assert_eq!(world.spec.record.in_sync, [B].into());
}

#[test]
fn a_failing_disk_of_the_secondary_drops_it() {
    let mut world = World::pair(20);
    let error = DiskError::Io("medium error".to_string(), 5);
    world.machine(B).disk.fail_next(OpClass::Write, error);
    world.write_done(A, 1, 1, 2);
    assert_eq!(world.spec.record.in_sync, [A].into());
}

#[test]
fn requests_outside_a_volume_or_of_none_fail_at_once() {
    let mut world = World::pair(21);
    for (start, count) in [(BLOCKS, 1), (BLOCKS - 1, 2), (u64::MAX, 1), (1, u64::MAX)] {
        let id = world.request(A, Op::Read { range: range(start, count) });
        assert_eq!(world.answer(id), Some(&Reply::Failed(BlockError::OutOfRange)), "{start}+{count}");
    }
    let id = pollux_base::RequestId(999);
    world.input(A, Input::Request(pollux_base::Request { id, volume: VolumeId(99), op: Op::Flush }));
    assert_eq!(world.answer(id), Some(&Reply::Failed(BlockError::NoVolume)));
}

#[test]
fn steady_overwrites_cost_one_disk_write_per_node() {
    let mut world = World::pair(22);
    for value in 0..10 {
        world.write_done(A, 0, 1, value);
    }
    let before = [A, B].map(|node| world.machines[&node].disk.counts());
    for value in 0..100 {
        world.write_done(A, 0, 1, value);
    }
    for (node, before) in [A, B].into_iter().zip(before) {
        let after = world.machines[&node].disk.counts();
        assert_eq!(after.writes - before.writes, 100, "{node}");
        assert_eq!(after.flushes, before.flushes);
    }
}

#[test]
fn an_idle_group_sends_only_leases() {
    let mut world = World::pair(23);
    world.write_done(A, 0, 1, 1);
    world.run_for(ms(15_000));
    world.messages.clear();
    world.run_for(ms(4000));
    assert!(world.messages.iter().all(|message| message.contains("lease")), "{:?}", world.messages);
    assert!(world.messages.len() <= 22, "a question and an answer every 400 ms");
}

#[test]
fn a_stream_has_what_comes_next_marked_before_it_is_there_and_scattered_writes_do_not() {
    let mut world = World::pair(25);
    let extents = |world: &World, node| world.hot(node).iter().map(|extent| extent.0).collect::<Vec<_>>();
    world.write_done(A, 3 * 1024, 1, 1);
    assert_eq!((extents(&world, A), extents(&world, B)), (vec![3], vec![3]));
    world.write_done(A, 0, 1, 1);
    assert_eq!((extents(&world, A), extents(&world, B)), (vec![0, 3], vec![0, 3]));
    // It enters the second extent, behind one that is hot.
    world.write_done(A, 1024, 1, 1);
    assert_eq!(
        (extents(&world, A), extents(&world, B)),
        (vec![0, 1, 2, 3, 4], vec![0, 1, 2, 3, 4]),
        "to the volume's end"
    );
    world.run_for(ms(15_000));
    assert_eq!((extents(&world, A), extents(&world, B)), (vec![], vec![]), "they cool like those that were written");
}

#[test]
fn the_life_of_a_write_as_the_wire_sees_it() {
    let mut world = World::pair(24);
    world.messages.retain(|_| false);
    world.write_done(A, 0, 1, 1);
    world.flush_done(A);
    let messages: Vec<&str> =
        world.messages.iter().map(String::as_str).filter(|text| !text.contains("lease")).collect();
    let write = ["n1>n2 heat [x0]", "n1>n2 write e1g1 b0+1", "n2>n1 done e1g1"];
    assert_eq!(messages, [&write[..], &["n1>n2 flush e1g1", "n2>n1 done e1g1"]].concat());
}
