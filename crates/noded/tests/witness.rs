//! The witness as a process: what it promises over crashes, races and nonsense.

#![allow(clippy::unwrap_used)]

mod common;

use common::{CLUSTER, Daemon, Site, TOKEN, WITNESS_TOKEN, wait_for_port};
use pollux_base::{ClusterId, Epoch, NodeId};
use pollux_cluster::Register;
use pollux_noded::witness::http::SwapRequest;
use pollux_noded::witness::registers::Swap;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, SendBody};

fn agent(site: &Site) -> Agent {
    let roots = parse_pem(&site.ca())
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    let tls = TlsConfig::builder()
        .root_certs(RootCerts::Specific(Arc::new(roots)))
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .build();
    let config = Agent::config_builder().tls_config(tls).http_status_as_error(false).proxy(None);
    config.timeout_global(Some(Duration::from_secs(20))).build().new_agent()
}

fn both(epoch: u64) -> Register {
    Register { epoch: Epoch(epoch), alone: None }
}
fn alone(epoch: u64, node: u64) -> Register {
    Register { epoch: Epoch(epoch), alone: Some(NodeId(node)) }
}

/// Status and, when it is a success, the outcome.
fn swap(site: &Site, agent: &Agent, token: &str, expect: Option<Register>, set: Register) -> (u16, Option<Swap>) {
    let url = format!("https://{}/v1/registers/{CLUSTER}", site.witness);
    let body = serde_json::to_vec(&SwapRequest { expect, set }).unwrap();
    let request = agent.post(url).header("authorization", format!("Bearer {token}"));
    let mut response = request.content_type("application/json").send(&body).expect("an answer");
    let status = response.status().as_u16();
    (status, (status == 200).then(|| response.body_mut().read_json().expect("an outcome")))
}

fn get(site: &Site, agent: &Agent, cluster: ClusterId) -> (u16, Option<Register>) {
    let url = format!("https://{}/v1/registers/{cluster}", site.witness);
    let request = agent.get(url).header("authorization", format!("Bearer {WITNESS_TOKEN}"));
    let mut response = request.call().expect("an answer");
    let status = response.status().as_u16();
    (status, (status == 200).then(|| response.body_mut().read_json().expect("a register")))
}

#[test]
fn of_many_that_ask_at_once_exactly_one_wins() {
    let site = Site::new(0);
    let _witness = site.start_witness();
    let agent = agent(&site);
    assert_eq!(swap(&site, &agent, WITNESS_TOKEN, None, both(1)).1, Some(Swap::Swapped(both(1))));
    let swapped: Vec<u64> = std::thread::scope(|scope| {
        let askers: Vec<_> = (1..=8)
            .map(|node| {
                let (site, agent) = (&site, &agent);
                scope.spawn(move || (node, swap(site, agent, WITNESS_TOKEN, Some(both(1)), alone(2, node)).1))
            })
            .collect();
        let answers = askers.into_iter().map(|asker| asker.join().expect("an answer"));
        answers.filter(|(_, swap)| matches!(swap, Some(Swap::Swapped(_)))).map(|(node, _)| node).collect()
    });
    assert_eq!(swapped.len(), 1);
    assert_eq!(get(&site, &agent, CLUSTER), (200, Some(alone(2, swapped[0]))));
}

#[test]
fn what_was_answered_is_true_after_a_kill() {
    let site = Site::new(0);
    let mut witness = site.start_witness();
    let agent = agent(&site);
    swap(&site, &agent, WITNESS_TOKEN, None, both(1));
    for epoch in 1..6 {
        let set = alone(epoch + 1, 1);
        let expect = if epoch == 1 { both(1) } else { alone(epoch, 1) };
        assert_eq!(swap(&site, &agent, WITNESS_TOKEN, Some(expect), set).1, Some(Swap::Swapped(set)));
        witness.kill();
        witness = site.start_witness();
        let agent = self::agent(&site);
        assert_eq!(get(&site, &agent, CLUSTER), (200, Some(set)));
        assert_eq!(swap(&site, &agent, WITNESS_TOKEN, Some(expect), set).1, Some(Swap::Swapped(set)), "asked again");
    }
}

#[test]
fn a_wrong_token_is_refused_and_tells_nothing() {
    let site = Site::new(0);
    let _witness = site.start_witness();
    let agent = agent(&site);
    assert_eq!(swap(&site, &agent, TOKEN, None, both(1)), (401, None));
    assert_eq!(get(&site, &agent, CLUSTER).0, 404);
    assert_eq!(get(&site, &agent, ClusterId(1)).0, 401, "an unknown cluster looks like a wrong token");
}

#[test]
fn nonsense_on_the_port_harms_nobody() {
    let site = Site::new(0);
    let _witness = site.start_witness();
    let agent = agent(&site);
    // Held open for the whole test: silent, garbage, and an unfinished handshake.
    let _silent = TcpStream::connect(site.witness).unwrap();
    let mut garbage = TcpStream::connect(site.witness).unwrap();
    garbage.write_all(&[0xa5; 4096]).unwrap();
    let mut plain = TcpStream::connect(site.witness).unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    plain.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    // Ended by the server, one way or another.
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    assert_eq!(swap(&site, &agent, WITNESS_TOKEN, None, both(1)).1, Some(Swap::Swapped(both(1))));
    let url = format!("https://{}/v1/registers/{CLUSTER}", site.witness);
    let request = agent.post(&url).header("authorization", format!("Bearer {WITNESS_TOKEN}"));
    let long = vec![b' '; 1 << 20];
    let refused = request.content_type("application/json").send(SendBody::from_reader(&mut &long[..]));
    assert!(refused.map_or(true, |response| !response.status().is_success()), "a body without end");
    let request = agent.post(&url).header("authorization", format!("Bearer {WITNESS_TOKEN}"));
    let refused = request.content_type("application/json").send("{\"set\": 7}").unwrap();
    assert!(refused.status().is_client_error());
    assert_eq!(get(&site, &agent, CLUSTER), (200, Some(both(1))));
}

#[test]
fn a_damaged_state_file_stops_it_with_a_clear_word() {
    let site = Site::new(0);
    fs::write(site.path("registers"), "pollux-witness 1 00000000\n{}").unwrap();
    let mut witness = site.spawn_witness(&site.text("registers"));
    assert_eq!(witness.0.wait().unwrap().code(), Some(2));
    let log = site.log("witness.log");
    assert!(log.lines().count() == 1 && log.contains("damaged") && log.contains("left untouched"), "{log}");
    assert_eq!(fs::read_to_string(site.path("registers")).unwrap(), "pollux-witness 1 00000000\n{}");
}

#[test]
fn a_port_in_use_is_told_in_one_line() {
    let site = Site::new(0);
    let _first = site.start_witness();
    wait_for_port(site.witness);
    let mut second: Daemon = site.spawn_witness(&site.text("others"));
    assert_eq!(second.0.wait().unwrap().code(), Some(2));
    let log = site.log("witness.log");
    assert!(log.lines().any(|line| line.starts_with("Error: cannot listen on ")), "{log}");
}
