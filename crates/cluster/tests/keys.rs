//! Keys of volumes that are encrypted at rest: who is told which, what shares one, and when it is gone from the log.

mod world;

use pollux_base::{ByteCount, KeyId, NodeId, Order, SealedKey, VolumeId};
use pollux_cluster::entry::VmSpec;
use pollux_cluster::{Answer, Change, Entry, Refusal, State};
use std::time::Duration;
use world::*;

fn sealed(key: u128) -> SealedKey {
    SealedKey { key: KeyId(key), master: KeyId(1), sealed: "5e".repeat(92) }
}

fn volume(name: &str, key: Option<SealedKey>) -> Change {
    Change::CreateVolume { name: name.into(), size: ByteCount(1 << 20), node: A, key }
}

fn id_of(state: &State, name: &str) -> VolumeId {
    state.volume_named(name).map(|(id, _)| id).expect("it is there")
}

/// Places of what this node's data plane was told: of a key, and of the first record that names it.
fn told(world: &World, node: NodeId, key: KeyId) -> (Option<usize>, Option<usize>) {
    let mut orders = world.orders.iter().filter(|(to, _)| *to == node).map(|(_, order)| order);
    let is_key = |order: &Order| matches!(order, Order::VolumeKey { key: told, .. } if *told == key);
    let is_record = |order: &Order| matches!(order, Order::Group(spec) if spec.keys.values().any(|told| *told == key));
    (orders.clone().position(is_key), orders.position(is_record))
}

fn done(world: &mut World, change: Change) {
    world.ask(A, change).expect("done");
    world.run_until("settled", World::is_settled);
}

#[test]
fn both_nodes_hear_of_a_key_before_the_record_that_names_it_and_of_no_other() {
    let mut world = World::formed(true, true);
    done(&mut world, volume("open", None));
    done(&mut world, volume("secret", Some(sealed(7))));
    for node in [A, B] {
        let (key, record) = told(&world, node, KeyId(7));
        assert!(key.is_some() && key < record, "{node}: {key:?} before {record:?}");
        let keys = world.orders.iter().filter(|(to, order)| *to == node && matches!(order, Order::VolumeKey { .. }));
        assert_eq!(keys.count(), 1, "{node}: told once");
    }
    let state = world.state(A);
    assert_eq!(state.volumes[&id_of(state, "open")].key, None);
    assert_eq!(state.volumes[&id_of(state, "secret")].key, Some(KeyId(7)));
}

#[test]
fn snapshots_and_clones_have_the_key_of_what_they_are_of_and_it_goes_with_the_last() {
    let mut state = World::formed(true, true).state(A).clone();
    let apply = |state: &mut State, change: Change| {
        let entry = Entry { by: A, unix_ms: 1_795_356_000_000, request: None, change };
        state.apply(state.applied + 1, &entry).expect("done");
    };
    apply(&mut state, volume("v", Some(sealed(7))));
    let group = state.volumes[&id_of(&state, "v")].group;
    apply(&mut state, Change::CreateSnapshot { group, name: "s".into() });
    let (snapshot, _) = state.snapshot_named("v@s").expect("it is there");
    apply(&mut state, Change::SnapshotEnded { snapshot, result: Ok(()) });
    let of = id_of(&state, "v@s");
    apply(&mut state, Change::CloneVolume { of, name: "w".into() });
    let (first, second) = (id_of(&state, "v"), id_of(&state, "w"));
    for volume in [first, of, second] {
        assert_eq!(state.volumes[&volume].key, Some(KeyId(7)), "{volume}");
    }
    let copy = state.volumes[&second].group;
    let spec = |state: &State, group| state.group_spec(group).expect("a group");
    assert_eq!(spec(&state, group).key(of), Some(KeyId(7)), "a snapshot's is that of its volume");
    assert_eq!(spec(&state, copy).keys, [(second, KeyId(7))].into());
    apply(&mut state, Change::Cloned { group: copy });
    apply(&mut state, Change::DeleteSnapshot { snapshot });
    apply(&mut state, Change::DeleteVolume { volume: first });
    assert!(state.keys.contains_key(&KeyId(7)), "the clone has it still");
    apply(&mut state, Change::DeleteVolume { volume: second });
    assert!(state.keys.is_empty());
}

#[test]
fn a_vm_has_a_key_for_each_disk_or_none() {
    let mut world = World::formed(true, true);
    let spec = VmSpec {
        name: "web1".into(),
        cpus: 1,
        memory: ByteCount(GIB),
        image: None,
        disks: vec![ByteCount(4096), ByteCount(8192)],
        mac: String::new(),
    };
    let create = |keys| Change::CreateVm { spec: spec.clone(), node: A, keys };
    assert!(matches!(world.ask(A, create(vec![sealed(1)])), Err(Refusal::Invalid(_))));
    assert!(matches!(world.ask(A, create(vec![sealed(1), sealed(1)])), Err(Refusal::Conflict(_))));
    done(&mut world, create(vec![sealed(1), sealed(2)]));
    let state = world.state(B);
    let keys: Vec<_> = (0..2).map(|disk| state.volumes[&id_of(state, &format!("vm/web1/disk{disk}"))].key).collect();
    assert_eq!(keys, [Some(KeyId(1)), Some(KeyId(2))]);
    assert!(matches!(world.ask(A, volume("v", Some(sealed(2)))), Err(Refusal::Conflict(_))), "a key is used once");
    let bad = SealedKey { sealed: "no digits".into(), ..sealed(3) };
    assert!(matches!(world.ask(A, volume("v", Some(bad))), Err(Refusal::Invalid(_))));
}

#[test]
fn a_volume_is_not_encrypted_for_a_node_that_could_not_serve_it() {
    for master in [None, Some(KeyId(2))] {
        let mut world = World::new(true, true);
        world.server_mut(B).master = master;
        world.boot(A);
        world.boot(B);
        world.run_until("formed", World::is_settled);
        world.run(Duration::from_secs(2));
        let refusal = world.ask(A, volume("v", Some(sealed(7)))).expect_err("refused");
        assert!(matches!(&refusal, Refusal::Conflict(text) if text.contains("node `b`")), "{refusal}");
        assert!(matches!(world.ask(A, volume("v", None)), Ok(Answer::Created { .. })), "in the clear it may be");
    }
}

#[test]
fn a_node_that_can_not_open_a_key_says_why_and_is_given_it_when_it_can() {
    let mut world = World::formed(true, true);
    done(&mut world, volume("v", Some(sealed(7))));
    world.crash(B);
    world.server_mut(B).master = None;
    world.orders.clear();
    world.boot(B);
    world.run_until("back", World::is_settled);
    world.run(Duration::from_secs(1));
    let noded = world.servers[&B].noded.as_ref().expect("it runs");
    let refused = noded.refused_key(id_of(noded.state(), "v")).map(str::to_owned);
    assert_eq!(refused.as_deref(), Some("another master key"));
    assert_eq!(told(&world, B, KeyId(7)).0, None);
    assert!(told(&world, B, KeyId(7)).1.is_some(), "it carries a replica all the same");
    world.crash(B);
    world.server_mut(B).master = Some(KeyId(1));
    world.boot(B);
    world.run_until("back again", World::is_settled);
    world.run(Duration::from_secs(1));
    assert!(told(&world, B, KeyId(7)).0.is_some());
    let noded = world.servers[&B].noded.as_ref().expect("it runs");
    assert_eq!(noded.refused_key(id_of(noded.state(), "v")), None);
}
