//! Guests beside the settling of a replica that they cannot do without: who waits for it, and for how much of it.
#![allow(clippy::unwrap_used)]

mod world;

use pollux_base::order::FreezeReason;
use pollux_base::unit::{BLOCK_BYTES, EXTENT_BLOCKS};
use pollux_base::{ByteCount, NodeId, Op, Order, Reply};
use pollux_replica::wire::Message;
use std::cell::RefCell;
use std::rc::Rc;
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

/// From now on no comparison of a whole extent arrives.
fn compare_none(world: &mut World) {
    world.lets_through = Box::new(
        |_, _, frame| !matches!(frame.message, Message::Compare { range, .. } if range.count.0 == EXTENT_BLOCKS),
    );
}

fn read(block: u64) -> Op {
    Op::Read { range: range(block, 1) }
}

#[test]
fn after_the_death_of_a_process_guests_do_not_wait_for_the_settling() {
    for victim in [A, B] {
        let mut world = large_pair(700);
        for extent in 0..20 {
            world.write_done(A, extent * X, 2, extent + 1);
        }
        world.kill(victim);
        compare_none(&mut world);
        world.start(victim);
        world.until_serving(A);
        // Some extents are just being compared, others are still to be.
        let since = world.now;
        world.write_done(A, 19 * X, 1, 77);
        world.flush_done(A);
        assert_eq!(world.read_value(A, 19 * X), 77);
        assert_eq!(world.read_value(A, X + 1), 2);
        assert_eq!(world.read_value(A, 3), 0);
        assert!(world.now < since + ms(30), "{victim} died: {:?}", world.now.since(since));
        let spans = [(19 * X - 1, 3, true), (39 * X, 1, false)];
        for (start, count, may_hold) in spans {
            let status = world.request(A, Op::Status { range: range(start, count) });
            world.until("the status", |world| world.answer(status).is_some());
            let expected = Reply::Status(vec![(range(start, count), may_hold)]);
            assert_eq!(world.answer(status), Some(&expected), "what is still to be settled is not called a hole");
        }
        world.lets_through = Box::new(|_, _, _| true);
        world.until_healthy();
        world.same(&[A, B]);
    }
}

#[test]
fn a_read_brings_its_own_blocks_and_only_if_they_differ() {
    let mut world = large_pair(701);
    for extent in 0..20 {
        world.write_done(A, extent * X, 4, extent + 1);
    }
    // One write comes to its own disk only, and none is acknowledged.
    world.lets_through = Box::new(|_, _, frame| !matches!(frame.message, Message::Write { .. }));
    let lost = world.write(A, 3 * X + 1, 1, 99);
    world.run_for(ms(20));
    assert_eq!(world.answer(lost), None);
    world.kill(A);
    assert!(world.contents(A) != world.contents(B), "nothing is to be brought");
    let written = Rc::new(RefCell::new(Vec::new()));
    let seen = written.clone();
    world.lets_through = Box::new(move |_, _, frame| match frame.message {
        Message::Compare { range, .. } => range.count.0 < EXTENT_BLOCKS,
        Message::Write { range, .. } => {
            seen.borrow_mut().push(range);
            true
        }
        _ => true,
    });
    world.start(A);
    world.until_serving(A);
    for extent in 0..20 {
        let whole = world.request(A, Op::Read { range: range(extent * X, 4) });
        world.until("the read", |world| world.answer(whole).is_some());
        let Some(Reply::Data(data)) = world.answer(whole) else { panic!("{:?}", world.answer(whole)) };
        let expected = [0, 1, 2, 3].map(|at| if (extent, at) == (3, 1) { 99 } else { extent + 1 });
        let found = [0, 1, 2, 3].map(|at| value_of(&data.as_slice()[at * BLOCK_BYTES as usize..]));
        assert_eq!(found, expected);
    }
    assert_eq!(*written.borrow(), [range(3 * X + 1, 1)]);
    // What was seen is there, though nothing else was settled.
    world.power_cut(A);
    world.take_over(B, &[B]);
    world.until_serving(B);
    assert_eq!(world.read_value(B, 3 * X + 1), 99);
}

#[test]
fn a_read_is_not_answered_before_what_it_shows_is_everywhere() {
    let mut world = World::pair(704);
    world.write_done(A, 5, 1, 1);
    world.lets_through = Box::new(|_, _, frame| !matches!(frame.message, Message::Write { .. }));
    world.write(A, 5, 1, 2);
    world.run_for(ms(20));
    world.kill(A);
    world.start(A);
    world.until_serving(A);
    let waiting = world.request(A, read(5));
    world.run_for(ms(500));
    assert_eq!(world.answer(waiting), None, "B has something else");
    // B is lost meanwhile, and the record does without it: what is here counts now.
    world.kill(B);
    world.take_over(A, &[A]);
    world.until("the read", |world| world.answer(waiting).is_some());
    assert!(matches!(world.answer(waiting), Some(Reply::Data(data)) if value_of(data.as_slice()) == 2));
}

#[test]
fn a_patch_goes_into_what_is_here_and_all_of_it_to_both() {
    let mut world = large_pair(702);
    for extent in 0..20 {
        world.write_done(A, extent * X, 1, 1);
    }
    world.kill(B);
    compare_none(&mut world);
    world.start(B);
    world.until_serving(A);
    // Those compared first hold their blocks meanwhile.
    let at = 19 * X;
    let patch = Op::Patch { block: range(at, 1).start, offset: 512, data: blocks(9, 1).slice(0..512), fua: false };
    let since = world.now;
    let patch = world.request(A, patch);
    world.until("the patch", |world| world.answer(patch).is_some());
    assert!(world.now < since + ms(20), "it waited for {:?}", world.now.since(since));
    world.power_cut(A);
    world.take_over(B, &[B]);
    world.until_serving(B);
    assert_eq!(world.read_values(B, at), [1, 9, 1, 1, 1, 1, 1, 1]);
}

#[test]
fn with_a_replica_that_lost_power_guests_wait_until_all_is_settled() {
    let mut world = World::pair(703);
    world.write_done(A, 0, 2, 1);
    world.power_cut(B);
    compare_none(&mut world);
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
