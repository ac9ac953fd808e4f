//! The simulator itself is tested: it is the same each time, its scenarios hold, and it notices what it must.

#![allow(clippy::unwrap_used)]

use pollux_sim::{Sabotage, Scenario, Trace, sabotage, scenario};

/// A run that cannot be repeated cannot be understood.
#[test]
fn the_same_seed_gives_the_same_run_step_by_step() {
    for seed in 1..=4 {
        let hash = || match Scenario::of_seed(seed, None).run(Trace::hash()).trace {
            Trace::Hash(hash) => hash,
            _ => unreachable!("a hash was asked for"),
        };
        assert_eq!(hash(), hash(), "seed {seed}");
    }
}

/// Every failure of the table ends in its verdict.
#[test]
fn named_scenarios_hold() {
    let mut failed = Vec::new();
    for seed in 1..=5 {
        for scenario in scenario::named(seed) {
            let name = scenario.name.clone();
            let outcome = scenario.run(Trace::Off);
            if let Some(failure) = outcome.failure {
                failed.push(format!("{name}, seed {seed}: {} at {:?}: {}", failure.rule, failure.at, failure.text));
            }
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// A checker that notices nothing is no checker: each sabotage is caught within some seeds, by an invariant.
#[test]
fn every_sabotage_is_noticed() {
    let seeds = |sabotage| match sabotage {
        Sabotage::AckEarly | Sabotage::GuardDoesNotKill | Sabotage::LeaseIgnored => 60,
        _ => 300,
    };
    let fails = |seed, sabotage| Scenario::of_seed(seed, sabotage).run(Trace::Off).failure.is_some();
    let missed = |sabotage: &Sabotage| {
        let noticed = (1..=seeds(*sabotage)).find(|seed| fails(*seed, Some(*sabotage)));
        // What fails without the sabotage too notices nothing.
        noticed.is_none_or(|seed| fails(seed, None))
    };
    let missed: Vec<Sabotage> = sabotage::ALL.into_iter().filter(missed).collect();
    assert!(missed.is_empty(), "not noticed: {missed:?}");
}
