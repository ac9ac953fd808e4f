//! What must hold of the source, beside the compiler's opinion.
//!
//! Each check collects every fault before it fails, so that one run shows them all.

use crate::{cargo, licence, root, run};
use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// A file longer than this is to be split by noun.
const LINES_MAX: usize = 800;

/// Who may depend on whom (docs/ARCHITECTURE.md); everybody may depend on base. Nothing else.
const ARROWS: &[(&str, &[&str])] = &[
    ("pollux-base", &[]),
    ("pollux-store", &[]),
    ("pollux-replica", &["pollux-store"]),
    ("pollux-cluster", &[]),
    ("pollux-guard", &[]),
    ("pollux-host", &[]),
    ("pollux-seal", &[]),
    ("pollux-frontend", &[]),
    ("pollux-vm", &[]),
    ("pollux-api", &[]),
    ("pollux-blockd", &["pollux-replica", "pollux-store", "pollux-frontend", "pollux-host", "pollux-seal"]),
    ("pollux-noded", &["pollux-cluster", "pollux-guard", "pollux-vm", "pollux-host", "pollux-seal", "pollux-api"]),
    ("pollux-cli", &["pollux-api"]),
    ("pollux-sim", &["pollux-replica", "pollux-store", "pollux-cluster", "pollux-guard"]),
    ("pollux-tests", &["pollux-api"]),
    ("xtask", &["pollux-sim"]),
];

/// What only tests may use besides: takeovers are played with the real guards.
const TEST_ARROWS: &[(&str, &str)] = &[("pollux-cluster", "pollux-guard")];

/// The pure crates. (The guard's core shares its crate with the guard's program; clippy keeps that core pure.)
const CORES: &[&str] = &["pollux-base", "pollux-store", "pollux-replica", "pollux-cluster", "pollux-sim"];

/// What a core may be built from: encodings, checksums, ciphers, error types and the clearing of secrets from memory, none of
/// which touches the machine.
const CORE_CRATES: &[&str] =
    &["aes", "blake3", "crc-fast", "postcard", "serde", "serde_json", "smallvec", "thiserror", "zerocopy", "zeroize"];

pub fn check() -> Result<()> {
    let mut faults = Vec::new();
    let metadata = Metadata::read()?;
    faults.extend(arrows(&metadata));
    faults.extend(licence::faults(&metadata)?);
    faults.extend(texts()?);
    for fault in &faults {
        eprintln!("Error: {fault}");
    }
    run(cargo().args(["fmt", "--all", "--check"])).context("format")?;
    run(cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"])).context("lints")?;
    if !faults.is_empty() {
        bail!("{} faults, told above", faults.len());
    }
    Ok(())
}

/// The part of `cargo metadata` that is looked at.
#[derive(Deserialize)]
pub struct Metadata {
    pub packages: Vec<Package>,
    pub workspace_members: BTreeSet<String>,
}

#[derive(Deserialize)]
pub struct Package {
    pub id: String,
    pub name: String,
    pub version: String,
    pub license: Option<String>,
    pub dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
pub struct Dependency {
    pub name: String,
    /// `None`: needed by the crate itself; "dev": only by its tests.
    pub kind: Option<String>,
}

impl Metadata {
    fn read() -> Result<Metadata> {
        let filter = ["--format-version", "1", "--locked", "--filter-platform", "x86_64-unknown-linux-gnu"];
        let output = cargo().arg("metadata").args(filter).output().context("start cargo metadata")?;
        if !output.status.success() {
            bail!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
        }
        serde_json::from_slice(&output.stdout).context("read the output of cargo metadata")
    }
}

/// Dependencies between our crates that are not in the map, and impure dependencies of cores.
fn arrows(metadata: &Metadata) -> Vec<String> {
    let members: Vec<&Package> =
        metadata.packages.iter().filter(|p| metadata.workspace_members.contains(&p.id)).collect();
    let ours: BTreeSet<&str> = members.iter().map(|package| package.name.as_str()).collect();
    let allowed: BTreeMap<&str, &[&str]> = ARROWS.iter().copied().collect();
    let mut faults = Vec::new();
    for package in members {
        let name = package.name.as_str();
        let Some(arrows) = allowed.get(name) else {
            faults.push(format!("{name} is not in the map: add it to ARROWS and to docs/ARCHITECTURE.md"));
            continue;
        };
        for dependency in &package.dependencies {
            let to = dependency.name.as_str();
            let for_tests = dependency.kind.as_deref() == Some("dev");
            let is_allowed = arrows.contains(&to) || for_tests && TEST_ARROWS.contains(&(name, to));
            if ours.contains(to) && to != "pollux-base" && to != name && !is_allowed {
                faults.push(format!("{name} must not depend on {to}"));
            }
            if CORES.contains(&name) && !for_tests && !ours.contains(to) && !CORE_CRATES.contains(&to) {
                faults.push(format!("{name} is a core and must stay pure: it must not depend on {to}"));
            }
        }
    }
    faults
}

/// Files that are too long, and words that tie the source to one machine or one registry.
fn texts() -> Result<Vec<String>> {
    let listed = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .context("start git ls-files")?;
    if !listed.status.success() {
        bail!("git ls-files: {}", String::from_utf8_lossy(&listed.stderr));
    }
    // Written in two parts, so that this file does not accuse itself.
    let forbidden = [
        (concat!("/wo", "rk/"), "a path of one machine"),
        (concat!("/ho", "me/"), "a path of one machine"),
        (concat!("cra", "tes.io"), "a registry's host"),
        (concat!("py", "pi.org"), "a registry's host"),
        (concat!("registry.npm", "js"), "a registry's host"),
    ];
    let mut faults = Vec::new();
    for name in String::from_utf8_lossy(&listed.stdout).lines() {
        let path = root().join(name);
        // Files that are deleted but not yet committed so, links to folders, and anything that is not text.
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        let lines = text.lines().count();
        if name.ends_with(".rs") && lines > LINES_MAX {
            faults.push(format!("{name} has {lines} lines; split it by noun before {LINES_MAX}"));
        }
        // The lock file's format names the index by itself.
        if name.ends_with("Cargo.lock") || name.ends_with("package-lock.json") {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            for (word, what) in forbidden {
                if line.contains(word) {
                    faults.push(format!("{name}:{}: names {what}", number + 1));
                }
            }
        }
    }
    Ok(faults)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(name: &str, dependencies: &[(&str, Option<&str>)]) -> Metadata {
        let others = ["pollux-base", "pollux-store", "pollux-host"];
        let package = |name: &str, dependencies: Vec<Dependency>| Package {
            id: name.into(),
            name: name.into(),
            version: "0".into(),
            license: None,
            dependencies,
        };
        let own =
            dependencies.iter().map(|(to, kind)| Dependency { name: (*to).into(), kind: kind.map(str::to_owned) });
        let mut packages = vec![package(name, own.collect())];
        packages.extend(others.iter().filter(|other| **other != name).map(|other| package(other, Vec::new())));
        let workspace_members = packages.iter().map(|package| package.id.clone()).collect();
        Metadata { packages, workspace_members }
    }

    #[test]
    fn an_arrow_that_is_not_in_the_map_is_found() {
        assert_eq!(arrows(&metadata("pollux-replica", &[("pollux-store", None), ("pollux-base", None)])).len(), 0);
        assert_eq!(arrows(&metadata("pollux-replica", &[("pollux-host", None)])).len(), 1);
        assert_eq!(arrows(&metadata("pollux-replica", &[("pollux-host", Some("dev"))])).len(), 1);
        assert_eq!(arrows(&metadata("pollux-unknown", &[])).len(), 1);
    }

    #[test]
    fn an_impure_dependency_of_a_core_is_found_but_not_of_its_tests() {
        assert_eq!(arrows(&metadata("pollux-store", &[("tokio", None)])).len(), 1);
        assert_eq!(arrows(&metadata("pollux-store", &[("tempfile", Some("dev"))])).len(), 0);
        assert_eq!(arrows(&metadata("pollux-host", &[("io-uring", None)])).len(), 0);
    }
}
