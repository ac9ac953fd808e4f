//! Snapshots of a group: one point of the write stream, the same on every replica, whatever dies meanwhile
//! (`docs/design/0007-snapshots.md`).
#![allow(clippy::unwrap_used)]

mod world;

use pollux_base::order::FreezeReason;
use pollux_base::{BlockError, ExtentIndex, NodeId, Op, Order, Reply, Report, VolumeId};
use pollux_replica::wire::Message;
use world::*;

/// Every replica in sync holds the same in this volume; gives that.
fn same(world: &mut World, volume: VolumeId) -> Vec<u64> {
    world.run_for(ms(50));
    let members: Vec<NodeId> = world.spec.record.in_sync.iter().copied().collect();
    let expected = world.sectors_of(members[0], volume);
    for node in &members[1..] {
        assert!(world.sectors_of(*node, volume) == expected, "{node} has another {volume} than {}", members[0]);
    }
    expected.into_iter().map(|values| values[0]).collect()
}

fn volumes_on(world: &World, node: NodeId) -> usize {
    world.machines[&node].plane.as_ref().unwrap().store().volumes().count()
}

#[test]
fn a_snapshot_is_what_was_acknowledged_and_stays_so_while_guests_write_on() {
    let mut world = World::pair(1);
    for block in 0..40 {
        world.write_done(A, block * 60, 2, block + 1);
    }
    let before = world.contents(A);
    let frozen = world.take_snapshot();
    world.until_taken();
    for block in 0..40 {
        world.write_done(A, block * 60 + 1, 2, 1000 + block);
    }
    assert_eq!(same(&mut world, frozen), before);
    assert_eq!(same(&mut world, VOLUME)[61], 1001);
    // It can be read, and not written.
    let id = world.request_of(A, frozen, Op::Read { range: range(60, 2) });
    world.until("read", |world| world.answer(id).is_some());
    let read = world.answer(id).cloned();
    assert!(matches!(read, Some(Reply::Data(data)) if value_of(&data.as_slice()[4096..]) == 2));
    let id = world.request_of(A, frozen, Op::Write { range: range(0, 1), data: blocks(9, 1), fua: false });
    world.until("refused", |world| world.answer(id).is_some());
    assert_eq!(world.answer(id), Some(&Reply::Failed(BlockError::ReadOnly)));
}

#[test]
fn writes_wait_for_a_snapshot_and_none_is_lost_or_counted_twice() {
    for seed in 0..30 {
        let mut world = World::pair(100 + seed);
        for block in 0..20 {
            world.write_done(A, block * 64, 1, block + 1);
        }
        let writes: Vec<_> = (0..20).map(|block| (block, world.write(A, block * 64, 1, 500 + block))).collect();
        let frozen = world.take_snapshot();
        let later: Vec<_> = (0..20).map(|block| (block, world.write(A, block * 64 + 1, 1, 700 + block))).collect();
        world.until_taken();
        world.until("all are answered", |world| {
            writes.iter().chain(&later).all(|(_, id)| world.answer(*id) == Some(&Reply::Done))
        });
        let was = same(&mut world, frozen);
        let is = same(&mut world, VOLUME);
        for block in 0..20 {
            let at = (block * 64) as usize;
            assert!(was[at] == block + 1 || was[at] == 500 + block, "what was under way is in it or not");
            assert_eq!((is[at], is[at + 1]), (500 + block, 700 + block));
        }
    }
}

#[test]
fn whoever_dies_while_it_is_taken_all_have_it_at_one_point_in_the_end() {
    for (seed, victim) in (0..120).zip([A, B].into_iter().cycle()) {
        let mut world = World::pair(1000 + seed);
        for block in 0..30 {
            world.write_done(A, block * 40, 1, block + 1);
        }
        for block in 0..10 {
            world.write(A, block * 40, 1, 300 + block);
        }
        let frozen = world.take_snapshot();
        // So far into it, and then the end of one of the two.
        let other = world.lose_after(seed, victim, seed % 3 == 0);
        world.until_taken();
        for block in 0..10 {
            world.write_done(other, block * 40 + 2, 1, 800 + block);
        }
        world.start(victim);
        world.until_healthy();
        let was = same(&mut world, frozen);
        assert!(was.iter().all(|value| *value < 800), "seed {seed}: nothing that was written after it");
        for block in 10..30 {
            assert_eq!(was[block * 40], block as u64 + 1, "seed {seed}: everything that was acknowledged before it");
        }
        same(&mut world, VOLUME);
    }
}

#[test]
fn a_replica_that_was_away_gets_every_snapshot_as_it_was() {
    let mut world = World::pair(7);
    for block in 0..30 {
        world.write_done(A, block * 70, 1, block + 1);
    }
    let first = world.take_snapshot();
    world.until_taken();
    world.kill(B);
    world.take_over(A, &[A]);
    let mut snapshots = vec![first];
    for round in 1..4 {
        for block in 0..10 {
            world.write_done(A, block * 140 + round, 3, 100 * round + block);
        }
        snapshots.push(world.take_snapshot());
        world.until_taken();
    }
    world.write_done(A, 5, 1, 999);
    let expected: Vec<Vec<u64>> =
        snapshots.iter().map(|volume| world.sectors_of(A, *volume).iter().map(|values| values[0]).collect()).collect();
    world.start(B);
    world.until_healthy();
    for (volume, expected) in snapshots.iter().zip(expected) {
        assert!(same(&mut world, *volume) == expected, "{volume} changed");
    }
    same(&mut world, VOLUME);
    // One that is made anew gets them, too.
    world.kill(B);
    world.take_over(A, &[A]);
    world.format(B);
    world.start(B);
    world.until_healthy();
    for volume in &snapshots {
        same(&mut world, *volume);
    }
    same(&mut world, VOLUME);
}

/// Found by the simulator: a replica that counts already, by its primary's word only, made the snapshot when it heard that one
/// was wanted, and answered that it has it when it was asked at the right moment.
#[test]
fn a_replica_that_is_about_to_be_in_sync_takes_a_snapshot_when_it_is_asked_and_not_before() {
    for seed in 0..20 {
        let mut world = World::pair(3000 + seed);
        world.write_done(A, 0, 1, 1);
        world.cut(A, B);
        world.take_over(A, &[A]);
        world.write_done(A, 1, 1, 2);
        world.decides = false;
        world.heal(A, B);
        world.until_said_current();
        world.run_for(ms(20));
        // On its way to both when they lose each other.
        let write = world.write(A, 7, 1, 3);
        for _ in 0..seed {
            let end = world.now + ms(1);
            world.step(end);
        }
        world.cut(A, B);
        let frozen = world.take_snapshot();
        world.run_for(ms(20));
        world.heal(A, B);
        world.until("it is answered", |world| world.answer(write) == Some(&Reply::Done));
        world.decides = true;
        world.until_taken();
        world.until_healthy();
        assert_eq!(same(&mut world, frozen)[7], 3);
    }
}

/// Found by the simulator: a primary that had just started knew an older text of its record, brought a replica up to date by
/// that, and then learned of a snapshot that it had taken before. The replica made it over newer content, unseen.
#[test]
fn a_primary_that_learns_late_of_a_snapshot_has_replicas_compared_that_were_not_there() {
    for seed in 0..20 {
        let mut world = World::pair(5000 + seed);
        world.write_done(A, 0, 1, 1);
        world.kill(B);
        world.take_over(A, &[A]);
        let before = world.spec.snapshots.clone();
        world.write_done(A, 7, 1, 2);
        let frozen = world.take_snapshot();
        world.until_taken();
        world.write_done(A, 7, 1, 3);
        let after = std::mem::replace(&mut world.spec.snapshots, before);
        world.kill(A);
        world.decides = false;
        world.start(A);
        world.start(B);
        world.until_said_current();
        for _ in 0..seed {
            let end = world.now + ms(1);
            world.step(end);
        }
        world.spec.snapshots = after;
        world.order_all();
        world.decides = true;
        world.run_for(ms(600));
        world.until_healthy();
        assert_eq!(same(&mut world, frozen)[7], 2);
        assert_eq!(same(&mut world, VOLUME)[7], 3);
    }
}

#[test]
fn a_deleted_snapshot_goes_everywhere_and_nothing_else_with_it() {
    let mut world = World::pair(8);
    world.write_done(A, 0, 8, 1);
    let one = world.take_snapshot();
    world.until_taken();
    world.write_done(A, 2, 2, 2);
    let two = world.take_snapshot();
    world.until_taken();
    world.write_done(A, 3, 2, 3);
    let kept = same(&mut world, two);
    world.delete_snapshot(one);
    world.run_for(ms(200));
    assert_eq!((volumes_on(&world, A), volumes_on(&world, B)), (2, 2));
    assert_eq!(same(&mut world, two), kept);
    assert_eq!(same(&mut world, VOLUME)[..6], [1, 1, 2, 3, 3, 1]);
    // Away when it was deleted.
    world.kill(B);
    world.take_over(A, &[A]);
    world.delete_snapshot(two);
    world.start(B);
    world.until_healthy();
    world.run_for(ms(200));
    assert_eq!((volumes_on(&world, A), volumes_on(&world, B)), (1, 1));
    assert_eq!(same(&mut world, VOLUME)[..6], [1, 1, 2, 3, 3, 1]);
}

/// A control plane that has just started may not have read all of its log.
/// Everything in which two volumes differ, as this node tells it; how many pages it took.
fn differences(world: &mut World, node: NodeId, one: VolumeId, two: VolumeId) -> (Vec<(u64, u64)>, usize) {
    let (mut runs, mut pages, mut from) = (Vec::new(), 0, ExtentIndex(0));
    loop {
        pages += 1;
        let id = 70 + pages as u64;
        world.reports.clear();
        world.order(node, Order::Compare { id, group: GROUP, one, two, from });
        let answer = |world: &World| {
            let mut reports = world.reports.iter().map(|(_, _, report)| report.clone());
            reports.find(|report| matches!(report, Report::Compared { id: other, .. } if *other == id))
        };
        world.until("compared", |world| answer(world).is_some());
        let Some(Report::Compared { result, .. }) = answer(world) else { unreachable!("just seen") };
        let page = result.unwrap();
        runs.extend(page.runs.iter().map(|run| (run.start.0, run.count.0)));
        match page.next {
            Some(next) => from = next,
            None => return (runs, pages),
        }
    }
}

#[test]
fn the_difference_of_two_snapshots_is_what_was_changed_between_them_and_nothing_else() {
    let mut world = World::pair(12);
    for block in 0..30 {
        world.write_done(A, block * 100, 3, block + 1);
    }
    let one = world.take_snapshot();
    world.until_taken();
    world.write_done(A, 101, 1, 500);
    world.write_done(A, 1200, 3, 13); // what is there already
    world.write_done(A, 2050, 4, 501);
    let zeroed = world.request(A, Op::Zero { range: range(300, 2), fua: false });
    world.until("zeroed", |world| world.answer(zeroed) == Some(&Reply::Done));
    let two = world.take_snapshot();
    world.until_taken();
    world.write_done(A, 700, 1, 502);
    for node in [A, B] {
        let (runs, _) = differences(&mut world, node, one, two);
        assert_eq!(runs, [(101, 1), (300, 2), (2050, 4)], "{node}");
        assert_eq!(differences(&mut world, node, two, one).0, runs, "{node}");
        assert_eq!(differences(&mut world, node, two, two).0, [], "{node}");
    }
    // What is written to has no difference that stays true.
    world.reports.clear();
    world.order(A, Order::Compare { id: 7, group: GROUP, one, two: VOLUME, from: ExtentIndex(0) });
    world.until("refused", |world| {
        world.reports.iter().any(|(_, _, report)| matches!(report, Report::Compared { id: 7, result: Err(_) }))
    });
}

#[test]
fn a_record_from_before_a_deletion_harms_nobody() {
    let mut world = World::pair(11);
    world.write_done(A, 0, 8, 1);
    let frozen = world.take_snapshot();
    world.until_taken();
    world.write_done(A, 2, 2, 2);
    let old = world.spec.clone();
    world.delete_snapshot(frozen);
    world.run_for(ms(200));
    let new = std::mem::replace(&mut world.spec, old);
    world.kill(A);
    world.kill(B);
    world.start(A);
    world.start(B);
    world.until_serving(A);
    let id = world.request_of(A, frozen, Op::Read { range: range(0, 1) });
    world.until("answered", |world| world.answer(id).is_some());
    assert!(matches!(world.answer(id), Some(Reply::Failed(_))), "it is gone");
    world.write_done(A, 4, 2, 3);
    world.spec = new;
    world.order_all();
    world.write_done(A, 5, 1, 4);
    assert_eq!(same(&mut world, VOLUME)[..6], [1, 1, 2, 2, 3, 4]);
    assert_eq!((volumes_on(&world, A), volumes_on(&world, B)), (1, 1));
}

#[test]
fn a_replica_that_does_not_answer_is_dropped_and_writes_go_on() {
    let mut world = World::pair(9);
    world.write_done(A, 0, 1, 1);
    world.lets_through = Box::new(|_, _, frame| !matches!(frame.message, Message::Snapshot { .. }));
    let frozen = world.take_snapshot();
    world.until("frozen for it", |world| world.frozen(A) == Some(&FreezeReason::Snapshot));
    let write = world.write(A, 1, 1, 2);
    world.until_taken();
    world.until("acknowledged", |world| world.answer(write).is_some());
    assert_eq!(world.spec.record.in_sync, [A].into(), "it did not answer");
    world.lets_through = Box::new(|_, _, _| true);
    world.until_healthy();
    assert_eq!(same(&mut world, frozen)[..2], [1, 0]);
}

#[test]
fn how_it_ended_is_said_until_the_log_knows() {
    let mut world = World::pair(10);
    world.write_done(A, 0, 1, 1);
    world.decides = false;
    world.take_snapshot();
    world.run_for(ms(2200));
    let told = world
        .reports
        .iter()
        .filter(|(_, node, report)| *node == A && matches!(report, Report::Snapshot { result: Ok(()), .. }));
    assert!((4..=6).contains(&told.count()), "each half second");
    world.write_done(A, 1, 1, 2); // and meanwhile nobody waits for the log
    world.decides = true;
    world.until_taken();
}
