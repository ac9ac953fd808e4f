//! The legal steps in the life of a VM: one table.
//!
//! A run exists at most in the phases of `may_run`. Between two runs lies a phase in which none exists, or `Recovering`,
//! which is left for another node only when the old one is proven unable to act.

use crate::entry::VmPhase;

impl VmPhase {
    /// Whether a QEMU of the VM may exist in this phase (in `Recovering`: on a lost node).
    pub fn may_run(self) -> bool {
        match self {
            VmPhase::Starting | VmPhase::Running | VmPhase::Stopping => true,
            VmPhase::Stopped | VmPhase::Recovering | VmPhase::Failed => false,
        }
    }

    /// Whether this step is legal, and if so whether it begins a new run.
    pub fn step(self, to: VmPhase) -> Option<Step> {
        use VmPhase::*;
        match (self, to) {
            // A new run begins only where none can exist.
            (Stopped | Recovering | Failed, Starting) => Some(Step::NewRun),
            // A run goes on.
            (Starting, Running) => Some(Step::SameRun),
            (Starting | Running, Stopping) => Some(Step::SameRun),
            // A run ended: as wanted, unasked, or with its node.
            (Starting | Running | Stopping, Stopped | Recovering | Failed) => Some(Step::SameRun),
            // Nothing runs any more: not wanted, or given up.
            (Recovering, Stopped | Failed) => Some(Step::SameRun),
            (Failed, Stopped) => Some(Step::SameRun),
            _ => None,
        }
    }
}

/// What a legal step does to the incarnation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The incarnation after the present one.
    NewRun,
    /// The present incarnation.
    SameRun,
}
