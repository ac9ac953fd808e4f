//! The end of a demo: one line for people, the same and the time line as JSON.

use super::accident::{Kind, Takeover};
use super::{Demo, VM, operator};
use crate::failure::{Doing, Failure, Outcome};
use crate::lab::network;
use crate::lab::site::{Network, Site};
use pollux_api::Event;
use serde::Serialize;

/// One step that was played.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    pub title: String,
    pub seconds: f64,
    pub ok: bool,
}

#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub ok: bool,
    pub failure: Option<String>,
    pub steps: Vec<Step>,
    pub takeovers: Vec<Takeover>,
    /// The slowest of the takeovers after a death.
    pub summary: Option<Summary>,
    /// Milliseconds since the start, and what was seen or told.
    pub time_line: Vec<(u64, String)>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    pub detected_s: f64,
    pub granted_s: f64,
    pub io_back_s: f64,
    pub restarted_s: f64,
    pub guest_writing_s: f64,
    /// At the last takeover: what all runs before had acknowledged, and what the last found.
    pub acknowledged: u64,
    pub found: u64,
    /// Over all takeovers.
    pub lost: u64,
}

impl Report {
    pub(super) fn of(demo: &Demo, result: &Outcome) -> Report {
        let mut time_line = demo.record().map(|record| record.time_line(VM)).unwrap_or_default();
        // The cluster's own words, if it still answers.
        let events = operator::read::<Vec<Event>>(&["event", "list", "--limit", "1000"]).unwrap_or_default();
        for event in events {
            let at_ms = event.unix_ms.saturating_sub(demo.clock.start_unix_ms);
            time_line.push((at_ms, format!("{} {}: {}", event.subject.kind, event.subject.name, event.text)));
        }
        time_line.sort();
        Report {
            ok: result.is_ok(),
            failure: result.as_ref().err().map(|failure| failure.error.clone()),
            steps: demo.steps.clone(),
            takeovers: demo.takeovers.clone(),
            summary: summary(&demo.takeovers),
            time_line,
        }
    }

    pub fn line(&self) -> String {
        let Some(summary) = &self.summary else { return "demo: ok, but nothing was taken over".into() };
        format!(
            "demo: ok  detected {:.1} s  granted {:.1} s  I/O back {:.1} s  restarted {:.1} s  guest writing {:.1} s  \
             acknowledged {}  found {}  lost {}",
            summary.detected_s,
            summary.granted_s,
            summary.io_back_s,
            summary.restarted_s,
            summary.guest_writing_s,
            summary.acknowledged,
            summary.found,
            summary.lost
        )
    }
}

fn summary(takeovers: &[Takeover]) -> Option<Summary> {
    let last = takeovers.last()?;
    let slowest = |figure: fn(&Takeover) -> Option<f64>| {
        takeovers.iter().filter(|takeover| takeover.kind == Kind::Pull).filter_map(figure).fold(0.0, f64::max)
    };
    Some(Summary {
        detected_s: slowest(|takeover| takeover.figures.detected),
        granted_s: slowest(|takeover| takeover.figures.granted),
        io_back_s: slowest(|takeover| takeover.figures.io_back),
        restarted_s: slowest(|takeover| takeover.figures.restarted),
        guest_writing_s: slowest(|takeover| takeover.figures.guest_writing),
        acknowledged: last.acknowledged,
        found: last.found,
        lost: takeovers.iter().map(Takeover::lost_writes).sum(),
    })
}

/// Bytes that go to a node over its storage cable, counted by the switch.
pub struct CableCounter {
    port: String,
    before: u64,
}

impl CableCounter {
    pub fn of(site: &Site, node: &str) -> Outcome<CableCounter> {
        let node = site.node(node).ok_or_else(|| Failure::other(format!("no node {node}")))?;
        let port = node.cable(Network::Storage);
        Ok(CableCounter { before: network::sent_bytes(&port)?, port })
    }
    pub fn bytes_since(&self) -> Outcome<u64> {
        network::sent_bytes(&self.port).map(|now| now.saturating_sub(self.before)).doing("cannot count at the cable")
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::Figures;
    use super::*;

    fn takeover(kind: Kind, restarted: f64, acknowledged: u64, found: u64) -> Takeover {
        let figures = Figures {
            detected: Some(1.0),
            granted: Some(1.1),
            io_back: Some(1.6),
            restarted: Some(restarted),
            guest_writing: Some(6.4),
        };
        Takeover { kind, lost: "a".into(), survivor: "b".into(), at_ms: 0, figures, acknowledged, found }
    }

    #[test]
    fn the_last_line_tells_the_slowest_takeover_after_a_death_and_every_lost_write() {
        let takeovers = [
            takeover(Kind::Pull, 2.9, 300, 300),
            takeover(Kind::Pull, 2.1, 600, 598),
            takeover(Kind::Cut, 7.0, 812, 812),
        ];
        let report = Report {
            ok: true,
            failure: None,
            steps: Vec::new(),
            summary: summary(&takeovers),
            takeovers: takeovers.to_vec(),
            time_line: Vec::new(),
        };
        assert_eq!(
            report.line(),
            "demo: ok  detected 1.0 s  granted 1.1 s  I/O back 1.6 s  restarted 2.9 s  guest writing 6.4 s  \
             acknowledged 812  found 812  lost 2"
        );
    }
}
