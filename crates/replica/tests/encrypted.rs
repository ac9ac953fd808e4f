//! Volumes that are encrypted at rest: clients see plain text, disks and wires nothing of it, and who has no key carries a
//! replica all the same.
#![allow(clippy::unwrap_used)]

mod world;

use pollux_base::order::{FreezeReason, ReplicaState};
use pollux_base::record::{GroupRecord, GroupSpec, Lineage, Snapshots};
use pollux_base::{BlockIndex, ByteCount, Data, GroupId, Op, Order, Reply, VolumeId, VolumeSecret};
use pollux_replica::wire::Frame;
use std::cell::Cell;
use std::rc::Rc;
use world::*;

const NO_KEY: ReplicaState = ReplicaState::Frozen { reason: FreezeReason::NoKey { volume: VOLUME } };

fn state(world: &World, node: pollux_base::NodeId) -> Option<ReplicaState> {
    world.machines[&node].report.as_ref().map(|report| report.state.clone())
}

/// Whether these bytes are anywhere on the node's disk, at the place of a sector.
fn holds(world: &World, node: pollux_base::NodeId, sector: &[u8]) -> bool {
    let disk = &world.machines[&node].disk;
    disk.blocks().any(|(_, page)| page.chunks(512).any(|found| found == sector))
}

#[test]
fn clients_read_what_they_wrote_and_no_disk_holds_it() {
    for is_encrypted in [true, false] {
        let mut world = if is_encrypted { World::encrypted(1, &[A, B]) } else { World::new(1, &[A, B]) };
        world.until_serving(A);
        world.write_done(A, 1020, 9, 7);
        let patch = Op::Patch { block: BlockIndex(1021), offset: 512, data: blocks(8, 1).slice(0..512), fua: false };
        let patched = world.request(A, patch);
        // Into a block that is not stored yet.
        let fresh = Op::Patch { block: BlockIndex(5), offset: 3584, data: blocks(9, 1).slice(0..512), fua: true };
        let filled = world.request(A, fresh);
        world.until("both are answered", |world| [patched, filled].iter().all(|id| world.answer(*id).is_some()));
        world.flush_done(A);
        assert_eq!(world.read_values(A, 1021), [7, 8, 7, 7, 7, 7, 7, 7]);
        assert_eq!(world.read_values(A, 5), [0, 0, 0, 0, 0, 0, 0, 9]);
        assert_eq!(world.read_value(A, 6), 0, "nothing was written there");
        for node in [A, B] {
            for value in [7, 8, 9] {
                let found = holds(&world, node, &blocks(value, 1).as_slice()[..512]);
                assert_eq!(found, !is_encrypted, "{value} on {node}");
            }
        }
        world.same(&[A, B]);
    }
}

#[test]
fn nothing_of_it_is_on_the_wire() {
    let mut world = World::encrypted(2, &[A, B]);
    let is_seen = Rc::new(Cell::new(false));
    let (seen, plain) = (is_seen.clone(), blocks(7, 1));
    world.lets_through = Box::new(move |_, _, frame: &mut Frame| {
        let data = frame.data.as_ref().map(Data::as_slice).unwrap_or_default();
        seen.set(seen.get() || data.chunks(4096).any(|block| block == plain.as_slice()));
        true
    });
    world.until_serving(A);
    world.write_done(A, 0, 40, 7);
    world.kill(B);
    world.until_serving_alone(A);
    world.write_done(A, 20, 40, 7);
    world.start(B);
    world.until_whole();
    assert!(world.sent_bytes > 40 * 4096);
    assert!(!is_seen.get());
    world.same(&[A, B]);
}

#[test]
fn without_its_key_clients_wait_and_a_key_of_another_name_changes_nothing() {
    let mut world = World::encrypted(3, &[A, B]);
    let secret = world.secrets.remove(&B).unwrap();
    world.until_serving(A);
    world.kill(B);
    world.until_serving_alone(A);
    world.write_done(A, 0, 2000, 7);
    // B carries a replica, is brought up to date, and becomes primary, all without a key.
    world.start(B);
    world.until_whole();
    world.take_over(B, &[A, B]);
    world.until("it says what is missing", |world| state(world, B) == Some(NO_KEY));
    let read = world.request(B, Op::Read { range: range(1999, 1) });
    let write = world.write(B, 3, 1, 8);
    let key = world.spec.keys[&VOLUME];
    let other: [u8; 64] = std::array::from_fn(|at| !secret.expose()[at]);
    world.order(B, Order::VolumeKey { key, secret: VolumeSecret::new(other) });
    world.run_for(ms(500));
    assert_eq!(state(&world, B), Some(NO_KEY));
    assert!(world.answer(read).is_none() && world.answer(write).is_none(), "held, not failed");
    // Replication goes on: A leaves and comes back.
    world.kill(A);
    world.until("A is out", |world| world.spec.record.in_sync.len() == 1);
    world.start(A);
    world.until_whole();
    world.order(B, Order::VolumeKey { key, secret });
    world.until("both are answered", |world| [read, write].iter().all(|id| world.answer(*id).is_some()));
    assert_eq!(world.answer(read), Some(&Reply::Data(blocks(7, 1))));
    assert_eq!(world.answer(write), Some(&Reply::Done));
    assert_eq!(world.read_value(B, 3), 8);
    world.same(&[A, B]);
}

#[test]
fn a_snapshot_has_the_key_of_its_volume_and_rolling_back_needs_no_other() {
    let mut world = World::encrypted(4, &[A, B]);
    world.until_serving(A);
    world.write_done(A, 10, 3, 7);
    let snapshot = world.take_snapshot();
    world.until_taken();
    world.run_for(ms(50));
    world.write_done(A, 11, 1, 8);
    let of_snapshot = |world: &mut World| {
        let id = world.request_of(A, snapshot, Op::Read { range: range(10, 3) });
        world.until("it is read", |world| world.answer(id).is_some());
        world.answer(id).cloned()
    };
    assert_eq!(of_snapshot(&mut world), Some(Reply::Data(blocks(7, 3))));
    assert_eq!(world.read_value(A, 11), 8);
    world.roll_back(snapshot);
    world.until_serving(A);
    world.run_for(ms(50));
    assert_eq!(world.read_value(A, 11), 7);
    assert_eq!(of_snapshot(&mut world), Some(Reply::Data(blocks(7, 3))));
}

#[test]
fn a_clone_reads_what_it_shares_and_writes_with_the_same_key() {
    const CLONE: VolumeId = VolumeId(900);
    let mut world = World::encrypted(6, &[A, B]);
    world.until_serving(A);
    world.write_done(A, 10, 3, 7);
    let frozen = world.take_snapshot();
    world.until_taken();
    world.run_for(ms(50));
    let key = world.spec.keys[&VOLUME];
    let mut lineage = Lineage::default();
    lineage.push(stamp(1, 1));
    let born = GroupSpec {
        group: GroupId(901),
        volumes: [(CLONE, ByteCount(BLOCKS * 4096))].into(),
        keys: [(CLONE, key)].into(),
        snapshots: Snapshots { minted: 901, origins: [(CLONE, frozen)].into(), ..Snapshots::default() },
        record: GroupRecord { stamp: stamp(1, 1), primary: A, in_sync: [A, B].into() },
        lineage,
        ..world.spec.clone()
    };
    for node in [A, B] {
        world.order(node, Order::Group(born.clone()));
    }
    world.run_for(ms(50));
    // The volume goes, its key stays with the clone.
    let patch = Op::Patch { block: BlockIndex(11), offset: 0, data: blocks(8, 1).slice(0..512), fua: false };
    let patched = world.request_of(A, CLONE, patch);
    world.until("it is patched", |world| world.answer(patched).is_some());
    for node in [A, B] {
        world.order(node, Order::Forget { group: GROUP });
    }
    world.run_for(ms(50));
    let id = world.request_of(A, CLONE, Op::Read { range: range(10, 2) });
    world.until("it is read", |world| world.answer(id).is_some());
    let Some(Reply::Data(data)) = world.answer(id) else { panic!("{:?}", world.answer(id)) };
    assert_eq!(values_of(&data.as_slice()[..4096]), [7; 8]);
    assert_eq!(values_of(&data.as_slice()[4096..]), [8, 7, 7, 7, 7, 7, 7, 7]);
    for node in [A, B] {
        assert!(!holds(&world, node, &blocks(7, 1).as_slice()[..512]), "{node}");
    }
}

#[test]
fn a_key_is_kept_until_its_last_group_is_gone() {
    let mut world = World::encrypted(5, &[A, B]);
    world.until_serving(A);
    world.write_done(A, 0, 1, 7);
    world.order(A, Order::Forget { group: GROUP });
    world.run_for(ms(100));
    // Ids are not used twice, so a group of another number asks for the key: as if the first had never been.
    world.spec.group = GroupId(2);
    world.order(A, Order::Group(world.spec.clone()));
    world.order(B, Order::Group(world.spec.clone()));
    world.until("it is missing", |world| state(world, A) == Some(NO_KEY));
}
