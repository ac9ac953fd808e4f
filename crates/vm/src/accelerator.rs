//! KVM or software emulation.
//!
//! The presence of /dev/kvm proves nothing: there are machines where it opens and guests hang on it, or crawl, or where it
//! cannot give them the host's processor. So a guest is really run on it, once per boot of the node and again when a guest
//! did not start: a boot sector that leaves through a port of QEMU's. It takes some tens of milliseconds where KVM works.

use crate::Settings;
use crate::argv::{QEMU, engine_options};
use pollux_base::config::Accelerator;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::process::Command;

/// A guest that has not left by then hangs. Firmware and boot sector take about 0.1 s, also when emulated; the rest is
/// for a busy machine.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);
/// A guest on KVM that takes longer is compared with one in software, which must not be faster.
const PROBE_SLOW: Duration = Duration::from_millis(500);
/// QEMU's exit code when the guest writes 0x10 to its exit port: twice that, plus one.
const PROBE_EXIT: i32 = 0x10 * 2 + 1;

/// File in the run directory that remembers a probe's result.
const MEMORY: &str = "accelerator.json";

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Engine {
    Kvm,
    Tcg,
}

/// An engine and why it was chosen, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chosen {
    pub engine: Engine,
    pub reason: String,
}

#[derive(Serialize, Deserialize)]
struct Remembered {
    boot: String,
    chosen: Chosen,
}

/// Chooses as the settings say; the result of a probe is kept in the run directory for this boot.
pub async fn choose(settings: &Settings) -> Chosen {
    match settings.accelerator {
        Accelerator::Kvm => Chosen { engine: Engine::Kvm, reason: "configured".into() },
        Accelerator::Tcg => Chosen { engine: Engine::Tcg, reason: "configured".into() },
        Accelerator::Auto => {
            let file = settings.vm_dir.join(MEMORY);
            let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
            if let Some(chosen) = remembered(&file, &boot) {
                return chosen;
            }
            let chosen = match probe_kvm(&settings.vm_dir).await {
                Ok(()) => Chosen { engine: Engine::Kvm, reason: "a guest was seen to run on KVM".into() },
                Err(reason) => Chosen { engine: Engine::Tcg, reason },
            };
            tracing::info!(engine = ?chosen.engine, reason = chosen.reason, "accelerator chosen");
            let remember = Remembered { boot, chosen: chosen.clone() };
            // Only costs another probe if it fails.
            if let Err(error) =
                serde_json::to_vec(&remember).map_err(Into::into).and_then(|text| std::fs::write(&file, text))
            {
                tracing::warn!(%error, "the accelerator's probe could not be remembered");
            }
            chosen
        }
    }
}

/// What a start that failed does: the next choice is made anew.
pub fn forget(settings: &Settings) {
    let _ = std::fs::remove_file(settings.vm_dir.join(MEMORY));
}

fn remembered(file: &Path, boot: &str) -> Option<Chosen> {
    let remembered: Remembered = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
    (remembered.boot == boot && !boot.is_empty()).then_some(remembered.chosen)
}

/// Whether guests run on KVM, and no slower than in software.
async fn probe_kvm(dir: &Path) -> Result<(), String> {
    let began = Instant::now();
    probe(Engine::Kvm, dir).await?;
    let on_kvm = began.elapsed();
    if on_kvm > PROBE_SLOW {
        let began = Instant::now();
        // If software is worse still, or does not work at all, the machine is only busy.
        if probe(Engine::Tcg, dir).await.is_ok() && began.elapsed() < on_kvm {
            let (kvm, tcg) = (on_kvm.as_secs_f64(), began.elapsed().as_secs_f64());
            return Err(format!("a guest took {kvm:.1} s on kvm and {tcg:.1} s in software"));
        }
    }
    Ok(())
}

/// Runs a guest on this engine to its end. The error says what happened instead.
async fn probe(engine: Engine, dir: &Path) -> Result<(), String> {
    if engine == Engine::Kvm
        && let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm")
    {
        return Err(format!("/dev/kvm cannot be opened: {error}"));
    }
    let disk = dir.join("probe.img");
    std::fs::write(&disk, boot_sector()).map_err(|error| format!("{}: {error}", disk.display()))?;
    let result = run_probe(engine, &disk).await;
    let _ = std::fs::remove_file(&disk);
    result
}

async fn run_probe(engine: Engine, disk: &Path) -> Result<(), String> {
    let [(_, accel), (_, cpu)] = engine_options(engine);
    let name = if engine == Engine::Kvm { "kvm" } else { "tcg" };
    let file = disk.to_string_lossy().replace(',', ",,");
    let output = Command::new(QEMU)
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc", "-m", "16"])
        .args(["-accel", accel, "-cpu", cpu])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-no-reboot"])
        .args(["-drive", &format!("file={file},format=raw,if=ide")])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .output();
    match tokio::time::timeout(PROBE_TIMEOUT, output).await {
        Err(_) => Err(format!("a guest on {name} hung: it had not ended after {} s", PROBE_TIMEOUT.as_secs())),
        Ok(Err(error)) => Err(format!("{QEMU} could not be run: {error}")),
        Ok(Ok(output)) if output.status.code() == Some(PROBE_EXIT) => Ok(()),
        Ok(Ok(output)) => {
            let words = String::from_utf8_lossy(&output.stderr);
            Err(format!(
                "a guest on {name} failed ({}): {}",
                output.status,
                words.lines().next().unwrap_or("no reason given")
            ))
        }
    }
}

fn boot_sector() -> Vec<u8> {
    let mut sector = vec![0; 512];
    // mov al, 0x10; out 0xf4, al; cli; hlt
    sector[..6].copy_from_slice(&[0xb0, 0x10, 0xe6, 0xf4, 0xfa, 0xf4]);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(dir: &Path) -> Settings {
        Settings {
            vm_dir: dir.into(),
            nbd_socket: "/x".into(),
            guest_cgroup: None,
            bridge: None,
            accelerator: Accelerator::Auto,
        }
    }

    #[tokio::test]
    async fn the_probe_says_yes_where_guests_run() {
        let dir = tempfile::tempdir().expect("tmp is writable");
        assert_eq!(probe(Engine::Tcg, dir.path()).await, Ok(()), "software emulation always runs");
    }

    #[tokio::test]
    async fn a_choice_that_is_doubted_is_made_anew() {
        let dir = tempfile::tempdir().expect("tmp is writable");
        let settings = settings(dir.path());
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("Linux");
        let wrong = Chosen { engine: Engine::Kvm, reason: "an accident".into() };
        let text = serde_json::to_vec(&Remembered { boot, chosen: wrong.clone() }).expect("plain data");
        std::fs::write(dir.path().join(MEMORY), text).expect("writable");
        assert_eq!(choose(&settings).await, wrong);
        forget(&settings);
        assert_ne!(choose(&settings).await.reason, wrong.reason);
    }

    /// Whatever this machine's KVM is like, the answer comes within the bound and the probe leaves nothing.
    #[tokio::test]
    async fn the_answer_is_bounded_and_remembered_for_this_boot() {
        let dir = tempfile::tempdir().expect("tmp is writable");
        let began = std::time::Instant::now();
        let chosen = choose(&settings(dir.path())).await;
        assert!(began.elapsed() < PROBE_TIMEOUT * 2, "{chosen:?} took {:?}", began.elapsed());
        assert!(!dir.path().join("probe.img").exists());

        let file = dir.path().join("accelerator.json");
        let text = std::fs::read_to_string(&file).expect("remembered");
        std::fs::write(&file, text.replace(&chosen.reason, "as remembered")).expect("writable");
        assert_eq!(choose(&settings(dir.path())).await.reason, "as remembered");

        let other_boot = serde_json::to_vec(&Remembered {
            boot: "another boot".into(),
            chosen: Chosen { engine: Engine::Kvm, reason: "of another boot".into() },
        });
        std::fs::write(&file, other_boot.expect("plain data")).expect("writable");
        assert_eq!(choose(&settings(dir.path())).await, chosen, "a probe of another boot does not count");
    }
}
