//! What is known of each layer: its extents that have a slot, and what their committed descriptors add up to.

use crate::pool::Pool;
use crate::slots::{Slot, SlotState};
use pollux_base::ExtentIndex;
use std::collections::{BTreeMap, BTreeSet};

/// A layer's extents that have a slot.
#[derive(Default)]
pub struct LayerMap {
    pub extents: BTreeMap<ExtentIndex, u32>,
    /// Parts, loads and leaf writes under way.
    pub busy: u32,
    /// What committed descriptors name.
    pub units: u64,
    pub leaf_blocks: u64,
    /// Those of which blocks are lost.
    pub damaged: BTreeSet<ExtentIndex>,
}

impl LayerMap {
    /// A slot's descriptor is one of this layer's from now on.
    pub fn count(&mut self, slot: &Slot) {
        self.units += slot.units.count() as u64;
        self.leaf_blocks += slot.leaf.map_or(0, |leaf| u64::from(leaf.blocks));
        if slot.state == SlotState::Damaged {
            self.damaged.insert(slot.owner().1);
        }
    }

    /// It was, and is not any more.
    fn discount(&mut self, slot: &Slot) {
        self.units -= slot.units.count() as u64;
        self.leaf_blocks -= slot.leaf.map_or(0, |leaf| u64::from(leaf.blocks));
        if slot.state == SlotState::Damaged {
            self.damaged.remove(&slot.owner().1);
        }
    }
}

impl Pool {
    /// Slots have other descriptors than before.
    pub fn recount(&mut self, before: &[Slot], numbers: &[u32]) {
        for slot in before {
            if let Some(map) = self.layers.get_mut(&slot.layer) {
                map.discount(slot);
            }
        }
        for slot in numbers.iter().map(|number| self.table.get(*number)) {
            if let Some(map) = self.layers.get_mut(&slot.layer) {
                map.count(slot);
            }
        }
    }
}
