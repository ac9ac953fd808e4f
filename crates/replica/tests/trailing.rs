//! Mode `async`: a trailing replica holds a state that the group had, whatever is cut; it holds nobody up beyond its bound;
//! and what a promotion gives up is never taken for the truth again (`docs/design/0005-modes.md`).
#![allow(clippy::unwrap_used)]

mod world;

use pollux_base::order::ReplicaState;
use pollux_base::record::{AtBound, LagBound, Mode};
use pollux_base::{ByteCount, NodeId, Op, Order, Reply, RequestId};
use std::collections::BTreeMap;
use world::*;

/// Blocks in different extents, so that nothing but the stream keeps their writes in order.
const PLACES: [u64; 6] = [0, 7, 1030, 2050, 3075, 4100];

/// A and B in sync, C behind.
fn with_trailing(seed: u64) -> World {
    let mut world = World::new(seed, &[A, B, C]);
    world.until_serving(A);
    world.set_mode(C, Mode::Async);
    until_trailing(&mut world);
    world
}

fn until_trailing(world: &mut World) {
    world.until("trailing", |world| {
        let stamp = world.spec.record.stamp;
        let acts = world.machines[&C].report.as_ref().is_some_and(|report| report.stamp == Some(stamp));
        acts && matches!(world.state(C), Some(ReplicaState::Trailing { .. }))
            && world.is_serving(world.spec.record.primary)
    });
}

fn until_caught_up(world: &mut World) {
    until_trailing(world);
    world.until("caught up", |world| {
        let primary = world.spec.record.primary;
        let report = world.machines[&primary].report.as_ref();
        report.is_some_and(|report| {
            !report.resync.contains_key(&C) && report.lag.get(&C).is_some_and(|lag| lag.bytes == 0 && lag.ms == 0)
        })
    });
    world.run_for(ms(200)); // what is durable in the spool is applied
}

/// Writes that are under way, or were answered.
#[derive(Default)]
struct Writes {
    asked: BTreeMap<RequestId, (u64, u64)>,
    next: u64,
}

impl Writes {
    fn some(&mut self, world: &mut World, node: NodeId, count: u64) {
        for _ in 0..count {
            self.next += 1;
            let block = PLACES[(self.next * 5 % 6) as usize];
            let id = world.write(node, block, 1, self.next);
            self.asked.insert(id, (block, self.next));
        }
    }

    /// The states after each prefix of what was acknowledged, oldest first.
    fn states(&self, world: &World) -> Vec<BTreeMap<u64, u64>> {
        let mut state: BTreeMap<u64, u64> = PLACES.iter().map(|block| (*block, 0)).collect();
        let mut states = vec![state.clone()];
        for id in &world.answered {
            if let (Some((block, value)), Some(Reply::Done)) = (self.asked.get(id), world.answer(*id)) {
                state.insert(*block, *value);
                states.push(state.clone());
            }
        }
        states
    }

    fn until_acknowledged(&self, world: &mut World) {
        world.until("acknowledged", |world| self.asked.keys().all(|id| world.answer(*id).is_some()));
    }
}

/// What C serves when it is promoted.
fn promoted(world: &mut World) -> BTreeMap<u64, u64> {
    let Some(ReplicaState::Trailing { at }) = world.state(C).cloned() else {
        panic!("no cut: {:?}", world.state(C));
    };
    world.spec.lineage.cut_back_to_before(at);
    world.spec.modes.remove(&C);
    let epoch = pollux_base::Epoch(world.spec.record.stamp.epoch.0 + 1);
    world.decide_under(epoch, C, [C].into());
    world.until_serving(C);
    PLACES.iter().map(|block| (*block, world.read_value(C, *block))).collect()
}

fn assert_prefix(writes: &Writes, world: &World, state: &BTreeMap<u64, u64>, what: &str) -> usize {
    let states = writes.states(world);
    let place = states.iter().rposition(|known| known == state);
    place.unwrap_or_else(|| panic!("{what}: {state:?} is no state that the group had\n{}", world.describe()))
}

#[test]
fn what_a_trailing_replica_holds_is_a_prefix_of_what_was_acknowledged() {
    let mut partial = 0;
    for seed in 0..60 {
        let mut world = with_trailing(seed);
        let mut writes = Writes::default();
        for _ in 0..6 {
            writes.some(&mut world, A, 8);
            world.run_for(std::time::Duration::from_micros(200 + seed * 37));
        }
        // The site is lost, and perhaps power here too, in the middle of anything.
        world.power_cut(A);
        world.power_cut(B);
        world.run_for(std::time::Duration::from_micros(seed % 7 * 300));
        if seed % 3 != 0 {
            if seed % 3 == 1 {
                world.kill(C)
            } else {
                world.power_cut(C)
            }
            world.start(C);
            world.until("a cut again", |world| matches!(world.state(C), Some(ReplicaState::Trailing { .. })));
        }
        let state = promoted(&mut world);
        let place = assert_prefix(&writes, &world, &state, &format!("seed {seed}"));
        partial += usize::from(place > 0 && place + 1 < writes.states(&world).len());
    }
    assert!(partial > 10, "cut in the middle often enough: {partial}");
}

/// The checker is shown a history that it must not accept: one change is left out on the way.
#[test]
fn the_check_catches_a_change_that_was_left_out() {
    let mut world = with_trailing(3);
    let mut writes = Writes::default();
    writes.some(&mut world, A, 6);
    writes.until_acknowledged(&mut world);
    let mut state = writes.states(&world).last().unwrap().clone();
    let first = *writes.asked.values().next().map(|(block, _)| block).unwrap();
    state.insert(first, 0);
    assert!(writes.states(&world).iter().all(|known| *known != state));
}

/// A batch that first writes where nothing was, and then takes it away again.
#[test]
fn what_is_zeroed_right_after_it_was_first_written_is_zeros_there_too() {
    let mut world = with_trailing(4);
    world.cut(A, C);
    world.write_done(A, 2048, 4, 9);
    let id = world.request(A, Op::Zero { range: range(2048, 4), fua: false });
    world.until("zeroed", |world| world.answer(id).is_some());
    world.heal(A, C);
    until_caught_up(&mut world);
    assert_eq!(world.contents(C)[2048..2052], [0; 4]);
}

#[test]
fn a_trailing_replica_holds_up_nobody_when_it_dies() {
    let mut world = with_trailing(5);
    world.kill(C);
    let mut writes = Writes::default();
    let start = world.now;
    writes.some(&mut world, A, 50);
    writes.until_acknowledged(&mut world);
    world.flush_done(A);
    assert!(world.now.since(start) < ms(1000), "{:?}", world.now.since(start));
    assert!(!world.spec.record.in_sync.contains(&C));
    world.start(C);
    until_caught_up(&mut world);
    assert_eq!(world.contents(C), world.contents(A));
}

#[test]
fn a_replica_that_is_back_in_time_goes_on_where_it_was() {
    let mut world = with_trailing(6);
    let mut writes = Writes::default();
    writes.some(&mut world, A, 20);
    until_caught_up(&mut world);
    world.cut(A, C);
    writes.some(&mut world, A, 20);
    world.run_for(ms(2000));
    let before = world.messages.len();
    world.heal(A, C);
    until_caught_up(&mut world);
    assert!(!world.messages[before..].iter().any(|message| message.contains("compare")), "nothing was compared");
    assert_eq!(world.contents(C), world.contents(A));
    // The same after its process died: the spool tells where it was.
    world.kill(C);
    writes.some(&mut world, A, 20);
    world.run_for(ms(300));
    let before = world.messages.len();
    world.start(C);
    until_caught_up(&mut world);
    assert!(!world.messages[before..].iter().any(|message| message.contains("compare")), "nothing was compared");
    assert_eq!(world.contents(C), world.contents(A));
}

fn bound(world: &mut World, bytes: u64, lag_ms: u64, at_bound: AtBound) {
    world.spec.lag = LagBound { bytes: ByteCount(bytes), ms: lag_ms, at_bound };
    let in_sync = world.spec.record.in_sync.clone();
    world.decide(A, in_sync);
    world.run_for(ms(200));
    until_caught_up(world);
}

#[test]
fn at_the_bound_writers_wait_as_long_as_the_replica_gets_on() {
    let mut world = with_trailing(7);
    bound(&mut world, 64 << 10, 60_000, AtBound::Slow);
    world.machine(C).is_disk_stuck = true;
    let mut writes = Writes::default();
    writes.some(&mut world, A, 20);
    writes.until_acknowledged(&mut world);
    writes.some(&mut world, A, 20);
    world.run_for(ms(1500));
    let waiting = writes.asked.keys().filter(|id| world.answer(**id).is_none()).count();
    assert!(waiting > 0, "beyond the bound they wait");
    assert!(world.machines[&A].report.as_ref().unwrap().is_slowed);
    let read = world.request(A, Op::Read { range: range(0, 1) });
    world.until("reads and flushes go on", |world| world.answer(read).is_some());
    world.flush_done(A);
    // It does not get on at all: it holds nobody for longer than a disk may take.
    let start = world.now;
    writes.until_acknowledged(&mut world);
    assert!(world.now.since(start) < ms(6000));
}

#[test]
fn at_the_bound_the_replica_is_dropped_if_that_is_wanted_and_brought_up_to_date_later() {
    let mut world = with_trailing(8);
    bound(&mut world, 64 << 10, 60_000, AtBound::Drop);
    world.machine(C).is_disk_stuck = true;
    let mut writes = Writes::default();
    writes.some(&mut world, A, 60);
    let start = world.now;
    writes.until_acknowledged(&mut world);
    assert!(world.now.since(start) < ms(500), "{:?}", world.now.since(start));
    world.machine(C).is_disk_stuck = false;
    while let Some(done) = world.machine(C).disk.complete_any() {
        world.give_disk(C, done);
    }
    until_caught_up(&mut world);
    assert_eq!(world.contents(C), world.contents(A));
}

#[test]
fn after_a_takeover_it_trails_the_new_primary_and_converges() {
    for seed in 0..10 {
        let mut world = with_trailing(seed);
        let mut writes = Writes::default();
        writes.some(&mut world, A, 30);
        world.run_for(std::time::Duration::from_micros(500 * seed));
        world.power_cut(A);
        world.take_over(B, &[B]);
        world.until_serving(B);
        writes.some(&mut world, B, 10);
        until_caught_up(&mut world);
        assert_eq!(world.contents(C), world.contents(B), "seed {seed}");
    }
}

/// While it is being compared it is no cut, and says so.
#[test]
fn a_replica_that_is_being_compared_can_not_be_promoted() {
    let mut world = with_trailing(9);
    let mut writes = Writes::default();
    writes.some(&mut world, A, 30);
    writes.until_acknowledged(&mut world);
    world.power_cut(C);
    for block in 0..40 {
        world.write_done(A, block * 100, 60, block + 100);
    }
    world.kill(A); // its backlog is gone with it
    world.start(C);
    world.start(A);
    let mut was_no_cut = false;
    world.until("trailing", |world| {
        let is_cut = matches!(world.state(C), Some(ReplicaState::Trailing { .. }));
        let last = |what: &str| world.messages.iter().rposition(|message| message.contains(what));
        let compares = last("n3>n1 differs") > last("n1>n3 cut");
        assert!(!(compares && is_cut), "it says that it is a cut while it is compared");
        was_no_cut |= compares;
        is_cut && was_no_cut
    });
    until_caught_up(&mut world);
    assert_eq!(world.contents(C), world.contents(A));
}

#[test]
fn what_a_promotion_gives_up_is_left_alone_and_never_the_truth() {
    let mut world = with_trailing(10);
    let mut writes = Writes::default();
    writes.some(&mut world, A, 10);
    until_caught_up(&mut world);
    world.cut(A, C);
    world.cut(B, C);
    world.write_done(A, 0, 1, 4711);
    world.flush_done(A);
    world.power_cut(A);
    world.power_cut(B);
    let state = promoted(&mut world);
    assert_ne!(state[&0], 4711);
    world.heal(A, C);
    world.heal(B, C);
    world.start(A);
    world.start(B);
    world.run_for(ms(3000));
    for node in [A, B] {
        assert!(matches!(world.state(node), Some(ReplicaState::Diverged { .. })), "{:?}", world.state(node));
        assert_eq!(world.contents(node)[0], 4711, "it is left as it is");
    }
    // A human lets it go.
    let Some(ReplicaState::Diverged { own }) = world.state(A).cloned() else { unreachable!() };
    world.order(A, Order::Discard { group: GROUP, loser: own });
    world.until("back in sync", |world| world.spec.record.in_sync.contains(&A));
    assert_eq!(world.contents(A), world.contents(C));
}

#[test]
fn all_modes_change_under_load_and_the_replicas_converge() {
    for seed in 0..20 {
        let mut world = World::new(seed, &[A, B, C]);
        world.until_serving(A);
        let mut writes = Writes::default();
        let modes = [Mode::Async, Mode::Sync, Mode::Async, Mode::Memory, Mode::Async];
        for (round, mode) in modes.into_iter().enumerate() {
            writes.some(&mut world, A, 12);
            world.run_for(std::time::Duration::from_micros(500 + 400 * seed));
            world.set_mode(C, mode);
            writes.some(&mut world, A, 12);
            if seed % 3 == 0 {
                world.flap(A, C);
            }
            if seed % 4 == 1 && round == 2 {
                world.kill(C);
                world.start(C);
            }
            world.run_for(ms(20 + 30 * (seed % 5)));
        }
        writes.until_acknowledged(&mut world);
        until_caught_up(&mut world);
        assert_eq!(world.contents(C), world.contents(A), "seed {seed}");
        assert_eq!(world.contents(B), world.contents(A), "seed {seed}");
    }
}
