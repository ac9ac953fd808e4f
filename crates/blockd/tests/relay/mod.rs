//! A cable between two nodes that a test holds in its hands: it can be cut without a word, in either direction, changed,
//! and listened to.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// From who dials, and back to who dials.
pub const THERE: usize = 0;
pub const BACK: usize = 1;

#[derive(Default)]
struct State {
    cut: [AtomicBool; 2],
    /// A bit of the next bytes is to be changed.
    flips: [AtomicBool; 2],
    is_over: AtomicBool,
    heard: Mutex<Vec<u8>>,
    open: Mutex<Vec<TcpStream>>,
}

pub struct Relay {
    pub address: SocketAddr,
    state: Arc<State>,
}

impl Relay {
    pub fn to(target: SocketAddr) -> std::io::Result<Relay> {
        let listener = TcpListener::bind("127.0.0.9:0")?;
        let address = listener.local_addr()?;
        let state = Arc::new(State::default());
        let shared = state.clone();
        std::thread::spawn(move || {
            for dialled in listener.incoming().flatten() {
                if shared.is_over.load(Ordering::SeqCst) {
                    return;
                }
                // A cut cable makes no connection; one that is made later is another attempt.
                if shared.cut.iter().any(|cut| cut.load(Ordering::SeqCst)) {
                    shared.lock_open().push(dialled);
                    continue;
                }
                let Ok(other) = TcpStream::connect(target) else { continue };
                shared.join(dialled, other);
            }
        });
        Ok(Relay { address, state })
    }

    /// Nothing gets through in this direction any more, and nobody is told.
    pub fn cut(&self, direction: usize) {
        self.state.cut[direction].store(true, Ordering::SeqCst);
    }

    /// Connections made from now on work again; those that were cut are ended, as a switch does that comes back.
    pub fn mend(&self) {
        self.reset();
        self.state.cut.iter().for_each(|cut| cut.store(false, Ordering::SeqCst));
    }

    /// Ends every connection.
    pub fn reset(&self) {
        for stream in self.state.lock_open().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// One bit of what passes next is changed.
    pub fn flip(&self, direction: usize) {
        self.state.flips[direction].store(true, Ordering::SeqCst);
    }

    /// Whether these bytes have passed.
    pub fn has_heard(&self, bytes: &[u8]) -> bool {
        let heard = self.state.heard.lock().expect("no thread panics with it");
        heard.windows(bytes.len()).any(|window| window == bytes)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.state.is_over.store(true, Ordering::SeqCst);
        self.reset();
        // Wakes the thread that waits for connections.
        let _ = TcpStream::connect(self.address);
    }
}

impl State {
    fn lock_open(&self) -> std::sync::MutexGuard<'_, Vec<TcpStream>> {
        self.open.lock().expect("no thread panics with it")
    }

    fn join(self: &Arc<State>, dialled: TcpStream, other: TcpStream) {
        let ends = [(&dialled, &other), (&other, &dialled)];
        for (direction, (from, to)) in ends.into_iter().enumerate() {
            let (Ok(from), Ok(to)) = (from.try_clone(), to.try_clone()) else { return };
            let _ = to.set_nodelay(true);
            let state = self.clone();
            std::thread::spawn(move || state.carry(direction, from, to));
        }
        self.lock_open().extend([dialled, other]);
    }

    fn carry(&self, direction: usize, mut from: TcpStream, mut to: TcpStream) {
        let mut buffer = vec![0; 256 << 10];
        while let Ok(len @ 1..) = from.read(&mut buffer) {
            if self.cut[direction].load(Ordering::SeqCst) {
                // Held back for as long as the connection lives.
                while !self.is_over.load(Ordering::SeqCst) && from.peek(&mut [0]).is_ok_and(|len| len > 0) {
                    std::thread::sleep(Duration::from_millis(20));
                }
                break;
            }
            let bytes = &mut buffer[..len];
            if self.flips[direction].swap(false, Ordering::SeqCst) {
                // The last one: in the middle may lie the length of a second message, which then is waited for.
                bytes[len - 1] ^= 4;
            }
            self.heard.lock().expect("no thread panics with it").extend_from_slice(bytes);
            if to.write_all(bytes).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
        let _ = from.shutdown(Shutdown::Both);
    }
}
