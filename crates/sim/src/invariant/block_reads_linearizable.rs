//! A volume behaves as one disk: a read returns the newest value, or one of a write that is under way, and what was once
//! read is not taken back; bytes that were never written there are never returned.

use super::Invariant;
use crate::blocks::{Blocks, Verdict};
use crate::history::Seen;
use crate::time::Time;

#[derive(Default)]
pub struct BlockReadsLinearizable(Blocks);

impl Invariant for BlockReadsLinearizable {
    fn name(&self) -> &'static str {
        "block_reads_linearizable"
    }
    fn see(&mut self, _now: Time, seen: &Seen) -> Result<(), String> {
        match self.0.see(seen) {
            Verdict::Fine | Verdict::Lost { .. } => Ok(()),
            Verdict::Impossible { block, value, legal } => {
                Err(format!("block {block} reads as {value:?}, possible is only: {legal:?}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::broken::*;
    use super::*;
    use crate::history::Value;

    fn is_fine(history: &[Seen]) -> bool {
        watch(BlockReadsLinearizable::default(), history).is_ok()
    }
    fn client_gone() -> Seen {
        Seen::ClientGone { volumes: vec![VOLUME] }
    }

    #[test]
    fn bytes_never_written_there_are_caught() {
        assert!(!is_fine(&[write(1, 0), acked(1, A, 1), read(1, 0), answered(1, A, Value::GARBAGE)]));
        assert!(!is_fine(&[write(1, 0), acked(1, A, 1), read(1, 1), answered(1, A, 1)]), "another block's value");
    }

    #[test]
    fn a_write_of_a_dead_client_must_not_appear_once_its_absence_was_seen() {
        let before = [write(1, 0), acked(1, A, 1), write(2, 0), client_gone(), read(1, 0)];
        for (first, second, fine) in [(1, 1, true), (2, 2, true), (1, 2, false)] {
            let mut history = before.to_vec();
            history.extend([answered(1, B, first), read(2, 0), answered(2, B, second)]);
            assert_eq!(is_fine(&history), fine, "{first} then {second}");
        }
    }

    #[test]
    fn a_value_seen_of_a_write_under_way_must_not_vanish() {
        let history = [write(1, 0), read(1, 0), answered(1, A, 1), read(2, 0), answered(2, A, 0)];
        assert!(
            !is_fine(&history)
                || watch(super::super::acked_writes_survive::AckedWritesSurvive::default(), &history).is_err()
        );
    }

    #[test]
    fn a_read_beside_a_write_may_see_either() {
        for value in [0, 1] {
            assert!(is_fine(&[
                write(1, 0),
                read(1, 0),
                answered(1, A, value),
                acked(1, A, 1),
                read(2, 0),
                answered(2, A, 1)
            ]));
            assert!(is_fine(&[read(1, 0), write(1, 0), acked(1, A, 1), answered(1, A, value)]));
        }
    }
}
