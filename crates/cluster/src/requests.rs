//! What users may ask for, checked against the state: clear refusals, the same on every node.
//!
//! `refuse` runs twice: when a request arrives (so that nonsense never reaches the log) and when its entry is applied (because
//! the state may have moved on in between).

use crate::entry::{Change, Subject, VmPhase, VmSpec};
use crate::seam::Refusal;
use crate::state::State;
use pollux_base::unit::{BLOCK_BYTES, VOLUME_BYTES_MAX, bytes_text};
use pollux_base::{ByteCount, NodeId};

/// Longest name; it becomes part of file names and host names.
pub const NAME_BYTES_MAX: usize = 63;
/// Disks of one VM: one virtio-blk device each, well below what a PCI bus takes.
pub const DISKS_MAX: usize = 16;
/// More than QEMU's default machine runs.
pub const CPUS_MAX: u32 = 255;
/// Longest text of a note.
pub const NOTE_BYTES_MAX: usize = 1000;

/// Whether users may ask for such a change at all; the others are decided by the core.
pub fn is_for_users(change: &Change) -> bool {
    match change {
        Change::CreateImage { .. }
        | Change::ImageReady { .. }
        | Change::DeleteImage { .. }
        | Change::CreateVm { .. }
        | Change::DeleteVm { .. }
        | Change::WantVm { .. }
        | Change::CreateVolume { .. }
        | Change::DeleteVolume { .. }
        | Change::ExportVolume { .. }
        | Change::CreateSnapshot { .. }
        | Change::DeleteSnapshot { .. }
        | Change::RollBack { .. }
        | Change::CloneVolume { .. }
        | Change::CloneVm { .. }
        | Change::ResizeVolume { .. }
        | Change::DiscardReplica { .. }
        | Change::ScrubGroup { .. }
        | Change::ScrubEvery { .. }
        | Change::SetMode { .. }
        | Change::SetLag { .. }
        | Change::AddReplica { .. }
        | Change::RemoveReplica { .. }
        | Change::MoveReplica { .. }
        | Change::CancelMove { .. }
        | Change::PromoteReplica { .. }
        | Change::SealKeys { .. }
        | Change::Note { .. } => true,
        Change::Init { .. }
        | Change::RaiseEpoch { .. }
        | Change::NodePhase { .. }
        | Change::VmPhase { .. }
        | Change::SetGroup { .. }
        | Change::Scrubbed { .. }
        | Change::Found { .. }
        | Change::FinishMove { .. }
        | Change::SnapshotEnded { .. }
        | Change::Cloned { .. }
        | Change::VmFilled { .. }
        | Change::Awake { .. } => false,
    }
}

/// Why the state does not allow the change. Pure; also holds for entries that were proposed under an older state.
pub fn refuse(state: &State, change: &Change) -> Result<(), Refusal> {
    match change {
        Change::CreateImage { name, size, node, key } => {
            state.refuse_keys(key.as_slice())?;
            check_name("image", name)?;
            check_size("image", *size)?;
            check_node(state, *node)?;
            if state.image_named(name).is_some() {
                return conflict(format!("an image `{name}` exists already"));
            }
        }
        Change::ImageReady { image, sha256 } => {
            let image = state.images.get(image).ok_or_else(|| not_found(format!("no image {image}")))?;
            if sha256.len() != 64 || !sha256.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return invalid("a sha256 is 64 hexadecimal digits");
            }
            if image.sha256.as_ref().is_some_and(|known| known != sha256) {
                return conflict(format!("image `{}` is complete already, with other content", image.name));
            }
        }
        Change::DeleteImage { image } => {
            let found = state.images.get(image).ok_or_else(|| not_found(format!("no image {image}")))?;
            let user = state.vms.values().find(|vm| vm.spec.image == Some(*image) && !vm.filled);
            if let Some(vm) = user {
                return conflict(format!(
                    "image `{}` is in use: VM `{}` is being filled from it",
                    found.name, vm.spec.name
                ));
            }
        }
        Change::CreateVm { spec, node, keys } => {
            refuse_vm(state, spec, *node)?;
            if !keys.is_empty() && keys.len() != spec.disks.len() {
                return invalid(format!("{} keys for {} disks", keys.len(), spec.disks.len()));
            }
            state.refuse_keys(keys)?;
        }
        Change::DeleteVm { vm } => {
            let found = state.vms.get(vm).ok_or_else(|| not_found(format!("no VM {vm}")))?;
            let name = &found.spec.name;
            match found.phase {
                VmPhase::Stopped | VmPhase::Failed => {}
                phase => {
                    return conflict(format!("VM `{name}` is {}; stop it first: pollux vm stop {name}", phase.name()));
                }
            }
            state.refuse_with_snapshots(found.group)?;
        }
        Change::WantVm { vm, .. } => {
            state.vms.get(vm).ok_or_else(|| not_found(format!("no VM {vm}")))?;
        }
        Change::CreateVolume { name, size, node, key } => {
            state.refuse_keys(key.as_slice())?;
            check_name("volume", name)?;
            check_size("volume", *size)?;
            check_node(state, *node)?;
            if state.volume_named(name).is_some() {
                return conflict(format!("a volume `{name}` exists already"));
            }
        }
        Change::DeleteVolume { volume } | Change::ExportVolume { volume, .. } => {
            let found = state.volumes.get(volume).ok_or_else(|| not_found(format!("no volume {volume}")))?;
            let owner = state.groups.get(&found.group).map(|group| group.owner);
            let is_export = matches!(change, Change::ExportVolume { .. });
            if let Some(snapshot) = found.snapshot.filter(|_| !is_export) {
                let name = state.snapshot_name(snapshot);
                return conflict(format!("volume `{}` is of a snapshot: pollux snapshot delete {name}", found.name));
            }
            if !matches!(owner, Some(crate::state::Owner::Volume(_))) && found.snapshot.is_none() {
                return conflict(format!("volume `{}` belongs to a VM or image and goes with it", found.name));
            }
            if matches!(change, Change::DeleteVolume { .. }) && found.exported {
                let name = &found.name;
                return conflict(format!("volume `{name}` is exported; first: pollux volume export {name} --off"));
            }
            if !is_export {
                state.refuse_with_snapshots(found.group)?;
            }
        }
        Change::CreateSnapshot { .. }
        | Change::DeleteSnapshot { .. }
        | Change::RollBack { .. }
        | Change::CloneVolume { .. }
        | Change::CloneVm { .. }
        | Change::ResizeVolume { .. } => state.refuse_snapshots(change)?,
        Change::ScrubGroup { group, .. } | Change::ScrubEvery { group, .. } => {
            state.groups.get(group).ok_or_else(|| not_found(format!("no group {group}")))?;
        }
        Change::DiscardReplica { group, node, .. } => {
            let found = state.groups.get(group).ok_or_else(|| not_found(format!("no group {group}")))?;
            if !found.replicas.contains(node) {
                return Err(not_found(format!("group {group} has no replica on node `{}`", state.node_name(*node))));
            }
            if found.record.in_sync.contains(node) {
                let node = state.node_name(*node);
                return Err(Refusal::Unsafe(format!(
                    "the replica of {group} on `{node}` holds every acknowledged write"
                )));
            }
        }
        Change::SetMode { .. }
        | Change::SetLag { .. }
        | Change::AddReplica { .. }
        | Change::RemoveReplica { .. }
        | Change::MoveReplica { .. }
        | Change::CancelMove { .. }
        | Change::FinishMove { .. }
        | Change::PromoteReplica { .. } => state.refuse_replicas(change)?,
        Change::SealKeys { expect, master, keys } => state.refuse_sealed_anew(*expect, *master, keys)?,
        Change::Note { subject, text } => {
            if text.len() > NOTE_BYTES_MAX {
                return invalid(format!("a note has at most {NOTE_BYTES_MAX} bytes, this one has {}", text.len()));
            }
            if !subject_exists(state, *subject) {
                return Err(not_found("the subject of the note does not exist".into()));
            }
        }
        Change::Init { .. }
        | Change::RaiseEpoch { .. }
        | Change::NodePhase { .. }
        | Change::VmPhase { .. }
        | Change::Scrubbed { .. }
        | Change::Found { .. }
        | Change::SetGroup { .. }
        | Change::SnapshotEnded { .. }
        | Change::Cloned { .. }
        | Change::VmFilled { .. }
        | Change::Awake { .. } => {}
    }
    Ok(())
}

fn refuse_vm(state: &State, spec: &VmSpec, node: NodeId) -> Result<(), Refusal> {
    check_name("VM", &spec.name)?;
    check_node(state, node)?;
    if state.vm_named(&spec.name).is_some() {
        return conflict(format!("a VM `{}` exists already", spec.name));
    }
    if spec.cpus == 0 || spec.cpus > CPUS_MAX {
        return invalid(format!("a VM has 1 to {CPUS_MAX} CPUs, not {}", spec.cpus));
    }
    const MIB: u64 = 1 << 20;
    if spec.memory.0 == 0 || !spec.memory.0.is_multiple_of(MIB) {
        return invalid(format!("memory is a positive multiple of 1 MiB, not {} bytes", spec.memory.0));
    }
    let largest = state.nodes.values().map(|node| node.spec.memory_bytes).max().unwrap_or(0);
    if spec.memory.0 > largest {
        let (asked, has) = (bytes_text(spec.memory.0), bytes_text(largest));
        return invalid(format!("{asked} of memory fit on no node: the largest has {has} for guests"));
    }
    if spec.disks.is_empty() || spec.disks.len() > DISKS_MAX {
        return invalid(format!("a VM has 1 to {DISKS_MAX} disks, not {}", spec.disks.len()));
    }
    for size in &spec.disks {
        check_size("disk", *size)?;
    }
    if !spec.mac.is_empty() && !is_mac(&spec.mac) {
        return invalid(format!("`{}` is not a MAC address such as 52:54:00:12:34:56", spec.mac));
    }
    if let Some(image) = spec.image {
        let image = state.images.get(&image).ok_or_else(|| not_found(format!("no image {image}")))?;
        if image.sha256.is_none() {
            return conflict(format!("image `{}` is still being uploaded", image.name));
        }
        if spec.disks[0] < image.size {
            let (disk, image_size) = (bytes_text(spec.disks[0].0), bytes_text(image.size.0));
            return invalid(format!("the first disk ({disk}) is smaller than image `{}` ({image_size})", image.name));
        }
    }
    Ok(())
}

/// Names become parts of paths, export names and host names: lower case letters, digits and inner hyphens.
pub(crate) fn check_name(what: &str, name: &str) -> Result<(), Refusal> {
    let is_inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let is_edge = |byte: &u8| *byte != b'-';
    let is_good = !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && name.bytes().all(is_inner)
        && name.as_bytes().first().is_some_and(is_edge)
        && name.as_bytes().last().is_some_and(is_edge);
    if is_good {
        return Ok(());
    }
    let shown: String = name.chars().take(NAME_BYTES_MAX).collect();
    invalid(format!("`{shown}` is no name for a {what}: 1 to {NAME_BYTES_MAX} of a-z, 0-9 and inner `-`"))
}

pub(crate) fn check_size(what: &str, size: ByteCount) -> Result<(), Refusal> {
    if size.0 == 0 {
        return invalid(format!("the size of a {what} is more than zero"));
    }
    if size.0 > VOLUME_BYTES_MAX {
        return invalid(format!(
            "{} bytes are too much for a {what}: the most is {}",
            size.0,
            bytes_text(VOLUME_BYTES_MAX)
        ));
    }
    if !size.0.is_multiple_of(BLOCK_BYTES) {
        return invalid(format!("the size of a {what} is a multiple of {BLOCK_BYTES} bytes; {} is not", size.0));
    }
    Ok(())
}

fn check_node(state: &State, node: NodeId) -> Result<(), Refusal> {
    let found = state.nodes.get(&node).ok_or_else(|| not_found(format!("no node {node}")))?;
    match found.phase {
        crate::entry::NodePhase::Online => Ok(()),
        _ => conflict(format!("node `{}` is not online", found.spec.name)),
    }
}

fn subject_exists(state: &State, subject: Subject) -> bool {
    match subject {
        Subject::Cluster => true,
        Subject::Node(node) => state.nodes.contains_key(&node),
        Subject::Group(group) => state.groups.contains_key(&group),
        Subject::Volume(volume) => state.volumes.contains_key(&volume),
        Subject::Vm(vm) => state.vms.contains_key(&vm),
        Subject::Image(image) => state.images.contains_key(&image),
    }
}

fn is_mac(text: &str) -> bool {
    let parts: Vec<&str> = text.split(':').collect();
    let first = parts.first().and_then(|part| u8::from_str_radix(part, 16).ok());
    // The lowest bit of the first byte marks a group address, which no card may have.
    parts.len() == 6
        && parts.iter().all(|part| part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit()))
        && first.is_some_and(|byte| byte & 1 == 0)
}

fn invalid<T>(text: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::Invalid(text.into()))
}

fn conflict<T>(text: String) -> Result<T, Refusal> {
    Err(Refusal::Conflict(text))
}

fn not_found(text: String) -> Refusal {
    Refusal::NotFound(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_be_paths_or_options_are_refused() {
        for bad in ["", "-a", "a-", "A", "a/b", "..", "a b", "é", &"x".repeat(64)] {
            assert!(check_name("VM", bad).is_err(), "`{bad}` passed");
        }
        for good in ["a", "web1", "a-b", &"x".repeat(63)] {
            assert!(check_name("VM", good).is_ok(), "`{good}` was refused");
        }
    }

    #[test]
    fn a_mac_is_six_bytes_of_one_card() {
        assert!(is_mac("52:54:00:12:34:56"));
        for bad in [
            "",
            "52:54:00:12:34",
            "53:54:00:12:34:56",
            "52:54:00:12:34:5g",
            "52:54:00:12:34:56:78",
            "+2:54:00:12:34:56",
        ] {
            assert!(!is_mac(bad), "`{bad}` passed");
        }
    }
}
