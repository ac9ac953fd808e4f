//! Project chores. `check` never writes, `fix` does.

mod bench;
mod check;
mod fuzz;
mod interrupt;
mod licence;
mod sim;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Project chores")]
struct Args {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Format, lints, arrows between crates, licences, lengths of files. Changes nothing.
    Check,
    /// Formats, and applies what clippy knows how to mend.
    Fix,
    /// Speed and price of a mirrored volume beside the floor and `qemu-nbd`, in the same run. Needs root.
    Bench(bench::BenchArgs),
    /// Runs the simulator over many seeds, or replays one.
    Sim(sim::SimArgs),
    /// Tries the parsers of wire and disk with made-up bytes. Needs a nightly toolchain and cargo-fuzz.
    Fuzz(fuzz::FuzzArgs),
}

fn main() -> ExitCode {
    let result = match Args::parse().chore {
        Chore::Check => check::check(),
        Chore::Fix => fix(),
        Chore::Bench(args) => bench::run(&args),
        Chore::Sim(args) => sim::sim(&args),
        Chore::Fuzz(args) => fuzz::fuzz(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn fix() -> Result<()> {
    let fixes = ["--workspace", "--all-targets", "--fix", "--allow-dirty", "--allow-staged"];
    run(cargo().arg("clippy").args(fixes))?;
    run(cargo().args(["fmt", "--all"]))
}

/// The folder of the workspace.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace").to_path_buf()
}

/// Where cargo builds.
fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("start {command:?}"))?;
    if !status.success() {
        bail!("{command:?} ended with {status}");
    }
    Ok(())
}
