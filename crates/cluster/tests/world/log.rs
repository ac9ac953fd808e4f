//! The model of the log: an entry counts when all voters have it, and forcing makes another history.

use super::{A, B, World};
use pollux_base::NodeId;
use pollux_cluster::{Entry, Input};
use std::collections::BTreeSet;

/// One history of entries. Forcing makes another one that begins with the same entries.
#[derive(Clone, Default)]
pub struct Log {
    pub entries: Vec<Entry>,
    pub voters: BTreeSet<NodeId>,
    pub learners: BTreeSet<NodeId>,
    /// Somebody forced itself out of it: it may never grow again.
    pub is_dead: bool,
}

impl World {
    /// Commits what can be committed and tells each node of its log.
    pub(super) fn move_log(&mut self) {
        for node in [A, B] {
            if self.servers[&node].noded.is_none() {
                continue;
            }
            let sight = match self.servers[&node].log {
                None => (None, vec![], vec![]),
                Some(id) => {
                    let leader = self.leader(id).filter(|leader| *leader == node || self.connected());
                    let log = &self.logs[id];
                    (leader, log.voters.iter().copied().collect(), log.learners.iter().copied().collect())
                }
            };
            if self.servers[&node].told.as_ref() != Some(&sight) {
                self.server(node).told = Some(sight.clone());
                let (leader, voters, learners) = sight;
                self.give(node, Input::Log { leader, voters, learners });
            }
            // Replication, then what is committed here.
            if let Some(id) = self.servers[&node].log {
                let len = self.logs[id].entries.len();
                let is_fed = self.leader(id).is_some_and(|leader| leader == node || self.connected());
                let server = self.server(node);
                if is_fed {
                    server.has = len;
                }
                while self.servers[&node].log == Some(id) && self.servers[&node].given < self.servers[&node].has {
                    let given = self.servers[&node].given;
                    let entry = self.logs[id].entries[given].clone();
                    self.server(node).given += 1;
                    self.give(node, Input::Committed { index: given as u64 + 1, entry });
                    if self.servers[&node].noded.is_none() {
                        break;
                    }
                }
            }
        }
    }

    /// A log has a leader when all its voters (two, or one alone) have it and are connected.
    pub(super) fn leader(&self, id: usize) -> Option<NodeId> {
        let log = &self.logs[id];
        let has = |node: &NodeId| self.servers[node].noded.is_some() && self.servers[node].log == Some(id);
        let all = log.voters.iter().all(has) && (log.voters.len() == 1 || self.connected());
        log.voters.first().copied().filter(|_| all)
    }
}
