//! The metadata of this node's pool, verified while it is used: disk by disk and piece by piece (`pollux_store::verify`), with
//! rests between the pieces, so that guests do not notice. At most one run at a time.

use crate::data_plane::DataPlane;
use crate::image::OPENINGS;
use crate::node::Purpose;
use pollux_base::pool::{VerifyFinding, VerifyReport};
use pollux_base::{DiskId, DiskIndex, Instant, Report};
use pollux_store::verify::{Looked, Piece, Severity, TOLD_MAX};
use pollux_store::{StoreError, StoreOp, StoreReply};
use std::collections::VecDeque;
use std::time::Duration;

/// A piece that takes no time (memory is looked at) is followed by a rest all the same.
const REST_MIN: Duration = Duration::from_millis(1);
/// How often it is told how far it is.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// A run.
#[derive(Debug)]
pub(crate) struct Verifying {
    report: VerifyReport,
    /// Disks still to be looked at; the first is being looked at.
    left: VecDeque<(DiskIndex, DiskId)>,
    piece: Piece,
    /// Since when a piece is being read.
    asked: Option<Instant>,
    next: Instant,
    told: Instant,
    /// The piece under way was asked for by a run that was given up.
    begins_anew: bool,
}

impl Verifying {
    /// When it is to be gone on with.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.asked.is_none().then_some(self.next)
    }
}

impl DataPlane {
    pub(crate) fn on_verify_order(&mut self, id: u64) {
        let now = self.node.now;
        let report = VerifyReport { id, ..VerifyReport::default() };
        if let Some(reason) = self.node.pool_failed.clone() {
            let text = format!("the pool is out of use: {reason}");
            return self.end_verifying(VerifyReport { failed: Some(text), ..report });
        }
        let asked = self.verifying.take().and_then(|verifying| verifying.asked);
        let left = self.node.store.in_use().collect();
        let (piece, begins_anew) = (Piece::default(), asked.is_some());
        self.verifying = Some(Verifying { report, left, piece, asked, next: now, told: now, begins_anew });
        self.step_verifying();
    }

    fn end_verifying(&mut self, report: VerifyReport) {
        self.verifying = None;
        self.node.report(Report::Verified(Box::new(VerifyReport { is_done: true, permille: 1000, ..report })));
    }

    /// Asks for the next piece if it is time.
    pub(crate) fn step_verifying(&mut self) {
        let now = self.node.now;
        let Some(verifying) = self.verifying.as_mut().filter(|it| it.due().is_some_and(|due| due <= now)) else {
            return;
        };
        let Some((disk, _)) = verifying.left.front().copied() else {
            let report = verifying.report.clone();
            return self.end_verifying(report);
        };
        verifying.asked = Some(now);
        let piece = verifying.piece;
        self.node.request(OPENINGS, Purpose::Look, StoreOp::Look { disk, piece });
    }

    pub(crate) fn on_looked(&mut self, result: Result<StoreReply, StoreError>) {
        let now = self.node.now;
        let Some(verifying) = &mut self.verifying else { return };
        let took = now.since(verifying.asked.take().unwrap_or(now));
        verifying.next = now + self.node.pace.rest(now, took).max(REST_MIN);
        if std::mem::take(&mut verifying.begins_anew) {
            return;
        }
        let is_there = |(disk, _): &(DiskIndex, DiskId)| self.node.store.in_use().any(|(known, _)| known == *disk);
        match result {
            Ok(StoreReply::Looked(looked)) if verifying.left.front().is_some_and(is_there) => {
                let id = verifying.left.front().map(|(_, id)| *id);
                let path = self.node.store.disks().into_iter().find(|disk| Some(disk.disk) == id);
                verifying.take(*looked, &path.map_or_else(String::new, |disk| disk.path));
            }
            // The disk has left meanwhile: what is on it now is no pool's.
            Ok(_) | Err(StoreError::NoVolume) => verifying.go_on(),
            Err(error) => {
                let report = VerifyReport { failed: Some(error.to_string()), ..verifying.report.clone() };
                return self.end_verifying(report);
            }
        }
        if now >= verifying.told + TELL_EVERY {
            verifying.told = now;
            let report = verifying.report.clone();
            self.node.report(Report::Verified(Box::new(report)));
        }
    }
}

impl Verifying {
    fn take(&mut self, looked: Looked, path: &str) {
        let report = &mut self.report;
        for finding in looked.findings {
            let count = report.counts.entry(finding.code.text().to_string()).or_default();
            *count += 1;
            if *count <= TOLD_MAX {
                report.findings.push(VerifyFinding {
                    code: finding.code.text().to_string(),
                    is_error: finding.severity == Severity::Error,
                    disk: path.to_string(),
                    what: finding.what,
                    fix: finding.fix.to_string(),
                });
            }
        }
        let all = report.disks + self.left.len() as u64;
        report.permille = ((report.disks * 1000 + u64::from(looked.permille)) / all.max(1)) as u32;
        if let Some(counts) = looked.counts {
            report.disks += 1;
            report.volumes = report.volumes.max(counts.volumes);
            report.extents += counts.extents;
        }
        match looked.next {
            Some(next) => self.piece = next,
            None => self.go_on(),
        }
    }

    /// To the next disk.
    fn go_on(&mut self) {
        self.left.pop_front();
        self.piece = Piece::default();
    }
}
