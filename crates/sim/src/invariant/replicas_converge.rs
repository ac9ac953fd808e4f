//! When all is healed and quiet, every replica is in sync again and all hold the same bytes and the same checksums.

use super::Invariant;
use crate::history::{Seen, Value};
use crate::time::Time;
use pollux_base::{BlockChecksum, NodeId, VolumeId};
use std::collections::BTreeMap;

type Contents = BTreeMap<u64, (Value, BlockChecksum)>;

#[derive(Default)]
pub struct ReplicasConverge {
    first: BTreeMap<VolumeId, (NodeId, Contents)>,
}

impl Invariant for ReplicasConverge {
    fn name(&self) -> &'static str {
        "replicas_converge"
    }
    fn see(&mut self, _now: Time, seen: &Seen) -> Result<(), String> {
        let Seen::Replica { node, volume, in_sync, blocks } = seen else { return Ok(()) };
        if !in_sync {
            return Err(format!("{volume} on {node} is not in sync although all is healed"));
        }
        let Some((other, first)) = self.first.get(volume) else {
            self.first.insert(*volume, (*node, blocks.clone()));
            return Ok(());
        };
        let differs = first.keys().chain(blocks.keys()).find(|block| first.get(block) != blocks.get(block));
        match differs {
            None => Ok(()),
            Some(block) => Err(format!(
                "{volume} block {block}: {other} holds {:?}, {node} holds {:?}",
                first.get(block),
                blocks.get(block)
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::broken::*;
    use super::*;

    fn replica(node: NodeId, in_sync: bool, blocks: &[(u64, u64)]) -> Seen {
        let blocks = blocks.iter().map(|(block, write)| (*block, (Value::of(*write), BlockChecksum(*write))));
        Seen::Replica { node, volume: VOLUME, in_sync, blocks: blocks.collect() }
    }

    #[test]
    fn a_replica_that_differs_or_stays_behind_is_caught() {
        let a = replica(A, true, &[(0, 1), (5, 2)]);
        for (b, fine) in [
            (replica(B, true, &[(0, 1), (5, 2)]), true),
            (replica(B, true, &[(0, 1), (5, 3)]), false),
            (replica(B, true, &[(0, 1)]), false),
            (replica(B, true, &[(0, 1), (5, 2), (6, 1)]), false),
            (replica(B, false, &[(0, 1), (5, 2)]), false),
        ] {
            assert_eq!(watch(ReplicasConverge::default(), &[a.clone(), b]).is_ok(), fine);
        }
    }
}
