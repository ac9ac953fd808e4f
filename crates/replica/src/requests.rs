//! Clients' requests at the primary.
//!
//! The life of a write: held while the group is frozen; queued behind earlier requests on the same blocks; its extents are
//! marked hot (W7); sent to every required replica and to this node's own disk in parallel; answered when all have it
//! (W1). Each request is answered once, and never before that.
//!
//! What is encrypted at rest is so between its start and its end here: a change is encrypted, as a whole, when it has its
//! blocks; what a read brings is decrypted when it is given out, or before a patch goes into it.
//!
//! A patch of a part of a block holds the block like a write from the start: the block is read, as a client would read it,
//! and the whole of it written with the patch in it. So nothing comes between the two, and replicas see whole blocks only.
//!
//! A replica that falls out keeps the requests that it has not finished from ending, until a newer record does without it
//! (W3) or it comes back and has been sent them again. The lease is looked at when a request begins and again before
//! what was read is given out (W5).

use crate::Output;
use crate::group::Group;
use crate::local::{Act, Job, JobResult, Origin, cold_extents};
use crate::node::{Node, Purpose};
use crate::pace::Kind;
use crate::primary::{MemberState, What};
use crate::range_queue::{Access, Key, Ready};
use crate::showing::Shown;
use crate::spool::Change;
use crate::wire::{Frame, Message};
use pollux_base::data::Buffer;
use pollux_base::record::Mode;
use pollux_base::unit::{BLOCK_BYTES, BlockRange};
use pollux_base::{BlockChecksum, BlockCount, BlockError, Data, Instant, NodeId, Op, Reply, Request, RequestId};
use pollux_store::{StoreError, StoreOp, StoreReply};
use smallvec::SmallVec;
use std::collections::{BTreeMap, BTreeSet};

/// How often the blocks of one read are mended from peers before it is given up as unreadable: the first time mends what
/// was bad; more means that this disk returns something else each time.
const REPAIRS_MAX: u32 = 3;

pub(crate) enum Step {
    /// Behind earlier requests.
    Queued,
    /// The extents' hot marks are being made durable.
    Heating,
    /// At the replicas.
    Sent,
    /// At the local disk, or being mended for it.
    ReadingHere,
    /// What was read here is compared at replicas with which it is still to be settled (`showing.rs`).
    Showing(Shown),
    /// At a peer, because this node has no replica that may be read (W6).
    ReadingThere { from: NodeId, tried: BTreeSet<NodeId>, buffer: Option<Buffer>, left: usize },
}

pub(crate) struct Pending {
    pub request: Request,
    /// The client went away.
    is_abandoned: bool,
    /// Tells what is under way from what was given up when the request was begun anew.
    attempt: u32,
    pub step: Step,
    checksums: Vec<BlockChecksum>,
    /// When it began, for the pace of what goes on beside the guests.
    began: Instant,
    targets: Targets,
    /// Replicas that have pieces of it in memory (mode `Memory`), with how many.
    unwritten: BTreeMap<NodeId, u32>,
    repairs: u32,
}

/// Replicas whose answers are awaited, with how many, and with none those that have all of it. They are few.
#[derive(Default)]
struct Targets(SmallVec<[(NodeId, u32); 3]>);

impl Targets {
    fn left(&self, target: NodeId) -> Option<u32> {
        self.0.iter().find(|(node, _)| *node == target).map(|(_, left)| *left)
    }

    fn is_awaited(&self, target: NodeId) -> bool {
        self.left(target).is_some_and(|left| left > 0)
    }

    fn is_done(&self, target: NodeId) -> bool {
        self.left(target) == Some(0)
    }

    fn awaits_nobody(&self) -> bool {
        self.0.iter().all(|(_, left)| *left == 0)
    }

    fn wait_for(&mut self, target: NodeId, answers: u32) {
        self.forget(target);
        self.0.push((target, answers));
    }

    fn forget(&mut self, target: NodeId) {
        self.0.retain(|(node, _)| *node != target);
    }

    fn forget_awaited(&mut self) {
        self.0.retain(|(_, left)| *left == 0);
    }

    /// One answer has come. Whether it was the last from this replica.
    fn answered(&mut self, target: NodeId) -> bool {
        let Some((_, left)) = self.0.iter_mut().find(|(node, left)| *node == target && *left > 0) else { return false };
        *left -= 1;
        *left == 0
    }
}

impl Pending {
    pub(crate) fn check(&self, key: Key) {
        if matches!(self.step, Step::Sent) {
            assert!(!self.targets.awaits_nobody(), "{key:?}: a request at the replicas awaits somebody");
        }
    }

    /// Whether any replica had told that it has pieces in memory; that is forgotten.
    pub(crate) fn forget_unwritten(&mut self) -> bool {
        !std::mem::take(&mut self.unwritten).is_empty()
    }

    fn is_change(&self) -> bool {
        matches!(self.request.op, Op::Write { .. } | Op::Zero { .. })
    }

    fn kind(&self) -> Kind {
        match self.request.op {
            Op::Read { .. } | Op::Status { .. } => Kind::Read,
            Op::Write { .. } | Op::Patch { .. } | Op::Zero { .. } => Kind::Change,
            Op::Flush => Kind::Flush,
        }
    }

    /// Blocks it touches; none for a flush.
    fn range(&self) -> Option<BlockRange> {
        self.request.op.range()
    }
}

/// The bytes of `part` in data that holds `whole`.
pub(crate) fn slice(data: &Data, whole: BlockRange, part: BlockRange) -> Data {
    let places = part.places_in(whole);
    data.slice(places.start * BLOCK_BYTES as usize..places.end * BLOCK_BYTES as usize)
}

impl Group {
    /// Takes a request for a volume of this group.
    pub(crate) fn on_request(&mut self, node: &mut Node, request: Request) {
        let fail = |node: &mut Node, error| node.out.push_back(Output::Reply(request.id, Reply::Failed(error)));
        let Some(blocks) = self.blocks(request.volume) else { return fail(node, BlockError::NoVolume) };
        if self.primary.is_none() {
            return fail(node, BlockError::NotServed);
        }
        let is_change = matches!(request.op, Op::Write { .. } | Op::Patch { .. } | Op::Zero { .. });
        if is_change && self.is_snapshot(request.volume) {
            return fail(node, BlockError::ReadOnly);
        }
        if let Some(range) = request.op.range() {
            if range.start.0.checked_add(range.count.0).is_none_or(|end| end > blocks) {
                return fail(node, BlockError::OutOfRange);
            }
            if let Op::Write { data, .. } = &request.op {
                assert_eq!(data.len() as u64, range.count.bytes().0, "a front end gives as many bytes as it names");
            }
            if let Op::Patch { offset, data, .. } = &request.op {
                let fits = offset.checked_add(data.len()).is_some_and(|end| end as u64 <= BLOCK_BYTES);
                assert!(fits, "a front end patches inside one block");
            }
            if range.count.0 == 0 {
                let reply = match request.op {
                    Op::Read { .. } => Reply::Data(Data::zeroed(0)),
                    Op::Status { .. } => Reply::Status(Vec::new()),
                    _ => Reply::Done,
                };
                node.out.push_back(Output::Reply(request.id, reply));
                return;
            }
        }
        let key = node.next_key();
        if let Some(primary) = &mut self.primary {
            primary.held.insert(key, request);
        }
    }

    /// The client is gone. What it began is finished, what it had not is dropped.
    pub(crate) fn on_abandon(&mut self, id: RequestId) {
        let Some(primary) = &mut self.primary else { return };
        primary.held.retain(|_, request| request.id != id);
        for (_, pending) in primary.requests.iter_mut().filter(|(_, pending)| pending.request.id == id) {
            pending.is_abandoned = true;
        }
    }

    /// Begins held requests if the group is not frozen. Called after everything that may have thawed it.
    pub(crate) fn pump(&mut self, node: &mut Node) {
        let Some(primary) = &self.primary else { return };
        if primary.held.is_empty() || self.holds(node).is_some() {
            return;
        }
        let bound = self.spec.as_ref().map(|spec| spec.lag).unwrap_or_default();
        let held = self.primary.as_mut().map(|primary| std::mem::take(&mut primary.held)).unwrap_or_default();
        for (key, request) in held {
            let is_change = matches!(request.op, Op::Write { .. } | Op::Patch { .. } | Op::Zero { .. });
            match &mut self.primary {
                // It goes on when the replica that is behind has got on.
                Some(primary) if is_change && primary.holds_changes(bound, node.now) => {
                    primary.held.insert(key, request);
                }
                _ => self.begin(node, request),
            }
        }
    }

    fn begin(&mut self, node: &mut Node, request: Request) {
        if let Op::Status { range } = request.op {
            let runs = match self.is_member(node) && self.unsettled(request.volume, range).is_empty() {
                true => node.store.status(request.volume, range),
                false => vec![(range, true)], // it may hold data: a peer knows
            };
            node.out.push_back(Output::Reply(request.id, Reply::Status(runs)));
            return;
        }
        let key = node.next_key();
        let (volume, op) = (request.volume, &request.op);
        let access = if matches!(op, Op::Read { .. }) { Access::Read } else { Access::Write };
        let range = op.range();
        let pending = Pending {
            request,
            is_abandoned: false,
            attempt: 0,
            step: Step::Queued,
            checksums: Vec::new(),
            began: node.now,
            targets: Targets::default(),
            unwritten: BTreeMap::new(),
            repairs: 0,
        };
        node.pace.on_asked(node.now);
        let Some(primary) = &mut self.primary else { return };
        primary.requests.push(key, pending);
        // A flush overtakes nothing: it promises what was acknowledged, and that is at every replica already.
        if range.is_none_or(|range| primary.queue.push(key, volume, range, access)) {
            self.start(node, key); // the group is not frozen: `pump` has just looked
        }
    }

    /// Starts requests and comparisons whose blocks are free now. A request that finds the group frozen goes back to
    /// those held, so that it is in nobody's way.
    pub(crate) fn run_ready(&mut self, node: &mut Node, mut ready: Ready) {
        ready.reverse();
        while let Some(key) = ready.pop() {
            let is_frozen = self.freeze(node).is_some();
            let Some(primary) = &mut self.primary else { return };
            if !primary.requests.contains(key) {
                self.on_blocks_locked(node, key);
            } else if is_frozen {
                let pending = primary.requests.remove(key).expect("looked up above");
                if !pending.is_abandoned {
                    primary.held.insert(key, pending.request);
                }
                let mut more = primary.queue.remove(key);
                more.reverse();
                ready.extend(more);
            } else {
                self.start(node, key);
            }
        }
    }

    fn start(&mut self, node: &mut Node, key: Key) {
        let generation = self.generation();
        let is_member = self.is_member(node);
        let id = self.id;
        self.seal(node, key);
        let Some(primary) = &mut self.primary else { return };
        let Some(pending) = primary.requests.get_mut(key) else { return };
        let volume = pending.request.volume;
        match pending.range() {
            _ if matches!(pending.request.op, Op::Read { .. } | Op::Patch { .. }) => self.start_read(node, key),
            None => self.send_change(node, key),
            Some(range) => {
                for extent in range.extents() {
                    let warm = primary.warm.entry((volume, extent)).or_insert((0, node.now));
                    warm.0 += 1;
                }
                // W7: before anything is written here or sent.
                let cold = if is_member { cold_extents(node, volume, range, generation) } else { Vec::new() };
                if cold.is_empty() {
                    self.send_change(node, key);
                } else {
                    pending.step = Step::Heating;
                    let purpose = Purpose::Heat { key, attempt: pending.attempt };
                    let extents = [cold, self.ahead(node, volume, range)].concat();
                    self.heat_there(node, volume, &extents);
                    node.request(id, purpose, StoreOp::Heat { volume, extents, generation });
                }
                self.cool_under_pressure(node);
            }
        }
    }

    /// Makes of a write what is stored of it: encrypted if its volume is, with checksums. Once, for the local disk and every
    /// peer (W11); what has begun is never held again.
    fn seal(&mut self, node: &Node, key: Key) {
        let Some(volume) = self.pending(key).map(|pending| pending.request.volume) else { return };
        let cipher = self.cipher(node, volume);
        let Some(pending) = self.pending(key) else { return };
        let Op::Write { range, data, .. } = &mut pending.request.op else { return };
        assert!(pending.checksums.is_empty(), "a write begins once");
        if let Some(cipher) = cipher {
            *data = cipher.encrypt(range.start, data);
        }
        pending.checksums = BlockChecksum::of_all(data.as_slice());
    }

    /// The hot marks of a request are durable, unless the generation has moved on.
    pub(crate) fn on_heated(&mut self, node: &mut Node, key: Key, attempt: u32, result: Result<(), StoreError>) {
        let generation = self.generation();
        let is_member = self.is_member(node);
        let Some(pending) = self.primary.as_mut().and_then(|primary| primary.requests.get_mut(key)) else { return };
        if !matches!(pending.step, Step::Heating) || pending.attempt != attempt {
            return; // ignore_superseded: it went on without the local disk
        }
        if let Err(error) = result {
            if error == StoreError::Full
                && let Some(primary) = &mut self.primary
            {
                primary.full_heats.insert(key);
            }
            self.on_store_error(node, &error);
            return;
        }
        if self.adopting.is_some() {
            return; // taken up again when the newer record is durable
        }
        let (volume, range) = (pending.request.volume, pending.range().expect("only changes are heated"));
        let cold = if is_member { cold_extents(node, volume, range, generation) } else { Vec::new() };
        if cold.is_empty() {
            self.send_change(node, key);
        } else {
            node.request(self.id, Purpose::Heat { key, attempt }, StoreOp::Heat { volume, extents: cold, generation });
        }
    }

    /// Gives a write, zero or flush to every replica that must have it and does not.
    fn send_change(&mut self, node: &mut Node, key: Key) {
        let mut needed: SmallVec<[NodeId; 8]> = self.requires(node.me).collect();
        needed.extend(self.is_member(node).then_some(node.me));
        let Some(primary) = &mut self.primary else { return };
        let Some(pending) = primary.requests.get_mut(key) else { return };
        let volume = pending.request.volume;
        let extents = || pending.range().into_iter().flat_map(BlockRange::extents).collect::<SmallVec<[_; 2]>>();
        needed.extend(primary.members.iter().filter_map(|(peer, member)| match &member.state {
            // What is still to be compared is brought by the comparison. Everything else goes to a replica that is being
            // brought up to date as it goes to the others, in the same order; to one that is to trail by the backlog.
            MemberState::Copying(sync) if member.mode != Mode::Async => {
                let extents = extents();
                (!extents.is_empty() && !sync.awaits_all(volume, &extents)).then_some(*peer)
            }
            MemberState::Confirming { .. } => Some(*peer),
            _ => None,
        }));
        needed.sort_unstable();
        needed.dedup();
        pending.step = Step::Sent;
        let local_under_way = pending.targets.is_awaited(node.me);
        pending.targets.forget_awaited();
        needed.retain(|target| !pending.targets.is_done(*target));
        for target in needed {
            if target == node.me {
                if let Some(pending) = self.pending(key) {
                    pending.targets.wait_for(target, 1);
                }
                if !local_under_way {
                    self.change_here(node, key);
                }
            } else {
                self.change_there(node, key, target);
            }
        }
        self.finish_if_done(node, key);
    }

    pub(crate) fn pending(&mut self, key: Key) -> Option<&mut Pending> {
        self.primary.as_mut()?.requests.get_mut(key)
    }

    fn change_here(&mut self, node: &mut Node, key: Key) {
        let (id, generation) = (self.id, self.generation());
        let Some(pending) = self.pending(key) else { return };
        let origin = Origin::Request { key, attempt: pending.attempt };
        let volume = pending.request.volume;
        let nothing = BlockRange::new(pollux_base::BlockIndex(0), pollux_base::BlockCount(0));
        let (range, act, fua) = match &pending.request.op {
            Op::Write { range, data, fua } => {
                (*range, Act::Write { data: data.clone(), checksums: pending.checksums.clone() }, *fua)
            }
            Op::Zero { range, fua } => (*range, Act::Zero, *fua),
            Op::Flush => (nothing, Act::Flush, false),
            Op::Read { .. } | Op::Patch { .. } | Op::Status { .. } => unreachable!("only changes and flushes are sent"),
        };
        self.local.submit(node, id, generation, Job { origin, volume, range, act, fua, is_received: false });
    }

    /// Sends the request to one peer, in pieces of at most an extent. Without a session nothing is sent; the peer stays
    /// awaited.
    fn change_there(&mut self, node: &mut Node, key: Key, peer: NodeId) {
        let group = self.id;
        let Some(pending) = self.pending(key) else { return };
        let volume = pending.request.volume;
        let op = pending.request.op.clone();
        let pieces: SmallVec<[Option<BlockRange>; 2]> = match op.range() {
            Some(range) => range.split_by_extent().map(Some).collect(),
            None => SmallVec::from_elem(None, 1),
        };
        pending.targets.wait_for(peer, pieces.len() as u32);
        if node.session(peer).is_none() {
            return;
        }
        for piece in pieces {
            let Some((sequence, stamp)) = self.ask(node, peer, What::Piece { key, is_received: false }) else { return };
            let frame = match (&op, piece) {
                (Op::Write { range: whole, data, fua }, Some(range)) => {
                    let Some(pending) = self.pending(key) else { return };
                    Frame {
                        message: Message::Write { group, stamp, sequence, volume, range, fua: *fua },
                        checksums: pending.checksums[range.places_in(*whole)].to_vec(),
                        data: Some(slice(data, *whole, range)),
                    }
                }
                (Op::Zero { fua, .. }, Some(range)) => {
                    Frame::bare(Message::Zero { group, stamp, sequence, volume, range, fua: *fua })
                }
                _ => Frame::bare(Message::Flush { group, stamp, sequence }),
            };
            node.send(peer, frame);
        }
    }

    /// A replica has one piece of a request in memory, which is as good as done for the client.
    pub(crate) fn on_piece_received(&mut self, node: &mut Node, key: Key, target: NodeId) {
        let Some(pending) = self.pending(key) else { return };
        *pending.unwritten.entry(target).or_default() += 1;
        self.on_piece_done(node, key, target);
    }

    /// The piece is on its disk. Whether the request is still pending.
    pub(crate) fn forget_unwritten_piece(&mut self, key: Key, target: NodeId) -> bool {
        let Some(pending) = self.pending(key) else { return false };
        if let Some(left) = pending.unwritten.get_mut(&target) {
            *left -= 1;
        }
        pending.unwritten.retain(|_, left| *left > 0);
        true
    }

    /// A replica has done one piece of a request.
    pub(crate) fn on_piece_done(&mut self, node: &mut Node, key: Key, target: NodeId) {
        let Some(pending) = self.pending(key) else { return };
        if pending.targets.answered(target) {
            self.finish_if_done(node, key);
        }
    }

    /// W1: acknowledged when every replica that must have it has it.
    fn finish_if_done(&mut self, node: &mut Node, key: Key) {
        let Some(pending) = self.pending(key) else { return };
        if matches!(pending.step, Step::Sent) && pending.targets.awaits_nobody() {
            self.finish(node, key, Reply::Done);
        }
    }

    /// Answers and frees the blocks.
    fn finish(&mut self, node: &mut Node, key: Key, reply: Reply) {
        let Some(primary) = &mut self.primary else { return };
        let Some(pending) = primary.requests.remove(key) else { return };
        node.pace.on_answered(node.now, pending.began, pending.kind());
        let is_done = reply == Reply::Done;
        let volume = pending.request.volume;
        let changed = pending.range().filter(|_| pending.is_change());
        if !pending.is_abandoned {
            node.out.push_back(Output::Reply(pending.request.id, reply));
        }
        let follows = is_done && primary.has_followers();
        let change = changed.filter(|_| follows).and_then(|range| match pending.request.op {
            Op::Write { data, .. } => Some(Change { volume, range, blocks: Some((data, pending.checksums)) }),
            Op::Zero { .. } => Some(Change { volume, range, blocks: None }),
            _ => None,
        });
        if let Some(range) = changed {
            if pending.unwritten.is_empty() {
                primary.cool_down(node.now, volume, range);
            } else {
                primary.unwritten.insert(key, volume, range, pending.unwritten);
            }
        }
        let ready = primary.queue.remove(key);
        if let Some(change) = change {
            self.append_to_backlog(node, change);
        }
        self.cool_later(node);
        self.run_ready(node, ready);
    }

    fn start_read(&mut self, node: &mut Node, key: Key) {
        let (id, generation, is_member) = (self.id, self.generation(), self.is_member(node));
        let Some(pending) = self.pending(key) else { return };
        let range = pending.range().expect("a read names blocks");
        if is_member {
            pending.step = Step::ReadingHere;
            let origin = Origin::Request { key, attempt: pending.attempt };
            let job =
                Job { origin, volume: pending.request.volume, range, act: Act::Read, fua: false, is_received: false };
            self.local.submit(node, id, generation, job);
        } else {
            self.read_there(node, key, BTreeSet::new());
        }
    }

    /// W6: this node's own disk is out of use, a member's is read.
    fn read_there(&mut self, node: &mut Node, key: Key, tried: BTreeSet<NodeId>) {
        let group = self.id;
        let Some(from) = self.reader(&tried) else {
            return self.finish(node, key, Reply::Failed(BlockError::Unreadable));
        };
        let Some(pending) = self.pending(key) else { return };
        let (volume, range) = (pending.request.volume, pending.range().expect("a read names blocks"));
        let parts: Vec<BlockRange> = range.split_by_extent().collect();
        let buffer = Some(Buffer::zeroed(range.count.bytes().0 as usize));
        pending.step = Step::ReadingThere { from, tried, buffer, left: parts.len() };
        for part in parts {
            let Some((sequence, stamp)) = self.ask(node, from, What::Read { key, part }) else { return };
            node.send_bare(from, Message::ReadAsk { group, stamp, sequence, volume, range: part });
        }
    }

    /// A member that can be read from now.
    pub(crate) fn reader(&self, tried: &BTreeSet<NodeId>) -> Option<NodeId> {
        let (spec, primary) = (self.acting()?, self.primary.as_ref()?);
        spec.record.in_sync.iter().copied().find(|peer| primary.is_current(*peer) && !tried.contains(peer))
    }

    /// A peer's answer to a read: its blocks, or that it has no good copy.
    pub(crate) fn on_read_there(
        &mut self,
        node: &mut Node,
        key: Key,
        part: BlockRange,
        peer: NodeId,
        data: Option<Data>,
    ) {
        let is_frozen = self.freeze(node).is_some();
        let Some(pending) = self.pending(key) else { return };
        let whole = pending.range().expect("a read names blocks");
        let Step::ReadingThere { from, tried, buffer, left } = &mut pending.step else { return };
        if *from != peer {
            return; // ignore_superseded: another member is read by now
        }
        let Some(data) = data.filter(|data| data.len() as u64 == part.count.bytes().0) else {
            let mut tried = std::mem::take(tried);
            tried.insert(peer);
            if let Some(primary) = &mut self.primary {
                primary.asked.retain(|_, asked| !matches!(asked.what, What::Read { key: other, .. } if other == key));
            }
            return self.read_there(node, key, tried);
        };
        if let Some(buffer) = buffer {
            let start = ((part.start.0 - whole.start.0) * BLOCK_BYTES) as usize;
            buffer.as_mut_slice()[start..start + data.len()].copy_from_slice(data.as_slice());
        }
        *left -= 1;
        if *left == 0 {
            let data = buffer.take().expect("taken once, with the last part").freeze();
            if is_frozen { self.hold_again(node, key) } else { self.on_read(node, key, data) }
        }
    }

    /// What a read asked for is there, or the block into which a patch goes.
    pub(crate) fn on_read(&mut self, node: &mut Node, key: Key, stored: Data) {
        let Some(request) = self.pending(key).map(|pending| &pending.request) else { return };
        let (volume, range) = (request.volume, request.op.range().expect("a read names blocks"));
        let data = match self.cipher(node, volume) {
            Some(cipher) => cipher.decrypt(range.start, &stored),
            None => stored,
        };
        let Some(pending) = self.pending(key) else { return };
        let Op::Patch { block, offset, data: patch, fua } = &pending.request.op else {
            return self.finish(node, key, Reply::Data(data));
        };
        let mut whole = Buffer::copy_of(data.as_slice());
        whole.as_mut_slice()[*offset..*offset + patch.len()].copy_from_slice(patch.as_slice());
        let data = whole.freeze();
        pending.request.op = Op::Write { range: BlockRange::new(*block, BlockCount(1)), data, fua: *fua };
        pending.step = Step::Queued;
        self.start(node, key);
    }

    /// The local disk's share of a request has ended.
    pub(crate) fn on_request_job(&mut self, node: &mut Node, key: Key, attempt: u32, result: JobResult) {
        let me = node.me;
        // W5: what was read is given out only under a lease that holds now.
        let is_frozen = matches!(result, Ok(StoreReply::Read { .. })) && self.freeze(node).is_some();
        let Some(pending) = self.pending(key).filter(|pending| pending.attempt == attempt) else { return };
        let volume = pending.request.volume;
        match result {
            Ok(StoreReply::Read { data, checksums }) if matches!(pending.step, Step::ReadingHere) => {
                if is_frozen {
                    self.hold_again(node, key)
                } else {
                    self.show(node, key, data, checksums)
                }
            }
            Ok(_) => self.on_piece_done(node, key, me),
            Err(StoreError::Corrupt(ranges)) => {
                pending.repairs += 1;
                if pending.repairs > REPAIRS_MAX {
                    return self.finish(node, key, Reply::Failed(BlockError::Unreadable));
                }
                self.begin_repair(node, crate::repair::For::Request(key), volume, ranges);
            }
            // A snapshot that this record still names, because what says that it was deleted has not come back yet.
            Err(StoreError::NoVolume) if self.is_snapshot(volume) => {
                self.finish(node, key, Reply::Failed(BlockError::NoVolume));
            }
            Err(StoreError::NoVolume | StoreError::OutOfRange) => {
                unreachable!("volumes are made known before a record is acted upon")
            }
            Err(error) => self.on_store_error(node, &error),
        }
    }

    /// The blocks of a read were mended, or cannot be.
    pub(crate) fn on_request_repaired(&mut self, node: &mut Node, key: Key, outcome: crate::repair::Outcome) {
        match outcome {
            crate::repair::Outcome::Mended => {
                if let Some(pending) = self.pending(key) {
                    pending.attempt += 1;
                }
                self.start_read(node, key);
            }
            crate::repair::Outcome::Wait => self.hold_again(node, key),
            crate::repair::Outcome::NoCopy => self.finish(node, key, Reply::Failed(BlockError::Unreadable)),
        }
    }

    /// A read that may not be answered now begins anew when the group thaws.
    pub(crate) fn hold_again(&mut self, node: &mut Node, key: Key) {
        let Some(primary) = &mut self.primary else { return };
        let Some(pending) = primary.requests.remove(key) else { return };
        if !pending.is_abandoned {
            primary.held.insert(key, pending.request);
        }
        let ready = primary.queue.remove(key);
        self.run_ready(node, ready);
    }

    /// A peer's session is over: if it is required it must be sent everything that is under way again, whatever it has
    /// answered (it may have lost power since); else it is awaited no more.
    pub(crate) fn without_peer(&mut self, node: &mut Node, peer: NodeId) {
        // While a record is being made durable everybody is: it is sorted out when it is.
        let required = self.acting().is_none() || self.required(node.me).contains(&peer);
        let Some(primary) = &mut self.primary else { return };
        let (mut changed, mut reads) = (Vec::new(), Vec::new());
        for (key, pending) in primary.requests.iter_mut() {
            match &pending.step {
                Step::Sent => {
                    pending.unwritten.remove(&peer);
                    if required {
                        pending.targets.wait_for(peer, 1);
                    } else {
                        pending.targets.forget(peer);
                        changed.push(key);
                    }
                }
                Step::ReadingThere { from, .. } if *from == peer => reads.push(key),
                Step::Showing(_) => reads.push(key),
                _ => {}
            }
        }
        for key in changed {
            self.finish_if_done(node, key);
        }
        for key in reads {
            self.hold_again(node, key);
        }
    }

    /// A required replica is back in the same generation: what is under way goes to it anew.
    pub(crate) fn resend_to(&mut self, node: &mut Node, peer: NodeId) {
        let Some(primary) = &self.primary else { return };
        let sent = |pending: &Pending| matches!(pending.step, Step::Sent) && !pending.targets.is_done(peer);
        let keys: Vec<Key> = primary.requests.iter().filter(|(_, pending)| sent(pending)).map(|(key, _)| key).collect();
        for key in keys {
            self.change_there(node, key, peer);
        }
    }

    /// A newer record holds, or this node's own replica fell out: everything under way goes on under what holds now.
    pub(crate) fn resume_requests(&mut self, node: &mut Node) {
        let is_member = self.is_member(node);
        let (me, generation, id) = (node.me, self.generation(), self.id);
        let Some(primary) = &mut self.primary else { return };
        let keys: Vec<Key> = primary.requests.iter().map(|(key, _)| key).collect();
        for key in keys {
            let Some(pending) = self.pending(key) else { continue };
            if !is_member {
                // What the lost disk still answers is of no account.
                pending.attempt += 1;
                pending.targets.forget(me);
            }
            match &pending.step {
                Step::Queued => {}
                Step::Heating if is_member => {
                    let volume = pending.request.volume;
                    let extents: Vec<_> = pending.range().into_iter().flat_map(BlockRange::extents).collect();
                    let purpose = Purpose::Heat { key, attempt: pending.attempt };
                    node.request(id, purpose, StoreOp::Heat { volume, extents, generation });
                }
                Step::Heating | Step::Sent => self.send_change_unless_frozen_out(node, key),
                Step::ReadingHere if is_member => {}
                Step::ReadingHere | Step::Showing(_) | Step::ReadingThere { .. } => self.hold_again(node, key),
            }
        }
    }

    /// While this node's own replica counts by the record but is lost, nothing may end (W3).
    fn send_change_unless_frozen_out(&mut self, node: &mut Node, key: Key) {
        let named = self.spec.as_ref().is_some_and(|spec| spec.record.in_sync.contains(&node.me));
        if named && !self.is_member(node) {
            if let Some(pending) = self.pending(key) {
                pending.step = Step::Sent;
                pending.targets.wait_for(node.me, 1);
            }
            return;
        }
        self.send_change(node, key);
    }

    /// Trouble of the local store that is not about single blocks.
    pub(crate) fn on_store_error(&mut self, node: &mut Node, error: &StoreError) {
        match error {
            StoreError::Full => self.retry_when_space(node),
            StoreError::Disk(reason) => self.fail_pool(node, reason),
            // Of a snapshot that was deleted while something was still under way for it, which is not awaited any more.
            StoreError::NoVolume => {}
            error => self.fail_pool(node, &error.to_string()),
        }
    }

    /// Whether anything here or at a required replica waits for space, for the report.
    pub(crate) fn is_full(&self, node: &Node) -> bool {
        let Some(primary) = &self.primary else { return self.local.is_full() };
        let held = primary.asked.values().filter(|asked| asked.is_held);
        let required = self.required(node.me);
        self.local.is_full()
            || !primary.full_heats.is_empty()
            || held.map(|asked| asked.peer).any(|peer| required.contains(&peer))
    }

    /// Whether anything waits for space in this node's pool.
    pub(crate) fn waits_for_space(&self) -> bool {
        self.local.is_full() || self.primary.as_ref().is_some_and(|primary| !primary.full_heats.is_empty())
    }

    pub(crate) fn retry_when_space(&mut self, node: &Node) {
        let at: Instant = node.now + crate::group::FULL_RETRY;
        self.full_retry.get_or_insert(at);
    }

    /// Tries again to mark extents for which the pool had no space.
    pub(crate) fn retry_full_heats(&mut self, node: &mut Node) {
        let (id, generation) = (self.id, self.generation());
        let keys = self.primary.as_mut().map(|primary| std::mem::take(&mut primary.full_heats)).unwrap_or_default();
        for key in keys {
            let Some(pending) = self.pending(key) else { continue };
            if matches!(pending.step, Step::Heating) {
                let volume = pending.request.volume;
                let extents = pending.range().into_iter().flat_map(BlockRange::extents).collect();
                let purpose = Purpose::Heat { key, attempt: pending.attempt };
                node.request(id, purpose, StoreOp::Heat { volume, extents, generation });
            }
        }
    }
}
