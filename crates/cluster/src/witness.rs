//! Questions to the witness: one at a time, each a compare-and-swap from a value that was seen.
//!
//! Who may swap: only a node whose record says `(e, members)`, and only from a register that is not ahead of `e`. A register
//! *behind* `e` is left over from before the members came together; all who may swap it know epoch `e`, so the one swap
//! that succeeds names the one winner. A register that already names this node is never taken for a grant without a new
//! swap, except the very one that was asked for: the answer to it may have been lost.

use crate::authority::Stand;
use crate::core::Cluster;
use crate::entry::{Holder, Proof};
use crate::seam::{EpochRecord, Output, Register, WitnessAnswer};
use pollux_base::Instant;
use std::time::Duration;

/// A question without an answer counts as failed after this long.
const ANSWER_WAIT: Duration = Duration::from_secs(3);
/// Pause before the grant is asked for again when the witness was not reached; doubled up to `GRANT_AGAIN_MAX`.
const GRANT_AGAIN: Duration = Duration::from_millis(500);
/// A witness that comes back is asked within this long.
const GRANT_AGAIN_MAX: Duration = Duration::from_secs(4);
/// While all is well the register is looked at this often: it is asked at transitions, the look only keeps the headline
/// honest and mends what a crash left behind.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// The same while something is to be mended or the witness was not reached.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

pub(crate) struct Witness {
    last_ask: u64,
    under_way: Option<Question>,
    /// The register when it was last heard of.
    pub known: Option<Register>,
    /// When to look next.
    next: Instant,
    /// When the grant may be asked for again.
    grant_next: Instant,
    pause: Duration,
    /// Since when (wall clock) and why it is not reached.
    trouble: Option<(u64, String)>,
    was_reached: bool,
}

struct Question {
    ask: u64,
    purpose: Purpose,
    set: Option<Register>,
    asked: Instant,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Grant,
    Revive,
    Look,
}

impl Witness {
    pub fn new(now: Instant) -> Witness {
        Witness {
            last_ask: 0,
            under_way: None,
            known: None,
            next: now,
            grant_next: now,
            pause: GRANT_AGAIN,
            trouble: None,
            was_reached: false,
        }
    }

    pub fn is_asked_for_grant(&self) -> bool {
        self.under_way.as_ref().is_some_and(|question| question.purpose == Purpose::Grant)
    }

    /// The last question was not answered.
    pub fn is_unreachable(&self) -> bool {
        self.trouble.is_some()
    }

    pub fn trouble(&self) -> Option<&str> {
        self.trouble.as_ref().map(|(_, reason)| reason.as_str())
    }

    /// For the headline: `None` before the first answer.
    pub fn sight(&self) -> Option<Result<(), (u64, String)>> {
        match (&self.trouble, self.was_reached) {
            (Some(trouble), _) => Some(Err(trouble.clone())),
            (None, true) => Some(Ok(())),
            (None, false) => None,
        }
    }
}

impl Cluster {
    pub(crate) fn reconcile_witness(&mut self, now: Instant) {
        if !self.setup.witness {
            if let Stand::Reviving { epoch } = self.stand {
                self.on_granted(epoch, Proof::Witness);
            }
            return;
        }
        // A look does not stand in the way of what matters.
        let is_urgent = matches!(self.stand, Stand::Asking | Stand::Reviving { .. });
        self.witness.under_way.take_if(|question| is_urgent && question.purpose == Purpose::Look);
        if let Some(question) = &self.witness.under_way {
            let (ask, until) = (question.ask, question.asked + ANSWER_WAIT);
            if self.has_come(now, until) {
                self.on_witness(now, ask, Err(format!("no answer within {} s", ANSWER_WAIT.as_secs())));
            }
            return;
        }
        match self.stand.clone() {
            Stand::Asking => {
                let next = self.witness.grant_next;
                if self.has_come(now, next) {
                    let epoch = self.record_epoch();
                    let both = Register { epoch, alone: None };
                    // From what was last seen if that is behind; a wrong guess costs one more question.
                    let expect = self.witness.known.filter(|known| known.epoch < epoch).unwrap_or(both);
                    let set = Register { epoch: epoch.next(), alone: Some(self.me) };
                    self.ask(now, Purpose::Grant, expect, Some(set));
                }
            }
            Stand::Reviving { epoch } => {
                self.ask(now, Purpose::Revive, Register { epoch, alone: Some(self.me) }, None);
            }
            Stand::Member { .. } | Stand::Granted { .. } => self.look(now),
            Stand::Forming | Stand::Outdated { .. } | Stand::Rejoining { .. } => {}
        }
    }

    /// Keeps the register as it ought to be.
    fn look(&mut self, now: Instant) {
        let epoch = self.state.authority.epoch;
        let wanted = match self.state.authority.holder {
            Holder::Members => Register { epoch, alone: None },
            Holder::Alone { node } => Register { epoch, alone: Some(node) },
        };
        let (is_settled, known) = (self.may_act(), self.witness.known);
        // Something changed since the last look: not only at the next one.
        let is_behind = known.is_some_and(|known| known.epoch < epoch);
        if is_settled && is_behind && self.is_due(now, ("set register", epoch.0, 0), LOOK_AGAIN) {
            self.ask(now, Purpose::Look, known.unwrap_or(wanted), Some(wanted));
            return;
        }
        let next = self.witness.next;
        if self.has_come(now, next) {
            self.ask(now, Purpose::Look, wanted, None);
        }
    }

    fn ask(&mut self, now: Instant, purpose: Purpose, expect: Register, set: Option<Register>) {
        self.witness.last_ask += 1;
        let ask = self.witness.last_ask;
        self.witness.under_way = Some(Question { ask, purpose, set, asked: now });
        self.wake_at(now + ANSWER_WAIT);
        self.output(Output::AskWitness { ask, expect, set });
    }

    pub(crate) fn on_witness(&mut self, now: Instant, ask: u64, result: Result<WitnessAnswer, String>) {
        let Some(question) = self.witness.under_way.take_if(|question| question.ask == ask) else {
            return; // An answer to a question that was given up.
        };
        let register = match &result {
            Ok(WitnessAnswer::Swapped(register) | WitnessAnswer::Holds(register)) => *register,
            Err(reason) => {
                let since = self.witness.trouble.take().map_or_else(|| self.unix_ms(now), |(since, _)| since);
                self.witness.trouble = Some((since, reason.clone()));
                match question.purpose {
                    Purpose::Grant => self.witness.grant_next = now + self.witness.pause,
                    Purpose::Revive | Purpose::Look => self.witness.next = now + LOOK_AGAIN,
                }
                self.witness.pause = (self.witness.pause * 2).min(GRANT_AGAIN_MAX);
                if let (Purpose::Revive, Stand::Reviving { epoch }) = (question.purpose, &self.stand) {
                    // Verdict 6: a durable `alone` needs nobody's consent. Nobody else can have got the grant since, because
                    // this record is withdrawn before the members come together.
                    self.on_granted(*epoch, Proof::Witness);
                }
                return;
            }
        };
        self.witness.trouble = None;
        self.witness.was_reached = true;
        self.witness.known = Some(register);
        self.witness.pause = GRANT_AGAIN;
        self.witness.grant_next = now;
        // A swap that was made before and whose answer was lost is as good as one made now.
        let is_swapped = question.set == Some(register);
        match question.purpose {
            Purpose::Grant => self.on_grant_answer(now, register, is_swapped),
            Purpose::Revive => self.on_revive_answer(now, register),
            Purpose::Look => {
                self.witness.next = now + LOOK_EVERY;
                self.on_look(now, register);
            }
        }
    }

    fn on_grant_answer(&mut self, now: Instant, register: Register, is_swapped: bool) {
        if self.stand != Stand::Asking {
            return;
        }
        let epoch = self.record_epoch();
        if is_swapped {
            // If the peer is back the grant is not used: `on_look` takes it back.
            let has_log = |node| self.hello_of(now, node).is_none_or(|hello| !hello.wants_to_join);
            let is_back = self.partner().is_some_and(|node| self.is_up(node) && has_log(node));
            if !is_back {
                self.on_granted(register.epoch, Proof::Witness);
            }
            return;
        }
        if register.epoch < epoch || register == (Register { epoch, alone: None }) {
            return; // Asked again at once, from what was seen.
        }
        let why = match register.alone {
            Some(node) if node == self.me => {
                "the witness knows of a later epoch of this very node: its disk is old".into()
            }
            Some(node) => format!("the witness gave `{}` {:?}", self.name_of(node), register.epoch),
            None => format!("the witness knows {:?} of all members", register.epoch),
        };
        let to = register.alone.filter(|node| *node != self.me).or_else(|| {
            // By all members: the other one has it.
            if register.alone.is_none() { self.partner() } else { None }
        });
        let since = self.unix_ms(now);
        self.become_outdated(to, register.epoch, since, why);
    }

    fn on_revive_answer(&mut self, now: Instant, register: Register) {
        let Stand::Reviving { epoch } = self.stand else {
            return;
        };
        let is_mine = register.epoch < epoch || register == (Register { epoch, alone: Some(self.me) });
        if is_mine {
            self.on_granted(epoch, Proof::Witness);
            return;
        }
        let why = format!("the witness knows {:?}", register.epoch);
        let to = register.alone.filter(|node| *node != self.me).or_else(|| self.partner());
        let since = self.unix_ms(now);
        self.become_outdated(to, register.epoch, since, why);
    }

    /// The register as seen while nothing was asked of it.
    fn on_look(&mut self, now: Instant, register: Register) {
        let epoch = self.state.authority.epoch;
        match &self.stand {
            // We swapped it, and the peer came back before we used the grant. The members go to an epoch beyond it; our
            // record first, so that we ask for no grant from before.
            Stand::Member { .. } if register.alone == Some(self.me) && register.epoch >= self.record_epoch() => {
                self.witness.next = now + LOOK_AGAIN;
                if self.may_act() {
                    let record = EpochRecord { epoch: register.epoch.next(), alone: false, gave_up: None };
                    self.output(Output::SaveEpoch(record));
                }
            }
            // A human said that the other was down, and it got the witness' word all the same.
            Stand::Granted { .. }
                if self.acts_alone() && register.alone != Some(self.me) && register.epoch >= epoch =>
            {
                let to = register.alone.or_else(|| self.partner());
                let since = self.unix_ms(now);
                let why = "a human let it go on alone, but the witness had given the other side the word".into();
                self.become_outdated(to, register.epoch, since, why);
            }
            Stand::Member { .. } | Stand::Granted { .. } if register.epoch < epoch => {
                self.witness.next = now + LOOK_AGAIN;
            }
            _ => {}
        }
    }
}
