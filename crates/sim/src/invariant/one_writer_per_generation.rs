//! Under one stamp only one node ever answers for a group, and once a newer stamp was answered under, an older one never
//! is again.

use super::Invariant;
use crate::history::Seen;
use crate::time::Time;
use pollux_base::{GroupId, NodeId, Stamp};
use std::collections::BTreeMap;

#[derive(Default)]
pub struct OneWriterPerGeneration {
    writers: BTreeMap<(GroupId, Stamp), NodeId>,
}

impl Invariant for OneWriterPerGeneration {
    fn name(&self) -> &'static str {
        "one_writer_per_generation"
    }
    fn see(&mut self, _now: Time, seen: &Seen) -> Result<(), String> {
        let (Seen::WriteAcked { node, group, stamp, .. }
        | Seen::FlushAcked { node, group, stamp, .. }
        | Seen::ReadAnswered { node, group, stamp, .. }) = seen
        else {
            return Ok(());
        };
        let writer = *self.writers.entry((*group, *stamp)).or_insert(*node);
        if writer != *node {
            return Err(format!("{node} answers for {group} under {stamp:?}, and so did {writer}"));
        }
        let newest = self.writers.range((*group, *stamp)..).take_while(|((other, _), _)| other == group).last();
        match newest {
            Some(((_, newest), by)) if newest > stamp && by != node => {
                Err(format!("{node} answers for {group} under {stamp:?} after {by} did under {newest:?}"))
            }
            _ => Ok(()),
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
    }
}
