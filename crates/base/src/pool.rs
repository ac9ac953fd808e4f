//! How a node's pool is doing: what it holds, how fast it fills, and when that is worth a warning.
//!
//! Volumes are thin and may be promised more than there is (over-commit). That is safe as long as people hear in time that
//! space runs out, so the levels are set here, once, for alerts, headline, API and tables.

use crate::id::{DiskId, GroupId, VolumeId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Less free than this share of the pool is `Low`: on common pools days of growth.
const LOW_PERCENT: u64 = 20;
/// Less than this is `Scarce`.
const SCARCE_PERCENT: u64 = 8;
/// A pool that is full sooner than this at its present rate is `Low`: within a working day somebody can act.
const LOW_S: u64 = 24 * 3600;
/// Sooner than this it is `Scarce`.
const SCARCE_S: u64 = 3600;

/// A node's pool as its data plane reports it. Sizes are of what volumes can take: metadata is not counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolReport {
    pub size_bytes: u64,
    pub free_bytes: u64,
    /// Sizes of all volumes with a replica here: what they would take if they were filled.
    pub promised_bytes: u64,
    /// Bytes per second by which free space has been shrinking over the last minutes; 0 when it does not.
    pub growth_bytes_per_s: u64,
    /// Writes wait here for space.
    pub is_full: bool,
    /// Blocks that did not match their checksums and were healed from a peer, since the data plane started.
    pub healed_blocks: u64,
    /// Why the pool can not be used.
    pub failed: Option<String>,
    #[serde(default)]
    pub disks: Vec<DiskReport>,
    /// States of replicas that are kept here; the first some hundred.
    #[serde(default)]
    pub kept: Vec<KeptReport>,
}

/// A state of a volume's replica that a node keeps for itself alone (`Kept`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptReport {
    /// The volume that holds it.
    pub volume: VolumeId,
    pub group: GroupId,
    pub size_bytes: u64,
}

/// How far a verification of a pool in use has come, and what it has found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyReport {
    /// As it was ordered.
    pub id: u64,
    pub is_done: bool,
    /// Why it was given up.
    pub failed: Option<String>,
    /// Of all disks, in thousandths.
    pub permille: u32,
    /// Of each code the first few.
    pub findings: Vec<VerifyFinding>,
    /// How many there are of each code.
    pub counts: BTreeMap<String, u64>,
    pub disks: u64,
    pub volumes: u64,
    pub extents: u64,
}

/// Something that is wrong with a pool's metadata. The codes are those of `docs/operating/pools.md`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyFinding {
    pub code: String,
    /// Something is lost, or contradicts itself; else of two copies one is gone.
    pub is_error: bool,
    /// Where the disk was found.
    pub disk: String,
    pub what: String,
    pub fix: String,
}

/// A disk of a pool as it is now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskReport {
    pub disk: DiskId,
    /// Where it was found, or was last seen.
    pub path: String,
    pub state: DiskState,
    /// The whole disk, metadata included.
    pub size_bytes: u64,
    /// What volumes can take of it, and have taken. 0 while it is not in use.
    pub capacity_bytes: u64,
    pub used_bytes: u64,
    /// Extents that live on it.
    pub extents: u64,
    /// Blocks that did not match their checksums, and reads that brought nothing, since the data plane started. Both are healed from a
    /// peer.
    pub checksum_errors: u64,
    pub io_errors: u64,
    /// Why it is out of use, or why it can not be drained further.
    pub reason: Option<String>,
}

/// What is to be done with a disk. Its life reads downwards; from `Draining` it can go back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskState {
    Healthy,
    /// Takes nothing new, and gives up what it has.
    Draining,
    /// Nothing is left on it: it can be removed.
    Drained,
    /// Out of use for good, with what was on it.
    Failed,
    /// Not found when the pool was opened: the pool waits for it.
    Missing,
}

/// How urgent the lack of space is; later words are worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PoolLevel {
    Good,
    /// Space should be found soon.
    Low,
    /// Space must be found now.
    Scarce,
    /// Writes wait. Reads work, nothing is lost, and everything goes on when there is space.
    Full,
    Failed,
}

impl PoolReport {
    /// Seconds until the pool is full at the present rate.
    pub fn full_in_s(&self) -> Option<u64> {
        self.free_bytes.checked_div(self.growth_bytes_per_s)
    }

    pub fn used_bytes(&self) -> u64 {
        self.size_bytes.saturating_sub(self.free_bytes)
    }

    pub fn level(&self) -> PoolLevel {
        let share = |percent: u64| self.free_bytes < self.size_bytes / 100 * percent;
        let soon = |seconds: u64| self.full_in_s().is_some_and(|left| left < seconds);
        match self {
            _ if self.failed.is_some() => PoolLevel::Failed,
            _ if self.is_full => PoolLevel::Full,
            _ if share(SCARCE_PERCENT) || soon(SCARCE_S) => PoolLevel::Scarce,
            _ if share(LOW_PERCENT) || soon(LOW_S) => PoolLevel::Low,
            _ => PoolLevel::Good,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_follow_what_is_free_and_how_fast_it_goes() {
        let report = |free: u64, growth, is_full| PoolReport {
            size_bytes: 1000 << 20,
            free_bytes: free << 20,
            growth_bytes_per_s: growth,
            is_full,
            ..PoolReport::default()
        };
        assert_eq!(report(500, 0, false).level(), PoolLevel::Good);
        assert_eq!(report(500, 1, false).level(), PoolLevel::Good, "full in years");
        assert_eq!(report(199, 0, false).level(), PoolLevel::Low);
        assert_eq!(report(500, 10 << 10, false).level(), PoolLevel::Low, "full in 14 hours");
        assert_eq!(report(79, 0, false).level(), PoolLevel::Scarce);
        assert_eq!(report(500, 1 << 20, false).level(), PoolLevel::Scarce, "full in 8 minutes");
        assert_eq!(report(500, 0, true).level(), PoolLevel::Full);
        let failed = PoolReport { failed: Some("it does".into()), ..report(500, 0, true) };
        assert_eq!(failed.level(), PoolLevel::Failed);
        assert_eq!(PoolReport::default().level(), PoolLevel::Good, "of nothing nothing is said");
    }
}
