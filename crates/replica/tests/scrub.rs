//! Scrubs: rot and differences are found on every replica, mended from the good side, and told (verdict 15).
#![allow(clippy::unwrap_used)]

mod world;

use pollux_base::order::{Finding, FindingKind, FoundBy, ScrubReport};
use pollux_base::{NodeId, Op, Order};
use pollux_replica::wire::Message;
use std::collections::BTreeSet;
use std::time::Duration;
use world::*;

/// Three extents of which the second is written in part, cold: checksums are on the disks.
fn written(seed: u64, nodes: &[NodeId]) -> World {
    let mut world = World::new(seed, nodes);
    world.until_serving(A);
    world.write_done(A, 0, 600, 11);
    world.write_done(A, 1024 + 500, 100, 12);
    world.write_done(A, 2 * 1024, 1024, 13);
    world.run_for(ms(15_000));
    world
}

/// Orders a scrub and waits for its end.
fn scrubbed(world: &mut World, id: u64) -> ScrubReport {
    world.order(A, Order::Scrub { group: GROUP, scrub: id });
    world.until("scrubbed", |world| report(world).is_some_and(|report| report.id == id && report.is_done));
    report(world).unwrap()
}

fn report(world: &World) -> Option<ScrubReport> {
    world.machines[&A].report.as_ref()?.scrub.clone()
}

fn findings(world: &World) -> Vec<Finding> {
    world.machines[&A].report.as_ref().map(|report| report.findings.clone()).unwrap_or_default()
}

/// Where on the node's disk the n-th page lies that holds `value`.
fn page_of(world: &World, node: NodeId, value: u64, nth: usize) -> u64 {
    let expected = blocks(value, 1);
    let pages = world.machines[&node].disk.blocks().filter(|(_, bytes)| *bytes == expected.as_slice());
    pages.map(|(page, _)| page).nth(nth).unwrap()
}

fn rot(world: &mut World, node: NodeId, value: u64, nth: usize) {
    let page = page_of(world, node, value, nth);
    world.machine(node).disk.rot(page * 4096 + 9);
}

#[test]
fn a_scrub_of_good_replicas_reads_everything_stored_and_finds_nothing() {
    let mut world = written(1, &[A, B]);
    world.wire_bytes = 0;
    let report = scrubbed(&mut world, 7);
    let stored = (600 + 100 + 1024) * 4096;
    assert_eq!(report.checked_bytes, 2 * stored, "what is stored, on both, and no more");
    assert_eq!(report.replicas, BTreeSet::from([A, B]));
    assert_eq!((report.rotten_blocks, report.differing_blocks, report.lost_blocks), (0, 0, 0));
    assert_eq!(findings(&world), []);
    assert!(world.wire_bytes <= 3 * (4 << 20) / 400, "checksums travel, data does not: {} B", world.wire_bytes);
    // The same order again is the same wish.
    world.messages.clear();
    world.order(A, Order::Scrub { group: GROUP, scrub: 7 });
    world.run_for(ms(2000));
    assert!(!world.messages.iter().any(|message| message.contains("verify")));
}

#[test]
fn rot_on_either_side_is_found_mended_from_the_other_and_told() {
    for node in [A, B] {
        let mut world = written(2, &[A, B]);
        rot(&mut world, node, 11, 5);
        rot(&mut world, node, 13, 1000);
        let report = scrubbed(&mut world, 1);
        assert_eq!((report.rotten_blocks, report.differing_blocks), (2, 0));
        assert_eq!((report.healed_blocks, report.lost_blocks), (2, 0));
        let found = findings(&world);
        assert_eq!(found.len(), 2);
        for finding in found {
            assert_eq!((finding.node, finding.volume, finding.range.count.0), (node, VOLUME, 1));
            assert_eq!((finding.kind, finding.by, finding.healed), (FindingKind::Rot, FoundBy::Scrub, true));
        }
        // Mended on the disk: a second scrub finds nothing, and the bytes are right.
        assert_eq!(scrubbed(&mut world, 2).rotten_blocks, 0);
        for node in [A, B] {
            let contents = world.contents(node);
            assert!(contents[..600].iter().all(|value| *value == 11) && contents[2048..3072].iter().all(|v| *v == 13));
        }
    }
}

#[test]
fn rot_on_both_sides_at_the_same_block_is_said_so_and_never_hidden() {
    let mut world = written(3, &[A, B]);
    // The first page with this value is the same block on both: they were written in order.
    rot(&mut world, A, 12, 0);
    rot(&mut world, B, 12, 0);
    let report = scrubbed(&mut world, 1);
    assert_eq!((report.rotten_blocks, report.healed_blocks, report.lost_blocks), (2, 0, 2));
    let sides: BTreeSet<NodeId> = findings(&world).iter().filter(|finding| !finding.healed).map(|f| f.node).collect();
    assert_eq!(sides, BTreeSet::from([A, B]));
    let id = world.request(A, Op::Read { range: range(1524, 1) });
    world.until("answered", |world| world.answer(id).is_some());
    assert_eq!(world.answer(id), Some(&pollux_base::Reply::Failed(pollux_base::BlockError::Unreadable)));
    // Written anew it is well again.
    world.write_done(A, 1524, 1, 99);
    world.run_for(ms(15_000));
    assert_eq!(scrubbed(&mut world, 2).lost_blocks, 0);
}

#[test]
fn rot_on_two_of_three_replicas_is_mended_from_the_third() {
    let mut world = written(4, &[A, B, C]);
    for node in [A, B] {
        rot(&mut world, node, 11, 0);
    }
    let report = scrubbed(&mut world, 1);
    assert_eq!((report.rotten_blocks, report.healed_blocks, report.lost_blocks), (2, 2, 0));
    let expected = world.contents(C);
    assert_eq!((world.contents(A), world.contents(B)), (expected.clone(), expected));
}

#[test]
fn a_lost_write_is_found_though_the_disk_said_that_it_was_made() {
    for node in [A, B] {
        let mut world = written(5, &[A, B]);
        // The disk keeps what it had: an old block under a new checksum.
        let page = page_of(&world, node, 13, 3);
        let old = world.machines[&node].disk.read_now(page * 4096, 4096);
        world.write_done(A, 2 * 1024 + 3, 1, 77);
        world.machine(node).disk.write_now(page * 4096, &old);
        let report = scrubbed(&mut world, 1);
        assert_eq!((report.rotten_blocks, report.healed_blocks), (1, 1));
        assert_eq!(world.contents(node)[2 * 1024 + 3], 77);
    }
}

#[test]
fn a_misdirected_write_is_found_where_it_went_and_where_it_did_not() {
    let mut world = written(6, &[A, B]);
    let (from, to) = (page_of(&world, B, 13, 10), page_of(&world, B, 13, 50));
    let old = world.machines[&B].disk.read_now(from * 4096, 4096);
    world.write_done(A, 2 * 1024 + 10, 1, 77);
    let new = world.machines[&B].disk.read_now(from * 4096, 4096);
    world.machine(B).disk.write_now(from * 4096, &old);
    world.machine(B).disk.write_now(to * 4096, &new);
    let report = scrubbed(&mut world, 1);
    assert_eq!((report.rotten_blocks, report.healed_blocks), (2, 2));
    let contents = world.contents(B);
    assert_eq!((contents[2 * 1024 + 10], contents[2 * 1024 + 50]), (77, 13));
}

#[test]
fn replicas_that_differ_although_both_match_their_checksums_are_made_the_same_and_it_is_told() {
    let mut world = written(7, &[A, B]);
    // A write, a zeroed range and a first write that B never made although it said so.
    let mut drop = true;
    world.lets_through = Box::new(move |_, to, frame| {
        if let (true, Message::Write { group, stamp, sequence, .. } | Message::Zero { group, stamp, sequence, .. }) =
            (drop && to == B, &frame.message)
        {
            let (group, stamp, sequence) = (*group, *stamp, *sequence);
            *frame = pollux_replica::wire::Frame::bare(Message::Flush { group, stamp, sequence });
        }
        drop = drop && !matches!(frame.message, Message::Cool { .. });
        true
    });
    world.write_done(A, 10, 2, 77);
    let id = world.request(A, Op::Zero { range: range(2048, 3), fua: false });
    world.until("zeroed", |world| world.answer(id).is_some());
    world.write_done(A, 4 * 1024 + 7, 1, 78);
    world.run_for(ms(15_000));
    assert_ne!(world.contents(A), world.contents(B));
    let report = scrubbed(&mut world, 1);
    assert_eq!((report.rotten_blocks, report.differing_blocks, report.healed_blocks), (0, 6, 6));
    let found = findings(&world);
    assert!(found.iter().all(|finding| finding.kind == FindingKind::Difference && finding.node == B), "{found:?}");
    assert_eq!(world.contents(A), world.contents(B));
    assert_eq!(world.stored(A), world.stored(B), "what was zeroed takes no space there either");
}

#[test]
fn a_scrub_leaves_guests_alone_and_ends_all_the_same() {
    let mut world = written(8, &[A, B]);
    let latencies = |world: &mut World, count: u64| {
        let mut latencies: Vec<Duration> = (0..count)
            .map(|value| {
                let asked = world.now;
                world.write_done(A, value * 37 % 3000, 1, 100 + value);
                let latency = world.now.since(asked);
                world.run_for(Duration::from_micros(300));
                latency
            })
            .collect();
        latencies.sort_unstable();
        latencies[latencies.len() * 99 / 100]
    };
    world.rate = 100 << 20;
    let alone = latencies(&mut world, 400);
    world.order(A, Order::Scrub { group: GROUP, scrub: 1 });
    let beside = latencies(&mut world, 400);
    assert!(report(&world).is_some_and(|report| report.id == 1), "it has begun");
    assert!(beside <= alone * 2, "{alone:?} alone, {beside:?} beside a scrub");
    for value in 0..100_000 {
        if report(&world).is_some_and(|report| report.is_done) {
            break;
        }
        world.write_done(A, value % 3000, 1, value);
    }
    let report = report(&world).unwrap();
    assert!(report.is_done && report.rotten_blocks + report.differing_blocks == 0, "{report:?}");
}

#[test]
fn a_scrub_that_is_interrupted_goes_on_and_finds_what_there_is() {
    for interruption in 0..14 {
        let mut world = written(20 + interruption, &[A, B]);
        rot(&mut world, A, 13, 500);
        rot(&mut world, B, 13, 700);
        world.messages.clear();
        world.order(A, Order::Scrub { group: GROUP, scrub: 1 });
        let end = world.now + ms(10_000);
        while (world.messages.len() as u64) < interruption * 3 && world.step(end) {}
        match interruption % 3 {
            0 => world.flap(A, B),
            1 => {
                world.kill(B);
                world.run_for(ms(3000));
                world.start(B);
            }
            _ => world.take_over(A, &[A, B]),
        }
        world.until_healthy();
        world.until("scrubbed", |world| report(world).is_some_and(|report| report.is_done));
        // What B missed while it was away was brought by a resync; what rotted is found now or by the next scrub.
        world.run_for(ms(15_000));
        scrubbed(&mut world, 2);
        world.run_for(ms(100));
        assert_eq!(world.contents(A), world.contents(B));
        assert!(world.contents(A)[2048..3072].iter().all(|value| *value == 13), "{interruption}");
        let told: BTreeSet<NodeId> = findings(&world).iter().map(|finding| finding.node).collect();
        assert!(told.contains(&A), "{interruption}: {told:?}");
    }
}

#[test]
fn a_peer_that_answers_a_scrub_with_nonsense_changes_nothing() {
    let mut world = written(9, &[A, B]);
    world.lets_through = Box::new(|_, _, frame| {
        match &mut frame.message {
            Message::Verified { bad, .. } => *bad = vec![range(u64::MAX, 5), range(3, u64::MAX), range(4000, 1)],
            Message::Stored { extents, .. } => {
                extents.push((pollux_base::VolumeId(99), vec![]));
                extents.push((
                    VOLUME,
                    vec![pollux_replica::wire::ExtentRun {
                        start: pollux_base::ExtentIndex(u32::MAX),
                        count: u32::MAX,
                    }],
                ));
            }
            _ => {}
        }
        true
    });
    let report = scrubbed(&mut world, 1);
    assert_eq!((report.rotten_blocks, report.differing_blocks), (0, 0));
}

#[test]
fn rot_that_a_guests_read_meets_is_told_like_that_of_a_scrub() {
    let mut world = written(10, &[A, B]);
    rot(&mut world, A, 11, 5);
    for block in 0..600 {
        assert_eq!(world.read_value(A, block), 11);
    }
    world.until("told", |world| !findings(world).is_empty());
    let found = findings(&world);
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].node, found[0].by, found[0].healed), (A, FoundBy::Read, true));
}

/// Found by the simulator: what two snapshots have from further down was mended for one of them, since a rollback lies between.
#[test]
fn what_snapshots_share_beside_each_other_is_mended_for_each() {
    for node in [A, B] {
        let mut world = written(9, &[A, B]);
        let take = |world: &mut World| {
            let snapshot = world.take_snapshot();
            world.until_taken();
            world.until_serving(A);
            snapshot
        };
        let (base, one) = (take(&mut world), take(&mut world));
        world.roll_back(base);
        world.until_serving(A);
        let two = take(&mut world);
        world.delete_snapshot(base);
        world.run_for(ms(15_000));
        rot(&mut world, node, 11, 5);
        let report = scrubbed(&mut world, 1);
        assert!(report.healed_blocks > 0 && report.lost_blocks == 0, "{report:?}");
        for volume in [VOLUME, one, two] {
            let good = (0..BLOCKS).map(|block| match block {
                0..600 => 11,
                1524..1624 => 12,
                2048..3072 => 13,
                _ => 0,
            });
            let held: Vec<u64> = world.sectors_of(node, volume).iter().map(|sectors| sectors[0]).collect();
            assert_eq!(held, good.collect::<Vec<u64>>(), "{volume} on {node}");
        }
    }
}
