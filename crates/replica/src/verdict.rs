//! How this node's replica stands to a record: one pure function of durable facts, with every outcome named.
//!
//! No verdict ever clears a candidate (W8): it only says from which record on candidates are gathered.

use crate::note::Note;
use pollux_base::record::GroupSpec;
use pollux_base::{Generation, NodeId, Stamp};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The record is older than one adopted here: ignored (W2).
    Outdated { known: Stamp },
    /// Named in sync, and it may count. `at`: the last record by which it was; what changed since is compared once.
    Member { at: Stamp },
    /// Named in sync at birth, when no extent exists anywhere. Counts once the other replicas confirm it (W12).
    Born,
    /// Not in sync: lacks what was written since `since` (`None`: everything).
    Stale { since: Option<Stamp> },
    /// Not in sync, but a state that the group had, by the record `at`; what changed since that began is compared.
    Trailing { at: Stamp },
    /// Named in sync, but nothing durable here says that it ever was: the disk was replaced or wiped. It must not count,
    /// or its emptiness would become the truth (W12).
    Empty,
    /// It holds acknowledged writes of a history that is not the record's. Left untouched (W10).
    Diverged { own: Stamp },
    /// As before, and a human has chosen to give up exactly these writes: it becomes stale, with nothing in common (W10).
    Discarded { own: Stamp },
    /// This node carries no replica of the group.
    Absent,
}

/// Judges. `discard`: the stamp that a human gave up, if any.
pub(crate) fn verdict(note: Option<&Note>, spec: &GroupSpec, me: NodeId, discard: Option<Stamp>) -> Verdict {
    let record = &spec.record;
    if let Some(note) = note
        && record.stamp < note.newest
    {
        return Verdict::Outdated { known: note.newest };
    }
    if !spec.replicas.contains(&me) {
        return Verdict::Absent;
    }
    let held = note.into_iter().flat_map(|note| [note.in_sync_at, note.joined_at]).flatten();
    // The newest foreign stamp stands for all: a human is asked about it.
    if let Some(own) = held.filter(|stamp| !spec.lineage.contains(*stamp)).max() {
        return if discard == Some(own) { Verdict::Discarded { own } } else { Verdict::Diverged { own } };
    }
    let since = note.and_then(|note| note.in_sync_at);
    let trails = note.and_then(|note| note.trails);
    // Whoever trails and is not promoted may hold what a promotion of another gave up.
    if let Some(at) = trails
        && !record.in_sync.contains(&me)
    {
        return match spec.lineage.contains(at) {
            true => Verdict::Trailing { at },
            false if discard == Some(at) => Verdict::Discarded { own: at },
            false => Verdict::Diverged { own: at },
        };
    }
    if !record.in_sync.contains(&me) {
        // A replica that was born and never confirmed holds nothing.
        return Verdict::Stale { since: since.filter(|_| note.is_some_and(|note| !note.born)) };
    }
    match note {
        None if record.stamp.generation == Generation(1) => Verdict::Born,
        None => Verdict::Empty,
        // Alone, nobody can confirm that nothing existed; after the first generation something may have.
        Some(note) if note.born && record.stamp.generation > Generation(1) && record.in_sync.len() == 1 => {
            Verdict::Empty
        }
        Some(note) if note.born => Verdict::Born,
        // Named although it trails: promoted by a human.
        Some(note) => match note.in_sync_at.or(note.joined_at).or(trails) {
            Some(at) => Verdict::Member { at },
            None => Verdict::Empty,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pollux_base::record::{GroupRecord, LagBound, Lineage};
    use pollux_base::{Epoch, GroupId};
    use std::collections::{BTreeMap, BTreeSet};

    const ME: NodeId = NodeId(1);

    fn stamp(epoch: u64, generation: u64) -> Stamp {
        Stamp { epoch: Epoch(epoch), generation: Generation(generation) }
    }

    /// The history (1,1) (1,2) (1,3), (3,4) and then `at`.
    fn spec(at: Stamp, in_sync: &[u64]) -> GroupSpec {
        let mut lineage = Lineage::default();
        for known in [stamp(1, 3), stamp(3, 4), at].into_iter().filter(|known| *known <= at) {
            lineage.push(known);
        }
        let in_sync: BTreeSet<NodeId> = in_sync.iter().map(|node| NodeId(*node)).collect();
        let primary = *in_sync.first().expect("never empty");
        GroupSpec {
            group: GroupId(1),
            replicas: BTreeSet::from([NodeId(1), NodeId(2)]),
            modes: BTreeMap::new(),
            lag: LagBound::default(),
            snapshots: Default::default(),
            volumes: BTreeMap::new(),
            keys: BTreeMap::new(),
            record: GroupRecord { stamp: at, primary, in_sync },
            lineage,
        }
    }

    fn note(newest: Stamp, in_sync_at: Option<Stamp>, joined_at: Option<Stamp>) -> Note {
        let offered = BTreeSet::new();
        let primary = NodeId(2);
        Note {
            newest,
            primary,
            before: None,
            in_sync_at,
            joined_at,
            born: false,
            offered,
            whole_in_boot: None,
            trails: None,
        }
    }

    #[test]
    fn every_standing_of_a_replica_has_its_own_verdict() {
        let now = stamp(3, 5);
        let member = spec(now, &[1, 2]);
        let without = spec(now, &[2]);
        let birth = spec(stamp(1, 1), &[1, 2]);
        let born = |newest| Note { born: true, ..note(newest, None, None) };
        let judge = |note: Option<Note>, spec: &GroupSpec| verdict(note.as_ref(), spec, ME, None);

        assert_eq!(judge(None, &birth), Verdict::Born);
        assert_eq!(judge(Some(born(stamp(1, 1))), &birth), Verdict::Born, "born is durable until confirmed");
        assert_eq!(judge(None, &member), Verdict::Empty, "a replaced disk does not count");
        assert_eq!(judge(None, &without), Verdict::Stale { since: None });
        assert_eq!(judge(Some(note(stamp(3, 4), None, None)), &member), Verdict::Empty);
        assert_eq!(judge(Some(born(stamp(1, 1))), &spec(now, &[1])), Verdict::Empty, "nobody can confirm the birth");
        assert_eq!(judge(Some(born(stamp(1, 1))), &without), Verdict::Stale { since: None });
        let at = stamp(1, 2);
        assert_eq!(judge(Some(note(at, Some(at), None)), &member), Verdict::Member { at });
        assert_eq!(
            judge(Some(note(stamp(3, 4), None, Some(stamp(3, 4)))), &member),
            Verdict::Member { at: stamp(3, 4) }
        );
        assert_eq!(
            judge(Some(note(stamp(3, 4), Some(at), Some(stamp(3, 4)))), &member),
            Verdict::Member { at },
            "candidates begin at the record that named it, not at what a primary said"
        );
        assert_eq!(judge(Some(note(at, Some(at), None)), &without), Verdict::Stale { since: Some(at) });
        assert_eq!(judge(Some(note(stamp(3, 6), Some(at), None)), &member), Verdict::Outdated { known: stamp(3, 6) });
        assert_eq!(judge(Some(note(stamp(4, 2), Some(at), None)), &member), Verdict::Outdated { known: stamp(4, 2) });
        let mut elsewhere = member.clone();
        elsewhere.replicas = BTreeSet::from([NodeId(2)]);
        assert_eq!(judge(None, &elsewhere), Verdict::Absent);
    }

    #[test]
    fn writes_of_another_history_are_left_alone_until_exactly_they_are_given_up() {
        let own = stamp(2, 5);
        for in_sync in [&[1, 2][..], &[2][..]] {
            let spec = spec(stamp(3, 5), in_sync);
            for note in [note(own, Some(own), None), note(own, Some(stamp(1, 2)), Some(own))] {
                let judge = |discard| verdict(Some(&note), &spec, ME, discard);
                assert_eq!(judge(None), Verdict::Diverged { own });
                assert_eq!(judge(Some(stamp(2, 4))), Verdict::Diverged { own }, "another stamp was given up");
                assert_eq!(judge(Some(own)), Verdict::Discarded { own });
            }
        }
    }

    #[test]
    fn a_trailing_replica_is_never_a_member_unless_it_is_promoted() {
        let at = stamp(1, 3);
        let trailing = |at| Note { trails: Some(at), ..note(at, Some(stamp(1, 2)), None) };
        let judge = |at, spec: &GroupSpec| verdict(Some(&trailing(at)), spec, ME, None);
        assert_eq!(judge(at, &spec(stamp(3, 5), &[2])), Verdict::Trailing { at });
        assert_eq!(judge(stamp(2, 5), &spec(stamp(3, 5), &[2])), Verdict::Diverged { own: stamp(2, 5) });
        // Promoted: the history was cut back to before what it trails by.
        let mut promoted = spec(stamp(3, 5), &[1]);
        promoted.lineage.cut_back_to_before(at);
        promoted.lineage.push(stamp(3, 5));
        assert_eq!(judge(at, &promoted), Verdict::Member { at: stamp(1, 2) });
        promoted.record.in_sync = BTreeSet::from([NodeId(2)]);
        assert_eq!(judge(at, &promoted), Verdict::Diverged { own: at }, "of another's promotion");
    }

    #[test]
    fn giving_up_a_stamp_of_this_history_does_nothing() {
        let at = stamp(1, 2);
        let spec = spec(stamp(3, 5), &[1, 2]);
        assert_eq!(verdict(Some(&note(at, Some(at), None)), &spec, ME, Some(at)), Verdict::Member { at });
    }
}
