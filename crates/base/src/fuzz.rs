//! What a fuzz target is. Each crate that reads bytes from outside lists its own (`pollux_store::fuzz::TARGETS` and so on):
//! the programs of `fuzz/` run them on whatever a fuzzer makes up, the tests of the crate on the committed corpus.
//!
//! A target gives back nothing: it panics when a promise does not hold. It is as strict as the promise, so it says more than
//! "does not crash" wherever more is promised.

/// One parser, or one machine behind a parser, under arbitrary bytes.
#[derive(Clone, Copy)]
pub struct Target {
    /// Also the name of its folder of the corpus.
    pub name: &'static str,
    pub run: fn(&[u8]),
    /// Inputs made by the real encoders, from which a fuzzer begins.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// Choices read off the front of a fuzzer's bytes. When they are used up every further choice is 0, so that any bytes are
/// an input and a shorter input is a simpler one.
pub struct Tape<'a>(pub &'a [u8]);

impl<'a> Tape<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// At most `len` bytes.
    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let taken = self.bytes(N);
        array[..taken.len()].copy_from_slice(taken);
        array
    }

    pub fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: usize) -> usize {
        if bound <= 256 { usize::from(self.u8()) % bound } else { usize::from(self.u16()) % bound }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tape_gives_its_bytes_in_order_and_then_zeros() {
        let mut tape = Tape(&[1, 2, 0, 3, 9]);
        assert_eq!((tape.u8(), tape.u16(), tape.bytes(1)), (1, 2, [3].as_slice()));
        assert_eq!((tape.u32(), tape.u64(), tape.is_empty()), (9, 0, true));
        assert_eq!(tape.below(7), 0);
    }
}
