//! The NBD machine against clients made of bytes.

use pollux_base::block::BlockError;
use pollux_base::unit::{BlockCount, BlockIndex, BlockRange};
use pollux_base::{ByteCount, Data, Instant, Op, Reply, VolumeId};
use pollux_frontend::nbd::{Connection, End, Input, Output, Slot};
use pollux_frontend::{Export, Exports, Place};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::fmt::Write as _;

const SIZE: u64 = 1 << 30;
const START: Instant = Instant(0);
const GO: u32 = 7;

/// `disk` is served here, `away` is not.
fn exports() -> Exports {
    let size = ByteCount(SIZE);
    let here = Export { volume: VolumeId(5), size, is_read_only: false, place: Place::Here };
    let place = Place::Elsewhere("node `b` at 192.0.2.2:10809".to_owned());
    let away = Export { volume: VolumeId(6), size, is_read_only: false, place };
    Exports::complete(BTreeMap::from([("disk".to_owned(), here), ("away".to_owned(), away)]))
}

/// A client with its server.
struct Client {
    connection: Connection,
    exports: Exports,
}

impl Client {
    /// Connected, greeted, no option sent yet.
    fn connected() -> Client {
        let mut client = Client { connection: Connection::new(START), exports: exports() };
        assert_eq!(client.receive(), [b"NBDMAGICIHAVEOPT".as_slice(), &[0, 3]].concat());
        client.send(&3u32.to_be_bytes());
        client
    }

    /// In transmission on `disk`.
    fn transmitting(structured: bool) -> Client {
        let mut client = Client::connected();
        if structured {
            client.option(8, &[]);
            client.option(10, &context("disk", &["base:allocation"]));
        }
        let reply = client.option(GO, &go("disk", &[3]));
        assert!(reply.ends_with(&[0, 0, 0, 1, 0, 0, 0, 0]), "GO ends with ACK");
        client
    }

    fn handle(&mut self, now: Instant, input: Input<'_>) {
        self.connection.handle(now, input, &self.exports);
    }

    fn send(&mut self, bytes: &[u8]) {
        self.handle(START, Input::Bytes(bytes));
    }

    /// Everything the server has to say now.
    fn receive(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        loop {
            let segments = self.connection.take_segments();
            if segments.is_empty() {
                return bytes;
            }
            segments.iter().for_each(|segment| bytes.extend_from_slice(segment.as_slice()));
            self.handle(START, Input::Sent);
        }
    }

    fn option(&mut self, option: u32, data: &[u8]) -> Vec<u8> {
        self.send(&option_bytes(option, data));
        self.receive()
    }

    fn request(&mut self, command: u16, flags: u16, offset: u64, len: u32) {
        self.send(&request_bytes(command, flags, offset, len));
    }

    /// The one request that was begun.
    fn begun(&mut self) -> (Slot, Op) {
        match self.connection.poll() {
            Some(Output::Request { slot, volume, op }) => {
                assert_eq!(volume, VolumeId(5));
                (slot, op)
            }
            other => panic!("a request was expected, not {other:?}"),
        }
    }

    fn reply(&mut self, slot: Slot, reply: Reply) -> Vec<u8> {
        self.handle(START, Input::Reply(slot, reply));
        self.receive()
    }

    fn end(&mut self) -> End {
        match self.connection.poll() {
            Some(Output::End(end)) => end,
            other => panic!("an end was expected, not {other:?}"),
        }
    }
}

fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT".as_slice(), &option.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
}

fn go(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = string(name);
    data.extend_from_slice(&(infos.len() as u16).to_be_bytes());
    infos.iter().for_each(|info| data.extend_from_slice(&info.to_be_bytes()));
    data
}

fn context(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = string(name);
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|query| data.extend_from_slice(&string(query)));
    data
}

const COOKIE: u64 = 0x0123_4567_89ab_cdef;

fn request_bytes(command: u16, flags: u16, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&command.to_be_bytes());
    bytes.extend_from_slice(&COOKIE.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&len.to_be_bytes());
    bytes
}

fn simple(error: u32) -> Vec<u8> {
    [0x6744_6698u32.to_be_bytes().as_slice(), &error.to_be_bytes(), &COOKIE.to_be_bytes()].concat()
}

fn blocks(start: u64, count: u64) -> BlockRange {
    BlockRange::new(BlockIndex(start), BlockCount(count))
}

/// Bytes as a person can read them: text where it is text, else hexadecimal.
fn readable(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.chunks(16) {
        let hex = chunk.iter().fold(String::new(), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x} ");
            hex
        });
        let letters: String =
            chunk.iter().map(|byte| if (32..127).contains(byte) { char::from(*byte) } else { '.' }).collect();
        let _ = writeln!(text, "{hex:<48} {letters}");
    }
    text
}

/// The bytes of a handshake as QEMU makes it are frozen: a change here is a change of what clients see.
#[test]
fn the_handshake_of_a_common_client_stays_as_it_is() {
    let mut client = Client { connection: Connection::new(START), exports: exports() };
    let mut transcript = String::new();
    let steps = [
        ("greeting", Vec::new()),
        ("client flags", 3u32.to_be_bytes().to_vec()),
        ("an unknown option", option_bytes(99, b"?")),
        ("structured replies", option_bytes(8, &[])),
        ("list", option_bytes(3, &[])),
        ("list contexts", option_bytes(9, &context("disk", &[]))),
        ("set context", option_bytes(10, &context("disk", &["base:allocation", "x-other:thing"]))),
        ("go to an export that is elsewhere", option_bytes(GO, &go("away", &[3]))),
        ("go without asking for block sizes", option_bytes(GO, &go("disk", &[]))),
        ("go", option_bytes(GO, &go("disk", &[0, 3]))),
    ];
    for (name, bytes) in steps {
        client.send(&bytes);
        let _ = writeln!(transcript, "{name}\n{}", readable(&client.receive()));
    }
    assert_eq!(client.connection.export(), Some(("disk", VolumeId(5))));
    insta::assert_snapshot!(transcript);
}

#[test]
fn an_old_client_gets_in_by_export_name() {
    let mut client = Client::connected();
    let reply = client.option(1, b"disk");
    assert_eq!(reply.len(), 10, "no zeros for a client that wants none");
    assert_eq!(reply[..8], SIZE.to_be_bytes());
    client.request(0, 0, 0, 512);
    assert_eq!(client.receive(), simple(22), "it may not do what it did not agree on");
    let mut client = Client::connected();
    client.option(1, b"away");
    assert!(matches!(client.end(), End::Refused(why) if why.contains("node `b`")));
}

#[test]
fn abort_is_acknowledged_before_the_end() {
    let mut client = Client::connected();
    let reply = client.option(2, &[]);
    assert_eq!(reply.len(), 20);
    assert_eq!(client.end(), End::Finished);
}

#[test]
fn reads_come_in_the_form_agreed_on() {
    for structured in [false, true] {
        let mut client = Client::transmitting(structured);
        client.request(0, if structured { 4 } else { 0 }, 8192, 4096);
        let (slot, op) = client.begun();
        assert_eq!(op, Op::Read { range: blocks(2, 1) });
        let reply = client.reply(slot, Reply::Data(Data::copy_of(&[9; 4096])));
        let head = if structured {
            let mut head = 0x668e_33efu32.to_be_bytes().to_vec();
            head.extend_from_slice(&[0, 1, 0, 1]);
            head.extend_from_slice(&COOKIE.to_be_bytes());
            head.extend_from_slice(&4104u32.to_be_bytes());
            head.extend_from_slice(&8192u64.to_be_bytes());
            head
        } else {
            simple(0)
        };
        assert_eq!(reply, [head.as_slice(), &[9; 4096]].concat());
    }
}

#[test]
fn a_write_carries_its_bytes_aligned_and_its_fua() {
    let mut client = Client::transmitting(true);
    let mut bytes = request_bytes(1, 1, 4096, 8192);
    bytes.extend((0..8192u32).map(|at| (at / 3) as u8));
    // In splits that nobody thought of.
    for part in bytes.chunks(1000) {
        client.send(part);
    }
    let (slot, op) = client.begun();
    let Op::Write { range, data, fua } = op else { panic!("a write was sent") };
    assert_eq!((range, fua), (blocks(1, 2), true));
    assert!(data.is_aligned());
    assert_eq!(data.as_slice(), &bytes[28..]);
    assert_eq!(client.reply(slot, Reply::Done), simple(0));
}

#[test]
fn zeros_trims_and_flushes_become_their_requests() {
    let mut client = Client::transmitting(false);
    client.request(6, 2, 4096, 4096);
    let (slot, op) = client.begun();
    assert_eq!(op, Op::Zero { range: blocks(1, 1), fua: false });
    assert_eq!(client.reply(slot, Reply::Done), simple(0));
    client.request(3, 0, 0, 0);
    assert_eq!(client.begun().1, Op::Flush);
    // A trim is a hint: it is rounded inwards, to nothing if need be.
    client.request(4, 1, 100, 9000);
    assert_eq!(client.begun().1, Op::Zero { range: blocks(1, 1), fua: true });
    client.request(4, 0, 100, 4000);
    assert_eq!(client.connection.poll(), None);
    assert_eq!(client.receive(), simple(0));
}

#[test]
fn block_status_tells_merged_runs() {
    let mut client = Client::transmitting(true);
    let runs = vec![(blocks(0, 2), true), (blocks(2, 2), true), (blocks(4, 4), false)];
    for (flags, expected) in [(0u16, vec![16384u32, 0, 16384, 3]), (8, vec![16384, 0])] {
        client.request(7, flags, 0, 8 * 4096);
        let (slot, op) = client.begun();
        assert_eq!(op, Op::Status { range: blocks(0, 8) });
        let reply = client.reply(slot, Reply::Status(runs.clone()));
        let told: Vec<u32> =
            reply[24..].chunks(4).map(|bytes| bytes.iter().fold(0, |all, byte| all << 8 | u32::from(*byte))).collect();
        assert_eq!(told, expected);
    }
}

#[test]
fn bad_requests_are_refused_and_the_connection_goes_on() {
    let mut client = Client::transmitting(false);
    for (command, flags, offset, len, error) in [
        (0u16, 0u16, 1u64, 4096u32, 22u32),
        (0, 0, 0, 512, 22),
        (0, 0, 0, 0, 22),
        (0, 0, SIZE, 4096, 22),
        (0, 0, u64::MAX - 4095, 4096, 22),
        (0, 0, 0, 64 << 20, 22),
        (0, 4, 0, 4096, 22),
        (4, 0, SIZE, 4096, 22),
        (6, 0, SIZE - 4096, 8192, 28),
        (6, 16, 0, 4096, 22),
        (5, 0, 0, 4096, 22),
        (7, 0, 0, 4096, 22),
        (77, 0, 0, 0, 22),
    ] {
        client.request(command, flags, offset, len);
        assert_eq!(client.connection.poll(), None, "command {command} at {offset}+{len} is not begun");
        assert_eq!(client.receive(), simple(error), "command {command} at {offset}+{len}");
    }
    // The bytes of a refused write are not taken for requests.
    client.request(1, 0, SIZE, 4096);
    client.send(&[0xff; 4096]);
    assert_eq!(client.receive(), simple(28));
    client.request(3, 0, 0, 0);
    assert_eq!(client.begun().1, Op::Flush);
}

#[test]
fn a_volume_that_moved_away_ends_the_connection_instead_of_failing_the_guest() {
    let mut client = Client::transmitting(true);
    client.request(0, 0, 0, 4096);
    let (slot, _) = client.begun();
    assert_eq!(client.reply(slot, Reply::Failed(BlockError::NotServed)), []);
    assert_eq!(client.end(), End::NotServed);
}

#[test]
fn lost_data_is_an_error_with_a_text() {
    let mut client = Client::transmitting(true);
    client.request(0, 0, 0, 4096);
    let (slot, _) = client.begun();
    let reply = client.reply(slot, Reply::Failed(BlockError::Unreadable));
    assert_eq!(reply[4..8], [0, 1, 0x80, 1], "an error chunk, and the last");
    assert!(reply.ends_with(b"no copy of the data could be read"));
}

#[test]
fn goodbye_waits_for_what_is_under_way() {
    let mut client = Client::transmitting(false);
    client.request(3, 0, 0, 0);
    let (slot, _) = client.begun();
    client.request(2, 0, 0, 0);
    assert_eq!(client.connection.poll(), None);
    assert!(!client.connection.wants_input());
    assert_eq!(client.reply(slot, Reply::Done), simple(0));
    assert_eq!(client.end(), End::Finished);
}

#[test]
fn a_client_that_asks_without_end_is_held_back_not_served_without_bound() {
    let mut client = Client::transmitting(false);
    let flood: Vec<u8> = (0..1000).flat_map(|block| request_bytes(0, 0, block * 4096, 4096)).collect();
    client.send(&flood);
    let mut begun = Vec::new();
    let drain = |client: &mut Client, begun: &mut Vec<Slot>| {
        while let Some(Output::Request { slot, .. }) = client.connection.poll() {
            begun.push(slot);
        }
    };
    drain(&mut client, &mut begun);
    assert_eq!(begun.len(), 128);
    assert!(!client.connection.wants_input());
    let mut answered = 0;
    while let Some(slot) = begun.pop() {
        let reply = client.reply(slot, Reply::Data(Data::zeroed(4096)));
        assert_eq!(reply.len(), 16 + 4096);
        answered += 1;
        drain(&mut client, &mut begun);
        assert!(begun.len() <= 128);
    }
    assert_eq!(answered, 1000, "what was held back is served later");
    assert!(client.connection.wants_input());
}

#[test]
fn a_client_that_never_agrees_is_let_go() {
    let mut client = Client::connected();
    let deadline = client.connection.deadline().expect("a handshake has an end");
    client.handle(deadline, Input::Tick);
    assert_eq!(client.end(), End::Slow);
    let client = Client::transmitting(false);
    assert_eq!(client.connection.deadline(), None, "a guest may be silent for ever");
}

#[test]
fn a_client_that_comes_a_moment_too_early_waits_for_its_export() {
    let served = exports();
    let mut client = Client::connected();
    client.exports = Exports::default();
    let go_and_flush = [option_bytes(GO, &go("disk", &[3])), request_bytes(3, 0, 0, 0)].concat();
    client.send(&go_and_flush);
    assert_eq!(client.receive(), [], "nothing is known of exports yet");
    client.handle(START, Input::Tick);
    assert_eq!(client.receive(), []);
    client.exports = served;
    client.handle(START, Input::Exports);
    assert!(client.receive().ends_with(&[0, 0, 0, 1, 0, 0, 0, 0]), "GO ends with ACK");
    assert_eq!(client.begun().1, Op::Flush, "what it said meanwhile is not lost");
}

#[test]
fn a_client_that_has_waited_long_enough_is_refused() {
    let mut client = Client::connected();
    client.exports = Exports::default();
    client.option(GO, &go("disk", &[3]));
    let deadline = client.connection.deadline().expect("waiting has an end");
    client.handle(deadline, Input::Tick);
    let reply = client.receive();
    assert_eq!(reply[12..16], [0x80, 0, 0, 6]);
    client.exports = exports();
    assert!(client.option(GO, &go("disk", &[3])).ends_with(&[0, 0, 0, 1, 0, 0, 0, 0]), "it may ask again");
}

#[test]
fn garbage_ends_the_connection() {
    for garbage in [b"GET / HTTP/1.1\r\n\r\n".as_slice(), &[0xff; 100], b"\0\0\0\x03GARBAGEGARBAGEGARBAGE"] {
        let mut client = Client { connection: Connection::new(START), exports: exports() };
        client.send(garbage);
        assert!(matches!(client.end(), End::Garbage(_)));
    }
    let mut client = Client::transmitting(false);
    client.request(1, 0, 0, u32::MAX);
    assert!(matches!(client.end(), End::Garbage(_)), "4 GiB of payload are not waited for");
}

fn answer(op: &Op, choice: u8) -> Reply {
    match (op, choice % 8) {
        (_, 0) => Reply::Failed(BlockError::Unreadable),
        (_, 1) => Reply::Failed(BlockError::OutOfRange),
        (Op::Read { range }, _) => Reply::Data(Data::zeroed(range.count.bytes().0 as usize)),
        (Op::Status { range }, _) => Reply::Status(vec![(*range, choice.is_multiple_of(2))]),
        _ => Reply::Done,
    }
}

/// Things a client might say, sensible and not.
fn utterance() -> impl Strategy<Value = Vec<u8>> {
    let names = prop_oneof![Just("disk"), Just("away"), Just("")];
    prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..64),
        (0u32..14, proptest::collection::vec(any::<u8>(), 0..40))
            .prop_map(|(option, data)| option_bytes(option, &data)),
        (names.clone(), 6u32..8).prop_map(|(name, option)| option_bytes(option, &go(name, &[3]))),
        names.prop_map(|name| option_bytes(10, &context(name, &["base:allocation"]))),
        Just(option_bytes(8, &[])),
        (0u16..9, 0u16..32, 0u64..40, 0u32..6).prop_map(|(command, flags, start, count)| {
            let mut bytes = request_bytes(command, flags, start * 2048, count * 4096);
            if command == 1 {
                bytes.resize(bytes.len() + count as usize * 4096, 7);
            }
            bytes
        }),
    ]
}

proptest! {
    /// Whatever a client says, in whatever pieces, the server neither panics nor holds more than its bounds, and what is
    /// begun is in the export.
    #[test]
    fn no_bytes_of_a_client_do_more_than_end_its_connection(
        starts_well in any::<bool>(),
        utterances in proptest::collection::vec(utterance(), 0..40),
        split in 1usize..5000,
        choices in proptest::collection::vec(any::<u8>(), 1..50),
    ) {
        let mut client = if starts_well { Client::transmitting(true) } else { Client::connected() };
        let bytes = utterances.concat();
        let mut choices = choices.into_iter().cycle();
        for part in bytes.chunks(split) {
            client.send(part);
            while let Some(output) = client.connection.poll() {
                let Output::Request { slot, op, .. } = output else { return Ok(()) };
                if let Op::Read { range } | Op::Write { range, .. } | Op::Zero { range, .. } | Op::Status { range } = &op {
                    prop_assert!(range.count.0 > 0 && range.end().bytes().0 <= SIZE);
                }
                if let Op::Write { range, data, .. } = &op {
                    prop_assert_eq!(data.len() as u64, range.count.bytes().0);
                }
                let reply = answer(&op, choices.next().unwrap_or(0));
                client.reply(slot, reply);
            }
            client.receive();
        }
        client.handle(START, Input::Ended);
        prop_assert_eq!(client.end(), End::Finished);
    }

    /// Pieces make no difference.
    #[test]
    fn the_split_of_the_bytes_changes_nothing(split in 1usize..300) {
        let conversation = [
            3u32.to_be_bytes().to_vec(),
            option_bytes(8, &[]),
            option_bytes(10, &context("disk", &["base:allocation"])),
            option_bytes(GO, &go("disk", &[3])),
            request_bytes(3, 0, 0, 0),
            request_bytes(0, 0, 0, 4096),
        ]
        .concat();
        let said = |split: usize| {
            let mut client = Client { connection: Connection::new(START), exports: exports() };
            let mut said = Vec::new();
            for part in conversation.chunks(split) {
                client.send(part);
                said.extend(client.receive());
            }
            (said, client.begun(), client.begun())
        };
        prop_assert_eq!(said(split), said(conversation.len()));
    }
}

#[test]
fn a_client_of_a_snapshot_is_told_that_it_is_read_only() {
    let mut client = Client::connected();
    let frozen = |is_read_only| {
        let export = Export { volume: VolumeId(5), size: ByteCount(SIZE), is_read_only, place: Place::Here };
        Exports::complete(BTreeMap::from([("disk".to_owned(), export)]))
    };
    for is_read_only in [true, false] {
        client.exports = frozen(is_read_only);
        let reply = client.option(6, &go("disk", &[3]));
        let info = reply.windows(10).find(|bytes| bytes[..2] == [0, 0] && bytes[2..] == SIZE.to_be_bytes());
        let at = info.map(|info| info.as_ptr() as usize - reply.as_ptr() as usize + 10).expect("an export's size");
        assert_eq!(reply[at + 1] & 2 != 0, is_read_only);
    }
    client.option(GO, &go("disk", &[3]));
    client.request(1, 0, 0, 4096);
    client.send(&[7; 4096]);
    let (slot, _) = client.begun();
    let reply = client.reply(slot, Reply::Failed(BlockError::ReadOnly));
    assert_eq!(reply[4..8], 1u32.to_be_bytes(), "EPERM");
}
