//! Waiting for a change to be what was asked for: task id first, then each new detail, on standard error.

use crate::context::from_client;
use crate::failure::Outcome;
use crate::output::Output;
use pollux_api::{Accepted, Client, ClientError};
use serde_json::json;
use std::time::Duration;

#[derive(Clone, Debug, clap::Args)]
pub struct WaitArgs {
    /// Wait until it is done (the default)
    #[arg(long, overrides_with = "no_wait")]
    wait: bool,
    /// Only have it taken; its task can be looked at later
    #[arg(long)]
    no_wait: bool,
    /// Longest time to wait, in seconds
    #[arg(long, default_value_t = 300, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86400))]
    timeout: u64,
}

impl WaitArgs {
    /// Sees a request through to its end, and says `done` then.
    pub fn finish(
        &self,
        client: &Client,
        output: &Output,
        accepted: Result<Accepted, ClientError>,
        done: &str,
    ) -> Outcome {
        self.finish_as(client, output, accepted, |_| done.to_owned())
    }

    /// The same, and says what the task says at its end.
    pub fn finish_with_detail(
        &self,
        client: &Client,
        output: &Output,
        accepted: Result<Accepted, ClientError>,
        subject: &str,
    ) -> Outcome {
        self.finish_as(client, output, accepted, |detail| format!("{subject}: {detail}"))
    }

    fn finish_as(
        &self,
        client: &Client,
        output: &Output,
        accepted: Result<Accepted, ClientError>,
        done: impl Fn(&str) -> String,
    ) -> Outcome {
        let accepted = accepted.map_err(from_client)?;
        if self.no_wait && !self.wait {
            return output.show(&accepted, |accepted| format!("task {}", accepted.task));
        }
        output.progress(&format!("task {}", accepted.task));
        let mut last = String::new();
        let task = client.wait_task(&accepted.task, Duration::from_secs(self.timeout), |task| {
            if task.detail != last && !task.detail.is_empty() {
                output.progress(&format!("  {}", task.detail));
                last.clone_from(&task.detail);
            }
        });
        let task = task.map_err(from_client)?;
        match output.is_json() {
            true => output.json(&json!({"task": task.task, "id": task.id, "detail": task.detail})),
            false => output.say(&done(&task.detail)),
        }
    }
}
