//! The NBD front end against the clients that people use, over a volume in memory: what they see is what the protocol
//! machine says, without a core or a disk behind it.

use pollux_base::unit::{BLOCK_BYTES, BlockCount, BlockRange};
use pollux_base::{ByteCount, Data, Op, Reply, VolumeId};
use pollux_blockd::Turn;
use pollux_blockd::clients::Clients;
use pollux_blockd::ticket::Ticket;
use pollux_frontend::{Export, Exports, Place};
use pollux_host::clock;
use pollux_host::link::listen_unix;
use pollux_host::reactor::{Done, Reactor};
use pollux_replica::Input;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

type Outcome = Result<(), Box<dyn std::error::Error>>;
const SIZE: u64 = 64 << 20;

/// A volume in memory.
#[derive(Default)]
struct Memory {
    blocks: BTreeMap<u64, Data>,
}

impl Memory {
    fn answer(&mut self, op: Op) -> Reply {
        match op {
            Op::Read { range } => {
                let mut bytes = Vec::new();
                for block in blocks(range) {
                    match self.blocks.get(&block) {
                        Some(data) => bytes.extend_from_slice(data.as_slice()),
                        None => bytes.resize(bytes.len() + BLOCK_BYTES as usize, 0),
                    }
                }
                Reply::Data(Data::copy_of(&bytes))
            }
            Op::Write { range, data, .. } => {
                for (index, block) in blocks(range).enumerate() {
                    let start = index * BLOCK_BYTES as usize;
                    self.blocks.insert(block, data.slice(start..start + BLOCK_BYTES as usize));
                }
                Reply::Done
            }
            Op::Patch { block, offset, data, .. } => {
                let old = self.blocks.get(&block.0).map(|old| old.as_slice().to_vec());
                let mut whole = old.unwrap_or_else(|| vec![0; BLOCK_BYTES as usize]);
                whole[offset..offset + data.len()].copy_from_slice(data.as_slice());
                self.blocks.insert(block.0, Data::copy_of(&whole));
                Reply::Done
            }
            Op::Zero { range, .. } => {
                blocks(range).for_each(|block| drop(self.blocks.remove(&block)));
                Reply::Done
            }
            Op::Flush => Reply::Done,
            Op::Status { range } => {
                let run = |block| {
                    let range = BlockRange::new(pollux_base::BlockIndex(block), BlockCount(1));
                    (range, self.blocks.contains_key(&block))
                };
                Reply::Status(blocks(range).map(run).collect())
            }
        }
    }
}

fn blocks(range: BlockRange) -> std::ops::Range<u64> {
    range.start.0..range.end().0
}

/// Serves a volume `disk` until dropped.
struct Server {
    dir: tempfile::TempDir,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start() -> Result<Server, Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let socket = listen_unix(&dir.path().join("nbd.sock"))?;
        let stop = Arc::new(AtomicBool::new(false));
        let is_over = stop.clone();
        let serve = move || {
            let mut clients = Clients::default();
            clients.listen(socket, "test".to_owned(), false);
            let export = Export { volume: VolumeId(1), size: ByteCount(SIZE), is_read_only: false, place: Place::Here };
            let exports = Exports::complete(BTreeMap::from([("disk".to_owned(), export)]));
            let mut reactor = Reactor::new().expect("io_uring works here");
            let mut memory = Memory::default();
            let (mut events, mut inputs) = (Vec::new(), Vec::new());
            while !is_over.load(Ordering::Relaxed) {
                let mut turn = Turn { now: clock::now(), reactor: &mut reactor, inputs: &mut inputs };
                while !turn.inputs.is_empty() {
                    for input in std::mem::take(turn.inputs) {
                        if let Input::Request(request) = input {
                            let reply = memory.answer(request.op);
                            clients.on_reply(&mut turn, request.id, reply, &exports);
                        }
                    }
                }
                clients.flush(&mut turn);
                reactor.wait(Some(Duration::from_millis(50)), &mut events).expect("waiting works");
                let mut turn = Turn { now: clock::now(), reactor: &mut reactor, inputs: &mut inputs };
                for event in events.drain(..) {
                    match (Ticket::of(event.token), event.done) {
                        (Ticket::ClientAccept(id), Done::Accepted(result)) => {
                            clients.on_accepted(&mut turn, id, result)
                        }
                        (Ticket::ClientReceive(id), Done::Received(buffer, result)) => {
                            clients.on_received(&mut turn, id, buffer, result, &exports);
                        }
                        (Ticket::ClientSend(id), Done::Sent(result)) => {
                            clients.on_sent(&mut turn, id, result, &exports);
                        }
                        (ticket, _) => panic!("nothing else was begun: {ticket:?}"),
                    }
                }
            }
        };
        Ok(Server { dir, stop, thread: Some(std::thread::spawn(serve)) })
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.dir.path().join("nbd.sock").display())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            assert!(matches!(ended, Some(Ok(()))), "the server has panicked");
        }
    }
}

/// Runs a program that must succeed, and gives what it printed.
fn run(program: &str, arguments: &[&str]) -> Result<String, Box<dyn std::error::Error>> {
    let output = Command::new(program).args(arguments).output().map_err(|cause| format!("{program}: {cause}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{text}{errors}", output.status);
    Ok(text)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

#[test]
fn nbdinfo_sees_what_is_offered() -> Outcome {
    let server = Server::start()?;
    let info = run("nbdinfo", &["--json", &server.uri()])?;
    let info: serde_json::Value = serde_json::from_str(&info)?;
    let export = &info["exports"][0];
    assert_eq!(info["protocol"], "newstyle-fixed");
    assert_eq!(info["structured"], true);
    assert_eq!(export["export-size"], SIZE);
    for feature in ["can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn", "can_df"] {
        assert_eq!(export[feature], true, "{feature}");
    }
    for feature in ["can_cache", "can_fast_zero", "is_read_only"] {
        assert_eq!(export[feature], false, "{feature}");
    }
    assert_eq!(export["block_size_minimum"], 4096);
    assert_eq!(export["contexts"][0], "base:allocation");
    let uri = format!("nbd+unix://?socket={}", server.path("nbd.sock").display());
    assert!(run("nbdinfo", &["--list", &uri])?.contains("export=\"disk\""));
    Ok(())
}

#[test]
fn qemu_io_reads_back_what_it_wrote_and_aligns_by_itself() -> Outcome {
    let server = Server::start()?;
    let commands = [
        "write -P 17 0 1M",
        "write -P 18 -f 5000 700",
        "read -P 18 5000 700",
        "read -P 17 8192 4096",
        "write -z 4096 64k",
        "write -z -u 1M 5M",
        "discard 65536 128k",
        "flush",
        "read -P 0 8192 4096",
        "read -P 17 0 4096",
    ];
    let mut arguments = vec!["-f", "raw"];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    let uri = server.uri();
    arguments.push(&uri);
    let printed = run("qemu-io", &arguments)?;
    assert!(!printed.contains("Pattern verification failed"), "{printed}");
    Ok(())
}

#[test]
fn copies_are_the_same_and_holes_stay_holes() -> Outcome {
    let server = Server::start()?;
    let (source, back) = (server.path("source"), server.path("back"));
    let mut bytes = vec![0u8; SIZE as usize];
    for (at, byte) in bytes.iter_mut().enumerate().skip(1 << 20).take(7 << 20) {
        *byte = (at * 31 / 4096) as u8 | 1;
    }
    std::fs::write(&source, &bytes)?;
    run("nbdcopy", &["--connections=4", "--flush", text(&source), &server.uri()])?;
    run("nbdcopy", &[&server.uri(), text(&back)])?;
    assert!(std::fs::read(&back)? == bytes, "nbdcopy gives back other bytes");
    let map = run("nbdinfo", &["--map", "--json", &server.uri()])?;
    let map: serde_json::Value = serde_json::from_str(&map)?;
    let runs: Vec<(u64, u64, u64)> = map
        .as_array()
        .ok_or("a map is a list")?
        .iter()
        .map(|run| {
            (
                run["offset"].as_u64().unwrap_or(9),
                run["length"].as_u64().unwrap_or(9),
                run["type"].as_u64().unwrap_or(9),
            )
        })
        .collect();
    assert_eq!(runs, [(0, 1 << 20, 3), (1 << 20, 7 << 20, 0), (8 << 20, SIZE - (8 << 20), 3)]);
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", text(&source), &server.uri()])?;
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&source), &server.uri()])?;
    Ok(())
}

#[test]
fn fio_verifies_what_it_wrote_at_depth() -> Outcome {
    let server = Server::start()?;
    let uri = format!("--uri={}", server.uri());
    for block in ["--bs=4k", "--bs=64k", "--bs=1m"] {
        let mut arguments = vec!["--name=verify", "--ioengine=nbd", "--rw=randwrite", "--size=32m", "--iodepth=200"];
        arguments.extend(["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--fsync=32", block, &uri]);
        run("fio", &arguments)?;
    }
    Ok(())
}

#[test]
fn an_unknown_export_is_refused_with_a_reason() -> Outcome {
    let server = Server::start()?;
    let uri = server.uri().replace("/disk", "/other");
    let output = Command::new("qemu-img").args(["info", &uri]).output()?;
    assert!(!output.status.success());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("no export is named `other`"), "{errors}");
    Ok(())
}
