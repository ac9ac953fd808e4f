//! Bringing a replica to the truth, extent by extent: after an interruption (*settling*, of a required replica) and after
//! an absence (*copying*, to one that is not in sync). One machine for both, because both are the same: what may differ is
//! compared by checksums, and blocks that differ are sent.
//!
//! Candidates (W8) are the extents changed since the replica was last in sync, those hot here, and those hot or changed
//! beyond its standing there. Each is compared while nothing else may touch it; no verdict skips one. They are kept in
//! memory only: an interrupted resync begins again from durable facts, and what was brought already compares as equal.
//!
//! The other replica's share is in `secondary.rs`.

use crate::group::Group;
use crate::handshake::Plan;
use crate::local::{Act, Job, JobResult, Origin};
use crate::node::Node;
use crate::primary::{Joined, MemberState, What};
use crate::range_queue::{Access, Key};
use crate::verdict::Verdict;
use crate::wire::{Frame, Message, Standing};
use pollux_base::unit::{BlockRange, EXTENT_BLOCKS};
use pollux_base::{BlockChecksum, BlockCount, BlockIndex, ExtentIndex, Generation, NodeId, VolumeId};
use pollux_store::{StoreError, StoreReply};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Extents under comparison at once. Bounds the blocks in flight to 8 MiB and leaves the disk to the guests; two keep the
/// link busy while one waits for a disk.
const EXTENTS_AT_ONCE: usize = 2;

/// The life of one extent's comparison reads downwards.
#[derive(Debug)]
enum Step {
    /// Requests that touch it are finished first.
    Locking,
    /// Its checksums here are looked up.
    Own,
    /// The replica says which blocks differ.
    Comparing(Vec<BlockChecksum>),
    /// Runs that differ are read (`reading`, then `runs`) and sent; `awaited` answers are missing.
    Sending { runs: VecDeque<BlockRange>, reading: Option<BlockRange>, awaited: usize },
}

#[derive(Debug)]
struct Work {
    volume: VolumeId,
    extent: ExtentIndex,
    step: Step,
}

/// Where differing blocks go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// To the replica.
    There,
    /// From the replica to the primary, which died and may have lost what the replica has.
    Here,
}

/// One replica being brought to the truth (or, while settling, bringing it).
#[derive(Debug)]
pub(crate) struct Sync {
    direction: Direction,
    /// The replica has not lost power since it was last current: it lacks nothing that was acknowledged.
    pub is_continuous: bool,
    left: BTreeSet<(VolumeId, ExtentIndex)>,
    works: BTreeMap<Key, Work>,
    total: u64,
    sent_bytes: u64,
}

impl Sync {
    /// Whether all of these extents are still to be compared, so that a write to them need not be sent.
    pub(crate) fn awaits_all(&self, volume: VolumeId, extents: &[ExtentIndex]) -> bool {
        extents.iter().all(|extent| self.left.contains(&(volume, *extent)))
    }

    /// Whether the extent is still to be compared, or just being.
    pub(crate) fn covers(&self, volume: VolumeId, extent: ExtentIndex) -> bool {
        self.left.contains(&(volume, extent))
            || self.works.values().any(|work| (work.volume, work.extent) == (volume, extent))
    }

    pub(crate) fn progress(&self) -> pollux_base::order::ResyncProgress {
        pollux_base::order::ResyncProgress {
            extents_total: self.total,
            extents_left: (self.left.len() + self.works.len()) as u64,
            sent_bytes: self.sent_bytes,
        }
    }

    pub(crate) fn check(&self) {
        assert!(self.works.len() <= EXTENTS_AT_ONCE, "a resync is bounded");
        for work in self.works.values() {
            assert!(!self.left.contains(&(work.volume, work.extent)), "an extent is compared once");
        }
    }
}

impl Group {
    /// Gathers the candidates of a replica that has joined.
    pub(crate) fn begin_sync(&mut self, node: &mut Node, peer: NodeId, plan: Plan) {
        let required = self.required(node.me).contains(&peer);
        let Some(member) = self.primary.as_mut().and_then(|primary| primary.member(peer)) else { return };
        let Some(Joined { standing, extents: theirs }) = member.joined.take() else { return };
        let is_continuous = matches!(standing, Standing::InSync { continuous: true, .. });
        let (since, direction) = match plan {
            Plan::Settle { source, since } if source != node.me => (since, Direction::Here),
            Plan::Settle { since, .. } | Plan::Copy { since } => (since, Direction::There),
            // What was under way is sent to it anew.
            Plan::Serve => {
                member.state = MemberState::Current;
                return;
            }
            Plan::Refuse { .. } => {
                let reason = "the primary's replica has fallen out meanwhile".to_string();
                return self.make_unfit(node, peer, reason);
            }
        };
        let since = since.map_or(Generation(0), |stamp| stamp.generation);
        let volumes: Vec<VolumeId> = self.spec.iter().flat_map(|spec| spec.volumes.keys().copied()).collect();
        let (left, works) = (BTreeSet::new(), BTreeMap::new());
        let mut sync = Sync { direction, is_continuous, left, works, total: 0, sent_bytes: 0 };
        for volume in volumes {
            let hot = node.store.hot(volume);
            let changed = match since {
                Generation(0) => node.store.allocated(volume),
                _ => Vec::new(),
            };
            let candidates = hot.into_iter().chain(changed).chain(node.store.changed_since(volume, since));
            sync.left.extend(candidates.map(|extent| (volume, extent)));
        }
        let Some(primary) = &mut self.primary else { return };
        for (volume, extents) in theirs {
            for extent in extents {
                sync.left.insert((volume, extent));
                // It may be hot there, and only its primary can say when it need not be any more.
                primary.warm.entry((volume, extent)).or_insert((0, node.now));
            }
        }
        sync.total = sync.left.len() as u64;
        if let Some(member) = primary.member(peer) {
            member.state = if required { MemberState::Settling(sync) } else { MemberState::Copying(sync) };
        }
        self.cool_later(node);
        self.step_sync(node, peer);
    }

    fn sync(&mut self, peer: NodeId) -> Option<&mut Sync> {
        match &mut self.primary.as_mut()?.member(peer)?.state {
            MemberState::Settling(sync) | MemberState::Copying(sync) => Some(sync),
            _ => None,
        }
    }

    /// The replica whose extent is compared under this key.
    fn work(&mut self, key: Key) -> Option<(NodeId, &mut Work)> {
        self.primary.as_mut()?.members.iter_mut().find_map(|(peer, member)| match &mut member.state {
            MemberState::Settling(sync) | MemberState::Copying(sync) => {
                sync.works.get_mut(&key).map(|work| (*peer, work))
            }
            _ => None,
        })
    }

    /// Takes up further extents; when none is left the replica holds everything.
    pub(crate) fn step_sync(&mut self, node: &mut Node, peer: NodeId) {
        loop {
            let Some(sync) = self.sync(peer) else { return };
            if sync.works.len() >= EXTENTS_AT_ONCE {
                return;
            }
            let Some((volume, extent)) = sync.left.pop_first() else { break };
            let Some(range) = self.extent_range(volume, extent) else { continue };
            let key = node.next_key();
            if let Some(sync) = self.sync(peer) {
                sync.works.insert(key, Work { volume, extent, step: Step::Locking });
            }
            let Some(primary) = &mut self.primary else { return };
            if primary.queue.push(key, volume, range, Access::Write) {
                self.on_extent_locked(node, key);
            }
        }
        let Some(sync) = self.sync(peer).filter(|sync| sync.works.is_empty()) else { return };
        let direction = sync.direction;
        self.confirm_member(node, peer);
        if direction == Direction::Here {
            self.is_continuous = true;
            self.note_as_primary(node);
            self.begin_joined(node);
        }
    }

    /// The blocks of an extent that the volume has; none for an extent beyond its end.
    pub(crate) fn extent_range(&self, volume: VolumeId, extent: ExtentIndex) -> Option<BlockRange> {
        let blocks = self.blocks(volume)?;
        let start = extent.first_block().0;
        (start < blocks).then(|| BlockRange::new(BlockIndex(start), BlockCount((blocks - start).min(EXTENT_BLOCKS))))
    }

    /// Nothing else touches the extent now.
    pub(crate) fn on_extent_locked(&mut self, node: &mut Node, key: Key) {
        let Some((peer, work)) = self.work(key) else { return };
        work.step = Step::Own;
        let (volume, extent) = (work.volume, work.extent);
        let Some(range) = self.extent_range(volume, extent) else { return };
        self.copy_job(node, peer, key, volume, range, Act::Checksums);
    }

    fn copy_job(&mut self, node: &mut Node, peer: NodeId, key: Key, volume: VolumeId, range: BlockRange, act: Act) {
        let (id, generation) = (self.id, self.generation());
        let origin = Origin::Copy { peer, key };
        self.local.submit(node, id, generation, Job { origin, volume, range, act, fua: false });
    }

    /// The local disk gave checksums or blocks of the extent.
    pub(crate) fn on_copy_job(&mut self, node: &mut Node, peer: NodeId, key: Key, result: JobResult) {
        let group = self.id;
        let Some((_, work)) = self.work(key) else { return };
        let (volume, extent) = (work.volume, work.extent);
        match (&mut work.step, result) {
            (step @ Step::Own, Ok(StoreReply::Checksums(checksums))) => {
                *step = Step::Comparing(checksums.clone());
                let Some((sequence, stamp)) = self.ask(node, peer, What::Compare(key)) else { return };
                let message = Message::Compare { group, stamp, sequence, volume, extent };
                node.send(peer, Frame { message, checksums, data: None });
            }
            (Step::Sending { reading, .. }, Ok(StoreReply::Read { data, checksums })) => {
                let Some(range) = reading.take() else { return };
                let Some((sequence, stamp)) = self.ask(node, peer, What::Copy(key)) else { return };
                let bytes = data.len() as u64;
                let message = Message::Write { group, stamp, sequence, volume, range, fua: false };
                node.send(peer, Frame { message, checksums, data: Some(data) });
                self.add_sent(peer, key, bytes);
                self.step_work(node, peer, key);
            }
            (_, Err(StoreError::Corrupt(ranges))) => {
                self.begin_repair(node, crate::repair::For::Copy { peer, key }, volume, ranges);
            }
            (_, Err(error)) => self.on_store_error(node, &error),
            (_, Ok(_)) => {}
        }
    }

    fn add_sent(&mut self, peer: NodeId, key: Key, bytes: u64) {
        if let Some((_, Work { step: Step::Sending { awaited, .. }, .. })) = self.work(key) {
            *awaited += 1;
        }
        if let Some(sync) = self.sync(peer) {
            sync.sent_bytes += bytes;
        }
    }

    /// Bad blocks here were mended from a good copy, or there is none.
    pub(crate) fn on_copy_repaired(
        &mut self,
        node: &mut Node,
        peer: NodeId,
        key: Key,
        outcome: crate::repair::Outcome,
    ) {
        let Some((_, work)) = self.work(key) else { return };
        let (volume, extent) = (work.volume, work.extent);
        let again = match (&work.step, outcome) {
            (Step::Sending { reading: None, .. }, crate::repair::Outcome::Mended) => {
                return self.step_work(node, peer, key); // taken over
            }
            // What cannot be read cannot be brought. The replica is not in sync and says why; it is not tried for ever.
            (_, crate::repair::Outcome::NoCopy | crate::repair::Outcome::Wait) => {
                let reason = format!("blocks of {volume} in {extent:?} cannot be read on the primary");
                return self.make_unfit(node, peer, reason);
            }
            (Step::Sending { reading: Some(range), .. }, _) => Some((*range, Act::Read)),
            (Step::Own, _) => self.extent_range(volume, extent).map(|range| (range, Act::Checksums)),
            _ => None,
        };
        if let Some((range, act)) = again {
            self.copy_job(node, peer, key, volume, range, act);
        }
    }

    /// The replica says which blocks of the extent are not the same there.
    pub(crate) fn on_differs(&mut self, node: &mut Node, key: Key, runs: Vec<BlockRange>) {
        let group = self.id;
        let Some((peer, work)) = self.work(key) else { return };
        let (volume, extent) = (work.volume, work.extent);
        let Step::Comparing(checksums) = &work.step else { return };
        let checksums = checksums.clone();
        let Some(whole) = self.extent_range(volume, extent) else { return };
        let inside = |run: &BlockRange| {
            let end = run.start.0.checked_add(run.count.0);
            run.start >= whole.start && run.count.0 > 0 && end.is_some_and(|end| end <= whole.end().0)
        };
        if !runs.iter().all(inside) {
            return self.make_unfit(
                node,
                peer,
                "it names blocks outside the extent that it was asked about".to_string(),
            );
        }
        if self.sync(peer).is_some_and(|sync| sync.direction == Direction::Here) {
            if let Some((_, work)) = self.work(key) {
                work.step = Step::Sending { runs: VecDeque::new(), reading: None, awaited: 0 };
            }
            return self.begin_repair(node, crate::repair::For::Take { peer, key }, volume, runs);
        }
        // Blocks that are not stored here are given back there, not written as zeros: thin stays thin.
        let (mut zeros, mut stored) = (Vec::new(), VecDeque::new());
        for (part, is_zero) in
            runs.into_iter().flat_map(|run| run.split_by(|block| checksums[block.in_extent()].is_zero()))
        {
            if is_zero { zeros.push(part) } else { stored.push_back(part) }
        }
        if let Some((_, work)) = self.work(key) {
            work.step = Step::Sending { runs: stored, reading: None, awaited: 0 };
        }
        for range in zeros {
            let Some((sequence, stamp)) = self.ask(node, peer, What::Copy(key)) else { return };
            node.send_bare(peer, Message::Zero { group, stamp, sequence, volume, range, fua: false });
            self.add_sent(peer, key, 0);
        }
        self.step_work(node, peer, key);
    }

    /// The replica has written what was sent.
    pub(crate) fn on_copied(&mut self, node: &mut Node, key: Key) {
        let Some((peer, work)) = self.work(key) else { return };
        let Step::Sending { awaited, .. } = &mut work.step else { return };
        *awaited = awaited.saturating_sub(1);
        self.step_work(node, peer, key);
    }

    /// Reads the next run that differs, or ends the extent.
    fn step_work(&mut self, node: &mut Node, peer: NodeId, key: Key) {
        let Some((_, work)) = self.work(key) else { return };
        let volume = work.volume;
        let Step::Sending { runs, reading, awaited } = &mut work.step else { return };
        if reading.is_some() {
            return;
        }
        if let Some(range) = runs.pop_front() {
            *reading = Some(range);
            self.copy_job(node, peer, key, volume, range, Act::Read);
        } else if *awaited == 0 {
            self.end_work(node, peer, key);
        }
    }

    fn end_work(&mut self, node: &mut Node, peer: NodeId, key: Key) {
        let group = self.id;
        let Some(work) = self.sync(peer).and_then(|sync| sync.works.remove(&key)) else { return };
        let at = (work.volume, work.extent);
        let Some(stamp) = self.acting().map(|spec| spec.record.stamp) else { return };
        let Some(primary) = &mut self.primary else { return };
        // Nothing is in flight on it (it is ours alone), and both hold the same: its mark there may go, unless requests
        // keep it hot anyway.
        if !primary.warm.contains_key(&at) {
            node.send_bare(peer, Message::Cool { group, stamp, volume: at.0, extents: vec![at.1], reap: false });
        }
        let ready = primary.queue.remove(key);
        self.run_ready(node, ready);
        self.step_sync(node, peer);
    }

    /// A resync is given up: its extents are free again. Its candidates are gathered anew when the replica joins again.
    pub(crate) fn end_sync(&mut self, node: &mut Node, state: MemberState) {
        let (MemberState::Settling(sync) | MemberState::Copying(sync)) = state else { return };
        for key in sync.works.into_keys() {
            let Some(primary) = &mut self.primary else { return };
            primary.repairs.retain(|_, repair| !repair.is_for(key));
            let ready = primary.queue.remove(key);
            self.run_ready(node, ready);
        }
    }

    /// Extents that this replica's own durable facts make candidates, for its `Join`.
    pub(crate) fn own_candidates(&self, node: &Node) -> Vec<(VolumeId, Vec<ExtentIndex>)> {
        let since = match self.verdict {
            Verdict::Member { at } => at.generation,
            Verdict::Stale { since } => since.map_or(Generation(0), |since| since.generation),
            _ => return Vec::new(),
        };
        let volumes = self.spec.iter().flat_map(|spec| spec.volumes.keys().copied());
        volumes
            .map(|volume| {
                let mut extents: BTreeSet<ExtentIndex> = node.store.hot(volume).into_iter().collect();
                extents.extend(node.store.changed_since(volume, since));
                if since == Generation(0) {
                    extents.extend(node.store.allocated(volume));
                }
                (volume, extents.into_iter().collect::<Vec<_>>())
            })
            .filter(|(_, extents)| !extents.is_empty())
            .collect()
    }
}
