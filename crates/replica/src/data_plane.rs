//! The data plane of one node: takes inputs to the group, the link or the store that they are about, and sees to it that
//! what follows from them happens before the next.

use crate::disks::Changes;
use crate::group::Group;
use crate::image::{self, OPENINGS};
use crate::kept::Shelf;
use crate::local::Origin;
use crate::node::{Node, Purpose};
use crate::note::Note;
use crate::primary::MemberState;
use crate::secondary::Asker;
use crate::space::{Seen, Space};
use crate::touched::Touched;
use crate::verdict::Verdict;
use crate::verifying::Verifying;
use crate::wire::{Frame, Message};
use crate::{Config, Input, Output};
use pollux_base::pool::PoolReport;
use pollux_base::timing::{LEASE_RENEW, REPLICA_LOST};
use pollux_base::{
    BlockError, GroupId, Instant, Kept, KeyId, NodeId, Order, Reply, Report, Request, Session, Stamp, VolumeId,
};
use pollux_store::{Disks, StoreError, StoreReply};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

/// Who is called so much later than it asked for was itself stopped (a debugger, a machine out of memory, a hypervisor
/// beneath). Others may have answered meanwhile: they are not late before they have had their time once more.
const OVERSLEPT: Duration = Duration::from_secs(1);
/// Inputs that came while the pool was being opened. Peers and the control plane say a few things per group and then wait
/// for an answer, clients are bounded by front ends.
const EARLY_MAX: usize = 65536;

/// Replication of all groups on one node. Owns the node's store.
pub struct DataPlane {
    pub(crate) node: Node,
    pub(crate) changes: Changes,
    pub(crate) verifying: Option<Verifying>,
    pub(crate) shelf: Shelf,
    pub(crate) groups: BTreeMap<GroupId, Group>,
    /// Whose volume it is, of the groups whose records are known.
    volumes: BTreeMap<VolumeId, GroupId>,
    /// When each group is to be looked at again, as of when something last happened to it.
    wakes: BTreeMap<GroupId, Instant>,
    /// Groups that were deleted: a late announcement does not bring them back.
    forgotten: BTreeSet<GroupId>,
    /// Discards that came before their group.
    discards: BTreeMap<GroupId, Stamp>,
    is_open: bool,
    early: VecDeque<Input>,
    pool_failure_told: bool,
    /// Groups that something happened to in this call.
    touched: Touched,
    /// Whose reports and next wake are still to be looked at.
    unreported: Touched,
    /// Groups with writes that wait here for space.
    full: BTreeSet<GroupId>,
    space: Space,
    /// Frames whose blocks did not match their checksums, per peer, since start (W11).
    damaged_frames: BTreeMap<NodeId, u64>,
}

impl DataPlane {
    /// Begins opening the pool; nothing is served and nothing is said to peers before it is open.
    pub fn new(config: Config, now: Instant) -> DataPlane {
        let mut store = Disks::open_seen(config.cluster, config.node, &config.disks, &config.seen);
        store.found_at(&config.paths);
        let mut plane = DataPlane {
            node: Node::new(now, config.node, config.boot, store),
            changes: Changes::default(),
            verifying: None,
            shelf: Shelf::default(),
            groups: BTreeMap::new(),
            volumes: BTreeMap::new(),
            wakes: BTreeMap::new(),
            forgotten: BTreeSet::new(),
            discards: BTreeMap::new(),
            is_open: false,
            early: VecDeque::new(),
            pool_failure_told: false,
            touched: Touched::default(),
            unreported: Touched::default(),
            full: BTreeSet::new(),
            space: Space::default(),
            damaged_frames: BTreeMap::new(),
        };
        plane.drain_store();
        plane
    }

    /// Takes one input.
    pub fn handle(&mut self, now: Instant, input: Input) {
        self.handle_all(now, [input]);
    }

    /// Takes inputs that have come together, in order. The same as one after the other, but cheaper: what follows from I/O
    /// (requests that may begin, what is to be reported, when to look again) is seen to once, behind all of it.
    pub fn handle_all(&mut self, now: Instant, inputs: impl IntoIterator<Item = Input>) {
        let overslept = |due: Instant| now > due + OVERSLEPT;
        if now > self.node.now + OVERSLEPT && self.deadline().is_some_and(overslept) {
            self.node.awake_since = now;
        }
        self.node.now = self.node.now.max(now);
        for input in inputs {
            let is_io = matches!(input, Input::Disk(_) | Input::Frame { .. } | Input::Request(_));
            self.take(input);
            self.drain_store();
            if !is_io || self.node.pool_failed.is_some() != self.pool_failure_told {
                self.settle();
            }
        }
        self.on_time();
        self.settle();
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Disk(done) => self.node.store.handle(self.node.now, pollux_store::Input::Disk(done)),
            Input::Tick => {}
            input if self.is_open => self.on_input(input),
            Input::LinkDown { peer, session } => {
                let over = |input: &Input| {
                    matches!(input, Input::LinkUp { peer: other, session: ended } | Input::Frame { peer: other, session: ended, .. }
                        if *other == peer && *ended == session)
                };
                self.early.retain(|input| !over(input));
            }
            input if self.early.len() < EARLY_MAX => self.early.push_back(input),
            Input::Frame { peer, session, .. } => {
                let reason = "the pool is still being opened".to_string();
                self.node.out.push_back(Output::Disconnect { peer, session, reason });
            }
            // ignore_beyond_bound: orders are given again, and a client whose request is lost has a time-out of its own.
            _ => {}
        }
    }

    /// Whether the pool has been opened, or refused. Before, everything but disks is put off.
    pub fn is_open(&self) -> bool {
        self.is_open
    }

    /// The next output, until there is none.
    pub fn poll(&mut self) -> Option<Output> {
        self.node.out.pop_front()
    }

    /// When `Input::Tick` is to be given at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        if !self.is_open {
            return self.node.store.deadline();
        }
        let groups = self.wakes.values().copied();
        let links = self.node.links.values().filter_map(|link| {
            link.session?;
            let ask = link.next_ask?;
            let lease = link.lease_held.then(|| link.lease.until());
            Some(lease.into_iter().chain([ask, link.heard + REPLICA_LOST]).min().unwrap_or(ask))
        });
        let leases = self.node.links.values().filter(|link| link.lease_held).map(|link| link.lease.until());
        let own = self.node.store.deadline().into_iter().chain(self.node.pace.deadline());
        let looks = self.verifying.as_ref().and_then(Verifying::due);
        groups.chain(links).chain(leases).chain(self.space.due()).chain(own).chain(looks).min()
    }

    /// Asserts the invariants; called by tests and debug builds after every step.
    pub fn check(&self) {
        if self.is_open {
            self.node.store.check();
        }
        self.node.pace.check();
        for (id, group) in &self.groups {
            group.check(&self.node);
            // A wake that is due in the past was looked at; one that is missed would never come.
            if let Some(wake) = group.wake(&self.node) {
                let known = self.wakes.get(id);
                assert!(known.is_some_and(|known| *known <= wake.max(self.node.now)), "{id} will be woken in time");
            }
        }
    }

    /// Frames of this peer whose blocks did not match their checksums, since start.
    pub fn damaged_frames(&self, peer: NodeId) -> u64 {
        self.damaged_frames.get(&peer).copied().unwrap_or(0)
    }

    /// The store, to be looked at: by reports to people and by checkers.
    pub fn store(&self) -> &Disks {
        &self.node.store
    }

    fn on_input(&mut self, input: Input) {
        match input {
            Input::LinkUp { peer, session } => self.on_link_up(peer, session),
            Input::LinkDown { peer, session } => {
                if self.node.session(peer) == Some(session) {
                    let now = self.node.now;
                    self.on_link_down(peer, now);
                }
            }
            Input::Frame { peer, session, frame } => self.on_frame(peer, session, frame),
            Input::Order(order) => self.on_order(*order),
            Input::DiskChange { id, change } => self.on_disk_change(id, change),
            Input::Request(request) => self.on_request(request),
            Input::Abandon(id) => self.groups.values_mut().for_each(|group| group.on_abandon(id)),
            Input::Disk(_) | Input::Tick => unreachable!("handled before"),
        }
    }

    /// Carries what the store asks and answers, until it is quiet.
    fn drain_store(&mut self) {
        while let Some(output) = self.node.store.poll() {
            match output {
                pollux_store::Output::Disk(op) => self.node.out.push_back(Output::Disk(op)),
                pollux_store::Output::Opened(result) => self.on_opened(result.map_err(|error| error.to_string())),
                pollux_store::Output::Changed(id, result) => self.on_disks_changed(id, result),
                pollux_store::Output::Close(disk) => self.node.out.push_back(Output::CloseDisk(disk)),
                pollux_store::Output::Ended(id, result) => {
                    let (group, purpose) = self.node.owner(id);
                    self.on_ended(group, purpose, result);
                }
            }
        }
    }

    fn on_opened(&mut self, result: Result<(), String>) {
        match result {
            Ok(()) => match self.node.image.on_opened(&self.node.store, self.node.boot) {
                Some(op) => self.node.request(OPENINGS, Purpose::Opening, op),
                None => self.begin(),
            },
            Err(reason) => {
                self.node.pool_refused = true;
                self.node.fail_pool(&reason);
                self.begin();
            }
        }
    }

    /// The pool is open, and knows that it is; or it is refused.
    fn begin(&mut self) {
        self.is_open = true;
        if !self.node.pool_refused {
            let notes = self.node.store.notes().filter(|(group, _)| !image::is_own(*group));
            let notes: Vec<(GroupId, Result<Note, _>)> =
                notes.map(|(group, bytes)| (group, Note::decode(bytes))).collect();
            for (id, note) in notes {
                match note {
                    Ok(note) => {
                        let group = self.groups.entry(id);
                        let group = group.or_insert(Group::new(id, Some(note), self.node.boot));
                        group.begin_replay(&mut self.node);
                    }
                    // Without its note a replica would be taken for an empty one; better none at all.
                    Err(error) => self.node.fail_pool(&format!("the note of {id} cannot be read: {error}")),
                }
            }
        }
        for input in std::mem::take(&mut self.early) {
            self.on_input(input);
        }
    }

    fn on_ended(&mut self, id: GroupId, purpose: Purpose, result: Result<StoreReply, StoreError>) {
        let node = &mut self.node;
        // A group that was forgotten; or a background task, which only a failing disk ends with an error.
        if let Err(StoreError::Disk(reason)) = &result {
            node.fail_pool(reason);
        }
        match purpose {
            Purpose::Look => return self.on_looked(result),
            Purpose::ReadKept { id, start, key } => return self.on_kept_read(id, start, key, result),
            Purpose::DropKept(id) => return self.on_kept_dropped(id, result),
            Purpose::Opening => {
                if result.is_err() {
                    node.image.on_not_noted();
                }
                return self.begin();
            }
            _ => {}
        }
        let Some(group) = self.groups.get_mut(&id) else {
            // What was being made for a record when its group was deleted is there now.
            if matches!(purpose, Purpose::Adopt(_)) && self.forgotten.contains(&id) {
                Group::new(id, None, node.boot).forget(node);
            }
            return;
        };
        self.touched.insert(id);
        match purpose {
            Purpose::Adopt(round) => group.on_adopt_step(node, round, result.map(|_| ())),
            Purpose::NoteCurrent { peer, session, sequence, stamp } => match result {
                Ok(_) => group.on_noted_current(node, peer, session, sequence, stamp),
                Err(error) => group.on_store_error(node, &error),
            },
            Purpose::NotePrimary(stamp) => match result {
                Ok(_) => group.on_primary_noted(node, stamp),
                Err(error) => group.on_store_error(node, &error),
            },
            Purpose::Heat { key, attempt } => group.on_heated(node, key, attempt, result.map(|_| ())),
            Purpose::Job(key) => {
                let generation = group.generation();
                let Some((origin, result)) = group.on_local_ended(node, generation, key, result) else { return };
                match origin {
                    Origin::Request { key, attempt } => group.on_request_job(node, key, attempt, result),
                    Origin::Peer { peer, session, sequence, stamp } => {
                        group.on_peer_job(node, peer, session, sequence, stamp, result);
                    }
                    Origin::Repair { key } => group.on_repair_job(node, key, result),
                    Origin::Copy { peer, key } => group.on_copy_job(node, peer, key, result),
                    Origin::Scrub { key } => group.on_scrub_job(node, key, result),
                    Origin::Trail { part } => group.on_trail_job(node, part, result),
                }
            }
            Purpose::NoteTrails(trails) => match result {
                Ok(_) => group.on_trails_noted(node, trails),
                Err(error) => group.on_store_error(node, &error),
            },
            Purpose::Compare(id) => group.on_compared(node, id, result),
            Purpose::SnapshotFlush(id) => group.on_own_flush(node, id, result.map(|_| ())),
            Purpose::Snapshot(id) => group.on_own_snapshot(node, id, result.map(|_| ())),
            Purpose::PeerSnapshot { peer, session, sequence, stamp } => {
                let asker = Asker { peer, session, sequence, stamp };
                group.on_peer_snapshot(node, asker, result.map(|_| ()));
            }
            Purpose::Cool { reap } => group.on_cooled(node, reap),
            Purpose::Background => {}
            Purpose::Opening | Purpose::Look | Purpose::ReadKept { .. } | Purpose::DropKept(_) => {
                unreachable!("told apart before")
            }
        }
    }

    fn on_link_up(&mut self, peer: NodeId, session: Session) {
        if self.node.session(peer).is_some() {
            let heard = self.node.link(peer).heard;
            self.on_link_down(peer, heard);
        }
        let now = self.node.now;
        let link = self.node.link(peer);
        link.session = Some(session);
        link.heard = now;
        // The first question follows the announcements, so that the peer knows what it grants.
        link.next_ask = None;
        self.node.greet(peer);
        for (id, group) in &mut self.groups {
            group.on_link_up(&mut self.node, peer);
            if needs_lease(group, &self.node, peer) {
                group.want_lease(&mut self.node, peer);
            }
            self.touched.insert(*id);
        }
    }

    fn on_link_down(&mut self, peer: NodeId, since: Instant) {
        let link = self.node.link(peer);
        link.session = None;
        link.next_ask = None;
        link.lease.forget_asks();
        self.node.save_peers();
        for (id, group) in &mut self.groups {
            group.on_link_down(&mut self.node, peer, since);
            self.touched.insert(*id);
        }
    }

    /// The connection is of no use: it is ended, and everything goes on as if it had ended by itself.
    fn disconnect(&mut self, peer: NodeId, since: Instant, reason: String) {
        if let Some(session) = self.node.session(peer) {
            self.on_link_down(peer, since);
            self.node.out.push_back(Output::Disconnect { peer, session, reason });
        }
    }

    fn on_frame(&mut self, peer: NodeId, session: Session, frame: Frame) {
        if self.node.session(peer) != Some(session) {
            return; // ignore_earlier_session
        }
        if let Err(error) = frame.verify() {
            *self.damaged_frames.entry(peer).or_default() += 1;
            let now = self.node.now;
            return self.disconnect(peer, now, error.to_string());
        }
        let now = self.node.now;
        self.node.link(peer).heard = now;
        let id = match &frame.message {
            Message::LeaseAsk { number } => return self.on_lease_ask(peer, *number),
            Message::LeaseGrant { number, refused } => return self.on_lease_grant(peer, *number, refused),
            Message::Pool { mark, known } => {
                return self.node.on_peer_mark(peer, **mark, known.as_deref().copied());
            }
            Message::Announce { spec } => spec.group,
            Message::Newer { group, .. }
            | Message::Join { group, .. }
            | Message::Write { group, .. }
            | Message::Zero { group, .. }
            | Message::Flush { group, .. }
            | Message::ReadAsk { group, .. }
            | Message::ReadData { group, .. }
            | Message::Compare { group, .. }
            | Message::Differs { group, .. }
            | Message::Cool { group, .. }
            | Message::Heat { group, .. }
            | Message::Current { group, .. }
            | Message::Snapshot { group, .. }
            | Message::Done { group, .. }
            | Message::Held { group, .. }
            | Message::Received { group, .. }
            | Message::TrailReset { group, .. }
            | Message::Trail { group, .. }
            | Message::TrailMark { group, .. }
            | Message::Trailed { group, .. }
            | Message::Refused { group, .. }
            | Message::StoredAsk { group, .. }
            | Message::Stored { group, .. }
            | Message::Verify { group, .. }
            | Message::Verified { group, .. } => *group,
        };
        // ignore_unknown_group: only an order makes a group known, so that a deleted one does not come back by a peer.
        let Some(group) = self.groups.get_mut(&id) else { return };
        self.touched.insert(id);
        let is_record = matches!(frame.message, Message::Announce { .. });
        group.on_frame(&mut self.node, peer, session, frame);
        if is_record {
            self.index_volumes(id);
        }
    }

    fn index_volumes(&mut self, id: GroupId) {
        let volumes = self.groups.get(&id).map(Group::ordered_volumes).unwrap_or_default();
        self.volumes.extend(volumes.into_iter().map(|(volume, _)| (volume, id)));
    }

    /// W5: a peer that is primary of something asks for the right to serve.
    fn on_lease_ask(&mut self, peer: NodeId, number: u64) {
        let now = self.node.now;
        self.node.link(peer).lease.promise(now);
        let refused = self
            .groups
            .values()
            .filter(|group| group.claims.contains(&peer) && group.known_primary() != Some(peer))
            .map(|group| group.id)
            .collect();
        self.node.tell_mark(peer);
        self.node.send_bare(peer, Message::LeaseGrant { number, refused });
    }

    fn on_lease_grant(&mut self, peer: NodeId, number: u64, refused: &[GroupId]) {
        let now = self.node.now;
        let link = self.node.link(peer);
        link.lease.on_grant(number);
        let begins = !link.lease_held && link.lease.holds(now);
        link.lease_held = link.lease.holds(now);
        for id in refused {
            if let Some(group) = self.groups.get_mut(id) {
                group.on_lease_refused(&mut self.node, peer);
                self.touched.insert(*id);
            }
        }
        if begins {
            self.touched.extend(self.groups.keys().copied());
        }
    }

    fn on_order(&mut self, order: Order) {
        match order {
            Order::Group(spec) => {
                let id = spec.group;
                if self.forgotten.contains(&id) {
                    return; // ignore_deleted: ids are never used twice
                }
                let group = self.groups.entry(id).or_insert_with(|| Group::new(id, None, self.node.boot));
                if let Some(loser) = self.discards.remove(&id) {
                    group.discard = Some(loser);
                }
                group.on_record(&mut self.node, spec, true);
                self.touched.insert(id);
                self.index_volumes(id);
            }
            Order::Names { group: id, names } => {
                if let Some(group) = self.groups.get_mut(&id) {
                    group.names = Some(names);
                    if group.acting().is_some() && group.verdict != Verdict::Absent {
                        group.put_names(&mut self.node);
                    }
                }
            }
            Order::Forget { group: id } => {
                self.forgotten.insert(id);
                // Of one that was deleted while this node was away nothing is known but what lies here.
                let known = self.groups.remove(&id);
                let mut group = known.unwrap_or_else(|| Group::new(id, None, self.node.boot));
                let keys = group.keys();
                group.forget(&mut self.node);
                self.forget_keys(keys);
                self.touched.remove(id);
                self.unreported.remove(id);
                self.full.remove(&id);
                self.wakes.remove(&id);
                self.volumes.retain(|_, group| *group != id);
            }
            Order::VolumeKey { key, secret } => {
                self.node.keys.add(key, &secret);
                let has_it = |group: &&Group| group.keys().contains(&key);
                self.touched.extend(self.groups.values().filter(has_it).map(|group| group.id));
            }
            Order::Fenced { node: fenced } => {
                self.node.link(fenced).lease.on_fenced();
                for (id, group) in &mut self.groups {
                    if let Some(primary) = &mut group.primary
                        && primary.wait_old.is_some_and(|(old, _)| old == fenced)
                    {
                        primary.wait_old = None;
                    }
                    self.touched.insert(*id);
                }
            }
            Order::Discard { group: id, loser } => match self.groups.get_mut(&id) {
                Some(group) => {
                    group.on_discard(&mut self.node, loser);
                    self.touched.insert(id);
                }
                None => {
                    self.discards.insert(id, loser);
                }
            },
            Order::Scrub { group: id, scrub } => {
                if let Some(group) = self.groups.get_mut(&id) {
                    group.on_scrub_order(scrub);
                    self.touched.insert(id);
                }
            }
            Order::Compare { id, group, one, two, from } => match self.groups.get_mut(&group) {
                Some(found) => found.on_compare_order(&mut self.node, id, (one, two), from),
                None => {
                    let result = Err("this node has no replica of it".into());
                    self.node.report(Report::Compared { id, result });
                }
            },
            Order::DropKept { id, volume } => self.on_drop_kept(id, volume),
            Order::Verify { id } => self.on_verify_order(id),
            Order::ReportAll => {
                if let Some(reason) = self.node.pool_failed.clone() {
                    self.node.report(Report::PoolFailed { reason });
                }
                self.space.forget();
                let stored = self.node.store.volumes().map(|(_, group, _)| group);
                let groups = self.groups.keys().copied().chain(stored).collect();
                self.node.report(Report::Holds { groups });
                for (id, group) in &mut self.groups {
                    group.report_again(&mut self.node);
                    self.touched.insert(*id);
                }
            }
            // For the shell: who listens where, and with which keys; and what a path stands for.
            Order::Peers { .. } | Order::LinkKey { .. } | Order::Exports { .. } | Order::Disk { .. } => {}
        }
    }

    /// Keys of a group that is gone: those that no other has (a clone has its source's) are wiped.
    fn forget_keys(&mut self, keys: BTreeSet<KeyId>) {
        let still: BTreeSet<KeyId> = self.groups.values().flat_map(Group::keys).collect();
        keys.difference(&still).for_each(|key| self.node.keys.forget(*key));
    }

    fn on_request(&mut self, request: Request) {
        if Kept::in_volume(request.volume).is_some() {
            return self.on_kept_request(request);
        }
        let group = self.volumes.get(&request.volume).and_then(|id| self.groups.get_mut(id));
        match group {
            Some(group) => {
                self.touched.insert(group.id);
                group.on_request(&mut self.node, request);
            }
            None => self.node.out.push_back(Output::Reply(request.id, Reply::Failed(BlockError::NoVolume))),
        }
    }

    /// What is due by now.
    fn on_time(&mut self) {
        if !self.is_open {
            return;
        }
        let now = self.node.now;
        let peers: Vec<NodeId> = self.node.links.keys().copied().collect();
        for peer in peers {
            let link = self.node.link(peer);
            if link.lease_held && !link.lease.holds(now) {
                link.lease_held = false;
                self.touched.extend(self.groups.keys().copied());
            }
            let link = self.node.link(peer);
            if link.session.is_none() || link.next_ask.is_none() {
                continue;
            }
            let heard = link.heard;
            if now >= heard + REPLICA_LOST {
                let reason = format!("nothing was heard for {} ms", REPLICA_LOST.as_millis());
                self.disconnect(peer, heard, reason);
            } else if link.next_ask.is_some_and(|at| at <= now) {
                self.ask_lease(peer);
            }
        }
        self.step_verifying();
        let due: Vec<GroupId> = self.wakes.iter().filter(|(_, wake)| **wake <= now).map(|(group, _)| *group).collect();
        for id in due {
            if let Some(group) = self.groups.get_mut(&id) {
                group.on_time(&mut self.node);
                self.touched.insert(id);
            }
        }
    }

    fn ask_lease(&mut self, peer: NodeId) {
        let needed = self.groups.values().any(|group| needs_lease(group, &self.node, peer));
        let now = self.node.now;
        let link = self.node.link(peer);
        if !needed {
            link.next_ask = None;
            return;
        }
        link.next_ask = Some(now + LEASE_RENEW);
        let number = link.lease.ask(now);
        self.node.tell_mark(peer);
        self.node.send_bare(peer, Message::LeaseAsk { number });
    }

    /// Ends a call: what the input made possible begins, until nothing more follows.
    fn settle(&mut self) {
        loop {
            if self.node.pool_failed.is_some() && !self.pool_failure_told && self.is_open {
                self.pool_failure_told = true;
                for (id, group) in &mut self.groups {
                    group.on_pool_failed(&mut self.node);
                    self.touched.insert(*id);
                }
            }
            while let Some((id, peer)) = self.node.pace.next_turn(self.node.now) {
                if let Some(group) = self.groups.get_mut(&id) {
                    group.on_turn(&mut self.node, peer);
                    self.touched.insert(id);
                }
            }
            while let Some(id) = self.node.pace.next_scrub(self.node.now) {
                if let Some(group) = self.groups.get_mut(&id) {
                    group.on_scrub_turn(&mut self.node);
                    self.touched.insert(id);
                }
            }
            for id in self.touched.take() {
                let Some(group) = self.groups.get_mut(&id) else { continue };
                if group.primary.is_some() {
                    group.step_snapshot(&mut self.node);
                    group.pump(&mut self.node);
                    group.pump_scrub(&mut self.node);
                    // That it serves is said before the first answer.
                    if !group.is_said_to_serve() {
                        group.report_changes(&mut self.node);
                    }
                }
                if group.waits_for_space() {
                    self.full.insert(id)
                } else {
                    self.full.remove(&id)
                };
                self.unreported.insert(id);
            }
            if !self.full.is_empty() {
                self.groups.values_mut().for_each(|group| group.drop_kept(&mut self.node));
            }
            self.drain_store();
            if !self.is_settled() {
                continue;
            }
            // Once, behind all that has happened: what is said to people costs more than a write does.
            for id in self.unreported.take() {
                let Some(group) = self.groups.get_mut(&id) else { continue };
                if group.primary.is_some() {
                    group.report_members(&mut self.node);
                }
                group.report_changes(&mut self.node);
                match group.wake(&self.node) {
                    Some(wake) => self.wakes.insert(id, wake),
                    None => self.wakes.remove(&id),
                };
            }
            self.drain_store();
            if self.is_settled() {
                if self.is_open {
                    self.refresh_kept();
                }
                self.report_space();
                return self.report_changes();
            }
        }
    }

    fn is_settled(&self) -> bool {
        self.touched.is_empty() && (self.node.pool_failed.is_none() || self.pool_failure_told)
    }
}

impl DataPlane {
    /// Tells how the pool is doing, if that has changed.
    fn report_space(&mut self) {
        let (now, free, is_full) = (self.node.now, self.node.store.free().0, !self.full.is_empty());
        let seen = Seen {
            is_full,
            is_failed: self.node.pool_failed.is_some(),
            disks: self.node.store.state_word(),
            free,
            errors: self.node.store.errors(),
            kept: self.shelf.revision,
        };
        if !self.is_open || !self.space.is_news(now, seen) {
            return;
        }
        let present = PoolReport {
            size_bytes: self.node.store.capacity().0,
            free_bytes: free,
            promised_bytes: self.node.store.volumes().map(|(_, _, size)| size.0).sum(),
            growth_bytes_per_s: 0,
            is_full,
            healed_blocks: self.groups.values().map(|group| group.healed).sum(),
            failed: self.node.pool_failed.clone(),
            disks: self.node.store.disks(),
            kept: self.shelf.reports(),
        };
        let report = self.space.report(now, seen, present);
        self.node.report(report);
    }
}

/// Whether the group's primary is here and may need the peer's lease.
fn needs_lease(group: &Group, node: &Node, peer: NodeId) -> bool {
    let Some(primary) = &group.primary else { return false };
    let confirming =
        primary.members.get(&peer).is_some_and(|member| matches!(member.state, MemberState::Confirming { .. }));
    confirming || group.required(node.me).contains(&peer)
}
