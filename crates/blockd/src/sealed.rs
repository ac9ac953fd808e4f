//! What protects a connection: the bytes after the hellos travel in records, each encrypted and authenticated. Pure.
//!
//! ```text
//! record:  length of the plain text (4 bytes, little endian)   the plain text, encrypted   tag (16 bytes)
//! ```
//!
//! AES-256-GCM. Each direction of each connection has a key of its own, made (HKDF-SHA-256, RFC 5869) from the secret that
//! the two nodes share and all of both hellos, which hold random numbers of both. The nonce counts records, so a record that
//! is repeated, left out, out of order, from the other direction or from another connection does not open, nor one of which
//! a bit has changed. The first record that does not open ends the connection. A connection that is cut off ends in the
//! middle of a frame or of what the links count, never unnoticed.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, KeyType, Prk, Salt};
use pollux_base::data::Buffer;
use pollux_base::secret::SECRET_BYTES;
use pollux_base::{Data, Secret, Segment};
use pollux_replica::wire::HELLO_BYTES;
use std::collections::VecDeque;
use zeroize::Zeroizing;

const HEAD_BYTES: usize = 4;
const TAG_BYTES: usize = 16;
/// Most plain text in a record. It is opened when it has arrived whole: long enough that records cost little, short enough
/// that it is still in the processor's cache then.
pub const RECORD_BYTES_MAX: usize = 64 << 10;
/// Records are written into buffers of this length, several records to a buffer.
const BUFFER_BYTES: usize = 256 << 10;
/// Buffers kept for the next send: those of one send under way and of the one being made.
const SPARE_MAX: usize = 8;
/// Data from this length on is encrypted from where it lies; what is shorter is gathered first.
const DIRECT_BYTES_MIN: usize = 1024;
/// A direction that has carried so much is to be replaced: 2^34 cipher blocks, for which the bound on telling AES-GCM from
/// noise (Iwata, Ohashi, Minematsu 2012) is still below 2^-60.
pub const WORN_BYTES: u64 = 256 << 30;
/// Beyond this nothing is sent any more, whoever failed to replace it.
const SPENT_BYTES: u64 = 4 * WORN_BYTES;

const LABELS: [&[u8]; 2] = [b"pollux replication 2, from who dialled", b"pollux replication 2, to who dialled"];

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    #[error(
        "the peer's first record cannot be opened: it has another key under the same name, or somebody changed a hello"
    )]
    WrongKey,
    #[error("record {0} was changed on its way, left out, repeated, or is not the peer's")]
    Forged(u64),
    #[error("a record of {0} bytes where 1 to {RECORD_BYTES_MAX} are allowed; the peer may not encrypt")]
    Length(u32),
    #[error("its keys have been used for as long as is safe")]
    Spent,
}

/// Both directions of a connection, for who dialled it or for who was dialled.
pub fn keys(
    secret: &Secret,
    dialler: &[u8; HELLO_BYTES],
    dialled: &[u8; HELLO_BYTES],
    is_dialler: bool,
) -> (Sealer, Opener) {
    let prk = Salt::new(HKDF_SHA256, b"pollux replication 2").extract(secret.expose());
    let [there, back] = LABELS.map(|label| Direction::new(&prk, &[label, dialler, dialled]));
    let (to_peer, from_peer) = if is_dialler { (there, back) } else { (back, there) };
    (Sealer { direction: to_peer, spare: VecDeque::new() }, Opener { direction: from_peer, held: Vec::new() })
}

struct Direction {
    key: LessSafeKey,
    /// What the record's number is mixed into.
    start: [u8; NONCE_BYTES],
    records: u64,
    bytes: u64,
}

const NONCE_BYTES: usize = 12;
const MATERIAL_BYTES: usize = SECRET_BYTES + NONCE_BYTES;

struct Material;

impl KeyType for Material {
    fn len(&self) -> usize {
        MATERIAL_BYTES
    }
}

impl Direction {
    fn new(prk: &Prk, info: &[&[u8]]) -> Direction {
        let mut material = Zeroizing::new([0; MATERIAL_BYTES]);
        let expanded = prk.expand(info, Material).and_then(|okm| okm.fill(&mut *material));
        expanded.expect("far less is asked for than HKDF gives");
        let key =
            UnboundKey::new(&AES_256_GCM, &material[..SECRET_BYTES]).expect("the key is as long as the cipher asks");
        let start = material[SECRET_BYTES..].try_into().expect("the rest is as long as a nonce");
        Direction { key: LessSafeKey::new(key), start, records: 0, bytes: 0 }
    }

    /// The nonce of the next record: never the same twice, because records are counted and never so many that the count
    /// begins anew.
    fn next_nonce(&mut self, bytes: usize) -> Nonce {
        let mut nonce = self.start;
        nonce[4..].iter_mut().zip(self.records.to_be_bytes()).for_each(|(byte, count)| *byte ^= count);
        self.records += 1;
        self.bytes += bytes as u64;
        Nonce::assume_unique_for_key(nonce)
    }
}

/// Encrypts what is sent.
pub struct Sealer {
    direction: Direction,
    /// Buffers given out earlier, of use again when nobody else holds them.
    spare: VecDeque<Data>,
}

impl Sealer {
    /// Whether the connection is to be replaced by one with fresh keys.
    pub fn is_worn(&self) -> bool {
        self.direction.bytes >= WORN_BYTES
    }

    /// The records that carry these pieces. Long ones are encrypted on the way into the buffer that is sent, and copied
    /// nowhere else (W11).
    pub fn seal(&mut self, segments: &[Segment]) -> Result<Vec<Segment>, SealError> {
        if self.direction.bytes >= SPENT_BYTES {
            return Err(SealError::Spent);
        }
        let mut writer = Writer { sealer: self, buffer: None, start: 0, gathered: 0, out: Vec::new() };
        for segment in segments {
            writer.add(segment.as_slice());
        }
        writer.end_record(&[]);
        writer.end_buffer();
        Ok(writer.out)
    }

    fn buffer(&mut self) -> Buffer {
        if let Some(data) = self.spare.pop_front() {
            match data.reclaim() {
                Ok(buffer) => return buffer,
                // Still being sent; those behind it are younger.
                Err(data) => self.spare.push_front(data),
            }
        }
        Buffer::zeroed(BUFFER_BYTES)
    }
}

/// One `seal`.
struct Writer<'a> {
    sealer: &'a mut Sealer,
    buffer: Option<Buffer>,
    /// Where the present record begins.
    start: usize,
    /// Plain text that lies behind its head.
    gathered: usize,
    out: Vec<Segment>,
}

impl Writer<'_> {
    fn add(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let is_direct = bytes.len() >= DIRECT_BYTES_MIN;
            let room = self.room();
            if room < bytes.len().min(DIRECT_BYTES_MIN) {
                self.end_record(&[]);
                self.next_buffer_if_full();
                continue;
            }
            let (now, later) = bytes.split_at(bytes.len().min(room));
            if is_direct {
                self.end_record(now);
            } else {
                let at = self.start + HEAD_BYTES + self.gathered;
                self.bytes()[at..at + now.len()].copy_from_slice(now);
                self.gathered += now.len();
            }
            bytes = later;
        }
    }

    fn bytes(&mut self) -> &mut [u8] {
        let Writer { sealer, buffer, .. } = self;
        buffer.get_or_insert_with(|| sealer.buffer()).as_mut_slice()
    }

    /// How much the present record can still take.
    fn room(&self) -> usize {
        let in_buffer = BUFFER_BYTES.saturating_sub(self.start + HEAD_BYTES + self.gathered + TAG_BYTES);
        in_buffer.min(RECORD_BYTES_MAX - self.gathered)
    }

    fn next_buffer_if_full(&mut self) {
        if self.room() < DIRECT_BYTES_MIN {
            self.end_buffer();
        }
    }

    /// Seals what is gathered, and `extra` behind it.
    fn end_record(&mut self, extra: &[u8]) {
        let (start, gathered, len) = (self.start, self.gathered, self.gathered + extra.len());
        if len == 0 {
            return;
        }
        let head = (len as u32).to_le_bytes();
        let nonce = self.sealer.direction.next_nonce(len);
        let Writer { sealer, buffer, .. } = self;
        let bytes = buffer.get_or_insert_with(|| sealer.buffer()).as_mut_slice();
        let record = &mut bytes[start..start + HEAD_BYTES + len + TAG_BYTES];
        let (place, rest) = record.split_at_mut(HEAD_BYTES);
        place.copy_from_slice(&head);
        let (in_place, out) = rest.split_at_mut(gathered);
        let sealed = sealer.direction.key.seal_in_place_scatter(nonce, Aad::from(head), in_place, extra, out);
        sealed.expect("a record is far shorter than the cipher's bound");
        self.start += HEAD_BYTES + len + TAG_BYTES;
        self.gathered = 0;
    }

    fn end_buffer(&mut self) {
        let len = std::mem::take(&mut self.start);
        if let Some(buffer) = self.buffer.take() {
            let data = buffer.freeze();
            if len > 0 {
                self.out.push(Segment::Data(data.slice(0..len)));
            }
            if self.sealer.spare.len() < SPARE_MAX {
                self.sealer.spare.push_back(data);
            }
        }
    }
}

/// Opens what arrives.
pub struct Opener {
    direction: Direction,
    /// The start of a record whose end has not arrived.
    held: Vec<u8>,
}

impl Opener {
    /// Whether the peer has proved that it has the key.
    pub fn is_proven(&self) -> bool {
        self.direction.records > 0
    }

    /// Whether the connection is to be replaced by one with fresh keys.
    pub fn is_worn(&self) -> bool {
        self.direction.bytes >= WORN_BYTES
    }

    /// Takes bytes as they come, and gives the plain text of each record that is whole. Records are opened where they lie.
    /// After an error nothing more can be opened.
    pub fn push(&mut self, mut bytes: &mut [u8], mut plain: impl FnMut(&[u8])) -> Result<(), SealError> {
        while !self.held.is_empty() && !bytes.is_empty() {
            let missing = match self.held.first_chunk() {
                Some(head) => HEAD_BYTES + length(head)? + TAG_BYTES - self.held.len(),
                None => HEAD_BYTES - self.held.len(),
            };
            let (now, later) = bytes.split_at_mut(missing.min(bytes.len()));
            self.held.extend_from_slice(now);
            bytes = later;
            if now.len() == missing && self.held.len() > HEAD_BYTES {
                let mut held = std::mem::take(&mut self.held);
                plain(self.open(&mut held)?);
                held.clear();
                self.held = held;
            }
        }
        while let Some(head) = bytes.first_chunk() {
            let whole = HEAD_BYTES + length(head)? + TAG_BYTES;
            if bytes.len() < whole {
                break;
            }
            let (record, rest) = std::mem::take(&mut bytes).split_at_mut(whole);
            plain(self.open(record)?);
            bytes = rest;
        }
        self.held.extend_from_slice(bytes);
        // An absurd length is told at once, not when more has come.
        self.held.first_chunk().map_or(Ok(0), length).map(|_| ())
    }

    fn open<'a>(&mut self, record: &'a mut [u8]) -> Result<&'a [u8], SealError> {
        let (head, sealed) = record.split_at_mut(HEAD_BYTES);
        let head: [u8; HEAD_BYTES] = (&*head).try_into().expect("just split so");
        let number = self.direction.records;
        let nonce = self.direction.next_nonce(sealed.len());
        match self.direction.key.open_in_place(nonce, Aad::from(head), sealed) {
            Ok(plain) => Ok(plain),
            Err(_) if number == 0 => Err(SealError::WrongKey),
            Err(_) => Err(SealError::Forged(number)),
        }
    }
}

fn length(head: &[u8; HEAD_BYTES]) -> Result<usize, SealError> {
    match u32::from_le_bytes(*head) {
        length if length == 0 || length as usize > RECORD_BYTES_MAX => Err(SealError::Length(length)),
        length => Ok(length as usize),
    }
}
