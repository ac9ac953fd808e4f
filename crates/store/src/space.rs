//! Which units of the pool are free, and who may have them.
//!
//! Nothing of this is stored: a unit is taken if a slot names it or a leaf lies in it, so the bitmap is derived at open.
//! Invariants: a unit that a committed descriptor names is taken; one that was given back is taken again only when the
//! record that gave it back is durable (else a power cut would revive the old owner over the new one's bytes) and its
//! discard has ended (else that would eat the new one's).
//!
//! Place: the first unit of an extent goes to a region (4 MiB) that is wholly free, at its own place in there, and the
//! others follow at their distance from it. So what is filled lies contiguously, in whatever order it is filled. Leaves
//! lie in units of their own, taken from the end of the pool, out of the way.

use crate::layout::{LEAF_BLOCKS_MAX, LeafPlace, UNIT_BLOCKS, UNITS};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Names a moment in the giving back of space.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Ticket(u64);

/// Space that a record of the journal gave back.
struct GivenBack {
    ticket: u64,
    /// Block of the journal that says so.
    told: u64,
    units: Vec<(u32, u32)>,
    leaves: Vec<LeafPlace>,
}

pub struct Space {
    /// One bit per unit: taken.
    taken: Vec<u64>,
    free: u32,
    /// Free units of each region.
    free_of: Vec<u16>,
    whole: u32,
    /// No region below is wholly free; none below is free in part; none from here on is free at all.
    whole_from: usize,
    partial_from: usize,
    top: usize,
    /// Units that hold leaves, and which of their blocks are taken.
    leaf_units: BTreeMap<u32, u32>,
    /// Those of them that have room for the longest leaf.
    roomy: BTreeSet<u32>,
    given_back: VecDeque<GivenBack>,
    waiting_units: u32,
    tickets: u64,
    /// Discards under way, by ticket.
    discards: BTreeMap<u64, u32>,
}

const ALL_BLOCKS: u32 = ((1u64 << UNIT_BLOCKS) - 1) as u32;

/// First block of a gap of `blocks` in a leaf unit.
fn gap(taken: u32, blocks: u8) -> Option<u8> {
    let want = (1u32 << blocks) - 1;
    (0..=UNIT_BLOCKS as u8 - blocks).find(|at| taken & want << at == 0)
}

impl Space {
    /// All free.
    pub fn new(regions: u32) -> Space {
        let units = regions as usize * UNITS;
        Space {
            taken: vec![0; units.div_ceil(64)],
            free: units as u32,
            free_of: vec![UNITS as u16; regions as usize],
            whole: regions,
            whole_from: 0,
            partial_from: regions as usize,
            top: regions as usize,
            leaf_units: BTreeMap::new(),
            roomy: BTreeSet::new(),
            given_back: VecDeque::new(),
            waiting_units: 0,
            tickets: 0,
            discards: BTreeMap::new(),
        }
    }

    /// Units that could be taken now.
    pub fn free(&self) -> u32 {
        self.free
    }

    /// Units that a flush would make free.
    pub fn waiting(&self) -> u32 {
        self.waiting_units
    }

    /// How many of the longest leaves surely fit without taking another unit.
    pub fn leaf_room(&self) -> usize {
        self.roomy.len()
    }

    pub fn is_taken(&self, unit: u32) -> bool {
        self.taken[unit as usize / 64] & 1 << (unit % 64) != 0
    }

    fn set_taken(&mut self, unit: u32) {
        self.taken[unit as usize / 64] |= 1 << (unit % 64);
        self.free -= 1;
        let region = unit as usize / UNITS;
        let free = &mut self.free_of[region];
        if usize::from(*free) == UNITS {
            self.whole -= 1;
            self.partial_from = self.partial_from.min(region);
        }
        *free -= 1;
    }

    fn set_free(&mut self, unit: u32) {
        assert!(self.is_taken(unit), "unit {unit} is given back once");
        self.taken[unit as usize / 64] &= !(1 << (unit % 64));
        self.free += 1;
        let region = unit as usize / UNITS;
        let free = &mut self.free_of[region];
        *free += 1;
        if usize::from(*free) == UNITS {
            self.whole += 1;
            self.whole_from = self.whole_from.min(region);
        }
        self.partial_from = self.partial_from.min(region);
        self.top = self.top.max(region + 1);
    }

    /// At open: a slot names the unit. `false`: it is taken already, or is not there.
    pub fn claim(&mut self, unit: u32) -> bool {
        let is_there = (unit as usize) < self.free_of.len() * UNITS;
        let fine = is_there && !self.is_taken(unit);
        if fine {
            self.set_taken(unit);
        }
        fine
    }

    /// At open: a leaf lies there.
    pub fn claim_leaf(&mut self, place: LeafPlace) -> bool {
        let blocks = place.bits();
        let fine = match self.leaf_units.get(&place.unit) {
            Some(taken) => taken & blocks == 0,
            None => self.claim(place.unit),
        };
        if fine {
            let taken = self.leaf_units.get(&place.unit).copied().unwrap_or(0) | blocks;
            self.set_leaf_blocks(place.unit, taken);
        }
        fine
    }

    fn set_leaf_blocks(&mut self, unit: u32, taken: u32) {
        self.leaf_units.insert(unit, taken);
        match gap(taken, LEAF_BLOCKS_MAX as u8) {
            Some(_) => self.roomy.insert(unit),
            None => self.roomy.remove(&unit),
        };
    }

    /// A unit for place `index` of an extent whose nearest present unit is given by its place and number.
    pub fn take(&mut self, index: usize, nearest: Option<(usize, u32)>) -> Option<u32> {
        if self.free == 0 {
            return None;
        }
        let unit = match nearest {
            Some((at, unit)) => {
                let beside = unit.wrapping_add(index as u32).wrapping_sub(at as u32);
                let fits = (beside as usize) < self.free_of.len() * UNITS && !self.is_taken(beside);
                if fits { beside } else { self.anywhere() }
            }
            None if self.whole > 0 => {
                let whole = |free: &u16| usize::from(*free) == UNITS;
                let beyond = self.free_of[self.whole_from..].iter().position(whole);
                self.whole_from += beyond.expect("one is wholly free");
                (self.whole_from * UNITS + index) as u32
            }
            None => self.anywhere(),
        };
        self.set_taken(unit);
        Some(unit)
    }

    /// The lowest free unit of the lowest region that is free in part; of any, if none is. There is one.
    fn anywhere(&mut self) -> u32 {
        let partial = |free: &u16| *free > 0 && usize::from(*free) < UNITS;
        let from = self.partial_from.min(self.free_of.len());
        let region = match self.free_of[from..].iter().position(partial) {
            Some(beyond) => {
                self.partial_from = from + beyond;
                self.partial_from
            }
            None => {
                self.partial_from = self.free_of.len();
                self.free_of.iter().position(|free| *free > 0).expect("a unit is free")
            }
        };
        let units = (region * UNITS) as u32..((region + 1) * UNITS) as u32;
        units.into_iter().find(|unit| !self.is_taken(*unit)).expect("the region has a free unit")
    }

    /// Room for a leaf of so many blocks.
    pub fn take_leaf(&mut self, blocks: u8) -> Option<LeafPlace> {
        let unit = match self.roomy.first() {
            Some(unit) => *unit,
            None if self.free == 0 => return None,
            None => {
                let free = self.free_of[..self.top].iter().rposition(|free| *free > 0).expect("a unit is free");
                self.top = free + 1;
                let mut units = (free * UNITS) as u32..((free + 1) * UNITS) as u32;
                let unit = units.rfind(|unit| !self.is_taken(*unit)).expect("the region has a free unit");
                self.set_taken(unit);
                self.leaf_units.insert(unit, 0);
                unit
            }
        };
        let taken = self.leaf_units[&unit];
        let block = gap(taken, blocks).expect("a roomy unit has room");
        let place = LeafPlace { unit, block, blocks };
        self.set_leaf_blocks(unit, taken | place.bits());
        Some(place)
    }

    /// Gives up a place for a leaf that no record ever named. A unit that held nothing else is free again.
    pub fn drop_leaf(&mut self, place: LeafPlace) {
        if let Some(unit) = self.free_leaf_blocks(place) {
            self.set_free(unit);
        }
    }

    /// Gives the unit if it holds no leaf any more; it is still taken.
    fn free_leaf_blocks(&mut self, place: LeafPlace) -> Option<u32> {
        let taken = self.leaf_units[&place.unit];
        assert!(taken & place.bits() == place.bits(), "{place:?} is given back once");
        let taken = taken & !place.bits();
        if taken & ALL_BLOCKS != 0 {
            self.set_leaf_blocks(place.unit, taken);
            return None;
        }
        self.leaf_units.remove(&place.unit);
        self.roomy.remove(&place.unit);
        Some(place.unit)
    }

    /// Gives up a unit that no record ever named.
    pub fn drop_unit(&mut self, unit: u32) {
        self.set_free(unit);
    }

    /// A committed record, in block `told` of the journal, gave back these units (first and count) and leaves.
    pub fn give_back(&mut self, told: u64, units: Vec<(u32, u32)>, leaves: Vec<LeafPlace>) {
        if units.is_empty() && leaves.is_empty() {
            return;
        }
        self.waiting_units += units.iter().map(|(_, count)| count).sum::<u32>();
        self.tickets += 1;
        self.given_back.push_back(GivenBack { ticket: self.tickets, told, units, leaves });
    }

    /// The blocks of the journal before `durable` are. Gives the runs of units whose space is to be discarded.
    pub fn on_durable(&mut self, durable: u64) -> Vec<(u32, u32, Ticket)> {
        let mut units: Vec<(u32, u32)> = Vec::new();
        let mut ticket = 0;
        while self.given_back.front().is_some_and(|given| given.told < durable)
            && let Some(given) = self.given_back.pop_front()
        {
            ticket = given.ticket;
            self.waiting_units -= given.units.iter().map(|(_, count)| count).sum::<u32>();
            units.extend(given.units);
            for place in given.leaves {
                units.extend(self.free_leaf_blocks(place).map(|unit| (unit, 1)));
            }
        }
        if units.is_empty() {
            return Vec::new();
        }
        units.sort_unstable();
        let mut runs: Vec<(u32, u32, Ticket)> = Vec::new();
        for (unit, count) in units {
            match runs.last_mut() {
                Some((first, before, _)) if *first + *before == unit => *before += count,
                _ => runs.push((unit, count, Ticket(ticket))),
            }
        }
        self.discards.insert(ticket, runs.len() as u32);
        runs
    }

    /// The discard has ended, well or not: giving space back is a kindness to the file system, the units are as good
    /// without it.
    pub fn on_discarded(&mut self, first: u32, count: u32, ticket: Ticket) {
        (first..first + count).for_each(|unit| self.set_free(unit));
        let left = self.discards.get_mut(&ticket.0).expect("a discard is under way");
        *left -= 1;
        if *left == 0 {
            self.discards.remove(&ticket.0);
        }
    }

    /// Everything given back so far.
    pub fn ticket(&self) -> Ticket {
        Ticket(self.tickets)
    }

    /// Whether all that was given back until then is free.
    pub fn is_free(&self, ticket: Ticket) -> bool {
        self.given_back.front().is_none_or(|given| given.ticket > ticket.0)
            && self.discards.first_key_value().is_none_or(|(under_way, _)| *under_way > ticket.0)
    }

    pub fn check(&self) {
        let taken: u32 = self.taken.iter().map(|word| word.count_ones()).sum();
        assert_eq!(taken + self.free, (self.free_of.len() * UNITS) as u32, "every unit is taken or free");
        let whole = self.free_of.iter().filter(|free| usize::from(**free) == UNITS).count();
        assert_eq!(whole, self.whole as usize, "the wholly free regions are counted");
        assert!(self.free_of[..self.whole_from].iter().all(|free| usize::from(*free) < UNITS), "none lies below");
        assert!(self.free_of[self.top..].iter().all(|free| *free == 0), "none lies above");
        assert!(self.leaf_units.keys().all(|unit| self.is_taken(*unit)), "leaves lie in taken units");
    }

    /// Whether leaves lie in the unit.
    pub fn holds_leaves(&self, unit: u32) -> bool {
        self.leaf_units.contains_key(&unit)
    }

    /// Whether the place is one of a leaf.
    pub fn has_leaf(&self, place: LeafPlace) -> bool {
        self.leaf_units.get(&place.unit).is_some_and(|taken| taken & place.bits() == place.bits())
    }

    /// Whether the counts are those of the bitmap: 4 MiB of it for each TiB, some 200 us.
    pub fn adds_up(&self) -> bool {
        let taken: u32 = self.taken.iter().map(|word| word.count_ones()).sum();
        taken == self.taken_units() && self.free_of.iter().map(|free| u32::from(*free)).sum::<u32>() == self.free
    }

    /// Which units are taken; for tests of the whole.
    pub fn taken_units(&self) -> u32 {
        (self.free_of.len() * UNITS) as u32 - self.free
    }

    /// Units that hold leaves, and the blocks of them that are taken.
    pub fn leaf_units(&self) -> (usize, u32) {
        (self.leaf_units.len(), self.leaf_units.values().map(|taken| taken.count_ones()).sum())
    }

    /// Units given back and not yet free, those whose discard is under way included.
    pub fn leaving(&self) -> bool {
        !self.given_back.is_empty() || !self.discards.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_filled_in_any_order_lies_contiguously() {
        let mut space = Space::new(4);
        let other = space.take(9, None).expect("there is room");
        let first = space.take(5, None).expect("there is room");
        assert_eq!((other as usize, first as usize), (9, UNITS + 5));
        for index in [0, 1, UNITS - 1] {
            let beside = space.take(index, Some((5, first))).expect("there is room");
            assert_eq!(beside as usize, UNITS + index);
        }
        space.check();
    }

    #[test]
    fn leaves_share_a_unit_at_the_end_and_data_comes_from_the_front() {
        let mut space = Space::new(2);
        let places: Vec<LeafPlace> = (0..3).map(|_| space.take_leaf(LEAF_BLOCKS_MAX as u8).expect("room")).collect();
        assert_eq!(places[0].unit as usize, 2 * UNITS - 1);
        let per_unit = UNIT_BLOCKS / LEAF_BLOCKS_MAX;
        assert_eq!(places[1].unit == places[0].unit, per_unit > 1);
        assert_eq!(space.take(0, None), Some(0));
        places.into_iter().for_each(|place| space.drop_leaf(place));
        assert_eq!(space.taken_units(), 1);
        space.check();
    }

    #[test]
    fn a_unit_is_taken_again_only_when_its_record_is_durable_and_its_discard_has_ended() {
        let mut space = Space::new(1);
        let all: Vec<u32> = (0..UNITS).map(|index| space.take(index, None).expect("there is room")).collect();
        assert_eq!(space.take(0, None), None);
        space.give_back(7, vec![(all[3], 2)], Vec::new());
        let ticket = space.ticket();
        assert!(space.on_durable(7).is_empty());
        assert_eq!((space.take(0, None), space.waiting()), (None, 2));
        let runs = space.on_durable(8);
        assert_eq!(runs, [(all[3], 2, ticket)]);
        assert_eq!((space.take(0, None), space.is_free(ticket)), (None, false));
        space.on_discarded(all[3], 2, ticket);
        assert!(space.is_free(ticket));
        assert_eq!(space.take(0, None), Some(all[3]));
        space.check();
    }
}
