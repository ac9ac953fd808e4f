//! Which token may speak for which cluster: one line `CLUSTER TOKEN` each; empty lines and lines with `#` are skipped.
//!
//! The file is read again when it has changed, so that a cluster is added without a restart.

use pollux_base::ClusterId;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

pub struct Tokens {
    path: PathBuf,
    changed: Option<SystemTime>,
    /// Hashes: comparing them takes the same time whatever the token, and they tell nothing when printed.
    hashes: BTreeMap<ClusterId, blake3::Hash>,
}

impl Tokens {
    pub fn open(path: &Path) -> Result<Tokens, String> {
        let mut tokens = Tokens { path: path.into(), changed: None, hashes: BTreeMap::new() };
        tokens.read().map_err(|error| format!("the token file {} can not be used: {error}", path.display()))?;
        Ok(tokens)
    }

    /// Whether this token may speak for this cluster.
    pub fn allow(&mut self, cluster: ClusterId, token: &str) -> bool {
        let changed = std::fs::metadata(&self.path).and_then(|metadata| metadata.modified()).ok();
        if changed.is_some()
            && changed != self.changed
            && let Err(error) = self.read()
        {
            tracing::warn!("the token file has changed but is not used: {error}");
            self.changed = changed;
        }
        // blake3::Hash compares in constant time.
        self.hashes.get(&cluster).is_some_and(|hash| *hash == blake3::hash(token.as_bytes()))
    }

    fn read(&mut self) -> Result<(), io::Error> {
        let changed = std::fs::metadata(&self.path)?.modified()?;
        let text = std::fs::read_to_string(&self.path)?;
        let hashes = parse(&text).map_err(|reason| io::Error::new(io::ErrorKind::InvalidData, reason))?;
        self.hashes = hashes;
        self.changed = Some(changed);
        Ok(())
    }
}

/// Shorter tokens could be guessed.
const TOKEN_BYTES_MIN: usize = 16;

/// The hash of each cluster's token.
pub(crate) fn parse(text: &str) -> Result<BTreeMap<ClusterId, blake3::Hash>, String> {
    let mut hashes = BTreeMap::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let parsed = line.split_once(char::is_whitespace).and_then(|(cluster, token)| {
            let token = token.trim();
            Some((cluster.parse::<ClusterId>().ok()?, token)).filter(|_| token.len() >= TOKEN_BYTES_MIN)
        });
        let Some((cluster, token)) = parsed else {
            // The line itself is not shown: it may hold a token.
            return Err(format!("line {} is not `CLUSTER TOKEN` ({TOKEN_BYTES_MIN} or more characters)", number + 1));
        };
        hashes.insert(cluster, blake3::hash(token.as_bytes()));
    }
    Ok(hashes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_cluster_s_own_token_is_allowed_and_new_ones_are_seen() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        let (first, second) = (ClusterId(1), ClusterId(2));
        std::fs::write(&path, format!("# tokens\n{first} aaaaaaaaaaaaaaaa\n")).unwrap();
        let mut tokens = Tokens::open(&path).unwrap();
        assert!(tokens.allow(first, "aaaaaaaaaaaaaaaa"));
        assert!(!tokens.allow(first, "bbbbbbbbbbbbbbbb"));
        assert!(!tokens.allow(second, "aaaaaaaaaaaaaaaa"));
        std::fs::write(&path, format!("{first} aaaaaaaaaaaaaaaa\n{second} bbbbbbbbbbbbbbbb\n")).unwrap();
        // The clock of a file system may be too coarse to show the change at once.
        let later = SystemTime::now() + std::time::Duration::from_secs(2);
        std::fs::File::options().write(true).open(&path).unwrap().set_modified(later).unwrap();
        assert!(tokens.allow(second, "bbbbbbbbbbbbbbbb"));
    }

    #[test]
    fn a_line_that_makes_no_sense_is_refused_without_showing_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        std::fs::write(&path, "secret-without-cluster\n").unwrap();
        let refused = Tokens::open(&path).err().unwrap();
        assert!(refused.contains("line 1") && !refused.contains("secret"), "{refused}");
    }
}
