//! Keys in memory: wiped when dropped, and shown to nobody by accident.

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use zeroize::Zeroizing;

pub const SECRET_BYTES: usize = 32;

/// A key. In JSON it is hexadecimal text, for the socket between two daemons of one node, and for nothing else.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<[u8; SECRET_BYTES]>);

impl Secret {
    pub fn new(bytes: [u8; SECRET_BYTES]) -> Secret {
        Secret(Zeroizing::new(bytes))
    }
    /// To make keys from; not to be kept or shown.
    pub fn expose(&self) -> &[u8; SECRET_BYTES] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let digit = |nibble: u8| char::from_digit(nibble.into(), 16).expect("a nibble is below 16");
        let mut text = Zeroizing::new(String::with_capacity(2 * SECRET_BYTES));
        for byte in self.0.iter() {
            text.push(digit(byte >> 4));
            text.push(digit(byte & 0xf));
        }
        serializer.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Secret, D::Error> {
        let text = Zeroizing::new(String::deserialize(deserializer)?);
        let wrong = || D::Error::custom(format!("a secret is {} hexadecimal digits", 2 * SECRET_BYTES));
        let mut bytes = Zeroizing::new([0; SECRET_BYTES]);
        if text.len() != 2 * SECRET_BYTES || !text.is_ascii() {
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
}
