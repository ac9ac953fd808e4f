//! What a trailing replica would serve if a human promoted it at this moment, told without touching it: a data plane of its
//! own runs on a copy of the node's disk after a power cut, is promoted, and everything that is stored is read through it.

use crate::content::value_of;
use crate::history::{Seen, Value};
use crate::world::{CLUSTER, POOL_BYTES, World};
use pollux_base::order::{GroupReport, ReplicaState};
use pollux_base::record::{GroupRecord, GroupSpec};
use pollux_base::unit::{BLOCK_BYTES, BlockRange, EXTENT_BLOCKS};
use pollux_base::{
    BlockCount, BlockIndex, ByteCount, Epoch, GroupId, Instant, NodeId, Op, Order, Reply, Report, Request, RequestId,
    Stamp, VolumeId,
};
use pollux_replica::{Config, DataPlane, Input, Output};
use pollux_store::faulty_disk::FaultyDisk;
use std::collections::BTreeMap;
use std::time::Duration;

/// What each block holds that is stored.
type Served = BTreeMap<(VolumeId, u64), Value>;

struct Alone {
    plane: DataPlane,
    disk: FaultyDisk,
    now: Instant,
    report: Option<GroupReport>,
    replies: BTreeMap<RequestId, Reply>,
}

impl Alone {
    fn give(&mut self, input: Input) {
        self.plane.handle(self.now, input);
        loop {
            match self.plane.poll() {
                Some(Output::Disk(op)) => self.disk.submit(op),
                Some(Output::Report(Report::Group(report))) => self.report = Some(*report),
                Some(Output::Reply(id, reply)) => {
                    self.replies.insert(id, reply);
                }
                Some(_) => {}
                None => match self.disk.complete_any() {
                    Some(done) => self.plane.handle(self.now, Input::Disk(done)),
                    None => return,
                },
            }
        }
    }
}

/// What is served after a promotion; none if the replica is no cut.
fn promoted(
    mut disk: FaultyDisk,
    node: NodeId,
    mut spec: GroupSpec,
    keys: Vec<Order>,
    luck: u64,
) -> Result<Option<Served>, String> {
    disk.power_cut(luck);
    let config = Config {
        cluster: CLUSTER,
        node,
        disks: vec![ByteCount(POOL_BYTES)],
        paths: Vec::new(),
        boot: u128::from(luck) | 1 << 100,
        seen: BTreeMap::new(),
    };
    let now = Instant(1_000_000_000);
    let mut alone = Alone { plane: DataPlane::new(config, now), disk, now, report: None, replies: BTreeMap::new() };
    alone.give(Input::Tick);
    keys.into_iter().for_each(|key| alone.give(Input::Order(Box::new(key))));
    alone.give(Input::Order(Box::new(Order::Group(spec.clone()))));
    let Some(ReplicaState::Trailing { at }) = alone.report.as_ref().map(|report| report.state.clone()) else {
        return Ok(None);
    };
    let last = spec.record.stamp;
    let stamp = Stamp { epoch: Epoch(last.epoch.0 + 1), generation: last.generation.next() };
    spec.lineage.cut_back_to_before(at);
    spec.lineage.push(stamp);
    spec.modes.remove(&node);
    spec.record = GroupRecord { stamp, primary: node, in_sync: [node].into() };
    alone.give(Input::Order(Box::new(Order::Group(spec.clone()))));
    // The promise that may have been given to the old primary runs out.
    alone.now = alone.now + Duration::from_secs(10);
    alone.give(Input::Tick);
    let mut values = BTreeMap::new();
    let mut number = 0;
    for (volume, size) in &spec.volumes {
        let blocks = size.0 / BLOCK_BYTES;
        for extent in alone.plane.store().allocated(*volume) {
            let start = extent.first_block();
            let count = EXTENT_BLOCKS.min(blocks.saturating_sub(start.0));
            let range = BlockRange::new(BlockIndex(start.0), BlockCount(count));
            number += 1;
            let id = RequestId(number);
            alone.give(Input::Request(Request { id, volume: *volume, op: Op::Read { range } }));
            let Some(Reply::Data(data)) = alone.replies.remove(&id) else {
                return Err(format!("{volume} {range:?} is not answered: {:?}", alone.report));
            };
            for (bytes, block) in data.as_slice().chunks_exact(BLOCK_BYTES as usize).zip(start.0..) {
                values.insert((*volume, block), value_of(*volume, block, bytes));
            }
        }
    }
    Ok(Some(values))
}

impl World {
    /// Shows the invariants what a promotion of the replica on this node would serve now. Whether it could be promoted.
    pub fn look_at_cut(&mut self, node: NodeId, group: GroupId) -> bool {
        let specs = self.nodes.values().filter_map(|node| node.noded.as_ref()?.core.state().group_spec(group));
        let Some(spec) = specs.max_by_key(|spec| spec.record.stamp) else { return false };
        let luck = self.luck.draw();
        match promoted(self.nodes[&node].disks[0].clone(), node, spec, self.key_orders(), luck) {
            Ok(Some(values)) => {
                self.see(Seen::Cut { node, group, values });
                true
            }
            Ok(None) => false,
            Err(text) => {
                self.fail("trailing_is_a_prefix", format!("{node}: {text}"));
                false
            }
        }
    }
}
