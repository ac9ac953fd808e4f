//! CORE: the links to the other nodes. One channel per peer, carried by as many paths (connections) as there are.
//!
//! * The data plane sees a session per channel: frames arrive once, in the order in which they were sent. A path may die
//!   under it; what was in flight goes over another path, and nothing is done twice.
//! * A path counts only if both directions work (verdict 8): it is joined by a word each way, and trusted as long as what
//!   is sent on it is answered.
//! * A channel ends when it has had no path for `LINGER`, when either side's data plane gives it up, or when either
//!   process ends. Then what was under way is settled between the data planes, as after any loss.
//!
//! The node with the lower id dials, names channels, and looks after idle paths.

mod channel;
mod path;

use crate::wire::{Carried, Frame, Place, What, Word};
use channel::{Arrival, Channel, bytes_of, is_quiet};
use path::{Path, Trust};
use pollux_base::{Instant, NodeId, Session};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// Silence of a path that owes an answer before it is suspected. An answer takes well under a millisecond; a busy machine
/// may take tens. A peer that stands still answers on no path, so a wrong suspicion costs a few words.
const SUSPECT_AFTER: Duration = Duration::from_millis(150);
/// How much later than another path a suspected one may answer. Both are read in the same turn by a peer that just woke.
const RIVAL_LEAD: Duration = Duration::from_millis(10);
/// A path that stays suspect for so long is closed and dialled anew. The kernel may have given up before.
const PATH_DEAD: Duration = Duration::from_millis(1000);
/// A path that was mended is not wanted again before it has held for so long: one that flaps is not followed.
const SETTLED_AFTER: Duration = Duration::from_secs(2);
/// What has been received is said at the latest after this, if no frame says it sooner.
const ACK_AFTER: Duration = Duration::from_millis(20);
/// An idle path is looked after so often. A spare one that fails unnoticed is known within this and `PATH_DEAD`.
const PING_EVERY: Duration = Duration::from_secs(2);
/// A new path is joined within this: one word each way.
const JOIN_TIME: Duration = Duration::from_secs(1);
/// A path whose place a newer one has taken carries nothing new; what was in flight has arrived after this, or goes again.
const RETIRE_AFTER: Duration = Duration::from_millis(500);
/// How long a channel may be without any path. A connection is made anew in a few milliseconds; a peer whose process died
/// refuses it, and its loss must be known well before `timing::REPLICA_LOST`.
const LINGER: Duration = Duration::from_millis(100);
/// An answer that came so much too late was kept from us by our own sleep, not by the path.
const OVERSLEPT: Duration = Duration::from_millis(100);
/// Most that waits for one peer's word that it has arrived. The blocks are shared with the requests that they belong to,
/// whose number is bounded at the front ends, so this is only reached by a peer that does not read at all.
const KEPT_BYTES_MAX: usize = 256 << 20;
/// Most that may come before its turn: what the peer may have under way.
const EARLY_BYTES_MAX: usize = KEPT_BYTES_MAX + (8 << 20);
/// Frames from this length on may be spread over all good paths.
const SPREAD_BYTES_MIN: usize = 64 << 10;

/// One connection; never used again for another.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PathId(pub u64);

/// How several good paths are used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Use {
    /// The most wanted one; the others stand by.
    #[default]
    Best,
    /// Large frames go where the least is under way: for cables of the same kind.
    Spread,
}

#[derive(Clone, Debug)]
pub enum Input {
    /// A connection on which both have said who they are, and (if protected) proved it. `rank`: the place of its address.
    /// `random`: never the same twice.
    PathUp {
        path: PathId,
        peer: NodeId,
        rank: u8,
        random: u64,
    },
    PathDown {
        path: PathId,
    },
    Arrived {
        path: PathId,
        carried: Carried,
    },
    /// A part of a long frame has arrived: the peer, which waits for an answer, is to know that the path lives.
    Heard {
        path: PathId,
    },
    /// The data plane sends on a session.
    Send {
        peer: NodeId,
        session: Session,
        frame: Frame,
    },
    /// The data plane has no use for the session any more.
    Disconnect {
        peer: NodeId,
        session: Session,
    },
    /// Time has passed.
    Tick,
}

#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)] // it is handed on at once, and nearly all of them are the large one
pub enum Output {
    /// For the data plane.
    Plane(crate::Input),
    /// The frame of this number is to be sent: `frame` gives it, unless it is not needed any more.
    Send {
        path: PathId,
        number: u64,
    },
    Word {
        path: PathId,
        received: u64,
        word: Word,
    },
    /// The connection is to be ended; nothing more is told of it.
    Close {
        path: PathId,
        reason: String,
    },
    /// A path has been joined, passed over, or is trusted again: reports may look different.
    Changed {
        path: PathId,
        state: PathState,
    },
}

/// A path as people see it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PathState {
    /// Not yet of use.
    Joining,
    Good,
    /// It does not answer; another one is used.
    Silent,
}

#[derive(Default)]
struct Peer {
    channel: Option<Channel>,
    /// The channel before: a late word of it makes no new one.
    ended: Option<u64>,
}

pub struct Links {
    own: NodeId,
    usage: Use,
    now: Instant,
    awake_since: Instant,
    peers: BTreeMap<NodeId, Peer>,
    paths: BTreeMap<PathId, Path>,
    last_session: Session,
    out: VecDeque<Output>,
}

impl Links {
    pub fn new(own: NodeId, usage: Use, now: Instant) -> Links {
        Links {
            own,
            usage,
            now,
            awake_since: now,
            peers: BTreeMap::new(),
            paths: BTreeMap::new(),
            last_session: Session(0),
            out: VecDeque::new(),
        }
    }

    pub fn handle(&mut self, now: Instant, input: Input) {
        if now > self.now + OVERSLEPT && self.deadline().is_some_and(|due| now > due + OVERSLEPT) {
            self.awake_since = now;
        }
        self.now = self.now.max(now);
        match input {
            Input::PathUp { path, peer, rank, random } => {
                self.on_path_up(path, Path::new(peer, rank, random, self.now))
            }
            Input::PathDown { path } => self.on_path_down(path),
            Input::Arrived { path, carried } => self.on_arrived(path, carried),
            Input::Heard { path } => {
                self.on_heard(path);
                if let Some(path) = self.paths.get_mut(&path).filter(|path| path.is_joined) {
                    path.want_ack(now);
                }
            }
            Input::Send { peer, session, frame } => self.on_send(peer, session, frame),
            Input::Disconnect { peer, session } => {
                if self.channel(peer).is_some_and(|channel| channel.is_established && channel.session == session) {
                    self.end_channel(peer, "the data plane has no use for it any more");
                }
            }
            Input::Tick => self.on_time(),
        }
    }

    pub fn poll(&mut self) -> Option<Output> {
        self.out.pop_front()
    }

    /// When `Input::Tick` is to be given at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        let paths = self.paths.values().filter_map(|path| match path.is_joined {
            true => path.deadline(self.own < path.peer, self.awake_since),
            false => Some(path.up_since + JOIN_TIME),
        });
        let alone = self.peers.values().filter_map(|peer| Some(peer.channel.as_ref()?.alone_since? + LINGER));
        paths.chain(alone).min()
    }

    /// A frame that `Output::Send` names, and where it stands; `None` if it has arrived meanwhile, or its channel has ended.
    pub fn frame(&self, path: PathId, number: u64) -> Option<(Place, &Frame)> {
        let channel = self.peers.get(&self.paths.get(&path)?.peer)?.channel.as_ref()?;
        Some((Place { number, received: channel.received() }, channel.kept(number)?))
    }

    pub fn state(&self, path: PathId) -> Option<PathState> {
        self.paths.get(&path).map(state_of)
    }

    /// Bytes that the peer has not confirmed yet.
    pub fn flight_bytes(&self, path: PathId) -> usize {
        self.paths.get(&path).map_or(0, |path| path.flight_bytes)
    }

    /// Asserts the invariants; called by tests and debug builds after every step.
    pub fn check(&self) {
        for (peer, of_peer) in &self.peers {
            if let Some(channel) = &of_peer.channel {
                channel.check();
                let joined = self.paths.values().any(|path| path.peer == *peer && path.is_joined);
                assert_eq!(joined, channel.alone_since.is_none(), "a channel is alone exactly if it has no path");
                assert!(!joined || channel.homeless.is_empty(), "nothing waits while there is a path");
            }
        }
    }

    fn channel(&mut self, peer: NodeId) -> Option<&mut Channel> {
        self.peers.get_mut(&peer)?.channel.as_mut()
    }

    fn on_path_up(&mut self, id: PathId, path: Path) {
        let peer = path.peer;
        self.paths.insert(id, path);
        self.peers.entry(peer).or_default();
        if self.own < peer {
            self.begin(id);
        }
    }

    /// Names the channel that the path is to carry.
    fn begin(&mut self, id: PathId) {
        let now = self.now;
        let Some(path) = self.paths.get_mut(&id) else { return };
        let of_peer = self.peers.entry(path.peer).or_default();
        let channel = match &mut of_peer.channel {
            Some(channel) => channel,
            None => {
                let channel = Channel::new(path.next_channel, next_session(&mut self.last_session, now), now);
                path.next_channel = path.next_channel.wrapping_add(1);
                of_peer.channel.insert(channel)
            }
        };
        let word = Word::Begin { channel: channel.id, fresh: !channel.is_established };
        self.out.push_back(Output::Word { path: id, received: channel.received(), word });
    }

    fn on_path_down(&mut self, id: PathId) {
        let Some(mut path) = self.paths.remove(&id) else { return };
        if path.is_joined {
            self.rehouse(path.peer, path.take_flight());
            self.look_for_loneliness(path.peer);
        }
    }

    /// Sends over another path what was in flight on one.
    fn rehouse(&mut self, peer: NodeId, flight: impl Iterator<Item = u64>) {
        if let Some(channel) = self.channel(peer) {
            let base = channel.base();
            channel.homeless.extend(flight.filter(|number| *number >= base));
            self.send_homeless(peer);
        }
    }

    fn look_for_loneliness(&mut self, peer: NodeId) {
        let now = self.now;
        let joined = self.paths.values().any(|path| path.peer == peer && path.is_joined);
        if let Some(channel) = self.channel(peer) {
            match joined {
                true => channel.alone_since = None,
                false => {
                    channel.alone_since.get_or_insert(now);
                }
            }
        }
    }

    /// Ends a path that is of no use, and goes on as if it had ended by itself.
    fn close(&mut self, id: PathId, reason: impl Into<String>) {
        if self.paths.contains_key(&id) {
            self.out.push_back(Output::Close { path: id, reason: reason.into() });
            self.on_path_down(id);
        }
    }

    /// The channel is over, and so is every path that carries it.
    fn end_channel(&mut self, peer: NodeId, reason: &str) {
        let Some(of_peer) = self.peers.get_mut(&peer) else { return };
        let Some(channel) = of_peer.channel.take() else { return };
        of_peer.ended = Some(channel.id);
        if channel.is_established {
            let session = channel.session;
            self.out.push_back(Output::Plane(crate::Input::LinkDown { peer, session }));
        }
        let joined: Vec<PathId> =
            self.paths.iter().filter(|(_, path)| path.peer == peer && path.is_joined).map(|(id, _)| *id).collect();
        for id in joined {
            self.close(id, reason);
        }
    }

    fn on_arrived(&mut self, id: PathId, carried: Carried) {
        let Some(peer) = self.on_heard(id) else { return };
        let Carried { place, what } = carried;
        match what {
            What::Word(Word::Begin { channel, fresh }) if self.own > peer => {
                self.on_begun(id, peer, channel, fresh, place.received);
            }
            What::Word(Word::Begin { channel, .. }) => self.on_joined(id, peer, channel, place.received),
            What::Word(Word::Unknown { channel }) => self.on_unknown(id, peer, channel),
            _ if !self.paths.get(&id).is_some_and(|path| path.is_joined) => {
                self.close(id, "something was said before the channel was named");
            }
            What::Word(word) => {
                if !self.on_received(id, peer, place.received) {
                    return;
                }
                match word {
                    Word::Ping => self.say(id, Word::Pong),
                    Word::Pong => {
                        if let Some(path) = self.paths.get_mut(&id) {
                            path.on_pong();
                        }
                    }
                    Word::Silent { rank } => self.on_silent(id, peer, rank),
                    Word::Ack | Word::Begin { .. } | Word::Unknown { .. } => {}
                }
            }
            What::Frame(frame) => {
                if self.on_received(id, peer, place.received) {
                    self.on_frame(id, peer, place.number, frame);
                }
            }
        }
    }

    fn on_heard(&mut self, id: PathId) -> Option<NodeId> {
        let now = self.now;
        let path = self.paths.get_mut(&id)?;
        let peer = path.peer;
        let is_mended = path.on_heard(now);
        for (other, rival) in &mut self.paths {
            if rival.peer == peer
                && *other != id
                && let Trust::Suspect { rival: rival @ None, .. } = &mut rival.trust
            {
                *rival = Some(now);
            }
        }
        if is_mended {
            self.tell(id);
        }
        Some(peer)
    }

    fn on_frame(&mut self, id: PathId, peer: NodeId, number: u64, frame: Frame) {
        let now = self.now;
        let quiet = is_quiet(&frame);
        let Some(channel) = self.peers.get_mut(&peer).and_then(|of_peer| of_peer.channel.as_mut()) else { return };
        let session = channel.session;
        let arrival = channel.on_frame(number, frame);
        if let Some(path) = self.paths.get_mut(&id).filter(|_| !quiet) {
            path.want_ack(now);
        }
        match arrival {
            Arrival::InOrder(frame) => {
                self.out.push_back(Output::Plane(crate::Input::Frame { peer, session, frame }));
                while let Some(frame) = channel.take_early() {
                    self.out.push_back(Output::Plane(crate::Input::Frame { peer, session, frame }));
                }
            }
            Arrival::Early | Arrival::Again => {}
            Arrival::TooFar => self.end_channel(peer, "the peer sends without regard to what has arrived"),
        }
    }

    /// The peer has received so much. `false`: it says what can not be.
    fn on_received(&mut self, id: PathId, peer: NodeId, received: u64) -> bool {
        let Some(channel) = self.channel(peer) else { return false };
        let base = channel.base();
        if !channel.on_received(received) {
            self.close(id, "the peer says that more has arrived than was sent");
            return false;
        }
        if channel.base() != base {
            let base = channel.base();
            self.paths.values_mut().filter(|path| path.peer == peer).for_each(|path| path.on_received(base));
        }
        true
    }

    /// The node with the lower id wants this path to carry a channel.
    fn on_begun(&mut self, id: PathId, peer: NodeId, channel: u64, fresh: bool, received: u64) {
        let now = self.now;
        let of_peer = self.peers.entry(peer).or_default();
        let known = of_peer.channel.as_ref().map(|channel| channel.id);
        if known != Some(channel) {
            if !fresh || of_peer.ended == Some(channel) {
                self.out.push_back(Output::Word { path: id, received: 0, word: Word::Unknown { channel } });
                return;
            }
            self.end_channel(peer, "the peer has begun anew");
            let session = next_session(&mut self.last_session, now);
            self.peers.entry(peer).or_default().channel = Some(Channel::new(channel, session, now));
        }
        self.say(id, Word::Begin { channel, fresh: false });
        self.join(id, peer, received);
    }

    /// The peer has agreed to the channel.
    fn on_joined(&mut self, id: PathId, peer: NodeId, channel: u64, received: u64) {
        if self.channel(peer).is_none_or(|known| known.id != channel) {
            // It has ended here since it was named.
            return self.begin(id);
        }
        self.join(id, peer, received);
    }

    fn join(&mut self, id: PathId, peer: NodeId, received: u64) {
        let now = self.now;
        let Some(path) = self.paths.get_mut(&id) else { return };
        if path.is_joined {
            return self.close(id, "the channel was named twice");
        }
        path.is_joined = true;
        let rank = path.rank;
        for (_, older) in self.paths.iter_mut().filter(|(other, path)| **other != id && path.peer == peer) {
            if older.rank == rank {
                older.retire_at.get_or_insert(now + RETIRE_AFTER);
            }
        }
        if !self.on_received(id, peer, received) {
            return;
        }
        let Some(channel) = self.channel(peer) else { return };
        channel.alone_since = None;
        if !channel.is_established {
            channel.is_established = true;
            let session = channel.session;
            self.out.push_back(Output::Plane(crate::Input::LinkUp { peer, session }));
        }
        self.tell(id);
        self.send_homeless(peer);
    }

    /// The peer knows nothing of the channel.
    fn on_unknown(&mut self, id: PathId, peer: NodeId, channel: u64) {
        if self.own > peer || self.paths.get(&id).is_some_and(|path| path.is_joined) {
            return self.close(id, "the peer forgets what it has agreed to");
        }
        if self.channel(peer).is_some_and(|known| known.id == channel) {
            self.end_channel(peer, "the peer has ended it");
        }
        self.begin(id);
    }

    fn on_send(&mut self, peer: NodeId, session: Session, frame: Frame) {
        let Some(channel) = self.channel(peer) else { return };
        if channel.session != session || !channel.is_established {
            return; // ignore_earlier_session
        }
        let (bytes, quiet) = (bytes_of(&frame), is_quiet(&frame));
        match channel.keep(frame) {
            Some(number) => match self.best(peer, bytes) {
                Some(id) => self.put(id, number, bytes, quiet),
                None => {
                    if let Some(channel) = self.channel(peer) {
                        channel.homeless.insert(number);
                    }
                }
            },
            None => self.end_channel(peer, "the peer does not read"),
        }
    }

    /// The path for a frame of this length.
    fn best(&self, peer: NodeId, bytes: usize) -> Option<PathId> {
        let joined = self.paths.iter().filter(|(_, path)| path.peer == peer && path.is_joined);
        let wanted = |(id, path): &(&PathId, &Path)| (path.preference(self.now), std::cmp::Reverse(**id));
        if self.usage == Use::Spread && bytes >= SPREAD_BYTES_MIN {
            let least = |(id, path): &(&PathId, &Path)| {
                let (trust, unsettled, _) = path.preference(self.now);
                (trust, unsettled, path.flight_bytes, std::cmp::Reverse(**id))
            };
            return joined.min_by_key(least).map(|(id, _)| *id);
        }
        joined.min_by_key(wanted).map(|(id, _)| *id)
    }

    fn put(&mut self, id: PathId, number: u64, bytes: usize, quiet: bool) {
        let now = self.now;
        if let Some(path) = self.paths.get_mut(&id) {
            path.on_sent(number, bytes, quiet, now);
            self.out.push_back(Output::Send { path: id, number });
        }
    }

    fn send_homeless(&mut self, peer: NodeId) {
        while let Some(channel) = self.channel(peer)
            && let Some(number) = channel.homeless.first().copied()
        {
            let Some((bytes, quiet)) = channel.kept(number).map(|frame| (bytes_of(frame), is_quiet(frame))) else {
                channel.homeless.pop_first();
                continue;
            };
            let Some(id) = self.best(peer, bytes) else { return };
            if let Some(channel) = self.channel(peer) {
                channel.homeless.pop_first();
            }
            self.put(id, number, bytes, quiet);
        }
    }

    fn say(&mut self, id: PathId, word: Word) {
        let Some(path) = self.paths.get_mut(&id) else { return };
        path.on_spoken();
        let channel = self.peers.get(&path.peer).and_then(|of_peer| of_peer.channel.as_ref());
        let received = channel.map_or(0, Channel::received);
        self.out.push_back(Output::Word { path: id, received, word });
    }

    fn ping(&mut self, id: PathId) {
        let now = self.now;
        if self.paths.get_mut(&id).is_some_and(|path| path.on_pinged(now)) {
            self.say(id, Word::Ping);
        }
    }

    fn tell(&mut self, id: PathId) {
        if let Some(state) = self.state(id) {
            self.out.push_back(Output::Changed { path: id, state });
        }
    }

    fn on_time(&mut self) {
        let (now, awake_since) = (self.now, self.awake_since);
        let ids: Vec<PathId> = self.paths.keys().copied().collect();
        for id in ids {
            self.look_at(id, now, awake_since);
        }
        let alone = |peer: &Peer| {
            peer.channel.as_ref().and_then(|channel| channel.alone_since).is_some_and(|since| since + LINGER <= now)
        };
        let over: Vec<NodeId> = self.peers.iter().filter(|(_, peer)| alone(peer)).map(|(id, _)| *id).collect();
        for peer in over {
            // A channel that is only being named waits for its paths.
            let is_naming = self.paths.values().any(|path| path.peer == peer)
                && self.channel(peer).is_some_and(|channel| !channel.is_established);
            match is_naming {
                true => {
                    if let Some(channel) = self.channel(peer) {
                        channel.alone_since = Some(now);
                    }
                }
                false => self.end_channel(peer, "no path is left"),
            }
        }
    }

    fn look_at(&mut self, id: PathId, now: Instant, awake_since: Instant) {
        let Some(path) = self.paths.get_mut(&id) else { return };
        let peer = path.peer;
        if !path.is_joined {
            if path.up_since + JOIN_TIME <= now {
                self.close(id, "the peer does not name a channel");
            }
            return;
        }
        if path.retire_at.is_some_and(|at| at <= now) {
            return self.close(id, "a newer connection has taken its place");
        }
        if path.is_dead(now, awake_since) {
            return self.close(id, "it does not answer");
        }
        if path.suspicion_is_due(now, awake_since) {
            path.trust = Trust::Suspect { since: now, rival: None };
            let rivals: Vec<PathId> =
                self.paths.iter().filter(|(_, path)| path.peer == peer && path.is_joined).map(|(id, _)| *id).collect();
            for rival in rivals {
                self.ping(rival);
            }
        } else if path.is_outdone(now) && self.pass_over(id) {
            // It may be that the peer still hears us there.
            let rank = self.paths.get(&id).map_or(0, |path| path.rank);
            if let Some(rival) = self.best(peer, 0) {
                self.say(rival, Word::Silent { rank });
            }
        }
        let Some(path) = self.paths.get(&id) else { return };
        if self.own < peer && path.ping_is_due(now) {
            self.ping(id);
        }
        if self.paths.get(&id).is_some_and(|path| path.ack_is_due(now)) {
            self.say(id, Word::Ack);
        }
    }

    /// Another path has answered, this one has not: what is in flight on it goes over the other.
    fn pass_over(&mut self, id: PathId) -> bool {
        let (now, has_rival) = (self.now, self.has_rival(id));
        let Some(path) = self.paths.get_mut(&id) else { return false };
        match &mut path.trust {
            // The other one is gone again.
            Trust::Suspect { rival, .. } if !has_rival => {
                *rival = None;
                false
            }
            Trust::Good { .. } if !has_rival => false,
            Trust::PassedOver { .. } => false,
            _ => {
                path.trust = Trust::PassedOver { since: now };
                let (peer, flight) = (path.peer, path.take_flight());
                self.tell(id);
                self.rehouse(peer, flight);
                true
            }
        }
    }

    /// The peer hears nothing on these paths.
    fn on_silent(&mut self, said_on: PathId, peer: NodeId, rank: u8) {
        let meant =
            |(id, path): &(&PathId, &Path)| **id != said_on && path.peer == peer && path.rank == rank && path.is_joined;
        let meant: Vec<PathId> = self.paths.iter().filter(meant).map(|(id, _)| *id).collect();
        for id in meant {
            self.pass_over(id);
        }
    }

    /// Whether another path would carry the channel.
    fn has_rival(&self, id: PathId) -> bool {
        let Some(path) = self.paths.get(&id) else { return false };
        let peer = path.peer;
        self.paths.iter().any(|(other, path)| {
            *other != id && path.peer == peer && path.is_joined && matches!(path.trust, Trust::Good { .. })
        })
    }
}

fn state_of(path: &Path) -> PathState {
    match path.trust {
        _ if !path.is_joined => PathState::Joining,
        Trust::PassedOver { .. } => PathState::Silent,
        Trust::Good { .. } | Trust::Suspect { .. } => PathState::Good,
    }
}

/// Grows with every channel, and over restarts of the daemon too: the clock goes on.
fn next_session(last: &mut Session, now: Instant) -> Session {
    *last = Session(now.0.max(last.0 + 1));
    *last
}
