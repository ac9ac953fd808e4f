//! A pool that is full, as a client sees it that goes on writing. Needs root, like the lab itself.

use pollux_tests::{Lab, wait_until};
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

const MIB: u64 = 1 << 20;
/// Of three, so that pieces and extents do not end together: the write that finds no room needs some within an extent that has
/// a home already.
const PIECE: u64 = 3 * MIB;
const PIECES: u64 = 256;
const POOL: u64 = 512 * MIB;

/// qemu-io, which writes piece after piece; what it says is heard while it does.
struct Client {
    child: Child,
    said: Arc<Mutex<Vec<String>>>,
}

impl Client {
    fn start(uri: &str) -> Client {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw", uri]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("qemu-io is installed");
        let said = Arc::new(Mutex::new(Vec::new()));
        let (stdout, heard) = (child.stdout.take().expect("piped"), said.clone());
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                heard.lock().expect("nobody panics with it").push(line);
            }
        });
        // All of it fits into the pipe. The end is told, or qemu-io waits for more before it goes on with what it has.
        let words: String = (0..PIECES).map(|piece| format!("write {}\n", place(piece))).collect();
        let mut stdin = child.stdin.take().expect("piped");
        stdin.write_all(format!("{words}flush\nquit\n").as_bytes()).expect("qemu-io listens");
        Client { child, said }
    }

    fn count(&self, word: &str) -> u64 {
        let said = self.said.lock().expect("nobody panics with it");
        said.iter().filter(|line| line.contains(word)).count() as u64
    }

    /// Pieces whose write has ended; none with an error.
    fn written(&mut self) -> u64 {
        assert_eq!(self.count("rror") + self.count("failed"), 0, "{:?}", self.said);
        let ended = self.child.try_wait().expect("a child can be asked");
        assert!(ended.is_none_or(|status| status.success()), "the client has ended: {ended:?}");
        self.count("wrote ")
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A piece for `write` and `read` of qemu-io.
fn place(piece: u64) -> String {
    format!("-P {} {} {PIECE}", piece % 255 + 1, piece * PIECE)
}

fn qemu_io(uri: &str, commands: impl IntoIterator<Item = String>) {
    let words: Vec<String> = commands.into_iter().flat_map(|words| ["-c".to_owned(), words]).collect();
    let output = Command::new("qemu-io").args(["-f", "raw"]).args(words).arg(uri).output().expect("it is installed");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let is_fine = output.status.success() && !text.contains("verification failed") && !text.contains("rror");
    assert!(is_fine, "{uri}: {text}{}", String::from_utf8_lossy(&output.stderr));
}

fn read_all(uri: &str, pieces: u64) {
    qemu_io(uri, (0..pieces).map(|piece| format!("read {}", place(piece))));
}

/// Where it is found on the own socket of the node that serves it.
fn local_uri(lab: &Lab, volume: &str) -> String {
    let uris = lab.json(&["volume", "export", volume, "--nbd"]);
    let primary = lab.json(&["volume", "show", volume])["primary"].as_str().expect("a primary").to_owned();
    let uris = uris.as_array().expect("a list").iter().filter_map(Value::as_str);
    let mut local = uris.filter(|uri| uri.contains(&format!("/{primary}/nbd.sock")));
    local.next().expect("the lab names a local socket").to_owned()
}

fn pool_state(lab: &Lab, node: &str) -> String {
    lab.json(&["pool", "show", node])["state"].as_str().expect("a state").to_owned()
}

/// The pools are full and say so, the client waits, and whoever reads does not.
fn wait_until_full(lab: &Lab, client: &mut Client, uri: &str) -> u64 {
    wait_until("both pools are full", || {
        client.written();
        ["a", "b"].iter().all(|node| pool_state(lab, node) == "full")
    });
    let written = client.written();
    assert!(written < PIECES, "the volume is larger than the pool");
    read_all(uri, written);
    assert_eq!(client.written(), written, "what waits for space has not ended");
    let status = lab.json(&["status"]).to_string();
    assert!(status.contains("is full (") && status.contains("writes wait for space"), "status warns: {status}");
    written
}

/// Guards: a client that writes more than there is room for waits, without an error, while it and others read; it goes on by
/// itself when another volume gives space back, and when disks join.
#[test]
fn writes_to_a_full_pool_wait_and_end_well_when_there_is_space() {
    let lab = Lab::up_with(&["--pool-size", &POOL.to_string()]);
    lab.ok(&["volume", "create", "other", "--size", "64M"]);
    let other = local_uri(&lab, "other");
    qemu_io(&other, ["write -P 0x5a 0 64M".to_owned(), "flush".to_owned()]);
    lab.ok(&["volume", "create", "v", "--size", &(PIECES * PIECE).to_string()]);
    let uri = local_uri(&lab, "v");
    let mut client = Client::start(&uri);
    let first = wait_until_full(&lab, &mut client, &uri);
    assert!(first * PIECE > POOL / 2, "most of the pool was of use: {first} pieces");

    // Another volume gives its space back.
    lab.ok(&["volume", "export", "other", "--off"]);
    lab.ok(&["volume", "delete", "other", "--yes"]);
    wait_until("the client goes on", || client.written() > first);
    let second = wait_until_full(&lab, &mut client, &uri);
    assert!((second - first) * PIECE > 32 * MIB, "most of what was given back was of use: {first}, {second}");

    // Disks join.
    for node in ["a", "b"] {
        let pool = lab.json(&["pool", "show", node]);
        let own = pool["disks"][0]["path"].as_str().expect("a path");
        let disk = Path::new(own).with_file_name("second");
        std::fs::File::create(&disk).and_then(|file| file.set_len(POOL)).expect("a sparse file");
        lab.ok(&["pool", "add-disk", node, disk.to_str().expect("a plain path")]);
    }
    wait_until("the client has written everything", || client.written() == PIECES);
    wait_until("the client has ended well", || client.child.try_wait().is_ok_and(|ended| ended.is_some()));
    assert_eq!(client.written(), PIECES);
    read_all(&uri, PIECES);
    wait_until("the pools have room", || ["a", "b"].iter().all(|node| pool_state(&lab, node) != "full"));
    lab.ok(&["volume", "scrub", "v"]);
    for node in ["a", "b"] {
        let verified = lab.json(&["pool", "verify", "--node", node]);
        assert_eq!(verified["findings"], Value::Array(Vec::new()), "{verified}");
    }
    wait_until("both replicas are in sync", || lab.json(&["volume", "show", "v"])["state"] == "healthy");
}
