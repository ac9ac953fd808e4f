//! Making two layers one: when nothing names a layer any more and only one other lies on it, its extents go to that one.
//!
//! Extent by extent, in the background, each with its blocks to itself. What only the lower layer has moves by its descriptor
//! alone; of what both have the units that the upper one lacks move, and only blocks in units that both have are copied. A
//! record of the journal then changes both slots at once, and is flushed before anybody goes on. So a crash finds an extent
//! wholly in two slots or wholly in one, and reads see the same before and after.

use crate::StoreOp;
use crate::control::Change;
use crate::hot::{Checksums, HotExtent};
use crate::lanes::Key;
use crate::layers::{all_of, nobody};
use crate::layout::{BLOCK, LEAF_BLOCKS_MAX, LeafPlace, UNIT_BLOCKS};
use crate::leaf::{self, HOLE_CHECKSUM, LOST_CHECKSUM, LeafOwner, SUMS, Sums, is_data};
use crate::pool::{DiskThen, FlushThen, LogThen, Pool, block_of};
use crate::record::Record;
use crate::slots::{LayerId, Slot, SlotState};
use crate::transfer::{PartId, Work};
use pollux_base::unit::{BlockRange, EXTENT_BLOCKS};
use pollux_base::{BlockChecksum, BlockCount, Data, DiskOpKind, ExtentIndex};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Two layers that are being made one.
pub struct Merging {
    parent: LayerId,
    child: LayerId,
    /// Marks that the child was asked to take over.
    marks_asked: BTreeSet<ExtentIndex>,
    /// The extent that is being merged.
    part: Option<PartId>,
    /// It has its blocks: neither of its slots is heated or cooled until it is done.
    holds: Option<ExtentIndex>,
    ends: bool,
}

impl Merging {
    /// The extent that is being changed just now.
    pub fn holds(&self) -> Option<ExtentIndex> {
        self.holds
    }
}

/// What an extent becomes.
pub struct Merged {
    slot: u32,
    descriptor: Slot,
    sums: Box<Sums>,
    /// What the lower layer holds could not be read.
    is_unreadable: bool,
}

impl Pool {
    /// Goes on making layers one, if there is anything to.
    pub fn step_merge(&mut self) {
        // Marks that it moved during a turn would be on the old layer only.
        if self.turning.is_some() || !self.losing.is_empty() {
            return;
        }
        if self.merging.is_none() && std::mem::take(&mut self.may_merge) {
            let pair = self.catalog.mergeable(&self.unmerged);
            if pair.is_none() {
                self.unmerged.clear(); // tried again when layers have changed
            }
            self.merging = pair.map(|(parent, child)| Merging {
                parent,
                child,
                marks_asked: BTreeSet::new(),
                part: None,
                holds: None,
                ends: false,
            });
        }
        let Some(merging) = &self.merging else { return };
        let (parent, child) = (merging.parent, merging.child);
        if merging.part.is_some() || merging.ends || self.take_over_marks(parent, child) {
            return;
        }
        let next = self.layers.get(&parent).and_then(|map| map.extents.keys().next().copied());
        let merging = self.merging.as_mut().expect("it was just there");
        match next {
            None => {
                merging.ends = true;
                self.catalog_queue.push_back((nobody(), Change::Merge { parent, child }));
            }
            Some(extent) => {
                let whole = BlockRange::new(extent.first_block(), BlockCount(EXTENT_BLOCKS));
                let part = self.add_part(nobody(), child, whole, whole, Work::Merge(None));
                self.merging.as_mut().expect("it was just there").part = Some(part);
            }
        }
    }

    /// Marks of the parent become marks of the child. `true`: not yet.
    fn take_over_marks(&mut self, parent: LayerId, child: LayerId) -> bool {
        let foreign = self.catalog.layers.get(&child).and_then(|layer| layer.foreign);
        let generation = |hot: &HotExtent| foreign.unwrap_or(hot.generation);
        let marks: Vec<_> = self.hot.range(all_of(parent)).map(|((_, x), hot)| (*x, generation(hot))).collect();
        for (extent, generation) in &marks {
            let key = (child, *extent);
            let has_it = self.hot.get(&key).and_then(|hot| hot.marked).is_some_and(|marked| marked >= *generation);
            let merging = self.merging.as_mut().expect("the caller has it");
            if has_it {
                self.freezing.insert((parent, *extent));
            } else if merging.marks_asked.insert(*extent) {
                if self.hot.contains_key(&key) {
                    self.mark(key, *generation, nobody());
                } else {
                    self.heat_waiting.push_back((nobody(), key, *generation));
                }
            }
        }
        !marks.is_empty()
    }

    /// The layer that is taking over all of this one.
    pub fn merging_into(&self, parent: LayerId) -> Option<LayerId> {
        self.merging.as_ref().filter(|merging| merging.parent == parent).map(|merging| merging.child)
    }

    /// Whether the extent's slot is just being made one with another.
    pub fn is_merging(&self, key: Key) -> bool {
        self.merging
            .as_ref()
            .is_some_and(|merging| merging.holds == Some(key.1) && (merging.parent == key.0 || merging.child == key.0))
    }

    /// The catalog has changed: layers may be gone, others may have become mergeable.
    pub fn on_layers_changed(&mut self) {
        self.may_merge = true;
        let layers = &self.catalog.layers;
        let is_there = |merging: &Merging| {
            layers.contains_key(&merging.child)
                && layers.contains_key(&merging.parent)
                && layers[&merging.child].parent == Some(merging.parent)
        };
        if !self.merging.as_ref().is_some_and(is_there) {
            self.merging = None;
            self.release_merge_held();
        }
    }

    fn merging_of(&mut self, id: PartId) -> Option<&mut Merging> {
        self.merging.as_mut().filter(|merging| merging.part == Some(id))
    }

    /// The part has the extent for itself.
    pub fn advance_merge(&mut self, id: PartId) {
        let Some(part) = self.parts.get(id) else { return };
        let (child, extent) = part.key;
        let Some(merging) = self.merging_of(id) else { return self.finish_part(id) };
        merging.holds = Some(extent);
        let (above, below) = ((child, extent), (merging.parent, extent));
        self.cancel_cooling(above);
        let in_the_way = |hot: &HotExtent| hot.cooling.is_some() || hot.leaf_under_way;
        if self.hot.get(&above).is_some_and(in_the_way) || self.hot.contains_key(&below) {
            self.stalled.push(id);
            return;
        }
        let Some((lower, from)) = self.view(below).map(|(number, slot)| (number, slot.clone())) else {
            return self.end_merge(id);
        };
        // It came to this layer's volume when that was made, whatever its own generation is.
        let foreign = self.catalog.layers.get(&child).and_then(|layer| layer.foreign);
        let from = Slot { generation: foreign.unwrap_or(from.generation), ..from };
        if let Some(wanted) = [above, below].into_iter().find(|key| !self.is_known(*key)) {
            return self.load(wanted, Some(id));
        }
        match self.view(above).map(|(number, slot)| (number, slot.clone())) {
            None => {
                let descriptor = Box::new(Slot { layer: child, ..from });
                self.journal.queue_then(Record::Slot { slot: lower, descriptor }, LogThen::Merged(id));
            }
            Some((upper, into)) => self.merge_slots(id, above, below, (upper, into), from),
        }
    }

    /// Puts together what the extent is to be, and copies what must be copied.
    fn merge_slots(&mut self, id: PartId, above: Key, below: Key, into: (u32, Slot), from: Slot) {
        let geometry = self.superblock.geometry;
        let mut sums = self.own_sums(above);
        let lower = self.own_sums(below);
        // What hides nothing any more need not be told from what holds nothing.
        let ground: Vec<LayerId> = self.catalog.chain(below.0).skip(1).collect();
        let hides = self.shows_through(&ground, above.1);
        let (upper, into) = into;
        let mut units = into.units.clone();
        let mut copies: Vec<(usize, usize)> = Vec::new();
        for block in 0..SUMS {
            let (sum, under) = (sums[block], lower[block]);
            if sum.is_zero() {
                sums[block] = under;
                let unit = block / UNIT_BLOCKS;
                if is_data(under) && under != LOST_CHECKSUM {
                    match (into.units.get(unit), from.units.get(unit)) {
                        (None, Some(place)) => units.set(unit, place),
                        (Some(_), Some(_)) => match copies.last_mut() {
                            Some((first, count)) if *first + *count == block && *first / UNIT_BLOCKS == unit => {
                                *count += 1
                            }
                            _ => copies.push((block, 1)),
                        },
                        (_, None) => sums[block] = LOST_CHECKSUM,
                    }
                }
            }
            if sums[block] == HOLE_CHECKSUM && !hides {
                sums[block] = BlockChecksum::ZERO;
            }
        }
        // Units of which nothing shows any more are not kept.
        for unit in 0..crate::layout::UNITS {
            let blocks = unit * UNIT_BLOCKS..(unit + 1) * UNIT_BLOCKS;
            let is_pinned = self.hot.get(&above).is_some_and(|hot| hot.is_pinned(unit));
            if !is_pinned && !sums[blocks].iter().any(|sum| is_data(*sum)) {
                units.clear(unit);
            }
        }
        units.compact();
        let hot_generation = self.hot.get(&above).map(|hot| hot.generation).unwrap_or_default();
        let descriptor = Slot {
            state: SlotState::of(&sums),
            layer: above.0,
            extent: above.1.0,
            generation: into.generation.max(from.generation).max(hot_generation),
            leaf: None,
            lost: 0,
            leaf_sequence: into.leaf_sequence + 1,
            units,
        };
        let part = self.parts.get_mut(id).expect("the part is under way");
        part.ops_left = copies.len() as u32;
        part.work = Work::Merge(Some(Box::new(Merged { slot: upper, descriptor, sums, is_unreadable: false })));
        if copies.is_empty() {
            return self.write_merged_leaf(id);
        }
        for (first, count) in copies {
            let unit = from.units.get(first / UNIT_BLOCKS).expect("it was just looked at");
            let read = DiskOpKind::Read { offset: geometry.offset(unit, first % UNIT_BLOCKS), len: count * BLOCK };
            self.io.submit(read, DiskThen::MergeRead(id, first as u16, count as u16));
        }
    }

    /// The checksums of one layer's own blocks; they are in memory.
    fn own_sums(&mut self, key: Key) -> Box<Sums> {
        let none = Box::new([BlockChecksum::ZERO; SUMS]);
        if let Some(hot) = self.hot.get(&key) {
            return hot.loaded().map_or(none, |sums| Box::new(*sums));
        }
        let slot = self.view(key).filter(|(_, slot)| slot.state.holds_data()).map(|(number, _)| number);
        slot.map_or(none, |slot| Box::new(*self.leaves.get(slot).expect("the leaf was loaded")))
    }

    /// Blocks of the lower layer that the upper one has room for in its own unit.
    pub fn on_merge_read(&mut self, id: PartId, first: u16, count: u16, data: Option<Data>) {
        let geometry = self.superblock.geometry;
        let Some(part) = self.parts.get_mut(id) else { return };
        let Work::Merge(Some(merged)) = &mut part.work else { unreachable!("only a merging part copies") };
        let Some(data) = data else {
            merged.is_unreadable = true;
            return self.on_merge_copied(id);
        };
        for at in 0..usize::from(count) {
            let sum = &mut merged.sums[usize::from(first) + at];
            if BlockChecksum::of(block_of(&data, at)) != *sum {
                // It was rotten before, and still is; a peer has a good one.
                *sum = LOST_CHECKSUM;
            }
        }
        let unit =
            merged.descriptor.units.get(usize::from(first) / UNIT_BLOCKS).expect("only what has a unit is copied");
        let offset = geometry.offset(unit, usize::from(first) % UNIT_BLOCKS);
        let write = DiskOpKind::Write { offset, data: vec![data], sync: false };
        self.io.submit(write, DiskThen::MergeCopied(id));
    }

    pub fn on_merge_copied(&mut self, id: PartId) {
        let is_wanted = self.merging_of(id).is_some();
        let Some(part) = self.parts.get_mut(id) else { return };
        part.ops_left -= 1;
        if part.ops_left > 0 || self.failed.is_some() {
            return;
        }
        match &part.work {
            // The layer was given up meanwhile, and its extent may be cooling: it needs its leaf for that.
            _ if !is_wanted => self.end_merge(id),
            Work::Merge(Some(merged)) if merged.is_unreadable => self.give_up_merge(id),
            _ => self.write_merged_leaf(id),
        }
    }

    /// A disk that does not give its data now may give it later: both layers stay as they are, and are read as they were.
    fn give_up_merge(&mut self, id: PartId) {
        self.unmerged.extend(self.merging.as_ref().map(|merging| merging.parent));
        self.end_merge(id);
        self.merging = None;
        self.may_merge = true;
    }

    fn write_merged_leaf(&mut self, id: PartId) {
        let pool = self.pool_id();
        let part = self.parts.get_mut(id).expect("the part is under way");
        let Work::Merge(Some(merged)) = &mut part.work else { unreachable!("only a merging part has a leaf") };
        let owner = LeafOwner { slot: merged.slot, sequence: merged.descriptor.leaf_sequence };
        let data = leaf::encode(&merged.sums, owner, pool);
        if data.is_empty() {
            return self.flush(FlushThen::MergeLeaf(id));
        }
        let spare = self.hot.get_mut(&part.key).and_then(|hot| hot.spare_leaf.take());
        let Some(spare) = spare.or_else(|| self.space.take_leaf(LEAF_BLOCKS_MAX as u8)) else {
            // The pool is full. It is tried again from the beginning, when something has happened.
            part.work = Work::Merge(None);
            self.stalled.push(id);
            return;
        };
        let leaf = LeafPlace { blocks: (data.len() / BLOCK) as u8, ..spare };
        if leaf.blocks < spare.blocks {
            let (block, blocks) = (spare.block + leaf.blocks, spare.blocks - leaf.blocks);
            self.space.drop_leaf(LeafPlace { unit: spare.unit, block, blocks });
        }
        merged.descriptor.leaf = Some(leaf);
        let write =
            DiskOpKind::Write { offset: self.superblock.geometry.leaf_offset(leaf), data: vec![data], sync: false };
        self.io.submit(write, DiskThen::MergeLeaf(id));
    }

    pub fn on_merge_leaf_written(&mut self, id: PartId) {
        self.flush(FlushThen::MergeLeaf(id));
    }

    /// Copies and leaf are durable: the journal may name them.
    pub fn on_merge_flushed(&mut self, id: PartId) {
        let Some(part) = self.parts.get(id) else { return };
        let (key, parent) = (part.key, part.below.first().copied());
        let Work::Merge(Some(merged)) = &part.work else { unreachable!("only a merging part was flushed") };
        let below = parent.and_then(|parent| self.view((parent, key.1)));
        let (from, lower) = below.expect("the lower slot stays until the record says otherwise");
        let descriptor = Box::new(merged.descriptor.clone());
        let record = Record::Merge { into: merged.slot, descriptor, from, leaf_sequence: lower.leaf_sequence };
        self.journal.queue_then(record, LogThen::Merged(id));
    }

    /// The journal has it: the extent has one slot from now on.
    pub fn on_merged(&mut self, id: PartId) {
        let Some(part) = self.parts.get_mut(id) else { return };
        let (above, parent) = (part.key, part.below.first().copied().expect("what is merged lies on something"));
        let lower = self.layers.get_mut(&parent).and_then(|map| map.extents.remove(&above.1));
        let lower = lower.expect("the lower slot was there until now");
        let Work::Merge(merged) = &mut part.work else { unreachable!("only a merging part waits for this") };
        let (slot, sums) = match merged.take() {
            Some(merged) => {
                self.leaves.remove(lower);
                (merged.slot, Some(merged.sums))
            }
            // It moved as it was.
            None => (lower, None),
        };
        self.layers.get_mut(&above.0).expect("the layer is known").extents.insert(above.1, slot);
        let descriptor = self.table.get(slot).clone();
        let holds_data = descriptor.state.holds_data();
        match self.hot.get_mut(&above) {
            Some(hot) => {
                let sums = sums.or_else(|| self.leaves.get(slot).map(|leaf| Box::new(*leaf)));
                self.leaves.remove(slot);
                hot.slot = Some(slot);
                hot.checksums = match sums {
                    _ if !holds_data => Checksums::Absent,
                    Some(sums) => Checksums::Loaded(sums),
                    None => Checksums::Unloaded,
                };
                (hot.slot_told, hot.dirty, hot.recovered) = (holds_data, false, None);
                hot.descriptor = descriptor;
                hot.fresh.clear();
                hot.all_units_told();
            }
            None => match sums.filter(|_| holds_data) {
                Some(sums) => self.leaves.insert(slot, Arc::from(sums)),
                None if !holds_data => self.leaves.remove(slot),
                None => {}
            },
        }
        self.flush(FlushThen::Merged(id));
    }

    /// Whether the request changes the extent that is just being made one: it would take units for it.
    pub fn meets_merge(&self, op: &StoreOp) -> bool {
        let (StoreOp::Write { volume, range, .. } | StoreOp::Zero { volume, range }) = op else { return false };
        let Some((merging, extent)) = self.merging.as_ref().and_then(|merging| Some((merging, merging.holds?))) else {
            return false;
        };
        let layer = self.layer_of(*volume);
        let of_these = layer == Some(merging.child) || layer == Some(merging.parent);
        let end = range.start.0.saturating_add(range.count.0);
        of_these && range.start.0 < extent.first_block().0 + EXTENT_BLOCKS && extent.first_block().0 < end
    }

    pub fn release_merge_held(&mut self) {
        std::mem::take(&mut self.merge_held).into_iter().for_each(|(id, op)| self.on_request(id, op));
    }

    pub fn end_merge(&mut self, id: PartId) {
        if let Some(merging) = self.merging_of(id) {
            (merging.part, merging.holds) = (None, None);
        }
        self.release_merge_held();
        if self.parts.get(id).is_some() {
            self.finish_part(id);
        }
    }
}
