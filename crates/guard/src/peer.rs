//! What is known of one peer: when it was heard, and which of our heartbeats it answered, per network.

use pollux_base::guard::{Heartbeat, Network, PeerView};
use pollux_base::timing::PEER_DOWN;
use pollux_base::{Epoch, Instant, NodeId};
use std::collections::{BTreeMap, VecDeque};

/// Our own heartbeats whose sending time is remembered, per peer and network: 64 heartbeats are more than twice a lease, and an
/// answer to an older one could renew nothing.
const SENT_MAX: usize = 64;

#[derive(Default)]
pub struct Peer {
    /// Run of the peer's guard that is listened to.
    pub boot: Option<u64>,
    pub links: BTreeMap<Network, Link>,
    pub heard: Option<Instant>,
    pub epoch: Epoch,
    /// Sending time of our newest heartbeat that the peer answered while it named no newer epoch.
    pub proof: Option<Instant>,
}

/// One network to one peer.
#[derive(Default)]
pub struct Link {
    /// Our heartbeats, oldest first.
    sent: VecDeque<(u64, Instant)>,
    /// Highest number heard from the peer's present run.
    pub newest: Option<u64>,
    /// Sending time of our newest heartbeat that was answered here.
    answered: Option<Instant>,
}

impl Link {
    pub fn on_sent(&mut self, now: Instant, sequence: u64) {
        if self.sent.len() == SENT_MAX {
            self.sent.pop_front();
        }
        self.sent.push_back((sequence, now));
    }

    fn sent_at(&self, sequence: u64) -> Option<Instant> {
        self.sent.iter().find(|(sent, _)| *sent == sequence).map(|(_, at)| *at)
    }
}

impl Peer {
    pub fn new(networks: &[Network]) -> Peer {
        Peer { links: networks.iter().map(|network| (*network, Link::default())).collect(), ..Peer::default() }
    }

    /// `is_newer`: the peer names a newer epoch than ours, so its answer renews nothing.
    pub fn on_heartbeat(
        &mut self,
        now: Instant,
        network: Network,
        own_boot: u64,
        heartbeat: &Heartbeat,
        is_newer: bool,
    ) {
        let is_silent = self.is_silent(now);
        let Some(link) = self.links.get_mut(&network) else {
            return;
        };
        // An answer to a heartbeat of this run cannot have been recorded before this run began: it is fresh.
        let answered =
            heartbeat.heard.filter(|(boot, _)| *boot == own_boot).and_then(|(_, number)| link.sent_at(number));
        if self.boot == Some(heartbeat.boot) {
            if link.newest.is_some_and(|newest| heartbeat.sequence <= newest) {
                return; // Repeated or overtaken.
            }
        } else if answered.is_some() || self.boot.is_none() || is_silent {
            // A new run of the peer's guard. While the old one is heard, only a fresh message can displace it, so that
            // recordings cannot silence a living peer.
            self.boot = Some(heartbeat.boot);
            self.links.values_mut().for_each(|link| link.newest = None);
        } else {
            return;
        }
        self.heard = Some(now);
        self.epoch = self.epoch.max(heartbeat.epoch);
        if let Some(link) = self.links.get_mut(&network) {
            link.newest = Some(heartbeat.sequence);
            link.answered = link.answered.max(answered);
        }
        if !is_newer {
            self.proof = self.proof.max(answered);
        }
    }

    pub fn is_silent(&self, now: Instant) -> bool {
        self.heard.is_none_or(|heard| now.since(heard) >= PEER_DOWN)
    }

    /// When the peer or one of its networks counts as silent if nothing more is heard; also moments that have passed.
    pub fn silences(&self) -> impl Iterator<Item = Instant> {
        self.links.values().filter_map(|link| link.answered).chain(self.heard).map(|at| at + PEER_DOWN)
    }

    pub fn view(&self, node: NodeId, now: Instant) -> PeerView {
        let works = |link: &Link| link.answered.is_some_and(|at| now.since(at) < PEER_DOWN);
        PeerView {
            node,
            heard_ms: self.heard.map(|heard| u64::try_from(now.since(heard).as_millis()).unwrap_or(u64::MAX)),
            networks: self.links.iter().filter(|(_, link)| works(link)).map(|(network, _)| *network).collect(),
            epoch: self.epoch,
        }
    }
}
