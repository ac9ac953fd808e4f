//! `pollux-guard --config FILE`: see the library for what it promises. Exit code 2: it could not start, and said why in
//! one line.

// The library is a core; this is its shell, and touches the machine.
#![allow(clippy::disallowed_methods, clippy::disallowed_types)]

mod shell;

use anyhow::{Context, Result};
use clap::Parser;
use pollux_base::config::NodeConfig;
use shell::Shell;
use std::path::PathBuf;
use std::process::ExitCode;

/// Says "this node is alive" to its peers, and kills the node's guests when its lease runs out.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Configuration of the node (JSON).
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let path = arguments.config.display();
    let text = std::fs::read(&arguments.config).with_context(|| format!("cannot read the configuration {path}"))?;
    let config: NodeConfig =
        serde_json::from_slice(&text).with_context(|| format!("the configuration {path} is not understood"))?;
    let shell = Shell::open(&config)?;
    // After everything is open, so that it is locked, too.
    if let Err(error) = shell::sys::lock_memory() {
        eprintln!("pollux-guard: memory is not locked: {error}");
    }
    if let Err(error) = shell::sys::become_real_time() {
        eprintln!("pollux-guard: no real-time priority: {error}");
    }
    shell.run()
}
