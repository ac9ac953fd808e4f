//! What a node keeps of replicas is offered and deleted by command, by that node, and only while it is there.

#![allow(clippy::unwrap_used)]

mod world;

use pollux_base::order::{Offer, Report};
use pollux_base::pool::{KeptReport, PoolReport};
use pollux_base::{Kept, Order};
use pollux_cluster::entry::Subject;
use pollux_cluster::{Answer, Input, KeptCommand, Refusal};
use std::collections::BTreeMap;
use std::time::Duration;
use world::{A, World};

fn say(world: &mut World, kept: &[Kept], group: pollux_base::GroupId) {
    let kept = kept.iter().map(|kept| KeptReport { volume: kept.volume(), group, size_bytes: 1 << 30 }).collect();
    let pool = PoolReport { size_bytes: 1 << 40, free_bytes: 1 << 40, kept, ..PoolReport::default() };
    world.give(A, Input::Data(Some(Report::Pool(pool))));
    world.run(Duration::from_secs(3));
}

/// What the data plane was told to offer last.
fn offered(world: &World) -> BTreeMap<String, Offer> {
    let orders = world.orders.iter().rev().filter(|(to, _)| *to == A);
    let mut names =
        orders.filter_map(|(_, order)| if let Order::Exports { names } = order { Some(names) } else { None });
    names
        .next()
        .unwrap()
        .iter()
        .filter(|(name, _)| name.starts_with("kept/"))
        .map(|(name, o)| (name.clone(), *o))
        .collect()
}

#[test]
fn what_is_kept_is_offered_read_only_by_command_and_deleted_by_its_node() {
    let mut world = World::with_vm(true, true, A);
    let (_, vm) = world.state(A).vm_named("web1").unwrap();
    let (group, of) = (vm.group, vm.volumes[0]);
    let evidence = Kept::Evidence { of, number: 0 };
    let give = |world: &mut World, request, command| world.give(A, Input::Kept { request, command });
    give(&mut world, 80, KeptCommand::Export { kept: evidence, exported: true });
    assert!(matches!(world.answers.get(&80), Some(Err(Refusal::NotFound(_) | Refusal::Conflict(_)))));
    say(&mut world, &[evidence], group);
    assert_eq!(offered(&world), BTreeMap::new(), "not by itself");

    give(&mut world, 81, KeptCommand::Export { kept: evidence, exported: true });
    assert_eq!(world.answers.get(&81), Some(&Ok(Answer::Done)));
    let offer = Offer { volume: evidence.volume(), is_public: true, is_read_only: true };
    assert_eq!(offered(&world), [(format!("kept/{evidence}"), offer)].into());
    give(&mut world, 82, KeptCommand::Export { kept: evidence, exported: false });
    assert_eq!(offered(&world), BTreeMap::new());

    give(&mut world, 83, KeptCommand::Export { kept: evidence, exported: true });
    give(&mut world, 84, KeptCommand::Delete { kept: evidence });
    assert!(world.orders.contains(&(A, Order::DropKept { id: 84, volume: evidence.volume() })));
    assert_eq!((offered(&world), world.answers.get(&84)), (BTreeMap::new(), None), "withdrawn first");
    say(&mut world, &[], group);
    world.give(A, Input::Data(Some(Report::DiskChanged { id: 84, result: Ok(()) })));
    world.run(Duration::from_secs(3));
    assert_eq!(world.answers.get(&84), Some(&Ok(Answer::Done)));
    let events = world.state(A).events_of(&[Subject::Node(A)]).filter(|event| event.text.contains("was deleted"));
    assert_eq!(events.count(), 1, "people hear of evidence that is gone");
    give(&mut world, 85, KeptCommand::Delete { kept: evidence });
    assert!(matches!(world.answers.get(&85), Some(Err(Refusal::NotFound(text))) if text.contains("does not keep")));
    world.give(A, Input::Data(None));
    give(&mut world, 86, KeptCommand::Delete { kept: evidence });
    assert!(matches!(world.answers.get(&86), Some(Err(Refusal::Conflict(_)))));
}
