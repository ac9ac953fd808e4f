//! The connection to `noded`: JSON lines, commands in, views out. One `noded` at a time: a new connection replaces the
//! old one, which may hang in a process that is long dead.

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags};
use pollux_base::guard::{GuardCommand, GuardView};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

/// Longest command; a list of members takes a few hundred bytes.
const LINE_BYTES_MAX: usize = 64 * 1024;

pub struct Noded {
    listener: UnixListener,
    stream: Option<UnixStream>,
    received: Vec<u8>,
    /// The line being sent, and the newest view that waits behind it: a `noded` that hangs finds the present when it wakes.
    sending: Vec<u8>,
    next: Option<Vec<u8>>,
}

impl Noded {
    pub fn listen(path: &Path) -> Result<Noded> {
        if UnixStream::connect(path).is_ok() {
            bail!("another pollux-guard listens on {}", path.display());
        }
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot replace the socket {}", path.display()));
            }
            _ => {}
        }
        let listener = UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
        listener.set_nonblocking(true)?;
        Ok(Noded { listener, stream: None, received: Vec::new(), sending: Vec::new(), next: None })
    }

    pub fn waits(&self) -> impl Iterator<Item = PollFd<'_>> {
        let mut flags = PollFlags::POLLIN;
        if !self.sending.is_empty() {
            flags |= PollFlags::POLLOUT;
        }
        let listener = PollFd::new(self.listener.as_fd(), PollFlags::POLLIN);
        let stream = self.stream.as_ref().map(|stream| PollFd::new(stream.as_fd(), flags));
        std::iter::once(listener).chain(stream)
    }

    /// Takes a new connection. Whether there was one.
    pub fn accept(&mut self) -> bool {
        let Ok((stream, _)) = self.listener.accept() else {
            return false;
        };
        if stream.set_nonblocking(true).is_err() {
            return false;
        }
        self.close();
        self.stream = Some(stream);
        true
    }

    /// Commands that have come, in order.
    pub fn commands(&mut self) -> Vec<GuardCommand> {
        let mut commands = Vec::new();
        let mut buffer = [0; 4096];
        while let Some(stream) = &mut self.stream {
            match stream.read(&mut buffer) {
                Ok(0) => self.close(),
                Ok(len) => self.received.extend_from_slice(&buffer[..len]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => self.close(),
            }
            while let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                match serde_json::from_slice(&line) {
                    Ok(command) => commands.push(command),
                    Err(error) => eprintln!("pollux-guard: noded said something else than a command: {error}"),
                }
            }
            if self.received.len() > LINE_BYTES_MAX {
                eprintln!(
                    "pollux-guard: noded sent a line of more than {LINE_BYTES_MAX} bytes; its connection is closed"
                );
                self.close();
            }
        }
        commands
    }

    pub fn tell(&mut self, view: &GuardView) {
        if self.stream.is_none() {
            return;
        }
        let mut line = serde_json::to_vec(view).expect("numbers and names always become JSON");
        line.push(b'\n');
        self.next = Some(line);
        self.flush();
    }

    pub fn flush(&mut self) {
        while let Some(stream) = &mut self.stream {
            if self.sending.is_empty() {
                match self.next.take() {
                    Some(line) => self.sending = line,
                    None => return,
                }
            }
            match stream.write(&self.sending) {
                Ok(len) => drop(self.sending.drain(..len)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => self.close(),
            }
        }
    }

    fn close(&mut self) {
        self.stream = None;
        self.received.clear();
        self.sending.clear();
        self.next = None;
    }
}
