//! A model of a disk that does everything `pollux_base::disk` allows and nothing it forbids: it completes in any order,
//! forgets what was not flushed when the power goes, tears what was under way, and on request rots, misdirects, fails and
//! lies. For tests of this crate and of its users, and for the simulator; never in a daemon.
//!
//! Everything is decided by seeds: the same calls give the same bytes. Invariants: `visible` is `durable` with every
//! entry of `unflushed` applied in order; an operation under way has changed neither.

use crate::{Disks, Input, Output};
use pollux_base::data::Buffer;
use pollux_base::{Data, DiskDone, DiskError, DiskOp, DiskOpId, DiskOpKind, Instant};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

const PAGE: usize = 4096;
/// What a disk writes whole or not at all.
const SECTOR: usize = 512;
/// A disk writes its cache back by itself at some time. The bound keeps long runs without a flush small.
const UNFLUSHED_MAX: usize = 16384;

type Page = Arc<[u8; PAGE]>;

/// Sequence of pseudo-random numbers (splitmix64, Steele et al. 2014). Good enough for tests, and ours to keep stable.
#[derive(Clone, Debug)]
pub struct Luck(u64);

impl Luck {
    pub fn new(seed: u64) -> Luck {
        Luck(seed)
    }
    /// The next 64 bits.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// A number below `bound` (which is not 0).
    pub fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "there is no number below 0");
        self.draw() % bound
    }
    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// Operations completed since the disk was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpCounts {
    pub reads: u64,
    pub writes: u64,
    pub written_bytes: u64,
    pub flushes: u64,
    pub discards: u64,
}

/// Which operation `fail_next` waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpClass {
    Any,
    Read,
    Write,
    Flush,
}

impl OpClass {
    fn matches(self, kind: &DiskOpKind) -> bool {
        match self {
            OpClass::Any => true,
            OpClass::Read => matches!(kind, DiskOpKind::Read { .. }),
            OpClass::Write => matches!(kind, DiskOpKind::Write { .. }),
            OpClass::Flush => matches!(kind, DiskOpKind::Flush),
        }
    }
}

/// A change that completed but may be lost with the power. `None` is a page of zeros, which takes no memory.
#[derive(Clone)]
struct Entry {
    number: u64,
    sync: bool,
    pages: Vec<(u64, Option<Page>)>,
}

#[derive(Clone)]
struct Pending {
    op: DiskOp,
    /// Changes completed before this was submitted: what a flush promises.
    completed_before: u64,
}

#[derive(Clone)]
pub struct FaultyDisk {
    size: u64,
    visible: BTreeMap<u64, Page>,
    durable: BTreeMap<u64, Page>,
    unflushed: VecDeque<Entry>,
    completed: u64,
    pending: BTreeMap<DiskOpId, Pending>,
    luck: Luck,
    failures: VecDeque<(OpClass, DiskError)>,
    misdirect: Option<u64>,
    ignores_flush: bool,
    counts: OpCounts,
}

impl FaultyDisk {
    /// An empty disk of `size` bytes; `seed` decides the order in which `complete_any` completes.
    pub fn new(size: u64, seed: u64) -> FaultyDisk {
        FaultyDisk {
            size,
            visible: BTreeMap::new(),
            durable: BTreeMap::new(),
            unflushed: VecDeque::new(),
            completed: 0,
            pending: BTreeMap::new(),
            luck: Luck::new(seed),
            failures: VecDeque::new(),
            misdirect: None,
            ignores_flush: false,
            counts: OpCounts::default(),
        }
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn counts(&self) -> OpCounts {
        self.counts
    }

    /// Takes an operation. It changes nothing before it is completed.
    pub fn submit(&mut self, op: DiskOp) {
        if let DiskOpKind::Write { data, .. } = &op.kind {
            assert!(data.iter().all(|part| part.is_aligned() && part.len() % PAGE == 0), "O_DIRECT asks for alignment");
        }
        if let DiskOpKind::Read { offset, .. } | DiskOpKind::Write { offset, .. } = &op.kind {
            assert_eq!(offset.0 % PAGE as u64, 0, "O_DIRECT asks for alignment");
        }
        let id = op.id;
        let before = self.pending.insert(id, Pending { op, completed_before: self.completed });
        assert!(before.is_none(), "{id:?} is already under way");
    }

    /// Operations under way, by id.
    pub fn pending(&self) -> impl Iterator<Item = &DiskOp> {
        self.pending.values().map(|pending| &pending.op)
    }

    /// Completes the operation; `None` if it is not under way.
    pub fn complete(&mut self, id: DiskOpId) -> Option<DiskDone> {
        let Pending { op, completed_before } = self.pending.remove(&id)?;
        if let Some(at) = self.failures.iter().position(|(class, _)| class.matches(&op.kind)) {
            let (_, error) = self.failures.remove(at).expect("the place was just found");
            // A write that failed may have reached the medium in part.
            if let DiskOpKind::Write { offset, data, .. } = &op.kind
                && self.in_bounds(offset.0, data.iter().map(|part| part.len() as u64).sum())
            {
                let pages = pages_of(offset.0, data);
                let torn = self.torn(pages);
                self.apply(torn, false);
            }
            return Some(DiskDone { id, result: Err(error) });
        }
        Some(DiskDone { id, result: self.perform(op.kind, completed_before) })
    }

    /// Completes one of the operations under way, chosen by luck.
    pub fn complete_any(&mut self) -> Option<DiskDone> {
        if self.pending.is_empty() {
            return None;
        }
        let nth = self.luck.below(self.pending.len() as u64) as usize;
        let id = *self.pending.keys().nth(nth)?;
        self.complete(id)
    }

    /// Completes everything under way, in an order chosen by luck.
    pub fn complete_all(&mut self) -> Vec<DiskDone> {
        std::iter::from_fn(|| self.complete_any()).collect()
    }

    /// The process dies: what completed stays as it is (and stays unflushed), what was under way is there, lost or torn.
    pub fn kill(&mut self, seed: u64) {
        self.luck = Luck::new(seed);
        for pages in self.interrupted() {
            self.apply(pages, false);
        }
    }

    /// The power goes: each change since the last completed flush is kept, lost or torn, and so is each one under way.
    pub fn power_cut(&mut self, seed: u64) {
        self.luck = Luck::new(seed);
        let interrupted = self.interrupted();
        // Extremes are tried often: a cache that kept everything, one that kept nothing.
        let mood = self.luck.below(4);
        self.visible = std::mem::take(&mut self.durable);
        for entry in std::mem::take(&mut self.unflushed) {
            let pages = match (entry.sync, mood) {
                (true, _) | (false, 0) => entry.pages,
                (false, 1) => continue,
                (false, _) => self.torn(entry.pages),
            };
            store(&mut self.visible, &pages);
        }
        for pages in interrupted {
            store(&mut self.visible, &pages);
        }
        self.durable = self.visible.clone();
    }

    /// Runs a pool that has this disk alone until it waits for nothing. The first error ends it.
    pub fn run(&mut self, pool: &mut Disks) -> Result<(), String> {
        loop {
            while let Some(output) = pool.poll() {
                match output {
                    Output::Disk(op) => self.submit(op),
                    Output::Opened(result) => result.map_err(|error| error.to_string())?,
                    Output::Ended(_, result) => drop(result.map_err(|error| error.to_string())?),
                    Output::Changed(_, result) => result?,
                    Output::Close(_) => {}
                }
            }
            let Some(done) = self.complete_any() else { return Ok(()) };
            pool.handle(Instant(0), Input::Disk(done));
        }
    }

    /// The next operation of this class fails with `error`. May be called again for the ones after.
    pub fn fail_next(&mut self, class: OpClass, error: DiskError) {
        self.failures.push_back((class, error));
    }

    /// No operation fails that was to.
    pub fn fail_none(&mut self) {
        self.failures.clear();
    }

    /// The next write lands `distance` bytes further on (a multiple of 4096) and is reported as done.
    pub fn misdirect_next_write(&mut self, distance: u64) {
        self.misdirect = Some(distance);
    }

    /// From now on a flush, and a `sync` write, completes without having done its work: a disk that lies. A checker of
    /// durability must notice.
    pub fn ignore_flushes(&mut self) {
        self.ignores_flush = true;
    }

    /// Bit rot: the byte at `offset` changes, in the cache and on the medium.
    pub fn rot(&mut self, offset: u64) {
        let mut page = self.read_now(offset - offset % PAGE as u64, PAGE);
        page[(offset % PAGE as u64) as usize] ^= 0x40;
        self.write_now(offset - offset % PAGE as u64, &page);
    }

    /// What a read would see now.
    pub fn read_now(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.copy_out(offset, &mut bytes);
        bytes
    }

    /// Puts whole pages there, durably, at once.
    pub fn write_now(&mut self, offset: u64, bytes: &[u8]) {
        assert!(offset.is_multiple_of(PAGE as u64) && bytes.len().is_multiple_of(PAGE), "whole pages only");
        for (index, chunk) in bytes.chunks_exact(PAGE).enumerate() {
            let number = offset / PAGE as u64 + index as u64;
            let pages = [(number, page_of(chunk))];
            store(&mut self.visible, &pages);
            store(&mut self.durable, &pages);
            for entry in &mut self.unflushed {
                entry.pages.retain(|(other, _)| *other != number);
            }
        }
    }

    /// The 4 KiB blocks that hold anything but zeros, as reads would see them: block number and bytes.
    pub fn blocks(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.visible.iter().filter(|(_, page)| page.iter().any(|byte| *byte != 0)).map(|(n, page)| (*n, &page[..]))
    }

    fn in_bounds(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.size)
    }

    fn perform(&mut self, kind: DiskOpKind, completed_before: u64) -> Result<Option<Data>, DiskError> {
        let outside = || DiskError::Io("outside the disk".into(), 22);
        match kind {
            DiskOpKind::Read { offset, len } => {
                self.counts.reads += 1;
                if !self.in_bounds(offset.0, len as u64) {
                    return Err(outside());
                }
                let mut buffer = Buffer::zeroed(len);
                self.copy_out(offset.0, buffer.as_mut_slice());
                Ok(Some(buffer.freeze()))
            }
            DiskOpKind::Write { offset, data, sync } => {
                let len = data.iter().map(|part| part.len() as u64).sum();
                self.counts.writes += 1;
                self.counts.written_bytes += len;
                let offset = offset.0 + self.misdirect.take().unwrap_or(0);
                if !self.in_bounds(offset, len) {
                    return Err(outside());
                }
                self.apply(pages_of(offset, &data), sync && !self.ignores_flush);
                Ok(None)
            }
            DiskOpKind::Flush => {
                self.counts.flushes += 1;
                if !self.ignores_flush {
                    while self.unflushed.front().is_some_and(|entry| entry.number < completed_before) {
                        self.write_back_oldest();
                    }
                }
                Ok(None)
            }
            DiskOpKind::Discard { offset, len } => {
                self.counts.discards += 1;
                if !self.in_bounds(offset.0, len) {
                    return Err(outside());
                }
                let pages = self.discarded(offset.0, len);
                self.apply(pages, false);
                Ok(None)
            }
        }
    }

    /// A discard leaves zeros, or what was there, or some of both.
    fn discarded(&mut self, offset: u64, len: u64) -> Vec<(u64, Option<Page>)> {
        let range = offset / PAGE as u64..(offset + len) / PAGE as u64;
        let present: Vec<u64> = self.visible.range(range).map(|(number, _)| *number).collect();
        let mood = self.luck.below(3);
        present.into_iter().filter(|_| mood == 0 || (mood == 1 && self.luck.one_in(2))).map(|n| (n, None)).collect()
    }

    fn apply(&mut self, pages: Vec<(u64, Option<Page>)>, sync: bool) {
        store(&mut self.visible, &pages);
        self.unflushed.push_back(Entry { number: self.completed, sync, pages });
        self.completed += 1;
        if self.unflushed.len() > UNFLUSHED_MAX && !self.ignores_flush {
            self.write_back_oldest();
        }
    }

    fn write_back_oldest(&mut self) {
        if let Some(entry) = self.unflushed.pop_front() {
            store(&mut self.durable, &entry.pages);
        }
    }

    /// Ends everything under way as a crash ends it: what is left of each write and discard, in any order.
    fn interrupted(&mut self) -> Vec<Vec<(u64, Option<Page>)>> {
        self.failures.clear();
        self.misdirect = None;
        let mut pending: Vec<DiskOpKind> = std::mem::take(&mut self.pending).into_values().map(|p| p.op.kind).collect();
        let mut left = Vec::new();
        while !pending.is_empty() {
            let nth = self.luck.below(pending.len() as u64) as usize;
            let pages = match pending.swap_remove(nth) {
                DiskOpKind::Write { offset, data, .. } => pages_of(offset.0, &data),
                DiskOpKind::Discard { offset, len } => self.discarded(offset.0, len),
                DiskOpKind::Read { .. } | DiskOpKind::Flush => continue,
            };
            left.push(self.torn(pages));
        }
        left
    }

    /// All, nothing, or some sectors of a change.
    fn torn(&mut self, pages: Vec<(u64, Option<Page>)>) -> Vec<(u64, Option<Page>)> {
        match self.luck.below(3) {
            0 => pages,
            1 => Vec::new(),
            _ => pages
                .into_iter()
                .map(|(number, new)| {
                    let mut mixed = self.visible.get(&number).map_or([0; PAGE], |page| **page);
                    let new = new.map_or([0; PAGE], |page| *page);
                    for sector in 0..PAGE / SECTOR {
                        if self.luck.one_in(2) {
                            let range = sector * SECTOR..(sector + 1) * SECTOR;
                            mixed[range.clone()].copy_from_slice(&new[range]);
                        }
                    }
                    (number, Some(Arc::new(mixed)))
                })
                .collect(),
        }
    }

    fn copy_out(&self, offset: u64, bytes: &mut [u8]) {
        let end = offset + bytes.len() as u64;
        for (number, page) in self.visible.range(offset / PAGE as u64..end.div_ceil(PAGE as u64)) {
            let page_start = number * PAGE as u64;
            let from = page_start.max(offset);
            let to = (page_start + PAGE as u64).min(end);
            bytes[(from - offset) as usize..(to - offset) as usize]
                .copy_from_slice(&page[(from - page_start) as usize..(to - page_start) as usize]);
        }
    }
}

fn page_of(bytes: &[u8]) -> Option<Page> {
    let page = <[u8; PAGE]>::try_from(bytes).expect("pages are cut to size");
    (page != [0; PAGE]).then(|| Arc::new(page))
}

fn pages_of(offset: u64, data: &[Data]) -> Vec<(u64, Option<Page>)> {
    let chunks = data.iter().flat_map(|part| part.as_slice().chunks_exact(PAGE));
    chunks.enumerate().map(|(index, chunk)| (offset / PAGE as u64 + index as u64, page_of(chunk))).collect()
}

fn store(image: &mut BTreeMap<u64, Page>, pages: &[(u64, Option<Page>)]) {
    for (number, page) in pages {
        match page {
            Some(page) => image.insert(*number, page.clone()),
            None => image.remove(number),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pollux_base::ByteCount;

    fn write(id: u64, offset: u64, byte: u8, sync: bool) -> DiskOp {
        let data = Data::copy_of(&[byte; PAGE]);
        DiskOp { id: DiskOpId::new(id), kind: DiskOpKind::Write { offset: ByteCount(offset), data: vec![data], sync } }
    }
    fn flush(id: u64) -> DiskOp {
        DiskOp { id: DiskOpId::new(id), kind: DiskOpKind::Flush }
    }

    #[test]
    fn what_was_flushed_or_sync_survives_every_power_cut() {
        for seed in 0..50 {
            let mut disk = FaultyDisk::new(1 << 20, 0);
            disk.submit(write(1, 0, 1, false));
            disk.complete(DiskOpId::new(1));
            disk.submit(write(2, 4096, 2, true));
            disk.complete(DiskOpId::new(2));
            disk.submit(flush(3));
            disk.complete(DiskOpId::new(3));
            disk.submit(write(4, 8192, 3, true));
            disk.complete(DiskOpId::new(4));
            disk.power_cut(seed);
            for (offset, byte) in [(0, 1), (4096, 2), (8192, 3)] {
                assert_eq!(disk.read_now(offset, PAGE), [byte; PAGE]);
            }
        }
    }

    #[test]
    fn what_was_not_flushed_is_at_times_kept_lost_and_torn() {
        let (mut kept, mut lost, mut torn) = (false, false, false);
        for seed in 0..100 {
            let mut disk = FaultyDisk::new(1 << 20, 0);
            disk.submit(write(1, 0, 1, false));
            disk.submit(flush(2));
            disk.complete(DiskOpId::new(1));
            // The flush was issued before the write completed: it promises nothing for it.
            disk.complete(DiskOpId::new(2));
            disk.power_cut(seed);
            match disk.read_now(0, PAGE).iter().filter(|byte| **byte == 1).count() {
                0 => lost = true,
                PAGE => kept = true,
                _ => torn = true,
            }
        }
        assert!(kept && lost && torn);
    }

    #[test]
    fn what_completed_survives_a_kill_but_stays_unflushed() {
        let mut lost = false;
        for seed in 0..20 {
            let mut disk = FaultyDisk::new(1 << 20, 0);
            disk.submit(write(1, 0, 1, false));
            disk.complete(DiskOpId::new(1));
            disk.kill(seed);
            assert_eq!(disk.read_now(0, PAGE), [1; PAGE]);
            disk.power_cut(seed);
            lost |= disk.read_now(0, PAGE) == [0; PAGE];
        }
        assert!(lost);
    }
}
