//! A trailing replica's own side (mode `Async`): changes arrive in order, are gathered into batches, and each batch is durable
//! in the spool before any of it is applied. So the replica holds a cut at every moment from when it notes that it trails
//! until it notes that it is about to be compared (`docs/design/0005-modes.md`).
//!
//! The life of a batch is `Step`. A newer record is adopted only between two batches, and after a flush: whoever is promoted
//! by it is at a cut that a power cut does not take back.

use crate::group::Group;
use crate::local::{Act, Job, JobResult, Origin};
use crate::node::{Node, Purpose};
use crate::note::Note;
use crate::spool::{self, BATCH_BYTES, BATCH_CHANGES, Batch, Change, Head};
use crate::verdict::Verdict;
use crate::wire::{Frame, Message, Sequence, TrailPoint, TrailRun};
use pollux_base::order::Lag;
use pollux_base::record::Mode;
use pollux_base::unit::BlockRange;
use pollux_base::{BlockCount, BlockIndex, ExtentIndex, Instant, NodeId, Session, Stamp, VolumeId};
use pollux_store::{StoreError, StoreOp, StoreReply};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

/// An extent to which nothing was applied for so long is cooled; as for a primary's.
const COOL_AFTER: Duration = Duration::from_secs(5);
/// Hot extents that a node's trailing replicas cause, each; beyond it the longest idle cool at once. A quarter of the
/// store's bound: the rest is for the primaries of this node and of its peers.
fn warm_max(node: &Node) -> usize {
    node.store.hot_extents_max() / 4
}
/// Pieces of a batch that are applied at once: enough to keep a disk busy, few enough that their extents never fill the
/// store's bound between two coolings.
const PIECES_AT_ONCE: usize = 64;

#[derive(Debug, Default)]
enum Step {
    #[default]
    Idle,
    /// After a start: what lies in the spool is looked up.
    Finding {
        found: Vec<Head>,
        left: usize,
    },
    /// The last two batches are read, the newest first, to be applied again if the replica trails.
    Reading {
        head: Head,
        others: Vec<Head>,
        whole: Vec<Batch>,
    },
    Spooling(Batch),
    Flushing(Batch),
    /// `left` are under way.
    Applying {
        pieces: VecDeque<Change>,
        left: usize,
    },
    /// That it trails by this record, or trails no more, is being noted.
    Noting,
    /// Everything that was applied is flushed before a newer record is adopted.
    Resting,
}

/// The primary is about to compare this replica.
#[derive(Debug)]
struct Reset {
    peer: NodeId,
    session: Session,
    sequence: Sequence,
    stamp: Stamp,
    run: TrailRun,
    from: TrailPoint,
}

#[derive(Debug, Default)]
pub(crate) struct Trailing {
    step: Step,
    /// What arrived, in order; `true` ends a change.
    incoming: VecDeque<(TrailPoint, Change, bool)>,
    /// At these positions it is a cut by these records.
    marks: VecDeque<(u64, Stamp)>,
    /// Of the batch under way.
    batch_marks: Option<Stamp>,
    reset: Option<Reset>,
    run: TrailRun,
    /// Position up to which everything arrived.
    received: u64,
    /// What is durable here.
    held: TrailPoint,
    /// The newest that the primary has told of.
    end: TrailPoint,
    /// Of the last batch.
    sequence: u64,
    is_rested: bool,
    /// A newer record waits for the end of what is going on.
    adopts: bool,
    warm: BTreeMap<(VolumeId, ExtentIndex), Instant>,
}

impl Trailing {
    fn is_idle(&self) -> bool {
        matches!(self.step, Step::Idle)
    }

    /// A newer record is known and not adopted yet.
    pub(crate) fn adopts(&self) -> bool {
        self.adopts
    }

    /// What this replica says of itself when it joins.
    pub(crate) fn place(&self) -> (TrailRun, u64) {
        (self.run, self.held.position)
    }

    /// What it lacks, as far as it was told.
    pub(crate) fn lag(&self) -> Lag {
        let (end, held) = (self.end, self.held);
        Lag { bytes: end.bytes.saturating_sub(held.bytes), ms: end.ms.saturating_sub(held.ms) }
    }

    /// When something is to be cooled.
    pub(crate) fn wake(&self) -> Option<Instant> {
        self.warm.values().min().map(|at| *at + COOL_AFTER).filter(|_| self.is_idle())
    }

    /// The next batch: as much as has arrived whole, up to a bound.
    fn next_batch(&mut self) -> Option<Batch> {
        let (mut bytes, mut count, mut whole) = (0, 0, 0);
        for (_, change, is_last) in &self.incoming {
            bytes += change.bytes();
            count += 1;
            if *is_last {
                whole = count;
                if bytes >= BATCH_BYTES || count >= BATCH_CHANGES {
                    break;
                }
            }
        }
        if whole == 0 && self.marks.is_empty() {
            return None;
        }
        let (after, mut held) = (self.held.position, self.held);
        let mut changes = Vec::with_capacity(whole);
        for (point, change, _) in self.incoming.drain(..whole) {
            held = point;
            changes.push(change);
        }
        while let Some((position, at)) = self.marks.front().copied()
            && position <= held.position
        {
            self.marks.pop_front();
            self.batch_marks = Some(at);
        }
        if changes.is_empty() && self.batch_marks.is_none() {
            return None;
        }
        self.sequence += 1;
        Some(Batch { sequence: self.sequence, run: self.run, after, held, end: self.end, changes })
    }

    fn forget_incoming(&mut self) {
        self.incoming.clear();
        self.marks.clear();
        self.reset = None;
        self.received = match &self.step {
            Step::Spooling(batch) | Step::Flushing(batch) => batch.held.position,
            _ => self.held.position,
        };
    }
}

impl Group {
    /// After a start: the newest whole batch is applied again before anything else happens to this replica.
    pub(crate) fn begin_replay(&mut self, node: &mut Node) {
        let volume = spool::volume(self.id);
        if node.store.volumes().any(|(found, ..)| found == volume) {
            self.trailing.step = Step::Finding { found: Vec::new(), left: 2 };
            for (area, range) in spool::heads().into_iter().enumerate() {
                self.trail_job(node, area, volume, range, Act::Read);
            }
        }
    }

    /// Whether a newer record may be adopted now. If not, `adopt` is called again when it may.
    pub(crate) fn rests_before_adopting(&mut self, node: &mut Node) -> bool {
        let trails = self.note.as_ref().is_some_and(|note| note.trails.is_some());
        let trailing = &mut self.trailing;
        if node.pool_failed.is_some() || trailing.is_idle() && (trailing.is_rested || !trails) {
            trailing.adopts = false;
            trailing.forget_incoming();
            return true;
        }
        trailing.adopts = true;
        self.step_trailing(node);
        false
    }

    fn trail_job(&mut self, node: &mut Node, part: usize, volume: VolumeId, range: BlockRange, act: Act) {
        let (id, generation) = (self.id, self.generation());
        let job = Job { origin: Origin::Trail { part }, volume, range, act, fua: false, is_received: false };
        self.local.submit(node, id, generation, job);
    }

    fn trail_flush(&mut self, node: &mut Node) {
        let nothing = BlockRange::new(BlockIndex(0), BlockCount(0));
        self.trail_job(node, 0, VolumeId(0), nothing, Act::Flush);
    }

    /// A change arrived from the primary.
    #[allow(clippy::too_many_arguments)] // each is one part of the message, said once
    pub(crate) fn on_trail(
        &mut self,
        node: &mut Node,
        run: TrailRun,
        point: TrailPoint,
        end: TrailPoint,
        change: Change,
        is_last: bool,
    ) {
        let trailing = &mut self.trailing;
        if run != trailing.run || trailing.reset.is_some() {
            return; // ignore_of_another_run: the primary begins anew with this replica
        }
        trailing.end = if end.position > trailing.end.position { end } else { trailing.end };
        if point.position != trailing.received + 1 {
            return; // ignore_what_is_here_already, or comes after something that was lost
        }
        trailing.incoming.push_back((point, change, is_last));
        if is_last {
            trailing.received = point.position;
            self.step_trailing(node);
        }
    }

    /// Everything before this arrived, and makes this replica a cut.
    pub(crate) fn on_trail_mark(&mut self, node: &mut Node, run: TrailRun, at: Stamp) {
        let trailing = &mut self.trailing;
        if run == trailing.run && trailing.reset.is_none() {
            trailing.marks.push_back((trailing.received, at));
            self.step_trailing(node);
        }
    }

    /// The primary is about to compare this replica, and tells from where on changes follow.
    #[allow(clippy::too_many_arguments)] // each is one part of the message, said once
    pub(crate) fn on_trail_reset(
        &mut self,
        node: &mut Node,
        peer: NodeId,
        session: Session,
        sequence: Sequence,
        stamp: Stamp,
        run: TrailRun,
        from: TrailPoint,
    ) {
        self.trailing.forget_incoming();
        self.trailing.reset = Some(Reset { peer, session, sequence, stamp, run, from });
        self.step_trailing(node);
    }

    /// The session with the primary is over: it sends again what is not durable here.
    pub(crate) fn forget_trail_of(&mut self, peer: NodeId) {
        if self.spec.as_ref().is_some_and(|spec| spec.record.primary == peer) {
            self.trailing.forget_incoming();
        }
    }

    /// Does what comes next, if nothing is going on.
    pub(crate) fn step_trailing(&mut self, node: &mut Node) {
        if !self.trailing.is_idle() || node.pool_failed.is_some() {
            return;
        }
        let trails = self.note.as_ref().is_some_and(|note| note.trails.is_some());
        if self.trailing.adopts {
            if trails && !self.trailing.is_rested {
                self.trailing.step = Step::Resting;
                return self.trail_flush(node);
            }
            return self.adopt(node);
        }
        if self.trailing.reset.is_some() {
            return match trails {
                true => self.note_trails(node, None),
                false => self.on_reset(node),
            };
        }
        self.cool_trailing(node);
        let Some(batch) = self.trailing.next_batch() else { return };
        self.trailing.is_rested = false;
        let (range, data) = spool::encode(&batch);
        let checksums = pollux_base::BlockChecksum::of_all(data.as_slice());
        let volume = spool::volume(self.id);
        let now = node.now;
        self.trailing.warm.extend(range.extents().map(|extent| ((volume, extent), now)));
        self.trailing.step = Step::Spooling(batch);
        self.trail_job(node, 0, volume, range, Act::Write { data, checksums });
    }

    /// It is noted that this is no cut: the primary may compare.
    fn on_reset(&mut self, node: &mut Node) {
        let Some(Reset { peer, session, sequence, stamp, run, from }) = self.trailing.reset.take() else { return };
        let trailing = &mut self.trailing;
        (trailing.run, trailing.held, trailing.end, trailing.received) = (run, from, from, from.position);
        node.answer(peer, session, Frame::bare(Message::Done { group: self.id, stamp, sequence }));
        self.step_trailing(node);
    }

    fn note_trails(&mut self, node: &mut Node, trails: Option<Stamp>) {
        let Some(note) = self.note.clone() else { return };
        self.trailing.step = Step::Noting;
        let note = Note { trails, ..note };
        let op = StoreOp::PutNote { group: self.id, note: Some(note.encode()) };
        node.request(self.id, Purpose::NoteTrails(trails), op);
    }

    /// The note is durable.
    pub(crate) fn on_trails_noted(&mut self, node: &mut Node, trails: Option<Stamp>) {
        if let Some(note) = &mut self.note {
            note.trails = trails;
        }
        if let Verdict::Stale { .. } | Verdict::Trailing { .. } = self.verdict {
            self.verdict = match trails {
                Some(at) => Verdict::Trailing { at },
                None => Verdict::Stale { since: self.note.as_ref().and_then(|note| note.in_sync_at) },
            };
        }
        self.trailing.step = Step::Idle;
        if trails.is_none() && self.trailing.reset.is_some() {
            return self.on_reset(node);
        }
        self.step_trailing(node);
    }

    /// The store has done something for this replica's batches.
    pub(crate) fn on_trail_job(&mut self, node: &mut Node, part: usize, result: JobResult) {
        match &result {
            Err(StoreError::Full) => return self.retry_when_space(node),
            Err(error @ (StoreError::Disk(_) | StoreError::NoteTooLong(_))) => return self.on_store_error(node, error),
            // What does not match its checksum was not written whole. What has no place (its volume is gone) is over.
            Err(StoreError::Corrupt(_) | StoreError::NoVolume | StoreError::OutOfRange) | Ok(_) => {}
        }
        let data = match result {
            Ok(StoreReply::Read { data, .. }) => Some(data),
            _ => None,
        };
        match std::mem::take(&mut self.trailing.step) {
            Step::Finding { mut found, left } => {
                found.extend(data.and_then(|data| spool::decode_head(part, data.as_slice())));
                if left > 1 {
                    self.trailing.step = Step::Finding { found, left: left - 1 };
                } else {
                    found.sort_by_key(|head| head.sequence);
                    self.read_found(node, found, Vec::new());
                }
            }
            Step::Reading { head, others, mut whole } => {
                whole.extend(data.and_then(|data| spool::decode(head, &data)));
                self.read_found(node, others, whole);
            }
            Step::Spooling(batch) => {
                self.trailing.step = Step::Flushing(batch);
                self.trail_flush(node);
            }
            Step::Flushing(batch) => {
                self.trailing.held = batch.held;
                self.tell_held(node);
                self.apply_changes(node, batch.changes);
            }
            Step::Applying { pieces, left } => {
                self.trailing.step = Step::Applying { pieces, left: left - 1 };
                self.apply_on(node);
            }
            Step::Resting => {
                self.trailing.is_rested = true;
                self.step_trailing(node);
            }
            step @ (Step::Idle | Step::Noting) => self.trailing.step = step, // ignore_after_a_failure
        }
    }

    /// Tells the primary what is durable here.
    fn tell_held(&mut self, node: &mut Node) {
        let Some(spec) = self.acting() else { return };
        let (group, stamp, primary) = (self.id, spec.record.stamp, spec.record.primary);
        let (run, position) = self.trailing.place();
        node.send_bare(primary, Message::Trailed { group, stamp, run, position });
    }

    /// Reads the batches of which the heads were found, then applies what is whole.
    fn read_found(&mut self, node: &mut Node, mut found: Vec<Head>, mut whole: Vec<Batch>) {
        if let Some(newest) = found.last() {
            self.trailing.sequence = self.trailing.sequence.max(newest.sequence);
        }
        // Whoever is no cut becomes none by a batch: only the number was needed.
        let trails = self.note.as_ref().is_some_and(|note| note.trails.is_some());
        if let Some(head) = found.pop().filter(|_| trails) {
            self.trailing.step = Step::Reading { head, others: found, whole };
            return self.trail_job(node, 0, spool::volume(self.id), head.range, Act::Read);
        }
        if whole.len() == 2 && !whole[1].precedes(&whole[0]) {
            whole.pop();
        }
        let Some(newest) = whole.first() else { return self.step_trailing(node) };
        let trailing = &mut self.trailing;
        (trailing.run, trailing.held, trailing.end) = (newest.run, newest.held, newest.end);
        trailing.received = newest.held.position;
        let changes = whole.into_iter().rev().flat_map(|batch| batch.changes).collect();
        self.apply_changes(node, changes);
    }

    fn apply_changes(&mut self, node: &mut Node, changes: Vec<Change>) {
        let mut pieces = VecDeque::new();
        // Where nothing is stored, nor will be by this batch, there is nothing to take away.
        let mut stored: BTreeMap<VolumeId, BTreeSet<ExtentIndex>> = BTreeMap::new();
        for change in changes {
            let volume = change.volume;
            let stored = stored.entry(volume).or_insert_with(|| node.store.allocated(volume).into_iter().collect());
            match change.blocks {
                Some(_) => {
                    stored.extend(change.range.extents());
                    pieces.push_back(change);
                }
                None => {
                    let parts = change.range.split_by_extent().filter(|part| stored.contains(&part.start.extent()));
                    pieces.extend(parts.map(|range| Change { volume, range, blocks: None }));
                }
            }
        }
        self.trailing.step = Step::Applying { pieces, left: 0 };
        self.apply_on(node);
    }

    /// Applies further pieces of the batch; when all are done it is over.
    fn apply_on(&mut self, node: &mut Node) {
        let Step::Applying { pieces, left } = &mut self.trailing.step else { return };
        if *left > 0 {
            return;
        }
        if pieces.is_empty() {
            self.trailing.step = Step::Idle;
            return match self.trailing.batch_marks.take() {
                Some(at) => self.note_trails(node, Some(at)),
                None => self.step_trailing(node),
            };
        }
        let wave: Vec<Change> = pieces.drain(..pieces.len().min(PIECES_AT_ONCE)).collect();
        *left = wave.len();
        let now = node.now;
        for Change { volume, range, blocks } in wave {
            self.trailing.warm.extend(range.extents().map(|extent| ((volume, extent), now)));
            let act = match blocks {
                Some((data, checksums)) => Act::Write { data, checksums },
                None => Act::Zero,
            };
            self.trail_job(node, 0, volume, range, act);
        }
        self.cool_to_bound(node);
    }

    /// Cools what has been idle.
    pub(crate) fn cool_trailing(&mut self, node: &mut Node) {
        if self.trailing.is_idle() {
            let now = node.now;
            self.cool_older(node, |at| now >= at + COOL_AFTER, usize::MAX);
        }
    }

    fn cool_to_bound(&mut self, node: &mut Node) {
        let now = node.now;
        let over = self.trailing.warm.len().saturating_sub(warm_max(node));
        if over > 0 {
            // What is being applied now is not idle.
            self.cool_older(node, |at| at < now, over);
        }
    }

    fn cool_older(&mut self, node: &mut Node, is_old: impl Fn(Instant) -> bool, count: usize) {
        let mut old: Vec<_> =
            self.trailing.warm.iter().filter(|(_, at)| is_old(**at)).map(|(at, since)| (*since, *at)).collect();
        old.sort_unstable();
        let mut by_volume: BTreeMap<VolumeId, Vec<ExtentIndex>> = BTreeMap::new();
        for (_, (volume, extent)) in old.into_iter().take(count) {
            self.trailing.warm.remove(&(volume, extent));
            by_volume.entry(volume).or_default().push(extent);
        }
        for (volume, extents) in by_volume {
            self.cool_here(node, volume, extents, false);
        }
    }

    /// Whether this node's replica is to trail.
    pub(crate) fn is_async(&self, node: &Node) -> bool {
        self.spec.as_ref().is_some_and(|spec| spec.replicas.contains(&node.me) && spec.mode(node.me) == Mode::Async)
    }

    /// What becomes of the spool under the record that is being adopted.
    pub(crate) fn spool_op(&mut self, node: &Node) -> Option<StoreOp> {
        let volume = spool::volume(self.id);
        let exists = node.store.volumes().any(|(found, ..)| found == volume);
        if self.is_async(node) {
            return (!exists).then(|| StoreOp::Create { volume, group: self.id, size: spool::size() });
        }
        self.trailing = Trailing::default();
        exists.then_some(StoreOp::Delete { volume })
    }
}
