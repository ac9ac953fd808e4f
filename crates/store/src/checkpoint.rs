//! Keeping the journal short: what its older half says goes to the slot table, what is still hot is said again, then the
//! tail moves forward.
//!
//! Life of a checkpoint:
//! begun (tail to be = first block whose records are not committed; changed table blocks as committed) -> flush ->
//! first copies of the table, and what is hot restated -> flush -> second copies -> flush -> first anchor -> second
//! anchor -> the tail moves.
//!
//! A crash at any point finds the old tail and everything after it: records state how things are, so that reading them
//! over a newer table changes nothing.

use crate::layout::ANCHORS;
use crate::pool::{DiskThen, FlushThen, LogThen, Pool};
use crate::record::Record;
use crate::superblock::Anchor;
use pollux_base::{ByteCount, Data, DiskOpKind};
use std::collections::VecDeque;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Flush,
    First,
    FirstFlush,
    Second,
    SecondFlush,
    AnchorFirst,
    AnchorSecond,
}

/// Table writes under way at once: a checkpoint is in the background and should not crowd out the guests' writes.
const WINDOW: usize = 4;

pub struct Checkpoint {
    tail: u64,
    /// So many slots does the table hold then.
    slots: u32,
    blocks: Vec<(u32, Data)>,
    step: Step,
    waiting: VecDeque<DiskOpKind>,
    under_way: usize,
    restated: bool,
}

impl Checkpoint {
    /// Whether this block of the table is one of those that it writes.
    pub fn writes(&self, block: u32) -> bool {
        self.blocks.binary_search_by_key(&block, |(block, _)| *block).is_ok()
    }

    pub fn writes_anchor(&self) -> bool {
        matches!(self.step, Step::AnchorFirst | Step::AnchorSecond)
    }
}

impl Pool {
    pub fn begin_checkpoint(&mut self) {
        let blocks = self.table.take_dirty(self.pool_id());
        let tail = self.journal.committed();
        let slots = self.table.len();
        let waiting = VecDeque::new();
        let step = Step::Flush;
        self.checkpoint = Some(Checkpoint { tail, slots, blocks, step, waiting, under_way: 0, restated: false });
        self.flush(FlushThen::Checkpoint);
    }

    fn checkpoint(&mut self) -> &mut Checkpoint {
        self.checkpoint.as_mut().expect("a checkpoint is under way")
    }

    pub fn on_checkpoint_flushed(&mut self) {
        match self.checkpoint().step {
            Step::Flush => {
                self.restate();
                self.write_table(0, Step::First);
            }
            Step::FirstFlush => self.write_table(1, Step::Second),
            Step::SecondFlush => {
                let checkpoint = self.checkpoint.as_ref().expect("a checkpoint is under way");
                let (tail, slots, durable) = (checkpoint.tail, checkpoint.slots, self.journal.durable());
                self.anchor = Anchor { sequence: self.anchor.sequence + 1, tail, durable, slots, ..self.anchor };
                self.write_anchor(0, Step::AnchorFirst);
            }
            Step::First | Step::Second | Step::AnchorFirst | Step::AnchorSecond => {
                unreachable!("no flush was asked for in this step")
            }
        }
    }

    /// Every mark and every mask that a recovery needs and that the blocks before the new tail might be alone to tell.
    fn restate(&mut self) {
        // Everything before the new tail was written when the flush began.
        let flushed = self.journal.durable();
        let mut records: Vec<Record> = self.turn_marks().collect();
        for ((layer, extent), hot) in self.hot.iter().filter(|(_, hot)| !hot.is_committing()) {
            records.push(Record::Hot { layer: *layer, extent: *extent, generation: hot.generation });
            records.extend(hot.mask(flushed).map(|mask| Record::Mask(Box::new(mask))));
        }
        if records.is_empty() {
            self.checkpoint().restated = true;
        } else {
            self.journal.restate(records, LogThen::Restated);
        }
    }

    fn write_table(&mut self, copy: usize, step: Step) {
        let geometry = *self.geometry();
        let checkpoint = self.checkpoint();
        checkpoint.step = step;
        let writes = checkpoint.blocks.iter().map(|(block, data)| DiskOpKind::Write {
            offset: geometry.table_offset(copy, *block),
            data: vec![data.clone()],
            sync: false,
        });
        checkpoint.waiting = writes.collect();
        self.continue_table();
    }

    pub fn on_table_written(&mut self) {
        self.checkpoint().under_way -= 1;
        self.continue_table();
    }

    pub fn on_restated(&mut self) {
        self.checkpoint().restated = true;
        self.continue_table();
    }

    fn continue_table(&mut self) {
        let checkpoint = self.checkpoint.as_mut().expect("a checkpoint is under way");
        while checkpoint.under_way < WINDOW
            && let Some(write) = checkpoint.waiting.pop_front()
        {
            checkpoint.under_way += 1;
            self.io.submit(write, DiskThen::Table);
        }
        let done = checkpoint.under_way == 0 && checkpoint.waiting.is_empty() && checkpoint.restated;
        let next = match checkpoint.step {
            Step::First => Step::FirstFlush,
            Step::Second => Step::SecondFlush,
            Step::Flush | Step::FirstFlush | Step::SecondFlush | Step::AnchorFirst | Step::AnchorSecond => return,
        };
        if done {
            checkpoint.step = next;
            self.flush(FlushThen::Checkpoint);
        }
    }

    fn write_anchor(&mut self, copy: usize, step: Step) {
        self.checkpoint().step = step;
        let data = vec![self.anchor.encode(self.pool_id())];
        let write = DiskOpKind::Write { offset: ByteCount(ANCHORS[copy]), data, sync: true };
        self.io.submit(write, DiskThen::Anchor);
    }

    pub fn on_anchor_written(&mut self) {
        if self.checkpoint().step == Step::AnchorFirst {
            return self.write_anchor(1, Step::AnchorSecond);
        }
        self.checkpoint = None;
        self.journal.on_anchor(self.anchor.tail, self.anchor.durable);
    }
}
