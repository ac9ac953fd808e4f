//! Targets for fuzzers (`pollux_base::fuzz`): the wire, the links, and a whole data plane behind a peer that says anything.
//!
//! Checksums keep accidents from what is behind them, and fuzzers too: they are made right here, wherever a peer with a
//! fault (or an ill will, and the key) would have made them right, too.

mod links;
mod plane;

use crate::note::Note;
use crate::wire::{
    Carried, Decoder, HELLO_BYTES, What, WireError, agree, check_start, decode_hello, encode, encode_hello, encode_word,
};
use pollux_base::checksum::crc32c;
use pollux_base::fuzz::{Tape, Target};
use pollux_base::{Epoch, Generation, NodeId, Segment, Stamp};
use std::collections::BTreeSet;

pub const TARGETS: &[Target] = &[
    Target { name: "replica_hello", run: hello, seeds: hello_seeds },
    Target { name: "replica_frames", run: frames, seeds: frame_seeds },
    Target { name: "replica_note", run: note, seeds: note_seeds },
    Target { name: "replica_links", run: links::run, seeds: links::seeds },
    Target { name: "replica_plane", run: plane::run, seeds: plane::seeds },
];

/// The frozen encodings of every message and word are what fuzzing begins with: name and bytes.
fn fixtures() -> Vec<(&'static str, Vec<u8>)> {
    let lines = include_str!("../tests/wire-v3.txt").lines().filter_map(|line| line.split_once(' '));
    lines.filter(|(name, _)| *name != "blocks").map(|(name, text)| (name, unhex(text))).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    let digit = |digit: u8| (digit as char).to_digit(16).expect("fixtures are hexadecimal") as u8;
    text.as_bytes().chunks_exact(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
}

/// Where the fields of a frame's header lie (docs/wire-format.md).
const HEADER_BYTES: usize = 44;
const BODY_CRC: std::ops::Range<usize> = 20..24;
const HEADER_CRC: std::ops::Range<usize> = 40..44;

/// The same bytes, with right checksums wherever a frame seems to begin.
fn mended(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let mut start = 0;
    while let Some(frame) = bytes.get_mut(start..).filter(|rest| rest.len() >= HEADER_BYTES) {
        let number = |at: usize| u32::from_le_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]]) as usize;
        let covered = number(8).saturating_add(number(12).saturating_mul(8));
        let len = HEADER_BYTES.saturating_add(covered).saturating_add(number(16));
        if let Some(body) = frame.get(HEADER_BYTES..).and_then(|rest| rest.get(..covered)) {
            let crc = crc32c(body);
            frame[BODY_CRC].copy_from_slice(&crc.to_le_bytes());
        }
        let crc = crc32c(&frame[..HEADER_CRC.start]);
        frame[HEADER_CRC].copy_from_slice(&crc.to_le_bytes());
        start = start.saturating_add(len);
    }
    bytes
}

/// Everything that a connection carries, and how it ends.
fn decode(pieces: &mut dyn Iterator<Item = &[u8]>) -> (Vec<Carried>, Option<WireError>) {
    let mut decoder = Decoder::new();
    let mut all = Vec::new();
    for piece in pieces {
        decoder.push(piece);
        loop {
            match decoder.next_frame() {
                Ok(Some(carried)) => all.push(carried),
                Ok(None) => break,
                Err(error) => {
                    decoder.push(b"more");
                    assert_eq!(decoder.next_frame(), Err(error.clone()), "a broken stream stays broken");
                    return (all, Some(error));
                }
            }
        }
    }
    (all, None)
}

fn encoded(carried: &Carried) -> Vec<u8> {
    let mut segments = Vec::new();
    match &carried.what {
        What::Frame(frame) => segments = encode(carried.place, frame),
        What::Word(word) => {
            encode_word(carried.place.received, word, &mut segments);
        }
    }
    segments.iter().flat_map(Segment::as_slice).copied().collect()
}

/// Bytes mean the same in whichever pieces they come, and what they mean is encoded as the same again.
pub fn frames(bytes: &[u8]) {
    let mut tape = Tape(bytes);
    let (is_mended, step) = (tape.u8() % 4 != 0, 1 + tape.below(200));
    let bytes = if is_mended { mended(tape.0) } else { tape.0.to_vec() };
    let (carried, error) = decode(&mut std::iter::once(bytes.as_slice()));
    let pieces = decode(&mut bytes.chunks(step));
    assert_eq!((&carried, &error), (&pieces.0, &pieces.1));
    assert!(error.is_none_or(|error| !error.to_string().is_empty()));
    for mut one in carried {
        if let What::Frame(frame) = &one.what {
            let _ = frame.verify();
        } else {
            // A word has no number; that one was said is not looked at.
            one.place.number = 0;
        }
        let again = decode(&mut std::iter::once(encoded(&one).as_slice()));
        assert_eq!(again, (vec![one], None));
    }
}

fn frame_seeds() -> Vec<Vec<u8>> {
    let fixtures = fixtures();
    let one = |bytes: &Vec<u8>| [&[1, 9], &bytes[..]].concat();
    let mut seeds: Vec<Vec<u8>> =
        fixtures.iter().filter(|(name, _)| *name != "hello").map(|(_, bytes)| one(bytes)).collect();
    // Several in one run, and one with a checksum and a block of zeros.
    let run: Vec<u8> =
        fixtures.iter().filter(|(name, _)| *name == "word").flat_map(|(_, bytes)| bytes.clone()).collect();
    seeds.push([&[1, 60], &run[..]].concat());
    let (_, mut frame) = fixtures.into_iter().find(|(name, _)| *name == "ReadData").expect("every message is there");
    frame[12] = 1;
    frame[17] = 0x10;
    frame.resize(frame.len() + 8 + 4096, 0);
    seeds.push([&[1, 199], &frame[..]].concat());
    seeds
}

/// A hello that is taken is encoded as the same again, but for what is reserved; and it is only agreed with if it is a hello
/// of this cluster in a version spoken here.
pub fn hello(bytes: &[u8]) {
    let _ = check_start(bytes);
    let Some(mut fixed) = bytes.first_chunk::<HELLO_BYTES>().copied() else { return };
    let _ = decode_hello(&fixed);
    let crc = crc32c(&fixed[..HELLO_BYTES - 4]);
    fixed[HELLO_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
    let Ok(hello) = decode_hello(&fixed) else { return };
    assert_eq!(decode_hello(&encode_hello(&hello)), Ok(hello));
    let (_, own) = fixtures().into_iter().next().expect("the first fixture is a hello");
    let own = own.first_chunk().map(decode_hello).expect("a hello is that long").expect("the fixture is right");
    if let Ok(version) = agree(&own, &hello) {
        assert!(hello.cluster == own.cluster && hello.node != own.node);
        assert!((hello.version_min..=hello.version_max).contains(&version));
        assert_eq!(check_start(&fixed), Ok(()), "what is agreed with was not refused at its first bytes");
    }
}

fn hello_seeds() -> Vec<Vec<u8>> {
    let (_, own) = fixtures().into_iter().next().expect("the first fixture is a hello");
    let mut other = own.clone();
    other[32] = 1;
    vec![own, other]
}

/// A note is in the catalog of a pool.
pub fn note(bytes: &[u8]) {
    match Note::decode(bytes) {
        Ok(note) => assert_eq!(Note::decode(&note.encode()), Ok(note)),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    crate::names::fuzz(bytes);
}

fn note_seeds() -> Vec<Vec<u8>> {
    let stamp = |epoch, generation| Stamp { epoch: Epoch(epoch), generation: Generation(generation) };
    let born = Note {
        newest: stamp(1, 1),
        primary: NodeId(1),
        before: None,
        in_sync_at: Some(stamp(1, 1)),
        joined_at: None,
        born: true,
        offered: BTreeSet::new(),
        whole_in_boot: None,
        trails: None,
    };
    let full = Note {
        newest: stamp(3, 900),
        before: Some(NodeId(2)),
        joined_at: Some(stamp(3, 899)),
        born: false,
        offered: BTreeSet::from([NodeId(2), NodeId(3)]),
        whole_in_boot: Some(u128::MAX),
        trails: Some(stamp(3, 7)),
        ..born
    };
    vec![born.encode(), full.encode(), crate::names::fuzz_seed(), crate::names::fuzz_seed_of_keys()]
}
