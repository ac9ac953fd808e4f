//! What guests wrote to a volume that is encrypted at rest is given to no disk and to no peer as they wrote it.

use super::Invariant;
use crate::history::Seen;
use crate::time::Time;

pub struct EncryptedIsNeverInTheClear;

impl Invariant for EncryptedIsNeverInTheClear {
    fn name(&self) -> &'static str {
        "encrypted_is_never_in_the_clear"
    }
    fn see(&mut self, _now: Time, seen: &Seen) -> Result<(), String> {
        match seen {
            Seen::InTheClear { node, volume, block } => {
                Err(format!("{node} stores or sends block {block} of {volume} as it was written"))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::broken::*;
    use super::*;

    #[test]
    fn plain_text_is_caught() {
        let history = [write(1, 0), Seen::InTheClear { node: B, volume: VOLUME, block: 0 }];
        assert_eq!(watch(EncryptedIsNeverInTheClear, &history).map_err(|(place, _)| place), Err(1));
        assert_eq!(watch(EncryptedIsNeverInTheClear, &history[..1]), Ok(()));
    }
}
