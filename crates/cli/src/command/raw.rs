//! `pollux api`: any request, for scripts and for what has no verb yet.

use crate::context::from_client;
use crate::failure::{Failure, Outcome};
use crate::output::Output;
use pollux_api::Client;

#[derive(Clone, Debug, clap::Args)]
pub struct ApiArgs {
    #[arg(value_enum, ignore_case = true)]
    method: Method,
    /// Such as /v1/status
    path: String,
    /// JSON to send
    #[arg(long, value_name = "JSON")]
    data: Option<String>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
#[value(rename_all = "UPPER")]
enum Method {
    Get,
    Post,
    Delete,
}

pub fn run(arguments: &ApiArgs, client: &Client, output: &Output) -> Outcome {
    if !arguments.path.starts_with('/') {
        return Err(Failure::usage("the path must begin with `/`").hint("such as /v1/status"));
    }
    let parse = |text: &String| {
        serde_json::from_str(text).map_err(|error| Failure::usage(format!("--data is no JSON: {error}")))
    };
    let body = arguments.data.as_ref().map(parse).transpose()?;
    let (method, changes) = match arguments.method {
        Method::Get => ("GET", false),
        Method::Post => ("POST", true),
        Method::Delete => ("DELETE", true),
    };
    if changes {
        output.confirm(&format!("This sends {method} {}.", arguments.path))?;
    }
    output.json(&client.send_raw(method, &arguments.path, body.as_ref()).map_err(from_client)?)
}
