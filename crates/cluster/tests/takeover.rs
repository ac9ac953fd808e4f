//! Takeover and return, with two cores, two guards and everything around them in virtual time.

mod world;

use pollux_base::{Generation, Stamp};
use pollux_cluster::entry::{Change, Holder};
use std::time::Duration;
use world::{A, B, GIB, World, other};

#[test]
fn the_guest_of_a_dead_node_restarts_within_five_seconds_with_a_power_switch() {
    let mut world = World::with_vm(true, true, A);
    world.crash(A);
    world.run_until("web1 on b", |world| world.runs_on("web1") == Some(B));
    let (at, node, incarnation) = *world.starts.last().expect("a start");
    println!("{}", world.trace.join("\n"));
    assert!(at < Duration::from_secs(5) && node == B && incarnation.0 == 2, "{at:?}");
    assert_eq!(world.servers[&B].fenced, [A], "what is switched off serves nothing");
}

#[test]
fn without_a_power_switch_it_restarts_within_fifteen_seconds_and_not_before_the_guards_bound() {
    let mut world = World::with_vm(true, false, A);
    world.crash(A);
    world.run_until("web1 on b", |world| world.runs_on("web1") == Some(B));
    let (at, ..) = *world.starts.last().expect("a start");
    assert!(at < Duration::from_secs(15) && at > pollux_base::timing::GUARD_LEASE, "{at:?}");
    assert!(world.servers[&B].fenced.is_empty(), "its guests are dead; its data plane may live and serve others");
}

#[test]
fn a_dead_node_that_returns_is_taken_in_and_the_other_may_die_next() {
    for first in [A, B] {
        let mut world = World::with_vm(true, true, first);
        world.crash(first);
        world.run_until("it moves", |world| world.runs_on("web1") == Some(other(first)));
        world.run(Duration::from_secs(3));
        world.boot(first);
        world.run_until("both again", World::is_settled);
        println!("{}", world.trace.join("\n"));
        assert_eq!(world.runs_on("web1"), Some(other(first)), "it stays where it runs");
        world.crash(other(first));
        world.run_until("it moves back", |world| world.runs_on("web1") == Some(first));
    }
}

#[test]
fn a_group_whose_birth_nobody_confirmed_waits_for_its_node_and_is_not_taken_over() {
    let mut world = World::formed(true, true);
    world.births_hang = true;
    world.create_vm("web1", GIB, B);
    world.crash(B);
    world.run_until("a goes on alone", |world| world.state(A).authority.holder == Holder::Alone { node: A });
    world.run(Duration::from_secs(5));
    let record = |world: &World| world.state(A).groups.values().next().expect("it was created").record.clone();
    assert_eq!((record(&world).stamp.generation, record(&world).in_sync), (Generation(1), [A, B].into()));
    world.births_hang = false;
    world.boot(B);
    world.run_until("together again", World::is_settled);
    world.start_vm("web1");
    world.run_until("web1 runs", |world| world.runs_on("web1").is_some());
    assert_eq!(record(&world).in_sync, [A, B].into());
}

/// Found by the simulator: a replica that had just lost a disk went on alone, and what only the other node had was given up.
#[test]
fn a_replica_that_lost_a_disk_waits_for_the_other_node_or_for_a_human() {
    let record = |world: &World, node| world.state(node).groups.values().next().expect("it was created").record.clone();
    for primary in [A, B] {
        let mut world = World::formed(true, true);
        world.incomplete.insert(A);
        world.create_vm("web1", GIB, primary);
        world.run(Duration::from_secs(2));
        let before = record(&world, A);
        world.crash(B);
        world.run_until("a goes on alone", |world| world.state(A).authority.holder == Holder::Alone { node: A });
        world.run(Duration::from_secs(5));
        assert_eq!(record(&world, A), before, "b has what a lost");
        let alerts = world.core(A).alerts();
        let told =
            alerts.iter().find(|alert| alert.text.contains("which has them, is lost")).expect("an alert says so");
        assert!(told.fix.as_ref().is_some_and(|fix| fix.ends_with("pollux group promote web1")), "{told:?}");
        let group = *world.state(A).groups.keys().next().expect("it was created");
        let token = |world: &World| world.core(A).promote_token(group).expect("a human can decide");
        let promote = |token: String| Change::PromoteReplica { group, node: A, at: Stamp::default(), token };
        assert!(world.ask(A, promote("yes".into())).is_err(), "who does not know what is lost is told");
        let right = promote(token(&world));
        world.ask(A, right).expect("b is off");
        world.run(Duration::from_secs(2));
        assert_eq!((record(&world, A).primary, record(&world, A).in_sync), (A, [A].into()));
    }
}

/// Whoever was switched off is switched on again, until all is well.
fn come_together(world: &mut World) {
    for _ in 0..4 {
        for node in [A, B] {
            if !world.is_powered(node) {
                world.boot(node);
            }
        }
        world.run(Duration::from_secs(8));
    }
    world.run_until("together again", World::is_settled);
}

#[test]
fn a_crash_before_any_step_of_a_takeover_is_harmless() {
    // The survivor dies before its k-th output of weight, and both are switched on again: whoever has the authority, the
    // cluster comes together and the VM runs, once.
    for has_power in [true, false] {
        for step in 0.. {
            let mut world = World::with_vm(true, has_power, A);
            world.crash(A);
            world.crash_after = Some((B, step));
            world.run(Duration::from_secs(12));
            if world.crashed_at.is_none() {
                assert!(step > 8, "the takeover has steps");
                break;
            }
            world.boot(B);
            world.run(Duration::from_secs(step as u64 % 4));
            world.boot(A);
            come_together(&mut world);
            assert!(world.runs_on("web1").is_some());
        }
    }
}

#[test]
fn a_survivor_that_dies_at_any_step_and_returns_alone_goes_on_alone() {
    for step in 0.. {
        let mut world = World::with_vm(true, false, A);
        world.crash(A);
        world.crash_after = Some((B, step));
        world.run(Duration::from_secs(12));
        let Some(at) = world.crashed_at.clone() else {
            break;
        };
        world.boot(B);
        world.run_until("web1 on b", |world| world.runs_on("web1") == Some(B));
        println!("{step}: crashed before: {at}");
    }
}

#[test]
fn a_crash_of_either_node_at_any_step_of_the_return_is_harmless() {
    for victim in [A, B] {
        for alone in [false, true] {
            for step in 0.. {
                let mut world = World::with_vm(true, true, A);
                world.crash(A);
                world.run_until("it moves", |world| world.runs_on("web1") == Some(B));
                world.run(Duration::from_secs(3));
                world.crash_after = Some((victim, step));
                world.boot(A);
                world.run(Duration::from_secs(20));
                if world.crashed_at.is_none() {
                    break;
                }
                if alone {
                    // The other one goes on without it for a while (or can not: then it waits).
                    world.run(Duration::from_secs(20));
                }
                come_together(&mut world);
                assert!(world.runs_on("web1").is_some());
            }
        }
    }
}

#[test]
fn of_two_nodes_that_are_cut_apart_exactly_one_goes_on_and_usually_the_one_with_the_guests() {
    for has_power in [true, false] {
        for home in [A, B] {
            let mut world = World::with_vm(true, has_power, home);
            world.cut = true;
            world.run(Duration::from_secs(15));
            assert_eq!(world.runs_on("web1"), Some(home), "it need not move\n{}", world.trace.join("\n"));
            assert_eq!(world.register.alone, Some(home));
            assert!(world.starts.is_empty());
            world.cut = false;
            if !world.is_powered(other(home)) {
                world.boot(other(home));
            }
            world.run_until("together again", World::is_settled);
        }
    }
}

#[test]
fn the_side_that_can_not_reach_the_witness_loses_its_guests_at_the_end_of_its_lease() {
    for has_power in [true, false] {
        let mut world = World::with_vm(true, has_power, A);
        // The power switch is beyond the cut, too.
        world.server_mut(A).power_switch_fails = true;
        world.cut = true;
        world.witness_cut.insert(A);
        world.run_until("web1 on b", |world| world.runs_on("web1") == Some(B));
        println!("{}", world.trace.join("\n"));
        world.cut = false;
        world.witness_cut.clear();
        world.run_until("together again", World::is_settled);
        assert_eq!(world.runs_on("web1"), Some(B));
    }
}

#[test]
fn nobody_goes_on_without_a_grant() {
    let mut world = World::with_vm(true, true, A);
    world.witness_cut = [A, B].into();
    world.cut = true;
    world.run(Duration::from_secs(20));
    assert_eq!(world.runs_on("web1"), None, "the guests of both sides end with their leases");
    assert!(world.trace.iter().all(|line| !line.contains("forces") && !line.contains("switches")));
    world.cut = false;
    world.run_until("web1 runs again", |world| world.runs_on("web1") == Some(A));
    world.run(Duration::from_secs(3));
    world.witness_cut.clear();
    world.run_until("together", World::is_settled);
}

#[test]
fn a_witness_that_comes_back_late_still_gives_the_grant() {
    let mut world = World::with_vm(true, true, A);
    world.witness_cut.insert(B);
    world.crash(A);
    world.run(Duration::from_secs(40));
    assert_eq!(world.runs_on("web1"), None);
    world.witness_cut.clear();
    world.run_until("web1 on b", |world| world.runs_on("web1") == Some(B));
}

#[test]
fn losing_the_witness_while_both_are_well_changes_nothing_but_the_headline() {
    let mut world = World::with_vm(true, true, A);
    world.witness_cut = [A, B].into();
    world.run(Duration::from_secs(50));
    assert_eq!(world.trace, Vec::<String>::new());
    let headline = world.core(A).headline();
    assert!(headline.text.starts_with("unprotected: witness not reachable since 14:00 UTC"), "{}", headline.text);
    assert_eq!(headline.fix.as_deref(), Some("pollux witness test"));
}

#[test]
fn a_restart_of_noded_is_not_a_death() {
    for victim in [A, B] {
        let mut world = World::with_vm(true, true, A);
        world.stop_noded(victim);
        world.run(Duration::from_secs(30));
        assert_eq!(world.runs_on("web1"), Some(A), "the guest goes on");
        assert!(world.trace.iter().all(|line| !line.contains("witness")), "{:?}", world.trace);
        world.start_noded(victim);
        world.run_until("settled", World::is_settled);
        assert!(world.starts.is_empty() && world.runs_on("web1") == Some(A), "it was found again, not started");
    }
}

#[test]
fn losing_the_control_connection_is_an_alert_and_no_more() {
    let mut world = World::with_vm(true, true, A);
    world.control_cut = true;
    world.give(B, pollux_cluster::Input::PeerGone(A));
    world.run(Duration::from_secs(30));
    assert_eq!(world.runs_on("web1"), Some(A));
    assert_eq!(world.register.alone, None);
    let alerts = world.core(B).alerts();
    assert!(
        alerts.iter().any(|alert| alert.text == "noded of `a` is not reached, though the node lives"),
        "{alerts:?}"
    );
}

#[test]
fn a_survivor_that_reboots_goes_on_alone_by_its_own_record() {
    for witness_is_there in [true, false] {
        let mut world = World::with_vm(true, true, A);
        world.crash(A);
        world.run_until("web1 on b", |world| world.runs_on("web1") == Some(B));
        world.run(Duration::from_secs(2));
        world.crash(B);
        if !witness_is_there {
            world.witness_cut.insert(B);
        }
        world.run(Duration::from_secs(5));
        world.forget();
        world.boot(B);
        world.run_until("web1 on b again", |world| world.runs_on("web1") == Some(B));
        assert_eq!(world.starts.last().map(|start| start.2.0), Some(3), "under the next incarnation");
    }
}

#[test]
fn a_stale_node_that_returns_alone_refuses_and_says_who_has_newer_data() {
    let mut world = World::with_vm(true, true, A);
    world.crash(A);
    world.run_until("web1 on b", |world| world.runs_on("web1") == Some(B));
    world.crash(B);
    world.boot(A);
    world.run(Duration::from_secs(30));
    assert_eq!(world.runs_on("web1"), None);
    let headline = world.core(A).headline();
    assert!(headline.text.contains("outdated: the witness gave `b` epoch 2"), "{}", headline.text);
    let (vm, _) = world.state(A).vm_named("web1").expect("known");
    let wanted = pollux_cluster::entry::Wanted::Running;
    let refusal = world.ask(A, pollux_cluster::Change::WantVm { vm, wanted }).expect_err("refused");
    assert!(matches!(refusal, pollux_cluster::Refusal::NoQuorum(_)), "{refusal}");
    world.boot(B);
    world.run_until("together again", World::is_settled);
}

#[test]
fn both_lose_power_and_one_returns_the_witness_decides_after_the_wait() {
    let mut world = World::with_vm(true, false, A);
    world.crash(A);
    world.crash(B);
    world.run(Duration::from_secs(5));
    world.forget();
    world.boot(B);
    world.run_until("web1 on b", |world| world.runs_on("web1") == Some(B));
    let at = world.starts.last().expect("a start").0;
    assert!(at >= pollux_base::timing::BOOT_WAIT, "a freshly booted node has no right to fence: {at:?}");
    world.boot(A);
    world.run_until("together again", World::is_settled);
}

#[test]
fn both_lose_power_and_both_return_their_vms_run_again_without_any_grant() {
    let mut world = World::with_vm(true, true, A);
    world.crash(A);
    world.crash(B);
    world.run(Duration::from_secs(5));
    world.boot(B);
    world.run(Duration::from_secs(4));
    world.boot(A);
    world.run_until("running again", World::is_settled);
    assert_eq!((world.runs_on("web1"), world.register.epoch.0), (Some(A), 1));
}

#[test]
fn a_power_switch_that_fails_leaves_the_guards_bound() {
    let mut world = World::with_vm(true, true, A);
    world.server_mut(A).power_switch_fails = true;
    world.crash(A);
    world.run_until("web1 on b", |world| world.runs_on("web1") == Some(B));
    let at = world.starts.last().expect("a start").0;
    assert!(at > Duration::from_secs(5) && at < Duration::from_secs(15), "{at:?}");
}

#[test]
fn a_human_with_the_right_token_stands_in_for_a_witness_that_is_not_there() {
    use pollux_cluster::{Input, Refusal};
    for with_witness in [true, false] {
        let mut world = World::with_vm(with_witness, false, A);
        world.witness_cut.insert(B);
        world.crash(A);
        world.run(Duration::from_secs(10));
        let token = world.core(B).confirm_token(A).expect("a token");
        assert_eq!(token, "a-is-down.epoch-1.vms-1.lost-groups-0");
        world.give(B, Input::ConfirmDown { request: 900, node: A, token: "yes".into() });
        let refusal = world.answers[&900].clone().expect_err("wrong token");
        assert!(matches!(&refusal, Refusal::Unsafe(text) if text.contains(&token)), "{refusal}");
        world.give(B, Input::ConfirmDown { request: 901, node: A, token });
        assert!(world.answers[&901].is_ok());
        world.run_until("web1 on b", |world| world.runs_on("web1") == Some(B));
        world.witness_cut.clear();
        world.boot(A);
        world.run_until("together again", World::is_settled);
    }
}

#[test]
fn no_human_overrules_a_witness_that_can_be_asked_or_a_peer_that_is_heard() {
    use pollux_cluster::{Input, Refusal};
    let mut world = World::with_vm(true, false, A);
    let token = world.core(B).confirm_token(A).expect("a token");
    world.give(B, Input::ConfirmDown { request: 900, node: A, token });
    assert!(matches!(world.answers[&900], Err(Refusal::Conflict(_))));
    world.crash(A);
    world.run_until("web1 on b", |world| world.runs_on("web1") == Some(B));
    world.crash(B);
    world.boot(A);
    world.run(Duration::from_secs(15));
    let token = world.core(A).confirm_token(B).expect("a token");
    world.give(A, Input::ConfirmDown { request: 901, node: B, token });
    assert!(matches!(world.answers[&901], Err(Refusal::Unsafe(_))), "outdated data do not come back to life");
}

#[test]
fn a_node_that_lost_all_it_knew_is_taken_in_like_a_stale_one() {
    for while_it_was_missed in [true, false] {
        let mut world = World::with_vm(true, true, A);
        if while_it_was_missed {
            world.crash(B);
            world.run(Duration::from_secs(10));
            world.wipe(B);
            world.boot(B);
        } else {
            // Only its noded: the guard never fell silent, so nothing but its own word says that its log is gone.
            world.stop_noded(B);
            world.wipe(B);
            world.start_noded(B);
        }
        world.run_until("it has begun to join", |world| world.register.epoch.0 > 1);
        for _ in 0..3 {
            world.run(Duration::from_secs(8));
            if !world.is_powered(B) {
                world.boot(B);
            }
        }
        world.run_until("together again", World::is_settled);
        assert_eq!(world.runs_on("web1"), Some(A));
    }
}

#[test]
fn a_grant_that_was_won_when_the_peer_came_back_is_not_used_and_is_taken_back() {
    let mut world = World::with_vm(true, true, A);
    world.cut = true;
    world.run_until("a asks", |world| world.register.epoch.0 == 2);
    // The answer is on its way; the links are whole again before it arrives, and the guards have heard each other.
    world.hold_witness_answers = true;
    world.cut = false;
    world.run(Duration::from_millis(600));
    world.hold_witness_answers = false;
    world.run_until("the register is right again", World::is_settled);
    assert!(world.trace.iter().all(|line| !line.contains("forces")), "{}", world.trace.join("\n"));
    assert_eq!((world.runs_on("web1"), world.register.epoch.0), (Some(A), 3));
}
