//! Option haggling: until client and server agree on an export.

use super::outbox::{Outbox, Reader};
use super::proto::*;
use crate::export::{Export, Exports, Found};
use pollux_base::VolumeId;
use pollux_base::unit::BLOCK_BYTES;

/// What was agreed before transmission.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agreement {
    pub name: String,
    pub volume: VolumeId,
    /// Size in bytes, as the client was told.
    pub size: u64,
    pub structured: bool,
    /// The client may ask for `base:allocation`.
    pub block_status: bool,
}

/// What an option leads to.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The next option follows.
    Haggle,
    /// The export may be served here in a moment: nothing was said yet, try again then.
    Wait,
    Transmit(Agreement),
    /// The client said goodbye; what is in the outbox is still sent.
    Bye,
    /// The protocol knows no reply for this but hanging up.
    HangUp(String),
}

/// What the client has settled so far.
#[derive(Default)]
pub struct Handshake {
    /// The client wants no 124 zeros after EXPORT_NAME.
    pub no_zeroes: bool,
    structured: bool,
    /// Export for which `base:allocation` was selected last.
    context_of: Option<String>,
}

/// The server's first words.
pub fn greet(out: &mut Outbox) {
    out.u64(INIT_MAGIC);
    out.u64(OPTION_MAGIC);
    out.u16(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
}

impl Handshake {
    /// One option, complete. `may_wait`: the client has not waited long enough yet.
    pub fn on_option(
        &mut self,
        option: u32,
        data: &[u8],
        exports: &Exports,
        may_wait: bool,
        out: &mut Outbox,
    ) -> Outcome {
        match option {
            OPT_EXPORT_NAME => return self.on_export_name(data, exports, may_wait, out),
            OPT_ABORT => {
                reply(out, option, REP_ACK, &[]);
                return Outcome::Bye;
            }
            OPT_LIST if data.is_empty() => {
                for name in exports.here() {
                    let mut entry = (name.len() as u32).to_be_bytes().to_vec();
                    entry.extend_from_slice(name.as_bytes());
                    reply(out, option, REP_SERVER, &entry);
                }
                reply(out, option, REP_ACK, &[]);
            }
            OPT_STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                reply(out, option, REP_ACK, &[]);
            }
            OPT_LIST | OPT_STRUCTURED_REPLY => {
                return refuse(out, option, REP_ERR_INVALID, "this option takes no data");
            }
            OPT_INFO | OPT_GO => {
                return self.on_go(option, data, exports, may_wait, out);
            }
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => {
                return self.on_meta_context(option, data, exports, may_wait, out);
            }
            _ => return refuse(out, option, REP_ERR_UNSUP, "this server does not know this option"),
        }
        Outcome::Haggle
    }

    fn on_export_name(&mut self, data: &[u8], exports: &Exports, may_wait: bool, out: &mut Outbox) -> Outcome {
        match find(data, exports, may_wait) {
            Ok((name, export)) => {
                out.u64(export.size.0);
                out.u16(self.transmission_flags(export));
                if !self.no_zeroes {
                    out.bytes(&[0; 124]);
                }
                Outcome::Transmit(self.agree(name, export))
            }
            // This option has no error reply; the old clients that use it see the end of the connection.
            Err(Some(why)) => Outcome::HangUp(why),
            Err(None) => Outcome::Wait,
        }
    }

    /// INFO and GO differ only in what follows a success.
    fn on_go(&mut self, option: u32, data: &[u8], exports: &Exports, may_wait: bool, out: &mut Outbox) -> Outcome {
        let Some((name, asks_block_size)) = parse_go(data) else {
            return refuse(out, option, REP_ERR_INVALID, "lengths inside the option do not add up");
        };
        let (name, export) = match find(name, exports, may_wait) {
            Ok(found) => found,
            Err(Some(why)) => return refuse(out, option, REP_ERR_UNKNOWN, &why),
            Err(None) => return Outcome::Wait,
        };
        let mut sizes = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [BLOCK_BYTES as u32, BLOCK_SIZE_PREFERRED, PAYLOAD_MAX_ADVERTISED] {
            sizes.extend_from_slice(&size.to_be_bytes());
        }
        reply(out, option, REP_INFO, &sizes);
        if !asks_block_size {
            let text = "requests must be multiples of 4096 bytes: ask for NBD_INFO_BLOCK_SIZE and keep to it";
            return refuse(out, option, REP_ERR_BLOCK_SIZE_REQD, text);
        }
        let mut info = INFO_EXPORT.to_be_bytes().to_vec();
        info.extend_from_slice(&export.size.0.to_be_bytes());
        info.extend_from_slice(&self.transmission_flags(export).to_be_bytes());
        reply(out, option, REP_INFO, &info);
        reply(out, option, REP_ACK, &[]);
        if option == OPT_GO { Outcome::Transmit(self.agree(name, export)) } else { Outcome::Haggle }
    }

    fn on_meta_context(
        &mut self,
        option: u32,
        data: &[u8],
        exports: &Exports,
        may_wait: bool,
        out: &mut Outbox,
    ) -> Outcome {
        let selects = option == OPT_SET_META_CONTEXT;
        if selects {
            // Each selection replaces the one before, also when it fails.
            self.context_of = None;
        }
        if !self.structured {
            return refuse(out, option, REP_ERR_INVALID, "structured replies must be agreed on first");
        }
        let Some((name, queries)) = parse_meta_context(data) else {
            return refuse(out, option, REP_ERR_INVALID, "lengths inside the option do not add up");
        };
        let name = match find(name, exports, may_wait) {
            Ok((name, _)) => name,
            Err(Some(why)) => return refuse(out, option, REP_ERR_UNKNOWN, &why),
            Err(None) => return Outcome::Wait,
        };
        let matches = match (selects, queries.as_slice()) {
            (false, []) => true,
            (false, queries) => queries.iter().any(|query| *query == b"base:" || *query == BASE_ALLOCATION.as_bytes()),
            (true, queries) => queries.contains(&BASE_ALLOCATION.as_bytes()),
        };
        if matches {
            let id = if selects { BASE_ALLOCATION_ID } else { 0 };
            let mut context = id.to_be_bytes().to_vec();
            context.extend_from_slice(BASE_ALLOCATION.as_bytes());
            reply(out, option, REP_META_CONTEXT, &context);
            if selects {
                self.context_of = Some(name.to_owned());
            }
        }
        reply(out, option, REP_ACK, &[]);
        Outcome::Haggle
    }

    fn transmission_flags(&self, export: &Export) -> u16 {
        let always = TRANSMISSION_HAS_FLAGS
            | TRANSMISSION_SEND_FLUSH
            | TRANSMISSION_SEND_FUA
            | TRANSMISSION_SEND_TRIM
            | TRANSMISSION_SEND_WRITE_ZEROES
            | TRANSMISSION_CAN_MULTI_CONN;
        // Reads are always answered in one piece, so "do not fragment" costs nothing; but the flag is only legal with
        // structured replies.
        let fragments = if self.structured { TRANSMISSION_SEND_DF } else { 0 };
        let read_only = if export.is_read_only { TRANSMISSION_READ_ONLY } else { 0 };
        always | fragments | read_only
    }

    fn agree(&self, name: &str, export: &Export) -> Agreement {
        Agreement {
            name: name.to_owned(),
            volume: export.volume,
            size: export.size.0,
            structured: self.structured,
            block_status: self.structured && self.context_of.as_deref() == Some(name),
        }
    }
}

/// The name, and whether the client wants to know the block sizes.
fn parse_go(data: &[u8]) -> Option<(&[u8], bool)> {
    let mut reader = Reader(data);
    let name = reader.string()?;
    let count = reader.u16()?;
    let mut asks_block_size = false;
    for _ in 0..count {
        asks_block_size |= reader.u16()? == INFO_BLOCK_SIZE;
    }
    reader.0.is_empty().then_some((name, asks_block_size))
}

fn parse_meta_context(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let mut reader = Reader(data);
    let name = reader.string()?;
    let count = reader.u32()?;
    let mut queries = Vec::new();
    // Bounded by the data: each query takes four bytes of it at least.
    for _ in 0..count {
        queries.push(reader.string()?);
    }
    reader.0.is_empty().then_some((name, queries))
}

/// The export of this name; else why not, or `None` if waiting may help.
fn find<'a>(name: &'a [u8], exports: &'a Exports, may_wait: bool) -> Result<(&'a str, &'a Export), Option<String>> {
    if name.len() > NAME_BYTES_MAX {
        return Err(Some(format!("a name of {} bytes is longer than {NAME_BYTES_MAX}", name.len())));
    }
    let name = std::str::from_utf8(name).map_err(|_| Some("the name is not UTF-8".to_owned()))?;
    match exports.find(name) {
        Found::Here(export) => Ok((name, export)),
        Found::Soon(_) if may_wait => Err(None),
        Found::Soon(why) | Found::No(why) => Err(Some(why)),
    }
}

fn reply(out: &mut Outbox, option: u32, kind: u32, data: &[u8]) {
    out.u64(OPTION_REPLY_MAGIC);
    out.u32(option);
    out.u32(kind);
    out.u32(data.len() as u32);
    out.bytes(data);
}

fn refuse(out: &mut Outbox, option: u32, error: u32, text: &str) -> Outcome {
    reply(out, option, error, text.as_bytes());
    Outcome::Haggle
}
