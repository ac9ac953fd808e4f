//! Two `blockd` on loopback addresses, with the bench in the place of `noded`: mirrored volumes and nothing beside them.

use super::cgroup::Cgroup;
use super::client::Client;
use super::process::{Running, wait_for};
use anyhow::{Context, Result, ensure};
use pollux_base::config::{Accelerator, Encryption, NodeAddresses, NodeConfig, PathUse, PoolConfig, TlsFiles};
use pollux_base::order::Offer;
use pollux_base::record::{GroupRecord, GroupSpec, LagBound, Lineage, Stamp};
use pollux_base::{
    ByteCount, ClusterId, Epoch, Generation, GroupId, KeyId, NodeId, Order, PoolId, Secret, VolumeId, VolumeSecret,
};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a pool needs beside its volumes: tables, journal, and some air.
const POOL_EXTRA_BYTES: u64 = 1 << 30;

/// Node 1 is primary of everything.
pub struct Pair {
    pub nodes: [Node; 2],
    exports: BTreeMap<String, Offer>,
    volumes_made: u64,
    /// Volumes are encrypted at rest with this.
    key: Option<(KeyId, VolumeSecret)>,
    _cgroup: Cgroup,
}

pub struct Node {
    pub blockd: Running,
    control: UnixStream,
    config: NodeConfig,
}

impl Pair {
    /// With pools (sparse files) that hold so many bytes of volumes.
    pub fn start(
        scratch: &Path,
        bytes: u64,
        encryption: Encryption,
        encrypted_volumes: bool,
        cgroup: Cgroup,
    ) -> Result<Pair> {
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
            let config = config(&scratch.join(format!("node-{node}")), node, &addresses, encryption);
            Node::start(config, pool_bytes, &cgroup)
        };
        let nodes = [start(1)?, start(2)?];
        let secret = VolumeSecret::new(std::array::from_fn(|index| index as u8));
        let key = encrypted_volumes.then(|| (KeyId::of(&secret), secret));
        let mut pair = Pair { nodes, exports: BTreeMap::new(), volumes_made: 0, key, _cgroup: cgroup };
        if encryption == Encryption::On {
            let secret = Secret::new(std::array::from_fn(|index| index as u8));
            for (node, peer) in [(0, 2), (1, 1)] {
                let order = Order::LinkKey { peer: NodeId(peer), key: 1, secret: secret.clone() };
                pair.nodes[node].order(&order)?;
            }
        }
        Ok(pair)
    }

    /// A new thin volume with nothing in it.
    pub fn create(&mut self, size_bytes: u64) -> Result<Volume> {
        self.volumes_made += 1;
        let number = self.volumes_made;
        let volume = Volume { name: format!("volume-{number}"), group: GroupId(number) };
        let stamp = Stamp { epoch: Epoch(1), generation: Generation(1) };
        let mut lineage = Lineage::default();
        lineage.push(stamp);
        let both = BTreeSet::from([NodeId(1), NodeId(2)]);
        let id = VolumeId(number);
        // With each anew: it is forgotten with the last volume that has it.
        if let Some((key, secret)) = self.key.clone() {
            self.order(&Order::VolumeKey { key, secret })?;
        }
        self.order(&Order::Group(GroupSpec {
            group: volume.group,
            replicas: both.clone(),
            modes: BTreeMap::new(),
            lag: LagBound::default(),
            volumes: BTreeMap::from([(id, ByteCount(size_bytes))]),
            keys: self.key.iter().map(|(key, _)| (id, *key)).collect(),
            snapshots: Default::default(),
            record: GroupRecord { stamp, primary: NodeId(1), in_sync: both },
            lineage,
        }))?;
        let offer = Offer { volume: id, is_public: false, is_read_only: false };
        self.exports.insert(volume.name.clone(), offer);
        self.order(&Order::Exports { names: self.exports.clone() })?;
        Ok(volume)
    }

    pub fn remove(&mut self, volume: Volume) -> Result<()> {
        self.exports.remove(&volume.name);
        self.order(&Order::Exports { names: self.exports.clone() })?;
        self.order(&Order::Forget { group: volume.group })
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
    group: GroupId,
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

    fn start(config: NodeConfig, pool_bytes: u64, cgroup: &Cgroup) -> Result<Node> {
        let home = &config.state_dir;
        let _ = fs::remove_dir_all(home);
        fs::create_dir_all(home)?;
        let file = home.join("node.json");
        fs::write(&file, serde_json::to_vec_pretty(&config)?)?;
        let program = crate::target().join("dist/blockd");
        let size = format!("{}K", pool_bytes >> 10);
        let format = Command::new(&program).arg("--config").arg(&file).args(["format", "--size", &size]).output()?;
        ensure!(format.status.success(), "blockd format: {}", String::from_utf8_lossy(&format.stderr));

        let mut command = cgroup.command(&program.to_string_lossy());
        command.arg("--config").arg(&file);
        let mut blockd = Running::start(command, &home.join("blockd.err"))?;
        let mut control = None;
        wait_for("blockd to listen", || {
            blockd.check()?;
            control = UnixStream::connect(config.data_socket()).ok();
            Ok(control.is_some())
        })?;
        let control = control.expect("it was waited for");
        let mut reports = control.try_clone()?;
        // Read and dropped, so that blockd does not take us for hung; ends with the connection.
        std::thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            while reports.read(&mut buffer).is_ok_and(|len| len > 0) {}
        });
        Ok(Node { blockd, control, config })
    }
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
