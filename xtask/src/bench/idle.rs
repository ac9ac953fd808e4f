//! What a site costs that has nothing to do: CPU, wake-ups and memory of each daemon, bytes between the nodes.

use crate::interrupt;
use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The lab's switch, and the far ends of the cables that join the nodes (see `pollux lab`): what comes in there, a node
/// has sent.
const SWITCH: &str = "plx-net";
const CABLES: [(&str, &str, &str); 4] =
    [("a", "storage", "plx-a-s"), ("b", "storage", "plx-b-s"), ("a", "mgmt", "plx-a-m"), ("b", "mgmt", "plx-b-m")];
/// Groups of the lab in which daemons run, and where that is.
const PLACES: [(&str, &str); 3] = [("a", "a/daemons"), ("b", "b/daemons"), ("-", "witness")];

#[derive(Serialize)]
pub struct Idle {
    pub seconds: f64,
    pub daemons: Vec<DaemonCost>,
    pub cables: Vec<CableCost>,
}

#[derive(Serialize)]
pub struct DaemonCost {
    pub node: &'static str,
    pub program: String,
    /// Of one processor.
    pub cpu_percent: f64,
    pub wakeups_per_s: f64,
    pub resident_mib: f64,
}

#[derive(Serialize)]
pub struct CableCost {
    pub node: &'static str,
    pub network: &'static str,
    pub bytes_per_s: f64,
    pub packets_per_s: f64,
}

/// Sleeps, unless interrupted.
pub fn pause(time: Duration) -> Result<()> {
    let until = Instant::now() + time;
    while Instant::now() < until {
        interrupt::check()?;
        std::thread::sleep(Duration::from_millis(100).min(until.saturating_duration_since(Instant::now())));
    }
    Ok(())
}

/// Looks twice, `time` apart.
pub fn watch(lab: &Path, time: Duration) -> Result<Idle> {
    let (daemons, cables, started) = (running(lab)?, sent()?, Instant::now());
    pause(time)?;
    let seconds = started.elapsed().as_secs_f64();
    let per_s = |before: u64, after: u64| after.saturating_sub(before) as f64 / seconds;
    let mut idle = Idle { seconds, daemons: Vec::new(), cables: Vec::new() };
    let daemons_after = running(lab)?;
    for (pid, before) in daemons {
        // One that is gone, or another in its place, is a fault that a benchmark must not hide.
        let after = daemons_after.get(&pid).with_context(|| format!("{} has ended", before.program))?;
        idle.daemons.push(DaemonCost {
            node: before.node,
            cpu_percent: per_s(before.cpu_ns, after.cpu_ns) / 1e7,
            wakeups_per_s: per_s(before.wakeups, after.wakeups),
            resident_mib: after.resident_kib as f64 / 1024.0,
            program: before.program,
        });
    }
    idle.daemons.sort_by(|a, b| (&a.program, a.node).cmp(&(&b.program, b.node)));
    for ((node, network, _), (before, after)) in CABLES.into_iter().zip(cables.into_iter().zip(sent()?)) {
        idle.cables.push(CableCost {
            node,
            network,
            bytes_per_s: per_s(before.0, after.0),
            packets_per_s: per_s(before.1, after.1),
        });
    }
    Ok(idle)
}

pub struct Running {
    node: &'static str,
    program: String,
    pub cpu_ns: u64,
    pub wakeups: u64,
    pub resident_kib: u64,
}

fn running(lab: &Path) -> Result<BTreeMap<u32, Running>> {
    let mut found = BTreeMap::new();
    for (node, place) in PLACES {
        let group = lab.join(place);
        let pids = fs::read_to_string(group.join("cgroup.procs")).with_context(|| group.display().to_string())?;
        for pid in pids.lines().map(str::parse::<u32>) {
            let pid = pid?;
            found.insert(pid, process(node, pid).with_context(|| format!("process {pid}"))?);
        }
    }
    Ok(found)
}

/// What a process has cost so far.
pub fn process(node: &'static str, pid: u32) -> Result<Running> {
    let dir = PathBuf::from(format!("/proc/{pid}"));
    let program = fs::read_link(dir.join("exe"))?;
    let program = program.file_name().context("a program has a name")?.to_string_lossy().into_owned();
    let resident_kib = field(&fs::read_to_string(dir.join("status"))?, "VmRSS:")?;
    let mut running = Running { node, program, cpu_ns: 0, wakeups: 0, resident_kib };
    for thread in fs::read_dir(dir.join("task"))? {
        let thread = thread?.path();
        let spent = fs::read_to_string(thread.join("schedstat"))?;
        running.cpu_ns += spent.split(' ').next().context("no schedstat")?.parse::<u64>()?;
        running.wakeups += field(&fs::read_to_string(thread.join("status"))?, "voluntary_ctxt_switches:")?;
    }
    Ok(running)
}

fn field(status: &str, name: &str) -> Result<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name}"))?;
    Ok(value.trim().trim_end_matches(" kB").parse()?)
}

/// Bytes and packets that the nodes have sent so far, in the order of `CABLES`.
fn sent() -> Result<Vec<(u64, u64)>> {
    let output = Command::new("ip").args(["-n", SWITCH, "-s", "-j", "link", "show"]).output().context("starting ip")?;
    let links: Vec<Value> = serde_json::from_slice(&output.stdout).context("what ip says of the lab's switch")?;
    let of = |port: &str| {
        let link = links.iter().find(|link| link["ifname"] == port)?;
        let received = &link["stats64"]["rx"];
        Some((received["bytes"].as_u64()?, received["packets"].as_u64()?))
    };
    CABLES.iter().map(|(_, _, port)| of(port).with_context(|| format!("no figures of the cable {port}"))).collect()
}
