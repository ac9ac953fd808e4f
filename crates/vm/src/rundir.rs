//! The folder of a running VM, from which its QEMU is found again.
//!
//! `guest.json` is written first and removed last; `pid` is there before QEMU is executed. So a folder without
//! `guest.json` is no run, and one without `pid` is a run that never began. The console's history (`console.log`) and
//! QEMU's own words (`qemu.log`) stay when the run is over.

use crate::Settings;
use crate::guest::Guest;
use crate::process::Identity;
use pollux_base::VmId;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// The kernel's limit for the path of a unix socket: 108 bytes with the final zero.
const SOCKET_PATH_MAX: usize = 107;

#[derive(Clone, Debug)]
pub struct RunDir {
    path: PathBuf,
}

impl RunDir {
    pub fn of(settings: &Settings, vm: VmId) -> RunDir {
        RunDir { path: settings.vm_dir.join(vm.to_string()) }
    }
    pub fn qmp_socket(&self) -> PathBuf {
        self.path.join("qmp.sock")
    }
    pub fn console_socket(&self) -> PathBuf {
        self.path.join("console.sock")
    }
    pub fn console_log(&self) -> PathBuf {
        self.path.join("console.log")
    }
    fn qemu_log(&self) -> PathBuf {
        self.path.join("qemu.log")
    }
    fn guest_file(&self) -> PathBuf {
        self.path.join("guest.json")
    }
    fn pid_file(&self) -> PathBuf {
        self.path.join("pid")
    }

    /// Makes the folder, if it is not there. It is no run by that.
    pub fn make(&self) -> io::Result<()> {
        fs::create_dir_all(&self.path)
    }

    /// Begins a run: nothing of an earlier one is left. Returns the file for QEMU's words.
    pub fn prepare(&self, guest: &Guest) -> io::Result<File> {
        if self.console_socket().as_os_str().len() > SOCKET_PATH_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("its path is too long for a socket (at most {SOCKET_PATH_MAX} bytes); use a shorter run_dir"),
            ));
        }
        self.make()?;
        self.clear()?;
        write_whole(&self.guest_file(), &serde_json::to_vec_pretty(guest)?)?;
        File::create(self.qemu_log())
    }

    /// Who QEMU is.
    pub fn record(&self, identity: Identity) -> io::Result<()> {
        write_whole(&self.pid_file(), format!("{identity}\n").as_bytes())
    }

    /// Ends a run. What is left is only for people.
    pub fn clear(&self) -> io::Result<()> {
        for file in [self.pid_file(), self.qmp_socket(), self.console_socket(), self.guest_file()] {
            match fs::remove_file(&file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// The run that was begun here, and its process if it got that far.
    pub fn read(&self) -> io::Result<Option<(Guest, Option<Identity>)>> {
        let Some(guest) = read_if_there(&self.guest_file())? else { return Ok(None) };
        let guest = serde_json::from_str(&guest)?;
        let identity = match read_if_there(&self.pid_file())? {
            None => None,
            Some(text) => Some(Identity::parse(&text).ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidData, format!("`{text}` in the pid file is no process"))
            })?),
        };
        Ok(Some((guest, identity)))
    }

    /// The last line that QEMU said, if any.
    pub fn last_words(&self) -> Option<String> {
        let log = fs::read(self.qemu_log()).ok()?;
        String::from_utf8_lossy(&log).lines().rev().find(|line| !line.trim().is_empty()).map(String::from)
    }

    /// The VMs that have a folder.
    pub fn list(settings: &Settings) -> io::Result<Vec<VmId>> {
        let mut vms = Vec::new();
        for entry in fs::read_dir(&settings.vm_dir)? {
            let name = entry?.file_name();
            if let Some(number) = name.to_str().and_then(|name| name.strip_prefix("vm")?.parse().ok()) {
                vms.push(VmId(number));
            }
        }
        vms.sort();
        Ok(vms)
    }
}

/// Whole or not at all. The folder is on tmpfs, so there is nothing to sync.
fn write_whole(path: &Path, content: &[u8]) -> io::Result<()> {
    let part = path.with_extension("part");
    fs::write(&part, content)?;
    fs::rename(&part, path)
}

fn read_if_there(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::tests::guest;

    #[test]
    fn a_run_is_read_back_until_it_is_cleared() {
        let dir = tempfile::tempdir().expect("tmp is writable");
        let settings = Settings {
            vm_dir: dir.path().into(),
            nbd_socket: "/x".into(),
            guest_cgroup: None,
            bridge: None,
            accelerator: Default::default(),
        };
        let run = RunDir::of(&settings, VmId(7));
        assert_eq!(run.prepare(&guest()).map(|_| ()).map_err(|e| e.kind()), Ok(()));
        assert_eq!(run.read().expect("readable"), Some((guest(), None)));
        let identity = Identity { pid: 12, started: 99 };
        run.record(identity).expect("writable");
        assert_eq!(run.read().expect("readable"), Some((guest(), Some(identity))));
        assert_eq!(RunDir::list(&settings).expect("readable"), [VmId(7)]);
        fs::write(run.pid_file(), "rubbish").expect("writable");
        assert!(run.read().is_err(), "a damaged pid file is not the absence of a process");
        run.clear().expect("writable");
        assert_eq!(run.read().expect("readable"), None);
    }
}
