//! What this node's store is asked for one group, by whoever asks: the primary's own share of a request, a peer's write,
//! a repair, a comparison. Jobs on the same blocks go one after the other; hot marks are durable before data (W7); a full
//! pool holds a job until there is space.

use crate::key_map::KeyMap;
use crate::node::{Node, Purpose};
use crate::range_queue::{Access, Key, RangeQueue};
use crate::wire::Sequence;
use pollux_base::unit::BlockRange;
use pollux_base::{BlockChecksum, Data, Generation, GroupId, Instant, NodeId, Session, Stamp, VolumeId};
use pollux_store::{StoreError, StoreOp, StoreReply};
use std::collections::BTreeSet;

/// For whom a job is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// A client's request here. A request that is begun anew has another attempt.
    Request { key: Key, attempt: u32 },
    /// A peer that is primary.
    Peer { peer: NodeId, session: Session, sequence: Sequence, stamp: Stamp },
    /// A block that was bad here and came from a peer.
    Repair { key: Key },
    /// An extent that is brought to a peer.
    Copy { peer: NodeId, key: Key },
    /// An extent that is scrubbed.
    Scrub { key: Key },
    /// A batch of a trailing replica.
    Trail { part: usize },
}

/// What is done.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    Read,
    Write {
        data: Data,
        checksums: Vec<BlockChecksum>,
    },
    Zero,
    /// Of the whole extent in which the range begins.
    Checksums,
    /// Of everything; the range is empty.
    Flush,
}

/// The life of a job reads downwards; `Full` goes back to `Heating`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// An earlier job has the blocks.
    Waiting,
    /// The extents' hot marks are being made durable.
    Heating,
    Acting,
    Flushing,
    /// The pool is full.
    Full,
}

#[derive(Debug)]
pub(crate) struct Job {
    pub origin: Origin,
    pub volume: VolumeId,
    pub range: BlockRange,
    pub act: Act,
    /// Flush afterwards.
    pub fua: bool,
    /// Acknowledged when it was received (mode `Memory`): it is never dropped, and a flush waits for it.
    pub is_received: bool,
}

#[derive(Debug)]
struct Entry {
    job: Job,
    step: Step,
    /// When it was taken, or found space again.
    started: Instant,
}

pub(crate) type JobResult = Result<StoreReply, StoreError>;

#[derive(Debug, Default)]
pub(crate) struct Local {
    queue: RangeQueue,
    jobs: KeyMap<Key, Entry>,
    full: BTreeSet<Key>,
    /// Jobs that were acknowledged before they were done.
    received: BTreeSet<Key>,
    /// Flushes that wait for such jobs before them.
    flushes: BTreeSet<Key>,
}

impl Local {
    /// Takes a job. Its end comes out of `on_ended`.
    pub(crate) fn submit(&mut self, node: &mut Node, group: GroupId, generation: Generation, job: Job) {
        let key = node.next_key();
        let access = match job.act {
            Act::Read | Act::Checksums | Act::Flush => Access::Read,
            Act::Write { .. } | Act::Zero => Access::Write,
        };
        let mut ready = self.queue.push(key, job.volume, job.range, access);
        if job.is_received {
            self.received.insert(key);
        }
        if matches!(job.act, Act::Flush) && !self.received.is_empty() {
            self.flushes.insert(key);
            ready = false;
        }
        self.jobs.push(key, Entry { job, step: Step::Waiting, started: node.now });
        if ready {
            self.run(node, group, generation, key);
        }
    }

    /// Whether something that was acknowledged is not on the disk yet.
    pub(crate) fn has_received(&self) -> bool {
        !self.received.is_empty()
    }

    /// Whether a job waits for space in the pool.
    pub(crate) fn is_idle(&self) -> bool {
        self.jobs.is_empty()
    }

    pub(crate) fn is_full(&self) -> bool {
        !self.full.is_empty()
    }

    /// Tries again what found the pool full.
    pub(crate) fn retry_full(&mut self, node: &mut Node, group: GroupId, generation: Generation) {
        for key in std::mem::take(&mut self.full) {
            if let Some(entry) = self.jobs.get_mut(key) {
                entry.started = node.now;
            }
            self.run(node, group, generation, key);
        }
    }

    /// Since when the oldest job that does not wait for space has been under way.
    pub(crate) fn late_since(&self) -> Option<Instant> {
        self.jobs.values().find(|entry| entry.step != Step::Full).map(|entry| entry.started)
    }

    /// Forgets what peers asked and is not yet being written: they ask again under the newer record or session. A job
    /// that is being written, or was acknowledged already, is finished, and its blocks stay taken until then.
    pub(crate) fn drop_unbegun(
        &mut self,
        node: &mut Node,
        group: GroupId,
        generation: Generation,
        drop: impl Fn(&Origin) -> bool,
    ) {
        let unbegun = |Entry { job, step, .. }: &Entry| {
            !job.is_received && drop(&job.origin) && matches!(step, Step::Waiting | Step::Heating | Step::Full)
        };
        let keys: Vec<Key> = self.jobs.iter().filter(|(_, entry)| unbegun(entry)).map(|(key, _)| key).collect();
        for key in &keys {
            self.jobs.remove(*key);
            self.full.remove(key);
        }
        for key in keys {
            self.release(node, group, generation, key);
        }
    }

    /// The store ended something for a job. Gives the job's end, if this was it; `Full` is told once and the job stays.
    pub(crate) fn on_ended(
        &mut self,
        node: &mut Node,
        group: GroupId,
        generation: Generation,
        key: Key,
        result: JobResult,
    ) -> Option<(Origin, JobResult)> {
        // A job that was dropped while its marks were made.
        let Entry { job, step, .. } = self.jobs.get_mut(key)?;
        match (*step, result) {
            (_, Err(StoreError::Full)) => {
                *step = Step::Full;
                self.full.insert(key);
                Some((job.origin, Err(StoreError::Full)))
            }
            (Step::Heating, Ok(_)) => {
                self.run(node, group, generation, key);
                None
            }
            (Step::Acting, Ok(_)) if job.fua => {
                *step = Step::Flushing;
                node.request(group, Purpose::Job(key), StoreOp::Flush);
                None
            }
            (Step::Acting | Step::Flushing, Ok(reply)) => {
                let origin = job.origin;
                self.jobs.remove(key);
                self.release(node, group, generation, key);
                Some((origin, Ok(reply)))
            }
            (_, Err(error)) => {
                let origin = job.origin;
                self.jobs.remove(key);
                self.release(node, group, generation, key);
                Some((origin, Err(error)))
            }
            (Step::Waiting | Step::Full, Ok(_)) => unreachable!("the store was asked nothing for a job that waits"),
        }
    }

    fn release(&mut self, node: &mut Node, group: GroupId, generation: Generation, key: Key) {
        self.flushes.remove(&key);
        if self.received.remove(&key) {
            let first = self.received.first().copied();
            let ready: Vec<Key> =
                self.flushes.iter().copied().take_while(|flush| first.is_none_or(|first| *flush < first)).collect();
            for flush in ready {
                self.flushes.remove(&flush);
                self.run(node, group, generation, flush);
            }
        }
        for next in self.queue.remove(key) {
            self.run(node, group, generation, next);
        }
    }

    /// Takes the next step of a job that has its blocks.
    fn run(&mut self, node: &mut Node, group: GroupId, generation: Generation, key: Key) {
        let Some(Entry { job, step, .. }) = self.jobs.get_mut(key) else { return };
        let (volume, range) = (job.volume, job.range);
        let op = match &job.act {
            Act::Write { .. } | Act::Zero => {
                let cold = cold_extents(node, volume, range, generation);
                if cold.is_empty() {
                    *step = Step::Acting;
                    match &job.act {
                        Act::Write { data, checksums } => {
                            StoreOp::Write { volume, range, data: data.clone(), checksums: checksums.clone() }
                        }
                        _ => StoreOp::Zero { volume, range },
                    }
                } else {
                    *step = Step::Heating;
                    StoreOp::Heat { volume, extents: cold, generation }
                }
            }
            Act::Read => {
                *step = Step::Acting;
                StoreOp::Read { volume, range }
            }
            Act::Checksums => {
                *step = Step::Acting;
                StoreOp::Checksums { volume, extent: range.start.extent() }
            }
            Act::Flush => {
                *step = Step::Acting;
                StoreOp::Flush
            }
        };
        node.request(group, Purpose::Job(key), op);
    }
}

/// Extents of the range to which nothing may be written before they are marked hot (W7).
pub(crate) fn cold_extents(
    node: &Node,
    volume: VolumeId,
    range: BlockRange,
    generation: Generation,
) -> Vec<pollux_base::ExtentIndex> {
    range.extents().filter(|extent| !node.store.is_hot(volume, *extent, generation)).collect()
}
