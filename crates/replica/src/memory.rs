//! Mode `Memory`: changes that were answered before every replica has them on its disk.
//!
//! Such a change's extents count as under way until it is (W8): they stay hot here, so that whatever the replica loses with
//! its process is compared when it is back. What is known of a replica is forgotten with its session and with the record;
//! it is then settled, or confirms anew that all is on its disk, before the group is served and anything cools.

use crate::group::Group;
use crate::node::Node;
use crate::primary::{MemberState, Primary, What};
use crate::range_queue::Key;
use crate::wire::Sequence;
use pollux_base::record::{LagBound, Mode};
use pollux_base::unit::BlockRange;
use pollux_base::{Instant, NodeId, Stamp, VolumeId};
use std::collections::BTreeMap;

/// Bytes that may be answered and not on every disk. Beyond it new changes wait: a replica's memory is not without end, and a
/// moment of a slow disk is all that this is to hide.
const UNWRITTEN_BYTES_MAX: u64 = 64 << 20;

struct Change {
    volume: VolumeId,
    range: BlockRange,
    /// Who has not written it, with how many pieces.
    left: BTreeMap<NodeId, u32>,
}

/// Changes that were answered and are not on every replica's disk yet.
#[derive(Default)]
pub(crate) struct Unwritten {
    changes: BTreeMap<Key, Change>,
    bytes: u64,
}

impl Unwritten {
    pub(crate) fn insert(&mut self, key: Key, volume: VolumeId, range: BlockRange, left: BTreeMap<NodeId, u32>) {
        self.bytes += range.count.bytes().0;
        self.changes.insert(key, Change { volume, range, left });
    }

    fn remove(&mut self, key: Key) -> Option<Change> {
        let change = self.changes.remove(&key)?;
        self.bytes -= change.range.count.bytes().0;
        Some(change)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    fn is_full(&self) -> bool {
        self.bytes > UNWRITTEN_BYTES_MAX
    }
}

impl Primary {
    /// A change of these blocks is not under way any more.
    pub(crate) fn cool_down(&mut self, now: Instant, volume: VolumeId, range: BlockRange) {
        for extent in range.extents() {
            if let Some(warm) = self.warm.get_mut(&(volume, extent)) {
                *warm = (warm.0 - 1, now);
            }
        }
    }

    /// Whether new changes wait because a replica is as far behind as it may be.
    pub(crate) fn holds_changes(&self, bound: LagBound, now: Instant) -> bool {
        self.unwritten.is_full() || self.is_slowed(bound, now)
    }
}

impl Group {
    /// A replica has what it was asked in memory.
    pub(crate) fn on_received(&mut self, node: &mut Node, peer: NodeId, stamp: Stamp, sequence: Sequence) {
        if self.acting().is_none_or(|spec| spec.record.stamp != stamp || spec.mode(peer) != Mode::Memory) {
            return; // ignore_answer_to_older_record
        }
        let asked = self.primary.as_mut().and_then(|primary| primary.asked.get_mut(sequence));
        let Some(asked) = asked.filter(|asked| asked.peer == peer) else { return };
        if let What::Piece { key, is_received: is_received @ false } = &mut asked.what {
            *is_received = true;
            let key = *key;
            self.on_piece_received(node, key, peer);
        }
    }

    /// What a replica had in memory is on its disk.
    pub(crate) fn on_piece_written(&mut self, node: &mut Node, key: Key, peer: NodeId) {
        if self.forget_unwritten_piece(key, peer) {
            return; // others have not even got it
        }
        let Some(primary) = &mut self.primary else { return };
        let Some(change) = primary.unwritten.changes.get_mut(&key) else { return };
        if let Some(left) = change.left.get_mut(&peer) {
            *left -= 1;
        }
        change.left.retain(|_, left| *left > 0);
        if change.left.is_empty() {
            self.written(node, key);
        }
    }

    /// The session with the replica is over: when it is back it is settled, or it is not needed.
    pub(crate) fn unwritten_without(&mut self, node: &mut Node, peer: NodeId) {
        let Some(primary) = &mut self.primary else { return };
        let mut ended = Vec::new();
        for (key, change) in &mut primary.unwritten.changes {
            change.left.remove(&peer);
            if change.left.is_empty() {
                ended.push(*key);
            }
        }
        for key in ended {
            self.written(node, key);
        }
    }

    /// A newer record holds: answers to what was asked under the one before come no more. Whether any were awaited.
    pub(crate) fn forget_unwritten(&mut self, node: &mut Node) -> bool {
        let Some(primary) = &mut self.primary else { return false };
        let keys: Vec<Key> = primary.unwritten.changes.keys().copied().collect();
        let pending =
            primary.requests.iter_mut().map(|(_, pending)| pending.forget_unwritten()).fold(false, |a, b| a | b);
        let any = pending || !keys.is_empty();
        for key in keys {
            self.written(node, key);
        }
        any
    }

    fn written(&mut self, node: &Node, key: Key) {
        let Some(primary) = &mut self.primary else { return };
        if let Some(change) = primary.unwritten.remove(key) {
            primary.cool_down(node.now, change.volume, change.range);
        }
        self.cool_later(node);
    }

    /// For the invariants.
    pub(crate) fn check_unwritten(&self) {
        let Some(primary) = &self.primary else { return };
        for (key, change) in &primary.unwritten.changes {
            assert!(!change.left.is_empty(), "{key:?}: written everywhere and not forgotten");
            let is_here = |peer: &NodeId| {
                primary.members.get(peer).is_some_and(|member| !matches!(member.state, MemberState::Away))
            };
            assert!(self.acting().is_none() || change.left.keys().all(is_here), "{key:?}: awaits who is away");
        }
    }
}
