//! Who may decide: the life of this node's right to act, in a cluster of two. `docs/design/0003-authority.md` walks
//! through every crash.
//!
//! ```text
//!  Forming ──────────────► Member ◄──────────────────────────────┐
//!  (never a member)        │   ▲                                  │ Members again, and saved
//!                 peer down│   │peer back                         │
//!                          ▼   │                                  │
//!                          Asking ──swapped──► Granted ──taken in─┤
//!                          │                   ▲                  │
//!          the register    │        Reviving ──┘                  │
//!          says otherwise  ▼        (boots with `alone`)          │
//!                          Outdated ──gives up its log──► Rejoining
//! ```
//! Order of durable steps. Going alone: register, then record, then log, then acts. Coming together: record says `not
//! alone` and the guard needs its peer again *before* `Members` is proposed; the register is set to `both` *after* it is
//! committed. So the register never says `both` while a node may still act alone, and nobody's record says `alone`
//! while another may get the grant.

use crate::core::Cluster;
use crate::entry::{Change, Holder, NodePhase, Proof};
use crate::seam::{Answer, EpochRecord, Output, Refusal, Setup};
use crate::state::State;
use pollux_base::guard::GuardCommand;
use pollux_base::timing::{BOOT_WAIT, FENCING_RIGHT, GRANT_HANDICAP};
use pollux_base::{Epoch, Instant, NodeId};
use std::time::Duration;

/// Things asked of the shell that take it milliseconds are asked again after this long.
const ASK_AGAIN: Duration = Duration::from_secs(2);
/// Learner first, then voter: each step is asked for again after this long.
const TAKE_IN_AGAIN: Duration = Duration::from_secs(1);
/// A member whose peer says that it has no log any more is believed after this long: the word may have been on its way
/// while the peer was taken in.
const GAVE_UP_FOR: Duration = Duration::from_secs(5);

/// Where this node stands. Reads in the order of a bad day.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stand {
    /// Was never a member of anything.
    Forming,
    /// One of several. If its peer is not there it may ask the witness, but not before `wait` unless it has heard the peer
    /// within `FENCING_RIGHT` (verdict 5, regression 65).
    Member { wait: Instant },
    /// Booted with a durable `alone`; looks whether the witness knows better (verdict 6).
    Reviving { epoch: Epoch },
    /// Asks the witness for the grant.
    Asking,
    /// Holds the grant: saves it, forces the log, says so in the log, acts.
    Granted { epoch: Epoch, proof: Proof },
    /// A newer epoch exists without this node. It gives up its log once it is told by whom.
    Outdated { to: Option<NodeId>, epoch: Epoch, since_unix_ms: u64, why: String },
    /// The log says that it is a member again; saves that before it acts on it.
    Rejoining { epoch: Epoch },
}

impl Stand {
    pub fn at_start(setup: &Setup, now: Instant) -> Stand {
        match &setup.record {
            None => Stand::Forming,
            Some(EpochRecord { gave_up: Some(epoch), .. }) => Stand::Outdated {
                to: setup.nodes.keys().copied().find(|node| *node != setup.node),
                epoch: *epoch,
                since_unix_ms: 0,
                why: "it gave up its log before this start".into(),
            },
            Some(record) if record.alone => Stand::Reviving { epoch: record.epoch },
            Some(_) => Stand::Member { wait: now + BOOT_WAIT },
        }
    }
}

impl Cluster {
    pub(crate) fn reconcile_authority(&mut self, now: Instant) {
        self.watch_newer_epochs(now);
        match self.stand.clone() {
            Stand::Forming => self.form(now),
            Stand::Member { wait } => self.be_member(now, wait),
            Stand::Reviving { .. } | Stand::Asking => {}
            Stand::Granted { epoch, proof } => self.be_granted(now, epoch, proof),
            Stand::Outdated { to, epoch, .. } => self.be_outdated(now, to, epoch),
            Stand::Rejoining { epoch } => {
                if self.saved(now, EpochRecord { epoch, alone: false, gave_up: None }) {
                    self.gave_up = false;
                    self.set_stand(Stand::Member { wait: now + BOOT_WAIT });
                }
            }
        }
        if let Stand::Asking = self.stand {
            self.ask_no_longer_if_peer_is_back(now);
        }
        self.command_guard(now);
        let takes_part = matches!(self.stand, Stand::Member { .. } | Stand::Granted { .. });
        if !self.is_awake && takes_part && self.state.is_initialised() && self.log.voters.contains(&self.me) {
            self.propose(now, ("awake", self.run, 0), Change::Awake { node: self.me, run: self.run });
        }
    }

    pub(crate) fn set_stand(&mut self, stand: Stand) {
        if self.stand != stand {
            self.stand = stand;
            self.dirty();
        }
    }

    /// Saves the record unless it is so already. Whether it is.
    fn saved(&mut self, now: Instant, record: EpochRecord) -> bool {
        if self.record.as_ref() == Some(&record) {
            return true;
        }
        if self.is_due(now, ("save", record.epoch.0, u64::from(record.alone)), ASK_AGAIN) {
            self.output(Output::SaveEpoch(record));
        }
        false
    }

    /// Birth: all nodes are fresh and in contact; the lowest makes the log, its leader the first entry.
    fn form(&mut self, now: Instant) {
        let nodes: Vec<NodeId> = self.setup.nodes.keys().copied().collect();
        let is_voter = self.log.voters.contains(&self.me);
        if self.state.is_initialised() && self.state.authority.holder == Holder::Members && is_voter {
            let record = EpochRecord { epoch: self.state.authority.epoch, alone: false, gave_up: None };
            if self.saved(now, record) {
                self.set_stand(Stand::Member { wait: now + BOOT_WAIT });
            }
            return;
        }
        if self.log.leader == Some(self.me) && !self.state.is_initialised() {
            let (name, nodes) = (self.setup.name.clone(), self.setup.nodes.clone());
            let init = Change::Init { name, nodes, witness: self.setup.witness };
            self.propose(now, ("init", 0, 0), init);
            return;
        }
        let others_fresh =
            self.peers.each.keys().all(|node| {
                self.hello_of(now, *node).is_some_and(|hello| hello.epoch == Epoch(0) && !hello.wants_to_join)
            });
        let is_first = nodes.first() == Some(&self.me);
        if is_first && others_fresh && self.log.voters.is_empty() && self.is_due(now, ("birth", 0, 0), ASK_AGAIN) {
            self.output(Output::InitLog { voters: nodes });
        }
    }

    fn be_member(&mut self, now: Instant, wait: Instant) {
        let state_epoch = self.state.authority.epoch;
        let record = self.record_epoch();
        if self.record.as_ref().is_some_and(|record| record.alone) {
            // Comes from `Granted`, to be a member again under the epoch after it.
            let epoch = self.state.authority.epoch.max(record).next();
            self.saved(now, EpochRecord { epoch, alone: false, gave_up: None });
            return;
        }
        if state_epoch > record && self.state.authority.holder == Holder::Members {
            self.saved(now, EpochRecord { epoch: state_epoch, alone: false, gave_up: None });
        } else if record > state_epoch && self.is_awake {
            self.raise_to_members(now, record);
        }
        self.bring_nodes_online(now);

        let Some(partner) = self.partner() else {
            return;
        };
        let Some(peer) = self.peers.each.get(&partner) else {
            return;
        };
        if peer.is_up {
            self.stand = Stand::Member { wait: now + BOOT_WAIT };
            if self.has_lost_its_log(now, partner) {
                self.set_stand(Stand::Asking);
            }
            return;
        }
        let Some(down_since) = peer.down_since else {
            return; // The guard has not told yet.
        };
        let has_right = peer.heard.is_some_and(|heard| down_since.since(heard) <= FENCING_RIGHT);
        let ask_at = match has_right {
            true if self.is_idler_side(partner) => down_since + GRANT_HANDICAP,
            true => down_since,
            false => wait,
        };
        if self.has_come(now, ask_at) {
            self.set_stand(Stand::Asking);
        }
    }

    /// The peer is alive and says that it has no log any more although it is a voter of ours (its disk was replaced, or it
    /// was told of an epoch that never came to be): the log can not go on with it, so it counts as gone.
    fn has_lost_its_log(&mut self, now: Instant, partner: NodeId) -> bool {
        let is_lost = self.hello_of(now, partner).is_some_and(|hello| hello.wants_to_join)
            && self.log.leader.is_none_or(|leader| leader == self.me)
            && self.record_epoch() == self.state.authority.epoch;
        let Some(peer) = self.peers.each.get_mut(&partner) else {
            return false;
        };
        if !is_lost {
            peer.joins_since = None;
            return false;
        }
        let since = *peer.joins_since.get_or_insert(now);
        self.has_come(now, since + GAVE_UP_FOR)
    }

    /// Whether the partner has more to lose by a change of sides: guests first, then volumes that are served.
    fn is_idler_side(&self, partner: NodeId) -> bool {
        let guests = |node| self.state.vms.values().filter(|vm| vm.node == node && vm.phase.may_run()).count();
        let served = |node| {
            let exported = self.state.volumes.values().filter(|volume| volume.exported);
            let primaries = exported.filter_map(|volume| self.state.groups.get(&volume.group));
            primaries.filter(|group| group.record.primary == node).count()
        };
        let (mine, other) = ((guests(self.me), served(self.me)), (guests(partner), served(partner)));
        mine < other
    }

    fn ask_no_longer_if_peer_is_back(&mut self, now: Instant) {
        let Some(partner) = self.partner() else {
            return;
        };
        if self.is_up(partner) && !self.has_lost_its_log(now, partner) && !self.witness.is_asked_for_grant() {
            self.set_stand(Stand::Member { wait: now + BOOT_WAIT });
        }
    }

    fn be_granted(&mut self, now: Instant, epoch: Epoch, proof: Proof) {
        if !self.saved(now, EpochRecord { epoch, alone: true, gave_up: None }) {
            return;
        }
        let is_mine = self.log.voters == [self.me];
        if self.acts_alone() {
            self.mark_lost_nodes(now);
            self.bring_nodes_online(now);
            match self.partner() {
                Some(partner) if is_mine => self.take_in(now, partner),
                Some(partner) if self.log.voters.contains(&partner) => self.come_together(now, partner, epoch),
                _ => {}
            }
        } else if !is_mine || self.log.leader != Some(self.me) {
            if self.is_due(now, ("force", epoch.0, 0), ASK_AGAIN) {
                self.output(Output::ForceAlone { epoch });
            }
        } else if self.state.authority.epoch < epoch {
            let expect = self.state.authority.epoch;
            let raise = Change::RaiseEpoch { expect, epoch, holder: Holder::Alone { node: self.me }, proof };
            self.propose(now, ("raise", expect.0, epoch.0), raise);
        } else {
            // The log held a newer epoch of the members that this node had not seen: the grant is for nothing. Asked anew.
            self.set_stand(Stand::Member { wait: now });
        }
    }

    fn mark_lost_nodes(&mut self, now: Instant) {
        let epoch = self.state.authority.epoch;
        let others = self.state.nodes.iter().filter(|(id, node)| **id != self.me && node.phase == NodePhase::Online);
        for node in others.map(|(id, _)| *id).collect::<Vec<_>>() {
            let phase = Change::NodePhase { node, epoch, phase: NodePhase::Lost, proof: None };
            self.propose(now, ("lost", node.0, epoch.0), phase);
        }
    }

    /// A peer that gave up its log, is heard, and is proven to run nothing of before, becomes learner and voter.
    fn take_in(&mut self, now: Instant, partner: NodeId) {
        let is_fenced = self.state.nodes.get(&partner).is_some_and(|node| node.phase == NodePhase::Fenced);
        let asks = self.hello_of(now, partner).is_some_and(|hello| hello.wants_to_join);
        if is_fenced && asks && self.is_up(partner) && self.is_due(now, ("take in", partner.0, 0), TAKE_IN_AGAIN) {
            self.output(Output::TakeIn { node: partner });
        }
    }

    /// The peer is a voter: nothing is committed without it any more. Either both go on, or it is dropped again.
    fn come_together(&mut self, now: Instant, partner: NodeId, epoch: Epoch) {
        let is_silent = self.peers.each.get(&partner).is_some_and(|peer| peer.down_since.is_some());
        if is_silent {
            if self.is_due(now, ("force", epoch.0, 0), ASK_AGAIN) {
                self.output(Output::ForceAlone { epoch });
            }
        } else if self.is_up(partner) {
            self.set_stand(Stand::Member { wait: now + BOOT_WAIT });
        }
    }

    /// The log is everybody's, not one that was forced to one node.
    pub(crate) fn all_vote(&self) -> bool {
        self.setup.nodes.keys().all(|node| self.log.voters.contains(node))
    }

    /// Our record says that the members decide under `epoch`; the log does not say so yet.
    fn raise_to_members(&mut self, now: Instant, epoch: Epoch) {
        let expect = self.state.authority.epoch;
        let is_mine_to_say = match self.state.authority.holder {
            Holder::Members => true,
            Holder::Alone { node } => node == self.me,
        };
        // Our guard must need its peer again before anyone else may get the grant.
        let is_guard_told = self.guard.as_ref().is_some_and(|view| view.command == self.guard_command());
        if is_mine_to_say && is_guard_told && self.all_vote() {
            let raise = Change::RaiseEpoch { expect, epoch, holder: Holder::Members, proof: Proof::Members };
            self.propose(now, ("raise", expect.0, epoch.0), raise);
        }
    }

    /// Members of the log that were fenced are back.
    fn bring_nodes_online(&mut self, now: Instant) {
        if self.log.leader != Some(self.me) || !self.may_act() {
            return;
        }
        let epoch = self.state.authority.epoch;
        // While one goes on alone, only it is back: it may have been a member for so short a time that nobody said so.
        let alone = self.state.alone();
        let back = self.state.nodes.iter().filter(|(id, node)| {
            let acts = alone.map_or(self.log.voters.contains(id), |alone| alone == **id);
            node.phase == NodePhase::Fenced && acts
        });
        for node in back.map(|(id, _)| *id).collect::<Vec<_>>() {
            let phase = Change::NodePhase { node, epoch, phase: NodePhase::Online, proof: None };
            self.propose(now, ("online", node.0, epoch.0), phase);
        }
    }

    /// Verdict 7: a peer that acts under a newer epoch makes this node outdated.
    fn watch_newer_epochs(&mut self, now: Instant) {
        let own = match &self.stand {
            // By whom is not known yet: the next one to say so.
            Stand::Outdated { to: None, epoch, .. } => Epoch(epoch.0.saturating_sub(1)),
            Stand::Outdated { epoch, .. } | Stand::Granted { epoch, .. } | Stand::Rejoining { epoch } => *epoch,
            _ => self.record_epoch(),
        };
        let follows_log = self.log.leader.is_some() && self.log.voters.contains(&self.me);
        let mut newer = None;
        let mut waits = Vec::new();
        for (node, peer) in &mut self.peers.each {
            let hello = peer.fresh_hello(now).filter(|hello| hello.epoch > own && !hello.wants_to_join).cloned();
            let Some(hello) = hello else {
                peer.ahead_since = None;
                continue;
            };
            if hello.alone {
                newer = Some((*node, hello));
            } else if !follows_log && !matches!(self.stand, Stand::Outdated { .. }) {
                // The members went on without us, or their word is a moment ahead of the log: time tells.
                let since = *peer.ahead_since.get_or_insert(now);
                match now.since(since) >= BOOT_WAIT {
                    true => newer = Some((*node, hello)),
                    false => waits.push(since + BOOT_WAIT),
                }
            }
        }
        for at in waits {
            self.wake_at(at);
        }
        if let Some((node, hello)) = newer {
            let why = format!("`{}` acts under {:?}", self.name_of(node), hello.epoch);
            self.become_outdated(Some(node), hello.epoch, hello.since_unix_ms, why);
        }
    }

    pub(crate) fn become_outdated(&mut self, to: Option<NodeId>, epoch: Epoch, since_unix_ms: u64, why: String) {
        self.gave_up = false;
        self.set_stand(Stand::Outdated { to, epoch, since_unix_ms, why });
    }

    fn be_outdated(&mut self, now: Instant, to: Option<NodeId>, epoch: Epoch) {
        let is_member_again = self.state.is_initialised()
            && self.state.authority.holder == Holder::Members
            && self.state.authority.epoch > self.record_epoch()
            && self.state.authority.epoch >= epoch
            && self.log.leader.is_some()
            && self.log.voters.contains(&self.me)
            && !self.giving_up;
        if is_member_again {
            self.set_stand(Stand::Rejoining { epoch: self.state.authority.epoch });
            return;
        }
        let Some(from) = to else {
            return;
        };
        let is_told = self.given_up_for() >= epoch
            || self.hello_of(now, from).is_some_and(|hello| hello.epoch >= epoch && !hello.wants_to_join);
        // The guests of the old epoch are dead first: the guard says so itself.
        let is_over = self.guard.as_ref().is_some_and(|view| !view.lease_held && view.command == self.guard_command());
        if self.gave_up || !is_told || !is_over {
            return;
        }
        let record = EpochRecord { epoch: self.record_epoch(), alone: false, gave_up: Some(epoch) };
        if !self.saved(now, record) {
            return;
        }
        if !self.giving_up {
            self.giving_up = true;
            self.forget_log();
        }
        if self.is_due(now, ("give up", epoch.0, 0), ASK_AGAIN) {
            self.output(Output::GiveUpLog { from, epoch });
        }
    }

    fn given_up_for(&self) -> Epoch {
        self.record.as_ref().and_then(|record| record.gave_up).unwrap_or(Epoch(0))
    }

    /// Everything known from the old log; what the data plane was ordered stays until the new log says otherwise.
    fn forget_log(&mut self) {
        self.state = State::default();
        self.log = Default::default();
        self.is_awake = false;
        self.run = self.run.wrapping_add(1);
    }

    pub(crate) fn on_log_given_up(&mut self, epoch: Epoch) {
        if self.giving_up && matches!(self.stand, Stand::Outdated { epoch: own, .. } if own == epoch) {
            self.giving_up = false;
            self.gave_up = true;
            self.log = Default::default();
        }
    }

    /// What the guard is to know; said again until its view shows it.
    pub(crate) fn guard_command(&self) -> Option<GuardCommand> {
        let peers: Vec<NodeId> = self.setup.nodes.keys().copied().collect();
        let record = self.record.as_ref();
        match &self.stand {
            Stand::Forming | Stand::Reviving { .. } | Stand::Rejoining { .. } => None,
            Stand::Outdated { epoch, .. } => Some(GuardCommand::Surrender { epoch: *epoch }),
            Stand::Granted { epoch, .. } => {
                let is_saved = record.is_some_and(|record| record.alone && record.epoch == *epoch);
                is_saved.then_some(GuardCommand::Alone { epoch: *epoch })
            }
            Stand::Member { .. } | Stand::Asking => {
                let record = record.filter(|record| !record.alone)?;
                Some(GuardCommand::Members { epoch: record.epoch, peers })
            }
        }
    }

    fn command_guard(&mut self, now: Instant) {
        let (Some(command), Some(view)) = (self.guard_command(), &self.guard) else {
            return;
        };
        if view.command.as_ref() == Some(&command) {
            return;
        }
        let (kind, epoch) = match &command {
            GuardCommand::Members { epoch, .. } => ("guard members", *epoch),
            GuardCommand::Alone { epoch } => ("guard alone", *epoch),
            GuardCommand::Surrender { epoch } => ("guard surrender", *epoch),
        };
        if self.is_due(now, (kind, epoch.0, 0), ASK_AGAIN) {
            self.output(Output::Guard(command));
        }
    }

    /// The witness (or a human in its place) gave the grant.
    pub(crate) fn on_granted(&mut self, epoch: Epoch, proof: Proof) {
        self.set_stand(Stand::Granted { epoch, proof });
    }

    /// The token that a human must type to confirm that the node is down. It names what may be lost, and changes with
    /// it, so that nobody confirms something else than what was shown.
    pub fn confirm_token(&self, node: NodeId) -> Option<String> {
        let found = self.state.nodes.get(&node)?;
        let vms = self.state.vms.values().filter(|vm| vm.node == node && vm.phase.may_run()).count();
        let only_there = self
            .state
            .groups
            .values()
            .filter(|group| group.record.in_sync.iter().all(|member| *member == node))
            .count();
        let epoch = self.record_epoch();
        Some(format!("{}-is-down.epoch-{}.vms-{vms}.lost-groups-{only_there}", found.spec.name, epoch.0))
    }

    pub(crate) fn on_confirm_down(&mut self, _now: Instant, request: u64, node: NodeId, token: &str) {
        let result = self.confirm_down(node, token).map(|()| Answer::Done);
        self.output(Output::Answer { request, result });
    }

    /// A human's word stands in for the witness only while the witness can not be asked: whoever can be asked decides.
    fn confirm_down(&mut self, node: NodeId, token: &str) -> Result<(), Refusal> {
        let expected = self.confirm_token(node).filter(|_| node != self.me);
        let expected = expected.ok_or_else(|| Refusal::NotFound(format!("no other node {node}")))?;
        let name = self.name_of(node);
        if let Stand::Outdated { why, .. } = &self.stand {
            return Err(Refusal::Unsafe(format!("this node's data are outdated: {why}; it can not go on by itself")));
        }
        if self.peers.each.get(&node).is_none_or(|peer| peer.down_since.is_none()) {
            return Err(Refusal::Conflict(format!(
                "`{name}` is not known to be down: its guard was heard a moment ago"
            )));
        }
        if token != expected {
            return Err(Refusal::Unsafe(format!(
                "if `{name}` still runs, its VMs will run twice and their newest writes are lost; make sure that it is off, \
                 then: pollux node confirm-down {name} --token {expected}"
            )));
        }
        match &self.stand {
            Stand::Granted { .. } => {
                self.fencing.on_human(node, token);
                Ok(())
            }
            Stand::Member { .. } | Stand::Asking if self.partner() == Some(node) => {
                if self.setup.witness && !self.witness.is_unreachable() {
                    return Err(Refusal::Conflict(
                        "the witness can be asked, so it decides; look at: pollux status".into(),
                    ));
                }
                self.fencing.on_human(node, token);
                self.on_granted(self.record_epoch().next(), Proof::Human { token: token.to_owned() });
                Ok(())
            }
            _ => Err(Refusal::Conflict("this node is starting; try again in a moment".into())),
        }
    }

    /// Why nobody may decide anything here now.
    pub(crate) fn why_not_acting(&self) -> Option<String> {
        if self.may_act() {
            return None;
        }
        let partner = self.partner().map_or_else(|| "its peers".into(), |node| format!("`{}`", self.name_of(node)));
        Some(match &self.stand {
            Stand::Forming => format!("the cluster is being formed: waits for {partner}"),
            Stand::Rejoining { .. } => "this node is about to be a member again".into(),
            Stand::Reviving { .. } => "this node goes on alone; it looks whether the witness knows better".into(),
            Stand::Asking if self.setup.witness => match self.witness.trouble() {
                Some(trouble) => format!("{partner} is silent and the witness is not reachable: {trouble}"),
                None => format!("{partner} is silent; the witness is asked"),
            },
            Stand::Asking => format!("{partner} is silent and there is no witness"),
            Stand::Granted { .. } => format!("{partner} is silent; this node is about to go on alone"),
            Stand::Outdated { why, since_unix_ms, .. } => {
                format!("this node is outdated: {why}{}", crate::headline::since_text(*since_unix_ms))
            }
            Stand::Member { .. } if self.log.leader.is_none() => format!("the log has no leader; waits for {partner}"),
            Stand::Member { .. } => "this node is catching up with the log".into(),
        })
    }

    pub(crate) fn name_of(&self, node: NodeId) -> String {
        self.setup.nodes.get(&node).map_or_else(|| node.to_string(), |spec| spec.name.clone())
    }
}
