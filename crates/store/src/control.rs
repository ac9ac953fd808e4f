//! Volumes and notes: made, grown, kept and erased through the catalog, several changes in one write.

use crate::catalog::{Catalog, Volume};
use crate::layout::CATALOGS;
use crate::pool::{DiskThen, LogThen, Pool};
use crate::record::Record;
use crate::transfer::Request;
use crate::{NOTE_BYTES_MAX, StoreError, StoreRequestId};
use pollux_base::unit::{BLOCK_BYTES, EXTENT_BYTES, VOLUME_BYTES_MAX};
use pollux_base::{ByteCount, DiskOpKind, ExtentIndex, GroupId, VolumeId};
use std::collections::VecDeque;
use std::ops::Range;

/// A change of the catalog that was asked for.
pub enum Change {
    Create { volume: VolumeId, group: GroupId, size: ByteCount },
    Delete { volume: VolumeId },
    Note { group: GroupId, note: Option<Vec<u8>> },
}

pub type CatalogQueue = VecDeque<(StoreRequestId, Change)>;

/// The catalog on its way to the disk.
pub struct CatalogCommit {
    next: Catalog,
    requests: Vec<StoreRequestId>,
    deleted: Vec<VolumeId>,
    second: bool,
}

/// A volume that is gone from the catalog, or about to be, and whose slots are being freed.
pub struct Deletion {
    request: StoreRequestId,
    committed: bool,
    /// Slots whose records are queued; then those whose space is being given back.
    slots: Vec<u32>,
    discards: u32,
}

/// Slots freed at a time: 160 KiB of journal, so that other records are not held up for long.
const FREED_MAX: usize = 4096;

impl Pool {
    pub fn begin_create(
        &mut self,
        id: StoreRequestId,
        volume: VolumeId,
        group: GroupId,
        size: ByteCount,
    ) -> Result<(), StoreError> {
        if size.0 == 0 || size.0 > VOLUME_BYTES_MAX || !size.0.is_multiple_of(BLOCK_BYTES) {
            return Err(StoreError::OutOfRange);
        }
        self.change_catalog(id, Change::Create { volume, group, size });
        Ok(())
    }

    pub fn begin_note(&mut self, id: StoreRequestId, group: GroupId, note: Option<Vec<u8>>) -> Result<(), StoreError> {
        if let Some(len) = note.as_ref().map(Vec::len).filter(|len| *len > NOTE_BYTES_MAX) {
            return Err(StoreError::NoteTooLong(len));
        }
        self.change_catalog(id, Change::Note { group, note });
        Ok(())
    }

    pub fn begin_delete(&mut self, id: StoreRequestId, volume: VolumeId) -> Result<(), StoreError> {
        self.known_volume(volume)?;
        self.volumes.get_mut(&volume).expect("it is known").deleting = true;
        self.deletions.insert(volume, Deletion { request: id, committed: false, slots: Vec::new(), discards: 0 });
        let waiting = std::mem::take(&mut self.heat_waiting);
        for (request, key, generation) in waiting {
            if key.0 != volume {
                self.heat_waiting.push_back((request, key, generation));
            } else if let Some(waiter) = self.requests.get_mut(&request) {
                waiter.error = Some(StoreError::NoVolume);
                self.finish_one(request);
            }
        }
        self.change_catalog(id, Change::Delete { volume });
        Ok(())
    }

    fn change_catalog(&mut self, id: StoreRequestId, change: Change) {
        self.requests.insert(id, Request::change(1));
        self.catalog_queue.push_back((id, change));
    }

    /// Writes the changes that wait, in one go.
    pub fn start_catalog_commit(&mut self) {
        if self.catalog_commit.is_some() || self.catalog_queue.is_empty() {
            return;
        }
        let mut next = self.catalog.clone();
        let (mut requests, mut deleted) = (Vec::new(), Vec::new());
        while let Some((id, change)) = self.catalog_queue.pop_front() {
            let fits = match &change {
                Change::Create { volume, .. } => next.volumes.contains_key(volume) || next.fits(0),
                Change::Note { note, .. } => note.as_ref().is_none_or(|note| next.fits(note.len())),
                Change::Delete { .. } => true,
            };
            if !fits {
                if let Some(request) = self.requests.get_mut(&id) {
                    request.error = Some(StoreError::Full);
                }
                self.finish_one(id);
                continue;
            }
            match change {
                // The old volume of this number is not gone yet.
                Change::Create { volume, .. } if self.deletions.contains_key(&volume) => {
                    self.catalog_queue.push_front((id, change));
                    break;
                }
                Change::Create { volume, group, size } => {
                    let known = next.volumes.entry(volume).or_insert(Volume { group, size });
                    *known = Volume { group, size: size.max(known.size) };
                }
                Change::Delete { volume } => {
                    next.volumes.remove(&volume);
                    deleted.push(volume);
                }
                Change::Note { group, note: Some(note) } => {
                    next.notes.insert(group, note);
                }
                Change::Note { group, note: None } => {
                    next.notes.remove(&group);
                }
            }
            requests.push(id);
        }
        if next == self.catalog {
            return requests.into_iter().for_each(|id| self.finish_one(id));
        }
        self.catalog_commit = Some(CatalogCommit { next, requests, deleted, second: false });
        self.catalog_sequence += 1;
        self.write_catalog(0);
    }

    fn write_catalog(&mut self, copy: usize) {
        let commit = self.catalog_commit.as_ref().expect("a change is on its way");
        let data = vec![commit.next.encode(self.catalog_sequence, self.pool_id())];
        let write = DiskOpKind::Write { offset: ByteCount(CATALOGS[copy]), data, sync: true };
        self.io.submit(write, DiskThen::Catalog);
    }

    pub fn on_catalog_written(&mut self) {
        let commit = self.catalog_commit.as_mut().expect("a change is on its way");
        if !commit.second {
            commit.second = true;
            return self.write_catalog(1);
        }
        let commit = self.catalog_commit.take().expect("it was just there");
        self.catalog = commit.next;
        for volume in self.catalog.volumes.keys() {
            self.volumes.entry(*volume).or_default();
        }
        for volume in &commit.deleted {
            self.deletions.get_mut(volume).expect("its deletion was begun").committed = true;
        }
        let deletions: Vec<StoreRequestId> = self.deletions.values().map(|deletion| deletion.request).collect();
        // A deletion ends later, when the space is free.
        for id in commit.requests.into_iter().filter(|id| !deletions.contains(id)) {
            self.finish_one(id);
        }
        commit.deleted.into_iter().for_each(|volume| self.try_free(volume));
    }

    pub fn no_longer_busy(&mut self, volume: VolumeId) {
        let map = self.volumes.get_mut(&volume).expect("what is busy is known");
        map.busy -= 1;
        if map.deleting && map.busy == 0 {
            self.try_free(volume);
        }
    }

    /// Begins to free the slots of a volume that is gone from the catalog and has nothing under way.
    fn try_free(&mut self, volume: VolumeId) {
        let ready = self.deletions.get(&volume).is_some_and(|d| d.committed && d.slots.is_empty() && d.discards == 0);
        if !ready || self.volumes[&volume].busy > 0 || self.failed.is_some() {
            return;
        }
        let all = (volume, ExtentIndex(0))..=(volume, ExtentIndex(u32::MAX));
        let hot: Vec<_> = self.hot.range(all).map(|(key, _)| *key).collect();
        for key in hot {
            let hot = self.hot.remove(&key).expect("it was just there");
            hot.cooling.into_iter().flat_map(|cooling| cooling.requests).for_each(|id| self.finish_one(id));
            self.journal.queue(Record::Cold { volume, extent: key.1 });
        }
        let map = self.volumes.get_mut(&volume).expect("it is known until it is freed");
        let mut slots = Vec::new();
        while slots.len() < FREED_MAX
            && let Some((_, slot)) = map.extents.pop_first()
        {
            slots.push(slot);
        }
        if slots.is_empty() {
            self.volumes.remove(&volume);
            let deletion = self.deletions.remove(&volume).expect("it was just there");
            return self.finish_one(deletion.request);
        }
        slots.sort_unstable();
        for slot in &slots {
            self.leaves.remove(*slot);
            self.table.discard_begins(*slot);
        }
        let (last, others) = slots.split_last().expect("there is at least one");
        others.iter().for_each(|slot| self.log_slot(*slot, self.table.get(*slot).freed()));
        let descriptor = self.table.get(*last).freed();
        self.table.queued(*last, descriptor);
        self.journal.queue_then(Record::Slot { slot: *last, descriptor }, LogThen::Deleted(volume));
        self.deletions.get_mut(&volume).expect("it was just there").slots = slots;
    }

    /// The journal knows that the slots are free: their space is given back, neighbours in one operation.
    pub fn on_slots_freed(&mut self, volume: VolumeId) {
        let deletion = self.deletions.get_mut(&volume).expect("a deletion is under way");
        let mut runs: Vec<(u32, u32)> = Vec::new();
        for slot in std::mem::take(&mut deletion.slots) {
            match runs.last_mut() {
                Some((first, count)) if *first + *count == slot => *count += 1,
                _ => runs.push((slot, 1)),
            }
        }
        deletion.discards = runs.len() as u32;
        for (first, count) in runs {
            let (offset, len) = (self.geometry().data_offset(first, 0), u64::from(count) * EXTENT_BYTES);
            self.io.submit(DiskOpKind::Discard { offset, len }, DiskThen::Discard { volume, first, count });
        }
    }

    pub fn on_slots_discarded(&mut self, volume: VolumeId, slots: Range<u32>) {
        slots.for_each(|slot| self.table.discard_ended(slot));
        if let Some(deletion) = self.deletions.get_mut(&volume) {
            deletion.discards -= 1;
            self.try_free(volume);
        }
    }
}
