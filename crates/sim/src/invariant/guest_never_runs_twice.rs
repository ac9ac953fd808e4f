//! Two runs of one VM never run at the same time, and an incarnation runs once.
//!
//! A run whose node stood still (its processes stopped) may run for an instant when it wakes, until the guard, which
//! wakes with it, has killed it: its disks are frozen by then, so nothing comes of it. That instant is allowed here.

use super::Invariant;
use crate::history::Seen;
use crate::time::Time;
use pollux_base::{Incarnation, NodeId, VmId};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How long a guard may take, after it was stopped together with its guests, to notice and to kill.
const WAKING: Duration = Duration::from_millis(100);

#[derive(Clone, Copy)]
struct Run {
    stopped: bool,
    /// When it went on after it had been stopped while another ran.
    woke: Option<Time>,
}

#[derive(Default)]
pub struct GuestNeverRunsTwice {
    runs: BTreeMap<VmId, BTreeMap<(Incarnation, NodeId), Run>>,
    started: BTreeSet<(VmId, Incarnation)>,
}

impl Invariant for GuestNeverRunsTwice {
    fn name(&self) -> &'static str {
        "guest_never_runs_twice"
    }
    fn see(&mut self, now: Time, seen: &Seen) -> Result<(), String> {
        match seen {
            Seen::RunStarted { vm, incarnation, node } => {
                if !self.started.insert((*vm, *incarnation)) {
                    return Err(format!("{vm} is started on {node} under {incarnation:?} a second time"));
                }
                let run = Run { stopped: false, woke: None };
                self.runs.entry(*vm).or_default().insert((*incarnation, *node), run);
            }
            Seen::RunStopped { vm, incarnation, node, stopped } => {
                let runs = self.runs.entry(*vm).or_default();
                let others = runs.len() > 1;
                if let Some(run) = runs.get_mut(&(*incarnation, *node)) {
                    run.stopped = *stopped;
                    run.woke = (!stopped && others).then_some(now);
                }
            }
            Seen::RunEnded { vm, incarnation, node } => {
                self.runs.entry(*vm).or_default().remove(&(*incarnation, *node));
            }
            _ => {}
        }
        for (vm, runs) in &self.runs {
            let awake = |run: &Run| !run.stopped && run.woke.is_none_or(|woke| now.since(woke) > WAKING);
            let running: Vec<_> = runs.iter().filter(|(_, run)| awake(run)).map(|(run, _)| *run).collect();
            if running.len() > 1 {
                return Err(format!("{vm} runs twice: {running:?}"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::broken::*;
    use super::*;

    #[test]
    fn a_second_run_before_the_end_of_the_first_is_caught() {
        let fine = [run(1, A), ended(1, A), run(2, B)];
        assert_eq!(watch(GuestNeverRunsTwice::default(), &fine), Ok(()));
        let twice = [run(1, A), run(2, B)];
        assert_eq!(watch(GuestNeverRunsTwice::default(), &twice).map_err(|(place, _)| place), Err(1));
        let again = [run(1, A), ended(1, A), run(1, A)];
        assert!(watch(GuestNeverRunsTwice::default(), &again).is_err());
    }

    #[test]
    fn a_run_that_wakes_beside_another_must_be_killed_at_once() {
        let stopped = |stopped| Seen::RunStopped { vm: VM, incarnation: Incarnation(1), node: A, stopped };
        let mut history = vec![run(1, A), stopped(true), run(2, B), stopped(false)];
        assert_eq!(watch(GuestNeverRunsTwice::default(), &history), Ok(()));
        history.extend(std::iter::repeat_n(Seen::PowerCut { node: NodeId(9) }, 200));
        assert!(watch(GuestNeverRunsTwice::default(), &history).is_err());
    }
}
