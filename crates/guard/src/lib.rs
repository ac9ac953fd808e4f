//! CORE of `pollux-guard`: the node's lease, and the end of its guests when it runs out.
//!
//! The guard is the one process of a node that says "I am alive" to the peers. It is small, locked in memory and of
//! real-time priority, so that neither load nor a restart of `noded` looks like the death of the node. It sends signed
//! heartbeats on every network, tells `noded` who is heard, and holds the node's lease:
//!
//! * the lease is renewed when a peer's heartbeat shows that the peer heard *us* a moment ago (both directions work,
//!   verdict 8): the lease runs `GUARD_LEASE` from the sending of our heartbeat that was answered;
//! * a peer that names a newer epoch than ours renews nothing: it may already have gone on without us. Its owner counts on
//!   this: from the moment its own guard names the new epoch, our lease can only run out;
//! * `noded` may instead say that this node goes on alone under a grant; then no peer is needed;
//! * when the lease is over, every QEMU of this node is killed, and again twice a second until it is held anew, so that
//!   one started by mistake does not live;
//! * `handle` and `tick` look at the clock before they look at anything else: a guard that was stopped or whose machine
//!   was paused kills before it hears that all is well (verdict 12).
//!
//! The deadline is kept in shared memory on tmpfs, so that a restarted guard goes on with it.
//!
//! Invariant: guests may run only while `now < until`, and `until` is never later than `GUARD_LEASE` after the sending of
//! a heartbeat that enough members have answered, unless this node acts alone.

#[doc(hidden)]
pub mod fuzz;
mod peer;
pub mod wire;

use peer::Peer;
use pollux_base::guard::{GuardCommand, GuardView, Heartbeat, Network};
use pollux_base::timing::{GUARD_LEASE, HEARTBEAT};
use pollux_base::{Epoch, Instant, NodeId};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// While the lease is over, guests are killed again this often: one that was started by mistake lives no longer than
/// this, well within `GUARD_KILL`.
const KILL_AGAIN: Duration = Duration::from_millis(500);
/// A view is sent at least this often, so that `noded` can tell a quiet peer from a quiet guard.
const VIEW_EVERY: Duration = Duration::from_millis(400);

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
    /// A `noded` connected and wants to know.
    Connected,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    Send {
        to: NodeId,
        network: Network,
        heartbeat: Heartbeat,
    },
    /// SIGKILL every QEMU of this node, now, and let none start. The lease on tmpfs is void.
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
    node: NodeId,
    boot: u64,
    peers: BTreeMap<NodeId, Peer>,
    command: Option<GuardCommand>,
    /// The epoch under which this node last acted or was to act; named in heartbeats.
    epoch: Epoch,
    /// End of the lease; `None`: it is over.
    until: Option<Instant>,
    kills: u64,
    sequence: u64,
    heartbeat_due: Instant,
    kill_due: Instant,
    view_due: Instant,
    /// When the clock was last looked at: silences that began before are told already.
    ticked: Instant,
    /// The last view sent, without what changes by itself with time.
    view_sent: Option<GuardView>,
    outputs: VecDeque<Output>,
}

impl Guard {
    pub fn new(setup: Setup, now: Instant) -> Guard {
        let (until, command) = setup.left.map_or((None, None), |left| (left.until, left.command));
        // What no guard can have left holds no lease.
        let is_surrendered = matches!(command, Some(GuardCommand::Surrender { .. }));
        let until = until.filter(|until| *until <= now + GUARD_LEASE && !is_surrendered);
        let epoch = command.as_ref().map_or(Epoch(0), acting_epoch);
        let peers = setup.peers.into_iter().map(|(node, networks)| (node, Peer::new(&networks))).collect();
        let mut guard = Guard {
            node: setup.node,
            boot: setup.boot,
            peers,
            command,
            epoch,
            until,
            kills: 0,
            sequence: 0,
            heartbeat_due: now,
            kill_due: now,
            view_due: now,
            ticked: now,
            view_sent: None,
            outputs: VecDeque::new(),
        };
        // A guard that needs no peer goes on where the one before stopped, however long ago that was.
        guard.renew(now);
        guard.tick(now);
        guard
    }

    /// Takes one input; then `poll` until it gives `None`. A lease that has run out by `now` is over before the input is
    /// looked at.
    pub fn handle(&mut self, now: Instant, input: Input) {
        self.end_lease_if_over(now);
        match input {
            Input::Heartbeat { network, heartbeat } => self.on_heartbeat(now, network, heartbeat),
            Input::Command(command) => self.on_command(now, command),
            Input::Connected => self.view_sent = None,
        }
        self.tick(now);
    }

    /// Time passed: the same without an input.
    pub fn tick(&mut self, now: Instant) {
        self.end_lease_if_over(now);
        self.ticked = now;
        if now >= self.heartbeat_due {
            self.send_heartbeats(now);
            // After a pause the missed ones are not made up for.
            self.heartbeat_due = now + HEARTBEAT;
            if self.needs_no_peer() {
                self.renew(now);
            }
        }
        if self.until.is_none() && now >= self.kill_due {
            self.outputs.push_back(Output::KillGuests);
            self.kill_due = now + KILL_AGAIN;
        }
        self.send_view_if_due(now);
        self.check();
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When `tick` is to be called at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        let kill = if self.until.is_none() { Some(self.kill_due) } else { self.until };
        let silences = self.peers.values().flat_map(Peer::silences).filter(|at| *at > self.ticked);
        silences.chain(kill).chain([self.heartbeat_due, self.view_due]).min()
    }

    /// The epoch named in heartbeats.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Whether guests may run at `now`.
    pub fn lease_held(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    /// Asserts what must always be so.
    pub fn check(&self) {
        if let Some(until) = self.until {
            // A restarted guard may hold a lease that the one before it proved, so there is no equality here.
            assert!(until <= self.ticked + GUARD_LEASE, "a lease is never longer than GUARD_LEASE from now");
            let is_surrendered = matches!(self.command, Some(GuardCommand::Surrender { .. }));
            assert!(!is_surrendered, "a node that surrendered holds no lease");
        }
        assert!(self.outputs.len() < 10_000, "the shell does not drain the outputs");
    }

    fn on_heartbeat(&mut self, now: Instant, network: Network, heartbeat: Heartbeat) {
        let Some(peer) = self.peers.get_mut(&heartbeat.from) else {
            return;
        };
        let is_newer = heartbeat.epoch > self.epoch;
        peer.on_heartbeat(now, network, self.boot, &heartbeat, is_newer);
        if self.is_member() {
            self.renew(now);
        }
    }

    fn on_command(&mut self, now: Instant, command: GuardCommand) {
        if !self.is_news(&command) {
            return;
        }
        self.epoch = self.epoch.max(acting_epoch(&command));
        let is_over = matches!(command, GuardCommand::Surrender { .. });
        self.command = Some(command);
        if is_over {
            self.end_lease(now);
        } else {
            self.renew(now);
            if let Some(until) = self.until {
                self.outputs.push_back(Output::Lease { until, command: self.command.clone() });
            }
        }
    }

    /// Whether the command is to be obeyed: newer, or the same word with other peers, or an end.
    fn is_news(&self, new: &GuardCommand) -> bool {
        use GuardCommand::*;
        let Some(old) = &self.command else {
            return true;
        };
        if new == old {
            return false;
        }
        match named_epoch(new).cmp(&named_epoch(old)) {
            std::cmp::Ordering::Greater => true,
            std::cmp::Ordering::Less => false,
            std::cmp::Ordering::Equal => matches!(
                (old, new),
                (Members { .. }, Members { .. }) | (Members { .. } | Alone { .. }, Surrender { .. })
            ),
        }
    }

    fn is_member(&self) -> bool {
        matches!(self.command, Some(GuardCommand::Members { .. }))
    }

    fn needs_no_peer(&self) -> bool {
        match &self.command {
            Some(GuardCommand::Alone { .. }) => true,
            Some(GuardCommand::Members { peers, .. }) => peers.iter().all(|peer| *peer == self.node),
            Some(GuardCommand::Surrender { .. }) | None => false,
        }
    }

    /// Sending time of our newest heartbeats that a majority of the members (with ourselves) has answered.
    fn proof(&self) -> Option<Instant> {
        let Some(GuardCommand::Members { peers, .. }) = &self.command else {
            return None;
        };
        let others: Vec<NodeId> = peers.iter().copied().filter(|peer| *peer != self.node).collect();
        let mut proofs: Vec<Instant> =
            others.iter().filter_map(|node| self.peers.get(node).and_then(|peer| peer.proof)).collect();
        proofs.sort_unstable_by(|a, b| b.cmp(a));
        // Of n members the majority is n/2 + 1, of which we are one.
        let needed = others.len().div_ceil(2).max(1);
        proofs.get(needed - 1).copied()
    }

    /// Takes the lease that is proven, if it ends later than the one held.
    fn renew(&mut self, now: Instant) {
        let proof = if self.needs_no_peer() { Some(now) } else { self.proof() };
        let Some(until) = proof.map(|proof| proof + GUARD_LEASE) else {
            return;
        };
        if until <= now || self.until.is_some_and(|held| held >= until) {
            return;
        }
        self.until = Some(until);
        self.outputs.push_back(Output::Lease { until, command: self.command.clone() });
    }

    fn end_lease_if_over(&mut self, now: Instant) {
        if self.until.is_some_and(|until| now >= until) {
            if self.needs_no_peer() {
                // Nobody else may act; the deadline only says how long a guard may be absent.
                self.renew(now);
            } else {
                self.end_lease(now);
            }
        }
    }

    fn end_lease(&mut self, now: Instant) {
        if self.until.take().is_some() {
            self.kills += 1;
        }
        self.outputs.push_back(Output::KillGuests);
        self.kill_due = now + KILL_AGAIN;
    }

    fn send_heartbeats(&mut self, now: Instant) {
        for (to, peer) in &mut self.peers {
            for (network, link) in &mut peer.links {
                self.sequence += 1;
                link.on_sent(now, self.sequence);
                let heard = peer.boot.and_then(|boot| link.newest.map(|sequence| (boot, sequence)));
                let heartbeat =
                    Heartbeat { from: self.node, boot: self.boot, sequence: self.sequence, epoch: self.epoch, heard };
                self.outputs.push_back(Output::Send { to: *to, network: *network, heartbeat });
            }
        }
    }

    fn send_view_if_due(&mut self, now: Instant) {
        let view = self.view(now);
        let mut steady = view.clone();
        for (seen, peer) in steady.peers.iter_mut().zip(self.peers.values()) {
            seen.heard_ms = peer.is_silent(now).then_some(u64::MAX);
        }
        if now >= self.view_due || self.view_sent.as_ref() != Some(&steady) {
            self.view_sent = Some(steady);
            self.view_due = now + VIEW_EVERY;
            self.outputs.push_back(Output::View(view));
        }
    }

    fn view(&self, now: Instant) -> GuardView {
        GuardView {
            peers: self.peers.iter().map(|(node, peer)| peer.view(*node, now)).collect(),
            lease_held: self.lease_held(now),
            kills: self.kills,
            command: self.command.clone(),
        }
    }
}

/// The epoch under which the command lets this node act; a surrender lets it act under none.
fn acting_epoch(command: &GuardCommand) -> Epoch {
    match command {
        GuardCommand::Members { epoch, .. } | GuardCommand::Alone { epoch } => *epoch,
        GuardCommand::Surrender { .. } => Epoch(0),
    }
}

fn named_epoch(command: &GuardCommand) -> Epoch {
    match command {
        GuardCommand::Members { epoch, .. } | GuardCommand::Alone { epoch } | GuardCommand::Surrender { epoch } => {
            *epoch
        }
    }
}

#[cfg(test)]
mod tests;
