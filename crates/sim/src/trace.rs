//! The written record of a run, for people, and its hash, by which two runs are compared.

use crate::time::Time;
use std::collections::VecDeque;

/// What is done with the lines.
pub enum Trace {
    /// Nothing: they are not even made.
    Off,
    /// The last so many are kept.
    Tail { lines: VecDeque<String>, most: usize },
    /// Each is handed out.
    Print(Box<dyn FnMut(&str)>),
    /// Only their hash (FNV-1a, 64 bits).
    Hash(u64),
}

impl Trace {
    pub fn hash() -> Trace {
        Trace::Hash(0xcbf2_9ce4_8422_2325)
    }
    pub fn tail(most: usize) -> Trace {
        Trace::Tail { lines: VecDeque::new(), most }
    }
    pub fn is_off(&self) -> bool {
        matches!(self, Trace::Off)
    }
    /// Adds a line; it is made only where it is wanted.
    pub fn line(&mut self, now: Time, line: impl FnOnce() -> String) {
        match self {
            Trace::Off => {}
            Trace::Tail { lines, most } => {
                if lines.len() >= *most {
                    lines.pop_front();
                }
                lines.push_back(format!("{now} {}", line()));
            }
            Trace::Print(print) => print(&format!("{now} {}", line())),
            Trace::Hash(hash) => {
                for byte in format!("{now} {}", line()).bytes() {
                    *hash = (*hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
                }
            }
        }
    }
}
