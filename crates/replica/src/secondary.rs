//! What a replica does for its primary: it joins, writes, compares, reads and flushes as asked, and refuses whatever was
//! said under an older record than it knows (W2), at all times if it does not take part (W10). It decides nothing: not
//! when an extent is cold, not when it is current.
//!
//! Also the door through which every frame about a group comes, for both roles.

use crate::group::Group;
use crate::local::{Act, Job, JobResult, Origin};
use crate::node::{Node, Purpose};
use crate::primary::{MemberState, What};
use crate::spool::Change;
use crate::verdict::Verdict;
use crate::wire::{ExtentRun, Frame, JOIN_RUNS_MAX, Message, Refusal, Sequence};
use pollux_base::record::{GroupSpec, Mode};
use pollux_base::unit::{BLOCK_BYTES, BlockRange, EXTENT_BLOCKS};
use pollux_base::{BlockChecksum, BlockCount, BlockIndex, ExtentIndex, NodeId, Session, Stamp, VolumeId};
use pollux_store::{StoreError, StoreOp, StoreReply};

/// What a peer asked, until it is answered.
#[derive(Clone, Debug)]
pub(crate) enum PeerAsk {
    Change,
    Flush,
    Read,
    Compare { range: BlockRange, checksums: Vec<BlockChecksum> },
    Verify,
    Current,
}

/// Who asked, where the answer goes.
#[derive(Clone, Copy)]
pub(crate) struct Asker {
    pub peer: NodeId,
    pub session: Session,
    pub sequence: Sequence,
    pub stamp: Stamp,
}

impl Group {
    /// A frame about this group.
    pub(crate) fn on_frame(&mut self, node: &mut Node, peer: NodeId, session: Session, frame: Frame) {
        // What is asked under a record that is just being made durable here waits until it is (W2).
        let waits = |spec: &GroupSpec| asked_under(&frame.message) == Some(spec.record.stamp);
        let is_adopting = self.adopting.is_some() || self.trailing.adopts() || self.awaits_rest;
        if is_adopting && self.spec.as_ref().is_some_and(waits) {
            return self.hold_early(node, peer, session, frame);
        }
        let Frame { message, checksums, data } = frame;
        if let Some((asker, answer)) = self.answer_of_deleted(peer, session, &message) {
            if self.admits(node, asker) {
                node.answer(peer, session, Frame::bare(answer));
            }
            return;
        }
        match message {
            Message::Announce { spec } => self.on_announce(node, peer, *spec),
            Message::Newer { stamp, .. } => {
                if self.acting().is_some_and(|spec| spec.record.stamp < stamp) {
                    self.outdated = self.outdated.max(Some(stamp));
                }
            }
            Message::Join { stamp, standing, extents, .. } => {
                if self.acting().is_none_or(|spec| spec.record.stamp != stamp || spec.record.primary != node.me) {
                    return; // ignore_join_of_another_record: ours is announced, or will be, and answered again
                }
                let extents = self.unfold_all(extents);
                self.on_join(node, peer, standing, extents);
            }
            // Answers to a primary.
            Message::Done { stamp, sequence, .. } => {
                let Some(what) = self.answered(peer, stamp, sequence) else { return };
                match what {
                    What::Piece { key, is_received: true } => self.on_piece_written(node, key, peer),
                    What::Piece { key, is_received: false } => self.on_piece_done(node, key, peer),
                    What::Copy(key) => self.on_copied(node, key),
                    What::Shown(key) => self.on_shown(node, key),
                    What::Current => self.on_confirmed(node, peer),
                    What::Mend(key) => self.on_mended_there(node, key),
                    What::TrailReset => self.step_sync(node, peer),
                    What::SnapshotFlush(id) => self.on_snapshot_flushed(node, id, peer),
                    What::Snapshot(id) => self.on_snapshot_done(node, id, peer),
                    _ => {} // ignore_other_answer
                }
            }
            Message::Held { sequence, .. } => {
                let asked = self.primary.as_mut().and_then(|primary| primary.asked.get_mut(sequence));
                if let Some(asked) = asked.filter(|asked| asked.peer == peer) {
                    asked.is_held = true;
                }
            }
            Message::Received { stamp, sequence, .. } => self.on_received(node, peer, stamp, sequence),
            Message::Trailed { stamp, run, position, .. } => {
                if self.acting().is_some_and(|spec| spec.record.stamp == stamp) {
                    self.on_trailed(node, peer, run, position);
                }
            }
            Message::TrailReset { stamp, sequence, run, from, .. } => {
                let asker = Asker { peer, session, sequence, stamp };
                if self.admits(node, asker) {
                    self.on_trail_reset(node, peer, session, sequence, stamp, run, from);
                }
            }
            Message::Trail { stamp, run, point, end, volume, range, is_last, .. } => {
                let is_inside = match &data {
                    Some(data) => self.is_inside(volume, range) && data.len() as u64 == range.count.bytes().0,
                    None => self.blocks(volume).is_some_and(|blocks| {
                        range.start.0.checked_add(range.count.0).is_some_and(|end| end <= blocks)
                    }),
                };
                if is_inside && self.follows(node, peer, stamp) {
                    let blocks = data.map(|data| (data, checksums));
                    self.on_trail(node, run, point, end, Change { volume, range, blocks }, is_last);
                }
            }
            Message::TrailMark { stamp, run, at, .. } => {
                if self.follows(node, peer, stamp) {
                    self.on_trail_mark(node, run, at);
                }
            }
            Message::ReadData { stamp, sequence, .. } => {
                let Some(what) = self.answered(peer, stamp, sequence) else { return };
                match what {
                    What::Read { key, part } => self.on_read_there(node, key, part, peer, data),
                    What::Repair(key) => {
                        self.on_repair_data(node, key, peer, data.map(|data| (data, checksums)));
                    }
                    _ => {} // ignore_other_answer
                }
            }
            Message::Differs { stamp, sequence, runs, .. } => {
                match self.answered(peer, stamp, sequence) {
                    Some(What::Compare(key)) => self.on_differs(node, key, runs),
                    Some(What::Show { key, part }) => self.on_show_differs(node, key, peer, part, &runs),
                    Some(What::CompareScrub(key)) => self.on_scrub_differs(node, key, peer, runs),
                    _ => {} // ignore_other_answer
                }
            }
            Message::Stored { stamp, sequence, extents, .. } => {
                if let Some(What::Stored) = self.answered(peer, stamp, sequence) {
                    let extents = self.unfold_all(extents);
                    self.on_stored(peer, extents);
                }
            }
            Message::Verified { stamp, sequence, bad, .. } => {
                if let Some(What::Verify(key)) = self.answered(peer, stamp, sequence) {
                    self.on_verified(node, key, peer, bad);
                }
            }
            Message::Refused { stamp, sequence, why, .. } => self.on_refused(node, peer, stamp, sequence, why),
            // Questions of a primary.
            Message::Write { stamp, sequence, volume, range, fua, .. } => {
                let asker = Asker { peer, session, sequence, stamp };
                if !self.admits(node, asker) {
                    return;
                }
                match data {
                    Some(data)
                        if self.is_inside(volume, range)
                            && data.len() as u64 == range.count.0 * BLOCK_BYTES
                            && checksums.iter().all(|checksum| !checksum.is_zero()) =>
                    {
                        let act = Act::Write { data, checksums };
                        self.peer_job(node, asker, volume, range, act, fua, PeerAsk::Change);
                    }
                    _ => self.refuse(node, asker, Refusal::Invalid),
                }
            }
            Message::Zero { stamp, sequence, volume, range, fua, .. } => {
                let asker = Asker { peer, session, sequence, stamp };
                if !self.admits(node, asker) {
                    return;
                }
                if self.is_inside(volume, range) {
                    self.peer_job(node, asker, volume, range, Act::Zero, fua, PeerAsk::Change);
                } else {
                    self.refuse(node, asker, Refusal::Invalid);
                }
            }
            Message::Flush { stamp, sequence, .. } => {
                let asker = Asker { peer, session, sequence, stamp };
                if !self.admits(node, asker) {
                    return;
                }
                self.peer_flush(node, asker, PeerAsk::Flush);
            }
            Message::Current { stamp, sequence, .. } => {
                let asker = Asker { peer, session, sequence, stamp };
                if !self.admits(node, asker) {
                    return;
                }
                self.peer_flush(node, asker, PeerAsk::Current);
            }
            Message::Snapshot { stamp, sequence, of, .. } => {
                let asker = Asker { peer, session, sequence, stamp };
                if !self.admits(node, asker) {
                    return;
                }
                if of.iter().all(|(volume, snapshot)| self.is_snapshot_of(*volume, *snapshot)) {
                    let purpose = Purpose::PeerSnapshot { peer, session, sequence, stamp };
                    node.request(self.id, purpose, StoreOp::Snapshot { of });
                } else {
                    self.refuse(node, asker, Refusal::Invalid);
                }
            }
            Message::ReadAsk { stamp, sequence, volume, range, .. } => {
                let asker = Asker { peer, session, sequence, stamp };
                if !self.admits(node, asker) {
                    return;
                }
                if self.is_inside(volume, range) {
                    self.peer_job(node, asker, volume, range, Act::Read, false, PeerAsk::Read);
                } else {
                    self.refuse(node, asker, Refusal::Invalid);
                }
            }
            Message::Compare { stamp, sequence, volume, range, .. } => {
                let asker = Asker { peer, session, sequence, stamp };
                if !self.admits(node, asker) {
                    return;
                }
                if self.is_inside(volume, range) && checksums.len() as u64 == range.count.0 {
                    // The blocks of a whole extent are not read for it, as far as their checksums are known.
                    let is_whole = self.extent_range(volume, range.start.extent()) == Some(range);
                    let act = if is_whole { Act::Checksums } else { Act::Read };
                    self.peer_job(node, asker, volume, range, act, false, PeerAsk::Compare { range, checksums });
                } else {
                    self.refuse(node, asker, Refusal::Invalid);
                }
            }
            Message::Verify { stamp, sequence, volume, range, .. } => {
                let asker = Asker { peer, session, sequence, stamp };
                if !self.admits(node, asker) {
                    return;
                }
                if self.is_inside(volume, range) {
                    self.peer_job(node, asker, volume, range, Act::Read, false, PeerAsk::Verify);
                } else {
                    self.refuse(node, asker, Refusal::Invalid);
                }
            }
            Message::StoredAsk { group, stamp, sequence } => {
                let asker = Asker { peer, session, sequence, stamp };
                if !self.admits(node, asker) {
                    return;
                }
                let extents = fold(self.stored(node));
                node.answer(peer, session, Frame::bare(Message::Stored { group, stamp, sequence, extents }));
            }
            Message::Cool { stamp, volume, extents, reap, .. } => {
                if self.blocks_heeded(node, peer, stamp, volume).is_some() {
                    self.cool_here(node, volume, extents, reap);
                }
            }
            Message::Heat { stamp, volume, extents, .. } => {
                let Some(blocks) = self.blocks_heeded(node, peer, stamp, volume) else { return };
                let generation = stamp.generation;
                let is_cold = |extent: &ExtentIndex| {
                    extent.first_block().0 < blocks && !node.store.is_hot(volume, *extent, generation)
                };
                let extents: Vec<ExtentIndex> = extents.into_iter().filter(is_cold).collect();
                if !extents.is_empty() {
                    node.request(self.id, Purpose::Background, StoreOp::Heat { volume, extents, generation });
                }
            }
            Message::LeaseAsk { .. } | Message::LeaseGrant { .. } | Message::Pool { .. } => {
                unreachable!("leases are between nodes and handled there")
            }
        }
    }

    /// Blocks of the volume, if its primary says something of it under the record by which this replica takes part.
    fn blocks_heeded(&self, node: &Node, peer: NodeId, stamp: Stamp, volume: VolumeId) -> Option<u64> {
        let acts = self.acting().is_some_and(|spec| spec.record.stamp == stamp && spec.record.primary == peer);
        self.blocks(volume).filter(|_| acts && self.fit(node).is_ok())
    }

    /// A peer says which record it knows.
    fn on_announce(&mut self, node: &mut Node, peer: NodeId, spec: GroupSpec) {
        let (stamp, from_primary) = (spec.record.stamp, spec.record.primary == peer);
        let known = self.known();
        if known.is_some_and(|known| stamp < known) {
            if from_primary {
                self.claims.insert(peer);
            }
            match (&self.spec, known) {
                (Some(own), _) if Some(own.record.stamp) == known => {
                    let spec = Box::new(own.clone());
                    node.send_bare(peer, Message::Announce { spec });
                }
                (_, Some(stamp)) => node.send_bare(peer, Message::Newer { group: self.id, stamp }),
                _ => {}
            }
            return;
        }
        self.claims.remove(&peer);
        self.on_record(node, spec, false);
        if from_primary && self.acting().is_some_and(|spec| spec.record.stamp == stamp) {
            self.send_join(node);
        }
    }

    /// Whether this replica follows that primary under that record.
    fn follows(&self, node: &Node, peer: NodeId, stamp: Stamp) -> bool {
        let acts = self.acting().is_some_and(|spec| spec.record.stamp == stamp && spec.record.primary == peer);
        acts && self.fit(node).is_ok() && self.is_async(node)
    }

    /// Mode `Memory`: changes count as soon as they are here.
    fn answers_on_receipt(&self, node: &Node) -> bool {
        self.spec.as_ref().is_some_and(|spec| spec.mode(node.me) == Mode::Memory && spec.record.primary != node.me)
    }

    /// The boot for the note: while it lasts this replica has all that was acknowledged, even if the process dies.
    pub(crate) fn whole_in_boot(&self, node: &Node) -> Option<u128> {
        let outlives_process = !self.answers_on_receipt(node) && !self.local.has_received();
        (self.is_continuous && outlives_process).then_some(node.boot)
    }

    /// Tells the primary how this replica stands to its record.
    pub(crate) fn send_join(&mut self, node: &mut Node) {
        let Some(spec) = self.acting() else { return };
        let (group, stamp, primary) = (self.id, spec.record.stamp, spec.record.primary);
        if primary == node.me || node.session(primary).is_none() {
            return;
        }
        let standing = self.own_standing(node);
        let extents = match self.fit(node) {
            Ok(()) => fold(self.own_candidates(node)),
            Err(_) => Vec::new(),
        };
        node.send_bare(primary, Message::Join { group, stamp, standing, extents });
    }

    /// Whether a question was asked under the record under which this replica acts, by that record's primary.
    fn admits(&mut self, node: &mut Node, asker: Asker) -> bool {
        if self.known().is_none_or(|known| asker.stamp < known) {
            self.refuse(node, asker, Refusal::Outdated); // W2
            return false;
        }
        if self.acting().is_none_or(|spec| spec.record.stamp != asker.stamp || spec.record.primary != asker.peer) {
            return false; // ignore_question_of_no_primary
        }
        if self.fit(node).is_err() {
            self.refuse(node, asker, Refusal::Unfit); // W10, W12
            return false;
        }
        true
    }

    fn refuse(&mut self, node: &mut Node, asker: Asker, why: Refusal) {
        // Outdated or not, the stamp is the question's: it is matched with it, and the newer record follows by itself.
        let message = Message::Refused { group: self.id, stamp: asker.stamp, sequence: asker.sequence, why };
        node.answer(asker.peer, asker.session, Frame::bare(message));
    }

    fn is_inside(&self, volume: VolumeId, range: BlockRange) -> bool {
        let Some(blocks) = self.blocks(volume) else { return false };
        let end = range.start.0.checked_add(range.count.0);
        range.count.0 > 0
            && end.is_some_and(|end| end <= blocks && range.start.extent() == BlockIndex(end - 1).extent())
    }

    #[allow(clippy::too_many_arguments)] // each is one part of the job, said once
    fn peer_job(
        &mut self,
        node: &mut Node,
        asker: Asker,
        volume: VolumeId,
        range: BlockRange,
        act: Act,
        fua: bool,
        ask: PeerAsk,
    ) {
        let Asker { peer, session, sequence, stamp } = asker;
        let (id, generation) = (self.id, self.generation());
        let is_received = matches!(ask, PeerAsk::Change) && !fua && self.answers_on_receipt(node);
        self.peer_asks.insert((peer, session, sequence), ask);
        let origin = Origin::Peer { peer, session, sequence, stamp };
        self.local.submit(node, id, generation, Job { origin, volume, range, act, fua, is_received });
        if is_received {
            node.answer(peer, session, Frame::bare(Message::Received { group: id, stamp, sequence }));
        }
    }

    fn peer_flush(&mut self, node: &mut Node, asker: Asker, ask: PeerAsk) {
        let nothing = BlockRange::new(BlockIndex(0), BlockCount(0));
        self.peer_job(node, asker, VolumeId(0), nothing, Act::Flush, false, ask);
    }

    /// What a peer asked is done here, or failed.
    pub(crate) fn on_peer_job(
        &mut self,
        node: &mut Node,
        peer: NodeId,
        session: Session,
        sequence: Sequence,
        stamp: Stamp,
        result: JobResult,
    ) {
        let group = self.id;
        let asker = Asker { peer, session, sequence, stamp };
        if matches!(result, Err(StoreError::Full)) {
            node.answer(peer, session, Frame::bare(Message::Held { group, stamp, sequence }));
            self.retry_when_space(node);
            return;
        }
        let Some(ask) = self.peer_asks.remove(&(peer, session, sequence)) else { return };
        // W2: what was done for an older record is not answered; the newer one's primary learns of it by the hot mark.
        if self.acting().is_none_or(|spec| spec.record.stamp != stamp) {
            return;
        }
        let message = match (ask, result) {
            (PeerAsk::Change | PeerAsk::Flush, Ok(_)) => Message::Done { group, stamp, sequence },
            (PeerAsk::Current, Ok(_)) => return self.note_current(node, asker),
            (PeerAsk::Read, Ok(StoreReply::Read { data, mut checksums })) => {
                // What is not stored here travels as zeros, with a checksum that says so.
                let blocks = data.as_slice().chunks(BLOCK_BYTES as usize);
                for (checksum, block) in checksums.iter_mut().zip(blocks).filter(|(checksum, _)| checksum.is_zero()) {
                    *checksum = BlockChecksum::of(block);
                }
                let message = Message::ReadData { group, stamp, sequence };
                return node.answer(peer, session, Frame { message, checksums, data: Some(data) });
            }
            (
                PeerAsk::Compare { range, checksums },
                Ok(StoreReply::Checksums(own) | StoreReply::Read { checksums: own, .. }),
            ) => Message::Differs { group, stamp, sequence, runs: differing(range, &checksums, &own) },
            (PeerAsk::Verify, Ok(StoreReply::Read { .. })) => {
                Message::Verified { group, stamp, sequence, bad: Vec::new() }
            }
            (PeerAsk::Verify, Err(StoreError::Corrupt(bad))) => Message::Verified { group, stamp, sequence, bad },
            // Checksums that are not to be had count as different.
            (PeerAsk::Compare { range, .. }, Err(StoreError::Corrupt(_))) => {
                Message::Differs { group, stamp, sequence, runs: vec![range] }
            }
            // A snapshot that was deleted meanwhile: of it nothing matters any more.
            (PeerAsk::Compare { .. }, Err(StoreError::NoVolume)) => {
                Message::Differs { group, stamp, sequence, runs: Vec::new() }
            }
            (PeerAsk::Verify, Err(StoreError::NoVolume)) => {
                Message::Verified { group, stamp, sequence, bad: Vec::new() }
            }
            (PeerAsk::Change, Err(StoreError::NoVolume)) => Message::Done { group, stamp, sequence },
            (PeerAsk::Read, Err(StoreError::Corrupt(_) | StoreError::NoVolume)) => {
                return self.refuse(node, asker, Refusal::Corrupt);
            }
            (_, Err(error)) => {
                self.on_store_error(node, &error);
                return self.refuse(node, asker, Refusal::Unfit);
            }
            (PeerAsk::Read | PeerAsk::Compare { .. } | PeerAsk::Verify, Ok(_)) => {
                unreachable!("the store answers what it is asked")
            }
        };
        node.answer(peer, session, Frame::bare(message));
    }

    /// The store has taken the snapshot, or can not.
    pub(crate) fn on_peer_snapshot(&mut self, node: &mut Node, asker: Asker, result: Result<(), StoreError>) {
        let Asker { peer, session, sequence, stamp } = asker;
        if self.acting().is_none_or(|spec| spec.record.stamp != stamp) {
            return; // ignore_superseded
        }
        match result {
            Ok(()) => node.answer(peer, session, Frame::bare(Message::Done { group: self.id, stamp, sequence })),
            Err(StoreError::Full) => self.refuse(node, asker, Refusal::NoRoom),
            Err(error) => {
                self.on_store_error(node, &error);
                self.refuse(node, asker, Refusal::Unfit);
            }
        }
    }

    /// The primary says that everything is here, and it is flushed: noted before it is answered (W9, W12).
    fn note_current(&mut self, node: &mut Node, asker: Asker) {
        let Some(mut note) = self.note.clone() else { return };
        let Asker { peer, session, sequence, stamp } = asker;
        self.confirm(node, &mut note, stamp);
        if self.note.as_ref() == Some(&note) {
            return self.on_noted_current(node, peer, session, sequence, stamp);
        }
        let purpose = Purpose::NoteCurrent { peer, session, sequence, stamp };
        node.request(self.id, purpose, StoreOp::PutNote { group: self.id, note: Some(note.encode()) });
    }

    fn confirm(&self, node: &Node, note: &mut crate::note::Note, stamp: Stamp) {
        note.whole_in_boot = (!self.answers_on_receipt(node)).then_some(node.boot);
        match self.verdict {
            Verdict::Member { .. } | Verdict::Born => {
                note.born = false;
                note.in_sync_at = Some(stamp);
            }
            _ => note.joined_at = Some(stamp),
        }
    }

    pub(crate) fn on_noted_current(
        &mut self,
        node: &mut Node,
        peer: NodeId,
        session: Session,
        sequence: Sequence,
        stamp: Stamp,
    ) {
        if self.acting().is_none_or(|spec| spec.record.stamp != stamp) {
            return; // ignore_superseded
        }
        let Some(mut note) = self.note.take() else { return };
        self.confirm(node, &mut note, stamp);
        self.note = Some(note);
        self.is_continuous = true;
        if self.verdict == Verdict::Born {
            self.verdict = Verdict::Member { at: stamp };
        }
        node.answer(peer, session, Frame::bare(Message::Done { group: self.id, stamp, sequence }));
    }

    /// The question that this answers, if it was asked of this peer in this session under the present record. Late
    /// answers match nothing: an ended session and a newer record both forget their questions.
    fn answered(&mut self, peer: NodeId, stamp: Stamp, sequence: Sequence) -> Option<What> {
        if self.acting()?.record.stamp != stamp {
            return None; // ignore_answer_to_older_record
        }
        let primary = self.primary.as_mut()?;
        if primary.asked.get(sequence)?.peer != peer {
            return None; // ignore_answer_of_another
        }
        primary.asked.remove(sequence).map(|asked| asked.what)
    }

    fn on_refused(&mut self, node: &mut Node, peer: NodeId, stamp: Stamp, sequence: Sequence, why: Refusal) {
        let Some(what) = self.answered(peer, stamp, sequence) else { return };
        match (why, what) {
            // It has a newer record, which it announces or an order brings. Until then nothing ends.
            (Refusal::Outdated, _) => {
                if let Some(primary) = &mut self.primary {
                    primary.refused_by.insert(peer);
                }
                self.announce(node, peer);
            }
            (Refusal::Corrupt, What::Read { key, part }) => self.on_read_there(node, key, part, peer, None),
            (Refusal::Corrupt, What::Repair(key)) => self.on_repair_data(node, key, peer, None),
            (Refusal::NoRoom, What::Snapshot(id)) => {
                self.on_snapshot_refused(node, id, peer, "its pool has no room for more snapshots");
            }
            (Refusal::Corrupt | Refusal::Unfit | Refusal::Invalid | Refusal::NoRoom, _) => {
                self.make_unfit(node, peer, format!("it refused what it was asked ({why:?})"));
            }
        }
    }

    /// The lease of a peer came, but not for this group.
    pub(crate) fn on_lease_refused(&mut self, node: &mut Node, peer: NodeId) {
        let Some(primary) = &mut self.primary else { return };
        if primary.members.get(&peer).is_some_and(|member| !matches!(member.state, MemberState::Away)) {
            primary.refused_by.insert(peer);
            self.announce(node, peer);
        }
    }

    fn unfold_all(&self, extents: Vec<(VolumeId, Vec<ExtentRun>)>) -> Vec<(VolumeId, Vec<ExtentIndex>)> {
        extents.into_iter().map(|(volume, runs)| (volume, self.unfold(volume, &runs))).collect()
    }

    /// The extents of a peer's runs, as far as the volume has them.
    fn unfold(&self, volume: VolumeId, runs: &[ExtentRun]) -> Vec<ExtentIndex> {
        let Some(blocks) = self.blocks(volume) else { return Vec::new() };
        let end = blocks.div_ceil(EXTENT_BLOCKS);
        runs.iter()
            .flat_map(|run| u64::from(run.start.0)..(u64::from(run.start.0) + u64::from(run.count)).min(end))
            .filter_map(|extent| u32::try_from(extent).ok().map(ExtentIndex))
            .collect()
    }
}

/// The stamp of a question to a replica.
fn asked_under(message: &Message) -> Option<Stamp> {
    match message {
        Message::Write { stamp, .. }
        | Message::Zero { stamp, .. }
        | Message::Flush { stamp, .. }
        | Message::ReadAsk { stamp, .. }
        | Message::Compare { stamp, .. }
        | Message::Cool { stamp, .. }
        | Message::Heat { stamp, .. }
        | Message::StoredAsk { stamp, .. }
        | Message::Verify { stamp, .. }
        | Message::Current { stamp, .. }
        | Message::Snapshot { stamp, .. }
        | Message::TrailReset { stamp, .. }
        | Message::Trail { stamp, .. }
        | Message::TrailMark { stamp, .. } => Some(*stamp),
        _ => None,
    }
}

/// Runs of blocks whose checksums are not the same.
fn differing(range: BlockRange, theirs: &[BlockChecksum], own: &[BlockChecksum]) -> Vec<BlockRange> {
    let mut runs: Vec<BlockRange> = Vec::new();
    let blocks = theirs.iter().zip(own).enumerate();
    for (index, _) in blocks.filter(|(_, (theirs, own))| theirs != own) {
        let block = BlockIndex(range.start.0 + index as u64);
        match runs.last_mut() {
            Some(run) if run.end() == block => run.count.0 += 1,
            _ => runs.push(BlockRange::new(block, BlockCount(1))),
        }
    }
    runs
}

/// Ordered extents as runs. If there are too many runs for one message the gaps between them are filled: more candidates
/// are always allowed, fewer never (W8).
fn fold(lists: Vec<(VolumeId, Vec<ExtentIndex>)>) -> Vec<(VolumeId, Vec<ExtentRun>)> {
    let mut gap = 0;
    loop {
        let folded: Vec<(VolumeId, Vec<ExtentRun>)> =
            lists.iter().map(|(volume, extents)| (*volume, fold_with_gap(extents, gap))).collect();
        if folded.iter().map(|(_, runs)| runs.len()).sum::<usize>() <= JOIN_RUNS_MAX || gap == u32::MAX {
            return folded;
        }
        gap = gap.saturating_mul(4).saturating_add(1);
    }
}

fn fold_with_gap(extents: &[ExtentIndex], gap: u32) -> Vec<ExtentRun> {
    let mut runs: Vec<ExtentRun> = Vec::new();
    for extent in extents {
        match runs.last_mut() {
            Some(run) if extent.0 - (run.start.0 + run.count) <= gap => run.count = extent.0 - run.start.0 + 1,
            _ => runs.push(ExtentRun { start: *extent, count: 1 }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_too_long_for_a_message_becomes_wider_never_shorter() {
        let extents: Vec<ExtentIndex> = (0..200_000).map(|index| ExtentIndex(index * 3)).collect();
        let folded = fold(vec![(VolumeId(1), extents.clone())]);
        assert!(folded[0].1.len() <= JOIN_RUNS_MAX);
        let mut runs = folded[0].1.iter();
        let mut run = runs.next().expect("there are extents");
        for extent in extents {
            while extent.0 >= run.start.0 + run.count {
                run = runs.next().expect("each extent is in a run");
            }
            assert!(extent >= run.start);
        }
    }

    #[test]
    fn each_differing_block_is_named_once() {
        let checksum = |value| BlockChecksum(value);
        let mut theirs = vec![checksum(1); EXTENT_BLOCKS as usize];
        let own = theirs.clone();
        for index in [0, 1, 5, 1023] {
            theirs[index] = checksum(2);
        }
        let range = BlockRange::new(ExtentIndex(2).first_block(), BlockCount(EXTENT_BLOCKS));
        let run = |start: u64, count| BlockRange::new(BlockIndex(2048 + start), BlockCount(count));
        assert_eq!(differing(range, &theirs, &own), [run(0, 2), run(5, 1), run(1023, 1)]);
    }
}
