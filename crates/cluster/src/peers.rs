//! Who is heard: by the guards (life and death), and on the control connection (words only).
//!
//! Only a view of the guard makes a peer count as silent, never the passing of time in this process: a `noded` that was
//! slow must not take its own pause for the death of its peer. A lost control connection is an alert and no more
//! (regression 64).

use crate::core::Cluster;
use crate::seam::{PeerHello, Setup};
use pollux_base::guard::GuardView;
use pollux_base::timing::PEER_DOWN;
use pollux_base::{Instant, NodeId};
use std::collections::BTreeMap;
use std::time::Duration;

/// A hello is sent each second; an older one says nothing about the present.
pub(crate) const HELLO_FRESH: Duration = Duration::from_secs(3);

#[derive(Default)]
pub(crate) struct Peers {
    pub each: BTreeMap<NodeId, Peer>,
    /// Since when the guard has been telling us whom it hears.
    pub listening_since: Option<Instant>,
}

#[derive(Default)]
pub(crate) struct Peer {
    /// Heard in both directions, by the newest view.
    pub is_up: bool,
    /// Since when it has been down: silent for `PEER_DOWN`, or heard but not hearing us for as long (verdict 8).
    pub down_since: Option<Instant>,
    /// Since when it has been heard without hearing us: for a moment that is so whenever two guards meet.
    deaf_since: Option<Instant>,
    /// When it was last heard, even if it does not hear us.
    pub heard: Option<Instant>,
    pub hello: Option<(Instant, PeerHello)>,
    /// The control connection is up.
    pub is_connected: bool,
    /// Since when the peer has been naming a newer epoch than our record.
    pub ahead_since: Option<Instant>,
    /// Since when the peer, a voter of our log, has been saying that it has none.
    pub joins_since: Option<Instant>,
}

impl Peers {
    pub fn new(setup: &Setup) -> Peers {
        let others = setup.nodes.keys().filter(|node| **node != setup.node);
        Peers { each: others.map(|node| (*node, Peer::default())).collect(), listening_since: None }
    }

    pub fn on_hello(&mut self, now: Instant, hello: PeerHello) {
        if let Some(peer) = self.each.get_mut(&hello.node) {
            peer.is_connected = true;
            peer.hello = Some((now, hello));
        }
    }

    pub fn on_gone(&mut self, node: NodeId) {
        if let Some(peer) = self.each.get_mut(&node) {
            peer.is_connected = false;
            peer.hello = None;
        }
    }

    /// Without a guard nobody is heard, but nobody is silent either.
    pub fn forget_hearing(&mut self) {
        self.listening_since = None;
        for peer in self.each.values_mut() {
            peer.is_up = false;
            peer.down_since = None;
            peer.deaf_since = None;
        }
    }
}

impl Peer {
    /// What the peer says of itself, if it said so a moment ago.
    pub fn fresh_hello(&self, now: Instant) -> Option<&PeerHello> {
        self.hello.as_ref().filter(|(at, _)| now.since(*at) < HELLO_FRESH).map(|(_, hello)| hello)
    }
}

impl Cluster {
    pub(crate) fn on_guard(&mut self, now: Instant, view: GuardView) {
        self.peers.listening_since.get_or_insert(now);
        for seen in &view.peers {
            let Some(peer) = self.peers.each.get_mut(&seen.node) else {
                continue;
            };
            let heard = seen.heard_ms.map(|ms| now - Duration::from_millis(ms));
            peer.heard = peer.heard.max(heard);
            let is_silent = heard.is_none_or(|heard| now.since(heard) >= PEER_DOWN);
            peer.is_up = !is_silent && !seen.networks.is_empty();
            let is_deaf = !is_silent && !peer.is_up;
            peer.deaf_since = is_deaf.then(|| peer.deaf_since.unwrap_or(now));
            let is_deaf_for_long = peer.deaf_since.is_some_and(|since| now.since(since) >= PEER_DOWN);
            let is_down = is_silent || is_deaf_for_long;
            peer.down_since = is_down.then(|| peer.down_since.unwrap_or(now));
        }
        self.guard = Some(view);
    }

    /// The one other node of a cluster of two.
    pub(crate) fn partner(&self) -> Option<NodeId> {
        match self.setup.nodes.len() {
            2 => self.peers.each.keys().next().copied(),
            _ => None,
        }
    }

    pub(crate) fn is_up(&self, node: NodeId) -> bool {
        self.peers.each.get(&node).is_some_and(|peer| peer.is_up)
    }

    pub(crate) fn hello_of(&self, now: Instant, node: NodeId) -> Option<&PeerHello> {
        self.peers.each.get(&node).and_then(|peer| peer.fresh_hello(now))
    }
}
