//! What real-process tests share: a folder with keys and configurations, and processes that end with it.

#![allow(dead_code)]

pub mod guard;

use pollux_api::Client;
use pollux_base::config::{
    Accelerator, Encryption, NodeAddresses, NodeConfig, PathUse, PoolConfig, TlsFiles, WitnessConfig,
};
use pollux_base::{ClusterId, NodeId, PoolId};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

pub const CLUSTER: ClusterId = ClusterId(0x77);
pub const TOKEN: &str = "a-token-of-the-api-for-tests";
pub const WITNESS_TOKEN: &str = "a-token-at-the-witness-for-tests";
/// Bounds every wait; these machines are slow when many tests run.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A process that is killed when it is dropped.
pub struct Daemon(pub Child);

impl Daemon {
    pub fn start(program: &str, arguments: &[&str], log: &Path) -> Daemon {
        let log = fs::File::options().create(true).append(true).open(log).expect("a log file");
        let child = Command::new(program).args(arguments).stdout(Stdio::null()).stderr(log).spawn();
        Daemon(child.expect("the program starts"))
    }
    /// SIGKILL, and reaped.
    pub fn kill(mut self) {
        self.end();
    }
    fn end(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.end();
    }
}

/// Waits until it is so, looking again and again.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A port that nobody listens on at the moment.
pub fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port")
}

pub fn wait_for_port(address: SocketAddr) {
    until("the port is open", || TcpStream::connect(address).ok());
}

/// Keys, tokens and folders of a cluster whose nodes all live here.
pub struct Site {
    pub folder: TempDir,
    pub witness: SocketAddr,
    pub nodes: Vec<SocketAddr>,
}

impl Site {
    pub fn new(nodes: usize) -> Site {
        let folder = tempfile::tempdir().expect("a folder");
        let site = Site { folder, witness: free_address(), nodes: (0..nodes).map(|_| free_address()).collect() };
        site.make_keys();
        fs::write(site.path("token"), TOKEN).expect("written");
        fs::write(site.path("secret"), [7; 32]).expect("written");
        fs::write(site.path("witness.token"), WITNESS_TOKEN).expect("written");
        fs::write(site.path("witness.tokens"), format!("{CLUSTER} {WITNESS_TOKEN}\n")).expect("written");
        site
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("a path in text").into()
    }
    pub fn log(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }
    pub fn ca(&self) -> Vec<u8> {
        fs::read(self.path("ca.pem")).expect("the CA")
    }

    /// One more certificate of the cluster's CA, `NAME.pem` and `NAME.key`, that holds for these names.
    fn certificate(&self, authority: &CertifiedIssuer<'_, KeyPair>, file: &str, names: &[&str]) {
        let key = KeyPair::generate().expect("a key");
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let params = CertificateParams::new(names).expect("parameters");
        let certificate = params.signed_by(&key, authority).expect("a certificate");
        fs::write(self.path(&format!("{file}.pem")), certificate.pem()).expect("written");
        fs::write(self.path(&format!("{file}.key")), key.serialize_pem()).expect("written");
    }

    fn make_keys(&self) {
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.distinguished_name.push(DnType::CommonName, "test");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("a CA");
        fs::write(self.path("ca.pem"), authority.pem()).expect("written");
        self.certificate(&authority, "certificate", &["127.0.0.1", "a", "b", "c"]);
        // Of the same CA, but no node's.
        self.certificate(&authority, "stranger", &["127.0.0.1", "witness"]);
    }

    pub fn start_witness(&self) -> Daemon {
        let daemon = self.spawn_witness(&self.text("registers"));
        wait_for_port(self.witness);
        daemon
    }

    pub fn spawn_witness(&self, state: &str) -> Daemon {
        let (listen, tokens) = (self.witness.to_string(), self.text("witness.tokens"));
        let (certificate, key) = (self.text("certificate.pem"), self.text("certificate.key"));
        let arguments =
            ["--listen", &listen, "--state", state, "--cert", &certificate, "--key", &key, "--tokens", &tokens];
        Daemon::start(env!("CARGO_BIN_EXE_pollux-witness"), &arguments, &self.path("witness.log"))
    }

    pub fn config(&self, node: usize) -> NodeConfig {
        let nodes = self.nodes.iter().enumerate().map(|(index, api)| NodeAddresses {
            node: NodeId(index as u64 + 1),
            name: ["a", "b", "c"][index].into(),
            api: vec![*api],
            replication: vec![free_address()],
            nbd: vec![free_address()],
            guard: vec![free_address()],
            power: None,
        });
        NodeConfig {
            cluster: CLUSTER,
            cluster_name: "test".into(),
            node: NodeId(node as u64 + 1),
            state_dir: self.path(&format!("state-{node}")),
            run_dir: self.path(&format!("run-{node}")),
            pool: PoolConfig { pool: PoolId(1), path: self.path("pool"), more: Vec::new() },
            nodes: nodes.collect(),
            witness: Some(WitnessConfig { address: self.witness, token_file: self.path("witness.token") }),
            tls: TlsFiles {
                ca: self.path("ca.pem"),
                certificate: self.path("certificate.pem"),
                key: self.path("certificate.key"),
            },
            nbd_tls: pollux_base::config::NbdTls::default(),
            replication_encryption: Encryption::On,
            replication_paths: PathUse::Failover,
            secret_file: self.path("secret"),
            master_key_file: None,
            token_file: self.path("token"),
            guest_cgroup: None,
            bridge: None,
            accelerator: Accelerator::Tcg,
            watchdog: None,
            guest_memory_bytes: 1 << 30,
        }
    }

    pub fn write_config(&self, node: usize) -> String {
        let path = self.path(&format!("node-{node}.json"));
        fs::write(&path, serde_json::to_vec_pretty(&self.config(node)).expect("JSON")).expect("written");
        path.to_str().expect("a path in text").into()
    }

    pub fn start_node(&self, node: usize) -> Daemon {
        self.write_config(node);
        self.start_written_node(node)
    }

    /// With the configuration that lies there.
    pub fn start_written_node(&self, node: usize) -> Daemon {
        let config = self.text(&format!("node-{node}.json"));
        let init = Command::new(env!("CARGO_BIN_EXE_noded")).args(["init", "--config", &config]).output();
        assert!(init.expect("noded init runs").status.success());
        let log = self.path(&format!("node-{node}.log"));
        let daemon = Daemon::start(env!("CARGO_BIN_EXE_noded"), &["--config", &config], &log);
        wait_for_port(self.nodes[node]);
        daemon
    }

    pub fn client(&self, node: usize) -> Client {
        Client::new(vec![format!("https://{}", self.nodes[node])], &self.ca(), TOKEN).expect("a client")
    }
}
