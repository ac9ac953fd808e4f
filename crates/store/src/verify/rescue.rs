//! What can still be had from a pool's disks, without anything else: its volumes, what their owner noted of each group, and
//! the volumes' content. Works on a pool that is refused, and with disks missing; says what could not be read.

use super::blocks::{BlockIs, Extent};
use super::inspect::Inspected;
use super::{Finding, Findings, Progress, ReadDisk, Watch, inspect_all, members};
use crate::catalog::{Catalog, Volume};
use crate::leaf::SUMS;
use pollux_base::unit::{BLOCK_BYTES, BlockRange, EXTENT_BYTES};
use pollux_base::{BlockCount, BlockIndex, ByteCount, DiskId, ExtentIndex, GroupId, VolumeId};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// A pool as its disks tell of it.
pub struct Rescue {
    disks: Vec<Option<Inspected>>,
    /// What is wrong with it.
    pub findings: Vec<Finding>,
    /// Disks that are a part of the pool and were not given, and where they were last seen.
    pub missing: Vec<(DiskId, String)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RescuedVolume {
    pub volume: VolumeId,
    pub group: GroupId,
    pub size: ByteCount,
    /// Extents of 4 MiB in which there is anything.
    pub extents: u64,
    /// Volumes that lie beneath it, nearest first: its own snapshots, or what it was cloned from.
    pub lies_on: Vec<VolumeId>,
}

/// A volume's content was read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Export {
    /// Blocks of data that were given, and that match their checksums.
    pub blocks: u64,
    /// Likewise, but they were being written when the pool was last in use, so that nothing can vouch for them.
    pub hot_blocks: u64,
    /// Blocks that cannot be read or do not match their checksums: they were left out.
    pub bad: Vec<BlockRange>,
    /// A disk is missing: where nothing was given there may have been something on it.
    pub is_incomplete: bool,
}

impl Rescue {
    pub fn of(disks: &mut [&mut dyn ReadDisk]) -> Rescue {
        let mut findings = Findings::default();
        let inspected = inspect_all(disks, &mut findings);
        members::check(&inspected, &mut findings);
        let missing = members::missing(&inspected);
        Rescue { disks: inspected, findings: findings.told, missing }
    }

    fn catalog(&self) -> Option<&Catalog> {
        members::ahead(&self.disks)
    }

    /// Whose pool it is, if any disk can tell.
    pub fn identity(&self) -> Option<crate::PoolIdentity> {
        self.disks.iter().flatten().next().map(|disk| disk.superblock.identity)
    }

    pub fn volumes(&self) -> Vec<RescuedVolume> {
        let Some(catalog) = self.catalog() else { return Vec::new() };
        let of = |(volume, known): (&VolumeId, &Volume)| {
            let beneath = catalog.chain(known.layer).skip(1);
            let named = beneath.filter_map(|layer| {
                catalog.volumes.iter().find(|(_, other)| other.layer == layer).map(|(other, _)| *other)
            });
            RescuedVolume {
                volume: *volume,
                group: known.group,
                size: known.size,
                extents: self.extents(*volume).len() as u64,
                lies_on: named.collect(),
            }
        };
        catalog.volumes.iter().map(of).collect()
    }

    /// What the pool's owner noted of each group.
    pub fn notes(&self) -> BTreeMap<GroupId, Vec<u8>> {
        self.catalog().map(|catalog| catalog.notes.clone()).unwrap_or_default()
    }

    /// Volumes that share what is stored with this one, itself included: its snapshots, clones, and what is kept of it.
    pub fn relatives(&self, volume: VolumeId) -> Vec<VolumeId> {
        let Some(catalog) = self.catalog() else { return Vec::new() };
        let family = |known: &Volume| catalog.layers.get(&known.layer).map(|layer| layer.family);
        let Some(own) = catalog.volumes.get(&volume).and_then(family) else { return Vec::new() };
        catalog.volumes.iter().filter(|(_, known)| family(known) == Some(own)).map(|(relative, _)| *relative).collect()
    }

    /// Extents of a volume in which there is anything, and on which disks.
    fn extents(&self, volume: VolumeId) -> BTreeMap<ExtentIndex, Vec<usize>> {
        let mut extents: BTreeMap<ExtentIndex, Vec<usize>> = BTreeMap::new();
        for (number, disk) in self.disks.iter().enumerate() {
            let Some((disk, known)) =
                disk.as_ref().and_then(|disk| Some((disk, disk.found.catalog.volumes.get(&volume)?)))
            else {
                continue;
            };
            let extents_max = known.size.0.div_ceil(EXTENT_BYTES);
            for layer in disk.found.catalog.chain(known.layer) {
                let slots = disk.owners.range((layer, ExtentIndex(0))..=(layer, ExtentIndex(u32::MAX)));
                for ((_, extent), _) in slots.filter(|((_, extent), _)| u64::from(extent.0) < extents_max) {
                    let disks = extents.entry(*extent).or_default();
                    if disks.last() != Some(&number) {
                        disks.push(number);
                    }
                }
            }
        }
        extents
    }

    /// Gives the volume's data, block by block in rising order; zeros are left out. `write` says whether to go on. `None`: there
    /// is no such volume.
    pub fn export(
        &self,
        disks: &mut [&mut dyn ReadDisk],
        volume: VolumeId,
        write: &mut dyn FnMut(ByteCount, &[u8]) -> bool,
        progress: &mut dyn FnMut(Progress),
    ) -> Option<Export> {
        let known = self.catalog()?.volumes.get(&volume)?;
        let extents = self.extents(volume);
        let lost = self.lost(volume, &extents);
        let all: BTreeSet<ExtentIndex> = extents.keys().chain(&lost).copied().collect();
        let total = ByteCount(all.len() as u64 * EXTENT_BYTES);
        let mut watch = Watch { progress: Progress { done: ByteCount(0), total }, tell: progress };
        let mut export = Export { is_incomplete: !self.missing.is_empty(), ..Export::default() };
        for extent in all {
            let blocks = (known.size.0 / BLOCK_BYTES).saturating_sub(extent.first_block().0).min(SUMS as u64) as usize;
            let home = extents.get(&extent).and_then(|homes| self.home(volume, extent, homes));
            if lost.contains(&extent) {
                export.lose(extent, 0, blocks);
            } else if let Some(number) = home
                && !self.export_extent(number, *disks.get_mut(number)?, volume, extent, blocks, &mut export, write)
            {
                return Some(export);
            }
            watch.advance(EXTENT_BYTES);
        }
        Some(export)
    }

    /// Of an extent that is on its way from one disk to another the one that it leaves has all of it.
    fn home(&self, volume: VolumeId, extent: ExtentIndex, homes: &[usize]) -> Option<usize> {
        let is_arriving = |number: &&usize| {
            let catalog = self.disks.get(**number).and_then(Option::as_ref).map(|disk| &disk.found.catalog);
            catalog.is_some_and(|catalog| {
                let layer = catalog.volumes.get(&volume).and_then(|known| catalog.layers.get(&known.layer));
                catalog.arriving.is_some_and(|arriving| Some(arriving) == layer.map(|layer| (layer.family, extent)))
            })
        };
        homes.iter().find(|number| !is_arriving(number)).or(homes.first()).copied()
    }

    /// Extents that were on a disk that failed, and of which nothing was heard since.
    fn lost(&self, volume: VolumeId, extents: &BTreeMap<ExtentIndex, Vec<usize>>) -> BTreeSet<ExtentIndex> {
        let family = |catalog: &Catalog| Some(catalog.layers.get(&catalog.volumes.get(&volume)?.layer)?.family);
        let ranges = self.catalog().and_then(|catalog| catalog.lost.get(&family(catalog)?)).into_iter().flatten();
        let all = ranges.flat_map(|(first, count)| *first..first.saturating_add(*count)).map(ExtentIndex);
        all.filter(|extent| !extents.contains_key(extent)).collect()
    }

    #[allow(clippy::too_many_arguments)] // what is read, from where to where
    fn export_extent(
        &self,
        number: usize,
        disk: &mut dyn ReadDisk,
        volume: VolumeId,
        extent: ExtentIndex,
        blocks: usize,
        export: &mut Export,
        write: &mut dyn FnMut(ByteCount, &[u8]) -> bool,
    ) -> bool {
        let Some(known) = self.disks.get(number).and_then(Option::as_ref) else { return true };
        let Some(top) = known.found.catalog.volumes.get(&volume) else { return true };
        let layers: Vec<(u32, Extent)> = known
            .found
            .catalog
            .chain(top.layer)
            .filter_map(|layer| known.owners.get(&(layer, extent)).copied())
            .filter_map(|slot| Some((slot, known.extent(disk, slot)?)))
            .collect();
        for block in 0..blocks {
            // The first layer that says anything decides.
            let says = layers.iter().map(|(slot, extent)| (*slot, extent.blocks[block]));
            let Some((slot, is)) = says.into_iter().find(|(_, is)| *is != BlockIs::Nothing) else { continue };
            if is == BlockIs::Hole {
                continue;
            }
            let Some(data) = known.read_block(disk, slot, block, is) else {
                export.lose(extent, block, 1);
                continue;
            };
            match is {
                BlockIs::Hot => export.hot_blocks += 1,
                _ => export.blocks += 1,
            }
            let place = BlockIndex(extent.first_block().0 + block as u64);
            if !write(place.bytes(), data.as_slice()) {
                return false;
            }
        }
        true
    }
}

impl Export {
    fn lose(&mut self, extent: ExtentIndex, block: usize, count: usize) {
        let start = BlockIndex(extent.first_block().0 + block as u64);
        let count = BlockCount(count as u64);
        match self.bad.last_mut() {
            Some(last) if last.end() == start => last.count.0 += count.0,
            _ => self.bad.push(BlockRange::new(start, count)),
        }
    }
}
