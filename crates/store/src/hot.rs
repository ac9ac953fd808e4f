//! What is kept of a hot extent: its mark, the checksums of its blocks, and which of them the journal has to vouch for.
//!
//! Life of a hot extent:
//! `Heat` queued -> marked (writes may go) -> cooling: leaf written -> flushed -> cold record queued -> gone.
//! A write during the first two steps of cooling, or a `Heat` during the last, makes it hot again.

use crate::layout::{LeafPlace, UNIT_BLOCKS, UNITS};
use crate::leaf::{HOLE_CHECKSUM, LOST_CHECKSUM, SUMS, Sums, UNREAD_CHECKSUM, is_data};
use crate::record::{Mask, bit, set_bit};
use crate::slots::Slot;
use crate::transfer::RequestId;
use crate::units::{UnitBits, UnitRun};
use pollux_base::{BlockChecksum, Generation};
use std::collections::BTreeMap;
use std::ops::Range;

/// What is known of a block of an extent that was hot when the process or the power died.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Base {
    /// The leaf decides.
    Leaf,
    /// Holds nothing.
    Zero,
    /// Holds nothing, and hides what lies beneath.
    Hole,
    /// Holds data, whatever is on the disk.
    Valid,
    /// Nothing can vouch for it.
    Lost,
}

/// What the journal says of the blocks of one slot. Records of the journal are applied in order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Recovered {
    pub base: Vec<Base>,
    /// First writes that are not known to be flushed: the checksum, and the journal block that says so.
    pub overlay: BTreeMap<u16, (BlockChecksum, u64)>,
}

impl Default for Recovered {
    fn default() -> Recovered {
        Recovered { base: vec![Base::Leaf; SUMS], overlay: BTreeMap::new() }
    }
}

impl Recovered {
    pub fn on_valid(&mut self, first: u16, checksums: &[BlockChecksum], journal_block: u64) {
        for (block, sum) in (first..).zip(checksums) {
            self.overlay.insert(block, (*sum, journal_block));
        }
    }

    /// Blocks that hold nothing: `Base::Zero` or `Base::Hole`.
    pub fn on_zero(&mut self, first: u16, count: u16, base: Base) {
        for block in first..first + count {
            self.base[usize::from(block)] = base;
            self.overlay.remove(&block);
        }
    }

    pub fn on_mask(&mut self, mask: &Mask) {
        for block in 0..SUMS {
            match (bit(&mask.stated, block), bit(&mask.valid, block)) {
                (false, false) => {}
                (false, true) => self.base[block] = Base::Lost,
                (true, false) if bit(&mask.hole, block) => self.base[block] = Base::Hole,
                (true, false) => self.base[block] = Base::Zero,
                (true, true) => self.base[block] = Base::Valid,
            }
            if !bit(&mask.keep, block) {
                self.overlay.remove(&(block as u16));
            }
        }
    }

    /// The first writes told of before journal block `durable` are flushed.
    pub fn on_durable(&mut self, durable: u64) {
        let base = &mut self.base;
        self.overlay.retain(|block, (_, told)| {
            let flushed = *told < durable;
            if flushed {
                base[usize::from(*block)] = Base::Valid;
            }
            !flushed
        });
    }

    /// What is known of the blocks after the crash, given what the leaf says.
    pub fn lay_over(&self, sums: &mut Sums) {
        assert!(self.overlay.is_empty(), "first writes are verified before anything is used");
        for (sum, base) in sums.iter_mut().zip(&self.base) {
            *sum = match base {
                Base::Leaf if is_data(*sum) && *sum != LOST_CHECKSUM => UNREAD_CHECKSUM,
                Base::Leaf => *sum,
                Base::Zero => BlockChecksum::ZERO,
                Base::Hole => HOLE_CHECKSUM,
                Base::Valid => UNREAD_CHECKSUM,
                Base::Lost => LOST_CHECKSUM,
            }
        }
    }

    /// The record that says the same; the overlay must be settled.
    pub fn mask(&self, slot: u32) -> Mask {
        assert!(self.overlay.is_empty(), "first writes are verified before anything is restated");
        let mut mask = Mask::new(slot);
        for (block, base) in self.base.iter().enumerate() {
            match base {
                Base::Leaf => {}
                Base::Lost => set_bit(&mut mask.valid, block),
                Base::Zero => set_bit(&mut mask.stated, block),
                Base::Hole => {
                    set_bit(&mut mask.stated, block);
                    set_bit(&mut mask.hole, block);
                }
                Base::Valid => {
                    set_bit(&mut mask.stated, block);
                    set_bit(&mut mask.valid, block);
                }
            }
        }
        mask
    }
}

/// Checksums of the extent's blocks.
pub enum Checksums {
    /// The extent has no slot, or an empty one: all blocks hold nothing.
    Absent,
    /// They must be read from the leaf.
    Unloaded,
    Loaded(Box<Sums>),
}

/// A block that got its first data: until the journal says durably that it was flushed, it must not be overwritten,
/// because after a power cut its checksum decides whether it ever arrived.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fresh {
    /// Journal block with its `Valid` record; `u64::MAX` while that is not written.
    pub told: u64,
    /// Its checksum before: lost, a hole, or none.
    pub before: BlockChecksum,
}

/// How far cooling has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CoolingStep {
    /// Others come first.
    Wait,
    /// Its checksums are being loaded.
    Load,
    /// The leaf is being written.
    Leaf,
    /// The leaf is being flushed.
    Flush,
    /// The record that takes the mark back is on its way.
    Commit,
}

pub struct Cooling {
    /// Tells this cooling from an earlier one of the same extent.
    pub number: u64,
    pub step: CoolingStep,
    /// Length of the leaf that is being written.
    pub leaf_blocks: u8,
    /// `Cool` requests that wait for it.
    pub requests: Vec<RequestId>,
}

pub struct HotExtent {
    /// Generation of the mark, as asked for.
    pub generation: Generation,
    /// Generation of the mark on disk. `None`: no write may go to the extent.
    pub marked: Option<Generation>,
    /// The newest mark under way.
    pub marking: Option<u64>,
    /// Marks with a lower number were followed by the record that takes them back.
    pub marks_from: u64,
    pub slot: Option<u32>,
    /// The slot's descriptor as far as it was queued for the journal; of units, as far as they were taken.
    pub descriptor: Slot,
    /// The journal was told that the slot holds data of the extent.
    pub slot_told: bool,
    /// Units of which the journal was told.
    units_told: UnitBits,
    /// Writes asked for and not ended, by unit: such a unit is not given back.
    pins: [u16; UNITS],
    /// Where the next leaf goes: taken with the first write, so that an extent can always cool.
    pub spare_leaf: Option<LeafPlace>,
    pub checksums: Checksums,
    pub fresh: BTreeMap<u16, Fresh>,
    /// Up to where the journal had recorded when `fresh` was last looked through.
    settled: u64,
    /// Was hot when the pool was opened, and its checksums were not loaded yet.
    pub recovered: Option<Box<Recovered>>,
    /// Its content may differ from its leaf.
    pub dirty: bool,
    /// Writes and zeroings asked for and not ended.
    pub writers: u32,
    pub cooling: Option<Cooling>,
    /// A leaf write is under way, wanted or not.
    pub leaf_under_way: bool,
}

impl HotExtent {
    /// `slot` with its descriptor, if there is one: of an empty one nothing is to be read, and a write has to say that it
    /// is in use again.
    pub fn new(generation: Generation, slot: Option<(u32, Slot)>) -> HotExtent {
        let (slot, descriptor) = slot.map_or((None, Slot::default()), |(slot, descriptor)| (Some(slot), descriptor));
        let holds_data = descriptor.state.holds_data();
        let mut hot = HotExtent {
            generation,
            marked: None,
            marking: None,
            marks_from: 0,
            slot,
            descriptor,
            slot_told: holds_data,
            units_told: UnitBits::default(),
            pins: [0; UNITS],
            spare_leaf: None,
            checksums: if holds_data { Checksums::Unloaded } else { Checksums::Absent },
            fresh: BTreeMap::new(),
            settled: 0,
            recovered: None,
            dirty: false,
            writers: 0,
            cooling: None,
            leaf_under_way: false,
        };
        hot.all_units_told();
        hot
    }

    /// A record with the whole descriptor was queued.
    pub fn all_units_told(&mut self) {
        self.units_told = UnitBits::default();
        for (unit, _) in self.descriptor.units.iter() {
            self.units_told[unit / 64] |= 1 << (unit % 64);
        }
    }

    /// Units of the range of which the journal was not told; now it is.
    pub fn tell_units(&mut self, range: Range<usize>) -> Vec<UnitRun> {
        let mut runs: Vec<UnitRun> = Vec::new();
        for index in range {
            let (word, bit) = (index / 64, 1 << (index % 64));
            let Some(unit) = self.descriptor.units.get(index).filter(|_| self.units_told[word] & bit == 0) else {
                continue;
            };
            self.units_told[word] |= bit;
            match runs.last_mut() {
                Some(run) if usize::from(run.first + run.count) == index && run.unit + u32::from(run.count) == unit => {
                    run.count += 1;
                }
                _ => runs.push(UnitRun { first: index as u16, count: 1, unit }),
            }
        }
        runs
    }

    pub fn pin(&mut self, range: Range<usize>) {
        self.pins[range].iter_mut().for_each(|pins| *pins += 1);
    }

    pub fn is_pinned(&self, unit: usize) -> bool {
        self.pins[unit] > 0
    }

    pub fn unpin(&mut self, range: Range<usize>) {
        self.pins[range].iter_mut().for_each(|pins| *pins -= 1);
    }

    /// Takes out of the descriptor the units of the range that hold nothing and into which nobody writes. Gives their
    /// places, and whether the journal knows of them.
    pub fn drop_empty_units(&mut self, range: Range<usize>) -> Vec<(usize, u32, bool)> {
        let sums = match &self.checksums {
            Checksums::Loaded(sums) => Some(sums),
            Checksums::Absent => None,
            Checksums::Unloaded => return Vec::new(),
        };
        let holds_nothing = |index: usize| {
            let blocks = index * UNIT_BLOCKS..(index + 1) * UNIT_BLOCKS;
            sums.is_none_or(|sums| !sums[blocks].iter().any(|sum| is_data(*sum)))
        };
        let mut dropped = Vec::new();
        for index in range {
            if let Some(unit) = self.descriptor.units.get(index)
                && self.pins[index] == 0
                && holds_nothing(index)
            {
                let told = &mut self.units_told[index / 64];
                dropped.push((index, unit, *told & 1 << (index % 64) != 0));
                *told &= !(1 << (index % 64));
                self.descriptor.units.clear(index);
            }
        }
        dropped
    }

    pub fn loaded(&self) -> Option<&Sums> {
        match &self.checksums {
            Checksums::Loaded(sums) => Some(sums),
            Checksums::Absent | Checksums::Unloaded => None,
        }
    }

    pub fn is_committing(&self) -> bool {
        self.cooling.as_ref().is_some_and(|cooling| cooling.step == CoolingStep::Commit)
    }

    /// Forgets the fresh blocks of which the journal says durably, up to `recorded`, that they are flushed. Gives the
    /// journal block after the last one that must be said before `range` can be overwritten, if any.
    pub fn settle(&mut self, range: Range<u16>, recorded: u64) -> Option<u64> {
        if self.fresh.is_empty() {
            return None;
        }
        if self.settled < recorded {
            self.settled = recorded;
            self.fresh.retain(|_, fresh| fresh.told >= recorded);
        }
        self.fresh.range(range).map(|(_, fresh)| fresh.told.saturating_add(1)).max()
    }

    /// The record from which a recovery can start anew. Blocks told of before journal block `flushed` are flushed; what is
    /// told of from there on stays on top.
    pub fn mask(&self, flushed: u64) -> Option<Mask> {
        let slot = self.slot.filter(|_| self.slot_told && self.dirty)?;
        if let Some(recovered) = &self.recovered {
            return Some(recovered.mask(slot));
        }
        let sums = self.loaded().expect("a dirty extent is loaded");
        let mut mask = Mask::new(slot);
        for (block, sum) in sums.iter().enumerate() {
            let fresh = self.fresh.get(&(block as u16)).filter(|fresh| fresh.told >= flushed);
            if fresh.is_some() {
                set_bit(&mut mask.keep, block);
            }
            match fresh.map_or(*sum, |fresh| fresh.before) {
                LOST_CHECKSUM => set_bit(&mut mask.valid, block),
                HOLE_CHECKSUM => {
                    set_bit(&mut mask.stated, block);
                    set_bit(&mut mask.hole, block);
                }
                sum => {
                    set_bit(&mut mask.stated, block);
                    if !sum.is_zero() {
                        set_bit(&mut mask.valid, block);
                    }
                }
            }
        }
        Some(mask)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slots::SlotState;

    #[test]
    fn a_mask_restates_what_the_records_before_it_said() {
        let mut before = Recovered::default();
        before.on_valid(3, &[BlockChecksum(1); 4], 10);
        before.on_zero(5, 1, Base::Zero);
        before.on_zero(6, 1, Base::Hole);
        before.on_durable(11);
        before.base[9] = Base::Lost;
        let mut after = Recovered::default();
        after.on_mask(&before.mask(0));
        assert_eq!(before, after);
    }

    #[test]
    fn of_what_was_hot_at_a_crash_the_leaf_tells_only_what_holds_nothing() {
        let mut recovered = Recovered::default();
        recovered.base[2..6].copy_from_slice(&[Base::Zero, Base::Hole, Base::Lost, Base::Valid]);
        let mut sums = Box::new([BlockChecksum::ZERO; SUMS]);
        sums[1..7].fill(BlockChecksum(9));
        (sums[7], sums[8]) = (HOLE_CHECKSUM, LOST_CHECKSUM);
        recovered.lay_over(&mut sums);
        let (zero, unread) = (BlockChecksum::ZERO, UNREAD_CHECKSUM);
        let expected = [zero, unread, zero, HOLE_CHECKSUM, LOST_CHECKSUM, unread, unread, HOLE_CHECKSUM, LOST_CHECKSUM];
        assert_eq!(sums[..9], expected);
    }

    fn with_data() -> HotExtent {
        HotExtent::new(Generation(1), Some((0, Slot { state: SlotState::Data, ..Slot::default() })))
    }

    #[test]
    fn what_is_told_of_after_the_flush_stays_on_top_of_a_mask() {
        let mut hot = with_data();
        let mut sums = Box::new([BlockChecksum::ZERO; SUMS]);
        sums[1..4].fill(BlockChecksum(9));
        sums[4] = LOST_CHECKSUM;
        hot.checksums = Checksums::Loaded(sums);
        hot.dirty = true;
        hot.fresh.insert(2, Fresh { told: 10, before: BlockChecksum::ZERO });
        hot.fresh.insert(3, Fresh { told: 20, before: BlockChecksum::ZERO });
        let mut recovered = Recovered::default();
        recovered.on_valid(3, &[BlockChecksum(9)], 20);
        recovered.on_mask(&hot.mask(20).expect("it is dirty"));
        assert_eq!(recovered.base[..5], [Base::Zero, Base::Valid, Base::Valid, Base::Zero, Base::Lost]);
        assert_eq!(recovered.overlay.keys().copied().collect::<Vec<_>>(), [3]);
    }

    #[test]
    fn a_fresh_block_is_not_overwritten_before_its_flush_is_on_record() {
        let mut hot = with_data();
        hot.fresh.insert(7, Fresh { told: 10, before: BlockChecksum::ZERO });
        assert_eq!(hot.settle(0..7, 10), None);
        assert_eq!(hot.settle(7..8, 10), Some(11));
        assert_eq!(hot.settle(7..8, 11), None);
    }
}
