//! Several disks: are these all the disks of one pool, each in its latest state? The same questions as an opening asks, but
//! all of them answered.

use super::Findings;
use super::code::Code;
use super::inspect::Inspected;
use crate::catalog::{Catalog, MemberState};
use crate::lanes::FamilyId;
use pollux_base::{DiskId, ExtentIndex, PoolId};
use std::collections::{BTreeMap, BTreeSet};

/// The catalog that has the most changes: of several the first.
pub fn ahead(disks: &[Option<Inspected>]) -> Option<&Catalog> {
    disks.iter().flatten().rev().map(|disk| &disk.found.catalog).max_by_key(|catalog| catalog.changes)
}

/// Disks of the pool that are not among these.
pub fn missing(disks: &[Option<Inspected>]) -> Vec<(DiskId, String)> {
    let there: BTreeSet<DiskId> = disks.iter().flatten().map(|disk| disk.superblock.identity.disk).collect();
    let members = ahead(disks).into_iter().flat_map(|catalog| &catalog.members);
    members
        .filter(|(id, member)| member.state != MemberState::Out && !there.contains(id))
        .map(|(id, member)| (*id, member.path.clone()))
        .collect()
}

pub fn check(disks: &[Option<Inspected>], findings: &mut Findings) {
    let mut seen: BTreeMap<DiskId, usize> = BTreeMap::new();
    let mut pool: Option<PoolId> = None;
    let members = ahead(disks).map(|catalog| catalog.members.clone()).unwrap_or_default();
    for (number, disk) in disks.iter().enumerate() {
        let Some(disk) = disk else { continue };
        findings.disk = Some(number);
        let identity = disk.superblock.identity;
        if let Some(other) = seen.insert(identity.disk, number) {
            findings.add(Code::DiskForeign, format!("it is the same disk as number {other}: one of them is a copy"));
        }
        let expected = *pool.get_or_insert(identity.pool);
        if identity.pool != expected {
            let text = format!("it belongs to pool {}, the first one to {expected}", identity.pool);
            findings.add(Code::DiskForeign, text);
            continue;
        }
        let member = members.get(&identity.disk);
        if member.is_some_and(|member| member.state == MemberState::Out) {
            findings.add(Code::DiskForeign, "it is no longer a part of the pool");
        }
        let life = disk.found.anchor.life;
        if let Some(expected) = member.map(|member| member.life).filter(|expected| life < *expected) {
            let text = format!("it was opened {life} times, the others remember {expected}");
            findings.add(Code::DiskOld, text);
        }
    }
    findings.disk = None;
    for (id, path) in missing(disks) {
        findings.add(Code::DiskMissing, format!("disk {id} is missing; it was last seen at {path:?}"));
    }
    let mut homes: BTreeMap<(FamilyId, ExtentIndex), usize> = BTreeMap::new();
    for (number, disk) in disks.iter().enumerate() {
        let Some(disk) = disk else { continue };
        findings.disk = Some(number);
        let family = |layer| disk.found.catalog.layers.get(layer).map(|known: &crate::catalog::Layer| known.family);
        let columns: BTreeSet<(FamilyId, ExtentIndex)> =
            disk.owners.keys().filter_map(|(layer, extent)| Some((family(layer)?, *extent))).collect();
        for column in columns {
            if let Some(other) = homes.insert(column, number) {
                let text = format!("extent {} of family {} is on disk number {other}, too", column.1.0, column.0.0);
                findings.add(Code::ColumnTwice, text);
            }
        }
    }
    findings.disk = None;
}
