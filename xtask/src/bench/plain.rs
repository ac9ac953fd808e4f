//! What people would use without a mirror: a plain file behind `qemu-nbd` (O_DIRECT, io_uring, one copy, no checksums).

use super::cgroup::Cgroup;
use super::client::Client;
use super::process::{Running, wait_for};
use anyhow::Result;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

pub struct PlainExport {
    socket: PathBuf,
    _server: Running,
    _cgroup: Cgroup,
}

impl PlainExport {
    pub fn start(scratch: &Path, size_bytes: u64, cgroup: Cgroup) -> Result<PlainExport> {
        let (file, socket) = (scratch.join("plain.raw"), scratch.join("plain.sock"));
        let _ = fs::remove_file(&socket);
        fs::File::create(&file)?.set_len(size_bytes)?;
        let mut command = cgroup.command("qemu-nbd");
        command.args(["-f", "raw", "-x", "plain", "-e", "8", "-t", "--cache=none", "--aio=io_uring"]);
        command.args(["--discard=unmap", "-k"]).args([&socket, &file]);
        // It has something to say whenever a client leaves.
        let mut server = Running::start(command, &scratch.join("qemu-nbd.err"))?;
        wait_for("qemu-nbd to listen", || {
            server.check()?;
            Ok(UnixStream::connect(&socket).is_ok())
        })?;
        Ok(PlainExport { socket, _server: server, _cgroup: cgroup })
    }

    pub fn client(&self) -> Result<Client> {
        Client::nbd(&self.socket, "plain")
    }
}
