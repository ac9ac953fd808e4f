//! Whether this node's pool is the one that its peers knew, or an image of it from an earlier day: a backup, or a snapshot of
//! the volume manager, that somebody put back.
//!
//! An image from before the present generation is stale and says so, like any replica that was away: its candidates begin at
//! the record by which it was last in sync (W8). One from the same generation lacks writes that no record tells of. So a pool
//! notes at which position each of its openings began, and tells its peers how far it has come, with each lease; each
//! remembers that of the others, durably when the connection ends. A pool whose own history does not reach as far as a peer
//! remembers is such an image: it is out of use before it has said anything else, until a human takes it as stale.
//!
//! *Not seen:* an image that lacks no more than what was told last: some `LEASE_RENEW` of writes, or `SAVE_AFTER` when both nodes
//! lost power at once.

use crate::names::is_names;
use crate::node::{Node, Purpose};
use crate::note::Note;
use crate::wire::Message;
use pollux_base::{DiskId, GroupId, Instant, NodeId, PoolId};
use pollux_store::{Disks, OpenError, Position, StoreOp};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Notes of the node's own are kept under these; no log mints such groups.
pub(crate) const OPENINGS: GroupId = GroupId(u64::MAX);
const PEERS: GroupId = GroupId(u64::MAX - 1);
/// Openings that are remembered: as many as fit into a note. Who was away for longer is taken for an image.
const OPENINGS_MAX: usize = 16;
/// What peers say is made durable at least so often; it costs a write of the catalog.
const SAVE_AFTER: Duration = Duration::from_secs(60);

/// Whether a note is the node's own or holds names, and is not how a group's replica stands.
pub(crate) fn is_own(group: GroupId) -> bool {
    group >= PEERS || is_names(group)
}

/// How far a pool has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Mark {
    pub pool: PoolId,
    pub disk: DiskId,
    /// How often a human has taken an image of it as stale: what was known before counts no more.
    pub taken: u32,
    /// This opening of the pool, and the boot of the machine in which it was opened.
    pub opening: u32,
    pub boot: u128,
    pub position: Position,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Openings {
    taken: u32,
    /// Number, boot, and the position at which it began; oldest first.
    each: Vec<(u32, u128, Position)>,
}

/// The pool's own history, and what is known of the peers'.
#[derive(Default)]
pub(crate) struct Image {
    /// None: there is no room for the note, so nothing is said and nothing is found out.
    own: Option<Openings>,
    peers: BTreeMap<NodeId, Mark>,
    saved: BTreeMap<NodeId, Mark>,
    saved_at: Instant,
    told: BTreeMap<NodeId, Mark>,
    /// Peers whose greeting on the present session was judged.
    greeted: BTreeSet<NodeId>,
}

impl Openings {
    /// Whether a pool of which a peer knows this mark cannot have this history. `now`: where it is.
    fn contradicts(&self, now: Mark, known: Mark) -> bool {
        if (known.pool, known.disk) != (now.pool, now.disk) || known.taken < self.taken {
            return false;
        }
        let Some(at) = self.each.iter().position(|(number, boot, _)| (*number, *boot) == (known.opening, known.boot))
        else {
            return true;
        };
        let end = self.each.get(at + 1).map_or(now.position, |(_, _, start)| *start);
        end < known.position
    }
}

impl Image {
    /// The pool was opened: gives the note that must be durable before anything is said to a peer.
    pub(crate) fn on_opened(&mut self, store: &Disks, boot: u128) -> Option<StoreOp> {
        let notes: BTreeMap<GroupId, &[u8]> = store.notes().collect();
        let mut own: Openings =
            notes.get(&OPENINGS).and_then(|note| postcard::from_bytes(note).ok()).unwrap_or_default();
        self.peers = notes.get(&PEERS).and_then(|note| postcard::from_bytes(note).ok()).unwrap_or_default();
        self.saved = self.peers.clone();
        let (.., start) = store.position_found()?;
        let number = own.each.last().map_or(1, |(number, ..)| number.saturating_add(1));
        own.each.push((number, boot, start));
        if own.each.len() > OPENINGS_MAX {
            own.each.remove(0);
        }
        let note = encode(&own);
        self.own = Some(own);
        Some(StoreOp::PutNote { group: OPENINGS, note: Some(note) })
    }

    /// There is no room for the note.
    pub(crate) fn on_not_noted(&mut self) {
        self.own = None;
    }

    fn mark(&self, store: &Disks) -> Option<Mark> {
        let own = self.own.as_ref()?;
        let (opening, boot, _) = *own.each.last()?;
        let (pool, disk, position) = store.position()?;
        Some(Mark { pool, disk, taken: own.taken, opening, boot, position })
    }
}

fn encode(value: &impl Serialize) -> Vec<u8> {
    postcard::to_stdvec(value).expect("numbers can always be written")
}

impl Node {
    /// The first thing that is said on a new session: what is known of the peer's pool. What it says of itself counts only
    /// when it has heard this.
    pub(crate) fn greet(&mut self, peer: NodeId) {
        self.image.told.remove(&peer);
        self.image.greeted.remove(&peer);
        self.send_mark(peer);
    }

    /// Tells the peer how far this node's pool has come, if that is news.
    pub(crate) fn tell_mark(&mut self, peer: NodeId) {
        let mark = self.image.mark(&self.store);
        if mark != self.image.told.get(&peer).copied()
            && self.image.greeted.contains(&peer)
            && self.pool_failed.is_none()
        {
            self.image.told.extend(mark.map(|mark| (peer, mark)));
            self.send_mark(peer);
        }
    }

    fn send_mark(&mut self, peer: NodeId) {
        if let Some(mark) = self.image.mark(&self.store) {
            let known = self.image.peers.get(&peer).copied().map(Box::new);
            self.send_bare(peer, Message::Pool { mark: Box::new(mark), known });
        }
    }

    /// What a peer says of its pool, and what it knows of this one.
    pub(crate) fn on_peer_mark(&mut self, peer: NodeId, mark: Mark, known: Option<Mark>) {
        let own = self.image.own.as_ref().zip(self.image.mark(&self.store));
        if let Some(known) = known
            && own.is_some_and(|(own, now)| own.contradicts(now, known))
        {
            let why = format!("node {peer} has seen it further on");
            self.fail_pool(&OpenError::EarlierDay { why }.to_string());
        }
        if self.image.greeted.insert(peer) {
            // A greeting: an image does not know yet that it is one.
            return self.tell_mark(peer);
        }
        let before = self.image.peers.get(&peer).copied();
        let is_new = |before: Mark| {
            (before.pool, before.disk) != (mark.pool, mark.disk)
                || (before.taken, before.position) < (mark.taken, mark.position)
        };
        if before.is_none_or(is_new) {
            self.image.peers.insert(peer, mark);
        }
        if before.is_none() || self.now > self.image.saved_at + SAVE_AFTER {
            self.save_peers();
        }
    }

    /// Makes durable what is known of the peers' pools. Ahead of any record that lets a peer go: notes keep their order.
    pub(crate) fn save_peers(&mut self) {
        if self.image.peers == self.image.saved || self.pool_failed.is_some() {
            return;
        }
        self.image.saved = self.image.peers.clone();
        self.image.saved_at = self.now;
        let note = Some(encode(&self.image.peers));
        self.request(PEERS, Purpose::Background, StoreOp::PutNote { group: PEERS, note });
    }
}

/// The notes of a pool of which a human says that it is an old image: each replica forgets that it ever was in sync, so that
/// everything is compared, and what the peers knew counts no more. Notes that cannot be read are erased, which means the same.
pub fn take_as_stale<'a>(notes: impl Iterator<Item = (GroupId, &'a [u8])>) -> Vec<StoreOp> {
    let mut own = Openings::default();
    let mut ops = Vec::new();
    for (group, note) in notes.filter(|(group, _)| *group != PEERS) {
        if group == OPENINGS {
            own = postcard::from_bytes(note).unwrap_or_default();
            continue;
        }
        let stale = |note: Note| Note {
            in_sync_at: None,
            joined_at: None,
            born: false,
            offered: Default::default(),
            whole_in_boot: None,
            trails: None,
            ..note
        };
        let note = Note::decode(note).ok().map(|note| stale(note).encode());
        ops.push(StoreOp::PutNote { group, note });
    }
    own.taken = own.taken.saturating_add(1);
    ops.push(StoreOp::PutNote { group: OPENINGS, note: Some(encode(&own)) });
    ops
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(changes: u64, journal: u64) -> Position {
        Position { changes, journal }
    }

    fn mark(opening: u32, boot: u128, position: Position) -> Mark {
        Mark { pool: PoolId(1), disk: DiskId(2), taken: 0, opening, boot, position }
    }

    #[test]
    fn a_history_that_does_not_reach_what_is_known_is_an_image() {
        let each = vec![(7, 1, at(3, 30)), (8, 1, at(5, 50)), (9, 2, at(8, 80))];
        let own = Openings { taken: 0, each };
        let now = mark(9, 2, at(9, 90));
        let is_image = |known| own.contradicts(now, known);
        assert!(!is_image(mark(9, 2, at(9, 90))) && is_image(mark(9, 2, at(9, 91))), "this opening");
        assert!(!is_image(mark(7, 1, at(5, 50))) && is_image(mark(7, 1, at(5, 51))), "an earlier one ended there");
        assert!(!is_image(mark(8, 1, at(8, 20))) && is_image(mark(8, 1, at(9, 20))));
        assert!(is_image(mark(10, 2, at(1, 1))), "an opening that this history lacks");
        assert!(is_image(mark(9, 3, at(1, 1))), "or had in another boot");
        assert!(is_image(mark(6, 1, at(1, 1))), "or had too long ago");
        assert!(!is_image(Mark { disk: DiskId(3), ..mark(10, 9, at(99, 99)) }), "of another pool nothing is known");
        let taken = Openings { taken: 1, ..own.clone() };
        assert!(!taken.contradicts(now, mark(10, 2, at(99, 99))), "a human has taken it as stale");
    }

    #[test]
    fn notes_of_the_nodes_own_fit_and_are_told_from_those_of_groups() {
        let longest =
            Openings { taken: u32::MAX, each: vec![(u32::MAX, u128::MAX, at(u64::MAX, u64::MAX)); OPENINGS_MAX] };
        assert!(encode(&longest).len() <= pollux_store::NOTE_BYTES_MAX, "{}", encode(&longest).len());
        assert!(is_own(OPENINGS) && is_own(PEERS) && !is_own(GroupId(1)) && !is_own(GroupId((1 << 48) - 1)));
    }
}
