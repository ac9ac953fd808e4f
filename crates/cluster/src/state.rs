//! The state that the log makes.

/// Everything the cluster log says, applied.
#[derive(Clone, Debug)]
pub struct State {}
