//! Random histories against a model that knows, for each 512 bytes, every value they may have after a crash.
//!
//! Every write carries a number of its own in each sector. A history asks, lets the disk complete in any order, crashes
//! at a chosen step, opens again (crashing in the middle of that, too) and compares. What must hold is written at
//! `verify`.

use super::shelf::Shelf;
use super::*;
use pollux_base::unit::EXTENT_BLOCKS;
use pollux_store::UNIT_BYTES;
use pollux_store::faulty_disk::Luck;
use std::collections::BTreeSet;
use std::sync::OnceLock;

type Sectors = [u64; 8];
type BlockKey = (VolumeId, u64);
type ExtentKey = (VolumeId, ExtentIndex);

/// Extents of a volume that are written to.
const EXTENTS: u32 = 5;
/// Blocks of an extent that are written to: at its start, around the seam of two leaf blocks, at its end.
const PLACES: [(u64, u64); 3] = [(0, 8), (492, 8), (1016, 8)];
const OUTSTANDING_MAX: usize = 8;
const VOLUME_BYTES: u64 = 24 << 20;
/// Takes most of the pool, so that it is full at times.
const BALLAST: VolumeId = VolumeId(1 << 40);
/// What it leaves, in units: less than what is written to can take.
const ROOM_UNITS: u64 = 56;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Crash {
    Kill,
    PowerCut,
}

/// Values of a block, oldest first: the first `acked` were acknowledged, the first `flushed` of them flushed.
#[derive(Clone, Debug)]
struct Versions {
    values: Vec<Sectors>,
    acked: usize,
    flushed: usize,
}

impl Versions {
    fn settled(value: Sectors) -> Versions {
        Versions { values: vec![value], acked: 1, flushed: 1 }
    }
    fn legal(&self, crash: Crash) -> &[Sectors] {
        match crash {
            Crash::Kill => &self.values[self.acked - 1..],
            Crash::PowerCut => &self.values[self.flushed - 1..],
        }
    }
}

/// Generation of the last change, and whether the extent had to be hot.
type Before = Vec<(ExtentKey, Option<u64>, bool)>;

#[derive(Debug)]
enum Asked {
    /// The blocks, and what the model knew of their extents before.
    Change(Vec<BlockKey>, Before),
    Flush(Vec<(BlockKey, usize)>),
    Read {
        volume: VolumeId,
        start: u64,
        expected: Vec<Option<Sectors>>,
    },
    Note {
        at: usize,
    },
    Create(VolumeId),
    Delete(VolumeId),
    Reap,
    Rollback,
    Other,
}

pub struct History {
    pub rig: Rig,
    luck: Luck,
    blocks: BTreeMap<BlockKey, Versions>,
    busy: BTreeSet<BlockKey>,
    asked: BTreeMap<StoreRequestId, Asked>,
    generation: u64,
    stamp: u64,
    /// Volumes that exist for sure, or whose creation was asked for (`false`).
    volumes: BTreeMap<VolumeId, bool>,
    deleting: BTreeSet<VolumeId>,
    /// Snapshots: nobody writes to them.
    frozen: BTreeSet<VolumeId>,
    /// A volume that goes back to a snapshot, and in which generation: nothing else is asked of either meanwhile.
    rolling: Option<(VolumeId, VolumeId, u64)>,
    /// From which volume another was made, in the end.
    origin: BTreeMap<VolumeId, VolumeId>,
    next_volume: u64,
    /// Notes given, oldest first, and how many of them are durable.
    notes: Vec<Option<Vec<u8>>>,
    notes_acked: usize,
    /// Generation under which an extent was last changed.
    changed: BTreeMap<ExtentKey, u64>,
    /// Volumes that lie on others: of these a slot beneath does not tell that a change is there.
    layered: BTreeSet<VolumeId>,
    /// Extents of which a crash may have taken the last change.
    maybe_lost: BTreeSet<ExtentKey>,
    /// Changed since `Cool` was last asked for.
    must_be_hot: BTreeSet<ExtentKey>,
    /// The disks, if they change.
    shelf: Option<Shelf>,
    pub full: u32,
}

fn sectors_of(block: &[u8]) -> Result<Sectors, String> {
    let mut sectors = [0; 8];
    for (at, sector) in block.chunks_exact(512).enumerate() {
        let words: BTreeSet<&[u8]> = sector.chunks_exact(8).collect();
        let word = words.first().expect("a sector has words");
        if words.len() != 1 {
            return Err("a sector of several values".into());
        }
        sectors[at] = u64::from_le_bytes((*word).try_into().expect("eight bytes"));
    }
    Ok(sectors)
}

impl History {
    pub fn new(seed: u64) -> History {
        // Formatting and the first volumes are the same every time.
        static MADE: OnceLock<FaultyDisk> = OnceLock::new();
        let mut disk = MADE.get_or_init(History::made).clone();
        let mut luck = Luck::new(seed);
        disk.kill(luck.draw());
        let rig = Rig::open(disk).expect("a fresh pool opens");
        let mut history = History {
            rig,
            luck,
            blocks: BTreeMap::new(),
            busy: BTreeSet::new(),
            asked: BTreeMap::new(),
            generation: 1,
            stamp: 0,
            volumes: BTreeMap::new(),
            deleting: BTreeSet::new(),
            frozen: BTreeSet::new(),
            rolling: None,
            origin: BTreeMap::new(),
            next_volume: 1,
            notes: vec![None],
            notes_acked: 1,
            changed: BTreeMap::new(),
            layered: BTreeSet::new(),
            maybe_lost: BTreeSet::new(),
            must_be_hot: BTreeSet::new(),
            shelf: None,
            full: 0,
        };
        for (volume, _, _) in history.rig.store.volumes().filter(|(volume, _, _)| *volume != BALLAST) {
            history.volumes.insert(volume, true);
            history.next_volume += 1;
        }
        history
    }

    /// One in which disks come and go.
    pub fn with_disks(seed: u64) -> History {
        History { shelf: Some(Shelf::new()), ..History::new(seed) }
    }

    fn made() -> FaultyDisk {
        let mut rig = Rig::open(formatted()).expect("a fresh pool opens");
        for volume in 1..=3 {
            rig.done(StoreOp::Create { volume: VolumeId(volume), group: GROUP, size: ByteCount(VOLUME_BYTES) });
        }
        let size = ByteCount(SIZE);
        rig.done(StoreOp::Create { volume: BALLAST, group: GroupId(1 << 40), size });
        let all = (0..(SIZE >> 22) as u32).map(x).collect();
        rig.done(StoreOp::Heat { volume: BALLAST, extents: all, generation: gen_(1) });
        let unit = (UNIT_BYTES / BLOCK as u64) as usize;
        let mut at = 0;
        while rig.store.free().0 > ROOM_UNITS * UNIT_BYTES {
            rig.done(write_op(BALLAST, at, Data::zeroed(unit * BLOCK)));
            at += unit as u64;
        }
        rig.done(StoreOp::Cool { volume: BALLAST, extents: (0..(SIZE >> 22) as u32).map(x).collect() });
        rig.disk
    }

    /// Fills the journal until a checkpoint is about to begin.
    pub fn fill_journal(&mut self, blocks: u64) {
        let Some(volume) = self.some_volume() else { return };
        for _ in 0..blocks {
            self.generation += 1;
            let heat = StoreOp::Heat { volume, extents: vec![x(0)], generation: gen_(self.generation) };
            self.rig.done(heat);
        }
    }

    /// Asks and completes at random, `steps` times.
    pub fn run(&mut self, steps: u64) -> Result<(), String> {
        for _ in 0..steps {
            let asks = self.asked.len() < OUTSTANDING_MAX && self.luck.one_in(2);
            if asks || !self.rig.step() {
                self.ask_something();
            }
            self.gather()?;
        }
        Ok(())
    }

    fn create(&mut self) {
        let volume = VolumeId(self.next_volume);
        self.next_volume += 1;
        self.volumes.insert(volume, false);
        let id = self.rig.ask(StoreOp::Create { volume, group: GROUP, size: ByteCount(VOLUME_BYTES) });
        self.asked.insert(id, Asked::Create(volume));
    }

    fn some_volume(&mut self) -> Option<VolumeId> {
        let live: Vec<VolumeId> = self
            .volumes
            .iter()
            .filter(|(volume, created)| **created && !self.deleting.contains(volume))
            .map(|(volume, _)| *volume)
            .filter(|volume| self.rolling.is_none_or(|(one, two, _)| *volume != one && *volume != two))
            .collect();
        (!live.is_empty()).then(|| live[self.luck.below(live.len() as u64) as usize])
    }

    fn some_extents(&mut self) -> Vec<ExtentIndex> {
        (0..EXTENTS).filter(|_| self.luck.one_in(3)).map(ExtentIndex).collect()
    }

    /// A run of blocks that may cross the end of an extent.
    fn some_range(&mut self) -> BlockRange {
        let extent = self.luck.below(u64::from(EXTENTS) - 1);
        let (start, len) = PLACES[self.luck.below(3) as usize];
        let at = self.luck.below(len);
        range(extent * EXTENT_BLOCKS + start + at, 1 + self.luck.below(12.min(len + 4 - at)))
    }

    fn keys(&self, volume: VolumeId, range: BlockRange) -> Vec<BlockKey> {
        (range.start.0..range.end().0).map(|block| (volume, block)).collect()
    }

    fn new_version(&mut self, keys: &[BlockKey], value: Sectors) {
        for key in keys {
            self.blocks.entry(*key).or_insert_with(|| Versions::settled([0; 8])).values.push(value);
            self.busy.insert(*key);
        }
    }

    fn ask_something(&mut self) {
        if let Some(shelf) = &mut self.shelf
            && self.luck.one_in(30)
        {
            return shelf.ask(&mut self.rig, &mut self.luck);
        }
        let Some(volume) = self.some_volume() else { return self.create() };
        let (op, asked) = match self.luck.below(44) {
            40 => return self.snapshot(volume),
            41 => return self.clone_of(volume),
            42 => return self.roll_back(volume),
            43 => return,
            0..6 => {
                let op = StoreOp::Heat { volume, extents: self.some_extents(), generation: gen_(self.generation) };
                (op, Asked::Other)
            }
            6..23 if self.frozen.contains(&volume) => return,
            6..18 => match self.write(volume) {
                Some(asked) => asked,
                None => return,
            },
            18..23 => match self.zero(volume) {
                Some(asked) => asked,
                None => return,
            },
            23..28 => {
                let range = self.some_range();
                let expected = self.keys(volume, range).iter().map(|key| self.live_value(key)).collect();
                (StoreOp::Read { volume, range }, Asked::Read { volume, start: range.start.0, expected })
            }
            28..31 => {
                let extents = self.some_extents();
                let idle: Vec<ExtentIndex> = extents
                    .into_iter()
                    .filter(|extent| !self.busy.iter().any(|(v, b)| *v == volume && BlockIndex(*b).extent() == *extent))
                    .collect();
                self.asked_cool(volume, &idle);
                (StoreOp::Cool { volume, extents: idle }, Asked::Other)
            }
            31..35 => {
                let acked = self.blocks.iter().map(|(key, versions)| (*key, versions.acked)).collect();
                (StoreOp::Flush, Asked::Flush(acked))
            }
            35 => {
                self.generation += 1;
                (StoreOp::Remark { group: GROUP, generation: gen_(self.generation) }, Asked::Other)
            }
            36 => {
                self.asked_reap();
                return;
            }
            37 => {
                let note = (!self.luck.one_in(4)).then(|| self.luck.draw().to_le_bytes().to_vec());
                self.notes.push(note.clone());
                (StoreOp::PutNote { group: GROUP, note }, Asked::Note { at: self.notes.len() })
            }
            38 if self.luck.one_in(3) && !self.busy.iter().any(|(busy, _)| *busy == volume) => {
                self.deleting.insert(volume);
                (StoreOp::Delete { volume }, Asked::Delete(volume))
            }
            38 if self.volumes.len() < 3 => return self.create(),
            _ => (StoreOp::Checksums { volume, extent: ExtentIndex(self.luck.below(5) as u32) }, Asked::Other),
        };
        let id = self.rig.ask(op);
        self.asked.insert(id, asked);
    }

    /// Who cools says that the replicas agree. Then only what has a slot is remembered as changed: elsewhere the change
    /// was lost with the power.
    fn asked_cool(&mut self, volume: VolumeId, extents: &[ExtentIndex]) {
        let allocated = self.rig.store.allocated(volume);
        let cools = |key: &ExtentKey| key.0 == volume && extents.contains(&key.1);
        self.must_be_hot.retain(|key| !cools(key));
        let (layered, lost) = (self.layered.contains(&volume), &self.maybe_lost);
        let is_kept = |key: &ExtentKey| allocated.contains(&key.1) && !(layered && lost.contains(key));
        self.changed.retain(|key, _| !cools(key) || is_kept(key));
    }

    /// Extents that hold nothing may be forgotten from the moment this is asked until it ends.
    fn asked_reap(&mut self) {
        let id = self.rig.ask(StoreOp::Reap { group: GROUP });
        self.reaped();
        self.asked.insert(id, Asked::Reap);
    }

    fn reaped(&mut self) {
        let held: BTreeSet<ExtentKey> = self
            .blocks
            .iter()
            .filter(|(key, versions)| self.busy.contains(*key) || versions.values[versions.acked - 1] != [0; 8])
            .map(|((volume, block), _)| (*volume, BlockIndex(*block).extent()))
            .collect();
        let (layered, lost) = (&self.layered, &self.maybe_lost);
        // What a layer beneath holds does not tell that a change above it, which a crash may have taken, is there.
        let is_there = |key: &ExtentKey| held.contains(key) && !(layered.contains(&key.0) && lost.contains(key));
        self.changed.retain(|key, _| is_there(key));
    }

    fn is_busy(&self, volume: VolumeId) -> bool {
        self.busy.iter().any(|(busy, _)| *busy == volume)
    }

    /// A new volume holds what another does.
    fn copy(&mut self, of: VolumeId) -> VolumeId {
        let volume = VolumeId(self.next_volume);
        self.next_volume += 1;
        let blocks: Vec<_> = self.blocks.range((of, 0)..=(of, u64::MAX)).map(|((_, b), v)| (*b, v.clone())).collect();
        self.blocks.extend(blocks.into_iter().map(|(block, versions)| ((volume, block), versions)));
        let origin = self.origin.get(&of).copied().unwrap_or(of);
        self.origin.insert(volume, origin);
        self.volumes.insert(volume, false);
        volume
    }

    fn snapshot(&mut self, of: VolumeId) {
        if self.is_busy(of) || self.volumes.len() > 7 {
            return;
        }
        let snapshot = self.copy(of);
        self.frozen.insert(snapshot);
        self.layered.extend([of, snapshot]);
        // Whoever takes a snapshot says that the replicas agree, as with cooling.
        let allocated = self.rig.store.allocated(of);
        let of_volume = self.changed.iter().filter(|((v, x), _)| *v == of && allocated.contains(x));
        let changed: Vec<_> = of_volume.map(|((_, x), g)| (*x, *g)).collect();
        self.changed.extend(changed.into_iter().map(|(extent, generation)| ((snapshot, extent), generation)));
        let lost: Vec<_> = self.maybe_lost.iter().filter(|(v, _)| *v == of).map(|(_, x)| (snapshot, *x)).collect();
        self.maybe_lost.extend(lost);
        let id = self.rig.ask(StoreOp::Snapshot { of: vec![(of, snapshot)] });
        self.asked.insert(id, Asked::Create(snapshot));
    }

    fn clone_of(&mut self, of: VolumeId) {
        if !self.frozen.contains(&of) || self.volumes.len() > 7 {
            return;
        }
        let volume = self.copy(of);
        self.layered.insert(volume);
        let id = self.rig.ask(StoreOp::Clone { of, volume, group: GROUP, generation: gen_(self.generation) });
        self.asked.insert(id, Asked::Create(volume));
    }

    fn roll_back(&mut self, volume: VolumeId) {
        let snapshots: Vec<VolumeId> = self
            .frozen
            .iter()
            .copied()
            .filter(|s| self.volumes.get(s) == Some(&true) && !self.deleting.contains(s))
            .filter(|s| {
                self.origin.get(s).copied().unwrap_or(*s) == self.origin.get(&volume).copied().unwrap_or(volume)
            })
            .collect();
        if self.frozen.contains(&volume) || self.is_busy(volume) || snapshots.is_empty() || self.rolling.is_some() {
            return;
        }
        let snapshot = snapshots[self.luck.below(snapshots.len() as u64) as usize];
        self.generation += 1;
        self.rolling = Some((volume, snapshot, self.generation));
        self.layered.insert(volume);
        let id =
            self.rig.ask(StoreOp::Rollback { volume, snapshot, generation: gen_(self.generation), also: Vec::new() });
        self.asked.insert(id, Asked::Rollback);
    }

    /// The volume holds what the snapshot does.
    fn rolled_back(&mut self, volume: VolumeId, snapshot: VolumeId, generation: u64) {
        let blocks: BTreeSet<u64> =
            self.blocks.keys().filter(|(v, _)| *v == volume || *v == snapshot).map(|(_, block)| *block).collect();
        for block in blocks {
            let old = self.blocks.get(&(volume, block)).cloned().unwrap_or_else(|| Versions::settled([0; 8]));
            let new = self.blocks.get(&(snapshot, block)).cloned().unwrap_or_else(|| Versions::settled([0; 8]));
            if old.values[old.acked - 1] != new.values[new.acked - 1] {
                self.changed.insert((volume, BlockIndex(block).extent()), generation);
            }
            self.blocks.insert((volume, block), new);
        }
        // What was flushed of the values before says nothing of these.
        for asked in self.asked.values_mut() {
            if let Asked::Flush(flushed) = asked {
                flushed.retain(|((of, _), _)| *of != volume);
            }
        }
        self.rolling = None;
    }

    /// What the block reads as, unless it is being changed.
    fn live_value(&self, key: &BlockKey) -> Option<Sectors> {
        if self.busy.contains(key) {
            return None;
        }
        Some(self.blocks.get(key).map_or([0; 8], |versions| versions.values[versions.acked - 1]))
    }

    fn is_hot(&self, volume: VolumeId, extent: ExtentIndex) -> bool {
        self.rig.store.is_hot(volume, extent, gen_(1))
    }

    fn changes(&mut self, volume: VolumeId, extents: impl Iterator<Item = ExtentIndex>) -> Before {
        let mut before = Vec::new();
        for extent in extents {
            let key = (volume, extent);
            before.push((key, self.changed.get(&key).copied(), self.must_be_hot.contains(&key)));
            // The mark may be of an older generation than the newest, never of one below the last change.
            let marked = (1..=self.generation).rev().find(|g| self.rig.store.is_hot(volume, extent, gen_(*g)));
            self.changed.insert((volume, extent), marked.expect("it was just hot"));
            self.must_be_hot.insert((volume, extent));
        }
        before
    }

    fn write(&mut self, volume: VolumeId) -> Option<(StoreOp, Asked)> {
        let range = self.some_range();
        let keys = self.keys(volume, range);
        let free = keys.iter().all(|key| !self.busy.contains(key));
        if !free || !range.extents().all(|extent| self.is_hot(volume, extent)) {
            return None;
        }
        self.stamp += 1;
        self.new_version(&keys, [self.stamp; 8]);
        let before = self.changes(volume, range.extents());
        let bytes = self.stamp.to_le_bytes().repeat(BLOCK / 8 * keys.len());
        Some((write_op(volume, range.start.0, Data::copy_of(&bytes)), Asked::Change(keys, before)))
    }

    fn zero(&mut self, volume: VolumeId) -> Option<(StoreOp, Asked)> {
        let extent = ExtentIndex(self.luck.below(u64::from(EXTENTS)) as u32);
        let whole = range(u64::from(extent.0) * EXTENT_BLOCKS, EXTENT_BLOCKS);
        let range = if self.luck.one_in(2) { self.some_range() } else { whole };
        let known: Vec<BlockKey> = if range == whole {
            self.keys(volume, range).into_iter().filter(|key| self.blocks.contains_key(key)).collect()
        } else {
            self.keys(volume, range)
        };
        let allocated: BTreeSet<ExtentIndex> = self.rig.store.allocated(volume).into_iter().collect();
        let touched: Vec<ExtentIndex> = range.extents().filter(|extent| allocated.contains(extent)).collect();
        let free = known.iter().all(|key| !self.busy.contains(key));
        if !free || !touched.iter().all(|extent| self.is_hot(volume, *extent)) {
            return None;
        }
        // Where nothing is there is nothing to change.
        let held: BTreeSet<ExtentIndex> = known
            .iter()
            .filter(|key| self.live_value(key) != Some([0; 8]))
            .map(|(_, block)| BlockIndex(*block).extent())
            .collect();
        self.new_version(&known, [0; 8]);
        let before = self.changes(volume, held.into_iter());
        Some((StoreOp::Zero { volume, range }, Asked::Change(known, before)))
    }

    /// Takes in what has ended.
    fn gather(&mut self) -> Result<(), String> {
        if let Some(shelf) = &mut self.shelf {
            shelf.gather(&mut self.rig);
        }
        for (id, ended) in std::mem::take(&mut self.rig.ended) {
            let Some(asked) = self.asked.remove(&id) else { continue };
            match (asked, ended) {
                (Asked::Change(keys, _), Ok(_)) => {
                    for key in keys {
                        self.busy.remove(&key);
                        let versions = self.blocks.get_mut(&key).expect("it was written to");
                        versions.acked = versions.values.len();
                        // Zeros where there were zeros leave nothing behind.
                        if versions.values[versions.acked - 1] != [0; 8] {
                            self.maybe_lost.remove(&(key.0, BlockIndex(key.1).extent()));
                        }
                    }
                }
                (Asked::Change(keys, before), Err(StoreError::Full)) => {
                    self.full += 1;
                    for (key, generation, hot) in before {
                        match generation {
                            Some(generation) => self.changed.insert(key, generation),
                            None => self.changed.remove(&key),
                        };
                        if !hot {
                            self.must_be_hot.remove(&key);
                        }
                    }
                    for key in keys {
                        self.busy.remove(&key);
                        self.blocks.get_mut(&key).expect("it was written to").values.pop();
                    }
                }
                (Asked::Flush(flushed), Ok(_)) => {
                    for (key, acked) in flushed {
                        if let Some(versions) = self.blocks.get_mut(&key) {
                            versions.flushed = versions.flushed.max(acked);
                        }
                    }
                }
                (Asked::Read { volume, start, expected }, Ok(StoreReply::Read { data, .. })) => {
                    for (at, (block, expected)) in data.as_slice().chunks_exact(BLOCK).zip(expected).enumerate() {
                        let key = (volume, start + at as u64);
                        let found = sectors_of(block);
                        // Only blocks that nobody changed meanwhile must be exactly what they were.
                        if let Some(expected) = expected.filter(|e| self.live_value(&key) == Some(*e))
                            && found != Ok(expected)
                        {
                            return Err(format!("{key:?} reads {found:?}, not {expected:?}"));
                        }
                    }
                }
                (Asked::Reap, Ok(_)) => self.reaped(),
                (Asked::Note { at }, Ok(_)) => self.notes_acked = self.notes_acked.max(at),
                (Asked::Create(volume), Ok(_)) => drop(self.volumes.insert(volume, true)),
                (Asked::Delete(volume), Ok(_)) => self.forget(volume),
                (Asked::Rollback, Ok(_)) => {
                    let (volume, snapshot, generation) = self.rolling.expect("it was asked for");
                    self.rolled_back(volume, snapshot, generation);
                }
                (Asked::Other, Ok(_)) => {}
                (Asked::Read { volume, .. }, Err(StoreError::NoVolume)) if !self.volumes.contains_key(&volume) => {}
                (Asked::Other, Err(StoreError::NoVolume)) => {}
                (asked, ended) => return Err(format!("{asked:?} ended as {ended:?}")),
            }
        }
        Ok(())
    }

    fn forget(&mut self, volume: VolumeId) {
        self.deleting.remove(&volume);
        self.frozen.remove(&volume);
        self.volumes.remove(&volume);
        self.blocks.retain(|(of, _), _| *of != volume);
        self.busy.retain(|(of, _)| *of != volume);
        self.changed.retain(|(of, _), _| *of != volume);
        self.must_be_hot.retain(|(of, _)| *of != volume);
    }

    /// Crashes now, opens again, possibly crashing on the way, and compares.
    pub fn crash(mut self, crash: Crash) -> Result<History, String> {
        for asked in self.asked.values() {
            if let Asked::Change(_, before) = asked {
                self.maybe_lost.extend(before.iter().map(|(key, _, _)| *key));
            }
        }
        if crash == Crash::PowerCut {
            self.maybe_lost.extend(&self.must_be_hot);
            // Of a snapshot that was asked for before what it holds was flushed.
            let unflushed = self.blocks.iter().filter(|(_, versions)| versions.flushed < versions.acked);
            let of_snapshots = unflushed.filter(|((volume, _), _)| self.frozen.contains(volume));
            self.maybe_lost.extend(of_snapshots.map(|((volume, block), _)| (*volume, BlockIndex(*block).extent())));
        }
        let seed = self.luck.draw();
        let mut crash = crash;
        let mut disks = vec![std::mem::replace(&mut self.rig.disk, FaultyDisk::new(0, 0))];
        disks.append(&mut self.rig.more);
        let break_disks = |disks: &mut [FaultyDisk], kind: Crash, seed: u64| {
            for (disk, at) in disks.iter_mut().zip(0..) {
                match kind {
                    Crash::Kill => disk.kill(seed + at),
                    Crash::PowerCut => disk.power_cut(seed + at),
                }
            }
        };
        break_disks(&mut disks, crash, seed);
        if let Some(shelf) = &mut self.shelf {
            disks = shelf.usable(disks)?;
        }
        while self.luck.one_in(3) {
            // The opening itself is cut short, or what follows at once.
            let mut rig = Rig::opening_all(disks, CLUSTER, NODE);
            for _ in 0..self.luck.below(60) {
                rig.step();
                if rig.opened == Some(Ok(())) && self.luck.one_in(4) {
                    let hot: Vec<_> = self.volumes.keys().map(|volume| (*volume, rig.store.hot(*volume))).collect();
                    for (volume, extents) in hot {
                        if rig.store.volumes().any(|(known, _, _)| known == volume) && self.luck.one_in(3) {
                            std::mem::swap(&mut self.rig.store, &mut rig.store);
                            self.asked_cool(volume, &extents);
                            std::mem::swap(&mut self.rig.store, &mut rig.store);
                            rig.ask(StoreOp::Cool { volume, extents });
                        }
                    }
                }
            }
            if let Some(Err(error)) = rig.opened {
                return Err(format!("not opened: {error}"));
            }
            disks = rig.into_disks();
            let again = if self.luck.one_in(2) { Crash::Kill } else { Crash::PowerCut };
            break_disks(&mut disks, again, self.luck.draw());
            if again == Crash::PowerCut {
                // What the first crash left may not have been flushed by an opening that was cut short.
                crash = Crash::PowerCut;
            }
        }
        self.rig = Rig::open_all(disks).map_err(|error| format!("not opened: {error}"))?;
        for asked in std::mem::take(&mut self.asked).into_values() {
            if let Asked::Reap = asked {
                self.reaped();
            }
        }
        self.busy.clear();
        self.verify(crash)?;
        Ok(self)
    }

    /// After a crash: acknowledged (kill) or flushed (power cut) values are there, 512 bytes at a time, or newer ones that
    /// were asked for; what may differ between replicas is hot or changed; volumes and notes are what they were.
    fn verify(&mut self, crash: Crash) -> Result<(), String> {
        let found = self.rig.store.volumes().map(|(volume, _, _)| volume).filter(|volume| *volume != BALLAST);
        let found: BTreeSet<VolumeId> = found.collect();
        for (volume, created) in self.volumes.clone() {
            match (found.contains(&volume), created, self.deleting.contains(&volume)) {
                (false, true, false) => return Err(format!("{volume} is gone")),
                (false, _, _) => self.forget(volume),
                (true, _, _) => drop(self.volumes.insert(volume, true)),
            }
        }
        self.deleting.clear();
        if let Some(volume) = found.iter().find(|volume| !self.volumes.contains_key(volume)) {
            return Err(format!("{volume} was deleted and is back"));
        }
        let note = self.rig.store.notes().find(|(group, _)| *group == GROUP).map(|(_, note)| note.to_vec());
        if !self.notes[self.notes_acked - 1..].contains(&note) {
            return Err("a note is older than what was acknowledged".into());
        }
        self.notes = vec![note];
        self.notes_acked = 1;
        let rolling = self.rolling;
        for (volume, extent) in self.must_be_hot.clone() {
            let is_hot = self.rig.store.hot(volume).contains(&extent);
            if let Some((_, _, generation)) = rolling.filter(|(rolling, _, _)| *rolling == volume) {
                // If it went back, what was hot counts as changed; if not, it is hot. Which of the two is not known.
                let counts = self.rig.store.changed_since(volume, gen_(generation - 1)).contains(&extent);
                self.must_be_hot.remove(&(volume, extent));
                if counts && !is_hot {
                    self.changed.insert((volume, extent), generation);
                }
                if counts {
                    continue;
                }
            }
            if !is_hot {
                return Err(format!("{volume} {extent:?} may differ between replicas and is not hot"));
            }
        }
        // What a snapshot's layer lost with the power is forgotten when the store takes back its mark by itself.
        let (frozen, lost, store) = (&self.frozen, &self.maybe_lost, &self.rig.store);
        let is_lost = |key: &ExtentKey| frozen.contains(&key.0) && lost.contains(key);
        self.changed.retain(|key, _| !is_lost(key) || store.allocated(key.0).contains(&key.1));
        for ((volume, extent), generation) in &self.changed {
            if !self.rig.store.changed_since(*volume, gen_(generation - 1)).contains(extent) {
                return Err(format!("{volume} {extent:?} was changed in generation {generation} and it is forgotten"));
            }
        }
        // A volume that was going back has gone back as a whole or not at all.
        if let Some((volume, snapshot, generation)) = self.rolling.filter(|(volume, _, _)| found.contains(volume)) {
            let before = self.blocks.clone();
            if let Err(not_at_all) = self.verify_volume(volume, crash) {
                self.blocks = before;
                self.rolled_back(volume, snapshot, generation);
                self.verify_volume(volume, crash)
                    .map_err(|error| format!("not gone back: {not_at_all}; nor whole: {error}"))?;
            }
        }
        self.rolling = None;
        found.into_iter().try_for_each(|volume| self.verify_volume(volume, crash))
    }

    fn verify_volume(&mut self, volume: VolumeId, crash: Crash) -> Result<(), String> {
        for (extent, (start, len)) in (0..u64::from(EXTENTS)).flat_map(|e| PLACES.map(|place| (e, place))) {
            // A little more than is written to, so that the neighbours are seen to stay zeros.
            self.verify_range(volume, extent * EXTENT_BLOCKS + start, len + 4, crash)?;
        }
        Ok(())
    }

    fn verify_range(&mut self, volume: VolumeId, start: u64, count: u64, crash: Crash) -> Result<(), String> {
        let count = count.min(VOLUME_BYTES / BLOCK as u64 - start);
        let data = match self.rig.read_of(volume, start, count) {
            Ok(StoreReply::Read { data, .. }) => data,
            other => return Err(format!("{volume} b{start}: {other:?}")),
        };
        for (block, bytes) in (start..).zip(data.as_slice().chunks_exact(BLOCK)) {
            let found = sectors_of(bytes).map_err(|error| format!("{volume} b{block}: {error}"))?;
            let key = (volume, block);
            let versions = self.blocks.get(&key).cloned().unwrap_or_else(|| Versions::settled([0; 8]));
            let legal = versions.legal(crash);
            for (sector, value) in found.iter().enumerate() {
                if !legal.iter().any(|legal| legal[sector] == *value) {
                    return Err(format!("{volume} b{block} sector {sector} is {value} after {crash:?}: {versions:?}"));
                }
            }
            if found != [0; 8] || self.blocks.contains_key(&key) {
                self.blocks.insert(key, Versions::settled(found));
            }
        }
        Ok(())
    }
}
