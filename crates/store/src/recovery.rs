//! From the bytes of the metadata to the state of the pool: pure, without any disk operation.
//!
//! What cannot be explained by a crash is damage and refused: better no replica than a wrong one.

use crate::OpenError;
use crate::catalog::Catalog;
use crate::hot::{Base, Recovered};
use crate::journal::{self, HOT_MARKS_MAX};
use crate::lanes::Key;
use crate::layout::{ANCHORS, BLOCK, CATALOGS, Geometry, JOURNAL, table_block_of};
use crate::record::Record;
use crate::slots::{Slot, SlotState, decode_block, table_blocks_for};
use crate::space::Space;
use crate::superblock::Anchor;
use pollux_base::unit::{BLOCK_BYTES, EXTENT_BYTES, VOLUME_BYTES_MAX};
use pollux_base::{Generation, PoolId};
use std::collections::BTreeMap;

/// The slot table while it is read: decoded as it comes, because it may be large.
pub struct TableFound {
    slots: Vec<Slot>,
    /// For each block what the two copies say of its age; `None`: not read, or damaged.
    sequences: Vec<[Option<u64>; 2]>,
}

impl TableFound {
    /// A table that holds `slots`.
    pub fn new(slots: u32, geometry: &Geometry) -> TableFound {
        let blocks = table_blocks_for(slots);
        let end = if blocks == 0 { 0 } else { geometry.slots_of_block(blocks - 1).end };
        TableFound { slots: vec![Slot::default(); end as usize], sequences: vec![[None; 2]; blocks as usize] }
    }

    /// Blocks of one copy that are to be read.
    pub fn blocks(&self) -> u32 {
        self.sequences.len() as u32
    }

    /// Takes in a block of a copy. Of two whole ones the newer counts.
    pub fn take(&mut self, copy: usize, block: u32, bytes: &[u8], pool: PoolId, geometry: &Geometry) {
        let Some((sequence, slots)) = decode_block(bytes, pool, geometry, block) else { return };
        let Some(known) = self.sequences.get_mut(block as usize) else { return };
        if known[1 - copy].is_none_or(|other| sequence > other || (sequence == other && copy == 0)) {
            let start = geometry.slots_of_block(block).start as usize;
            for (place, slot) in self.slots[start..].iter_mut().zip(slots) {
                *place = slot;
            }
        }
        known[copy] = Some(sequence);
    }
}

/// Metadata as read, by offset.
#[derive(Default)]
pub struct Image(BTreeMap<u64, pollux_base::Data>);

impl Image {
    pub fn insert(&mut self, offset: u64, data: pollux_base::Data) {
        self.0.insert(offset, data);
    }

    /// The block at `offset`; `None` if it could not be read.
    pub fn block(&self, offset: u64) -> Option<&[u8]> {
        let (start, data) = self.0.range(..=offset).next_back()?;
        let at = (offset - start) as usize;
        data.as_slice().get(at..at + BLOCK)
    }

    fn catalog(&self, offset: u64, pool: PoolId) -> Option<(u64, Catalog)> {
        let mut bytes = self.block(offset)?.to_vec();
        for at in (0..Catalog::body_len(&bytes, pool)?).step_by(BLOCK) {
            bytes.extend_from_slice(self.block(offset + BLOCK_BYTES + at as u64)?);
        }
        Catalog::decode(&bytes, pool)
    }
}

/// A hot extent as found.
pub struct FoundHot {
    pub generation: Generation,
    pub slot: Option<u32>,
    pub recovered: Recovered,
}

/// The pool as its metadata describes it.
pub struct Found {
    pub anchor: Anchor,
    /// Which copy of the anchor was taken.
    pub anchor_copy: usize,
    pub catalog: Catalog,
    pub catalog_sequence: u64,
    /// Copies of the catalog that must be written anew.
    pub catalog_heal: [bool; 2],
    pub slots: Vec<Slot>,
    pub space: Space,
    /// Table blocks that must be written back, and which copy holds the better content now.
    pub table_heal: BTreeMap<u32, usize>,
    pub hot: BTreeMap<Key, FoundHot>,
    /// First block after the journal.
    pub journal_end: u64,
}

pub fn recover(image: &Image, table: TableFound, pool: PoolId, geometry: &Geometry) -> Result<Found, OpenError> {
    let damaged = OpenError::Damaged;
    let (anchor_copy, anchor) =
        find_anchor(image, pool).ok_or_else(|| damaged("both copies of the journal's anchor are unreadable".into()))?;
    let catalogs = CATALOGS
        .map(|offset| image.catalog(offset, pool))
        .map(|copy| copy.map(|(sequence, catalog)| (sequence, (sequence, catalog))));
    let sequences = [&catalogs[0], &catalogs[1]].map(|copy| copy.as_ref().map(|(sequence, _)| *sequence));
    let (_, (catalog_sequence, catalog)) =
        newer(catalogs).ok_or_else(|| damaged("both copies of the catalog are unreadable".into()))?;
    let catalog_heal = sequences.map(|sequence| sequence != Some(catalog_sequence));

    let mut found = Found {
        anchor,
        anchor_copy,
        catalog,
        catalog_sequence,
        catalog_heal,
        slots: Vec::new(),
        space: Space::new(geometry.regions),
        table_heal: BTreeMap::new(),
        hot: BTreeMap::new(),
        journal_end: 0,
    };
    judge_table(table, &mut found)?;
    let end = (anchor.end != 0).then_some(anchor.end);
    let journal = journal::find(ring(image), pool, anchor.log_life, anchor.tail, anchor.durable, end)
        .map_err(OpenError::Damaged)?;
    found.journal_end = journal.end;
    replay(journal, geometry, &mut found)?;
    claim_space(&mut found)?;
    Ok(found)
}

/// The newer copy of the journal's anchor, and which it is.
pub fn find_anchor(image: &Image, pool: PoolId) -> Option<(usize, Anchor)> {
    let copies = ANCHORS.map(|offset| image.block(offset).and_then(|block| Anchor::decode(block, pool)));
    newer(copies.map(|copy| copy.map(|anchor| (anchor.sequence, anchor))))
}

/// The journal's blocks by place.
pub fn ring<'a>(image: &'a Image) -> impl Fn(u64) -> Option<&'a [u8]> {
    move |place| image.block(JOURNAL + place * BLOCK_BYTES)
}

fn newer<T>(copies: [Option<(u64, T)>; 2]) -> Option<(usize, T)> {
    let [first, second] = copies;
    match (first, second) {
        (Some((first, _)), Some((second, value))) if second > first => Some((1, value)),
        (Some((_, value)), _) => Some((0, value)),
        (None, Some((_, value))) => Some((1, value)),
        (None, None) => None,
    }
}

fn judge_table(table: TableFound, found: &mut Found) -> Result<(), OpenError> {
    for (block, sequences) in (0..).zip(&table.sequences) {
        let copy = match sequences {
            [None, None] => {
                return Err(OpenError::Damaged(format!("both copies of slot table block {block} are unreadable")));
            }
            [first, second] => usize::from(second > first),
        };
        if sequences[0] != sequences[1] {
            found.table_heal.insert(block, copy);
        }
    }
    found.slots = table.slots;
    Ok(())
}

fn replay(journal: journal::Found, geometry: &Geometry, found: &mut Found) -> Result<(), OpenError> {
    let mut marks: BTreeMap<Key, Generation> = BTreeMap::new();
    let mut masks: BTreeMap<u32, Recovered> = BTreeMap::new();
    let known = |slot: u32| {
        let damaged = || OpenError::Damaged(format!("the journal names slot {slot} of {}", geometry.slots));
        if slot < geometry.slots { Ok(slot) } else { Err(damaged()) }
    };
    // Slots that were used since the last checkpoint are in the table from now on.
    let grow = |found: &mut Found, slot: u32| {
        let end = geometry.slots_of_block(table_block_of(slot)).end as usize;
        if found.slots.len() < end {
            found.slots.resize(end, Slot::default());
        }
        // Even if the first copy has it already, the second may not.
        found.table_heal.entry(table_block_of(slot)).or_insert(0);
    };
    for (block, record) in journal.records {
        match record {
            Record::Hot { layer, extent, generation } => {
                let mark = marks.entry((layer, extent)).or_insert(generation);
                *mark = generation.max(*mark);
            }
            Record::Cold { layer, extent } => {
                marks.remove(&(layer, extent));
            }
            Record::Slot { slot, descriptor } => {
                grow(found, known(slot)?);
                found.slots[slot as usize] = *descriptor;
                masks.remove(&slot);
            }
            Record::Unit { slot, run } => {
                grow(found, known(slot)?);
                found.slots[slot as usize].units.set_run(run);
            }
            Record::Valid { slot, first, checksums } => {
                masks.entry(known(slot)?).or_default().on_valid(first, &checksums, block);
            }
            Record::Zero { slot, first, count } => {
                masks.entry(known(slot)?).or_default().on_zero(first, count, Base::Zero);
            }
            Record::Hole { slot, first, count } => {
                masks.entry(known(slot)?).or_default().on_zero(first, count, Base::Hole);
            }
            Record::Merge { into, descriptor, from, leaf_sequence } => {
                for (slot, descriptor) in [(into, *descriptor), (from, Slot { leaf_sequence, ..Slot::default() })] {
                    grow(found, known(slot)?);
                    found.slots[slot as usize] = descriptor;
                    masks.remove(&slot);
                }
            }
            Record::Forget { slots } => {
                for (slot, leaf_sequence) in slots {
                    grow(found, known(slot)?);
                    found.slots[slot as usize] = Slot { leaf_sequence, ..Slot::default() };
                    masks.remove(&slot);
                }
            }
            Record::Mask(mask) => masks.entry(known(mask.slot)?).or_default().on_mask(&mask),
        }
    }
    let mut owners: BTreeMap<Key, u32> = BTreeMap::new();
    for (number, slot) in (0..).zip(&mut found.slots) {
        if slot.state == SlotState::Free {
            // Whatever else it says means nothing.
            *slot = slot.freed();
            continue;
        }
        let (layer, extent) = slot.owner();
        // A layer was being given up: that is finished here.
        if !found.catalog.layers.contains_key(&layer) {
            *slot = slot.freed();
            found.table_heal.entry(table_block_of(number)).or_insert(0);
            continue;
        }
        if u64::from(extent.0) * EXTENT_BYTES >= VOLUME_BYTES_MAX {
            return Err(OpenError::Damaged(format!("slot {number} holds {extent:?}, beyond any volume")));
        }
        if let Some(other) = owners.insert((layer, extent), number) {
            return Err(OpenError::Damaged(format!("slots {other} and {number} both hold {extent:?} of {layer:?}")));
        }
    }
    if let Some((volume, known)) =
        found.catalog.volumes.iter().find(|(_, v)| !found.catalog.layers.contains_key(&v.layer))
    {
        return Err(OpenError::Damaged(format!("{volume} lies in {:?}, which is not there", known.layer)));
    }
    if let Some((layer, _)) = found.catalog.layers.iter().find(|(id, layer)| {
        // A chain goes down to older layers only, so it ends.
        layer.parent.is_some_and(|parent| parent >= **id || !found.catalog.layers.contains_key(&parent))
    }) {
        return Err(OpenError::Damaged(format!("{layer:?} lies on a layer that is not there")));
    }
    marks.retain(|(layer, _), _| found.catalog.layers.contains_key(layer));
    if marks.len() > HOT_MARKS_MAX {
        return Err(OpenError::Damaged(format!("{} extents are marked hot", marks.len())));
    }
    for (key, generation) in marks {
        let slot = owners.get(&key).copied();
        let mut recovered = slot.and_then(|slot| masks.remove(&slot)).unwrap_or_default();
        recovered.on_durable(journal.durable);
        found.hot.insert(key, FoundHot { generation, slot, recovered });
    }
    Ok(())
}

/// Every unit that a slot names, and every leaf, has one owner.
fn claim_space(found: &mut Found) -> Result<(), OpenError> {
    let damaged =
        |slot: u32, what: String| OpenError::Damaged(format!("slot {slot} names {what}, which is not its own"));
    for (number, slot) in (0..).zip(&found.slots) {
        for (_, unit) in slot.units.iter() {
            if !found.space.claim(unit) {
                return Err(damaged(number, format!("unit {unit}")));
            }
        }
    }
    for (number, slot) in (0..).zip(&found.slots) {
        if let Some(leaf) = slot.leaf
            && !found.space.claim_leaf(leaf)
        {
            return Err(damaged(number, format!("{leaf:?}")));
        }
    }
    Ok(())
}
