//! Connections to the other nodes: one per pair of nodes and address, dialled by the node with the lower id.
//!
//! They are the paths of the links (`pollux_replica::links`), which decides what goes over which. What does not begin
//! with a right hello, or is not protected as this node's configuration says, is closed, with a line in the log.

use crate::Turn;
use crate::connection::{Connection, Phase};
use crate::dialer::Dialer;
use crate::door::Door;
use crate::keyring::Keyring;
use crate::random;
use crate::sealed::{self, SealError};
use crate::ticket::Ticket;
use pollux_base::config::{Encryption, NodeConfig, PathUse};
use pollux_base::order::{PathReport, PathState};
use pollux_base::{ClusterId, Instant, NodeId, Report, Secret, Session};
use pollux_host::link::{Socket, outgoing};
use pollux_host::reactor::{Op, Sending};
use pollux_replica::links::{self, Input, Links, Output, PathId, Use};
use pollux_replica::wire::{self, Decoder, Frame, HELLO_BYTES, Hello, KEYS_MAX, KeyId, WireError};
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tracing::{debug, info, warn};

/// An address that does not answer within this is tried again later. Within one storage or management network an answer
/// takes well under a millisecond.
const CONNECT_TIME: Duration = Duration::from_millis(250);
/// Who has dialled sends its hello at once.
const HELLO_TIME: Duration = Duration::from_secs(1);
/// So does who was dialled, unless it has just been started: then when it has opened its pool.
const ANSWER_TIME: Duration = Duration::from_secs(3);
/// A connection whose bytes stay unacknowledged this long is dead. The links have passed it over before, if there is
/// another; one that is alone must be made anew before `timing::REPLICA_LOST`.
const DEAD_AFTER: Duration = Duration::from_millis(400);
/// Most that waits on one connection. The links keep no more for a peer than this; only what is sent again comes on top.
const QUEUE_BYTES_MAX: usize = 512 << 20;
/// How long after a new key has come connections are renewed with it: the peer's `noded` hands it over at the same moment.
const KEY_SPREADS: Duration = Duration::from_secs(2);
/// How long until the same is tried again with a peer that did not have the key after all.
const RENEW_AGAIN: Duration = Duration::from_secs(60);
/// Accepted connections of which it is not known yet who they are; further ones wait in the listen queue.
const STRANGERS_MAX: usize = 64;

/// Why a connection ends, and whether that is worth a warning.
enum Why {
    Lost(String),
    Fault(LinkError),
    /// The links have said so.
    Closed(String),
}

/// One address of a peer that is dialled from here.
struct Dial {
    dialer: Dialer,
    /// Connections: the one that counts, and the one that is being made.
    up: Option<u64>,
    attempt: Option<u64>,
    /// When the one that counts is to be replaced by one with a fresh key.
    renew_at: Option<Instant>,
}

pub struct Peers {
    cluster: ClusterId,
    own: NodeId,
    is_encrypted: bool,
    keyring: Keyring,
    doors: Vec<Door>,
    links: Links,
    /// None towards nodes with a lower id: those dial.
    dials: BTreeMap<NodeId, Vec<Dial>>,
    /// By id, which is also that of the path.
    connections: BTreeMap<u64, Connection>,
    last_id: u64,
    touched: Vec<u64>,
    /// Why there is no path, by peer and rank.
    missing: BTreeMap<(NodeId, u8), PathState>,
    reported: Option<Report>,
    /// The report may look different.
    is_changed: bool,
}

impl Peers {
    /// Until an order says otherwise, peers are where the configuration says.
    pub fn new(config: &NodeConfig, listeners: Vec<Socket>, now: Instant) -> Peers {
        let usage = match config.replication_paths {
            PathUse::Failover => Use::Best,
            PathUse::Spread => Use::Spread,
        };
        let own = config.own().map(|own| own.replication.as_slice()).unwrap_or_default();
        let doors = listeners.into_iter().zip(own).map(|(socket, address)| Door::new(socket, address.to_string()));
        let mut peers = Peers {
            cluster: config.cluster,
            own: config.node,
            is_encrypted: config.replication_encryption == Encryption::On,
            keyring: Keyring::default(),
            doors: doors.collect(),
            links: Links::new(config.node, usage, now),
            dials: BTreeMap::new(),
            connections: BTreeMap::new(),
            last_id: 0,
            touched: Vec::new(),
            missing: BTreeMap::new(),
            reported: None,
            is_changed: true,
        };
        for node in config.peers() {
            peers.set_dials(node.node, &node.replication, now);
        }
        if !peers.is_encrypted {
            warn!("replication is not encrypted: whoever reaches its network can read and change every disk");
        }
        peers
    }

    /// Addresses that stay keep their connections.
    fn set_dials(&mut self, node: NodeId, addresses: &[SocketAddr], now: Instant) {
        let dials = self.dials.entry(node).or_default();
        if node < self.own || dials.iter().map(|dial| dial.dialer.address).eq(addresses.iter().copied()) {
            return;
        }
        let mut before = std::mem::take(dials);
        for address in addresses {
            let known = before.iter().position(|dial| dial.dialer.address == *address);
            let fresh = || Dial { dialer: Dialer::new(*address, now), up: None, attempt: None, renew_at: None };
            dials.push(known.map_or_else(fresh, |index| before.swap_remove(index)));
        }
        self.is_changed = true;
    }

    /// The complete list of peers, by order.
    pub fn set_addresses(&mut self, turn: &mut Turn<'_>, addresses: &BTreeMap<NodeId, Vec<String>>) {
        let gone: Vec<NodeId> = self.dials.keys().filter(|node| !addresses.contains_key(node)).copied().collect();
        for node in gone {
            info!(%node, "this peer is not one any more");
            self.dials.remove(&node);
            self.keyring.forget(node);
            self.end_all(turn, |connection| connection.peer == Some(node));
        }
        let own = self.own;
        for (node, texts) in addresses.iter().filter(|(node, _)| **node != own) {
            let parsed = texts.iter().filter_map(|text| match text.parse() {
                Ok(address) => Some(address),
                Err(_) => {
                    warn!(%node, text, "not an address; it is not dialled");
                    None
                }
            });
            let parsed: Vec<SocketAddr> = parsed.collect();
            self.set_dials(*node, &parsed, turn.now);
            let given_up = |connection: &Connection| {
                let is_listed = parsed.iter().any(|address| address.to_string() == connection.address);
                connection.is_dialled && connection.peer == Some(*node) && !is_listed
            };
            self.end_all(turn, given_up);
        }
        self.is_changed = true;
    }

    /// A key that this node shares with a peer, by order.
    pub fn set_key(&mut self, now: Instant, peer: NodeId, key: KeyId, secret: Secret) {
        if !self.dials.contains_key(&peer) || !self.keyring.add(peer, key, secret, now) {
            return;
        }
        info!(%peer, key = format!("{key:016x}"), "a new key for connections with this peer");
        let connections = &self.connections;
        for dial in self.dials.get_mut(&peer).into_iter().flatten() {
            dial.dialer.hurry(now);
            let present = dial.up.and_then(|id| connections.get(&id)).map(|connection| connection.key);
            if present.is_some_and(|present| present != key) {
                dial.renew_at = Some(now + KEY_SPREADS);
            }
        }
        self.is_changed = true;
    }

    pub fn on_accepted(&mut self, turn: &mut Turn<'_>, listener: u64, result: io::Result<Socket>) {
        let door = &mut self.doors[listener as usize];
        let Some(socket) = door.on_accepted(turn.now, result) else { return };
        let address = door.name.clone();
        match tuned(&socket) {
            Ok(()) => {
                let rank = u8::try_from(listener).unwrap_or(u8::MAX);
                let (phase, deadline) = (Phase::Greeting { bytes: Vec::new() }, turn.now + HELLO_TIME);
                self.insert(Connection::new(socket, phase, None, address, rank, deadline));
            }
            Err(cause) => debug!(%cause, "a connection was gone before it was accepted"),
        }
    }

    pub fn on_connected(&mut self, turn: &mut Turn<'_>, id: u64, result: io::Result<()>) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if let Err(cause) = result.and_then(|()| tuned(&connection.socket)) {
            self.end(turn, id, Why::Lost(cause.to_string()));
            return;
        }
        connection.phase = Phase::Greeting { bytes: Vec::new() };
        connection.deadline = Some(turn.now + ANSWER_TIME);
        if let Some(peer) = connection.peer {
            let offered = self.keyring.offer(peer, turn.now);
            self.greet(id, offered);
        }
    }

    pub fn on_received(&mut self, turn: &mut Turn<'_>, id: u64, mut buffer: Vec<u8>, result: io::Result<usize>) {
        let why = match result {
            Ok(0) => Some(Why::Lost("the peer has ended the connection".to_owned())),
            Err(cause) => Some(Why::Lost(cause.to_string())),
            Ok(len) => self.take(turn, id, &mut buffer[..len]).err().map(Why::Fault),
        };
        match why {
            Some(why) => self.end(turn, id, why),
            None => {
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.buffer = Some(buffer);
                    self.touched.push(id);
                }
            }
        }
        self.drain(turn);
    }

    pub fn on_sent(&mut self, turn: &mut Turn<'_>, id: u64, result: io::Result<()>) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.is_sending = false;
        self.touched.push(id);
        if let Err(cause) = result {
            self.end(turn, id, Why::Lost(cause.to_string()));
            self.drain(turn);
        }
    }

    /// Sends on the session if it is still the peer's.
    pub fn send(&mut self, turn: &mut Turn<'_>, peer: NodeId, session: Session, frame: Frame) {
        self.links.handle(turn.now, Input::Send { peer, session, frame });
        self.drain(turn);
    }

    /// The core has no use for the session any more.
    pub fn disconnect(&mut self, turn: &mut Turn<'_>, peer: NodeId, session: Session, reason: String) {
        warn!(%peer, reason, "a link is ended");
        self.links.handle(turn.now, Input::Disconnect { peer, session });
        self.drain(turn);
    }

    /// Everything is to be reported anew.
    pub fn report_again(&mut self) {
        self.reported = None;
        self.is_changed = true;
    }

    /// How the paths are, if that has changed since it was last told.
    pub fn take_report(&mut self, now: Instant) -> Option<Report> {
        if !std::mem::take(&mut self.is_changed) {
            return None;
        }
        let mut paths = Vec::new();
        for (peer, dials) in &self.dials {
            let dialled = dials.iter().map(|dial| dial.dialer.address.to_string());
            let listening = self.doors.iter().map(|door| door.name.clone());
            let addresses: Vec<String> = if *peer < self.own { listening.collect() } else { dialled.collect() };
            for (rank, address) in (0..=u8::MAX).zip(addresses) {
                paths.push(PathReport { peer: *peer, address, state: self.state(*peer, rank, now) });
            }
        }
        let report = Report::Paths { is_encrypted: self.is_encrypted, paths };
        (self.reported.as_ref() != Some(&report)).then(|| self.reported.insert(report).clone())
    }

    fn state(&self, peer: NodeId, rank: u8, now: Instant) -> PathState {
        let here = self.connections.iter().filter(|(_, found)| found.peer == Some(peer) && found.rank == rank);
        let states: Vec<links::PathState> = here.filter_map(|(id, _)| self.links.state(PathId(*id))).collect();
        if states.contains(&links::PathState::Good) {
            return PathState::Up;
        }
        if states.contains(&links::PathState::Silent) {
            return PathState::Silent;
        }
        let known = self.missing.get(&(peer, rank));
        match known {
            Some(PathState::Refused { .. }) => {}
            _ if self.lacks_key(peer, now) => {
                return PathState::Down {
                    reason: "there is no key yet: `noded` must run on both nodes and reach the other".to_owned(),
                };
            }
            _ => {}
        }
        known.cloned().unwrap_or_else(|| PathState::Down { reason: "it is not connected yet".to_owned() })
    }

    fn lacks_key(&self, peer: NodeId, now: Instant) -> bool {
        self.is_encrypted && self.keyring.offer(peer, now) == [0; KEYS_MAX]
    }

    /// When `on_time` is to be called at the latest.
    pub fn deadline(&self, now: Instant) -> Option<Instant> {
        let dials = self.dials.iter().filter(|(peer, _)| !self.lacks_key(**peer, now)).flat_map(|(_, dials)| dials);
        let dials = dials.flat_map(|dial| dial.dialer.deadline().into_iter().chain(dial.renew_at));
        let doors = self.doors.iter().filter_map(Door::deadline);
        let connections = self.connections.values().filter_map(|connection| connection.deadline);
        connections.chain(dials).chain(doors).chain(self.links.deadline()).min()
    }

    pub fn on_time(&mut self, turn: &mut Turn<'_>) {
        let now = turn.now;
        let is_due = |connection: &Connection| connection.deadline.is_some_and(|deadline| deadline <= now);
        let due: Vec<u64> =
            self.connections.iter().filter(|(_, connection)| is_due(connection)).map(|(id, _)| *id).collect();
        for id in due {
            self.end(turn, id, Why::Lost("no answer".to_owned()));
        }
        if self.links.deadline().is_some_and(|deadline| deadline <= now) {
            self.links.handle(now, Input::Tick);
        }
        self.drain(turn);
        let lacking: Vec<NodeId> = self.dials.keys().filter(|peer| self.lacks_key(**peer, now)).copied().collect();
        let mut due = Vec::new();
        for (node, dials) in self.dials.iter_mut().filter(|(node, _)| !lacking.contains(node)) {
            for (rank, dial) in dials.iter_mut().enumerate() {
                let is_renewal = dial.renew_at.is_some_and(|at| at <= now);
                if is_renewal {
                    dial.renew_at = None;
                }
                if dial.dialer.dial(now) || is_renewal && dial.dialer.renew() {
                    due.push((*node, rank));
                }
            }
        }
        for (node, rank) in due {
            self.dial(turn, node, rank);
        }
    }

    /// Hands to the reactor what is to be sent, and receives.
    pub fn flush(&mut self, turn: &mut Turn<'_>) {
        let mut touched = std::mem::take(&mut self.touched);
        for id in touched.drain(..) {
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            if !connection.is_sending && connection.has_something_to_send() {
                let token = Ticket::LinkSend(id).token();
                let segments = connection.take_queue().map_err(|cause| Why::Fault(cause.into()));
                let mut send = |segments| turn.reactor.send(token, &connection.socket, segments);
                match segments.and_then(|segments| send(segments).map_err(|cause| Why::Lost(cause.to_string()))) {
                    Ok(sending) => connection.is_sending = sending == Sending::UnderWay,
                    Err(why) => {
                        self.end(turn, id, why);
                        self.drain(turn);
                        continue;
                    }
                }
                if connection.is_dialled && connection.is_worn() {
                    let dial = self.dials.values_mut().flatten().find(|dial| dial.up == Some(id));
                    if let Some(dial) = dial {
                        dial.renew_at.get_or_insert(turn.now);
                    }
                }
            }
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            if !matches!(connection.phase, Phase::Connecting)
                && let Some(buffer) = connection.buffer.take()
            {
                turn.reactor.submit(Ticket::LinkReceive(id).token(), Op::Receive(connection.socket.clone(), buffer));
            }
        }
        self.touched.append(&mut touched);
        let strangers = self.connections.values().filter(|connection| connection.is_stranger()).count();
        for (index, door) in self.doors.iter_mut().enumerate() {
            door.accept(turn, Ticket::LinkAccept(index as u64), strangers < STRANGERS_MAX);
        }
    }

    fn dial(&mut self, turn: &mut Turn<'_>, node: NodeId, rank: usize) {
        let Some(address) = self.dials.get(&node).and_then(|dials| dials.get(rank)).map(|dial| dial.dialer.address)
        else {
            return;
        };
        let result = outgoing(address).map(|socket| {
            let (rank, deadline) = (u8::try_from(rank).unwrap_or(u8::MAX), turn.now + CONNECT_TIME);
            let phase = Phase::Connecting;
            let connection = Connection::new(socket.clone(), phase, Some(node), address.to_string(), rank, deadline);
            let id = self.insert(connection);
            turn.reactor.submit(Ticket::LinkConnect(id).token(), Op::Connect(socket, address));
            id
        });
        let Some(dial) = self.dials.get_mut(&node).and_then(|dials| dials.get_mut(rank)) else { return };
        match result {
            Ok(id) => dial.attempt = Some(id),
            Err(cause) => {
                warn!(%node, %address, %cause, "no socket to dial a peer with");
                dial.dialer.on_failed(turn.now);
            }
        }
    }

    fn insert(&mut self, connection: Connection) -> u64 {
        self.last_id += 1;
        self.connections.insert(self.last_id, connection);
        self.touched.push(self.last_id);
        self.last_id
    }

    fn hello(&self, keys: [KeyId; KEYS_MAX]) -> Hello {
        Hello {
            cluster: self.cluster,
            node: self.own,
            is_protected: self.is_encrypted,
            keys: if self.is_encrypted { keys } else { [0; KEYS_MAX] },
            nonce: random(),
            version_min: wire::WIRE_VERSION,
            version_max: wire::WIRE_VERSION,
        }
    }

    fn greet(&mut self, id: u64, keys: [KeyId; KEYS_MAX]) -> Option<[u8; HELLO_BYTES]> {
        let hello = self.hello(keys);
        let connection = self.connections.get_mut(&id)?;
        self.touched.push(id);
        Some(connection.greet(&hello))
    }

    /// Bytes of a connection.
    fn take(&mut self, turn: &mut Turn<'_>, id: u64, bytes: &mut [u8]) -> Result<(), LinkError> {
        let Some(connection) = self.connections.get_mut(&id) else { return Ok(()) };
        let bytes = match &connection.phase {
            Phase::Up { .. } => bytes,
            Phase::Refused => return Ok(()),
            Phase::Connecting | Phase::Greeting { .. } => match connection.take_hello(bytes)? {
                Some((hello, raw, taken)) => {
                    self.on_hello(turn, id, &hello, &raw)?;
                    &mut bytes[taken..]
                }
                None => return Ok(()),
            },
        };
        let Some(Connection { phase: Phase::Up { decoder, opener }, .. }) = self.connections.get_mut(&id) else {
            return Ok(());
        };
        // What came before damage counts, and then the damage.
        let opened = match opener {
            Some(opener) => opener.push(bytes, |plain| decoder.push(plain)),
            None => {
                decoder.push(bytes);
                Ok(())
            }
        };
        let path = PathId(id);
        while let Some(carried) = decoder.next_frame()? {
            self.links.handle(turn.now, Input::Arrived { path, carried });
        }
        if decoder.is_amid_blocks() {
            self.links.handle(turn.now, Input::Heard { path });
        }
        Ok(opened?)
    }

    /// The peer says who it is.
    fn on_hello(
        &mut self,
        turn: &mut Turn<'_>,
        id: u64,
        theirs: &Hello,
        raw: &[u8; HELLO_BYTES],
    ) -> Result<(), LinkError> {
        let Some(connection) = self.connections.get_mut(&id) else { return Ok(()) };
        let (is_dialled, expected, rank) = (connection.is_dialled, connection.peer, connection.rank);
        let node = theirs.node;
        wire::agree(&self.hello([0; KEYS_MAX]), theirs)?;
        if !self.dials.contains_key(&node) {
            return Err(LinkError::Stranger(node));
        }
        if is_dialled && expected != Some(node) {
            return Err(LinkError::OtherNode { expected, found: node });
        }
        if !is_dialled && node > self.own {
            return Err(LinkError::NotItsTurn(node));
        }
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.peer = Some(node);
        }
        if theirs.is_protected != self.is_encrypted {
            return self.refuse(id, LinkError::Protection { is_encrypted: self.is_encrypted });
        }
        let offered = if is_dialled { &theirs.keys[..1] } else { &theirs.keys[..] };
        let chosen = match self.keyring.choose(node, offered, turn.now) {
            Some((key, secret)) => Some((key, secret.clone())),
            None if self.is_encrypted => return self.refuse(id, LinkError::NoKey),
            None => None,
        };
        let key = chosen.as_ref().map_or(0, |(key, _)| *key);
        let own = match self.connections.get(&id).and_then(|connection| connection.own_hello) {
            Some(own) => Some(own),
            None => self.greet(id, [key, 0]),
        };
        let (Some(own), Some(connection)) = (own, self.connections.get_mut(&id)) else { return Ok(()) };
        let (sealer, opener) = chosen
            .map(|(_, secret)| match is_dialled {
                true => sealed::keys(&secret, &own, raw, true),
                false => sealed::keys(&secret, raw, &own, false),
            })
            .unzip();
        connection.key = key;
        connection.sealer = sealer;
        connection.deadline = None;
        connection.phase = Phase::Up { decoder: Box::new(Decoder::new()), opener: opener.map(Box::new) };
        let is_newest = !self.is_encrypted || self.keyring.newest(node) == Some(key);
        let dials = self.dials.get_mut(&node).into_iter().flatten();
        if let Some(dial) = dials.into_iter().find(|dial| dial.attempt == Some(id)) {
            (dial.attempt, dial.up) = (None, Some(id));
            dial.dialer.on_up(turn.now);
            dial.renew_at = (!is_newest).then_some(turn.now + RENEW_AGAIN);
        }
        let random = u64::from_le_bytes(random());
        self.links.handle(turn.now, Input::PathUp { path: PathId(id), peer: node, rank, random });
        Ok(())
    }

    /// Goes no further with a connection. Who dialled hears enough to know why, and ends it.
    fn refuse(&mut self, id: u64, cause: LinkError) -> Result<(), LinkError> {
        if self.connections.get(&id).is_none_or(|connection| connection.is_dialled) {
            return Err(cause);
        }
        self.greet(id, [0; KEYS_MAX]);
        if let Some(mut connection) = self.connections.remove(&id) {
            connection.phase = Phase::Refused;
            self.tell_end(&connection, &Why::Fault(cause));
            self.connections.insert(id, connection);
        }
        self.is_changed = true;
        Ok(())
    }

    /// Carries out what the links want.
    fn drain(&mut self, turn: &mut Turn<'_>) {
        while let Some(output) = self.links.poll() {
            match output {
                Output::Plane(input) => turn.inputs.push(input),
                Output::Send { path, number } => {
                    let Some((place, frame)) = self.links.frame(path, number) else { continue };
                    let Some(connection) = self.connections.get_mut(&path.0) else { continue };
                    connection.push_frame(place, frame);
                    if connection.queue_bytes > QUEUE_BYTES_MAX {
                        self.end(turn, path.0, Why::Lost("the peer does not read".to_owned()));
                    } else {
                        self.touched.push(path.0);
                    }
                }
                Output::Word { path, received, word } => {
                    if let Some(connection) = self.connections.get_mut(&path.0) {
                        connection.push_word(received, &word);
                        self.touched.push(path.0);
                    }
                }
                Output::Close { path, reason } => self.end(turn, path.0, Why::Closed(reason)),
                Output::Changed { path, state } => {
                    self.is_changed = true;
                    let Some(connection) = self.connections.get(&path.0) else { continue };
                    let (peer, address) = (connection.peer.map(|peer| peer.0), &connection.address);
                    match state {
                        links::PathState::Good => info!(peer, address, "a path is of use"),
                        links::PathState::Joining | links::PathState::Silent => {
                            warn!(peer, address, "a path does not answer; what was under way goes over another");
                        }
                    }
                }
            }
        }
    }

    fn end_all(&mut self, turn: &mut Turn<'_>, which: impl Fn(&Connection) -> bool) {
        let ids: Vec<u64> =
            self.connections.iter().filter(|(_, connection)| which(connection)).map(|(id, _)| *id).collect();
        for id in ids {
            self.end(turn, id, Why::Lost("its address is given up".to_owned()));
        }
        self.drain(turn);
    }

    fn end(&mut self, turn: &mut Turn<'_>, id: u64, why: Why) {
        let Some(connection) = self.connections.remove(&id) else { return };
        turn.reactor.close(&connection.socket);
        let is_up = connection.is_up();
        for dial in self.dials.values_mut().flatten() {
            if dial.attempt == Some(id) {
                dial.attempt = None;
                dial.dialer.on_failed(turn.now);
            } else if dial.up == Some(id) {
                dial.up = None;
                dial.dialer.on_down(turn.now);
            }
        }
        self.tell_end(&connection, &why);
        if is_up && !matches!(why, Why::Closed(_)) {
            self.links.handle(turn.now, Input::PathDown { path: PathId(id) });
        }
        self.is_changed = true;
    }

    /// Notes why a path is missing, and logs it: the same reason again and again only once.
    fn tell_end(&mut self, connection: &Connection, why: &Why) {
        let (peer, address, is_up) = (connection.peer.map(|peer| peer.0), &connection.address, connection.is_up());
        let state = match why {
            Why::Lost(reason) | Why::Closed(reason) => PathState::Down { reason: reason.clone() },
            Why::Fault(cause) => PathState::Refused { reason: cause.to_string() },
        };
        let is_news = match connection.peer {
            // Known by name only; whoever says so may be anybody, and may say so often.
            Some(peer) => match (self.missing.insert((peer, connection.rank), state.clone()), &state) {
                (Some(before @ PathState::Refused { .. }), PathState::Down { .. }) if !is_up => {
                    // Still what a human must mend.
                    self.missing.insert((peer, connection.rank), before);
                    false
                }
                (before, _) => before.as_ref() != Some(&state),
            },
            None => true,
        };
        match why {
            Why::Lost(cause) if is_up => info!(peer, address, cause, "a path is lost"),
            // Said by the core when it matters; a peer that is down is dialled for hours.
            Why::Lost(cause) => debug!(peer, address, cause, "no path"),
            Why::Fault(cause) if is_news => warn!(peer, address, %cause, "a connection is refused"),
            Why::Fault(cause) => debug!(peer, address, %cause, "a connection is refused"),
            Why::Closed(cause) => info!(peer, address, cause, "a path is closed"),
        }
    }
}

/// Why a connection is not begun or not gone on with.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Seal(#[from] SealError),
    #[error("{0} is no peer of this node")]
    Stranger(NodeId),
    #[error("{found} answered where {expected:?} should be")]
    OtherNode { expected: Option<NodeId>, found: NodeId },
    #[error("{0} has the higher id and is dialled from here")]
    NotItsTurn(NodeId),
    #[error(
        "{}; set `replication_encryption` alike in the configuration of both nodes and restart `blockd`",
        if *is_encrypted { "the peer does not encrypt, this node does" } else { "the peer encrypts, this node does not" }
    )]
    Protection { is_encrypted: bool },
    #[error("the peer has none of this node's keys: its `noded` or this node's has not handed the newest over yet")]
    NoKey,
}

fn tuned(socket: &Socket) -> io::Result<()> {
    socket.set_nodelay()?;
    socket.set_dead_after(DEAD_AFTER)
}
