//! `cargo xtask bench`: the speed and the price of a mirrored volume, beside `qemu-nbd` on a plain file.
//!
//! A lab of two nodes is brought up with the release build, a volume is made, and fio's NBD engine drives it through the
//! unix socket of the node that serves it. In the same run, turn by turn, the same fio job drives a file of the same size
//! on the same disk through `qemu-nbd` (O_DIRECT, io_uring, one copy, no checksums). Speed on a shared machine drifts, so
//! only the ratios of neighbouring runs mean something; medians are shown.
//!
//! CPU is counted by cgroups, over every process that took part: fio, the server, both nodes' daemons, and the kernel
//! threads that work for them.

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What `cargo xtask bench` takes.
#[derive(clap::Args)]
pub struct BenchArgs {
    /// Seconds of each fio run.
    #[arg(long, default_value_t = 4)]
    seconds: u32,
    /// Runs of each job on each side, alternating.
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Only jobs whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// Size of the volume, in MiB.
    #[arg(long, default_value_t = 1024)]
    size_mib: u64,
    /// Write every figure here, as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// One fio job. `flush_every`: a flush after so many writes.
struct Job {
    name: &'static str,
    rw: &'static str,
    block: &'static str,
    depth: u32,
    flush_every: u32,
}

const JOBS: [Job; 9] = [
    Job { name: "4k randwrite qd1", rw: "randwrite", block: "4k", depth: 1, flush_every: 0 },
    Job { name: "4k randwrite qd1 flush each", rw: "randwrite", block: "4k", depth: 1, flush_every: 1 },
    Job { name: "4k randwrite qd32", rw: "randwrite", block: "4k", depth: 32, flush_every: 0 },
    Job { name: "4k randwrite qd32 flush/32", rw: "randwrite", block: "4k", depth: 32, flush_every: 32 },
    Job { name: "4k randread qd32", rw: "randread", block: "4k", depth: 32, flush_every: 0 },
    Job { name: "1m write qd4", rw: "write", block: "1m", depth: 4, flush_every: 0 },
    Job { name: "1m write qd4 flush/8", rw: "write", block: "1m", depth: 4, flush_every: 8 },
    Job { name: "1m read qd4", rw: "read", block: "1m", depth: 4, flush_every: 0 },
    Job { name: "4k randread qd1", rw: "randread", block: "4k", depth: 1, flush_every: 0 },
];

/// Figures of one run.
#[derive(Clone, Serialize)]
struct Figures {
    iops: f64,
    mib_per_s: f64,
    p50_us: f64,
    p99_us: f64,
    cpu_us_per_io: f64,
}

/// All runs of one job.
#[derive(Serialize)]
struct Row {
    job: &'static str,
    pollux: Vec<Figures>,
    qemu_nbd: Vec<Figures>,
}

/// Runs the benchmark and prints the table.
pub fn run(args: &BenchArgs) -> Result<()> {
    ensure!(args.runs > 0 && args.seconds > 0, "--runs and --seconds must be at least 1");
    for tool in ["fio", "qemu-nbd"] {
        ensure!(
            Command::new(tool).arg("--version").stdout(Stdio::null()).status().is_ok_and(|status| status.success()),
            "`{tool}` is not installed; run scripts/deps"
        );
    }
    let status = crate::cargo().args(["build", "--release", "--workspace", "--bins"]).status()?;
    ensure!(status.success(), "the release build failed");
    let scratch = PathBuf::from("target/bench");
    fs::create_dir_all(&scratch)?;

    let lab = Lab::up(args.size_mib)?;
    let cgroup = Cgroup::new("pollux-bench")?;
    let plain = PlainExport::start(&scratch, args.size_mib, &cgroup)?;
    let size = format!("{}m", args.size_mib);
    for uri in [&lab.uri, &plain.uri] {
        fio(uri, &Job { name: "fill", rw: "write", block: "1m", depth: 4, flush_every: 0 }, &size, None, &cgroup)?;
    }

    let mut rows = Vec::new();
    for job in JOBS.iter().filter(|job| args.only.as_ref().is_none_or(|only| job.name.contains(only.as_str()))) {
        let mut row = Row { job: job.name, pollux: Vec::new(), qemu_nbd: Vec::new() };
        for _ in 0..args.runs {
            for (uri, others, figures) in [
                (&lab.uri, lab.cgroups.as_slice(), &mut row.pollux),
                (&plain.uri, &[] as &[PathBuf], &mut row.qemu_nbd),
            ] {
                let before = cpu_us(&cgroup.dir, others)?;
                let mut measured = fio(uri, job, &size, Some(args.seconds), &cgroup)?;
                let spent = cpu_us(&cgroup.dir, others)? - before;
                measured.cpu_us_per_io = spent / (measured.iops * f64::from(args.seconds)).max(1.0);
                figures.push(measured);
            }
        }
        print_row(&row, rows.is_empty());
        rows.push(row);
    }
    if let Some(path) = &args.json {
        fs::write(path, serde_json::to_string_pretty(&rows)? + "\n").context("writing the figures")?;
    }
    Ok(())
}

fn print_row(row: &Row, first: bool) {
    if first {
        println!(
            "{:<28} {:>10} {:>10} {:>6}   {:>9} {:>9} {:>6}   {:>8} {:>8} {:>6}",
            "median of each", "pollux/s", "q-nbd/s", "ratio", "p99 us", "q-nbd", "ratio", "cpu us", "q-nbd", "ratio"
        );
    }
    let (ours, theirs) = (&row.pollux, &row.qemu_nbd);
    let show = |of: fn(&Figures) -> f64| {
        let (a, b) = (median(ours.iter().map(of)), median(theirs.iter().map(of)));
        (a, b, median(ours.iter().zip(theirs).map(|(a, b)| of(a) / of(b).max(f64::EPSILON))))
    };
    let (iops, p99, cpu) = (show(|f| f.iops), show(|f| f.p99_us), show(|f| f.cpu_us_per_io));
    println!(
        "{:<28} {:>10.0} {:>10.0} {:>6.2}   {:>9.0} {:>9.0} {:>6.2}   {:>8.1} {:>8.1} {:>6.2}",
        row.job, iops.0, iops.1, iops.2, p99.0, p99.1, p99.2, cpu.0, cpu.1, cpu.2
    );
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Runs one fio job and reads its figures. Without `seconds` the volume is written once, whole.
fn fio(uri: &str, job: &Job, size: &str, seconds: Option<u32>, cgroup: &Cgroup) -> Result<Figures> {
    let mut command = cgroup.command("fio");
    command.args(["--name=bench", "--ioengine=nbd", "--output-format=json", "--randrepeat=0", "--norandommap"]);
    command.args([format!("--uri={uri}"), format!("--rw={}", job.rw), format!("--bs={}", job.block)]);
    command.args([format!("--iodepth={}", job.depth), format!("--size={size}")]);
    if let Some(seconds) = seconds {
        command.args(["--time_based".to_owned(), format!("--runtime={seconds}")]);
    }
    if job.flush_every > 0 {
        command.arg(format!("--fsync={}", job.flush_every));
    }
    let output = command.output().context("starting fio")?;
    ensure!(output.status.success(), "fio failed on {uri}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    let json: Value = serde_json::from_str(&text[text.find('{').context("fio printed no JSON")?..])?;
    let side = if job.rw.contains("write") { "write" } else { "read" };
    let result = &json["jobs"][0][side];
    let number = |value: &Value| value.as_f64().with_context(|| format!("fio's figure is not a number: {value}"));
    ensure!(json["jobs"][0]["error"] == 0, "fio saw an I/O error on {uri}");
    Ok(Figures {
        iops: number(&result["iops"])?,
        mib_per_s: number(&result["bw"])? / 1024.0,
        p50_us: number(&result["clat_ns"]["percentile"]["50.000000"])? / 1000.0,
        p99_us: number(&result["clat_ns"]["percentile"]["99.000000"])? / 1000.0,
        cpu_us_per_io: 0.0,
    })
}

/// CPU time spent so far in these cgroups, in microseconds.
fn cpu_us(own: &Path, others: &[PathBuf]) -> Result<f64> {
    let mut sum = 0.0;
    for dir in std::iter::once(own).chain(others.iter().map(PathBuf::as_path)) {
        let text = fs::read_to_string(dir.join("cpu.stat")).with_context(|| format!("reading {}", dir.display()))?;
        let line = text.lines().find_map(|line| line.strip_prefix("usage_usec ")).context("no usage_usec")?;
        sum += line.trim().parse::<f64>()?;
    }
    Ok(sum)
}

/// A cgroup for the client and for `qemu-nbd`; gone when dropped.
struct Cgroup {
    dir: PathBuf,
}

impl Cgroup {
    fn new(name: &str) -> Result<Cgroup> {
        let dir = cgroup_root()?.join(format!("{name}-{}", std::process::id()));
        fs::create_dir(&dir).with_context(|| format!("making the cgroup {} (root is needed)", dir.display()))?;
        Ok(Cgroup { dir })
    }
    /// A command that runs in this cgroup from its first instruction.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("sh");
        let procs = self.dir.join("cgroup.procs");
        command.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(procs).arg(program);
        command
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::write(self.dir.join("cgroup.kill"), "1");
        let deadline = Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(&self.dir).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Where cgroup v2 is mounted.
fn cgroup_root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let fields = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    mounts.lines().map(fields).find(|mount| mount.get(2).is_some_and(|kind| kind == "cgroup2")).map_or_else(
        || bail!("no cgroup v2 is mounted; mount one with `mount -t cgroup2 none /sys/fs/cgroup/unified`"),
        |mount| Ok(PathBuf::from(&mount[1])),
    )
}

/// A plain file behind `qemu-nbd`.
struct PlainExport {
    uri: String,
    server: Child,
    file: PathBuf,
}

impl PlainExport {
    fn start(scratch: &Path, size_mib: u64, cgroup: &Cgroup) -> Result<PlainExport> {
        let file = fs::canonicalize(scratch)?.join("plain.raw");
        let socket = fs::canonicalize(scratch)?.join("plain.sock");
        let _ = fs::remove_file(&socket);
        fs::File::create(&file)?.set_len(size_mib << 20)?;
        let server = cgroup
            .command("qemu-nbd")
            .args(["-f", "raw", "-x", "plain", "-e", "8", "-t", "--cache=none", "--aio=io_uring", "--discard=unmap"])
            .arg("-k")
            .args([&socket, &file])
            .spawn()
            .context("starting qemu-nbd")?;
        let uri = format!("nbd+unix:///plain?socket={}", socket.display());
        let plain = PlainExport { uri, server, file };
        wait_for("qemu-nbd to listen", || socket.exists())?;
        Ok(plain)
    }
}

impl Drop for PlainExport {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        let _ = fs::remove_file(&self.file);
    }
}

/// A lab of two nodes with one volume, taken down when dropped.
struct Lab {
    uri: String,
    cgroups: Vec<PathBuf>,
}

impl Lab {
    fn up(size_mib: u64) -> Result<Lab> {
        let pool = format!("{}M", size_mib * 2 + 1024);
        pollux(&["lab", "up", "--pool-size", &pool])?;
        let root = cgroup_root()?.join("pollux-lab");
        let mut lab = Lab { uri: String::new(), cgroups: Vec::new() };
        for node in fs::read_dir(&root).context("the lab has no cgroups")? {
            let node = node?;
            if node.file_type()?.is_dir() {
                lab.cgroups.push(node.path());
            }
        }
        pollux(&["volume", "create", "bench", "--size", &format!("{size_mib}M")])?;
        let export: Value =
            serde_json::from_str(&pollux(&["volume", "export", "bench", "--nbd", "-o", "json"])?).context("export")?;
        lab.uri = export
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .find(|uri| uri.starts_with("nbd+unix"))
            .with_context(|| format!("the export has no unix socket: {export}"))?
            .to_owned();
        Ok(lab)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = pollux(&["lab", "down"]);
    }
}

/// Runs the operator's command and returns what it printed.
fn pollux(args: &[&str]) -> Result<String> {
    let output = Command::new("target/release/pollux").args(args).stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "`pollux {}` failed", args.join(" "));
    Ok(String::from_utf8(output.stdout)?)
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_so() {
        ensure!(Instant::now() < deadline, "waited 10 s for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
