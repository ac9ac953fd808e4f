//! openraft's view of the store. Writes wait for the disk on a thread of their own.

use super::store::{Session, StoreError};
use super::{LogTypes, RaftEntry, RaftLogId, RaftStorageError, RaftVote};
use openraft::storage::{LogFlushed, RaftLogStorage};
use openraft::{AnyError, ErrorSubject, ErrorVerb, LogState, OptionalSend, RaftLogReader, StorageIOError};
use std::fmt::Debug;
use std::ops::RangeBounds;

/// The log as openraft writes and reads it.
#[derive(Clone)]
pub struct LogStore(pub Session);

impl RaftLogReader<LogTypes> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<RaftEntry>, RaftStorageError> {
        self.0.entries(range).map_err(|error| failed(ErrorSubject::Logs, ErrorVerb::Read, error))
    }
}

impl RaftLogStorage<LogTypes> for LogStore {
    type LogReader = LogStore;

    async fn get_log_state(&mut self) -> Result<LogState<LogTypes>, RaftStorageError> {
        let (last_purged_log_id, last_log_id) =
            self.0.ends().map_err(|error| failed(ErrorSubject::Logs, ErrorVerb::Read, error))?;
        Ok(LogState { last_purged_log_id, last_log_id })
    }

    async fn get_log_reader(&mut self) -> LogStore {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &RaftVote) -> Result<(), RaftStorageError> {
        let vote = *vote;
        self.write(ErrorSubject::Vote, move |session| session.save_vote(&vote)).await
    }

    async fn read_vote(&mut self) -> Result<Option<RaftVote>, RaftStorageError> {
        self.0.vote().map_err(|error| failed(ErrorSubject::Vote, ErrorVerb::Read, error))
    }

    async fn save_committed(&mut self, committed: Option<RaftLogId>) -> Result<(), RaftStorageError> {
        self.write(ErrorSubject::Store, move |session| session.save_committed(committed)).await
    }

    async fn read_committed(&mut self) -> Result<Option<RaftLogId>, RaftStorageError> {
        self.0.committed().map_err(|error| failed(ErrorSubject::Store, ErrorVerb::Read, error))
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<LogTypes>) -> Result<(), RaftStorageError>
    where
        I: IntoIterator<Item = RaftEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<RaftEntry> = entries.into_iter().collect();
        self.write(ErrorSubject::Logs, move |session| session.append(entries)).await?;
        callback.log_io_completed(Ok(()));
        Ok(())
    }

    async fn truncate(&mut self, log_id: RaftLogId) -> Result<(), RaftStorageError> {
        self.write(ErrorSubject::Log(log_id), move |session| session.truncate(log_id.index)).await
    }

    async fn purge(&mut self, log_id: RaftLogId) -> Result<(), RaftStorageError> {
        self.write(ErrorSubject::Log(log_id), move |session| session.purge(log_id)).await
    }
}

impl LogStore {
    async fn write(
        &self,
        subject: ErrorSubject<u64>,
        work: impl FnOnce(&Session) -> Result<(), StoreError> + Send + 'static,
    ) -> Result<(), RaftStorageError> {
        write(&self.0, subject, work).await
    }
}

/// Does a write on a thread that may wait for the disk.
pub async fn write(
    session: &Session,
    subject: ErrorSubject<u64>,
    work: impl FnOnce(&Session) -> Result<(), StoreError> + Send + 'static,
) -> Result<(), RaftStorageError> {
    let session = session.clone();
    let result = tokio::task::spawn_blocking(move || work(&session)).await;
    result
        .unwrap_or_else(|error| Err(StoreError::Failed(error.to_string())))
        .map_err(|error| failed(subject, ErrorVerb::Write, error))
}

pub fn failed(subject: ErrorSubject<u64>, verb: ErrorVerb, error: StoreError) -> RaftStorageError {
    StorageIOError::new(subject, verb, AnyError::new(&error)).into()
}
