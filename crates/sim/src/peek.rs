//! What really lies on a node's disk at some moment, without touching it: a copy of the disk, opened as after a crash.

use crate::content::value_of;
use crate::history::{Seen, Value};
use crate::world::{CLUSTER, POOL_BYTES, World};
use pollux_base::unit::{BLOCK_BYTES, BlockRange, EXTENT_BLOCKS};
use pollux_base::{
    BlockChecksum, BlockCount, BlockIndex, ByteCount, ExtentIndex, GroupId, Instant, NodeId, Stamp, VolumeId,
};
use pollux_replica::cipher::Cipher;
use pollux_store::faulty_disk::FaultyDisk;
use pollux_store::{Disks, Input, OpenError, Output, StoreError, StoreOp, StoreReply, StoreRequestId};
use std::collections::{BTreeMap, BTreeSet};

pub struct Peek {
    store: Disks,
    disks: Vec<FaultyDisk>,
    /// Which of those that were given these are.
    kept: Vec<usize>,
}

impl Peek {
    /// Opens copies of the disks, as a shell would find the pool among them. What is under way on them is there, lost or torn, as
    /// after a crash at this moment.
    pub fn open(disks: &[FaultyDisk], node: NodeId) -> Result<Peek, String> {
        let mut kept: Vec<usize> = (0..disks.len()).collect();
        loop {
            let error = match Peek::open_these(disks, &kept, node) {
                Ok(peek) => match peek.store.strangers().last() {
                    Some(stranger) => {
                        kept.remove(stranger.index());
                        continue;
                    }
                    None => return Ok(peek),
                },
                Err(error) => error,
            };
            match error {
                Some(OpenError::OneDisk { disk, .. } | OpenError::Out { disk, .. }) if kept.len() > 1 => {
                    kept.remove(disk);
                }
                Some(error) => return Err(error.to_string()),
                None => return Err("the store does not open".into()),
            }
        }
    }

    fn open_these(disks: &[FaultyDisk], kept: &[usize], node: NodeId) -> Result<Peek, Option<OpenError>> {
        let mut disks: Vec<FaultyDisk> = kept.iter().map(|at| disks[*at].clone()).collect();
        disks.iter_mut().for_each(|disk| disk.kill(1));
        let store = Disks::open(CLUSTER, node, &vec![ByteCount(POOL_BYTES); disks.len()]);
        let mut peek = Peek { store, disks, kept: kept.to_vec() };
        loop {
            match peek.step() {
                Some(Output::Opened(result)) => return result.map(|()| peek).map_err(Some),
                Some(_) => {}
                None => return Err(None),
            }
        }
    }

    /// Which of several disks are the pool; none if that can not be told.
    pub fn kept(disks: &[FaultyDisk], node: NodeId) -> Option<Vec<usize>> {
        match disks {
            [_] => None,
            _ => Peek::open(disks, node).ok().map(|peek| peek.kept),
        }
    }

    /// The next output that is not an operation on a disk; those are done at once.
    fn step(&mut self) -> Option<Output> {
        loop {
            match self.store.poll() {
                Some(Output::Disk(op)) => self.disks[op.id.disk.index()].submit(op),
                Some(output) => return Some(output),
                None => {
                    let done = self.disks.iter_mut().find_map(FaultyDisk::complete_any)?;
                    self.store.handle(Instant(1), Input::Disk(done));
                }
            }
        }
    }

    fn ask(&mut self, op: StoreOp) -> Result<StoreReply, StoreError> {
        self.store.handle(Instant(1), Input::Request(StoreRequestId(1), op));
        while let Some(output) = self.step() {
            if let Output::Ended(StoreRequestId(1), result) = output {
                return result;
            }
        }
        Err(StoreError::Disk("the store does not answer".into()))
    }

    /// The volume's size in blocks, if it is there.
    fn blocks_of(&self, volume: VolumeId) -> Option<u64> {
        self.store.volumes().find(|(found, _, _)| *found == volume).map(|(_, _, size)| size.0 / BLOCK_BYTES)
    }

    /// Checksums of an extent; of one that is not there: zeros.
    fn checksums(&mut self, volume: VolumeId, extent: ExtentIndex) -> Result<Vec<BlockChecksum>, String> {
        let nothing = vec![BlockChecksum::ZERO; EXTENT_BLOCKS as usize];
        if self.blocks_of(volume).is_none_or(|blocks| extent.first_block().0 >= blocks) {
            return Ok(nothing);
        }
        match self.ask(StoreOp::Checksums { volume, extent }) {
            Ok(StoreReply::Checksums(checksums)) => Ok(checksums),
            Ok(other) => Err(format!("checksums of {volume} {extent:?}: {other:?}")),
            Err(error) => Err(format!("checksums of {volume} {extent:?}: {error}")),
        }
    }

    /// Every block that is stored, with what it means; a snapshot's were written to the volume that it is `of`. `rotted`:
    /// only by its checksum, whatever became of its bytes. `cipher`: of what is encrypted.
    pub fn contents(
        &mut self,
        volume: VolumeId,
        of: VolumeId,
        cipher: Option<&Cipher>,
        rotted: bool,
    ) -> Result<BTreeMap<u64, (Value, BlockChecksum)>, String> {
        let mut contents = BTreeMap::new();
        for extent in self.store.allocated(volume) {
            let checksums = self.checksums(volume, extent)?;
            let stored = (0..EXTENT_BLOCKS).zip(&checksums).filter(|(_, checksum)| !checksum.is_zero());
            for (index, checksum) in stored {
                let block = extent.first_block().0 + index;
                if rotted {
                    contents.insert(block, (Value::ZERO, *checksum));
                    continue;
                }
                let range = BlockRange::new(BlockIndex(block), BlockCount(1));
                let data = match self.ask(StoreOp::Read { volume, range }) {
                    Ok(StoreReply::Read { data, .. }) => data,
                    other => return Err(format!("{volume} block {block} cannot be read: {other:?}")),
                };
                let data = cipher.map_or(data.clone(), |cipher| cipher.decrypt(range.start, &data));
                contents.insert(block, (value_of(of, block, data.as_slice()), *checksum));
            }
        }
        Ok(contents)
    }

    /// The last record by which the replica of the group says that it holds everything.
    fn held_at(&self, group: GroupId) -> Option<Stamp> {
        let (_, note) = self.store.notes().find(|(noted, _)| *noted == group)?;
        pollux_replica::noted(group, note)?.held
    }

    pub fn known(&self, volume: VolumeId) -> bool {
        self.blocks_of(volume).is_some()
    }
}

impl World {
    /// Before a data plane starts: where its replicas differ from a replica that is in sync, a resync must look.
    pub fn look_behind(&mut self, behind: NodeId) {
        if self.rotted || self.newest.is_empty() {
            return;
        }
        let Ok(mut own) = Peek::open(&self.nodes[&behind].disks, behind) else { return };
        for (group, record) in self.newest.clone() {
            let records = self.records.range((group, LEAST)..).take_while(|((other, _), _)| *other == group);
            let Some(since) = records.filter(|(_, r)| r.in_sync.contains(&behind)).map(|((_, stamp), _)| *stamp).last()
            else {
                continue;
            };
            let volumes = self
                .nodes
                .values()
                .find_map(|node| Some(node.noded.as_ref()?.core.state().groups.get(&group)?.volumes.clone()));
            for source in record.in_sync.iter().filter(|source| **source != behind) {
                let Ok(mut other) = Peek::open(&self.nodes[source].disks, *source) else { continue };
                // A copy that a replica has not made yet is nothing that another is behind.
                let is_there = |(volume, _): &(VolumeId, ByteCount)| other.known(*volume);
                let all: Vec<_> = volumes.clone().unwrap_or_default().into_iter().filter(is_there).collect();
                for (volume, size) in all {
                    // A record by which volumes went back, or are copies, counts at a replica when it has done so. One that
                    // lacks the volume is compared from the beginning.
                    let since = match (own.held_at(group), own.known(volume)) {
                        (Some(held), true) if self.copies.went_back_since(group, held) => held.min(since),
                        (_, true) => since,
                        (_, false) => LEAST,
                    };
                    let mut candidates = BTreeSet::new();
                    for peek in [&own, &other] {
                        if peek.known(volume) {
                            candidates.extend(peek.store.hot(volume));
                            candidates.extend(peek.store.changed_since(volume, since.generation));
                        }
                    }
                    let mut differing = BTreeSet::new();
                    for extent in BlockRange::new(BlockIndex(0), BlockCount(size.0 / BLOCK_BYTES)).extents() {
                        match (own.checksums(volume, extent), other.checksums(volume, extent)) {
                            (Ok(a), Ok(b)) if a == b => {}
                            (Ok(_), Ok(_)) => {
                                differing.insert(extent);
                            }
                            (Err(text), _) | (_, Err(text)) => self.trace.line(self.now, || text),
                        }
                    }
                    self.see(Seen::Behind { volume, source: *source, behind, differing, candidates });
                }
            }
        }
    }

    /// All is healed and quiet: what does every replica hold?
    pub fn look_at_replicas(&mut self) {
        for id in self.ids() {
            let mut peek = match Peek::open(&self.nodes[&id].disks, id) {
                Ok(peek) => peek,
                Err(text) => return self.fail("replicas_converge", format!("{id}: {text}")),
            };
            // What a node keeps for itself alone has numbers that no log mints.
            let volumes: Vec<_> = peek.store.volumes().filter(|(volume, ..)| volume.0 >> 60 == 0).collect();
            for (volume, group, _) in volumes {
                let Some(record) = self.newest.get(&group) else { continue };
                let in_sync = record.in_sync.contains(&id);
                let origin = self.told_by(volume);
                match peek.contents(volume, origin, self.cipher_of(origin).as_deref(), self.rotted) {
                    Ok(blocks) => {
                        let values = blocks.iter().map(|(block, (value, _))| (*block, *value)).collect();
                        self.see(Seen::Replica { node: id, volume, in_sync, blocks });
                        self.look_at_clone(id, volume, values);
                    }
                    Err(text) => self.fail("replicas_converge", format!("{id}: {text}")),
                }
            }
        }
    }
}

/// Below every stamp.
const LEAST: pollux_base::Stamp =
    pollux_base::Stamp { epoch: pollux_base::Epoch(0), generation: pollux_base::Generation(0) };
