//! Somebody who rolls VMs back, clones volumes of snapshots and lets disks grow while things fail.

use crate::history::{Seen, Value};
use crate::operator::vm_name;
use crate::peek::Peek;
use crate::time::Time;
use crate::world::World;
use pollux_base::record::Rollback;
use pollux_base::unit::EXTENT_BYTES;
use pollux_base::{ByteCount, GroupId, NodeId, SnapshotId, Stamp, VolumeId};
use pollux_cluster::Change;
use pollux_cluster::entry::VmPhase;
use pollux_cluster::state::Owner;
use std::collections::BTreeMap;
use std::time::Duration;

/// There are so many clones at most.
const CLONES_KEPT: usize = 2;
/// No disk grows beyond this: the pool has room for what there is.
const VOLUME_BYTES_MAX: u64 = 12 * EXTENT_BYTES;
/// A VM that is to be rolled back is kept down so long at most: everything may be failing.
const DOWN_MAX: Duration = Duration::from_secs(4);

/// A VM that is stopped to be rolled back.
#[derive(Clone, Copy, Debug)]
pub struct Rolling {
    vm: usize,
    until: Time,
}

/// What is known of copies.
#[derive(Default)]
pub struct Copies {
    rolling: Option<Rolling>,
    /// The newest rollback of each group.
    rolled: BTreeMap<GroupId, Rollback>,
    /// Volumes that were made as copies: of which volume their bytes tell, and what they hold.
    clones: BTreeMap<VolumeId, Copied>,
}

#[derive(Clone, Debug)]
pub struct Copied {
    pub of: VolumeId,
    pub values: Values,
}

pub type Values = BTreeMap<u64, Value>;

impl Copies {
    /// Whether the group went back by a later record than this.
    pub fn went_back_since(&self, group: GroupId, record: Stamp) -> bool {
        self.rolled.get(&group).is_some_and(|rollback| rollback.at > record)
    }
}

impl World {
    /// Now and then asks this node for one of them.
    pub fn operate_copies(&mut self, id: NodeId) {
        if self.settings.copies && !self.quiet && !self.healed && self.settings.snapshots {
            match self.luck.below(8) {
                0 if self.settings.clones => self.ask_clone(id),
                1 => self.ask_growth(id),
                2 => self.begin_rolling(),
                _ => {}
            }
        }
        self.go_on_rolling(id);
    }

    fn ask_clone(&mut self, id: NodeId) {
        let Some(noded) = &self.nodes[&id].noded else { return };
        let state = noded.core.state();
        let clones: Vec<VolumeId> = state
            .groups
            .values()
            .filter_map(|group| if let Owner::Volume(id) = group.owner { Some(id) } else { None })
            .collect();
        if clones.len() >= CLONES_KEPT {
            let volume = clones[self.luck.below(clones.len() as u64) as usize];
            return self.ask(id, Change::DeleteVolume { volume });
        }
        let frozen: Vec<VolumeId> =
            state.volumes.iter().filter(|(_, volume)| volume.snapshot.is_some()).map(|(id, _)| *id).collect();
        if !frozen.is_empty() {
            let of = frozen[self.luck.below(frozen.len() as u64) as usize];
            let name = format!("clone{}", self.number());
            self.ask(id, Change::CloneVolume { of, name });
        }
    }

    fn ask_growth(&mut self, id: NodeId) {
        let Some(noded) = &self.nodes[&id].noded else { return };
        let vms = noded.core.state().vms.values().flat_map(|vm| vm.volumes.iter().zip(&vm.spec.disks));
        let disks: Vec<(VolumeId, u64)> = vms.map(|(volume, size)| (*volume, size.0)).collect();
        if disks.is_empty() {
            return;
        }
        let (volume, size) = disks[self.luck.below(disks.len() as u64) as usize];
        let size = size + (1 + self.luck.below(1500)) * 4096;
        if size <= VOLUME_BYTES_MAX {
            self.ask(id, Change::ResizeVolume { volume, size: ByteCount(size) });
        }
    }

    fn begin_rolling(&mut self) {
        if self.copies.rolling.is_none() {
            let vm = self.luck.below(self.settings.vms.len() as u64) as usize;
            self.copies.rolling = Some(Rolling { vm, until: self.now + DOWN_MAX });
            self.operator.wanted[vm] = false;
        }
    }

    /// Asks for the rollback once the VM is stopped; it is started when that has come, or when it takes too long.
    fn go_on_rolling(&mut self, id: NodeId) {
        let Some(rolling) = self.copies.rolling else { return };
        if self.now >= rolling.until || self.healed {
            self.copies.rolling = None;
            self.operator.wanted[rolling.vm] = true;
            return;
        }
        let Some(noded) = &self.nodes[&id].noded else { return };
        let state = noded.core.state();
        let Some((_, vm)) = state.vm_named(&vm_name(rolling.vm)).filter(|(_, vm)| vm.phase == VmPhase::Stopped) else {
            return;
        };
        let Some(group) = state.groups.get(&vm.group) else { return };
        let taken: Vec<SnapshotId> = group.snapshots.taken().map(|(id, _)| id).collect();
        if !taken.is_empty() && self.luck.one_in(2) {
            let snapshot = taken[self.luck.below(taken.len() as u64) as usize];
            self.ask(id, Change::RollBack { snapshot });
        }
    }

    /// Takes note of what this node's state says of rollbacks and clones: each is told once, with what it must lead to.
    pub fn look_for_copies(&mut self, id: NodeId) {
        let Some(noded) = &self.nodes[&id].noded else { return };
        let state = noded.core.state();
        let rolled: Vec<(GroupId, Rollback)> = state
            .groups
            .iter()
            .filter_map(|(group, found)| Some((*group, found.snapshots.rollback.clone()?)))
            .filter(|(group, rollback)| self.copies.rolled.get(group).is_none_or(|known| known.at < rollback.at))
            .collect();
        let origins = state.groups.values().flat_map(|group| group.snapshots.origins.iter());
        let born: Vec<(VolumeId, VolumeId)> =
            origins.map(|(copy, of)| (*copy, *of)).filter(|(copy, _)| !self.copies.clones.contains_key(copy)).collect();
        for (group, rollback) in rolled {
            let mut values = BTreeMap::new();
            for (volume, frozen) in &rollback.to {
                let Some(found) = self.held_by_all(*frozen, *volume) else {
                    let text = format!("{group} goes back to {frozen}, which no replica in sync holds");
                    return self.fail("snapshots_are_one_point", text);
                };
                values.extend(found.into_iter().map(|(block, value)| ((*volume, block), value)));
            }
            let volumes = rollback.to.keys().copied().collect();
            self.copies.rolled.insert(group, rollback);
            self.counts.rollbacks += 1;
            let rollback = self.number();
            self.see(Seen::RolledBack { rollback, group, volumes, values });
            // A VM that is back where it was may be started.
            if let Some(rolling) = self.copies.rolling.take() {
                self.operator.wanted[rolling.vm] = true;
            }
        }
        for (copy, frozen) in born {
            let of = self.told_by(frozen);
            if let Some(values) = self.held_by_all(frozen, of) {
                self.counts.clones += 1;
                self.copies.clones.insert(copy, Copied { of, values });
            }
        }
    }

    /// What a volume of a snapshot holds, by the first replica in sync that has it.
    fn held_by_all(&mut self, frozen: VolumeId, of: VolumeId) -> Option<Values> {
        let group = self.group_of(frozen)?;
        let members: Vec<NodeId> = self.newest.get(&group)?.in_sync.iter().copied().collect();
        for node in members {
            let Ok(mut peek) = Peek::open(&self.nodes[&node].disks, node) else { continue };
            if !peek.known(frozen) {
                continue;
            }
            match peek.contents(frozen, of, self.cipher_of(of).as_deref(), false) {
                Ok(blocks) => return Some(blocks.into_iter().map(|(block, (value, _))| (block, value)).collect()),
                Err(text) => self.trace.line(self.now, || format!("{node}: {text}")),
            }
        }
        None
    }

    /// Of which volume the bytes of a clone tell, or of a snapshot.
    pub fn told_by(&self, volume: VolumeId) -> VolumeId {
        let origin = self.origin_of(volume);
        self.copies.clones.get(&origin).map_or(origin, |copied| copied.of)
    }

    /// All is healed and quiet: nobody wrote to a clone, so each replica of it holds what the snapshot held.
    pub fn look_at_clone(&mut self, node: NodeId, volume: VolumeId, found: Values) {
        if let Some(copied) = self.copies.clones.get(&volume).filter(|_| !self.rotted) {
            let expected = copied.values.clone();
            self.see(Seen::Clone { node, volume, expected, found });
        }
    }
}
