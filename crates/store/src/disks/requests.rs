//! Requests, shared out over the disks and put together again.

use super::{Column, Disks};
use crate::lanes::FamilyId;
use crate::verify::Looked;
use crate::{StoreError, StoreOp, StoreReply, StoreRequestId};
use pollux_base::data::Buffer;
use pollux_base::unit::{BLOCK_BYTES, BlockRange};
use pollux_base::{BlockChecksum, BlockCount, BlockIndex, Data, DiskIndex, ExtentIndex, Generation, VolumeId};
use std::collections::{BTreeMap, BTreeSet};

const BLOCK: usize = BLOCK_BYTES as usize;

/// A request that several disks answer.
pub struct Fan {
    id: StoreRequestId,
    left: u32,
    error: Option<StoreError>,
    corrupt: Vec<BlockRange>,
    /// For a read: what came so far, by place.
    reading: Option<Reading>,
    /// For `Checksums`.
    checksums: Option<Vec<BlockChecksum>>,
    looked: Option<Box<Looked>>,
    columns: Vec<Column>,
    is_change: bool,
    /// For a flush: up to which change it makes the disks' last.
    flushes: Vec<(DiskIndex, u64)>,
    /// Lost columns that are given a home first, by the share that does it.
    settles: Vec<(Column, DiskIndex)>,
    /// What was asked for; it begins when these have homes.
    then: Option<StoreOp>,
}

struct Reading {
    checksums: Vec<BlockChecksum>,
    parts: Vec<(usize, Data)>,
    /// Place of each share, in blocks.
    places: Vec<usize>,
}

impl Fan {
    fn new(id: StoreRequestId) -> Fan {
        Fan {
            id,
            left: 0,
            error: None,
            corrupt: Vec::new(),
            reading: None,
            checksums: None,
            looked: None,
            columns: Vec::new(),
            is_change: false,
            flushes: Vec::new(),
            settles: Vec::new(),
            then: None,
        }
    }

    fn result(self) -> Result<StoreReply, StoreError> {
        if let Some(error) = self.error {
            return Err(error);
        }
        if !self.corrupt.is_empty() {
            let mut ranges = self.corrupt;
            ranges.sort();
            return Err(StoreError::Corrupt(ranges));
        }
        if let Some(checksums) = self.checksums {
            return Ok(StoreReply::Checksums(checksums));
        }
        if let Some(looked) = self.looked {
            return Ok(StoreReply::Looked(looked));
        }
        let Some(reading) = self.reading else { return Ok(StoreReply::Done) };
        let mut buffer = Buffer::zeroed(reading.checksums.len() * BLOCK);
        for (at, data) in reading.parts {
            buffer.as_mut_slice()[at * BLOCK..][..data.len()].copy_from_slice(data.as_slice());
        }
        Ok(StoreReply::Read { data: buffer.freeze(), checksums: reading.checksums })
    }
}

/// What a request does to the order of others.
enum Kind {
    /// Of some columns of one volume.
    Data(VolumeId, Vec<ExtentIndex>),
    /// One more volume or note: in the same order on all disks.
    Change,
    /// A point in the order of all requests.
    Turn,
    /// Of all disks, in no order.
    All,
    /// Of one disk, and nothing to anybody else.
    One(DiskIndex),
}

fn kind(op: &StoreOp) -> Kind {
    match op {
        StoreOp::Heat { volume, extents, .. } | StoreOp::Cool { volume, extents } => {
            Kind::Data(*volume, extents.clone())
        }
        StoreOp::Read { volume, range } | StoreOp::Write { volume, range, .. } | StoreOp::Zero { volume, range } => {
            Kind::Data(*volume, range.extents().collect())
        }
        StoreOp::Checksums { volume, extent }
        | StoreOp::Lose { volume, extent }
        | StoreOp::LoseColumn { volume, extent, .. }
        | StoreOp::Forget { volume, extent } => Kind::Data(*volume, vec![*extent]),
        StoreOp::Create { .. }
        | StoreOp::Delete { .. }
        | StoreOp::Clone { .. }
        | StoreOp::PutNote { .. }
        | StoreOp::PutMembers { .. }
        | StoreOp::PutArriving { .. }
        | StoreOp::Adopt(_) => Kind::Change,
        StoreOp::Look { disk, .. } => Kind::One(*disk),
        StoreOp::Snapshot { .. } | StoreOp::Rollback { .. } => Kind::Turn,
        StoreOp::Remark { .. } | StoreOp::Reap { .. } | StoreOp::Flush => Kind::All,
    }
}

impl Disks {
    pub(super) fn on_request(&mut self, id: StoreRequestId, op: StoreOp) {
        if self.is_alone() && self.lets_through() && self.held.is_empty() {
            self.passed += 1;
            return self.send(DiskIndex(0), id, op);
        }
        let reads = matches!(op, StoreOp::Read { .. } | StoreOp::Checksums { .. });
        if let Some(reason) = self.failed.clone().filter(|_| !reads) {
            return self.end(id, Err(StoreError::Disk(reason)));
        }
        let kind = kind(&op);
        if self.must_wait(&kind) {
            if let StoreOp::Cool { .. } = op {
                // Whoever sees an extent hot meanwhile may write to it: it stays hot.
                return self.end(id, Ok(StoreReply::Done));
            }
            if let Kind::Data(volume, extents) = &kind {
                let columns: Vec<Column> = self.columns_of(*volume, extents);
                // As if it had begun: what was cooling stays hot.
                for column in columns.iter().filter(|_| !reads) {
                    let only = Some(DiskIndex(0)).filter(|_| self.is_alone());
                    if let Some(home) = self.home(*column).or(only) {
                        self.disks[home.index()].store.keep_hot(*volume, column.1);
                    }
                }
                self.held_columns.extend(columns);
            }
            return self.held.push_back((id, op));
        }
        self.begin(id, op, kind);
    }

    fn columns_of(&self, volume: VolumeId, extents: &[ExtentIndex]) -> Vec<Column> {
        let family = self.family(volume);
        family.into_iter().flat_map(|family| extents.iter().map(move |extent| (family, *extent))).collect()
    }

    fn must_wait(&self, kind: &Kind) -> bool {
        let turn_waits = self.held.iter().any(|(_, op)| matches!(self::kind(op), Kind::Turn));
        match kind {
            Kind::One(_) => false,
            // Nothing that was asked for after a turn may be done before it.
            _ if turn_waits || self.is_settling() => true,
            Kind::Data(volume, extents) => {
                let Some(family) = self.family(*volume) else { return false };
                let moving = self.moving.as_ref().map(super::moving::Moving::column);
                extents.iter().map(|extent| (family, *extent)).any(|column| {
                    moving == Some(column) || self.held_columns.contains(&column) || self.lost.is_settling(&column)
                })
            }
            Kind::Change => self.is_turning || self.joining.is_some() || self.moving.is_some() || !self.held.is_empty(),
            Kind::Turn => self.changing > 0 || self.joining.is_some() || self.moving.is_some() || !self.held.is_empty(),
            Kind::All => !self.held.is_empty(),
        }
    }

    /// Lets go on what was held, in order. `true`: something did.
    pub(super) fn release_held(&mut self) -> bool {
        let before = self.held.len();
        if before == 0 {
            return false;
        }
        self.held_columns.clear();
        for (id, op) in std::mem::take(&mut self.held) {
            self.on_request(id, op);
        }
        self.held.len() != before
    }

    fn end(&mut self, id: StoreRequestId, result: Result<StoreReply, StoreError>) {
        self.out.push_back(crate::Output::Ended(id, result));
    }

    fn begin(&mut self, id: StoreRequestId, op: StoreOp, kind: Kind) {
        let mut fan = Fan::new(id);
        let shares = match kind {
            Kind::Change | Kind::Turn => {
                fan.is_change = true;
                self.is_turning |= matches!(kind, Kind::Turn);
                let mut op = op;
                if let StoreOp::Rollback { volume, snapshot, also, .. } = &mut op {
                    // All disks remember what it changed on any: extents may move.
                    also.extend(self.differing(*volume, *snapshot));
                    also.extend(self.hot(*volume));
                }
                self.on_all(&op)
            }
            Kind::All if matches!(op, StoreOp::Flush) => {
                let unflushed = self.members().filter(|(_, disk)| disk.ended > disk.flushed);
                fan.flushes = unflushed.map(|(index, disk)| (index, disk.ended)).collect();
                fan.flushes.iter().map(|(disk, _)| (*disk, op.clone())).collect()
            }
            Kind::All => self.on_all(&op),
            Kind::One(disk) if self.members().any(|(member, _)| member == disk) => vec![(disk, op)],
            Kind::One(_) => return self.end(id, Err(StoreError::NoVolume)),
            Kind::Data(volume, extents) => {
                if self.family(volume).is_none() {
                    return self.end(id, Err(StoreError::NoVolume));
                }
                fan.columns = self.columns_of(volume, &extents);
                self.on_some(&mut fan, op)
            }
        };
        self.share(fan, shares);
    }

    fn on_all(&self, op: &StoreOp) -> Vec<(DiskIndex, StoreOp)> {
        self.members().map(|(index, _)| (index, op.clone())).collect()
    }

    /// Puts the shares under way.
    fn share(&mut self, fan: Fan, shares: Vec<(DiskIndex, StoreOp)>) {
        if shares.is_empty() {
            return self.finish(fan);
        }
        // A request that finds no room has changed nothing, on no disk.
        let is_full = |(disk, op): &&(DiskIndex, StoreOp)| !self.disks[disk.index()].store.has_room_for(op);
        if shares.len() > 1
            && let Some((disk, _)) = shares.iter().find(is_full)
        {
            self.note_cramped(&fan, *disk);
            return self.end(fan.id, Err(StoreError::Full));
        }
        if fan.is_change {
            self.changing += 1;
        }
        for column in &fan.columns {
            *self.busy.entry(*column).or_default() += 1;
        }
        let number = self.own_id().0;
        self.send_shares(number, fan, shares);
    }

    /// There was no room on the disk for what was to be written there.
    fn note_cramped(&mut self, fan: &Fan, disk: DiskIndex) {
        let there = fan.columns.iter().find(|column| self.home(**column) == Some(disk));
        self.cramped = there.copied().or(self.cramped);
    }

    fn send_shares(&mut self, number: u64, mut fan: Fan, shares: Vec<(DiskIndex, StoreOp)>) {
        fan.left = shares.len() as u32;
        self.fans.insert(number, fan);
        for (place, (disk, op)) in (0..).zip(shares) {
            let id = self.own_id();
            self.shares.insert(id, (number, place));
            self.send(disk, id, op);
        }
    }

    pub(super) fn on_share_ended(
        &mut self,
        disk: DiskIndex,
        number: u64,
        place: u32,
        result: Result<StoreReply, StoreError>,
    ) {
        let fan = self.fans.get_mut(&number).expect("a share belongs to a request");
        fan.left -= 1;
        let settled = fan.settles.get(place as usize).copied();
        let is_done = result.is_ok();
        match result {
            Ok(StoreReply::Done) => self.disks[disk.index()].ended += u64::from(fan.flushes.is_empty()),
            Ok(StoreReply::Checksums(checksums)) => fan.checksums = Some(checksums),
            Ok(StoreReply::Looked(looked)) => fan.looked = Some(looked),
            Ok(StoreReply::Read { data, checksums }) => {
                let reading = fan.reading.as_mut().expect("only a read is answered like this");
                let at = reading.places[place as usize];
                reading.checksums[at..at + checksums.len()].copy_from_slice(&checksums);
                reading.parts.push((at, data));
            }
            Err(StoreError::Corrupt(ranges)) => fan.corrupt.extend(ranges),
            // A disk that fails tells more than one that is full.
            Err(error) => {
                let keeps = matches!(fan.error, Some(StoreError::Disk(_)));
                fan.error = fan.error.take().filter(|_| keeps).or(Some(error));
            }
        }
        let left = fan.left;
        if let Some((column, home)) = settled {
            // Its volumes may have been deleted meanwhile.
            let has_home = is_done && self.any_of(column.0).is_some();
            if has_home {
                self.settle_in(column, home);
            }
            self.lost.settled(column, has_home);
        }
        if left > 0 {
            return;
        }
        let mut fan = self.fans.remove(&number).expect("it was just there");
        fan.settles.clear();
        if let Some(op) = fan.then.take().filter(|_| fan.error.is_none()) {
            let shares = self.on_some(&mut fan, op);
            return self.send_shares(number, fan, shares);
        }
        if fan.error == Some(StoreError::Full) {
            self.note_cramped(&fan, disk);
        }
        if fan.is_change {
            self.changing -= 1;
            self.is_turning &= self.changing > 0;
            if self.changing == 0 {
                self.drop_gone_families();
            }
        }
        for column in &fan.columns {
            if let Some(busy) = self.busy.get_mut(column) {
                *busy -= 1;
                if *busy == 0 {
                    self.busy.remove(column);
                }
            }
        }
        if fan.error.is_none() {
            for (disk, ended) in &fan.flushes {
                let disk = &mut self.disks[disk.index()];
                disk.flushed = disk.flushed.max(*ended);
            }
        }
        self.finish(fan);
    }

    /// What belonged to volumes that are gone lives nowhere.
    fn drop_gone_families(&mut self) {
        let Some(pool) = self.first().pool() else { return };
        let families: BTreeSet<FamilyId> = pool.catalog.layers.values().map(|layer| layer.family).collect();
        let gone: Vec<FamilyId> = self.homes.keys().filter(|family| !families.contains(family)).copied().collect();
        for home in gone.iter().filter_map(|family| self.homes.remove(family)).flat_map(BTreeMap::into_values) {
            self.disks[home.index()].columns -= 1;
        }
    }

    fn finish(&mut self, fan: Fan) {
        let id = fan.id;
        self.end(id, fan.result());
    }

    /// The shares of a request about some columns of a volume.
    fn on_some(&mut self, fan: &mut Fan, op: StoreOp) -> Vec<(DiskIndex, StoreOp)> {
        match op {
            StoreOp::Heat { volume, extents, generation } => {
                let lost: Vec<Column> = fan.columns.iter().copied().filter(|column| self.lost.has(*column)).collect();
                if !lost.is_empty() {
                    fan.then = Some(StoreOp::Heat { volume, extents, generation });
                    return lost.into_iter().map(|column| self.settle_lost(fan, volume, column, generation)).collect();
                }
                let by_disk = self.by_home(volume, &extents, true);
                let share = |(disk, extents)| (disk, StoreOp::Heat { volume, extents, generation });
                by_disk.into_iter().map(share).collect()
            }
            StoreOp::Cool { volume, extents } => {
                let by_disk = self.by_home(volume, &extents, false);
                by_disk.into_iter().map(|(disk, extents)| (disk, StoreOp::Cool { volume, extents })).collect()
            }
            StoreOp::Read { volume, range } => self.on_read(fan, volume, range),
            StoreOp::Write { volume, range, data, checksums } => {
                let runs = self.runs(volume, range);
                let whole = runs.len() == 1;
                let share = |(disk, part): (Option<DiskIndex>, BlockRange)| {
                    let disk = disk.expect("what is written to was heated, which gave it a home");
                    let blocks = part.places_in(range);
                    let data = if whole { data.clone() } else { data.slice(blocks.start * BLOCK..blocks.end * BLOCK) };
                    (disk, StoreOp::Write { volume, range: part, data, checksums: checksums[blocks].to_vec() })
                };
                runs.into_iter().map(share).collect()
            }
            StoreOp::Zero { volume, range } => {
                // Where nothing is there is nothing to zero.
                let runs = self.runs(volume, range).into_iter();
                runs.filter_map(|(disk, range)| Some((disk?, StoreOp::Zero { volume, range }))).collect()
            }
            StoreOp::Checksums { volume, extent } => {
                if self.is_lost(volume, extent) {
                    let mut sums = vec![BlockChecksum::ZERO; crate::leaf::SUMS];
                    sums[..self.blocks_in(volume, extent)].fill(crate::LOST_CHECKSUM);
                    fan.checksums = Some(sums);
                    return Vec::new();
                }
                let home = self.columns_of(volume, &[extent]).first().and_then(|column| self.home(*column));
                // Any disk knows that nothing is there.
                let any = self.members().next().map_or(DiskIndex(0), |(index, _)| index);
                vec![(home.unwrap_or(any), StoreOp::Checksums { volume, extent })]
            }
            other => unreachable!("the pool itself asks for this: {other:?}"),
        }
    }

    /// Gives a lost column a home, which first hears that it is lost.
    fn settle_lost(
        &mut self,
        fan: &mut Fan,
        volume: VolumeId,
        column: Column,
        generation: Generation,
    ) -> (DiskIndex, StoreOp) {
        let home = self.choose();
        self.lost.settle(column);
        fan.settles.push((column, home));
        (home, StoreOp::LoseColumn { volume, extent: column.1, generation })
    }

    fn on_read(&mut self, fan: &mut Fan, volume: VolumeId, range: BlockRange) -> Vec<(DiskIndex, StoreOp)> {
        let blocks = range.count.0 as usize;
        let mut reading =
            Reading { checksums: vec![BlockChecksum::ZERO; blocks], parts: Vec::new(), places: Vec::new() };
        let any = self.members().next().map_or(DiskIndex(0), |(index, _)| index);
        let mut shares = Vec::new();
        for (disk, part) in self.runs(volume, range) {
            for part in part.split_by_extent().filter(|part| self.is_lost(volume, part.start.extent())) {
                fan.corrupt.push(part);
            }
            reading.places.push((part.start.0 - range.start.0) as usize);
            // Any disk knows that nothing is there, and whether the range is outside the volume.
            shares.push((disk.unwrap_or(any), StoreOp::Read { volume, range: part }));
        }
        if shares.is_empty() {
            reading.places.push(0);
            shares.push((any, StoreOp::Read { volume, range }));
        }
        fan.reading = Some(reading);
        shares
    }

    /// The range as runs of extents that have the same home.
    fn runs(&self, volume: VolumeId, range: BlockRange) -> Vec<(Option<DiskIndex>, BlockRange)> {
        let Some(family) = self.family(volume) else { return Vec::new() };
        let mut runs: Vec<(Option<DiskIndex>, BlockRange)> = Vec::new();
        if range.count.0 == 0 {
            return runs;
        }
        let homes = self.homes.get(&family);
        let extents = range.start.extent()..=BlockIndex(range.end().0 - 1).extent();
        let mut at = range.start;
        let mut push = |home: Option<DiskIndex>, end: u64| {
            let part = BlockRange::new(at, BlockCount(end.min(range.end().0) - at.0));
            at = part.end();
            match runs.last_mut() {
                _ if part.count.0 == 0 => {}
                Some((last, run)) if *last == home => run.count.0 += part.count.0,
                _ => runs.push((home, part)),
            }
        };
        // A range may be a whole large volume of which little is there.
        for (extent, home) in homes.into_iter().flat_map(|homes| homes.range(extents.clone())) {
            push(None, extent.first_block().0.max(range.start.0));
            push(Some(*home), extent.first_block().0 + pollux_base::unit::EXTENT_BLOCKS);
        }
        push(None, range.end().0);
        runs
    }

    /// Extents by home. With `settles` those that have none get one.
    fn by_home(
        &mut self,
        volume: VolumeId,
        extents: &[ExtentIndex],
        settles: bool,
    ) -> BTreeMap<DiskIndex, Vec<ExtentIndex>> {
        let mut by_disk: BTreeMap<DiskIndex, Vec<ExtentIndex>> = BTreeMap::new();
        for column in self.columns_of(volume, extents) {
            let home = match self.home(column) {
                Some(home) => home,
                None if settles => {
                    let chosen = self.choose();
                    self.settle_in(column, chosen);
                    chosen
                }
                None => continue,
            };
            by_disk.entry(home).or_default().push(column.1);
        }
        by_disk
    }
}
