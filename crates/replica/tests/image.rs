//! An image of a whole pool from an earlier day is put back, under a node that does not know it: a peer does, and what the
//! image lacks is never served.
#![allow(clippy::unwrap_used)]

mod world;

use pollux_base::{ByteCount, Instant, NodeId, Order, Report};
use pollux_replica::take_as_stale;
use pollux_replica::wire::Message;
use pollux_store::faulty_disk::FaultyDisk;
use pollux_store::{Disks, Input, StoreRequestId};
use std::collections::BTreeSet;
use world::*;

/// Two nodes with data, B's disk as it was then, and much that was written and has cooled since, all in one generation.
fn with_image(seed: u64) -> (World, FaultyDisk) {
    let mut world = World::pair(seed);
    (0..4).for_each(|extent| world.write_done(A, extent * 1024, 8, 1));
    world.run_for(ms(15_000));
    let mut image = world.machine(B).disk.clone();
    image.power_cut(seed);
    let stamp = world.spec.record.stamp;
    (0..4).for_each(|extent| world.write_done(A, extent * 1024 + 2, 8, 2));
    world.flush_done(A);
    world.run_for(ms(15_000));
    assert!(world.hot(A).is_empty() && world.hot(B).is_empty(), "no mark tells of what was written");
    assert_eq!(world.spec.record.stamp, stamp, "and no record");
    (world, image)
}

/// Since reports were last forgotten.
fn is_refused(world: &World, node: NodeId) -> bool {
    let is_said =
        |report: &Report| matches!(report, Report::PoolFailed { reason } if reason.contains("image of an earlier day"));
    world.reports.iter().any(|(_, by, report)| *by == node && is_said(report))
}

/// As `blockd take-old-image` does it.
fn take(disk: &mut FaultyDisk, node: NodeId) {
    let mut pool = Disks::open(CLUSTER, node, &[ByteCount(disk.size())]);
    disk.run(&mut pool).unwrap();
    for (op, number) in take_as_stale(pool.notes()).into_iter().zip(1..) {
        pool.handle(Instant(0), Input::Request(StoreRequestId(number), op));
        disk.run(&mut pool).unwrap();
    }
}

#[test]
fn a_secondary_restored_from_yesterdays_image_is_refused_and_then_compared_in_full() {
    for seed in 0..4 {
        let (mut world, image) = with_image(700 + seed);
        world.power_cut(B);
        world.write_done(A, 4 * 1024 + 9, 1, 3);
        world.machine(B).disk = image;
        world.start(B);
        world.until("the image is refused", |world| is_refused(world, B));
        world.run_for(ms(5_000));
        assert!(!world.spec.record.in_sync.contains(&B), "it never counts");
        // Starting again and again makes it no newer.
        for _ in 0..3 {
            world.kill(B);
            world.reports.clear();
            world.start(B);
            world.until("the image is refused", |world| is_refused(world, B));
        }
        world.kill(B);
        take(&mut world.machine(B).disk, B);
        world.start(B);
        world.until_healthy();
        world.same(&[A, B]);
        assert_eq!(world.contents(B)[1026], 2);
        // From then on it is a pool like any other.
        world.power_cut(B);
        world.start(B);
        world.until_healthy();
    }
}

/// The check is of use: without what the peers say, stale data counts as in sync.
#[test]
fn without_the_peers_word_the_image_would_be_served() {
    let (mut world, image) = with_image(710);
    world.power_cut(B);
    world.write_done(A, 4 * 1024 + 9, 1, 3);
    world.machine(B).disk = image;
    world.lets_through = Box::new(|_, _, frame| !matches!(frame.message, Message::Pool { .. }));
    world.start(B);
    world.until_healthy();
    assert_eq!((world.contents(A)[1026], world.contents(B)[1026]), (2, 1));
}

#[test]
fn an_image_put_back_while_all_had_no_power_does_not_overwrite_the_truth() {
    for (seed, restored, other) in [(720, B, A), (721, A, B)] {
        let (mut world, mut image) = with_image(seed);
        if restored == A {
            // Its own image, of the same moment: take it from the same history played again.
            let mut again = World::pair(seed);
            (0..4).for_each(|extent| again.write_done(A, extent * 1024, 8, 1));
            again.run_for(ms(15_000));
            image = again.machine(A).disk.clone();
            image.power_cut(seed);
        }
        // What was heard of each other is durable after a while.
        world.run_for(ms(90_000));
        world.write_done(A, 3 * 1024 + 50, 1, 4);
        world.run_for(ms(15_000));
        world.power_cut(A);
        world.power_cut(B);
        world.machine(restored).disk = image;
        world.start(restored);
        world.start(other);
        world.until("the image is refused", |world| is_refused(world, restored));
        // Through whichever of the two it is served.
        world.until_serving(A);
        assert_eq!((world.read_value(A, 1026), world.read_value(A, 1024)), (2, 1));
        assert_eq!(world.spec.record.in_sync, BTreeSet::from([other]));
    }
}

#[test]
fn an_image_of_an_earlier_generation_is_stale_like_any_replica_that_was_away() {
    let mut world = World::pair(730);
    world.write_done(A, 0, 8, 1);
    world.run_for(ms(15_000));
    let mut image = world.machine(B).disk.clone();
    image.power_cut(1);
    world.kill(B);
    world.write_done(A, 0, 8, 2);
    world.start(B);
    world.until_healthy();
    world.run_for(ms(15_000));
    world.power_cut(B);
    world.machine(B).disk = image;
    world.start(B);
    world.until("the image is refused", |world| is_refused(world, B));
    world.kill(B);
    take(&mut world.machine(B).disk, B);
    world.start(B);
    world.until_healthy();
    world.same(&[A, B]);
}

#[test]
fn a_disk_made_anew_is_no_image() {
    let mut world = World::pair(740);
    world.write_done(A, 0, 8, 1);
    world.run_for(ms(15_000));
    world.kill(B);
    world.write_done(A, 9, 1, 2);
    world.format(B);
    world.start(B);
    world.order(B, Order::Group(world.spec.clone()));
    world.until_healthy();
    world.same(&[A, B]);
}
