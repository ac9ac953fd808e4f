//! The first bytes of a connection, both ways: who speaks, for which cluster, in which versions. Fixed length, so that
//! another program's bytes on our port are known after as many.

use super::{WIRE_VERSION, WireError};
use pollux_base::checksum::crc32c;
use pollux_base::{ClusterId, NodeId};
use zerocopy::byteorder::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

const MAGIC: [u8; 8] = *b"pollux-r";

/// Names a key that two nodes share, without telling anything of it. 0 is none.
pub type KeyId = u64;
/// Keys that a hello can offer: the newest and the one before, while its successor is on its way to the peer.
pub const KEYS_MAX: usize = 2;

/// Who speaks. All of it is public; both hellos together go into the keys of a protected connection, so that a changed
/// bit in either leaves two sides that do not understand each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    pub cluster: ClusterId,
    pub node: NodeId,
    /// Whether everything after the hellos is encrypted. Not negotiated: both are set alike or the connection ends.
    pub is_protected: bool,
    /// From who dials: the keys it has, the best first. From who is dialled: the one that it has taken.
    pub keys: [KeyId; KEYS_MAX],
    /// Random, never the same twice.
    pub nonce: [u8; 32],
    pub version_min: u16,
    pub version_max: u16,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Layout {
    magic: [u8; 8],
    version_min: U16,
    version_max: U16,
    is_protected: u8,
    reserved: [u8; 3],
    cluster: U128,
    node: U64,
    keys: [U64; KEYS_MAX],
    nonce: [u8; 32],
    /// CRC-32C of all bytes before.
    crc: U32,
}

/// Length of an encoded `Hello`.
pub const HELLO_BYTES: usize = size_of::<Layout>();

/// The bytes of a hello.
pub fn encode_hello(hello: &Hello) -> [u8; HELLO_BYTES] {
    let mut layout = Layout {
        magic: MAGIC,
        version_min: hello.version_min.into(),
        version_max: hello.version_max.into(),
        is_protected: hello.is_protected.into(),
        reserved: [0; 3],
        cluster: hello.cluster.0.into(),
        node: hello.node.0.into(),
        keys: hello.keys.map(U64::from),
        nonce: hello.nonce,
        crc: 0.into(),
    };
    layout.crc = crc32c(&layout.as_bytes()[..HELLO_BYTES - 4]).into();
    let mut bytes = [0; HELLO_BYTES];
    bytes.copy_from_slice(layout.as_bytes());
    bytes
}

/// Whether bytes may still become a hello of a version that is spoken here. Another program, or another version, whose
/// hello may be of another length, is told by its first bytes.
pub fn check_start(bytes: &[u8]) -> Result<(), WireError> {
    let len = bytes.len().min(MAGIC.len());
    if bytes[..len] != MAGIC[..len] {
        return Err(WireError::NotPollux);
    }
    if let Some([min_low, min_high, max_low, max_high]) = bytes.get(8..12) {
        let peer = (u16::from_le_bytes([*min_low, *min_high]), u16::from_le_bytes([*max_low, *max_high]));
        if peer.1 < WIRE_VERSION || peer.0 > WIRE_VERSION {
            return Err(WireError::NoCommonVersion { own: (WIRE_VERSION, WIRE_VERSION), peer });
        }
    }
    Ok(())
}

/// Reads a hello.
pub fn decode_hello(bytes: &[u8; HELLO_BYTES]) -> Result<Hello, WireError> {
    let layout = Layout::ref_from_bytes(bytes).expect("the array is as long as the layout, which has no alignment");
    if layout.magic != MAGIC {
        return Err(WireError::NotPollux);
    }
    let actual = crc32c(&bytes[..HELLO_BYTES - 4]);
    if layout.crc.get() != actual {
        return Err(WireError::HeaderChecksum { expected: layout.crc.get(), actual });
    }
    Ok(Hello {
        cluster: ClusterId(layout.cluster.get()),
        node: NodeId(layout.node.get()),
        is_protected: layout.is_protected != 0,
        keys: layout.keys.map(|key| key.get()),
        nonce: layout.nonce,
        version_min: layout.version_min.get(),
        version_max: layout.version_max.get(),
    })
}

/// The version in which both speak, the newest that both know; an error if they are of different clusters or have no
/// version in common.
pub fn agree(own: &Hello, peer: &Hello) -> Result<u16, WireError> {
    if own.cluster != peer.cluster {
        return Err(WireError::OtherCluster { expected: own.cluster, found: peer.cluster });
    }
    if own.node == peer.node {
        return Err(WireError::SameNode(own.node));
    }
    let version = own.version_max.min(peer.version_max);
    if version < own.version_min.max(peer.version_min) {
        return Err(WireError::NoCommonVersion {
            own: (own.version_min, own.version_max),
            peer: (peer.version_min, peer.version_max),
        });
    }
    Ok(version)
}
