//! `blockd verify` and `blockd rescue`: a pool's disks are looked at while nobody uses them, and nothing is written to them.

use crate::disk_list;
use pollux_base::config::NodeConfig;
use pollux_base::record::GroupNames;
use pollux_base::unit::{BLOCK_BYTES, BlockRange};
use pollux_base::{BlockIndex, ByteCount, Data, GroupId, Kept, KeyId, SealedKey, VolumeId};
use pollux_host::disk::OpenDiskError;
use pollux_host::reading::DiskReader;
use pollux_replica::cipher::Cipher;
use pollux_replica::{Newer, Noted, names, noted};
use pollux_seal::MasterKey;
use pollux_store::verify::{Export, Finding, Progress, ReadDisk, Rescue, RescuedVolume, Verified};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Why nothing could be looked at.
#[derive(Debug, thiserror::Error)]
pub enum LookError {
    #[error(transparent)]
    Disk(OpenDiskError),
    #[error("{path} is in use: stop blockd first, or have it verified as it runs: `pollux pool verify --node NODE`", path = .0.display())]
    InUse(PathBuf),
    #[error("the pool has no volume `{0}`; `pollux pool rescue` without --export lists them")]
    NoVolume(String),
    #[error("the pool has several volumes of the name `{0}`, {1}: give the number of the one that is meant")]
    Ambiguous(String, String),
    #[error("{path}: {cause}", path = path.display())]
    Output { path: PathBuf, cause: io::Error },
    #[error("the list of disks that joined: {0}")]
    List(io::Error),
    #[error("{0}")]
    MasterKey(String),
    #[error(
        "the pool has no sealed key of `{0}`: it is not encrypted, or the pool was last in use before keys were kept there; without \
         --master-key it is written as it is stored"
    )]
    NoKey(String),
    #[error("the key of `{volume}` can not be opened with {path}: {cause}", path = .path.display())]
    Sealed { volume: String, path: PathBuf, cause: String },
}

struct Reader(DiskReader);

impl ReadDisk for Reader {
    fn size(&self) -> ByteCount {
        self.0.size()
    }
    fn read(&mut self, offset: ByteCount, len: usize) -> Option<Data> {
        self.0.read(offset, len).ok()
    }
}

/// The disks of a pool that are to be looked at: those that are named, or else those that the node knows and that are there.
pub fn paths(named: &[PathBuf], config: Option<&NodeConfig>) -> Result<Vec<PathBuf>, LookError> {
    let ([], Some(config)) = (named, config) else { return Ok(named.to_vec()) };
    let mut paths = disk_list::paths(config).map_err(LookError::List)?;
    paths.retain(|path| path.exists());
    Ok(paths)
}

fn open(paths: &[PathBuf]) -> Result<Vec<Reader>, LookError> {
    let opened = paths.iter().map(|path| DiskReader::open(path).map(Reader));
    opened.collect::<Result<_, _>>().map_err(|error| match error {
        OpenDiskError::InUse(path) => LookError::InUse(path),
        error => LookError::Disk(error),
    })
}

fn readers(disks: &mut [Reader]) -> Vec<&mut dyn ReadDisk> {
    disks.iter_mut().map(|disk| disk as &mut dyn ReadDisk).collect()
}

/// Says on standard error how far it is, once a second.
fn progress(what: &'static str) -> impl FnMut(Progress) {
    let mut told = Instant::now();
    move |progress| {
        if told.elapsed() > Duration::from_secs(1) {
            told = Instant::now();
            let percent = progress.done.0 * 100 / progress.total.0.max(1);
            eprintln!("{what}: {percent} % of {} MiB", progress.total.0 >> 20);
        }
    }
}

pub fn verify(paths: &[PathBuf], data: bool) -> Result<Verified, LookError> {
    let mut disks = open(paths)?;
    Ok(pollux_store::verify::verify(&mut readers(&mut disks), data, &mut progress("checked")))
}

/// Findings as lines for people, the worst first.
pub fn text_of_verified(verified: &Verified, paths: &[PathBuf]) -> String {
    let mut lines = lines_of(&verified.findings, paths);
    for (code, count) in &verified.counts {
        let told = verified.findings.iter().filter(|finding| finding.code == *code).count() as u64;
        if told < *count {
            lines.push(format!("{}  and {} more of these", code.text(), count - told));
        }
    }
    let pool = verified.pool;
    lines.push(format!(
        "{} disks, {} volumes and snapshots, {} extents; {} MiB used, {} MiB free",
        pool.disks,
        pool.volumes,
        pool.extents,
        pool.used_bytes >> 20,
        pool.free_bytes >> 20
    ));
    if pool.checked_blocks > 0 {
        lines.push(format!("{} MiB of data match their checksums", (pool.checked_blocks * BLOCK_BYTES) >> 20));
    }
    if pool.hot_blocks > 0 {
        lines.push(format!(
            "{} blocks were being written when the pool was last used; they are compared with the other servers",
            pool.hot_blocks
        ));
    }
    lines.push(if verified.findings.is_empty() { "clean".into() } else { "not clean".into() });
    lines.join("\n")
}

fn lines_of(findings: &[Finding], paths: &[PathBuf]) -> Vec<String> {
    let mut sorted: Vec<&Finding> = findings.iter().collect();
    sorted.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    let line = |finding: &&Finding| {
        let disk = finding.disk.and_then(|disk| paths.get(disk)).map(|path| format!("{}: ", path.display()));
        let severity = match finding.severity {
            pollux_store::verify::Severity::Error => "error",
            pollux_store::verify::Severity::Warning => "warning",
        };
        let (code, disk) = (finding.code.text(), disk.unwrap_or_default());
        format!("{code}  {severity}  {disk}{}\n      Hint: {}", finding.what, finding.fix)
    };
    sorted.iter().map(line).collect()
}

/// What a pool's disks tell of it.
#[derive(Serialize)]
pub struct Rescued {
    pub pool: Option<String>,
    pub node: Option<u64>,
    pub groups: BTreeMap<GroupId, Option<Noted>>,
    /// What each group is called: its VM, image or volume. Names may be out of date, and help people only.
    pub owners: BTreeMap<GroupId, String>,
    pub volumes: Vec<NamedVolume>,
    /// Of each group that both pools have: which one is newer.
    pub compared: BTreeMap<GroupId, Newer>,
    pub missing: Vec<String>,
    pub findings: Vec<Finding>,
}

#[derive(Serialize)]
pub struct NamedVolume {
    #[serde(flatten)]
    pub volume: RescuedVolume,
    pub name: Option<String>,
    /// It is encrypted, and its key is sealed under the master key of this name.
    pub master_key: Option<KeyId>,
}

/// A volume was written to a file.
#[derive(Serialize)]
pub struct Exported {
    #[serde(flatten)]
    pub export: Export,
    pub is_encrypted: bool,
    /// It is encrypted, and what was written is plain text.
    pub is_decrypted: bool,
}

/// The names that the pool's disks tell, of volumes whose groups they are.
fn names_of(rescue: &Rescue) -> BTreeMap<GroupId, GroupNames> {
    let notes = rescue.notes();
    names(notes.iter().map(|(note, bytes)| (*note, bytes.as_slice())))
}

fn named_volumes(rescue: &Rescue) -> Vec<NamedVolume> {
    let names = names_of(rescue);
    let keys = sealed_keys(rescue, &names);
    let named = |volume: RescuedVolume| {
        // What is kept of a replica goes by the name that it has with `pollux kept`.
        let kept = Kept::in_volume(volume.volume).map(|kept| kept.to_string());
        let name = || names.get(&volume.group).and_then(|names| names.volumes.get(&volume.volume)).cloned();
        let master_key = keys.get(&volume.volume).and_then(|sealed| sealed.first()).map(|sealed| sealed.master);
        NamedVolume { name: kept.or_else(name), master_key, volume }
    };
    rescue.volumes().into_iter().map(named).collect()
}

/// The keys of volumes as the pool has them: a note's is that of all volumes that share what is stored. Of one volume all are the same
/// key; where a pool was away while keys were sealed anew, not all need be sealed under the same master key.
fn sealed_keys(rescue: &Rescue, names: &BTreeMap<GroupId, GroupNames>) -> BTreeMap<VolumeId, Vec<SealedKey>> {
    let mut keys: BTreeMap<VolumeId, Vec<SealedKey>> = BTreeMap::new();
    for (volume, sealed) in names.values().flat_map(|names| &names.keys) {
        for relative in rescue.relatives(*volume) {
            let of = keys.entry(relative).or_default();
            // Its own first.
            let place = if relative == *volume { 0 } else { of.len() };
            of.insert(place, sealed.clone());
        }
    }
    keys
}

/// Lists what is in a pool; `peer`: the disks of another node's pool, to be compared with.
pub fn rescue(paths: &[PathBuf], peer: &[PathBuf]) -> Result<Rescued, LookError> {
    let mut disks = open(paths)?;
    let rescue = Rescue::of(&mut readers(&mut disks));
    let groups = groups_of(&rescue);
    let mut compared = BTreeMap::new();
    if !peer.is_empty() {
        let other = groups_of(&Rescue::of(&mut readers(&mut open(peer)?)));
        let both = groups.iter().filter_map(|(group, one)| Some((*group, (*one)?, (*other.get(group)?)?)));
        compared = both.map(|(group, one, two)| (group, one.newer(&two))).collect();
    }
    let identity = rescue.identity();
    Ok(Rescued {
        pool: identity.map(|identity| identity.pool.to_string()),
        node: identity.map(|identity| identity.node.0),
        groups,
        owners: names_of(&rescue)
            .into_iter()
            .map(|(group, names)| (group, names.owner))
            .filter(|(_, owner)| !owner.is_empty())
            .collect(),
        volumes: named_volumes(&rescue),
        compared,
        missing: rescue.missing.iter().map(|(disk, path)| format!("{disk}, last seen at {path}")).collect(),
        findings: rescue.findings,
    })
}

fn groups_of(rescue: &Rescue) -> BTreeMap<GroupId, Option<Noted>> {
    let notes = rescue.notes();
    let mut groups: BTreeMap<GroupId, Option<Noted>> =
        rescue.volumes().into_iter().map(|volume| (volume.group, None)).collect();
    groups.extend(notes.iter().filter_map(|(group, note)| Some((*group, Some(noted(*group, note)?)))));
    groups
}

pub fn text_of_rescued(rescued: &Rescued, paths: &[PathBuf]) -> String {
    let mut lines = lines_of(&rescued.findings, paths);
    let node = rescued.node.map_or("?".into(), |node| format!("n{node}"));
    lines.push(format!("pool {} of node {node}", rescued.pool.as_deref().unwrap_or("?")));
    lines.extend(rescued.missing.iter().map(|disk| format!("missing: disk {disk}; what was on it is not listed")));
    for (group, note) in &rescued.groups {
        let standing = match note {
            None => "nothing is noted of it".to_string(),
            Some(Noted { held: None, newest, .. }) => format!("never in sync; knew of {}", stamp(newest)),
            Some(Noted { is_in_sync: true, newest, .. }) => format!("in sync by its newest record, {}", stamp(newest)),
            Some(Noted { held: Some(held), newest, .. }) => {
                format!("stale: in sync up to {}, knew of {}", stamp(held), stamp(newest))
            }
        };
        let owner = rescued.owners.get(group).map(|owner| format!(" `{owner}`")).unwrap_or_default();
        lines.push(format!("group {group}{owner}: {standing}"));
        if let Some(newer) = rescued.compared.get(group) {
            let text = match newer {
                Newer::First => "newer than the other pool's",
                Newer::Second => "older than the other pool's",
                Newer::Neither => "as new as the other pool's",
                Newer::Unclear => "it and the other pool's may each have writes that the other lacks",
            };
            lines.push(format!("  {text}"));
        }
        for NamedVolume { volume, name, master_key } in
            rescued.volumes.iter().filter(|known| known.volume.group == *group)
        {
            let lies_on: Vec<String> = volume.lies_on.iter().map(VolumeId::to_string).collect();
            let on = if lies_on.is_empty() { String::new() } else { format!(", on {}", lies_on.join(", ")) };
            let (size, held) = (volume.size.0 >> 20, volume.extents * 4);
            let name = name.as_ref().map(|name| format!(" `{name}`")).unwrap_or_default();
            let sealed = master_key.map(|key| format!(", encrypted under the master key {key}")).unwrap_or_default();
            lines.push(format!("  {}{name}: {size} MiB, up to {held} MiB of it written{on}{sealed}", volume.volume));
        }
    }
    lines.join("\n")
}

fn stamp(stamp: &pollux_base::Stamp) -> String {
    format!("epoch {} generation {}", stamp.epoch.0, stamp.generation.0)
}

/// Which volume is meant by `v7`, `7` or a name.
fn find<'a>(volumes: &'a [NamedVolume], meant: &str) -> Result<&'a RescuedVolume, LookError> {
    let number = meant.strip_prefix('v').unwrap_or(meant).parse().ok().map(VolumeId);
    if let Some(known) = volumes.iter().find(|known| Some(known.volume.volume) == number) {
        return Ok(&known.volume);
    }
    let named: Vec<&RescuedVolume> =
        volumes.iter().filter(|known| known.name.as_deref() == Some(meant)).map(|known| &known.volume).collect();
    match named.as_slice() {
        [only] => Ok(only),
        [] => Err(LookError::NoVolume(meant.to_owned())),
        several => {
            let numbers: Vec<String> = several.iter().map(|known| known.volume.to_string()).collect();
            Err(LookError::Ambiguous(meant.to_owned(), numbers.join(", ")))
        }
    }
}

/// What decrypts a volume, of which the pool has these keys.
fn cipher(rescue: &Rescue, meant: &str, sealed: &[SealedKey], path: &Path) -> Result<Cipher, LookError> {
    let cluster = rescue.identity().map(|identity| identity.cluster);
    let cluster = cluster.ok_or_else(|| LookError::MasterKey("the pool does not tell its cluster".into()))?;
    let master = MasterKey::read(path, cluster).map_err(|error| LookError::MasterKey(format!("{error:#}")))?;
    let sealed = sealed.iter().find(|sealed| sealed.master == master.id()).or(sealed.first());
    let sealed = sealed.ok_or_else(|| LookError::NoKey(meant.to_owned()))?;
    let failed = |cause| LookError::Sealed { volume: meant.to_owned(), path: path.to_owned(), cause };
    let secret = master.open(sealed).map_err(failed)?;
    Cipher::new(sealed.key, &secret).map_err(|error| failed(error.to_string()))
}

/// Writes a volume's content to a new file, raw and sparse. It is named by its number or its name. Of one that is encrypted that is
/// plain text if the file of the master key is given.
pub fn export(paths: &[PathBuf], meant: &str, to: &Path, master: Option<&Path>) -> Result<Exported, LookError> {
    let mut disks = open(paths)?;
    let mut readers = readers(&mut disks);
    let rescue = Rescue::of(&mut readers);
    let volumes = named_volumes(&rescue);
    let RescuedVolume { volume, size, .. } = *find(&volumes, meant)?;
    let sealed = sealed_keys(&rescue, &names_of(&rescue)).remove(&volume).unwrap_or_default();
    let cipher = master.map(|path| cipher(&rescue, meant, &sealed, path)).transpose()?;
    let output = |cause| LookError::Output { path: to.to_owned(), cause };
    // Never over something that is there: it may be one of the disks.
    let file = OpenOptions::new().write(true).create_new(true).open(to).map_err(output)?;
    file.set_len(size.0).map_err(output)?;
    let mut failed = None;
    let mut write = |offset: ByteCount, bytes: &[u8]| {
        let plain =
            cipher.as_ref().map(|cipher| cipher.decrypt(BlockIndex(offset.0 / BLOCK_BYTES), &Data::copy_of(bytes)));
        failed = file.write_all_at(plain.as_ref().map_or(bytes, Data::as_slice), offset.0).err();
        failed.is_none()
    };
    let export = rescue.export(&mut readers, volume, &mut write, &mut progress("exported"));
    let export = export.ok_or_else(|| LookError::NoVolume(meant.to_owned()))?;
    match failed.map_or_else(|| file.sync_all(), Err) {
        Ok(()) => Ok(Exported { export, is_encrypted: !sealed.is_empty(), is_decrypted: cipher.is_some() }),
        Err(cause) => Err(output(cause)),
    }
}

pub fn text_of_export(exported: &Exported, volume: &str, to: &Path) -> String {
    let export = &exported.export;
    let mut lines: Vec<String> = export.bad.iter().map(|range| format!("lost: {}", bytes(*range))).collect();
    if export.is_incomplete {
        lines.push("a disk is missing: what was on it reads as zeros".into());
    }
    match (exported.is_encrypted, exported.is_decrypted) {
        (_, true) => lines.push("it was encrypted; what is written is plain text".into()),
        (true, false) => {
            lines.push("it is encrypted, and so is what is written: with --master-key FILE it is plain text".into())
        }
        (false, false) => {}
    }
    let mib = |blocks: u64| (blocks * BLOCK_BYTES) >> 20;
    lines.push(format!(
        "{volume} is in {}: {} MiB match their checksums, {} MiB were being written at the end, {} blocks are lost",
        to.display(),
        mib(export.blocks),
        mib(export.hot_blocks),
        export.bad.iter().map(|range| range.count.0).sum::<u64>()
    ));
    lines.join("\n")
}

fn bytes(range: BlockRange) -> String {
    format!("bytes {} to {}", range.start.bytes().0, range.end().bytes().0)
}
