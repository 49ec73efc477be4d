//! A shard's internal state between two turns. Only for the engine's own tests.
//!
//! Behind the feature `audit`. Reads and changes nothing, except counters that a test sets. `Audit::errors` lists violated invariants,
//! which must hold after every turn: the tallies, the lists of pending work, the timers, the counts of
//! members and of congested ones. Does not know what was sent.

use crate::connection::Connection;
use crate::entry::Entry;
use crate::group::MEMBER_BYTES;
use crate::id::ConnectionId;
use crate::log::Log;
use crate::tally::{DropCause, Tally};

use super::Shard;

/// Sizes in bytes of what a publication touches.
#[derive(Debug, Clone, Copy)]
pub struct Footprint {
    /// A place in the log, which every shard reads.
    pub log_slot: usize,
    /// A connection and its entry in a group's list of members.
    pub member: usize,
}

/// What a publication touches besides its own bytes.
pub fn footprint() -> Footprint {
    Footprint { log_slot: Log::<Entry>::SLOT_BYTES, member: size_of::<Connection>() + MEMBER_BYTES }
}

/// One connection.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "as in the metrics and the settings")]
pub struct ConnectionAudit {
    pub id: ConnectionId,
    pub is_open: bool,
    pub has_socket: bool,
    pub is_delayed: bool,
    pub tally: Tally,
    pub pending: u64,
    /// Frames in the outbox, and those that wait for room.
    pub queued: u64,
    pub queued_bytes: usize,
    pub waiting: u64,
    pub overflow_bytes: usize,
    pub outbox_frames: usize,
    pub outbox_bytes: usize,
    pub waiting_frames_max: usize,
    pub waiting_bytes_max: usize,
}

/// One shard's part of a group, and the counts that all shards share.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "as in the directory")]
pub struct GroupAudit {
    /// Distinguishes groups.
    pub address: usize,
    pub members: u64,
    pub congested: u64,
    pub blocking: u64,
    pub shared_members: u64,
    pub shared_congested: u64,
    pub shared_blocking: u64,
}

/// A shard between two turns.
#[derive(Debug, Clone, Default)]
pub struct Audit {
    /// Its connections.
    pub connections: Vec<ConnectionAudit>,
    /// Its part of every group.
    pub groups: Vec<GroupAudit>,
    /// Violated invariants.
    pub errors: Vec<String>,
    /// Timers of waiting frames, and all others.
    pub deadlines: usize,
    /// See `deadlines`.
    pub reminders: usize,
}

/// For tests that drive shards as their threads would.
impl Shard {
    /// Whether its thread would end now.
    pub fn is_over(&self) -> bool {
        self.has_stopped()
    }

    /// Makes a connection count this many lost frames, half of them for each cause, so that a test need not
    /// wait for real ones.
    pub fn pretend_losses(&mut self, id: ConnectionId, frames: u64) {
        let Some(connection) = self.fanout.connections.get_mut(id.slot()) else { return };
        connection.pretend_losses(frames);
        self.fanout.metrics.tally.offered += frames;
        for cause in [DropCause::Timeout, DropCause::Overflow] {
            self.fanout.metrics.tally.dropped[cause] += frames / 2;
        }
    }

    /// Checks all invariants.
    pub fn audit(&self) -> Audit {
        let mut audit = Audit::default();
        let mut wrong = |text: String| audit.errors.push(format!("shard {}: {text}", self.index));
        let (mut sum, mut unfinished, mut refused) = (0, 0, 0);
        let (mut dirty, mut ready) = (0, 0);
        for connection in self.fanout.connections.iter() {
            let slot = connection.slot();
            let metrics = connection.metrics();
            let bounds = connection.bounds();
            let inside = connection.inside();
            let outbox = inside.outbox;
            sum += connection.backlog_bytes();
            unfinished += connection.unfinished_bytes();
            refused += usize::from(!inside.is_writable);
            let (tally, pending) = (metrics.tally, outbox.pending() + connection.in_transit().frames);
            if tally.offered != tally.written + tally.dropped.total() + tally.discarded + pending {
                wrong(format!("tally of {}: {metrics:?}", connection.id()));
            }
            if inside.is_dirty {
                dirty += 1;
                if !self.fanout.flushes.contains(&slot) {
                    wrong(format!("{} is dirty but not in the list", connection.id()));
                }
            } else if inside.is_writable
                && connection.has_socket()
                && !connection.is_lingering()
                && (!outbox.is_empty() || inside.close_frame_pending)
            {
                wrong(format!("{} has something to write, may write, and is not dirty", connection.id()));
            }
            if connection.is_ready() {
                ready += 1;
                if !self.ready.contains(&slot) {
                    wrong(format!("{} is ready but not in the list", connection.id()));
                }
            } else if connection.is_reading() {
                wrong(format!("{} has something to read, may read, and is not ready", connection.id()));
            }
            if inside.keeps_messages {
                wrong(format!("{} has messages held and an idle handler", connection.id()));
            }
            if connection.is_open() && connection.is_idle() && inside.untold > 0 {
                wrong(format!("{} has unreported drops and an idle handler", connection.id()));
            }
            if let Some(until) = outbox.earliest_until()
                && !self.fanout.deadlines.is_reminded(connection.id(), until)
            {
                wrong(format!("{} has a frame until {until:?} and no timer", connection.id()));
            }
            if connection.has_socket() && !self.wheel.has(connection.id(), inside.timer_tick) {
                wrong(format!("{} has a socket and nothing in the wheel", connection.id()));
            }
            if let Some(due) = inside.delayed_until
                && connection.takes_held()
                && self.wheel.tick(due) < inside.timer_tick
            {
                wrong(format!("{} is delayed until {due:?} and is reminded later", connection.id()));
            }
            if outbox.is_congested(&bounds) && !inside.is_congested && connection.is_open() {
                wrong(format!("{} is congested and not counted", connection.id()));
            }
            if inside.is_congested && outbox.is_relieved(&bounds) {
                wrong(format!("{} is counted as congested and relieved", connection.id()));
            }
            let groups = self.fanout.groups.groups_of(slot).count();
            let is_open = connection.is_open();
            if (is_open && connection.opening().is_none() && groups == 0 && !connection.is_over())
                || (!is_open && groups > 0)
            {
                wrong(format!("{} is in {groups} groups; open: {is_open}", connection.id()));
            }
            if !connection.has_socket() && !connection.has_handler() {
                wrong(format!("{} has neither socket nor handler", connection.id()));
            }
            if !connection.has_socket() && pending > 0 {
                wrong(format!("{} has no socket and something pending", connection.id()));
            }
            if !connection.is_open()
                && connection.has_handler()
                && connection.is_idle()
                && !connection.is_delayed()
                && !connection.drains()
            {
                wrong(format!("{} has ended, its handler is idle and was not released", connection.id()));
            }
            let (queued_bytes, overflow_bytes) = outbox.audit_bytes();
            audit.connections.push(ConnectionAudit {
                id: connection.id(),
                is_open: connection.is_open(),
                has_socket: connection.has_socket(),
                is_delayed: connection.is_delayed(),
                tally,
                pending,
                queued: outbox.queued().into(),
                queued_bytes,
                waiting: outbox.waiting() as u64,
                overflow_bytes,
                outbox_frames: bounds.frames,
                outbox_bytes: bounds.bytes,
                waiting_frames_max: bounds.overflow_frames,
                waiting_bytes_max: bounds.overflow_bytes,
            });
        }
        if unfinished != self.fanout.unfinished_bytes {
            wrong(format!(
                "{unfinished} bytes are unfinished but counted as {}",
                self.fanout.unfinished_bytes
            ));
        }
        if refused != self.fanout.refused {
            wrong(format!("{refused} sockets accept no more but {} are counted", self.fanout.refused));
        }
        if sum != self.fanout.backlog_bytes {
            wrong(format!("backlog is {} but counted as {}", sum, self.fanout.backlog_bytes));
        }
        if dirty > self.fanout.flushes.waiting() || ready > self.ready.len() {
            wrong("lists are shorter than their flags".to_owned());
        }
        if sum == 0 && self.fanout.retained.bytes() > 0 {
            wrong(format!(
                "{} bytes are retained although no outbox holds any",
                self.fanout.retained.bytes()
            ));
        }
        if !self.fanout.pending_ends.is_empty() || !self.fanout.pending_drop_notices.is_empty() {
            wrong("ends or drops are left over".to_owned());
        }
        for (group, slots) in self.fanout.groups.audit() {
            let (mut congested, mut blocking) = (0, 0);
            for slot in &slots {
                match self.fanout.connections.get(*slot) {
                    Some(connection) => {
                        congested += u64::from(connection.congestion().is_some());
                        blocking += u64::from(connection.congestion() == Some(true));
                    }
                    None => wrong(format!("{slot:?} is a member but has no connection")),
                }
            }
            if !group.audit_interest(self.index) {
                wrong("members but no interest".to_owned());
            }
            let (shared_members, shared_congested, shared_blocking) = group.audit_counts();
            audit.groups.push(GroupAudit {
                address: std::sync::Arc::as_ptr(group) as usize,
                members: slots.len() as u64,
                congested,
                blocking,
                shared_members,
                shared_congested,
                shared_blocking,
            });
        }
        for connection in self.fanout.connections.iter() {
            if let (Some(group), Some(blocks)) = (connection.provisional_group(), connection.congestion()) {
                let (address, (shared_members, shared_congested, shared_blocking)) =
                    (std::ptr::from_ref(group) as usize, group.audit_counts());
                audit.groups.push(GroupAudit {
                    address,
                    members: 0,
                    congested: 1,
                    blocking: blocks.into(),
                    shared_members,
                    shared_congested,
                    shared_blocking,
                });
            }
        }
        audit.reminders = self.wheel.audit_len();
        audit.deadlines = self.fanout.deadlines.audit_len();
        audit
    }
}
