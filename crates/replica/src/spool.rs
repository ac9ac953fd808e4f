//! The spool of a trailing replica: batches of changes on their way into its volumes, and how they lie on the disk
//! (`docs/disk-format.md`, spool).
//!
//! Two areas in a volume of the node's own are used in turn. A batch is whole or it counts as never written: its head and
//! each of its blocks are checked when it is read. Whatever was before the last two is durable in its volumes. So applying these
//! again, in order and as far as they are whole, leaves the volumes at a cut, whatever a crash left half done.

use crate::wire::{TrailPoint, TrailRun};
use pollux_base::checksum::crc32c;
use pollux_base::data::Buffer;
use pollux_base::unit::{BLOCK_BYTES, BlockRange};
use pollux_base::{BlockChecksum, BlockCount, BlockIndex, ByteCount, Data, GroupId, VolumeId};
use serde::{Deserialize, Serialize};

/// Blocks of one area: a batch that is full but for one block, the largest request on top (32 MiB, which the front ends see
/// to), and the head.
const AREA_BLOCKS: u64 = 11 << 10;
/// A batch is closed when it has so many bytes: enough that a flush per batch does not count.
pub(crate) const BATCH_BYTES: u64 = 8 << 20;
/// Changes in a batch: their heads then take less than a megabyte.
pub(crate) const BATCH_CHANGES: usize = 4096;
/// Largest change that can be followed.
pub(crate) const CHANGE_BYTES_MAX: u64 = 32 << 20;
const MAGIC: &[u8; 8] = b"PolluxTB";
const VERSION: u32 = 1;
/// Magic, version, sequence, length of the body, blocks of the whole batch, checksum of the body, checksum of these.
const PREFIX_BYTES: usize = 8 + 4 + 8 + 4 + 4 + 4 + 4;

/// The volume that holds a group's spool on a node. No log mints such a number.
pub(crate) fn volume(group: GroupId) -> VolumeId {
    VolumeId(1 << 63 | group.0)
}

pub(crate) fn size() -> ByteCount {
    ByteCount(2 * AREA_BLOCKS * BLOCK_BYTES)
}

/// One change of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub volume: VolumeId,
    pub range: BlockRange,
    /// None: the range reads as zeros afterwards.
    pub blocks: Option<(Data, Vec<BlockChecksum>)>,
}

impl Change {
    pub(crate) fn bytes(&self) -> u64 {
        self.blocks.as_ref().map_or(0, |(data, _)| data.len() as u64)
    }
}

/// Changes that are applied together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Batch {
    pub sequence: u64,
    pub run: TrailRun,
    /// Position up to which everything was held before.
    pub after: u64,
    /// What the replica holds when it is applied.
    pub held: TrailPoint,
    /// The newest change that the primary had told of.
    pub end: TrailPoint,
    pub changes: Vec<Change>,
}

impl Batch {
    /// Whether this one was written right before the other. It may not have been durable in its volumes when that was begun,
    /// and a power cut may keep the other and lose what was applied of this one: so it is applied again first.
    pub(crate) fn precedes(&self, other: &Batch) -> bool {
        self.sequence + 1 == other.sequence && self.run == other.run && self.held.position == other.after
    }
}

#[derive(Serialize, Deserialize)]
struct Body {
    run: TrailRun,
    after: u64,
    held: TrailPoint,
    end: TrailPoint,
    changes: Vec<(VolumeId, BlockRange, Option<Vec<BlockChecksum>>)>,
}

/// What the first block of an area says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub sequence: u64,
    pub range: BlockRange,
    body_bytes: u32,
    body_crc: u32,
}

/// The first block of each area.
pub(crate) fn heads() -> [BlockRange; 2] {
    [0, 1].map(|area| BlockRange::new(BlockIndex(area * AREA_BLOCKS), BlockCount(1)))
}

/// Where the batch goes, and its bytes.
pub(crate) fn encode(batch: &Batch) -> (BlockRange, Data) {
    let changes = batch.changes.iter();
    let body = Body {
        run: batch.run,
        after: batch.after,
        held: batch.held,
        end: batch.end,
        changes: changes
            .map(|change| (change.volume, change.range, change.blocks.as_ref().map(|(_, sums)| sums.clone())))
            .collect(),
    };
    let body = postcard::to_stdvec(&body).expect("a batch is plain data, which postcard always encodes");
    let head_blocks = (PREFIX_BYTES + body.len()).div_ceil(BLOCK_BYTES as usize);
    let data_bytes: u64 = batch.changes.iter().map(Change::bytes).sum();
    let blocks = head_blocks as u64 + data_bytes / BLOCK_BYTES;
    assert!(blocks <= AREA_BLOCKS, "a batch fits into its area");
    let mut buffer = Buffer::zeroed((blocks * BLOCK_BYTES) as usize);
    let bytes = buffer.as_mut_slice();
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..20].copy_from_slice(&batch.sequence.to_le_bytes());
    bytes[20..24].copy_from_slice(&(body.len() as u32).to_le_bytes());
    bytes[24..28].copy_from_slice(&(blocks as u32).to_le_bytes());
    bytes[28..32].copy_from_slice(&crc32c(&body).to_le_bytes());
    let crc = crc32c(&bytes[..32]);
    bytes[32..36].copy_from_slice(&crc.to_le_bytes());
    bytes[PREFIX_BYTES..PREFIX_BYTES + body.len()].copy_from_slice(&body);
    let mut at = head_blocks * BLOCK_BYTES as usize;
    for (data, _) in batch.changes.iter().filter_map(|change| change.blocks.as_ref()) {
        bytes[at..at + data.len()].copy_from_slice(data.as_slice());
        at += data.len();
    }
    let start = BlockIndex(batch.sequence % 2 * AREA_BLOCKS);
    (BlockRange::new(start, BlockCount(blocks)), buffer.freeze())
}

/// What the first block of an area says, if it says anything that can be believed.
pub(crate) fn decode_head(area: usize, block: &[u8]) -> Option<Head> {
    let word = |at: usize| Some(u32::from_le_bytes(block.get(at..at + 4)?.try_into().ok()?));
    let sequence = u64::from_le_bytes(block.get(12..20)?.try_into().ok()?);
    let blocks = u64::from(word(24)?);
    let is_whole = block.starts_with(MAGIC) && word(8)? == VERSION && word(32)? == crc32c(&block[..32]);
    let is_here = sequence % 2 == area as u64 && (1..=AREA_BLOCKS).contains(&blocks);
    let range = BlockRange::new(BlockIndex(area as u64 * AREA_BLOCKS), BlockCount(blocks));
    (is_whole && is_here).then_some(Head { sequence, range, body_bytes: word(20)?, body_crc: word(28)? })
}

/// The batch whose head was read before; none if it was not written whole.
pub(crate) fn decode(head: Head, data: &Data) -> Option<Batch> {
    let end = PREFIX_BYTES.checked_add(head.body_bytes as usize)?;
    let body = data.as_slice().get(PREFIX_BYTES..end)?;
    if crc32c(body) != head.body_crc {
        return None;
    }
    let body: Body = postcard::from_bytes(body).ok()?;
    let mut at = end.next_multiple_of(BLOCK_BYTES as usize);
    let mut changes = Vec::new();
    for (volume, range, checksums) in body.changes {
        let blocks = match checksums {
            None => None,
            Some(checksums) => {
                let bytes = checksums.len() * BLOCK_BYTES as usize;
                if at + bytes > data.len() || range.count.0 != checksums.len() as u64 {
                    return None;
                }
                let part = data.slice(at..at + bytes);
                at += bytes;
                if BlockChecksum::of_all(part.as_slice()) != checksums {
                    return None;
                }
                Some((part, checksums))
            }
        };
        changes.push(Change { volume, range, blocks });
    }
    Some(Batch { sequence: head.sequence, run: body.run, after: body.after, held: body.held, end: body.end, changes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use pollux_base::{Epoch, Generation, Stamp};

    fn batch(sequence: u64) -> Batch {
        let data = Data::copy_of(&[7; 8192]);
        let checksums = BlockChecksum::of_all(data.as_slice());
        let range = |start, count| BlockRange::new(BlockIndex(start), BlockCount(count));
        let point = |position| TrailPoint { position, bytes: position * 8192, ms: position };
        Batch {
            sequence,
            run: TrailRun { stamp: Stamp { epoch: Epoch(1), generation: Generation(2) }, boot: 3, started: 4 },
            after: 7,
            held: point(9),
            end: point(12),
            changes: vec![
                Change { volume: VolumeId(5), range: range(3, 2), blocks: Some((data, checksums)) },
                Change { volume: VolumeId(6), range: range(0, 5000), blocks: None },
            ],
        }
    }

    #[test]
    fn a_batch_is_read_as_it_was_written_and_two_in_turn_do_not_touch() {
        let ranges = [4, 5].map(|sequence| {
            let (range, data) = encode(&batch(sequence));
            let area = (sequence % 2) as usize;
            let head = decode_head(area, &data.as_slice()[..4096]).expect("it is whole");
            assert_eq!(head.range, range);
            assert_eq!(decode(head, &data), Some(batch(sequence)));
            assert_eq!(decode_head(1 - area, &data.as_slice()[..4096]), None, "of the other area");
            range
        });
        assert!(!ranges[0].overlaps(ranges[1]));
    }

    #[test]
    fn a_torn_batch_counts_as_never_written() {
        let (_, data) = encode(&batch(4));
        for sector in 0..data.len() / 512 {
            let mut torn = data.as_slice().to_vec();
            torn[sector * 512..][..512].fill(0);
            let torn = Data::copy_of(&torn);
            let read = decode_head(0, &torn.as_slice()[..4096]).and_then(|head| decode(head, &torn));
            // Sectors of padding hold zeros anyway.
            assert!(read.is_none() || torn.as_slice() == data.as_slice(), "sector {sector}");
        }
    }
}
