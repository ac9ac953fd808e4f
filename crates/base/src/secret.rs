//! Keys in memory: wiped when dropped, and shown to nobody by accident.

use crate::id::KeyId;
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use zeroize::Zeroizing;

/// Of most secrets.
pub const SECRET_BYTES: usize = 32;

/// A key of so many bytes. In JSON it is hexadecimal text, for the socket between two daemons of one node, and for nothing
/// else.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret<const BYTES: usize = SECRET_BYTES>(Zeroizing<[u8; BYTES]>);

/// What a volume is encrypted with at rest: two keys of AES-256, as XTS wants them.
pub type VolumeSecret = Secret<64>;

impl<const BYTES: usize> Secret<BYTES> {
    pub fn new(bytes: [u8; BYTES]) -> Secret<BYTES> {
        Secret(Zeroizing::new(bytes))
    }
    /// To make keys from; not to be kept or shown.
    pub fn expose(&self) -> &[u8; BYTES] {
        &self.0
    }
}

/// The key of a volume, sealed: all that the log and the pools ever hold of it. Whoever has the master key opens it
/// (`pollux-seal`); without that it tells nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedKey {
    pub key: KeyId,
    /// Name of the master key.
    pub master: KeyId,
    /// Hexadecimal.
    pub sealed: String,
}

impl SealedKey {
    pub fn of_bytes(key: KeyId, master: KeyId, sealed: &[u8]) -> SealedKey {
        SealedKey { key, master, sealed: sealed.iter().map(|byte| format!("{byte:02x}")).collect() }
    }
    /// What is in its text, if that is hexadecimal.
    pub fn bytes(&self) -> Option<Vec<u8>> {
        let digit = |digit: u8| char::from(digit).to_digit(16).map(|value| value as u8);
        let pairs = self.sealed.as_bytes().chunks(2).map(|pair| match pair {
            [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
            _ => None,
        });
        pairs.collect()
    }
}

impl KeyId {
    /// The name of a volume's key. It tells nothing of the key, and no other has it: who is given a key under a name sees
    /// whether it is the right one.
    pub fn of(secret: &VolumeSecret) -> KeyId {
        KeyId::derived("pollux 2026 name of a key of a volume", secret.expose())
    }
    /// The name of a master key, under which volumes' keys are sealed.
    pub fn of_master(secret: &Secret) -> KeyId {
        KeyId::derived("pollux 2026 name of a master key", secret.expose())
    }
    fn derived(purpose: &str, secret: &[u8]) -> KeyId {
        let digest = blake3::derive_key(purpose, secret);
        KeyId(u128::from_be_bytes(digest[..16].try_into().expect("a digest has 32 bytes")))
    }
}

impl<const BYTES: usize> fmt::Debug for Secret<BYTES> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl<const BYTES: usize> Serialize for Secret<BYTES> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let digit = |nibble: u8| char::from_digit(nibble.into(), 16).expect("a nibble is below 16");
        let mut text = Zeroizing::new(String::with_capacity(2 * BYTES));
        for byte in self.0.iter() {
            text.push(digit(byte >> 4));
            text.push(digit(byte & 0xf));
        }
        serializer.serialize_str(&text)
    }
}

impl<'de, const BYTES: usize> Deserialize<'de> for Secret<BYTES> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Secret<BYTES>, D::Error> {
        let text = Zeroizing::new(String::deserialize(deserializer)?);
        let wrong = || D::Error::custom(format!("a secret is {} hexadecimal digits", 2 * BYTES));
        let mut bytes = Zeroizing::new([0; BYTES]);
        if text.len() != 2 * BYTES || !text.is_ascii() {
            return Err(wrong());
        }
        for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
            let value = |digit: u8| char::from(digit).to_digit(16);
            let (high, low) = (value(digits[0]).ok_or_else(wrong)?, value(digits[1]).ok_or_else(wrong)?);
            *byte = (high << 4 | low) as u8;
        }
        Ok(Secret(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_travels_as_text_and_is_never_shown() {
        let secret = Secret::new(std::array::from_fn(|index| 7 * index as u8));
        let text = serde_json::to_string(&secret).expect("text");
        assert_eq!(serde_json::from_str::<Secret>(&text).map_err(|error| error.to_string()), Ok(secret.clone()));
        assert_eq!(format!("{secret:?}"), "Secret(..)");
        for wrong in ["\"\"", "\"00\"", &text.replace('0', "g"), &text.replace("00", "é")] {
            let error = serde_json::from_str::<Secret>(wrong).expect_err("not a secret").to_string();
            assert!(!error.contains(&text[3..9]), "{error}");
        }
    }

    #[test]
    fn a_sealed_key_is_text_of_bytes_or_nothing() {
        let sealed = SealedKey::of_bytes(KeyId(1), KeyId(2), &[0, 0x5e, 0xff]);
        assert_eq!((sealed.sealed.as_str(), sealed.bytes()), ("005eff", Some(vec![0, 0x5e, 0xff])));
        for wrong in ["0", "005", "zz", "+1", "é"] {
            assert_eq!(SealedKey { sealed: wrong.into(), ..sealed.clone() }.bytes(), None, "{wrong}");
        }
    }

    /// Volumes of earlier days are looked up by it.
    #[test]
    fn a_key_keeps_its_name_and_each_has_another() {
        let secret =
            |last| VolumeSecret::new(std::array::from_fn(|index| if index == 63 { last } else { index as u8 }));
        assert_eq!(KeyId::of(&secret(63)).to_string(), "9f821b0dbadb96a5ea2e1e6c98a4cff4");
        assert_ne!(KeyId::of(&secret(63)), KeyId::of(&secret(62)));
        assert_ne!(KeyId::of_master(&Secret::new([0; 32])), KeyId::of_master(&Secret::new([1; 32])));
    }
}
