//! Things under way, by number: found without a search, and never taken for a later one in the same place.

use std::marker::PhantomData;

/// Names a thing between `insert` and `remove`. Its place in the low half, in the high half a number that is not given
/// again before 2^32 others were.
pub struct SlabId<T>(pub u64, PhantomData<T>);

impl<T> SlabId<T> {
    pub fn from_raw(raw: u64) -> SlabId<T> {
        SlabId(raw, PhantomData)
    }
    fn place(self) -> usize {
        (self.0 & u64::from(u32::MAX)) as usize
    }
}

// By hand, because a derived one would ask the same of `T`.
impl<T> Clone for SlabId<T> {
    fn clone(&self) -> SlabId<T> {
        *self
    }
}
impl<T> Copy for SlabId<T> {}
impl<T> PartialEq for SlabId<T> {
    fn eq(&self, other: &SlabId<T>) -> bool {
        self.0 == other.0
    }
}
impl<T> Eq for SlabId<T> {}
impl<T> std::fmt::Debug for SlabId<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "#{:x}", self.0)
    }
}

pub struct Slab<T> {
    places: Vec<(u64, Option<T>)>,
    free: Vec<u32>,
    numbers: u32,
}

impl<T> Default for Slab<T> {
    fn default() -> Slab<T> {
        Slab { places: Vec::new(), free: Vec::new(), numbers: 0 }
    }
}

impl<T> Slab<T> {
    pub fn insert(&mut self, thing: T) -> SlabId<T> {
        self.numbers = self.numbers.wrapping_add(1);
        let place = self.free.pop().unwrap_or_else(|| {
            self.places.push((0, None));
            u32::try_from(self.places.len() - 1).expect("far fewer things are under way at once")
        });
        let id = u64::from(self.numbers) << 32 | u64::from(place);
        self.places[place as usize] = (id, Some(thing));
        SlabId::from_raw(id)
    }

    pub fn get(&self, id: SlabId<T>) -> Option<&T> {
        self.places.get(id.place()).filter(|(of, _)| *of == id.0).and_then(|(_, thing)| thing.as_ref())
    }

    pub fn get_mut(&mut self, id: SlabId<T>) -> Option<&mut T> {
        self.places.get_mut(id.place()).filter(|(of, _)| *of == id.0).and_then(|(_, thing)| thing.as_mut())
    }

    pub fn remove(&mut self, id: SlabId<T>) -> Option<T> {
        let (_, thing) = self.places.get_mut(id.place()).filter(|(of, _)| *of == id.0)?;
        let removed = thing.take()?;
        self.free.push(id.place() as u32);
        Some(removed)
    }

    pub fn iter(&self) -> impl Iterator<Item = (SlabId<T>, &T)> {
        self.places.iter().filter_map(|(id, thing)| Some((SlabId::from_raw(*id), thing.as_ref()?)))
    }

    pub fn is_empty(&self) -> bool {
        self.places.len() == self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_thing_that_is_gone_finds_nothing_although_its_place_is_taken_again() {
        let mut slab = Slab::default();
        let first = slab.insert('a');
        assert_eq!(slab.remove(first), Some('a'));
        let second = slab.insert('b');
        assert_eq!(slab.get(first), None);
        assert_eq!(slab.remove(first), None);
        assert_eq!(slab.get(second), Some(&'b'));
        assert!(!slab.is_empty());
        assert_eq!(slab.remove(second), Some('b'));
        assert!(slab.is_empty());
    }
}
