//! Under one stamp only one node ever answers for a group, and once a newer stamp was answered under, an older one is no
//! more. Only the end of a write or flush that was asked before may still be told late: it was done everywhere in its time
//! (W1), and a primary that stood still may hear of that when it wakes. A read never.

use super::Invariant;
use crate::history::Seen;
use crate::time::Time;
use pollux_base::{GroupId, NodeId, Stamp};
use std::collections::BTreeMap;

#[derive(Default)]
pub struct OneWriterPerGeneration {
    /// Who answers under each stamp, and the place in the history of the first answer.
    writers: BTreeMap<(GroupId, Stamp), (NodeId, u64)>,
    /// Place in the history at which each write and flush was asked.
    asked: BTreeMap<u64, u64>,
    place: u64,
}

impl Invariant for OneWriterPerGeneration {
    fn name(&self) -> &'static str {
        "one_writer_per_generation"
    }
    fn see(&mut self, _now: Time, seen: &Seen) -> Result<(), String> {
        self.place += 1;
        let (node, group, stamp, asked) = match seen {
            Seen::Write { write: number, .. } | Seen::Flush { flush: number, .. } => {
                self.asked.insert(*number, self.place);
                return Ok(());
            }
            Seen::WriteAcked { write: number, node, group, stamp, .. }
            | Seen::FlushAcked { flush: number, node, group, stamp } => {
                (node, group, stamp, self.asked.remove(number).unwrap_or(u64::MAX))
            }
            Seen::ReadAnswered { node, group, stamp, .. } => (node, group, stamp, u64::MAX),
            _ => return Ok(()),
        };
        let (writer, _) = *self.writers.entry((*group, *stamp)).or_insert((*node, self.place));
        if writer != *node {
            return Err(format!("{node} answers for {group} under {stamp:?}, and so did {writer}"));
        }
        let of_group = self.writers.range((*group, *stamp)..).take_while(|((other, _), _)| other == group);
        let mut newer = of_group.filter(|((_, other), (by, since))| other > stamp && by != node && *since < asked);
        match newer.next() {
            Some(((_, newer), (by, _))) => {
                Err(format!("{node} answers for {group} under {stamp:?} after {by} did under {newer:?}"))
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::broken::*;
    use super::*;

    #[test]
    fn two_writers_under_one_stamp_are_caught() {
        let history = [write(1, 0), acked(1, A, 3), write(2, 0), acked(2, B, 3)];
        assert_eq!(watch(OneWriterPerGeneration::default(), &history).map_err(|(place, _)| place), Err(3));
    }

    #[test]
    fn an_answer_of_the_old_primary_after_one_of_the_new_is_caught() {
        let history = [acked(1, A, 3), acked(2, B, 4), answered(1, A, 2)];
        assert_eq!(watch(OneWriterPerGeneration::default(), &history).map_err(|(place, _)| place), Err(2));
        let history = [acked(1, A, 3), acked(2, A, 4), acked(3, B, 5), acked(4, B, 5)];
        assert_eq!(watch(OneWriterPerGeneration::default(), &history), Ok(()));
        let late = [write(1, 0), acked(3, B, 5), acked(1, A, 4)];
        assert_eq!(watch(OneWriterPerGeneration::default(), &late), Ok(()), "it was done before, and is told late");
        let asked_late = [acked(3, B, 5), write(1, 0), acked(1, A, 4)];
        assert!(watch(OneWriterPerGeneration::default(), &asked_late).is_err());
    }
}
