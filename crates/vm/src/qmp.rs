//! QMP, QEMU's control protocol: JSON lines over a unix socket (QEMU's `docs/interop/qmp-spec.txt`).
//!
//! Every call has a time-out, because QEMU's main loop can block (on a disk's server, on a hung file system) and then
//! answers nobody. A call that timed out has not necessarily been without effect.
//!
//! QEMU takes one client at a time. Events are not queued but folded into `Seen`, so that a guest that causes many of
//! them costs no memory and no event that matters can be lost to a full queue.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

/// Longest line taken from QEMU. Its longest answers to what we ask are some kilobytes; a line beyond this is not QMP.
const LINE_BYTES_MAX: usize = 1 << 20;
/// Calls under way at once; one VM has one owner, which makes few. Further calls wait within their own time-out.
const CALLS_MAX: usize = 8;
/// A line of ours that the socket's buffer does not take for this long: QEMU no longer reads.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    #[error("QEMU's control socket could not be reached: {0}")]
    Connect(#[source] io::Error),
    #[error("QEMU's control connection is closed")]
    Closed,
    #[error("QEMU did not answer `{command}` within {} ms", .after.as_millis())]
    TimedOut { command: String, after: Duration },
    #[error("QEMU refused `{command}`: {description}")]
    Refused { command: String, description: String },
    #[error("the control connection speaks no QMP: {0}")]
    Garbled(String),
}

/// What events have told since the connection was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// QEMU was told to shut down, by the guest or from outside.
    pub shutdown: Option<Shutdown>,
    /// How often a disk error stopped the guest, and the last one in words.
    pub io_errors: u64,
    pub io_error: String,
    /// How often the guest was reset.
    pub resets: u64,
}

/// The SHUTDOWN event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shutdown {
    pub by_guest: bool,
    /// `guest-shutdown`, `host-qmp-quit`, `host-signal`, ...
    pub reason: String,
}

/// A session with one QEMU. Ends when it is dropped.
#[derive(Debug)]
pub struct Qmp {
    calls: mpsc::Sender<Call>,
    seen: watch::Receiver<Seen>,
}

#[derive(Debug)]
struct Call {
    command: String,
    arguments: Value,
    reply: oneshot::Sender<Result<Value, QmpError>>,
}

impl Qmp {
    /// Connects, waits for the greeting and leaves negotiation, within `within` altogether.
    pub async fn connect(socket: &Path, within: Duration) -> Result<Qmp, QmpError> {
        let timed_out = |_| QmpError::TimedOut { command: "greeting".into(), after: within };
        timeout(within, async {
            let stream = UnixStream::connect(socket).await.map_err(QmpError::Connect)?;
            let mut lines = Lines::new(stream);
            let greeting = lines.next().await?;
            if greeting.get("QMP").is_none() {
                return Err(QmpError::Garbled(format!("greeted by {}", shortened(&greeting))));
            }
            let (calls, called) = mpsc::channel(CALLS_MAX);
            let (tell, seen) = watch::channel(Seen::default());
            tokio::spawn(Session { lines, calls: called, tell, pending: BTreeMap::new(), next_id: 0 }.run());
            let qmp = Qmp { calls, seen };
            qmp.call("qmp_capabilities", json!({}), within).await?;
            Ok(qmp)
        })
        .await
        .map_err(timed_out)?
    }

    /// Executes one command.
    pub async fn call(&self, command: &str, arguments: Value, within: Duration) -> Result<Value, QmpError> {
        let (reply, answer) = oneshot::channel();
        let call = Call { command: command.into(), arguments, reply };
        timeout(within, async {
            self.calls.send(call).await.map_err(|_| QmpError::Closed)?;
            answer.await.map_err(|_| QmpError::Closed)?
        })
        .await
        .map_err(|_| QmpError::TimedOut { command: command.into(), after: within })?
    }

    /// What events tell; its `changed` fails when the connection is lost.
    pub fn seen(&self) -> watch::Receiver<Seen> {
        self.seen.clone()
    }
}

/// Owns the socket: writes calls, hands out answers, folds events.
struct Session {
    lines: Lines,
    calls: mpsc::Receiver<Call>,
    tell: watch::Sender<Seen>,
    pending: BTreeMap<u64, (String, oneshot::Sender<Result<Value, QmpError>>)>,
    next_id: u64,
}

impl Session {
    async fn run(mut self) {
        let reason = self.serve().await;
        tracing::debug!(?reason, "QMP session over");
        // Dropping `pending` tells every caller that the connection is closed.
    }

    async fn serve(&mut self) -> Result<(), QmpError> {
        loop {
            // Callers that gave up make room.
            self.pending.retain(|_, (_, reply)| !reply.is_closed());
            tokio::select! {
                line = self.lines.next() => self.on_line(&line?),
                call = self.calls.recv(), if self.pending.len() < CALLS_MAX => match call {
                    Some(call) => self.send(call).await?,
                    None => return Ok(()),
                },
            }
        }
    }

    async fn send(&mut self, call: Call) -> Result<(), QmpError> {
        let id = self.next_id;
        self.next_id += 1;
        let line = json!({ "execute": call.command, "arguments": call.arguments, "id": id }).to_string() + "\r\n";
        match timeout(WRITE_TIMEOUT, self.lines.stream.write_all(line.as_bytes())).await {
            Ok(Ok(())) => {
                self.pending.insert(id, (call.command, call.reply));
                Ok(())
            }
            Ok(Err(_)) => Err(QmpError::Closed),
            Err(_) => Err(QmpError::TimedOut { command: call.command, after: WRITE_TIMEOUT }),
        }
    }

    fn on_line(&mut self, line: &Value) {
        if let Some(event) = line["event"].as_str() {
            self.on_event(event, &line["data"]);
            return;
        }
        let Some((command, reply)) = line["id"].as_u64().and_then(|id| self.pending.remove(&id)) else {
            return; // the answer to a call that timed out
        };
        let result = match (line.get("return"), line.get("error")) {
            (Some(value), _) => Ok(value.clone()),
            (None, Some(error)) => {
                let description = error["desc"].as_str().unwrap_or("no reason given").to_string();
                Err(QmpError::Refused { command, description })
            }
            (None, None) => Err(QmpError::Garbled(shortened(line))),
        };
        // The caller may have given up a moment ago.
        let _ = reply.send(result);
    }

    fn on_event(&mut self, event: &str, data: &Value) {
        let text = |field: &str| data[field].as_str().unwrap_or("unknown").to_string();
        match event {
            "SHUTDOWN" => self.tell.send_modify(|seen| {
                seen.shutdown =
                    Some(Shutdown { by_guest: data["guest"].as_bool().unwrap_or(false), reason: text("reason") });
            }),
            "BLOCK_IO_ERROR" if data["action"] == "stop" => self.tell.send_modify(|seen| {
                seen.io_errors += 1;
                seen.io_error = format!("{} of {}: {}", text("operation"), text("node-name"), text("reason"));
            }),
            "RESET" => self.tell.send_modify(|seen| seen.resets += 1),
            _ => {}
        }
    }
}

/// The socket, read line by line.
struct Lines {
    stream: UnixStream,
    buffer: Vec<u8>,
    /// Bytes of `buffer` already known to hold no line end.
    searched: usize,
}

impl Lines {
    fn new(stream: UnixStream) -> Lines {
        Lines { stream, buffer: Vec::new(), searched: 0 }
    }

    /// The next line as JSON. May be dropped while waiting without losing bytes.
    async fn next(&mut self) -> Result<Value, QmpError> {
        loop {
            if let Some(end) = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=self.searched + end).collect();
                self.searched = 0;
                return serde_json::from_slice(&line)
                    .map_err(|error| QmpError::Garbled(format!("{error}: {}", String::from_utf8_lossy(&line))));
            }
            self.searched = self.buffer.len();
            if self.searched > LINE_BYTES_MAX {
                return Err(QmpError::Garbled(format!("a line of more than {LINE_BYTES_MAX} bytes")));
            }
            if self.stream.read_buf(&mut self.buffer).await.map_err(|_| QmpError::Closed)? == 0 {
                return Err(QmpError::Closed);
            }
        }
    }
}

fn shortened(value: &Value) -> String {
    value.to_string().chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;
    use tokio::io::{AsyncBufReadExt, BufReader};
    use tokio::net::UnixListener;

    const BRIEF: Duration = Duration::from_millis(100);
    const AMPLE: Duration = Duration::from_secs(10);

    /// A QEMU that says these lines on being greeted and then runs `play` on each line that it gets.
    fn fake_qemu(dir: &Path, play: impl Fn(Value) -> Vec<String> + Send + 'static) -> PathBuf {
        let path = dir.join("qmp.sock");
        let listener = UnixListener::bind(&path).expect("the folder is ours");
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.expect("a client comes");
            let mut stream = BufReader::new(stream);
            stream.write_all(b"{\"QMP\": {\"version\": {}}}\r\n").await.expect("the client reads");
            let mut line = String::new();
            while stream.read_line(&mut line).await.is_ok_and(|count| count > 0) {
                let call: Value = serde_json::from_str(&line).expect("the client speaks JSON");
                line.clear();
                if call["execute"] == "qmp_capabilities" {
                    let answer = json!({ "return": {}, "id": call["id"] }).to_string() + "\r\n";
                    stream.write_all(answer.as_bytes()).await.expect("the client reads");
                    continue;
                }
                for answer in play(call) {
                    if stream.write_all((answer + "\r\n").as_bytes()).await.is_err() {
                        return;
                    }
                }
            }
        });
        path
    }

    #[tokio::test]
    async fn a_call_that_qemu_does_not_answer_ends_and_its_late_answer_disturbs_nobody() {
        let dir = tempfile::tempdir().expect("tmp is writable");
        let path = fake_qemu(dir.path(), |call| match call["execute"].as_str() {
            Some("stuck") => vec![],
            _ => vec![
                json!({ "return": "late", "id": call["id"].as_u64().map(|id| id - 1) }).to_string(),
                json!({ "return": "prompt", "id": call["id"] }).to_string(),
            ],
        });
        let qmp = Qmp::connect(&path, AMPLE).await.expect("a well-behaved greeting");
        let stuck = qmp.call("stuck", json!({}), BRIEF).await;
        assert!(matches!(stuck, Err(QmpError::TimedOut { .. })), "{stuck:?}");
        assert_eq!(qmp.call("next", json!({}), AMPLE).await.expect("answered"), json!("prompt"));
    }

    #[tokio::test]
    async fn a_socket_without_greeting_is_given_up() {
        let dir = tempfile::tempdir().expect("tmp is writable");
        let path = dir.path().join("mute.sock");
        let _listener = UnixListener::bind(&path).expect("the folder is ours");
        assert!(matches!(Qmp::connect(&path, BRIEF).await, Err(QmpError::TimedOut { .. })));
        let absent = Qmp::connect(&dir.path().join("absent.sock"), BRIEF).await;
        assert!(matches!(absent, Err(QmpError::Connect(_))), "{absent:?}");
    }

    #[tokio::test]
    async fn events_are_folded_and_refusals_carry_qemus_words() {
        let dir = tempfile::tempdir().expect("tmp is writable");
        let path = fake_qemu(dir.path(), |call| {
            let error = r#"{"event":"BLOCK_IO_ERROR","data":{"action":"stop","operation":"write","node-name":"disk0","reason":"Input/output error"}}"#;
            vec![
                error.into(),
                error.into(),
                r#"{"event":"SHUTDOWN","data":{"guest":true,"reason":"guest-shutdown"}}"#.into(),
                json!({ "error": { "class": "GenericError", "desc": "not now" }, "id": call["id"] }).to_string(),
            ]
        });
        let qmp = Qmp::connect(&path, AMPLE).await.expect("a well-behaved greeting");
        let refused = qmp.call("cont", json!({}), AMPLE).await.expect_err("refused");
        assert_eq!(refused.to_string(), "QEMU refused `cont`: not now");
        let seen = qmp.seen().borrow().clone();
        assert_eq!(seen.shutdown, Some(Shutdown { by_guest: true, reason: "guest-shutdown".into() }));
        assert_eq!((seen.io_errors, seen.io_error.as_str()), (2, "write of disk0: Input/output error"));
    }

    #[tokio::test]
    async fn garbage_closes_the_session_and_nothing_panics() {
        let dir = tempfile::tempdir().expect("tmp is writable");
        let path = fake_qemu(dir.path(), |_| vec!["\u{1}\u{2} not json".into()]);
        let qmp = Qmp::connect(&path, AMPLE).await.expect("a well-behaved greeting");
        assert!(matches!(qmp.call("any", json!({}), AMPLE).await, Err(QmpError::Closed)));
        assert!(qmp.seen().changed().await.is_err(), "whoever watches learns that the session is over");
    }
}
