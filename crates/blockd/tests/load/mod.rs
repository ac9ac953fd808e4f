//! Clients that write and verify without a break, behind QEMU's block layer, which holds requests while `blockd` is gone.

#![allow(dead_code, reason = "each test program uses a part of it")]

use crate::site::{self, Node, Outcome, PATIENCE, Site};
use pollux_base::{NodeId, Order};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// QEMU's block layer between fio and the volume: it holds requests while `blockd` is gone, as it does for guests.
pub struct Front {
    daemon: Child,
    socket: std::path::PathBuf,
}

impl Front {
    pub fn start(site: &Site, node: &Node) -> Outcome<Front> {
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

    pub fn uri(&self) -> String {
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
pub struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<Rounds, String>>>,
}

/// What a load has done: rounds, and the longest that one request took.
#[derive(Default, Debug)]
pub struct Rounds {
    pub count: u64,
    pub longest: Duration,
}

impl Load {
    pub fn start(uri: &str) -> Load {
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

    pub fn end(self) -> Outcome<Vec<Rounds>> {
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

/// What the primary holds, the other holds too, when it is alone. The primary is gone afterwards.
pub fn replicas_hold_the_same(site: &Site, front: Front, first: Node, second: &mut Node) -> Outcome {
    let (ours, theirs) = (site.dir.path().join("ours"), site.dir.path().join("theirs"));
    site::run("nbdcopy", &[&first.uri(), site::text(&ours)])?;
    drop(front);
    first.kill()?;
    second.order(&site::group(2, 2, &[2]))?;
    second.order(&Order::Fenced { node: NodeId(1) })?;
    second.wait_until_serving(2)?;
    site::run("nbdcopy", &[&second.uri(), site::text(&theirs)])?;
    assert!(std::fs::read(&ours)? == std::fs::read(&theirs)?, "the replicas differ");
    Ok(())
}
