//! Applying the log: what any sequence of entries leaves true, and the one table of a VM's life.

use pollux_base::config::PowerConfig;
use pollux_base::{
    ByteCount, Epoch, Generation, GroupId, ImageId, Incarnation, KeyId, NodeId, SealedKey, SnapshotId, Stamp, VmId,
    VolumeId,
};
use pollux_cluster::entry::{FenceProof, Holder, NodePhase, NodeSpec, Proof, Subject, VmPhase, VmSpec, Wanted};
use pollux_cluster::vm_life::Step;
use pollux_cluster::{Change, Entry, State};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const A: NodeId = NodeId(1);
const B: NodeId = NodeId(2);

fn entry(change: Change, request: Option<u64>) -> Entry {
    Entry { by: A, unix_ms: 1_795_356_000_000, request, change }
}

fn init() -> Change {
    let spec = |name: &str, power| NodeSpec {
        name: name.into(),
        api: vec![],
        replication: vec![],
        nbd: None,
        power,
        memory_bytes: 8 << 30,
    };
    let power = PowerConfig { url: "http://p".into(), system: "1".into(), uuid: "u".into() };
    let nodes = [(A, spec("a", None)), (B, spec("b", Some(power)))].into();
    Change::Init { name: "lab".into(), nodes, witness: true }
}

fn born() -> State {
    let mut state = State::default();
    state.apply(1, &entry(init(), None)).expect("the first entry");
    state
}

fn node() -> impl Strategy<Value = NodeId> {
    (1u64..4).prop_map(NodeId)
}

fn size() -> impl Strategy<Value = ByteCount> {
    prop_oneof![Just(0), Just(4096), Just(5000), Just(1 << 30), Just(u64::MAX)].prop_map(ByteCount)
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof![Just("x"), Just("y"), Just("-"), Just("")].prop_map(str::to_owned)
}

fn phase() -> impl Strategy<Value = VmPhase> {
    use VmPhase::*;
    prop_oneof![Just(Stopped), Just(Starting), Just(Running), Just(Stopping), Just(Recovering), Just(Failed)]
}

/// Changes that often meet something that exists: ids are small, names few.
fn change() -> impl Strategy<Value = Change> {
    let id = || 1u64..9;
    let epoch = || (0u64..4).prop_map(Epoch);
    let incarnation = || (0u64..4).prop_map(Incarnation);
    let stamp = || (1u64..4, 1u64..6).prop_map(|(e, g)| Stamp { epoch: Epoch(e), generation: Generation(g) });
    let spec = (name(), size(), proptest::option::of(id().prop_map(ImageId))).prop_map(|(name, size, image)| VmSpec {
        name,
        cpus: 1,
        memory: ByteCount(1 << 30),
        image,
        disks: vec![size],
        mac: String::new(),
    });
    let holder = prop_oneof![Just(Holder::Members), node().prop_map(|node| Holder::Alone { node })];
    let node_phase = prop_oneof![
        Just((NodePhase::Online, None)),
        Just((NodePhase::Lost, None)),
        Just((NodePhase::Fenced, Some(FenceProof::GuardBound { waited_ms: 1 }))),
        Just((NodePhase::Fenced, None)),
    ];
    let wanted = prop_oneof![Just(Wanted::Running), Just(Wanted::Stopped), Just(Wanted::Off)];
    prop_oneof![
        1 => Just(init()),
        2 => (epoch(), epoch(), holder).prop_map(|(expect, epoch, holder)| {
            Change::RaiseEpoch { expect, epoch, holder, proof: Proof::Witness }
        }),
        3 => (node(), epoch(), node_phase).prop_map(|(node, epoch, (phase, proof))| {
            Change::NodePhase { node, epoch, phase, proof }
        }),
        2 => (name(), size(), node()).prop_map(|(name, size, node)| Change::CreateImage { name, size, node, key: None }),
        1 => id().prop_map(|id| Change::ImageReady { image: ImageId(id), sha256: "a".repeat(64) }),
        1 => id().prop_map(|id| Change::DeleteImage { image: ImageId(id) }),
        3 => (spec, node(), proptest::collection::vec((4u128..8).prop_map(sealed), 0..3))
            .prop_map(|(spec, node, keys)| Change::CreateVm { spec, node, keys }),
        1 => id().prop_map(|id| Change::DeleteVm { vm: VmId(id) }),
        3 => (id(), wanted).prop_map(|(id, wanted)| Change::WantVm { vm: VmId(id), wanted }),
        9 => (id(), incarnation(), 0u64..2, node(), phase()).prop_map(|(id, expect, more, node, phase)| {
            let incarnation = Incarnation(expect.0 + more);
            Change::VmPhase { vm: VmId(id), expect, incarnation, node, phase, reason: "r".into() }
        }),
        3 => (name(), size(), node(), proptest::option::of(0u128..4)).prop_map(|(name, size, node, key)| {
            Change::CreateVolume { name, size, node, key: key.map(sealed) }
        }),
        1 => id().prop_map(|id| Change::DeleteVolume { volume: VolumeId(id) }),
        1 => (id(), any::<bool>()).prop_map(|(id, exported)| Change::ExportVolume { volume: VolumeId(id), exported }),
        9 => (id(), stamp(), node(), proptest::collection::btree_set(node(), 0..3)).prop_map(
            |(id, expect, primary, in_sync)| {
                Change::SetGroup { group: GroupId(id), expect, primary, in_sync, reason: "r".into() }
            }
        ),
        2 => (id(), name()).prop_map(|(id, name)| Change::CreateSnapshot { group: GroupId(id), name }),
        2 => (id(), any::<bool>()).prop_map(|(id, is_taken)| {
            let result = if is_taken { Ok(()) } else { Err("r".into()) };
            Change::SnapshotEnded { snapshot: SnapshotId(id), result }
        }),
        1 => id().prop_map(|id| Change::DeleteSnapshot { snapshot: SnapshotId(id) }),
        1 => id().prop_map(|id| Change::RollBack { snapshot: SnapshotId(id) }),
        1 => (id(), name()).prop_map(|(id, name)| Change::CloneVolume { of: VolumeId(id), name }),
        1 => (id(), name()).prop_map(|(id, name)| Change::CloneVm { snapshot: SnapshotId(id), name }),
        1 => id().prop_map(|id| Change::Cloned { group: GroupId(id) }),
        1 => (id(), 1..9u64).prop_map(|(id, blocks)| {
            Change::ResizeVolume { volume: VolumeId(id), size: ByteCount(blocks * 4096) }
        }),
        1 => (id(), node(), stamp()).prop_map(|(id, node, loser)| {
            Change::DiscardReplica { group: GroupId(id), node, loser }
        }),
        1 => id().prop_map(|id| Change::VmFilled { vm: VmId(id) }),
        1 => (proptest::option::of(0..40u64), 98u128..100, proptest::collection::vec(0u128..4, 0..3)).prop_map(
            |(expect, master, keys)| {
                let (master, keys) = (KeyId(master), keys.into_iter().map(sealed));
                Change::SealKeys { expect, master, keys: keys.map(|key| SealedKey { master, ..key }).collect() }
            }
        ),
        1 => id().prop_map(|id| Change::Note { subject: Subject::Vm(VmId(id)), text: "t".into() }),
    ]
}

/// A key, as the log holds it.
fn sealed(key: u128) -> SealedKey {
    SealedKey { key: KeyId(key), master: KeyId(99), sealed: "00ff".into() }
}

/// What one entry may do to the state before it.
fn check_step(before: &State, after: &State, change: &Change) {
    after.check();
    for (id, group) in &after.groups {
        let Some(old) = before.groups.get(id) else {
            continue;
        };
        let (old, new) = (&old.record, &group.record);
        assert!(new.stamp.generation >= old.stamp.generation, "{id}: the generation went back");
        if new != old {
            assert_eq!(new.stamp.generation, old.stamp.generation.next());
            assert!(
                matches!(change, Change::SetGroup { expect, .. } if *expect == old.stamp),
                "only from what was expected"
            );
            assert!(!new.in_sync.is_disjoint(&old.in_sync), "somebody has every acknowledged write");
            assert!(new.primary == old.primary || old.in_sync.contains(&new.primary), "W4");
        }
    }
    for (id, vm) in &after.vms {
        let Some(old) = before.vms.get(id) else {
            continue;
        };
        assert!(vm.incarnation >= old.incarnation && vm.incarnation.0 <= old.incarnation.0 + 1);
        if vm.incarnation != old.incarnation {
            assert!(!old.phase.may_run() && vm.phase == VmPhase::Starting, "a run begins where none is");
            let is_lost = before.nodes[&old.node].phase == NodePhase::Lost;
            assert!(!(old.phase == VmPhase::Recovering && is_lost), "the old run's node is not proven unable to act");
            assert_eq!(after.groups[&vm.group].record.primary, vm.node);
        } else if vm.phase.may_run() {
            assert_eq!(vm.node, old.node, "a run does not move");
        }
    }
    assert!(after.authority.epoch >= before.authority.epoch && after.last_id >= before.last_id);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_entries_keep_the_rules_of_records_and_runs(changes in proptest::collection::vec(change(), 1..80)) {
        let mut state = born();
        for (number, change) in changes.into_iter().enumerate() {
            let before = state.clone();
            let index = number as u64 + 2;
            let result = state.apply(index, &entry(change.clone(), None));
            if result.is_err() {
                prop_assert_eq!(&before, &State { applied: before.applied, ..state.clone() }, "a refusal changes nothing");
            }
            prop_assert_eq!(state.applied, index);
            check_step(&before, &state, &change);
        }
        let text = serde_json::to_string(&state).expect("a state becomes JSON");
        let back: State = serde_json::from_str(&text).expect("and comes back");
        prop_assert_eq!(back, state);
    }

    #[test]
    fn an_entry_that_comes_twice_is_done_once(changes in proptest::collection::vec(change(), 1..60)) {
        let (mut once, mut twice) = (born(), born());
        for (number, change) in changes.into_iter().enumerate() {
            let request = entry(change.clone(), Some(number as u64));
            let _ = once.apply(2, &request);
            let _ = twice.apply(2, &request);
            let _ = twice.apply(2, &request);
            prop_assert_eq!(&once, &twice);
        }
    }

    #[test]
    fn entries_survive_their_journey(change in change()) {
        let sent = entry(change, Some(7));
        let text = serde_json::to_string(&sent).expect("an entry becomes JSON");
        let back: Entry = serde_json::from_str(&text).expect("and comes back");
        prop_assert_eq!(back, sent);
    }
}

#[test]
fn changes_of_authority_that_come_twice_change_nothing_the_second_time() {
    let mut state = born();
    let made = Change::CreateVolume { name: "v".into(), size: ByteCount(4096), node: A, key: None };
    state.apply(2, &entry(made, None)).expect("created");
    let (group, record) = state.groups.iter().next().map(|(id, group)| (*id, group.record.clone())).expect("one");
    let drop_b = |stamp| Change::SetGroup {
        group,
        expect: stamp,
        primary: A,
        in_sync: BTreeSet::from([A]),
        reason: "b is lost".into(),
    };
    let raise = Change::RaiseEpoch {
        expect: Epoch(1),
        epoch: Epoch(2),
        holder: Holder::Alone { node: A },
        proof: Proof::Witness,
    };
    for change in [raise, drop_b(record.stamp)] {
        state.apply(3, &entry(change.clone(), None)).expect("as expected");
        let before = state.clone();
        state.apply(3, &entry(change, None)).expect_err("late");
        assert_eq!(state, before);
    }
    let stamp = Stamp { epoch: Epoch(2), generation: Generation(2) };
    assert_eq!(state.groups[&group].record.stamp, stamp, "the record is of the epoch under which it was committed");
    assert!(state.groups[&group].lineage.contains(stamp) && state.groups[&group].lineage.contains(record.stamp));
}

#[test]
fn the_table_of_a_vms_life_is_this() {
    use VmPhase::*;
    let all = [Stopped, Starting, Running, Stopping, Recovering, Failed];
    let mut table = String::new();
    for from in all {
        let steps = all.iter().filter_map(|to| from.step(*to).map(|step| (to, step)));
        let steps = steps.map(|(to, step)| match step {
            Step::NewRun => format!("{}*", to.name()),
            Step::SameRun => to.name().to_owned(),
        });
        table += &format!("{} -> {}\n", from.name(), steps.collect::<Vec<_>>().join(", "));
    }
    // * begins a new run
    let expected = "\
stopped -> starting*
starting -> stopped, running, stopping, recovering, failed
running -> stopped, stopping, recovering, failed
stopping -> stopped, recovering, failed
recovering -> stopped, starting*, failed
failed -> stopped, starting*
";
    assert_eq!(table, expected);
    for from in all {
        for to in all {
            if from.step(to) == Some(Step::NewRun) {
                assert!(!from.may_run() && to == Starting, "a new run begins only where none may be");
            }
        }
    }
}

#[test]
fn history_is_bounded_for_each_subject_and_in_all() {
    let mut state = born();
    for number in 0..1000u64 {
        let subject = if number % 2 == 0 { Subject::Node(A) } else { Subject::Cluster };
        let note = Change::Note { subject, text: format!("note {number}") };
        state.apply(number + 2, &entry(note, Some(number))).expect("noted");
    }
    let of_node: Vec<_> = state.events_of(&[Subject::Node(A)]).collect();
    assert_eq!(of_node.len(), pollux_cluster::state::EVENTS_PER_SUBJECT);
    assert_eq!(of_node.last().map(|event| event.text.as_str()), Some("note 998"));
}

#[test]
fn bad_requests_are_refused_by_name_with_what_was_wrong() {
    let mut state = born();
    let volume =
        |name: &str, size| Change::CreateVolume { name: name.into(), size: ByteCount(size), node: A, key: None };
    let refusal = |state: &mut State, change| state.apply(9, &entry(change, None)).expect_err("refused").to_string();
    state.apply(2, &entry(volume("v", 4096), None)).expect("created");
    let told = [
        refusal(&mut state, volume("v", 4096)),
        refusal(&mut state, volume("w", 0)),
        refusal(&mut state, volume("w", 5000)),
        refusal(&mut state, volume("w", 1 << 60)),
        refusal(&mut state, volume("../w", 4096)),
        refusal(&mut state, Change::DeleteVolume { volume: VolumeId(99) }),
        refusal(
            &mut state,
            Change::CreateVolume { name: "w".into(), size: ByteCount(4096), node: NodeId(7), key: None },
        ),
    ];
    let expected = [
        "a volume `v` exists already",
        "the size of a volume is more than zero",
        "the size of a volume is a multiple of 4096 bytes; 5000 is not",
        "1152921504606846976 bytes are too much for a volume: the most is 1 PiB",
        "`../w` is no name for a volume: 1 to 63 of a-z, 0-9 and inner `-`",
        "no volume v99",
        "no node n7",
    ];
    assert_eq!(told, expected);
}

#[test]
fn a_snapshot_counts_when_it_is_taken_and_keeps_what_it_is_of_from_being_deleted() {
    let mut state = born();
    let mut index = 1;
    let mut apply = |state: &mut State, change: Change| {
        index += 1;
        state.apply(index, &entry(change, None))
    };
    apply(&mut state, Change::CreateVolume { name: "data".into(), size: ByteCount(8192), node: A, key: None })
        .expect("a volume");
    let (volume, group) = state.volume_named("data").map(|(id, volume)| (id, volume.group)).expect("it is there");
    let take = |name: &str| Change::CreateSnapshot { group, name: name.into() };
    apply(&mut state, take("one")).expect("a first snapshot");
    let (one, _) = state.snapshot_named("data@one").expect("it has a name");
    assert!(apply(&mut state, take("two")).is_err(), "one at a time");
    assert!(apply(&mut state, Change::DeleteSnapshot { snapshot: one }).is_err(), "it is being taken");
    let spec = state.group_spec(group).expect("a group");
    assert_eq!(spec.snapshots.untaken().map(|(id, _)| id), Some(one));
    let frozen: Vec<_> = spec.snapshots.volumes().map(|(_, frozen)| (frozen.of, frozen.size)).collect();
    assert_eq!(frozen, [(volume, ByteCount(8192))]);

    let to_async = Change::SetMode { group, nodes: [B].into(), mode: pollux_base::record::Mode::Async };
    assert!(apply(&mut state, to_async).is_err(), "a trailing replica has no snapshots");

    apply(&mut state, Change::SnapshotEnded { snapshot: one, result: Ok(()) }).expect("taken");
    let later = state.group_spec(group).expect("a group");
    assert!(later.snapshots.untaken().is_none() && later.snapshots.revision > spec.snapshots.revision);
    assert_eq!(later.record.stamp, spec.record.stamp, "authority is another matter");
    // Told late or twice, it changes nothing.
    apply(&mut state, Change::SnapshotEnded { snapshot: one, result: Err("late".into()) }).expect("ignored");
    assert_eq!(state.group_spec(group), Some(later));

    assert!(apply(&mut state, take("one")).is_err(), "names are unique");
    assert!(apply(&mut state, Change::DeleteVolume { volume }).is_err(), "its snapshot would go with it");
    let (frozen, _) = state.volume_named("data@one").expect("its volume has a name");
    assert!(apply(&mut state, Change::DeleteVolume { volume: frozen }).is_err(), "it goes with its snapshot");
    apply(&mut state, Change::ExportVolume { volume: frozen, exported: true }).expect("it can be exported");
    assert!(apply(&mut state, Change::DeleteSnapshot { snapshot: one }).is_err(), "it is exported");
    apply(&mut state, Change::ExportVolume { volume: frozen, exported: false }).expect("no longer");
    apply(&mut state, Change::DeleteSnapshot { snapshot: one }).expect("deleted");
    assert!(state.snapshots.is_empty() && state.volumes.len() == 1);

    apply(&mut state, take("three")).expect("another");
    let (three, _) = state.snapshot_named("data@three").expect("it has a name");
    apply(&mut state, Change::SnapshotEnded { snapshot: three, result: Err("full".into()) }).expect("given up");
    assert!(state.snapshots.is_empty() && state.volumes.len() == 1);
    apply(&mut state, Change::DeleteVolume { volume }).expect("nothing is left that keeps it");
}

/// A state with a VM `web` of two disks and its snapshot `web@one`.
fn with_snapshot() -> (State, SnapshotId, u64) {
    let mut state = born();
    let mut index = 1;
    let mut apply = |state: &mut State, change: Change| {
        index += 1;
        state.apply(index, &entry(change, None)).expect("allowed")
    };
    let spec = VmSpec {
        name: "web".into(),
        cpus: 1,
        memory: ByteCount(1 << 20),
        image: None,
        disks: vec![ByteCount(8192), ByteCount(4096)],
        mac: String::new(),
    };
    apply(&mut state, Change::CreateVm { spec, node: A, keys: Vec::new() });
    let group = state.vm_named("web").map(|(_, vm)| vm.group).expect("it is there");
    apply(&mut state, Change::CreateSnapshot { group, name: "one".into() });
    let (one, _) = state.snapshot_named("web@one").expect("it has a name");
    apply(&mut state, Change::SnapshotEnded { snapshot: one, result: Ok(()) });
    (state, one, index)
}

#[test]
fn a_rollback_is_the_next_record_and_refused_while_somebody_may_use_the_disks() {
    let (mut state, one, mut index) = with_snapshot();
    let (vm, found) = state.vm_named("web").map(|(id, vm)| (id, vm.clone())).expect("it is there");
    let mut apply = |state: &mut State, change: Change| {
        index += 1;
        state.apply(index, &entry(change, None))
    };
    apply(&mut state, Change::WantVm { vm, wanted: Wanted::Running }).expect("started");
    let refused = apply(&mut state, Change::RollBack { snapshot: one }).expect_err("it is about to start");
    assert!(format!("{refused:?}").contains("pollux vm stop web"), "{refused:?}");
    apply(&mut state, Change::WantVm { vm, wanted: Wanted::Stopped }).expect("stopped");
    let before = state.group_spec(found.group).expect("a group");
    apply(&mut state, Change::RollBack { snapshot: one }).expect("nobody uses it");
    let after = state.group_spec(found.group).expect("a group");
    assert_eq!(after.record.stamp.generation, before.record.stamp.generation.next());
    assert_eq!((after.record.primary, &after.record.in_sync), (before.record.primary, &before.record.in_sync));
    let rollback = after.snapshots.rollback.expect("it says so");
    assert_eq!(rollback.at, after.record.stamp);
    let expected = before.snapshots.volumes().map(|(volume, frozen)| (frozen.of, volume)).collect();
    assert_eq!(rollback.to, expected);
}

#[test]
fn a_clone_keeps_its_source_until_it_is_there() {
    let (mut state, one, mut index) = with_snapshot();
    let mut apply = |state: &mut State, change: Change| {
        index += 1;
        state.apply(index, &entry(change, None))
    };
    let (disk, _) = state.volume_named("vm/web/disk0").expect("a disk");
    let (frozen, _) = state.volume_named("vm/web/disk0@one").expect("a snapshot of it");
    let copy = |of| Change::CloneVolume { of, name: "copy".into() };
    assert!(apply(&mut state, copy(disk)).is_err(), "it is written to");
    apply(&mut state, copy(frozen)).expect("a copy");
    let (id, volume) = state.volume_named("copy").map(|(id, volume)| (id, volume.clone())).expect("it is there");
    let spec = state.group_spec(volume.group).expect("a group");
    assert_eq!(spec.snapshots.origins, BTreeMap::from([(id, frozen)]));
    assert_eq!((volume.size, spec.record.stamp.generation), (ByteCount(8192), Generation(1)));
    assert!(apply(&mut state, Change::DeleteSnapshot { snapshot: one }).is_err(), "the copy is not there yet");
    apply(&mut state, Change::Cloned { group: volume.group }).expect("it is");

    apply(&mut state, Change::CloneVm { snapshot: one, name: "web-two".into() }).expect("a copy of all");
    let (_, vm) = state.vm_named("web-two").expect("a VM");
    let origins = state.group_spec(vm.group).expect("a group").snapshots.origins;
    assert_eq!(vm.spec.disks, [ByteCount(8192), ByteCount(4096)]);
    assert_eq!((vm.volumes.len(), origins.len(), origins.get(&vm.volumes[0])), (2, 2, Some(&frozen)));
    let group = vm.group;
    apply(&mut state, Change::Cloned { group }).expect("it is there");
    apply(&mut state, Change::DeleteSnapshot { snapshot: one }).expect("nobody needs it any more");
}

#[test]
fn a_volume_grows_and_never_shrinks() {
    let (mut state, _, mut index) = with_snapshot();
    let mut apply = |state: &mut State, change: Change| {
        index += 1;
        state.apply(index, &entry(change, None))
    };
    let (disk, _) = state.volume_named("vm/web/disk1").expect("a disk");
    let (frozen, _) = state.volume_named("vm/web/disk1@one").expect("a snapshot of it");
    let resize = |volume, size| Change::ResizeVolume { volume, size: ByteCount(size) };
    apply(&mut state, resize(disk, 16384)).expect("larger");
    let (_, vm) = state.vm_named("web").expect("a VM");
    assert_eq!((vm.spec.disks[1], state.volumes[&disk].size), (ByteCount(16384), ByteCount(16384)));
    let spec = state.group_spec(vm.group).expect("a group");
    assert_eq!(
        (spec.volumes[&disk], spec.snapshots.volumes().all(|(_, f)| f.size.0 < 16384)),
        (ByteCount(16384), true)
    );
    let refused = apply(&mut state, resize(disk, 8192)).expect_err("smaller");
    assert!(format!("{refused:?}").contains("does not shrink"), "{refused:?}");
    assert!(apply(&mut state, resize(frozen, 32768)).is_err(), "a snapshot stays as it is");
}
