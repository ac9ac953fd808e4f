//! Disks that join the pool and leave it.

use super::{Disk, DiskChange, Disks};
use crate::layout::SUPERBLOCKS;
use crate::store::Store;
use crate::{Member, MemberState, OpenError, Output, PoolIdentity, StoreRequestId};
use pollux_base::unit::BLOCK_BYTES;
use pollux_base::{ByteCount, Data, DiskDone, DiskId, DiskIndex, DiskOp, DiskOpId, DiskOpKind};
use std::collections::VecDeque;

/// A disk that is being formatted for the pool, or taken out of it. Its life as a new one: formatted -> opened -> all
/// others know it.
pub struct Joining {
    id: StoreRequestId,
    disk: DiskIndex,
    /// What is done to it before anything else, one after the other.
    ops: VecDeque<DiskOp>,
    under_way: Option<DiskOpId>,
    step: Step,
}

enum Step {
    /// What went straight through to the only disk ends. Until now nobody asked where anything lives.
    Settling {
        id: DiskId,
        size: ByteCount,
        path: String,
    },
    Formatting {
        id: DiskId,
        size: ByteCount,
    },
    Opening,
    /// A move off the disk ends.
    Stopping(MemberState),
    /// The members' list is on its way to all disks.
    Telling,
    Erasing,
}

impl Disks {
    /// Ends in `Changed`. One change at a time.
    pub fn change_disks(&mut self, id: StoreRequestId, change: DiskChange) {
        self.stalled_at = None;
        if self.joining.is_some() || self.changing > 0 || self.is_turning || !self.is_open {
            let reason = "another change is under way; try again".to_owned();
            return self.out.push_back(Output::Changed(id, Err(reason)));
        }
        if let Some(reason) = self.failed.clone() {
            return self.out.push_back(Output::Changed(id, Err(reason)));
        }
        let begun = match change {
            DiskChange::Join { disk, size, path } => self.begin_join(id, disk, size, path),
            DiskChange::Drain { disk } => self.begin_state(id, disk, MemberState::Draining),
            DiskChange::Undrain { disk } => self.begin_state(id, disk, MemberState::Active),
            DiskChange::Remove { disk } => self.begin_remove(id, disk),
        };
        if let Err(reason) = begun {
            self.out.push_back(Output::Changed(id, Err(reason)));
        }
        self.gather();
    }

    fn begin_join(&mut self, id: StoreRequestId, disk: DiskId, size: ByteCount, path: String) -> Result<(), String> {
        // Whether it can be is told before anything waits for it.
        self.formatting(disk, size, &path)?;
        let step = Step::Settling { id: disk, size, path };
        let index = self.next_disk();
        self.joining = Some(Joining { id, disk: index, ops: VecDeque::new(), under_way: None, step });
        Ok(())
    }

    /// What makes a disk one that knows all that the pool knows now.
    fn formatting(&self, disk: DiskId, size: ByteCount, path: &str) -> Result<VecDeque<DiskOp>, String> {
        let Some(pool) = self.first().pool() else { return Err("the pool is not open".into()) };
        let mut catalog = pool.catalog.clone();
        if catalog.members.len() >= super::DISKS_MAX {
            return Err(format!("a pool has at most {} disks, those that left it included", super::DISKS_MAX));
        }
        let member = Member { size, path: path.to_owned(), state: MemberState::Active, life: 1 };
        if catalog.members.insert(disk, member).is_some() {
            return Err(format!("the pool has a disk {disk} already"));
        }
        if !catalog.fits(0) {
            return Err("there is no room for another disk in the pool's catalog".into());
        }
        catalog.arriving = None;
        let identity = PoolIdentity { disk, ..pool.superblock.identity };
        let ops = Store::format_with(identity, size, &catalog).map_err(|error| error.to_string())?;
        Ok(ops.into())
    }

    fn known(&self, disk: DiskId) -> Result<DiskIndex, String> {
        let found = self.members().find(|(_, known)| known.id == disk).map(|(index, _)| index);
        found.ok_or_else(|| format!("the pool has no disk {disk}"))
    }

    fn begin_state(&mut self, id: StoreRequestId, disk: DiskId, state: MemberState) -> Result<(), String> {
        let index = self.known(disk)?;
        if state == MemberState::Draining {
            let others = self.members().filter(|(other, known)| *other != index && !known.is_draining);
            let others: Vec<u64> = others.map(|(_, known)| known.store.free().0).collect();
            if others.is_empty() {
                return Err("it is the only disk that is left to the pool".into());
            }
            let free: u64 = others.iter().sum();
            let known = &self.disks[index.index()].store;
            let used = known.capacity().0.saturating_sub(known.free().0);
            if free < used {
                let (used, free) = (ByteCount(used), ByteCount(free));
                return Err(format!("it holds {used}, and the other disks have {free} free: add a disk first"));
            }
        }
        self.disks[index.index()].is_draining = state == MemberState::Draining;
        let step = Step::Stopping(state);
        self.joining = Some(Joining { id, disk: index, ops: VecDeque::new(), under_way: None, step });
        Ok(())
    }

    fn begin_remove(&mut self, id: StoreRequestId, disk: DiskId) -> Result<(), String> {
        let index = self.known(disk)?;
        let known = &self.disks[index.index()];
        if !known.is_draining {
            return Err("drain it first".into());
        }
        if known.columns > 0 || self.moving.is_some() {
            return Err(format!("{} extents of 4 MiB are still on it", known.columns));
        }
        self.disks[index.index()].is_in = false;
        let step = Step::Stopping(MemberState::Out);
        self.joining = Some(Joining { id, disk: index, ops: VecDeque::new(), under_way: None, step });
        Ok(())
    }

    /// Tells all disks of a new state as soon as no move is under way. `true`: it did.
    pub(super) fn step_joining(&mut self) -> bool {
        let is_free = self.moving.is_none() && self.changing == 0;
        let Some(joining) = self.joining.as_mut().filter(|_| is_free) else { return false };
        let state = match &joining.step {
            Step::Settling { id, size, path } if self.passed == 0 => {
                let (id, size, path) = (*id, *size, path.clone());
                self.begin_formatting(id, size, &path);
                return true;
            }
            Step::Stopping(state) => *state,
            Step::Settling { .. } | Step::Formatting { .. } | Step::Opening | Step::Telling | Step::Erasing => {
                return false;
            }
        };
        let Some(joining) = &mut self.joining else { return false };
        joining.step = Step::Telling;
        let disk = self.disks[joining.disk.index()].id;
        self.change_members(|members| {
            if let Some(member) = members.get_mut(&disk) {
                member.state = state;
            }
        });
        true
    }

    fn begin_formatting(&mut self, id: DiskId, size: ByteCount, path: &str) {
        if self.is_alone() {
            let columns = self.disks[0].store.pool().map(|pool| pool.columns()).unwrap_or_default();
            columns.into_iter().for_each(|column| self.settle_in(column, DiskIndex(0)));
            self.disks[0].ended += 1;
        }
        match (self.formatting(id, size, path), &mut self.joining) {
            (Ok(ops), Some(joining)) => {
                (joining.ops, joining.step) = (ops, Step::Formatting { id, size });
                self.go_on_joining();
            }
            (Err(reason), _) => self.end_joining(Err(reason)),
            (Ok(_), None) => {}
        }
    }

    /// Whether it was an operation on a disk that is not a part of the pool yet, or any more.
    pub(super) fn joining_takes(&mut self, done: &DiskDone) -> bool {
        let Some(joining) = self.joining.as_mut().filter(|joining| joining.under_way == Some(done.id)) else {
            return false;
        };
        joining.under_way = None;
        match &done.result {
            Ok(_) => self.go_on_joining(),
            Err(error) => self.end_joining(Err(error.to_string())),
        }
        true
    }

    fn go_on_joining(&mut self) {
        let Some(joining) = &mut self.joining else { return };
        if let Some(mut op) = joining.ops.pop_front() {
            op.id.disk = joining.disk;
            joining.under_way = Some(op.id);
            return self.out.push_back(Output::Disk(op));
        }
        match joining.step {
            Step::Formatting { id, size } => {
                joining.step = Step::Opening;
                let mut disk = Disk::new(Store::open(self.cluster, self.node, size), id);
                disk.is_in = false;
                self.disks.push(disk);
            }
            Step::Erasing => self.end_joining(Ok(())),
            Step::Settling { .. } | Step::Opening | Step::Stopping(_) | Step::Telling => {}
        }
    }

    /// The new disk is open: all are told of it.
    pub(super) fn on_joined(&mut self, disk: DiskIndex, result: Result<(), OpenError>) {
        if let Err(error) = result {
            return self.end_joining(Err(error.to_string()));
        }
        let joined = self.disks[disk.index()].store.pool();
        let mut members = joined.map(|pool| pool.catalog.members.clone()).unwrap_or_default();
        self.note_lives(&mut members);
        self.disks[disk.index()].is_in = true;
        if let Some(joining) = &mut self.joining {
            joining.step = Step::Telling;
        }
        self.put_members(members);
    }

    /// A list of members is on all disks.
    pub(super) fn on_members_put(&mut self) {
        if self.changing > 0 {
            return;
        }
        let Some(joining) = self.joining.as_mut().filter(|joining| matches!(joining.step, Step::Telling)) else {
            return;
        };
        let index = joining.disk;
        if self.disks[index.index()].is_in {
            return self.end_joining(Ok(()));
        }
        // It left: nobody shall take it for a part of a pool.
        let zeros = |(offset, number): (u64, u64)| {
            let kind = DiskOpKind::Write {
                offset: ByteCount(offset),
                data: vec![Data::zeroed(BLOCK_BYTES as usize)],
                sync: true,
            };
            DiskOp { id: DiskOpId::new(u64::MAX - number), kind }
        };
        joining.ops = SUPERBLOCKS.into_iter().zip(1..).map(zeros).collect();
        joining.step = Step::Erasing;
        self.go_on_joining();
    }

    /// Whether all requests wait for those that went straight through.
    pub(super) fn is_settling(&self) -> bool {
        self.joining.as_ref().is_some_and(|joining| matches!(joining.step, Step::Settling { .. }))
    }

    pub(super) fn end_joining(&mut self, result: Result<(), String>) {
        if let Some(joining) = self.joining.take() {
            self.out.push_back(Output::Changed(joining.id, result));
        }
    }
}
