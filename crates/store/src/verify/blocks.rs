//! The blocks of one extent of one layer: what the leaf and the journal say of them, and whether the data agrees.

use super::code::Code;
use super::inspect::Inspected;
use super::{Counts, Findings, ReadDisk, Watch};
use crate::catalog::Catalog;
use crate::hot::{Base, Recovered};
use crate::lanes::Key;
use crate::layout::{BLOCK, UNIT_BLOCKS, UNIT_BYTES};
use crate::leaf::{self, HOLE_CHECKSUM, LOST_CHECKSUM, LeafOwner, SUMS, Sums};
use crate::slots::{Slot, SlotState};
use pollux_base::unit::BLOCK_BYTES;
use pollux_base::{BlockChecksum, ByteCount, Data};

/// What is known of a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BlockIs {
    Nothing,
    /// Zeros, whatever lies beneath.
    Hole,
    Data(BlockChecksum),
    /// Data that was being written when the pool was last in use: its checksum was in memory only.
    Hot,
    /// Nothing can vouch for it.
    Lost,
}

/// Blocks of one extent.
pub struct Extent {
    pub blocks: Vec<BlockIs>,
    /// Whether every block of its leaf could be read.
    is_leaf_whole: bool,
    /// Blocks of data that have no place.
    placeless: u64,
}

impl Inspected {
    /// The slot that holds an extent of a layer.
    fn slot(&self, number: u32) -> Option<&Slot> {
        self.found.slots.get(number as usize).filter(|slot| slot.state != SlotState::Free)
    }

    /// What is known of the blocks of a slot's extent.
    pub fn extent(&self, disk: &mut dyn ReadDisk, number: u32) -> Option<Extent> {
        let slot = self.slot(number)?;
        let (sums, is_leaf_whole) = self.leaf(disk, number, slot);
        let hot = self.found.hot.get(&slot.owner()).filter(|hot| hot.slot == Some(number));
        let nothing = Recovered::default();
        let recovered = hot.map_or(&nothing, |hot| &hot.recovered);
        let mut extent = Extent { blocks: vec![BlockIs::Nothing; SUMS], is_leaf_whole, placeless: 0 };
        for (block, sum) in sums.iter().enumerate() {
            let below = match recovered.base[block] {
                Base::Leaf if *sum == LOST_CHECKSUM => BlockIs::Lost,
                Base::Leaf if *sum == HOLE_CHECKSUM => BlockIs::Hole,
                Base::Leaf if sum.is_zero() => BlockIs::Nothing,
                Base::Leaf if hot.is_some() => BlockIs::Hot,
                Base::Leaf => BlockIs::Data(*sum),
                Base::Zero => BlockIs::Nothing,
                Base::Hole => BlockIs::Hole,
                Base::Valid => BlockIs::Hot,
                Base::Lost => BlockIs::Lost,
            };
            // A first write that was not flushed: its checksum decides whether it ever arrived.
            let first = recovered.overlay.get(&(block as u16)).map(|(sum, _)| *sum);
            let arrived = first.filter(|sum| {
                let data = self.read(disk, slot, block, 1);
                data.is_some_and(|data| BlockChecksum::of(data.as_slice()) == *sum)
            });
            let mut is = arrived.map_or(below, BlockIs::Data);
            if matches!(is, BlockIs::Data(_) | BlockIs::Hot) && slot.units.get(block / UNIT_BLOCKS).is_none() {
                (is, extent.placeless) = (BlockIs::Lost, extent.placeless + 1);
            }
            extent.blocks[block] = is;
        }
        Some(extent)
    }

    fn leaf(&self, disk: &mut dyn ReadDisk, number: u32, slot: &Slot) -> (Box<Sums>, bool) {
        let place = slot.leaf.filter(|place| place.unit < self.superblock.geometry.units());
        let Some(place) = place else { return (leaf::leafless(slot.lost), slot.leaf.is_none()) };
        let bytes = self.superblock.geometry.leaf_bytes(place, |at| disk.read(ByteCount(at), BLOCK));
        let owner = LeafOwner { slot: number, sequence: slot.leaf_sequence };
        let pool = self.superblock.identity.pool;
        (leaf::decode(&bytes, owner, pool, &slot.units), leaf::is_whole(&bytes, owner, pool))
    }

    /// Blocks that lie side by side on the disk, from one of the extent on.
    pub fn read(&self, disk: &mut dyn ReadDisk, slot: &Slot, block: usize, count: usize) -> Option<Data> {
        let geometry = self.superblock.geometry;
        let unit = slot.units.get(block / UNIT_BLOCKS).filter(|unit| *unit < geometry.units())?;
        disk.read(geometry.offset(unit, block % UNIT_BLOCKS), count * BLOCK)
    }

    /// The block of data at this place of a slot's extent, unless it is bad. `Hot` data is taken as it is.
    pub fn read_block(&self, disk: &mut dyn ReadDisk, number: u32, block: usize, is: BlockIs) -> Option<Data> {
        let data = self.read(disk, self.slot(number)?, block, 1)?;
        match is {
            BlockIs::Data(sum) => Some(data).filter(|data| BlockChecksum::of(data.as_slice()) == sum),
            BlockIs::Hot => Some(data),
            BlockIs::Nothing | BlockIs::Hole | BlockIs::Lost => None,
        }
    }

    /// Leaves, and with `data` the blocks that they vouch for.
    pub(super) fn check_blocks(
        &self,
        disk: &mut dyn ReadDisk,
        data: bool,
        findings: &mut Findings,
        counts: &mut Counts,
        watch: &mut Watch<'_>,
    ) {
        counts.used_bytes += u64::from(self.found.space.taken_units()) * UNIT_BYTES;
        counts.free_bytes += u64::from(self.found.space.free()) * UNIT_BYTES;
        for number in 0..self.found.slots.len() as u32 {
            let Some(slot) = self.slot(number) else { continue };
            let Some(extent) = self.extent(disk, number) else { continue };
            counts.extents += 1;
            let what = self.name(slot.owner());
            if !extent.is_leaf_whole {
                findings.add(Code::Leaf, format!("checksums of {what} are damaged"));
            }
            if extent.placeless > 0 {
                findings
                    .add(Code::Placeless, format!("{} blocks of {what} have no place on the disk", extent.placeless));
            }
            let lost = extent.blocks.iter().filter(|is| **is == BlockIs::Lost).count() as u64 - extent.placeless;
            if lost > 0 && extent.is_leaf_whole {
                findings.add(Code::ChecksumLost, format!("{lost} blocks of {what} are known to be lost"));
            }
            counts.hot_blocks += extent.blocks.iter().filter(|is| **is == BlockIs::Hot).count() as u64;
            if data {
                self.check_data(disk, slot, &extent, findings, counts);
            }
            watch.advance(slot.units.count() as u64 * UNIT_BYTES);
        }
    }

    fn check_data(
        &self,
        disk: &mut dyn ReadDisk,
        slot: &Slot,
        extent: &Extent,
        findings: &mut Findings,
        counts: &mut Counts,
    ) {
        let what = self.name(slot.owner());
        for (unit, _) in slot.units.iter() {
            let first = unit * UNIT_BLOCKS;
            let blocks = &extent.blocks[first..first + UNIT_BLOCKS];
            if !blocks.iter().any(|is| matches!(is, BlockIs::Data(_))) {
                continue;
            }
            let whole = self.read(disk, slot, first, UNIT_BLOCKS);
            for (at, is) in blocks.iter().enumerate() {
                let BlockIs::Data(sum) = is else { continue };
                let block = match &whole {
                    Some(data) => Some(data.slice(at * BLOCK..(at + 1) * BLOCK)),
                    None => self.read(disk, slot, first + at, 1),
                };
                let place = (u64::from(slot.extent) * SUMS as u64 + (first + at) as u64) * BLOCK_BYTES;
                match block {
                    Some(block) if BlockChecksum::of(block.as_slice()) == *sum => counts.checked_blocks += 1,
                    Some(_) => {
                        findings
                            .add(Code::Data, format!("the block at byte {place} does not match its checksum: {what}"));
                    }
                    None => {
                        findings.add(Code::DataUnreadable, format!("the block at byte {place} cannot be read: {what}"))
                    }
                }
            }
        }
    }

    fn name(&self, key: Key) -> String {
        name(&self.found.catalog, key)
    }
}

/// An extent, as whoever reads of it can find it: by the volumes that show it.
pub(super) fn name(catalog: &Catalog, (layer, extent): Key) -> String {
    let shows = |volume: &crate::catalog::Volume| catalog.chain(volume.layer).any(|beneath| beneath == layer);
    let volumes = catalog.volumes.iter().filter(|(_, known)| shows(known)).map(|(volume, _)| volume.to_string());
    let volumes: Vec<String> = volumes.take(4).collect();
    format!("extent {} of {}", extent.0, volumes.join(", "))
}
