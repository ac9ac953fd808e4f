//! A model of the cluster log: the seam where `noded` puts a real Raft engine, with the same promises and the same ways
//! to fail, and no more comfort.
//!
//! Promised: an entry is told as committed only when it is in the durable logs of a majority of the voters; every node
//! is told the same entries in the same order, each once per run of its process (again from the start, or from a
//! snapshot, after a restart); what was committed stays, unless the log itself is forced.
//!
//! Not promised: that a proposal arrives at all; that it is committed once only; that its proposer learns of it; that a
//! leader knows that it is cut off; that an entry which was not committed will never be (the tail of a log that is
//! forced comes to count, as it does in Raft).
//!
//! It is a small Raft (Ongaro, 2014: elections, log matching, commit of own terms only) with one change of membership
//! at a time. Messages carry the log's lineage, which changes when a log is forced: nodes of different lineages do not
//! hear each other, as `noded` arranges by refusing peers of another epoch.

use crate::time::Time;
use pollux_base::{Epoch, NodeId};
use pollux_store::faulty_disk::Luck;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

/// Longer than a round trip and a slow disk's flush together, shorter than a takeover may take.
const ELECTION: Duration = Duration::from_millis(300);
const HEARTBEAT: Duration = Duration::from_millis(50);
/// What one message carries at most: keeps a returning node's catching up a matter of several messages.
const BATCH_MAX: usize = 64;

#[derive(Clone, Debug)]
pub enum Payload<E> {
    /// A new leader's own, so that older entries come to count.
    Blank,
    Entry(E),
    Members(Members),
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Members {
    pub voters: BTreeSet<NodeId>,
    pub learners: BTreeSet<NodeId>,
}

#[derive(Clone, Debug)]
pub struct Slot<E> {
    term: u64,
    payload: Payload<E>,
}

#[derive(Clone, Debug)]
pub struct Message<E> {
    /// The epoch under which this log was last forced.
    lineage: Epoch,
    body: Body<E>,
}

#[derive(Clone, Debug)]
enum Body<E> {
    Vote { term: u64, last_term: u64, len: usize },
    Voted { term: u64, granted: bool },
    Append { term: u64, prev_len: usize, prev_term: u64, slots: Vec<Slot<E>>, commit: usize },
    Appended { term: u64, matched: Result<usize, usize> },
    Forward { entry: E },
}

impl<E> Message<E> {
    /// For the trace.
    pub fn name(&self) -> &'static str {
        match self.body {
            Body::Vote { .. } => "vote?",
            Body::Voted { .. } => "voted",
            Body::Append { .. } => "append",
            Body::Appended { .. } => "appended",
            Body::Forward { .. } => "forward",
        }
    }
    /// Whether it only keeps a leader known.
    pub fn is_idle(&self) -> bool {
        match &self.body {
            Body::Append { slots, .. } => slots.is_empty(),
            Body::Appended { .. } => true,
            _ => false,
        }
    }
}

#[derive(Clone, Debug)]
pub enum LogOutput<E> {
    Send { to: NodeId, message: Message<E> },
    Committed { index: u64, entry: E },
    View { leader: Option<NodeId>, voters: Vec<NodeId>, learners: Vec<NodeId> },
}

/// What outlives the process and the power.
#[derive(Clone, Debug)]
struct Durable<E> {
    lineage: Epoch,
    term: u64,
    voted: Option<NodeId>,
    slots: Vec<Slot<E>>,
    /// How many slots were given to the core so far.
    applied: usize,
    /// The epoch for which the log was last given up.
    emptied: Option<Epoch>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Role {
    Follower { leader: Option<NodeId> },
    Candidate { votes: BTreeSet<NodeId> },
    Leader,
}

/// The log of one node: while its `noded` runs, `tick`, `receive` and `propose` it; drain `poll` after each.
pub struct LogNode<E> {
    node: NodeId,
    durable: Durable<E>,
    role: Role,
    commit: usize,
    applied: usize,
    /// Leader: what each other node is known to have, and when it last answered.
    matched: BTreeMap<NodeId, usize>,
    next: BTreeMap<NodeId, usize>,
    election_at: Time,
    heartbeat_at: Time,
    outputs: VecDeque<LogOutput<E>>,
    told: Option<(Option<NodeId>, Members)>,
    luck: Luck,
}

impl<E: Clone> LogNode<E> {
    /// An empty log, on a node that is not a member of anything yet.
    pub fn new(node: NodeId, seed: u64) -> LogNode<E> {
        let nothing = Durable { lineage: Epoch(0), term: 0, voted: None, slots: vec![], applied: 0, emptied: None };
        LogNode {
            node,
            durable: nothing,
            role: Role::Follower { leader: None },
            commit: 0,
            applied: 0,
            matched: BTreeMap::new(),
            next: BTreeMap::new(),
            election_at: Time(0),
            heartbeat_at: Time(0),
            outputs: VecDeque::new(),
            told: None,
            luck: Luck::new(seed),
        }
    }

    /// The cluster is born: a log with these voters. Nothing when there is a log.
    pub fn init(&mut self, now: Time, voters: &[NodeId]) {
        if self.durable.slots.is_empty() {
            let members = Members { voters: voters.iter().copied().collect(), learners: BTreeSet::new() };
            self.append(Payload::Members(members));
            self.stand_for_election(now);
            self.tell_view();
        }
    }

    /// The process starts: everything not durable is forgotten, and the entries given before are given again, but for
    /// those which a snapshot covers.
    pub fn restart(&mut self, now: Time, snapshot: usize) {
        assert!(snapshot <= self.durable.applied, "a snapshot of entries that were never applied");
        self.role = Role::Follower { leader: None };
        self.commit = snapshot;
        self.applied = snapshot;
        self.told = None;
        self.outputs.clear();
        self.put_off_election(now);
        // The engine keeps what it knows to be committed beside its log, now and then a little late.
        let known = self.durable.applied.saturating_sub(self.luck.below(3) as usize).max(snapshot);
        self.advance(known);
        self.tell_view();
    }

    /// How many slots were given to the core.
    pub fn applied(&self) -> usize {
        self.applied
    }

    pub fn deadline(&self) -> Time {
        match self.role {
            Role::Leader => self.heartbeat_at,
            Role::Follower { .. } | Role::Candidate { .. } => self.election_at,
        }
    }

    pub fn poll(&mut self) -> Option<LogOutput<E>> {
        self.outputs.pop_front()
    }

    /// Time passed.
    pub fn tick(&mut self, now: Time) {
        match self.role {
            Role::Leader if now >= self.heartbeat_at => {
                self.heartbeat_at = now + HEARTBEAT;
                self.replicate();
            }
            Role::Follower { .. } | Role::Candidate { .. } if now >= self.election_at => {
                self.put_off_election(now);
                if self.members().voters.contains(&self.node) {
                    self.stand_for_election(now);
                } else {
                    self.role = Role::Follower { leader: None };
                }
            }
            _ => {}
        }
        self.tell_view();
    }

    /// Asks for an entry. Lost when no leader is known.
    pub fn propose(&mut self, entry: E) {
        match self.role {
            Role::Leader => {
                self.append(Payload::Entry(entry));
                self.replicate();
                self.count_commits();
            }
            Role::Follower { leader: Some(leader) } => self.send(leader, Body::Forward { entry }),
            Role::Follower { leader: None } | Role::Candidate { .. } => {}
        }
        self.tell_view();
    }

    /// The log becomes this node's own, under `epoch`, with everything that is in it.
    pub fn force_alone(&mut self, now: Time, epoch: Epoch) {
        if self.durable.lineage >= epoch {
            return;
        }
        self.durable.lineage = epoch;
        self.append(Payload::Members(Members { voters: [self.node].into(), learners: BTreeSet::new() }));
        self.stand_for_election(now);
        self.tell_view();
    }

    /// Everything is given up, once for an epoch; the node waits to be taken in by the log of another.
    pub fn give_up(&mut self, now: Time, epoch: Epoch) {
        if self.durable.emptied.is_some_and(|emptied| emptied >= epoch) {
            // What is there belongs to the new log already, and is told once more.
            return self.restart(now, 0);
        }
        self.durable.emptied = Some(epoch);
        self.durable.slots.clear();
        self.durable.voted = None;
        self.durable.applied = 0;
        self.applied = 0;
        self.commit = 0;
        self.role = Role::Follower { leader: None };
        self.outputs.clear();
        self.put_off_election(now);
        self.tell_view();
    }

    /// Takes the node in: first as a learner, when it has caught up as a voter. Asking again goes on with it.
    pub fn take_in(&mut self, node: NodeId) {
        let mut members = self.members();
        let settled = self.last_members_at() < self.commit;
        if self.role != Role::Leader || members.voters.contains(&node) || !settled {
            return;
        }
        if members.learners.insert(node) {
            self.next.insert(node, 0);
            self.matched.remove(&node);
        } else if self.matched.get(&node).is_some_and(|matched| *matched + 4 >= self.durable.slots.len()) {
            members.learners.remove(&node);
            members.voters.insert(node);
        } else {
            return;
        }
        self.append(Payload::Members(members));
        self.replicate();
        self.count_commits();
        self.tell_view();
    }

    pub fn receive(&mut self, now: Time, from: NodeId, message: Message<E>) {
        // An empty log has no history of its own and takes that of whoever takes it in.
        let adopts = self.durable.slots.is_empty() && message.lineage >= self.durable.lineage;
        if message.lineage != self.durable.lineage {
            if !adopts {
                return;
            }
            self.durable.lineage = message.lineage;
        }
        match message.body {
            Body::Forward { entry } => {
                if self.role == Role::Leader {
                    self.propose(entry);
                }
            }
            Body::Vote { term, last_term, len } => self.on_vote(now, from, term, (last_term, len)),
            Body::Voted { term, granted } => {
                self.see_term(term);
                if let Role::Candidate { votes } = &mut self.role
                    && term == self.durable.term
                    && granted
                {
                    votes.insert(from);
                    self.count_votes(now);
                }
            }
            Body::Append { term, prev_len, prev_term, slots, commit } => {
                self.on_append(now, from, term, (prev_len, prev_term), slots, commit);
            }
            Body::Appended { term, matched } => {
                self.see_term(term);
                if self.role == Role::Leader && term == self.durable.term {
                    match matched {
                        Ok(len) => {
                            self.matched.insert(from, len);
                            self.next.insert(from, len);
                            self.count_commits();
                            if len < self.durable.slots.len() {
                                self.replicate_to(from);
                            }
                        }
                        Err(len) => {
                            self.next.insert(from, len);
                            self.replicate_to(from);
                        }
                    }
                }
            }
        }
        self.tell_view();
    }

    fn on_vote(&mut self, now: Time, from: NodeId, term: u64, last: (u64, usize)) {
        // A node that hears a leader does not help to depose it.
        if self.role == Role::Leader
            || matches!(self.role, Role::Follower { leader: Some(_) }) && now < self.election_at
        {
            return;
        }
        self.see_term(term);
        let free = self.durable.voted.is_none_or(|voted| voted == from);
        let granted = term == self.durable.term && free && last >= (self.last_term(), self.durable.slots.len());
        if granted {
            self.durable.voted = Some(from);
            self.put_off_election(now);
        }
        self.send(from, Body::Voted { term: self.durable.term, granted });
    }

    fn on_append(
        &mut self,
        now: Time,
        from: NodeId,
        term: u64,
        (prev_len, prev_term): (usize, u64),
        slots: Vec<Slot<E>>,
        commit: usize,
    ) {
        self.see_term(term);
        if term < self.durable.term {
            self.send(from, Body::Appended { term: self.durable.term, matched: Err(self.durable.slots.len()) });
            return;
        }
        self.role = Role::Follower { leader: Some(from) };
        self.put_off_election(now);
        let have = self.durable.slots.len();
        if have < prev_len || (prev_len > 0 && self.durable.slots[prev_len - 1].term != prev_term) {
            let back = have.min(prev_len.saturating_sub(1));
            self.send(from, Body::Appended { term, matched: Err(back) });
            return;
        }
        let matched = prev_len + slots.len();
        for (at, slot) in (prev_len..).zip(slots) {
            if self.durable.slots.get(at).is_some_and(|own| own.term != slot.term) {
                assert!(at >= self.commit, "the model took back a committed entry");
                self.durable.slots.truncate(at);
            }
            if at == self.durable.slots.len() {
                self.durable.slots.push(slot);
            }
        }
        self.advance(commit.min(matched));
        self.send(from, Body::Appended { term, matched: Ok(matched) });
    }

    fn stand_for_election(&mut self, now: Time) {
        self.durable.term += 1;
        self.durable.voted = Some(self.node);
        self.role = Role::Candidate { votes: [self.node].into() };
        let (term, last_term, len) = (self.durable.term, self.last_term(), self.durable.slots.len());
        for peer in self.members().voters {
            if peer != self.node {
                self.send(peer, Body::Vote { term, last_term, len });
            }
        }
        self.count_votes(now);
    }

    fn count_votes(&mut self, now: Time) {
        let Role::Candidate { votes } = &self.role else { return };
        if votes.len() * 2 > self.members().voters.len() {
            self.role = Role::Leader;
            self.matched.clear();
            self.next.clear();
            self.heartbeat_at = now + HEARTBEAT;
            self.append(Payload::Blank);
            self.replicate();
            self.count_commits();
        }
    }

    /// Only an entry of the leader's own term makes those before it count (Ongaro, section 3.6.2).
    fn count_commits(&mut self) {
        let voters = self.members().voters;
        for len in (self.commit + 1..=self.durable.slots.len()).rev() {
            if self.durable.slots[len - 1].term != self.durable.term {
                break;
            }
            let have = voters
                .iter()
                .filter(|node| **node == self.node || self.matched.get(node).is_some_and(|matched| *matched >= len));
            if have.count() * 2 > voters.len() {
                self.advance(len);
                self.replicate();
                break;
            }
        }
    }

    fn advance(&mut self, commit: usize) {
        self.commit = self.commit.max(commit);
        while self.applied < self.commit {
            let slot = &self.durable.slots[self.applied];
            self.applied += 1;
            if let Payload::Entry(entry) = &slot.payload {
                self.outputs.push_back(LogOutput::Committed { index: self.applied as u64, entry: entry.clone() });
            }
        }
        self.durable.applied = self.durable.applied.max(self.applied);
    }

    fn append(&mut self, payload: Payload<E>) {
        self.durable.slots.push(Slot { term: self.durable.term, payload });
    }

    fn replicate(&mut self) {
        let members = self.members();
        for peer in members.voters.iter().chain(&members.learners) {
            if *peer != self.node {
                self.replicate_to(*peer);
            }
        }
    }

    fn replicate_to(&mut self, peer: NodeId) {
        let len = self.durable.slots.len();
        let next = self.next.get(&peer).copied().unwrap_or(len).min(len);
        let body = Body::Append {
            term: self.durable.term,
            prev_len: next,
            prev_term: if next == 0 { 0 } else { self.durable.slots[next - 1].term },
            slots: self.durable.slots[next..len.min(next + BATCH_MAX)].to_vec(),
            commit: self.commit,
        };
        self.send(peer, body);
    }

    fn send(&mut self, to: NodeId, body: Body<E>) {
        let message = Message { lineage: self.durable.lineage, body };
        self.outputs.push_back(LogOutput::Send { to, message });
    }

    fn see_term(&mut self, term: u64) {
        if term > self.durable.term {
            self.durable.term = term;
            self.durable.voted = None;
            self.role = Role::Follower { leader: None };
        }
    }

    fn last_term(&self) -> u64 {
        self.durable.slots.last().map_or(0, |slot| slot.term)
    }

    /// The newest membership counts from the moment it is in the log.
    fn members(&self) -> Members {
        let newest = self.durable.slots.iter().rev().find_map(|slot| match &slot.payload {
            Payload::Members(members) => Some(members.clone()),
            Payload::Blank | Payload::Entry(_) => None,
        });
        newest.unwrap_or_default()
    }

    fn last_members_at(&self) -> usize {
        let slots = self.durable.slots.iter();
        slots
            .rev()
            .position(|slot| matches!(slot.payload, Payload::Members(_)))
            .map_or(0, |back| self.durable.slots.len() - 1 - back)
    }

    fn put_off_election(&mut self, now: Time) {
        self.election_at = now + ELECTION + Duration::from_micros(self.luck.below(ELECTION.as_micros() as u64));
    }

    fn tell_view(&mut self) {
        let leader = match &self.role {
            Role::Leader => Some(self.node),
            Role::Follower { leader } => *leader,
            Role::Candidate { .. } => None,
        };
        let view = (leader, self.members());
        if self.told.as_ref() != Some(&view) {
            let (voters, learners) = (view.1.voters.iter().copied(), view.1.learners.iter().copied());
            self.outputs.push_back(LogOutput::View { leader, voters: voters.collect(), learners: learners.collect() });
            self.told = Some(view);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: NodeId = NodeId(1);
    const B: NodeId = NodeId(2);

    /// Two logs joined by links that may be cut; messages take a millisecond.
    struct Pair {
        now: Time,
        nodes: BTreeMap<NodeId, LogNode<u32>>,
        cut: bool,
        wire: VecDeque<(Time, NodeId, NodeId, Message<u32>)>,
        committed: BTreeMap<NodeId, Vec<u32>>,
    }

    impl Pair {
        fn new() -> Pair {
            let mut nodes: BTreeMap<NodeId, LogNode<u32>> =
                [A, B].map(|node| (node, LogNode::new(node, node.0))).into();
            nodes.values_mut().for_each(|log| log.restart(Time(0), 0));
            nodes.get_mut(&A).expect("a node").init(Time(0), &[A, B]);
            Pair { now: Time(0), nodes, cut: false, wire: VecDeque::new(), committed: BTreeMap::new() }
        }
        fn run(&mut self, ms: u64) {
            for _ in 0..ms {
                self.now = self.now + Duration::from_millis(1);
                while self.wire.front().is_some_and(|(at, ..)| *at <= self.now) {
                    let (_, from, to, message) = self.wire.pop_front().expect("just seen");
                    if !self.cut {
                        self.nodes.get_mut(&to).expect("a node").receive(self.now, from, message);
                    }
                }
                for (node, log) in &mut self.nodes {
                    if log.deadline() <= self.now {
                        log.tick(self.now);
                    }
                    while let Some(output) = log.poll() {
                        match output {
                            LogOutput::Send { to, message } => {
                                self.wire.push_back((self.now + Duration::from_millis(1), *node, to, message));
                            }
                            LogOutput::Committed { entry, .. } => self.committed.entry(*node).or_default().push(entry),
                            LogOutput::View { .. } => {}
                        }
                    }
                }
            }
        }
        fn log(&mut self, node: NodeId) -> &mut LogNode<u32> {
            self.nodes.get_mut(&node).expect("a node")
        }
    }

    #[test]
    fn both_must_hold_an_entry_before_it_counts() {
        let mut pair = Pair::new();
        pair.run(2000);
        pair.log(A).propose(1);
        pair.run(200);
        assert_eq!(pair.committed, [(A, vec![1]), (B, vec![1])].into());
        pair.cut = true;
        pair.log(A).propose(2);
        pair.log(B).propose(3);
        pair.run(2000);
        assert_eq!(pair.committed, [(A, vec![1]), (B, vec![1])].into());
    }

    #[test]
    fn a_forced_log_goes_on_alone_and_takes_the_other_in_again() {
        let mut pair = Pair::new();
        pair.run(2000);
        pair.log(A).propose(1);
        pair.run(200);
        pair.cut = true;
        pair.run(1000);
        let now = pair.now;
        pair.log(B).force_alone(now, Epoch(2));
        pair.log(B).propose(2);
        pair.run(200);
        assert_eq!(pair.committed[&B], [1, 2]);
        assert_eq!(pair.committed[&A], [1]);
        pair.cut = false;
        pair.run(2000);
        assert_eq!(pair.committed[&A], [1], "another lineage is not heard");
        let now = pair.now;
        pair.log(A).give_up(now, Epoch(2));
        pair.committed.clear();
        for _ in 0..20 {
            pair.log(B).take_in(A);
            pair.run(100);
        }
        pair.log(A).propose(3);
        pair.run(500);
        assert_eq!(pair.committed, [(A, vec![1, 2, 3]), (B, vec![3])].into());
        pair.cut = true;
        pair.log(B).propose(4);
        pair.run(2000);
        assert_eq!(pair.committed[&B], [3], "a member again, without which nothing counts");
    }

    #[test]
    fn what_counted_counts_after_a_restart() {
        let mut pair = Pair::new();
        pair.run(2000);
        pair.log(A).propose(1);
        pair.run(200);
        pair.committed.clear();
        let now = pair.now;
        pair.log(A).restart(now, 0);
        pair.log(B).restart(now, 0);
        pair.run(3000);
        assert_eq!(pair.committed, [(A, vec![1]), (B, vec![1])].into());
    }
}
