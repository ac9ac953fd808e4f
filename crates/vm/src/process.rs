//! A QEMU process, ours or found again, held by a pidfd: no other process can be mistaken for it, and its end is an
//! event, not something to poll for.
//!
//! How a QEMU is born so that it can not be lost: its process first waits as a shell, while we write down who it is
//! and put it into its cgroup; only a word from us turns it into QEMU. If we die before, it reads the end of its input
//! and goes away.

use crate::ready::readable;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use tokio::io::unix::AsyncFd;
use tokio::process::{Child, Command};

/// Who a process is: a pid alone may be another's by now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    pub pid: i32,
    /// Clock ticks between boot and its start (field 22 of /proc/PID/stat).
    pub started: u64,
}

impl Identity {
    /// As kept in a pid file: `PID STARTED`.
    pub fn parse(text: &str) -> Option<Identity> {
        let mut words = text.split_ascii_whitespace();
        let identity = Identity { pid: words.next()?.parse().ok()?, started: words.next()?.parse().ok()? };
        (identity.pid > 0).then_some(identity)
    }
    fn of(pid: i32) -> io::Result<Identity> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The second field is the program's name in parentheses and may hold anything, also parentheses.
        let started = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(19)?.parse().ok());
        match started {
            Some(started) => Ok(Identity { pid, started }),
            None => Err(io::Error::new(io::ErrorKind::InvalidData, format!("unexpected /proc/{pid}/stat: {stat}"))),
        }
    }
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.pid, self.started)
    }
}

#[derive(Debug)]
pub struct Process {
    pidfd: AsyncFd<OwnedFd>,
    /// Only of our own children; it tells how they ended, and reaps them.
    child: Option<Child>,
}

impl Process {
    /// The process of this identity, if it is still there.
    pub fn find(identity: Identity) -> io::Result<Option<Process>> {
        let pidfd = match open(identity.pid) {
            Err(error) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => return Ok(None),
            other => other?,
        };
        // The pidfd is held before the start time is read, so what is read belongs to the process that it names, or to
        // nobody any more.
        match Identity::of(identity.pid) {
            Ok(actual) if actual == identity => Ok(Some(Process { pidfd, child: None })),
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Starts `argv` in a session of its own, its output to `log`. `record` is called with its identity before the
    /// program is executed; if it fails, the program never is. Not asynchronous, so that nobody can drop it half done.
    pub fn spawn(
        argv: &[String],
        log: File,
        cgroup: Option<&Path>,
        record: impl FnOnce(Identity) -> io::Result<()>,
    ) -> io::Result<Process> {
        let mut child = Command::new("setsid")
            .args(["/bin/sh", "-c", r#"read -r go && exec "$@" </dev/null"#, "sh"])
            .args(argv)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let pid = child.id().ok_or_else(|| io::Error::other("the process ended at once"))?;
        let pid = i32::try_from(pid).map_err(io::Error::other)?;
        let identity = Identity::of(pid)?;
        let pidfd = open(pid)?;
        record(identity)?;
        if let Some(cgroup) = cgroup {
            std::fs::create_dir_all(cgroup)?;
            std::fs::write(cgroup.join("cgroup.procs"), pid.to_string())?;
        }
        let input = child.stdin.take().ok_or_else(|| io::Error::other("the process has no input"))?;
        // Three bytes into an empty pipe: never blocks.
        File::from(input.into_owned_fd()?).write_all(b"go\n")?;
        Ok(Process { pidfd, child: Some(child) })
    }

    /// Waits until the process is gone and tells how it ended, if that can be known. May be dropped and called again.
    pub async fn gone(&mut self) -> Option<ExitStatus> {
        if let Some(child) = &mut self.child {
            return child.wait().await.ok();
        }
        // A pidfd is readable when its process has ended. The only error is that of the runtime's own end.
        let _ = self.pidfd.readable().await;
        None
    }

    /// SIGKILL. Its effect is seen by `gone`.
    pub fn kill(&self) {
        if let Err(error) = pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL)
            && error != Errno::SRCH
        {
            tracing::error!(%error, "a QEMU could not be killed");
        }
    }
}

fn open(pid: i32) -> io::Result<AsyncFd<OwnedFd>> {
    let pid = Pid::from_raw(pid).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "0 is no process"))?;
    readable(pidfd_open(pid, PidfdFlags::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn argv(script: &str) -> Vec<String> {
        ["/bin/sh", "-c", script].map(String::from).to_vec()
    }
    fn null() -> File {
        File::options().write(true).open("/dev/null").expect("there is /dev/null")
    }

    #[tokio::test]
    async fn a_found_process_is_killed_and_its_end_is_noticed() {
        let mut identity = None;
        let mut started = Process::spawn(&argv("exec sleep 60"), null(), None, |who| {
            identity = Some(who);
            Ok(())
        })
        .expect("sh and setsid are there");
        let identity = identity.expect("recorded before it ran");
        let mut found = Process::find(identity).expect("/proc is there").expect("it runs");
        found.kill();
        assert_eq!(found.gone().await, None, "how another's child ended is not told");
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(started.gone().await.and_then(|status| status.signal()), Some(9));
        assert!(Process::find(identity).expect("/proc is there").is_none());
    }

    #[tokio::test]
    async fn a_recycled_pid_is_not_taken_for_the_process_of_the_file() {
        let me = Identity::of(std::process::id() as i32).expect("/proc is there");
        assert!(Process::find(me).expect("/proc is there").is_some());
        assert!(Process::find(Identity { started: me.started + 1, ..me }).expect("/proc is there").is_none());
        assert_eq!(Identity::parse(&me.to_string()), Some(me));
        for text in ["", "12", "x y", "-1 5", "0 5"] {
            assert_eq!(Identity::parse(text), None, "{text}");
        }
    }

    #[tokio::test]
    async fn a_process_that_could_not_be_recorded_never_runs_the_program() {
        let dir = tempfile::tempdir().expect("tmp is writable");
        let mark = dir.path().join("ran");
        let mut identity = None;
        let refused = Process::spawn(&argv(&format!("touch {}", mark.display())), null(), None, |who| {
            identity = Some(who);
            Err(io::Error::other("no space"))
        });
        assert!(refused.is_err());
        if let Some(mut process) = Process::find(identity.expect("asked")).expect("/proc is there") {
            process.gone().await;
        }
        assert!(!mark.exists());
    }
}
