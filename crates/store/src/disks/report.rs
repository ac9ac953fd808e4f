//! The pool's disks as they are now, for people and for the shell.

use super::{DISKS_MAX, Disk, Disks};
use crate::{Member, MemberState, StoreRequestId};
use pollux_base::pool::{DiskReport, DiskState};
use pollux_base::{DiskId, DiskIndex};

impl Disks {
    /// Under which number the shell is to open a disk that joins; none while no disk can join. One that was there under this number did
    /// not join.
    pub fn next_disk(&self) -> Option<DiskIndex> {
        let number = u8::try_from(self.disks.len()).ok()?;
        self.refuses_changes().is_none().then_some(DiskIndex(number))
    }

    /// Why no disk can join or leave now.
    pub(super) fn refuses_changes(&self) -> Option<String> {
        if let Some(reason) = self.failed() {
            return Some(reason.to_owned());
        }
        if let Some(error) = &self.refused {
            return Some(format!("the pool can not be used: {error}"));
        }
        let is_busy = self.joining.is_some() || self.changing > 0 || self.is_turning || !self.is_open;
        is_busy.then(|| "the pool is being opened or changed; try again".to_owned())
    }

    /// Whether no disk can join or leave only because something is being noted, which takes a moment.
    pub fn is_noting(&self) -> bool {
        let is_well = self.failed().is_none() && self.refused.is_none() && self.is_open;
        is_well && self.joining.is_none() && self.changing > 0
    }

    /// Whether one more disk fits beside those that the pool knows.
    pub(super) fn refuses_more(&self, members: usize) -> Option<String> {
        // Numbers of disks are not used twice while the pool is open.
        let is_full = members >= DISKS_MAX || self.disks.len() > usize::from(u8::MAX) - 1;
        is_full
            .then(|| format!("a pool has at most {DISKS_MAX} disks, those included that failed and were not removed"))
    }

    /// Another number when a disk's state may be another. Cheap, because it is asked for after every event.
    pub fn state_word(&self) -> u64 {
        // As the catalog has them, which is what is told; `is_draining` is ahead of it.
        let known = self.first().pool().into_iter().flat_map(|pool| pool.catalog.members.values());
        let members = known.fold(1u64, |word, member| word.wrapping_mul(31).wrapping_add(member.state as u64));
        let failed = self.disks.iter().filter(|disk| disk.store.failed().is_some()).count() as u64;
        let word = |word: u64, disk: &Disk| {
            let bits = u64::from(disk.is_in) << 2 | u64::from(disk.is_draining) << 1 | u64::from(disk.columns == 0);
            word.wrapping_mul(31).wrapping_add(bits)
        };
        let is_stalled = u64::from(self.stalled_at.is_some());
        // With one disk columns are not counted, and say nothing.
        self.disks.iter().fold(members.wrapping_mul(31).wrapping_add(is_stalled << 16 | failed << 8), word)
    }

    /// Errors of all disks since the pool was opened.
    pub fn errors(&self) -> u64 {
        self.disks.iter().map(|disk| disk.store.errors()).map(|(checksums, io)| checksums + io).sum()
    }

    /// In no order that means anything.
    pub fn disks(&self) -> Vec<DiskReport> {
        let Some(pool) = self.first().pool() else { return Vec::new() };
        pool.catalog.members.iter().map(|(id, member)| self.report(*id, member)).collect()
    }

    fn report(&self, id: DiskId, member: &Member) -> DiskReport {
        let disk = self.disks.iter().find(|disk| disk.id == id);
        let store = disk.map(|disk| &disk.store);
        let used = store.map_or(0, |store| store.capacity().0.saturating_sub(store.free().0));
        let (checksum_errors, io_errors) = store.map_or((0, 0), |store| store.errors());
        let extents = match disk {
            Some(_) if self.is_alone() => self.first().pool().map_or(0, |pool| pool.columns().len() as u64),
            disk => disk.map_or(0, |disk| disk.columns),
        };
        let state = match member.state {
            MemberState::Out => DiskState::Failed,
            _ if store.is_some_and(|store| store.failed().is_some()) => DiskState::Failed,
            MemberState::Active | MemberState::Draining if disk.is_none() => DiskState::Missing,
            MemberState::Active => DiskState::Healthy,
            MemberState::Draining if extents == 0 => DiskState::Drained,
            MemberState::Draining => DiskState::Draining,
        };
        let reason = match state {
            DiskState::Failed => store.and_then(|store| store.failed()).map(str::to_owned),
            DiskState::Draining if self.stalled_at.is_some() => {
                Some("the other disks have no room for what it holds".into())
            }
            _ => None,
        };
        DiskReport {
            disk: id,
            path: disk.and_then(|disk| disk.path.as_ref()).unwrap_or(&member.path).clone(),
            state,
            size_bytes: member.size.0,
            capacity_bytes: store.map_or(0, |store| store.capacity().0),
            used_bytes: used,
            extents,
            checksum_errors,
            io_errors,
            reason,
        }
    }

    /// The disk of this id, if it is a part of the pool now.
    pub(super) fn member(&self, id: DiskId) -> Option<(DiskIndex, &Disk)> {
        self.members().find(|(_, known)| known.id == id)
    }

    /// Disks that were opened and are no part of the pool: about to join when everything stopped, or removed.
    pub fn strangers(&self) -> impl Iterator<Item = DiskIndex> {
        (0..).map(DiskIndex).zip(&self.disks).filter(|(_, disk)| !disk.is_in).map(|(index, _)| index)
    }

    /// The pool was not opened because this disk is missing: it goes on without it. Ends in `Changed`.
    pub(super) fn let_go(&mut self, id: StoreRequestId, disk: DiskId) -> Result<(), String> {
        match &self.refused {
            Some(crate::OpenError::DiskMissing { id: missing, .. }) if *missing == disk => {}
            Some(error) => return Err(format!("the pool can not be used: {error}")),
            None => return Err(format!("disk {disk} is not missing")),
        }
        self.let_go.insert(disk);
        self.open_without(id)
    }
}
