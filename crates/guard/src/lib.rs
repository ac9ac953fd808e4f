//! CORE of `pollux-guard`: the node's lease, and the end of its guests when it runs out.
//!
//! The guard is the one process of a node that says "I am alive" to the peers. It is small, locked in memory and of
//! real-time priority, so that neither load nor a restart of `noded` looks like the death of the node. It sends signed
//! heartbeats on every network, tells `noded` who is heard, and holds the node's lease:
//!
//! * the lease is renewed when a peer's heartbeat shows that the peer heard *us* a moment ago (both directions work,
//!   verdict 8): the lease runs `GUARD_LEASE` from the sending of our heartbeat that was answered;
//! * `noded` may instead say that this node goes on alone under a grant; then no peer is needed;
//! * when the lease is over, every QEMU of this node is killed, and none may start until it is renewed.
//!
//! The deadline is kept in shared memory on tmpfs, so that a restarted guard goes on with it.

use pollux_base::guard::{GuardCommand, GuardView, Heartbeat, Network};
use pollux_base::{Epoch, Instant, NodeId};
use std::collections::BTreeMap;

/// What a guard is told at its start.
#[derive(Clone, Debug)]
pub struct Setup {
    pub node: NodeId,
    /// The other nodes as configured, and the networks on which each is reached: heartbeats flow before `noded` speaks.
    pub peers: BTreeMap<NodeId, Vec<Network>>,
    /// Random number of this run.
    pub boot: u64,
    /// What a guard of the same boot of the node left on tmpfs.
    pub left: Option<Left>,
}

/// What a restarted guard must know of the one before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    pub until: Option<Instant>,
    pub command: Option<GuardCommand>,
}

#[derive(Clone, Debug)]
pub enum Input {
    Heartbeat {
        network: Network,
        heartbeat: Heartbeat,
    },
    /// From `noded`; kept over its restart.
    Command(GuardCommand),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    Send {
        to: NodeId,
        network: Network,
        heartbeat: Heartbeat,
    },
    /// SIGKILL every QEMU of this node, now, and let none start.
    KillGuests,
    /// The lease is held (again): guests may run until then. The shell stores it on tmpfs, with the command in effect, and
    /// feeds the watchdog.
    Lease {
        until: Instant,
        command: Option<GuardCommand>,
    },
    /// Tell `noded`.
    View(GuardView),
}

/// The lease of one node.
pub struct Guard {
    setup: Setup,
}

impl Guard {
    pub fn new(setup: Setup, now: Instant) -> Guard {
        let _ = now;
        Guard { setup }
    }

    /// Takes one input; then `poll` until it gives `None`. A lease that has run out by `now` is over before the input is
    /// looked at.
    pub fn handle(&mut self, now: Instant, input: Input) {
        let _ = (now, input);
    }

    /// Time passed: the same without an input.
    pub fn tick(&mut self, now: Instant) {
        let _ = now;
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<Output> {
        None
    }

    /// When `tick` is to be called at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        None
    }

    /// The epoch named in heartbeats.
    pub fn epoch(&self) -> Epoch {
        let _ = &self.setup;
        Epoch(0)
    }

    /// Asserts what must always be so.
    pub fn check(&self) {}
}
