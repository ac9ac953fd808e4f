//! When a primary says that a replica is lost, or that one may be named, and when it looks again. Said again and again until
//! a newer record is ordered: what decides is the control plane, and it may not have been able to.

use crate::group::Group;
use crate::node::Node;
use crate::primary::{Member, MemberState};
use pollux_base::timing::REPLICA_LOST;
use pollux_base::{Instant, NodeId, Report};
use smallvec::SmallVec;
use std::collections::BTreeSet;
use std::time::Duration;

/// How often a loss or a finished resync is reported again until a newer record is ordered: reports may be lost with a
/// connection to the control plane, and it may have been unable to decide.
const REPORT_REPEAT: Duration = Duration::from_millis(500);
/// A replica (this node's own included) that leaves a question unanswered for so long has a hanging disk. Longer than any
/// disk's own error recovery that ends well, shorter than a guest's patience (30 s).
pub(crate) const ANSWER_LATE: Duration = Duration::from_secs(5);
/// How often a replica that is not needed and cannot take part is asked whether it can now: its disk may have been slow for
/// a moment only, and nobody else would ask. Rare enough to cost nothing if it never can.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// A plan that came to nothing so many times is not made rarer any more: `ASK_AGAIN` doubled so often is a bit over five
/// minutes, in which a human who has mended the cause will wait for it.
const DOUBLINGS_MAX: u32 = 6;

/// How long nothing is tried with a replica after its plans came to nothing so many times in a row. What cannot succeed (a
/// block that nobody can read, a peer that answers nonsense) would else keep both disks busy for ever.
pub(crate) fn back_off(times: u32) -> Duration {
    ASK_AGAIN * (1 << times.saturating_sub(1).min(DOUBLINGS_MAX))
}

/// When a replica that cannot take part, and is not needed, is asked again.
fn ask_again_at(member: &Member) -> Instant {
    let again = member.since + ASK_AGAIN;
    member.doomed.map_or(again, |doomed| again.max(doomed.until))
}

impl Group {
    /// Replicas whose loss is reported. At a birth nobody's: whoever is missing is waited for, because nothing is lost by it,
    /// and without it the birth could never be confirmed.
    fn needed(&self, me: NodeId) -> SmallVec<[NodeId; 4]> {
        if self.is_unborn() { SmallVec::new() } else { self.requires(me).collect() }
    }

    /// Reports required replicas that are lost, and offered ones that may be named, again and again until a newer record
    /// is ordered.
    pub(crate) fn report_members(&mut self, node: &mut Node) {
        let Some(spec) = self.acting() else { return };
        let (generation, in_sync) = (spec.record.stamp.generation, &spec.record.in_sync);
        let (now, me, group) = (node.now, node.me, self.id);
        let own_loss = match self.fit(node) {
            Err(reason) if in_sync.contains(&me) => Some(reason),
            _ => self
                .local
                .late_since()
                .filter(|since| in_sync.contains(&me) && now >= node.late_at(*since))
                .map(|_| format!("the disk has not answered for {} s", ANSWER_LATE.as_secs())),
        };
        let needed: SmallVec<[(NodeId, bool); 4]> =
            self.needed(me).into_iter().map(|peer| (peer, in_sync.contains(&peer))).collect();
        let minted = spec.snapshots.minted;
        let Some(primary) = &mut self.primary else { return };
        let is_due = |reported: Option<Instant>| reported.is_none_or(|at| now >= at + REPORT_REPEAT);
        if let Some(reason) = own_loss
            && is_due(primary.own_loss_reported)
        {
            primary.own_loss_reported = Some(now);
            node.report(Report::ReplicaLost { group, generation, node: me, reason });
        }
        let late: BTreeSet<NodeId> = primary
            .asked
            .values()
            .take_while(|asked| now >= node.late_at(asked.at))
            .filter(|asked| !asked.is_held)
            .map(|asked| asked.peer)
            .collect();
        for (peer, is_in_sync) in needed {
            let Some(member) = primary.members.get_mut(&peer) else { continue };
            if !is_due(member.reported) {
                continue;
            }
            let gone = now >= member.since + REPLICA_LOST;
            let reason = match &member.state {
                MemberState::Unfit { reason } => Some(reason.clone()),
                MemberState::Away if gone => Some("it is not connected".to_string()),
                MemberState::Greeting if gone => Some("it does not join".to_string()),
                _ if late.contains(&peer) => Some(format!("it has not answered for {} s", ANSWER_LATE.as_secs())),
                _ => None,
            };
            if let Some(reason) = reason {
                member.reported = Some(now);
                node.report(Report::ReplicaLost { group, generation, node: peer, reason });
            } else if matches!(member.state, MemberState::Current)
                && !is_in_sync
                && !primary.noting_offer.contains(&peer)
            {
                member.reported = Some(now);
                node.report(Report::ReplicaCurrent { group, generation, node: peer, minted });
            }
        }
        let unneeded: Vec<NodeId> = late.into_iter().filter(|peer| !self.required(me).contains(peer)).collect();
        for peer in unneeded {
            self.make_unfit(node, peer, format!("it has not answered for {} s", ANSWER_LATE.as_secs()));
        }
    }

    pub(crate) fn on_time_as_primary(&mut self, node: &mut Node) {
        if let Some(primary) = &mut self.primary
            && primary.wait_old.is_some_and(|(_, until)| until <= node.now)
        {
            primary.wait_old = None;
        }
        self.report_members(node);
        self.drop_late_trails(node);
        self.ask_unfit_again(node);
        self.cool_on_time(node);
    }

    /// Announces the record anew to replicas that could not take part; they answer by joining.
    fn ask_unfit_again(&mut self, node: &mut Node) {
        let (now, needed) = (node.now, self.needed(node.me));
        let members = self.primary.iter_mut().flat_map(|primary| &mut primary.members);
        let mut due = Vec::new();
        for (peer, member) in members.filter(|(peer, _)| !needed.contains(peer)) {
            if matches!(member.state, MemberState::Unfit { .. }) && now >= ask_again_at(member) {
                member.since = now;
                due.push(*peer);
            }
        }
        for peer in due {
            self.announce(node, peer);
        }
    }

    pub(crate) fn wake_as_primary(&self, node: &Node) -> Option<Instant> {
        let primary = self.primary.as_ref()?;
        let mut wake: SmallVec<[Instant; 8]> = primary.cool_at.into_iter().collect();
        wake.extend(primary.wait_old.map(|(_, until)| until));
        wake.extend(self.trail_wake(node));
        if let Some(spec) = self.acting() {
            let in_sync = &spec.record.in_sync;
            if in_sync.contains(&node.me) {
                match primary.own_loss_reported {
                    Some(reported) if self.fit(node).is_err() => wake.push(reported + REPORT_REPEAT),
                    None if self.fit(node).is_err() => wake.push(node.now),
                    Some(reported) => {
                        wake.extend(self.local.late_since().map(|at| node.late_at(at).max(reported + REPORT_REPEAT)))
                    }
                    None => wake.extend(self.local.late_since().map(|since| node.late_at(since))),
                }
            }
            let needed = self.needed(node.me);
            for peer in &needed {
                let Some(member) = primary.members.get(peer) else { continue };
                let repeat = member.reported.map(|reported| reported + REPORT_REPEAT);
                match member.state {
                    MemberState::Unfit { .. } => wake.push(repeat.unwrap_or(node.now)),
                    MemberState::Away | MemberState::Greeting => {
                        wake.push((member.since + REPLICA_LOST).max(repeat.unwrap_or(Instant(0))));
                    }
                    MemberState::Current if !in_sync.contains(peer) => wake.push(repeat.unwrap_or(node.now)),
                    _ => {}
                }
            }
            let unfit = primary
                .members
                .iter()
                .filter(|(peer, member)| matches!(member.state, MemberState::Unfit { .. }) && !needed.contains(peer));
            wake.extend(unfit.map(|(_, member)| ask_again_at(member)));
            if let Some(asked) = primary.asked.values().find(|asked| !asked.is_held).filter(|_| !self.is_unborn()) {
                let repeat = primary.members.get(&asked.peer).and_then(|member| member.reported);
                let late = node.late_at(asked.at);
                wake.push(repeat.map_or(late, |reported| late.max(reported + REPORT_REPEAT)));
            }
        }
        wake.into_iter().min()
    }
}
