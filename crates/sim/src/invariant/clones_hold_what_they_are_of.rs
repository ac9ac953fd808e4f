//! A clone to which nobody wrote holds what the snapshot held of which it was made, at every replica.

use super::Invariant;
use crate::history::{Seen, Value};
use crate::time::Time;

pub struct ClonesHoldWhatTheyAreOf;

impl Invariant for ClonesHoldWhatTheyAreOf {
    fn name(&self) -> &'static str {
        "clones_hold_what_they_are_of"
    }
    fn see(&mut self, _now: Time, seen: &Seen) -> Result<(), String> {
        let Seen::Clone { node, volume, expected, found } = seen else { return Ok(()) };
        // What is not named reads as zeros.
        let of =
            |values: &std::collections::BTreeMap<u64, Value>, block| values.get(block).copied().unwrap_or(Value::ZERO);
        match expected.keys().chain(found.keys()).find(|block| of(expected, block) != of(found, block)) {
            None => Ok(()),
            Some(block) => Err(format!(
                "{volume} on {node} holds {:?} in block {block}, the snapshot held {:?}",
                of(found, block),
                of(expected, block)
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::broken::*;
    use super::*;

    #[test]
    fn a_clone_that_lacks_something_or_holds_something_else_is_caught() {
        let values = |all: &[(u64, u64)]| all.iter().map(|(block, write)| (*block, Value::of(*write))).collect();
        let clone = |found: &[(u64, u64)]| Seen::Clone {
            node: A,
            volume: VOLUME,
            expected: values(&[(0, 1), (5, 2)]),
            found: values(found),
        };
        let is_fine = |found: &[(u64, u64)]| watch(ClonesHoldWhatTheyAreOf, &[clone(found)]).is_ok();
        assert!(is_fine(&[(0, 1), (5, 2)]) && is_fine(&[(0, 1), (5, 2), (7, 0)]));
        assert!(!is_fine(&[(0, 1)]) && !is_fine(&[(0, 1), (5, 3)]) && !is_fine(&[(0, 1), (5, 2), (6, 1)]));
    }
}
