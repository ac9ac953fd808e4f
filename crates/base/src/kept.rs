//! What a node keeps of a replica before it is overwritten, for itself alone: how the volumes that hold it are numbered, and how
//! people name them. No log mints such numbers.

use crate::id::VolumeId;
use std::fmt;
use std::str::FromStr;

/// Set in the numbers of volumes that hold the last state before a resync.
const BEFORE_RESYNC: u64 = 1 << 62;
/// Set in those of evidence; which of them it is lies in the bits from `EVIDENCE_SHIFT` on.
const EVIDENCE: u64 = 1 << 61;
const EVIDENCE_SHIFT: u32 = 48;
/// Evidence of one volume: a human's decisions, each about a split that lost writes.
pub const EVIDENCE_MAX: u64 = 1 << 12;

/// A state of a volume's replica that is kept. As text `v7-before-resync` or `v7-evidence-1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kept {
    /// W9: the last state that it held before it fell out, while it is brought up to date.
    BeforeResync { of: VolumeId },
    /// W10: what a diverged replica held when a human gave it up; the first one has the number 0.
    Evidence { of: VolumeId, number: u64 },
}

impl Kept {
    pub fn of(self) -> VolumeId {
        match self {
            Kept::BeforeResync { of } | Kept::Evidence { of, .. } => of,
        }
    }

    /// The volume that holds it.
    pub fn volume(self) -> VolumeId {
        match self {
            Kept::BeforeResync { of } => VolumeId(BEFORE_RESYNC | of.0),
            Kept::Evidence { of, number } => VolumeId(EVIDENCE | number << EVIDENCE_SHIFT | of.0),
        }
    }

    /// What the volume of this number holds, if it is such a volume.
    pub fn in_volume(volume: VolumeId) -> Option<Kept> {
        let of = VolumeId(volume.0 & ((1 << EVIDENCE_SHIFT) - 1));
        match volume.0 >> 61 {
            0b010 | 0b011 => Some(Kept::BeforeResync { of }),
            0b001 => Some(Kept::Evidence { of, number: volume.0 >> EVIDENCE_SHIFT & (EVIDENCE_MAX - 1) }),
            _ => None,
        }
    }
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kept::BeforeResync { of } => write!(f, "{of}-before-resync"),
            Kept::Evidence { of, number } => write!(f, "{of}-evidence-{}", number + 1),
        }
    }
}

/// What is no name of anything kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is not of the form `v7-before-resync` or `v7-evidence-1`")]
pub struct NotKept;

impl FromStr for Kept {
    type Err = NotKept;

    fn from_str(text: &str) -> Result<Kept, NotKept> {
        let (volume, what) = text.split_once('-').ok_or(NotKept)?;
        let digits = volume.strip_prefix('v').ok_or(NotKept)?;
        let of = digits.parse().ok().filter(|of| of >> EVIDENCE_SHIFT == 0).map(VolumeId).ok_or(NotKept)?;
        match what.strip_prefix("evidence-").map(str::parse::<u64>) {
            None if what == "before-resync" => Ok(Kept::BeforeResync { of }),
            Some(Ok(number @ 1..=EVIDENCE_MAX)) => Ok(Kept::Evidence { of, number: number - 1 }),
            None | Some(_) => Err(NotKept),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_known_by_its_number_and_by_its_name() {
        let of = VolumeId(7);
        let last = Kept::Evidence { of, number: EVIDENCE_MAX - 1 };
        for (kept, text) in [
            (Kept::BeforeResync { of }, "v7-before-resync"),
            (Kept::Evidence { of, number: 0 }, "v7-evidence-1"),
            (last, "v7-evidence-4096"),
        ] {
            assert_eq!((kept.to_string().as_str(), text.parse()), (text, Ok(kept)));
            assert_eq!((Kept::in_volume(kept.volume()), kept.of()), (Some(kept), of));
        }
        for number in [7, 1 << 47, 1 << 63, 1 << 63 | 7, u64::MAX] {
            assert_eq!(Kept::in_volume(VolumeId(number)), None, "{number:x}");
        }
        for text in
            ["", "v7", "7-before-resync", "v7-evidence-0", "v7-evidence-4097", "v7-evidence-", "v-before-resync"]
        {
            assert_eq!(text.parse::<Kept>(), Err(NotKept), "{text}");
        }
    }
}
