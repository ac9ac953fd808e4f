//! The plan of a lab: which nodes there are and where everything of it is found. Pure: names, addresses and paths only.
//!
//! A lab has fixed names and addresses, so there is at most one on a machine. What a reboot would keep lies in the
//! site's directory, what it would lose under `RUN`.

use pollux_base::config::{
    Accelerator, Encryption, NodeAddresses, NodeConfig, PathUse, PoolConfig, PowerConfig, TlsFiles, WitnessConfig,
};
use pollux_base::{ClusterId, NodeId, PoolId};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

/// Runtime of the lab: a tmpfs while a lab is up.
pub const RUN: &str = "/run/pollux-lab";
/// Where a lab keeps its state when no other directory is named.
pub const DIR_DEFAULT: &str = "/var/lib/pollux-lab";
/// The cgroup of everything that belongs to a lab, below the root of cgroup v2.
pub const CGROUP: &str = "pollux-lab";
/// Namespaces and interfaces of the lab begin so; whatever does is the lab's to remove.
pub const PREFIX: &str = "plx-";
/// Bounded by the addresses (a power switch is at 100 + node) and by the names (one letter each).
pub const NODES_MAX: u64 = 8;

const API_PORT: u16 = 7443;
const REPLICATION_PORT: u16 = 7401;
const GUARD_PORT: u16 = 7402;
const NBD_PORT: u16 = 10809;
const WITNESS_PORT: u16 = 7500;
const POWER_PORT: u16 = 8000;
/// This machine's own place on the management and guest networks.
const ROOT_HOST: u8 = 254;
const WITNESS_HOST: u8 = 253;
const POWER_HOST_BASE: u8 = 100;

/// One of the lab's networks; each is a bridge in the switch namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    Storage,
    Mgmt,
    Guests,
}

impl Network {
    pub const ALL: [Network; 3] = [Network::Storage, Network::Mgmt, Network::Guests];

    pub fn name(self) -> &'static str {
        match self {
            Network::Storage => "storage",
            Network::Mgmt => "mgmt",
            Network::Guests => "guests",
        }
    }
    fn third_byte(self) -> u8 {
        match self {
            Network::Storage => 75,
            Network::Mgmt => 76,
            Network::Guests => 77,
        }
    }
    pub fn address(self, host: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, self.third_byte(), 0, host)
    }
    /// This machine's address on the network; it has none on the storage network, as no client has.
    pub fn root_address(self) -> Option<Ipv4Addr> {
        (self != Network::Storage).then(|| self.address(ROOT_HOST))
    }
}

/// Where a guest is reached: the last byte of its MAC is its host number.
pub fn guest_address(mac: &str) -> Option<Ipv4Addr> {
    let last = mac.rsplit(':').next()?;
    u8::from_str_radix(last, 16).ok().map(|host| Network::Guests.address(host))
}

pub fn witness_address() -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Network::Mgmt.address(WITNESS_HOST)), WITNESS_PORT)
}

/// A lab as it was planned; written to the site's directory and to `RUN`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Site {
    pub dir: PathBuf,
    pub run: PathBuf,
    /// Directory of the lab's cgroup.
    pub cgroup: PathBuf,
    /// Directory of the daemons' executables.
    pub executables: PathBuf,
    pub cluster: ClusterId,
    pub pool_bytes: u64,
    pub guest_memory_bytes: u64,
    #[serde(default)]
    pub replication_encryption: Encryption,
    pub nodes: Vec<SiteNode>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SiteNode {
    /// 1 and up; also the host number of its addresses.
    pub id: u8,
    pub name: String,
    pub pool: PoolId,
    /// What its power switch reports.
    pub uuid: String,
}

/// The programs that run on a node, in the order in which they are started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Daemon {
    Guard,
    Blockd,
    Noded,
}

impl Daemon {
    pub const ALL: [Daemon; 3] = [Daemon::Guard, Daemon::Blockd, Daemon::Noded];

    pub fn program(self) -> &'static str {
        match self {
            Daemon::Guard => "pollux-guard",
            Daemon::Blockd => "blockd",
            Daemon::Noded => "noded",
        }
    }
}

pub const WITNESS_PROGRAM: &str = "pollux-witness";

impl SiteNode {
    pub fn address(&self, network: Network) -> Ipv4Addr {
        network.address(self.id)
    }
    pub fn namespace(&self) -> String {
        format!("{PREFIX}{}", self.name)
    }
    /// The switch's end of this node's cable.
    pub fn cable(&self, network: Network) -> String {
        format!("{PREFIX}{}-{}", self.name, &network.name()[..1])
    }
    pub fn power_address(&self) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(Network::Mgmt.address(POWER_HOST_BASE + self.id)), POWER_PORT)
    }
    /// The id of the node's machine at its power switch.
    pub fn system(&self) -> String {
        format!("node-{}", self.name)
    }
    fn socket_addresses(&self, networks: [Network; 2], port: u16) -> Vec<SocketAddr> {
        networks.map(|network| SocketAddr::new(IpAddr::V4(self.address(network)), port)).to_vec()
    }
    fn addresses(&self) -> NodeAddresses {
        use Network::{Mgmt, Storage};
        NodeAddresses {
            node: NodeId(u64::from(self.id)),
            name: self.name.clone(),
            api: self.socket_addresses([Mgmt, Storage], API_PORT),
            replication: self.socket_addresses([Storage, Mgmt], REPLICATION_PORT),
            // Other machines are on the management network only, as this one is.
            nbd: vec![SocketAddr::new(IpAddr::V4(self.address(Mgmt)), NBD_PORT)],
            guard: self.socket_addresses([Storage, Mgmt], GUARD_PORT),
            power: Some(PowerConfig {
                url: format!("http://{}", self.power_address()),
                system: self.system(),
                uuid: self.uuid.clone(),
            }),
        }
    }
}

/// The name of node `id`: a, b, c, ...
pub fn node_name(id: u8) -> String {
    char::from(b'a' + id.saturating_sub(1)).to_string()
}

impl Site {
    pub fn node(&self, name: &str) -> Option<&SiteNode> {
        self.nodes.iter().find(|node| node.name == name)
    }
    pub fn keys(&self) -> PathBuf {
        self.dir.join("keys")
    }
    pub fn logs(&self) -> PathBuf {
        self.dir.join("log")
    }
    /// The plan itself, for a later `lab up` on kept state.
    pub fn file(&self) -> PathBuf {
        self.dir.join("site.json")
    }
    pub fn context_file(&self) -> PathBuf {
        self.dir.join("context.json")
    }
    pub fn witness_dir(&self) -> PathBuf {
        self.dir.join("witness")
    }
    pub fn supervisor_socket(&self) -> PathBuf {
        self.run.join("supervisor.sock")
    }
    pub fn witness_cgroup(&self) -> PathBuf {
        self.cgroup.join("witness")
    }
    pub fn supervisor_cgroup(&self) -> PathBuf {
        self.cgroup.join("supervisor")
    }
    pub fn node_dir(&self, node: &SiteNode) -> PathBuf {
        self.dir.join(format!("node-{}", node.name))
    }
    pub fn node_run(&self, node: &SiteNode) -> PathBuf {
        self.run.join(&node.name)
    }
    pub fn pool_file(&self, node: &SiteNode) -> PathBuf {
        self.node_dir(node).join("pool")
    }
    pub fn config_file(&self, node: &SiteNode) -> PathBuf {
        self.node_dir(node).join("node.json")
    }
    /// Present once the node's pool is formatted and its cluster is made.
    pub fn made_marker(&self, node: &SiteNode) -> PathBuf {
        self.node_dir(node).join("made")
    }
    pub fn node_cgroup(&self, node: &SiteNode) -> PathBuf {
        self.cgroup.join(&node.name)
    }
    pub fn daemons_cgroup(&self, node: &SiteNode) -> PathBuf {
        self.node_cgroup(node).join("daemons")
    }
    pub fn guests_cgroup(&self, node: &SiteNode) -> PathBuf {
        self.node_cgroup(node).join("guests")
    }
    pub fn log_file(&self, owner: &str, program: &str) -> PathBuf {
        self.logs().join(format!("{owner}-{}.log", program.trim_start_matches("pollux-")))
    }
    /// Where clients reach the API, one URL per node.
    pub fn servers(&self) -> Vec<String> {
        self.nodes.iter().map(|node| format!("https://{}:{API_PORT}", node.address(Network::Mgmt))).collect()
    }
    pub fn token_file(&self) -> PathBuf {
        self.keys().join("api.token")
    }
    pub fn ca_file(&self) -> PathBuf {
        self.keys().join("ca.pem")
    }
    pub fn witness_token_file(&self) -> PathBuf {
        self.keys().join("witness.token")
    }
    /// What the witness reads: a line `CLUSTER TOKEN` per cluster.
    pub fn witness_clusters_file(&self) -> PathBuf {
        self.keys().join("witness.tokens")
    }
    /// The files of a certificate: `ca`, `witness` or a node's name.
    pub fn certificate_files(&self, owner: &str) -> (PathBuf, PathBuf) {
        (self.keys().join(format!("{owner}.pem")), self.keys().join(format!("{owner}.key")))
    }
    /// Certificates for NBD clients of this machine.
    pub fn nbd_client_dir(&self) -> PathBuf {
        self.keys().join("nbd-client")
    }
    /// What a node's daemons read.
    pub fn node_config(&self, node: &SiteNode) -> NodeConfig {
        let (certificate, key) = self.certificate_files(&node.name);
        NodeConfig {
            cluster: self.cluster,
            cluster_name: "lab".into(),
            node: NodeId(u64::from(node.id)),
            state_dir: self.node_dir(node).join("state"),
            run_dir: self.node_run(node),
            pool: PoolConfig { pool: node.pool, path: self.pool_file(node), more: Vec::new() },
            nodes: self.nodes.iter().map(SiteNode::addresses).collect(),
            witness: Some(WitnessConfig { address: witness_address(), token_file: self.witness_token_file() }),
            tls: TlsFiles { ca: self.ca_file(), certificate, key },
            nbd_tls: pollux_base::config::NbdTls::default(),
            replication_encryption: self.replication_encryption,
            replication_paths: PathUse::Failover,
            secret_file: self.keys().join("cluster.secret"),
            master_key_file: Some(self.keys().join("master.key")),
            token_file: self.token_file(),
            guest_cgroup: Some(self.guests_cgroup(node)),
            bridge: Some("guests".into()),
            accelerator: Accelerator::Auto,
            watchdog: None,
            guest_memory_bytes: self.guest_memory_bytes,
        }
    }
}

/// Where the plan of the lab that is up lies.
pub fn run_file() -> PathBuf {
    Path::new(RUN).join("site.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    pub fn two_nodes() -> Site {
        let node = |id| SiteNode { id, name: node_name(id), pool: PoolId(u128::from(id)), uuid: format!("uuid-{id}") };
        Site {
            dir: DIR_DEFAULT.into(),
            run: RUN.into(),
            cgroup: "/sys/fs/cgroup/pollux-lab".into(),
            executables: "/usr/bin".into(),
            cluster: ClusterId(1),
            pool_bytes: 8 << 30,
            guest_memory_bytes: 1 << 30,
            replication_encryption: Encryption::On,
            nodes: vec![node(1), node(2)],
        }
    }

    #[test]
    fn interface_names_fit_the_kernels_fifteen_bytes() {
        for id in 1..=NODES_MAX as u8 {
            let node = SiteNode { id, name: node_name(id), pool: PoolId(0), uuid: String::new() };
            for network in Network::ALL {
                assert!(node.cable(network).len() <= 15 && node.cable(network).starts_with(PREFIX));
            }
        }
    }

    #[test]
    fn no_two_things_of_a_lab_share_an_address() {
        let site = two_nodes();
        let mut seen = std::collections::BTreeSet::new();
        assert!(seen.insert(witness_address().ip()));
        for node in &site.nodes {
            assert!(seen.insert(node.power_address().ip()));
            for network in Network::ALL {
                assert!(seen.insert(IpAddr::V4(node.address(network))));
            }
        }
        for network in [Network::Mgmt, Network::Guests] {
            assert!(seen.insert(IpAddr::V4(network.root_address().expect("this machine is on it"))));
        }
    }

    #[test]
    fn a_nodes_configuration_names_every_node_and_its_own_certificate() {
        let site = two_nodes();
        let config = site.node_config(&site.nodes[1]);
        assert_eq!(config.own().map(|own| own.name.as_str()), Some("b"));
        assert_eq!(config.peers().count(), 1);
        assert!(config.tls.certificate.ends_with("keys/b.pem"));
        let text = serde_json::to_string(&config).expect("a configuration is JSON");
        assert_eq!(serde_json::from_str::<NodeConfig>(&text).expect("and back"), config);
    }

    #[test]
    fn a_guests_address_ends_like_its_mac() {
        assert_eq!(guest_address("52:54:00:00:00:0a"), Some(Ipv4Addr::new(10, 77, 0, 10)));
        assert_eq!(guest_address("no mac"), None);
    }
}
