//! Marks: when an extent becomes hot (W7), and how it cools.
//!
//! An extent cools by writing its checksums to a new place, a flush, and then one batch of the journal that names the new
//! leaf and takes the mark back. Until that is durable the extent counts as hot after a crash, and the old leaf is
//! whole; then the old place is free.

use crate::hot::{Checksums, Cooling, CoolingStep, HotExtent};
use crate::lanes::Key;
use crate::layout::{BLOCK, LEAF_BLOCKS_MAX, LeafPlace, UNITS};
use crate::leaf::{self, LeafOwner};
use crate::pool::{DiskThen, FlushThen, LogThen, Pool};
use crate::record::Record;
use crate::slots::{LayerId, Slot, SlotState};
use crate::transfer::{Request, RequestId};
use crate::units::Units;
use crate::{StoreError, StoreReply, StoreRequestId};
use pollux_base::unit::EXTENT_BYTES;
use pollux_base::{DiskOpKind, ExtentIndex, Generation, GroupId, VolumeId};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Leaves that coolings write at once: what is to cool may be thousands of extents, at 12 KiB each.
const LEAVES_AT_ONCE: u32 = 64;
/// Extents that were hot at a crash and are read at once for coolings: they are 4 MiB each, and guests want the disk, too.
const LOADS_AT_ONCE: u32 = 4;

impl Pool {
    pub fn begin_heat(
        &mut self,
        id: StoreRequestId,
        volume: VolumeId,
        extents: &[ExtentIndex],
        generation: Generation,
    ) -> Result<(), StoreError> {
        let known = self.known_volume(volume)?;
        let layer = known.layer;
        if extents.iter().any(|extent| u64::from(extent.0) * EXTENT_BYTES >= known.size.0) {
            return Err(StoreError::OutOfRange);
        }
        let wanted: Vec<Key> = extents
            .iter()
            .map(|extent| (layer, *extent))
            .filter(|key| self.hot.get(key).and_then(|hot| hot.marked).is_none_or(|marked| marked < generation))
            .collect();
        // Who heats means to write: what was cooling stays hot.
        for key in extents.iter().map(|extent| (layer, *extent)) {
            self.cancel_cooling(key);
            self.freezing.remove(&key);
        }
        if wanted.is_empty() {
            self.end(id, Ok(StoreReply::Done));
            return Ok(());
        }
        let request = self.requests.insert(Request::change(id, wanted.len()));
        for key in wanted {
            let Some(hot) = self.hot.get(&key) else {
                self.heat_waiting.push_back((request, key, generation));
                continue;
            };
            match hot.marking.filter(|_| !hot.is_committing() && hot.generation >= generation) {
                // It does for this one, too.
                Some(under_way) => self.joined.push((under_way, request)),
                None => self.mark(key, generation, request),
            }
        }
        Ok(())
    }

    /// Marks the extents that wait for it, as far as the hot set has room.
    pub fn heat_waiting_extents(&mut self) {
        while let Some((request, key, generation)) = self.heat_waiting.front().copied() {
            if self.marks_are_taken_over(key.0) {
                return;
            }
            if !self.hot.contains_key(&key) {
                if self.is_merging(key) || self.hot.len() >= self.geometry().ring.hot_extents_max() {
                    return;
                }
                let view = self.view(key).map(|(slot, descriptor)| (slot, descriptor.clone()));
                let slot = view.as_ref().map(|(slot, _)| *slot);
                let mut hot = HotExtent::new(generation, view);
                if let Some(sums) = slot.filter(|_| hot.slot_told).and_then(|slot| self.leaves.get(slot)) {
                    hot.checksums = Checksums::Loaded(Box::new(*sums));
                }
                // From now on the truth is in memory.
                slot.into_iter().for_each(|slot| self.leaves.remove(slot));
                self.hot.insert(key, hot);
            }
            self.heat_waiting.pop_front();
            self.mark(key, generation, request);
        }
    }

    pub fn mark(&mut self, key: Key, generation: Generation, request: RequestId) {
        let number = self.count();
        let hot = self.hot.get_mut(&key).expect("the caller has it hot");
        if hot.is_committing() {
            // The record that takes the mark back is queued; this one comes after it.
            let cooling = hot.cooling.take();
            cooling.into_iter().flat_map(|cooling| cooling.requests).for_each(|id| self.finish_one(id));
        }
        let hot = self.hot.get_mut(&key).expect("it was just there");
        hot.generation = hot.generation.max(generation);
        hot.marking = Some(number);
        let record = Record::Hot { layer: key.0, extent: key.1, generation: hot.generation };
        let generation = hot.generation;
        self.journal.queue_then(record, LogThen::Marked { key, number, generation, request });
    }

    pub fn on_marked(&mut self, key: Key, number: u64, generation: Generation) {
        let Some(hot) = self.hot.get_mut(&key) else { return };
        if hot.marking == Some(number) {
            hot.marking = None;
        }
        // A mark with a newer one behind it is as good as any: whoever asked for it may write now. Were it not, two who
        // ask in turn would overtake each other for ever.
        if number >= hot.marks_from {
            hot.marked = hot.marked.max(Some(generation));
        }
    }

    pub fn begin_remark(
        &mut self,
        id: StoreRequestId,
        group: GroupId,
        generation: Generation,
    ) -> Result<(), StoreError> {
        let layers = self.layers_of(group);
        let of_group = |layer: &LayerId| layers.contains(layer);
        for (_, _, waiting) in self.heat_waiting.iter_mut().filter(|(_, key, _)| of_group(&key.0)) {
            *waiting = generation.max(*waiting);
        }
        let lower = |hot: &HotExtent| !hot.is_committing() && hot.marked.is_none_or(|marked| marked < generation);
        let keys: Vec<Key> =
            self.hot.iter().filter(|(key, hot)| of_group(&key.0) && lower(hot)).map(|(key, _)| *key).collect();
        if keys.is_empty() {
            self.end(id, Ok(StoreReply::Done));
            return Ok(());
        }
        let request = self.requests.insert(Request::change(id, keys.len()));
        keys.into_iter().for_each(|key| self.mark(key, generation, request));
        Ok(())
    }

    pub fn begin_cool(
        &mut self,
        id: StoreRequestId,
        volume: VolumeId,
        extents: &[ExtentIndex],
    ) -> Result<(), StoreError> {
        let layer = self.known_volume(volume)?.layer;
        // One more than there are, so that it cannot end before all were begun.
        let request = self.requests.insert(Request::change(id, extents.len() + 1));
        for extent in extents {
            self.cool((layer, *extent), request);
        }
        self.finish_one(request);
        Ok(())
    }

    pub fn cool(&mut self, key: Key, request: RequestId) {
        let number = self.count();
        let is_merging = self.is_merging(key);
        let Some(hot) = self.hot.get_mut(&key) else { return self.finish_one(request) };
        if let Some(cooling) = &mut hot.cooling {
            cooling.requests.push(request);
            return;
        }
        // Someone means to write, or the leaf place is still being written to for a cooling that was given up.
        if hot.writers > 0 || hot.marking.is_some() || hot.leaf_under_way || is_merging {
            return self.finish_one(request);
        }
        hot.cooling = Some(Cooling { number, step: CoolingStep::Wait, leaf_blocks: 0, requests: vec![request] });
        self.cool_waiting.push_back((key, number));
    }

    /// Begins to cool what waits for it, as far as that is worth its memory and its share of the disk.
    pub fn cool_waiting_extents(&mut self) {
        while self.leaves_under_way < LEAVES_AT_ONCE && self.cooling_loads < LOADS_AT_ONCE {
            let Some((key, number)) = self.cool_waiting.pop_front() else { return };
            if self.cooling(key, number, CoolingStep::Wait).is_some() {
                self.continue_cooling(key);
            }
        }
    }

    fn continue_cooling(&mut self, key: Key) {
        let is_known = self.is_known(key);
        let hot = self.hot.get_mut(&key).expect("what cools is hot");
        let Some(slot) = hot.slot.filter(|_| hot.dirty) else { return self.commit_cooling(key, None) };
        if !is_known {
            let cooling = hot.cooling.as_mut().expect("it is cooling");
            cooling.step = CoolingStep::Load;
            return self.load(key, None);
        }
        // What the journal knows of is given back by the record that names the units that are left.
        for (_, unit, told) in hot.drop_empty_units(0..UNITS) {
            if !told {
                self.space.drop_unit(unit);
            }
        }
        hot.descriptor.units.compact();
        let sums = match hot.loaded() {
            Some(sums) if sums.iter().any(|sum| !sum.is_zero()) => sums,
            _ => {
                let empty = Slot {
                    state: SlotState::Empty,
                    leaf: None,
                    lost: 0,
                    units: Units::default(),
                    ..hot.descriptor.clone()
                };
                return self.commit_cooling(key, Some(empty));
            }
        };
        let sequence = hot.descriptor.leaf_sequence + 1;
        let data = leaf::encode(sums, LeafOwner { slot, sequence }, self.superblock.identity.pool);
        let Some(spare) = hot.spare_leaf.or_else(|| self.space.take_leaf(LEAF_BLOCKS_MAX as u8)) else {
            // Only an extent that was emptied in part, in a pool that is full: it stays hot until there is room.
            let cooling = hot.cooling.take();
            return cooling.into_iter().flat_map(|cooling| cooling.requests).for_each(|id| self.finish_one(id));
        };
        hot.spare_leaf = Some(spare);
        let cooling = hot.cooling.as_mut().expect("it is cooling");
        cooling.step = CoolingStep::Leaf;
        cooling.leaf_blocks = (data.len() / BLOCK) as u8;
        hot.leaf_under_way = true;
        self.leaves_under_way += 1;
        let number = cooling.number;
        let offset = self.superblock.geometry.leaf_offset(spare);
        self.layers.get_mut(&key.0).expect("the layer is known").busy += 1;
        let write = DiskOpKind::Write { offset, data: vec![data], sync: false };
        self.io.submit(write, DiskThen::LeafWritten(key, number));
    }

    pub fn on_loaded(&mut self, key: Key) {
        let waits = |hot: &HotExtent| hot.cooling.as_ref().is_some_and(|cooling| cooling.step == CoolingStep::Load);
        if self.hot.get(&key).is_some_and(waits) && self.failed.is_none() {
            self.continue_cooling(key);
        }
    }

    /// The cooling of this number, if it is still wanted and at this step.
    fn cooling(&mut self, key: Key, number: u64, step: CoolingStep) -> Option<&mut Cooling> {
        let cooling = self.hot.get_mut(&key)?.cooling.as_mut()?;
        (cooling.number == number && cooling.step == step).then_some(cooling)
    }

    pub fn on_leaf_written(&mut self, key: Key, number: u64) {
        self.leaves_under_way -= 1;
        if let Some(hot) = self.hot.get_mut(&key) {
            hot.leaf_under_way = false;
        }
        if let Some(cooling) = self.cooling(key, number, CoolingStep::Leaf) {
            cooling.step = CoolingStep::Flush;
            self.flush(FlushThen::Cooled(key, number));
        }
        self.no_longer_busy(key.0);
    }

    pub fn on_leaf_flushed(&mut self, key: Key, number: u64) {
        let Some(cooling) = self.cooling(key, number, CoolingStep::Flush) else { return };
        let blocks = cooling.leaf_blocks;
        let hot = self.hot.get_mut(&key).expect("what cools is hot");
        let spare = hot.spare_leaf.take().expect("the leaf was written there");
        let leaf = LeafPlace { blocks, ..spare };
        let leaf_sequence = hot.descriptor.leaf_sequence + 1;
        let state = hot.loaded().map_or(SlotState::Data, SlotState::of);
        let descriptor = Slot { leaf: Some(leaf), lost: 0, leaf_sequence, state, ..hot.descriptor.clone() };
        if blocks < spare.blocks {
            self.space.drop_leaf(LeafPlace {
                block: spare.block + blocks,
                blocks: spare.blocks - blocks,
                unit: spare.unit,
            });
        }
        self.commit_cooling(key, Some(descriptor));
    }

    /// Takes the mark back; with `descriptor`, names what the extent is now.
    fn commit_cooling(&mut self, key: Key, descriptor: Option<Slot>) {
        let marks_from = self.count();
        let hot = self.hot.get_mut(&key).expect("what cools is hot");
        let cooling = hot.cooling.as_mut().expect("it is cooling");
        cooling.step = CoolingStep::Commit;
        let number = cooling.number;
        hot.marked = None;
        hot.marks_from = marks_from;
        if let Some(descriptor) = descriptor {
            hot.dirty = false;
            hot.fresh.clear();
            let slot = hot.slot.expect("only a slot has a descriptor");
            if descriptor.state == SlotState::Empty {
                hot.checksums = Checksums::Absent;
                hot.slot_told = false;
            }
            let generation = hot.generation.max(descriptor.generation);
            hot.descriptor = Slot { generation, ..descriptor };
            let descriptor = hot.descriptor.clone();
            self.log_slot(slot, descriptor);
        }
        let record = Record::Cold { layer: key.0, extent: key.1 };
        self.journal.queue_then(record, LogThen::Cooled(key, number));
    }

    pub fn on_cold(&mut self, key: Key, number: u64) {
        if self.cooling(key, number, CoolingStep::Commit).is_none() {
            return;
        }
        let hot = self.hot.remove(&key).expect("it was just there");
        hot.cooling.into_iter().flat_map(|cooling| cooling.requests).for_each(|id| self.finish_one(id));
        hot.spare_leaf.into_iter().for_each(|place| self.space.drop_leaf(place));
        self.freezing.remove(&key);
        // A slot that was given for zeros that needed none.
        if let Some(slot) = hot.slot.filter(|slot| !hot.slot_told && self.table.get(*slot).state == SlotState::Free) {
            self.layers.get_mut(&key.0).expect("the layer is known").extents.remove(&key.1);
            self.table.give_back(slot);
            return;
        }
        if let (Some(slot), true, Checksums::Loaded(sums)) =
            (hot.slot, hot.descriptor.state.holds_data(), hot.checksums)
        {
            self.leaves.insert(slot, Arc::from(sums));
        }
    }

    /// Someone writes: an extent whose mark is still there stays hot.
    pub fn cancel_cooling(&mut self, key: Key) {
        let Some(hot) = self.hot.get_mut(&key).filter(|hot| !hot.is_committing()) else { return };
        let cooling = hot.cooling.take();
        cooling.into_iter().flat_map(|cooling| cooling.requests).for_each(|id| self.finish_one(id));
    }

    pub fn begin_reap(&mut self, id: StoreRequestId, group: GroupId) -> Result<(), StoreError> {
        let mut slots = Vec::new();
        for layer in self.layers_of(group) {
            let merged = self.merging.as_ref().and_then(|merging| merging.holds());
            let Some(map) = self.layers.get_mut(&layer) else { continue };
            let (table, hot) = (&self.table, &self.hot);
            map.extents.retain(|extent, slot| {
                let kept = table.get(*slot).state != SlotState::Empty
                    || hot.contains_key(&(layer, *extent))
                    || merged == Some(*extent);
                if !kept {
                    slots.push(*slot);
                }
                kept
            });
        }
        let Some((last, others)) = slots.split_last() else {
            self.end(id, Ok(StoreReply::Done));
            return Ok(());
        };
        others.iter().for_each(|slot| self.log_slot(*slot, self.table.get(*slot).freed()));
        let descriptor = Box::new(self.table.get(*last).freed());
        let request = self.requests.insert(Request::change(id, 1));
        self.journal.queue_then(Record::Slot { slot: *last, descriptor }, LogThen::Request(request));
        Ok(())
    }

    /// The layers of a group's volumes.
    fn layers_of(&self, group: GroupId) -> BTreeSet<LayerId> {
        let volumes = self.catalog.volumes.iter().filter(|(_, known)| known.group == group);
        volumes.filter(|(volume, _)| !self.deleting.contains(volume)).map(|(_, known)| known.layer).collect()
    }
}
