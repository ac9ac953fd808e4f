//! Media that decay beneath a running data plane, and the scrubs that find it.

use crate::content;
use crate::node::Process;
use crate::world::World;
use pollux_base::{GroupId, NodeId};
use pollux_cluster::Change;
use pollux_store::faulty_disk::FaultyDisk;
use std::time::Duration;

impl World {
    /// A write that was meant for one place landed at another: the other then holds what belongs elsewhere.
    pub fn lead_astray(&mut self, node: NodeId) {
        let pages = self.guests_pages(node);
        if pages.len() < 2 {
            return;
        }
        self.rotted = true;
        let from = pages[self.luck.below(pages.len() as u64) as usize];
        let to = pages[self.luck.below(pages.len() as u64) as usize];
        let bytes = self.nodes[&node].disks[0].read_now(from * 4096, 4096);
        self.trace.line(self.now, || format!("{node} disk: page {to} holds what belongs to {from}"));
        self.node(node).disks[0].write_now(to * 4096, &bytes);
    }

    /// A write that the disk said it had made was not: the place still holds what it did on `before`.
    pub fn lose_a_write(&mut self, node: NodeId, before: &FaultyDisk) {
        let is_encrypted = self.settings.encrypted;
        let changed = |page: &u64| {
            let old = before.read_now(page * 4096, 4096);
            content::is_guests(&old, is_encrypted) && old != self.nodes[&node].disks[0].read_now(page * 4096, 4096)
        };
        let pages: Vec<u64> = self.guests_pages(node).into_iter().filter(changed).collect();
        if pages.is_empty() {
            return;
        }
        self.rotted = true;
        let page = pages[self.luck.below(pages.len() as u64) as usize];
        self.trace.line(self.now, || format!("{node} disk: the last write to page {page} is lost"));
        let old = before.read_now(page * 4096, 4096);
        self.node(node).disks[0].write_now(page * 4096, &old);
    }

    /// Pages of the disk that hold what guests wrote.
    pub fn guests_pages(&self, node: NodeId) -> Vec<u64> {
        let disk = &self.nodes[&node].disks[0];
        let is_encrypted = self.settings.encrypted;
        disk.blocks().filter(|(_, page)| content::is_guests(page, is_encrypted)).map(|(page, _)| page).collect()
    }

    /// Somebody asks for a scrub of every group.
    pub fn want_scrubs(&mut self) {
        let Some(id) = self.ids().into_iter().find(|node| self.nodes[node].is_active(Process::Noded)) else { return };
        let Some(noded) = &self.nodes[&id].noded else { return };
        let groups: Vec<GroupId> = noded.core.state().groups.keys().copied().collect();
        for group in groups {
            let (request, unix_ms) = (self.number(), self.unix_ms(id));
            let change = Box::new(Change::ScrubGroup { group, expect: None });
            self.tell_core(id, Duration::ZERO, pollux_cluster::Input::Request { request, unix_ms, change });
        }
    }

    /// Whether every node knows that each group is to be scrubbed, or that it was since.
    pub fn are_scrubs_wanted(&self, since: &[(GroupId, u64)]) -> bool {
        let noded = self.nodes.values().filter_map(|node| node.noded.as_ref());
        noded.flat_map(|noded| &noded.core.state().groups).all(|(id, group)| {
            since.iter().find(|(other, _)| other == id).is_none_or(|(_, before)| group.scrubs.wanted > *before)
        })
    }

    /// Every group was scrubbed since, with nothing lost.
    pub fn are_scrubbed(&self, since: &[(GroupId, u64)]) -> Result<(), String> {
        for node in self.nodes.values() {
            let Some(noded) = &node.noded else { return Err(format!("{}: noded does not run", node.id)) };
            for (group, before) in since {
                let Some(found) = noded.core.state().groups.get(group) else { continue };
                let Some(last) = found.scrubs.last.as_ref().filter(|last| last.report.id > *before) else {
                    return Err(format!("{}: {group} is not scrubbed yet", node.id));
                };
                if last.report.lost_blocks > 0 {
                    return Err(format!("{group}: {:?}", last.report));
                }
            }
        }
        Ok(())
    }

    /// The number of each group's newest scrub that has ended.
    pub fn scrubs(&self) -> Vec<(GroupId, u64)> {
        let noded = self.nodes.values().find_map(|node| node.noded.as_ref());
        let groups = noded.into_iter().flat_map(|noded| noded.core.state().groups.iter());
        groups.map(|(id, group)| (*id, group.scrubs.last.as_ref().map_or(0, |last| last.report.id))).collect()
    }
}
