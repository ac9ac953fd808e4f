//! What is under way, by number: a map for keys that only grow and leave in about the order in which they came. It is a
//! queue with gaps, so that putting in, finding and taking out cost a few steps and no memory each.

use std::collections::VecDeque;

/// Gaps that are left in the queue before it is packed, beside as many as there are entries.
const GAPS: usize = 64;

/// The first and the last of `entries` are never gaps.
#[derive(Debug)]
pub(crate) struct KeyMap<K, V> {
    entries: VecDeque<(K, Option<V>)>,
    len: usize,
}

impl<K, V> Default for KeyMap<K, V> {
    fn default() -> KeyMap<K, V> {
        KeyMap { entries: VecDeque::new(), len: 0 }
    }
}

impl<K: Copy + Ord + Into<u64>, V> KeyMap<K, V> {
    /// Adds an entry behind all others.
    pub(crate) fn push(&mut self, key: K, value: V) {
        assert!(self.entries.back().is_none_or(|(last, _)| *last < key), "keys only grow");
        self.entries.push_back((key, Some(value)));
        self.len += 1;
    }

    /// Where the key is. Most keys are about as far apart as others, so it is looked for where it would be then.
    fn place(&self, key: K) -> Option<usize> {
        let (first, last) = (self.entries.front()?.0, self.entries.back()?.0);
        if key < first || last < key {
            return None;
        }
        let (span, ahead) = (last.into() - first.into(), key.into() - first.into());
        let guess = ahead.checked_mul(self.entries.len() as u64 - 1).map_or(0, |way| way / span.max(1)) as usize;
        let found = |place: usize| self.entries.get(place).is_some_and(|(other, _)| *other == key);
        let near = [guess, guess + 1, guess.wrapping_sub(1)].into_iter().find(|place| found(*place));
        near.or_else(|| self.entries.binary_search_by_key(&key, |(key, _)| *key).ok())
    }

    pub(crate) fn get(&self, key: K) -> Option<&V> {
        self.entries[self.place(key)?].1.as_ref()
    }

    pub(crate) fn get_mut(&mut self, key: K) -> Option<&mut V> {
        let place = self.place(key)?;
        self.entries[place].1.as_mut()
    }

    pub(crate) fn contains(&self, key: K) -> bool {
        self.get(key).is_some()
    }

    pub(crate) fn remove(&mut self, key: K) -> Option<V> {
        let place = self.place(key)?;
        let value = self.entries[place].1.take()?;
        self.len -= 1;
        self.close_gaps();
        Some(value)
    }

    pub(crate) fn retain(&mut self, mut keeps: impl FnMut(K, &V) -> bool) {
        self.entries.retain(|(key, value)| value.as_ref().is_some_and(|value| keeps(*key, value)));
        self.len = self.entries.len();
    }

    pub(crate) fn clear(&mut self) {
        self.entries.clear();
        self.len = 0;
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// In the order of keys.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (K, &V)> {
        self.entries.iter().filter_map(|(key, value)| Some((*key, value.as_ref()?)))
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (K, &mut V)> {
        self.iter_mut_from(0)
    }

    /// Those behind the key.
    pub(crate) fn after_mut(&mut self, key: K) -> impl Iterator<Item = (K, &mut V)> {
        let first = self.entries.partition_point(|(other, _)| *other <= key);
        self.iter_mut_from(first)
    }

    fn iter_mut_from(&mut self, first: usize) -> impl Iterator<Item = (K, &mut V)> {
        self.entries.range_mut(first..).filter_map(|(key, value)| Some((*key, value.as_mut()?)))
    }

    pub(crate) fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }

    fn close_gaps(&mut self) {
        while self.entries.front().is_some_and(|(_, value)| value.is_none()) {
            self.entries.pop_front();
        }
        while self.entries.back().is_some_and(|(_, value)| value.is_none()) {
            self.entries.pop_back();
        }
        // One that stays for long must not keep the places of all that came and went behind it.
        if self.entries.len() > 2 * self.len + GAPS {
            self.entries.retain(|(_, value)| value.is_some());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn it_holds_what_a_plain_map_holds_and_does_not_grow_with_what_has_gone() {
        let (mut map, mut plain) = (KeyMap::default(), BTreeMap::new());
        let mut luck = 1u64;
        for key in 0..5000u64 {
            map.push(key, key * 3);
            plain.insert(key, key * 3);
            luck = luck.wrapping_mul(6364136223846793005).wrapping_add(1);
            // The first stays to the end.
            for gone in [key.saturating_sub(luck >> 59), 1 + key / 2].into_iter().filter(|gone| *gone > 0) {
                assert_eq!(map.remove(gone), plain.remove(&gone));
            }
            assert_eq!((map.get(key), map.is_empty()), (plain.get(&key), false));
            assert!(
                map.entries.len() <= 2 * plain.len() + GAPS + 1,
                "{} places for {}",
                map.entries.len(),
                plain.len()
            );
        }
        assert!(map.iter().eq(plain.iter().map(|(key, value)| (*key, value))));
        let after: Vec<u64> = map.after_mut(4000).map(|(key, _)| key).collect();
        assert!(after.iter().eq(plain.range(4001..).map(|(key, _)| key)));
        map.retain(|key, _| key % 2 == 0);
        assert!(map.iter().all(|(key, _)| key % 2 == 0) && map.contains(0) && !map.contains(4999));
    }
}
