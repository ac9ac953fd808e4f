//! From the bytes of the metadata to the state of the pool: pure, without any disk operation.
//!
//! What cannot be explained by a crash is damage and refused: better no replica than a wrong one.

use crate::catalog::Catalog;
use crate::hot::Recovered;
use crate::lanes::Key;
use crate::layout::{ANCHORS, BLOCK, CATALOGS, Geometry, JOURNAL};
use crate::record::Record;
use crate::slots::{Slot, SlotState, decode_block};
use crate::superblock::Anchor;
use crate::{HOT_EXTENTS_MAX, OpenError, journal};
use pollux_base::unit::{BLOCK_BYTES, EXTENT_BYTES};
use pollux_base::{Generation, PoolId};
use std::collections::BTreeMap;

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
    pub sequences: Vec<u64>,
    /// Table blocks that must be written back, and which copy holds the better content now.
    pub table_heal: BTreeMap<u32, usize>,
    pub hot: BTreeMap<Key, FoundHot>,
    /// First block after the journal.
    pub journal_end: u64,
}

pub fn recover(image: &Image, pool: PoolId, geometry: &Geometry) -> Result<Found, OpenError> {
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
        slots: Vec::with_capacity(geometry.slots as usize),
        sequences: Vec::with_capacity(geometry.table_blocks as usize),
        table_heal: BTreeMap::new(),
        hot: BTreeMap::new(),
        journal_end: 0,
    };
    read_table(image, pool, geometry, &mut found)?;
    let end = (anchor.end != 0).then_some(anchor.end);
    let journal = journal::find(ring(image), pool, anchor.log_life, anchor.tail, anchor.durable, end)
        .map_err(OpenError::Damaged)?;
    found.journal_end = journal.end;
    replay(journal, &mut found)?;
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

fn read_table(image: &Image, pool: PoolId, geometry: &Geometry, found: &mut Found) -> Result<(), OpenError> {
    for block in 0..geometry.table_blocks {
        let copies = [0, 1].map(|copy| {
            let bytes = image.block(geometry.table_offset(copy, block).0)?;
            decode_block(bytes, pool, geometry, block)
        });
        let sequences = [&copies[0], &copies[1]].map(|copy| copy.as_ref().map(|(sequence, _)| *sequence));
        let (copy, slots) = newer(copies)
            .ok_or_else(|| OpenError::Damaged(format!("both copies of slot table block {block} are unreadable")))?;
        if sequences[0] != sequences[1] {
            found.table_heal.insert(block, copy);
        }
        found.sequences.push(sequences[copy].expect("the copy taken was readable"));
        found.slots.extend(slots);
    }
    Ok(())
}

fn replay(journal: journal::Found, found: &mut Found) -> Result<(), OpenError> {
    let mut marks: BTreeMap<Key, Generation> = BTreeMap::new();
    let mut masks: BTreeMap<u32, Recovered> = BTreeMap::new();
    let slots_len = found.slots.len() as u32;
    let known = |slot: u32| {
        let damaged = || OpenError::Damaged(format!("the journal names slot {slot} of {slots_len}"));
        if slot < slots_len { Ok(slot) } else { Err(damaged()) }
    };
    for (block, record) in journal.records {
        match record {
            Record::Hot { volume, extent, generation } => {
                let mark = marks.entry((volume, extent)).or_insert(generation);
                *mark = generation.max(*mark);
            }
            Record::Cold { volume, extent } => {
                marks.remove(&(volume, extent));
            }
            Record::Slot { slot, descriptor } => {
                let table_block = crate::layout::table_block_of(known(slot)?);
                if found.slots[slot as usize] != descriptor {
                    found.slots[slot as usize] = descriptor;
                    found.table_heal.entry(table_block).or_insert(0);
                }
                masks.remove(&slot);
            }
            Record::Valid { slot, first, checksums } => {
                masks.entry(known(slot)?).or_default().on_valid(first, &checksums, block);
            }
            Record::Zero { slot, first, count } => masks.entry(known(slot)?).or_default().on_zero(first, count),
            Record::Mask(mask) => masks.entry(known(mask.slot)?).or_default().on_mask(&mask),
        }
    }
    let mut owners: BTreeMap<Key, u32> = BTreeMap::new();
    for (number, slot) in (0..).zip(&mut found.slots) {
        if slot.state == SlotState::Free {
            continue;
        }
        let (volume, extent) = slot.owner();
        // A deletion was under way: it is finished here.
        let Some(known) = found.catalog.volumes.get(&volume) else {
            *slot = slot.freed();
            found.table_heal.entry(crate::layout::table_block_of(number)).or_insert(0);
            continue;
        };
        if u64::from(extent.0) * EXTENT_BYTES >= known.size.0 {
            return Err(OpenError::Damaged(format!("slot {number} holds {extent:?} beyond the end of {volume}")));
        }
        if let Some(other) = owners.insert((volume, extent), number) {
            return Err(OpenError::Damaged(format!("slots {other} and {number} both hold {extent:?} of {volume}")));
        }
    }
    marks.retain(|(volume, _), _| found.catalog.volumes.contains_key(volume));
    if marks.len() > HOT_EXTENTS_MAX {
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
