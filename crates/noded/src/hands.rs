//! Carries out what the core wants. One method per kind of output; nothing here waits.

use crate::core::Core;
use crate::log::engine::{Command, Log};
use crate::log::store::Store;
use crate::peers::{Gate, Peers};
use crate::witness_client::WitnessClient;
use crate::{fence, fill, vms};
use pollux_base::config::NodeConfig;
use pollux_base::guard::GuardCommand;
use pollux_base::{NodeId, Order, SealedKey, VmId};
use pollux_cluster::{Cluster, Entry, EpochRecord, Input, Output, Register, VmCommand};
use pollux_seal::Keyring;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;

/// A forwarded proposal may take this long; the core asks again for what is lost.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(1);
/// Forwarded proposals under way; more are dropped.
const FORWARDS_MAX: usize = 64;

/// Everything that the core can move.
pub struct Hands {
    pub config: Arc<NodeConfig>,
    pub core: Core,
    pub log: Log,
    pub gate: Arc<Gate>,
    pub peers: Arc<Peers>,
    pub records: mpsc::Sender<EpochRecord>,
    pub guard: mpsc::Sender<GuardCommand>,
    pub data: mpsc::Sender<Order>,
    pub vms: mpsc::Sender<VmCommand>,
    pub witness: Option<Arc<WitnessClient>>,
    pub keyring: Arc<Keyring>,
    /// The newest question for the witness; an older one is of no use.
    pub asking: Option<JoinHandle<()>>,
    pub fencing: BTreeMap<NodeId, JoinHandle<()>>,
    pub filling: BTreeMap<VmId, JoinHandle<()>>,
    pub forwards: Arc<Semaphore>,
}

impl Hands {
    pub fn forwards() -> Arc<Semaphore> {
        Arc::new(Semaphore::new(FORWARDS_MAX))
    }

    pub fn carry_out(&mut self, output: Output, cluster: &Cluster) {
        match output {
            Output::InitLog { voters } => self.log.command(Command::Init { voters }),
            Output::Propose(entry) => self.propose(entry),
            Output::AskWitness { ask, expect, set } => self.ask_witness(ask, expect, set),
            Output::SaveEpoch(record) => self.save_epoch(record),
            Output::ForceAlone { epoch } => self.log.command(Command::ForceAlone { epoch }),
            Output::GiveUpLog { from, epoch } => {
                tracing::info!(%from, %epoch, "this node is outdated: it gives up its log");
                self.log.command(Command::GiveUp { epoch });
            }
            Output::TakeIn { node } => self.log.command(Command::TakeIn { node }),
            Output::Fence { node, power } => {
                let busy = self.fencing.get(&node).is_some_and(|task| !task.is_finished());
                if !busy {
                    self.fencing.insert(node, fence::start(node, power, self.core.clone()));
                }
            }
            Output::Guard(command) => send(&self.guard, command, "the guard"),
            Output::Data(order) => send(&self.data, order, "blockd"),
            Output::OpenKey(sealed) => self.open_key(&sealed),
            Output::Vm(command) => send(&self.vms, command, "the VMs' task"),
            Output::Fill { vm, from, to } => {
                let busy = self.filling.get(&vm).is_some_and(|task| !task.is_finished());
                if !busy {
                    let copy = fill::Copy::of(&self.config, cluster.state(), &from.1, &to.1);
                    self.filling.insert(vm, vms::start_fill(vm, copy, self.core.clone()));
                }
            }
            Output::Answer { .. } => unreachable!("answers are given by the core's task"),
        }
    }

    /// Puts an entry into the log here, or at the node that leads it. May be lost.
    fn propose(&self, entry: Entry) {
        let Some(leader) = self.log.leader() else {
            tracing::debug!("nobody leads the log: a proposal is dropped");
            return;
        };
        if leader == self.config.node {
            return self.log.command(Command::Propose(entry));
        }
        let Ok(place) = self.forwards.clone().try_acquire_owned() else {
            tracing::debug!("too many proposals are on their way: one is dropped");
            return;
        };
        let (peers, call) = (self.peers.clone(), self.gate.wrap(leader, entry));
        tokio::spawn(async move {
            if let Err(error) = peers.call::<_, ()>(leader, "/peer/v1/propose", &call, FORWARD_TIMEOUT).await {
                tracing::debug!(%leader, "a proposal is lost: {error}");
            }
            drop(place);
        });
    }

    fn ask_witness(&mut self, ask: u64, expect: Register, set: Option<Register>) {
        if let Some(earlier) = self.asking.take() {
            earlier.abort();
        }
        let (witness, core) = (self.witness.clone(), self.core.clone());
        self.asking = Some(tokio::spawn(async move {
            let result = match witness {
                Some(witness) => witness.ask(expect, set).await,
                None => Err("no witness is configured".into()),
            };
            let _ = core.inputs.send(Input::Witness { ask, result }).await;
        }));
    }

    /// In turn with the orders: it comes before the record that names it.
    fn open_key(&self, sealed: &SealedKey) {
        let key = sealed.key;
        match self.keyring.open(sealed) {
            Ok(secret) => send(&self.data, Order::VolumeKey { key, secret }, "blockd"),
            Err(reason) => {
                tracing::error!(%key, "the key of an encrypted volume can not be opened: {reason}");
                let core = self.core.clone();
                tokio::spawn(async move {
                    let _ = core.inputs.send(Input::KeyRefused { key, reason }).await;
                });
            }
        }
    }

    fn save_epoch(&self, record: EpochRecord) {
        // Lost only when the task that saves is gone, and with it the process.
        if self.records.try_send(record).is_err() {
            tracing::error!("the epoch record is not saved");
        }
    }
}

/// What is dropped is said anew by the core when the connection is: a full queue means a daemon that hangs.
fn send<T>(queue: &mpsc::Sender<T>, value: T, whom: &str) {
    if queue.try_send(value).is_err() {
        tracing::warn!("{whom} takes nothing: something it was told is lost");
    }
}

/// Saves epoch records one after the other. The core hears of each when it is durable; if one can not be saved the
/// process must end, for the core relies on it.
pub async fn save_records(
    store: Arc<Store>,
    mut records: mpsc::Receiver<EpochRecord>,
    core: Core,
    fatal: mpsc::Sender<String>,
) {
    while let Some(record) = records.recv().await {
        let (store, saved) = (store.clone(), record.clone());
        let result = tokio::task::spawn_blocking(move || store.save_epoch_record(&saved)).await;
        match result {
            Ok(Ok(())) => {
                tracing::info!(?record, "saved the epoch record");
                let _ = core.inputs.send(Input::EpochSaved(record)).await;
            }
            Ok(Err(error)) => {
                let _ = fatal.send(format!("the epoch record can not be saved: {error}")).await;
                return;
            }
            Err(_) => return,
        }
    }
}
