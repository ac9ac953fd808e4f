//! Scrubs: when a group's replicas are read and compared, and what came of it.
//!
//! A wish for a scrub is in the log, by a user or because one is due; the node of the group's primary orders it and has
//! the result written down. Bad blocks that a data plane found, whatever it was doing, become events, each once. The wall
//! clock says when a scrub is due: if it jumps one comes too early or too late, and nothing else.

use crate::core::Cluster;
use crate::entry::Change;
use crate::seam::Output;
use crate::state::{Group, State};
use pollux_base::order::{Finding, FindingKind, FoundBy, ScrubReport};
use pollux_base::unit::{BLOCK_BYTES, bytes_text};
use pollux_base::{GroupId, Instant, NodeId, Order, Stamp};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// How often a group is scrubbed by itself, unless its user says otherwise: disks lose some block in months, not days, and
/// what both copies lose in one week is lost.
pub const SCRUB_EVERY_DAYS: u32 = 7;
const DAY_MS: u64 = 24 * 3600 * 1000;

/// When the replicas of a group were scrubbed, and when they are to be again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scrubs {
    /// Number of the newest wish; 0: there was none.
    pub wanted: u64,
    /// 0: only when somebody asks.
    pub every_days: u32,
    /// What `every_days` counts from: the end of the last, or the group's birth.
    pub since_unix_ms: u64,
    pub last: Option<ScrubDone>,
    /// Newest finding of each node that was told: its boot and number.
    pub told: BTreeMap<NodeId, (u32, u64)>,
}

/// How a scrub ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubDone {
    pub unix_ms: u64,
    pub report: ScrubReport,
}

impl Scrubs {
    /// Of a group that is born.
    pub fn born(unix_ms: u64) -> Scrubs {
        Scrubs { every_days: SCRUB_EVERY_DAYS, since_unix_ms: unix_ms, ..Scrubs::default() }
    }

    /// Whether a scrub is wanted that has not ended.
    pub fn is_wanted(&self) -> bool {
        self.wanted != self.last.as_ref().map_or(0, |last| last.report.id)
    }

    fn due_unix_ms(&self) -> Option<u64> {
        let is_due = self.every_days > 0 && !self.is_wanted();
        is_due.then(|| self.since_unix_ms.saturating_add(u64::from(self.every_days) * DAY_MS))
    }
}

/// Orders given on this connection to the data plane: the wish, and the record under which its node was told.
pub(crate) type SentScrubs = BTreeMap<GroupId, (u64, Stamp)>;

impl Cluster {
    pub(crate) fn reconcile_scrubs(&mut self, now: Instant) {
        let me = self.me;
        let unix_ms = self.unix_ms(now);
        let mut changes = Vec::new();
        let mut wakes = Vec::new();
        for (id, group) in self.state.groups.iter().filter(|(_, group)| group.record.primary == me) {
            match group.scrubs.due_unix_ms() {
                Some(due) if due <= unix_ms => {
                    let expect = Some(group.scrubs.wanted);
                    changes.push((("scrub", id.0, group.scrubs.wanted), Change::ScrubGroup { group: *id, expect }));
                }
                Some(due) => wakes.push(now + Duration::from_millis(due - unix_ms)),
                None => {}
            }
        }
        for report in self.group_reports() {
            let Some(group) = self.state.groups.get(&report.group) else { continue };
            if let Some(done) = report.scrub.as_ref().filter(|done| done.is_done && done.id == group.scrubs.wanted)
                && group.scrubs.is_wanted()
            {
                let change = Change::Scrubbed { group: report.group, report: done.clone() };
                changes.push((("scrubbed", report.group.0, done.id), change));
            }
            let told = group.scrubs.told.get(&me);
            for found in &report.findings {
                if told.is_none_or(|(boot, number)| *boot != found.boot || *number < found.number) {
                    let change = Change::Found { group: report.group, finding: found.clone() };
                    changes.push((("found", report.group.0, found.number), change));
                }
            }
        }
        for (key, change) in changes {
            self.propose(now, key, change);
        }
        for at in wakes {
            self.wake_at(at);
        }
    }

    /// Orders the scrubs that are wanted of groups whose primary is here.
    pub(crate) fn order_scrubs(&mut self) {
        let wanted = self.state.groups.iter().filter(|(_, group)| group.record.primary == self.me);
        let wanted: Vec<(GroupId, u64, Stamp)> = wanted
            .filter(|(_, group)| group.scrubs.is_wanted())
            .map(|(id, group)| (*id, group.scrubs.wanted, group.record.stamp))
            .collect();
        for (group, scrub, stamp) in wanted {
            if self.groups.sent_scrubs().insert(group, (scrub, stamp)) != Some((scrub, stamp)) {
                self.output(Output::Data(Order::Scrub { group, scrub }));
            }
        }
    }
}

impl State {
    /// What a finding says to people.
    pub(crate) fn finding_text(&self, finding: &Finding) -> String {
        let volume = self.volumes.get(&finding.volume).map_or_else(|| finding.volume.to_string(), |v| v.name.clone());
        let (blocks, at) = (finding.range.count.0, finding.range.start.0 * BLOCK_BYTES);
        let node = self.node_name(finding.node);
        let (what, by) = match (finding.kind, finding.by) {
            (FindingKind::Rot, FoundBy::Read) => ("did not match their checksums", "a read"),
            (FindingKind::Rot, FoundBy::Resync) => ("did not match their checksums", "a resync"),
            (FindingKind::Rot, FoundBy::Scrub) => ("did not match their checksums", "a scrub"),
            (FindingKind::Difference, _) => ("were not what the primary holds", "a scrub"),
        };
        let end = match finding.healed {
            true => "healed from a good copy",
            false => "no good copy is left; they can not be read until they are written anew",
        };
        format!("{blocks} blocks of volume `{volume}` at byte {at} {what} on `{node}`, found by {by}: {end}")
    }

    /// What a scrub found, for people.
    pub fn scrubbed_text(&self, report: &ScrubReport) -> String {
        let names: Vec<String> = report.replicas.iter().map(|node| format!("`{}`", self.node_name(*node))).collect();
        let read = format!("a scrub has read {} on {}", bytes_text(report.checked_bytes), names.join(" and "));
        match report.rotten_blocks + report.differing_blocks {
            0 => format!("{read}: all is well"),
            _ => format!(
                "{read}: {} blocks did not match their checksums, {} differed; {} were healed, {} are lost",
                report.rotten_blocks, report.differing_blocks, report.healed_blocks, report.lost_blocks
            ),
        }
    }

    /// Writes down that a scrub is wanted; whether that is news. `number` was never given before.
    pub(crate) fn want_scrub(&mut self, group: GroupId, expect: Option<u64>, number: u64) -> bool {
        let Some(found) = self.groups.get_mut(&group) else { return false };
        let is_new = !found.scrubs.is_wanted() && expect.is_none_or(|expect| expect == found.scrubs.wanted);
        if is_new {
            found.scrubs.wanted = number;
        }
        is_new
    }

    /// Writes down how a scrub ended; whether that is news.
    pub(crate) fn end_scrub(&mut self, group: GroupId, unix_ms: u64, report: &ScrubReport) -> bool {
        let Some(Group { scrubs, .. }) = self.groups.get_mut(&group) else { return false };
        let is_news = scrubs.is_wanted() && scrubs.wanted == report.id;
        if is_news {
            scrubs.since_unix_ms = unix_ms;
            scrubs.last = Some(ScrubDone { unix_ms, report: report.clone() });
        }
        is_news
    }

    /// Writes down that a finding of a node was told; whether it had not been.
    pub(crate) fn tell_finding(&mut self, by: NodeId, group: GroupId, finding: &Finding) -> bool {
        let Some(Group { scrubs, .. }) = self.groups.get_mut(&group) else { return false };
        let is_news =
            scrubs.told.get(&by).is_none_or(|(boot, number)| *boot != finding.boot || *number < finding.number);
        if is_news {
            scrubs.told.insert(by, (finding.boot, finding.number));
        }
        is_news
    }
}
