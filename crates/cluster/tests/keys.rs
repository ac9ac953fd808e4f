//! Keys of volumes that are encrypted at rest: who is told which, what shares one, when it is gone from the log, and how they are
//! sealed anew under another master key.

mod world;

use pollux_base::{ByteCount, KeyId, NodeId, Order, SealedKey, VolumeId};
use pollux_cluster::entry::{NodePhase, VmSpec};
use pollux_cluster::master_key::{SEALED_AT_ONCE, SealAnew};
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

/// The same key, under another master key.
fn sealed_anew(key: u128, master: KeyId) -> SealedKey {
    SealedKey { master, sealed: "a5".repeat(92), ..sealed(key) }
}

fn exchange(world: &World, key: &[u128]) -> Change {
    let expect = world.state(A).sealing.map(|sealing| sealing.entry);
    Change::SealKeys { expect, master: SECOND, keys: key.iter().map(|key| sealed_anew(*key, SECOND)).collect() }
}

const FIRST: KeyId = KeyId(1);
const SECOND: KeyId = KeyId(2);

/// A node's `noded` begins anew, with these master keys.
fn restart(world: &mut World, node: NodeId, master: KeyId, successor: Option<KeyId>) {
    world.crash(node);
    world.server_mut(node).master = Some(master);
    world.server_mut(node).master_successor = successor;
    world.boot(node);
    world.run_until("back", World::is_settled);
    world.run(Duration::from_secs(2));
}

fn to_seal_anew(world: &World, node: NodeId) -> Result<SealAnew, Refusal> {
    world.servers[&node].noded.as_ref().expect("it runs").to_seal_anew()
}

fn masters(world: &World) -> Vec<(Option<KeyId>, Option<KeyId>)> {
    let said = world.servers[&A].noded.as_ref().expect("it runs").masters();
    said.values().map(|node| node.map_or((None, None), |node| (node.present, node.successor))).collect()
}

#[test]
fn keys_are_sealed_anew_when_every_node_has_the_new_master_key_and_not_before() {
    let mut world = World::formed(true, true);
    done(&mut world, volume("v", Some(sealed(7))));
    let nothing = to_seal_anew(&world, A).expect_err("no node has a successor");
    assert!(nothing.to_string().contains("no successor"), "{nothing}");
    restart(&mut world, A, FIRST, Some(SECOND));
    assert_eq!(masters(&world), [(Some(FIRST), Some(SECOND)), (Some(FIRST), None)]);
    let to_seal = to_seal_anew(&world, A).expect("it has a successor");
    assert_eq!((to_seal.master, to_seal.keys, to_seal.is_done), (SECOND, vec![sealed(7)], false));
    let change = exchange(&world, &[7]);
    let refusal = world.ask(A, change).expect_err("b has it not");
    assert!(refusal.to_string().contains("node `b` has not the master key"), "{refusal}");
    world.crash(B);
    world.run_until("alone", |world| world.state(A).alone() == Some(A));
    let change = exchange(&world, &[7]);
    let refusal = world.ask(A, change).expect_err("nobody knows what b has");
    assert!(refusal.to_string().contains("`b` is not heard"), "{refusal}");
    assert_eq!(world.state(A).keys[&KeyId(7)].master, FIRST);

    // It is switched off before it comes back.
    world.run_until("fenced", |world| world.state(A).nodes[&B].phase == NodePhase::Fenced);
    restart(&mut world, B, FIRST, Some(SECOND));
    world.orders.clear();
    let change = exchange(&world, &[7]);
    done(&mut world, change);
    for node in [A, B] {
        assert_eq!(world.state(node).keys[&KeyId(7)], sealed_anew(7, SECOND), "{node}");
        assert_eq!(told(&world, node, KeyId(7)), (None, None), "it has the key, and goes on with it");
        let names = world.orders.iter().filter(|(to, _)| *to == node).filter_map(|(_, order)| match order {
            Order::Names { names, .. } => names.keys.values().next().cloned(),
            _ => None,
        });
        assert_eq!(names.collect::<Vec<_>>(), [sealed_anew(7, SECOND)], "its pool is told");
    }
    assert!(to_seal_anew(&world, A).expect("it has both").is_done);
    // Files are tidied up, one node after the other; whoever is restarted opens the key.
    for node in [B, A] {
        world.orders.clear();
        restart(&mut world, node, SECOND, None);
        assert!(told(&world, node, KeyId(7)).0.is_some(), "{node} has the key");
    }
    assert!(to_seal_anew(&world, A).expect("asked once more").is_done);
}

#[test]
fn an_exchange_that_stops_half_way_is_safe_and_goes_on_and_new_keys_are_under_the_new_master_key_only() {
    let mut world = World::formed(true, true);
    done(&mut world, volume("v", Some(sealed(7))));
    done(&mut world, volume("w", Some(sealed(8))));
    for node in [A, B] {
        restart(&mut world, node, FIRST, Some(SECOND));
    }
    let change = exchange(&world, &[7]);
    done(&mut world, change.clone());
    let refusal = world.ask(A, change).expect_err("an entry from before the last one");
    assert!(refusal.to_string().contains("meanwhile"), "{refusal}");
    assert_eq!(world.state(A).keys_by_master(), [(FIRST, 1), (SECOND, 1)].into());
    for node in [A, B] {
        world.orders.clear();
        restart(&mut world, node, FIRST, Some(SECOND));
        for key in [7, 8] {
            assert!(told(&world, node, KeyId(key)).0.is_some(), "{node} has the key {key}");
        }
    }
    assert!(matches!(world.ask(A, volume("late", Some(sealed(9)))), Err(Refusal::Conflict(_))), "under the old one");
    done(&mut world, volume("new", Some(sealed_anew(9, SECOND))));
    let noded = world.servers[&A].noded.as_ref().expect("it runs");
    assert_eq!(noded.master_for_new_keys(), Some(SECOND));
    // A volume that is gone when the rest of them is sealed anew stays gone.
    let rest = to_seal_anew(&world, B).expect("what is left");
    assert_eq!((rest.keys, rest.is_done), (vec![sealed(8)], false));
    let change = exchange(&world, &[8]);
    let gone = id_of(world.state(A), "w");
    done(&mut world, Change::DeleteVolume { volume: gone });
    done(&mut world, change);
    assert_eq!(world.state(A).keys_by_master(), [(SECOND, 2)].into());
    assert!(to_seal_anew(&world, B).expect("nothing").is_done);
}

#[test]
fn a_key_that_could_not_be_opened_is_given_as_soon_as_it_is_sealed_anew() {
    let mut world = World::formed(true, true);
    done(&mut world, volume("v", Some(sealed(7))));
    restart(&mut world, A, FIRST, Some(SECOND));
    world.orders.clear();
    // Its files were tidied up too early.
    restart(&mut world, B, SECOND, None);
    assert_eq!(told(&world, B, KeyId(7)).0, None);
    let change = exchange(&world, &[7]);
    done(&mut world, change);
    assert!(told(&world, B, KeyId(7)).0.is_some());
    let noded = world.servers[&B].noded.as_ref().expect("it runs");
    assert_eq!(noded.refused_key(id_of(noded.state(), "v")), None);
}

#[test]
fn what_is_no_sealed_key_or_under_another_master_key_is_not_taken() {
    let mut world = World::formed(true, true);
    done(&mut world, volume("v", Some(sealed(7))));
    for node in [A, B] {
        restart(&mut world, node, FIRST, Some(SECOND));
    }
    let seal = |keys| Change::SealKeys { expect: None, master: SECOND, keys };
    let bad = SealedKey { sealed: "no digits".into(), ..sealed_anew(7, SECOND) };
    for keys in [vec![bad], vec![sealed(7)], vec![sealed_anew(7, SECOND); SEALED_AT_ONCE + 1]] {
        assert!(matches!(world.ask(A, seal(keys)), Err(Refusal::Invalid(_))));
    }
    let unknown = Change::SealKeys { expect: None, master: KeyId(3), keys: Vec::new() };
    assert!(matches!(world.ask(A, unknown), Err(Refusal::Conflict(_))), "no node has it");
    assert_eq!(world.state(A).keys[&KeyId(7)], sealed(7));
}
