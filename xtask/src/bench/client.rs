//! The load: one thread, one connection, so many requests under way. Everything that has come is taken in one read and
//! answered with one write, so that what the client costs is small, known, and the same for every server.
//!
//! It speaks NBD, and the floor's framing, which carries the same in nearly the same bytes.

use super::work::Work;
use anyhow::{Context, Result, bail, ensure};
use nix::time::{ClockId, clock_gettime};
use std::io::{IoSlice, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long a server may take to answer: what is frozen so long is broken.
const PATIENCE: Duration = Duration::from_secs(30);
/// One receive.
const RECEIVE_BYTES: usize = 1 << 20;

/// What is said on the connection.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    Nbd,
    Floor,
}

/// What one run brought.
#[derive(Default)]
pub struct Run {
    pub elapsed: Duration,
    /// Sorted, in nanoseconds.
    pub latencies: Vec<u32>,
    pub client_cpu: Duration,
}

impl Run {
    /// Another run of the same work after this one.
    pub fn add(&mut self, more: Run) {
        self.latencies.extend(more.latencies);
        // Two sorted runs, which this merges.
        self.latencies.sort();
        self.elapsed += more.elapsed;
        self.client_cpu += more.client_cpu;
    }

    pub fn iops(&self) -> f64 {
        self.latencies.len() as f64 / self.elapsed.as_secs_f64()
    }

    /// In microseconds; 0 if nothing was done.
    pub fn percentile_us(&self, percent: usize) -> f64 {
        let place = self.latencies.len().saturating_sub(1) * percent / 100;
        self.latencies.get(place).map_or(0.0, |ns| f64::from(*ns) / 1000.0)
    }
}

pub struct Client {
    stream: UnixStream,
    framing: Framing,
    received: Vec<u8>,
    payload: Vec<u8>,
    random: u64,
    position: u64,
    /// Distance of one sequential request from the next, if not a block.
    step_bytes: Option<u64>,
}

/// One request under way.
#[derive(Clone, Copy)]
struct Slot {
    began: Instant,
    header: [u8; 28],
    is_flush: bool,
}

const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;

impl Client {
    /// Connects to the floor's primary.
    pub fn floor(socket: &Path) -> Result<Client> {
        Client::new(socket, Framing::Floor)
    }

    /// Connects to an NBD server and agrees on the export.
    pub fn nbd(socket: &Path, export: &str) -> Result<Client> {
        let mut client = Client::new(socket, Framing::Nbd)?;
        client.shake_hands(export).with_context(|| format!("the NBD handshake at {}", socket.display()))?;
        Ok(client)
    }

    fn new(socket: &Path, framing: Framing) -> Result<Client> {
        let stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        // Bytes that look like nothing in particular: zeros would not be stored, and compress. Other ones for each client: what
        // is written again with the same bytes has not changed.
        static CLIENTS: AtomicU64 = AtomicU64::new(1);
        let mut random = 0x9e37_79b9_7f4a_7c15 ^ u64::from(std::process::id());
        random ^= CLIENTS.fetch_add(1, Ordering::Relaxed) << 32;
        let payload = (0..1 << 20).map(|_| next(&mut random) as u8).collect();
        Ok(Client { stream, framing, received: vec![0; RECEIVE_BYTES], payload, random, position: 0, step_bytes: None })
    }

    fn shake_hands(&mut self, export: &str) -> Result<()> {
        let mut greeting = [0; 18];
        self.stream.read_exact(&mut greeting)?;
        ensure!(greeting.starts_with(b"NBDMAGICIHAVEOPT"), "the server greets with {greeting:02x?}");
        // Fixed newstyle, no zeroes; then GO, asking for the block sizes too, so that the server may insist on its own.
        let mut go = Vec::from(3u32.to_be_bytes());
        go.extend(b"IHAVEOPT");
        go.extend(7u32.to_be_bytes());
        go.extend((export.len() as u32 + 8).to_be_bytes());
        go.extend((export.len() as u32).to_be_bytes());
        go.extend(export.as_bytes());
        go.extend(1u16.to_be_bytes());
        go.extend(3u16.to_be_bytes());
        self.stream.write_all(&go)?;
        loop {
            let mut reply = [0; 20];
            self.stream.read_exact(&mut reply)?;
            let number = |at: usize| u32::from_be_bytes(reply[at..at + 4].try_into().expect("four bytes"));
            let mut data = vec![0; number(16) as usize];
            self.stream.read_exact(&mut data)?;
            match number(12) {
                1 => return Ok(()),
                3 => {}
                kind => bail!("the server refuses ({kind:#x}): {}", String::from_utf8_lossy(&data)),
            }
        }
    }

    /// From now on sequential requests are so far from each other.
    pub fn step(&mut self, bytes: u64) {
        self.step_bytes = Some(bytes);
    }

    /// Works for so long, or until so many requests are done.
    pub fn run(&mut self, work: &Work, time: Duration, requests_max: u64) -> Result<Run> {
        let (started, cpu) = (Instant::now(), thread_cpu()?);
        // Far enough away to be never.
        let end = started + time.min(Duration::from_secs(86400));
        let idle = Slot { began: started, header: [0; 28], is_flush: false };
        let mut slots = vec![idle; work.depth];
        let mut fresh: Vec<usize> = (0..work.depth).collect();
        let (mut begun, mut under_way) = (0, 0);
        let mut latencies = Vec::new();
        let mut partial = Reply::default();
        let data_bytes = if work.is_write { 0 } else { work.block_bytes };
        loop {
            fresh.retain(|_| {
                begun < requests_max && {
                    begun += 1;
                    true
                }
            });
            for index in &fresh {
                let kind = if work.is_write { WRITE } else { READ };
                let offset = self.offset(work);
                slots[*index] = Slot {
                    began: Instant::now(),
                    header: self.header(kind, *index, offset, work.block_bytes),
                    is_flush: false,
                };
            }
            under_way += fresh.len();
            self.send(&slots, &fresh, work)?;
            fresh.clear();
            if under_way == 0 {
                break;
            }
            let mut flushes = Vec::new();
            let len = self.stream.read(&mut self.received).context("reading replies")?;
            ensure!(len > 0, "the server has ended the connection");
            let now = Instant::now();
            let mut rest = &self.received[..len];
            while let Some(index) = partial.take(&mut rest, self.framing, data_bytes)? {
                let slot = slots.get_mut(index).context("an answer to no question")?;
                if work.flushes_each && !slot.is_flush {
                    slot.is_flush = true;
                    flushes.push(index);
                    continue;
                }
                latencies.push(u32::try_from((now - slot.began).as_nanos()).unwrap_or(u32::MAX));
                under_way -= 1;
                if now < end {
                    fresh.push(index);
                }
            }
            for index in &flushes {
                slots[*index].header = self.header(FLUSH, *index, 0, 0);
            }
            self.send(&slots, &flushes, work)?;
        }
        latencies.sort_unstable();
        Ok(Run { elapsed: started.elapsed(), latencies, client_cpu: thread_cpu()? - cpu })
    }

    fn offset(&mut self, work: &Work) -> u64 {
        let (block, blocks) = (work.block_bytes as u64, work.span_bytes / work.block_bytes as u64);
        if work.is_random {
            return next(&mut self.random) % blocks * block;
        }
        let position = self.position;
        let step = self.step_bytes.map_or(1, |bytes| bytes / block);
        self.position = (position + step) % blocks;
        position * block
    }

    fn header(&self, kind: u16, index: usize, offset: u64, len: usize) -> [u8; 28] {
        let mut header = [0; 28];
        match self.framing {
            Framing::Nbd => {
                header[..4].copy_from_slice(&0x2560_9513u32.to_be_bytes());
                header[6..8].copy_from_slice(&kind.to_be_bytes());
                header[8..16].copy_from_slice(&(index as u64).to_be_bytes());
                header[16..24].copy_from_slice(&offset.to_be_bytes());
                header[24..].copy_from_slice(&(len as u32).to_be_bytes());
            }
            Framing::Floor => {
                let kind = if kind == FLUSH { 2 } else { u32::from(kind) };
                header[..4].copy_from_slice(&kind.to_ne_bytes());
                header[4..8].copy_from_slice(&(len as u32).to_ne_bytes());
                header[8..16].copy_from_slice(&offset.to_ne_bytes());
                header[16..24].copy_from_slice(&(index as u64).to_ne_bytes());
            }
        }
        header
    }

    fn send(&mut self, slots: &[Slot], which: &[usize], work: &Work) -> Result<()> {
        let header_bytes = if self.framing == Framing::Nbd { 28 } else { 24 };
        let mut slices = Vec::with_capacity(2 * which.len());
        for index in which {
            slices.push(IoSlice::new(&slots[*index].header[..header_bytes]));
            if work.is_write && !slots[*index].is_flush {
                slices.push(IoSlice::new(&self.payload[..work.block_bytes]));
            }
        }
        let mut slices = slices.as_mut_slice();
        while !slices.is_empty() {
            let sent = self.stream.write_vectored(slices).context("sending requests")?;
            IoSlice::advance_slices(&mut slices, sent);
        }
        Ok(())
    }
}

/// The reply that is just coming in.
#[derive(Default)]
struct Reply {
    header: Vec<u8>,
    index: Option<usize>,
    data_left: usize,
}

impl Reply {
    /// Uses bytes until a reply, `data_bytes` of data included, is whole, and gives the request that it answers.
    fn take(&mut self, rest: &mut &[u8], framing: Framing, data_bytes: usize) -> Result<Option<usize>> {
        const HEADER_BYTES: usize = 16;
        if self.index.is_none() {
            let (here, after) = rest.split_at(rest.len().min(HEADER_BYTES - self.header.len()));
            self.header.extend_from_slice(here);
            *rest = after;
            if self.header.len() < HEADER_BYTES {
                return Ok(None);
            }
            let long = |at: usize| <[u8; 8]>::try_from(&self.header[at..at + 8]).expect("eight bytes");
            let index = match framing {
                Framing::Nbd => {
                    ensure!(
                        self.header.starts_with(&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]),
                        "the server answers with {:02x?}",
                        self.header
                    );
                    u64::from_be_bytes(long(8))
                }
                Framing::Floor => u64::from_ne_bytes(long(0)),
            };
            self.header.clear();
            self.index = Some(index as usize);
            self.data_left = data_bytes;
        }
        let taken = rest.len().min(self.data_left);
        *rest = &rest[taken..];
        self.data_left -= taken;
        Ok(if self.data_left == 0 { self.index.take() } else { None })
    }
}

fn next(random: &mut u64) -> u64 {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    *random
}

/// What this thread has cost so far.
fn thread_cpu() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}
