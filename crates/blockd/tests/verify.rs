//! The metadata of a pool is verified beside real clients that write and verify without a break: never a false alarm, and what is
//! damaged beneath the running process is found.

mod load;
mod site;

use load::{Front, Load};
use pollux_base::pool::VerifyReport;
use pollux_base::{Order, Report};
use site::{Node, Outcome, Site, exports, group, rot};

/// Runs in a row; each takes a new look at everything.
const RUNS: u64 = 40;

fn verify(node: &mut Node, id: u64) -> Outcome<VerifyReport> {
    node.order(&Order::Verify { id })?;
    let is_it = |report: &Report| matches!(report, Report::Verified(report) if report.id == id && report.is_done);
    match node.wait_for("verified", is_it)? {
        Report::Verified(report) => Ok(*report),
        _ => Err("only such reports were wanted".into()),
    }
}

#[test]
fn a_pool_is_verified_under_load_without_a_false_alarm_and_damage_is_found() -> Outcome {
    let site = Site::formatted()?;
    let mut nodes = [site.start(1)?, site.start(2)?];
    for node in &mut nodes {
        node.order(&group(1, 1, &[1, 2]))?;
        node.order(&exports())?;
    }
    let [one, two] = &mut nodes;
    one.wait_until_serving(1)?;
    let front = Front::start(&site, one)?;
    let load = Load::start(&front.uri());
    for run in 1..=RUNS {
        for node in [&mut *one, &mut *two] {
            let report = verify(node, run)?;
            assert_eq!((report.findings, report.failed), (vec![], None), "run {run}");
            assert_eq!((report.disks, report.volumes), (1, 1), "all of it was looked at");
        }
    }
    // What nobody writes anew: a copy of the superblock, and one of the catalog.
    let pool = &two.config.pool.path.clone();
    rot(pool, (1 << 20) + 100)?;
    rot(pool, (3 << 20) + 100)?;
    let report = verify(two, RUNS + 1)?;
    let codes: Vec<&str> = report.findings.iter().map(|finding| finding.code.as_str()).collect();
    assert_eq!(codes, ["V001", "V020"]);
    assert!(report.findings.iter().all(|finding| finding.disk == pool.display().to_string()), "{report:?}");
    assert_eq!(verify(one, RUNS + 1)?.findings, [], "the other node's pool is sound");
    let rounds = load.end()?;
    assert!(rounds.iter().all(|rounds| rounds.count > 0), "{rounds:?}");
    drop(front);
    for node in nodes {
        assert_eq!(node.terminate()?, Some(0));
    }
    // At rest what a look from outside says is the same.
    let off = site.blockd(2, &["verify", "--json"])?;
    let json: serde_json::Value = serde_json::from_slice(&off.stdout)?;
    assert_eq!((&json["counts"]["V001"], &json["counts"]["V020"]), (&1.into(), &1.into()), "{json}");
    Ok(())
}
