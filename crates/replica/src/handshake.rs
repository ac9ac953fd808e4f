//! What a primary and another replica do when they meet under one record: one pure function of what both durably say of
//! themselves. It takes the two sides in either order and gives the same, so that neither can derive another plan than the
//! other. Every outcome names the rule that chose it; `tests/handshake.txt` has them all.
//!
//! No outcome ever clears a candidate (W8): a plan says from which record on candidates are gathered, and which side's
//! blocks are right where they differ.

use crate::verdict::Verdict;
use crate::wire::{Standing, TrailRun};
use pollux_base::record::GroupSpec;
use pollux_base::{NodeId, Stamp};

/// One of the two.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Side<'a> {
    pub node: NodeId,
    pub standing: &'a Standing,
}

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plan {
    /// Both hold everything that was acknowledged but for what the last interruption left in doubt: that is compared before it
    /// is shown to anybody, and where blocks differ those of `source` are taken.
    Settle { source: NodeId, since: Option<Stamp> },
    /// The replica lacks what was written since; it is brought beside the clients' I/O.
    Copy { since: Option<Stamp> },
    /// The primary has no replica of its own to compare with: the other counts as it is (W6).
    Serve,
    /// This node's replica takes no part and is left as it is.
    Refuse { who: NodeId },
}

/// Why. Read downwards: the first that fits decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Rule {
    DiskFailed,
    NoReplica,
    OtherHistory,
    EmptyThoughNamed,
    DeniesTheRecord,
    NothingToCopyFrom,
    PrimaryWithoutReplica,
    ReplacedAfterBirth,
    PrimaryReplacedAfterBirth,
    Birth,
    LivedOn,
    InFlight,
    AllLostPower,
    Offered,
    Behind,
    Trails,
    NeverInSync,
}

impl Rule {
    /// For people, as what is said of whoever is refused or brought.
    pub(crate) fn text(self) -> &'static str {
        match self {
            Rule::DiskFailed => "its disk is out of use",
            Rule::NoReplica => "it carries no replica",
            Rule::OtherHistory => "it holds writes of another history (W10)",
            Rule::EmptyThoughNamed => "its disk is empty although the record names it in sync (W12)",
            Rule::DeniesTheRecord => "it says that it is stale although the record names it in sync",
            Rule::NothingToCopyFrom => "the primary has no replica to copy from (W6)",
            Rule::PrimaryWithoutReplica => "it has all that was acknowledged, the primary has no replica (W6)",
            Rule::ReplacedAfterBirth => "its disk was replaced after the group's birth (W12)",
            Rule::PrimaryReplacedAfterBirth => "the primary's disk was replaced after the group's birth (W12)",
            Rule::Birth => "nothing was ever written (W12)",
            Rule::LivedOn => "it has lived on while the primary lost power, so its blocks are right",
            Rule::InFlight => "it may lack what was in flight (W8)",
            Rule::AllLostPower => "both lost power; what was flushed is on both, and the primary's blocks are taken",
            Rule::Offered => "it was offered to be named, so nothing is acknowledged without it (W9)",
            Rule::Behind => "it lacks what was written since it was last in sync (W8)",
            Rule::Trails => "it trails, and lacks what was acknowledged in the generation by which it does or later",
            Rule::NeverInSync => "it was never in sync, so everything is compared (W8)",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub plan: Plan,
    pub rule: Rule,
}

/// How a replica with this verdict stands, as it says to its primary. `blank`: nothing is stored. `continuous`: its node
/// has not lost power since it was last told that it is current. `failed`: why its disk is out of use.
pub(crate) fn standing(verdict: Verdict, blank: bool, continuous: bool, failed: Option<&str>) -> Standing {
    if let Some(reason) = failed {
        return Standing::Failed { reason: reason.to_string() };
    }
    match verdict {
        Verdict::Member { at } => Standing::InSync { at, blank, continuous },
        Verdict::Born => Standing::Born,
        Verdict::Stale { since } => Standing::Stale { since },
        Verdict::Trailing { at } => Standing::Trailing { at, run: TrailRun::default(), position: 0 },
        Verdict::Empty => Standing::Empty,
        Verdict::Diverged { own } => Standing::Diverged { own },
        Verdict::Absent | Verdict::Outdated { .. } | Verdict::Discarded { .. } => Standing::Absent,
    }
}

/// Judges the meeting of the primary of `spec` and another replica, given in either order. `required`: nothing is
/// acknowledged without that other replica, because the record names it or the primary's note says that it was offered.
pub(crate) fn meet(spec: &GroupSpec, required: bool, one: Side<'_>, two: Side<'_>) -> Outcome {
    let (primary, other) = if one.node == spec.record.primary { (one, two) } else { (two, one) };
    let outcome = |plan, rule| Outcome { plan, rule };
    let refuse = |rule| outcome(Plan::Refuse { who: other.node }, rule);
    let is_foreign = |stamp: &Stamp| !spec.lineage.contains(*stamp);
    let is_named = spec.record.in_sync.contains(&other.node);
    match other.standing {
        Standing::Failed { .. } => return refuse(Rule::DiskFailed),
        Standing::Absent => return refuse(Rule::NoReplica),
        Standing::Diverged { .. } => return refuse(Rule::OtherHistory),
        Standing::InSync { at, .. } | Standing::Stale { since: Some(at) } | Standing::Trailing { at, .. }
            if is_foreign(at) =>
        {
            return refuse(Rule::OtherHistory);
        }
        Standing::Empty => return refuse(Rule::EmptyThoughNamed),
        Standing::Stale { .. } | Standing::Trailing { .. } if is_named => return refuse(Rule::DeniesTheRecord),
        Standing::InSync { .. } | Standing::Born | Standing::Stale { .. } | Standing::Trailing { .. } => {}
    }
    let primary_continuous = match primary.standing {
        Standing::InSync { continuous, .. } => *continuous,
        Standing::Born => match other.standing {
            // A birth that the other knows to be confirmed by everybody, with data: this side forgot it with its disk.
            Standing::InSync { blank: false, .. } => {
                return outcome(Plan::Refuse { who: primary.node }, Rule::PrimaryReplacedAfterBirth);
            }
            // Nothing was ever acknowledged, so nothing can have been lost.
            Standing::InSync { at, .. } => {
                return outcome(Plan::Settle { source: primary.node, since: Some(*at) }, Rule::Birth);
            }
            Standing::Born => return outcome(Plan::Settle { source: primary.node, since: None }, Rule::Birth),
            _ => true,
        },
        _ if required && !matches!(other.standing, Standing::Born) => {
            return outcome(Plan::Serve, Rule::PrimaryWithoutReplica);
        }
        _ => return refuse(Rule::NothingToCopyFrom),
    };
    match other.standing {
        Standing::InSync { at, continuous, .. } => {
            let since = Some(*at);
            match (primary_continuous, continuous) {
                (true, _) => outcome(Plan::Settle { source: primary.node, since }, Rule::InFlight),
                (false, true) => outcome(Plan::Settle { source: other.node, since }, Rule::LivedOn),
                (false, false) => outcome(Plan::Settle { source: primary.node, since }, Rule::AllLostPower),
            }
        }
        // Born, while here the birth is known to be confirmed by everybody.
        Standing::Born => refuse(Rule::ReplacedAfterBirth),
        Standing::Stale { since } if required => {
            outcome(Plan::Settle { source: primary.node, since: *since }, Rule::Offered)
        }
        Standing::Trailing { at, .. } => outcome(Plan::Copy { since: Some(*at) }, Rule::Trails),
        Standing::Stale { since: Some(since) } => outcome(Plan::Copy { since: Some(*since) }, Rule::Behind),
        Standing::Stale { since: None } => outcome(Plan::Copy { since: None }, Rule::NeverInSync),
        Standing::Failed { .. } | Standing::Absent | Standing::Diverged { .. } | Standing::Empty => {
            unreachable!("refused above")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::note::Note;
    use crate::verdict::verdict;
    use pollux_base::record::{GroupRecord, LagBound, Lineage};
    use pollux_base::{Epoch, Generation, GroupId};
    use std::collections::{BTreeMap, BTreeSet};
    use std::fmt::Write;

    const A: NodeId = NodeId(1);
    const B: NodeId = NodeId(2);
    const BOOT: u128 = 7;

    fn stamp(epoch: u64, generation: u64) -> Stamp {
        Stamp { epoch: Epoch(epoch), generation: Generation(generation) }
    }

    /// The history (1,1) (1,2) (3,3) as it was at `at`, with A as primary. (2,3) belongs to another.
    fn spec(at: Stamp, in_sync: &[NodeId]) -> GroupSpec {
        let mut lineage = Lineage::default();
        for known in [stamp(1, 1), stamp(1, 2), stamp(3, 3)].into_iter().filter(|known| *known <= at) {
            lineage.push(known);
        }
        GroupSpec {
            group: GroupId(1),
            replicas: BTreeSet::from([A, B]),
            modes: BTreeMap::new(),
            lag: LagBound::default(),
            snapshots: Default::default(),
            volumes: BTreeMap::new(),
            keys: BTreeMap::new(),
            record: GroupRecord { stamp: at, primary: A, in_sync: in_sync.iter().copied().collect() },
            lineage,
        }
    }

    /// Every note over these four stamps, and none.
    fn notes() -> Vec<Option<Note>> {
        let stamps = [stamp(1, 1), stamp(1, 2), stamp(2, 3), stamp(3, 3)];
        let maybe: Vec<Option<Stamp>> = [None].into_iter().chain(stamps.map(Some)).collect();
        let mut notes = vec![None];
        for newest in stamps {
            let earlier = || maybe.iter().copied().filter(move |at| at.is_none_or(|at| at <= newest));
            for (in_sync_at, joined_at) in earlier().flat_map(|at| earlier().map(move |joined| (at, joined))) {
                for (born, whole_in_boot) in
                    [false, true].into_iter().flat_map(|born| [None, Some(BOOT), Some(6)].map(move |boot| (born, boot)))
                {
                    let (primary, before, offered) = (A, None, BTreeSet::new());
                    notes.push(Some(Note {
                        newest,
                        primary,
                        before,
                        in_sync_at,
                        joined_at,
                        born,
                        offered,
                        whole_in_boot,
                        trails: None,
                    }));
                }
            }
        }
        notes
    }

    /// Every standing to which notes, blank or filled disks, and their failure can lead at this node under this record.
    fn standings(spec: &GroupSpec, node: NodeId) -> Vec<Standing> {
        let mut all = vec![standing(Verdict::Absent, true, false, Some("it failed"))];
        for note in notes() {
            for (discard, blank) in [None, Some(stamp(2, 3))].into_iter().flat_map(|d| [(d, true), (d, false)]) {
                let judged = match verdict(note.as_ref(), spec, node, discard) {
                    Verdict::Outdated { .. } => continue, // it acts under a newer record and says nothing under this one
                    // Given up by a human: judged anew without what was given up, as when a record is adopted.
                    Verdict::Discarded { .. } => {
                        let note =
                            note.clone().map(|note| Note { in_sync_at: None, joined_at: None, trails: None, ..note });
                        verdict(note.as_ref(), spec, node, None)
                    }
                    judged => judged,
                };
                let is_member = matches!(judged, Verdict::Member { .. });
                let whole = note.as_ref().is_some_and(|note| note.whole_in_boot == Some(BOOT));
                let standing = standing(judged, blank, whole && is_member, None);
                if !all.contains(&standing) {
                    all.push(standing);
                }
            }
        }
        all
    }

    /// It holds what was acknowledged. (What is stored at a stale replica is not the truth.)
    fn has_data(standing: &Standing) -> bool {
        matches!(standing, Standing::InSync { blank: false, .. } | Standing::Diverged { .. })
    }

    /// Calls `look` for every meeting of two replicas that notes and records over the four stamps can lead to.
    fn every_meeting(mut look: impl FnMut(&GroupSpec, bool, &Standing, &Standing, Outcome)) -> usize {
        let mut count = 0;
        for at in [stamp(1, 1), stamp(1, 2), stamp(3, 3)] {
            for in_sync in [&[A, B][..], &[A], &[B]] {
                let spec = spec(at, in_sync);
                for (ours, theirs) in
                    standings(&spec, A).iter().flat_map(|a| standings(&spec, B).into_iter().map(move |b| (a, b)))
                {
                    for offered in [false, true] {
                        let required = offered || in_sync.contains(&B);
                        let (one, two) = (Side { node: A, standing: ours }, Side { node: B, standing: &theirs });
                        let outcome = meet(&spec, required, one, two);
                        assert_eq!(outcome, meet(&spec, required, two, one), "both sides compute the same");
                        look(&spec, required, ours, &theirs, outcome);
                        count += 1;
                    }
                }
            }
        }
        count
    }

    #[test]
    fn both_sides_of_every_meeting_agree_and_no_emptiness_becomes_the_truth() {
        let mut rules = BTreeSet::new();
        let count = every_meeting(|spec, required, ours, theirs, outcome| {
            rules.insert(outcome.rule);
            let told = || format!("{:?}, required {required}: {ours:?} meets {theirs:?}: {outcome:?}", spec.record);
            let in_lineage = |since: Option<Stamp>| since.is_none_or(|since| spec.lineage.contains(since));
            match outcome.plan {
                Plan::Settle { source, since } => {
                    let (right, wrong) = if source == A { (ours, theirs) } else { (theirs, ours) };
                    assert!(matches!(right, Standing::InSync { .. } | Standing::Born), "{}", told());
                    assert!(!matches!(right, Standing::Born) || !has_data(wrong), "{}", told());
                    assert!(required && in_lineage(since), "{}", told());
                    // Whose power was never cut lacks nothing; it is not overwritten by one that may.
                    let whole = |side: &Standing| matches!(side, Standing::InSync { continuous: true, .. });
                    assert!(whole(right) || !whole(wrong) || matches!(ours, Standing::Born), "{}", told());
                }
                Plan::Copy { since } => {
                    assert!(matches!(ours, Standing::InSync { .. } | Standing::Born) && !required, "{}", told());
                    assert_eq!(*theirs, Standing::Stale { since }, "{}", told());
                    assert!(in_lineage(since), "{}", told());
                }
                Plan::Serve => {
                    assert!(
                        matches!(theirs, Standing::InSync { .. } | Standing::Stale { .. }) && required,
                        "{}",
                        told()
                    );
                    assert!(!matches!(ours, Standing::InSync { .. } | Standing::Born), "{}", told());
                }
                Plan::Refuse { .. } => {}
            }
            if matches!(theirs, Standing::Diverged { .. } | Standing::Empty | Standing::Failed { .. }) {
                assert_eq!(outcome.plan, Plan::Refuse { who: B }, "{}", told());
            }
        });
        assert!(count > 1_000, "the enumeration is not empty: {count}");
        assert!(rules.contains(&Rule::Birth) && rules.contains(&Rule::LivedOn) && rules.contains(&Rule::Behind));
    }

    /// A standing in words; which stamps it names does not matter to the outcome, only whether they are of this history.
    fn words(standing: &Standing) -> String {
        match standing {
            Standing::InSync { blank, continuous, .. } => {
                let power = if *continuous { "lived on" } else { "lost power" };
                format!("in sync, {power}{}", if *blank { ", blank" } else { "" })
            }
            Standing::Born => "born".into(),
            Standing::Stale { since: Some(_) } => "stale since a record".into(),
            Standing::Stale { since: None } => "stale, never in sync".into(),
            Standing::Empty => "empty".into(),
            Standing::Diverged { .. } => "diverged".into(),
            Standing::Failed { .. } => "failed".into(),
            Standing::Absent => "absent".into(),
            Standing::Trailing { .. } => "trailing".into(),
        }
    }

    fn plan_words(outcome: Outcome) -> String {
        let since = |since: Option<Stamp>| if since.is_some() { "what changed since" } else { "everything" };
        let what = match outcome.plan {
            Plan::Settle { source: A, since: at } => format!("settle {}, primary's blocks", since(at)),
            Plan::Settle { since: at, .. } => format!("settle {}, replica's blocks", since(at)),
            Plan::Copy { since: at } => format!("copy {}", since(at)),
            Plan::Serve => "serve through it".into(),
            Plan::Refuse { who: A } => "refuse the primary's".into(),
            Plan::Refuse { .. } => "refuse the replica's".into(),
        };
        format!("{what} ({:?})", outcome.rule)
    }

    /// `BLESS=1 cargo test -p pollux-replica handshake` writes the table anew; review it as text.
    #[test]
    #[allow(clippy::disallowed_methods)] // a test may read its environment and write its golden file
    fn the_table_of_all_outcomes_is_as_it_was_reviewed() {
        // By replica and whether it is required, then by outcome: the primaries with which it is so.
        let mut table: BTreeMap<(String, &str), BTreeMap<String, BTreeSet<String>>> = BTreeMap::new();
        every_meeting(|spec, required, ours, theirs, outcome| {
            let role = match (spec.record.in_sync.contains(&B), required) {
                (true, _) => "named",
                (false, true) => "offered",
                (false, false) => "not named",
            };
            let row = table.entry((words(theirs), role)).or_default();
            row.entry(plan_words(outcome)).or_default().insert(words(ours));
        });
        let mut text =
            String::from("What a replica's meeting with its primary leads to, by how each stands to the record.\n");
        for ((theirs, role), outcomes) in &table {
            let _ = write!(text, "\nreplica: {theirs}; {role}\n");
            for (plan, ours) in outcomes {
                let ours: Vec<&str> = ours.iter().map(String::as_str).collect();
                let whom = if outcomes.len() == 1 { "whatever the primary".into() } else { ours.join(" | ") };
                let _ = write!(text, "  {whom}\n    -> {plan}\n");
            }
        }
        if std::env::var_os("BLESS").is_some() {
            let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/handshake.txt");
            std::fs::write(path, &text).expect("the golden file can be written");
        }
        assert_eq!(text, include_str!("../tests/handshake.txt"), "review it: BLESS=1 writes it anew");
    }

    #[test]
    fn every_rule_says_itself_in_words() {
        let mut told = BTreeSet::new();
        every_meeting(|_, _, _, _, outcome| {
            told.insert(outcome.rule.text());
        });
        assert!(told.iter().all(|text| text.len() > 10));
    }
}
