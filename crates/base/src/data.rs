//! Bytes on their way between a client, the disks and the wire: owned once, shared by counting, never copied (W11).

use crate::unit::BLOCK_BYTES;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Alignment that O_DIRECT asks of memory.
pub const ALIGNMENT: usize = BLOCK_BYTES as usize;

/// Bytes that have one owner and may be written, aligned for O_DIRECT. Becomes `Data` when filled.
pub struct Buffer {
    // One page longer than asked for; the part in use begins at the first aligned byte. A Box<[u8]> never moves its
    // bytes, so the place stays aligned for the life of the buffer, without `unsafe`.
    bytes: Box<[u8]>,
    range: Range<usize>,
}

impl Buffer {
    /// `len` zero bytes.
    pub fn zeroed(len: usize) -> Buffer {
        let bytes = vec![0u8; len + ALIGNMENT].into_boxed_slice();
        let start = bytes.as_ptr().align_offset(ALIGNMENT);
        Buffer { bytes, range: start..start + len }
    }
    /// A copy of `source`.
    pub fn copy_of(source: &[u8]) -> Buffer {
        let mut buffer = Buffer::zeroed(source.len());
        buffer.as_mut_slice().copy_from_slice(source);
        buffer
    }
    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[self.range.clone()]
    }
    /// The bytes, to be filled.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.bytes[self.range.clone()]
    }
    /// Ends writing: from now on the bytes are shared and do not change.
    pub fn freeze(self) -> Data {
        Data { range: self.range.clone(), buffer: Arc::new(self) }
    }
}

/// Bytes that no longer change; cloning and slicing share them.
#[derive(Clone)]
pub struct Data {
    buffer: Arc<Buffer>,
    range: Range<usize>,
}

impl Data {
    /// `len` zero bytes.
    pub fn zeroed(len: usize) -> Data {
        Buffer::zeroed(len).freeze()
    }
    /// A copy of `source`, aligned.
    pub fn copy_of(source: &[u8]) -> Data {
        Buffer::copy_of(source).freeze()
    }
    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.buffer.bytes[self.range.clone()]
    }
    /// How many bytes.
    pub fn len(&self) -> usize {
        self.range.len()
    }
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }
    /// A part of these bytes, shared. `part` is relative to this slice and must lie inside it.
    pub fn slice(&self, part: Range<usize>) -> Data {
        assert!(part.start <= part.end && part.end <= self.len(), "slice {part:?} of {} bytes", self.len());
        Data { buffer: self.buffer.clone(), range: self.range.start + part.start..self.range.start + part.end }
    }
    /// Whether the bytes lie in memory as O_DIRECT asks.
    pub fn is_aligned(&self) -> bool {
        self.as_slice().as_ptr().align_offset(ALIGNMENT) == 0
    }
}

impl PartialEq for Data {
    fn eq(&self, other: &Data) -> bool {
        self.as_slice() == other.as_slice()
    }
}
impl Eq for Data {}

impl fmt::Debug for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Data({} B)", self.len())
    }
}

/// A piece of an outgoing byte stream: a few bytes made for it (headers), or shared data. Senders gather pieces, so that
/// data is never copied behind its header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Segment {
    Bytes(Vec<u8>),
    Data(Data),
}

impl Segment {
    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        match self {
            Segment::Bytes(bytes) => bytes,
            Segment::Data(data) => data.as_slice(),
        }
    }
    /// How many bytes.
    pub fn len(&self) -> usize {
        self.as_slice().len()
    }
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.as_slice().is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_stay_aligned_when_frozen_and_sliced_at_blocks() {
        let mut buffer = Buffer::zeroed(3 * ALIGNMENT);
        buffer.as_mut_slice()[ALIGNMENT] = 7;
        let data = buffer.freeze();
        assert!(data.is_aligned());
        let second = data.slice(ALIGNMENT..2 * ALIGNMENT);
        assert!(second.is_aligned());
        assert_eq!(second.as_slice()[0], 7);
        assert_eq!(second.slice(0..1).as_slice(), &[7]);
    }
}
