//! `blockd`: the data plane of one node.
//!
//! Exit codes: 0 ended as asked, 1 failed, 2 wrong usage or configuration (an address in use, too), 5 refused for safety.

use anyhow::Context;
use clap::{Parser, Subcommand};
use pollux_base::config::NodeConfig;
use pollux_base::{ByteCount, PoolId};
use pollux_blockd::daemon::{Daemon, Ended};
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
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_env("POLLUX_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    abort_on_panic();
    let ended = read_config(&arguments.config).map_err(|cause| (2, cause)).and_then(|config| {
        match arguments.command.unwrap_or(Command::Run) {
            Command::Run => run(&config),
            Command::Format { size, force_overwrite } => pool::format(&config, size, force_overwrite)
                .map(|size| println!("pool {} is ready: {} ({size})", config.pool.pool, config.pool.path.display()))
                .map_err(of_pool),
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
