//! Snapshots, clones and rollback: layers of extents, one on top of the other.
//!
//! A snapshot puts an empty layer on top of the volume's; the one beneath is the snapshot's and is not written to any more.
//! Invariant: an extent is looked for from the top; the first layer that says anything of a block decides.
//!
//! Life of a snapshot or rollback: its volumes' requests are held -> what is under way there ends -> the new layer's hot
//! marks, those of the old one, are durable -> the catalog names it -> what was held goes on, to the new layer -> the
//! old layer's extents cool in the background. So it is one point in the order of requests, and whoever had an extent
//! marked hot still has it.

use crate::catalog::Catalog;
use crate::control::Change;
use crate::hot::HotExtent;
use crate::lanes::Key;
use crate::pool::{LogThen, Pool};
use crate::record::Record;
use crate::slab::SlabId;
use crate::slots::{LayerId, SlotState};
use crate::transfer::{Request, RequestId};
use crate::{StoreError, StoreOp, StoreReply, StoreRequestId};
use pollux_base::{ExtentIndex, Generation, GroupId, VolumeId};
use std::collections::{BTreeSet, VecDeque};

/// What the store does for itself; no request has this name.
pub fn nobody() -> RequestId {
    SlabId::from_raw(0)
}

/// What gives volumes a new top layer.
pub enum Turn {
    Snapshot {
        of: Vec<(VolumeId, VolumeId)>,
    },
    Rollback {
        volume: VolumeId,
        snapshot: VolumeId,
        generation: Generation,
        also: Vec<ExtentIndex>,
    },
    /// At open: those that this disk missed.
    Adopt(Box<Catalog>),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Changes under way end.
    Drain,
    /// The marks of the new layers are on their way to the disk.
    Mark,
    /// The catalog is.
    Commit,
}

pub struct Turning {
    request: RequestId,
    turn: Turn,
    step: Step,
    /// Volumes that change their layer, and the layer that they had.
    tops: Vec<(VolumeId, LayerId)>,
    /// Those of the new layers, once they are queued for the journal.
    marks: Vec<(Key, Generation)>,
}

/// Requests that wait until a turn is over, in order, and the volumes that they are about.
#[derive(Default)]
pub struct Held {
    requests: VecDeque<(StoreRequestId, StoreOp)>,
    volumes: BTreeSet<VolumeId>,
    groups: BTreeSet<GroupId>,
}

/// Extents of a layer beneath that cool at one time: the guests' writes come first.
const FREEZING_AT_ONCE: usize = 32;

impl Pool {
    pub fn begin_turn(&mut self, id: StoreRequestId, turn: Turn) -> Result<(), StoreError> {
        let volumes: Vec<VolumeId> = match &turn {
            Turn::Snapshot { of } => of.iter().map(|(volume, _)| *volume).collect(),
            Turn::Rollback { volume, snapshot, .. } => {
                let origin = |volume| Ok(self.catalog.layers.get(&self.known_volume(volume)?.layer).map(|l| l.family));
                if origin(*volume)? != origin(*snapshot)? {
                    return Err(StoreError::NoVolume);
                }
                vec![*volume]
            }
            Turn::Adopt(ahead) => {
                let is_moved = |volume: &VolumeId| self.layer_of(*volume) != ahead.volumes.get(volume).map(|v| v.layer);
                ahead
                    .volumes
                    .keys()
                    .filter(|volume| self.layer_of(**volume).is_some() && is_moved(volume))
                    .copied()
                    .collect()
            }
        };
        let mut tops = Vec::new();
        for volume in volumes {
            tops.push((volume, self.known_volume(volume)?.layer));
        }
        // One for the marks, one for the catalog.
        let request = self.requests.insert(Request::change(id, 2));
        self.held.volumes = tops.iter().map(|(volume, _)| *volume).collect();
        match &turn {
            Turn::Snapshot { of } => self.held.volumes.extend(of.iter().map(|(_, snapshot)| *snapshot)),
            Turn::Rollback { snapshot, .. } => drop(self.held.volumes.insert(*snapshot)),
            Turn::Adopt(_) => {}
        }
        self.held.groups = tops.iter().map(|(volume, _)| self.catalog.volumes[volume].group).collect();
        // Who had an extent hot may write to it although it waits for this.
        let hot = tops.iter().flat_map(|(_, layer)| self.hot.range(all_of(*layer)).map(|(key, _)| *key));
        hot.collect::<Vec<Key>>().into_iter().for_each(|key| self.cancel_cooling(key));
        self.turning = Some(Turning { request, turn, step: Step::Drain, tops, marks: Vec::new() });
        Ok(())
    }

    /// Holds a request that must not overtake a turn. Gives back one that may go on.
    pub fn hold(&mut self, id: StoreRequestId, op: StoreOp) -> Option<StoreOp> {
        if self.turning.is_none() {
            return Some(op);
        }
        let (volumes, group, makes_layers): (Vec<VolumeId>, Option<GroupId>, bool) = match &op {
            // They would take numbers of layers.
            StoreOp::Create { volume, .. } => (vec![*volume], None, true),
            StoreOp::Delete { volume }
            | StoreOp::Heat { volume, .. }
            | StoreOp::Cool { volume, .. }
            | StoreOp::Read { volume, .. }
            | StoreOp::Write { volume, .. }
            | StoreOp::Zero { volume, .. }
            | StoreOp::Lose { volume, .. }
            | StoreOp::LoseColumn { volume, .. }
            | StoreOp::Forget { volume, .. }
            | StoreOp::Checksums { volume, .. } => (vec![*volume], None, false),
            StoreOp::Clone { of, volume, .. } => (vec![*of, *volume], None, true),
            StoreOp::Snapshot { of } => (of.iter().flat_map(|(a, b)| [*a, *b]).collect(), None, true),
            StoreOp::Rollback { volume, snapshot, .. } => (vec![*volume, *snapshot], None, true),
            StoreOp::Remark { group, .. } | StoreOp::Reap { group } => (Vec::new(), Some(*group), false),
            StoreOp::PutNote { .. }
            | StoreOp::PutMembers { .. }
            | StoreOp::PutArriving { .. }
            | StoreOp::Adopt(_)
            | StoreOp::Look { .. }
            | StoreOp::Flush => (Vec::new(), None, false),
        };
        let held = &mut self.held;
        let waits = makes_layers
            || volumes.iter().any(|volume| held.volumes.contains(volume))
            || group.is_some_and(|group| held.groups.contains(&group));
        if !waits {
            return Some(op);
        }
        if let StoreOp::Cool { .. } = op {
            // Whoever sees an extent hot meanwhile may write to it: it stays hot.
            self.end(id, Ok(StoreReply::Done));
            return None;
        }
        held.volumes.extend(volumes);
        if let StoreOp::Write { volume, range, .. } | StoreOp::Zero { volume, range } = &op {
            // As if it had begun: what was cooling stays hot.
            let (volume, range) = (*volume, *range);
            if let Ok(layer) = self.checked_range(volume, range) {
                range.extents().for_each(|extent| self.cancel_cooling((layer, extent)));
            }
        }
        self.held.requests.push_back((id, op));
        None
    }

    /// Begins a turn as soon as nothing is in its way.
    pub fn step_turn(&mut self) {
        let Some(turning) = self.turning.as_ref().filter(|turning| turning.step == Step::Drain) else { return };
        let mut marked = 0;
        for (_, layer) in &turning.tops {
            for (_, hot) in self.hot.range(all_of(*layer)) {
                if hot.writers > 0 || hot.marking.is_some() {
                    return;
                }
                marked += usize::from(hot.marked.is_some());
            }
        }
        if self.hot.len() + marked > self.geometry().ring.hot_marks_max() {
            if matches!(turning.turn, Turn::Adopt(_)) {
                self.freeze_beneath();
            }
            return;
        }
        // The numbers of the new layers must be known before they are in the catalog.
        if self.catalog_commit.is_some() || !self.catalog_queue.is_empty() {
            return;
        }
        let mut next = self.catalog.clone();
        match &turning.turn {
            Turn::Snapshot { of } => next.snapshot(of),
            Turn::Rollback { volume, snapshot, generation, .. } => next.roll_back(*volume, *snapshot, *generation, &[]),
            Turn::Adopt(ahead) => next.adopt((**ahead).clone()),
        }
        let mut marks = Vec::new();
        for (volume, old) in &turning.tops {
            let Some(new) = next.volumes.get(volume).map(|known| known.layer).filter(|new| new != old) else {
                continue;
            };
            let marked =
                self.hot.range(all_of(*old)).filter_map(|(key, hot)| Some((key.1, hot.marked?.max(hot.generation))));
            marks.extend(marked.map(|(extent, generation)| ((new, extent), generation)));
        }
        let turning = self.turning.as_mut().expect("it was just there");
        (turning.step, turning.marks) = (Step::Mark, marks);
        let mut records: Vec<Record> = self.turn_marks().collect();
        match records.pop() {
            None => self.on_turn_marked(),
            Some(last) => {
                records.into_iter().for_each(|record| self.journal.queue(record));
                self.journal.queue_then(last, LogThen::Turned);
            }
        }
    }

    /// Marks of layers that are about to be in the catalog: a checkpoint must not forget them.
    pub fn turn_marks(&self) -> impl Iterator<Item = Record> {
        let marks = self.turning.iter().flat_map(|turning| &turning.marks);
        marks.map(|((layer, extent), generation)| Record::Hot {
            layer: *layer,
            extent: *extent,
            generation: *generation,
        })
    }

    /// Whether a new layer has just been given the layer's marks. One that came now would be on the old layer only: it
    /// waits, and goes to the new one.
    pub fn marks_are_taken_over(&self, layer: LayerId) -> bool {
        let turning = self.turning.as_ref().filter(|turning| turning.step != Step::Drain);
        turning.is_some_and(|turning| turning.tops.iter().any(|(_, old)| *old == layer))
    }

    /// The new layers have the marks of the old ones, durably: the catalog may name them.
    pub fn on_turn_marked(&mut self) {
        let turning = self.turning.as_mut().expect("a turn is under way");
        turning.step = Step::Commit;
        let request = turning.request;
        let change = match &turning.turn {
            Turn::Snapshot { of } => Change::Snapshot { of: of.clone() },
            Turn::Rollback { volume, snapshot, generation, also } => {
                let (volume, snapshot, generation, also) = (*volume, *snapshot, *generation, also.clone());
                // What was hot may differ between replicas although nothing of it is here.
                let hot = self.layer_of(volume).map(|layer| self.hot_of(layer)).unwrap_or_default();
                let extents = self.differing(volume, snapshot).into_iter().chain(hot).chain(also).collect();
                Change::Rollback { volume, snapshot, generation, extents }
            }
            Turn::Adopt(ahead) => Change::Adopt(ahead.clone()),
        };
        self.finish_one(request);
        self.catalog_queue.push_back((request, change));
    }

    /// The catalog is on disk, or could not take it: the turn is over, and what was held begins.
    pub fn end_turn(&mut self) -> bool {
        let is_over = |turning: &Turning| turning.step == Step::Commit && self.requests.get(turning.request).is_none();
        let Some(turning) = self.turning.take_if(|turning| is_over(turning)) else { return false };
        for (volume, old) in &turning.tops {
            let Some(new) = self.layer_of(*volume).filter(|new| new != old) else { continue };
            for (_, key, _) in self.heat_waiting.iter_mut().filter(|(_, key, _)| key.0 == *old) {
                key.0 = new;
            }
            self.freezing.extend(self.hot.range(all_of(*old)).map(|(key, _)| *key));
        }
        for (key, generation) in turning.marks.iter().filter(|(key, _)| self.catalog.layers.contains_key(&key.0)) {
            let mut hot = HotExtent::new(*generation, None);
            hot.marked = Some(*generation);
            self.hot.insert(*key, hot);
        }
        let held = std::mem::take(&mut self.held);
        held.requests.into_iter().for_each(|(id, op)| self.on_request(id, op));
        true
    }

    /// The store has failed: what was held is answered, too.
    pub fn fail_held(&mut self) {
        self.turning = None;
        let held = std::mem::take(&mut self.held);
        held.requests.into_iter().for_each(|(id, op)| self.on_request(id, op));
    }

    /// Cools what nobody writes to any more because another layer lies on top.
    pub fn freeze_some(&mut self) {
        let some: Vec<Key> = self.freezing.iter().take(FREEZING_AT_ONCE).copied().collect();
        for key in some {
            match self.hot.get(&key) {
                None => drop(self.freezing.remove(&key)),
                Some(hot) if hot.cooling.is_none() => self.cool(key, nobody()),
                Some(_) => {}
            }
        }
    }

    /// The same of marks that a turn before the last crash left beneath its new layers.
    fn freeze_beneath(&mut self) {
        let has_children = |layer: LayerId| self.catalog.layers.values().any(|above| above.parent == Some(layer));
        let beneath = self.hot.keys().filter(|(layer, _)| has_children(*layer)).copied();
        self.freezing.extend(beneath.collect::<Vec<Key>>());
    }

    pub fn begin_clone(
        &mut self,
        id: StoreRequestId,
        of: VolumeId,
        volume: VolumeId,
        group: GroupId,
        generation: Generation,
    ) -> Result<(), StoreError> {
        self.known_volume(of)?;
        if self.deleting.contains(&volume) {
            return Err(StoreError::NoVolume);
        }
        self.change_catalog(id, Change::Clone { of, volume, group, generation });
        Ok(())
    }

    /// Extents in which two volumes may differ, because a layer that only one of them has says something there.
    pub fn differing(&self, one: VolumeId, two: VolumeId) -> Vec<ExtentIndex> {
        let layers = self.layer_of(one).zip(self.layer_of(two));
        layers.map_or_else(Vec::new, |(one, two)| self.differing_layers(one, two))
    }

    pub fn differing_layers(&self, one: LayerId, two: LayerId) -> Vec<ExtentIndex> {
        let chain = |layer| -> BTreeSet<LayerId> { self.catalog.chain(layer).collect() };
        let (one, two) = (chain(one), chain(two));
        let extents = |layer: &LayerId| self.layers.get(layer).into_iter().flat_map(|map| map.extents.keys().copied());
        let differing: BTreeSet<ExtentIndex> = one.symmetric_difference(&two).flat_map(extents).collect();
        differing.into_iter().collect()
    }

    /// Whether a layer beneath says anything of the extent.
    pub fn shows_through(&self, below: &[LayerId], extent: ExtentIndex) -> bool {
        below.iter().any(|layer| self.says_something((*layer, extent)))
    }

    /// Hot extents of a volume's layers.
    pub fn hot_of(&self, layer: LayerId) -> BTreeSet<ExtentIndex> {
        self.catalog.chain(layer).flat_map(|layer| self.hot.range(all_of(layer)).map(|((_, x), _)| *x)).collect()
    }

    /// Extents of which blocks are lost in any of the volume's layers.
    pub fn damaged(&self, layer: LayerId) -> impl Iterator<Item = ExtentIndex> {
        let maps = self.catalog.chain(layer).filter_map(|layer| self.layers.get(&layer));
        maps.flat_map(|map| map.damaged.iter().copied())
    }

    /// Extents last changed under a generation above `generation`, hot and damaged ones included. Beneath a layer whose ground counts
    /// the generations of another group the layer says in which of its own all that is there came to it.
    pub fn changed_since(&self, layer: LayerId, size: u64, generation: Generation) -> BTreeSet<ExtentIndex> {
        let mut changed = self.hot_of(layer);
        changed.extend(self.damaged(layer));
        let mut foreign: Option<Generation> = None;
        for layer in self.catalog.chain(layer) {
            let Some((map, known)) = self.layers.get(&layer).zip(self.catalog.layers.get(&layer)) else { continue };
            let is_newer = |own: Generation| foreign.unwrap_or(own) > generation;
            let newer = map.extents.iter().filter(|(_, slot)| is_newer(self.table.get(**slot).generation));
            changed.extend(newer.map(|(extent, _)| *extent));
            if let Some(replaced) = known.replaced.as_ref().filter(|replaced| is_newer(replaced.generation)) {
                changed.extend(replaced.iter().map(ExtentIndex));
            }
            foreign = foreign.or(known.foreign);
        }
        let extents = size.div_ceil(pollux_base::unit::EXTENT_BYTES);
        changed.retain(|extent| u64::from(extent.0) < extents);
        changed
    }

    /// Extents of which any of the volume's layers says something.
    pub fn allocated(&self, layer: LayerId) -> BTreeSet<ExtentIndex> {
        let extents = |layer| {
            let mapped = self.layers.get(&layer).into_iter().flat_map(|map| map.extents.keys().copied());
            mapped.filter(move |extent| self.says_something((layer, *extent)))
        };
        self.catalog.chain(layer).flat_map(extents).collect()
    }

    /// Whether the layer has a slot for the extent of which the journal was told. Another may never hold anything.
    pub fn says_something(&self, key: Key) -> bool {
        let Some(slot) = self.layers.get(&key.0).and_then(|map| map.extents.get(&key.1)) else { return false };
        self.table.get(*slot).state != SlotState::Free || self.hot.get(&key).is_some_and(|hot| hot.slot_told)
    }

    /// To which group the space of a layer is counted: that of a volume that names it, or of one that lies on it.
    pub fn payer(&self, layer: LayerId) -> Option<GroupId> {
        let named = self.catalog.volumes.values().find(|volume| volume.layer == layer);
        let above =
            || self.catalog.volumes.values().find(|volume| self.catalog.chain(volume.layer).any(|l| l == layer));
        named.or_else(above).map(|volume| volume.group)
    }
}

/// The keys of all extents of a layer.
pub fn all_of(layer: LayerId) -> std::ops::RangeInclusive<Key> {
    (layer, ExtentIndex(0))..=(layer, ExtentIndex(u32::MAX))
}
