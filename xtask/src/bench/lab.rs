//! A lab of two nodes with one volume.

use crate::interrupt;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What a pool needs beside the volume: tables, journal, and some air.
const POOL_EXTRA_MIB: u64 = 1024;

/// A probe takes some seconds.
const PROBE_TIME: Duration = Duration::from_secs(60);

/// Taken down when dropped.
pub struct Lab {
    /// The group of the whole site.
    pub cgroup: PathBuf,
}

impl Lab {
    /// Builds the site in `scratch`, so that its pools lie on the same file system as the plain file.
    pub fn up(scratch: &Path, size_mib: u64) -> Result<Lab> {
        let pool = format!("{}M", size_mib + POOL_EXTRA_MIB);
        let dir = scratch.join("lab");
        pollux(&["lab", "up", "--pool-size", &pool, "--dir", &dir.to_string_lossy()])?;
        let lab = Lab { cgroup: super::cgroup::root()?.join("pollux-lab") };
        interrupt::check()?;
        pollux(&["volume", "create", "bench", "--size", &format!("{size_mib}M")])?;
        lab.wait_for_probes()?;
        Ok(lab)
    }

    /// A node that has just started looks whether KVM works, with a small guest that takes seconds of CPU time: they are
    /// no cost of the volume.
    fn wait_for_probes(&self) -> Result<()> {
        let deadline = Instant::now() + PROBE_TIME;
        while ["a/daemons", "b/daemons"].iter().any(|place| runs_guest(&self.cgroup.join(place))) {
            interrupt::check()?;
            ensure!(Instant::now() < deadline, "a node is still probing for KVM after {PROBE_TIME:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

fn runs_guest(group: &Path) -> bool {
    let pids = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    let mut names = pids.lines().map(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default());
    names.any(|name| name.starts_with("qemu"))
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Err(cause) = pollux(&["lab", "down"]) {
            eprintln!("bench: {cause:#}");
        }
    }
}

/// Runs the operator's command and returns what it printed.
fn pollux(args: &[&str]) -> Result<String> {
    let program = crate::target().join("release/pollux");
    let mut command = interrupt::out_of_reach(Command::new(&program));
    let output = command.args(args).stderr(Stdio::inherit()).output().with_context(|| program.display().to_string())?;
    ensure!(output.status.success(), "`pollux {}` failed", args.join(" "));
    Ok(String::from_utf8(output.stdout)?)
}
