//! Two real `blockd` processes and a hand-written `noded`: what is written through one node is on both, and outlives
//! either.

mod site;

use nix::sys::signal::Signal;
use pollux_base::order::ReplicaState;
use pollux_base::{NodeId, Order, Report};
use site::{Node, Outcome, PATIENCE, Site, VOLUME_SIZE, exports, group, qemu_io, run, text};
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::Instant;

/// Both nodes up, node 1 serves, both in sync.
fn mirrored(site: &Site) -> Outcome<(Node, Node)> {
    let (mut first, mut second) = (site.start(1)?, site.start(2)?);
    for node in [&mut first, &mut second] {
        node.order(&group(1, 1, &[1, 2]))?;
        node.order(&exports())?;
    }
    first.wait_until_serving(1)?;
    Ok((first, second))
}

/// The record moves to node 2, of whose old primary it is known that it is dead.
fn take_over(second: &mut Node, generation: u64) -> Outcome {
    second.order(&group(generation, 2, &[2]))?;
    second.order(&Order::Fenced { node: NodeId(1) })?;
    second.wait_until_serving(generation)
}

#[test]
fn what_one_node_acknowledged_the_other_has_when_it_takes_over() -> Outcome {
    let site = Site::formatted()?;
    let (first, mut second) = mirrored(&site)?;
    let source = site.dir.path().join("source");
    let bytes: Vec<u8> = (0..VOLUME_SIZE / 8).flat_map(|word| (word.wrapping_mul(0x9e37_79b9)).to_le_bytes()).collect();
    std::fs::write(&source, &bytes)?;
    run("nbdcopy", &["--flush", text(&source), &first.tcp_uri()])?;
    qemu_io(&first.uri(), &["write -P 3 4M 8M", "write -z 6M 1M", "discard 7M 64k", "flush"])?;
    let expected = site.dir.path().join("expected");
    run("nbdcopy", &[&first.uri(), text(&expected)])?;
    qemu_io(&first.uri(), &["read -P 3 4M 2M", "read -P 0 6M 1M"])?;
    first.kill()?;

    take_over(&mut second, 2)?;
    let actual = site.dir.path().join("actual");
    run("nbdcopy", &[&second.tcp_uri(), text(&actual)])?;
    assert!(std::fs::read(&expected)? == std::fs::read(&actual)?, "the other node has other bytes");
    Ok(())
}

#[test]
fn a_secondary_that_dies_is_dropped_comes_back_and_can_take_over() -> Outcome {
    let site = Site::formatted()?;
    let (mut first, second) = mirrored(&site)?;
    qemu_io(&first.uri(), &["write -P 1 0 4M", "flush"])?;
    second.kill()?;
    first.wait_for("the loss of node 2", |report| matches!(report, Report::ReplicaLost { node: NodeId(2), .. }))?;
    first.order(&group(2, 1, &[1]))?;
    first.wait_until_serving(2)?;
    qemu_io(&first.uri(), &["write -P 2 1M 1M", "write -P 3 20M 64k", "flush"])?;

    let mut second = site.start(2)?;
    second.order(&group(2, 1, &[1]))?;
    second.order(&exports())?;
    first
        .wait_for("node 2 being current", |report| matches!(report, Report::ReplicaCurrent { node: NodeId(2), .. }))?;
    for node in [&mut first, &mut second] {
        node.order(&group(3, 1, &[1, 2]))?;
    }
    first.wait_until_serving(3)?;
    second.wait_for_state(|state| *state == ReplicaState::Secondary)?;
    qemu_io(&first.uri(), &["write -P 4 2M 1M"])?;
    first.kill()?;

    take_over(&mut second, 4)?;
    qemu_io(
        &second.uri(),
        &[
            "read -P 1 0 1M",
            "read -P 2 1M 1M",
            "read -P 4 2M 1M",
            "read -P 1 3M 1M",
            "read -P 3 20M 64k",
            "read -P 0 24M 1M",
        ],
    )?;
    Ok(())
}

#[test]
fn a_secondary_that_is_silent_for_a_while_is_a_pause() -> Outcome {
    let site = Site::formatted()?;
    let (mut first, second) = mirrored(&site)?;
    qemu_io(&first.uri(), &["write -P 1 0 1M"])?;
    second.signal(Signal::SIGSTOP)?;
    first.wait_for("the loss of node 2", |report| matches!(report, Report::ReplicaLost { node: NodeId(2), .. }))?;
    second.signal(Signal::SIGCONT)?;
    // No record was made without it, so it is still needed, and still there.
    qemu_io(&first.uri(), &["write -P 2 1M 1M", "flush", "read -P 1 0 1M", "read -P 2 1M 1M"])?;
    Ok(())
}

#[test]
fn fio_verifies_a_mirrored_volume() -> Outcome {
    let site = Site::formatted()?;
    let (first, _second) = mirrored(&site)?;
    let uri = format!("--uri={}", first.uri());
    for (block, depth) in [("--bs=4k", "--iodepth=32"), ("--bs=1m", "--iodepth=4")] {
        let mut arguments = vec!["--name=verify", "--ioengine=nbd", "--rw=randwrite", "--size=16m", block, depth];
        arguments.extend(["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--fsync=64", &uri]);
        run("fio", &arguments)?;
    }
    Ok(())
}

#[test]
fn a_restarted_daemon_is_a_pause_for_its_client_never_an_error() -> Outcome {
    let site = Site::formatted()?;
    let (first, mut second) = mirrored(&site)?;
    let options = format!(
        "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={},file.export=disk,file.reconnect-delay=60",
        first.config.nbd_socket().display()
    );
    let mut client = Command::new("qemu-io")
        .args(["--image-opts", &options])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut stdin = client.stdin.take().ok_or("stdin is piped")?;
    let mut stdout = BufReader::new(client.stdout.take().ok_or("stdout is piped")?);
    // Each command answers with one line that names the bytes it moved.
    let mut ask = |command: &str, wanted: &str| -> Outcome {
        writeln!(stdin, "{command}")?;
        let mut line = String::new();
        while !line.contains(wanted) {
            line.clear();
            if stdout.read_line(&mut line)? == 0 {
                return Err(format!("qemu-io has ended at `{command}`").into());
            }
            assert!(!line.contains("failed") && !line.contains("error"), "{command}: {line}");
        }
        Ok(())
    };
    ask("write -P 1 0 1M", "wrote 1048576")?;
    first.kill()?;
    let mut first = site.start(1)?;
    for node in [&mut first, &mut second] {
        node.order(&group(1, 1, &[1, 2]))?;
    }
    first.order(&exports())?;
    let start = Instant::now();
    ask("write -P 2 1M 1M", "wrote 1048576")?;
    ask("read -P 1 0 1M", "read 1048576")?;
    ask("read -P 2 1M 1M", "read 1048576")?;
    assert!(start.elapsed() < PATIENCE, "the pause was {:?}", start.elapsed());
    writeln!(stdin, "quit")?;
    drop(stdin);
    assert!(client.wait()?.success());
    Ok(())
}
