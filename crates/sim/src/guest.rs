//! A simulated virtual machine: a QEMU with a client of its volumes that reads, writes, zeroes and flushes.
//!
//! Like QEMU's own client it holds its requests while its volume is not served, and asks again what was not answered when
//! the connection was lost. It never has two writes to one sector under way, as no file system has, but now and then
//! several to one block.

use pollux_base::unit::BlockRange;
use pollux_base::{BlockCount, BlockIndex, GroupId, Incarnation, Op, RequestId, VmId, VolumeId};
use pollux_store::faulty_disk::Luck;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use crate::content::{SECTOR_BYTES, bytes_of};
use crate::history::{ALL, SECTORS};

/// Requests under way at most.
const DEPTH: usize = 4;
/// Places of a volume that its guest uses: few, so that requests meet.
const PLACES: u64 = 10;
/// Further places, to which it comes only when something goes wrong: so most of them are not written before.
const FRESH: u64 = 6;
/// It works at so many neighbouring places at a time, and moves on after so many requests on average. So there are extents
/// that it comes to for the first time in a generation, also while a cut or a takeover is under way.
const AT_A_TIME: u64 = 2;
const STAYS: u64 = 25;
/// A request begins so many blocks after a place at most, and is so long at most.
const AROUND: u64 = 12;
const LONGEST: u64 = 16;

/// One request. The number is unique in the world.
#[derive(Clone, Debug)]
pub enum Ask {
    Write {
        volume: VolumeId,
        range: BlockRange,
        zero: bool,
        fua: bool,
    },
    /// A write of some sectors of a block.
    Patch {
        volume: VolumeId,
        block: BlockIndex,
        sectors: Range<usize>,
        fua: bool,
    },
    Read {
        volume: VolumeId,
        range: BlockRange,
    },
    Flush {
        volume: VolumeId,
    },
}

impl Ask {
    pub fn volume(&self) -> VolumeId {
        match self {
            Ask::Write { volume, .. }
            | Ask::Patch { volume, .. }
            | Ask::Read { volume, .. }
            | Ask::Flush { volume } => *volume,
        }
    }
    /// The blocks that it changes, and which sectors of each.
    pub fn changes(&self) -> Option<(BlockRange, Range<usize>)> {
        match self {
            Ask::Write { range, .. } => Some((*range, ALL)),
            Ask::Patch { block, sectors, .. } => Some((BlockRange::new(*block, BlockCount(1)), sectors.clone())),
            Ask::Read { .. } | Ask::Flush { .. } => None,
        }
    }
    /// As the front end hands it on.
    pub fn op(&self, number: u64) -> Op {
        match self.clone() {
            Ask::Write { range, zero: true, fua, .. } => Op::Zero { range, fua },
            Ask::Write { volume, range, zero: false, fua } => {
                Op::Write { range, data: bytes_of(number, volume, range.start.0, range.count.0), fua }
            }
            Ask::Patch { volume, block, sectors, fua } => {
                let bytes = sectors.start * SECTOR_BYTES..sectors.end * SECTOR_BYTES;
                let (offset, data) = (bytes.start, bytes_of(number, volume, block.0, 1).slice(bytes));
                Op::Patch { block, offset, data, fua }
            }
            Ask::Read { range, .. } => Op::Read { range },
            Ask::Flush { .. } => Op::Flush,
        }
    }
}

#[derive(Debug)]
pub struct Asked {
    pub ask: Ask,
    /// The request as it was sent to this run of the data plane; `None`: waits for a connection.
    pub sent: Option<RequestId>,
}

pub struct Guest {
    pub vm: VmId,
    pub incarnation: Incarnation,
    pub group: GroupId,
    /// Volumes and their sizes in blocks.
    pub volumes: Vec<(VolumeId, u64)>,
    pub asked: BTreeMap<u64, Asked>,
    /// Reads to do before anything else: a run begins by looking at what it finds.
    pub to_check: VecDeque<(VolumeId, BlockRange)>,
    pub stopped: bool,
    /// The first of the places where it works now.
    place: u64,
    /// Answers of requests, counted; for the trace and for liveness.
    pub answered: u64,
}

impl Guest {
    pub fn new(vm: VmId, incarnation: Incarnation, group: GroupId, volumes: Vec<(VolumeId, u64)>) -> Guest {
        let mut guest = Guest {
            vm,
            incarnation,
            group,
            volumes,
            asked: BTreeMap::new(),
            to_check: VecDeque::new(),
            stopped: false,
            place: 0,
            answered: 0,
        };
        guest.check_all();
        guest
    }

    /// From now on everything that may have been written is read again.
    pub fn check_all(&mut self) {
        for (volume, blocks) in &self.volumes {
            for place in 0..PLACES + FRESH {
                let start = place_of(*volume, *blocks, place);
                let count = (AROUND + LONGEST).min(blocks - start);
                self.to_check.push_back((*volume, BlockRange::new(BlockIndex(start), BlockCount(count))));
            }
        }
    }

    /// From now on it writes where it most likely never wrote.
    pub fn go_to_fresh_places(&mut self, luck: &mut Luck) {
        self.place = PLACES + luck.below(FRESH);
    }

    /// The next request, if there is one to make now. With `writes` false only what is to be checked is read.
    pub fn next_ask(&mut self, luck: &mut Luck, writes: bool) -> Option<Ask> {
        if self.asked.len() >= DEPTH || self.volumes.is_empty() {
            return None;
        }
        if let Some((volume, range)) = self.to_check.pop_front() {
            return Some(Ask::Read { volume, range });
        }
        if !writes {
            return None;
        }
        let (volume, blocks) = self.volumes[luck.below(self.volumes.len() as u64) as usize];
        if luck.one_in(STAYS) {
            self.place = luck.below(PLACES);
        }
        let place = (self.place + luck.below(AT_A_TIME)) % (PLACES + FRESH);
        let start = (place_of(volume, blocks, place) + luck.below(AROUND)).min(blocks - 1);
        let longest = if luck.one_in(30) { LONGEST } else { 4 };
        let count = (1 + luck.below(longest)).min(blocks - start);
        let range = BlockRange::new(BlockIndex(start), BlockCount(count));
        let ask = match luck.below(20) {
            0..=8 => Ask::Write { volume, range, zero: false, fua: luck.one_in(8) },
            9..=10 => {
                let first = luck.below(SECTORS as u64) as usize;
                let sectors = first..first + 1 + luck.below((SECTORS - first).min(3) as u64) as usize;
                Ask::Patch { volume, block: range.start, sectors, fua: luck.one_in(8) }
            }
            11 => Ask::Write { volume, range, zero: true, fua: luck.one_in(8) },
            12..=17 => Ask::Read { volume, range },
            _ => Ask::Flush { volume },
        };
        let clashes = |other: &Asked| match (other.ask.changes(), ask.changes()) {
            (Some((theirs, sectors)), Some((ours, own))) => {
                let meet = sectors.start < own.end && own.start < sectors.end;
                other.ask.volume() == volume && theirs.overlaps(ours) && meet
            }
            _ => false,
        };
        (!self.asked.values().any(clashes)).then_some(ask)
    }
}

/// Where a guest likes to write: spread over the volume, some across the border of two extents.
fn place_of(volume: VolumeId, blocks: u64, place: u64) -> u64 {
    let spread = Luck::new(volume.0 * 1000 + place).draw();
    let start =
        if place.is_multiple_of(4) { (spread % (blocks / 1024).max(1) + 1) * 1024 - 6 } else { spread % blocks };
    start.min(blocks.saturating_sub(AROUND + LONGEST))
}
