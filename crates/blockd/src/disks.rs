//! Orders about the pool's disks on their way to the store and back: a path becomes an open disk under the number that the store gives,
//! and what leaves is closed and taken off the list.

use crate::keeper::{Keeper, Opened};
use crate::{Turn, random};
use pollux_base::order::DiskCommand;
use pollux_base::{DiskId, Report};
use pollux_replica::{DataPlane, Input};
use pollux_store::DiskChange;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// What becomes of a path when the change that it belongs to has ended.
struct Listed {
    path: PathBuf,
    /// It leaves the list if this is how it ended.
    forgotten_if_ok: bool,
}

/// One after the other, each in the order in which it came.
#[derive(Default)]
pub struct DiskOrders {
    ready: Vec<Ready>,
    listed: BTreeMap<u64, Listed>,
}

enum Ready {
    Change { id: u64, change: DiskChange },
    Join(Opened),
}

impl DiskOrders {
    pub fn on_order(&mut self, plane: &DataPlane, keeper: &Keeper, id: u64, command: DiskCommand) {
        let change = match command {
            DiskCommand::Add { path, may_overwrite } => return keeper.open(id, path, may_overwrite),
            DiskCommand::Drain { disk } => DiskChange::Drain { disk },
            DiskCommand::Undrain { disk } => DiskChange::Undrain { disk },
            DiskCommand::Remove { disk } => DiskChange::Remove { disk },
            DiskCommand::LetGo { disk } => DiskChange::LetGo { disk },
        };
        if let DiskChange::Remove { disk } | DiskChange::LetGo { disk } = &change
            && let Some(known) = plane.store().disks().into_iter().find(|known| known.disk == *disk)
        {
            self.listed.insert(id, Listed { path: known.path.into(), forgotten_if_ok: true });
        }
        self.ready.push(Ready::Change { id, change });
    }

    pub fn on_opened(&mut self, keeper: &mut Keeper) {
        self.ready.extend(keeper.take_opened().into_iter().map(Ready::Join));
    }

    /// Hands over what is ready, unless the pool has something to note first. What could not be is answered here.
    pub fn hand_over(&mut self, turn: &mut Turn<'_>, plane: &mut DataPlane, keeper: &Keeper) -> Vec<Report> {
        let mut reports = Vec::new();
        if plane.store().is_noting() {
            return reports;
        }
        for ready in std::mem::take(&mut self.ready) {
            let (id, change) = match ready {
                Ready::Change { id, change } => (id, change),
                Ready::Join(Opened { id, disk: Err(reason), .. }) => {
                    reports.push(Report::DiskChanged { id, result: Err(reason) });
                    continue;
                }
                Ready::Join(Opened { id, path, may_overwrite, disk: Ok(disk) }) => {
                    let Some(index) = plane.store().next_disk() else {
                        keeper.forget(path);
                        let reason =
                            "the pool is being opened or changed, or can not be used; look with `pollux pool show`";
                        reports.push(Report::DiskChanged { id, result: Err(reason.to_owned()) });
                        continue;
                    };
                    let size = disk.size();
                    turn.reactor.put_disk(index, disk);
                    let (new, text) = (DiskId(u128::from_le_bytes(random())), path.display().to_string());
                    self.listed.insert(id, Listed { path, forgotten_if_ok: false });
                    (id, DiskChange::Join { disk: new, size, path: text, may_overwrite })
                }
            };
            plane.handle(turn.now, Input::DiskChange { id, change });
        }
        reports
    }

    /// A change has ended: the list follows.
    pub fn on_ended(&mut self, keeper: &Keeper, id: u64, is_ok: bool) {
        if let Some(listed) = self.listed.remove(&id).filter(|listed| listed.forgotten_if_ok == is_ok) {
            keeper.forget(listed.path);
        }
    }
}
