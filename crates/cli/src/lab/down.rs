//! Removes a lab, whatever state it is in. Each step takes "there is none" for done, so it can be repeated at any time.

use super::cgroup;
use super::network;
use super::site::{CGROUP, DIR_DEFAULT, RUN, Site, run_file};
use crate::failure::{Doing, Failure, Outcome};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// What of the site's directory outlives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    Nothing,
    Logs,
    /// Everything: the next `lab up` goes on with it.
    State,
}

/// Whether anything of a lab is on this machine: its runtime, namespaces, or control groups.
pub fn is_anything_left() -> bool {
    run_file().exists() || !network::namespaces_of_lab().is_empty() || lab_cgroup().is_some_and(|group| group.exists())
}

/// The plan of the lab that is or was up, if its runtime is still there.
pub fn site_of_run() -> Option<Site> {
    read_site(&run_file())
}

pub fn read_site(file: &Path) -> Option<Site> {
    serde_json::from_slice(&fs::read(file).ok()?).ok()
}

/// Removes everything; `dir` overrides what the runtime says about where the state is. Tells whether there was anything.
pub fn down(dir: Option<&Path>, keep: Keep) -> Outcome<bool> {
    let site = site_of_run().or_else(|| read_site(&dir.unwrap_or(Path::new(DIR_DEFAULT)).join("site.json")));
    let was_there = is_anything_left() || site.is_some();

    if let Some(group) = lab_cgroup() {
        cgroup::clear(&group)?;
        cgroup::remove(&group)?;
    }
    network::down()?;
    unmount_run()?;
    if let Some(site) = site {
        remove_state(&site, keep)?;
    }
    Ok(was_there)
}

fn lab_cgroup() -> Option<PathBuf> {
    cgroup::mount_point().ok().map(|mount| mount.join(CGROUP))
}

fn unmount_run() -> Outcome {
    loop {
        match umount2(RUN, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            // Not there, or not (or no longer) a mount.
            Err(Errno::ENOENT | Errno::EINVAL) => break,
            Err(error) => return Err(Failure::other(format!("cannot unmount {RUN}: {error}"))),
        }
    }
    remove_tree(Path::new(RUN))
}

/// Removes what the lab made in the site's directory, and the directory if nothing else is in it.
fn remove_state(site: &Site, keep: Keep) -> Outcome {
    if keep == Keep::State {
        return Ok(());
    }
    for node in &site.nodes {
        remove_tree(&site.node_dir(node))?;
    }
    remove_tree(&site.keys())?;
    remove_tree(&site.witness_dir())?;
    if keep == Keep::Nothing {
        remove_tree(&site.logs())?;
    }
    remove_file(&site.file())?;
    match fs::remove_dir(&site.dir) {
        Err(error) if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::DirectoryNotEmpty) => {
            Err(error).doing(format!("cannot remove {}", site.dir.display()))
        }
        _ => Ok(()),
    }
}

fn remove_tree(path: &Path) -> Outcome {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == ErrorKind::NotADirectory => remove_file(path),
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).doing(format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn remove_file(path: &Path) -> Outcome {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).doing(format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
