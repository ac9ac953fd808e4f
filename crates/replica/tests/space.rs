//! A pool that is full on one node only, as it is when nodes carry different groups.
#![allow(clippy::unwrap_used)]

mod world;

use pollux_base::order::FreezeReason;
use pollux_base::{ByteCount, GroupId, NodeId, Op, Order, Reply, Report, Request, RequestId, VolumeId};
use pollux_store::UNIT_BYTES;
use std::collections::BTreeSet;
use world::*;

/// Another group of which this node alone has a replica, with a volume that takes all that is free there.
fn fill(world: &mut World, node: NodeId) -> GroupId {
    let (group, volume) = (GroupId(2), VolumeId(21));
    let mut filler = world.spec.clone();
    filler.group = group;
    filler.replicas = BTreeSet::from([node]);
    (filler.record.primary, filler.record.in_sync) = (node, BTreeSet::from([node]));
    let free = |world: &World| world.machines[&node].plane.as_ref().unwrap().store().free().0;
    filler.volumes = [(volume, ByteCount(free(world)))].into();
    world.order(node, Order::Group(filler));
    world.run_for(ms(200));
    // By extents while there are whole ones, then by units.
    let mut at = 0;
    for id in (10_000..).map(RequestId) {
        let count = match free(world) {
            0 => break,
            few if few < 6 << 20 => UNIT_BYTES / 4096,
            _ => 1024,
        };
        let op = Op::Write { range: range(at, count), data: blocks(1, count), fua: false };
        world.input(node, pollux_replica::Input::Request(Request { id, volume, op }));
        world.until("filled", |world| world.answer(id).is_some());
        at += count;
    }
    group
}

/// Whether writers wait for space in the node's pool, as it was told; repetitions apart.
fn told(world: &World, of: NodeId) -> Vec<bool> {
    let pools = world.reports.iter().filter_map(|(_, node, report)| match report {
        Report::Pool(pool) if *node == of => Some(pool.is_full),
        _ => None,
    });
    let mut told: Vec<bool> = pools.collect();
    told.dedup();
    told
}

/// A write that needs space waits for it, wherever it is missing; one that needs none goes on; nobody is dropped; and what is
/// told is where space is missing.
fn full_on(node: NodeId, other: NodeId) {
    let mut world = World::pair(96);
    world.write_done(A, 0, 1, 1);
    let filler = fill(&mut world, node);
    // In a unit that is there already.
    world.write_done(A, 1, 1, 2);
    let id = world.write(A, 2048, 1, 3);
    world.run_for(ms(7000));
    assert_eq!(world.answer(id), None, "there is no space for it on {node}");
    assert_eq!(world.frozen(A), Some(&FreezeReason::PoolFull));
    assert_eq!(world.spec.record.stamp, stamp(1, 1), "nobody is dropped for it");
    assert_eq!(told(&world, node), [false, true], "and not anew with every try");
    assert_eq!(told(&world, other), [false]);
    world.order(node, Order::Forget { group: filler });
    world.until("acknowledged", |world| world.answer(id) == Some(&Reply::Done));
    world.until_serving(A);
    assert_eq!(told(&world, node), [false, true, false]);
    for machine in [A, B] {
        let stored = world.contents(machine);
        assert_eq!((stored[0], stored[1], stored[2048]), (1, 2, 3));
    }
}

#[test]
fn a_full_pool_of_the_secondary_alone_holds_writers_and_drops_nobody() {
    full_on(B, A);
}

#[test]
fn a_full_pool_of_the_primary_alone_holds_writers_and_drops_nobody() {
    full_on(A, B);
}
