//! Lives of real QEMUs. The guest is a boot sector: it prints `U`, then writes and reads 4 KiB of its disk again and
//! again, printing `.` each time and `E` for an error; on `q` from its console it switches itself off by ACPI.
#![allow(clippy::expect_used)]

use pollux_base::config::Accelerator;
use pollux_base::{ByteCount, Incarnation, VmId};
use pollux_vm::{Console, Event, Guest, Settings, Vms};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::sync::mpsc::Receiver;
use tokio::time::timeout;

/// No test waits longer for anything; QEMU needs 0.3 s for what is asked here, a busy machine more.
const AMPLE: Duration = Duration::from_secs(30);

/// `as --32 --msyntax=intel`, linked at 0x7c00:
///     start: cli; xor ax,ax; mov ds,ax; mov es,ax; mov ss,ax; mov sp,0x7c00; sti; mov [drive],dl; mov al,'U'; call putc
///     next:  mov dx,0x3fd; in al,dx; test al,1; jz io; mov dx,0x3f8; in al,dx; cmp al,'q'; je off
///     io:    mov ah,0x43; call disk; mov ah,0x42; call disk; mov al,'.'; call putc
///            mov ah,0x86; xor cx,cx; mov dx,20000; int 0x15; jmp next          (20 ms)
///     disk:  xor al,al; mov si,packet; mov dl,[drive]; int 0x13; jc failed; ret
///     failed: mov al,'E'
///     putc:  mov dx,0x3f8; out dx,al; ret
///     off:   mov dx,0x604; mov ax,0x2000; out dx,ax; hlt                        (soft off)
///     drive: .byte 0
///     packet: .byte 16,0; .word 8; .word 0x9000,0; .quad 8                      (8 sectors at sector 8)
const BOOT_SECTOR: &str = "\
    fa31c08ed88ec08ed0bc007cfb88165d7cb055e83a00bafd03eca8017408baf803ec3c71742fb443\
    e81500b442e81000b02ee81b00b48631c9ba204ecd15ebd630c0be5e7c8a165d7ccd137201c3b045\
    baf803eec3ba0406b80020eff40010000800009000000800000000000000";

/// A run directory, a disk and its NBD server. QEMUs that a failed test left are ended with it.
struct Place {
    dir: tempfile::TempDir,
    server: Option<Child>,
}

impl Place {
    fn new() -> Place {
        let dir = tempfile::tempdir().expect("tmp is writable");
        let disk = File::create(dir.path().join("disk.img")).expect("writable");
        // Less than a cylinder and the firmware finds no place to read from.
        disk.set_len(4 << 20).expect("writable");
        let code: Vec<u8> = (0..BOOT_SECTOR.len() / 2)
            .map(|at| u8::from_str_radix(&BOOT_SECTOR[2 * at..2 * at + 2], 16).expect("hexadecimal"))
            .collect();
        disk.write_all_at(&code, 0).expect("writable");
        disk.write_all_at(&[0x55, 0xaa], 510).expect("writable");
        let mut place = Place { dir, server: None };
        place.start_server();
        place
    }
    fn start_server(&mut self) {
        let server = Command::new("qemu-nbd")
            .args(["--persistent", "--shared=0", "--export-name=v1", "--format=raw", "--socket"])
            .args([self.nbd_socket(), self.dir.path().join("disk.img")])
            .spawn();
        self.server = Some(server.expect("qemu-utils is installed"));
    }
    fn kill_server(&mut self) {
        let mut server = self.server.take().expect("it runs");
        server.kill().expect("ours");
        server.wait().expect("ours");
    }
    fn nbd_socket(&self) -> PathBuf {
        self.dir.path().join("nbd.sock")
    }
    fn settings(&self) -> Settings {
        Settings {
            vm_dir: self.dir.path().join("vm"),
            nbd_socket: self.nbd_socket(),
            guest_cgroup: None,
            bridge: None,
            accelerator: Accelerator::Tcg,
        }
    }
    fn run_dir(&self) -> PathBuf {
        self.dir.path().join("vm/vm1")
    }
    fn pid(&self) -> Option<String> {
        let text = std::fs::read_to_string(self.run_dir().join("pid")).ok()?;
        text.split(' ').next().map(String::from)
    }
    fn assert_nothing_is_left(&self, pid: &str) {
        assert!(!Path::new("/proc").join(pid).exists(), "QEMU {pid} is still there");
        for file in ["pid", "guest.json", "qmp.sock", "console.sock"] {
            assert!(!self.run_dir().join(file).exists(), "{file} was left behind");
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(server) = &mut self.server {
            let _ = server.kill();
            let _ = server.wait();
        }
        if let Some(pid) = self.pid() {
            let _ = Command::new("kill").args(["-9", &pid]).status();
        }
    }
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

fn guest(incarnation: u64) -> Guest {
    Guest {
        vm: VmId(1),
        incarnation: Incarnation(incarnation),
        name: "small".into(),
        cpus: 1,
        memory: ByteCount(16 << 20),
        mac: "52:54:00:00:00:01".into(),
        disks: vec!["v1".into()],
    }
}

fn running(incarnation: u64) -> Event {
    Event::Running { vm: VmId(1), incarnation: Incarnation(incarnation) }
}

fn ended(incarnation: u64, by_guest: bool, detail: &str) -> Event {
    Event::Ended { vm: VmId(1), incarnation: Incarnation(incarnation), by_guest, detail: detail.into() }
}

async fn next(events: &mut Receiver<Event>) -> Event {
    timeout(AMPLE, events.recv()).await.expect("an event within the time").expect("the VMs are open")
}

/// Reads the console until `enough` says so of what was read.
async fn read_until(console: &mut Console, enough: impl Fn(&str) -> bool) -> String {
    let mut text = String::new();
    while !enough(&text) {
        let more = timeout(AMPLE, console.next()).await.expect("output within the time").expect("readable");
        text.push_str(&String::from_utf8_lossy(&more));
    }
    text
}

async fn start_and_see_it_up(vms: &Vms, events: &mut Receiver<Event>, incarnation: u64) -> Console {
    vms.start(guest(incarnation)).await;
    assert_eq!(next(events).await, running(incarnation));
    let mut console = vms.console(VmId(1), 1 << 20).expect("there");
    read_until(&mut console, |text| text.contains("U..")).await;
    console
}

#[test]
fn a_stop_is_told_when_qemu_is_gone_and_leaves_nothing() {
    let place = Place::new();
    runtime().block_on(async {
        let (vms, mut events) = Vms::open(place.settings()).await.expect("a new folder");
        start_and_see_it_up(&vms, &mut events, 1).await;
        let pid = place.pid().expect("it runs");
        vms.start(guest(1)).await;
        assert_eq!(next(&mut events).await, running(1), "what runs already is only told of again");
        assert_eq!(place.pid().as_deref(), Some(pid.as_str()));
        assert!(vms.stop(VmId(1)));
        assert_eq!(next(&mut events).await, ended(1, false, "stopped"));
        place.assert_nothing_is_left(&pid);
        assert!(!vms.stop(VmId(1)) && vms.running().is_empty());
    });
}

#[test]
fn a_guest_that_switches_itself_off_is_told_from_a_qemu_that_died() {
    let place = Place::new();
    runtime().block_on(async {
        let (vms, mut events) = Vms::open(place.settings()).await.expect("a new folder");
        start_and_see_it_up(&vms, &mut events, 1).await;
        vms.console_input(VmId(1)).await.expect("it runs").send(b"q").await.expect("taken");
        assert_eq!(next(&mut events).await, ended(1, true, "the guest shut down"));

        start_and_see_it_up(&vms, &mut events, 2).await;
        let pid = place.pid().expect("it runs");
        assert!(Command::new("kill").args(["-9", &pid]).status().expect("there is kill").success());
        assert_eq!(next(&mut events).await, ended(2, false, "QEMU was killed by signal 9"));
        place.assert_nothing_is_left(&pid);
    });
}

#[test]
fn a_qemu_survives_its_keeper_and_is_found_again() {
    let place = Place::new();
    let keeper = runtime();
    keeper.block_on(async {
        let (vms, mut events) = Vms::open(place.settings()).await.expect("a new folder");
        start_and_see_it_up(&vms, &mut events, 5).await;
    });
    drop(keeper);
    let pid = place.pid().expect("it runs on");
    runtime().block_on(async {
        let (vms, mut events) = Vms::open(place.settings()).await.expect("readable");
        assert_eq!(next(&mut events).await, running(5));
        assert_eq!(place.pid().as_deref(), Some(pid.as_str()));
        let mut console = vms.console(VmId(1), 0).expect("there");
        read_until(&mut console, |text| text.len() > 2).await;
        // An order of the past does not touch it; one of a new life replaces it.
        vms.start(guest(4)).await;
        assert!(matches!(next(&mut events).await, Event::StartFailed { incarnation: Incarnation(4), .. }));
        vms.start(guest(6)).await;
        assert_eq!(next(&mut events).await, ended(5, false, "stopped"));
        assert!(!Path::new("/proc").join(&pid).exists(), "the new run begins when the old is over");
        assert_eq!(next(&mut events).await, running(6));
        vms.stop(VmId(1));
        assert_eq!(next(&mut events).await, ended(6, false, "stopped"));
    });
}

#[test]
fn what_happened_while_nobody_watched_is_told_afterwards() {
    let place = Place::new();
    let keeper = runtime();
    let mut input = keeper.block_on(async {
        let (vms, mut events) = Vms::open(place.settings()).await.expect("a new folder");
        start_and_see_it_up(&vms, &mut events, 1).await;
        std::os::unix::net::UnixStream::connect(place.run_dir().join("console.sock")).expect("it runs")
    });
    drop(keeper);
    std::io::Write::write_all(&mut input, b"q").expect("taken");
    // It is off when it prints no more. There is nothing else to wait for: nobody watches.
    std::io::Read::read_to_end(&mut DotsUntilSilence(input), &mut Vec::new()).expect("readable");
    runtime().block_on(async {
        let (_vms, mut events) = Vms::open(place.settings()).await.expect("readable");
        let mut event = next(&mut events).await;
        if event == running(1) {
            // On a machine so busy that the silence was none.
            event = next(&mut events).await;
        }
        assert_eq!(event, ended(1, true, "the guest shut down"));
    });

    let keeper = runtime();
    keeper.block_on(async {
        let (vms, mut events) = Vms::open(place.settings()).await.expect("readable");
        start_and_see_it_up(&vms, &mut events, 2).await;
    });
    drop(keeper);
    let pid = place.pid().expect("it runs on");
    assert!(Command::new("kill").args(["-9", &pid]).status().expect("there is kill").success());
    runtime().block_on(async {
        let (_vms, mut events) = Vms::open(place.settings()).await.expect("readable");
        match next(&mut events).await {
            // Found dead, or found dying.
            Event::Ended { incarnation: Incarnation(2), by_guest: false, .. } => {}
            Event::Running { .. } => {
                assert!(matches!(next(&mut events).await, Event::Ended { by_guest: false, .. }));
            }
            other => panic!("{other:?}"),
        }
        place.assert_nothing_is_left(&pid);
    });
}

/// Ends when a guest that prints every 20 ms has been silent for a second.
struct DotsUntilSilence(std::os::unix::net::UnixStream);

impl std::io::Read for DotsUntilSilence {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.set_read_timeout(Some(Duration::from_secs(1)))?;
        match self.0.read(buffer) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(0),
            other => other,
        }
    }
}

#[test]
fn a_disk_server_that_dies_and_comes_back_is_a_pause_for_the_guest_and_no_error() {
    let mut place = Place::new();
    runtime().block_on(async {
        let (vms, mut events) = Vms::open(place.settings()).await.expect("a new folder");
        let mut console = start_and_see_it_up(&vms, &mut events, 1).await;
        place.kill_server();
        // The guest is in the middle of a request when it no longer prints.
        let stuck = timeout(Duration::from_secs(2), async {
            loop {
                console.next().await.expect("readable");
            }
        });
        assert!(stuck.await.is_err(), "nothing ends the loop");
        place.start_server();
        let text = read_until(&mut console, |text| text.len() > 20).await;
        assert!(!text.contains('E'), "the guest saw an error: {text}");
        assert!(events.try_recv().is_err(), "and nothing had to be mended");
        vms.stop(VmId(1));
        assert_eq!(next(&mut events).await, ended(1, false, "stopped"));
    });
}

/// The last line: a server that answers with an error, once.
#[test]
fn a_failed_request_pauses_the_guest_which_goes_on_with_it_and_sees_no_error() {
    let mut place = Place::new();
    place.kill_server();
    let file = format!("file.image.filename={}", place.dir.path().join("disk.img").display());
    let fault = "file.inject-error.0.event=write_aio,file.inject-error.0.errno=5,file.inject-error.0.once=on";
    let server = Command::new("qemu-nbd")
        .args(["--persistent", "--shared=0", "--export-name=v1", "--socket"])
        .arg(place.nbd_socket())
        .args(["--image-opts", &format!("driver=raw,file.driver=blkdebug,file.image.driver=file,{file},{fault}")])
        .spawn();
    place.server = Some(server.expect("qemu-utils is installed"));
    runtime().block_on(async {
        let (vms, mut events) = Vms::open(place.settings()).await.expect("a new folder");
        let mut console = vms.console(VmId(1), 0).expect("made");
        vms.start(guest(1)).await;
        assert_eq!(next(&mut events).await, running(1));
        match next(&mut events).await {
            Event::Stalled { detail, .. } => assert!(detail.contains("write of disk0"), "{detail}"),
            other => panic!("{other:?}"),
        }
        assert_eq!(next(&mut events).await, running(1));
        let text = read_until(&mut console, |text| text.len() > 10).await;
        assert!(text.starts_with("U...") && !text.contains('E'), "{text}");
        vms.stop(VmId(1));
        assert_eq!(next(&mut events).await, ended(1, false, "stopped"));
    });
}

#[test]
fn a_guest_whose_disk_is_away_can_be_stopped() {
    let mut place = Place::new();
    runtime().block_on(async {
        let (vms, mut events) = Vms::open(place.settings()).await.expect("a new folder");
        start_and_see_it_up(&vms, &mut events, 1).await;
        let pid = place.pid().expect("it runs");
        place.kill_server();
        vms.stop(VmId(1));
        assert_eq!(next(&mut events).await, ended(1, false, "stopped"));
        place.assert_nothing_is_left(&pid);

        // Neither does a start that waits for its disk stand in the way.
        vms.start(guest(2)).await;
        while place.pid().is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let pid = place.pid().expect("just seen");
        vms.stop(VmId(1));
        assert_eq!(next(&mut events).await, ended(2, false, "stopped before it ran"));
        place.assert_nothing_is_left(&pid);
    });
}

#[test]
fn a_start_that_cannot_succeed_says_why_and_leaves_nothing() {
    let place = Place::new();
    runtime().block_on(async {
        let settings = Settings { bridge: Some("nosuchbridge0".into()), ..place.settings() };
        let (vms, mut events) = Vms::open(settings).await.expect("a new folder");
        vms.start(guest(1)).await;
        match next(&mut events).await {
            Event::StartFailed { reason, .. } => assert!(reason.contains("nosuchbridge0"), "{reason}"),
            other => panic!("{other:?}"),
        }
        vms.start(Guest { cpus: 0, ..guest(2) }).await;
        match next(&mut events).await {
            Event::StartFailed { reason, .. } => assert!(reason.contains("CPUs"), "{reason}"),
            other => panic!("{other:?}"),
        }
        assert!(!place.run_dir().join("guest.json").exists());
    });
}

/// What the guard relies on: one write to the cgroup ends the guest, wherever it is in its life.
#[test]
fn the_guests_cgroup_holds_qemu_and_ends_it() {
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("there is /proc");
    let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).expect("cgroup2 is mounted");
    let cgroup = Path::new(mount.split(' ').nth(1).expect("a mount has a place"))
        .join(format!("pollux-test-{}", std::process::id()));
    let place = Place::new();
    runtime().block_on(async {
        let settings = Settings { guest_cgroup: Some(cgroup.clone()), ..place.settings() };
        let (vms, mut events) = Vms::open(settings).await.expect("a new folder");
        start_and_see_it_up(&vms, &mut events, 1).await;
        let members = std::fs::read_to_string(cgroup.join("cgroup.procs")).expect("made for the guest");
        assert_eq!(members.trim(), place.pid().expect("it runs"));
        std::fs::write(cgroup.join("cgroup.kill"), "1").expect("needs root");
        assert_eq!(next(&mut events).await, ended(1, false, "QEMU was killed by signal 9"));
    });
    std::fs::remove_dir(&cgroup).expect("empty");
}

/// In a network namespace of its own, made for it: the test starts itself again in there.
#[test]
fn a_network_card_is_on_the_bridge_and_goes_with_its_guest() {
    const INSIDE: &str = "POLLUX_TEST_INSIDE_NAMESPACE";
    if std::env::var_os(INSIDE).is_none() {
        let me = std::env::current_exe().expect("this test");
        let inner = Command::new("unshare")
            .args(["--net", "--"])
            .arg(me)
            .args(["--exact", "a_network_card_is_on_the_bridge_and_goes_with_its_guest"])
            .env(INSIDE, "yes")
            .output()
            .expect("util-linux is installed");
        assert!(
            inner.status.success(),
            "in a network namespace of its own (needs root): {}{}",
            String::from_utf8_lossy(&inner.stdout),
            String::from_utf8_lossy(&inner.stderr)
        );
        return;
    }
    let ip = |words: &str| {
        let output = Command::new("ip").args(words.split(' ')).output().expect("iproute2 is installed");
        String::from_utf8_lossy(&output.stdout).to_string()
    };
    ip("link add guests type bridge");
    ip("link set guests up");
    // One that a crash left behind is replaced.
    ip("tuntap add dev pv1 mode tap");
    let place = Place::new();
    runtime().block_on(async {
        let settings = Settings { bridge: Some("guests".into()), ..place.settings() };
        let (vms, mut events) = Vms::open(settings).await.expect("a new folder");
        start_and_see_it_up(&vms, &mut events, 1).await;
        let cards = ip("-o link show master guests");
        assert!(cards.contains(" pv1:") && cards.contains("LOWER_UP"), "{cards}");
        vms.stop(VmId(1));
        assert_eq!(next(&mut events).await, ended(1, false, "stopped"));
        assert_eq!(ip("-o link show master guests"), "");
    });
}
