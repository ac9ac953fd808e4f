//! In which blocks two volumes of a group differ that are not written to: its snapshots. Told by the replica here alone, from
//! stored checksums; a page at a time, so that an answer is bounded.

use crate::group::Group;
use crate::node::{Node, Purpose};
use pollux_base::order::Differences;
use pollux_base::unit::{BlockRange, EXTENT_BLOCKS};
use pollux_base::{BlockChecksum, BlockCount, BlockIndex, ExtentIndex, Report, VolumeId};
use pollux_store::{LOST_CHECKSUM, StoreError, StoreOp, StoreReply};
use std::collections::VecDeque;

/// A page ends after the extent in which it has so many runs, or has looked at so many extents: some 64 KiB of text.
const RUNS_MAX: usize = 2048;
const EXTENTS_MAX: usize = 1024;

/// One page being made. A newer question takes the place of an older one, which is answered with an error.
#[derive(Debug)]
pub(crate) struct Diff {
    id: u64,
    one: VolumeId,
    two: VolumeId,
    left: VecDeque<ExtentIndex>,
    looked_at: usize,
    /// The first volume's checksums of the first of `left`.
    ours: Option<Vec<BlockChecksum>>,
    runs: Vec<BlockRange>,
}

impl Group {
    pub(crate) fn on_compare_order(&mut self, node: &mut Node, id: u64, pair: (VolumeId, VolumeId), from: ExtentIndex) {
        if let Some(older) = self.diff.take() {
            node.report(Report::Compared { id: older.id, result: Err("somebody else asked, too; ask again".into()) });
        }
        let (one, two) = pair;
        let is_there = |volume| node.store.volumes().any(|(known, group, _)| known == volume && group == self.id);
        if !self.is_member(node)
            || !self.is_frozen_here(one)
            || !self.is_frozen_here(two)
            || !is_there(one)
            || !is_there(two)
        {
            let result = Err("this node's replica does not hold both snapshots".into());
            return node.report(Report::Compared { id, result });
        }
        let left = node.store.differing(one, two).into_iter().filter(|extent| *extent >= from).collect();
        self.diff = Some(Diff { id, one, two, left, looked_at: 0, ours: None, runs: Vec::new() });
        self.step_diff(node);
    }

    /// Whether the record names it as a volume of a snapshot that was taken.
    fn is_frozen_here(&self, volume: VolumeId) -> bool {
        self.ordered_volumes().contains(&(volume, false))
    }

    fn step_diff(&mut self, node: &mut Node) {
        let Some(diff) = &self.diff else { return };
        let is_full = diff.runs.len() >= RUNS_MAX || diff.looked_at >= EXTENTS_MAX;
        let Some(extent) = diff.left.front().copied().filter(|_| !is_full) else {
            let Some(diff) = self.diff.take() else { return };
            let result = Ok(Differences { runs: diff.runs, next: diff.left.front().copied() });
            return node.report(Report::Compared { id: diff.id, result });
        };
        let volume = if diff.ours.is_none() { diff.one } else { diff.two };
        node.request(self.id, Purpose::Compare(diff.id), StoreOp::Checksums { volume, extent });
    }

    pub(crate) fn on_compared(&mut self, node: &mut Node, id: u64, result: Result<StoreReply, StoreError>) {
        let Some(diff) = self.diff.as_mut().filter(|diff| diff.id == id) else { return };
        let checksums = match result {
            Ok(StoreReply::Checksums(checksums)) => checksums,
            // One of the two is smaller: there is nothing there.
            Err(StoreError::OutOfRange) => vec![BlockChecksum::ZERO; EXTENT_BLOCKS as usize],
            Ok(_) => return,
            Err(error) => {
                self.diff = None;
                return node.report(Report::Compared { id, result: Err(error.to_string()) });
            }
        };
        match diff.ours.take() {
            None => diff.ours = Some(checksums),
            Some(ours) => {
                let Some(extent) = diff.left.pop_front() else { return };
                diff.looked_at += 1;
                for (index, (one, two)) in (0..).zip(ours.iter().zip(&checksums)) {
                    // What is damaged may differ.
                    if one != two || *one == LOST_CHECKSUM {
                        add(&mut diff.runs, BlockIndex(extent.first_block().0 + index));
                    }
                }
            }
        }
        self.step_diff(node);
    }
}

/// Adds a block to runs in order.
fn add(runs: &mut Vec<BlockRange>, block: BlockIndex) {
    match runs.last_mut() {
        Some(last) if last.end() == block => last.count.0 += 1,
        _ => runs.push(BlockRange::new(block, BlockCount(1))),
    }
}
