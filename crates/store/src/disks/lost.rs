//! What was lost with a disk: columns that may have been there and have no home. Reading them says that they are corrupt, and they
//! count as hot. A heat of one of its volumes gives a column a new home, which is told first that all of it is lost; so a copy
//! from another replica heals it, volume by volume and block by block. Snapshots and clones of a lost column are lost with it.

use super::{Column, Disks};
use crate::catalog::few_ranges;
use crate::lanes::FamilyId;
use crate::pool::Pool;
use crate::slots::LayerId;
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
        // With what was lost before, and has a home but is not healed there yet.
        let before = self.ranges.get(&family).into_iter().flatten();
        let before = before.flat_map(|(first, count)| *first..first.saturating_add(*count));
        let joined = few_ranges(known.iter().map(|extent| extent.0).chain(before));
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

    /// At open: what the catalogs say, but for what has a home.
    pub(super) fn load_lost(&mut self, ranges: BTreeMap<FamilyId, Vec<(u32, u32)>>) {
        for (family, ranges) in &ranges {
            let all = ranges.iter().flat_map(|(first, count)| *first..first.saturating_add(*count)).map(ExtentIndex);
            let homeless = all.filter(|extent| self.home((*family, *extent)).is_none()).collect();
            self.lost.columns.insert(*family, homeless);
        }
        self.lost.ranges = ranges;
    }

    /// Whether parts of the group were lost with a disk and are not healed yet. Asked at every event: mostly nothing is lost.
    pub fn is_incomplete(&self, group: GroupId) -> bool {
        let is_so = |volume: VolumeId| {
            let ranges = self.family(volume).and_then(|family| self.lost.ranges.get(&family));
            let chain =
                |pool: &Pool| pool.layer_of(volume).into_iter().flat_map(|top| pool.catalog.chain(top)).collect();
            ranges.is_some_and(|ranges| self.lost_of(volume).next().is_some() || self.is_damaged(ranges, chain))
        };
        !self.lost.is_empty() && self.volumes().any(|(volume, of, _)| of == group && is_so(volume))
    }

    /// Whether on any disk blocks of these layers are lost, within these extents.
    fn is_damaged(&self, ranges: &[(u32, u32)], layers: impl Fn(&Pool) -> Vec<LayerId>) -> bool {
        let mut pools = self.members().filter_map(|(_, disk)| disk.store.pool());
        pools.any(|pool| pool.is_damaged(layers(pool), ranges))
    }

    /// Whether all of a family has homes again, and is healed there.
    fn is_healed(&self, family: FamilyId, ranges: &[(u32, u32)]) -> bool {
        self.lost.columns.get(&family).is_none_or(BTreeSet::is_empty)
            && !self.is_damaged(ranges, |pool| pool.layers_of_family(family))
    }

    /// The catalogs need not speak any more of what was found and healed. `true`: they are told.
    pub(super) fn forget_what_was_found(&mut self) -> bool {
        // Asked at every event: mostly nothing is lost.
        if self.lost.is_empty() || self.changing > 0 || self.failed.is_some() {
            return false;
        }
        let known = self.families();
        let is_over = |(family, ranges): (&FamilyId, &Vec<_>)| {
            (!known.contains_key(family) || self.is_healed(*family, ranges)).then_some(*family)
        };
        let forgotten: Vec<FamilyId> = self.lost.ranges.iter().filter_map(is_over).collect();
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
