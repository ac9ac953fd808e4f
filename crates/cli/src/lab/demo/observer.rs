//! Watches a lab from outside: the guest's console, its QEMU processes, and each node's API.
//!
//! Nothing here is told by the daemons but the views of the API: processes are read from the control groups, consoles
//! from QEMU's own log. The observer looks often (it is no daemon) and only looks.

use super::console::Listener;
use super::record::{Record, View};
use crate::context::{Context, client_of};
use crate::failure::Outcome;
use crate::lab::cgroup;
use crate::lab::site::Site;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How exactly the end and start of processes and lines are timed.
const LOOK: Duration = Duration::from_millis(5);
/// How exactly the views of the nodes are timed; each look is a request.
const ASK: Duration = Duration::from_millis(40);

/// The one clock of a demo, and where it stands on the wall.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: Instant,
    pub start_unix_ms: u64,
}

impl Clock {
    pub fn start() -> Clock {
        let unix = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Clock { start: Instant::now(), start_unix_ms: u64::try_from(unix.as_millis()).unwrap_or(0) }
    }
    pub fn now_ms(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// Runs until dropped.
pub struct Observer {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    record: Mutex<Record>,
    stop: AtomicBool,
    clock: Clock,
}

impl Observer {
    pub fn start(site: &Site, vm: &str, clock: Clock) -> Outcome<Observer> {
        let shared = Arc::new(Shared { record: Mutex::default(), stop: AtomicBool::new(false), clock });
        let mut threads = Vec::new();
        let (looked, machine, name) = (shared.clone(), site.clone(), vm.to_string());
        threads.push(std::thread::spawn(move || look(&looked, &machine, &name)));
        for (node, server) in site.nodes.iter().zip(site.servers()) {
            // One client per node: what one node shows is not delayed by the death of another.
            let context = Context { servers: vec![server], ca: site.ca_file(), token_file: site.token_file() };
            let client = client_of(&context)?;
            let (asked, node, vm) = (shared.clone(), node.name.clone(), vm.to_string());
            threads.push(std::thread::spawn(move || {
                while !asked.stop.load(Ordering::Relaxed) {
                    if let Ok(status) = client.status() {
                        let view = View::of(&status, &vm);
                        asked.record().on_view(asked.clock.now_ms(), &node, view);
                    }
                    std::thread::sleep(ASK);
                }
            }));
        }
        Ok(Observer { shared, threads })
    }

    /// What was seen so far; held only for a moment.
    pub fn record(&self) -> MutexGuard<'_, Record> {
        self.shared.record()
    }
}

impl Shared {
    fn record(&self) -> MutexGuard<'_, Record> {
        // A sighting is put in whole or not at all, so a thread that died did not leave half of one.
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn look(shared: &Shared, site: &Site, vm: &str) {
    let mut consoles = Consoles::default();
    let mut processes = Processes { marker: format!("guest={vm},"), known: BTreeMap::new() };
    while !shared.stop.load(Ordering::Relaxed) {
        let present = processes.look(site);
        shared.record().on_qemus(shared.clock.now_ms(), &present);
        consoles.look(site, shared);
        std::thread::sleep(LOOK);
    }
}

/// The guest's QEMU processes, by what their command line says.
struct Processes {
    marker: String,
    /// A process keeps its command line once it is QEMU; before, it is still the one that became it.
    known: BTreeMap<i32, bool>,
}

impl Processes {
    fn look(&mut self, site: &Site) -> BTreeSet<(String, i32)> {
        let mut present = BTreeSet::new();
        let mut seen = BTreeMap::new();
        for node in &site.nodes {
            for pid in cgroup::processes_below(&site.guests_cgroup(node)) {
                let is_guest = self.known.get(&pid).copied().filter(|known| *known).unwrap_or_else(|| {
                    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                    String::from_utf8_lossy(&line).contains(&self.marker)
                });
                seen.insert(pid, is_guest);
                if is_guest {
                    present.insert((node.name.clone(), pid));
                }
            }
        }
        self.known = seen;
        present
    }
}

/// Consoles' logs, followed. A log is known by its inode: the one of a later boot is another, and what is open can be
/// read to its end although a reboot has wiped it.
#[derive(Default)]
struct Consoles {
    open: BTreeMap<(String, u64), (File, Listener)>,
}

impl Consoles {
    fn look(&mut self, site: &Site, shared: &Shared) {
        for node in &site.nodes {
            for path in console_logs(site, &node.name) {
                let Ok(file) = File::open(&path) else { continue };
                let Ok(inode) = file.metadata().map(|meta| meta.ino()) else { continue };
                self.open.entry((node.name.clone(), inode)).or_insert_with(|| (file, Listener::default()));
            }
        }
        let mut buffer = [0; 16 * 1024];
        for ((node, _), (file, listener)) in &mut self.open {
            while let Ok(count @ 1..) = file.read(&mut buffer) {
                let at_ms = shared.clock.now_ms();
                for said in listener.hear(&buffer[..count]) {
                    shared.record().on_said(at_ms, node, said);
                }
            }
        }
    }
}

/// `RUN/NODE/vm/*/console.log`.
pub fn console_logs(site: &Site, node: &str) -> Vec<PathBuf> {
    let Some(node) = site.node(node) else { return Vec::new() };
    let Ok(entries) = fs::read_dir(site.node_config(node).vm_dir()) else { return Vec::new() };
    entries.flatten().map(|entry| entry.path().join("console.log")).filter(|path| path.exists()).collect()
}
