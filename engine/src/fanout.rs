//! Fan-out: a shard's connections, its group index, and how a publication reaches its members.
//!
//! Owned by one shard. Puts frames into outboxes and notes the consequences, which the shard applies after
//! the fan-out: which connections to flush, which handlers to notify of drops, which connections to end.
//! Knows connections and groups. Does not know the log, the mailbox or the sockets' poll.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;

use crate::batch::Batch;
use crate::close_reason::CloseReason;
use crate::command::Query;
use crate::connection::Connection;
use crate::connections::Connections;
use crate::deadlines::Deadlines;
use crate::directory::Group;
use crate::entry::{Entry, Named};
use crate::flush_schedule::FlushSchedule;
use crate::group::{GroupIndex, LocalKey};
use crate::id::{ConnectionId, Slot};
use crate::metrics::{GroupMetrics, Metrics};
use crate::outbox::{Chunk, Dropped, Enqueued, Expiry, Retained};
use crate::policy::Policy;
use crate::receipt::{Origin, Ticket};
use crate::tally::DropCause;

/// How a chunk is offered: properties that all of its frames share.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terms<'a> {
    /// Overrides each connection's own policy.
    pub(crate) policy: Option<Policy>,
    /// One for each frame, as far as publishers wait; may be shorter than the chunk.
    pub(crate) tickets: &'a [Option<Ticket>],
    /// The group that they were published to, if it was a single one.
    pub(crate) group: Option<&'a Arc<str>>,
}

impl<'a> Terms<'a> {
    /// Those of a batch, of which this is the first entry. `tickets`: this shard's, if it has any.
    pub(crate) fn of(entry: &'a Entry, tickets: &'a [Option<Ticket>]) -> Self {
        Self { policy: entry.publication.delivery.policy(), tickets, group: entry.group() }
    }

    /// The ticket of a publisher that wants the outcome. Its frame is the only one of its chunk.
    fn receipt(&self) -> Option<&'a Ticket> {
        self.tickets.first()?.as_ref().filter(|ticket| ticket.wants_outcome())
    }

    /// What the first of these frames keeps if it must wait under this policy, and the end of those that keep the same.
    fn origin(&self, policy: Policy, frames: Range<u32>) -> (Option<Origin>, u32) {
        let is_kept = |ticket: &&Ticket| policy.blocks() || ticket.wants_outcome();
        let ticket_of = |frame: u32| self.tickets.get(frame as usize)?.as_ref().filter(is_kept);
        let Range { start, end } = frames;
        let ticket = ticket_of(start);
        let end = match ticket {
            Some(_) => start + 1,
            None => (start + 1..end).find(|frame| ticket_of(*frame).is_some()).unwrap_or(end),
        };
        // Read when a frame expires, which needs a timeout.
        let group = self.group.filter(|_| policy.timeout().is_some());
        let is_needed = ticket.is_some() || group.is_some();
        (is_needed.then(|| Origin { ticket: ticket.cloned(), group: group.cloned() }), end)
    }
}

pub(crate) struct Fanout {
    pub(crate) connections: Connections,
    pub(crate) groups: GroupIndex<Arc<Group>>,
    /// Slots with something to write.
    pub(crate) flushes: FlushSchedule<Slot>,
    /// Connections to end, decided during a fan-out.
    pub(crate) pending_ends: Vec<(ConnectionId, CloseReason)>,
    /// Connections whose handlers must be notified of drops.
    pub(crate) pending_drop_notices: Vec<ConnectionId>,
    /// When waiting frames expire.
    pub(crate) deadlines: Deadlines<ConnectionId>,
    /// Bytes in all outboxes; a chunk counts in each.
    pub(crate) backlog_bytes: usize,
    /// Bytes that they keep in memory; a chunk in several outboxes counts once.
    pub(crate) retained: Retained,
    /// Connections whose sockets accept no more for now.
    pub(crate) refused: usize,
    /// Bytes of messages that are incomplete or wait for their handler.
    pub(crate) unfinished_bytes: usize,
    pub(crate) metrics: Metrics,
    /// The time of this turn, since the shard's start.
    pub(crate) now: Duration,
    /// Everything that arrived before this time has been read.
    pub(crate) listened: Duration,
    /// The earliest time at which the input that is read now may have arrived.
    pub(crate) arrived: Duration,
}

impl Fanout {
    pub(crate) fn new(coalesce: Duration) -> Self {
        Self {
            connections: Connections::default(),
            groups: GroupIndex::new(),
            flushes: FlushSchedule::new(coalesce),
            pending_ends: Vec::new(),
            pending_drop_notices: Vec::new(),
            deadlines: Deadlines::new(),
            backlog_bytes: 0,
            retained: Retained::default(),
            refused: 0,
            unfinished_bytes: 0,
            metrics: Metrics::default(),
            now: Duration::ZERO,
            listened: Duration::ZERO,
            arrived: Duration::ZERO,
        }
    }

    /// Offers the batch to each member of a group; returns their number.
    pub(crate) fn fan_out(&mut self, group: LocalKey, batch: &mut Batch<'_>, terms: Terms<'_>) -> u64 {
        let mut counts = Counts::default();
        for index in 0..self.groups.len(group) {
            let slot = self.groups.member(group, index);
            self.offer_batch(slot, batch, terms, &mut counts);
        }
        counts.report(terms)
    }

    /// Offers the batch to each slot; returns their number.
    pub(crate) fn fan_out_to(&mut self, slots: &[Slot], batch: &mut Batch<'_>, terms: Terms<'_>) -> u64 {
        let mut counts = Counts::default();
        for slot in slots {
            self.offer_batch(*slot, batch, terms, &mut counts);
        }
        counts.report(terms)
    }

    /// Offers those of the batch's publications that the connection must get.
    #[inline]
    fn offer_batch(&mut self, slot: Slot, batch: &mut Batch<'_>, terms: Terms<'_>, counts: &mut Counts) {
        let Some(connection) = self.connections.get(slot) else { return };
        if batch.leaves_out(connection.id()) {
            return self.offer_runs(slot, batch, terms, counts);
        }
        counts.recipients += 1;
        let (chunk, missing) = batch.chunk(connection.encoding());
        if let Some(chunk) = chunk {
            counts.delayed += u64::from(self.offer(slot, chunk, terms));
        }
        if missing > 0 {
            self.cannot_render(slot, missing, terms);
        }
    }

    /// The same for a connection that must not get all of them.
    #[cold]
    fn offer_runs(&mut self, slot: Slot, batch: &mut Batch<'_>, terms: Terms<'_>, counts: &mut Counts) {
        let Some(connection) = self.connections.get(slot) else { return };
        let runs: SmallVec<[Range<u32>; 8]> = batch.runs_for(connection.id()).collect();
        if runs.is_empty() {
            return;
        }
        // It is a batch of several, and all connections use the plain encoding then.
        let Some(chunk) = batch.chunk(connection.encoding()).0 else { return };
        counts.recipients += 1;
        for run in runs {
            if self.note_offer(slot, run.end - run.start, terms).is_some() {
                self.enqueue_or_wait(slot, chunk, run, terms);
            }
        }
    }

    /// Ends a connection because messages cannot be converted to its encoding; these count as discarded.
    #[cold]
    pub(crate) fn cannot_render(&mut self, slot: Slot, messages: u64, terms: Terms<'_>) {
        if let Some(ticket) = terms.receipt() {
            ticket.count_disconnected();
        }
        if let Some(connection) = self.connections.get_mut(slot) {
            connection.count_offered(messages);
            connection.count_discarded(messages);
            self.metrics.tally.offered += messages;
            self.metrics.tally.discarded += messages;
            self.pending_ends.push((connection.id(), CloseReason::RenderFailed));
        }
    }

    /// Notes that the connection of each slot must end; returns their number.
    pub(crate) fn note_ends(
        &mut self,
        slots: &[Slot],
        reason: &CloseReason,
        entry: &Entry,
        terms: Terms<'_>,
    ) -> u64 {
        let ids = slots.iter().filter_map(|slot| self.connections.get(*slot)).map(Connection::id);
        let ids = ids.filter(|id| !entry.publication.except.contains(id));
        let before = self.pending_ends.len();
        self.pending_ends.extend(ids.map(|id| (id, reason.clone())));
        Counts { recipients: (self.pending_ends.len() - before) as u64, delayed: 0 }.report(terms)
    }

    /// Puts the chunk into one outbox; true if a part of it did not fit.
    #[inline]
    pub(crate) fn offer(&mut self, slot: Slot, chunk: &Rc<Chunk>, terms: Terms<'_>) -> bool {
        let frames = chunk.frames();
        let Some(connection) = self.note_offer(slot, frames, terms) else { return false };
        if connection.take_first(chunk) {
            self.backlog_bytes += chunk.bytes();
            self.flushes.reached(frames.into());
            return false;
        }
        self.enqueue_or_wait(slot, chunk, 0..frames, terms)
    }

    /// Counts frames that are offered to a connection, and marks it for the next flush.
    #[inline]
    fn note_offer(&mut self, slot: Slot, frames: u32, terms: Terms<'_>) -> Option<&mut Connection> {
        let connection = self.connections.get_mut(slot)?;
        let frames = u64::from(frames);
        connection.count_offered(frames);
        self.metrics.tally.offered += frames;
        if connection.mark_dirty() {
            self.flushes.mark(slot);
        }
        if let Some((max, samples)) = terms.policy.and_then(|policy| policy.rtt_limit())
            && connection.is_rtt_above(max, samples)
        {
            self.pending_ends.push((connection.id(), CloseReason::HighRtt));
        }
        Some(connection)
    }

    /// Puts the frames into an outbox that is not empty, or that they fill; true if some of them did not fit.
    fn enqueue_or_wait(
        &mut self,
        slot: Slot,
        chunk: &Rc<Chunk>,
        frames: Range<u32>,
        terms: Terms<'_>,
    ) -> bool {
        let Some(connection) = self.connections.get_mut(slot) else { return false };
        let policy = terms.policy.unwrap_or(connection.config().policy);
        let until = policy.timeout().map(|timeout| self.now + timeout);
        let expiry = Expiry { until, max_drops: policy.max_drops() };
        let (enqueued, bytes) =
            connection.enqueue(chunk, frames, self.now, expiry, |frames| terms.origin(policy, frames));
        self.backlog_bytes += bytes;
        if let Some(frames) = connection.frames_to_write() {
            self.flushes.reached(frames);
        }
        if let Some(blocks) = connection.becomes_congested() {
            connection.provisional_group().into_iter().for_each(|group| group.add_congested(blocks));
            self.groups.groups_of(slot).for_each(|group| group.add_congested(blocks));
        }
        if enqueued == Enqueued::Queued {
            return false;
        }
        self.on_full_outbox(slot, enqueued, policy, expiry, terms);
        true
    }

    /// Handles the consequences of a full outbox.
    #[cold]
    fn on_full_outbox(
        &mut self,
        slot: Slot,
        enqueued: Enqueued,
        policy: Policy,
        expiry: Expiry,
        terms: Terms<'_>,
    ) {
        if let Enqueued::Drops(frames) = enqueued {
            if let Some(ticket) = terms.receipt() {
                ticket.count_drop(DropCause::Overflow);
            }
            let dropped = Dropped { frames, max_drops: expiry.max_drops };
            self.note_drop(slot, DropCause::Overflow, dropped, terms.group);
        }
        let Some(connection) = self.connections.get_mut(slot) else { return };
        if enqueued == Enqueued::TooMany {
            self.pending_ends.push((connection.id(), CloseReason::SlowConsumer));
        }
        if let Some(until) = expiry.until
            && connection.has_waiting()
        {
            self.deadlines.push(until, connection.id());
        }
        if policy.rtt_limit().is_some_and(|(max, samples)| connection.is_rtt_above(max, samples)) {
            self.pending_ends.push((connection.id(), CloseReason::HighRtt));
        }
    }

    /// Drops one connection's frames that have waited for too long.
    pub(crate) fn expire_frames_of(&mut self, id: ConnectionId) {
        let Some(connection) = self.connections.find_mut(id) else { return };
        let mut drops: SmallVec<[(Dropped, Option<Arc<str>>); 4]> = SmallVec::new();
        let expired = connection.expire(self.now, |dropped, origin| {
            if let Some(ticket) = origin.and_then(|origin| origin.ticket.as_ref()) {
                ticket.count_drop(DropCause::Timeout);
            }
            drops.push((dropped, origin.and_then(|origin| origin.group.clone())));
        });
        self.backlog_bytes -= expired.bytes;
        for (dropped, group) in drops {
            self.note_drop(id.slot(), DropCause::Timeout, dropped, group.as_ref());
        }
        if expired.has_taken
            && let Some(connection) = self.connections.get_mut(id.slot())
        {
            connection.end_row_of_drops();
        }
        if let Some(until) = expired.next {
            self.deadlines.push(until, id);
        }
        self.relieve(id.slot());
    }

    /// Counts a drop, and notes it for the handler; ends the connection if there were too many consecutive drops.
    fn note_drop(&mut self, slot: Slot, cause: DropCause, dropped: Dropped, group: Option<&Arc<str>>) {
        let Dropped { frames, max_drops } = dropped;
        let Some(connection) = self.connections.get_mut(slot) else { return };
        self.metrics.tally.dropped[cause] += u64::from(frames);
        let loss = connection.count_drop(cause, frames, group);
        if loss.is_news {
            self.pending_drop_notices.push(connection.id());
        }
        if max_drops > 0 && loss.in_a_row >= max_drops {
            self.pending_ends.push((connection.id(), CloseReason::TooManyDrops));
        }
    }

    /// Stops counting a connection as congested if it has recovered. Called after everything that removes frames.
    pub(crate) fn relieve(&mut self, slot: Slot) {
        let Some(connection) = self.connections.get_mut(slot) else { return };
        if let Some(blocks) = connection.becomes_relieved() {
            connection.provisional_group().into_iter().for_each(|group| group.remove_congested(blocks));
            self.groups.groups_of(slot).for_each(|group| group.remove_congested(blocks));
        }
    }

    /// Counts as written what has left a connection's bridge.
    pub(crate) fn settle(&mut self, slot: Slot) {
        if let Some(connection) = self.connections.get_mut(slot) {
            settle(connection, &mut self.metrics, &mut self.backlog_bytes);
        }
    }

    /// The sum of the counters of the connections that the query names, on this shard.
    pub(crate) fn sum_metrics(&mut self, query: &Query, shard: usize) -> GroupMetrics {
        let mut sum = match &query.groups {
            None => query.directory.ended(shard).sum(),
            Some(_) => GroupMetrics::default(),
        };
        self.for_each(query, |connection| sum += connection.metrics().into());
        sum
    }

    /// Those of them that are open and members of everyone.
    pub(crate) fn members(&mut self, query: &Query) -> Vec<ConnectionId> {
        let mut members = Vec::new();
        self.for_each(query, |connection| {
            let is_member =
                connection.is_open() && (query.groups.is_some() || connection.opening().is_none());
            members.extend(is_member.then(|| connection.id()));
        });
        members
    }

    fn for_each(&mut self, query: &Query, mut each: impl FnMut(&Connection)) {
        let (metrics, backlog_bytes) = (&mut self.metrics, &mut self.backlog_bytes);
        let mut each = |connection: &mut Connection| {
            if !query.except.contains(&connection.id()) {
                settle(connection, metrics, backlog_bytes);
                each(connection);
            }
        };
        match &query.groups {
            // Not by the index: a connection that is closing has left it already.
            None => {
                let key = query.directory.key();
                let ours = |connection: &&mut Connection| connection.directory().key() == key;
                self.connections.iter_mut().filter(ours).for_each(each);
            }
            Some(groups) => {
                let mut slots = Vec::new();
                self.groups.union(groups.iter().filter_map(Named::current_key), &mut slots);
                for slot in slots {
                    self.connections.get_mut(slot).into_iter().for_each(&mut each);
                }
            }
        }
    }

    /// The connections that hold the most memory, as many as together hold `bytes`, and how much they hold.
    /// Closing connections come first. `held` returns what one connection holds.
    pub(crate) fn largest(
        &self,
        bytes: usize,
        held: impl Fn(&Connection) -> usize,
    ) -> (Vec<ConnectionId>, usize) {
        let all = self.connections.iter().map(|connection| {
            let has_ended = !connection.is_open();
            (has_ended, held(connection), connection.id())
        });
        let mut all: Vec<_> = all.filter(|(_, held, _)| *held > 0).collect();
        all.sort_unstable_by(|a, b| b.cmp(a));
        let (mut ids, mut sum) = (Vec::new(), 0);
        for (_, held, id) in all {
            if sum >= bytes {
                break;
            }
            sum += held;
            ids.push(id);
        }
        (ids, sum)
    }

    pub(crate) fn mark_dirty(&mut self, slot: Slot) {
        if let Some(connection) = self.connections.get_mut(slot)
            && connection.mark_dirty()
        {
            self.flushes.mark(slot);
        }
    }
}

fn settle(connection: &mut Connection, metrics: &mut Metrics, backlog_bytes: &mut usize) {
    if connection.is_bridged() {
        let before = connection.backlog_bytes();
        connection.settle(metrics);
        *backlog_bytes -= before - connection.backlog_bytes();
    }
}

/// The outcome of one fan-out.
#[derive(Debug, Default)]
struct Counts {
    recipients: u64,
    /// Those whose outbox had no room.
    delayed: u64,
}

impl Counts {
    /// Reports it to a publisher that wants the outcome, and returns the number of recipients.
    fn report(self, terms: Terms<'_>) -> u64 {
        if let Some(ticket) = terms.receipt() {
            ticket.count(self.recipients, self.delayed);
        }
        self.recipients
    }
}
