//! Disks that join the pool and leave it.

use super::{Disk, DiskChange, Disks};
use crate::layout::{BLOCK, SUPERBLOCKS};
use crate::store::Store;
use crate::superblock::Superblock;
use crate::{Member, MemberState, OpenError, Output, PoolIdentity, StoreRequestId};
use pollux_base::unit::bytes_text;
use pollux_base::{ByteCount, Data, DiskDone, DiskId, DiskIndex, DiskOp, DiskOpId, DiskOpKind};
use std::collections::VecDeque;

/// A disk that is being formatted for the pool, or taken out of it. Its life as a new one: looked at -> formatted -> opened -> all
/// others know it. As one that leaves: all others have forgotten it -> nothing is under way on it -> erased.
pub struct Joining {
    id: StoreRequestId,
    member: DiskId,
    /// None of a disk that failed.
    disk: Option<DiskIndex>,
    /// What is done to it before anything else, one after the other.
    ops: VecDeque<DiskOp>,
    under_way: Option<DiskOpId>,
    step: Step,
}

/// What is to join.
struct New {
    size: ByteCount,
    path: String,
    may_overwrite: bool,
}

enum Step {
    /// What is on it is read.
    Looking(New),
    /// What went straight through to the only disk ends. Until now nobody asked where anything lives.
    Settling(New),
    Formatting(ByteCount),
    Opening,
    /// A move off the disk ends. `None`: then it leaves.
    Stopping(Option<MemberState>),
    /// The members' list is on its way to all disks.
    Telling,
    /// It left: what is under way on it ends.
    Emptying,
    Erasing,
}

/// What is read of a disk that is to join: boot sectors, partition tables, file systems and pools all leave something here.
const LOOKED_AT_BYTES: usize = SUPERBLOCKS[1] as usize + BLOCK;

impl Disks {
    /// Ends in `Changed`. One change at a time.
    pub fn change_disks(&mut self, id: StoreRequestId, change: DiskChange) {
        self.stalled_at = None;
        let begun = match change {
            DiskChange::LetGo { disk } => self.let_go(id, disk),
            change => self.refuses_changes().map_or(Ok(()), Err).and_then(|()| match change {
                DiskChange::Join { disk, size, path, may_overwrite } => {
                    self.begin_join(id, disk, New { size, path, may_overwrite })
                }
                DiskChange::Drain { disk } => self.begin_state(id, disk, MemberState::Draining),
                DiskChange::Undrain { disk } => self.begin_state(id, disk, MemberState::Active),
                DiskChange::Remove { disk } => self.begin_remove(id, disk),
                DiskChange::LetGo { .. } => unreachable!("matched above"),
            }),
        };
        if let Err(reason) = begun {
            self.out.push_back(Output::Changed(id, Err(reason)));
        }
        self.gather();
    }

    fn begin_join(&mut self, id: StoreRequestId, member: DiskId, new: New) -> Result<(), String> {
        let disk = DiskIndex(u8::try_from(self.disks.len()).expect("there is a number for one more"));
        // Whether it can be is told before anything waits for it.
        if let Err(reason) = self.formatting(member, &new) {
            self.out.push_back(Output::Close(disk));
            return Err(reason);
        }
        let kind = DiskOpKind::Read { offset: ByteCount(0), len: LOOKED_AT_BYTES };
        let ops = VecDeque::from([DiskOp { id: DiskOpId::new(u64::MAX), kind }]);
        self.joining = Some(Joining { id, member, disk: Some(disk), ops, under_way: None, step: Step::Looking(new) });
        self.go_on_joining();
        Ok(())
    }

    /// Whether what is on the disk may be lost.
    fn judge_content(&self, bytes: &[u8], may_overwrite: bool) -> Result<(), String> {
        let copies = SUPERBLOCKS.iter().filter_map(|at| bytes.get(*at as usize..)?.get(..BLOCK));
        let found = copies.filter_map(|block| Superblock::decode(block).ok()).next().map(|found| found.identity);
        let Some(pool) = self.first().pool() else { return Err("the pool is not open".into()) };
        let own = pool.superblock.identity.pool;
        let overwrite = "give --overwrite if that is to be lost";
        match found {
            Some(found) if found.pool != own => Err(format!(
                "it belongs to pool {} of node {} in cluster {}; if that is of no more use, erase its first 2 MiB",
                found.pool, found.node, found.cluster
            )),
            Some(found) => match pool.catalog.members.get(&found.disk).map(|member| member.state) {
                Some(MemberState::Active | MemberState::Draining) => {
                    Err(format!("it belongs to this pool already, or is a copy of its disk {}", found.disk))
                }
                Some(MemberState::Out) if !may_overwrite => {
                    Err(format!("it was disk {} of this pool and failed; {overwrite}", found.disk))
                }
                // Not yet a part of the pool when everything stopped, or not any more.
                Some(MemberState::Out) | None => Ok(()),
            },
            None if may_overwrite || bytes.iter().all(|byte| *byte == 0) => Ok(()),
            None => Err(format!("it is not empty; {overwrite}")),
        }
    }

    /// What makes a disk one that knows all that the pool knows now.
    fn formatting(&self, disk: DiskId, new: &New) -> Result<VecDeque<DiskOp>, String> {
        let Some(pool) = self.first().pool() else { return Err("the pool is not open".into()) };
        let mut catalog = pool.catalog.clone();
        if let Some(reason) = self.refuses_more(catalog.members.len()) {
            return Err(reason);
        }
        let member = Member { size: new.size, path: new.path.clone(), state: MemberState::Active, life: 1 };
        if catalog.members.insert(disk, member).is_some() {
            return Err(format!("the pool has a disk {disk} already"));
        }
        if !catalog.fits(0) {
            return Err("there is no room for another disk in the pool's catalog".into());
        }
        catalog.arriving = None;
        let identity = PoolIdentity { disk, ..pool.superblock.identity };
        let ops = Store::format_with(identity, new.size, &catalog).map_err(|error| error.to_string())?;
        Ok(ops.into())
    }

    fn known(&self, disk: DiskId) -> Result<DiskIndex, String> {
        self.member(disk).map(|(index, _)| index).ok_or_else(|| format!("the pool has no disk {disk} in use"))
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
                let (used, free) = (bytes_text(used), bytes_text(free));
                return Err(format!("it holds {used}, and the other disks have only {free} free: add a disk first"));
            }
        }
        self.disks[index.index()].is_draining = state == MemberState::Draining;
        self.begin_leaving(id, disk, Some(index), Some(state));
        Ok(())
    }

    fn begin_leaving(
        &mut self,
        id: StoreRequestId,
        member: DiskId,
        disk: Option<DiskIndex>,
        state: Option<MemberState>,
    ) {
        let step = Step::Stopping(state);
        self.joining = Some(Joining { id, member, disk, ops: VecDeque::new(), under_way: None, step });
    }

    fn begin_remove(&mut self, id: StoreRequestId, disk: DiskId) -> Result<(), String> {
        let members = self.first().pool().map(|pool| &pool.catalog.members);
        if members.and_then(|members| members.get(&disk)).is_some_and(|member| member.state == MemberState::Out) {
            self.begin_leaving(id, disk, None, None);
            return Ok(());
        }
        let index = self.known(disk)?;
        let known = &self.disks[index.index()];
        if known.columns > 0 || !known.is_draining {
            let held = bytes_text(known.store.capacity().0.saturating_sub(known.store.free().0));
            return Err(match known.is_draining {
                false => format!("it is in use and holds {held}: drain it first"),
                true => format!("{held} in {} extents are still on it: wait until it is drained", known.columns),
            });
        }
        self.begin_leaving(id, disk, Some(index), None);
        Ok(())
    }

    /// Goes on as soon as what it waits for has ended. `true`: it did.
    pub(super) fn step_joining(&mut self) -> bool {
        let is_free = self.moving.is_none() && self.changing == 0;
        let Some(joining) = self.joining.as_mut().filter(|_| is_free) else { return false };
        let member = joining.member;
        match &joining.step {
            Step::Settling(_) if self.passed == 0 => {
                self.begin_formatting();
                true
            }
            Step::Stopping(state) => {
                let state = *state;
                joining.step = Step::Telling;
                if let (None, Some(disk)) = (state, joining.disk) {
                    self.disks[disk.index()].is_in = false;
                }
                self.change_members(|members| match (state, members.get_mut(&member)) {
                    (Some(state), Some(member)) => member.state = state,
                    (None, Some(_)) => drop(members.remove(&member)),
                    (_, None) => {}
                });
                true
            }
            Step::Emptying => self.begin_erasing(),
            Step::Looking(_)
            | Step::Settling(_)
            | Step::Formatting(_)
            | Step::Opening
            | Step::Telling
            | Step::Erasing => false,
        }
    }

    /// Nobody shall take it for a part of a pool.
    fn begin_erasing(&mut self) -> bool {
        let Some(joining) = &mut self.joining else { return false };
        let idle = joining.disk.is_some_and(|disk| self.disks[disk.index()].store.is_idle());
        if idle {
            let zeros = |(offset, number): (u64, u64)| {
                let kind = DiskOpKind::Write { offset: ByteCount(offset), data: vec![Data::zeroed(BLOCK)], sync: true };
                DiskOp { id: DiskOpId::new(u64::MAX - number), kind }
            };
            joining.ops = SUPERBLOCKS.into_iter().zip(1..).map(zeros).collect();
            joining.step = Step::Erasing;
            self.go_on_joining();
        }
        idle
    }

    fn begin_formatting(&mut self) {
        if self.is_alone() {
            let columns = self.disks[0].store.pool().map(|pool| pool.columns()).unwrap_or_default();
            columns.into_iter().for_each(|column| self.settle_in(column, DiskIndex(0)));
            self.disks[0].ended += 1;
        }
        let Some(Joining { member, step: Step::Settling(new), .. }) = &self.joining else { return };
        let size = new.size;
        match (self.formatting(*member, new), &mut self.joining) {
            (Ok(ops), Some(joining)) => {
                (joining.ops, joining.step) = (ops, Step::Formatting(size));
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
        let may_overwrite = match &joining.step {
            Step::Looking(new) => Some(new.may_overwrite),
            _ => None,
        };
        let judged = match (&done.result, may_overwrite) {
            (Ok(found), Some(may_overwrite)) => {
                self.judge_content(found.as_ref().map_or(&[][..], Data::as_slice), may_overwrite)
            }
            (Ok(_), None) => Ok(()),
            (Err(error), _) => Err(error.to_string()),
        };
        match judged {
            Ok(()) => self.go_on_joining(),
            Err(reason) => self.end_joining(Err(reason)),
        }
        true
    }

    fn go_on_joining(&mut self) {
        let Some(joining) = &mut self.joining else { return };
        let Some(index) = joining.disk else { return };
        if let Some(mut op) = joining.ops.pop_front() {
            op.id.disk = index;
            joining.under_way = Some(op.id);
            return self.out.push_back(Output::Disk(op));
        }
        joining.step = match std::mem::replace(&mut joining.step, Step::Opening) {
            Step::Looking(new) => Step::Settling(new),
            Step::Formatting(size) => {
                let mut disk = Disk::new(Store::open(self.cluster, self.node, size), joining.member);
                disk.is_in = false;
                self.disks.push(disk);
                Step::Opening
            }
            Step::Erasing => return self.end_joining(Ok(())),
            step => step,
        };
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
        let left = joining.disk.filter(|disk| !self.disks[disk.index()].is_in);
        match left {
            Some(_) => joining.step = Step::Emptying,
            None => self.end_joining(Ok(())),
        }
    }

    /// Whether what is asked may go straight through to the only disk.
    pub(super) fn lets_through(&self) -> bool {
        self.joining.as_ref().is_none_or(|joining| matches!(joining.step, Step::Looking(_)))
    }

    /// Whether all requests wait for those that went straight through.
    pub(super) fn is_settling(&self) -> bool {
        self.joining.as_ref().is_some_and(|joining| matches!(joining.step, Step::Settling(_)))
    }

    pub(super) fn end_joining(&mut self, result: Result<(), String>) {
        let Some(joining) = self.joining.take() else { return };
        if let Some(disk) = joining.disk
            && self.member(joining.member).is_none_or(|(index, _)| index != disk)
        {
            self.out.push_back(Output::Close(disk));
        }
        self.out.push_back(Output::Changed(joining.id, result));
    }
}
