//! One node: its parts made and wired, as its configuration says.

use crate::api::tasks::Tasks;
use crate::api::{Api, router};
use crate::core::{self, Core, GuardSight};
use crate::greet::{self, Heard};
use crate::hands::{Hands, save_records};
use crate::lines::{self, LineEvent};
use crate::link_keys::{self, LinkKeys};
use crate::log::engine;
use crate::log::network::PeerTransport;
use crate::log::store::Store;
use crate::peers::{Gate, Peers, secret_header};
use crate::witness_client::WitnessClient;
use crate::{server, tls, vms};
use anyhow::{Context, Result, bail};
use pollux_base::config::{Encryption, NodeAddresses, NodeConfig};
use pollux_base::guard::{GuardCommand, GuardView};
use pollux_base::{Order, Report};
use pollux_cluster::entry::NodeSpec;
use pollux_cluster::{Cluster, Input, Setup};
use pollux_seal::Keyring;
use pollux_vm::{Settings, Vms};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use tokio::sync::{mpsc, watch};

/// Orders on their way to `blockd`: after a connection, one per group.
const ORDERS_MAX: usize = 16_384;
/// Commands on their way to the guard and to the VMs' task.
const COMMANDS_MAX: usize = 1024;
/// The cluster's secret is at least so long.
const SECRET_BYTES_MIN: usize = 32;
/// A token is at least so long: shorter ones could be guessed.
const TOKEN_BYTES_MIN: usize = 16;

pub fn read_config(path: &Path) -> Result<NodeConfig> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let config: NodeConfig =
        serde_json::from_slice(&text).with_context(|| format!("{} makes no sense", path.display()))?;
    if config.own().is_none() {
        bail!("{}: node {} is not among its `nodes`", path.display(), config.node);
    }
    Ok(config)
}

fn store_file(config: &NodeConfig) -> PathBuf {
    config.state_dir.join("log.redb")
}

/// Prepares an empty node once. `false`: it is prepared already.
pub fn init(config: &NodeConfig) -> Result<bool> {
    for dir in [&config.state_dir, &config.run_dir] {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    // What would stop the node later is better said now.
    Secrets::read(config)?;
    tls::node_acceptor(&config.tls)?;
    tls::node_connector(&config.tls)?;
    Ok(Store::prepare(&store_file(config), config.cluster, config.node)?)
}

/// Runs the node until something that it can not do without has failed, and says what.
pub async fn run(config: NodeConfig) -> Result<String> {
    let config = Arc::new(config);
    let own = config.own().context("this node is not among its `nodes`")?.clone();
    let secrets = Secrets::read(&config)?;
    let acceptor = tls::node_acceptor(&config.tls)?;
    let connector = tls::connector(&config.tls.ca)?;
    crate::fill::lay_out_certificates(&config).with_context(|| format!("cannot use {}", config.run_dir.display()))?;
    let mut listeners = Vec::new();
    for address in &own.api {
        listeners.push(server::listen(*address).await?);
    }
    let store = Store::open(&store_file(&config), config.cluster, config.node)
        .context("Prepare the node with `noded init --config FILE`, once")?;
    crate::api::clear_spool(&config.state_dir).context("cannot empty the spool")?;
    let (vm_shell, vm_events) = Vms::open(Settings::of(&config)).await.context("cannot look after VMs")?;

    if let Some(why) = secrets.masters.refused() {
        tracing::error!("the successor of the master key is not used: {why}");
    }
    let keyring = Arc::new(secrets.masters);
    let setup = setup(&config, &store, &keyring)?;
    let cluster = Cluster::new(setup, pollux_host::clock::now());
    let (guard_sight, guard_seen) = watch::channel(GuardSight::Gone);
    let (core, ears, voice) = core::channels(guard_seen, cluster.hello());
    let (fatal, mut fatally) = mpsc::channel(4);

    let gate = Arc::new(Gate::new(config.cluster, config.node, store.lineage()?));
    let peers = Arc::new(Peers::new(&config, tls::node_connector(&config.tls)?, secret_header(&secrets.cluster)));
    let heard = Arc::new(Heard::new(config.peers().map(|peer| peer.node)));
    let transport = Arc::new(PeerTransport { peers: peers.clone(), gate: gate.clone() });
    // The core's task runs first: it takes what the log replays.
    let (records, records_in) = mpsc::channel(16);
    let (guard, guard_commands) = mpsc::channel(COMMANDS_MAX);
    let (data, orders) = mpsc::channel(ORDERS_MAX);
    let (vm_commands, vm_commands_in) = mpsc::channel(COMMANDS_MAX);
    let witness = config.witness.as_ref().map(|witness| {
        let token = secrets.witness.as_deref().unwrap_or_default();
        Arc::new(WitnessClient::new(witness.address, config.cluster, token, connector.clone()))
    });
    let (log, log_task) = engine::prepare(config.node, store.clone(), gate.clone());
    let link_keys = Arc::new(LinkKeys::new(config.clone(), data.clone()));
    let hands = Hands {
        config: config.clone(),
        core: core.clone(),
        log: log.clone(),
        gate: gate.clone(),
        peers: peers.clone(),
        records,
        guard,
        data,
        vms: vm_commands,
        witness: witness.clone(),
        keyring: keyring.clone(),
        asking: None,
        fencing: BTreeMap::new(),
        filling: BTreeMap::new(),
        forwards: Hands::forwards(),
    };
    tokio::spawn(core::run(cluster, ears, voice, hands));
    tokio::spawn(save_records(store, records_in, core.clone(), fatal.clone()));
    log_task.start(transport, core.inputs.clone(), fatal).await?;
    tokio::spawn(talk_to_guard(config.guard_socket(), guard_commands, guard_sight));
    tokio::spawn(talk_to_data_plane(config.data_socket(), orders, core.clone(), link_keys.clone()));
    tokio::spawn(vms::run(vm_shell.clone(), vm_events, vm_commands_in, core.clone()));
    for peer in config.peers() {
        if config.replication_encryption == Encryption::On {
            tokio::spawn(link_keys::run(peer.node, link_keys.clone(), peers.clone(), gate.clone()));
        }
        tokio::spawn(greet::run(peer.node, peers.clone(), gate.clone(), heard.clone(), core.clone()));
    }

    let api = Arc::new(Api {
        config: config.clone(),
        core: core.clone(),
        log,
        gate,
        heard,
        link_keys,
        vms: vm_shell,
        witness,
        keyring,
        tasks: Tasks::new(config.node, core),
        token: blake3::hash(secrets.token.as_bytes()),
        peer_secret: blake3::hash(secret_header(&secrets.cluster).as_bytes()),
        uploads: Api::uploads(),
        spooled: AtomicU64::new(0),
    });
    for listener in listeners {
        tokio::spawn(server::serve(listener, acceptor.clone(), router(api.clone())));
    }
    tracing::info!(node = %config.node, api = ?own.api, "noded is ready");
    Ok(fatally.recv().await.unwrap_or_else(|| "every task has ended".into()))
}

/// What the core is told at its start.
fn setup(config: &NodeConfig, store: &Store, keyring: &Keyring) -> Result<Setup> {
    Ok(Setup {
        node: config.node,
        name: config.cluster_name.clone(),
        nodes: config.nodes.iter().map(|node| (node.node, node_spec(node, config))).collect(),
        witness: config.witness.is_some(),
        record: store.epoch_record()?,
        master: keyring.present(),
        master_successor: keyring.successor(),
        run: u64::from_le_bytes(*pollux_seal::random()?),
        unix_ms: core::unix_ms(),
    })
}

fn node_spec(node: &NodeAddresses, config: &NodeConfig) -> NodeSpec {
    let text = |addresses: &[std::net::SocketAddr]| addresses.iter().map(ToString::to_string).collect();
    NodeSpec {
        name: node.name.clone(),
        api: text(&node.api),
        replication: text(&node.replication),
        nbd: node.nbd.first().map(ToString::to_string),
        power: node.power.clone(),
        // The configuration tells only this node's own; the nodes of one cluster are taken to be alike.
        memory_bytes: config.guest_memory_bytes,
    }
}

async fn talk_to_guard(path: PathBuf, commands: mpsc::Receiver<GuardCommand>, sight: watch::Sender<GuardSight>) {
    lines::run(&path, commands, |event: LineEvent<GuardView>| {
        match event {
            LineEvent::Up => {}
            LineEvent::Line(view) => {
                sight.send_replace(GuardSight::View(view));
            }
            LineEvent::Down => {
                sight.send_replace(GuardSight::Gone);
            }
        }
        std::future::ready(())
    })
    .await;
}

async fn talk_to_data_plane(path: PathBuf, orders: mpsc::Receiver<Order>, core: Core, keys: Arc<LinkKeys>) {
    lines::run(&path, orders, |event: LineEvent<Report>| {
        if matches!(event, LineEvent::Up) {
            keys.hand_over_all();
        }
        let input = match event {
            LineEvent::Up => Input::DataConnected,
            LineEvent::Line(report) => Input::Data(Some(report)),
            LineEvent::Down => Input::Data(None),
        };
        let inputs = core.inputs.clone();
        async move {
            // The core is gone only when the process ends.
            let _ = inputs.send(input).await;
        }
    })
    .await;
}

/// What the files of secrets hold.
struct Secrets {
    cluster: Vec<u8>,
    token: String,
    witness: Option<String>,
    masters: Keyring,
}

impl Secrets {
    fn read(config: &NodeConfig) -> Result<Secrets> {
        let path = &config.secret_file;
        let cluster = std::fs::read(path).with_context(|| format!("cannot read the secret {}", path.display()))?;
        if cluster.len() < SECRET_BYTES_MIN {
            bail!("the secret {} is shorter than {SECRET_BYTES_MIN} bytes", path.display());
        }
        let token = read_token(&config.token_file)?;
        let witness = config.witness.as_ref().map(|witness| read_token(&witness.token_file)).transpose()?;
        let masters = Keyring::read(config.master_key_file.as_deref(), config.cluster)?;
        Ok(Secrets { cluster, token, witness, masters })
    }
}

fn read_token(path: &Path) -> Result<String> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read the token {}", path.display()))?;
    let token = text.trim();
    if token.len() < TOKEN_BYTES_MIN || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        bail!("the token {} is shorter than {TOKEN_BYTES_MIN} characters or not plain text", path.display());
    }
    Ok(token.to_string())
}
