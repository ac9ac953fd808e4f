//! A site of real `blockd` processes on loopback addresses, with the test in the place of `noded`.

#![allow(dead_code, reason = "each test program uses a part of it")]

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pollux_base::config::{Accelerator, Encryption, NodeAddresses, NodeConfig, PathUse, PoolConfig, TlsFiles};
use pollux_base::order::{GroupReport, Offer, ReplicaState};
use pollux_base::record::{GroupRecord, GroupSpec, LagBound, Lineage, Stamp};
use pollux_base::{ByteCount, ClusterId, Epoch, Generation, GroupId, NodeId, Order, PoolId, Report, Secret, VolumeId};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

pub type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// Nothing that is waited for takes a tenth of this; a loaded machine may be slow.
pub const PATIENCE: Duration = Duration::from_secs(30);
pub const POOL_SIZE: &str = "512M";
pub const VOLUME_SIZE: u64 = 64 << 20;
pub const GROUP: GroupId = GroupId(1);
pub const VOLUME: VolumeId = VolumeId(7);

/// Configurations of a cluster of two nodes, in a directory of their own.
pub struct Site {
    pub dir: tempfile::TempDir,
    /// For sockets, whose paths must be short.
    run: tempfile::TempDir,
    pub configs: BTreeMap<u64, NodeConfig>,
}

impl Site {
    pub fn new() -> Outcome<Site> {
        // Beside the build, because the system's temporary directory may not support O_DIRECT.
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
        let run = tempfile::tempdir()?;
        let mut held = Vec::new();
        let mut address = |node: u64| -> Outcome<SocketAddr> {
            let listener = TcpListener::bind(format!("127.0.0.{}:0", 10 + node))?;
            let address = listener.local_addr()?;
            // Held until all are chosen, so that none is chosen twice.
            held.push(listener);
            Ok(address)
        };
        let mut nodes = Vec::new();
        for node in 1..=2 {
            nodes.push(NodeAddresses {
                node: NodeId(node),
                name: ["a", "b"][node as usize - 1].to_owned(),
                api: Vec::new(),
                // Two paths.
                replication: vec![address(node)?, address(node)?],
                nbd: vec![address(node)?],
                guard: Vec::new(),
                power: None,
            });
        }
        let mut configs = BTreeMap::new();
        for node in 1..=2 {
            let home = dir.path().join(node.to_string());
            std::fs::create_dir(&home)?;
            let run_dir = run.path().join(node.to_string());
            std::fs::create_dir(&run_dir)?;
            let none = home.join("none");
            let config = NodeConfig {
                cluster: ClusterId(0xc1),
                cluster_name: "test".to_owned(),
                node: NodeId(node),
                state_dir: home.clone(),
                run_dir,
                pool: PoolConfig { pool: PoolId(0x9000 + u128::from(node)), path: home.join("pool"), more: Vec::new() },
                nodes: nodes.clone(),
                witness: None,
                tls: TlsFiles { ca: none.clone(), certificate: none.clone(), key: none.clone() },
                nbd_tls: pollux_base::config::NbdTls::Plain,
                replication_encryption: Encryption::On,
                replication_paths: PathUse::Failover,
                secret_file: none.clone(),
                master_key_file: None,
                token_file: none,
                guest_cgroup: None,
                bridge: None,
                accelerator: Accelerator::Auto,
                watchdog: None,
                guest_memory_bytes: 0,
            };
            configs.insert(node, config);
        }
        Ok(Site { dir, run, configs })
    }

    /// With a pool on each node.
    pub fn formatted() -> Outcome<Site> {
        let site = Site::new()?;
        for node in 1..=2 {
            let output = site.blockd(node, &["format", "--size", POOL_SIZE])?;
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(site)
    }

    pub fn config_file(&self, node: u64) -> Outcome<PathBuf> {
        let path = self.dir.path().join(format!("{node}.json"));
        std::fs::write(&path, serde_json::to_vec_pretty(&self.configs[&node])?)?;
        Ok(path)
    }

    /// Runs `blockd` to its end.
    pub fn blockd(&self, node: u64, arguments: &[&str]) -> Outcome<Output> {
        let config = self.config_file(node)?;
        Ok(Command::new(env!("CARGO_BIN_EXE_blockd")).arg("--config").arg(config).args(arguments).output()?)
    }

    /// Starts the node's daemon, connects to it as `noded` would, and gives it the key that both nodes have.
    pub fn start(&self, node: u64) -> Outcome<Node> {
        let mut node = self.start_without_key(node)?;
        node.order(&key(node.config.node, 1))?;
        Ok(node)
    }

    pub fn start_without_key(&self, node: u64) -> Outcome<Node> {
        let config = self.configs[&node].clone();
        // Of a killed run, which may still be listening: its sockets live until the kernel has torn down its ring.
        let _ = std::fs::remove_file(config.data_socket());
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log(node))?;
        let child = Command::new(env!("CARGO_BIN_EXE_blockd"))
            .arg("--config")
            .arg(self.config_file(node)?)
            .stderr(log)
            .stdin(Stdio::null())
            .spawn()?;
        let mut node = Node { child, control: None, config, log: self.log(node) };
        node.control = Some(node.connect()?);
        Ok(node)
    }

    fn log(&self, node: u64) -> PathBuf {
        self.dir.path().join(format!("{node}.log"))
    }
}

/// A running daemon; killed when dropped.
pub struct Node {
    child: Child,
    control: Option<Control>,
    pub config: NodeConfig,
    log: PathBuf,
}

/// `noded`'s end of the orders' socket.
pub struct Control {
    pub stream: UnixStream,
    reader: BufReader<UnixStream>,
}

impl Node {
    /// A new control connection; waits until the daemon listens.
    pub fn connect(&mut self) -> Outcome<Control> {
        let start = Instant::now();
        loop {
            match UnixStream::connect(self.config.data_socket()) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(PATIENCE))?;
                    return Ok(Control { reader: BufReader::new(stream.try_clone()?), stream });
                }
                Err(cause) => {
                    if let Some(status) = self.child.try_wait()? {
                        return Err(format!("blockd has ended: {status}\n{}", self.log()).into());
                    }
                    if start.elapsed() > PATIENCE {
                        return Err(format!("blockd does not listen: {cause}\n{}", self.log()).into());
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        }
    }

    /// `noded` goes away, and comes back.
    pub fn hang_up(&mut self) {
        self.control = None;
    }

    pub fn take_up(&mut self) -> Outcome {
        self.control = Some(self.connect()?);
        Ok(())
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn order(&mut self, order: &Order) -> Outcome {
        let control = self.control.as_mut().expect("connected at the start");
        let mut line = serde_json::to_vec(order)?;
        line.push(b'\n');
        Ok(control.stream.write_all(&line)?)
    }

    /// Reads reports until one is wanted.
    pub fn wait_for(&mut self, what: &str, is_wanted: impl Fn(&Report) -> bool) -> Outcome<Report> {
        let control = self.control.as_mut().expect("connected at the start");
        let mut seen = String::new();
        let start = Instant::now();
        loop {
            let mut line = String::new();
            let read = control.reader.read_line(&mut line);
            if read.is_err() || line.is_empty() || start.elapsed() > PATIENCE {
                return Err(format!("{what} was not reported ({read:?}), but:\n{seen}log:\n{}", self.log()).into());
            }
            seen.push_str(&line);
            let report: Report = serde_json::from_str(&line).map_err(|cause| format!("{cause}: {line}"))?;
            if is_wanted(&report) {
                return Ok(report);
            }
        }
    }

    /// Asks for everything anew and waits until the group is in this state.
    pub fn wait_for_state(&mut self, is_wanted: impl Fn(&ReplicaState) -> bool) -> Outcome<GroupReport> {
        self.order(&Order::ReportAll)?;
        let is_it = |report: &Report| matches!(report, Report::Group(report) if is_wanted(&report.state));
        match self.wait_for("the wanted state", is_it)? {
            Report::Group(report) => Ok(*report),
            _ => Err("only group reports were wanted".into()),
        }
    }

    pub fn wait_until_serving(&mut self, generation: u64) -> Outcome {
        let is_it = |report: &Report| {
            matches!(report, Report::Group(report) if report.state == ReplicaState::Serving
                && report.stamp.is_some_and(|stamp| stamp.generation >= Generation(generation)))
        };
        self.order(&Order::ReportAll)?;
        self.wait_for("serving", is_it).map(drop)
    }

    /// Dies as by SIGKILL, and is reaped.
    pub fn kill(mut self) -> Outcome {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Asks it to end, and gives its exit code.
    pub fn terminate(mut self) -> Outcome<Option<i32>> {
        self.signal(Signal::SIGTERM)?;
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status.code());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Err("blockd does not end".into())
    }

    pub fn signal(&self, signal: Signal) -> Outcome {
        Ok(kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)?)
    }

    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// URI of the volume on the node's unix socket.
    pub fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.config.nbd_socket().display())
    }

    /// URI of the volume on the node's TCP address.
    pub fn tcp_uri(&self) -> String {
        let own = self.config.own().expect("the test's configuration names its node");
        format!("nbd://{}/disk", own.nbd[0])
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("log of node {}:\n{}", self.config.node, self.log());
        }
    }
}

/// The group's record of this generation, all under one epoch.
pub fn group(generation: u64, primary: u64, in_sync: &[u64]) -> Order {
    let stamp = Stamp { epoch: Epoch(1), generation: Generation(generation) };
    let mut lineage = Lineage::default();
    lineage.push(stamp);
    Order::Group(GroupSpec {
        group: GROUP,
        replicas: BTreeSet::from([NodeId(1), NodeId(2)]),
        modes: BTreeMap::new(),
        lag: LagBound::default(),
        volumes: BTreeMap::from([(VOLUME, ByteCount(VOLUME_SIZE))]),
        keys: BTreeMap::new(),
        snapshots: Default::default(),
        record: GroupRecord {
            stamp,
            primary: NodeId(primary),
            in_sync: in_sync.iter().map(|node| NodeId(*node)).collect(),
        },
        lineage,
    })
}

/// The key of this number that the node shares with the other.
pub fn key(node: NodeId, number: u64) -> Order {
    Order::LinkKey { peer: NodeId(3 - node.0), key: number, secret: Secret::new([number as u8; 32]) }
}

pub fn exports() -> Order {
    let offer = Offer { volume: VOLUME, is_public: true, is_read_only: false };
    Order::Exports { names: BTreeMap::from([("disk".to_owned(), offer)]) }
}

/// Runs a program that must succeed, and gives what it printed.
pub fn run(program: &str, arguments: &[&str]) -> Outcome<String> {
    let output = Command::new(program).args(arguments).output().map_err(|cause| format!("{program}: {cause}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() || text.contains("Pattern verification failed") {
        return Err(format!("{program} {arguments:?}: {}\n{text}{errors}", output.status).into());
    }
    Ok(text)
}

/// Commands of `qemu-io` on a volume.
pub fn qemu_io(uri: &str, commands: &[&str]) -> Outcome<String> {
    let mut arguments = vec!["-f", "raw"];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    arguments.push(uri);
    run("qemu-io", &arguments)
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

/// Changes a bit of a file behind everybody's back.
pub fn rot(path: &Path, offset: u64) -> std::io::Result<()> {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    file.write_all_at(&[byte[0] ^ 1], offset)
}
