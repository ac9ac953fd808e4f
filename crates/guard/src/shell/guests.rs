//! This node's QEMUs: whether there are any, and their end.

use super::sys::Process;
use nix::errno::Errno;
use pollux_base::config::NodeConfig;
use std::path::{Path, PathBuf};

pub struct Guests {
    /// Killed whole, if configured.
    cgroup: Option<PathBuf>,
    /// One folder per VM with a file `pid`.
    vm_dir: PathBuf,
}

impl Guests {
    pub fn new(config: &NodeConfig) -> Guests {
        Guests { cgroup: config.guest_cgroup.clone(), vm_dir: config.vm_dir() }
    }

    /// SIGKILL to all. By the cgroup, and by the pid files too: a guest that was not put into the cgroup dies as well. How
    /// many were found by their pid files.
    pub fn kill(&self) -> usize {
        if let Some(cgroup) = &self.cgroup {
            // Where the kernel is too old for cgroup.kill, or the folder is not there yet, the pid files are left.
            let _ = std::fs::write(cgroup.join("cgroup.kill"), "1");
        }
        let guests = self.found();
        for (pid, guest) in &guests {
            match guest.kill() {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => eprintln!("pollux-guard: cannot kill guest {pid}: {error}"),
            }
        }
        guests.len()
    }

    pub fn any_alive(&self) -> bool {
        let populated = |cgroup: &PathBuf| {
            std::fs::read_to_string(cgroup.join("cgroup.events")).is_ok_and(|text| text.contains("populated 1"))
        };
        self.cgroup.as_ref().is_some_and(populated) || !self.found().is_empty()
    }

    /// Living processes named by pid files. The handle is taken before the process is looked at, so that it is the one that
    /// was looked at which is killed.
    fn found(&self) -> Vec<(i32, Process)> {
        let Ok(folders) = std::fs::read_dir(&self.vm_dir) else {
            return Vec::new(); // No VM ever ran in this boot.
        };
        let pid_of = |path: &Path| std::fs::read_to_string(path).ok()?.trim().parse::<i32>().ok();
        let pids = folders.flatten().filter_map(|folder| pid_of(&folder.path().join("pid")));
        pids.filter(|pid| *pid > 1)
            .filter_map(|pid| Process::open(pid).map(|process| (pid, process)))
            .filter(|(pid, _)| self.is_guest(*pid))
            .collect()
    }

    /// A pid file may outlive its process, and the number may belong to another by now. A guest's command line names its
    /// folder, or it is a QEMU.
    fn is_guest(&self, pid: i32) -> bool {
        let Ok(arguments) = std::fs::read(format!("/proc/{pid}/cmdline")) else {
            return false;
        };
        let vm_dir = self.vm_dir.as_os_str().as_encoded_bytes();
        let names_folder = arguments.windows(vm_dir.len()).any(|part| part == vm_dir);
        let program = arguments.split(|byte| *byte == 0).next().unwrap_or_default();
        let name = program.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        names_folder || name.starts_with(b"qemu-")
    }
}
