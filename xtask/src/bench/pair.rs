//! Two `blockd` on loopback addresses, with the bench in the place of `noded`: mirrored volumes and nothing beside them.

use super::cgroup::Cgroup;
use super::client::Client;
use super::process::{Running, wait_for};
use crate::interrupt;
use anyhow::{Context, Result, ensure};
use pollux_base::config::{Accelerator, Encryption, NodeAddresses, NodeConfig, PathUse, PoolConfig, TlsFiles};
use pollux_base::order::{Offer, ReplicaState};
use pollux_base::record::{Frozen, GroupRecord, GroupSpec, LagBound, Lineage, Snapshot, Stamp};
use pollux_base::{
    ByteCount, ClusterId, Epoch, Generation, GroupId, KeyId, NodeId, Order, PoolId, Report, Secret, SnapshotId,
    VolumeId, VolumeSecret,
};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

/// What a pool needs beside its volumes: tables, journal, and some air.
const POOL_EXTRA_BYTES: u64 = 1 << 30;

/// How long anything that is reported may take; a resync of some GiB takes many seconds.
const REPORT_PATIENCE: Duration = Duration::from_secs(300);
/// Between looks whether the node still runs.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Node 1 is primary of everything.
pub struct Pair {
    pub nodes: [Node; 2],
    exports: BTreeMap<String, Offer>,
    /// Of groups and volumes, those of snapshots among them.
    last_number: u64,
    /// Volumes are encrypted at rest with this.
    key: Option<(KeyId, VolumeSecret)>,
    links_are_encrypted: bool,
    program: PathBuf,
    cgroup: Cgroup,
}

pub struct Node {
    pub blockd: Running,
    control: UnixStream,
    reports: Receiver<Report>,
    config: NodeConfig,
}

/// What is measured.
pub struct Build {
    pub program: PathBuf,
    /// Of what the nodes send each other.
    pub encryption: Encryption,
    pub encrypts_volumes: bool,
}

impl Pair {
    /// With pools that hold so many bytes of volumes. They are files, of which so many first bytes are written as those of
    /// a device are: a file system's work on a hole is not what is measured.
    pub fn start(scratch: &Path, bytes: u64, written_bytes: u64, build: &Build, cgroup: Cgroup) -> Result<Pair> {
        let mut held = Vec::new();
        let mut addresses = Vec::new();
        for node in 1..=2u8 {
            // Held until all are chosen, so that none is chosen twice.
            let listener = TcpListener::bind((std::net::Ipv4Addr::new(127, 0, 0, 10 + node), 0))?;
            addresses.push(listener.local_addr()?);
            held.push(listener);
        }
        drop(held);
        let pool_bytes = bytes + POOL_EXTRA_BYTES;
        let start = |node| {
            let config = config(&scratch.join(format!("node-{node}")), node, &addresses, build.encryption);
            format(&config, &build.program, pool_bytes, written_bytes)?;
            Node::start(config, &build.program, &cgroup)
        };
        let nodes = [start(1)?, start(2)?];
        let secret = VolumeSecret::new(std::array::from_fn(|index| index as u8));
        let key = build.encrypts_volumes.then(|| (KeyId::of(&secret), secret));
        let mut pair = Pair {
            nodes,
            exports: BTreeMap::new(),
            last_number: 0,
            key,
            links_are_encrypted: build.encryption == Encryption::On,
            program: build.program.clone(),
            cgroup,
        };
        pair.give_link_key(0)?;
        pair.give_link_key(1)?;
        Ok(pair)
    }

    fn give_link_key(&mut self, node: usize) -> Result<()> {
        if !self.links_are_encrypted {
            return Ok(());
        }
        let peer = NodeId(2 - node as u64);
        let secret = Secret::new(std::array::from_fn(|index| index as u8));
        self.nodes[node].order(&Order::LinkKey { peer, key: 1, secret })
    }

    /// A new thin volume with nothing in it.
    pub fn create(&mut self, size_bytes: u64) -> Result<Volume> {
        let number = self.number();
        let stamp = Stamp { epoch: Epoch(1), generation: Generation(1) };
        let mut lineage = Lineage::default();
        lineage.push(stamp);
        let both = BTreeSet::from([NodeId(1), NodeId(2)]);
        let id = VolumeId(number);
        // With each anew: it is forgotten with the last volume that has it.
        if let Some((key, secret)) = self.key.clone() {
            self.order(&Order::VolumeKey { key, secret })?;
        }
        let spec = GroupSpec {
            group: GroupId(number),
            replicas: both.clone(),
            modes: BTreeMap::new(),
            lag: LagBound::default(),
            volumes: BTreeMap::from([(id, ByteCount(size_bytes))]),
            keys: self.key.iter().map(|(key, _)| (id, *key)).collect(),
            snapshots: Default::default(),
            record: GroupRecord { stamp, primary: NodeId(1), in_sync: both },
            lineage,
        };
        self.order(&Order::Group(spec.clone()))?;
        let volume = Volume { name: format!("volume-{number}"), spec };
        let offer = Offer { volume: id, is_public: false, is_read_only: false };
        self.exports.insert(volume.name.clone(), offer);
        self.order(&Order::Exports { names: self.exports.clone() })?;
        Ok(volume)
    }

    /// Takes a snapshot of the volume, as the control plane does: it is ordered, taken on both nodes, and noted as taken.
    pub fn snapshot(&mut self, volume: &mut Volume) -> Result<()> {
        let number = self.number();
        let (of, size) = volume.spec.volumes.iter().next().map(|(of, size)| (*of, *size)).context("it has a volume")?;
        let id = SnapshotId(number);
        let volumes = BTreeMap::from([(VolumeId(number), Frozen { of, size })]);
        let snapshots = &mut volume.spec.snapshots;
        (snapshots.revision, snapshots.minted) = (snapshots.revision + 1, number);
        snapshots.each.insert(id, Snapshot { taken: None, volumes });
        self.order(&Order::Group(volume.spec.clone()))?;
        let group = volume.spec.group;
        self.nodes[0].hear("the snapshot", |report| match report {
            Report::Snapshot { group: of, snapshot, result, .. } => *of == group && *snapshot == id && result.is_ok(),
            _ => false,
        })?;
        let snapshots = &mut volume.spec.snapshots;
        snapshots.revision += 1;
        if let Some(snapshot) = snapshots.each.get_mut(&id) {
            snapshot.taken = Some(volume.spec.record.stamp.generation);
        }
        self.order(&Order::Group(volume.spec.clone()))
    }

    /// Node 2 dies, and node 1 goes on without it.
    pub fn lose(&mut self, volume: &mut Volume) -> Result<()> {
        self.nodes[1].blockd.kill();
        let (group, generation) = (volume.spec.group, volume.spec.record.stamp.generation);
        self.nodes[0].hear("the loss of node 2", |report| match report {
            Report::ReplicaLost { group: of, generation: at, node, .. } => {
                *of == group && *at == generation && *node == NodeId(2)
            }
            _ => false,
        })?;
        volume.next_record([NodeId(1)].into());
        self.nodes[0].order(&Order::Group(volume.spec.clone()))
    }

    /// Node 2 is there again, with the disk that it had. Only of this volume is it told.
    pub fn give_back(&mut self, volume: &Volume) -> Result<()> {
        self.restart(1, volume)
    }

    /// A node's process dies and is started again. Only of this volume is it told.
    pub fn restart(&mut self, node: usize, volume: &Volume) -> Result<()> {
        let Node { blockd, config, .. } = &mut self.nodes[node];
        blockd.kill();
        // The kernel may still have requests of its ring, and with them its sockets: one could connect to them, and wait for ever.
        for socket in [config.data_socket(), config.nbd_socket()] {
            fs::remove_file(socket)?;
        }
        self.nodes[node] = Node::start(self.nodes[node].config.clone(), &self.program, &self.cgroup)?;
        self.give_link_key(node)?;
        if let Some((key, secret)) = self.key.clone() {
            self.nodes[node].order(&Order::VolumeKey { key, secret })?;
        }
        self.nodes[node].order(&Order::Group(volume.spec.clone()))?;
        self.nodes[node].order(&Order::Exports { names: self.exports.clone() })
    }

    /// Waits until the nodes have compared what was being written when one of them died.
    pub fn until_settled(&mut self, volume: &Volume) -> Result<()> {
        self.nodes[0].order(&Order::ReportAll)?;
        self.nodes[0].hear("the end of the comparison", |report| match report {
            Report::Group(report) => {
                report.group == volume.spec.group && report.state == ReplicaState::Serving && report.resync.is_empty()
            }
            _ => false,
        })
    }

    /// Waits until node 1 takes a client.
    pub fn client_when_served(&self, volume: &Volume) -> Result<Client> {
        let mut client = None;
        let mut refusal = String::new();
        let served = wait_for("node 1 to serve", || {
            client = self.client(volume).map_err(|error| refusal = format!("{error:#}")).ok();
            Ok(client.is_some())
        });
        served.with_context(|| format!("{refusal}; it reported last {:?}", self.nodes[0].reports.try_iter().last()))?;
        client.context("it was waited for")
    }

    /// Waits until node 1 compares with node 2, which was away.
    pub fn until_resync_begins(&mut self, volume: &Volume) -> Result<()> {
        let group = volume.spec.group;
        self.nodes[0].hear("the beginning of the resync", |report| match report {
            Report::Group(report) => report.group == group && !report.resync.is_empty(),
            _ => false,
        })
    }

    /// Waits until node 2 has all that node 1 has, and names it.
    pub fn until_in_sync(&mut self, volume: &mut Volume) -> Result<()> {
        let (group, generation) = (volume.spec.group, volume.spec.record.stamp.generation);
        self.nodes[0].hear("the resync of node 2", |report| match report {
            Report::ReplicaCurrent { group: of, generation: at, node, .. } => {
                *of == group && *at == generation && *node == NodeId(2)
            }
            _ => false,
        })?;
        volume.next_record([NodeId(1), NodeId(2)].into());
        self.order(&Order::Group(volume.spec.clone()))
    }

    fn number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    pub fn remove(&mut self, volume: Volume) -> Result<()> {
        self.exports.remove(&volume.name);
        self.order(&Order::Exports { names: self.exports.clone() })?;
        self.order(&Order::Forget { group: volume.spec.group })
    }

    pub fn client(&self, volume: &Volume) -> Result<Client> {
        Client::nbd(&self.nodes[0].config.nbd_socket(), &volume.name)
    }

    fn order(&mut self, order: &Order) -> Result<()> {
        self.nodes.iter_mut().try_for_each(|node| node.order(order))
    }
}

pub struct Volume {
    pub name: String,
    spec: GroupSpec,
}

impl Volume {
    fn next_record(&mut self, in_sync: BTreeSet<NodeId>) {
        let record = &mut self.spec.record;
        record.stamp.generation.0 += 1;
        record.in_sync = in_sync;
        self.spec.lineage.push(record.stamp);
    }
}

impl Node {
    pub fn replication_port(&self) -> u16 {
        self.config.own().map_or(0, |own| own.replication[0].port())
    }

    fn order(&mut self, order: &Order) -> Result<()> {
        let mut line = serde_json::to_vec(order)?;
        line.push(b'\n');
        self.control.write_all(&line).context("giving an order to blockd")
    }

    /// Waits for a report; those before it are passed over.
    fn hear(&mut self, what: &str, mut is_it: impl FnMut(&Report) -> bool) -> Result<()> {
        let deadline = Instant::now() + REPORT_PATIENCE;
        loop {
            interrupt::check()?;
            self.blockd.check()?;
            match self.reports.recv_timeout(LOOK_EVERY) {
                Ok(report) if is_it(&report) => return Ok(()),
                Ok(_) => {}
                Err(_) => ensure!(Instant::now() < deadline, "waited {REPORT_PATIENCE:?} for {what}"),
            }
        }
    }

    fn start(config: NodeConfig, program: &Path, cgroup: &Cgroup) -> Result<Node> {
        let home = &config.state_dir;
        let mut command = cgroup.command(&program.to_string_lossy());
        command.arg("--config").arg(home.join("node.json"));
        let mut blockd = Running::start(command, &home.join("blockd.err"))?;
        let mut control = None;
        wait_for("blockd to listen", || {
            blockd.check()?;
            control = UnixStream::connect(config.data_socket()).ok();
            Ok(control.is_some())
        })?;
        let control = control.expect("it was waited for");
        let lines = BufReader::new(control.try_clone()?).lines();
        let (tell, reports) = mpsc::channel();
        // Always read, so that blockd does not take us for hung; ends with the connection.
        std::thread::spawn(move || {
            let reports = lines.map_while(Result::ok).filter_map(|line| serde_json::from_str(&line).ok());
            reports.map_while(|report| tell.send(report).ok()).count()
        });
        Ok(Node { blockd, control, reports, config })
    }
}

/// Makes the node's home and its pool.
fn format(config: &NodeConfig, program: &Path, pool_bytes: u64, written_bytes: u64) -> Result<()> {
    let home = &config.state_dir;
    let _ = fs::remove_dir_all(home);
    fs::create_dir_all(home)?;
    let file = home.join("node.json");
    fs::write(&file, serde_json::to_vec_pretty(config)?)?;
    let mut pool = fs::File::create(&config.pool.path)?;
    let zeroes = vec![0; 1 << 20];
    for _ in 0..written_bytes >> 20 {
        pool.write_all(&zeroes)?;
    }
    pool.set_len(pool_bytes)?;
    pool.sync_all()?;
    let format = Command::new(program).arg("--config").arg(&file).arg("format").output()?;
    ensure!(format.status.success(), "blockd format: {}", String::from_utf8_lossy(&format.stderr));
    Ok(())
}

fn config(home: &Path, node: u64, addresses: &[SocketAddr], encryption: Encryption) -> NodeConfig {
    let none: PathBuf = home.join("none");
    let nodes = addresses.iter().zip(1..).map(|(address, number)| NodeAddresses {
        node: NodeId(number),
        name: format!("node-{number}"),
        api: Vec::new(),
        replication: vec![*address],
        nbd: Vec::new(),
        guard: Vec::new(),
        power: None,
    });
    NodeConfig {
        cluster: ClusterId(0xbe),
        cluster_name: "bench".to_owned(),
        node: NodeId(node),
        state_dir: home.to_owned(),
        run_dir: home.to_owned(),
        pool: PoolConfig { pool: PoolId(0xbe00 + u128::from(node)), path: home.join("pool"), more: Vec::new() },
        nodes: nodes.collect(),
        witness: None,
        tls: TlsFiles { ca: none.clone(), certificate: none.clone(), key: none.clone() },
        nbd_tls: pollux_base::config::NbdTls::default(),
        replication_encryption: encryption,
        replication_paths: PathUse::Failover,
        secret_file: none.clone(),
        master_key_file: None,
        token_file: none,
        guest_cgroup: None,
        bridge: None,
        accelerator: Accelerator::Auto,
        watchdog: None,
        guest_memory_bytes: 0,
    }
}
