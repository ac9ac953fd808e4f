//! The pool's disks: made (`blockd format`), opened, and looked at (`blockd check`).

use crate::{disk_list, random, seen};
use pollux_base::config::NodeConfig;
use pollux_base::{ByteCount, DiskError, DiskId, DiskIndex, DiskOp, PoolId};
use pollux_host::clock;
use pollux_host::disk::{Disk, OpenDiskError};
use pollux_host::reactor::{Done, Op, Reactor, Token};
use pollux_store::{Disks, FormatError, OpenError, Output, PoolIdentity, StoreError, StoreRequestId};
use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use tracing::warn;

/// How much of a disk must be blank before it is taken for empty. Boot sectors, partition tables, file systems and pools
/// all leave something here.
const BLANK_BYTES: u64 = 1 << 20;

/// Why there is no pool, or no new one.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    #[error(transparent)]
    Disk(#[from] OpenDiskError),
    #[error("{0}")]
    List(io::Error),
    #[error("io_uring cannot be used: {0}")]
    Ring(io::Error),
    #[error("{path} does not exist; say how large it is to be (--size 8G)", path = .0.display())]
    SizeMissing(PathBuf),
    #[error("{path} is {actual} long, but {asked} was asked for; leave --size out to take all of it", path = path.display())]
    OtherSize { path: PathBuf, actual: ByteCount, asked: ByteCount },
    #[error(
        "{path} is not empty: formatting it would destroy what is there. To do so, name the pool that is to be made: \
         --force-overwrite {pool}",
        path = path.display()
    )]
    NotEmpty { path: PathBuf, pool: PoolId },
    #[error("--force-overwrite names pool {named}, but the configuration names {configured}; nothing was changed")]
    OtherPool { named: PoolId, configured: PoolId },
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("formatting failed: {0}")]
    Write(DiskError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the node's state directory: {0}")]
    State(io::Error),
}

impl PoolError {
    /// Whether the pool was left alone to be safe.
    pub fn is_refusal(&self) -> bool {
        match self {
            PoolError::NotEmpty { .. } | PoolError::OtherPool { .. } | PoolError::Open(_) => true,
            PoolError::Disk(_)
            | PoolError::List(_)
            | PoolError::Ring(_)
            | PoolError::SizeMissing(_)
            | PoolError::OtherSize { .. }
            | PoolError::Format(_)
            | PoolError::Store(_)
            | PoolError::State(_)
            | PoolError::Write(_) => false,
        }
    }
}

/// Makes the pool that the configuration names. What is on its disks already is kept, unless `overwrite` names the pool.
/// Gives its size.
pub fn format(config: &NodeConfig, size: Option<ByteCount>, overwrite: Option<PoolId>) -> Result<ByteCount, PoolError> {
    let pool = config.pool.pool;
    if let Some(named) = overwrite
        && named != pool
    {
        return Err(PoolError::OtherPool { named, configured: pool });
    }
    let new: Vec<&PathBuf> = config.pool.disks().filter(|path| !path.exists()).collect();
    for path in &new {
        let size = size.ok_or_else(|| PoolError::SizeMissing((*path).clone()))?;
        // Asked for before a file is made: a size that cannot be leaves nothing behind.
        Disks::format(identity(config), &[(DiskId(0), size, String::new())])?;
    }
    let made = new.iter().try_for_each(|path| Disk::create_file(path, size.unwrap_or_default()));
    let formatted = made.map_err(PoolError::from).and_then(|()| format_disks(config, size, &new, overwrite.is_some()));
    if formatted.is_err() {
        // Made a moment ago by ourselves. If even this fails, the next attempt says that it is not empty.
        new.iter().for_each(|path| drop(std::fs::remove_file(path)));
    }
    disk_list::clear(config).map_err(PoolError::List)?;
    formatted
}

fn format_disks(
    config: &NodeConfig,
    size: Option<ByteCount>,
    new: &[&PathBuf],
    may_overwrite: bool,
) -> Result<ByteCount, PoolError> {
    let mut reactor = Reactor::new().map_err(PoolError::Ring)?;
    let mut members = Vec::new();
    for path in config.pool.disks() {
        let disk = Disk::open(path)?;
        let actual = disk.size();
        if let Some(asked) = size.filter(|asked| *asked != actual) {
            return Err(PoolError::OtherSize { path: path.clone(), actual, asked });
        }
        if !new.contains(&path) && !may_overwrite && !Disk::begins_blank(path, BLANK_BYTES)? {
            return Err(PoolError::NotEmpty { path: path.clone(), pool: config.pool.pool });
        }
        members.push((DiskId(u128::from_le_bytes(random())), actual, path.display().to_string()));
        reactor.add_disk(disk);
    }
    // Every disk was looked at before the first was written to.
    for (ops, number) in Disks::format(identity(config), &members)?.into_iter().zip(0..) {
        for mut op in ops {
            op.id.disk = DiskIndex(number);
            carry_out(&mut reactor, op).map_err(PoolError::Ring)?.result.map_err(PoolError::Write)?;
        }
    }
    Ok(ByteCount(members.iter().map(|(_, size, _)| size.0).sum()))
}

/// Opens the pool's disks, with the path of each. Of all that may be one, those are left out that are no part of the pool: whether any is
/// missing the others know.
pub fn open_disks(config: &NodeConfig) -> Result<Vec<(PathBuf, Disk)>, PoolError> {
    let paths = disk_list::paths(config).map_err(PoolError::List)?;
    if let [only] = paths.as_slice() {
        return Ok(vec![(only.clone(), Disk::open(only)?)]);
    }
    let (mut disks, mut unopened) = (Vec::new(), None);
    for path in paths {
        match Disk::open(&path) {
            Ok(disk) => disks.push((path, disk)),
            Err(cause) => {
                warn!(%cause, "left out");
                unopened.get_or_insert(cause);
            }
        }
    }
    if let Some(cause) = unopened.filter(|_| disks.is_empty()) {
        return Err(cause.into());
    }
    while disks.len() > 1 {
        let all: Vec<Disk> = disks.iter().map(|(_, disk)| disk.clone()).collect();
        let (at, reason) = match try_open(config, &all) {
            Ok(strangers) => match strangers.last() {
                Some(last) => (last.index(), "it is not, or not any more, a part of the pool".to_owned()),
                None => break,
            },
            Err(PoolError::Open(error)) => match error {
                OpenError::Out { disk, .. } | OpenError::OneDisk { disk, .. } => (disk, error.to_string()),
                OpenError::OtherPool { disk, found, .. } => {
                    (if found == config.pool.pool { 0 } else { disk }, error.to_string())
                }
                // Whatever is wrong is said when the pool is opened to be used.
                _ => break,
            },
            Err(error) => return Err(error),
        };
        let (path, _) = disks.remove(at);
        warn!(path = %path.display(), reason, "left out");
    }
    Ok(disks)
}

/// Opens the pool as the daemon would, changing nothing but what opening itself heals, and lets it go again.
pub fn check(config: &NodeConfig) -> Result<ByteCount, PoolError> {
    let disks: Vec<Disk> = open_disks(config)?.into_iter().map(|(_, disk)| disk).collect();
    try_open(config, &disks)?;
    Ok(ByteCount(disks.iter().map(|disk| disk.size().0).sum()))
}

/// Gives the disks that are no part of the pool.
fn try_open(config: &NodeConfig, disks: &[Disk]) -> Result<Vec<DiskIndex>, PoolError> {
    let sizes: Vec<ByteCount> = disks.iter().map(Disk::size).collect();
    let mut pool = Disks::open_seen(config.cluster, config.node, &sizes, &seen::read(config));
    let mut reactor = Reactor::new().map_err(PoolError::Ring)?;
    disks.iter().for_each(|disk| reactor.add_disk(disk.clone()));
    let mut ops = VecDeque::new();
    loop {
        while let Some(output) = pool.poll() {
            match output {
                Output::Disk(op) => ops.push_back(op),
                Output::Opened(opened) => return Ok(opened.map(|()| pool.strangers().collect())?),
                Output::Ended(..) | Output::Changed(..) | Output::Close(_) => {}
            }
        }
        let op = ops.pop_front().expect("opening ends, or waits for a disk");
        let done = carry_out(&mut reactor, op).map_err(PoolError::Ring)?;
        pool.handle(clock::now(), pollux_store::Input::Disk(done));
    }
}

/// A human says that the pool is an image of an earlier day: it may be opened, and everything in it is compared with the other
/// servers before it counts.
pub fn take_old_image(config: &NodeConfig, named: PoolId) -> Result<(), PoolError> {
    if named != config.pool.pool {
        return Err(PoolError::OtherPool { named, configured: config.pool.pool });
    }
    let disks: Vec<Disk> = open_disks(config)?.into_iter().map(|(_, disk)| disk).collect();
    let sizes: Vec<ByteCount> = disks.iter().map(Disk::size).collect();
    let mut pool = Disks::open(config.cluster, config.node, &sizes);
    let mut reactor = Reactor::new().map_err(PoolError::Ring)?;
    disks.into_iter().for_each(|disk| reactor.add_disk(disk));
    run(&mut pool, &mut reactor)?;
    for (op, number) in pollux_replica::take_as_stale(pool.notes()).into_iter().zip(1..) {
        pool.handle(clock::now(), pollux_store::Input::Request(StoreRequestId(number), op));
        run(&mut pool, &mut reactor)?;
    }
    seen::write(config, &pool.positions()).map_err(PoolError::State)
}

/// Runs the pool until it waits for nothing.
fn run(pool: &mut Disks, reactor: &mut Reactor) -> Result<(), PoolError> {
    let mut ops = VecDeque::new();
    loop {
        while let Some(output) = pool.poll() {
            match output {
                pollux_store::Output::Disk(op) => ops.push_back(op),
                pollux_store::Output::Opened(opened) => opened?,
                pollux_store::Output::Ended(_, ended) => drop(ended?),
                pollux_store::Output::Changed(..) | pollux_store::Output::Close(_) => {}
            }
        }
        let Some(op) = ops.pop_front() else { return Ok(()) };
        let done = carry_out(reactor, op).map_err(PoolError::Ring)?;
        pool.handle(clock::now(), pollux_store::Input::Disk(done));
    }
}

fn identity(config: &NodeConfig) -> PoolIdentity {
    PoolIdentity { cluster: config.cluster, node: config.node, pool: config.pool.pool, disk: DiskId(0) }
}

/// Does one operation and waits for its end.
fn carry_out(reactor: &mut Reactor, op: DiskOp) -> io::Result<pollux_base::DiskDone> {
    reactor.submit(Token(0), Op::Disk(op));
    let mut events = Vec::new();
    while events.is_empty() {
        reactor.wait(None, &mut events)?;
    }
    match events.pop().map(|event| event.done) {
        Some(Done::Disk(done)) => Ok(done),
        _ => panic!("the only operation under way is one of the disk"),
    }
}
