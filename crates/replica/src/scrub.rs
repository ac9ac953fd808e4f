//! A scrub: everything stored is read on every replica in sync, so that rot is found while another replica has a good copy,
//! and the replicas' checksums are compared. The primary leads it, extent by extent.
//!
//! * *Compare*: under the extent's lock, as in a resync; only checksums travel (1/512 of what is stored).
//! * *Read*: what is stored is read here and at every other member, a piece at a time, each against its own checksums;
//!   nothing travels but the answer. Guests' requests go on beside it.
//! * *Mend*: what rotted is brought from a copy that matches its checksum. Where both match theirs and differ all the same,
//!   no checksum tells who is right: the primary's copy is kept, because it is what the guests have been reading.
//!
//! Every finding is kept with where, which side and what became of it (`Finding`): also that no copy is left.
//! A replica that falls out meanwhile is left out; the extent that was being looked at is looked at again.

use crate::group::Group;
use crate::local::{Act, Job, JobResult, Origin};
use crate::node::Node;
use crate::pace::Meter;
use crate::primary::What;
use crate::range_queue::{Access, Key};
use crate::repair::{For, Outcome};
use crate::wire::Message;
use pollux_base::order::{Finding, FindingKind, FoundBy, ScrubReport};
use pollux_base::unit::{BlockRange, EXTENT_BLOCKS};
use pollux_base::{BlockChecksum, BlockCount, Data, ExtentIndex, Instant, NodeId, VolumeId};
use pollux_store::{StoreError, StoreReply};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Findings kept for the reports. One names all bad blocks of an extent on one replica, so these are 64 MiB of rot; the
/// counts go on beyond them.
pub(crate) const FINDINGS_KEPT: usize = 16;

/// One scrub of a group. Its life reads downwards.
#[derive(Debug)]
pub(crate) struct Scrub {
    /// Members that have not said yet which extents they store.
    listing: BTreeSet<NodeId>,
    left: BTreeSet<(VolumeId, ExtentIndex)>,
    /// The snapshots that there were at the beginning, and of which volume each is.
    origins: BTreeMap<VolumeId, VolumeId>,
    check: Option<Check>,
    /// What the pace was told to have begun.
    paced: Option<u64>,
    meter: Meter,
    report: ScrubReport,
}

/// One extent being looked at.
#[derive(Debug)]
struct Check {
    key: Key,
    volume: VolumeId,
    extent: ExtentIndex,
    /// Other replicas whose copies are looked at.
    peers: BTreeSet<NodeId>,
    step: Step,
    /// Blocks to be mended, by the replica on which they are bad.
    bad: VecDeque<Bad>,
}

#[derive(Debug)]
enum Step {
    /// Requests that change it are finished first.
    Locking,
    Own,
    /// Members compare; `stored` is what they and this replica hold.
    Comparing {
        awaited: BTreeSet<NodeId>,
        stored: VecDeque<BlockRange>,
    },
    /// Nothing is locked. The first of `stored` is being read, if anybody is awaited.
    Reading {
        stored: VecDeque<BlockRange>,
        awaited: BTreeSet<NodeId>,
    },
    /// The first of `bad` is being mended, if `mend` says how far that is.
    Mending {
        mend: Option<Mend>,
    },
}

#[derive(Debug)]
struct Bad {
    node: NodeId,
    range: BlockRange,
    kind: FindingKind,
}

/// Bad blocks being mended.
#[derive(Debug)]
enum Mend {
    /// Requests that change them are finished first.
    Locking,
    /// The good copy is read here, and itself mended first if it must be.
    Reading,
    /// They are on their way to the replica that is bad; so many answers are missing.
    Sent { awaited: usize },
}

impl Group {
    /// The control plane wants a scrub; the same again changes nothing.
    pub(crate) fn on_scrub_order(&mut self, id: u64) {
        if self.scrubbed.as_ref().is_none_or(|report| report.id != id) {
            self.scrub_wanted = Some(id);
        }
    }

    /// Begins a scrub that is wanted, or has the present one go on, if nothing is in the way. Called after everything that
    /// may have changed that.
    pub(crate) fn pump_scrub(&mut self, node: &mut Node) {
        let Some(primary) = &self.primary else { return };
        if self.scrub_wanted.is_none() && primary.scrub.is_none()
            || self.freeze(node).is_some()
            || !self.is_member(node)
        {
            return;
        }
        if self.scrub_wanted.is_some() && primary.scrub.is_none() {
            self.begin_scrub(node);
        }
        let Some(scrub) = self.primary.as_ref().and_then(|primary| primary.scrub.as_ref()) else { return };
        if scrub.has_more() {
            node.pace.queue_scrub(self.id);
        } else if scrub.is_over() {
            self.end_scrub(node);
        }
    }

    fn begin_scrub(&mut self, node: &mut Node) {
        let group = self.id;
        let Some(id) = self.scrub_wanted else { return };
        let own = self.stored(node).into_iter();
        let left: BTreeSet<_> =
            own.flat_map(|(volume, extents)| extents.into_iter().map(move |x| (volume, x))).collect();
        let origins = self.ordered_volumes().into_iter().map(|(volume, _)| (volume, self.origin_of(volume))).collect();
        let peers = self.current_peers();
        let replicas = peers.iter().copied().chain([node.me]).collect();
        let total = left.len() as u64;
        let report = ScrubReport { id, extents_total: total, extents_left: total, replicas, ..ScrubReport::default() };
        let scrub = Scrub {
            listing: peers.clone(),
            left,
            origins,
            check: None,
            paced: None,
            meter: Meter::new(node.now),
            report,
        };
        let Some(primary) = &mut self.primary else { return };
        primary.scrub = Some(scrub);
        for peer in peers {
            let Some((sequence, stamp)) = self.ask(node, peer, What::Stored) else { return };
            node.send_bare(peer, Message::StoredAsk { group, stamp, sequence });
        }
    }

    /// What a scrub looks at here: everything stored, once. Of a snapshot and of the volume that is where something lies
    /// on top of the snapshot before it; the rest is looked at there. What lies beside it since a rollback is no help: a block that both
    /// have from further down is mended for each of them.
    pub(crate) fn stored(&self, node: &Node) -> Vec<(VolumeId, Vec<ExtentIndex>)> {
        let mut before: Vec<VolumeId> = Vec::new();
        let mut stored = Vec::new();
        for (volume, _) in self.ordered_volumes() {
            let older = before.iter().rev().find(|older| node.store.lies_on(volume, **older)).copied();
            before.push(volume);
            let extents = match older {
                None => node.store.allocated(volume),
                Some(older) => {
                    let own: BTreeSet<ExtentIndex> = node.store.allocated(volume).into_iter().collect();
                    node.store.differing(older, volume).into_iter().filter(|extent| own.contains(extent)).collect()
                }
            };
            stored.push((volume, extents));
        }
        stored
    }

    /// Members that hold everything, with which this replica can be compared.
    fn current_peers(&self) -> BTreeSet<NodeId> {
        let members = self.primary.iter().flat_map(|primary| primary.members.keys().copied());
        members.filter(|peer| self.primary.as_ref().is_some_and(|primary| primary.is_current(*peer))).collect()
    }

    fn scrub(&mut self) -> Option<&mut Scrub> {
        self.primary.as_mut()?.scrub.as_mut()
    }

    fn check_of(&mut self, key: Key) -> Option<&mut Check> {
        self.scrub()?.check.as_mut().filter(|check| check.key == key)
    }

    /// A member says which extents it stores.
    pub(crate) fn on_stored(&mut self, peer: NodeId, extents: Vec<(VolumeId, Vec<ExtentIndex>)>) {
        let Some(scrub) = self.scrub() else { return };
        scrub.listing.remove(&peer);
        let extents = extents.into_iter().flat_map(|(volume, list)| list.into_iter().map(move |x| (volume, x)));
        scrub.left.extend(extents);
        scrub.report.extents_total = scrub.left.len() as u64;
        scrub.report.extents_left = scrub.report.extents_total;
    }

    /// It is this group's turn to begin one thing.
    pub(crate) fn on_scrub_turn(&mut self, node: &mut Node) {
        if self.freeze(node).is_some() || !self.is_member(node) {
            return; // taken up again when it has thawed
        }
        let peers = self.current_peers();
        let me = node.me;
        let Some(scrub) = self.scrub().filter(|scrub| scrub.has_more()) else { return };
        let Some(check) = &mut scrub.check else {
            let Some((volume, extent)) = scrub.left.pop_first() else { return };
            let Some(range) = self.extent_range(volume, extent) else { return self.pump_scrub(node) };
            let key = node.next_key();
            self.pace_scrub(node, EXTENT_BLOCKS * 8);
            let Some(scrub) = self.scrub() else { return };
            scrub.check = Some(Check { key, volume, extent, peers, step: Step::Locking, bad: VecDeque::new() });
            return self.lock(node, key, volume, range, Access::Read);
        };
        let (key, volume) = (check.key, check.volume);
        match &mut check.step {
            Step::Reading { stored, awaited } => {
                let Some(run) = stored.front().copied() else { return };
                let count = run.count.0.min(node.pace.scrub_blocks(node.now));
                let piece = BlockRange::new(run.start, BlockCount(count));
                stored.pop_front();
                if count < run.count.0 {
                    let rest = BlockRange::new(run.start.plus(BlockCount(count)), BlockCount(run.count.0 - count));
                    stored.push_front(rest);
                }
                stored.push_front(piece);
                awaited.insert(me);
                awaited.extend(&check.peers);
                self.pace_scrub(node, piece.count.bytes().0);
                self.read_piece(node, key, volume, piece);
            }
            Step::Mending { mend: mend @ None } => {
                *mend = Some(Mend::Locking);
                let Some(bad) = check.bad.front() else { return };
                let (range, is_own) = (bad.range, bad.node == me);
                let key = node.next_key(); // its turn among the requests is now
                check.key = key;
                self.pace_scrub(node, range.count.bytes().0);
                let access = if is_own { Access::Write } else { Access::Read };
                self.lock(node, key, volume, range, access);
            }
            _ => {}
        }
    }

    fn pace_scrub(&mut self, node: &mut Node, bytes: u64) {
        node.pace.begin_scrub(node.now);
        if let Some(scrub) = self.scrub() {
            scrub.paced = Some(bytes);
        }
    }

    /// What was begun in a turn has ended.
    fn end_scrub_turn(&mut self, node: &mut Node) {
        let now = node.now;
        let Some(scrub) = self.scrub() else { return };
        if let Some(bytes) = scrub.paced.take() {
            node.pace.end_scrub(now, bytes);
        }
        self.pump_scrub(node);
    }

    /// Asks every replica for its own copy of the piece.
    fn read_piece(&mut self, node: &mut Node, key: Key, volume: VolumeId, range: BlockRange) {
        let group = self.id;
        let (generation, peers) = (self.generation(), self.check_of(key).map(|check| check.peers.clone()));
        let job = Job { origin: Origin::Scrub { key }, volume, range, act: Act::Read, fua: false, is_received: false };
        self.local.submit(node, group, generation, job);
        for peer in peers.unwrap_or_default() {
            let Some((sequence, stamp)) = self.ask(node, peer, What::Verify(key)) else { return };
            node.send_bare(peer, Message::Verify { group, stamp, sequence, volume, range });
        }
    }

    /// Nobody changes the blocks now: those of the extent, or those that are mended. `false`: the key is not of a scrub.
    pub(crate) fn on_scrub_locked(&mut self, node: &mut Node, key: Key) -> bool {
        let me = node.me;
        let (id, generation) = (self.id, self.generation());
        let Some(check) = self.check_of(key) else { return false };
        let volume = check.volume;
        let origin = Origin::Scrub { key };
        match &mut check.step {
            Step::Locking => {
                check.step = Step::Own;
                let range = BlockRange::new(check.extent.first_block(), BlockCount(0));
                let job = Job { origin, volume, range, act: Act::Checksums, fua: false, is_received: false };
                self.local.submit(node, id, generation, job);
            }
            Step::Mending { mend: Some(mend) } => {
                *mend = Mend::Reading;
                let Some(bad) = check.bad.front() else { return true };
                let range = bad.range;
                if bad.node == me {
                    self.begin_repair(node, For::Scrub { key }, volume, vec![range]);
                } else {
                    self.local.submit(
                        node,
                        id,
                        generation,
                        Job { origin, volume, range, act: Act::Read, fua: false, is_received: false },
                    );
                }
            }
            _ => {}
        }
        true
    }

    /// The local disk gave checksums or blocks.
    pub(crate) fn on_scrub_job(&mut self, node: &mut Node, key: Key, result: JobResult) {
        let me = node.me;
        let Some(check) = self.check_of(key) else { return };
        let (volume, extent) = (check.volume, check.extent);
        match (&mut check.step, result) {
            (Step::Own, Ok(StoreReply::Checksums(mut checksums))) => {
                let peers = check.peers.clone();
                let Some(whole) = self.extent_range(volume, extent) else { return };
                let Some(check) = self.check_of(key) else { return };
                let stored = stored_runs(whole, &checksums);
                check.step = Step::Comparing { awaited: peers.clone(), stored };
                checksums.truncate(whole.count.0 as usize);
                for peer in peers {
                    self.ask_compare(node, peer, What::CompareScrub(key), volume, whole, checksums.clone());
                }
                self.end_compare_if_done(node, key);
            }
            (Step::Reading { .. }, Ok(StoreReply::Read { .. })) => self.on_verified(node, key, me, Vec::new()),
            (Step::Reading { .. }, Err(StoreError::Corrupt(ranges))) => self.on_verified(node, key, me, ranges),
            (Step::Mending { mend: Some(Mend::Reading) }, Ok(StoreReply::Read { data, checksums })) => {
                self.send_mended(node, key, &data, &checksums);
            }
            (Step::Mending { mend: Some(Mend::Reading) }, Err(StoreError::Corrupt(ranges))) => {
                self.begin_repair(node, For::Scrub { key }, volume, ranges);
            }
            (_, Err(error)) => self.on_store_error(node, &error),
            (_, Ok(_)) => {}
        }
    }

    /// A member names blocks of the extent whose checksums are not the same there.
    pub(crate) fn on_scrub_differs(&mut self, node: &mut Node, key: Key, peer: NodeId, runs: Vec<BlockRange>) {
        let Some(check) = self.check_of(key) else { return };
        let (volume, extent) = (check.volume, check.extent);
        let Some(whole) = self.extent_range(volume, extent) else { return };
        let Some(check) = self.check_of(key) else { return };
        let Step::Comparing { awaited, stored } = &mut check.step else { return };
        awaited.remove(&peer);
        for range in runs.into_iter().filter(|run| run.is_within(whole)) {
            check.bad.push_back(Bad { node: peer, range, kind: FindingKind::Difference });
            // What only the other stores is read there, too.
            stored.push_back(range);
        }
        self.end_compare_if_done(node, key);
    }

    fn end_compare_if_done(&mut self, node: &mut Node, key: Key) {
        let Some(check) = self.check_of(key) else { return };
        let Step::Comparing { awaited, stored } = &mut check.step else { return };
        if !awaited.is_empty() {
            return;
        }
        let stored = std::mem::take(stored);
        check.step = Step::Reading { stored, awaited: BTreeSet::new() };
        self.unlock(node, key);
        self.after_piece(node, key);
    }

    /// A replica has read its copy of the piece; these of its blocks do not match their checksums.
    pub(crate) fn on_verified(&mut self, node: &mut Node, key: Key, by: NodeId, ranges: Vec<BlockRange>) {
        let Some(check) = self.check_of(key) else { return };
        let Step::Reading { stored, awaited } = &mut check.step else { return };
        let Some(piece) = stored.front().copied() else { return };
        if !awaited.remove(&by) {
            return; // ignore_unasked
        }
        let is_done = awaited.is_empty();
        for range in ranges.into_iter().filter(|range| range.is_within(piece)) {
            // Blocks that do not match their own checksum differ for that reason.
            let differs =
                |bad: &Bad| bad.node == by && bad.kind == FindingKind::Difference && bad.range.overlaps(range);
            check.bad.retain(|bad| !differs(bad));
            check.bad.push_back(Bad { node: by, range, kind: FindingKind::Rot });
        }
        if is_done {
            stored.pop_front();
        }
        let count = piece.count.bytes().0;
        if let Some(scrub) = self.scrub() {
            scrub.report.checked_bytes += count;
        }
        if is_done {
            self.after_piece(node, key);
        }
    }

    /// The next piece, or else what was found is mended.
    fn after_piece(&mut self, node: &mut Node, key: Key) {
        let Some(check) = self.check_of(key) else { return };
        let is_read = matches!(&check.step, Step::Reading { stored, .. } if stored.is_empty());
        if is_read {
            check.step = Step::Mending { mend: None };
            if check.bad.is_empty() {
                return self.end_check(node);
            }
        }
        self.end_scrub_turn(node);
    }

    fn send_mended(&mut self, node: &mut Node, key: Key, data: &Data, checksums: &[BlockChecksum]) {
        let Some(check) = self.check_of(key) else { return };
        let volume = check.volume;
        let Some(Bad { node: peer, range: whole, .. }) = check.bad.front() else { return };
        let (peer, whole) = (*peer, *whole);
        let sent = self.send_blocks(node, peer, What::Mend(key), volume, whole, data, checksums);
        let Some(check) = self.check_of(key) else { return };
        check.step = Step::Mending { mend: Some(Mend::Sent { awaited: sent.parts }) };
        // The mark that the replica made for it is taken back with the others.
        let now = node.now;
        if let Some(primary) = &mut self.primary {
            for extent in whole.extents() {
                primary.warm.entry((volume, extent)).or_insert((0, now));
            }
        }
        self.cool_later(node);
    }

    /// The replica that was bad has written what it was sent.
    pub(crate) fn on_mended_there(&mut self, node: &mut Node, key: Key) {
        let Some(check) = self.check_of(key) else { return };
        let Step::Mending { mend: Some(Mend::Sent { awaited }) } = &mut check.step else { return };
        *awaited -= 1;
        if *awaited == 0 {
            self.end_mend(node, key, true);
        }
    }

    /// Blocks that are bad here were mended from a good copy, or there is none.
    pub(crate) fn on_scrub_repaired(&mut self, node: &mut Node, key: Key, outcome: Outcome) {
        let me = node.me;
        let (id, generation) = (self.id, self.generation());
        let Some(check) = self.check_of(key) else { return };
        let Step::Mending { mend: Some(Mend::Reading) } = check.step else { return };
        let Some(bad) = check.bad.front() else { return };
        let (volume, range, is_own) = (check.volume, bad.range, bad.node == me);
        match outcome {
            Outcome::Mended if is_own => self.end_mend(node, key, true),
            // The good copy for the other was bad itself.
            Outcome::Mended => {
                let job = Job {
                    origin: Origin::Scrub { key },
                    volume,
                    range,
                    act: Act::Read,
                    fua: false,
                    is_received: false,
                };
                self.local.submit(node, id, generation, job);
            }
            Outcome::Wait => self.restart_check(node),
            Outcome::NoCopy => self.end_mend(node, key, false),
        }
    }

    fn end_mend(&mut self, node: &mut Node, key: Key, healed: bool) {
        let Some(check) = self.check_of(key) else { return };
        check.step = Step::Mending { mend: None };
        let volume = check.volume;
        let Some(bad) = check.bad.pop_front() else { return };
        let is_over = check.bad.is_empty();
        if let Some(scrub) = self.scrub() {
            let blocks = bad.range.count.0;
            let report = &mut scrub.report;
            match bad.kind {
                FindingKind::Rot => report.rotten_blocks += blocks,
                FindingKind::Difference => report.differing_blocks += blocks,
            }
            if healed { report.healed_blocks += blocks } else { report.lost_blocks += blocks }
        }
        self.find(node, bad.node, volume, bad.range, bad.kind, FoundBy::Scrub, healed);
        if bad.node != node.me && healed {
            self.healed += bad.range.count.0;
        }
        self.unlock(node, key);
        if is_over { self.end_check(node) } else { self.end_scrub_turn(node) }
    }

    fn end_check(&mut self, node: &mut Node) {
        let now = node.now;
        let Some(scrub) = self.scrub() else { return };
        scrub.check = None;
        scrub.report.extents_left = scrub.left.len() as u64;
        let report = &scrub.report;
        scrub.meter.mark(now, report.extents_total - report.extents_left, report.checked_bytes);
        self.end_scrub_turn(node);
    }

    fn end_scrub(&mut self, node: &mut Node) {
        let Some(scrub) = self.primary.as_mut().and_then(|primary| primary.scrub.take()) else { return };
        if self.scrub_wanted == Some(scrub.report.id) {
            self.scrub_wanted = None;
        }
        self.scrubbed = Some(ScrubReport { is_done: true, seconds_left: Some(0), ..scrub.report });
        self.report_changes(node);
    }

    /// Somebody who was asked is gone, or the record has changed: the extent is looked at again, with who is there then.
    pub(crate) fn restart_check(&mut self, node: &mut Node) {
        let now = node.now;
        let current = self.current_peers();
        let Some(scrub) = self.scrub() else { return };
        scrub.listing.retain(|peer| current.contains(peer));
        scrub.report.replicas.retain(|replica| *replica == node.me || current.contains(replica));
        let Some(check) = scrub.check.take() else { return };
        scrub.left.insert((check.volume, check.extent));
        if let Some(bytes) = scrub.paced.take() {
            node.pace.end_scrub(now, bytes);
        }
        if let Some(primary) = &mut self.primary {
            primary.repairs.retain(|_, repair| !repair.is_for(check.key));
        }
        self.unlock(node, check.key);
    }

    /// What was still to be looked at in a snapshot that was deleted is looked at in the next one, or in the volume: what shows
    /// there, too, is nobody else's.
    pub(crate) fn pass_on_deleted(&mut self) {
        let volumes: BTreeSet<VolumeId> = self.ordered_volumes().into_iter().map(|(volume, _)| volume).collect();
        let next = |deleted: VolumeId, of: VolumeId| {
            let newer = volumes.range(deleted..).find(|volume| self.origin_of(**volume) == of);
            newer.copied().unwrap_or(of)
        };
        let Some(scrub) = self.primary.as_ref().and_then(|primary| primary.scrub.as_ref()) else { return };
        let gone = scrub.left.iter().filter(|(volume, _)| !volumes.contains(volume));
        let moved = gone.filter_map(|(volume, extent)| {
            let of = scrub.origins.get(volume).filter(|of| volumes.contains(of))?;
            Some((next(*volume, *of), *extent))
        });
        let moved: Vec<(VolumeId, ExtentIndex)> = moved.collect();
        let Some(scrub) = self.scrub() else { return };
        scrub.left.retain(|(volume, _)| volumes.contains(volume));
        scrub.left.extend(moved);
    }

    /// The node is not primary any more.
    pub(crate) fn drop_scrub(&mut self, node: &mut Node) {
        self.restart_check(node);
        self.scrub_wanted = None;
        if let Some(primary) = &mut self.primary {
            primary.scrub = None;
        }
    }

    /// Keeps the evidence of bad blocks.
    #[allow(clippy::too_many_arguments)] // each is one part of the finding, said once
    pub(crate) fn find(
        &mut self,
        node: &Node,
        on: NodeId,
        volume: VolumeId,
        range: BlockRange,
        kind: FindingKind,
        by: FoundBy,
        healed: bool,
    ) {
        let at = node.now;
        let is_next = |last: &Finding| {
            (last.node, last.volume, last.kind, last.by, last.healed) == (on, volume, kind, by, healed)
                && last.range.end() == range.start
                && last.range.start.extent() == range.start.extent()
                && last.number == at.0
        };
        if let Some(last) = self.findings.back_mut().filter(|last| is_next(last)) {
            last.range.count.0 += range.count.0;
            return;
        }
        let number = self.findings.back().map_or(at.0, |last| at.0.max(last.number + 1));
        self.findings.push_back(Finding { number, boot: node.boot as u32, node: on, volume, range, kind, by, healed });
        if self.findings.len() > FINDINGS_KEPT {
            self.findings.pop_front();
        }
    }

    pub(crate) fn scrub_report(&self, now: Instant) -> Option<ScrubReport> {
        let running = self.primary.as_ref().and_then(|primary| primary.scrub.as_ref());
        running.map(|scrub| scrub.progress(now)).or_else(|| self.scrubbed.clone())
    }

    fn unlock(&mut self, node: &mut Node, key: Key) {
        let Some(primary) = &mut self.primary else { return };
        let ready = primary.queue.remove(key);
        self.run_ready(node, ready);
    }
}

impl Scrub {
    /// Whether there is something that can be begun.
    fn has_more(&self) -> bool {
        match &self.check {
            None => self.listing.is_empty() && !self.left.is_empty(),
            Some(Check { step: Step::Reading { stored, awaited }, .. }) => awaited.is_empty() && !stored.is_empty(),
            Some(Check { step: Step::Mending { mend }, .. }) => mend.is_none(),
            Some(_) => false,
        }
    }

    fn is_over(&self) -> bool {
        self.listing.is_empty() && self.left.is_empty() && self.check.is_none()
    }

    fn progress(&self, now: Instant) -> ScrubReport {
        let report = &self.report;
        let done = report.extents_total - report.extents_left;
        let (_, seconds_left) = self.meter.rate(now, done, report.checked_bytes, report.extents_left);
        ScrubReport { seconds_left, ..report.clone() }
    }
}

/// Runs of blocks that are stored.
fn stored_runs(whole: BlockRange, checksums: &[BlockChecksum]) -> VecDeque<BlockRange> {
    let runs = whole.split_by(|block| checksums[block.in_extent()].is_zero());
    runs.into_iter().filter(|(_, is_zero)| !is_zero).map(|(run, _)| run).collect()
}
