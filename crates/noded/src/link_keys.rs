//! Keys for the replication links, agreed on with each peer and handed to `blockd`.
//!
//! The two `noded` make a TLS connection for the purpose, on which both show certificates of the cluster's CA; the key is
//! what TLS exports of it (RFC 8446, section 7.5), so it never travels, and whoever learns the nodes' private keys later
//! learns none of the past keys. It lives in memory only, here and in `blockd`.
//!
//! The node with the lower id begins, at its start and each hour; the other only when it has no key, because it was
//! restarted. Both hand the key over, so a `blockd` that was restarted has it again at once. At a common start both may begin, and
//! each then takes the other's key for the newest: so the one before is kept, too.

use crate::peers::{CallError, Gate, Peers, Refusal};
use pollux_base::config::NodeConfig;
use pollux_base::{NodeId, Order, Secret};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::ParsedCertificate;
use rustls::{ConnectionCommon, ProtocolVersion};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc;

/// How long a key is the newest.
const RENEW_EVERY: Duration = Duration::from_secs(3600);
/// Pause after an attempt that failed: guests may be waiting for this.
const RETRY: Duration = Duration::from_millis(500);
/// One agreement, with its TLS handshake.
const TIMEOUT: Duration = Duration::from_secs(2);

/// As many keys as `blockd` keeps for a peer.
const KEPT: usize = 2;

const LABEL: &[u8] = b"EXPORTER-pollux-replication-2";
pub const PATH: &str = "/peer/v1/link-key";

/// What is said about a key: its name, by which both sides see that they have the same.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct LinkKeyCall {
    pub key: u64,
}

/// Who showed a certificate of the cluster's CA on a connection, and the secret that both ends of it know.
#[derive(Clone, Debug)]
pub struct Caller {
    certificate: CertificateDer<'static>,
    secret: Secret,
}

impl Caller {
    pub fn of(connection: &rustls::ServerConnection) -> Option<Caller> {
        let certificate = connection.peer_certificates()?.first()?.clone().into_owned();
        Some(Caller { certificate, secret: link_secret(connection)? })
    }

    /// Whether the certificate is that of a node of this name.
    fn is(&self, name: &str) -> bool {
        let Ok(certificate) = ParsedCertificate::try_from(&self.certificate) else { return false };
        let Ok(name) = ServerName::try_from(name) else { return false };
        rustls::client::verify_server_name(&certificate, &name).is_ok()
    }
}

/// The secret of a connection, on which TLS 1.3 is spoken.
pub fn link_secret<Data>(connection: &ConnectionCommon<Data>) -> Option<Secret> {
    if connection.protocol_version() != Some(ProtocolVersion::TLSv1_3) {
        return None;
    }
    connection.export_keying_material([0; 32], LABEL, None).ok().map(Secret::new)
}

/// The name of a key, which tells nothing of it.
fn name_of(secret: &Secret) -> u64 {
    let digest = blake3::derive_key("pollux 2 name of a key of replication", secret.expose());
    // 0 means none.
    u64::from_le_bytes(digest[..8].try_into().expect("a digest has 32 bytes")).max(1)
}

/// The newest keys that a node has with a peer, by name, the oldest first.
#[derive(Default)]
struct Newest(VecDeque<(u64, Secret)>);

impl Newest {
    fn take(&mut self, key: u64, secret: Secret) {
        self.0.retain(|(known, _)| *known != key);
        self.0.push_back((key, secret));
        if self.0.len() > KEPT {
            self.0.pop_front();
        }
    }
}

/// The newest keys, and the way to `blockd`.
pub struct LinkKeys {
    config: Arc<NodeConfig>,
    newest: Mutex<BTreeMap<NodeId, Newest>>,
    blockd: mpsc::Sender<Order>,
}

impl LinkKeys {
    pub fn new(config: Arc<NodeConfig>, blockd: mpsc::Sender<Order>) -> LinkKeys {
        LinkKeys { config, newest: Mutex::default(), blockd }
    }

    /// `blockd` is connected: it may have none.
    pub fn hand_over_all(&self) {
        for (peer, keys) in self.newest().iter() {
            keys.0.iter().for_each(|(key, secret)| self.hand_over(*peer, *key, secret.clone()));
        }
    }

    /// A peer has come to agree on a key.
    pub fn on_call(&self, from: NodeId, call: LinkKeyCall, caller: Option<Caller>) -> Result<(), Refusal> {
        let peer = self.config.peers().find(|peer| peer.node == from);
        let peer = peer.ok_or_else(|| Refusal::NotNow(format!("node {from} is not configured here")))?;
        let caller = caller.ok_or_else(|| Refusal::NotNow("a node must show its certificate for this".into()))?;
        if !caller.is(&peer.name) {
            tracing::warn!(%from, name = peer.name, "a call for a key with a certificate of somebody else is refused");
            return Err(Refusal::NotNow(format!("the certificate shown is not one of `{}`", peer.name)));
        }
        if name_of(&caller.secret) != call.key {
            return Err(Refusal::NotNow("the two ends of the connection do not have the same secret".into()));
        }
        self.take(from, caller.secret);
        Ok(())
    }

    fn newest(&self) -> std::sync::MutexGuard<'_, BTreeMap<NodeId, Newest>> {
        self.newest.lock().expect("nothing panics while holding this lock")
    }

    fn take(&self, peer: NodeId, secret: Secret) {
        let key = name_of(&secret);
        tracing::info!(%peer, key = format!("{key:016x}"), "a new key for replication");
        self.newest().entry(peer).or_default().take(key, secret.clone());
        self.hand_over(peer, key, secret);
    }

    fn hand_over(&self, peer: NodeId, key: u64, secret: Secret) {
        // What is lost is handed over when `blockd` is connected again.
        if self.blockd.try_send(Order::LinkKey { peer, key, secret }).is_err() {
            tracing::warn!("blockd takes nothing: a key is not handed over yet");
        }
    }
}

/// Sees to it that there is a fresh key with this peer, until the process ends.
pub async fn run(peer: NodeId, keys: Arc<LinkKeys>, peers: Arc<Peers>, gate: Arc<Gate>) {
    let mut told = String::new();
    loop {
        let begins = gate.node < peer || !keys.newest().contains_key(&peer);
        if begins {
            match agree(peer, &keys, &peers, &gate).await {
                Ok(()) => told.clear(),
                Err(error) => {
                    // A peer that is down is asked for hours; but another reason is news.
                    let reason = error.to_string();
                    if told != reason {
                        tracing::warn!(%peer, "no key for replication could be agreed on: {reason}");
                        told = reason;
                    }
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
            }
        }
        tokio::time::sleep(RENEW_EVERY).await;
    }
}

async fn agree(peer: NodeId, keys: &LinkKeys, peers: &Peers, gate: &Gate) -> Result<(), CallError> {
    let make = |secret: &Secret| gate.wrap(peer, LinkKeyCall { key: name_of(secret) });
    let ((), secret) = peers.call_with_secret(peer, PATH, make, TIMEOUT).await?;
    keys.take(peer, secret);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Found by a database in a guest: when both nodes had begun at once, and both `blockd` were restarted within the hour, they
    /// had no key in common any more.
    #[test]
    fn nodes_that_begin_at_once_have_a_key_in_common_whatever_order_they_heard_of_them_in() {
        let key = |key: u64| (key, Secret::new([key as u8; 32]));
        let kept = |order: &[u64]| {
            let mut newest = Newest::default();
            order.iter().map(|id| key(*id)).for_each(|(key, secret)| newest.take(key, secret));
            newest.0.into_iter().map(|(key, _)| key).collect::<Vec<_>>()
        };
        assert_eq!((kept(&[1, 2]), kept(&[2, 1])), (vec![1, 2], vec![2, 1]));
        assert_eq!(kept(&[1, 2, 1]), [2, 1], "one that is known is the newest again");
        assert_eq!((kept(&[1, 2, 3]), kept(&[2, 1, 3])), (vec![2, 3], vec![1, 3]), "and only so many are kept");
    }
}
