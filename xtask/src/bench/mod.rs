//! `cargo xtask bench`: the speed and the price of a mirrored volume, beside `qemu-nbd` on a plain file.
//!
//! A lab of two nodes is brought up with the release build, a volume is made, and fio's NBD engine drives it through the
//! unix socket of the node that serves it. In the same run, turn by turn, the same fio job drives a file of the same size
//! on the same disk through `qemu-nbd` (O_DIRECT, io_uring, one copy, no checksums). Speed on a shared machine drifts, so
//! only the ratios of neighbouring runs mean something; medians are shown.
//!
//! CPU is counted by cgroups, over every process that took part: fio and the server, and for Pollux all daemons of the
//! whole site with the io_uring workers of each. Not counted, for either side: kernel threads that belong to nobody (the
//! block layer's, the file system's).
//!
//! Both copies of the mirror lie on one disk and share its bandwidth, both nodes and fio share the processors. On two
//! servers either has its own; so the ratios of writes here are lower bounds.

mod cgroup;
mod fio;
mod idle;
mod lab;
mod plain;
mod table;

use crate::interrupt;
use anyhow::{Context, Result, ensure};
use cgroup::Cgroup;
use fio::{Figures, Job};
use idle::Idle;
use lab::Lab;
use plain::PlainExport;
use serde::Serialize;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

/// What `cargo xtask bench` takes.
#[derive(clap::Args)]
pub struct BenchArgs {
    /// Seconds of each fio run
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Runs of each job on each side, alternating
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    runs: u32,
    /// Only jobs whose name contains this
    #[arg(long)]
    only: Option<String>,
    /// Size of the volume, in MiB
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(64..=1 << 20))]
    size_mib: u64,
    /// Seconds for which the idle site is watched; 0 for not at all
    #[arg(long, default_value_t = 20)]
    idle_seconds: u32,
    /// Write every figure here, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

const JOBS: [Job; 9] = [
    Job { name: "4k randwrite qd1", rw: "randwrite", block: "4k", depth: 1, flush_every: 0 },
    Job { name: "4k randwrite qd1 flush each", rw: "randwrite", block: "4k", depth: 1, flush_every: 1 },
    Job { name: "4k randwrite qd32", rw: "randwrite", block: "4k", depth: 32, flush_every: 0 },
    Job { name: "4k randwrite qd32 flush/32", rw: "randwrite", block: "4k", depth: 32, flush_every: 32 },
    Job { name: "4k randread qd1", rw: "randread", block: "4k", depth: 1, flush_every: 0 },
    Job { name: "4k randread qd32", rw: "randread", block: "4k", depth: 32, flush_every: 0 },
    Job { name: "1m write qd4", rw: "write", block: "1m", depth: 4, flush_every: 0 },
    Job { name: "1m write qd4 flush/8", rw: "write", block: "1m", depth: 4, flush_every: 8 },
    Job { name: "1m read qd4", rw: "read", block: "1m", depth: 4, flush_every: 0 },
];
/// What either side is filled with before it is measured, so that nothing is measured on space that was never written.
const FILL: Job = Job { name: "fill", rw: "write", block: "1m", depth: 4, flush_every: 0 };
/// Writing a volume once, whole, may take this long per GiB, and never less.
const FILL_TIME: Duration = Duration::from_secs(120);
/// After the last write extents cool for some seconds; an idle site is one on which that is over.
const COOLING_TIME: Duration = Duration::from_secs(15);

/// All runs of one job.
#[derive(Serialize)]
struct Row {
    job: &'static str,
    pollux: Vec<Figures>,
    qemu_nbd: Vec<Figures>,
}

/// Everything that was measured.
#[derive(Serialize)]
struct Measured<'a> {
    seconds: u32,
    size_mib: u64,
    jobs: &'a [Row],
    idle: Option<&'a Idle>,
}

/// Runs the benchmark and prints its tables.
pub fn run(args: &BenchArgs) -> Result<()> {
    let is_chosen = |job: &&Job| args.only.as_ref().is_none_or(|only| job.name.contains(only.as_str()));
    let jobs: Vec<&Job> = JOBS.iter().filter(is_chosen).collect();
    ensure!(!jobs.is_empty(), "no job has such a name; there are {:?}", JOBS.map(|job| job.name));
    for tool in ["fio", "qemu-nbd"] {
        let asked = Command::new(tool).arg("--version").stdout(Stdio::null()).status();
        ensure!(asked.is_ok_and(|status| status.success()), "`{tool}` is not installed; run scripts/deps");
    }
    let cgroups = cgroup::root()?;
    let packages = ["pollux-cli", "pollux-noded", "pollux-blockd", "pollux-guard"].map(|package| ["-p", package]);
    let mut build = crate::cargo();
    // What ./demo builds, in the same way: done already after it.
    crate::run(build.args(["build", "--release", "--locked"]).args(packages.as_flattened())).context("the build")?;

    interrupt::note()?;
    // What is declared first is removed last.
    let scratch = Scratch::new(crate::target().join("bench"))?;
    let lab = Lab::up(&scratch.0, args.size_mib)?;
    let cgroup = Cgroup::new(cgroups.join("pollux-bench"))?;
    let plain = PlainExport::start(&scratch.0, args.size_mib, &cgroup)?;

    eprintln!("bench: filling");
    let fill_time = FILL_TIME.mul_f64((args.size_mib as f64 / 1024.0).max(1.0));
    let fio = fio::Fio { scratch: &scratch.0, cgroup: &cgroup, size_mib: args.size_mib };
    for uri in [&lab.uri, &plain.uri] {
        fio.fill(uri, &FILL, fill_time)?;
    }
    let mut rows = Vec::new();
    for job in jobs {
        let mut row = Row { job: job.name, pollux: Vec::new(), qemu_nbd: Vec::new() };
        for _ in 0..args.runs {
            row.pollux.push(fio.run(&lab.uri, job, args.seconds, &[&cgroup.dir, &lab.cgroup])?);
            row.qemu_nbd.push(fio.run(&plain.uri, job, args.seconds, &[&cgroup.dir])?);
        }
        table::print_job(&row, rows.is_empty());
        rows.push(row);
    }
    drop(plain);
    let idle = match args.idle_seconds {
        0 => None,
        seconds => {
            eprintln!("bench: waiting for the site to be idle, then watching it for {seconds} s");
            idle::pause(COOLING_TIME)?;
            Some(idle::watch(&lab.cgroup, Duration::from_secs(seconds.into()))?)
        }
    };
    if let Some(idle) = &idle {
        table::print_idle(idle);
    }
    if let Some(path) = &args.json {
        let measured = Measured { seconds: args.seconds, size_mib: args.size_mib, jobs: &rows, idle: idle.as_ref() };
        fs::write(path, serde_json::to_string_pretty(&measured)? + "\n")
            .with_context(|| format!("writing the figures to {}", path.display()))?;
    }
    Ok(())
}

/// A folder for pools, the plain file, and what programs say; gone when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new(dir: PathBuf) -> Result<Scratch> {
        fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        Ok(Scratch(fs::canonicalize(dir)?))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
