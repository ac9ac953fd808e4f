//! A seed from its beginning to its verdict: set up, go wrong, heal, come to rest, compare.

use crate::faults::{Fault, disk_plan, plan};
use crate::node::Process;
use crate::sabotage::Sabotage;
use crate::time::Time;
use crate::trace::Trace;
use crate::world::{Counts, Event, Failure, Settings, World};
use pollux_base::NodeId;
use pollux_cluster::entry::{Holder, VmPhase, Wanted};
use pollux_store::faulty_disk::Luck;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

/// A new cluster is there and its VMs run within this.
const SET_UP_WITHIN: Duration = Duration::from_secs(30);
/// After everything is healed, all is well within this: a boot, the bounds of a takeover without fence proof, a resync.
const HEALED_WITHIN: Duration = Duration::from_secs(60);
/// What nobody writes to is hot no more after this.
const COOLED_WITHIN: Duration = Duration::from_secs(12);
/// Some hundred pieces, beside guests a sixty-fourth of the time at worst.
const SCRUBBED_WITHIN: Duration = Duration::from_secs(120);
/// Guests have read everything again within this.
const CHECKED_WITHIN: Duration = Duration::from_secs(20);

/// What one run is to be.
pub struct Scenario {
    pub name: String,
    pub seed: u64,
    pub settings: Settings,
    pub script: Script,
}

/// What happens between the set-up and the healing.
pub enum Script {
    /// Faults, each so long after the set-up, and how long it all takes.
    Plan(Vec<(Duration, Fault)>, Duration),
    /// A story with expectations of its own.
    Told(fn(&mut World) -> Result<(), String>),
}

pub struct Outcome {
    pub failure: Option<Failure>,
    pub counts: Counts,
    pub steps: u64,
    pub virtual_time: Duration,
    /// The last lines, or the hash, if they were asked for.
    pub trace: Trace,
}

impl Scenario {
    /// The scenario that this seed stands for.
    pub fn of_seed(seed: u64, sabotage: Option<Sabotage>) -> Scenario {
        let mut luck = Luck::new(seed ^ 0x5eed_0000_0000_0000);
        let nodes: Vec<NodeId> = (1..=2).map(NodeId).collect();
        let mut size = || (2 << 22) + luck.below(8) * (1 << 22) + luck.below(1024) * 4096;
        let vms = [vec![size()], vec![size(), size()]];
        let vms = vms[..1 + luck.below(2) as usize].to_vec();
        let length = Duration::from_millis(4000 + luck.below(16_000));
        let witness = !luck.one_in(10);
        let mut faults = plan(&mut luck, &nodes, vms.len(), witness, length);
        // Of its own luck, so that what else a seed stands for stays the same.
        let disks = seed.is_multiple_of(3);
        if disks {
            faults.extend(disk_plan(&mut Luck::new(seed ^ 0xd15c << 48), &nodes, witness, length));
        }
        let settings = Settings {
            nodes: 2,
            witness,
            switches: luck.one_in(2),
            vms,
            think: Duration::from_millis(10 + luck.below(60)),
            snapshots: seed.is_multiple_of(2),
            copies: seed.is_multiple_of(4),
            // A group whose primary loses its disk right at its birth stays out of use: see docs/STATUS.md.
            clones: !faults.iter().any(|(_, fault)| matches!(fault, Fault::FailDisk { .. })),
            disks,
            encrypted: seed % 4 < 2,
            sabotage,
        };
        Scenario { name: format!("seed {seed}"), seed, settings, script: Script::Plan(faults, length) }
    }

    /// Runs it. A panic of a core (a broken promise of its own) is a failure like any other.
    pub fn run(self, trace: Trace) -> Outcome {
        let mut world = World::new(self.seed, self.settings.clone(), trace);
        let result = catch_unwind(AssertUnwindSafe(|| self.live(&mut world)));
        if let Err(panic) = result {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            world.fail("panic", text.unwrap_or_else(|| "a panic without a text".into()));
        }
        Outcome {
            failure: world.failure,
            counts: world.counts,
            steps: world.steps,
            virtual_time: world.now.since(Time(0)),
            trace: world.trace,
        }
    }

    fn live(&self, world: &mut World) {
        if !wait(world, SET_UP_WITHIN, "set-up", is_healthy) {
            return;
        }
        match &self.script {
            Script::Plan(faults, length) => {
                for (after, fault) in faults {
                    world.at(*after, Event::Fault(fault.clone()));
                }
                world.run_until(world.now + *length);
            }
            Script::Told(tell) => {
                if let Err(text) = tell(world) {
                    world.fail("expectation", text);
                    return;
                }
            }
        }
        world.heal();
        if !wait(world, HEALED_WITHIN, "healing", is_healthy) {
            return;
        }
        // A while of ordinary life; on some seeds with a medium that decays.
        world.run_until(world.now + Duration::from_secs(1));
        if matches!(self.script, Script::Plan(..)) && world.luck.one_in(6) {
            let ids = world.ids();
            let node = ids[world.luck.below(ids.len() as u64) as usize];
            for _ in 0..1 + world.luck.below(4) {
                world.rot(node);
                world.lead_astray(node);
            }
            // A scrub looks at what is there when it begins: no snapshot is to hide from it what was overwritten since.
            world.settings.snapshots = false;
            if !wait(world, HEALED_WITHIN, "the last snapshot", is_healthy) {
                return;
            }
            world.run_until(world.now + Duration::from_secs(1));
            let before = world.scrubs();
            // As a person does who is refused because a takeover is under way: ask again.
            let asks_end = world.now + HEALED_WITHIN;
            while world.failure.is_none() && world.now < asks_end && !world.are_scrubs_wanted(&before) {
                world.want_scrubs();
                world.run_until(world.now + Duration::from_secs(2));
            }
            if !wait(world, SCRUBBED_WITHIN, "scrubbing", |world| world.are_scrubbed(&before)) {
                return;
            }
            // Every bad block is healed: from here on what lies on the disks is judged as if nothing had decayed.
            world.rotted = false;
        }
        world.quiet = true;
        for node in world.ids() {
            world.node(node).guests.values_mut().for_each(crate::guest::Guest::check_all);
        }
        if !wait(world, CHECKED_WITHIN, "reading everything again", is_quiet) {
            return;
        }
        // What is idle cools down, and only then are its checksums on the disks. A takeover that was under way when all
        // was healed may have ended only now: its resync is waited for, too.
        world.run_until(world.now + COOLED_WITHIN);
        if is_healthy(world).is_err() {
            if !wait(world, HEALED_WITHIN, "healing after a late takeover", is_healthy) {
                return;
            }
            world.run_until(world.now + COOLED_WITHIN);
        }
        if world.failure.is_none() {
            world.look_at_replicas();
            world.look_at_snapshots();
        }
    }
}

/// Lets the world go on until all is as it should be, or says what is not.
pub fn wait(world: &mut World, within: Duration, what: &str, check: impl Fn(&World) -> Result<(), String>) -> bool {
    let end = world.now + within;
    let mut missing = String::new();
    while world.failure.is_none() && world.now < end {
        match check(world) {
            Ok(()) => return true,
            Err(text) => missing = text,
        }
        world.run_until(world.now + Duration::from_millis(100));
    }
    if world.failure.is_none() {
        world.fail("liveness", format!("{what} is not done within {within:?}: {missing}"));
    }
    false
}

/// Everything runs that should, and every group has all its replicas in sync.
pub fn is_healthy(world: &World) -> Result<(), String> {
    for node in world.nodes.values() {
        let id = node.id;
        for process in [Process::Guard, Process::Blockd, Process::Noded] {
            if !node.is_active(process) {
                return Err(format!("{id}: {process:?} does not run"));
            }
        }
        let state = node.noded.as_ref().map(|noded| noded.core.state()).ok_or("just seen to run")?;
        if !state.is_initialised() {
            return Err(format!("{id}: the cluster is not there yet"));
        }
        if state.authority.holder != Holder::Members {
            return Err(format!("{id}: {:?} holds {:?}", state.authority.holder, state.authority.epoch));
        }
        if state.vms.len() < world.settings.vms.len() {
            return Err(format!("{id}: knows of {} VMs", state.vms.len()));
        }
        for (group, found) in &state.groups {
            if found.record.in_sync != found.replicas {
                return Err(format!("{id}: {group} is {:?}", found.record));
            }
            let primary = &world.nodes[&found.record.primary];
            if primary.serving.get(group) != Some(&found.record.stamp) {
                return Err(format!("{} does not serve {group} under {:?}", primary.id, found.record));
            }
        }
        for (vm, found) in &state.vms {
            if found.wanted != Wanted::Running || found.phase != VmPhase::Running {
                return Err(format!("{id}: {vm} is {:?} ({}), wanted {:?}", found.phase, found.reason, found.wanted));
            }
            let runs = world.nodes.values().filter(|node| node.guests.contains_key(vm)).count();
            if runs != 1 {
                return Err(format!("{vm} has {runs} runs"));
            }
        }
    }
    Ok(())
}

/// No guest waits for anything.
fn is_quiet(world: &World) -> Result<(), String> {
    for node in world.nodes.values() {
        for guest in node.guests.values() {
            if !guest.to_check.is_empty() || !guest.asked.is_empty() {
                let asked: Vec<_> = guest.asked.iter().collect();
                return Err(format!("{} on {}: {} to read, asked: {asked:?}", guest.vm, node.id, guest.to_check.len()));
            }
        }
    }
    Ok(())
}
