//! Each code is provoked by damage of a pool that was in use.

use super::*;
use crate::catalog::{Catalog, Layer, Member};
use crate::fuzz::IDENTITY;
use crate::fuzz::pool::used;
use crate::lanes::FamilyId;
use crate::layout::{ANCHORS, BLOCK, BlockKind, CATALOGS, HEADER_BYTES, Header, SUPERBLOCKS};
use crate::leaf::{LOST_CHECKSUM, LeafOwner, SUMS};
use crate::record::{Record, pack};
use crate::slots::{LayerId, Slot, SlotState};
use crate::superblock::{Superblock, sealed};
use crate::{Disks, MemberState, POOL_BYTES_MIN, PoolIdentity};
use pollux_base::checksum::crc32c;
use pollux_base::unit::BLOCK_BYTES;
use pollux_base::{BlockChecksum, DiskId, ExtentIndex, Generation, PoolId, VolumeId};
use std::collections::BTreeSet;

fn verified(disk: &mut FaultyDisk) -> Verified {
    verify(&mut [disk], true, &mut |_| {})
}

fn codes(disks: &mut [&mut dyn ReadDisk]) -> BTreeSet<&'static str> {
    let verified = verify(disks, true, &mut |_| {});
    for finding in &verified.findings {
        assert!(!finding.what.is_empty() && !finding.fix.is_empty(), "{finding:?}");
    }
    verified.findings.iter().map(|finding| finding.code.text()).collect()
}

/// What is found after this was done to a pool in use.
fn found(damage: impl FnOnce(&mut FaultyDisk, &Inspected)) -> BTreeSet<&'static str> {
    let mut disk = used().clone();
    let known = inspected(&mut disk);
    damage(&mut disk, &known);
    codes(&mut [&mut disk])
}

fn inspected(disk: &mut FaultyDisk) -> Inspected {
    Inspected::of(disk, None, &mut Findings::default()).expect("it is a pool")
}

fn only(code: &'static str) -> BTreeSet<&'static str> {
    BTreeSet::from([code])
}

/// Writes both copies of the catalog anew.
fn change_catalog(disk: &mut FaultyDisk, known: &Inspected, change: impl FnOnce(&mut Catalog)) {
    let mut catalog = known.found.catalog.clone();
    change(&mut catalog);
    let bytes = catalog.encode(known.found.catalog_sequence + 1, known.superblock.identity.pool);
    CATALOGS.iter().for_each(|start| disk.write_now(*start, bytes.as_slice()));
}

/// Says something more in the journal.
fn append(disk: &mut FaultyDisk, known: &Inspected, records: &[Record]) {
    let (blocks, packed) = pack(records.iter(), 64);
    assert_eq!(packed, records.len());
    let (life, end) = (known.found.anchor.log_life, known.found.journal_end);
    for (payload, sequence) in blocks.iter().zip(end..) {
        let header = Header { kind: BlockKind::Journal, part: 0, sequence, one: life, two: end, len: payload.len() };
        let place = known.superblock.geometry.ring.offset(sequence);
        disk.write_now(place, sealed(known.superblock.identity.pool, header, payload).as_slice());
    }
}

fn say_slot(disk: &mut FaultyDisk, known: &Inspected, slot: u32, descriptor: Slot) {
    append(disk, known, &[Record::Slot { slot, descriptor: Box::new(descriptor) }]);
}

/// A slot that is not hot and has a leaf.
fn cold(known: &Inspected) -> (u32, Slot) {
    let is_cold = |slot: &Slot| slot.leaf.is_some() && !known.found.hot.contains_key(&slot.owner());
    let cold = (0..).zip(&known.found.slots).find(|(_, slot)| slot.state == SlotState::Data && is_cold(slot));
    cold.map(|(number, slot)| (number, slot.clone())).expect("the pool has a cold extent")
}

fn superblock_of(identity: PoolIdentity, known: &Inspected) -> Vec<u8> {
    Superblock { identity, geometry: known.superblock.geometry }.encode().as_slice().to_vec()
}

#[test]
fn a_pool_in_use_is_clean_and_its_data_is_checked() {
    let mut disk = used().clone();
    let verified = verified(&mut disk);
    assert_eq!(verified.findings, []);
    assert!(verified.pool.checked_blocks > 0 && verified.pool.hot_blocks > 0, "{verified:?}");
    assert!(verified.pool.used_bytes > 0 && verified.pool.free_bytes > verified.pool.used_bytes);
    assert_eq!(disk.counts().reads, used().counts().reads, "it goes through no queue of the disk's");
}

#[test]
fn every_code_is_of_its_own_and_told_in_the_operating_guide() {
    let texts: BTreeSet<&str> = Code::ALL.iter().map(|code| code.text()).collect();
    assert_eq!(texts.len(), Code::ALL.len());
    let guide = include_str!("../../../../docs/operating/pools.md");
    for code in texts {
        assert!(guide.contains(&format!("| {code} |")), "{code} is not in docs/operating/pools.md");
    }
}

#[test]
fn damaged_copies_are_told_from_damage_of_both() {
    type Places = [u64; 2];
    let table: Places = inspected(&mut used().clone()).superblock.geometry.tables;
    let all: [(Places, &str, &str); 4] =
        [(SUPERBLOCKS, "V001", "V002"), (ANCHORS, "V010", "V011"), (CATALOGS, "V020", "V021"), (table, "V030", "V031")];
    for (places, one, both) in all {
        for place in places {
            assert_eq!(found(|disk, _| disk.rot(place + 100)), only(one), "{one}");
        }
        let found = found(|disk, _| places.iter().for_each(|place| disk.rot(place + 100)));
        assert!(found.contains(both) && !found.contains(one), "{both}: {found:?}");
    }
    assert_eq!(codes(&mut [&mut FaultyDisk::new(POOL_BYTES_MIN, 1)]), only("V002"));
    assert_eq!(codes(&mut [&mut FaultyDisk::new(0, 1)]), only("V002"));
}

#[test]
fn a_disk_that_is_another_or_has_another_size_is_told() {
    let other = found(|disk, known| {
        let identity = PoolIdentity { pool: PoolId(9), ..IDENTITY };
        disk.write_now(SUPERBLOCKS[1], &superblock_of(identity, known));
    });
    assert_eq!(other, only("V003"));
    let mut longer = FaultyDisk::new(POOL_BYTES_MIN + BLOCK_BYTES, 1);
    used().blocks().for_each(|(number, block)| longer.write_now(number * BLOCK_BYTES, block));
    assert_eq!(codes(&mut [&mut longer]), only("V004"));
}

#[test]
fn a_journal_that_lost_what_was_promised_or_names_what_is_not_there_is_told() {
    let hole = found(|disk, known| disk.rot(known.superblock.geometry.ring.offset(known.found.anchor.tail) + 70));
    assert!(hole.contains("V040"), "{hole:?}");
    assert_eq!(found(|disk, known| say_slot(disk, known, u32::MAX, Slot::default())), only("V041"));
    let many = found(|disk, known| {
        let (layer, generation) = (cold(known).1.layer, Generation(1));
        let extents =
            (0..=known.superblock.geometry.ring.hot_marks_max() as u32).map(|extent| ExtentIndex(5000 + extent));
        let marks: Vec<Record> = extents.map(|extent| Record::Hot { layer, extent, generation }).collect();
        append(disk, known, &marks);
    });
    assert_eq!(many, only("V062"));
}

#[test]
fn slots_that_contradict_each_other_are_told() {
    let free = |known: &Inspected| known.found.slots.len() as u32 + 3;
    let beyond = found(|disk, known| {
        let slot = Slot { extent: u32::MAX, leaf: None, units: Default::default(), ..cold(known).1 };
        say_slot(disk, known, free(known), slot);
    });
    assert_eq!(beyond, only("V050"));
    let twice = found(|disk, known| {
        let slot = Slot { leaf: None, units: Default::default(), ..cold(known).1 };
        say_slot(disk, known, free(known), slot);
    });
    assert_eq!(twice, only("V051"));
    let unit = found(|disk, known| {
        let slot = Slot { extent: 1000, leaf: None, state: SlotState::Data, ..cold(known).1 };
        say_slot(disk, known, free(known), slot);
    });
    assert_eq!(unit, only("V052"));
    let leaf = found(|disk, known| {
        let slot = Slot { extent: 1000, units: Default::default(), ..cold(known).1 };
        say_slot(disk, known, free(known), slot);
    });
    // The leaf is another slot's, so for this one it says nothing.
    assert!(leaf.contains("V053"), "{leaf:?}");
    let leaked = found(|disk, known| {
        let (number, slot) = cold(known);
        say_slot(disk, known, number, Slot { state: SlotState::Empty, leaf: None, ..slot });
    });
    assert_eq!(leaked, only("V054"));
}

#[test]
fn volumes_and_layers_that_lead_nowhere_are_told() {
    let layer = |parent| Layer { family: FamilyId(1), parent, foreign: None, replaced: None };
    let unseen = found(|disk, known| change_catalog(disk, known, |c| assert_ne!(c.new_layer(None), LayerId(0))));
    assert_eq!(unseen, only("V054"));
    let nowhere = found(|disk, known| {
        change_catalog(disk, known, |catalog| {
            catalog.volumes.get_mut(&VolumeId(1)).expect("it is there").layer = LayerId(0);
        });
    });
    // What the volume's own layer holds nobody shows now.
    assert_eq!(nowhere, BTreeSet::from(["V054", "V060"]));
    for parent in [LayerId(0), LayerId(2)] {
        let loops = found(|disk, known| {
            change_catalog(disk, known, |catalog| drop(catalog.layers.insert(LayerId(1), layer(Some(parent)))));
        });
        assert_eq!(loops, only("V061"), "a layer on {parent:?}");
    }
}

#[test]
fn damaged_checksums_and_data_are_told() {
    let place = |known: &Inspected| {
        let (_, slot) = cold(known);
        known.superblock.geometry.leaf_offset(slot.leaf.expect("it has one")).0
    };
    let data = |known: &Inspected| {
        let (_, unit) = cold(known).1.units.iter().next().expect("it has one");
        known.superblock.geometry.offset(unit, 0).0
    };
    assert_eq!(found(|disk, known| disk.rot(place(known) + 200)), only("V070"));
    assert_eq!(found(|disk, known| disk.rot(data(known) + 9)), only("V080"));
    let placeless = found(|disk, known| {
        let (number, slot) = cold(known);
        say_slot(disk, known, number, Slot { units: Default::default(), ..slot });
    });
    assert_eq!(placeless, only("V071"));
    let lost = found(|disk, known| {
        let (number, slot) = cold(known);
        let mut sums = [BlockChecksum::ZERO; SUMS];
        sums[0] = LOST_CHECKSUM;
        let owner = LeafOwner { slot: number, sequence: slot.leaf_sequence };
        let leaf = crate::leaf::encode(&sums, owner, known.superblock.identity.pool);
        disk.write_now(place(known), leaf.as_slice());
    });
    assert_eq!(lost, only("V072"));

    /// A disk of which a spot cannot be read.
    struct Spot(FaultyDisk, u64);
    impl ReadDisk for Spot {
        fn size(&self) -> ByteCount {
            ByteCount(self.0.size())
        }
        fn read(&mut self, offset: ByteCount, len: usize) -> Option<Data> {
            let is_there = (offset.0..offset.0 + len as u64).contains(&self.1);
            if is_there { None } else { ReadDisk::read(&mut self.0, offset, len) }
        }
    }
    let mut disk = used().clone();
    let spot = data(&inspected(&mut disk));
    assert_eq!(codes(&mut [&mut Spot(disk, spot)]), only("V081"));
}

#[test]
fn disks_that_are_missing_foreign_old_or_hold_the_same_are_told() {
    let made = |identity: PoolIdentity, ids: &[u128]| -> Vec<FaultyDisk> {
        let members: Vec<_> = ids.iter().map(|id| (DiskId(*id), ByteCount(POOL_BYTES_MIN), format!("d{id}"))).collect();
        let formatted = Disks::format(identity, &members).expect("legal sizes");
        let disk = |ops: Vec<_>| {
            let mut disk = FaultyDisk::new(POOL_BYTES_MIN, 1);
            for op in ops {
                disk.submit(op);
                disk.complete_all();
            }
            disk
        };
        formatted.into_iter().map(disk).collect()
    };
    let [mut one, mut two] = made(IDENTITY, &[1, 2]).try_into().map_err(drop).expect("two disks");
    assert_eq!(codes(&mut [&mut one, &mut two]), BTreeSet::new());
    assert_eq!(codes(&mut [&mut one]), only("V090"));
    let mut copy = one.clone();
    assert_eq!(codes(&mut [&mut one, &mut two, &mut copy]), only("V091"));
    let mut other = made(PoolIdentity { pool: PoolId(5), ..IDENTITY }, &[3]).remove(0);
    assert!(codes(&mut [&mut one, &mut two, &mut other]).contains("V091"));
    let known = inspected(&mut one);
    let with = |disk: &mut FaultyDisk, change: &dyn Fn(&mut Member)| {
        change_catalog(disk, &known, |catalog| {
            catalog.changes += 1;
            catalog.members.values_mut().skip(1).for_each(change);
        });
    };
    let mut knows_more = one.clone();
    with(&mut knows_more, &|member| member.life = 7);
    assert_eq!(codes(&mut [&mut knows_more, &mut two]), only("V092"));
    let mut without = one.clone();
    with(&mut without, &|member| member.state = MemberState::Out);
    assert_eq!(codes(&mut [&mut without, &mut two]), only("V091"));

    let mut disk = used().clone();
    let known = inspected(&mut disk);
    let mut copy = disk.clone();
    for place in SUPERBLOCKS {
        copy.write_now(place, &superblock_of(PoolIdentity { disk: DiskId(77), ..IDENTITY }, &known));
    }
    assert_eq!(codes(&mut [&mut disk, &mut copy]), only("V093"));
}

/// Whatever the bytes are: no panic, an end, and nothing that is not a finding.
#[test]
fn flipped_bytes_lead_to_findings_and_never_to_a_panic() {
    let places: Vec<u64> = used().blocks().map(|(number, _)| number * BLOCK_BYTES).collect();
    let mut told = 0;
    for seed in 0..400 {
        let mut luck = crate::faulty_disk::Luck::new(seed);
        let mut disk = used().clone();
        for _ in 0..=luck.below(6) {
            let place = places[luck.below(places.len() as u64) as usize];
            let mut block = disk.read_now(place, BLOCK);
            for _ in 0..=luck.below(3) {
                let bound = if luck.one_in(2) { 160 } else { BLOCK as u64 };
                let at = luck.below(bound) as usize;
                block[at] = luck.draw() as u8;
            }
            // A bad block with a right checksum is a block that a program with a fault wrote.
            if luck.one_in(2) && block.starts_with(b"PolluxMB") {
                block[HEADER_BYTES - 4..HEADER_BYTES].fill(0);
                let crc = crc32c(&block);
                block[HEADER_BYTES - 4..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
            }
            disk.write_now(place, &block);
        }
        told += usize::from(!verified(&mut disk).findings.is_empty());
        let rescue = Rescue::of(&mut [&mut disk]);
        for volume in rescue.volumes() {
            let mut end = 0;
            let mut write = |at: ByteCount, bytes: &[u8]| {
                assert!(at.0 >= end && at.0 + bytes.len() as u64 <= volume.size.0, "in order, and inside the volume");
                end = at.0 + bytes.len() as u64;
                true
            };
            let export = rescue.export(&mut [&mut disk], volume.volume, &mut write, &mut |_| {});
            assert!(export.is_some(), "a volume that is listed can be exported");
        }
    }
    // What an earlier life left in the journal matters to nobody.
    assert!(told > 200, "most of it is noticed: {told}");
}
