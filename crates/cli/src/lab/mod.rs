//! `pollux lab`: a whole site on one Linux machine, and accidents for it.
//!
//! `site` is the plan (pure), `network`, `cgroup`, `keys` and `process` build it, `machine` (pure) and `supervisor` keep
//! it running, `power` is its power switches, `control` how this command speaks with the supervisor, `demo` the main job
//! shown end to end.

pub mod cgroup;
pub mod control;
pub mod demo;
pub mod down;
pub mod keys;
pub mod machine;
pub mod network;
pub mod power;
pub mod process;
pub mod site;
pub mod supervisor;
pub mod up;

use crate::failure::{Code, Failure, Outcome};
use crate::output::{Output, Table};
use control::{Answer, Ask, MachineView};
use down::Keep;
use pollux_base::config::Encryption;
use serde_json::json;
use site::{DIR_DEFAULT, NODES_MAX, Site};
use std::ffi::OsString;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::PathBuf;
use std::time::{Duration, Instant};

#[derive(Clone, Debug, clap::Subcommand)]
pub enum LabCommand {
    /// Build a site on this machine: nodes, networks, witness, power switches
    Up {
        /// How many nodes
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(2..=NODES_MAX as i64))]
        nodes: u8,
        /// Size of each node's pool; the file is sparse
        #[arg(long, default_value = "8G", value_parser = crate::size::parse, value_name = "SIZE")]
        pool_size: u64,
        /// Where the lab keeps its state
        #[arg(long, default_value = DIR_DEFAULT, value_name = "DIR")]
        dir: PathBuf,
        /// Encrypt what the nodes' replicas send each other: on or off
        #[arg(long, default_value = "on", value_parser = on_or_off, value_name = "ON")]
        replication_encryption: Encryption,
    },
    /// Show what of the lab is on, off, and cut
    Status,
    /// Cut links: NODE, NODE:storage, NODE:mgmt, NODE:guests, NODE:power, storage, mgmt, guests, all, witness
    Cut {
        /// What to cut
        #[arg(required = true, value_name = "LINK")]
        links: Vec<String>,
    },
    /// Mend links that were cut; all of them if none is named
    Heal {
        #[arg(value_name = "LINK")]
        links: Vec<String>,
    },
    /// Pull a node's plug: everything on it ends at once, guests included
    Pull {
        node: String,
        /// The power switch dies too
        #[arg(long)]
        bmc_too: bool,
    },
    /// Give a node its power back; its power switch too
    Return { node: String },
    /// Remove the lab, also what a crashed one left
    Down {
        /// Keep pools and state: the next `lab up` goes on with them
        #[arg(long)]
        keep_state: bool,
        /// Where the lab keeps its state, if it was not the usual place
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
    /// The main job, end to end: build a lab, run a guest, pull plugs and cables, count every acknowledged write
    Demo(demo::DemoArgs),
    /// The lab's hardware; started by `lab up`
    #[command(hide = true)]
    Supervise {
        #[arg(long)]
        site: PathBuf,
    },
    /// Runs a program inside a node; used by the lab itself
    #[command(hide = true)]
    Exec {
        #[arg(long)]
        cgroup: PathBuf,
        #[arg(long)]
        namespace: Option<String>,
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
}

pub fn run(command: LabCommand, output: &Output) -> Outcome {
    match command {
        LabCommand::Supervise { site } => {
            let site = down::read_site(&site).ok_or_else(|| Failure::usage("no plan of a lab there"))?;
            return supervisor::run(&site);
        }
        LabCommand::Exec { cgroup, namespace, command } => {
            return Err(process::exec(&cgroup, namespace.as_deref(), &command));
        }
        LabCommand::Demo(arguments) => {
            up::require_root()?;
            return demo::run(&arguments);
        }
        _ => {}
    }
    up::require_root()?;
    // Only what builds and removes must be alone; a cut is one change of the kernel's.
    let _alone = if matches!(command, LabCommand::Up { .. } | LabCommand::Down { .. }) { Some(alone()?) } else { None };
    match command {
        LabCommand::Up { nodes, pool_size, dir, replication_encryption } => {
            let started = Instant::now();
            let options = up::Options { nodes, pool_bytes: pool_size, dir, replication_encryption };
            let site = up::up(&options, &mut |line| output.progress(&format!("lab: {line}")))?;
            output.say(&format!(
                "lab: up and protected after {:.1} s\n{}",
                started.elapsed().as_secs_f64(),
                how_to(&site)
            ))
        }
        LabCommand::Status => status(output),
        LabCommand::Cut { links } => set_links(&links, false),
        LabCommand::Heal { links } => set_links(&links, true),
        LabCommand::Pull { node, bmc_too } => pull(&the_site()?, &node, bmc_too),
        LabCommand::Return { node } => give_power_back(&the_site()?, &node),
        LabCommand::Down { keep_state, dir } => {
            let keep = if keep_state { Keep::State } else { Keep::Nothing };
            let was_there = down::down(dir.as_deref(), keep)?;
            output.say(if was_there { "lab: down" } else { "lab: there is none" })
        }
        LabCommand::Supervise { .. } | LabCommand::Exec { .. } | LabCommand::Demo(_) => Ok(()),
    }
}

fn on_or_off(text: &str) -> Result<Encryption, String> {
    match text {
        "on" => Ok(Encryption::On),
        "off" => Ok(Encryption::Off),
        _ => Err("it is on or off".to_owned()),
    }
}

/// What a user may do next, with the addresses of this lab.
pub fn how_to(site: &Site) -> String {
    format!(
        "  pollux status                     the cluster; nodes answer at {}\n  \
           pollux lab status                 power and links of the lab\n  \
           pollux lab pull a | return a      pull a plug, give it back\n  \
           pollux lab cut a | heal           cut node a off, mend it\n  \
           pollux lab down                   remove everything\n  \
           logs                              {}",
        site.servers().join(", "),
        site.logs().display()
    )
}

/// Pulls a node's plug.
pub fn pull(site: &Site, node: &str, bmc_too: bool) -> Outcome {
    let found = the_node(site, node)?;
    if bmc_too {
        network::set(site, &network::cables(site, &format!("{}:power", found.name))?, false)?;
    }
    control::ask(site, &Ask::Off { node: found.name.clone() })?;
    // The plug is out when nothing runs there any more.
    cgroup::clear(&site.node_cgroup(found))
}

/// Gives a node and its power switch their power back.
pub fn give_power_back(site: &Site, node: &str) -> Outcome {
    let found = the_node(site, node)?;
    network::set(site, &network::cables(site, &format!("{}:power", found.name))?, true)?;
    control::ask(site, &Ask::On { node: found.name.clone() }).map(|_| ())
}

fn the_node<'a>(site: &'a Site, name: &str) -> Outcome<&'a site::SiteNode> {
    site.node(name).ok_or_else(|| {
        let names: Vec<_> = site.nodes.iter().map(|node| node.name.as_str()).collect();
        Failure::new(Code::NotFound, format!("the lab has no node `{name}`"))
            .hint(format!("its nodes are {}", names.join(", ")))
    })
}

/// The plan of the lab that is up.
pub fn the_site() -> Outcome<Site> {
    down::site_of_run()
        .ok_or_else(|| Failure::new(Code::NotFound, "no lab is up on this machine").hint("`pollux lab up` builds one"))
}

/// The certificates that a client of the lab shows, if these are addresses of the lab that is up.
pub fn client_certificates(uris: &[String]) -> Option<std::path::PathBuf> {
    let dir = down::site_of_run()?.nbd_client_dir();
    (!local_uris(uris).is_empty() && dir.exists()).then_some(dir)
}

/// The nodes of a lab are on this machine, so their NBD sockets are too: the same exports, without the network.
pub fn local_uris(uris: &[String]) -> Vec<String> {
    let Some(site) = down::site_of_run() else { return Vec::new() };
    let local = |uri: &String| {
        let (_, rest) = uri.split_once("://")?;
        let (address, export) = rest.split_once('/')?;
        let config = site.nodes.iter().map(|node| site.node_config(node)).find(|config| {
            config.own().and_then(|own| own.nbd.first()).is_some_and(|first| first.to_string() == address)
        })?;
        Some(format!("nbd+unix:///{export}?socket={}", config.nbd_socket().display()))
    };
    uris.iter().filter_map(local).collect()
}

fn set_links(links: &[String], plugged: bool) -> Outcome {
    let site = the_site()?;
    let mut cables = std::collections::BTreeSet::new();
    for link in links {
        cables.extend(network::cables(&site, link)?);
    }
    if links.is_empty() {
        cables = network::all_cables(&site);
    }
    network::set(&site, &cables, plugged)
}

fn status(output: &Output) -> Outcome {
    let site = the_site()?;
    let machines = match control::ask(&site, &Ask::Status) {
        Ok(Answer::Machines { machines }) => Some(machines),
        Ok(_) | Err(_) => None,
    };
    let cut: Vec<String> = network::cut_cables(&site)?.iter().map(ToString::to_string).collect();
    if output.is_json() {
        return output.json(&json!({
            "dir": site.dir, "logs": site.logs(), "servers": site.servers(), "supervised": machines.is_some(),
            "machines": machines, "cut": cut,
        }));
    }
    let mut table = Table::new(&["MACHINE", "POWER", "DAEMONS", "RESTARTS", "GUESTS"]);
    match &machines {
        Some(machines) => machines.iter().for_each(|machine| table.row(machine_row(&site, machine))),
        None => site.nodes.iter().for_each(|node| {
            let is_on = !cgroup::is_empty(&site.node_cgroup(node));
            table.row([node.name.clone(), if is_on { "on" } else { "off" }.into(), "?".into(), "?".into(), "?".into()]);
        }),
    }
    let cut = if cut.is_empty() { "none".into() } else { cut.join(", ") };
    output.say(&format!("{table}\ncut links: {cut}"))?;
    match machines {
        Some(_) => Ok(()),
        None => Err(Failure::other("the lab's supervisor is gone: nothing is restarted and no power switch answers")
            .hint("`pollux lab down` removes what is left; add --keep-state to go on with the pools")),
    }
}

fn machine_row(site: &Site, machine: &MachineView) -> [String; 5] {
    let running = machine.daemons.iter().filter(|daemon| daemon.pid.is_some()).count();
    let restarts: u64 = machine.daemons.iter().map(|daemon| daemon.restarts).sum();
    let guests = site
        .node(&machine.name)
        .map_or("-".into(), |node| cgroup::processes_below(&site.guests_cgroup(node)).len().to_string());
    let power = if machine.is_on { "on" } else { "off" };
    let daemons = format!("{running} of {}", machine.daemons.len());
    [machine.name.clone(), power.into(), daemons, restarts.to_string(), guests]
}

/// Held while a command changes the lab, so that two do not get into each other's way. An abstract socket: it needs no
/// file and is gone with its process.
fn alone() -> Outcome<UnixListener> {
    // A `down` takes a moment and is waited for; an `up` may take a while, and then whoever waits is told.
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let bound = SocketAddr::from_abstract_name("pollux-lab").and_then(|name| UnixListener::bind_addr(&name));
        match bound {
            Ok(listener) => return Ok(listener),
            Err(error) if error.kind() != std::io::ErrorKind::AddrInUse => {
                return Err(Failure::other(format!("cannot lock the lab: {error}")));
            }
            Err(_) if Instant::now() > until => {
                return Err(Failure::new(Code::Conflict, "another `pollux lab` command is at work on this machine")
                    .hint("wait for it to end, then try again"));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}
