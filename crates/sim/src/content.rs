//! The bytes that simulated guests write: each sector names its write and its place, so that whatever a read returns
//! tells where it comes from.

use crate::history::{SECTORS, Value};
use pollux_base::data::Buffer;
use pollux_base::unit::BLOCK_BYTES;
use pollux_base::{Data, VolumeId};

pub const SECTOR_BYTES: usize = BLOCK_BYTES as usize / SECTORS;
const MAGIC: u64 = 0x4153_4947_454d_494e;

/// `count` blocks from `start`, as the write leaves them.
pub fn bytes_of(write: u64, volume: VolumeId, start: u64, count: u64) -> Data {
    let mut buffer = Buffer::zeroed((count * BLOCK_BYTES) as usize);
    for (index, sector) in buffer.as_mut_slice().chunks_exact_mut(SECTOR_BYTES).enumerate() {
        let words = head(write, volume, start + (index / SECTORS) as u64, index % SECTORS);
        for (at, word) in words.into_iter().enumerate() {
            sector[at * 8..at * 8 + 8].copy_from_slice(&word.to_le_bytes());
        }
        sector[SECTOR_BYTES - 8..].copy_from_slice(&write.to_le_bytes());
    }
    buffer.freeze()
}

fn head(write: u64, volume: VolumeId, block: u64, sector: usize) -> [u64; 4] {
    [MAGIC, write, volume.0 << 48 | block, sector as u64]
}

/// What these bytes of a block mean, if they were read from this place.
pub fn value_of(volume: VolumeId, block: u64, bytes: &[u8]) -> Value {
    let mut value = Value::ZERO;
    for (index, sector) in bytes.chunks_exact(SECTOR_BYTES).enumerate() {
        let word = |at: usize| u64::from_le_bytes(sector[at..at + 8].try_into().expect("eight bytes"));
        let write = word(8);
        value.0[index] = if [word(0), word(8), word(16), word(24)] == head(write, volume, block, index)
            && word(SECTOR_BYTES - 8) == write
        {
            write
        } else if sector.iter().all(|byte| *byte == 0) {
            0
        } else {
            Value::GARBAGE
        };
    }
    value
}

/// Where a sector belongs, if it is as a guest wrote it.
pub fn place_of(sector: &[u8]) -> Option<(VolumeId, u64)> {
    if !sector.starts_with(&MAGIC.to_le_bytes()) {
        return None;
    }
    let place = u64::from_le_bytes(sector[16..24].try_into().expect("eight bytes"));
    Some((VolumeId(place >> 48), place & ((1 << 48) - 1)))
}

/// Whether a page of a disk holds what a guest wrote somewhere; or, where volumes are encrypted, looks like it: of cipher text
/// one byte in 256 is zero, of what the store keeps for itself more.
pub fn is_guests(page: &[u8], may_be_encrypted: bool) -> bool {
    let zeros = || page.iter().filter(|byte| **byte == 0).count();
    page.starts_with(&MAGIC.to_le_bytes()) || may_be_encrypted && zeros() < 50
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_tell_their_write_and_only_at_their_place() {
        let data = bytes_of(7, VolumeId(3), 10, 2);
        let second = &data.as_slice()[4096..];
        assert_eq!(value_of(VolumeId(3), 11, second), Value::of(7));
        assert_eq!(value_of(VolumeId(3), 10, second), Value::of(Value::GARBAGE));
        assert_eq!(place_of(&second[512..1024]), Some((VolumeId(3), 11)));
        assert_eq!(place_of(&[0; SECTOR_BYTES]), None);
        let mut torn = second.to_vec();
        torn[512..1024].copy_from_slice(&bytes_of(6, VolumeId(3), 11, 1).as_slice()[512..1024]);
        assert_eq!(value_of(VolumeId(3), 11, &torn).0[..3], [7, 6, 7]);
    }
}
