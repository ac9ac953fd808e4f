//! Starting a program inside a node: in its network namespace and its control group, with its output in a log.
//!
//! The program is started through `pollux lab exec`, which enters both and then becomes the program. So the program is
//! never, not even for a moment, outside the group that a power cut kills, and no helper process stays behind.

use super::cgroup;
use super::network;
use crate::failure::{Doing, Failure, Outcome};
use nix::sched::{CloneFlags, setns};
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A started program is in its group at once; a machine that takes longer than this is not usable for a lab.
const ENTER_WAIT: Duration = Duration::from_secs(10);

/// Where and how a program runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    pub executable: PathBuf,
    pub arguments: Vec<OsString>,
    /// `None`: on this machine's own network.
    pub namespace: Option<String>,
    pub cgroup: PathBuf,
    pub log: PathBuf,
}

impl Program {
    /// Starts it and returns when it is inside its group.
    pub fn start(&self) -> Outcome<Child> {
        let mut child = self.command()?.spawn().doing(format!("cannot start {}", self.executable.display()))?;
        let started = Instant::now();
        let id = i32::try_from(child.id()).unwrap_or(0);
        // A program that ended already was in the group, or never got there; either way nothing is left outside it.
        while !cgroup::processes(&self.cgroup).contains(&id) && child.try_wait().ok().flatten().is_none() {
            if started.elapsed() > ENTER_WAIT {
                let _ = child.kill();
                let _ = child.wait();
                return Err(Failure::other(format!("{} did not enter its control group", self.executable.display())));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(child)
    }

    /// Runs it to its end; what it printed last becomes the error if it failed.
    pub fn run(&self) -> Outcome {
        let before = std::fs::metadata(&self.log).map_or(0, |meta| meta.len());
        let status = self.command()?.status().doing(format!("cannot start {}", self.executable.display()))?;
        if status.success() {
            return Ok(());
        }
        let log = std::fs::read(&self.log).unwrap_or_default();
        let said = String::from_utf8_lossy(log.get(before as usize..).unwrap_or_default()).trim().to_string();
        let what = self.arguments.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
        Err(Failure::other(format!("`{} {what}` failed ({status}): {said}", self.executable.display())))
    }

    fn command(&self) -> Outcome<Command> {
        let log = open_log(&self.log)?;
        let mut command = Command::new(own_executable()?);
        command.args(["lab", "exec", "--cgroup"]).arg(&self.cgroup);
        if let Some(namespace) = &self.namespace {
            command.args(["--namespace", namespace]);
        }
        command.arg("--").arg(&self.executable).args(&self.arguments);
        let second = log.try_clone().doing("cannot share the log")?;
        command.stdin(Stdio::null()).stdout(log).stderr(second).current_dir("/");
        // Of its own process group: an interrupt typed at the terminal of `lab up` is not for it.
        command.process_group(0);
        Ok(command)
    }
}

fn open_log(path: &Path) -> Outcome<File> {
    OpenOptions::new().create(true).append(true).open(path).doing(format!("cannot open {}", path.display()))
}

pub fn own_executable() -> Outcome<PathBuf> {
    std::env::current_exe().doing("cannot find this program's own file")
}

/// `pollux lab exec`: enters group and namespace and becomes the program. Returns only when that failed.
pub fn exec(cgroup: &Path, namespace: Option<&str>, command: &[OsString]) -> Failure {
    let enter = || -> Outcome<Failure> {
        let (program, arguments) = command.split_first().ok_or_else(|| Failure::usage("no program is named"))?;
        cgroup::enter(cgroup)?;
        if let Some(namespace) = namespace {
            let path = network::namespace_file(namespace);
            let file = File::open(&path).doing(format!("cannot open {}", path.display()))?;
            setns(file, CloneFlags::CLONE_NEWNET).doing(format!("cannot enter network namespace {namespace}"))?;
        }
        let error = Command::new(program).args(arguments).exec();
        Ok(Failure::other(format!("cannot run {}: {error}", program.to_string_lossy())))
    };
    enter().unwrap_or_else(|failure| failure)
}

/// Whether a program of this name can be found.
pub fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}
