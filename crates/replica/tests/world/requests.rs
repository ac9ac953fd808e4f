//! What guests ask for, and what the replicas hold in the end.

use super::*;
use pollux_replica::cipher::Cipher;
use pollux_store::{Store, StoreReply, StoreRequestId};

impl World {
    pub fn request(&mut self, node: NodeId, op: Op) -> RequestId {
        self.request_of(node, VOLUME, op)
    }

    pub fn request_of(&mut self, node: NodeId, volume: VolumeId, op: Op) -> RequestId {
        let id = RequestId(self.next_request);
        self.next_request += 1;
        self.input(node, Input::Request(Request { id, volume, op }));
        id
    }

    pub fn write(&mut self, node: NodeId, start: u64, count: u64, value: u64) -> RequestId {
        self.request(node, Op::Write { range: range(start, count), data: blocks(value, count), fua: false })
    }

    pub fn answer(&self, id: RequestId) -> Option<&Reply> {
        self.replies.get(&id)
    }

    /// Writes and waits for the acknowledgement.
    pub fn write_done(&mut self, node: NodeId, start: u64, count: u64, value: u64) {
        let id = self.write(node, start, count, value);
        self.until("write acknowledged", |world| world.answer(id).is_some());
        assert_eq!(self.answer(id), Some(&Reply::Done));
    }

    pub fn flush_done(&mut self, node: NodeId) {
        let id = self.request(node, Op::Flush);
        self.until("flush acknowledged", |world| world.answer(id).is_some());
        assert_eq!(self.answer(id), Some(&Reply::Done));
    }

    pub fn read_value(&mut self, node: NodeId, block: u64) -> u64 {
        let values = self.read_values(node, block);
        assert!(values.iter().all(|value| *value == values[0]), "a torn block: {values:?}");
        values[0]
    }

    pub fn read_values(&mut self, node: NodeId, block: u64) -> [u64; 8] {
        let id = self.request(node, Op::Read { range: range(block, 1) });
        self.until("read answered", |world| world.answer(id).is_some());
        match self.answer(id) {
            Some(Reply::Data(data)) => values_of(data.as_slice()),
            other => panic!("read of {block} gave {other:?}"),
        }
    }

    /// What the replica on the node's disk says in each block: a copy of the disk is opened beside it.
    pub fn contents(&self, node: NodeId) -> Vec<u64> {
        self.sectors(node).into_iter().map(|values| values[0]).collect()
    }

    /// As `contents`, for blocks that may be torn.
    pub fn sectors(&self, node: NodeId) -> Vec<[u64; 8]> {
        self.sectors_of(node, VOLUME)
    }

    /// As `sectors`, of another volume.
    pub fn sectors_of(&self, node: NodeId, volume: VolumeId) -> Vec<[u64; 8]> {
        self.whole(node, volume).0.as_slice().chunks(BLOCK_BYTES as usize).map(values_of).collect()
    }

    /// Blocks that take space on the node's disk.
    pub fn stored(&self, node: NodeId) -> Vec<u64> {
        let checksums = self.whole(node, VOLUME).1;
        (0..).zip(checksums).filter(|(_, checksum)| !checksum.is_zero()).map(|(block, _)| block).collect()
    }

    fn whole(&self, node: NodeId, volume: VolumeId) -> (Data, Vec<BlockChecksum>) {
        let mut disk = self.machines[&node].disk.clone();
        disk.kill(1);
        let mut store = Store::open(CLUSTER, node, ByteCount(disk.size()));
        let mut done = drain(&mut store, &mut disk);
        assert!(done.is_empty());
        let whole = range(0, BLOCKS);
        store.handle(self.now, pollux_store::Input::Request(StoreRequestId(1), StoreOp::Read { volume, range: whole }));
        done = drain(&mut store, &mut disk);
        match done.pop() {
            Some(Ok(StoreReply::Read { data, checksums })) => {
                match (self.spec.keys.get(&VOLUME), self.secrets.values().next()) {
                    (Some(key), Some(secret)) => {
                        let cipher = Cipher::new(*key, secret).expect("its own key");
                        (cipher.decrypt(BlockIndex(0), &data), checksums)
                    }
                    _ => (data, checksums),
                }
            }
            other => panic!("{node}: {other:?}"),
        }
    }

    /// The nodes hold the same.
    pub fn same(&mut self, nodes: &[NodeId]) {
        self.run_for(ms(20));
        let expected = self.sectors(nodes[0]);
        for node in &nodes[1..] {
            assert!(self.sectors(*node) == expected, "{node} holds what {} does", nodes[0]);
        }
    }
}

/// Lets a store finish what it does.
fn drain(store: &mut Store, disk: &mut FaultyDisk) -> Vec<Result<StoreReply, pollux_store::StoreError>> {
    let mut ended = Vec::new();
    loop {
        while let Some(output) = store.poll() {
            match output {
                pollux_store::Output::Disk(op) => disk.submit(op),
                pollux_store::Output::Opened(result) => result.expect("the pool is well"),
                pollux_store::Output::Ended(_, result) => ended.push(result),
                pollux_store::Output::Changed(..) | pollux_store::Output::Close(_) => {
                    unreachable!("nobody changes its disks")
                }
            }
        }
        let Some(done) = disk.complete_any() else { return ended };
        store.handle(Instant(0), pollux_store::Input::Disk(done));
    }
}
