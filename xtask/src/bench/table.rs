//! The tables that are printed.

use super::client::Run;
use super::crash::Crash;
use super::idle::Idle;
use super::quiet::Quiet;
use super::resync::{Case, Resync};
use super::{Figures, Row};

/// What a line tells, and of which figure.
type Line = (&'static str, fn(&Figures) -> f64);

/// Medians of everybody who was measured, and the medians of the ratios of the last to each other one, by neighbouring runs.
pub fn print(row: &Row) {
    print!("\n{:<44}", row.name);
    let Some(((last, ours), others)) = row.runs.split_last() else { return };
    for (name, _) in &row.runs {
        print!(" {name:>9}");
    }
    for (name, _) in others {
        print!(" {:>15}", format!("{last}/{name}"));
    }
    println!();
    let throughput: Line = if row.is_stream { ("MiB/s", |f| f.mib_per_s) } else { ("IOPS", |f| f.iops) };
    let lines: [Line; 5] = [
        throughput,
        ("p50, us", |f| f.p50_us),
        ("p99, us", |f| f.p99_us),
        ("server CPU, us per I/O", |f| f.server_us_per_io),
        ("client CPU, us per I/O", |f| f.client_us_per_io),
    ];
    for (what, of) in lines {
        print!("  {what:<42}");
        for (_, runs) in &row.runs {
            let value = median(runs.iter().map(of));
            if value < 1000.0 { print!(" {value:>9.1}") } else { print!(" {value:>9.0}") }
        }
        for (_, theirs) in others {
            let ratios = ours.iter().zip(theirs).map(|(ours, theirs)| of(ours) / of(theirs).max(f64::EPSILON));
            print!(" {:>15.2}", median(ratios));
        }
        println!();
    }
}

pub fn printed(row: Row) -> Row {
    print(&row);
    row
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

pub fn print_quiet(quiet: &Quiet) {
    println!("\n{:<44} {:>9} {:>9}", "blockd with nothing to do", "primary", "secondary");
    let lines = [
        ("CPU, % of one", quiet.cpu_percent),
        ("wake-ups/s", quiet.wakeups_per_s),
        ("sent to the peer, bytes/s", quiet.bytes_per_s),
        ("memory, MiB", quiet.memory_mib),
    ];
    for (what, [primary, secondary]) in lines {
        println!("  {what:<42} {primary:>9.2} {secondary:>9.2}");
    }
}

/// `floor`: MiB per second of a sequential write there.
pub fn print_resync_head(name: &str, floor: Option<f64>) {
    print!("\n{name}");
    floor.iter().for_each(|rate| print!(" (the floor writes {rate:.0} MiB/s)"));
    println!(
        "\n  {:<36} {:>9} {:>9} {:>9} {:>9} {:>15} {:>15}",
        "", "MiB", "start, s", "MiB/s", "traffic", "guest p99, us", "guest IOPS"
    );
}

pub fn print_resync(case: &Case, resync: &Resync) {
    let pair = |figures: Option<[f64; 2]>| figures.map_or("-".to_owned(), |[was, is]| format!("{was:.0} > {is:.0}"));
    println!(
        "  {:<36} {:>9} {:>9.1} {:>9.0} {:>9.3} {:>15} {:>15}",
        case.name,
        resync.changed_bytes >> 20,
        resync.start_seconds,
        resync.mib_per_s(),
        resync.traffic_ratio(),
        pair(resync.p99_us),
        pair(resync.iops)
    );
}

pub fn print_crash_head(name: &str, wide_mib: u64) {
    println!("\n{name}, {wide_mib} MiB");
    let heads = ["write, ms", "read, ms", "settled, s", "writes/s", "p99, ms", "reads/s", "p99, ms"];
    println!("  {:<28} {}", "until the first", heads.map(|head| format!("{head:>10}")).join(" "));
}

pub fn print_crash(name: &str, crash: &Crash) {
    let Crash { write_ms, read_ms, iops, p99_ms, settled_s } = crash;
    println!(
        "  {name:<28} {write_ms:>10.0} {read_ms:>10.0} {settled_s:>10.1} {:>10.0} {:>10.1} {:>10.0} {:>10.1}",
        iops[0], p99_ms[0], iops[1], p99_ms[1]
    );
}

pub fn print_memory(size_mib: u64, lines: [(&str, [f64; 2]); 3], run: &Run) {
    let slowest = run.latencies.last().map_or(0.0, |ns| f64::from(*ns) / 1e6);
    let (extents, seconds) = (run.latencies.len(), run.elapsed.as_secs_f64());
    println!(
        "\nA volume of {size_mib} MiB, {extents} extents written in {seconds:.0} s, the slowest write {slowest:.0} ms"
    );
    println!("{:<44} {:>9} {:>9}", "memory of blockd, MiB", "primary", "secondary");
    for (what, nodes) in lines {
        println!("  {what:<42} {:>9.1} {:>9.1}", nodes[0], nodes[1]);
    }
}

pub fn print_idle(idle: &Idle) {
    println!("\n{:<16} {:>4} {:>8} {:>12} {:>10}", "idle, one volume", "node", "CPU %", "wake-ups/s", "RSS MiB");
    for daemon in &idle.daemons {
        println!(
            "{:<16} {:>4} {:>8.2} {:>12.1} {:>10.1}",
            daemon.program, daemon.node, daemon.cpu_percent, daemon.wakeups_per_s, daemon.resident_mib
        );
    }
    println!("\n{:<16} {:>4} {:>8} {:>12}", "idle, sent on", "node", "bytes/s", "packets/s");
    for cable in &idle.cables {
        println!("{:<16} {:>4} {:>8.0} {:>12.1}", cable.network, cable.node, cable.bytes_per_s, cable.packets_per_s);
    }
}
