//! How far the pool's disks were seen, kept in the node's state directory: disks that have not come so far when they are opened
//! are an image of an earlier day.
//!
//! What is kept was durable on the disks before: it is never ahead of them, whatever dies when. It may be behind.

use crate::state_file;
use pollux_base::config::NodeConfig;
use pollux_base::{DiskId, Instant};
use pollux_store::{Disks, Position};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;
use tracing::warn;

/// Kept at most so often: an image of a few seconds ago is nobody's backup, and a small file costs nothing then.
const KEEP_EVERY: Duration = Duration::from_secs(5);

type Positions = BTreeMap<DiskId, Position>;

fn file(config: &NodeConfig) -> PathBuf {
    config.state_dir.join("pool-seen.json")
}

/// What was seen; nothing if the file is not there or says nothing, for then nothing can be told.
pub fn read(config: &NodeConfig) -> Positions {
    let path = file(config);
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Positions::new(),
        Err(cause) => {
            warn!(path = %path.display(), %cause, "an image of an earlier day would not be noticed here");
            return Positions::new();
        }
    };
    serde_json::from_slice(&text).unwrap_or_else(|cause| {
        warn!(path = %path.display(), %cause, "an image of an earlier day would not be noticed here");
        Positions::new()
    })
}

/// Replaces the file, durably.
pub fn write(config: &NodeConfig, positions: &Positions) -> io::Result<()> {
    replace(&file(config), positions)
}

fn replace(path: &Path, positions: &Positions) -> io::Result<()> {
    state_file::replace(path, &serde_json::to_vec(positions)?)
}

/// Keeps what is seen, on a thread of its own: the state directory may be on a slow disk, and guests do not wait for it.
pub struct Seen {
    keeper: SyncSender<Positions>,
    thread: JoinHandle<()>,
    kept: Positions,
    next: Instant,
}

impl Seen {
    pub fn keep(config: &NodeConfig) -> Seen {
        let path = file(config);
        // One on its way is enough: whatever is missed is followed by something newer.
        let (keeper, positions) = sync_channel::<Positions>(1);
        let thread = std::thread::spawn(move || {
            for positions in positions {
                if let Err(cause) = replace(&path, &positions) {
                    warn!(path = %path.display(), %cause, "how far the pool has come can not be kept");
                }
            }
        });
        Seen { keeper, thread, kept: Positions::new(), next: Instant(0) }
    }

    pub fn on_turn(&mut self, now: Instant, pool: &Disks) {
        if now < self.next {
            return;
        }
        self.next = now + KEEP_EVERY;
        let positions = pool.positions();
        // Before the pool is open there are none.
        if !positions.is_empty() && positions != self.kept && self.keeper.try_send(positions.clone()).is_ok() {
            self.kept = positions;
        }
    }

    /// The daemon ends as asked, and nobody waits for it: what it saw last is kept, too.
    pub fn end(self, pool: &Disks) {
        let positions = pool.positions();
        if !positions.is_empty() {
            let _ = self.keeper.send(positions);
        }
        drop(self.keeper);
        let _ = self.thread.join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_read_again() -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("state/pool-seen.json");
        let positions = BTreeMap::from([(DiskId(7), Position { changes: 3, journal: 4 })]);
        for positions in [Positions::new(), positions] {
            replace(&path, &positions)?;
            assert_eq!(serde_json::from_slice::<Positions>(&std::fs::read(&path)?)?, positions);
        }
        Ok(())
    }
}
