//! Control groups (version 2): they say what a set of processes has cost, and end it for certain.

use crate::interrupt;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// A killed process is gone in milliseconds; one stuck in the kernel is not worth waiting for any longer.
const EMPTY_WAIT: Duration = Duration::from_secs(5);

/// Where cgroup v2 is mounted.
pub fn root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mut mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    mounts
        .find(|mount| mount.get(2) == Some(&"cgroup2"))
        .map(|mount| PathBuf::from(mount[1]))
        .context("no cgroup v2 is mounted; mount one with `mount -t cgroup2 none /sys/fs/cgroup/unified`")
}

/// A group for the client and for `qemu-nbd`; gone when dropped, with all that runs in it.
pub struct Cgroup {
    pub dir: PathBuf,
}

impl Cgroup {
    pub fn new(dir: PathBuf) -> Result<Cgroup> {
        let cgroup = Cgroup { dir };
        // A run that was killed may have left it.
        cgroup.remove();
        fs::create_dir(&cgroup.dir)
            .with_context(|| format!("making the cgroup {} (root is needed)", cgroup.dir.display()))?;
        Ok(cgroup)
    }

    /// A command that runs in this cgroup from its first instruction.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("sh");
        let procs = self.dir.join("cgroup.procs");
        command.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(procs).arg(program);
        interrupt::out_of_reach(command)
    }

    fn remove(&self) {
        let _ = fs::write(self.dir.join("cgroup.kill"), "1");
        let deadline = Instant::now() + EMPTY_WAIT;
        while self.dir.exists() && fs::remove_dir(&self.dir).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        self.remove();
    }
}

/// CPU time spent so far in these groups and below, in microseconds.
pub fn cpu_us(dirs: &[&Path]) -> Result<f64> {
    let mut sum = 0.0;
    for dir in dirs {
        let text = fs::read_to_string(dir.join("cpu.stat")).with_context(|| format!("reading {}", dir.display()))?;
        let usage = text.lines().find_map(|line| line.strip_prefix("usage_usec ")).context("no usage_usec")?;
        sum += usage.trim().parse::<f64>()?;
    }
    Ok(sum)
}
