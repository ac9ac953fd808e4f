//! The lab's networks, built with `ip`.
//!
//! Each node is a network namespace. A namespace of its own is the switch: it holds one bridge per network and the far
//! ends of all cables, so that no packet filter of this machine meddles and removing the namespace removes it all. A cut
//! cable is the switch's port set down: the node sees no carrier and nothing passes, as with a real one.
//!
//! ```text
//! node a: storage ── plx-a-s ┐                         ┌ plx-b-s ── storage :node b
//!         mgmt ───── plx-a-m ┤  plx-net: the bridges   ├ plx-b-m ── mgmt
//! [guests]uplink ─── plx-a-g ┘  storage, mgmt, guests  └ plx-b-g ── uplink[guests]
//!                               plx-r-m    plx-r-g
//!                                  │          │
//! this machine:                plx-mgmt   plx-guests     witness and power switches: more addresses on plx-mgmt
//! ```

use super::site::{Network, PREFIX, Site, SiteNode, witness_address};
use crate::failure::{Code, Doing, Failure, Outcome};
use std::collections::BTreeSet;
use std::io::Write;
use std::net::IpAddr;
use std::process::{Command, Stdio};

const SWITCH: &str = "plx-net";
const NAMESPACES: &str = "/run/netns";

/// This machine's interface on a network.
fn root_interface(network: Network) -> String {
    format!("{PREFIX}{}", network.name())
}
/// The switch's port of the cable to this machine.
fn root_port(network: Network) -> String {
    format!("{PREFIX}r-{}", &network.name()[..1])
}
/// A node's own name for its end of the cable.
fn inner_interface(network: Network) -> &'static str {
    match network {
        Network::Guests => "uplink",
        other => other.name(),
    }
}

/// The file of a network namespace.
pub fn namespace_file(name: &str) -> std::path::PathBuf {
    std::path::Path::new(NAMESPACES).join(name)
}

/// Builds everything. What was there before is removed first, so that a half-built network is no obstacle.
pub fn up(site: &Site) -> Outcome {
    down()?;
    let mut namespaces = vec![SWITCH.to_string()];
    namespaces.extend(site.nodes.iter().map(SiteNode::namespace));
    batch(None, &namespaces.iter().map(|name| format!("netns add {name}")).collect::<Vec<_>>())?;

    batch(None, &root_commands(site))?;
    batch(Some(SWITCH), &switch_commands(site))?;
    for node in &site.nodes {
        batch(Some(&node.namespace()), &node_commands(node))?;
    }
    Ok(())
}

/// Removes every namespace and interface of the lab. Those that are not there are removed already.
pub fn down() -> Outcome {
    let mut commands = Vec::new();
    for interface in interfaces_of_lab(None)? {
        commands.push(format!("link del {interface}"));
    }
    for namespace in namespaces_of_lab() {
        commands.push(format!("netns del {namespace}"));
    }
    if commands.is_empty() { Ok(()) } else { batch(None, &commands) }
}

/// Namespaces of a lab that exist on this machine.
pub fn namespaces_of_lab() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(NAMESPACES) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.flatten().filter_map(|e| e.file_name().into_string().ok()).filter(|n| n.starts_with(PREFIX)).collect();
    names.sort();
    names
}

fn root_commands(site: &Site) -> Vec<String> {
    let mut commands = Vec::new();
    for network in Network::ALL {
        for node in &site.nodes {
            let (port, inner) = (node.cable(network), inner_interface(network));
            let namespace = node.namespace();
            commands.push(format!("link add name {port} netns {SWITCH} type veth peer name {inner} netns {namespace}"));
        }
        if let Some(address) = network.root_address() {
            let (interface, port) = (root_interface(network), root_port(network));
            commands.push(format!("link add name {interface} type veth peer name {port} netns {SWITCH}"));
            commands.push(format!("addr add {address}/24 dev {interface}"));
            commands.push(format!("link set {interface} up"));
        }
    }
    for alias in aliases(site) {
        commands.push(format!("addr add {alias}/32 dev {}", root_interface(Network::Mgmt)));
    }
    commands
}

fn switch_commands(site: &Site) -> Vec<String> {
    let mut commands = vec!["link set lo up".to_string()];
    for network in Network::ALL {
        let bridge = network.name();
        commands.push(format!("link add name {bridge} type bridge forward_delay 0 stp_state 0 mcast_snooping 0"));
        commands.push(format!("link set {bridge} up"));
        let root = network.root_address().map(|_| root_port(network));
        for port in site.nodes.iter().map(|node| node.cable(network)).chain(root) {
            commands.push(format!("link set {port} master {bridge}"));
            commands.push(format!("link set {port} up"));
        }
    }
    commands
}

fn node_commands(node: &SiteNode) -> Vec<String> {
    let mut commands = vec!["link set lo up".to_string()];
    for network in [Network::Storage, Network::Mgmt] {
        commands.push(format!("addr add {}/24 dev {}", node.address(network), inner_interface(network)));
        commands.push(format!("link set {} up", inner_interface(network)));
    }
    commands.push("link add name guests type bridge forward_delay 0 stp_state 0 mcast_snooping 0".into());
    commands.push("link set uplink master guests".into());
    commands.push("link set uplink up".into());
    commands.push("link set guests up".into());
    commands
}

/// Addresses of things that this machine plays and that can be cut off one by one: the witness and the power switches.
fn aliases(site: &Site) -> Vec<IpAddr> {
    let power = site.nodes.iter().map(|node| node.power_address().ip());
    std::iter::once(witness_address().ip()).chain(power).collect()
}

/// Something that can be cut off.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cable {
    /// A node's link to one network.
    Node { node: String, network: Network },
    /// The witness' link to the management network.
    Witness,
    /// A node's power switch's link to the management network.
    Power { node: String },
}

impl std::fmt::Display for Cable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Cable::Node { node, network } => write!(f, "{node}:{}", network.name()),
            Cable::Witness => f.write_str("witness"),
            Cable::Power { node } => write!(f, "{node}:power"),
        }
    }
}

/// Reads what a user names: `a` (all of the node's links), `a:storage`, `a:power`, `storage` (that link of every node),
/// `all` (every link of every node), `witness`.
pub fn cables(site: &Site, target: &str) -> Outcome<BTreeSet<Cable>> {
    let links = |node: &SiteNode| {
        let node = node.name.clone();
        Network::ALL.map(|network| Cable::Node { node: node.clone(), network })
    };
    if target == "witness" {
        return Ok(BTreeSet::from([Cable::Witness]));
    }
    if target == "all" {
        return Ok(site.nodes.iter().flat_map(links).collect());
    }
    if let Some(network) = Network::ALL.into_iter().find(|network| network.name() == target) {
        return Ok(site.nodes.iter().map(|node| Cable::Node { node: node.name.clone(), network }).collect());
    }
    let (name, part) = target.split_once(':').map_or((target, None), |(name, part)| (name, Some(part)));
    let unknown = || {
        let names: Vec<_> = site.nodes.iter().map(|node| node.name.as_str()).collect();
        Failure::new(Code::NotFound, format!("the lab has no link `{target}`")).hint(format!(
            "links are: a node ({}), NODE:storage, NODE:mgmt, NODE:guests, NODE:power, storage, mgmt, guests, all, witness",
            names.join(", ")
        ))
    };
    let node = site.node(name).ok_or_else(unknown)?;
    match part {
        None => Ok(links(node).into()),
        Some("power") => Ok(BTreeSet::from([Cable::Power { node: node.name.clone() }])),
        Some(part) => {
            let network = Network::ALL.into_iter().find(|network| network.name() == part).ok_or_else(unknown)?;
            Ok(BTreeSet::from([Cable::Node { node: node.name.clone(), network }]))
        }
    }
}

/// Every cable there is.
pub fn all_cables(site: &Site) -> BTreeSet<Cable> {
    let mut all = BTreeSet::from([Cable::Witness]);
    for node in &site.nodes {
        all.extend(Network::ALL.map(|network| Cable::Node { node: node.name.clone(), network }));
        all.insert(Cable::Power { node: node.name.clone() });
    }
    all
}

/// Cuts (`plugged` false) or heals (true) the cables. One that is so already stays so.
pub fn set(site: &Site, cables: &BTreeSet<Cable>, plugged: bool) -> Outcome {
    let mut switch = Vec::new();
    let mut root = Vec::new();
    let state = if plugged { "up" } else { "down" };
    let have = root_addresses()?;
    let mut set_alias = |address: IpAddr| {
        if have.contains(&address) != plugged {
            let verb = if plugged { "add" } else { "del" };
            root.push(format!("addr {verb} {address}/32 dev {}", root_interface(Network::Mgmt)));
        }
    };
    for cable in cables {
        match cable {
            Cable::Witness => set_alias(witness_address().ip()),
            Cable::Power { node } => site.node(node).into_iter().for_each(|node| set_alias(node.power_address().ip())),
            Cable::Node { node, network } => {
                switch.extend(site.node(node).map(|node| format!("link set {} {state}", node.cable(*network))));
            }
        }
    }
    batch(Some(SWITCH), &switch)?;
    batch(None, &root)
}

/// The cables that are cut at present.
pub fn cut_cables(site: &Site) -> Outcome<BTreeSet<Cable>> {
    let links = ip_json(&["-n", SWITCH, "link", "show", "up"])?;
    let up: BTreeSet<&str> = links.iter().filter_map(|link| link["ifname"].as_str()).collect();
    let have = root_addresses()?;
    let is_cut = |cable: &Cable| match cable {
        Cable::Witness => !have.contains(&witness_address().ip()),
        Cable::Power { node } => site.node(node).is_some_and(|node| !have.contains(&node.power_address().ip())),
        Cable::Node { node, network } => {
            site.node(node).is_some_and(|node| !up.contains(node.cable(*network).as_str()))
        }
    };
    Ok(all_cables(site).into_iter().filter(is_cut).collect())
}

/// Bytes that a port of the switch has sent to its node.
pub fn sent_bytes(port: &str) -> Outcome<u64> {
    let links = ip_json(&["-n", SWITCH, "-s", "link", "show", "dev", port])?;
    let counted = links.first().and_then(|link| link["stats64"]["tx"]["bytes"].as_u64());
    counted.ok_or_else(|| Failure::other(format!("the switch does not count at port {port}")))
}

fn root_addresses() -> Outcome<BTreeSet<IpAddr>> {
    let interfaces = ip_json(&["addr", "show", "dev", &root_interface(Network::Mgmt)])?;
    let addresses = interfaces.iter().filter_map(|interface| interface["addr_info"].as_array()).flatten();
    Ok(addresses.filter_map(|address| address["local"].as_str()?.parse().ok()).collect())
}

fn interfaces_of_lab(namespace: Option<&str>) -> Outcome<Vec<String>> {
    let links = match namespace {
        Some(namespace) => ip_json(&["-n", namespace, "link", "show"])?,
        None => ip_json(&["link", "show"])?,
    };
    let names = links.iter().filter_map(|link| link["ifname"].as_str());
    Ok(names.filter(|name| name.starts_with(PREFIX)).map(String::from).collect())
}

fn ip_json(arguments: &[&str]) -> Outcome<Vec<serde_json::Value>> {
    let output = Command::new("ip").arg("-j").args(arguments).output().map_err(no_ip)?;
    if !output.status.success() {
        return Err(ip_failed(&arguments.join(" "), &output.stderr));
    }
    if output.stdout.trim_ascii().is_empty() {
        return Ok(Vec::new());
    }
    serde_json::from_slice(&output.stdout).doing(format!("`ip -j {}` printed no JSON", arguments.join(" ")))
}

/// Runs `ip` commands in one process; stops at the first that fails.
fn batch(namespace: Option<&str>, commands: &[String]) -> Outcome {
    if commands.is_empty() {
        return Ok(());
    }
    let mut ip = Command::new("ip");
    if let Some(namespace) = namespace {
        ip.args(["-n", namespace]);
    }
    let mut child = ip
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(no_ip)?;
    let text = commands.join("\n") + "\n";
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(text.as_bytes()).doing("cannot give `ip` its commands")?;
    }
    let output = child.wait_with_output().doing("cannot run `ip`")?;
    if output.status.success() {
        return Ok(());
    }
    // `Command failed -:3` tells which line it was.
    let stderr = String::from_utf8_lossy(&output.stderr);
    let line = stderr.rsplit("-:").next().and_then(|number| number.trim().parse::<usize>().ok());
    let command = line.and_then(|line| commands.get(line.wrapping_sub(1))).map_or("batch", String::as_str);
    Err(ip_failed(command, &output.stderr))
}

fn no_ip(error: std::io::Error) -> Failure {
    Failure::other(format!("cannot run `ip`: {error}")).hint("scripts/deps installs what the lab needs (iproute2)")
}

fn ip_failed(command: &str, stderr: &[u8]) -> Failure {
    Failure::other(format!("`ip {command}` failed: {}", String::from_utf8_lossy(stderr).trim())).hint(
        "`pollux lab down` removes what is left of a lab; network namespaces, veth and bridge must be in the kernel",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use pollux_base::{ClusterId, PoolId};

    fn site() -> Site {
        let node = |id: u8, name: &str| SiteNode { id, name: name.into(), pool: PoolId(1), uuid: "u".into() };
        Site {
            dir: "/d".into(),
            run: "/r".into(),
            cgroup: "/c".into(),
            executables: "/e".into(),
            cluster: ClusterId(1),
            pool_bytes: 1,
            guest_memory_bytes: 1,
            replication_encryption: Default::default(),
            nodes: vec![node(1, "a"), node(2, "b")],
        }
    }

    fn named(target: &str) -> Vec<String> {
        cables(&site(), target).expect("a link").iter().map(Cable::to_string).collect()
    }

    #[test]
    fn links_are_named_by_node_by_network_or_one_by_one() {
        assert_eq!(named("a"), ["a:storage", "a:mgmt", "a:guests"]);
        assert_eq!(named("b:storage"), ["b:storage"]);
        assert_eq!(named("a:power"), ["a:power"]);
        assert_eq!(named("mgmt"), ["a:mgmt", "b:mgmt"]);
        assert_eq!(named("all").len(), 6);
        assert_eq!(named("witness"), ["witness"]);
    }

    #[test]
    fn a_link_that_is_none_is_not_found_and_the_hint_names_those_that_are() {
        for target in ["", "c", "a:", "a:nothing", "c:storage", "storage:a"] {
            let failure = cables(&site(), target).expect_err("no such link");
            assert_eq!(failure.code, Code::NotFound);
            assert!(failure.hint.is_some_and(|hint| hint.contains("(a, b)")));
        }
    }
}
