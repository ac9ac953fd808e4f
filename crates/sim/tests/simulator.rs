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

/// A checker that notices nothing is no checker: each sabotage is caught within some seeds or stories, by an invariant.
#[test]
#[allow(clippy::disallowed_methods)] // each thread has a simulation of its own
fn every_sabotage_is_noticed() {
    let fails = |mut scenario: Scenario, sabotage| {
        scenario.settings.sabotage = sabotage;
        scenario.run(Trace::Off).failure.is_some()
    };
    // Some are rare: an early takeover shows in one seed of a hundred. What fails without the sabotage too notices nothing.
    let blames =
        |scenario: &dyn Fn() -> Scenario, sabotage| fails(scenario(), Some(sabotage)) && !fails(scenario(), None);
    let is_noticed = |sabotage: Sabotage| {
        let by_seed = |seed| blames(&|| Scenario::of_seed(seed, None), sabotage);
        let stories = scenario::named(1).len();
        let by_story = |(seed, story): (u64, usize)| blames(&|| scenario::named(seed).swap_remove(story), sabotage);
        // A story that was made for it notices at once.
        (1..=2).flat_map(|seed| (0..stories).map(move |story| (seed, story))).any(by_story) || (1..=1200).any(by_seed)
    };
    // Side by side: the rare ones take as long as all others together.
    let missed: Vec<Sabotage> = std::thread::scope(|scope| {
        let is_noticed = &is_noticed;
        let looks = sabotage::ALL.map(|sabotage| (sabotage, scope.spawn(move || is_noticed(sabotage))));
        let missed = looks.into_iter().filter_map(|(sabotage, look)| {
            let is_seen = look.join().expect("a simulation does not panic");
            (!is_seen).then_some(sabotage)
        });
        missed.collect()
    });
    assert!(missed.is_empty(), "not noticed: {missed:?}");
}
