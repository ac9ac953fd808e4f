//! Two real `noded` and a real witness; guards and data planes are played by this test.

mod common;

use common::guard::{Sky, play_guard, serve};
use common::{Daemon, Site, until};
use pollux_api::{ClientError, CreateVolume, ErrorCode, NodeState};
use pollux_base::order::{GroupReport, ReplicaState};
use pollux_base::{NodeId, Order, Report};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Plays the data plane of a node: whatever is ordered is so at once.
fn play_data_plane(site: &Site, node: usize) {
    let here = NodeId(node as u64 + 1);
    serve(&site.config(node).data_socket(), move |mut stream| {
        let orders = BufReader::new(stream.try_clone().expect("a second handle"));
        for line in orders.lines().map_while(Result::ok) {
            if let Order::Group(spec) = serde_json::from_str(&line).expect("noded speaks sense") {
                let primary = spec.record.primary == here;
                let report = Report::Group(Box::new(GroupReport {
                    group: spec.group,
                    stamp: Some(spec.record.stamp),
                    state: if primary { ReplicaState::Serving } else { ReplicaState::Secondary },
                    used_bytes: 0,
                    is_unborn: false,
                    is_incomplete: false,
                    healed_blocks: 0,
                    resync: BTreeMap::new(),
                    scrub: None,
                    findings: Vec::new(),
                    connected: spec.record.in_sync.iter().copied().filter(|node| *node != here).collect(),
                    lag: BTreeMap::new(),
                    is_slowed: false,
                }));
                if writeln!(stream, "{}", serde_json::to_string(&report).expect("JSON")).is_err() {
                    return;
                }
            }
        }
    });
}

fn create_volume(site: &Site, node: usize, name: &str) {
    let client = site.client(node);
    let request = CreateVolume { name: name.into(), size_bytes: 1 << 20, encrypted: false };
    until(name, || match client.create_volume(&request) {
        Ok(accepted) => Some(client.wait_task(&accepted.task, Duration::from_secs(20), |_| {}).expect("it is made")),
        Err(ClientError::Refused(error)) if error.code == ErrorCode::Conflict => panic!("{error}"),
        Err(_) => None,
    });
}

fn states(site: &Site, node: usize) -> Vec<NodeState> {
    site.client(node).nodes().map(|nodes| nodes.iter().map(|node| node.state).collect()).unwrap_or_default()
}

fn volume_names(site: &Site, node: usize) -> Vec<String> {
    let volumes = site.client(node).volumes().unwrap_or_default();
    volumes.into_iter().map(|volume| volume.name).collect()
}

#[test]
fn a_survivor_goes_on_alone_and_takes_the_other_in_again() {
    let site = Site::new(2);
    let sky = Arc::new(Mutex::new(Sky::default()));
    let _witness = site.start_witness();
    for node in 0..2 {
        play_guard(&site, node, sky.clone());
        play_data_plane(&site, node);
    }
    let _a = site.start_node(0);
    let b = site.start_node(1);
    let show_on_failure = ShowLogs(&site);
    until("both are members", || (states(&site, 0) == [NodeState::Online; 2]).then_some(()));
    until("both are members", || (states(&site, 1) == [NodeState::Online; 2]).then_some(()));
    create_volume(&site, 0, "first");
    create_volume(&site, 1, "second");
    until("both have both", || (volume_names(&site, 0) == ["first", "second"]).then_some(()));
    until("both have both", || (volume_names(&site, 1) == ["first", "second"]).then_some(()));
    let twice =
        site.client(0).create_volume(&CreateVolume { name: "first".into(), size_bytes: 1 << 20, encrypted: false });
    assert_eq!(twice.err().map(|error| error.exit_code()), Some(4), "a name is taken once");
    let epoch = site.client(0).status().expect("a status").epoch;

    // b dies; a gets the grant and goes on alone.
    b.kill();
    sky.lock().unwrap().silent_since.insert(NodeId(2), Instant::now());
    let status =
        until("a goes on alone", || site.client(0).status().ok().filter(|status| status.alone.as_deref() == Some("a")));
    assert!(status.epoch > epoch);
    create_volume(&site, 0, "alone");

    // b comes back, outdated: it gives up its log and is taken in.
    sky.lock().unwrap().silent_since.clear();
    let _b = site.start_node(1);
    until("both are members", || (states(&site, 0) == [NodeState::Online; 2]).then_some(()));
    until("b has what was done without it", || (volume_names(&site, 1).len() == 3).then_some(()));
    until("nobody is alone", || site.client(1).status().ok().filter(|status| status.alone.is_none()));
    create_volume(&site, 1, "together");
    until("a has it too", || (volume_names(&site, 0).len() == 4).then_some(()));
    drop(show_on_failure);
}

/// CPU time of a process so far, in clock ticks (10 ms).
fn ticks(daemon: &Daemon) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", daemon.0.id())).expect("it lives");
    let fields: Vec<&str> = stat.rsplit(')').next().expect("fields").split_whitespace().collect();
    fields[11..13].iter().map(|field| field.parse::<u64>().expect("ticks")).sum()
}

/// A loop that wakes itself would take a whole core. The bound is far above what an unoptimised build needs.
#[test]
fn idle_nodes_wait_and_do_not_poll() {
    let site = Site::new(2);
    let sky = Arc::new(Mutex::new(Sky::default()));
    let _witness = site.start_witness();
    for node in 0..2 {
        play_guard(&site, node, sky.clone());
        play_data_plane(&site, node);
    }
    let (a, b) = (site.start_node(0), site.start_node(1));
    until("both are members", || (states(&site, 0) == [NodeState::Online; 2]).then_some(()));
    let before = (ticks(&a), ticks(&b));
    std::thread::sleep(Duration::from_secs(5));
    let spent = (ticks(&a) - before.0, ticks(&b) - before.1);
    eprintln!("ticks of 10 ms in 5 s: {spent:?}");
    assert!(spent.0 < 100 && spent.1 < 100, "ticks of 10 ms in 5 s: {spent:?}");
}

#[test]
fn nonsense_and_strangers_are_refused() {
    let site = Site::new(1);
    let _a: Daemon = site.start_node(0);
    let address = format!("https://{}", site.nodes[0]);
    let stranger = pollux_api::Client::new(vec![address], &site.ca(), "not-the-token-at-all").unwrap();
    let refused = stranger.status().expect_err("refused");
    assert!(matches!(&refused, ClientError::Refused(error) if error.code == ErrorCode::Unauthorized), "{refused}");
    assert_eq!(refused.exit_code(), 5);
    let mut garbage = std::net::TcpStream::connect(site.nodes[0]).unwrap();
    garbage.write_all(&[0x5a; 8192]).unwrap();
    let client = site.client(0);
    assert!(client.status().is_ok());
    for (path, code) in [
        ("/v1/vms/none", ErrorCode::NotFound),
        ("/v1/nothing", ErrorCode::NotFound),
        ("/v1/events?x=1", ErrorCode::Invalid),
    ] {
        let refused = client.get_raw(path).err();
        assert!(matches!(&refused, Some(ClientError::Refused(error)) if error.code == code), "{path}: {refused:?}");
    }
    let misspelt = serde_json::json!({ "name": "v", "size": 1 });
    let refused = client.send_raw("POST", "/v1/volumes", Some(&misspelt)).err();
    assert!(matches!(&refused, Some(ClientError::Refused(error)) if error.code == ErrorCode::Invalid), "{refused:?}");
    // A peer's call without the secret.
    let refused = client.send_raw("POST", "/peer/v1/log", Some(&serde_json::json!({}))).err();
    assert!(matches!(refused, Some(ClientError::BadAnswer(_))), "{refused:?}");

    // Every endpoint of the contract is served: none is answered as unknown.
    for endpoint in pollux_api::endpoint::ENDPOINTS {
        let path = endpoint.path.replace(['{', '}'], "");
        let body = serde_json::json!({});
        let body = (endpoint.method == "POST").then_some(&body);
        if let Err(ClientError::Refused(error)) = client.send_raw(endpoint.method, &path, body) {
            assert!(!error.error.contains("no such request"), "{} {path}", endpoint.method);
        }
    }
}

#[test]
fn an_unprepared_node_and_a_port_in_use_are_told_in_one_line() {
    let site = Site::new(1);
    let config = site.write_config(0);
    let run = || {
        let output =
            std::process::Command::new(env!("CARGO_BIN_EXE_noded")).args(["--config", &config]).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, text) = run();
    assert!(code == Some(2) && text.contains("noded init") && text.lines().count() == 1, "{text}");
    let _taken = std::net::TcpListener::bind(site.nodes[0]).unwrap();
    let (code, text) = run();
    assert!(code == Some(2) && text.contains("cannot listen on") && text.lines().count() == 1, "{text}");
}

/// Shows what the nodes said when the test fails.
struct ShowLogs<'a>(&'a Site);

impl Drop for ShowLogs<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for name in ["node-0.log", "node-1.log", "witness.log"] {
                eprintln!("---- {name}\n{}", self.0.log(name));
            }
        }
    }
}
