//! A human takes a pool that is an image of an earlier day, as `blockd take-old-image` does it.

use crate::world::CLUSTER;
use pollux_base::{ByteCount, Instant, NodeId};
use pollux_replica::take_as_stale;
use pollux_store::faulty_disk::FaultyDisk;
use pollux_store::{Disks, Input, StoreRequestId};

/// The node is off.
pub fn take(disk: &mut FaultyDisk, node: NodeId) -> Result<(), String> {
    let mut pool = Disks::open(CLUSTER, node, &[ByteCount(disk.size())]);
    disk.run(&mut pool)?;
    for (op, number) in take_as_stale(pool.notes()).into_iter().zip(1..) {
        pool.handle(Instant(0), Input::Request(StoreRequestId(number), op));
        disk.run(&mut pool)?;
    }
    Ok(())
}
