//! Option haggling: until client and server agree on an export.

use super::outbox::{Outbox, Reader};
use super::proto::*;
use crate::export::{Export, Exports, Found};
use pollux_base::VolumeId;

/// What was agreed before transmission.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agreement {
    pub name: String,
    pub volume: VolumeId,
    /// Size in bytes, as the client was told.
    pub size: u64,
    pub is_read_only: bool,
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
    /// What is in the outbox is sent as it is, everything after it over TLS; haggling begins anew.
    StartTls,
    /// The client said goodbye; what is in the outbox is still sent.
    Bye,
    /// The protocol knows no reply for this but hanging up.
    HangUp(String),
}

/// How far a connection is secured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Security {
    /// It needs no TLS, and there is none: it does not leave the machine, or the configuration says so.
    Plain,
    /// Nothing is said of exports before TLS (FORCEDTLS in the protocol's words).
    TlsWanted,
    TlsUp,
}

/// What the client has settled so far.
pub struct Handshake {
    pub security: Security,
    /// The client came over the network: it sees public exports only.
    is_outside: bool,
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
    pub fn new(security: Security, is_outside: bool) -> Handshake {
        Handshake { security, is_outside, no_zeroes: false, structured: false, context_of: None }
    }

    /// Nothing that was said in the clear counts any more.
    pub fn restart_in_tls(&mut self) {
        self.security = Security::TlsUp;
        self.structured = false;
        self.context_of = None;
    }

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
            OPT_STARTTLS => return self.on_start_tls(data, out),
            OPT_EXPORT_NAME if self.security == Security::TlsWanted => {
                return Outcome::HangUp("it asked for an export without TLS, which is required here".to_owned());
            }
            OPT_ABORT => {}
            _ if self.security == Security::TlsWanted => {
                return refuse(out, option, REP_ERR_TLS_REQD, "this server talks over TLS only: begin with STARTTLS");
            }
            _ => {}
        }
        match option {
            OPT_EXPORT_NAME => return self.on_export_name(data, exports, may_wait, out),
            OPT_ABORT => {
                reply(out, option, REP_ACK, &[]);
                return Outcome::Bye;
            }
            OPT_LIST if data.is_empty() => {
                for name in exports.here(self.is_outside) {
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
        match self.find(data, exports, may_wait) {
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
        let Some(name) = parse_go(data) else {
            return refuse(out, option, REP_ERR_INVALID, "lengths inside the option do not add up");
        };
        let (name, export) = match self.find(name, exports, may_wait) {
            Ok(found) => found,
            Err(Some(why)) => return refuse(out, option, REP_ERR_UNKNOWN, &why),
            Err(None) => return Outcome::Wait,
        };
        let mut sizes = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [BLOCK_SIZE_MIN, BLOCK_SIZE_PREFERRED, PAYLOAD_MAX_ADVERTISED] {
            sizes.extend_from_slice(&size.to_be_bytes());
        }
        reply(out, option, REP_INFO, &sizes);
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
        let name = match self.find(name, exports, may_wait) {
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

    fn on_start_tls(&mut self, data: &[u8], out: &mut Outbox) -> Outcome {
        match self.security {
            _ if !data.is_empty() => refuse(out, OPT_STARTTLS, REP_ERR_INVALID, "this option takes no data"),
            Security::Plain => refuse(out, OPT_STARTTLS, REP_ERR_POLICY, "there is no TLS at this address"),
            Security::TlsUp => refuse(out, OPT_STARTTLS, REP_ERR_INVALID, "TLS is in use already"),
            Security::TlsWanted => {
                reply(out, OPT_STARTTLS, REP_ACK, &[]);
                Outcome::StartTls
            }
        }
    }

    fn transmission_flags(&self, export: &Export) -> u16 {
        let mut flags = TRANSMISSION_HAS_FLAGS
            | TRANSMISSION_SEND_FLUSH
            | TRANSMISSION_SEND_FUA
            | TRANSMISSION_CAN_MULTI_CONN
            | TRANSMISSION_SEND_CACHE;
        flags |= match export.is_read_only {
            true => TRANSMISSION_READ_ONLY,
            false => TRANSMISSION_SEND_TRIM | TRANSMISSION_SEND_WRITE_ZEROES | TRANSMISSION_SEND_FAST_ZERO,
        };
        // Reads are always answered in one piece, so "do not fragment" costs nothing; but the flag is only legal with
        // structured replies.
        if self.structured { flags | TRANSMISSION_SEND_DF } else { flags }
    }

    /// The export of this name; else why not, or `None` if waiting may help.
    fn find<'a>(
        &self,
        name: &'a [u8],
        exports: &'a Exports,
        may_wait: bool,
    ) -> Result<(&'a str, &'a Export), Option<String>> {
        if name.len() > NAME_BYTES_MAX {
            return Err(Some(format!("a name of {} bytes is longer than {NAME_BYTES_MAX}", name.len())));
        }
        let name = std::str::from_utf8(name).map_err(|_| Some("the name is not UTF-8".to_owned()))?;
        match exports.find(name, self.is_outside) {
            Found::Here(export) => Ok((name, export)),
            Found::Soon(_) if may_wait => Err(None),
            Found::Soon(why) | Found::No(why) => Err(Some(why)),
        }
    }

    fn agree(&self, name: &str, export: &Export) -> Agreement {
        Agreement {
            name: name.to_owned(),
            volume: export.volume,
            size: export.size.0,
            is_read_only: export.is_read_only,
            structured: self.structured,
            block_status: self.structured && self.context_of.as_deref() == Some(name),
        }
    }
}

/// The name. Which kinds of information are asked for changes nothing: they are all told.
fn parse_go(data: &[u8]) -> Option<&[u8]> {
    let mut reader = Reader(data);
    let name = reader.string()?;
    let count = reader.u16()?;
    reader.bytes(2 * usize::from(count))?;
    reader.0.is_empty().then_some(name)
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
