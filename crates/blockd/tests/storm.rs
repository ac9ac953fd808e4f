//! SIGKILL storms: data planes die on alternating sides under clients that write and verify without a break. Clients see
//! pauses, never an error; nothing is lost, and both replicas hold the same in the end.
//!
//! The drill: `STORM_KILLS=20 cargo test -p pollux-blockd --test storm -- --nocapture`

mod load;
mod site;

use load::{Front, Load};
use pollux_base::{Order, Report};
use site::{Node, Outcome, PATIENCE, Site, exports, group, qemu_io};
use std::time::Instant;

/// Kills unless the environment says otherwise: some on each side.
const KILLS: u64 = 6;

/// The daemon dies and is started anew, as its supervisor would, and is ordered what held before.
fn bring_back(site: &Site, node: Node) -> Outcome<Node> {
    let number = node.config.node.0;
    node.kill()?;
    let mut node = site.start(number)?;
    node.order(&group(1, 1, &[1, 2]))?;
    node.order(&exports())?;
    Ok(node)
}

#[test]
fn clients_see_pauses_and_nothing_else_when_data_planes_are_killed_on_alternating_sides() -> Outcome {
    let kills = match std::env::var("STORM_KILLS") {
        Ok(text) => text.parse().map_err(|_| format!("STORM_KILLS={text} is not a number"))?,
        Err(_) => KILLS,
    };
    let site = Site::formatted()?;
    let (mut first, mut second) = (site.start(1)?, site.start(2)?);
    for node in [&mut first, &mut second] {
        node.order(&group(1, 1, &[1, 2]))?;
        node.order(&exports())?;
    }
    first.wait_until_serving(1)?;
    let front = Front::start(&site, &first)?;
    let load = Load::start(&front.uri());
    let mut pauses = Vec::new();
    for kill in 0..kills {
        let start = Instant::now();
        let is_first = kill % 2 == 0;
        if is_first {
            first = bring_back(&site, first)?;
        } else {
            second = bring_back(&site, second)?;
        }
        // What is written now is on both again: this needs the one that came back.
        let place = format!("write -P {} {}k 4k", kill % 200 + 1, 32 * 1024 + 4 * kill);
        qemu_io(&front.uri(), &[&place, "flush"])?;
        pauses.push((if is_first { "primary" } else { "secondary" }, start.elapsed()));
    }
    let rounds = load.end()?;
    println!("{kills} kills; from each until a write and a flush were done after it: {pauses:?}; fio: {rounds:?}");
    assert!(rounds.iter().all(|rounds| rounds.count > 0 && rounds.longest < PATIENCE), "{rounds:?}");

    // Nothing that was acknowledged is missing on the other side.
    load::replicas_hold_the_same(&site, front, first, &mut second)?;
    second.order(&Order::ReportAll)?;
    second.wait_for("a report", |report| matches!(report, Report::Group(_)))?;
    Ok(())
}
