//! Making sure that a lost node can not act, and saying why that is certain (section 5).
//!
//! Power first, as soon as the grant is held; beside it the guard's bound runs. Whichever is first becomes the proof.

use crate::core::Cluster;
use crate::entry::{Change, FenceProof, NodePhase};
use crate::seam::Output;
use pollux_base::config::PowerConfig;
use pollux_base::guard::GuardCommand;
use pollux_base::timing::guard_bound;
use pollux_base::{Epoch, Instant, NodeId};
use std::collections::BTreeMap;
use std::time::Duration;

/// A power switch that failed is tried again after this long, until the guard's bound has run out.
const FENCE_AGAIN: Duration = Duration::from_secs(2);
/// A power switch that does not answer at all counts as failed after this long.
const FENCE_WAIT: Duration = Duration::from_secs(15);

#[derive(Default)]
pub(crate) struct Fencing {
    attempts: BTreeMap<NodeId, Attempt>,
    /// The epoch that our guard has been naming alone, and since when: from then on it renews nobody's lease.
    named: Option<(Epoch, Instant)>,
    humans: BTreeMap<NodeId, String>,
}

#[derive(Default)]
struct Attempt {
    is_under_way: bool,
    is_off: bool,
    next: Option<Instant>,
    trouble: Option<String>,
}

impl Fencing {
    pub fn on_result(&mut self, now: Instant, node: NodeId, result: Result<(), String>) {
        // An answer that nobody waits for proves nothing about the present.
        let Some(attempt) = self.attempts.get_mut(&node).filter(|attempt| attempt.is_under_way) else {
            return;
        };
        attempt.is_under_way = false;
        match result {
            Ok(()) => attempt.is_off = true,
            Err(reason) => {
                attempt.trouble = Some(reason);
                attempt.next = Some(now + FENCE_AGAIN);
            }
        }
    }

    pub fn on_human(&mut self, node: NodeId, token: &str) {
        self.humans.insert(node, token.to_owned());
    }

    /// Why the node could not be switched off.
    pub fn trouble(&self, node: NodeId) -> Option<&str> {
        self.attempts.get(&node).and_then(|attempt| attempt.trouble.as_deref())
    }
}

impl Cluster {
    pub(crate) fn reconcile_fencing(&mut self, now: Instant) {
        self.note_named_epoch(now);
        if !(self.acts_alone() && self.may_act()) {
            self.fencing.attempts.clear();
            if !matches!(self.stand, crate::authority::Stand::Granted { .. }) {
                self.fencing.humans.clear();
            }
            return;
        }
        let lost = self.state.nodes.iter().filter(|(_, node)| node.phase == NodePhase::Lost);
        let lost: Vec<(NodeId, Option<PowerConfig>)> = lost.map(|(id, node)| (*id, node.spec.power.clone())).collect();
        self.fencing.attempts.retain(|node, _| lost.iter().any(|(id, _)| id == node));
        for (node, power) in lost {
            let proof = self.fence_proof(now, node, power.as_ref());
            if let Some(proof) = proof {
                let epoch = self.state.authority.epoch;
                let phase = Change::NodePhase { node, epoch, phase: NodePhase::Fenced, proof: Some(proof) };
                self.propose(now, ("fenced", node.0, epoch.0), phase);
            } else if let Some(power) = power {
                self.switch_off(now, node, power);
            }
        }
    }

    fn switch_off(&mut self, now: Instant, node: NodeId, power: PowerConfig) {
        // A node that has come back and given up everything need not be shot (regression 65).
        if self.hello_of(now, node).is_some_and(|hello| hello.wants_to_join) {
            return;
        }
        let attempt = self.fencing.attempts.entry(node).or_default();
        if let Some(next) = attempt.next.filter(|next| *next > now) {
            self.wake_at(next);
            return;
        }
        if attempt.is_under_way {
            attempt.trouble = Some("the power switch does not answer".into());
        }
        attempt.is_under_way = true;
        attempt.next = Some(now + FENCE_WAIT);
        self.wake_at(now + FENCE_WAIT);
        self.output(Output::Fence { node, power });
    }

    fn fence_proof(&mut self, now: Instant, node: NodeId, power: Option<&PowerConfig>) -> Option<FenceProof> {
        if let (true, Some(power)) = (self.fencing.attempts.get(&node).is_some_and(|attempt| attempt.is_off), power) {
            return Some(FenceProof::PowerOff { uuid: power.uuid.clone() });
        }
        if let Some(token) = self.fencing.humans.get(&node) {
            return Some(FenceProof::Human { token: token.clone() });
        }
        // The node's lease runs from a heartbeat of its own that we answered: so not from later than the last one heard, nor
        // from later than our guard began to name the new epoch, because such answers renew nothing.
        let heard = self.peers.each.get(&node).and_then(|peer| peer.heard).or(self.peers.listening_since);
        let named = self.fencing.named.filter(|(epoch, _)| *epoch == self.state.authority.epoch).map(|(_, at)| at);
        let since = [heard, named].into_iter().flatten().min()?;
        let is_over = self.has_come(now, since + guard_bound());
        let waited_ms = u64::try_from(guard_bound().as_millis()).unwrap_or(u64::MAX);
        is_over.then_some(FenceProof::GuardBound { waited_ms })
    }

    fn note_named_epoch(&mut self, now: Instant) {
        let named = self.guard.as_ref().and_then(|view| match view.command {
            Some(GuardCommand::Alone { epoch }) => Some(epoch),
            _ => None,
        });
        match (named, self.fencing.named) {
            (Some(epoch), Some((known, _))) if epoch == known => {}
            (Some(epoch), _) => self.fencing.named = Some((epoch, now)),
            (None, _) if self.guard.is_some() => self.fencing.named = None,
            (None, _) => {}
        }
    }
}
