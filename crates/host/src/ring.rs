//! io_uring, and the only place that hands memory to the kernel.
//!
//! Invariant: memory of an operation belongs to its `Flight` from the moment it is queued until its completion is taken,
//! whatever the caller does meanwhile: closing a socket, cancelling, or dropping the ring.

#![allow(unsafe_code)]

use crate::link::Socket;
use crate::reactor::Token;
use io_uring::{IoUring, opcode, squeue, types};
use nix::libc;
use nix::sys::socket::{SockaddrLike, SockaddrStorage};
use pollux_base::data::Buffer;
use pollux_base::{Data, DiskOpId, Segment};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// Operations queued between two enters of the kernel; more just cost another enter.
const SUBMISSION_ENTRIES: u32 = 512;
/// Completions that fit without the kernel keeping them aside.
const COMPLETION_ENTRIES: u32 = 4096;
/// Segments gathered by one system call (the kernel's UIO_MAXIOV).
const GATHER_MAX: usize = 1024;
/// IORING_RECVSEND_POLL_FIRST, of Linux 5.19.
const POLL_FIRST: u16 = 1;
/// Marks completions that nobody waits for (those of cancellations).
const NOBODY: u64 = u64::MAX;
/// How long a dropped ring waits for its operations before it gives their memory up for lost.
const DROP_WAIT: Duration = Duration::from_secs(2);

/// What is asked of the kernel, with all memory that it may touch. Everything it points to lies on the heap, so a
/// `Flight` itself may move.
#[allow(dead_code, reason = "some fields are only held, for the kernel to use")]
pub(crate) enum Flight {
    Accept { listener: Socket },
    Connect { socket: Socket, address: Box<SockaddrStorage> },
    Receive { socket: Socket, buffer: Vec<u8> },
    Send { socket: Socket, gather: Box<Gather> },
    Watch { socket: Socket },
    DiskRead { id: DiskOpId, buffer: Buffer },
    DiskWrite { id: DiskOpId, vectors: Vec<libc::iovec>, data: Vec<Data>, len: usize },
    DiskFlush { id: DiskOpId },
    DiskDiscard { id: DiskOpId },
}

impl Flight {
    /// The socket that the operation is on.
    pub fn socket(&self) -> Option<&Socket> {
        match self {
            Flight::Accept { listener: socket }
            | Flight::Connect { socket, .. }
            | Flight::Receive { socket, .. }
            | Flight::Send { socket, .. }
            | Flight::Watch { socket } => Some(socket),
            Flight::DiskRead { .. }
            | Flight::DiskWrite { .. }
            | Flight::DiskFlush { .. }
            | Flight::DiskDiscard { .. } => None,
        }
    }
}

/// A send of many segments, and how far it got.
pub(crate) struct Gather {
    segments: VecDeque<Segment>,
    /// Bytes of the first segment that are sent.
    skip: usize,
    vectors: Vec<libc::iovec>,
    header: libc::msghdr,
}

impl Gather {
    fn new() -> Gather {
        // SAFETY: msghdr is plain C data for which all zeros mean "nothing given".
        let header = unsafe { std::mem::zeroed() };
        Gather { segments: VecDeque::new(), skip: 0, vectors: Vec::new(), header }
    }

    /// Takes `len` sent bytes off the front. Whether anything is left.
    fn advance(&mut self, len: usize) -> bool {
        self.skip += len;
        while let Some(first) = self.segments.front()
            && self.skip >= first.len()
        {
            self.skip -= first.len();
            self.segments.pop_front();
        }
        assert!(self.skip == 0 || !self.segments.is_empty(), "the kernel sent more than it was given");
        !self.segments.is_empty()
    }

    /// Points the header at what is left.
    fn point(&mut self) -> *const libc::msghdr {
        self.vectors.clear();
        let mut skip = self.skip;
        for segment in self.segments.iter().take(GATHER_MAX) {
            let bytes = &segment.as_slice()[skip..];
            skip = 0;
            self.vectors.push(vector(bytes));
        }
        self.header.msg_iov = self.vectors.as_mut_ptr();
        self.header.msg_iovlen = self.vectors.len() as _;
        &self.header
    }
}

fn vector(bytes: &[u8]) -> libc::iovec {
    // The kernel only reads through vectors of writes and sends; the C type has no const form.
    libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}

/// One operation under way.
struct Slot {
    token: Token,
    flight: Flight,
    /// Its end is told to nobody: the socket was closed.
    muted: bool,
}

/// The ring and everything in flight on it.
pub(crate) struct Ring {
    ring: IoUring,
    /// By the low half of an operation's user data. The high half is the turn, so that no completion can be taken for
    /// that of an earlier operation in the same place.
    slots: Vec<(u32, Option<Slot>)>,
    free: Vec<u32>,
    in_flight: usize,
    /// User data and results of one turn; empty between turns, kept for its memory.
    completions: Vec<(u64, i32)>,
    /// Of the last send that went out at once; likewise.
    spare: Option<Box<Gather>>,
    /// Whether the kernel waits for what is to be received before it looks.
    polls_first: bool,
}

/// A completed operation.
pub(crate) struct Landed {
    pub token: Token,
    pub flight: Flight,
    /// As the kernel says it: bytes, or the negative error number.
    pub result: i32,
}

impl Ring {
    pub fn new() -> io::Result<Ring> {
        // Completions are worked off only inside our own enter: no interrupts of the one thread, fewer wake-ups. Needs
        // Linux 6.1; without it the ring works, only slower.
        let lean = IoUring::builder()
            .setup_clamp()
            .setup_submit_all()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_cqsize(COMPLETION_ENTRIES)
            .build(SUBMISSION_ENTRIES);
        let (ring, is_lean) = match lean {
            Err(cause) if cause.raw_os_error() == Some(libc::EINVAL) => {
                (IoUring::builder().setup_clamp().setup_cqsize(COMPLETION_ENTRIES).build(SUBMISSION_ENTRIES)?, false)
            }
            lean => (lean?, true),
        };
        if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "io_uring of Linux 5.11 or newer is needed"));
        }
        Ok(Ring {
            ring,
            slots: Vec::new(),
            free: Vec::new(),
            in_flight: 0,
            completions: Vec::new(),
            spare: None,
            polls_first: is_lean,
        })
    }

    /// How many operations are under way.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    pub fn accept(&mut self, token: Token, listener: Socket) {
        let fd = types::Fd(listener.raw_fd());
        // No address is asked for, so the kernel touches no memory of ours.
        let entry = opcode::Accept::new(fd, std::ptr::null_mut(), std::ptr::null_mut()).flags(libc::SOCK_CLOEXEC);
        self.push(token, Flight::Accept { listener }, entry.build());
    }

    pub fn connect(&mut self, token: Token, socket: Socket, address: SockaddrStorage) {
        let address = Box::new(address);
        let entry = opcode::Connect::new(types::Fd(socket.raw_fd()), address.as_ptr(), address.len()).build();
        self.push(token, Flight::Connect { socket, address }, entry);
    }

    /// Receives into the whole of `buffer`.
    pub fn receive(&mut self, token: Token, socket: Socket, mut buffer: Vec<u8>) {
        let len = u32::try_from(buffer.len()).expect("receive buffers are far smaller than 4 GiB");
        // Nearly always nothing has come yet, so the look that finds nothing is left out.
        let priority = if self.polls_first { POLL_FIRST } else { 0 };
        let entry = opcode::Recv::new(types::Fd(socket.raw_fd()), buffer.as_mut_ptr(), len).ioprio(priority).build();
        self.push(token, Flight::Receive { socket, buffer }, entry);
    }

    /// Sends at once what the socket takes; what is left goes on by itself, and only then there is a completion. Whether
    /// all is sent.
    pub fn send(&mut self, token: Token, socket: &Socket, segments: Vec<Segment>) -> io::Result<bool> {
        let mut gather = self.spare.take().unwrap_or_else(|| Box::new(Gather::new()));
        gather.skip = 0;
        gather.segments = segments.into();
        loop {
            let header = gather.point();
            // SAFETY: the header, its vectors and the segments that they point to belong to `gather`, which nothing
            // changes during the call.
            let result = unsafe { libc::sendmsg(socket.raw_fd(), header, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
            match usize::try_from(result) {
                Ok(len) if gather.advance(len) => {}
                Ok(_) => {
                    self.spare = Some(gather);
                    return Ok(true);
                }
                Err(_) => match io::Error::last_os_error() {
                    cause if cause.kind() == io::ErrorKind::Interrupted => {}
                    cause if cause.kind() == io::ErrorKind::WouldBlock => {
                        self.send_later(token, socket.clone(), gather);
                        return Ok(false);
                    }
                    cause => return Err(cause),
                },
            }
        }
    }

    fn send_later(&mut self, token: Token, socket: Socket, mut gather: Box<Gather>) {
        let header = gather.point();
        // Without MSG_NOSIGNAL a client that hangs up would end the daemon by SIGPIPE.
        let flags = (libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32;
        let entry = opcode::SendMsg::new(types::Fd(socket.raw_fd()), header).flags(flags).build();
        self.push(token, Flight::Send { socket, gather }, entry);
    }

    pub fn watch(&mut self, token: Token, socket: Socket) {
        let entry = opcode::PollAdd::new(types::Fd(socket.raw_fd()), libc::POLLIN as u32).build();
        self.push(token, Flight::Watch { socket }, entry);
    }

    pub fn disk_read(&mut self, token: Token, disk: RawFd, id: DiskOpId, offset: u64, len: usize) {
        let mut buffer = Buffer::any(len);
        let bytes = buffer.as_mut_slice();
        let len = u32::try_from(bytes.len()).expect("the store reads at most a few extents at once");
        let entry = opcode::Read::new(types::Fd(disk), bytes.as_mut_ptr(), len).offset(offset).build();
        self.push(token, Flight::DiskRead { id, buffer }, entry);
    }

    pub fn disk_write(&mut self, token: Token, disk: RawFd, id: DiskOpId, offset: u64, data: Vec<Data>, sync: bool) {
        let data = if data.len() <= GATHER_MAX { data } else { vec![joined(&data)] };
        let len = data.iter().map(Data::len).sum();
        let flags = if sync { libc::RWF_DSYNC } else { 0 };
        if let [whole] = data.as_slice() {
            let bytes = whole.as_slice();
            let len_32 = u32::try_from(len).expect("a write is of a few extents at most");
            let entry =
                opcode::Write::new(types::Fd(disk), bytes.as_ptr(), len_32).offset(offset).rw_flags(flags).build();
            return self.push(token, Flight::DiskWrite { id, vectors: Vec::new(), data, len }, entry);
        }
        let vectors: Vec<libc::iovec> = data.iter().map(|part| vector(part.as_slice())).collect();
        let entry = opcode::Writev::new(types::Fd(disk), vectors.as_ptr(), vectors.len() as u32)
            .offset(offset)
            .rw_flags(flags)
            .build();
        self.push(token, Flight::DiskWrite { id, vectors, data, len }, entry);
    }

    pub fn disk_flush(&mut self, token: Token, disk: RawFd, id: DiskOpId) {
        let entry = opcode::Fsync::new(types::Fd(disk)).flags(types::FsyncFlags::DATASYNC).build();
        self.push(token, Flight::DiskFlush { id }, entry);
    }

    pub fn disk_discard(&mut self, token: Token, disk: RawFd, id: DiskOpId, offset: u64, len: u64) {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let entry = opcode::Fallocate::new(types::Fd(disk), len).offset(offset).mode(mode).build();
        self.push(token, Flight::DiskDiscard { id }, entry);
    }

    /// Mutes and cancels everything on this socket.
    pub fn cancel(&mut self, socket: &Socket) {
        let mut targets = Vec::new();
        for (index, (turn, slot)) in self.slots.iter_mut().enumerate() {
            if let Some(slot) = slot
                && slot.flight.socket().is_some_and(|own| own.is(socket))
            {
                slot.muted = true;
                targets.push(user_data(index as u32, *turn));
            }
        }
        for target in targets {
            self.enqueue(&opcode::AsyncCancel::new(target).build().user_data(NOBODY));
        }
    }

    fn push(&mut self, token: Token, flight: Flight, entry: squeue::Entry) {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push((0, None));
            u32::try_from(self.slots.len() - 1).expect("bounded queues keep the number of operations small")
        });
        let (turn, slot) = &mut self.slots[index as usize];
        *turn = turn.wrapping_add(1);
        *slot = Some(Slot { token, flight, muted: false });
        let entry = entry.user_data(user_data(index, *turn));
        self.in_flight += 1;
        self.enqueue(&entry);
    }

    fn enqueue(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: whatever the entry points to is owned by a `Slot` on the heap and stays there until `take` sees
            // its completion (module invariant); cancellations point to nothing. File descriptors named in it are held
            // open by the `Socket` in the slot, or by the disk, which the reactor keeps for its own life.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            // The queue is full: hand it over. Errors that pass (EBUSY, EINTR) end by themselves in the next round.
            if let Err(cause) = self.ring.submit() {
                assert!(passes(&cause), "io_uring refuses our submissions: {cause}");
            }
        }
    }

    /// Submits what is queued; waits until something completes or `timeout` is over (`None`: for ever). Then gives all
    /// completed operations to `landed`.
    pub fn enter(&mut self, timeout: Option<Duration>, landed: &mut Vec<Landed>) -> io::Result<()> {
        let submitted = match timeout {
            Some(timeout) => {
                let spec = types::Timespec::from(timeout);
                self.ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&spec))
            }
            None => self.ring.submit_and_wait(1),
        };
        if let Err(cause) = submitted
            && !passes(&cause)
        {
            return Err(cause);
        }
        let mut completions = std::mem::take(&mut self.completions);
        completions.extend(self.ring.completion().map(|entry| (entry.user_data(), entry.result())));
        for (user_data, result) in completions.drain(..) {
            self.take(user_data, result, landed);
        }
        self.completions = completions;
        Ok(())
    }

    fn take(&mut self, user_data: u64, result: i32, landed: &mut Vec<Landed>) {
        if user_data == NOBODY {
            return;
        }
        let (index, turn) = (user_data as u32, (user_data >> 32) as u32);
        let (current, slot) = &mut self.slots[index as usize];
        assert_eq!(*current, turn, "a completion came twice");
        let Slot { token, flight, muted } = slot.take().expect("a completion belongs to an operation under way");
        self.free.push(index);
        self.in_flight -= 1;
        match flight {
            Flight::Accept { .. } if muted && result >= 0 => drop(accepted(result)),
            _ if muted => {}
            Flight::Send { socket, mut gather } if result > 0 => {
                // Goes on by itself: callers never see half a send.
                if gather.advance(result as usize) {
                    self.send_later(token, socket, gather);
                } else {
                    landed.push(Landed { token, flight: Flight::Send { socket, gather }, result });
                }
            }
            flight => landed.push(Landed { token, flight, result }),
        }
    }
}

impl Drop for Ring {
    /// Ends what is in flight before its memory is freed.
    fn drop(&mut self) {
        let sockets: Vec<Socket> =
            self.slots.iter().filter_map(|(_, slot)| slot.as_ref()?.flight.socket().cloned()).collect();
        for socket in &sockets {
            self.cancel(socket);
        }
        let mut waited = Duration::ZERO;
        let step = Duration::from_millis(50);
        let mut landed = Vec::new();
        while self.in_flight > 0 && waited < DROP_WAIT {
            if self.enter(Some(step), &mut landed).is_err() {
                break;
            }
            waited += step;
        }
        // A disk that hangs may still write into its buffers: better leaked than freed under it.
        for (_, slot) in self.slots.drain(..) {
            std::mem::forget(slot);
        }
    }
}

/// The connection that a successful accept brought.
pub(crate) fn accepted(result: i32) -> Socket {
    assert!(result >= 0, "an accept that failed brings no connection");
    // SAFETY: the kernel has just made this descriptor for us, and the completion that names it is taken only once.
    Socket::new(unsafe { OwnedFd::from_raw_fd(result) })
}

fn joined(data: &[Data]) -> Data {
    let mut buffer = Buffer::any(data.iter().map(Data::len).sum());
    let mut rest = buffer.as_mut_slice();
    for part in data {
        let (here, after) = rest.split_at_mut(part.len());
        here.copy_from_slice(part.as_slice());
        rest = after;
    }
    buffer.freeze()
}

fn user_data(index: u32, turn: u32) -> u64 {
    u64::from(turn) << 32 | u64::from(index)
}

/// Errors of an enter that mean "look again": the time is over, a signal came, completions must be taken first.
fn passes(cause: &io::Error) -> bool {
    matches!(cause.raw_os_error(), Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN))
}
