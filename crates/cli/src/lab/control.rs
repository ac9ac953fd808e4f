//! How `pollux lab` speaks with the lab's supervisor: one JSON line each way on a unix socket that only root may use.

use super::power::PowerState;
use super::site::Site;
use crate::failure::{Doing, Failure, Outcome};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// A power cut is done when the last process is gone, which takes at most this long on a loaded machine.
const ANSWER_WAIT: Duration = Duration::from_secs(30);
/// A line is far smaller.
const LINE_BYTES_MAX: u64 = 64 * 1024;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case", deny_unknown_fields)]
pub enum Ask {
    Status,
    Off { node: String },
    On { node: String },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    Done,
    Machines { machines: Vec<MachineView> },
    Refused { error: String },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineView {
    pub name: String,
    pub is_on: bool,
    pub daemons: Vec<DaemonView>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DaemonView {
    pub program: String,
    pub pid: Option<u32>,
    pub restarts: u64,
}

impl MachineView {
    pub fn power_state(&self) -> PowerState {
        if self.is_on { PowerState::On } else { PowerState::Off }
    }
}

/// Whether a supervisor serves the lab.
pub fn is_served(site: &Site) -> bool {
    UnixStream::connect(site.supervisor_socket()).is_ok()
}

pub fn ask(site: &Site, ask: &Ask) -> Outcome<Answer> {
    let gone = |error| {
        Failure::other(format!("the lab's supervisor does not answer: {error}"))
            .hint("the lab is broken: `pollux lab down` removes what is left, `pollux lab up` builds a new one")
    };
    let mut stream = UnixStream::connect(site.supervisor_socket()).map_err(gone)?;
    stream.set_read_timeout(Some(ANSWER_WAIT)).map_err(gone)?;
    send(&mut stream, ask).map_err(gone)?;
    let answer = receive(&mut stream).map_err(gone)?;
    match serde_json::from_str(&answer).doing("the lab's supervisor answers nonsense")? {
        Answer::Refused { error } => Err(Failure::other(error)),
        answer => Ok(answer),
    }
}

pub fn send(stream: &mut UnixStream, message: &impl Serialize) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line)
}

pub fn receive(stream: &mut UnixStream) -> std::io::Result<String> {
    let mut line = String::new();
    BufReader::new(stream.take(LINE_BYTES_MAX)).read_line(&mut line)?;
    if line.is_empty() { Err(std::io::ErrorKind::UnexpectedEof.into()) } else { Ok(line) }
}
