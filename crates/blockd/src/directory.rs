//! What is offered under which name and where, made of orders and of what the core says it serves. Pure.

use pollux_base::config::NodeConfig;
use pollux_base::order::Offer;
use pollux_base::record::GroupSpec;
use pollux_base::{ByteCount, GroupId, NodeId, Order, VolumeId};
use pollux_frontend::{Export, Exports, Place};
use std::collections::{BTreeMap, BTreeSet};

pub struct Directory {
    own: NodeId,
    /// How each other node is called and where it serves NBD, for humans.
    hints: BTreeMap<NodeId, String>,
    /// `None` until the first order says.
    names: Option<BTreeMap<String, Offer>>,
    groups: BTreeMap<GroupId, GroupSpec>,
    served: BTreeSet<VolumeId>,
    /// Sizes of what this node keeps for itself alone: no record names them.
    kept: BTreeMap<VolumeId, ByteCount>,
    exports: Exports,
}

impl Directory {
    pub fn new(config: &NodeConfig) -> Directory {
        let hint = |node: &pollux_base::config::NodeAddresses| {
            let addresses: Vec<String> = node.nbd.iter().map(ToString::to_string).collect();
            format!("node `{}` serves it at {}", node.name, addresses.join(" and "))
        };
        Directory {
            own: config.node,
            hints: config.peers().map(|node| (node.node, hint(node))).collect(),
            names: None,
            groups: BTreeMap::new(),
            served: BTreeSet::new(),
            kept: BTreeMap::new(),
            exports: Exports::default(),
        }
    }

    pub fn exports(&self) -> &Exports {
        &self.exports
    }

    /// Whether the offer has changed.
    pub fn on_order(&mut self, order: &Order) -> bool {
        match order {
            Order::Group(spec) => {
                let known = self.groups.get(&spec.group);
                if known.is_none_or(|known| known.record.stamp <= spec.record.stamp) {
                    self.groups.insert(spec.group, spec.clone());
                }
            }
            Order::Forget { group } => {
                self.groups.remove(group);
            }
            Order::Exports { names } => self.names = Some(names.clone()),
            Order::Fenced { .. }
            | Order::Peers { .. }
            | Order::LinkKey { .. }
            | Order::VolumeKey { .. }
            | Order::Discard { .. }
            | Order::Names { .. }
            | Order::Scrub { .. }
            | Order::Compare { .. }
            | Order::Disk { .. }
            | Order::Verify { .. }
            | Order::DropKept { .. }
            | Order::ReportAll => return false,
        }
        self.renew()
    }

    /// The core takes clients for a volume, or does not any more. Whether the offer has changed.
    pub fn on_served(&mut self, volume: VolumeId, served: bool) -> bool {
        if served {
            self.served.insert(volume);
        } else {
            self.served.remove(&volume);
        }
        self.renew()
    }

    /// What this node keeps for itself alone is there, or (without a size) is not any more.
    pub fn on_kept(&mut self, volume: VolumeId, size: Option<ByteCount>) -> bool {
        match size {
            Some(size) => self.kept.insert(volume, size),
            None => self.kept.remove(&volume),
        };
        self.renew()
    }

    fn renew(&mut self) -> bool {
        let Some(names) = &self.names else { return false };
        let offer = names.iter().map(|(name, offer)| (name.clone(), self.export(*offer))).collect();
        let exports = Exports::complete(offer);
        let is_changed = exports != self.exports;
        self.exports = exports;
        is_changed
    }

    fn export(&self, offer: Offer) -> Export {
        let Offer { volume, is_public, is_read_only } = offer;
        let export = |size, place| Export { volume, size, is_read_only, is_public, place };
        if let Some(size) = self.kept.get(&volume) {
            return export(*size, Place::Here);
        }
        let known = self.groups.values().find_map(|spec| Some((spec.record.primary, spec.size(volume)?)));
        // Orders come in any order: the group of a volume that has a name is about to be told.
        let Some((primary, size)) = known else { return export(ByteCount(0), Place::Soon) };
        let place = if self.served.contains(&volume) {
            Place::Here
        } else if primary == self.own {
            Place::Soon
        } else {
            let unknown = || format!("node {primary} serves it");
            Place::Elsewhere(self.hints.get(&primary).cloned().unwrap_or_else(unknown))
        };
        export(size, place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pollux_base::record::{GroupRecord, LagBound, Lineage, Stamp};
    use pollux_base::{Epoch, Generation};
    use pollux_frontend::Found;

    fn directory() -> Directory {
        Directory {
            own: NodeId(1),
            hints: BTreeMap::from([(NodeId(2), "node `b` serves it at 192.0.2.2:10809".to_owned())]),
            names: None,
            groups: BTreeMap::new(),
            served: BTreeSet::new(),
            kept: BTreeMap::new(),
            exports: Exports::default(),
        }
    }

    fn group(generation: u64, primary: u64) -> Order {
        let stamp = Stamp { epoch: Epoch(1), generation: Generation(generation) };
        let both = BTreeSet::from([NodeId(1), NodeId(2)]);
        Order::Group(GroupSpec {
            group: GroupId(1),
            replicas: both.clone(),
            modes: BTreeMap::new(),
            lag: LagBound::default(),
            volumes: BTreeMap::from([(VolumeId(7), ByteCount(1 << 20))]),
            keys: BTreeMap::new(),
            snapshots: Default::default(),
            record: GroupRecord { stamp, primary: NodeId(primary), in_sync: both },
            lineage: Lineage::default(),
        })
    }

    fn names() -> Order {
        let offer = Offer { volume: VolumeId(7), is_public: false, is_read_only: false };
        Order::Exports { names: BTreeMap::from([("disk".to_owned(), offer)]) }
    }

    #[test]
    fn what_a_node_keeps_for_itself_is_served_as_long_as_it_is_there() {
        let mut directory = directory();
        let volume = pollux_base::Kept::BeforeResync { of: VolumeId(7) }.volume();
        let offer = Offer { volume, is_public: true, is_read_only: true };
        directory.on_order(&Order::Exports { names: BTreeMap::from([("kept/v7-before-resync".to_owned(), offer)]) });
        assert!(matches!(directory.exports().find("kept/v7-before-resync", true), Found::Soon(_)));
        assert!(directory.on_kept(volume, Some(ByteCount(1 << 20))));
        assert!(matches!(directory.exports().find("kept/v7-before-resync", true),
            Found::Here(export) if export.is_read_only && export.size == ByteCount(1 << 20)));
        assert!(directory.on_kept(volume, None));
        assert!(!matches!(directory.exports().find("kept/v7-before-resync", true), Found::Here(_)));
    }

    #[test]
    fn an_export_follows_its_primary() {
        let mut directory = directory();
        assert!(matches!(directory.exports().find("disk", false), Found::Soon(_)), "nothing is known yet");
        directory.on_order(&group(1, 1));
        assert!(directory.on_order(&names()));
        assert!(matches!(directory.exports().find("disk", false), Found::Soon(_)), "not served yet");
        assert!(directory.on_served(VolumeId(7), true));
        assert!(
            matches!(directory.exports().find("disk", false), Found::Here(export) if export.size == ByteCount(1 << 20))
        );
        assert!(matches!(directory.exports().find("disk", true), Found::No(_)), "it is not for other machines");
        assert_eq!(directory.exports().here(true).count(), 0);
        directory.on_served(VolumeId(7), false);
        directory.on_order(&group(2, 2));
        assert!(matches!(directory.exports().find("disk", false), Found::No(why) if why.contains("192.0.2.2")));
        assert!(!directory.on_order(&group(1, 1)), "an older record changes nothing");
        assert!(matches!(directory.exports().find("other", false), Found::No(_)));
        directory.on_order(&Order::Forget { group: GroupId(1) });
        assert!(matches!(directory.exports().find("disk", false), Found::Soon(_)));
        directory.on_order(&Order::Exports { names: BTreeMap::new() });
        assert!(matches!(directory.exports().find("disk", false), Found::No(_)));
    }
}
