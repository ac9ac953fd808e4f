//! One connection to a peer, from its first byte: dialled or accepted, hello both ways, then a path of the links.

use crate::sealed::{Opener, SealError, Sealer};
use pollux_base::{Instant, NodeId, Segment};
use pollux_host::link::Socket;
use pollux_replica::wire::{self, Decoder, Frame, HELLO_BYTES, Hello, KeyId, Place, WireError, Word};

/// One receive: large enough that 1 MiB frames take few turns.
const RECEIVE_BYTES: usize = 512 << 10;

pub(crate) struct Connection {
    pub socket: Socket,
    pub phase: Phase,
    /// Who is at the other end, for people: the address that was dialled, or by which listener it came.
    pub address: String,
    /// Place of the address among those of the node that listens there.
    pub rank: u8,
    /// Known from the start when dialled, else from its hello.
    pub peer: Option<NodeId>,
    pub is_dialled: bool,
    /// When to give up connecting or waiting for the hello.
    pub deadline: Option<Instant>,
    /// What this node has said of itself, once it has.
    pub own_hello: Option<[u8; HELLO_BYTES]>,
    /// The key that protects it; 0: none does.
    pub key: KeyId,
    pub sealer: Option<Sealer>,
    /// To be sent as it is, before the queue.
    plain: Vec<Segment>,
    queue: Vec<Segment>,
    pub queue_bytes: usize,
    pub is_sending: bool,
    /// Here while no receive is under way.
    pub buffer: Option<Vec<u8>>,
}

pub(crate) enum Phase {
    Connecting,
    /// Waiting for the peer's hello, of which this much is there.
    Greeting {
        bytes: Vec<u8>,
    },
    /// Only what says so is still to be sent.
    Refused,
    Up {
        decoder: Box<Decoder>,
        opener: Option<Box<Opener>>,
    },
}

impl Connection {
    pub fn new(
        socket: Socket,
        phase: Phase,
        peer: Option<NodeId>,
        address: String,
        rank: u8,
        deadline: Instant,
    ) -> Connection {
        Connection {
            socket,
            phase,
            address,
            rank,
            peer,
            is_dialled: peer.is_some(),
            deadline: Some(deadline),
            own_hello: None,
            key: 0,
            sealer: None,
            plain: Vec::new(),
            queue: Vec::new(),
            queue_bytes: 0,
            is_sending: false,
            buffer: Some(vec![0; RECEIVE_BYTES]),
        }
    }

    pub fn is_up(&self) -> bool {
        matches!(self.phase, Phase::Up { .. })
    }

    /// Whether nobody has proved yet who it is: what counts against the bound of those.
    pub fn is_stranger(&self) -> bool {
        match &self.phase {
            Phase::Up { opener: Some(opener), .. } => !self.is_dialled && !opener.is_proven(),
            Phase::Up { opener: None, .. } => false,
            Phase::Connecting | Phase::Greeting { .. } | Phase::Refused => !self.is_dialled,
        }
    }

    /// Whether its keys have carried so much that it is to be replaced.
    pub fn is_worn(&self) -> bool {
        let is_opener_worn = matches!(&self.phase, Phase::Up { opener: Some(opener), .. } if opener.is_worn());
        is_opener_worn || self.sealer.as_ref().is_some_and(Sealer::is_worn)
    }

    pub fn greet(&mut self, hello: &Hello) -> [u8; HELLO_BYTES] {
        let bytes = wire::encode_hello(hello);
        self.own_hello = Some(bytes);
        self.plain.push(Segment::Bytes(bytes.to_vec()));
        bytes
    }

    pub fn has_something_to_send(&self) -> bool {
        !self.plain.is_empty() || !self.queue.is_empty()
    }

    /// What is to be sent, as it goes onto the wire.
    pub fn take_queue(&mut self) -> Result<Vec<Segment>, SealError> {
        self.queue_bytes = 0;
        let mut out = std::mem::take(&mut self.plain);
        match &mut self.sealer {
            Some(sealer) => {
                let sealed = sealer.seal(&self.queue)?;
                self.queue.clear();
                if out.is_empty() {
                    return Ok(sealed);
                }
                out.extend(sealed);
            }
            None if out.is_empty() => return Ok(std::mem::take(&mut self.queue)),
            None => out.append(&mut self.queue),
        }
        Ok(out)
    }

    pub fn push_frame(&mut self, place: Place, frame: &Frame) {
        self.queue_bytes += wire::encode_onto(place, frame, &mut self.queue);
    }

    pub fn push_word(&mut self, received: u64, word: &Word) {
        self.queue_bytes += wire::encode_word(received, word, &mut self.queue);
    }

    /// Takes bytes of the peer's hello. The hello, once it is whole, as it came, and how many of the bytes were its.
    pub fn take_hello(&mut self, bytes: &[u8]) -> Result<Option<(Hello, [u8; HELLO_BYTES], usize)>, WireError> {
        let Phase::Greeting { bytes: hello } = &mut self.phase else { return Ok(None) };
        let taken = bytes.len().min(HELLO_BYTES - hello.len());
        hello.extend_from_slice(&bytes[..taken]);
        wire::check_start(hello)?;
        let Ok(whole) = <[u8; HELLO_BYTES]>::try_from(hello.as_slice()) else { return Ok(None) };
        Ok(Some((wire::decode_hello(&whole)?, whole, taken)))
    }
}
