//! `pollux status`: the headline first.

use crate::context::from_client;
use crate::failure::Outcome;
use crate::output::Output;
use crate::table;
use pollux_api::Client;

pub fn run(client: &Client, output: &Output) -> Outcome {
    let status = client.status().map_err(from_client)?;
    output.show(&status, table::status)
}
