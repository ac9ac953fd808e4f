//! What an operator would type, typed: each command is the real `pollux` in a process of its own.

use super::interrupt;
use crate::failure::{Code, Doing, Failure, Outcome};
use crate::lab::process::own_executable;
use serde::de::DeserializeOwned;
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// No command of a demo takes as long as this; each has limits of its own.
const COMMAND_WAIT: Duration = Duration::from_secs(240);

/// Runs `pollux WORDS`, shows it, and gives what it printed.
pub fn type_in(words: &[&str]) -> Outcome<String> {
    eprintln!("      $ pollux {}", words.join(" "));
    run(words)
}

/// Runs `pollux WORDS -o json` and reads what it printed.
pub fn read<T: DeserializeOwned>(words: &[&str]) -> Outcome<T> {
    let text = run(&[words, &["-o", "json"]].concat())?;
    serde_json::from_str(&text).doing(format!("`pollux {}` printed no JSON that fits", words.join(" ")))
}

fn run(words: &[&str]) -> Outcome<String> {
    let what = || format!("`pollux {}`", words.join(" "));
    let mut child = Command::new(own_executable()?)
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .doing(what())?;
    // Both are read as they come, so that a talkative command never waits for us.
    let stdout = child.stdout.take().map(|pipe| std::thread::spawn(move || read_all(pipe)));
    let stderr = child.stderr.take().map(|pipe| std::thread::spawn(move || read_all(pipe)));
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().doing(what())? {
            break status;
        }
        if let Err(failure) = interrupt::check().and_then(|()| within(started, &what())) {
            let _ = child.kill();
            let _ = child.wait();
            return Err(failure);
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let text = |thread: Option<std::thread::JoinHandle<String>>| thread.and_then(|thread| thread.join().ok());
    let (stdout, stderr) = (text(stdout).unwrap_or_default(), text(stderr).unwrap_or_default());
    if status.success() {
        return Ok(stdout);
    }
    interrupt::check()?;
    let line = |prefix: &str| stderr.lines().rev().find_map(|line| line.strip_prefix(prefix).map(String::from));
    let failure =
        Failure::other(format!("{} failed ({status}): {}", what(), line("Error: ").unwrap_or(stderr.clone())));
    Err(match line("Hint: ") {
        Some(hint) => failure.hint(hint),
        None => failure,
    })
}

fn within(started: Instant, what: &str) -> Outcome {
    if started.elapsed() < COMMAND_WAIT {
        return Ok(());
    }
    Err(Failure::new(Code::TimedOut, format!("{what} did not end within {} s", COMMAND_WAIT.as_secs())))
}

fn read_all(mut pipe: impl Read) -> String {
    let mut bytes = Vec::new();
    let _ = pipe.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}
