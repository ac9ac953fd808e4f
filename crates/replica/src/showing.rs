//! Reads while a replica is being settled. Where the two differ, a write was under way and never acknowledged, so either is right;
//! but once a guest has seen what is here, that must be what the other has, too, should it be the next primary. So the read's own
//! blocks are compared there, and brought if they differ, before it is answered.
//!
//! Their extent is compared all the same when its turn comes: what is known of single blocks is not kept.

use crate::group::Group;
use crate::node::Node;
use crate::primary::{MemberState, What};
use crate::range_queue::Key;
use crate::requests::{Step, slice};
use pollux_base::unit::BlockRange;
use pollux_base::{BlockChecksum, Data, NodeId, Op, VolumeId};
use smallvec::SmallVec;

/// What a read has found here, until every replica that is being settled has it.
pub(crate) struct Shown {
    stored: Data,
    checksums: Vec<BlockChecksum>,
    /// Answers that are missing.
    left: usize,
}

impl Group {
    /// Parts of the range, each within one extent, that are still to be settled, and with whom.
    pub(crate) fn unsettled(&self, volume: VolumeId, range: BlockRange) -> SmallVec<[(NodeId, BlockRange); 2]> {
        let mut unsettled = SmallVec::new();
        for (peer, member) in self.primary.iter().flat_map(|primary| &primary.members) {
            if let MemberState::Settling(sync) = &member.state {
                let covered = range.split_by_extent().filter(|part| sync.covers(volume, part.start.extent()));
                unsettled.extend(covered.map(|part| (*peer, part)));
            }
        }
        unsettled
    }

    /// The local disk gave what was asked for. Into a block that is to be patched nobody looks: all of it is written everywhere.
    pub(crate) fn show(&mut self, node: &mut Node, key: Key, stored: Data, checksums: Vec<BlockChecksum>) {
        let Some(request) = self.pending(key).map(|pending| &pending.request) else { return };
        let (volume, op) = (request.volume, &request.op);
        let unsettled = match *op {
            Op::Read { range } => self.unsettled(volume, range),
            _ => SmallVec::new(),
        };
        if unsettled.is_empty() {
            return self.on_read(node, key, stored);
        }
        let Some(pending) = self.pending(key) else { return };
        let Some(whole) = pending.request.op.range() else { return };
        let left = unsettled.len();
        pending.step = Step::Showing(Shown { stored, checksums: checksums.clone(), left });
        for (peer, part) in unsettled {
            let checksums = checksums[part.places_in(whole)].to_vec();
            self.ask_compare(node, peer, What::Show { key, part }, volume, part, checksums);
        }
    }

    /// A replica says which of the blocks are not the same there.
    pub(crate) fn on_show_differs(
        &mut self,
        node: &mut Node,
        key: Key,
        peer: NodeId,
        part: BlockRange,
        runs: &[BlockRange],
    ) {
        if !runs.iter().all(|run| run.is_within(part)) {
            return self.make_unfit(node, peer, "it names blocks that it was not asked about".to_string());
        }
        if !runs.is_empty() {
            self.bring(node, key, peer, part, runs);
        }
        self.on_shown(node, key);
    }

    /// Sends the runs of a part that differ.
    fn bring(&mut self, node: &mut Node, key: Key, peer: NodeId, part: BlockRange, runs: &[BlockRange]) {
        let now = node.now;
        let Some(pending) = self.pending(key) else { return };
        let (volume, Some(whole)) = (pending.request.volume, pending.request.op.range()) else { return };
        let Step::Showing(shown) = &pending.step else { return };
        let (stored, checksums) = (shown.stored.clone(), shown.checksums.clone());
        let mut sent = 0;
        for run in runs {
            let (data, checksums) = (slice(&stored, whole, *run), &checksums[run.places_in(whole)]);
            sent += self.send_blocks(node, peer, What::Shown(key), volume, *run, &data, checksums).parts;
        }
        if let Some(primary) = &mut self.primary {
            // The mark that the replica makes for it is taken back with the others.
            primary.warm.entry((volume, part.start.extent())).or_insert((0, now));
        }
        self.cool_later(node);
        if let Some(Step::Showing(shown)) = self.pending(key).map(|pending| &mut pending.step) {
            shown.left += sent;
        }
    }

    /// A replica has the same of a part, or has written a run that differed.
    pub(crate) fn on_shown(&mut self, node: &mut Node, key: Key) {
        let is_frozen = self.freeze(node).is_some();
        let Some(pending) = self.pending(key) else { return };
        let Step::Showing(shown) = &mut pending.step else { return };
        shown.left -= 1;
        if shown.left == 0 {
            let stored = shown.stored.clone();
            // W5: what was read is given out only under a lease that holds now.
            if is_frozen { self.hold_again(node, key) } else { self.on_read(node, key, stored) }
        }
    }
}
