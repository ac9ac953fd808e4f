//! The main job, shown end to end: a guest that outlives its server, three times over.
//!
//! What a user would do is done with real `pollux` commands; what comes of it is watched from outside (`observer`), noted
//! (`record`) and judged here. The demo is ok only if every check held. It leaves nothing behind, however it ends.

mod accident;
mod console;
pub mod interrupt;
mod observer;
mod operator;
mod record;
mod report;

use super::down::{self, Keep};
use super::site::{DIR_DEFAULT, Site, guest_address};
use super::{control, how_to, the_site};
use crate::failure::{Code, Doing, Failure, Outcome};
use accident::{Accident, Takeover};
use observer::{Clock, Observer};
use pollux_api::{Image, Status, Vm};
use record::Record;
use report::Step;
use std::fs;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

const VM: &str = "web1";
const IMAGE: &str = "demo";
const GUEST_PORT: u16 = 7000;
/// An emulated processor on a busy machine needs this long to boot; a guest that needs longer does not boot.
const BOOT_WAIT: Duration = Duration::from_secs(120);
/// A few hundred writes before each accident, so that some are under way when it comes.
const ACKS_BEFORE_ACCIDENT: u64 = 300;
/// At fifty writes a second this is reached in a quarter of the time.
const ACKS_WAIT: Duration = Duration::from_secs(60);
/// A node that comes back boots, is taken in and brought up to date.
const HEALTHY_WAIT: Duration = Duration::from_secs(120);

#[derive(Clone, Debug, clap::Args)]
pub struct DemoArgs {
    /// The guest's disk image; scripts/make-image makes one
    #[arg(long, value_name = "FILE")]
    image: PathBuf,
    /// Write figures and time line to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Leave the lab running
    #[arg(long)]
    keep: bool,
    /// Where the lab keeps its state
    #[arg(long, default_value = DIR_DEFAULT, value_name = "DIR")]
    dir: PathBuf,
}

pub fn run(arguments: &DemoArgs) -> Outcome {
    let image = fs::canonicalize(&arguments.image).map_err(|error| {
        Failure::usage(format!("cannot read the image {}: {error}", arguments.image.display()))
            .hint("scripts/make-image makes one")
    })?;
    if down::site_of_run().is_some_and(|site| control::is_served(&site)) {
        return Err(Failure::new(Code::Conflict, "a lab is up on this machine already")
            .hint("the demo builds its own: take yours down with `pollux lab down` first"));
    }
    interrupt::note()?;
    let mut demo = Demo {
        image,
        dir: arguments.dir.clone(),
        clock: Clock::start(),
        steps: Vec::new(),
        takeovers: Vec::new(),
        observer: None,
        leftover: Some(Leftover { dir: arguments.dir.clone() }),
    };
    let result = demo.play();
    let report = report::Report::of(&demo, &result);
    if let Some(path) = &arguments.json {
        let text = serde_json::to_vec_pretty(&report).doing("cannot write the figures")?;
        fs::write(path, text).doing(format!("cannot write {}", path.display()))?;
    }
    demo.end(result, arguments.keep, &report)
}

/// A demo under way.
struct Demo {
    image: PathBuf,
    dir: PathBuf,
    clock: Clock,
    steps: Vec<Step>,
    takeovers: Vec<Takeover>,
    observer: Option<Observer>,
    leftover: Option<Leftover>,
}

/// Takes the lab down when dropped: also when a step panics.
struct Leftover {
    dir: PathBuf,
}

impl Drop for Leftover {
    fn drop(&mut self) {
        let _ = down::down(Some(&self.dir), Keep::Logs);
    }
}

impl Demo {
    fn play(&mut self) -> Outcome {
        let site = self.step("1/7 lab up: two nodes, a witness, a power switch per node", Demo::build)?;
        let guest =
            self.step("2/7 a real Linux guest, mirrored from birth, writes and counts", |demo| demo.start(&site))?;
        self.step("3/7 status: if a node dies now, what happens?", |_| show_status())?;

        let first = self.node_of_guest()?;
        let other = the_other(&site, &first)?;
        let pull = |lost: &str, survivor: &str| Accident::pull(lost, survivor);
        self.step(&format!("4/7 the plug of {first} is pulled, the node that runs {VM}"), |demo| {
            demo.suffer(&site, guest, &pull(&first, &other))
        })?;
        self.step(&format!("5/7 {first} comes back and is resynced; then the plug of {other} is pulled"), |demo| {
            demo.bring_back(&site, &first)?;
            demo.suffer(&site, guest, &pull(&other, &first))?;
            demo.bring_back(&site, &other)
        })?;
        self.step(&format!("6/7 every link of {first} is cut, with both nodes alive"), |demo| {
            demo.suffer(&site, guest, &Accident::cut(&first, &other))?;
            demo.heal(&site, &first)
        })?;
        self.step("7/7 everything is healthy again, nothing was lost and nothing ran twice", |demo| demo.judge(&site))
    }

    fn step<T>(&mut self, title: &str, body: impl FnOnce(&mut Demo) -> Outcome<T>) -> Outcome<T> {
        eprintln!("[{title}]");
        let started = Instant::now();
        let result = body(self);
        let seconds = started.elapsed().as_secs_f64();
        let word = if result.is_ok() { "ok" } else { "FAILED" };
        eprintln!("      {word} after {seconds:.1} s");
        self.steps.push(Step { title: title.into(), seconds, ok: result.is_ok() });
        result
    }

    fn record(&self) -> Outcome<std::sync::MutexGuard<'_, Record>> {
        self.observer.as_ref().map(Observer::record).ok_or_else(|| Failure::other("nothing is watched yet"))
    }

    /// Looks at the record until `seen` gives something.
    fn wait<T>(&self, what: &str, limit: Duration, seen: impl Fn(&Record) -> Option<T>) -> Outcome<T> {
        let started = Instant::now();
        loop {
            interrupt::check()?;
            if let Some(value) = seen(&*self.record()?) {
                return Ok(value);
            }
            if started.elapsed() > limit {
                return Err(Failure::new(Code::TimedOut, format!("{what}: not seen within {} s", limit.as_secs())));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    // --- the steps

    fn build(&mut self) -> Outcome<Site> {
        let dir = self.dir.to_string_lossy().into_owned();
        let words: Vec<&str> = match dir.as_str() {
            DIR_DEFAULT => vec!["lab", "up"],
            _ => vec!["lab", "up", "--dir", &dir],
        };
        operator::type_in(&words)?;
        let site = the_site()?;
        self.observer = Some(Observer::start(&site, VM, self.clock)?);
        Ok(site)
    }

    fn start(&mut self, site: &Site) -> Outcome<Ipv4Addr> {
        operator::type_in(&["image", "import", &self.image.to_string_lossy(), "--name", IMAGE])?;
        let image: Image = operator::read(&["image", "show", IMAGE])?;
        check(image.ready, || "the imported image is not ready".into())?;
        let create = ["vm", "create", VM, "--image", IMAGE, "--cpus", "1", "--memory", "256M", "--disk", "1G"];
        operator::type_in(&create)?;
        operator::type_in(&["vm", "start", VM])?;
        let vm: Vm = operator::read(&["vm", "show", VM])?;
        let address = guest_address(&vm.mac).ok_or_else(|| Failure::other(format!("{} is no MAC", vm.mac)))?;
        self.wait("the guest's first durable write", BOOT_WAIT, |record| record.runs.first()?.last_ack)?;
        self.wait_answer(address, 1)?;
        self.wait_healthy(site, "the new VM is mirrored and the cluster protected")?;
        self.note(&format!("{VM} runs on {} and answers at {address}:{GUEST_PORT}", vm.node));
        Ok(address)
    }

    /// An accident, and all that must follow from it.
    fn suffer(&mut self, site: &Site, guest: Ipv4Addr, accident: &Accident) -> Outcome {
        let before = self.record()?.acknowledged();
        let wanted = before + ACKS_BEFORE_ACCIDENT;
        self.wait("some hundred acknowledged writes", ACKS_WAIT, |record| {
            (record.acknowledged() >= wanted).then_some(())
        })?;
        let takeover = accident.happen(self, site)?;
        self.wait_answer(guest, takeover.found)?;
        self.takeovers.push(takeover);
        Ok(())
    }

    fn bring_back(&mut self, site: &Site, node: &str) -> Outcome {
        let since = self.clock.now_ms();
        let cable = report::CableCounter::of(site, node)?;
        operator::type_in(&["lab", "return", node])?;
        self.wait_healthy(site, &format!("{node} is back, in sync, and the cluster protected"))?;
        self.judge_resync(node, since, &cable)
    }

    fn heal(&mut self, site: &Site, node: &str) -> Outcome {
        let since = self.clock.now_ms();
        let cable = report::CableCounter::of(site, node)?;
        operator::type_in(&["lab", "heal"])?;
        self.wait_healthy(site, &format!("{node} is in sync again and the cluster protected"))?;
        self.judge_resync(node, since, &cable)
    }

    /// Only what changed may have been sent: far less than the guest's disk holds. Measured at the cable, which carried
    /// the guest's new writes too, so it is an upper bound whatever the daemons say.
    fn judge_resync(&self, node: &str, since: u64, cable: &report::CableCounter) -> Outcome {
        let through_cable = cable.bytes_since()?;
        let record = self.record()?;
        let used: u64 = record.views.iter().rev().find_map(|(_, _, view)| view.group(VM)?.used_bytes).unwrap_or(0);
        let resent = record.resent_bytes(VM, node, since);
        self.note(&format!(
            "resync of {node}: {} through its storage cable, the guest's new writes included, of {} in use",
            crate::size::show(through_cable),
            crate::size::show(used)
        ));
        check(used > 0 && resent.unwrap_or(0).max(through_cable / 2) < used / 2, || {
            format!("the resync of {node} sent far more than had changed")
        })
    }

    fn judge(&mut self, site: &Site) -> Outcome {
        self.wait_healthy(site, "everything is healthy")?;
        let record = self.record()?;
        check(record.overlaps.is_empty(), || format!("two QEMUs ran {VM} at once: {:?}", record.overlaps))?;
        for run in &record.runs {
            check(run.damaged.is_none(), || format!("the guest found damage: {run:?}"))?;
        }
        check(record.runs.len() == 1 + self.takeovers.len(), || {
            format!("the guest was started {} times, not {}", record.runs.len(), 1 + self.takeovers.len())
        })?;
        let running = record.qemus.iter().filter(|qemu| qemu.ended_ms.is_none()).count();
        check(running == 1, || format!("{running} QEMUs run {VM} at the end"))
    }

    // --- what the steps have in common

    fn node_of_guest(&self) -> Outcome<String> {
        operator::read::<Vm>(&["vm", "show", VM]).map(|vm| vm.node)
    }

    fn wait_healthy(&self, site: &Site, what: &str) -> Outcome {
        let nodes = site.nodes.len();
        let all = |record: &Record| {
            let healthy = |node: &super::site::SiteNode| record.view(&node.name).is_some_and(|v| v.is_healthy(nodes));
            site.nodes.iter().all(healthy).then_some(())
        };
        self.wait(what, HEALTHY_WAIT, all).map_err(|failure| match failure.code {
            Code::TimedOut => failure.hint(self.views(site)),
            _ => failure,
        })
    }

    /// What the nodes show at present, for a failure's hint.
    fn views(&self, site: &Site) -> String {
        let Ok(record) = self.record() else { return String::new() };
        let view = |node: &super::site::SiteNode| {
            let view = record.view(&node.name).map_or("nothing".into(), |view| view.line(VM));
            format!("{} shows {view}.", node.name)
        };
        site.nodes.iter().map(view).collect::<Vec<_>>().join(" ")
    }

    /// The guest answers on the network, with a number that is not behind.
    fn wait_answer(&self, guest: Ipv4Addr, at_least: u64) -> Outcome {
        let started = Instant::now();
        loop {
            interrupt::check()?;
            let answer = ask_guest(guest);
            match &answer {
                Ok(text) => match text.trim().parse::<u64>() {
                    Ok(number) if number >= at_least => return Ok(()),
                    Ok(number) => {
                        return Err(Failure::other(format!("the guest says {number}, but {at_least} was durable")));
                    }
                    Err(_) => return Err(Failure::other(format!("the guest says `{}`", text.trim()))),
                },
                Err(_) if started.elapsed() < BOOT_WAIT => std::thread::sleep(Duration::from_millis(50)),
                Err(error) => {
                    return Err(Failure::new(Code::TimedOut, format!("{guest}:{GUEST_PORT} does not answer: {error}")));
                }
            }
        }
    }

    fn note(&self, text: &str) {
        eprintln!("      {text}");
    }

    /// The last line, and the end of the lab.
    fn end(mut self, result: Outcome, keep: bool, report: &report::Report) -> Outcome {
        let site = the_site().ok();
        if keep && result.is_ok() {
            // Left to the user: nothing is to be taken down.
            std::mem::forget(self.leftover.take());
            if let Some(site) = &site {
                eprintln!("The lab is left running:\n{}", how_to(site));
            }
            return crate::output::print(&report.line());
        }
        let interrupted = interrupt::check().is_err();
        let keep = if result.is_ok() || interrupted { Keep::Nothing } else { Keep::Logs };
        let logs = if keep == Keep::Logs { site.as_ref().map(keep_logs) } else { None };
        self.observer = None;
        let taken_down = down::down(Some(&self.dir), keep);
        std::mem::forget(self.leftover.take());
        if interrupted {
            taken_down?;
            return Err(Failure::other("the demo was interrupted; its lab is taken down"));
        }
        if let Err(failure) = result {
            crate::output::print(&format!("demo: FAILED  {}", failure.error))?;
            let hint = [failure.hint.clone(), logs.map(|logs| format!("The logs are kept in {logs}."))];
            return Err(failure.hint(hint.into_iter().flatten().collect::<Vec<_>>().join(" ")));
        }
        taken_down?;
        crate::output::print(&report.line())
    }
}

/// Consoles and QEMU's words lie where a reboot forgets them; they are put to the logs.
fn keep_logs(site: &Site) -> String {
    for node in &site.nodes {
        for console in observer::console_logs(site, &node.name) {
            for name in ["console.log", "qemu.log"] {
                let from = console.with_file_name(name);
                let _ = fs::copy(from, site.logs().join(format!("{}-guest-{name}", node.name)));
            }
        }
    }
    if let Ok(events) = operator::read::<serde_json::Value>(&["event", "list", "--limit", "1000"]) {
        let _ = fs::write(site.logs().join("events.json"), format!("{events:#}"));
    }
    site.logs().display().to_string()
}

fn show_status() -> Outcome {
    let text = operator::type_in(&["status"])?;
    for line in text.lines() {
        eprintln!("      | {line}");
    }
    let status: Status = operator::read(&["status"])?;
    check(status.headline.protection == pollux_api::Protection::Protected, || {
        format!("the cluster is {}", status.headline.text)
    })
}

fn ask_guest(guest: Ipv4Addr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((guest, GUEST_PORT)), Duration::from_secs(1))?;
    stream.set_read_timeout(Some(Duration::from_secs(3)))?;
    let mut text = String::new();
    stream.by_ref().take(256).read_to_string(&mut text)?;
    if text.is_empty() { Err(std::io::ErrorKind::UnexpectedEof.into()) } else { Ok(text) }
}

fn the_other(site: &Site, node: &str) -> Outcome<String> {
    let other = site.nodes.iter().find(|other| other.name != node);
    other.map(|node| node.name.clone()).ok_or_else(|| Failure::other("the lab has only one node"))
}

/// A check of the demo.
fn check(holds: bool, broken: impl FnOnce() -> String) -> Outcome {
    if holds { Ok(()) } else { Err(Failure::other(broken())) }
}
