//! What a resync must not miss: changes of every kind while a replica was away, several targets at once, a source that
//! loses its authority, places beyond 32 bits, and who does not answer.
#![allow(clippy::unwrap_used)]

mod world;

use pollux_base::{ByteCount, Op, Reply};
use std::collections::BTreeSet;
use world::*;

#[test]
fn zeroes_made_while_a_replica_was_away_are_made_there_too_and_take_no_space() {
    let mut world = World::pair(1);
    world.write_done(A, 0, 1024, 1);
    world.write_done(A, 1024, 1024, 2);
    world.run_for(ms(15_000));
    world.kill(B);
    world.take_over(A, &[A]);
    // A part of an extent, and all of one, which has nothing left to tell of its change but its place.
    for zeroed in [range(100, 50), range(1024, 1024)] {
        let id = world.request(A, Op::Zero { range: zeroed, fua: false });
        world.until("zeroed", |world| world.answer(id).is_some());
    }
    world.run_for(ms(15_000));
    world.start(B);
    world.until_healthy();
    world.same(&[A, B]);
    assert_eq!(world.stored(A), world.stored(B));
    assert_eq!(world.stored(B).len(), 1024 - 50);
}

#[test]
fn two_replicas_brought_up_to_date_at_once_get_each_what_they_lack() {
    let mut world = World::new(2, &[A, B, C]);
    world.until_serving(A);
    for extent in 0..4 {
        world.write_done(A, extent * 1024, 600, extent + 1);
    }
    world.kill(B);
    world.take_over(A, &[A, C]);
    world.until_serving(A);
    world.write_done(A, 10, 500, 50);
    world.kill(C);
    world.take_over(A, &[A]);
    world.write_done(A, 2048, 500, 60);
    world.sent_bytes = 0;
    world.start(B);
    world.start(C);
    world.until_healthy();
    world.same(&[A, B, C]);
    // B lacks 1000 blocks and C 500; what was on its way when the other became current may have gone twice.
    let lacking = 1500 * 4096;
    assert!(world.sent_bytes <= lacking * 3 / 2, "{} B for {lacking}", world.sent_bytes);
}

#[test]
fn a_source_that_loses_its_authority_makes_nobody_current() {
    for seed in 0..6 {
        let mut world = World::new(10 + seed, &[A, B, C]);
        world.until_serving(A);
        world.write_done(A, 0, 1024, 1);
        world.kill(B);
        world.take_over(A, &[A, C]);
        world.until_serving(A);
        for extent in 0..4 {
            world.write_done(A, extent * 1024, 1024, 50 + extent);
        }
        world.start(B);
        world.until("copying", |world| world.messages.iter().any(|message| message.contains("compare")));
        world.run_for(std::time::Duration::from_micros(500 * seed));
        // C goes on alone; A does not hear of it by an order, and brings B what was the truth.
        world.machine(A).is_deaf = true;
        world.cut(A, C);
        world.take_over(C, &[C]);
        world.until_serving(C);
        world.write_done(C, 5, 3, 99);
        world.run_for(ms(2000));
        assert_eq!(world.spec.record.primary, C);
        assert!(!world.spec.record.in_sync.contains(&A));
        world.heal(A, C);
        world.machine(A).is_deaf = false;
        let spec = world.spec.clone();
        world.order(A, pollux_base::Order::Group(spec));
        world.until_healthy();
        world.same(&[C, A, B]);
        assert_eq!(world.contents(B)[5..8], [99, 99, 99]);
    }
}

#[test]
fn places_beyond_32_bits_are_mirrored_and_brought_like_others() {
    let mut world = World::pair(3);
    let far = (1u64 << 32) + 7;
    world.spec.volumes.insert(VOLUME, ByteCount((far + 4096) / 1024 * 1024 * 4096));
    let spec = world.spec.clone();
    for node in [A, B] {
        world.order(node, pollux_base::Order::Group(spec.clone()));
    }
    world.run_for(ms(100));
    world.write_done(A, far, 3, 5);
    world.kill(B);
    world.take_over(A, &[A]);
    world.write_done(A, far + 1, 1, 6);
    world.write_done(A, 7, 1, 8);
    world.start(B);
    world.until_healthy();
    world.power_cut(A);
    world.take_over(B, &[B]);
    world.until_serving(B);
    let values: Vec<u64> = [far, far + 1, far + 2, 7, 8].map(|block| world.read_value(B, block)).to_vec();
    assert_eq!(values, [5, 6, 5, 8, 0]);
}

#[test]
fn a_hanging_disk_of_the_secondary_does_not_stop_the_guest_for_good() {
    let mut world = World::pair(4);
    world.write_done(A, 0, 1, 1);
    world.machine(B).is_disk_stuck = true;
    let start = world.now;
    let write = world.write(A, 1, 1, 2);
    world.until("answered", |world| world.answer(write).is_some());
    assert_eq!(world.answer(write), Some(&Reply::Done));
    assert!(world.now.since(start) < ms(6500), "{:?}", world.now.since(start));
    assert_eq!(world.spec.record.in_sync, BTreeSet::from([A]));
}

#[test]
fn a_replica_whose_disk_hangs_while_it_is_brought_up_to_date_holds_no_write_for_good() {
    let mut world = World::pair(5);
    world.write_done(A, 0, 1024, 1);
    world.kill(B);
    world.take_over(A, &[A]);
    for extent in 0..4 {
        world.write_done(A, extent * 1024, 1024, 50 + extent);
    }
    world.start(B);
    world.until("copying", |world| world.messages.iter().any(|message| message.contains("compare")));
    world.machine(B).is_disk_stuck = true;
    let start = world.now;
    let ids: Vec<_> = (0..4).map(|extent| world.write(A, extent * 1024 + 3, 1, 99)).collect();
    world.until("answered", |world| ids.iter().all(|id| world.answer(*id).is_some()));
    assert!(world.now.since(start) < ms(6500), "{:?}", world.now.since(start));
    assert_eq!(world.spec.record.in_sync, BTreeSet::from([A]));
}
