//! `noded`: the control plane of one node.

use anyhow::Result;
use clap::{Parser, Subcommand};
use pollux_base::config::NodeConfig;
use pollux_noded::{logging, node};
use std::path::PathBuf;
use std::process::ExitCode;

/// The control plane of one node of a Pollux cluster.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The node's configuration, shared with `blockd` and `pollux-guard`.
    #[arg(long, global = true)]
    config: Option<PathBuf>,
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Subcommand, Clone, Copy)]
enum Verb {
    /// Run the node (also without a verb).
    Run,
    /// Prepare an empty node, once, before it is first run. Done again it changes nothing.
    Init,
}

fn main() -> ExitCode {
    logging::start();
    let args = Args::parse();
    let Some(config) = args.config else {
        eprintln!("Error: --config FILE is needed");
        return ExitCode::from(2);
    };
    let result = node::read_config(&config).and_then(|config| match args.verb.unwrap_or(Verb::Run) {
        Verb::Init => node::init(&config).map(|prepared| {
            let word = if prepared { "is prepared" } else { "was prepared already" };
            println!("node {} of cluster {} {word}", config.node, config.cluster);
            ExitCode::SUCCESS
        }),
        Verb::Run => run(config).map(|reason| {
            eprintln!("Error: {reason}");
            ExitCode::FAILURE
        }),
    });
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Gives the reason of its end; an error is one of the start.
fn run(config: NodeConfig) -> Result<String> {
    // Few threads: the work is small, and the machine is the guests'.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(node::run(config))
}
