//! A replica that was away is brought up to date: what travels, how fast, and what the guests notice of it.

use super::client::{Client, Run};
use super::idle::pause;
use super::pair::{Pair, Volume};
use super::quiet::{COOLING_TIME, sent};
use super::work::{FILL, Work};
use anyhow::{Context, Result};
use serde::Serialize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// One resync.
#[derive(Clone, Serialize)]
pub struct Resync {
    pub changed_bytes: u64,
    /// Sent by the primary, the guests' own writes of the time included.
    pub sent_bytes: u64,
    /// From the start of node 2's `blockd` until there was something to compare with: it opens its pool.
    pub start_seconds: f64,
    /// From then on until node 2 had everything.
    pub seconds: f64,
    /// Of a guest that writes all the time, if there is one: before, and during the resync.
    pub p99_us: Option<[f64; 2]>,
    pub iops: Option<[f64; 2]>,
}

/// What is changed.
pub struct Case {
    pub name: &'static str,
    pub size_bytes: u64,
    pub changed_bytes: u64,
    /// Bytes of each change.
    pub piece: usize,
    /// Somebody writes meanwhile.
    pub has_guest: bool,
}

impl Resync {
    pub fn mib_per_s(&self) -> f64 {
        self.changed_bytes as f64 / self.seconds / f64::from(1 << 20)
    }

    pub fn traffic_ratio(&self) -> f64 {
        self.sent_bytes as f64 / self.changed_bytes as f64
    }
}

/// What a guest does meanwhile: 4 KiB writes, four under way, to the first GiB.
const GUEST: Work = Work {
    name: "4k randwrite qd4",
    is_write: true,
    is_random: true,
    block_bytes: 4096,
    depth: 4,
    flushes_each: false,
    span_bytes: 1 << 30,
};
/// For so long the guest is looked at before.
const GUEST_TIME: Duration = Duration::from_secs(3);
/// Pieces in which a guest's run is looked at while a resync goes on.
const GUEST_STEP: Duration = Duration::from_millis(200);

/// Node 2 is away while so much of the volume is changed, in pieces of this size all over it.
pub fn measure(pair: &mut Pair, volume: &mut Volume, case: &Case) -> Result<Resync> {
    let Case { size_bytes, changed_bytes, piece, has_guest, .. } = *case;
    // What was written a moment ago would be compared as well, and is not what is measured.
    pause(COOLING_TIME)?;
    let before = if has_guest { Some(guest(&mut pair.client(volume)?, GUEST_TIME)?) } else { None };
    pair.lose(volume)?;
    let mut client = pair.client(volume)?;
    let pieces = changed_bytes / piece as u64;
    // At even distances: random places would hit some twice.
    client.step(size_bytes / pieces / piece as u64 * piece as u64);
    let change = Work { block_bytes: piece, depth: 8, ..FILL.on(size_bytes) };
    client.run(&change, Duration::MAX, pieces)?;

    let is_over = AtomicBool::new(false);
    let mut guest_client = if has_guest { Some(pair.client(volume)?) } else { None };
    let (times, during) = std::thread::scope(|scope| {
        let is_over = &is_over;
        let writer = guest_client.as_mut().map(|client| {
            scope.spawn(move || {
                let mut seen = Run::default();
                while !is_over.load(Ordering::Relaxed) {
                    seen.add(guest(client, GUEST_STEP)?);
                }
                anyhow::Ok(seen)
            })
        });
        let times = resync(pair, volume);
        is_over.store(true, Ordering::Relaxed);
        let during = writer.map(|writer| writer.join().expect("the guest does not panic")).transpose();
        times.and_then(|times| Ok((times, during?)))
    })?;
    let sent_bytes = sent(pair)?[0];
    let both =
        |of: fn(&Run) -> f64| before.as_ref().zip(during.as_ref()).map(|(before, during)| [of(before), of(during)]);
    let p99_us = both(|run| run.percentile_us(99));
    let [start_seconds, seconds] = times.map(|time| time.as_secs_f64());
    Ok(Resync { changed_bytes, sent_bytes, start_seconds, seconds, p99_us, iops: both(Run::iops) })
}

/// How long node 2 takes to be there, and then to have everything.
fn resync(pair: &mut Pair, volume: &mut Volume) -> Result<[Duration; 2]> {
    let started = Instant::now();
    pair.give_back(volume)?;
    pair.until_resync_begins(volume)?;
    let began = Instant::now();
    pair.until_in_sync(volume)?;
    Ok([began - started, began.elapsed()])
}

fn guest(client: &mut Client, time: Duration) -> Result<Run> {
    client.run(&GUEST, time, u64::MAX).context("the guest's writes")
}
