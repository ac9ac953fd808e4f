//! The lab's guest image (`scripts/make-image`) in a real QEMU: a real kernel boots from its disk, and what its writer
//! acknowledged is there after whatever happens to QEMU.
#![allow(clippy::expect_used)]

use pollux_base::config::Accelerator;
use pollux_base::{ByteCount, Incarnation, VmId};
use pollux_vm::{Console, Event, Guest, Settings, Vms};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;
use tokio::sync::mpsc::Receiver;
use tokio::time::timeout;

/// The guest boots in about 4 s on an idle machine, under software emulation.
const AMPLE: Duration = Duration::from_secs(90);

struct Server(Child);

impl Server {
    fn start(dir: &Path) -> Server {
        let server = Command::new("qemu-nbd")
            .args(["--persistent", "--shared=0", "--export-name=v1", "--format=raw", "--discard=unmap", "--socket"])
            .args([dir.join("nbd.sock"), dir.join("disk.raw")])
            .spawn();
        Server(server.expect("qemu-utils is installed"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Ends a QEMU that a failed test left behind.
struct Broom(PathBuf);

impl Drop for Broom {
    fn drop(&mut self) {
        if let Ok(text) = std::fs::read_to_string(&self.0)
            && let Some(pid) = text.split(' ').next()
        {
            let _ = Command::new("kill").args(["-9", pid]).status();
        }
    }
}

/// The console, line by line.
struct Lines {
    console: Console,
    buffer: String,
}

impl Lines {
    async fn next(&mut self) -> String {
        loop {
            if let Some(end) = self.buffer.find('\n') {
                let line = self.buffer.drain(..=end).collect::<String>();
                return line.trim().to_string();
            }
            let more = timeout(AMPLE, self.console.next()).await.expect("output within the time").expect("readable");
            self.buffer.push_str(&String::from_utf8_lossy(&more));
        }
    }
    /// The number in the next line that begins so.
    async fn number_after(&mut self, words: &str) -> u64 {
        loop {
            let line = self.next().await;
            assert!(!line.starts_with("damaged") && !line.starts_with("writer:"), "{line}");
            if let Some(number) = line.strip_prefix(words) {
                return number.trim().parse().expect("a number");
            }
        }
    }
    async fn acknowledged_beyond(&mut self, number: u64) -> u64 {
        loop {
            let acknowledged = self.number_after("ack ").await;
            if acknowledged > number {
                return acknowledged;
            }
        }
    }
}

async fn start(vms: &Vms, events: &mut Receiver<Event>, incarnation: u64) -> Lines {
    let guest = Guest {
        vm: VmId(1),
        incarnation: Incarnation(incarnation),
        name: "writer".into(),
        cpus: 1,
        memory: ByteCount(256 << 20),
        mac: "52:54:00:00:00:0a".into(),
        disks: vec!["v1".into()],
    };
    let console = vms.console(VmId(1), 0).expect("made if it is not there");
    vms.start(guest).await;
    let running = Event::Running { vm: VmId(1), incarnation: Incarnation(incarnation) };
    assert_eq!(next(events).await, running);
    Lines { console, buffer: String::new() }
}

async fn next(events: &mut Receiver<Event>) -> Event {
    timeout(AMPLE, events.recv()).await.expect("an event within the time").expect("the VMs are open")
}

#[tokio::test]
async fn acknowledged_records_survive_a_killed_qemu_a_dead_disk_server_and_a_shutdown() {
    let dir = tempfile::tempdir().expect("tmp is writable");
    let disk = dir.path().join("disk.raw");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/make-image");
    assert!(Command::new(script).arg(&disk).status().expect("bash is there").success());
    std::fs::File::options().write(true).open(&disk).and_then(|file| file.set_len(1 << 30)).expect("writable");
    let server = Server::start(dir.path());
    let vm_dir = dir.path().join("vm");
    let _broom = Broom(vm_dir.join("vm1/pid"));
    let settings = Settings {
        vm_dir: vm_dir.clone(),
        nbd_socket: dir.path().join("nbd.sock"),
        guest_cgroup: None,
        bridge: None,
        accelerator: Accelerator::Tcg,
    };
    let (vms, mut events) = Vms::open(settings).await.expect("a new folder");

    let mut lines = start(&vms, &mut events, 1).await;
    assert_eq!(lines.number_after("found ").await, 0);
    let mut acknowledged = lines.acknowledged_beyond(20).await;

    // The disk's server dies and comes back: the writer pauses and goes on.
    drop(server);
    let server = Server::start(dir.path());
    acknowledged = lines.acknowledged_beyond(acknowledged + 50).await;

    // QEMU dies: everything acknowledged is found by the next run.
    let pid = std::fs::read_to_string(vm_dir.join("vm1/pid")).expect("it runs");
    let pid = pid.split(' ').next().expect("the pid comes first");
    assert!(Command::new("kill").args(["-9", pid]).status().expect("there is kill").success());
    assert!(matches!(next(&mut events).await, Event::Ended { by_guest: false, .. }));
    while let Ok(Ok(more)) = timeout(Duration::from_millis(100), lines.console.next()).await {
        lines.buffer.push_str(&String::from_utf8_lossy(&more));
    }
    while let Some(end) = lines.buffer.find('\n') {
        let line = lines.buffer.drain(..=end).collect::<String>();
        acknowledged = line.trim().strip_prefix("ack ").and_then(|n| n.parse().ok()).unwrap_or(acknowledged);
    }

    let mut lines = start(&vms, &mut events, 2).await;
    let found = lines.number_after("found ").await;
    assert!(found == acknowledged || found == acknowledged + 1, "acknowledged {acknowledged}, found {found}");
    lines.acknowledged_beyond(found + 10).await;

    // The power button: a clean shutdown, told as the guest's own.
    assert!(vms.shutdown(VmId(1)));
    let Event::Ended { by_guest: true, .. } = next(&mut events).await else { panic!("it did not shut down by itself") };
    let log = std::fs::read_to_string(vm_dir.join("vm1/console.log")).expect("kept");
    assert!(log.contains("guest: clean shutdown"), "{}", &log[log.len().saturating_sub(500)..]);
    drop(server);
}
