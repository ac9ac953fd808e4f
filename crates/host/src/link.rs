//! Sockets: made, bound and tuned here, then driven by the reactor.

use nix::sys::socket::sockopt;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockProtocol, SockType, SockaddrStorage, UnixAddr, bind, listen, setsockopt,
    socket,
};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Connections that may wait for `accept`.
const BACKLOG: i32 = 128;

/// How long an address may be taken at first: sockets of a killed process live on until the kernel has torn down its
/// ring, in the background.
const TAKEN_WAIT: Duration = Duration::from_secs(2);
const TAKEN_RETRY: Duration = Duration::from_millis(10);

/// A socket. Clones are the same socket; it is closed when the last clone is dropped and the kernel has ended the
/// operations on it.
#[derive(Clone, Debug)]
pub struct Socket {
    fd: Arc<OwnedFd>,
}

impl Socket {
    pub(crate) fn new(fd: OwnedFd) -> Socket {
        Socket { fd: Arc::new(fd) }
    }
    /// Watches a file descriptor that is not a socket (a signalfd).
    pub fn from_fd(fd: OwnedFd) -> Socket {
        Socket::new(fd)
    }
    pub(crate) fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
    pub(crate) fn borrow(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.fd.as_fd()
    }
    /// Whether both are the same socket.
    pub fn is(&self, other: &Socket) -> bool {
        Arc::ptr_eq(&self.fd, &other.fd)
    }

    /// Small messages are sent at once.
    pub fn set_nodelay(&self) -> io::Result<()> {
        Ok(setsockopt(&self.borrow(), sockopt::TcpNoDelay, &true)?)
    }

    /// A connection whose other side is gone without a word ends after about a minute, also when nothing is sent.
    pub fn set_keepalive(&self) -> io::Result<()> {
        let fd = self.borrow();
        setsockopt(&fd, sockopt::KeepAlive, &true)?;
        setsockopt(&fd, sockopt::TcpKeepIdle, &20)?;
        setsockopt(&fd, sockopt::TcpKeepInterval, &10)?;
        setsockopt(&fd, sockopt::TcpKeepCount, &4)?;
        Ok(())
    }

    /// The connection ends when sent bytes stay unacknowledged this long, or when a silent peer does not answer probes.
    pub fn set_dead_after(&self, unacknowledged: Duration) -> io::Result<()> {
        let fd = self.borrow();
        setsockopt(&fd, sockopt::TcpUserTimeout, &u32::try_from(unacknowledged.as_millis()).unwrap_or(u32::MAX))?;
        // Probes for a connection that has nothing to send; seconds are their finest unit.
        setsockopt(&fd, sockopt::KeepAlive, &true)?;
        setsockopt(&fd, sockopt::TcpKeepIdle, &1)?;
        setsockopt(&fd, sockopt::TcpKeepInterval, &1)?;
        setsockopt(&fd, sockopt::TcpKeepCount, &3)?;
        Ok(())
    }
}

/// Why nothing listens at an address.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("{0} is in use by another program")]
    InUse(String),
    #[error("{0} is not an address of this machine")]
    NotOurs(String),
    #[error("cannot listen on {address}: {cause}")]
    Io { address: String, cause: io::Error },
}

impl ListenError {
    fn new(address: String, cause: nix::Error) -> ListenError {
        match cause {
            nix::Error::EADDRINUSE => ListenError::InUse(address),
            nix::Error::EADDRNOTAVAIL => ListenError::NotOurs(address),
            _ => ListenError::Io { address, cause: cause.into() },
        }
    }
}

/// Listens on a TCP address. Waits a little when it is taken, and so may block for `TAKEN_WAIT`.
pub fn listen_tcp(address: SocketAddr) -> Result<Socket, ListenError> {
    let tcp = || {
        let fd = stream(address)?;
        // A restarted daemon need not wait for connections of its earlier run to be forgotten.
        setsockopt(&fd, sockopt::ReuseAddr, &true)?;
        bind(fd.as_raw_fd(), &SockaddrStorage::from(address))?;
        listen(&fd, Backlog::new(BACKLOG)?)?;
        Ok(Socket::new(fd))
    };
    let mut waited = Duration::ZERO;
    loop {
        match tcp() {
            Err(nix::Error::EADDRINUSE) if waited < TAKEN_WAIT => {
                std::thread::sleep(TAKEN_RETRY);
                waited += TAKEN_RETRY;
            }
            listening => return listening.map_err(|cause| ListenError::new(address.to_string(), cause)),
        }
    }
}

/// Listens on a unix socket; what an earlier run left at `path` is replaced. Two daemons cannot fight over it: whoever
/// listens holds the pool's lock.
pub fn listen_unix(path: &Path) -> Result<Socket, ListenError> {
    let unix = || {
        let address = UnixAddr::new(path)?;
        match std::fs::remove_file(path) {
            Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
                return Err(nix::Error::from_raw(cause.raw_os_error().unwrap_or(nix::libc::EIO)));
            }
            _ => {}
        }
        let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        bind(fd.as_raw_fd(), &address)?;
        listen(&fd, Backlog::new(BACKLOG)?)?;
        Ok(Socket::new(fd))
    };
    unix().map_err(|cause| ListenError::new(path.display().to_string(), cause))
}

/// A socket ready to be connected to this address.
pub fn outgoing(address: SocketAddr) -> io::Result<Socket> {
    Ok(Socket::new(stream(address)?))
}

fn stream(address: SocketAddr) -> nix::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    // Blocking on purpose: io_uring waits for such a socket itself, but hands EAGAIN of a non-blocking one to us.
    socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, SockProtocol::Tcp)
}
