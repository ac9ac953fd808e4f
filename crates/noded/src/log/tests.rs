//! The log's promises: openraft's own storage suite, and two nodes that part and meet again.

use super::engine::{Command, Log, prepare};
use super::machine::{Machine, Shared};
use super::network::{LogCall, Transport};
use super::raft_store::LogStore;
use super::store::{Session, Store};
use super::{LogTypes, RaftStorageError};
use crate::peers::{CallError, Envelope, Gate, Refusal};
use openraft::testing::{StoreBuilder, Suite};
use pollux_base::{ClusterId, Epoch, NodeId};
use pollux_cluster::entry::Subject;
use pollux_cluster::{Change, Entry, Input};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;
use tokio::sync::mpsc;

const CLUSTER: ClusterId = ClusterId(1);
const ONE: NodeId = NodeId(1);
const TWO: NodeId = NodeId(2);
/// Bounds every wait; far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(20);

fn store_file(folder: &Path, node: NodeId) -> PathBuf {
    folder.join(format!("{node}.redb"))
}

fn new_store(folder: &Path, node: NodeId) -> Arc<Store> {
    let path = store_file(folder, node);
    Store::prepare(&path, CLUSTER, node).unwrap();
    Store::open(&path, CLUSTER, node).unwrap()
}

/// What openraft itself asks of a store.
#[test]
fn the_store_keeps_openrafts_promises() {
    struct Builder;
    impl StoreBuilder<LogTypes, LogStore, Machine, TempDir> for Builder {
        async fn build(&self) -> Result<(TempDir, LogStore, Machine), RaftStorageError> {
            let folder = tempfile::tempdir().unwrap();
            let session = Session::begin(&new_store(folder.path(), ONE));
            let (core, mut inputs) = mpsc::channel(16);
            tokio::spawn(async move { while inputs.recv().await.is_some() {} });
            let machine = Shared::load(&session, core).await.unwrap().machine(session.clone()).await;
            Ok((folder, LogStore(session), machine))
        }
    }
    Suite::<LogTypes, LogStore, Machine, Builder, TempDir>::test_all(Builder).unwrap();
}

#[test]
fn a_store_of_another_node_is_refused_and_a_missing_one_is_not_made() {
    let folder = tempfile::tempdir().unwrap();
    let path = store_file(folder.path(), ONE);
    assert!(Store::open(&path, CLUSTER, ONE).is_err());
    assert!(!path.exists());
    assert!(Store::prepare(&path, CLUSTER, ONE).unwrap());
    assert!(!Store::prepare(&path, CLUSTER, ONE).unwrap(), "prepared once");
    let refused = Store::open(&path, CLUSTER, TWO).err().unwrap().to_string();
    assert!(refused.contains("belongs to node n1"), "{refused}");
    std::fs::write(&path, b"no database at all").unwrap();
    assert!(Store::open(&path, CLUSTER, ONE).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"no database at all", "left untouched");
}

/// The nodes that are switched on, by which calls find each other.
#[derive(Default)]
struct Site(Mutex<BTreeMap<NodeId, Log>>);

struct SiteTransport {
    site: Arc<Site>,
    gate: Arc<Gate>,
}

impl Transport for SiteTransport {
    async fn call(&self, to: NodeId, call: LogCall, timeout: Duration) -> Result<serde_json::Value, CallError> {
        let both = {
            let site = self.site.0.lock().unwrap();
            site.get(&to).cloned().filter(|_| site.contains_key(&self.gate.node))
        };
        let target = both.ok_or_else(|| CallError::Unreachable("cut".into()))?;
        // Through text, as over the wire.
        let call: Envelope<LogCall> =
            serde_json::from_slice(&serde_json::to_vec(&self.gate.wrap(to, call)).unwrap()).unwrap();
        let answer = tokio::time::timeout(timeout, target.serve(call)).await;
        Ok(answer.map_err(|_| CallError::TimedOut(timeout))??)
    }
}

/// One node: its log, and what its core was told.
struct Member {
    log: Log,
    gate: Arc<Gate>,
    inputs: mpsc::Receiver<Input>,
    /// Notes committed since the start or the last giving up.
    notes: Vec<String>,
    voters: Vec<NodeId>,
    leader: Option<NodeId>,
}

impl Member {
    async fn start(site: &Arc<Site>, store: Arc<Store>, node: NodeId) -> Member {
        let gate = Arc::new(Gate::new(CLUSTER, node, store.lineage().unwrap()));
        let transport = Arc::new(SiteTransport { site: site.clone(), gate: gate.clone() });
        let (core, inputs) = mpsc::channel(1024);
        let (fatal, _) = mpsc::channel(1);
        let (log, task) = prepare(node, store, gate.clone());
        task.start(transport, core, fatal).await.unwrap();
        site.0.lock().unwrap().insert(node, log.clone());
        Member { log, gate, inputs, notes: Vec::new(), voters: Vec::new(), leader: None }
    }

    /// Takes what the core is told until it is so.
    async fn until(&mut self, what: &str, is_so: impl Fn(&Member) -> bool) {
        let waited = tokio::time::timeout(PATIENCE, async {
            while !is_so(self) {
                match self.inputs.recv().await.expect("the log goes on") {
                    Input::Committed { entry: Entry { change: Change::Note { text, .. }, .. }, .. } => {
                        self.notes.push(text);
                    }
                    Input::Log { leader, voters, .. } => {
                        self.voters = voters;
                        self.leader = leader;
                    }
                    Input::LogGivenUp { .. } => self.notes.clear(),
                    Input::Snapshot { state, .. } => {
                        self.notes = state.events.iter().map(|event| event.text.clone()).collect();
                    }
                    _ => {}
                }
            }
        });
        waited.await.unwrap_or_else(|_| panic!("{what}: notes {:?} voters {:?}", self.notes, self.voters));
    }

    async fn until_noted(&mut self, text: &str) {
        self.until(text, |member| member.notes.iter().any(|note| note == text)).await;
    }

    fn propose(&self, text: &str) {
        self.log.command(Command::Propose(note(text)));
    }
}

fn entry(change: Change) -> Entry {
    Entry { by: ONE, unix_ms: 0, request: None, change }
}
fn note(text: &str) -> Entry {
    entry(Change::Note { subject: Subject::Cluster, text: text.into() })
}
fn leader<'a>(one: &'a Member, two: &'a Member) -> &'a Member {
    if one.leader == Some(ONE) { one } else { two }
}

async fn pair(folder: &Path) -> (Arc<Site>, Member, Member) {
    let site = Arc::new(Site::default());
    let mut one = Member::start(&site, new_store(folder, ONE), ONE).await;
    let mut two = Member::start(&site, new_store(folder, TWO), TWO).await;
    one.log.command(Command::Init { voters: vec![ONE, TWO] });
    one.until("born", |one| one.leader.is_some() && one.voters == [ONE, TWO]).await;
    two.until("born", |two| two.leader == one.leader && two.voters == [ONE, TWO]).await;
    (site, one, two)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forced_log_goes_on_alone_and_takes_the_other_in_again() {
    let folder = tempfile::tempdir().unwrap();
    let (site, mut one, mut two) = pair(folder.path()).await;
    leader(&one, &two).propose("together");
    one.until_noted("together").await;
    two.until_noted("together").await;

    // Cut: the side that leads may still write into its own log, but nothing is committed.
    site.0.lock().unwrap().remove(&TWO);
    leader(&one, &two).propose("unanswered");
    one.log.command(Command::ForceAlone { epoch: Epoch(2) });
    one.until("alone", |one| one.voters == [ONE] && one.leader == Some(ONE)).await;
    one.propose("alone");
    one.until_noted("alone").await;
    assert_eq!(one.notes.iter().filter(|note| *note == "together").count(), 1, "each entry once");
    assert!(!two.notes.iter().any(|note| note == "unanswered"));

    // The other is heard again, but its log is of another history: neither is taken into the other.
    site.0.lock().unwrap().insert(TWO, two.log.clone());
    let outdated =
        two.gate.wrap(ONE, LogCall::Vote(openraft::raft::VoteRequest::new(openraft::Vote::new(99, 2), None)));
    let refused = one.log.serve(outdated).await;
    assert_eq!(refused, Err(Refusal::OtherLineage { here: Epoch(2), call: Epoch(0), epoch: Epoch(0) }));

    // It gives up its log and is taken in.
    one.gate.set_epoch(Epoch(2));
    two.log.command(Command::GiveUp { epoch: Epoch(2) });
    two.until("gave up", |two| two.notes.is_empty()).await;
    one.log.command(Command::TakeIn { node: TWO });
    two.until_noted("alone").await;
    one.until("both", |one| one.voters == [ONE, TWO]).await;
    two.until("both", |two| two.voters == [ONE, TWO]).await;
    one.propose("together again");
    two.until_noted("together again").await;
    one.until_noted("together again").await;
    assert_eq!(one.notes, two.notes);
    // What was proposed while cut may or may not have been committed by the force, but all agree.
    let expected: Vec<&str> = if one.notes.iter().any(|note| note == "unanswered") {
        vec!["together", "unanswered", "alone", "together again"]
    } else {
        vec!["together", "alone", "together again"]
    };
    assert_eq!(one.notes, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forcing_and_giving_up_are_done_once_for_an_epoch() {
    let folder = tempfile::tempdir().unwrap();
    let store = new_store(folder.path(), ONE);
    let site = Arc::new(Site::default());
    let mut one = Member::start(&site, store.clone(), ONE).await;
    one.log.command(Command::Init { voters: vec![ONE] });
    one.until("born", |one| one.leader == Some(ONE)).await;
    one.propose("first");
    one.until_noted("first").await;
    one.log.command(Command::ForceAlone { epoch: Epoch(2) });
    one.log.command(Command::ForceAlone { epoch: Epoch(2) });
    one.propose("second");
    one.until_noted("second").await;
    let ends = Session::begin(&store).ends().unwrap();
    assert!(!store.force_alone(ONE, Epoch(2)).unwrap());
    assert_eq!(Session::begin(&store).ends().unwrap(), ends, "nothing is written the second time");

    let store = new_store(folder.path(), TWO);
    assert!(store.give_up(Epoch(3)).unwrap());
    store.adopt_lineage(Epoch(2)).unwrap();
    assert!(!store.give_up(Epoch(3)).unwrap(), "what came since is not emptied again");
    assert!(store.give_up(Epoch(4)).unwrap());
    assert!(store.force_alone(TWO, Epoch(5)).is_err(), "an empty log is never forced");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_node_finds_its_log_and_its_authority() {
    let folder = tempfile::tempdir().unwrap();
    let site = Arc::new(Site::default());
    {
        let store = new_store(folder.path(), ONE);
        let mut one = Member::start(&site, store, ONE).await;
        one.log.command(Command::Init { voters: vec![ONE, TWO] });
        one.log.command(Command::ForceAlone { epoch: Epoch(2) });
        one.until("alone", |one| one.voters == [ONE] && one.leader == Some(ONE)).await;
        one.propose("kept");
        one.until_noted("kept").await;
        site.0.lock().unwrap().clear();
        one.log.shutdown().await;
    }
    let store = loop {
        // The tasks of the first run let go of the file when they have ended.
        match Store::open(&store_file(folder.path(), ONE), CLUSTER, ONE) {
            Ok(store) => break store,
            Err(_) => tokio::task::yield_now().await,
        }
    };
    let mut one = Member::start(&site, store, ONE).await;
    one.until_noted("kept").await;
    one.until("leads", |one| one.voters == [ONE] && one.leader == Some(ONE)).await;
    one.propose("goes on");
    one.until_noted("goes on").await;
}

#[test]
fn what_a_given_up_run_still_writes_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let store = new_store(folder.path(), ONE);
    let old = Session::begin(&store);
    old.save_vote(&openraft::Vote::new(1, 1)).unwrap();
    assert!(store.give_up(Epoch(2)).unwrap());
    assert!(old.save_vote(&openraft::Vote::new(7, 1)).is_err());
    assert_eq!(Session::begin(&store).vote().unwrap(), None);
}
