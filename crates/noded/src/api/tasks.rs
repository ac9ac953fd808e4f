//! Tasks: requests on their way to the state they asked for.
//!
//! A task is watched, never driven: what it waits for is the core's business, and comes about (or not) whether or not
//! anybody waits.

use super::view;
use crate::core::{Core, unix_ms};
use pollux_api::{ApiError, ErrorCode, Task, TaskState};
use pollux_base::pool::DiskState;
use pollux_base::record::Mode;
use pollux_base::{DiskId, GroupId, ImageId, KeyId, NodeId, SnapshotId, VmId, VolumeId};
use pollux_cluster::Cluster;
use pollux_cluster::entry::{NodePhase, VmPhase};
use pollux_cluster::state::State;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;

/// Tasks kept after they have ended; the oldest goes first.
const ENDED_MAX: usize = 1000;
/// Tasks under way at once. More are refused: each is looked after by a task of its own.
const RUNNING_MAX: usize = 200;
/// A task is looked at again at least so often, and at most a few times a second.
const LOOK_EVERY: Duration = Duration::from_secs(2);
const LOOK_PAUSE: Duration = Duration::from_millis(100);
/// A goal that is not reached after this is given up as a task; the wish stands.
const TASK_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// What a task waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Committed is all there is to it.
    Committed,
    VmRunning(VmId),
    VmStopped(VmId),
    /// Created, and its first disk holds its image.
    VmReady(VmId),
    VmGone(VmId),
    VolumeGone(VolumeId),
    SnapshotTaken(SnapshotId),
    SnapshotGone(SnapshotId),
    VolumeCloned(VolumeId),
    VmCloned(VmId),
    ImageReady(ImageId),
    ImageGone(ImageId),
    /// A scrub of this number.
    Scrubbed(GroupId, u64),
    /// The replica is in sync, or trails.
    ReplicaIsThere(GroupId, NodeId),
    /// The replica is on the second node and not on the first any more.
    ReplicaMoved(GroupId, NodeId, NodeId),
    /// A node that a human says is down.
    NodeDown(NodeId),
    /// Nothing is left on this disk of the node's pool.
    DiskDrained(NodeId, DiskId),
    /// All keys of volumes are sealed under this master key.
    KeysSealed(KeyId),
    /// This node's pool was verified, by the run of this number.
    PoolVerified(u64),
}

/// How far a goal is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    Done(String),
    Waiting(String),
    Failed(String),
}

/// How far the goal is, by what the core knows now.
pub fn progress(goal: Goal, cluster: &Cluster) -> Progress {
    use Progress::{Done, Failed, Waiting};
    let state = cluster.state();
    match goal {
        Goal::Committed => Done("done".into()),
        Goal::VmRunning(id) => match state.vms.get(&id) {
            None => Failed("it was deleted".into()),
            Some(vm) => match vm.phase {
                VmPhase::Running => Done(format!("runs on {}", state.node_name(vm.node))),
                VmPhase::Failed => Failed(vm.reason.clone()),
                _ if vm.wanted != pollux_cluster::entry::Wanted::Running => Failed("it was stopped meanwhile".into()),
                _ => Waiting(cluster.vm_blocked(id).unwrap_or_else(|| vm.reason.clone())),
            },
        },
        Goal::VmStopped(id) => match state.vms.get(&id) {
            None => Done("it was deleted".into()),
            Some(vm) => match vm.phase {
                VmPhase::Stopped | VmPhase::Failed => Done("is stopped".into()),
                _ if vm.wanted == pollux_cluster::entry::Wanted::Running => Failed("it was started meanwhile".into()),
                _ => Waiting(vm.reason.clone()),
            },
        },
        Goal::VmReady(id) => match state.vms.get(&id) {
            None => Failed("it was deleted".into()),
            Some(vm) if vm.filled => Done("is ready".into()),
            Some(vm) => {
                Waiting(cluster.vm_blocked(id).unwrap_or_else(|| format!("its image is copied: {}", vm.reason)))
            }
        },
        Goal::VmGone(id) => gone(!state.vms.contains_key(&id)),
        Goal::VolumeGone(id) => gone(!state.volumes.contains_key(&id)),
        Goal::SnapshotGone(id) => gone(!state.snapshots.contains_key(&id)),
        Goal::SnapshotTaken(id) => match state.snapshots.get(&id).and_then(|found| state.groups.get(&found.group)) {
            None => Failed("it could not be taken; `pollux event list` says why".into()),
            Some(group) if group.snapshots.untaken().is_none_or(|(other, _)| other != id) => Done("is taken".into()),
            Some(_) => Waiting("its primary has every replica take it".into()),
        },
        Goal::VolumeCloned(id) => cloned(state, state.volumes.get(&id).map(|volume| volume.group)),
        Goal::VmCloned(id) => cloned(state, state.vms.get(&id).map(|vm| vm.group)),
        Goal::ImageGone(id) => gone(!state.images.contains_key(&id)),
        Goal::ImageReady(id) => match state.images.get(&id) {
            None => Failed("it was deleted".into()),
            Some(image) if image.sha256.is_some() => Done("can be used".into()),
            Some(_) => Waiting("its bytes are copied into the pool".into()),
        },
        Goal::Scrubbed(group, id) => match state.groups.get(&group) {
            None => Failed("it was deleted".into()),
            Some(found) => match &found.scrubs.last {
                Some(last) if last.report.id >= id => Done(view::scrub_result_text(state, last)),
                _ => Waiting(view::scrub_text(cluster, group).unwrap_or_else(|| "it begins".into())),
            },
        },
        Goal::ReplicaIsThere(id, node) => match state.groups.get(&id) {
            None => Failed("it was deleted".into()),
            Some(group) if !group.replicas.contains(&node) => Failed("it was removed meanwhile".into()),
            Some(group) if group.record.in_sync.contains(&node) => Done("is in sync".into()),
            // How far it is only its primary knows.
            Some(group) if group.mode(node) == Mode::Async => Done("is being brought up to date, then trails".into()),
            Some(_) => Waiting(format!("{} is being brought up to date", state.node_name(node))),
        },
        Goal::ReplicaMoved(id, from, to) => match state.groups.get(&id) {
            None => Failed("it was deleted".into()),
            Some(group) if !group.replicas.contains(&from) => Done("has moved".into()),
            Some(group) if group.moving.is_none() => Failed("it was cancelled".into()),
            Some(_) => Waiting(format!("{} is being brought up to date", state.node_name(to))),
        },
        Goal::DiskDrained(node, disk) => {
            let pool = cluster.pools().remove(&node);
            let Some(pool) = pool else { return Waiting("its node's data plane is not heard".into()) };
            match pool.disks.iter().find(|known| known.disk == disk) {
                None => Done("it was removed".into()),
                Some(known) => match known.state {
                    DiskState::Drained => Done(format!(
                        "is drained; `pollux pool remove-disk {} {disk}` takes it out of the pool",
                        state.node_name(node)
                    )),
                    DiskState::Draining => {
                        let left = pollux_base::unit::bytes_text(known.used_bytes);
                        let why = known.reason.as_ref().map_or_else(String::new, |reason| format!(": {reason}"));
                        Waiting(format!("{left} in {} extents are left on it{why}", known.extents))
                    }
                    DiskState::Healthy => Failed("it is not drained any more".into()),
                    DiskState::Failed | DiskState::Missing => Failed("it failed".into()),
                },
            }
        }
        Goal::KeysSealed(master) if state.sealing.is_none_or(|sealing| sealing.master != master) => {
            Failed("the master key was exchanged again meanwhile".into())
        }
        Goal::KeysSealed(master) => {
            let counts = state.keys_by_master();
            let all = counts.get(&master).copied().unwrap_or(0);
            match counts.values().sum::<usize>() - all {
                0 => Done(format!("all keys ({all}) are sealed under {master}")),
                left => Waiting(format!("{left} keys are left")),
            }
        }
        Goal::PoolVerified(id) => match cluster.verified() {
            None => Failed("the node's data plane was restarted; ask again".into()),
            Some(report) if report.id != id => Failed("somebody else asked, too: look at that one".into()),
            Some(report) => match &report.failed {
                Some(reason) => Failed(reason.clone()),
                None if report.is_done => Done(view::verified_text(report)),
                None => Waiting(format!("{} % is looked at", report.permille / 10)),
            },
        },
        Goal::NodeDown(node) => match state.nodes.get(&node).map(|node| node.phase) {
            Some(NodePhase::Fenced) | None => Done("is down; its VMs restart elsewhere".into()),
            Some(_) => Waiting("this node takes over".into()),
        },
    }
}

/// Whether a group that is born as a copy is there.
fn cloned(state: &State, group: Option<GroupId>) -> Progress {
    match group.and_then(|group| state.groups.get(&group)) {
        None => Progress::Failed("it was deleted".into()),
        Some(group) if group.snapshots.origins.is_empty() => Progress::Done("is cloned".into()),
        Some(_) => Progress::Waiting("every replica makes its copy".into()),
    }
}

fn gone(is_gone: bool) -> Progress {
    if is_gone { Progress::Done("is deleted".into()) } else { Progress::Waiting("it is being deleted".into()) }
}

/// The tasks of this node.
#[derive(Clone)]
pub struct Tasks {
    node: NodeId,
    core: Core,
    tasks: Arc<Mutex<Kept>>,
}

#[derive(Default)]
struct Kept {
    last: u64,
    tasks: BTreeMap<u64, watch::Sender<Task>>,
}

impl Tasks {
    pub fn new(node: NodeId, core: Core) -> Tasks {
        Tasks { node, core, tasks: Arc::default() }
    }

    /// A new task, not yet looked after by anyone.
    pub fn begin(&self, action: &str, subject: &str, id: Option<u64>) -> Result<watch::Sender<Task>, ApiError> {
        let mut kept = self.lock();
        let running = kept.tasks.values().filter(|task| task.borrow().state == TaskState::Running).count();
        if running >= RUNNING_MAX {
            return Err(ApiError::new(ErrorCode::TooMuch, format!("{running} tasks are under way already")));
        }
        if kept.tasks.len() >= ENDED_MAX + RUNNING_MAX {
            let oldest =
                kept.tasks.iter().find(|(_, task)| task.borrow().state != TaskState::Running).map(|(id, _)| *id);
            oldest.and_then(|oldest| kept.tasks.remove(&oldest));
        }
        kept.last += 1;
        let number = kept.last;
        let task = Task {
            task: format!("{}-{number}", self.node),
            action: action.into(),
            subject: subject.into(),
            state: TaskState::Running,
            detail: "begins".into(),
            id,
            started_unix_ms: unix_ms(),
            ended_unix_ms: None,
            error: None,
        };
        let (sender, _) = watch::channel(task);
        kept.tasks.insert(number, sender.clone());
        Ok(sender)
    }

    /// A task that ends when the goal is reached.
    pub fn watch(&self, action: &str, subject: &str, id: Option<u64>, goal: Goal) -> Result<String, ApiError> {
        let task = self.begin(action, subject, id)?;
        let name = task.borrow().task.clone();
        tokio::spawn(look_after(task, goal, self.core.clone()));
        Ok(name)
    }

    /// The task of this name, as it goes on. `Err(Some(node))`: another node keeps it.
    pub fn find(&self, name: &str) -> Result<watch::Receiver<Task>, Option<NodeId>> {
        let (node, number) = name.strip_prefix('n').and_then(|rest| rest.split_once('-')).ok_or(None)?;
        let (node, number) = (node.parse().map_err(|_| None)?, number.parse::<u64>().map_err(|_| None)?);
        if NodeId(node) != self.node {
            return Err(Some(NodeId(node)));
        }
        self.lock().tasks.get(&number).map(watch::Sender::subscribe).ok_or(None)
    }

    /// Newest first.
    pub fn list(&self) -> Vec<Task> {
        self.lock().tasks.values().rev().map(|task| task.borrow().clone()).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.tasks.lock().expect("nothing panics while holding this lock")
    }
}

/// Ends a task well.
pub fn done(task: &watch::Sender<Task>, detail: impl Into<String>) {
    task.send_modify(|task| {
        task.state = TaskState::Done;
        task.detail = detail.into();
        task.ended_unix_ms = Some(unix_ms());
    });
}

/// Ends a task badly.
pub fn fail(task: &watch::Sender<Task>, error: ApiError) {
    task.send_modify(|task| {
        task.state = TaskState::Failed;
        task.detail = error.error.clone();
        task.error = Some(error);
        task.ended_unix_ms = Some(unix_ms());
    });
}

/// Looks at the goal whenever something has changed, until it is reached or can not be.
pub async fn look_after(task: watch::Sender<Task>, goal: Goal, core: Core) {
    let mut changes = core.changes();
    let until = tokio::time::Instant::now() + TASK_TIMEOUT;
    loop {
        changes.borrow_and_update();
        match core.ask(move |cluster| progress(goal, cluster)).await {
            Ok(Progress::Done(detail)) => return done(&task, detail),
            Ok(Progress::Failed(reason)) => return fail(&task, ApiError::new(ErrorCode::Conflict, reason)),
            Ok(Progress::Waiting(reason)) => {
                task.send_if_modified(|task| {
                    let changed = task.detail != reason;
                    task.detail = reason;
                    changed
                });
            }
            Err(error) => return fail(&task, error),
        }
        if tokio::time::Instant::now() > until {
            return fail(&task, ApiError::new(ErrorCode::TimedOut, "not reached within a day"));
        }
        tokio::time::sleep(LOOK_PAUSE).await;
        let _ = tokio::time::timeout(LOOK_EVERY, changes.changed()).await;
    }
}
