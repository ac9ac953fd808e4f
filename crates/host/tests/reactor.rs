//! The reactor against the real kernel: what it promises to the daemon's loop.

use pollux_base::{ByteCount, Data, DiskError, DiskOp, DiskOpId, DiskOpKind, Segment};
use pollux_host::disk::Disk;
use pollux_host::link::{Socket, listen_tcp, listen_unix, outgoing};
use pollux_host::reactor::{Done, Event, Op, Reactor, Sending, Token};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

type Outcome = Result<(), Box<dyn std::error::Error>>;
const PATIENCE: Duration = Duration::from_secs(10);

/// The next event; fails the test when none comes.
fn next(reactor: &mut Reactor) -> Event {
    let mut events = Vec::new();
    let start = Instant::now();
    while events.is_empty() && start.elapsed() < PATIENCE {
        reactor.wait(Some(PATIENCE), &mut events).expect("waiting works");
    }
    assert_eq!(events.len(), 1, "exactly one event is expected");
    events.remove(0)
}

fn disk(reactor: &mut Reactor, id: u64, kind: DiskOpKind) -> Result<Option<Data>, DiskError> {
    reactor.submit(Token(0), Op::Disk(DiskOp { id: DiskOpId::new(id), kind }));
    match next(reactor).done {
        Done::Disk(done) => {
            assert_eq!(done.id, DiskOpId::new(id));
            done.result
        }
        _ => panic!("a disk operation ends as one"),
    }
}

/// A connected pair: our socket and the other program's.
fn pair(reactor: &mut Reactor) -> Result<(Socket, TcpStream), Box<dyn std::error::Error>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let socket = outgoing(address)?;
    reactor.submit(Token(1), Op::Connect(socket.clone(), address));
    assert!(matches!(next(reactor).done, Done::Connected(Ok(()))));
    Ok((socket, listener.accept()?.0))
}

#[test]
fn a_disk_gives_back_what_was_written() -> Outcome {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("pool");
    Disk::create_file(&path, ByteCount(1 << 20))?;
    let mut reactor = Reactor::new()?;
    reactor.add_disk(Disk::open(&path)?);

    let parts = vec![Data::copy_of(&[1; 4096]), Data::copy_of(&[2; 8192])];
    let write = DiskOpKind::Write { offset: ByteCount(8192), data: parts, sync: true };
    assert_eq!(disk(&mut reactor, 1, write), Ok(None));
    assert_eq!(disk(&mut reactor, 2, DiskOpKind::Flush), Ok(None));
    let read =
        disk(&mut reactor, 3, DiskOpKind::Read { offset: ByteCount(8192), len: 12288 })?.expect("reads bring data");
    assert!(read.is_aligned());
    assert!(read.as_slice()[..4096].iter().all(|byte| *byte == 1));
    assert!(read.as_slice()[4096..].iter().all(|byte| *byte == 2));

    assert_eq!(disk(&mut reactor, 4, DiskOpKind::Discard { offset: ByteCount(8192), len: 4096 }), Ok(None));
    // More parts than one system call can gather.
    let many = (0..2000u32).map(|part| Data::copy_of(&[part as u8; 512])).collect::<Vec<_>>();
    let write = DiskOpKind::Write { offset: ByteCount(0), data: many, sync: false };
    assert_eq!(disk(&mut reactor, 5, write), Ok(None));
    let read =
        disk(&mut reactor, 6, DiskOpKind::Read { offset: ByteCount(0), len: 512 * 2000 })?.expect("reads bring data");
    assert!(read.as_slice().chunks(512).enumerate().all(|(part, bytes)| bytes.iter().all(|byte| *byte == part as u8)));
    Ok(())
}

#[test]
fn a_short_read_is_an_error_never_a_success() -> Outcome {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("pool");
    Disk::create_file(&path, ByteCount(8192))?;
    let mut reactor = Reactor::new()?;
    reactor.add_disk(Disk::open(&path)?);
    let result = disk(&mut reactor, 1, DiskOpKind::Read { offset: ByteCount(4096), len: 8192 });
    assert_eq!(result, Err(DiskError::Short { expected: 8192, actual: 4096 }));
    Ok(())
}

#[test]
fn bytes_of_a_large_gathered_send_arrive_in_order() -> Outcome {
    let mut reactor = Reactor::new()?;
    let (socket, mut other) = pair(&mut reactor)?;
    // Far more than the socket holds, in more segments than one system call gathers, of both kinds.
    let expected: Vec<u8> = (0..30_000_000u32).map(|at| (at / 7) as u8).collect();
    let segments = expected
        .chunks(999)
        .enumerate()
        .map(|(index, bytes)| match index % 2 {
            0 => Segment::Bytes(bytes.to_vec()),
            _ => Segment::Data(Data::copy_of(bytes)),
        })
        .collect();
    assert_eq!(reactor.send(Token(2), &socket, segments)?, Sending::UnderWay);
    let len = expected.len();
    let reader = std::thread::spawn(move || {
        let mut bytes = vec![0; len];
        other.read_exact(&mut bytes).map(|()| bytes)
    });
    let event = next(&mut reactor);
    assert_eq!(event.token, Token(2));
    assert!(matches!(event.done, Done::Sent(Ok(()))));
    let bytes = reader.join().expect("the reader does not panic")?;
    assert!(bytes == expected, "the bytes differ");
    Ok(())
}

#[test]
fn what_the_socket_takes_is_sent_at_once_and_makes_no_event() -> Outcome {
    let mut reactor = Reactor::new()?;
    let (socket, mut other) = pair(&mut reactor)?;
    for round in 0..3u8 {
        let segments = vec![Segment::Bytes(vec![round; 3]), Segment::Data(Data::copy_of(&[round; 4096]))];
        assert_eq!(reactor.send(Token(2), &socket, segments)?, Sending::Done);
        assert_eq!(reactor.in_flight(), 0);
    }
    let mut bytes = [0; 3 * 4099];
    other.read_exact(&mut bytes)?;
    assert!(bytes.iter().enumerate().all(|(at, byte)| usize::from(*byte) == at / 4099));
    Ok(())
}

#[test]
fn a_send_to_who_is_gone_is_an_error_and_no_signal() -> Outcome {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("socket");
    let mut reactor = Reactor::new()?;
    let listener = listen_unix(&path)?;
    reactor.submit(Token(7), Op::Accept(listener));
    drop(std::os::unix::net::UnixStream::connect(&path)?);
    let Done::Accepted(Ok(socket)) = next(&mut reactor).done else { panic!("a client is taken") };
    let refused = reactor.send(Token(8), &socket, vec![Segment::Bytes(vec![1; 10])]);
    assert_eq!(refused.map_err(|cause| cause.kind()), Err(std::io::ErrorKind::BrokenPipe));
    assert_eq!(reactor.in_flight(), 0);
    Ok(())
}

#[test]
fn a_receive_brings_bytes_then_the_end() -> Outcome {
    let mut reactor = Reactor::new()?;
    let (socket, mut other) = pair(&mut reactor)?;
    other.write_all(b"hello")?;
    reactor.submit(Token(3), Op::Receive(socket.clone(), vec![0; 100]));
    match next(&mut reactor).done {
        Done::Received(buffer, Ok(len)) => assert_eq!(&buffer[..len], b"hello"),
        _ => panic!("a receive ends as one"),
    }
    drop(other);
    reactor.submit(Token(4), Op::Receive(socket, vec![0; 100]));
    assert!(matches!(next(&mut reactor).done, Done::Received(_, Ok(0))));
    Ok(())
}

#[test]
fn nothing_is_heard_of_a_closed_socket_and_its_memory_is_given_back() -> Outcome {
    let mut reactor = Reactor::new()?;
    let (socket, mut other) = pair(&mut reactor)?;
    reactor.submit(Token(5), Op::Receive(socket.clone(), vec![0; 4096]));
    // The other side does not read: this send can not end by itself.
    let long = vec![Segment::Bytes(vec![7; 30_000_000])];
    assert_eq!(reactor.send(Token(6), &socket, long)?, Sending::UnderWay);
    let mut events = Vec::new();
    reactor.wait(Some(Duration::from_millis(20)), &mut events)?;
    assert!(events.is_empty());
    assert_eq!(reactor.in_flight(), 2);
    reactor.close(&socket);
    drop(socket);
    while reactor.in_flight() > 0 {
        reactor.wait(Some(PATIENCE), &mut events)?;
    }
    assert!(events.is_empty(), "a closed socket is silent");
    // The other side reads what was under way, then the end.
    let mut rest = Vec::new();
    other.set_read_timeout(Some(PATIENCE))?;
    let ended = other.read_to_end(&mut rest);
    assert!(ended.is_ok() || ended.is_err_and(|cause| cause.kind() == std::io::ErrorKind::ConnectionReset));
    Ok(())
}

#[test]
fn listening_ends_when_closed() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mut reactor = Reactor::new()?;
    for listener in [listen_unix(&dir.path().join("socket"))?, listen_tcp("127.0.0.1:0".parse()?)?] {
        reactor.submit(Token(7), Op::Accept(listener.clone()));
        reactor.wait(Some(Duration::from_millis(10)), &mut Vec::new())?;
        reactor.close(&listener);
        let mut events = Vec::new();
        while reactor.in_flight() > 0 {
            reactor.wait(Some(PATIENCE), &mut events)?;
        }
        assert!(events.is_empty());
    }
    Ok(())
}

#[test]
fn a_port_in_use_is_said_so() -> Outcome {
    let other = TcpListener::bind("127.0.0.1:0")?;
    let refused = listen_tcp(other.local_addr()?).expect_err("the port is taken");
    assert!(refused.to_string().contains("in use by another program"), "{refused}");
    let refused = listen_tcp("192.0.2.1:1".parse()?).expect_err("a documentation address is nobody's");
    assert!(refused.to_string().contains("not an address of this machine"), "{refused}");
    Ok(())
}

#[test]
fn a_refused_connection_is_an_event() -> Outcome {
    let mut reactor = Reactor::new()?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address: SocketAddr = listener.local_addr()?;
    drop(listener);
    reactor.submit(Token(8), Op::Connect(outgoing(address)?, address));
    assert!(matches!(next(&mut reactor).done, Done::Connected(Err(_))));
    Ok(())
}

#[test]
fn waiting_ends_at_its_time() -> Outcome {
    let mut reactor = Reactor::new()?;
    let mut events = Vec::new();
    reactor.wait(Some(Duration::ZERO), &mut events)?;
    reactor.wait(Some(Duration::from_millis(5)), &mut events)?;
    assert!(events.is_empty());
    Ok(())
}

#[test]
fn a_reactor_dropped_with_operations_under_way_waits_for_them() -> Outcome {
    let mut reactor = Reactor::new()?;
    let (socket, other) = pair(&mut reactor)?;
    reactor.submit(Token(9), Op::Receive(socket, vec![0; 4096]));
    reactor.wait(Some(Duration::from_millis(5)), &mut Vec::new())?;
    drop(reactor);
    drop(other);
    Ok(())
}
