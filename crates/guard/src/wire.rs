//! Heartbeats on the wire: one UDP datagram each, signed with the cluster's secret.
//!
//! ```text
//! version 1 (1 byte) | cluster (16 bytes, little endian) | heartbeat (postcard) | signature (32 bytes)
//! ```
//! The signature is keyed BLAKE3 over receiver, network and everything before it, so that a datagram recorded on one
//! network, or for one node, is worth nothing on another. What does not verify is dropped without an answer.

use pollux_base::guard::{Heartbeat, Network};
use pollux_base::{ClusterId, NodeId};

/// First byte of every datagram.
pub const VERSION: u8 = 1;
/// Longest datagram read; a heartbeat takes about a hundred bytes.
pub const DATAGRAM_BYTES_MAX: usize = 512;
/// A secret shorter than this could be guessed.
pub const SECRET_BYTES_MIN: usize = 32;

const HEADER_BYTES: usize = 1 + 16;
const SIGNATURE_BYTES: usize = blake3::OUT_LEN;

/// Why a datagram was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("{0} bytes are too short for a heartbeat")]
    Short(usize),
    #[error("heartbeat version {0}, expected {VERSION}")]
    Version(u8),
    #[error("of another cluster")]
    Cluster,
    #[error("the signature does not verify")]
    Signature,
    #[error("signed, but not a heartbeat")]
    Malformed,
}

/// Signs and checks the heartbeats of one cluster.
#[derive(Clone)]
pub struct Seal {
    cluster: ClusterId,
    key: [u8; 32],
}

impl Seal {
    /// `secret`: the content of the secret file, whole.
    pub fn new(cluster: ClusterId, secret: &[u8]) -> Seal {
        Seal { cluster, key: blake3::derive_key("pollux guard heartbeat v1", secret) }
    }

    /// The datagram that carries `heartbeat` to `to` on `network`.
    pub fn seal(&self, to: NodeId, network: Network, heartbeat: &Heartbeat) -> Vec<u8> {
        let mut bytes = vec![VERSION];
        bytes.extend_from_slice(&self.cluster.0.to_le_bytes());
        let bytes = postcard::to_extend(heartbeat, bytes).expect("numbers always fit into a growing vector");
        self.signed(to, network, bytes)
    }

    /// These bytes and their signature.
    pub(crate) fn signed(&self, to: NodeId, network: Network, mut bytes: Vec<u8>) -> Vec<u8> {
        let signature = self.signature(to, network, &bytes);
        bytes.extend_from_slice(signature.as_bytes());
        bytes
    }

    /// The heartbeat in a datagram that `to` received on `network`.
    pub fn open(&self, to: NodeId, network: Network, datagram: &[u8]) -> Result<Heartbeat, WireError> {
        if datagram.len() < HEADER_BYTES + SIGNATURE_BYTES {
            return Err(WireError::Short(datagram.len()));
        }
        let (signed, signature) = datagram.split_at(datagram.len() - SIGNATURE_BYTES);
        if signed[0] != VERSION {
            return Err(WireError::Version(signed[0]));
        }
        if signed[1..HEADER_BYTES] != self.cluster.0.to_le_bytes() {
            return Err(WireError::Cluster);
        }
        let signature: [u8; SIGNATURE_BYTES] = signature.try_into().map_err(|_| WireError::Short(datagram.len()))?;
        // `blake3::Hash` compares in constant time.
        if self.signature(to, network, signed) != blake3::Hash::from_bytes(signature) {
            return Err(WireError::Signature);
        }
        match postcard::take_from_bytes(&signed[HEADER_BYTES..]) {
            Ok((heartbeat, [])) => Ok(heartbeat),
            Ok(_) | Err(_) => Err(WireError::Malformed),
        }
    }

    fn signature(&self, to: NodeId, network: Network, signed: &[u8]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(&to.0.to_le_bytes()).update(&[network.0]).update(signed);
        hasher.finalize()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pollux_base::Epoch;

    fn heartbeat() -> Heartbeat {
        Heartbeat { from: NodeId(1), boot: u64::MAX, sequence: 300, epoch: Epoch(4), heard: Some((7, 9)) }
    }

    fn seal() -> Seal {
        Seal::new(ClusterId(5), &[9; 32])
    }

    #[test]
    fn a_heartbeat_arrives_as_it_was_sent() {
        let datagram = seal().seal(NodeId(2), Network(1), &heartbeat());
        assert!(datagram.len() < DATAGRAM_BYTES_MAX);
        assert_eq!(seal().open(NodeId(2), Network(1), &datagram), Ok(heartbeat()));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let datagram = seal().seal(NodeId(2), Network(0), &heartbeat());
        for bit in 0..datagram.len() * 8 {
            let mut broken = datagram.clone();
            broken[bit / 8] ^= 1 << (bit % 8);
            assert!(seal().open(NodeId(2), Network(0), &broken).is_err(), "bit {bit} was not noticed");
        }
        for len in 0..datagram.len() {
            assert!(seal().open(NodeId(2), Network(0), &datagram[..len]).is_err(), "cut at {len} was not noticed");
        }
    }

    #[test]
    fn a_recording_is_worth_nothing_elsewhere() {
        let datagram = seal().seal(NodeId(2), Network(0), &heartbeat());
        assert_eq!(seal().open(NodeId(3), Network(0), &datagram), Err(WireError::Signature));
        assert_eq!(seal().open(NodeId(2), Network(1), &datagram), Err(WireError::Signature));
        assert_eq!(Seal::new(ClusterId(6), &[9; 32]).open(NodeId(2), Network(0), &datagram), Err(WireError::Cluster));
        assert_eq!(Seal::new(ClusterId(5), &[8; 32]).open(NodeId(2), Network(0), &datagram), Err(WireError::Signature));
    }

    #[test]
    fn the_encoding_is_frozen() {
        let datagram = seal().seal(NodeId(2), Network(0), &heartbeat());
        let body: String =
            datagram[..datagram.len() - SIGNATURE_BYTES].iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(body, "010500000000000000000000000000000001ffffffffffffffffff01ac0204010709");
    }
}
