//! openraft's calls to the other nodes, and theirs to this one.

use super::{LogTypes, Raft};
use crate::peers::{CallError, Envelope, Gate, Peers, Refusal};
use openraft::error::{InstallSnapshotError, NetworkError, RPCError, RaftError, RemoteError, Unreachable};
use openraft::network::{Backoff, RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse, VoteRequest,
    VoteResponse,
};
use openraft::{AnyError, EmptyNode};
use pollux_base::NodeId;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::error::Error;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

/// Pause after a node was not reached. Shorter than an election, so that a returning node is heard before one.
const BACKOFF: Duration = Duration::from_millis(300);

/// A call of the log.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogCall {
    Append(AppendEntriesRequest<LogTypes>),
    Vote(VoteRequest<u64>),
    Snapshot(InstallSnapshotRequest<LogTypes>),
}

/// Carries out a call on this node's log; the answer is the JSON of what openraft answers.
pub async fn serve(raft: &Raft, call: LogCall) -> Result<serde_json::Value, Refusal> {
    let value = match call {
        LogCall::Append(request) => serde_json::to_value(raft.append_entries(request).await),
        LogCall::Vote(request) => serde_json::to_value(raft.vote(request).await),
        LogCall::Snapshot(request) => serde_json::to_value(raft.install_snapshot(request).await),
    };
    value.map_err(|error| Refusal::NotNow(error.to_string()))
}

/// How the log reaches other nodes. A test has its own.
pub trait Transport: Send + Sync + 'static {
    fn call(
        &self,
        to: NodeId,
        call: LogCall,
        timeout: Duration,
    ) -> impl Future<Output = Result<serde_json::Value, CallError>> + Send;
}

/// Over HTTPS.
pub struct PeerTransport {
    pub peers: Arc<Peers>,
    pub gate: Arc<Gate>,
}

impl Transport for PeerTransport {
    async fn call(&self, to: NodeId, call: LogCall, timeout: Duration) -> Result<serde_json::Value, CallError> {
        let call: Envelope<LogCall> = self.gate.wrap(to, call);
        self.peers.call(to, "/peer/v1/log", &call, timeout).await
    }
}

/// Makes a `Link` to each node.
pub struct Links<T>(pub Arc<T>);

impl<T: Transport> RaftNetworkFactory<LogTypes> for Links<T> {
    type Network = Link<T>;

    async fn new_client(&mut self, target: u64, _: &EmptyNode) -> Link<T> {
        Link { transport: self.0.clone(), target: NodeId(target) }
    }
}

/// The log's way to one node.
pub struct Link<T> {
    transport: Arc<T>,
    target: NodeId,
}

type Failure<E> = RPCError<u64, EmptyNode, E>;

impl<T: Transport> Link<T> {
    async fn call<R, E>(&self, call: LogCall, option: &RPCOption) -> Result<R, Failure<E>>
    where
        R: DeserializeOwned,
        E: Error + DeserializeOwned,
    {
        let value = match self.transport.call(self.target, call, option.hard_ttl()).await {
            Ok(value) => value,
            Err(error) => return Err(Unreachable::new(&error).into()),
        };
        let answer: Result<R, E> =
            serde_json::from_value(value).map_err(|error| NetworkError::from(AnyError::new(&error)))?;
        answer.map_err(|error| RemoteError::new(self.target.0, error).into())
    }
}

impl<T: Transport> RaftNetwork<LogTypes> for Link<T> {
    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<LogTypes>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<u64>, Failure<RaftError<u64>>> {
        self.call(LogCall::Append(request), &option).await
    }

    async fn install_snapshot(
        &mut self,
        request: InstallSnapshotRequest<LogTypes>,
        option: RPCOption,
    ) -> Result<InstallSnapshotResponse<u64>, Failure<RaftError<u64, InstallSnapshotError>>> {
        self.call(LogCall::Snapshot(request), &option).await
    }

    async fn vote(
        &mut self,
        request: VoteRequest<u64>,
        option: RPCOption,
    ) -> Result<VoteResponse<u64>, Failure<RaftError<u64>>> {
        self.call(LogCall::Vote(request), &option).await
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(BACKOFF))
    }
}
