//! Many short histories, each decided by a seed: clients write, read and give back blocks while links break, data planes
//! die, nodes lose power and authority moves. Checked: what was acknowledged is read, reads never go back, and in the end
//! all replicas hold the same. The checks themselves are tested on mischief that they must catch.
#![allow(clippy::unwrap_used)]

mod world;

use pollux_base::{NodeId, Op, Reply, RequestId};
use pollux_replica::wire::{Frame, Message, Standing};
use pollux_store::faulty_disk::Luck;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use world::*;

/// What each sector of a block may say: a write that was not acknowledged may be there in part.
type Possible = [BTreeSet<u64>; 8];

/// A client has one request per block under way.
struct Clients {
    possible: BTreeMap<u64, Possible>,
    under_way: BTreeMap<RequestId, (NodeId, u64, Asked)>,
    busy: BTreeSet<u64>,
    next_value: u64,
    acknowledged: u64,
}

#[derive(Clone, Copy, Debug)]
enum Asked {
    Write(u64),
    /// Of one sector of the block.
    Patch(u64, usize),
    Read,
}

impl Asked {
    /// What it writes to this sector, if it does.
    fn value(self, sector: usize) -> Option<u64> {
        match self {
            Asked::Write(value) => Some(value),
            Asked::Patch(value, only) => (only == sector).then_some(value),
            Asked::Read => None,
        }
    }
}

impl Clients {
    fn new() -> Clients {
        Clients {
            possible: BTreeMap::new(),
            under_way: BTreeMap::new(),
            busy: BTreeSet::new(),
            next_value: 1,
            acknowledged: 0,
        }
    }

    fn possible(&mut self, block: u64) -> &mut Possible {
        self.possible.entry(block).or_insert_with(|| std::array::from_fn(|_| BTreeSet::from([0])))
    }

    /// The block was seen to say this: it must have been possible, and nothing else is any more.
    fn see(&mut self, block: u64, values: [u64; 8], told: impl Fn() -> String) {
        let possible = self.possible(block);
        let fits = possible.iter().zip(&values).all(|(possible, value)| possible.contains(value));
        assert!(fits, "block {block} says {values:?}, possible {possible:?}\n{}", told());
        *possible = values.map(|value| BTreeSet::from([value]));
    }

    /// Issues something at whoever serves.
    fn issue(&mut self, world: &mut World, luck: &mut Luck) {
        let nodes: Vec<NodeId> = world
            .machines
            .iter()
            .filter(|(_, machine)| machine.served.contains(&VOLUME))
            .map(|(node, _)| *node)
            .collect();
        if nodes.is_empty() {
            return;
        }
        let node = nodes[luck.below(nodes.len() as u64) as usize];
        // A few blocks in each extent, so that requests meet.
        let block = luck.below(5) * 1024 + luck.below(6);
        if !self.busy.insert(block) {
            return;
        }
        let (asked, op) = match luck.below(10) {
            0 => {
                let (value, sector) = (self.next_value, luck.below(8) as usize);
                self.next_value += 1;
                let (block, offset) = (range(block, 1).start, sector * 512);
                let data = blocks(value, 1).slice(offset..offset + 512);
                (Asked::Patch(value, sector), Op::Patch { block, offset, data, fua: luck.one_in(5) })
            }
            1..=4 => {
                let value = self.next_value;
                self.next_value += 1;
                let op = Op::Write { range: range(block, 1), data: blocks(value, 1), fua: luck.one_in(5) };
                (Asked::Write(value), op)
            }
            5 => (Asked::Write(0), Op::Zero { range: range(block, 1), fua: false }),
            _ => (Asked::Read, Op::Read { range: range(block, 1) }),
        };
        for (sector, possible) in self.possible(block).iter_mut().enumerate() {
            if let Some(value) = asked.value(sector) {
                possible.insert(value);
            }
        }
        let id = world.request(node, op);
        self.under_way.insert(id, (node, block, asked));
    }

    /// Takes replies, and gives up what was asked of nodes that serve no more.
    fn check(&mut self, world: &World) {
        let mut ended = Vec::new();
        for (id, (node, block, asked)) in self.under_way.clone() {
            match (world.answer(id), asked) {
                (Some(Reply::Done), Asked::Write(_) | Asked::Patch(..)) => {
                    for (sector, possible) in self.possible(block).iter_mut().enumerate() {
                        if let Some(value) = asked.value(sector) {
                            *possible = BTreeSet::from([value]);
                        }
                    }
                    self.acknowledged += 1;
                }
                (Some(Reply::Data(data)), Asked::Read) => {
                    self.see(block, values_of(data.as_slice()), || world.describe());
                }
                (Some(Reply::Failed(_)), _) => {}
                (None, _) if !world.machines[&node].served.contains(&VOLUME) => {}
                (None, _) => continue,
                other => panic!("{other:?}"),
            }
            ended.push((id, block));
        }
        for (id, block) in ended {
            self.under_way.remove(&id);
            self.busy.remove(&block);
        }
    }
}

/// One history; panics where a promise is broken. Gives the number of acknowledged changes.
fn history(seed: u64, nodes: &[NodeId], mischief: Option<Mischief>) -> u64 {
    // A third of them with a volume that is encrypted at rest.
    let mut world = if seed % 3 == 1 { World::encrypted(seed, nodes) } else { World::new(seed, nodes) };
    world.until_serving(nodes[0]);
    if let Some(mischief) = mischief {
        world.lets_through = mischief;
    }
    // Half of them in a busy shell, which gives what has come together at once.
    world.turn_time = if seed % 2 == 1 { Duration::from_micros(300) } else { Duration::ZERO };
    let mut luck = Luck::new(seed ^ 0x5eed);
    let mut clients = Clients::new();
    let mut tainted = None;
    for _ in 0..120 {
        for _ in 0..luck.below(6) {
            clients.issue(&mut world, &mut luck);
        }
        disturb(&mut world, &mut luck, &mut tainted);
        clients.check(&world);
        let time = match luck.below(4) {
            0 => ms(luck.below(1500)),
            1 => ms(luck.below(100)),
            _ => std::time::Duration::from_micros(luck.below(3000)),
        };
        let end = world.now + time;
        while world.step(end) {
            clients.check(&world);
        }
        world.now = end;
    }
    calm(&mut world);
    world.until_healthy();
    clients.check(&world);
    let primary = world.spec.record.primary;
    world.until("all requests answered", |world| {
        clients.check(world);
        clients.under_way.is_empty()
    });
    let blocks: Vec<u64> = clients.possible.keys().copied().collect();
    for block in blocks {
        let values = world.read_values(primary, block);
        clients.see(block, values, || format!("seed {seed}, in the end"));
    }
    world.run_for(ms(50));
    let expected = world.sectors(primary);
    for node in nodes {
        assert!(
            world.sectors(*node) == expected,
            "seed {seed}: the replica of {node} differs from the one of {primary}"
        );
    }
    clients.acknowledged
}

/// Everything that can be mended is.
fn calm(world: &mut World) {
    let nodes: Vec<NodeId> = world.machines.keys().copied().collect();
    for node in &nodes {
        world.machine(*node).is_deaf = false;
        if world.machine(*node).plane.is_none() {
            world.start(*node);
        }
    }
    for (index, a) in nodes.iter().enumerate() {
        for b in &nodes[index + 1..] {
            world.heal(*a, *b);
        }
        let spec = world.spec.clone();
        world.order(*a, pollux_base::Order::Group(spec));
    }
}

/// Something happens, most times nothing. The control plane never chooses a primary that is not in sync, and never lets a
/// record go without a living member.
///
/// `tainted` lost power and with it, maybe, what was acknowledged but not flushed. One further failure before it is
/// compared may lose that for good, as on any disk; so nobody else dies meanwhile, and it is not chosen as primary.
fn disturb(world: &mut World, luck: &mut Luck, tainted: &mut Option<NodeId>) {
    let nodes: Vec<NodeId> = world.machines.keys().copied().collect();
    let any = nodes[luck.below(nodes.len() as u64) as usize];
    let other = *nodes.iter().find(|node| **node != any).expect("there are two");
    let runs = |world: &World, node: NodeId| world.machines[&node].plane.is_some();
    let record = &world.spec.record;
    let primary = record.primary;
    let living: Vec<NodeId> =
        record.in_sync.iter().copied().filter(|node| runs(world, *node) && *tainted != Some(*node)).collect();
    let is_compared = |node: &NodeId| !record.in_sync.contains(node) || world.is_serving(primary) && runs(world, *node);
    if tainted.is_some_and(|node| is_compared(&node)) {
        *tainted = None;
    }
    match luck.below(24) {
        0 if runs(world, any) && tainted.is_none() => world.kill(any),
        1 if tainted.is_none() && world.is_serving(primary) && living.len() > 1 && living.contains(&any) => {
            world.power_cut(any);
            *tainted = Some(any);
        }
        2..=5 if !runs(world, any) => world.start(any),
        6 => world.cut(any, other),
        7 => world.silence(any, other),
        8..=11 => world.heal(any, other),
        12 => world.flap(any, other),
        // The primary is dead, or believed to be: a member takes over, and the old one hears of it late or not.
        13..=15 => {
            if let Some(next) = living.iter().copied().find(|node| *node != primary) {
                let mut in_sync = record.in_sync.clone();
                if !runs(world, primary) || luck.one_in(2) {
                    in_sync.remove(&primary);
                    world.machine(primary).is_deaf = luck.one_in(2);
                }
                world.decide(next, in_sync);
            }
        }
        16 => world.machine(any).is_deaf = false,
        _ => {}
    }
}

#[test]
fn two_replicas_keep_every_promise_whatever_happens() {
    let acknowledged: u64 = (0..30).map(|seed| history(seed, &[A, B], None)).sum();
    assert!(acknowledged > 300, "the histories are not empty: {acknowledged}");
}

#[test]
fn three_replicas_keep_every_promise_whatever_happens() {
    let acknowledged: u64 = (1000..1020).map(|seed| history(seed, &[A, B, C], None)).sum();
    assert!(acknowledged > 300, "the histories are not empty: {acknowledged}");
}

/// More seeds, or one by itself: `SEEDS=7..8 cargo test -p pollux-replica --test random seeds -- --nocapture`. From 1000
/// on there are three nodes.
#[test]
#[allow(clippy::disallowed_methods)] // a test may read its environment
fn any_seeds_can_be_looked_at() {
    let seeds = std::env::var("SEEDS").unwrap_or("1..2".to_string());
    let (first, end) = seeds.split_once("..").expect("SEEDS is first..end");
    for seed in first.parse().expect("a number")..end.parse().expect("a number") {
        println!("seed {seed}");
        history(seed, if seed >= 1000 { &[A, B, C] } else { &[A, B] }, None);
    }
}

/// Runs histories with a broken protocol until one of them is found out, by what clients read or by replicas that differ.
fn must_be_caught(what: &str, mischief: fn() -> Mischief) {
    // Skipped candidates show in one history of seventy; the first of these is near.
    let caught = (300..340).any(|seed| {
        let result = std::panic::catch_unwind(|| history(seed, &[A, B], Some(mischief())));
        let told = result.err().and_then(|told| told.downcast_ref::<String>().cloned()).unwrap_or_default();
        told.contains("possible") || told.contains("differs from")
    });
    assert!(caught, "nobody noticed that {what}");
}

#[test]
fn the_check_catches_candidates_that_are_skipped() {
    must_be_caught("candidates are skipped", || {
        Box::new(|_, _, frame| {
            if let Message::Join { stamp, standing, extents, .. } = &mut frame.message {
                extents.clear();
                if let Standing::Stale { since } = standing {
                    *since = Some(*stamp);
                }
            }
            true
        })
    });
}

#[test]
fn the_check_catches_a_verdict_that_nothing_differs() {
    must_be_caught("differences are denied", || {
        Box::new(|_, _, frame| {
            if let Message::Differs { runs, .. } = &mut frame.message {
                runs.clear();
            }
            true
        })
    });
}

#[test]
fn the_check_catches_writes_that_are_acknowledged_but_not_made() {
    must_be_caught("writes are not made", || {
        let mut count = 0;
        Box::new(move |_, _, frame| {
            if let Message::Write { group, stamp, sequence, .. } = frame.message {
                count += 1;
                if count % 10 == 0 {
                    *frame = Frame::bare(Message::Flush { group, stamp, sequence });
                }
            }
            true
        })
    });
}
