//! Targets for fuzzers (`pollux_base::fuzz`): heartbeats as datagrams, and a guard whose peers, whose `noded` and whose
//! predecessor say anything.

use crate::wire::{DATAGRAM_BYTES_MAX, Seal, VERSION};
use crate::{Guard, Input, Left, Output, Setup};
use pollux_base::fuzz::{Tape, Target};
use pollux_base::guard::{GuardCommand, Heartbeat, Network};
use pollux_base::timing::GUARD_LEASE;
use pollux_base::{ClusterId, Epoch, Instant, NodeId};
use std::time::Duration;

pub const TARGETS: &[Target] = &[
    Target { name: "guard_heartbeat", run: heartbeat, seeds: heartbeat_seeds },
    Target { name: "guard_life", run: life, seeds: life_seeds },
];

const OWN: NodeId = NodeId(1);
const PEER: NodeId = NodeId(2);
const NETWORK: Network = Network(0);
const CLUSTER: ClusterId = ClusterId(5);

fn seal() -> Seal {
    Seal::new(CLUSTER, &[9; 32])
}

/// A datagram without a signature is never taken; what is taken with one is sealed as the same again.
pub fn heartbeat(bytes: &[u8]) {
    assert!(seal().open(OWN, NETWORK, bytes).is_err(), "nobody without the secret is heard");
    let signed = seal().signed(OWN, NETWORK, bytes.to_vec());
    match seal().open(OWN, NETWORK, &signed) {
        Ok(heartbeat) => {
            let again = seal().seal(OWN, NETWORK, &heartbeat);
            assert!(again.len() <= DATAGRAM_BYTES_MAX);
            assert_eq!(seal().open(OWN, NETWORK, &again), Ok(heartbeat));
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fn heartbeat_seeds() -> Vec<Vec<u8>> {
    let of = |heard| {
        let heartbeat = Heartbeat { from: PEER, boot: u64::MAX, sequence: 300, epoch: Epoch(4), heard };
        let datagram = seal().seal(OWN, NETWORK, &heartbeat);
        datagram[..datagram.len() - blake3::OUT_LEN].to_vec()
    };
    vec![of(None), of(Some((7, 9))), vec![VERSION]]
}

/// What a line of `noded` (and of the lease's file) says.
fn command(tape: &mut Tape<'_>) -> Option<GuardCommand> {
    let epoch = Epoch(u64::from(tape.u8()));
    match tape.u8() % 6 {
        0 => Some(GuardCommand::Members { epoch, peers: vec![OWN, PEER] }),
        1 => Some(GuardCommand::Members { epoch, peers: (0..u64::from(tape.u8())).map(NodeId).collect() }),
        2 => Some(GuardCommand::Alone { epoch }),
        3 => Some(GuardCommand::Surrender { epoch }),
        4 => {
            let len = usize::from(tape.u8());
            serde_json::from_slice(tape.bytes(len)).ok()
        }
        _ => None,
    }
}

/// The lease is never longer than it may be, whoever says what, and guests are killed when it is over.
pub fn life(bytes: &[u8]) {
    let mut tape = Tape(bytes);
    let mut now = Instant(1_000_000_000_000);
    let left = match tape.u8() % 4 {
        0 => None,
        1 => Some(Left { until: None, command: command(&mut tape) }),
        2 => {
            Some(Left { until: Some(now + Duration::from_millis(u64::from(tape.u16()))), command: command(&mut tape) })
        }
        _ => Some(Left { until: Some(Instant(tape.u64())), command: command(&mut tape) }),
    };
    let peers = [(PEER, vec![NETWORK, Network(1)]), (NodeId(3), vec![NETWORK])].into();
    let boot = 77;
    let mut guard = Guard::new(Setup { node: OWN, peers, boot, left }, now);
    let (mut sent, mut is_killed) = (0, false);
    loop {
        while let Some(output) = guard.poll() {
            match output {
                Output::Send { heartbeat, .. } => sent = sent.max(heartbeat.sequence),
                Output::KillGuests => {
                    assert!(!guard.lease_held(now), "guests live while the lease holds");
                    is_killed = true;
                }
                Output::Lease { until, .. } => {
                    assert!(until <= now + GUARD_LEASE);
                    is_killed = false;
                }
                Output::View(view) => assert!(serde_json::to_vec(&view).is_ok()),
            }
        }
        assert!(is_killed || guard.lease_held(now), "without a lease nothing runs");
        if tape.is_empty() {
            return;
        }
        let what = tape.u8();
        match what % 8 {
            0..=2 => {
                let from = NodeId(u64::from(tape.u8() % 5));
                let heard = match tape.u8() {
                    0 => None,
                    1 => Some((tape.u64(), tape.u64())),
                    back => Some((boot, u64::saturating_sub(sent, u64::from(back - 2)))),
                };
                let (sequence, epoch) = (u64::from(tape.u16()), Epoch(u64::from(tape.u8())));
                let heartbeat = Heartbeat { from, boot: u64::from(what >> 7), sequence, epoch, heard };
                guard.handle(now, Input::Heartbeat { network: Network(what >> 4 & 3), heartbeat });
            }
            3 => {
                if let Some(command) = command(&mut tape) {
                    guard.handle(now, Input::Command(command));
                }
            }
            4 => guard.handle(now, Input::Connected),
            5 => {
                now = guard.deadline().map_or(now, |due| due.max(now));
                guard.tick(now);
            }
            _ => {
                now = now + Duration::from_millis(20 * u64::from(tape.u8()));
                guard.tick(now);
            }
        }
    }
}

fn life_seeds() -> Vec<Vec<u8>> {
    let steps: &[&[u8]] = &[
        &[3, 1, 0],
        &[5],
        &[0, 2, 2, 1, 0, 1],
        &[5, 5],
        &[16, 2, 3, 2, 0, 1],
        &[4],
        &[6, 90],
        &[3, 2, 2],
        &[6, 255],
        &[3, 3, 3],
    ];
    let alone = [&[2, 200, 1, 4, 2][..], &steps.concat()].concat();
    let until = u64::to_le_bytes(1_000_000_000_001);
    let members = [&[3][..], &until, &[1, 0], &steps.concat()].concat();
    let json = br#"{"command":"members","epoch":7,"peers":[1,2,3]}"#;
    let spoken = [&[1, 0, 5, 3, 7, 4, json.len() as u8][..], json, &steps.concat()].concat();
    vec![[&[0], &steps.concat()[..]].concat(), alone, members, spoken]
}
