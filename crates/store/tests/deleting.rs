//! The end of a volume comes, whatever of it is left.

mod common;

use common::*;
use pollux_base::{ByteCount, GroupId, VolumeId};
use pollux_store::StoreOp;

#[test]
fn deleting_a_volume_of_which_only_a_leaf_is_left_ends_though_no_unit_becomes_free() {
    let other = VolumeId(2);
    let mut rig = Rig::fresh();
    rig.done(StoreOp::Create { volume: other, group: GroupId(2), size: ByteCount(8 << 20) });
    let heat = || StoreOp::Heat { volume: other, extents: vec![x(0)], generation: gen_(3) };
    // Their leaves lie in one unit.
    rig.heat(&[0], 3);
    rig.write(0, &[1, 2]);
    rig.cool(&[0]);
    rig.done(heat());
    rig.done(write_op(other, 5, filled(&[9, 9])));
    rig.done(StoreOp::Cool { volume: other, extents: vec![x(0)] });
    rig.done(heat());
    rig.done(StoreOp::Zero { volume: other, range: range(0, 16) });
    rig.flush();
    rig.settle();
    rig.done(StoreOp::Delete { volume: other });
    assert_eq!(rig.store.volumes().count(), 1);
    assert_eq!(rig.bytes(0, 3), [1, 2, 0]);
}
