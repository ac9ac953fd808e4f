//! `pollux pool verify` and `rescue`: a pool's disks on this machine, while its `blockd` does not run. No cluster is needed for
//! this: `blockd` knows the disks' format and does it; this only finds that program and passes everything on.

use crate::failure::{Code, Failure, Outcome};
use crate::output::Output;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

#[derive(Clone, Debug, clap::Args)]
pub struct VerifyArgs {
    /// The pool's disks; those of the node's configuration if none is named
    #[arg(value_name = "DISK")]
    disks: Vec<PathBuf>,
    /// Read all data, too, and check it
    #[arg(long)]
    data: bool,
    /// The node's configuration
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Clone, Debug, clap::Args)]
pub struct RescueArgs {
    /// The pool's disks; those of the node's configuration if none is named
    #[arg(value_name = "DISK")]
    disks: Vec<PathBuf>,
    /// A disk of another node's pool, to see which one is newer; may be given several times
    #[arg(long, value_name = "DISK")]
    peer: Vec<PathBuf>,
    /// The number or the name of a volume that is to be written out, such as v7 or vm/web1/disk0
    #[arg(long, value_name = "VOLUME", requires = "to")]
    export: Option<String>,
    /// A file that is to be made: raw and sparse
    #[arg(long, value_name = "FILE", requires = "export")]
    to: Option<PathBuf>,
    /// The node's configuration
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

pub fn verify(arguments: &VerifyArgs, output: &Output) -> Outcome {
    let mut command = blockd("verify", arguments.config.as_deref(), output);
    if arguments.data {
        command.arg("--data");
    }
    become_it(command.args(&arguments.disks))
}

pub fn rescue(arguments: &RescueArgs, output: &Output) -> Outcome {
    let mut command = blockd("rescue", arguments.config.as_deref(), output);
    for disk in &arguments.peer {
        command.arg("--peer").arg(disk);
    }
    if let (Some(volume), Some(to)) = (&arguments.export, &arguments.to) {
        command.arg("--export").arg(volume).arg("--to").arg(to);
    }
    become_it(command.args(&arguments.disks))
}

/// The program beside this one, as it is installed, or else wherever programs are found.
fn blockd(verb: &str, config: Option<&Path>, output: &Output) -> Command {
    let beside = std::env::current_exe().ok().map(|own| own.with_file_name("blockd")).filter(|path| path.exists());
    let mut command = Command::new(beside.unwrap_or_else(|| "blockd".into()));
    if let Some(config) = config {
        command.arg("--config").arg(config);
    }
    command.arg(verb);
    if output.is_json() {
        command.arg("--json");
    }
    command
}

/// Its exit code is this one's.
fn become_it(command: &mut Command) -> Outcome {
    let error = command.exec();
    Err(Failure::new(Code::Usage, format!("blockd cannot be started: {error}"))
        .hint("this is done on the server whose disks they are, where blockd is installed"))
}
