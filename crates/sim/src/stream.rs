//! Connections between data planes, one per pair and network: what is sent arrives whole, once and in order, or the
//! connection ends. A cut holds back what is under way; the power of one end going off leaves the other end to notice by
//! itself. They are the paths of `pollux_replica::links`.

use crate::net::NETWORKS;
use crate::node::{Input, Process};
use crate::time::Time;
use crate::world::{Event, World};
use pollux_base::NodeId;
use pollux_base::guard::Network;
use pollux_replica::links::{Input as Links, PathId};
use pollux_replica::wire::{Carried, What};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// How often a data plane without a connection tries to make one.
const RECONNECT: Duration = Duration::from_millis(100);
/// A connection is given up when what was sent is not acknowledged for so long (TCP_USER_TIMEOUT of `blockd`).
const UNACKNOWLEDGED: Duration = Duration::from_millis(400);

#[derive(Clone, Debug)]
pub enum Item {
    Up,
    Carried(Box<Carried>),
    /// The other end closed it.
    End,
}

struct Stream {
    network: Network,
    /// Ends that are open, and the run of the process that holds it.
    ends: BTreeMap<NodeId, u64>,
    pair: [NodeId; 2],
    /// Per receiver: what is under way, when the last of it arrives, how much should have arrived but for a cut, and
    /// since when nothing gets through.
    wire: BTreeMap<NodeId, VecDeque<Item>>,
    last: BTreeMap<NodeId, Time>,
    overdue: BTreeMap<NodeId, usize>,
    stuck: BTreeMap<NodeId, Time>,
}

impl Stream {
    fn other(&self, node: NodeId) -> NodeId {
        if self.pair[0] == node { self.pair[1] } else { self.pair[0] }
    }
}

#[derive(Default)]
pub struct Streams {
    streams: BTreeMap<u64, Stream>,
}

impl Streams {
    /// The node's ends are gone without a word.
    pub fn power_cut(&mut self, node: NodeId) {
        for stream in self.streams.values_mut() {
            stream.ends.remove(&node);
        }
        self.streams.retain(|_, stream| !stream.ends.is_empty());
    }
    fn ended_by(&self, node: NodeId) -> Vec<u64> {
        self.streams.iter().filter(|(_, stream)| stream.ends.contains_key(&node)).map(|(session, _)| *session).collect()
    }
}

impl World {
    /// Sends on the path, if this end of it is still open.
    pub fn send(&mut self, from: NodeId, path: PathId, carried: Carried) {
        let Some(stream) = self.streams.streams.get(&path.0) else { return };
        if stream.ends.contains_key(&from) {
            let to = stream.other(from);
            self.send_item(path.0, to, Item::Carried(Box::new(carried)));
        }
    }

    fn send_item(&mut self, session: u64, to: NodeId, item: Item) {
        let at = self.now + self.net.some_delay(&mut self.luck);
        let Some(stream) = self.streams.streams.get_mut(&session) else { return };
        let last = stream.last.entry(to).or_default();
        let at = at.max(*last + Duration::from_nanos(1));
        *last = at;
        stream.wire.entry(to).or_default().push_back(item);
        self.at(at.since(self.now), Event::Stream { session, to });
    }

    /// The next item that is under way to this end is due.
    pub fn on_stream(&mut self, session: u64, to: NodeId) {
        let now = self.now;
        let Some(stream) = self.streams.streams.get_mut(&session) else { return };
        let from = stream.other(to);
        if !self.net.delivers(stream.network, from, to) {
            *stream.overdue.entry(to).or_default() += 1;
            stream.stuck.entry(to).or_insert(now);
            return;
        }
        let Some(item) = stream.wire.get_mut(&to).and_then(VecDeque::pop_front) else { return };
        if !self.net.delivers(stream.network, to, from) {
            // It arrives, but the sender never hears so.
            stream.stuck.entry(to).or_insert(now);
        }
        if !self.nodes[&to].on {
            stream.stuck.entry(to).or_insert(now);
            return;
        }
        let Some(life) = stream.ends.get(&to).copied() else {
            // Nobody holds this end any more: the kernel there says so.
            if !matches!(item, Item::End) && stream.ends.contains_key(&from) {
                self.send_item(session, from, Item::End);
            }
            return;
        };
        let (path, network) = (PathId(session), stream.network);
        let input = match item {
            Item::Up => {
                let rank = network.0;
                Links::PathUp { path, peer: from, rank, random: self.luck.draw() }
            }
            Item::Carried(mut carried) => {
                if let What::Frame(frame) = &mut carried.what {
                    if let Some(sabotage) = self.settings.sabotage {
                        sabotage.alter(frame);
                    }
                    self.trace.line(now, || format!("{from} -> {to} {path:?} {:?}", frame.message));
                }
                Links::Arrived { path, carried: *carried }
            }
            Item::End => {
                stream.ends.remove(&to);
                Links::PathDown { path }
            }
        };
        self.give(to, Process::Blockd, life, Input::Links(input));
        self.streams.streams.retain(|_, stream| !stream.ends.is_empty());
    }

    /// What cuts held back goes on its way, where they are mended.
    pub fn release_streams(&mut self) {
        let sessions: Vec<u64> = self.streams.streams.keys().copied().collect();
        for session in sessions {
            for index in 0..2 {
                let stream = self.streams.streams.get_mut(&session).expect("only events remove streams");
                let (to, from) = (stream.pair[index], stream.pair[1 - index]);
                if self.net.both_ways(stream.network, from, to) {
                    stream.stuck.remove(&to);
                }
                if self.net.delivers(stream.network, from, to) {
                    for _ in 0..stream.overdue.remove(&to).unwrap_or(0) {
                        let after = self.net.some_delay(&mut self.luck);
                        self.at(after, Event::Stream { session, to });
                    }
                }
            }
        }
    }

    /// This end is closed; the other end is told.
    pub fn close(&mut self, node: NodeId, path: PathId) {
        let Some(stream) = self.streams.streams.get_mut(&path.0) else { return };
        if stream.ends.remove(&node).is_some() {
            let other = stream.other(node);
            self.send_item(path.0, other, Item::End);
        }
    }

    /// The node's data plane is gone, its kernel is not.
    pub fn close_streams(&mut self, node: NodeId) {
        for session in self.streams.ended_by(node) {
            self.close(node, PathId(session));
        }
    }

    /// Connects data planes that are not connected, and gives up what is stuck.
    pub fn connect(&mut self) {
        self.at(RECONNECT, Event::Connect);
        let now = self.now;
        let mut given_up = Vec::new();
        for (session, stream) in &self.streams.streams {
            for (to, since) in &stream.stuck {
                let from = stream.other(*to);
                if now.since(*since) > UNACKNOWLEDGED
                    && let Some(life) = stream.ends.get(&from)
                {
                    given_up.push((*session, from, *life));
                }
            }
        }
        for (session, node, life) in given_up {
            if let Some(stream) = self.streams.streams.get_mut(&session) {
                stream.ends.remove(&node);
                self.give(node, Process::Blockd, life, Input::Links(Links::PathDown { path: PathId(session) }));
            }
        }
        self.streams.streams.retain(|_, stream| !stream.ends.is_empty());
        let ids = self.ids();
        for (index, a) in ids.iter().enumerate() {
            for b in &ids[index + 1..] {
                self.connect_pair(*a, *b);
            }
        }
    }

    /// Whether the data planes of both are connected.
    pub fn is_linked(&self, a: NodeId, b: NodeId) -> bool {
        NETWORKS.iter().any(|network| self.is_linked_on(*network, a, b))
    }

    fn is_linked_on(&self, network: Network, a: NodeId, b: NodeId) -> bool {
        let holds =
            |stream: &Stream| stream.network == network && stream.ends.contains_key(&a) && stream.ends.contains_key(&b);
        self.streams.streams.values().any(holds)
    }

    fn connect_pair(&mut self, a: NodeId, b: NodeId) {
        let active = |node: &NodeId| self.nodes[node].is_active(Process::Blockd);
        if !active(&a) || !active(&b) {
            return;
        }
        for network in NETWORKS {
            if !self.is_linked_on(network, a, b) && self.net.both_ways(network, a, b) {
                self.connect_on(network, a, b);
            }
        }
    }

    /// An end of an earlier connection that does not know yet that the other is gone stays as it is.
    fn connect_on(&mut self, network: Network, a: NodeId, b: NodeId) {
        let session = self.number();
        let life = |node: &NodeId| self.nodes[node].life(Process::Blockd).expect("active, as just seen");
        let stream = Stream {
            network,
            ends: [(a, life(&a)), (b, life(&b))].into(),
            pair: [a, b],
            wire: BTreeMap::new(),
            last: BTreeMap::new(),
            overdue: BTreeMap::new(),
            stuck: BTreeMap::new(),
        };
        self.streams.streams.insert(session, stream);
        self.trace.line(self.now, || format!("{a} and {b} connect as s{session} on {network:?}"));
        self.send_item(session, a, Item::Up);
        self.send_item(session, b, Item::Up);
    }
}
