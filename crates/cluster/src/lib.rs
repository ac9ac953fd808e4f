//! CORE: what the cluster wants, who may decide, and what is done about failures.
//!
//! One `Cluster` runs in each `noded`. It applies the committed log (`state`), watches peers, asks the witness, has dead
//! nodes fenced, gives orders to the data plane and to the VM shell, and proposes entries. It never acts on a proposal,
//! only on what is committed. Sections 3, 5 and 8 of `docs/ARCHITECTURE.md`.

pub mod entry;
pub mod seam;
pub mod state;

pub use entry::Entry;
pub use seam::{Input, Output};
pub use state::State;
