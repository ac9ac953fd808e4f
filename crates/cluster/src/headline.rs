//! The first line of everything: "If a node dies now, what happens?"
//!
//! A pure function of the log and of what this node sees. The worst thing is told, with the command that mends it; a
//! protection is never claimed that is not there.

use crate::entry::{NodePhase, Wanted};
use crate::state::{Owner, State, Vm};
use pollux_base::NodeId;
use pollux_base::order::{PathReport, PathState};
use pollux_base::pool::{PoolLevel, PoolReport};
use pollux_base::unit::bytes_text;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protection {
    /// A death needs a human, or loses something.
    Unprotected,
    /// A death is survived, but not by everything.
    Degraded,
    Protected,
}

/// The answer, why, and the command that mends it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Headline {
    pub protection: Protection,
    /// One line, beginning with the protection.
    pub text: String,
    pub fix: Option<String>,
}

/// What this node sees beside the log; for `headline` and the API.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sight {
    /// The log has a leader and this node may decide by it.
    pub log_works: bool,
    /// `None`: not asked yet. `Err`: since when (wall clock) and why it is not reached.
    pub witness: Option<Result<(), (u64, String)>>,
    /// The witness' register is as it should be.
    pub register_is_right: bool,
    /// Peers, and whether they are heard both ways by the guard.
    pub peers_heard: BTreeMap<NodeId, bool>,
    /// The guard is connected.
    pub guard: bool,
    /// Pools, of this node and of those that are heard.
    pub pools: BTreeMap<NodeId, PoolReport>,
    /// Connections between this node's data plane and its peers'.
    pub paths: BTreeMap<NodeId, Vec<PathReport>>,
    /// Whether they are encrypted.
    pub is_encrypted: bool,
    /// `blockd` is connected and its pool works.
    pub data_plane: bool,
    /// Why nobody may decide here.
    pub isolated: Option<String>,
    /// What a human may do about that.
    pub isolated_fix: Option<String>,
}

/// The promised times of a restart (`pollux_base::timing`), with and without power switches.
const RESTART_S: u64 = 5;
const RESTART_WITHOUT_FENCE_S: u64 = 15;

/// Answers the question. Pure.
pub fn headline(state: &State, sight: &Sight) -> Headline {
    let worst = authority_trouble(state, sight)
        .or_else(|| space_trouble(state, sight, PoolLevel::Full))
        .or_else(|| copy_trouble(state))
        .or_else(|| room_trouble(state))
        .or_else(|| space_trouble(state, sight, PoolLevel::Scarce));
    let (protection, reason, fix) = match worst {
        Some(trouble) => trouble,
        None => {
            let (paths, fix) = path_texts(state, sight);
            let text = format!("yes; {}; {}{paths}", restart_text(state), room_text(state));
            (Protection::Protected, text, fix)
        }
    };
    let word = match protection {
        Protection::Unprotected => "unprotected",
        Protection::Degraded => "degraded",
        Protection::Protected => "protected",
    };
    Headline { protection, text: format!("{word}: {reason}"), fix }
}

type Trouble = (Protection, String, Option<String>);

fn trouble(protection: Protection, reason: impl Into<String>, fix: &str) -> Option<Trouble> {
    Some((protection, reason.into(), (!fix.is_empty()).then(|| fix.to_owned())))
}

/// Whether somebody could and would decide if a node died now.
fn authority_trouble(state: &State, sight: &Sight) -> Option<Trouble> {
    use Protection::*;
    if !state.is_initialised() {
        let reason = sight.isolated.clone().unwrap_or_else(|| "the cluster is being formed".into());
        return trouble(Unprotected, reason, "start pollux on every node");
    }
    if let Some(alone) = state.alone() {
        let since = since_text(state.authority.since_unix_ms);
        let others = state.nodes.iter().filter(|(id, _)| **id != alone);
        let names: Vec<String> = others.map(|(_, node)| format!("`{}`", node.spec.name)).collect();
        let reason = format!("`{}` goes on alone{since}, {} is out", state.node_name(alone), names.join(", "));
        return trouble(Unprotected, reason, "power the other node on; it joins by itself");
    }
    if let Some(reason) = &sight.isolated {
        let fix = sight.isolated_fix.as_deref().unwrap_or("pollux node list");
        return trouble(Unprotected, reason.clone(), fix);
    }
    if state.nodes.len() < 2 {
        return trouble(Unprotected, "there is one node only", "add a second node when the cluster is made");
    }
    if let Some((peer, _)) = sight.peers_heard.iter().find(|(_, heard)| !**heard) {
        let name = state.node_name(*peer);
        return trouble(Unprotected, format!("`{name}` is not heard"), &format!("pollux node show {name}"));
    }
    if let Some((_, node)) = state.nodes.iter().find(|(_, node)| node.phase != NodePhase::Online) {
        let name = &node.spec.name;
        return trouble(Unprotected, format!("`{name}` is not a full member yet"), &format!("pollux node show {name}"));
    }
    if !state.witness {
        let reason = "there is no witness: when a node dies, a human must confirm it";
        return trouble(Unprotected, reason, "pollux witness add ADDRESS");
    }
    match &sight.witness {
        Some(Err((since, reason))) => {
            let reason = format!("witness not reachable{}: {reason}", since_text(*since));
            return trouble(Unprotected, reason, "pollux witness test");
        }
        None => return trouble(Unprotected, "the witness was not asked yet", "pollux witness test"),
        Some(Ok(())) if !sight.register_is_right => {
            return trouble(
                Unprotected,
                "the witness' register is being set back to both nodes",
                "pollux witness test",
            );
        }
        Some(Ok(())) => {}
    }
    if !sight.guard {
        return trouble(Unprotected, "the guard of this node does not run", "systemctl restart pollux-guard");
    }
    if !sight.data_plane {
        return trouble(Unprotected, "the data plane of this node does not work", "systemctl restart blockd");
    }
    None
}

/// Whether everything has a second good copy.
fn copy_trouble(state: &State) -> Option<Trouble> {
    let thin: Vec<_> = state.groups.values().filter(|group| group.record.in_sync.len() < 2).collect();
    let first = thin.first()?;
    let name = match first.owner {
        Owner::Vm(vm) => state.vms.get(&vm).map(|vm| format!("VM `{}`", vm.spec.name)),
        Owner::Image(image) => state.images.get(&image).map(|image| format!("image `{}`", image.name)),
        Owner::Volume(volume) => state.volumes.get(&volume).map(|volume| format!("volume `{}`", volume.name)),
    };
    let only = first.record.in_sync.iter().next().map_or_else(String::new, |node| state.node_name(*node));
    let others = match thin.len() - 1 {
        0 => String::new(),
        count => format!(" and {count} more"),
    };
    let reason = format!("{}{others} has its only good copy on `{only}`", name.unwrap_or_else(|| "a group".into()));
    trouble(Protection::Degraded, reason, "pollux volume list --watch")
}

/// Whether a pool is at least this short of space.
fn space_trouble(state: &State, sight: &Sight, at_least: PoolLevel) -> Option<Trouble> {
    let (node, pool) = sight.pools.iter().find(|(_, pool)| pool.level() >= at_least)?;
    let name = state.node_name(*node);
    trouble(Protection::Degraded, pool_text(&name, pool), &format!("pollux pool show {name}"))
}

/// What is not as it should be between the data planes, though it takes nothing from what is promised; and what mends it.
fn path_texts(state: &State, sight: &Sight) -> (String, Option<String>) {
    let failed = sight.paths.iter().find_map(|(peer, paths)| {
        let name = state.node_name(*peer);
        Some((path_text(&name, paths)?, format!("pollux node show {name}")))
    });
    let plain = if sight.is_encrypted { "" } else { "; replication is not encrypted" };
    match failed {
        Some((text, fix)) => (format!("; {text}{plain}"), Some(fix)),
        None => (plain.to_owned(), None),
    }
}

/// The trouble with the paths to a node in a sentence, if there is any.
pub fn path_text(node: &str, paths: &[PathReport]) -> Option<String> {
    let is_up = |path: &&PathReport| path.state == PathState::Up;
    let (up, all) = (paths.iter().filter(is_up).count(), paths.len());
    let first = paths.iter().find(|path| path.state != PathState::Up)?;
    let reason = match &first.state {
        PathState::Up => return None,
        PathState::Silent => "does not answer".to_owned(),
        PathState::Down { reason } => format!("is down: {reason}"),
        PathState::Refused { reason } => format!("is refused: {reason}"),
    };
    Some(format!("{up} of {all} replication paths to `{node}` work, {} {reason}", first.address))
}

/// A pool's trouble in a sentence.
pub fn pool_text(node: &str, pool: &PoolReport) -> String {
    let free = bytes_text(pool.free_bytes);
    let of = bytes_text(pool.size_bytes);
    match (pool.level(), pool.full_in_s()) {
        (PoolLevel::Failed, _) => {
            let reason = pool.failed.as_deref().unwrap_or("for a reason that is not known");
            format!("the pool on `{node}` can not be used: {reason}")
        }
        (PoolLevel::Full, _) => format!("the pool on `{node}` is full ({free} of {of} free): writes wait for space"),
        (_, Some(seconds)) => {
            format!("{free} of {of} are free in the pool on `{node}`, at the present rate for {}", span_text(seconds))
        }
        (_, None) => format!("{free} of {of} are free in the pool on `{node}`"),
    }
}

/// A span of time for people: the largest unit of which it has two.
fn span_text(seconds: u64) -> String {
    for (unit, length) in [("days", 86400), ("hours", 3600), ("minutes", 60)] {
        if seconds >= 2 * length {
            return format!("{} {unit}", seconds / length);
        }
    }
    format!("{seconds} s")
}

/// VMs that would have to move if `node` died, by the log.
fn movers(state: &State, node: NodeId) -> impl Iterator<Item = &Vm> {
    state.vms.values().filter(move |vm| vm.node == node && vm.wanted == Wanted::Running && vm.phase.may_run())
}

/// How many of the VMs of `node` fit on the node that is left, in the order in which they would start; of how many; there.
fn fit(state: &State, node: NodeId) -> Option<(usize, usize, NodeId, Option<&Vm>)> {
    let (target, spec) = state.nodes.iter().find(|(id, _)| **id != node).map(|(id, node)| (*id, &node.spec))?;
    let mut free = spec.memory_bytes.saturating_sub(state.memory_taken(target).0);
    let (mut fits, mut all, mut first_without) = (0, 0, None);
    for vm in movers(state, node) {
        all += 1;
        if vm.spec.memory.0 <= free {
            free -= vm.spec.memory.0;
            fits += 1;
        } else if first_without.is_none() {
            first_without = Some(vm);
        }
    }
    Some((fits, all, target, first_without))
}

/// N+1: whether the survivor has room.
fn room_trouble(state: &State) -> Option<Trouble> {
    for node in state.nodes.keys() {
        let Some((fits, all, target, Some(vm))) = fit(state, *node) else {
            continue;
        };
        let taken = state.memory_taken(target).0;
        let free = state.nodes.get(&target).map_or(0, |node| node.spec.memory_bytes.saturating_sub(taken));
        let reason = format!(
            "if `{}` dies, {fits} of {all} VMs fit on `{}`: it has {} of memory free; `{}` (needs {}) stays down",
            state.node_name(*node),
            state.node_name(target),
            bytes_text(free),
            vm.spec.name,
            bytes_text(vm.spec.memory.0)
        );
        return trouble(Protection::Degraded, reason, "pollux vm list");
    }
    None
}

fn restart_text(state: &State) -> String {
    let is_fenced = state.nodes.values().all(|node| node.spec.power.is_some());
    let seconds = if is_fenced { RESTART_S } else { RESTART_WITHOUT_FENCE_S };
    format!("restart within {seconds} s")
}

fn room_text(state: &State) -> String {
    let fits: Vec<String> = state
        .nodes
        .keys()
        .filter_map(|node| fit(state, *node))
        .filter(|(_, all, ..)| *all > 0)
        .map(|(fits, all, target, _)| format!("{fits} of {all} VMs fit on `{}`", state.node_name(target)))
        .collect();
    if fits.is_empty() { "no VM runs".into() } else { fits.join(", ") }
}

/// ` since 14:02 UTC`, or nothing when it is not known.
pub(crate) fn since_text(unix_ms: u64) -> String {
    if unix_ms == 0 {
        return String::new();
    }
    let minutes = unix_ms / 60_000;
    format!(" since {:02}:{:02} UTC", minutes / 60 % 24, minutes % 60)
}
