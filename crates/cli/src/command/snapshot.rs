//! `pollux snapshot`.

use super::wait::WaitArgs;
use crate::context::from_client;
use crate::failure::Outcome;
use crate::output::Output;
use crate::table;
use pollux_api::Client;

#[derive(Clone, Debug, clap::Subcommand)]
pub enum SnapshotCommand {
    /// List the snapshots; `pollux vm snapshot` and `pollux volume snapshot` take one
    List,
    /// Show one snapshot
    Show {
        #[arg(value_name = "OWNER@NAME")]
        snapshot: String,
    },
    /// Show in which bytes two snapshots of one VM or volume differ
    Diff {
        #[arg(value_name = "OWNER@NAME")]
        from: String,
        #[arg(value_name = "OWNER@NAME")]
        to: String,
    },
    /// Have what it is of hold again what the snapshot holds; what was written since is lost. A VM must be stopped, a volume not
    /// exported
    Rollback {
        #[arg(value_name = "OWNER@NAME")]
        snapshot: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Delete a snapshot; what it is of, and other snapshots, stay as they are
    Delete {
        #[arg(value_name = "OWNER@NAME")]
        snapshot: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
}

pub fn run(command: SnapshotCommand, client: &Client, output: &Output) -> Outcome {
    match command {
        SnapshotCommand::List => {
            output.show(&client.snapshots().map_err(from_client)?, |snapshots| table::snapshots(snapshots))
        }
        SnapshotCommand::Show { snapshot } => {
            output.show(&client.snapshot(&snapshot).map_err(from_client)?, table::snapshot)
        }
        SnapshotCommand::Diff { from, to } => {
            output.show(&client.diff_snapshots(&from, &to).map_err(from_client)?, table::snapshot_diff)
        }
        SnapshotCommand::Rollback { snapshot, wait } => {
            let of = snapshot.split('@').next().unwrap_or_default();
            output.confirm(&format!("Everything that was written to {of} since {snapshot} is lost."))?;
            let done = format!("{of} holds again what {snapshot} holds");
            wait.finish(client, output, client.roll_back(&snapshot), &done)
        }
        SnapshotCommand::Delete { snapshot, wait } => {
            output.confirm(&format!("This deletes snapshot {snapshot} for good."))?;
            let done = format!("snapshot {snapshot} is deleted");
            wait.finish(client, output, client.delete_snapshot(&snapshot), &done)
        }
    }
}
