//! Bytes on their way between a client, the disks and the wire: owned once, shared by counting, never copied (W11).

use crate::unit::BLOCK_BYTES;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Alignment that O_DIRECT asks of memory.
pub const ALIGNMENT: usize = BLOCK_BYTES as usize;
/// Memory of buffers that nobody uses any more and that each thread keeps for the next: some hundred small requests or
/// some large ones.
const SPARE_BYTES_MAX: usize = 8 << 20;

#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
struct Page([u8; ALIGNMENT]);

const _: () = assert!(align_of::<Page>() == ALIGNMENT);

/// Memory to be used again, by its number of pages. What the allocator gives anew for each block costs more than what is
/// done with it.
#[derive(Default)]
struct Spare {
    bytes: usize,
    by_pages: BTreeMap<usize, Vec<Vec<Page>>>,
}

thread_local! {
    static SPARE: RefCell<Spare> = RefCell::default();
}

/// Bytes that have one owner and may be written, aligned for O_DIRECT. Becomes `Data` when filled.
pub struct Buffer {
    pages: Vec<Page>,
    len: usize,
}

impl Buffer {
    /// `len` zero bytes.
    pub fn zeroed(len: usize) -> Buffer {
        let mut spare = Buffer::spare(len);
        spare.iter_mut().for_each(|pages| pages.zero());
        Buffer::of(spare, len)
    }
    /// `len` bytes of any value, all of which are to be written before any is read.
    pub fn any(len: usize) -> Buffer {
        Buffer::of(Buffer::spare(len), len)
    }
    /// Memory for so many bytes that was used before.
    fn spare(len: usize) -> Option<Vec<Page>> {
        let count = len.div_ceil(ALIGNMENT);
        let spare = SPARE.try_with(|spare| {
            let spare = &mut *spare.borrow_mut();
            let pages = spare.by_pages.get_mut(&count)?.pop()?;
            spare.bytes -= count * ALIGNMENT;
            Some(pages)
        });
        spare.ok().flatten()
    }
    fn of(spare: Option<Vec<Page>>, len: usize) -> Buffer {
        Buffer { pages: spare.unwrap_or_else(|| vec![Page::new_zeroed(); len.div_ceil(ALIGNMENT)]), len }
    }
    /// A copy of `source`.
    pub fn copy_of(source: &[u8]) -> Buffer {
        let mut buffer = Buffer::any(source.len());
        buffer.as_mut_slice().copy_from_slice(source);
        buffer
    }
    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.pages.as_bytes()[..self.len]
    }
    /// The bytes, to be filled.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.pages.as_mut_bytes()[..self.len]
    }
    /// Ends writing: from now on the bytes are shared and do not change.
    pub fn freeze(self) -> Data {
        Data { range: 0..self.len, buffer: Arc::new(self) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let pages = std::mem::take(&mut self.pages);
        let bytes = pages.len() * ALIGNMENT;
        if bytes == 0 || bytes > SPARE_BYTES_MAX {
            return;
        }
        // A thread that ends keeps nothing.
        let _ = SPARE.try_with(|spare| {
            let spare = &mut *spare.borrow_mut();
            if spare.bytes + bytes > SPARE_BYTES_MAX {
                *spare = Spare::default();
            }
            spare.bytes += bytes;
            spare.by_pages.entry(pages.len()).or_default().push(pages);
        });
    }
}

/// A buffer whose bytes arrive piece by piece, in order.
pub struct Filling {
    buffer: Buffer,
    filled: usize,
}

impl Filling {
    /// A buffer that is to have `len` bytes.
    pub fn new(len: usize) -> Filling {
        Filling { buffer: Buffer::any(len), filled: 0 }
    }
    /// How many bytes have not arrived yet.
    pub fn missing(&self) -> usize {
        self.buffer.len - self.filled
    }
    /// Takes what it can use of `input`, and says how much that was.
    pub fn take(&mut self, input: &[u8]) -> usize {
        let taken = input.len().min(self.missing());
        self.buffer.as_mut_slice()[self.filled..self.filled + taken].copy_from_slice(&input[..taken]);
        self.filled += taken;
        taken
    }
    /// The whole buffer.
    pub fn finish(self) -> Buffer {
        assert!(self.missing() == 0, "{} of {} bytes have not arrived", self.missing(), self.buffer.len);
        self.buffer
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
        &self.buffer.as_slice()[self.range.clone()]
    }
    /// The whole buffer, to be written anew, if nobody else holds a part of it.
    pub fn reclaim(self) -> Result<Buffer, Data> {
        let Data { buffer, range } = self;
        Arc::try_unwrap(buffer).map_err(|buffer| Data { buffer, range })
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
        let data = data.reclaim().err().expect("a part of it is still held");
        drop(second);
        assert_eq!(data.reclaim().expect("nobody else holds it").as_slice().len(), 3 * ALIGNMENT);
    }

    #[test]
    fn what_arrives_in_pieces_is_whole_aligned_and_takes_no_byte_too_many() {
        let source: Vec<u8> = (0..2 * ALIGNMENT).map(|index| (index % 251) as u8).collect();
        let mut filling = Filling::new(source.len());
        let mut rest = source.as_slice();
        for piece in [1, 4095, 3000] {
            assert_eq!(filling.take(&rest[..piece]), piece);
            rest = &rest[piece..];
        }
        assert_eq!(filling.missing(), rest.len());
        let beyond = [rest, &[1, 2, 3]].concat();
        assert_eq!(filling.take(&beyond), rest.len());
        assert_eq!(filling.take(&[1]), 0);
        let data = filling.finish().freeze();
        assert!(data.is_aligned());
        assert_eq!(data.as_slice(), source);
    }
}
