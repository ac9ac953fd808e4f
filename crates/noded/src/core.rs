//! The task that owns the core: gives it its inputs, carries out what it wants, and decides nothing.
//!
//! It never waits for anything but the next input: whatever takes time is handed to a task of its own, and what that
//! comes to is an input again.

use crate::hands::Hands;
use pollux_api::{ApiError, ErrorCode};
use pollux_base::guard::GuardView;
use pollux_base::order::{Differences, DiskCommand};
use pollux_base::{ExtentIndex, GroupId, Instant, NodeId, VolumeId};
use pollux_cluster::{Answer, Change, Cluster, Input, KeptCommand, Output, PeerHello, Refusal};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, oneshot, watch};

/// Inputs on their way: bursts of reports and of replayed entries; their senders wait when it is full.
pub const INPUTS_MAX: usize = 1024;
/// Questions of API requests on their way.
const QUESTIONS_MAX: usize = 256;
/// The core answers each request; this is for a core that hangs.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(25);

type Question = Box<dyn FnOnce(&Cluster) + Send>;
type Pending = Arc<Mutex<BTreeMap<u64, oneshot::Sender<Result<Answer, Refusal>>>>>;

/// The newest that the guard says; older views are of no use.
#[derive(Clone, Debug, Default)]
pub enum GuardSight {
    #[default]
    Gone,
    View(GuardView),
}

/// What the core's task listens to.
pub struct Ears {
    pub inputs: mpsc::Receiver<Input>,
    pub guard: watch::Receiver<GuardSight>,
    questions: mpsc::Receiver<Question>,
}

/// The core as the rest of the node reaches it.
#[derive(Clone)]
pub struct Core {
    pub inputs: mpsc::Sender<Input>,
    questions: mpsc::Sender<Question>,
    pending: Pending,
    next_request: Arc<AtomicU64>,
    /// Grows when something may look different.
    changes: watch::Receiver<u64>,
    hello: watch::Receiver<PeerHello>,
}

/// What the core's task tells the rest.
pub struct Voice {
    pending: Pending,
    changes: watch::Sender<u64>,
    hello: watch::Sender<PeerHello>,
}

/// The two ends of everything between the core's task and the rest. `hello`: until the core says its own.
pub fn channels(guard: watch::Receiver<GuardSight>, hello: PeerHello) -> (Core, Ears, Voice) {
    let (inputs, inputs_in) = mpsc::channel(INPUTS_MAX);
    let (questions, questions_in) = mpsc::channel(QUESTIONS_MAX);
    let (changes_out, changes) = watch::channel(0);
    let (hello_out, hello) = watch::channel(hello);
    let pending = Pending::default();
    let core =
        Core { inputs, questions, pending: pending.clone(), next_request: Arc::new(AtomicU64::new(1)), changes, hello };
    let ears = Ears { inputs: inputs_in, guard, questions: questions_in };
    (core, ears, Voice { pending, changes: changes_out, hello: hello_out })
}

/// Runs the core until the process ends.
pub async fn run(mut cluster: Cluster, mut ears: Ears, voice: Voice, mut hands: Hands) {
    loop {
        drain(&mut cluster, &voice, &mut hands);
        let deadline = cluster.deadline();
        let input = tokio::select! {
            input = ears.inputs.recv() => match input {
                Some(input) => input,
                None => return,
            },
            changed = ears.guard.changed() => {
                if changed.is_err() {
                    return;
                }
                match ears.guard.borrow_and_update().clone() {
                    GuardSight::Gone => Input::GuardGone,
                    GuardSight::View(view) => Input::Guard(view),
                }
            }
            Some(question) = ears.questions.recv() => {
                question(&cluster);
                continue;
            }
            () = sleep_until(deadline) => Input::Tick { unix_ms: unix_ms() },
        };
        let is_news = !matches!(input, Input::Tick { .. } | Input::Guard(_));
        cluster.handle(pollux_host::clock::now(), input);
        if is_news {
            voice.changes.send_modify(|changes| *changes += 1);
        }
    }
}

fn drain(cluster: &mut Cluster, voice: &Voice, hands: &mut Hands) {
    while let Some(output) = cluster.poll() {
        match output {
            Output::Answer { request, result } => {
                let waiting = voice.pending.lock().expect("nothing panics while holding this lock").remove(&request);
                if let Some(waiting) = waiting {
                    // Whoever asked may have gone away.
                    let _ = waiting.send(result);
                }
            }
            output => hands.carry_out(output, cluster),
        }
    }
    let hello = cluster.hello();
    hands.gate.set_epoch(hello.epoch);
    voice.hello.send_if_modified(|told| {
        let changed = *told != hello;
        *told = hello;
        changed
    });
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => {
            let left = deadline.since(pollux_host::clock::now());
            // The timer is coarse: a moment too early would only be a turn for nothing.
            tokio::time::sleep(left.max(Duration::from_millis(1))).await;
        }
        None => std::future::pending().await,
    }
}

/// The wall clock, for people.
pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

impl Core {
    /// Looks at the core.
    pub async fn ask<R: Send + 'static>(
        &self,
        look: impl FnOnce(&Cluster) -> R + Send + 'static,
    ) -> Result<R, ApiError> {
        let (answer, answered) = oneshot::channel();
        let question: Question = Box::new(move |cluster| {
            let _ = answer.send(look(cluster));
        });
        let gone = || ApiError::new(ErrorCode::Internal, "this node's core does not answer");
        self.questions.send(question).await.map_err(|_| gone())?;
        tokio::time::timeout(REQUEST_TIMEOUT, answered).await.map_err(|_| gone())?.map_err(|_| gone())
    }

    /// Asks for a change; answered when it is committed or refused.
    pub async fn change(&self, change: Change) -> Result<Answer, ApiError> {
        self.request(|request| Input::Request { request, unix_ms: unix_ms(), change: Box::new(change) }).await
    }

    /// A page of what differs between two snapshots' volumes.
    pub async fn compare(
        &self,
        group: GroupId,
        one: VolumeId,
        two: VolumeId,
        from: ExtentIndex,
    ) -> Result<Differences, ApiError> {
        match self.request(|request| Input::Compare { request, group, one, two, from }).await? {
            Answer::Differ(page) => Ok(page),
            Answer::Done | Answer::Created { .. } => {
                Err(ApiError::new(ErrorCode::Internal, "a comparison was answered with something else"))
            }
        }
    }

    /// A human changes the disks of this node's pool; answered when the data plane has done so or refused.
    pub async fn change_disks(&self, command: DiskCommand, accepts_loss: bool) -> Result<Answer, ApiError> {
        self.request(|request| Input::Disk { request, command, accepts_loss }).await
    }

    /// A human wants something of what this node keeps of replicas.
    pub async fn change_kept(&self, command: KeptCommand) -> Result<Answer, ApiError> {
        self.request(|request| Input::Kept { request, command }).await
    }

    /// Has the metadata of this node's pool verified while it is used; gives the number of the run.
    pub async fn verify(&self) -> Result<u64, ApiError> {
        match self.request(|request| Input::Verify { request }).await? {
            Answer::Created { id } => Ok(id),
            Answer::Done | Answer::Differ(_) => {
                Err(ApiError::new(ErrorCode::Internal, "a verification was answered with something else"))
            }
        }
    }

    /// A human confirms that a node is down.
    pub async fn confirm_down(&self, node: NodeId, token: String) -> Result<Answer, ApiError> {
        self.request(|request| Input::ConfirmDown { request, node, token }).await
    }

    async fn request(&self, input: impl FnOnce(u64) -> Input) -> Result<Answer, ApiError> {
        let request = self.next_request.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        let pending = || self.pending.lock().expect("nothing panics while holding this lock");
        pending().insert(request, answer);
        let sent = self.inputs.send(input(request)).await;
        let result = tokio::time::timeout(REQUEST_TIMEOUT, answered).await;
        pending().remove(&request);
        match (sent, result) {
            (Ok(()), Ok(Ok(result))) => result.map_err(refused),
            (Ok(()), Err(_)) => {
                Err(ApiError::new(ErrorCode::TimedOut, "no answer in time; it may still be carried out")
                    .with_hint("Look with `pollux status` and `pollux event list`."))
            }
            _ => Err(ApiError::new(ErrorCode::Internal, "this node's core does not answer")),
        }
    }

    /// Wakes when something may look different.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.clone()
    }

    /// How this node introduces itself to its peers, as it changes.
    pub fn hello(&self) -> watch::Receiver<PeerHello> {
        self.hello.clone()
    }
}

/// A refusal of the core as the API tells it.
fn refused(refusal: Refusal) -> ApiError {
    match refusal {
        Refusal::Invalid(text) => ApiError::new(ErrorCode::Invalid, text),
        Refusal::NotFound(text) => ApiError::new(ErrorCode::NotFound, text),
        Refusal::Conflict(text) => ApiError::new(ErrorCode::Conflict, text),
        Refusal::Unsafe(text) => ApiError::new(ErrorCode::Unsafe, text),
        Refusal::NoQuorum(text) => ApiError::new(ErrorCode::NoQuorum, text)
            .with_hint("Look with `pollux status` which node is missing; it may only take a moment."),
    }
}
