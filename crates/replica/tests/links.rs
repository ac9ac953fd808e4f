//! Two nodes' links in virtual time over paths that are cut: frames arrive once and in order, and a dead path is a short
//! pause. One seed decides everything.
#![allow(clippy::unwrap_used)]

use pollux_base::{Instant, NodeId, Session};
use pollux_replica::Input as Plane;
use pollux_replica::links::{Input, Links, Output, PathId, PathState, Use};
use pollux_replica::wire::{Carried, Frame, Message, Place, Sequence, What, Word};
use pollux_store::faulty_disk::Luck;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

const A: NodeId = NodeId(1);
const B: NodeId = NodeId(2);

fn ms(value: u64) -> Duration {
    Duration::from_millis(value)
}

/// The frame that says `number`.
fn frame(number: u64) -> Frame {
    let stamp = pollux_base::Stamp { epoch: pollux_base::Epoch(1), generation: pollux_base::Generation(1) };
    Frame::bare(Message::Done { group: pollux_base::GroupId(1), stamp, sequence: Sequence(number) })
}

struct End {
    links: Links,
    session: Option<Session>,
    /// Sessions that were begun.
    sessions: usize,
    /// What came on the present session.
    got: Vec<u64>,
    last_at: Instant,
    /// Stands still until then.
    frozen_until: Instant,
    states: Vec<(PathId, PathState)>,
    words: usize,
    frames: usize,
}

struct Cable {
    rank: u8,
    /// Per receiver, with when it arrives.
    wire: BTreeMap<NodeId, VecDeque<(Instant, Option<Carried>)>>,
}

struct World {
    now: Instant,
    luck: Luck,
    ends: BTreeMap<NodeId, End>,
    cables: BTreeMap<PathId, Cable>,
    /// By rank and receiver: nothing arrives.
    cut: BTreeMap<(u8, NodeId), bool>,
    next: u64,
    redial_at: Instant,
    /// How long a message takes.
    delay: Duration,
}

impl World {
    fn new(seed: u64, usage: Use) -> World {
        let now = Instant(1_000_000_000);
        let end = |node| End {
            links: Links::new(node, usage, now),
            session: None,
            sessions: 0,
            got: Vec::new(),
            last_at: now,
            frozen_until: now,
            states: Vec::new(),
            words: 0,
            frames: 0,
        };
        World {
            now,
            luck: Luck::new(seed),
            ends: BTreeMap::from([(A, end(A)), (B, end(B))]),
            cables: BTreeMap::new(),
            cut: BTreeMap::new(),
            next: 0,
            redial_at: now,
            delay: Duration::from_micros(200),
        }
    }

    fn connected(seed: u64, usage: Use) -> World {
        let mut world = World::new(seed, usage);
        world.pass(ms(3000));
        assert!(world.ends.values().all(|end| end.session.is_some()));
        world
    }

    fn end(&mut self, node: NodeId) -> &mut End {
        self.ends.get_mut(&node).unwrap()
    }

    fn is_cut(&self, rank: u8, to: NodeId) -> bool {
        self.cut.get(&(rank, to)).copied().unwrap_or(false)
    }

    fn set_cut(&mut self, rank: u8, to: NodeId, cut: bool) {
        self.cut.insert((rank, to), cut);
    }

    fn give(&mut self, node: NodeId, input: Input) {
        let now = self.now;
        self.end(node).links.handle(now, input);
        self.drain(node);
    }

    fn drain(&mut self, node: NodeId) {
        let other = if node == A { B } else { A };
        let (now, delay) = (self.now, self.delay);
        loop {
            let end = self.ends.get_mut(&node).unwrap();
            let Some(output) = end.links.poll() else { break };
            match output {
                Output::Plane(Plane::LinkUp { session, .. }) => {
                    end.session = Some(session);
                    end.sessions += 1;
                    end.got.clear();
                }
                Output::Plane(Plane::LinkDown { session, .. }) => {
                    assert_eq!(end.session, Some(session));
                    end.session = None;
                }
                Output::Plane(Plane::Frame { session, frame, .. }) => {
                    assert_eq!(end.session, Some(session));
                    let Message::Done { sequence, .. } = frame.message else { panic!("{frame:?}") };
                    end.got.push(sequence.0);
                    end.last_at = now;
                }
                Output::Plane(input) => panic!("{input:?}"),
                Output::Send { path, number } => {
                    let Some((place, frame)) = end.links.frame(path, number) else { continue };
                    let carried = Carried { place, what: What::Frame(frame.clone()) };
                    end.frames += 1;
                    if let Some(cable) = self.cables.get_mut(&path) {
                        cable.wire.entry(other).or_default().push_back((now + delay, Some(carried)));
                    }
                }
                Output::Word { path, received, word } => {
                    end.words += 1;
                    let carried = Carried { place: Place { number: 0, received }, what: What::Word(word) };
                    if let Some(cable) = self.cables.get_mut(&path) {
                        cable.wire.entry(other).or_default().push_back((now + delay, Some(carried)));
                    }
                }
                Output::Close { path, .. } => {
                    if let Some(cable) = self.cables.get_mut(&path) {
                        cable.wire.entry(other).or_default().push_back((now + delay, None));
                    }
                }
                Output::Changed { path, state } => end.states.push((path, state)),
            }
        }
        self.ends[&node].links.check();
    }

    fn frozen(&self, node: NodeId) -> bool {
        self.ends[&node].frozen_until > self.now
    }

    /// One step of 100 microseconds.
    fn step(&mut self) {
        self.now = self.now + Duration::from_micros(100);
        if self.now >= self.redial_at && !self.frozen(A) && !self.frozen(B) {
            self.redial_at = self.now + ms(50);
            for rank in 0..2 {
                let is_there = self.cables.values().any(|cable| cable.rank == rank);
                if !is_there && !self.is_cut(rank, A) && !self.is_cut(rank, B) {
                    self.dial(rank);
                }
            }
        }
        let paths: Vec<PathId> = self.cables.keys().copied().collect();
        for path in paths {
            for to in [A, B] {
                while !self.frozen(to)
                    && let Some(cable) = self.cables.get_mut(&path)
                    && let Some(wire) = cable.wire.get_mut(&to)
                    && wire.front().is_some_and(|(at, _)| *at <= self.now)
                    && !self.cut.get(&(cable.rank, to)).copied().unwrap_or(false)
                {
                    match wire.pop_front().unwrap().1 {
                        Some(carried) => self.give(to, Input::Arrived { path, carried }),
                        None => {
                            self.cables.remove(&path);
                            self.give(to, Input::PathDown { path });
                        }
                    }
                }
            }
        }
        for node in [A, B] {
            if !self.frozen(node) && self.ends[&node].links.deadline().is_some_and(|at| at <= self.now) {
                self.give(node, Input::Tick);
                let again = self.ends[&node].links.deadline();
                assert!(again.is_none_or(|at| at > self.now), "a tick leaves nothing that is due");
            }
        }
    }

    fn dial(&mut self, rank: u8) -> PathId {
        self.next += 1;
        let path = PathId(self.next);
        self.cables.insert(path, Cable { rank, wire: BTreeMap::new() });
        for (node, peer) in [(A, B), (B, A)] {
            let random = self.luck.draw();
            self.give(node, Input::PathUp { path, peer, rank, random });
        }
        path
    }

    /// The kernel ends a connection at both ends, with what was on it.
    fn reset(&mut self, rank: u8) {
        let paths: Vec<PathId> =
            self.cables.iter().filter(|(_, cable)| cable.rank == rank).map(|(path, _)| *path).collect();
        for path in paths {
            self.cables.remove(&path);
            self.give(A, Input::PathDown { path });
            self.give(B, Input::PathDown { path });
        }
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.step();
        }
    }

    fn send(&mut self, from: NodeId, number: u64) {
        let peer = if from == A { B } else { A };
        if let Some(session) = self.ends[&from].session {
            self.give(from, Input::Send { peer, session, frame: frame(number) });
        }
    }

    /// Both send once a millisecond; gives the longest time in which nothing arrived at either.
    fn talk(&mut self, time: Duration, number: &mut u64) -> Duration {
        let end = self.now + time;
        let now = self.now;
        self.ends.values_mut().for_each(|end| end.last_at = now);
        let mut longest = Duration::ZERO;
        while self.now < end {
            *number += 1;
            self.send(A, *number);
            self.send(B, *number);
            self.pass(ms(1));
            for end in self.ends.values() {
                longest = longest.max(self.now.since(end.last_at));
            }
        }
        longest
    }

    fn assert_whole(&self, from: u64, to: u64) {
        for (node, end) in &self.ends {
            let expected: Vec<u64> = (from..=to).collect();
            assert!(end.got == expected, "{node} got {:?} to {:?}", end.got.first(), end.got.last());
        }
    }
}

#[test]
fn a_cut_path_is_a_pause_of_well_under_a_second_and_nothing_is_lost_or_done_twice() {
    // Both directions of the path in use, or one of them (verdict 8).
    for (seed, to) in [vec![A, B], vec![A], vec![B]].into_iter().enumerate() {
        let mut world = World::connected(seed as u64, Use::Best);
        let mut number = 0;
        assert!(world.talk(ms(500), &mut number) < ms(5));
        to.iter().for_each(|to| world.set_cut(0, *to, true));
        let pause = world.talk(ms(500), &mut number);
        assert!(pause < ms(200), "a pause of {pause:?}");
        // What is still in the dead cable comes late, or never.
        to.iter().for_each(|to| world.set_cut(0, *to, false));
        assert!(world.talk(ms(3000), &mut number) < ms(5));
        // And the other way round.
        to.iter().for_each(|to| world.set_cut(0, *to, true));
        assert!(world.talk(ms(5000), &mut number) < ms(200));
        world.reset(0);
        world.pass(ms(20));
        world.assert_whole(1, number);
        assert!(world.ends.values().all(|end| end.sessions == 1), "the data plane has noticed nothing");
    }
}

#[test]
fn a_path_that_fails_in_idleness_is_noticed_and_a_mended_one_is_taken_again() {
    let mut world = World::connected(1, Use::Best);
    world.set_cut(1, B, true);
    world.pass(ms(4000));
    assert!(
        world.cables.values().all(|cable| cable.rank == 0 || cable.wire.values().flatten().any(|it| it.1.is_none()))
    );
    world.reset(1);
    world.set_cut(1, B, false);
    world.pass(ms(500));
    assert_eq!(world.cables.len(), 2);
    let before = (world.ends[&A].words, world.ends[&B].words);
    world.pass(Duration::from_secs(60));
    let after = (world.ends[&A].words, world.ends[&B].words);
    assert!(after.0 - before.0 <= 80 && after.1 - before.1 <= 80, "idle links are quiet: {before:?} to {after:?}");
    assert!(world.ends.values().all(|end| end.sessions == 1));
}

#[test]
fn a_peer_that_stands_still_is_no_dead_path() {
    let mut world = World::connected(2, Use::Best);
    let mut number = 0;
    world.talk(ms(100), &mut number);
    let states = world.ends[&A].states.len();
    let sent = world.ends[&A].frames;
    for _ in 0..3 {
        let until = world.now + ms(600);
        world.end(B).frozen_until = until;
        for _ in 0..600 {
            number += 1;
            world.send(A, number);
            world.pass(ms(1));
        }
        world.pass(ms(100));
    }
    assert_eq!(world.ends[&A].states.len(), states, "no path was passed over");
    assert_eq!(world.ends[&A].frames - sent, 1800, "nothing was sent twice");
    assert_eq!(world.ends[&B].got.last(), Some(&number));
    assert!(world.ends.values().all(|end| end.sessions == 1));
}

#[test]
fn a_peer_that_began_anew_gets_a_new_session_and_none_of_the_old_frames() {
    for restarted in [A, B] {
        let mut world = World::connected(3, Use::Best);
        let mut number = 0;
        world.talk(ms(50), &mut number);
        // A process dies: its kernel ends its connections.
        let now = world.now;
        world.end(restarted).links = Links::new(restarted, Use::Best, now);
        world.end(restarted).session = None;
        for path in std::mem::take(&mut world.cables).into_keys() {
            let other = if restarted == A { B } else { A };
            world.give(other, Input::PathDown { path });
        }
        let other = if restarted == A { B } else { A };
        world.send(other, 777);
        world.pass(ms(400));
        assert_eq!(world.ends[&other].sessions, 2);
        assert!(world.ends[&restarted].got.is_empty(), "{:?}", world.ends[&restarted].got);
        let from = number + 1;
        world.talk(ms(50), &mut number);
        world.pass(ms(5));
        world.assert_whole(from, number);
    }
}

#[test]
fn a_data_plane_that_gives_a_session_up_gets_another() {
    for node in [A, B] {
        let mut world = World::connected(4, Use::Best);
        let peer = if node == A { B } else { A };
        let session = world.ends[&node].session.unwrap();
        world.give(node, Input::Disconnect { peer, session });
        assert_eq!(world.ends[&node].session, None);
        world.give(node, Input::Send { peer, session, frame: frame(9) });
        world.pass(ms(400));
        assert!(world.ends.values().all(|end| end.sessions == 2 && end.session.is_some()));
        assert!(world.ends[&node].session > Some(session) && world.ends[&peer].got.is_empty());
    }
}

#[test]
fn without_any_path_the_data_plane_hears_so_soon() {
    let mut world = World::connected(5, Use::Best);
    for rank in 0..2 {
        world.set_cut(rank, A, true);
        world.set_cut(rank, B, true);
        world.reset(rank);
    }
    world.pass(ms(110));
    assert!(world.ends.values().all(|end| end.session.is_none()));
    // A moment without any is not worth telling.
    let mut world = World::connected(6, Use::Best);
    let mut number = 0;
    world.talk(ms(10), &mut number);
    number += 1;
    world.send(A, number);
    world.send(B, number);
    world.reset(0);
    world.reset(1);
    world.redial_at = world.now + ms(30);
    world.talk(ms(100), &mut number);
    world.pass(ms(10));
    world.assert_whole(1, number);
}

#[test]
fn a_newer_connection_takes_the_place_of_an_older_one_without_a_gap() {
    let mut world = World::connected(7, Use::Best);
    let mut number = 0;
    for _ in 0..5 {
        let older: Vec<PathId> = world.cables.keys().copied().collect();
        let newer = [world.dial(0), world.dial(1)];
        assert!(world.talk(ms(700), &mut number) < ms(5));
        assert!(older.iter().all(|path| !world.cables.contains_key(path)), "older ones are closed");
        assert!(newer.iter().all(|path| world.cables.contains_key(path)));
    }
    world.assert_whole(1, number);
}

#[test]
fn large_frames_use_every_good_path_when_told_to_spread() {
    let mut world = World::connected(8, Use::Spread);
    let peer = B;
    let session = world.ends[&A].session.unwrap();
    let mut large = frame(0);
    large.data = Some(pollux_base::Data::zeroed(64 << 10));
    for number in 0..100 {
        let Message::Done { sequence, .. } = &mut large.message else { unreachable!() };
        *sequence = Sequence(number);
        let now = world.now;
        world.end(A).links.handle(now, Input::Send { peer, session, frame: large.clone() });
    }
    world.drain(A);
    let on = |world: &World, rank| {
        let cables = world.cables.values().filter(|cable| cable.rank == rank);
        cables.map(|cable| cable.wire.get(&B).map_or(0, VecDeque::len)).sum::<usize>()
    };
    assert_eq!((on(&world, 0), on(&world, 1)), (50, 50));
    world.pass(ms(50));
    assert_eq!(world.ends[&B].got, (0..100).collect::<Vec<u64>>());
}

#[test]
fn what_can_not_be_true_ends_the_connection_and_harms_nothing() {
    let word = |received, word| Carried { place: Place { number: 0, received }, what: What::Word(word) };
    let numbered = |number| Carried { place: Place { number, received: 0 }, what: What::Frame(frame(1)) };
    let nonsense = [
        word(99, Word::Ack),
        word(u64::MAX, Word::Ping),
        word(0, Word::Unknown { channel: 1 }),
        word(0, Word::Silent { rank: 0 }),
        word(0, Word::Silent { rank: 1 }),
        word(0, Word::Silent { rank: 7 }),
        word(0, Word::Begin { channel: 5, fresh: true }),
        word(0, Word::Begin { channel: 5, fresh: false }),
    ];
    for carried in nonsense {
        for node in [A, B] {
            let mut world = World::connected(9, Use::Best);
            let path = *world.cables.keys().next().unwrap();
            world.give(node, Input::Arrived { path, carried: carried.clone() });
            world.pass(ms(2000));
            let mut number = 0;
            world.talk(ms(20), &mut number);
            world.pass(ms(5));
            world.assert_whole(1, number);
        }
    }
    // A frame far ahead of its turn waits, within bounds; one before any channel was named ends its path.
    let mut world = World::connected(10, Use::Best);
    let path = *world.cables.keys().next().unwrap();
    world.give(A, Input::Arrived { path, carried: numbered(u64::MAX) });
    assert!(world.ends[&A].got.is_empty());
    let mut world = World::new(11, Use::Best);
    world.give(B, Input::PathUp { path, peer: A, rank: 0, random: 3 });
    world.give(B, Input::Arrived { path, carried: numbered(0) });
    assert_eq!(world.ends[&B].links.state(path), None);
}

#[test]
fn frames_arrive_once_and_in_order_whatever_happens_to_the_paths() {
    for seed in 0..60 {
        let usage = if seed % 2 == 0 { Use::Best } else { Use::Spread };
        let mut world = World::connected(seed, usage);
        let mut number = 0;
        for _ in 0..60 {
            match world.luck.below(7) {
                0 | 1 => {
                    let (rank, to) = (world.luck.below(2) as u8, [A, B][world.luck.below(2) as usize]);
                    let cut = world.luck.one_in(2);
                    world.set_cut(rank, to, cut);
                }
                2 => {
                    let rank = world.luck.below(2) as u8;
                    world.reset(rank);
                }
                3 => {
                    let until = world.now + ms(world.luck.below(400));
                    let node = [A, B][world.luck.below(2) as usize];
                    world.end(node).frozen_until = until;
                }
                4 => {
                    let rank = world.luck.below(2) as u8;
                    if !world.is_cut(rank, A) && !world.is_cut(rank, B) && !world.frozen(A) && !world.frozen(B) {
                        world.dial(rank);
                    }
                }
                5 => world.delay = Duration::from_micros(50 + world.luck.below(30_000)),
                _ => world.cut.clear(),
            }
            for _ in 0..world.luck.below(60) {
                number += 1;
                world.send(A, number);
                world.send(B, number);
                let pause = Duration::from_micros(world.luck.below(3000));
                world.pass(pause);
            }
            for (node, end) in &world.ends {
                assert!(end.got.windows(2).all(|pair| pair[0] < pair[1]), "seed {seed}: {node} got {:?}", end.got);
            }
        }
        world.cut.clear();
        world.delay = Duration::from_micros(200);
        world.pass(ms(3000));
        assert!(world.ends.values().all(|end| end.session.is_some()), "seed {seed}: they find together again");
        let from = number + 1;
        world.talk(ms(100), &mut number);
        world.pass(ms(10));
        for (node, end) in &world.ends {
            let tail: Vec<u64> = end.got.iter().copied().filter(|number| *number >= from).collect();
            assert_eq!(tail, (from..=number).collect::<Vec<u64>>(), "seed {seed}: {node}");
        }
    }
}
