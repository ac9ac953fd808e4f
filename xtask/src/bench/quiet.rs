//! What a pair costs that has nothing to do, and the memory that it takes.

use super::idle::{pause, process};
use super::pair::Pair;
use anyhow::{Context, Result};
use std::process::Command;
use std::time::{Duration, Instant};

/// After the last write extents cool for some seconds; idle is a pair on which that is over.
pub const COOLING_TIME: Duration = Duration::from_secs(15);
const WATCH_TIME: Duration = Duration::from_secs(20);

/// By node.
pub struct Quiet {
    /// Of one processor.
    pub cpu_percent: [f64; 2],
    pub wakeups_per_s: [f64; 2],
    /// Sent to the peer.
    pub bytes_per_s: [f64; 2],
    pub memory_mib: [f64; 2],
}

/// Waits until the pair is idle, then looks twice.
pub fn watch(pair: &Pair) -> Result<Quiet> {
    eprintln!("bench: waiting for the pair to be idle, then watching it for {} s", WATCH_TIME.as_secs());
    pause(COOLING_TIME)?;
    let look = || anyhow::Ok((both(pair)?, sent(pair)?, Instant::now()));
    let before = look()?;
    pause(WATCH_TIME)?;
    let after = look()?;
    let seconds = (after.2 - before.2).as_secs_f64();
    let per_s = |before: u64, after: u64| after.saturating_sub(before) as f64 / seconds;
    Ok(Quiet {
        cpu_percent: [0, 1].map(|node| per_s(before.0[node].cpu_ns, after.0[node].cpu_ns) / 1e7),
        wakeups_per_s: [0, 1].map(|node| per_s(before.0[node].wakeups, after.0[node].wakeups)),
        bytes_per_s: [0, 1].map(|node| per_s(before.1[node], after.1[node])),
        memory_mib: memory_mib(pair)?,
    })
}

/// Resident memory of either node.
pub fn memory_mib(pair: &Pair) -> Result<[f64; 2]> {
    Ok(both(pair)?.map(|node| node.resident_kib as f64 / 1024.0))
}

fn both(pair: &Pair) -> Result<[super::idle::Running; 2]> {
    Ok([process("1", pair.nodes[0].blockd.pid())?, process("2", pair.nodes[1].blockd.pid())?])
}

/// Bytes that the two ends of the replication link have sent so far: the end that dialled (node 1) first.
pub fn sent(pair: &Pair) -> Result<[u64; 2]> {
    let port = pair.nodes[1].replication_port();
    let of = |end: &str| {
        let output = Command::new("ss").args(["-Htin", "state", "established", &format!("{end} = :{port}")]).output();
        let output = output.context("starting ss")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let sent = text.split_whitespace().filter_map(|word| word.strip_prefix("bytes_sent:")?.parse::<u64>().ok());
        anyhow::Ok(sent.sum())
    };
    Ok([of("dport")?, of("sport")?])
}
