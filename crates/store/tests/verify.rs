//! What `verify` says of pools as they come about, and what `rescue` gets out of them when they are damaged.

mod common;

use common::history::{Crash, History};
use common::*;
use pollux_base::unit::BlockRange;
use pollux_base::{BlockCount, BlockIndex, ByteCount, DiskId, VolumeId};
use pollux_store::faulty_disk::{FaultyDisk, Luck};
use pollux_store::verify::{Export, ReadDisk, Rescue, Severity, Verified, verify};
use pollux_store::{Disks, StoreOp};
use std::collections::BTreeMap;

const ANCHORS: [u64; 2] = [4096, (1 << 20) + 4096];
const CATALOGS: [u64; 2] = [2 << 20, 3 << 20];

fn readers(disks: &mut [FaultyDisk]) -> Vec<&mut dyn ReadDisk> {
    disks.iter_mut().map(|disk| disk as &mut dyn ReadDisk).collect()
}

fn verified(disks: &mut [FaultyDisk]) -> Verified {
    verify(&mut readers(disks), true, &mut |_| {})
}

fn disks_of(rig: &mut Rig) -> Vec<FaultyDisk> {
    rig.disks_mut().map(|disk| disk.clone()).collect()
}

/// Whatever happened to a pool: when it is open, or was left in peace, nothing is wrong with it; and what a crash leaves is
/// never an error, only a copy of which the other one is whole.
#[test]
fn every_state_that_histories_reach_is_clean() {
    let (mut checked, mut warned, mut snapshots) = (0, 0, 0);
    for seed in 5_000_010..5_000_030 {
        let mut luck = Luck::new(seed);
        let mut history = if seed % 3 == 0 { History::with_disks(seed) } else { History::new(seed) };
        for round in 0..5 {
            history.run(luck.below(500)).unwrap_or_else(|error| panic!("seed {seed}, run: {error}"));
            let mut crashed = disks_of(&mut history.rig);
            let crash = if luck.one_in(2) { Crash::Kill } else { Crash::PowerCut };
            for disk in &mut crashed {
                match crash {
                    Crash::Kill => disk.kill(luck.draw()),
                    Crash::PowerCut => disk.power_cut(luck.draw()),
                }
            }
            let found = verified(&mut crashed);
            // A disk that was about to join when everything stopped is not one yet.
            if crashed.len() == 1 {
                let errors = found.findings.iter().filter(|finding| finding.severity == Severity::Error);
                assert_eq!(errors.count(), 0, "seed {seed}, round {round}, {crash:?}: {:?}", found.findings);
                warned += found.findings.len();
            }
            history = history.crash(crash).unwrap_or_else(|error| panic!("seed {seed}, crash: {error}"));
            let found = verified(&mut disks_of(&mut history.rig));
            assert_eq!(found.findings, [], "seed {seed}, round {round}, open after {crash:?}");
            checked += found.pool.checked_blocks;
            snapshots = snapshots.max(found.pool.volumes);
        }
        history.rig.settle();
        let found = verified(&mut disks_of(&mut history.rig));
        let at_rest: Vec<_> = found.findings.iter().filter(|f| f.code.text() != "V091").collect();
        assert!(at_rest.is_empty(), "seed {seed}, at rest: {at_rest:?}");
    }
    assert!(checked > 1000 && snapshots > 3, "{checked} blocks, {snapshots} volumes");
    assert!(warned < 100, "torn copies are rare: {warned}");
}

/// The blocks of a volume that were given, by their first byte.
fn exported(disks: &mut [FaultyDisk], volume: VolumeId) -> (BTreeMap<u64, u8>, Export) {
    let mut disks = readers(disks);
    let rescue = Rescue::of(&mut disks);
    let mut blocks = BTreeMap::new();
    let mut write = |at: ByteCount, bytes: &[u8]| {
        blocks.insert(at.0 / BLOCK as u64, uniform(bytes));
        true
    };
    let export = rescue.export(&mut disks, volume, &mut write, &mut |_| {}).expect("the volume is there");
    (blocks, export)
}

/// A volume with cold and hot extents, a hole, a snapshot, and writes above it.
fn used() -> Rig {
    let mut rig = Rig::fresh();
    rig.done(StoreOp::PutNote { group: GROUP, note: Some(b"note".to_vec()) });
    rig.heat(&[0, 1, 2], 3);
    rig.write(0, &[1; 8]);
    rig.write(1024, &[2; 8]);
    rig.cool(&[0, 1, 2]);
    rig.done(StoreOp::Snapshot { of: vec![(VOLUME, VolumeId(2))] });
    rig.heat(&[0, 1], 4);
    rig.write(2, &[3; 2]);
    rig.zero(1024, 4);
    rig.cool(&[0]);
    rig.flush();
    rig
}

fn expected() -> BTreeMap<u64, u8> {
    [(0, 1), (1, 1), (2, 3), (3, 3), (4, 1), (5, 1), (6, 1), (7, 1), (1028, 2), (1029, 2), (1030, 2), (1031, 2)].into()
}

#[test]
fn a_rescue_lists_volumes_with_what_they_lie_on_and_gives_what_they_show() {
    let mut disks = disks_of(&mut used());
    let rescue = Rescue::of(&mut readers(&mut disks));
    assert!(rescue.findings.is_empty() && rescue.missing.is_empty());
    assert_eq!(rescue.identity(), Some(IDENTITY));
    let [volume, snapshot] = rescue.volumes().try_into().expect("two volumes");
    assert_eq!((volume.volume, volume.group, volume.size), (VOLUME, GROUP, ByteCount(32 << 20)));
    assert_eq!((volume.lies_on, snapshot.lies_on), (vec![VolumeId(2)], vec![]));
    for one in [VOLUME, VolumeId(2)] {
        assert_eq!(rescue.relatives(one), [VOLUME, VolumeId(2)], "they share what is stored");
    }
    assert_eq!(rescue.relatives(VolumeId(77)), []);
    assert_eq!(rescue.notes(), BTreeMap::from([(GROUP, b"note".to_vec())]));

    let before = disks.clone();
    let (blocks, export) = exported(&mut disks, VOLUME);
    assert_eq!(blocks, expected());
    assert_eq!((export.blocks + export.hot_blocks, export.bad), (12, vec![]));
    let (blocks, _) = exported(&mut disks, VolumeId(2));
    assert_eq!(blocks.values().map(|value| usize::from(*value)).sum::<usize>(), 8 + 16);
    let content = |disk: &FaultyDisk| disk.blocks().map(|(at, block)| (at, block.to_vec())).collect::<Vec<_>>();
    assert_eq!(content(&disks[0]), content(&before[0]), "nothing is written to the disks");
    assert!(Rescue::of(&mut readers(&mut disks)).volumes().iter().all(|volume| volume.extents > 0));
}

#[test]
fn a_rescue_works_on_a_pool_that_is_refused() {
    // Both anchors, both catalogs, both copies of the first superblock's neighbours: one kind at a time.
    for place in [ANCHORS[0], CATALOGS[0], 0] {
        let mut disks = disks_of(&mut used().reopen());
        disks[0].rot(place + 100);
        assert_eq!(exported(&mut disks, VOLUME).0, expected(), "one copy at {place} is damaged");
    }
    let mut disks = disks_of(&mut used().reopen());
    ANCHORS.iter().for_each(|place| disks[0].rot(place + 100));
    assert!(Rig::open_all(disks.clone()).is_err(), "it is refused");
    assert_eq!(exported(&mut disks, VOLUME).0, expected(), "both anchors are damaged");

    // Without a catalog there are layers only.
    let mut disks = disks_of(&mut used().reopen());
    CATALOGS.iter().for_each(|place| disks[0].rot(place + 100));
    assert!(Rig::open_all(disks.clone()).is_err(), "it is refused");
    let rescue = Rescue::of(&mut readers(&mut disks));
    assert_eq!(rescue.volumes().iter().map(|volume| volume.volume).collect::<Vec<_>>(), [VolumeId(1), VolumeId(2)]);
    let (blocks, _) = exported(&mut disks, VolumeId(1));
    assert_eq!(blocks.len(), 16, "what was written before the snapshot");
}

#[test]
fn bad_blocks_are_left_out_and_listed() {
    let mut disks = disks_of(&mut used());
    let is_data = |block: &[u8]| block.iter().all(|byte| *byte == 1);
    let place = disks[0].blocks().filter(|(_, block)| is_data(block)).map(|(number, _)| number).min();
    disks[0].rot(place.expect("it was written") * BLOCK as u64 + 5);
    let (blocks, export) = exported(&mut disks, VOLUME);
    assert_eq!(export.bad, [BlockRange::new(BlockIndex(0), BlockCount(1))]);
    assert_eq!(blocks, expected().into_iter().skip(1).collect());
}

#[test]
fn with_a_disk_missing_the_rest_is_given_and_it_is_said_that_it_is_not_all() {
    let members = [1, 2].map(|id| (DiskId(id), ByteCount(SIZE), format!("disk{id}")));
    let format = |ops: Vec<pollux_base::DiskOp>| {
        let mut disk = FaultyDisk::new(SIZE, 1);
        for op in ops {
            disk.submit(op);
            disk.complete_all();
        }
        disk
    };
    let disks = Disks::format(IDENTITY, &members).expect("legal sizes").into_iter().map(format).collect();
    let mut rig = Rig::open_all(disks).expect("it opens");
    rig.done(StoreOp::Create { volume: VOLUME, group: GROUP, size: ByteCount(32 << 20) });
    rig.heat(&[0, 1, 2, 3], 3);
    (0..4).for_each(|extent| rig.write(extent * 1024, &[1 + extent as u8]));
    rig.cool(&[0, 1, 2, 3]);
    rig.flush();
    let mut disks = disks_of(&mut rig);
    let (all, export) = exported(&mut disks, VOLUME);
    assert_eq!((all.len(), export.is_incomplete), (4, false));
    let (mut given, mut missing) = (0, Vec::new());
    for disk in &disks {
        let mut alone = [disk.clone()];
        let (blocks, export) = exported(&mut alone, VOLUME);
        assert!(export.is_incomplete && blocks.iter().all(|(block, value)| all[block] == *value));
        given += blocks.len();
        missing.extend(Rescue::of(&mut readers(&mut alone)).missing);
    }
    assert_eq!(given, 4, "each extent is on one of them");
    missing.sort();
    assert_eq!(missing, [1, 2].map(|id| (DiskId(id), format!("disk{id}"))));
}
