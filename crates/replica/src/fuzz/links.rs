//! The links under a peer that says anything on two connections. They keep their invariants, and the data plane sees sessions
//! that begin, carry frames, and end, each larger than the one before.

use crate::links::{Input, Links, Output, PathId, Use};
use crate::wire::{Carried, Frame, Message, Place, What, Word};
use pollux_base::fuzz::Tape;
use pollux_base::{Instant, NodeId, Session};
use std::time::Duration;

const STEPS_MAX: usize = 200;
const PEER: NodeId = NodeId(5);

struct Rig {
    links: Links,
    now: Instant,
    /// The session that the data plane knows of.
    session: Option<Session>,
    last: Session,
    /// Channels that were named, so that the peer can name them, too.
    channel: u64,
}

impl Rig {
    fn give(&mut self, input: Input) {
        self.links.handle(self.now, input);
        while let Some(output) = self.links.poll() {
            self.on_output(output);
        }
        self.links.check();
    }

    fn on_output(&mut self, output: Output) {
        match output {
            Output::Plane(crate::Input::LinkUp { session, .. }) => {
                assert!(self.session.is_none() && session > self.last, "sessions grow, and one ends before the next");
                (self.session, self.last) = (Some(session), session);
            }
            Output::Plane(crate::Input::LinkDown { session, .. }) => {
                assert_eq!(self.session.take(), Some(session), "what ends had begun");
            }
            Output::Plane(crate::Input::Frame { session, .. }) => {
                assert_eq!(self.session, Some(session), "frames come within their session");
            }
            Output::Plane(other) => panic!("not from the links: {other:?}"),
            Output::Send { path, number } => {
                // The shell fetches it, now or never.
                let _ = self.links.frame(path, number);
            }
            Output::Word { word: Word::Begin { channel, .. }, .. } => self.channel = channel,
            Output::Word { .. } | Output::Close { .. } | Output::Changed { .. } => {}
        }
    }
}

fn frame(number: u64) -> Frame {
    Frame::bare(Message::LeaseAsk { number })
}

pub fn run(bytes: &[u8]) {
    let mut tape = Tape(bytes);
    let setup = tape.u8();
    let own = if setup & 1 == 0 { NodeId(1) } else { NodeId(9) };
    let usage = if setup & 2 == 0 { Use::Best } else { Use::Spread };
    let now = Instant(1_000_000_000);
    let mut rig = Rig { links: Links::new(own, usage, now), now, session: None, last: Session(0), channel: 7 };
    // Connections are never the same twice; those of the two addresses are in turn.
    let mut paths = [PathId(0), PathId(1)];
    for step in 0..STEPS_MAX {
        if tape.is_empty() {
            return;
        }
        let (what, which) = (tape.u8(), usize::from(tape.u8() & 1));
        let path = paths[which];
        let place = |tape: &mut Tape<'_>| match tape.u8() {
            255 => Place { number: tape.u64(), received: tape.u64() },
            small => Place { number: u64::from(small >> 4), received: u64::from(small & 15) },
        };
        match what % 10 {
            0 => {
                paths[which] = PathId(2 + step as u64);
                rig.give(Input::PathUp { path: paths[which], peer: PEER, rank: which as u8, random: 7 });
            }
            1 => rig.give(Input::PathDown { path }),
            2 => {
                rig.now = rig.now + Duration::from_millis(u64::from(tape.u8()));
                rig.give(Input::Tick);
            }
            3 => {
                let word = match tape.u8() % 8 {
                    0 => Word::Begin { channel: rig.channel, fresh: true },
                    1 => Word::Begin { channel: rig.channel, fresh: false },
                    2 => Word::Begin { channel: u64::from(tape.u8()), fresh: true },
                    3 => Word::Unknown { channel: rig.channel },
                    4 => Word::Ping,
                    5 => Word::Pong,
                    6 => Word::Silent { rank: tape.u8() % 3 },
                    _ => Word::Ack,
                };
                let carried = Carried { place: place(&mut tape), what: What::Word(word) };
                rig.give(Input::Arrived { path, carried });
            }
            4 | 5 => {
                let place = place(&mut tape);
                rig.give(Input::Arrived { path, carried: Carried { place, what: What::Frame(frame(place.number)) } });
            }
            6 | 7 => {
                if let Some(session) = rig.session {
                    rig.give(Input::Send { peer: PEER, session, frame: frame(step as u64) });
                }
            }
            8 => rig.give(Input::Heard { path }),
            _ => {
                if let Some(session) = rig.session {
                    rig.give(Input::Disconnect { peer: PEER, session });
                }
            }
        }
        if let Some(due) = rig.links.deadline() {
            assert!(due > Instant(0), "a deadline is a moment of this run");
        }
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    // Both connections up and joined, frames both ways, one falls silent, and goes.
    let life = |setup: u8| {
        let steps: &[&[u8]] = &[
            &[setup],
            &[0, 0],
            &[3, 0, 0, 0],
            &[0, 1],
            &[3, 1, 1, 0],
            &[6, 0],
            &[6, 0],
            &[4, 0, 0x01],
            &[4, 1, 0x12],
            &[2, 0, 160],
            &[3, 1, 4, 0x02],
            &[2, 0, 20],
            &[3, 1, 6, 0, 0x02],
            &[2, 0, 255],
            &[6, 0],
            &[1, 0],
            &[1, 1],
            &[2, 0, 120],
        ];
        steps.concat()
    };
    vec![life(0), life(1), life(3)]
}
