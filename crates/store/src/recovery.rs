//! From the bytes of the metadata to the state of the pool: pure, without any disk operation.
//!
//! What cannot be explained by a crash is damage and refused: better no replica than a wrong one. `examine` goes on behind it
//! and tells all of it, for whoever looks at a pool that is refused; `recover` takes only what is free of it.

use crate::OpenError;
use crate::catalog::Catalog;
use crate::hot::{Base, Recovered};
use crate::journal;
use crate::lanes::Key;
use crate::layout::{ANCHORS, BLOCK, CATALOGS, Geometry, LeafPlace, table_block_of};
use crate::record::Record;
use crate::slots::{LayerId, Slot, SlotState, decode_block, table_blocks_for};
use crate::space::Space;
use crate::superblock::Anchor;
use pollux_base::unit::{BLOCK_BYTES, EXTENT_BYTES, VOLUME_BYTES_MAX};
use pollux_base::{ExtentIndex, Generation, PoolId, VolumeId};
use std::collections::BTreeMap;

/// Damage of the metadata.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("both copies of the journal's anchor are unreadable")]
    Anchors,
    #[error("both copies of the catalog are unreadable")]
    Catalogs,
    #[error("both copies of slot table block {0} are unreadable")]
    TableBlock(u32),
    #[error("{0}")]
    Journal(String),
    #[error("the journal names slot {slot} of {slots}")]
    JournalSlot { slot: u32, slots: u32 },
    #[error("slot {slot} holds {extent:?}, beyond any volume")]
    SlotBeyond { slot: u32, extent: ExtentIndex },
    #[error("slots {} and {} both hold {extent:?} of {layer:?}", .slots[0], .slots[1])]
    SlotTwice { slots: [u32; 2], layer: LayerId, extent: ExtentIndex },
    #[error("{volume} lies in {layer:?}, which is not there")]
    VolumeWithoutLayer { volume: VolumeId, layer: LayerId },
    #[error("{0:?} lies on a layer that is not there")]
    LayerWithoutParent(LayerId),
    #[error("{0} extents are marked hot")]
    MarksTooMany(usize),
    #[error("slot {slot} names unit {unit}, which is not its own")]
    UnitTwice { slot: u32, unit: u32 },
    #[error("slot {slot} names {place:?}, which is not its own")]
    LeafTwice { slot: u32, place: LeafPlace },
}

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

    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Blocks of one copy that are to be read.
    pub fn blocks(&self) -> u32 {
        self.sequences.len() as u32
    }

    /// Blocks of which one copy is not whole and the other is: block and copy.
    pub fn damaged(&self) -> impl Iterator<Item = (u32, usize)> {
        (0..).zip(&self.sequences).filter_map(|(block, copies)| match copies {
            [None, Some(_)] => Some((block, 0)),
            [Some(_), None] => Some((block, 1)),
            _ => None,
        })
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

    pub fn catalog(&self, offset: u64, pool: PoolId) -> Option<(u64, Catalog)> {
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

/// The pool, if nothing is wrong with it.
pub fn recover(image: &Image, table: TableFound, pool: PoolId, geometry: &Geometry) -> Result<Found, OpenError> {
    let mut faults = Vec::new();
    let anchor = find_anchor(image, pool);
    let found = examine(image, anchor, Catalog::default(), table, pool, geometry, &mut faults);
    match (faults.into_iter().next(), found) {
        (None, Some(found)) => Ok(found),
        (fault, _) => Err(OpenError::Damaged(fault.unwrap_or(Fault::Anchors).to_string())),
    }
}

/// The pool as far as it can be told, and everything that is wrong with it. `None` without an anchor. `spare`: the catalog, if
/// neither copy of it can be read.
pub fn examine(
    image: &Image,
    anchor: Option<(usize, Anchor)>,
    spare: Catalog,
    table: TableFound,
    pool: PoolId,
    geometry: &Geometry,
    faults: &mut Vec<Fault>,
) -> Option<Found> {
    let Some((anchor_copy, anchor)) = anchor else {
        faults.push(Fault::Anchors);
        return None;
    };
    let catalogs = CATALOGS
        .map(|offset| image.catalog(offset, pool))
        .map(|copy| copy.map(|(sequence, catalog)| (sequence, (sequence, catalog))));
    let sequences = [&catalogs[0], &catalogs[1]].map(|copy| copy.as_ref().map(|(sequence, _)| *sequence));
    let newest = newer(catalogs).map(|(_, newest)| newest);
    if newest.is_none() {
        faults.push(Fault::Catalogs);
    }
    let (catalog_sequence, catalog) = newest.unwrap_or((0, spare));
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
    judge_table(table, &mut found, faults);
    let end = (anchor.end != 0).then_some(anchor.end);
    let journal =
        journal::find(|at| image.block(at), pool, geometry.ring, anchor.log_life, anchor.tail, anchor.durable, end);
    faults.extend(journal.fault.clone().map(Fault::Journal));
    found.journal_end = journal.end;
    replay(journal, geometry, &mut found, faults);
    claim_space(&mut found, faults);
    Some(found)
}

/// The newer copy of the journal's anchor, and which it is.
pub fn find_anchor(image: &Image, pool: PoolId) -> Option<(usize, Anchor)> {
    let copies = ANCHORS.map(|offset| image.block(offset).and_then(|block| Anchor::decode(block, pool)));
    newer(copies.map(|copy| copy.map(|anchor| (anchor.sequence, anchor))))
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

fn judge_table(table: TableFound, found: &mut Found, faults: &mut Vec<Fault>) {
    for (block, sequences) in (0..).zip(&table.sequences) {
        if *sequences == [None, None] {
            faults.push(Fault::TableBlock(block));
        }
        let [first, second] = sequences;
        if first != second {
            found.table_heal.insert(block, usize::from(second > first));
        }
    }
    found.slots = table.slots;
}

fn replay(journal: journal::Found, geometry: &Geometry, found: &mut Found, faults: &mut Vec<Fault>) {
    let mut marks: BTreeMap<Key, Generation> = BTreeMap::new();
    let mut masks: BTreeMap<u32, Recovered> = BTreeMap::new();
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
        if let Some(slot) = record.slots().into_iter().find(|slot| *slot >= geometry.slots) {
            faults.push(Fault::JournalSlot { slot, slots: geometry.slots });
            continue;
        }
        match record {
            Record::Hot { layer, extent, generation } => {
                let mark = marks.entry((layer, extent)).or_insert(generation);
                *mark = generation.max(*mark);
            }
            Record::Cold { layer, extent } => {
                marks.remove(&(layer, extent));
            }
            Record::Slot { slot, descriptor } => {
                grow(found, slot);
                found.slots[slot as usize] = *descriptor;
                masks.remove(&slot);
            }
            Record::Unit { slot, run } => {
                grow(found, slot);
                found.slots[slot as usize].units.set_run(run);
            }
            Record::Valid { slot, first, checksums } => {
                masks.entry(slot).or_default().on_valid(first, &checksums, block);
            }
            Record::Zero { slot, first, count } => {
                masks.entry(slot).or_default().on_zero(first, count, Base::Zero);
            }
            Record::Hole { slot, first, count } => {
                masks.entry(slot).or_default().on_zero(first, count, Base::Hole);
            }
            Record::Merge { into, descriptor, from, leaf_sequence } => {
                for (slot, descriptor) in [(into, *descriptor), (from, Slot { leaf_sequence, ..Slot::default() })] {
                    grow(found, slot);
                    found.slots[slot as usize] = descriptor;
                    masks.remove(&slot);
                }
            }
            Record::Forget { slots } => {
                for (slot, leaf_sequence) in slots {
                    grow(found, slot);
                    found.slots[slot as usize] = Slot { leaf_sequence, ..Slot::default() };
                    masks.remove(&slot);
                }
            }
            Record::Lose { extent, generation, slots } => {
                for (slot, layer, blocks) in slots {
                    grow(found, slot);
                    let before = &mut found.slots[slot as usize];
                    *before = Record::lost_slot(layer, extent, blocks, generation, before.leaf_sequence);
                    masks.remove(&slot);
                }
            }
            Record::Mask(mask) => masks.entry(mask.slot).or_default().on_mask(&mask),
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
            faults.push(Fault::SlotBeyond { slot: number, extent });
        }
        if let Some(other) = owners.insert((layer, extent), number) {
            faults.push(Fault::SlotTwice { slots: [other, number], layer, extent });
        }
    }
    let layers = &found.catalog.layers;
    let homeless = found.catalog.volumes_without_layer();
    faults.extend(homeless.map(|(volume, layer)| Fault::VolumeWithoutLayer { volume, layer }));
    faults.extend(found.catalog.layers_without_parent().map(Fault::LayerWithoutParent));
    marks.retain(|(layer, _), _| layers.contains_key(layer));
    if marks.len() > geometry.ring.hot_marks_max() {
        faults.push(Fault::MarksTooMany(marks.len()));
    }
    for (key, generation) in marks {
        let slot = owners.get(&key).copied();
        let mut recovered = slot.and_then(|slot| masks.remove(&slot)).unwrap_or_default();
        recovered.on_durable(journal.durable);
        found.hot.insert(key, FoundHot { generation, slot, recovered });
    }
}

/// Every unit that a slot names, and every leaf, has one owner.
fn claim_space(found: &mut Found, faults: &mut Vec<Fault>) {
    for (slot, known) in (0..).zip(&found.slots) {
        for (_, unit) in known.units.iter() {
            if !found.space.claim(unit) {
                faults.push(Fault::UnitTwice { slot, unit });
            }
        }
    }
    for (slot, known) in (0..).zip(&found.slots) {
        if let Some(place) = known.leaf
            && !found.space.claim_leaf(place)
        {
            faults.push(Fault::LeafTwice { slot, place });
        }
    }
}
