//! One client's connection, as a machine: bytes and replies in, requests and bytes out.
//!
//! * Every request that came whole ends in exactly one reply to the client, or the connection ends.
//! * What one client can make the server hold is bounded: requests and bytes in flight, bytes not yet sent, bytes not
//!   yet parsed. At a bound the machine wants no more input, and the client's socket fills up.
//! * Nothing a client sends can do more than end its own connection.

use super::handshake::{Agreement, Handshake, Outcome, Security, greet};
use super::outbox::Outbox;
use super::proto::*;
use super::span::{Part, Span};
use super::tls::{Session, TlsServer};
use super::transmission::{
    Command, Header, REQUEST_BYTES, Refusal, error_reply, read_reply, refusal_of, simple_reply, status_reply,
};
use crate::export::Exports;
use pollux_base::data::Filling;
use pollux_base::unit::BLOCK_BYTES;
use pollux_base::{Data, Instant, Op, Reply, Segment, VolumeId};
use std::borrow::Cow;
use std::collections::VecDeque;
use std::time::Duration;

/// Requests of one connection that may be under way. QEMU keeps 16, nbdcopy 64, fio as many as it is told.
const REQUESTS_MAX: usize = 128;
/// No request is begun while so many bytes of reads and writes are under way: one of the largest requests, so that
/// twice this is the most that a connection can hold.
const BYTES_MAX: u64 = PAYLOAD_MAX_ACCEPTED as u64;
/// No request is begun while so many bytes of replies wait for a client that does not read them.
const OUTBOX_MAX: usize = PAYLOAD_MAX_ACCEPTED as usize;
/// How long a client waits in its handshake for an export that may be served here soon. Longer than a takeover or a
/// restart takes, shorter than clients wait for the server.
const WAIT_TIME: Duration = Duration::from_secs(10);
/// A client that has not agreed on an export by then is let go, so that idle connections do not pile up. People who type
/// the protocol by hand are not expected.
const HANDSHAKE_TIME: Duration = Duration::from_secs(30);
/// A client that said goodbye and does not take the last replies is let go then.
const GOODBYE_TIME: Duration = Duration::from_secs(10);
/// So much is encrypted at a time: what is sent next. So a slow client costs no second copy of what waits for it.
const ENCRYPT_BYTES: usize = 1 << 20;
/// Low bits of a slot: the part of the request, of which there are three at most.
const PART_BITS: u32 = 2;

/// From where a client came.
#[derive(Clone)]
pub enum Reach {
    /// From this machine.
    Local,
    /// Over the network, and what it must talk; `None`: the configuration says that it need not be TLS.
    Network(Option<TlsServer>),
}

/// Names a part of a request of this connection while it is under way.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Slot(pub u16);

pub enum Input<'a> {
    /// Bytes from the client.
    Bytes(&'a [u8]),
    /// What is offered has changed. Clients that have agreed on an export need not hear of it.
    Exports,
    /// The client sends no more.
    Ended,
    /// The end of a request.
    Reply(Slot, Reply),
    /// What `take_segments` gave has been sent.
    Sent,
    /// To be given when `deadline` is reached.
    Tick,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Output {
    Request {
        slot: Slot,
        volume: VolumeId,
        op: Op,
    },
    /// The connection is over: close it, abandon what is in flight. Nothing follows.
    End(End),
}

/// How a connection ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum End {
    #[error("the client has ended the connection")]
    Finished,
    #[error("not NBD: {0}")]
    Garbage(String),
    #[error("the client was refused: {0}")]
    Refused(String),
    #[error("TLS: {0}")]
    Tls(String),
    #[error("the client was too slow to agree on an export, or to leave")]
    Slow,
    #[error("the volume is not served here any more")]
    NotServed,
}

/// What the next bytes belong to. Reading down tells the life of a connection.
enum Phase {
    ClientFlags,
    OptionHeader,
    OptionData {
        option: u32,
        len: usize,
    },
    /// The option names an export that may be served here soon.
    Waiting {
        option: u32,
        data: Vec<u8>,
        until: Instant,
    },
    RequestHeader,
    /// The bytes of a write, each part in memory of its own.
    Payload {
        cookie: u64,
        fua: bool,
        parts: [Option<(Part, Filling)>; 3],
    },
    /// The bytes of a refused write.
    Skip {
        cookie: u64,
        refusal: Refusal,
        left: usize,
    },
    /// What is under way is finished and sent, then the connection ends.
    Closing(End),
    Ended,
}

/// A request under way.
struct Pending {
    cookie: u64,
    kind: Kind,
    bytes: u64,
    /// Parts that have not ended, a bit for each.
    open: u8,
    /// Why a part failed: then the whole fails, however the others end.
    refusal: Option<Refusal>,
}

#[derive(Clone, Copy)]
enum Kind {
    Read(Span),
    Status { span: Span, one: bool },
    Other,
}

pub struct Connection {
    phase: Phase,
    handshake: Handshake,
    /// What the client may begin TLS with.
    tls_server: Option<TlsServer>,
    tls: Option<Box<Session>>,
    agreement: Option<Agreement>,
    /// The start of a header or of option data that has not arrived whole.
    partial: Vec<u8>,
    /// Bytes that had to wait because a bound was reached: at most what one receive brought. Those before `backlog_at`
    /// are done with.
    backlog: Vec<u8>,
    backlog_at: usize,
    pending: Vec<Option<Pending>>,
    free: Vec<u16>,
    bytes_in_flight: u64,
    outbox: Outbox,
    sending: bool,
    outputs: VecDeque<Output>,
    deadline: Option<Instant>,
}

impl Connection {
    /// A client has just connected; the greeting waits to be sent.
    pub fn new(now: Instant, reach: Reach) -> Connection {
        let mut outbox = Outbox::default();
        greet(&mut outbox);
        let (is_outside, tls_server) = match reach {
            Reach::Local => (false, None),
            Reach::Network(tls) => (true, tls),
        };
        let security = if tls_server.is_some() { Security::TlsWanted } else { Security::Plain };
        Connection {
            phase: Phase::ClientFlags,
            handshake: Handshake::new(security, is_outside),
            tls_server,
            tls: None,
            agreement: None,
            partial: Vec::new(),
            backlog: Vec::new(),
            backlog_at: 0,
            pending: Vec::new(),
            free: Vec::new(),
            bytes_in_flight: 0,
            outbox,
            sending: false,
            outputs: VecDeque::new(),
            deadline: Some(now + HANDSHAKE_TIME),
        }
    }

    /// `exports`: what is offered at this moment.
    pub fn handle(&mut self, now: Instant, input: Input<'_>, exports: &Exports) {
        match input {
            _ if matches!(self.phase, Phase::Ended) => {}
            Input::Bytes(bytes) => self.receive(now, bytes, exports),
            Input::Ended => self.end(End::Finished),
            Input::Reply(slot, reply) => self.on_reply(slot, reply),
            Input::Sent => self.sending = false,
            Input::Tick if self.deadline.is_some_and(|deadline| now >= deadline) => self.end(End::Slow),
            Input::Tick | Input::Exports => self.wait_on(now, exports),
        }
        self.parse_backlog(now, exports);
        if let Phase::Closing(end) = &self.phase
            && self.in_flight() == 0
        {
            let end = end.clone();
            self.deadline.get_or_insert(now + GOODBYE_TIME);
            if self.outbox.is_empty() && !self.sending && !self.says_more() {
                self.end(end);
            }
        }
    }

    pub fn poll(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    pub fn deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::Waiting { until, .. } => self.deadline.map(|deadline| deadline.min(until)),
            _ => self.deadline,
        }
    }

    /// Bytes for the client, in order; empty when there are none or earlier ones are not yet `Sent`.
    pub fn take_segments(&mut self) -> Vec<Segment> {
        if self.sending {
            return Vec::new();
        }
        let segments = match &mut self.tls {
            None => self.outbox.take(),
            Some(tls) => {
                if !self.outbox.is_empty() {
                    tls.send(&self.outbox.take_up_to(ENCRYPT_BYTES));
                }
                if tls.has_output() { vec![Segment::Bytes(tls.take_output())] } else { Vec::new() }
            }
        };
        self.sending = !segments.is_empty();
        segments
    }

    /// Whether more bytes should be received from the client.
    pub fn wants_input(&self) -> bool {
        self.backlog.is_empty() && !self.is_full() && !matches!(self.phase, Phase::Closing(_) | Phase::Ended)
    }

    /// Name and volume of the export agreed on.
    pub fn export(&self) -> Option<(&str, VolumeId)> {
        self.agreement.as_ref().map(|agreement| (agreement.name.as_str(), agreement.volume))
    }

    /// Parts of requests under way.
    pub fn slots(&self) -> impl Iterator<Item = Slot> {
        let pending = self.pending.iter().enumerate().filter_map(|(index, pending)| Some((index, pending.as_ref()?)));
        pending.flat_map(|(index, pending)| {
            let open = (0..u8::BITS as u16).filter(|part| pending.open & 1 << part != 0);
            open.map(move |part| Slot((index as u16) << PART_BITS | part))
        })
    }

    fn in_flight(&self) -> usize {
        self.pending.len() - self.free.len()
    }

    fn is_full(&self) -> bool {
        self.in_flight() >= REQUESTS_MAX || self.bytes_in_flight >= BYTES_MAX || self.outbox.len() >= OUTBOX_MAX
    }

    fn end(&mut self, end: End) {
        if !matches!(self.phase, Phase::Ended) {
            self.phase = Phase::Ended;
            self.deadline = None;
            self.outputs.push_back(Output::End(end));
        }
    }

    /// Takes bytes of the client's socket.
    fn receive(&mut self, now: Instant, bytes: &[u8], exports: &Exports) {
        if self.tls.is_some() {
            self.decrypt(bytes);
        } else if self.backlog.is_empty() {
            let taken = self.parse(now, bytes, exports);
            // Whatever follows STARTTLS is part of the session that begins, never of what was agreed in the clear.
            if self.tls.is_some() {
                self.decrypt(&bytes[taken..]);
            } else {
                self.backlog.extend_from_slice(&bytes[taken..]);
            }
        } else {
            self.backlog.extend_from_slice(bytes);
        }
    }

    /// Takes bytes of the TLS session; what they say is put behind what waits to be parsed.
    fn decrypt(&mut self, bytes: &[u8]) {
        let Some(tls) = &mut self.tls else { return };
        match tls.receive(bytes, &mut self.backlog) {
            Ok(true) => {}
            Ok(false) => self.end(End::Finished),
            // The alert is still sent, so that the client can say what is wrong with its certificate.
            Err(why) => self.phase = Phase::Closing(End::Tls(why)),
        }
    }

    /// Whether TLS has words left, its goodbye among them.
    fn says_more(&mut self) -> bool {
        let Some(tls) = &mut self.tls else { return false };
        tls.close();
        tls.has_output()
    }

    /// Goes on with bytes that had to wait.
    fn parse_backlog(&mut self, now: Instant, exports: &Exports) {
        while !self.backlog.is_empty() {
            let is_plain = self.tls.is_none();
            let mut backlog = std::mem::take(&mut self.backlog);
            self.backlog_at += self.parse(now, &backlog[self.backlog_at..], exports);
            if is_plain && self.tls.is_some() {
                let rest = std::mem::take(&mut self.backlog_at);
                self.decrypt(&backlog[rest..]);
                continue;
            }
            if self.backlog_at == backlog.len() {
                backlog.clear();
                self.backlog_at = 0;
            }
            self.backlog = backlog;
            return;
        }
    }

    /// Looks again whether the export that the client waits for is served here.
    fn wait_on(&mut self, now: Instant, exports: &Exports) {
        if let Phase::Waiting { option, data, until } = &mut self.phase {
            let (option, data, until) = (*option, std::mem::take(data), *until);
            self.on_option(now, option, &data, exports, until);
        }
    }

    fn on_option(&mut self, now: Instant, option: u32, data: &[u8], exports: &Exports, until: Instant) {
        self.phase = match self.handshake.on_option(option, data, exports, now < until, &mut self.outbox) {
            Outcome::Haggle => Phase::OptionHeader,
            Outcome::Wait => Phase::Waiting { option, data: data.to_vec(), until },
            Outcome::Transmit(agreement) => {
                self.agreement = Some(agreement);
                self.deadline = None;
                Phase::RequestHeader
            }
            Outcome::StartTls => return self.start_tls(),
            Outcome::Bye => Phase::Closing(End::Finished),
            Outcome::HangUp(why) => return self.end(End::Refused(why)),
        };
        if self.outbox.len() >= OUTBOX_MAX {
            // Replies to options are small: whoever gets here asks without end and never reads.
            self.end(End::Garbage("options without reading their replies".to_owned()));
        }
    }

    fn start_tls(&mut self) {
        let server = self.tls_server.as_ref().expect("only a connection that wants TLS is told to begin it");
        match Session::new(server, &self.outbox.take()) {
            Ok(session) => {
                self.tls = Some(Box::new(session));
                self.handshake.restart_in_tls();
                self.phase = Phase::OptionHeader;
            }
            Err(cause) => self.end(End::Tls(cause.to_string())),
        }
    }

    /// Uses bytes until there are none, a bound is reached, or the connection is over; says how many it used.
    fn parse(&mut self, now: Instant, bytes: &[u8], exports: &Exports) -> usize {
        let mut rest = bytes;
        loop {
            match &mut self.phase {
                Phase::ClientFlags => {
                    let Some(flags) = fill(&mut self.partial, &mut rest, 4) else { break };
                    let flags = number(&flags);
                    let known = FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES;
                    if flags & !u64::from(known) != 0 {
                        self.end(End::Garbage(format!("client flags {flags:#x}")));
                        break;
                    }
                    self.handshake.no_zeroes = flags & u64::from(FLAG_NO_ZEROES) != 0;
                    self.phase = Phase::OptionHeader;
                }
                Phase::OptionHeader => {
                    let Some(header) = fill(&mut self.partial, &mut rest, 16) else { break };
                    let (magic, option) = (number(&header[..8]), number(&header[8..12]));
                    let len = number(&header[12..]);
                    if magic != OPTION_MAGIC {
                        self.end(End::Garbage(format!("an option that begins with {magic:#018x}")));
                        break;
                    }
                    if len > u64::from(OPTION_BYTES_MAX) {
                        self.end(End::Garbage(format!("an option of {len} bytes, more than {OPTION_BYTES_MAX}")));
                        break;
                    }
                    self.phase = Phase::OptionData { option: option as u32, len: len as usize };
                }
                Phase::OptionData { option, len } => {
                    let (option, len) = (*option, *len);
                    let Some(data) = fill(&mut self.partial, &mut rest, len) else { break };
                    let is_plain = self.tls.is_none();
                    self.on_option(now, option, &data, exports, now + WAIT_TIME);
                    if is_plain && self.tls.is_some() {
                        break;
                    }
                }
                Phase::Waiting { .. } => break,
                Phase::RequestHeader => {
                    if self.is_full() {
                        break;
                    }
                    let Some(header) = fill(&mut self.partial, &mut rest, REQUEST_BYTES) else { break };
                    let Some(header) = Header::parse(&header) else {
                        self.end(End::Garbage("a request without its magic number".to_owned()));
                        break;
                    };
                    self.on_request(header);
                }
                Phase::Payload { parts, .. } => {
                    for (_, filling) in parts.iter_mut().flatten() {
                        rest = &rest[filling.take(rest)..];
                    }
                    if parts.iter().flatten().any(|(_, filling)| filling.missing() > 0) {
                        break;
                    }
                    if let Phase::Payload { cookie, fua, parts } =
                        std::mem::replace(&mut self.phase, Phase::RequestHeader)
                    {
                        let write = |(part, filling): (Part, Filling)| change(part, filling.finish().freeze(), fua);
                        self.begin(cookie, Kind::Other, parts.map(|part| part.map(write)));
                    }
                }
                Phase::Skip { cookie, refusal, left } => {
                    let taken = rest.len().min(*left);
                    rest = &rest[taken..];
                    *left -= taken;
                    if *left > 0 {
                        break;
                    }
                    simple_reply(&mut self.outbox, *cookie, refusal.error);
                    self.phase = Phase::RequestHeader;
                }
                // A client says nothing after goodbye; if it does, nobody listens.
                Phase::Closing(_) | Phase::Ended => {
                    rest = &[];
                    break;
                }
            }
        }
        bytes.len() - rest.len()
    }

    fn on_request(&mut self, header: Header) {
        let agreement = self.agreement.as_ref().expect("requests come after the agreement");
        let structured = agreement.structured;
        let cookie = header.cookie;
        match Command::parse(&header, agreement) {
            Ok(Command::Read { span }) => self.begin(cookie, Kind::Read(span), one(Op::Read { range: span.cover() })),
            Ok(Command::Status { span, one: just_one }) => {
                let kind = Kind::Status { span, one: just_one };
                self.begin(cookie, kind, one(Op::Status { range: span.cover() }));
            }
            Ok(Command::Zero { span, fua }) => {
                let zero = |part| match part {
                    Part::Whole(range) => Op::Zero { range, fua },
                    Part::Inside { len, .. } => change(part, Data::zeroed(len), fua),
                };
                self.begin(cookie, Kind::Other, span.parts().map(|part| part.map(zero)));
            }
            Ok(Command::Trim { range, fua }) => self.begin(cookie, Kind::Other, one(Op::Zero { range, fua })),
            Ok(Command::Flush) => self.begin(cookie, Kind::Other, one(Op::Flush)),
            Ok(Command::Nothing) => simple_reply(&mut self.outbox, cookie, 0),
            Ok(Command::Disconnect) => self.phase = Phase::Closing(End::Finished),
            Ok(Command::Write { .. }) | Err(_) if header.command == CMD_WRITE && header.len > PAYLOAD_MAX_ACCEPTED => {
                self.end(End::Garbage(format!("a write of {} bytes", header.len)));
            }
            Ok(Command::Write { span, fua }) => {
                let parts = span.parts().map(|part| part.map(|part| (part, Filling::new(part.len()))));
                self.phase = Phase::Payload { cookie, fua, parts };
            }
            Err(refusal) if header.command == CMD_WRITE => {
                self.phase = Phase::Skip { cookie, refusal, left: header.len as usize };
            }
            Err(refusal) => {
                // Only reads and status must be answered in the structured form.
                let structured = structured && matches!(header.command, CMD_READ | CMD_BLOCK_STATUS);
                error_reply(&mut self.outbox, cookie, structured, refusal);
            }
        }
    }

    /// Begins a request; its parts go on beside each other.
    fn begin(&mut self, cookie: u64, kind: Kind, parts: [Option<Op>; 3]) {
        let bytes = parts.iter().flatten().map(bytes_of).sum();
        let index = self.free.pop().unwrap_or_else(|| {
            self.pending.push(None);
            u16::try_from(self.pending.len() - 1).expect("REQUESTS_MAX bounds the requests")
        });
        let volume = self.agreement.as_ref().expect("requests come after the agreement").volume;
        let mut open = 0;
        for (part, op) in (0u16..).zip(parts.into_iter().flatten()) {
            open |= 1 << part;
            self.outputs.push_back(Output::Request { slot: Slot(index << PART_BITS | part), volume, op });
        }
        self.pending[usize::from(index)] = Some(Pending { cookie, kind, bytes, open, refusal: None });
        self.bytes_in_flight += bytes;
    }

    fn on_reply(&mut self, slot: Slot, reply: Reply) {
        let index = slot.0 >> PART_BITS;
        let part = 1 << (slot.0 & ((1 << PART_BITS) - 1));
        let entry = self.pending.get_mut(usize::from(index));
        let pending = entry.and_then(Option::as_mut).filter(|pending| pending.open & part != 0);
        let pending = pending.expect("a reply belongs to a part of a request under way");
        pending.open &= !part;
        if let Reply::Failed(error) = &reply {
            match refusal_of(*error) {
                Some(refusal) => pending.refusal = Some(refusal),
                None => return self.end(End::NotServed),
            }
        }
        if pending.open != 0 {
            return;
        }
        let Pending { cookie, kind, bytes, refusal, .. } =
            self.pending[usize::from(index)].take().expect("looked up above");
        self.free.push(index);
        self.bytes_in_flight -= bytes;
        let structured = self.agreement.as_ref().is_some_and(|agreement| agreement.structured);
        let out = &mut self.outbox;
        match (kind, reply) {
            (kind, _) if refusal.is_some() => {
                let structured = structured && !matches!(kind, Kind::Other);
                error_reply(out, cookie, structured, refusal.expect("looked at above"));
            }
            (Kind::Read(span), Reply::Data(data)) => {
                assert_eq!(data.len() as u64, span.cover().count.bytes().0, "a read brings what was asked");
                read_reply(out, cookie, structured, span);
                out.data(data.slice(span.offset()..span.offset() + span.len as usize));
            }
            (Kind::Status { span, one }, Reply::Status(runs)) => status_reply(out, cookie, &runs, span, one),
            (Kind::Other, Reply::Done) => simple_reply(out, cookie, 0),
            (_, reply) => panic!("a reply of the wrong kind: {reply:?}"),
        }
    }
}

/// A request of one part.
fn one(op: Op) -> [Option<Op>; 3] {
    [Some(op), None, None]
}

/// This part of a volume becomes `data`.
fn change(part: Part, data: Data, fua: bool) -> Op {
    match part {
        Part::Whole(range) => Op::Write { range, data, fua },
        Part::Inside { block, offset, .. } => Op::Patch { block, offset, data, fua },
    }
}

/// Memory that it takes while it is under way.
fn bytes_of(op: &Op) -> u64 {
    match op {
        Op::Read { range } | Op::Write { range, .. } => range.count.bytes().0,
        Op::Patch { .. } => BLOCK_BYTES,
        Op::Zero { .. } | Op::Flush | Op::Status { .. } => 0,
    }
}

/// `len` bytes off the front of what came before and what is there now; `None` (and all is kept) while there are fewer.
fn fill<'a>(partial: &mut Vec<u8>, rest: &mut &'a [u8], len: usize) -> Option<Cow<'a, [u8]>> {
    let (here, after) = rest.split_at(rest.len().min(len - partial.len()));
    *rest = after;
    if here.len() == len {
        return Some(Cow::Borrowed(here));
    }
    partial.extend_from_slice(here);
    (partial.len() == len).then(|| Cow::Owned(std::mem::take(partial)))
}

/// Big-endian bytes as a number.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}
