//! `pollux`, the operator's command, and its lab.
//!
//! `pollux NOUN VERB`: each noun is a file under `command`. It knows the API and nothing of the daemons behind it; only
//! `lab` knows how they are started. Every failure ends here as two lines and an exit code (`failure`).

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod command;
pub mod context;
pub mod failure;
pub mod lab;
pub mod output;
pub mod size;
pub mod table;

use clap::{CommandFactory, Parser, Subcommand};
use command::{event, image, node, raw, status, task, vm, volume, witness};
use context::ContextArgs;
use failure::Outcome;
use output::{Format, Output};
use std::process::ExitCode;
use std::sync::Arc;

/// Highly available virtual machines on two ordinary servers.
#[derive(Debug, Parser)]
#[command(name = "pollux", version, disable_help_subcommand = true, max_term_width = 100, after_help = EXIT_CODES)]
pub struct Cli {
    /// How results are printed
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table, value_name = "FORMAT", hide_possible_values = true)]
    output: Format,
    /// Confirm what a destructive verb asks
    #[arg(long, global = true)]
    yes: bool,
    #[command(flatten)]
    context: ContextArgs,
    #[command(subcommand)]
    noun: Noun,
}

const EXIT_CODES: &str =
    "Exit codes: 0 ok, 1 failed, 2 usage, 3 not found, 4 conflict, 5 refused for safety, 6 timed out.";

#[derive(Debug, Subcommand)]
enum Noun {
    /// If a node dies now, what happens? And everything else at one look
    Status,
    /// Servers
    #[command(subcommand)]
    Node(node::NodeCommand),
    /// Virtual machines
    #[command(subcommand)]
    Vm(vm::VmCommand),
    /// Virtual disks
    #[command(subcommand)]
    Volume(volume::VolumeCommand),
    /// Disk images from which VMs are made
    #[command(subcommand)]
    Image(image::ImageCommand),
    /// The register outside the nodes that decides who goes on alone
    #[command(subcommand)]
    Witness(witness::WitnessCommand),
    /// What happened
    #[command(subcommand)]
    Event(event::EventCommand),
    /// Requests on their way
    #[command(subcommand)]
    Task(task::TaskCommand),
    /// The REST API, raw
    #[command(arg_required_else_help = true)]
    Api(raw::ApiArgs),
    /// A whole site on this machine, to try things out
    #[command(subcommand)]
    Lab(lab::LabCommand),
}

/// Runs the command line; the exit code is that of the table in `failure`.
pub fn main() -> ExitCode {
    lab::demo::interrupt::forget_inherited();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::from(failure.code as u8)
        }
    }
}

fn run(cli: Cli) -> Outcome {
    let output = Output { format: cli.output, yes: cli.yes };
    if let Noun::Lab(command) = cli.noun {
        return lab::run(command, &output);
    }
    let client = Arc::new(cli.context.client()?);
    match cli.noun {
        Noun::Status => status::run(&client, &output),
        Noun::Node(command) => node::run(command, &client, &output),
        Noun::Vm(command) => vm::run(command, &client, &output),
        Noun::Volume(command) => volume::run(command, &client, &output),
        Noun::Image(command) => image::run(command, &client, &output),
        Noun::Witness(command) => witness::run(command, &client, &output),
        Noun::Event(command) => event::run(command, &client, &output),
        Noun::Task(command) => task::run(command, &client, &output),
        Noun::Api(arguments) => raw::run(&arguments, &client, &output),
        Noun::Lab(_) => Ok(()),
    }
}

/// Help and version are answers; anything else is a usage error, in our two lines.
fn usage(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind::{DisplayHelp, DisplayHelpOnMissingArgumentOrSubcommand, DisplayVersion};
    match error.kind() {
        DisplayHelp | DisplayVersion => {
            let _ = error.print();
            ExitCode::SUCCESS
        }
        DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            ExitCode::from(failure::Code::Usage as u8)
        }
        _ => {
            let text = error.to_string();
            let said = text.lines().take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"));
            let said: Vec<&str> = said.collect();
            let said = said.join(" ");
            let failure = failure::Failure::usage(said.trim_start_matches("error: "));
            eprintln!("{}", failure.hint("`pollux NOUN VERB --help` tells what can be given"));
            ExitCode::from(failure::Code::Usage as u8)
        }
    }
}

/// The command tree, for the golden files of its help.
pub fn tree() -> clap::Command {
    Cli::command()
}
