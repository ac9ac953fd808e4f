//! Somebody who gives disks to pools and takes them back while things fail.

use crate::node::{Input, PROCESSES, Process};
use crate::sabotage::Sabotage;
use crate::world::{CLUSTER, POOL_BYTES, World};
use pollux_base::pool::{DiskReport, DiskState};
use pollux_base::{ByteCount, DiskId, DiskIndex, NodeId, PoolId};
use pollux_store::faulty_disk::FaultyDisk;
use pollux_store::{DiskChange, Disks, PoolIdentity};
use std::collections::BTreeSet;
use std::time::Duration;

/// A pool has so many at most.
const DISKS_KEPT: usize = 3;
/// A supervisor would take longer; the daemon itself opens its pool anew.
const REOPENS_AFTER: Duration = Duration::from_millis(20);

/// Formatted disks of a new pool.
pub fn new_pool(node: NodeId, seeds: &[u64]) -> Vec<FaultyDisk> {
    let identity = PoolIdentity { cluster: CLUSTER, node, pool: PoolId(u128::from(node.0)), disk: DiskId(0) };
    let members: Vec<(DiskId, ByteCount, String)> =
        (1..=seeds.len() as u128).map(|number| (DiskId(number), ByteCount(POOL_BYTES), String::new())).collect();
    let ops = Disks::format(identity, &members).expect("the pool's size is fine");
    let format = |(seed, ops): (&u64, Vec<_>)| {
        let mut disk = FaultyDisk::new(POOL_BYTES, *seed);
        for op in ops {
            disk.submit(op);
            disk.complete_all();
        }
        disk
    };
    seeds.iter().zip(ops).map(format).collect()
}

impl World {
    /// A disk joins, is drained, used again or removed, whichever comes next.
    pub fn change_disks(&mut self, node: NodeId) {
        let (draw, choice) = (self.luck.below(4), self.luck.draw());
        let lies = self.settings.sabotage == Some(Sabotage::DiskLies);
        // A disk that is about to fail as the only one fails with the whole replica; as one of two it would be lost by itself, with
        // nobody there who has what was on it (`may_lose_a_disk`).
        if self.nodes[&node].disk_failed {
            return;
        }
        let Some(life) = self.nodes[&node].life(Process::Blockd) else { return };
        let Some(running) = &self.nodes[&node].blockd else { return };
        let store = running.core.plane.store();
        let Some(DiskIndex(next)) = store.next_disk() else { return };
        let known = store.disks();
        let used: Vec<&DiskReport> = known.iter().filter(|disk| disk.state != DiskState::Failed).collect();
        let change = match known.iter().find(|disk| disk.state == DiskState::Failed) {
            Some(failed) if draw == 0 => DiskChange::Remove { disk: failed.disk },
            _ if used.len() < DISKS_KEPT && draw < 2 => {
                let disk = DiskId(u128::from(self.number()) << 32);
                let mut new = FaultyDisk::new(POOL_BYTES, choice);
                if lies {
                    new.ignore_flushes();
                }
                let disks = &mut self.node(node).disks;
                // One that was there did not join.
                disks.truncate(usize::from(next));
                disks.push(new);
                DiskChange::Join { disk, size: ByteCount(POOL_BYTES), path: String::new(), may_overwrite: false }
            }
            _ => {
                let DiskReport { disk, state, .. } = *used[(choice % used.len() as u64) as usize];
                match state {
                    DiskState::Healthy => DiskChange::Drain { disk },
                    DiskState::Drained => DiskChange::Remove { disk },
                    DiskState::Draining | DiskState::Failed | DiskState::Missing => DiskChange::Undrain { disk },
                }
            }
        };
        self.trace.line(self.now, || format!("{node} {change:?}"));
        let id = self.number();
        self.counts.disk_changes += 1;
        self.give(node, Process::Blockd, life, Input::Blockd(pollux_replica::Input::DiskChange { id, change }));
    }

    /// Whether a disk of the node may be lost for good: the other node must have everything, and be there to say so.
    pub fn may_lose_a_disk(&self, node: NodeId) -> bool {
        let is_there = |peer: &NodeId| PROCESSES.iter().all(|process| self.nodes[peer].is_active(*process));
        self.nodes[&node].disks.len() == 1
            || (self.peers(node).iter().all(is_there) && self.newest.values().all(|record| record.in_sync.len() > 1))
    }

    /// A disk that was to fail and may not be lost any more does not.
    pub fn spare_last_disks(&mut self, in_sync: &BTreeSet<NodeId>) {
        for node in in_sync.iter().filter(|_| in_sync.len() == 1) {
            let found = self.node(*node);
            if found.disks.len() > 1 {
                found.disks.iter_mut().for_each(FaultyDisk::fail_none);
            }
        }
    }

    /// A pool that lost a disk is opened anew without it.
    pub fn reopen_if_wanted(&mut self, node: NodeId) {
        let wants = |running: &crate::node::Running<crate::node::Blockd>| running.core.plane.store().wants_reopening();
        if self.nodes[&node].blockd.as_ref().is_some_and(wants) {
            self.trace.line(self.now, || format!("{node} goes on without a disk"));
            self.counts.disks_lost += 1;
            self.kill(node, Process::Blockd, REOPENS_AFTER);
        }
    }
}
