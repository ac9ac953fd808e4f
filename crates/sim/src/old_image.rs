//! A human takes a pool that is an image of an earlier day, as `blockd take-old-image` does it.

use crate::world::CLUSTER;
use pollux_base::{ByteCount, Instant, NodeId};
use pollux_replica::take_as_stale;
use pollux_store::faulty_disk::FaultyDisk;
use pollux_store::{Disks, Input, Output, StoreOp, StoreRequestId};
use std::collections::VecDeque;

/// The node is off.
pub fn take(disk: &mut FaultyDisk, node: NodeId) -> Result<(), String> {
    let mut pool = Disks::open(CLUSTER, node, &[ByteCount(disk.size())]);
    let mut ops: VecDeque<StoreOp> = VecDeque::new();
    let mut number = 0;
    loop {
        while let Some(output) = pool.poll() {
            match output {
                Output::Disk(op) => disk.submit(op),
                Output::Opened(result) => {
                    result.map_err(|error| error.to_string())?;
                    ops = take_as_stale(pool.notes()).into();
                }
                Output::Ended(_, result) => drop(result.map_err(|error| error.to_string())?),
                Output::Changed(_, result) => result?,
                Output::Close(_) => {}
            }
        }
        if let Some(done) = disk.complete_any() {
            pool.handle(Instant(0), Input::Disk(done));
        } else if let Some(op) = ops.pop_front() {
            number += 1;
            pool.handle(Instant(0), Input::Request(StoreRequestId(number), op));
        } else {
            return Ok(());
        }
    }
}
