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
    let first = GroupNames { owner: "web1".into(), volumes: [(volume, "vm/web1/disk0".into())].into() };
    for node in [A, B] {
        assert_eq!(told(&world, node), [first.clone()], "once");
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
