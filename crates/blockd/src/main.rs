//! `blockd`: the data plane of one node.
//!
//! Exit codes: 0 ended as asked, 1 failed, 2 wrong usage or configuration (an address in use, too), 5 refused for safety.

use anyhow::Context;
use clap::{Parser, Subcommand};
use pollux_base::config::NodeConfig;
use pollux_base::{ByteCount, PoolId};
use pollux_blockd::daemon::{Daemon, Ended};
use pollux_blockd::look;
use pollux_blockd::pool::{self, PoolError};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tracing::{error, info, warn};
use tracing_subscriber::EnvFilter;

#[derive(Parser)]
#[command(name = "blockd", version, about = "The data plane of a Pollux node: replication, store, NBD.")]
struct Arguments {
    /// The node's configuration.
    #[arg(long, global = true, default_value = "/etc/pollux/node.json")]
    config: PathBuf,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Run the daemon (the default).
    Run,
    /// Make the pool that the configuration names.
    Format {
        /// Size of a file that is to be made, such as 8G. An existing file or device is taken whole.
        #[arg(long, value_parser = parse_size)]
        size: Option<ByteCount>,
        /// Destroy what is on the disk. Takes the id of the pool that is to be made, so that it is not said by accident.
        #[arg(long, value_name = "POOL")]
        force_overwrite: Option<PoolId>,
    },
    /// Open the pool as the daemon would, and say whether it can be used.
    Check,
    /// Look at a pool that is not in use, without writing to it: is everything right? Ends with 1 if not.
    Verify {
        /// Its disks; those of the configuration if none is named.
        disks: Vec<PathBuf>,
        /// Read all data, too, and check it.
        #[arg(long)]
        data: bool,
        #[arg(long)]
        json: bool,
    },
    /// List what is in a pool that is not in use, or write the content of a volume to a file; nothing is written to its disks.
    Rescue {
        /// Its disks; those of the configuration if none is named.
        disks: Vec<PathBuf>,
        /// A disk of another node's pool, to be compared with; may be given several times.
        #[arg(long, value_name = "DISK")]
        peer: Vec<PathBuf>,
        /// The number or the name of a volume that is to be written out, such as v7.
        #[arg(long, value_name = "VOLUME", requires = "to")]
        export: Option<String>,
        /// A file that is to be made.
        #[arg(long, value_name = "FILE", requires = "export")]
        to: Option<PathBuf>,
        /// The file of the cluster's master key: of an encrypted volume plain text is written.
        #[arg(long, value_name = "FILE", requires = "export")]
        master_key: Option<PathBuf>,
        #[arg(long)]
        json: bool,
    },
    /// Use a pool that is an image of an earlier day: everything in it is compared with the other servers before it counts.
    TakeOldImage {
        /// The pool's id, so that it is not said by accident.
        pool: PoolId,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_env("POLLUX_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    abort_on_panic();
    if let Some(ended) = look(&arguments) {
        return ended;
    }
    let ended = read_config(&arguments.config).map_err(|cause| (2, cause)).and_then(|config| {
        match arguments.command.unwrap_or(Command::Run) {
            Command::Run => run(&config),
            Command::Format { size, force_overwrite } => pool::format(&config, size, force_overwrite)
                .map(|size| println!("pool {} is ready: {} ({size})", config.pool.pool, config.pool.path.display()))
                .map_err(of_pool),
            Command::TakeOldImage { pool } => pool::take_old_image(&config, pool)
                .map(|()| println!("pool {pool} may be started; its replicas are stale until they were compared"))
                .map_err(of_pool),
            Command::Verify { .. } | Command::Rescue { .. } => unreachable!("these were done before"),
            Command::Check => pool::check(&config)
                .map(|size| println!("pool {} can be used: {size}", config.pool.path.display()))
                .map_err(of_pool),
        }
    });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err((code, cause)) => {
            eprintln!("Error: {cause:#}");
            ExitCode::from(code)
        }
    }
}

/// What only looks: with disks named it needs no configuration.
fn look(arguments: &Arguments) -> Option<ExitCode> {
    let (disks, is_json) = match arguments.command.as_ref()? {
        Command::Verify { disks, json, .. } | Command::Rescue { disks, json, .. } => (disks, *json),
        Command::Run | Command::Format { .. } | Command::Check | Command::TakeOldImage { .. } => return None,
    };
    let ended = looked(arguments, disks, is_json);
    Some(ended.unwrap_or_else(|cause| {
        eprintln!("Error: {cause:#}");
        ExitCode::from(2)
    }))
}

fn looked(arguments: &Arguments, disks: &[PathBuf], is_json: bool) -> anyhow::Result<ExitCode> {
    let config = if disks.is_empty() { Some(read_config(&arguments.config)?) } else { None };
    let paths = look::paths(disks, config.as_ref())?;
    let json = |value: serde_json::Result<String>| value.context("JSON");
    let (text, is_clean) = match &arguments.command {
        Some(Command::Verify { data, .. }) => {
            let verified = look::verify(&paths, *data)?;
            let text = match is_json {
                true => json(serde_json::to_string_pretty(&verified))?,
                false => look::text_of_verified(&verified, &paths),
            };
            (text, verified.findings.is_empty())
        }
        Some(Command::Rescue { export: Some(volume), to: Some(to), master_key, .. }) => {
            let exported = look::export(&paths, volume, to, master_key.as_deref())?;
            let text = match is_json {
                true => json(serde_json::to_string_pretty(&exported))?,
                false => look::text_of_export(&exported, volume, to),
            };
            let export = &exported.export;
            (text, export.bad.is_empty() && !export.is_incomplete)
        }
        Some(Command::Rescue { peer, .. }) => {
            let rescued = look::rescue(&paths, peer)?;
            let text = match is_json {
                true => json(serde_json::to_string_pretty(&rescued))?,
                false => look::text_of_rescued(&rescued, &paths),
            };
            (text, true)
        }
        _ => unreachable!("only what looks comes here"),
    };
    println!("{text}");
    Ok(ExitCode::from(u8::from(!is_clean)))
}

fn run(config: &NodeConfig) -> Result<(), (u8, anyhow::Error)> {
    if let Err(cause) = pollux_host::priority::raise() {
        warn!(%cause, "running at ordinary priority: on a busy machine, peers may take this node's pauses for its loss");
    }
    loop {
        // All that fails at the start are addresses, paths and the pool's lock, which the configuration or its user must mend.
        let daemon = Daemon::new(config).map_err(|cause| (2, cause))?;
        info!(node = %config.node, pool = %config.pool.path.display(), "running");
        match daemon.run().map_err(|cause| (1, cause))? {
            Ended::Asked => break,
            Ended::DiskFailed => warn!("a disk has failed; going on without it"),
        }
    }
    info!("ended as asked");
    Ok(())
}

fn of_pool(cause: PoolError) -> (u8, anyhow::Error) {
    let code = match &cause {
        refusal if refusal.is_refusal() => 5,
        PoolError::Write(_) | PoolError::Ring(_) => 1,
        _ => 2,
    };
    (code, cause.into())
}

fn read_config(path: &Path) -> anyhow::Result<NodeConfig> {
    let text = std::fs::read_to_string(path).with_context(|| format!("configuration {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("configuration {}", path.display()))
}

/// `8G`, `512M` or plain bytes; powers of 1024.
fn parse_size(text: &str) -> Result<ByteCount, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        Some(b'T') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let size = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    size.map(ByteCount).ok_or_else(|| format!("`{text}` is not a size such as 8G, 512M or 4096"))
}

/// A broken promise of our own code must not be lived with: the process ends and is restarted.
fn abort_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        error!("{panic}\n{}", std::backtrace::Backtrace::force_capture());
        std::process::abort();
    }));
}
