//! What Pollux is compared with: a plain file behind `qemu-nbd`.

use super::cgroup::Cgroup;
use crate::interrupt;
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// It listens at once; a machine that needs longer is too slow to measure anything on.
const LISTEN_TIME: Duration = Duration::from_secs(10);

/// Ended and removed when dropped.
pub struct PlainExport {
    pub uri: String,
    server: Child,
    files: [PathBuf; 2],
}

impl PlainExport {
    pub fn start(scratch: &Path, size_mib: u64, cgroup: &Cgroup) -> Result<PlainExport> {
        let (file, socket) = (scratch.join("plain.raw"), scratch.join("plain.sock"));
        // It has something to say whenever a client leaves.
        let errors = scratch.join("qemu-nbd.err");
        let _ = fs::remove_file(&socket);
        fs::File::create(&file)?.set_len(size_mib << 20)?;
        let server = cgroup
            .command("qemu-nbd")
            .args(["-f", "raw", "-x", "plain", "-e", "8", "-t", "--cache=none", "--aio=io_uring", "--discard=unmap"])
            .arg("-k")
            .args([&socket, &file])
            .stdout(Stdio::null())
            .stderr(fs::File::create(&errors)?)
            .spawn()
            .context("starting qemu-nbd")?;
        let uri = format!("nbd+unix:///plain?socket={}", socket.display());
        let mut plain = PlainExport { uri, server, files: [file, socket] };
        let deadline = Instant::now() + LISTEN_TIME;
        while UnixStream::connect(&plain.files[1]).is_err() {
            interrupt::check()?;
            if let Some(status) = plain.server.try_wait()? {
                bail!("qemu-nbd: {status}: {}", fs::read_to_string(&errors)?.trim());
            }
            ensure!(Instant::now() < deadline, "qemu-nbd does not listen after {LISTEN_TIME:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(plain)
    }
}

impl Drop for PlainExport {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        for file in &self.files {
            let _ = fs::remove_file(file);
        }
    }
}
