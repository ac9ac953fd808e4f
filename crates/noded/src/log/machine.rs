//! The state that the log makes, for snapshots, and the way of each committed entry to the core.
//!
//! It lives as long as the process: when the engine is restarted (forced, given up) it goes on where it is, so that the
//! core sees each entry once. The lock is held while an entry is applied and handed on: the core gets them in order.

use super::raft_store::{failed, write};
use super::store::{Session, StoreError, StoredSnapshot};
use super::{LogTypes, RaftEntry, RaftLogId, RaftMembership, RaftStorageError};
use openraft::storage::RaftStateMachine;
use openraft::{
    EmptyNode, EntryPayload, ErrorSubject, ErrorVerb, OptionalSend, RaftSnapshotBuilder, Snapshot, SnapshotMeta,
};
use pollux_base::Epoch;
use pollux_cluster::{Input, State};
use std::io::Cursor;
use std::sync::Arc;
use tokio::sync::{Mutex, mpsc};

#[derive(Default)]
struct Applied {
    last: Option<RaftLogId>,
    membership: RaftMembership,
    state: State,
    /// Number of the engine's run that may apply; an earlier one is refused.
    run: u64,
}

/// What outlives the engine's runs.
#[derive(Clone)]
pub struct Shared {
    applied: Arc<Mutex<Applied>>,
    core: mpsc::Sender<Input>,
}

impl Shared {
    /// Begins with the stored snapshot, if there is one; the core is given it first.
    pub async fn load(session: &Session, core: mpsc::Sender<Input>) -> Result<Shared, StoreError> {
        let shared = Shared { applied: Arc::default(), core };
        shared.reload(session).await?;
        Ok(shared)
    }

    /// Takes on the stored snapshot, if there is one.
    pub async fn reload(&self, session: &Session) -> Result<(), StoreError> {
        if let Some(snapshot) = session.snapshot()? {
            let mut applied = self.applied.lock().await;
            self.replace(&mut applied, &snapshot).await?;
        }
        Ok(())
    }

    /// A state machine for the engine's next run; that of the run before applies nothing any more.
    pub async fn machine(&self, session: Session) -> Machine {
        let mut applied = self.applied.lock().await;
        applied.run += 1;
        Machine { shared: self.clone(), session, run: applied.run }
    }

    /// The log was given up: what comes next belongs to another.
    pub async fn forget(&self, epoch: Epoch) {
        let mut applied = self.applied.lock().await;
        *applied = Applied { run: applied.run + 1, ..Applied::default() };
        self.tell(Input::LogGivenUp { epoch }).await;
    }

    async fn replace(&self, applied: &mut Applied, snapshot: &StoredSnapshot) -> Result<(), StoreError> {
        let state: State =
            serde_json::from_str(&snapshot.state).map_err(|error| StoreError::Damaged(format!("snapshot: {error}")))?;
        applied.last = snapshot.last_log_id;
        applied.membership = snapshot.membership.clone();
        applied.state = state.clone();
        let index = snapshot.last_log_id.map_or(0, |last| last.index);
        self.tell(Input::Snapshot { index, state: Box::new(state) }).await;
        Ok(())
    }

    async fn tell(&self, input: Input) {
        // The core is gone only when the process ends.
        let _ = self.core.send(input).await;
    }
}

/// The state machine of one run of the engine.
#[derive(Clone)]
pub struct Machine {
    shared: Shared,
    session: Session,
    run: u64,
}

impl Machine {
    async fn applied(&self) -> Result<tokio::sync::MutexGuard<'_, Applied>, RaftStorageError> {
        let applied = self.shared.applied.lock().await;
        if applied.run == self.run {
            Ok(applied)
        } else {
            Err(failed(ErrorSubject::StateMachine, ErrorVerb::Write, StoreError::Ended))
        }
    }
}

impl RaftStateMachine<LogTypes> for Machine {
    type SnapshotBuilder = Machine;

    async fn applied_state(&mut self) -> Result<(Option<RaftLogId>, RaftMembership), RaftStorageError> {
        let applied = self.applied().await?;
        Ok((applied.last, applied.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<()>, RaftStorageError>
    where
        I: IntoIterator<Item = RaftEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut applied = self.applied().await?;
        let mut answers = Vec::new();
        for entry in entries {
            applied.last = Some(entry.log_id);
            match entry.payload {
                EntryPayload::Blank => {}
                EntryPayload::Membership(membership) => {
                    applied.membership = RaftMembership::new(Some(entry.log_id), membership);
                }
                EntryPayload::Normal(change) => {
                    // A refusal is an outcome like any other: it is the core that answers whoever asked.
                    let _ = applied.state.apply(entry.log_id.index, &change);
                    self.shared.tell(Input::Committed { index: entry.log_id.index, entry: change }).await;
                }
            }
            answers.push(());
        }
        Ok(answers)
    }

    async fn get_snapshot_builder(&mut self) -> Machine {
        self.clone()
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<Cursor<Vec<u8>>>, RaftStorageError> {
        Ok(Box::default())
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta<u64, EmptyNode>,
        snapshot: Box<Cursor<Vec<u8>>>,
    ) -> Result<(), RaftStorageError> {
        let subject = || ErrorSubject::Snapshot(Some(meta.signature()));
        let state = String::from_utf8(snapshot.into_inner())
            .map_err(|_| failed(subject(), ErrorVerb::Read, StoreError::Damaged("the snapshot is not text".into())))?;
        let stored = StoredSnapshot {
            last_log_id: meta.last_log_id,
            membership: meta.last_membership.clone(),
            id: meta.snapshot_id.clone(),
            state,
        };
        let mut applied = self.applied().await?;
        let saved = stored.clone();
        write(&self.session, subject(), move |session| session.save_snapshot(&saved)).await?;
        self.shared.replace(&mut applied, &stored).await.map_err(|error| failed(subject(), ErrorVerb::Read, error))
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<LogTypes>>, RaftStorageError> {
        let stored =
            self.session.snapshot().map_err(|error| failed(ErrorSubject::Snapshot(None), ErrorVerb::Read, error))?;
        Ok(stored.map(readable))
    }
}

impl RaftSnapshotBuilder<LogTypes> for Machine {
    async fn build_snapshot(&mut self) -> Result<Snapshot<LogTypes>, RaftStorageError> {
        let stored = {
            let applied = self.applied().await?;
            StoredSnapshot {
                last_log_id: applied.last,
                membership: applied.membership.clone(),
                id: applied.last.map_or_else(|| "empty".into(), |last| last.to_string()),
                state: serde_json::to_string(&applied.state).expect("the state always becomes JSON"),
            }
        };
        let saved = stored.clone();
        write(&self.session, ErrorSubject::Snapshot(None), move |session| session.save_snapshot(&saved)).await?;
        Ok(readable(stored))
    }
}

fn readable(stored: StoredSnapshot) -> Snapshot<LogTypes> {
    let meta =
        SnapshotMeta { last_log_id: stored.last_log_id, last_membership: stored.membership, snapshot_id: stored.id };
    Snapshot { meta, snapshot: Box::new(Cursor::new(stored.state.into_bytes())) }
}
