//! The slot table: what each physical slot of 4 MiB holds. Kept whole in memory (32 bytes per slot, 8 MiB per TiB of
//! pool), twice on disk.
//!
//! Invariants: `slots` is what the journal's queue says, `uncommitted` tells where that is ahead of what the journal has
//! on disk; only the committed view is ever written to the table, so a table block never says what the journal might
//! still lose. A slot in `vacant` is free, no
//! discard of it is under way, and no write has taken it.

use crate::layout::{BlockKind, DESCRIPTOR_BYTES, DESCRIPTORS_PER_BLOCK, Geometry, HEADER_BYTES, Header};
use crate::layout::{table_block_of, unseal};
use crate::superblock::sealed;
use pollux_base::{Data, ExtentIndex, Generation, PoolId, VolumeId};
use std::collections::{BTreeMap, BTreeSet};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawDescriptor {
    volume: U64,
    generation: U64,
    leaf_sequence: U64,
    extent: U32,
    state: u8,
    leaf_place: u8,
    reserved: [u8; 2],
}

/// Bytes of a descriptor in a record of the journal; in the table it is followed by zeros.
pub const RAW_DESCRIPTOR_BYTES: usize = size_of::<RawDescriptor>();
const NO_PLACE: u8 = 255;

/// What a slot is used for. Life: `Free` -> `Data` <-> `Empty` -> `Free`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum SlotState {
    #[default]
    Free,
    /// Holds blocks of an extent.
    Data,
    /// The extent holds nothing any more; the slot stays to tell of that change (W8) until the replicas are in sync.
    Empty,
}

/// A slot's descriptor. For a free slot only `leaf_sequence` means anything: it goes on, so that a leaf of an earlier
/// owner is never taken for one of the next.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Slot {
    pub state: SlotState,
    pub volume: VolumeIdOrNone,
    pub extent: u32,
    /// Generation under which the extent was last changed.
    pub generation: Generation,
    /// Which of the two places holds the leaf in use; `None`: no block is valid but those that the journal names.
    pub leaf_place: Option<u8>,
    pub leaf_sequence: u64,
}

/// A volume's number; 0 in free slots.
pub type VolumeIdOrNone = u64;

impl Slot {
    /// The same slot, given up.
    pub fn freed(&self) -> Slot {
        Slot { leaf_sequence: self.leaf_sequence, ..Slot::default() }
    }

    pub fn encode(&self) -> [u8; RAW_DESCRIPTOR_BYTES] {
        let raw = RawDescriptor {
            volume: self.volume.into(),
            generation: self.generation.0.into(),
            leaf_sequence: self.leaf_sequence.into(),
            extent: self.extent.into(),
            state: match self.state {
                SlotState::Free => 0,
                SlotState::Data => 1,
                SlotState::Empty => 2,
            },
            leaf_place: self.leaf_place.unwrap_or(NO_PLACE),
            reserved: [0; 2],
        };
        zerocopy::transmute!(raw)
    }

    pub fn decode(bytes: &[u8]) -> Option<Slot> {
        let (raw, _) = RawDescriptor::ref_from_prefix(bytes).ok()?;
        let state = match raw.state {
            0 => SlotState::Free,
            1 => SlotState::Data,
            2 => SlotState::Empty,
            _ => return None,
        };
        let leaf_place = match raw.leaf_place {
            NO_PLACE => None,
            place @ (0 | 1) => Some(place),
            _ => return None,
        };
        Some(Slot {
            state,
            volume: raw.volume.get(),
            extent: raw.extent.get(),
            generation: Generation(raw.generation.get()),
            leaf_place,
            leaf_sequence: raw.leaf_sequence.get(),
        })
    }

    pub fn owner(&self) -> (VolumeId, ExtentIndex) {
        (VolumeId(self.volume), ExtentIndex(self.extent))
    }
}

/// A slot whose newest descriptor is not committed to the journal yet.
struct Uncommitted {
    committed: Slot,
    records: u32,
}

pub struct SlotTable {
    geometry: Geometry,
    slots: Vec<Slot>,
    /// Sequence of each table block, as last written.
    sequences: Vec<u64>,
    vacant: BTreeSet<u32>,
    discarding: BTreeSet<u32>,
    uncommitted: BTreeMap<u32, Uncommitted>,
    /// Table blocks that differ from the disk.
    dirty: BTreeSet<u32>,
}

impl SlotTable {
    /// `slots` and `sequences` are as read from disk, with the journal applied.
    pub fn new(geometry: Geometry, slots: Vec<Slot>, sequences: Vec<u64>) -> SlotTable {
        assert!(slots.len() == geometry.slots as usize && sequences.len() == geometry.table_blocks as usize);
        let free = slots.iter().zip(0..).filter(|(slot, _)| slot.state == SlotState::Free);
        let vacant = free.map(|(_, number)| number).collect();
        let (discarding, uncommitted, dirty) = Default::default();
        SlotTable { geometry, slots, sequences, vacant, discarding, uncommitted, dirty }
    }

    pub fn get(&self, slot: u32) -> &Slot {
        &self.slots[slot as usize]
    }

    pub fn iter(&self) -> impl Iterator<Item = (u32, &Slot)> {
        (0..).zip(&self.slots)
    }

    /// Slots that a write could take now.
    pub fn vacant(&self) -> usize {
        self.vacant.len()
    }

    /// Takes the lowest vacant slot, so that a pool in a file stays compact.
    pub fn take(&mut self) -> Option<u32> {
        self.vacant.pop_first()
    }

    /// A new descriptor was queued for the journal.
    pub fn queued(&mut self, slot: u32, descriptor: Slot) {
        let old = std::mem::replace(&mut self.slots[slot as usize], descriptor);
        self.uncommitted.entry(slot).or_insert(Uncommitted { committed: old, records: 0 }).records += 1;
        self.settle_vacancy(slot);
    }

    /// The journal has this descriptor on disk now.
    pub fn committed(&mut self, slot: u32, descriptor: Slot) {
        self.dirty.insert(table_block_of(slot));
        let entry = self.uncommitted.get_mut(&slot).expect("what is committed was queued");
        entry.committed = descriptor;
        entry.records -= 1;
        if entry.records == 0 {
            self.uncommitted.remove(&slot);
        }
    }

    pub fn discard_begins(&mut self, slot: u32) {
        self.discarding.insert(slot);
        self.vacant.remove(&slot);
    }

    pub fn discard_ended(&mut self, slot: u32) {
        self.discarding.remove(&slot);
        self.settle_vacancy(slot);
    }

    pub fn is_discarding(&self, slot: u32) -> bool {
        self.discarding.contains(&slot)
    }

    fn settle_vacancy(&mut self, slot: u32) {
        if self.slots[slot as usize].state == SlotState::Free && !self.discarding.contains(&slot) {
            self.vacant.insert(slot);
        }
    }

    /// The table blocks that must be written back, with their committed content under a new sequence.
    pub fn take_dirty(&mut self, pool: PoolId) -> Vec<(u32, Data)> {
        let dirty = std::mem::take(&mut self.dirty);
        dirty
            .into_iter()
            .map(|block| {
                self.sequences[block as usize] += 1;
                (block, self.encode_block(block, pool))
            })
            .collect()
    }

    /// Makes a table block be written back although nothing of it was changed since it was read.
    pub fn mark_dirty(&mut self, block: u32) {
        self.dirty.insert(block);
    }

    fn encode_block(&self, block: u32, pool: PoolId) -> Data {
        let mut payload = Vec::with_capacity(DESCRIPTORS_PER_BLOCK * DESCRIPTOR_BYTES);
        for number in self.geometry.slots_of_block(block) {
            let slot = self.uncommitted.get(&number).map_or(self.get(number), |entry| &entry.committed);
            payload.extend_from_slice(&slot.encode());
            payload.resize(payload.len().next_multiple_of(DESCRIPTOR_BYTES), 0);
        }
        let sequence = self.sequences[block as usize];
        let header = Header { kind: BlockKind::Table, part: block, sequence, one: 0, two: 0, len: payload.len() };
        sealed(pool, header, &payload)
    }

    pub fn check(&self) {
        for (number, slot) in self.iter() {
            let vacant = self.vacant.contains(&number);
            let discarding = self.discarding.contains(&number);
            assert!(!vacant || (slot.state == SlotState::Free && !discarding), "slot {number} is vacant and in use");
        }
    }
}

/// The blocks of an empty table.
pub fn empty_table(geometry: Geometry, pool: PoolId) -> impl Iterator<Item = Data> {
    let table = SlotTable::new(
        geometry,
        vec![Slot::default(); geometry.slots as usize],
        vec![1; geometry.table_blocks as usize],
    );
    (0..geometry.table_blocks).map(move |block| table.encode_block(block, pool))
}

/// A table block as read: its sequence and descriptors.
pub fn decode_block(bytes: &[u8], pool: PoolId, geometry: &Geometry, block: u32) -> Option<(u64, Vec<Slot>)> {
    let (header, _) = unseal(bytes, BlockKind::Table, Some(pool)).ok()?;
    let count = geometry.slots_of_block(block).len();
    if header.part != block || header.len != count * DESCRIPTOR_BYTES {
        return None;
    }
    let payload = &bytes[HEADER_BYTES..HEADER_BYTES + header.len];
    let slots: Option<Vec<Slot>> = payload.chunks_exact(DESCRIPTOR_BYTES).map(Slot::decode).collect();
    Some((header.sequence, slots?))
}
