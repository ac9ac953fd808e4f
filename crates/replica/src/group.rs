//! One group on this node: which record holds, what is durable of it, and how this replica stands to it.
//!
//! A newer record is adopted in this order, so that a crash at any point leaves too many candidates and never too few:
//! volumes made known and hot extents raised to the new generation (`Remark`, W8), then the note, then anything is said or
//! acknowledged under it (W2, W3). Adopting it as a primary holds all requests meanwhile.

use crate::cipher::Cipher;
use crate::diff::Diff;
use crate::kept;
use crate::local::Local;
use crate::node::{Node, Purpose};
use crate::note::Note;
use crate::primary::Primary;
use crate::range_queue::Key;
use crate::report::Reported;
use crate::secondary::PeerAsk;
use crate::trailing::Trailing;
use crate::verdict::{Verdict, verdict};
use crate::wire::{Frame, Message, Sequence};
use crate::{Output, report};
use pollux_base::order::{Finding, ScrubReport};
use pollux_base::record::{GroupNames, GroupSpec};
use pollux_base::unit::{BLOCK_BYTES, VOLUME_BYTES_MAX};
use pollux_base::{ByteCount, Generation, GroupId, Instant, KeyId, NodeId, Session, Stamp, VolumeId};
use pollux_store::{StoreError, StoreOp};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// How soon a full pool is tried again: space comes from people or from deletions, not within milliseconds.
pub(crate) const FULL_RETRY: Duration = Duration::from_millis(500);
/// Frames of a primary that wait for its record to be durable here. It has some hundred requests under way at most, and a
/// note takes milliseconds.
const EARLY_MAX: usize = 4096;

/// A record on its way to be durable.
#[derive(Debug)]
pub(crate) struct Adopting {
    /// Tells this attempt from earlier ones.
    round: Key,
    /// What is still to be asked of the store, one after the other; the first is under way.
    left: VecDeque<StoreOp>,
    /// All that has ended, and the note is being written.
    noting: bool,
    note: Note,
    /// The pool was full: when to begin again.
    retry: Option<Instant>,
}

pub(crate) struct Group {
    pub id: GroupId,
    /// Newest record known, if its text is known and not just its stamp (`note`).
    pub spec: Option<GroupSpec>,
    /// As it is on disk.
    pub note: Option<Note>,
    pub verdict: Verdict,
    pub adopting: Option<Adopting>,
    /// Stamp of the record under which this node acts.
    pub adopted: Option<Stamp>,
    /// A stamp that a human gave up, until it is applied.
    pub discard: Option<Stamp>,
    /// Since this replica last held everything for certain its node has not lost power: it has all that was acknowledged,
    /// also what was not flushed. Durably so in its note, for the death of the process alone.
    pub is_continuous: bool,
    /// A peer knows this newer record.
    pub outdated: Option<Stamp>,
    pub local: Local,
    /// When the local jobs that found the pool full are tried again.
    pub full_retry: Option<Instant>,
    pub primary: Option<Primary>,
    /// What peers asked and is being done.
    pub peer_asks: BTreeMap<(NodeId, Session, Sequence), PeerAsk>,
    early: VecDeque<(NodeId, Session, Frame)>,
    /// Peers that announced themselves as primary by an older record than is known here, in their present session: their
    /// leases do not cover this group.
    pub claims: BTreeSet<NodeId>,
    /// What it does as a trailing replica.
    pub trailing: Trailing,
    pub healed: u64,
    /// Evidence of bad blocks, the newest last (`scrub.rs`).
    pub findings: VecDeque<Finding>,
    /// A scrub that is to be made, and the last that was.
    pub scrub_wanted: Option<u64>,
    pub scrubbed: Option<ScrubReport>,
    pub reported: Reported,
    served: BTreeSet<VolumeId>,
    /// The difference of two snapshots that somebody asked for.
    pub diff: Option<Diff>,
    /// What was kept and is being deleted.
    pub dropping: BTreeSet<VolumeId>,
    /// What a human gave up, and the evidence that is made of it.
    pub keeping: Option<(Stamp, Vec<(VolumeId, VolumeId)>)>,
    /// A record is adopted as soon as nothing is under way at the store.
    pub awaits_rest: bool,
    /// What people call it and its volumes, and the notes of that which the store was asked to keep.
    pub names: Option<GroupNames>,
    pub names_asked: Option<BTreeMap<GroupId, Vec<u8>>>,
}

impl Group {
    /// `boot`: the present one of this node.
    pub(crate) fn new(id: GroupId, note: Option<Note>, boot: u128) -> Group {
        let is_continuous = note.as_ref().is_some_and(|note| note.whole_in_boot == Some(boot));
        Group {
            id,
            spec: None,
            note,
            verdict: Verdict::Absent,
            adopting: None,
            adopted: None,
            discard: None,
            is_continuous,
            outdated: None,
            local: Local::default(),
            full_retry: None,
            primary: None,
            peer_asks: BTreeMap::new(),
            early: VecDeque::new(),
            claims: BTreeSet::new(),
            trailing: Trailing::default(),
            healed: 0,
            findings: VecDeque::new(),
            scrub_wanted: None,
            scrubbed: None,
            reported: report::Reported::default(),
            served: BTreeSet::new(),
            diff: None,
            dropping: BTreeSet::new(),
            keeping: None,
            awaits_rest: false,
            names: None,
            names_asked: None,
        }
    }

    /// Newest stamp known in any way.
    pub(crate) fn known(&self) -> Option<Stamp> {
        self.spec.as_ref().map(|spec| spec.record.stamp).max(self.note.as_ref().map(|note| note.newest))
    }

    /// Primary of the newest record known.
    pub(crate) fn known_primary(&self) -> Option<NodeId> {
        let known = self.known()?;
        let spec = self.spec.as_ref().filter(|spec| spec.record.stamp == known).map(|spec| spec.record.primary);
        spec.or(self.note.as_ref().map(|note| note.primary))
    }

    /// The record under which this node acts now; none while a newer one is being made durable.
    pub(crate) fn acting(&self) -> Option<&GroupSpec> {
        self.spec.as_ref().filter(|spec| self.adopting.is_none() && self.adopted == Some(spec.record.stamp))
    }

    pub(crate) fn generation(&self) -> Generation {
        self.known().map_or(Generation(0), |stamp| stamp.generation)
    }

    /// Whether this replica takes part, and if not why.
    pub(crate) fn fit(&self, node: &Node) -> Result<(), String> {
        if let Some(reason) = &node.pool_failed {
            return Err(reason.clone());
        }
        match self.verdict {
            Verdict::Member { .. } | Verdict::Born | Verdict::Stale { .. } | Verdict::Trailing { .. } => Ok(()),
            Verdict::Empty => Err("its disk is empty although the record names it in sync".to_string()),
            Verdict::Diverged { own } => Err(format!("it holds writes of another history, {own:?}")),
            Verdict::Absent | Verdict::Outdated { .. } | Verdict::Discarded { .. } => {
                Err("there is no replica here".to_string())
            }
        }
    }

    /// Whether this node's own replica is one of the in-sync set and usable. The primary's need not be (W6).
    pub(crate) fn is_member(&self, node: &Node) -> bool {
        node.pool_failed.is_none()
            && matches!(self.verdict, Verdict::Member { .. } | Verdict::Born)
            && self.spec.as_ref().is_some_and(|spec| spec.record.in_sync.contains(&node.me))
    }

    /// Size of a volume of the group in blocks.
    pub(crate) fn blocks(&self, volume: VolumeId) -> Option<u64> {
        self.spec.as_ref()?.size(volume).map(|size| size.0 / BLOCK_BYTES)
    }

    /// Keys of its volumes.
    pub(crate) fn keys(&self) -> BTreeSet<KeyId> {
        self.spec.iter().flat_map(|spec| spec.keys.values().copied()).collect()
    }

    /// A volume that is encrypted, and its key is not here.
    pub(crate) fn lacks_key(&self, node: &Node) -> Option<VolumeId> {
        let mut keys = self.spec.iter().flat_map(|spec| &spec.keys);
        keys.find(|(_, key)| node.keys.get(**key).is_none()).map(|(volume, _)| *volume)
    }

    /// What stands between the clients of this volume and what is stored of it, if something does.
    pub(crate) fn cipher(&self, node: &Node, volume: VolumeId) -> Option<Arc<Cipher>> {
        let key = self.spec.as_ref()?.key(volume)?;
        // Requests are held as long as a key is missing, and keys stay as long as the group.
        Some(node.keys.get(key).expect("nothing of an encrypted volume begins without its key").clone())
    }

    /// Takes a record, from the log by an order or from a peer. `by_order` decides which of two texts of one stamp holds.
    pub(crate) fn on_record(&mut self, node: &mut Node, mut spec: GroupSpec, by_order: bool) {
        if !is_plausible(&spec) {
            return; // ignore_implausible: a peer's text that no log can have made
        }
        // Also of a newer record: what is under way is encrypted, or not, as the volume was born.
        let is_other = |have: &GroupSpec| {
            let mut both = have.volumes.keys().filter(|volume| spec.volumes.contains_key(volume));
            both.any(|volume| have.keys.get(volume) != spec.keys.get(volume))
        };
        if self.spec.as_ref().is_some_and(is_other) {
            return; // ignore_implausible
        }
        match self.known() {
            Some(known) if spec.record.stamp < known => return, // ignore_outdated (W2)
            Some(known) if spec.record.stamp == known => {
                if let Some(have) = self.spec.as_ref().filter(|have| have.record.stamp == known) {
                    // Volumes are added and grow under one generation. They never shrink or go under it, so that it does
                    // not matter in which order order and announcement come.
                    for (volume, size) in &have.volumes {
                        let entry = spec.volumes.entry(*volume).or_insert(*size);
                        *entry = (*entry).max(*size);
                    }
                    spec.keys.extend(&have.keys);
                    if !by_order {
                        spec.replicas = have.replicas.clone();
                    }
                    if spec.snapshots.revision < have.snapshots.revision {
                        spec.snapshots = have.snapshots.clone();
                    }
                    let is_same =
                        spec.volumes == have.volumes && spec.keys == have.keys && spec.replicas == have.replicas;
                    if let Some(primary) = &mut self.primary {
                        let unseen = spec.snapshots.taken().any(|(id, _)| !have.snapshots.each.contains_key(&id));
                        primary.compares_anew |= unseen;
                    }
                    if is_same && spec.snapshots == have.snapshots {
                        if self.discard.is_none() {
                            return;
                        }
                        spec = have.clone();
                    }
                }
            }
            _ => {}
        }
        if self.outdated.is_some_and(|outdated| spec.record.stamp >= outdated) {
            self.outdated = None;
        }
        let is_primary = spec.record.primary == node.me;
        if self.known() != Some(spec.record.stamp) {
            self.peer_asks.clear(); // what is still being done for them is not answered any more
        }
        self.spec = Some(spec);
        let (stamp, generation) = (self.known().expect("just set"), self.generation());
        // Peers ask again under the newer record; what an older primary asked is not begun any more (W2).
        let stale = |origin: &crate::local::Origin| matches!(origin, crate::local::Origin::Peer { stamp: asked, .. } if *asked != stamp);
        self.local.drop_unbegun(node, self.id, generation, stale);
        if self.is_to_roll_back() && self.primary.is_some() {
            // Clients begin anew, and so does everything here: nothing that was asked before may be seen after it.
            self.withdraw(node);
            self.step_down(node);
        }
        match (is_primary, self.primary.is_some()) {
            (true, false) => self.primary = Some(Primary::default()),
            (false, true) => self.step_down(node),
            (true, true) | (false, false) => {}
        }
        self.update_served(node);
        self.adopt(node);
    }

    /// A human gave up the writes of `loser` (W10).
    pub(crate) fn on_discard(&mut self, node: &mut Node, loser: Stamp) {
        self.discard = Some(loser);
        if let (Verdict::Diverged { own }, Some(spec)) = (self.verdict, self.spec.clone())
            && own == loser
        {
            self.on_record(node, spec, true);
        }
    }

    /// Begins to make the present record durable.
    pub(crate) fn adopt(&mut self, node: &mut Node) {
        if !self.rests_before_adopting(node) {
            return;
        }
        // What was begun before a rollback must not land after it.
        self.awaits_rest = self.is_to_roll_back() && !self.local.is_idle() && node.pool_failed.is_none();
        if self.awaits_rest {
            self.adopting = None;
            return;
        }
        let spec = self.spec.clone().expect("a record is adopted after it was taken");
        let stamp = spec.record.stamp;
        let mut base = self.note.clone();
        let mut judged = verdict(base.as_ref(), &spec, node.me, self.discard);
        let is_discarded = matches!(judged, Verdict::Discarded { .. });
        if let (Verdict::Discarded { .. }, Some(note)) = (judged, &mut base) {
            note.in_sync_at = None;
            note.joined_at = None;
            note.trails = None;
            judged = verdict(base.as_ref(), &spec, node.me, None);
        }
        if judged == Verdict::Born && self.lacks_origin(node) {
            judged = Verdict::Empty;
        }
        self.verdict = judged;
        let is_member = matches!(judged, Verdict::Member { .. } | Verdict::Born);
        // By its primary's word it counts before a record names it: nothing was acknowledged without it since.
        let joined_at = base.as_ref().and_then(|note| note.joined_at);
        self.is_continuous &= is_member || joined_at == Some(stamp);
        let before = match &base {
            Some(note) if note.primary == spec.record.primary => match &self.primary {
                // In this run the wait for the one before may be over already.
                Some(primary) if primary.began => primary.waits_for(node.now),
                _ => note.before,
            },
            Some(note) => Some(note.primary),
            None => None,
        };
        let same = base.as_ref().filter(|note| note.newest == stamp);
        let note = Note {
            newest: stamp,
            primary: spec.record.primary,
            before,
            in_sync_at: match judged {
                Verdict::Member { .. } => Some(stamp),
                Verdict::Born => None,
                _ => base.as_ref().and_then(|note| note.in_sync_at),
            },
            joined_at: joined_at.filter(|_| !is_member),
            born: match judged {
                Verdict::Born => true,
                Verdict::Empty => base.as_ref().is_some_and(|note| note.born),
                _ => false,
            },
            offered: same.map(|note| note.offered.clone()).unwrap_or_default(),
            whole_in_boot: self.whole_in_boot(node),
            trails: if is_member { None } else { base.as_ref().and_then(|note| note.trails) },
        };
        let round = node.next_key();
        self.adopting = Some(Adopting { round, left: VecDeque::new(), noting: false, note, retry: None });

        // A replica that is out of use, or not asked for its word, holds up nobody: its node acts by the record alone.
        // If it comes back it comes with its old note, as stale (W6).
        if node.pool_failed.is_some()
            || judged == Verdict::Absent && self.note.is_none()
            || spec.record.primary == node.me && !spec.record.in_sync.contains(&node.me)
        {
            if node.pool_failed.is_none() && judged != Verdict::Absent {
                self.put_note(node, Purpose::Background);
            }
            self.on_adopted(node);
            return;
        }
        let mut ops = VecDeque::new();
        if is_discarded || matches!(judged, Verdict::Stale { since: Some(_) }) {
            ops.extend(self.keep_op(node, base.as_ref(), is_discarded));
        }
        if is_member || matches!(judged, Verdict::Stale { .. } | Verdict::Trailing { .. } | Verdict::Empty) {
            ops.extend(self.shape_ops(node, is_member));
        }
        ops.extend(self.spool_op(node));
        if is_member {
            ops.push_back(StoreOp::Remark { group: self.id, generation: stamp.generation });
        }
        self.adopting.as_mut().expect("just set").left = ops;
        self.adopt_next(node);
    }

    /// Begins the next step of adopting: they build on each other. The note is the last.
    fn adopt_next(&mut self, node: &mut Node) {
        let adopting = self.adopting.as_mut().expect("called by a step of adopting");
        let round = adopting.round;
        match adopting.left.front() {
            Some(op) => node.request(self.id, Purpose::Adopt(round), op.clone()),
            None => {
                adopting.noting = true;
                self.put_note(node, Purpose::Adopt(round));
            }
        }
    }

    fn put_note(&mut self, node: &mut Node, purpose: Purpose) {
        let note = &self.adopting.as_ref().expect("called by a step of adopting").note;
        node.request(self.id, purpose, StoreOp::PutNote { group: self.id, note: Some(note.encode()) });
    }

    /// A step of making the record durable has ended.
    pub(crate) fn on_adopt_step(&mut self, node: &mut Node, round: Key, result: Result<(), StoreError>) {
        let Some(adopting) = self.adopting.as_mut().filter(|adopting| adopting.round == round) else {
            return; // ignore_superseded: a newer record came meanwhile
        };
        match result {
            Ok(()) => {}
            Err(StoreError::Full) if adopting.left.front().is_some_and(kept::is_optional) => {}
            Err(StoreError::Full) => {
                adopting.retry = Some(node.now + FULL_RETRY);
                return;
            }
            Err(error) => {
                self.fail_pool(node, &error.to_string());
                return;
            }
        }
        if adopting.noting {
            return self.on_adopted(node);
        }
        adopting.left.pop_front();
        self.adopt_next(node);
    }

    /// The store ended something for a local job: the job's end, if this was it.
    pub(crate) fn on_local_ended(
        &mut self,
        node: &mut Node,
        generation: Generation,
        key: Key,
        result: crate::local::JobResult,
    ) -> Option<(crate::local::Origin, crate::local::JobResult)> {
        let had_received = self.local.has_received();
        let ended = self.local.on_ended(node, self.id, generation, key, result);
        if self.awaits_rest && self.local.is_idle() {
            self.adopt(node);
        }
        if had_received && !self.local.has_received() && self.primary.is_some() {
            self.note_as_primary(node); // it holds everything on disk now
        }
        ended
    }

    /// The record is durable: it is acted upon.
    fn on_adopted(&mut self, node: &mut Node) {
        let adopting = self.adopting.take().expect("called when adopting ends");
        let spec = self.spec.clone().expect("adopted");
        self.note = Some(adopting.note);
        self.adopted = Some(spec.record.stamp);
        self.discard = None;
        self.forget_lacking_snapshots(node);
        if self.is_member(node) {
            self.drop_kept(node);
        }
        if self.verdict != Verdict::Absent {
            self.put_names(node);
        }
        for volume in self.deleted_snapshots(node) {
            node.request(self.id, Purpose::Background, StoreOp::Delete { volume });
        }
        // First of all: what is asked under this record finds it known.
        let peers: Vec<NodeId> = node.links.keys().copied().collect();
        for peer in peers {
            self.announce(node, peer);
        }
        if self.primary.is_some() {
            self.on_adopted_as_primary(node);
        }
        if self.verdict == Verdict::Absent && spec.record.primary != node.me {
            return self.erase(node);
        }
        if self.verdict == Verdict::Absent {
            self.erase_volumes(node); // a guest here is served through a peer (W6)
        }
        if spec.record.primary != node.me {
            self.send_join(node);
        }
        for (peer, session, frame) in std::mem::take(&mut self.early) {
            if node.session(peer) == Some(session) {
                self.on_frame(node, peer, session, frame);
            }
        }
    }

    /// Tells a peer of the record under which this node acts, if it concerns it.
    pub(crate) fn announce(&mut self, node: &mut Node, peer: NodeId) {
        let Some(spec) = self.acting() else { return };
        let was_primary = self.note.as_ref().is_some_and(|note| note.before == Some(peer));
        if node.session(peer).is_some() && (spec.replicas.contains(&peer) || was_primary) {
            let spec = Box::new(spec.clone());
            node.send_bare(peer, Message::Announce { spec });
        }
    }

    /// Frames that ask something of the replica wait until the record under which they were sent is durable here.
    pub(crate) fn hold_early(&mut self, node: &mut Node, peer: NodeId, session: Session, frame: Frame) {
        if self.early.len() < EARLY_MAX {
            self.early.push_back((peer, session, frame));
        } else {
            let reason = format!("more than {EARLY_MAX} frames while a record was made durable");
            node.out.push_back(Output::Disconnect { peer, session, reason });
        }
    }

    /// The local disk is out of use: every group hears of it through `DataPlane`.
    pub(crate) fn fail_pool(&mut self, node: &mut Node, reason: &str) {
        node.fail_pool(reason);
    }

    /// The pool has failed, under this or another group.
    pub(crate) fn on_pool_failed(&mut self, node: &mut Node) {
        if self.adopting.is_some() {
            self.on_adopted(node);
        }
        if self.primary.is_some() {
            self.on_own_replica_lost(node);
        } else if self.acting().is_some() {
            self.send_join(node);
        }
    }

    /// Which volumes front ends may offer here: those of which this node is primary, frozen or not.
    pub(crate) fn update_served(&mut self, node: &mut Node) {
        let wanted: BTreeSet<VolumeId> = match &self.spec {
            Some(spec) if spec.record.primary == node.me => {
                self.ordered_volumes().into_iter().map(|(volume, _)| volume).collect()
            }
            _ => BTreeSet::new(),
        };
        for volume in self.served.symmetric_difference(&wanted) {
            node.out.push_back(Output::Served { volume: *volume, served: wanted.contains(volume) });
        }
        self.served = wanted;
    }

    /// Clients of all volumes are sent away.
    fn withdraw(&mut self, node: &mut Node) {
        for volume in std::mem::take(&mut self.served) {
            node.out.push_back(Output::Served { volume, served: false });
        }
    }

    /// The group is gone from the log: everything of it here goes too.
    pub(crate) fn forget(&mut self, node: &mut Node) {
        if self.primary.is_some() {
            self.step_down(node);
        }
        self.spec = None;
        self.update_served(node);
        self.erase(node);
    }

    /// A committed record names no replica here: its space is free.
    fn erase(&mut self, node: &mut Node) {
        self.note = None;
        self.early.clear();
        self.erase_volumes(node);
    }

    fn erase_volumes(&mut self, node: &mut Node) {
        let volumes: Vec<VolumeId> =
            node.store.volumes().filter(|(_, group, _)| *group == self.id).map(|(volume, _, _)| volume).collect();
        for volume in volumes {
            node.request(self.id, Purpose::Background, StoreOp::Delete { volume });
        }
        node.request(self.id, Purpose::Background, StoreOp::PutNote { group: self.id, note: None });
        self.erase_names(node);
    }

    /// Things due by now.
    pub(crate) fn on_time(&mut self, node: &mut Node) {
        if let Some(adopting) = &self.adopting
            && adopting.retry.is_some_and(|retry| retry <= node.now)
        {
            self.adopt(node);
        }
        if self.full_retry.is_some_and(|retry| retry <= node.now) {
            self.full_retry = None;
            let generation = self.generation();
            self.local.retry_full(node, self.id, generation);
            self.retry_full_heats(node);
        }
        self.cool_trailing(node);
        if self.primary.is_some() {
            self.on_time_as_primary(node);
        }
    }

    /// When `on_time` is needed next.
    pub(crate) fn wake(&self, node: &Node) -> Option<Instant> {
        let adopting = self.adopting.as_ref().and_then(|adopting| adopting.retry);
        let primary = self.primary.as_ref().and_then(|_| self.wake_as_primary(node));
        let (trailing, snapshot) = (self.trailing.wake(), self.snapshot_wake());
        [adopting, self.full_retry, primary, trailing, snapshot, self.report_due(node)].into_iter().flatten().min()
    }

    /// Invariants, asserted by tests and debug builds after every step.
    pub(crate) fn check(&self, node: &Node) {
        if let Some(spec) = &self.spec {
            assert!(Some(spec.record.stamp) <= self.known(), "the record is the newest known");
            assert_eq!(self.primary.is_some(), spec.record.primary == node.me, "the role follows the record");
        }
        if let (Some(adopted), Some(note)) = (self.adopted, &self.note) {
            assert!(
                adopted <= note.newest || node.pool_failed.is_some(),
                "nothing is done under a record that is not noted (W2)"
            );
        }
        if self.primary.is_some() {
            self.check_primary(node);
        }
    }
}

/// Whether a log can have made this record: held against what the code relies upon.
fn is_plausible(spec: &GroupSpec) -> bool {
    let record = &spec.record;
    let sizes = |size: &ByteCount| size.0 <= VOLUME_BYTES_MAX && size.0.is_multiple_of(BLOCK_BYTES);
    !record.in_sync.is_empty()
        && spec.lineage.contains(record.stamp)
        && spec.volumes.values().all(sizes)
        && spec.keys.keys().all(|volume| spec.volumes.contains_key(volume))
        && spec.snapshots.volumes().all(|(_, frozen)| sizes(&frozen.size) && spec.volumes.contains_key(&frozen.of))
}
