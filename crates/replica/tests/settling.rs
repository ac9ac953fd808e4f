//! Guests beside the settling of a replica that they cannot do without: who waits for it, and for how much of it.
#![allow(clippy::unwrap_used)]

mod world;

use pollux_base::order::FreezeReason;
use pollux_base::unit::BLOCK_BYTES;
use pollux_base::{ByteCount, NodeId, Op, Order, Reply};
use pollux_replica::wire::Message;
use std::time::Duration;
use world::*;

const X: u64 = 1024;

/// A pair that serves a volume of 40 extents.
fn large_pair(seed: u64) -> World {
    let mut world = World::pair(seed);
    world.spec.volumes.insert(VOLUME, ByteCount(40 * X * BLOCK_BYTES));
    for node in [A, B] {
        let spec = world.spec.clone();
        world.order(node, Order::Group(spec));
    }
    world.run_for(ms(100));
    world
}

/// From now on nothing that the primary asks about these extents arrives.
fn compare_none_below(world: &mut World, first: u32) {
    world.lets_through =
        Box::new(move |_, _, frame| !matches!(frame.message, Message::Compare { extent, .. } if extent.0 < first));
}

fn read(block: u64) -> Op {
    Op::Read { range: range(block, 1) }
}

#[test]
fn after_the_death_of_a_process_guests_go_on_and_only_reads_of_what_is_to_be_settled_wait() {
    for victim in [A, B] {
        let mut world = large_pair(700);
        for extent in 0..20 {
            world.write_done(A, extent * X, 2, extent + 1);
        }
        world.kill(victim);
        compare_none_below(&mut world, u32::MAX);
        world.start(victim);
        world.until_serving(A);
        // Some extents are just being compared, others are still to be.
        let since = world.now;
        world.write_done(A, 19 * X, 1, 77);
        world.flush_done(A);
        assert!(world.now < since + ms(20), "a change waited for {:?}", world.now.since(since));
        let waiting = [read(19 * X), read(X + 1), Op::Status { range: range(0, 4) }];
        let waiting = waiting.map(|op| world.request(A, op));
        world.run_for(ms(500));
        let answers = waiting.map(|id| world.answer(id).cloned());
        assert_eq!(answers, [None, None, None], "{victim} died: the other may have something else");
        world.lets_through = Box::new(|_, _, _| true);
        world.until("answers", |world| waiting.iter().all(|id| world.answer(*id).is_some()));
        assert!(matches!(world.answer(waiting[0]), Some(Reply::Data(data)) if value_of(data.as_slice()) == 77));
        world.until_healthy();
        world.same(&[A, B]);
    }
}

#[test]
fn what_a_read_waits_for_is_settled_before_everything_else() {
    let mut world = large_pair(701);
    for extent in 0..20 {
        world.write_done(A, extent * X, 1, extent + 1);
    }
    world.kill(A);
    // As many extents as are settled at once come to nothing.
    compare_none_below(&mut world, 19);
    world.start(A);
    world.until_serving(A);
    let since = world.now;
    assert_eq!(world.read_value(A, 19 * X), 20);
    assert!(world.now < since + ms(100), "it waited for {:?}", world.now.since(since));
    let other = world.request(A, read(0));
    world.run_for(ms(100));
    assert_eq!(world.answer(other), None);
}

#[test]
fn a_patch_goes_by_what_is_settled() {
    let mut world = World::pair(702);
    world.write_done(A, 5, 1, 1);
    world.kill(B);
    compare_none_below(&mut world, u32::MAX);
    world.start(B);
    world.until_serving(A);
    let patch = Op::Patch { block: range(5, 1).start, offset: 512, data: blocks(9, 1).slice(0..512), fua: false };
    let patch = world.request(A, patch);
    world.run_for(ms(200));
    assert_eq!(world.answer(patch), None);
    world.lets_through = Box::new(|_, _, _| true);
    world.until("the patch", |world| world.answer(patch).is_some());
    assert_eq!(world.read_values(A, 5), [1, 9, 1, 1, 1, 1, 1, 1]);
    world.until_healthy();
    world.same(&[A, B]);
}

#[test]
fn with_a_replica_that_lost_power_guests_wait_until_all_is_settled() {
    let mut world = World::pair(703);
    world.write_done(A, 0, 2, 1);
    world.power_cut(B);
    compare_none_below(&mut world, u32::MAX);
    world.start(B);
    let flush = world.request(A, Op::Flush);
    world.run_for(ms(1000));
    assert_eq!(world.frozen(A), Some(&FreezeReason::Settling { node: B }));
    assert_eq!(world.answer(flush), None, "B may lack what was acknowledged, and this would promise it");
    world.lets_through = Box::new(|_, _, _| true);
    world.until_healthy();
    world.same(&[A, B]);
}

/// What the primary held of a write that was never acknowledged may be shown only when the other has it, too.
#[test]
fn what_was_read_after_the_death_of_a_process_is_there_after_a_takeover() {
    let mut differed = 0;
    for seed in 0..60 {
        let mut world = World::pair(800 + seed);
        let places: Vec<u64> = (0..5).flat_map(|extent| (0..8).map(move |at| extent * X + at * 11)).collect();
        for place in &places {
            world.write_done(A, *place, 1, 1);
        }
        for place in &places {
            world.write(A, *place, 1, 2);
        }
        world.run_for(Duration::from_micros(15 * seed));
        let victim: NodeId = if seed % 2 == 0 { A } else { B };
        world.kill(victim);
        differed += u64::from(victim == A && world.contents(A) != world.contents(B));
        world.start(victim);
        world.until_serving(A);
        let shown: Vec<_> = places.iter().map(|place| world.read_values(A, *place)).collect();
        world.power_cut(A);
        world.take_over(B, &[B]);
        world.until_serving(B);
        let after: Vec<_> = places.iter().map(|place| world.read_values(B, *place)).collect();
        assert_eq!(shown, after, "seed {seed}");
    }
    assert!(differed > 5, "only {differed} times there was anything to settle");
}
