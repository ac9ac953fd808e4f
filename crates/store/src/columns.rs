//! What a pool of several disks asks of each: an extent with all its layers, a column, lives on one of them. It can be given
//! up here, because it lives elsewhere now, or be lost, because its disk is.

use crate::hot::Checksums;
use crate::lanes::{FamilyId, Key};
use crate::leaf::LOST_CHECKSUM;
use crate::pool::{LogThen, Pool};
use crate::record::{FORGET_SLOTS_MAX, LOSE_SLOTS_MAX, Mask, Record, set_bit};
use crate::slots::{LayerId, SlotState};
use crate::transfer::{PartId, Request, Work, marked};
use crate::{StoreError, StoreRequestId};
use pollux_base::unit::{BLOCK_BYTES, BlockRange, EXTENT_BLOCKS};
use pollux_base::{BlockCount, ByteCount, ExtentIndex, Generation, VolumeId};
use std::collections::BTreeSet;

/// What of the extent lies within a volume of this size.
pub fn within(extent: ExtentIndex, size: ByteCount) -> BlockRange {
    let start = extent.first_block();
    BlockRange::new(start, BlockCount(EXTENT_BLOCKS.min((size.0 / BLOCK_BYTES).saturating_sub(start.0))))
}

impl Pool {
    /// Columns of which there is anything here.
    pub fn columns(&self) -> BTreeSet<(FamilyId, ExtentIndex)> {
        let family = |layer: &LayerId| self.catalog.layers.get(layer).map(|layer| layer.family);
        let mapped = self.layers.iter().flat_map(|(layer, map)| map.extents.keys().map(|extent| (*layer, *extent)));
        let hot = self.hot.keys().copied();
        mapped.chain(hot).filter_map(|(layer, extent)| Some((family(&layer)?, extent))).collect()
    }

    /// Whether blocks of any of these layers are lost within these extents, each first and count.
    pub fn is_damaged(&self, layers: impl IntoIterator<Item = LayerId>, extents: &[(u32, u32)]) -> bool {
        layers.into_iter().filter_map(|layer| self.layers.get(&layer)).any(|map| {
            let within = |(first, count): &(u32, u32)| ExtentIndex(*first)..ExtentIndex(first.saturating_add(*count));
            !map.damaged.is_empty() && extents.iter().any(|range| map.damaged.range(within(range)).next().is_some())
        })
    }

    pub fn layers_of_family(&self, family: FamilyId) -> Vec<LayerId> {
        let layers = self.catalog.layers.iter().filter(|(_, layer)| layer.family == family);
        layers.map(|(layer, _)| *layer).collect()
    }

    /// Under which generation the volume's extent was last changed; `None`: nothing is known of it here.
    pub fn generation_of(&self, layer: LayerId, extent: ExtentIndex) -> Option<Generation> {
        let mut newest = None;
        let mut foreign = None;
        for layer in self.catalog.chain(layer) {
            let key = (layer, extent);
            let known = self.catalog.layers.get(&layer)?;
            let hot = self.hot.get(&key).map(|hot| hot.generation);
            let slot = Some(key).filter(|key| self.says_something(*key)).and_then(|key| self.view(key));
            let replaced = known.replaced.as_ref().filter(|replaced| replaced.iter().any(|x| x == extent.0));
            let own = [hot, slot.map(|(_, slot)| slot.generation), replaced.map(|replaced| replaced.generation)];
            newest = own.into_iter().flatten().map(|own| foreign.unwrap_or(own)).max().max(newest);
            foreign = foreign.or(known.foreign);
        }
        newest
    }

    pub fn begin_lose(&mut self, id: StoreRequestId, volume: VolumeId, extent: ExtentIndex) -> Result<(), StoreError> {
        let known = self.known_volume(volume)?;
        let layer = known.layer;
        if self.table.vacant() == 0 {
            return Err(StoreError::Full);
        }
        // Nobody could ever give back what lies behind the volume's end.
        let lost = within(extent, known.size);
        if lost.count.0 == 0 {
            return Err(StoreError::OutOfRange);
        }
        let request = self.requests.insert(Request::change(id, 1));
        let key = (layer, extent);
        marked(self.hot.get(&key), key.0, key.1);
        self.writer_arrives(key);
        self.give_slot(key);
        self.add_part(request, layer, lost, lost, Work::Lose);
        Ok(())
    }

    pub fn begin_lose_column(
        &mut self,
        id: StoreRequestId,
        volume: VolumeId,
        extent: ExtentIndex,
        generation: Generation,
    ) -> Result<(), StoreError> {
        let layer = self.known_volume(volume)?.layer;
        let family = self.layers_of_family(self.catalog.layers[&layer].family);
        let blocks_of = |of: &[LayerId]| {
            let shown = self.catalog.volumes.values().filter(|known| of.contains(&known.layer));
            shown.map(|known| within(extent, known.size).count.0 as u16).max()
        };
        // What lies behind its volume's end a layer never had, and nobody could give back. Of one that no volume names it is not
        // known any more where that was.
        let all = blocks_of(&family).unwrap_or(0);
        let lost = |layer: LayerId| (layer, blocks_of(&[layer]).unwrap_or(all));
        // Each layer may have had something there. One that is just becoming a part of another takes no more.
        let layers = family.iter().copied().filter(|layer| self.merging_into(*layer).is_none());
        let layers: Vec<(LayerId, u16)> = layers.map(lost).filter(|(_, blocks)| *blocks > 0).collect();
        if layers.len() > self.table.vacant() || layers.len() > LOSE_SLOTS_MAX {
            return Err(StoreError::Full);
        }
        let mut slots = Vec::new();
        for (layer, blocks) in layers {
            let slot = self.table.take().expect("there are as many");
            let before = self.layers.get_mut(&layer).expect("the layer is known").extents.insert(extent, slot);
            assert!(before.is_none(), "{extent:?} of {layer:?} lives here");
            self.losing.insert((layer, extent));
            slots.push((slot, layer, blocks));
        }
        let request = self.requests.insert(Request::change(id, 1));
        self.journal.queue_then(Record::Lose { extent, generation, slots }, LogThen::Request(request));
        Ok(())
    }

    pub fn advance_lose(&mut self, id: PartId, key: Key, range: std::ops::Range<usize>) {
        let hot = self.hot.get_mut(&key).expect("what is written to stays hot");
        let Checksums::Loaded(sums) = &mut hot.checksums else { return self.finish_part(id) };
        sums[range.clone()].fill(LOST_CHECKSUM);
        hot.fresh.clear();
        hot.dirty = true;
        let slot = hot.slot.expect("it was given one");
        self.tell_slot(key);
        let mut mask = Mask::new(slot);
        range.for_each(|block| set_bit(&mut mask.valid, block));
        self.journal.queue_then(Record::Mask(Box::new(mask)), LogThen::Part(id));
    }

    pub fn begin_forget(
        &mut self,
        id: StoreRequestId,
        volume: VolumeId,
        extent: ExtentIndex,
    ) -> Result<(), StoreError> {
        let layer = self.known_volume(volume)?.layer;
        let request = self.requests.insert(Request::change(id, 1));
        self.add_part(request, layer, whole(extent), whole(extent), Work::Forget);
        Ok(())
    }

    /// The part has the column for itself.
    pub fn advance_forget(&mut self, id: PartId) {
        let Some(part) = self.parts.get(id) else { return };
        let (lane, extent) = (part.lane, part.key.1);
        let keys: Vec<Key> = self.layers_of_family(lane.0).into_iter().map(|layer| (layer, extent)).collect();
        keys.iter().for_each(|key| self.cancel_cooling(*key));
        let in_the_way = |key: &Key| {
            self.is_merging(*key)
                || self.loads.contains_key(key)
                || self
                    .hot
                    .get(key)
                    .is_some_and(|hot| hot.cooling.is_some() || hot.leaf_under_way || hot.marking.is_some())
        };
        if keys.iter().any(in_the_way) {
            return self.stalled.push(id);
        }
        let mut slots = Vec::new();
        for key in &keys {
            let Some(slot) = self.layers.get(&key.0).and_then(|map| map.extents.get(&key.1)).copied() else { continue };
            let hot = self.hot.get(key);
            if self.table.get(slot).state != SlotState::Free || hot.is_some_and(|hot| hot.slot_told) {
                slots.push((slot, hot.map_or(self.table.get(slot).leaf_sequence, |hot| hot.descriptor.leaf_sequence)));
            }
        }
        if slots.len() > FORGET_SLOTS_MAX {
            let part = self.parts.get(id).expect("it was just there");
            if let Some(request) = self.requests.get_mut(part.request) {
                request.error = Some(StoreError::Disk(format!("{extent:?} has {} layers at once", slots.len())));
            }
            return self.finish_part(id);
        }
        for key in keys {
            if let Some(hot) = self.hot.remove(&key) {
                hot.spare_leaf.into_iter().for_each(|place| self.space.drop_leaf(place));
                self.freezing.remove(&key);
                self.journal.queue(Record::Cold { layer: key.0, extent: key.1 });
            }
            let Some(slot) = self.layers.get_mut(&key.0).and_then(|map| map.extents.remove(&key.1)) else { continue };
            self.leaves.remove(slot);
            if !slots.iter().any(|(told, _)| *told == slot) {
                self.table.give_back(slot);
            }
        }
        self.journal.queue_then(Record::Forget { slots }, LogThen::Part(id));
    }
}

fn whole(extent: ExtentIndex) -> BlockRange {
    BlockRange::new(extent.first_block(), BlockCount(EXTENT_BLOCKS))
}
