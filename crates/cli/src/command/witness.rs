//! `pollux witness`.

use crate::context::from_client;
use crate::failure::Outcome;
use crate::output::Output;
use crate::table;
use pollux_api::Client;

#[derive(Debug, clap::Subcommand)]
pub enum WitnessCommand {
    /// Whether it is reached, and what its register holds
    Status,
}

pub fn run(command: WitnessCommand, client: &Client, output: &Output) -> Outcome {
    match command {
        WitnessCommand::Status => {
            let witness = client.witness().map_err(from_client)?;
            output.show(&witness, |witness| table::witness(witness.as_ref()))
        }
    }
}
