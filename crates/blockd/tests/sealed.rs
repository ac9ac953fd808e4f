//! Protected connections as bytes: what is sent arrives, and nothing else does.
#![allow(clippy::unwrap_used)]

use pollux_base::{ClusterId, Data, NodeId, Secret, Segment};
use pollux_blockd::sealed::{Opener, RECORD_BYTES_MAX, SealError, Sealer, keys};
use pollux_replica::wire::{HELLO_BYTES, Hello, WIRE_VERSION, encode_hello};
use proptest::prelude::*;

fn hello(node: u64, nonce: u8) -> [u8; HELLO_BYTES] {
    encode_hello(&Hello {
        cluster: ClusterId(1),
        node: NodeId(node),
        is_protected: true,
        keys: [5, 0],
        nonce: [nonce; 32],
        version_min: WIRE_VERSION,
        version_max: WIRE_VERSION,
    })
}

type Ends = ((Sealer, Opener), (Sealer, Opener));

/// Who dialled, and who was dialled.
fn pair() -> Ends {
    let secret = Secret::new([9; 32]);
    let (own, theirs) = (hello(1, 1), hello(2, 2));
    (keys(&secret, &own, &theirs, true), keys(&secret, &own, &theirs, false))
}

fn seal(sealer: &mut Sealer, segments: &[Segment]) -> Vec<u8> {
    let sealed = sealer.seal(segments).unwrap();
    sealed.iter().flat_map(|segment| segment.as_slice().to_vec()).collect()
}

fn open(opener: &mut Opener, bytes: &[u8]) -> Result<Vec<u8>, SealError> {
    let mut plain = Vec::new();
    opener.push(&mut bytes.to_vec(), |part| plain.extend_from_slice(part))?;
    Ok(plain)
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|index| (index * 7 % 251) as u8).collect()
}

#[test]
fn whatever_is_sealed_is_opened_in_any_split_and_nothing_of_it_can_be_read() {
    let mut lengths = vec![1, 2, 100, 1023, 1024, 4096, 5000, RECORD_BYTES_MAX - 1, RECORD_BYTES_MAX];
    lengths.extend([RECORD_BYTES_MAX + 1, 300_000, 1 << 20, 4 << 20]);
    let ((mut sealer, _), (_, mut opener)) = pair();
    let mut step = 1;
    for round in 0..40 {
        let mut segments = Vec::new();
        let mut expected = Vec::new();
        for index in 0..=round % 7 {
            let part = bytes(lengths[(round * 5 + index * 3) % lengths.len()]);
            expected.extend_from_slice(&part);
            segments.push(match index % 2 {
                0 => Segment::Bytes(part),
                _ => Segment::Data(Data::copy_of(&part)),
            });
        }
        let sealed = seal(&mut sealer, &segments);
        assert!(sealed.len() - expected.len() <= 20 * (expected.len() / 1024 + 2 * segments.len()), "records are few");
        if expected.len() >= 16 {
            assert!(!sealed.windows(16).any(|window| window == &expected[..16]));
        }
        let mut plain = Vec::new();
        let mut rest = &sealed[..];
        while !rest.is_empty() {
            step = step * 31 % 200_003;
            let (now, later) = rest.split_at(step.min(rest.len()));
            plain.extend(open(&mut opener, now).unwrap());
            rest = later;
        }
        assert!(plain == expected, "round {round}");
    }
    assert!(sealer.seal(&[]).unwrap().is_empty());
}

#[test]
fn the_same_bytes_never_look_the_same_twice() {
    let ((mut sealer, _), (mut back, _)) = pair();
    let segment = [Segment::Bytes(bytes(64))];
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..50 {
        assert!(seen.insert(seal(&mut sealer, &segment)));
        assert!(seen.insert(seal(&mut back, &segment)), "each direction has a key of its own");
    }
    // Another connection: another random number of either side is enough.
    for (own, theirs) in [(3, 2), (1, 3)] {
        let secret = Secret::new([9; 32]);
        let (mut sealer, _) = keys(&secret, &hello(1, own), &hello(2, theirs), true);
        assert!(seen.insert(seal(&mut sealer, &segment)));
    }
}

#[test]
fn another_key_or_another_hello_opens_nothing_and_is_told_as_such() {
    let (own, theirs) = (hello(1, 1), hello(2, 2));
    let right = || keys(&Secret::new([9; 32]), &own, &theirs, true).0;
    let mut changed = own;
    changed[30] ^= 1;
    let wrong = [
        keys(&Secret::new([8; 32]), &own, &theirs, false).1,
        keys(&Secret::new([9; 32]), &changed, &theirs, false).1,
        keys(&Secret::new([9; 32]), &own, &changed, false).1,
        keys(&Secret::new([9; 32]), &theirs, &own, false).1,
        // What one has sent itself comes back to it.
        keys(&Secret::new([9; 32]), &own, &theirs, true).1,
    ];
    for mut opener in wrong {
        assert!(!opener.is_proven());
        assert_eq!(open(&mut opener, &seal(&mut right(), &[Segment::Bytes(bytes(100))])), Err(SealError::WrongKey));
    }
}

#[test]
fn a_record_repeated_left_out_or_out_of_order_ends_it() {
    let ((mut sealer, _), _) = pair();
    let records: Vec<Vec<u8>> = (0..4).map(|_| seal(&mut sealer, &[Segment::Bytes(bytes(50))])).collect();
    for order in [vec![0, 0], vec![0, 2], vec![0, 1, 3], vec![0, 1, 0], vec![0, 1, 2, 2]] {
        let (_, (_, mut opener)) = pair();
        let (last, good) = order.split_last().unwrap();
        for record in good {
            assert!(open(&mut opener, &records[*record]).is_ok());
        }
        assert_eq!(open(&mut opener, &records[*last]), Err(SealError::Forged(good.len() as u64)));
    }
    let (_, (_, mut opener)) = pair();
    assert_eq!(open(&mut opener, &records[1]), Err(SealError::WrongKey));
}

#[test]
fn plain_bytes_and_absurd_lengths_are_refused_before_memory_is_taken() {
    for head in [*b"plxF", [0; 4], [0xff; 4], (RECORD_BYTES_MAX as u32 + 1).to_le_bytes()] {
        let (_, (_, mut opener)) = pair();
        assert!(matches!(open(&mut opener, &head), Err(SealError::Length(_))), "{head:?}");
        let (_, (_, mut opener)) = pair();
        assert_eq!(open(&mut opener, &head[..3]), Ok(Vec::new()));
        assert!(matches!(open(&mut opener, &head[3..]), Err(SealError::Length(_))), "{head:?} in two pieces");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Bits flipped, bytes cut out or put in, anywhere, in any split: what is given out is a beginning of what was sent.
    #[test]
    fn a_changed_stream_gives_a_beginning_of_what_was_sent_and_no_more(
        lengths in prop::collection::vec(1usize..6000, 1..6),
        place in any::<prop::sample::Index>(),
        change in 0u8..4,
        bit in 0u8..8,
        split in 1usize..5000,
    ) {
        let ((mut sealer, _), (_, mut opener)) = pair();
        let mut sent = Vec::new();
        let mut stream = Vec::new();
        for len in lengths {
            sent.extend(bytes(len));
            stream.extend(seal(&mut sealer, &[Segment::Bytes(bytes(len))]));
        }
        let at = place.index(stream.len());
        match change {
            0 => stream[at] ^= 1 << bit,
            1 => { stream.remove(at); }
            2 => stream.insert(at, bit),
            _ => stream.truncate(at),
        }
        let mut plain = Vec::new();
        let mut error = None;
        for part in stream.chunks(split) {
            if let Err(cause) = opener.push(&mut part.to_vec(), |part| plain.extend_from_slice(part)) {
                error = Some(cause);
                break;
            }
        }
        prop_assert!(sent.starts_with(&plain));
        prop_assert!(plain.len() < sent.len(), "the change was not noticed");
        // Cut off or with a length made longer, the rest is only waited for, in vain: the links notice that.
        prop_assert!(error.is_some() || change != 0 || plain.len() < sent.len());
    }

    /// Any bytes at all.
    #[test]
    fn no_stream_of_a_stranger_opens(stream in prop::collection::vec(any::<u8>(), 0..3000), split in 1usize..900) {
        let (_, (_, mut opener)) = pair();
        for part in stream.chunks(split) {
            if opener.push(&mut part.to_vec(), |_| panic!("it was opened")).is_err() {
                break;
            }
        }
    }
}
