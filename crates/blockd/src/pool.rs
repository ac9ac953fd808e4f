//! The pool's disk: made (`blockd format`), opened, and looked at (`blockd check`).

use pollux_base::config::NodeConfig;
use pollux_base::{ByteCount, DiskError, DiskId, DiskOp, PoolId};
use pollux_host::clock;
use pollux_host::disk::{Disk, OpenDiskError};
use pollux_host::reactor::{Done, Op, Reactor, Token};
use pollux_store::{FormatError, OpenError, PoolIdentity, Store};
use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;

/// How much of a disk must be blank before it is taken for empty. Boot sectors, partition tables, file systems and pools
/// all leave something here.
const BLANK_BYTES: u64 = 1 << 20;

/// Why there is no pool, or no new one.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    #[error(transparent)]
    Disk(#[from] OpenDiskError),
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
}

impl PoolError {
    /// Whether the pool was left alone to be safe.
    pub fn is_refusal(&self) -> bool {
        match self {
            PoolError::NotEmpty { .. } | PoolError::OtherPool { .. } | PoolError::Open(_) => true,
            PoolError::Disk(_)
            | PoolError::Ring(_)
            | PoolError::SizeMissing(_)
            | PoolError::OtherSize { .. }
            | PoolError::Format(_)
            | PoolError::Write(_) => false,
        }
    }
}

/// Makes the pool that the configuration names. What is on its disk already is kept, unless `overwrite` names the pool.
pub fn format(config: &NodeConfig, size: Option<ByteCount>, overwrite: Option<PoolId>) -> Result<ByteCount, PoolError> {
    let path = &config.pool.path;
    let pool = config.pool.pool;
    if let Some(named) = overwrite
        && named != pool
    {
        return Err(PoolError::OtherPool { named, configured: pool });
    }
    let is_new = !path.exists();
    if is_new {
        let size = size.ok_or_else(|| PoolError::SizeMissing(path.clone()))?;
        // Asked for before the file is made: a size that cannot be leaves nothing behind.
        Store::format(identity(config), size)?;
        Disk::create_file(path, size)?;
    }
    let formatted = format_disk(config, size, is_new || overwrite.is_some());
    if is_new && formatted.is_err() {
        // Made a moment ago by ourselves. If even this fails, the next attempt says that it is not empty.
        let _ = std::fs::remove_file(path);
    }
    formatted
}

fn format_disk(config: &NodeConfig, size: Option<ByteCount>, may_overwrite: bool) -> Result<ByteCount, PoolError> {
    let path = &config.pool.path;
    let disk = Disk::open(path)?;
    let actual = disk.size();
    if let Some(asked) = size.filter(|asked| *asked != actual) {
        return Err(PoolError::OtherSize { path: path.clone(), actual, asked });
    }
    if !may_overwrite && !Disk::begins_blank(path, BLANK_BYTES)? {
        return Err(PoolError::NotEmpty { path: path.clone(), pool: config.pool.pool });
    }
    let mut reactor = Reactor::new().map_err(PoolError::Ring)?;
    reactor.add_disk(disk);
    for op in Store::format(identity(config), actual)? {
        carry_out(&mut reactor, op).map_err(PoolError::Ring)?.result.map_err(PoolError::Write)?;
    }
    Ok(actual)
}

/// Opens the pool as the daemon would, changing nothing but what opening itself heals, and lets it go again.
pub fn check(config: &NodeConfig) -> Result<ByteCount, PoolError> {
    let disk = Disk::open(&config.pool.path)?;
    let size = disk.size();
    let mut store = Store::open(config.cluster, config.node, size);
    let mut reactor = Reactor::new().map_err(PoolError::Ring)?;
    reactor.add_disk(disk);
    let mut ops = VecDeque::new();
    loop {
        while let Some(output) = store.poll() {
            match output {
                pollux_store::Output::Disk(op) => ops.push_back(op),
                pollux_store::Output::Opened(opened) => return Ok(opened.map(|()| size)?),
                pollux_store::Output::Ended(..) | pollux_store::Output::Changed(..) => {}
            }
        }
        let op = ops.pop_front().expect("opening ends, or waits for the disk");
        let done = carry_out(&mut reactor, op).map_err(PoolError::Ring)?;
        store.handle(clock::now(), pollux_store::Input::Disk(done));
    }
}

fn identity(config: &NodeConfig) -> PoolIdentity {
    PoolIdentity {
        cluster: config.cluster,
        node: config.node,
        pool: config.pool.pool,
        disk: DiskId(u128::from_le_bytes(crate::random())),
    }
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
