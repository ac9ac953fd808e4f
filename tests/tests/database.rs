//! A database in a real guest, while what its disk is made of is killed beneath it. Needs root, like the lab itself.

use pollux_tests::{Lab, root, wait_until};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

const VM: &str = "db";
/// Commits between two kills: some are under way when the next comes.
const COMMITS_BETWEEN: u64 = 20;
/// Where the file system begins in the disk: make-image's first partition.
const PARTITION: u64 = 1 << 20;

/// What the site says meanwhile is told when it does not come to that.
fn wait_until_protected(lab: &Lab) {
    let mut last = String::new();
    wait_until("both replicas are in sync and the site is protected", || {
        let headline = &lab.json(&["status"])["headline"];
        let said = headline["text"].as_str().unwrap_or_default();
        if said != last {
            println!("{said}");
            last = said.to_owned();
        }
        headline["protection"] == "protected"
    });
}

/// Everything that the guest ever said on its console, boot by boot. What is open is read to its end although the node that
/// had it has lost its power.
#[derive(Default)]
struct Consoles {
    open: BTreeMap<(&'static str, u64), (File, Vec<u8>)>,
}

impl Consoles {
    /// Each boot's words up to now, whole lines only: a guest that was killed in the middle of a number has not said it.
    fn hear(&mut self) -> Vec<Vec<String>> {
        for node in ["a", "b"] {
            let folders = std::fs::read_dir(format!("/run/pollux-lab/{node}/vm")).into_iter().flatten().flatten();
            for file in folders.filter_map(|folder| File::open(folder.path().join("console.log")).ok()) {
                let inode = file.metadata().expect("an open file").ino();
                self.open.entry((node, inode)).or_insert((file, Vec::new()));
            }
        }
        for (file, said) in self.open.values_mut() {
            file.read_to_end(said).expect("a log can be read");
        }
        let lines = |said: &Vec<u8>| {
            let whole = said.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
            String::from_utf8_lossy(&said[..whole]).lines().map(|line| line.trim().to_owned()).collect()
        };
        self.open.values().map(|(_, said)| lines(said)).collect()
    }

    fn numbers(&mut self, word: &str) -> Vec<u64> {
        let said = self.hear();
        let numbers = said.iter().flatten().filter_map(|line| line.strip_prefix(word)?.trim().parse().ok());
        numbers.collect()
    }

    /// The last row of whose commit anybody outside the guest has heard.
    fn acknowledged(&mut self) -> u64 {
        self.numbers("ack ").into_iter().max().unwrap_or(0)
    }

    fn wait_for_commits(&mut self, count: u64) -> u64 {
        let wanted = self.acknowledged() + count;
        wait_until(&format!("row {wanted} is committed"), || self.acknowledged() >= wanted);
        self.acknowledged()
    }

    /// Nobody in the guest has seen anything wrong: kernel, file system, sqlite3, or the look at a start.
    fn assert_no_trouble(&mut self) {
        for line in self.hear().iter().flatten() {
            let small = line.to_lowercase();
            let is_trouble = ["error", "damaged", "corrupt", "i/o", "panic", "read-only", "hung task"];
            assert!(!is_trouble.iter().any(|word| small.contains(word)), "the guest says: {line}");
        }
    }
}

/// What the database finds of itself now, asked over the network.
fn look(address: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    Ok(said.trim().to_owned())
}

/// It finds itself whole, with at least these rows.
fn assert_whole(address: SocketAddr, rows: u64) {
    let mut said = String::new();
    wait_until("the database answers", || {
        look(address).is_ok_and(|answer| {
            !answer.is_empty() && {
                said = answer;
                true
            }
        })
    });
    let found = said.strip_prefix("found ").and_then(|number| number.parse::<u64>().ok());
    assert!(found.is_some_and(|found| found >= rows), "{rows} rows were acknowledged; the database says: {said}");
}

/// Runs a program to its end and gives what it printed; its failure is ours.
fn done(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{command:?}: {}{}", text(&output.stdout), text(&output.stderr));
    output
}

/// The disk of the guest that was shut down, read by programs that know nothing of Pollux: the file system is clean, and the
/// database whole with all rows.
fn look_from_outside(lab: &Lab, rows: u64) {
    let volume = format!("vm/{VM}/disk0");
    let node = lab.json(&["volume", "show", &volume])["primary"].as_str().expect("a primary").to_owned();
    let folder = tempfile::tempdir().expect("a folder");
    let disk = folder.path().join("disk");
    let uri = format!("nbd+unix:///{volume}?socket=/run/pollux-lab/{node}/nbd.sock");
    done(Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "raw", &uri]).arg(&disk));
    let file_system = format!("{}?offset={PARTITION}", disk.display());
    done(Command::new("/usr/sbin/e2fsck").args(["-f", "-n", &file_system]));
    for name in ["database", "database-wal"] {
        let out = folder.path().join(name);
        done(Command::new("/usr/sbin/debugfs").args([
            "-R",
            &format!("dump /data/{name} {}", out.display()),
            &file_system,
        ]));
    }
    let said = judged(&folder.path().join("database"));
    let found = said.strip_prefix("found ").and_then(|number| number.parse::<u64>().ok());
    assert!(found.is_some_and(|found| found >= rows), "{rows} rows were acknowledged; from outside there are: {said}");
}

/// What the guest's own look finds in a file of this machine.
fn judged(database: &Path) -> String {
    let look = File::open(root().join("scripts/guest/look.sql")).expect("it is there");
    let output = done(Command::new("sqlite3").args(["-bail", "-batch"]).arg(database).stdin(Stdio::from(look)));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Guards the guards: what is missing, changed, or half done in a database is found.
#[test]
fn the_look_at_a_database_finds_what_is_wrong_with_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let sql = |name: &str| std::fs::read_to_string(root().join("scripts/guest").join(name)).expect("it is there");
    let harms = [
        ("", "found 3"),
        ("DELETE FROM rows WHERE number = 2", "damaged: "),
        ("DELETE FROM rows WHERE number = 3", "damaged: "),
        ("UPDATE rows SET body = 'other' WHERE number = 1", "damaged: "),
        ("UPDATE total SET count = 4", "damaged: "),
    ];
    for (at, (harm, expected)) in harms.into_iter().enumerate() {
        let database = folder.path().join(at.to_string());
        let words = [sql("open.sql"), sql("row.sql").repeat(3), harm.to_owned()].concat();
        let mut child = Command::new("sqlite3").arg(&database).stdin(Stdio::piped()).stdout(Stdio::null()).spawn();
        let child = child.as_mut().expect("sqlite3 is installed");
        child.stdin.take().expect("piped").write_all(words.as_bytes()).expect("sqlite3 listens");
        assert!(child.wait().expect("it ends").success());
        let said = judged(&database);
        assert!(said.starts_with(expected), "`{harm}`: {said}");
    }
}

/// Guards: a database in a guest never loses a row whose commit was acknowledged, and sees no error, while the data planes
/// beneath it are killed again and again, alone and together, and when its server loses its power.
#[test]
fn a_database_in_a_guest_outlives_storms_of_sigkill_and_a_pulled_plug() {
    let image = root().join("target/database.qcow2");
    done(Command::new(root().join("scripts/make-image")).arg("--database").arg(&image));
    let lab = Lab::up();
    lab.ok(&["image", "import", image.to_str().expect("a plain path"), "--name", VM]);
    lab.ok(&["vm", "create", VM, "--image", VM, "--cpus", "1", "--memory", "256M", "--disk", "256M"]);
    lab.ok(&["vm", "start", VM]);
    let vm = lab.json(&["vm", "show", VM]);
    let node = vm["node"].as_str().expect("a node").to_owned();
    let other = if node == "a" { "b" } else { "a" };
    let last = vm["mac"].as_str().and_then(|mac| u8::from_str_radix(mac.rsplit(':').next()?, 16).ok()).expect("a MAC");
    let address = SocketAddr::from(([10, 77, 0, last], 7000));
    let mut consoles = Consoles::default();
    wait_until("the database commits", || consoles.acknowledged() > 0);
    wait_until_protected(&lab);

    // In the second half nobody waits until both hold everything again: kills come in the middle of resyncs.
    let sides: [&[&str]; 3] = [&[&node], &[other], &[&node, other]];
    for (at, side) in sides.iter().cycle().take(2 * sides.len()).enumerate() {
        consoles.wait_for_commits(COMMITS_BETWEEN);
        if at < sides.len() {
            wait_until_protected(&lab);
        }
        lab.kill_daemons(side, "blockd");
    }
    let acknowledged = consoles.wait_for_commits(COMMITS_BETWEEN);
    assert_whole(address, acknowledged);
    consoles.assert_no_trouble();
    assert_eq!(consoles.numbers("found "), [0], "the guest and its database were started once");
    assert_eq!(lab.json(&["vm", "show", VM])["node"], node.as_str(), "it has not moved");
    wait_until_protected(&lab);

    consoles.wait_for_commits(COMMITS_BETWEEN);
    lab.ok(&["lab", "pull", &node]);
    let acknowledged = consoles.acknowledged();
    wait_until("the database is started on the other server", || consoles.numbers("found ").len() == 2);
    let found = consoles.numbers("found ");
    assert!(found.contains(&0) && found.iter().any(|found| *found >= acknowledged), "{found:?}, {acknowledged}");
    let acknowledged = consoles.wait_for_commits(COMMITS_BETWEEN);
    assert_whole(address, acknowledged);
    consoles.assert_no_trouble();
    assert_eq!(consoles.numbers("found ").len(), 2, "the database was started once in each boot");
    for node in ["a", "b"] {
        let log = std::fs::read_to_string(format!("/var/lib/pollux-lab/log/{node}-noded.log")).expect("its log");
        assert!(log.contains(" runs") && !log.contains("paused by trouble"), "an error reached QEMU on {node}: {log}");
    }

    lab.ok(&["vm", "shutdown", VM]);
    wait_until("the guest is shut down", || lab.json(&["vm", "show", VM])["state"] == "stopped");
    look_from_outside(&lab, consoles.acknowledged());
}
