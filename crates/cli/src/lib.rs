//! `pollux`, the operator's command, and its lab.
//!
//! `pollux NOUN VERB`: each noun is a file under `command`. It knows the API and nothing of the daemons behind it; only
//! `lab` knows how they are started. Every failure ends here as two lines and an exit code (`failure`).

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod command;
pub mod context;
pub mod failure;
#[doc(hidden)]
pub mod fuzz;
pub mod lab;
pub mod output;
pub mod size;
pub mod table;

use clap::{CommandFactory, Parser, Subcommand};
use command::pool::PoolCommand;
use command::{
    event, group, image, kept, master_key, node, pool, pool_look, raw, snapshot, status, task, vm, volume, witness,
};
use context::ContextArgs;
use failure::{Failure, Outcome};
use output::{Format, Output};
use pollux_api::Client;
use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

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
    /// Show it again and again until interrupted; for what lists and shows
    #[arg(long, global = true)]
    watch: bool,
    #[command(flatten)]
    context: ContextArgs,
    #[command(subcommand)]
    noun: Noun,
}

const EXIT_CODES: &str =
    "Exit codes: 0 ok, 1 failed, 2 usage, 3 not found, 4 conflict, 5 refused for safety, 6 timed out.";

/// Often enough for eyes, rare enough for the node.
const WATCH_AGAIN: Duration = Duration::from_secs(1);

#[derive(Clone, Debug, Subcommand)]
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
    /// VMs' disks and volumes, frozen in time
    #[command(subcommand)]
    Snapshot(snapshot::SnapshotCommand),
    /// The space that nodes give to volumes
    #[command(subcommand)]
    Pool(pool::PoolCommand),
    /// What nodes keep of replicas that are or were overwritten
    #[command(subcommand)]
    Kept(kept::KeptCommand),
    /// Volumes that stay consistent together, and their replicas
    #[command(subcommand)]
    Group(group::GroupCommand),
    /// Disk images from which VMs are made
    #[command(subcommand)]
    Image(image::ImageCommand),
    /// What the keys of encrypted volumes are sealed under
    #[command(subcommand)]
    MasterKey(master_key::MasterKeyCommand),
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
    if cli.watch && !cli.noun.only_shows() {
        return Err(Failure::usage("--watch is for what lists and shows").hint("such as `pollux status --watch`"));
    }
    let noun = match cli.noun {
        Noun::Lab(command) => return lab::run(command, &output),
        // The cluster may be gone: that is what they are for.
        Noun::Pool(PoolCommand::Verify(arguments)) if arguments.node.is_none() => {
            return pool_look::verify(&arguments, &output);
        }
        Noun::Pool(PoolCommand::Rescue(arguments)) => return pool_look::rescue(&arguments, &output),
        noun => noun,
    };
    let client = Arc::new(cli.context.client()?);
    let ca = cli.context.ca_file();
    match noun {
        Noun::Event(command) => event::run(command, cli.watch, &client, &output),
        noun if cli.watch => watch(|| run_once(noun.clone(), &client, &ca, &output), &output),
        noun => run_once(noun, &client, &ca, &output),
    }
}

fn run_once(noun: Noun, client: &Arc<Client>, ca: &Path, output: &Output) -> Outcome {
    match noun {
        Noun::Status => status::run(client, output),
        Noun::Node(command) => node::run(command, client, output),
        Noun::Vm(command) => vm::run(command, client, output),
        Noun::Volume(command) => volume::run(command, client, ca, output),
        Noun::Snapshot(command) => snapshot::run(command, client, output),
        Noun::Pool(command) => pool::run(command, client, output),
        Noun::Kept(command) => kept::run(command, client, ca, output),
        Noun::Group(command) => group::run(command, client, output),
        Noun::Image(command) => image::run(command, client, output),
        Noun::MasterKey(command) => master_key::run(command, client, output),
        Noun::Witness(command) => witness::run(command, client, output),
        Noun::Event(command) => event::run(command, false, client, output),
        Noun::Task(command) => task::run(command, client, output),
        Noun::Api(arguments) => raw::run(&arguments, client, output),
        Noun::Lab(command) => lab::run(command, output),
    }
}

/// Shows it anew each second, on a cleared screen if there is one. Nodes come and go: whoever watches wants to see that,
/// so a failure is shown like an answer.
fn watch(mut show: impl FnMut() -> Outcome, output: &Output) -> Outcome {
    loop {
        if std::io::stdout().is_terminal() && !output.is_json() {
            output::print("\x1b[H\x1b[2J")?;
        }
        if let Err(failure) = show() {
            eprintln!("{failure}");
        }
        std::thread::sleep(WATCH_AGAIN);
    }
}

impl Noun {
    /// Whether it changes nothing and ends at once, so that it may be done again and again.
    fn only_shows(&self) -> bool {
        use command::{
            group::GroupCommand, image::ImageCommand, kept::KeptCommand, master_key::MasterKeyCommand,
            node::NodeCommand, snapshot::SnapshotCommand, task::TaskCommand, vm::VmCommand, volume::VolumeCommand,
        };
        match self {
            Noun::Status | Noun::Event(_) | Noun::Witness(_) => true,
            Noun::Pool(command) => matches!(command, PoolCommand::List | PoolCommand::Show { .. }),
            Noun::Node(command) => matches!(command, NodeCommand::List | NodeCommand::Show { .. }),
            Noun::Vm(command) => matches!(command, VmCommand::List | VmCommand::Show { .. } | VmCommand::Why { .. }),
            Noun::Volume(command) => matches!(command, VolumeCommand::List | VolumeCommand::Show { .. }),
            Noun::Kept(command) => matches!(command, KeptCommand::List { .. } | KeptCommand::Show { .. }),
            Noun::Group(command) => matches!(command, GroupCommand::List | GroupCommand::Show { .. }),
            Noun::Snapshot(command) => {
                matches!(command, SnapshotCommand::List | SnapshotCommand::Show { .. } | SnapshotCommand::Diff { .. })
            }
            Noun::Image(command) => matches!(command, ImageCommand::List | ImageCommand::Show { .. }),
            Noun::MasterKey(command) => matches!(command, MasterKeyCommand::Show),
            Noun::Task(command) => matches!(command, TaskCommand::List | TaskCommand::Show { .. }),
            Noun::Api(_) | Noun::Lab(_) => false,
        }
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
            let failure = Failure::usage(said.trim_start_matches("error: "));
            eprintln!("{}", failure.hint("`pollux NOUN VERB --help` tells what can be given"));
            ExitCode::from(failure::Code::Usage as u8)
        }
    }
}

/// The command tree, for the golden files of its help.
pub fn tree() -> clap::Command {
    Cli::command()
}
