//! The metadata of a pool is verified while it is used: never a false alarm, whatever goes on, and what rots is found.

mod common;

use common::history::{Crash, History};
use common::*;
use pollux_base::ByteCount;
use pollux_store::StoreOp;
use pollux_store::faulty_disk::Luck;
use pollux_store::verify::{ReadDisk, verify};
use std::collections::BTreeSet;

#[test]
fn nothing_is_found_in_a_sound_pool_whatever_goes_on() {
    let mut ended = 0;
    for seed in 0..24 {
        let mut luck = Luck::new(seed);
        let mut history = if seed % 3 == 0 { History::with_disks(7000 + seed) } else { History::new(7000 + seed) };
        for round in 0..3 {
            history.rig.watch = Some(Watch::default());
            history.run(1500 + luck.below(1500)).unwrap_or_else(|error| panic!("seed {seed}, round {round}: {error}"));
            if round == 1 {
                history.fill_journal(900 + luck.below(200));
            }
            let watch = history.rig.watch.take().expect("it is watched");
            assert_eq!(watch.findings, [], "seed {seed}, round {round}");
            ended += watch.ended;
            history = history.crash(Crash::Kill).unwrap_or_else(|error| panic!("seed {seed}, round {round}: {error}"));
        }
    }
    assert!(ended > 100, "pools were looked at from beginning to end: {ended}");
}

/// A pool of which some extents are cold and one is hot.
fn used() -> Rig {
    let mut rig = Rig::fresh();
    rig.heat(&[0, 1, 2, 3], 1);
    for extent in 0..4 {
        rig.write(extent * 1024, &[7; 40]);
    }
    rig.flush();
    rig.cool(&[0, 1, 2]);
    // What was written since the last opening is in the table only behind a checkpoint.
    let mut rig = rig.reopen();
    rig.heat(&[5], 1);
    rig.write(5 * 1024, &[8; 3]);
    rig.flush();
    rig
}

#[test]
fn what_rots_beneath_a_running_pool_is_found_with_the_code_that_an_opening_would_find() {
    let clean = used();
    let places: Vec<u64> = clean.disk.blocks().map(|(number, _)| number * BLOCK as u64).collect();
    let (mut found, mut kinds) = (0, BTreeSet::new());
    for place in places.into_iter().filter(|place| clean.disk.read_now(*place, 8) == b"PolluxMB") {
        let mut rig = used();
        assert!(rig.look().is_empty());
        rig.disk.rot(place + 70);
        let online: BTreeSet<&str> = rig.look().iter().map(|finding| finding.code.text()).collect();
        let mut disk = rig.disk.clone();
        let offline = verify(&mut [&mut disk as &mut dyn ReadDisk], false, &mut |_| {});
        let mut offline: BTreeSet<&str> = offline.findings.iter().map(|finding| finding.code.text()).collect();
        // That checksums are lost follows from the leaf; and a rotten end of the journal looks like a crash to whoever opens it.
        offline.remove("V072");
        if online != offline {
            assert!(offline.is_empty() && online == ["V040"].into(), "{place}: {online:?}, and off {offline:?}");
        }
        found += usize::from(!online.is_empty());
        kinds.extend(online);
    }
    assert_eq!(kinds, ["V001", "V010", "V020", "V030", "V040", "V070"].into(), "of every kind");
    assert!(found > 10, "{found}");
}

#[test]
fn both_copies_damaged_or_written_over_by_something_whole_are_found() {
    let codes = |rig: &mut Rig| rig.look().iter().map(|finding| finding.code.text()).collect::<Vec<_>>();
    for (copies, code) in [([0, 1 << 20], "V002"), ([4096, (1 << 20) + 4096], "V011"), ([2 << 20, 3 << 20], "V021")] {
        let mut rig = used();
        copies.iter().for_each(|place| rig.disk.rot(place + 70));
        assert_eq!(codes(&mut rig), [code]);
    }
    // An older catalog is whole, and wrong all the same: a write that the disk lost.
    let mut rig = used();
    let older = rig.disk.read_now(2 << 20, 1 << 20);
    rig.done(StoreOp::PutNote { group: GROUP, note: Some(vec![1; 10]) });
    rig.disk.write_now(2 << 20, &older);
    assert_eq!(codes(&mut rig), ["V020"]);
    rig.done(StoreOp::Create { volume: pollux_base::VolumeId(9), group: GROUP, size: ByteCount(4096) });
    assert_eq!(codes(&mut rig), [""; 0], "written anew");
}
