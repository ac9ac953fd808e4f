//! Opens disks that are to join, and keeps their list, on a thread beside the loop: a device may take long to answer, and guests
//! do not wait for it.

use crate::disk_list;
use pollux_base::config::NodeConfig;
use pollux_host::disk::{Disk, OpenDiskError};
use pollux_host::link::Socket;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use tracing::warn;

enum Job {
    Open { id: u64, path: PathBuf, may_overwrite: bool },
    Forget(PathBuf),
}

/// A disk that is open, and in the list; or why it is neither.
pub struct Opened {
    pub id: u64,
    pub path: PathBuf,
    pub may_overwrite: bool,
    pub disk: Result<Disk, String>,
}

pub struct Keeper {
    jobs: Sender<Job>,
    opened: Receiver<Opened>,
    /// Readable when something was opened.
    bell: UnixStream,
}

impl Keeper {
    pub fn start(config: &NodeConfig) -> io::Result<Keeper> {
        let (jobs, jobs_in) = channel();
        let (opened_out, opened) = channel();
        let (bell, mut ringer) = UnixStream::pair()?;
        bell.set_nonblocking(true)?;
        let config = config.clone();
        // It ends with the channel of its jobs.
        std::thread::Builder::new().name("keeper".into()).spawn(move || {
            for job in jobs_in {
                match job {
                    Job::Open { id, path, may_overwrite } => {
                        let disk = open(&config, &path);
                        // Without a daemon nobody waits for it.
                        let _ = opened_out.send(Opened { id, path, may_overwrite, disk });
                        let _ = ringer.write_all(&[1]);
                    }
                    Job::Forget(path) => {
                        if let Err(cause) = disk_list::remove(&config, &path) {
                            warn!(%cause, "a path stays in the list; it is looked at in vain at the next start");
                        }
                    }
                }
            }
        })?;
        Ok(Keeper { jobs, opened, bell })
    }

    pub fn open(&self, id: u64, path: PathBuf, may_overwrite: bool) {
        self.give(Job::Open { id, path, may_overwrite });
    }

    /// The disk at this path is no part of the pool (any more).
    pub fn forget(&self, path: PathBuf) {
        self.give(Job::Forget(path));
    }

    fn give(&self, job: Job) {
        self.jobs.send(job).expect("the keeper ends after its daemon");
    }

    pub fn bell(&self) -> io::Result<Socket> {
        Ok(Socket::from_fd(self.bell.try_clone()?.into()))
    }

    /// What was opened since it was last asked.
    pub fn take_opened(&mut self) -> Vec<Opened> {
        let mut rung = [0; 64];
        while matches!(self.bell.read(&mut rung), Ok(count) if count > 0) {}
        self.opened.try_iter().collect()
    }
}

fn open(config: &NodeConfig, path: &Path) -> Result<Disk, String> {
    if !path.is_absolute() {
        return Err(format!("{} is not an absolute path", path.display()));
    }
    let disk = Disk::open_now(path).map_err(|error| match error {
        OpenDiskError::Missing(path) => {
            format!(
                "{path} does not exist; to give a file, make it first: truncate -s SIZE {path}",
                path = path.display()
            )
        }
        error => error.to_string(),
    })?;
    disk_list::add(config, path).map_err(|cause| cause.to_string())?;
    Ok(disk)
}
