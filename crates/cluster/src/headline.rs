//! The first line of everything: "If a node dies now, what happens?"

use crate::State;
use pollux_base::NodeId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protection {
    Unprotected,
    Degraded,
    Protected,
}

/// The answer, why, and the command that mends it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Headline {
    pub protection: Protection,
    /// One line, beginning with the protection.
    pub text: String,
    pub fix: Option<String>,
}

/// What this node sees beside the log; for `headline` and the API.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sight {
    /// The log has a leader and this node follows it.
    pub log_works: bool,
    /// `None`: not asked yet. `Err`: since when (wall clock) and why it is not reached.
    pub witness: Option<Result<(), (u64, String)>>,
    /// Peers that are heard both ways by the guard.
    pub peers_heard: BTreeMap<NodeId, bool>,
    pub guard: bool,
    pub data_plane: bool,
    /// This node is outdated or not a member: the reason for people.
    pub isolated: Option<String>,
}

/// Answers the question. Pure.
pub fn headline(state: &State, sight: &Sight) -> Headline {
    let _ = (state, sight);
    Headline { protection: Protection::Unprotected, text: "unprotected: not known yet".into(), fix: None }
}
