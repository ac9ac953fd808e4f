//! Moving a replica: a small machine whose whole memory is `{from, to}` in the log.
//!
//! ```text
//!  MoveReplica ──► `to` carries a replica ──► filled by the data plane ──► a record names it ──► FinishMove: `from` is out
//! ```
//! Each step follows from the state alone, whoever decides then and whatever crashed before. `from` goes only when `to` holds
//! everything (or trails, as `from` did), so there are never fewer good copies on the way than before.

use crate::core::Cluster;
use crate::entry::Change;
use crate::seam::Refusal;
use crate::state::{Group, Move};
use pollux_base::order::{GroupReport, ReplicaState};
use pollux_base::record::Mode;
use pollux_base::{GroupId, Instant};

impl Cluster {
    /// Whoever decides for the group ends its move when the new replica is as good as the old one.
    pub(crate) fn finish_moves(&mut self, now: Instant) {
        let mut finished = Vec::new();
        for (id, group) in &self.state.groups {
            let Some(moving) = group.moving else { continue };
            let decides = group.record.primary == self.me || self.acts_alone();
            if decides && is_ready(group, moving, self.groups.reports.get(id)) {
                finished.push((*id, group.record.stamp));
            }
        }
        for (group, expect) in finished {
            self.propose(now, ("move", group.0, expect.generation.0), Change::FinishMove { group, expect });
        }
    }

    /// A record that lets a replica go while the birth is not confirmed would take the proof that it lacks nothing (W12).
    pub(crate) fn refuse_unborn(&self, change: &Change) -> Result<(), Refusal> {
        let (Change::RemoveReplica { group, .. } | Change::SetMode { group, mode: Mode::Async, .. }) = change else {
            return Ok(());
        };
        match self.groups.reports.get(group) {
            Some(report)
                if report.is_unborn
                    && report.stamp.is_some()
                    && !matches!(report.state, ReplicaState::Trailing { .. }) =>
            {
                Err(Refusal::Conflict("the group was just born; try again in a moment".into()))
            }
            _ => Ok(()),
        }
    }

    /// What a human types to make the replica on this node the truth although it trails, or lost parts with a disk: names what is
    /// known to be lost, and changes with it. `None`: it is neither.
    pub fn promote_token(&self, group: GroupId) -> Option<String> {
        let found = self.state.groups.get(&group)?;
        let report = self.groups.reports.get(&group)?;
        let (name, node) = (self.state.group_name(found), self.name_of(self.me));
        let generation = found.record.stamp.generation.0;
        let loses = match report.state {
            ReplicaState::Trailing { .. } => {
                let lag = report.lag.get(&self.me).copied().unwrap_or_default();
                format!("{}-bytes-{}-s", lag.bytes, lag.ms.div_ceil(1000))
            }
            _ if report.is_incomplete && found.record.in_sync.contains(&self.me) => "what-its-disk-had".into(),
            _ => return None,
        };
        Some(format!("promote-{name}-on-{node}.generation-{generation}.loses-{loses}"))
    }

    /// Holds a promotion's token against what this node's replica says, and fills in the record by which it trails.
    pub(crate) fn prepare_promotion(&self, change: &mut Change) -> Result<(), Refusal> {
        let Change::PromoteReplica { group, node, at, token } = change else { return Ok(()) };
        if *node != self.me {
            let name = self.name_of(*node);
            return Err(Refusal::Conflict(format!("only `{name}` knows what its replica holds; ask it")));
        }
        let (Some(report), Some(expected)) = (self.groups.reports.get(group), self.promote_token(*group)) else {
            return Err(Refusal::Conflict(
                "the replica here is no state that the group had; it can not be promoted".into(),
            ));
        };
        if *token != expected {
            return Err(Refusal::Unsafe(format!(
                "writes that this replica lacks are lost for good; type what is known of them: --token {expected}"
            )));
        }
        if let ReplicaState::Trailing { at: known } = report.state {
            *at = known;
        }
        Ok(())
    }
}

fn is_ready(group: &Group, moving: Move, report: Option<&GroupReport>) -> bool {
    match group.mode(moving.to) {
        Mode::Sync | Mode::Memory => group.record.in_sync.contains(&moving.to),
        Mode::Async => report.is_some_and(|report| {
            report.stamp == Some(group.record.stamp)
                && report.connected.contains(&moving.to)
                && report.lag.contains_key(&moving.to)
                && !report.resync.contains_key(&moving.to)
        }),
    }
}
