//! Targets for fuzzers (`pollux_base::fuzz`): the records that protect a connection, and what `noded` and files say as JSON.

use crate::sealed::{RECORD_BYTES_MAX, keys};
use pollux_base::config::NodeConfig;
use pollux_base::fuzz::{Tape, Target};
use pollux_base::secret::SECRET_BYTES;
use pollux_base::{Order, Report, Secret, Segment};
use pollux_replica::wire::HELLO_BYTES;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::Debug;

pub const TARGETS: &[Target] = &[
    Target { name: "blockd_sealed", run: sealed, seeds: sealed_seeds },
    Target { name: "blockd_opener", run: opener, seeds: opener_seeds },
    Target { name: "blockd_json", run: json, seeds: json_seeds },
];

fn pair() -> [(crate::sealed::Sealer, crate::sealed::Opener); 2] {
    let secret = Secret::new([7; SECRET_BYTES]);
    [true, false].map(|is_dialler| keys(&secret, &[1; HELLO_BYTES], &[2; HELLO_BYTES], is_dialler))
}

/// What is sealed is opened as the same, in whichever pieces it goes in and comes out; and of what was changed on its way
/// nothing is ever given out but a beginning of what was sealed.
pub fn sealed(bytes: &[u8]) {
    let mut tape = Tape(bytes);
    let [(mut sealer, _), (_, mut opener)] = pair();
    let (step, changed, flip) = (1 + usize::from(tape.u16()), usize::from(tape.u16()), tape.u8());
    let mut plain = Vec::new();
    let mut sealed = Vec::new();
    while !tape.is_empty() {
        let segments: Vec<Segment> = (0..1 + tape.u8() % 3)
            .map(|_| {
                // Long pieces go another way than short ones.
                let (len, value) = (usize::from(tape.u8()), tape.u8());
                Segment::Bytes(if value & 1 == 0 { vec![value; len * 400] } else { tape.bytes(len).to_vec() })
            })
            .collect();
        segments.iter().for_each(|segment| plain.extend_from_slice(segment.as_slice()));
        let records = sealer.seal(&segments).expect("its keys are fresh");
        records.iter().for_each(|record| sealed.extend_from_slice(record.as_slice()));
        if plain.len() > 4 * RECORD_BYTES_MAX {
            break;
        }
    }
    let is_changed = flip != 0 && changed < sealed.len();
    if is_changed {
        sealed[changed] ^= flip;
    }
    let mut opened = Vec::new();
    let mut result = Ok(());
    for piece in sealed.chunks_mut(step) {
        result = opener.push(piece, |part| opened.extend_from_slice(part));
        if result.is_err() {
            break;
        }
    }
    assert!(plain.starts_with(&opened));
    if !is_changed {
        assert!(result.is_ok() && opened.len() == plain.len());
    } else {
        assert!(opened.len() < plain.len());
    }
}

fn sealed_seeds() -> Vec<Vec<u8>> {
    let body = [[0, 5, 1].as_slice(), b"hello", &[1, 200, 2, 3, 1], b"abc", &[2, 30, 8, 0, 1, 30, 4]].concat();
    [[255, 255, 0, 0, 0], [0, 0, 0, 0, 0], [20, 0, 3, 0, 9], [99, 0, 200, 1, 128]]
        .map(|head| [head.as_slice(), &body].concat())
        .into()
}

/// Bytes of somebody who has no key: none is ever opened, and no more is kept than one record.
pub fn opener(bytes: &[u8]) {
    let mut tape = Tape(bytes);
    let step = 1 + tape.below(300);
    let [_, (_, mut opener)] = pair();
    for piece in tape.0.to_vec().chunks_mut(step) {
        if let Err(error) = opener.push(piece, |_| panic!("nobody without the key is heard")) {
            assert!(!error.to_string().is_empty() && !opener.is_worn());
            return;
        }
        assert!(!opener.is_proven());
    }
}

fn opener_seeds() -> Vec<Vec<u8>> {
    let record = |len: u32, bytes: usize| [&[200], &len.to_le_bytes()[..], &vec![9; bytes]].concat();
    vec![record(5, 21), record(0, 30), record(RECORD_BYTES_MAX as u32 + 1, 30), record(100, 40)]
}

/// A line of `noded`, or a configuration: what is understood is written as the same again.
pub fn json(bytes: &[u8]) {
    again::<Order>(bytes);
    again::<Report>(bytes);
    again::<NodeConfig>(bytes);
}

fn again<T: Serialize + DeserializeOwned + PartialEq + Debug>(bytes: &[u8]) {
    let Ok(value) = serde_json::from_slice::<T>(bytes) else { return };
    let text = serde_json::to_vec(&value).expect("what was read as JSON is written as JSON");
    assert_eq!(serde_json::from_slice::<T>(&text).ok(), Some(value));
}

fn json_seeds() -> Vec<Vec<u8>> {
    let texts = [
        r#"{"order":"group","group":1,"replicas":[1,2],"modes":{"2":"async"},"lag":{"bytes":67108864,"ms":30000,"at_bound":"slow"},"volumes":{"11":8192},"keys":{"11":"00000000000000000000000000000055"},"snapshots":{"revision":3,"minted":12,"each":{"12":{"taken":300,"volumes":{"12":{"of":11,"size":8192}}}},"rollback":{"at":{"epoch":2,"generation":299},"to":{"11":12}},"origins":{}},"record":{"stamp":{"epoch":2,"generation":300},"primary":1,"in_sync":[1]},"lineage":{"2":300}}"#,
        r#"{"order":"forget","group":1}"#,
        r#"{"order":"volume_key","key":"00000000000000000000000000000055","secret":"5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e"}"#,
        r#"{"order":"peers","addresses":{"2":["192.0.2.2:7001","198.51.100.2:7001"]}}"#,
        r#"{"order":"exports","names":{"disk":{"volume":11,"is_public":true,"is_read_only":false}}}"#,
        r#"{"order":"discard","group":1,"loser":{"epoch":1,"generation":2}}"#,
        r#"{"order":"report_all"}"#,
        r#"{"report":"replica_lost","group":1,"generation":2,"node":3,"reason":"x"}"#,
        r#"{"report":"paths","is_encrypted":true,"paths":[{"peer":2,"address":"a","state":"down","reason":"x"}]}"#,
        r#"{"cluster":"000000000000000000000000000000c1","cluster_name":"lab","node":1,"state_dir":"/s","run_dir":"/r","pool":{"pool":"00000000000000000000000000009001","path":"/p"},"nodes":[{"node":1,"name":"a","api":["192.0.2.1:7000"],"replication":["[2001:db8::1]:7001"],"nbd":[],"guard":[],"power":null}],"witness":null,"tls":{"ca":"/ca","certificate":"/c","key":"/k"},"secret_file":"/x","token_file":"/t","guest_cgroup":null,"bridge":null,"accelerator":"auto","watchdog":null,"guest_memory_bytes":1}"#,
    ];
    texts.map(|text| text.as_bytes().to_vec()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_seed_is_understood() {
        let is_read = |text: &Vec<u8>| {
            serde_json::from_slice::<Order>(text).is_ok()
                || serde_json::from_slice::<Report>(text).is_ok()
                || serde_json::from_slice::<NodeConfig>(text).is_ok()
        };
        for text in json_seeds() {
            assert!(is_read(&text), "{}", String::from_utf8_lossy(&text));
        }
    }
}
