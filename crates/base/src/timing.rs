//! The times on which safety and speed of a takeover depend, together, so that they are set against each other once.
//!
//! The chain for a node that dies (all on the survivor's clock, from the last heartbeat):
//! `PEER_DOWN` (detected) -> grant from the witness -> records -> fence proof, or `GUARD_BOUND` where there is no fence
//! device -> start of the VM. Promised: detected within 1 s, survivor's I/O frozen at most 2 s, VM started within 5 s
//! with a fence device and within 15 s without.
//!
//! The chain that keeps an old run harmless: a primary's lease (`LEASE`) ends on its own clock before its giver's
//! promise (`promise()`) does; a node's guard lease (`GUARD_LEASE`) ends, and its QEMUs are dead, before the other
//! side's `GUARD_BOUND` has passed.

use std::time::Duration;

/// How often a guard sends a heartbeat on each network. Four may be lost before anything is suspected.
pub const HEARTBEAT: Duration = Duration::from_millis(150);
/// A peer that was not heard for this long, on any network, is down.
pub const PEER_DOWN: Duration = Duration::from_millis(800);
/// A node that heard its peer within this time may ask to go on without it and fence it. A freshly booted node has
/// not, so it has no fencing right (section 3 of the design: rights are volatile and bounded).
pub const FENCING_RIGHT: Duration = Duration::from_secs(15);
/// How long a freshly booted node whose last record says `both` waits for its peer before it asks the witness.
pub const BOOT_WAIT: Duration = Duration::from_secs(10);
/// A side on which no guest runs waits this much longer before it asks for the grant, so that after a cut the side
/// with the guests usually wins and no guest has to move.
pub const GRANT_HANDICAP: Duration = Duration::from_millis(250);

/// A replication lease: a primary may serve this long after it *sent* the question that was granted (W5).
pub const LEASE: Duration = Duration::from_millis(1500);
/// How often a primary renews its leases.
pub const LEASE_RENEW: Duration = Duration::from_millis(400);
/// How long the connection to a peer of the in-sync set may be silent or gone before the primary asks for a record
/// without it (W3). Shorter than PEER_DOWN would drop replicas that merely restart.
pub const REPLICA_LOST: Duration = Duration::from_millis(900);

/// A guard kills its node's QEMUs this long after the last heartbeat that proved that the peer hears us.
pub const GUARD_LEASE: Duration = Duration::from_millis(4000);
/// Time within which a guard whose lease has ended has killed its QEMUs and the kernel has reaped them.
pub const GUARD_KILL: Duration = Duration::from_millis(2000);

/// Clocks of two nodes may drift apart by this share; every promise given is longer by it than the lease taken.
pub const DRIFT_PERCENT: u32 = 2;

/// `lease` as its giver must count it: longer by the allowed drift.
pub fn promise(lease: Duration) -> Duration {
    lease + lease * DRIFT_PERCENT / 100
}

/// Without fence proof, a VM of a lost node starts this long after the node was last heard: by then its guard's lease
/// has ended on its own clock and its QEMUs are dead.
pub fn guard_bound() -> Duration {
    promise(GUARD_LEASE + GUARD_KILL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_promised_times_add_up() {
        assert!(PEER_DOWN >= HEARTBEAT * 5, "four heartbeats may be lost");
        assert!(PEER_DOWN + GRANT_HANDICAP < Duration::from_millis(1200));
        assert!(LEASE_RENEW * 3 < LEASE, "two renewals may be lost");
        assert!(PEER_DOWN < GUARD_LEASE, "the grant is decided before any guest is killed");
        assert!(guard_bound() < Duration::from_secs(10), "leaves 5 s of the promised 15 for the start");
    }
}
