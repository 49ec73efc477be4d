//! What is to go out: from the mailbox and the log into the outboxes.
//!
//! Keeps the order that the shard's sign describes. Also what else a command may ask: a
//! new connection, a join, a leave, an end. Does not write to sockets.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use mio::Token;

use crate::batch::Batch;
use crate::close_code::CloseCode;
use crate::close_reason::CloseReason;
use crate::command::{Action, Adoption, Answer, Command, Query};
use crate::connection::{Connection, Opening, WRITE_BYTES_MAX};
use crate::crowd::Terms;
use crate::directory::Entrance;
use crate::engine_core::sent_by_this_thread;
use crate::entry::{Named, Target};
use crate::frame::ControlFrame;
use crate::handler::Flow;
use crate::id::{ConnectionId, GroupKey, Slot};
use crate::outbox::Chunk;
use crate::payload::Payload;
use crate::publication::{Content, Delivery};
use crate::receipt::Ticket;
use crate::rendition::Encoding;
use crate::socket::Socket;

use super::{Later, Shard, Step};

const COMMANDS_PER_TURN: usize = 4096;
/// Pieces of 4 KiB that are read of what a peer has sent that is turned away.
const TURN_AWAY_READS: usize = 16;

impl Shard {
    /// Carries out what lay in the mailbox when it began; false if something of that is left.
    pub(super) fn drain_mailbox(&mut self) -> bool {
        let lying = self.mailbox().len();
        let mut left = lying.min(COMMANDS_PER_TURN);
        let (mut made_room, mut bytes) = (false, 0);
        let is_held_up = loop {
            if self.held.is_none() && self.later.front().is_some_and(|later| later.commands <= self.commands)
            {
                if self.carry_out_later() { continue } else { break true }
            }
            let entry = match self.held.take() {
                Some(entry) => entry,
                None if left == 0 => break false,
                None => match self.mailbox().pop() {
                    Some(entry) => {
                        left -= 1;
                        made_room = true;
                        self.commands += 1;
                        entry
                    }
                    None => break false,
                },
            };
            if !self.run_log(entry.stamp) {
                self.held = Some(entry);
                break true;
            }
            match entry.command {
                Command::Adopt(adoption) => self.adopt(*adoption),
                Command::Ask(query) => self.answer_query(&query),
                Command::For { id, namespace, action } => {
                    if let Action::Send { payload, .. } = &action {
                        bytes += payload.plain_frame().len() as u64;
                    }
                    let found =
                        self.find(id).is_some_and(|connection| connection.directory().key() == namespace);
                    if found {
                        self.act(id, action);
                    }
                }
            }
        };
        if bytes > 0 {
            self.mailbox().release(bytes);
        }
        if made_room {
            self.mailbox().waiting.wake_all();
        }
        !is_held_up && lying <= COMMANDS_PER_TURN
    }

    fn answer_query(&mut self, query: &Query) {
        let key = query.directory.key();
        match &query.answer {
            Answer::Metrics(on_metrics) => {
                let metrics = self.crowd.sum_metrics(query, self.index);
                self.call_back(key, || on_metrics(metrics));
            }
            Answer::Members(on_members) => {
                let members = self.crowd.members(query);
                self.call_back(key, || on_members(members));
            }
        }
    }

    /// Calls what an application has given to be called here.
    fn call_back(&self, namespace: GroupKey, call: impl FnOnce()) {
        let _call = self.core.beacons.call(self.index, namespace);
        if catch_unwind(AssertUnwindSafe(call)).is_err() {
            tracing::error!(shard = self.index, "a callback for metrics, members or groups panicked");
        }
    }

    /// Puts a step into the list, behind everything that has been sent until now.
    pub(super) fn do_later(&mut self, id: ConnectionId, step: Step) {
        let (stamp, commands) = (self.core.log.tail(), self.commands + self.mailbox().len() as u64);
        self.later.push_back(Later { stamp, commands, id, step });
    }

    /// Carries out the first step in the list; false if the log cannot be run so far yet.
    fn carry_out_later(&mut self) -> bool {
        let Some(stamp) = self.later.front().map(|later| later.stamp) else { return true };
        if !self.run_log(stamp) {
            return false;
        }
        let Some(Later { id, step, .. }) = self.later.pop_front() else { return true };
        if self.find(id).is_some() {
            match step {
                Step::Enter => self.enter(id.slot()),
                Step::End(reason) => self.end(id.slot(), reason),
            }
        }
        true
    }

    fn act(&mut self, id: ConnectionId, action: Action) {
        let slot = id.slot();
        let Some(connection) = self.crowd.connections.get_mut(slot) else { return };
        let is_open = connection.is_open();
        match action {
            Action::Send { payload, delivery, ticket, oversized } if is_open => {
                self.offer_one(slot, payload, delivery, ticket);
                drop(oversized); // if its outbox is congested, that is counted now
            }
            Action::Join(entrances) if is_open => {
                entrances.into_iter().for_each(|entrance| self.join(slot, entrance));
            }
            Action::Leave(groups) => {
                let congestion = connection.congestion();
                let directory = connection.directory().clone();
                for group in groups {
                    let left = self.crowd.groups.leave(group.key, slot);
                    self.has_left(&directory, &group, left, congestion);
                }
            }
            Action::Close { reason, ticket } => {
                if let Some(ticket) = ticket.filter(|_| is_open) {
                    ticket.count(1, 0);
                }
                self.end(slot, reason);
            }
            Action::Inspect(on_metrics) => {
                let (metrics, key) = (connection.metrics(), connection.directory().key());
                self.call_back(key, || on_metrics(metrics));
            }
            Action::ListGroups(on_groups) => {
                let key = connection.directory().key();
                let names =
                    self.crowd.groups.groups_of(slot).filter_map(|group| group.name().cloned()).collect();
                self.call_back(key, || on_groups(names));
            }
            Action::Send { .. } | Action::Join(_) => {}
        }
    }

    fn join(&mut self, slot: Slot, entrance: Entrance) {
        let open = self.crowd.connections.get_mut(slot).filter(|connection| connection.is_open());
        let Some(connection) = open else { return };
        let max = connection.config().max_groups + usize::from(connection.opening().is_none()); // everyone is not counted
        let (group, congestion) = (entrance.group().clone(), connection.congestion());
        group.add_interest(self.index); // it may have been cleared while this join was on its way
        if self.crowd.groups.join(group.key, group.clone(), slot) {
            if let Some(blocks) = congestion {
                group.add_congested(blocks);
            }
            entrance.arrive();
        }
        if self.crowd.groups.count(slot) > max {
            self.end(slot, CloseReason::TooManyGroups);
        }
    }

    /// The handler is done with `on_open`: the connection joins everyone, behind all that was sent meanwhile.
    pub(super) fn enter_in_order(&mut self, slot: Slot) {
        let Some(connection) = self.crowd.connections.get_mut(slot) else { return };
        let (id, is_turned_away) = (connection.id(), connection.is_over());
        if let Some(opening) = connection.opening_mut() {
            opening.is_done = true;
            if !is_turned_away {
                self.do_later(id, Step::Enter);
            }
        }
    }

    fn enter(&mut self, slot: Slot) {
        let Some(connection) = self.crowd.connections.get_mut(slot) else { return };
        let Some(opening) = connection.take_opening() else { return };
        self.join(slot, opening.everyone);
        if self.crowd.connections.get(slot).is_some_and(Connection::is_idle) {
            self.go_on(slot);
        }
    }

    fn adopt(&mut self, adoption: Adoption) {
        let Adoption { mut socket, received, handler, config, encoding, directory, place, entrance } =
            adoption;
        if self.stop.is_some() {
            return turn_away(&socket, CloseCode::GOING_AWAY);
        }
        let Some(slot) = self.crowd.connections.vacant() else {
            tracing::warn!(shard = self.index, "the shard has no room for a connection: it was turned away");
            return turn_away(&socket, CloseCode::TRY_AGAIN_LATER);
        };
        self.generations += 1;
        let id = ConnectionId::new(self.index, slot, self.generations);
        if let Err(error) = socket.register(self.poll.registry(), Token(slot.index())) {
            tracing::warn!(shard = self.index, %error, "a connection could not be registered and was turned away");
            return turn_away(&socket, CloseCode::TRY_AGAIN_LATER);
        }
        let shown = self.core.beacons.call(self.index, directory.key());
        let handler = match catch_unwind(AssertUnwindSafe(|| handler(id))) {
            Ok(handler) => handler,
            Err(_) => {
                tracing::error!(%id, "making a handler panicked; the connection was turned away");
                return turn_away(&socket, CloseCode::INTERNAL_ERROR);
            }
        };
        drop(shown);
        let connection =
            Connection::open(id, socket, config, encoding, directory, handler, place, self.crowd.now);
        connection.directory().add_encoding(encoding);
        self.crowd.connections.insert(connection);
        self.crowd.metrics.adopted += 1;
        self.crowd.flushes.adopt_outbox(self.crowd.connections[slot].config().outbox_frames);
        self.beat(slot);
        let before = sent_by_this_thread();
        let flow = self.call(slot, |handler, context| handler.on_open(context));
        if flow == Flow::Ready && sent_by_this_thread() == before {
            // Nothing was sent meanwhile that it must not get.
            if !self.crowd.connections[slot].is_over() {
                self.join(slot, entrance);
            }
        } else {
            let opening = Opening { everyone: entrance, is_done: false };
            self.crowd.connections[slot].begin_opening(opening);
            if flow == Flow::Ready {
                self.enter_in_order(slot);
            }
        }
        if !received.is_empty() {
            self.receive_early(slot, received);
        }
    }

    /// Runs the log into the outboxes, up to `limit`; false if it did not get there.
    pub(super) fn run_log(&mut self, limit: u64) -> bool {
        while self.reader.position() < limit {
            if self.offers_left == 0 || self.crowd.flushes.room() == 0 {
                return false;
            }
            let Some(first) = self.reader.get(0) else { return false };
            let mut count = 1;
            let offers = match (&first.publication.content, &first.target) {
                (Content::Message(payload), Target::One(group)) => {
                    let members = self.crowd.groups.find(group.key).or_else(|| {
                        // The group may have ended and begun anew since the publisher looked.
                        group.is_closed().then(|| self.crowd.groups.find(group.current_key()?)).flatten()
                    });
                    match members {
                        None => 0,
                        Some(group) => {
                            let limit = limit.min(self.reader.position() + self.crowd.flushes.room());
                            let joined = Some((limit, WRITE_BYTES_MAX));
                            let (encodings, retained) = (&self.core.encodings, &self.crowd.retained);
                            let mut batch = Batch::new(&self.reader, payload, joined, encodings, retained);
                            count = batch.len();
                            self.crowd.fan_out(group, &mut batch, first)
                        }
                    }
                }
                (content, target) => {
                    let mut slots = std::mem::take(&mut self.scratch.slots);
                    match target {
                        Target::One(group) => {
                            self.crowd.groups.union(group.current_key().into_iter(), &mut slots)
                        }
                        Target::Several(groups) => {
                            let keys = groups.iter().filter_map(Named::current_key);
                            self.crowd.groups.union(keys, &mut slots);
                        }
                    }
                    let offers = match content {
                        Content::Message(payload) => {
                            let (encodings, retained) = (&self.core.encodings, &self.crowd.retained);
                            let mut batch = Batch::new(&self.reader, payload, None, encodings, retained);
                            self.crowd.fan_out_to(&slots, &mut batch, first)
                        }
                        Content::Close { code, text } => {
                            let reason = CloseReason::Application { code: *code, text: text.clone() };
                            self.crowd.note_ends(&slots, &reason, first)
                        }
                    };
                    self.scratch.slots = slots;
                    offers
                }
            };
            self.offers_left = self.offers_left.saturating_sub(offers);
            self.crowd.metrics.publications += count;
            self.crowd.flushes.ran(count);
            self.reader.advance(count);
            self.carry_out_ends();
        }
        true
    }

    fn offer_one(&mut self, slot: Slot, payload: Payload, delivery: Delivery, ticket: Option<Ticket>) {
        let Some(connection) = self.crowd.connections.get(slot) else { return };
        let frame = match connection.encoding() {
            Encoding::PLAIN => Some(payload.into_plain_frame()),
            encoding => self.core.encodings.render(encoding, &payload),
        };
        let waits = match frame {
            Some(frame) => {
                let chunk = Rc::new(Chunk::single(frame.into(), &self.crowd.retained));
                // For one connection `Block` holds, whatever its own policy is.
                let policy = Some(delivery.policy().unwrap_or_default());
                self.crowd.offer(slot, &chunk, Terms { policy, ticket: ticket.as_ref(), group: None })
            }
            None => {
                self.crowd.cannot_render(slot, ticket.as_ref());
                false
            }
        };
        if let Some(ticket) = ticket {
            ticket.count(1, u64::from(waits));
        }
        self.carry_out_ends();
    }

    /// Does what a fan-out could only note: tells of drops, ends connections.
    pub(super) fn carry_out_ends(&mut self) {
        while let Some(id) = self.crowd.drops.pop() {
            if self.find(id).is_some_and(Connection::is_idle) {
                let _ = self.tell_drops(id.slot()); // if it is pending, it goes on by itself
            }
        }
        while let Some((id, reason)) = self.crowd.ends.pop() {
            if self.find(id).is_some() {
                self.end(id.slot(), reason);
            }
        }
    }
}

/// Sends a Close frame to a peer whose connection is not taken over. One try: an unused socket has room for it.
fn turn_away(socket: &Socket, code: CloseCode) {
    let _ = socket.write(ControlFrame::close(code, "").as_bytes());
    socket.finish();
    // A socket with unread bytes is reset when it is dropped, and the frame with it.
    let mut unread = [0; 4096];
    for _ in 0..TURN_AWAY_READS {
        if socket.read(&mut unread).unwrap_or(0) < unread.len() {
            break;
        }
    }
}
