//! The wire format: frozen by fixtures, unharmed by garbage. A change that breaks a fixture is a new version, not a new
//! fixture. With POLLUX_BLESS set the fixture is written, for a version that was never released.
#![allow(clippy::unwrap_used)]

mod world;

use pollux_base::record::{Frozen, GroupRecord, GroupSpec, LagBound, Lineage, Mode, Rollback, Snapshot, Snapshots};
use pollux_base::{
    BlockChecksum, ByteCount, ClusterId, DiskId, ExtentIndex, KeyId, NodeId, PoolId, SnapshotId, VolumeId,
};
use pollux_replica::Mark;
use pollux_replica::wire::*;
use pollux_store::Position;
use pollux_store::faulty_disk::Luck;
use std::collections::{BTreeMap, BTreeSet};
use world::{GROUP, VOLUME, blocks, range, stamp};

fn hello() -> Hello {
    Hello {
        cluster: ClusterId(0xabcd),
        node: NodeId(2),
        is_protected: true,
        keys: [0x1122_3344_5566_7788, 0],
        nonce: std::array::from_fn(|index| index as u8),
        version_min: 3,
        version_max: 3,
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn bytes_of(frame: &Frame) -> Vec<u8> {
    encode(Place { number: 6, received: 300 }, frame).iter().flat_map(|segment| segment.as_slice().to_vec()).collect()
}

/// One of each message.
fn messages() -> Vec<Message> {
    let (group, stamp, sequence, volume) = (GROUP, stamp(2, 300), Sequence(77), VOLUME);
    let range = range(1, 2);
    let trail = TrailRun { stamp, boot: 3, started: 4 };
    let point = TrailPoint { position: 9, bytes: 8192, ms: 5 };
    let frozen = Frozen { of: volume, size: ByteCount(4096) };
    let snapshot = Snapshot { taken: Some(stamp.generation), volumes: BTreeMap::from([(VolumeId(9), frozen)]) };
    let each = BTreeMap::from([(SnapshotId(8), snapshot)]);
    let rollback = Some(Rollback { at: stamp, to: BTreeMap::from([(volume, VolumeId(9))]) });
    let origins = BTreeMap::from([(volume, VolumeId(7))]);
    let snapshots = Snapshots { revision: 3, minted: 9, each, rollback, origins };
    let spec = GroupSpec {
        group,
        replicas: BTreeSet::from([NodeId(1), NodeId(2)]),
        modes: BTreeMap::from([(NodeId(2), Mode::Async)]),
        lag: LagBound::default(),
        volumes: BTreeMap::from([(volume, ByteCount(8192))]),
        keys: BTreeMap::from([(volume, KeyId(0x55))]),
        record: GroupRecord { stamp, primary: NodeId(1), in_sync: BTreeSet::from([NodeId(1)]) },
        snapshots,
        lineage: Lineage(BTreeMap::from([(stamp.epoch, stamp.generation)])),
    };
    let position = Position { changes: 300, journal: 70 };
    let mark = Mark { pool: PoolId(1), disk: DiskId(2), taken: 3, opening: 4, boot: 5, position };
    let run = ExtentRun { start: ExtentIndex(3), count: 2 };
    let join = |standing| Message::Join { group, stamp, standing, extents: vec![(volume, vec![run])] };
    vec![
        Message::LeaseAsk { number: 5 },
        Message::LeaseGrant { number: 5, refused: vec![group] },
        Message::Announce { spec: Box::new(spec) },
        Message::Newer { group, stamp },
        join(Standing::InSync { at: stamp, blank: false, continuous: true }),
        join(Standing::Born),
        join(Standing::Stale { since: Some(stamp) }),
        join(Standing::Empty),
        join(Standing::Diverged { own: stamp }),
        join(Standing::Failed { reason: "x".to_string() }),
        join(Standing::Absent),
        join(Standing::Trailing { at: stamp, run: trail, position: 9 }),
        Message::Write { group, stamp, sequence, volume, range, fua: true },
        Message::Zero { group, stamp, sequence, volume, range, fua: false },
        Message::Flush { group, stamp, sequence },
        Message::ReadAsk { group, stamp, sequence, volume, range },
        Message::ReadData { group, stamp, sequence },
        Message::Compare { group, stamp, sequence, volume, range },
        Message::Differs { group, stamp, sequence, runs: vec![range] },
        Message::Cool { group, stamp, volume, extents: vec![ExtentIndex(3)], reap: true },
        Message::Current { group, stamp, sequence },
        Message::Done { group, stamp, sequence },
        Message::Held { group, stamp, sequence },
        Message::Received { group, stamp, sequence },
        Message::TrailReset { group, stamp, sequence, run: trail, from: point },
        Message::Trail { group, stamp, run: trail, point, end: point, volume, range, is_last: true },
        Message::TrailMark { group, stamp, run: trail, at: stamp },
        Message::Trailed { group, stamp, run: trail, position: 9 },
        Message::Refused { group, stamp, sequence, why: Refusal::Corrupt },
        Message::StoredAsk { group, stamp, sequence },
        Message::Stored { group, stamp, sequence, extents: vec![(volume, vec![run])] },
        Message::Verify { group, stamp, sequence, volume, range },
        Message::Verified { group, stamp, sequence, bad: vec![range] },
        Message::Snapshot { group, stamp, sequence, of: vec![(volume, VolumeId(9))] },
        Message::Pool { mark: Box::new(mark), known: Some(Box::new(mark)) },
        Message::Heat { group, stamp, volume, extents: vec![ExtentIndex(3), ExtentIndex(4)] },
    ]
}

const WORDS: [Word; 6] = [
    Word::Begin { channel: 0x1234, fresh: true },
    Word::Unknown { channel: 0x1234 },
    Word::Ping,
    Word::Pong,
    Word::Ack,
    Word::Silent { rank: 1 },
];

fn frame_of(carried: Carried) -> Frame {
    match carried.what {
        What::Frame(frame) => frame,
        What::Word(word) => panic!("a word where a frame should be: {word:?}"),
    }
}

#[test]
#[allow(clippy::disallowed_methods)] // a test may read its environment and write its golden file
fn the_bytes_of_version_three_do_not_change() {
    let mut text = format!("hello {}\n", hex(&encode_hello(&hello())));
    for message in messages() {
        let name = format!("{message:?}");
        let name: String = name.chars().take_while(|letter| letter.is_alphanumeric()).collect();
        text += &format!("{name} {}\n", hex(&bytes_of(&Frame::bare(message))));
    }
    let data = blocks(0x0102_0304, 2);
    let frame = Frame {
        message: Message::ReadData { group: GROUP, stamp: stamp(1, 1), sequence: Sequence(1) },
        checksums: BlockChecksum::of_all(data.as_slice()),
        data: Some(data),
    };
    let bytes = bytes_of(&frame);
    text += &format!("blocks {} + {} bytes\n", hex(&bytes[..bytes.len() - 8192]), 8192);
    for word in WORDS {
        let mut segments = Vec::new();
        encode_word(300, &word, &mut segments);
        text += &format!("word {}\n", hex(segments[0].as_slice()));
    }
    if std::env::var_os("POLLUX_BLESS").is_some() {
        std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/wire-v3.txt"), &text).unwrap();
    }
    assert_eq!(text, include_str!("wire-v3.txt"), "the wire format has changed: that is a new version");
}

#[test]
fn whatever_is_encoded_is_decoded_in_any_split() {
    let mut luck = Luck::new(5);
    let data = blocks(3, 4);
    let mut frames: Vec<Frame> = messages().into_iter().map(Frame::bare).collect();
    let checksums = BlockChecksum::of_all(data.as_slice());
    frames.push(Frame { message: messages()[12].clone(), checksums: checksums.clone(), data: Some(data) });
    frames.push(Frame { message: messages()[17].clone(), checksums, data: None });
    let bytes: Vec<u8> = frames.iter().flat_map(bytes_of).collect();
    for _ in 0..50 {
        let mut decoder = Decoder::new();
        let mut decoded = Vec::new();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let (now, later) = rest.split_at((1 + luck.below(3000) as usize).min(rest.len()));
            decoder.push(now);
            while let Some(carried) = decoder.next_frame().unwrap() {
                assert_eq!(carried.place, Place { number: 6, received: 300 });
                let frame = frame_of(carried);
                assert!(frame.data.as_ref().is_none_or(pollux_base::Data::is_aligned));
                frame.verify().unwrap();
                decoded.push(frame);
            }
            rest = later;
        }
        assert_eq!(decoded, frames);
    }
}

#[test]
fn garbage_and_every_changed_bit_is_an_error_or_found_by_a_checksum() {
    let mut luck = Luck::new(6);
    let data = blocks(3, 1);
    let frame =
        Frame { message: messages()[11].clone(), checksums: BlockChecksum::of_all(data.as_slice()), data: Some(data) };
    let good = bytes_of(&frame);
    for bit in (0..good.len() * 8).filter(|bit| *bit < 1000 || luck.one_in(50)) {
        let mut bytes = good.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let mut decoder = Decoder::new();
        decoder.push(&bytes);
        match decoder.next_frame() {
            Ok(Some(carried)) => assert!(frame_of(carried).verify().is_err(), "bit {bit} was not noticed"),
            Ok(None) => panic!("bit {bit}: a header was believed that is not the one sent"),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
    for _ in 0..2000 {
        let mut decoder = Decoder::new();
        let bytes: Vec<u8> = (0..luck.below(200)).map(|_| luck.draw() as u8).collect();
        decoder.push(&bytes);
        assert!(!matches!(decoder.next_frame(), Ok(Some(_))));
    }
}

#[test]
fn another_programs_bytes_are_told_at_once() {
    let mut decoder = Decoder::new();
    decoder.push(b"GET / HTTP/1.1\r\n");
    let error = decoder.next_frame().unwrap_err();
    assert!(matches!(error, WireError::Magic(_)));
    decoder.push(&bytes_of(&Frame::bare(Message::LeaseAsk { number: 1 })));
    assert_eq!(decoder.next_frame().unwrap_err(), error, "and stay told");
    assert_eq!(decode_hello(&[b'G'; HELLO_BYTES]), Err(WireError::NotPollux));
    assert_eq!(check_start(b"GE"), Err(WireError::NotPollux));
    assert_eq!(check_start(b"pollux-r\x02\x00\x02"), Ok(()));
    // A hello of version 1 is shorter, and would otherwise be waited for.
    assert!(matches!(check_start(b"pollux-r\x01\x00\x01\x00"), Err(WireError::NoCommonVersion { .. })));
}

#[test]
fn lengths_are_held_against_their_bounds_before_memory_is_taken() {
    // A header that is right in itself but asks for 4 GiB: each of the three lengths in turn.
    for field in [8, 12, 16] {
        let mut bytes = bytes_of(&Frame::bare(Message::LeaseAsk { number: 1 }));
        bytes[field..field + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        let crc = pollux_base::checksum::crc32c(&bytes[..40]);
        bytes[40..44].copy_from_slice(&crc.to_le_bytes());
        let mut decoder = Decoder::new();
        decoder.push(&bytes);
        assert!(matches!(decoder.next_frame(), Err(WireError::TooLong { .. })), "field at {field}");
    }
}

#[test]
fn only_nodes_of_one_cluster_with_a_version_in_common_talk() {
    let own = hello();
    let peer = Hello { node: NodeId(1), ..own };
    assert_eq!(decode_hello(&encode_hello(&own)), Ok(own));
    assert_eq!(agree(&own, &peer), Ok(3));
    assert_eq!(agree(&Hello { version_max: 5, ..own }, &Hello { version_min: 4, version_max: 4, ..peer }), Ok(4));
    assert!(matches!(
        agree(&own, &Hello { version_min: 4, version_max: 5, ..peer }),
        Err(WireError::NoCommonVersion { .. })
    ));
    assert!(matches!(agree(&own, &Hello { cluster: ClusterId(1), ..peer }), Err(WireError::OtherCluster { .. })));
    assert!(matches!(agree(&own, &own), Err(WireError::SameNode(NodeId(2)))));
    let mut bytes = encode_hello(&own);
    bytes[20] ^= 1;
    assert!(matches!(decode_hello(&bytes), Err(WireError::HeaderChecksum { .. })));
}
