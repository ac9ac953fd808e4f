//! The life of one QEMU: one task that starts it or takes it over, watches it, and cleans up after it.
//!
//! starting -> running <-> stalled -> ending -> gone. What is asked of it comes as a value that can be asked twice
//! without harm; what becomes of it is told as events.

use crate::accelerator::{self, Chosen, Engine};
use crate::console;
use crate::guest::Guest;
use crate::process::Process;
use crate::qmp::{Qmp, QmpError};
use crate::rundir::RunDir;
use crate::{Event, Settings, argv, tap};
use serde_json::json;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

/// QEMU answers its control socket by then or the start has failed: it opens its disks first, and starts slowly on a
/// busy machine.
const START_TIMEOUT: Duration = Duration::from_secs(argv::OPEN_TIMEOUT_S as u64 + 15);
/// While a QEMU starts its socket is tried this often; nobody tells us when it begins to listen.
const CONNECT_RETRY: Duration = Duration::from_millis(20);
/// For commands that only set a state. QEMU's main loop is normally free within milliseconds; after this it is stuck.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// A QEMU that was asked to end has this long before it is killed. Its disks are safe either way: what it acknowledged
/// to the guest is at the server.
const QUIT_TIMEOUT: Duration = Duration::from_secs(2);
/// Between attempts to get a stopped guest, or a lost control connection, going again: doubled from the first to the last.
const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_LAST: Duration = Duration::from_secs(10);
/// How often the console's file is made smaller if need be: a guest that floods it at 10 MB/s fills 300 MB meanwhile.
const CONSOLE_CARE: Duration = Duration::from_secs(30);

/// A broken promise within QEMU; its last words say which.
const SIGABRT: i32 = 6;

const BY_GUEST: &str = "the guest shut down";

/// What is asked of a VM. Only grows.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    pub stop: bool,
    /// How often the guest was to be asked to shut down.
    pub shutdowns: u64,
    /// How often the present state was to be told again.
    pub announcements: u64,
}

/// What the lives of a node share.
#[derive(Debug)]
pub struct Shared {
    pub settings: Settings,
    pub events: mpsc::Sender<Event>,
    pub accelerator: Mutex<Option<Chosen>>,
}

impl Shared {
    /// Chosen once; the first who asks waits for the probe.
    pub async fn accelerator(&self) -> Chosen {
        let mut chosen = self.accelerator.lock().await;
        match &*chosen {
            Some(chosen) => chosen.clone(),
            None => chosen.insert(accelerator::choose(&self.settings).await).clone(),
        }
    }
    /// A QEMU ended before its guest ran: perhaps for its accelerator's sake, so that is chosen anew.
    async fn doubt_accelerator(&self) {
        let mut chosen = self.accelerator.lock().await;
        if chosen.take().is_some_and(|chosen| chosen.engine == Engine::Kvm) {
            accelerator::forget(&self.settings);
        }
    }
    async fn tell(&self, event: Event) {
        tracing::info!(?event, "VM");
        // Nobody listens any more: this process is ending, its QEMUs are not.
        let _ = self.events.send(event).await;
    }
}

pub struct Life {
    shared: Arc<Shared>,
    guest: Guest,
    dir: RunDir,
    asked: watch::Receiver<Asked>,
}

/// Why there is no QEMU that runs.
enum NotStarted {
    Failed(String),
    Stopped,
}

/// A QEMU under our care.
struct Live {
    process: Process,
    qmp: Option<Qmp>,
    /// The guest shut itself down.
    by_guest: bool,
    /// Disk errors already dealt with.
    io_errors_seen: u64,
    shutdowns_asked: u64,
    announcements_asked: u64,
    /// A disk error holds the guest: what it was, when to try again and how long to wait the next time.
    stalled: Option<Stalled>,
    reconnect_at: Instant,
    reconnect_wait: Duration,
}

struct Stalled {
    detail: String,
    retry_at: Instant,
    wait: Duration,
}

/// What woke the task up.
enum Wake {
    Gone(Option<ExitStatus>),
    Asked,
    Seen,
    QmpLost,
    RetryStalled,
    Reconnect,
    CareForConsole,
}

impl Life {
    pub fn new(shared: Arc<Shared>, guest: Guest, asked: watch::Receiver<Asked>) -> Life {
        let dir = RunDir::of(&shared.settings, guest.vm);
        Life { shared, guest, dir, asked }
    }

    /// Starts QEMU and lives with it to its end.
    pub async fn start(mut self) {
        let mut process = None;
        let mut asked = self.asked.clone();
        let begun = tokio::select! {
            begun = self.begin(&mut process) => begun,
            // An error would mean that nobody can ask any more, which is no reason to stop.
            Ok(_) = asked.wait_for(|asked| asked.stop) => Err(NotStarted::Stopped),
        };
        let why = match (begun, process) {
            (Ok(qmp), Some(process)) => {
                self.tell_running().await;
                return self.live(Live::new(process, Some(qmp))).await;
            }
            (Ok(_), None) => unreachable!("begin leaves the process that it talks to"),
            (Err(why), process) => {
                if let Some(mut process) = process {
                    process.kill();
                    process.gone().await;
                }
                why
            }
        };
        if matches!(why, NotStarted::Failed(_)) {
            self.shared.doubt_accelerator().await;
        }
        self.clean_up().await;
        let (vm, incarnation) = (self.guest.vm, self.guest.incarnation);
        self.shared
            .tell(match why {
                NotStarted::Failed(reason) => Event::StartFailed { vm, incarnation, reason },
                NotStarted::Stopped => {
                    Event::Ended { vm, incarnation, by_guest: false, detail: "stopped before it ran".into() }
                }
            })
            .await;
    }

    /// Takes over a QEMU that an earlier process of ours started.
    pub async fn attach(self, process: Option<Process>) {
        let Some(mut process) = process else {
            return self.end("QEMU had ended while nobody watched".into(), false).await;
        };
        let mut live = match timeout(CALL_TIMEOUT, self.connect(&mut process)).await {
            Ok(Ok(qmp)) => Live::new(process, Some(qmp)),
            // It is alive and nobody else's: it counts as running, and is asked again by and by.
            Ok(Err(NotStarted::Failed(_) | NotStarted::Stopped)) | Err(_) => Live::new(process, None),
        };
        match self.state(&mut live).await.as_deref() {
            // Started, but never told to go on, by a process that is gone: whether it still may is not ours to say.
            Some("prelaunch") => {
                self.quit(&mut live).await;
                return self.end("it was not yet running when its keeper ended".into(), false).await;
            }
            Some("shutdown") => {
                self.quit(&mut live).await;
                return self.end(BY_GUEST.into(), true).await;
            }
            _ => self.tell_state(&live).await,
        }
        self.live(live).await;
    }

    /// Everything until the guest was told to go on. Leaves the process in `process` as soon as there is one. Dropped
    /// when a stop is asked for.
    async fn begin(&mut self, process: &mut Option<Process>) -> Result<Qmp, NotStarted> {
        let failed = |what: &str, error: &dyn std::fmt::Display| NotStarted::Failed(format!("{what}: {error}"));
        self.guest.check().map_err(|error| failed("QEMU can not run it", &error))?;
        let settings = &self.shared.settings;
        let engine = self.shared.accelerator().await.engine;
        let log = self.dir.prepare(&self.guest).map_err(|error| failed("its run directory cannot be made", &error))?;
        if let Some(bridge) = &settings.bridge {
            tap::create(self.guest.vm, bridge).await.map_err(NotStarted::Failed)?;
        }
        let argv = argv::argv(&self.guest, settings, engine, &self.dir);
        let deadline = Instant::now() + START_TIMEOUT;
        let spawned =
            Process::spawn(&argv, log, settings.guest_cgroup.as_deref(), |identity| self.dir.record(identity));
        let process = process.insert(spawned.map_err(|error| failed("QEMU could not be started", &error))?);
        let too_late = |_| NotStarted::Failed(format!("QEMU was not ready after {} s", START_TIMEOUT.as_secs()));
        let qmp = timeout_at(deadline, self.connect(process)).await.map_err(too_late)??;
        match qmp.call("cont", json!({}), CALL_TIMEOUT).await {
            Ok(_) => Ok(qmp),
            Err(error) => Err(NotStarted::Failed(error.to_string())),
        }
    }

    /// Connects to QEMU's control socket as soon as it is there. Without end unless QEMU ends: the caller bounds it.
    async fn connect(&self, process: &mut Process) -> Result<Qmp, NotStarted> {
        let socket = self.dir.qmp_socket();
        let connected = async {
            loop {
                match Qmp::connect(&socket, START_TIMEOUT).await {
                    Ok(qmp) => return Ok(qmp),
                    Err(QmpError::Connect(_) | QmpError::Closed) => sleep(CONNECT_RETRY).await,
                    Err(error) => return Err(NotStarted::Failed(error.to_string())),
                }
            }
        };
        tokio::select! {
            qmp = connected => qmp,
            status = process.gone() => Err(NotStarted::Failed(self.obituary(status))),
        }
    }

    /// Lives with a QEMU to its end.
    async fn live(mut self, mut live: Live) {
        let status = loop {
            let wake = self.next_wake(&mut live).await;
            if let Wake::Gone(status) = wake {
                break status;
            }
            if self.on_wake(wake, &mut live).await {
                break self.quit(&mut live).await;
            }
        };
        let detail = match live.by_guest {
            true => BY_GUEST.into(),
            false if self.asked.borrow().stop => "stopped".into(),
            false => self.obituary(status),
        };
        self.end(detail, live.by_guest).await;
    }

    async fn next_wake(&mut self, live: &mut Live) -> Wake {
        let mut seen = live.qmp.as_ref().map(Qmp::seen);
        let io_errors = live.io_errors_seen;
        let (shutdowns, announcements) = (live.shutdowns_asked, live.announcements_asked);
        // Seen values are compared, not counted: what came before we looked is seen as well.
        let news = async {
            match &mut seen {
                None => std::future::pending().await,
                Some(seen) => match seen.wait_for(|seen| seen.io_errors > io_errors || seen.shutdown.is_some()).await {
                    Ok(_) => Wake::Seen,
                    Err(_) => Wake::QmpLost,
                },
            }
        };
        let retry_at = live.stalled.as_ref().map(|stalled| stalled.retry_at);
        let is_asked = |asked: &Asked| asked.stop || asked.shutdowns > shutdowns || asked.announcements > announcements;
        tokio::select! {
            status = live.process.gone() => Wake::Gone(status),
            Ok(_) = self.asked.wait_for(is_asked) => Wake::Asked,
            wake = news => wake,
            () = sleep_until(retry_at.unwrap_or_else(Instant::now)), if retry_at.is_some() => Wake::RetryStalled,
            () = sleep_until(live.reconnect_at), if live.qmp.is_none() => Wake::Reconnect,
            () = sleep(CONSOLE_CARE) => Wake::CareForConsole,
        }
    }

    /// Does what the hour asks for; says whether QEMU is to be ended now.
    async fn on_wake(&mut self, wake: Wake, live: &mut Live) -> bool {
        match wake {
            Wake::Gone(_) => unreachable!("its caller deals with the end"),
            Wake::Asked => {
                let asked = self.asked.borrow().clone();
                if asked.stop {
                    return true;
                }
                if asked.announcements > live.announcements_asked {
                    live.announcements_asked = asked.announcements;
                    self.tell_state(live).await;
                }
                if asked.shutdowns > live.shutdowns_asked {
                    live.shutdowns_asked = asked.shutdowns;
                    self.power_button(live).await;
                }
            }
            Wake::Seen => {
                let seen = live.qmp.as_ref().map(|qmp| qmp.seen().borrow().clone()).unwrap_or_default();
                if seen.io_errors > live.io_errors_seen {
                    live.io_errors_seen = seen.io_errors;
                    live.stall(seen.io_error);
                    self.tell_state(live).await;
                }
                if seen.shutdown.is_some() {
                    live.by_guest = seen.shutdown.is_some_and(|shutdown| shutdown.by_guest);
                    return true;
                }
            }
            Wake::QmpLost => {
                live.qmp = None;
                live.reconnect_at = Instant::now() + live.reconnect_wait;
            }
            Wake::Reconnect => {
                match Qmp::connect(&self.dir.qmp_socket(), CALL_TIMEOUT).await {
                    Ok(qmp) => {
                        live.qmp = Some(qmp);
                        live.io_errors_seen = 0;
                        live.reconnect_wait = RETRY_FIRST;
                        self.state(live).await;
                    }
                    Err(error) => {
                        live.reconnect_wait = (live.reconnect_wait * 2).min(RETRY_LAST);
                        live.reconnect_at = Instant::now() + live.reconnect_wait;
                        tracing::debug!(vm = %self.guest.vm, %error, "QEMU's control socket is away");
                    }
                }
                return live.by_guest;
            }
            Wake::RetryStalled => {
                let Some(stalled) = &mut live.stalled else { return false };
                stalled.wait = (stalled.wait * 2).min(RETRY_LAST);
                stalled.retry_at = Instant::now() + stalled.wait;
                if self.go_on(live).await {
                    live.stalled = None;
                    self.tell_running().await;
                }
            }
            Wake::CareForConsole => {
                if let Err(error) = console::keep_small(&self.dir.console_log()) {
                    tracing::warn!(vm = %self.guest.vm, %error, "the console's file could not be made smaller");
                }
            }
        }
        false
    }

    /// Asks QEMU for its state, and takes over what it tells: a shutdown or a disk error that nobody saw happen.
    async fn state(&self, live: &mut Live) -> Option<String> {
        let answer = live.qmp.as_ref()?.call("query-status", json!({}), CALL_TIMEOUT).await.ok()?;
        let state = answer["status"].as_str()?.to_string();
        match state.as_str() {
            "shutdown" => live.by_guest = true,
            "io-error" => live.stall("a disk failed while nobody watched".into()),
            _ => {}
        }
        Some(state)
    }

    /// Lets a stopped guest go on; whether it does.
    async fn go_on(&self, live: &mut Live) -> bool {
        let Some(qmp) = &live.qmp else { return false };
        match qmp.call("cont", json!({}), CALL_TIMEOUT).await {
            Ok(_) => true,
            Err(error) => {
                tracing::warn!(vm = %self.guest.vm, %error, "a stalled guest could not be told to go on");
                false
            }
        }
    }

    /// Not tried again: a guest that is not listening yet, or whose QEMU is not, is for the caller to ask again.
    async fn power_button(&self, live: &mut Live) {
        let pressed = match &live.qmp {
            Some(qmp) => qmp.call("system_powerdown", json!({}), CALL_TIMEOUT).await.map(|_| ()),
            None => Err(QmpError::Closed),
        };
        if let Err(error) = pressed {
            tracing::warn!(vm = %self.guest.vm, %error, "the guest could not be asked to shut down");
        }
    }

    /// Ends QEMU: politely, then by force. Returns when it is gone, however long the kernel takes for that.
    async fn quit(&self, live: &mut Live) -> Option<ExitStatus> {
        let politely = async {
            if let Some(qmp) = &live.qmp {
                // That it closes the connection instead of an answer is as good.
                let _ = qmp.call("quit", json!({}), QUIT_TIMEOUT).await;
                live.process.gone().await
            } else {
                std::future::pending().await
            }
        };
        let patience = if live.qmp.is_some() { QUIT_TIMEOUT } else { Duration::ZERO };
        if let Ok(status) = timeout(patience, politely).await {
            return status;
        }
        tracing::info!(vm = %self.guest.vm, "QEMU did not end when asked to; killed");
        live.process.kill();
        live.process.gone().await
    }

    async fn tell_running(&self) {
        self.shared.tell(Event::Running { vm: self.guest.vm, incarnation: self.guest.incarnation }).await;
    }

    async fn tell_state(&self, live: &Live) {
        match &live.stalled {
            None => self.tell_running().await,
            Some(stalled) => {
                let (vm, incarnation, detail) = (self.guest.vm, self.guest.incarnation, stalled.detail.clone());
                self.shared.tell(Event::Stalled { vm, incarnation, detail }).await;
            }
        }
    }

    async fn end(self, detail: String, by_guest: bool) {
        self.clean_up().await;
        let (vm, incarnation) = (self.guest.vm, self.guest.incarnation);
        self.shared.tell(Event::Ended { vm, incarnation, by_guest, detail }).await;
    }

    /// Only when the process is gone.
    async fn clean_up(&self) {
        if self.shared.settings.bridge.is_some() {
            tap::remove(self.guest.vm).await;
        }
        if let Err(error) = self.dir.clear() {
            tracing::warn!(vm = %self.guest.vm, %error, "the run directory could not be cleared");
        }
    }

    /// What a QEMU that went unasked died of.
    fn obituary(&self, status: Option<ExitStatus>) -> String {
        match status {
            None => "QEMU is gone".into(),
            Some(status) => match (status.signal(), self.dir.last_words()) {
                (Some(SIGABRT), Some(words)) => format!("QEMU gave up: {words}"),
                (Some(signal), _) => format!("QEMU was killed by signal {signal}"),
                (None, Some(words)) => format!("QEMU ended: {words}"),
                (None, None) => format!("QEMU ended with {status}"),
            },
        }
    }
}

impl Live {
    fn new(process: Process, qmp: Option<Qmp>) -> Live {
        Live {
            process,
            qmp,
            by_guest: false,
            io_errors_seen: 0,
            shutdowns_asked: 0,
            announcements_asked: 0,
            stalled: None,
            reconnect_at: Instant::now() + RETRY_FIRST,
            reconnect_wait: RETRY_FIRST,
        }
    }

    fn stall(&mut self, detail: String) {
        match &mut self.stalled {
            Some(stalled) => stalled.detail = detail,
            None => {
                self.stalled = Some(Stalled { detail, retry_at: Instant::now() + RETRY_FIRST, wait: RETRY_FIRST });
            }
        }
    }
}
