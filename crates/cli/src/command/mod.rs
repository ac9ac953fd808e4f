//! One file per noun. Each verb asks the API and shows the answer; none decides anything.

pub mod console;
pub mod event;
pub mod group;
pub mod image;
pub mod kept;
pub mod master_key;
pub mod node;
pub mod pool;
pub mod pool_look;
pub mod raw;
pub mod snapshot;
pub mod status;
pub mod task;
pub mod vm;
pub mod volume;
pub mod wait;
pub mod witness;
