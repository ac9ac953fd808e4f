//! Tables of what the API answers. Pure, so that golden files can hold them.

use crate::output::{Table, day_and_time, fields, list, or_dash, time_of_day};
use crate::size::show as size;
use pollux_api::{
    Event, Group, GroupState, Image, Kept, Lag, MasterKeys, Node, Pool, PoolDiskState, PoolFinding, PoolVerification,
    Resync, Scrub, Snapshot, SnapshotDiff, Status, Task, Vm, Volume, Witness,
};
use std::fmt::Write;

/// The headline, then what it is made of. Each problem is followed by what mends it.
pub fn status(status: &Status) -> String {
    // The first word is the protection, also where the sentence does not begin with it.
    let protection = status.headline.protection.to_string();
    let sentence = status.headline.text.trim_start_matches(&protection).trim_start_matches([':', ';', ',', ' ']);
    let mut text = format!("{protection}: {sentence}");
    if let Some(hint) = &status.headline.hint {
        let _ = write!(text, "\n  fix: {hint}");
    }
    let authority = match &status.alone {
        Some(node) => format!("epoch {}, {node} alone", status.epoch),
        None => format!("epoch {}", status.epoch),
    };
    let leader = or_dash(status.leader.as_ref());
    let _ = write!(
        text,
        "\n\ncluster {}: {authority}, leader {leader}, seen by {}\n\n{}",
        status.cluster_name,
        status.answered_by,
        nodes(&status.nodes)
    );
    for (title, rows) in [
        ("groups", (!status.groups.is_empty()).then(|| groups(&status.groups))),
        ("vms", (!status.vms.is_empty()).then(|| vms(&status.vms))),
    ] {
        let _ = match rows {
            Some(rows) => write!(text, "\n\n{rows}"),
            None => write!(text, "\n\nno {title}"),
        };
    }
    let _ = write!(text, "\n\n{}", witness(status.witness.as_ref()));
    text
}

pub fn nodes(nodes: &[Node]) -> String {
    let mut table = Table::new(&["NODE", "STATE", "LOG", "POWER SWITCH", "GUEST MEMORY", "API"]);
    for node in nodes {
        table.row([
            node.name.clone(),
            node.state.to_string(),
            role(node).into(),
            if node.power_switch { "yes" } else { "no" }.into(),
            format!("{} of {}", size(node.memory_used_bytes), size(node.memory_bytes)),
            node.api.first().cloned().unwrap_or_else(|| "-".into()),
        ]);
    }
    with_reasons(table, nodes.iter().map(|node| (node.name.as_str(), &node.reason, &node.hint)))
}

pub fn node(node: &Node) -> String {
    fields(&[
        ("name", node.name.clone()),
        ("id", node.id.to_string()),
        ("state", with_reason(&node.state, node.reason.as_ref())),
        ("fix", or_dash(node.hint.as_ref())),
        ("log", role(node).into()),
        ("power switch", if node.power_switch { "yes" } else { "no" }.into()),
        ("guest memory", format!("{} of {}", size(node.memory_used_bytes), size(node.memory_bytes))),
        ("api", list(&node.api)),
        ("replication", or_dash(replication(node).as_ref())),
    ])
}

/// Each path and how it is, one a line.
fn replication(node: &Node) -> Option<String> {
    let protection = match node.replication_encrypted? {
        true => "encrypted",
        false => "NOT encrypted (replication_encryption: off)",
    };
    let paths = node.replication.iter().map(|path| {
        let reason = path.reason.as_ref().map_or_else(String::new, |reason| format!(" ({reason})"));
        format!("\n  {} {}{reason}", path.address, path.state)
    });
    Some(protection.to_owned() + &paths.collect::<String>())
}

fn role(node: &Node) -> &'static str {
    match (node.leader, node.voter) {
        (true, _) => "leader",
        (false, true) => "voter",
        (false, false) => "-",
    }
}

pub fn groups(groups: &[Group]) -> String {
    let mut table = Table::new(&["GROUP", "OF", "STATE", "GENERATION", "PRIMARY", "IN SYNC", "REPLICAS"]);
    for group in groups {
        table.row([
            group.name.clone(),
            group.kind.to_string(),
            group_state(group),
            group.generation.to_string(),
            group.primary.clone(),
            list(&group.in_sync),
            list(&group.replicas),
        ]);
    }
    with_reasons(table, groups.iter().map(|group| (group.name.as_str(), &group.reason, &None)))
}

pub fn group(group: &Group) -> String {
    let replicas = group.replicas.iter().zip(&group.modes);
    let replicas: Vec<String> = replicas.map(|(node, mode)| format!("{node} ({mode})")).collect();
    let lag = |lag: &Lag| {
        let slows = if lag.slows { ", writers wait for it" } else { "" };
        format!("{} lacks {} and {:.1} s{slows}", lag.node, size(lag.bytes), lag.ms as f64 / 1000.0)
    };
    let lags: Vec<String> = group.lag.iter().map(lag).collect();
    let bound = &group.lag_bound;
    let moving = group.moving.as_ref().map(|moving| format!("from {} to {}", moving.from, moving.to));
    fields(&[
        ("name", group.name.clone()),
        ("id", group.id.to_string()),
        ("of", group.kind.to_string()),
        ("state", with_reason(&group_state(group), group.reason.as_ref())),
        ("generation", group.generation.to_string()),
        ("primary", group.primary.clone()),
        ("in sync", list(&group.in_sync)),
        ("replicas", list(&replicas)),
        ("moves", or_dash(moving.as_ref())),
        ("lag", list(&lags)),
        ("lag bound", format!("{} and {} s, then {}", size(bound.bytes), bound.seconds, bound.at_bound)),
    ])
}

fn group_state(group: &Group) -> String {
    match (&group.state, &group.resync) {
        (GroupState::Resyncing, Some(resync)) => format!("resyncing {}", progress(resync)),
        (state, _) => state.to_string(),
    }
}

fn progress(resync: &Resync) -> String {
    format!("{:.0} %{}", resync.percent, left(resync.seconds_left))
}

fn left(seconds: Option<u64>) -> String {
    match seconds {
        None => String::new(),
        Some(seconds) if seconds < 120 => format!(", {seconds} s left"),
        Some(seconds) if seconds < 7200 => format!(", {} min left", seconds / 60),
        Some(seconds) => format!(", {} h left", seconds / 3600),
    }
}

/// What is known of a group's scrubs, in one line.
fn scrub(scrub: &Scrub) -> String {
    let mut parts = Vec::new();
    if scrub.running {
        let percent = scrub.percent.map_or(String::new(), |percent| format!(" {percent:.0} %"));
        parts.push(format!("running{percent}{}", left(scrub.seconds_left)));
    }
    parts.push(match &scrub.last {
        None => "never ended one".into(),
        Some(last) => {
            let bad = last.rotten_blocks + last.differing_blocks;
            let found = match (bad, last.lost_blocks) {
                (0, _) => "all well".into(),
                (bad, 0) => format!("{bad} bad blocks, all healed"),
                (bad, lost) => format!("{bad} bad blocks, {lost} without a good copy"),
            };
            let day = day_and_time(last.ended_unix_ms);
            format!("last {day}, {} on {}: {found}", size(last.checked_bytes), list(&last.replicas))
        }
    });
    parts.push(match scrub.every_days {
        0 => "only when asked for".into(),
        days => format!("every {days} days"),
    });
    parts.join("; ")
}

pub fn vms(vms: &[Vm]) -> String {
    let mut table = Table::new(&["VM", "STATE", "NODE", "RUN", "CPUS", "MEMORY", "IMAGE", "MAC"]);
    for vm in vms {
        table.row([
            vm.name.clone(),
            vm.state.to_string(),
            vm.node.clone(),
            vm.incarnation.to_string(),
            vm.cpus.to_string(),
            size(vm.memory_bytes),
            or_dash(vm.image.as_ref()),
            vm.mac.clone(),
        ]);
    }
    with_reasons(table, vms.iter().map(|vm| (vm.name.as_str(), &vm.reason, &None)))
}

pub fn vm(vm: &Vm) -> String {
    fields(&[
        ("name", vm.name.clone()),
        ("id", vm.id.to_string()),
        ("state", with_reason(&vm.state, vm.reason.as_ref())),
        ("wanted", vm.wanted.to_string()),
        ("node", vm.node.clone()),
        ("run", vm.incarnation.to_string()),
        ("cpus", vm.cpus.to_string()),
        ("memory", size(vm.memory_bytes)),
        ("image", or_dash(vm.image.as_ref())),
        ("mac", vm.mac.clone()),
        ("group", vm.group.to_string()),
        ("disks", list(&vm.disks.iter().map(u64::to_string).collect::<Vec<_>>())),
        ("encrypted", yes_or_no(vm.encrypted).into()),
        ("resync", or_dash(vm.resync.as_ref().map(|resync| format!("{} to {}", progress(resync), resync.node)))),
    ])
}

pub fn volumes(volumes: &[Volume]) -> String {
    let mut table = Table::new(&["VOLUME", "SIZE", "STATE", "PRIMARY", "OF", "EXPORTED", "ENCRYPTED"]);
    for volume in volumes {
        table.row([
            volume.name.clone(),
            size(volume.size_bytes),
            volume.state.to_string(),
            volume.primary.clone(),
            owner(volume),
            if volume.uris.is_empty() { "no" } else { "nbd" }.into(),
            yes_or_no(volume.encrypted).into(),
        ]);
    }
    table.to_string()
}

pub fn volume(volume: &Volume) -> String {
    let uris = if volume.uris.is_empty() { "-".into() } else { volume.uris.join(" ") };
    fields(&[
        ("name", volume.name.clone()),
        ("id", volume.id.to_string()),
        ("size", size(volume.size_bytes)),
        ("state", volume.state.to_string()),
        ("group", volume.group.to_string()),
        ("primary", volume.primary.clone()),
        ("of", owner(volume)),
        ("encrypted", yes_or_no(volume.encrypted).into()),
        ("resync", or_dash(volume.resync.as_ref().map(|resync| format!("{} to {}", progress(resync), resync.node)))),
        ("scrub", scrub(&volume.scrub)),
        ("uris", uris),
    ])
}

fn owner(volume: &Volume) -> String {
    match (&volume.vm, &volume.image) {
        _ if volume.snapshot.is_some() => format!("snapshot {}", or_dash(volume.snapshot.as_ref())),
        (Some(vm), _) => format!("vm {vm}"),
        (None, Some(image)) => format!("image {image}"),
        (None, None) => "-".into(),
    }
}

pub fn snapshots(snapshots: &[Snapshot]) -> String {
    let mut table = Table::new(&["SNAPSHOT", "STATE", "TAKEN AT", "VOLUMES"]);
    for snapshot in snapshots {
        table.row([
            snapshot.name.clone(),
            snapshot.state.to_string(),
            day_and_time(snapshot.unix_ms),
            list(&snapshot.volumes),
        ]);
    }
    table.to_string()
}

pub fn snapshot_diff(diff: &SnapshotDiff) -> String {
    let mut table = Table::new(&["VOLUME", "OFFSET", "LENGTH"]);
    for volume in &diff.volumes {
        for range in &volume.ranges {
            table.row([volume.volume.clone(), range.offset_bytes.to_string(), range.length_bytes.to_string()]);
        }
    }
    table.to_string()
}

pub fn snapshot(snapshot: &Snapshot) -> String {
    fields(&[
        ("name", snapshot.name.clone()),
        ("id", snapshot.id.to_string()),
        ("state", snapshot.state.to_string()),
        ("of", snapshot.of.clone()),
        ("taken at", day_and_time(snapshot.unix_ms)),
        ("group", snapshot.group.to_string()),
        ("volumes", list(&snapshot.volumes)),
    ])
}

pub fn pools(pools: &[Pool]) -> String {
    let mut table = Table::new(&["POOL", "STATE", "SIZE", "USED", "FREE", "PROMISED", "FULL IN", "HEALED"]);
    for pool in pools {
        table.row([
            pool.node.clone(),
            pool.state.to_string(),
            size(pool.size_bytes),
            size(pool.used_bytes),
            size(pool.free_bytes),
            size(pool.promised_bytes),
            or_dash(pool.full_in_s.map(span)),
            format!("{} blocks", pool.healed_blocks),
        ]);
    }
    with_reasons(table, pools.iter().map(|pool| (pool.node.as_str(), &pool.reason, &pool.hint)))
}

pub fn pool(pool: &Pool) -> String {
    let overcommit = match pool.size_bytes {
        0 => String::new(),
        size => format!(" ({:.0} % of the pool)", 100.0 * pool.promised_bytes as f64 / size as f64),
    };
    let shown = fields(&[
        ("node", pool.node.clone()),
        ("state", with_reason(&pool.state, pool.reason.as_ref())),
        ("fix", or_dash(pool.hint.as_ref())),
        ("size", size(pool.size_bytes)),
        ("used", size(pool.used_bytes)),
        ("free", size(pool.free_bytes)),
        ("promised", format!("{}{overcommit}", size(pool.promised_bytes))),
        ("growth", format!("{}/s", size(pool.growth_bytes_per_s))),
        ("full in", or_dash(pool.full_in_s.map(span))),
        ("healed", format!("{} blocks since the data plane started", pool.healed_blocks)),
    ]);
    format!("{shown}\n\n{}", disks(pool))
}

pub fn kept_list(kept: &[Kept]) -> String {
    let mut table = Table::new(&["KEPT", "NODE", "VOLUME", "REASON", "SIZE"]);
    for kept in kept {
        let Kept { kept: name, node, volume, reason, size_bytes, .. } = kept;
        table.row([name.clone(), node.clone(), volume.clone(), reason.to_string(), size(*size_bytes)]);
    }
    table.to_string()
}

pub fn kept(kept: &Kept) -> String {
    fields(&[
        ("kept", kept.kept.clone()),
        ("node", kept.node.clone()),
        ("volume", kept.volume.clone()),
        ("reason", kept.reason.to_string()),
        ("size", size(kept.size_bytes)),
        ("exported", list(&kept.uris)),
    ])
}

/// Findings, the worst first, then what was looked at.
pub fn verification(verified: &PoolVerification) -> String {
    let mut findings: Vec<&PoolFinding> = verified.findings.iter().collect();
    findings.sort_by_key(|finding| finding.severity);
    let line = |finding: &&PoolFinding| {
        let PoolFinding { code, severity, disk, what, fix } = finding;
        format!("{code}  {severity}  {disk}: {what}\n      Hint: {fix}")
    };
    let mut lines: Vec<String> = findings.iter().map(line).collect();
    for (code, count) in &verified.counts {
        let told = verified.findings.iter().filter(|finding| finding.code == *code).count() as u64;
        if told < *count {
            lines.push(format!("{code}  and {} more of these", count - told));
        }
    }
    let PoolVerification { disks, volumes, extents, node, .. } = verified;
    lines.push(format!("pool on {node}: {disks} disks, {volumes} volumes and snapshots, {extents} extents"));
    lines.push(if verified.counts.is_empty() { "clean".into() } else { "not clean".into() });
    lines.join("\n")
}

/// The disks of a pool; each that needs something is followed by what mends it.
fn disks(pool: &Pool) -> String {
    let mut table = Table::new(&["DISK", "STATE", "SIZE", "USED", "EXTENTS", "CHECKSUM ERRORS", "I/O ERRORS", "PATH"]);
    for disk in &pool.disks {
        let state = match disk.state {
            PoolDiskState::Draining => format!("draining, {} left", size(disk.used_bytes)),
            state => state.to_string(),
        };
        table.row([
            disk.id.clone(),
            state,
            size(disk.size_bytes),
            size(disk.used_bytes),
            disk.extents.to_string(),
            disk.checksum_errors.to_string(),
            disk.io_errors.to_string(),
            disk.path.clone(),
        ]);
    }
    let node = &pool.node;
    let fixes: Vec<Option<String>> = pool
        .disks
        .iter()
        .map(|disk| match disk.state {
            PoolDiskState::Healthy | PoolDiskState::Draining => None,
            PoolDiskState::Drained | PoolDiskState::Failed => {
                Some(format!("pollux pool remove-disk {node} {}", disk.id))
            }
            PoolDiskState::Missing => {
                Some(format!("attach it; if it is lost for good: pollux pool remove-disk {node} {} --lost", disk.id))
            }
        })
        .collect();
    with_reasons(table, pool.disks.iter().zip(&fixes).map(|(disk, fix)| (disk.id.as_str(), &disk.reason, fix)))
}

/// A span of time for people.
fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

pub fn images(images: &[Image]) -> String {
    let mut table = Table::new(&["IMAGE", "SIZE", "READY", "SHA256"]);
    for image in images {
        let sha256 = image.sha256.as_deref().map(|text| text.chars().take(12).collect::<String>());
        table.row([image.name.clone(), size(image.size_bytes), yes_or_no(image.ready).into(), or_dash(sha256)]);
    }
    table.to_string()
}

pub fn image(image: &Image) -> String {
    fields(&[
        ("name", image.name.clone()),
        ("id", image.id.to_string()),
        ("size", size(image.size_bytes)),
        ("ready", yes_or_no(image.ready).into()),
        ("encrypted", yes_or_no(image.encrypted).into()),
        ("sha256", or_dash(image.sha256.as_ref())),
        ("group", image.group.to_string()),
    ])
}

fn yes_or_no(is_so: bool) -> &'static str {
    if is_so { "yes" } else { "no" }
}

/// Volumes that are named of those under one master key; more are counted.
const VOLUMES_NAMED: usize = 6;

pub fn master_keys(keys: &MasterKeys) -> String {
    let mut nodes = Table::new(&["NODE", "MASTER KEY", "SUCCESSOR"]);
    for node in &keys.nodes {
        let present = if node.heard { or_dash(node.master_key.as_ref()) } else { "not heard".into() };
        nodes.row([node.node.clone(), present, or_dash(node.successor.as_ref())]);
    }
    let mut sealed = Table::new(&["SEALED UNDER", "VOLUMES"]);
    for under in &keys.sealed {
        let (named, more) = under.volumes.split_at(under.volumes.len().min(VOLUMES_NAMED));
        let more = if more.is_empty() { String::new() } else { format!(" and {} more", more.len()) };
        sealed.row([under.master_key.clone(), format!("{}{more}", named.join(", "))]);
    }
    let sealed = if keys.sealed.is_empty() { "no encrypted volumes".into() } else { sealed.to_string() };
    let fix = keys.hint.as_ref().map_or(String::new(), |hint| format!("\n  next: {hint}"));
    format!("new keys are sealed under {}{fix}\n\n{nodes}\n\n{sealed}", or_dash(keys.master_key.as_ref()))
}

pub fn witness(witness: Option<&Witness>) -> String {
    let Some(witness) = witness else { return "witness: none; a lost node needs a human".into() };
    let since = witness.since_unix_ms.map_or(String::new(), |since| format!(" since {}", time_of_day(since)));
    let state = match witness.reachable {
        Some(true) => {
            let holds = match (&witness.alone, witness.epoch) {
                (Some(node), Some(epoch)) => format!(", holds epoch {epoch}, {node} alone"),
                (None, Some(epoch)) => format!(", holds epoch {epoch}, all members"),
                (_, None) => String::new(),
            };
            format!("reachable{since}{holds}")
        }
        Some(false) => format!("not reachable{since}: {}", or_dash(witness.error.as_ref())),
        None => "not asked yet".into(),
    };
    let fix = witness.hint.as_ref().map_or(String::new(), |hint| format!("\n  fix: {hint}"));
    format!("witness {}: {state}{fix}", witness.address)
}

pub fn events(events: &[Event]) -> String {
    events.iter().map(event).collect::<Vec<_>>().join("\n")
}

/// One line: index, time, what it is about, what happened, who said so.
pub fn event(event: &Event) -> String {
    let subject = format!("{} {}", event.subject.kind, event.subject.name);
    format!("{:>6}  {}  {subject:<14}  {}  (by {})", event.index, time_of_day(event.unix_ms), event.text, event.by)
}

pub fn tasks(tasks: &[Task]) -> String {
    let mut table = Table::new(&["TASK", "ACTION", "SUBJECT", "STATE", "DETAIL"]);
    for task in tasks {
        table.row([
            task.task.clone(),
            task.action.clone(),
            task.subject.clone(),
            task.state.to_string(),
            task.detail.clone(),
        ]);
    }
    table.to_string()
}

pub fn task(task: &Task) -> String {
    fields(&[
        ("task", task.task.clone()),
        ("action", task.action.clone()),
        ("subject", task.subject.clone()),
        ("state", task.state.to_string()),
        ("detail", task.detail.clone()),
        ("id", or_dash(task.id)),
        ("started", time_of_day(task.started_unix_ms)),
        ("ended", or_dash(task.ended_unix_ms.map(time_of_day))),
    ])
}

fn with_reason(state: &impl ToString, reason: Option<&String>) -> String {
    match reason {
        Some(reason) => format!("{} ({reason})", state.to_string()),
        None => state.to_string(),
    }
}

/// Reasons are sentences: they stand below the table, each with what mends it.
fn with_reasons<'a>(
    table: Table,
    reasons: impl Iterator<Item = (&'a str, &'a Option<String>, &'a Option<String>)>,
) -> String {
    let mut text = table.to_string();
    for (name, reason, hint) in reasons {
        if let Some(reason) = reason {
            let _ = write!(text, "\n  {name}: {reason}");
        }
        if let Some(hint) = hint {
            let _ = write!(text, "\n  fix: {hint}");
        }
    }
    text
}
