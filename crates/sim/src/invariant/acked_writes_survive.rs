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
    fn what_was_read_after_a_power_cut_stays() {
        let cuts = [Seen::PowerCut { node: A }, Seen::PowerCut { node: B }];
        assert!(lost_after(&[cuts[0].clone(), cuts[1].clone(), read(7, 0), answered(7, A, 2)]));
    }
}
