//! Volumes and notes: made, grown, kept and erased through the catalog, several changes in one write.

use crate::catalog::{Catalog, Member, Volume};
use crate::lanes::FamilyId;
use crate::layers::all_of;
use crate::layout::CATALOGS;
use crate::pool::{DiskThen, FlushThen, LogThen, Pool};
use crate::record::Record;
use crate::slots::LayerId;
use crate::space::Ticket;
use crate::transfer::{Request, RequestId};
use crate::{NOTE_BYTES_MAX, StoreError, StoreRequestId};
use pollux_base::unit::{BLOCK_BYTES, VOLUME_BYTES_MAX};
use pollux_base::{ByteCount, DiskId, DiskOpKind, ExtentIndex, Generation, GroupId, VolumeId};
use std::collections::{BTreeMap, VecDeque};

/// A change of the catalog that was asked for.
pub enum Change {
    Create {
        volume: VolumeId,
        group: GroupId,
        size: ByteCount,
    },
    Delete {
        volume: VolumeId,
    },
    Note {
        group: GroupId,
        note: Option<Vec<u8>>,
    },
    Snapshot {
        of: Vec<(VolumeId, VolumeId)>,
    },
    Clone {
        of: VolumeId,
        volume: VolumeId,
        group: GroupId,
        generation: Generation,
    },
    /// `extents`: where the two may differ.
    Rollback {
        volume: VolumeId,
        snapshot: VolumeId,
        generation: Generation,
        extents: Vec<ExtentIndex>,
    },
    /// The parent, which has no extents any more, is gone.
    Merge {
        parent: LayerId,
        child: LayerId,
    },
    Members {
        members: BTreeMap<DiskId, Member>,
        lost: BTreeMap<FamilyId, Vec<(u32, u32)>>,
    },
    Adopt(Box<Catalog>),
    Arriving(Option<(FamilyId, ExtentIndex)>),
}

pub type CatalogQueue = VecDeque<(RequestId, Change)>;

/// The catalog on its way to the disk.
pub struct CatalogCommit {
    next: Catalog,
    requests: Vec<RequestId>,
    /// Who waits for the space of the layers that it no longer has, and for which volume.
    deleted: Vec<(VolumeId, RequestId)>,
    second: bool,
}

/// A layer that is gone from the catalog and whose slots are being freed.
pub struct Leaving {
    /// Whoever waits for its space.
    requests: Vec<RequestId>,
    /// Records that free slots are on their way.
    is_logging: bool,
    /// Everything was given back by then; the space is free when its discards have ended.
    given_back: Option<Ticket>,
}

/// Slots freed at a time: 200 KiB of journal, so that other records are not held up for long.
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
        self.deleting.insert(volume);
        self.change_catalog(id, Change::Delete { volume });
        Ok(())
    }

    /// Heats that wait for room find their layer gone.
    fn drop_waiting_heats(&mut self, layer: LayerId) {
        let waiting = std::mem::take(&mut self.heat_waiting);
        for (request, key, generation) in waiting {
            if key.0 != layer {
                self.heat_waiting.push_back((request, key, generation));
                continue;
            }
            if let Some(waiter) = self.requests.get_mut(request) {
                waiter.error = Some(StoreError::NoVolume);
            }
            self.finish_one(request);
        }
    }

    pub fn change_catalog(&mut self, id: StoreRequestId, change: Change) {
        let request = self.requests.insert(Request::change(id, 1));
        self.catalog_queue.push_back((request, change));
    }

    /// Writes the changes that wait, in one go.
    /// `true`: changes that changed nothing have ended at once.
    pub fn start_catalog_commit(&mut self) -> bool {
        if self.catalog_commit.is_some() || self.catalog_queue.is_empty() {
            return false;
        }
        let mut next = self.catalog.clone();
        let (mut requests, mut deleted) = (Vec::new(), Vec::new());
        while let Some((id, change)) = self.catalog_queue.pop_front() {
            let fits = match &change {
                Change::Create { volume, .. } => next.volumes.contains_key(volume) || next.fits(0),
                Change::Note { note, .. } => note.as_ref().is_none_or(|note| next.fits(note.len())),
                Change::Snapshot { of } => of.iter().all(|_| next.fits(128 * of.len())),
                Change::Clone { .. } => next.fits(0),
                Change::Rollback { .. } => next.fits(1024),
                Change::Members { lost, .. } => next.fits(lost.values().map(|ranges| 40 + 10 * ranges.len()).sum()),
                Change::Delete { .. } | Change::Merge { .. } | Change::Adopt(_) | Change::Arriving(_) => true,
            };
            if !fits {
                if let Some(request) = self.requests.get_mut(id) {
                    request.error = Some(StoreError::Full);
                }
                self.finish_one(id);
                continue;
            }
            let made = next.layers_made;
            let counts = match change {
                Change::Snapshot { of } => {
                    next.snapshot(&of);
                    next.layers_made > made
                }
                Change::Clone { of, volume, group, generation } => {
                    next.clone_of(of, volume, group, generation);
                    next.layers_made > made
                }
                Change::Rollback { volume, snapshot, generation, extents } => {
                    next.roll_back(volume, snapshot, generation, &extents);
                    next.layers_made > made
                }
                // Each disk makes its layers one when it likes.
                Change::Merge { parent, child } => {
                    next.merge(parent, child);
                    false
                }
                Change::Members { members, lost } => {
                    (next.members, next.lost) = (members, lost);
                    true
                }
                Change::Arriving(column) => {
                    next.arriving = column;
                    false
                }
                Change::Adopt(ahead) => {
                    next.adopt(*ahead);
                    false
                }
                Change::Create { volume, group, size } => {
                    let layer = next.volumes.get(&volume).map(|known| known.layer);
                    let layer = layer.unwrap_or_else(|| next.new_layer(None));
                    let known = next.volumes.get(&volume).map_or(ByteCount(0), |known| known.size);
                    let volume_now = Volume { group, size: size.max(known), layer };
                    next.volumes.insert(volume, volume_now) != Some(volume_now)
                }
                Change::Delete { volume } => {
                    // It ends later, when the space is free.
                    deleted.push((volume, id));
                    next.changes += u64::from(next.volumes.remove(&volume).is_some());
                    continue;
                }
                Change::Note { group, note: Some(note) } => next.notes.insert(group, note.clone()) != Some(note),
                Change::Note { group, note: None } => next.notes.remove(&group).is_some(),
            };
            next.changes += u64::from(counts);
            requests.push(id);
        }
        next.prune();
        if next == self.catalog && deleted.is_empty() {
            requests.into_iter().for_each(|id| self.finish_one(id));
            return true;
        }
        self.catalog_commit = Some(CatalogCommit { next, requests, deleted, second: false });
        self.catalog_sequence += 1;
        self.write_catalog(0);
        false
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
        let before = std::mem::replace(&mut self.catalog, commit.next);
        for layer in self.catalog.layers.keys() {
            self.layers.entry(*layer).or_default();
        }
        commit.requests.into_iter().for_each(|id| self.finish_one(id));
        let gone: Vec<LayerId> =
            before.layers.keys().filter(|layer| !self.catalog.layers.contains_key(layer)).copied().collect();
        let mut waiting = Vec::new();
        for (volume, request) in commit.deleted {
            self.deleting.remove(&volume);
            match self.requests.get_mut(request).filter(|_| !gone.is_empty()) {
                Some(waiter) => {
                    waiter.left = gone.len();
                    waiting.push(request);
                }
                None => self.finish_one(request),
            }
        }
        for layer in &gone {
            self.drop_waiting_heats(*layer);
            self.leaving.insert(*layer, Leaving { requests: waiting.clone(), is_logging: false, given_back: None });
        }
        self.on_layers_changed();
        gone.into_iter().for_each(|layer| self.try_free(layer));
    }

    pub fn no_longer_busy(&mut self, layer: LayerId) {
        let map = self.layers.get_mut(&layer).expect("what is busy is known");
        map.busy -= 1;
        if map.busy == 0 && !self.leaving.is_empty() {
            self.try_free(layer);
        }
    }

    /// Begins to free the slots of a layer that is gone from the catalog and has nothing under way.
    fn try_free(&mut self, layer: LayerId) {
        let ready = self.leaving.get(&layer).is_some_and(|l| !l.is_logging && l.given_back.is_none());
        if !ready || self.layers[&layer].busy > 0 || self.failed.is_some() {
            return;
        }
        let hot: Vec<_> = self.hot.range(all_of(layer)).map(|(key, _)| *key).collect();
        for key in hot {
            let hot = self.hot.remove(&key).expect("it was just there");
            hot.cooling.into_iter().flat_map(|cooling| cooling.requests).for_each(|id| self.finish_one(id));
            hot.spare_leaf.into_iter().for_each(|place| self.space.drop_leaf(place));
            self.journal.queue(Record::Cold { layer, extent: key.1 });
        }
        let map = self.layers.get_mut(&layer).expect("it is known until it is freed");
        let mut slots = Vec::new();
        while slots.len() < FREED_MAX
            && let Some((_, slot)) = map.extents.pop_first()
        {
            slots.push(slot);
        }
        let leaving = self.leaving.get_mut(&layer).expect("it was just there");
        let Some((last, others)) = slots.split_last() else {
            leaving.given_back = Some(self.space.ticket());
            self.flush(FlushThen::Nothing);
            return self.finish_leaving();
        };
        leaving.is_logging = true;
        for slot in &slots {
            self.leaves.remove(*slot);
        }
        others.iter().for_each(|slot| self.log_slot(*slot, self.table.get(*slot).freed()));
        let descriptor = Box::new(self.table.get(*last).freed());
        self.journal.queue_then(Record::Slot { slot: *last, descriptor }, LogThen::Freed(layer));
    }

    /// The journal knows that the slots are free.
    pub fn on_slots_freed(&mut self, layer: LayerId) {
        self.leaving.get_mut(&layer).expect("it is leaving").is_logging = false;
        self.try_free(layer);
    }

    /// Ends what waited for space that is free now.
    pub fn finish_leaving(&mut self) {
        let is_free = |leaving: &Leaving| leaving.given_back.is_some_and(|ticket| self.space.is_free(ticket));
        let gone: Vec<LayerId> =
            self.leaving.iter().filter(|(_, leaving)| is_free(leaving)).map(|(layer, _)| *layer).collect();
        for layer in gone {
            self.layers.remove(&layer);
            let leaving = self.leaving.remove(&layer).expect("it was just there");
            leaving.requests.into_iter().for_each(|id| self.finish_one(id));
        }
    }
}
