//! What people read is changed knowingly: help and tables are compared with files.
//!
//! `POLLUX_GOLDEN=update cargo test -p pollux-cli --test golden` writes them anew; the difference is then reviewed as text.

use pollux_api::*;
use pollux_cli::table;
use std::fmt::Write;
use std::path::Path;

fn compare(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("POLLUX_GOLDEN").is_some_and(|value| value == "update") {
        std::fs::write(&path, text).expect("a golden file can be written");
        return;
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(golden == text, "{name} differs from what is printed now:\n{text}");
}

#[test]
fn help_is_as_reviewed() {
    let mut text = String::new();
    describe(&mut pollux_cli::tree(), "pollux", &mut text);
    compare("help.txt", &text);
}

fn describe(command: &mut clap::Command, path: &str, text: &mut String) {
    let help = command.clone().bin_name(path).render_long_help().to_string();
    let lines: Vec<&str> = help.lines().map(str::trim_end).collect();
    let _ = writeln!(text, "==== {path}\n{}\n", lines.join("\n").trim_end());
    for child in command.get_subcommands_mut().filter(|child| !child.is_hide_set()) {
        let path = format!("{path} {}", child.get_name());
        // Flags of every command are described once, at the top.
        describe(child, &path, text);
    }
}

fn node(name: &str, state: NodeState) -> Node {
    let id = if name == "a" { 1 } else { 2 };
    Node {
        id,
        name: name.into(),
        state,
        reason: None,
        hint: None,
        leader: id == 1,
        voter: true,
        api: vec![format!("10.76.0.{id}:7443"), format!("10.75.0.{id}:7443")],
        power_switch: true,
        memory_bytes: 4 << 30,
        replication: match id {
            1 => Vec::new(),
            _ => vec![
                path("10.75.0.2:7001", PathState::Up, None),
                path("10.76.0.2:7001", PathState::Down, Some("no answer")),
            ],
        },
        replication_encrypted: Some(true),
        memory_used_bytes: if id == 1 { 256 << 20 } else { 0 },
    }
}

fn scrub() -> Scrub {
    Scrub {
        every_days: 7,
        running: true,
        percent: Some(41.2),
        seconds_left: Some(7300),
        last: Some(ScrubResult {
            ended_unix_ms: 1_700_000_000_000,
            replicas: vec!["a".into(), "b".into()],
            checked_bytes: 20 << 30,
            rotten_blocks: 2,
            differing_blocks: 1,
            healed_blocks: 3,
            lost_blocks: 0,
        }),
    }
}

fn path(address: &str, state: PathState, reason: Option<&str>) -> ReplicationPath {
    ReplicationPath { address: address.into(), state, reason: reason.map(Into::into) }
}

fn group(name: &str, kind: GroupKind) -> Group {
    Group {
        id: 3,
        name: name.into(),
        kind,
        state: GroupState::Healthy,
        reason: None,
        resync: None,
        scrub: scrub(),
        generation: 4,
        epoch: 1,
        primary: "a".into(),
        in_sync: vec!["a".into(), "b".into()],
        replicas: vec!["a".into(), "b".into()],
        modes: vec![Mode::Sync, Mode::Sync],
        lag: vec![],
        lag_bound: LagBound { bytes: 64 << 20, seconds: 30, at_bound: AtBound::Slow },
        moving: None,
        volumes: vec![5],
        used_bytes: Some(57 << 20),
    }
}

fn vm() -> Vm {
    Vm {
        id: 7,
        name: "web1".into(),
        state: VmState::Running,
        reason: None,
        wanted: Wanted::Running,
        node: "a".into(),
        incarnation: 2,
        cpus: 1,
        memory_bytes: 256 << 20,
        image: Some("debian".into()),
        mac: "52:54:00:00:00:07".into(),
        group: 3,
        disks: vec![5],
        encrypted: true,
        resync: None,
    }
}

/// An exchange that stopped half way.
fn master_keys() -> MasterKeys {
    let (old, new) = ("11".repeat(16), "22".repeat(16));
    let node = |node: &str, heard: bool| NodeMasterKeys {
        node: node.into(),
        heard,
        master_key: heard.then(|| old.clone()),
        successor: heard.then(|| new.clone()),
    };
    let volumes = (0..8).map(|number| format!("vm/web{number}/disk0")).collect();
    MasterKeys {
        master_key: Some(new.clone()),
        nodes: vec![node("a", true), node("b", false)],
        sealed: vec![
            SealedUnder { master_key: old.clone(), volumes: vec!["data".into()] },
            SealedUnder { master_key: new.clone(), volumes },
        ],
        hint: Some("not all keys are sealed under the master key of new ones: pollux master-key rotate".into()),
    }
}

fn well() -> Status {
    Status {
        cluster: "0".repeat(32),
        cluster_name: "lab".into(),
        headline: Headline {
            protection: Protection::Protected,
            text: "if a node dies now, its VMs restart on the other".into(),
            hint: None,
        },
        epoch: 1,
        alone: None,
        leader: Some("a".into()),
        answered_by: "b".into(),
        unix_ms: 1_700_000_000_000,
        nodes: vec![node("a", NodeState::Online), node("b", NodeState::Online)],
        groups: vec![group("web1", GroupKind::Vm), group("debian", GroupKind::Image)],
        vms: vec![vm()],
        witness: Some(Witness {
            address: "10.76.0.253:7500".into(),
            reachable: Some(true),
            since_unix_ms: Some(1_700_000_000_000),
            epoch: Some(1),
            alone: None,
            error: None,
            hint: None,
        }),
    }
}

/// The same after the death of a, with everything that can be said about it.
fn ill() -> Status {
    let mut status = well();
    status.headline = Headline {
        protection: Protection::Unprotected,
        text: "unprotected: a is down since 14:02".into(),
        hint: Some("give a its power back".into()),
    };
    status.epoch = 2;
    status.alone = Some("b".into());
    status.leader = Some("b".into());
    status.nodes[0] = Node {
        state: NodeState::Down,
        reason: Some("power is off (read back)".into()),
        hint: Some("pollux lab return a".into()),
        leader: false,
        voter: false,
        ..status.nodes[0].clone()
    };
    status.groups[0] = Group {
        state: GroupState::Resyncing,
        resync: Some(Resync {
            node: "a".into(),
            percent: 41.2,
            extents_total: 17,
            extents_left: 10,
            sent_bytes: 1 << 20,
            bytes_per_second: 1 << 20,
            seconds_left: Some(150),
        }),
        primary: "b".into(),
        in_sync: vec!["b".into()],
        generation: 5,
        ..status.groups[0].clone()
    };
    status.groups[1] = Group {
        state: GroupState::Degraded,
        reason: Some("the replica on a is stale".into()),
        ..status.groups[1].clone()
    };
    status.vms[0] = Vm {
        state: VmState::Blocked,
        reason: Some("b has too little memory".into()),
        node: "b".into(),
        incarnation: 3,
        ..status.vms[0].clone()
    };
    status.witness = Some(Witness {
        address: "10.76.0.253:7500".into(),
        reachable: Some(false),
        since_unix_ms: Some(1_700_000_000_000),
        epoch: None,
        alone: None,
        error: Some("no answer in time".into()),
        hint: Some("pollux witness status".into()),
    });
    status
}

#[test]
fn status_tells_the_headline_first_and_every_problem_with_what_mends_it() {
    let mut empty = well();
    (empty.groups, empty.vms, empty.witness) = (Vec::new(), Vec::new(), None);
    let text = [well(), ill(), empty].map(|status| table::status(&status)).join("\n\n--------\n\n");
    compare("status.txt", &format!("{text}\n"));
}

#[test]
fn one_of_each_is_shown_as_reviewed() {
    let volume = Volume {
        id: 5,
        name: "data".into(),
        size_bytes: 10 << 30,
        group: 3,
        state: GroupState::Healthy,
        resync: None,
        scrub: scrub(),
        primary: "a".into(),
        snapshot: None,
        encrypted: true,
        vm: None,
        image: None,
        uris: vec!["nbd://10.76.0.1:10809/data".into(), "nbd://10.76.0.2:10809/data".into()],
    };
    let disk =
        Volume { vm: Some("web1".into()), encrypted: false, uris: Vec::new(), name: "web1-0".into(), ..volume.clone() };
    let image = Image {
        id: 2,
        name: "debian".into(),
        size_bytes: 57 << 20,
        ready: true,
        sha256: Some("0123456789abcdef".repeat(4)),
        group: 3,
        volume: 5,
        encrypted: false,
    };
    let filling = Image { ready: false, sha256: None, name: "other".into(), ..image.clone() };
    let pool = Pool {
        node: "a".into(),
        state: PoolState::Scarce,
        reason: Some("5 GiB of 100 GiB are free in the pool on `a`, at the present rate for 85 minutes".into()),
        hint: Some("delete what is not needed: pollux volume list, pollux image list".into()),
        size_bytes: 100 << 30,
        used_bytes: 95 << 30,
        free_bytes: 5 << 30,
        promised_bytes: 150 << 30,
        growth_bytes_per_s: 1 << 20,
        full_in_s: Some(5120),
        healed_blocks: 3,
        disks: [
            ("11", "/dev/disk/by-id/wwn-1", PoolDiskState::Healthy, 60 << 30, 0, 0),
            ("22", "/dev/disk/by-id/wwn-2", PoolDiskState::Draining, 35 << 30, 2, 1),
            ("33", "/dev/disk/by-id/wwn-3", PoolDiskState::Drained, 0, 0, 0),
            ("44", "/dev/disk/by-id/wwn-4", PoolDiskState::Failed, 0, 0, 0),
            ("55", "/dev/disk/by-id/wwn-5", PoolDiskState::Missing, 0, 0, 0),
        ]
        .map(|(digits, path, state, used_bytes, checksum_errors, io_errors)| PoolDisk {
            id: digits.repeat(16),
            path: path.into(),
            state,
            reason: None,
            size_bytes: 100 << 30,
            capacity_bytes: 98 << 30,
            used_bytes,
            extents: used_bytes >> 22,
            checksum_errors,
            io_errors,
        })
        .into(),
    };
    let finding = |code: &str, severity, what: &str, fix: &str| PoolFinding {
        code: code.into(),
        severity,
        disk: "/dev/disk/by-id/wwn-1".into(),
        what: what.into(),
        fix: fix.into(),
    };
    let verification = PoolVerification {
        node: "a".into(),
        done: true,
        failed: None,
        percent: 100.0,
        findings: vec![
            finding("V001", Severity::Warning, "copy 1 of superblock is damaged", "nothing"),
            finding(
                "V070",
                Severity::Error,
                "checksums of extent 3 of v7 are damaged",
                "`pollux volume scrub` copies them",
            ),
        ],
        counts: [("V001".into(), 1), ("V070".into(), 60)].into(),
        disks: 2,
        volumes: 12,
        extents: 4000,
    };
    let evidence = Kept {
        kept: "v7-evidence-1".into(),
        node: "b".into(),
        volume: "vm/web1/disk0".into(),
        group: 3,
        reason: KeptReason::Evidence,
        size_bytes: 10 << 30,
        uris: vec!["nbds://10.75.0.2:10809/kept/v7-evidence-1".into()],
    };
    let before = Kept {
        kept: "v7-before-resync".into(),
        reason: KeptReason::BeforeResync,
        uris: Vec::new(),
        ..evidence.clone()
    };
    let snapshot = Snapshot {
        id: 9,
        name: "web1@before-upgrade".into(),
        state: SnapshotState::Taken,
        of: "web1".into(),
        unix_ms: 1_700_000_000_000,
        group: 3,
        volumes: vec!["vm/web1/disk0@before-upgrade".into()],
    };
    let event = Event {
        index: 12,
        unix_ms: 1_700_000_000_000,
        by: "b".into(),
        subject: Subject { kind: SubjectKind::Vm, id: Some(7), name: "web1".into() },
        text: "starts on b as run 2, because a is fenced".into(),
    };
    let task = Task {
        task: "n1-17".into(),
        action: "vm start".into(),
        subject: "web1".into(),
        state: TaskState::Running,
        detail: "waits for the guest to start".into(),
        id: None,
        started_unix_ms: 1_700_000_000_000,
        ended_unix_ms: None,
        error: None,
    };
    let parts = [
        table::node(&ill().nodes[0]),
        table::vm(&vm()),
        table::volumes(&[volume.clone(), disk]),
        table::volume(&volume),
        table::snapshots(std::slice::from_ref(&snapshot)),
        table::snapshot(&snapshot),
        table::pools(std::slice::from_ref(&pool)),
        table::pool(&pool),
        table::verification(&verification),
        table::kept_list(&[before, evidence.clone()]),
        table::kept(&evidence),
        table::images(&[image.clone(), filling]),
        table::image(&image),
        table::events(&[event]),
        table::tasks(std::slice::from_ref(&task)),
        table::task(&task),
        table::master_keys(&master_keys()),
        table::witness(None),
    ];
    compare("nouns.txt", &format!("{}\n", parts.join("\n\n")));
}
