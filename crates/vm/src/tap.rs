//! The host's end of a guest's network card: a tap device on the node's bridge.
//!
//! It is made before QEMU and removed after it, so that QEMU needs no right to make one, and it is named after the VM,
//! so that one left behind by a crash is found and replaced.

use pollux_base::VmId;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// `ip` only speaks with the kernel. Longer than this and the kernel's network lock is stuck; a start then fails.
const IP_TIMEOUT: Duration = Duration::from_secs(3);

/// Name of the VM's tap device: at most 15 characters, the kernel's limit (2, and 13 digits of base 36 hold 64 bits).
pub fn name(vm: VmId) -> String {
    let mut digits = Vec::new();
    let mut rest = vm.0;
    while rest > 0 || digits.is_empty() {
        digits.push(char::from_digit((rest % 36) as u32, 36).expect("a remainder of 36 is a digit"));
        rest /= 36;
    }
    "pv".chars().chain(digits.into_iter().rev()).collect()
}

/// Makes the VM's tap device anew, on the bridge and up. The error is a text for people.
pub async fn create(vm: VmId, bridge: &str) -> Result<(), String> {
    let tap = name(vm);
    remove(vm).await;
    ip(&format!("tuntap add dev {tap} mode tap\nlink set dev {tap} master {bridge} up\n"))
        .await
        .map_err(|reason| format!("cannot put the network card on bridge `{bridge}`: {reason}"))
}

/// Removes the VM's tap device if it is there.
pub async fn remove(vm: VmId) {
    let tap = name(vm);
    // Asked of the kernel and not of /sys, which may show another network namespace than ours.
    match ip(&format!("link delete dev {tap}\n")).await {
        Ok(()) => {}
        Err(reason) if reason.contains("Cannot find device") => {}
        Err(reason) => tracing::warn!(%vm, tap, reason, "the tap device could not be removed"),
    }
}

async fn ip(batch: &str) -> Result<(), String> {
    let work = async {
        let mut child = Command::new("ip")
            .args(["-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        if let Some(mut input) = child.stdin.take() {
            input.write_all(batch.as_bytes()).await?;
        }
        child.wait_with_output().await
    };
    match tokio::time::timeout(IP_TIMEOUT, work).await {
        Err(_) => Err(format!("`ip` did not end within {} s", IP_TIMEOUT.as_secs())),
        Ok(Err(error)) => Err(format!("`ip` could not be run: {error}")),
        Ok(Ok(output)) if output.status.success() => Ok(()),
        Ok(Ok(output)) => {
            Err(String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or("no reason given").into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_into_the_kernels_limit_and_differ() {
        assert_eq!(name(VmId(0)), "pv0");
        assert_eq!(name(VmId(37)), "pv11");
        assert!(name(VmId(u64::MAX)).len() <= 15);
    }
}
