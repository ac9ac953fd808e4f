//! Fuzzing by hand: each target in turn, from the committed corpus and from what earlier runs found.
//!
//! The tests run the committed corpus on the pinned toolchain (`fuzz/replay.rs`). What is made up here needs a nightly
//! toolchain and cargo-fuzz; neither is installed by this.

use crate::{root, run, target};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// Longest input. The longest thing that is worth making up is a few blocks of metadata.
const INPUT_BYTES_MAX: usize = 16 << 10;
/// An input that takes so long is a finding. The slowest good ones take some 50 ms.
const INPUT_SECONDS_MAX: u32 = 10;
/// An input that needs so much memory is a finding: the largest requests and frames need tens of megabytes.
const MEMORY_MIB_MAX: u32 = 2048;
/// What `--keep` adds to a folder of the corpus until it holds so much. All of it is run by every `./test`.
const FOLDER_BYTES_MAX: u64 = 24 << 10;
const FOLDER_FILES_MAX: usize = 40;

#[derive(clap::Args)]
pub struct FuzzArgs {
    /// Targets, each by a part of its name. All, if none is named.
    targets: Vec<String>,
    /// How long each is tried.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Afterwards, take some of the inputs that reach what no other reaches into the committed corpus, short ones and long ones.
    #[arg(long)]
    keep: bool,
}

pub fn fuzz(args: &FuzzArgs) -> Result<()> {
    require()?;
    let chosen = chosen(&args.targets)?;
    let home = target().join("fuzz");
    let mut build = Command::new("cargo");
    build.args(["+nightly", "fuzz", "build", "--sanitizer", "none", "--target-dir"]).arg(&home).arg("any");
    run(build.current_dir(root())).context("build the targets")?;
    let mut failed = Vec::new();
    for name in &chosen {
        println!("fuzz: {name}, {} s", args.seconds);
        let began = Instant::now();
        let folders = Folders::make(&home, name)?;
        let mut fuzzer = fuzzer(&home, name);
        fuzzer.args([
            format!("-max_total_time={}", args.seconds),
            format!("-max_len={INPUT_BYTES_MAX}"),
            format!("-timeout={INPUT_SECONDS_MAX}"),
            format!("-rss_limit_mb={MEMORY_MIB_MAX}"),
            format!("-artifact_prefix={}/", folders.findings.display()),
            "-print_final_stats=1".to_owned(),
        ]);
        fuzzer.arg(&folders.found).arg(&folders.committed);
        let log_path = home.join(format!("{name}.log"));
        fuzzer.stdout(Stdio::null()).stderr(fs::File::create(&log_path)?);
        let status = fuzzer.status().with_context(|| format!("start {fuzzer:?}"))?;
        let log = String::from_utf8_lossy(&fs::read(&log_path)?).into_owned();
        println!("fuzz: {name}: {} ({:.0} s)", summary(&log), began.elapsed().as_secs_f64());
        if !status.success() {
            println!("fuzz: {name} has found something: {}", log_path.display());
            failed.push(name.as_str());
        } else if args.keep {
            keep(&home, name, &folders)?;
        }
    }
    if !failed.is_empty() {
        bail!("inputs that break a promise are in {}, of: {}", home.join("findings").display(), failed.join(", "));
    }
    Ok(())
}

/// Says what is missing, and how to get it.
fn require() -> Result<()> {
    let answers = |arguments: &[&str]| {
        let mut command = Command::new("cargo");
        command.args(arguments).current_dir(root()).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    if !answers(&["+nightly", "--version"]) {
        bail!("fuzzing needs a nightly toolchain: `rustup toolchain install nightly --profile minimal`");
    }
    if !answers(&["+nightly", "fuzz", "--version"]) {
        bail!("fuzzing needs cargo-fuzz: `cargo install cargo-fuzz --locked`");
    }
    Ok(())
}

/// Each target has a folder of seeds.
fn chosen(parts: &[String]) -> Result<Vec<String>> {
    let corpus = root().join("fuzz/corpus");
    let mut all = Vec::new();
    for entry in fs::read_dir(&corpus).with_context(|| format!("read {}", corpus.display()))? {
        all.push(entry?.file_name().to_string_lossy().into_owned());
    }
    all.sort();
    if let Some(part) = parts.iter().find(|part| !all.iter().any(|name| name.contains(part.as_str()))) {
        bail!("no target `{part}`; there are: {}", all.join(", "));
    }
    all.retain(|name| parts.is_empty() || parts.iter().any(|part| name.contains(part.as_str())));
    Ok(all)
}

struct Folders {
    committed: PathBuf,
    /// What this and earlier runs made up.
    found: PathBuf,
    findings: PathBuf,
}

impl Folders {
    fn make(home: &Path, name: &str) -> Result<Folders> {
        let (found, findings) = (home.join("corpus").join(name), home.join("findings").join(name));
        fs::create_dir_all(&found)?;
        fs::create_dir_all(&findings)?;
        Ok(Folders { committed: root().join("fuzz/corpus").join(name), found, findings })
    }
}

fn fuzzer(home: &Path, name: &str) -> Command {
    let mut command = Command::new(home.join("x86_64-unknown-linux-gnu/release/any"));
    command.env("POLLUX_FUZZ", name);
    command
}

/// The last numbers of a run: how much was reached, how much was tried.
fn summary(log: &str) -> String {
    let after = |line: &str, word: &str| {
        let mut words = line.split_whitespace().skip_while(|found| *found != word).skip(1);
        words.next().unwrap_or("?").to_owned()
    };
    let last = log.lines().rev().find(|line| line.contains(" cov: ")).unwrap_or_default();
    let executions = log.lines().find(|line| line.starts_with("stat::number_of_executed_units:")).unwrap_or_default();
    let executions = after(executions, "stat::number_of_executed_units:");
    format!("{executions} executions, {} edges, {} features", after(last, "cov:"), after(last, "ft:"))
}

/// A sample of what reaches something that the corpus does not: of every length, as long as there is room.
fn keep(home: &Path, name: &str, folders: &Folders) -> Result<()> {
    let merged = home.join("merged").join(name);
    if merged.exists() {
        fs::remove_dir_all(&merged)?;
    }
    fs::create_dir_all(&merged)?;
    for entry in fs::read_dir(&folders.committed)? {
        let entry = entry?;
        fs::copy(entry.path(), merged.join(entry.file_name()))?;
    }
    let mut merge = fuzzer(home, name);
    merge
        .args(["-merge=1", "-timeout=10"])
        .arg(&merged)
        .arg(&folders.found)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    run(&mut merge).context("choose inputs")?;
    let (mut bytes, mut files) = (0, 0);
    for entry in fs::read_dir(&folders.committed)? {
        (bytes, files) = (bytes + entry?.metadata()?.len(), files + 1);
    }
    let mut new = Vec::new();
    for entry in fs::read_dir(&merged)? {
        let entry = entry?;
        if !folders.committed.join(entry.file_name()).exists() {
            new.push((entry.metadata()?.len(), entry.file_name()));
        }
    }
    new.sort();
    let room = FOLDER_FILES_MAX.saturating_sub(files);
    let mut added = 0;
    for (len, file) in new.iter().step_by(new.len().div_ceil(room.max(1)).max(1)).take(room) {
        if bytes + len <= FOLDER_BYTES_MAX {
            fs::copy(merged.join(file), folders.committed.join(file))?;
            (bytes, added) = (bytes + len, added + 1);
        }
    }
    println!("fuzz: {name}: {added} inputs were added to the corpus");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_of_a_run_are_read_off_its_log() {
        let log = "#2 INITED cov: 9 ft: 9\n#99 DONE cov: 120 ft: 340 corp: 5/8b exec/s: 7\nstat::number_of_executed_units: 99\n";
        assert_eq!(summary(log), "99 executions, 120 edges, 340 features");
    }

    #[test]
    fn a_target_is_chosen_by_a_part_of_its_name() {
        let chosen_by = |part: &str| chosen(&[part.to_owned()]);
        assert_eq!(chosen_by("store_pool").expect("it is there"), ["store_pool"]);
        assert!(chosen_by("store_").expect("they are there").len() > 3);
        assert!(chosen_by("no such").is_err());
    }
}
