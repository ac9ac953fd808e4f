//! Programs that are measured: started, watched, and ended when dropped.

use crate::interrupt;
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What is waited for takes milliseconds; a machine that needs longer is too slow to measure anything on.
const PATIENCE: Duration = Duration::from_secs(30);

pub struct Running {
    child: Child,
    errors: PathBuf,
}

impl Running {
    /// What it says goes to the file `errors`.
    pub fn start(mut command: Command, errors: &Path) -> Result<Running> {
        let child = command.stdout(Stdio::null()).stderr(fs::File::create(errors)?).spawn();
        let child = child.with_context(|| format!("starting {command:?}"))?;
        Ok(Running { child, errors: errors.to_owned() })
    }

    /// An error, with its last words, once it has ended.
    pub fn check(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("it has ended, {status}: {}", fs::read_to_string(&self.errors)?.trim());
        }
        Ok(())
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Looks until it is so.
pub fn wait_for(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !is_so().with_context(|| format!("waiting for {what}"))? {
        interrupt::check()?;
        ensure!(Instant::now() < deadline, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
