//! What tests of a whole site share: the operator's command as its users run it, and a lab that is gone when the test is.
//!
//! A site has fixed addresses, so there is one at a time: `Lab::up` waits for its turn.

use serde_json::Value;
use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Longest that anything in a test may take; a loaded machine of two cores is slow.
pub const WAIT_MAX: Duration = Duration::from_secs(120);

static ONE_SITE: Mutex<()> = Mutex::new(());

/// The workspace's folder.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests lie in the workspace").to_path_buf()
}

/// The operator's command, built beside this test.
pub fn pollux() -> Command {
    let test = std::env::current_exe().expect("a test knows its own program");
    let bin = test.ancestors().nth(2).expect("tests are in target/PROFILE/deps").join("pollux");
    assert!(bin.exists(), "{} is not built; run `cargo build --workspace` first", bin.display());
    Command::new(bin)
}

/// Waits until `is_so`; a test that waits in vain says for what.
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + WAIT_MAX;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited {} s in vain: {what}", WAIT_MAX.as_secs());
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// A running site of two nodes, `a` and `b`.
pub struct Lab {
    _turn: MutexGuard<'static, ()>,
}

impl Lab {
    /// Builds it. Whoever is not root cannot, and says so instead of passing.
    pub fn up() -> Lab {
        Lab::up_with(&[])
    }

    /// The same, with options of `lab up`.
    pub fn up_with(options: &[&str]) -> Lab {
        let lab = Lab { _turn: turn() };
        lab.ok(&[&["lab", "up"], options].concat());
        lab
    }

    /// Runs `pollux` with these words.
    pub fn run(&self, words: &[&str]) -> Output {
        pollux().args(words).output().expect("the command starts")
    }

    /// Runs it, asserts that it succeeds, and gives what it printed.
    pub fn ok(&self, words: &[&str]) -> String {
        let output = self.run(words);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "`pollux {}` failed: {error}", words.join(" "));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The same, as JSON.
    pub fn json(&self, words: &[&str]) -> Value {
        let text = self.ok(&[words, &["-o", "json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("`pollux {}`: {error}: {text}", words.join(" ")))
    }

    /// Runs it, asserts that it is refused with this exit code and in two lines that say why and what to do.
    pub fn refused(&self, code: i32, words: &[&str]) -> String {
        let output = self.run(words);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "`pollux {}`: {error}", words.join(" "));
        assert!(error.to_lowercase().contains("error: "), "`pollux {}` says nothing: {error}", words.join(" "));
        assert!(!error.contains("panicked"), "`pollux {}` panicked: {error}", words.join(" "));
        error
    }

    /// Process ids of a node's programs of this name, by the cgroup they run in.
    pub fn pids(&self, node: &str, program: &str) -> Vec<i32> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").expect("proc is mounted").flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
            let read = |file: &str| std::fs::read_to_string(entry.path().join(file)).unwrap_or_default();
            let is_there = read("cgroup").contains(&format!("/pollux-lab/{node}/"));
            if is_there && read("cmdline").split('\0').next().is_some_and(|first| first.ends_with(program)) {
                found.push(pid);
            }
        }
        found
    }

    /// Whether a sector full of this value lies anywhere in the node's pool.
    pub fn pool_holds(&self, node: &str, value: u8) -> bool {
        let path = format!("/var/lib/pollux-lab/node-{node}/pool");
        let mut file = std::fs::File::open(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let mut buffer = vec![0; 4 << 20];
        loop {
            let len = file.read(&mut buffer).expect("the lab's pools are files");
            if len == 0 {
                return false;
            }
            if buffer[..len].chunks(512).any(|sector| sector.iter().all(|byte| *byte == value)) {
                return true;
            }
        }
    }

    /// SIGKILL to the one program of this name on the node; waits until its supervisor has started another.
    pub fn kill_daemon(&self, node: &str, program: &str) {
        self.kill_daemons(&[node], program);
    }

    /// The same on several nodes at once.
    pub fn kill_daemons(&self, nodes: &[&str], program: &str) {
        let pids = || nodes.iter().map(|node| self.pids(node, program)).collect::<Vec<_>>();
        let before = pids();
        assert!(before.iter().all(|pids| pids.len() == 1), "one {program} runs on each of {nodes:?}: {before:?}");
        let words = before.iter().flatten().map(i32::to_string);
        let killed = Command::new("kill").arg("-9").args(words).status().expect("kill is there");
        assert!(killed.success());
        wait_until(&format!("{program} of {nodes:?} is started again"), || {
            pids().iter().zip(&before).all(|(now, before)| now.len() == 1 && now != before)
        });
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let down = self.run(&["lab", "down"]);
        if !std::thread::panicking() {
            assert!(down.status.success(), "lab down: {}", String::from_utf8_lossy(&down.stderr));
        }
    }
}

/// Waits for one's turn at the one site of this machine.
pub fn turn() -> MutexGuard<'static, ()> {
    ONE_SITE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sends bytes to an address, if it answers, and lets the other side end the connection or keep it.
pub fn throw(address: SocketAddr, bytes: &[u8]) {
    use std::io::Write;
    let Ok(mut stream) = TcpStream::connect_timeout(&address, Duration::from_secs(2)) else { return };
    let _ = stream.set_read_timeout(Some(Duration::from_millis(300)));
    let _ = stream.write_all(bytes);
    let _ = stream.read(&mut [0; 256]);
}
