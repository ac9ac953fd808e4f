//! How far a pool has come: what never falls, so that an image of an earlier day is known for what it is.

use super::Disks;
use crate::MemberState;
use crate::pool::Pool;
use pollux_base::{DiskId, PoolId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// What of a disk survives a power cut: changes of its catalog, and the blocks of its journal. Never falls, over all
/// openings; of the two the first counts more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Position {
    pub changes: u64,
    pub journal: u64,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "change {}, journal block {}", self.changes, self.journal)
    }
}

impl Disks {
    /// Where each disk is.
    pub fn positions(&self) -> BTreeMap<DiskId, Position> {
        self.pools().map(|pool| (pool.superblock.identity.disk, now(pool))).collect()
    }

    /// Changes of the catalog so far: with another number there may be other volumes. None before it is open.
    pub fn catalog_changes(&self) -> Option<u64> {
        self.first().pool().map(|pool| pool.catalog.changes)
    }

    /// Where the pool is: the disk with the lowest id stands for all, because they are opened together. Which disks there are
    /// changes only with the catalog, so this never falls either.
    pub fn position(&self) -> Option<(PoolId, DiskId, Position)> {
        self.position_by(now)
    }

    /// Where it was before this opening.
    pub fn position_found(&self) -> Option<(PoolId, DiskId, Position)> {
        self.position_by(|pool| pool.found_at)
    }

    fn position_by(&self, of: impl Fn(&Pool) -> Position) -> Option<(PoolId, DiskId, Position)> {
        let ahead = self.pools().max_by_key(|pool| pool.catalog.changes)?;
        let mut members = ahead.catalog.members.iter().filter(|(_, member)| member.state != MemberState::Out);
        let (first, _) = members.next()?;
        let pool = self.pools().find(|pool| pool.superblock.identity.disk == *first)?;
        let changes = self.pools().map(|pool| of(pool).changes).max()?;
        Some((pool.pool_id(), *first, Position { changes, ..of(pool) }))
    }

    fn pools(&self) -> impl Iterator<Item = &Pool> {
        self.members().filter_map(|(_, disk)| disk.store.pool())
    }
}

fn now(pool: &Pool) -> Position {
    Position { changes: pool.catalog.changes, journal: pool.journal.durable() }
}
