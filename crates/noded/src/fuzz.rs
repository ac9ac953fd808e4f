//! Targets for fuzzers (`pollux_base::fuzz`): calls between nodes, the cluster's log, and what the witness keeps and is told.

mod log;

use crate::link_keys::LinkKeyCall;
use crate::log::store::Lineage;
use crate::peers::{Answer, Envelope, Gate};
use crate::witness::http::SwapRequest;
use crate::witness::registers::{self, Swap};
use crate::witness::tokens;
use pollux_base::checksum::crc32c;
use pollux_base::fuzz::Target;
use pollux_base::{ClusterId, Epoch, NodeId};
use pollux_cluster::PeerHello;
use pollux_cluster::seam::Register;
use std::collections::BTreeMap;

pub const TARGETS: &[Target] = &[
    Target { name: "noded_calls", run: calls, seeds: call_seeds },
    Target { name: "noded_log", run: log::run, seeds: log::seeds },
    Target { name: "noded_registers", run: registers, seeds: register_seeds },
    Target { name: "noded_tokens", run: tokens, seeds: token_seeds },
];

/// A call is only taken from a node of this cluster that means this node.
pub fn calls(bytes: &[u8]) {
    let lineage = Lineage { epoch: Epoch(2), joining: false, emptied_for: Epoch(0) };
    let gate = Gate::new(ClusterId(1), NodeId(1), lineage);
    if let Ok(call) = serde_json::from_slice::<Envelope<PeerHello>>(bytes) {
        if gate.check_lineage(&call).is_ok() {
            assert!(call.cluster == ClusterId(1) && call.to == NodeId(1) && call.lineage == Epoch(2));
        }
        let text = serde_json::to_vec(&call).expect("what was read as JSON is written as JSON");
        assert!(serde_json::from_slice::<Envelope<PeerHello>>(&text).is_ok_and(|again| again.body == call.body));
    }
    let _ = serde_json::from_slice::<Envelope<LinkKeyCall>>(bytes);
    let _ = serde_json::from_slice::<Answer<PeerHello>>(bytes);
    let _ = serde_json::from_slice::<SwapRequest>(bytes);
    let _ = serde_json::from_slice::<Swap>(bytes);
}

fn call_seeds() -> Vec<Vec<u8>> {
    let head = r#""cluster":"00000000000000000000000000000001","from":2,"to":1,"epoch":2,"lineage":2"#;
    let hello = r#"{"node":2,"epoch":2,"alone":false,"since_unix_ms":5,"wants_to_join":true,"pool":null}"#;
    [
        format!(r#"{{{head},"body":{hello}}}"#),
        format!(r#"{{{head},"body":{{"key":7}}}}"#),
        format!(r#"{{"done":{hello}}}"#),
        r#"{"refused":{"other_lineage":{"here":2,"call":4,"epoch":3}}}"#.to_owned(),
        r#"{"expect":{"epoch":1,"alone":null},"set":{"epoch":2,"alone":1}}"#.to_owned(),
    ]
    .map(String::into_bytes)
    .into()
}

/// The state file of a witness, with a right checksum or without: what is taken is written as the same again.
pub fn registers(bytes: &[u8]) {
    let _ = registers::decode(bytes);
    let file = [format!("pollux-witness 1 {:08x}\n", crc32c(bytes)).as_bytes(), bytes].concat();
    let Ok(values) = registers::decode(&file) else { return };
    assert_eq!(registers::decode(&registers::encode(&values)), Ok(values));
}

fn register_seeds() -> Vec<Vec<u8>> {
    let register = |epoch, alone| Register { epoch: Epoch(epoch), alone };
    let values =
        BTreeMap::from([(ClusterId(1), register(3, Some(NodeId(2)))), (ClusterId(u128::MAX), register(1, None))]);
    let file = registers::encode(&values);
    let body = file.iter().position(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    vec![file[body..].to_vec(), file]
}

/// A token file is refused without a word of what is in it, or every token of it is longer than what could be guessed.
pub fn tokens(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match tokens::parse(text) {
        Ok(hashes) => assert!(hashes.len() <= text.lines().count()),
        Err(reason) => assert!(reason.starts_with("line ") && reason.len() < 80),
    }
}

fn token_seeds() -> Vec<Vec<u8>> {
    let cluster = ClusterId(1);
    vec![format!("# tokens\n\n{cluster} aaaaaaaaaaaaaaaa\n").into_bytes(), b"secret-without-cluster\n".to_vec()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_among_the_seeds_is_understood() {
        let is_read = |text: &Vec<u8>| {
            serde_json::from_slice::<Envelope<PeerHello>>(text).is_ok()
                || serde_json::from_slice::<Envelope<LinkKeyCall>>(text).is_ok()
                || serde_json::from_slice::<Answer<PeerHello>>(text).is_ok()
                || serde_json::from_slice::<SwapRequest>(text).is_ok()
        };
        for text in call_seeds() {
            assert!(is_read(&text), "{}", String::from_utf8_lossy(&text));
        }
    }
}
