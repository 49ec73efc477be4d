//! From the log into the outboxes, and the verdicts of a fan-out.
//!
//! Runs the log up to a given position, in batches, within a turn's limits; offers a message to a single
//! connection. Ends and drops that a fan-out notes are applied after it. Does not write to sockets.

use crate::batch::{Batch, Tickets};
use crate::close_reason::CloseReason;
use crate::connection::{Connection, WRITE_BYTES_MAX};
use crate::entry::{Named, Target};
use crate::fanout::Terms;
use crate::id::Slot;
use crate::payload::Payload;
use crate::publication::{Content, Delivery};
use crate::receipt::Ticket;
use crate::rendition::Encoding;

use super::Shard;
use super::presence::deliver;

impl Shard {
    /// Runs the log into the outboxes, up to `limit`; false if it did not get there.
    pub(super) fn run_log(&mut self, limit: u64) -> bool {
        while self.reader.position() < limit {
            if self.offers_left == 0 || self.fanout.flushes.room() == 0 {
                return false;
            }
            let Some(first) = self.reader.get(0) else { return false };
            let mut tickets = Tickets::from_buf([first.take_ticket(self.index)]);
            let mut count = 1;
            let offers = match (&first.publication.content, &first.target) {
                (Content::Message(payload), Target::One(group)) => {
                    let members = self.fanout.groups.find(group.key).or_else(|| {
                        // The group may have been emptied and created again since the publisher looked.
                        group.is_closed().then(|| self.fanout.groups.find(group.current_key()?)).flatten()
                    });
                    match members {
                        None => 0,
                        Some(group) => {
                            let limit = limit.min(self.reader.position() + self.fanout.flushes.room());
                            let joined = Some((limit, WRITE_BYTES_MAX));
                            let (encodings, retained) = (&self.core.encodings, &self.fanout.retained);
                            let mut batch =
                                Batch::new(&self.reader, (first, payload), joined, encodings, retained);
                            count = batch.len();
                            batch.take_tickets(self.index, &mut tickets);
                            self.fanout.fan_out(group, &mut batch, Terms::of(first, &tickets))
                        }
                    }
                }
                (Content::Presence(change), Target::One(group)) => {
                    if let Some(directory) = group.directory()
                        && directory.watcher() == self.index
                    {
                        let position = self.core.position(self.reader.position() + 1);
                        deliver(&self.core, self.index, &directory, change, position);
                    }
                    0
                }
                (content, target) => {
                    let mut slots = std::mem::take(&mut self.scratch.slots);
                    match target {
                        Target::One(group) => {
                            self.fanout.groups.union(group.current_key().into_iter(), &mut slots)
                        }
                        Target::Several(groups) => {
                            let keys = groups.iter().filter_map(Named::current_key);
                            self.fanout.groups.union(keys, &mut slots);
                        }
                    }
                    let offers = match content {
                        Content::Message(payload) => {
                            let (encodings, retained) = (&self.core.encodings, &self.fanout.retained);
                            let mut batch =
                                Batch::new(&self.reader, (first, payload), None, encodings, retained);
                            self.fanout.fan_out_to(&slots, &mut batch, Terms::of(first, &tickets))
                        }
                        Content::Close { code, text } => {
                            let reason = CloseReason::Application { code: *code, text: text.clone() };
                            self.fanout.note_ends(&slots, &reason, first, Terms::of(first, &tickets))
                        }
                        Content::Presence(_) => 0, // its target is one group
                    };
                    self.scratch.slots = slots;
                    offers
                }
            };
            self.offers_left = self.offers_left.saturating_sub(offers);
            self.fanout.metrics.publications += count;
            self.fanout.flushes.ran(count);
            self.reader.advance(count);
            drop(tickets); // after the advance: a publisher's next look at the log does not count what has been read
            self.apply_verdicts();
        }
        true
    }

    pub(super) fn offer_one(
        &mut self,
        slot: Slot,
        payload: Payload,
        delivery: Delivery,
        ticket: Option<Ticket>,
    ) {
        let Some(connection) = self.fanout.connections.get(slot) else { return };
        let frame = match connection.encoding() {
            Encoding::PLAIN => Some(payload.into_plain_frame()),
            encoding => self.core.encodings.render(encoding, &payload),
        };
        let tickets = [ticket];
        // A message to one connection blocks by default, whatever the connection's own policy is.
        let policy = Some(delivery.policy().unwrap_or_default());
        let terms = Terms { policy, tickets: &tickets, group: None };
        let waits = match frame {
            Some(frame) => {
                let chunk = self.gather.spares.single(frame.into(), &self.fanout.retained);
                self.fanout.offer(slot, &chunk, terms)
            }
            None => {
                self.fanout.cannot_render(slot, 1, terms);
                false
            }
        };
        if let [Some(ticket)] = &tickets {
            ticket.count(1, u64::from(waits));
        }
        self.apply_verdicts();
    }

    /// Applies what a fan-out has noted: notifies handlers of drops, ends connections.
    pub(super) fn apply_verdicts(&mut self) {
        while let Some(id) = self.fanout.pending_drop_notices.pop() {
            if self.find(id).is_some_and(Connection::is_idle) {
                let _ = self.notify_drops(id.slot()); // if it is pending, it continues when its handler resumes
            }
        }
        while let Some((id, reason)) = self.fanout.pending_ends.pop() {
            if self.find(id).is_some() {
                self.end(id.slot(), reason);
            }
        }
    }
}
