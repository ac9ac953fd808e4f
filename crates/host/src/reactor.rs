//! One thread, one ring: operations go in with a token, their ends come out as events.
//!
//! * Every operation ends in exactly one event (a send that is done at once in none), except that after `close(socket)`
//!   nothing more is heard of that socket.
//! * Memory given to an operation belongs to the reactor until its event; a closed socket's buffers live until the
//!   kernel is done with them.
//! * `wait` enters the kernel once per turn: it submits everything queued since the last turn and sleeps until
//!   something ends or the time is over. Nothing polls.

use crate::disk::Disk;
use crate::link::Socket;
use crate::ring::{Flight, Landed, Ring, accepted};
use nix::sys::socket::{Shutdown, SockaddrStorage, shutdown};
use pollux_base::{DiskDone, DiskError, DiskIndex, DiskOp, DiskOpKind, Segment};
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

/// Given with an operation and handed back with its end; means whatever its caller wants.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Token(pub u64);

/// What the reactor does for its caller.
pub enum Op {
    /// Take one connection from a listening socket.
    Accept(Socket),
    Connect(Socket, SocketAddr),
    /// Receive what is there, into the whole length of the buffer, which comes back with the event.
    Receive(Socket, Vec<u8>),
    /// Wait until there is something to read.
    Watch(Socket),
    Disk(DiskOp),
}

/// How far a send got at once. An error means, as with `Done::Sent`, that the connection is of no use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sending {
    /// All is sent; there is no event.
    Done,
    /// The other side reads too slowly. `Done::Sent` will tell of the end.
    UnderWay,
}

/// The end of an operation.
pub struct Event {
    pub token: Token,
    pub done: Done,
}

pub enum Done {
    Accepted(io::Result<Socket>),
    Connected(io::Result<()>),
    /// How many bytes lie at the start of the buffer; 0: the other side has ended.
    Received(Vec<u8>, io::Result<usize>),
    /// All that `send` had left was sent, or the connection is of no use.
    Sent(io::Result<()>),
    Readable,
    Disk(DiskDone),
}

/// A disk under its number.
struct Slot {
    disk: Disk,
    /// Operations of it that have not ended.
    in_flight: usize,
    /// It is closed when the last of them has.
    is_closing: bool,
}

pub struct Reactor {
    ring: Ring,
    disks: Vec<Option<Slot>>,
    landed: Vec<Landed>,
}

impl Reactor {
    pub fn new() -> io::Result<Reactor> {
        Ok(Reactor { ring: Ring::new()?, disks: Vec::new(), landed: Vec::new() })
    }

    /// One more disk for `Op::Disk`, under the next number.
    pub fn add_disk(&mut self, disk: Disk) {
        self.put_disk(DiskIndex(self.disks.len() as u8), disk);
    }

    /// A disk for `Op::Disk` under this number, which is the next one or one that was closed.
    pub fn put_disk(&mut self, index: DiskIndex, disk: Disk) {
        let slot = Slot { disk, in_flight: 0, is_closing: false };
        if index.index() == self.disks.len() {
            return self.disks.push(Some(slot));
        }
        let place = &mut self.disks[index.index()];
        assert!(place.as_ref().is_none_or(|slot| slot.is_closing && slot.in_flight == 0), "{index:?} is in use");
        *place = Some(slot);
    }

    /// Nothing more is asked of the disk. It is closed as soon as nothing is under way on it.
    pub fn close_disk(&mut self, index: DiskIndex) {
        if let Some(slot) = self.disks.get_mut(index.index()).and_then(Option::as_mut) {
            slot.is_closing = true;
        }
        self.let_go(index);
    }

    fn let_go(&mut self, index: DiskIndex) {
        if let Some(place) = self.disks.get_mut(index.index()) {
            place.take_if(|slot| slot.is_closing && slot.in_flight == 0);
        }
    }

    /// Queues an operation; it reaches the kernel with the next `wait`.
    pub fn submit(&mut self, token: Token, op: Op) {
        match op {
            Op::Accept(listener) => self.ring.accept(token, listener),
            Op::Connect(socket, address) => self.ring.connect(token, socket, SockaddrStorage::from(address)),
            Op::Receive(socket, buffer) => {
                assert!(!buffer.is_empty(), "receiving into no bytes would look like the end of the stream");
                self.ring.receive(token, socket, buffer);
            }
            Op::Watch(socket) => self.ring.watch(token, socket),
            Op::Disk(DiskOp { id, kind }) => {
                let slot = self.disks.get_mut(id.disk.index()).and_then(Option::as_mut);
                let slot = slot.expect("disk operations come after the disk, and before its end");
                slot.in_flight += 1;
                let disk = slot.disk.raw_fd();
                match kind {
                    DiskOpKind::Read { offset, len } => self.ring.disk_read(token, disk, id, offset.0, len),
                    DiskOpKind::Write { offset, data, sync } => {
                        self.ring.disk_write(token, disk, id, offset.0, data, sync);
                    }
                    DiskOpKind::Flush => self.ring.disk_flush(token, disk, id),
                    DiskOpKind::Discard { offset, len } => self.ring.disk_discard(token, disk, id, offset.0, len),
                }
            }
        }
    }

    /// Sends all of it, in order: at once what the socket takes, and what is left by itself. One send per socket at a
    /// time, or their bytes mix.
    pub fn send(&mut self, token: Token, socket: &Socket, segments: Vec<Segment>) -> io::Result<Sending> {
        let is_whole = self.ring.send(token, socket, segments)?;
        Ok(if is_whole { Sending::Done } else { Sending::UnderWay })
    }

    /// Ends a connection, or stops listening. Nothing more is heard of the socket.
    pub fn close(&mut self, socket: &Socket) {
        self.ring.cancel(socket);
        // Tells the other side at once, though operations in flight may hold the socket open a little longer. Fails on
        // one that was never connected, which changes nothing.
        let _ = shutdown(socket.raw_fd(), Shutdown::Both);
    }

    /// How many operations are under way.
    pub fn in_flight(&self) -> usize {
        self.ring.in_flight()
    }

    /// Sleeps until something ends or `timeout` is over (`None`: for ever), and appends what has ended to `events`.
    pub fn wait(&mut self, timeout: Option<Duration>, events: &mut Vec<Event>) -> io::Result<()> {
        let mut landed = std::mem::take(&mut self.landed);
        self.ring.enter(timeout, &mut landed)?;
        for Event { token, done } in landed.drain(..).map(event) {
            if let Done::Disk(DiskDone { id, .. }) = &done {
                if let Some(slot) = self.disks.get_mut(id.disk.index()).and_then(Option::as_mut) {
                    slot.in_flight -= 1;
                }
                self.let_go(id.disk);
            }
            events.push(Event { token, done });
        }
        self.landed = landed;
        Ok(())
    }
}

fn event(landed: Landed) -> Event {
    let Landed { token, flight, result } = landed;
    let done = match flight {
        Flight::Accept { .. } => Done::Accepted(checked(result).map(|_| accepted(result))),
        Flight::Connect { .. } => Done::Connected(checked(result).map(|_| ())),
        Flight::Receive { buffer, .. } => Done::Received(buffer, checked(result)),
        Flight::Send { .. } => Done::Sent(checked(result).map(|_| ())),
        Flight::Watch { .. } => Done::Readable,
        Flight::DiskRead { id, buffer } => {
            let expected = buffer.as_slice().len();
            Done::Disk(DiskDone { id, result: whole(result, expected).map(|()| Some(buffer.freeze())) })
        }
        Flight::DiskWrite { id, len, .. } => Done::Disk(DiskDone { id, result: whole(result, len).map(|()| None) }),
        Flight::DiskFlush { id } => Done::Disk(DiskDone { id, result: whole(result, 0).map(|()| None) }),
        // Giving space back is a wish: a disk that cannot do it keeps the space, and nothing is wrong.
        Flight::DiskDiscard { id } if result == -nix::libc::EOPNOTSUPP => Done::Disk(DiskDone { id, result: Ok(None) }),
        Flight::DiskDiscard { id } => Done::Disk(DiskDone { id, result: whole(result, 0).map(|()| None) }),
    };
    Event { token, done }
}

fn checked(result: i32) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))
}

fn whole(result: i32, expected: usize) -> Result<(), DiskError> {
    match usize::try_from(result) {
        Ok(actual) if actual == expected => Ok(()),
        Ok(actual) => Err(DiskError::Short { expected, actual }),
        Err(_) if result == -nix::libc::ENOSPC => Err(DiskError::NoSpace),
        Err(_) => Err(DiskError::Io(io::Error::from_raw_os_error(-result).to_string(), -result)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pollux_base::{Data, DiskOpId};

    fn written(result: i32) -> Result<Option<Data>, DiskError> {
        let flight = Flight::DiskWrite { id: DiskOpId::new(1), vectors: Vec::new(), data: Vec::new(), len: 8192 };
        match event(Landed { token: Token(0), flight, result }).done {
            Done::Disk(done) => done.result,
            _ => panic!("a disk operation ends as one"),
        }
    }

    #[test]
    fn a_short_write_is_an_error_never_a_success() {
        assert_eq!(written(8192), Ok(None));
        assert_eq!(written(4096), Err(DiskError::Short { expected: 8192, actual: 4096 }));
        assert_eq!(written(0), Err(DiskError::Short { expected: 8192, actual: 0 }));
        assert_eq!(written(-nix::libc::ENOSPC), Err(DiskError::NoSpace));
    }
}
