//! The master key, by name: under which one volumes' keys are sealed, which nodes have which, and its exchange
//! (`docs/design/0008-encryption-at-rest.md`).
//!
//! An exchange: every node is given the successor beside the present master key, and says so; then the keys in the log are
//! sealed anew under it, some at a time; then each node's files are tidied up. Between any two steps every node has the master
//! key of every sealed key, so nothing that stops there loses a volume, and asking again goes on with what is left.

use crate::apply::Applying;
use crate::core::Cluster;
use crate::entry::{Change, Subject};
use crate::seam::{Answer, PeerHello, Refusal};
use crate::state::State;
use pollux_base::{Instant, KeyId, NodeId, SealedKey};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Keys that one entry seals anew: some 90 KiB of the log.
pub const SEALED_AT_ONCE: usize = 256;

/// The master key under which keys are sealed since it was exchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealing {
    pub master: KeyId,
    /// Number of the last entry that sealed keys anew.
    pub entry: u64,
}

/// What is to be sealed anew next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealAnew {
    pub master: KeyId,
    /// For `Change::SealKeys`.
    pub expect: Option<u64>,
    /// At most `SEALED_AT_ONCE`; each is under another master key.
    pub keys: Vec<SealedKey>,
    /// Nothing is left to do.
    pub is_done: bool,
}

/// Master keys that a node says it has, by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeMasters {
    pub present: Option<KeyId>,
    pub successor: Option<KeyId>,
}

impl NodeMasters {
    pub fn has(&self, master: KeyId) -> bool {
        [self.present, self.successor].contains(&Some(master))
    }
}

impl PeerHello {
    pub fn masters(&self) -> NodeMasters {
        NodeMasters { present: self.master, successor: self.master_successor }
    }
}

impl State {
    /// How many keys are sealed under which master key.
    pub fn keys_by_master(&self) -> BTreeMap<KeyId, usize> {
        let mut count = BTreeMap::new();
        for sealed in self.keys.values() {
            *count.entry(sealed.master).or_default() += 1;
        }
        count
    }

    fn sealed_under_another(&self, master: KeyId) -> impl Iterator<Item = &SealedKey> {
        self.keys.values().filter(move |sealed| sealed.master != master)
    }

    /// Why these keys are not taken in place of what they were sealed from.
    pub(crate) fn refuse_sealed_anew(
        &self,
        expect: Option<u64>,
        master: KeyId,
        keys: &[SealedKey],
    ) -> Result<(), Refusal> {
        if expect != self.sealing.map(|sealing| sealing.entry) {
            return Err(Refusal::Conflict(
                "somebody else sealed keys anew meanwhile; look with `pollux master-key show`".into(),
            ));
        }
        if keys.len() > SEALED_AT_ONCE || keys.iter().any(|sealed| sealed.master != master) {
            return Err(Refusal::Invalid(format!(
                "at most {SEALED_AT_ONCE} keys, all under {master}, are sealed at once"
            )));
        }
        keys.iter().try_for_each(crate::keys::refuse_text)
    }
}

impl Applying<'_> {
    /// Keys that are gone meanwhile stay so.
    pub(crate) fn seal_keys(&mut self, master: KeyId, keys: &[SealedKey]) -> Answer {
        let is_new = self.state.sealing.is_none_or(|sealing| sealing.master != master);
        if is_new {
            let text = format!("the master key is exchanged: keys of volumes are sealed under {master} from now on");
            self.tell(Subject::Cluster, text);
        }
        let was_left = self.state.sealed_under_another(master).count();
        for sealed in keys {
            if let Some(known) = self.state.keys.get_mut(&sealed.key) {
                *known = sealed.clone();
            }
        }
        self.state.sealing = Some(Sealing { master, entry: self.state.applied });
        if self.state.sealed_under_another(master).count() == 0 && (was_left > 0 || is_new) {
            let all = self.state.keys.len();
            self.tell(
                Subject::Cluster,
                format!("all keys of volumes ({all}) are sealed under the master key {master}"),
            );
        }
        Answer::Done
    }
}

impl Cluster {
    fn own_masters(&self) -> NodeMasters {
        NodeMasters { present: self.setup.master, successor: self.setup.master_successor }
    }

    /// Which master key each node says it has; `None`: it is not heard.
    pub fn masters(&self) -> BTreeMap<NodeId, Option<NodeMasters>> {
        let said = |id: &NodeId| match *id == self.me {
            true => Some(self.own_masters()),
            false => self.peers.each.get(id).and_then(|peer| peer.hello.as_ref()).map(|(_, hello)| hello.masters()),
        };
        self.state.nodes.keys().map(|id| (*id, said(id))).collect()
    }

    /// Under which master key new keys are sealed; `None`: this node has none.
    pub fn master_for_new_keys(&self) -> Option<KeyId> {
        self.state.sealing.map(|sealing| sealing.master).or(self.setup.master)
    }

    /// What this node has to seal anew: under the successor that it has, or under its only master key, so that what was begun under
    /// another can be ended when the files are tidied up already.
    pub fn to_seal_anew(&self) -> Result<SealAnew, Refusal> {
        let own = self.own_masters();
        let Some(master) = own.successor.or(own.present) else {
            return Err(Refusal::Conflict(format!("node `{}` has no master key", self.name_of(self.me))));
        };
        let keys: Vec<SealedKey> = self.state.sealed_under_another(master).take(SEALED_AT_ONCE).cloned().collect();
        let chosen = self.state.sealing.map(|sealing| sealing.master);
        if keys.is_empty() && chosen.is_none() && own.successor.is_none() {
            return Err(Refusal::Conflict(format!(
                "all keys are sealed under the master key {master}, and node `{}` has no successor of it",
                self.name_of(self.me)
            )));
        }
        let is_done = keys.is_empty() && chosen == Some(master);
        Ok(SealAnew { master, expect: self.state.sealing.map(|sealing| sealing.entry), keys, is_done })
    }

    /// Nothing is sealed under a master key of which a node does not say that it has it.
    pub(crate) fn refuse_exchange(&self, now: Instant, change: &Change) -> Result<(), Refusal> {
        let Change::SealKeys { master, .. } = change else { return Ok(()) };
        for id in self.state.nodes.keys() {
            let said = match *id == self.me {
                true => Some(self.own_masters()),
                false => self.hello_of(now, *id).map(PeerHello::masters),
            };
            let name = self.name_of(*id);
            match said {
                Some(has) if has.has(*master) => {}
                Some(_) => {
                    return Err(Refusal::Conflict(format!(
                        "node `{name}` has not the master key {master}: put it beside the other, as its `master_key_file` \
                         with `.new` at the end, and restart `noded` there"
                    )));
                }
                None => {
                    return Err(Refusal::Conflict(format!(
                        "node `{name}` is not heard, so it may be without the master key {master}: keys are sealed anew when \
                         every node says that it has it"
                    )));
                }
            }
        }
        Ok(())
    }

    /// Keys of the groups that the data plane was told of and that it is to be given: those it was never given, and those that could
    /// not be opened and are sealed under another master key now.
    pub(crate) fn keys_to_open(&mut self, used: &BTreeSet<KeyId>) -> Vec<SealedKey> {
        let mut to_open = Vec::new();
        for sealed in used.iter().filter_map(|key| self.state.keys.get(key)) {
            let is_refused = self.groups.refused_keys.contains_key(&sealed.key);
            match self.groups.opened_under(sealed.key) {
                Some(master) if !is_refused || master == sealed.master => {}
                _ => to_open.push(sealed.clone()),
            }
        }
        for sealed in &to_open {
            self.groups.refused_keys.remove(&sealed.key);
            self.groups.note_opened(sealed);
        }
        to_open
    }
}
