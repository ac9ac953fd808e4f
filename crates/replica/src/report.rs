//! What the control plane hears of a group: its state when that changes, and how far a resync is once a second.

use crate::group::Group;
use crate::node::Node;
use crate::verdict::Verdict;
use pollux_base::order::{FreezeReason, GroupReport, Lag, ReplicaState};
use pollux_base::{Instant, NodeId, Report, Stamp};
use smallvec::SmallVec;
use std::collections::BTreeMap;
use std::time::Duration;

/// How often figures that move all the time are reported.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// What was last reported.
#[derive(Debug, Default)]
pub(crate) struct Reported {
    facts: Option<Facts>,
    at: Instant,
    healed: u64,
    findings: u64,
    lag: BTreeMap<NodeId, Lag>,
}

/// In order, once each. Made anew whenever something happens to a group.
type Nodes = SmallVec<[NodeId; 4]>;

/// What is reported at once when it changes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Facts {
    stamp: Option<Stamp>,
    state: ReplicaState,
    is_unborn: bool,
    is_incomplete: bool,
    resync: Nodes,
    connected: Nodes,
    /// The scrub that runs or was the last, and whether it is done.
    scrub: Option<(u64, bool)>,
    is_slowed: bool,
    /// Whose lag is told.
    trailing: Nodes,
}

impl Group {
    fn facts(&self, node: &Node) -> Facts {
        let replicas = self.spec.iter().flat_map(|spec| spec.replicas.iter().copied());
        let copied = self.primary.iter().flat_map(|primary| primary.members.iter());
        Facts {
            stamp: self.spec.as_ref().map(|spec| spec.record.stamp),
            state: self.state(node),
            is_unborn: self.is_unborn(),
            is_incomplete: node.store.is_incomplete(self.id),
            resync: copied.filter(|(_, member)| member.state.resync().is_some()).map(|(peer, _)| *peer).collect(),
            scrub: self.scrub_report(node.now).map(|report| (report.id, report.is_done)),
            connected: replicas.filter(|peer| node.session(*peer).is_some()).collect(),
            is_slowed: self.is_slowed(node),
            trailing: self.trailing_nodes(node),
        }
    }

    /// New writes wait for a trailing replica.
    fn is_slowed(&self, node: &Node) -> bool {
        let (Some(primary), Some(spec)) = (&self.primary, &self.spec) else { return false };
        !primary.held.is_empty() && primary.is_slowed(spec.lag, node.now)
    }

    /// Whose lag `lag` tells.
    fn trailing_nodes(&self, node: &Node) -> Nodes {
        match (&self.primary, self.verdict) {
            (Some(primary), _) => primary.trails().map(|(peer, ..)| peer).collect(),
            (None, Verdict::Trailing { .. }) => Nodes::from_slice(&[node.me]),
            _ => Nodes::new(),
        }
    }

    fn lag(&self, node: &Node) -> BTreeMap<NodeId, Lag> {
        match (&self.primary, self.verdict) {
            (Some(primary), _) => primary.lags(node.now),
            (None, Verdict::Trailing { .. }) => BTreeMap::from([(node.me, self.trailing.lag())]),
            _ => BTreeMap::new(),
        }
    }

    /// Not every replica has confirmed the group's birth, as far as is known here.
    pub(crate) fn is_unborn(&self) -> bool {
        self.note.is_none() || self.verdict == Verdict::Born
    }

    /// What this node's replica is doing.
    fn state(&self, node: &Node) -> ReplicaState {
        if self.primary.is_none() && self.verdict == Verdict::Absent && self.adopted.is_some() {
            return ReplicaState::Absent;
        }
        if self.primary.is_some() {
            return match self.holds(node) {
                Some(reason) => ReplicaState::Frozen { reason },
                None if self.is_full(node) => ReplicaState::Frozen { reason: FreezeReason::PoolFull },
                None => ReplicaState::Serving,
            };
        }
        if let Err(reason) = self.fit(node)
            && !matches!(self.verdict, Verdict::Diverged { .. })
        {
            return ReplicaState::Failed { reason };
        }
        match self.verdict {
            Verdict::Diverged { own } => ReplicaState::Diverged { own },
            Verdict::Member { .. } | Verdict::Born => ReplicaState::Secondary,
            Verdict::Trailing { at } => ReplicaState::Trailing { at },
            _ => ReplicaState::Stale,
        }
    }

    /// Reports what has changed. Groups of which only a note is known are not reported: nothing is known of them that the
    /// control plane does not know better.
    pub(crate) fn report_changes(&mut self, node: &mut Node) {
        if self.spec.is_none() {
            return;
        }
        let facts = self.facts(node);
        let changed = self.reported.facts.as_ref() != Some(&facts);
        if changed || self.report_due(node).is_some_and(|due| due <= node.now) {
            self.report(node, facts);
        }
    }

    /// As far as was reported, it serves.
    pub(crate) fn is_said_to_serve(&self) -> bool {
        self.reported.facts.as_ref().is_some_and(|facts| facts.state == ReplicaState::Serving)
    }

    /// Everything anew.
    pub(crate) fn report_again(&mut self, node: &mut Node) {
        self.reported.facts = None;
        if let Some(primary) = &mut self.primary {
            primary.own_loss_reported = None;
            for member in primary.members.values_mut() {
                member.reported = None;
            }
        }
        self.report_changes(node);
    }

    fn report(&mut self, node: &mut Node, facts: Facts) {
        let members = self.primary.iter().flat_map(|primary| primary.members.iter());
        let resync = members.filter_map(|(peer, member)| Some((*peer, member.state.resync()?.progress(node.now))));
        let report = GroupReport {
            group: self.id,
            stamp: facts.stamp,
            state: facts.state.clone(),
            is_unborn: facts.is_unborn,
            is_incomplete: facts.is_incomplete,
            used_bytes: node.store.used(self.id).0,
            healed_blocks: self.healed,
            resync: resync.collect(),
            scrub: self.scrub_report(node.now),
            findings: self.findings.iter().cloned().collect(),
            connected: facts.connected.iter().copied().collect(),
            lag: self.lag(node),
            is_slowed: facts.is_slowed,
        };
        let (findings, lag) = (self.last_finding(), report.lag.clone());
        self.reported = Reported { facts: Some(facts), at: node.now, healed: self.healed, findings, lag };
        node.report(Report::Group(Box::new(report)));
    }

    /// When figures are due, if any moves.
    pub(crate) fn report_due(&self, node: &Node) -> Option<Instant> {
        let facts = self.reported.facts.as_ref()?;
        let lags = match &self.primary {
            Some(primary) => primary.is_any_behind() || self.reported.lag.values().any(|lag| *lag != Lag::default()),
            None => self.reported.lag != self.lag(node),
        };
        let moves = !facts.resync.is_empty()
            || facts.scrub.is_some_and(|(_, is_done)| !is_done)
            || self.reported.healed != self.healed
            || self.reported.findings != self.last_finding()
            || lags;
        moves.then(|| self.reported.at + PROGRESS_EVERY)
    }

    fn last_finding(&self) -> u64 {
        self.findings.back().map_or(0, |finding| finding.number)
    }
}
