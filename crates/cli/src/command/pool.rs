//! `pollux pool`.

use super::pool_look::{self, RescueArgs, VerifyArgs};
use super::wait::WaitArgs;
use crate::context::from_client;
use crate::failure::{Failure, Outcome};
use crate::output::Output;
use crate::table;
use pollux_api::{AddDisk, Client};

#[derive(Clone, Debug, clap::Subcommand)]
pub enum PoolCommand {
    /// List the pools: what is free, what is promised, and when they are full at the present rate
    List,
    /// Show the pool of one node, and its disks
    Show { node: String },
    /// Give one more disk to a node's pool, while it is used
    AddDisk {
        node: String,
        /// A block device or a plain file on that node; best a name that stays, such as below /dev/disk/by-id
        path: String,
        /// Also if the disk is not blank: what is on it is lost
        #[arg(long)]
        overwrite: bool,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Move what is on a disk to the others, while they are used
    DrainDisk {
        node: String,
        /// Its path, its id, or the first digits of it
        disk: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Use a disk again that was to be drained
    UndrainDisk {
        node: String,
        /// Its path, its id, or the first digits of it
        disk: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Take a drained disk out of the pool, or forget one that failed
    RemoveDisk {
        node: String,
        /// Its path, its id, or the first digits of it
        disk: String,
        /// Give up a disk that is missing: what was on it comes from the other replicas
        #[arg(long)]
        lost: bool,
        /// With --lost: also if no other replica has what was on it
        #[arg(long, requires = "lost")]
        accept_loss: bool,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Check the disks of a pool on this machine that is not in use, or with --node the pool that a node uses; nothing is written to
    /// them. Ends with 0 if they are clean, 1 if something was found, 2 if they could not be looked at
    Verify(VerifyArgs),
    /// List what is in a pool on this machine that is not in use, from its disks alone, or write a volume's content to a file
    Rescue(RescueArgs),
}

pub fn run(command: PoolCommand, client: &Client, output: &Output) -> Outcome {
    match command {
        PoolCommand::Verify(arguments) => match &arguments.node {
            Some(node) => pool_look::verify_node(&arguments, node, client, output),
            None => pool_look::verify(&arguments, output),
        },
        PoolCommand::Rescue(arguments) => pool_look::rescue(&arguments, output),
        PoolCommand::List => output.show(&client.pools().map_err(from_client)?, |pools| table::pools(pools)),
        PoolCommand::Show { node } => output.show(&client.pool(&node).map_err(from_client)?, table::pool),
        PoolCommand::AddDisk { node, path, overwrite, wait } => {
            if !path.starts_with('/') {
                return Err(Failure::usage(format!("`{path}` is not an absolute path"))
                    .hint("give where the disk is on the node, such as /dev/disk/by-id/NAME"));
            }
            if overwrite {
                output.confirm(&format!("This erases what is on {path} of node {node}."))?;
            }
            let taken = client.add_disk(&node, &AddDisk { path: path.clone(), overwrite });
            wait.finish(client, output, taken, &format!("{path} is a disk of the pool on {node}"))
        }
        PoolCommand::DrainDisk { node, disk, wait } => {
            wait.finish_with_detail(client, output, client.drain_disk(&node, &disk), &format!("disk {disk} of {node}"))
        }
        PoolCommand::UndrainDisk { node, disk, wait } => {
            let done = format!("disk {disk} of {node} is used again");
            wait.finish(client, output, client.undrain_disk(&node, &disk), &done)
        }
        PoolCommand::RemoveDisk { node, disk, lost, accept_loss, wait } => {
            let taken = match lost {
                false => client.remove_disk(&node, &disk),
                true => {
                    let loss = match accept_loss {
                        true => "what no other replica has is lost",
                        false => "what was on it is copied from the other replicas",
                    };
                    output.confirm(&format!(
                        "This gives up the missing disk {disk} of node {node} for good: {loss}, and it is not taken back should it \
                         turn up again."
                    ))?;
                    client.let_go_disk(&node, &disk, accept_loss)
                }
            };
            wait.finish(client, output, taken, &format!("disk {disk} is no part of the pool on {node} any more"))
        }
    }
}
