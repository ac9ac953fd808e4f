//! What the operating system gives: the clock, memory that stays, priority, handles of processes, sockets.
//!
//! The few calls that no safe wrapper offers are here and nowhere else.

use nix::errno::Errno;
use nix::libc;
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::time::{ClockId, clock_gettime};
use pollux_base::Instant;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Time since the boot of the node, the time in which it was suspended included: a lease runs out in sleep, too.
pub fn now() -> Instant {
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("Linux has had this clock since 2.6.39");
    let seconds = u64::try_from(time.tv_sec()).expect("time since boot is positive");
    Instant(seconds * 1_000_000_000 + u64::try_from(time.tv_nsec()).expect("nanoseconds are positive"))
}

/// Random for each boot of the node.
pub fn boot_id() -> std::io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

pub fn random() -> std::io::Result<u64> {
    use std::io::Read;
    let mut bytes = [0; 8];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// SIGTERM and SIGINT as something to read; they no longer end the process by themselves.
pub fn stop_signals() -> Result<SignalFd, Errno> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
}

/// Keeps every page in memory, so that neither swap nor a hung disk can stop the guard.
pub fn lock_memory() -> Result<(), Errno> {
    mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE)
}

/// A socket for heartbeats. An address whose network is down at the moment is no error: it may come.
pub fn bind_heartbeat(address: SocketAddr) -> anyhow::Result<UdpSocket> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, setsockopt, socket, sockopt};
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, SockType::Datagram, flags, None)?;
    if address.is_ipv4() {
        setsockopt(&socket, sockopt::IpFreebind, &true)?;
    }
    bind(socket.as_raw_fd(), &SockaddrStorage::from(address)).map_err(|errno| match errno {
        Errno::EADDRINUSE => anyhow::anyhow!("the port is in use; does another pollux-guard run?"),
        other => anyhow::anyhow!(other),
    })?;
    Ok(UdpSocket::from(socket))
}

/// Real-time priority, low among its kind: above every ordinary process, below the kernel's own.
#[allow(unsafe_code)]
pub fn become_real_time() -> Result<(), Errno> {
    let parameters = libc::sched_param { sched_priority: 10 };
    // SAFETY: pid 0 is this process, and the call only reads `parameters`, which outlives it.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, &parameters) };
    Errno::result(result).map(drop)
}

/// A process that cannot be mistaken for a later one with the same number.
pub struct Process(OwnedFd);

impl Process {
    /// `None`: there is no such process any more.
    #[allow(unsafe_code)]
    pub fn open(pid: i32) -> Option<Process> {
        // SAFETY: the call takes two numbers and touches no memory of ours.
        let result = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let descriptor = i32::try_from(result).ok().filter(|descriptor| *descriptor >= 0)?;
        // SAFETY: the kernel has just made this descriptor for us, and nobody else owns it.
        Some(Process(unsafe { OwnedFd::from_raw_fd(descriptor) }))
    }

    #[allow(unsafe_code)]
    pub fn kill(&self) -> Result<(), Errno> {
        let null = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: the descriptor is open for as long as `self`; a null siginfo is allowed and means an ordinary signal.
        let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), libc::SIGKILL, null, 0) };
        Errno::result(result).map(drop)
    }
}

/// Sets after how many seconds without food the watchdog resets the machine; returns what the device made of it.
#[allow(unsafe_code)]
pub fn set_watchdog_timeout(device: &std::fs::File, seconds: i32) -> Result<i32, Errno> {
    mod ioctl {
        #![allow(missing_docs)]
        nix::ioctl_readwrite!(watchdog_set_timeout, b'W', 6, i32);
    }
    let mut value = seconds;
    // SAFETY: WDIOC_SETTIMEOUT reads and writes one int, which is what `value` is.
    unsafe { ioctl::watchdog_set_timeout(device.as_raw_fd(), &mut value) }?;
    Ok(value)
}
