//! Encryption at rest: what clients say and hear is plain text, what is stored, compared, checksummed and sent is not.
//! Pure. (`docs/design/0008-encryption-at-rest.md`)
//!
//! XTS-AES-256 (IEEE 1619, NIST SP 800-38E). The data unit is the block of 4 KiB, its number is that of the block in its
//! volume: so it is the same in the volume's snapshots and clones, which share what is stored, and have the same key.
//!
//! A block of which nothing is stored reads as zeros, here as everywhere: cipher text that is all zeros is not decrypted. Of
//! what clients write none becomes that, but by a chance of 2^-32768.

use aes::cipher::{BlockDecrypt, BlockEncrypt, KeyInit};
use aes::{Aes256, Block};
use pollux_base::data::Buffer;
use pollux_base::unit::BLOCK_BYTES;
use pollux_base::{BlockIndex, Data, KeyId, VolumeSecret};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A data unit.
const UNIT_BYTES: usize = BLOCK_BYTES as usize;
/// What AES takes at once.
const CELL_BYTES: usize = 16;
const CELLS: usize = UNIT_BYTES / CELL_BYTES;
/// So many cells are masked, encrypted and masked again before the next: AES takes eight in parallel, and this stays in the
/// fastest cache.
const BATCH_CELLS: usize = 32;

/// One key, ready for use. Its round keys are wiped when it is dropped.
pub struct Cipher {
    data: Aes256,
    tweak: Aes256,
}

/// A key that must not be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    #[error("this is not the key of that name")]
    OtherKey,
    /// SP 800-38E and its implementation guidance forbid it; of random keys one in 2^256 is so.
    #[error("both halves of the key are the same")]
    SameHalves,
}

impl Cipher {
    pub fn new(key: KeyId, secret: &VolumeSecret) -> Result<Cipher, KeyError> {
        if KeyId::of(secret) != key {
            return Err(KeyError::OtherKey);
        }
        let (data, tweak) = secret.expose().split_at(32);
        if data == tweak {
            return Err(KeyError::SameHalves);
        }
        Ok(Cipher::of_halves(data.try_into().expect("half"), tweak.try_into().expect("half")))
    }

    fn of_halves(data: &[u8; 32], tweak: &[u8; 32]) -> Cipher {
        Cipher { data: Aes256::new(data.into()), tweak: Aes256::new(tweak.into()) }
    }

    /// Whole blocks, of which the first is this one of its volume, as they are stored: the one owned copy of them (W11).
    pub fn encrypt(&self, start: BlockIndex, plain: &Data) -> Data {
        self.all(start, plain, |cipher, number, from, to| cipher.unit(number, from, to, Aes256::encrypt_blocks))
    }

    /// Whole blocks as clients see them.
    pub fn decrypt(&self, start: BlockIndex, stored: &Data) -> Data {
        self.all(start, stored, |cipher, number, from, to| {
            if from.iter().all(|byte| *byte == 0) {
                to.fill(0);
            } else {
                cipher.unit(number, from, to, Aes256::decrypt_blocks);
            }
        })
    }

    fn all(&self, start: BlockIndex, from: &Data, unit: impl Fn(&Cipher, u64, &[u8], &mut [u8])) -> Data {
        assert!(from.len().is_multiple_of(UNIT_BYTES), "whole blocks, not {} bytes", from.len());
        let mut to = Buffer::any(from.len());
        let units = from.as_slice().chunks_exact(UNIT_BYTES).zip(to.as_mut_slice().chunks_exact_mut(UNIT_BYTES));
        for (number, (from, to)) in (start.0..).zip(units) {
            unit(self, number, from, to);
        }
        to.freeze()
    }

    /// One data unit, from where it is to where it goes.
    fn unit(&self, number: u64, from: &[u8], to: &mut [u8], act: impl Fn(&Aes256, &mut [Block])) {
        let masks = self.masks(number);
        let batch = BATCH_CELLS * CELL_BYTES;
        let batches = from.chunks_exact(batch).zip(to.chunks_exact_mut(batch)).zip(masks.chunks_exact(BATCH_CELLS));
        for ((from, to), masks) in batches {
            let mut cells = [Block::default(); BATCH_CELLS];
            for ((cell, from), mask) in cells.iter_mut().zip(from.chunks_exact(CELL_BYTES)).zip(masks) {
                *cell = masked(from, *mask).into();
            }
            act(&self.data, &mut cells);
            for ((cell, to), mask) in cells.iter().zip(to.chunks_exact_mut(CELL_BYTES)).zip(masks) {
                to.copy_from_slice(&masked(cell, *mask));
            }
        }
    }

    /// What each cell of a data unit is masked with: the encrypted number of the unit, times x^j in GF(2^128) for cell j.
    fn masks(&self, number: u64) -> [u128; CELLS] {
        let mut first = Block::from(u128::from(number).to_le_bytes());
        self.tweak.encrypt_block(&mut first);
        let mut mask = u128::from_le_bytes(first.into());
        std::array::from_fn(|_| {
            let own = mask;
            // Without a branch: what is carried out is a bit of a secret. x^128 = x^7 + x^2 + x + 1.
            mask = (mask << 1) ^ ((mask >> 127) * 0x87);
            own
        })
    }
}

fn masked(cell: &[u8], mask: u128) -> [u8; CELL_BYTES] {
    let cell = u128::from_le_bytes(cell.try_into().expect("a cell"));
    (cell ^ mask).to_le_bytes()
}

/// The keys that this process was given. In memory only.
#[derive(Default)]
pub(crate) struct Keys(BTreeMap<KeyId, Arc<Cipher>>);

impl Keys {
    /// Takes a key, unless it is known or not what its name says.
    pub(crate) fn add(&mut self, key: KeyId, secret: &VolumeSecret) {
        if !self.0.contains_key(&key)
            && let Ok(cipher) = Cipher::new(key, secret)
        {
            self.0.insert(key, Arc::new(cipher));
        }
    }

    pub(crate) fn get(&self, key: KeyId) -> Option<&Arc<Cipher>> {
        self.0.get(&key)
    }

    pub(crate) fn forget(&mut self, key: KeyId) {
        self.0.remove(&key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use xts_mode::Xts128;

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hexadecimal")).collect()
    }

    /// IEEE 1619-2007, annex B, vectors 10 to 14: 512 bytes of 00, 01, 02 ... under the keys of e and pi, in these data units.
    /// They are shorter than ours; the first cells of a longer one are the same.
    #[test]
    fn blocks_are_encrypted_as_the_standard_says() {
        let data = bytes("2718281828459045235360287471352662497757247093699959574966967627");
        let tweak = bytes("3141592653589793238462643383279502884197169399375105820974944592");
        let cipher = Cipher::of_halves(data[..].try_into().expect("32"), tweak[..].try_into().expect("32"));
        let plain: Vec<u8> = (0..UNIT_BYTES).map(|at| at as u8).collect();
        let plain = Data::copy_of(&plain);
        for (unit, expected) in [
            (0xff, "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b5d31e276f8fe4a8d66b317f9ac683f44"),
            (
                0xffff,
                "77a31251618a15e6b92d1d66dffe7b50b50bad552305ba0217a610688eff7e11e1d0225438e093242d6db274fde801d4",
            ),
            (
                0xff_ffff,
                "e387aaa58ba483afa7e8eb469778317ecf4cf573aa9d4eac23f2cdf914e4e200a8b490e42ee646802dc6ee2b471b2781",
            ),
            (
                0xffff_ffff,
                "bf53d2dade78e822a4d949a9bc6766b01b06a8ef70d26748c6a7fc36d80ae4c5520f7c4ab0ac8544424fa405162fef5a",
            ),
            (
                0xff_ffff_ffff,
                "64497e5a831e4a932c09be3e5393376daa599548b816031d224bbf50a818ed2350eae7e96087c8a0db51ad290bd00c1a",
            ),
        ] {
            let stored = cipher.encrypt(BlockIndex(unit), &plain);
            assert_eq!(stored.as_slice()[..48], bytes(expected), "data unit {unit:x}");
            assert_eq!(cipher.decrypt(BlockIndex(unit), &stored), plain);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// The whole of a data unit, and several in one go, against another implementation.
        #[test]
        fn another_implementation_makes_the_same(
            secret in prop::collection::vec(any::<u8>(), 64),
            start in any::<u64>().prop_map(|start| start >> 20),
            blocks in 1usize..4,
            seed in any::<u8>(),
        ) {
            let secret = VolumeSecret::new(secret[..].try_into().expect("64"));
            let cipher = Cipher::new(KeyId::of(&secret), &secret).expect("a key");
            let plain: Vec<u8> = (0..blocks * UNIT_BYTES).map(|at| (at * 31 % 251) as u8 ^ seed).collect();
            let (data, tweak) = secret.expose().split_at(32);
            let other = Xts128::<Aes256>::new(Aes256::new(data.into()), Aes256::new(tweak.into()));
            let mut expected = plain.clone();
            other.encrypt_area(&mut expected, UNIT_BYTES, start.into(), xts_mode::get_tweak_default);
            let stored = cipher.encrypt(BlockIndex(start), &Data::copy_of(&plain));
            prop_assert_eq!(stored.as_slice(), &expected[..]);
            prop_assert!(stored.is_aligned());
            let back = cipher.decrypt(BlockIndex(start), &stored);
            prop_assert_eq!(back.as_slice(), &plain[..]);
        }
    }

    #[test]
    fn what_is_not_stored_reads_as_zeros_beside_what_is() {
        let secret = VolumeSecret::new(std::array::from_fn(|at| at as u8));
        let cipher = Cipher::new(KeyId::of(&secret), &secret).expect("a key");
        let written = cipher.encrypt(BlockIndex(8), &Data::zeroed(UNIT_BYTES));
        assert_ne!(written, Data::zeroed(UNIT_BYTES), "zeros that were written are encrypted like anything else");
        let stored = [&[0; UNIT_BYTES], written.as_slice(), &[0; UNIT_BYTES]].concat();
        assert_eq!(cipher.decrypt(BlockIndex(7), &Data::copy_of(&stored)), Data::zeroed(3 * UNIT_BYTES));
    }

    #[test]
    fn a_key_is_taken_only_under_its_own_name() {
        let secret = |byte| VolumeSecret::new(std::array::from_fn(|at| if at == 63 { byte } else { at as u8 }));
        let name = KeyId::of(&secret(1));
        assert_eq!(Cipher::new(name, &secret(2)).err(), Some(KeyError::OtherKey));
        let same = VolumeSecret::new([7; 64]);
        assert_eq!(Cipher::new(KeyId::of(&same), &same).err(), Some(KeyError::SameHalves));
        let mut keys = Keys::default();
        keys.add(name, &secret(2));
        assert!(keys.get(name).is_none());
        keys.add(name, &secret(1));
        assert!(keys.get(name).is_some());
        keys.forget(name);
        assert!(keys.get(name).is_none());
    }
}
