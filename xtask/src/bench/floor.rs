//! The floor (`floor.c`): a bare mirrored write, as a yardstick.

use super::cgroup::Cgroup;
use super::client::Client;
use super::process::{Running, wait_for};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Its secondary runs on; there is a primary per client.
pub struct Floor {
    program: PathBuf,
    files: [PathBuf; 2],
    socket: PathBuf,
    address: String,
    primary: Option<Running>,
    _secondary: Running,
    cgroup: Cgroup,
}

impl Floor {
    pub fn start(scratch: &Path, size_bytes: u64, cgroup: Cgroup) -> Result<Floor> {
        let program = scratch.join("floor");
        let source = crate::root().join("xtask/src/bench/floor.c");
        let built = Command::new("gcc").args(["-O2", "-o"]).args([&program, &source]).arg("-luring").status();
        ensure!(
            built.is_ok_and(|status| status.success()),
            "the floor cannot be built: gcc or liburing-dev is missing; run scripts/deps"
        );
        let files = [scratch.join("floor-1"), scratch.join("floor-2")];
        for file in &files {
            fs::File::create(file)?.set_len(size_bytes)?;
        }
        // Free a moment ago, and nobody else is started here meanwhile.
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
        let mut command = cgroup.command(&program.to_string_lossy());
        command.args(["secondary", &address]).arg(&files[1]);
        let _secondary = Running::start(command, &scratch.join("floor-2.err"))?;
        Ok(Floor { program, files, socket: scratch.join("floor.sock"), address, primary: None, _secondary, cgroup })
    }

    /// A client, with a primary of its own.
    pub fn client(&mut self) -> Result<Client> {
        self.primary = None;
        let _ = fs::remove_file(&self.socket);
        let mut command = self.cgroup.command(&self.program.to_string_lossy());
        command.arg("primary").arg(&self.socket).arg(&self.address).arg(&self.files[0]);
        let primary = self.primary.insert(Running::start(command, &self.socket.with_extension("err"))?);
        let mut client = None;
        wait_for("the floor to listen", || {
            primary.check()?;
            client = Client::floor(&self.socket).ok();
            Ok(client.is_some())
        })?;
        client.context("the floor was waited for")
    }
}
