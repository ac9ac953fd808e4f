//! What people call volumes, and the sealed key of one that is encrypted, is on every replica's pool, follows changes, and goes with the replica.
#![allow(clippy::unwrap_used)]

mod world;

use pollux_base::record::GroupNames;
use pollux_base::{GroupId, KeyId, NodeId, Order, SealedKey};
use std::collections::BTreeMap;
use world::*;

fn named(name: &str) -> GroupNames {
    let sealed = SealedKey::of_bytes(KeyId(7), KeyId(1), name.as_bytes());
    GroupNames {
        owner: name.into(),
        volumes: [(VOLUME, format!("vm/{name}/disk0"))].into(),
        keys: [(VOLUME, sealed)].into(),
    }
}

/// As the disks of the node tell it.
fn told(world: &World, node: NodeId) -> BTreeMap<GroupId, GroupNames> {
    pollux_replica::names(world.machines[&node].plane.as_ref().unwrap().store().notes())
}

#[test]
fn names_lie_on_the_pools_beside_the_record_follow_it_and_go_with_the_replica() {
    let mut world = World::pair(1);
    world.write_done(A, 0, 1, 1);
    for node in [A, B] {
        world.order(node, Order::Names { group: GROUP, names: named("web1") });
    }
    world
        .until("written down", |world| [A, B].iter().all(|node| told(world, *node) == [(GROUP, named("web1"))].into()));
    // A node that comes back is told anew; what it knew it has, and nothing is written twice.
    world.power_cut(B);
    world.start(B);
    world.until_healthy();
    assert_eq!(told(&world, B)[&GROUP], named("web1"));
    let position = |world: &World| world.machines[&B].plane.as_ref().unwrap().store().position().unwrap().2.changes;
    let before = position(&world);
    world.order(B, Order::Names { group: GROUP, names: named("web1") });
    world.run_for(ms(100));
    assert_eq!(position(&world), before, "what is known is not written again");
    world.order(B, Order::Names { group: GROUP, names: named("mail") });
    world.until("renamed", |world| told(world, B)[&GROUP] == named("mail"));
    world.order(B, Order::Forget { group: GROUP });
    world.until("gone", |world| told(world, B).is_empty());
    assert_eq!(told(&world, A)[&GROUP], named("web1"), "the other is for itself");
}

#[test]
fn names_that_come_before_the_record_is_durable_are_written_behind_it() {
    let mut world = World::pair(2);
    world.kill(B);
    world.start(B);
    // Right after the start: neither the pool is open nor the group known.
    world.input(B, pollux_replica::Input::Order(Box::new(Order::Group(world.spec.clone()))));
    world.input(B, pollux_replica::Input::Order(Box::new(Order::Names { group: GROUP, names: named("web1") })));
    world.until("written down", |world| told(world, B) == [(GROUP, named("web1"))].into());
    world.write_done(A, 0, 1, 1);
    world.same(&[A, B]);
}

#[test]
fn what_lies_on_the_pool_is_told_and_is_erased_by_order_also_when_no_record_of_it_came() {
    let mut world = World::pair(3);
    world.write_done(A, 0, 1, 1);
    world.machine(B).is_deaf = true;
    world.power_cut(B);
    world.start(B);
    world.cut(A, B);
    world.input(B, pollux_replica::Input::Order(Box::new(Order::ReportAll)));
    let told = |world: &World| {
        let held = world.reports.iter().rev().find_map(|(_, from, report)| match report {
            pollux_base::Report::Holds { groups } if *from == B => Some(groups.clone()),
            _ => None,
        });
        held == Some([GROUP].into())
    };
    world.until("told", told);
    world.input(B, pollux_replica::Input::Order(Box::new(Order::Forget { group: GROUP })));
    let volumes = |world: &World| world.machines[&B].plane.as_ref().unwrap().store().volumes().count();
    world.until("erased", |world| volumes(world) == 0);
}

/// Found by the simulator (seed 376): a data plane that stood still got the record of a group and its deletion in one go.
#[test]
fn what_is_being_made_when_its_group_is_deleted_does_not_stay() {
    let mut world = World::pair(4);
    let (group, volume) = (GroupId(800), pollux_base::VolumeId(801));
    let spec = pollux_base::record::GroupSpec {
        group,
        volumes: [(volume, pollux_base::ByteCount(4 << 20))].into(),
        ..world.spec.clone()
    };
    world.input(B, pollux_replica::Input::Order(Box::new(Order::Group(spec))));
    world.input(B, pollux_replica::Input::Order(Box::new(Order::Forget { group })));
    world.run_for(ms(500));
    let store = world.machines[&B].plane.as_ref().unwrap().store();
    assert_eq!(store.volumes().filter(|(_, of, _)| *of == group).count(), 0);
    assert_eq!(store.notes().filter(|(of, _)| *of == group).count(), 0);
    world.write_done(A, 0, 1, 1);
    world.same(&[A, B]);
}
