//! Replicas of a group: added, removed, moved, in other modes, promoted; and what the log never allows on the way.

use pollux_base::record::{LagBound, Mode};
use pollux_base::{ByteCount, Epoch, GroupId, NodeId, Stamp};
use pollux_cluster::entry::{FenceProof, Holder, NodePhase, NodeSpec, Proof};
use pollux_cluster::{Change, Entry, Refusal, State};
use std::collections::BTreeSet;

const A: NodeId = NodeId(1);
const B: NodeId = NodeId(2);
const C: NodeId = NodeId(3);
const GROUP: GroupId = GroupId(2);

fn apply(state: &mut State, change: Change) -> Result<(), Refusal> {
    let entry = Entry { by: A, unix_ms: 1_795_356_000_000, request: None, change };
    let result = state.apply(state.applied + 1, &entry).map(|_| ());
    state.check();
    result
}

/// Three nodes, and a volume whose group has its primary on A and another replica on B.
fn three() -> State {
    let spec = |name: &str| NodeSpec {
        name: name.into(),
        api: vec![],
        replication: vec![],
        nbd: None,
        power: None,
        memory_bytes: 8 << 30,
    };
    let nodes = [(A, spec("a")), (B, spec("b")), (C, spec("c"))].into();
    let mut state = State::default();
    apply(&mut state, Change::Init { name: "lab".into(), nodes, witness: false }).expect("the first entry");
    let create = Change::CreateVolume { name: "v".into(), size: ByteCount(1 << 30), node: A, key: None };
    apply(&mut state, create).expect("a volume");
    state
}

fn stamp(state: &State) -> Stamp {
    state.groups[&GROUP].record.stamp
}

fn set(state: &mut State, primary: NodeId, in_sync: &[NodeId]) -> Result<(), Refusal> {
    let (expect, in_sync) = (stamp(state), in_sync.iter().copied().collect());
    apply(state, Change::SetGroup { group: GROUP, expect, primary, in_sync, reason: "r".into() })
}

fn in_sync(state: &State) -> Vec<NodeId> {
    state.groups[&GROUP].record.in_sync.iter().copied().collect()
}

#[test]
fn a_group_of_a_larger_cluster_is_born_on_two_nodes() {
    let state = three();
    assert_eq!(state.groups[&GROUP].replicas, BTreeSet::from([A, B]));
    assert_eq!(in_sync(&state), [A, B]);
}

#[test]
fn an_added_replica_is_in_sync_only_by_a_later_record() {
    let mut state = three();
    let before = stamp(&state);
    apply(&mut state, Change::AddReplica { group: GROUP, node: C, mode: Mode::Sync }).expect("c is online");
    assert!(stamp(&state) > before, "a record of its own");
    assert_eq!(in_sync(&state), [A, B]);
    assert!(apply(&mut state, Change::AddReplica { group: GROUP, node: C, mode: Mode::Sync }).is_err(), "twice");
    set(&mut state, A, &[A, B, C]).expect("it was brought up to date");
}

#[test]
fn the_last_good_copy_is_never_removed() {
    let mut state = three();
    set(&mut state, A, &[A]).expect("b is lost");
    let remove = |node| Change::RemoveReplica { group: GROUP, node };
    assert!(matches!(apply(&mut state, remove(A)), Err(Refusal::Unsafe(_))));
    apply(&mut state, remove(B)).expect("it is not needed");
    assert_eq!(state.groups[&GROUP].replicas, BTreeSet::from([A]));
    assert!(matches!(apply(&mut state, remove(A)), Err(Refusal::Unsafe(_))));
}

#[test]
fn who_is_removed_as_primary_hands_over_to_a_replica_in_sync() {
    let mut state = three();
    apply(&mut state, Change::RemoveReplica { group: GROUP, node: A }).expect("b holds everything");
    let record = &state.groups[&GROUP].record;
    assert_eq!((record.primary, in_sync(&state)), (B, vec![B]));
}

#[test]
fn a_move_never_leaves_fewer_good_copies_than_before() {
    let mut state = three();
    apply(&mut state, Change::MoveReplica { group: GROUP, from: A, to: C }).expect("c is online");
    let finish = |state: &State| Change::FinishMove { group: GROUP, expect: stamp(state) };
    let early = finish(&state);
    assert!(apply(&mut state, early.clone()).is_err(), "c holds nothing yet");
    assert_eq!(in_sync(&state), [A, B]);
    assert!(apply(&mut state, Change::RemoveReplica { group: GROUP, node: A }).is_err(), "not beside the move");
    set(&mut state, A, &[A, B, C]).expect("c is up to date");
    assert!(apply(&mut state, early).is_err(), "by an older record");
    let now = finish(&state);
    apply(&mut state, now).expect("c holds everything");
    assert_eq!((in_sync(&state), state.groups[&GROUP].moving), (vec![B, C], None));
    assert_ne!(state.groups[&GROUP].record.primary, A);
}

#[test]
fn a_cancelled_move_leaves_what_is_there() {
    let mut state = three();
    apply(&mut state, Change::MoveReplica { group: GROUP, from: A, to: C }).expect("c is online");
    apply(&mut state, Change::CancelMove { group: GROUP }).expect("it is going on");
    assert_eq!(state.groups[&GROUP].replicas, BTreeSet::from([A, B, C]));
    assert!(apply(&mut state, Change::CancelMove { group: GROUP }).is_err());
}

#[test]
fn a_trailing_replica_is_never_in_sync_and_never_primary() {
    let mut state = three();
    let mode = |node, mode| Change::SetMode { group: GROUP, nodes: BTreeSet::from([node]), mode };
    assert!(apply(&mut state, mode(A, Mode::Async)).is_err(), "the primary");
    assert!(apply(&mut state, mode(C, Mode::Async)).is_err(), "no replica");
    apply(&mut state, mode(B, Mode::Async)).expect("a remains");
    assert_eq!(in_sync(&state), [A]);
    assert!(set(&mut state, A, &[A, B]).is_err());
    apply(&mut state, mode(B, Mode::Memory)).expect("it may join again");
    set(&mut state, A, &[A, B]).expect("it is up to date");
}

#[test]
fn a_lag_has_bounds_that_make_sense() {
    let mut state = three();
    let lag = |bytes, ms| Change::SetLag {
        group: GROUP,
        lag: LagBound { bytes: ByteCount(bytes), ms, ..LagBound::default() },
    };
    assert!(apply(&mut state, lag(0, 30_000)).is_err());
    assert!(apply(&mut state, lag(64 << 20, 10)).is_err());
    apply(&mut state, lag(256 << 20, 60_000)).expect("it makes sense");
}

/// W4 knows one exception, a human's; and W10 keeps what it gives up.
#[test]
fn a_promotion_needs_everybody_else_proven_dead_and_makes_them_another_history() {
    let mut state = three();
    let nodes = BTreeSet::from([B]);
    apply(&mut state, Change::SetMode { group: GROUP, nodes, mode: Mode::Async }).expect("a remains");
    let at = stamp(&state);
    let promote = |at| Change::PromoteReplica { group: GROUP, node: B, at, token: "t".into() };
    assert!(matches!(apply(&mut state, promote(at)), Err(Refusal::Unsafe(_))), "a lives");
    let (expect, epoch) = (Epoch(1), Epoch(2));
    let holder = Holder::Alone { node: B };
    apply(&mut state, Change::RaiseEpoch { expect, epoch, holder, proof: Proof::Witness }).expect("b goes on alone");
    let phase = |phase, proof| Change::NodePhase { node: A, epoch, phase, proof };
    apply(&mut state, phase(NodePhase::Lost, None)).expect("a is lost");
    assert!(matches!(apply(&mut state, promote(at)), Err(Refusal::Unsafe(_))), "a may still act");
    let proof = FenceProof::GuardBound { waited_ms: 1 };
    apply(&mut state, phase(NodePhase::Fenced, Some(proof))).expect("it is proven");
    apply(&mut state, promote(at)).expect("a human said so");
    let group = &state.groups[&GROUP];
    assert_eq!((group.record.primary, in_sync(&state)), (B, vec![B]));
    assert!(!group.lineage.contains(at), "who was in sync by it holds what was given up");
    assert!(group.lineage.contains(group.record.stamp));
    assert_eq!(group.modes.get(&B), None, "it is a replica like any other now");
}
