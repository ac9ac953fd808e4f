//! The tables that are printed.

use super::idle::Idle;
use super::quiet::Quiet;
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

pub fn print_memory(before: [f64; 2], after: [f64; 2]) {
    println!("\n{:<44} {:>9} {:>9}", "memory of blockd, MiB", "primary", "secondary");
    println!("  {:<42} {:>9.1} {:>9.1}", "pool of 1 TiB, empty", before[0], before[1]);
    println!("  {:<42} {:>9.1} {:>9.1}", "volume of 1 TiB, every extent mapped", after[0], after[1]);
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
