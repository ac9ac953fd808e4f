//! W8: whatever differs between a replica that is in sync and one that was, a resync would find: differing extents are
//! always among the candidates. Too many candidates are allowed, too few are silent corruption.

use super::Invariant;
use crate::history::Seen;
use crate::time::Time;

pub struct CandidatesCoverDifferences;

impl Invariant for CandidatesCoverDifferences {
    fn name(&self) -> &'static str {
        "candidates_cover_differences"
    }
    fn see(&mut self, _now: Time, seen: &Seen) -> Result<(), String> {
        let Seen::Behind { volume, source, behind, differing, candidates } = seen else { return Ok(()) };
        let missed: Vec<_> = differing.difference(candidates).collect();
        if missed.is_empty() {
            return Ok(());
        }
        Err(format!("{volume}: {behind} differs from {source} in {missed:?}, which no resync would compare"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::broken::*;
    use super::*;
    use pollux_base::ExtentIndex;

    #[test]
    fn a_difference_that_is_no_candidate_is_caught() {
        let behind = |differing: &[u32], candidates: &[u32]| Seen::Behind {
            volume: VOLUME,
            source: A,
            behind: B,
            differing: differing.iter().copied().map(ExtentIndex).collect(),
            candidates: candidates.iter().copied().map(ExtentIndex).collect(),
        };
        assert!(watch(CandidatesCoverDifferences, &[behind(&[1], &[1, 2])]).is_ok());
        assert!(watch(CandidatesCoverDifferences, &[behind(&[1, 3], &[1, 2])]).is_err());
    }
}
