//! Data planes are told what people call what they keep, once, and anew when it changes or when they come back.

#![allow(clippy::unwrap_used)]

mod world;

use pollux_base::Order;
use pollux_base::record::GroupNames;
use pollux_cluster::{Change, Input};
use std::time::Duration;
use world::{A, B, World};

#[test]
fn every_node_with_a_replica_is_told_the_names_of_volumes_and_snapshots() {
    let mut world = World::with_vm(true, true, A);
    let (_, vm) = world.state(A).vm_named("web1").unwrap();
    let (group, volume) = (vm.group, vm.volumes[0]);
    let told = |world: &World, to| -> Vec<GroupNames> {
        let orders = world.orders.iter().filter(|(node, _)| *node == to);
        let names = orders.filter_map(|(_, order)| match order {
            Order::Names { group: of, names } if *of == group => Some(names.clone()),
            _ => None,
        });
        names.collect()
    };
    let first = GroupNames {
        owner: "web1".into(),
        volumes: [(volume, "vm/web1/disk0".into())].into(),
        ..GroupNames::default()
    };
    for node in [A, B] {
        assert_eq!(told(&world, node), std::slice::from_ref(&first), "once");
    }
    let change = Change::CreateSnapshot { group, name: "monday".into() };
    world.give(A, Input::Request { request: 900, change: Box::new(change), unix_ms: 0 });
    world.run(Duration::from_secs(2));
    let (snapshot, _) = world.state(A).volume_named("vm/web1/disk0@monday").unwrap();
    let mut second = first.clone();
    second.volumes.insert(snapshot, "vm/web1/disk0@monday".into());
    for node in [A, B] {
        assert_eq!(told(&world, node), [first.clone(), second.clone()]);
    }
}

/// Found by the simulator, which deletes clones while nodes are away: such a node was never told, and kept them for ever.
#[test]
fn what_was_deleted_while_a_data_plane_was_away_is_forgotten_when_it_is_back() {
    let mut world = World::with_vm(true, true, A);
    let (group, volume) = world.state(A).vm_named("web1").map(|(_, vm)| (vm.group, vm.volumes[0])).unwrap();
    // All ids are of one counter: no group has this one.
    let deleted = pollux_base::GroupId(volume.0);
    let never_minted = pollux_base::GroupId(world.state(A).last_id + 1000);
    world.orders.clear();
    world.give(A, Input::Data(Some(pollux_base::Report::Holds { groups: [group, deleted, never_minted].into() })));
    world.run(Duration::from_secs(1));
    let forgotten = world.orders.iter().filter(|(_, order)| matches!(order, Order::Forget { .. }));
    let forgotten: Vec<_> = forgotten.cloned().collect();
    assert_eq!(forgotten, [(A, Order::Forget { group: deleted })], "and nothing that no log can have minted");
}
