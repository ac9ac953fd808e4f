//! The end of the lease, and the command in effect, on tmpfs: for the guard that comes after this one.
//!
//! One line of JSON, written over in place. The boot id voids it after a reboot, even if the folder was not on tmpfs.

use pollux_base::Instant;
use pollux_base::guard::GuardCommand;
use pollux_guard::Left;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// More than the longest line.
const LINE_BYTES_MAX: usize = 64 * 1024;

pub struct LeaseFile {
    file: File,
    boot_id: String,
}

#[derive(Serialize, Deserialize)]
struct Line {
    boot_id: String,
    /// Nanoseconds of CLOCK_BOOTTIME.
    until_ns: Option<u64>,
    command: Option<GuardCommand>,
}

impl LeaseFile {
    /// Opens it, and reads what a guard of this boot has left.
    pub fn open(path: &Path, boot_id: String) -> std::io::Result<(LeaseFile, Option<Left>)> {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        let mut bytes = vec![0; LINE_BYTES_MAX];
        let len = file.read_at(&mut bytes, 0)?;
        let line = bytes[..len].split(|byte| *byte == b'\n').next().unwrap_or_default();
        // What cannot be read holds no lease.
        let line: Option<Line> = serde_json::from_slice(line).ok();
        let left = line
            .filter(|line| line.boot_id == boot_id)
            .map(|line| Left { until: line.until_ns.map(Instant), command: line.command });
        Ok((LeaseFile { file, boot_id }, left))
    }

    pub fn store(&mut self, until: Option<Instant>, command: Option<&GuardCommand>) {
        let line =
            Line { boot_id: self.boot_id.clone(), until_ns: until.map(|until| until.0), command: command.cloned() };
        let mut bytes = serde_json::to_vec(&line).expect("numbers and names always become JSON");
        bytes.push(b'\n');
        // The line ends before what a longer one left behind. A lease that could not be stored is only a shorter one for
        // the next guard.
        if let Err(error) = self.file.write_all_at(&bytes, 0) {
            eprintln!("pollux-guard: cannot store the lease: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pollux_base::Epoch;

    #[test]
    fn what_is_stored_is_found_in_the_same_boot_and_void_in_another() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("guard.lease");
        let (mut file, left) = LeaseFile::open(&path, "boot-1".into()).expect("opens");
        assert_eq!(left, None);
        let long = GuardCommand::Members { epoch: Epoch(1), peers: (0..99).map(pollux_base::NodeId).collect() };
        file.store(Some(Instant(7)), Some(&long));
        file.store(Some(Instant(8)), Some(&GuardCommand::Alone { epoch: Epoch(2) }));
        let (_, left) = LeaseFile::open(&path, "boot-1".into()).expect("opens");
        let command = Some(GuardCommand::Alone { epoch: Epoch(2) });
        assert_eq!(left, Some(Left { until: Some(Instant(8)), command }));
        let (_, left) = LeaseFile::open(&path, "boot-2".into()).expect("opens");
        assert_eq!(left, None);
    }

    #[test]
    fn a_damaged_file_holds_no_lease() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("guard.lease");
        std::fs::write(&path, b"\xff{\"until_ns\":99999").expect("written");
        let (_, left) = LeaseFile::open(&path, "boot-1".into()).expect("opens");
        assert_eq!(left, None);
    }
}
