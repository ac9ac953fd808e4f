//! `pollux kept`.

use super::volume::certificates_hint;
use super::wait::WaitArgs;
use crate::context::from_client;
use crate::failure::{Failure, Outcome};
use crate::output::Output;
use crate::table;
use pollux_api::Client;
use std::path::Path;
use std::time::Duration;

/// An order to one data plane: quick, or something is wrong.
const EXPORT_WAIT: Duration = Duration::from_secs(60);

#[derive(Clone, Debug, clap::Subcommand)]
pub enum KeptCommand {
    /// List what nodes keep of replicas that are or were overwritten: the last state before a resync, and evidence of what a human gave up
    List {
        /// Only of this node
        #[arg(long)]
        node: Option<String>,
    },
    /// Show one of them
    Show {
        node: String,
        /// As it is listed, such as v7-evidence-1
        kept: String,
    },
    /// Offer it to be read by other machines and print where; until the node's noded is restarted
    Export {
        node: String,
        /// As it is listed, such as v7-evidence-1
        kept: String,
        /// Over NBD
        #[arg(long, required_unless_present = "off")]
        nbd: bool,
        /// No longer
        #[arg(long, conflicts_with = "nbd")]
        off: bool,
    },
    /// Delete it for good; its space is free
    Delete {
        node: String,
        /// As it is listed, such as v7-evidence-1
        kept: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
}

/// `ca`: the file with the cluster's certificate authority.
pub fn run(command: KeptCommand, client: &Client, ca: &Path, output: &Output) -> Outcome {
    match command {
        KeptCommand::List { node } => {
            let mut kept = client.kept().map_err(from_client)?;
            if let Some(node) = node {
                // A name that nobody has is no empty list.
                let name = client.node(&node).map_err(from_client)?.name;
                kept.retain(|kept| kept.node == name);
            }
            output.show(&kept, |kept| table::kept_list(kept))
        }
        KeptCommand::Show { node, kept } => {
            output.show(&client.kept_one(&node, &kept).map_err(from_client)?, table::kept)
        }
        KeptCommand::Export { node, kept, nbd, off: _ } => export(client, output, ca, &node, &kept, nbd),
        KeptCommand::Delete { node, kept, wait } => {
            output.confirm(&format!("This deletes {kept}, which {node} keeps, for good; no other server has it."))?;
            wait.finish(client, output, client.delete_kept(&node, &kept), &format!("{kept} of {node} is deleted"))
        }
    }
}

fn export(client: &Client, output: &Output, ca: &Path, node: &str, kept: &str, exported: bool) -> Outcome {
    let taken = client.export_kept(node, kept, exported).map_err(from_client)?;
    client.wait_task(&taken.task, EXPORT_WAIT, |_| {}).map_err(from_client)?;
    if !exported {
        return output.say(&format!("{kept} of {node} is no longer exported"));
    }
    let mut uris = client.kept_one(node, kept).map_err(from_client)?.uris;
    if uris.is_empty() {
        return Err(Failure::other(format!("{kept} of {node} is not offered any more"))
            .hint(format!("look again with `pollux kept show {node} {kept}`")));
    }
    if uris.iter().any(|uri| uri.starts_with("nbds://")) {
        output.progress(&certificates_hint(ca, crate::lab::client_certificates(&uris).as_deref()));
    }
    uris.extend(crate::lab::local_uris(&uris));
    output.show(&uris, |uris| uris.join("\n"))
}
