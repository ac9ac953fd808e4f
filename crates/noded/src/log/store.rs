//! The file of the log: one redb database per node.
//!
//! Every method is one transaction, durable when it returns. Methods wait for the disk: call them where that is allowed.
//!
//! Each of the engine's runs holds a `Session`; giving up or forcing the log begins a new one, and what an earlier one
//! still tries to write is refused. So nothing of a given-up log can appear in the next.

use super::{RaftEntry, RaftLogId, RaftMembership, RaftVote};
use openraft::{EmptyNode, Entry, EntryPayload, LogId, Membership, Vote};
use pollux_base::{ClusterId, Epoch, NodeId};
use pollux_cluster::EpochRecord;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Bound, RangeBounds};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const ENTRIES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("entries");
const FACTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("facts");

/// Facts, by name. All are JSON.
const IDENTITY: &str = "identity";
const VOTE: &str = "vote";
const COMMITTED: &str = "committed";
const PURGED: &str = "purged";
const SNAPSHOT: &str = "snapshot";
const EPOCH_RECORD: &str = "epoch_record";
const LINEAGE: &str = "lineage";

/// Version of what is written here.
const VERSION: u32 = 1;
/// Memory for redb's cache: the log between two snapshots is far smaller.
const CACHE_BYTES: usize = 8 << 20;

/// Whose log this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub version: u32,
    pub cluster: ClusterId,
    pub node: NodeId,
}

/// Which history this log belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lineage {
    /// Epoch at which the log was last forced, by whichever node; 0 since its birth.
    pub epoch: Epoch,
    /// The log was emptied and nothing of another is here yet: the lineage is that of whoever fills it.
    pub joining: bool,
    /// Epoch in whose favour the log was last emptied.
    pub emptied_for: Epoch,
}

/// A snapshot as it is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoredSnapshot {
    pub last_log_id: Option<RaftLogId>,
    pub membership: RaftMembership,
    pub id: String,
    /// The state, as text.
    pub state: String,
}

/// Why the store could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("this node is not prepared: {0} does not exist")]
    NotPrepared(String),
    #[error("{path} belongs to node {found}, this is {expected}")]
    OtherNode { path: String, found: String, expected: String },
    #[error("{path} has version {found}, this program knows {VERSION}")]
    OtherVersion { path: String, found: u32 },
    #[error("{path} can not be used: {reason}")]
    Open { path: String, reason: String },
    #[error("the log's store failed: {0}")]
    Failed(String),
    #[error("a fact in the log's store makes no sense: {0}")]
    Damaged(String),
    /// A later session has begun.
    #[error("this log was given up")]
    Ended,
}

macro_rules! from_redb {
    ($($kind:ty),*) => {
        $(impl From<$kind> for StoreError {
            fn from(error: $kind) -> StoreError {
                StoreError::Failed(error.to_string())
            }
        })*
    };
}
from_redb!(redb::TransactionError, redb::TableError, redb::StorageError, redb::CommitError);

/// The store as the whole node shares it.
pub struct Store {
    database: Database,
    /// The only session that may write.
    session: AtomicU64,
}

impl Store {
    /// Makes the file for a node that has none yet; `false` when it is there already, for the same node.
    pub fn prepare(path: &Path, cluster: ClusterId, node: NodeId) -> Result<bool, StoreError> {
        if path.exists() {
            return Store::open(path, cluster, node).map(|_| false);
        }
        // Made beside and renamed, so that a half-made file is never taken for a node's log.
        let temporary = path.with_extension("new");
        let failed =
            |error: std::io::Error| StoreError::Open { path: path.display().to_string(), reason: error.to_string() };
        if temporary.exists() {
            std::fs::remove_file(&temporary).map_err(failed)?;
        }
        let database = open_database(&temporary, true)?;
        let transaction = database.begin_write()?;
        transaction.open_table(ENTRIES)?;
        put(&transaction, IDENTITY, &Identity { version: VERSION, cluster, node })?;
        transaction.commit()?;
        drop(database);
        std::fs::rename(&temporary, path).map_err(failed)?;
        let directory = path.parent().unwrap_or(Path::new("."));
        std::fs::File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed)?;
        Ok(true)
    }

    /// Opens the file of this node. One process at a time.
    pub fn open(path: &Path, cluster: ClusterId, node: NodeId) -> Result<Arc<Store>, StoreError> {
        let shown = path.display().to_string();
        if !path.exists() {
            return Err(StoreError::NotPrepared(shown));
        }
        let store = Store { database: open_database(path, false)?, session: AtomicU64::new(1) };
        let identity: Identity = store.fact(IDENTITY)?.ok_or_else(|| StoreError::Damaged("it has no owner".into()))?;
        if identity.version != VERSION {
            return Err(StoreError::OtherVersion { path: shown, found: identity.version });
        }
        if (identity.cluster, identity.node) != (cluster, node) {
            return Err(StoreError::OtherNode {
                path: shown,
                found: format!("{} of cluster {}", identity.node, identity.cluster),
                expected: format!("{node} of cluster {cluster}"),
            });
        }
        Ok(Arc::new(store))
    }

    pub fn epoch_record(&self) -> Result<Option<EpochRecord>, StoreError> {
        self.fact(EPOCH_RECORD)
    }

    /// Durable when it returns: only then may the node act on it.
    pub fn save_epoch_record(&self, record: &EpochRecord) -> Result<(), StoreError> {
        let transaction = self.database.begin_write()?;
        put(&transaction, EPOCH_RECORD, record)?;
        transaction.commit()?;
        Ok(())
    }

    pub fn lineage(&self) -> Result<Lineage, StoreError> {
        Ok(self.fact(LINEAGE)?.unwrap_or_default())
    }

    /// The log was emptied and is now filled by one of this lineage.
    pub fn adopt_lineage(&self, epoch: Epoch) -> Result<Lineage, StoreError> {
        let lineage = Lineage { epoch, joining: false, ..self.lineage()? };
        let transaction = self.database.begin_write()?;
        put(&transaction, LINEAGE, &lineage)?;
        transaction.commit()?;
        Ok(lineage)
    }

    /// Makes this node the only voter: one entry under a term above every known, and the vote that goes with it. All
    /// that is in the log stays; whether the last entries were committed is decided by this: they are. `false` when the
    /// log was forced for this epoch before.
    pub fn force_alone(&self, node: NodeId, epoch: Epoch) -> Result<bool, StoreError> {
        let lineage = self.lineage()?;
        if lineage.joining {
            return Err(StoreError::Failed("a log that was given up can not be forced: it is empty".into()));
        }
        if lineage.epoch >= epoch {
            return Ok(false);
        }
        self.session.fetch_add(1, Ordering::SeqCst);
        let transaction = self.database.begin_write()?;
        let vote: RaftVote = get(&transaction, VOTE)?.unwrap_or_default();
        let last = last_log_id(&transaction)?;
        let term = vote.leader_id.term.max(last.map_or(0, |last| last.leader_id.term)) + 1;
        let vote = Vote::new_committed(term, node.0);
        let index = last.map_or(0, |last| last.index + 1);
        let membership: Membership<u64, EmptyNode> = BTreeMap::from([(node.0, EmptyNode::new())]).into();
        let entry: RaftEntry =
            Entry { log_id: LogId::new(vote.leader_id, index), payload: EntryPayload::Membership(membership) };
        put_entries(&transaction, [entry])?;
        put(&transaction, VOTE, &vote)?;
        put(&transaction, LINEAGE, &Lineage { epoch, ..lineage })?;
        transaction.commit()?;
        Ok(true)
    }

    /// Empties the log, once for each epoch: the identity and the epoch record stay. `false` when it was emptied for
    /// this epoch before.
    pub fn give_up(&self, epoch: Epoch) -> Result<bool, StoreError> {
        let lineage = self.lineage()?;
        if lineage.emptied_for >= epoch {
            return Ok(false);
        }
        self.session.fetch_add(1, Ordering::SeqCst);
        let transaction = self.database.begin_write()?;
        transaction.open_table(ENTRIES)?.retain(|_, _| false)?;
        {
            let mut facts = transaction.open_table(FACTS)?;
            for name in [VOTE, COMMITTED, PURGED, SNAPSHOT] {
                facts.remove(name)?;
            }
        }
        put(&transaction, LINEAGE, &Lineage { joining: true, emptied_for: epoch, ..lineage })?;
        transaction.commit()?;
        Ok(true)
    }

    fn fact<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, StoreError> {
        let transaction = self.database.begin_read()?;
        let facts = match transaction.open_table(FACTS) {
            Ok(facts) => facts,
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let value = facts.get(name)?;
        value.map(|bytes| decode(name, bytes.value())).transpose()
    }
}

/// One run of the engine on the store.
#[derive(Clone)]
pub struct Session {
    pub store: Arc<Store>,
    number: u64,
}

impl Session {
    /// The present session: from now on nothing else may write.
    pub fn begin(store: &Arc<Store>) -> Session {
        Session { store: store.clone(), number: store.session.load(Ordering::SeqCst) }
    }

    pub fn vote(&self) -> Result<Option<RaftVote>, StoreError> {
        self.store.fact(VOTE)
    }
    pub fn save_vote(&self, vote: &RaftVote) -> Result<(), StoreError> {
        self.write(|transaction| put(transaction, VOTE, vote))
    }
    pub fn committed(&self) -> Result<Option<RaftLogId>, StoreError> {
        Ok(self.store.fact::<Option<RaftLogId>>(COMMITTED)?.flatten())
    }
    /// Only tells how far to replay after a restart, so it need not be durable at once: too little is allowed.
    pub fn save_committed(&self, committed: Option<RaftLogId>) -> Result<(), StoreError> {
        let mut transaction = self.store.database.begin_write()?;
        transaction.set_durability(redb::Durability::None).map_err(|error| StoreError::Failed(error.to_string()))?;
        self.check()?;
        put(&transaction, COMMITTED, &committed)?;
        transaction.commit()?;
        Ok(())
    }
    pub fn snapshot(&self) -> Result<Option<StoredSnapshot>, StoreError> {
        self.store.fact(SNAPSHOT)
    }
    pub fn save_snapshot(&self, snapshot: &StoredSnapshot) -> Result<(), StoreError> {
        self.write(|transaction| put(transaction, SNAPSHOT, snapshot))
    }

    /// The last entry that was purged, and the last there is.
    pub fn ends(&self) -> Result<(Option<RaftLogId>, Option<RaftLogId>), StoreError> {
        let purged: Option<RaftLogId> = self.store.fact(PURGED)?;
        let transaction = self.store.database.begin_read()?;
        let entries = transaction.open_table(ENTRIES)?;
        let last = entries.last()?.map(|(_, bytes)| decode::<RaftEntry>("entry", bytes.value())).transpose()?;
        Ok((purged, last.map(|entry| entry.log_id).or(purged)))
    }

    pub fn entries(&self, range: impl RangeBounds<u64>) -> Result<Vec<RaftEntry>, StoreError> {
        let transaction = self.store.database.begin_read()?;
        let entries = transaction.open_table(ENTRIES)?;
        let bounds: (Bound<u64>, Bound<u64>) = (range.start_bound().cloned(), range.end_bound().cloned());
        let mut found = Vec::new();
        for item in entries.range(bounds)? {
            let (_, bytes) = item?;
            found.push(decode("entry", bytes.value())?);
        }
        Ok(found)
    }

    pub fn append(&self, entries: impl IntoIterator<Item = RaftEntry>) -> Result<(), StoreError> {
        self.write(|transaction| put_entries(transaction, entries))
    }

    /// Removes the entries from this index on.
    pub fn truncate(&self, from: u64) -> Result<(), StoreError> {
        self.write(|transaction| Ok(transaction.open_table(ENTRIES)?.retain_in(from.., |_, _| false)?))
    }

    /// Removes the entries up to this one.
    pub fn purge(&self, upto: RaftLogId) -> Result<(), StoreError> {
        self.write(|transaction| {
            transaction.open_table(ENTRIES)?.retain_in(..=upto.index, |_, _| false)?;
            put(transaction, PURGED, &upto)
        })
    }

    fn check(&self) -> Result<(), StoreError> {
        if self.store.session.load(Ordering::SeqCst) == self.number { Ok(()) } else { Err(StoreError::Ended) }
    }

    fn write(&self, work: impl FnOnce(&WriteTransaction) -> Result<(), StoreError>) -> Result<(), StoreError> {
        let transaction = self.store.database.begin_write()?;
        // Only one write transaction is open at a time: whoever ends this session has done so before or waits.
        self.check()?;
        work(&transaction)?;
        transaction.commit()?;
        Ok(())
    }
}

fn open_database(path: &Path, create: bool) -> Result<Database, StoreError> {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_BYTES);
    let opened = if create { builder.create(path) } else { builder.open(path) };
    opened.map_err(|error| StoreError::Open { path: path.display().to_string(), reason: error.to_string() })
}

fn last_log_id(transaction: &WriteTransaction) -> Result<Option<RaftLogId>, StoreError> {
    let entries = transaction.open_table(ENTRIES)?;
    let last = entries.last()?.map(|(_, bytes)| decode::<RaftEntry>("entry", bytes.value())).transpose()?;
    drop(entries);
    let purged: Option<RaftLogId> = get(transaction, PURGED)?;
    let snapshot: Option<StoredSnapshot> = get(transaction, SNAPSHOT)?;
    Ok(last.map(|entry| entry.log_id).max(purged).max(snapshot.and_then(|snapshot| snapshot.last_log_id)))
}

fn put_entries(transaction: &WriteTransaction, entries: impl IntoIterator<Item = RaftEntry>) -> Result<(), StoreError> {
    let mut table = transaction.open_table(ENTRIES)?;
    for entry in entries {
        table.insert(entry.log_id.index, encode(&entry).as_slice())?;
    }
    Ok(())
}

fn put<T: Serialize>(transaction: &WriteTransaction, name: &str, value: &T) -> Result<(), StoreError> {
    transaction.open_table(FACTS)?.insert(name, encode(value).as_slice())?;
    Ok(())
}

fn get<T: DeserializeOwned>(transaction: &WriteTransaction, name: &str) -> Result<Option<T>, StoreError> {
    let facts = transaction.open_table(FACTS)?;
    let value = facts.get(name)?;
    value.map(|bytes| decode(name, bytes.value())).transpose()
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("what the log holds always becomes JSON")
}

fn decode<T: DeserializeOwned>(name: &str, bytes: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(bytes).map_err(|error| StoreError::Damaged(format!("{name}: {error}")))
}

/// The voters and learners of a membership.
pub fn members(membership: &RaftMembership) -> (Vec<NodeId>, Vec<NodeId>) {
    let voters: BTreeSet<u64> = membership.voter_ids().collect();
    let learners = membership.nodes().map(|(id, _)| *id).filter(|id| !voters.contains(id)).map(NodeId).collect();
    (voters.into_iter().map(NodeId).collect(), learners)
}
