//! What a mirrored 4 KiB write costs the cores of both nodes, and the wire's codec between them, in one thread and without
//! a kernel: `cargo run --release -p pollux-replica --example write_cost [WRITES [DEPTH [encrypted]]]`. Under callgrind
//! its instructions are the same on a busy machine as on a quiet one.
//!
//! DEPTH writes (32) are under way; what is begun in one round has ended by the next, so that as much comes at once as under load.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "it measures; the cores in it are handed their time"
)]

#[path = "../tests/world/mod.rs"]
mod world;

use pollux_base::{DiskDone, DiskOpKind, NodeId, Op, Request, RequestId};
use pollux_replica::wire::{Carried, Decoder, Place, What, encode_onto};
use pollux_replica::{DataPlane, Input, Output};
use std::time::{Duration, Instant};
use world::*;

/// A node, and what has come for it since its last turn.
struct Node {
    id: NodeId,
    plane: DataPlane,
    inputs: Vec<Input>,
    decoder: Decoder,
}

fn main() {
    let writes: u64 = std::env::args().nth(1).map_or(200_000, |arg| arg.parse().expect("a number of writes"));
    let depth: u64 = std::env::args().nth(2).map_or(32, |arg| arg.parse().expect("how many are under way"));
    let is_encrypted = std::env::args().nth(3).is_some_and(|arg| arg == "encrypted");
    let mut world = if is_encrypted { World::encrypted(1, &[A, B]) } else { World::new(1, &[A, B]) };
    world.until_serving(A);
    let hot: Vec<u64> = (0..BLOCKS).collect();
    for start in hot.chunks(64) {
        world.write_done(A, start[0], start.len() as u64, 1);
    }
    world.flush_done(A);
    let started = Instant::now();
    measure(&mut world, writes, depth);
    println!("{writes} writes: {:.2} us each", started.elapsed().as_secs_f64() * 1e6 / writes as f64);
}

/// Of its own, so that callgrind can be told to look at nothing else (`--toggle-collect='*measure*'`).
#[inline(never)]
fn measure(world: &mut World, writes: u64, depth: u64) {
    let session = world.session(A, B);
    let mut now = world.now;
    let mut nodes = [A, B].map(|id| {
        let plane = world.machine(id).plane.take().expect("it runs");
        Node { id, plane, inputs: Vec::new(), decoder: Decoder::new() }
    });
    let (mut begun, mut ended, mut next_frame) = (0, 0, 0);
    let data = blocks(7, 1);
    let mut segments = Vec::new();
    let mut place = 1u64;
    while ended < writes {
        while begun < writes && begun - ended < depth {
            begun += 1;
            place = place.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let op = Op::Write { range: range((place >> 33) % BLOCKS, 1), data: data.clone(), fua: false };
            nodes[0].inputs.push(Input::Request(Request { id: RequestId(1 << 40 | begun), volume: VOLUME, op }));
        }
        now = now + Duration::from_micros(30);
        for at in 0..2 {
            let node = &mut nodes[at];
            node.plane.handle_all(now, node.inputs.drain(..));
            if node.plane.deadline().is_some_and(|deadline| deadline <= now) {
                node.plane.handle(now, Input::Tick);
            }
            while let Some(output) = nodes[at].plane.poll() {
                match output {
                    Output::Disk(op) => {
                        assert!(!matches!(op.kind, DiskOpKind::Read { .. }), "everything is in memory");
                        nodes[at].inputs.push(Input::Disk(DiskDone { id: op.id, result: Ok(None) }));
                    }
                    Output::Send { frame, .. } => {
                        next_frame += 1;
                        encode_onto(Place { number: next_frame, received: 0 }, &frame, &mut segments);
                    }
                    Output::Reply(..) => ended += 1,
                    Output::Report(_) => {}
                    output => panic!("{output:?}"),
                }
            }
            let from = nodes[at].id;
            let other = &mut nodes[1 - at];
            segments.drain(..).for_each(|segment| other.decoder.push(segment.as_slice()));
            while let Some(Carried { what: What::Frame(frame), .. }) = other.decoder.next_frame().expect("it is whole")
            {
                frame.verify().expect("nothing changed on the way");
                other.inputs.push(Input::Frame { peer: from, session, frame });
            }
        }
    }
}
