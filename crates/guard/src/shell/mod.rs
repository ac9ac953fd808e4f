//! The dull part of `pollux-guard`: sockets, the lease on tmpfs, the watchdog, and SIGKILL. Decides nothing.
//!
//! One thread, one poll(2) with the core's deadline as its time-out; no disk is touched after the start, and stderr
//! hears of transitions only.

pub mod guests;
pub mod lease_file;
pub mod noded;
pub mod sys;
pub mod watchdog;

use anyhow::{Context, Result, bail};
use guests::Guests;
use lease_file::LeaseFile;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::SignalFd;
use noded::Noded;
use pollux_base::config::NodeConfig;
use pollux_base::guard::Network;
use pollux_base::{Instant, NodeId};
use pollux_guard::wire::{DATAGRAM_BYTES_MAX, SECRET_BYTES_MIN, Seal};
use pollux_guard::{Guard, Input, Output, Setup};
use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;
use watchdog::Watchdog;

/// Datagrams taken from one socket before the clock is looked at again: a flood must not delay a kill.
const DATAGRAMS_MAX: usize = 64;
/// Longest sleep; heartbeats are due much earlier.
const SLEEP_MAX: Duration = Duration::from_millis(500);

pub struct Shell {
    guard: Guard,
    node: NodeId,
    seal: Seal,
    /// One socket per network, in the order of the configuration.
    sockets: Vec<UdpSocket>,
    peers: BTreeMap<NodeId, Vec<SocketAddr>>,
    noded: Noded,
    lease_file: LeaseFile,
    guests: Guests,
    watchdog: Option<Watchdog>,
    lease_was_held: bool,
    /// SIGTERM and SIGINT.
    signals: SignalFd,
}

impl Shell {
    /// Opens everything; an error is one line for people.
    pub fn open(config: &NodeConfig) -> Result<Shell> {
        let own = config.own().with_context(|| format!("node {} is not among `nodes`", config.node))?;
        if own.guard.is_empty() {
            bail!("node {} has no `guard` address", config.node);
        }
        let secret = std::fs::read(&config.secret_file)
            .with_context(|| format!("cannot read the secret {}", config.secret_file.display()))?;
        if secret.len() < SECRET_BYTES_MIN {
            let path = config.secret_file.display();
            bail!("the secret {path} has {} bytes, at least {SECRET_BYTES_MIN} are needed", secret.len());
        }
        let mut sockets = Vec::new();
        for address in &own.guard {
            sockets.push(sys::bind_heartbeat(*address).with_context(|| format!("cannot listen on {address} (UDP)"))?);
        }
        std::fs::create_dir_all(&config.run_dir)
            .with_context(|| format!("cannot make the folder {}", config.run_dir.display()))?;
        let noded = Noded::listen(&config.guard_socket())?;
        let boot_id = sys::boot_id().context("cannot read the boot id of the kernel")?;
        let path = config.guard_lease_file();
        let (lease_file, left) =
            LeaseFile::open(&path, boot_id).with_context(|| format!("cannot use the lease file {}", path.display()))?;
        let watchdog = match &config.watchdog {
            None => None,
            Some(path) => {
                Some(Watchdog::open(path).with_context(|| format!("cannot use the watchdog {}", path.display()))?)
            }
        };
        let networks = |guard: &[SocketAddr]| {
            let both = guard.iter().zip(&own.guard).enumerate();
            both.map(|(number, _)| Network(u8::try_from(number).unwrap_or(u8::MAX))).collect::<Vec<_>>()
        };
        let setup = Setup {
            node: config.node,
            peers: config.peers().map(|peer| (peer.node, networks(&peer.guard))).collect(),
            boot: sys::random().context("the kernel gives no random numbers")?,
            left,
        };
        Ok(Shell {
            guard: Guard::new(setup, sys::now()),
            node: config.node,
            seal: Seal::new(config.cluster, &secret),
            sockets,
            peers: config.peers().map(|peer| (peer.node, peer.guard.clone())).collect(),
            noded,
            lease_file,
            guests: Guests::new(config),
            watchdog,
            lease_was_held: false,
            signals: sys::stop_signals().context("cannot listen to signals")?,
        })
    }

    /// Runs until a signal says to stop.
    pub fn run(mut self) -> Result<()> {
        while !matches!(self.signals.read_signal(), Ok(Some(_))) {
            self.guard.tick(sys::now());
            self.carry_out();
            self.wait()?;
            // The clock first, whatever came in: after a pause this is where the guests die.
            self.guard.tick(sys::now());
            self.carry_out();
            self.receive();
            self.hear_noded();
        }
        // A watchdog is let go only when nothing is left to watch: guests without a guard must not outlive its absence.
        if let Some(watchdog) = self.watchdog.take() {
            if self.guests.any_alive() {
                eprintln!("pollux-guard: ends while guests run; the watchdog stays armed");
            } else {
                watchdog.disarm();
            }
        }
        Ok(())
    }

    fn wait(&self) -> Result<()> {
        let now = sys::now();
        let sleep = self.guard.deadline().map_or(SLEEP_MAX, |due| due.since(now)).min(SLEEP_MAX);
        // Rounded up, or the last millisecond would be spent turning round.
        let sleep_ms = u16::try_from(sleep.as_nanos().div_ceil(1_000_000)).unwrap_or(500);
        let mut waits: Vec<PollFd> =
            self.sockets.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
        waits.extend(self.noded.waits());
        waits.push(PollFd::new(self.signals.as_fd(), PollFlags::POLLIN));
        match poll(&mut waits, PollTimeout::from(sleep_ms)) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(error) => Err(error).context("cannot wait"),
        }
    }

    fn receive(&mut self) {
        let mut datagram = [0; DATAGRAM_BYTES_MAX];
        for number in 0..self.sockets.len() {
            let network = Network(u8::try_from(number).unwrap_or(u8::MAX));
            for _ in 0..DATAGRAMS_MAX {
                // An error on a UDP socket is the echo of a peer that is not there; nothing follows from it.
                let Ok(len) = self.sockets[number].recv(&mut datagram) else {
                    break;
                };
                if let Ok(heartbeat) = self.seal.open(self.node, network, &datagram[..len]) {
                    self.guard.handle(sys::now(), Input::Heartbeat { network, heartbeat });
                    self.carry_out();
                }
            }
        }
    }

    fn hear_noded(&mut self) {
        if self.noded.accept() {
            self.guard.handle(sys::now(), Input::Connected);
            self.carry_out();
        }
        for command in self.noded.commands() {
            self.guard.handle(sys::now(), Input::Command(command));
            self.carry_out();
        }
        self.noded.flush();
    }

    fn carry_out(&mut self) {
        while let Some(output) = self.guard.poll() {
            match output {
                Output::KillGuests => {
                    let killed = self.guests.kill();
                    if std::mem::take(&mut self.lease_was_held) {
                        eprintln!("pollux-guard: the lease is over; guests are killed");
                    } else if killed > 0 {
                        eprintln!("pollux-guard: killed {killed} guests that ran without a lease");
                    }
                    self.lease_file.store(None, None);
                    self.feed_watchdog(None);
                }
                Output::Lease { until, command } => {
                    if !std::mem::replace(&mut self.lease_was_held, true) {
                        eprintln!("pollux-guard: the lease is held; guests may run");
                    }
                    self.lease_file.store(Some(until), command.as_ref());
                    self.feed_watchdog(Some(until));
                }
                Output::Send { to, network, heartbeat } => {
                    let datagram = self.seal.seal(to, network, &heartbeat);
                    let place = usize::from(network.0);
                    let address = self.peers.get(&to).and_then(|addresses| addresses.get(place));
                    if let (Some(socket), Some(address)) = (self.sockets.get(place), address) {
                        // A network that is down loses heartbeats; that is what they are for.
                        let _ = socket.send_to(&datagram, address);
                    }
                }
                Output::View(view) => self.noded.tell(&view),
            }
        }
    }

    /// Fed only while the lease is held, or while there is nothing to protect others from.
    fn feed_watchdog(&mut self, until: Option<Instant>) {
        let Some(watchdog) = &mut self.watchdog else {
            return;
        };
        if until.is_some_and(|until| until > sys::now()) || !self.guests.any_alive() {
            watchdog.feed();
        }
    }
}
