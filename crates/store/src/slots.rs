//! The slot table: which extents there are and where their units and leaves lie. A slot is a record of one extent, not a
//! place. Kept in memory as far as slots are in use (72 bytes each, and 512 more for an extent whose units lie here and
//! there), twice on disk.
//!
//! Invariants: this is what the journal has on disk, never ahead of it, so that a table block never says what the journal
//! might still lose. What is queued for the journal is with whoever queued it: the hot extent, or a deletion. A slot in
//! `vacant` is free and no extent has taken it. Slots beyond `slots` were never used: on disk there is nothing of them.

use crate::layout::{BLOCK, BlockKind, DESCRIPTOR_BYTES, DESCRIPTORS_PER_BLOCK, Geometry, HEADER_BYTES, Header};
use crate::layout::{LeafPlace, UNIT_BLOCKS, UNITS, table_block_of, unseal};
use crate::leaf::{LOST_CHECKSUM, SUMS, Sums};
use crate::superblock::{COUNT_MAX, sealed};
use crate::units::{NO_UNIT, UnitRun, Units};
use pollux_base::{Data, ExtentIndex, Generation, PoolId};
use std::collections::BTreeSet;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// One layer of a volume, by a number of this pool's own.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct LayerId(pub u64);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawDescriptor {
    layer: U64,
    generation: U64,
    leaf_sequence: U64,
    extent: U32,
    state: u8,
    leaf_blocks: u8,
    leaf_block: u8,
    reserved: u8,
    leaf_unit: U32,
}

/// Bytes of a descriptor without its units.
pub const RAW_DESCRIPTOR_BYTES: usize = size_of::<RawDescriptor>();
const UNITS_OFFSET: usize = DESCRIPTOR_BYTES - 4 * UNITS;
/// Bytes of a run of units in a record of the journal.
const RUN_BYTES: usize = 8;

/// What a slot is used for. Life: `Free` -> `Data` or `Damaged` <-> `Empty` -> `Free`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum SlotState {
    #[default]
    Free,
    /// Holds blocks of an extent.
    Data,
    /// The extent holds nothing any more; the slot stays to tell of that change (W8) until the replicas are in sync.
    Empty,
    /// The same as `Data`, and some of the blocks are lost: another replica may have them.
    Damaged,
}

impl SlotState {
    pub fn holds_data(self) -> bool {
        matches!(self, SlotState::Data | SlotState::Damaged)
    }

    /// Of a slot with these checksums.
    pub fn of(sums: &Sums) -> SlotState {
        match sums.iter().any(|sum| !sum.is_zero()) {
            false => SlotState::Empty,
            true if sums.contains(&LOST_CHECKSUM) => SlotState::Damaged,
            true => SlotState::Data,
        }
    }
}

/// A slot's descriptor. For a free slot only `leaf_sequence` means anything: it goes on, so that a leaf of an earlier
/// owner is never taken for one of the next.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Slot {
    pub state: SlotState,
    pub layer: LayerId,
    pub extent: u32,
    /// Generation under which the extent was last changed.
    pub generation: Generation,
    /// Where the leaf in use lies; `None`: no block is valid but those that the journal names.
    pub leaf: Option<LeafPlace>,
    /// Of a damaged slot without a leaf: so many blocks from the first on are lost.
    pub lost: u16,
    pub leaf_sequence: u64,
    pub units: Units,
}

impl Slot {
    /// The same slot, given up.
    pub fn freed(&self) -> Slot {
        Slot { leaf_sequence: self.leaf_sequence, ..Slot::default() }
    }

    pub fn owner(&self) -> (LayerId, ExtentIndex) {
        (self.layer, ExtentIndex(self.extent))
    }

    fn raw(&self) -> [u8; RAW_DESCRIPTOR_BYTES] {
        let raw = RawDescriptor {
            layer: self.layer.0.into(),
            generation: self.generation.0.into(),
            leaf_sequence: self.leaf_sequence.into(),
            extent: self.extent.into(),
            state: match self.state {
                SlotState::Free => 0,
                SlotState::Data => 1,
                SlotState::Empty => 2,
                SlotState::Damaged => 3,
            },
            leaf_blocks: self.leaf.map_or(0, |leaf| leaf.blocks),
            leaf_block: self.leaf.map_or(0, |leaf| leaf.block),
            reserved: 0,
            leaf_unit: self.leaf.map_or(u32::from(self.lost), |leaf| leaf.unit).into(),
        };
        zerocopy::transmute!(raw)
    }

    fn from_raw(bytes: &[u8]) -> Option<Slot> {
        let (raw, _) = RawDescriptor::ref_from_prefix(bytes).ok()?;
        let state = match raw.state {
            0 => SlotState::Free,
            1 => SlotState::Data,
            2 => SlotState::Empty,
            3 => SlotState::Damaged,
            _ => return None,
        };
        let (unit, block, blocks) = (raw.leaf_unit.get(), raw.leaf_block, raw.leaf_blocks);
        if usize::from(block) + usize::from(blocks) > UNIT_BLOCKS || raw.leaf_sequence.get() >= COUNT_MAX {
            return None;
        }
        let lost = match (state, blocks) {
            (SlotState::Damaged, 0) => u16::try_from(unit).ok().filter(|lost| usize::from(*lost) <= SUMS)?,
            _ => 0,
        };
        Some(Slot {
            state,
            layer: LayerId(raw.layer.get()),
            extent: raw.extent.get(),
            generation: Generation(raw.generation.get()),
            leaf: (blocks > 0).then_some(LeafPlace { unit, block, blocks }),
            lost,
            leaf_sequence: raw.leaf_sequence.get(),
            units: Units::default(),
        })
    }

    /// Bytes in a record of the journal.
    pub fn record_len(&self) -> usize {
        RAW_DESCRIPTOR_BYTES + self.units.runs().len() * RUN_BYTES
    }

    /// For a record of the journal: the descriptor, then its units as runs.
    pub fn encode_record(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.raw());
        for run in self.units.runs() {
            out.extend_from_slice(&run.first.to_le_bytes());
            out.extend_from_slice(&run.count.to_le_bytes());
            out.extend_from_slice(&run.unit.to_le_bytes());
        }
    }

    pub fn decode_record(bytes: &[u8]) -> Option<Slot> {
        let (raw, runs) = bytes.split_at_checked(RAW_DESCRIPTOR_BYTES)?;
        let mut slot = Slot::from_raw(raw)?;
        if runs.len() % RUN_BYTES != 0 {
            return None;
        }
        for run in runs.chunks_exact(RUN_BYTES) {
            let (first, rest) = run.split_first_chunk::<2>()?;
            let (count, unit) = rest.split_first_chunk::<2>()?;
            let (first, count) = (u16::from_le_bytes(*first), u16::from_le_bytes(*count));
            let run = UnitRun { first, count, unit: u32::from_le_bytes(unit.try_into().ok()?) };
            slot.units.set_run(checked(run).filter(|run| run.unit != NO_UNIT)?);
        }
        Some(slot)
    }

    /// For the table: the descriptor, zeros, then a number for each unit.
    fn encode_table(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&self.raw());
        out.resize(start + UNITS_OFFSET, 0);
        for index in 0..UNITS {
            out.extend_from_slice(&self.units.get(index).unwrap_or(NO_UNIT).to_le_bytes());
        }
    }

    fn decode_table(bytes: &[u8]) -> Option<Slot> {
        let mut slot = Slot::from_raw(bytes)?;
        for (index, unit) in bytes.get(UNITS_OFFSET..)?.chunks_exact(4).enumerate() {
            let unit = u32::from_le_bytes(unit.try_into().ok()?);
            if unit != NO_UNIT {
                slot.units.set(index, unit);
            }
        }
        Some(slot)
    }
}

/// A run that lies in an extent and whose numbers do not run over.
pub fn checked(run: UnitRun) -> Option<UnitRun> {
    let inside = usize::from(run.first) + usize::from(run.count) <= UNITS;
    let sane = run.unit == NO_UNIT || run.unit.checked_add(u32::from(run.count)).is_some();
    (inside && sane).then_some(run)
}

pub struct SlotTable {
    geometry: Geometry,
    slots: Vec<Slot>,
    vacant: BTreeSet<u32>,
    /// Table blocks that differ from the disk.
    dirty: BTreeSet<u32>,
    /// Of the table blocks that are written next: the life of the pool in the high half, so that it never falls.
    sequence: u64,
}

impl SlotTable {
    /// `slots` are as read from disk, with the journal applied.
    pub fn new(geometry: Geometry, slots: Vec<Slot>, life: u64) -> SlotTable {
        assert!(slots.len() <= geometry.slots as usize, "no more slots than there are");
        let free = slots.iter().zip(0..).filter(|(slot, _)| slot.state == SlotState::Free);
        let vacant = free.map(|(_, number)| number).collect();
        SlotTable { geometry, slots, vacant, dirty: BTreeSet::new(), sequence: life << 32 }
    }

    pub fn get(&self, slot: u32) -> &Slot {
        &self.slots[slot as usize]
    }

    pub fn iter(&self) -> impl Iterator<Item = (u32, &Slot)> {
        (0..).zip(&self.slots)
    }

    /// Slots of which there is something on disk, or soon will be.
    pub fn len(&self) -> u32 {
        self.slots.len() as u32
    }

    /// Slots that an extent could take now.
    pub fn vacant(&self) -> usize {
        self.vacant.len() + (self.geometry.slots - self.len()) as usize
    }

    /// Takes the lowest vacant slot, so that little of the table is in use.
    pub fn take(&mut self) -> Option<u32> {
        if let Some(slot) = self.vacant.pop_first() {
            return Some(slot);
        }
        let next = self.len();
        (next < self.geometry.slots).then(|| {
            self.slots.push(Slot::default());
            // The next checkpoint makes this block of the table a part of what is read at open.
            self.dirty.insert(table_block_of(next));
            next
        })
    }

    /// Gives back a slot of which no record ever told.
    pub fn give_back(&mut self, slot: u32) {
        assert!(self.get(slot).state == SlotState::Free, "only a free slot is given back like this");
        self.vacant.insert(slot);
    }

    /// The journal has this descriptor on disk now. Gives the one before.
    pub fn committed(&mut self, slot: u32, descriptor: Slot) -> Slot {
        self.dirty.insert(table_block_of(slot));
        if descriptor.state == SlotState::Free {
            self.vacant.insert(slot);
        }
        std::mem::replace(&mut self.slots[slot as usize], descriptor)
    }

    /// The journal says where these units lie now. Gives those that lay there before.
    pub fn committed_units(&mut self, slot: u32, run: UnitRun) -> Vec<u32> {
        self.dirty.insert(table_block_of(slot));
        let units = &mut self.slots[slot as usize].units;
        let places = usize::from(run.first)..usize::from(run.first + run.count);
        let before = places.filter_map(|index| units.get(index)).collect();
        units.set_run(run);
        before
    }

    /// The table blocks that must be written back, under a new sequence.
    pub fn take_dirty(&mut self, pool: PoolId) -> Vec<(u32, Data)> {
        self.sequence += 1;
        let dirty = std::mem::take(&mut self.dirty);
        dirty.into_iter().map(|block| (block, self.encode_block(block, pool))).collect()
    }

    /// Whether the block differs from the disk.
    pub fn is_dirty(&self, block: u32) -> bool {
        self.dirty.contains(&block)
    }

    /// Whether these are the slots of a block. Of a free one nothing else counts.
    pub fn says(&self, block: u32, slots: &[Slot]) -> bool {
        let unused = Slot::default();
        let known =
            self.geometry.slots_of_block(block).map(|number| self.slots.get(number as usize).unwrap_or(&unused));
        let same = |(known, told): (&Slot, &Slot)| {
            known == told || known.state == SlotState::Free && told.state == SlotState::Free
        };
        known.zip(slots).all(same)
    }

    /// Makes a table block be written back although nothing of it was changed since it was read.
    pub fn mark_dirty(&mut self, block: u32) {
        self.dirty.insert(block);
    }

    fn encode_block(&self, block: u32, pool: PoolId) -> Data {
        let mut payload = Vec::with_capacity(BLOCK);
        let unused = Slot::default();
        for number in self.geometry.slots_of_block(block) {
            self.slots.get(number as usize).unwrap_or(&unused).encode_table(&mut payload);
        }
        let header =
            Header { kind: BlockKind::Table, part: block, sequence: self.sequence, one: 0, two: 0, len: payload.len() };
        sealed(pool, header, &payload)
    }

    pub fn check(&self) {
        for number in &self.vacant {
            assert!(self.get(*number).state == SlotState::Free, "slot {number} is vacant and in use");
        }
    }
}

/// Blocks of the table that hold anything when so many slots do.
pub fn table_blocks_for(slots: u32) -> u32 {
    slots.div_ceil(DESCRIPTORS_PER_BLOCK as u32)
}

/// A table block as read: its sequence and descriptors.
pub fn decode_block(bytes: &[u8], pool: PoolId, geometry: &Geometry, block: u32) -> Option<(u64, Vec<Slot>)> {
    let (header, _) = unseal(bytes, BlockKind::Table, Some(pool)).ok()?;
    let count = geometry.slots_of_block(block).len();
    if header.part != block || header.len != count * DESCRIPTOR_BYTES {
        return None;
    }
    let payload = &bytes[HEADER_BYTES..HEADER_BYTES + header.len];
    let slots: Option<Vec<Slot>> = payload.chunks_exact(DESCRIPTOR_BYTES).map(Slot::decode_table).collect();
    Some((header.sequence, slots?))
}
