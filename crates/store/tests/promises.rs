//! What the store promises its user, one promise a test, without crashes at odd moments (those are in `crashes`).

mod common;

use common::*;
use pollux_base::{BlockChecksum, ByteCount, DiskOpKind, VolumeId};
use pollux_store::{StoreError, StoreOp, StoreReply};

#[test]
fn what_was_written_is_read_and_what_was_not_is_zeros() {
    let mut rig = Rig::fresh();
    rig.heat(&[0, 1], 1);
    rig.write(1022, &[1, 2, 3, 4]);
    assert_eq!(rig.bytes(1020, 8), [0, 0, 1, 2, 3, 4, 0, 0]);
    rig.cool(&[0, 1]);
    assert_eq!(rig.bytes(1020, 8), [0, 0, 1, 2, 3, 4, 0, 0]);
    let mut rig = rig.reopen();
    assert_eq!(rig.bytes(1020, 8), [0, 0, 1, 2, 3, 4, 0, 0]);
    let Ok(StoreReply::Read { checksums, .. }) = rig.read_of(VOLUME, 1021, 2) else { panic!("it was read before") };
    assert_eq!(checksums, [BlockChecksum::ZERO, BlockChecksum::of(&[1; BLOCK])]);
}

#[test]
fn an_overwrite_costs_one_data_write_and_nothing_else() {
    let mut rig = Rig::fresh();
    rig.heat(&[0], 1);
    rig.write(0, &[1; 64]);
    rig.write(0, &[2; 64]);
    rig.issued.clear();
    for round in 0..10 {
        rig.write(round * 3, &[9; 3]);
    }
    assert_eq!(rig.issued.len(), 10, "{:?}", rig.issued);
    assert!(
        rig.issued.iter().all(|kind| matches!(kind, DiskOpKind::Write { data, sync: false, .. } if data.len() == 1))
    );
}
