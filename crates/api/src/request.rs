//! What can be asked for. Unknown fields are refused, so that a misspelt one is not ignored.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A VM to create. It is not started by this.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVm {
    pub name: String,
    pub cpus: u32,
    pub memory_bytes: u64,
    /// Name or id of the image its first disk is filled from.
    #[serde(default)]
    pub image: Option<String>,
    /// At least one disk; the first is at least as large as the image.
    pub disk_bytes: Vec<u64>,
}

/// A volume to create, outside any VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVolume {
    pub name: String,
    pub size_bytes: u64,
}

/// A snapshot to take.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    /// Unique among the snapshots of its VM or volume.
    pub name: String,
}

/// Whether a volume is offered to other machines over NBD.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExportVolume {
    pub exported: bool,
}

/// A human's word that a node is down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ConfirmDown {
    /// As shown by `confirm-token`.
    pub token: String,
}

/// A changing request was taken (committed); the task tells when its state is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Accepted {
    pub task: String,
    /// The id of what was created.
    pub id: Option<u64>,
}
