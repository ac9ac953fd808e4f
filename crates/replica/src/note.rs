//! What a node durably remembers of a group, in the store's notes. Only durable facts decide how a replica stands after
//! a restart or towards a peer; nothing kept only in memory does.

use pollux_base::{GroupId, NodeId, Stamp};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// First byte of a note.
const NOTE_VERSION: u8 = 2;

/// Durable before anything is done under the record `newest`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Note {
    /// Newest record adopted here. What was said under an older one is refused (W2), also after a restart.
    pub newest: Stamp,
    /// Primary of that record.
    pub primary: NodeId,
    /// The primary before, while a promise given to it may still bind (W5).
    pub before: Option<NodeId>,
    /// The last record that named this replica in sync and was adopted here: where its candidates begin (W8).
    pub in_sync_at: Option<Stamp>,
    /// The record under which a primary last said that this replica holds everything. A later record may name it.
    pub joined_at: Option<Stamp>,
    /// In sync only because nothing existed yet, and not yet confirmed by the other replicas (W12).
    pub born: bool,
    /// As primary: replicas offered to the control plane under `newest`. A record that names them may exist already, so
    /// nothing is acknowledged without them under this one, also after a restart (W9).
    pub offered: BTreeSet<NodeId>,
    /// The boot of the machine in which this replica last came to hold everything, as long as it does. In the same boot it
    /// still has all that was acknowledged, also what was not flushed; after a power cut it may not.
    pub whole_in_boot: Option<u128>,
    /// This replica trails: it is a state that the group had under this record or the one before. None while it is compared.
    pub trails: Option<Stamp>,
}

/// A note that cannot be read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoteError {
    #[error("a note of version {0}, not {NOTE_VERSION}")]
    Version(u8),
    #[error("a note that is damaged: {0}")]
    Damaged(String),
}

impl Note {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let body = postcard::to_stdvec(self).expect("a note is plain data, which postcard always encodes");
        let mut bytes = vec![NOTE_VERSION];
        bytes.extend(body);
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Note, NoteError> {
        let (version, body) = bytes.split_first().ok_or(NoteError::Damaged("it is empty".to_string()))?;
        if *version != NOTE_VERSION {
            return Err(NoteError::Version(*version));
        }
        postcard::from_bytes(body).map_err(|error| NoteError::Damaged(error.to_string()))
    }
}

/// A note for people: how far a replica came, as its own disk tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Noted {
    /// Newest record that it knew, and the primary of that.
    pub newest: Stamp,
    pub primary: NodeId,
    /// It held every acknowledged write under this record; `None`: never, or a human gave that up.
    pub held: Option<Stamp>,
    /// It was in sync by the newest record that it knew.
    pub is_in_sync: bool,
    /// It trails, and is a state that the group had by this record.
    pub trails: Option<Stamp>,
}

/// What a group's note says; `None`: it is the node's own, or cannot be read.
pub fn noted(group: GroupId, note: &[u8]) -> Option<Noted> {
    let note = Note::decode(note).ok().filter(|_| !crate::image::is_own(group))?;
    let held = note.in_sync_at.max(note.joined_at);
    Some(Noted {
        newest: note.newest,
        primary: note.primary,
        held,
        is_in_sync: held == Some(note.newest),
        trails: note.trails,
    })
}

/// Which of two replicas of a group has what the other lacks, by what their disks say alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Newer {
    /// This one was in sync by a later record.
    First,
    Second,
    /// Both were in sync by the same record: they differ at most in what was being written at the end.
    Neither,
    /// Each knows a record of an epoch of its own: their histories may have parted, and a human has to look at both.
    Unclear,
}

impl Noted {
    /// Compares. Whether two histories have parted only the cluster log can tell for sure; records of the same epoch are of
    /// one history.
    pub fn newer(&self, other: &Noted) -> Newer {
        // Whoever went on alone did so in a later epoch and a later generation than it left the other in.
        let parted = |early: Stamp, late: Stamp| early.epoch < late.epoch && early.generation >= late.generation;
        match (self.held, other.held) {
            (one, two) if one == two => Newer::Neither,
            (Some(one), Some(two)) if parted(one, two) || parted(two, one) => Newer::Unclear,
            (one, two) if one > two => Newer::First,
            _ => Newer::Second,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pollux_base::{Epoch, Generation};

    #[test]
    fn of_two_replicas_the_one_with_the_later_record_is_newer() {
        let noted = |epoch, generation| Noted {
            newest: stamp(epoch, generation),
            primary: NodeId(1),
            held: Some(stamp(epoch, generation)),
            is_in_sync: true,
            trails: None,
        };
        assert_eq!(noted(1, 5).newer(&noted(1, 5)), Newer::Neither);
        assert_eq!(noted(1, 6).newer(&noted(1, 5)), Newer::First);
        assert_eq!(noted(1, 6).newer(&noted(2, 7)), Newer::Second);
        assert_eq!(noted(2, 6).newer(&noted(1, 6)), Newer::Unclear, "both went on from generation 5");
        assert_eq!(noted(1, 1).newer(&Noted { held: None, ..noted(1, 9) }), Newer::First, "it never held everything");
    }

    fn stamp(epoch: u64, generation: u64) -> Stamp {
        Stamp { epoch: Epoch(epoch), generation: Generation(generation) }
    }

    #[test]
    fn notes_on_disk_stay_readable() {
        let note = Note {
            newest: stamp(3, 9),
            primary: NodeId(2),
            before: Some(NodeId(1)),
            in_sync_at: Some(stamp(3, 8)),
            joined_at: None,
            born: false,
            offered: BTreeSet::from([NodeId(3)]),
            whole_in_boot: Some(5),
            trails: Some(stamp(3, 7)),
        };
        let bytes = [2, 3, 9, 2, 1, 1, 1, 3, 8, 0, 0, 1, 3, 1, 5, 1, 3, 7];
        assert_eq!(note.encode(), bytes);
        assert_eq!(Note::decode(&bytes), Ok(note));
        assert_eq!(Note::decode(&[9, 0]), Err(NoteError::Version(9)));
        assert!(matches!(Note::decode(&[2, 3]), Err(NoteError::Damaged(_))));
        assert!(matches!(Note::decode(&[]), Err(NoteError::Damaged(_))));
    }
}
