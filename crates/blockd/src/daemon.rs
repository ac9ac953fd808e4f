//! The loop: what has ended goes into the core, what the core wants is begun, then sleep.

use crate::Turn;
use crate::clients::Clients;
use crate::control::Control;
use crate::directory::Directory;
use crate::disks::DiskOrders;
use crate::keeper::Keeper;
use crate::peers::Peers;
use crate::pool;
use crate::seen::{self, Seen};
use crate::ticket::Ticket;
use anyhow::Context;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use pollux_base::config::{NbdTls, NodeConfig};
use pollux_base::{DiskOp, Instant, Kept, Order, Report};
use pollux_frontend::nbd::{Pem, Reach, TlsServer};
use pollux_host::clock;
use pollux_host::link::{Socket, listen_tcp, listen_unix};
use pollux_host::reactor::{Done, Event, Op, Reactor};
use pollux_replica::{DataPlane, Input, Output};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tracing::{error, info};

pub struct Daemon {
    reactor: Reactor,
    plane: DataPlane,
    control: Control,
    clients: Clients,
    peers: Peers,
    directory: Directory,
    disk_orders: DiskOrders,
    keeper: Keeper,
    /// For the core; filled and emptied in every turn.
    inputs: Vec<Input>,
    /// Of the core; likewise.
    disk_ops: Vec<DiskOp>,
    events: Vec<Event>,
    /// Removed when the daemon stops.
    sockets: [PathBuf; 2],
    is_stopping: bool,
    reopens_since: Option<Instant>,
    seen: Seen,
}

/// A `noded` that does not take its answer for so long does without it: one line on a local socket.
const ANSWER_MAX: Duration = Duration::from_millis(200);

/// Why the daemon ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ended {
    Asked,
    /// One of several disks failed; the others can be opened without it.
    DiskFailed,
}

impl Daemon {
    /// Takes the pool and every address of the node. Fails when one of them is not to be had.
    pub fn new(config: &NodeConfig) -> anyhow::Result<Daemon> {
        let own = config.own().context("the configuration does not name this node under `nodes`")?;
        let now = clock::now();
        let mut reactor = Reactor::new().context("io_uring cannot be used")?;
        let disks = pool::open_disks(config).context("the pool")?;
        let sizes = disks.iter().map(|(_, disk)| disk.size()).collect();
        let paths = disks.iter().map(|(path, _)| path.display().to_string()).collect();
        disks.into_iter().for_each(|(_, disk)| reactor.add_disk(disk));

        let links = own.replication.iter().map(|address| listen_tcp(*address));
        let links: Vec<Socket> = links.collect::<Result<_, _>>().context("replication")?;
        let sockets = [config.data_socket(), config.nbd_socket()];
        let mut clients = Clients::default();
        match network_reach(config) {
            Ok(reach) => {
                for address in &own.nbd {
                    clients.listen(listen_tcp(*address).context("NBD")?, address.to_string(), reach.clone());
                }
            }
            // This node's own guests need no certificate, and must not wait for one.
            Err(cause) => {
                error!(cause = format!("{cause:#}"), "NBD is not offered to other machines; mend it and restart")
            }
        }
        let [data_socket, nbd_socket] = &sockets;
        clients.listen(listen_unix(nbd_socket).context("NBD")?, nbd_socket.display().to_string(), Reach::Local);
        let control = Control::new(listen_unix(data_socket).context("orders")?);

        let boot = clock::boot_id().context("the number of this boot")?;
        let config_of_core = pollux_replica::Config {
            cluster: config.cluster,
            node: config.node,
            disks: sizes,
            paths,
            boot,
            seen: seen::read(config),
        };
        // Before there is another thread: it would not have them blocked.
        let signals = stop_signals()?;
        let keeper = Keeper::start(config).context("a thread")?;
        let mut daemon = Daemon {
            reactor,
            plane: DataPlane::new(config_of_core, now),
            control,
            clients,
            peers: Peers::new(config, links, now),
            directory: Directory::new(config),
            disk_orders: DiskOrders::default(),
            keeper,
            inputs: Vec::new(),
            disk_ops: Vec::new(),
            events: Vec::new(),
            sockets,
            is_stopping: false,
            reopens_since: None,
            seen: Seen::keep(config),
        };
        daemon.reactor.submit(Ticket::Signal.token(), Op::Watch(signals));
        daemon.reactor.submit(Ticket::Keeper.token(), Op::Watch(daemon.keeper.bell()?));
        Ok(daemon)
    }

    /// Runs until a signal asks for the end, or until a disk has failed and the pool is to be opened anew without it.
    pub fn run(mut self) -> anyhow::Result<Ended> {
        while !self.is_stopping && !self.may_reopen() {
            self.begin();
            self.reactor.wait(self.patience(), &mut self.events).context("io_uring")?;
            self.take_events();
        }
        for socket in &self.sockets {
            // Left over, it would be replaced by the next run.
            let _ = std::fs::remove_file(socket);
        }
        self.seen.end(self.plane.store());
        Ok(if self.is_stopping { Ended::Asked } else { Ended::DiskFailed })
    }

    /// The pool wants to be opened anew, and whoever asked for what led to it has its answer.
    fn may_reopen(&mut self) -> bool {
        if !self.plane.store().wants_reopening() {
            self.reopens_since = None;
            return false;
        }
        let since = *self.reopens_since.get_or_insert_with(clock::now);
        !self.control.is_sending() || clock::now() > since + ANSWER_MAX
    }

    /// Feeds the core and begins what it wants, until neither has anything for the other.
    fn begin(&mut self) {
        let now = clock::now();
        loop {
            if !self.inputs.is_empty() {
                self.plane.handle_all(now, self.inputs.drain(..));
            }
            if self.plane.deadline().is_some_and(|deadline| deadline <= now) {
                self.plane.handle(now, Input::Tick);
            }
            let mut turn = Turn { now, reactor: &mut self.reactor, inputs: &mut self.inputs };
            for refusal in self.disk_orders.hand_over(&mut turn, &mut self.plane, &self.keeper) {
                self.control.report(&refusal);
            }
            while let Some(output) = self.plane.poll() {
                match output {
                    Output::Disk(op) => self.disk_ops.push(op),
                    Output::Send { peer, session, frame } => self.peers.send(&mut turn, peer, session, frame),
                    Output::Disconnect { peer, session, reason } => {
                        self.peers.disconnect(&mut turn, peer, session, reason);
                    }
                    Output::Report(report) => {
                        match &report {
                            Report::PoolFailed { reason } => error!(reason, "the pool cannot be used"),
                            Report::DiskChanged { id, result } => {
                                info!(?result, "a change of the pool has ended");
                                self.disk_orders.on_ended(&self.keeper, *id, result.is_ok());
                            }
                            _ => {}
                        }
                        self.control.report(&report);
                    }
                    Output::CloseDisk(disk) => turn.reactor.close_disk(disk),
                    Output::Reply(id, reply) => self.clients.on_reply(&mut turn, id, reply, self.directory.exports()),
                    Output::Served { volume, served } => {
                        info!(%volume, served, "served here");
                        let is_changed = match Kept::in_volume(volume) {
                            None => self.directory.on_served(volume, served),
                            Some(_) => {
                                let size = self.plane.store().volumes().find(|(known, ..)| *known == volume);
                                self.directory.on_kept(volume, size.map(|(.., size)| size).filter(|_| served))
                            }
                        };
                        if is_changed {
                            self.clients.on_exports(&mut turn, self.directory.exports());
                        }
                    }
                }
            }
            self.clients.on_time(&mut turn, self.directory.exports());
            // Before, it would say nothing to them, and be taken for hung.
            if self.plane.is_open() {
                self.peers.on_time(&mut turn);
                // The kernel begins what it is given in this order, and what goes to a peer has the longest way.
                self.peers.flush(&mut turn);
            }
            if let Some(report) = self.peers.take_report(now) {
                self.control.report(&report);
            }
            self.clients.flush(&mut turn, self.directory.exports());
            for op in self.disk_ops.drain(..) {
                turn.reactor.submit(Ticket::Disk.token(), Op::Disk(op));
            }
            self.control.flush(&mut turn);
            self.seen.on_turn(now, self.plane.store());
            if self.inputs.is_empty() {
                #[cfg(debug_assertions)]
                self.plane.check();
                return;
            }
        }
    }

    /// How long to sleep at most.
    fn patience(&self) -> Option<Duration> {
        let deadlines = [
            self.plane.deadline(),
            self.peers.deadline(clock::now()).filter(|_| self.plane.is_open()),
            self.clients.deadline(),
            self.reopens_since.map(|since| since + ANSWER_MAX),
            self.control.deadline(),
        ];
        deadlines.into_iter().flatten().min().map(|deadline| deadline.since(clock::now()))
    }

    fn take_events(&mut self) {
        let mut events = std::mem::take(&mut self.events);
        let mut turn = Turn { now: clock::now(), reactor: &mut self.reactor, inputs: &mut self.inputs };
        for Event { token, done } in events.drain(..) {
            match (Ticket::of(token), done) {
                (Ticket::Signal, Done::Readable) => self.is_stopping = true,
                (Ticket::Keeper, Done::Readable) => {
                    self.disk_orders.on_opened(&mut self.keeper);
                    if let Ok(bell) = self.keeper.bell() {
                        turn.reactor.submit(Ticket::Keeper.token(), Op::Watch(bell));
                    }
                }
                (Ticket::Disk, Done::Disk(done)) => turn.inputs.push(Input::Disk(done)),
                (Ticket::OrdersAccept, Done::Accepted(result)) => self.control.on_accepted(&mut turn, result),
                (Ticket::OrdersReceive(id), Done::Received(buffer, result)) => {
                    for order in self.control.on_received(&mut turn, id, buffer, result) {
                        if let Order::Peers { addresses } = &order {
                            self.peers.set_addresses(&mut turn, addresses);
                        }
                        let order = match order {
                            // Not the core's: it lives nowhere but where it is used.
                            Order::LinkKey { peer, key, secret } => {
                                self.peers.set_key(turn.now, peer, key, secret);
                                continue;
                            }
                            Order::Disk { id, change } => {
                                self.disk_orders.on_order(&self.plane, &self.keeper, id, change);
                                continue;
                            }
                            order => order,
                        };
                        if order == Order::ReportAll {
                            self.peers.report_again();
                        }
                        if self.directory.on_order(&order) {
                            self.clients.on_exports(&mut turn, self.directory.exports());
                        }
                        turn.inputs.push(Input::Order(Box::new(order)));
                    }
                }
                (Ticket::OrdersSend(id), Done::Sent(result)) => self.control.on_sent(&mut turn, id, result),
                (Ticket::ClientAccept(id), Done::Accepted(result)) => self.clients.on_accepted(&mut turn, id, result),
                (Ticket::ClientReceive(id), Done::Received(buffer, result)) => {
                    self.clients.on_received(&mut turn, id, buffer, result, self.directory.exports());
                }
                (Ticket::ClientSend(id), Done::Sent(result)) => {
                    self.clients.on_sent(&mut turn, id, result, self.directory.exports());
                }
                (Ticket::LinkAccept(id), Done::Accepted(result)) => self.peers.on_accepted(&mut turn, id, result),
                (Ticket::LinkConnect(id), Done::Connected(result)) => self.peers.on_connected(&mut turn, id, result),
                (Ticket::LinkReceive(id), Done::Received(buffer, result)) => {
                    self.peers.on_received(&mut turn, id, buffer, result);
                }
                (Ticket::LinkSend(id), Done::Sent(result)) => self.peers.on_sent(&mut turn, id, result),
                (ticket, _) => panic!("an operation of another kind ended as {ticket:?}"),
            }
        }
        self.events = events;
    }
}

/// What clients over the network must talk.
fn network_reach(config: &NodeConfig) -> anyhow::Result<Reach> {
    let asks_clients = match config.nbd_tls {
        NbdTls::Plain => return Ok(Reach::Network(None)),
        NbdTls::AnyClient => false,
        NbdTls::ClientCertificate => true,
    };
    let read = |path: &Path| std::fs::read(path).with_context(|| path.display().to_string());
    let files = &config.tls;
    let (ca, certificate, key) = (read(&files.ca)?, read(&files.certificate)?, read(&files.key)?);
    let server = TlsServer::new(&Pem { ca: &ca, certificate: &certificate, key: &key }, asks_clients)?;
    Ok(Reach::Network(Some(server)))
}

/// SIGTERM and SIGINT as something to wait for.
fn stop_signals() -> anyhow::Result<Socket> {
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    signals.thread_block().context("signals")?;
    let watched = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC).context("signals")?;
    Ok(Socket::from_fd(watched.into()))
}
