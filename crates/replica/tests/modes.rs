//! Modes of replicas, changed under load (W1), and what each of them promises.
#![allow(clippy::unwrap_used)]

mod world;

use pollux_base::record::Mode;
use pollux_base::{Op, Reply};
use pollux_replica::wire::Message;
use std::cell::Cell;
use std::rc::Rc;
use world::*;

fn pair_in(seed: u64, mode: Mode) -> World {
    let mut world = World::pair(seed);
    world.set_mode(B, mode);
    world.until_healthy();
    world
}

/// Lets the node's disk answer again what it was asked while it did not.
fn release_disk(world: &mut World, node: pollux_base::NodeId) {
    world.machine(node).is_disk_stuck = false;
    while let Some(done) = world.machine(node).disk.complete_any() {
        world.give_disk(node, done);
    }
}

#[test]
fn in_mode_memory_a_write_counts_before_it_is_on_the_peers_disk_and_a_flush_does_not() {
    let mut world = pair_in(1, Mode::Memory);
    world.write_done(A, 0, 1, 1);
    world.flush_done(A);
    world.machine(B).is_disk_stuck = true;
    for block in 0..20 {
        world.write_done(A, block, 1, block + 7);
    }
    let flush = world.request(A, Op::Flush);
    let synced = world.request(A, Op::Write { range: range(30, 1), data: blocks(9, 1), fua: true });
    world.run_for(ms(2000));
    assert_eq!(world.answer(flush), None, "a flush waits for the disk of all");
    assert_eq!(world.answer(synced), None, "so does a write that asks for it");
    release_disk(&mut world, B);
    world.until("flushed", |world| world.answer(flush).is_some() && world.answer(synced).is_some());
    world.power_cut(B);
    assert_eq!(world.contents(B)[..3], [7, 8, 9]);
}

#[test]
fn in_mode_sync_a_write_waits_for_the_peers_disk() {
    let mut world = pair_in(2, Mode::Sync);
    world.write_done(A, 0, 1, 1);
    world.machine(B).is_disk_stuck = true;
    let id = world.write(A, 0, 1, 2);
    world.run_for(ms(2000));
    assert_eq!(world.answer(id), None);
}

/// What was received is written although link and record are gone by then.
#[test]
fn what_the_peer_has_in_memory_survives_the_death_of_the_primary() {
    for seed in 0..20 {
        let mut world = pair_in(seed, Mode::Memory);
        world.write_done(A, 0, 1, 1);
        world.machine(B).is_disk_stuck = true;
        let ids: Vec<_> = (0..30).map(|block| world.write(A, block % 10, 1, block + 100)).collect();
        world.until("acknowledged", |world| ids.iter().all(|id| world.answer(*id) == Some(&Reply::Done)));
        world.power_cut(A);
        world.take_over(B, &[B]);
        release_disk(&mut world, B);
        world.until_serving(B);
        for block in 0..10 {
            assert_eq!(world.read_value(B, block), block + 120, "seed {seed}");
        }
    }
}

/// Its process took with it what it had only in memory: the extents stayed hot here, so they are compared (W8).
#[test]
fn what_the_peer_lost_with_its_process_is_brought_back_when_it_returns() {
    for decides in [true, false] {
        let mut world = pair_in(3, Mode::Memory);
        world.write_done(A, 0, 1, 1);
        world.machine(B).is_disk_stuck = true;
        for block in 0..10 {
            world.write_done(A, block * 100, 1, block + 50);
        }
        world.run_for(ms(1000));
        world.decides = decides;
        world.kill(B);
        world.run_for(ms(if decides { 8000 } else { 300 }));
        world.machine(B).is_disk_stuck = false;
        world.decides = true;
        world.start(B);
        world.until_healthy();
        assert_eq!(world.contents(A), world.contents(B));
    }
}

/// Nothing cools while a replica has it in memory only: the mark is all that would tell of its loss.
#[test]
fn an_extent_stays_hot_until_the_peer_has_it_on_its_disk() {
    let mut world = pair_in(4, Mode::Memory);
    world.write_done(A, 0, 1, 1);
    world.run_for(ms(15_000));
    assert!(world.hot(A).is_empty(), "idle extents are cold");
    world.machine(B).is_disk_stuck = true;
    world.decides = false;
    world.write_done(A, 0, 1, 2);
    world.run_for(ms(20_000));
    assert_eq!(world.hot(A).len(), 1);
}

/// A replica that may have lost what was acknowledged with its process does not claim that it lived on: a primary that lost
/// power takes its blocks over only from one that did.
#[test]
fn a_process_that_died_in_mode_memory_counts_as_a_power_cut() {
    let continuous = Rc::new(Cell::new(None));
    for (mode, expected) in [(Mode::Memory, false), (Mode::Sync, true)] {
        let mut world = pair_in(5, mode);
        world.write_done(A, 0, 1, 1);
        let seen = Rc::clone(&continuous);
        world.lets_through = Box::new(move |from, _, frame| {
            if let Message::Join { standing: pollux_replica::wire::Standing::InSync { continuous, .. }, .. } =
                &frame.message
                && from == B
            {
                seen.set(Some(*continuous));
            }
            true
        });
        world.decides = false;
        world.kill(B);
        world.start(B);
        world.until_serving(A);
        assert_eq!(continuous.get(), Some(expected), "{mode:?}");
    }
}

#[test]
fn modes_change_under_load_and_nothing_is_lost_or_answered_twice() {
    for seed in 0..30 {
        let mut world = World::pair(seed);
        let mut ids = Vec::new();
        for round in 0..6 {
            for block in 0..20 {
                ids.push(world.write(A, (block * 7 + round) % 40, 1 + block % 3, 1000 * round + block));
            }
            world.run_for(std::time::Duration::from_micros(300 + 130 * seed));
            world.set_mode(B, if round % 2 == 0 { Mode::Memory } else { Mode::Sync });
            if seed % 3 == 0 {
                world.flap(A, B);
            }
            if seed % 4 == 1 && round == 3 {
                world.kill(B);
                world.start(B);
            }
        }
        world.until("all are acknowledged", |world| ids.iter().all(|id| world.answer(*id) == Some(&Reply::Done)));
        world.until_healthy();
        world.flush_done(A);
        assert_eq!(world.contents(A), world.contents(B), "seed {seed}");
    }
}

/// An order that is late at a replica delays nothing: the record comes before what is asked under it.
#[test]
fn what_is_written_under_a_newer_record_finds_it_known_at_the_peer() {
    let mut world = World::pair(7);
    world.write_done(A, 0, 1, 1);
    world.machine(B).is_deaf = true;
    world.decides = false;
    let ids: Vec<_> = (0..10).map(|block| world.write(A, block, 1, block + 5)).collect();
    world.take_over(A, &[A, B]);
    let start = world.now;
    world.until("acknowledged", |world| ids.iter().all(|id| world.answer(*id) == Some(&Reply::Done)));
    assert!(world.now.since(start) < ms(1000), "{:?}", world.now.since(start));
}
