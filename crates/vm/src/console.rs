//! A guest's serial console.
//!
//! Output goes to a file, written by QEMU itself: complete, whether or not anybody looks, and a guest never waits for a
//! reader. Any number of readers follow the file. Input goes through the console's socket.
//!
//! The file is kept small by giving back its beginning as a hole, not by cutting it: places in it stay what they are,
//! so nothing is lost or repeated for a reader while that is done.

use crate::ready::readable;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;

/// How much history is kept at least; at most this much more is added before the file is made smaller again.
/// Some ten thousand lines: the boots before a trouble, at little cost on a tmpfs.
const HISTORY_BYTES: u64 = 1 << 20;
/// Output given at once.
const CHUNK_BYTES: usize = 64 << 10;

/// Follows a console's output, also over restarts of the VM on this node.
#[derive(Debug)]
pub struct Console {
    file: File,
    changes: AsyncFd<OwnedFd>,
    place: u64,
}

impl Console {
    /// Begins with the last `history_bytes` of what is kept.
    pub(crate) fn open(log: &Path, history_bytes: u64) -> io::Result<Console> {
        // Not there before the first start of the VM; QEMU appends to what it finds.
        let file = File::options().read(true).append(true).create(true).open(log)?;
        let changes = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        inotify::add_watch(&changes, log, WatchFlags::MODIFY)?;
        let changes = readable(changes)?;
        let place = first_kept(&file)?.max(file.metadata()?.len().saturating_sub(history_bytes));
        Ok(Console { file, changes, place })
    }

    /// The next output, waited for if there is none yet. May be dropped while waiting without losing any.
    pub async fn next(&mut self) -> io::Result<Vec<u8>> {
        loop {
            // Changes are forgotten before the file is read: one that comes in between is seen by either.
            // Equal ones are folded by the kernel, so there are few.
            while let Ok(1..) = rustix::io::read(self.changes.get_ref(), &mut [0; 512]) {}
            let mut chunk = vec![0; CHUNK_BYTES];
            let count = self.file.read_at(&mut chunk, self.place)?;
            if count > 0 {
                self.place += count as u64;
                chunk.truncate(count);
                return Ok(chunk);
            }
            self.changes.readable().await?.clear_ready();
        }
    }
}

/// Gives back the space of old output.
pub(crate) fn keep_small(log: &Path) -> io::Result<()> {
    let file = File::options().write(true).read(true).open(log)?;
    let len = file.metadata()?.len();
    if len - first_kept(&file)? > 2 * HISTORY_BYTES {
        // Whole pages, so that what is kept begins where data begins and not with a page's worth of zeros.
        let hole = (len - HISTORY_BYTES) / 4096 * 4096;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&file, flags, 0, hole)?;
    }
    Ok(())
}

/// Where the kept part of the file begins.
fn first_kept(file: &File) -> io::Result<u64> {
    match seek(file, SeekFrom::Data(0)) {
        Ok(place) => Ok(place),
        // No data at all: an empty file.
        Err(Errno::NXIO) => Ok(file.metadata()?.len()),
        Err(error) => Err(error.into()),
    }
}

/// What is typed at a console. QEMU listens to one at a time: another's input waits until this one is dropped.
#[derive(Debug)]
pub struct ConsoleInput {
    writer: OwnedWriteHalf,
    drain: tokio::task::JoinHandle<()>,
}

impl ConsoleInput {
    pub(crate) async fn connect(socket: &Path) -> io::Result<ConsoleInput> {
        let (mut reader, writer) = UnixStream::connect(socket).await?.into_split();
        // QEMU writes the output here as well, and the guest would wait if nobody took it.
        let drain = tokio::spawn(async move {
            let mut unused = [0; 4096];
            while reader.read(&mut unused).await.is_ok_and(|count| count > 0) {}
        });
        Ok(ConsoleInput { writer, drain })
    }

    /// Types. Waits while the guest does not take its input; an error means that the VM is gone.
    pub async fn send(&mut self, input: &[u8]) -> io::Result<()> {
        self.writer.write_all(input).await
    }
}

impl Drop for ConsoleInput {
    fn drop(&mut self) {
        self.drain.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[tokio::test]
    async fn a_reader_gets_all_output_once_while_old_output_is_given_back() {
        let dir = tempfile::tempdir().expect("tmp is writable");
        let log = dir.path().join("console.log");
        let mut console = Console::open(&log, u64::MAX).expect("made if it is not there");
        let mut writer = File::options().append(true).open(&log).expect("there");
        let (mut wrote, mut read) = (Vec::new(), Vec::new());
        for line in 0..60_000 {
            let line = format!("line {line}: something that a guest says at length, without much sense\n");
            wrote.extend_from_slice(line.as_bytes());
            writer.write_all(line.as_bytes()).expect("writable");
            if wrote.len() - read.len() > CHUNK_BYTES {
                read.extend(console.next().await.expect("readable"));
                keep_small(&log).expect("punchable");
            }
        }
        while read.len() < wrote.len() {
            read.extend(console.next().await.expect("readable"));
        }
        assert!(read == wrote);
        use std::os::unix::fs::MetadataExt;
        let kept = std::fs::metadata(&log).expect("there").blocks() * 512;
        assert!(kept <= 2 * HISTORY_BYTES + (1 << 17), "{kept} bytes kept of {}", wrote.len());

        let mut late = Console::open(&log, 100).expect("there");
        assert_eq!(late.next().await.expect("readable"), wrote[wrote.len() - 100..]);
        let mut early = Console::open(&log, u64::MAX).expect("there");
        let first = early.next().await.expect("readable");
        let from = wrote.len() - HISTORY_BYTES as usize;
        assert!(
            first[0] != 0 && wrote[..from + 4096].windows(64).any(|part| part == &first[..64]),
            "no zeros of the hole"
        );
    }

    #[tokio::test]
    async fn a_waiting_reader_is_woken_by_new_output() {
        let dir = tempfile::tempdir().expect("tmp is writable");
        let log = dir.path().join("console.log");
        let mut console = Console::open(&log, 0).expect("made");
        let reader = tokio::spawn(async move { console.next().await });
        tokio::task::yield_now().await;
        File::options().append(true).open(&log).expect("there").write_all(b"hello").expect("writable");
        assert_eq!(reader.await.expect("not aborted").expect("readable"), b"hello");
    }
}
