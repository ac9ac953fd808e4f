//! The configuration of one node: one JSON file that `noded`, `blockd` and `pollux-guard` all read.

use crate::id::{ClusterId, NodeId, PoolId};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Unknown fields are refused, so that a misspelt one is not ignored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    pub cluster: ClusterId,
    pub cluster_name: String,
    pub node: NodeId,
    /// Kept over a reboot: the log, the epoch record, spooled uploads.
    pub state_dir: PathBuf,
    /// Gone after a reboot (tmpfs): sockets, pid files, the guard's lease.
    pub run_dir: PathBuf,
    pub pool: PoolConfig,
    /// All nodes of the cluster, this one included.
    pub nodes: Vec<NodeAddresses>,
    pub witness: Option<WitnessConfig>,
    pub tls: TlsFiles,
    /// What NBD clients from other machines must show. Those on the node's own socket need nothing.
    #[serde(default)]
    pub nbd_tls: NbdTls,
    /// Whether what the replicas send each other is encrypted. All nodes of a cluster are set alike: nothing is negotiated.
    #[serde(default)]
    pub replication_encryption: Encryption,
    /// How the addresses under `replication` are used.
    #[serde(default)]
    pub replication_paths: PathUse,
    /// 32 or more random bytes shared by the nodes: signs heartbeats and control messages between peers.
    pub secret_file: PathBuf,
    /// 32 random bytes, the same on all nodes and readable by root only: opens the keys of volumes that are encrypted at rest.
    /// None: there are no such volumes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub master_key_file: Option<PathBuf>,
    /// The bearer token of the API, as text.
    pub token_file: PathBuf,
    /// Directory of a cgroup (v2) in which this node's QEMUs run; the guard kills it whole. None: by pid.
    pub guest_cgroup: Option<PathBuf>,
    /// Bridge on which guests get their network card. None: guests have none.
    pub bridge: Option<String>,
    pub accelerator: Accelerator,
    /// Hardware watchdog, fed only by the guard.
    pub watchdog: Option<PathBuf>,
    /// Memory that guests may have together, in bytes.
    pub guest_memory_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolConfig {
    pub pool: PoolId,
    /// Raw block device or plain file.
    pub path: PathBuf,
    /// The pool's other disks, of whatever size: what volumes hold is spread over all of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub more: Vec<PathBuf>,
}

impl PoolConfig {
    /// All disks of the pool, in order.
    pub fn disks(&self) -> impl Iterator<Item = &PathBuf> {
        std::iter::once(&self.path).chain(&self.more)
    }
}

/// Where a node is reached. The first network is the storage network, the second the management network; lists have one
/// address per network, most wanted first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeAddresses {
    pub node: NodeId,
    pub name: String,
    /// `noded`: REST for clients and control traffic between peers, over TLS. Management network first.
    pub api: Vec<SocketAddr>,
    /// `blockd`: replication.
    pub replication: Vec<SocketAddr>,
    /// `blockd`: NBD for other machines.
    pub nbd: Vec<SocketAddr>,
    /// `pollux-guard`: heartbeats (UDP).
    pub guard: Vec<SocketAddr>,
    pub power: Option<PowerConfig>,
}

/// A Redfish power switch. The UUID it reports is checked before it is used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PowerConfig {
    /// Such as `http://192.0.2.7:8000`.
    pub url: String,
    /// The system's id under `/redfish/v1/Systems/`.
    pub system: String,
    pub uuid: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WitnessConfig {
    pub address: SocketAddr,
    /// Token of this cluster at the witness, as text.
    pub token_file: PathBuf,
}

/// PEM files. Certificates carry the node's addresses and name; the CA is the cluster's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    pub ca: PathBuf,
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// How other machines' NBD clients are let in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NbdTls {
    /// Over TLS, with a certificate of the cluster's CA.
    #[default]
    ClientCertificate,
    /// Over TLS; whoever reaches the address may use what is exported.
    AnyClient,
    /// In the clear, for a network of one's own.
    Plain,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Encryption {
    /// With keys that the nodes' `noded` agree on.
    #[default]
    On,
    /// For a cable that joins two nodes and nothing else: who can reach it can read and change everything.
    Off,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PathUse {
    /// The first that works; the others stand by.
    #[default]
    Failover,
    /// Large frames over all that work: for cables of the same kind, whose bandwidth is to be added up.
    Spread,
}

/// How QEMU runs guests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accelerator {
    /// KVM where a probe guest really runs on it, else software emulation.
    #[default]
    Auto,
    Kvm,
    Tcg,
}

/// Paths that the daemons of a node agree on.
impl NodeConfig {
    /// `blockd` takes orders here (JSON lines, one connection).
    pub fn data_socket(&self) -> PathBuf {
        self.run_dir.join("blockd.sock")
    }
    /// `blockd` serves NBD here, for this node's QEMUs and tools.
    pub fn nbd_socket(&self) -> PathBuf {
        self.run_dir.join("nbd.sock")
    }
    /// `pollux-guard` talks with `noded` here (JSON lines, one connection).
    pub fn guard_socket(&self) -> PathBuf {
        self.run_dir.join("guard.sock")
    }
    /// The end of the guard's lease, for a restarted guard.
    pub fn guard_lease_file(&self) -> PathBuf {
        self.run_dir.join("guard.lease")
    }
    /// The certificates as QEMU and libnbd want them, for this node's own copies from other nodes.
    pub fn nbd_tls_dir(&self) -> PathBuf {
        self.run_dir.join("nbd-tls")
    }
    /// One folder per running VM: QMP socket, console socket, pid, incarnation.
    pub fn vm_dir(&self) -> PathBuf {
        self.run_dir.join("vm")
    }
    /// This node's own addresses.
    pub fn own(&self) -> Option<&NodeAddresses> {
        self.nodes.iter().find(|addresses| addresses.node == self.node)
    }
    /// The other nodes.
    pub fn peers(&self) -> impl Iterator<Item = &NodeAddresses> {
        self.nodes.iter().filter(|addresses| addresses.node != self.node)
    }
}
