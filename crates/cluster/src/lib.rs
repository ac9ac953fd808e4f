//! CORE: what the cluster wants, who may decide, and what is done about failures.
//!
//! One `Cluster` runs in each `noded`. It applies the committed log (`state`), watches peers, asks the witness, has dead
//! nodes fenced, gives orders to the data plane and to the VM shell, and proposes entries. It never acts on a proposal,
//! only on what is committed. Sections 3, 5 and 8 of `docs/ARCHITECTURE.md`.

mod apply;
mod authority;
mod core;
mod disks;
pub mod entry;
mod fencing;
mod groups;
pub mod headline;
mod kept;
mod keys;
pub mod master_key;
mod moves;
mod peers;
pub mod replicas;
pub mod requests;
pub mod scrubs;
pub mod seam;
pub mod snapshots;
pub mod state;
mod status;
pub mod vm_life;
mod vms;
mod witness;

pub use self::core::Cluster;
pub use entry::{Change, Entry};
pub use headline::{Headline, Protection, Sight};
pub use kept::KeptCommand;
pub use seam::{
    Answer, EpochRecord, Input, Output, PeerHello, Refusal, Register, Setup, VmCommand, VmEvent, WitnessAnswer,
};
pub use state::State;

use pollux_base::NodeId;
use serde::{Deserialize, Serialize};

/// Something that is wrong now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alert {
    pub subject: entry::Subject,
    /// The node that sees it.
    pub by: NodeId,
    pub text: String,
    pub fix: Option<String>,
}
