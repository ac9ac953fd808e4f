//! W5: a new primary serves only when the old one can no longer: its lease is over on its own clock, it released it, or
//! it is dead. So no two data planes ever serve a group at once. One whose process is stopped does not serve; when it
//! goes on, it must notice before it answers (`one_writer_per_generation` watches that).

use super::Invariant;
use crate::history::Seen;
use crate::time::Time;
use pollux_base::{GroupId, NodeId, Stamp};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Default)]
pub struct NoTakeoverBeforeLeaseEndOrProof {
    serving: BTreeMap<GroupId, BTreeMap<NodeId, Stamp>>,
    stopped: BTreeSet<NodeId>,
}

impl Invariant for NoTakeoverBeforeLeaseEndOrProof {
    fn name(&self) -> &'static str {
        "no_takeover_before_lease_end_or_proof"
    }
    fn see(&mut self, _now: Time, seen: &Seen) -> Result<(), String> {
        match seen {
            Seen::Stopped { node, stopped: true } => {
                self.stopped.insert(*node);
            }
            Seen::Stopped { node, stopped: false } => {
                self.stopped.remove(node);
            }
            Seen::Serving { node, group, serving: false, .. } => {
                self.serving.entry(*group).or_default().remove(node);
            }
            Seen::Serving { node, group, stamp, serving: true } => {
                let serving = self.serving.entry(*group).or_default();
                serving.insert(*node, *stamp);
                let other = serving.iter().find(|(other, _)| *other != node && !self.stopped.contains(other));
                if let Some((other, older)) = other {
                    return Err(format!("{node} serves {group} under {stamp:?} while {other} does under {older:?}"));
                }
            }
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::broken::*;
    use super::*;

    #[test]
    fn a_new_primary_beside_the_old_one_is_caught() {
        let early = [serving(A, 1, true), serving(B, 2, true)];
        assert_eq!(watch(NoTakeoverBeforeLeaseEndOrProof::default(), &early).map_err(|(place, _)| place), Err(1));
        let fine = [serving(A, 1, true), serving(A, 1, false), serving(B, 2, true)];
        assert_eq!(watch(NoTakeoverBeforeLeaseEndOrProof::default(), &fine), Ok(()));
        let stopped = [serving(A, 1, true), Seen::Stopped { node: A, stopped: true }, serving(B, 2, true)];
        assert_eq!(watch(NoTakeoverBeforeLeaseEndOrProof::default(), &stopped), Ok(()));
    }
}
