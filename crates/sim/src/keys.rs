//! Volumes that are encrypted at rest: their keys, as simple values, and a look at what is stored and sent of them. Sealing is
//! the shells' affair; here a key is "sealed" by being written down.

use crate::content;
use crate::history::Seen;
use crate::sabotage::Sabotage;
use crate::world::World;
use pollux_base::{KeyId, NodeId, Order, SealedKey, VolumeId, VolumeSecret};
use pollux_replica::cipher::Cipher;
use std::sync::Arc;

/// The master key that all nodes have.
pub const MASTER: KeyId = KeyId(1);

/// The key of a disk of a VM.
pub fn of_disk(vm: usize, disk: usize) -> SealedKey {
    let secret = VolumeSecret::new(std::array::from_fn(|at| (at * 7 + vm * 64 + disk * 8 + 1) as u8));
    let sealed = secret.expose().iter().map(|byte| format!("{byte:02x}")).collect();
    SealedKey { key: KeyId::of(&secret), master: MASTER, sealed }
}

fn open(sealed: &SealedKey) -> VolumeSecret {
    let digits = |at: usize| u8::from_str_radix(&sealed.sealed[2 * at..2 * at + 2], 16);
    VolumeSecret::new(std::array::from_fn(|at| digits(at).expect("written down by `of_disk`")))
}

pub fn order(sealed: &SealedKey) -> Order {
    Order::VolumeKey { key: sealed.key, secret: open(sealed) }
}

impl World {
    /// What this VM's disks are to be encrypted with: the first VM's are, where any are.
    pub fn keys_of_vm(&self, vm: usize) -> Vec<SealedKey> {
        let disks = if self.settings.encrypted && vm == 0 { self.settings.vms[vm].len() } else { 0 };
        (0..disks).map(|disk| of_disk(vm, disk)).collect()
    }

    /// Takes note of the encrypted volumes that this node's state names.
    pub fn look_for_keys(&mut self, id: NodeId) {
        let Some(noded) = &self.nodes[&id].noded else { return };
        let state = noded.core.state();
        for (volume, found) in &state.volumes {
            let Some(sealed) = found.key.and_then(|key| state.keys.get(&key)) else { continue };
            self.ciphers
                .entry(*volume)
                .or_insert_with(|| Arc::new(Cipher::new(sealed.key, &open(sealed)).expect("a key fits its own name")));
        }
    }

    /// Orders with all keys that any log names.
    pub fn key_orders(&self) -> Vec<Order> {
        let states = self.nodes.values().filter_map(|node| Some(node.noded.as_ref()?.core.state()));
        states.flat_map(|state| state.keys.values()).map(order).collect()
    }

    /// Nothing that a guest wrote to an encrypted volume goes to a disk or to a peer as it was written.
    pub fn look_for_plain_text(&mut self, node: NodeId, bytes: &[u8]) {
        if self.ciphers.is_empty() {
            return;
        }
        let mut places = bytes.chunks_exact(content::SECTOR_BYTES).filter_map(content::place_of);
        if let Some((volume, block)) = places.find(|(volume, _)| self.ciphers.contains_key(volume)) {
            self.see(Seen::InTheClear { node, volume, block });
        }
    }

    /// A planted fault: what it does to an order on its way.
    pub fn forget_keys(&self, order: &mut Order) {
        if self.settings.sabotage == Some(Sabotage::KeysForgotten)
            && let Order::Group(spec) = order
        {
            spec.keys.clear();
        }
    }

    pub fn cipher_of(&self, volume: VolumeId) -> Option<Arc<Cipher>> {
        self.ciphers.get(&volume).cloned()
    }
}
