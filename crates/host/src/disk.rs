//! Opening a pool's disk: a plain file or a raw block device.
//!
//! A disk is open in one process at a time. The lock is `flock` on the open file, on purpose: the kernel lets go of it
//! only when the last reference to the open file is gone, and operations that a killed process left in flight hold such
//! references. So whoever gets the lock knows that no write of an earlier run can still land.

use pollux_base::ByteCount;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How long `Disk::open` waits for the lock: a killed process is torn down by the kernel in the background, with its
/// last writes. Long enough for a slow disk to end what it was doing, short enough to tell of a second process soon.
const LOCK_WAIT: Duration = Duration::from_secs(3);
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// An open disk. Clones are the same disk.
#[derive(Clone, Debug)]
pub struct Disk {
    file: Arc<File>,
    size: ByteCount,
}

/// Why a disk could not be opened or made.
#[derive(Debug, thiserror::Error)]
pub enum OpenDiskError {
    #[error("{path} does not exist", path = .0.display())]
    Missing(PathBuf),
    #[error("{path} is in use: mounted, a part of a pool, or open elsewhere", path = .0.display())]
    InUse(PathBuf),
    #[error("{path} is neither a plain file nor a block device", path = .0.display())]
    WrongKind(PathBuf),
    #[error("{path} does not support direct I/O (O_DIRECT)", path = .0.display())]
    NoDirectIo(PathBuf),
    #[error("{path}: {cause}", path = path.display())]
    Io { path: PathBuf, cause: io::Error },
}

impl Disk {
    /// Opens and locks an existing file or block device for direct I/O. Waits a moment for a process that is being torn down.
    pub fn open(path: &Path) -> Result<Disk, OpenDiskError> {
        Disk::open_within(path, LOCK_WAIT)
    }

    /// Likewise, but what somebody else has open is refused at once.
    pub fn open_now(path: &Path) -> Result<Disk, OpenDiskError> {
        Disk::open_within(path, Duration::ZERO)
    }

    fn open_within(path: &Path, patience: Duration) -> Result<Disk, OpenDiskError> {
        let io = |cause| OpenDiskError::Io { path: path.to_owned(), cause };
        let kind = match std::fs::metadata(path) {
            Ok(metadata) => metadata.file_type(),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
                return Err(OpenDiskError::Missing(path.to_owned()));
            }
            Err(cause) => return Err(io(cause)),
        };
        let exclusive = if kind.is_block_device() {
            // On a device this refuses one that is mounted or held by another exclusive opener.
            nix::libc::O_EXCL
        } else if kind.is_file() {
            0
        } else {
            return Err(OpenDiskError::WrongKind(path.to_owned()));
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(nix::libc::O_DIRECT | nix::libc::O_CLOEXEC | exclusive)
            .open(path)
            .map_err(|cause| match cause.raw_os_error() {
                Some(nix::libc::EINVAL) => OpenDiskError::NoDirectIo(path.to_owned()),
                Some(nix::libc::EBUSY) => OpenDiskError::InUse(path.to_owned()),
                _ => io(cause),
            })?;
        lock(&file, path, patience)?;
        let size = ByteCount(file.seek(SeekFrom::End(0)).map_err(io)?);
        Ok(Disk { file: Arc::new(file), size })
    }

    /// Makes a sparse file of `size` bytes, durably. Fails when there is something at `path` already.
    pub fn create_file(path: &Path, size: ByteCount) -> Result<(), OpenDiskError> {
        let io = |cause| OpenDiskError::Io { path: path.to_owned(), cause };
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(io)?;
        file.set_len(size.0).and_then(|()| file.sync_all()).map_err(io)?;
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(parent).and_then(|directory| directory.sync_all()).map_err(io)
    }

    /// Whether the first `len` bytes at `path` are all zero: nothing that anybody put there would be lost.
    pub fn begins_blank(path: &Path, len: u64) -> Result<bool, OpenDiskError> {
        let io = |cause| OpenDiskError::Io { path: path.to_owned(), cause };
        let mut bytes = Vec::new();
        File::open(path).map_err(io)?.take(len).read_to_end(&mut bytes).map_err(io)?;
        Ok(bytes.iter().all(|byte| *byte == 0))
    }

    /// How many bytes it has, as of when it was opened.
    pub fn size(&self) -> ByteCount {
        self.size
    }

    pub(crate) fn raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn lock(file: &File, path: &Path, patience: Duration) -> Result<(), OpenDiskError> {
    let mut waited = Duration::ZERO;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(std::fs::TryLockError::WouldBlock) if waited < patience => {
                std::thread::sleep(LOCK_RETRY);
                waited += LOCK_RETRY;
            }
            Err(std::fs::TryLockError::WouldBlock) => return Err(OpenDiskError::InUse(path.to_owned())),
            Err(std::fs::TryLockError::Error(cause)) => {
                return Err(OpenDiskError::Io { path: path.to_owned(), cause });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_read_is_not_taken_for_blank() {
        // Address 0 of a process is never mapped: reading it fails with EIO.
        let read = Disk::begins_blank(Path::new("/proc/self/mem"), 4096);
        assert!(matches!(read, Err(OpenDiskError::Io { .. })), "{read:?}");
    }

    #[test]
    fn a_disk_is_open_once() -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("pool");
        Disk::create_file(&path, ByteCount(1 << 20))?;
        let first = Disk::open(&path)?;
        assert_eq!(first.size(), ByteCount(1 << 20));
        assert!(matches!(Disk::open(&path), Err(OpenDiskError::InUse(_))));
        drop(first);
        Disk::open(&path)?;
        Ok(())
    }

    #[test]
    fn what_is_there_is_not_made_anew() -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("pool");
        std::fs::write(&path, b"precious")?;
        assert!(Disk::create_file(&path, ByteCount(1 << 20)).is_err());
        assert!(!Disk::begins_blank(&path, 4096)?);
        assert_eq!(std::fs::read(&path)?, b"precious");
        assert!(matches!(Disk::open(&dir.path().join("absent")), Err(OpenDiskError::Missing(_))));
        assert!(matches!(Disk::open(dir.path()), Err(OpenDiskError::WrongKind(_))));
        Ok(())
    }
}
