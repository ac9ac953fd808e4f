//! Two real `pollux-guard` processes on loopback addresses, with a stand-in for `noded` and one for QEMU.

#![allow(clippy::disallowed_methods, clippy::disallowed_types)]

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pollux_base::config::{Accelerator, Encryption, NodeAddresses, NodeConfig, PathUse, PoolConfig, TlsFiles};
use pollux_base::guard::{GuardCommand, GuardView, Network};
use pollux_base::timing::{GUARD_KILL, GUARD_LEASE};
use pollux_base::{ClusterId, Epoch, NodeId, PoolId};
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const A: NodeId = NodeId(1);
const B: NodeId = NodeId(2);
/// A test fails rather than waits for ever.
const PATIENCE: Duration = Duration::from_secs(20);

struct Site {
    folder: tempfile::TempDir,
    config: NodeConfig,
}

/// A process that dies with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Our own child that was not waited for yet: its number is still its own.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.0.id()).expect("a pid"));
        kill(pid, signal).expect("our own child");
    }

    fn is_alive(&mut self) -> bool {
        self.0.try_wait().expect("our own child").is_none()
    }

    /// Hundredths of a second of CPU time so far.
    fn ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).expect("it runs");
        let fields: Vec<&str> = stat.rsplit(')').next().expect("a name").split_whitespace().collect();
        // utime and stime are fields 14 and 15, counted from the pid.
        fields[11].parse::<u64>().expect("ticks") + fields[12].parse::<u64>().expect("ticks")
    }
}

impl Site {
    fn new() -> Site {
        let folder = tempfile::tempdir().expect("a folder");
        let secret_file = folder.path().join("secret");
        std::fs::write(&secret_file, [7; 32]).expect("written");
        // Each node has two networks with addresses of their own; the ports are free ones.
        let address = |text: &str| -> SocketAddr {
            let socket = UdpSocket::bind((text, 0)).expect("a loopback address");
            socket.local_addr().expect("bound")
        };
        let node = |node: NodeId, guard: Vec<SocketAddr>| NodeAddresses {
            node,
            name: node.to_string(),
            api: vec![],
            replication: vec![],
            nbd: vec![],
            guard,
            power: None,
        };
        let nodes = vec![
            node(A, vec![address("127.0.1.1"), address("127.0.2.1")]),
            node(B, vec![address("127.0.1.2"), address("127.0.2.2")]),
        ];
        let none = PathBuf::from("/nonexistent");
        let config = NodeConfig {
            cluster: ClusterId(77),
            cluster_name: "lab".into(),
            node: A,
            state_dir: none.clone(),
            run_dir: none.clone(),
            pool: PoolConfig { pool: PoolId(1), path: none.clone(), more: Vec::new() },
            nodes,
            witness: None,
            tls: TlsFiles { ca: none.clone(), certificate: none.clone(), key: none.clone() },
            nbd_tls: pollux_base::config::NbdTls::default(),
            replication_encryption: Encryption::On,
            replication_paths: PathUse::Failover,
            secret_file,
            master_key_file: None,
            token_file: none,
            guest_cgroup: None,
            bridge: None,
            accelerator: Accelerator::Auto,
            watchdog: None,
            guest_memory_bytes: 0,
        };
        Site { folder, config }
    }

    fn config_of(&self, node: NodeId) -> NodeConfig {
        NodeConfig { node, run_dir: self.folder.path().join(node.to_string()), ..self.config.clone() }
    }

    fn command(&self, config: &NodeConfig) -> Command {
        let path = self.folder.path().join(format!("{}.json", config.node));
        std::fs::write(&path, serde_json::to_vec(config).expect("JSON")).expect("written");
        let mut command = Command::new(env!("CARGO_BIN_EXE_pollux-guard"));
        command.arg("--config").arg(path).stderr(Stdio::null());
        command
    }

    fn start(&self, node: NodeId) -> Running {
        Running(self.command(&self.config_of(node)).spawn().expect("the guard starts"))
    }

    /// Connects like `noded`, as a member of epoch 1.
    fn noded(&self, node: NodeId) -> Noded {
        let path = self.config_of(node).guard_socket();
        let begun = Instant::now();
        let stream = loop {
            match UnixStream::connect(&path) {
                Ok(stream) => break stream,
                Err(error) => assert!(begun.elapsed() < PATIENCE, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        let mut noded = Noded(BufReader::new(stream));
        noded.say(&GuardCommand::Members { epoch: Epoch(1), peers: vec![A, B] });
        noded
    }

    /// Something that looks like a QEMU: its command line names its folder, and a pid file its number.
    fn guest(&self, node: NodeId) -> Running {
        let folder = self.config_of(node).vm_dir().join("vm1");
        std::fs::create_dir_all(&folder).expect("a folder");
        let child = Command::new("sh")
            .args(["-c", "read -r forever"])
            .arg(folder.join("qmp.sock"))
            .stdin(Stdio::piped())
            .spawn()
            .expect("a shell");
        std::fs::write(folder.join("pid"), format!("{}\n", child.id())).expect("written");
        Running(child)
    }
}

struct Noded(BufReader<UnixStream>);

impl Noded {
    fn say(&mut self, command: &GuardCommand) {
        let mut line = serde_json::to_vec(command).expect("JSON");
        line.push(b'\n');
        self.0.get_mut().write_all(&line).expect("the guard listens");
    }

    fn view(&mut self) -> GuardView {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("the guard speaks");
        serde_json::from_str(&line).expect("a view")
    }

    /// Reads views until one is as wanted; how long it took.
    fn until(&mut self, what: &str, wanted: impl Fn(&GuardView) -> bool) -> Duration {
        let begun = Instant::now();
        loop {
            let view = self.view();
            if wanted(&view) {
                return begun.elapsed();
            }
            assert!(begun.elapsed() < PATIENCE, "no view with {what}; last: {view:?}");
        }
    }
}

fn wait_for_end(guest: &mut Running) -> Duration {
    let begun = Instant::now();
    while guest.is_alive() {
        assert!(begun.elapsed() < PATIENCE, "the guest lives on");
        std::thread::sleep(Duration::from_millis(5));
    }
    begun.elapsed()
}

fn held(view: &GuardView) -> bool {
    view.lease_held && view.peers[0].networks == [Network(0), Network(1)]
}

#[test]
fn guests_of_a_node_whose_peer_is_gone_are_dead_within_the_bound_others_count_on() {
    let site = Site::new();
    let (_guard, peer) = (site.start(A), site.start(B));
    let (mut noded, _noded_b) = (site.noded(A), site.noded(B));
    noded.until("the lease", held);
    let mut guest = site.guest(A);
    peer.signal(Signal::SIGSTOP);
    let silence = noded.until("silence", |view| view.peers[0].networks.is_empty());
    assert!(silence < Duration::from_millis(1500), "told after {silence:?}");
    assert!(guest.is_alive(), "the guest lives as long as the lease");
    let took = wait_for_end(&mut guest);
    assert!(took < GUARD_LEASE + GUARD_KILL, "killed after {took:?}");
    noded.until("the end of the lease", |view| !view.lease_held && view.kills == 1);
    peer.signal(Signal::SIGCONT);
    noded.until("the lease again", held);
}

#[test]
fn a_guard_that_was_stopped_past_its_lease_kills_when_it_wakes() {
    let site = Site::new();
    let (guard, _peer) = (site.start(A), site.start(B));
    let (mut noded, _noded_b) = (site.noded(A), site.noded(B));
    noded.until("the lease", held);
    let mut guest = site.guest(A);
    guard.signal(Signal::SIGSTOP);
    // Not a stand-in for a condition: the passing of the lease is what is tested.
    std::thread::sleep(GUARD_LEASE + Duration::from_millis(300));
    assert!(guest.is_alive());
    guard.signal(Signal::SIGCONT);
    let took = wait_for_end(&mut guest);
    assert!(took < Duration::from_secs(1), "killed after {took:?}");
    noded.until("the lease again", |view| view.lease_held && view.kills == 1);
}

#[test]
fn a_guard_that_is_killed_and_restarted_goes_on_with_its_lease() {
    let site = Site::new();
    let (guard, _peer) = (site.start(A), site.start(B));
    let (mut noded, _noded_b) = (site.noded(A), site.noded(B));
    noded.until("the lease", held);
    let mut guest = site.guest(A);
    drop(guard); // SIGKILL
    let _guard = site.start(A);
    let mut noded = site.noded(A);
    noded.until("the lease", held);
    assert!(guest.is_alive());
    assert_eq!(noded.view().kills, 0);
}

#[test]
fn a_guest_that_starts_without_a_lease_does_not_live() {
    let site = Site::new();
    let _guard = site.start(A);
    let mut noded = site.noded(A);
    noded.until("no lease", |view| !view.lease_held);
    let mut guest = site.guest(A);
    assert!(wait_for_end(&mut guest) < GUARD_KILL);
}

#[test]
fn another_process_with_the_number_in_a_pid_file_is_left_alone() {
    let site = Site::new();
    let folder = site.config_of(A).vm_dir().join("vm0");
    std::fs::create_dir_all(&folder).expect("a folder");
    let mut stranger = Running(Command::new("sleep").arg("60").spawn().expect("sleep"));
    std::fs::write(folder.join("pid"), stranger.0.id().to_string()).expect("written");
    let _guard = site.start(A);
    let mut noded = site.noded(A);
    let mut guest = site.guest(A);
    wait_for_end(&mut guest);
    noded.until("no lease", |view| !view.lease_held);
    assert!(stranger.is_alive());
}

#[test]
fn garbage_on_every_port_changes_nothing() {
    let site = Site::new();
    let (_guard, _peer) = (site.start(A), site.start(B));
    let (mut noded, _noded_b) = (site.noded(A), site.noded(B));
    noded.until("the lease", held);
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    for address in &site.config.nodes[0].guard {
        for len in [0, 1, 16, 49, 100, 511, 1400] {
            socket.send_to(&vec![1; len], address).expect("sent");
        }
    }
    let mut rude = UnixStream::connect(site.config_of(A).guard_socket()).expect("connects");
    rude.write_all(b"\xff\xfe not a command\n{\"command\":\"alone\"}\n").expect("written");
    // The guard may hang up in the middle of it.
    let _ = rude.write_all(&vec![b'x'; 200_000]);
    drop(rude);
    let mut noded = site.noded(A);
    noded.until("the lease", held);
    assert_eq!(noded.view().kills, 0);
}

#[test]
fn what_keeps_it_from_starting_is_one_clear_line_and_exit_code_2() {
    let site = Site::new();
    let fails = |config: &NodeConfig, part: &str| {
        let output = site.command(config).stderr(Stdio::piped()).output().expect("it runs");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.lines().count() == 1 && text.contains(part), "expected `{part}` in: {text}");
    };
    let good = site.config_of(A);
    fails(&NodeConfig { node: NodeId(9), ..good.clone() }, "node n9 is not among `nodes`");
    fails(&NodeConfig { secret_file: "/nonexistent".into(), ..good.clone() }, "cannot read the secret");
    let short = site.folder.path().join("short");
    std::fs::write(&short, "abc").expect("written");
    fails(&NodeConfig { secret_file: short, ..good.clone() }, "at least 32 are needed");
    fails(&NodeConfig { watchdog: Some("/nonexistent".into()), ..good.clone() }, "cannot use the watchdog");
    let _taken = UdpSocket::bind(good.nodes[0].guard[1]).expect("free");
    fails(&good, "the port is in use");
}

#[test]
fn an_idle_guard_takes_less_than_a_hundredth_of_a_core() {
    let site = Site::new();
    let (guard, _peer) = (site.start(A), site.start(B));
    let (mut noded, _noded_b) = (site.noded(A), site.noded(B));
    noded.until("the lease", held);
    let (before, begun) = (guard.ticks(), Instant::now());
    while begun.elapsed() < Duration::from_secs(5) {
        noded.view();
    }
    let used = guard.ticks() - before;
    println!("{used} hundredths of a second of CPU in {:?}", begun.elapsed());
    assert!(used <= 5, "{used} hundredths of a second of CPU in {:?}", begun.elapsed());
}
