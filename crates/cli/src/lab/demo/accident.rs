//! An accident and what must follow from it: one survivor, every acknowledged write, and never two runs at once.

use super::record::{Figures, Record};
use super::{BOOT_WAIT, Demo, VM, check, operator};
use crate::failure::Outcome;
use crate::lab::site::Site;
use pollux_base::timing;
use serde::Serialize;
use std::time::Duration;

/// The isolated node's guest ends when its guard's lease does, counted from the last heartbeat that was answered: it
/// may be a few heartbeats older than the cut, and the observer looks only so often.
const LEASE_SLACK: Duration = Duration::from_millis(700);
/// The promise for a node that dies where there is a power switch, and where there is none.
const RESTART_FENCED: Duration = Duration::from_secs(5);
const RESTART_UNFENCED: Duration = Duration::from_secs(15);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The node's plug is pulled; its power switch stays.
    Pull,
    /// Every link of the node and of its power switch is cut; the node lives on.
    Cut,
}

pub struct Accident {
    kind: Kind,
    lost: String,
    survivor: String,
}

/// How it went.
#[derive(Clone, Debug, Serialize)]
pub struct Takeover {
    pub kind: Kind,
    pub lost: String,
    pub survivor: String,
    pub at_ms: u64,
    pub figures: Figures,
    /// Highest number acknowledged by any run before the takeover.
    pub acknowledged: u64,
    /// What the new run found.
    pub found: u64,
}

impl Takeover {
    pub fn lost_writes(&self) -> u64 {
        self.acknowledged.saturating_sub(self.found)
    }
}

impl Accident {
    pub fn pull(lost: &str, survivor: &str) -> Accident {
        Accident { kind: Kind::Pull, lost: lost.into(), survivor: survivor.into() }
    }
    pub fn cut(lost: &str, survivor: &str) -> Accident {
        Accident { kind: Kind::Cut, lost: lost.into(), survivor: survivor.into() }
    }

    /// Lets it happen and waits until the guest writes again on the survivor.
    pub fn happen(&self, demo: &Demo, site: &Site) -> Outcome<Takeover> {
        let (lost, survivor) = (self.lost.as_str(), self.survivor.as_str());
        check(site.node(lost).is_some() && site.node(survivor).is_some(), || "no such nodes".into())?;
        let at_ms = demo.clock.now_ms();
        let power = format!("{lost}:power");
        operator::type_in(&match self.kind {
            Kind::Pull => vec!["lab", "pull", lost],
            Kind::Cut => vec!["lab", "cut", lost, &power],
        })?;
        let found = demo.wait(&format!("{VM} is back on {survivor}"), BOOT_WAIT, |record| {
            record.run_since(survivor, at_ms).filter(|run| run.first_ack_ms.is_some()).map(|run| run.found)
        })?;
        // The figures come from looks at the API, which may lag behind the console by a moment.
        let figures =
            demo.wait(&format!("{survivor} shows the whole takeover"), Duration::from_secs(10), |record| {
                let figures = record.figures(VM, lost, survivor, at_ms);
                (figures.detected.is_some() && figures.granted.is_some() && figures.io_back.is_some())
                    .then_some(figures)
                    .filter(|figures| figures.restarted.is_some())
            })?;
        let record = demo.record()?;
        let acknowledged = acknowledged_before(&record, survivor, at_ms);
        drop(record);
        let takeover = Takeover {
            kind: self.kind,
            lost: lost.into(),
            survivor: survivor.into(),
            at_ms,
            figures,
            acknowledged,
            found,
        };
        demo.note(&takeover.line());
        self.judge(&takeover, &*demo.record()?)?;
        Ok(takeover)
    }

    fn judge(&self, takeover: &Takeover, record: &Record) -> Outcome {
        check(takeover.lost_writes() == 0, || {
            format!("{} writes were acknowledged, but {} were found", takeover.acknowledged, takeover.found)
        })?;
        check(record.overlaps.is_empty(), || format!("two QEMUs ran {VM} at once: {:?}", record.overlaps))?;
        let ended = record.qemus.iter().rev().find(|qemu| qemu.node == self.lost).and_then(|qemu| qemu.ended_ms);
        let started = record.qemu_since(&self.survivor, takeover.at_ms).map(|qemu| qemu.started_ms);
        let (Some(ended), Some(started)) = (ended, started) else {
            return check(false, || format!("the QEMUs of {VM} were not seen to end and start"));
        };
        check(ended <= started, || {
            format!("{} started {VM} {} ms before it had ended on {}", self.survivor, ended - started, self.lost)
        })?;
        let limit = match self.kind {
            Kind::Pull => RESTART_FENCED,
            Kind::Cut => {
                let lived = Duration::from_millis(ended.saturating_sub(takeover.at_ms));
                let earliest = timing::GUARD_LEASE - LEASE_SLACK;
                let latest = timing::GUARD_LEASE + timing::GUARD_KILL;
                check(lived >= earliest && lived <= latest, || {
                    format!("the isolated guest lived {lived:?}, not {earliest:?} to {latest:?} (its guard's lease)")
                })?;
                RESTART_UNFENCED
            }
        };
        let took = takeover.figures.restarted.unwrap_or(f64::MAX);
        check(took <= limit.as_secs_f64(), || format!("{VM} was restarted after {took:.1} s, promised are {limit:?}"))
    }
}

/// What all runs before the survivor's have acknowledged.
fn acknowledged_before(record: &Record, survivor: &str, at_ms: u64) -> u64 {
    let is_new = |run: &&super::record::Run| !(run.node == survivor && run.found_ms >= at_ms);
    record.runs.iter().filter(is_new).filter_map(|run| run.last_ack).max().unwrap_or(0)
}

impl Takeover {
    fn line(&self) -> String {
        let at = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.1} s"));
        format!(
            "detected {}  granted {}  I/O back {}  restarted {}  guest writing {}  acknowledged {}  found {}  lost {}",
            at(self.figures.detected),
            at(self.figures.granted),
            at(self.figures.io_back),
            at(self.figures.restarted),
            at(self.figures.guest_writing),
            self.acknowledged,
            self.found,
            self.lost_writes()
        )
    }
}
