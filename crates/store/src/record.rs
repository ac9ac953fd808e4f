//! Records of the journal. Each states how something is from now on, so that reading a stretch of the journal twice, or
//! over a table that is newer already, ends in the same state.

use crate::layout::PAYLOAD_BYTES;
use crate::leaf::SUMS;
use crate::slots::{LayerId, Slot, SlotState, checked};
use crate::units::UnitRun;
use pollux_base::{BlockChecksum, ExtentIndex, Generation};

/// Checksums in one `Valid` record: short enough that records fill blocks of the journal well.
pub const VALID_BLOCKS_MAX: usize = 128;

/// Slots in one `Forget` record: it must fit a block.
pub const FORGET_SLOTS_MAX: usize = (PAYLOAD_BYTES - 4) / 12;

/// Likewise in one `Lose` record.
pub const LOSE_SLOTS_MAX: usize = (PAYLOAD_BYTES - 16) / 14;

/// One bit per block of an extent.
pub type Bitmap = [u8; SUMS / 8];

pub fn bit(map: &Bitmap, block: usize) -> bool {
    map[block / 8] & (1 << (block % 8)) != 0
}
pub fn set_bit(map: &mut Bitmap, block: usize) {
    map[block / 8] |= 1 << (block % 8);
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// The extent may have writes in flight under this generation (W7).
    Hot { layer: LayerId, extent: ExtentIndex, generation: Generation },
    /// The mark is taken back.
    Cold { layer: LayerId, extent: ExtentIndex },
    /// The slot's descriptor. What earlier records said of its blocks is over: the leaf it names is the truth.
    Slot { slot: u32, descriptor: Box<Slot> },
    /// Where these units of the slot's extent lie from now on; `NO_UNIT`: they are given back.
    Unit { slot: u32, run: UnitRun },
    /// Blocks that held nothing were written, with these checksums. Until the journal says that a flush came after
    /// (`durable` of a later block), a block whose bytes do not match was lost with the power and still holds nothing.
    Valid { slot: u32, first: u16, checksums: Vec<BlockChecksum> },
    /// These blocks hold nothing any more.
    Zero { slot: u32, first: u16, count: u16 },
    /// These blocks read as zeros, whatever the layers beneath hold.
    Hole { slot: u32, first: u16, count: u16 },
    /// A slot of a layer that is given up became a part of one above: the first replaces the descriptor of `into`, `from` is
    /// free.
    Merge { into: u32, descriptor: Box<Slot>, from: u32, leaf_sequence: u64 },
    /// These slots are free, all of them or none: their extent lives on another disk. With each its `leaf_sequence`.
    Forget { slots: Vec<(u32, u64)> },
    /// These slots of the extent, each of a layer, are damaged, all of them or none: so many blocks from the first on are lost.
    Lose { extent: ExtentIndex, generation: Generation, slots: Vec<(u32, LayerId, u16)> },
    /// Restates all blocks of a hot extent, so that the journal can forget the records before.
    Mask(Box<Mask>),
}

/// Two bits tell what a block is when no `Valid` record is on top of it; `keep` whether one may be.
///
/// | stated | valid | the block |
/// |---|---|---|
/// | 0 | 0 | is as the leaf, or records before this one, have it |
/// | 0 | 1 | is lost: nothing can vouch for it |
/// | 1 | 0 | holds nothing; with `hole` it hides what lies beneath |
/// | 1 | 1 | holds data, flushed |
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mask {
    pub slot: u32,
    pub stated: Bitmap,
    pub valid: Bitmap,
    pub keep: Bitmap,
    pub hole: Bitmap,
}

impl Mask {
    pub fn new(slot: u32) -> Mask {
        Mask { slot, stated: [0; SUMS / 8], valid: [0; SUMS / 8], keep: [0; SUMS / 8], hole: [0; SUMS / 8] }
    }
}

const HOT: u8 = 1;
const COLD: u8 = 2;
const SLOT: u8 = 3;
const VALID: u8 = 4;
const ZERO: u8 = 5;
const MASK: u8 = 6;
const UNIT: u8 = 7;
const HOLE: u8 = 8;
const MERGE: u8 = 9;
const FORGET: u8 = 10;
const LOSE: u8 = 11;

impl Record {
    /// Whether whoever asked for it waits until it is on stable storage, not just out of this process.
    pub fn is_sync(&self) -> bool {
        matches!(
            self,
            Record::Hot { .. }
                | Record::Cold { .. }
                | Record::Merge { .. }
                | Record::Forget { .. }
                | Record::Lose { .. }
        )
    }

    /// What each slot of a `Lose` is from then on; `leaf_sequence`: as it was.
    pub fn lost_slot(
        layer: LayerId,
        extent: ExtentIndex,
        lost: u16,
        generation: Generation,
        leaf_sequence: u64,
    ) -> Slot {
        Slot { state: SlotState::Damaged, layer, extent: extent.0, generation, lost, leaf_sequence, ..Slot::default() }
    }

    /// The slots that it is about.
    pub fn slots(&self) -> Vec<u32> {
        match self {
            Record::Hot { .. } | Record::Cold { .. } => Vec::new(),
            Record::Slot { slot, .. }
            | Record::Unit { slot, .. }
            | Record::Valid { slot, .. }
            | Record::Zero { slot, .. }
            | Record::Hole { slot, .. } => vec![*slot],
            Record::Merge { into, from, .. } => vec![*into, *from],
            Record::Forget { slots } => slots.iter().map(|(slot, _)| *slot).collect(),
            Record::Lose { slots, .. } => slots.iter().map(|(slot, ..)| *slot).collect(),
            Record::Mask(mask) => vec![mask.slot],
        }
    }

    /// Bytes of the record on disk.
    pub fn encoded_len(&self) -> usize {
        match self {
            Record::Hot { .. } => 24,
            Record::Cold { .. } => 16,
            Record::Slot { descriptor, .. } => 8 + descriptor.record_len(),
            Record::Unit { .. } => 16,
            Record::Valid { checksums, .. } => 12 + 8 * checksums.len(),
            Record::Zero { .. } | Record::Hole { .. } => 12,
            Record::Merge { descriptor, .. } => 20 + descriptor.record_len(),
            Record::Forget { slots } => 4 + 12 * slots.len(),
            Record::Lose { slots, .. } => 16 + 14 * slots.len(),
            Record::Mask(_) => 8 + 4 * SUMS / 8,
        }
    }

    /// Appends the record: kind, a zero byte, length (all little-endian), then its fields.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        let kind = match self {
            Record::Hot { .. } => HOT,
            Record::Cold { .. } => COLD,
            Record::Slot { .. } => SLOT,
            Record::Unit { .. } => UNIT,
            Record::Valid { .. } => VALID,
            Record::Zero { .. } => ZERO,
            Record::Hole { .. } => HOLE,
            Record::Merge { .. } => MERGE,
            Record::Forget { .. } => FORGET,
            Record::Lose { .. } => LOSE,
            Record::Mask(_) => MASK,
        };
        let len = self.encoded_len() as u16;
        out.extend_from_slice(&[kind, 0]);
        out.extend_from_slice(&len.to_le_bytes());
        match self {
            Record::Hot { layer, extent, generation } => {
                out.extend_from_slice(&extent.0.to_le_bytes());
                out.extend_from_slice(&layer.0.to_le_bytes());
                out.extend_from_slice(&generation.0.to_le_bytes());
            }
            Record::Cold { layer, extent } => {
                out.extend_from_slice(&extent.0.to_le_bytes());
                out.extend_from_slice(&layer.0.to_le_bytes());
            }
            Record::Slot { slot, descriptor } => {
                out.extend_from_slice(&slot.to_le_bytes());
                descriptor.encode_record(out);
            }
            Record::Unit { slot, run } => {
                out.extend_from_slice(&slot.to_le_bytes());
                out.extend_from_slice(&run.first.to_le_bytes());
                out.extend_from_slice(&run.count.to_le_bytes());
                out.extend_from_slice(&run.unit.to_le_bytes());
            }
            Record::Valid { slot, first, checksums } => {
                out.extend_from_slice(&slot.to_le_bytes());
                out.extend_from_slice(&first.to_le_bytes());
                out.extend_from_slice(&(checksums.len() as u16).to_le_bytes());
                checksums.iter().for_each(|sum| out.extend_from_slice(&sum.0.to_le_bytes()));
            }
            Record::Merge { into, descriptor, from, leaf_sequence } => {
                out.extend_from_slice(&into.to_le_bytes());
                out.extend_from_slice(&from.to_le_bytes());
                out.extend_from_slice(&leaf_sequence.to_le_bytes());
                descriptor.encode_record(out);
            }
            Record::Zero { slot, first, count } | Record::Hole { slot, first, count } => {
                out.extend_from_slice(&slot.to_le_bytes());
                out.extend_from_slice(&first.to_le_bytes());
                out.extend_from_slice(&count.to_le_bytes());
            }
            Record::Forget { slots } => {
                for (slot, leaf_sequence) in slots {
                    out.extend_from_slice(&slot.to_le_bytes());
                    out.extend_from_slice(&leaf_sequence.to_le_bytes());
                }
            }
            Record::Lose { extent, generation, slots } => {
                out.extend_from_slice(&extent.0.to_le_bytes());
                out.extend_from_slice(&generation.0.to_le_bytes());
                for (slot, layer, blocks) in slots {
                    out.extend_from_slice(&slot.to_le_bytes());
                    out.extend_from_slice(&layer.0.to_le_bytes());
                    out.extend_from_slice(&blocks.to_le_bytes());
                }
            }
            Record::Mask(mask) => {
                out.extend_from_slice(&mask.slot.to_le_bytes());
                for map in [&mask.stated, &mask.valid, &mask.keep, &mask.hole] {
                    out.extend_from_slice(map);
                }
            }
        }
        assert_eq!(out.len() - start, usize::from(len), "a record is as long as it says");
    }

    /// The first record of `bytes` and the rest. `None`: these bytes are no record.
    pub fn decode(bytes: &[u8]) -> Option<(Record, &[u8])> {
        let (head, _) = bytes.split_first_chunk::<4>()?;
        let (record, rest) = bytes.split_at_checked(usize::from(u16::from_le_bytes([head[2], head[3]])))?;
        let mut fields = Fields(record.get(4..)?);
        let record = match head[0] {
            HOT => {
                let (extent, layer) = (ExtentIndex(fields.u32()?), LayerId(fields.u64()?));
                Record::Hot { layer, extent, generation: Generation(fields.u64()?) }
            }
            COLD => {
                let extent = ExtentIndex(fields.u32()?);
                Record::Cold { layer: LayerId(fields.u64()?), extent }
            }
            SLOT => {
                let slot = fields.u32()?;
                let descriptor = Slot::decode_record(fields.take(fields.0.len())?)?;
                Record::Slot { slot, descriptor: Box::new(descriptor) }
            }
            UNIT => {
                let (slot, first, count) = (fields.u32()?, fields.u16()?, fields.u16()?);
                Record::Unit { slot, run: checked(UnitRun { first, count, unit: fields.u32()? })? }
            }
            VALID => {
                let (slot, first, count) = (fields.u32()?, fields.u16()?, fields.u16()?);
                in_extent(first, count)?;
                let checksums: Option<_> = (0..count).map(|_| fields.u64().map(BlockChecksum)).collect();
                Record::Valid { slot, first, checksums: checksums? }
            }
            ZERO | HOLE => {
                let (slot, first, count) = (fields.u32()?, fields.u16()?, fields.u16()?);
                in_extent(first, count)?;
                if head[0] == ZERO { Record::Zero { slot, first, count } } else { Record::Hole { slot, first, count } }
            }
            MERGE => {
                let (into, from, leaf_sequence) = (fields.u32()?, fields.u32()?, fields.u64()?);
                let descriptor = Box::new(Slot::decode_record(fields.take(fields.0.len())?)?);
                Record::Merge { into, descriptor, from, leaf_sequence }
            }
            FORGET => {
                let mut slots = Vec::new();
                while !fields.0.is_empty() {
                    slots.push((fields.u32()?, fields.u64()?));
                }
                Record::Forget { slots }
            }
            LOSE => {
                let (extent, generation) = (ExtentIndex(fields.u32()?), Generation(fields.u64()?));
                let mut slots = Vec::new();
                while !fields.0.is_empty() {
                    let (slot, layer, blocks) = (fields.u32()?, LayerId(fields.u64()?), fields.u16()?);
                    in_extent(0, blocks)?;
                    slots.push((slot, layer, blocks));
                }
                Record::Lose { extent, generation, slots }
            }
            MASK => {
                let slot = fields.u32()?;
                let mut map = || Some(Bitmap::try_from(fields.take(SUMS / 8)?).expect("as many as asked for"));
                Record::Mask(Box::new(Mask { slot, stated: map()?, valid: map()?, keep: map()?, hole: map()? }))
            }
            _ => return None,
        };
        fields.0.is_empty().then_some((record, rest))
    }
}

fn in_extent(first: u16, count: u16) -> Option<()> {
    (usize::from(first) + usize::from(count) <= SUMS).then_some(())
}

struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }
    fn u16(&mut self) -> Option<u16> {
        self.take(2)?.try_into().ok().map(u16::from_le_bytes)
    }
    fn u32(&mut self) -> Option<u32> {
        self.take(4)?.try_into().ok().map(u32::from_le_bytes)
    }
    fn u64(&mut self) -> Option<u64> {
        self.take(8)?.try_into().ok().map(u64::from_le_bytes)
    }
}

/// Packs records into payloads of journal blocks, in order, at most `blocks_max`. Gives the payloads and how many records
/// went in.
pub fn pack<'a>(records: impl Iterator<Item = &'a Record>, blocks_max: usize) -> (Vec<Vec<u8>>, usize) {
    let mut blocks: Vec<Vec<u8>> = Vec::new();
    let mut packed = 0;
    for record in records {
        let fits = blocks.last().is_some_and(|block| block.len() + record.encoded_len() <= PAYLOAD_BYTES);
        if !fits {
            if blocks.len() == blocks_max {
                break;
            }
            blocks.push(Vec::with_capacity(PAYLOAD_BYTES));
        }
        record.encode(blocks.last_mut().expect("a block was just begun"));
        packed += 1;
    }
    (blocks, packed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::LeafPlace;
    use crate::units::NO_UNIT;

    fn examples() -> Vec<Record> {
        let mut mask = Mask::new(9);
        set_bit(&mut mask.stated, 3);
        set_bit(&mut mask.keep, 1023);
        let (layer, extent) = (LayerId(1), ExtentIndex(2));
        let leaf = Some(LeafPlace { unit: 77, block: 1, blocks: 3 });
        let mut descriptor = Slot { state: SlotState::Data, layer, extent: 2, leaf, ..Slot::default() };
        [(3, 8), (4, 9), (6, 2)].into_iter().for_each(|(index, unit)| descriptor.units.set(index, unit));
        let descriptor = Box::new(descriptor);
        vec![
            Record::Hot { layer, extent, generation: Generation(3) },
            Record::Cold { layer, extent },
            Record::Slot { slot: 4, descriptor },
            Record::Unit { slot: 4, run: UnitRun { first: 5, count: 2, unit: 100 } },
            Record::Unit { slot: 4, run: UnitRun { first: 0, count: 9, unit: NO_UNIT } },
            Record::Valid { slot: 4, first: 1000, checksums: vec![BlockChecksum(5); 24] },
            Record::Zero { slot: 4, first: 0, count: 1024 },
            Record::Hole { slot: 4, first: 1023, count: 1 },
            Record::Merge { into: 4, descriptor: Box::new(Slot::default()), from: 5, leaf_sequence: 6 },
            Record::Forget { slots: vec![(4, 7), (9, 0)] },
            Record::Lose { extent: ExtentIndex(7), generation: Generation(2), slots: vec![(4, layer, 1000)] },
            Record::Mask(Box::new(mask)),
        ]
    }

    #[test]
    fn records_survive_the_way_to_disk_and_back() {
        let records = examples();
        let (blocks, packed) = pack(records.iter(), 1);
        assert_eq!((blocks.len(), packed), (1, records.len()));
        let mut rest = blocks[0].as_slice();
        for record in &records {
            let (decoded, more) = Record::decode(rest).expect("it was just encoded");
            assert_eq!(decoded, *record);
            rest = more;
        }
        assert!(rest.is_empty());
    }

    #[test]
    fn bytes_that_are_no_record_are_refused_without_panic() {
        for record in examples() {
            let mut bytes = Vec::new();
            record.encode(&mut bytes);
            for len in 0..bytes.len() {
                assert_eq!(Record::decode(&bytes[..len]), None);
            }
            for at in 0..8.min(bytes.len()) {
                for value in 0..=255 {
                    let mut changed = bytes.clone();
                    changed[at] = value;
                    let _ = Record::decode(&changed);
                }
            }
        }
        assert_eq!(Record::decode(&[0, 0, 0, 0]), None);
    }

    #[test]
    fn blocks_are_never_filled_beyond_their_room() {
        let records =
            vec![Record::Valid { slot: 0, first: 0, checksums: vec![BlockChecksum(1); VALID_BLOCKS_MAX] }; 50];
        let (blocks, packed) = pack(records.iter(), 10);
        assert!(blocks.iter().all(|block| block.len() <= PAYLOAD_BYTES));
        assert_eq!((blocks.len(), packed), (10, 30));
    }
}
