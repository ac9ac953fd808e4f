//! What a user does with volumes, snapshots and pools, command by command, on a site of real daemons; what volumes hold is read over
//! NBD each time. Needs root, like the lab itself.

use pollux_tests::{Lab, wait_until};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

const MIB: u64 = 1 << 20;

fn is_protected(lab: &Lab) -> bool {
    lab.json(&["status"])["headline"]["protection"] == "protected"
}

/// Where it is found on the own socket of the node that serves it.
fn local_uri(lab: &Lab, volume: &str) -> String {
    let uris = lab.json(&["volume", "export", volume, "--nbd"]);
    let primary = lab.json(&["volume", "show", volume])["primary"].as_str().expect("a primary").to_owned();
    let uris = uris.as_array().expect("a list").iter().filter_map(Value::as_str);
    let mut local = uris.filter(|uri| uri.contains(&format!("/{primary}/nbd.sock")));
    local.next().expect("the lab names a local socket").to_owned()
}

fn qemu_io(uri: &str, commands: &[&str]) {
    let words = commands.iter().flat_map(|words| ["-c", words]);
    let output =
        Command::new("qemu-io").args(["-f", "raw"]).args(words).arg(uri).output().expect("qemu-io is installed");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let is_fine = output.status.success() && !text.contains("verification failed");
    assert!(is_fine, "{uri} {commands:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
}

fn is_healthy(lab: &Lab, volume: &str) -> bool {
    lab.json(&["volume", "show", volume])["state"] == "healthy"
}

/// Paths and ids of the disks of a node's pool.
fn disks(lab: &Lab, node: &str) -> Vec<(PathBuf, String)> {
    let pool = lab.json(&["pool", "show", node]);
    let disk = |disk: &Value| {
        let text = |name: &str| disk[name].as_str().expect("a text").to_owned();
        (PathBuf::from(text("path")), text("id"))
    };
    pool["disks"].as_array().expect("disks").iter().map(disk).collect()
}

fn make_disk(path: &Path) {
    std::fs::File::create(path).and_then(|file| file.set_len(512 * MIB)).expect("a sparse file");
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

/// Guards: every command about storage does what it says, and what volumes hold is what was written to them.
#[test]
fn a_user_works_with_volumes_snapshots_and_pools() {
    let lab = Lab::up();
    wait_until("the site is protected", || is_protected(&lab));
    lab.ok(&["volume", "create", "v", "--size", "128M"]);
    let uri = local_uri(&lab, "v");
    qemu_io(&uri, &["write -P 0x11 0 1M", "write -P 0x22 32M 1M", "flush"]);

    // Snapshots, what differs between them, and copies.
    lab.ok(&["volume", "snapshot", "v", "one"]);
    qemu_io(&uri, &["write -P 0x33 64k 64k", "flush"]);
    lab.ok(&["volume", "snapshot", "v", "two"]);
    let diff = lab.json(&["snapshot", "diff", "v@one", "v@two"]);
    let range = &diff["volumes"][0]["ranges"];
    let ranges = range.as_array().expect("ranges");
    assert_eq!((ranges.len(), &range[0]["offset_bytes"], &range[0]["length_bytes"]), (1, &65536.into(), &65536.into()));
    lab.ok(&["volume", "clone", "v@one", "copy"]);
    qemu_io(&local_uri(&lab, "copy"), &["read -P 0x11 0 1M", "read -P 0x22 32M 1M", "write -P 0x44 0 64k", "flush"]);
    lab.refused(4, &["snapshot", "rollback", "v@one", "--yes"]);
    lab.ok(&["volume", "export", "v", "--off"]);
    lab.ok(&["snapshot", "rollback", "v@one", "--yes"]);
    let uri = local_uri(&lab, "v");
    qemu_io(&uri, &["read -P 0x11 0 1M", "read -P 0x22 32M 1M"]);
    lab.ok(&["volume", "resize", "v", "--size", "256M"]);
    assert_eq!(lab.json(&["volume", "show", "v"])["size_bytes"], 256 * MIB);
    qemu_io(&local_uri(&lab, "v"), &["write -P 0x55 200M 1M", "flush", "read -P 0 199M 1M"]);
    lab.refused(4, &["volume", "resize", "v", "--size", "128M"]);
    for mode in ["memory", "sync"] {
        let group = lab.json(&["volume", "show", "v"])["group"].to_string();
        lab.ok(&["group", "mode", &group, mode]);
        qemu_io(&uri, &["write -P 0x66 100M 1M", "flush", "read -P 0x66 100M 1M"]);
    }

    // A disk joins, is drained, and leaves.
    let first = disks(&lab, "a")[0].0.clone();
    let second = first.with_file_name("second");
    make_disk(&second);
    lab.ok(&["pool", "add-disk", "a", text(&second)]);
    qemu_io(&uri, &["write -P 0x77 128M 64M", "flush"]);
    assert_eq!(disks(&lab, "a").len(), 2);
    lab.refused(4, &["pool", "remove-disk", "a", text(&second)]);
    lab.ok(&["pool", "drain-disk", "a", text(&second)]);
    wait_until("the disk is drained", || {
        lab.json(&["pool", "show", "a"])["disks"]
            .as_array()
            .is_some_and(|disks| disks.iter().any(|disk| disk["state"] == "drained"))
    });
    lab.ok(&["pool", "remove-disk", "a", text(&second)]);
    assert_eq!(disks(&lab, "a").len(), 1);

    // Everything is read and compared, and the pools are verified while they are used.
    lab.ok(&["volume", "scrub", "v"]);
    for node in ["a", "b"] {
        let verified = lab.json(&["pool", "verify", "--node", node]);
        assert_eq!((&verified["done"], &verified["findings"]), (&true.into(), &Value::Array(Vec::new())), "{verified}");
    }
    lab.refused(2, &["pool", "verify", "--node", "nobody"]);
    assert_eq!(lab.json(&["kept", "list"]), Value::Array(Vec::new()));
    lab.refused(3, &["kept", "export", "a", "v7-evidence-1", "--nbd"]);
    lab.refused(3, &["kept", "delete", "a", "something", "--yes"]);

    lab.ok(&["volume", "export", "copy", "--off"]);
    for snapshot in ["v@two", "v@one"] {
        lab.ok(&["snapshot", "delete", snapshot, "--yes"]);
    }
    qemu_io(&local_uri(&lab, "copy"), &["read -P 0x44 0 64k", "read -P 0x11 64k 900k", "read -P 0x22 32M 1M"]);
    lab.ok(&["volume", "export", "copy", "--off"]);
    lab.ok(&["volume", "delete", "copy", "--yes"]);

    // A node is gone, and a disk of its pool with it, for good.
    make_disk(&second);
    lab.ok(&["pool", "add-disk", "b", text(&second)]);
    qemu_io(&uri, &["write -P 0x88 192M 8M", "write -P 0x99 224M 32M", "flush"]);
    let (joined, own): (Vec<_>, Vec<_>) = disks(&lab, "b").into_iter().partition(|(path, _)| *path == second);
    let ([(_, id)], [(b, _)]) = (joined.as_slice(), own.as_slice()) else { panic!("{joined:?}, {own:?}") };
    lab.ok(&["lab", "pull", "b"]);
    let named = lab.ok(&["pool", "rescue", text(b), text(&second)]);
    assert!(named.contains("`v`: 256 MiB"), "{named}");
    let off = lab.run(&["pool", "verify", text(b), text(&second)]);
    let said = String::from_utf8_lossy(&off.stdout).into_owned();
    assert!(off.status.code() == Some(0) || !said.contains("  error  "), "{said}");
    let raw = first.with_file_name("rescued");
    lab.ok(&["pool", "rescue", "--export", "v", "--to", text(&raw), text(b), text(&second)]);
    qemu_io(text(&raw), &["read -P 0x11 0 1M", "read -P 0x22 32M 1M", "read -P 0x88 192M 8M", "read -P 0x99 224M 32M"]);
    std::fs::remove_file(&second).expect("it is lost");
    wait_until("the survivor serves", || lab.json(&["volume", "show", "v"])["primary"] == "a");
    let uri = local_uri(&lab, "v");
    qemu_io(&uri, &["read -P 0x99 224M 32M", "write -P 0xaa 224M 1M", "flush"]);
    lab.ok(&["lab", "return", "b"]);
    wait_until("the missing disk is told of", || {
        lab.json(&["pool", "show", "b"])["disks"]
            .as_array()
            .is_some_and(|disks| disks.iter().any(|disk| disk["state"] == "missing"))
    });
    // Right after its return the node can not decide yet; it says so, and a moment later it can.
    wait_until("the disk is let go", || lab.run(&["pool", "remove-disk", "b", id, "--lost", "--yes"]).status.success());
    wait_until("all is in sync again", || is_healthy(&lab, "v") && is_protected(&lab));
    lab.ok(&["volume", "scrub", "v"]);
    let verified = lab.json(&["pool", "verify", "--node", "b"]);
    assert_eq!(verified["findings"], Value::Array(Vec::new()), "{verified}");
    qemu_io(&uri, &["read -P 0xaa 224M 1M", "read -P 0x99 225M 31M", "read -P 0x77 128M 64M", "read -P 0x11 0 1M"]);
    lab.ok(&["volume", "export", "v", "--off"]);
    lab.ok(&["volume", "delete", "v", "--yes"]);
}
