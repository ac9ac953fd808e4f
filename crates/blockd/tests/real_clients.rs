//! The NBD front end against the clients that people use. The kernel's own client (`nbd-client`) is not among them: it
//! needs a module that test machines do not have.

mod memory;

use memory::{Outcome, SIZE, Server, run, text};
use std::process::Command;
use std::time::Duration;

#[test]
fn nbdinfo_sees_what_is_offered() -> Outcome {
    let server = Server::start()?;
    let info = run("nbdinfo", &["--json", &server.uri()])?;
    let info: serde_json::Value = serde_json::from_str(&info)?;
    let export = &info["exports"][0];
    assert_eq!(info["protocol"], "newstyle-fixed");
    assert_eq!(info["structured"], true);
    assert_eq!(export["export-size"], SIZE);
    for feature in
        ["can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn", "can_df", "can_cache", "can_fast_zero"]
    {
        assert_eq!(export[feature], true, "{feature}");
    }
    assert_eq!(export["is_read_only"], false);
    assert_eq!((&export["block_size_minimum"], &export["block_size_preferred"]), (&1.into(), &4096.into()));
    assert_eq!(export["contexts"][0], "base:allocation");
    let uri = format!("nbd+unix://?socket={}", server.path("nbd.sock").display());
    assert!(run("nbdinfo", &["--list", &uri])?.contains("export=\"disk\""));
    Ok(())
}

#[test]
fn qemu_io_reads_back_what_it_wrote_down_to_the_byte() -> Outcome {
    let server = Server::start()?;
    let commands = [
        "write -P 17 0 1M",
        "write -P 18 -f 5000 700",
        "read -P 18 5000 700",
        "read -P 17 4096 904",
        "read -P 17 8192 4096",
        "write -P 19 512 512",
        "write -P 20 4000 9000",
        "write -z 5000 3",
        "read -P 19 512 512",
        "read -P 17 0 512",
        "read -P 20 4000 1000",
        "read -P 0 5000 3",
        "read -P 20 5003 7997",
        "read -P 17 13000 100",
        "write -P 17 0 16k",
        "write -z 4096 64k",
        "write -z -u 1M 5M",
        "discard 65536 128k",
        "flush",
        "read -P 0 8192 4096",
        "read -P 17 0 4096",
    ];
    let mut arguments = vec!["-f", "raw"];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    let uri = server.uri();
    arguments.push(&uri);
    let printed = run("qemu-io", &arguments)?;
    assert!(!printed.contains("Pattern verification failed"), "{printed}");
    Ok(())
}

#[test]
fn copies_are_the_same_and_holes_stay_holes() -> Outcome {
    let server = Server::start()?;
    let (source, back) = (server.path("source"), server.path("back"));
    let mut bytes = vec![0u8; SIZE as usize];
    for (at, byte) in bytes.iter_mut().enumerate().skip(1 << 20).take(7 << 20) {
        *byte = (at * 31 / 4096) as u8 | 1;
    }
    std::fs::write(&source, &bytes)?;
    run("nbdcopy", &["--connections=4", "--flush", text(&source), &server.uri()])?;
    run("nbdcopy", &[&server.uri(), text(&back)])?;
    assert!(std::fs::read(&back)? == bytes, "nbdcopy gives back other bytes");
    let map = run("nbdinfo", &["--map", "--json", &server.uri()])?;
    let map: serde_json::Value = serde_json::from_str(&map)?;
    let runs: Vec<(u64, u64, u64)> = map
        .as_array()
        .ok_or("a map is a list")?
        .iter()
        .map(|run| {
            (
                run["offset"].as_u64().unwrap_or(9),
                run["length"].as_u64().unwrap_or(9),
                run["type"].as_u64().unwrap_or(9),
            )
        })
        .collect();
    assert_eq!(runs, [(0, 1 << 20, 3), (1 << 20, 7 << 20, 0), (8 << 20, SIZE - (8 << 20), 3)]);
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", text(&source), &server.uri()])?;
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&source), &server.uri()])?;
    Ok(())
}

#[test]
fn fio_verifies_what_it_wrote_at_depth() -> Outcome {
    let server = Server::start()?;
    let uri = format!("--uri={}", server.uri());
    for block in ["--bs=512", "--bs=4k", "--bs=64k", "--bs=1m"] {
        let mut arguments = vec!["--name=verify", "--ioengine=nbd", "--rw=randwrite", "--size=16m", "--iodepth=200"];
        arguments.extend(["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--fsync=32", block, &uri]);
        run("fio", &arguments)?;
    }
    Ok(())
}

#[test]
fn an_unknown_export_is_refused_with_a_reason() -> Outcome {
    let server = Server::start()?;
    let uri = server.uri().replace("/disk", "/other");
    let output = Command::new("qemu-img").args(["info", &uri]).output()?;
    assert!(!output.status.success());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("no export is named `other`"), "{errors}");
    Ok(())
}

/// Several connections, as many clients at once see one disk; what is written in parts of blocks is not lost between them.
const BESIDE_EACH_OTHER: &str = r#"
handles = [nbd.NBD() for _ in range(4)]
for one in handles:
    one.add_meta_context("base:allocation")
    one.set_uri_allow_local_file(True)
    one.connect_uri(uri)
    assert one.can_multi_conn() and one.can_fast_zero() and one.can_cache()
# Each writes its own sectors of the same blocks, many at once, none waits for the other.
want = bytearray(64 * 4096)
cookies = []
for sector in range(512):
    who = handles[sector % 4]
    data = bytes([sector % 255 + 1]) * 512
    want[sector * 512:(sector + 1) * 512] = data
    cookies.append((who, who.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), sector * 512)))
for who, cookie in cookies:
    while not who.aio_command_completed(cookie):
        who.poll(-1)
handles[0].flush()
for one in handles:
    assert one.pread(len(want), 0) == bytes(want), "a patch is lost"
# Odd lengths and places.
for at, count in [(1, 1), (4095, 2), (8191, 4098), (3, 12289)]:
    handles[1].pwrite(b"x" * count, at)
    want[at:at + count] = b"x" * count
    assert handles[2].pread(len(want), 0) == bytes(want), (at, count)
handles[3].zero(5000, 100, nbd.CMD_FLAG_FAST_ZERO)
want[100:5100] = bytes(5000)
handles[3].cache(1000, 5)
handles[2].trim(8192, 4096, nbd.CMD_FLAG_FUA)
want[4096:12288] = bytes(8192)
assert handles[0].pread(len(want), 0) == bytes(want)
told = []
handles[0].block_status(60000, 100, lambda context, offset, entries, error: told.append((offset, list(entries))))
assert told[0][0] == 100 and sum(told[0][1][0::2]) == 60000, told
for flags, count, at in [(0, 0, 0), (0, 1, 1 << 40)]:
    handles[0].set_strict_mode(0)
    try:
        handles[0].pread(count, at)
        raise SystemExit("a wrong read was answered")
    except nbd.Error as error:
        assert error.errno == "EINVAL", error
for one in handles:
    one.shutdown()
"#;

#[test]
fn libnbd_on_four_connections_sees_one_disk_down_to_the_byte() -> Outcome {
    let server = Server::start()?;
    for uri in [server.uri(), server.tls_uri("client")] {
        // The system's Python has the module, whichever other comes first on the path.
        run("/usr/bin/python3", &["-c", &format!("import nbd\nuri = '{uri}'\n{BESIDE_EACH_OTHER}")])?;
    }
    Ok(())
}

#[test]
fn libnbds_tools_and_fio_work_over_tls_with_many_connections() -> Outcome {
    let server = Server::start()?;
    let uri = server.tls_uri("client");
    let info: serde_json::Value = serde_json::from_str(&run("nbdinfo", &["--json", &uri])?)?;
    assert_eq!(info["TLS"], true);
    let (source, back) = (server.path("source"), server.path("back"));
    let bytes: Vec<u8> = (0..SIZE / 8).flat_map(|word| word.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
    std::fs::write(&source, &bytes)?;
    run("nbdcopy", &["--connections=4", "--requests=16", "--flush", text(&source), &uri])?;
    run("nbdcopy", &["--connections=4", &uri, text(&back)])?;
    assert!(std::fs::read(&back)? == bytes, "nbdcopy gives back other bytes");
    // fio lets nobody choose the folder: libnbd looks below the home of whoever is not root.
    let uri = format!("--uri={}", server.default_tls_uri());
    let home = format!("HOME={}", server.path("home").display());
    let mut arguments = vec!["--reuid=65534", "--regid=65534", "--clear-groups", "env", &home, "fio", "--name=verify"];
    arguments.extend(["--ioengine=nbd", "--rw=randwrite", "--bs=64k", "--iodepth=16", "--size=8m", "--numjobs=4"]);
    arguments.extend(["--offset_increment=8m", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"]);
    arguments.extend(["--fsync=32", &uri]);
    run("setpriv", &arguments)?;
    Ok(())
}

#[test]
fn qemus_tools_work_over_tls() -> Outcome {
    let server = Server::start()?;
    let options = server.qemu_tls("client");
    let mut arguments: Vec<&str> = options[..3].iter().map(String::as_str).collect();
    arguments.extend(["-c", "write -P 7 512 100k", "-c", "read -P 7 512 100k", "-c", "read -P 0 0 512", &options[3]]);
    let printed = run("qemu-io", &arguments)?;
    assert!(!printed.contains("Pattern verification failed"), "{printed}");
    let mut arguments = vec!["info"];
    arguments.extend(options.iter().map(String::as_str));
    assert!(run("qemu-img", &arguments)?.contains("64 MiB"));
    Ok(())
}

#[test]
fn who_may_not_come_in_over_the_network_is_told_why() -> Outcome {
    let server = Server::start()?;
    for (uri, wanted) in [
        (server.plain_tcp_uri(), "not supported"),
        // It is let in by its own handshake, and told only afterwards that its certificate is missing.
        (server.tls_uri("nobody"), ""),
    ] {
        let output = Command::new("nbdinfo").arg(&uri).output()?;
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && errors.contains(wanted), "{uri}: {errors}");
    }
    let output = Command::new("qemu-img").args(["info", &server.plain_tcp_uri()]).output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && errors.contains("STARTTLS"), "{errors}");
    Ok(())
}

#[test]
fn qemu_storage_daemon_passes_the_volume_on() -> Outcome {
    let server = Server::start()?;
    let passed_on = server.path("on.sock");
    let daemon = Command::new("qemu-storage-daemon")
        .args(["--blockdev".to_owned(), {
            let path = server.path("nbd.sock");
            format!("driver=nbd,node-name=disk,server.type=unix,server.path={},export=disk", path.display())
        }])
        .args(["--nbd-server".to_owned(), format!("addr.type=unix,addr.path={}", passed_on.display())])
        .args(["--export", "type=nbd,id=on,node-name=disk,name=on,writable=on"])
        .spawn()?;
    let mut daemon = Killed(daemon);
    let start = std::time::Instant::now();
    while !passed_on.exists() {
        if let Some(status) = daemon.0.try_wait()? {
            return Err(format!("qemu-storage-daemon has ended: {status}").into());
        }
        assert!(start.elapsed() < Duration::from_secs(30), "qemu-storage-daemon does not listen");
        std::thread::sleep(Duration::from_millis(10));
    }
    let uri = format!("--uri=nbd+unix:///on?socket={}", passed_on.display());
    let mut arguments = vec!["--name=verify", "--ioengine=nbd", "--rw=randwrite", "--bs=512", "--iodepth=32"];
    arguments.extend(["--size=2m", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--fsync=32", &uri]);
    run("fio", &arguments)?;
    Ok(())
}

/// A process that does not outlive its test.
struct Killed(std::process::Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
