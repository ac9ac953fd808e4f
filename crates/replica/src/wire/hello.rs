//! The first bytes of a connection, both ways: who speaks, for which cluster, in which versions. Fixed length, so that
//! another program's bytes on our port are known after as many.

use super::WireError;
use pollux_base::checksum::crc32c;
use pollux_base::{ClusterId, NodeId, Session};
use zerocopy::byteorder::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

const MAGIC: [u8; 8] = *b"pollux-r";

/// Who speaks. `session` is the sender's number for this connection, for its own and the peer's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    pub cluster: ClusterId,
    pub node: NodeId,
    pub session: Session,
    pub version_min: u16,
    pub version_max: u16,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Layout {
    magic: [u8; 8],
    version_min: U16,
    version_max: U16,
    reserved: U32,
    cluster: U128,
    node: U64,
    session: U64,
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
        reserved: 0.into(),
        cluster: hello.cluster.0.into(),
        node: hello.node.0.into(),
        session: hello.session.0.into(),
        crc: 0.into(),
    };
    layout.crc = crc32c(&layout.as_bytes()[..HELLO_BYTES - 4]).into();
    let mut bytes = [0; HELLO_BYTES];
    bytes.copy_from_slice(layout.as_bytes());
    bytes
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
        session: Session(layout.session.get()),
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
