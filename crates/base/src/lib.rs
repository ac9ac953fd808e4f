//! The words of Pollux as types.
//!
//! Everything here is plain data: no clock, no thread, no file, no socket. Each module is one family of words of
//! `docs/GLOSSARY.md`. Every other crate depends on this one; this one depends on nothing of ours.

pub mod block;
pub mod checksum;
pub mod config;
pub mod data;
pub mod disk;
#[doc(hidden)]
pub mod fuzz;
pub mod guard;
pub mod id;
pub mod kept;
pub mod order;
pub mod pool;
pub mod record;
pub mod secret;
pub mod time;
pub mod timing;
pub mod unit;

pub use block::{BlockError, Op, Reply, Request, RequestId};
pub use checksum::BlockChecksum;
pub use data::{Data, Segment};
pub use disk::{DiskDone, DiskError, DiskIndex, DiskOp, DiskOpId, DiskOpKind};
pub use id::{ClusterId, DiskId, GroupId, ImageId, KeyId, NodeId, PoolId, Session, SnapshotId, VmId, VolumeId};
pub use kept::Kept;
pub use order::{Order, Report};
pub use pool::{PoolLevel, PoolReport};
pub use record::{GroupRecord, Stamp};
pub use secret::{SealedKey, Secret, VolumeSecret};
pub use time::Instant;
pub use unit::{BlockCount, BlockIndex, ByteCount, Epoch, ExtentIndex, Generation, Incarnation};
