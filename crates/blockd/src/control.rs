//! Orders of `noded` in, reports out: JSON lines over a unix socket, one connection at a time, the newest.

use crate::Turn;
use crate::door::Door;
use crate::ticket::Ticket;
use pollux_base::{Instant, Order, Report, Segment};
use pollux_host::link::Socket;
use pollux_host::reactor::{Op, Sending};
use std::io;
use tracing::{info, warn};
use zeroize::Zeroize;

/// Longest order: the names of some ten thousand exports.
const LINE_BYTES_MAX: usize = 4 << 20;
/// Reports that may wait for a `noded` that does not read. It is let go then, and asks for all of them when it is back.
const REPORT_BYTES_MAX: usize = 4 << 20;
const RECEIVE_BYTES: usize = 64 << 10;

pub struct Control {
    door: Door,
    current: Option<Connection>,
    last_id: u64,
}

struct Connection {
    id: u64,
    socket: Socket,
    /// The start of an order whose end has not arrived.
    line: Vec<u8>,
    /// Here while no receive is under way.
    buffer: Option<Vec<u8>>,
    out: Vec<u8>,
    sending: bool,
    /// Ended as soon as what waits is sent.
    is_closing: bool,
}

impl Control {
    pub fn new(listener: Socket) -> Control {
        Control { door: Door::new(listener, "orders".to_owned()), current: None, last_id: 0 }
    }

    pub fn on_accepted(&mut self, turn: &mut Turn<'_>, result: io::Result<Socket>) {
        let Some(socket) = self.door.on_accepted(turn.now, result) else { return };
        self.end(turn, "a newer control connection takes over");
        self.last_id += 1;
        info!("noded is connected");
        self.current = Some(Connection {
            id: self.last_id,
            socket,
            line: Vec::new(),
            buffer: Some(vec![0; RECEIVE_BYTES]),
            out: Vec::new(),
            sending: false,
            is_closing: false,
        });
    }

    /// The orders that have arrived whole.
    pub fn on_received(
        &mut self,
        turn: &mut Turn<'_>,
        id: u64,
        mut buffer: Vec<u8>,
        result: io::Result<usize>,
    ) -> Vec<Order> {
        let mut orders = Vec::new();
        let Some(current) = self.current.as_mut().filter(|current| current.id == id) else { return orders };
        let len = match result {
            Ok(0) | Err(_) => {
                self.end(turn, "noded is gone");
                return orders;
            }
            Ok(len) => len,
        };
        for part in buffer[..len].split_inclusive(|byte| *byte == b'\n') {
            if current.is_closing {
                break;
            }
            current.line.extend_from_slice(part);
            let parsed = match current.line.strip_suffix(b"\n") {
                Some([]) => None,
                Some(line) => Some(serde_json::from_slice::<Order>(line).map_err(|cause| cause.to_string())),
                None if current.line.len() > LINE_BYTES_MAX => {
                    Some(Err(format!("an order is longer than {LINE_BYTES_MAX} bytes")))
                }
                None => continue,
            };
            // It may have held a key.
            current.line.zeroize();
            match parsed {
                None => {}
                Some(Ok(order)) => orders.push(order),
                Some(Err(cause)) => {
                    warn!(cause, "not an order; the control connection is ended");
                    let reply = serde_json::json!({ "error": format!("not an order: {cause}") });
                    current.out.extend_from_slice(reply.to_string().as_bytes());
                    current.out.push(b'\n');
                    current.is_closing = true;
                }
            }
        }
        buffer[..len].zeroize();
        current.buffer = Some(buffer);
        orders
    }

    pub fn on_sent(&mut self, turn: &mut Turn<'_>, id: u64, result: io::Result<()>) {
        let Some(current) = self.current.as_mut().filter(|current| current.id == id) else { return };
        current.sending = false;
        if let Err(cause) = result {
            self.end(turn, &cause.to_string());
        }
    }

    /// Dropped when nobody is connected: whoever connects asks for all of them.
    pub fn report(&mut self, report: &Report) {
        let Some(current) = self.current.as_mut().filter(|current| !current.is_closing) else { return };
        match serde_json::to_writer(&mut current.out, report) {
            Ok(()) => current.out.push(b'\n'),
            Err(cause) => panic!("reports are plain data, which JSON always holds: {cause}"),
        }
    }

    /// Whether something said is still on its way.
    pub fn is_sending(&self) -> bool {
        self.current.as_ref().is_some_and(|current| current.sending || !current.out.is_empty())
    }

    /// When `flush` is to be called again.
    pub fn deadline(&self) -> Option<Instant> {
        self.door.deadline()
    }

    pub fn flush(&mut self, turn: &mut Turn<'_>) {
        self.door.accept(turn, Ticket::OrdersAccept, true);
        let Some(current) = &mut self.current else { return };
        if current.out.len() > REPORT_BYTES_MAX {
            self.end(turn, "noded does not read its reports");
            return;
        }
        if !current.sending && !current.out.is_empty() {
            let segments = vec![Segment::Bytes(std::mem::take(&mut current.out))];
            match turn.reactor.send(Ticket::OrdersSend(current.id).token(), &current.socket, segments) {
                Ok(sending) => current.sending = sending == Sending::UnderWay,
                Err(cause) => return self.end(turn, &cause.to_string()),
            }
        }
        if !current.sending && current.is_closing && current.out.is_empty() {
            self.end(turn, "after an order that was none");
            return;
        }
        if !current.is_closing
            && let Some(buffer) = current.buffer.take()
        {
            let op = Op::Receive(current.socket.clone(), buffer);
            turn.reactor.submit(Ticket::OrdersReceive(current.id).token(), op);
        }
    }

    fn end(&mut self, turn: &mut Turn<'_>, why: &str) {
        if let Some(connection) = self.current.take() {
            info!(why, "the control connection has ended");
            turn.reactor.close(&connection.socket);
        }
    }
}
