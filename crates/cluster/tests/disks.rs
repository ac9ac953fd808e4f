//! Disks of pools in the control plane: commands go to the node's own data plane and are answered once; what is wrong with a disk is told.

#![allow(clippy::unwrap_used)]

mod world;

use pollux_base::order::{DiskCommand, Report};
use pollux_base::pool::{DiskReport, DiskState, PoolReport, VerifyReport};
use pollux_base::{DiskId, Order};
use pollux_cluster::entry::Subject;
use pollux_cluster::{Answer, Input, Refusal};
use std::time::Duration;
use world::{A, World};

const DISK: DiskId = DiskId(0xd15c);

fn disk(state: DiskState) -> DiskReport {
    DiskReport {
        disk: DISK,
        path: "/dev/x".into(),
        state,
        size_bytes: 1 << 40,
        capacity_bytes: 1 << 40,
        used_bytes: 0,
        extents: 0,
        checksum_errors: 0,
        io_errors: 0,
        reason: None,
    }
}

fn say(world: &mut World, disks: Vec<DiskReport>) {
    let pool = PoolReport { size_bytes: 1 << 40, free_bytes: 1 << 40, disks, ..PoolReport::default() };
    world.give(A, Input::Data(Some(Report::Pool(pool))));
    world.run(Duration::from_secs(3));
}

fn events(world: &World, part: &str) -> usize {
    world.state(A).events_of(&[Subject::Node(A)]).filter(|event| event.text.contains(part)).count()
}

fn alerts(world: &World, part: &str) -> Vec<String> {
    let alerts = world.core(A).alerts().into_iter().filter(|alert| alert.text.contains(part));
    alerts.map(|alert| alert.fix.unwrap_or_default()).collect()
}

fn command(world: &mut World, request: u64, command: DiskCommand, accepts_loss: bool) {
    world.give(A, Input::Disk { request, command, accepts_loss });
}

fn ordered(world: &World) -> Vec<u64> {
    let orders = world.orders.iter().filter(|(to, _)| *to == A);
    orders.filter_map(|(_, order)| if let Order::Disk { id, .. } = order { Some(*id) } else { None }).collect()
}

#[test]
fn a_command_is_answered_once_and_what_was_done_is_an_event() {
    let mut world = World::with_vm(true, true, A);
    say(&mut world, vec![disk(DiskState::Healthy)]);
    let add = DiskCommand::Add { path: "/dev/y".into(), may_overwrite: false };
    command(&mut world, 9001, add.clone(), false);
    assert_eq!((ordered(&world), world.answers.get(&9001)), (vec![9001], None));
    world.give(A, Input::Data(Some(Report::DiskChanged { id: 9001, result: Ok(()) })));
    assert_eq!(world.answers.remove(&9001), Some(Ok(Answer::Done)));
    world.give(A, Input::Data(Some(Report::DiskChanged { id: 9001, result: Ok(()) })));
    assert_eq!(world.answers.get(&9001), None, "once");
    world.run(Duration::from_secs(5));
    assert_eq!(events(&world, "/dev/y joined the pool"), 1);
    command(&mut world, 9002, DiskCommand::Drain { disk: DISK }, false);
    let result = Err("it is the only disk that is left to the pool".to_owned());
    world.give(A, Input::Data(Some(Report::DiskChanged { id: 9002, result })));
    assert!(matches!(world.answers.remove(&9002), Some(Err(Refusal::Conflict(text))) if text.contains("only disk")));
    world.run(Duration::from_secs(5));
    assert_eq!(events(&world, "drained"), 0, "it was refused");
    // The same again is another event, and a data plane that dies is no answer.
    command(&mut world, 9003, add.clone(), false);
    world.give(A, Input::Data(Some(Report::DiskChanged { id: 9003, result: Ok(()) })));
    world.run(Duration::from_secs(5));
    assert_eq!(events(&world, "/dev/y joined the pool"), 2);
    command(&mut world, 9004, add.clone(), false);
    world.give(A, Input::Data(None));
    assert!(matches!(world.answers.remove(&9004), Some(Err(Refusal::Conflict(text))) if text.contains("restarted")));
    command(&mut world, 9005, add, false);
    assert!(matches!(world.answers.remove(&9005), Some(Err(Refusal::Conflict(text))) if text.contains("does not run")));
}

#[test]
fn a_missing_disk_is_not_let_go_while_only_this_node_has_the_data() {
    let mut world = World::with_vm(true, true, A);
    command(&mut world, 9001, DiskCommand::LetGo { disk: DISK }, false);
    assert_eq!(ordered(&world), [9001], "the other replica has all of it");
    // The other node is lost, and the group goes on without it.
    world.crash(world::other(A));
    world.run_until("the group is alone", |world| {
        world.state(A).groups.values().all(|group| group.record.in_sync.iter().all(|node| *node == A))
    });
    command(&mut world, 9002, DiskCommand::LetGo { disk: DISK }, false);
    let refusal = world.answers.remove(&9002);
    assert!(matches!(&refusal, Some(Err(Refusal::Unsafe(text))) if text.contains("would be lost")), "{refusal:?}");
    command(&mut world, 9003, DiskCommand::LetGo { disk: DISK }, true);
    assert_eq!(ordered(&world), [9001, 9003], "a human has accepted the loss");
}

#[test]
fn a_disk_that_failed_is_missing_or_makes_errors_is_told_with_what_mends_it() {
    let mut world = World::with_vm(true, true, A);
    say(&mut world, vec![disk(DiskState::Healthy)]);
    assert!(alerts(&world, "disk").is_empty());
    for (state, word, fix) in [
        (DiskState::Failed, "failed", "pollux pool remove-disk a 0000000000000000000000000000d15c"),
        (DiskState::Missing, "is missing", "--lost"),
    ] {
        for _ in 0..2 {
            say(&mut world, vec![disk(state)]);
        }
        assert_eq!(events(&world, word), 1, "told once");
        let alerts = alerts(&world, word);
        assert!(alerts.len() == 1 && alerts[0].contains(fix), "{alerts:?}");
    }
    say(&mut world, vec![DiskReport { checksum_errors: 3, io_errors: 2, ..disk(DiskState::Healthy) }]);
    assert_eq!(alerts(&world, "3 blocks did not match their checksums, 2 reads failed").len(), 1);
    let stalled = DiskReport { reason: Some("no room".into()), ..disk(DiskState::Draining) };
    say(&mut world, vec![stalled]);
    assert_eq!(alerts(&world, "can not be drained further: no room").len(), 1);
    say(&mut world, vec![disk(DiskState::Healthy)]);
    assert!(alerts(&world, "disk").is_empty());
}

#[test]
fn a_verification_is_told_of_by_its_number_and_forgotten_with_the_data_plane() {
    let mut world = World::with_vm(true, true, A);
    let report = |id, is_done| Report::Verified(Box::new(VerifyReport { id, is_done, ..VerifyReport::default() }));
    world.give(A, Input::Verify { request: 70 });
    assert_eq!(world.answers.get(&70), Some(&Ok(Answer::Created { id: 70 })));
    assert!(world.orders.contains(&(A, Order::Verify { id: 70 })));
    world.give(A, Input::Data(Some(report(69, true))));
    assert!(!world.core(A).verified().unwrap().is_done, "an earlier run");
    world.give(A, Input::Data(Some(report(70, true))));
    assert!(world.core(A).verified().unwrap().is_done);
    world.give(A, Input::Data(None));
    assert_eq!(world.core(A).verified(), None);
    world.give(A, Input::Verify { request: 71 });
    assert!(matches!(world.answers.get(&71), Some(Err(Refusal::Conflict(text))) if text.contains("does not run")));
}
