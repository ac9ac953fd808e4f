//! `pollux witness`.

use crate::context::from_client;
use crate::failure::{Code, Failure, Outcome};
use crate::output::Output;
use crate::table;
use pollux_api::Client;

#[derive(Clone, Debug, clap::Subcommand)]
pub enum WitnessCommand {
    /// Whether it is reached, and what its register holds
    Status,
    /// The same as an exit code: 0 if it is reached, 6 if it is not
    Test,
}

pub fn run(command: WitnessCommand, client: &Client, output: &Output) -> Outcome {
    match command {
        WitnessCommand::Status => {
            let witness = client.witness().map_err(from_client)?;
            output.show(&witness, |witness| table::witness(witness.as_ref()))
        }
        WitnessCommand::Test => {
            let witness = client.witness().map_err(from_client)?;
            output.show(&witness, |witness| table::witness(witness.as_ref()))?;
            let Some(witness) = witness else {
                return Err(Failure::new(Code::NotFound, "this cluster has no witness"));
            };
            if witness.reachable == Some(true) {
                return Ok(());
            }
            let why = witness.error.unwrap_or_else(|| "it was not asked yet".into());
            let failure = Failure::new(Code::TimedOut, format!("the witness is not reached: {why}"));
            Err(match witness.hint {
                Some(hint) => failure.hint(hint),
                None => failure,
            })
        }
    }
}
