//! The catalog: which volumes there are, and the notes of the caller. Small, whole in memory, twice on disk.
//!
//! A change is written to the first copy, flushed, written to the second, flushed, then acknowledged. So one copy is whole
//! at any time, and of two whole ones the higher sequence is the newer.

use crate::lanes::FamilyId;
use crate::layout::{BLOCK, BlockKind, CATALOG_BYTES, Header, seal, unseal};
use crate::slots::LayerId;
use pollux_base::checksum::crc32c;
use pollux_base::data::Buffer;
use pollux_base::{ByteCount, Data, GroupId, PoolId, VolumeId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Catalog {
    pub volumes: BTreeMap<VolumeId, Volume>,
    pub layers: BTreeMap<LayerId, Layer>,
    /// Layers made so far: a number is never given twice, so that what belonged to a layer that is gone cannot appear in
    /// another one.
    pub layers_made: u64,
    pub notes: BTreeMap<GroupId, Vec<u8>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    pub group: GroupId,
    pub size: ByteCount,
    /// Where its writes go, and its reads begin.
    pub layer: LayerId,
}

/// What was written between two snapshots: extents with slots of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    pub family: FamilyId,
}

impl Catalog {
    /// A new layer, and with it a new family.
    pub fn new_layer(&mut self) -> LayerId {
        self.layers_made += 1;
        let id = LayerId(self.layers_made);
        self.layers.insert(id, Layer { family: FamilyId(id.0) });
        id
    }

    fn body(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("numbers and bytes can always be written")
    }

    /// Whether it fits into its place on disk with `note_bytes` more of notes, or another volume with its layer. Reckons
    /// the longest form of each number.
    pub fn fits(&self, note_bytes: usize) -> bool {
        const VOLUME_BYTES: usize = 40;
        const LAYER_BYTES: usize = 20;
        const NOTE_BYTES: usize = 20;
        let entries = (1 + self.volumes.len()) * VOLUME_BYTES
            + (1 + self.layers.len()) * LAYER_BYTES
            + (2 + self.notes.len()) * NOTE_BYTES;
        let notes: usize = self.notes.values().map(Vec::len).sum();
        entries + notes + note_bytes <= CATALOG_BYTES - BLOCK
    }

    /// Header block, then the body.
    pub fn encode(&self, sequence: u64, pool: PoolId) -> Data {
        let body = self.body();
        assert!(body.len() <= CATALOG_BYTES - BLOCK, "whether it fits was asked before");
        let mut buffer = Buffer::zeroed((BLOCK + body.len()).next_multiple_of(BLOCK));
        let (head, tail) = buffer.as_mut_slice().split_at_mut(BLOCK);
        tail[..body.len()].copy_from_slice(&body);
        let one = u64::from(crc32c(&body));
        let header = Header { kind: BlockKind::Catalog, part: 0, sequence, one, two: 0, len: body.len() };
        seal(head, pool, header, &[]);
        buffer.freeze()
    }

    /// Bytes of the body that belongs to this head, if the head is whole.
    pub fn body_len(head: &[u8], pool: PoolId) -> Option<usize> {
        let (header, _) = unseal(head, BlockKind::Catalog, Some(pool)).ok()?;
        Some(header.len.min(CATALOG_BYTES - BLOCK))
    }

    /// A copy as read, with its sequence; `None` if it is damaged.
    pub fn decode(bytes: &[u8], pool: PoolId) -> Option<(u64, Catalog)> {
        let (head, tail) = bytes.split_at_checked(BLOCK)?;
        let (header, _) = unseal(head, BlockKind::Catalog, Some(pool)).ok()?;
        let body = tail.get(..header.len)?;
        if u64::from(crc32c(body)) != header.one {
            return None;
        }
        let (catalog, rest) = postcard::take_from_bytes(body).ok()?;
        rest.is_empty().then_some((header.sequence, catalog))
    }
}
