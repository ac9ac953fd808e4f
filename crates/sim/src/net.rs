//! The networks between the nodes, and the way to the witness: cut in one direction or both, slow, losing datagrams.

use pollux_base::NodeId;
use pollux_base::guard::Network;
use pollux_store::faulty_disk::Luck;
use std::collections::BTreeSet;
use std::time::Duration;

/// Carries replication; the other way for what else must get through.
pub const STORAGE: Network = Network(0);
/// Carries control traffic and the way to the witness and the power switches.
pub const MANAGEMENT: Network = Network(1);
pub const NETWORKS: [Network; 2] = [STORAGE, MANAGEMENT];

pub struct Net {
    cut: BTreeSet<(Network, NodeId, NodeId)>,
    witness_cut: BTreeSet<NodeId>,
    /// One datagram in so many is lost, one in so many comes twice. 0: none.
    pub lost_one_in: u64,
    pub doubled_one_in: u64,
    /// The usual delay, and the one that one message in a hundred has.
    pub delay: Duration,
    pub hiccup: Duration,
}

impl Net {
    pub fn new() -> Net {
        Net {
            cut: BTreeSet::new(),
            witness_cut: BTreeSet::new(),
            lost_one_in: 0,
            doubled_one_in: 0,
            delay: Duration::from_micros(200),
            hiccup: Duration::from_millis(5),
        }
    }
    /// Nothing from one gets to the other on this network any more; the way back is not touched.
    pub fn cut(&mut self, network: Network, from: NodeId, to: NodeId) {
        self.cut.insert((network, from, to));
    }
    pub fn join(&mut self, network: Network, from: NodeId, to: NodeId) {
        self.cut.remove(&(network, from, to));
    }
    pub fn cut_witness(&mut self, node: NodeId) {
        self.witness_cut.insert(node);
    }
    pub fn join_witness(&mut self, node: NodeId) {
        self.witness_cut.remove(&node);
    }
    /// Everything is well.
    pub fn heal(&mut self) {
        *self = Net::new();
    }
    pub fn delivers(&self, network: Network, from: NodeId, to: NodeId) -> bool {
        !self.cut.contains(&(network, from, to))
    }
    pub fn both_ways(&self, network: Network, a: NodeId, b: NodeId) -> bool {
        self.delivers(network, a, b) && self.delivers(network, b, a)
    }
    /// The first of these networks on which a connection can be made.
    pub fn path(&self, order: [Network; 2], a: NodeId, b: NodeId) -> Option<Network> {
        order.into_iter().find(|network| self.both_ways(*network, a, b))
    }
    pub fn reaches_witness(&self, node: NodeId) -> bool {
        !self.witness_cut.contains(&node)
    }
    /// How long a message takes this time.
    pub fn some_delay(&self, luck: &mut Luck) -> Duration {
        let longest = if luck.one_in(100) { self.hiccup } else { self.delay };
        Duration::from_nanos(20_000 + luck.below(longest.as_nanos() as u64 + 1))
    }
}
