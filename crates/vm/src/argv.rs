//! The command line of QEMU, as a pure function.
//!
//! How it keeps disk trouble from the guest: the NBD client of QEMU queues requests while its server is away
//! (`reconnect-delay`), so a restart of `blockd` or a frozen group is a pause. Should a request fail all the same, the
//! guest is stopped before it sees the error (`rerror`, `werror`), and goes on with the same request when told to.
//!
//! What a guest can see of its hardware must not depend on the node that runs it.

use crate::Settings;
use crate::accelerator::Engine;
use crate::guest::Guest;
use crate::rundir::RunDir;
use crate::tap;
use pollux_base::VmId;
use serde::Serialize;
use std::borrow::Cow;
use std::path::Path;

/// The program, found by PATH.
pub const QEMU: &str = "qemu-system-x86_64";

/// How long QEMU keeps requests of a disk whose server is away: a year, because a frozen group may wait for a human,
/// and each such request takes just the memory that the guest gave it.
const RECONNECT_DELAY_S: u32 = 365 * 24 * 3600;
/// How long QEMU tries to reach the disk's server at its start; the start of a VM waits for it.
pub const OPEN_TIMEOUT_S: u32 = 15;

/// What runs the guest's instructions, and which processor it sees. The probe uses the same: a processor that KVM cannot
/// give ends QEMU as it starts.
pub fn engine_options(engine: Engine) -> [(&'static str, &'static str); 2] {
    match engine {
        Engine::Kvm => [("accel", "kvm"), ("cpu", "host")],
        // Translated code: by default up to a gigabyte for each guest, of which a small one needs a tenth.
        Engine::Tcg => [("accel", "tcg,thread=multi,tb-size=128"), ("cpu", "max")],
    }
}

/// Command line, program first, of this guest on this node.
pub fn argv(guest: &Guest, settings: &Settings, engine: Engine, dir: &RunDir) -> Vec<String> {
    let mut argv: Vec<String> = vec![QEMU.into()];
    let mut add = |option: &str, value: String| argv.extend([format!("-{option}"), value]);

    add("name", format!("guest={},debug-threads=on", escaped(&guest.name)));
    add("sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into());
    add("msg", "timestamp=on".into());
    add("display", "none".into());
    add("machine", "q35".into());
    for (option, value) in engine_options(engine) {
        add(option, value.into());
    }
    add("smp", format!("cpus={}", guest.cpus));
    add("m", format!("size={}B", guest.memory.0));
    add("rtc", "base=utc".into());
    add("boot", "strict=on".into());

    add("chardev", format!("socket,id=qmp,path={},server=on,wait=off", escaped_path(&dir.qmp_socket())));
    add("mon", "chardev=qmp,mode=control".into());
    add(
        "chardev",
        format!(
            "socket,id=console,path={},server=on,wait=off,logfile={},logappend=on",
            escaped_path(&dir.console_socket()),
            escaped_path(&dir.console_log())
        ),
    );
    add("serial", "chardev:console".into());

    for (index, export) in guest.disks.iter().enumerate() {
        let node = format!("disk{index}");
        add("blockdev", json(&NbdNode::of(&node, export, &settings.nbd_socket)));
        add("device", json(&BlockDevice::of(guest.vm, index, &node)));
    }
    if settings.bridge.is_some() {
        add("netdev", format!("tap,id=net0,ifname={},script=no,downscript=no,vhost=off", tap::name(guest.vm)));
        // No romfile: nobody boots from the network.
        add("device", format!("virtio-net-pci,id=virtio-net0,netdev=net0,mac={},romfile=", guest.mac));
    }
    // The guest's own shutdown leaves QEMU there until we have seen it; `quit` and SIGTERM still end it.
    add("action", "shutdown=pause".into());
    argv.extend(["-nodefaults", "-no-user-config", "-S"].map(String::from));
    argv
}

/// A volume as QEMU's block layer opens it (`BlockdevOptionsNbd` of QEMU's QAPI).
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct NbdNode<'a> {
    driver: &'static str,
    node_name: &'a str,
    server: UnixServer<'a>,
    export: &'a str,
    discard: &'static str,
    open_timeout: u32,
    reconnect_delay: u32,
}

#[derive(Serialize)]
struct UnixServer<'a> {
    r#type: &'static str,
    path: Cow<'a, str>,
}

impl<'a> NbdNode<'a> {
    fn of(node: &'a str, export: &'a str, socket: &'a Path) -> NbdNode<'a> {
        NbdNode {
            driver: "nbd",
            node_name: node,
            server: UnixServer { r#type: "unix", path: socket.to_string_lossy() },
            export,
            discard: "unmap",
            open_timeout: OPEN_TIMEOUT_S,
            reconnect_delay: RECONNECT_DELAY_S,
        }
    }
}

/// A disk as the guest sees it. Properties of devices are spelt as QEMU spells them.
#[derive(Serialize)]
struct BlockDevice<'a> {
    driver: &'static str,
    id: String,
    drive: &'a str,
    serial: String,
    logical_block_size: u32,
    physical_block_size: u32,
    #[serde(rename = "write-cache")]
    write_cache: &'static str,
    discard: bool,
    rerror: &'static str,
    werror: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    bootindex: Option<u32>,
}

impl<'a> BlockDevice<'a> {
    fn of(vm: VmId, index: usize, node: &'a str) -> BlockDevice<'a> {
        BlockDevice {
            driver: "virtio-blk-pci",
            id: format!("virtio-disk{index}"),
            drive: node,
            serial: format!("{vm}-{index}"),
            // Fixed, so that no node shows other sectors than the next: a file system made on one would not mount on the
            // other. 512 is what every system boots from, 4096 is what a volume likes best.
            logical_block_size: 512,
            physical_block_size: 4096,
            write_cache: "on",
            discard: true,
            rerror: "stop",
            werror: "stop",
            bootindex: (index == 0).then_some(1),
        }
    }
}

fn json(options: &impl Serialize) -> String {
    serde_json::to_string(options).expect("structs of text and numbers always have a JSON form")
}

/// A comma would begin the next option; QEMU reads two as one.
fn escaped(text: &str) -> String {
    text.replace(',', ",,")
}

fn escaped_path(path: &Path) -> String {
    escaped(&path.to_string_lossy())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::tests::guest;
    use pollux_base::config::Accelerator;

    fn settings() -> Settings {
        Settings {
            vm_dir: "/run/pollux/vm".into(),
            nbd_socket: "/run/pollux/nbd.sock".into(),
            guest_cgroup: None,
            bridge: Some("guests".into()),
            accelerator: Accelerator::Auto,
        }
    }

    fn lines(argv: &[String]) -> String {
        let mut text = String::new();
        for word in argv {
            text.push_str(if word.starts_with('-') { "\n" } else { " " });
            text.push_str(word);
        }
        text.trim_start().to_string() + "\n"
    }

    #[test]
    fn the_command_line_changes_only_knowingly() {
        let settings = settings();
        let argv = argv(&guest(), &settings, Engine::Tcg, &RunDir::of(&settings, VmId(7)));
        assert_eq!(lines(&argv), include_str!("argv.golden"));
    }

    #[test]
    fn without_a_bridge_there_is_no_network_card() {
        let settings = Settings { bridge: None, ..settings() };
        let argv = argv(&guest(), &settings, Engine::Kvm, &RunDir::of(&settings, VmId(7)));
        assert!(!lines(&argv).contains("net"));
        assert!(lines(&argv).contains("-accel kvm\n-cpu host\n"));
    }

    #[test]
    fn a_name_can_not_smuggle_in_an_option() {
        let settings = settings();
        let guest = Guest { name: "a,process=b".into(), ..guest() };
        let argv = argv(&guest, &settings, Engine::Tcg, &RunDir::of(&settings, VmId(7)));
        assert_eq!(argv[2], "guest=a,,process=b,debug-threads=on");
    }
}
