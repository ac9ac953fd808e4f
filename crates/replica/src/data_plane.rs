//! The data plane of one node.

use crate::{Config, Input, Output};
use pollux_base::Instant;
use pollux_store::Store;
use std::collections::VecDeque;

/// Replication of all groups on one node. Owns the node's store.
pub struct DataPlane {
    store: Store,
    out: VecDeque<Output>,
}

impl DataPlane {
    /// Begins opening the pool.
    pub fn new(config: Config, _now: Instant) -> DataPlane {
        DataPlane { store: Store::open(config.cluster, config.node, config.pool_size), out: VecDeque::new() }
    }
    /// Takes one input.
    pub fn handle(&mut self, now: Instant, input: Input) {
        if let Input::Disk(done) = input {
            self.store.handle(now, pollux_store::Input::Disk(done));
        }
        while let Some(output) = self.store.poll() {
            if let pollux_store::Output::Disk(op) = output {
                self.out.push_back(Output::Disk(op));
            }
        }
    }
    /// The next output, until there is none.
    pub fn poll(&mut self) -> Option<Output> {
        self.out.pop_front()
    }
    /// When `Input::Tick` is to be given at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.store.deadline()
    }
    /// Asserts the invariants.
    pub fn check(&self) {
        self.store.check();
    }
}
