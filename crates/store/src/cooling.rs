//! Marks: when an extent becomes hot (W7), and how it cools.
//!
//! An extent cools by writing its checksums to the leaf place that is not in use, a flush, and then one batch of the
//! journal that names the new leaf and takes the mark back. Until that is durable the extent counts as hot after a
//! crash, and the old leaf is whole.

use crate::hot::{Checksums, Cooling, CoolingStep, HotExtent};
use crate::lanes::Key;
use crate::leaf::{self, LeafOwner};
use crate::pool::{DiskThen, FlushThen, LogThen, Pool};
use crate::record::Record;
use crate::slots::{Slot, SlotState};
use crate::transfer::{Request, Work};
use crate::{HOT_EXTENTS_MAX, StoreError, StoreReply, StoreRequestId};
use pollux_base::unit::{BlockRange, EXTENT_BLOCKS, EXTENT_BYTES};
use pollux_base::{BlockCount, DiskOpKind, ExtentIndex, Generation, GroupId, VolumeId};
use std::sync::Arc;

impl Pool {
    pub fn begin_heat(
        &mut self,
        id: StoreRequestId,
        volume: VolumeId,
        extents: &[ExtentIndex],
        generation: Generation,
    ) -> Result<(), StoreError> {
        let size = self.known_volume(volume)?.size;
        if extents.iter().any(|extent| u64::from(extent.0) * EXTENT_BYTES >= size.0) {
            return Err(StoreError::OutOfRange);
        }
        let wanted: Vec<Key> = extents
            .iter()
            .map(|extent| (volume, *extent))
            .filter(|key| self.hot.get(key).and_then(|hot| hot.marked).is_none_or(|marked| marked < generation))
            .collect();
        // Who heats means to write: what was cooling stays hot.
        extents.iter().for_each(|extent| self.cancel_cooling((volume, *extent)));
        if wanted.is_empty() {
            self.end(id, Ok(StoreReply::Done));
            return Ok(());
        }
        self.requests.insert(id, Request::change(wanted.len()));
        for key in wanted {
            if self.hot.contains_key(&key) {
                self.mark(key, generation, id);
            } else {
                self.heat_waiting.push_back((id, key, generation));
            }
        }
        Ok(())
    }

    /// Marks the extents that wait for it, as far as the hot set has room.
    pub fn heat_waiting_extents(&mut self) {
        while let Some((request, key, generation)) = self.heat_waiting.front().copied() {
            if !self.hot.contains_key(&key) {
                if self.hot.len() >= HOT_EXTENTS_MAX {
                    return;
                }
                let slot = self.volumes.get(&key.0).and_then(|map| map.extents.get(&key.1)).copied();
                let holds_data = slot.is_some_and(|slot| self.table.get(slot).state == SlotState::Data);
                let mut hot = HotExtent::new(generation, slot, holds_data);
                if let Some(sums) = slot.filter(|_| holds_data).and_then(|slot| self.leaves.get(slot)) {
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

    fn mark(&mut self, key: Key, generation: Generation, request: StoreRequestId) {
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
        let record = Record::Hot { volume: key.0, extent: key.1, generation: hot.generation };
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
        let of_group = |volume: &VolumeId| self.catalog.volumes.get(volume).is_some_and(|known| known.group == group);
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
        self.requests.insert(id, Request::change(keys.len()));
        keys.into_iter().for_each(|key| self.mark(key, generation, id));
        Ok(())
    }

    pub fn begin_cool(
        &mut self,
        id: StoreRequestId,
        volume: VolumeId,
        extents: &[ExtentIndex],
    ) -> Result<(), StoreError> {
        self.known_volume(volume)?;
        // One more than there are, so that it cannot end before all were begun.
        self.requests.insert(id, Request::change(extents.len() + 1));
        for extent in extents {
            self.cool((volume, *extent), id);
        }
        self.finish_one(id);
        Ok(())
    }

    fn cool(&mut self, key: Key, request: StoreRequestId) {
        let number = self.count();
        let Some(hot) = self.hot.get_mut(&key) else { return self.finish_one(request) };
        if let Some(cooling) = &mut hot.cooling {
            cooling.requests.push(request);
            return;
        }
        // Someone means to write, or the leaf place is still being written to for a cooling that was given up.
        if hot.writers > 0 || hot.marking.is_some() || hot.leaf_under_way {
            return self.finish_one(request);
        }
        hot.cooling = Some(Cooling { number, step: CoolingStep::Load, requests: vec![request] });
        self.continue_cooling(key);
    }

    /// After the checksums are there.
    fn continue_cooling(&mut self, key: Key) {
        let hot = self.hot.get_mut(&key).expect("what cools is hot");
        let Some(slot) = hot.slot.filter(|_| hot.dirty) else { return self.commit_cooling(key, None) };
        let old = *self.table.get(slot);
        let empty = Slot { state: SlotState::Empty, leaf_place: None, ..old };
        let sums = match &hot.checksums {
            Checksums::Unloaded => return self.load(key, None),
            Checksums::Absent => return self.commit_cooling(key, Some(empty)),
            Checksums::Loaded(sums) if sums.iter().all(|sum| sum.is_zero()) => {
                return self.commit_cooling(key, Some(empty));
            }
            Checksums::Loaded(sums) => sums,
        };
        let owner = LeafOwner { volume: key.0.0, extent: key.1.0, slot, sequence: old.leaf_sequence + 1 };
        let data = leaf::encode(sums, owner, self.superblock.identity.pool);
        let cooling = hot.cooling.as_mut().expect("it is cooling");
        cooling.step = CoolingStep::Leaf;
        hot.leaf_under_way = true;
        let number = cooling.number;
        let offset = self.superblock.geometry.leaf_offset(slot, next_place(&old));
        self.volumes.get_mut(&key.0).expect("the volume is known").busy += 1;
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
        if self.cooling(key, number, CoolingStep::Flush).is_none() {
            return;
        }
        let slot = self.hot[&key].slot.expect("what has a leaf has a slot");
        let old = *self.table.get(slot);
        let place = Some(next_place(&old));
        self.commit_cooling(key, Some(Slot { leaf_place: place, leaf_sequence: old.leaf_sequence + 1, ..old }));
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
            self.log_slot(slot, Slot { generation, ..descriptor });
        }
        let record = Record::Cold { volume: key.0, extent: key.1 };
        self.journal.queue_then(record, LogThen::Cooled(key, number));
    }

    pub fn on_cold(&mut self, key: Key, number: u64) {
        if self.cooling(key, number, CoolingStep::Commit).is_none() {
            return;
        }
        let hot = self.hot.remove(&key).expect("it was just there");
        hot.cooling.into_iter().flat_map(|cooling| cooling.requests).for_each(|id| self.finish_one(id));
        let Some(slot) = hot.slot else { return };
        match (self.table.get(slot).state, hot.checksums) {
            (SlotState::Data, Checksums::Loaded(sums)) => self.leaves.insert(slot, Arc::from(sums)),
            (SlotState::Empty, _) if !hot.dirty => {
                let whole = BlockRange::new(key.1.first_block(), BlockCount(EXTENT_BLOCKS));
                self.add_part(None, key.0, whole, whole, Work::Discard { slot });
            }
            _ => {}
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
        for (volume, _) in self.catalog.volumes.iter().filter(|(_, known)| known.group == group) {
            let Some(map) = self.volumes.get_mut(volume).filter(|map| !map.deleting) else { continue };
            let (table, hot) = (&self.table, &self.hot);
            map.extents.retain(|extent, slot| {
                let kept = table.get(*slot).state != SlotState::Empty || hot.contains_key(&(*volume, *extent));
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
        let descriptor = self.table.get(*last).freed();
        self.table.queued(*last, descriptor);
        self.requests.insert(id, Request::change(1));
        self.journal.queue_then(Record::Slot { slot: *last, descriptor }, LogThen::Request(id));
        Ok(())
    }
}

/// Where the next leaf goes: not where the one in use is.
fn next_place(slot: &Slot) -> u8 {
    slot.leaf_place.map_or(0, |place| 1 - place)
}
