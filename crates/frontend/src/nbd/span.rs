//! A range of bytes as blocks: what of it are whole blocks, and what is a part of one.

use pollux_base::unit::{BLOCK_BYTES, BlockCount, BlockIndex, BlockRange};

/// `start .. start + len`, never empty, inside an export.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Span {
    pub start: u64,
    pub len: u64,
}

/// A piece of a span that is one operation of the data plane.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    Whole(BlockRange),
    /// These bytes inside one block.
    Inside {
        block: BlockIndex,
        offset: usize,
        len: usize,
    },
}

impl Part {
    /// How many bytes.
    pub fn len(self) -> usize {
        match self {
            Part::Whole(range) => range.count.bytes().0 as usize,
            Part::Inside { len, .. } => len,
        }
    }
}

impl Span {
    fn end(self) -> u64 {
        self.start + self.len
    }

    /// The blocks that it touches.
    pub fn cover(self) -> BlockRange {
        between(self.start / BLOCK_BYTES, self.end().div_ceil(BLOCK_BYTES))
    }

    /// The blocks that it covers whole; there may be none.
    pub fn inner(self) -> BlockRange {
        let start = self.start.div_ceil(BLOCK_BYTES);
        between(start, (self.end() / BLOCK_BYTES).max(start))
    }

    /// Where it begins in the first block that it touches.
    pub fn offset(self) -> usize {
        (self.start % BLOCK_BYTES) as usize
    }

    /// In order, without a gap: at most the end of a block, whole ones, and the beginning of one.
    pub fn parts(self) -> [Option<Part>; 3] {
        let (inner, end) = (self.inner(), self.end());
        let inside = |start: u64, end: u64| Part::Inside {
            block: BlockIndex(start / BLOCK_BYTES),
            offset: (start % BLOCK_BYTES) as usize,
            len: (end - start) as usize,
        };
        let (inner_start, inner_end) = (inner.start.bytes().0, inner.end().bytes().0);
        let head = (self.start < inner_start).then(|| inside(self.start, end.min(inner_start)));
        let whole = (inner.count.0 > 0).then_some(Part::Whole(inner));
        let tail = (end > inner_end).then(|| inside(inner_end, end));
        [head, whole, tail]
    }
}

fn between(start: u64, end: u64) -> BlockRange {
    BlockRange::new(BlockIndex(start), BlockCount(end - start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_the_span_in_order_and_none_crosses_a_block_that_it_does_not_fill() {
        for start in [0, 1, 511, 512, 4095, 4096, 4097, 8191, 8192, 12_000] {
            for len in [1, 2, 512, 3584, 4095, 4096, 4097, 8191, 8192, 8193, 20_000] {
                let span = Span { start, len };
                let mut at = start;
                for part in span.parts().into_iter().flatten() {
                    let begins = match part {
                        Part::Whole(range) => range.start.bytes().0,
                        Part::Inside { block, offset, len } => {
                            assert!(offset + len <= BLOCK_BYTES as usize && len < BLOCK_BYTES as usize && len > 0);
                            block.bytes().0 + offset as u64
                        }
                    };
                    assert_eq!(begins, at, "{span:?}");
                    at += part.len() as u64;
                }
                assert_eq!(at, start + len, "{span:?}");
                let cover = span.cover();
                assert!(cover.start.bytes().0 <= start && cover.end().bytes().0 >= start + len);
                assert!((cover.count.bytes().0) < len + 2 * BLOCK_BYTES, "{span:?}");
            }
        }
    }
}
