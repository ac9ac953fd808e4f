//! Keys of volumes that are encrypted at rest (`docs/design/0008-encryption-at-rest.md`): which volume has which, and when a
//! key is gone. What a key is nobody here knows: the log holds it sealed under a master key, which lies in a file on each node.
//!
//! A volume has its key from its birth to its end; its snapshots and clones have the same. The sealed key goes with the
//! last of them.

use crate::apply::Applying;
use crate::core::Cluster;
use crate::entry::Change;
use crate::seam::Refusal;
use crate::state::State;
use pollux_base::{Instant, KeyId, SealedKey, VolumeId};
use std::collections::{BTreeMap, BTreeSet};

/// Longest sealed key, in digits. A key of 64 bytes with its nonce and tag has 184.
const SEALED_DIGITS_MAX: usize = 512;

/// Why what is said to be a sealed key is none.
pub(crate) fn refuse_text(SealedKey { key, sealed, .. }: &SealedKey) -> Result<(), Refusal> {
    if sealed.len() > SEALED_DIGITS_MAX || !sealed.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(Refusal::Invalid(format!("what is said to be the sealed key {key} is none")));
    }
    Ok(())
}

impl State {
    /// Which of these volumes are encrypted at rest, and with what.
    pub(crate) fn keys_of<'a>(&self, volumes: impl Iterator<Item = &'a VolumeId>) -> BTreeMap<VolumeId, KeyId> {
        volumes.filter_map(|volume| Some((*volume, self.volumes.get(volume)?.key?))).collect()
    }

    /// Why these can not be the keys of new volumes.
    pub(crate) fn refuse_keys(&self, keys: &[SealedKey]) -> Result<(), Refusal> {
        let mut seen = BTreeSet::new();
        for sealed in keys {
            refuse_text(sealed)?;
            let (key, master) = (&sealed.key, sealed.master);
            if let Some(sealing) = self.sealing.filter(|sealing| sealing.master != master) {
                return Err(Refusal::Conflict(format!(
                    "since the master key was exchanged keys are sealed under {}, not under {master}: ask again",
                    sealing.master
                )));
            }
            if self.keys.contains_key(key) || !seen.insert(key) {
                return Err(Refusal::Conflict(format!("the key {key} is that of another volume")));
            }
        }
        Ok(())
    }

    pub(crate) fn drop_unused_keys(&mut self) {
        let used: BTreeSet<KeyId> = self.volumes.values().filter_map(|volume| volume.key).collect();
        self.keys.retain(|key, _| used.contains(key));
    }

    pub(crate) fn check_keys(&self) {
        let used: BTreeSet<KeyId> = self.volumes.values().filter_map(|volume| volume.key).collect();
        assert!(used.iter().eq(self.keys.keys()), "each key is of a volume, and each volume's is there");
        for (id, volume) in &self.volumes {
            let group = volume.snapshot.and_then(|of| self.groups.get(&volume.group)?.snapshots.each.get(&of));
            if let Some(frozen) = group.and_then(|snapshot| snapshot.volumes.get(id)) {
                let origin = self.volumes.get(&frozen.of).and_then(|of| of.key);
                assert_eq!(volume.key, origin, "{id}: a snapshot has the key of its volume");
            }
        }
    }
}

impl Applying<'_> {
    /// Keeps the key of a volume that is about to be; its name.
    pub(crate) fn keep_key(&mut self, key: Option<&SealedKey>) -> Option<KeyId> {
        let sealed = key?;
        self.state.keys.insert(sealed.key, sealed.clone());
        Some(sealed.key)
    }
}

impl Cluster {
    /// A new key must be of use wherever its volume may be served: nodes have the same master key, or say so first.
    pub(crate) fn refuse_masters(&self, now: Instant, change: &Change) -> Result<(), Refusal> {
        let (node, keys) = match change {
            Change::CreateImage { node, key, .. } | Change::CreateVolume { node, key, .. } => (*node, key.as_slice()),
            Change::CreateVm { node, keys, .. } => (*node, keys.as_slice()),
            _ => return Ok(()),
        };
        for SealedKey { master, .. } in keys {
            // While an exchange is under way there are both; `refuse_keys` knows which one is right.
            if self.state.sealing.is_none() && self.state.keys.values().any(|other| other.master != *master) {
                return Err(Refusal::Conflict(format!(
                    "there are volumes whose keys are sealed under another master key than that of `{}`, {master}",
                    self.name_of(self.me)
                )));
            }
            let others = self.state.birth_replicas(node).into_iter().filter(|id| *id != self.me);
            // Who is away is not waited for; without the key it will serve nothing, and say so.
            let heard = others.filter_map(|other| Some((other, self.hello_of(now, other)?.masters())));
            if let Some((lacking, has)) = heard.into_iter().find(|(_, has)| !has.has(*master)) {
                let has = match has.present {
                    Some(other) => format!("has another master key, {other}"),
                    None => "has no master key".to_string(),
                };
                return Err(Refusal::Conflict(format!(
                    "node `{}` {has}, and could not serve an encrypted volume: give all nodes the same `master_key_file`",
                    self.name_of(lacking)
                )));
            }
        }
        Ok(())
    }

    pub(crate) fn on_key_refused(&mut self, key: KeyId, reason: String) {
        self.groups.refused_keys.insert(key, reason);
    }

    /// Why this node has not the key of a volume, if that is known.
    pub fn refused_key(&self, volume: VolumeId) -> Option<&str> {
        let key = self.state.volumes.get(&volume)?.key?;
        self.groups.refused_keys.get(&key).map(String::as_str)
    }
}
