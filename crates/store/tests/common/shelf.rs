//! The disks of a history: some join and leave while it runs.

use super::*;
use pollux_base::pool::{DiskReport, DiskState};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    In,
    /// It was asked to join or to leave, and that has not ended.
    Unsure,
    Out,
}

/// Which disks there are, in the order in which the rig has them.
pub struct Shelf {
    disks: Vec<(DiskId, Standing)>,
    made: u128,
    asked: Option<(StoreRequestId, usize, Standing)>,
}

impl Shelf {
    pub fn new() -> Shelf {
        Shelf { disks: vec![(IDENTITY.disk, Standing::In)], made: 1, asked: None }
    }

    /// Asks for some change, unless one is under way.
    pub fn ask(&mut self, rig: &mut Rig, luck: &mut Luck) {
        if self.asked.is_some() {
            return;
        }
        let Some(next) = rig.store.next_disk() else { return };
        let members = rig.store.disks();
        let standing: Vec<&DiskReport> = members.iter().filter(|disk| disk.state != DiskState::Failed).collect();
        if standing.len() < 3 && luck.one_in(2) && self.disks.len() < 12 {
            self.made += 1;
            let disk = DiskId(self.made);
            let at = next.index();
            // One that was there did not join.
            self.disks.truncate(at);
            rig.more.truncate(at - 1);
            self.disks.push((disk, Standing::Unsure));
            rig.more.push(FaultyDisk::new(SIZE, self.made as u64));
            let id = rig.ask_disks(DiskChange::Join {
                disk,
                size: ByteCount(SIZE),
                path: String::new(),
                may_overwrite: false,
            });
            self.asked = Some((id, at, Standing::In));
            return self.gather(rig);
        }
        let known = standing[luck.below(standing.len() as u64) as usize].clone();
        let at = self.disks.iter().position(|(disk, _)| *disk == known.disk).expect("members were asked to join");
        let change = match known.state {
            DiskState::Healthy => DiskChange::Drain { disk: known.disk },
            DiskState::Drained => DiskChange::Remove { disk: known.disk },
            _ => DiskChange::Undrain { disk: known.disk },
        };
        let then = match change {
            DiskChange::Remove { .. } => {
                self.disks[at].1 = Standing::Unsure;
                Standing::Out
            }
            _ => Standing::In,
        };
        let id = rig.ask_disks(change);
        self.asked = Some((id, at, then));
        self.gather(rig);
    }

    /// Takes in what has ended.
    pub fn gather(&mut self, rig: &mut Rig) {
        if let Some((id, at, then)) = self.asked
            && let Some(result) = rig.changed.remove(&id)
        {
            self.asked = None;
            self.disks[at].1 = match result {
                Ok(()) => then,
                // What was refused is as it was; a disk that could not join is none.
                Err(_) if then == Standing::In && self.disks[at].1 == Standing::Unsure => Standing::Out,
                Err(_) => Standing::In,
            };
        }
    }

    /// After a crash: the disks that are the pool, found as a shell would find them.
    pub fn usable(&mut self, disks: Vec<FaultyDisk>) -> Result<Vec<FaultyDisk>, String> {
        self.asked = None;
        let kept = |(_, standing): &(DiskId, Standing)| *standing != Standing::Out;
        let (mut disks, mut known): (Vec<FaultyDisk>, Vec<(DiskId, Standing)>) =
            disks.into_iter().zip(self.disks.drain(..)).filter(|(_, disk)| kept(disk)).unzip();
        if known.iter().all(|(_, standing)| *standing == Standing::In) {
            self.disks = known;
            return Ok(disks);
        }
        loop {
            let error = match Rig::open_all(disks.clone()) {
                Ok(rig) => {
                    // One that was about to join and did not is there, and no member.
                    let members = rig.store.disks();
                    let is_member = |(disk, _): &(DiskId, Standing)| {
                        members.iter().any(|known| known.disk == *disk && known.state != DiskState::Failed)
                    };
                    // As this opening left them: it has made the answer last.
                    let (disks, known): (Vec<FaultyDisk>, Vec<(DiskId, Standing)>) =
                        rig.into_disks().into_iter().zip(known).filter(|(_, disk)| is_member(disk)).unzip();
                    self.disks = known.into_iter().map(|(disk, _)| (disk, Standing::In)).collect();
                    return Ok(disks);
                }
                Err(error) => error,
            };
            let at = match &error {
                OpenError::OneDisk { disk, .. } | OpenError::Out { disk, .. } => *disk,
                _ => return Err(format!("not opened: {error}")),
            };
            if known[at].1 != Standing::Unsure {
                return Err(format!("not opened: {error}"));
            }
            disks.remove(at);
            known.remove(at);
        }
    }
}
