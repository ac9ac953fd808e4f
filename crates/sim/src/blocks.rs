//! Which values a block may hold, by what its clients were told: the model that reads are judged by.
//!
//! A block is a register. A write takes effect somewhere between its being asked and its being acknowledged; one that
//! was never acknowledged (its client died, or was told that it failed) may have taken effect or not, and the first read
//! settles it for good. A power cut of every replica that held an acknowledged write unflushed may take it back, as far
//! as the last flush; a replica that a later record leaves behind holds nothing any more. Where several values are
//! possible, a torn write may have left sectors of each.
//!
//! A write of some sectors of a block leaves the others as they were: two of them on one block, at the same time, both
//! last. With an acknowledged one the whole block is at every replica, and on stable storage if it was asked with FUA.

use crate::history::{SECTORS, Seen, Value};
use pollux_base::{NodeId, VolumeId};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// What a read's answer says about the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Fine,
    /// Older than what was acknowledged.
    Lost {
        block: u64,
        value: Value,
        legal: Vec<Value>,
    },
    /// Never written there, or taken back after it had been settled.
    Impossible {
        block: u64,
        value: Value,
        legal: Vec<Value>,
    },
}

/// An acknowledged (or read) value that power cuts may still take back.
#[derive(Clone, Debug)]
struct Held {
    value: Value,
    order: u64,
    /// Who held it; lost when the power of all of them was cut since. Empty: on stable storage.
    holders: BTreeSet<NodeId>,
    cut: BTreeSet<NodeId>,
}

impl Held {
    fn may_be_lost(&self) -> bool {
        !self.holders.is_empty() && self.holders.is_subset(&self.cut)
    }
}

#[derive(Clone, Debug)]
struct Block {
    /// Oldest first; the first is on stable storage.
    held: Vec<Held>,
    /// What the block may hold now, apart from writes under way.
    possible: Vec<Value>,
    under_way: Vec<u64>,
    /// Changes with everything that narrows or widens what is possible.
    version: u64,
    newest_acked: u64,
}

impl Block {
    fn new() -> Block {
        let zero = Held { value: Value::ZERO, order: 0, holders: BTreeSet::new(), cut: BTreeSet::new() };
        Block { held: vec![zero], possible: vec![Value::ZERO], under_way: vec![], version: 0, newest_acked: 0 }
    }
    fn settle(&mut self, value: Value, order: u64, holders: &BTreeSet<NodeId>) {
        self.possible = vec![value];
        self.version += 1;
        if let Some(at) = self.held.iter().rposition(|held| held.value == value) {
            self.held.truncate(at + 1);
        } else {
            // Which of them were taken back is not known; any may be what stable storage holds.
            self.held.push(Held { value, order, holders: holders.clone(), cut: BTreeSet::new() });
        }
    }
    /// Replicas that are not in sync any more do not count as holding anything. (All of them never go at once.)
    fn leave_behind(&mut self, in_sync: &BTreeSet<NodeId>) {
        for held in self.held.iter_mut().filter(|held| !held.holders.is_disjoint(in_sync)) {
            held.holders.retain(|node| in_sync.contains(node));
        }
        self.lose_what_nobody_holds();
    }
    /// The first of those that were acknowledged together with the last of which this is true: it is one of them.
    fn last_held(&self, is_it: impl Fn(&Held) -> bool) -> Option<usize> {
        let order = self.held.iter().rfind(|held| is_it(held))?.order;
        self.held.iter().position(|held| held.order == order)
    }
    /// What every holder lost with its power may be gone, back to what one of them has for certain.
    fn lose_what_nobody_holds(&mut self) {
        let certain = self.last_held(|held| !held.may_be_lost()).unwrap_or(0);
        if certain + 1 < self.held.len() {
            for at in certain..self.held.len() {
                self.widen(self.held[at].value);
            }
        }
    }
    /// The block holds this from now on, on stable storage; what was under way is never seen again.
    fn go_back(&mut self, value: Value) {
        self.held = vec![Held { value, order: 0, holders: BTreeSet::new(), cut: BTreeSet::new() }];
        self.possible = vec![value];
        self.under_way.clear();
        self.version += 1;
        self.newest_acked = value.0.into_iter().filter(|write| *write != Value::GARBAGE).max().unwrap_or(0);
    }
    fn widen(&mut self, value: Value) {
        if !self.possible.contains(&value) {
            self.possible.push(value);
        }
        self.version += 1;
    }
}

struct Write {
    volume: VolumeId,
    blocks: Range<u64>,
    sectors: Range<usize>,
    zero: bool,
    /// Nodes whose power was cut since it was asked: what they said of it may come after they lost it.
    cut: BTreeSet<NodeId>,
}

impl Write {
    fn value(&self, number: u64) -> Value {
        let whole = if self.zero { Value::ZERO } else { Value::of(number) };
        whole.part(&self.sectors)
    }
}

struct Read {
    volume: VolumeId,
    start: u64,
    /// Per block: what was possible when it was asked, what was under way, and the version of then.
    then: Vec<(Vec<Value>, u64)>,
    /// Writes asked while the read was under way, by block.
    during: BTreeMap<u64, Vec<Value>>,
}

/// All blocks that clients ever wrote or read.
#[derive(Default)]
pub struct Blocks {
    blocks: BTreeMap<(VolumeId, u64), Block>,
    writes: BTreeMap<u64, Write>,
    flushes: BTreeMap<u64, (VolumeId, u64)>,
    reads: BTreeMap<u64, Read>,
    order: u64,
}

impl Blocks {
    /// Takes the event in; an answered read is judged.
    pub fn see(&mut self, seen: &Seen) -> Verdict {
        match seen {
            Seen::Write { write, volume, range, sectors, zero } => {
                let blocks = range.start.0..range.end().0;
                let (volume, sectors, zero, cut) = (*volume, sectors.clone(), *zero, BTreeSet::new());
                let new = Write { volume, blocks: blocks.clone(), sectors, zero, cut };
                let value = new.value(*write);
                for read in self.reads.values_mut().filter(|read| read.volume == volume) {
                    for block in blocks.clone() {
                        read.during.entry(block).or_default().push(value);
                    }
                }
                for block in blocks {
                    let block = self.block(volume, block);
                    block.under_way.push(*write);
                    block.version += 1;
                }
                self.writes.insert(*write, new);
            }
            Seen::WriteAcked { write, in_sync, fua, .. } => {
                let Some(done) = self.writes.remove(write) else { return Verdict::Fine };
                self.order += 1;
                let (order, value) = (self.order, done.value(*write));
                for index in done.blocks.clone() {
                    let block = self.block(done.volume, index);
                    block.under_way.retain(|other| other != write);
                    let after: BTreeSet<Value> = block.possible.iter().map(|before| value.over(*before)).collect();
                    block.possible = after.iter().copied().collect();
                    block.version += 1;
                    block.newest_acked = block.newest_acked.max(*write);
                    let holders = if *fua { BTreeSet::new() } else { in_sync.clone() };
                    if *fua {
                        block.held.clear();
                    }
                    let (holders, cut) = (&holders, &done.cut);
                    let held = |value| Held { value, order, holders: holders.clone(), cut: cut.clone() };
                    block.held.extend(after.into_iter().map(held));
                    block.lose_what_nobody_holds();
                }
            }
            Seen::WriteFailed { write } => self.give_up(*write),
            Seen::Flush { flush, volume } => {
                self.flushes.insert(*flush, (*volume, self.order));
            }
            Seen::FlushAcked { flush, .. } => {
                let Some((volume, until)) = self.flushes.remove(flush) else { return Verdict::Fine };
                for (_, block) in self.blocks.range_mut((volume, 0)..=(volume, u64::MAX)) {
                    if let Some(at) = block.last_held(|held| held.order <= until) {
                        block.held.drain(..at);
                        let order = block.held[0].order;
                        block.held.iter_mut().filter(|held| held.order == order).for_each(|held| held.holders.clear());
                    }
                }
            }
            Seen::Read { read, volume, range } => {
                let mut then = Vec::new();
                for index in range.start.0..range.end().0 {
                    let under_way = self.block(*volume, index).under_way.clone();
                    let mut legal = self.block(*volume, index).possible.clone();
                    legal.extend(under_way.iter().map(|write| self.writes[write].value(*write)));
                    then.push((legal, self.block(*volume, index).version));
                }
                let during = BTreeMap::new();
                self.reads.insert(*read, Read { volume: *volume, start: range.start.0, then, during });
            }
            Seen::ReadAnswered { read, values, in_sync, .. } => return self.judge(*read, values, in_sync),
            Seen::ClientGone { volumes } => {
                let gone = |volume: &VolumeId| volumes.contains(volume);
                let writes: Vec<u64> = self.writes.iter().filter(|(_, w)| gone(&w.volume)).map(|(n, _)| *n).collect();
                for write in writes {
                    self.give_up(write);
                }
                self.flushes.retain(|_, (volume, _)| !gone(volume));
                self.reads.retain(|_, read| !gone(&read.volume));
            }
            Seen::PowerCut { node } => {
                for write in self.writes.values_mut() {
                    write.cut.insert(*node);
                }
                for block in self.blocks.values_mut() {
                    for held in &mut block.held {
                        held.cut.insert(*node);
                    }
                    block.lose_what_nobody_holds();
                }
            }
            Seen::RolledBack { volumes, values, .. } => {
                for volume in volumes {
                    for ((_, index), block) in self.blocks.range_mut((*volume, 0)..=(*volume, u64::MAX)) {
                        block.go_back(values.get(&(*volume, *index)).copied().unwrap_or(Value::ZERO));
                    }
                }
                for ((volume, index), value) in values {
                    self.block(*volume, *index).go_back(*value);
                }
            }
            Seen::Record { volumes, record, .. } => {
                for volume in volumes {
                    for (_, block) in self.blocks.range_mut((*volume, 0)..=(*volume, u64::MAX)) {
                        block.leave_behind(&record.in_sync);
                    }
                }
            }
            _ => {}
        }
        Verdict::Fine
    }

    /// What the block may hold now, nothing being under way.
    pub fn possible(&self, volume: VolumeId, block: u64) -> Vec<Value> {
        self.blocks.get(&(volume, block)).map_or(vec![Value::ZERO], |block| block.possible.clone())
    }

    fn block(&mut self, volume: VolumeId, index: u64) -> &mut Block {
        self.blocks.entry((volume, index)).or_insert_with(Block::new)
    }

    /// The write may have taken effect or not; nobody will ever be told.
    fn give_up(&mut self, write: u64) {
        let Some(lost) = self.writes.remove(&write) else { return };
        let value = lost.value(write);
        for index in lost.blocks.clone() {
            let block = self.block(lost.volume, index);
            block.under_way.retain(|other| *other != write);
            block.widen(value);
        }
    }

    fn judge(&mut self, read: u64, values: &[Value], in_sync: &BTreeSet<NodeId>) -> Verdict {
        let Some(read) = self.reads.remove(&read) else { return Verdict::Fine };
        let mut verdict = Verdict::Fine;
        self.order += 1;
        let order = self.order;
        for ((index, value), (then, version)) in (read.start..).zip(values).zip(read.then) {
            let now = self.block(read.volume, index).clone();
            let mut legal = then;
            legal.extend(read.during.get(&index).into_iter().flatten());
            legal.extend(&now.possible);
            let fits = (0..SECTORS).all(|sector| legal.iter().any(|other| other.0[sector] == value.0[sector]));
            if !fits {
                let older = value.0.iter().all(|write| *write <= now.newest_acked) && now.newest_acked > 0;
                let (block, value) = (index, *value);
                verdict = match older {
                    true => Verdict::Lost { block, value, legal },
                    false => Verdict::Impossible { block, value, legal },
                };
            } else if version == now.version {
                self.block(read.volume, index).settle(*value, order, in_sync);
            }
        }
        verdict
    }
}
