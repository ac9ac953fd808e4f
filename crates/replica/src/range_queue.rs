//! Who may touch which blocks now: a queue of ranges, first come first served. An entry is ready when no earlier entry
//! overlaps it, unless both only read.
//!
//! Two of these are in every group. The primary's orders the requests of clients against each other and against the
//! extents that are just being compared, so that reads are linearizable and overlapping writes reach every replica in the
//! same order. The other, beneath it, orders what this node's store is asked, whoever asked: what an earlier session or an
//! earlier primary left under way is finished before anything later touches the same blocks.
//!
//! An insertion or removal looks at every entry. There are as many as clients have requests under way, some hundreds.

use crate::key_map::KeyMap;
use pollux_base::VolumeId;
use pollux_base::unit::BlockRange;
use smallvec::SmallVec;

/// Names an entry and gives its place: smaller is earlier.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct Key(pub u64);

impl From<Key> for u64 {
    fn from(key: Key) -> u64 {
        key.0
    }
}

/// Entries whose turn has come, in order.
pub(crate) type Ready = SmallVec<[Key; 4]>;

/// What is to be done with the blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Access {
    Read,
    Write,
}

#[derive(Debug)]
struct Entry {
    volume: VolumeId,
    range: BlockRange,
    access: Access,
    /// Earlier entries that are in the way.
    blockers: usize,
}

impl Entry {
    fn conflicts(&self, other: &Entry) -> bool {
        self.volume == other.volume
            && self.range.overlaps(other.range)
            && (self.access == Access::Write || other.access == Access::Write)
    }
}

#[derive(Debug, Default)]
pub(crate) struct RangeQueue {
    entries: KeyMap<Key, Entry>,
}

impl RangeQueue {
    /// Adds an entry behind all others and says whether it is ready.
    pub(crate) fn push(&mut self, key: Key, volume: VolumeId, range: BlockRange, access: Access) -> bool {
        let mut entry = Entry { volume, range, access, blockers: 0 };
        entry.blockers = self.entries.values().filter(|other| other.conflicts(&entry)).count();
        let ready = entry.blockers == 0;
        self.entries.push(key, entry);
        ready
    }

    /// Takes the entry out and gives those that become ready by it, in order. An unknown key changes nothing.
    pub(crate) fn remove(&mut self, key: Key) -> Ready {
        let Some(entry) = self.entries.remove(key) else { return Ready::new() };
        let mut ready = Ready::new();
        for (later, other) in self.entries.after_mut(key) {
            if other.conflicts(&entry) {
                other.blockers -= 1;
                if other.blockers == 0 {
                    ready.push(later);
                }
            }
        }
        ready
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pollux_base::{BlockCount, BlockIndex};

    fn range(start: u64, count: u64) -> BlockRange {
        BlockRange::new(BlockIndex(start), BlockCount(count))
    }

    #[test]
    fn overlapping_writes_go_one_after_the_other_in_order() {
        let mut queue = RangeQueue::default();
        assert!(queue.push(Key(1), VolumeId(1), range(0, 4), Access::Write));
        assert!(!queue.push(Key(2), VolumeId(1), range(3, 4), Access::Write));
        assert!(!queue.push(Key(3), VolumeId(1), range(5, 1), Access::Write));
        assert!(queue.push(Key(4), VolumeId(2), range(0, 4), Access::Write), "another volume is not in the way");
        assert!(queue.push(Key(5), VolumeId(1), range(8, 4), Access::Write));
        assert_eq!(queue.remove(Key(1)).as_slice(), [Key(2)]);
        assert_eq!(queue.remove(Key(2)).as_slice(), [Key(3)]);
    }

    #[test]
    fn reads_go_together_but_wait_for_an_earlier_write() {
        let mut queue = RangeQueue::default();
        assert!(queue.push(Key(1), VolumeId(1), range(0, 4), Access::Read));
        assert!(queue.push(Key(2), VolumeId(1), range(0, 4), Access::Read));
        assert!(!queue.push(Key(3), VolumeId(1), range(0, 4), Access::Write));
        assert!(!queue.push(Key(4), VolumeId(1), range(0, 4), Access::Read), "a read does not overtake a write");
        assert!(queue.remove(Key(1)).is_empty());
        assert_eq!(queue.remove(Key(2)).as_slice(), [Key(3)]);
        assert_eq!(queue.remove(Key(3)).as_slice(), [Key(4)]);
    }

    #[test]
    fn one_that_gives_up_waiting_blocks_nobody() {
        let mut queue = RangeQueue::default();
        assert!(queue.push(Key(1), VolumeId(1), range(0, 4), Access::Read));
        assert!(!queue.push(Key(2), VolumeId(1), range(0, 4), Access::Write));
        assert!(!queue.push(Key(3), VolumeId(1), range(0, 4), Access::Read));
        assert_eq!(queue.remove(Key(2)).as_slice(), [Key(3)]);
    }
}
