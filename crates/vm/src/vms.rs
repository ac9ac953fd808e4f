//! This node's virtual machines: who they are, and the way to each one's task.

use crate::accelerator::Chosen;
use crate::console::{Console, ConsoleInput};
use crate::guest::Guest;
use crate::life::{Asked, Life, Shared};
use crate::process::Process;
use crate::rundir::RunDir;
use crate::{Event, Settings};
use pollux_base::{Incarnation, VmId};
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// Events that wait for a busy receiver; then the VMs' tasks wait, not QEMU.
const EVENTS_MAX: usize = 64;

/// The VMs of this node. Dropping it ends no QEMU.
#[derive(Clone, Debug)]
pub struct Vms {
    shared: Arc<Shared>,
    runs: Arc<Mutex<BTreeMap<VmId, Run>>>,
}

#[derive(Debug)]
struct Run {
    incarnation: Incarnation,
    asked: watch::Sender<Asked>,
    task: JoinHandle<()>,
}

impl Vms {
    /// Finds the QEMUs that an earlier process of ours left running and takes them over; `Running` or `Ended` is said of
    /// each. Needs a tokio runtime. Must be the only one on this run directory.
    pub async fn open(settings: Settings) -> io::Result<(Vms, mpsc::Receiver<Event>)> {
        std::fs::create_dir_all(&settings.vm_dir)?;
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        let shared = Arc::new(Shared { settings, events, accelerator: tokio::sync::Mutex::new(None) });
        let vms = Vms { shared, runs: Arc::default() };
        for vm in RunDir::list(&vms.shared.settings)? {
            let dir = RunDir::of(&vms.shared.settings, vm);
            // A run that cannot be read may be that of a living QEMU: better not to begin than to run it twice.
            let named = |error: io::Error| io::Error::new(error.kind(), format!("the run directory of {vm}: {error}"));
            let Some((guest, identity)) = dir.read().map_err(named)? else { continue };
            if guest.vm != vm {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("the run directory of {vm} is of {}", guest.vm),
                ));
            }
            let process = match identity {
                Some(identity) => Process::find(identity)?,
                None => None,
            };
            vms.spawn(guest, |life| life.attach(process));
        }
        // A start must not wait for the probe if that can be helped.
        let shared = vms.shared.clone();
        tokio::spawn(async move { shared.accelerator().await });
        Ok((vms, receiver))
    }

    /// Runs the guest. What already runs under this incarnation is only told of again. An earlier incarnation that
    /// still runs here is stopped first, and `Ended` said of it; a later one is not touched, and the start fails.
    pub async fn start(&self, guest: Guest) {
        let (vm, incarnation) = (guest.vm, guest.incarnation);
        let later = {
            let runs = self.lock();
            match runs.get(&vm).filter(|run| !run.task.is_finished()) {
                Some(run) if run.incarnation == incarnation => {
                    run.asked.send_modify(|asked| asked.announcements += 1);
                    return;
                }
                Some(run) if run.incarnation > incarnation => Some(run.incarnation),
                _ => None,
            }
        };
        match later {
            Some(later) => {
                let reason = format!("it runs under the later {later:?}");
                let _ = self.shared.events.send(Event::StartFailed { vm, incarnation, reason }).await;
            }
            None => self.spawn(guest, Life::start),
        }
    }

    /// Presses the guest's power button. Whether the guest obeys shows when it ends. `false`: it does not run here.
    pub fn shutdown(&self, vm: VmId) -> bool {
        self.ask(vm, |asked| asked.shutdowns += 1)
    }

    /// Ends QEMU now. `Ended` is said when it is gone. `false`: it does not run here.
    pub fn stop(&self, vm: VmId) -> bool {
        self.ask(vm, |asked| asked.stop = true)
    }

    /// What runs here, or is starting or ending.
    pub fn running(&self) -> BTreeMap<VmId, Incarnation> {
        let runs = self.lock();
        runs.iter().filter(|(_, run)| !run.task.is_finished()).map(|(vm, run)| (*vm, run.incarnation)).collect()
    }

    /// The console's output, beginning with at most `history_bytes` of what was said before. Also of a VM that does not
    /// run, or never ran here: its output follows when it does.
    pub fn console(&self, vm: VmId, history_bytes: u64) -> io::Result<Console> {
        let dir = RunDir::of(&self.shared.settings, vm);
        dir.make()?;
        Console::open(&dir.console_log(), history_bytes)
    }

    /// A way to type at the console.
    pub async fn console_input(&self, vm: VmId) -> io::Result<ConsoleInput> {
        ConsoleInput::connect(&RunDir::of(&self.shared.settings, vm).console_socket()).await
    }

    /// What runs the guests' instructions, and why. Waits for the probe.
    pub async fn accelerator(&self) -> Chosen {
        self.shared.accelerator().await
    }

    fn ask(&self, vm: VmId, change: impl FnOnce(&mut Asked)) -> bool {
        match self.lock().get(&vm).filter(|run| !run.task.is_finished()) {
            Some(run) => {
                run.asked.send_modify(change);
                true
            }
            None => false,
        }
    }

    /// Begins a task for this run, which first sees an earlier run of the same VM out.
    fn spawn<F>(&self, guest: Guest, live: impl FnOnce(Life) -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send,
    {
        let (vm, incarnation) = (guest.vm, guest.incarnation);
        let (asked, receiver) = watch::channel(Asked::default());
        let mut runs = self.lock();
        let earlier = runs.remove(&vm);
        let shared = self.shared.clone();
        let task = tokio::spawn(async move {
            if let Some(earlier) = earlier {
                earlier.asked.send_modify(|asked| asked.stop = true);
                let _ = earlier.task.await;
            }
            live(Life::new(shared, guest, receiver)).await;
        });
        runs.insert(vm, Run { incarnation, asked, task });
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<VmId, Run>> {
        // Nothing that runs under the lock can leave the map half changed.
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
