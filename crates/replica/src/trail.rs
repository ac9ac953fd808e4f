//! The primary's side of trailing replicas (mode `Async`): the backlog of acknowledged changes, and how far each is behind.
//!
//! held <= sent <= end, for every trailing replica. A change is in the backlog from when it is answered until every
//! trailing replica holds it durably. Positions count the changes of one run of the primary. What is sent is in order, so
//! what a replica holds is always a prefix (`docs/design/0005-modes.md`).

use crate::Output;
use crate::group::Group;
use crate::loss::ANSWER_LATE;
use crate::node::Node;
use crate::primary::{MemberState, Primary, What};
use crate::requests::slice;
use crate::spool::{CHANGE_BYTES_MAX, Change};
use crate::wire::{Frame, Message, TrailPoint, TrailRun};
use pollux_base::order::Lag;
use pollux_base::record::{AtBound, LagBound, Mode};
use pollux_base::{Generation, Instant, NodeId, Stamp};
use std::collections::{BTreeMap, VecDeque};

/// Bytes on their way to one replica: two batches, so that one is sent while the other is written there.
const WINDOW_BYTES: u64 = 2 * crate::spool::BATCH_BYTES;
/// Changes on their way to one replica.
const WINDOW_CHANGES: u64 = 2 * crate::spool::BATCH_CHANGES as u64;
/// Changes kept in all; more would cost more memory than their bytes.
const CHANGES_MAX: usize = 256 << 10;

struct Kept {
    change: Change,
    point: TrailPoint,
    acked: Instant,
}

/// Acknowledged changes that a trailing replica may lack.
#[derive(Default)]
pub(crate) struct Backlog {
    run: TrailRun,
    began: Instant,
    kept: VecDeque<Kept>,
    end: TrailPoint,
}

/// How far one replica is.
#[derive(Clone, Debug)]
pub(crate) struct Trail {
    /// It holds this durably.
    held: TrailPoint,
    /// Position up to which changes were sent in this session.
    sent: u64,
    /// When it is at this position, it holds everything of the generations before this record's.
    mark: Option<(u64, Stamp)>,
    /// When it last got on, or had nothing to get on with.
    moved: Instant,
}

impl Backlog {
    /// The backlog of a primary that begins now.
    pub(crate) fn begin(&mut self, node: &Node, stamp: Stamp) {
        self.run = TrailRun { stamp, boot: node.boot, started: node.started().0 };
        self.began = node.now;
    }

    fn first(&self) -> u64 {
        self.end.position + 1 - self.kept.len() as u64
    }

    fn get(&self, position: u64) -> Option<&Kept> {
        let index = position.checked_sub(self.first())?;
        self.kept.get(usize::try_from(index).ok()?)
    }

    /// The point at this position, if the backlog reaches back to it.
    fn point(&self, position: u64) -> Option<TrailPoint> {
        if position == self.end.position {
            return Some(self.end);
        }
        self.get(position).map(|kept| kept.point)
    }

    fn lag(&self, trail: &Trail, now: Instant) -> Lag {
        let oldest = self.get(trail.held.position + 1);
        Lag {
            bytes: self.end.bytes - trail.held.bytes,
            ms: oldest.map_or(0, |kept| u64::try_from(now.since(kept.acked).as_millis()).unwrap_or(u64::MAX)),
        }
    }

    fn is_over(&self, trail: &Trail, bound: LagBound, now: Instant) -> bool {
        let lag = self.lag(trail, now);
        let changes = self.end.position - trail.held.position;
        lag.bytes > bound.bytes.0 || lag.ms > bound.ms || changes > CHANGES_MAX as u64
    }
}

impl Primary {
    pub(crate) fn trails(&self) -> impl Iterator<Item = (NodeId, &MemberState, &Trail)> {
        let members = self.members.iter();
        members.filter_map(|(peer, member)| member.trail.as_ref().map(|trail| (*peer, &member.state, trail)))
    }

    /// Whether what is acknowledged is to follow anybody.
    pub(crate) fn has_followers(&self) -> bool {
        self.members.values().any(|member| member.trail.is_some())
    }

    /// A trailing replica is as far behind as it may be, and gets on: new changes wait for it.
    pub(crate) fn is_slowed(&self, bound: LagBound, now: Instant) -> bool {
        bound.at_bound == AtBound::Slow
            && self.trails().any(|(_, state, trail)| {
                matches!(state, MemberState::Copying(_) | MemberState::Trailing)
                    && self.backlog.is_over(trail, bound, now)
            })
    }

    /// Whether any replica lacks something.
    pub(crate) fn is_any_behind(&self) -> bool {
        self.trails().any(|(_, _, trail)| trail.held.position < self.backlog.end.position)
    }

    /// How far each trailing replica is behind.
    pub(crate) fn lags(&self, now: Instant) -> BTreeMap<NodeId, Lag> {
        self.trails().map(|(peer, _, trail)| (peer, self.backlog.lag(trail, now))).collect()
    }

    /// Forgets what every trailing replica holds.
    fn trim_backlog(&mut self) {
        let needed = self.trails().map(|(_, _, trail)| trail.held.position).min();
        while self.backlog.kept.front().is_some_and(|kept| needed.is_none_or(|held| kept.point.position <= held)) {
            self.backlog.kept.pop_front();
        }
    }
}

impl Group {
    /// A change was answered: it is the next one of the group's stream.
    pub(crate) fn append_to_backlog(&mut self, node: &mut Node, change: Change) {
        let now = node.now;
        let Some(primary) = &mut self.primary else { return };
        let backlog = &mut primary.backlog;
        let bytes = change.bytes();
        backlog.end = TrailPoint {
            position: backlog.end.position + 1,
            bytes: backlog.end.bytes + bytes,
            ms: u64::try_from(now.since(backlog.began).as_millis()).unwrap_or(u64::MAX),
        };
        let point = primary.backlog.end;
        primary.backlog.kept.push_back(Kept { change, point, acked: now });
        if bytes > CHANGE_BYTES_MAX {
            return self.drop_trails(node, |_, _| true, "a change was too large to be followed");
        }
        self.keep_to_bound(node);
        self.send_backlog(node);
    }

    /// Whoever may not hold writers and is as far behind as it may be is given up.
    fn keep_to_bound(&mut self, node: &mut Node) {
        let Some(bound) = self.spec.as_ref().map(|spec| spec.lag) else { return };
        let now = node.now;
        let reason = "it was as far behind as it may be";
        self.drop_trails(
            node,
            |primary, (state, trail)| {
                let is_here = matches!(state, MemberState::Copying(_) | MemberState::Trailing);
                (bound.at_bound == AtBound::Drop || !is_here) && primary.backlog.is_over(trail, bound, now)
            },
            reason,
        );
    }

    fn drop_trails(
        &mut self,
        node: &mut Node,
        is_hit: impl Fn(&Primary, (&MemberState, &Trail)) -> bool,
        reason: &str,
    ) {
        let Some(primary) = &self.primary else { return };
        let hit: Vec<NodeId> = primary
            .trails()
            .filter(|(_, state, trail)| is_hit(primary, (state, trail)))
            .map(|(peer, ..)| peer)
            .collect();
        for peer in hit {
            let Some(primary) = &mut self.primary else { return };
            let is_away = primary.members.get(&peer).is_some_and(|member| matches!(member.state, MemberState::Away));
            if is_away {
                self.end_trail(peer);
            } else {
                self.make_unfit(node, peer, reason.to_string());
            }
        }
    }

    /// The replica is to be brought up to date before it may trail again.
    pub(crate) fn end_trail(&mut self, peer: NodeId) {
        let Some(primary) = &mut self.primary else { return };
        if let Some(member) = primary.members.get_mut(&peer) {
            member.trail = None;
        }
        primary.trim_backlog();
    }

    /// The replica is about to be compared: it notes that it is no cut any more, and what is answered from now on follows.
    pub(crate) fn begin_trail(&mut self, node: &mut Node, peer: NodeId) {
        let group = self.id;
        let now = node.now;
        let Some(primary) = &mut self.primary else { return };
        let (run, from) = (primary.backlog.run, primary.backlog.end);
        if let Some(member) = primary.members.get_mut(&peer) {
            let follows = member.mode == Mode::Async;
            member.trail = follows.then_some(Trail { held: from, sent: from.position, mark: None, moved: now });
        }
        let Some((sequence, stamp)) = self.ask(node, peer, What::TrailReset) else { return };
        node.send_bare(peer, Message::TrailReset { group, stamp, sequence, run, from });
    }

    /// A replica that trails is back in time: it goes on where it was. Whether that was possible.
    pub(crate) fn resume_trail(&mut self, node: &mut Node, peer: NodeId, run: TrailRun, position: u64) -> bool {
        let now = node.now;
        let Some(stamp) = self.acting().map(|spec| spec.record.stamp) else { return false };
        let Some(primary) = &mut self.primary else { return false };
        let backlog = &primary.backlog;
        let (known, end) = (backlog.point(position), backlog.end.position);
        let Some(member) = primary.members.get_mut(&peer) else { return false };
        let Some(trail) = &mut member.trail else { return false };
        if run != backlog.run || position < trail.held.position {
            return false;
        }
        let point = if position == trail.held.position { Some(trail.held) } else { known };
        let Some(point) = point else { return false };
        *trail = Trail { held: point, sent: position, mark: Some((end, stamp)), moved: now };
        member.state = MemberState::Trailing;
        primary.trim_backlog();
        self.send_backlog(node);
        true
    }

    /// Nothing is left to compare: when the replica is where the backlog ends now it is a cut.
    pub(crate) fn trail_from_here(&mut self, node: &mut Node, peer: NodeId) {
        let Some(stamp) = self.acting().map(|spec| spec.record.stamp) else { return };
        let Some(primary) = &mut self.primary else { return };
        let end = primary.backlog.end.position;
        let Some(member) = primary.members.get_mut(&peer) else { return };
        match &mut member.trail {
            Some(trail) => trail.mark = Some((end, stamp)),
            None => return self.make_unfit(node, peer, "it was too far behind while it was compared".to_string()),
        }
        member.state = MemberState::Trailing;
        self.send_backlog(node);
    }

    /// Sends what the window lets through.
    fn send_backlog(&mut self, node: &mut Node) {
        let group = self.id;
        let Some(stamp) = self.acting().map(|spec| spec.record.stamp) else { return };
        let Some(Primary { members, backlog, .. }) = &mut self.primary else { return };
        let (run, end) = (backlog.run, backlog.end);
        for (peer, member) in members {
            let (Some(trail), MemberState::Copying(_) | MemberState::Trailing) = (&mut member.trail, &member.state)
            else {
                continue;
            };
            loop {
                if let Some((position, at)) = trail.mark
                    && trail.sent >= position
                {
                    trail.mark = None;
                    node.send_bare(*peer, Message::TrailMark { group, stamp, run, at });
                }
                let Some(next) = backlog.get(trail.sent + 1) else { break };
                let under_way = next.point.bytes - trail.held.bytes;
                if trail.sent > trail.held.position
                    && (under_way > WINDOW_BYTES || trail.sent - trail.held.position >= WINDOW_CHANGES)
                {
                    break;
                }
                if trail.sent == trail.held.position {
                    trail.moved = node.now;
                }
                trail.sent = next.point.position;
                for frame in frames(group, stamp, run, next, end) {
                    if let Some(session) = node.session(*peer) {
                        node.out.push_back(Output::Send { peer: *peer, session, frame });
                    }
                }
            }
        }
    }

    /// The replica holds everything up to this position durably.
    pub(crate) fn on_trailed(&mut self, node: &mut Node, peer: NodeId, run: TrailRun, position: u64) {
        let now = node.now;
        let Some(primary) = &mut self.primary else { return };
        let point = primary.backlog.point(position);
        let (Some(point), true) = (point, primary.backlog.run == run) else { return };
        let Some(trail) = primary.members.get_mut(&peer).and_then(|member| member.trail.as_mut()) else { return };
        if position <= trail.held.position {
            return; // ignore_known
        }
        // It may have more than was sent in this session: what was on its way when the one before ended.
        trail.sent = trail.sent.max(position);
        trail.held = point;
        trail.moved = now;
        primary.trim_backlog();
        self.send_backlog(node);
    }

    /// Whether the replica has all that was acknowledged until now.
    pub(crate) fn has_caught_up(&self, peer: NodeId) -> bool {
        let Some(primary) = &self.primary else { return false };
        primary.trails().any(|(other, state, trail)| {
            other == peer
                && matches!(state, MemberState::Trailing)
                && trail.held.position == primary.backlog.end.position
                && trail.mark.is_none()
        })
    }

    /// A replica that does not get on holds nobody up for long.
    pub(crate) fn drop_late_trails(&mut self, node: &mut Node) {
        let now = node.now;
        let awake = node.awake_since;
        let is_late = |trail: &Trail| trail.sent > trail.held.position && now >= trail.moved.max(awake) + ANSWER_LATE;
        let reason = format!("it has not got on for {} s", ANSWER_LATE.as_secs());
        self.drop_trails(node, |_, (state, trail)| !matches!(state, MemberState::Away) && is_late(trail), &reason);
        self.keep_to_bound(node);
    }

    /// When that is to be looked at.
    pub(crate) fn trail_wake(&self, node: &Node) -> Option<Instant> {
        let trails = self.primary.iter().flat_map(Primary::trails);
        let late =
            trails.filter(|(_, state, trail)| !matches!(state, MemberState::Away) && trail.sent > trail.held.position);
        late.map(|(_, _, trail)| node.late_at(trail.moved)).min()
    }

    pub(crate) fn check_trails(&self) {
        let Some(primary) = &self.primary else { return };
        for (peer, member) in &primary.members {
            let Some(trail) = &member.trail else {
                assert!(!matches!(member.state, MemberState::Trailing), "{peer}: a trailing replica has a trail");
                continue;
            };
            assert_eq!(member.mode, Mode::Async, "{peer}: only a replica of that mode trails");
            let end = primary.backlog.end.position;
            assert!(
                trail.held.position <= trail.sent.max(trail.held.position) && trail.sent <= end,
                "{peer}: {trail:?}"
            );
            assert!(primary.backlog.first() <= trail.held.position + 1, "{peer}: what it lacks is kept");
        }
    }
}

/// Before the first generation of which a replica that trails by this record may lack something.
pub(crate) fn before(at: Stamp) -> Stamp {
    Stamp { epoch: at.epoch, generation: Generation(at.generation.0.saturating_sub(1)) }
}

/// A change as frames of at most an extent.
fn frames(group: pollux_base::GroupId, stamp: Stamp, run: TrailRun, kept: &Kept, end: TrailPoint) -> Vec<Frame> {
    let Kept { change: Change { volume, range, blocks }, point, .. } = kept;
    let message =
        |range, is_last| Message::Trail { group, stamp, run, point: *point, end, volume: *volume, range, is_last };
    let Some((data, checksums)) = blocks else { return vec![Frame::bare(message(*range, true))] };
    let parts = range.split_by_extent().map(|part| Frame {
        message: message(part, part.end() == range.end()),
        checksums: checksums[part.places_in(*range)].to_vec(),
        data: Some(slice(data, *range, part)),
    });
    parts.collect()
}
