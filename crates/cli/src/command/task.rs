//! `pollux task`.

use crate::context::from_client;
use crate::failure::Outcome;
use crate::output::Output;
use crate::table;
use pollux_api::Client;

#[derive(Clone, Debug, clap::Subcommand)]
pub enum TaskCommand {
    /// List the requests that the answering node has taken
    List,
    /// Show one
    Show { task: String },
}

pub fn run(command: TaskCommand, client: &Client, output: &Output) -> Outcome {
    match command {
        TaskCommand::List => output.show(&client.tasks().map_err(from_client)?, |tasks| table::tasks(tasks)),
        TaskCommand::Show { task } => output.show(&client.task(&task).map_err(from_client)?, table::task),
    }
}
