//! The master keys that a node has: the one in its file and, while it is exchanged, the successor in the file beside it.
//!
//! A sealed key names its master key, so whoever has both opens what is sealed under either. That makes an exchange safe at any
//! moment: first every node has both, then keys are sealed anew, then the successor's file takes the place of the other.

use crate::MasterKey;
use anyhow::{Result, bail};
use pollux_base::{ClusterId, KeyId, SealedKey, VolumeSecret};
use std::path::{Path, PathBuf};

#[derive(Default)]
pub struct Keyring {
    present: Option<MasterKey>,
    successor: Option<MasterKey>,
    /// Why the successor's file is of no use. A node goes on without it: what works today must not end for it.
    refused: Option<String>,
}

/// Where the successor of this master key lies.
pub fn successor_file(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

impl Keyring {
    /// From `master_key_file`, if one is configured, and what lies beside it.
    pub fn read(file: Option<&Path>, cluster: ClusterId) -> Result<Keyring> {
        let Some(file) = file else { return Ok(Keyring::default()) };
        let beside = successor_file(file);
        // First: it may be renamed to the other between the two, and is then found at least once.
        let successor = beside.exists().then(|| MasterKey::read(&beside, cluster));
        if !file.exists() && successor.is_some() {
            let (file, beside) = (file.display(), beside.display());
            bail!(
                "the master key {file} is gone, and only its successor is there: put it back, or, if all keys are sealed \
                 under the successor (`pollux master-key show` on another node tells), rename {beside} to {file}"
            );
        }
        let present = MasterKey::read(file, cluster)?;
        let (successor, refused) = match successor {
            None => (None, None),
            Some(Ok(key)) => (Some(key).filter(|key| key.id() != present.id()), None),
            Some(Err(error)) => (None, Some(format!("{error:#}"))),
        };
        Ok(Keyring { present: Some(present), successor, refused })
    }

    /// Name of the one in `master_key_file`.
    pub fn present(&self) -> Option<KeyId> {
        self.present.as_ref().map(MasterKey::id)
    }

    /// Name of the one that is to follow.
    pub fn successor(&self) -> Option<KeyId> {
        self.successor.as_ref().map(MasterKey::id)
    }

    pub fn refused(&self) -> Option<&str> {
        self.refused.as_deref()
    }

    /// The one of this name.
    pub fn get(&self, id: KeyId) -> Option<&MasterKey> {
        [&self.present, &self.successor].into_iter().flatten().find(|key| key.id() == id)
    }

    /// The key of a volume, or why there is none.
    pub fn open(&self, sealed: &SealedKey) -> Result<VolumeSecret, String> {
        match (self.get(sealed.master), self.present()) {
            (Some(master), _) => master.open(sealed),
            (None, None) => Err("this node has no master key (`master_key_file` in its configuration)".into()),
            (None, Some(present)) => {
                let successor = self.successor().map(|key| format!(" and {key}")).unwrap_or_default();
                Err(format!("it is sealed under the master key {}, this node has {present}{successor}", sealed.master))
            }
        }
    }

    /// The same volume's key, under another of these master keys.
    pub fn seal_anew(&self, sealed: &SealedKey, under: KeyId) -> Result<SealedKey, String> {
        let secret = self.open(sealed)?;
        let master = self.get(under).ok_or_else(|| format!("this node has not the master key {under}"))?;
        master.seal(&secret).map_err(|error| format!("{error:#}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const CLUSTER: ClusterId = ClusterId(7);

    struct Files {
        _folder: tempfile::TempDir,
        path: PathBuf,
    }

    impl Files {
        fn new() -> Files {
            let folder = tempfile::tempdir().expect("a folder");
            Files { path: folder.path().join("master.key"), _folder: folder }
        }

        fn write(&self, path: &Path, byte: u8, mode: u32) {
            std::fs::write(path, [byte; 32]).expect("written");
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("a mode");
        }

        fn read(&self) -> Result<Keyring> {
            Keyring::read(Some(&self.path), CLUSTER)
        }
    }

    #[test]
    fn a_key_is_opened_at_each_step_of_an_exchange_and_sealed_anew_is_the_same() {
        let files = Files::new();
        let beside = successor_file(&files.path);
        assert!(beside.ends_with("master.key.new"));
        files.write(&files.path, 1, 0o600);
        let before = files.read().expect("one key");
        let first = before.present().expect("it has one");
        let old = before.get(first).expect("it").make_key().expect("random numbers");
        files.write(&beside, 2, 0o600);
        let both = files.read().expect("two keys");
        assert_eq!((both.present(), before.successor()), (Some(first), None));
        let second = both.successor().expect("beside the other");
        let new = both.seal_anew(&old, second).expect("it has both");
        assert_eq!((new.key, new.master), (old.key, second));
        for sealed in [&old, &new] {
            assert!(both.open(sealed).expect("both open") == before.open(&old).expect("the old one opens"));
        }
        let refused = before.open(&new).expect_err("it has not the new one");
        assert!(refused.contains(&second.to_string()) && refused.contains(&first.to_string()), "{refused}");
        assert!(before.seal_anew(&old, second).expect_err("nor seals with it").contains(&second.to_string()));

        std::fs::rename(&beside, &files.path).expect("renamed");
        let after = files.read().expect("one key");
        assert_eq!((after.present(), after.successor()), (Some(second), None));
        assert!(after.open(&new).is_ok() && after.open(&old).is_err());
    }

    #[test]
    fn a_successor_that_is_of_no_use_is_told_and_the_present_one_works_on() {
        let files = Files::new();
        let beside = successor_file(&files.path);
        files.write(&files.path, 1, 0o600);
        files.write(&beside, 2, 0o644);
        let keyring = files.read().expect("the present one is good");
        assert!(keyring.present().is_some() && keyring.successor().is_none());
        assert!(keyring.refused().expect("why").contains("chmod 600"));
        // The same key twice is no successor.
        files.write(&beside, 1, 0o600);
        let keyring = files.read().expect("one key, twice");
        assert_eq!((keyring.successor(), keyring.refused()), (None, None));
    }

    #[test]
    fn without_the_present_one_it_is_said_what_to_do_and_without_any_that_there_is_none() {
        let files = Files::new();
        files.write(&successor_file(&files.path), 2, 0o600);
        let error = files.read().err().expect("refused");
        assert!(error.to_string().contains("rename"), "{error:#}");
        let none = Keyring::read(None, CLUSTER).expect("none is asked for");
        let sealed = SealedKey::of_bytes(KeyId(1), KeyId(2), &[0]);
        assert!(none.open(&sealed).expect_err("no key").contains("no master key"));
    }
}
