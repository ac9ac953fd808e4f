//! What was lost with a disk: columns that may have been there and have no home. Reading them says that they are corrupt, and they
//! count as hot. A heat of one of its volumes gives a column a new home, which is told first that all of it is lost; so a copy
//! from another replica heals it, volume by volume and block by block. Snapshots and clones of a lost column are lost with it.

use super::{Column, Disk, Disks};
use crate::catalog::few_ranges;
use crate::lanes::FamilyId;
use pollux_base::unit::EXTENT_BYTES;
use pollux_base::{DiskIndex, ExtentIndex, GroupId, VolumeId};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Default)]
pub struct Lost {
    columns: BTreeMap<FamilyId, BTreeSet<ExtentIndex>>,
    /// As they are in the catalogs: a few more.
    ranges: BTreeMap<FamilyId, Vec<(u32, u32)>>,
    /// Those that are being given a home.
    settling: BTreeSet<Column>,
}

impl Lost {
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    pub fn has(&self, (family, extent): Column) -> bool {
        self.columns.get(&family).is_some_and(|extents| extents.contains(&extent))
    }

    fn of(&self, family: FamilyId) -> impl Iterator<Item = ExtentIndex> {
        self.columns.get(&family).into_iter().flatten().copied()
    }

    fn add(&mut self, family: FamilyId, extents: impl IntoIterator<Item = ExtentIndex>) {
        let known = self.columns.entry(family).or_default();
        known.extend(extents);
        let joined = few_ranges(known.iter().map(|extent| extent.0));
        if joined.is_empty() {
            self.columns.remove(&family);
        } else {
            self.ranges.insert(family, joined);
        }
    }

    pub fn is_settling(&self, column: &Column) -> bool {
        self.settling.contains(column)
    }

    pub fn settle(&mut self, column: Column) {
        self.settling.insert(column);
    }

    /// `true`: it has a home, and that says of each block that it is lost.
    pub fn settled(&mut self, column: Column, has_home: bool) {
        self.settling.remove(&column);
        if let Some(extents) = self.columns.get_mut(&column.0).filter(|_| has_home) {
            extents.remove(&column.1);
        }
    }

    /// At open: what the catalogs say, but for what has a home.
    fn load(&mut self, ranges: BTreeMap<FamilyId, Vec<(u32, u32)>>, has_home: impl Fn(Column) -> bool) {
        for (family, ranges) in &ranges {
            let all = ranges.iter().flat_map(|(first, count)| *first..first.saturating_add(*count)).map(ExtentIndex);
            self.columns.insert(*family, all.filter(|extent| !has_home((*family, *extent))).collect());
        }
        self.ranges = ranges;
    }

    /// Families that all have homes again.
    fn found(&self) -> Vec<FamilyId> {
        let is_found = |family: &&FamilyId| self.columns.get(family).is_none_or(BTreeSet::is_empty);
        self.ranges.keys().filter(is_found).copied().collect()
    }
}

impl Disks {
    /// For `PutMembers`: each family by one of its volumes.
    pub(super) fn lost_ranges(&self) -> BTreeMap<VolumeId, Vec<(u32, u32)>> {
        let named = |(family, ranges): (&FamilyId, &Vec<(u32, u32)>)| Some((self.any_of(*family)?, ranges.clone()));
        self.lost.ranges.iter().filter_map(named).collect()
    }

    /// Whether what the volume has there is lost.
    pub(super) fn is_lost(&self, volume: VolumeId, extent: ExtentIndex) -> bool {
        !self.lost.is_empty() && self.family(volume).is_some_and(|family| self.lost.has((family, extent)))
    }

    /// Extents of the volume that are lost.
    pub(super) fn lost_of(&self, volume: VolumeId) -> impl Iterator<Item = ExtentIndex> {
        let family = self.family(volume).filter(|_| !self.lost.is_empty());
        let extents = family.into_iter().flat_map(|family| self.lost.of(family));
        extents.filter(move |extent| self.blocks_in(volume, *extent) > 0)
    }

    /// Each family, and how many extents the largest of its volumes has.
    fn families(&self) -> BTreeMap<FamilyId, u32> {
        let mut families: BTreeMap<FamilyId, u32> = BTreeMap::new();
        for (volume, _, size) in self.first().volumes() {
            let Some(family) = self.family(volume) else { continue };
            let extents = u32::try_from(size.0.div_ceil(EXTENT_BYTES)).unwrap_or(u32::MAX);
            let largest = families.entry(family).or_default();
            *largest = extents.max(*largest);
        }
        families
    }

    /// How many blocks of the extent the largest volume of the family has.
    pub(super) fn blocks_of(&self, (family, extent): Column) -> u16 {
        let volumes = self.first().volumes().map(|(volume, ..)| volume);
        let own = volumes.filter(|volume| self.family(*volume) == Some(family));
        own.map(|volume| self.blocks_in(volume, extent)).max().unwrap_or(0) as u16
    }

    /// What lives on the disk is lost.
    pub(super) fn lose_disk(&mut self, disk: DiskIndex) {
        for (family, extents) in self.families() {
            let homes = self.homes.get(&family).into_iter().flat_map(|homes| homes.range(..ExtentIndex(extents)));
            let there: Vec<ExtentIndex> = homes.filter(|(_, home)| **home == disk).map(|(extent, _)| *extent).collect();
            self.lost.add(family, there);
        }
    }

    /// What lived on a disk that is not here nobody can tell: it is all that lives nowhere.
    pub(super) fn lose_what_has_no_home(&mut self) {
        for (family, extents) in self.families() {
            let all = (0..extents).map(ExtentIndex);
            let homeless: Vec<ExtentIndex> = all.filter(|extent| self.home((family, *extent)).is_none()).collect();
            self.lost.add(family, homeless);
        }
    }

    pub(super) fn load_lost(&mut self) {
        let ranges = self.ahead().0.lost;
        let homes = &self.homes;
        self.lost.load(ranges, |(family, extent)| homes.get(&family).is_some_and(|homes| homes.contains_key(&extent)));
    }

    /// Whether parts of the group were lost with a disk and are not healed yet.
    pub fn is_incomplete(&self, group: GroupId) -> bool {
        let is_so = |volume: VolumeId| {
            let Some(ranges) = self.family(volume).and_then(|family| self.lost.ranges.get(&family)) else {
                return false;
            };
            let was_lost = |x: ExtentIndex| ranges.iter().any(|(first, count)| (*first..first + count).contains(&x.0));
            let is_damaged = |disk: &Disk| {
                let pool = disk.store.pool().filter(|pool| pool.table.damaged() > 0);
                pool.is_some_and(|pool| pool.layer_of(volume).is_some_and(|top| pool.damaged(top).any(was_lost)))
            };
            self.lost_of(volume).next().is_some() || self.members().any(|(_, disk)| is_damaged(disk))
        };
        !self.lost.is_empty() && self.volumes().any(|(volume, of, _)| of == group && is_so(volume))
    }

    /// The catalogs need not speak any more of what was found and healed. `true`: they are told.
    pub(super) fn forget_what_was_found(&mut self) -> bool {
        // Asked at every event: mostly nothing is lost.
        if self.lost.is_empty() || self.changing > 0 || self.failed.is_some() {
            return false;
        }
        let known = self.families();
        let gone = self.lost.ranges.keys().filter(|family| !known.contains_key(family)).copied();
        // What has a home is healed block by block, and until then it is known what was lost.
        let is_damaged = |disk: &Disk| disk.store.pool().is_some_and(|pool| pool.table.damaged() > 0);
        let found = if self.members().any(|(_, disk)| is_damaged(disk)) { Vec::new() } else { self.lost.found() };
        let forgotten: Vec<FamilyId> = found.into_iter().chain(gone).collect();
        for family in &forgotten {
            self.lost.ranges.remove(family);
            self.lost.columns.remove(family);
        }
        if !forgotten.is_empty() {
            self.change_members(|_| {});
        }
        !forgotten.is_empty()
    }
}
