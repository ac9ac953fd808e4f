//! `pollux event`.

use crate::context::from_client;
use crate::failure::Outcome;
use crate::output::{Output, print};
use crate::table;
use pollux_api::Client;
use std::time::Duration;

/// How often `--watch` asks: soon enough for eyes, rare enough for the node.
const WATCH_ASK: Duration = Duration::from_millis(500);

#[derive(Clone, Debug, clap::Subcommand)]
pub enum EventCommand {
    /// List what happened, oldest first
    List {
        /// Only events after this index
        #[arg(long, default_value_t = 0, value_name = "INDEX")]
        since: u64,
        /// At most so many, the newest
        #[arg(long, default_value_t = 100, value_name = "COUNT")]
        limit: u32,
    },
}

/// `watch`: goes on with each new event.
pub fn run(command: EventCommand, watch: bool, client: &Client, output: &Output) -> Outcome {
    let EventCommand::List { since, limit } = command;
    let events = client.events(since, limit).map_err(from_client)?;
    if !watch {
        return output.show(&events, |events| table::events(events));
    }
    let mut last = since;
    let mut news = events;
    loop {
        for event in &news {
            last = last.max(event.index);
            // One line each, so that a reader sees it at once.
            match output.is_json() {
                true => print(&serde_json::json!(event).to_string())?,
                false => print(&table::event(event))?,
            }
        }
        std::thread::sleep(WATCH_ASK);
        news = match client.events(last, limit) {
            Ok(news) => news,
            Err(error) => {
                // Nodes come and go; whoever watches wants to see them come back.
                output.progress(&format!("({error})"));
                Vec::new()
            }
        };
    }
}
