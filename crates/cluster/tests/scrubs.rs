//! Scrubs as the control plane decides them: ordered once for each wish, made by themselves when due, and what is found told once.

#![allow(clippy::unwrap_used)]

mod world;

use pollux_base::order::{Finding, FindingKind, FoundBy, ReplicaState, Report, ScrubReport};
use pollux_base::unit::BlockRange;
use pollux_base::{BlockCount, BlockIndex, GroupId, NodeId, Order};
use pollux_cluster::entry::{Change, Subject};
use pollux_cluster::scrubs::SCRUB_EVERY_DAYS;
use pollux_cluster::{Answer, Input};
use std::time::Duration;
use world::{A, B, World};

const DAY: Duration = Duration::from_secs(24 * 3600);

fn the_group(world: &World) -> GroupId {
    *world.state(A).groups.keys().next().unwrap()
}

fn scrubs_ordered(world: &World, node: NodeId) -> Vec<u64> {
    let orders = world.orders.iter().filter(|(to, _)| *to == node);
    orders.filter_map(|(_, order)| if let Order::Scrub { scrub, .. } = order { Some(*scrub) } else { None }).collect()
}

/// The data plane of the node says how its scrub stands and what it has found.
fn say(world: &mut World, node: NodeId, scrub: Option<ScrubReport>, findings: Vec<Finding>) {
    let group = the_group(world);
    let mut report = world.core(node).group_reports().find(|report| report.group == group).unwrap().clone();
    report.state = ReplicaState::Serving;
    report.scrub = scrub;
    report.findings = findings;
    world.give(node, Input::Data(Some(Report::Group(Box::new(report)))));
    world.run(Duration::from_secs(3));
}

fn done(id: u64, rotten_blocks: u64) -> ScrubReport {
    let replicas = [A, B].into();
    ScrubReport { id, is_done: true, checked_bytes: 1 << 30, replicas, rotten_blocks, ..ScrubReport::default() }
}

fn finding(number: u64, healed: bool) -> Finding {
    let range = BlockRange::new(BlockIndex(7), BlockCount(1));
    let (kind, by) = (FindingKind::Rot, FoundBy::Scrub);
    Finding { number, boot: 5, node: B, volume: pollux_base::VolumeId(1), range, kind, by, healed }
}

fn events(world: &World, part: &str) -> usize {
    let group = the_group(world);
    world.state(A).events_of(&[Subject::Group(group)]).filter(|event| event.text.contains(part)).count()
}

#[test]
fn a_wish_is_ordered_at_the_primary_once_and_its_result_is_kept() {
    let mut world = World::with_vm(true, true, A);
    let group = the_group(&world);
    let Ok(Answer::Created { id }) = world.ask(B, Change::ScrubGroup { group, expect: None }) else {
        panic!("asked for at any node")
    };
    world.run(Duration::from_secs(3));
    assert_eq!((scrubs_ordered(&world, A), scrubs_ordered(&world, B)), (vec![id], vec![]));
    // The same wish while it runs is no second scrub.
    assert_eq!(world.ask(A, Change::ScrubGroup { group, expect: None }), Ok(Answer::Created { id }));
    // A result of an earlier scrub says nothing of this one.
    say(&mut world, A, Some(done(id - 1, 9)), vec![]);
    assert!(world.state(A).groups[&group].scrubs.is_wanted());
    say(&mut world, A, Some(done(id, 0)), vec![]);
    for node in [A, B] {
        let scrubs = &world.state(node).groups[&group].scrubs;
        assert_eq!(scrubs.last.as_ref().map(|last| last.report.id), Some(id));
        assert!(!scrubs.is_wanted());
    }
    assert_eq!(events(&world, "all is well"), 1);
    // It outlives noded, and is not made again.
    world.stop_noded(A);
    world.start_noded(A);
    world.run(Duration::from_secs(5));
    assert_eq!(scrubs_ordered(&world, A), [id]);
}

#[test]
fn a_scrub_that_is_due_is_made_and_one_that_nobody_wants_is_not() {
    let mut world = World::with_vm(true, true, A);
    let group = the_group(&world);
    world.jump(DAY * SCRUB_EVERY_DAYS - Duration::from_secs(3600));
    assert!(scrubs_ordered(&world, A).is_empty(), "not before its time");
    world.jump(Duration::from_secs(3700));
    let ordered = scrubs_ordered(&world, A);
    assert_eq!(ordered.len(), 1);
    say(&mut world, A, Some(done(ordered[0], 0)), vec![]);
    world.jump(DAY);
    assert_eq!(scrubs_ordered(&world, A).len(), 1, "the next is due a week after the last");
    assert_eq!(world.ask(A, Change::ScrubEvery { group, days: 0 }), Ok(Answer::Done));
    world.jump(DAY * 30);
    assert_eq!(scrubs_ordered(&world, A).len(), 1);
    assert_eq!(world.ask(A, Change::ScrubEvery { group, days: 1 }), Ok(Answer::Done));
    world.run(Duration::from_secs(3));
    assert_eq!(scrubs_ordered(&world, A).len(), 2);
}

#[test]
fn each_finding_is_told_once_whatever_restarts() {
    let mut world = World::with_vm(true, true, A);
    say(&mut world, A, None, vec![finding(10, true), finding(11, false)]);
    say(&mut world, A, None, vec![finding(10, true), finding(11, false)]);
    world.stop_noded(A);
    world.start_noded(A);
    world.run(Duration::from_secs(5));
    say(&mut world, A, None, vec![finding(11, false), finding(12, true)]);
    assert_eq!(events(&world, "healed from a good copy"), 2);
    assert_eq!(events(&world, "no good copy is left"), 1);
    assert_eq!(events(&world, "on `b`, found by a scrub"), 3);
}

#[test]
fn blocks_without_a_good_copy_are_an_alert_until_a_scrub_finds_none() {
    let mut world = World::with_vm(true, true, A);
    let group = the_group(&world);
    for lost_blocks in [2, 0] {
        let Ok(Answer::Created { id }) = world.ask(A, Change::ScrubGroup { group, expect: None }) else { panic!() };
        say(&mut world, A, Some(ScrubReport { lost_blocks, ..done(id, lost_blocks) }), vec![]);
        let told = world.core(A).alerts().iter().any(|alert| alert.text.contains("without a good copy"));
        assert_eq!(told, lost_blocks > 0);
    }
}
