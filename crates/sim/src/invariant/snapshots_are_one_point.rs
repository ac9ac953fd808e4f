//! A snapshot is one point of the stream of writes, over all volumes of its group, and the same on every replica in sync:
//! everything acknowledged before it was asked for, nothing asked for after it was known to be taken, and of what lies
//! between what was acknowledged up to some moment. Whatever was under way then may be in it or not.
//!
//! What every holder lost with its power may be lacking. That is told from the holders alone, so it may be forgiven for
//! what was flushed, too.

use super::Invariant;
use crate::history::{SECTORS, Seen, Value};
use crate::time::Time;
use pollux_base::unit::BlockRange;
use pollux_base::{BlockCount, BlockIndex, GroupId, NodeId, VolumeId};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

struct Write {
    volume: VolumeId,
    range: BlockRange,
    sectors: Range<usize>,
    what: What,
    /// Acknowledgements of its group when it was asked for, and its own place in their order.
    asked: usize,
    acked: Option<usize>,
    /// Who lost power while it was under way: they may have answered before.
    cut: BTreeSet<NodeId>,
}

/// What a write leaves in its sectors.
enum What {
    Number,
    Zeros,
    /// Not a write: all volumes of the group went back. What is not named holds zeros.
    Rollback(BTreeMap<(VolumeId, u64), Value>),
}

impl Write {
    fn value(&self, number: u64, (volume, block, sector): Place) -> u64 {
        match &self.what {
            What::Number => number,
            What::Zeros => 0,
            What::Rollback(values) => values.get(&(volume, block)).map_or(0, |value| value.0[sector]),
        }
    }
}

/// A sector.
type Place = (VolumeId, u64, usize);

/// Who holds the last write of a sector, and who of them lost power since.
struct Last {
    holders: BTreeSet<NodeId>,
    cut: BTreeSet<NodeId>,
}

/// Everything that was ever written to a sector.
#[derive(Default)]
struct Sector {
    /// By number: those of one sector are never under way together.
    writes: Vec<u64>,
    last: Option<Last>,
    /// Places from which on an older value may be back, until the next acknowledged write.
    lost: Vec<usize>,
}

struct Snapshot {
    asked: usize,
    /// Acknowledgements, and the newest write asked for, when it was known to be taken.
    taken: Option<(usize, u64)>,
}

#[derive(Default)]
pub struct SnapshotsAreOnePoint {
    writes: BTreeMap<u64, Write>,
    sectors: BTreeMap<Place, Sector>,
    groups: BTreeMap<VolumeId, GroupId>,
    acked: BTreeMap<GroupId, usize>,
    snapshots: BTreeMap<(GroupId, String), Snapshot>,
}

impl SnapshotsAreOnePoint {
    fn ack(&mut self, number: u64, group: GroupId, holders: &BTreeSet<NodeId>) {
        let Some(write) = self.writes.get_mut(&number).filter(|write| write.acked.is_none()) else { return };
        let place = self.acked.entry(group).or_default();
        *place += 1;
        let place = *place;
        write.acked = Some(place);
        self.groups.insert(write.volume, group);
        let (volume, blocks, sectors) = (write.volume, write.range.start.0..write.range.end().0, write.sectors.clone());
        let cut = std::mem::take(&mut write.cut);
        for (block, sector) in blocks.flat_map(|block| sectors.clone().map(move |sector| (block, sector))) {
            let found = self.sectors.get_mut(&(volume, block, sector)).expect("it was asked for");
            // All who held it may have lost it before the client heard that it is done.
            let is_lost = holders.is_subset(&cut);
            found.lost.extend(is_lost.then_some(place));
            found.last = (!is_lost).then(|| Last { holders: holders.clone(), cut: cut.clone() });
        }
    }

    /// In the order of acknowledgements a rollback is one of all sectors, of the group's volumes, and nothing takes it back.
    fn go_back(
        &mut self,
        number: u64,
        group: GroupId,
        volumes: &[VolumeId],
        values: &BTreeMap<(VolumeId, u64), Value>,
    ) {
        let place = self.acked.entry(group).or_default();
        *place += 1;
        let (asked, acked) = (*place, Some(*place));
        let Some(volume) = volumes.first().copied() else { return };
        let (range, what) = (BlockRange::new(BlockIndex(0), BlockCount(0)), What::Rollback(values.clone()));
        self.writes.insert(number, Write { volume, range, sectors: 0..0, what, asked, acked, cut: BTreeSet::new() });
        for (_, sector) in self.sectors.iter_mut().filter(|((volume, ..), _)| volumes.contains(volume)) {
            sector.writes.push(number);
            sector.last = None;
        }
    }

    /// What only those held that are gone may be gone.
    fn lose(&mut self, is_of: impl Fn(VolumeId) -> bool, change: impl Fn(&mut Last)) {
        for ((volume, ..), sector) in self.sectors.iter_mut().filter(|((volume, ..), _)| is_of(*volume)) {
            let Some(last) = &mut sector.last else { continue };
            change(last);
            if last.holders.is_subset(&last.cut) {
                sector.last = None;
                let acked = self.groups.get(volume).and_then(|group| self.acked.get(group)).copied().unwrap_or(0);
                sector.lost.push(acked);
            }
        }
    }

    /// After which counts of acknowledgements, among these, the sector may have held the value.
    fn fitting(
        &self,
        at: Place,
        sector: &Sector,
        value: u64,
        (asked, taken): (usize, usize),
        newest: u64,
    ) -> Vec<Range<usize>> {
        let is_value = |number: &u64| self.writes[number].value(*number, at) == value;
        let place = |number: &u64| self.writes[number].acked;
        let acked: Vec<(usize, u64)> = sector.writes.iter().filter_map(|n| Some((place(n)?, *n))).collect();
        let mut fitting = Vec::new();
        for from in 0..=acked.len() {
            let (since, last) = from.checked_sub(1).map_or((0, 0), |index| acked[index]);
            let until = acked.get(from).map_or(taken + 1, |(place, _)| *place);
            let (begin, end) = (since.max(asked), until.min(taken + 1));
            if begin >= end {
                continue;
            }
            let held = if last == 0 { value == 0 } else { is_value(&last) };
            let open = |n: &u64| *n > last && *n <= newest && place(n).is_none_or(|place| place >= end) && is_value(n);
            let old = |n: &u64| *n <= last && is_value(n);
            let lost = sector.lost.iter().find(|lost| (since..end).contains(lost));
            // The first moment at which a write was under way that may be seen.
            let open = sector.writes.iter().filter(|n| open(n)).map(|number| self.writes[number].asked).min();
            let lost = lost.copied().filter(|_| value == 0 || sector.writes.iter().any(old));
            let first = if held { Some(begin) } else { open.into_iter().chain(lost).min() };
            fitting.extend(first.map(|first| begin.max(first)..end).filter(|range| !range.is_empty()));
        }
        fitting
    }

    fn judge(
        &self,
        group: GroupId,
        snapshot: &Snapshot,
        values: &BTreeMap<(VolumeId, u64), Value>,
    ) -> Result<(), String> {
        let Some((taken, newest)) = snapshot.taken else { return Ok(()) };
        // How many sectors fit each count, as steps up and down.
        let mut steps = vec![0i64; taken - snapshot.asked + 2];
        let mut count = 0;
        for ((volume, block), value) in values {
            for sector in (0..SECTORS).filter(|sector| value.0[*sector] != 0) {
                if !self.sectors.contains_key(&(*volume, *block, sector)) {
                    return Err(format!("{volume} block {block} holds {value:?}, and nobody wrote there"));
                }
            }
        }
        for ((volume, block, index), sector) in &self.sectors {
            if self.groups.get(volume) != Some(&group) {
                continue;
            }
            count += 1;
            let value = values.get(&(*volume, *block)).map_or(0, |value| value.0[*index]);
            let fitting = self.fitting((*volume, *block, *index), sector, value, (snapshot.asked, taken), newest);
            if fitting.is_empty() {
                return Err(format!("{volume} block {block} holds {value}, at no moment between asked and taken"));
            }
            for range in fitting {
                steps[range.start - snapshot.asked] += 1;
                steps[range.end - snapshot.asked] -= 1;
            }
        }
        let mut agreeing = 0;
        let fits = steps[..steps.len() - 1].iter().any(|step| {
            agreeing += step;
            agreeing == count
        });
        if fits {
            Ok(())
        } else {
            Err(format!("no moment between {} and {taken} writes fits all of it", snapshot.asked))
        }
    }
}

impl Invariant for SnapshotsAreOnePoint {
    fn name(&self) -> &'static str {
        "snapshots_are_one_point"
    }
    fn see(&mut self, _now: Time, seen: &Seen) -> Result<(), String> {
        match seen {
            Seen::Write { write, volume, range, sectors, zero } => {
                let (volume, range, sectors, zero) = (*volume, *range, sectors.clone(), *zero);
                for block in range.start.0..range.end().0 {
                    for sector in sectors.clone() {
                        self.sectors.entry((volume, block, sector)).or_default().writes.push(*write);
                    }
                }
                let group = self.groups.get(&volume);
                let asked = group.and_then(|group| self.acked.get(group)).copied().unwrap_or(0);
                let what = if zero { What::Zeros } else { What::Number };
                self.writes
                    .insert(*write, Write { volume, range, sectors, what, asked, acked: None, cut: BTreeSet::new() });
            }
            Seen::RolledBack { rollback, group, volumes, values } => self.go_back(*rollback, *group, volumes, values),
            Seen::WriteAcked { write, group, in_sync, .. } => self.ack(*write, *group, in_sync),
            Seen::PowerCut { node } => {
                for write in self.writes.values_mut().filter(|write| write.acked.is_none()) {
                    write.cut.insert(*node);
                }
                self.lose(|_| true, |last| last.cut.extend([*node]));
            }
            Seen::Record { volumes, record, .. } => self.lose(
                |volume| volumes.contains(&volume),
                |last| {
                    if !last.holders.is_disjoint(&record.in_sync) {
                        last.holders.retain(|node| record.in_sync.contains(node));
                    }
                },
            ),
            Seen::SnapshotAsked { group, name } => {
                let asked = self.acked.get(group).copied().unwrap_or(0);
                self.snapshots.insert((*group, name.clone()), Snapshot { asked, taken: None });
            }
            Seen::SnapshotTaken { group, name } => {
                let acked = self.acked.get(group).copied().unwrap_or(0);
                let newest = self.writes.last_key_value().map_or(0, |(number, _)| *number);
                if let Some(snapshot) = self.snapshots.get_mut(&(*group, name.clone())) {
                    snapshot.taken = Some((acked, newest));
                }
            }
            Seen::Snapshot { node, group, name, values } => {
                let Some(snapshot) = self.snapshots.get(&(*group, name.clone())) else { return Ok(()) };
                let Some(values) = values else {
                    return Err(format!("{node} is in sync and lacks snapshot {name} of {group}"));
                };
                let judged = self.judge(*group, snapshot, values);
                return judged.map_err(|text| format!("snapshot {name} of {group} on {node}: {text}"));
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

    const OTHER: VolumeId = VolumeId(2);

    fn name() -> String {
        "s".into()
    }
    fn other(write: u64, index: u64) -> Seen {
        Seen::Write { write, volume: OTHER, range: block(index), sectors: crate::history::ALL, zero: false }
    }
    fn snapshot(values: &[(VolumeId, u64, u64)]) -> Seen {
        let values = values.iter().map(|(volume, block, write)| ((*volume, *block), Value::of(*write))).collect();
        Seen::Snapshot { node: B, group: GROUP, name: name(), values: Some(values) }
    }

    /// Two writes before it is asked for, two between that and its being taken, one under way all the time, two after it.
    fn fits(values: &[(VolumeId, u64, u64)], also: &[Seen]) -> bool {
        let mut history = vec![write(1, 0), acked(1, A, 1), other(2, 0), acked(2, A, 1), write(3, 9)];
        history.extend_from_slice(also);
        history.push(Seen::SnapshotAsked { group: GROUP, name: name() });
        history.extend([write(4, 0), acked(4, A, 1), other(5, 0), acked(5, A, 1)]);
        history.push(Seen::SnapshotTaken { group: GROUP, name: name() });
        history.extend([write(6, 0), acked(6, A, 1), write(7, 5), snapshot(values)]);
        watch(SnapshotsAreOnePoint::default(), &history).is_ok()
    }

    #[test]
    fn a_point_of_the_stream_is_one_and_nothing_else_is() {
        assert!(fits(&[(VOLUME, 0, 1), (OTHER, 0, 2)], &[]));
        assert!(fits(&[(VOLUME, 0, 4), (OTHER, 0, 2)], &[]));
        assert!(fits(&[(VOLUME, 0, 4), (OTHER, 0, 5)], &[]));
        assert!(fits(&[(VOLUME, 0, 4), (OTHER, 0, 5), (VOLUME, 9, 3)], &[]), "it was under way");
        assert!(!fits(&[(VOLUME, 0, 1), (OTHER, 0, 5)], &[]), "the second volume is later than the first");
        assert!(!fits(&[(OTHER, 0, 2)], &[]), "what was acknowledged before is missing");
        assert!(!fits(&[(VOLUME, 0, 6), (OTHER, 0, 5)], &[]), "it was asked for afterwards");
        assert!(!fits(&[(VOLUME, 0, 4), (OTHER, 0, 5), (VOLUME, 5, 7)], &[]), "it was asked for afterwards");
        assert!(!fits(&[(VOLUME, 0, 4), (OTHER, 0, 5), (VOLUME, 6, 4)], &[]), "nobody wrote there");
    }

    #[test]
    fn only_a_power_cut_of_all_holders_excuses_what_is_missing() {
        let cuts = [Seen::PowerCut { node: A }, Seen::PowerCut { node: B }];
        assert!(!fits(&[(OTHER, 0, 2)], &cuts[..1]));
        assert!(fits(&[(OTHER, 0, 2)], &cuts));
    }

    #[test]
    fn who_lost_power_after_it_had_answered_and_before_the_client_knew_may_lack_it() {
        let after = |before: usize, cuts: &[Seen]| {
            let asked = Seen::SnapshotAsked { group: GROUP, name: name() };
            let taken = Seen::SnapshotTaken { group: GROUP, name: name() };
            let (before, since) = cuts.split_at(before);
            let first = [write(1, 0), acked(1, A, 1), write(2, 0)];
            let last = [asked, taken, snapshot(&[(VOLUME, 0, 1)])];
            let history = [&first, before, &[acked(2, A, 1)], since, &last].concat();
            watch(SnapshotsAreOnePoint::default(), &history).is_ok()
        };
        let both = [Seen::PowerCut { node: B }, Seen::PowerCut { node: A }];
        assert!(after(1, &both) && after(2, &both));
        assert!(!after(1, &[Seen::PowerCut { node: B }, Seen::PowerCut { node: B }]), "the other has it");
    }

    #[test]
    fn a_replica_in_sync_without_it_is_caught() {
        let lacks = Seen::Snapshot { node: B, group: GROUP, name: name(), values: None };
        let asked = Seen::SnapshotAsked { group: GROUP, name: name() };
        let taken = Seen::SnapshotTaken { group: GROUP, name: name() };
        assert!(watch(SnapshotsAreOnePoint::default(), &[asked, taken, lacks]).is_err());
    }
}
