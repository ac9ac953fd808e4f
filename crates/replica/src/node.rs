//! What the groups of a node share: its store, its links, the outputs, and the numbers that must not repeat.

use crate::Output;
use crate::cipher::Keys;
use crate::image::Image;
use crate::key_map::KeyMap;
use crate::lease::Lease;
use crate::loss::ANSWER_LATE;
use crate::pace::Pace;
use crate::range_queue::Key;
use crate::wire::{Frame, Message, Sequence};
use pollux_base::{BlockIndex, GroupId, Instant, KeyId, NodeId, Report, RequestId, Session, SnapshotId, Stamp};
use pollux_store::{Disks, StoreOp, StoreRequestId};
use std::collections::{BTreeMap, VecDeque};

/// What a store request was made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A step of adopting the record (`group.rs`).
    Adopt(Key),
    /// The note of a replica that was told that it is current; the answer goes to the peer.
    NoteCurrent {
        peer: NodeId,
        session: Session,
        sequence: Sequence,
        stamp: Stamp,
    },
    /// The primary's note of which replicas it offers, or that its birth is confirmed.
    NotePrimary(Stamp),
    Job(Key),
    /// The hot marks of a client's request.
    Heat {
        key: Key,
        attempt: u32,
    },
    /// Marks are taken back. Then, if every replica counted under this record and it still holds, emptied extents are freed.
    Cool {
        reap: Option<Stamp>,
    },
    /// That a replica trails by this record, or trails no more.
    NoteTrails(Option<Stamp>),
    /// Checksums for the difference of two snapshots.
    Compare(u64),
    /// What a snapshot is about to freeze is made durable.
    SnapshotFlush(SnapshotId),
    Snapshot(SnapshotId),
    /// A snapshot that the primary asked for.
    PeerSnapshot {
        peer: NodeId,
        session: Session,
        sequence: Sequence,
        stamp: Stamp,
    },
    /// For a client that reads what is kept, and for a human who needs it no more.
    ReadKept {
        id: RequestId,
        start: BlockIndex,
        key: Option<KeyId>,
    },
    DropKept(u64),
    /// A piece of the pool's metadata, for whoever verifies it.
    Look,
    /// That the pool was opened.
    Opening,
    /// Nobody waits for its end.
    Background,
}

/// The connection to a peer, and the leases between the two nodes.
#[derive(Debug)]
pub(crate) struct Link {
    pub session: Option<Session>,
    /// Last frame that arrived on the session.
    pub heard: Instant,
    pub lease: Lease,
    /// When to ask for the lease anew. None: no group here needs it.
    pub next_ask: Option<Instant>,
    /// The lease was seen to hold; its end is an event.
    pub lease_held: bool,
}

pub(crate) struct Node {
    pub now: Instant,
    /// Since when this process has run without being stopped for long.
    pub awake_since: Instant,
    pub me: NodeId,
    /// Number of this boot of the machine.
    pub boot: u128,
    pub store: Disks,
    pub links: BTreeMap<NodeId, Link>,
    pub out: VecDeque<Output>,
    /// Why the pool is out of use, once it is. A store whose write failed takes no more (W6).
    pub pool_failed: Option<String>,
    /// The pool was refused when it was opened: it takes no requests at all.
    pub pool_refused: bool,
    /// How fast replicas are brought up to date beside the guests' I/O.
    pub pace: Pace,
    pub image: Image,
    /// Of volumes that are encrypted at rest.
    pub keys: Keys,
    started: Instant,
    owners: KeyMap<StoreRequestId, (GroupId, Purpose)>,
    next: u64,
}

impl Node {
    /// When this process began.
    pub(crate) fn started(&self) -> Instant {
        self.started
    }

    /// When an answer that was asked for at that moment is late.
    pub(crate) fn late_at(&self, asked: Instant) -> Instant {
        asked.max(self.awake_since) + ANSWER_LATE
    }

    pub(crate) fn new(now: Instant, me: NodeId, boot: u128, store: Disks) -> Node {
        Node {
            now,
            awake_since: now,
            me,
            boot,
            store,
            links: BTreeMap::new(),
            out: VecDeque::new(),
            pool_failed: None,
            pool_refused: false,
            pace: Pace::new(now),
            image: Image::default(),
            keys: Keys::default(),
            started: now,
            owners: KeyMap::default(),
            next: 1,
        }
    }

    pub(crate) fn next_number(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        number
    }

    /// A key larger than all before.
    pub(crate) fn next_key(&mut self) -> Key {
        Key(self.next_number())
    }

    /// A number for a question to a peer.
    pub(crate) fn next_sequence(&mut self) -> Sequence {
        Sequence(self.next_number())
    }

    /// Asks the store. The end comes to the group with `purpose`, never before this returns; of a pool that could not be
    /// opened it never comes.
    pub(crate) fn request(&mut self, group: GroupId, purpose: Purpose, op: StoreOp) {
        if self.pool_refused {
            return;
        }
        let id = StoreRequestId(self.next_number());
        self.owners.push(id, (group, purpose));
        self.store.handle(self.now, pollux_store::Input::Request(id, op));
    }

    /// For whom an ended request was made.
    pub(crate) fn owner(&mut self, id: StoreRequestId) -> (GroupId, Purpose) {
        self.owners.remove(id).expect("the store ends each request once")
    }

    pub(crate) fn link(&mut self, peer: NodeId) -> &mut Link {
        let (now, started) = (self.now, self.started);
        self.links.entry(peer).or_insert_with(|| Link {
            session: None,
            heard: now,
            lease: Lease::new(started),
            next_ask: None,
            lease_held: false,
        })
    }

    pub(crate) fn session(&self, peer: NodeId) -> Option<Session> {
        self.links.get(&peer).and_then(|link| link.session)
    }

    /// Whether the peer's grant covers this moment.
    pub(crate) fn holds_lease_of(&self, peer: NodeId) -> bool {
        self.links.get(&peer).is_some_and(|link| link.lease.holds(self.now))
    }

    /// Sends on the present session; without one the frame is dropped, and whoever needed an answer hears of the next
    /// session.
    pub(crate) fn send(&mut self, peer: NodeId, frame: Frame) {
        if let Some(session) = self.session(peer) {
            self.out.push_back(Output::Send { peer, session, frame });
        }
    }

    pub(crate) fn send_bare(&mut self, peer: NodeId, message: Message) {
        self.send(peer, Frame::bare(message));
    }

    /// Sends an answer, if the session of the question is still the present one.
    pub(crate) fn answer(&mut self, peer: NodeId, session: Session, frame: Frame) {
        if self.session(peer) == Some(session) {
            self.send(peer, frame);
        }
    }

    pub(crate) fn report(&mut self, report: Report) {
        self.out.push_back(Output::Report(report));
    }

    /// The pool is out of use from now on: told once.
    pub(crate) fn fail_pool(&mut self, reason: &str) {
        if self.pool_failed.is_none() {
            self.pool_failed = Some(reason.to_string());
            self.report(Report::PoolFailed { reason: reason.to_string() });
        }
    }
}
