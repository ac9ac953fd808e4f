//! A lab of two nodes with one volume.

use crate::interrupt;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What a pool needs beside the volume: tables, journal, and some air.
const POOL_EXTRA_MIB: u64 = 1024;

/// Taken down when dropped.
pub struct Lab {
    /// Where the volume is served.
    pub uri: String,
    /// The group of the whole site.
    pub cgroup: PathBuf,
}

impl Lab {
    /// Builds the site in `scratch`, so that its pools lie on the same file system as the plain file.
    pub fn up(scratch: &Path, size_mib: u64) -> Result<Lab> {
        let pool = format!("{}M", size_mib + POOL_EXTRA_MIB);
        let dir = scratch.join("lab");
        pollux(&["lab", "up", "--pool-size", &pool, "--dir", &dir.to_string_lossy()])?;
        let mut lab = Lab { uri: String::new(), cgroup: super::cgroup::root()?.join("pollux-lab") };
        interrupt::check()?;
        pollux(&["volume", "create", "bench", "--size", &format!("{size_mib}M")])?;
        lab.uri = own_socket()?;
        Ok(lab)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Err(cause) = pollux(&["lab", "down"]) {
            eprintln!("bench: {cause:#}");
        }
    }
}

/// The unix socket of the node that serves the volume.
fn own_socket() -> Result<String> {
    let groups: Value = serde_json::from_str(&pollux(&["status", "-o", "json"])?).context("status")?;
    let group = groups["groups"].as_array().into_iter().flatten().find(|group| group["name"] == "bench");
    let primary = group.and_then(|group| group["primary"].as_str()).context("the volume has no primary")?;
    let uris: Vec<String> =
        serde_json::from_str(&pollux(&["volume", "export", "bench", "--nbd", "-o", "json"])?).context("export")?;
    let is_own = |uri: &&String| uri.starts_with("nbd+unix") && uri.contains(&format!("/{primary}/"));
    uris.iter().find(is_own).cloned().with_context(|| format!("no unix socket of node {primary} among {uris:?}"))
}

/// Runs the operator's command and returns what it printed.
fn pollux(args: &[&str]) -> Result<String> {
    let program = crate::target().join("release/pollux");
    let mut command = interrupt::out_of_reach(Command::new(&program));
    let output = command.args(args).stderr(Stdio::inherit()).output().with_context(|| program.display().to_string())?;
    ensure!(output.status.success(), "`pollux {}` failed", args.join(" "));
    Ok(String::from_utf8(output.stdout)?)
}
