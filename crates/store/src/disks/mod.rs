//! A pool of one disk or several. Each disk is a `Store` of its own, with its own journal, table and catalog, so a disk that
//! fails takes nothing of the others with it.
//!
//! An extent with all its layers, a *column*, lives on one disk, its home. Homes are not stored: what a disk has slots or
//! marks for lives there. Invariants: every disk has the same volumes, snapshots and notes, made in the same order; a
//! column has one home, or none if nothing was ever written to it.
//!
//! With one disk every request goes straight through.

mod joining;
mod lost;
mod moving;
mod opening;
mod position;
mod report;
mod requests;

use crate::catalog::Catalog;
use crate::lanes::FamilyId;
use crate::store::Store;
use crate::{
    FormatError, Input, Member, MemberState, OpenError, Output, PoolIdentity, StoreError, StoreOp, StoreReply,
    StoreRequestId,
};
use joining::Joining;
use lost::Lost;
use moving::Moving;
use opening::Opening;
use pollux_base::unit::BlockRange;
use pollux_base::{
    ByteCount, ClusterId, DiskId, DiskIndex, DiskOp, ExtentIndex, Generation, GroupId, Instant, NodeId, VolumeId,
};
pub use position::Position;
use requests::Fan;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// One extent of all layers of a family.
type Column = (FamilyId, ExtentIndex);

/// Most disks of a pool, those included that failed and were not removed.
pub const DISKS_MAX: usize = 32;

struct Disk {
    store: Store,
    id: DiskId,
    /// Where it was found; none if nobody said.
    path: Option<String>,
    /// Whether it is a part of the pool: one that left keeps its number.
    is_in: bool,
    is_draining: bool,
    /// Columns that live here.
    columns: u64,
    /// Changes that have ended, and how many of them a flush has made last.
    ended: u64,
    flushed: u64,
}

/// A change of the pool's disks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskChange {
    /// A disk joins: it is formatted. The shell has it open already, under the number that `next_disk` gave. What belongs to a pool is
    /// refused, and so is what is not blank, unless it `may_overwrite`.
    Join { disk: DiskId, size: ByteCount, path: String, may_overwrite: bool },
    /// Nothing new goes to the disk, and what it has goes to the others. Ends at once; `columns` tells how far it is.
    Drain { disk: DiskId },
    /// It may be used again.
    Undrain { disk: DiskId },
    /// A disk that is drained leaves: it is no pool's any more when this ends. One that failed is not spoken of any more.
    Remove { disk: DiskId },
    /// A disk without which the pool was not opened is let go for good, with what was on it: the pool wants to be opened anew.
    LetGo { disk: DiskId },
}

/// What waits for the end of a request of the pool's own.
enum Own {
    Moving,
    Members,
}

/// The pool of one node.
pub struct Disks {
    cluster: ClusterId,
    node: NodeId,
    disks: Vec<Disk>,
    opening: Option<Opening>,
    is_open: bool,
    /// Why the pool was not opened.
    refused: Option<OpenError>,
    /// Missing disks that the pool goes on without, from when it is opened.
    let_go: BTreeSet<DiskId>,
    out: VecDeque<Output>,
    /// Requests that were shared out, and those that the shares belong to.
    fans: BTreeMap<u64, Fan>,
    shares: BTreeMap<StoreRequestId, (u64, u32)>,
    own: BTreeMap<StoreRequestId, Own>,
    next: u64,
    homes: BTreeMap<FamilyId, BTreeMap<ExtentIndex, DiskIndex>>,
    /// Requests under way in a column.
    busy: BTreeMap<Column, u32>,
    /// Requests that must not overtake something, in order.
    held: VecDeque<(StoreRequestId, StoreOp)>,
    held_columns: BTreeSet<Column>,
    /// Changes of the catalog under way; `true`: one of them is at a point in the order of all requests.
    changing: u32,
    is_turning: bool,
    /// Requests that went straight through to the only disk and have not ended.
    passed: u64,
    joining: Option<Joining>,
    moving: Option<Moving>,
    /// Something was to be written there, and its disk had no room: it moves to one that has.
    cramped: Option<Column>,
    /// The last move did not succeed, although the other disks had so much free: it is tried again when they have more.
    stalled_at: Option<ByteCount>,
    lost: Lost,
    /// A disk failed: the pool takes no more changes until it is opened anew, without that disk.
    failed: Option<String>,
}

/// Requests of the pool's own have this bit; the caller's have not.
const OWN: u64 = 1 << 63;

impl Disks {
    /// The operations that make an empty pool of these disks, each with its id, size and path; see `Store::format`.
    pub fn format(
        identity: PoolIdentity,
        disks: &[(DiskId, ByteCount, String)],
    ) -> Result<Vec<Vec<DiskOp>>, FormatError> {
        let member = |(id, size, path): &(DiskId, ByteCount, String)| {
            (*id, Member { size: *size, path: path.clone(), state: MemberState::Active, life: 1 })
        };
        let catalog = Catalog { members: disks.iter().map(member).collect(), ..Catalog::default() };
        let ops = |(disk, size, _): &(DiskId, ByteCount, String)| {
            Store::format_with(PoolIdentity { disk: *disk, ..identity }, *size, &catalog)
        };
        disks.iter().map(ops).collect()
    }

    /// Begins to open the pool whose disks have these sizes, in the order of their numbers. As `Store::open`.
    pub fn open(cluster: ClusterId, node: NodeId, sizes: &[ByteCount]) -> Disks {
        Disks::open_seen(cluster, node, sizes, &BTreeMap::new())
    }

    /// Likewise. A disk that has not come as far as it was `seen` is refused (`OpenError::EarlierDay`) and left untouched.
    pub fn open_seen(
        cluster: ClusterId,
        node: NodeId,
        sizes: &[ByteCount],
        seen: &BTreeMap<DiskId, Position>,
    ) -> Disks {
        assert!((1..=DISKS_MAX).contains(&sizes.len()), "a pool has a disk, and not too many");
        let disk = |size: &ByteCount| Disk::new(Store::open_seen(cluster, node, *size, seen.clone()), DiskId(0));
        let mut pool = Disks {
            cluster,
            node,
            disks: sizes.iter().map(disk).collect(),
            opening: Some(Opening::default()),
            is_open: false,
            refused: None,
            let_go: BTreeSet::new(),
            out: VecDeque::new(),
            fans: BTreeMap::new(),
            shares: BTreeMap::new(),
            own: BTreeMap::new(),
            next: OWN,
            homes: BTreeMap::new(),
            busy: BTreeMap::new(),
            held: VecDeque::new(),
            held_columns: BTreeSet::new(),
            changing: 0,
            is_turning: false,
            passed: 0,
            joining: None,
            moving: None,
            cramped: None,
            stalled_at: None,
            lost: Lost::default(),
            failed: None,
        };
        pool.gather();
        pool
    }

    /// Where the disks were found, in their order: for people, who may have to look for one later.
    pub fn found_at(&mut self, paths: &[String]) {
        for (disk, path) in self.disks.iter_mut().zip(paths) {
            disk.path = Some(path.clone());
        }
    }

    pub fn handle(&mut self, now: Instant, input: Input) {
        match input {
            Input::Disk(mut done) => {
                let disk = done.id.disk;
                if !self.joining_takes(&done)
                    && let Some(known) = self.disks.get_mut(disk.index())
                {
                    // A store knows of one disk only.
                    done.id.disk = DiskIndex::default();
                    known.store.handle(now, Input::Disk(done));
                }
            }
            Input::Request(id, op) => {
                assert!(id.0 & OWN == 0, "{id:?} could be one of the pool's own");
                self.on_request(id, op);
            }
        }
        self.gather();
    }

    pub fn poll(&mut self) -> Option<Output> {
        self.out.pop_front()
    }

    /// The pool does nothing by the clock.
    pub fn deadline(&self) -> Option<Instant> {
        None
    }

    /// Whether one disk is all there is, so that its store answers for the pool.
    fn is_alone(&self) -> bool {
        self.disks.len() == 1 && self.lost.is_empty()
    }

    /// Takes up what the stores put out, until nothing follows from it.
    fn gather(&mut self) {
        loop {
            let mut anything = false;
            for index in 0..self.disks.len() {
                while let Some(output) = self.disks[index].store.poll() {
                    anything = true;
                    self.on_output(DiskIndex(index as u8), output);
                }
            }
            if !anything && !self.pump() {
                return;
            }
        }
    }

    fn on_output(&mut self, disk: DiskIndex, output: Output) {
        match output {
            Output::Disk(mut op) => {
                op.id.disk = disk;
                self.out.push_back(Output::Disk(op));
            }
            Output::Opened(result) => self.on_store_opened(disk, result),
            Output::Ended(id, result) => self.on_ended(disk, id, result),
            Output::Changed(..) | Output::Close(_) => unreachable!("a store has one disk and does not change it"),
        }
    }

    /// Goes on with what may go on. `true`: something did.
    fn pump(&mut self) -> bool {
        if !self.is_open {
            return false;
        }
        self.note_failure()
            || self.release_held()
            || self.step_moving()
            || self.step_joining()
            || self.forget_what_was_found()
    }

    fn own_id(&mut self) -> StoreRequestId {
        self.next += 1;
        StoreRequestId(self.next)
    }

    /// Asks something of one disk for the pool's own sake.
    fn ask(&mut self, disk: DiskIndex, op: StoreOp, own: Own) {
        let id = self.own_id();
        self.own.insert(id, own);
        self.send(disk, id, op);
    }

    fn send(&mut self, disk: DiskIndex, id: StoreRequestId, op: StoreOp) {
        let disk = &mut self.disks[disk.index()];
        disk.store.handle(Instant(0), Input::Request(id, op));
    }

    fn on_ended(&mut self, disk: DiskIndex, id: StoreRequestId, result: Result<StoreReply, StoreError>) {
        if let Some((fan, place)) = self.shares.remove(&id) {
            return self.on_share_ended(disk, fan, place, result);
        }
        match self.own.remove(&id) {
            Some(Own::Moving) => {
                self.disks[disk.index()].ended += 1;
                self.on_moving(result);
            }
            Some(Own::Members) => {
                self.changing -= 1;
                self.on_members_put();
            }
            None if self.opening.is_some() => self.on_adopted(disk, result),
            None => {
                self.passed -= 1;
                self.out.push_back(Output::Ended(id, result));
            }
        }
    }

    /// The disks that are a part of the pool.
    fn members(&self) -> impl Iterator<Item = (DiskIndex, &Disk)> {
        (0..).map(DiskIndex).zip(&self.disks).filter(|(_, disk)| disk.is_in)
    }

    /// Numbers and ids of the disks that are in use.
    pub fn in_use(&self) -> impl Iterator<Item = (DiskIndex, DiskId)> {
        self.members().map(|(index, disk)| (index, disk.id))
    }

    /// Any disk of the pool: they know the same of volumes and notes.
    fn first(&self) -> &Store {
        let first = self.members().next().map(|(_, disk)| &disk.store);
        first.unwrap_or(&self.disks[0].store)
    }

    fn family(&self, volume: VolumeId) -> Option<FamilyId> {
        let pool = self.first().pool()?;
        let layer = pool.layer_of(volume)?;
        pool.catalog.layers.get(&layer).map(|layer| layer.family)
    }

    /// How many blocks of the extent lie within the volume.
    fn blocks_in(&self, volume: VolumeId, extent: ExtentIndex) -> usize {
        let known = self.first().pool().and_then(|pool| pool.catalog.volumes.get(&volume));
        known.map_or(0, |known| crate::columns::within(extent, known.size).count.0 as usize)
    }

    fn home(&self, column: Column) -> Option<DiskIndex> {
        self.homes.get(&column.0)?.get(&column.1).copied()
    }

    fn home_of(&self, volume: VolumeId, extent: ExtentIndex) -> Option<&Store> {
        if self.is_alone() {
            return Some(&self.disks[0].store);
        }
        let home = self.home((self.family(volume)?, extent))?;
        Some(&self.disks[home.index()].store)
    }

    fn settle_in(&mut self, column: Column, disk: DiskIndex) {
        if let Some(before) = self.homes.entry(column.0).or_default().insert(column.1, disk) {
            self.disks[before.index()].columns -= 1;
        }
        self.disks[disk.index()].columns += 1;
    }

    /// Where a new column goes: so that all disks fill alike, and never to one that is being drained.
    fn choose(&self) -> DiskIndex {
        let usable = self.members().filter(|(_, disk)| !disk.is_draining);
        let load = |disk: &Disk| {
            let (capacity, free) = (disk.store.capacity().0.max(1), disk.store.free().0);
            // Space that columns do not use yet they may still come to use.
            let expected = disk.columns.saturating_mul(pollux_base::unit::EXTENT_BYTES);
            let full = capacity.saturating_sub(free).max(expected.min(capacity));
            (free < capacity / 64, u128::from(full) * 1_000_000 / u128::from(capacity))
        };
        usable.min_by_key(|(_, disk)| load(disk)).map_or(DiskIndex(0), |(index, _)| index)
    }

    /// How often each disk was opened is remembered by all, so that an image of an earlier day is known for what it is; and where
    /// it was found.
    fn note_lives(&self, members: &mut BTreeMap<DiskId, Member>) {
        for disk in &self.disks {
            if let Some((member, pool)) = members.get_mut(&disk.id).zip(disk.store.pool()) {
                member.life = pool.anchor.life;
                if let Some(path) = &disk.path {
                    member.path.clone_from(path);
                }
            }
        }
    }

    fn change_members(&mut self, change: impl FnOnce(&mut BTreeMap<DiskId, Member>)) {
        let Some(pool) = self.first().pool() else { return };
        let mut members = pool.catalog.members.clone();
        change(&mut members);
        self.put_members(members);
    }

    fn put_members(&mut self, members: BTreeMap<DiskId, Member>) {
        let lost = self.lost_ranges();
        let disks: Vec<DiskIndex> = self
            .members()
            .filter(|(_, disk)| members.get(&disk.id).is_some_and(|member| member.state != MemberState::Out))
            .filter(|(_, disk)| disk.store.failed().is_none())
            .map(|(index, _)| index)
            .collect();
        for disk in disks {
            self.changing += 1;
            self.ask(disk, StoreOp::PutMembers { members: members.clone(), lost: lost.clone() }, Own::Members);
        }
    }

    /// A disk has failed: it is out, durably, and what lives there is lost to this pool.
    fn note_failure(&mut self) -> bool {
        if self.failed.is_some() || self.disks.len() == 1 {
            return false;
        }
        let failed = self.members().find_map(|(index, disk)| Some((index, disk.id, disk.store.failed()?.to_owned())));
        let Some((index, id, reason)) = failed else { return false };
        self.moving = None;
        self.end_joining(Err(reason.clone()));
        self.lose_disk(index);
        self.failed = Some(format!("disk {id} failed: {reason}"));
        self.disks[index.index()].is_in = false;
        self.change_members(|members| {
            if let Some(member) = members.get_mut(&id) {
                member.state = MemberState::Out;
            }
        });
        true
    }

    /// Why the pool takes no more changes.
    pub fn failed(&self) -> Option<&str> {
        self.failed.as_deref().or_else(|| self.disks.first().filter(|_| self.disks.len() == 1)?.store.failed())
    }

    /// A disk has failed or was let go, and the others know of it: opened anew without that disk the pool is of use again.
    pub fn wants_reopening(&self) -> bool {
        self.failed.is_some() && self.changing == 0 && self.members().next().is_some()
    }

    /// Bytes of notes for which there is room on every disk.
    pub fn catalog_room(&self) -> usize {
        self.members().map(|(_, disk)| disk.store.catalog_room()).min().unwrap_or(0)
    }

    pub fn notes(&self) -> impl Iterator<Item = (GroupId, &[u8])> {
        self.first().notes()
    }

    pub fn volumes(&self) -> impl Iterator<Item = (VolumeId, GroupId, ByteCount)> {
        self.first().volumes()
    }

    pub fn is_hot(&self, volume: VolumeId, extent: ExtentIndex, generation: Generation) -> bool {
        self.home_of(volume, extent).is_some_and(|store| store.is_hot(volume, extent, generation))
    }

    /// What every store says of its own columns, and what is lost.
    fn over_all(&self, volume: VolumeId, of: impl Fn(&Store) -> Vec<ExtentIndex>) -> Vec<ExtentIndex> {
        if self.is_alone() {
            return of(&self.disks[0].store);
        }
        let mut extents: BTreeSet<ExtentIndex> = self.lost_of(volume).collect();
        let family = self.family(volume);
        for (index, disk) in self.members() {
            let at_home =
                |x: &ExtentIndex| family.and_then(|family| self.home((family, *x))).is_none_or(|at| at == index);
            extents.extend(of(&disk.store).into_iter().filter(at_home));
        }
        extents.into_iter().collect()
    }

    /// Extents that may be hot at one time, if all of them live on the smallest disk.
    pub fn hot_extents_max(&self) -> usize {
        self.members().map(|(_, disk)| disk.store.hot_extents_max()).min().unwrap_or(0)
    }

    /// Hot extents, and those that were lost with a disk: what is there may differ from what the other replicas have.
    pub fn hot(&self, volume: VolumeId) -> Vec<ExtentIndex> {
        self.over_all(volume, |store| store.hot(volume))
    }

    pub fn changed_since(&self, volume: VolumeId, generation: Generation) -> Vec<ExtentIndex> {
        self.over_all(volume, |store| store.changed_since(volume, generation))
    }

    pub fn allocated(&self, volume: VolumeId) -> Vec<ExtentIndex> {
        self.over_all(volume, |store| store.allocated(volume))
    }

    pub fn lies_on(&self, volume: VolumeId, other: VolumeId) -> bool {
        self.members().next().is_some_and(|(_, disk)| disk.store.lies_on(volume, other))
    }

    pub fn differing(&self, one: VolumeId, two: VolumeId) -> Vec<ExtentIndex> {
        let mut extents: BTreeSet<ExtentIndex> = self.lost_of(two).collect();
        extents.extend(self.over_all(one, |store| store.differing(one, two)));
        extents.into_iter().collect()
    }

    pub fn status(&self, volume: VolumeId, range: BlockRange) -> Vec<(BlockRange, bool)> {
        if self.is_alone() {
            return self.disks[0].store.status(volume, range);
        }
        let mut runs: Vec<(BlockRange, bool)> = Vec::new();
        for part in range.split_by_extent() {
            let extent = part.start.extent();
            let of_part = match self.home_of(volume, extent) {
                _ if self.is_lost(volume, extent) => vec![(part, true)],
                Some(store) => store.status(volume, part),
                None => vec![(part, false)],
            };
            for (run, holds) in of_part {
                match runs.last_mut() {
                    Some((last, held)) if *held == holds && last.end() == run.start => last.count.0 += run.count.0,
                    _ => runs.push((run, holds)),
                }
            }
        }
        runs
    }

    fn sum(&self, of: impl Fn(&Store) -> ByteCount) -> ByteCount {
        ByteCount(self.members().map(|(_, disk)| of(&disk.store).0).sum())
    }

    pub fn used(&self, group: GroupId) -> ByteCount {
        self.sum(|store| store.used(group))
    }

    /// Bytes that volumes can take in all, on disks that are not being drained.
    pub fn capacity(&self) -> ByteCount {
        let disks = self.members().filter(|(_, disk)| !disk.is_draining || self.disks.len() == 1);
        ByteCount(disks.map(|(_, disk)| disk.store.capacity().0).sum())
    }

    pub fn free(&self) -> ByteCount {
        let disks = self.members().filter(|(_, disk)| !disk.is_draining || self.disks.len() == 1);
        ByteCount(disks.map(|(_, disk)| disk.store.free().0).sum())
    }

    /// Asserts the invariants; called by tests after every step.
    pub fn check(&self) {
        self.disks.iter().for_each(|disk| disk.store.check());
        if self.is_alone() || !self.is_open {
            return;
        }
        let mut counted = vec![0; self.disks.len()];
        self.homes.values().flat_map(BTreeMap::values).for_each(|home| counted[home.index()] += 1);
        for (disk, counted) in self.disks.iter().zip(counted) {
            assert_eq!(disk.columns, counted, "columns are counted");
        }
        let moving = self.moving.as_ref().map(Moving::column);
        for (index, disk) in self.members() {
            let columns = disk.store.pool().map(|pool| pool.columns()).unwrap_or_default();
            let settled = |column: &Column| Some(*column) != moving && !self.lost.is_settling(column);
            for column in columns.into_iter().filter(settled) {
                assert_eq!(self.home(column), Some(index), "{column:?} lives where it is");
            }
        }
    }
}

impl Disk {
    fn new(store: Store, id: DiskId) -> Disk {
        Disk { store, id, path: None, is_in: true, is_draining: false, columns: 0, ended: 1, flushed: 0 }
    }
}
