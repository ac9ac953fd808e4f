//! When extents are hot no more, and which become hot before they are written. The primary decides, because only it knows
//! that every replica has finished every write to an extent: with three replicas a write may have reached one survivor and
//! not the other, and only the mark tells of it.

use crate::group::Group;
use crate::node::{Node, Purpose};
use crate::primary::{MemberState, Primary};
use crate::wire::Message;
use pollux_base::unit::{BlockRange, EXTENT_BLOCKS};
use pollux_base::{BlockIndex, ExtentIndex, Instant, Stamp, VolumeId};
use pollux_store::StoreOp;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// An extent that was not written for so long is cooled. Long enough that a working set stays hot (its overwrites cost no
/// metadata write), short enough that little is compared after a crash.
const COOL_AFTER: Duration = Duration::from_secs(5);
/// Hot extents that one node's primaries cause at most: three quarters of the store's bound, halved because the peers'
/// primaries mark as many here. Beyond it the longest idle are cooled at once; if none is idle the store makes marks wait.
fn warm_max(node: &Node) -> usize {
    node.store.hot_extents_max() * 3 / 4 / 2
}
/// Extents cooled at once under pressure, so that it is not done for each request.
const COOL_BATCH: usize = 32;
/// Extents that are marked ahead of a stream of writes: 64 MiB, so that it waits for a flush once in so much, and no more
/// than this is compared in vain after a crash.
const AHEAD_EXTENTS: u32 = 16;
/// A stream enters an extent within its first MiB: writes all over a volume seldom look like that.
const ENTRY_BLOCKS: usize = 256;

impl Group {
    pub(crate) fn cool_later(&mut self, node: &Node) {
        if let Some(primary) = &mut self.primary
            && primary.cool_at.is_none()
            && !primary.warm.is_empty()
        {
            primary.cool_at = Some(node.now + COOL_AFTER);
        }
    }

    /// Cools what has been idle for long.
    pub(crate) fn cool_on_time(&mut self, node: &mut Node) {
        let Some(primary) = &mut self.primary else { return };
        if primary.cool_at.is_none_or(|at| node.now < at) {
            return;
        }
        primary.cool_at = None;
        if may_cool(primary) && self.freeze(node).is_none() {
            let idle_since = node.now - COOL_AFTER;
            self.cool(node, |at| at <= idle_since, usize::MAX);
        }
        self.cool_later(node);
    }

    /// Cools the longest idle if there are too many.
    pub(crate) fn cool_under_pressure(&mut self, node: &mut Node) {
        let Some(primary) = &mut self.primary else { return };
        if primary.warm.len() > warm_max(node) && may_cool(primary) && self.freeze(node).is_none() {
            let mut idle: Vec<Instant> = primary_idle(self.primary.as_ref()).collect();
            idle.sort_unstable();
            if let Some(limit) = idle.get(COOL_BATCH.min(idle.len().saturating_sub(1))).copied() {
                self.cool(node, |at| at <= limit, COOL_BATCH);
            }
        }
    }

    fn cool(&mut self, node: &mut Node, is_old: impl Fn(Instant) -> bool, count_max: usize) {
        let group = self.id;
        let Some(stamp) = self.acting().map(|spec| spec.record.stamp) else { return };
        let is_member = self.is_member(node);
        let reap = self.is_complete(node);
        let Some(primary) = &mut self.primary else { return };
        // A mark at a replica that has not been compared yet may be all that tells of a difference: only replicas that
        // hold everything, or for which the extent was compared, hear of it.
        let covered = |volume: VolumeId, extent: ExtentIndex| {
            primary.members.values().any(|member| match &member.state {
                MemberState::Settling(sync) | MemberState::Copying(sync) => sync.covers(volume, extent),
                _ => false,
            })
        };
        let cold: Vec<(VolumeId, ExtentIndex)> = primary
            .warm
            .iter()
            .filter(|((volume, extent), (under_way, at))| *under_way == 0 && is_old(*at) && !covered(*volume, *extent))
            .map(|(extent, _)| *extent)
            .take(count_max)
            .collect();
        let mut by_volume: BTreeMap<VolumeId, Vec<ExtentIndex>> = BTreeMap::new();
        for (volume, extent) in cold {
            primary.warm.remove(&(volume, extent));
            by_volume.entry(volume).or_default().push(extent);
        }
        let hears = |state: &MemberState| {
            matches!(state, MemberState::Current | MemberState::Confirming { .. }) || state.resync().is_some()
        };
        let peers: Vec<_> =
            primary.members.iter().filter(|(_, member)| hears(&member.state)).map(|(peer, _)| *peer).collect();
        for (volume, extents) in by_volume {
            for peer in &peers {
                node.send_bare(*peer, Message::Cool { group, stamp, volume, extents: extents.clone(), reap });
            }
            if is_member {
                self.cool_here(node, volume, extents, reap);
            }
        }
    }
}

impl Group {
    /// Takes back the marks of extents: only those that are hot here.
    pub(crate) fn cool_here(&mut self, node: &mut Node, volume: VolumeId, extents: Vec<ExtentIndex>, reap: bool) {
        let hot: BTreeSet<ExtentIndex> = node.store.hot(volume).into_iter().collect();
        let extents: Vec<ExtentIndex> = extents.into_iter().filter(|extent| hot.contains(extent)).collect();
        if !extents.is_empty() {
            let reap = self.acting().map(|spec| spec.record.stamp).filter(|_| reap);
            node.request(self.id, Purpose::Cool { reap }, StoreOp::Cool { volume, extents });
        }
    }

    /// Marks are taken back on the disk. Since they were, no replica may have fallen out: what changed after that is to be
    /// remembered.
    pub(crate) fn on_cooled(&mut self, node: &mut Node, reap: Option<Stamp>) {
        if reap.is_some() && self.acting().map(|spec| spec.record.stamp) == reap {
            node.request(self.id, Purpose::Background, StoreOp::Reap { group: self.id });
        }
    }

    /// The extents that come next if the range, which is not empty, belongs to a stream: it enters an extent, and the two before are hot. They are
    /// warm from now on, so they are cooled like those that were written.
    pub(crate) fn ahead(&mut self, node: &Node, volume: VolumeId, range: BlockRange) -> Vec<ExtentIndex> {
        let generation = self.generation();
        let entered = range.start.extent().0;
        let is_hot = |extent: u32| node.store.is_hot(volume, ExtentIndex(extent), generation);
        let is_stream =
            range.start.in_extent() < ENTRY_BLOCKS && entered >= 1 && (entered.saturating_sub(2)..entered).all(is_hot);
        let Some(blocks) = self.blocks(volume).filter(|_| is_stream) else { return Vec::new() };
        let Some(primary) = &mut self.primary else { return Vec::new() };
        let next = BlockIndex(range.end().0 - 1).extent().0 + 1;
        let end = blocks.div_ceil(EXTENT_BLOCKS) as u32;
        let ahead = (next..end.min(next + AHEAD_EXTENTS)).filter(|extent| !is_hot(*extent));
        let ahead: Vec<ExtentIndex> = ahead.map(ExtentIndex).collect();
        for extent in &ahead {
            primary.warm.entry((volume, *extent)).or_insert((0, node.now));
        }
        ahead
    }

    /// Has the replicas that count mark the extents meanwhile, so that a first write waits for one flush and not for two in turn.
    pub(crate) fn heat_there(&self, node: &mut Node, volume: VolumeId, extents: &[ExtentIndex]) {
        let Some((stamp, primary)) = self.acting().map(|spec| spec.record.stamp).zip(self.primary.as_ref()) else {
            return;
        };
        for (peer, member) in &primary.members {
            if matches!(member.state, MemberState::Current) {
                let extents = extents.to_vec();
                node.send_bare(*peer, Message::Heat { group: self.id, stamp, volume, extents });
            }
        }
    }
}

fn primary_idle(primary: Option<&Primary>) -> impl Iterator<Item = Instant> {
    primary
        .into_iter()
        .flat_map(|primary| primary.warm.values())
        .filter(|(under_way, _)| *under_way == 0)
        .map(|(_, at)| *at)
}

/// Of extents that are still to be compared with a replica the comparison decides, and of all while the group is frozen for it.
fn may_cool(primary: &Primary) -> bool {
    !primary.members.values().any(|member| matches!(&member.state, MemberState::Settling(sync) if !sync.lets_serve()))
}
