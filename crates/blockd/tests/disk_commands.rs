//! Disks of a pool by command, with real processes: they join and leave under load and through SIGKILL, and one that fails takes
//! nothing with it that the peer does not give back.

mod load;
mod site;

use load::{Front, Load};
use pollux_base::order::DiskCommand;
use pollux_base::pool::{DiskReport, DiskState};
use pollux_base::{DiskId, NodeId, Order, Report};
use site::{Node, Outcome, PATIENCE, Site, VOLUME_SIZE, exports, group, key, qemu_io, run, text};
use std::fs::File;
use std::path::{Path, PathBuf};

const DISK_SIZE: u64 = 512 << 20;

/// Orders a change and gives its answer.
fn change(node: &mut Node, id: u64, change: DiskCommand) -> Outcome<Result<(), String>> {
    node.order(&Order::Disk { id, change })?;
    let is_it = |report: &Report| matches!(report, Report::DiskChanged { id: of, .. } if *of == id);
    match node.wait_for("the end of a change of disks", is_it)? {
        Report::DiskChanged { result, .. } => Ok(result),
        _ => Err("only the change's end was wanted".into()),
    }
}

fn add(path: &Path) -> DiskCommand {
    DiskCommand::Add { path: path.to_owned(), may_overwrite: false }
}

/// A file for one more disk of the node.
fn new_disk(site: &Site, node: u64, name: &str) -> Outcome<PathBuf> {
    let path = site.configs[&node].pool.path.with_file_name(name);
    File::create(&path)?.set_len(DISK_SIZE)?;
    Ok(path)
}

/// Waits until the node's disks are as wanted.
fn wait_for_disks(node: &mut Node, what: &str, is_wanted: impl Fn(&[DiskReport]) -> bool) -> Outcome<Vec<DiskReport>> {
    node.order(&Order::ReportAll)?;
    match node.wait_for(what, |report| matches!(report, Report::Pool(pool) if is_wanted(&pool.disks)))? {
        Report::Pool(pool) => Ok(pool.disks),
        _ => Err("only a pool was wanted".into()),
    }
}

fn at<'a>(disks: &'a [DiskReport], path: &Path) -> Option<&'a DiskReport> {
    disks.iter().find(|disk| Path::new(&disk.path) == path)
}

fn id_of(disks: &[DiskReport], path: &Path) -> DiskId {
    at(disks, path).unwrap_or_else(|| panic!("no disk at {}: {disks:?}", path.display())).disk
}

/// Both nodes serve the record again, after one of them was started anew.
fn ordered(node: &mut Node, generation: u64, in_sync: &[u64]) -> Outcome {
    node.order(&group(generation, 1, in_sync))?;
    node.order(&exports())
}

fn mirrored(site: &Site) -> Outcome<(Node, Node)> {
    let (mut first, mut second) = (site.start(1)?, site.start(2)?);
    for node in [&mut first, &mut second] {
        ordered(node, 1, &[1, 2])?;
    }
    first.wait_until_serving(1)?;
    Ok((first, second))
}

/// Dies as by SIGKILL in the middle of whatever it does, and comes back.
fn killed(site: &Site, node: Node) -> Outcome<Node> {
    let number = node.config.node.0;
    node.kill()?;
    let mut node = site.start(number)?;
    ordered(&mut node, 1, &[1, 2])?;
    Ok(node)
}

/// The second node is primary, and brings the replica on the first one up to date. Gives the record's generation.
fn brought_up_to_date(first: &mut Node, second: &mut Node, generation: u64) -> Outcome<u64> {
    let order = |node: &mut Node, generation, in_sync: &[u64]| node.order(&group(generation, 2, in_sync));
    order(first, generation, &[2])?;
    order(second, generation, &[2])?;
    second.wait_for("the replica is current", |report| {
        matches!(report, Report::ReplicaCurrent { node: NodeId(1), .. })
    })?;
    order(first, generation + 1, &[1, 2])?;
    order(second, generation + 1, &[1, 2])?;
    second.wait_until_serving(generation + 1)?;
    Ok(generation + 1)
}

/// What the first node holds by itself: the second is killed, and nobody else could help out.
fn bytes_of_first_alone(site: &Site, first: &mut Node, second: Node, generation: u64) -> Outcome<Vec<u8>> {
    second.kill()?;
    first.order(&group(generation, 1, &[1]))?;
    first.order(&Order::Fenced { node: NodeId(2) })?;
    first.order(&exports())?;
    first.wait_until_serving(generation)?;
    let file = site.dir.path().join("alone");
    run("nbdcopy", &[&first.uri(), text(&file)])?;
    Ok(std::fs::read(&file)?)
}

#[test]
fn disks_join_and_leave_under_load_and_through_sigkill_and_nothing_is_lost() -> Outcome {
    let site = Site::formatted()?;
    let (mut first, mut second) = mirrored(&site)?;
    let front = Front::start(&site, &first)?;
    qemu_io(&front.uri(), &["write -P 7 0 64M", "flush"])?;
    let load = Load::start(&front.uri());

    let original = site.configs[&1].pool.path.clone();
    let joined = new_disk(&site, 1, "joined")?;
    assert_eq!(change(&mut first, 1, add(&joined))?, Ok(()));
    let other = new_disk(&site, 2, "joined")?;
    assert_eq!(change(&mut second, 1, add(&other))?, Ok(()));
    // It is found again, and nobody has edited the configuration.
    first = killed(&site, first)?;
    let disks = wait_for_disks(&mut first, "two healthy disks", |disks| {
        disks.len() == 2 && disks.iter().all(|disk| disk.state == DiskState::Healthy)
    })?;
    let (original_id, joined_id) = (id_of(&disks, &original), id_of(&disks, &joined));

    // The disk that the pool was made with is given up, and the process dies meanwhile.
    first.wait_until_serving(1)?;
    assert_eq!(change(&mut first, 2, DiskCommand::Drain { disk: original_id })?, Ok(()));
    let refused = change(&mut first, 3, DiskCommand::Remove { disk: original_id })?;
    assert!(refused.as_ref().is_err_and(|reason| reason.contains("wait until it is drained")), "{refused:?}");
    first = killed(&site, first)?;
    second = killed(&site, second)?;
    let is_drained = |disks: &[DiskReport]| at(disks, &original).is_some_and(|disk| disk.state == DiskState::Drained);
    let disks = wait_for_disks(&mut first, "a drained disk", is_drained)?;
    assert_eq!(at(&disks, &original).map(|disk| disk.extents), Some(0));
    assert!(at(&disks, &joined).is_some_and(|disk| disk.extents >= VOLUME_SIZE >> 22), "{disks:?}");
    assert_eq!(change(&mut first, 4, DiskCommand::Remove { disk: original_id })?, Ok(()));
    // It is closed: whoever wants it may have it. And the pool is found without it.
    pollux_host::disk::Disk::open(&original)?;
    first = killed(&site, first)?;
    let disks = wait_for_disks(&mut first, "one disk", |disks| disks.len() == 1)?;
    assert_eq!(disks[0].disk, joined_id);
    first.wait_until_serving(1)?;
    std::fs::remove_file(&original)?;
    first = killed(&site, first)?;
    first.wait_until_serving(1)?;

    let rounds = load.end()?;
    assert!(rounds.iter().all(|rounds| rounds.count > 0 && rounds.longest < PATIENCE), "{rounds:?}");
    load::replicas_hold_the_same(&site, front, first, &mut second)?;
    Ok(())
}

/// Node 1 with a second disk, which holds a part of a volume that is full of known bytes.
fn with_a_second_disk(site: &Site) -> Outcome<(Node, Node, PathBuf, Vec<u8>)> {
    let (mut first, second) = mirrored(site)?;
    let disk = new_disk(site, 1, "second")?;
    assert_eq!(change(&mut first, 1, add(&disk))?, Ok(()));
    let bytes: Vec<u8> = (0..VOLUME_SIZE / 8).flat_map(|word| (word.wrapping_mul(0x9e37_79b9)).to_le_bytes()).collect();
    let source = site.dir.path().join("source");
    std::fs::write(&source, &bytes)?;
    run("nbdcopy", &["--flush", text(&source), &first.uri()])?;
    wait_for_disks(&mut first, "data on both disks", |disks| disks.iter().all(|disk| disk.extents > 4))?;
    Ok((first, second, disk, bytes))
}

/// Reads until the daemon hangs up, which it does to open the pool without the failed disk; then connects anew.
fn gone_on_without_the_disk(first: &mut Node) -> Outcome {
    let _ = first.wait_for("nothing", |_| false);
    first.hang_up();
    first.take_up()?;
    assert!(first.log().contains("going on without it"), "{}", first.log());
    first.order(&key(NodeId(1), 1))
}

/// The disk loses all it had: whoever reads it gets nothing.
fn fail(disk: &Path) -> Outcome {
    Ok(std::fs::OpenOptions::new().write(true).open(disk)?.set_len(0)?)
}

#[test]
fn a_disk_that_fails_loses_its_own_extents_only_and_the_peer_gives_them_back() -> Outcome {
    let site = Site::formatted()?;
    let (mut first, mut second, disk, bytes) = with_a_second_disk(&site)?;
    let front = Front::start(&site, &first)?;
    fail(&disk)?;
    // A client that reads everything sees no error.
    let read = std::thread::spawn({
        let (uri, copy) = (front.uri(), site.dir.path().join("copy"));
        move || run("nbdcopy", &[&uri, text(&copy)]).map(|_| copy).map_err(|cause| cause.to_string())
    });
    gone_on_without_the_disk(&mut first)?;
    // The log goes on without the replica here, and the primary with the other's.
    for node in [&mut second, &mut first] {
        ordered(node, 2, &[2])?;
    }
    let disks = wait_for_disks(&mut first, "a failed disk", |disks| disks.len() == 2)?;
    assert_eq!(at(&disks, &disk).map(|disk| disk.state), Some(DiskState::Failed));
    let rest = disks.iter().find(|disk| disk.state == DiskState::Healthy).expect("the other works");
    assert!(rest.extents > 4, "{disks:?}");
    let copy = read.join().map_err(|_| "the reader has panicked")??;
    assert!(std::fs::read(copy)? == bytes, "the client read something else");
    drop(front);

    // It serves from the other's replica only for the sake of its client; then who has the data takes over.
    let generation = brought_up_to_date(&mut first, &mut second, 3)?;
    let disks = wait_for_disks(&mut first, "a failed disk", |disks| disks.len() == 2)?;
    let failed = id_of(&disks, &disk);
    assert_eq!(change(&mut first, 9, DiskCommand::Remove { disk: failed })?, Ok(()));
    wait_for_disks(&mut first, "one disk", |disks| disks.len() == 1)?;
    assert!(bytes_of_first_alone(&site, &mut first, second, generation + 1)? == bytes, "not all was given back");
    Ok(())
}

#[test]
fn a_disk_that_rots_counts_its_errors_and_is_healed_from_the_peer() -> Outcome {
    let site = Site::formatted()?;
    let (mut first, second, disk, bytes) = with_a_second_disk(&site)?;
    // All that it holds becomes zeros under it, but for the metadata at both of its ends.
    run("fallocate", &["--punch-hole", "--offset", "16MiB", "--length", "448MiB", text(&disk)])?;
    let copy = site.dir.path().join("copy");
    run("nbdcopy", &[&first.uri(), text(&copy)])?;
    assert!(std::fs::read(copy)? == bytes, "the client read something else");
    let has_errors = |disks: &[DiskReport]| at(disks, &disk).is_some_and(|disk| disk.checksum_errors > 0);
    let disks = wait_for_disks(&mut first, "checksum errors", has_errors)?;
    assert!(disks.iter().all(|disk| disk.state == DiskState::Healthy), "{disks:?}");
    assert!(disks.iter().filter(|disk| disk.checksum_errors > 0).count() == 1, "only that disk: {disks:?}");
    assert!(bytes_of_first_alone(&site, &mut first, second, 2)? == bytes, "not all was healed");
    Ok(())
}

#[test]
fn a_disk_that_is_missing_for_good_is_let_go_and_its_extents_come_from_the_peer() -> Outcome {
    let site = Site::formatted()?;
    let (mut first, mut second, disk, bytes) = with_a_second_disk(&site)?;
    first.kill()?;
    std::fs::remove_file(&disk)?;
    second.order(&Order::ReportAll)?;
    first = site.start(1)?;
    first.order(&Order::ReportAll)?;
    let disks = wait_for_disks(&mut first, "a missing disk", |disks| {
        at(disks, &disk).is_some_and(|disk| disk.state == DiskState::Missing)
    })?;
    let missing = id_of(&disks, &disk);
    let refused = change(&mut first, 5, DiskCommand::Remove { disk: missing })?;
    assert!(refused.as_ref().is_err_and(|reason| reason.contains("--lost")), "{refused:?}");
    let refused = change(&mut first, 6, add(&disk))?;
    assert!(refused.as_ref().is_err_and(|reason| reason.contains("does not exist")), "{refused:?}");
    // It dies before it has answered, or after; then it is asked again.
    first.order(&Order::Disk { id: 7, change: DiskCommand::LetGo { disk: missing } })?;
    first.kill()?;
    first = site.start(1)?;
    first.order(&Order::ReportAll)?;
    let is_told = |report: &Report| matches!(report, Report::Pool(_));
    let Report::Pool(pool) = first.wait_for("a pool", is_told)? else { return Err("no pool".into()) };
    if pool.failed.is_some() {
        assert_eq!(change(&mut first, 8, DiskCommand::LetGo { disk: missing })?, Ok(()));
        gone_on_without_the_disk(&mut first)?;
    }
    let generation = brought_up_to_date(&mut first, &mut second, 2)?;
    assert_eq!(wait_for_disks(&mut first, "one disk", |disks| disks.len() == 1)?[0].state, DiskState::Healthy);
    assert!(bytes_of_first_alone(&site, &mut first, second, generation + 1)? == bytes, "not all was given back");
    Ok(())
}

#[test]
fn what_cannot_be_a_disk_of_the_pool_is_refused_by_name() -> Outcome {
    let site = Site::formatted()?;
    let (mut first, _second) = mirrored(&site)?;
    let original = site.configs[&1].pool.path.clone();
    let theirs = site.configs[&2].pool.path.clone();
    let unopened = original.with_file_name("other");
    std::fs::copy(&theirs, &unopened)?;
    let (small, used) = (new_disk(&site, 1, "small")?, new_disk(&site, 1, "used")?);
    std::fs::OpenOptions::new().write(true).open(&small)?.set_len(1 << 20)?;
    std::fs::OpenOptions::new().write(true).open(&used)?.set_len(0)?;
    std::fs::write(&used, vec![7; 4096])?;
    std::fs::OpenOptions::new().write(true).open(&used)?.set_len(DISK_SIZE)?;
    let cases: [(PathBuf, &str); 8] = [
        (original.clone(), "is in use"),
        (theirs, "is in use"),
        (unopened, "belongs to pool"),
        (small, "too small"),
        (used.clone(), "not empty"),
        (original.with_file_name("absent"), "does not exist"),
        (original.with_file_name(""), "neither a plain file nor a block device"),
        ("relative".into(), "not an absolute path"),
    ];
    for ((path, reason), id) in cases.into_iter().zip(10..) {
        let refused = change(&mut first, id, add(&path))?;
        assert!(refused.as_ref().is_err_and(|text| text.contains(reason)), "{}: {refused:?}", path.display());
    }
    let only = wait_for_disks(&mut first, "one disk", |disks| disks.len() == 1)?[0].disk;
    let refused = change(&mut first, 30, DiskCommand::Drain { disk: only })?;
    assert!(refused.as_ref().is_err_and(|reason| reason.contains("only disk")), "{refused:?}");
    assert_eq!(change(&mut first, 31, DiskCommand::Add { path: used, may_overwrite: true })?, Ok(()));
    // A list that nothing of is true of is no reason not to start.
    let list = site.configs[&1].state_dir.join("pool-disks.json");
    assert!(std::fs::read_to_string(&list)?.contains("used"));
    first = killed(&site, first)?;
    first.wait_until_serving(1)?;
    wait_for_disks(&mut first, "two disks", |disks| disks.len() == 2)?;
    Ok(())
}
