//! The journal: a ring of 4 KiB blocks to which records are only ever appended, several at a time (group commit).
//!
//! Invariants: `tail <= recorded <= durable <= written <= next <= tail + ring`. Blocks before `written` are on
//! the disk, before `durable` they and every data write that their records tell of survive a power cut, and a durable
//! block of the journal says so up to `recorded`. One batch is being written at a time, so that records reach the disk in
//! the order in which they were queued and a hole can only be in what nobody was promised. While marks wait for their flush,
//! made or taken back, the next batch is written: first writes elsewhere do not wait for that flush.

use crate::layout::{BLOCK, BlockKind, Header, Ring, unseal};
use crate::record::{Record, pack};
use crate::superblock::{Anchor, sealed};
use pollux_base::{ByteCount, Data, DiskOpKind, PoolId};
use std::collections::VecDeque;
use std::ops::Range;

/// Blocks of one ordinary batch: 256 KiB, some 250 us on a common disk. What waits longer is in the next one.
const BATCH_BLOCKS_MAX: usize = 64;

struct Batch<T> {
    start: u64,
    end: u64,
    durable_said: u64,
    records: Vec<Record>,
    /// In their order, each with whether it waits for its record to be durable.
    then: Vec<(bool, T)>,
    writes_left: u32,
    /// It must be flushed after it was written: others wait for the flush with it.
    flush: bool,
    sync: bool,
    /// All that is promised of it is that marks are made or taken back durably: whatever else it says counts when it is
    /// written, and the next batch does not wait.
    is_followed: bool,
}

/// A batch that ended: its records and who waited for them.
pub struct Committed<T> {
    pub records: Vec<Record>,
    pub then: Vec<T>,
    /// Last block of the batch.
    pub last: u64,
}

/// What a completed write of the batch leads to.
pub enum Wrote<T> {
    More,
    /// It is committed when it was flushed.
    Flush,
    Committed(Committed<T>),
}

/// `T`: what to do when a record is committed.
pub struct Journal<T> {
    pool: PoolId,
    ring: Ring,
    life: u64,
    tail: u64,
    next: u64,
    written: u64,
    durable: u64,
    recorded: u64,
    /// Batches that are not durable: their end, and up to where they say that all is durable.
    saying: VecDeque<(u64, u64)>,
    pending: VecDeque<(Record, Option<T>)>,
    /// Records that only a checkpoint may write, ahead of `pending`.
    restated: Option<(Vec<Record>, T)>,
    batch: Option<Batch<T>>,
    /// Who waits for marks that are written and not durable, with the end of their batch.
    marked: VecDeque<(u64, T)>,
    recorded_wanted: u64,
}

impl<T> Journal<T> {
    /// A journal whose next block is `next`, where everything before it is durable and no longer needed from `tail` on.
    pub fn new(pool: PoolId, ring: Ring, life: u64, next: u64) -> Journal<T> {
        Journal {
            pool,
            ring,
            life,
            tail: next,
            next,
            written: next,
            durable: next,
            recorded: next,
            saying: VecDeque::new(),
            pending: VecDeque::new(),
            restated: None,
            batch: None,
            marked: VecDeque::new(),
            recorded_wanted: 0,
        }
    }

    pub fn tail(&self) -> u64 {
        self.tail
    }
    pub fn written(&self) -> u64 {
        self.written
    }
    /// The records of the blocks before this one are committed. A batch that is written but waits for its flush is not.
    pub fn committed(&self) -> u64 {
        self.batch.as_ref().map_or(self.next, |batch| batch.start)
    }
    pub fn durable(&self) -> u64 {
        self.durable
    }
    pub fn recorded(&self) -> u64 {
        self.recorded
    }

    /// Whether every record that was queued is committed.
    pub fn is_idle(&self) -> bool {
        self.batch.is_none() && self.pending.is_empty() && self.restated.is_none() && self.marked.is_empty()
    }

    /// Whether half of the ring is in use.
    pub fn checkpoint_due(&self) -> bool {
        self.next - self.tail >= self.ring.blocks / 2
    }

    pub fn queue(&mut self, record: Record) {
        self.pending.push_back((record, None));
    }

    /// Queues a record; `then` comes back when it is committed: durable if the record is sync, else on the disk.
    pub fn queue_then(&mut self, record: Record, then: T) {
        self.pending.push_back((record, Some(then)));
    }

    /// Writes these records next, ahead of what waits, in one batch of at most `Ring::restated_blocks_max` blocks, durably.
    /// That is sound because they state what is in memory, where the waiting records are applied already.
    pub fn restate(&mut self, records: Vec<Record>, then: T) {
        assert!(self.restated.is_none(), "one checkpoint at a time");
        self.restated = Some((records, then));
    }

    /// Asks for the journal to say durably that everything before `block` is durable.
    pub fn want_recorded(&mut self, block: u64) {
        self.recorded_wanted = self.recorded_wanted.max(block);
    }

    /// Whether somebody waits for a flush: for marks, for what `want_recorded` asked for to be durable, or, when a block that
    /// says so is written, for that block.
    pub fn wants_flush(&self) -> bool {
        let can_be_durable = self.recorded_wanted > self.durable && self.recorded_wanted <= self.written;
        !self.marked.is_empty() || can_be_durable || (self.recorded_wanted > self.recorded && self.is_said())
    }

    /// Whether a block that is written and not durable says what `want_recorded` asked for.
    fn is_said(&self) -> bool {
        self.saying.back().is_some_and(|(_, said)| *said >= self.recorded_wanted)
    }

    /// Begins the next batch if there is reason to and room; gives its writes.
    pub fn start(&mut self) -> Option<Vec<DiskOpKind>> {
        if self.batch.is_some() {
            return None;
        }
        let free = (self.tail + self.ring.blocks - self.next) as usize;
        let restated_blocks_max = self.ring.restated_blocks_max();
        if let Some((records, then)) = self.restated.take() {
            let (blocks, packed) = pack(records.iter(), restated_blocks_max.min(free));
            assert_eq!(packed, records.len(), "the reserve holds everything that is hot");
            return Some(self.begin(blocks, records, vec![(true, then)], true, false));
        }
        // Kept free of ordinary records: room for a checkpoint, and again for the opening after a crash in the middle of it.
        // So a checkpoint can always be finished, and finishing it gives half of the ring back.
        let room = BATCH_BLOCKS_MAX.min(free.saturating_sub(2 * restated_blocks_max));
        let can_be_said = self.recorded_wanted > self.recorded && self.recorded_wanted <= self.durable;
        let say = can_be_said && !self.is_said();
        if room == 0 || (self.pending.is_empty() && !say) {
            return None;
        }
        let (mut blocks, packed) = pack(self.pending.iter().map(|(record, _)| record), room);
        if blocks.is_empty() {
            blocks.push(Vec::new());
        }
        let (records, then): (Vec<_>, Vec<_>) = self.pending.drain(..packed).unzip();
        let waits = records.iter().map(Record::is_sync);
        let then = waits.zip(then).filter_map(|(waits, then)| Some((waits, then?))).collect();
        let sync = say || records.iter().any(Record::is_sync);
        let about_marks = |record: &Record| matches!(record, Record::Hot { .. } | Record::Cold { .. });
        let is_followed = records.iter().all(|record| !record.is_sync() || about_marks(record));
        Some(self.begin(blocks, records, then, sync, is_followed))
    }

    fn begin(
        &mut self,
        blocks: Vec<Vec<u8>>,
        records: Vec<Record>,
        then: Vec<(bool, T)>,
        sync: bool,
        is_followed: bool,
    ) -> Vec<DiskOpKind> {
        // A sync write makes only itself durable. It may stand alone if nothing before it waits for a flush and it tells
        // of no data; otherwise the batch is written and then flushed.
        let stands_alone = self.durable == self.next && !records.iter().any(|r| matches!(r, Record::Valid { .. }));
        let write_sync = sync && stands_alone;
        let mut runs: Vec<(u64, Vec<Data>)> = Vec::new();
        for (payload, sequence) in blocks.iter().zip(self.next..) {
            let (one, two, len) = (self.life, self.durable, payload.len());
            let header = Header { kind: BlockKind::Journal, part: 0, sequence, one, two, len };
            let place = self.ring.place(sequence);
            if runs.is_empty() || place == 0 {
                runs.push((self.ring.offset(sequence), Vec::new()));
            }
            runs.last_mut().expect("a run was just begun").1.push(sealed(self.pool, header, payload));
        }
        let writes: Vec<_> = runs
            .into_iter()
            .map(|(offset, data)| DiskOpKind::Write { offset: ByteCount(offset), data, sync: write_sync })
            .collect();
        let start = self.next;
        self.next += blocks.len() as u64;
        self.batch = Some(Batch {
            start,
            end: self.next,
            durable_said: self.durable,
            records,
            then,
            writes_left: writes.len() as u32,
            flush: sync && !write_sync,
            sync,
            is_followed,
        });
        writes
    }

    /// A write of the batch completed.
    pub fn on_wrote(&mut self) -> Wrote<T> {
        let batch = self.batch.as_mut().expect("a batch is under way while its writes are");
        batch.writes_left -= 1;
        if batch.writes_left > 0 {
            return Wrote::More;
        }
        let (end, flush, sync, is_followed) = (batch.end, batch.flush, batch.sync, batch.is_followed);
        self.written = end;
        self.saying.push_back((end, batch.durable_said));
        if flush && !is_followed {
            return Wrote::Flush;
        }
        if flush {
            let (waiting, rest) = std::mem::take(&mut batch.then).into_iter().partition(|(waits, _)| *waits);
            batch.then = rest;
            self.marked.extend(Vec::into_iter(waiting).map(|(_, then)| (end, then)));
        } else if sync {
            self.on_durable(end);
        }
        Wrote::Committed(self.finish())
    }

    /// Who waited for marks that are durable now.
    pub fn take_marked(&mut self) -> Vec<T> {
        let durable = self.marked.partition_point(|(end, _)| *end <= self.durable);
        self.marked.drain(..durable).map(|(_, then)| then).collect()
    }

    /// The flush that the batch asked for completed; `on_durable` was told already.
    pub fn on_batch_flushed(&mut self) -> Committed<T> {
        self.finish()
    }

    fn finish(&mut self) -> Committed<T> {
        let batch = self.batch.take().expect("a batch is under way until it is finished");
        let then = batch.then.into_iter().map(|(_, then)| then).collect();
        Committed { records: batch.records, then, last: batch.end - 1 }
    }

    /// Everything written before `block` survives a power cut, and so does the data it tells of.
    pub fn on_durable(&mut self, block: u64) {
        self.durable = self.durable.max(block);
        while let Some((end, said)) = self.saying.front().copied() {
            if end > self.durable {
                break;
            }
            self.recorded = self.recorded.max(said);
            self.saying.pop_front();
        }
    }

    /// The anchor says, durably, that blocks before `tail` are not needed and those before `durable` are durable.
    pub fn on_anchor(&mut self, tail: u64, durable: u64) {
        assert!(self.tail <= tail && tail <= durable && durable <= self.durable, "the tail moves over durable blocks");
        self.tail = tail;
        self.recorded = self.recorded.max(durable);
    }

    /// What a block of this life, as read, tells; `None`: it is not what was written there.
    pub fn records_of(&self, number: u64, block: Option<&[u8]>) -> Option<Vec<Record>> {
        let (header, _) = unseal(block?, BlockKind::Journal, Some(self.pool)).ok()?;
        if (header.sequence, header.one) != (number, self.life) {
            return None;
        }
        records_in(block?, header.len).collect()
    }

    pub fn check(&self) {
        assert!(self.tail <= self.recorded && self.recorded <= self.durable, "{} {}", self.recorded, self.durable);
        assert!(self.durable <= self.written && self.written <= self.next, "{} {}", self.durable, self.written);
        assert!(self.next <= self.tail + self.ring.blocks, "the ring is not overrun");
        assert!(self.batch.is_some() || self.written == self.next, "what is not under way is written");
    }
}

/// The records of a whole block with a payload so long. `None`, as the last: what follows is no record.
fn records_in(block: &[u8], len: usize) -> impl Iterator<Item = Option<Record>> {
    let mut bytes = &block[BLOCK - crate::layout::PAYLOAD_BYTES..][..len];
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let decoded = Record::decode(bytes);
        bytes = decoded.as_ref().map_or(&[], |(_, rest)| *rest);
        Some(decoded.map(|(record, _)| record))
    })
}

/// The journal as found at open.
#[derive(Debug, PartialEq, Eq)]
pub struct Found {
    /// Records in order, each with the number of its block.
    pub records: Vec<(u64, Record)>,
    /// First block that is not part of it.
    pub end: u64,
    /// Everything before this block is durable, and so is the data it tells of.
    pub durable: u64,
    /// What no crash explains. The records are those before it.
    pub fault: Option<String>,
}

/// Whether any of these blocks is there and belongs to the anchor's journal. `at` gives what lies at an offset of the disk.
pub fn any<'a>(
    at: impl Fn(u64) -> Option<&'a [u8]>,
    pool: PoolId,
    ring: Ring,
    anchor: Anchor,
    blocks: Range<u64>,
) -> bool {
    blocks.into_iter().any(|sequence| {
        let header = at(ring.offset(sequence)).and_then(|block| unseal(block, BlockKind::Journal, Some(pool)).ok());
        header.is_some_and(|(header, _)| header.one == anchor.log_life && header.sequence == sequence)
    })
}

/// Reads a journal of `life` from block `tail` on. `at` gives what lies at an offset of the disk. `durable`: blocks before it
/// must be there. `end`: where it ends, if that is known.
pub fn find<'a>(
    at: impl Fn(u64) -> Option<&'a [u8]>,
    pool: PoolId,
    ring: Ring,
    life: u64,
    tail: u64,
    durable: u64,
    end: Option<u64>,
) -> Found {
    // Every block of the ring that belongs to this life, by number.
    let mut blocks = std::collections::BTreeMap::new();
    for place in 0..ring.blocks {
        if let Some(block) = at(ring.offset(place))
            && let Ok((header, _)) = unseal(block, BlockKind::Journal, Some(pool))
            && header.one == life
            && ring.place(header.sequence) == place
            && header.sequence >= tail
            && header.sequence < end.unwrap_or(u64::MAX)
        {
            blocks.insert(header.sequence, (header, block));
        }
    }
    let durable = blocks.values().map(|(header, _)| header.two).fold(durable, u64::max);
    let mut found = Found { records: Vec::new(), end: tail, durable, fault: None };
    'blocks: while let Some((header, block)) = blocks.get(&found.end) {
        for record in records_in(block, header.len) {
            let Some(record) = record else {
                found.fault = Some(format!("journal block {} holds no record", found.end));
                break 'blocks;
            };
            found.records.push((found.end, record));
        }
        found.end += 1;
    }
    if found.fault.is_none() && (found.end < durable || end.is_some_and(|end| found.end < end)) {
        found.fault = Some(format!("journal block {} is missing although later ones were written", found.end));
    }
    found
}
