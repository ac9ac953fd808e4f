//! Batches of simulator seeds, in parallel, and the replay of one.

use anyhow::{Context, Result, bail};
use pollux_sim::{Counts, Failure, Outcome, Sabotage, Scenario, Trace, sabotage, scenario};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// A batch that fails so often has told enough.
const FAILURES_MAX: usize = 20;

#[derive(clap::Args)]
pub struct SimArgs {
    /// How many seeds, from `--seed` on.
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print every step. With one seed only.
    #[arg(long)]
    trace: bool,
    /// Run the named scenarios whose name contains this, instead of those that the seeds stand for.
    #[arg(long)]
    scenario: Option<String>,
    /// Threads; by default one per processor.
    #[arg(long)]
    jobs: Option<usize>,
    /// Put in a fault that Pollux does not promise to survive, to see that it is noticed (a name such as `AckEarly`).
    #[arg(long)]
    sabotage: Option<String>,
    /// Go on after many failures.
    #[arg(long)]
    keep_going: bool,
}

pub fn sim(args: &SimArgs) -> Result<()> {
    let sabotage = match &args.sabotage {
        None => None,
        Some(name) => Some(
            *sabotage::ALL
                .iter()
                .find(|sabotage| format!("{sabotage:?}") == *name)
                .with_context(|| format!("no sabotage `{name}`; there are {:?}", sabotage::ALL))?,
        ),
    };
    if args.trace {
        if args.seeds != 1 {
            bail!("--trace shows one seed; choose it with --seed");
        }
        let mut chosen = scenarios(args, args.seed, sabotage);
        return match (chosen.pop(), chosen.is_empty()) {
            (Some(scenario), true) => replay(scenario),
            (None, _) => bail!("no scenario has such a name"),
            (Some(_), false) => bail!("--trace shows one scenario; name it in full"),
        };
    }
    // A panic of a core is a failure of its seed, told with it.
    std::panic::set_hook(Box::new(|_| {}));
    let jobs = args.jobs.or_else(|| std::thread::available_parallelism().ok().map(usize::from)).unwrap_or(1);
    let began = Instant::now();
    let next = AtomicU64::new(args.seed);
    let end = args.seed.saturating_add(args.seeds);
    let results = Mutex::new(Results::default());
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        return;
                    }
                    for scenario in scenarios(args, seed, sabotage) {
                        let name = scenario.name.clone();
                        let outcome = scenario.run(Trace::Off);
                        let mut results = results.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                        results.add(&outcome);
                        if let Some(failure) = outcome.failure {
                            println!("{name}, seed {seed}: {} at {:?}: {}", failure.rule, failure.at, failure.text);
                            results.failures.push((seed, failure));
                            if !args.keep_going && results.failures.len() >= FAILURES_MAX {
                                next.store(end, Ordering::Relaxed);
                            }
                        }
                    }
                }
            });
        }
    });
    let results = results.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let counts = &results.counts;
    println!(
        "sim: {} seeds, {:.0} s of virtual time in {:.1} s, {} steps; {} writes acknowledged, {} reads, {} records, {} runs, \
         {} grants, {} fences, {} kills by guards, {} faults, {} snapshots, {} rollbacks, {} clones, {} changes of disks, {} disks lost",
        results.seeds,
        results.virtual_seconds,
        began.elapsed().as_secs_f64(),
        results.steps,
        counts.writes_acked,
        counts.reads,
        counts.records,
        counts.runs,
        counts.grants,
        counts.fences,
        counts.kills,
        counts.faults,
        counts.snapshots,
        counts.rollbacks,
        counts.clones,
        counts.disk_changes,
        counts.disks_lost,
    );
    let mut by_rule: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for (seed, failure) in &results.failures {
        by_rule.entry(&failure.rule).or_default().push(*seed);
    }
    for (rule, seeds) in &by_rule {
        println!("  {rule}: {} seeds: {:?}", seeds.len(), &seeds[..seeds.len().min(20)]);
    }
    match results.failures.iter().map(|(seed, _)| seed).min() {
        None => Ok(()),
        Some(seed) => {
            bail!("{} seeds failed; see one with `cargo xtask sim --seed {seed} --trace`", results.failures.len())
        }
    }
}

#[derive(Default)]
struct Results {
    seeds: u64,
    steps: u64,
    virtual_seconds: f64,
    counts: Counts,
    failures: Vec<(u64, Failure)>,
}

impl Results {
    fn add(&mut self, outcome: &Outcome) {
        self.seeds += 1;
        self.steps += outcome.steps;
        self.virtual_seconds += outcome.virtual_time.as_secs_f64();
        let (own, counts) = (&mut self.counts, &outcome.counts);
        own.writes_acked += counts.writes_acked;
        own.reads += counts.reads;
        own.flushes += counts.flushes;
        own.records += counts.records;
        own.runs += counts.runs;
        own.kills += counts.kills;
        own.fences += counts.fences;
        own.grants += counts.grants;
        own.faults += counts.faults;
        own.snapshots += counts.snapshots;
        own.rollbacks += counts.rollbacks;
        own.clones += counts.clones;
        own.disk_changes += counts.disk_changes;
        own.disks_lost += counts.disks_lost;
    }
}

/// What this seed is to run.
fn scenarios(args: &SimArgs, seed: u64, sabotage: Option<Sabotage>) -> Vec<Scenario> {
    match &args.scenario {
        None => vec![Scenario::of_seed(seed, sabotage)],
        Some(part) => {
            let mut named = scenario::named(seed);
            named.retain(|scenario| scenario.name.contains(part));
            named.iter_mut().for_each(|scenario| scenario.settings.sabotage = sabotage);
            named
        }
    }
}

fn replay(scenario: Scenario) -> Result<()> {
    let name = scenario.name.clone();
    let outcome = scenario.run(Trace::Print(Box::new(|line| println!("{line}"))));
    println!("{name}: {} steps, {:?} of virtual time, {:?}", outcome.steps, outcome.virtual_time, outcome.counts);
    match outcome.failure {
        None => Ok(()),
        Some(failure) => bail!("{} at {:?}: {}", failure.rule, failure.at, failure.text),
    }
}
