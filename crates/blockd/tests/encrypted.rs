//! A volume that is encrypted at rest, with two real `blockd`: clients see plain text, the files of both pools hold none of it.

mod site;

use pollux_base::order::{FreezeReason, ReplicaState};
use pollux_base::record::GroupNames;
use pollux_base::{KeyId, NodeId, Order, VolumeSecret};
use pollux_seal::MasterKey;
use site::{GROUP, Node, Outcome, Site, VOLUME, exports, group, qemu_io};
use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

fn secret() -> VolumeSecret {
    VolumeSecret::new(std::array::from_fn(|at| (at * 3 + 5) as u8))
}

fn volume_key() -> Order {
    Order::VolumeKey { key: KeyId::of(&secret()), secret: secret() }
}

/// The group's record, and whether its volume is encrypted.
fn record(generation: u64, primary: u64, in_sync: &[u64], is_encrypted: bool) -> Order {
    match group(generation, primary, in_sync) {
        Order::Group(mut spec) => {
            if is_encrypted {
                spec.keys.insert(VOLUME, KeyId::of(&secret()));
            }
            Order::Group(spec)
        }
        other => other,
    }
}

fn mirrored(site: &Site, is_encrypted: bool) -> Outcome<(Node, Node)> {
    let (mut first, mut second) = (site.start(1)?, site.start(2)?);
    for node in [&mut first, &mut second] {
        if is_encrypted {
            node.order(&volume_key())?;
        }
        node.order(&record(1, 1, &[1, 2], is_encrypted))?;
        node.order(&exports())?;
    }
    first.wait_until_serving(1)?;
    Ok((first, second))
}

/// Whether so many bytes of this value lie one after the other in the node's pool.
fn holds(site: &Site, node: u64, value: u8) -> Outcome<bool> {
    let mut file = std::fs::File::open(&site.configs[&node].pool.path)?;
    let (mut buffer, mut run) = (vec![0; 1 << 20], 0);
    loop {
        let len = file.read(&mut buffer)?;
        if len == 0 {
            return Ok(false);
        }
        for byte in &buffer[..len] {
            run = if *byte == value { run + 1 } else { 0 };
            if run == 64 {
                return Ok(true);
            }
        }
    }
}

const WRITES: [&str; 6] = [
    "write -P 0xa7 4M 1M",
    // Parts of blocks: of one that is written, and of one that is not.
    "write -P 0xb8 4195000 700",
    "write -P 0xb8 9000000 5000",
    "write -z 4300800 8k",
    "discard 5M 4k",
    "flush",
];
const READS: [&str; 8] = [
    "read -P 0xa7 4M 696",
    "read -P 0xb8 4195000 700",
    "read -P 0xa7 4195700 100k",
    "read -P 0 4300800 8k",
    "read -P 0xb8 9000000 5000",
    "read -P 0 9005000 3000",
    "read -P 0 8996000 4000",
    "read -P 0 30M 1M",
];

#[test]
fn clients_see_plain_text_and_the_pools_of_both_nodes_hold_none() -> Outcome {
    for is_encrypted in [false, true] {
        let site = Site::formatted()?;
        let (first, second) = mirrored(&site, is_encrypted)?;
        qemu_io(&first.uri(), &WRITES)?;
        qemu_io(&first.uri(), &READS)?;
        qemu_io(&first.tcp_uri(), &READS)?;
        // Both are killed: what is acknowledged and flushed is in the files.
        first.kill()?;
        second.kill()?;
        for (node, value) in [(1, 0xa7), (2, 0xa7), (1, 0xb8), (2, 0xb8)] {
            assert_eq!(holds(&site, node, value)?, !is_encrypted, "{value:x} on node {node}");
        }
        let (mut first, _second) = mirrored(&site, is_encrypted)?;
        first.wait_until_serving(1)?;
        qemu_io(&first.uri(), &READS)?;
    }
    Ok(())
}

#[test]
fn a_client_waits_through_a_restart_until_the_key_is_there_and_the_other_node_serves_with_it() -> Outcome {
    let site = Site::formatted()?;
    let (first, mut second) = mirrored(&site, true)?;
    qemu_io(&first.uri(), &WRITES)?;
    first.kill()?;
    // Node 2 has the key already; it takes over and reads what node 1 wrote.
    second.order(&record(2, 2, &[2], true))?;
    second.order(&Order::Fenced { node: NodeId(1) })?;
    second.wait_until_serving(2)?;
    qemu_io(&second.uri(), &READS)?;
    second.kill()?;

    let mut second = site.start(2)?;
    second.order(&record(2, 2, &[2], true))?;
    second.order(&exports())?;
    let no_key = ReplicaState::Frozen { reason: FreezeReason::NoKey { volume: VOLUME } };
    let report = second.wait_for_state(|state| *state == no_key)?;
    assert_eq!(report.group, GROUP);
    let mut client = Command::new("qemu-io")
        .args(["-f", "raw", "-c", "read -P 0xb8 4195000 700", &second.uri()])
        .stdout(Stdio::piped())
        .spawn()?;
    // Another key under its name is none.
    let other = VolumeSecret::new(std::array::from_fn(|at| !secret().expose()[at]));
    second.order(&Order::VolumeKey { key: KeyId::of(&secret()), secret: other })?;
    second.wait_for_state(|state| *state == no_key)?;
    assert!(client.try_wait()?.is_none(), "it waits");
    second.order(&volume_key())?;
    second.wait_until_serving(2)?;
    let output = client.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && !text.contains("Pattern verification failed"), "{text}");
    let digits: String = secret().expose()[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(!second.log().contains(&digits), "a key is in the log");
    Ok(())
}

/// Of an encrypted volume, with its sealed key on the pool as `noded` has it written there.
#[test]
fn a_rescue_has_plain_text_from_the_pool_and_the_master_key_alone() -> Outcome {
    let site = Site::formatted()?;
    let folder = site.configs[&1].pool.path.parent().expect("a folder").to_owned();
    let master_file = |name: &str, byte: u8| -> Outcome<PathBuf> {
        let path = folder.join(name);
        std::fs::write(&path, [byte; 32])?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        Ok(path)
    };
    let (right, wrong) = (master_file("master", 1)?, master_file("other", 2)?);
    let master = MasterKey::read(&right, site.configs[&1].cluster)?;
    let names = GroupNames {
        owner: "data".into(),
        volumes: [(VOLUME, "data".into())].into(),
        keys: [(VOLUME, master.seal(&secret())?)].into(),
    };
    let (mut first, second) = mirrored(&site, true)?;
    let open = Order::Names { group: GROUP, names: GroupNames { keys: BTreeMap::new(), ..names.clone() } };
    first.order(&open)?;
    qemu_io(&first.uri(), &WRITES)?;
    assert_eq!(first.terminate()?, Some(0));

    let rescue = |to: &str, master: Option<&PathBuf>| -> Outcome<(Output, PathBuf)> {
        let to = folder.join(to);
        let text = to.display().to_string();
        let mut arguments = vec!["rescue", "--export", "data", "--to", &text];
        let master = master.map(|path| path.display().to_string());
        arguments.extend(master.iter().flat_map(|path| ["--master-key", path]));
        Ok((site.blockd(1, &arguments)?, to))
    };
    let (no_key, _) = rescue("none", Some(&right))?;
    assert!(no_key.status.code() == Some(2) && said(&no_key).contains("no sealed key of `data`"), "{}", said(&no_key));

    let mut first = site.start(1)?;
    first.order(&volume_key())?;
    first.order(&record(1, 1, &[1, 2], true))?;
    first.order(&Order::Names { group: GROUP, names })?;
    first.wait_until_serving(1)?;
    assert_eq!(first.terminate()?, Some(0));
    drop(second);
    let listed = site.blockd(1, &["rescue"])?;
    assert!(said(&listed).contains(&format!("encrypted under the master key {}", master.id())), "{}", said(&listed));

    let (stored, path) = rescue("stored", None)?;
    assert!(stored.status.success() && said(&stored).contains("it is encrypted, and so is"), "{}", said(&stored));
    let content = std::fs::read(path)?;
    assert!(content[4 << 20..5 << 20].iter().filter(|byte| **byte == 0xa7).count() < 1 << 16, "cipher text");
    assert!(content[30 << 20..].iter().all(|byte| *byte == 0), "nothing was written there");

    let (plain, path) = rescue("plain", Some(&right))?;
    assert!(plain.status.success() && said(&plain).contains("plain text"), "{}", said(&plain));
    qemu_io(&format!("file:{}", path.display()), &READS)?;

    let (refused, path) = rescue("refused", Some(&wrong))?;
    assert!(refused.status.code() == Some(2), "{}", said(&refused));
    assert!(said(&refused).contains(&master.id().to_string()) && !path.exists(), "{}", said(&refused));
    std::fs::set_permissions(&right, std::fs::Permissions::from_mode(0o644))?;
    let (others, path) = rescue("others", Some(&right))?;
    assert!(others.status.code() == Some(2) && said(&others).contains("chmod 600") && !path.exists());
    Ok(())
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}
