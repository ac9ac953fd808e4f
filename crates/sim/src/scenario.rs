//! Named scenarios: the table of failures and verdicts (architecture, section 8), told one by one. Each ends like every
//! run: all is healed, all must be well again, and nothing was lost on the way.
//!
//! `cargo test -p pollux-sim` runs each under several seeds; a failing seed of a batch that taught something is told here.

use crate::faults::Fault;
use crate::net::{MANAGEMENT, NETWORKS, STORAGE};
use crate::node::Process;
use crate::run::{Scenario, Script};
use crate::world::{Run, Settings, World};
use pollux_base::guard::Network;
use pollux_base::order::ReplicaState;
use pollux_base::record::Mode;
use pollux_base::{GroupId, NodeId, Stamp, VmId};
use pollux_cluster::Change;
use std::time::Duration;

type Told = fn(&mut World) -> Result<(), String>;

/// Promised: the guests of a dead node run elsewhere within this, with and without a power switch.
const RESTART_WITH_SWITCH: Duration = Duration::from_secs(5);
const RESTART_WITHOUT_SWITCH: Duration = Duration::from_secs(15);

/// Promised: what a cut of one of two networks may cost (verdict 1).
const CUT_PATH_PAUSE: Duration = Duration::from_millis(600);

/// What is special about the world of a scenario.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Has {
    Witness,
    WitnessAndSwitches,
}

const SCENARIOS: &[(&str, Has, Told)] = &[
    ("01_replication_moves_to_the_other_network", Has::Witness, replication_moves),
    ("01_a_cut_path_is_a_short_pause_and_drops_no_replica", Has::Witness, paths_cut_one_after_the_other),
    ("02_all_links_lost_one_side_goes_on", Has::Witness, all_links_lost),
    ("02_all_links_lost_with_switches", Has::WitnessAndSwitches, all_links_lost),
    ("03_a_node_dies_with_its_switch", Has::Witness, a_node_dies_without_switch),
    ("03_a_node_dies_and_is_fenced", Has::WitnessAndSwitches, a_node_dies_with_switch),
    ("04_both_lose_power_both_return", Has::Witness, both_lose_power),
    ("05_both_lose_power_one_returns", Has::Witness, one_returns),
    ("06_the_survivor_reboots_alone", Has::Witness, the_survivor_reboots),
    ("07_a_stale_node_returns_alone", Has::Witness, a_stale_node_returns),
    ("08_an_asymmetric_link_does_not_count", Has::Witness, asymmetric_links),
    ("10_noded_dies_and_hangs", Has::Witness, noded_dies),
    ("11_blockd_dies", Has::Witness, blockd_dies),
    ("12_a_node_stands_still", Has::Witness, a_node_stands_still),
    ("12_the_guard_is_killed", Has::Witness, the_guard_is_killed),
    ("13_the_wall_clock_jumps", Has::Witness, the_wall_clock_jumps),
    ("09_a_hung_data_plane_holds_nobody", Has::Witness, a_data_plane_hangs),
    ("15_bit_rot_is_healed", Has::Witness, bit_rot),
    ("15_scrubs_find_what_rotted_was_lost_or_led_astray", Has::Witness, media_decay),
    ("17_an_old_disk_image_is_put_back", Has::Witness, an_old_image),
    ("a_trailing_replica_is_a_state_that_was", Has::Witness, a_trailing_replica),
    ("modes_change_while_things_fail", Has::Witness, modes_change),
    ("both_directions_one_after_the_other", Has::WitnessAndSwitches, both_directions),
];

/// All of them, each under this seed.
pub fn named(seed: u64) -> Vec<Scenario> {
    let scenario = |(name, has, told): &(&str, Has, Told)| Scenario {
        name: (*name).to_owned(),
        seed,
        settings: Settings {
            nodes: 2,
            witness: true,
            switches: *has == Has::WitnessAndSwitches,
            vms: vec![vec![46 << 20]],
            think: Duration::from_millis(20),
            snapshots: false,
            copies: false,
            clones: false,
            disks: false,
            encrypted: seed.is_multiple_of(2),
            sabotage: None,
        },
        script: Script::Told(*told),
    };
    SCENARIOS.iter().map(scenario).collect()
}

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

impl World {
    fn pass(&mut self, time: Duration) {
        self.run_until(self.now + time);
    }
    fn cut(&mut self, networks: &[Network], a: NodeId, b: NodeId) {
        for network in networks {
            self.on_fault(Fault::Cut { network: *network, from: a, to: b });
            self.on_fault(Fault::Cut { network: *network, from: b, to: a });
        }
    }
    fn last_run(&self) -> Result<Run, String> {
        self.runs.last().copied().ok_or("no VM ever ran".into())
    }
    /// The node that runs the VM, and the other one.
    fn runner(&self) -> Result<(NodeId, NodeId), String> {
        let run = self.last_run()?;
        let other = self.peers(run.node).first().copied().ok_or("there is no other node")?;
        Ok((run.node, other))
    }
    fn runs_on(&self, node: NodeId) -> bool {
        !self.nodes[&node].guests.is_empty()
    }
    fn vm(&self) -> Option<VmId> {
        self.runs.last().map(|run| run.vm)
    }
    /// Requests of the VM answered in all its life on this node.
    fn answered(&self, node: NodeId) -> u64 {
        self.vm().and_then(|vm| self.nodes[&node].guests.get(&vm)).map_or(0, |guest| guest.answered)
    }
    fn expect_within(&mut self, within: Duration, what: &str, check: impl Fn(&World) -> bool) -> Result<(), String> {
        let end = self.now + within;
        while self.failure.is_none() && self.now < end {
            if check(self) {
                return Ok(());
            }
            self.pass(Duration::from_millis(20));
        }
        Err(format!("not within {within:?}: {what}"))
    }
    fn expect_same_run(&self, run: Run) -> Result<(), String> {
        let last = self.last_run()?;
        if last.incarnation != run.incarnation || last.ended.is_some() {
            return Err(format!("the guest was disturbed: {last:?}"));
        }
        Ok(())
    }
    /// The guest on the node gets answers.
    fn expect_io(&mut self, node: NodeId, within: Duration) -> Result<(), String> {
        let before = self.answered(node);
        self.expect_within(within, "the guest's I/O goes on", |world| world.answered(node) > before + 20)
    }
}

fn replication_moves(world: &mut World) -> Result<(), String> {
    let ((a, b), run) = (world.runner()?, world.last_run()?);
    world.cut(&[STORAGE], a, b);
    world.expect_io(a, seconds(3))?;
    world.pass(seconds(10));
    world.expect_same_run(run)?;
    world.expect_io(a, seconds(1))?;
    crate::run::is_healthy(world)
}

/// Each network in turn, both ways and one way: nothing is decided, because nothing is lost.
fn paths_cut_one_after_the_other(world: &mut World) -> Result<(), String> {
    let ((a, b), run) = (world.runner()?, world.last_run()?);
    let stamps = |world: &World| -> Vec<Stamp> {
        let state = world.nodes[&a].noded.as_ref().map(|noded| noded.core.state());
        state.into_iter().flat_map(|state| state.groups.values()).map(|group| group.record.stamp).collect()
    };
    // The replication of a new cluster may still be settling.
    world.pass(seconds(4));
    let before = stamps(world);
    let ways = [(a, b), (b, a)];
    let cuts: [(Network, &[(NodeId, NodeId)]); 6] = [
        (STORAGE, &ways),
        (MANAGEMENT, &ways),
        (STORAGE, &ways[..1]),
        (STORAGE, &ways[1..]),
        (MANAGEMENT, &ways[..1]),
        (STORAGE, &ways),
    ];
    for (network, ways) in cuts {
        for (from, to) in ways {
            world.on_fault(Fault::Cut { network, from: *from, to: *to });
        }
        let answered = world.answered(a);
        world.expect_within(CUT_PATH_PAUSE, "the guest's I/O goes on", |world| world.answered(a) > answered + 3)?;
        world.pass(seconds(4));
        for (from, to) in ways {
            world.on_fault(Fault::Join { network, from: *from, to: *to });
        }
        // Sometimes before the mended one is wanted again.
        let held = world.between(Duration::from_millis(500), seconds(5));
        world.pass(held);
    }
    world.expect_same_run(run)?;
    if stamps(world) != before {
        return Err(format!("a record was changed: {before:?}, now {:?}", stamps(world)));
    }
    crate::run::is_healthy(world)
}

fn all_links_lost(world: &mut World) -> Result<(), String> {
    let (a, b) = world.runner()?;
    world.cut(&NETWORKS, a, b);
    world.pass(seconds(20));
    match (world.runs_on(a), world.runs_on(b)) {
        (true, true) => return Err("both sides run the guest".into()),
        (false, false) => return Err("no side goes on".into()),
        (true, false) | (false, true) => {}
    }
    let winner = if world.runs_on(a) { a } else { b };
    world.expect_io(winner, seconds(1))
}

fn a_node_dies(world: &mut World, within: Duration) -> Result<(), String> {
    let (a, b) = world.runner()?;
    world.on_fault(Fault::PowerCut { node: a, on_after: None });
    world.expect_within(within, "the guest runs on the other node", |world| world.runs_on(b))?;
    world.expect_io(b, seconds(2))?;
    world.pass(seconds(3));
    Ok(())
}

fn a_node_dies_without_switch(world: &mut World) -> Result<(), String> {
    a_node_dies(world, RESTART_WITHOUT_SWITCH)
}

fn a_node_dies_with_switch(world: &mut World) -> Result<(), String> {
    a_node_dies(world, RESTART_WITH_SWITCH)
}

fn both_directions(world: &mut World) -> Result<(), String> {
    for _ in 0..3 {
        let (a, _) = world.runner()?;
        a_node_dies(world, RESTART_WITH_SWITCH)?;
        world.at(Duration::ZERO, crate::world::Event::PowerOn { node: a });
        world.expect_within(seconds(30), "all is well again", |world| crate::run::is_healthy(world).is_ok())?;
        world.pass(seconds(1));
    }
    Ok(())
}

fn both_lose_power(world: &mut World) -> Result<(), String> {
    let (a, b) = world.runner()?;
    world.on_fault(Fault::PowerCut { node: a, on_after: Some(seconds(2)) });
    world.on_fault(Fault::PowerCut { node: b, on_after: Some(seconds(3)) });
    world.expect_within(seconds(40), "all is well again, and the guest runs", |world| {
        crate::run::is_healthy(world).is_ok()
    })
}

fn one_returns(world: &mut World) -> Result<(), String> {
    let (a, b) = world.runner()?;
    world.on_fault(Fault::PowerCut { node: a, on_after: None });
    world.on_fault(Fault::PowerCut { node: b, on_after: Some(seconds(2)) });
    world.expect_within(seconds(45), "the guest runs on the node that returned", |world| world.runs_on(b))?;
    world.expect_io(b, seconds(2))
}

fn the_survivor_reboots(world: &mut World) -> Result<(), String> {
    let (a, b) = world.runner()?;
    a_node_dies_without_switch(world)?;
    world.on_fault(Fault::CutWitness { node: b });
    world.on_fault(Fault::PowerCut { node: b, on_after: Some(seconds(1)) });
    world.expect_within(seconds(40), "the guest runs again by the node's own record", |world| world.runs_on(b))?;
    world.expect_io(b, seconds(2))?;
    if world.runs_on(a) { Err("a node without power runs a guest".into()) } else { Ok(()) }
}

fn a_stale_node_returns(world: &mut World) -> Result<(), String> {
    let (a, b) = world.runner()?;
    a_node_dies_without_switch(world)?;
    world.on_fault(Fault::PowerCut { node: b, on_after: None });
    world.at(Duration::ZERO, crate::world::Event::PowerOn { node: a });
    world.pass(seconds(40));
    if world.runs_on(a) || !world.nodes[&a].serving.is_empty() {
        return Err(format!("{a} lacks what {b} acknowledged, and goes on all the same"));
    }
    Ok(())
}

fn asymmetric_links(world: &mut World) -> Result<(), String> {
    let (a, b) = world.runner()?;
    for network in NETWORKS {
        world.on_fault(Fault::Cut { network, from: a, to: b });
    }
    world.pass(seconds(20));
    if world.runs_on(a) == world.runs_on(b) {
        return Err("exactly one side must go on".into());
    }
    let winner = if world.runs_on(a) { a } else { b };
    world.expect_io(winner, seconds(1))
}

fn noded_dies(world: &mut World) -> Result<(), String> {
    let ((a, b), run) = (world.runner()?, world.last_run()?);
    for node in [a, b] {
        world.on_fault(Fault::Kill { node, process: Process::Noded, restart_after: seconds(4) });
        world.expect_io(a, seconds(1))?;
        world.pass(seconds(8));
        world.on_fault(Fault::Stop { node, process: Process::Noded, length: seconds(6) });
        world.expect_io(a, seconds(1))?;
        world.pass(seconds(8));
    }
    world.expect_same_run(run)
}

fn blockd_dies(world: &mut World) -> Result<(), String> {
    let ((a, b), run) = (world.runner()?, world.last_run()?);
    for node in [a, b, a] {
        let restart_after = Duration::from_millis(300);
        world.on_fault(Fault::Kill { node, process: Process::Blockd, restart_after });
        world.expect_io(a, seconds(6))?;
        world.pass(seconds(3));
    }
    world.expect_same_run(run)
}

fn a_node_stands_still(world: &mut World) -> Result<(), String> {
    let (a, b) = world.runner()?;
    world.on_fault(Fault::StopNode { node: a, length: seconds(20) });
    world.expect_within(RESTART_WITHOUT_SWITCH, "the guest runs on the other node", |world| world.runs_on(b))?;
    world.pass(seconds(25));
    if world.runs_on(a) { Err("the old run lives on".into()) } else { Ok(()) }
}

fn the_guard_is_killed(world: &mut World) -> Result<(), String> {
    let ((a, b), run) = (world.runner()?, world.last_run()?);
    for node in [a, b] {
        let restart_after = Duration::from_millis(300);
        world.on_fault(Fault::Kill { node, process: Process::Guard, restart_after });
        world.pass(seconds(5));
    }
    world.expect_same_run(run)?;
    world.expect_io(a, seconds(1))
}

fn the_wall_clock_jumps(world: &mut World) -> Result<(), String> {
    let ((a, b), run) = (world.runner()?, world.last_run()?);
    for (node, ms) in [(a, 3_600_000), (b, -7_200_000), (a, -86_400_000)] {
        world.on_fault(Fault::JumpWallClock { node, ms });
        world.pass(seconds(3));
    }
    world.expect_same_run(run)
}

fn bit_rot(world: &mut World) -> Result<(), String> {
    let ((a, b), run) = (world.runner()?, world.last_run()?);
    world.pass(seconds(3));
    for node in [a, b] {
        for _ in 0..5 {
            world.on_fault(Fault::Rot { node });
        }
        let guest = world.vm().and_then(|vm| world.node(a).guests.get_mut(&vm)).ok_or("the guest is gone")?;
        guest.check_all();
        world.pass(seconds(3));
        // Only one replica decays at a time: what rotted on the first is healed or overwritten by now.
    }
    world.expect_same_run(run)
}

/// One replica decays at a time, in every way; nobody reads what is bad but a scrub. What it leaves is judged as if nothing
/// had ever decayed.
fn media_decay(world: &mut World) -> Result<(), String> {
    let ((a, b), run) = (world.runner()?, world.last_run()?);
    for node in [b, a] {
        let before = world.nodes[&node].disks[0].clone();
        world.pass(seconds(4));
        for _ in 0..3 {
            world.on_fault(Fault::Rot { node });
            world.lead_astray(node);
            world.lose_a_write(node, &before);
        }
        let scrubs = world.scrubs();
        world.want_scrubs();
        world.expect_within(seconds(120), "every group is scrubbed", |world| world.are_scrubbed(&scrubs).is_ok())?;
    }
    world.rotted = false;
    world.expect_same_run(run)
}

/// Verdict 9, for a process that stands still: the other goes on within its bound, and takes it back when it wakes.
fn a_data_plane_hangs(world: &mut World) -> Result<(), String> {
    let ((a, b), run) = (world.runner()?, world.last_run()?);
    world.on_fault(Fault::Stop { node: b, process: Process::Blockd, length: seconds(8) });
    world.expect_io(a, seconds(4))?;
    world.pass(seconds(8));
    world.expect_within(seconds(30), "all is well again", |world| crate::run::is_healthy(world).is_ok())?;
    world.expect_same_run(run)
}

/// Has the mode of the replica on the node changed, and waits until the log says so.
fn set_mode(world: &mut World, asked: NodeId, node: NodeId, mode: Mode) -> Result<GroupId, String> {
    let vm = world.vm().ok_or("no VM runs")?;
    let state = world.nodes[&asked].noded.as_ref().map(|noded| noded.core.state()).ok_or("noded is away")?;
    let group = state.vms.get(&vm).ok_or("the VM is gone")?.group;
    let (request, unix_ms) = (world.number(), world.unix_ms(asked));
    let change = Box::new(Change::SetMode { group, nodes: [node].into(), mode });
    world.tell_core(asked, Duration::ZERO, pollux_cluster::Input::Request { request, unix_ms, change });
    world.expect_within(seconds(5), "the mode is changed", |world| {
        let noded = world.nodes[&asked].noded.as_ref();
        noded.is_some_and(|noded| noded.core.state().groups.get(&group).is_some_and(|group| group.mode(node) == mode))
    })?;
    Ok(group)
}

/// Whatever happens to it, what a promotion would serve is a prefix; and it holds nobody up.
fn a_trailing_replica(world: &mut World) -> Result<(), String> {
    let ((a, b), run) = (world.runner()?, world.last_run()?);
    let group = set_mode(world, a, b, Mode::Async)?;
    let mut cuts = 0;
    for round in 0..12u64 {
        match round % 4 {
            0 => {}
            1 => world.cut(&[STORAGE], b, a),
            2 => {
                let restart_after = Duration::from_millis(200);
                world.on_fault(Fault::Kill { node: b, process: Process::Blockd, restart_after });
            }
            _ => {
                let length = Duration::from_millis(300);
                world.on_fault(Fault::Stop { node: b, process: Process::Blockd, length });
            }
        }
        for _ in 0..6 {
            let pause = world.between(Duration::from_micros(100), Duration::from_millis(80));
            world.pass(pause);
            cuts += u32::from(world.look_at_cut(b, group));
        }
        if round % 4 == 1 {
            world.on_fault(Fault::Join { network: STORAGE, from: a, to: b });
            world.on_fault(Fault::Join { network: STORAGE, from: b, to: a });
        }
        world.expect_io(a, seconds(8))?;
    }
    world.expect_within(seconds(20), "it trails again", |world| {
        let noded = world.nodes[&b].noded.as_ref();
        let mut reports = noded.into_iter().flat_map(|noded| noded.core.group_reports());
        reports.any(|report| report.group == group && matches!(report.state, ReplicaState::Trailing { .. }))
    })?;
    world.pass(seconds(1));
    cuts += u32::from(world.look_at_cut(b, group));
    world.expect_same_run(run)?;
    if cuts < 10 {
        return Err(format!("it was a cut only {cuts} times"));
    }
    set_mode(world, a, b, Mode::Sync)?;
    world.expect_within(seconds(30), "all is in sync again", |world| crate::run::is_healthy(world).is_ok())
}

fn modes_change(world: &mut World) -> Result<(), String> {
    let (a, b) = world.runner()?;
    for (round, mode) in [Mode::Memory, Mode::Async, Mode::Sync, Mode::Memory, Mode::Sync].into_iter().enumerate() {
        set_mode(world, a, b, mode)?;
        let pause = world.between(Duration::ZERO, Duration::from_millis(700));
        world.pass(pause);
        let restart_after = Duration::from_millis(200);
        let process = if round % 2 == 0 { Process::Blockd } else { Process::Noded };
        world.on_fault(Fault::Kill { node: b, process, restart_after });
        world.expect_io(a, seconds(8))?;
        world.pass(seconds(4));
    }
    world.expect_within(seconds(30), "all is in sync again", |world| crate::run::is_healthy(world).is_ok())
}

fn an_old_image(world: &mut World) -> Result<(), String> {
    let (_, b) = world.runner()?;
    world.pass(seconds(2));
    let old = world.nodes[&b].disks[0].clone();
    world.pass(seconds(4));
    world.on_fault(Fault::PowerCut { node: b, on_after: None });
    world.pass(seconds(3));
    let mut old = old;
    old.power_cut(1);
    world.node(b).disks[0] = old;
    world.on_fault(Fault::JoinWitness { node: b });
    world.at(Duration::ZERO, crate::world::Event::PowerOn { node: b });
    world.pass(seconds(10));
    // It is refused: it lacks what its peer has seen it have. A human takes it as stale.
    if crate::run::is_healthy(world).is_ok() {
        return Err("an old image was taken for the real disk".into());
    }
    world.on_fault(Fault::PowerCut { node: b, on_after: None });
    world.pass(seconds(3));
    crate::old_image::take(&mut world.node(b).disks[0], b)?;
    world.at(Duration::ZERO, crate::world::Event::PowerOn { node: b });
    world.pass(seconds(10));
    Ok(())
}
