//! NBD clients: their sockets, and the machine of each.

use crate::Turn;
use crate::door::Door;
use crate::ticket::Ticket;
use pollux_base::{Instant, Reply, Request, RequestId, VolumeId};
use pollux_frontend::Exports;
use pollux_frontend::nbd::{Connection, End, Input, Output, Reach, Slot};
use pollux_host::link::Socket;
use pollux_host::reactor::{Op, Sending};
use pollux_replica::Input as PlaneInput;
use std::collections::BTreeMap;
use std::io;
use tracing::{debug, info, warn};

/// Clients at once; further ones wait in the listen queue. A guest's disk is one client, a copying tool a handful.
const CLIENTS_MAX: usize = 512;
/// Of these from other machines, so that whoever fills the network's doors cannot keep out this node's own guests.
const OUTSIDE_MAX: usize = 256;
/// Of these that have not agreed on an export yet, and may never.
const STRANGERS_MAX: usize = 64;
/// One receive: large enough that a 1 MiB write takes few turns, small enough to stay in the processor's cache.
const RECEIVE_BYTES: usize = 256 << 10;
/// Low bits of a request's id are its slot in the connection, the rest is the connection.
const SLOT_BITS: u32 = 16;

struct Listener {
    door: Door,
    reach: Reach,
}

impl Listener {
    fn is_outside(&self) -> bool {
        matches!(self.reach, Reach::Network(_))
    }
}

struct Client {
    connection: Connection,
    socket: Socket,
    listener: usize,
    /// Here while no receive is under way.
    buffer: Option<Vec<u8>>,
}

#[derive(Default)]
pub struct Clients {
    listeners: Vec<Listener>,
    clients: BTreeMap<u64, Client>,
    last_id: u64,
    /// Clients that may have something to send or to receive since the last `flush`.
    touched: Vec<u64>,
}

impl Clients {
    /// Takes clients from this socket too.
    pub fn listen(&mut self, socket: Socket, name: String, reach: Reach) {
        self.listeners.push(Listener { door: Door::new(socket, name), reach });
    }

    pub fn on_accepted(&mut self, turn: &mut Turn<'_>, listener: u64, result: io::Result<Socket>) {
        let index = listener as usize;
        let listener = &mut self.listeners[index];
        let Some(socket) = listener.door.on_accepted(turn.now, result) else { return };
        if listener.is_outside()
            && let Err(cause) = socket.set_nodelay().and_then(|()| socket.set_keepalive())
        {
            debug!(%cause, "a client was gone before it was served");
            return;
        }
        self.last_id += 1;
        let connection = Connection::new(turn.now, listener.reach.clone());
        let client = Client { connection, socket, listener: index, buffer: Some(vec![0; RECEIVE_BYTES]) };
        self.clients.insert(self.last_id, client);
        self.touched.push(self.last_id);
    }

    pub fn on_received(
        &mut self,
        turn: &mut Turn<'_>,
        id: u64,
        buffer: Vec<u8>,
        result: io::Result<usize>,
        exports: &Exports,
    ) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        let input = match result {
            Ok(0) | Err(_) => Input::Ended,
            Ok(len) => Input::Bytes(&buffer[..len]),
        };
        client.connection.handle(turn.now, input, exports);
        client.buffer = Some(buffer);
        self.serve(turn, id);
    }

    pub fn on_sent(&mut self, turn: &mut Turn<'_>, id: u64, result: io::Result<()>, exports: &Exports) {
        let input = if result.is_ok() { Input::Sent } else { Input::Ended };
        self.handle(turn, id, input, exports);
    }

    pub fn on_reply(&mut self, turn: &mut Turn<'_>, request: RequestId, reply: Reply, exports: &Exports) {
        let slot = Slot((request.0 & ((1 << SLOT_BITS) - 1)) as u16);
        self.handle(turn, request.0 >> SLOT_BITS, Input::Reply(slot, reply), exports);
    }

    /// What is offered has changed: clients whose export is no longer here are let go, waiting ones look again.
    pub fn on_exports(&mut self, turn: &mut Turn<'_>, exports: &Exports) {
        let ids: Vec<u64> = self.clients.keys().copied().collect();
        for id in ids {
            let Some(client) = self.clients.get(&id) else { continue };
            let is_outside = self.listeners[client.listener].is_outside();
            match client.connection.export() {
                Some((name, volume)) if !is_here(exports, name, volume, is_outside) => {
                    self.end(turn, id, &End::NotServed)
                }
                Some(_) => {}
                None => self.handle(turn, id, Input::Exports, exports),
            }
        }
    }

    /// When `on_time` is to be called at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        let doors = self.listeners.iter().filter_map(|listener| listener.door.deadline());
        self.clients.values().filter_map(|client| client.connection.deadline()).chain(doors).min()
    }

    pub fn on_time(&mut self, turn: &mut Turn<'_>, exports: &Exports) {
        let is_due = |client: &Client| client.connection.deadline().is_some_and(|deadline| deadline <= turn.now);
        let due: Vec<u64> = self.clients.iter().filter(|(_, client)| is_due(client)).map(|(id, _)| *id).collect();
        for id in due {
            self.handle(turn, id, Input::Tick, exports);
        }
    }

    /// Hands to the reactor what clients are to be sent, and receives from those that may say more.
    pub fn flush(&mut self, turn: &mut Turn<'_>, exports: &Exports) {
        let mut touched = std::mem::take(&mut self.touched);
        for id in touched.drain(..) {
            self.send(turn, id, exports);
            let Some(client) = self.clients.get_mut(&id) else { continue };
            if client.connection.wants_input()
                && let Some(buffer) = client.buffer.take()
            {
                turn.reactor.submit(Ticket::ClientReceive(id).token(), Op::Receive(client.socket.clone(), buffer));
            }
        }
        self.touched.append(&mut touched);
        for index in 0..self.listeners.len() {
            // Counted only when a client may have been taken since.
            if !self.listeners[index].door.is_accepting() {
                let has_room = self.has_room(self.listeners[index].is_outside());
                self.listeners[index].door.accept(turn, Ticket::ClientAccept(index as u64), has_room);
            }
        }
    }

    /// Sends what a client is to be sent.
    fn send(&mut self, turn: &mut Turn<'_>, id: u64, exports: &Exports) {
        while let Some(client) = self.clients.get_mut(&id) {
            let segments = client.connection.take_segments();
            if segments.is_empty() {
                return;
            }
            match turn.reactor.send(Ticket::ClientSend(id).token(), &client.socket, segments) {
                Ok(Sending::UnderWay) => return,
                Ok(Sending::Done) => self.handle(turn, id, Input::Sent, exports),
                Err(_) => self.handle(turn, id, Input::Ended, exports),
            }
        }
    }

    fn has_room(&self, is_outside: bool) -> bool {
        let outside = || self.clients.values().filter(|client| self.listeners[client.listener].is_outside());
        let strangers = || outside().filter(|client| client.connection.export().is_none());
        self.clients.len() < CLIENTS_MAX
            && (!is_outside || outside().count() < OUTSIDE_MAX && strangers().count() < STRANGERS_MAX)
    }

    fn handle(&mut self, turn: &mut Turn<'_>, id: u64, input: Input<'_>, exports: &Exports) {
        // A reply may come for a client that is gone.
        let Some(client) = self.clients.get_mut(&id) else { return };
        client.connection.handle(turn.now, input, exports);
        self.serve(turn, id);
    }

    /// Passes on what a client's machine asks for.
    fn serve(&mut self, turn: &mut Turn<'_>, id: u64) {
        self.touched.push(id);
        while let Some(output) = self.clients.get_mut(&id).and_then(|client| client.connection.poll()) {
            match output {
                Output::Request { slot, volume, op } => {
                    turn.inputs.push(PlaneInput::Request(Request { id: request_id(id, slot), volume, op }));
                }
                Output::End(end) => self.end(turn, id, &end),
            }
        }
    }

    fn end(&mut self, turn: &mut Turn<'_>, id: u64, end: &End) {
        let Some(client) = self.clients.remove(&id) else { return };
        let at = &self.listeners[client.listener].door.name;
        let export = client.connection.export().map(|(name, _)| name);
        match end {
            End::Finished => debug!(at, export, "{end}"),
            End::NotServed | End::Slow => info!(at, export, "{end}"),
            End::Garbage(_) | End::Refused(_) | End::Tls(_) => warn!(at, export, "{end}"),
        }
        let slots = client.connection.slots();
        turn.inputs.extend(slots.map(|slot| PlaneInput::Abandon(request_id(id, slot))));
        turn.reactor.close(&client.socket);
    }
}

fn request_id(client: u64, slot: Slot) -> RequestId {
    RequestId(client << SLOT_BITS | u64::from(slot.0))
}

/// Whether the client of this export may go on.
fn is_here(exports: &Exports, name: &str, volume: VolumeId, is_outside: bool) -> bool {
    matches!(exports.find(name, is_outside), pollux_frontend::Found::Here(export) if export.volume == volume)
}
