//! Changes of the pool's disks: asked for by a human, carried out by the store, told when they are done.

use crate::data_plane::DataPlane;
use pollux_base::Report;
use pollux_store::{DiskChange, StoreRequestId};
use std::collections::BTreeMap;

/// Changes that have not ended, by the number that the store knows.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    asked: BTreeMap<StoreRequestId, u64>,
    ended: Vec<Report>,
}

impl Changes {
    /// Something else that a human asked for of the pool has ended.
    pub(crate) fn end(&mut self, id: u64, result: Result<(), String>) {
        self.ended.push(Report::DiskChanged { id, result });
    }
}

impl DataPlane {
    pub(crate) fn on_disk_change(&mut self, id: u64, change: DiskChange) {
        let request = StoreRequestId(self.node.next_number());
        self.changes.asked.insert(request, id);
        self.node.store.change_disks(request, change);
    }

    pub(crate) fn on_disks_changed(&mut self, request: StoreRequestId, result: Result<(), String>) {
        let id = self.changes.asked.remove(&request).expect("the store ends each change once");
        self.changes.end(id, result);
    }

    /// After the pool as it is now was told: whoever hears of the end knows what has come of it.
    pub(crate) fn report_changes(&mut self) {
        for report in std::mem::take(&mut self.changes.ended) {
            self.node.report(report);
        }
    }
}
