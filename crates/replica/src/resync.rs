//! Bringing a replica to the truth, extent by extent: after an interruption (*settling*, of a required replica) and after
//! an absence (*copying*, to one that is not in sync). One machine for both, because both are the same: what may differ is
//! compared by checksums, and blocks that differ are sent.
//!
//! Guests go on meanwhile. What is settled with a replica that has lived on differs in nothing that was acknowledged, so changes
//! need not wait for it: they go to both. What a read shows must be what the other has, too, should that be the next primary: so
//! its own blocks are compared first, and brought if they differ (`showing.rs`). Only if a replica has lost power the group is frozen
//! until all is compared: it may lack what was acknowledged, and a flush promises that.
//!
//! Candidates (W8) are the extents changed since the replica was last in sync, those hot here, and those hot or changed
//! beyond its standing there. Each is compared while nobody may change it; no verdict skips one. They are kept in
//! memory only: an interrupted resync begins again from durable facts, and what was brought already compares as equal.
//!
//! What differs is brought in pieces. Only the piece that is on its way is locked: from when its extent was compared, writes
//! go to the replica too, so whatever a piece finds here when its turn comes is what belongs there. How many pieces are
//! under way, how large they are, and when the next begins is the pace's to say (`pace.rs`), unless the group is frozen
//! for it.
//!
//! The other replica's share is in `secondary.rs`.

use crate::group::Group;
use crate::handshake::Plan;
use crate::local::{Act, Job, JobResult, Origin};
use crate::node::Node;
use crate::pace::{Meter, PIECES_MAX, has_room};
use crate::primary::{Joined, MemberState, What};
use crate::range_queue::{Access, Key};
use crate::requests::slice;
use crate::trail::before;
use crate::verdict::Verdict;
use crate::wire::{Frame, Message, Standing};
use pollux_base::order::ResyncProgress;
use pollux_base::record::Mode;
use pollux_base::unit::{BLOCK_BYTES, BlockRange, EXTENT_BLOCKS};
use pollux_base::{BlockChecksum, BlockCount, BlockIndex, Data, ExtentIndex, Generation, Instant, NodeId, VolumeId};
use pollux_store::{StoreError, StoreReply};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Extents taken up at once: compared, or waiting for their pieces. Each is marked at the replica before it is written there, which
/// takes a flush, and one flush makes many marks: so extents are compared ahead of the pieces, and by the time that it is their turn
/// they are marked. Memory: the differing runs of each, 8 KiB at most.
const EXTENTS_AT_ONCE: usize = 64;
/// Of them those that are just being compared: each may have to be read whole.
const COMPARED_AT_ONCE: usize = 8;
/// Marks that are taken back there at once: that costs a flush, too.
const COOLED_AT_ONCE: usize = 64;
/// What a comparison moves: the checksums of an extent.
const COMPARE_BYTES: u64 = EXTENT_BLOCKS * 8;
/// While the group is frozen for it, a piece is as large as is of use.
const PIECE_BLOCKS_SETTLING: u64 = (1 << 20) / BLOCK_BYTES;

/// The life of one extent's comparison reads downwards.
#[derive(Debug)]
enum Step {
    /// Requests that touch it are finished first.
    Locking,
    /// Its checksums here are looked up.
    Own,
    /// The replica says which blocks differ.
    Comparing,
    /// Blocks that differ are taken over from the replica.
    Taking,
    /// Nothing is locked any more. Runs that differ are still to be begun; so many pieces are under way.
    Sending { runs: VecDeque<BlockRange>, pieces: usize },
}

#[derive(Debug)]
struct Work {
    volume: VolumeId,
    extent: ExtentIndex,
    step: Step,
    /// What its comparison was charged with.
    paced: Option<Paced>,
}

/// Part of a run of blocks that differs, on its way. Its life reads downwards.
#[derive(Debug)]
struct Piece {
    /// The extent that it is of.
    work: Key,
    volume: VolumeId,
    range: BlockRange,
    step: PieceStep,
    paced: Option<Paced>,
}

#[derive(Debug, PartialEq, Eq)]
enum PieceStep {
    /// Requests that change its blocks are finished first.
    Locking,
    Reading,
    /// So many answers are missing.
    Sent {
        awaited: usize,
    },
}

/// What the pace was told to have begun, until it has ended.
#[derive(Clone, Copy, Debug)]
struct Paced {
    bytes: u64,
}

impl Paced {
    fn begin(node: &mut Node, peer: NodeId, bytes: u64) -> Paced {
        node.pace.begin(node.now, peer, bytes);
        Paced { bytes }
    }
}

/// What was sent of a run of blocks.
#[derive(Default)]
pub(crate) struct SentBlocks {
    /// So many answers come.
    pub parts: usize,
    pub bytes: u64,
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
    /// Volumes of snapshots that are still to be compared, oldest first, each before anything after it.
    frozen: VecDeque<VolumeId>,
    works: BTreeMap<Key, Work>,
    pieces: BTreeMap<Key, Piece>,
    /// What was compared and brought, and is still marked there.
    brought: Vec<(VolumeId, ExtentIndex)>,
    total: u64,
    sent_bytes: u64,
    meter: Meter,
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

    /// Whether guests are served while a required replica is settled like this. What is still to be mended in a snapshot would show
    /// through what is read or zeroed meanwhile.
    pub(crate) fn lets_serve(&self) -> bool {
        self.direction == Direction::There && self.is_continuous && self.frozen.is_empty()
    }

    pub(crate) fn progress(&self, now: Instant) -> ResyncProgress {
        let extents_left = (self.left.len() + self.works.len()) as u64;
        let (bytes_per_second, seconds_left) =
            self.meter.rate(now, self.total - extents_left, self.sent_bytes, extents_left);
        let (extents_total, sent_bytes) = (self.total, self.sent_bytes);
        ResyncProgress { extents_total, extents_left, sent_bytes, bytes_per_second, seconds_left }
    }

    /// Whether there is something that can be begun.
    fn has_more(&self) -> bool {
        self.next_run().is_some() || self.may_compare() && self.next_extent().is_some()
    }

    fn may_compare(&self) -> bool {
        let is_compared = |work: &&Work| !matches!(work.step, Step::Sending { .. });
        self.works.len() < EXTENTS_AT_ONCE && self.works.values().filter(is_compared).count() < COMPARED_AT_ONCE
    }

    /// The extent that is to be compared next, if one may be begun now. Newer layers let older ones be seen through: what is
    /// mended in a snapshot may change what a later one shows, so that one has ended before the next begins.
    fn next_extent(&self) -> Option<(VolumeId, ExtentIndex)> {
        match self.frozen.front() {
            Some(volume) => self.left.range((*volume, ExtentIndex(0))..).next().filter(|(of, _)| of == volume).copied(),
            None => self.left.first().copied(),
        }
    }

    /// Goes on to the next snapshot when one is done.
    fn end_stages(&mut self) {
        while let Some(volume) = self.frozen.front()
            && self.next_extent().is_none()
            && self.works.values().all(|work| work.volume != *volume)
        {
            self.frozen.pop_front();
        }
    }

    /// An extent with blocks that are still to be sent, if more pieces may be under way.
    fn next_run(&self) -> Option<Key> {
        let has_runs = |work: &Work| matches!(&work.step, Step::Sending { runs, .. } if !runs.is_empty());
        let next = self.works.iter().find(|(_, work)| has_runs(work)).map(|(key, _)| *key);
        let bytes: u64 = self.pieces.values().map(|piece| piece.range.count.bytes().0).sum();
        next.filter(|_| has_room(self.pieces.len(), bytes))
    }

    pub(crate) fn check(&self) {
        assert!(self.works.len() <= EXTENTS_AT_ONCE && self.pieces.len() <= PIECES_MAX, "a resync is bounded");
        for (key, work) in &self.works {
            assert!(!self.left.contains(&(work.volume, work.extent)), "an extent is compared once");
            let of_it = self.pieces.values().filter(|piece| piece.work == *key).count();
            match work.step {
                Step::Sending { pieces, .. } => assert_eq!(of_it, pieces, "pieces are counted"),
                _ => assert_eq!(of_it, 0, "nothing is sent before it was compared"),
            }
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
        // What a trailing replica has of the generation by which it trails is a prefix only.
        let trails = matches!(standing, Standing::Trailing { .. });
        let since = since.map(|stamp| if trails { before(stamp) } else { stamp });
        let since = since.map_or(Generation(0), |stamp| stamp.generation);
        let resets = trails || member.mode == Mode::Async;
        // Whoever the record names had each snapshot taken at one point with the primary: what was written about that had ended everywhere.
        // What a snapshot itself names here or there (hot, or lost with a disk) is compared all the same.
        let is_named = self.spec.as_ref().is_some_and(|spec| spec.record.in_sync.contains(&peer));
        let lived_on = is_named && is_continuous && direction == Direction::There;
        let volumes = self.ordered_volumes();
        let (left, works) = (BTreeSet::new(), BTreeMap::new());
        let frozen = volumes.iter().filter(|(_, is_written)| !is_written).map(|(volume, _)| *volume).collect();
        let meter = Meter::new(node.now);
        let (pieces, brought) = (BTreeMap::new(), Vec::new());
        let (total, sent_bytes) = (0, 0);
        let mut sync =
            Sync { direction, is_continuous, left, frozen, works, pieces, brought, total, sent_bytes, meter };
        for (volume, _) in &volumes {
            let hot = node.store.hot(*volume);
            let changed = match since {
                Generation(0) => node.store.allocated(*volume),
                _ => Vec::new(),
            };
            let candidates = hot.into_iter().chain(changed).chain(node.store.changed_since(*volume, since));
            sync.left.extend(candidates.map(|extent| (*volume, extent)));
        }
        let Some(primary) = &mut self.primary else { return };
        for (volume, extents) in theirs {
            for extent in extents {
                sync.left.insert((volume, extent));
                // It may be hot there, and only its primary can say when it need not be any more.
                primary.warm.entry((volume, extent)).or_insert((0, node.now));
            }
        }
        // What was written about when a snapshot was taken may have come to the replica before or after it made its own.
        let snapshots = self.spec.iter().flat_map(|spec| spec.snapshots.each.values()).filter(|_| !lived_on);
        for snapshot in snapshots.filter(|snapshot| snapshot.taken.is_some_and(|taken| taken >= since)) {
            for (volume, frozen) in &snapshot.volumes {
                let all = (frozen.of, ExtentIndex(0))..=(frozen.of, ExtentIndex(u32::MAX));
                let also: Vec<ExtentIndex> = sync.left.range(all).map(|(_, extent)| *extent).collect();
                sync.left.extend(also.into_iter().map(|extent| (*volume, extent)));
            }
        }
        let Some(primary) = &mut self.primary else { return };
        sync.total = sync.left.len() as u64;
        if let Some(member) = primary.member(peer) {
            member.state = if required { MemberState::Settling(sync) } else { MemberState::Copying(sync) };
        }
        self.cool_later(node);
        if resets {
            return self.begin_trail(node, peer);
        }
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
        self.syncs().find_map(|(peer, sync)| sync.works.get_mut(&key).map(|work| (peer, work)))
    }

    /// The replica to which this piece goes.
    fn piece(&mut self, key: Key) -> Option<(NodeId, &mut Piece)> {
        self.syncs().find_map(|(peer, sync)| sync.pieces.get_mut(&key).map(|piece| (peer, piece)))
    }

    fn syncs(&mut self) -> impl Iterator<Item = (NodeId, &mut Sync)> {
        let members = self.primary.iter_mut().flat_map(|primary| &mut primary.members);
        members.filter_map(|(peer, member)| match &mut member.state {
            MemberState::Settling(sync) | MemberState::Copying(sync) => Some((*peer, sync)),
            _ => None,
        })
    }

    /// Whether the resync of this replica goes at the pace that the guests allow; else they wait for it.
    fn is_paced(&self, peer: NodeId) -> bool {
        let member = self.primary.as_ref().and_then(|primary| primary.members.get(&peer));
        member.is_some_and(|member| match &member.state {
            MemberState::Copying(_) => true,
            MemberState::Settling(sync) => sync.lets_serve() && !self.awaits_snapshot(),
            _ => false,
        })
    }

    /// Has what can be begun begin, now or when its turn comes; when nothing is left the replica holds everything.
    pub(crate) fn step_sync(&mut self, node: &mut Node, peer: NodeId) {
        if let Some(sync) = self.sync(peer) {
            sync.end_stages();
        }
        if !self.is_paced(peer) {
            while self.begin_one(node, peer) {}
        } else if self.sync(peer).is_some_and(|sync| sync.has_more()) {
            node.pace.queue(peer, self.id);
        }
        let Some(sync) = self.sync(peer).filter(|sync| sync.left.is_empty() && sync.works.is_empty()) else { return };
        let direction = sync.direction;
        self.cool_brought(node, peer);
        if self.spec.as_ref().is_some_and(|spec| spec.mode(peer) == Mode::Async) {
            return self.trail_from_here(node, peer);
        }
        self.confirm_member(node, peer);
        if direction == Direction::Here {
            self.is_continuous = true;
            self.note_as_primary(node);
            self.begin_joined(node);
        }
    }

    /// It is this group's turn to begin one thing on the link to the peer.
    pub(crate) fn on_turn(&mut self, node: &mut Node, peer: NodeId) {
        if self.is_paced(peer) {
            self.begin_one(node, peer);
            self.step_sync(node, peer);
        }
    }

    /// Begins the comparison of the next extent, or else a piece of what differs; `false` if there is neither.
    fn begin_one(&mut self, node: &mut Node, peer: NodeId) -> bool {
        let is_paced = self.is_paced(peer);
        let Some(sync) = self.sync(peer) else { return false };
        // First what is to be marked, then what is to be written.
        if let Some(next) = sync.next_extent().filter(|_| sync.may_compare()) {
            self.begin_extent(node, peer, next, is_paced);
            return true;
        }
        let Some(work) = sync.next_run() else { return false };
        let Some(Work { volume, step: Step::Sending { runs, pieces }, .. }) = sync.works.get_mut(&work) else {
            return false;
        };
        let Some(run) = runs.pop_front() else { return false };
        let piece_blocks = match is_paced {
            true => node.pace.piece_blocks(node.now, peer),
            false => PIECE_BLOCKS_SETTLING,
        };
        let count = run.count.0.min(piece_blocks);
        if count < run.count.0 {
            runs.push_front(BlockRange::new(run.start.plus(BlockCount(count)), BlockCount(run.count.0 - count)));
        }
        *pieces += 1;
        let (volume, range) = (*volume, BlockRange::new(run.start, BlockCount(count)));
        let paced = is_paced.then(|| Paced::begin(node, peer, range.count.bytes().0));
        let key = node.next_key();
        let Some(sync) = self.sync(peer) else { return false };
        sync.pieces.insert(key, Piece { work, volume, range, step: PieceStep::Locking, paced });
        // Reads may go on beside it.
        self.lock(node, key, volume, range, Access::Read);
        true
    }

    /// Begins the comparison of an extent that is left.
    fn begin_extent(&mut self, node: &mut Node, peer: NodeId, at: (VolumeId, ExtentIndex), is_paced: bool) {
        let (volume, extent) = at;
        let Some(sync) = self.sync(peer) else { return };
        sync.left.remove(&at);
        let access = if sync.direction == Direction::Here { Access::Write } else { Access::Read };
        // Extents beyond the volume's end hold nothing.
        let Some(range) = self.extent_range(volume, extent) else { return };
        let paced = is_paced.then(|| Paced::begin(node, peer, COMPARE_BYTES));
        let key = node.next_key();
        let Some(sync) = self.sync(peer) else { return };
        sync.works.insert(key, Work { volume, extent, step: Step::Locking, paced });
        self.lock(node, key, volume, range, access);
    }

    pub(crate) fn lock(&mut self, node: &mut Node, key: Key, volume: VolumeId, range: BlockRange, access: Access) {
        let Some(primary) = &mut self.primary else { return };
        if primary.queue.push(key, volume, range, access) {
            self.on_blocks_locked(node, key);
        }
    }

    /// The blocks of an extent that the volume has; none for an extent beyond its end.
    pub(crate) fn extent_range(&self, volume: VolumeId, extent: ExtentIndex) -> Option<BlockRange> {
        let blocks = self.blocks(volume)?;
        let start = extent.first_block().0;
        (start < blocks).then(|| BlockRange::new(BlockIndex(start), BlockCount((blocks - start).min(EXTENT_BLOCKS))))
    }

    /// Nobody changes these blocks now: those of an extent, of a piece, or of a scrub.
    pub(crate) fn on_blocks_locked(&mut self, node: &mut Node, key: Key) {
        if self.on_scrub_locked(node, key) {
            return;
        }
        if let Some((peer, piece)) = self.piece(key) {
            piece.step = PieceStep::Reading;
            let (volume, range) = (piece.volume, piece.range);
            return self.copy_job(node, peer, key, volume, range, Act::Read);
        }
        let Some((peer, work)) = self.work(key) else { return };
        work.step = Step::Own;
        let (volume, extent) = (work.volume, work.extent);
        let Some(range) = self.extent_range(volume, extent) else { return };
        self.copy_job(node, peer, key, volume, range, Act::Checksums);
    }

    fn copy_job(&mut self, node: &mut Node, peer: NodeId, key: Key, volume: VolumeId, range: BlockRange, act: Act) {
        let (id, generation) = (self.id, self.generation());
        let origin = Origin::Copy { peer, key };
        self.local.submit(node, id, generation, Job { origin, volume, range, act, fua: false, is_received: false });
    }

    /// The local disk gave checksums of an extent, or the blocks of a piece.
    pub(crate) fn on_copy_job(&mut self, node: &mut Node, peer: NodeId, key: Key, result: JobResult) {
        if let Some((_, piece)) = self.piece(key) {
            let (volume, range) = (piece.volume, piece.range);
            return match result {
                Ok(StoreReply::Read { data, checksums }) => self.send_piece(node, peer, key, &data, &checksums),
                Err(StoreError::Corrupt(ranges)) => {
                    self.begin_repair(node, crate::repair::For::Copy { peer, key }, volume, ranges);
                }
                Err(error) => self.on_store_error(node, &error),
                Ok(_) => unreachable!("the store answers what it is asked: {volume} {range:?}"),
            };
        }
        let Some((_, work)) = self.work(key) else { return };
        let (volume, extent) = (work.volume, work.extent);
        match (&mut work.step, result) {
            (step @ Step::Own, Ok(StoreReply::Checksums(mut checksums))) => {
                *step = Step::Comparing;
                let Some(range) = self.extent_range(volume, extent) else { return };
                checksums.truncate(range.count.0 as usize);
                self.ask_compare(node, peer, What::Compare(key), volume, range, checksums);
            }
            (_, Err(error)) => self.on_store_error(node, &error),
            (_, Ok(_)) => {}
        }
    }

    /// Asks a replica which blocks of a range, within one extent, have other checksums there.
    pub(crate) fn ask_compare(
        &mut self,
        node: &mut Node,
        peer: NodeId,
        what: What,
        volume: VolumeId,
        range: BlockRange,
        checksums: Vec<BlockChecksum>,
    ) {
        let group = self.id;
        let Some((sequence, stamp)) = self.ask(node, peer, what) else { return };
        let message = Message::Compare { group, stamp, sequence, volume, range };
        node.send(peer, Frame { message, checksums, data: None });
    }

    fn send_piece(&mut self, node: &mut Node, peer: NodeId, key: Key, data: &Data, checksums: &[BlockChecksum]) {
        let Some((_, piece)) = self.piece(key) else { return };
        let (volume, range) = (piece.volume, piece.range);
        let sent = self.send_blocks(node, peer, What::Copy(key), volume, range, data, checksums);
        if let Some(sync) = self.sync(peer) {
            sync.sent_bytes += sent.bytes;
        }
        if let Some((_, piece)) = self.piece(key) {
            piece.step = PieceStep::Sent { awaited: sent.parts };
        }
    }

    /// Sends blocks as they are stored here to a replica that has something else. Blocks that are not stored here are given back
    /// there, not written as zeros: thin stays thin. Each part is answered with `what`.
    #[allow(clippy::too_many_arguments)] // each is one part of what is sent, said once
    pub(crate) fn send_blocks(
        &mut self,
        node: &mut Node,
        peer: NodeId,
        what: What,
        volume: VolumeId,
        whole: BlockRange,
        data: &Data,
        checksums: &[BlockChecksum],
    ) -> SentBlocks {
        let group = self.id;
        let mut sent = SentBlocks::default();
        for (range, is_zero) in whole.split_by(|block| checksums[(block.0 - whole.start.0) as usize].is_zero()) {
            let Some((sequence, stamp)) = self.ask(node, peer, what) else { return sent };
            sent.parts += 1;
            if is_zero {
                node.send_bare(peer, Message::Zero { group, stamp, sequence, volume, range, fua: false });
                continue;
            }
            sent.bytes += range.count.bytes().0;
            let message = Message::Write { group, stamp, sequence, volume, range, fua: false };
            let checksums = checksums[range.places_in(whole)].to_vec();
            node.send(peer, Frame { message, checksums, data: Some(slice(data, whole, range)) });
        }
        sent
    }

    /// Bad blocks here were mended from a good copy, or there is none.
    pub(crate) fn on_copy_repaired(
        &mut self,
        node: &mut Node,
        peer: NodeId,
        key: Key,
        outcome: crate::repair::Outcome,
    ) {
        let is_mended = outcome == crate::repair::Outcome::Mended;
        let (volume, range) = if let Some((_, piece)) = self.piece(key) {
            (piece.volume, piece.range)
        } else if let Some((_, work)) = self.work(key) {
            if is_mended && matches!(work.step, Step::Taking) {
                return self.end_work(node, peer, key); // taken over
            }
            (work.volume, BlockRange::new(work.extent.first_block(), BlockCount(EXTENT_BLOCKS)))
        } else {
            return;
        };
        if is_mended {
            return self.copy_job(node, peer, key, volume, range, Act::Read);
        }
        // What cannot be read cannot be brought. The replica is not in sync and says why; it is not tried for ever.
        self.make_unfit(node, peer, format!("blocks of {volume} in {range:?} cannot be read on the primary"));
    }

    /// The replica says which blocks of the extent are not the same there.
    pub(crate) fn on_differs(&mut self, node: &mut Node, key: Key, runs: Vec<BlockRange>) {
        let now = node.now;
        let Some((peer, work)) = self.work(key) else { return };
        if !matches!(work.step, Step::Comparing) {
            return;
        }
        let (volume, extent) = (work.volume, work.extent);
        if let Some(paced) = work.paced.take() {
            node.pace.end(now, peer, paced.bytes);
        }
        let Some(whole) = self.extent_range(volume, extent) else { return };
        if !runs.iter().all(|run| run.is_within(whole)) {
            return self.make_unfit(node, peer, "it names blocks that it was not asked about".to_string());
        }
        let is_taken = self.sync(peer).is_some_and(|sync| sync.direction == Direction::Here);
        let Some((_, work)) = self.work(key) else { return };
        if is_taken {
            work.step = Step::Taking;
            return self.begin_repair(node, crate::repair::For::Take { peer, key }, volume, runs);
        }
        let is_other = !runs.is_empty();
        work.step = Step::Sending { runs: runs.into(), pieces: 0 };
        if let Some(stamp) = self.acting().map(|spec| spec.record.stamp).filter(|_| is_other) {
            // Its mark is made there while other pieces are on their way.
            node.send_bare(peer, Message::Heat { group: self.id, stamp, volume, extents: vec![extent] });
        }
        // From here on writes to it go to the replica too.
        let Some(primary) = &mut self.primary else { return };
        let ready = primary.queue.remove(key);
        self.run_ready(node, ready);
        self.end_work_if_done(node, peer, key);
        self.step_sync(node, peer);
    }

    /// The replica has written a part of a piece.
    pub(crate) fn on_copied(&mut self, node: &mut Node, key: Key) {
        let now = node.now;
        let Some((peer, piece)) = self.piece(key) else { return };
        let PieceStep::Sent { awaited } = &mut piece.step else { return };
        *awaited = awaited.saturating_sub(1);
        if *awaited > 0 {
            return;
        }
        let Some(Piece { work, paced, .. }) = self.sync(peer).and_then(|sync| sync.pieces.remove(&key)) else { return };
        if let Some(paced) = paced {
            node.pace.end(now, peer, paced.bytes);
        }
        if let Some((_, Work { step: Step::Sending { pieces, .. }, .. })) = self.work(work) {
            *pieces -= 1;
        }
        let Some(primary) = &mut self.primary else { return };
        let ready = primary.queue.remove(key);
        self.run_ready(node, ready);
        self.end_work_if_done(node, peer, work);
        self.step_sync(node, peer);
    }

    fn end_work_if_done(&mut self, node: &mut Node, peer: NodeId, key: Key) {
        let Some((_, work)) = self.work(key) else { return };
        if matches!(&work.step, Step::Sending { runs, pieces: 0 } if runs.is_empty()) {
            self.end_work(node, peer, key);
        }
    }

    fn end_work(&mut self, node: &mut Node, peer: NodeId, key: Key) {
        let now = node.now;
        let Some(sync) = self.sync(peer) else { return };
        let Some(work) = sync.works.remove(&key) else { return };
        let done = sync.total - (sync.left.len() + sync.works.len()) as u64;
        sync.meter.mark(now, done, sync.sent_bytes);
        sync.brought.push((work.volume, work.extent));
        if sync.brought.len() >= COOLED_AT_ONCE {
            self.cool_brought(node, peer);
        }
        let Some(primary) = &mut self.primary else { return };
        let ready = primary.queue.remove(key);
        self.run_ready(node, ready);
        self.step_sync(node, peer);
    }

    /// Both hold the same of what was compared, and what is in flight on it keeps it warm: its marks there may go, unless requests
    /// keep them hot anyway.
    fn cool_brought(&mut self, node: &mut Node, peer: NodeId) {
        let group = self.id;
        let brought = self.sync(peer).map(|sync| std::mem::take(&mut sync.brought)).unwrap_or_default();
        let Some(stamp) = self.acting().map(|spec| spec.record.stamp) else { return };
        let Some(primary) = &self.primary else { return };
        let mut by_volume: BTreeMap<VolumeId, Vec<ExtentIndex>> = BTreeMap::new();
        for (volume, extent) in brought.into_iter().filter(|at| !primary.warm.contains_key(at)) {
            by_volume.entry(volume).or_default().push(extent);
        }
        for (volume, extents) in by_volume {
            node.send_bare(peer, Message::Cool { group, stamp, volume, extents, reap: false });
        }
    }

    /// A resync is given up: its extents are free again. Its candidates are gathered anew when the replica joins again.
    pub(crate) fn end_sync(&mut self, node: &mut Node, peer: NodeId, state: MemberState) {
        let (MemberState::Settling(sync) | MemberState::Copying(sync)) = state else { return };
        let works = sync.works.into_iter().map(|(key, work)| (key, work.paced));
        for (key, paced) in works.chain(sync.pieces.into_iter().map(|(key, piece)| (key, piece.paced))) {
            if let Some(paced) = paced {
                node.pace.end(node.now, peer, paced.bytes);
            }
            let Some(primary) = &mut self.primary else { continue };
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
            Verdict::Trailing { at } => before(at).generation,
            _ => return Vec::new(),
        };
        let volumes = self.ordered_volumes().into_iter();
        volumes
            .map(|(volume, _)| {
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
