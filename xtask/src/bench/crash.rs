//! What the death of a `blockd` costs a guest that writes all over a large volume: how long it waits, and how it fares until what
//! was being written is compared again.

use super::pair::{Pair, Volume};
use super::work::{STEADY_WRITE, Work};
use anyhow::Result;
use std::time::{Duration, Instant};

/// Before the death: long enough that the working set is hot.
const WORK_TIME: Duration = Duration::from_secs(6);
/// After it, once writing and once reading.
const LOOK_TIME: Duration = Duration::from_millis(1500);

const READ: Work = Work { name: "4k randread qd8", is_write: false, depth: 8, ..STEADY_WRITE };

pub struct Crash {
    /// From the death until a write was acknowledged, the new process's start included.
    pub write_ms: f64,
    /// The same until a read after it was answered.
    pub read_ms: f64,
    /// Of the writes, and then of the reads, that came next.
    pub iops: [f64; 2],
    pub p99_ms: [f64; 2],
    /// From the death until all was compared.
    pub settled_s: f64,
}

/// `node`: whose process dies, by its place.
pub fn measure(pair: &mut Pair, volume: &Volume, size_bytes: u64, node: usize) -> Result<Crash> {
    let write = STEADY_WRITE.on(size_bytes);
    pair.client(volume)?.run(&write, WORK_TIME, u64::MAX)?;
    let died = Instant::now();
    pair.restart(node, volume)?;
    let mut client = pair.client_when_served(volume)?;
    client.run(&Work { depth: 1, ..write }, Duration::MAX, 1)?;
    let write_ms = died.elapsed().as_secs_f64() * 1000.0;
    client.run(&Work { depth: 1, ..READ.on(size_bytes) }, Duration::MAX, 1)?;
    let read_ms = died.elapsed().as_secs_f64() * 1000.0;
    let (mut iops, mut p99_ms) = ([0.0; 2], [0.0; 2]);
    for (at, work) in [write, READ.on(size_bytes)].iter().enumerate() {
        let run = client.run(work, LOOK_TIME, u64::MAX)?;
        (iops[at], p99_ms[at]) = (run.iops(), run.percentile_us(99) / 1000.0);
    }
    pair.until_settled(volume)?;
    Ok(Crash { write_ms, read_ms, iops, p99_ms, settled_s: died.elapsed().as_secs_f64() })
}
