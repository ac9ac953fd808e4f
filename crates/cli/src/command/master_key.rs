//! `pollux master-key`.

use super::wait::WaitArgs;
use crate::context::from_client;
use crate::failure::Outcome;
use crate::output::Output;
use crate::table;
use pollux_api::Client;

#[derive(Clone, Debug, clap::Subcommand)]
pub enum MasterKeyCommand {
    /// Show which nodes have which master key, by name, which volumes' keys are sealed under which, and what to do next
    Show,
    /// Seal the keys of all volumes anew under the new master key that every node has beside the present one
    Rotate {
        #[command(flatten)]
        wait: WaitArgs,
    },
}

pub fn run(command: MasterKeyCommand, client: &Client, output: &Output) -> Outcome {
    match command {
        MasterKeyCommand::Show => output.show(&client.master_keys().map_err(from_client)?, table::master_keys),
        MasterKeyCommand::Rotate { wait } => {
            wait.finish_with_detail(client, output, client.rotate_master_key(), "the master key is exchanged")
        }
    }
}
