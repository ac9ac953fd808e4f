//! What people call groups and volumes, and the sealed keys of those that are encrypted at rest, kept in the store's notes: so that
//! a rescue with nothing but a pool's disks (and the master key, for what is encrypted) has them.
//!
//! Nothing here decides anything: ids do, and what a volume is served with comes from the log. So this is written behind the
//! record and nobody waits for it, what finds no room is left out, and what is out of date is told as it is.

use crate::group::Group;
use crate::node::{Node, Purpose};
use pollux_base::record::GroupNames;
use pollux_base::{GroupId, KeyId, SealedKey, VolumeId};
use pollux_store::{NOTE_BYTES_MAX, StoreOp};
use serde::{Deserialize, Serialize};
use std::cmp::Reverse;
use std::collections::BTreeMap;

/// Set in the keys of notes with names; the number of the part lies in the bits from `PART_SHIFT` on. No log mints such groups.
const NAMES: u64 = 1 << 62;
const PART_SHIFT: u32 = 48;
/// Set besides in those of notes with sealed keys.
const KEYS: u64 = 1 << 61;
/// Notes of one group: some two thousand names of common length. A group may have more snapshots than that; the oldest go without.
const PARTS_MAX: u64 = 64;
/// Names leave so much of the catalog to volumes and records, a quarter of it.
const LEAVE_BYTES: usize = 256 << 10;
/// Sealed keys leave less: without its name a volume is found by its number, without its key it is lost.
const KEYS_LEAVE_BYTES: usize = 64 << 10;
/// First byte of a note with names, and of one with keys.
const NAMES_VERSION: u8 = 1;
const KEYS_VERSION: u8 = 2;

/// A note with names: a part of those of its group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Part {
    owner: String,
    volumes: Vec<(VolumeId, String)>,
}

impl Part {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![NAMES_VERSION];
        bytes.extend(postcard::to_stdvec(self).expect("text and numbers can always be written"));
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Part> {
        let (version, body) = bytes.split_first()?;
        postcard::from_bytes(body).ok().filter(|_| *version == NAMES_VERSION)
    }
}

/// The sealed key of a volume: as its log has it, in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct VolumeKey {
    volume: VolumeId,
    key: [u8; 16],
    master: [u8; 16],
    sealed: Vec<u8>,
}

impl VolumeKey {
    fn of(volume: VolumeId, sealed: &SealedKey) -> Option<VolumeKey> {
        let (key, master) = (sealed.key.0.to_be_bytes(), sealed.master.0.to_be_bytes());
        Some(VolumeKey { volume, key, master, sealed: sealed.bytes()? })
    }

    fn sealed(&self) -> SealedKey {
        let id = |bytes| KeyId(u128::from_be_bytes(bytes));
        SealedKey::of_bytes(id(self.key), id(self.master), &self.sealed)
    }

    fn encode(all: &[VolumeKey]) -> Vec<u8> {
        let mut bytes = vec![KEYS_VERSION];
        bytes.extend(postcard::to_stdvec(all).expect("bytes and numbers can always be written"));
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Vec<VolumeKey>> {
        let (version, body) = bytes.split_first()?;
        postcard::from_bytes(body).ok().filter(|_| *version == KEYS_VERSION)
    }
}

fn key(group: GroupId, part: u64) -> GroupId {
    GroupId(NAMES | part << PART_SHIFT | group.0)
}

/// Whether a note holds names or sealed keys.
pub(crate) fn is_names(note: GroupId) -> bool {
    note.0 & NAMES != 0 && note.0 & (1 << 63) == 0
}

fn group_of(note: GroupId) -> GroupId {
    GroupId(note.0 & ((1 << PART_SHIFT) - 1))
}

fn is_keys(note: GroupId) -> bool {
    is_names(note) && note.0 & KEYS != 0
}

/// The names and sealed keys that are on a pool, by group; `notes` as they are on its disks. What cannot be read is left out.
pub fn names<'a>(notes: impl IntoIterator<Item = (GroupId, &'a [u8])>) -> BTreeMap<GroupId, GroupNames> {
    let mut all: BTreeMap<GroupId, GroupNames> = BTreeMap::new();
    for (note, bytes) in notes {
        if is_keys(note) {
            let Some(keys) = VolumeKey::decode(bytes) else { continue };
            all.entry(group_of(note)).or_default().keys.extend(keys.iter().map(|key| (key.volume, key.sealed())));
        } else if is_names(note) {
            let Some(part) = Part::decode(bytes) else { continue };
            let names = all.entry(group_of(note)).or_default();
            names.owner = part.owner;
            names.volumes.extend(part.volumes);
        }
    }
    all
}

/// The notes for these names: own volumes first, then those of snapshots, the newest first.
fn notes(group: GroupId, names: &GroupNames) -> BTreeMap<GroupId, Vec<u8>> {
    let mut volumes: Vec<(VolumeId, String)> = names.volumes.iter().map(|(id, name)| (*id, name.clone())).collect();
    volumes.sort_by_key(|(volume, name)| (name.contains('@'), Reverse(*volume)));
    let mut parts = vec![Part { owner: names.owner.clone(), volumes: Vec::new() }];
    for volume in volumes {
        let last = parts.last_mut().expect("there is always one");
        last.volumes.push(volume);
        if last.encode().len() > NOTE_BYTES_MAX
            && let Some(volume) = last.volumes.pop()
        {
            let part = Part { owner: names.owner.clone(), volumes: vec![volume] };
            // What does not fit alone is no name that anybody could have given.
            if part.encode().len() <= NOTE_BYTES_MAX {
                parts.push(part);
            }
        }
    }
    let fits = |part: &Part| part.encode().len() <= NOTE_BYTES_MAX;
    let parts = parts.into_iter().filter(fits).take(PARTS_MAX as usize);
    (0..).zip(parts).map(|(number, part)| (key(group, number), part.encode())).collect()
}

/// The notes for its sealed keys.
fn key_notes(group: GroupId, names: &GroupNames) -> BTreeMap<GroupId, Vec<u8>> {
    let mut parts: Vec<Vec<VolumeKey>> = vec![Vec::new()];
    for volume in names.keys.iter().filter_map(|(volume, sealed)| VolumeKey::of(*volume, sealed)) {
        let last = parts.last_mut().expect("there is always one");
        last.push(volume);
        if VolumeKey::encode(last).len() > NOTE_BYTES_MAX {
            let volume = last.pop();
            parts.push(volume.into_iter().collect());
        }
    }
    let fits = |part: &Vec<u8>| part.len() <= NOTE_BYTES_MAX;
    let parts = parts.iter().filter(|part| !part.is_empty()).map(|part| VolumeKey::encode(part)).filter(fits);
    (0..PARTS_MAX).zip(parts).map(|(number, part)| (GroupId(key(group, number).0 | KEYS), part)).collect()
}

impl Group {
    /// Writes down what has changed of the names and sealed keys, once there is a replica here that they can lie beside.
    pub(crate) fn put_names(&mut self, node: &mut Node) {
        let Some(names) = self.names.as_ref().filter(|_| self.note.is_some() && node.pool_failed.is_none()) else {
            return;
        };
        let (keys, mut wanted) = (key_notes(self.id, names), notes(self.id, names));
        let there = self.names_asked.take().unwrap_or_else(|| names_there(node, self.id));
        let is_new = |(note, bytes): &(&GroupId, &Vec<u8>)| there.get(note) != Some(bytes);
        let mut room = node.store.catalog_room();
        for (notes, leave) in [(&keys, KEYS_LEAVE_BYTES), (&wanted, LEAVE_BYTES)] {
            let changed: Vec<(&GroupId, &Vec<u8>)> = notes.iter().filter(is_new).collect();
            let len = changed.iter().map(|(_, bytes)| bytes.len()).sum::<usize>();
            if room < leave + len {
                continue;
            }
            room -= len;
            for (note, bytes) in changed {
                let note = StoreOp::PutNote { group: *note, note: Some(bytes.clone()) };
                node.request(self.id, Purpose::Background, note);
            }
        }
        wanted.extend(keys);
        for note in there.keys().filter(|note| !wanted.contains_key(note)) {
            node.request(self.id, Purpose::Background, StoreOp::PutNote { group: *note, note: None });
        }
        self.names_asked = Some(wanted);
    }

    /// The group has no replica here any more.
    pub(crate) fn erase_names(&mut self, node: &mut Node) {
        let there = self.names_asked.take().unwrap_or_else(|| names_there(node, self.id));
        for note in there.into_keys() {
            node.request(self.id, Purpose::Background, StoreOp::PutNote { group: note, note: None });
        }
    }
}

fn names_there(node: &Node, group: GroupId) -> BTreeMap<GroupId, Vec<u8>> {
    let of_group = node.store.notes().filter(|(note, _)| is_names(*note) && group_of(*note) == group);
    of_group.map(|(note, bytes)| (note, bytes.to_vec())).collect()
}

/// For the fuzzer: a note with names is in the catalog of a pool.
pub(crate) fn fuzz(bytes: &[u8]) {
    if let Some(part) = Part::decode(bytes) {
        assert_eq!(Part::decode(&part.encode()), Some(part));
    }
    if let Some(keys) = VolumeKey::decode(bytes) {
        assert_eq!(VolumeKey::decode(&VolumeKey::encode(&keys)), Some(keys));
    }
}

pub(crate) fn fuzz_seed() -> Vec<u8> {
    Part { owner: "web1".to_string(), volumes: vec![(VolumeId(7), "vm/web1/disk0".to_string())] }.encode()
}

pub(crate) fn fuzz_seed_of_keys() -> Vec<u8> {
    let key = VolumeKey { volume: VolumeId(7), key: [1; 16], master: [2; 16], sealed: vec![3; 92] };
    VolumeKey::encode(&[key])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(snapshots: u64) -> GroupNames {
        let of_snapshot = |number: u64| (VolumeId(100 + number), format!("vm/web1/disk0@monday-{number}"));
        let own = (VolumeId(7), "vm/web1/disk0".to_string());
        let volumes = (0..snapshots).map(of_snapshot).chain([own]).collect();
        GroupNames { owner: "web1".to_string(), volumes, ..GroupNames::default() }
    }

    fn read(notes: &BTreeMap<GroupId, Vec<u8>>) -> BTreeMap<GroupId, GroupNames> {
        names(notes.iter().map(|(note, bytes)| (*note, bytes.as_slice())))
    }

    #[test]
    fn names_on_disk_stay_readable() {
        let bytes = b"\x01\x04web1\x01\x07\x0dvm/web1/disk0";
        assert_eq!(fuzz_seed(), bytes);
        assert_eq!(read(&[(key(GroupId(3), 0), bytes.to_vec())].into()), [(GroupId(3), named(0))].into());
        assert_eq!(read(&[(key(GroupId(3), 0), b"\x02\x00\x00".to_vec())].into()), BTreeMap::new(), "a later version");
        assert_eq!(read(&[(GroupId(3), bytes.to_vec())].into()), BTreeMap::new(), "a record's note has no names");
    }

    #[test]
    fn as_many_names_as_there_are_fit_into_notes_and_the_oldest_snapshots_go_without() {
        let some = named(500);
        let notes_of_some = notes(GroupId(3), &some);
        assert!(notes_of_some.len() > 10 && notes_of_some.values().all(|note| note.len() <= NOTE_BYTES_MAX));
        assert_eq!(read(&notes_of_some), [(GroupId(3), some)].into());
        let most = read(&notes(GroupId(3), &named(5000)));
        let most = &most[&GroupId(3)].volumes;
        assert!((1500..5000).contains(&most.len()));
        assert!(
            most.contains_key(&VolumeId(7)) && most.contains_key(&VolumeId(5099)) && !most.contains_key(&VolumeId(100))
        );
    }

    fn sealed(volume: u64) -> (VolumeId, SealedKey) {
        let id = |byte: u64| KeyId(u128::from(byte) << 120 | 1);
        (VolumeId(volume), SealedKey::of_bytes(id(volume), id(9), &[volume as u8; 92]))
    }

    #[test]
    fn sealed_keys_on_disk_stay_readable() {
        let names = GroupNames { keys: [sealed(7)].into(), ..GroupNames::default() };
        let notes = key_notes(GroupId(3), &names);
        let (note, bytes) = notes.first_key_value().expect("one");
        assert_eq!(note.0, 1 << 62 | 1 << 61 | 3);
        let id = |byte: u8| [&[byte][..], &[0; 14], &[1]].concat();
        assert_eq!(*bytes, [&[2, 1, 7][..], &id(7), &id(9), &[92], &[7; 92]].concat());
        assert_eq!(read(&notes), [(GroupId(3), names)].into());
        assert_eq!(read(&[(*note, b"\x03\x00".to_vec())].into()), BTreeMap::new(), "a later version");
    }

    #[test]
    fn each_of_as_many_disks_as_a_vm_has_keeps_its_sealed_key_beside_all_names() {
        let keys = (0..64).map(sealed).collect();
        let names = GroupNames { keys, ..named(500) };
        let mut all = key_notes(GroupId(3), &names);
        assert!(all.len() == 8 && all.values().all(|note| note.len() <= NOTE_BYTES_MAX));
        all.extend(notes(GroupId(3), &names));
        assert_eq!(read(&all), [(GroupId(3), names)].into());
        let damaged = SealedKey { sealed: "no digits".into(), ..sealed(1).1 };
        let names = GroupNames { keys: [(VolumeId(1), damaged)].into(), ..GroupNames::default() };
        assert_eq!(key_notes(GroupId(3), &names), BTreeMap::new(), "what is no sealed key is left out");
    }
}
