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
use pollux_base::{Instant, NodeId};

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
    /// The lease is (again) held: guests may run until then. The shell stores it on tmpfs and feeds the watchdog.
    Lease {
        until: Instant,
    },
    /// Tell `noded`.
    View(GuardView),
}
