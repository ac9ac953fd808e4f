//! `pollux volume`.

use super::wait::WaitArgs;
use crate::context::from_client;
use crate::failure::{Failure, Outcome};
use crate::output::Output;
use crate::{size, table};
use pollux_api::{Client, CreateVolume};
use std::path::Path;
use std::time::Duration;

/// An export is a committed entry and an order to the data plane: quick, or something is wrong.
const EXPORT_WAIT: Duration = Duration::from_secs(60);

#[derive(Clone, Debug, clap::Subcommand)]
pub enum VolumeCommand {
    /// Create a volume; it takes space as it is written
    Create {
        name: String,
        #[arg(long, value_parser = size::parse, value_name = "SIZE")]
        size: u64,
        /// Encrypt what is stored of it, with a key that only the nodes have
        #[arg(long)]
        encrypted: bool,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// List the volumes
    List,
    /// Show one volume
    Show { volume: String },
    /// Offer a volume to other machines and print where; a client that loses one address connects to the other
    Export {
        volume: String,
        /// Over NBD
        #[arg(long, required_unless_present = "off")]
        nbd: bool,
        /// No longer
        #[arg(long, conflicts_with = "nbd")]
        off: bool,
    },
    /// Read it on every replica, compare them and heal what is bad; with the other disks of its VM
    Scrub {
        volume: String,
        /// Not now, but by itself every so many days; 0: never
        #[arg(long, value_name = "DAYS", conflicts_with_all = ["wait", "no_wait"])]
        every: Option<u32>,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Freeze it at one point of the stream of writes, as VOLUME@NAME, which can be exported
    Snapshot {
        volume: String,
        name: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Make a new volume that begins as a copy of a snapshot's, in no time and space
    Clone {
        #[arg(value_name = "VOLUME@NAME")]
        snapshot: String,
        name: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Let a volume grow, while it is used; whoever is connected sees it when they connect anew
    Resize {
        volume: String,
        #[arg(long, value_parser = size::parse, value_name = "SIZE")]
        size: u64,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Delete a volume for good
    Delete {
        volume: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
}

/// `ca`: the file with the cluster's certificate authority.
pub fn run(command: VolumeCommand, client: &Client, ca: &Path, output: &Output) -> Outcome {
    match command {
        VolumeCommand::Create { name, size, encrypted, wait } => {
            let done = format!("volume {name} is created{}", if encrypted { ", encrypted" } else { "" });
            let taken = client.create_volume(&CreateVolume { name, size_bytes: size, encrypted });
            wait.finish(client, output, taken, &done)
        }
        VolumeCommand::List => output.show(&client.volumes().map_err(from_client)?, |volumes| table::volumes(volumes)),
        VolumeCommand::Show { volume } => output.show(&client.volume(&volume).map_err(from_client)?, table::volume),
        VolumeCommand::Export { volume, nbd, off: _ } => export(client, output, ca, &volume, nbd),
        VolumeCommand::Scrub { volume, every, wait } => {
            let accepted = client.scrub_volume(&volume, every);
            match every {
                None => wait.finish_with_detail(client, output, accepted, &format!("volume {volume}")),
                Some(0) => {
                    wait.finish(client, output, accepted, &format!("volume {volume} is scrubbed only when asked for"))
                }
                Some(days) => {
                    wait.finish(client, output, accepted, &format!("volume {volume} is scrubbed every {days} days"))
                }
            }
        }
        VolumeCommand::Snapshot { volume, name, wait } => {
            let done = format!("snapshot {volume}@{name} is taken");
            wait.finish(client, output, client.snapshot_volume(&volume, &name), &done)
        }
        VolumeCommand::Clone { snapshot, name, wait } => {
            let done = format!("volume {name} is cloned from {snapshot}");
            wait.finish(client, output, client.clone_volume(&snapshot, &name), &done)
        }
        VolumeCommand::Resize { volume, size, wait } => {
            let done = format!("volume {volume} has {} now", size::show(size));
            wait.finish(client, output, client.resize_volume(&volume, size), &done)
        }
        VolumeCommand::Delete { volume, wait } => {
            output.confirm(&format!("This deletes volume {volume} for good."))?;
            wait.finish(client, output, client.delete_volume(&volume), &format!("volume {volume} is deleted"))
        }
    }
}

fn export(client: &Client, output: &Output, ca: &Path, volume: &str, exported: bool) -> Outcome {
    let taken = client.export_volume(volume, exported).map_err(from_client)?;
    client.wait_task(&taken.task, EXPORT_WAIT, |_| {}).map_err(from_client)?;
    if !exported {
        return output.say(&format!("volume {volume} is no longer exported"));
    }
    let mut uris = client.volume(volume).map_err(from_client)?.uris;
    if uris.is_empty() {
        return Err(Failure::other(format!("volume {volume} is exported, but no node says where"))
            .hint(format!("look again with `pollux volume show {volume}`")));
    }
    if uris.iter().any(|uri| uri.starts_with("nbds://")) {
        output.progress(&certificates_hint(ca, crate::lab::client_certificates(&uris).as_deref()));
    }
    uris.extend(crate::lab::local_uris(&uris));
    output.show(&uris, |uris| uris.join("\n"))
}

/// How a client gets in over TLS. `dir`: where its certificates lie already.
pub(super) fn certificates_hint(ca: &Path, dir: Option<&Path>) -> String {
    let own = match dir {
        Some(dir) => format!("{} holds them", dir.display()),
        None => "put them into a folder as ca-cert.pem, client-cert.pem and client-key.pem".to_string(),
    };
    let name = dir.map_or("FOLDER".to_string(), |dir| dir.display().to_string());
    format!(
        "Over TLS: the cluster's CA certificate is {ca}; clients show a certificate of it unless the nodes' configuration \
         lets in any (`nbd_tls`); {own}.\n\
         nbdinfo, nbdcopy: append ?tls-certificates={name} to the URI; fio looks into ~/.pki/libnbd, and as root into \
         /etc/pki/libnbd.\n\
         qemu-img, qemu-io: --object tls-creds-x509,id=tls,endpoint=client,dir={name} --image-opts \
         driver=nbd,host=...,port=...,export=...,tls-creds=tls",
        ca = ca.display()
    )
}
