//! The keys that this node shares with its peers, as `noded` has handed them over. Pure.
//!
//! They live in this process's memory only: one that was restarted asks nobody, its `noded` gives them again.

use pollux_base::{Instant, NodeId, Secret};
use pollux_replica::wire::{KEYS_MAX, KeyId};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// A key may begin connections for this long: so long the two nodes find each other again while a `noded` is down. A
/// connection that is up goes on.
pub const KEY_LIFE: Duration = Duration::from_secs(24 * 3600);

struct Key {
    id: KeyId,
    secret: Secret,
    until: Instant,
}

#[derive(Default)]
pub struct Keyring {
    /// The newest first.
    keys: BTreeMap<NodeId, VecDeque<Key>>,
}

impl Keyring {
    /// Takes a key. `false`: it is known.
    pub fn add(&mut self, peer: NodeId, id: KeyId, secret: Secret, now: Instant) -> bool {
        let keys = self.keys.entry(peer).or_default();
        if id == 0 || keys.front().is_some_and(|key| key.id == id) {
            return false;
        }
        keys.retain(|key| key.id != id);
        keys.push_front(Key { id, secret, until: now + KEY_LIFE });
        keys.truncate(KEYS_MAX);
        true
    }

    pub fn forget(&mut self, peer: NodeId) {
        self.keys.remove(&peer);
    }

    /// What a hello offers, the best first; 0 where there is none.
    pub fn offer(&self, peer: NodeId, now: Instant) -> [KeyId; KEYS_MAX] {
        let mut offered = [0; KEYS_MAX];
        let valid = self.keys.get(&peer).into_iter().flatten().filter(|key| now < key.until);
        offered.iter_mut().zip(valid).for_each(|(place, key)| *place = key.id);
        offered
    }

    /// The first of the offered keys that is known here.
    pub fn choose(&self, peer: NodeId, offered: &[KeyId], now: Instant) -> Option<(KeyId, &Secret)> {
        let known = self.keys.get(&peer)?;
        let find = |id: &KeyId| known.iter().find(|key| key.id == *id && now < key.until);
        offered.iter().find_map(find).map(|key| (key.id, &key.secret))
    }

    /// The newest key with this peer.
    pub fn newest(&self, peer: NodeId) -> Option<KeyId> {
        self.keys.get(&peer)?.front().map(|key| key.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: NodeId = NodeId(2);

    fn secret(byte: u8) -> Secret {
        Secret::new([byte; 32])
    }

    #[test]
    fn the_newest_key_that_both_have_is_taken_and_only_the_last_two_are_kept() {
        let (mut own, mut theirs, now) = (Keyring::default(), Keyring::default(), Instant(0));
        assert_eq!(own.offer(PEER, now), [0, 0]);
        assert!(own.choose(PEER, &[0, 0], now).is_none(), "none is no key");
        for id in 1..=3 {
            assert!(own.add(PEER, id, secret(id as u8), now));
            assert!(!own.add(PEER, id, secret(id as u8), now), "given again it changes nothing");
        }
        assert_eq!(own.offer(PEER, now), [3, 2]);
        for id in 1..=2 {
            theirs.add(PEER, id, secret(id as u8), now);
        }
        assert_eq!(theirs.choose(PEER, &own.offer(PEER, now), now), Some((2, &secret(2))));
        theirs.add(PEER, 3, secret(3), now);
        assert_eq!(theirs.choose(PEER, &own.offer(PEER, now), now), Some((3, &secret(3))));
        assert!(theirs.choose(PEER, &[1, 0], now).is_none(), "the key before the last is gone");
    }

    #[test]
    fn a_key_begins_no_connection_after_its_life() {
        let (mut ring, now) = (Keyring::default(), Instant(0));
        ring.add(PEER, 1, secret(1), now);
        let later = now + KEY_LIFE;
        assert_eq!(ring.offer(PEER, later), [0, 0]);
        assert!(ring.choose(PEER, &[1, 0], later).is_none());
        ring.add(PEER, 2, secret(2), later);
        assert_eq!(ring.offer(PEER, later), [2, 0]);
    }
}
