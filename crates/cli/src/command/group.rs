//! `pollux group`.

use super::wait::WaitArgs;
use crate::context::from_client;
use crate::failure::{Failure, Outcome};
use crate::output::Output;
use crate::{size, table};
use pollux_api::{AddReplica, AtBound, Client, Mode, MoveReplica, SetLag, SetMode};
use std::io::{BufRead, IsTerminal};

/// When a replica counts as having a write
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ModeWord {
    /// When it is on its disk (C, the default)
    #[value(alias = "C")]
    Sync,
    /// When it is in its memory (B); a flush still waits for its disk
    #[value(alias = "B")]
    Memory,
    /// Never: it trails, by a bounded lag (A)
    #[value(alias = "A")]
    Async,
}

impl From<ModeWord> for Mode {
    fn from(word: ModeWord) -> Mode {
        match word {
            ModeWord::Sync => Mode::Sync,
            ModeWord::Memory => Mode::Memory,
            ModeWord::Async => Mode::Async,
        }
    }
}

/// What happens when a trailing replica is as far behind as it may be
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum BoundWord {
    /// Writers wait
    Slow,
    /// The replica is given up and brought up to date later
    Drop,
}

#[derive(Clone, Debug, clap::Subcommand)]
pub enum GroupCommand {
    /// List the groups
    List,
    /// Show one group: who has it, in which mode, how far behind
    Show {
        /// Name of its VM, volume or image, or its id
        group: String,
    },
    /// Freeze its volumes at one point of the stream of writes, as OWNER@NAME
    Snapshot {
        group: String,
        name: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Choose when replicas count as having a write
    Mode {
        group: String,
        #[arg(value_enum)]
        mode: ModeWord,
        /// Only the replica on this node; needed for `async`. Else all that are not async
        #[arg(long)]
        node: Option<String>,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Choose how far a trailing replica may be behind
    Lag {
        group: String,
        #[arg(long, value_parser = size::parse, value_name = "SIZE", default_value = "64M")]
        size: u64,
        #[arg(long, default_value_t = 30)]
        seconds: u64,
        /// What happens then
        #[arg(long, value_enum, default_value_t = BoundWord::Slow)]
        at_bound: BoundWord,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Have one more node carry a replica
    AddReplica {
        group: String,
        node: String,
        #[arg(long, value_enum, default_value_t = ModeWord::Sync)]
        mode: ModeWord,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Remove a replica; its space is free
    RemoveReplica {
        group: String,
        node: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Move a replica to another node: it is copied there first, under load
    Move {
        group: String,
        #[arg(required_unless_present = "cancel")]
        from: Option<String>,
        #[arg(required_unless_present = "cancel")]
        to: Option<String>,
        /// Leave both replicas where they are
        #[arg(long, conflicts_with_all = ["from", "to"])]
        cancel: bool,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Make the replica of the asked node the truth although it trails or lost a disk: the last resort, when every other in sync is lost
    Promote {
        group: String,
        /// The token that names what is lost; shown and asked for if not given
        #[arg(long)]
        token: Option<String>,
        #[command(flatten)]
        wait: WaitArgs,
    },
}

pub fn run(command: GroupCommand, client: &Client, output: &Output) -> Outcome {
    match command {
        GroupCommand::List => output.show(&client.groups().map_err(from_client)?, |groups| table::groups(groups)),
        GroupCommand::Show { group } => output.show(&client.group(&group).map_err(from_client)?, table::group),
        GroupCommand::Snapshot { group, name, wait } => {
            wait.finish(client, output, client.snapshot_group(&group, &name), &format!("snapshot {name} is taken"))
        }
        GroupCommand::Mode { group, mode: ModeWord::Async, node: None, .. } => {
            Err(Failure::usage("which replica is to trail?")
                .hint(format!("give its node, such as `pollux group mode {group} async --node NAME`")))
        }
        GroupCommand::Mode { group, mode, node, wait } => {
            let taken = client.set_mode(&group, &SetMode { mode: mode.into(), node });
            wait.finish(client, output, taken, &format!("group {group} is {}", Mode::from(mode)))
        }
        GroupCommand::Lag { group, size, seconds, at_bound, wait } => {
            let at_bound = match at_bound {
                BoundWord::Slow => AtBound::Slow,
                BoundWord::Drop => AtBound::Drop,
            };
            let taken = client.set_lag(&group, &SetLag { bytes: size, seconds, at_bound });
            wait.finish(client, output, taken, &format!("the lag of group {group} is bounded"))
        }
        GroupCommand::AddReplica { group, node, mode, wait } => {
            let taken = client.add_replica(&group, &AddReplica { node: node.clone(), mode: mode.into() });
            wait.finish(client, output, taken, &format!("{node} carries a replica of group {group}"))
        }
        GroupCommand::RemoveReplica { group, node, wait } => {
            output.confirm(&format!("This erases the replica of group {group} on {node}."))?;
            let taken = client.remove_replica(&group, &node);
            wait.finish(client, output, taken, &format!("{node} carries no replica of group {group} any more"))
        }
        GroupCommand::Move { group, from: Some(from), to: Some(to), wait, .. } => {
            let taken = client.move_replica(&group, &MoveReplica { from, to: to.clone() });
            wait.finish(client, output, taken, &format!("the replica of group {group} is on {to}"))
        }
        GroupCommand::Move { group, wait, .. } => {
            let done = format!("the move of group {group} is cancelled; both replicas stay");
            wait.finish(client, output, client.cancel_move(&group), &done)
        }
        GroupCommand::Promote { group, token, wait } => {
            let token = match token {
                Some(token) => token,
                None => typed_token(client, &group)?,
            };
            let taken = client.promote(&group, &token);
            wait.finish(client, output, taken, &format!("group {group} goes on with its trailing replica"))
        }
    }
}

/// `--yes` does not help here: the token must be typed, because it names what is lost.
fn typed_token(client: &Client, group: &str) -> Outcome<String> {
    let promote = client.promote_token(group).map_err(from_client)?;
    if !std::io::stdin().is_terminal() {
        return Err(Failure::usage(format!("{} This was not confirmed.", promote.text))
            .hint(format!("if that is to be, give --token {}", promote.token)));
    }
    eprintln!("{}", promote.text);
    eprint!("If that is to be, type `{}`: ", promote.token);
    let mut typed = String::new();
    let _ = std::io::stdin().lock().read_line(&mut typed);
    match typed.trim() {
        typed if typed == promote.token => Ok(promote.token),
        _ => Err(Failure::usage("the token was not typed, nothing was done")),
    }
}
