//! The tables that are printed.

use super::Row;
use super::fio::Figures;
use super::idle::Idle;

/// One line of the comparison: medians of either side, and the median of the ratios of neighbouring runs.
pub fn print_job(row: &Row, first: bool) {
    if first {
        println!(
            "{:<28} | {:^30} | {:^25} | {:^25} | {:^25}",
            "median of the runs", "throughput", "p50, us", "p99, us", "CPU us per I/O"
        );
        let sides = format!("{:>8} {:>8} {:>7}", "pollux", "q-nbd", "ratio");
        println!("{:<28} | {:>8} {:>8} {:>12} | {sides} | {sides} | {sides}", "", "pollux", "q-nbd", "ratio");
    }
    let is_stream = row.job.starts_with("1m");
    let (unit, throughput): (_, fn(&Figures) -> f64) =
        if is_stream { ("MiB/s", |f| f.mib_per_s) } else { ("IOPS ", |f| f.iops) };
    let (ours, theirs, ratio) = compared(row, throughput);
    print!("{:<28} | {ours:>8.0} {theirs:>8.0} {unit} {ratio:>6.2}", row.job);
    for of in [(|f: &Figures| f.p50_us) as fn(&Figures) -> f64, |f| f.p99_us, |f| f.cpu_us_per_io] {
        let (ours, theirs, ratio) = compared(row, of);
        print!(" | {ours:>8.0} {theirs:>8.0} {ratio:>7.2}");
    }
    println!();
}

fn compared(row: &Row, of: fn(&Figures) -> f64) -> (f64, f64, f64) {
    let pairs = row.pollux.iter().zip(&row.qemu_nbd);
    (
        median(row.pollux.iter().map(of)),
        median(row.qemu_nbd.iter().map(of)),
        median(pairs.map(|(ours, theirs)| of(ours) / of(theirs).max(f64::EPSILON))),
    )
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
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
