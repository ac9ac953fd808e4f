use super::*;

const A: NodeId = NodeId(1);
const B: NodeId = NodeId(2);
const NETWORKS: [Network; 2] = [Network(0), Network(1)];

/// Two guards and the networks between them, in virtual time.
struct Pair {
    now: Instant,
    guards: BTreeMap<NodeId, Guard>,
    /// `(from, network)`: cut in that direction.
    cut: Vec<(NodeId, Network)>,
    /// Guards that get no time.
    stopped: Vec<NodeId>,
    waiting: Vec<(NodeId, Network, Heartbeat)>,
    killed: BTreeMap<NodeId, Vec<Instant>>,
    views: BTreeMap<NodeId, GuardView>,
}

fn setup(node: NodeId, peer: NodeId, boot: u64) -> Setup {
    Setup { node, peers: [(peer, NETWORKS.to_vec())].into(), boot, left: None }
}

fn members(epoch: u64) -> Input {
    Input::Command(GuardCommand::Members { epoch: Epoch(epoch), peers: vec![A, B] })
}

impl Pair {
    /// Both guards run for two seconds as members of epoch 1.
    fn new() -> Pair {
        let now = Instant(1_000_000_000);
        let guards = [(A, Guard::new(setup(A, B, 11), now)), (B, Guard::new(setup(B, A, 22), now))].into();
        let mut pair = Pair {
            now,
            guards,
            cut: vec![],
            stopped: vec![],
            waiting: vec![],
            killed: BTreeMap::new(),
            views: BTreeMap::new(),
        };
        pair.give(A, members(1));
        pair.give(B, members(1));
        pair.run(2000);
        pair.killed.clear();
        pair
    }

    fn give(&mut self, node: NodeId, input: Input) {
        let now = self.now;
        self.guards.get_mut(&node).expect("a node of the pair").handle(now, input);
        self.drain(node);
    }

    fn drain(&mut self, node: NodeId) {
        while let Some(output) = self.guards.get_mut(&node).expect("a node of the pair").poll() {
            match output {
                Output::Send { to, network, heartbeat } => {
                    if !self.cut.contains(&(node, network)) {
                        self.waiting.push((to, network, heartbeat));
                    }
                }
                Output::KillGuests => self.killed.entry(node).or_default().push(self.now),
                Output::Lease { until, .. } => assert!(until > self.now, "a lease in the past"),
                Output::View(view) => {
                    self.views.insert(node, view);
                }
            }
        }
    }

    /// Lets `ms` pass in steps of 1 ms; messages take one step.
    fn run(&mut self, ms: u64) {
        for _ in 0..ms {
            self.now = self.now + Duration::from_millis(1);
            let (ready, kept): (Vec<_>, Vec<_>) =
                std::mem::take(&mut self.waiting).into_iter().partition(|(to, ..)| !self.stopped.contains(to));
            self.waiting = kept;
            for node in [A, B] {
                if !self.stopped.contains(&node) && self.guards[&node].deadline().is_some_and(|due| due <= self.now) {
                    let now = self.now;
                    self.guards.get_mut(&node).expect("a node of the pair").tick(now);
                    assert!(
                        self.guards[&node].deadline().is_some_and(|due| due > now),
                        "the deadline does not move on"
                    );
                    self.drain(node);
                }
            }
            for (to, network, heartbeat) in ready {
                self.give(to, Input::Heartbeat { network, heartbeat });
            }
        }
    }

    fn held(&self, node: NodeId) -> bool {
        self.guards[&node].lease_held(self.now)
    }

    fn cut_all(&mut self) {
        self.cut = [A, B].iter().flat_map(|node| NETWORKS.map(|network| (*node, network))).collect();
    }
}

#[test]
fn members_that_hear_each_other_hold_their_leases_and_never_kill() {
    let mut pair = Pair::new();
    pair.run(60_000);
    assert!(pair.held(A) && pair.held(B) && pair.killed.is_empty());
    assert_eq!(pair.views[&A].peers[0].networks, NETWORKS);
}

#[test]
fn a_silent_peer_is_told_within_a_second_and_ends_the_lease_in_time() {
    let mut pair = Pair::new();
    let cut_at = pair.now;
    pair.cut_all();
    pair.run(PEER_DOWN_MS + 160);
    assert!(pair.views[&A].peers[0].heard_ms.is_some_and(|ms| ms >= PEER_DOWN_MS), "told as soon as it is so");
    assert!(pair.views[&A].peers[0].networks.is_empty());
    pair.run(10_000);
    for node in [A, B] {
        let first = pair.killed[&node][0];
        assert!(first.since(cut_at) <= GUARD_LEASE, "{node} killed after {:?}", first.since(cut_at));
        assert!(pair.killed[&node].len() > 5, "guests that were started by mistake are killed again");
        assert!(!pair.held(node) && pair.views[&node].kills == 1);
    }
}

const PEER_DOWN_MS: u64 = pollux_base::timing::PEER_DOWN.as_millis() as u64;

#[test]
fn a_link_counts_only_if_both_directions_work() {
    let mut pair = Pair::new();
    pair.cut = vec![(A, Network(0)), (A, Network(1))];
    pair.run(5000);
    assert!(pair.views[&A].peers[0].heard_ms.is_some_and(|ms| ms < 500), "A still hears B");
    assert!(pair.views[&A].peers[0].networks.is_empty(), "but B does not answer");
    assert!(!pair.held(A) && !pair.held(B));
}

#[test]
fn one_network_is_enough() {
    let mut pair = Pair::new();
    pair.cut = vec![(A, Network(0)), (B, Network(0))];
    pair.run(20_000);
    assert!(pair.held(A) && pair.held(B) && pair.killed.is_empty());
    assert_eq!(pair.views[&B].peers[0].networks, [Network(1)]);
}

#[test]
fn a_guard_that_was_frozen_past_its_lease_kills_before_it_looks_at_anything() {
    let mut pair = Pair::new();
    pair.stopped = vec![A];
    pair.run(6000);
    let now = pair.now;
    let (_, network, heartbeat) = pair.waiting.pop().expect("B went on sending");
    let guard = pair.guards.get_mut(&A).expect("A");
    guard.handle(now, Input::Heartbeat { network, heartbeat });
    assert_eq!(guard.poll(), Some(Output::KillGuests));
}

#[test]
fn a_freeze_shorter_than_the_lease_kills_nothing() {
    let mut pair = Pair::new();
    pair.stopped = vec![A];
    pair.run(3000);
    pair.stopped.clear();
    pair.run(5000);
    assert!(pair.killed.is_empty() && pair.held(A) && pair.held(B));
}

#[test]
fn alone_under_a_grant_needs_no_peer_until_members_of_a_newer_epoch() {
    let mut pair = Pair::new();
    pair.cut_all();
    pair.run(1000);
    pair.give(A, Input::Command(GuardCommand::Alone { epoch: Epoch(2) }));
    pair.run(20_000);
    assert!(pair.held(A) && !pair.held(B) && !pair.killed.contains_key(&A));
    pair.give(A, members(1));
    pair.run(5000);
    assert!(pair.held(A), "an older epoch changes nothing");
    pair.give(A, members(3));
    pair.run(5000);
    assert!(!pair.held(A), "as a member it needs its peer again");
}

#[test]
fn a_peer_of_a_newer_epoch_renews_nothing() {
    // The survivor's clock runs from the moment its guard names the new epoch: whatever is heard later, the old side's
    // lease only runs out.
    let mut pair = Pair::new();
    let granted_at = pair.now;
    pair.give(A, Input::Command(GuardCommand::Alone { epoch: Epoch(2) }));
    pair.run(5000);
    let killed_at = pair.killed[&B][0];
    assert!(killed_at.since(granted_at) <= GUARD_LEASE, "killed after {:?}", killed_at.since(granted_at));
    pair.give(A, members(3));
    pair.give(B, members(3));
    pair.run(1000);
    assert!(pair.held(A) && pair.held(B));
}

#[test]
fn a_surrender_ends_the_lease_at_once_and_for_that_epoch() {
    let mut pair = Pair::new();
    pair.give(B, Input::Command(GuardCommand::Surrender { epoch: Epoch(2) }));
    assert_eq!(pair.killed[&B], [pair.now]);
    pair.give(B, members(2));
    pair.run(3000);
    assert!(!pair.held(B) && pair.held(A), "A still proves itself by B's answers");
    pair.give(B, members(3));
    pair.run(3000);
    assert!(pair.held(B));
}

#[test]
fn a_restarted_guard_goes_on_with_the_lease_it_finds() {
    let now = Instant(50_000_000_000);
    let command = Some(GuardCommand::Members { epoch: Epoch(1), peers: vec![A, B] });
    let until = now + Duration::from_millis(1500);
    let left = Left { until: Some(until), command };
    let mut guard = Guard::new(Setup { left: Some(left), ..setup(A, B, 12) }, now);
    assert!(guard.lease_held(now) && guard.epoch() == Epoch(1));
    guard.tick(until);
    assert!(!guard.lease_held(until));
    assert!(std::iter::from_fn(|| guard.poll()).any(|output| output == Output::KillGuests));
}

#[test]
fn a_guard_without_a_lease_kills_at_its_start_and_one_alone_does_not() {
    let now = Instant(50_000_000_000);
    let mut fresh = Guard::new(setup(A, B, 12), now);
    assert!(std::iter::from_fn(|| fresh.poll()).any(|output| output == Output::KillGuests));
    let left = Left { until: Some(now - GUARD_LEASE), command: Some(GuardCommand::Alone { epoch: Epoch(2) }) };
    let mut alone = Guard::new(Setup { left: Some(left), ..setup(A, B, 13) }, now);
    assert!(std::iter::from_fn(|| alone.poll()).all(|output| output != Output::KillGuests));
    assert!(alone.lease_held(now));
}

#[test]
fn recordings_neither_renew_a_lease_nor_silence_a_living_peer() {
    let mut pair = Pair::new();
    let recorded = Heartbeat { from: B, boot: 21, sequence: 999, epoch: Epoch(0), heard: Some((10, 5)) };
    pair.cut = vec![(B, Network(0)), (B, Network(1))];
    for _ in 0..60 {
        pair.run(100);
        pair.give(A, Input::Heartbeat { network: Network(0), heartbeat: recorded.clone() });
    }
    assert!(!pair.held(A) && pair.views[&A].peers[0].networks.is_empty());
    pair.cut.clear();
    pair.run(1000);
    pair.give(A, Input::Heartbeat { network: Network(0), heartbeat: recorded });
    pair.run(1000);
    assert!(pair.held(A) && pair.views[&A].peers[0].networks == NETWORKS);
}

#[test]
fn strangers_and_unknown_networks_are_ignored() {
    let mut pair = Pair::new();
    for (from, network) in [(NodeId(9), 0), (B, 77), (A, 0)] {
        let heartbeat = Heartbeat { from, boot: 1, sequence: u64::MAX, epoch: Epoch(u64::MAX), heard: None };
        pair.give(A, Input::Heartbeat { network: Network(network), heartbeat });
    }
    pair.run(6000);
    assert!(pair.held(A));
}

#[test]
fn a_cluster_of_one_holds_its_lease_by_itself() {
    let now = Instant(1);
    let mut guard = Guard::new(Setup { node: A, peers: BTreeMap::new(), boot: 1, left: None }, now);
    guard.handle(now, Input::Command(GuardCommand::Members { epoch: Epoch(1), peers: vec![A] }));
    assert!(guard.lease_held(now));
    let later = now + GUARD_LEASE * 3;
    guard.tick(later);
    assert!(guard.lease_held(later));
}
