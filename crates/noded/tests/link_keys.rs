//! Two real `noded` agree on keys for replication and hand them to their data planes, for which the test stands in.
#![allow(clippy::unwrap_used)]

mod common;

use common::{PATIENCE, Site, until};
use pollux_base::{NodeId, Order, Secret};
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::net::{UnixListener, UnixStream};

/// The test in the place of a node's `blockd`.
struct DataPlane {
    listener: UnixListener,
}

impl DataPlane {
    fn of(site: &Site, node: usize) -> DataPlane {
        let config = site.config(node);
        fs::create_dir_all(&config.run_dir).unwrap();
        let listener = UnixListener::bind(config.data_socket()).unwrap();
        listener.set_nonblocking(true).unwrap();
        DataPlane { listener }
    }

    /// `noded` connects, as after every restart of either.
    fn connected(&self) -> BufReader<UnixStream> {
        let stream = until("noded connects", || self.listener.accept().ok()).0;
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        BufReader::new(stream)
    }
}

/// The next key that is handed over.
fn key(orders: &mut BufReader<UnixStream>, from: u64) -> (u64, Secret) {
    loop {
        let mut line = String::new();
        assert!(orders.read_line(&mut line).unwrap() > 0, "noded has hung up");
        if let Order::LinkKey { peer, key, secret } = serde_json::from_str(&line).unwrap() {
            assert_eq!(peer, NodeId(from));
            return (key, secret);
        }
    }
}

/// The newest key that both were given: each `noded` may have begun one.
fn common_key(a: &mut BufReader<UnixStream>, b: &mut BufReader<UnixStream>) -> (u64, Secret) {
    let (mut at_a, mut at_b) = (vec![key(a, 2)], vec![key(b, 1)]);
    loop {
        if let Some(found) = at_a.iter().find(|key| at_b.contains(key)) {
            return found.clone();
        }
        if at_a.len() <= at_b.len() {
            at_a.push(key(a, 2));
        } else {
            at_b.push(key(b, 1));
        }
    }
}

#[test]
fn both_data_planes_get_the_same_key_again_after_their_restart_and_a_new_one_after_nodeds() {
    let site = Site::new(2);
    let _witness = site.start_witness();
    let planes = [DataPlane::of(&site, 0), DataPlane::of(&site, 1)];
    let (node_a, _node_b) = (site.start_node(0), site.start_node(1));
    let (mut a, mut b) = (planes[0].connected(), planes[1].connected());
    let first = common_key(&mut a, &mut b);

    // Both data planes are restarted: they have a key in common again, although each `noded` may have begun one.
    drop((a, b));
    let (mut a, mut b) = (planes[0].connected(), planes[1].connected());
    assert_ne!(common_key(&mut a, &mut b).0, 0);

    // A noded is restarted: it has forgotten everything.
    node_a.kill();
    let _node_a = site.start_node(0);
    let mut a = planes[0].connected();
    let second = key(&mut a, 2);
    while key(&mut b, 1) != second {}
    assert!(second.0 != first.0 && second.1 != first.1, "a key of before tells nothing of this one");
    let text = |secret: &Secret| serde_json::to_string(secret).unwrap().replace('"', "");
    for log in ["node-0.log", "node-1.log"] {
        let log = site.log(log);
        assert!(!log.contains(&text(&first.1)) && !log.contains(&text(&second.1)), "a secret is in a log");
        assert!(log.contains("a new key for replication"));
    }
}

#[test]
fn whoever_shows_a_certificate_that_is_not_the_nodes_gets_no_key() {
    let site = Site::new(2);
    let _witness = site.start_witness();
    let planes = [DataPlane::of(&site, 0), DataPlane::of(&site, 1)];
    let mut config = site.config(0);
    (config.tls.certificate, config.tls.key) = (site.path("stranger.pem"), site.path("stranger.key"));
    fs::write(site.path("node-0.json"), serde_json::to_vec(&config).unwrap()).unwrap();
    let (_node_a, _node_b) = (site.start_written_node(0), site.start_node(1));
    let (_a, _b) = (planes[0].connected(), planes[1].connected());
    until("the refusal", || {
        Some(site.log("node-1.log")).filter(|log| log.contains("with a certificate of somebody else is refused"))
    });
    until("the caller is told", || {
        Some(site.log("node-0.log")).filter(|log| log.contains("the certificate shown is not one of `a`"))
    });
}
