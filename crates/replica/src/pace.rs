//! How fast this node brings replicas up to date beside its guests' I/O: one budget for all groups and targets.
//!
//! * While guests ask nothing, as fast as it goes: up to 32 MiB in 256 pieces under way on each link.
//! * While they do, what is sent is cut into pieces that take a link no longer than half the guests' own p99, so that a
//!   request that queues behind two is about doubled; and only a share of what the link was measured to carry is used. The share is
//!   halved when the p99 of any kind of request is more than doubled against those that met no piece, and grows in
//!   small steps while it is not. It never falls below `SHARE_MIN`: a resync is never starved.
//!
//! A scrub works one piece at a time, for a quarter of that share of the time, and while no replica is brought up to date.
//!
//! Rates are measured, none is set: what a link (the disks at both of its ends included) carries is what pieces were seen
//! to need. Groups on one link take turns, piece by piece.

use pollux_base::unit::BLOCK_BYTES;
use pollux_base::{GroupId, Instant, NodeId};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// Pieces and comparisons under way on one link at most: what differs may be single blocks, each of which waits for a flush there,
/// which it shares with those that came with it.
pub(crate) const PIECES_MAX: usize = 256;
/// Bytes of them at most: enough to keep both disks and the link busy beside those flushes. Both nodes hold them in memory.
const PIECES_BYTES_MAX: u64 = 32 << 20;
/// Pieces under way on one link while guests are at work: one is written while the next is read.
const PIECES_BESIDE: usize = 2;
/// Largest piece: beyond 1 MiB disks and links get no faster.
const PIECE_BLOCKS_MAX: u64 = (1 << 20) / BLOCK_BYTES;
/// Smallest piece: below 32 KiB its own cost outweighs what waits behind it.
const PIECE_BLOCKS_MIN: u64 = (32 << 10) / BLOCK_BYTES;
/// Guests that asked nothing for so long have nothing under way that a healthy disk would not have answered.
const QUIET: Duration = Duration::from_secs(1);
/// The share of a link is counted in these parts.
const SHARE_WHOLE: u64 = 64;
/// A quarter more than what was measured, to find out whether the link carries more.
const SHARE_MAX: u64 = SHARE_WHOLE + SHARE_WHOLE / 4;
/// Never less than a sixteenth: what would take an hour on an idle node is done within a day under any load.
const SHARE_MIN: u64 = SHARE_WHOLE / 16;
/// From the least to the most in nineteen steps that went well.
const SHARE_STEP: u64 = SHARE_WHOLE / 16;
/// A scrub is at work a quarter of the time, of what a resync would take: it has a week.
const SCRUB_PART: u64 = 4;
/// Guests' p99 may be so many times what it is without a resync.
const P99_TIMES_MAX: u64 = 2;
/// Answers after which the share is judged again, if they come faster than `JUDGE_EVERY`: enough for a p99.
const JUDGE_ANSWERS: u64 = 128;
const JUDGE_EVERY: Duration = Duration::from_secs(1);
/// Fewer answers than these are chance.
const ANSWERS_MIN: u64 = 16;
/// Answers of which half are forgotten: a guest that works differently now is judged by how it works now.
const ANSWERS_KEPT: u64 = 4096;
/// A rate is taken over at least this time, so that it holds more than one piece.
const RATE_OVER: Duration = Duration::from_millis(20);

/// What a client asked; their latencies differ by nature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Read,
    Change,
    Flush,
}

const KINDS: usize = 3;

/// One node's budget.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Answers that met no piece, and (while a resync runs) all since the share was last judged.
    clear: [Latencies; KINDS],
    beside: [Latencies; KINDS],
    judged: Instant,
    share: u64,
    /// When a client last asked or was answered.
    asked: Option<Instant>,
    links: BTreeMap<NodeId, Flow>,
    scrub: ScrubFlow,
}

/// What a scrub reads, here and at its peers at once.
#[derive(Debug, Default)]
struct ScrubFlow {
    /// Since when something is under way.
    began: Option<Instant>,
    ended: Instant,
    next: Instant,
    /// Measured: bytes per second while at work.
    rate: u64,
    turns: VecDeque<GroupId>,
}

/// Pieces on one link.
#[derive(Debug, Default)]
struct Flow {
    under_way: usize,
    bytes: u64,
    /// The last of them ended then.
    ended: Instant,
    /// The next may begin then, if guests are at work.
    next: Instant,
    /// Measured: bytes per second; 0: not yet.
    rate: u64,
    measure: Option<Measure>,
    /// Whose turn it is next.
    turns: VecDeque<GroupId>,
}

/// Whether one more piece may begin beside so many.
pub(crate) fn has_room(pieces: usize, bytes: u64) -> bool {
    pieces < PIECES_MAX && bytes < PIECES_BYTES_MAX
}

impl Flow {
    fn has_room(&self) -> bool {
        has_room(self.under_way, self.bytes)
    }
}

/// A rate being measured, while pieces are under way without a break.
#[derive(Debug)]
struct Measure {
    since: Instant,
    bytes: u64,
    /// The link was kept as busy as it may be all the time.
    is_full: bool,
}

impl Pace {
    pub(crate) fn new(now: Instant) -> Pace {
        Pace {
            clear: Default::default(),
            beside: Default::default(),
            judged: now,
            share: SHARE_MIN,
            asked: None,
            links: BTreeMap::new(),
            scrub: ScrubFlow::default(),
        }
    }

    /// A client asks something now.
    pub(crate) fn on_asked(&mut self, now: Instant) {
        self.asked = Some(now);
    }

    /// A client is answered what it asked at `asked`.
    pub(crate) fn on_answered(&mut self, now: Instant, asked: Instant, kind: Kind) {
        self.asked = Some(now);
        let latency = now.since(asked);
        let met_piece = self.links.values().any(|flow| flow.under_way > 0 || flow.ended > asked)
            || self.scrub.began.is_some()
            || self.scrub.ended > asked;
        if !met_piece {
            self.clear[kind as usize].add(latency);
        }
        if self.is_running(now) {
            self.beside[kind as usize].add(latency);
            self.judge(now);
        }
    }

    /// Whether anything is brought anywhere, or was a moment ago.
    fn is_running(&self, now: Instant) -> bool {
        let runs = |flow: &Flow| {
            flow.under_way > 0 || !flow.turns.is_empty() || flow.ended > Instant(0) && now < flow.ended + QUIET
        };
        let scrub = &self.scrub;
        let scrubs = scrub.began.is_some() || !scrub.turns.is_empty();
        scrubs || self.links.values().any(runs)
    }

    fn judge(&mut self, now: Instant) {
        let answers = self.beside.iter().map(|latencies| latencies.count).max().unwrap_or(0);
        if answers < JUDGE_ANSWERS && now < self.judged + JUDGE_EVERY {
            return;
        }
        self.judged = now;
        // In halves of what it is without a resync; the worst kind counts.
        let ratio = |(beside, clear): (&Latencies, &Latencies)| {
            let enough = beside.count >= ANSWERS_MIN && clear.count >= ANSWERS_MIN;
            enough.then(|| 2 * beside.p99().as_nanos() as u64 / (clear.p99().as_nanos() as u64).max(1))
        };
        let worst = self.beside.iter().zip(&self.clear).filter_map(ratio).max();
        self.share = match worst {
            // Nothing to judge by: at the least share answers that meet no piece will come.
            None => SHARE_MIN,
            Some(halves) if halves > 2 * P99_TIMES_MAX => (self.share / 2).max(SHARE_MIN),
            Some(halves) if halves == 2 * P99_TIMES_MAX => self.share,
            Some(_) => (self.share + SHARE_STEP).min(SHARE_MAX),
        };
        self.beside.iter_mut().for_each(Latencies::clear);
    }

    fn is_quiet(&self, now: Instant) -> bool {
        self.asked.is_none_or(|asked| now >= asked + QUIET)
    }

    /// How many blocks a piece for this peer has now at most.
    pub(crate) fn piece_blocks(&self, now: Instant, peer: NodeId) -> u64 {
        self.blocks_within_p99(now, self.links.get(&peer).map_or(0, |flow| flow.rate))
    }

    fn blocks_within_p99(&self, now: Instant, rate: u64) -> u64 {
        if self.is_quiet(now) {
            return PIECE_BLOCKS_MAX;
        }
        let known = self.clear.iter().filter(|latencies| latencies.count >= ANSWERS_MIN);
        let p99 = known.map(Latencies::p99).min().unwrap_or_default();
        let bytes = u128::from(rate) * p99.as_nanos() / 2 / 1_000_000_000;
        (bytes as u64 / BLOCK_BYTES).clamp(PIECE_BLOCKS_MIN, PIECE_BLOCKS_MAX)
    }

    /// The group wants to begin something on the link to the peer: its turn will come (`next_turn`).
    pub(crate) fn queue(&mut self, peer: NodeId, group: GroupId) {
        let turns = &mut self.links.entry(peer).or_default().turns;
        if !turns.contains(&group) {
            turns.push_back(group);
        }
    }

    /// A group that may begin one thing now, and with which peer.
    pub(crate) fn next_turn(&mut self, now: Instant) -> Option<(GroupId, NodeId)> {
        let is_quiet = self.is_quiet(now);
        let may = |flow: &Flow| {
            let is_time = is_quiet || flow.under_way < PIECES_BESIDE && now >= flow.next;
            !flow.turns.is_empty() && flow.has_room() && is_time
        };
        let (peer, flow) = self.links.iter_mut().find(|(_, flow)| may(flow))?;
        flow.turns.pop_front().map(|group| (group, *peer))
    }

    /// When `next_turn` may give something that it does not now.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let waits = self.links.values().filter(|flow| !flow.turns.is_empty() && flow.has_room());
        // Guests may fall quiet before the link's share allows more.
        let quiet = self.asked.map(|asked| asked + QUIET);
        let due = waits.filter_map(|flow| {
            let next = Some(flow.next).filter(|_| flow.under_way < PIECES_BESIDE);
            next.into_iter().chain(quiet).min()
        });
        // Resyncs that go first end in a call, after which scrubs are looked at again.
        due.chain(Some(self.scrub.next).filter(|_| self.scrub_waits())).min()
    }

    /// Something of so many bytes begins on the link.
    pub(crate) fn begin(&mut self, now: Instant, peer: NodeId, bytes: u64) {
        let is_quiet = self.is_quiet(now);
        let share = self.share;
        let flow = self.links.entry(peer).or_default();
        flow.under_way += 1;
        flow.bytes += bytes;
        let is_full = is_quiet || share >= SHARE_WHOLE;
        let measure = flow.measure.get_or_insert(Measure { since: now, bytes: 0, is_full });
        measure.is_full &= is_full;
        let parts = u128::from(bytes) * u128::from(SHARE_WHOLE) * 1_000_000_000;
        if let Some(nanos) = parts.checked_div(u128::from(flow.rate) * u128::from(share)).filter(|_| !is_quiet) {
            let takes = Duration::from_nanos(nanos as u64);
            // Who was kept from its share for a while may catch up by one piece, not by all that it missed.
            flow.next = flow.next.max(now - takes) + takes;
        }
    }

    /// It has ended, or was given up.
    pub(crate) fn end(&mut self, now: Instant, peer: NodeId, bytes: u64) {
        let Some(flow) = self.links.get_mut(&peer) else { return };
        flow.under_way = flow.under_way.saturating_sub(1);
        flow.bytes = flow.bytes.saturating_sub(bytes);
        flow.ended = now;
        let Some(measure) = &mut flow.measure else { return };
        measure.bytes += bytes;
        let took = now.since(measure.since);
        if took >= RATE_OVER || flow.under_way == 0 && !took.is_zero() {
            let rate = (u128::from(measure.bytes) * 1_000_000_000 / took.as_nanos()) as u64;
            // A link that was not kept busy shows only that it carries at least so much.
            flow.rate = match measure.is_full && took >= RATE_OVER {
                true => flow.rate.max(rate) - flow.rate.saturating_sub(rate) / 8,
                false => flow.rate.max(rate),
            };
            let is_full = measure.is_full;
            flow.measure = (flow.under_way > 0).then_some(Measure { since: now, bytes: 0, is_full });
        } else if flow.under_way == 0 {
            flow.measure = None;
        }
    }

    /// The group's scrub wants to begin something: its turn will come (`next_scrub`).
    pub(crate) fn queue_scrub(&mut self, group: GroupId) {
        if !self.scrub.turns.contains(&group) {
            self.scrub.turns.push_back(group);
        }
    }

    /// Whether a scrub would begin something if it were time. Resyncs go first: they restore what is promised.
    fn scrub_waits(&self) -> bool {
        let is_busy = |flow: &Flow| flow.under_way > 0 || !flow.turns.is_empty();
        self.scrub.began.is_none() && !self.scrub.turns.is_empty() && !self.links.values().any(is_busy)
    }

    /// A group whose scrub may begin one thing now.
    pub(crate) fn next_scrub(&mut self, now: Instant) -> Option<GroupId> {
        if !self.scrub_waits() || now < self.scrub.next {
            return None;
        }
        self.scrub.turns.pop_front()
    }

    /// How many blocks a scrub reads at once at most.
    pub(crate) fn scrub_blocks(&self, now: Instant) -> u64 {
        self.blocks_within_p99(now, self.scrub.rate)
    }

    pub(crate) fn begin_scrub(&mut self, now: Instant) {
        self.scrub.began = Some(now);
    }

    /// What a scrub began has ended, with so many bytes read; it rests in proportion.
    pub(crate) fn end_scrub(&mut self, now: Instant, bytes: u64) {
        let Some(began) = self.scrub.began.take() else { return };
        let took = now.since(began);
        let rest = self.rest(now, took);
        let scrub = &mut self.scrub;
        scrub.ended = now;
        scrub.next = now + rest;
        if !took.is_zero() {
            let rate = (u128::from(bytes) * 1_000_000_000 / took.as_nanos()) as u64;
            scrub.rate = rate.max(scrub.rate - scrub.rate / 8);
        }
    }

    /// How long whoever looks at the disks beside all of this rests after something that took so long: in proportion, like a scrub.
    pub(crate) fn rest(&self, now: Instant, took: Duration) -> Duration {
        let share = if self.is_quiet(now) { SHARE_WHOLE } else { self.share };
        took * (SCRUB_PART * SHARE_WHOLE / share - 1) as u32
    }

    pub(crate) fn check(&self) {
        assert!((SHARE_MIN..=SHARE_MAX).contains(&self.share), "a resync is never starved");
        for (peer, flow) in &self.links {
            // The last one begun may be as large as any.
            let bytes_max = PIECES_BYTES_MAX + PIECE_BLOCKS_MAX * BLOCK_BYTES;
            assert!(flow.under_way <= PIECES_MAX && flow.bytes <= bytes_max, "{peer}: what is under way is bounded");
        }
    }
}

/// Latencies counted in buckets that grow by an eighth.
#[derive(Debug)]
struct Latencies {
    buckets: [u32; BUCKETS],
    count: u64,
}

/// Eight for each power of two of nanoseconds, up to more than a minute.
const BUCKETS: usize = 8 * 37;

impl Default for Latencies {
    fn default() -> Latencies {
        Latencies { buckets: [0; BUCKETS], count: 0 }
    }
}

impl Latencies {
    fn add(&mut self, latency: Duration) {
        self.buckets[bucket_of(latency)] += 1;
        self.count += 1;
        if self.count >= ANSWERS_KEPT {
            self.buckets.iter_mut().for_each(|count| *count /= 2);
            self.count = self.buckets.iter().map(|count| u64::from(*count)).sum();
        }
    }

    fn clear(&mut self) {
        *self = Latencies::default();
    }

    /// All but one in a hundred are below.
    fn p99(&self) -> Duration {
        let above = self.count / 100;
        let mut seen = 0;
        for (bucket, count) in self.buckets.iter().enumerate().rev() {
            seen += u64::from(*count);
            if seen > above {
                return upper_end(bucket);
            }
        }
        Duration::ZERO
    }
}

fn bucket_of(latency: Duration) -> usize {
    let nanos = (latency.as_nanos() as u64).max(8);
    let power = 63 - nanos.leading_zeros() as usize;
    let eighth = (nanos >> (power - 3)) as usize & 7;
    ((power - 3) * 8 + eighth).min(BUCKETS - 1)
}

fn upper_end(bucket: usize) -> Duration {
    let (power, eighth) = (bucket / 8 + 3, bucket as u64 % 8);
    Duration::from_nanos((9 + eighth) << (power - 3))
}

/// How fast something advances, over the last seconds: for progress with the time that is left.
#[derive(Debug)]
pub(crate) struct Meter {
    /// When, and how many units and bytes were done by then.
    marks: VecDeque<(Instant, u64, u64)>,
}

/// Marks kept, one a second: long enough to be steady, short enough to follow the guests' load.
const MARKS: usize = 16;
const MARK_EVERY: Duration = Duration::from_secs(1);

impl Meter {
    pub(crate) fn new(now: Instant) -> Meter {
        Meter { marks: VecDeque::from([(now, 0, 0)]) }
    }

    /// So much is done by now.
    pub(crate) fn mark(&mut self, now: Instant, units: u64, bytes: u64) {
        if self.marks.back().is_none_or(|(at, _, _)| now >= *at + MARK_EVERY) {
            self.marks.push_back((now, units, bytes));
            if self.marks.len() > MARKS {
                self.marks.pop_front();
            }
        }
    }

    /// Bytes per second of late, and the seconds that `left` units take at the present rate; `None` until there is one.
    pub(crate) fn rate(&self, now: Instant, units: u64, bytes: u64, left: u64) -> (u64, Option<u64>) {
        let Some((since, units_then, bytes_then)) = self.marks.front().copied() else { return (0, None) };
        let millis = now.since(since).as_millis() as u64;
        if millis == 0 {
            return (0, None);
        }
        let done = units.saturating_sub(units_then);
        let per_second = bytes.saturating_sub(bytes_then).saturating_mul(1000) / millis;
        let seconds = (done > 0).then(|| left.saturating_mul(millis).div_ceil(done).div_ceil(1000));
        (per_second, seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: NodeId = NodeId(2);
    const G: GroupId = GroupId(1);

    fn us(value: u64) -> Duration {
        Duration::from_micros(value)
    }

    /// A node in virtual time: a link that carries `rate`, and guests whose requests take `latency`, and longer by what
    /// they queue behind.
    struct Bench {
        pace: Pace,
        now: Instant,
        link_free: Instant,
        rate: u64,
        /// Ends of pieces under way.
        ends: Vec<(Instant, u64)>,
        latencies: Vec<Duration>,
        moved: u64,
        /// What a request takes longer that is asked while a piece is under way.
        hurts: Duration,
    }

    impl Bench {
        fn new(rate: u64) -> Bench {
            let now = Instant(1_000_000_000_000);
            Bench {
                pace: Pace::new(now),
                now,
                link_free: now,
                rate,
                ends: vec![],
                latencies: vec![],
                moved: 0,
                hurts: us(0),
            }
        }

        /// Takes the link for so many bytes and says when it is done.
        fn carry(&mut self, bytes: u64) -> Instant {
            let takes = Duration::from_nanos((u128::from(bytes) * 1_000_000_000 / u128::from(self.rate)) as u64);
            self.link_free = self.link_free.max(self.now) + takes;
            self.link_free
        }

        /// A while with a request of 4 KiB each `every` (none: no guests), and a resync or not.
        fn run(&mut self, time: Duration, every: Option<Duration>, latency: Duration, resync: bool) {
            let end = self.now + time;
            let mut ask = self.now;
            let mut answers: Vec<(Instant, Instant)> = Vec::new();
            self.latencies.clear();
            self.moved = 0;
            while self.now < end {
                if every.is_some() && self.now >= ask {
                    ask = self.now + every.unwrap_or_default();
                    self.pace.on_asked(self.now);
                    let hurt = if self.ends.is_empty() { us(0) } else { self.hurts };
                    let done = self.carry(4096) + latency + hurt;
                    answers.push((done, self.now));
                }
                answers.sort_unstable();
                while answers.first().is_some_and(|(done, _)| *done <= self.now) {
                    let (_, asked) = answers.remove(0);
                    self.latencies.push(self.now.since(asked));
                    self.pace.on_answered(self.now, asked, Kind::Change);
                }
                self.ends.sort_unstable();
                while self.ends.first().is_some_and(|(done, _)| *done <= self.now) {
                    let (_, bytes) = self.ends.remove(0);
                    self.moved += bytes;
                    self.pace.end(self.now, PEER, bytes);
                }
                if resync {
                    self.pace.queue(PEER, G);
                    while self.pace.next_turn(self.now).is_some() {
                        let bytes = self.pace.piece_blocks(self.now, PEER) * 4096;
                        self.pace.begin(self.now, PEER, bytes);
                        let done = self.carry(bytes) + us(50);
                        self.ends.push((done, bytes));
                        self.pace.queue(PEER, G);
                    }
                }
                self.pace.check();
                self.now = self.now + us(10);
            }
        }

        fn p99(&mut self) -> Duration {
            self.latencies.sort_unstable();
            self.latencies[self.latencies.len() * 99 / 100]
        }
    }

    #[test]
    fn a_resync_beside_guests_doubles_their_p99_at_most_and_uses_the_rest() {
        // 200 MB/s, of which the guests use 8.
        let mut bench = Bench::new(200 << 20);
        bench.run(Duration::from_secs(2), Some(us(500)), us(400), false);
        let alone = bench.p99();
        bench.run(Duration::from_secs(10), Some(us(500)), us(400), true); // finds its share
        bench.run(Duration::from_secs(10), Some(us(500)), us(400), true);
        let beside = bench.p99();
        assert!(beside <= alone * 9 / 4, "{alone:?} alone, {beside:?} beside a resync");
        assert!(bench.moved > 10 * (200 << 20) / 4, "a quarter of the link at least: {} B", bench.moved);
    }

    #[test]
    fn a_resync_is_never_starved_whatever_the_guests_suffer() {
        let mut bench = Bench::new(100 << 20);
        bench.run(Duration::from_secs(2), Some(us(1000)), us(200), false);
        bench.run(Duration::from_secs(2), None, us(0), true); // the link is measured
        // Beside a piece, however small, a request takes twenty times as long.
        bench.hurts = us(4000);
        bench.run(Duration::from_secs(10), Some(us(1000)), us(200), true);
        let least = 10 * (100u64 << 20) / 16;
        assert!(bench.moved >= least * 9 / 10, "{} of {least} B", bench.moved);
        assert!(bench.moved <= least * 3, "and takes no more than it must: {} of {least} B", bench.moved);
    }

    #[test]
    fn a_resync_without_guests_takes_the_whole_link() {
        let mut bench = Bench::new(400 << 20);
        bench.run(Duration::from_secs(2), None, us(0), true);
        assert!(bench.moved > 2 * (400 << 20) * 95 / 100, "{} B", bench.moved);
        // Guests that fall quiet give it back.
        bench.run(Duration::from_secs(2), Some(us(500)), us(100), true);
        bench.run(Duration::from_millis(1100), None, us(0), true);
        bench.run(Duration::from_secs(1), None, us(0), true);
        assert!(bench.moved > (400 << 20) * 95 / 100, "{} B", bench.moved);
    }

    #[test]
    fn a_guest_that_begins_to_work_harder_is_judged_by_how_it_works_now() {
        let mut bench = Bench::new(200 << 20);
        bench.run(Duration::from_secs(2), Some(us(500)), us(100), false);
        bench.run(Duration::from_secs(5), Some(us(500)), us(100), true);
        // Its requests take ten times as long for reasons of their own: the resync is not to blame for good.
        bench.run(Duration::from_secs(20), Some(us(500)), us(1000), true);
        bench.run(Duration::from_secs(5), Some(us(500)), us(1000), true);
        assert!(bench.moved > 5 * (200 << 20) / 4, "{} B", bench.moved);
    }

    #[test]
    fn groups_on_one_link_take_turns_and_share_one_bound() {
        let now = Instant(1_000_000_000_000);
        for (bytes, count) in [(1 << 20, 32), (4096, 256)] {
            let mut pace = Pace::new(now);
            let mut turns = Vec::new();
            for group in [1, 2, 3] {
                pace.queue(PEER, GroupId(group));
            }
            while let Some((group, peer)) = pace.next_turn(now) {
                turns.push(group.0);
                pace.begin(now, peer, bytes);
                pace.queue(peer, group);
            }
            let expected: Vec<u64> = [1, 2, 3].into_iter().cycle().take(count).collect();
            assert_eq!(turns, expected, "so much is under way, whoever it belongs to");
            pace.end(now, PEER, bytes);
            let next = expected[count - 1] % 3 + 1;
            assert_eq!(pace.next_turn(now), Some((GroupId(next), PEER)));
        }
    }

    #[test]
    fn a_p99_is_right_to_an_eighth() {
        let mut latencies = Latencies::default();
        for value in 1..=1000 {
            latencies.add(us(value));
        }
        let p99 = latencies.p99();
        assert!(p99 >= us(990) && p99 <= us(990 * 9 / 8 + 1), "{p99:?}");
        for latency in [Duration::ZERO, Duration::from_secs(1 << 20)] {
            assert!(bucket_of(latency) < BUCKETS);
        }
    }

    #[test]
    fn the_time_left_follows_the_present_rate() {
        let second = Duration::from_secs(1);
        let start = Instant(1_000_000_000);
        let mut meter = Meter::new(start);
        assert_eq!(meter.rate(start, 0, 0, 100), (0, None));
        let mut now = start;
        for done in 1..=40 {
            now = now + second;
            // Ten a second at first, one a second later.
            let units = if done <= 20 { done * 10 } else { 180 + done };
            meter.mark(now, units, units * 1000);
        }
        assert_eq!(meter.rate(now, 220, 220_000, 30), (1000, Some(30)));
    }
}
