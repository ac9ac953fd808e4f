//! fio's NBD engine as the load, and what it measured.

use super::cgroup::{Cgroup, cpu_us};
use crate::interrupt;
use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use serde_json::Value;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

/// How much longer than asked for a run may take; a volume that is frozen so long is broken.
const GRACE: Duration = Duration::from_secs(30);

/// One fio job. `flush_every`: a flush after so many writes.
pub struct Job {
    pub name: &'static str,
    pub rw: &'static str,
    pub block: &'static str,
    pub depth: u32,
    pub flush_every: u32,
}

/// Figures of one run.
#[derive(Clone, Serialize)]
pub struct Figures {
    pub iops: f64,
    pub mib_per_s: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub cpu_us_per_io: f64,
}

/// How fio is run here.
pub struct Fio<'a> {
    pub scratch: &'a Path,
    pub cgroup: &'a Cgroup,
    pub size_mib: u64,
}

impl Fio<'_> {
    /// Writes the whole of `uri` once.
    pub fn fill(&self, uri: &str, job: &Job, at_most: Duration) -> Result<()> {
        self.output(uri, job, &[], at_most).map(|_| ())
    }

    /// Runs a job for some seconds. `paying`: the groups whose CPU time counts.
    pub fn run(&self, uri: &str, job: &Job, seconds: u32, paying: &[&Path]) -> Result<Figures> {
        let before = cpu_us(paying)?;
        let timed = ["--time_based".to_owned(), format!("--runtime={seconds}")];
        let json = self.output(uri, job, &timed, Duration::from_secs(seconds.into()) + GRACE)?;
        let spent = cpu_us(paying)? - before;

        let side = if job.rw.contains("write") { "write" } else { "read" };
        let result = &json["jobs"][0][side];
        let number = |name: &str, value: &Value| {
            value.as_f64().with_context(|| format!("fio's {name} of `{}` is not a number: {value}", job.name))
        };
        let latency = |percent: &str| number(percent, &result["clat_ns"]["percentile"][percent]).map(|ns| ns / 1000.0);
        let ios = number("total_ios", &result["total_ios"])?;
        ensure!(ios > 0.0, "`{}` did nothing on {uri}", job.name);
        Ok(Figures {
            iops: number("iops", &result["iops"])?,
            mib_per_s: number("bw", &result["bw"])? / 1024.0,
            p50_us: latency("50.000000")?,
            p99_us: latency("99.000000")?,
            cpu_us_per_io: spent / ios,
        })
    }

    fn output(&self, uri: &str, job: &Job, more: &[String], at_most: Duration) -> Result<Value> {
        let (said, errors) = (self.scratch.join("fio.json"), self.scratch.join("fio.err"));
        let mut command = self.cgroup.command("fio");
        command.args(["--name=bench", "--ioengine=nbd", "--output-format=json", "--randrepeat=0", "--norandommap"]);
        command.args([format!("--uri={uri}"), format!("--rw={}", job.rw), format!("--bs={}", job.block)]);
        command.args([format!("--iodepth={}", job.depth), format!("--size={}m", self.size_mib)]).args(more);
        if job.flush_every > 0 {
            command.arg(format!("--fsync={}", job.flush_every));
        }
        command.stdout(File::create(&said)?).stderr(File::create(&errors)?);
        let mut child = command.spawn().context("starting fio")?;
        let status = ended(&mut child, at_most).with_context(|| format!("`{}` on {uri}", job.name))?;
        if !status.success() {
            bail!("`{}` on {uri}: fio failed, {status}: {}", job.name, fs::read_to_string(&errors)?.trim());
        }
        let text = fs::read_to_string(&said)?;
        // Lines for humans come before it.
        let json: Value = serde_json::from_str(&text[text.find('{').context("fio printed no JSON")?..])?;
        ensure!(json["jobs"][0]["error"] == 0, "`{}` saw an I/O error on {uri}", job.name);
        Ok(json)
    }
}

/// Waits for the end of a program, which comes early with an interrupt or when its time is over.
fn ended(child: &mut Child, at_most: Duration) -> Result<ExitStatus> {
    let deadline = Instant::now() + at_most;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        let late = if Instant::now() > deadline { Err(anyhow::anyhow!("not done after {at_most:?}")) } else { Ok(()) };
        if let Err(cause) = interrupt::check().and(late) {
            let _ = child.kill();
            child.wait()?;
            return Err(cause);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
