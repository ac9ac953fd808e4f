//! Looking at a pool's disks from outside, without writing to them: is everything right (`verify`), and what can still be had
//! (`rescue`)?
//!
//! Reads the same bytes by the same functions as an opening does, but goes on behind what an opening refuses. Never panics,
//! whatever the bytes are.

mod blocks;
mod code;
mod inspect;
mod members;
mod online;
mod rescue;
#[cfg(test)]
mod tests;

pub use code::{Code, Severity};
pub(crate) use online::Looking;
pub use online::{Looked, Piece};
pub use rescue::{Export, Rescue, RescuedVolume};

use crate::faulty_disk::FaultyDisk;
use inspect::Inspected;
use pollux_base::{ByteCount, Data};
use serde::{Serialize, Serializer};
use std::collections::BTreeMap;

/// A disk that is only read.
pub trait ReadDisk {
    fn size(&self) -> ByteCount;
    /// `None`: it cannot be read there. Offset and length are multiples of a block.
    fn read(&mut self, offset: ByteCount, len: usize) -> Option<Data>;
}

impl ReadDisk for FaultyDisk {
    fn size(&self) -> ByteCount {
        ByteCount(FaultyDisk::size(self))
    }
    fn read(&mut self, offset: ByteCount, len: usize) -> Option<Data> {
        let end = offset.0.checked_add(len as u64)?;
        (end <= FaultyDisk::size(self)).then(|| Data::copy_of(&self.read_now(offset.0, len)))
    }
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub code: Code,
    pub severity: Severity,
    /// Of the disks that were given, from 0 on.
    pub disk: Option<usize>,
    pub what: String,
    pub fix: &'static str,
}

impl Finding {
    fn new(code: Code, what: impl Into<String>) -> Finding {
        Finding { code, severity: code.severity(), disk: None, what: what.into(), fix: code.fix() }
    }
}

impl Serialize for Code {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.text())
    }
}

/// Findings of one code that are told one by one. A disk that is broken has millions of them, and a human reads a page.
pub const TOLD_MAX: u64 = 50;

#[derive(Default)]
pub(crate) struct Findings {
    told: Vec<Finding>,
    counts: BTreeMap<Code, u64>,
    disk: Option<usize>,
}

impl Findings {
    pub(crate) fn add(&mut self, code: Code, what: impl Into<String>) {
        let count = self.counts.entry(code).or_default();
        *count += 1;
        if *count <= TOLD_MAX {
            self.told.push(Finding { disk: self.disk, ..Finding::new(code, what) });
        }
    }
}

/// What there is in a pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    pub disks: u64,
    pub volumes: u64,
    pub extents: u64,
    pub used_bytes: u64,
    pub free_bytes: u64,
    /// Blocks of data that match their checksums.
    pub checked_blocks: u64,
    /// Blocks that were being written when the pool was last in use: their checksums were in memory only. They are compared with
    /// the other servers.
    pub hot_blocks: u64,
}

/// The outcome of a verification.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verified {
    /// By code, and of one code as they were found.
    pub findings: Vec<Finding>,
    /// How many there are of each code; of many not all are told.
    pub counts: BTreeMap<Code, u64>,
    pub pool: Counts,
}

/// How far the reading of data has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    pub done: ByteCount,
    pub total: ByteCount,
}

/// Checks the disks of one pool: all that is said about its data, and with `data` the data itself.
pub fn verify(disks: &mut [&mut dyn ReadDisk], data: bool, progress: &mut dyn FnMut(Progress)) -> Verified {
    let mut findings = Findings::default();
    let inspected = inspect_all(disks, &mut findings);
    members::check(&inspected, &mut findings);
    let mut counts = Counts { disks: disks.len() as u64, ..Counts::default() };
    counts.volumes = inspected.iter().flatten().map(|disk| disk.found.catalog.volumes.len() as u64).max().unwrap_or(0);
    let total = inspected.iter().flatten().map(|disk| disk.data_bytes().0).sum();
    let mut watch = Watch { progress: Progress { done: ByteCount(0), total: ByteCount(total) }, tell: progress };
    for (number, (disk, known)) in disks.iter_mut().zip(&inspected).enumerate() {
        findings.disk = Some(number);
        if let Some(known) = known {
            known.check_blocks(*disk, data, &mut findings, &mut counts, &mut watch);
        }
    }
    findings.told.sort_by_key(|finding| finding.code);
    Verified { findings: findings.told, counts: findings.counts, pool: counts }
}

fn inspect_all(disks: &mut [&mut dyn ReadDisk], findings: &mut Findings) -> Vec<Option<Inspected>> {
    let mut inspected = Vec::new();
    for (number, disk) in disks.iter_mut().enumerate() {
        findings.disk = Some(number);
        // Another disk knows the same volumes.
        let spare = members::ahead(&inspected).cloned();
        inspected.push(Inspected::of(*disk, spare, findings));
    }
    findings.disk = None;
    inspected
}

/// Who is told of progress.
pub(crate) struct Watch<'a> {
    progress: Progress,
    tell: &'a mut dyn FnMut(Progress),
}

impl Watch<'_> {
    pub(crate) fn advance(&mut self, bytes: u64) {
        self.progress.done.0 += bytes;
        (self.tell)(self.progress);
    }
}
