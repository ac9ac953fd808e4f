//! Frames as bytes. The decoder takes bytes in any split and is bounded by the lengths it has checked: a header is
//! believed only with a right checksum, and memory is taken only for lengths within the bounds of `wire.rs`.

use super::{BODY_BYTES_MAX, CHECKSUMS_MAX, Carried, DATA_BYTES_MAX, Frame, Message, Place, WIRE_VERSION, What, Word};
use pollux_base::checksum::crc32c;
use pollux_base::data::{Filling, Segment};
use pollux_base::unit::BLOCK_BYTES;
use pollux_base::{BlockChecksum, ClusterId, NodeId};
use std::collections::VecDeque;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

const MAGIC: [u8; 4] = *b"plxF";
const KIND_FRAME: u16 = 0;
const KIND_WORD: u16 = 1;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 4],
    version: U16,
    /// Whether the body is a message of the cores or a word of the links.
    kind: U16,
    body_bytes: U32,
    /// Checksums of 8 bytes each that follow the body.
    checksums: U32,
    /// Bytes of blocks that follow the checksums.
    data_bytes: U32,
    /// CRC-32C of body and checksums. The blocks are covered by their checksums.
    body_crc: U32,
    /// Of the frame among all of its channel; 0 for a word.
    number: U64,
    /// Frames below this number have arrived at the sender.
    received: U64,
    /// CRC-32C of the header's bytes before.
    header_crc: U32,
}

const HEADER_BYTES: usize = size_of::<Header>();
/// Bodies of messages about blocks take some 60 bytes.
const SMALL_BODY_BYTES: usize = 128;
/// Small frames run together up to here, so that no piece grows without end.
const RUN_BYTES_MAX: usize = 16 << 10;

/// Why bytes are not a frame, or a frame not what it says. The connection is of no further use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("the peer does not speak Pollux")]
    NotPollux,
    #[error("the peer is of cluster {found}, this node of {expected}")]
    OtherCluster { expected: ClusterId, found: ClusterId },
    #[error("the peer says that it is this node, {0}")]
    SameNode(NodeId),
    #[error("no wire version in common: this node speaks {} to {}, the peer {} to {}", own.0, own.1, peer.0, peer.1)]
    NoCommonVersion { own: (u16, u16), peer: (u16, u16) },
    #[error("a frame begins with {0:02x?}")]
    Magic([u8; 4]),
    #[error("the peer speaks wire version {found}, this node {expected}")]
    Version { expected: u16, found: u16 },
    #[error("header checksum is {expected:08x} but its bytes give {actual:08x}")]
    HeaderChecksum { expected: u32, actual: u32 },
    #[error("{what} of {actual} where at most {max} is allowed")]
    TooLong { what: &'static str, actual: usize, max: usize },
    #[error("{data_bytes} bytes of blocks with {checksums} checksums")]
    Lengths { data_bytes: usize, checksums: usize },
    #[error("body checksum is {expected:08x} but its bytes give {actual:08x}")]
    BodyChecksum { expected: u32, actual: u32 },
    #[error("the body is no message: {0}")]
    Body(String),
    #[error("block {index} came with checksum {expected:?} but its bytes give {actual:?}")]
    Block { index: usize, expected: BlockChecksum, actual: BlockChecksum },
}

/// The bytes of a frame, as pieces to be sent in order; its blocks are not copied.
pub fn encode(place: Place, frame: &Frame) -> Vec<Segment> {
    let mut segments = Vec::new();
    encode_onto(place, frame, &mut segments);
    segments
}

/// Adds the bytes of a frame to pieces to be sent, and says how many they are. Small frames run together.
pub fn encode_onto(place: Place, frame: &Frame, segments: &mut Vec<Segment>) -> usize {
    // Nearly every message is small: no memory is taken for it.
    let mut small = [0; SMALL_BODY_BYTES];
    let large;
    let body: &[u8] = match postcard::to_slice(&frame.message, &mut small) {
        Ok(body) => body,
        Err(_) => {
            large =
                postcard::to_stdvec(&frame.message).expect("messages are plain data, which postcard always encodes");
            &large
        }
    };
    let data_bytes = frame.data.as_ref().map_or(0, |data| data.len());
    assert!(body.len() <= BODY_BYTES_MAX, "a body of {} bytes; lists are bounded where they are made", body.len());
    assert!(
        frame.checksums.len() <= CHECKSUMS_MAX && data_bytes <= DATA_BYTES_MAX,
        "a frame carries at most an extent"
    );
    assert!(
        data_bytes == 0 || data_bytes == frame.checksums.len() * BLOCK_BYTES as usize,
        "each block travels with its checksum"
    );
    let len = head(KIND_FRAME, place, body, &frame.checksums, data_bytes, segments) + data_bytes;
    segments.extend(frame.data.clone().map(Segment::Data));
    len
}

/// Adds the bytes of a word of the links, and says how many they are.
pub fn encode_word(received: u64, word: &Word, segments: &mut Vec<Segment>) -> usize {
    let mut small = [0; SMALL_BODY_BYTES];
    let body = postcard::to_slice(word, &mut small).expect("words are a few numbers");
    head(KIND_WORD, Place { number: 0, received }, body, &[], 0, segments)
}

/// Adds header, body and checksums.
fn head(
    kind: u16,
    place: Place,
    body: &[u8],
    checksums: &[BlockChecksum],
    data_bytes: usize,
    segments: &mut Vec<Segment>,
) -> usize {
    if !matches!(segments.last(), Some(Segment::Bytes(last)) if last.len() < RUN_BYTES_MAX) {
        let len = HEADER_BYTES + body.len() + checksums.len() * 8;
        segments.push(Segment::Bytes(Vec::with_capacity(len)));
    }
    let Some(Segment::Bytes(bytes)) = segments.last_mut() else { unreachable!("just seen to") };
    let start = bytes.len();
    bytes.resize(start + HEADER_BYTES, 0);
    bytes.extend_from_slice(body);
    for checksum in checksums {
        bytes.extend_from_slice(&checksum.0.to_le_bytes());
    }
    let mut header = Header {
        magic: MAGIC,
        version: WIRE_VERSION.into(),
        kind: kind.into(),
        body_bytes: (body.len() as u32).into(),
        checksums: (checksums.len() as u32).into(),
        data_bytes: (data_bytes as u32).into(),
        body_crc: crc32c(&bytes[start + HEADER_BYTES..]).into(),
        number: place.number.into(),
        received: place.received.into(),
        header_crc: 0.into(),
    };
    header.header_crc = crc32c(&header.as_bytes()[..HEADER_BYTES - 4]).into();
    bytes[start..start + HEADER_BYTES].copy_from_slice(header.as_bytes());
    bytes.len() - start
}

/// What a header says of what follows it; lengths are within bounds.
struct Lengths {
    kind: u16,
    place: Place,
    body_bytes: usize,
    /// Of body and checksums.
    rest_bytes: usize,
    data_bytes: usize,
    /// Of body and checksums.
    crc: u32,
}

/// What the next bytes belong to.
enum Part {
    Header {
        bytes: [u8; HEADER_BYTES],
        filled: usize,
    },
    /// Body and checksums.
    Body {
        bytes: Vec<u8>,
        lengths: Lengths,
    },
    Blocks {
        place: Place,
        frame: Frame,
        blocks: Filling,
    },
}

/// Makes frames of a connection's bytes (those after the hello). After an error every further call gives it again.
pub struct Decoder {
    part: Part,
    /// Whole frames not yet taken: never more than arrived in one `push`.
    frames: VecDeque<Carried>,
    error: Option<WireError>,
}

impl Default for Decoder {
    fn default() -> Self {
        Decoder::new()
    }
}

impl Decoder {
    pub fn new() -> Decoder {
        Decoder { part: Decoder::header(), frames: VecDeque::new(), error: None }
    }

    /// Takes bytes as they come. Blocks are copied once, into memory that is aligned for the disk.
    pub fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && self.error.is_none() {
            let taken = match self.take(bytes) {
                Ok(taken) => taken,
                Err(error) => {
                    self.error = Some(error);
                    return;
                }
            };
            bytes = &bytes[taken..];
        }
    }

    /// The next whole frame, if one has arrived. Its blocks are not yet held against their checksums (`Frame::verify`).
    pub fn next_frame(&mut self) -> Result<Option<Carried>, WireError> {
        match (self.frames.pop_front(), &self.error) {
            (Some(frame), _) => Ok(Some(frame)),
            (None, Some(error)) => Err(error.clone()),
            (None, None) => Ok(None),
        }
    }

    /// Body and checksums of a frame have come.
    fn on_body(&mut self, place: Place, what: What, data_bytes: usize) {
        match what {
            What::Frame(frame) if data_bytes != 0 => {
                self.part = Part::Blocks { place, frame, blocks: Filling::new(data_bytes) };
            }
            what => {
                self.part = Decoder::header();
                self.frames.push_back(Carried { place, what });
            }
        }
    }

    /// Whether a frame's blocks have arrived in part.
    pub fn is_amid_blocks(&self) -> bool {
        matches!(self.part, Part::Blocks { .. })
    }

    fn header() -> Part {
        Part::Header { bytes: [0; HEADER_BYTES], filled: 0 }
    }

    /// Uses some of the bytes (at least one), and says how many.
    fn take(&mut self, input: &[u8]) -> Result<usize, WireError> {
        // Header, body and checksums mostly lie here together, and are then read where they lie.
        if let (Part::Header { filled: 0, .. }, Some(header)) = (&self.part, input.first_chunk())
            && header.starts_with(&MAGIC)
        {
            let lengths = parse_header(header)?;
            let taken = HEADER_BYTES + lengths.rest_bytes;
            if let Some(rest) = input.get(HEADER_BYTES..taken) {
                let what = parse_body(rest, &lengths)?;
                self.on_body(lengths.place, what, lengths.data_bytes);
                return Ok(taken);
            }
        }
        match &mut self.part {
            Part::Header { bytes, filled } => {
                let taken = input.len().min(HEADER_BYTES - *filled);
                bytes[*filled..*filled + taken].copy_from_slice(&input[..taken]);
                *filled += taken;
                // Another program is told by its first bytes; its silence need not be waited for.
                if *filled >= 4 && bytes[..4] != MAGIC {
                    return Err(WireError::Magic([bytes[0], bytes[1], bytes[2], bytes[3]]));
                }
                if *filled == HEADER_BYTES {
                    let lengths = parse_header(bytes)?;
                    self.part = Part::Body { bytes: Vec::with_capacity(lengths.rest_bytes), lengths };
                }
                Ok(taken)
            }
            Part::Body { bytes, lengths } => {
                let taken = input.len().min(lengths.rest_bytes - bytes.len());
                bytes.extend_from_slice(&input[..taken]);
                if bytes.len() == lengths.rest_bytes {
                    let (what, place, data_bytes) = (parse_body(bytes, lengths)?, lengths.place, lengths.data_bytes);
                    self.on_body(place, what, data_bytes);
                }
                Ok(taken)
            }
            Part::Blocks { blocks, .. } => {
                let taken = blocks.take(input);
                if blocks.missing() == 0
                    && let Part::Blocks { place, mut frame, blocks } =
                        std::mem::replace(&mut self.part, Decoder::header())
                {
                    frame.data = Some(blocks.finish().freeze());
                    self.frames.push_back(Carried { place, what: What::Frame(frame) });
                }
                Ok(taken)
            }
        }
    }
}

fn parse_header(bytes: &[u8; HEADER_BYTES]) -> Result<Lengths, WireError> {
    let header = Header::ref_from_bytes(bytes).expect("the array is as long as the header, which has no alignment");
    let actual = crc32c(&bytes[..HEADER_BYTES - 4]);
    if header.header_crc.get() != actual {
        return Err(WireError::HeaderChecksum { expected: header.header_crc.get(), actual });
    }
    if header.version.get() != WIRE_VERSION {
        return Err(WireError::Version { expected: WIRE_VERSION, found: header.version.get() });
    }
    let bounded = |what: &'static str, actual: U32, max: usize| match actual.get() as usize {
        actual if actual > max => Err(WireError::TooLong { what, actual, max }),
        actual => Ok(actual),
    };
    let body_bytes = bounded("a body", header.body_bytes, BODY_BYTES_MAX)?;
    let checksums = bounded("a number of checksums", header.checksums, CHECKSUMS_MAX)?;
    let data_bytes = bounded("data", header.data_bytes, DATA_BYTES_MAX)?;
    if data_bytes != 0 && data_bytes != checksums * BLOCK_BYTES as usize {
        return Err(WireError::Lengths { data_bytes, checksums });
    }
    if body_bytes == 0 {
        return Err(WireError::Body("it is empty".to_string()));
    }
    let kind = header.kind.get();
    if kind == KIND_WORD && checksums != 0 {
        return Err(WireError::Lengths { data_bytes, checksums });
    }
    let place = Place { number: header.number.get(), received: header.received.get() };
    let rest_bytes = body_bytes + checksums * 8;
    Ok(Lengths { kind, place, body_bytes, rest_bytes, data_bytes, crc: header.body_crc.get() })
}

fn parse_body(bytes: &[u8], lengths: &Lengths) -> Result<What, WireError> {
    let (expected, actual) = (lengths.crc, crc32c(bytes));
    if actual != expected {
        return Err(WireError::BodyChecksum { expected, actual });
    }
    let (body, checksums) = bytes.split_at(lengths.body_bytes);
    let message = match lengths.kind {
        KIND_FRAME => parsed::<Message>(body)?,
        KIND_WORD => return Ok(What::Word(parsed(body)?)),
        kind => return Err(WireError::Body(format!("its kind is {kind}"))),
    };
    let checksums = checksums
        .chunks_exact(8)
        .map(|bytes| BlockChecksum(u64::from_le_bytes(bytes.try_into().expect("chunks are of 8 bytes"))))
        .collect();
    Ok(What::Frame(Frame { message, checksums, data: None }))
}

fn parsed<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, WireError> {
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Ok(value),
        Ok((_, rest)) => Err(WireError::Body(format!("{} bytes are left over", rest.len()))),
        Err(error) => Err(WireError::Body(error.to_string())),
    }
}
