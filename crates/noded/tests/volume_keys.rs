//! Keys of volumes that are encrypted at rest, with two real `noded`: made where they are asked for, handed to both data planes
//! (for which the test stands in), and nowhere else in the open.
#![allow(clippy::unwrap_used)]

mod common;

use common::guard::{Sky, play_guard};
use common::{PATIENCE, Site, until};
use pollux_api::{ClientError, CreateVm, CreateVolume, ErrorCode, NodeState};
use pollux_base::{KeyId, Order, VolumeSecret};
use std::collections::BTreeMap;
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
        write_key(&path, byte);
        path
    });
    fs::write(site.path(&format!("node-{node}.json")), serde_json::to_vec(&config).unwrap()).unwrap();
}

fn write_key(path: &Path, byte: u8) {
    fs::write(path, [byte; 32]).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

/// Where the master key of this node lies, and its successor.
fn master_files(site: &Site, node: usize) -> (PathBuf, PathBuf) {
    let file = site.path(&format!("master-{node}"));
    let beside = pollux_seal::successor_file(&file);
    (file, beside)
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

/// The first keys that are handed over.
fn keys(orders: &mut BufReader<UnixStream>, count: usize) -> BTreeMap<KeyId, VolumeSecret> {
    let mut handed = BTreeMap::new();
    while handed.len() < count {
        let mut line = String::new();
        assert!(orders.read_line(&mut line).unwrap() > 0, "noded has hung up");
        if let Order::VolumeKey { key, secret } = serde_json::from_str(&line).unwrap() {
            handed.insert(key, secret);
        }
    }
    handed
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

/// The names of master keys under which keys are sealed, and how many volumes each has.
fn sealed_under(site: &Site) -> Vec<(String, usize)> {
    let sealed = site.client(0).master_keys().unwrap().sealed;
    sealed.into_iter().map(|under| (under.master_key, under.volumes.len())).collect()
}

fn rotate(site: &Site, node: usize) -> Result<String, String> {
    let client = site.client(node);
    let taken = until("an answer", || match client.rotate_master_key() {
        Err(ClientError::Refused(error)) if error.code == ErrorCode::NoQuorum => None,
        answer => Some(answer),
    });
    let accepted = taken.map_err(|error| error.to_string())?;
    client.wait_task(&accepted.task, PATIENCE, |_| {}).map(|task| task.detail).map_err(|error| error.to_string())
}

#[test]
fn the_master_key_is_exchanged_and_the_old_one_is_needed_no_more() {
    let site = Site::new(2);
    let _witness = site.start_witness();
    let planes = [data_plane(&site, 0), data_plane(&site, 1)];
    (0..2).for_each(|node| write_master(&site, node, Some(5)));
    let mut nodes: Vec<_> = (0..2).map(|node| site.start_written_node(node)).collect();
    until_members(&site);
    create(&site, "secret").expect("it is made");
    let mut orders = connected(&planes[1]);
    let before = key(&mut orders);
    let old = site.client(0).master_keys().unwrap().master_key.unwrap();
    assert_eq!(sealed_under(&site), [(old.clone(), 1)]);

    let nothing = rotate(&site, 0).expect_err("there is no successor");
    assert!(nothing.contains("no successor"), "{nothing}");
    let restart = |nodes: &mut Vec<common::Daemon>, node: usize| {
        nodes.remove(node).kill();
        nodes.insert(node, site.start_written_node(node));
        // Heard, and a member again.
        let is_back = || {
            let shown = site.client(1 - node).nodes().ok()?;
            let own = site.client(node).nodes().ok()?;
            let all = shown.iter().chain(&own).all(|node| node.state == NodeState::Online);
            let heard = site.client(1 - node).master_keys().ok()?.nodes.iter().all(|node| node.heard);
            (all && heard).then_some(())
        };
        until("it is back", is_back);
    };
    write_key(&master_files(&site, 0).1, 6);
    restart(&mut nodes, 0);
    let lacking = rotate(&site, 0).expect_err("b has it not");
    assert!(lacking.contains("node `b` has not the master key"), "{lacking}");
    write_key(&master_files(&site, 1).1, 6);
    restart(&mut nodes, 1);
    let told =
        |what: &str| until(what, || site.client(0).master_keys().unwrap().hint.filter(|hint| hint.contains(what)));
    told("every node has the successor");

    fs::rename(master_files(&site, 0).1, site.path("away")).unwrap();
    let gone = rotate(&site, 0).expect_err("nothing is sealed under what is only in memory");
    assert!(gone.contains("not there any more"), "{gone}");
    fs::rename(site.path("away"), master_files(&site, 0).1).unwrap();
    let new = until("it is known", || site.client(0).master_keys().unwrap().nodes[0].successor.clone());
    assert!(rotate(&site, 0).unwrap().contains(&new));
    assert_eq!(sealed_under(&site), [(new.clone(), 1)]);
    create(&site, "later").expect("while both are there");
    assert_eq!(sealed_under(&site), [(new.clone(), 2)]);

    for node in 0..2 {
        let (file, beside) = master_files(&site, node);
        fs::rename(beside, file).unwrap();
        restart(&mut nodes, node);
    }
    until("tidy", || site.client(0).master_keys().unwrap().hint.is_none().then_some(()));
    // Its second life, and its third, which has the new master key alone.
    let mut lives = [connected(&planes[1]), connected(&planes[1])];
    for orders in &mut lives {
        assert_eq!(keys(orders, 2).get(&before.0), Some(&before.1), "the same key as before");
    }
    assert!(rotate(&site, 1).unwrap().contains(&new), "asked once more it is as well");
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
