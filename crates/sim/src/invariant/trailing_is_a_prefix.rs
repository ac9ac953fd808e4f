//! What a trailing replica holds is a state that the group had: what was acknowledged, in that order, up to some moment, over all
//! its volumes. Whatever was never acknowledged may be there or not.

use super::Invariant;
use crate::history::{Seen, Value};
use crate::time::Time;
use pollux_base::unit::BlockRange;
use pollux_base::{GroupId, VolumeId};
use std::collections::BTreeMap;
use std::ops::Range;

struct Write {
    volume: VolumeId,
    range: BlockRange,
    sectors: Range<usize>,
    zero: bool,
}

type Sector = (VolumeId, u64, usize);

#[derive(Default)]
pub struct TrailingIsAPrefix {
    asked: BTreeMap<u64, Write>,
    /// What each sector held from which place in the order of acknowledgement on.
    held: BTreeMap<GroupId, BTreeMap<Sector, Vec<(usize, u64)>>>,
    acked: BTreeMap<GroupId, usize>,
}

impl Invariant for TrailingIsAPrefix {
    fn name(&self) -> &'static str {
        "trailing_is_a_prefix"
    }
    fn see(&mut self, _now: Time, seen: &Seen) -> Result<(), String> {
        match seen {
            Seen::Write { write, volume, range, sectors, zero } => {
                let (volume, range, sectors, zero) = (*volume, *range, sectors.clone(), *zero);
                self.asked.insert(*write, Write { volume, range, sectors, zero });
            }
            Seen::WriteAcked { write, group, .. } => {
                let Some(done) = self.asked.remove(write) else { return Ok(()) };
                let place = self.acked.entry(*group).or_default();
                *place += 1;
                let held = self.held.entry(*group).or_default();
                for block in done.range.start.0..done.range.end().0 {
                    for sector in done.sectors.clone() {
                        let value = if done.zero { 0 } else { *write };
                        held.entry((done.volume, block, sector)).or_insert(vec![(0, 0)]).push((*place, value));
                    }
                }
            }
            Seen::Cut { node, group, values } => {
                let count = self.acked.get(group).copied().unwrap_or(0);
                // How many sectors each prefix agrees with, as steps up and down.
                let mut steps = vec![0i64; count + 2];
                let mut constrained = 0;
                for ((volume, block, sector), held) in self.held.get(group).into_iter().flatten() {
                    let value = values.get(&(*volume, *block)).map_or(0, |value| value.0[*sector]);
                    if held.iter().all(|(_, known)| *known != value) {
                        if value == 0 || value == Value::GARBAGE {
                            return Err(format!("{node}: {volume} block {block} holds {value}, which it never did"));
                        }
                        continue; // never acknowledged
                    }
                    constrained += 1;
                    for (index, (from, _)) in held.iter().enumerate().filter(|(_, (_, known))| *known == value) {
                        steps[*from] += 1;
                        steps[held.get(index + 1).map_or(count + 1, |(next, _)| *next)] -= 1;
                    }
                }
                let mut agree = 0;
                let fits = steps[..=count].iter().any(|step| {
                    agree += step;
                    agree == constrained
                });
                if !fits {
                    return Err(format!("{node}: what its replica of {group} holds is no prefix of {count} writes"));
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

    fn cut(values: &[(u64, u64)]) -> Seen {
        let values = values.iter().map(|(block, write)| ((VOLUME, *block), Value::of(*write))).collect();
        Seen::Cut { node: B, group: GROUP, values }
    }

    #[test]
    fn a_later_write_without_an_earlier_one_is_caught() {
        let history =
            [write(1, 0), acked(1, A, 1), write(2, 1), acked(2, A, 1), write(3, 0), acked(3, A, 1), write(4, 2)];
        let fits = |values: &[(u64, u64)]| {
            let mut history = history.to_vec();
            history.push(cut(values));
            watch(TrailingIsAPrefix::default(), &history).is_ok()
        };
        assert!(fits(&[]) && fits(&[(0, 1)]) && fits(&[(0, 1), (1, 2)]) && fits(&[(0, 3), (1, 2)]));
        assert!(fits(&[(0, 1), (2, 4)]), "what was never acknowledged may be there");
        assert!(!fits(&[(1, 2)]), "the second without the first");
        assert!(!fits(&[(0, 3)]), "the third without the second");
        assert!(!fits(&[(0, Value::GARBAGE)]), "what nobody wrote");
    }
}
