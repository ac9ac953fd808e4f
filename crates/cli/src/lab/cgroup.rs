//! Control groups (version 2): what runs on a node is in its group, whatever it is and whoever started it.
//!
//! They are what makes a power cut honest: one write ends every process of the node at once, also those that are being
//! forked, and the kernel says when the last one is gone.

use crate::failure::{Doing, Failure, Outcome};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A killed process is gone in milliseconds; one stuck in the kernel is not worth waiting for any longer than this.
const EMPTY_WAIT: Duration = Duration::from_secs(10);

/// Where cgroup version 2 is mounted.
pub fn mount_point() -> Outcome<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").doing("cannot read /proc/self/mountinfo")?;
    mount_point_in(&text).ok_or_else(|| {
        Failure::other("control groups version 2 (cgroup2) are not mounted on this machine")
            .hint("mount them with: mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified")
    })
}

/// Fields of mountinfo: see proc(5). The file system's type follows the single `-`.
fn mount_point_in(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        file_system.starts_with("cgroup2 ").then(|| mount.split(' ').nth(4).map(PathBuf::from)).flatten()
    })
}

pub fn create(group: &Path) -> Outcome {
    fs::create_dir_all(group).doing(format!("cannot create control group {}", group.display()))
}

/// Moves the calling process into the group.
pub fn enter(group: &Path) -> Outcome {
    fs::write(group.join("cgroup.procs"), "0").doing(format!("cannot enter control group {}", group.display()))
}

/// SIGKILL for everything in the group and below, at once. A group that is not there has nothing to kill.
pub fn kill(group: &Path) -> Outcome {
    match fs::write(group.join("cgroup.kill"), "1") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Failure::other(format!("cannot kill control group {}: {error}", group.display())))
        }
        _ => Ok(()),
    }
}

/// Whether no process is left in the group or below.
pub fn is_empty(group: &Path) -> bool {
    match fs::read_to_string(group.join("cgroup.events")) {
        Ok(text) => text.lines().any(|line| line == "populated 0"),
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// Processes directly in the group.
pub fn processes(group: &Path) -> Vec<i32> {
    let text = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

/// Processes in the group and in those below it.
pub fn processes_below(group: &Path) -> Vec<i32> {
    let mut found = processes(group);
    for child in children(group) {
        found.extend(processes_below(&child));
    }
    found
}

/// Kills everything in the group and waits until it is gone.
pub fn clear(group: &Path) -> Outcome {
    kill(group)?;
    let started = Instant::now();
    while !is_empty(group) {
        if started.elapsed() > EMPTY_WAIT {
            return Err(Failure::other(format!("processes {:?} do not end although killed", processes_below(group))));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Removes an empty group and those below it. One that is not there is removed already.
pub fn remove(group: &Path) -> Outcome {
    for child in children(group) {
        remove(&child)?;
    }
    match fs::remove_dir(group) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Failure::other(format!("cannot remove control group {}: {error}", group.display())))
        }
        _ => Ok(()),
    }
}

fn children(group: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(group) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|file_type| file_type.is_dir()))
        .map(|e| e.path())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup2_is_found_in_a_unified_and_in_a_hybrid_machine_and_missed_where_it_is_not() {
        let unified = "25 19 0:22 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(mount_point_in(unified), Some("/sys/fs/cgroup".into()));
        let hybrid = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_point_in(hybrid), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mount_point_in("32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\ngarbage"), None);
    }

    #[test]
    fn a_group_that_is_not_there_is_empty_and_cleared_without_complaint() {
        let nowhere = Path::new("/nonexistent/group");
        assert!(is_empty(nowhere) && processes_below(nowhere).is_empty());
        clear(nowhere).expect("nothing to kill");
        remove(nowhere).expect("nothing to remove");
    }
}
