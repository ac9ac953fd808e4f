//! The store as its user sees it: being opened, open, or refused.

use crate::catalog::{Catalog, Member, MemberState};
use crate::layout::{ANCHORS, CATALOGS, Geometry, JOURNAL, SUPERBLOCKS, UNIT_BYTES};
use crate::opening::{Opening, Progress};
use crate::pool::Pool;
use crate::slots::LayerId;
use crate::superblock::{Anchor, Superblock};
use crate::{FormatError, Input, Output, PoolIdentity, Position, StoreError, StoreOp};
use pollux_base::unit::{BLOCK_BYTES, BlockRange};
use pollux_base::{
    ByteCount, ClusterId, Data, DiskId, DiskOp, DiskOpId, DiskOpKind, ExtentIndex, Generation, GroupId, Instant,
    NodeId, VolumeId,
};
use std::collections::{BTreeMap, VecDeque};

enum Phase {
    Opening(Box<Opening>),
    Open(Box<Pool>),
    /// The pool was not opened, and `Opened` said why.
    Refused,
}

/// The pool of one node.
pub struct Store {
    phase: Phase,
    out: VecDeque<Output>,
}

/// Bytes of one write of the format.
const FORMAT_CHUNK_BYTES: u64 = 1 << 20;

impl Store {
    /// The operations that make an empty pool of `size` bytes, in order; each must be done before the next. The
    /// superblocks come last, so that a pool that was not finished is no pool.
    pub fn format(identity: PoolIdentity, size: ByteCount) -> Result<Vec<DiskOp>, FormatError> {
        let member = Member { size, path: String::new(), state: MemberState::Active, life: 1 };
        let catalog = Catalog { members: BTreeMap::from([(identity.disk, member)]), ..Catalog::default() };
        Store::format_with(identity, size, &catalog)
    }

    /// Likewise, for a disk that joins a pool which has this catalog.
    pub(crate) fn format_with(
        identity: PoolIdentity,
        size: ByteCount,
        catalog: &Catalog,
    ) -> Result<Vec<DiskOp>, FormatError> {
        let geometry = Geometry::of(size)?;
        let mut kinds = Vec::new();
        let mut write = |offset: u64, data: Data| {
            kinds.push(DiskOpKind::Write { offset: ByteCount(offset), data: vec![data], sync: false });
        };
        // An older pool must not shine through, should the formatting be interrupted.
        for offset in SUPERBLOCKS {
            write(offset, Data::zeroed(BLOCK_BYTES as usize));
        }
        let zeros = Data::zeroed(FORMAT_CHUNK_BYTES as usize);
        for at in (0..geometry.ring.bytes()).step_by(FORMAT_CHUNK_BYTES as usize) {
            write(JOURNAL + at, zeros.clone());
        }
        for offset in CATALOGS {
            write(offset, catalog.encode(1, identity.pool));
        }
        let anchor = Anchor { sequence: 1, tail: 1, durable: 1, log_life: 1, life: 1, end: 0, slots: 0 };
        for offset in ANCHORS {
            write(offset, anchor.encode(identity.pool));
        }
        kinds.push(DiskOpKind::Flush);
        let superblock = Superblock { identity, geometry };
        for offset in SUPERBLOCKS {
            let data = vec![superblock.encode()];
            kinds.push(DiskOpKind::Write { offset: ByteCount(offset), data, sync: true });
        }
        kinds.push(DiskOpKind::Flush);
        Ok(kinds.into_iter().zip(1..).map(|(kind, id)| DiskOp { id: DiskOpId::new(id), kind }).collect())
    }

    /// Begins opening a pool of `size` bytes: reads go out through `poll`, `Opened` comes when done. `cluster` and
    /// `node` are what the superblock must name. Requests may come only after `Opened(Ok)`.
    pub fn open(cluster: ClusterId, node: NodeId, size: ByteCount) -> Store {
        Store::open_seen(cluster, node, size, BTreeMap::new())
    }

    /// Likewise, of a disk that is known to have come so far.
    pub(crate) fn open_seen(
        cluster: ClusterId,
        node: NodeId,
        size: ByteCount,
        seen: BTreeMap<DiskId, Position>,
    ) -> Store {
        let opening = Opening::new(cluster, node, size, seen);
        let mut store = Store { phase: Phase::Opening(Box::new(opening)), out: VecDeque::new() };
        if let Phase::Opening(opening) = &mut store.phase {
            let progress = opening.advance(&mut store.out);
            store.on_progress(progress);
        }
        store
    }

    pub fn handle(&mut self, _now: Instant, input: Input) {
        match (&mut self.phase, input) {
            (Phase::Opening(opening), Input::Disk(done)) => {
                let progress = opening.on_disk(done, &mut self.out);
                self.on_progress(progress);
            }
            (Phase::Open(pool), input) => {
                match input {
                    Input::Disk(done) => pool.on_disk(done),
                    Input::Request(id, op) => pool.on_request(id, op),
                }
                pool.pump();
                self.out.append(&mut pool.io.out);
                if cfg!(debug_assertions) {
                    pool.check_step();
                }
            }
            (Phase::Refused, Input::Disk(_)) => {}
            (Phase::Refused, Input::Request(id, _)) => {
                let error = StoreError::Disk("the pool was not opened".into());
                self.out.push_back(Output::Ended(id, Err(error)));
            }
            (Phase::Opening(_), Input::Request(id, op)) => panic!("{id:?} came before the pool was open: {op:?}"),
        }
    }

    fn on_progress(&mut self, progress: Progress) {
        match progress {
            Progress::More => {}
            Progress::Refused(error) => {
                self.phase = Phase::Refused;
                self.out.push_back(Output::Opened(Err(error)));
            }
            Progress::Opened(pool) => {
                self.phase = Phase::Open(pool);
                self.out.push_back(Output::Opened(Ok(())));
            }
        }
    }

    pub fn poll(&mut self) -> Option<Output> {
        self.out.pop_front()
    }

    /// The store does nothing by the clock.
    pub fn deadline(&self) -> Option<Instant> {
        None
    }

    pub(crate) fn pool(&self) -> Option<&Pool> {
        match &self.phase {
            Phase::Open(pool) => Some(pool),
            Phase::Opening(_) | Phase::Refused => None,
        }
    }

    /// Why the store takes no more changes.
    pub fn failed(&self) -> Option<&str> {
        self.pool()?.failed.as_deref()
    }

    /// Whether nothing is under way, asked for or of its own.
    pub(crate) fn is_idle(&self) -> bool {
        self.out.is_empty() && self.pool().is_none_or(|pool| pool.requests.is_empty() && pool.io.is_idle())
    }

    /// Blocks that did not match their checksums, and reads that brought nothing, since it was opened.
    pub(crate) fn errors(&self) -> (u64, u64) {
        self.pool().map_or((0, 0), |pool| (pool.checksum_errors, pool.io_errors))
    }

    /// Bytes of notes for which there is room.
    pub(crate) fn catalog_room(&self) -> usize {
        self.pool().map_or(0, |pool| pool.catalog.room())
    }

    /// Notes of the caller, by group.
    pub fn notes(&self) -> impl Iterator<Item = (GroupId, &[u8])> {
        self.pool().into_iter().flat_map(|pool| pool.catalog.notes.iter().map(|(group, note)| (*group, &note[..])))
    }

    pub fn volumes(&self) -> impl Iterator<Item = (VolumeId, GroupId, ByteCount)> {
        let volumes = self.pool().into_iter().flat_map(|pool| pool.catalog.volumes.iter());
        volumes.map(|(volume, known)| (*volume, known.group, known.size))
    }

    /// Whether a write may go to the extent now: it is hot, durably, under at least `generation`.
    pub fn is_hot(&self, volume: VolumeId, extent: ExtentIndex, generation: Generation) -> bool {
        let marked = |pool: &Pool| {
            let key = (pool.layer_of(volume)?, extent);
            pool.hot.get(&key)?.marked.filter(|_| !pool.freezing.contains(&key))
        };
        self.pool().and_then(marked).is_some_and(|marked| marked >= generation)
    }

    /// Whether there is room for what the request would write.
    pub(crate) fn has_room_for(&self, op: &StoreOp) -> bool {
        let Some(pool) = self.pool() else { return false };
        match op {
            StoreOp::Write { volume, range, .. } => {
                pool.layer_of(*volume).is_none_or(|layer| pool.has_room(layer, *range).is_ok())
            }
            StoreOp::Zero { range, .. } => pool.table.vacant() >= range.extents().count(),
            _ => true,
        }
    }

    /// Calls off a cooling: whoever saw the extent hot is about to write to it.
    pub(crate) fn keep_hot(&mut self, volume: VolumeId, extent: ExtentIndex) {
        if let Phase::Open(pool) = &mut self.phase
            && let Some(layer) = pool.layer_of(volume)
        {
            pool.cancel_cooling((layer, extent));
            self.out.append(&mut pool.io.out);
        }
    }

    /// Extents that may be hot at one time, over all volumes: it bounds the memory for their checksums (8 KiB each), what a
    /// checkpoint of the journal writes anew, and what is read again after a crash (4 MiB each). A larger disk has more.
    pub fn hot_extents_max(&self) -> usize {
        self.pool().map_or(0, |pool| pool.geometry().ring.hot_extents_max())
    }

    /// Hot extents of the volume and of what it lies on. Right after opening: those that were hot when the process or the
    /// power died.
    pub fn hot(&self, volume: VolumeId) -> Vec<ExtentIndex> {
        let Some((pool, layer)) = self.layer_of(volume) else { return Vec::new() };
        pool.hot_of(layer).into_iter().collect()
    }

    /// Extents last changed under a generation above `generation` (hot ones included), in order; with what a rollback changed,
    /// and for a clone all that it has from the volume that it was made of, whose generations are not its own.
    pub fn changed_since(&self, volume: VolumeId, generation: Generation) -> Vec<ExtentIndex> {
        let Some((pool, layer)) = self.layer_of(volume) else { return Vec::new() };
        let size = pool.catalog.volumes.get(&volume).map_or(0, |known| known.size.0);
        pool.changed_since(layer, size, generation).into_iter().collect()
    }

    /// Extents that hold or held data, in the volume or in what it lies on, in order.
    pub fn allocated(&self, volume: VolumeId) -> Vec<ExtentIndex> {
        let Some((pool, layer)) = self.layer_of(volume) else { return Vec::new() };
        pool.allocated(layer).into_iter().collect()
    }

    /// Extents in which two volumes may differ, in order: all others were written by neither since they were one. Which
    /// blocks of them do differ their `Checksums` tell.
    pub fn differing(&self, one: VolumeId, two: VolumeId) -> Vec<ExtentIndex> {
        self.pool().map_or_else(Vec::new, |pool| pool.differing(one, two))
    }

    /// Whether the volume shows what the other does wherever it has nothing of its own.
    pub fn lies_on(&self, volume: VolumeId, other: VolumeId) -> bool {
        let layers = self.layer_of(volume).zip(self.layer_of(other));
        layers.is_some_and(|((pool, layer), (_, other))| pool.catalog.chain(layer).any(|beneath| beneath == other))
    }

    fn layer_of(&self, volume: VolumeId) -> Option<(&Pool, LayerId)> {
        let pool = self.pool()?;
        Some((pool, pool.layer_of(volume)?))
    }

    /// The range as adjoining runs: the run, and whether it may hold data (`false`: reads as zeros).
    pub fn status(&self, volume: VolumeId, range: BlockRange) -> Vec<(BlockRange, bool)> {
        self.pool().map_or_else(Vec::new, |pool| pool.status(volume, range))
    }

    /// Bytes of the pool that the group's blocks and their checksums take on disk, snapshots included. What several volumes
    /// share is counted once: for the group whose volume or snapshot names it.
    pub fn used(&self, group: GroupId) -> ByteCount {
        let maps = self.pool().into_iter().flat_map(|pool| {
            pool.layers.iter().filter(move |(layer, _)| pool.payer(**layer) == Some(group)).map(|(_, map)| map)
        });
        ByteCount(maps.map(|map| map.units * UNIT_BYTES + map.leaf_blocks * BLOCK_BYTES).sum())
    }

    /// Bytes that volumes can take in all.
    pub fn capacity(&self) -> ByteCount {
        ByteCount(self.pool().map_or(0, |pool| u64::from(pool.geometry().units())) * UNIT_BYTES)
    }

    /// Bytes that data can still take, in units of `UNIT_BYTES`. What was given back counts from when it can be taken
    /// again.
    pub fn free(&self) -> ByteCount {
        ByteCount(self.pool().map_or(0, |pool| u64::from(pool.space.free())) * UNIT_BYTES)
    }

    /// Asserts the invariants; called by tests after every step. Debug builds check the cheap ones by themselves.
    pub fn check(&self) {
        if let Some(pool) = self.pool() {
            pool.check();
        }
    }
}
