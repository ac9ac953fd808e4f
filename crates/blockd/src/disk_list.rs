//! Where the disks are that joined by command: a small file in the node's state directory, beside the configuration, which nobody
//! has to edit.
//!
//! A path is in the list, durably, before its disk joins, and until after it has left. So the list may name too much, never too
//! little: what belongs to the pool its disks say themselves.

use crate::state_file;
use pollux_base::PoolId;
use pollux_base::config::NodeConfig;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DiskList {
    /// A list of another pool counts for nothing.
    pool: PoolId,
    paths: Vec<PathBuf>,
}

/// Each change reads the file and writes it anew.
static CHANGING: Mutex<()> = Mutex::new(());

fn file(config: &NodeConfig) -> PathBuf {
    config.state_dir.join("pool-disks.json")
}

/// All paths at which disks of the pool may be: those of the configuration, then those that joined by command.
pub fn paths(config: &NodeConfig) -> io::Result<Vec<PathBuf>> {
    let mut paths: Vec<PathBuf> = config.pool.disks().cloned().collect();
    for path in read(config)? {
        if !paths.contains(&path) {
            paths.push(path);
        }
    }
    Ok(paths)
}

fn read(config: &NodeConfig) -> io::Result<Vec<PathBuf>> {
    let file = file(config);
    let text = match std::fs::read(&file) {
        Ok(text) => text,
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(cause) => return Err(about(&file, cause)),
    };
    let list: DiskList = serde_json::from_slice(&text).map_err(|cause| about(&file, cause.into()))?;
    Ok(if list.pool == config.pool.pool { list.paths } else { Vec::new() })
}

pub fn add(config: &NodeConfig, path: &Path) -> io::Result<()> {
    change(config, |paths| {
        if !paths.iter().any(|known| known == path) {
            paths.push(path.to_owned());
        }
    })
}

pub fn remove(config: &NodeConfig, path: &Path) -> io::Result<()> {
    change(config, |paths| paths.retain(|known| known != path))
}

/// The pool is made anew: nothing has joined it.
pub fn clear(config: &NodeConfig) -> io::Result<()> {
    match file(config).exists() {
        true => change(config, Vec::clear),
        false => Ok(()),
    }
}

fn change(config: &NodeConfig, change: impl FnOnce(&mut Vec<PathBuf>)) -> io::Result<()> {
    let _changing = CHANGING.lock().expect("nothing panics while holding this lock");
    let mut paths = read(config)?;
    change(&mut paths);
    let list = DiskList { pool: config.pool.pool, paths };
    let (file, text) = (file(config), serde_json::to_vec_pretty(&list)?);
    state_file::replace(&file, &text).map_err(|cause| about(&file, cause))
}

fn about(file: &Path, cause: io::Error) -> io::Error {
    io::Error::new(cause.kind(), format!("the list of the pool's disks, {}: {cause}", file.display()))
}
