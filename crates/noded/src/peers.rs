//! Calls between the nodes of a cluster: JSON over HTTPS, each with a bound in time.
//!
//! A call names the cluster, the sender, the receiver and the epoch it is made under. Whoever does not hold the cluster's
//! secret is refused before the body is read. A node is tried at one address after the other; an attempt that is given up
//! half-way leaves the next address for the next attempt, so a dead path costs one call, not all.

use crate::link_keys::link_secret;
use crate::log::store::Lineage;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::Request;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use pollux_base::config::NodeConfig;
use pollux_base::{ClusterId, Epoch, NodeId, Secret};
use rustls::pki_types::ServerName;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Header that proves knowledge of the cluster's secret.
pub const SECRET_HEADER: &str = "x-pollux-peer";
/// A call carries at most this: a piece of a snapshot, or a batch of entries.
pub const CALL_BYTES_MAX: usize = 32 << 20;
/// Idle connections kept per peer: the log's own, a greeting and a proposal at once.
const IDLE_MAX: usize = 4;

/// What every call carries.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Envelope<T> {
    pub cluster: ClusterId,
    pub from: NodeId,
    pub to: NodeId,
    /// The epoch under which the sender acts.
    pub epoch: Epoch,
    /// Which history the sender's log belongs to.
    pub lineage: Epoch,
    pub body: T,
}

/// What every call is answered with.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer<T> {
    Done(T),
    Refused(Refusal),
}

/// Why a call was not taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    #[error("the call is for cluster {0}")]
    OtherCluster(ClusterId),
    #[error("the call is for node {0}")]
    OtherNode(NodeId),
    /// The sender's log is of another history: one of the two is outdated.
    #[error("the log here is of lineage {here} (epoch {epoch}), the call of lineage {call}")]
    OtherLineage { here: Epoch, call: Epoch, epoch: Epoch },
    #[error("{0}")]
    NotNow(String),
}

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    #[error("node {0} is not configured")]
    Unknown(NodeId),
    #[error("{0}")]
    Unreachable(String),
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
    #[error("the answer makes no sense: {0}")]
    BadAnswer(String),
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// Who may be answered: kept up to date by the log's engine and the core.
#[derive(Debug)]
pub struct Gate {
    pub cluster: ClusterId,
    pub node: NodeId,
    present: Mutex<Present>,
}

#[derive(Clone, Copy, Debug)]
struct Present {
    epoch: Epoch,
    lineage: Lineage,
}

impl Gate {
    pub fn new(cluster: ClusterId, node: NodeId, lineage: Lineage) -> Gate {
        Gate { cluster, node, present: Mutex::new(Present { epoch: Epoch(0), lineage }) }
    }
    pub fn set_epoch(&self, epoch: Epoch) {
        self.present().epoch = epoch;
    }
    pub fn set_lineage(&self, lineage: Lineage) {
        self.present().lineage = lineage;
    }
    pub fn lineage(&self) -> Lineage {
        self.present().lineage
    }
    fn present(&self) -> std::sync::MutexGuard<'_, Present> {
        self.present.lock().expect("nothing panics while holding this lock")
    }

    /// Puts what every call carries around a body.
    pub fn wrap<T>(&self, to: NodeId, body: T) -> Envelope<T> {
        let Present { epoch, lineage } = *self.present();
        Envelope { cluster: self.cluster, from: self.node, to, epoch, lineage: lineage.epoch, body }
    }

    /// Whether the call is meant for this node.
    pub fn check_address<T>(&self, call: &Envelope<T>) -> Result<(), Refusal> {
        if call.cluster != self.cluster {
            return Err(Refusal::OtherCluster(call.cluster));
        }
        if call.to != self.node {
            return Err(Refusal::OtherNode(call.to));
        }
        Ok(())
    }

    /// Whether the call is of the same log. `Ok(true)`: this node's log is empty and waits to be filled by one like it.
    pub fn check_lineage<T>(&self, call: &Envelope<T>) -> Result<bool, Refusal> {
        self.check_address(call)?;
        let Present { epoch, lineage } = *self.present();
        if lineage.joining && call.epoch >= lineage.emptied_for {
            return Ok(true);
        }
        if !lineage.joining && call.lineage == lineage.epoch {
            return Ok(false);
        }
        Err(Refusal::OtherLineage { here: lineage.epoch, call: call.lineage, epoch })
    }
}

/// The other nodes, as they are called.
pub struct Peers {
    peers: BTreeMap<NodeId, Peer>,
    connector: TlsConnector,
    secret: String,
}

struct Peer {
    addresses: Vec<SocketAddr>,
    /// The address to try next.
    next: AtomicUsize,
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
}

impl Peers {
    pub fn new(config: &NodeConfig, connector: TlsConnector, secret: String) -> Peers {
        let peers = config.peers().map(|peer| {
            let peer_of = Peer { addresses: peer.api.clone(), next: AtomicUsize::new(0), idle: Mutex::default() };
            (peer.node, peer_of)
        });
        Peers { peers: peers.collect(), connector, secret }
    }

    /// Asks a node, and waits for its answer at most `timeout`.
    pub async fn call<T: Serialize, R: DeserializeOwned>(
        &self,
        node: NodeId,
        path: &str,
        call: &Envelope<T>,
        timeout: Duration,
    ) -> Result<R, CallError> {
        let body = serde_json::to_vec(call).map_err(|error| CallError::BadAnswer(error.to_string()))?;
        let answered = tokio::time::timeout(timeout, self.post(node, path, Bytes::from(body)));
        let bytes = answered.await.map_err(|_| CallError::TimedOut(timeout))??;
        parsed(&bytes)
    }

    async fn post(&self, node: NodeId, path: &str, body: Bytes) -> Result<Bytes, CallError> {
        let peer = self.peers.get(&node).ok_or(CallError::Unknown(node))?;
        // A kept connection may have died unseen. Calls may be made twice, so the second attempt is on a new one.
        if let Some(sender) = peer.take_idle()
            && let Ok(bytes) = self.post_on(peer, sender, path, body.clone()).await
        {
            return Ok(bytes);
        }
        let sender = self.connect(peer).await?;
        self.post_on(peer, sender, path, body).await
    }

    async fn post_on(
        &self,
        peer: &Peer,
        sender: SendRequest<Full<Bytes>>,
        path: &str,
        body: Bytes,
    ) -> Result<Bytes, CallError> {
        let (bytes, sender) = self.ask_on(sender, path, body).await?;
        peer.keep(sender);
        Ok(bytes)
    }

    async fn ask_on(
        &self,
        mut sender: SendRequest<Full<Bytes>>,
        path: &str,
        body: Bytes,
    ) -> Result<(Bytes, SendRequest<Full<Bytes>>), CallError> {
        let lost = |error: hyper::Error| CallError::Unreachable(error.to_string());
        sender.ready().await.map_err(lost)?;
        let request = Request::post(path)
            .header("host", "pollux")
            .header("content-type", "application/json")
            .header(SECRET_HEADER, &self.secret)
            .body(Full::new(body))
            .map_err(|error| CallError::BadAnswer(error.to_string()))?;
        let response = sender.send_request(request).await.map_err(lost)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), CALL_BYTES_MAX).collect().await;
        let bytes = body.map_err(|error| CallError::Unreachable(error.to_string()))?.to_bytes();
        if !status.is_success() {
            return Err(CallError::BadAnswer(format!("HTTP status {status}")));
        }
        Ok((bytes, sender))
    }

    /// Asks a node over a connection made for this one call, of which both ends know a secret: `make` makes the call of
    /// it.
    pub async fn call_with_secret<T: Serialize, R: DeserializeOwned>(
        &self,
        node: NodeId,
        path: &str,
        make: impl FnOnce(&Secret) -> Envelope<T>,
        timeout: Duration,
    ) -> Result<(R, Secret), CallError> {
        let peer = self.peers.get(&node).ok_or(CallError::Unknown(node))?;
        let ask = async {
            let stream = self.open(peer).await?;
            let secret = link_secret(stream.get_ref().1)
                .ok_or_else(|| CallError::BadAnswer("its TLS gives no secret; both nodes need TLS 1.3".into()))?;
            let body = serde_json::to_vec(&make(&secret)).map_err(|error| CallError::BadAnswer(error.to_string()))?;
            let unreachable = |error: hyper::Error| CallError::Unreachable(error.to_string());
            let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(unreachable)?;
            let carrying = tokio::spawn(connection);
            let answer = self.ask_on(sender, path, Bytes::from(body)).await.map(|(bytes, _)| bytes);
            carrying.abort();
            Ok::<_, CallError>((parsed(&answer?)?, secret))
        };
        tokio::time::timeout(timeout, ask).await.map_err(|_| CallError::TimedOut(timeout))?
    }

    async fn connect(&self, peer: &Peer) -> Result<SendRequest<Full<Bytes>>, CallError> {
        let stream = self.open(peer).await?;
        let unreachable = |error: hyper::Error| CallError::Unreachable(error.to_string());
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(unreachable)?;
        tokio::spawn(connection);
        Ok(sender)
    }

    async fn open(&self, peer: &Peer) -> Result<TlsStream<TcpStream>, CallError> {
        if peer.addresses.is_empty() {
            return Err(CallError::Unreachable("it has no address".into()));
        }
        let turn = peer.next.load(Ordering::Relaxed) % peer.addresses.len();
        // If this attempt fails, or is given up by the caller, the next one is made at the next address.
        peer.next.store(turn + 1, Ordering::Relaxed);
        let address = peer.addresses[turn];
        let unreachable = |error: &dyn std::fmt::Display| CallError::Unreachable(format!("{address}: {error}"));
        let stream = TcpStream::connect(address).await.map_err(|error| unreachable(&error))?;
        let _ = stream.set_nodelay(true);
        let name = ServerName::from(address.ip());
        let stream = self.connector.connect(name, stream).await.map_err(|error| unreachable(&error))?;
        peer.next.store(turn, Ordering::Relaxed);
        Ok(stream)
    }
}

impl Peer {
    fn take_idle(&self) -> Option<SendRequest<Full<Bytes>>> {
        let mut idle = self.idle.lock().expect("nothing panics while holding this lock");
        idle.retain(|sender| !sender.is_closed());
        idle.pop()
    }
    fn keep(&self, sender: SendRequest<Full<Bytes>>) {
        let mut idle = self.idle.lock().expect("nothing panics while holding this lock");
        if idle.len() < IDLE_MAX {
            idle.push(sender);
        }
    }
}

fn parsed<R: DeserializeOwned>(bytes: &[u8]) -> Result<R, CallError> {
    match serde_json::from_slice(bytes).map_err(|error| CallError::BadAnswer(error.to_string()))? {
        Answer::Done(body) => Ok(body),
        Answer::Refused(refusal) => Err(refusal.into()),
    }
}

/// What is sent as `SECRET_HEADER`: derived, so that the secret itself, which signs heartbeats, never travels.
pub fn secret_header(secret: &[u8]) -> String {
    blake3::Hash::from(blake3::derive_key("pollux 1 call between nodes", secret)).to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(lineage: Lineage) -> Gate {
        Gate::new(ClusterId(1), NodeId(1), lineage)
    }
    fn call(epoch: u64, lineage: u64) -> Envelope<()> {
        let (epoch, lineage) = (Epoch(epoch), Epoch(lineage));
        Envelope { cluster: ClusterId(1), from: NodeId(2), to: NodeId(1), epoch, lineage, body: () }
    }
    const FORCED: Lineage = Lineage { epoch: Epoch(2), joining: false, emptied_for: Epoch(0) };

    #[test]
    fn a_call_of_another_history_is_refused() {
        let gate = gate(FORCED);
        assert_eq!(gate.check_lineage(&call(2, 2)), Ok(false));
        assert_eq!(gate.check_lineage(&call(3, 2)), Ok(false), "the epoch was raised without a new history");
        assert!(gate.check_lineage(&call(1, 0)).is_err(), "an outdated node");
        assert!(gate.check_lineage(&call(4, 4)).is_err(), "a newer history: this log must be given up first");
        let strange = Envelope { cluster: ClusterId(9), ..call(2, 2) };
        assert_eq!(gate.check_lineage(&strange), Err(Refusal::OtherCluster(ClusterId(9))));
    }

    #[test]
    fn an_emptied_log_is_filled_by_its_holder_and_by_none_older() {
        let gate = gate(Lineage { joining: true, emptied_for: Epoch(4), ..FORCED });
        assert_eq!(gate.check_lineage(&call(4, 4)), Ok(true));
        assert!(gate.check_lineage(&call(2, 2)).is_err());
    }
}
