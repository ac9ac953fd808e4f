//! The target for fuzzers (`pollux_base::fuzz`): the whole NBD server under a client that says anything, in any pieces.

use crate::nbd::{Connection, End, Input, Output, PAYLOAD_MAX_ACCEPTED, Reach, Slot};
use crate::{Export, Exports, Place};
use pollux_base::fuzz::{Tape, Target};
use pollux_base::unit::{BLOCK_BYTES, BlockRange};
use pollux_base::{BlockError, BlockIndex, ByteCount, Data, Instant, Op, Reply, VolumeId};
use std::collections::VecDeque;
use std::time::Duration;

pub const TARGETS: &[Target] = &[Target { name: "frontend_nbd", run: nbd, seeds: nbd_seeds }];

const SIZE: u64 = 64 << 20;
/// One client's requests and their parts (nbd/connection.rs).
const SLOTS_MAX: usize = 3 * 128;

fn exports(is_settled: bool) -> Exports {
    let export = |volume, place| Export {
        volume: VolumeId(volume),
        size: ByteCount(SIZE),
        is_read_only: volume == 7,
        is_public: volume != 5,
        place,
    };
    let soon = if is_settled { Place::Here } else { Place::Soon };
    let away = Place::Elsewhere("node `b`".to_owned());
    let all = [
        ("disk", export(5, Place::Here)),
        ("away", export(6, away)),
        ("image", export(7, Place::Here)),
        ("soon", export(8, soon)),
        ("open", export(9, Place::Here)),
    ];
    Exports::complete(all.map(|(name, export)| (name.to_owned(), export)).into())
}

struct Rig {
    connection: Connection,
    exports: Exports,
    now: Instant,
    under_way: VecDeque<(Slot, Op)>,
    end: Option<End>,
}

impl Rig {
    fn give(&mut self, input: Input<'_>) {
        self.connection.handle(self.now, input, &self.exports);
        while let Some(output) = self.connection.poll() {
            assert!(self.end.is_none(), "nothing follows the end");
            match output {
                Output::Request { slot, op, .. } => {
                    check_op(&op);
                    assert!(self.under_way.iter().all(|(other, _)| *other != slot), "{slot:?} is under way");
                    self.under_way.push_back((slot, op));
                }
                Output::End(end) => self.end = Some(end),
            }
        }
        assert!(self.under_way.len() <= SLOTS_MAX, "what one client can have under way is bounded");
        let held: u64 = self.under_way.iter().map(|(_, op)| memory_of(op)).sum();
        assert!(held <= 2 * u64::from(PAYLOAD_MAX_ACCEPTED) + 2 * BLOCK_BYTES, "{held} bytes under way");
        if self.end.is_none() {
            let mut known: Vec<Slot> = self.connection.slots().collect();
            let mut ours: Vec<Slot> = self.under_way.iter().map(|(slot, _)| *slot).collect();
            known.sort_unstable();
            ours.sort_unstable();
            assert_eq!(known, ours, "each part of a request ends once");
        }
    }

    fn answer(&mut self, with: u8) {
        let Some((slot, op)) = self.under_way.pop_front() else { return };
        let reply = match (with % 16, op) {
            (1, _) => Reply::Failed(BlockError::Unreadable),
            (2, _) => Reply::Failed(BlockError::OutOfRange),
            (3, _) => Reply::Failed(BlockError::NotServed),
            (_, Op::Read { range }) => Reply::Data(Data::zeroed(range.count.bytes().0 as usize)),
            (_, Op::Status { range }) => Reply::Status(range.split_by(|block| block.0 / 8 % 2 == u64::from(with & 1))),
            _ => Reply::Done,
        };
        self.give(Input::Reply(slot, reply));
    }

    fn send(&mut self) {
        let segments = self.connection.take_segments();
        if !segments.is_empty() {
            assert!(segments.iter().all(|segment| !segment.is_empty()));
            self.give(Input::Sent);
        }
    }
}

fn memory_of(op: &Op) -> u64 {
    match op {
        Op::Read { range } | Op::Write { range, .. } => range.count.bytes().0,
        Op::Patch { .. } => BLOCK_BYTES,
        Op::Zero { .. } | Op::Flush | Op::Status { .. } => 0,
    }
}

/// The data plane is asked only for what lies in the export.
fn check_op(op: &Op) {
    let is_inside = |range: BlockRange| {
        range.count.0 > 0
            && range.start.0.checked_add(range.count.0).is_some_and(|end| BlockIndex(end).bytes().0 <= SIZE)
    };
    assert!(op.range().is_none_or(is_inside), "{op:?}");
    match op {
        Op::Write { range, data, .. } => assert_eq!(data.len() as u64, range.count.bytes().0),
        Op::Patch { offset, data, .. } => {
            assert!(
                !data.is_empty() && offset + data.len() <= BLOCK_BYTES as usize && data.len() < BLOCK_BYTES as usize
            );
        }
        Op::Read { .. } | Op::Zero { .. } | Op::Flush | Op::Status { .. } => {}
    }
}

/// Three bytes of how, then what the client says: where from, in which pieces, and in which order requests end.
pub fn nbd(bytes: &[u8]) {
    let mut tape = Tape(bytes);
    let (how, step, with) = (tape.u8(), 1 + usize::from(tape.u8()), tape.u8());
    let reach = if how & 1 == 0 { Reach::Local } else { Reach::Network(None) };
    let now = Instant(1);
    let connection = Connection::new(now, reach);
    let mut rig = Rig { connection, exports: exports(false), now, under_way: VecDeque::new(), end: None };
    let lag = usize::from(how >> 4);
    let mut pieces = tape.0.chunks(if step > 200 { tape.0.len().max(1) } else { step });
    while rig.end.is_none() {
        if rig.connection.wants_input() {
            let Some(piece) = pieces.next() else { break };
            rig.give(Input::Bytes(piece));
        } else if rig.under_way.is_empty() && rig.connection.deadline().is_some() {
            // A client that waits for an export, or that said goodbye.
            rig.now = rig.now + Duration::from_secs(4);
            if how & 2 != 0 {
                rig.exports = exports(true);
            }
            rig.give(Input::Exports);
            rig.give(Input::Tick);
        }
        while rig.under_way.len() > lag || (!rig.connection.wants_input() && !rig.under_way.is_empty()) {
            rig.answer(with);
            if rig.end.is_some() {
                return;
            }
        }
        if how & 4 == 0 || !rig.connection.wants_input() {
            rig.send();
        }
    }
    rig.give(Input::Ended);
    assert!(rig.end.is_some(), "a client that is gone is let go");
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT".as_slice(), &option.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
}

fn go(name: &str) -> Vec<u8> {
    option(7, &[&string(name)[..], &[0, 1, 0, 3]].concat())
}

fn context(number: u32, name: &str) -> Vec<u8> {
    option(number, &[&string(name)[..], &[0, 0, 0, 1], &string("base:allocation")].concat())
}

fn request(command: u16, flags: u16, offset: u64, len: u32) -> Vec<u8> {
    let head = [&0x2560_9513u32.to_be_bytes()[..], &flags.to_be_bytes(), &command.to_be_bytes(), &[7; 8]].concat();
    [&head[..], &offset.to_be_bytes(), &len.to_be_bytes()].concat()
}

fn nbd_seeds() -> Vec<Vec<u8>> {
    let said = |how: [u8; 3], parts: &[Vec<u8>]| [&how[..], &[0, 0, 0, 3], &parts.concat()].concat();
    let haggling =
        [option(3, &[]), option(8, &[]), context(9, "disk"), context(10, "disk"), option(6, &string("away"))];
    let payload = [request(1, 1, 4000, 200), vec![5; 200]].concat();
    let requests = [
        request(0, 0, 4096, 8192),
        request(0, 4, 100, 5000),
        payload,
        request(6, 2, 0, 10_000),
        request(4, 0, 4096, 8192),
        request(5, 0, 0, 4096),
        request(7, 0, 0, 1 << 20),
        request(7, 8, 5, 9000),
        request(3, 0, 0, 0),
        request(9, 0, 0, 0),
        request(0, 0, SIZE, 4096),
        request(2, 0, 0, 0),
    ];
    let whole = |name: &str| [&haggling[..], &[go(name)], &requests].concat();
    vec![
        said([0, 255, 0], &whole("disk")),
        said([0x34, 9, 1], &whole("open")),
        said([1, 63, 0], &whole("image")),
        said([2, 31, 0], &[go("soon"), request(3, 0, 0, 0)]),
        said([0, 255, 0], &[option(1, b"disk"), request(0, 0, 0, 4096)]),
        said([0, 255, 3], &[option(5, &[]), go("disk"), request(0, 0, 0, 4096)]),
        said([0, 255, 0], &[option(2, &[])]),
        b"\x00\xff\x00GET / HTTP/1.1\r\n".to_vec(),
    ]
}
