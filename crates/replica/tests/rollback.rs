//! Going back to a snapshot, and groups that are born as copies of one: the same on every replica, whatever dies meanwhile
//! (`docs/design/0007-snapshots.md`).
#![allow(clippy::unwrap_used)]

mod world;

use pollux_base::order::Order;
use pollux_base::record::{GroupRecord, GroupSpec, Lineage, Snapshots};
use pollux_base::{BlockError, ByteCount, GroupId, NodeId, Op, Reply, VolumeId};
use pollux_replica::Input;
use std::collections::BTreeMap;
use world::*;

fn firsts(world: &World, node: NodeId, volume: VolumeId) -> Vec<u64> {
    world.sectors_of(node, volume).iter().map(|values| values[0]).collect()
}

/// A pair with a snapshot, and what it holds. Since then the volume has changed: blocks were written over, written first,
/// and zeroed.
fn changed_since_a_snapshot(seed: u64) -> (World, VolumeId, Vec<u64>) {
    let mut world = World::pair(seed);
    for block in 0..30 {
        world.write_done(A, block * 70, 2, block + 1);
    }
    let frozen = world.take_snapshot();
    world.until_taken();
    let held = world.contents(A);
    for block in 0..10 {
        world.write_done(A, block * 70, 1, 100 + block);
        world.write_done(A, block * 70 + 20, 1, 200 + block);
    }
    let id = world.request(A, Op::Zero { range: range(15 * 70, 2), fua: false });
    world.until("zeroed", |world| world.answer(id) == Some(&Reply::Done));
    (world, frozen, held)
}

fn all_hold(world: &mut World, expected: &[u64], about: &str) {
    world.run_for(ms(50));
    for node in world.spec.record.in_sync.clone() {
        assert!(firsts(world, node, VOLUME) == expected, "{about}: {node} holds something else");
    }
}

#[test]
fn what_was_written_since_is_gone_everywhere_and_the_snapshot_stays() {
    let (mut world, frozen, held) = changed_since_a_snapshot(1);
    // Nobody answers what is under way, and nothing of it is seen afterwards.
    for block in 0..20 {
        world.write(A, block * 70 + 1, 1, 900 + block);
    }
    world.roll_back(frozen);
    world.until_serving(A);
    all_hold(&mut world, &held, "after it");
    world.write_done(A, 3, 1, 5000);
    let mut expected = held.clone();
    expected[3] = 5000;
    all_hold(&mut world, &expected, "with a write after it");
    // The same record again, and a start with it, change nothing.
    world.order_all();
    world.kill(A);
    world.kill(B);
    world.start(A);
    world.start(B);
    world.until_serving(A);
    all_hold(&mut world, &expected, "after a restart");
    assert!(firsts(&world, A, frozen) == held && firsts(&world, B, frozen) == held);
}

#[test]
fn whoever_dies_meanwhile_all_have_gone_back_in_the_end() {
    for (seed, victim) in (0..80).zip([A, B].into_iter().cycle()) {
        let (mut world, frozen, held) = changed_since_a_snapshot(500 + seed);
        for block in 0..8 {
            world.write(A, block * 70 + 1, 1, 900 + block);
        }
        world.roll_back(frozen);
        let other = world.lose_after(seed, victim, seed % 3 == 0);
        all_hold(&mut world, &held, &format!("seed {seed}, alone"));
        world.write_done(other, 7, 1, 4000);
        world.start(victim);
        world.until_healthy();
        let mut expected = held.clone();
        expected[7] = 4000;
        all_hold(&mut world, &expected, &format!("seed {seed}, together"));
    }
}

#[test]
fn a_replica_that_was_away_goes_back_too() {
    let (mut world, frozen, held) = changed_since_a_snapshot(2);
    world.kill(B);
    world.take_over(A, &[A]);
    world.until_serving(A);
    world.write_done(A, 11 * 70, 1, 3000);
    world.roll_back(frozen);
    world.until_serving(A);
    world.start(B);
    world.until_healthy();
    all_hold(&mut world, &held, "both");
}

#[test]
fn a_volume_grows_while_it_is_written_and_only_when_all_have_grown_is_the_new_part_used() {
    let mut world = World::pair(5);
    let beyond = BLOCKS + 5000;
    let refused = world.request(A, Op::Write { range: range(beyond, 1), data: blocks(1, 1), fua: false });
    world.until("refused", |world| world.answer(refused).is_some());
    assert_eq!(world.answer(refused), Some(&Reply::Failed(BlockError::OutOfRange)));
    let before: Vec<_> = (0..20).map(|block| world.write(A, block * 64, 1, block + 1)).collect();
    world.spec.volumes.insert(VOLUME, ByteCount((BLOCKS + 10_240) * 4096));
    // The other node's control plane is late: it hears of it from the primary.
    let order = Input::Order(Box::new(Order::Group(world.spec.clone())));
    world.input(A, order);
    let after: Vec<_> = (0..20).map(|block| world.write(A, beyond + block * 64, 1, 300 + block)).collect();
    world.until("all are acknowledged", |world| {
        before.iter().chain(&after).all(|id| world.answer(*id) == Some(&Reply::Done))
    });
    assert_eq!(world.spec.record.in_sync, [A, B].into(), "nobody was dropped for it");
    world.kill(A);
    world.take_over(B, &[B]);
    world.until_serving(B);
    for block in 0..20 {
        let id = world.request(B, Op::Read { range: range(beyond + block * 64, 1) });
        world.until("read", |world| world.answer(id).is_some());
        let value = match world.answer(id) {
            Some(Reply::Data(data)) => value_of(data.as_slice()),
            other => panic!("{other:?}"),
        };
        assert_eq!(value, 300 + block);
    }
}

const CLONE: VolumeId = VolumeId(900);
const CLONES: GroupId = GroupId(901);

/// The record of a group that is born as a copy of the snapshot's volume.
fn born_of(world: &World, frozen: VolumeId) -> GroupSpec {
    let at = stamp(1, 1);
    let mut lineage = Lineage::default();
    lineage.push(at);
    let origins = BTreeMap::from([(CLONE, frozen)]);
    GroupSpec {
        group: CLONES,
        volumes: BTreeMap::from([(CLONE, ByteCount(BLOCKS * 4096))]),
        keys: BTreeMap::new(),
        snapshots: Snapshots { minted: 901, origins, ..Snapshots::default() },
        record: GroupRecord { stamp: at, primary: A, in_sync: [A, B].into() },
        lineage,
        ..world.spec.clone()
    }
}

#[test]
fn a_clone_begins_as_the_snapshot_and_goes_its_own_way() {
    let (mut world, frozen, held) = changed_since_a_snapshot(3);
    let spec = born_of(&world, frozen);
    for node in [A, B] {
        world.input(node, Input::Order(Box::new(Order::Group(spec.clone()))));
    }
    let id = world.request_of(A, CLONE, Op::Write { range: range(2, 1), data: blocks(77, 1), fua: false });
    world.until("written", |world| world.answer(id) == Some(&Reply::Done));
    world.write_done(A, 4, 1, 66);
    world.run_for(ms(50));
    let mut expected = held.clone();
    expected[2] = 77;
    for node in [A, B] {
        assert!(firsts(&world, node, CLONE) == expected, "{node}");
        assert!(firsts(&world, node, frozen) == held, "{node}");
        assert_eq!(firsts(&world, node, VOLUME)[2..5], [0, 0, 66], "{node}");
    }
}

#[test]
fn a_disk_that_was_replaced_before_a_clone_is_born_does_not_count() {
    let (mut world, frozen, held) = changed_since_a_snapshot(4);
    world.kill(B);
    world.format(B);
    world.start(B);
    let spec = born_of(&world, frozen);
    for node in [A, B] {
        world.input(node, Input::Order(Box::new(Order::Group(spec.clone()))));
    }
    world.run_for(ms(500));
    let id = world.request_of(A, CLONE, Op::Read { range: range(0, 1) });
    world.run_for(ms(500));
    assert_eq!(world.answer(id), None, "a primary does not serve with what is no copy");
    assert!(firsts(&world, A, CLONE) == held);
}
