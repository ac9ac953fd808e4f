//! The core itself: its inputs, its outputs, and the order in which its parts look at them.
//!
//! Every input is first written down as a fact; then `reconcile` looks at all facts and does what is still missing. No
//! step depends on having seen the one before happen: that is what makes a crash between any two of them harmless. What is
//! asked for and may be lost on the way (proposals, questions) is asked again after a pause until the facts show it.

use crate::authority::Stand;
use crate::entry::{Change, Entry, Holder, VmPhase};
use crate::fencing::Fencing;
use crate::groups::Groups;
use crate::headline::{Headline, headline};
use crate::peers::Peers;
use crate::requests;
use crate::seam::{EpochRecord, Input, Output, PeerHello, Refusal, Setup};
use crate::state::State;
use crate::vms::Vms;
use crate::witness::Witness;
use pollux_base::guard::GuardView;
use pollux_base::{Epoch, Instant, NodeId};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// A proposal that is still needed is made again after this long; a commit takes some milliseconds.
pub(crate) const PROPOSE_AGAIN: Duration = Duration::from_secs(1);
/// A request that is not committed by then is answered: long enough for a takeover to happen underneath it.
const REQUEST_WAIT: Duration = Duration::from_secs(20);
/// Requests under way; more are refused.
const REQUESTS_MAX: usize = 64;
/// Rounds of `reconcile` in which one step may make the next possible; the longest chain has four.
const ROUNDS_MAX: usize = 16;

/// What a proposal is about: kind, subject, and what it expects. The same one is not made twice within `PROPOSE_AGAIN`.
pub(crate) type ProposalKey = (&'static str, u64, u64);

/// One node's part in the cluster's decisions.
pub struct Cluster {
    pub(crate) me: NodeId,
    pub(crate) setup: Setup,
    pub(crate) state: State,
    /// What was last saved.
    pub(crate) record: Option<EpochRecord>,
    pub(crate) log: LogSight,
    pub(crate) stand: Stand,
    /// This run of `noded` has applied everything that was decided before it began; it may act.
    pub(crate) is_awake: bool,
    pub(crate) run: u64,
    /// The old log is being given up: what still comes from it is ignored.
    pub(crate) giving_up: bool,
    /// The log was given up and nothing else may be expected of this node: it asks to be taken in.
    pub(crate) gave_up: bool,
    pub(crate) guard: Option<GuardView>,
    pub(crate) peers: Peers,
    pub(crate) witness: Witness,
    pub(crate) groups: Groups,
    pub(crate) vms: Vms,
    pub(crate) fencing: Fencing,
    /// When something asked of the shell was last asked, by what and about whom.
    asked: BTreeMap<ProposalKey, Instant>,
    pending: BTreeMap<u64, Pending>,
    clock: (Instant, u64),
    wake: Option<Instant>,
    is_dirty: bool,
    outputs: VecDeque<Output>,
}

/// The log as this node knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LogSight {
    pub leader: Option<NodeId>,
    pub voters: Vec<NodeId>,
    pub learners: Vec<NodeId>,
}

/// A request that waits for its entry.
struct Pending {
    entry: Entry,
    until: Instant,
    again: Instant,
}

impl Cluster {
    pub fn new(setup: Setup, now: Instant) -> Cluster {
        let mut cluster = Cluster {
            me: setup.node,
            state: State::default(),
            record: setup.record.clone(),
            log: LogSight::default(),
            stand: Stand::at_start(&setup, now),
            is_awake: false,
            run: setup.run,
            giving_up: false,
            gave_up: false,
            guard: None,
            peers: Peers::new(&setup),
            witness: Witness::new(now),
            groups: Groups::default(),
            vms: Vms::default(),
            fencing: Fencing::default(),
            asked: BTreeMap::new(),
            pending: BTreeMap::new(),
            clock: (now, setup.unix_ms),
            wake: None,
            is_dirty: false,
            outputs: VecDeque::new(),
            setup,
        };
        cluster.reconcile(now);
        cluster
    }

    /// Takes one input; then `poll` until it gives `None`.
    pub fn handle(&mut self, now: Instant, input: Input) {
        match input {
            Input::Committed { index, entry } => self.on_committed(now, index, entry),
            Input::Snapshot { index, state } => self.on_snapshot(index, *state),
            Input::Log { leader, voters, learners } => self.on_log(LogSight { leader, voters, learners }),
            Input::LogGivenUp { epoch } => self.on_log_given_up(epoch),
            Input::Request { request, unix_ms, change } => {
                self.clock = (now, unix_ms);
                self.on_request(now, request, *change);
            }
            Input::Guard(view) => self.on_guard(now, view),
            Input::GuardGone => {
                self.guard = None;
                self.peers.forget_hearing();
            }
            Input::Peer(hello) => self.peers.on_hello(now, hello),
            Input::PeerGone(node) => self.peers.on_gone(node),
            Input::Witness { ask, result } => self.on_witness(now, ask, result),
            Input::EpochSaved(record) => self.record = Some(record),
            Input::Fence { node, result } => self.fencing.on_result(now, node, result),
            Input::DataConnected => self.on_data_connected(),
            Input::Data(report) => self.on_data(report),
            Input::Vm(event) => self.on_vm_event(now, event),
            Input::ConfirmDown { request, node, token } => self.on_confirm_down(now, request, node, &token),
            Input::Disk { request, command, accepts_loss } => self.on_disk_command(request, command, accepts_loss),
            Input::Kept { request, command } => self.on_kept_command(request, command),
            Input::KeyRefused { key, reason } => self.on_key_refused(key, reason),
            Input::Verify { request } => self.on_verify(request),
            Input::Compare { request, group, one, two, from } => self.on_compare(request, group, one, two, from),
            Input::Tick { unix_ms } => self.clock = (now, unix_ms),
        }
        self.reconcile(now);
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When `handle` is to be called with `Input::Tick` at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.wake
    }

    /// Everything the log says.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// This node's own durable word.
    pub fn record(&self) -> Option<&EpochRecord> {
        self.record.as_ref()
    }

    /// How this node introduces itself to its peers now.
    pub fn hello(&self) -> PeerHello {
        PeerHello {
            node: self.me,
            epoch: self.record_epoch(),
            alone: self.record.as_ref().is_some_and(|record| record.alone)
                && matches!(self.stand, Stand::Granted { .. }),
            since_unix_ms: self.state.authority.since_unix_ms,
            wants_to_join: self.gave_up,
            pool: self.groups.pool.clone(),
            master: self.setup.master,
            master_successor: self.setup.master_successor,
        }
    }

    /// "If a node dies now, what happens?"
    pub fn headline(&self) -> Headline {
        headline(&self.state, &self.sight())
    }

    /// Asserts what must always be so.
    pub fn check(&self) {
        self.state.check();
        if self.acts_alone() {
            assert!(self.record.as_ref().is_some_and(|record| record.alone), "acts alone without a durable word of it");
        }
        assert!(!(self.gave_up && self.may_act()), "acts although it gave up its log");
        assert!(self.pending.len() <= REQUESTS_MAX);
    }

    /// Looks at all facts until nothing more follows from them.
    fn reconcile(&mut self, now: Instant) {
        self.wake = None;
        self.asked.retain(|_, at| now.since(*at) < Duration::from_secs(120));
        for _ in 0..ROUNDS_MAX {
            self.is_dirty = false;
            self.reconcile_authority(now);
            self.reconcile_witness(now);
            self.reconcile_fencing(now);
            self.reconcile_groups(now);
            self.reconcile_vms(now);
            if !self.is_dirty {
                break;
            }
        }
        assert!(!self.is_dirty, "decisions that undo each other");
        self.reconcile_requests(now);
        self.check();
    }

    fn on_log(&mut self, log: LogSight) {
        if self.giving_up {
            return;
        }
        if self.log.leader != log.leader {
            // What was sent to the old leader may be lost.
            self.asked.clear();
        }
        self.log = log;
    }

    fn on_committed(&mut self, now: Instant, index: u64, entry: Entry) {
        if self.giving_up || index <= self.state.applied {
            return;
        }
        let answer = self.state.apply(index, &entry);
        if answer.is_ok() {
            self.on_applied(now, &entry.change);
        }
        let request = entry.request.filter(|request| {
            entry.by == self.me && self.pending.get(request).is_some_and(|pending| pending.entry == entry)
        });
        if let Some(request) = request {
            self.pending.remove(&request);
            self.output(Output::Answer { request, result: answer });
        }
    }

    /// What an applied entry means for this node beside the state.
    fn on_applied(&mut self, now: Instant, change: &Change) {
        match change {
            Change::Awake { node, run } if *node == self.me && *run == self.run => self.is_awake = true,
            Change::DiscardReplica { group, node, loser } if *node == self.me => {
                self.groups.to_discard.insert(*group, *loser);
            }
            Change::VmPhase { vm, node, incarnation, phase: VmPhase::Starting, .. }
                if *node == self.me && self.is_awake =>
            {
                self.note_new_run(*vm, *incarnation);
            }
            Change::VmPhase { vm, node, phase: VmPhase::Recovering, .. } if *node == self.me => {
                self.note_crash(now, *vm)
            }
            _ => {}
        }
    }

    fn on_snapshot(&mut self, index: u64, state: State) {
        // What is committed does not change: an older snapshot has nothing that is not here.
        if self.giving_up || index <= self.state.applied {
            return;
        }
        self.state = state;
        self.state.applied = index;
        let done = |key: &(NodeId, u64, u64)| self.state.requests.contains(key);
        let answered: Vec<u64> = self
            .pending
            .iter()
            .filter(|(request, pending)| done(&(self.me, **request, pending.entry.unix_ms)))
            .map(|(request, _)| *request)
            .collect();
        for request in answered {
            self.pending.remove(&request);
            self.output(Output::Answer { request, result: Ok(crate::Answer::Done) });
        }
    }

    fn on_request(&mut self, now: Instant, request: u64, mut change: Change) {
        let refusal = self.prepare_request(now, &mut change).err();
        if let Some(refusal) = refusal {
            self.output(Output::Answer { request, result: Err(refusal) });
            return;
        }
        let entry = Entry { by: self.me, unix_ms: self.unix_ms(now), request: Some(request), change };
        self.pending.insert(request, Pending { entry, until: now + REQUEST_WAIT, again: now });
    }

    fn prepare_request(&self, now: Instant, change: &mut Change) -> Result<(), Refusal> {
        if !requests::is_for_users(change) {
            return Err(Refusal::Invalid("this is decided by the cluster itself".into()));
        }
        if let Some(reason) = self.why_not_acting() {
            return Err(Refusal::NoQuorum(reason));
        }
        if self.pending.len() == REQUESTS_MAX {
            return Err(Refusal::NoQuorum(format!("{REQUESTS_MAX} requests are under way; try again in a moment")));
        }
        match change {
            Change::CreateImage { node, .. } | Change::CreateVolume { node, .. } | Change::CreateVm { node, .. }
                if *node == NodeId(0) =>
            {
                *node = self.roomiest_node();
            }
            _ => {}
        }
        self.refuse_unborn(change)?;
        self.refuse_masters(now, change)?;
        self.refuse_exchange(now, change)?;
        self.prepare_promotion(change)?;
        requests::refuse(&self.state, change)?;
        self.refuse_start(change)
    }

    fn reconcile_requests(&mut self, now: Instant) {
        let late: Vec<u64> =
            self.pending.iter().filter(|(_, pending)| now >= pending.until).map(|(request, _)| *request).collect();
        for request in late {
            self.pending.remove(&request);
            let text = format!("not confirmed within {} s; it may still be done", REQUEST_WAIT.as_secs());
            self.output(Output::Answer { request, result: Err(Refusal::NoQuorum(text)) });
        }
        let mut due = Vec::new();
        for pending in self.pending.values_mut() {
            if now >= pending.again && self.log.leader.is_some() {
                pending.again = now + PROPOSE_AGAIN;
                due.push(Output::Propose(pending.entry.clone()));
            }
        }
        let waits: Vec<Instant> =
            self.pending.values().flat_map(|pending| [pending.until, pending.again]).filter(|at| *at > now).collect();
        self.outputs.extend(due);
        for at in waits {
            self.wake_at(at);
        }
    }

    /// The node with the most free memory among those online.
    fn roomiest_node(&self) -> NodeId {
        let online = self.state.nodes.iter().filter(|(_, node)| node.phase == crate::entry::NodePhase::Online);
        let free = |node: &NodeId, has: u64| has.saturating_sub(self.state.memory_taken(*node).0);
        // Of equals this node, then the lowest number.
        online
            .max_by_key(|(id, node)| (free(id, node.spec.memory_bytes), **id == self.me, std::cmp::Reverse(**id)))
            .map_or(self.me, |(id, _)| *id)
    }

    /// Proposes the change unless the same was proposed a moment ago.
    pub(crate) fn propose(&mut self, now: Instant, key: ProposalKey, change: Change) {
        if self.log.leader.is_some() && self.is_due(now, key, PROPOSE_AGAIN) {
            let entry = Entry { by: self.me, unix_ms: self.unix_ms(now), request: None, change };
            self.output(Output::Propose(entry));
        }
    }

    /// Whether this was not done within the last `pause`; if so it counts as done now, else the core wakes when it is due.
    pub(crate) fn is_due(&mut self, now: Instant, key: ProposalKey, pause: Duration) -> bool {
        if let Some(at) = self.asked.get(&key).map(|at| *at + pause).filter(|at| *at > now) {
            self.wake_at(at);
            return false;
        }
        self.asked.insert(key, now);
        self.wake_at(now + pause);
        true
    }

    /// Whether that moment has come; else the core wakes then.
    pub(crate) fn has_come(&mut self, now: Instant, at: Instant) -> bool {
        if at > now {
            self.wake_at(at);
        }
        at <= now
    }

    pub(crate) fn wake_at(&mut self, at: Instant) {
        self.wake = Some(self.wake.map_or(at, |wake| wake.min(at)));
    }

    /// A fact changed by a decision: the others look again.
    pub(crate) fn dirty(&mut self) {
        self.is_dirty = true;
    }

    pub(crate) fn output(&mut self, output: Output) {
        self.outputs.push_back(output);
    }

    /// Wall clock, for people.
    pub(crate) fn unix_ms(&self, now: Instant) -> u64 {
        self.clock.1 + u64::try_from(now.since(self.clock.0).as_millis()).unwrap_or(0)
    }

    pub(crate) fn record_epoch(&self) -> Epoch {
        self.record.as_ref().map_or(Epoch(0), |record| record.epoch)
    }

    /// The log says that this node decides alone, under the grant that it holds.
    pub(crate) fn acts_alone(&self) -> bool {
        match self.stand {
            Stand::Granted { epoch, .. } => {
                self.state.authority.epoch == epoch && self.state.authority.holder == (Holder::Alone { node: self.me })
            }
            _ => false,
        }
    }

    /// Whether this node may decide anything by what it has applied.
    pub(crate) fn may_act(&self) -> bool {
        self.is_awake && self.log.leader.is_some() && (self.acts_alone() || self.acts_as_member())
    }

    fn acts_as_member(&self) -> bool {
        matches!(self.stand, Stand::Member { .. })
            && self.state.authority.holder == Holder::Members
            && self.all_vote()
            && self.record.as_ref().is_some_and(|record| record.epoch == self.state.authority.epoch)
    }

    pub(crate) fn lease_held(&self) -> bool {
        self.guard.as_ref().is_some_and(|view| view.lease_held)
    }
}
