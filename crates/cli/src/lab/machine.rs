//! What a node is apart from Pollux: a machine that is on or off, and an init that restarts daemons that died.
//!
//! Pure: it is told what happens and when, and answers what to do. A daemon's life: started -> runs -> ended -> (after a
//! pause) started; until the power goes. A switched-off machine starts nothing, and what ended in it means nothing.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// First pause before a daemon that died is started again; systemd's default is of this order.
const PAUSE_FIRST: Duration = Duration::from_millis(200);
/// The pause doubles up to this: a daemon that cannot start is tried for ever, but costs nothing.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// One that ran this long is taken for well again.
const WELL_AFTER: Duration = Duration::from_secs(10);

/// One machine with its daemons, numbered in the order in which they are started.
#[derive(Debug)]
pub struct Machine {
    power: bool,
    /// Counts the times it was switched on: what ended in an earlier life is told apart.
    boot: u64,
    daemons: BTreeMap<usize, DaemonLife>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DaemonLife {
    pub state: DaemonState,
    pub restarts: u64,
    pause: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DaemonState {
    Running { since: Instant },
    Waiting { until: Instant },
}

/// To be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    Start {
        daemon: usize,
        boot: u64,
    },
    /// End everything on the machine at once.
    Kill,
    /// What a reboot forgets is to be wiped.
    Wipe,
}

impl Machine {
    /// A machine with `daemons` daemons, switched off.
    pub fn new(daemons: usize) -> Machine {
        let life =
            DaemonLife { state: DaemonState::Waiting { until: Instant::now() }, restarts: 0, pause: PAUSE_FIRST };
        Machine { power: false, boot: 0, daemons: (0..daemons).map(|daemon| (daemon, life)).collect() }
    }

    pub fn is_on(&self) -> bool {
        self.power
    }
    pub fn daemon(&self, daemon: usize) -> Option<&DaemonLife> {
        self.daemons.get(&daemon)
    }

    pub fn switch_on(&mut self, now: Instant) -> Vec<Act> {
        if self.power {
            return Vec::new();
        }
        self.power = true;
        self.boot += 1;
        let mut acts = vec![Act::Wipe];
        for (daemon, life) in &mut self.daemons {
            *life = DaemonLife { state: DaemonState::Running { since: now }, restarts: 0, pause: PAUSE_FIRST };
            acts.push(Act::Start { daemon: *daemon, boot: self.boot });
        }
        acts
    }

    /// Off twice is off: the second time only makes sure.
    pub fn switch_off(&mut self) -> Vec<Act> {
        self.power = false;
        vec![Act::Kill]
    }

    /// A daemon ended, or could not be started.
    pub fn on_ended(&mut self, now: Instant, daemon: usize, boot: u64) {
        if !self.power || boot != self.boot {
            return;
        }
        let Some(life) = self.daemons.get_mut(&daemon) else { return };
        if let DaemonState::Running { since } = life.state {
            if now.saturating_duration_since(since) >= WELL_AFTER {
                life.pause = PAUSE_FIRST;
            }
            life.state = DaemonState::Waiting { until: now + life.pause };
            life.pause = (life.pause * 2).min(PAUSE_MAX);
        }
    }

    /// When `on_time` has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        let waiting = |life: &DaemonLife| match life.state {
            DaemonState::Waiting { until } => Some(until),
            DaemonState::Running { .. } => None,
        };
        if self.power { self.daemons.values().filter_map(waiting).min() } else { None }
    }

    pub fn on_time(&mut self, now: Instant) -> Vec<Act> {
        let mut acts = Vec::new();
        for (daemon, life) in self.daemons.iter_mut().filter(|_| self.power) {
            if matches!(life.state, DaemonState::Waiting { until } if until <= now) {
                life.state = DaemonState::Running { since: now };
                life.restarts += 1;
                acts.push(Act::Start { daemon: *daemon, boot: self.boot });
            }
        }
        acts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn starts(acts: &[Act]) -> Vec<usize> {
        acts.iter().filter_map(|act| if let Act::Start { daemon, .. } = act { Some(*daemon) } else { None }).collect()
    }

    #[test]
    fn a_daemon_that_dies_is_started_again_ever_more_slowly_until_it_runs_well() {
        let mut now = Instant::now();
        let mut machine = Machine::new(2);
        assert_eq!(starts(&machine.switch_on(now)), [0, 1]);
        let mut pauses = Vec::new();
        for _ in 0..8 {
            machine.on_ended(now, 1, 1);
            let until = machine.deadline().expect("it is waited for");
            assert!(starts(&machine.on_time(until - Duration::from_millis(1))).is_empty());
            assert_eq!(starts(&machine.on_time(until)), [1], "the other daemon is left alone");
            pauses.push(until - now);
            now = until;
        }
        assert!(pauses.windows(2).all(|pair| pair[0] <= pair[1]) && pauses[0] == PAUSE_FIRST);
        assert_eq!(pauses[7], PAUSE_MAX);
        machine.on_ended(now + WELL_AFTER, 1, 1);
        assert_eq!(machine.deadline(), Some(now + WELL_AFTER + PAUSE_FIRST));
    }

    #[test]
    fn a_machine_that_is_off_starts_nothing_whatever_ended_in_it() {
        let now = Instant::now();
        let mut machine = Machine::new(3);
        machine.switch_on(now);
        assert_eq!(machine.switch_off(), [Act::Kill]);
        machine.on_ended(now, 0, 1);
        assert_eq!(machine.deadline(), None);
        assert!(machine.on_time(now + Duration::from_secs(60)).is_empty());
        assert_eq!(machine.switch_off(), [Act::Kill], "off on a machine that is off makes sure");
    }

    #[test]
    fn the_end_of_a_daemon_of_an_earlier_life_is_not_taken_for_one_of_this() {
        let now = Instant::now();
        let mut machine = Machine::new(1);
        machine.switch_on(now);
        machine.switch_off();
        assert_eq!(machine.switch_on(now), [Act::Wipe, Act::Start { daemon: 0, boot: 2 }]);
        assert!(machine.switch_on(now).is_empty(), "on on a machine that is on changes nothing");
        machine.on_ended(now, 0, 1);
        assert_eq!(machine.deadline(), None);
    }
}
