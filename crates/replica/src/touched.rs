//! Groups that something happened to. Noted for each input and each answer of the store, so that noting must cost nothing.

use pollux_base::GroupId;
use smallvec::SmallVec;

/// In no order and not once each while they are noted; in order and once each when they are taken.
#[derive(Debug, Default)]
pub(crate) struct Touched(SmallVec<[GroupId; 8]>);

impl Touched {
    pub(crate) fn insert(&mut self, id: GroupId) {
        if self.0.last() != Some(&id) {
            self.0.push(id);
        }
    }

    pub(crate) fn remove(&mut self, id: GroupId) {
        self.0.retain(|other| *other != id);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of them; none are left.
    pub(crate) fn take(&mut self) -> impl Iterator<Item = GroupId> + use<> {
        let mut taken = std::mem::take(&mut self.0);
        taken.sort_unstable();
        taken.dedup();
        taken.into_iter()
    }
}

impl Extend<GroupId> for Touched {
    fn extend<T: IntoIterator<Item = GroupId>>(&mut self, ids: T) {
        self.0.extend(ids);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_comes_in_order_and_once_each() {
        let mut touched = Touched::default();
        [3, 1, 1, 2, 3, 1].map(GroupId).into_iter().for_each(|id| touched.insert(id));
        touched.extend([GroupId(9), GroupId(2)]);
        touched.remove(GroupId(3));
        assert_eq!(touched.take().collect::<Vec<_>>(), [1, 2, 9].map(GroupId));
        assert!(touched.is_empty());
    }
}
