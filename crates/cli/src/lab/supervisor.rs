//! The lab's hardware, in one background process: it powers the nodes, runs their init and serves their power switches.
//!
//! One thread owns all machines; everything else (children's ends, power switches, the control socket) sends it events.
//! A machine is off when it was switched off *and* no process is left in its control group; nothing says so earlier.
//! When this process dies the nodes go on, without restarts and power switches; `pollux lab down` still removes them.

use super::cgroup;
use super::control::{self, Answer, Ask, DaemonView, MachineView};
use super::machine::{Act, DaemonState, Machine};
use super::power::{self, Identity, PowerState, Reset};
use super::process::Program;
use super::site::{Daemon, Site, SiteNode, WITNESS_PROGRAM, witness_address};
use crate::failure::{Code, Doing, Failure, Outcome};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

/// The witness is a machine too, so that it is restarted like the rest; it has this name.
const WITNESS: &str = "witness";
/// Time for a client of the control socket to send its line.
const ASK_TIME: Duration = Duration::from_secs(3);
/// Whoever asked has given up after this.
const ANSWER_TIME: Duration = Duration::from_secs(20);

enum Event {
    Ended { machine: String, daemon: usize, boot: u64, how: String },
    Ask { ask: Ask, reply: Sender<Answer> },
}

/// `pollux lab supervise`: serves until killed. Says `ready` on standard output when everything is started.
pub fn run(site: &Site) -> Outcome {
    // A session of its own, so that the end of the terminal of `lab up` does not end the lab.
    let _ = nix::unistd::setsid();
    // Made by `lab up`: where it is gone, so is the lab, and nothing of it is to come back.
    cgroup::enter(&site.supervisor_cgroup())?;

    let (events, inbox) = channel();
    for node in &site.nodes {
        let listener = power::listen(node.power_address()).map_err(|error| {
            Failure::new(Code::Conflict, format!("the power switch of {} cannot listen: {error}", node.name))
                .hint("another program uses this port: end it, or give it one address only")
        })?;
        let machine = Keeper { events: events.clone(), node: node.name.clone() };
        power::serve(listener, Identity { system: node.system(), uuid: node.uuid.clone() }, Arc::new(machine));
    }
    serve_control(site, &events)?;

    let mut supervisor = Supervisor::new(site.clone(), events);
    let names: Vec<String> = supervisor.machines.keys().cloned().collect();
    for name in names {
        supervisor.switch(&name, true)?;
    }
    let mut stdout = std::io::stdout();
    let _ = writeln!(stdout, "ready").and_then(|()| stdout.flush());
    supervisor.serve(&inbox)
}

/// What a power switch holds of its machine.
struct Keeper {
    events: Sender<Event>,
    node: String,
}

impl Keeper {
    fn ask(&self, ask: Ask) -> Option<Answer> {
        let (reply, answer) = channel();
        self.events.send(Event::Ask { ask, reply }).ok()?;
        answer.recv_timeout(ANSWER_TIME).ok()
    }
}

impl power::Machine for Keeper {
    fn power_state(&self) -> Option<PowerState> {
        match self.ask(Ask::Status)? {
            Answer::Machines { machines } => {
                machines.iter().find(|machine| machine.name == self.node).map(MachineView::power_state)
            }
            Answer::Done | Answer::Refused { .. } => None,
        }
    }
    fn reset(&self, reset: Reset) -> bool {
        let node = self.node.clone();
        let ask = match reset {
            Reset::On => Ask::On { node },
            Reset::ForceOff => Ask::Off { node },
        };
        matches!(self.ask(ask), Some(Answer::Done))
    }
}

fn serve_control(site: &Site, events: &Sender<Event>) -> Outcome {
    let path = site.supervisor_socket();
    let _ = fs::remove_file(&path);
    let listener = UnixListener::bind(&path).doing(format!("cannot listen at {}", path.display()))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).doing("cannot protect the control socket")?;
    let events = events.clone();
    // One client after the other: only `pollux lab` of root speaks here, and each has a time limit.
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            converse(stream, &events);
        }
    });
    Ok(())
}

fn converse(mut stream: UnixStream, events: &Sender<Event>) {
    let _ = stream.set_read_timeout(Some(ASK_TIME));
    let _ = stream.set_write_timeout(Some(ASK_TIME));
    let Ok(line) = control::receive(&mut stream) else { return };
    let answer = match serde_json::from_str(&line) {
        Ok(ask) => {
            let (reply, answer) = channel();
            let sent = events.send(Event::Ask { ask, reply });
            sent.ok().and_then(|()| answer.recv_timeout(ANSWER_TIME).ok())
        }
        Err(error) => Some(Answer::Refused { error: format!("not a question: {error}") }),
    };
    if let Some(answer) = answer {
        let _ = control::send(&mut stream, &answer);
    }
}

struct Supervisor {
    site: Site,
    machines: BTreeMap<String, Machine>,
    /// Process ids by machine and daemon.
    running: BTreeMap<(String, usize), u32>,
    events: Sender<Event>,
}

impl Supervisor {
    fn new(site: Site, events: Sender<Event>) -> Supervisor {
        let mut machines = BTreeMap::from([(WITNESS.to_string(), Machine::new(1))]);
        machines.extend(site.nodes.iter().map(|node| (node.name.clone(), Machine::new(Daemon::ALL.len()))));
        Supervisor { site, machines, running: BTreeMap::new(), events }
    }

    fn serve(&mut self, inbox: &Receiver<Event>) -> Outcome {
        loop {
            let deadline = self.machines.values().filter_map(Machine::deadline).min();
            // Nothing to do for an hour is as good as nothing to do: the channel has no wait without end that it shares
            // with a deadline.
            let wait = deadline.map_or(Duration::from_secs(3600), |at| at.saturating_duration_since(Instant::now()));
            if let Ok(event) = inbox.recv_timeout(wait) {
                self.on_event(event);
            }
            let names: Vec<String> = self.machines.keys().cloned().collect();
            for name in names {
                let acts = self.machines.get_mut(&name).map(|machine| machine.on_time(Instant::now()));
                if let Err(failure) = self.act(&name, acts.unwrap_or_default()) {
                    log(&failure.error);
                }
            }
        }
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Ended { machine, daemon, boot, how } => {
                let Some(state) = self.machines.get_mut(&machine) else { return };
                if state.is_on() {
                    log(&format!("{machine}: daemon {daemon} ended: {how}"));
                }
                state.on_ended(Instant::now(), daemon, boot);
            }
            Event::Ask { ask, reply } => {
                let answer = match ask {
                    Ask::Status => Ok(Answer::Machines { machines: self.views() }),
                    Ask::Off { node } => self.switch(&node, false).map(|()| Answer::Done),
                    Ask::On { node } => self.switch(&node, true).map(|()| Answer::Done),
                };
                // Whoever asked may be gone; that changes nothing here.
                let _ = reply.send(answer.unwrap_or_else(|failure| Answer::Refused { error: failure.error }));
            }
        }
    }

    fn views(&self) -> Vec<MachineView> {
        self.machines.iter().map(|(name, machine)| self.view(name, machine)).collect()
    }

    fn view(&self, name: &str, machine: &Machine) -> MachineView {
        let daemons = self.programs(name).into_iter().enumerate().map(|(daemon, program)| {
            let life = machine.daemon(daemon);
            let runs = machine.is_on() && life.is_some_and(|life| matches!(life.state, DaemonState::Running { .. }));
            DaemonView {
                program: program.executable.file_name().unwrap_or_default().to_string_lossy().into(),
                pid: self.running.get(&(name.to_string(), daemon)).copied().filter(|_| runs),
                restarts: life.map_or(0, |life| life.restarts),
            }
        });
        let is_on = machine.is_on() || !cgroup::is_empty(&self.cgroup(name));
        MachineView { name: name.into(), is_on, daemons: daemons.collect() }
    }

    fn switch(&mut self, name: &str, on: bool) -> Outcome {
        let machine = self.machines.get_mut(name);
        let machine = machine.ok_or_else(|| Failure::new(Code::NotFound, format!("there is no machine `{name}`")))?;
        if machine.is_on() != on {
            log(&format!("{name}: power {}", if on { "on" } else { "off" }));
        }
        let acts = if on { machine.switch_on(Instant::now()) } else { machine.switch_off() };
        self.act(name, acts)
    }

    fn act(&mut self, name: &str, acts: Vec<Act>) -> Outcome {
        for act in acts {
            match act {
                Act::Kill => cgroup::kill(&self.cgroup(name))?,
                Act::Wipe => self.wipe(name)?,
                Act::Start { daemon, boot } => self.start(name, daemon, boot),
            }
        }
        Ok(())
    }

    /// Forgets what a reboot forgets: no process of the last life is left when the next one begins, and the run
    /// directory is empty.
    fn wipe(&self, name: &str) -> Outcome {
        cgroup::clear(&self.cgroup(name))?;
        let Some(node) = self.site.node(name) else { return cgroup::create(&self.site.witness_cgroup()) };
        let run = self.site.node_run(node);
        match fs::remove_dir_all(&run) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Failure::other(format!("cannot wipe {}: {error}", run.display())));
            }
            _ => {}
        }
        fs::create_dir_all(&run).doing(format!("cannot create {}", run.display()))?;
        for group in [self.site.daemons_cgroup(node), self.site.guests_cgroup(node)] {
            cgroup::create(&group)?;
        }
        Ok(())
    }

    fn start(&mut self, name: &str, daemon: usize, boot: u64) {
        let Some(program) = self.programs(name).get(daemon).cloned() else { return };
        let (machine, events) = (name.to_string(), self.events.clone());
        match program.start() {
            Ok(mut child) => {
                self.running.insert((machine.clone(), daemon), child.id());
                std::thread::spawn(move || {
                    let how = child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
                    let _ = events.send(Event::Ended { machine, daemon, boot, how });
                });
            }
            Err(failure) => {
                let _ = events.send(Event::Ended { machine, daemon, boot, how: failure.error });
            }
        }
    }

    fn cgroup(&self, name: &str) -> std::path::PathBuf {
        match self.site.node(name) {
            Some(node) => self.site.node_cgroup(node),
            None => self.site.witness_cgroup(),
        }
    }

    fn programs(&self, name: &str) -> Vec<Program> {
        match self.site.node(name) {
            Some(node) => Daemon::ALL.iter().map(|daemon| daemon_program(&self.site, node, *daemon)).collect(),
            None => vec![witness_program(&self.site)],
        }
    }
}

/// How a node's daemon is run.
pub fn daemon_program(site: &Site, node: &SiteNode, daemon: Daemon) -> Program {
    node_program(site, node, daemon, &[])
}

/// One of a node's programs with another verb, such as the one that formats its pool.
pub fn node_program(site: &Site, node: &SiteNode, daemon: Daemon, verb: &[&str]) -> Program {
    let mut arguments: Vec<OsString> = verb.iter().map(OsString::from).collect();
    arguments.extend(["--config".into(), site.config_file(node).into()]);
    Program {
        executable: site.executables.join(daemon.program()),
        arguments,
        namespace: Some(node.namespace()),
        cgroup: site.daemons_cgroup(node),
        log: site.log_file(&node.name, daemon.program()),
    }
}

fn witness_program(site: &Site) -> Program {
    let (certificate, key) = site.certificate_files(WITNESS);
    let arguments: Vec<OsString> = vec![
        "--listen".into(),
        witness_address().to_string().into(),
        "--state".into(),
        site.witness_dir().join("registers").into(),
        "--certificate".into(),
        certificate.into(),
        "--key".into(),
        key.into(),
        "--tokens".into(),
        site.witness_clusters_file().into(),
    ];
    Program {
        executable: site.executables.join(WITNESS_PROGRAM),
        arguments,
        namespace: None,
        cgroup: site.witness_cgroup(),
        log: site.log_file("lab", WITNESS_PROGRAM),
    }
}

/// The supervisor's own log is its standard error.
fn log(text: &str) {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    eprintln!("{}.{:03} {text}", now.as_secs(), now.subsec_millis());
}
