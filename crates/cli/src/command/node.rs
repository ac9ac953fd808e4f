//! `pollux node`.

use super::wait::WaitArgs;
use crate::context::from_client;
use crate::failure::{Failure, Outcome};
use crate::output::Output;
use crate::table;
use pollux_api::Client;
use std::io::{BufRead, IsTerminal};

#[derive(Clone, Debug, clap::Subcommand)]
pub enum NodeCommand {
    /// List the nodes
    List,
    /// Show one node
    Show { node: String },
    /// Confirm that a node is down and can not act: the last resort, when neither witness nor power switch can prove it
    ConfirmDown {
        node: String,
        /// The token that names what may be lost; shown and asked for if not given
        #[arg(long)]
        token: Option<String>,
        #[command(flatten)]
        wait: WaitArgs,
    },
}

pub fn run(command: NodeCommand, client: &Client, output: &Output) -> Outcome {
    match command {
        NodeCommand::List => output.show(&client.nodes().map_err(from_client)?, |nodes| table::nodes(nodes)),
        NodeCommand::Show { node } => output.show(&client.node(&node).map_err(from_client)?, table::node),
        NodeCommand::ConfirmDown { node, token, wait } => {
            let token = match token {
                Some(token) => token,
                None => typed_token(client, &node)?,
            };
            let taken = client.confirm_down(&node, &token);
            wait.finish(client, output, taken, &format!("node {node} is confirmed down"))
        }
    }
}

/// `--yes` does not help here: the token must be typed, because it names what may be lost.
fn typed_token(client: &Client, node: &str) -> Outcome<String> {
    let confirm = client.confirm_token(node).map_err(from_client)?;
    if !std::io::stdin().is_terminal() {
        return Err(Failure::usage(format!("{} This was not confirmed.", confirm.text))
            .hint(format!("make sure that the node is off, then give --token {}", confirm.token)));
    }
    eprintln!("{}", confirm.text);
    eprint!("If the node is certainly off, type `{}`: ", confirm.token);
    let mut typed = String::new();
    let _ = std::io::stdin().lock().read_line(&mut typed);
    match typed.trim() {
        typed if typed == confirm.token => Ok(confirm.token),
        _ => Err(Failure::usage("the token was not typed, nothing was done")),
    }
}
