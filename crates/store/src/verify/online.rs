//! A pool's metadata, verified while it is used: piece by piece, what is on the disk is held against what is in memory.
//!
//! Nothing that moves is judged. A piece is read, and what it says is compared only if nobody has written there since it was
//! asked for, or is about to; otherwise the same piece is asked for again. So there is no false alarm, and no request of a
//! guest ever waits for this. Whoever asks decides how fast it goes: between two pieces nothing is under way.
//!
//! * Superblocks, anchors and the catalog: both copies are whole and say what memory says.
//! * The journal: every block that is needed is there.
//! * The slot table: both copies of each block are whole, and say what memory says unless the journal has more.
//! * Leaves: every block of those in use is whole, and vouches only for what has a place.
//! * Space: every unit and every leaf has one owner, and what is owned is not counted as free.

use super::blocks::name;
use super::code::Code;
use super::{Counts, Finding};
use crate::StoreRequestId;
use crate::catalog::Catalog;
use crate::layout::{ANCHORS, BLOCK, CATALOG_BYTES, CATALOGS, LeafPlace, SUPERBLOCKS, UNIT_BLOCKS, UNIT_BYTES};
use crate::leaf::{self, LOST_CHECKSUM, LeafOwner, SUMS, is_data};
use crate::pool::{DiskThen, Pool};
use crate::record::Record;
use crate::slots::{Slot, SlotState, decode_block, table_blocks_for};
use crate::superblock::{Anchor, Superblock};
use crate::{Output, StoreError, StoreReply};
use pollux_base::unit::{BLOCK_BYTES, EXTENT_BYTES, VOLUME_BYTES_MAX};
use pollux_base::{ByteCount, Data, DiskOpKind};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Blocks of the journal, and of each copy of the table, read at once: 256 and 64 KiB, some 100 us of a common disk.
const JOURNAL_AT_ONCE: u64 = 64;
const TABLE_AT_ONCE: u32 = 16;
/// Leaves read at once, and slots passed over to find them.
const LEAVES_AT_ONCE: usize = 8;
const SLOTS_PASSED_MAX: u32 = 2048;
/// Slots whose space is looked at at once: well below a millisecond.
const SLOTS_AT_ONCE: u32 = 1024;
/// Places that seem to have two owners, of which it is looked at whether they have at one moment. Under load some seem so because
/// they went from one to another meanwhile; of very many the first are enough to tell that something is wrong.
const SUSPECTS_MAX: usize = 4096;

/// What is to be looked at next. Begins with `Piece::default()`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Piece {
    /// Superblocks and anchors.
    #[default]
    Heads,
    Catalog,
    /// From this block on and as far as it was written then; `None`: all that is needed of it now.
    Journal(Option<(u64, u64)>),
    /// From this block on.
    Table(u32),
    /// Of this slot and the next ones.
    Leaves(u32),
    Space(u32),
    /// Who else claims what seems to have two owners.
    Suspects(u32),
}

/// A piece was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Looked {
    pub findings: Vec<Finding>,
    /// `None`: that was the last piece.
    pub next: Option<Piece>,
    /// How far that is, in thousandths.
    pub permille: u32,
    /// With the last piece: what there is on this disk.
    pub counts: Option<Counts>,
}

/// A look that goes on over many pieces.
#[derive(Default)]
pub struct Looking {
    asked: Option<Asked>,
    claims: Claims,
}

/// A piece being read.
struct Asked {
    id: StoreRequestId,
    piece: Piece,
    left: usize,
    read: BTreeMap<u64, Data>,
    /// The anchor and the catalog as they were when it was asked for.
    anchor: u64,
    catalog: u64,
    /// Blocks of the journal that were needed: from and until.
    journal: (u64, u64),
    leaves: Vec<(u32, LeafPlace, u64)>,
}

/// Who owns what, as far as the slots were looked at.
#[derive(Default)]
struct Claims {
    units: Vec<u64>,
    leaves: BTreeMap<u32, u32>,
    suspects: BTreeSet<u32>,
    claimants: BTreeSet<u32>,
    /// Of the journal when the first slot was looked at.
    began: u64,
    extents: u64,
}

impl Claims {
    /// `false`: somebody else has it, or had it.
    fn unit(&mut self, unit: u32) -> bool {
        let (word, bit) = (unit as usize / 64, 1 << (unit % 64));
        if self.units.len() <= word {
            self.units.resize(word + 1, 0);
        }
        let is_first = self.units[word] & bit == 0;
        self.units[word] |= bit;
        is_first
    }

    fn leaf(&mut self, place: LeafPlace) -> bool {
        let taken = self.leaves.entry(place.unit).or_default();
        let is_first = *taken & place.bits() == 0;
        *taken |= place.bits();
        is_first
    }

    fn suspect(&mut self, unit: u32) {
        if self.suspects.len() < SUSPECTS_MAX {
            self.suspects.insert(unit);
        }
    }
}

impl Pool {
    pub fn begin_look(&mut self, id: StoreRequestId, piece: Piece) {
        assert!(self.looking.asked.is_none(), "one piece at a time");
        let mut reads: Vec<(u64, u64)> = Vec::new();
        let mut leaves = Vec::new();
        match piece {
            _ if self.is_written_to(piece) => return self.end_look(id, Vec::new(), Some(piece)),
            Piece::Heads => reads.extend(SUPERBLOCKS.into_iter().chain(ANCHORS).map(|at| (at, BLOCK_BYTES))),
            Piece::Catalog => {
                let len = self.catalog.encoded_len().next_multiple_of(BLOCK) + BLOCK;
                reads.extend(CATALOGS.map(|at| (at, len.min(CATALOG_BYTES) as u64)));
            }
            Piece::Journal(part) => {
                let blocks = self.journal_blocks(part);
                // The ring goes round.
                let ring = self.geometry().ring;
                let turn = blocks.end - ring.place(blocks.end);
                let halves =
                    if blocks.contains(&turn) { [blocks.start..turn, turn..blocks.end] } else { [blocks, 0..0] };
                let read = |run: &Range<u64>| (ring.offset(run.start), (run.end - run.start) * BLOCK_BYTES);
                reads.extend(halves.iter().filter(|run| !run.is_empty()).map(read));
            }
            Piece::Table(from) => {
                let count = self.table_blocks(from).len() as u64;
                let of_copy = |copy| (self.geometry().table_offset(copy, from).0, count * BLOCK_BYTES);
                reads.extend([0, 1].map(of_copy).into_iter().filter(|_| count > 0));
            }
            Piece::Leaves(from) => {
                for number in from..self.table.len().min(from + SLOTS_PASSED_MAX) {
                    let slot = self.table.get(number);
                    let Some(place) = slot.leaf.filter(|place| place.unit < self.geometry().units()) else { continue };
                    leaves.push((number, place, slot.leaf_sequence));
                    reads.push((self.geometry().leaf_offset(place).0, u64::from(place.blocks) * BLOCK_BYTES));
                    if leaves.len() == LEAVES_AT_ONCE {
                        break;
                    }
                }
            }
            Piece::Space(from) => return self.look_at_space(id, from),
            Piece::Suspects(from) => return self.look_at_suspects(id, from),
        }
        let (anchor, catalog) = (self.anchor.sequence, self.catalog_sequence);
        let journal = match piece {
            Piece::Journal(Some((from, until))) => (from.max(self.journal.tail()), until),
            _ => (self.journal.tail(), self.journal.written()),
        };
        let asked = Asked { id, piece, left: reads.len(), read: BTreeMap::new(), anchor, catalog, journal, leaves };
        if reads.is_empty() {
            return self.judge(asked);
        }
        self.looking.asked = Some(asked);
        reads.into_iter().for_each(|(offset, len)| self.read_piece(offset, len as usize));
    }

    fn read_piece(&mut self, offset: u64, len: usize) {
        self.io.submit(DiskOpKind::Read { offset: ByteCount(offset), len }, DiskThen::Look(offset, len));
    }

    pub fn on_look_read(&mut self, offset: u64, len: usize, data: Option<Data>) {
        let asked = self.looking.asked.as_mut().expect("it is read for a piece");
        asked.left -= 1;
        match data {
            Some(data) => {
                for (at, block) in (0..len / BLOCK).map(|at| (at, data.slice(at * BLOCK..(at + 1) * BLOCK))) {
                    asked.read.insert(offset + (at * BLOCK) as u64, block);
                }
            }
            // One bad block does not hide its neighbours.
            None if len > BLOCK => {
                asked.left += len / BLOCK;
                (0..len / BLOCK).for_each(|at| self.read_piece(offset + (at * BLOCK) as u64, BLOCK));
            }
            None => {}
        }
        if self.looking.asked.as_ref().is_some_and(|asked| asked.left == 0)
            && let Some(asked) = self.looking.asked.take()
        {
            self.judge(asked);
        }
    }

    /// Whether the piece may be torn, or not be on the disk yet.
    fn is_written_to(&self, piece: Piece) -> bool {
        match piece {
            Piece::Heads => self.checkpoint.as_ref().is_some_and(|checkpoint| checkpoint.writes_anchor()),
            Piece::Catalog => self.catalog_commit.is_some(),
            Piece::Table(from) => {
                let checkpoint = self.checkpoint.as_ref();
                checkpoint.is_some_and(|checkpoint| self.table_blocks(from).any(|block| checkpoint.writes(block)))
            }
            Piece::Journal(_) | Piece::Leaves(_) | Piece::Space(_) | Piece::Suspects(_) => false,
        }
    }

    /// Blocks of the table that are looked at together; those beyond are not on the disk yet.
    fn table_blocks(&self, from: u32) -> Range<u32> {
        from..table_blocks_for(self.anchor.slots).min(from + TABLE_AT_ONCE)
    }

    fn judge(&mut self, asked: Asked) {
        let has_moved = self.is_written_to(asked.piece)
            || match asked.piece {
                Piece::Heads | Piece::Table(_) => asked.anchor != self.anchor.sequence,
                Piece::Catalog => asked.catalog != self.catalog_sequence,
                Piece::Journal(_) | Piece::Leaves(_) | Piece::Space(_) | Piece::Suspects(_) => false,
            };
        if let Some(reason) = self.failed.clone() {
            return self.end(asked.id, Err(StoreError::Disk(reason)));
        }
        if has_moved {
            return self.end_look(asked.id, Vec::new(), Some(asked.piece));
        }
        let mut findings = Vec::new();
        let next = match asked.piece {
            Piece::Heads => {
                self.judge_heads(&asked, &mut findings);
                Piece::Catalog
            }
            Piece::Catalog => {
                self.judge_catalog(&asked, &mut findings);
                Piece::Journal(None)
            }
            Piece::Journal(part) => self.judge_journal(&asked, part, &mut findings),
            Piece::Table(from) => self.judge_table(&asked, from, &mut findings),
            Piece::Leaves(from) => self.judge_leaves(&asked, from, &mut findings),
            Piece::Space(_) | Piece::Suspects(_) => unreachable!("nothing is read for these"),
        };
        self.end_look(asked.id, findings, Some(next));
    }

    fn end_look(&mut self, id: StoreRequestId, findings: Vec<Finding>, next: Option<Piece>) {
        let counts = next.is_none().then(|| self.counts());
        let permille = next.map_or(1000, |piece| self.permille(piece));
        if next.is_none() {
            self.looking = Looking::default();
        }
        let looked = Looked { findings, next, permille, counts };
        self.io.out.push_back(Output::Ended(id, Ok(StoreReply::Looked(Box::new(looked)))));
    }

    /// Reading leaves takes nearly all of the time.
    fn permille(&self, piece: Piece) -> u32 {
        let part = |of: u32, all: u32, whole: u32| (u64::from(of) * u64::from(whole) / u64::from(all.max(1))) as u32;
        match piece {
            Piece::Heads | Piece::Catalog | Piece::Journal(_) => 0,
            Piece::Table(from) => part(from, table_blocks_for(self.anchor.slots), 100),
            Piece::Leaves(from) => 100 + part(from, self.table.len(), 800),
            Piece::Space(from) => 900 + part(from, self.table.len(), 90),
            Piece::Suspects(from) => 990 + part(from, self.table.len(), 9),
        }
    }

    fn counts(&self) -> Counts {
        Counts {
            disks: 1,
            volumes: self.catalog.volumes.len() as u64,
            extents: self.looking.claims.extents,
            used_bytes: u64::from(self.space.taken_units()) * UNIT_BYTES,
            free_bytes: u64::from(self.space.free()) * UNIT_BYTES,
            ..Counts::default()
        }
    }

    fn judge_heads(&self, asked: &Asked, findings: &mut Vec<Finding>) {
        let block = |at: u64| asked.read.get(&at).map(Data::as_slice);
        let superblocks = SUPERBLOCKS.map(|at| block(at).and_then(|block| Superblock::decode(block).ok()));
        let other = superblocks.iter().flatten().any(|found| *found != self.superblock);
        let whole = superblocks.iter().flatten().count();
        if other {
            findings.push(Finding::new(Code::SuperblocksDiffer, "a superblock is that of another pool"));
        } else if whole == 0 {
            findings.push(Finding::new(Code::Superblock, "both superblocks are damaged"));
        }
        let anchors = ANCHORS.map(|at| block(at).and_then(|block| Anchor::decode(block, self.pool_id())));
        let anchors = anchors.map(|found| found == Some(self.anchor));
        if !anchors.contains(&true) {
            findings.push(Finding::new(Code::Anchor, "both copies of the journal's anchor are damaged"));
        }
        let superblocks = superblocks.map(|found| found.is_some());
        for (code, name, copies) in
            [(Code::SuperblockCopy, "superblock", superblocks), (Code::AnchorCopy, "journal's anchor", anchors)]
        {
            findings.extend(one_bad_copy(code, name, copies));
        }
    }

    fn judge_catalog(&self, asked: &Asked, findings: &mut Vec<Finding>) {
        let copies = CATALOGS.map(|start| {
            let blocks = asked.read.range(start..start + CATALOG_BYTES as u64);
            let bytes: Vec<u8> = blocks.flat_map(|(_, block)| block.as_slice()).copied().collect();
            let found = Catalog::decode(&bytes, self.pool_id());
            found.is_some_and(|(sequence, found)| sequence == self.catalog_sequence && found == self.catalog)
        });
        if !copies.contains(&true) {
            findings.push(Finding::new(Code::Catalog, "both copies of the catalog are damaged"));
        }
        findings.extend(one_bad_copy(Code::CatalogCopy, "catalog", copies));
        for (volume, layer) in self.catalog.volumes_without_layer() {
            findings.push(Finding::new(
                Code::VolumeWithoutLayer,
                format!("{volume} lies in {layer:?}, which is not there"),
            ));
        }
        for layer in self.catalog.layers_without_parent() {
            findings.push(Finding::new(Code::LayerChain, format!("{layer:?} lies on a layer that is not there")));
        }
    }

    /// What is looked at together of a part of the journal.
    fn journal_blocks(&self, part: Option<(u64, u64)>) -> Range<u64> {
        let (tail, written) = (self.journal.tail(), self.journal.written());
        // What is not needed any more may be written over.
        let (from, until) = part.map_or((tail, written), |(from, until)| (from.max(tail), until));
        from..until.min(from + JOURNAL_AT_ONCE).max(from)
    }

    fn judge_journal(&self, asked: &Asked, part: Option<(u64, u64)>, findings: &mut Vec<Finding>) -> Piece {
        let until = part.map_or(asked.journal.1, |(_, until)| until);
        let blocks = asked.journal.0..asked.journal.1.min(asked.journal.0 + JOURNAL_AT_ONCE);
        for number in blocks.clone().filter(|number| *number >= self.journal.tail()) {
            let block = asked.read.get(&self.geometry().ring.offset(number)).map(Data::as_slice);
            match self.journal.records_of(number, block) {
                None => findings.push(Finding::new(Code::Journal, format!("journal block {number} is damaged"))),
                Some(records) => {
                    let named = records.iter().flat_map(Record::slots);
                    let slots = self.geometry().slots;
                    findings.extend(named.filter(|slot| *slot >= slots).map(|slot| {
                        Finding::new(Code::JournalSlot, format!("the journal names slot {slot} of {slots}"))
                    }));
                }
            }
        }
        if blocks.end >= until { Piece::Table(0) } else { Piece::Journal(Some((blocks.end, until))) }
    }

    fn judge_table(&self, asked: &Asked, from: u32, findings: &mut Vec<Finding>) -> Piece {
        let blocks = self.table_blocks(from);
        for number in blocks.clone() {
            let copies = [0, 1].map(|copy| {
                let block = asked.read.get(&self.geometry().table_offset(copy, number).0)?;
                let (_, slots) = decode_block(block.as_slice(), self.pool_id(), self.geometry(), number)?;
                // What the journal has beyond the table is no business of the table's.
                let is_right = self.table.is_dirty(number) || self.table.says(number, &slots);
                is_right.then_some(())
            });
            let copies = copies.map(|copy| copy.is_some());
            if !copies.contains(&true) {
                let text =
                    format!("both copies of slot table block {number} are damaged, or not what was written there");
                findings.push(Finding::new(Code::Table, text));
            }
            findings.extend(one_bad_copy(Code::TableCopy, &format!("slot table block {number}"), copies));
        }
        if blocks.end >= table_blocks_for(self.anchor.slots) { Piece::Leaves(0) } else { Piece::Table(blocks.end) }
    }

    fn judge_leaves(&self, asked: &Asked, from: u32, findings: &mut Vec<Finding>) -> Piece {
        for (number, place, sequence) in asked.leaves.iter().copied() {
            let slot = self.table.get(number);
            if (slot.leaf, slot.leaf_sequence) != (Some(place), sequence) {
                continue; // It has another leaf by now, just written.
            }
            let bytes = self.geometry().leaf_bytes(place, |at| asked.read.get(&at).cloned());
            let (owner, pool) = (LeafOwner { slot: number, sequence }, self.pool_id());
            let what = || name(&self.catalog, slot.owner());
            if !leaf::is_whole(&bytes, owner, pool) {
                findings.push(Finding::new(Code::Leaf, format!("checksums of {} are damaged", what())));
                continue;
            }
            // Of a hot extent the truth is in memory, and of one that is being given up nobody cares.
            if self.hot.contains_key(&slot.owner()) || !self.catalog.layers.contains_key(&slot.layer) {
                continue;
            }
            let sums = leaf::decode(&bytes, owner, pool, &slot.units);
            let has_place = |block: usize| slot.units.get(block / UNIT_BLOCKS).is_some();
            let placeless = (0..SUMS).filter(|block| is_data(sums[*block]) && !has_place(*block)).count();
            if placeless > 0 {
                findings.push(Finding::new(
                    Code::Placeless,
                    format!("{placeless} blocks of {} have no place on the disk", what()),
                ));
            }
            let lost = sums.iter().filter(|sum| **sum == LOST_CHECKSUM).count();
            if lost > 0 {
                findings.push(Finding::new(
                    Code::ChecksumLost,
                    format!("{lost} blocks of {} are known to be lost", what()),
                ));
            }
        }
        let passed = self.table.len().min(from + SLOTS_PASSED_MAX);
        let next = match asked.leaves.last() {
            Some((last, ..)) if asked.leaves.len() == LEAVES_AT_ONCE => last + 1,
            _ => passed,
        };
        if next >= self.table.len() { Piece::Space(0) } else { Piece::Leaves(next) }
    }

    /// Some slots' space; what they say is as it is on disk, with the journal.
    fn look_at_space(&mut self, id: StoreRequestId, from: u32) {
        let mut claims = std::mem::take(&mut self.looking.claims);
        if from == 0 {
            claims = Claims { began: self.journal.written(), ..Claims::default() };
        }
        let mut findings = Vec::new();
        let until = self.table.len().min(from + SLOTS_AT_ONCE);
        for number in from..until {
            let slot = self.table.get(number);
            if slot.state != SlotState::Free {
                claims.extents += 1;
                self.look_at_slot(number, slot, &mut claims, &mut findings);
            }
        }
        self.looking.claims = claims;
        if until < self.table.len() {
            return self.end_look(id, findings, Some(Piece::Space(until)));
        }
        findings.extend(self.accounting());
        let next = (!self.looking.claims.suspects.is_empty()).then_some(Piece::Suspects(0));
        self.end_look(id, findings, next);
    }

    fn look_at_slot(&self, number: u32, slot: &Slot, claims: &mut Claims, findings: &mut Vec<Finding>) {
        let (layer, extent) = slot.owner();
        if u64::from(extent.0) * EXTENT_BYTES >= VOLUME_BYTES_MAX {
            findings
                .push(Finding::new(Code::ExtentBeyond, format!("slot {number} holds {extent:?}, beyond any volume")));
        }
        match self.layers.get(&layer) {
            None => {
                let text = format!("no volume shows {layer:?}, which holds slot {number}");
                findings.push(Finding::new(Code::SpaceLeaked, text));
            }
            Some(map) => {
                let other = map.extents.get(&extent).copied().filter(|other| *other != number);
                let other = other.filter(|other| {
                    let slot = self.table.get(*other);
                    slot.state != SlotState::Free && slot.owner() == (layer, extent)
                });
                if let Some(other) = other {
                    let text = format!("slots {number} and {other} both hold {extent:?} of {layer:?}");
                    findings.push(Finding::new(Code::ExtentTwice, text));
                }
            }
        }
        let units = self.geometry().units();
        for (_, unit) in slot.units.iter() {
            if unit >= units || !self.space.is_taken(unit) || self.space.holds_leaves(unit) {
                let text = format!("slot {number} names unit {unit}, which is not its own");
                findings.push(Finding::new(Code::UnitTwice, text));
            } else if !claims.unit(unit) {
                claims.suspect(unit);
            }
        }
        if let Some(place) = slot.leaf {
            if place.unit >= units || !self.space.has_leaf(place) {
                let text = format!("slot {number} names {place:?}, which is not its own");
                findings.push(Finding::new(Code::LeafTwice, text));
            } else if !claims.leaf(place) {
                claims.suspect(place.unit);
            }
        }
    }

    /// Whether what is counted as free is so. Exactly only where nothing was changed since the first slot was looked at.
    fn accounting(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        if !self.space.adds_up() {
            findings.push(Finding::new(Code::SpaceLeaked, "free units are counted wrong"));
        }
        let claims = &self.looking.claims;
        let is_still = claims.began == self.journal.written()
            && self.journal.is_idle()
            && self.parts.is_empty()
            && !self.space.leaving()
            && self.hot.is_empty();
        let owned: u32 = claims.units.iter().map(|word| word.count_ones()).sum::<u32>() + claims.leaves.len() as u32;
        if is_still && owned < self.space.taken_units() {
            let leaked = self.space.taken_units() - owned;
            findings.push(Finding::new(
                Code::SpaceLeaked,
                format!("{leaked} units of 32 KiB are taken and belong to nothing"),
            ));
        }
        findings
    }

    /// Gathers who claims what seems to have two owners; behind the last slot it is judged at one moment.
    fn look_at_suspects(&mut self, id: StoreRequestId, from: u32) {
        let until = self.table.len().min(from + SLOTS_AT_ONCE);
        let mut claims = std::mem::take(&mut self.looking.claims);
        for number in from..until {
            let slot = self.table.get(number);
            let mut claimed = slot.units.iter().map(|(_, unit)| unit).chain(slot.leaf.map(|place| place.unit));
            if claimed.any(|unit| claims.suspects.contains(&unit)) {
                claims.claimants.insert(number);
            }
        }
        self.looking.claims = claims;
        if until < self.table.len() {
            return self.end_look(id, Vec::new(), Some(Piece::Suspects(until)));
        }
        let (mut now, mut findings) = (Claims::default(), Vec::new());
        for number in self.looking.claims.claimants.iter().copied().filter(|number| *number < self.table.len()) {
            let slot = self.table.get(number);
            for (_, unit) in slot.units.iter() {
                if !now.unit(unit) {
                    findings.push(Finding::new(
                        Code::UnitTwice,
                        format!("slot {number} names unit {unit}, which another has"),
                    ));
                }
            }
            if let Some(place) = slot.leaf.filter(|place| !now.leaf(*place)) {
                findings
                    .push(Finding::new(Code::LeafTwice, format!("slot {number} names {place:?}, which another has")));
            }
        }
        self.end_look(id, findings, None);
    }
}

fn one_bad_copy(code: Code, name: &str, is_right: [bool; 2]) -> Option<Finding> {
    let bad = match is_right {
        [false, true] => 1,
        [true, false] => 2,
        [true, true] | [false, false] => return None,
    };
    Some(Finding::new(code, format!("copy {bad} of {name} is damaged, or not what was written there")))
}
