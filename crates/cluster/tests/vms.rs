//! The life of VMs, images and volumes on a healthy pair.

mod world;

use pollux_base::{ByteCount, Generation, NodeId, Report};
use pollux_cluster::entry::{Change, VmPhase, VmSpec, Wanted};
use pollux_cluster::{Answer, Input, Refusal, VmEvent};
use std::time::Duration;
use world::{A, B, GIB, World};

fn vm_spec(name: &str, memory: u64) -> VmSpec {
    VmSpec {
        name: name.into(),
        cpus: 1,
        memory: ByteCount(memory),
        image: None,
        disks: vec![ByteCount(GIB)],
        mac: String::new(),
    }
}

fn want(world: &mut World, vm: &str, wanted: Wanted) -> Result<Answer, Refusal> {
    let (vm, _) = world.state(A).vm_named(vm).expect("the VM exists");
    world.ask(A, Change::WantVm { vm, wanted })
}

fn phase(world: &World, vm: &str) -> VmPhase {
    world.state(world.an_acting_node()).vm_named(vm).expect("the VM exists").1.phase
}

#[test]
fn a_guest_that_shuts_itself_down_stays_down() {
    let mut world = World::with_vm(true, true, A);
    world.shut_down_from_inside(A);
    world.run(Duration::from_secs(20));
    let (_, vm) = world.state(B).vm_named("web1").expect("known");
    assert_eq!((vm.phase, vm.wanted), (VmPhase::Stopped, Wanted::Stopped));
    assert!(world.starts.is_empty());
    world.crash(A);
    world.run(Duration::from_secs(10));
    assert!(world.starts.is_empty(), "nor does a takeover wake it");
}

#[test]
fn a_guest_that_dies_restarts_under_the_next_incarnation_until_it_is_given_up() {
    let mut world = World::with_vm(true, true, A);
    for run in 0..6 {
        world.run_until("web1 runs", |world| phase(world, "web1") == VmPhase::Running);
        assert_eq!(world.starts.len(), run);
        world.crash_guests(A);
        world.run(Duration::from_millis(100));
    }
    assert_eq!(phase(&world, "web1"), VmPhase::Failed, "{}", world.trace.join("\n"));
    world.run(Duration::from_secs(60));
    assert_eq!(world.starts.len(), 5);
    let pauses: Vec<u64> = world.starts.windows(2).map(|pair| (pair[1].0 - pair[0].0).as_secs()).collect();
    assert!(pauses.is_sorted() && pauses[0] >= 1, "the pauses grow: {pauses:?}");
    let vm = world.state(A).vm_named("web1").expect("known").0;
    assert!(world.core(A).alerts().iter().any(|alert| alert.text.contains("given up: ended 6 times within 10 min")));
    want(&mut world, "web1", Wanted::Running).expect("a new chance");
    world.run_until("web1 runs", |world| world.state(A).vms[&vm].phase == VmPhase::Running);
}

#[test]
fn a_stop_is_asked_of_the_guest_and_an_off_is_not() {
    let mut world = World::with_vm(true, true, A);
    want(&mut world, "web1", Wanted::Stopped).expect("wanted");
    world.run_until("stopped", |world| phase(world, "web1") == VmPhase::Stopped);
    assert!(world.trace.iter().any(|line| line.ends_with("shuts vm1 down")));
    world.start_vm("web1");
    world.run_until("running", |world| phase(world, "web1") == VmPhase::Running);
    world.forget();
    want(&mut world, "web1", Wanted::Off).expect("wanted");
    world.run_until("stopped", |world| phase(world, "web1") == VmPhase::Stopped);
    assert!(world.trace.iter().all(|line| !line.ends_with("shuts vm1 down")));
}

#[test]
fn a_guest_that_is_deaf_to_its_power_button_is_ended_after_a_minute() {
    let mut world = World::with_vm(true, true, A);
    world.guests_are_deaf = true;
    want(&mut world, "web1", Wanted::Stopped).expect("wanted");
    world.run(Duration::from_secs(55));
    assert_eq!(phase(&world, "web1"), VmPhase::Stopping);
    world.run(Duration::from_secs(10));
    assert_eq!(phase(&world, "web1"), VmPhase::Stopped);
}

#[test]
fn a_vm_that_does_not_fit_is_refused_with_the_arithmetic() {
    let mut world = World::with_vm(true, true, A);
    world.create_vm("big", 8 * GIB, A);
    let refusal = want(&mut world, "big", Wanted::Running).expect_err("refused");
    let text = "VM `big` can not start: it needs 8 GiB of memory; `a` has 7 GiB free of 8 GiB";
    assert_eq!(refusal, Refusal::Conflict(text.into()));
    let spec = vm_spec("huge", 9 * GIB);
    let refusal = world.ask(A, Change::CreateVm { spec, node: A, keys: Vec::new() }).expect_err("refused");
    assert!(matches!(&refusal, Refusal::Invalid(text) if text.contains("fit on no node")), "{refusal}");
}

#[test]
fn a_vm_for_which_the_survivor_has_no_room_waits_and_says_so() {
    let mut world = World::with_vm(true, true, A);
    world.create_vm("big", 6 * GIB, B);
    world.start_vm("big");
    world.run_until("big runs", |world| phase(world, "big") == VmPhase::Running);
    world.create_vm("mid", 3 * GIB, A);
    world.start_vm("mid");
    world.run_until("mid runs", |world| phase(world, "mid") == VmPhase::Running);
    let text =
        "degraded: if `a` dies, 1 of 2 VMs fit on `b`: it has 2 GiB of memory free; `mid` (needs 3 GiB) stays down";
    assert_eq!(world.core(B).headline().text, text);
    world.crash(A);
    world.run(Duration::from_secs(10));
    assert_eq!((phase(&world, "web1"), phase(&world, "mid")), (VmPhase::Running, VmPhase::Recovering));
    let mid = world.state(B).vm_named("mid").expect("known").0;
    let reason = "it needs 3 GiB of memory; `b` has 1 GiB free of 8 GiB";
    assert_eq!(world.core(B).vm_blocked(mid).as_deref(), Some(reason));
    let big = world.state(B).vm_named("big").expect("known").0;
    world.ask(B, Change::WantVm { vm: big, wanted: Wanted::Off }).expect("wanted");
    world.run_until("mid runs", |world| phase(world, "mid") == VmPhase::Running);
}

#[test]
fn a_qemu_that_the_log_does_not_know_is_ended() {
    let mut world = World::with_vm(true, true, A);
    let vm = world.state(A).vm_named("web1").expect("known").0;
    world.stop_noded(B);
    world.plant_run(B, pollux_base::VmId(99));
    world.start_noded(B);
    world.run_until("the stray is gone", |world| !world.has_run(B, pollux_base::VmId(99)));
    world.give(
        A,
        Input::Vm(VmEvent::Ended {
            vm,
            incarnation: pollux_base::Incarnation(0),
            by_guest: true,
            detail: String::new(),
        }),
    );
    world.run(Duration::from_secs(3));
    assert_eq!(phase(&world, "web1"), VmPhase::Running, "late news of an earlier run change nothing");
}

#[test]
fn a_vm_with_an_image_starts_once_its_disk_is_filled() {
    let mut world = World::formed(true, true);
    let size = ByteCount(GIB);
    let image = world.ask(A, Change::CreateImage { name: "debian".into(), size, node: NodeId(0), key: None });
    let Ok(Answer::Created { id }) = image else { panic!("{image:?}") };
    let image = pollux_base::ImageId(id);
    let mut spec = vm_spec("web1", GIB);
    spec.image = Some(image);
    let refusal =
        world.ask(A, Change::CreateVm { spec: spec.clone(), node: B, keys: Vec::new() }).expect_err("not complete");
    assert!(matches!(&refusal, Refusal::Conflict(text) if text == "image `debian` is still being uploaded"));
    world.ask(A, Change::ImageReady { image, sha256: "ab".repeat(32) }).expect("ready");
    world.fills_take = Duration::from_secs(5);
    world.ask(A, Change::CreateVm { spec, node: B, keys: Vec::new() }).expect("created");
    world.start_vm("web1");
    let refusal = world.ask(A, Change::DeleteImage { image }).expect_err("in use");
    assert!(
        matches!(&refusal, Refusal::Conflict(text) if text.contains("VM `web1` is being filled from it")),
        "{refusal}"
    );
    world.run(Duration::from_secs(3));
    assert_eq!(phase(&world, "web1"), VmPhase::Stopped);
    let vm = world.state(A).vm_named("web1").expect("known").0;
    assert_eq!(world.core(A).vm_blocked(vm).as_deref(), Some("its first disk is being filled from the image"));
    world.run_until("web1 runs", |world| world.runs_on("web1") == Some(B));
    world.ask(A, Change::DeleteImage { image }).expect("no longer in use");
    assert_eq!(world.exports(A), ["vm/web1/disk0"]);
}

#[test]
fn volumes_are_offered_by_wish_and_forgotten_when_deleted() {
    let mut world = World::formed(true, true);
    let made = world.ask(A, Change::CreateVolume { name: "v".into(), size: ByteCount(GIB), node: A, key: None });
    let Ok(Answer::Created { id }) = made else { panic!("{made:?}") };
    let volume = pollux_base::VolumeId(id);
    assert!(world.exports(A).is_empty() && world.groups(A) == 1);
    world.ask(B, Change::ExportVolume { volume, exported: true }).expect("exported");
    world.run(Duration::from_millis(50));
    assert_eq!((world.exports(A), world.exports(B)), (vec!["v".to_owned()], vec!["v".to_owned()]));
    assert!(matches!(world.ask(A, Change::DeleteVolume { volume }), Err(Refusal::Conflict(_))), "it is in use");
    world.ask(A, Change::ExportVolume { volume, exported: false }).expect("withdrawn");
    world.ask(A, Change::DeleteVolume { volume }).expect("deleted");
    world.run(Duration::from_millis(50));
    assert_eq!((world.groups(A), world.groups(B)), (0, 0));
}

#[test]
fn a_primary_that_loses_its_own_disk_stays_primary_and_leaves_the_in_sync_set() {
    let mut world = World::with_vm(true, true, A);
    let (group, record) =
        world.state(A).groups.iter().next().map(|(id, group)| (*id, group.record.clone())).expect("one");
    let generation = record.stamp.generation;
    let lost = |node, generation| Report::ReplicaLost { group, generation, node, reason: "its disk fails".into() };
    world.give(A, Input::Data(Some(lost(A, Generation(generation.0 - 1)))));
    world.run(Duration::from_millis(100));
    assert_eq!(world.state(A).groups[&group].record, record, "news of an older record change nothing");
    world.give(A, Input::Data(Some(lost(A, generation))));
    world.run(Duration::from_millis(100));
    let now = &world.state(B).groups[&group].record;
    assert_eq!((now.primary, now.in_sync.iter().copied().collect::<Vec<_>>()), (A, vec![B]));
    // The last good copy is never let go.
    let generation = now.stamp.generation;
    world.give(A, Input::Data(Some(lost(B, generation))));
    world.run(Duration::from_millis(100));
    assert_eq!(world.state(A).groups[&group].record.in_sync.len(), 1);
    // And it survives the death of the primary.
    world.crash(A);
    world.run_until("web1 on b", |world| world.runs_on("web1") == Some(B));
}

#[test]
fn an_incarnation_runs_once_even_if_nobody_was_told_that_it_ran() {
    let mut world = World::with_vm(true, true, A);
    want(&mut world, "web1", Wanted::Off).expect("nothing is against it");
    world.run_until("web1 stopped", |world| phase(world, "web1") == VmPhase::Stopped);
    want(&mut world, "web1", Wanted::Running).expect("nothing is against it");
    world.run_until("web1 starting", |world| phase(world, "web1") == VmPhase::Starting);
    let before = world.state(B).vm_named("web1").expect("known").1.incarnation;
    world.crash(A);
    world.boot(A);
    world.run_until("web1 runs", |world| phase(world, "web1") == VmPhase::Running);
    assert!(world.state(A).vm_named("web1").expect("known").1.incarnation > before);
}

#[test]
fn a_vm_whose_own_disk_fell_out_starts_next_where_its_data_is() {
    let mut world = World::with_vm(true, true, A);
    let (group, generation) =
        world.state(A).groups.iter().next().map(|(id, group)| (*id, group.record.stamp.generation)).expect("one");
    let reason = "its disk fails".to_owned();
    world.give(A, Input::Data(Some(Report::ReplicaLost { group, generation, node: A, reason })));
    world.run(Duration::from_secs(10));
    assert_eq!(world.state(A).groups[&group].record.primary, A, "not under a guest that runs");
    world.crash_guests(A);
    world.run_until("web1 on b", |world| world.runs_on("web1") == Some(B));
    assert_eq!(world.state(A).groups[&group].record.primary, B);
}

#[test]
fn a_replica_that_is_lost_before_it_was_taken_in_can_not_be_taken_in_late() {
    let mut world = World::with_vm(true, true, A);
    world.crash(B);
    world.run(Duration::from_secs(3));
    let group = *world.state(A).groups.keys().next().expect("one");
    let before = world.state(A).groups[&group].record.clone();
    let generation = before.stamp.generation;
    world.give(A, Input::Data(Some(Report::ReplicaLost { group, generation, node: B, reason: "gone".into() })));
    world.run(Duration::from_millis(100));
    let after = &world.state(A).groups[&group].record;
    assert_eq!((&after.in_sync, after.stamp.generation), (&before.in_sync, generation.next()));
    world.give(A, Input::Data(Some(Report::ReplicaCurrent { group, generation, node: B, minted: 0 })));
    world.run(Duration::from_millis(100));
    assert_eq!(world.state(A).groups[&group].record.in_sync, before.in_sync);
}

#[test]
fn what_was_created_while_a_node_was_away_is_mirrored_when_it_is_back() {
    let mut world = World::with_vm(true, true, A);
    world.crash(A);
    world.run_until("web1 on b", |world| world.runs_on("web1") == Some(B));
    world.create_vm("new", GIB, B);
    assert!(world.state(B).groups.values().all(|group| group.record.in_sync.len() == 1));
    let refusal = world.ask(B, Change::CreateVolume { name: "v".into(), size: ByteCount(4096), node: A, key: None });
    assert_eq!(refusal, Err(Refusal::Conflict("node `a` is not online".into())));
    world.boot(A);
    world.run_until("mirrored", World::is_settled);
}

#[test]
fn requests_for_what_the_cluster_decides_itself_are_refused() {
    let mut world = World::formed(true, true);
    let vm = pollux_base::VmId(1);
    assert!(matches!(world.ask(A, Change::VmFilled { vm }), Err(Refusal::Invalid(_))));
    assert!(matches!(world.ask(A, Change::DeleteVm { vm }), Err(Refusal::NotFound(_))));
}

#[test]
fn a_request_during_a_takeover_is_refused_or_done_and_always_answered() {
    let mut world = World::with_vm(true, true, A);
    let made = Change::CreateVolume { name: "v".into(), size: ByteCount(4096), node: B, key: None };
    world.crash(A);
    let early = world.request(B, made.clone());
    world.run(Duration::from_secs(25));
    assert!(world.answers.contains_key(&early));
    let again = world.ask(B, made);
    assert!(again.is_ok() || matches!(again, Err(Refusal::Conflict(_))), "{again:?}");
}
