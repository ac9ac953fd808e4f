//! Mending blocks that do not match their checksums on this node's disk, from a replica that has them (W11). Whoever
//! needed the blocks holds them locked meanwhile, so what the peer gives is what belongs there.

use crate::group::Group;
use crate::local::{Act, Job, JobResult, Origin};
use crate::node::Node;
use crate::primary::{Member, MemberState, What};
use crate::range_queue::Key;
use crate::wire::Message;
use pollux_base::order::{FindingKind, FoundBy};
use pollux_base::unit::{BLOCK_BYTES, BlockRange};
use pollux_base::{BlockChecksum, BlockIndex, Data, NodeId, VolumeId};
use std::collections::{BTreeSet, VecDeque};

/// Who needs the blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum For {
    /// A client's read.
    Request(Key),
    /// An extent that is brought to a peer.
    Copy { peer: NodeId, key: Key },
    /// An extent that is taken over from a peer: its blocks, and nobody else's.
    Take { peer: NodeId, key: Key },
    /// An extent that is scrubbed.
    Scrub { key: Key },
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Mended,
    /// A replica that may have the blocks is not there at present.
    Wait,
    NoCopy,
}

#[derive(Debug)]
pub(crate) struct Repair {
    whom: For,
    volume: VolumeId,
    /// Still bad, each within one extent.
    ranges: VecDeque<BlockRange>,
    /// Replicas that have no good copy of the first.
    tried: BTreeSet<NodeId>,
    asking: Option<NodeId>,
}

impl Repair {
    pub(crate) fn is_for(&self, key: Key) -> bool {
        let (For::Request(own) | For::Copy { key: own, .. } | For::Take { key: own, .. } | For::Scrub { key: own }) =
            self.whom;
        own == key
    }
}

impl Group {
    pub(crate) fn begin_repair(&mut self, node: &mut Node, whom: For, volume: VolumeId, ranges: Vec<BlockRange>) {
        let ranges = ranges.into_iter().flat_map(BlockRange::split_by_extent).collect();
        let key = node.next_key();
        let Some(primary) = &mut self.primary else { return };
        primary.repairs.insert(key, Repair { whom, volume, ranges, tried: BTreeSet::new(), asking: None });
        self.step_repair(node, key);
    }

    fn step_repair(&mut self, node: &mut Node, key: Key) {
        let group = self.id;
        let Some(repair) = self.primary.as_ref().and_then(|primary| primary.repairs.get(&key)) else { return };
        let (volume, whom) = (repair.volume, repair.whom);
        let Some(range) = repair.ranges.front().copied() else {
            return self.end_repair(node, key, Outcome::Mended);
        };
        // A replica that is just being settled differs only in what was never acknowledged, so either copy is right; unless
        // it lost power, and with it acknowledged writes that were not flushed, and others did not.
        let settling = match whom {
            For::Copy { peer, .. } | For::Take { peer, .. } => {
                Some(peer).filter(|peer| !repair.tried.contains(peer) && self.may_give_while_settling(*peer))
            }
            For::Request(_) => self.settling_reader(&repair.tried),
            For::Scrub { .. } => None,
        };
        let reader = match whom {
            For::Take { .. } => None,
            For::Request(_) | For::Copy { .. } | For::Scrub { .. } => self.reader(&repair.tried),
        };
        let Some(from) = reader.or(settling) else {
            let in_sync = self.spec.iter().flat_map(|spec| &spec.record.in_sync);
            let untried = in_sync.filter(|peer| **peer != node.me && !repair.tried.contains(*peer)).count();
            return self.end_repair(node, key, if untried > 0 { Outcome::Wait } else { Outcome::NoCopy });
        };
        let Some((sequence, stamp)) = self.ask(node, from, What::Repair(key)) else { return };
        if let Some(repair) = self.repair(key) {
            repair.asking = Some(from);
        }
        node.send_bare(from, Message::ReadAsk { group, stamp, sequence, volume, range });
    }

    fn repair(&mut self, key: Key) -> Option<&mut Repair> {
        self.primary.as_mut()?.repairs.get_mut(&key)
    }

    /// A replica that is just being settled while guests are served.
    fn settling_reader(&self, tried: &BTreeSet<NodeId>) -> Option<NodeId> {
        let lets_serve = |member: &Member| matches!(&member.state, MemberState::Settling(sync) if sync.lets_serve());
        let mut members = self.primary.as_ref()?.members.iter();
        members.find(|(peer, member)| !tried.contains(peer) && lets_serve(member)).map(|(peer, _)| *peer)
    }

    fn may_give_while_settling(&self, peer: NodeId) -> bool {
        let Some(primary) = &self.primary else { return false };
        let member = primary.members.get(&peer);
        member.is_some_and(|member| match &member.state {
            MemberState::Settling(sync) => sync.is_continuous || primary.fell_with.contains(&peer),
            _ => false,
        })
    }

    /// A replica gave the blocks, or has no good copy either.
    pub(crate) fn on_repair_data(
        &mut self,
        node: &mut Node,
        key: Key,
        peer: NodeId,
        blocks: Option<(Data, Vec<BlockChecksum>)>,
    ) {
        let (id, generation) = (self.id, self.generation());
        let now = node.now;
        let Some(primary) = &mut self.primary else { return };
        let Some(repair) = primary.repairs.get_mut(&key) else { return };
        repair.asking = None;
        let Some(range) = repair.ranges.front().copied() else { return };
        let volume = repair.volume;
        match blocks {
            Some((data, checksums)) if checksums.len() as u64 == range.count.0 => {
                for extent in range.extents() {
                    primary.warm.entry((volume, extent)).or_insert((0, now));
                }
                // Thin stays thin: blocks of zeros are given back, apart from the others.
                let bytes_of = |block: BlockIndex| {
                    let at = (block.0 - range.start.0) as usize * BLOCK_BYTES as usize;
                    &data.as_slice()[at..at + BLOCK_BYTES as usize]
                };
                let parts = range.split_by(|block| bytes_of(block).iter().all(|byte| *byte == 0));
                if parts.len() > 1 {
                    repair.ranges.pop_front();
                    parts.into_iter().rev().for_each(|(part, _)| repair.ranges.push_front(part));
                    return self.step_repair(node, key);
                }
                let is_zero = parts.first().is_some_and(|(_, is_zero)| *is_zero);
                let act = if is_zero { Act::Zero } else { Act::Write { data, checksums } };
                let job = Job { origin: Origin::Repair { key }, volume, range, act, fua: false, is_received: false };
                self.local.submit(node, id, generation, job);
                self.cool_later(node);
            }
            _ => {
                repair.tried.insert(peer);
                self.step_repair(node, key);
            }
        }
    }

    /// The good blocks are on the disk.
    pub(crate) fn on_repair_job(&mut self, node: &mut Node, key: Key, result: JobResult) {
        match result {
            Ok(_) => {
                let Some(repair) = self.repair(key) else { return };
                repair.tried.clear();
                let (whom, volume) = (repair.whom, repair.volume);
                if let Some(range) = repair.ranges.pop_front()
                    && !matches!(whom, For::Take { .. })
                {
                    self.healed += range.count.0;
                    self.find_bad_here(node, whom, volume, range, true);
                }
                self.step_repair(node, key);
            }
            Err(error) => self.on_store_error(node, &error),
        }
    }

    fn end_repair(&mut self, node: &mut Node, key: Key, outcome: Outcome) {
        let Some(repair) = self.primary.as_mut().and_then(|primary| primary.repairs.remove(&key)) else { return };
        if outcome == Outcome::NoCopy {
            for range in &repair.ranges {
                self.find_bad_here(node, repair.whom, repair.volume, *range, false);
            }
        }
        match repair.whom {
            For::Scrub { key } => self.on_scrub_repaired(node, key, outcome),
            For::Request(key) => self.on_request_repaired(node, key, outcome),
            For::Copy { peer, key } | For::Take { peer, key } => self.on_copy_repaired(node, peer, key, outcome),
        }
    }

    /// Keeps the evidence of blocks that were bad on this node's disk. A scrub does so itself.
    fn find_bad_here(&mut self, node: &Node, whom: For, volume: VolumeId, range: BlockRange, healed: bool) {
        let by = match whom {
            For::Request(_) => FoundBy::Read,
            For::Copy { .. } => FoundBy::Resync,
            For::Take { .. } | For::Scrub { .. } => return,
        };
        self.find(node, node.me, volume, range, FindingKind::Rot, by, healed);
    }

    /// A peer that was asked is gone: another is.
    pub(crate) fn repair_without(&mut self, node: &mut Node, peer: NodeId) {
        let Some(primary) = &mut self.primary else { return };
        let asked = |repair: &Repair| repair.asking == Some(peer);
        let keys: Vec<Key> = primary.repairs.iter().filter(|(_, repair)| asked(repair)).map(|(key, _)| *key).collect();
        for key in keys {
            if let Some(repair) = self.repair(key) {
                repair.asking = None;
            }
            self.step_repair(node, key);
        }
    }
}
