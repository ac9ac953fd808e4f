//! A whole site, as its operator meets it. Needs root, like the lab itself.

use pollux_tests::{Lab, pollux, root, throw, turn, wait_until};
use std::process::{Child, Command, Stdio};

/// Where the volume is found on this node's own socket.
fn unix_uri(lab: &Lab, volume: &str, node: &str) -> String {
    let uris = lab.json(&["volume", "export", volume, "--nbd"]);
    let uris = uris.as_array().expect("a list of addresses");
    let local = uris.iter().filter_map(|uri| uri.as_str()).find(|uri| uri.contains(&format!("/{node}/nbd.sock")));
    local.expect("the lab names a local socket").to_owned()
}

fn qemu_io(uri: &str, commands: &[&str]) -> std::process::Output {
    let mut command = Command::new("qemu-io");
    for words in commands {
        command.args(["-c", words]);
    }
    command.args(["-f", "raw", uri]).output().expect("qemu-io is installed")
}

fn is_protected(lab: &Lab) -> bool {
    lab.json(&["status"])["headline"]["protection"] == "protected"
}

/// Ends the child whatever happens to the test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Guards: bad input is refused with a clear error and its exit code, and harms nobody.
#[test]
fn bad_input_is_refused_with_what_to_do_and_harms_nobody() {
    let lab = Lab::up();
    wait_until("the site is protected", || is_protected(&lab));

    let again = lab.refused(4, &["lab", "up"]);
    assert!(again.contains("lab down"), "a second lab says what to do about the first: {again}");

    lab.ok(&["volume", "create", "v", "--size", "64M"]);
    lab.refused(4, &["volume", "create", "v", "--size", "64M"]);
    lab.refused(2, &["volume", "create", "zero", "--size", "0"]);
    lab.refused(2, &["volume", "create", "huge", "--size", "99999999T"]);
    lab.refused(2, &["volume", "create", "odd", "--size", "ten gigabytes"]);
    lab.refused(2, &["vm", "create", "m", "--memory", "0", "--disk", "1G"]);
    lab.refused(3, &["vm", "start", "nobody"]);
    lab.refused(3, &["volume", "show", "nothing"]);
    lab.refused(2, &["volume", "delete", "v"]);
    lab.refused(3, &["vm", "create", "m", "--image", "unknown", "--disk", "1G"]);

    let scratch = tempfile::tempdir().expect("a folder");
    let broken = scratch.path().join("broken.qcow2");
    std::fs::write(&broken, b"QFI\xfb\0\0\0\x03 and then nothing that makes sense").expect("written");
    let path = broken.to_str().expect("a plain path");
    lab.refused(2, &["image", "import", path, "--format", "qcow2"]);
    lab.refused(2, &["image", "import", "/nonexistent/image.raw"]);

    let wrong = scratch.path().join("token");
    std::fs::write(&wrong, "not-the-token\n").expect("written");
    let wrong = wrong.to_str().expect("a plain path");
    let refused = lab.refused(5, &["--token-file", wrong, "status"]);
    assert!(refused.to_lowercase().contains("token"), "it says what is wrong: {refused}");

    let garbage: Vec<u8> = (0..4096u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    for host in ["10.76.0.1", "10.76.0.2", "10.76.0.253", "10.76.0.101", "10.76.0.102"] {
        for port in [7401, 7443, 7500, 8000, 10809] {
            throw(format!("{host}:{port}").parse().expect("an address"), &garbage);
            throw(format!("{host}:{port}").parse().expect("an address"), b"GET / HTTP/1.1\r\n\r\n");
        }
    }
    let udp = std::net::UdpSocket::bind("0.0.0.0:0").expect("a socket");
    for host in ["10.76.0.1:7402", "10.76.0.2:7402"] {
        udp.send_to(&garbage[..1200], host).expect("sent");
    }

    let daemons = ["noded", "blockd", "pollux-guard"];
    let all = |lab: &Lab| -> Vec<Vec<i32>> {
        ["a", "b"].iter().flat_map(|node| daemons.iter().map(|name| lab.pids(node, name))).collect()
    };
    let before = all(&lab);
    assert!(before.iter().all(|pids| pids.len() == 1), "every daemon runs: {before:?}");
    wait_until("the site is protected as before", || is_protected(&lab));
    assert_eq!(all(&lab), before, "no daemon was started anew");
    assert_eq!(lab.json(&["volume", "list"]).as_array().map(Vec::len), Some(1), "nothing was made by what was refused");
}

/// Guards: daemons die and are restarted under clients that notice a pause, never an error, and nothing is lost; a node
/// that dies takes no acknowledged write with it, and gets back what it missed.
#[test]
fn clients_see_a_pause_when_daemons_die_and_volumes_move_when_a_node_does() {
    let lab = Lab::up();
    wait_until("the site is protected", || is_protected(&lab));
    lab.ok(&["volume", "create", "v", "--size", "256M"]);
    let volume = lab.json(&["volume", "show", "v"]);
    let primary = volume["primary"].as_str().expect("a primary").to_owned();
    let other = if primary == "a" { "b" } else { "a" };
    let uri = unix_uri(&lab, "v", &primary);

    // noded is not in the way of I/O.
    lab.kill_daemon(&primary, "noded");
    let written = qemu_io(&uri, &["write -P 0x11 0 1M", "flush"]);
    assert!(written.status.success(), "{}", String::from_utf8_lossy(&written.stdout));

    // A client with a reconnect delay, as QEMU has one for guests, over the death of blockd.
    let options = format!(
        "driver=nbd,export=v,server.type=unix,server.path={},reconnect-delay=60,open-timeout=60",
        uri.split("socket=").nth(1).expect("a socket")
    );
    let mut client = Ended(
        Command::new("qemu-io")
            .args(["--image-opts", &options])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io is installed"),
    );
    {
        use std::io::{BufRead, BufReader, Write};
        let mut words = client.0.stdin.take().expect("piped");
        let mut lines = BufReader::new(client.0.stdout.take().expect("piped")).lines();
        let mut say = |command: &str, expected: &str| {
            words.write_all(format!("{command}\n").as_bytes()).expect("qemu-io listens");
            let line = lines
                .by_ref()
                .map_while(Result::ok)
                .find(|line| line.contains("bytes at offset") || line.contains("rror"));
            let line = line.expect("qemu-io answers");
            assert!(line.contains(expected), "{command}: {line}");
        };
        say("write -P 0x22 1M 1M", "wrote");
        lab.kill_daemon(&primary, "blockd");
        say("write -P 0x33 2M 1M", "wrote");
        say("read -P 0x22 1M 1M", "read");
        words.write_all(b"quit\n").expect("qemu-io listens");
    }

    lab.ok(&["lab", "pull", &primary]);
    wait_until("the other node serves the volume", || lab.json(&["volume", "show", "v"])["primary"] == other);
    let uri = unix_uri(&lab, "v", other);
    let mut checked = None;
    wait_until("the volume can be read there", || {
        let output = qemu_io(&uri, &["read -P 0x11 0 1M", "read -P 0x22 1M 1M", "read -P 0x33 2M 1M"]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let is_read = output.status.success();
        checked = Some(text);
        is_read
    });
    let text = checked.expect("read");
    assert!(!text.contains("verification failed"), "every acknowledged write is there: {text}");
    let written = qemu_io(&uri, &["write -P 0x44 4M 64k", "flush"]);
    assert!(written.status.success());

    lab.ok(&["lab", "return", &primary]);
    // Until it has read the log again, the returned node knows of no volume.
    let is_healthy = || {
        let shown = lab.run(&["volume", "show", "v", "-o", "json"]);
        serde_json::from_slice::<serde_json::Value>(&shown.stdout).is_ok_and(|volume| volume["state"] == "healthy")
    };
    wait_until("the returned node is in sync", || is_healthy() && is_protected(&lab));
}

/// Guards: the main job, end to end: both plugs pulled in turn, links cut, every acknowledged write counted.
#[test]
fn the_demo_holds() {
    let _turn = turn();
    let image = root().join("target/guest.qcow2");
    let made = Command::new(root().join("scripts/make-image")).arg(&image).status().expect("the script is there");
    assert!(made.success(), "the guest's image is made");
    let report = tempfile::NamedTempFile::new().expect("a file");
    let status = pollux().args(["lab", "demo", "--image"]).arg(&image).arg("--json").arg(report.path()).status();
    assert!(status.expect("the demo starts").success(), "the demo failed");
    let figures = std::fs::read_to_string(report.path()).expect("figures");
    let figures: serde_json::Value = serde_json::from_str(&figures).expect("JSON");
    assert_eq!(figures["ok"], true);
    assert_eq!(figures["summary"]["lost"], 0, "no acknowledged write was lost: {figures}");
    assert!(figures["summary"]["acknowledged"].as_u64() > Some(0), "something was counted: {figures}");
}

/// Guards: what is stored of an encrypted volume is on no disk as it was written, on either node, and comes back through
/// the death of every daemon, a snapshot, a clone, and the loss of a node.
#[test]
fn an_encrypted_volume_is_read_by_clients_and_from_no_disk() {
    let lab = Lab::up();
    wait_until("the site is protected", || is_protected(&lab));
    lab.ok(&["volume", "create", "open", "--size", "64M"]);
    lab.ok(&["volume", "create", "secret", "--size", "64M", "--encrypted"]);
    let is_encrypted = |volume: &str| lab.json(&["volume", "show", volume])["encrypted"] == true;
    assert!(is_encrypted("secret") && !is_encrypted("open"));
    let primary = |volume: &str| lab.json(&["volume", "show", volume])["primary"].as_str().expect("a node").to_owned();
    let uri = |volume: &str| unix_uri(&lab, volume, &primary(volume));
    for (volume, pattern) in [("open", "0x5a"), ("secret", "0xa5")] {
        let commands = [format!("write -P {pattern} 1M 1M"), format!("write -P {pattern} 4195000 700"), "flush".into()];
        let written = qemu_io(&uri(volume), &commands.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(written.status.success(), "{}", String::from_utf8_lossy(&written.stderr));
    }
    lab.ok(&["volume", "snapshot", "secret", "one"]);
    lab.ok(&["volume", "clone", "secret@one", "copy"]);
    assert!(is_encrypted("secret@one") && is_encrypted("copy"));
    for node in ["a", "b"] {
        lab.kill_daemon(node, "noded");
        lab.kill_daemon(node, "blockd");
    }
    wait_until("the site is protected again", || is_protected(&lab));
    let is_read = |volume: &str| {
        let mut command = Command::new("qemu-io");
        for words in ["read -P 0xa5 1M 1M", "read -P 0xa5 4195000 700", "read -P 0 4195700 1000"] {
            command.args(["-c", words]);
        }
        // A snapshot is read only.
        let output = command.args(["-r", "-f", "raw", &uri(volume)]).output().expect("qemu-io is installed");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(!text.contains("verification failed"), "{volume}: {text}");
        output.status.success()
    };
    for volume in ["secret", "secret@one", "copy"] {
        wait_until(volume, || is_read(volume));
    }
    for node in ["a", "b"] {
        assert!(
            lab.pool_holds(node, 0x5a) && !lab.pool_holds(node, 0xa5),
            "only the volume in the clear can be read from the pool of {node}"
        );
    }
    let lost = primary("secret");
    lab.ok(&["lab", "pull", &lost]);
    wait_until("the other node serves it", || primary("secret") != lost && is_read("secret"));
    lab.ok(&["lab", "return", &lost]);
    wait_until("the returned node is in sync", || is_protected(&lab));
}
