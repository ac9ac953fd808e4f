//! The connections between two real `blockd`: protected, refused when they are not what they should be, and cut under a
//! client that writes.

mod relay;
mod site;

use pollux_base::config::Encryption;
use pollux_base::order::PathState;
use pollux_base::{NodeId, Order, Report, Secret};
use relay::{BACK, Relay, THERE};
use site::{GROUP, Node, Outcome, Site, exports, group, key};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Both paths from node 1 to node 2 go through relays.
fn relayed(site: &mut Site) -> Outcome<[Relay; 2]> {
    let targets = site.configs[&1].nodes[1].replication.clone();
    let relays = [Relay::to(targets[0])?, Relay::to(targets[1])?];
    let config = site.configs.get_mut(&1).expect("a site has two nodes");
    config.nodes[1].replication = relays.iter().map(|relay| relay.address).collect();
    Ok(relays)
}

fn begin(nodes: [&mut Node; 2]) -> Outcome {
    for node in nodes {
        node.order(&group(1, 1, &[1, 2]))?;
        node.order(&exports())?;
    }
    Ok(())
}

/// Waits until the node says so of its paths.
fn wait_for_paths(node: &mut Node, what: &str, is_wanted: impl Fn(&[PathState]) -> bool) -> Outcome<Vec<PathState>> {
    let states = |report: &Report| match report {
        Report::Paths { paths, .. } => Some(paths.iter().map(|path| path.state.clone()).collect::<Vec<_>>()),
        _ => None,
    };
    node.order(&Order::ReportAll)?;
    let report = node.wait_for(what, |report| states(report).is_some_and(|states| is_wanted(&states)))?;
    Ok(states(&report).unwrap_or_default())
}

fn all_up(states: &[PathState]) -> bool {
    states.len() == 2 && states.iter().all(|state| *state == PathState::Up)
}

fn refused_with(text: &'static str) -> impl Fn(&[PathState]) -> bool {
    move |states| states.iter().any(|state| matches!(state, PathState::Refused { reason } if reason.contains(text)))
}

/// A client of the volume, one request at a time.
struct Client {
    stream: UnixStream,
    /// What each block was last told to say.
    written: BTreeMap<u64, u64>,
    requests: u64,
    longest: Duration,
}

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 2000;

impl Client {
    fn connect(node: &Node) -> Outcome<Client> {
        let mut stream = UnixStream::connect(node.config.nbd_socket())?;
        stream.set_read_timeout(Some(site::PATIENCE))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        // Fixed newstyle, no zeroes; then option 1, the export's name.
        let mut asked = vec![0, 0, 0, 3];
        asked.extend_from_slice(b"IHAVEOPT");
        asked.extend_from_slice(&1u32.to_be_bytes());
        asked.extend_from_slice(&4u32.to_be_bytes());
        asked.extend_from_slice(b"disk");
        stream.write_all(&asked)?;
        stream.read_exact(&mut [0; 10])?;
        Ok(Client { stream, written: BTreeMap::new(), requests: 0, longest: Duration::ZERO })
    }

    fn ask(&mut self, kind: u16, block: u64, data: &[u8]) -> Outcome {
        self.requests += 1;
        let mut request = 0x2560_9513u32.to_be_bytes().to_vec();
        request.extend_from_slice(&[0, 0]);
        request.extend_from_slice(&kind.to_be_bytes());
        request.extend_from_slice(&self.requests.to_be_bytes());
        request.extend_from_slice(&(block * BLOCK).to_be_bytes());
        request.extend_from_slice(&(BLOCK as u32).to_be_bytes());
        request.extend_from_slice(data);
        self.stream.write_all(&request)?;
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        if reply[4..8] != [0; 4] || reply[8..] != self.requests.to_be_bytes() {
            return Err(format!("request {}: {reply:?}", self.requests).into());
        }
        Ok(())
    }

    /// Writes here and there for so long.
    fn write_for(&mut self, time: Duration) -> Outcome {
        let start = Instant::now();
        self.longest = Duration::ZERO;
        while start.elapsed() < time {
            let block = self.requests.wrapping_mul(0x9e37_79b9) % BLOCKS;
            let value = self.requests + 1;
            let data = value.to_le_bytes().repeat(BLOCK as usize / 8);
            let began = Instant::now();
            self.ask(1, block, &data)?;
            self.longest = self.longest.max(began.elapsed());
            self.written.insert(block, value);
        }
        Ok(())
    }

    /// Reads all of it.
    fn check(&mut self) -> Outcome {
        for (block, value) in std::mem::take(&mut self.written) {
            self.ask(0, block, &[])?;
            let mut data = vec![0; BLOCK as usize];
            self.stream.read_exact(&mut data)?;
            if data != value.to_le_bytes().repeat(BLOCK as usize / 8) {
                return Err(format!("block {block} does not say {value}").into());
            }
            self.written.insert(block, value);
        }
        Ok(())
    }
}

/// What the client wrote is on the other node, too.
fn check_the_other(first: Node, mut second: Node, client: &mut Client) -> Outcome {
    first.kill()?;
    second.order(&group(2, 2, &[2]))?;
    second.order(&Order::Fenced { node: NodeId(1) })?;
    second.wait_until_serving(2)?;
    client.stream = Client::connect(&second)?.stream;
    client.check()
}

fn is_lost(report: &Report) -> bool {
    matches!(report, Report::ReplicaLost { .. })
}

/// The group of a node that has neither lost a replica nor a generation.
fn assert_undisturbed(node: &mut Node) -> Outcome {
    let mut lost = false;
    node.order(&Order::ReportAll)?;
    let report = node.wait_for("the group", |report| {
        assert!(!is_lost(report), "{report:?}");
        matches!(report, Report::Group(report) if report.group == GROUP)
    })?;
    lost |= is_lost(&report);
    assert!(!lost);
    Ok(())
}

#[test]
fn nothing_that_a_client_writes_can_be_read_on_the_cable_unless_it_was_asked_for() -> Outcome {
    for encryption in [Encryption::On, Encryption::Off] {
        let mut site = Site::formatted()?;
        site.configs.values_mut().for_each(|config| config.replication_encryption = encryption);
        let relays = relayed(&mut site)?;
        let (mut first, mut second) = (site.start(1)?, site.start(2)?);
        begin([&mut first, &mut second])?;
        first.wait_until_serving(1)?;
        let secret_text = b"the accounts of the company, read by nobody";
        let mut client = Client::connect(&first)?;
        let mut data = secret_text.repeat(BLOCK as usize / secret_text.len() + 1);
        data.truncate(BLOCK as usize);
        client.ask(1, 3, &data)?;
        let is_heard = relays.iter().any(|relay| relay.has_heard(secret_text));
        assert_eq!(is_heard, encryption == Encryption::Off, "{encryption:?}");
        let says = |report: &Report| matches!(report, Report::Paths { is_encrypted, .. } if *is_encrypted == (encryption == Encryption::On));
        first.order(&Order::ReportAll)?;
        first.wait_for("whether it is encrypted", says)?;
    }
    Ok(())
}

#[test]
fn a_peer_with_another_key_is_refused_until_both_have_the_same() -> Outcome {
    let site = Site::formatted()?;
    let (mut first, mut second) = (site.start_without_key(1)?, site.start_without_key(2)?);
    let strange = |peer, byte| Order::LinkKey { peer: NodeId(peer), key: 77, secret: Secret::new([byte; 32]) };
    // Two secrets under one name.
    second.order(&strange(1, 5))?;
    first.order(&strange(2, 6))?;
    begin([&mut first, &mut second])?;
    wait_for_paths(&mut second, "the refusal", refused_with("another key under the same name"))?;
    assert!(second.log().contains("a connection is refused"), "{}", second.log());
    assert!(!first.log().contains("060606") && !second.log().contains("050505"), "keys are in no log");
    for (node, own) in [(&mut first, 1), (&mut second, 2)] {
        node.order(&key(NodeId(own), 78))?;
    }
    wait_for_paths(&mut first, "both paths", all_up)?;
    first.wait_until_serving(1)?;
    Ok(())
}

#[test]
fn a_node_that_encrypts_and_one_that_does_not_refuse_each_other_and_say_what_to_do() -> Outcome {
    for plain in [1, 2] {
        let mut site = Site::formatted()?;
        site.configs.get_mut(&plain).expect("a node").replication_encryption = Encryption::Off;
        let (mut first, mut second) = (site.start(1)?, site.start(2)?);
        begin([&mut first, &mut second])?;
        for node in [&mut first, &mut second] {
            wait_for_paths(node, "the refusal", refused_with("set `replication_encryption` alike"))?;
        }
    }
    Ok(())
}

#[test]
fn without_a_key_nothing_is_dialled_and_the_report_says_what_is_missing() -> Outcome {
    let site = Site::formatted()?;
    let (mut first, mut second) = (site.start(1)?, site.start_without_key(2)?);
    begin([&mut first, &mut second])?;
    let lacks = |states: &[PathState]| {
        states.iter().any(|state| matches!(state, PathState::Down { reason } if reason.contains("there is no key yet")))
    };
    wait_for_paths(&mut second, "the lack of a key", lacks)?;
    wait_for_paths(&mut first, "that it is not let in", |states| !states.contains(&PathState::Up))?;
    second.order(&key(NodeId(2), 1))?;
    wait_for_paths(&mut first, "both paths", all_up)?;
    first.wait_until_serving(1)
}

#[test]
fn a_cut_path_is_a_pause_of_well_under_a_second_and_no_replica_is_dropped() -> Outcome {
    let mut site = Site::formatted()?;
    let relays = relayed(&mut site)?;
    let (mut first, mut second) = (site.start(1)?, site.start(2)?);
    begin([&mut first, &mut second])?;
    first.wait_until_serving(1)?;
    wait_for_paths(&mut first, "both paths", all_up)?;
    let mut client = Client::connect(&first)?;
    client.write_for(Duration::from_millis(2500))?;
    // Each path in turn, in one direction, the other, and both.
    for (path, directions) in [(0, &[THERE, BACK][..]), (1, &[THERE]), (0, &[BACK]), (1, &[BACK]), (0, &[THERE])] {
        // The path in use is the most wanted one that has held for a while.
        directions.iter().for_each(|direction| relays[path].cut(*direction));
        client.write_for(Duration::from_millis(1500))?;
        assert!(client.longest < Duration::from_millis(900), "a pause of {:?}", client.longest);
        eprintln!("cut of path {path} {directions:?}: longest write {:?}", client.longest);
        relays[path].mend();
        wait_for_paths(&mut first, "both paths again", all_up)?;
        client.write_for(Duration::from_millis(2200))?;
        assert_undisturbed(&mut first)?;
    }
    client.check()?;
    check_the_other(first, second, &mut client)
}

#[test]
fn a_changed_bit_costs_its_connection_and_nothing_else() -> Outcome {
    let mut site = Site::formatted()?;
    let relays = relayed(&mut site)?;
    let (mut first, mut second) = (site.start(1)?, site.start(2)?);
    begin([&mut first, &mut second])?;
    first.wait_until_serving(1)?;
    wait_for_paths(&mut first, "both paths", all_up)?;
    let mut client = Client::connect(&first)?;
    for direction in [THERE, BACK] {
        client.write_for(Duration::from_millis(2200))?;
        relays[0].flip(direction);
        client.write_for(Duration::from_millis(300))?;
        wait_for_paths(&mut first, "both paths again", all_up)?;
    }
    assert!(second.log().contains("was changed on its way"), "{}", second.log());
    assert!(first.log().contains("was changed on its way"), "{}", first.log());
    assert_undisturbed(&mut first)?;
    client.check()?;
    check_the_other(first, second, &mut client)
}

#[test]
fn a_new_key_renews_the_connections_without_a_pause_and_noded_is_not_needed_meanwhile() -> Outcome {
    let mut site = Site::formatted()?;
    let relays = relayed(&mut site)?;
    let (mut first, mut second) = (site.start(1)?, site.start(2)?);
    begin([&mut first, &mut second])?;
    first.wait_until_serving(1)?;
    wait_for_paths(&mut first, "both paths", all_up)?;
    let mut client = Client::connect(&first)?;
    // Handed over on one side before the other, as it may happen.
    second.order(&key(NodeId(2), 2))?;
    client.write_for(Duration::from_millis(300))?;
    first.order(&key(NodeId(1), 2))?;
    client.write_for(Duration::from_millis(4000))?;
    assert!(client.longest < Duration::from_millis(900), "a pause of {:?}", client.longest);
    let made = first.log().matches("a path is of use").count();
    assert_eq!(made, 4, "each path was made anew once: {}", first.log());
    // Nobody gives orders any more, and every connection is lost: they are made anew with the key that is there.
    first.hang_up();
    second.hang_up();
    relays.iter().for_each(Relay::reset);
    client.write_for(Duration::from_millis(500))?;
    first.take_up()?;
    second.take_up()?;
    wait_for_paths(&mut first, "both paths again", all_up)?;
    client.check()?;
    check_the_other(first, second, &mut client)
}
