//! The primary's view of its group: every other replica, what each is asked, and whether requests may go on.
//!
//! A replica's life, seen from here (in `MemberState`): it is away; it is greeted and joins; what may differ is settled or
//! copied (`resync.rs`); it is current. Whoever the record names, or was offered to the control plane to be named, is
//! *required*: nothing is acknowledged and nothing is served without it, until a newer record says otherwise (W1, W3, W5).

use crate::group::Group;
use crate::handshake::{Outcome, Plan, Side, meet, standing};
use crate::key_map::KeyMap;
use crate::local::Origin;
use crate::loss::back_off;
use crate::memory::Unwritten;
use crate::node::{Node, Purpose};
use crate::note::Note;
use crate::range_queue::{Key, RangeQueue};
use crate::repair::Repair;
use crate::requests::Pending;
use crate::resync::Sync;
use crate::scrub::Scrub;
use crate::snapshot::{Ended, Taking};
use crate::trail::{Backlog, Trail};
use crate::verdict::Verdict;
use crate::wire::{Message, Sequence, Standing};
use pollux_base::order::FreezeReason;
use pollux_base::record::Mode;
use pollux_base::unit::BlockRange;
use pollux_base::{ExtentIndex, Instant, NodeId, Request, SnapshotId, Stamp, VolumeId};
use pollux_store::StoreOp;
use std::collections::{BTreeMap, BTreeSet};

/// The life of a replica as its primary sees it reads downwards; from any state it goes back to `Away`.
pub(crate) enum MemberState {
    /// No connection.
    Away,
    /// The record was announced to it; it has not joined yet.
    Greeting,
    /// Required, and what was in flight at the last interruption is being compared and mended. Guests are served beside it, unless it
    /// may lack what was acknowledged.
    Settling(Sync),
    /// Not in sync, and being brought up to date.
    Copying(Sync),
    /// It holds everything and is told so; its durable answer is awaited. `required`: the record names it already.
    Confirming { required: bool },
    /// It holds everything and is needed for every acknowledgement.
    Current,
    /// It follows behind (mode `Async`).
    Trailing,
    /// It cannot take part: replaced, diverged or failed.
    Unfit { reason: String },
}

impl MemberState {
    /// What is brought to it while guests are served.
    pub(crate) fn resync(&self) -> Option<&Sync> {
        match self {
            MemberState::Copying(sync) => Some(sync),
            MemberState::Settling(sync) => Some(sync).filter(|sync| sync.lets_serve()),
            _ => None,
        }
    }
}

pub(crate) struct Member {
    pub state: MemberState,
    pub mode: Mode,
    /// How far it is behind, if it follows (`trail.rs`). Outlives sessions and records.
    pub trail: Option<Trail>,
    /// Since when it has been away or was asked to join.
    pub since: Instant,
    /// When its loss, or that it is current, was last reported.
    pub reported: Option<Instant>,
    /// It has joined; its comparison has not begun.
    pub joined: Option<Joined>,
    /// Kept over sessions and records, until the replica is current: what cannot succeed is tried ever more rarely.
    pub doomed: Option<Doomed>,
}

/// What a replica said of itself, as far as its comparison needs it.
pub(crate) struct Joined {
    pub standing: Standing,
    pub extents: Vec<(VolumeId, Vec<ExtentIndex>)>,
}

/// Plans for a replica that began and came to nothing, one after the other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Doomed {
    pub times: u32,
    /// None begins before.
    pub until: Instant,
}

/// A question to a peer that was not answered yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    pub peer: NodeId,
    pub at: Instant,
    pub what: What,
    /// The peer's pool is full: it answers when there is space, and is not late.
    pub is_held: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum What {
    /// A part of a client's write, zero or flush. `is_received`: the replica has it in memory (mode `Memory`).
    Piece {
        key: Key,
        is_received: bool,
    },
    /// A part of a client's read.
    Read {
        key: Key,
        part: BlockRange,
    },
    /// The differences of what a read is about to show.
    Show {
        key: Key,
        part: BlockRange,
    },
    /// Blocks of it that differed.
    Shown(Key),
    /// A good copy of bad blocks.
    Repair(Key),
    /// The differences of an extent.
    Compare(Key),
    /// Blocks that differed.
    Copy(Key),
    /// Which extents it stores, for a scrub.
    Stored,
    /// The differences of an extent that is scrubbed.
    CompareScrub(Key),
    /// That its own copy of these blocks matches its checksums.
    Verify(Key),
    /// Blocks that were bad there.
    Mend(Key),
    /// That it is current.
    Current,
    /// That it is about to be compared.
    TrailReset,
    /// That everything is durable that a snapshot is about to freeze.
    SnapshotFlush(SnapshotId),
    Snapshot(SnapshotId),
}

/// State that a node has only as primary.
#[derive(Default)]
pub(crate) struct Primary {
    /// A record was adopted as primary in this run.
    pub began: bool,
    /// The primary before, and until when a promise to it binds (W5).
    pub wait_old: Option<(NodeId, Instant)>,
    pub members: BTreeMap<NodeId, Member>,
    /// Peers that gave their lease but not for this group.
    pub refused_by: BTreeSet<NodeId>,
    /// Replicas that are being noted as offered.
    pub noting_offer: BTreeSet<NodeId>,
    /// The note that is being written for that, or for the confirmed birth. One at a time.
    pub noting: Option<Note>,
    /// When the loss of this node's own replica was last reported.
    pub own_loss_reported: Option<Instant>,
    /// Requests that wait for the group to thaw, in the order in which they came. Not bounded here, because a request may
    /// not be failed: front ends bound what each client may have under way, and how many clients there are.
    pub held: BTreeMap<Key, Request>,
    pub queue: RangeQueue,
    pub requests: KeyMap<Key, Pending>,
    /// What trailing replicas may lack.
    pub backlog: Backlog,
    /// Changes that were answered and are not on every replica's disk yet (`memory.rs`).
    pub unwritten: Unwritten,
    /// Requests whose hot marks wait for space.
    pub full_heats: BTreeSet<Key>,
    pub asked: KeyMap<Sequence, Asked>,
    pub repairs: BTreeMap<Key, Repair>,
    pub scrub: Option<Scrub>,
    /// Extents that are hot on any replica, with how many requests are under way on them and when the last ended.
    pub warm: BTreeMap<(VolumeId, ExtentIndex), (usize, Instant)>,
    /// The snapshot that is being taken; how the last one ended, until the record says so.
    pub taking: Option<Taking>,
    /// A snapshot was taken before by this node and not by every replica that counts now only by this primary's word: such
    /// are compared anew.
    pub compares_anew: bool,
    /// Replicas that lost power as this one did, before this primary began, and are not current yet: nobody can have more than they
    /// of what is not here.
    pub fell_with: BTreeSet<NodeId>,
    pub ended: Option<Ended>,
    pub cool_at: Option<Instant>,
    /// The record under which `Reap` was asked.
    pub reaped: Option<Stamp>,
}

impl Primary {
    /// The primary before, if a promise to it still binds.
    pub(crate) fn waits_for(&self, now: Instant) -> Option<NodeId> {
        self.wait_old.filter(|(_, until)| now < *until).map(|(node, _)| node)
    }

    pub(crate) fn member(&mut self, peer: NodeId) -> Option<&mut Member> {
        self.members.get_mut(&peer)
    }

    pub(crate) fn is_current(&self, peer: NodeId) -> bool {
        matches!(self.members.get(&peer), Some(Member { state: MemberState::Current, .. }))
    }
}

impl Group {
    /// Replicas other than this node's without which nothing is acknowledged.
    pub(crate) fn required(&self, me: NodeId) -> BTreeSet<NodeId> {
        self.requires(me).collect()
    }

    /// The same, without a set being made (this is asked for each request); one may be named more than once.
    pub(crate) fn requires(&self, me: NodeId) -> impl Iterator<Item = NodeId> {
        let record = self.spec.as_ref().map(|spec| &spec.record);
        let offers = self.note.as_ref().filter(|note| record.is_some_and(|record| note.newest == record.stamp));
        let offered = offers.into_iter().flat_map(|note| &note.offered);
        let noting = self.primary.iter().flat_map(|primary| &primary.noting_offer).filter(move |_| record.is_some());
        let in_sync = record.into_iter().flat_map(|record| &record.in_sync);
        in_sync.chain(offered).chain(noting).copied().filter(move |node| *node != me)
    }

    /// Why requests are held, if they are.
    pub(crate) fn freeze(&self, node: &Node) -> Option<FreezeReason> {
        let Some(primary) = &self.primary else { return Some(FreezeReason::Outdated) };
        let Some(spec) = self.acting() else { return Some(FreezeReason::Recording) };
        if self.outdated.is_some() {
            return Some(FreezeReason::Outdated);
        }
        if let Some(old) = primary.waits_for(node.now) {
            return Some(FreezeReason::OldPrimaryLease { node: old });
        }
        if spec.record.in_sync.contains(&node.me) && !self.is_member(node) {
            return Some(FreezeReason::ReplicaLost { node: node.me });
        }
        for peer in self.requires(node.me) {
            match primary.members.get(&peer).map(|member| &member.state) {
                None | Some(MemberState::Away | MemberState::Unfit { .. }) => {
                    return Some(FreezeReason::ReplicaLost { node: peer });
                }
                // A snapshot would freeze what differs.
                Some(MemberState::Settling(sync)) if !sync.lets_serve() || self.awaits_snapshot() => {
                    return Some(FreezeReason::Settling { node: peer });
                }
                Some(MemberState::Greeting | MemberState::Copying(_) | MemberState::Trailing) => {
                    return Some(FreezeReason::Settling { node: peer });
                }
                Some(MemberState::Confirming { required: true }) => return Some(FreezeReason::Settling { node: peer }),
                Some(MemberState::Confirming { required: false } | MemberState::Current | MemberState::Settling(_)) => {
                    if primary.refused_by.contains(&peer) || !node.holds_lease_of(peer) {
                        return Some(FreezeReason::NoLease { node: peer });
                    }
                }
            }
        }
        if self.note.as_ref().is_some_and(|note| note.born) {
            return Some(FreezeReason::Recording); // the birth is being confirmed (W12)
        }
        self.awaits_snapshot().then_some(FreezeReason::Snapshot)
    }

    /// Why clients wait. Replication does not wait for keys: what it carries is encrypted.
    pub(crate) fn holds(&self, node: &Node) -> Option<FreezeReason> {
        self.freeze(node).or_else(|| self.lacks_key(node).map(|volume| FreezeReason::NoKey { volume }))
    }

    /// A record under which this node is primary is durable.
    pub(crate) fn on_adopted_as_primary(&mut self, node: &mut Node) {
        let spec = self.spec.clone().expect("adopted");
        let required = self.required(node.me);
        let uncertain = self.forget_unwritten(node);
        let volumes: Vec<VolumeId> = self.ordered_volumes().into_iter().map(|(volume, _)| volume).collect();
        let before = self.note.as_ref().and_then(|note| note.before).filter(|before| *before != node.me);
        let wait_old = before.map(|before| (before, node.link(before).lease.promised_until()));
        let primary = self.primary.as_mut().expect("called for a primary");
        primary.wait_old = wait_old;
        let compares_anew = std::mem::take(&mut primary.compares_anew);
        primary.asked.clear();
        primary.refused_by.clear();
        primary.noting_offer.clear();
        primary.taking = None;
        primary.noting = None;
        primary.own_loss_reported = None;
        if !primary.began {
            primary.began = true;
            primary.backlog.begin(node, spec.record.stamp);
            for volume in volumes {
                for extent in node.store.hot(volume) {
                    primary.warm.insert((volume, extent), (0, node.now));
                }
            }
        }
        // Comparisons begin anew with the replica's `Join` under the new record. What is current and still required stays
        // so: this primary has had it in its hands without a break.
        let replicas = spec.replicas.iter().chain(&spec.record.in_sync).copied();
        let replicas: BTreeSet<NodeId> = replicas.filter(|replica| *replica != node.me).collect();
        let mut old = std::mem::take(&mut primary.members);
        let (mut ended, mut flushed) = (Vec::new(), Vec::new());
        for replica in replicas {
            let is_linked = node.session(replica).is_some();
            let mut member = old.remove(&replica).unwrap_or(Member {
                state: MemberState::Away,
                mode: spec.mode(replica),
                trail: None,
                since: node.now,
                reported: None,
                joined: None,
                doomed: None,
            });
            member.reported = None;
            member.joined = None;
            let is_named = spec.record.in_sync.contains(&replica);
            let was_current = matches!(member.state, MemberState::Current) && (is_named || !compares_anew);
            let was_early = std::mem::replace(&mut member.mode, spec.mode(replica)) == Mode::Memory;
            if was_current && required.contains(&replica) && was_early && (uncertain || member.mode != Mode::Memory) {
                flushed.push(replica);
            }
            if member.mode != Mode::Async {
                member.trail = None;
            }
            if !(was_current && required.contains(&replica)) {
                if was_current || !matches!(member.state, MemberState::Away) {
                    member.since = node.now;
                }
                let state = if is_linked { MemberState::Greeting } else { MemberState::Away };
                ended.push((replica, std::mem::replace(&mut member.state, state)));
            }
            primary.members.insert(replica, member);
        }
        ended.extend(old.into_iter().map(|(replica, member)| (replica, member.state)));
        for (replica, state) in ended {
            self.end_sync(node, replica, state);
        }
        self.restart_check(node);
        self.pass_on_deleted();
        for peer in &required {
            self.want_lease(node, *peer);
        }
        // What they had in memory under the record before is on their disks when they say so anew.
        for peer in flushed {
            self.confirm_member(node, peer);
        }
        self.resume_requests(node);
        self.begin_joined(node);
        self.confirm_birth(node);
        self.reap(node);
    }

    /// The record names another primary: what clients have under way here is not answered any more (their connections end
    /// with `Served`), and what is not on its way to the disk is dropped.
    pub(crate) fn step_down(&mut self, node: &mut Node) {
        let generation = self.generation();
        self.drop_scrub(node);
        let members = self.primary.take().map(|primary| primary.members).unwrap_or_default();
        for (peer, member) in members {
            self.end_sync(node, peer, member.state);
        }
        self.local.drop_unbegun(node, self.id, generation, |origin| {
            !matches!(origin, Origin::Peer { .. } | Origin::Trail { .. })
        });
    }

    /// Asks for the peer's lease at once, if that is not going on already.
    pub(crate) fn want_lease(&self, node: &mut Node, peer: NodeId) {
        let now = node.now;
        let link = node.link(peer);
        if link.next_ask.is_none() {
            link.next_ask = Some(now);
            link.heard = now; // quiet because nothing was asked is not silent
        }
    }

    pub(crate) fn on_link_up(&mut self, node: &mut Node, peer: NodeId) {
        self.claims.remove(&peer);
        if self.acting().is_some()
            && let Some(member) = self.primary.as_mut().and_then(|primary| primary.member(peer))
        {
            member.state = MemberState::Greeting;
        }
        self.announce(node, peer);
        if self.acting().is_some_and(|spec| spec.record.primary == peer) {
            self.send_join(node);
        }
    }

    /// The session with the peer is over. `since`: when it was last heard.
    pub(crate) fn on_link_down(&mut self, node: &mut Node, peer: NodeId, since: Instant) {
        self.claims.remove(&peer);
        self.forget_trail_of(peer);
        let generation = self.generation();
        self.peer_asks.retain(|(from, _, _), _| *from != peer);
        self.local.drop_unbegun(
            node,
            self.id,
            generation,
            |origin| matches!(origin, crate::local::Origin::Peer { peer: from, .. } if *from == peer),
        );
        let Some(primary) = &mut self.primary else { return };
        primary.asked.retain(|_, asked| asked.peer != peer);
        self.unwritten_without(node, peer);
        self.snapshot_without(peer);
        let Some(primary) = &mut self.primary else { return };
        if let Some(member) = primary.member(peer) {
            if !matches!(member.state, MemberState::Away | MemberState::Greeting | MemberState::Unfit { .. }) {
                member.since = since;
            }
            member.joined = None;
            let state = std::mem::replace(&mut member.state, MemberState::Away);
            self.end_sync(node, peer, state);
        }
        self.restart_check(node);
        self.without_peer(node, peer);
        self.repair_without(node, peer);
    }

    /// This node's own replica fell out, as primary (W6).
    pub(crate) fn on_own_replica_lost(&mut self, node: &mut Node) {
        self.drop_scrub(node);
        // What was under way with the lost disk goes on, or begins anew, once the record without it is ordered.
        let stopped: Vec<NodeId> = self.primary.iter().flat_map(|primary| primary.members.keys().copied()).collect();
        for peer in stopped {
            let required = self.required(node.me).contains(&peer);
            if let Some(member) = self.primary.as_mut().and_then(|primary| primary.member(peer))
                && matches!(member.state, MemberState::Settling(_) | MemberState::Copying(_))
            {
                let next = match required {
                    // Its requests under way are sent anew; there is nothing here to compare with.
                    true => MemberState::Current,
                    false => MemberState::Unfit { reason: "the primary has no replica to copy from".to_string() },
                };
                let state = std::mem::replace(&mut member.state, next);
                self.end_sync(node, peer, state);
                if !required {
                    self.end_trail(peer);
                }
            }
        }
        self.resume_requests(node);
    }

    /// A replica tells how it stands to the record under which we both act.
    pub(crate) fn on_join(
        &mut self,
        node: &mut Node,
        peer: NodeId,
        standing: Standing,
        extents: Vec<(VolumeId, Vec<ExtentIndex>)>,
    ) {
        let required = self.required(node.me).contains(&peer);
        let Some(outcome) = self.outcome(node, peer, &standing) else { return };
        let Some(primary) = &mut self.primary else { return };
        primary.refused_by.remove(&peer);
        if primary.wait_old.is_some_and(|(old, _)| old == peer) {
            primary.wait_old = None; // the old primary has durably adopted this record: it serves no more (W5)
        }
        let Some(member) = primary.member(peer) else { return };
        let joins = matches!(member.state, MemberState::Away | MemberState::Greeting | MemberState::Unfit { .. });
        if outcome.plan == (Plan::Refuse { who: peer }) {
            let reason = match &standing {
                Standing::Failed { reason } => reason.clone(),
                Standing::Diverged { own } => format!("{}, {own:?}", outcome.rule.text()),
                _ => outcome.rule.text().to_string(),
            };
            self.make_unfit(node, peer, reason);
            return;
        }
        if !joins {
            return; // ignore_join_again: it answers each announcement
        }
        if outcome.plan == (Plan::Refuse { who: node.me }) {
            self.verdict = Verdict::Empty; // the other has data of a confirmed birth, and nothing is here (W12)
            return;
        }
        if let Standing::Trailing { run, position, .. } = standing
            && self.resume_trail(node, peer, run, position)
        {
            return;
        }
        let Some(member) = self.primary.as_mut().and_then(|primary| primary.member(peer)) else { return };
        if let Some(doomed) = member.doomed.filter(|doomed| node.now < doomed.until) {
            let reason = format!("its last {} attempts came to nothing; it is tried again later", doomed.times);
            member.state = MemberState::Unfit { reason };
            return;
        }
        member.joined = Some(Joined { standing, extents });
        if required {
            self.resend_to(node, peer);
        }
        self.begin_joined(node);
    }

    /// Begins the comparisons of replicas that have joined.
    ///
    /// Whose blocks are right? Where they differ, a write was under way and never acknowledged, so either would do; but a
    /// primary whose node lost power may have lost with it what was acknowledged and not flushed. A member whose node did
    /// not has all of that. So such a primary waits for all required replicas, takes over the blocks of one that has lived
    /// on, if there is one, and only then passes them on to others.
    pub(crate) fn begin_joined(&mut self, node: &mut Node) {
        let required = self.required(node.me);
        if self.acting().is_none() {
            return;
        }
        let is_member = self.is_member(node);
        let Some(primary) = &mut self.primary else { return };
        if !self.is_continuous && is_member {
            let all =
                required.iter().all(|peer| primary.members.get(peer).is_some_and(|member| member.joined.is_some()));
            if !all {
                return;
            }
            let joined: Vec<(NodeId, Outcome)> = self.joined_outcomes(node);
            let lived_on = |outcome: &Outcome| matches!(outcome.plan, Plan::Settle { source, .. } if source != node.me);
            if let Some((source, outcome)) = joined.into_iter().find(|(_, outcome)| lived_on(outcome)) {
                self.begin_sync(node, source, outcome.plan);
                return;
            }
            self.is_continuous = true;
            if let Some(primary) = &mut self.primary {
                primary.fell_with = required;
            }
            self.note_as_primary(node);
        }
        // Who is not in sync waits until the log knows how a snapshot ended: else it might be called current without it.
        let is_taking = self.spec.as_ref().is_some_and(|spec| spec.snapshots.untaken().is_some());
        for (peer, outcome) in self.joined_outcomes(node) {
            if !(is_taking && matches!(outcome.plan, Plan::Copy { .. })) {
                self.begin_sync(node, peer, outcome.plan);
            }
        }
    }

    /// How this node's own replica stands to the record under which it acts.
    pub(crate) fn own_standing(&self, node: &Node) -> Standing {
        let is_blank = |volume: &VolumeId| node.store.allocated(*volume).is_empty();
        let is_copy = self.spec.as_ref().is_some_and(|spec| !spec.snapshots.origins.is_empty());
        // A group that is born as a copy is blank as long as nothing was written: whoever was born and is not confirmed has
        // the copy, too, and has never served (`lacks_origin`).
        let blank = || is_copy || self.ordered_volumes().iter().all(|(volume, _)| is_blank(volume));
        // Only a member says so, and looking costs.
        let blank = matches!(self.verdict, Verdict::Member { .. }) && blank();
        match standing(self.verdict, blank, self.is_continuous, node.pool_failed.as_deref()) {
            Standing::Trailing { at, .. } => {
                let (run, position) = self.trailing.place();
                Standing::Trailing { at, run, position }
            }
            standing => standing,
        }
    }

    /// What a replica's standing leads to (`handshake.rs`).
    fn outcome(&self, node: &Node, peer: NodeId, theirs: &Standing) -> Option<Outcome> {
        let spec = self.acting()?;
        let required = self.required(node.me).contains(&peer);
        let own = self.own_standing(node);
        Some(meet(spec, required, Side { node: node.me, standing: &own }, Side { node: peer, standing: theirs }))
    }

    /// Replicas that have joined and wait for their comparison, with what each leads to.
    fn joined_outcomes(&self, node: &Node) -> Vec<(NodeId, Outcome)> {
        let members = self.primary.iter().flat_map(|primary| &primary.members);
        let joined = members.filter_map(|(peer, member)| Some((*peer, &member.joined.as_ref()?.standing)));
        joined.filter_map(|(peer, theirs)| Some((peer, self.outcome(node, peer, theirs)?))).collect()
    }

    /// The replica cannot take part. If it is required, its loss is reported at once.
    pub(crate) fn make_unfit(&mut self, node: &mut Node, peer: NodeId, reason: String) {
        let Some(member) = self.primary.as_mut().and_then(|primary| primary.member(peer)) else { return };
        if matches!(member.state, MemberState::Unfit { .. }) {
            return;
        }
        member.since = node.now;
        member.joined = None;
        if matches!(member.state, MemberState::Settling(_) | MemberState::Copying(_) | MemberState::Confirming { .. }) {
            let times = member.doomed.map_or(0, |doomed| doomed.times) + 1;
            member.doomed = Some(Doomed { times, until: node.now + back_off(times) });
        }
        let state = std::mem::replace(&mut member.state, MemberState::Unfit { reason });
        if let Some(primary) = &mut self.primary {
            primary.asked.retain(|_, asked| asked.peer != peer);
        }
        self.unwritten_without(node, peer);
        self.end_trail(peer);
        self.end_sync(node, peer, state);
        self.restart_check(node);
        self.without_peer(node, peer);
        self.repair_without(node, peer);
    }

    /// Everything it may lack is there: it is told, and notes it durably, before it may be named or counted on.
    pub(crate) fn confirm_member(&mut self, node: &mut Node, peer: NodeId) {
        let named = self.spec.as_ref().is_some_and(|spec| spec.record.in_sync.contains(&peer));
        let Some(member) = self.primary.as_mut().and_then(|primary| primary.member(peer)) else { return };
        member.state = MemberState::Confirming { required: named };
        self.want_lease(node, peer);
        let Some((sequence, stamp)) = self.ask(node, peer, What::Current) else { return };
        node.send_bare(peer, Message::Current { group: self.id, stamp, sequence });
    }

    /// The replica has flushed and noted that it is current.
    pub(crate) fn on_confirmed(&mut self, node: &mut Node, peer: NodeId) {
        let Some(primary) = &mut self.primary else { return };
        let Some(member) = primary.members.get_mut(&peer) else { return };
        let MemberState::Confirming { required } = member.state else { return };
        member.doomed = None;
        primary.fell_with.remove(&peer);
        if required {
            member.state = MemberState::Current;
            self.confirm_birth(node);
            self.reap(node);
        } else {
            // W9: needed for every acknowledgement from now on, durably so before anybody hears that it may be named.
            primary.noting_offer.insert(peer);
            self.note_as_primary(node);
        }
    }

    /// The birth is real when every replica that the record names has confirmed that nothing existed (W12).
    fn confirm_birth(&mut self, node: &mut Node) {
        let is_born = self.note.as_ref().is_some_and(|note| note.born);
        let Some(primary) = &self.primary else { return };
        if is_born && self.is_member(node) && self.required(node.me).iter().all(|peer| primary.is_current(*peer)) {
            self.note_as_primary(node);
        }
    }

    /// Writes the note with what this primary has to add: its offers, that its birth is confirmed, that it is whole.
    pub(crate) fn note_as_primary(&mut self, node: &mut Node) {
        let (confirmed, whole_in_boot) = (self.required(node.me), self.whole_in_boot(node));
        let (Some(mut note), Some(primary), id) = (self.note.clone(), &mut self.primary, self.id) else { return };
        if primary.noting.is_some() || self.adopting.is_some() {
            return; // it is called again when that note is durable
        }
        note.offered.extend(&primary.noting_offer);
        if note.born && confirmed.iter().all(|peer| primary.is_current(*peer)) {
            note.born = false;
            note.in_sync_at = Some(note.newest);
        }
        note.whole_in_boot = whole_in_boot;
        primary.noting = Some(note.clone());
        let op = StoreOp::PutNote { group: id, note: Some(note.encode()) };
        node.request(id, Purpose::NotePrimary(note.newest), op);
    }

    /// The note is durable.
    pub(crate) fn on_primary_noted(&mut self, node: &mut Node, stamp: Stamp) {
        if self.acting().is_none_or(|spec| spec.record.stamp != stamp) {
            return; // ignore_superseded: a newer record came meanwhile
        }
        let is_whole = self.whole_in_boot(node);
        let Some(primary) = &mut self.primary else { return };
        let Some(note) = primary.noting.take() else { return };
        if !note.born && self.verdict == Verdict::Born {
            self.verdict = Verdict::Member { at: stamp };
        }
        for peer in &note.offered {
            if primary.noting_offer.remove(peer)
                && let Some(member) = primary.members.get_mut(peer)
                && matches!(member.state, MemberState::Confirming { required: false })
            {
                member.state = MemberState::Current;
            }
        }
        let again = !primary.noting_offer.is_empty() || note.whole_in_boot != is_whole;
        self.note = Some(note);
        if again {
            self.note_as_primary(node);
        }
        self.confirm_birth(node);
    }

    /// A question to the peer under the record under which this node acts.
    pub(crate) fn ask(&mut self, node: &mut Node, peer: NodeId, what: What) -> Option<(Sequence, Stamp)> {
        let stamp = self.acting()?.record.stamp;
        let sequence = node.next_sequence();
        self.primary.as_mut()?.asked.push(sequence, Asked { peer, at: node.now, what, is_held: false });
        Some((sequence, stamp))
    }

    /// Whether every replica that the group should have is in sync and here.
    pub(crate) fn is_complete(&self, node: &Node) -> bool {
        let (Some(spec), Some(primary)) = (self.acting(), &self.primary) else { return false };
        let whole = |replica: &NodeId| spec.record.in_sync.contains(replica) || self.has_caught_up(*replica);
        spec.replicas.iter().all(whole)
            && self.is_member(node)
            && self.required(node.me).iter().all(|peer| primary.is_current(*peer))
    }

    /// All replicas have everything: extents kept to tell of their change are not needed any more.
    fn reap(&mut self, node: &mut Node) {
        let stamp = self.acting().map(|spec| spec.record.stamp);
        let (is_complete, id) = (self.is_complete(node), self.id);
        let Some(primary) = &mut self.primary else { return };
        if is_complete && primary.reaped != stamp {
            primary.reaped = stamp;
            node.request(id, Purpose::Background, StoreOp::Reap { group: id });
        }
    }

    pub(crate) fn check_primary(&self, node: &Node) {
        let Some(primary) = &self.primary else { return };
        let me = node.me;
        assert!(!primary.members.contains_key(&me), "a primary is not its own peer");
        self.check_unwritten();
        self.check_trails();
        for (key, pending) in primary.requests.iter() {
            pending.check(key);
        }
        for (peer, member) in &primary.members {
            if let MemberState::Settling(sync) | MemberState::Copying(sync) = &member.state {
                assert!(node.session(*peer).is_some(), "a resync has a session");
                sync.check();
            }
            if matches!(member.state, MemberState::Current) && self.acting().is_some() {
                assert!(self.required(me).contains(peer), "what counts as current is required");
            }
        }
    }
}
