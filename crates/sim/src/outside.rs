//! What lies outside the nodes: the witness and the power switches.

use pollux_base::Epoch;
use pollux_cluster::{Register, WitnessAnswer};
use std::time::Duration;

/// One cluster's register, which only compare-and-swap changes.
pub struct Witness {
    register: Register,
    /// How long an answer may take.
    pub delay: Duration,
    /// One answer in so many is lost on its way back, after the register was changed. 0: none.
    pub lost_one_in: u64,
}

impl Witness {
    pub fn new() -> Witness {
        Witness { register: Register { epoch: Epoch(0), alone: None }, delay: Duration::from_millis(5), lost_one_in: 0 }
    }
    pub fn register(&self) -> Register {
        self.register
    }
    pub fn answer(&mut self, expect: Register, set: Option<Register>) -> WitnessAnswer {
        match set {
            // Made now, or made before and its answer lost.
            Some(new) if self.register == expect || self.register == new => {
                self.register = new;
                WitnessAnswer::Swapped(new)
            }
            Some(_) | None => WitnessAnswer::Holds(self.register),
        }
    }
}

/// Cuts a node's power and reads back that it is off.
pub struct PowerSwitch {
    pub delay: Duration,
    /// Not reached: broken, or fed by the same plug as its node.
    pub reachable: bool,
}
