//! `pollux vm`.

use super::console;
use super::wait::WaitArgs;
use crate::context::from_client;
use crate::failure::Outcome;
use crate::output::Output;
use crate::{size, table};
use pollux_api::{Client, CreateVm};
use std::sync::Arc;

#[derive(Clone, Debug, clap::Subcommand)]
pub enum VmCommand {
    /// Create a VM with its disks; it is mirrored from birth, and not started by this
    Create {
        name: String,
        /// Image from which the first disk is filled; none: the disks are empty
        #[arg(long)]
        image: Option<String>,
        #[arg(long, default_value_t = 1, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
        cpus: u32,
        #[arg(long, default_value = "1G", value_parser = size::parse, value_name = "SIZE")]
        memory: u64,
        /// Size of a disk; give it once per disk
        #[arg(long, required = true, value_parser = size::parse, value_name = "SIZE")]
        disk: Vec<u64>,
        /// Encrypt what is stored of its disks, with keys that only the nodes have
        #[arg(long)]
        encrypted: bool,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// List the VMs
    List,
    /// Show one VM
    Show { vm: String },
    /// Have it running
    Start {
        vm: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Have it stopped: its guest is asked to shut down
    Shutdown {
        vm: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Have it stopped at once, as if its plug were pulled
    Stop {
        vm: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Freeze all its disks at one point of the stream of writes, as VM@NAME; it goes on running
    Snapshot {
        vm: String,
        name: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Make a VM like the one of a snapshot, whose disks begin as copies of it, in no time and space; it is not started
    Clone {
        #[arg(value_name = "VM@NAME")]
        snapshot: String,
        name: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Delete a stopped VM and its disks
    Delete {
        vm: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// The serial console; Ctrl-] leaves
    Console { vm: String },
    /// Why its state is what it is
    Why { vm: String },
}

pub fn run(command: VmCommand, client: &Arc<Client>, output: &Output) -> Outcome {
    match command {
        VmCommand::Create { name, image, cpus, memory, disk, encrypted, wait } => {
            let done = format!("vm {name} is created; `pollux vm start {name}` starts it");
            let (memory_bytes, disk_bytes) = (memory, disk);
            let taken = client.create_vm(&CreateVm { name, cpus, memory_bytes, image, disk_bytes, encrypted });
            wait.finish(client, output, taken, &done)
        }
        VmCommand::List => output.show(&client.vms().map_err(from_client)?, |vms| table::vms(vms)),
        VmCommand::Show { vm } => output.show(&client.vm(&vm).map_err(from_client)?, table::vm),
        VmCommand::Start { vm, wait } => {
            wait.finish(client, output, client.start_vm(&vm), &format!("vm {vm} is running"))
        }
        VmCommand::Shutdown { vm, wait } => {
            wait.finish(client, output, client.shutdown_vm(&vm), &format!("vm {vm} is stopped"))
        }
        VmCommand::Stop { vm, wait } => {
            output.confirm(&format!("This ends vm {vm} at once; what its guest has not written yet is lost."))?;
            wait.finish(client, output, client.stop_vm(&vm), &format!("vm {vm} is stopped"))
        }
        VmCommand::Snapshot { vm, name, wait } => {
            wait.finish(client, output, client.snapshot_vm(&vm, &name), &format!("snapshot {vm}@{name} is taken"))
        }
        VmCommand::Clone { snapshot, name, wait } => {
            let done = format!("vm {name} is cloned from {snapshot}");
            wait.finish(client, output, client.clone_vm(&snapshot, &name), &done)
        }
        VmCommand::Delete { vm, wait } => {
            output.confirm(&format!("This deletes vm {vm} and its disks for good."))?;
            wait.finish(client, output, client.delete_vm(&vm), &format!("vm {vm} is deleted"))
        }
        VmCommand::Console { vm } => console::run(client, &vm),
        VmCommand::Why { vm } => output.show(&client.why_vm(&vm).map_err(from_client)?, |events| table::events(events)),
    }
}
