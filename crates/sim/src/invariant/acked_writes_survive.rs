//! An acknowledged write is there, whatever fails: a read never returns anything older. Only a power cut of every replica
//! that held it may take back what was acknowledged, and nothing that was flushed.

use super::Invariant;
use crate::blocks::{Blocks, Verdict};
use crate::history::Seen;
use crate::time::Time;

#[derive(Default)]
pub struct AckedWritesSurvive(Blocks);

impl Invariant for AckedWritesSurvive {
    fn name(&self) -> &'static str {
        "acked_writes_survive"
    }
    fn see(&mut self, _now: Time, seen: &Seen) -> Result<(), String> {
        match self.0.see(seen) {
            Verdict::Fine | Verdict::Impossible { .. } => Ok(()),
            Verdict::Lost { block, value, legal } => {
                Err(format!("block {block} reads as {value:?}, older than what was acknowledged: {legal:?}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::broken::*;
    use super::*;
    use crate::history::Value;

    fn lost_after(events: &[Seen]) -> bool {
        let mut history = vec![write(1, 0), acked(1, A, 1), write(2, 0), acked(2, A, 1)];
        history.extend_from_slice(events);
        history.extend([read(1, 0), answered(1, B, 1)]);
        watch(AckedWritesSurvive::default(), &history).is_err()
    }

    #[test]
    fn a_read_of_the_value_before_is_caught() {
        assert!(lost_after(&[]));
        assert!(lost_after(&[Seen::PowerCut { node: A }]), "the other replica had it");
        let gone = Seen::ClientGone { volumes: vec![VOLUME] };
        assert!(lost_after(&[gone]), "the death of the client takes nothing back");
    }

    #[test]
    fn only_a_power_cut_of_all_holders_takes_back_and_only_what_was_not_flushed() {
        let cuts = [Seen::PowerCut { node: A }, Seen::PowerCut { node: B }];
        assert!(!lost_after(&cuts));
        let flush = Seen::Flush { flush: 1, volume: VOLUME };
        let flushed = Seen::FlushAcked { flush: 1, node: A, group: GROUP, stamp: stamp(1) };
        assert!(lost_after(&[flush, flushed, cuts[0].clone(), cuts[1].clone()]));
    }

    #[test]
    fn what_only_a_dropped_replica_held_may_be_gone() {
        let dropped = record(2, A, &[A]);
        assert!(lost_after(std::slice::from_ref(&dropped)));
        assert!(!lost_after(&[Seen::PowerCut { node: A }, dropped]));
    }

    #[test]
    fn a_patch_that_undoes_another_of_the_same_block_is_caught() {
        let both_patched = Value([2, 3, 1, 1, 1, 1, 1, 1]);
        let undone = Value([1, 3, 1, 1, 1, 1, 1, 1]);
        let history = |value| {
            let patches = [patch(2, 0, 0), patch(3, 0, 1), acked(3, A, 1), acked(2, A, 1)];
            [&[write(1, 0), acked(1, A, 1)], patches.as_slice(), &[read(1, 0), answered_with(1, A, value)]].concat()
        };
        assert!(watch(AckedWritesSurvive::default(), &history(both_patched)).is_ok());
        assert!(watch(AckedWritesSurvive::default(), &history(undone)).is_err());
    }

    #[test]
    fn a_patch_with_fua_keeps_its_whole_block() {
        let fua = Seen::WriteAcked { write: 2, node: A, group: GROUP, stamp: stamp(1), in_sync: both(), fua: true };
        let cuts = [Seen::PowerCut { node: A }, Seen::PowerCut { node: B }];
        let history = |value| {
            let patched = [write(1, 0), acked(1, A, 1), patch(2, 0, 0), fua.clone()];
            [&patched, cuts.as_slice(), &[read(1, 0), answered_with(1, A, value)]].concat()
        };
        assert!(watch(AckedWritesSurvive::default(), &history(Value([2, 1, 1, 1, 1, 1, 1, 1]))).is_ok());
        assert!(watch(AckedWritesSurvive::default(), &history(Value([2, 0, 0, 0, 0, 0, 0, 0]))).is_err());
        assert!(watch(AckedWritesSurvive::default(), &history(Value::of(1))).is_err());
    }

    #[test]
    fn what_was_read_after_a_power_cut_stays() {
        let cuts = [Seen::PowerCut { node: A }, Seen::PowerCut { node: B }];
        assert!(lost_after(&[cuts[0].clone(), cuts[1].clone(), read(7, 0), answered(7, A, 2)]));
    }
}
