//! pollux, the operator's command, and its lab.
