//! A listening socket: one accept at a time, none while there is no room, and a rest after one that failed.

use crate::Turn;
use crate::ticket::Ticket;
use pollux_base::Instant;
use pollux_host::link::Socket;
use pollux_host::reactor::Op;
use std::io;
use std::time::Duration;
use tracing::warn;

/// A failed accept (no file descriptors left, no memory) would fail again at once, and a loop of them is a busy loop.
const REST: Duration = Duration::from_millis(200);

pub struct Door {
    socket: Socket,
    /// For humans: the address.
    pub name: String,
    is_accepting: bool,
    resting_until: Option<Instant>,
}

impl Door {
    pub fn new(socket: Socket, name: String) -> Door {
        Door { socket, name, is_accepting: false, resting_until: None }
    }

    /// Takes the next connection, when it may; it comes with `ticket`.
    pub fn accept(&mut self, turn: &mut Turn<'_>, ticket: Ticket, has_room: bool) {
        self.resting_until = self.resting_until.filter(|until| *until > turn.now);
        if has_room && !self.is_accepting && self.resting_until.is_none() {
            self.is_accepting = true;
            turn.reactor.submit(ticket.token(), Op::Accept(self.socket.clone()));
        }
    }

    /// Whether the next connection is being waited for.
    pub fn is_accepting(&self) -> bool {
        self.is_accepting
    }

    pub fn on_accepted(&mut self, now: Instant, result: io::Result<Socket>) -> Option<Socket> {
        self.is_accepting = false;
        match result {
            Ok(socket) => Some(socket),
            Err(cause) => {
                warn!(at = self.name, %cause, "a connection could not be accepted");
                self.resting_until = Some(now + REST);
                None
            }
        }
    }

    /// When `accept` is to be called again.
    pub fn deadline(&self) -> Option<Instant> {
        self.resting_until
    }
}
