//! An id per kind, so that one cannot be passed for another.
//!
//! Group, volume, snapshot, image and VM ids are minted by the cluster log from one counter and are never used twice: what
//! belonged to a deleted volume can not appear under a new one. Cluster and pool ids are 128 random bits, minted by
//! whoever creates the cluster or formats the pool.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

macro_rules! counter_id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        $crate::unit::deserialize_number!($name(u64));
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(self, f)
            }
        }
    };
}

counter_id!(/// One server. Its number is also its id in the cluster log (Raft) and never changes.
    NodeId, "n");
counter_id!(/// The volumes that stay consistent together; the unit of replication authority.
    GroupId, "g");
counter_id!(/// A virtual disk.
    VolumeId, "v");
counter_id!(/// A virtual machine.
    VmId, "vm");
counter_id!(/// An imported disk image from which volumes are filled.
    ImageId, "img");
counter_id!(/// A snapshot of a group: all its volumes at one point of the write stream.
    SnapshotId, "snap");
counter_id!(/// One connection between two peers. Grows with every connection, so that a message of an earlier one is known.
    Session, "s");

macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u128);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                // A number may begin with a plus, an id may not.
                if text.len() != 32 || text.starts_with('+') {
                    return Err(ParseIdError);
                }
                u128::from_str_radix(text, 16).map($name).map_err(|_| ParseIdError)
            }
        }
        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

random_id!(/// One cluster. Pools, peers and the witness refuse whoever speaks of another.
    ClusterId);
random_id!(/// One pool: the disks that one node gives to Pollux.
    PoolId);
random_id!(/// One disk of a pool, from its formatting on.
    DiskId);
random_id!(/// Name of a key, made of the key by a hash (`secret.rs`).
    KeyId);

/// Text that is not 32 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an id is 32 hexadecimal digits")]
pub struct ParseIdError;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_128_bits_survive_their_text_form() {
        let id = ClusterId(0x0123_4567_89ab_cdef_0011_2233_4455_6677);
        assert_eq!(id.to_string().parse::<ClusterId>(), Ok(id));
        assert_eq!("short".parse::<ClusterId>(), Err(ParseIdError));
        assert_eq!("zz23456789abcdef0011223344556677".parse::<ClusterId>(), Err(ParseIdError));
        assert_eq!("+0000000000000000000000000000007".parse::<ClusterId>(), Err(ParseIdError));
    }
}
