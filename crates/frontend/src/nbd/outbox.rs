//! Bytes on their way to the client: small replies run together, data stays shared.

use pollux_base::{Data, Segment};

#[derive(Default)]
pub struct Outbox {
    segments: Vec<Segment>,
    len: usize,
}

impl Outbox {
    /// How many bytes wait.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Everything that waits, in order.
    pub fn take(&mut self) -> Vec<Segment> {
        self.len = 0;
        std::mem::take(&mut self.segments)
    }

    /// The first `len` bytes of what waits, or all.
    pub fn take_up_to(&mut self, len: usize) -> Vec<Segment> {
        if self.len <= len {
            return self.take();
        }
        let (mut taken, mut left) = (Vec::new(), len);
        let mut rest = std::mem::take(&mut self.segments).into_iter();
        for segment in rest.by_ref() {
            if segment.len() <= left {
                left -= segment.len();
                taken.push(segment);
                continue;
            }
            let (now, later) = split(segment, left);
            taken.push(now);
            self.segments.push(later);
            break;
        }
        self.segments.extend(rest);
        self.len -= len;
        taken
    }

    pub fn bytes(&mut self, bytes: &[u8]) {
        self.len += bytes.len();
        match self.segments.last_mut() {
            Some(Segment::Bytes(last)) => last.extend_from_slice(bytes),
            _ => self.segments.push(Segment::Bytes(bytes.to_vec())),
        }
    }

    pub fn data(&mut self, data: Data) {
        self.len += data.len();
        self.segments.push(Segment::Data(data));
    }

    pub fn u16(&mut self, value: u16) {
        self.bytes(&value.to_be_bytes());
    }

    pub fn u32(&mut self, value: u32) {
        self.bytes(&value.to_be_bytes());
    }

    pub fn u64(&mut self, value: u64) {
        self.bytes(&value.to_be_bytes());
    }
}

fn split(segment: Segment, at: usize) -> (Segment, Segment) {
    match segment {
        Segment::Bytes(mut bytes) => {
            let rest = bytes.split_off(at);
            (Segment::Bytes(bytes), Segment::Bytes(rest))
        }
        Segment::Data(data) => (Segment::Data(data.slice(0..at)), Segment::Data(data.slice(at..data.len()))),
    }
}

/// Reads big-endian numbers and strings off the front of some bytes; `None` when there are too few.
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(bytes)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*bytes)
    }

    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string behind its 32-bit length.
    pub fn string(&mut self) -> Option<&'a [u8]> {
        let len = self.u32()?;
        self.bytes(usize::try_from(len).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_in_pieces_is_the_same_as_at_once() {
        let fill = || {
            let mut outbox = Outbox::default();
            outbox.bytes(b"head");
            outbox.data(Data::copy_of(&[7; 100]));
            outbox.u32(9);
            outbox
        };
        let flat = |segments: Vec<Segment>| segments.iter().flat_map(Segment::as_slice).copied().collect::<Vec<u8>>();
        let whole = flat(fill().take());
        for len in 1..whole.len() + 2 {
            let (mut outbox, mut taken) = (fill(), Vec::new());
            while !outbox.is_empty() {
                let piece = flat(outbox.take_up_to(len));
                assert!(!piece.is_empty() && piece.len() <= len);
                taken.extend(piece);
            }
            assert_eq!(taken, whole);
        }
    }
}
