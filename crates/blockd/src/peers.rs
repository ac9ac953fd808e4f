//! Links to the other nodes: one connection per pair of nodes, dialled by the node with the lower id.
//!
//! A link counts from when a `Hello` has come and gone both ways. What does not begin with a right one is closed, with a
//! line in the log. The core holds what arrives against its checksums (W11), and ends a link that brings damage.

use crate::Turn;
use crate::dialer::Dialer;
use crate::door::Door;
use crate::ticket::Ticket;
use pollux_base::config::NodeConfig;
use pollux_base::{ClusterId, Instant, NodeId, Segment, Session};
use pollux_host::link::{Socket, outgoing};
use pollux_host::reactor::Op;
use pollux_replica::Input;
use pollux_replica::wire::{self, Decoder, Frame, HELLO_BYTES, Hello, WireError};
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tracing::{debug, info, warn};

/// An address that does not answer within this is passed over. Within one storage or management network an answer takes
/// well under a millisecond; the other address must still be reached before `timing::REPLICA_LOST`.
const CONNECT_TIME: Duration = Duration::from_millis(250);
/// A peer that is alive sends its hello at once.
const HELLO_TIME: Duration = Duration::from_secs(1);
/// A link whose bytes stay unacknowledged this long is dead. A primary asks for its lease every `LEASE_RENEW` at least,
/// so a cut network is noticed, and the other one tried, just before `REPLICA_LOST`.
const DEAD_AFTER: Duration = Duration::from_millis(400);
/// Most that waits for one peer. The bytes are shared with the requests that they belong to, whose number is bounded at
/// the front ends, so this bound is only reached by a peer that does not read at all.
const QUEUE_BYTES_MAX: usize = 256 << 20;
/// One receive: large enough that 1 MiB frames take few turns.
const RECEIVE_BYTES: usize = 512 << 10;
/// Accepted connections that have not said their hello yet; further ones wait in the listen queue.
const STRANGERS_MAX: usize = 64;

struct Link {
    socket: Socket,
    phase: Phase,
    address: String,
    /// Known from the start when dialled, else from its hello.
    peer: Option<NodeId>,
    is_dialled: bool,
    session: Session,
    /// When to give up connecting or waiting for the hello.
    deadline: Option<Instant>,
    queue: Vec<Segment>,
    queue_bytes: usize,
    sending: bool,
    /// Here while no receive is under way.
    buffer: Option<Vec<u8>>,
}

enum Phase {
    Connecting,
    Greeting { bytes: Vec<u8> },
    Up { decoder: Box<Decoder> },
}

struct Peer {
    /// Only towards nodes with a higher id.
    dialer: Option<Dialer>,
    /// The link that counts.
    link: Option<u64>,
}

/// Why a link ends, and whether that is worth a warning.
enum Why {
    Lost(String),
    Fault(String),
    Replaced,
}

pub struct Peers {
    cluster: ClusterId,
    own: NodeId,
    doors: Vec<Door>,
    peers: BTreeMap<NodeId, Peer>,
    links: BTreeMap<u64, Link>,
    last_id: u64,
    last_session: Session,
    touched: Vec<u64>,
}

impl Peers {
    /// Until an order says otherwise, peers are where the configuration says.
    pub fn new(config: &NodeConfig, listeners: Vec<Socket>, now: Instant) -> Peers {
        let mut peers = Peers {
            cluster: config.cluster,
            own: config.node,
            doors: listeners.into_iter().map(|socket| Door::new(socket, "replication".to_owned())).collect(),
            peers: BTreeMap::new(),
            links: BTreeMap::new(),
            last_id: 0,
            last_session: Session(0),
            touched: Vec::new(),
        };
        for node in config.peers() {
            peers.add(node.node, node.replication.clone(), now);
        }
        peers
    }

    fn add(&mut self, node: NodeId, addresses: Vec<SocketAddr>, now: Instant) {
        let dialer = (node > self.own).then(|| Dialer::new(addresses, now));
        self.peers.insert(node, Peer { dialer, link: None });
    }

    /// The complete list of peers, by order.
    pub fn set_addresses(&mut self, turn: &mut Turn<'_>, addresses: &BTreeMap<NodeId, Vec<String>>) {
        let gone: Vec<NodeId> = self.peers.keys().filter(|node| !addresses.contains_key(node)).copied().collect();
        for node in gone {
            info!(%node, "this peer is not one any more");
            let links: Vec<u64> =
                self.links.iter().filter(|(_, link)| link.peer == Some(node)).map(|(id, _)| *id).collect();
            for id in links {
                self.end(turn, id, Why::Replaced);
            }
            self.peers.remove(&node);
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
            let parsed = parsed.collect();
            match self.peers.get_mut(node) {
                Some(Peer { dialer: Some(dialer), .. }) => dialer.set_addresses(parsed, turn.now),
                Some(Peer { dialer: None, .. }) => {}
                None => self.add(*node, parsed, turn.now),
            }
        }
    }

    pub fn on_accepted(&mut self, turn: &mut Turn<'_>, listener: u64, result: io::Result<Socket>) {
        let Some(socket) = self.doors[listener as usize].on_accepted(turn.now, result) else { return };
        match tuned(&socket) {
            Ok(()) => {
                self.insert(turn, socket, Phase::Greeting { bytes: Vec::new() }, None, "accepted".to_owned());
            }
            Err(cause) => debug!(%cause, "a connection was gone before it was accepted"),
        }
    }

    pub fn on_connected(&mut self, turn: &mut Turn<'_>, id: u64, result: io::Result<()>) {
        let Some(link) = self.links.get_mut(&id) else { return };
        if let Err(cause) = result.and_then(|()| tuned(&link.socket)) {
            self.end(turn, id, Why::Lost(cause.to_string()));
            return;
        }
        link.phase = Phase::Greeting { bytes: Vec::new() };
        link.deadline = Some(turn.now + HELLO_TIME);
        self.greet(id);
    }

    pub fn on_received(&mut self, turn: &mut Turn<'_>, id: u64, buffer: Vec<u8>, result: io::Result<usize>) {
        let Some(link) = self.links.get_mut(&id) else { return };
        let why = match result {
            Ok(0) => Some(Why::Lost("the peer has ended the connection".to_owned())),
            Err(cause) => Some(Why::Lost(cause.to_string())),
            Ok(len) => {
                let taken = match &mut link.phase {
                    Phase::Up { decoder } => {
                        decoder.push(&buffer[..len]);
                        self.take_frames(turn, id)
                    }
                    _ => self.on_greeting(turn, id, &buffer[..len]),
                };
                taken.err().map(|cause| Why::Fault(cause.to_string()))
            }
        };
        match why {
            Some(why) => self.end(turn, id, why),
            None => {
                if let Some(link) = self.links.get_mut(&id) {
                    link.buffer = Some(buffer);
                    self.touched.push(id);
                }
            }
        }
    }

    pub fn on_sent(&mut self, turn: &mut Turn<'_>, id: u64, result: io::Result<()>) {
        let Some(link) = self.links.get_mut(&id) else { return };
        link.sending = false;
        self.touched.push(id);
        if let Err(cause) = result {
            self.end(turn, id, Why::Lost(cause.to_string()));
        }
    }

    /// Sends on the session if it is still the peer's.
    pub fn send(&mut self, turn: &mut Turn<'_>, peer: NodeId, session: Session, frame: &Frame) {
        let Some((id, link)) = self.current(peer, session) else { return };
        link.queue_bytes += wire::encode_onto(frame, &mut link.queue);
        if link.queue_bytes > QUEUE_BYTES_MAX {
            self.end(turn, id, Why::Lost("the peer does not read".to_owned()));
        } else {
            self.touched.push(id);
        }
    }

    /// The core has no use for the session any more.
    pub fn disconnect(&mut self, turn: &mut Turn<'_>, peer: NodeId, session: Session, reason: String) {
        if let Some((id, _)) = self.current(peer, session) {
            self.end(turn, id, Why::Fault(reason));
        }
    }

    /// When `on_time` is to be called at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        let dialers = self.peers.values().filter_map(|peer| peer.dialer.as_ref()?.deadline());
        let doors = self.doors.iter().filter_map(Door::deadline);
        self.links.values().filter_map(|link| link.deadline).chain(dialers).chain(doors).min()
    }

    pub fn on_time(&mut self, turn: &mut Turn<'_>) {
        let is_due = |link: &Link| link.deadline.is_some_and(|deadline| deadline <= turn.now);
        let due: Vec<u64> = self.links.iter().filter(|(_, link)| is_due(link)).map(|(id, _)| *id).collect();
        for id in due {
            self.end(turn, id, Why::Lost("no answer".to_owned()));
        }
        let now = turn.now;
        let dial = |(node, peer): (&NodeId, &mut Peer)| Some((*node, peer.dialer.as_mut()?.dial(now)?));
        let dials: Vec<(NodeId, SocketAddr)> = self.peers.iter_mut().filter_map(dial).collect();
        for (node, address) in dials {
            self.dial(turn, node, address);
        }
    }

    /// Hands to the reactor what is to be sent, and receives.
    pub fn flush(&mut self, turn: &mut Turn<'_>) {
        let mut touched = std::mem::take(&mut self.touched);
        for id in touched.drain(..) {
            let Some(link) = self.links.get_mut(&id) else { continue };
            if !link.sending && !link.queue.is_empty() {
                link.sending = true;
                link.queue_bytes = 0;
                let op = Op::Send(link.socket.clone(), std::mem::take(&mut link.queue));
                turn.reactor.submit(Ticket::LinkSend(id).token(), op);
            }
            if !matches!(link.phase, Phase::Connecting)
                && let Some(buffer) = link.buffer.take()
            {
                turn.reactor.submit(Ticket::LinkReceive(id).token(), Op::Receive(link.socket.clone(), buffer));
            }
        }
        self.touched = touched;
        let strangers = self.links.values().filter(|link| link.peer.is_none()).count();
        for (index, door) in self.doors.iter_mut().enumerate() {
            door.accept(turn, Ticket::LinkAccept(index as u64), strangers < STRANGERS_MAX);
        }
    }

    fn current(&mut self, peer: NodeId, session: Session) -> Option<(u64, &mut Link)> {
        let id = self.peers.get(&peer)?.link?;
        let link = self.links.get_mut(&id)?;
        (link.session == session).then_some((id, link))
    }

    fn dial(&mut self, turn: &mut Turn<'_>, node: NodeId, address: SocketAddr) {
        match outgoing(address) {
            Ok(socket) => {
                let id = self.insert(turn, socket.clone(), Phase::Connecting, Some(node), address.to_string());
                turn.reactor.submit(Ticket::LinkConnect(id).token(), Op::Connect(socket, address));
            }
            Err(cause) => {
                warn!(%node, %address, %cause, "no socket to dial a peer with");
                if let Some(dialer) = self.peers.get_mut(&node).and_then(|peer| peer.dialer.as_mut()) {
                    dialer.on_failed(turn.now);
                }
            }
        }
    }

    fn insert(
        &mut self,
        turn: &mut Turn<'_>,
        socket: Socket,
        phase: Phase,
        peer: Option<NodeId>,
        address: String,
    ) -> u64 {
        self.last_id += 1;
        // Grows with every connection, and over restarts of the daemon too: the clock goes on.
        self.last_session = Session(turn.now.0.max(self.last_session.0 + 1));
        let patience = if matches!(phase, Phase::Connecting) { CONNECT_TIME } else { HELLO_TIME };
        let link = Link {
            socket,
            phase,
            address,
            peer,
            is_dialled: peer.is_some(),
            session: self.last_session,
            deadline: Some(turn.now + patience),
            queue: Vec::new(),
            queue_bytes: 0,
            sending: false,
            buffer: Some(vec![0; RECEIVE_BYTES]),
        };
        self.links.insert(self.last_id, link);
        self.touched.push(self.last_id);
        self.last_id
    }

    fn hello(&self, session: Session) -> Hello {
        Hello {
            cluster: self.cluster,
            node: self.own,
            session,
            version_min: wire::WIRE_VERSION,
            version_max: wire::WIRE_VERSION,
        }
    }

    fn greet(&mut self, id: u64) {
        let Some(session) = self.links.get(&id).map(|link| link.session) else { return };
        let bytes = wire::encode_hello(&self.hello(session)).to_vec();
        if let Some(link) = self.links.get_mut(&id) {
            link.queue.push(Segment::Bytes(bytes));
            self.touched.push(id);
        }
    }

    /// Bytes of a link on which no whole hello has come yet.
    fn on_greeting(&mut self, turn: &mut Turn<'_>, id: u64, bytes: &[u8]) -> Result<(), HelloError> {
        let Some(link) = self.links.get_mut(&id) else { return Ok(()) };
        let Phase::Greeting { bytes: hello } = &mut link.phase else { return Ok(()) };
        let (here, after) = bytes.split_at(bytes.len().min(HELLO_BYTES - hello.len()));
        hello.extend_from_slice(here);
        let Ok(whole) = <&[u8; HELLO_BYTES]>::try_from(hello.as_slice()) else { return Ok(()) };
        let theirs = wire::decode_hello(whole)?;
        let (is_dialled, session, expected) = (link.is_dialled, link.session, link.peer);
        wire::agree(&self.hello(session), &theirs)?;
        let node = theirs.node;
        let Some(peer) = self.peers.get(&node) else { return Err(HelloError::Stranger(node)) };
        if is_dialled && expected != Some(node) {
            return Err(HelloError::OtherNode { expected, found: node });
        }
        if !is_dialled && node > self.own {
            return Err(HelloError::NotItsTurn(node));
        }
        let earlier = peer.link;
        if !is_dialled {
            self.greet(id);
        }
        if let Some(earlier) = earlier {
            // A link that took longer to greet than a later one is of no use.
            if self.links.get(&earlier).is_some_and(|earlier| earlier.session > session) {
                return Err(HelloError::Overtaken);
            }
            self.end(turn, earlier, Why::Replaced);
        }
        let Some(link) = self.links.get_mut(&id) else { return Ok(()) };
        let mut decoder = Box::new(Decoder::new());
        decoder.push(after);
        link.peer = Some(node);
        link.deadline = None;
        link.phase = Phase::Up { decoder };
        info!(peer = %node, address = link.address, %session, "linked");
        if let Some(peer) = self.peers.get_mut(&node) {
            peer.link = Some(id);
            if let Some(dialer) = &mut peer.dialer {
                dialer.on_up(turn.now);
            }
        }
        turn.inputs.push(Input::LinkUp { peer: node, session });
        self.take_frames(turn, id)
    }

    fn take_frames(&mut self, turn: &mut Turn<'_>, id: u64) -> Result<(), HelloError> {
        let Some(Link { phase: Phase::Up { decoder }, peer: Some(peer), session, .. }) = self.links.get_mut(&id) else {
            return Ok(());
        };
        while let Some(frame) = decoder.next_frame()? {
            turn.inputs.push(Input::Frame { peer: *peer, session: *session, frame });
        }
        Ok(())
    }

    fn end(&mut self, turn: &mut Turn<'_>, id: u64, why: Why) {
        let Some(link) = self.links.remove(&id) else { return };
        turn.reactor.close(&link.socket);
        let is_up = matches!(link.phase, Phase::Up { .. });
        let (peer, address) = (link.peer.map(|peer| peer.0), link.address);
        match &why {
            Why::Lost(cause) if is_up => info!(peer, address, cause, "a link is lost"),
            // Said by the core when it matters; a peer that is down is dialled for hours.
            Why::Lost(cause) => debug!(peer, address, cause, "no link"),
            Why::Fault(cause) => warn!(peer, address, cause, "a link is ended"),
            Why::Replaced => info!(peer, address, "a link gives way to a newer one"),
        }
        let Some(node) = link.peer else { return };
        if is_up {
            turn.inputs.push(Input::LinkDown { peer: node, session: link.session });
        }
        let Some(peer) = self.peers.get_mut(&node) else { return };
        let was_current = peer.link == Some(id);
        if was_current {
            peer.link = None;
        }
        let Some(dialer) = peer.dialer.as_mut().filter(|_| link.is_dialled) else { return };
        match why {
            // The newer one is what the dialer knows of.
            Why::Replaced => {}
            Why::Lost(_) | Why::Fault(_) if was_current => dialer.on_down(turn.now),
            Why::Lost(_) | Why::Fault(_) => dialer.on_failed(turn.now),
        }
    }
}

/// Why a link is not begun or not gone on with.
#[derive(Debug, thiserror::Error)]
enum HelloError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("{0} is no peer of this node")]
    Stranger(NodeId),
    #[error("{found} answered where {expected:?} should be")]
    OtherNode { expected: Option<NodeId>, found: NodeId },
    #[error("{0} has the higher id and is dialled from here")]
    NotItsTurn(NodeId),
    #[error("a later link was faster")]
    Overtaken,
}

fn tuned(socket: &Socket) -> io::Result<()> {
    socket.set_nodelay()?;
    socket.set_dead_after(DEAD_AFTER)
}
