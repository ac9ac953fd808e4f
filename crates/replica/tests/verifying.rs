//! The metadata of a pool in use is verified on order, beside guests, and what is damaged is told with its code.
#![allow(clippy::unwrap_used)]

mod world;

use pollux_base::pool::VerifyReport;
use pollux_base::{DiskError, NodeId, Order, Report};
use pollux_store::faulty_disk::OpClass;
use world::*;

fn verified(world: &World, node: NodeId, id: u64) -> Option<VerifyReport> {
    world.reports.iter().find_map(|(_, from, report)| match report {
        Report::Verified(report) if *from == node && report.id == id && report.is_done => Some((**report).clone()),
        _ => None,
    })
}

fn verify(world: &mut World, node: NodeId, id: u64) -> VerifyReport {
    world.order(node, Order::Verify { id });
    world.until("verified", |world| verified(world, node, id).is_some());
    verified(world, node, id).unwrap()
}

#[test]
fn a_pool_is_verified_beside_guests_and_damage_is_told_with_its_code() {
    let mut world = World::pair(1);
    world.order(B, Order::Verify { id: 1 });
    for round in 0..40 {
        world.write_done(A, round * 100, 8, round + 1);
    }
    world.until("verified", |world| verified(world, B, 1).is_some());
    let clean = verified(&world, B, 1).unwrap();
    assert_eq!((clean.findings, clean.failed, clean.disks, clean.volumes), (vec![], None, 1, 1));
    world.machine(B).disk.rot(100);
    world.machine(B).disk.rot((2 << 20) + 100);
    let damaged = verify(&mut world, B, 2);
    let codes: Vec<&str> = damaged.findings.iter().map(|finding| finding.code.as_str()).collect();
    assert_eq!(codes, ["V001", "V020"]);
    assert!(damaged.findings.iter().all(|finding| !finding.is_error && !finding.fix.is_empty()));
    assert_eq!(verify(&mut world, A, 3).findings, [], "the other node's is as it was");
}

#[test]
fn whoever_asks_while_one_runs_gets_one_from_the_beginning() {
    let mut world = World::pair(2);
    world.write_done(A, 0, 8, 1);
    world.order(A, Order::Verify { id: 1 });
    world.order(A, Order::Verify { id: 2 });
    world.until("verified", |world| verified(world, A, 2).is_some());
    assert_eq!(verified(&world, A, 1), None, "it was given up for the second");
    assert_eq!(verified(&world, A, 2).unwrap().findings, []);
}

#[test]
fn of_a_pool_that_is_out_of_use_nothing_is_verified() {
    let mut world = World::pair(3);
    world.machine(B).disk.fail_next(OpClass::Write, DiskError::Io("medium error".to_string(), 5));
    world.write(A, 0, 1, 1);
    world.until("the pool has failed", |world| {
        world.reports.iter().any(|(_, node, report)| *node == B && matches!(report, Report::PoolFailed { .. }))
    });
    let report = verify(&mut world, B, 1);
    assert!(report.failed.is_some_and(|reason| reason.contains("out of use")));
}
