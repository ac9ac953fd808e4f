//! What was lost with a disk. Extents of volumes that may have been there, and of which nothing was heard since: reading them
//! says that they are corrupt, and they count as hot. A heat gives them a new home, where every block says that it is lost
//! until it is written or zeroed again; so a copy from another replica heals them.

use super::Disks;
use crate::StoreOp;
use crate::catalog::few_ranges;
use pollux_base::unit::EXTENT_BYTES;
use pollux_base::{DiskIndex, ExtentIndex, VolumeId};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Default)]
pub struct Lost {
    extents: BTreeMap<VolumeId, BTreeSet<u32>>,
    /// As they are in the catalogs: a few more.
    ranges: BTreeMap<VolumeId, Vec<(u32, u32)>>,
}

impl Lost {
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    pub fn has(&self, volume: VolumeId, extent: ExtentIndex) -> bool {
        self.extents.get(&volume).is_some_and(|extents| extents.contains(&extent.0))
    }

    pub fn of(&self, volume: VolumeId) -> impl Iterator<Item = ExtentIndex> {
        self.extents.get(&volume).into_iter().flatten().copied().map(ExtentIndex)
    }

    pub fn ranges(&self) -> BTreeMap<VolumeId, Vec<(u32, u32)>> {
        self.ranges.clone()
    }

    pub fn add(&mut self, volume: VolumeId, extents: impl IntoIterator<Item = u32>) {
        let known = self.extents.entry(volume).or_default();
        known.extend(extents);
        let joined = few_ranges(known.iter().copied());
        if joined.is_empty() {
            self.extents.remove(&volume);
        } else {
            self.ranges.insert(volume, joined);
        }
    }

    /// It has a new home, which says of each block that it is lost.
    pub fn remove(&mut self, volume: VolumeId, extent: ExtentIndex) {
        if let Some(extents) = self.extents.get_mut(&volume) {
            extents.remove(&extent.0);
        }
    }

    /// At open: what the catalogs say, but for what has a home already.
    pub fn load(
        &mut self,
        ranges: BTreeMap<VolumeId, Vec<(u32, u32)>>,
        has_own: impl Fn(VolumeId, ExtentIndex) -> bool,
    ) {
        for (volume, ranges) in &ranges {
            let all = ranges.iter().flat_map(|(first, count)| *first..first.saturating_add(*count));
            let lost = all.filter(|extent| !has_own(*volume, ExtentIndex(*extent))).collect();
            self.extents.insert(*volume, lost);
        }
        self.ranges = ranges;
    }

    /// Volumes of which nothing is lost any more.
    fn found(&self) -> Vec<VolumeId> {
        let is_found = |volume: &&VolumeId| self.extents.get(volume).is_none_or(BTreeSet::is_empty);
        self.ranges.keys().filter(is_found).copied().collect()
    }
}

impl Disks {
    /// What lives on the disk is lost, for every volume.
    pub(super) fn lose_disk(&mut self, disk: DiskIndex) {
        let homes = std::mem::take(&mut self.homes);
        for (volume, _, size) in self.first().volumes().collect::<Vec<_>>() {
            let extents = u32::try_from(size.0.div_ceil(EXTENT_BYTES)).unwrap_or(u32::MAX);
            let Some(homes) = self.family(volume).and_then(|family| homes.get(&family)) else { continue };
            let there = homes.range(..ExtentIndex(extents)).filter(|(_, home)| **home == disk);
            self.lost.add(volume, there.map(|(extent, _)| extent.0).collect::<Vec<_>>());
        }
        self.homes = homes;
    }

    /// What lived on a disk that is not here nobody can tell: it is all that lives nowhere.
    pub(super) fn lose_what_has_no_home(&mut self) {
        for (volume, _, size) in self.first().volumes().collect::<Vec<_>>() {
            let extents = u32::try_from(size.0.div_ceil(EXTENT_BYTES)).unwrap_or(u32::MAX);
            let Some(family) = self.family(volume) else { continue };
            let homeless: Vec<u32> =
                (0..extents).filter(|extent| self.home((family, ExtentIndex(*extent))).is_none()).collect();
            self.lost.add(volume, homeless);
        }
    }

    /// Whether the request would make another volume of one of which parts are lost: those would not be missed there.
    pub(super) fn changes_what_is_lost(&self, op: &StoreOp) -> bool {
        let is_lost = |volume: &VolumeId| self.lost.ranges.contains_key(volume);
        match op {
            StoreOp::Snapshot { of } => of.iter().any(|(volume, _)| is_lost(volume)),
            StoreOp::Clone { of, .. } => is_lost(of),
            StoreOp::Rollback { volume, snapshot, .. } => is_lost(volume) || is_lost(snapshot),
            _ => false,
        }
    }

    /// The catalogs need not speak any more of what was found. `true`: they are told.
    pub(super) fn forget_what_was_found(&mut self) -> bool {
        // Asked at every event: mostly nothing is lost.
        if self.lost.is_empty() || self.changing > 0 || self.failed.is_some() {
            return false;
        }
        let known: BTreeSet<VolumeId> = self.volumes().map(|(volume, _, _)| volume).collect();
        let found = self.lost.found();
        let gone: Vec<VolumeId> = self.lost.ranges.keys().filter(|volume| !known.contains(volume)).copied().collect();
        if found.is_empty() && gone.is_empty() {
            return false;
        }
        for volume in found.into_iter().chain(gone) {
            self.lost.ranges.remove(&volume);
            self.lost.extents.remove(&volume);
        }
        self.change_members(|_| {});
        true
    }
}
