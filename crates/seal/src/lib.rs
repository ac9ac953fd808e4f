//! Keys of volumes that are encrypted at rest: made here, sealed under the cluster's master key for the log and the pools, and
//! opened again: for a node's `blockd`, and for a rescue.
//!
//! The master key lies in a file on each node and nowhere else: never in the log, on a pool's disk, or on a wire. Whoever has
//! the log and the disks but not this file reads nothing. Who loses it on all nodes loses every encrypted volume.
//!
//! An opened key goes to whom it is for at once and is kept by neither this crate nor any file.

mod keyring;

pub use keyring::{Keyring, successor_file};

use anyhow::{Context, Result, bail};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::rand;
use pollux_base::{ClusterId, KeyId, SealedKey, Secret, VolumeSecret};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use zeroize::Zeroizing;

const MASTER_BYTES: usize = 32;
const VOLUME_BYTES: usize = 64;

/// The cluster's master key, ready for use.
pub struct MasterKey {
    id: KeyId,
    cluster: ClusterId,
    key: LessSafeKey,
}

impl MasterKey {
    /// From its file, which nobody but its owner may read.
    pub fn read(path: &Path, cluster: ClusterId) -> Result<MasterKey> {
        let doing = || format!("cannot use the master key {}", path.display());
        let mut file = std::fs::File::open(path).with_context(doing)?;
        let mode = file.metadata().with_context(doing)?.mode();
        if mode & 0o077 != 0 {
            bail!("the master key {} can be read by others than its owner: chmod 600 it", path.display());
        }
        // One byte more than there may be.
        let mut bytes = Zeroizing::new(Vec::with_capacity(MASTER_BYTES + 1));
        (&mut file).take(MASTER_BYTES as u64 + 1).read_to_end(&mut bytes).with_context(doing)?;
        let Ok(master) = <[u8; MASTER_BYTES]>::try_from(bytes.as_slice()) else {
            bail!("the master key {} is not {MASTER_BYTES} random bytes", path.display());
        };
        MasterKey::new(Secret::new(master), cluster)
    }

    fn new(master: Secret, cluster: ClusterId) -> Result<MasterKey> {
        let sealing = Zeroizing::new(blake3::derive_key("pollux 2026 sealing of volumes' keys", master.expose()));
        let key = UnboundKey::new(&AES_256_GCM, sealing.as_slice()).context("a key of AES-256")?;
        Ok(MasterKey { id: KeyId::of_master(&master), cluster, key: LessSafeKey::new(key) })
    }

    pub fn id(&self) -> KeyId {
        self.id
    }

    /// A new random key for a volume, as it goes into the log.
    pub fn make_key(&self) -> Result<SealedKey> {
        self.seal(&VolumeSecret::new(*random::<VOLUME_BYTES>()?))
    }

    /// A volume's key, under this master key.
    pub fn seal(&self, secret: &VolumeSecret) -> Result<SealedKey> {
        let key = KeyId::of(secret);
        let nonce: [u8; NONCE_LEN] = *random()?;
        let mut bytes = Zeroizing::new(secret.expose().to_vec());
        let (aad, unique) = (self.aad(key), Nonce::assume_unique_for_key(nonce));
        let tag = self.key.seal_in_place_separate_tag(unique, aad, &mut bytes).context("AES-GCM")?;
        let sealed: Vec<u8> = nonce.iter().chain(bytes.iter()).chain(tag.as_ref()).copied().collect();
        Ok(SealedKey::of_bytes(key, self.id, &sealed))
    }

    /// The key, or why there is none.
    pub fn open(&self, sealed: &SealedKey) -> Result<VolumeSecret, String> {
        if sealed.master != self.id {
            return Err(format!("it is sealed under the master key {}, not under {}", sealed.master, self.id));
        }
        let damaged = || "the sealed key is damaged".to_string();
        let mut bytes = Zeroizing::new(sealed.bytes().ok_or_else(damaged)?);
        let (nonce, rest) = bytes.split_at_mut_checked(NONCE_LEN).ok_or_else(damaged)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| damaged())?;
        let opened = self.key.open_in_place(nonce, self.aad(sealed.key), rest).map_err(|_| damaged())?;
        let secret = VolumeSecret::new((&*opened).try_into().map_err(|_| damaged())?);
        if KeyId::of(&secret) != sealed.key {
            return Err(damaged());
        }
        Ok(secret)
    }

    /// A sealed key is of use only under its own name and in its own cluster.
    fn aad(&self, key: KeyId) -> Aad<[u8; 32]> {
        let mut bytes = [0; 32];
        bytes[..16].copy_from_slice(&self.cluster.0.to_be_bytes());
        bytes[16..].copy_from_slice(&key.0.to_be_bytes());
        Aad::from(bytes)
    }
}

/// From the system.
pub fn random<const BYTES: usize>() -> Result<Zeroizing<[u8; BYTES]>> {
    let mut bytes = Zeroizing::new([0; BYTES]);
    rand::fill(bytes.as_mut_slice()).map_err(|_| anyhow::anyhow!("the system gives no random numbers"))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const CLUSTER: ClusterId = ClusterId(7);

    fn master(byte: u8, cluster: ClusterId) -> MasterKey {
        MasterKey::new(Secret::new([byte; 32]), cluster).expect("a master key")
    }

    #[test]
    fn a_sealed_key_opens_under_its_master_key_its_name_and_in_its_cluster_only() {
        let own = master(1, CLUSTER);
        let sealed = own.make_key().expect("random numbers");
        let secret = own.open(&sealed).expect("its own");
        assert_eq!(KeyId::of(&secret), sealed.key);
        assert_eq!(sealed.sealed.len(), 2 * (12 + 64 + 16));
        let inner: String = secret.expose().iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(!sealed.sealed.contains(&inner[..16]), "it is sealed");
        let other = own.make_key().expect("random numbers");
        assert!(other.key != sealed.key && other.sealed != sealed.sealed);

        let refused = master(2, CLUSTER).open(&sealed).expect_err("another master key");
        assert!(refused.contains(&sealed.master.to_string()), "{refused}");
        let foreign = master(2, CLUSTER);
        let claimed = SealedKey { master: foreign.id(), ..sealed.clone() };
        assert!(foreign.open(&claimed).expect_err("it does not open").contains("damaged"));
        assert!(master(1, ClusterId(8)).open(&sealed).is_err());
        assert!(own.open(&SealedKey { key: other.key, ..sealed.clone() }).is_err());
    }

    #[test]
    fn every_changed_digit_of_a_sealed_key_is_noticed() {
        let own = master(1, CLUSTER);
        let sealed = own.make_key().expect("random numbers");
        for at in 0..sealed.sealed.len() {
            let mut changed = sealed.sealed.clone().into_bytes();
            changed[at] = if changed[at] == b'0' { b'1' } else { b'0' };
            let changed = SealedKey { sealed: String::from_utf8(changed).expect("digits"), ..sealed.clone() };
            assert!(own.open(&changed).is_err(), "digit {at}");
        }
        for bad in ["", "0", "zz", &sealed.sealed[2..], &format!("{}00", sealed.sealed)] {
            assert!(own.open(&SealedKey { sealed: bad.into(), ..sealed.clone() }).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_file_that_is_no_master_key_or_that_others_may_read_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("master.key");
        let read = |bytes: &[u8], mode| {
            std::fs::write(&path, bytes).expect("written");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("a mode");
            MasterKey::read(&path, CLUSTER).map(|key| key.id()).map_err(|error| format!("{error:#}"))
        };
        assert_eq!(read(&[9; 32], 0o600), Ok(master(9, CLUSTER).id()));
        assert_eq!(read(&[9; 32], 0o400), Ok(master(9, CLUSTER).id()));
        for (bytes, mode, why) in [
            (&[9; 32][..], 0o640, "chmod 600"),
            (&[9; 31], 0o600, "not 32 random bytes"),
            (&[9; 33], 0o600, "not 32 random bytes"),
            (&[], 0o600, "not 32 random bytes"),
        ] {
            let error = read(bytes, mode).expect_err(why);
            assert!(error.contains(why), "{error}");
        }
        let missing = MasterKey::read(&folder.path().join("none"), CLUSTER).err().expect("there is none");
        assert!(format!("{missing:#}").contains("cannot use the master key"));
    }
}
