//! What must be true whatever happens. One file each; each has a broken history that it must catch.

mod acked_writes_survive;
mod block_reads_linearizable;
mod candidates_cover_differences;
mod clones_hold_what_they_are_of;
mod encrypted_is_never_in_the_clear;
mod guest_never_runs_twice;
mod no_takeover_before_lease_end_or_proof;
mod one_writer_per_generation;
mod replicas_converge;
mod snapshots_are_one_point;
mod trailing_is_a_prefix;

use crate::history::Seen;
use crate::time::Time;

/// Watches a history for one kind of wrong.
pub trait Invariant {
    fn name(&self) -> &'static str;
    /// Takes the next event. The error says what is wrong, for people.
    fn see(&mut self, now: Time, seen: &Seen) -> Result<(), String>;
}

/// All of them, at the beginning of a history.
pub fn all() -> Vec<Box<dyn Invariant>> {
    vec![
        Box::new(acked_writes_survive::AckedWritesSurvive::default()),
        Box::new(block_reads_linearizable::BlockReadsLinearizable::default()),
        Box::new(candidates_cover_differences::CandidatesCoverDifferences),
        Box::new(clones_hold_what_they_are_of::ClonesHoldWhatTheyAreOf),
        Box::new(encrypted_is_never_in_the_clear::EncryptedIsNeverInTheClear),
        Box::new(guest_never_runs_twice::GuestNeverRunsTwice::default()),
        Box::new(no_takeover_before_lease_end_or_proof::NoTakeoverBeforeLeaseEndOrProof::default()),
        Box::new(one_writer_per_generation::OneWriterPerGeneration::default()),
        Box::new(replicas_converge::ReplicasConverge::default()),
        Box::new(snapshots_are_one_point::SnapshotsAreOnePoint::default()),
        Box::new(trailing_is_a_prefix::TrailingIsAPrefix::default()),
    ]
}

#[cfg(test)]
mod broken {
    //! Words for writing histories by hand: group 1 with volume 1, of nodes A and B.

    use super::Invariant;
    use crate::history::{ALL, Seen, Value};
    use crate::time::Time;
    use pollux_base::unit::BlockRange;
    use pollux_base::{
        BlockCount, BlockIndex, Epoch, Generation, GroupId, GroupRecord, Incarnation, NodeId, Stamp, VmId, VolumeId,
    };
    use std::collections::BTreeSet;

    pub const A: NodeId = NodeId(1);
    pub const B: NodeId = NodeId(2);
    pub const GROUP: GroupId = GroupId(1);
    pub const VOLUME: VolumeId = VolumeId(1);
    pub const VM: VmId = VmId(1);

    pub fn stamp(generation: u64) -> Stamp {
        Stamp { epoch: Epoch(1), generation: Generation(generation) }
    }
    pub fn block(index: u64) -> BlockRange {
        BlockRange::new(BlockIndex(index), BlockCount(1))
    }
    pub fn both() -> BTreeSet<NodeId> {
        [A, B].into()
    }
    pub fn write(write: u64, index: u64) -> Seen {
        Seen::Write { write, volume: VOLUME, range: block(index), sectors: ALL, zero: false }
    }
    /// Of one sector of the block.
    pub fn patch(write: u64, index: u64, sector: usize) -> Seen {
        Seen::Write { write, volume: VOLUME, range: block(index), sectors: sector..sector + 1, zero: false }
    }
    pub fn acked(write: u64, node: NodeId, generation: u64) -> Seen {
        Seen::WriteAcked { write, node, group: GROUP, stamp: stamp(generation), in_sync: both(), fua: false }
    }
    pub fn read(read: u64, index: u64) -> Seen {
        Seen::Read { read, volume: VOLUME, range: block(index) }
    }
    pub fn answered(read: u64, node: NodeId, write: u64) -> Seen {
        answered_with(read, node, Value::of(write))
    }
    pub fn answered_with(read: u64, node: NodeId, value: Value) -> Seen {
        let (stamp, in_sync) = (stamp(1), both());
        Seen::ReadAnswered { read, node, group: GROUP, stamp, in_sync, values: vec![value] }
    }
    pub fn serving(node: NodeId, generation: u64, serving: bool) -> Seen {
        Seen::Serving { node, group: GROUP, stamp: stamp(generation), serving }
    }
    pub fn record(generation: u64, primary: NodeId, in_sync: &[NodeId]) -> Seen {
        let in_sync = in_sync.iter().copied().collect();
        let record = GroupRecord { stamp: stamp(generation), primary, in_sync };
        Seen::Record { group: GROUP, volumes: vec![VOLUME], record }
    }
    pub fn run(incarnation: u64, node: NodeId) -> Seen {
        Seen::RunStarted { vm: VM, incarnation: Incarnation(incarnation), node }
    }
    pub fn ended(incarnation: u64, node: NodeId) -> Seen {
        Seen::RunEnded { vm: VM, incarnation: Incarnation(incarnation), node }
    }

    /// Shows the history, a millisecond apart; the first complaint, with the place of the event that caused it.
    pub fn watch(mut invariant: impl Invariant, history: &[Seen]) -> Result<(), (usize, String)> {
        for (place, seen) in history.iter().enumerate() {
            invariant.see(Time(place as u64 * 1_000_000), seen).map_err(|text| (place, text))?;
        }
        Ok(())
    }
}
