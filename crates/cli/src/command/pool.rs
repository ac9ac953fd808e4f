//! `pollux pool`.

use crate::context::from_client;
use crate::failure::Outcome;
use crate::output::Output;
use crate::table;
use pollux_api::Client;

#[derive(Clone, Debug, clap::Subcommand)]
pub enum PoolCommand {
    /// List the pools: what is free, what is promised, and when they are full at the present rate
    List,
    /// Show the pool of one node
    Show { node: String },
}

pub fn run(command: PoolCommand, client: &Client, output: &Output) -> Outcome {
    match command {
        PoolCommand::List => output.show(&client.pools().map_err(from_client)?, |pools| table::pools(pools)),
        PoolCommand::Show { node } => output.show(&client.pool(&node).map_err(from_client)?, table::pool),
    }
}
