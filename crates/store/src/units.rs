//! Where the units of one extent lie.
//!
//! A volume that is filled lies as contiguously on the disk as in itself, so nearly every extent is one line with gaps:
//! 24 bytes. Only an extent whose units lie here and there has a map, of 4 bytes a unit.

use crate::layout::UNITS;

/// Stands for "no unit" on disk.
pub const NO_UNIT: u32 = u32::MAX;

/// One bit per unit of an extent.
pub type UnitBits = [u64; UNITS.div_ceil(64)];

fn has(bits: &UnitBits, index: usize) -> bool {
    bits[index / 64] & 1 << (index % 64) != 0
}

/// Units `first .. first + count` of an extent lie at `unit`, `unit + 1` and so on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UnitRun {
    pub first: u16,
    pub count: u16,
    pub unit: u32,
}

#[derive(Clone, Debug)]
pub enum Units {
    /// Those present lie at `base` plus their place in the extent (modulo 2^32: the line may begin before the disk does).
    Line {
        base: u32,
        present: UnitBits,
    },
    Map(Box<[u32; UNITS]>),
}

impl Default for Units {
    fn default() -> Units {
        Units::Line { base: 0, present: [0; UNITS.div_ceil(64)] }
    }
}

impl PartialEq for Units {
    fn eq(&self, other: &Units) -> bool {
        self.iter().eq(other.iter())
    }
}
impl Eq for Units {}

impl Units {
    pub fn get(&self, index: usize) -> Option<u32> {
        match self {
            Units::Line { base, present } => has(present, index).then(|| base.wrapping_add(index as u32)),
            Units::Map(map) => Some(map[index]).filter(|unit| *unit != NO_UNIT),
        }
    }

    pub fn set(&mut self, index: usize, unit: u32) {
        let would_be = unit.wrapping_sub(index as u32);
        if let Units::Line { base, present } = self {
            if present.iter().all(|word| *word == 0) {
                *base = would_be;
            }
            if *base == would_be {
                present[index / 64] |= 1 << (index % 64);
                return;
            }
            let mut map = Box::new([NO_UNIT; UNITS]);
            self.iter().for_each(|(index, unit)| map[index] = unit);
            *self = Units::Map(map);
        }
        if let Units::Map(map) = self {
            map[index] = unit;
        }
    }

    pub fn clear(&mut self, index: usize) {
        match self {
            Units::Line { present, .. } => present[index / 64] &= !(1 << (index % 64)),
            Units::Map(map) => map[index] = NO_UNIT,
        }
    }

    pub fn is_empty(&self) -> bool {
        match self {
            Units::Line { present, .. } => present.iter().all(|word| *word == 0),
            Units::Map(map) => map.iter().all(|unit| *unit == NO_UNIT),
        }
    }

    pub fn count(&self) -> usize {
        match self {
            Units::Line { present, .. } => present.iter().map(|word| word.count_ones() as usize).sum(),
            Units::Map(map) => map.iter().filter(|unit| **unit != NO_UNIT).count(),
        }
    }

    /// Those present, with their place in the extent.
    pub fn iter(&self) -> impl Iterator<Item = (usize, u32)> {
        (0..UNITS).filter_map(|index| Some((index, self.get(index)?)))
    }

    /// Those present, neighbours that lie side by side made one run.
    pub fn runs(&self) -> Vec<UnitRun> {
        let mut runs: Vec<UnitRun> = Vec::new();
        for (index, unit) in self.iter() {
            match runs.last_mut() {
                Some(run) if usize::from(run.first + run.count) == index && run.unit + u32::from(run.count) == unit => {
                    run.count += 1;
                }
                _ => runs.push(UnitRun { first: index as u16, count: 1, unit }),
            }
        }
        runs
    }

    pub fn set_run(&mut self, run: UnitRun) {
        for at in 0..run.count {
            match run.unit {
                NO_UNIT => self.clear(usize::from(run.first + at)),
                unit => self.set(usize::from(run.first + at), unit + u32::from(at)),
            }
        }
    }

    /// The present unit nearest to `index`.
    pub fn nearest(&self, index: usize) -> Option<(usize, u32)> {
        if let Units::Line { base, .. } = self {
            return (!self.is_empty()).then_some((0, *base));
        }
        (1..UNITS).find_map(|distance| {
            let before = index.checked_sub(distance);
            let after = Some(index + distance).filter(|at| *at < UNITS);
            [before, after].into_iter().flatten().find_map(|at| Some((at, self.get(at)?)))
        })
    }

    /// Takes the smallest form of the same.
    pub fn compact(&mut self) {
        let mut line = Units::default();
        for (index, unit) in self.iter() {
            line.set(index, unit);
            if matches!(line, Units::Map(_)) {
                return;
            }
        }
        *self = line;
    }
}

/// The units that hold blocks `first .. first + count` of an extent.
pub fn units_of(first: usize, count: usize) -> std::ops::Range<usize> {
    let per = crate::layout::UNIT_BLOCKS;
    first / per..(first + count).div_ceil(per)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_found_where_they_were_put_in_line_or_not() {
        let mut units = Units::default();
        units.set(5, 1005);
        units.set(7, 1007);
        assert!(matches!(units, Units::Line { .. }));
        assert_eq!((units.get(5), units.get(6), units.get(7)), (Some(1005), None, Some(1007)));
        units.set(6, 3);
        assert!(matches!(units, Units::Map(_)));
        assert_eq!(units.iter().collect::<Vec<_>>(), [(5, 1005), (6, 3), (7, 1007)]);
        assert_eq!(units.runs().len(), 3);
        assert_eq!(units.nearest(9), Some((7, 1007)));
        units.clear(6);
        assert_eq!(units.count(), 2);
        let mut compact = units.clone();
        compact.compact();
        assert!(matches!(compact, Units::Line { .. }));
        assert_eq!(compact, units);
    }

    #[test]
    fn a_line_may_begin_before_the_disk_does() {
        let mut units = Units::default();
        units.set(UNITS - 1, 2);
        assert_eq!((units.get(UNITS - 1), units.get(0)), (Some(2), None));
        let mut again = Units::default();
        units.runs().into_iter().for_each(|run| again.set_run(run));
        assert_eq!(again, units);
    }
}
