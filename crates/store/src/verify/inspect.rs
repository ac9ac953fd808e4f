//! One disk: its metadata as far as it can be read, and everything that is wrong with it.

use super::code::Code;
use super::{Findings, ReadDisk};
use crate::catalog::{Catalog, Layer, Volume};
use crate::journal;
use crate::lanes::{FamilyId, Key};
use crate::layout::{ANCHORS, BLOCK, BlockFault, BlockKind, CATALOGS, Geometry, JOURNAL, SUPERBLOCKS, unseal};
use crate::record::Record;
use crate::recovery::{Fault, Found, Image, TableFound, examine, find_anchor};
use crate::slots::{Slot, SlotState};
use crate::superblock::{Anchor, COUNT_MAX, Superblock};
use pollux_base::unit::{BLOCK_BYTES, EXTENT_BYTES, VOLUME_BYTES_MAX};
use pollux_base::{ByteCount, Data, GroupId, PoolId, VolumeId};
use std::collections::{BTreeMap, BTreeSet};

/// Bytes read at a time.
const CHUNK_BYTES: u64 = 1 << 20;

/// A disk as its metadata describes it.
pub struct Inspected {
    pub superblock: Superblock,
    pub found: Found,
    /// Slots in use, by what they hold.
    pub owners: BTreeMap<Key, u32>,
}

impl Inspected {
    /// `None`: it cannot be told whose disk this is. `spare`: the catalog, if this disk has none that can be read.
    pub fn of(disk: &mut dyn ReadDisk, spare: Option<Catalog>, findings: &mut Findings) -> Option<Inspected> {
        let (superblock, image) = superblock(disk, findings)?;
        let (geometry, pool) = (superblock.geometry, superblock.identity.pool);
        if disk.size().0 != geometry.size {
            let text = format!("the disk has {} bytes, its superblock says {}", disk.size().0, geometry.size);
            findings.add(Code::Size, text);
        }
        let image = metadata(disk, image, pool, &geometry);
        copies(&image, pool, findings);
        let anchor = find_anchor(&image, pool).filter(|(_, anchor)| anchor.slots <= geometry.slots);
        let is_guessed = anchor.is_none();
        let anchor = anchor.unwrap_or_else(|| (0, guess_anchor(&image, pool, &geometry)));
        let mut table = TableFound::new(anchor.1.slots, &geometry);
        let blocks = u64::from(table.blocks()) * BLOCK_BYTES;
        for (copy, start) in geometry.tables.into_iter().enumerate() {
            read_all(disk, start, blocks, &mut |at, data| {
                let first = ((at - start) / BLOCK_BYTES) as u32;
                for (block, bytes) in (first..).zip(data.as_slice().chunks_exact(BLOCK)) {
                    table.take(copy, block, bytes, pool, &geometry);
                }
            });
        }
        if is_guessed {
            findings.add(Code::Anchor, "both copies of the journal's anchor are unreadable");
        } else {
            for (block, copy) in table.damaged() {
                findings.add(Code::TableCopy, format!("copy {} of slot table block {block} is damaged", copy + 1));
            }
        }
        let mut faults = Vec::new();
        let spare = spare.unwrap_or_else(|| made_up_catalog(&image, &table, anchor.1, pool, &geometry));
        let mut found = examine(&image, Some(anchor), spare, table, pool, &geometry, &mut faults)?;
        // Without an anchor all of the table is read, and what was never written of it is not damaged.
        faults.retain(|fault| !(is_guessed && matches!(fault, Fault::TableBlock(_))));
        faults.iter().for_each(|fault| findings.add(code_of(fault), fault.to_string()));
        let is_there = |(_, slot): &(u32, &Slot)| slot.state != SlotState::Free;
        let owners: BTreeMap<Key, u32> =
            (0..).zip(&found.slots).filter(is_there).map(|(number, slot)| (slot.owner(), number)).collect();
        leaks(&found, findings);
        cut_loops(&mut found.catalog);
        Some(Inspected { superblock, found, owners })
    }

    /// Bytes of data that a look at all of it reads.
    pub fn data_bytes(&self) -> ByteCount {
        ByteCount(
            self.found.slots.iter().map(|slot| slot.units.count() as u64).sum::<u64>() * crate::layout::UNIT_BYTES,
        )
    }
}

/// The superblock, and the blocks that were read for it.
pub fn superblock(disk: &mut dyn ReadDisk, findings: &mut Findings) -> Option<(Superblock, Image)> {
    let mut image = Image::default();
    let size = disk.size().0;
    for start in SUPERBLOCKS.into_iter().filter(|start| start + BLOCK_BYTES <= size) {
        read_all(disk, start, BLOCK_BYTES, &mut |at, data| image.insert(at, data));
    }
    let judged = SUPERBLOCKS.map(|start| match image.block(start) {
        Some(block) => Superblock::decode(block).map_err(Some),
        None => Err(None),
    });
    for (number, copy) in judged.iter().enumerate() {
        if copy.is_err() && judged.iter().any(Result::is_ok) {
            findings.add(Code::SuperblockCopy, format!("copy {} of the superblock is damaged", number + 1));
        }
    }
    let found = match judged {
        [Ok(first), Ok(second)] if first != second => {
            findings.add(Code::SuperblocksDiffer, "the two superblocks are of different pools");
            first
        }
        [Ok(found), _] | [_, Ok(found)] => found,
        [Err(first), Err(second)] => {
            findings.add(Code::Superblock, no_superblock(first, second));
            return None;
        }
    };
    Some((found, image))
}

fn no_superblock(first: Option<BlockFault>, second: Option<BlockFault>) -> String {
    match (first, second) {
        (Some(BlockFault::Version(version)), _) | (_, Some(BlockFault::Version(version))) => {
            format!("disk format version {version} is not known to this program")
        }
        (None, None) => "neither superblock can be read".into(),
        (None | Some(BlockFault::NoMagic), None | Some(BlockFault::NoMagic)) => "this is not a disk of a pool".into(),
        _ => "both superblocks are damaged".into(),
    }
}

/// Anchors, catalogs and journal.
fn metadata(disk: &mut dyn ReadDisk, mut image: Image, pool: PoolId, geometry: &Geometry) -> Image {
    for start in ANCHORS.into_iter().chain(CATALOGS) {
        read_all(disk, start, BLOCK_BYTES, &mut |at, data| image.insert(at, data));
    }
    for start in CATALOGS {
        let len = image.block(start).and_then(|head| Catalog::body_len(head, pool)).unwrap_or(0);
        let len = (len as u64).next_multiple_of(BLOCK_BYTES);
        read_all(disk, start + BLOCK_BYTES, len, &mut |at, data| image.insert(at, data));
    }
    read_all(disk, JOURNAL, geometry.ring.bytes(), &mut |at, data| image.insert(at, data));
    image
}

/// Reads a stretch; one bad block does not hide its neighbours.
pub fn read_all(disk: &mut dyn ReadDisk, start: u64, len: u64, take: &mut dyn FnMut(u64, Data)) {
    for at in (0..len).step_by(CHUNK_BYTES as usize) {
        let (at, len) = (start + at, CHUNK_BYTES.min(len - at) as usize);
        match disk.read(ByteCount(at), len) {
            Some(data) => take(at, data),
            None => {
                for at in (at..at + len as u64).step_by(BLOCK) {
                    if let Some(data) = disk.read(ByteCount(at), BLOCK) {
                        take(at, data);
                    }
                }
            }
        }
    }
}

/// Tells of copies of which the other one is whole.
fn copies(image: &Image, pool: PoolId, findings: &mut Findings) {
    let anchors = ANCHORS.map(|start| image.block(start).and_then(|block| Anchor::decode(block, pool)).is_some());
    let catalogs = CATALOGS.map(|start| image.catalog(start, pool).is_some());
    for (code, name, is_whole) in
        [(Code::AnchorCopy, "journal's anchor", anchors), (Code::CatalogCopy, "catalog", catalogs)]
    {
        for (number, _) in is_whole.iter().enumerate().filter(|(_, one)| !**one && is_whole.contains(&true)) {
            findings.add(code, format!("copy {} of the {name} is damaged", number + 1));
        }
    }
}

/// Without an anchor: the journal of the newest life that has blocks in the ring, from the first of those that follow each
/// other up to the last. What was said before it is in the table, unless the anchor was lost right at a checkpoint.
fn guess_anchor(image: &Image, pool: PoolId, geometry: &Geometry) -> Anchor {
    let ring = geometry.ring;
    let headers: Vec<_> = (0..ring.blocks)
        .filter_map(|place| {
            let (header, _) = unseal(image.block(ring.offset(place))?, BlockKind::Journal, Some(pool)).ok()?;
            (ring.place(header.sequence) == place && header.sequence < COUNT_MAX).then_some(header)
        })
        .collect();
    let life = headers.iter().map(|header| header.one).max().unwrap_or(1);
    let blocks: BTreeSet<u64> = headers.iter().filter(|header| header.one == life).map(|h| h.sequence).collect();
    let mut tail = blocks.last().copied().unwrap_or(1);
    while let Some(before) = tail.checked_sub(1).filter(|before| blocks.contains(before)) {
        tail = before;
    }
    Anchor { sequence: 0, tail, durable: 0, log_life: life, life, end: 0, slots: geometry.slots }
}

/// Without a catalog each layer is a volume of its own, under the layer's number: what its own extents hold can be had.
fn made_up_catalog(image: &Image, table: &TableFound, anchor: Anchor, pool: PoolId, geometry: &Geometry) -> Catalog {
    let ring = geometry.ring;
    let journal = journal::find(|at| image.block(at), pool, ring, anchor.log_life, anchor.tail, anchor.durable, None);
    let told = journal.records.iter().filter_map(|(_, record)| match record {
        Record::Slot { descriptor, .. } | Record::Merge { descriptor, .. } => Some(&**descriptor),
        _ => None,
    });
    let mut catalog = Catalog::default();
    for slot in table.slots().iter().chain(told).filter(|slot| slot.state != SlotState::Free) {
        let (layer, extent) = slot.owner();
        let (family, group) = (FamilyId(layer.0), GroupId(0));
        catalog.layers.entry(layer).or_insert(Layer { family, parent: None, foreign: None, replaced: None });
        let volume = catalog.volumes.entry(VolumeId(layer.0)).or_insert(Volume { group, size: ByteCount(0), layer });
        let end = (u64::from(extent.0) + 1) * EXTENT_BYTES;
        volume.size = volume.size.max(ByteCount(end.min(VOLUME_BYTES_MAX)));
    }
    catalog
}

fn code_of(fault: &Fault) -> Code {
    match fault {
        Fault::Anchors => Code::Anchor,
        Fault::Catalogs => Code::Catalog,
        Fault::TableBlock(_) => Code::Table,
        Fault::Journal(_) => Code::Journal,
        Fault::JournalSlot { .. } => Code::JournalSlot,
        Fault::SlotBeyond { .. } => Code::ExtentBeyond,
        Fault::SlotTwice { .. } => Code::ExtentTwice,
        Fault::VolumeWithoutLayer { .. } => Code::VolumeWithoutLayer,
        Fault::LayerWithoutParent(_) => Code::LayerChain,
        Fault::MarksTooMany(_) => Code::Marks,
        Fault::UnitTwice { .. } => Code::UnitTwice,
        Fault::LeafTwice { .. } => Code::LeafTwice,
    }
}

/// Which units are free follows from the slots, so space leaks only in slots that nobody shows.
fn leaks(found: &Found, findings: &mut Findings) {
    let catalog = &found.catalog;
    let mut shown = BTreeSet::new();
    for volume in catalog.volumes.values() {
        let mut layer = Some(volume.layer);
        while let Some(known) = layer.filter(|layer| shown.insert(*layer)) {
            layer = catalog.layers.get(&known).and_then(|layer| layer.parent);
        }
    }
    for layer in catalog.layers.keys().filter(|layer| !shown.contains(layer)) {
        let units: usize = found.slots.iter().filter(|slot| slot.layer == *layer).map(|slot| slot.units.count()).sum();
        findings.add(Code::SpaceLeaked, format!("no volume shows {layer:?}, which holds {units} units of 32 KiB"));
    }
    for (number, slot) in (0u32..).zip(&found.slots) {
        if slot.state == SlotState::Empty && !found.hot.contains_key(&slot.owner()) && slot.units.count() > 0 {
            let text = format!("slot {number} holds nothing in {} units of 32 KiB", slot.units.count());
            findings.add(Code::SpaceLeaked, text);
        }
    }
}

/// So that every chain ends, also in a catalog that says otherwise.
fn cut_loops(catalog: &mut Catalog) {
    for (id, layer) in &mut catalog.layers {
        layer.parent = layer.parent.filter(|parent| parent < id);
    }
}
