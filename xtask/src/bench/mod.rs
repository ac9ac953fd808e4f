//! `cargo xtask bench`: the speed and the price of a mirrored volume, beside two yardsticks.
//!
//! Three servers are driven turn by turn by the same client (`client.rs`) with the same work, on the same disk:
//!
//! * the floor (`floor.c`): a bare mirrored write, with no protocol, no checks and no recovery;
//! * `qemu-nbd` on a plain file (O_DIRECT, io_uring): one copy, no checksums;
//! * Pollux: two `blockd` of the build that is shipped (profile `dist`), mode C, without `noded`, on loopback addresses.
//!
//! Speed on a shared machine drifts, so only the ratios of neighbouring runs mean something; medians are shown. CPU is
//! counted by cgroups over all processes of a server, both nodes and io_uring's workers included, and of the client's
//! thread apart. Not counted, for anybody: kernel threads that belong to nobody (the block layer's, the file system's).
//!
//! Both copies of a mirror lie on one disk and share its bandwidth, and both nodes and the client share the processors. On
//! two servers each has its own; so the ratios to `qemu-nbd` of writes here are lower bounds.

mod cgroup;
mod client;
mod crash;
mod floor;
mod idle;
mod lab;
mod pair;
mod plain;
mod process;
mod quiet;
mod resync;
mod table;
mod work;

use crate::interrupt;
use anyhow::{Context, Result, bail, ensure};
use cgroup::{Cgroup, cpu_us};
use client::Client;
use floor::Floor;
use pair::{Build, Pair, Volume};
use plain::PlainExport;
use pollux_base::config::Encryption;
use serde::Serialize;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use work::{COMPARED, FILL, ONE_FLUSH, STEADY_WRITE, Work};

/// What `cargo xtask bench` takes.
#[derive(clap::Args)]
pub struct BenchArgs {
    /// Seconds of each run
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Runs of each row at each server, alternating
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=99))]
    runs: u32,
    /// Only rows whose name contains one of these, comma-separated (`--rows list` names them)
    #[arg(long, value_delimiter = ',')]
    rows: Vec<String>,
    /// Only these servers
    #[arg(long, value_delimiter = ',', default_values = ["floor", "qemu-nbd", "pollux"])]
    servers: Vec<String>,
    /// Whether what Pollux' nodes send each other is encrypted: on or off
    #[arg(long, default_value = "on")]
    replication_encryption: String,
    /// Volumes of Pollux are encrypted at rest.
    #[arg(long)]
    encrypted_volume: bool,
    /// Size of the volume and of the plain files, in MiB
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(64..=1 << 20))]
    size_mib: u64,
    /// Size of the large volume of the row `wide`, in MiB
    #[arg(long, default_value_t = 20 << 10, value_parser = clap::value_parser!(u64).range(64..=1 << 20))]
    wide_mib: u64,
    /// Size of the sparse volume of the row `memory`, in MiB
    #[arg(long, default_value_t = 1 << 20, value_parser = clap::value_parser!(u64).range(64..=1 << 24))]
    sparse_mib: u64,
    /// Bring up a whole lab too, and watch it for so many seconds while it has nothing to do. No other lab may run
    #[arg(long, value_name = "SECONDS")]
    site: Option<u32>,
    /// Measure another build's `blockd` beside, before `pollux`: what has a change brought?
    #[arg(long, value_name = "FILE")]
    before: Option<PathBuf>,
    /// Write every figure here, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

impl BenchArgs {
    fn encryption(&self) -> Result<Encryption> {
        match self.replication_encryption.as_str() {
            "on" => Ok(Encryption::On),
            "off" => Ok(Encryption::Off),
            other => bail!("replication encryption is on or off, not `{other}`"),
        }
    }

    fn chooses(&self, name: &str) -> bool {
        self.rows.is_empty() || self.rows.iter().any(|row| name.contains(row.as_str()))
    }
}

/// What part of the volume's size those have whose first writes are measured.
const SMALL_PART: u64 = 4;

/// Rows beside those of `COMPARED`: Pollux against itself, or alone.
const WIDE: &str = "wide: 4k writes qd32 over the large volume against as much as the small one has";
const FRESH: &str = "fresh: 4k writes qd32 on a new volume against the steady state";
const SNAPSHOT: &str = "snapshot: 4k writes qd32 right after a snapshot against the steady state";
const RESYNC: &str = "resync: a twentieth of the large volume changed while node 2 was away";
const CRASH: &str = "crash: blockd is killed under writes all over the large volume, and started again";
const IDLE: &str = "idle: CPU, wake-ups, bytes, memory";
const MEMORY: &str = "memory: a sparse volume, every extent mapped";

/// Names of servers.
const POLLUX: &str = "pollux";
const BEFORE: &str = "before";

/// Before a run is counted the same is done for so long.
const WARM_UP: Duration = Duration::from_millis(300);

/// Figures of one run.
#[derive(Clone, Serialize)]
pub struct Figures {
    pub iops: f64,
    pub mib_per_s: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    /// CPU time of all processes of the server.
    pub server_us_per_io: f64,
    pub client_us_per_io: f64,
}

/// All runs of one row, by who was measured.
#[derive(Serialize)]
pub struct Row {
    pub name: &'static str,
    pub is_stream: bool,
    pub runs: Vec<(String, Vec<Figures>)>,
}

/// Runs the benchmark and prints its tables.
pub fn run(args: &BenchArgs) -> Result<()> {
    let names: Vec<&str> =
        COMPARED.iter().map(|work| work.name).chain([WIDE, FRESH, SNAPSHOT, RESYNC, CRASH, IDLE, MEMORY]).collect();
    ensure!(
        names.iter().any(|name| args.chooses(name)),
        "no row has such a name; there are:\n  {}",
        names.join("\n  ")
    );
    let mut servers = Servers::start(args)?;
    let mut rows = Vec::new();
    for work in COMPARED.iter().filter(|work| args.chooses(work.name)) {
        rows.push(servers.compare(work, args)?);
    }
    let mut has_memory = None;
    if servers.pair.is_some() {
        if args.chooses(FRESH) {
            rows.push(servers.first_writes(args, FRESH, false)?);
        }
        if args.chooses(SNAPSHOT) {
            rows.push(servers.first_writes(args, SNAPSHOT, true)?);
        }
        servers.give_back_used()?;
        if args.chooses(IDLE) {
            servers.idle()?;
        }
        if args.chooses(WIDE) {
            rows.push(servers.wide(args)?);
        }
        if args.chooses(RESYNC) {
            servers.resync(args)?;
        }
        if args.chooses(CRASH) {
            servers.crash(args)?;
        }
        if args.chooses(MEMORY) {
            has_memory = Some(());
        }
    }
    drop(servers);
    if has_memory.is_some() {
        memory(args)?;
    }
    if let Some(seconds) = args.site {
        site(args, seconds)?;
    }
    if let Some(path) = &args.json {
        fs::write(path, serde_json::to_string_pretty(&rows)? + "\n")
            .with_context(|| format!("writing the figures to {}", path.display()))?;
    }
    Ok(())
}

/// Everything that is measured, and where it lies. What is declared first is ended first.
struct Servers {
    floor: Option<Floor>,
    plain: Option<PlainExport>,
    before: Option<(Pair, Volume)>,
    pair: Option<(Pair, Volume)>,
    /// Volumes whose first writes were measured.
    used: Vec<Volume>,
    /// In the order in which they are measured.
    names: Vec<String>,
    size_bytes: u64,
    cgroups: PathBuf,
    scratch: Scratch,
}

impl Servers {
    fn start(args: &BenchArgs) -> Result<Servers> {
        let (mut servers, size_bytes) = (Servers::none()?, args.size_mib << 20);
        servers.size_bytes = size_bytes;
        servers.names = args.servers.clone();
        if args.before.is_some() {
            let place = servers.names.iter().position(|name| name == POLLUX);
            servers.names.insert(place.context("`--before` is measured beside `pollux`")?, BEFORE.to_owned());
        }
        for server in &servers.names {
            let cgroup = servers.cgroup(server)?;
            let scratch = &servers.scratch.0;
            match server.as_str() {
                "floor" => servers.floor = Some(Floor::start(scratch, size_bytes, cgroup)?),
                "qemu-nbd" => servers.plain = Some(PlainExport::start(scratch, size_bytes, cgroup)?),
                POLLUX | BEFORE => {
                    // The rows that need more volumes than one need no more space than that.
                    let wide_bytes = args.wide_mib << 20;
                    // A resync keeps what was there before: a unit of 32 KiB for each 4 KiB of a twentieth.
                    let kept_bytes = if args.chooses(RESYNC) { wide_bytes / 2 } else { 0 };
                    let bytes = (2 * size_bytes).max(size_bytes + wide_bytes + kept_bytes);
                    let build = Build {
                        program: args.before.clone().filter(|_| server == BEFORE).unwrap_or_else(shipped),
                        encryption: args.encryption()?,
                        encrypts_volumes: args.encrypted_volume,
                    };
                    // What the rows of first writes take, five runs each; beyond it they are slower.
                    let is_written = args.chooses(FRESH) || args.chooses(SNAPSHOT);
                    let written_bytes = if is_written { 5 * size_bytes } else { 0 };
                    let mut pair = Pair::start(&scratch.join(server), bytes, written_bytes, &build, cgroup)?;
                    let volume = pair.create(size_bytes)?;
                    let place = if server == BEFORE { &mut servers.before } else { &mut servers.pair };
                    *place = Some((pair, volume));
                }
                other => bail!("there is no server `{other}`, but floor, qemu-nbd and pollux"),
            }
        }
        eprintln!("bench: filling");
        for server in &servers.names.clone() {
            let rate = fill(&mut servers.client(server)?, size_bytes)?;
            eprintln!("bench: {server} was filled with {rate:.0} MiB/s");
        }
        Ok(servers)
    }

    /// Builds what is measured, and looks whether the rest is there.
    fn none() -> Result<Servers> {
        let asked = Command::new("qemu-nbd").arg("--version").stdout(Stdio::null()).status();
        ensure!(asked.is_ok_and(|status| status.success()), "`qemu-nbd` is not installed; run scripts/deps");
        let mut build = crate::cargo();
        crate::run(build.args(["build", "--quiet", "--profile", "dist", "--locked", "-p", "pollux-blockd"]))
            .context("the build")?;
        interrupt::note()?;
        let scratch = Scratch::new(crate::target().join("bench"))?;
        let cgroups = cgroup::root()?;
        let names = Vec::new();
        Ok(Servers {
            floor: None,
            plain: None,
            before: None,
            pair: None,
            used: Vec::new(),
            names,
            size_bytes: 0,
            cgroups,
            scratch,
        })
    }

    fn cgroup(&self, server: &str) -> Result<Cgroup> {
        Cgroup::new(self.cgroups.join(format!("pollux-bench-{server}")))
    }

    fn client(&mut self, server: &str) -> Result<Client> {
        let pair = if server == BEFORE { &self.before } else { &self.pair };
        match (server, &mut self.floor, &self.plain, pair) {
            ("floor", Some(floor), _, _) => floor.client(),
            ("qemu-nbd", _, Some(plain), _) => plain.client(),
            (POLLUX | BEFORE, _, _, Some((pair, volume))) => pair.client(volume),
            _ => bail!("{server} does not run"),
        }
    }

    fn cgroup_dir(&self, server: &str) -> PathBuf {
        self.cgroups.join(format!("pollux-bench-{server}"))
    }

    fn compare(&mut self, work: &Work, args: &BenchArgs) -> Result<Row> {
        let work = work.on(self.size_bytes);
        let mut row = Row { name: work.name, is_stream: work.is_stream(), runs: Vec::new() };
        row.runs.extend(self.names.iter().map(|server| (server.clone(), Vec::new())));
        for _ in 0..args.runs {
            for (server, runs) in &mut row.runs {
                let client = &mut self.client(server)?;
                runs.push(measure(client, &work, args.seconds, &self.cgroup_dir(server))?);
            }
        }
        table::print(&row);
        Ok(row)
    }

    /// First writes, on a new volume each time, right after a snapshot of it when it was filled or with nothing in it,
    /// against the volume that is full.
    fn first_writes(&mut self, args: &BenchArgs, name: &'static str, after_snapshot: bool) -> Result<Row> {
        let cgroup = self.cgroup_dir(POLLUX);
        let (pair, steady) = self.pair.as_mut().context("pollux does not run")?;
        let label = if after_snapshot { "snapshot" } else { "fresh" };
        let mut runs = [("steady".to_owned(), Vec::new()), (label.to_owned(), Vec::new())];
        let small_bytes = self.size_bytes / SMALL_PART;
        for _ in 0..args.runs {
            let mut client = pair.client(steady)?;
            runs[0].1.push(measure(&mut client, &STEADY_WRITE.on(self.size_bytes), args.seconds, &cgroup)?);
            let mut new = pair.create(small_bytes)?;
            if after_snapshot {
                fill(&mut pair.client(&new)?, small_bytes)?;
            }
            flush(&mut client, self.size_bytes)?;
            if after_snapshot {
                pair.snapshot(&mut new)?;
            }
            runs[1].1.push(each_once(&mut pair.client(&new)?, small_bytes, args.seconds, &cgroup)?);
            self.used.push(new);
        }
        Ok(table::printed(Row { name, is_stream: false, runs: runs.into() }))
    }

    /// Gives back what the rows of first writes have used. Not before: what is given back is a hole in the pool's file.
    fn give_back_used(&mut self) -> Result<()> {
        let (pair, _) = self.pair.as_mut().context("pollux does not run")?;
        self.used.drain(..).try_for_each(|volume| pair.remove(volume))
    }

    /// Node 2 is away while a twentieth of a large volume is changed, then comes back.
    fn resync(&mut self, args: &BenchArgs) -> Result<()> {
        let floor = match &mut self.floor {
            Some(floor) => {
                let client = &mut floor.client()?;
                let run = client.run(&FILL.on(self.size_bytes), Duration::from_secs_f64(args.seconds), u64::MAX)?;
                Some(run.latencies.len() as f64 / run.elapsed.as_secs_f64())
            }
            None => None,
        };
        let (pair, _) = self.pair.as_mut().context("pollux does not run")?;
        let size_bytes = args.wide_mib << 20;
        let mut volume = pair.create(size_bytes)?;
        eprintln!("bench: filling {} MiB", args.wide_mib);
        fill(&mut pair.client(&volume)?, size_bytes)?;
        let case = |name, piece, has_guest| {
            let changed_bytes = size_bytes / 20 / piece as u64 * piece as u64;
            resync::Case { name, size_bytes, changed_bytes, piece, has_guest }
        };
        let cases = [
            case("in pieces of 1 MiB", 1 << 20, false),
            case("in pieces of 64 KiB", 64 << 10, false),
            case("in pieces of 4 KiB", 4 << 10, false),
            case("in pieces of 64 KiB, a guest writes", 64 << 10, true),
        ];
        table::print_resync_head(RESYNC, floor);
        for case in cases {
            table::print_resync(&case, &resync::measure(pair, &mut volume, &case)?);
        }
        pair.remove(volume)
    }

    /// Writes all over a large volume, against writes to as much of it as the small one has.
    fn wide(&mut self, args: &BenchArgs) -> Result<Row> {
        let cgroup = self.cgroup_dir("pollux");
        let (pair, _) = self.pair.as_mut().context("pollux does not run")?;
        let size_bytes = args.wide_mib << 20;
        let volume = pair.create(size_bytes)?;
        eprintln!("bench: filling {} MiB", args.wide_mib);
        fill(&mut pair.client(&volume)?, size_bytes)?;
        let mut runs = [("small".to_owned(), Vec::new()), ("large".to_owned(), Vec::new())];
        for _ in 0..args.runs {
            for ((_, runs), span) in runs.iter_mut().zip([self.size_bytes, size_bytes]) {
                runs.push(measure(&mut pair.client(&volume)?, &STEADY_WRITE.on(span), args.seconds, &cgroup)?);
            }
        }
        Ok(table::printed(Row { name: WIDE, is_stream: false, runs: runs.into() }))
    }

    /// Either process dies under a guest that writes all over a large volume.
    fn crash(&mut self, args: &BenchArgs) -> Result<()> {
        let (pair, _) = self.pair.as_mut().context("pollux does not run")?;
        let size_bytes = args.wide_mib << 20;
        let volume = pair.create(size_bytes)?;
        eprintln!("bench: filling {} MiB", args.wide_mib);
        fill(&mut pair.client(&volume)?, size_bytes)?;
        table::print_crash_head(CRASH, args.wide_mib);
        for (name, node) in [("the primary's blockd", 0), ("the secondary's blockd", 1)] {
            table::print_crash(name, &crash::measure(pair, &volume, size_bytes, node)?);
        }
        pair.remove(volume)
    }

    fn idle(&mut self) -> Result<()> {
        let (pair, _) = self.pair.as_ref().context("pollux does not run")?;
        table::print_quiet(&quiet::watch(pair)?);
        Ok(())
    }
}

/// The `blockd` that users get.
fn shipped() -> PathBuf {
    crate::target().join("dist/blockd")
}

/// The memory of `blockd` when so much is mapped.
fn memory(args: &BenchArgs) -> Result<()> {
    let size_bytes = args.sparse_mib << 20;
    let servers = Servers::none()?;
    let build = Build { program: shipped(), encryption: args.encryption()?, encrypts_volumes: args.encrypted_volume };
    let mut pair = Pair::start(&servers.scratch.0, size_bytes + size_bytes / 64, 0, &build, servers.cgroup(POLLUX)?)?;
    let before = quiet::memory_mib(&pair)?;
    let volume = pair.create(size_bytes)?;
    let mut client = pair.client(&volume)?;
    let extents = size_bytes >> 22;
    eprintln!("bench: one block in each of {extents} extents");
    client.step(4 << 20);
    let one_each = Work { is_random: false, ..STEADY_WRITE.on(size_bytes) };
    let run = client.run(&one_each, Duration::from_secs(600), extents)?;
    ensure!(run.latencies.len() as u64 == extents, "only {} extents were written in time", run.latencies.len());
    let hot = quiet::memory_mib(&pair)?;
    idle::pause(quiet::COOLING_TIME)?;
    let cool = quiet::memory_mib(&pair)?;
    let lines = [("empty pool", before), ("every extent mapped, just written", hot), ("the same, cooled", cool)];
    table::print_memory(args.sparse_mib, lines, &run);
    Ok(())
}

/// A whole lab that has nothing to do.
fn site(args: &BenchArgs, seconds: u32) -> Result<()> {
    let packages = ["pollux-cli", "pollux-noded", "pollux-blockd", "pollux-guard"].map(|package| ["-p", package]);
    let mut build = crate::cargo();
    // What ./demo builds, in the same way: done already after it.
    crate::run(build.args(["build", "--release", "--locked"]).args(packages.as_flattened())).context("the build")?;
    let scratch = Scratch::new(crate::target().join("bench"))?;
    let lab = lab::Lab::up(&scratch.0, args.size_mib)?;
    eprintln!("bench: waiting for the site to be idle, then watching it for {seconds} s");
    idle::pause(quiet::COOLING_TIME)?;
    table::print_idle(&idle::watch(&lab.cgroup, Duration::from_secs(seconds.into()))?);
    Ok(())
}

/// Gives the MiB per second.
fn fill(client: &mut Client, size_bytes: u64) -> Result<f64> {
    let run = client.run(&FILL.on(size_bytes), Duration::MAX, size_bytes / FILL.block_bytes as u64)?;
    Ok((size_bytes >> 20) as f64 / run.elapsed.as_secs_f64())
}

/// Each block at most once, all over a volume of which none is its own yet.
fn each_once(client: &mut Client, size_bytes: u64, seconds: f64, paying: &Path) -> Result<Figures> {
    let blocks = size_bytes / STEADY_WRITE.block_bytes as u64;
    // Odd, so that it meets every block of a power of two before it comes round.
    client.step(((blocks * 618 / 1000) | 1) * STEADY_WRITE.block_bytes as u64);
    let scattered = Work { is_random: false, ..STEADY_WRITE.on(size_bytes) };
    counted(client, &scattered, seconds, blocks / 2, paying)
}

/// What was written before does not have to be flushed by what comes next.
fn flush(client: &mut Client, size_bytes: u64) -> Result<()> {
    client.run(&ONE_FLUSH.on(size_bytes), Duration::MAX, 1)?;
    Ok(())
}

fn measure(client: &mut Client, work: &Work, seconds: f64, paying: &Path) -> Result<Figures> {
    client.run(work, WARM_UP, u64::MAX)?;
    counted(client, work, seconds, u64::MAX, paying)
}

fn counted(client: &mut Client, work: &Work, seconds: f64, requests_max: u64, paying: &Path) -> Result<Figures> {
    interrupt::check()?;
    let before = cpu_us(&[paying])?;
    let run = client.run(work, Duration::from_secs_f64(seconds), requests_max)?;
    let spent = cpu_us(&[paying])? - before;
    let ios = run.latencies.len() as f64;
    ensure!(ios > 0.0, "`{}` did nothing", work.name);
    let iops = run.iops();
    Ok(Figures {
        iops,
        mib_per_s: iops * work.block_bytes as f64 / f64::from(1 << 20),
        p50_us: run.percentile_us(50),
        p99_us: run.percentile_us(99),
        server_us_per_io: spent / ios,
        client_us_per_io: run.client_cpu.as_secs_f64() * 1e6 / ios,
    })
}

/// A folder for pools, the plain files, and what programs say; gone when dropped.
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
