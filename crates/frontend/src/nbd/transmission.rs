//! Requests and replies once an export is agreed on: parsing and printing, no state.

use super::handshake::Agreement;
use super::outbox::{Outbox, Reader};
use super::proto::*;
use super::span::Span;
use pollux_base::block::BlockError;
use pollux_base::unit::BlockRange;

/// A request's header takes this many bytes.
pub const REQUEST_BYTES: usize = 28;

/// A request's header, as it came.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    pub flags: u16,
    pub command: u16,
    /// The client's name for the request; handed back with the reply.
    pub cookie: u64,
    pub offset: u64,
    pub len: u32,
}

impl Header {
    /// `None`: these bytes are no request.
    pub fn parse(bytes: &[u8]) -> Option<Header> {
        let mut reader = Reader(bytes);
        if reader.u32()? != REQUEST_MAGIC {
            return None;
        }
        Some(Header {
            flags: reader.u16()?,
            command: reader.u16()?,
            cookie: reader.u64()?,
            offset: reader.u64()?,
            len: reader.u32()?,
        })
    }
}

/// What a header asks for, checked against the export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Read {
        span: Span,
    },
    /// As many payload bytes as the span has follow.
    Write {
        span: Span,
        fua: bool,
    },
    Zero {
        span: Span,
        fua: bool,
    },
    /// A hint: only these whole blocks are zeroed.
    Trim {
        range: BlockRange,
        fua: bool,
    },
    Flush,
    Status {
        span: Span,
        one: bool,
    },
    Disconnect,
    /// A hint that there is nothing to do about.
    Nothing,
}

/// Why a request is refused: the protocol's error and a text for a human.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub error: u32,
    pub text: &'static str,
}

const fn invalid(text: &'static str) -> Refusal {
    Refusal { error: EINVAL, text }
}

impl Command {
    pub fn parse(header: &Header, agreement: &Agreement) -> Result<Command, Refusal> {
        let allowed = match header.command {
            // FUA is legal on every command, also where it says nothing.
            CMD_READ => CMD_FLAG_FUA | if agreement.structured { CMD_FLAG_DF } else { 0 },
            CMD_WRITE_ZEROES => CMD_FLAG_FUA | CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO,
            CMD_BLOCK_STATUS => CMD_FLAG_FUA | CMD_FLAG_REQ_ONE,
            _ => CMD_FLAG_FUA,
        };
        if header.flags & !allowed != 0 {
            return Err(invalid("a flag that this command does not have"));
        }
        let fua = header.flags & CMD_FLAG_FUA != 0;
        if agreement.is_read_only && matches!(header.command, CMD_WRITE | CMD_WRITE_ZEROES | CMD_TRIM) {
            return Err(Refusal { error: EPERM, text: "the export is read-only" });
        }
        match header.command {
            CMD_READ => {
                let span = span(header, agreement, EINVAL)?;
                if header.len > PAYLOAD_MAX_ACCEPTED {
                    return Err(invalid("more than 32 MiB in one read"));
                }
                Ok(Command::Read { span })
            }
            CMD_WRITE => Ok(Command::Write { span: span(header, agreement, ENOSPC)?, fua }),
            CMD_WRITE_ZEROES => Ok(Command::Zero { span: span(header, agreement, ENOSPC)?, fua }),
            CMD_TRIM => {
                let range = span(header, agreement, EINVAL)?.inner();
                Ok(if range.count.0 == 0 { Command::Nothing } else { Command::Trim { range, fua } })
            }
            // There is no cache to fill.
            CMD_CACHE => span(header, agreement, EINVAL).map(|_| Command::Nothing),
            CMD_FLUSH => Ok(Command::Flush),
            CMD_BLOCK_STATUS => {
                if !agreement.block_status {
                    return Err(invalid("no metadata context was selected"));
                }
                let mut span = span(header, agreement, EINVAL)?;
                span.len = span.len.min(STATUS_BYTES_MAX);
                Ok(Command::Status { span, one: header.flags & CMD_FLAG_REQ_ONE != 0 })
            }
            CMD_DISC => Ok(Command::Disconnect),
            _ => Err(invalid("this server does not know this command")),
        }
    }
}

/// The bytes of the request, which lie inside the export.
fn span(header: &Header, agreement: &Agreement, beyond: u32) -> Result<Span, Refusal> {
    if header.len == 0 {
        return Err(invalid("a length of zero"));
    }
    let len = u64::from(header.len);
    match header.offset.checked_add(len) {
        Some(end) if end <= agreement.size => Ok(Span { start: header.offset, len }),
        _ => Err(Refusal { error: beyond, text: "beyond the end of the export" }),
    }
}

/// What a client is told of a failed request. `None`: the connection ends instead, because an error would reach the
/// guest, while a client that loses its connection asks again, here or at the node that serves the volume now.
pub fn refusal_of(error: BlockError) -> Option<Refusal> {
    match error {
        BlockError::NoVolume | BlockError::NotServed => None,
        BlockError::OutOfRange => Some(invalid("outside the volume")),
        BlockError::ReadOnly => Some(Refusal { error: EPERM, text: "the volume is of a snapshot, and read-only" }),
        BlockError::Unreadable => Some(Refusal { error: EIO, text: "no copy of the data could be read" }),
    }
}

pub fn simple_reply(out: &mut Outbox, cookie: u64, error: u32) {
    out.u32(SIMPLE_REPLY_MAGIC);
    out.u32(error);
    out.u64(cookie);
}

fn structured_reply(out: &mut Outbox, cookie: u64, kind: u16, len: usize) {
    out.u32(STRUCTURED_REPLY_MAGIC);
    out.u16(REPLY_FLAG_DONE);
    out.u16(kind);
    out.u64(cookie);
    out.u32(u32::try_from(len).expect("payloads and their headers are far below 4 GiB"));
}

/// Head of a read's reply; the data follows.
pub fn read_reply(out: &mut Outbox, cookie: u64, structured: bool, span: Span) {
    if structured {
        structured_reply(out, cookie, REPLY_TYPE_OFFSET_DATA, 8 + span.len as usize);
        out.u64(span.start);
    } else {
        simple_reply(out, cookie, 0);
    }
}

/// The runs tell whether there may be data; adjoining ones that say the same are told as one. They are of whole blocks,
/// what is told is of the asked bytes.
pub fn status_reply(out: &mut Outbox, cookie: u64, runs: &[(BlockRange, bool)], span: Span, one: bool) {
    let runs_max = if one { 1 } else { STATUS_RUNS_MAX };
    let mut merged: Vec<(u64, u32)> = Vec::new();
    for (range, has_data) in runs {
        let flags = if *has_data { 0 } else { STATE_HOLE | STATE_ZERO };
        let (start, end) = (range.start.bytes().0.max(span.start), range.end().bytes().0.min(span.start + span.len));
        let Some(len) = end.checked_sub(start).filter(|len| *len > 0) else { continue };
        let is_full = merged.len() == runs_max;
        match merged.last_mut() {
            Some((run, last)) if *last == flags => *run += len,
            _ if is_full => break,
            _ => merged.push((len, flags)),
        }
    }
    assert!(!merged.is_empty(), "a status covers the asked range, which is not empty");
    structured_reply(out, cookie, REPLY_TYPE_BLOCK_STATUS, 4 + 8 * merged.len());
    out.u32(BASE_ALLOCATION_ID);
    for (len, flags) in merged {
        out.u32(u32::try_from(len).expect("a status looks at 1 GiB at most"));
        out.u32(flags);
    }
}

pub fn error_reply(out: &mut Outbox, cookie: u64, structured: bool, refusal: Refusal) {
    if structured {
        structured_reply(out, cookie, REPLY_TYPE_ERROR, 6 + refusal.text.len());
        out.u32(refusal.error);
        out.u16(refusal.text.len() as u16);
        out.bytes(refusal.text.as_bytes());
    } else {
        simple_reply(out, cookie, refusal.error);
    }
}
