//! The cluster log: openraft on redb.
//!
//! What is kept: the log's entries, this node's vote, the newest snapshot, this node's epoch record and the log's
//! *lineage*. The lineage is the epoch for which this log was born, forced or emptied: two logs of different lineages are
//! different histories, and nothing of one is ever taken into the other. A log that was emptied takes on the lineage of
//! whoever fills it.

pub mod engine;
pub mod machine;
pub mod network;
pub mod raft_store;
pub mod store;
#[cfg(test)]
mod tests;

use pollux_cluster::Entry;
use std::io::Cursor;

openraft::declare_raft_types!(
    /// The types that the log is made of. Nodes carry no address: those are in the configuration.
    pub LogTypes:
        D = Entry,
        R = (),
        NodeId = u64,
        Node = openraft::EmptyNode,
        Entry = openraft::Entry<LogTypes>,
        SnapshotData = Cursor<Vec<u8>>,
        AsyncRuntime = openraft::TokioRuntime,
);

pub type Raft = openraft::Raft<LogTypes>;
pub type RaftLogId = openraft::LogId<u64>;
pub type RaftVote = openraft::Vote<u64>;
pub type RaftMembership = openraft::StoredMembership<u64, openraft::EmptyNode>;
pub type RaftEntry = openraft::Entry<LogTypes>;
pub type RaftStorageError = openraft::StorageError<u64>;
