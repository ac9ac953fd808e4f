//! The rules of a group, each by what clients, disks and the control plane see of it.
#![allow(clippy::unwrap_used)]

mod world;

use pollux_base::{Op, Reply};
use world::*;

#[test]
fn a_write_is_acknowledged_when_both_have_it() {
    let mut world = World::pair(1);
    world.write_done(A, 3, 2, 42);
    let (a, b) = (world.contents(A), world.contents(B));
    assert_eq!(a[3..5], [42, 42]);
    assert_eq!(a, b);
    assert_eq!(world.read_value(A, 4), 42);
    assert_eq!(world.read_value(A, 5), 0);
}
