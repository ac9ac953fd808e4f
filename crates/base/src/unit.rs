//! Units of size, place and authority. Only sums that make sense compile.
//!
//! A block is 4 KiB: the unit of I/O and of checksums. An extent is 4 MiB: the unit of bookkeeping, 1024 blocks.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Bytes in a block.
pub const BLOCK_BYTES: u64 = 4096;
/// Blocks in an extent.
pub const EXTENT_BLOCKS: u64 = 1024;
/// Bytes in an extent.
pub const EXTENT_BYTES: u64 = BLOCK_BYTES * EXTENT_BLOCKS;
/// The largest volume: 1 PiB. Bounded so that no product of extent, block and byte counts can overflow 64 bits and
/// an extent index always fits into 32.
pub const VOLUME_BYTES_MAX: u64 = 1 << 50;

/// Text formats write a number that is the key of a map as a string, and serde does not turn it back inside a tagged
/// enum. So from text a number is taken in both forms, from binary formats as it is.
macro_rules! deserialize_number {
    ($name:ident($inner:ty)) => {
        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if !deserializer.is_human_readable() {
                    return <$inner>::deserialize(deserializer).map($name);
                }
                struct Number;
                impl serde::de::Visitor<'_> for Number {
                    type Value = $name;
                    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        f.write_str("a whole number")
                    }
                    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<$name, E> {
                        <$inner>::try_from(value).map($name).map_err(E::custom)
                    }
                    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<$name, E> {
                        text.parse().map($name).map_err(E::custom)
                    }
                }
                deserializer.deserialize_any(Number)
            }
        }
    };
}
pub(crate) use deserialize_number;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty), $format:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);
        deserialize_number!($name($inner));
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, $format, self.0)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number!(/// A size or place in bytes.
    ByteCount(u64), "{} B");
number!(/// Place of a block in a volume.
    BlockIndex(u64), "b{}");
number!(/// A number of blocks.
    BlockCount(u64), "{} blocks");
number!(/// Place of an extent in a volume.
    ExtentIndex(u32), "x{}");
number!(/// Number of a group's authority record; grows whenever primary or in-sync set changes; higher wins.
    Generation(u64), "gen {}");
number!(/// Number of the cluster's membership authority; grows when a side goes on alone or a member is added.
    Epoch(u64), "epoch {}");
number!(/// Number of one run of a VM on one node; a VM runs under at most one.
    Incarnation(u64), "run {}");

impl Generation {
    /// The generation after this one.
    pub fn next(self) -> Generation {
        Generation(self.0.checked_add(1).expect("a generation is raised once per failure: 2^64 is never reached"))
    }
}

impl Epoch {
    /// The epoch after this one.
    pub fn next(self) -> Epoch {
        Epoch(self.0.checked_add(1).expect("an epoch is raised once per failure: 2^64 is never reached"))
    }
}

impl Incarnation {
    /// The incarnation after this one.
    pub fn next(self) -> Incarnation {
        Incarnation(self.0.checked_add(1).expect("an incarnation is raised once per start: 2^64 is never reached"))
    }
}

impl BlockIndex {
    /// The extent that holds this block.
    pub fn extent(self) -> ExtentIndex {
        ExtentIndex(u32::try_from(self.0 / EXTENT_BLOCKS).expect("VOLUME_BYTES_MAX keeps extent indices in 32 bits"))
    }
    /// Place of this block inside its extent, `0..EXTENT_BLOCKS`.
    pub fn in_extent(self) -> usize {
        (self.0 % EXTENT_BLOCKS) as usize
    }
    /// Place of this block in its volume, in bytes.
    pub fn bytes(self) -> ByteCount {
        ByteCount(self.0 * BLOCK_BYTES)
    }
    /// The block `count` further on.
    pub fn plus(self, count: BlockCount) -> BlockIndex {
        BlockIndex(self.0 + count.0)
    }
}

impl BlockCount {
    /// The same in bytes.
    pub fn bytes(self) -> ByteCount {
        ByteCount(self.0 * BLOCK_BYTES)
    }
}

impl ExtentIndex {
    /// First block of this extent.
    pub fn first_block(self) -> BlockIndex {
        BlockIndex(u64::from(self.0) * EXTENT_BLOCKS)
    }
}

/// A run of blocks in one volume: `start .. start + count`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BlockRange {
    /// First block.
    pub start: BlockIndex,
    /// How many.
    pub count: BlockCount,
}

impl fmt::Debug for BlockRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "b{}+{}", self.start.0, self.count.0)
    }
}

impl BlockRange {
    /// `start .. start + count`.
    pub fn new(start: BlockIndex, count: BlockCount) -> BlockRange {
        BlockRange { start, count }
    }
    /// One past the last block.
    pub fn end(self) -> BlockIndex {
        self.start.plus(self.count)
    }
    /// Whether any block is in both.
    pub fn overlaps(self, other: BlockRange) -> bool {
        self.start < other.end() && other.start < self.end()
    }
    /// Whether it has blocks, and all of them are in the other. Whatever the numbers are.
    pub fn is_within(self, other: BlockRange) -> bool {
        let end = self.start.0.checked_add(self.count.0);
        self.start >= other.start && self.count.0 > 0 && end.is_some_and(|end| end <= other.end().0)
    }
    /// Which of the whole's blocks these are, counted from its first.
    pub fn places_in(self, whole: BlockRange) -> std::ops::Range<usize> {
        let start = (self.start.0 - whole.start.0) as usize;
        start..start + self.count.0 as usize
    }
    /// The extents that hold these blocks, in order. None for an empty range.
    pub fn extents(self) -> impl Iterator<Item = ExtentIndex> + use<> {
        let last = if self.count.0 == 0 { 0 } else { BlockIndex(self.end().0 - 1).extent().0 + 1 };
        let first = if self.count.0 == 0 { 0 } else { self.start.extent().0 };
        (first..last).map(ExtentIndex)
    }
    /// The same blocks as one range per extent, in order.
    pub fn split_by_extent(self) -> impl Iterator<Item = BlockRange> + use<> {
        let whole = self;
        self.extents().map(move |extent| {
            let start = whole.start.max(extent.first_block());
            let end = whole.end().0.min(extent.first_block().0 + EXTENT_BLOCKS);
            BlockRange::new(start, BlockCount(end - start.0))
        })
    }
    /// The same blocks as runs of which `of` says the same, in order, with what it says.
    pub fn split_by(self, of: impl Fn(BlockIndex) -> bool) -> Vec<(BlockRange, bool)> {
        let mut runs: Vec<(BlockRange, bool)> = Vec::new();
        for block in (self.start.0..self.end().0).map(BlockIndex) {
            let is = of(block);
            match runs.last_mut().filter(|(_, before)| *before == is) {
                Some((run, _)) => run.count.0 += 1,
                None => runs.push((BlockRange::new(block, BlockCount(1)), is)),
            }
        }
        runs
    }
}

/// Sizes for people: the largest binary unit that divides them, or one decimal.
pub fn bytes_text(bytes: u64) -> String {
    for (unit, shift) in [("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)] {
        if bytes >> shift > 0 {
            let tenths = (bytes >> (shift - 4)) * 10 / 16 % 10;
            let whole = bytes >> shift;
            return if tenths == 0 { format!("{whole} {unit}") } else { format!("{whole}.{tenths} {unit}") };
        }
    }
    format!("{bytes} B")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_told_in_the_unit_people_use() {
        let texts = [0, 4096, 1 << 30, (3 << 30) / 2, 256 << 20, VOLUME_BYTES_MAX].map(bytes_text);
        assert_eq!(texts, ["0 B", "4 KiB", "1 GiB", "1.5 GiB", "256 MiB", "1 PiB"]);
    }

    proptest! {
        #[test]
        fn splitting_by_extent_loses_and_repeats_no_block(start in 0u64..5000, count in 0u64..5000) {
            let whole = BlockRange::new(BlockIndex(start), BlockCount(count));
            let mut at = start;
            for part in whole.split_by_extent() {
                prop_assert_eq!(part.start.0, at);
                prop_assert!(part.count.0 > 0);
                prop_assert_eq!(part.start.extent(), BlockIndex(part.end().0 - 1).extent());
                at = part.end().0;
            }
            prop_assert_eq!(at, if count == 0 { start } else { start + count });
        }
    }

    #[test]
    fn splitting_by_a_property_keeps_every_block_and_joins_neighbours() {
        let range = |start, count| BlockRange::new(BlockIndex(start), BlockCount(count));
        let runs = range(3, 6).split_by(|block| (4..7).contains(&block.0));
        assert_eq!(runs, [(range(3, 1), false), (range(4, 3), true), (range(7, 2), false)]);
        assert!(range(3, 0).split_by(|_| true).is_empty());
    }

    #[test]
    fn a_range_is_within_another_with_all_of_its_blocks() {
        let range = |start, count| BlockRange::new(BlockIndex(start), BlockCount(count));
        let whole = range(10, 5);
        assert!([range(10, 5), range(10, 1), range(14, 1)].iter().all(|part| part.is_within(whole)));
        let outside = [range(9, 2), range(14, 2), range(12, 0), range(11, u64::MAX), range(20, 1)];
        assert!(!outside.iter().any(|part| part.is_within(whole)));
        assert_eq!(range(12, 2).places_in(whole), 2..4);
    }

    #[test]
    fn ranges_that_only_touch_do_not_overlap() {
        let a = BlockRange::new(BlockIndex(0), BlockCount(4));
        let b = BlockRange::new(BlockIndex(4), BlockCount(4));
        assert!(!a.overlaps(b) && !b.overlaps(a));
        assert!(a.overlaps(BlockRange::new(BlockIndex(3), BlockCount(1))));
    }
}
