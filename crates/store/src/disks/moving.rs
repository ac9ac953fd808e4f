//! Moving columns off a disk that is being drained, one after the other, while requests to all others go on. Likewise a column
//! for which its disk had no room moves to one that has.
//!
//! Life of a move: requests to the column are held -> those under way end -> the new disk remembers that it is on its way ->
//! for each volume that has anything there, those that lie beneath first: its extent is made hot on the new disk, what
//! differs is copied, and it cools if it was cool -> flush -> the old disk forgets the column, in one record -> the new disk
//! is its home, and it has arrived. Until that record a crash finds the column where it was, and what there is of a copy is forgotten at open.

use super::{Column, Disks, Own};
use crate::lanes::FamilyId;
use crate::leaf::LOST_CHECKSUM;
use crate::pool::Pool;
use crate::slots::LayerId;
use crate::{StoreError, StoreOp, StoreReply};
use pollux_base::unit::{BlockRange, EXTENT_BYTES};
use pollux_base::{BlockChecksum, BlockCount, BlockIndex, ByteCount, DiskIndex, ExtentIndex, Generation, VolumeId};
use std::collections::VecDeque;

pub struct Moving {
    column: Column,
    from: DiskIndex,
    to: DiskIndex,
    volumes: VecDeque<VolumeId>,
    step: Step,
    /// What the other disks had free before.
    free: ByteCount,
}

enum Step {
    /// Requests under way end.
    Quiet,
    Announce,
    OldSums,
    NewSums(Vec<BlockChecksum>),
    Heat(Copying),
    Lose(Copying),
    Read(Copying, BlockRange),
    Write(Copying),
    Cool,
    Flush,
    Forget,
    /// It is there.
    Clear,
    /// It could not be moved: what there is of a copy goes.
    Undo,
}

/// What is to be copied of one volume's extent.
struct Copying {
    runs: VecDeque<(BlockRange, Run)>,
    old: Vec<BlockChecksum>,
    is_renewed: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Run {
    Data,
    Zero,
}

/// What the volume has there that it does not have from another volume beneath it: blocks (or what tells that they were
/// changed), and a mark. What nobody names any more and several lie on goes to each of them.
fn own(pool: &Pool, volume: VolumeId, extent: ExtentIndex) -> (bool, bool) {
    let Some(top) = pool.layer_of(volume) else { return (false, false) };
    let is_named = |layer: &LayerId| pool.catalog.volumes.values().any(|known| known.layer == *layer);
    let own = pool.catalog.chain(top).take_while(|layer| *layer == top || !is_named(layer));
    own.map(|layer| (layer, extent)).fold((false, false), |(blocks, mark), key| {
        (blocks || pool.says_something(key), mark || pool.hot.contains_key(&key))
    })
}

impl Moving {
    pub fn column(&self) -> Column {
        self.column
    }
}

impl Copying {
    /// `old`: of the blocks that lie within the volume, all others hold nothing.
    fn new(start: BlockIndex, old: Vec<BlockChecksum>, new: &[BlockChecksum], must_tell: bool) -> Copying {
        // Where anything is lost everything is first said to be. So it is where there is no difference: that the extent was
        // changed must be remembered there, too, unless a mark does that.
        let is_renewed = old.contains(&LOST_CHECKSUM) || (old[..] == new[..old.len()] && must_tell);
        let mut runs: VecDeque<(BlockRange, Run)> = VecDeque::new();
        for (at, (sum, there)) in old.iter().zip(new).enumerate() {
            if *sum == LOST_CHECKSUM || (sum == there && !is_renewed) {
                continue;
            }
            let (block, kind) = (start.plus(BlockCount(at as u64)), if sum.is_zero() { Run::Zero } else { Run::Data });
            match runs.back_mut() {
                Some((range, last)) if *last == kind && range.end() == block => range.count.0 += 1,
                _ => runs.push_back((BlockRange::new(block, BlockCount(1)), kind)),
            }
        }
        Copying { runs, old, is_renewed }
    }
}

impl Disks {
    /// Begins the next move, or the next step of one that waits. `true`: something was begun.
    pub(super) fn step_moving(&mut self) -> bool {
        if self.failed.is_some() {
            return false;
        }
        match &self.moving {
            Some(moving) => {
                let is_quiet = matches!(moving.step, Step::Quiet) && !self.busy.contains_key(&moving.column);
                if is_quiet {
                    let column = self.moving().column;
                    let arriving = self.any_of(column.0).map(|volume| (volume, column.1));
                    self.ask_moving(false, Step::Announce, StoreOp::PutArriving { column: arriving });
                }
                is_quiet
            }
            None => self.begin_move(),
        }
    }

    fn begin_move(&mut self) -> bool {
        if self.stalled_at.is_some_and(|free| self.free() <= free)
            || self.changing > 0
            || self.joining.is_some()
            || self.passed > 0
        {
            return false;
        }
        let Some((column, from, to)) = self.next_drained().or_else(|| self.next_cramped()) else { return false };
        let Some(pool) = self.first().pool() else { return false };
        // What lies beneath has a lower number.
        let layers = pool.catalog.volumes.iter().map(|(volume, known)| (known.layer, *volume));
        let of_family =
            |(layer, _): &(_, VolumeId)| pool.catalog.layers.get(layer).is_some_and(|layer| layer.family == column.0);
        let mut volumes: Vec<_> = layers.filter(of_family).collect();
        volumes.sort_unstable();
        let volumes = volumes.into_iter().map(|(_, volume)| volume).collect();
        self.moving = Some(Moving { column, from, to, volumes, step: Step::Quiet, free: self.free() });
        self.stalled_at = None;
        true
    }

    fn next_drained(&self) -> Option<(Column, DiskIndex, DiskIndex)> {
        let (from, _) = self.members().find(|(_, disk)| disk.is_draining && disk.columns > 0)?;
        let to = Some(self.choose()).filter(|to| !self.disks[to.index()].is_draining)?;
        let homes = self.homes.iter().flat_map(|(family, homes)| homes.iter().map(|(x, home)| ((*family, *x), *home)));
        let column = homes.filter(|(_, home)| *home == from).map(|(column, _)| column).next()?;
        Some((column, from, to))
    }

    /// Only to where there is room for all of it and for a whole extent more, so that what waits to be written there has some: else
    /// it might go to and fro between two disks that are nearly full.
    fn next_cramped(&mut self) -> Option<(Column, DiskIndex, DiskIndex)> {
        let column = self.cramped.take()?;
        let from = self.home(column)?;
        let pool = self.disks[from.index()].store.pool()?;
        let layers =
            pool.layers_of_family(column.0).into_iter().filter(|layer| pool.view((*layer, column.1)).is_some());
        // One more for its checksums.
        let needed = (layers.count() as u64 + 2) * EXTENT_BYTES;
        let others = self.members().filter(|(index, disk)| *index != from && !disk.is_draining);
        let (to, free) = others.map(|(index, disk)| (index, disk.store.free().0)).max_by_key(|(_, free)| *free)?;
        (free >= needed).then_some((column, from, to))
    }

    /// A volume of the column.
    pub(super) fn any_of(&self, family: FamilyId) -> Option<VolumeId> {
        self.volumes().map(|(volume, _, _)| volume).find(|volume| self.family(*volume) == Some(family))
    }

    fn moving(&mut self) -> &mut Moving {
        self.moving.as_mut().expect("a column is being moved")
    }

    /// Asks one of the two disks; the answer comes to `on_moving`.
    fn ask_moving(&mut self, old: bool, step: Step, op: StoreOp) {
        let moving = self.moving();
        moving.step = step;
        let disk = if old { moving.from } else { moving.to };
        self.ask(disk, op, Own::Moving);
    }

    /// The next volume that has anything of its own there.
    fn next_volume(&mut self) {
        let (column, from) = (self.moving().column, self.moving().from);
        loop {
            let Some(volume) = self.moving().volumes.front().copied() else {
                return self.ask_moving(false, Step::Flush, StoreOp::Flush);
            };
            let pool = self.disks[from.index()].store.pool();
            if pool.is_some_and(|pool| own(pool, volume, column.1) != (false, false)) {
                return self.ask_moving(true, Step::OldSums, StoreOp::Checksums { volume, extent: column.1 });
            }
            self.moving().volumes.pop_front();
        }
    }

    /// Of the old disk: under which generation the volume's extent changed, whether it has blocks there, and a mark.
    fn old_state(&self, volume: VolumeId) -> (Generation, bool, bool) {
        let moving = self.moving.as_ref().expect("a column is being moved");
        let extent = moving.column.1;
        let Some(pool) = self.disks[moving.from.index()].store.pool() else { return (Generation(0), false, false) };
        let generation = pool.layer_of(volume).and_then(|layer| pool.generation_of(layer, extent));
        let (blocks, mark) = own(pool, volume, extent);
        (generation.unwrap_or(Generation(0)), blocks, mark)
    }

    pub(super) fn on_moving(&mut self, result: Result<StoreReply, StoreError>) {
        let Some(moving) = &mut self.moving else { return };
        let column = moving.column;
        let extent = column.1;
        let volume = moving.volumes.front().copied().unwrap_or(VolumeId(0));
        let step = std::mem::replace(&mut moving.step, Step::Quiet);
        match (step, result) {
            (Step::Announce, Ok(_)) => self.next_volume(),
            (Step::OldSums, Ok(StoreReply::Checksums(mut old))) => {
                let blocks = self.blocks_in(volume, extent);
                old.truncate(blocks);
                self.ask_moving(false, Step::NewSums(old), StoreOp::Checksums { volume, extent });
            }
            (Step::NewSums(old), Ok(StoreReply::Checksums(new))) => {
                let (generation, has_blocks, is_hot) = self.old_state(volume);
                if !has_blocks && !is_hot {
                    // Its mark has been taken back meanwhile.
                    return self.volume_done();
                }
                let copying = Copying::new(extent.first_block(), old, &new, has_blocks && !is_hot);
                let heat = StoreOp::Heat { volume, extents: vec![extent], generation };
                self.ask_moving(false, Step::Heat(copying), heat);
            }
            (Step::Heat(copying), Ok(_)) if copying.is_renewed => {
                self.ask_moving(false, Step::Lose(copying), StoreOp::Lose { volume, extent });
            }
            (Step::Heat(copying) | Step::Lose(copying) | Step::Write(copying), Ok(_)) => {
                self.copy_next(volume, copying)
            }
            (Step::Read(copying, range), Ok(StoreReply::Read { data, checksums })) => {
                self.ask_moving(false, Step::Write(copying), StoreOp::Write { volume, range, data, checksums });
            }
            // They are rotten there, and are lost here: all of it is copied again, but for those.
            (Step::Read(mut copying, _), Err(StoreError::Corrupt(ranges))) => {
                let start = extent.first_block().0;
                for range in ranges {
                    copying.old[(range.start.0 - start) as usize..(range.end().0 - start) as usize].fill(LOST_CHECKSUM);
                }
                let none = vec![BlockChecksum::ZERO; copying.old.len()];
                let again = Copying::new(extent.first_block(), copying.old, &none, false);
                self.ask_moving(false, Step::Lose(again), StoreOp::Lose { volume, extent });
            }
            (Step::Cool, Ok(_)) => self.volume_done(),
            (Step::Flush, Ok(_)) => {
                // Whatever comes now, the copy is whole and lasts.
                let to = self.moving().to;
                self.settle_in(column, to);
                let any = self.any_of(column.0).unwrap_or(volume);
                self.ask_moving(true, Step::Forget, StoreOp::Forget { volume: any, extent });
            }
            (Step::Forget, Ok(_)) => {
                self.ask_moving(false, Step::Clear, StoreOp::PutArriving { column: None });
            }
            (Step::Clear, _) => self.moving = None,
            // The new disk has no room, or one of them failed: it stays where it is.
            (Step::Undo | Step::Announce | Step::Forget, _) => {
                self.stalled_at = self.moving.take().map(|moving| moving.free);
            }
            (_, _) => {
                let any = self.any_of(column.0).unwrap_or(volume);
                self.ask_moving(false, Step::Undo, StoreOp::Forget { volume: any, extent });
            }
        }
    }

    fn copy_next(&mut self, volume: VolumeId, mut copying: Copying) {
        match copying.runs.pop_front() {
            Some((range, Run::Zero)) => {
                self.ask_moving(false, Step::Write(copying), StoreOp::Zero { volume, range });
            }
            Some((range, Run::Data)) => {
                self.ask_moving(true, Step::Read(copying, range), StoreOp::Read { volume, range });
            }
            None if self.old_state(volume).2 => self.volume_done(),
            None => {
                let extent = self.moving().column.1;
                self.ask_moving(false, Step::Cool, StoreOp::Cool { volume, extents: vec![extent] });
            }
        }
    }

    fn volume_done(&mut self) {
        self.moving().volumes.pop_front();
        self.next_volume();
    }
}
