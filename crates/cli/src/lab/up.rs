//! Builds a lab and waits until it is what it promises to be: up and protected.
//!
//! What fails half way is removed again, except for the logs and for state kept from before, so that a failed `lab up`
//! leaves nothing in the way.

use super::cgroup;
use super::control;
use super::down::{self, Keep};
use super::keys;
use super::network;
use super::process::{Program, is_installed, own_executable};
use super::site::{CGROUP, Daemon, RUN, Site, SiteNode, WITNESS_PROGRAM, node_name, run_file};
use super::supervisor::node_program;
use crate::context::{self, Context, client_of, lab_context_file};
use crate::failure::{Code, Doing, Failure, Outcome};
use nix::mount::{MsFlags, mount};
use pollux_api::Protection;
use pollux_base::config::Encryption;
use pollux_base::{ClusterId, PoolId};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Starting takes a few seconds; a machine that needs longer than this for it is too slow to promise anything on.
const PROTECTED_WAIT: Duration = Duration::from_secs(90);
/// How often the cluster is asked meanwhile. The lab is not a daemon: it asks only while somebody waits.
const PROTECTED_ASK: Duration = Duration::from_millis(200);
/// Sockets, pid files and consoles are small.
const RUN_SIZE: &str = "size=256m,mode=0700";
/// Guests of a lab together, per node.
const GUEST_MEMORY_BYTES: u64 = 4 << 30;

pub struct Options {
    pub nodes: u8,
    pub pool_bytes: u64,
    pub dir: PathBuf,
    pub replication_encryption: Encryption,
}

/// Builds the lab. `progress` gets a line per step.
pub fn up(options: &Options, progress: &mut dyn FnMut(&str)) -> Outcome<Site> {
    let executables = check_machine()?;
    check_nothing_is_there()?;
    let site = plan(options, executables)?;
    let keep = if site.file().exists() { Keep::State } else { Keep::Logs };
    build(&site, progress).inspect_err(|_| {
        // The first failure is the one worth telling.
        let _ = down::down(Some(&site.dir), keep);
    })?;
    Ok(site)
}

fn build(site: &Site, progress: &mut dyn FnMut(&str)) -> Outcome {
    prepare_directories(site)?;
    progress("building networks");
    network::up(site)?;
    for group in [site.supervisor_cgroup(), site.witness_cgroup()] {
        cgroup::create(&group)?;
    }
    for node in &site.nodes {
        cgroup::create(&site.daemons_cgroup(node))?;
        cgroup::create(&site.guests_cgroup(node))?;
    }
    if !site.ca_file().exists() {
        progress("making keys and certificates");
        keys::make(site)?;
    }
    for node in &site.nodes {
        make_node(site, node, progress)?;
    }
    progress("switching the power on");
    start_supervisor(site)?;
    wait_protected(site, progress)
}

/// What the lab needs of this machine; the directory of the daemons' executables.
fn check_machine() -> Outcome<PathBuf> {
    require_root()?;
    for program in ["ip", "qemu-system-x86_64", "qemu-img"] {
        if !is_installed(program) {
            return Err(Failure::other(format!("`{program}` is not installed"))
                .hint("scripts/deps installs what the lab needs"));
        }
    }
    cgroup::mount_point()?;
    let own = own_executable()?;
    let dir = own.parent().unwrap_or(Path::new("/")).to_path_buf();
    let programs = Daemon::ALL.map(Daemon::program);
    for program in programs.into_iter().chain([WITNESS_PROGRAM]) {
        if !dir.join(program).is_file() {
            return Err(Failure::other(format!("`{program}` is not beside {}", own.display()))
                .hint("build everything with `cargo build --release`"));
        }
    }
    Ok(dir)
}

pub fn require_root() -> Outcome {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    Err(Failure::other("a lab makes network namespaces and control groups, which only root may do")
        .hint("run it with sudo"))
}

fn check_nothing_is_there() -> Outcome {
    let conflict = |error: &str, hint: &str| Err(Failure::new(Code::Conflict, error).hint(hint));
    if down::site_of_run().is_some_and(|site| control::is_served(&site)) {
        return conflict(
            "a lab is up on this machine already",
            "`pollux lab status` shows it, `pollux lab down` removes it",
        );
    }
    if down::is_anything_left() {
        return conflict(
            "a lab that was not taken down properly has left things behind",
            "`pollux lab down` removes them; with --keep-state the pools are kept and used by the next `pollux lab up`",
        );
    }
    Ok(())
}

/// The plan: that of the directory if a lab was kept there, else a new one.
fn plan(options: &Options, executables: PathBuf) -> Outcome<Site> {
    let dir = absolute(&options.dir)?;
    let cgroup = cgroup::mount_point()?.join(CGROUP);
    let file = dir.join("site.json");
    if file.exists() {
        let kept = down::read_site(&file).ok_or_else(|| {
            Failure::other(format!("{} is not the plan of a lab", file.display())).hint("name another --dir")
        })?;
        if kept.nodes.len() != usize::from(options.nodes) {
            let error = format!("{} holds a lab of {} nodes, not {}", dir.display(), kept.nodes.len(), options.nodes);
            return Err(Failure::new(Code::Conflict, error)
                .hint("name another --dir, or remove the kept lab with `pollux lab down`"));
        }
        return Ok(Site { dir, run: RUN.into(), cgroup, executables, ..kept });
    }
    let is_foreign = fs::read_dir(&dir).is_ok_and(|entries| entries.flatten().any(|entry| entry.file_name() != "log"));
    if is_foreign {
        return Err(Failure::new(Code::Unsafe, format!("{} is not empty and holds no lab", dir.display()))
            .hint("name an empty or new --dir"));
    }
    let mut nodes = Vec::new();
    for id in 1..=options.nodes {
        nodes.push(SiteNode { id, name: node_name(id), pool: PoolId(keys::random_id()?), uuid: keys::random_uuid()? });
    }
    Ok(Site {
        dir,
        run: RUN.into(),
        cgroup,
        executables,
        cluster: ClusterId(keys::random_id()?),
        pool_bytes: options.pool_bytes,
        guest_memory_bytes: GUEST_MEMORY_BYTES,
        replication_encryption: options.replication_encryption,
        nodes,
    })
}

fn absolute(path: &Path) -> Outcome<PathBuf> {
    std::path::absolute(path).doing(format!("cannot use {}", path.display()))
}

fn prepare_directories(site: &Site) -> Outcome {
    for dir in [&site.logs(), &site.witness_dir(), &site.run] {
        fs::create_dir_all(dir).doing(format!("cannot create {}", dir.display()))?;
    }
    // A reboot would lose what is here, and the guard may not wait for a disk: so it is a tmpfs, wherever /run is.
    mount(Some("pollux-lab"), RUN, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some(RUN_SIZE))
        .doing(format!("cannot mount a tmpfs at {RUN}"))?;
    let plan = serde_json::to_vec_pretty(site).doing("cannot write the plan")?;
    for file in [run_file(), site.file()] {
        fs::write(&file, &plan).doing(format!("cannot write {}", file.display()))?;
    }
    let context = Context { servers: site.servers(), ca: site.ca_file(), token_file: site.token_file() };
    let context = serde_json::to_vec_pretty(&context).doing("cannot write the context")?;
    fs::write(lab_context_file(), context).doing("cannot write the context")
}

/// Gives the node its configuration, pool and state, once in its life.
fn make_node(site: &Site, node: &SiteNode, progress: &mut dyn FnMut(&str)) -> Outcome {
    let config = site.node_config(node);
    for dir in [&config.state_dir, &config.run_dir] {
        fs::create_dir_all(dir).doing(format!("cannot create {}", dir.display()))?;
    }
    let text = serde_json::to_vec_pretty(&config).doing("cannot write a configuration")?;
    fs::write(site.config_file(node), text).doing("cannot write a configuration")?;
    if site.made_marker(node).exists() {
        return Ok(());
    }
    progress(&format!("making node {}", node.name));
    // What an earlier attempt left half made is made anew.
    let pool = File::create(site.pool_file(node)).doing("cannot create a pool file")?;
    pool.set_len(site.pool_bytes).doing("cannot size a pool file")?;
    for program in making(site, node) {
        program.run()?;
    }
    fs::write(site.made_marker(node), "").doing("cannot note that a node is made")
}

/// The programs that make a node, in order.
fn making(site: &Site, node: &SiteNode) -> Vec<Program> {
    vec![node_program(site, node, Daemon::Blockd, &["format"]), node_program(site, node, Daemon::Noded, &["init"])]
}

/// Starts the supervisor in the background and returns when it has started everything.
fn start_supervisor(site: &Site) -> Outcome {
    let path = site.log_file("lab", "supervisor");
    let log = fs::OpenOptions::new().create(true).append(true).open(&path);
    let log = log.doing(format!("cannot open {}", path.display()))?;
    let mut child = Command::new(own_executable()?)
        .args(["lab", "supervise", "--site"])
        .arg(run_file())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .current_dir("/")
        .spawn()
        .doing("cannot start the lab's supervisor")?;
    let mut said = String::new();
    if let Some(stdout) = child.stdout.take() {
        let _ = BufReader::new(stdout).read_line(&mut said);
    }
    if said.trim() == "ready" {
        return Ok(());
    }
    // It ended: its last words are in its log, two lines like ours.
    let _ = child.wait();
    let log = fs::read_to_string(&path).unwrap_or_default();
    let last = |prefix: &str| log.lines().rev().find_map(|line| line.strip_prefix(prefix).map(String::from));
    let failure = Failure::new(
        Code::Conflict,
        last("Error: ").unwrap_or_else(|| format!("the lab's supervisor did not start; see {}", path.display())),
    );
    Err(match last("Hint: ") {
        Some(hint) => failure.hint(hint),
        None => failure,
    })
}

fn wait_protected(site: &Site, progress: &mut dyn FnMut(&str)) -> Outcome {
    progress("waiting until the cluster is protected");
    let client = client_of(&context::read(&lab_context_file())?)?;
    let started = Instant::now();
    let mut last = String::new();
    loop {
        let now = match client.status() {
            Ok(status) if status.headline.protection == Protection::Protected => return Ok(()),
            Ok(status) => status.headline.text,
            Err(error) => error.to_string(),
        };
        if started.elapsed() > PROTECTED_WAIT {
            let error = format!("the cluster is not protected after {} s: {now}", PROTECTED_WAIT.as_secs());
            return Err(
                Failure::new(Code::TimedOut, error).hint(format!("the daemons' logs are in {}", site.logs().display()))
            );
        }
        if now != last {
            progress(&now);
            last = now;
        }
        std::thread::sleep(PROTECTED_ASK);
    }
}
