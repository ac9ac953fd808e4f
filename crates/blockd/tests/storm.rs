//! SIGKILL storms: data planes die on alternating sides under clients that write and verify without a break. Clients see
//! pauses, never an error; nothing is lost, and both replicas hold the same in the end.
//!
//! The drill: `STORM_KILLS=20 cargo test -p pollux-blockd --test storm -- --nocapture`

mod site;

use pollux_base::{NodeId, Order, Report};
use site::{Node, Outcome, PATIENCE, Site, exports, group, qemu_io, run, text};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Kills unless the environment says otherwise: some on each side.
const KILLS: u64 = 6;

/// QEMU's block layer between fio and the volume: it holds requests while `blockd` is gone, as it does for guests.
struct Front {
    daemon: Child,
    socket: std::path::PathBuf,
}

impl Front {
    fn start(site: &Site, node: &Node) -> Outcome<Front> {
        let socket = node.config.nbd_socket().with_file_name("front.sock");
        let from = node.config.nbd_socket();
        let disk = format!(
            "driver=nbd,node-name=disk,server.type=unix,server.path={},export=disk,reconnect-delay=120",
            from.display()
        );
        let log = std::fs::File::create(site.dir.path().join("front.log"))?;
        let daemon = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &disk])
            .args(["--nbd-server", &format!("addr.type=unix,addr.path={},max-connections=0", socket.display())])
            .args(["--export", "type=nbd,id=on,node-name=disk,name=on,writable=on"])
            .stderr(log)
            .spawn()?;
        let front = Front { daemon, socket };
        let start = Instant::now();
        while std::os::unix::net::UnixStream::connect(&front.socket).is_err() {
            assert!(start.elapsed() < PATIENCE, "qemu-storage-daemon does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(front)
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///on?socket={}", self.socket.display())
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// fio, over and over, until told to stop: each round writes its part of the volume in random order and verifies it.
struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<Rounds, String>>>,
}

/// What a load has done: rounds, and the longest that one request took.
#[derive(Default, Debug)]
struct Rounds {
    count: u64,
    longest: Duration,
}

impl Load {
    fn start(uri: &str) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        // Whole blocks, and sectors, which are patches of blocks.
        let parts = [["--bs=4k", "--size=8m", "--offset=0"], ["--bs=512", "--size=512k", "--offset=16m"]];
        let spawn = |part: [&'static str; 3]| {
            let (uri, stop) = (format!("--uri={uri}"), stop.clone());
            std::thread::spawn(move || {
                let mut rounds = Rounds::default();
                while !stop.load(Ordering::Relaxed) {
                    let longest = round(&part, &uri, rounds.count)?;
                    rounds = Rounds { count: rounds.count + 1, longest: rounds.longest.max(longest) };
                }
                Ok(rounds)
            })
        };
        let threads = parts.map(spawn).into();
        Load { stop, threads }
    }

    fn end(self) -> Outcome<Vec<Rounds>> {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.threads.into_iter().map(|thread| thread.join().map_err(|_| "a load has panicked")?);
        Ok(ended.collect::<Result<Vec<Rounds>, String>>()?)
    }
}

fn round(part: &[&str], uri: &str, number: u64) -> Result<Duration, String> {
    let seed = format!("--randseed={}", number + 1);
    let output = Command::new("fio")
        .args(["--name=storm", "--ioengine=nbd", "--rw=randwrite", "--iodepth=16", "--fsync=64", "--verify=crc32c"])
        .args(["--verify_fatal=1", "--verify_state_save=0", "--output-format=json", &seed, uri])
        .args(part)
        .stdin(Stdio::null())
        .output()
        .map_err(|cause| format!("fio: {cause}"))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        return Err(format!("fio {part:?}: {}\n{said}{}", output.status, String::from_utf8_lossy(&output.stderr)));
    }
    let json = said.find('{').map_or("", |start| &said[start..]);
    let told: serde_json::Value = serde_json::from_str(json).map_err(|cause| format!("fio: {cause}\n{said}"))?;
    let longest = ["read", "write"].map(|what| told["jobs"][0][what]["clat_ns"]["max"].as_u64().unwrap_or(0));
    Ok(Duration::from_nanos(longest.into_iter().max().unwrap_or(0)))
}

/// The daemon dies and is started anew, as its supervisor would, and is ordered what held before.
fn bring_back(site: &Site, node: Node) -> Outcome<Node> {
    let number = node.config.node.0;
    node.kill()?;
    let mut node = site.start(number)?;
    node.order(&group(1, 1, &[1, 2]))?;
    node.order(&exports())?;
    Ok(node)
}

#[test]
fn clients_see_pauses_and_nothing_else_when_data_planes_are_killed_on_alternating_sides() -> Outcome {
    let kills = match std::env::var("STORM_KILLS") {
        Ok(text) => text.parse().map_err(|_| format!("STORM_KILLS={text} is not a number"))?,
        Err(_) => KILLS,
    };
    let site = Site::formatted()?;
    let (mut first, mut second) = (site.start(1)?, site.start(2)?);
    for node in [&mut first, &mut second] {
        node.order(&group(1, 1, &[1, 2]))?;
        node.order(&exports())?;
    }
    first.wait_until_serving(1)?;
    let front = Front::start(&site, &first)?;
    let load = Load::start(&front.uri());
    let mut pauses = Vec::new();
    for kill in 0..kills {
        let start = Instant::now();
        let is_first = kill % 2 == 0;
        if is_first {
            first = bring_back(&site, first)?;
        } else {
            second = bring_back(&site, second)?;
        }
        // What is written now is on both again: this needs the one that came back.
        let place = format!("write -P {} {}k 4k", kill % 200 + 1, 32 * 1024 + 4 * kill);
        qemu_io(&front.uri(), &[&place, "flush"])?;
        pauses.push((if is_first { "primary" } else { "secondary" }, start.elapsed()));
    }
    let rounds = load.end()?;
    println!("{kills} kills; from each until a write and a flush were done after it: {pauses:?}; fio: {rounds:?}");
    assert!(rounds.iter().all(|rounds| rounds.count > 0 && rounds.longest < PATIENCE), "{rounds:?}");

    // Nothing that was acknowledged is missing on the other side.
    let (ours, theirs) = (site.dir.path().join("ours"), site.dir.path().join("theirs"));
    run("nbdcopy", &[&first.uri(), text(&ours)])?;
    drop(front);
    first.kill()?;
    second.order(&group(2, 2, &[2]))?;
    second.order(&Order::Fenced { node: NodeId(1) })?;
    second.wait_until_serving(2)?;
    run("nbdcopy", &[&second.uri(), text(&theirs)])?;
    assert!(std::fs::read(&ours)? == std::fs::read(&theirs)?, "the replicas differ");
    second.order(&Order::ReportAll)?;
    second.wait_for("a report", |report| matches!(report, Report::Group(_)))?;
    Ok(())
}
