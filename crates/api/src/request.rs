//! What can be asked for. Unknown fields are refused, so that a misspelt one is not ignored.

use crate::resource::{AtBound, Mode};
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
    /// What is stored of its disks is encrypted, each with a key of its own.
    #[serde(default)]
    pub encrypted: bool,
}

/// A volume to create, outside any VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVolume {
    pub name: String,
    pub size_bytes: u64,
    /// What is stored of it is encrypted with a new key, for as long as it exists.
    #[serde(default)]
    pub encrypted: bool,
}

/// What is made of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CloneSnapshot {
    /// Of the new VM or volume.
    pub name: String,
}

/// A volume's new size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResizeVolume {
    /// Not below the present one; a multiple of 4096.
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

/// A scrub of the volume's group, or how often it is scrubbed by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ScrubVolume {
    /// Not given: a scrub is made now. 0: never by itself.
    #[serde(default)]
    pub every_days: Option<u32>,
}

/// The mode of a replica, or of all of a group that are not async.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetMode {
    pub mode: Mode,
    /// The node whose replica is meant.
    #[serde(default)]
    pub node: Option<String>,
}

/// How far trailing replicas may be behind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetLag {
    pub bytes: u64,
    pub seconds: u64,
    pub at_bound: AtBound,
}

/// One more replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AddReplica {
    pub node: String,
    pub mode: Mode,
}

/// A replica that is to be on another node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MoveReplica {
    pub from: String,
    pub to: String,
}

/// A disk that is to join a node's pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AddDisk {
    /// A raw block device or a plain file on that node; best one that stays the same, such as below `/dev/disk/by-id`.
    pub path: String,
    /// What is on it may be lost. A disk of any pool is refused all the same.
    #[serde(default)]
    pub overwrite: bool,
}

/// A missing disk that is given up with what was on it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LetGoDisk {
    /// Also if no other replica in sync has what was on it.
    #[serde(default)]
    pub accept_loss: bool,
}

/// A human's word that a trailing replica is the truth from now on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Promote {
    /// As shown by `promote-token`.
    pub token: String,
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
