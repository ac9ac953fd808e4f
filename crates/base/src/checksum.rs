//! The checksum of a block: CRC-64/NVME over its 4 KiB, computed once by whoever first owns the bytes, then kept by the
//! store and carried on the wire (W11).

use serde::{Deserialize, Serialize};
use std::fmt;

/// Checksum of one block. `ZERO` stands for a block that was never written or was given back, which reads as zeros; no
/// written block has it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BlockChecksum(pub u64);

impl BlockChecksum {
    /// The block is not stored: it reads as zeros.
    pub const ZERO: BlockChecksum = BlockChecksum(0);

    /// Checksum of the bytes of a written block. The values in 2^64 that stand for something else (`ZERO`, and three of the
    /// store's own) are moved.
    pub fn of(block: &[u8]) -> BlockChecksum {
        debug_assert_eq!(block.len() as u64, crate::unit::BLOCK_BYTES);
        match crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, block) {
            0 => BlockChecksum(1),
            value => BlockChecksum(value.min(u64::MAX - 3)),
        }
    }

    /// Checksums of consecutive blocks.
    pub fn of_all(blocks: &[u8]) -> Vec<BlockChecksum> {
        blocks.chunks_exact(crate::unit::BLOCK_BYTES as usize).map(BlockChecksum::of).collect()
    }

    /// Whether the block is not stored.
    pub fn is_zero(self) -> bool {
        self == BlockChecksum::ZERO
    }
}

impl fmt::Debug for BlockChecksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// CRC-32C of metadata and message headers.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values_stay_as_they_are_on_disk_and_wire() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, b"123456789"), 0xae8b_1486_0a79_9888);
    }

    #[test]
    fn a_written_block_of_zeros_is_told_from_an_unwritten_one() {
        assert!(!BlockChecksum::of(&[0; 4096]).is_zero());
    }
}
