//! The catalog: which volumes there are, and the notes of the caller. Small, whole in memory, twice on disk.
//!
//! A change is written to the first copy, flushed, written to the second, flushed, then acknowledged. So one copy is whole
//! at any time, and of two whole ones the higher sequence is the newer.

use crate::NOTE_BYTES_MAX;
use crate::lanes::FamilyId;
use crate::layout::{BLOCK, BlockKind, CATALOG_BYTES, Header, seal, unseal};
use crate::slots::LayerId;
use crate::superblock::COUNT_MAX;
use pollux_base::checksum::crc32c;
use pollux_base::data::Buffer;
use pollux_base::unit::{BLOCK_BYTES, EXTENT_BYTES, VOLUME_BYTES_MAX};
use pollux_base::{ByteCount, Data, DiskId, ExtentIndex, Generation, GroupId, PoolId, VolumeId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Catalog {
    pub volumes: BTreeMap<VolumeId, Volume>,
    pub layers: BTreeMap<LayerId, Layer>,
    /// Layers made so far: a number is never given twice, so that what belonged to a layer that is gone cannot appear in
    /// another one.
    pub layers_made: u64,
    pub notes: BTreeMap<GroupId, Vec<u8>>,
    /// Changes so far that every disk of the pool makes: of two disks the one with more is ahead.
    pub changes: u64,
    pub members: BTreeMap<DiskId, Member>,
    /// Extents that may have been on a disk that is out, first and count: of those that live on no disk all is lost.
    pub lost: BTreeMap<FamilyId, Vec<(u32, u32)>>,
    /// An extent that is on its way here from a disk that is being drained. What there is of it counts only once the other
    /// disk has forgotten it.
    pub arriving: Option<(FamilyId, ExtentIndex)>,
}

/// The catalog of a disk, for another one of the same pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CatalogCopy(pub(crate) Box<Catalog>);

/// A disk of the pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    pub size: ByteCount,
    /// Where it was found, for whoever looks for it.
    pub path: String,
    pub state: MemberState,
    /// How often it had been opened when the pool last was: an image of an earlier day counts fewer.
    pub life: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemberState {
    Active,
    /// Takes nothing new, and gives up what it has.
    Draining,
    /// No longer a part of the pool, whatever it says itself.
    Out,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    pub group: GroupId,
    pub size: ByteCount,
    /// Where its writes go, and its reads begin.
    pub layer: LayerId,
}

/// What was written between two snapshots: extents with slots of their own. Where it has none, what lies beneath shows
/// through.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    pub family: FamilyId,
    pub parent: Option<LayerId>,
    /// What lies beneath counts the generations of another group: to this one it all counts as changed in this generation.
    pub foreign: Option<Generation>,
    /// What this layer took the place of when its volume was rolled back.
    pub replaced: Option<Replaced>,
}

/// Extents that a rollback changed, although they have no slot to tell (W8).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replaced {
    pub generation: Generation,
    /// First and count; a few more than were changed, so that they are not too many.
    pub extents: Vec<(u32, u32)>,
}

/// Ranges of one rollback, or of what one family lost. More are joined over their smallest gaps.
const RANGES_MAX: usize = 64;

/// Extents as ranges, first and count: at most `RANGES_MAX`, so with some that lie between.
pub fn few_ranges(extents: impl IntoIterator<Item = u32>) -> Vec<(u32, u32)> {
    let mut sorted: Vec<u32> = extents.into_iter().collect();
    sorted.sort_unstable();
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for extent in sorted {
        match ranges.last_mut() {
            Some((first, count)) if extent <= *first + *count => *count = (*count).max(extent - *first + 1),
            _ => ranges.push((extent, 1)),
        }
    }
    // The smallest gaps are closed until there are few enough ranges.
    while ranges.len() > RANGES_MAX {
        let gap = |at: usize| ranges[at + 1].0 - (ranges[at].0 + ranges[at].1);
        let mut gaps: Vec<u32> = (0..ranges.len() - 1).map(gap).collect();
        gaps.sort_unstable();
        let closed = gaps[ranges.len() - 1 - RANGES_MAX];
        let mut joined: Vec<(u32, u32)> = Vec::new();
        for (first, count) in ranges {
            match joined.last_mut() {
                Some((start, len)) if first - (*start + *len) <= closed => *len = first + count - *start,
                _ => joined.push((first, count)),
            }
        }
        ranges = joined;
    }
    ranges
}

impl Replaced {
    pub fn new(generation: Generation, extents: impl IntoIterator<Item = u32>) -> Replaced {
        Replaced { generation, extents: few_ranges(extents) }
    }

    pub fn iter(&self) -> impl Iterator<Item = u32> {
        self.extents.iter().flat_map(|(first, count)| *first..*first + *count)
    }
}

impl Catalog {
    /// A new layer on top of another, or the first of a new family.
    pub fn new_layer(&mut self, parent: Option<LayerId>) -> LayerId {
        self.layers_made += 1;
        let id = LayerId(self.layers_made);
        let family = parent.and_then(|parent| self.layers.get(&parent)).map_or(FamilyId(id.0), |layer| layer.family);
        self.layers.insert(id, Layer { family, parent, foreign: None, replaced: None });
        id
    }

    /// The layer and all beneath it, from the top.
    pub fn chain(&self, layer: LayerId) -> impl Iterator<Item = LayerId> {
        std::iter::successors(Some(layer), |layer| self.layers.get(layer).and_then(|layer| layer.parent))
    }

    /// Each volume gets a new layer, and the snapshot keeps the one before. What is done already is left alone.
    pub fn snapshot(&mut self, of: &[(VolumeId, VolumeId)]) {
        for (volume, snapshot) in of {
            if self.volumes.contains_key(snapshot) {
                continue;
            }
            let Some(known) = self.volumes.get(volume).copied() else { continue };
            let layer = self.new_layer(Some(known.layer));
            self.volumes.insert(*snapshot, known);
            self.volumes.insert(*volume, Volume { layer, ..known });
        }
    }

    /// The volume goes on from a snapshot, on a new layer that remembers where that may have changed it. The same again,
    /// under the same generation, is done already.
    pub fn roll_back(&mut self, volume: VolumeId, to: VolumeId, generation: Generation, extents: &[ExtentIndex]) {
        let Some((known, ground)) = self.volumes.get(&volume).copied().zip(self.volumes.get(&to).copied()) else {
            return;
        };
        // What it goes back from may itself have come about by going back.
        let kept: BTreeSet<LayerId> = self.chain(ground.layer).collect();
        let left = self.chain(known.layer).filter(|layer| !kept.contains(layer));
        let before = left.filter_map(|layer| self.layers.get(&layer)?.replaced.as_ref());
        let changed: BTreeSet<u32> =
            extents.iter().map(|extent| extent.0).chain(before.flat_map(Replaced::iter)).collect();
        let is_done = |layer: &Layer| {
            layer.parent == Some(ground.layer) && layer.replaced.as_ref().is_some_and(|r| r.generation == generation)
        };
        if self.layers.get(&known.layer).is_some_and(is_done) {
            return;
        }
        let layer = self.new_layer(Some(ground.layer));
        let top = self.layers.get_mut(&layer).expect("it was just made");
        top.replaced = Some(Replaced::new(generation, changed));
        top.foreign = (ground.group != known.group).then_some(generation);
        self.volumes.insert(volume, Volume { layer, ..known });
    }

    /// A new volume that begins as a copy of another.
    pub fn clone_of(&mut self, of: VolumeId, volume: VolumeId, group: GroupId, generation: Generation) {
        let Some(known) = self.volumes.get(&of).copied().filter(|_| !self.volumes.contains_key(&volume)) else {
            return;
        };
        let layer = self.new_layer(Some(known.layer));
        self.layers.get_mut(&layer).expect("it was just made").foreign = Some(generation);
        self.volumes.insert(volume, Volume { group, layer, ..known });
    }

    /// Takes out the layers that nothing names and on which nothing lies. Gives them.
    pub fn prune(&mut self) -> Vec<LayerId> {
        let mut gone = Vec::new();
        loop {
            let needed: BTreeSet<LayerId> = self
                .volumes
                .values()
                .map(|volume| volume.layer)
                .chain(self.layers.values().filter_map(|layer| layer.parent))
                .collect();
            let unneeded: Vec<LayerId> = self.layers.keys().filter(|layer| !needed.contains(layer)).copied().collect();
            if unneeded.is_empty() {
                return gone;
            }
            for layer in unneeded {
                self.layers.remove(&layer);
                gone.push(layer);
            }
        }
    }

    /// A layer that no volume names and on which one other lies: the two can be made one.
    pub fn mergeable(&self, except: &BTreeSet<LayerId>) -> Option<(LayerId, LayerId)> {
        self.layers.keys().filter(|parent| !except.contains(parent)).find_map(|parent| {
            if self.volumes.values().any(|volume| volume.layer == *parent) {
                return None;
            }
            let mut children = self.layers.iter().filter(|(_, layer)| layer.parent == Some(*parent));
            match (children.next(), children.next()) {
                (Some((child, _)), None) => Some((*parent, *child)),
                _ => None,
            }
        })
    }

    /// What this disk missed of the pool's changes, from one that has them. Layers that were made one there and not yet here
    /// stay as they are here.
    pub fn adopt(&mut self, ahead: Catalog) {
        let mut layers = self.layers.clone();
        for (id, layer) in ahead.layers {
            layers.entry(id).or_insert(layer);
        }
        *self = Catalog { layers, arriving: self.arriving, ..ahead };
    }

    /// The parent, which has no slots any more, is gone; what it remembered goes to its child.
    pub fn merge(&mut self, parent: LayerId, child: LayerId) {
        let Some(below) = self.layers.remove(&parent) else { return };
        let Some(above) = self.layers.get_mut(&child) else { return };
        above.parent = below.parent;
        let foreign = above.foreign;
        let below_replaced = below.replaced.map(|r| Replaced { generation: foreign.unwrap_or(r.generation), ..r });
        above.foreign = foreign.or(below.foreign);
        above.replaced = match (above.replaced.take(), below_replaced) {
            (Some(one), Some(two)) => {
                let generation = one.generation.max(two.generation);
                Some(Replaced::new(generation, one.iter().chain(two.iter())))
            }
            (one, two) => one.or(two),
        };
    }

    /// Volumes whose layer is not there.
    pub fn volumes_without_layer(&self) -> impl Iterator<Item = (VolumeId, LayerId)> {
        let known = self.volumes.iter().map(|(volume, known)| (*volume, known.layer));
        known.filter(|(_, layer)| !self.layers.contains_key(layer))
    }

    /// Layers that lie on one that is not there. A chain goes down to older layers only, so it ends.
    pub fn layers_without_parent(&self) -> impl Iterator<Item = LayerId> {
        let is_broken = |id: LayerId, parent: LayerId| parent >= id || !self.layers.contains_key(&parent);
        let broken =
            move |(id, layer): (&LayerId, &Layer)| layer.parent.filter(|parent| is_broken(*id, *parent)).map(|_| *id);
        self.layers.iter().filter_map(broken)
    }

    fn body(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("numbers and bytes can always be written")
    }

    /// Whether it fits into its place on disk with `note_bytes` more of notes, or another volume with its layer. Reckons
    /// the longest form of each number.
    pub fn fits(&self, note_bytes: usize) -> bool {
        self.reckoned() + note_bytes <= CATALOG_BYTES - BLOCK
    }

    /// Bytes of notes that it can hold besides another volume.
    pub fn room(&self) -> usize {
        (CATALOG_BYTES - BLOCK).saturating_sub(self.reckoned())
    }

    fn reckoned(&self) -> usize {
        const VOLUME_BYTES: usize = 40;
        const LAYER_BYTES: usize = 56;
        const REPLACED_BYTES: usize = 10;
        const NOTE_BYTES: usize = 20;
        const MEMBER_BYTES: usize = 80;
        let entries = (1 + self.volumes.len()) * VOLUME_BYTES
            + (1 + self.layers.len()) * LAYER_BYTES
            + self.replaced_ranges() * REPLACED_BYTES
            + (2 + self.notes.len()) * NOTE_BYTES;
        let notes: usize = self.notes.values().map(Vec::len).sum();
        let members: usize = self.members.values().map(|member| MEMBER_BYTES + member.path.len()).sum();
        let lost: usize = self.lost.values().map(|ranges| VOLUME_BYTES + ranges.len() * REPLACED_BYTES).sum();
        entries + notes + members + lost
    }

    fn replaced_ranges(&self) -> usize {
        self.layers.values().filter_map(|layer| layer.replaced.as_ref()).map(|replaced| replaced.extents.len()).sum()
    }

    /// Bytes of the body.
    pub fn encoded_len(&self) -> usize {
        self.body().len()
    }

    /// Header block, then the body.
    pub fn encode(&self, sequence: u64, pool: PoolId) -> Data {
        let body = self.body();
        assert!(body.len() <= CATALOG_BYTES - BLOCK, "whether it fits was asked before");
        let mut buffer = Buffer::zeroed((BLOCK + body.len()).next_multiple_of(BLOCK));
        let (head, tail) = buffer.as_mut_slice().split_at_mut(BLOCK);
        tail[..body.len()].copy_from_slice(&body);
        let one = u64::from(crc32c(&body));
        let header = Header { kind: BlockKind::Catalog, part: 0, sequence, one, two: 0, len: body.len() };
        seal(head, pool, header, &[]);
        buffer.freeze()
    }

    /// Bytes of the body that belongs to this head, if the head is whole.
    pub fn body_len(head: &[u8], pool: PoolId) -> Option<usize> {
        let (header, _) = unseal(head, BlockKind::Catalog, Some(pool)).ok()?;
        Some(header.len.min(CATALOG_BYTES - BLOCK))
    }

    /// A copy as read, with its sequence; `None` if it is damaged.
    pub fn decode(bytes: &[u8], pool: PoolId) -> Option<(u64, Catalog)> {
        let (head, tail) = bytes.split_at_checked(BLOCK)?;
        let (header, _) = unseal(head, BlockKind::Catalog, Some(pool)).ok()?;
        let body = tail.get(..header.len)?;
        if u64::from(crc32c(body)) != header.one {
            return None;
        }
        let (catalog, rest) = postcard::take_from_bytes::<Catalog>(body).ok()?;
        let can_be = header.sequence < COUNT_MAX && catalog.can_be();
        (rest.is_empty() && can_be).then_some((header.sequence, catalog))
    }

    /// Whether a store can have written it. What could not is damage, and nothing later runs over.
    fn can_be(&self) -> bool {
        let is_size = |size: ByteCount| (1..=VOLUME_BYTES_MAX).contains(&size.0) && size.0.is_multiple_of(BLOCK_BYTES);
        let is_range = |(first, count): &(u32, u32)| {
            u64::from(*first) + u64::from(*count) <= VOLUME_BYTES_MAX.div_ceil(EXTENT_BYTES)
        };
        let replaced = self.layers.values().filter_map(|layer| layer.replaced.as_ref());
        self.layers_made < COUNT_MAX
            && self.changes < COUNT_MAX
            && self.members.values().all(|member| member.life < COUNT_MAX)
            && replaced.flat_map(|replaced| &replaced.extents).chain(self.lost.values().flatten()).all(is_range)
            && self.layers.keys().all(|layer| layer.0 <= self.layers_made)
            && self.volumes.values().all(|volume| is_size(volume.size))
            && self.notes.values().all(|note| note.len() <= NOTE_BYTES_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_snapshots() -> Catalog {
        let mut catalog = Catalog::default();
        let layer = catalog.new_layer(None);
        catalog.volumes.insert(VolumeId(1), Volume { group: GroupId(1), size: ByteCount(4096), layer });
        catalog.snapshot(&[(VolumeId(1), VolumeId(2))]);
        catalog.snapshot(&[(VolumeId(1), VolumeId(3))]);
        catalog
    }

    #[test]
    fn a_layer_stays_as_long_as_something_names_it_or_lies_on_it() {
        let mut catalog = with_snapshots();
        assert_eq!(catalog.chain(LayerId(3)).collect::<Vec<_>>(), [LayerId(3), LayerId(2), LayerId(1)]);
        catalog.volumes.remove(&VolumeId(2));
        assert_eq!((catalog.prune(), catalog.mergeable(&BTreeSet::new())), (vec![], Some((LayerId(1), LayerId(2)))));
        catalog.clone_of(VolumeId(3), VolumeId(4), GroupId(2), Generation(1));
        catalog.volumes.remove(&VolumeId(3));
        assert_eq!(catalog.mergeable(&BTreeSet::new()), Some((LayerId(1), LayerId(2))), "layer 2 has two children");
        catalog.merge(LayerId(1), LayerId(2));
        assert_eq!(catalog.mergeable(&BTreeSet::new()), None);
        catalog.volumes.remove(&VolumeId(1));
        catalog.volumes.remove(&VolumeId(4));
        let mut gone = catalog.prune();
        gone.sort_unstable();
        assert_eq!(gone, [LayerId(2), LayerId(3), LayerId(4)]);
        assert!(catalog.layers.is_empty());
    }

    #[test]
    fn a_snapshot_that_is_there_is_left_alone() {
        let mut catalog = with_snapshots();
        let before = catalog.clone();
        catalog.snapshot(&[(VolumeId(1), VolumeId(2))]);
        assert_eq!(catalog, before);
    }

    #[test]
    fn what_a_rollback_changed_is_kept_in_few_ranges_and_none_is_lost() {
        let extents: Vec<u32> = (0..500).map(|at| at * 7 + at % 3).collect();
        let replaced = Replaced::new(Generation(1), extents.iter().copied());
        assert!(replaced.extents.len() <= RANGES_MAX);
        let kept: BTreeSet<u32> = replaced.iter().collect();
        assert!(extents.iter().all(|extent| kept.contains(extent)));
    }
}
