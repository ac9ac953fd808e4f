//! The core itself: its inputs, its outputs, and the order in which its parts look at them.

use crate::headline::{Headline, Sight, headline};
use crate::seam::{EpochRecord, Input, Output, PeerHello, Setup};
use crate::state::State;
use pollux_base::{Epoch, Instant};
use std::collections::VecDeque;

/// One node's part in the cluster's decisions.
pub struct Cluster {
    setup: Setup,
    state: State,
    outputs: VecDeque<Output>,
}

impl Cluster {
    pub fn new(setup: Setup, now: Instant) -> Cluster {
        let _ = now;
        Cluster { setup, state: State::default(), outputs: VecDeque::new() }
    }

    /// Takes one input; then `poll` until it gives `None`.
    pub fn handle(&mut self, now: Instant, input: Input) {
        let _ = (now, input);
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When `handle` is to be called with `Input::Tick` at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        None
    }

    /// Everything the log says.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// How this node introduces itself to its peers now.
    pub fn hello(&self) -> PeerHello {
        PeerHello {
            node: self.setup.node,
            epoch: self.record().map_or(Epoch(0), |record| record.epoch),
            alone: false,
            since_unix_ms: 0,
            wants_to_join: false,
        }
    }

    /// This node's own durable word.
    pub fn record(&self) -> Option<&EpochRecord> {
        self.setup.record.as_ref()
    }

    /// What this node sees beside the log.
    pub fn sight(&self) -> Sight {
        Sight::default()
    }

    /// "If a node dies now, what happens?"
    pub fn headline(&self) -> Headline {
        headline(&self.state, &self.sight())
    }

    /// What is wrong at present, each with the command that mends it where there is one.
    pub fn alerts(&self) -> Vec<crate::Alert> {
        Vec::new()
    }

    /// The token a human must type to confirm that the node is down; it names what may be lost.
    pub fn confirm_token(&self, node: pollux_base::NodeId) -> Option<String> {
        let _ = node;
        None
    }

    /// Newest reports of the local data plane.
    pub fn group_reports(&self) -> impl Iterator<Item = &pollux_base::order::GroupReport> {
        std::iter::empty()
    }

    /// Why a VM that is wanted does not run, if something holds it back.
    pub fn vm_blocked(&self, vm: pollux_base::VmId) -> Option<String> {
        let _ = vm;
        None
    }

    /// Asserts what must always be so.
    pub fn check(&self) {
        self.state.check();
    }
}
