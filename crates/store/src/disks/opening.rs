//! Opening a pool of several disks: each store by itself, then they are compared, and what one missed it is told.
//!
//! A change of the catalog is made on all disks and acknowledged when all have it. So after a crash some may lack the last
//! ones, and those who lack them have not let go on what was held behind them: they adopt them now, with the marks that go with
//! new layers.

use super::{Column, Disk, Disks};
use crate::catalog::CatalogCopy;
use crate::lanes::FamilyId;
use crate::{MemberState, OpenError, Output, StoreError, StoreOp, StoreReply, StoreRequestId};
use pollux_base::{DiskId, DiskIndex};
use std::collections::BTreeMap;

/// What follows once every store is open.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Step {
    /// Disks that are behind hear what they missed.
    #[default]
    Adopting,
    /// All hear of the members, and copies that had not arrived are forgotten.
    Telling,
    /// Nothing is on its way any more. What stayed said would be taken for a half copy when its origin is gone.
    Clearing,
}

#[derive(Default)]
pub struct Opening {
    opened: u32,
    /// The first disk that was not, and why.
    refused: Option<OpenError>,
    /// Requests to disks that must still end.
    left: u32,
    step: Step,
    /// Who asked that it goes on without what is missing; the pool was refused before.
    asked_by: Option<StoreRequestId>,
}

impl Disks {
    pub(super) fn on_store_opened(&mut self, disk: DiskIndex, result: Result<(), OpenError>) {
        let several = self.disks.len() > 1;
        let Some(opening) = &mut self.opening else { return self.on_joined(disk, result) };
        opening.opened += 1;
        if let Err(error) = result {
            let error = match several {
                true => OpenError::OneDisk { disk: disk.index(), error: Box::new(error) },
                false => error,
            };
            opening.refused.get_or_insert(error);
        }
        if opening.opened < self.disks.len() as u32 {
            return;
        }
        match opening.refused.take().map_or_else(|| self.judge(), Err) {
            Err(error) => self.end_opening(Err(error)),
            Ok(()) => self.begin_adopting(),
        }
    }

    fn end_opening(&mut self, result: Result<(), OpenError>) {
        let asked_by = self.opening.take().and_then(|opening| opening.asked_by);
        self.refused = result.as_ref().err().cloned();
        let Some(id) = asked_by else {
            self.is_open = result.is_ok();
            return self.out.push_back(Output::Opened(result));
        };
        if result.is_ok() {
            // Whoever was told that there is no pool is told that there is one by a new opening.
            self.failed = Some("a missing disk was let go".to_owned());
        }
        let result = result.map_err(|error| format!("nothing was changed yet: {error}"));
        self.out.push_back(Output::Changed(id, result));
    }

    /// Opens what was refused, without what was let go.
    pub(super) fn open_without(&mut self, id: StoreRequestId) -> Result<(), String> {
        self.opening = Some(Opening { asked_by: Some(id), ..Opening::default() });
        match self.judge() {
            Err(error) => self.end_opening(Err(error)),
            Ok(()) => self.begin_adopting(),
        }
        Ok(())
    }

    /// Whether these are all the disks of one pool, each in its latest state.
    fn judge(&mut self) -> Result<(), OpenError> {
        let mut seen: BTreeMap<DiskId, usize> = BTreeMap::new();
        let mut pool_id = None;
        for (index, disk) in self.disks.iter_mut().enumerate() {
            let Some(pool) = disk.store.pool() else { continue };
            let identity = pool.superblock.identity;
            disk.id = identity.disk;
            if let Some(other) = seen.insert(identity.disk, index) {
                return Err(OpenError::Twice { disks: [other, index], id: identity.disk });
            }
            let expected = *pool_id.get_or_insert(identity.pool);
            if identity.pool != expected {
                return Err(OpenError::OtherPool { disk: index, found: identity.pool, expected });
            }
        }
        let ahead = self.ahead();
        let members = ahead.0.members.clone();
        for (index, disk) in self.disks.iter_mut().enumerate() {
            let member = members.get(&disk.id);
            match member.map(|member| member.state) {
                Some(MemberState::Out) => return Err(OpenError::Out { disk: index, id: disk.id }),
                // It was about to join when everything stopped: it has to be added again.
                None => disk.is_in = false,
                Some(state) => disk.is_draining = state == MemberState::Draining,
            }
            let life = disk.store.pool().map_or(0, |pool| pool.anchor.life);
            if let Some(expected) = member.map(|member| member.life).filter(|expected| life <= *expected) {
                return Err(OpenError::OldImage { disk: index, id: disk.id, openings: life, expected });
            }
        }
        let missing = members.iter().find(|(id, member)| {
            member.state != MemberState::Out && !seen.contains_key(id) && !self.let_go.contains(id)
        });
        match missing {
            Some((id, member)) => Err(OpenError::DiskMissing { id: *id, path: member.path.clone() }),
            None => Ok(()),
        }
    }

    /// The catalog of the disk that has the most changes.
    fn ahead(&self) -> CatalogCopy {
        let catalogs = self.disks.iter().filter_map(|disk| disk.store.pool()).map(|pool| &pool.catalog);
        // Of several the first.
        let ahead = catalogs.rev().max_by_key(|catalog| catalog.changes);
        CatalogCopy(Box::new(ahead.cloned().unwrap_or_default()))
    }

    fn begin_adopting(&mut self) {
        let is_whole = self.let_go.is_empty() && self.first().pool().is_some_and(|pool| pool.catalog.lost.is_empty());
        if self.disks.len() == 1 && is_whole {
            return self.end_opening(Ok(()));
        }
        let ahead = self.ahead();
        let behind: Vec<DiskIndex> = self
            .members()
            .filter(|(_, disk)| disk.store.pool().is_some_and(|pool| pool.catalog.changes < ahead.0.changes))
            .map(|(index, _)| index)
            .collect();
        self.ask_opening(
            behind.into_iter().map(|disk| (disk, StoreOp::Adopt(ahead.clone()))).collect(),
            Step::Adopting,
        );
    }

    fn ask_opening(&mut self, requests: Vec<(DiskIndex, StoreOp)>, step: Step) {
        let opening = self.opening.as_mut().expect("the pool is being opened");
        (opening.left, opening.step) = (requests.len() as u32, step);
        if requests.is_empty() {
            return self.next_step();
        }
        for (disk, op) in requests {
            let id = self.own_id();
            self.send(disk, id, op);
        }
    }

    pub(super) fn on_adopted(&mut self, disk: DiskIndex, result: Result<StoreReply, StoreError>) {
        let Some(opening) = &mut self.opening else { return };
        opening.left -= 1;
        if let Err(error) = result {
            let error = Box::new(OpenError::Disk(error.to_string()));
            opening.refused.get_or_insert(OpenError::OneDisk { disk: disk.index(), error });
        }
        if opening.left > 0 {
            return;
        }
        match opening.refused.take() {
            Some(error) => self.end_opening(Err(error)),
            None => self.next_step(),
        }
    }

    fn next_step(&mut self) {
        match self.opening.as_ref().map(|opening| opening.step) {
            Some(Step::Adopting) => self.tell(),
            Some(Step::Telling) => {
                let is_told = |disk: &Disk| disk.store.pool().is_some_and(|pool| pool.catalog.arriving.is_some());
                let told = self.members().filter(|(_, disk)| is_told(disk)).map(|(index, _)| index);
                let clear = told.map(|index| (index, StoreOp::PutArriving { column: None })).collect();
                self.ask_opening(clear, Step::Clearing);
            }
            Some(Step::Clearing) | None => self.end_opening(Ok(())),
        }
    }

    fn tell(&mut self) {
        let CatalogCopy(ahead) = self.ahead();
        let doubles = self.find_homes(&ahead.lost);
        self.load_lost(ahead.lost);
        let mut members = ahead.members;
        self.note_lives(&mut members);
        members.retain(|id, _| !self.let_go.contains(id));
        if !self.let_go.is_empty() {
            self.lose_what_has_no_home();
        }
        let lost = self.lost_ranges();
        let put = |(index, _): (DiskIndex, &Disk)| {
            (index, StoreOp::PutMembers { members: members.clone(), lost: lost.clone() })
        };
        let mut requests: Vec<(DiskIndex, StoreOp)> = self.members().map(put).collect();
        requests.extend(doubles);
        self.ask_opening(requests, Step::Telling);
    }

    /// Finds out what lives where. Gives what must be forgotten: copies of columns that were on their way from another disk, and
    /// had not got there yet.
    fn find_homes(&mut self, lost: &BTreeMap<FamilyId, Vec<(u32, u32)>>) -> Vec<(DiskIndex, StoreOp)> {
        let mut arriving = Vec::new();
        let mut doubles = Vec::new();
        let members: Vec<DiskIndex> = self.members().map(|(index, _)| index).collect();
        for index in members {
            let Some(pool) = self.disks[index.index()].store.pool() else { continue };
            let on_its_way = pool.catalog.arriving;
            for column in pool.columns() {
                match self.home(column) {
                    _ if on_its_way == Some(column) => arriving.push((index, column)),
                    None => self.settle_in(column, index),
                    Some(_) => doubles.push((index, column)),
                }
            }
        }
        // Where it came from it is whole as long as it is there.
        for (index, column) in arriving {
            if self.home(column).is_none() && !self.is_half_arrived(column, lost) {
                self.settle_in(column, index);
            } else {
                doubles.push((index, column));
            }
        }
        let forget = |(index, (family, extent)): (DiskIndex, Column)| {
            self.any_of(family).map(|volume| (index, StoreOp::Forget { volume, extent }))
        };
        doubles.into_iter().filter_map(forget).collect()
    }

    /// Whether a column that lives nowhere else may not have come whole: it was on its way from a disk that failed meanwhile, with
    /// which it was lost, or from one that is let go now.
    fn is_half_arrived(&self, (family, extent): Column, lost: &BTreeMap<FamilyId, Vec<(u32, u32)>>) -> bool {
        let holds = |(first, count): &(u32, u32)| (*first..first.saturating_add(*count)).contains(&extent.0);
        !self.let_go.is_empty() || lost.get(&family).is_some_and(|ranges| ranges.iter().any(holds))
    }
}
