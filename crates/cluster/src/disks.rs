//! Disks of pools: a human's commands on their way to this node's data plane, and what people hear of disks.

use crate::Alert;
use crate::core::Cluster;
use crate::entry::{Change, Subject};
use crate::seam::{Answer, Output, Refusal};
use pollux_base::order::DiskCommand;
use pollux_base::pool::{DiskReport, DiskState, PoolReport, VerifyReport};
use pollux_base::{Instant, NodeId, Order};
use std::collections::BTreeMap;

/// What was done by command and is not yet in the log; the oldest is given up. Humans are slower.
const NEWS_MAX: usize = 32;

#[derive(Default)]
pub(crate) struct DiskCommands {
    /// Commands that the data plane has not answered, and what is told when they are done.
    asked: BTreeMap<u64, String>,
    /// What was done, and the newest event before.
    news: Vec<(u64, String)>,
}

impl Cluster {
    /// A command about this node's pool. `accepts_loss`: a human has heard that no other replica has what may be lost.
    pub(crate) fn on_disk_command(&mut self, request: u64, command: DiskCommand, accepts_loss: bool) {
        let refusal = match &command {
            _ if !self.groups.is_connected => {
                Some(Refusal::Conflict("this node's data plane does not run; ask again in a moment".into()))
            }
            DiskCommand::LetGo { .. } if !accepts_loss => self.refuse_loss(),
            _ => None,
        };
        if let Some(refusal) = refusal {
            return self.output(Output::Answer { request, result: Err(refusal) });
        }
        let text = self.command_text(&command);
        self.ask_disks(request, text, Order::Disk { id: request, change: command });
    }

    /// Orders what a human wants done to this node's pool; `text` is told when it is.
    pub(crate) fn ask_disks(&mut self, request: u64, text: String, order: Order) {
        self.groups.disk_commands.asked.insert(request, text);
        self.output(Output::Data(order));
    }

    /// What is on a disk that is let go must be in sync elsewhere.
    fn refuse_loss(&self) -> Option<Refusal> {
        if !self.may_act() {
            let text = "whether other nodes have what was on the disk is not known while this node can not decide";
            return Some(Refusal::NoQuorum(text.into()));
        }
        let is_only = |group: &&crate::state::Group| group.record.in_sync.iter().all(|node| *node == self.me);
        let only: Vec<String> = self.state.groups.values().filter(is_only).map(|g| self.state.group_name(g)).collect();
        (!only.is_empty()).then(|| {
            let text = format!(
                "no other node has all that was written to {}: what was on the disk would be lost",
                only.join(", ")
            );
            Refusal::Unsafe(text)
        })
    }

    pub(crate) fn on_verify(&mut self, request: u64) {
        if !self.groups.is_connected {
            let text = "this node's data plane does not run; with it stopped, `pollux pool verify` looks at the disks on the server \
                        itself";
            return self.output(Output::Answer { request, result: Err(Refusal::Conflict(text.into())) });
        }
        self.groups.verified = Some(VerifyReport { id: request, ..VerifyReport::default() });
        self.output(Output::Data(Order::Verify { id: request }));
        self.output(Output::Answer { request, result: Ok(Answer::Created { id: request }) });
    }

    /// Of a run that nobody asked for any more nothing is kept.
    pub(crate) fn on_verified(&mut self, report: VerifyReport) {
        if let Some(known) = self.groups.verified.as_mut().filter(|known| known.id == report.id) {
            *known = report;
        }
    }

    /// How far the verification of this node's pool is that was asked for last, since its data plane is connected.
    pub fn verified(&self) -> Option<&VerifyReport> {
        self.groups.verified.as_ref()
    }

    fn command_text(&self, command: &DiskCommand) -> String {
        let pool = format!("the pool on `{}`", self.name_of(self.me));
        let disks = self.groups.pool.iter().flat_map(|pool| &pool.disks);
        let paths: BTreeMap<_, &str> = disks.map(|disk| (disk.disk, disk.path.as_str())).collect();
        let name = |disk| format!("disk {disk} ({})", paths.get(disk).copied().unwrap_or("?"));
        match command {
            DiskCommand::Add { path, .. } => format!("{} joined {pool}", path.display()),
            DiskCommand::Drain { disk } => format!("{} of {pool} is being drained", name(disk)),
            DiskCommand::Undrain { disk } => format!("{} of {pool} is not drained any more", name(disk)),
            DiskCommand::Remove { disk } => format!("{} was removed from {pool}", name(disk)),
            DiskCommand::LetGo { disk } => format!("{} of {pool} was let go for good", name(disk)),
        }
    }

    pub(crate) fn on_disk_changed(&mut self, request: u64, result: Result<(), String>) {
        let Some(text) = self.groups.disk_commands.asked.remove(&request) else { return };
        if result.is_ok() {
            let newest = self.state.events.iter().last().map_or(0, |event| event.index);
            let news = &mut self.groups.disk_commands.news;
            news.push((newest, text));
            if news.len() > NEWS_MAX {
                news.remove(0);
            }
        }
        let result = result.map(|()| Answer::Done).map_err(Refusal::Conflict);
        self.output(Output::Answer { request, result });
    }

    /// The data plane is gone, and what it was asked with it.
    pub(crate) fn forget_disk_commands(&mut self) {
        for request in std::mem::take(&mut self.groups.disk_commands.asked).into_keys() {
            let text = "this node's data plane was restarted; look with `pollux pool show` whether it was done";
            self.output(Output::Answer { request, result: Err(Refusal::Conflict(text.into())) });
        }
    }

    /// What was done to disks becomes an event, and so does one that fails or is missing.
    pub(crate) fn tell_of_disks(&mut self, now: Instant) {
        let (subject, events) = (Subject::Node(self.me), &self.state.events);
        let is_told = |since: u64, text: &str| {
            events.iter().any(|event| event.index > since && event.subject == subject && event.text == text)
        };
        self.groups.disk_commands.news.retain(|(since, text)| !is_told(*since, text));
        let done = self.groups.disk_commands.news.iter();
        let mut news: Vec<(u64, String)> = done.map(|(since, text)| (*since, text.clone())).collect();
        let name = self.name_of(self.me);
        let bad = self.groups.pool.iter().flat_map(|pool| &pool.disks).filter_map(|disk| disk_text(&name, disk));
        news.extend(bad.map(|text| (0, text)).filter(|(since, text)| !is_told(*since, text)));
        for (number, (_, text)) in (0..).zip(news) {
            self.propose(now, ("disk", self.me.0, number), Change::Note { subject, text });
        }
    }
}

/// What is wrong with a disk, in a sentence.
fn disk_text(node: &str, disk: &DiskReport) -> Option<String> {
    let name = format!("disk {} ({}) of the pool on `{node}`", disk.disk, disk.path);
    match disk.state {
        DiskState::Failed => Some(format!("{name} failed: what was on it comes from the other replicas")),
        DiskState::Missing => Some(format!("{name} is missing: the pool waits for it")),
        DiskState::Healthy | DiskState::Draining | DiskState::Drained => None,
    }
}

/// Alerts about the disks of a node's pool, each with what mends it.
pub(crate) fn disk_alerts(by: NodeId, of: NodeId, node: &str, pool: &PoolReport) -> Vec<Alert> {
    let alert = |text: String, fix: String| Alert { subject: Subject::Node(of), by, text, fix: Some(fix) };
    let mut alerts = Vec::new();
    for disk in &pool.disks {
        let (path, id) = (&disk.path, disk.disk);
        if let Some(text) = disk_text(node, disk) {
            alerts.push(alert(
                text,
                match disk.state {
                    DiskState::Missing => {
                        format!("attach it; if it is lost for good: pollux pool remove-disk {node} {id} --lost")
                    }
                    _ => format!(
                        "pollux pool remove-disk {node} {id}, then add another: pollux pool add-disk {node} PATH"
                    ),
                },
            ));
        }
        if let Some(reason) = &disk.reason
            && disk.state == DiskState::Draining
        {
            let text = format!("disk {path} of the pool on `{node}` can not be drained further: {reason}");
            alerts.push(alert(
                text,
                format!("pollux pool add-disk {node} PATH, or pollux pool undrain-disk {node} {id}"),
            ));
        }
        if disk.checksum_errors + disk.io_errors > 0 && disk.state != DiskState::Failed {
            let (rotten, unread) = (disk.checksum_errors, disk.io_errors);
            let text = format!(
                "disk {path} of the pool on `{node}` has made errors: {rotten} blocks did not match their checksums, {unread} \
                 reads failed; what was bad comes from the other replicas"
            );
            alerts.push(alert(text, format!("if it goes on: pollux pool drain-disk {node} {id}")));
        }
    }
    alerts
}
