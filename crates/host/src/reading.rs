//! A pool's disk that is only read, by whoever looks at a pool that nobody uses.

use crate::disk::OpenDiskError;
use pollux_base::data::Buffer;
use pollux_base::{ByteCount, Data};
use std::fs::{File, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Opened for reading, and never written to.
#[derive(Debug)]
pub struct DiskReader {
    file: File,
    size: ByteCount,
}

impl DiskReader {
    /// Fails while a process uses the disk: what is read would not fit together.
    pub fn open(path: &Path) -> Result<DiskReader, OpenDiskError> {
        let mut file = File::open(path).map_err(|cause| match cause.kind() {
            io::ErrorKind::NotFound => OpenDiskError::Missing(path.to_owned()),
            _ => OpenDiskError::Io { path: path.to_owned(), cause },
        })?;
        file.try_lock_shared().map_err(|error| match error {
            TryLockError::WouldBlock => OpenDiskError::InUse(path.to_owned()),
            TryLockError::Error(cause) => OpenDiskError::Io { path: path.to_owned(), cause },
        })?;
        let end = file.seek(SeekFrom::End(0)).map_err(|cause| OpenDiskError::Io { path: path.to_owned(), cause })?;
        Ok(DiskReader { file, size: ByteCount(end) })
    }

    pub fn size(&self) -> ByteCount {
        self.size
    }

    /// All of it or an error.
    pub fn read(&self, offset: ByteCount, len: usize) -> io::Result<Data> {
        let mut buffer = Buffer::any(len);
        self.file.read_exact_at(buffer.as_mut_slice(), offset.0)?;
        Ok(buffer.freeze())
    }
}
