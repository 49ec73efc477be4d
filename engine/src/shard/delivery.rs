//! What is to go out: from the mailbox and the log into the outboxes.
//!
//! Keeps the order that the shard's sign describes. Also what else a command may ask: a
//! new connection, a join, a leave, an end. Does not write to sockets.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use mio::Token;

use crate::command::{Action, Adoption, Command, Payload, Publication, Target};
use crate::connection::{Connection, ControlRate, Phase, WRITE_BYTES_MAX, Work};
use crate::decoder::Decoder;
use crate::directory::Entrance;
use crate::frame::Frame;
use crate::heartbeat::Heartbeat;
use crate::id::{ConnectionId, SLOTS_MAX};
use crate::log::Reader;
use crate::metrics::Counts;
use crate::outbox::{Chunk, Outbox};
use crate::policy::Policy;
use crate::receipt::Ticket;

use super::Shard;
use super::golden;

const COMMANDS_PER_TURN: usize = 4096;

impl Shard {
    /// Carries out what lay in the mailbox when it began; false if something of that is left.
    pub(super) fn drain_mailbox(&mut self) -> bool {
        let lying = self.mailbox().len();
        let mut left = lying.min(COMMANDS_PER_TURN);
        let mut made_room = false;
        loop {
            let entry = match self.held.take() {
                Some(entry) => entry,
                None if left == 0 => break,
                None => match self.mailbox().pop() {
                    Some(entry) => {
                        left -= 1;
                        made_room = true;
                        entry
                    }
                    None => break,
                },
            };
            if !self.run_log(entry.stamp) {
                self.held = Some(entry);
                break;
            }
            match entry.command {
                Command::Adopt(adoption) => self.adopt(*adoption),
                Command::Survey(survey) => {
                    let metrics = self.crowd.survey(&survey, self.index);
                    let _call = self.shared.beacons.call(self.index, survey.directory.key());
                    if catch_unwind(AssertUnwindSafe(|| (survey.on_metrics)(metrics))).is_err() {
                        tracing::error!("a callback for metrics panicked");
                    }
                }
                Command::For { id, namespace, action } => {
                    let found =
                        self.find(id).is_some_and(|connection| connection.directory.key() == namespace);
                    if found {
                        self.act(id, action);
                    }
                }
            }
        }
        if made_room {
            self.mailbox().waiting.wake_all();
        }
        self.held.is_none() && lying <= COMMANDS_PER_TURN
    }

    fn act(&mut self, id: ConnectionId, action: Action) {
        let slot = id.slot() as u32;
        let Some(connection) = self.crowd.connections.get_mut(slot as usize) else { return };
        let is_open = connection.phase == Phase::Open;
        match action {
            Action::Send { frame, policy, ticket } if is_open => {
                let chunk = Rc::new(Chunk::single(frame.into()));
                self.offer_one(slot, &chunk, policy, ticket);
            }
            Action::Join(entrance) if is_open => self.join(slot, entrance),
            Action::Leave { group } => {
                let congestion = connection.congestion();
                let directory = connection.directory.clone();
                let left = self.crowd.groups.leave(group.key, slot);
                self.has_left(&directory, &group, left, congestion);
            }
            Action::Close(reason) => self.end(slot, reason),
            Action::Inspect(on_metrics) => {
                let metrics = connection.metrics();
                let _call = self.shared.beacons.call(self.index, connection.directory.key());
                if catch_unwind(AssertUnwindSafe(|| on_metrics(metrics))).is_err() {
                    tracing::error!(%id, "a callback for metrics panicked");
                }
            }
            Action::Send { .. } | Action::Join(_) => {}
        }
    }

    fn join(&mut self, slot: u32, entrance: Entrance) {
        let group = entrance.group().clone();
        group.add_interest(self.index); // it may have been cleared while this join was on its way
        if self.crowd.groups.join(group.key, group.clone(), slot) {
            if let Some(blocks) = self.crowd.connections[slot as usize].congestion() {
                group.add_congested(blocks);
            }
            entrance.arrive();
        }
    }

    fn adopt(&mut self, adoption: Adoption) {
        let Adoption { mut socket, received, handler, config, directory, place, entrance } = adoption;
        if self.crowd.connections.vacant_key() >= SLOTS_MAX || self.stop.is_some() {
            tracing::warn!(shard = self.index, "no room for a connection, or stopping: it was dropped");
            return;
        }
        let vacant = self.crowd.connections.vacant_entry();
        let slot = vacant.key();
        self.tenants += 1;
        let id = ConnectionId::new(self.index, slot, self.tenants);
        if let Err(error) = socket.register(self.poll.registry(), Token(slot)) {
            tracing::warn!(shard = self.index, %error, "a connection could not be registered and was dropped");
            return;
        }
        let shown = self.shared.beacons.call(self.index, directory.key());
        let handler = match catch_unwind(AssertUnwindSafe(|| handler(id))) {
            Ok(handler) => handler,
            Err(_) => {
                tracing::error!(%id, "making a handler panicked; the connection was dropped");
                return;
            }
        };
        drop(shown);
        // The golden ratio spreads neighbours over the interval.
        let stagger = golden(slot) as f32;
        vacant.insert(Connection {
            id,
            socket: Some(socket),
            heartbeat: Heartbeat::new(self.crowd.now, stagger, &config),
            config,
            directory,
            decoder: Decoder::default(),
            outbox: Outbox::new(),
            handler: Some(handler),
            resume: None,
            unread: None,
            ending: None,
            armed: 0,
            counts: Counts::default(),
            drops_in_a_row: 0,
            drops_untold: 0,
            control_rate: ControlRate::default(),
            phase: Phase::Open,
            work: Work::Idle,
            is_deaf: false,
            is_paused: false,
            owes_close: false,
            is_readable: false,
            is_read_closed: false,
            is_writable: true,
            is_dirty: false,
            is_ready: false,
            is_congested: false,
            _place: place,
        });
        self.crowd.metrics.adopted += 1;
        self.burst_max =
            self.burst_max.min(self.crowd.connections[slot].config.outbox_frames as u64 / 4).max(1);
        let slot = slot as u32;
        self.join(slot, entrance);
        self.beat(slot);
        let _ = self.call(slot, |handler, context| handler.on_open(context));
        if !received.is_empty() {
            self.receive_early(slot, received);
        }
    }

    /// Runs the log into the outboxes, up to `limit`; false if it did not get there.
    pub(super) fn run_log(&mut self, limit: u64) -> bool {
        while self.reader.position() < limit {
            if self.offers_left == 0 || self.burst >= self.burst_max {
                return false;
            }
            let Some(first) = self.reader.get(0) else { return false };
            let mut count = 1;
            let offers = match (&first.payload, &first.target) {
                (Payload::Frame(frame), Target::One(group)) => match self.crowd.groups.find(group.key) {
                    None => 0,
                    Some(group) => {
                        let room = limit.min(self.reader.position() + self.burst_max - self.burst);
                        let chunk = join(&self.reader, first, frame, room, &mut count);
                        self.crowd.fan_out(group, chunk, first)
                    }
                },
                (payload, target) => {
                    let mut slots = std::mem::take(&mut self.scratch.slots);
                    self.crowd.groups.union(target.groups().iter().map(|group| group.key), &mut slots);
                    let offers = match payload {
                        Payload::Frame(frame) => self.crowd.fan_out_to(&slots, frame, first),
                        Payload::End(reason) => self.crowd.note_ends(&slots, reason, first),
                    };
                    self.scratch.slots = slots;
                    offers
                }
            };
            self.offers_left = self.offers_left.saturating_sub(offers);
            self.crowd.metrics.publications += count;
            self.burst += count;
            self.reader.advance(count);
            self.carry_out_ends();
        }
        true
    }

    fn offer_one(&mut self, slot: u32, chunk: &Rc<Chunk>, policy: Policy, ticket: Option<Ticket>) {
        let waits = self.crowd.offer(slot, chunk, Some(policy), ticket.as_ref());
        if let Some(ticket) = ticket {
            ticket.count(1, u64::from(waits));
        }
        self.carry_out_ends();
    }

    /// Does what a fan-out could only note: tells of drops, ends connections.
    pub(super) fn carry_out_ends(&mut self) {
        while let Some(id) = self.crowd.drops.pop() {
            if self.find(id).is_some_and(|connection| connection.work == Work::Idle) {
                let _ = self.tell_drops(id.slot() as u32); // if it is pending, it goes on by itself
            }
        }
        while let Some((id, reason)) = self.crowd.ends.pop() {
            if self.find(id).is_some() {
                self.end(id.slot() as u32, reason);
            }
        }
    }
}

/// The first publication's frame and, as far as they go to the same connections, those of the next ones, in one
/// piece of memory; `count` is set to how many there are.
fn join(
    reader: &Reader<Publication>,
    first: &Publication,
    frame: &Frame,
    limit: u64,
    count: &mut u64,
) -> Chunk {
    let mut bytes = frame.len();
    let ahead = limit - reader.position();
    while *count < ahead
        && let Some(next) = reader.get(*count)
        && next.joins(first)
        && let Some(frame) = next.frame()
        && bytes + frame.len() <= WRITE_BYTES_MAX
    {
        bytes += frame.len();
        *count += 1;
    }
    if *count == 1 {
        return Chunk::single(frame.bytes());
    }
    let frames = (0..*count).filter_map(|ahead| reader.get(ahead)?.frame());
    Chunk::joined(frames.map(Frame::as_bytes), bytes)
}
