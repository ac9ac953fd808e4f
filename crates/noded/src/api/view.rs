//! What the API shows of the core: pure, one function per resource.
//!
//! A status word is never shown before it is true: what this node does not know it does not call healthy.

use crate::fill::escape;
use pollux_api as api;
use pollux_api::{GroupKind, GroupState, NodeState, PoolState, Protection, SnapshotState, SubjectKind, VmState};
use pollux_base::config::{NbdTls, NodeConfig};
use pollux_base::order::{FreezeReason, GroupReport, PathReport, PathState, ReplicaState};
use pollux_base::pool::{DiskReport, DiskState, PoolLevel, PoolReport, VerifyFinding, VerifyReport};
use pollux_base::record::{AtBound, Mode};
use pollux_base::{GroupId, ImageId, NodeId, SnapshotId, VmId, VolumeId};
use pollux_cluster::entry::{NodePhase, Subject, VmPhase, Wanted};
use pollux_cluster::scrubs::ScrubDone;
use pollux_cluster::state::{Group, Owner, State};
use pollux_cluster::{Cluster, Register};

/// What the view needs beside the core.
#[derive(Clone, Debug)]
pub struct Frame {
    pub node: NodeId,
    pub cluster: String,
    pub cluster_name: String,
    pub leader: Option<NodeId>,
    pub voters: Vec<NodeId>,
    /// Address of the witness and what its register held when last asked.
    pub witness: Option<(String, Option<Register>)>,
    pub unix_ms: u64,
}

pub fn status(cluster: &Cluster, frame: &Frame) -> api::Status {
    let state = cluster.state();
    let headline = cluster.headline();
    api::Status {
        cluster: frame.cluster.clone(),
        cluster_name: frame.cluster_name.clone(),
        headline: api::Headline {
            protection: match headline.protection {
                pollux_cluster::Protection::Protected => Protection::Protected,
                pollux_cluster::Protection::Degraded => Protection::Degraded,
                pollux_cluster::Protection::Unprotected => Protection::Unprotected,
            },
            text: headline.text,
            hint: headline.fix,
        },
        epoch: state.authority.epoch.0,
        alone: state.alone().map(|node| state.node_name(node)),
        leader: frame.leader.map(|node| state.node_name(node)),
        answered_by: state.node_name(frame.node),
        unix_ms: frame.unix_ms,
        nodes: nodes(cluster, frame),
        groups: groups(cluster, frame),
        vms: vms(cluster),
        witness: witness(cluster, frame),
    }
}

pub fn nodes(cluster: &Cluster, frame: &Frame) -> Vec<api::Node> {
    let state = cluster.state();
    state.nodes.keys().filter_map(|id| node(cluster, frame, *id)).collect()
}

pub fn node(cluster: &Cluster, frame: &Frame, id: NodeId) -> Option<api::Node> {
    let state = cluster.state();
    let node = state.nodes.get(&id)?;
    let sight = cluster.sight();
    let voter = frame.voters.contains(&id);
    let heard = sight.peers_heard.get(&id).copied().unwrap_or(false);
    let name = &node.spec.name;
    let confirm = || Some(format!("pollux node confirm-down {name}"));
    let (word, reason, hint) = if id == frame.node {
        match (&sight.isolated, voter) {
            (Some(reason), _) => (NodeState::Isolated, Some(reason.clone()), None),
            (None, true) => (NodeState::Online, None, None),
            (None, false) => (NodeState::Joining, Some("it is being taken in".into()), None),
        }
    } else {
        match (node.phase, heard) {
            (NodePhase::Online, true) if voter => (NodeState::Online, None, None),
            (NodePhase::Online, true) => (NodeState::Joining, Some("it is being taken in".into()), None),
            (NodePhase::Online, false) => (NodeState::Suspect, Some("it is not heard".into()), None),
            (NodePhase::Lost, _) => (NodeState::Fencing, Some("it is being made unable to act".into()), confirm()),
            (NodePhase::Fenced, true) => (NodeState::Joining, Some("it is back and is being taken in".into()), None),
            (NodePhase::Fenced, false) => {
                let proof = node.proof.as_ref().map(fence_text);
                (NodeState::Down, proof, Some(format!("switch {name} on")))
            }
        }
    };
    Some(api::Node {
        id: id.0,
        name: name.clone(),
        state: word,
        reason,
        hint,
        leader: frame.leader == Some(id),
        voter,
        api: node.spec.api.clone(),
        power_switch: node.spec.power.is_some(),
        replication: cluster.paths(id).iter().map(path).collect(),
        replication_encrypted: cluster.is_replication_encrypted(),
        memory_bytes: node.spec.memory_bytes,
        memory_used_bytes: state.memory_taken(id).0,
    })
}

fn path(path: &PathReport) -> api::ReplicationPath {
    let (state, reason) = match &path.state {
        PathState::Up => (api::PathState::Up, None),
        PathState::Silent => (api::PathState::Silent, Some("it does not answer".to_owned())),
        PathState::Down { reason } => (api::PathState::Down, Some(reason.clone())),
        PathState::Refused { reason } => (api::PathState::Refused, Some(reason.clone())),
    };
    api::ReplicationPath { address: path.address.clone(), state, reason }
}

fn fence_text(proof: &pollux_cluster::entry::FenceProof) -> String {
    use pollux_cluster::entry::FenceProof;
    match proof {
        FenceProof::PowerOff { uuid } => format!("its power is off (machine {uuid})"),
        FenceProof::GuardBound { waited_ms } => format!("its guard's bound has run out ({waited_ms} ms unheard)"),
        FenceProof::Human { .. } => "a human said so".into(),
    }
}

pub fn pools(cluster: &Cluster) -> Vec<api::Pool> {
    cluster.state().nodes.keys().filter_map(|id| pool(cluster, *id)).collect()
}

/// In a line: how a verification ended.
pub fn verified_text(report: &VerifyReport) -> String {
    match report.counts.values().sum::<u64>() {
        0 => "is clean".into(),
        1 => "one thing was found".into(),
        count => format!("{count} things were found"),
    }
}

/// The verification of this node's pool that was asked for last.
pub fn verification(cluster: &Cluster, node: NodeId) -> Option<api::PoolVerification> {
    let report = cluster.verified()?;
    let finding = |finding: &VerifyFinding| api::PoolFinding {
        code: finding.code.clone(),
        severity: if finding.is_error { api::Severity::Error } else { api::Severity::Warning },
        disk: finding.disk.clone(),
        what: finding.what.clone(),
        fix: finding.fix.clone(),
    };
    Some(api::PoolVerification {
        node: cluster.state().node_name(node),
        done: report.is_done,
        failed: report.failed.clone(),
        percent: f64::from(report.permille) / 10.0,
        findings: report.findings.iter().map(finding).collect(),
        counts: report.counts.clone(),
        disks: report.disks,
        volumes: report.volumes,
        extents: report.extents,
    })
}

pub fn pool(cluster: &Cluster, id: NodeId) -> Option<api::Pool> {
    let node = cluster.state().nodes.get(&id)?.spec.name.clone();
    let known = cluster.pools().remove(&id);
    let pool = known.clone().unwrap_or_default();
    let state = match known.as_ref().map(PoolReport::level) {
        None => PoolState::Unknown,
        Some(PoolLevel::Good) => PoolState::Good,
        Some(PoolLevel::Low) => PoolState::Low,
        Some(PoolLevel::Scarce) => PoolState::Scarce,
        Some(PoolLevel::Full) => PoolState::Full,
        Some(PoolLevel::Failed) => PoolState::Failed,
    };
    let hint = match state {
        PoolState::Good => None,
        PoolState::Unknown => Some(format!("pollux node show {node}")),
        PoolState::Failed => Some("its replicas are made anew on another disk".into()),
        PoolState::Low | PoolState::Scarce | PoolState::Full => Some(format!(
            "delete what is not needed (pollux volume list, pollux image list), or: pollux pool add-disk {node} PATH"
        )),
    };
    let reason = match state {
        PoolState::Good => None,
        PoolState::Unknown => Some("nothing is heard of it".into()),
        _ => Some(pollux_cluster::headline::pool_text(&node, &pool)),
    };
    Some(api::Pool {
        node,
        state,
        reason,
        hint,
        size_bytes: pool.size_bytes,
        used_bytes: pool.used_bytes(),
        free_bytes: pool.free_bytes,
        promised_bytes: pool.promised_bytes,
        growth_bytes_per_s: pool.growth_bytes_per_s,
        full_in_s: pool.full_in_s(),
        healed_blocks: pool.healed_blocks,
        disks: pool.disks.iter().map(disk).collect(),
    })
}

fn disk(disk: &DiskReport) -> api::PoolDisk {
    api::PoolDisk {
        id: disk.disk.to_string(),
        path: disk.path.clone(),
        state: match disk.state {
            DiskState::Healthy => api::PoolDiskState::Healthy,
            DiskState::Draining => api::PoolDiskState::Draining,
            DiskState::Drained => api::PoolDiskState::Drained,
            DiskState::Failed => api::PoolDiskState::Failed,
            DiskState::Missing => api::PoolDiskState::Missing,
        },
        reason: disk.reason.clone(),
        size_bytes: disk.size_bytes,
        capacity_bytes: disk.capacity_bytes,
        used_bytes: disk.used_bytes,
        extents: disk.extents,
        checksum_errors: disk.checksum_errors,
        io_errors: disk.io_errors,
    }
}

pub fn groups(cluster: &Cluster, frame: &Frame) -> Vec<api::Group> {
    cluster.state().groups.keys().filter_map(|id| group(cluster, frame.node, *id)).collect()
}

pub fn group(cluster: &Cluster, here: NodeId, id: GroupId) -> Option<api::Group> {
    let state = cluster.state();
    let group = state.groups.get(&id)?;
    let report = cluster.group_reports().find(|report| report.group == id);
    let refused_key = |volume| cluster.refused_key(volume).map(str::to_owned);
    let (word, reason) = group_state(state, group, report, here, refused_key);
    let names = |nodes: &std::collections::BTreeSet<NodeId>| nodes.iter().map(|node| state.node_name(*node)).collect();
    let resync = report.and_then(|report| report.resync.iter().next()).map(|(node, progress)| api::Resync {
        node: state.node_name(*node),
        percent: percent(progress.extents_total, progress.extents_left),
        extents_total: progress.extents_total,
        extents_left: progress.extents_left,
        sent_bytes: progress.sent_bytes,
        bytes_per_second: progress.bytes_per_second,
        seconds_left: progress.seconds_left,
    });
    let (kind, name) = owner(state, group);
    Some(api::Group {
        id: id.0,
        name,
        kind,
        state: word,
        reason,
        resync,
        scrub: scrub(state, group, report),
        generation: group.record.stamp.generation.0,
        epoch: group.record.stamp.epoch.0,
        primary: state.node_name(group.record.primary),
        in_sync: names(&group.record.in_sync),
        replicas: names(&group.replicas),
        modes: group.replicas.iter().map(|node| mode(group.mode(*node))).collect(),
        lag: lag(state, group, report),
        lag_bound: api::LagBound {
            bytes: group.lag.bytes.0,
            seconds: group.lag.ms / 1000,
            at_bound: match group.lag.at_bound {
                AtBound::Slow => api::AtBound::Slow,
                AtBound::Drop => api::AtBound::Drop,
            },
        },
        moving: group
            .moving
            .map(|moving| api::Moving { from: state.node_name(moving.from), to: state.node_name(moving.to) }),
        volumes: group.volumes.keys().map(|volume| volume.0).collect(),
        used_bytes: report.map(|report| report.used_bytes),
    })
}

fn percent(total: u64, left: u64) -> f64 {
    match total {
        0 => 100.0,
        total => 100.0 * (total - left.min(total)) as f64 / total as f64,
    }
}

fn scrub(state: &State, group: &Group, report: Option<&GroupReport>) -> api::Scrub {
    let running = report.and_then(|report| report.scrub.as_ref()).filter(|scrub| !scrub.is_done);
    api::Scrub {
        every_days: group.scrubs.every_days,
        running: group.scrubs.is_wanted(),
        percent: running.map(|scrub| percent(scrub.extents_total, scrub.extents_left)),
        seconds_left: running.and_then(|scrub| scrub.seconds_left),
        last: group.scrubs.last.as_ref().map(|last| api::ScrubResult {
            ended_unix_ms: last.unix_ms,
            replicas: last.report.replicas.iter().map(|node| state.node_name(*node)).collect(),
            checked_bytes: last.report.checked_bytes,
            rotten_blocks: last.report.rotten_blocks,
            differing_blocks: last.report.differing_blocks,
            healed_blocks: last.report.healed_blocks,
            lost_blocks: last.report.lost_blocks,
        }),
    }
}

/// How far a scrub is; none if nothing is known of it here.
pub fn scrub_text(cluster: &Cluster, group: GroupId) -> Option<String> {
    let report = cluster.group_reports().find(|report| report.group == group)?;
    let Some(scrub) = report.scrub.as_ref().filter(|scrub| !scrub.is_done) else {
        let primary = cluster.state().groups.get(&group).map(|group| group.record.primary)?;
        return Some(format!("{} leads it", cluster.state().node_name(primary)));
    };
    let left = scrub.seconds_left.map_or(String::new(), |seconds| format!(", about {seconds} s left"));
    Some(format!("{:.0} % is read{left}", percent(scrub.extents_total, scrub.extents_left)))
}

/// What a scrub found.
pub fn scrub_result_text(state: &State, done: &ScrubDone) -> String {
    state.scrubbed_text(&done.report)
}

fn mode(mode: Mode) -> api::Mode {
    match mode {
        Mode::Sync => api::Mode::Sync,
        Mode::Memory => api::Mode::Memory,
        Mode::Async => api::Mode::Async,
    }
}

/// Of replicas that trail now, as the primary or the replica itself says.
fn lag(state: &State, group: &Group, report: Option<&GroupReport>) -> Vec<api::Lag> {
    let lags = report.into_iter().flat_map(|report| report.lag.iter().map(move |(node, lag)| (report, node, lag)));
    lags.filter(|(report, node, _)| group.mode(**node) == Mode::Async && !report.resync.contains_key(node))
        .map(|(report, node, lag)| api::Lag {
            node: state.node_name(*node),
            bytes: lag.bytes,
            ms: lag.ms,
            slows: report.is_slowed,
        })
        .collect()
}

fn owner(state: &State, group: &Group) -> (GroupKind, String) {
    let kind = match group.owner {
        Owner::Vm(_) => GroupKind::Vm,
        Owner::Image(_) => GroupKind::Image,
        Owner::Volume(_) => GroupKind::Volume,
    };
    (kind, state.group_name(group))
}

/// The group's word as this node may truly say it.
fn group_state(
    state: &State,
    group: &Group,
    report: Option<&GroupReport>,
    here: NodeId,
    refused_key: impl Fn(VolumeId) -> Option<String>,
) -> (GroupState, Option<String>) {
    let name = |node: NodeId| state.node_name(node);
    let trails = |node: &NodeId| group.modes.get(node) == Some(&Mode::Async);
    let missing = group.replicas.difference(&group.record.in_sync).filter(|node| !trails(node));
    let missing: Vec<String> = missing.map(|node| name(*node)).collect();
    let primary = name(group.record.primary);
    if !group.replicas.contains(&here) && group.record.primary != here {
        return match missing.is_empty() {
            true => (GroupState::Healthy, Some(format!("by the log; {} carries no replica", name(here)))),
            false => (GroupState::Degraded, Some(format!("no current replica on {}", missing.join(", ")))),
        };
    }
    let Some(report) = report else {
        return (GroupState::Degraded, Some(format!("nothing is known of the replica on {}", name(here))));
    };
    let is_old = report.stamp.is_some_and(|stamp| stamp < group.record.stamp);
    match &report.state {
        ReplicaState::Failed { reason } => (GroupState::Failed, Some(format!("on {}: {reason}", name(here)))),
        ReplicaState::Diverged { .. } => (
            GroupState::Failed,
            Some(format!("the replica on {} holds writes that the truth lacks; a human must choose", name(here))),
        ),
        ReplicaState::Frozen { reason } => (GroupState::Frozen, Some(freeze_text(state, reason, refused_key))),
        ReplicaState::Opening => (GroupState::Frozen, Some(format!("the pool on {} is being opened", name(here)))),
        ReplicaState::Serving if !report.resync.is_empty() => {
            let targets: Vec<String> = report.resync.keys().map(|node| name(*node)).collect();
            let targets = targets.join(", ");
            let text = match report.resync.keys().all(|node| group.record.in_sync.contains(node)) {
                true => format!("what was being written at a restart is compared with {targets}"),
                false => format!("{targets} is being brought up to date"),
            };
            (GroupState::Resyncing, Some(text))
        }
        ReplicaState::Absent => (GroupState::Healthy, None),
        ReplicaState::Stale => {
            let connected = report.connected.contains(&group.record.primary);
            let word = if connected { GroupState::Degraded } else { GroupState::Stale };
            (word, Some(format!("the replica on {} lacks writes; {primary} has them", name(here))))
        }
        ReplicaState::Serving | ReplicaState::Secondary | ReplicaState::Trailing { .. } => {
            if !missing.is_empty() {
                (GroupState::Degraded, Some(format!("no current replica on {}", missing.join(", "))))
            } else if is_old {
                (
                    GroupState::Degraded,
                    Some(format!("the newest record has not reached the data plane on {}", name(here))),
                )
            } else {
                let others = group.replicas.iter().filter(|node| **node != here);
                let lost: Vec<String> =
                    others.filter(|node| !report.connected.contains(node)).map(|node| name(*node)).collect();
                if lost.is_empty() {
                    (GroupState::Healthy, None)
                } else {
                    (GroupState::Degraded, Some(format!("no connection to the replica on {}", lost.join(", "))))
                }
            }
        }
    }
}

fn freeze_text(state: &State, reason: &FreezeReason, refused_key: impl Fn(VolumeId) -> Option<String>) -> String {
    match reason {
        FreezeReason::OldPrimaryLease { node } => {
            format!("the lease given to {} has not run out yet", state.node_name(*node))
        }
        FreezeReason::NoLease { node } => format!("{} grants no lease", state.node_name(*node)),
        FreezeReason::ReplicaLost { node } => {
            format!("the replica on {} is lost, and going on without it is not committed yet", state.node_name(*node))
        }
        FreezeReason::Settling { node } => {
            format!("writes of before a restart are being settled with {}", state.node_name(*node))
        }
        FreezeReason::Recording => "the record is being made durable".into(),
        FreezeReason::Snapshot => "a snapshot is being taken".into(),
        FreezeReason::Outdated => "the authority has moved on".into(),
        FreezeReason::PoolFull => "the pool is full".into(),
        FreezeReason::NoKey { volume } => {
            let name = state.volumes.get(volume).map_or_else(|| volume.to_string(), |volume| volume.name.clone());
            let why =
                refused_key(*volume).unwrap_or_else(|| "this node has not handed it to its data plane yet".into());
            format!("`{name}` is encrypted, and its key is not here: {why}")
        }
    }
}

pub fn vms(cluster: &Cluster) -> Vec<api::Vm> {
    cluster.state().vms.keys().filter_map(|id| vm(cluster, *id)).collect()
}

pub fn vm(cluster: &Cluster, id: VmId) -> Option<api::Vm> {
    let state = cluster.state();
    let vm = state.vms.get(&id)?;
    let blocked = cluster.vm_blocked(id);
    let wants = vm.wanted == Wanted::Running;
    let word = match vm.phase {
        VmPhase::Running => VmState::Running,
        VmPhase::Starting => VmState::Starting,
        VmPhase::Stopping => VmState::Stopping,
        VmPhase::Failed => VmState::Failed,
        VmPhase::Stopped | VmPhase::Recovering if wants && blocked.is_some() => VmState::Blocked,
        VmPhase::Recovering => VmState::Recovering,
        VmPhase::Stopped if wants => VmState::Starting,
        VmPhase::Stopped => VmState::Stopped,
    };
    let copying = (!vm.filled).then(|| "its image is copied into its disk".to_string());
    let reason = blocked.or(copying).or_else(|| Some(vm.reason.clone()).filter(|reason| !reason.is_empty()));
    Some(api::Vm {
        id: id.0,
        name: vm.spec.name.clone(),
        state: word,
        reason,
        wanted: if wants { api::Wanted::Running } else { api::Wanted::Stopped },
        node: state.node_name(vm.node),
        incarnation: vm.incarnation.0,
        cpus: vm.spec.cpus,
        memory_bytes: vm.spec.memory.0,
        image: vm.spec.image.and_then(|image| state.images.get(&image)).map(|image| image.name.clone()),
        mac: vm.spec.mac.clone(),
        group: vm.group.0,
        disks: vm.volumes.iter().map(|volume| volume.0).collect(),
        // All of them, or none.
        encrypted: vm.volumes.iter().any(|volume| state.volumes.get(volume).is_some_and(|disk| disk.key.is_some())),
        resync: self::group(cluster, vm.node, vm.group).and_then(|group| group.resync),
    })
}

pub fn volumes(cluster: &Cluster, config: &NodeConfig) -> Vec<api::Volume> {
    cluster.state().volumes.keys().filter_map(|id| volume(cluster, config, *id)).collect()
}

pub fn volume(cluster: &Cluster, config: &NodeConfig, id: VolumeId) -> Option<api::Volume> {
    let state = cluster.state();
    let volume = state.volumes.get(&id)?;
    let group = state.groups.get(&volume.group)?;
    let shown = self::group(cluster, config.node, volume.group)?;
    let (kind, owner) = owner(state, group);
    Some(api::Volume {
        id: id.0,
        name: volume.name.clone(),
        size_bytes: volume.size.0,
        group: volume.group.0,
        state: shown.state,
        resync: shown.resync,
        scrub: shown.scrub,
        primary: shown.primary,
        snapshot: volume.snapshot.map(|snapshot| state.snapshot_name(snapshot)),
        encrypted: volume.key.is_some(),
        vm: (kind == GroupKind::Vm).then(|| owner.clone()),
        image: (kind == GroupKind::Image).then_some(owner),
        uris: if volume.exported { uris_of_all(config, group.record.primary, &volume.name) } else { Vec::new() },
    })
}

/// Where other machines reach the volume: at its primary, and where it goes if that is lost.
/// Addresses of an export, the primary's node first.
fn uris_of_all(config: &NodeConfig, primary: NodeId, name: &str) -> Vec<String> {
    let mut nodes: Vec<NodeId> = config.nodes.iter().map(|node| node.node).collect();
    nodes.sort_by_key(|node| *node != primary);
    uris(config, &nodes, name)
}

/// Addresses of an export at these nodes.
pub fn uris(config: &NodeConfig, at: &[NodeId], name: &str) -> Vec<String> {
    let scheme = if config.nbd_tls == NbdTls::Plain { "nbd" } else { "nbds" };
    at.iter()
        .filter_map(|node| config.nodes.iter().find(|known| known.node == *node))
        .flat_map(|node| node.nbd.iter())
        .map(|address| format!("{scheme}://{address}/{}", escape(name)))
        .collect()
}

pub fn snapshots(cluster: &Cluster) -> Vec<api::Snapshot> {
    cluster.state().snapshots.keys().filter_map(|id| snapshot(cluster, *id)).collect()
}

pub fn snapshot(cluster: &Cluster, id: SnapshotId) -> Option<api::Snapshot> {
    let state = cluster.state();
    let snapshot = state.snapshots.get(&id)?;
    let group = state.groups.get(&snapshot.group)?;
    let frozen = group.snapshots.each.get(&id)?;
    Some(api::Snapshot {
        id: id.0,
        name: state.snapshot_name(id),
        state: if frozen.taken.is_some() { SnapshotState::Taken } else { SnapshotState::Taking },
        of: state.group_name(group),
        unix_ms: snapshot.unix_ms,
        group: snapshot.group.0,
        volumes: frozen.volumes.keys().filter_map(|id| Some(state.volumes.get(id)?.name.clone())).collect(),
    })
}

pub fn images(cluster: &Cluster) -> Vec<api::Image> {
    cluster.state().images.keys().filter_map(|id| image(cluster, *id)).collect()
}

pub fn image(cluster: &Cluster, id: ImageId) -> Option<api::Image> {
    let state = cluster.state();
    let image = state.images.get(&id)?;
    Some(api::Image {
        id: id.0,
        name: image.name.clone(),
        size_bytes: image.size.0,
        ready: image.sha256.is_some(),
        sha256: image.sha256.clone(),
        group: image.group.0,
        volume: image.volume.0,
        encrypted: state.volumes.get(&image.volume).is_some_and(|volume| volume.key.is_some()),
    })
}

/// Events after `since`, oldest first; at most the newest `limit`. None: of all subjects.
pub fn events(cluster: &Cluster, subjects: Option<&[Subject]>, since: u64, limit: usize) -> Vec<api::Event> {
    let state = cluster.state();
    let mut events: Vec<api::Event> = state
        .events
        .iter()
        .filter(|event| event.index > since && subjects.is_none_or(|subjects| subjects.contains(&event.subject)))
        .map(|event| api::Event {
            index: event.index,
            unix_ms: event.unix_ms,
            by: state.node_name(event.by),
            subject: subject(state, event.subject),
            text: event.text.clone(),
        })
        .collect();
    events.drain(..events.len().saturating_sub(limit));
    events
}

fn subject(state: &State, subject: Subject) -> api::Subject {
    let (kind, id, name) = match subject {
        Subject::Cluster => (SubjectKind::Cluster, None, Some(state.name.clone())),
        Subject::Node(id) => (SubjectKind::Node, Some(id.0), Some(state.node_name(id))),
        Subject::Group(id) => {
            (SubjectKind::Group, Some(id.0), state.groups.get(&id).map(|group| owner(state, group).1))
        }
        Subject::Volume(id) => {
            (SubjectKind::Volume, Some(id.0), state.volumes.get(&id).map(|volume| volume.name.clone()))
        }
        Subject::Vm(id) => (SubjectKind::Vm, Some(id.0), state.vms.get(&id).map(|vm| vm.spec.name.clone())),
        Subject::Image(id) => (SubjectKind::Image, Some(id.0), state.images.get(&id).map(|image| image.name.clone())),
    };
    api::Subject { kind, id, name: name.unwrap_or_else(|| "(deleted)".into()) }
}

pub fn witness(cluster: &Cluster, frame: &Frame) -> Option<api::Witness> {
    let (address, register) = frame.witness.clone()?;
    let state = cluster.state();
    let (reachable, since, error) = match cluster.sight().witness {
        None => (None, None, None),
        Some(Ok(())) => (Some(true), None, None),
        Some(Err((since, reason))) => (Some(false), Some(since), Some(reason)),
    };
    Some(api::Witness {
        address,
        reachable,
        since_unix_ms: since,
        epoch: register.map(|register| register.epoch.0),
        alone: register.and_then(|register| register.alone).map(|node| state.node_name(node)),
        hint: error.as_ref().map(|_| "Is `pollux-witness` running, and does the network reach it?".to_string()),
        error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use pollux_base::record::{LagBound, Lineage};
    use pollux_base::{Epoch, Generation, GroupRecord, Stamp};
    use std::collections::{BTreeMap, BTreeSet};

    const A: NodeId = NodeId(1);
    const B: NodeId = NodeId(2);

    fn stamp(generation: u64) -> Stamp {
        Stamp { epoch: Epoch(1), generation: Generation(generation) }
    }

    fn group(in_sync: &[NodeId]) -> Group {
        Group {
            owner: Owner::Volume(VolumeId(2)),
            replicas: BTreeSet::from([A, B]),
            modes: BTreeMap::new(),
            lag: LagBound::default(),
            volumes: BTreeMap::new(),
            record: GroupRecord { stamp: stamp(2), primary: A, in_sync: in_sync.iter().copied().collect() },
            snapshots: Default::default(),
            lineage: Lineage::default(),
            discards: BTreeMap::new(),
            scrubs: pollux_cluster::scrubs::Scrubs::default(),
            moving: None,
        }
    }

    fn report(generation: u64, state: ReplicaState, connected: &[NodeId]) -> GroupReport {
        GroupReport {
            group: GroupId(1),
            stamp: Some(stamp(generation)),
            state,
            used_bytes: 0,
            is_unborn: false,
            is_incomplete: false,
            healed_blocks: 0,
            resync: BTreeMap::new(),
            scrub: None,
            findings: Vec::new(),
            connected: connected.iter().copied().collect(),
            lag: BTreeMap::new(),
            is_slowed: false,
        }
    }

    fn word(group: &Group, report: Option<GroupReport>, here: NodeId) -> GroupState {
        group_state(&State::default(), group, report.as_ref(), here, |_| None).0
    }

    #[test]
    fn a_group_is_healthy_only_when_this_node_knows_it() {
        let whole = group(&[A, B]);
        let serving = ReplicaState::Serving;
        assert_eq!(word(&whole, Some(report(2, serving.clone(), &[B])), A), GroupState::Healthy);
        assert_eq!(word(&whole, Some(report(2, ReplicaState::Secondary, &[A])), B), GroupState::Healthy);
        assert_eq!(word(&whole, None, A), GroupState::Degraded, "nothing is known");
        assert_eq!(word(&whole, Some(report(2, serving.clone(), &[])), A), GroupState::Degraded, "not connected");
        assert_eq!(word(&whole, Some(report(1, serving.clone(), &[B])), A), GroupState::Degraded, "an old record");
        assert_eq!(word(&group(&[A]), Some(report(2, serving, &[B])), A), GroupState::Degraded, "one is not in sync");
        let frozen = ReplicaState::Frozen { reason: FreezeReason::Recording };
        assert_eq!(word(&whole, Some(report(2, frozen, &[B])), A), GroupState::Frozen);
        assert_eq!(word(&group(&[A]), Some(report(2, ReplicaState::Stale, &[])), B), GroupState::Stale);
    }

    #[test]
    fn a_group_that_is_brought_up_to_date_says_so() {
        let mut resyncing = report(2, ReplicaState::Serving, &[B]);
        let progress = pollux_base::order::ResyncProgress {
            extents_total: 4,
            extents_left: 1,
            sent_bytes: 9,
            bytes_per_second: 0,
            seconds_left: None,
        };
        resyncing.resync.insert(B, progress);
        assert_eq!(word(&group(&[A]), Some(resyncing), A), GroupState::Resyncing);
    }
}
