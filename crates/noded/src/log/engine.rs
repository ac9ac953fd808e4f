//! The log's life on this node: born, followed, forced, given up, filled anew.
//!
//! One task owns the engine; what the core asks of it comes in order. What it tells the core goes through one channel: the
//! entries, the snapshots and the changes of leader and voters.

use super::machine::Shared;
use super::network::{Links, LogCall, Transport, serve};
use super::raft_store::LogStore;
use super::store::{Session, Store, StoreError, members};
use super::{LogTypes, Raft};
use crate::peers::{Envelope, Gate, Refusal};
use anyhow::{Context, Result};
use openraft::{ChangeMembers, Config, EmptyNode, SnapshotPolicy};
use pollux_base::{Epoch, NodeId};
use pollux_cluster::{Entry, Input};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// The leader is heard this often, and a call of the log may take so long (openraft uses one number for both). Longer
/// than a sync on a disk that is shared with guests under software emulation.
const HEARTBEAT_MS: u64 = 400;
/// A leader not heard for this long is replaced. Who may decide is settled by the core's own, faster means when a whole
/// node is lost; this is for a `noded` that is gone while its node lives.
const ELECTION_MS: (u64, u64) = (1500, 3000);
/// A piece of a snapshot must be taken within this.
const SNAPSHOT_MS: u64 = 2000;
/// Entries between two snapshots, and entries kept behind one. An entry is about 300 bytes, and replaying one takes some
/// microseconds.
const ENTRIES_PER_SNAPSHOT: u64 = 1000;
const ENTRIES_KEPT: u64 = 200;
/// Taking a node in is given up after this, and asked again by the core.
const TAKE_IN_TIMEOUT: Duration = Duration::from_secs(15);
/// A forced log has a leader at once; after this it is nudged.
const FORCED_LEADER_WAIT: Duration = Duration::from_millis(500);
/// What the core may ask at once.
const COMMANDS_MAX: usize = 256;

/// What the core asks of the log.
#[derive(Debug)]
pub enum Command {
    Init {
        voters: Vec<NodeId>,
    },
    /// As the leader only: forwarding is the sender's part.
    Propose(Entry),
    ForceAlone {
        epoch: Epoch,
    },
    GiveUp {
        epoch: Epoch,
    },
    TakeIn {
        node: NodeId,
    },
}

/// The log as the rest of the node holds it.
#[derive(Clone)]
pub struct Log {
    commands: mpsc::Sender<Command>,
    raft: watch::Receiver<Option<Raft>>,
    store: Arc<Store>,
    gate: Arc<Gate>,
}

/// The log's task before it is started: the core, which it tells of everything, needs the log's handle first.
pub struct LogTask {
    node: NodeId,
    store: Arc<Store>,
    gate: Arc<Gate>,
    commands: mpsc::Receiver<Command>,
    raft: watch::Sender<Option<Raft>>,
}

/// Makes the log's handle and its task.
pub fn prepare(node: NodeId, store: Arc<Store>, gate: Arc<Gate>) -> (Log, LogTask) {
    let (commands, commands_in) = mpsc::channel(COMMANDS_MAX);
    let (raft_out, raft) = watch::channel(None);
    let log = Log { commands, raft, store: store.clone(), gate: gate.clone() };
    (log, LogTask { node, store, gate, commands: commands_in, raft: raft_out })
}

impl LogTask {
    /// Starts the log. `fatal` is told when it can not go on.
    pub async fn start<T: Transport>(
        self,
        transport: Arc<T>,
        core: mpsc::Sender<Input>,
        fatal: mpsc::Sender<String>,
    ) -> Result<()> {
        let session = Session::begin(&self.store);
        let shared = Shared::load(&session, core.clone()).await.context("cannot read the log's snapshot")?;
        let mut engine = Engine {
            node: self.node,
            store: self.store,
            gate: self.gate,
            transport,
            core,
            fatal,
            shared,
            raft: self.raft,
            taking_in: None,
            told: None,
        };
        engine.begin().await?;
        tokio::spawn(engine.run(self.commands));
        Ok(())
    }
}

impl Log {
    /// Hands a command to the log's task. If it is too busy the command is dropped: the core asks again.
    pub fn command(&self, command: Command) {
        if let Err(error) = self.commands.try_send(command) {
            tracing::warn!("the log is busy: {error}");
        }
    }

    /// The node that leads the log, as far as is known.
    pub fn leader(&self) -> Option<NodeId> {
        let raft = self.raft.borrow().clone();
        raft.and_then(|raft| raft.server_metrics().borrow().current_leader).map(NodeId)
    }

    /// The nodes with a vote, as far as is known.
    pub fn voters(&self) -> Vec<NodeId> {
        let raft = self.raft.borrow().clone();
        raft.map(|raft| members(&raft.server_metrics().borrow().membership_config).0).unwrap_or_default()
    }

    /// Ends the log's task, as at the end of the process; for tests.
    #[cfg(test)]
    pub async fn shutdown(&self) {
        let raft = self.raft.borrow().clone();
        if let Some(raft) = raft {
            let _ = raft.shutdown().await;
        }
    }

    /// Carries out another node's call.
    pub async fn serve(&self, call: Envelope<LogCall>) -> Result<serde_json::Value, Refusal> {
        if self.gate.check_lineage(&call)? {
            // Nothing of this log is here yet: from now on it is the caller's.
            let (store, lineage) = (self.store.clone(), call.lineage);
            let adopted = tokio::task::spawn_blocking(move || store.adopt_lineage(lineage)).await;
            match adopted {
                Ok(Ok(lineage)) => self.gate.set_lineage(lineage),
                Ok(Err(error)) => return Err(Refusal::NotNow(error.to_string())),
                Err(error) => return Err(Refusal::NotNow(error.to_string())),
            }
        }
        let raft = self.raft.borrow().clone();
        let raft = raft.ok_or_else(|| Refusal::NotNow("the log is being restarted".into()))?;
        serve(&raft, call.body).await
    }

    /// Takes a proposal of another node, if this one leads.
    pub fn take_proposal(&self, call: Envelope<Entry>) -> Result<(), Refusal> {
        if self.gate.check_lineage(&call)? {
            return Err(Refusal::NotNow("this node has no log".into()));
        }
        if self.leader() != Some(self.gate.node) {
            return Err(Refusal::NotNow("this node does not lead the log".into()));
        }
        self.command(Command::Propose(call.body));
        Ok(())
    }
}

struct Engine<T> {
    node: NodeId,
    store: Arc<Store>,
    gate: Arc<Gate>,
    transport: Arc<T>,
    core: mpsc::Sender<Input>,
    fatal: mpsc::Sender<String>,
    shared: Shared,
    raft: watch::Sender<Option<Raft>>,
    /// At most one node is taken in at a time.
    taking_in: Option<tokio::task::JoinHandle<()>>,
    /// What the core was last told of leader, voters and learners.
    told: Option<(Option<NodeId>, Vec<NodeId>, Vec<NodeId>)>,
}

impl<T: Transport> Engine<T> {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        loop {
            let Some(raft) = self.raft.borrow().clone() else {
                return;
            };
            // Leader and voters only: the other figures change with every heartbeat.
            let mut metrics = raft.server_metrics();
            // Seen before it is told: the next change wakes this loop, what is known already does not.
            let seen = metrics.borrow_and_update().clone();
            self.tell(&seen).await;
            tokio::select! {
                command = commands.recv() => match command {
                    Some(command) => {
                        if let Err(error) = self.on_command(command).await {
                            let _ = self.fatal.send(format!("{error:#}")).await;
                            return;
                        }
                    }
                    None => return,
                },
                changed = metrics.changed() => {
                    // Closed only when the engine's own task has ended.
                    if changed.is_err() {
                        let reason = raft.metrics().borrow().running_state.clone().err();
                        let reason = reason.map_or_else(|| "it is gone".into(), |error| error.to_string());
                        let _ = self.fatal.send(format!("the log has stopped: {reason}")).await;
                        return;
                    }
                }
            }
        }
    }

    async fn on_command(&mut self, command: Command) -> Result<()> {
        match command {
            Command::Init { voters } => self.init(&voters).await,
            Command::Propose(entry) => self.propose(entry).await,
            Command::ForceAlone { epoch } => self.force_alone(epoch).await?,
            Command::GiveUp { epoch } => self.give_up(epoch).await?,
            Command::TakeIn { node } => self.take_in(node),
        }
        Ok(())
    }

    fn present(&self) -> Option<Raft> {
        self.raft.borrow().clone()
    }

    async fn begin(&mut self) -> Result<()> {
        self.gate.set_lineage(self.store.lineage()?);
        let session = Session::begin(&self.store);
        let machine = self.shared.machine(session.clone()).await;
        let config = Config {
            cluster_name: "pollux".into(),
            heartbeat_interval: HEARTBEAT_MS,
            election_timeout_min: ELECTION_MS.0,
            election_timeout_max: ELECTION_MS.1,
            install_snapshot_timeout: SNAPSHOT_MS,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(ENTRIES_PER_SNAPSHOT),
            max_in_snapshot_log_to_keep: ENTRIES_KEPT,
            replication_lag_threshold: ENTRIES_PER_SNAPSHOT + ENTRIES_KEPT,
            ..Config::default()
        };
        let config = Arc::new(config.validate().context("the log's settings")?);
        let links = Links(self.transport.clone());
        let raft = openraft::Raft::<LogTypes>::new(self.node.0, config, links, LogStore(session), machine).await;
        self.raft.send_replace(Some(raft.context("cannot start the log")?));
        Ok(())
    }

    async fn end(&mut self) {
        let raft = self.raft.send_replace(None);
        if let Some(task) = self.taking_in.take() {
            task.abort();
        }
        if let Some(raft) = raft
            && raft.shutdown().await.is_err()
        {
            tracing::warn!("the log's task ended badly");
        }
    }

    async fn init(&self, voters: &[NodeId]) {
        let Some(raft) = self.present() else { return };
        let voters: BTreeMap<u64, EmptyNode> = voters.iter().map(|node| (node.0, EmptyNode::new())).collect();
        match raft.initialize(voters).await {
            Ok(()) => tracing::info!("the cluster's log is born"),
            Err(error) => tracing::debug!("the log is not made: {error}"),
        }
    }

    async fn propose(&self, entry: Entry) {
        let Some(raft) = self.present() else { return };
        if let Err(error) = raft.client_write_ff(entry).await {
            tracing::debug!("a proposal is lost: {error}");
        }
    }

    async fn force_alone(&mut self, epoch: Epoch) -> Result<()> {
        // Stopped before the store is changed, so that nothing goes on under the old voters.
        if self.store.lineage()?.epoch >= epoch {
            return Ok(());
        }
        self.end().await;
        let (store, node) = (self.store.clone(), self.node);
        let forced = blocking(move || store.force_alone(node, epoch)).await?;
        self.begin().await?;
        tracing::info!(%epoch, forced, "this node is the only voter of its log");
        let Some(raft) = self.present() else { return Ok(()) };
        let node = self.node.0;
        tokio::spawn(async move {
            let leads = raft.wait(Some(FORCED_LEADER_WAIT)).current_leader(node, "a forced log has a leader").await;
            if leads.is_err() {
                let _ = raft.trigger().elect().await;
            }
        });
        Ok(())
    }

    async fn give_up(&mut self, epoch: Epoch) -> Result<()> {
        self.end().await;
        let store = self.store.clone();
        let emptied = blocking(move || store.give_up(epoch)).await?;
        // If it was emptied before, what is there belongs to the new log already, and is told to the core once more.
        self.shared.forget(epoch).await;
        self.shared.reload(&Session::begin(&self.store)).await?;
        self.told = None;
        self.begin().await?;
        if emptied {
            tracing::info!(%epoch, "the log was given up in favour of a newer epoch");
        }
        Ok(())
    }

    fn take_in(&mut self, node: NodeId) {
        if self.taking_in.as_ref().is_some_and(|task| !task.is_finished()) {
            return;
        }
        let Some(raft) = self.present() else { return };
        self.taking_in = Some(tokio::spawn(async move {
            match tokio::time::timeout(TAKE_IN_TIMEOUT, take_in(&raft, node)).await {
                Ok(Ok(())) => tracing::info!(%node, "is a voter of the log"),
                Ok(Err(error)) => tracing::warn!(%node, "was not taken in: {error}"),
                Err(_) => tracing::warn!(%node, "was not taken in within {TAKE_IN_TIMEOUT:?}"),
            }
        }));
    }

    /// Tells the core of leader and voters when they have changed.
    async fn tell(&mut self, metrics: &openraft::metrics::RaftServerMetrics<u64, EmptyNode>) {
        let (voters, learners) = members(&metrics.membership_config);
        let leader = metrics.current_leader.map(NodeId);
        let now = Some((leader, voters.clone(), learners.clone()));
        if self.told != now {
            self.told = now;
            let _ = self.core.send(Input::Log { leader, voters, learners }).await;
        }
    }
}

/// First a learner, until it has all; then a voter.
async fn take_in(raft: &Raft, node: NodeId) -> Result<()> {
    raft.add_learner(node.0, EmptyNode::new(), true).await?;
    raft.change_membership(ChangeMembers::AddVoterIds(BTreeSet::from([node.0])), true).await?;
    Ok(())
}

async fn blocking<R: Send + 'static>(work: impl FnOnce() -> Result<R, StoreError> + Send + 'static) -> Result<R> {
    Ok(tokio::task::spawn_blocking(work).await??)
}
