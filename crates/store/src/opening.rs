//! Opening a pool: read, judge, then make a fresh start.
//!
//! Nothing is written before the pool is known to be ours and whole. Then, in this order, each step done before the next:
//! 1. a flush: what was found in the disk's cache becomes as firm as it looks;
//! 2. damaged copies of superblock and catalog are healed;
//! 3. the anchor begins a new life and says where the journal of the old one ends, so that a crash from here on finds
//!    exactly the same journal again, whatever was written after it;
//! 4. the slot table with the journal applied, first the worse copy of each block, flush, then the better one, flush;
//! 5. what is hot is restated at the journal's end;
//! 6. the anchor moves the tail there.

use crate::catalog::Catalog;
use crate::hot::Base;
use crate::journal::{self, Journal, Wrote};
use crate::lanes::Key;
use crate::layout::{ANCHORS, BLOCK, CATALOGS, Geometry, SUPERBLOCKS, UNIT_BLOCKS};
use crate::pool::{LogThen, Pool};
use crate::record::Record;
use crate::recovery::{Found, Image, TableFound, find_anchor, recover};
use crate::slots::SlotTable;
use crate::superblock::{Anchor, Superblock};
use crate::{OpenError, Output, Position};
use pollux_base::unit::BLOCK_BYTES;
use pollux_base::{
    BlockChecksum, ByteCount, ClusterId, Data, DiskDone, DiskId, DiskOp, DiskOpId, DiskOpKind, NodeId, PoolId,
};
use std::collections::{BTreeMap, VecDeque};

/// Bytes of one read or write of the opening.
const CHUNK_BYTES: u64 = 1 << 20;
/// The part of the journal that is read at a time, and how long a stretch without any block of it must be for it to have
/// ended. Longer than nearly any batch, so that what a crash left of the last one lies within.
const STRETCH_PART: u64 = 8;
/// Operations under way at once: enough to keep a disk busy, 8 MiB of memory.
const WINDOW: usize = 8;

/// Reading down the list tells the life of an opening.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Superblocks,
    /// Anchors and the heads of the catalogs.
    Metadata,
    /// The used part of the slot table, and the bodies of the catalogs.
    Bodies,
    /// The journal from its tail on, until a stretch holds nothing of it.
    Journal,
    /// First writes that may have been lost with the power are compared with their checksums.
    Verify,
    Settle,
    Heal,
    LifeFirst,
    LifeSecond,
    TableWorse,
    TableWorseFlush,
    TableBetter,
    TableBetterFlush,
    Restate,
    AnchorFirst,
    AnchorSecond,
}

pub struct Opening {
    cluster: ClusterId,
    node: NodeId,
    size: ByteCount,
    stage: Stage,
    waiting: VecDeque<DiskOpKind>,
    under_way: BTreeMap<DiskOpId, DiskOpKind>,
    next_op: u64,
    image: Image,
    table: Option<TableFound>,
    /// Blocks of hot extents that are read to be verified: where on the disk they lie, and which they are.
    verifying: BTreeMap<u64, (Key, u16)>,
    /// First block of the journal that was not asked for yet; 0: none was.
    journal_read: u64,
    superblock: Option<(Superblock, [bool; 2])>,
    state: Option<Recovering>,
    /// How far disks of the pool are known to have come.
    seen: BTreeMap<DiskId, Position>,
}

/// From the moment the metadata made sense.
struct Recovering {
    found: Found,
    table: SlotTable,
    anchor: Anchor,
    journal: Journal<LogThen>,
    table_blocks: Vec<(u32, Data)>,
}

/// What a completed operation led to.
pub enum Progress {
    More,
    Refused(OpenError),
    Opened(Box<Pool>),
}

impl Opening {
    pub fn new(cluster: ClusterId, node: NodeId, size: ByteCount, seen: BTreeMap<DiskId, Position>) -> Opening {
        let read = |offset: u64| DiskOpKind::Read { offset: ByteCount(offset), len: BLOCK };
        // A disk too short for the second copy is still asked for the first, to say what is wrong.
        let waiting = SUPERBLOCKS.into_iter().filter(|offset| offset + BLOCK_BYTES <= size.0).map(read).collect();
        Opening {
            cluster,
            node,
            size,
            stage: Stage::Superblocks,
            waiting,
            under_way: BTreeMap::new(),
            next_op: 1,
            image: Image::default(),
            table: None,
            verifying: BTreeMap::new(),
            journal_read: 0,
            superblock: None,
            state: None,
            seen,
        }
    }

    /// Puts operations out. Ends the opening when nothing is left to be done.
    pub fn advance(&mut self, out: &mut VecDeque<Output>) -> Progress {
        loop {
            while self.under_way.len() < WINDOW
                && let Some(kind) = self.waiting.pop_front()
            {
                let id = DiskOpId::new(self.next_op);
                self.next_op += 1;
                self.under_way.insert(id, kind.clone());
                out.push_back(Output::Disk(DiskOp { id, kind }));
            }
            if !self.under_way.is_empty() {
                return Progress::More;
            }
            match self.next_stage() {
                Err(error) => return Progress::Refused(error),
                Ok(true) => return Progress::Opened(Box::new(self.finish())),
                Ok(false) => {}
            }
        }
    }

    pub fn on_disk(&mut self, done: DiskDone, out: &mut VecDeque<Output>) -> Progress {
        let Some(kind) = self.under_way.remove(&done.id) else { return Progress::More };
        match (kind, done.result) {
            (DiskOpKind::Read { offset, len }, result) => self.on_read(offset.0, len, result.ok().flatten()),
            (_, Err(error)) => return Progress::Refused(OpenError::Disk(error.to_string())),
            (DiskOpKind::Write { .. }, Ok(_)) if self.stage == Stage::Restate => {
                // Nothing before it waits for a flush and it tells of no data: it is a sync write.
                assert!(!matches!(self.recovering().journal.on_wrote(), Wrote::Flush), "what is restated stands alone");
            }
            (_, Ok(_)) => {}
        }
        self.advance(out)
    }

    fn on_read(&mut self, offset: u64, len: usize, data: Option<Data>) {
        match (self.stage, data) {
            // One bad block must not hide its neighbours.
            (_, None) if len > BLOCK => {
                let blocks = (offset..offset + len as u64).step_by(BLOCK);
                self.waiting.extend(blocks.map(|at| DiskOpKind::Read { offset: ByteCount(at), len: BLOCK }));
            }
            (Stage::Verify, data) => self.on_verified(offset, len, data),
            (Stage::Bodies, Some(data)) if self.is_table(offset) => self.on_table(offset, &data),
            (_, Some(data)) => self.image.insert(offset, data),
            (_, None) => {}
        }
    }

    fn recovering(&mut self) -> &mut Recovering {
        self.state.as_mut().expect("there is a state from the stage Verify on")
    }

    fn geometry(&self) -> Geometry {
        self.superblock.as_ref().expect("the superblock was judged first").0.geometry
    }

    /// The stage is done: prepares the next one. `true`: that was the last.
    fn next_stage(&mut self) -> Result<bool, OpenError> {
        self.stage = match self.stage {
            Stage::Superblocks => {
                let copies = SUPERBLOCKS.map(|offset| self.image.block(offset));
                if copies == [None, None] {
                    return Err(OpenError::Disk("neither superblock could be read".into()));
                }
                self.superblock = Some(Superblock::judge(copies, self.cluster, self.node, self.size)?);
                self.read_metadata();
                Stage::Metadata
            }
            Stage::Metadata => {
                self.read_table()?;
                self.read_catalog_bodies();
                Stage::Bodies
            }
            Stage::Bodies => {
                self.read_journal();
                Stage::Journal
            }
            Stage::Journal => {
                if self.read_journal() {
                    Stage::Journal
                } else {
                    self.judge_metadata()?;
                    self.read_first_writes();
                    Stage::Verify
                }
            }
            Stage::Verify => self.flush(Stage::Settle),
            Stage::Settle => {
                self.heal();
                Stage::Heal
            }
            Stage::Heal => {
                let state = self.recovering();
                state.anchor.sequence += 1;
                state.anchor.life += 1;
                state.anchor.end = state.found.journal_end;
                let worse = 1 - state.found.anchor_copy;
                self.write_anchor(worse);
                Stage::LifeFirst
            }
            Stage::LifeFirst => {
                let better = self.recovering().found.anchor_copy;
                self.write_anchor(better);
                Stage::LifeSecond
            }
            Stage::LifeSecond => {
                self.write_table(true);
                Stage::TableWorse
            }
            Stage::TableWorse => self.flush(Stage::TableWorseFlush),
            Stage::TableWorseFlush => {
                self.write_table(false);
                Stage::TableBetter
            }
            Stage::TableBetter => self.flush(Stage::TableBetterFlush),
            Stage::TableBetterFlush => {
                self.restate();
                Stage::Restate
            }
            Stage::Restate => {
                let state = self.recovering();
                let end = state.journal.durable();
                state.anchor = Anchor {
                    sequence: state.anchor.sequence + 1,
                    tail: state.found.journal_end,
                    durable: end,
                    log_life: state.anchor.life,
                    life: state.anchor.life,
                    end: 0,
                    slots: state.table.len(),
                };
                self.write_anchor(0);
                Stage::AnchorFirst
            }
            Stage::AnchorFirst => {
                self.write_anchor(1);
                Stage::AnchorSecond
            }
            Stage::AnchorSecond => return Ok(true),
        };
        Ok(false)
    }

    fn flush(&mut self, stage: Stage) -> Stage {
        self.waiting.push_back(DiskOpKind::Flush);
        stage
    }

    fn write(&mut self, offset: u64, data: Data, sync: bool) {
        self.waiting.push_back(DiskOpKind::Write { offset: ByteCount(offset), data: vec![data], sync });
    }

    fn read(&mut self, start: u64, len: u64) {
        for at in (0..len).step_by(CHUNK_BYTES as usize) {
            let len = CHUNK_BYTES.min(len - at) as usize;
            self.waiting.push_back(DiskOpKind::Read { offset: ByteCount(start + at), len });
        }
    }

    fn read_metadata(&mut self) {
        for start in ANCHORS.into_iter().chain(CATALOGS) {
            self.read(start, BLOCK_BYTES);
        }
    }

    fn read_table(&mut self) -> Result<(), OpenError> {
        let geometry = self.geometry();
        let (_, anchor) = find_anchor(&self.image, self.pool_id())
            .ok_or_else(|| OpenError::Damaged("both copies of the journal's anchor are unreadable".into()))?;
        if anchor.slots > geometry.slots {
            let text = format!("the anchor speaks of {} slots, there are {}", anchor.slots, geometry.slots);
            return Err(OpenError::Damaged(text));
        }
        let table = TableFound::new(anchor.slots, &geometry);
        let len = u64::from(table.blocks()) * BLOCK_BYTES;
        self.table = Some(table);
        geometry.tables.into_iter().for_each(|start| self.read(start, len));
        Ok(())
    }

    fn is_table(&self, offset: u64) -> bool {
        let geometry = self.geometry();
        (geometry.tables[0]..geometry.data).contains(&offset)
    }

    fn on_table(&mut self, offset: u64, data: &Data) {
        let (geometry, pool) = (self.geometry(), self.pool_id());
        let copy = usize::from(offset >= geometry.tables[1]);
        let first = ((offset - geometry.tables[copy]) / BLOCK_BYTES) as u32;
        let table = self.table.as_mut().expect("it was made before it was read");
        for (block, bytes) in (first..).zip(data.as_slice().chunks_exact(BLOCK)) {
            table.take(copy, block, bytes, pool, &geometry);
        }
    }

    fn pool_id(&self) -> PoolId {
        self.superblock.as_ref().expect("the superblock was judged first").0.identity.pool
    }

    fn read_catalog_bodies(&mut self) {
        for start in CATALOGS {
            let head = self.image.block(start);
            let len = head.and_then(|head| Catalog::body_len(head, self.pool_id())).unwrap_or(0);
            self.read(start + BLOCK_BYTES, (len as u64).next_multiple_of(BLOCK_BYTES));
        }
    }

    /// Reads the next stretch of the journal; `false`: there is no more. The journal itself ends at the first block that
    /// is missing, and what is read beyond serves to tell an end from a hole.
    fn read_journal(&mut self) -> bool {
        let Some((_, anchor)) = find_anchor(&self.image, self.pool_id()) else { return false };
        let ring = self.geometry().ring;
        let (from, stretch) = (self.journal_read, ring.blocks / STRETCH_PART);
        let at = |offset| self.image.block(offset);
        let goes_on = from == 0 || journal::any(at, self.pool_id(), ring, anchor, from - stretch..from);
        let from = from.max(anchor.tail);
        let blocks = stretch.min((anchor.tail + ring.blocks).saturating_sub(from));
        if !goes_on || blocks == 0 {
            return false;
        }
        let before_end = blocks.min(ring.blocks - ring.place(from));
        self.read(ring.offset(from), before_end * BLOCK_BYTES);
        self.read(ring.offset(0), (blocks - before_end) * BLOCK_BYTES);
        self.journal_read = from + stretch;
        true
    }

    fn judge_metadata(&mut self) -> Result<(), OpenError> {
        let (pool, geometry) = (self.pool_id(), self.geometry());
        let table = self.table.take().expect("it was read before");
        let mut found = recover(&std::mem::take(&mut self.image), table, pool, &geometry)?;
        self.judge_age(&found)?;
        let mut table = SlotTable::new(geometry, std::mem::take(&mut found.slots), found.anchor.life + 1);
        found.table_heal.keys().for_each(|block| table.mark_dirty(*block));
        let table_blocks = table.take_dirty(pool);
        let anchor = found.anchor;
        let journal = Journal::new(pool, geometry.ring, anchor.life + 1, found.journal_end);
        self.state = Some(Recovering { found, table, anchor, journal, table_blocks });
        Ok(())
    }

    /// A disk that has not come as far as it is known to have is an image of an earlier day.
    fn judge_age(&self, found: &Found) -> Result<(), OpenError> {
        let at = Position { changes: found.catalog.changes, journal: found.journal_end };
        let disk = self.superblock.as_ref().expect("the superblock was judged first").0.identity.disk;
        match self.seen.get(&disk).filter(|seen| at < **seen) {
            Some(seen) => {
                Err(OpenError::EarlierDay { why: format!("it is at {at}, and this node has seen it at {seen}") })
            }
            None => Ok(()),
        }
    }

    /// First writes that no flush is known to have covered, in runs of neighbours.
    fn read_first_writes(&mut self) {
        let geometry = self.geometry();
        let state = self.recovering();
        let mut verifying: BTreeMap<u64, (Key, u16)> = BTreeMap::new();
        for (key, hot) in &mut state.found.hot {
            let Some(slot) = hot.slot else { continue };
            let units = &state.table.get(slot).units;
            hot.recovered.overlay.retain(|block, _| {
                let unit = units.get(usize::from(*block) / UNIT_BLOCKS);
                let offset = unit.map(|unit| geometry.offset(unit, usize::from(*block) % UNIT_BLOCKS).0);
                verifying.extend(offset.map(|offset| (offset, (*key, *block))));
                // A first write is told of after its unit: without one it was given back again.
                unit.is_some()
            });
        }
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for offset in verifying.keys() {
            match runs.last_mut() {
                Some((start, len)) if *start + *len == *offset && *len < CHUNK_BYTES => *len += BLOCK_BYTES,
                _ => runs.push((*offset, BLOCK_BYTES)),
            }
        }
        let read = |(offset, len): (u64, u64)| DiskOpKind::Read { offset: ByteCount(offset), len: len as usize };
        self.waiting.extend(runs.into_iter().map(read));
        self.verifying = verifying;
    }

    fn on_verified(&mut self, offset: u64, len: usize, data: Option<Data>) {
        let blocks = self.verifying.range(offset..offset + len as u64).map(|(at, block)| (*at, *block));
        for (at, (key, block)) in blocks.collect::<Vec<_>>() {
            let hot = self.recovering().found.hot.get_mut(&key).expect("only blocks of hot extents are verified");
            let Some((expected, _)) = hot.recovered.overlay.remove(&block) else { continue };
            let base = &mut hot.recovered.base[usize::from(block)];
            let from = (at - offset) as usize;
            match &data {
                None => *base = Base::Lost,
                Some(data) if BlockChecksum::of(&data.as_slice()[from..from + BLOCK]) == expected => {
                    *base = Base::Valid;
                }
                // It never arrived, and nobody was promised that it would: it is what it was.
                Some(_) => {}
            }
        }
    }

    fn heal(&mut self) {
        let (superblock, damaged) = self.superblock.expect("it was judged before");
        for (offset, _) in SUPERBLOCKS.into_iter().zip(damaged).filter(|(_, damaged)| *damaged) {
            self.write(offset, superblock.encode(), true);
        }
        let found = &self.recovering().found;
        let (catalog, heal) =
            (found.catalog.encode(found.catalog_sequence, superblock.identity.pool), found.catalog_heal);
        for (offset, _) in CATALOGS.into_iter().zip(heal).filter(|(_, heal)| *heal) {
            self.write(offset, catalog.clone(), true);
        }
    }

    fn write_anchor(&mut self, copy: usize) {
        let pool = self.pool_id();
        let anchor = self.recovering().anchor.encode(pool);
        self.write(ANCHORS[copy], anchor, true);
    }

    fn write_table(&mut self, worse: bool) {
        let geometry = self.geometry();
        let state = self.recovering();
        let writes: Vec<(u64, Data)> = state
            .table_blocks
            .iter()
            .map(|(block, data)| {
                let better = state.found.table_heal[block];
                let copy = if worse { 1 - better } else { better };
                (geometry.table_offset(copy, *block).0, data.clone())
            })
            .collect();
        for (offset, data) in writes {
            self.write(offset, data, false);
        }
    }

    fn restate(&mut self) {
        let state = self.recovering();
        let mut records = Vec::new();
        for ((layer, extent), hot) in &state.found.hot {
            records.push(Record::Hot { layer: *layer, extent: *extent, generation: hot.generation });
            if let Some(slot) = hot.slot {
                records.push(Record::Mask(Box::new(hot.recovered.mask(slot))));
            }
        }
        if records.is_empty() {
            return;
        }
        state.journal.restate(records, LogThen::Nothing);
        let writes = state.journal.start();
        self.waiting.extend(writes.into_iter().flatten());
    }

    fn finish(&mut self) -> Pool {
        let (superblock, _) = self.superblock.expect("it was judged before");
        let state = self.state.take().expect("the opening ends once");
        Pool::new(superblock, state.found, state.table, state.anchor, state.journal)
    }
}
