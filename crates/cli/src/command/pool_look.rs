//! `pollux pool verify` and `rescue`: a pool's disks on this machine, while its `blockd` does not run. No cluster is needed for
//! this: `blockd` knows the disks' format and does it; this only finds that program and passes everything on. With `--node` the
//! node's own `blockd` verifies the pool that it uses.

use crate::context::from_client;
use crate::failure::{Code, Failure, Outcome};
use crate::output::Output;
use crate::table;
use pollux_api::{Client, PoolVerification, TaskState};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

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
    /// The pool of this node, while it is used: its metadata, at a pace that guests allow
    #[arg(long, value_name = "NODE", conflicts_with_all = ["disks", "data", "config"])]
    pub node: Option<String>,
    /// With --node: longest time to wait, in seconds; it goes on all the same
    #[arg(long, default_value_t = 3600, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86400))]
    timeout: u64,
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
    /// The file of the cluster's master key: of an encrypted volume plain text is written, not what is stored
    #[arg(long, value_name = "FILE", requires = "export")]
    master_key: Option<PathBuf>,
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

/// Of a node's pool in use; ends with the same codes as a look at disks.
pub fn verify_node(arguments: &VerifyArgs, node: &str, client: &Client, output: &Output) -> Outcome {
    let verification =
        ask_node(arguments, node, client, output).map_err(|failure| Failure { code: Code::Usage, ..failure })?;
    output.show(&verification, table::verification)?;
    match verification.counts.values().sum::<u64>() {
        0 => Ok(()),
        found => Err(Failure::other(format!("{found} findings in the pool on {node}"))
            .hint("docs/operating/pools.md tells of each code")),
    }
}

fn ask_node(arguments: &VerifyArgs, node: &str, client: &Client, output: &Output) -> Outcome<PoolVerification> {
    let accepted = client.verify_pool(node).map_err(from_client)?;
    output.progress(&format!("task {}", accepted.task));
    let mut last = String::new();
    let watched = client.wait_task(&accepted.task, Duration::from_secs(arguments.timeout), |task| {
        if task.detail != last && task.state == TaskState::Running {
            output.progress(&format!("  {}", task.detail));
            last.clone_from(&task.detail);
        }
    });
    watched.map_err(from_client)?;
    client.pool_verification(node).map_err(from_client)
}

pub fn rescue(arguments: &RescueArgs, output: &Output) -> Outcome {
    let mut command = blockd("rescue", arguments.config.as_deref(), output);
    for disk in &arguments.peer {
        command.arg("--peer").arg(disk);
    }
    if let (Some(volume), Some(to)) = (&arguments.export, &arguments.to) {
        command.arg("--export").arg(volume).arg("--to").arg(to);
    }
    if let Some(file) = &arguments.master_key {
        command.arg("--master-key").arg(file);
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
