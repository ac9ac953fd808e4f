//! Random faults from a seed: at no moment does a VM run twice, do both sides decide, or does a log go on after another
//! was forced out of it (`World::check`); and when the faults are over, everything comes back by itself.

mod world;

use proptest::prelude::*;
use std::time::Duration;
use world::{A, B, World};

#[derive(Clone, Copy, Debug)]
enum Fault {
    Crash(bool),
    Boot(bool),
    StopNoded(bool),
    StartNoded(bool),
    Cut(bool),
    CutControl(bool),
    CutWitness(bool, bool),
    PowerFails(bool),
    ShutDown,
    CrashGuests,
}

fn fault() -> impl Strategy<Value = (Fault, u64)> {
    use Fault::*;
    let fault = prop_oneof![
        any::<bool>().prop_map(Crash),
        any::<bool>().prop_map(Boot),
        any::<bool>().prop_map(Boot),
        any::<bool>().prop_map(StopNoded),
        any::<bool>().prop_map(StartNoded),
        any::<bool>().prop_map(Cut),
        any::<bool>().prop_map(CutControl),
        any::<(bool, bool)>().prop_map(|(node, cut)| CutWitness(node, cut)),
        any::<bool>().prop_map(PowerFails),
        Just(ShutDown),
        Just(CrashGuests),
    ];
    // Mostly short times, in which things meet; sometimes long ones, in which they run out.
    (fault, prop_oneof![4 => 0u64..1500, 2 => 0u64..6000, 1 => 0u64..25_000])
}

/// A quarter of what PROPTEST_CASES says: each case is minutes of two nodes' time.
fn quarter() -> ProptestConfig {
    let usual = ProptestConfig::default();
    ProptestConfig { cases: usual.cases / 4, failure_persistence: None, ..usual }
}

proptest! {
    #![proptest_config(quarter())]
    #[test]
    fn after_any_faults_the_vm_ran_once_at_a_time_and_all_comes_back(
        has_power: bool,
        faults in proptest::collection::vec(fault(), 1..25),
    ) {
        let mut world = World::with_vm(true, has_power, A);
        for (fault, pause) in faults {
            let node = |is_a| if is_a { A } else { B };
            match fault {
                Fault::Crash(is_a) if world.is_powered(node(is_a)) => world.crash(node(is_a)),
                Fault::Boot(is_a) if !world.is_powered(node(is_a)) => world.boot(node(is_a)),
                Fault::StopNoded(is_a) => world.stop_noded(node(is_a)),
                Fault::StartNoded(is_a) if world.is_powered(node(is_a)) && !world.has_noded(node(is_a)) => {
                    world.start_noded(node(is_a));
                }
                Fault::Cut(cut) => world.cut = cut,
                Fault::CutControl(cut) => world.control_cut = cut,
                Fault::CutWitness(is_a, true) => drop(world.witness_cut.insert(node(is_a))),
                Fault::CutWitness(is_a, false) => drop(world.witness_cut.remove(&node(is_a))),
                Fault::PowerFails(is_a) => {
                    let server = world.server_mut(node(is_a));
                    server.power_switch_fails = !server.power_switch_fails;
                }
                Fault::ShutDown => { world.shut_down_from_inside(A); world.shut_down_from_inside(B); }
                Fault::CrashGuests => { world.crash_guests(A); world.crash_guests(B); }
                _ => {}
            }
            world.run(Duration::from_millis(pause));
        }
        world.cut = false;
        world.control_cut = false;
        world.witness_cut.clear();
        for _ in 0..5 {
            for node in [A, B] {
                if !world.is_powered(node) {
                    world.boot(node);
                } else if !world.has_noded(node) {
                    world.start_noded(node);
                }
            }
            world.run(Duration::from_secs(15));
        }
        world.run_until("everything is back", World::is_settled_or_given_up);
    }
}
