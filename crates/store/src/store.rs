//! The store of one node. (Signatures first, so that its users can be built; the bodies follow.)

use crate::{FormatError, Input, Output, PoolIdentity};
use pollux_base::unit::BlockRange;
use pollux_base::{ByteCount, ClusterId, DiskOp, ExtentIndex, Generation, GroupId, Instant, NodeId, VolumeId};

/// The pool of one node.
pub struct Store {
    _private: (),
}

impl Store {
    /// The operations that make an empty pool of `size` bytes, in order; each must be done before the next.
    pub fn format(_identity: PoolIdentity, _size: ByteCount) -> Result<Vec<DiskOp>, FormatError> {
        panic!("not built yet")
    }
    /// Begins opening a pool of `size` bytes: reads go out through `poll`, `Opened` comes when done. `cluster` and
    /// `node` are what the superblock must name.
    pub fn open(_cluster: ClusterId, _node: NodeId, _size: ByteCount) -> Store {
        panic!("not built yet")
    }
    pub fn handle(&mut self, _now: Instant, _input: Input) {
        panic!("not built yet")
    }
    pub fn poll(&mut self) -> Option<Output> {
        panic!("not built yet")
    }
    pub fn deadline(&self) -> Option<Instant> {
        panic!("not built yet")
    }
    /// Notes of the caller, by group.
    pub fn notes(&self) -> impl Iterator<Item = (GroupId, &[u8])> {
        std::iter::empty()
    }
    pub fn volumes(&self) -> impl Iterator<Item = (VolumeId, GroupId, ByteCount)> {
        std::iter::empty()
    }
    /// Whether a write may go to the extent now: it is hot, durably, under at least `generation`.
    pub fn is_hot(&self, _volume: VolumeId, _extent: ExtentIndex, _generation: Generation) -> bool {
        panic!("not built yet")
    }
    /// Hot extents. Right after opening: those that were hot when the process or the power died.
    pub fn hot(&self, _volume: VolumeId) -> Vec<ExtentIndex> {
        panic!("not built yet")
    }
    /// Extents last changed under a generation above `generation` (hot ones included).
    pub fn changed_since(&self, _volume: VolumeId, _generation: Generation) -> Vec<ExtentIndex> {
        panic!("not built yet")
    }
    /// Extents that hold or held data.
    pub fn allocated(&self, _volume: VolumeId) -> Vec<ExtentIndex> {
        panic!("not built yet")
    }
    /// The range as adjoining runs: the run, and whether it may hold data (`false`: reads as zeros).
    pub fn status(&self, _volume: VolumeId, _range: BlockRange) -> Vec<(BlockRange, bool)> {
        panic!("not built yet")
    }
    pub fn used(&self, _group: GroupId) -> ByteCount {
        panic!("not built yet")
    }
    pub fn free(&self) -> ByteCount {
        panic!("not built yet")
    }
    /// Asserts the invariants; called by tests and debug builds after every step.
    pub fn check(&self) {
        panic!("not built yet")
    }
}
