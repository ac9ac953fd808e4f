//! Keys of volumes that are encrypted at rest, with two real `noded`: made where they are asked for, handed to both data planes
//! (for which the test stands in), and nowhere else in the open.
#![allow(clippy::unwrap_used)]

mod common;

use common::guard::{Sky, play_guard};
use common::{PATIENCE, Site, until};
use pollux_api::{ClientError, CreateVm, CreateVolume, ErrorCode, NodeState};
use pollux_base::{KeyId, Order, VolumeSecret};
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// The master key of this node, and a configuration that names it.
fn write_master(site: &Site, node: usize, master: Option<u8>) {
    let mut config = site.config(node);
    config.master_key_file = master.map(|byte| {
        let path = site.path(&format!("master-{node}"));
        fs::write(&path, [byte; 32]).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path
    });
    fs::write(site.path(&format!("node-{node}.json")), serde_json::to_vec(&config).unwrap()).unwrap();
}

/// The test in the place of a node's `blockd`.
fn data_plane(site: &Site, node: usize) -> UnixListener {
    let config = site.config(node);
    fs::create_dir_all(&config.run_dir).unwrap();
    let listener = UnixListener::bind(config.data_socket()).unwrap();
    listener.set_nonblocking(true).unwrap();
    listener
}

fn connected(plane: &UnixListener) -> BufReader<UnixStream> {
    let stream = until("noded connects", || plane.accept().ok()).0;
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    BufReader::new(stream)
}

/// The next key of a volume that is handed over, and the first record after it that names one.
fn key(orders: &mut BufReader<UnixStream>) -> (KeyId, VolumeSecret) {
    let mut handed = None;
    loop {
        let mut line = String::new();
        assert!(orders.read_line(&mut line).unwrap() > 0, "noded has hung up");
        match serde_json::from_str(&line).unwrap() {
            Order::VolumeKey { key, secret } => handed = Some((key, secret)),
            Order::Group(spec) if !spec.keys.is_empty() => {
                let (key, secret) = handed.expect("a key comes before the record that names it");
                assert!(spec.keys.values().all(|named| *named == key));
                return (key, secret);
            }
            _ => {}
        }
    }
}

fn until_members(site: &Site) {
    let sky = Arc::new(Mutex::new(Sky::default()));
    (0..2).for_each(|node| play_guard(site, node, sky.clone()));
    for node in 0..2 {
        let states = || site.client(node).nodes().ok().map(|nodes| nodes.iter().map(|n| n.state).collect::<Vec<_>>());
        until("both are members", || states().filter(|states| *states == [NodeState::Online; 2]));
    }
}

fn create(site: &Site, name: &str) -> Result<(), ClientError> {
    let request = CreateVolume { name: name.into(), size_bytes: 1 << 20, encrypted: true };
    until(name, || match site.client(0).create_volume(&request) {
        Ok(_) => Some(Ok(())),
        Err(ClientError::Refused(error)) if error.code == ErrorCode::NoQuorum => None,
        Err(error) => Some(Err(error)),
    })
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[test]
fn a_key_reaches_both_data_planes_and_lies_nowhere_in_the_open() {
    let site = Site::new(2);
    let _witness = site.start_witness();
    let planes = [data_plane(&site, 0), data_plane(&site, 1)];
    (0..2).for_each(|node| write_master(&site, node, Some(5)));
    let (_a, node_b) = (site.start_written_node(0), site.start_written_node(1));
    let (mut a, mut b) = (connected(&planes[0]), connected(&planes[1]));
    until_members(&site);
    create(&site, "secret").expect("it is made");
    let (name, secret) = key(&mut a);
    assert_eq!(key(&mut b), (name, secret.clone()), "both have the same");
    assert_eq!(KeyId::of(&secret), name, "and it is the one of that name");
    let shown = site.client(1).volume("secret").unwrap();
    assert!(shown.encrypted);

    // A data plane, and a noded, that were restarted: from the log and the file it is there again.
    drop(b);
    let mut b = connected(&planes[1]);
    assert_eq!(key(&mut b), (name, secret.clone()));
    node_b.kill();
    let _b = site.start_written_node(1);
    let mut b = connected(&planes[1]);
    assert_eq!(key(&mut b), (name, secret.clone()));

    let text = serde_json::to_string(&secret).unwrap().replace('"', "");
    for path in files(site.folder.path()) {
        let Ok(bytes) = fs::read(&path) else { continue };
        let holds = |part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
        assert!(!holds(&secret.expose()[..16]) && !holds(&text.as_bytes()[..32]), "{} holds it", path.display());
    }
}

#[test]
fn without_the_same_master_key_on_both_nodes_nothing_is_encrypted_and_it_is_said_why() {
    for (masters, why) in [
        ([None, None], "this node has no master key"),
        ([Some(5), None], "node `b` has no master key"),
        ([Some(5), Some(6)], "node `b` has another master key"),
    ] {
        let site = Site::new(2);
        let _witness = site.start_witness();
        (0..2).for_each(|node| write_master(&site, node, masters[node]));
        let (_a, _b) = (site.start_written_node(0), site.start_written_node(1));
        until_members(&site);
        let error = create(&site, "secret").expect_err(why);
        assert!(error.to_string().contains(why), "{error}");
        assert!(site.client(0).volumes().unwrap().is_empty());
    }
}

#[test]
fn a_vm_says_whether_its_disks_are_encrypted() {
    let site = Site::new(2);
    let _witness = site.start_witness();
    (0..2).for_each(|node| write_master(&site, node, Some(5)));
    let (_a, _b) = (site.start_written_node(0), site.start_written_node(1));
    until_members(&site);
    let client = site.client(0);
    for (name, encrypted) in [("secret", true), ("open", false)] {
        let request = CreateVm {
            name: name.into(),
            cpus: 1,
            memory_bytes: 1 << 20,
            image: None,
            disk_bytes: vec![1 << 20],
            encrypted,
        };
        until(name, || match client.create_vm(&request) {
            Ok(_) => Some(()),
            Err(ClientError::Refused(error)) if error.code == ErrorCode::NoQuorum => None,
            Err(error) => panic!("{error}"),
        });
        assert_eq!(client.vm(name).unwrap().encrypted, encrypted, "{name}");
    }
}

#[test]
fn a_node_whose_master_key_others_may_read_does_not_start() {
    let site = Site::new(1);
    write_master(&site, 0, Some(5));
    fs::set_permissions(site.path("master-0"), fs::Permissions::from_mode(0o644)).unwrap();
    let config = site.text("node-0.json");
    let init = std::process::Command::new(env!("CARGO_BIN_EXE_noded")).args(["init", "--config", &config]).output();
    let init = init.unwrap();
    assert!(!init.status.success());
    assert!(String::from_utf8_lossy(&init.stderr).contains("chmod 600"));
}
