//! Greetings between nodes: each second, and at each change.
//!
//! Only an answered greeting counts: it proves that the way works in both directions (verdict 8).

use crate::core::Core;
use crate::peers::{Gate, Peers};
use pollux_base::NodeId;
use pollux_cluster::{Input, PeerHello};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::Notify;

const EVERY: Duration = Duration::from_secs(1);
/// One greeting, with a new connection if need be.
const TIMEOUT: Duration = Duration::from_millis(800);
/// So many unanswered greetings in a row and the peer is said to be gone: both its addresses were tried.
const UNANSWERED_MAX: u32 = 3;

/// What the peers said of themselves when they greeted us.
#[derive(Default)]
pub struct Heard {
    hellos: Mutex<BTreeMap<NodeId, PeerHello>>,
    /// Woken when one said something new: it is greeted at once, and answers it.
    news: BTreeMap<NodeId, Notify>,
}

impl Heard {
    pub fn new(peers: impl Iterator<Item = NodeId>) -> Heard {
        Heard { hellos: Mutex::default(), news: peers.map(|peer| (peer, Notify::new())).collect() }
    }

    /// A peer has greeted us.
    pub fn on_hello(&self, hello: PeerHello) {
        let Some(news) = self.news.get(&hello.node) else { return };
        let mut hellos = self.hellos.lock().expect("nothing panics while holding this lock");
        if hellos.get(&hello.node) != Some(&hello) {
            hellos.insert(hello.node, hello);
            news.notify_one();
        }
    }
}

/// Greets one peer until the process ends.
pub async fn run(peer: NodeId, peers: Arc<Peers>, gate: Arc<Gate>, heard: Arc<Heard>, core: Core) {
    let mut hello = core.hello();
    let mut unanswered = UNANSWERED_MAX;
    loop {
        let own = hello.borrow_and_update().clone();
        let call = gate.wrap(peer, own);
        match peers.call::<_, PeerHello>(peer, "/peer/v1/hello", &call, TIMEOUT).await {
            Ok(theirs) if theirs.node == peer => {
                if unanswered >= UNANSWERED_MAX {
                    tracing::info!(%peer, "answers: {theirs:?}");
                }
                unanswered = 0;
                let _ = core.inputs.send(Input::Peer(theirs)).await;
            }
            Ok(theirs) => tracing::warn!(%peer, "answers as {}", theirs.node),
            Err(error) => {
                unanswered = unanswered.saturating_add(1);
                if unanswered == UNANSWERED_MAX {
                    tracing::warn!(%peer, "does not answer: {error}");
                    let _ = core.inputs.send(Input::PeerGone(peer)).await;
                }
            }
        }
        let news = heard.news.get(&peer);
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            _ = hello.changed() => {}
            () = async { match news { Some(news) => news.notified().await, None => std::future::pending().await } } => {}
        }
    }
}
