//! Input: from the sockets to the handlers.
//!
//! A readable socket is read a few times a turn, in batches of sockets; what they brought is decoded. Control
//! frames are answered at once. Messages are passed to the handler one by one; while it is busy they are held
//! for it, and reading continues until enough is held (backpressure), so that pings are answered and a Close
//! is seen while a handler is busy. Messages that exceed a rate limit are held in the same way. Does not know the log, groups or the contents of outboxes.

use std::io::ErrorKind;
use std::ops::Range;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use mio::Events;
use mio::event::Event;

use crate::close_reason::CloseReason;
use crate::connection::{Arrival, CallSite, Connection, NextHeld, Read};
use crate::handler::{Context, Handler};
use crate::id::Slot;
use crate::limiter::Arrived;

use super::{EVENTS_PER_ANSWER, EVENTS_PER_TURN, Shard, WAKE_TOKEN};

const READS_PER_SOCKET: usize = 4;
const RESUMES_PER_TURN: usize = 4096;

impl Shard {
    /// Reads the sockets that are ready: in batches, answering in between, as long as there is nothing else to do.
    pub(super) fn read_sockets(&mut self) -> std::io::Result<()> {
        let waiting = self.fanout.flushes.waiting();
        self.note_poll(self.polled, EVENTS_PER_ANSWER);
        self.read_polled(0);
        for _ in 1..EVENTS_PER_TURN / EVENTS_PER_ANSWER {
            if self.events.iter().count() < EVENTS_PER_ANSWER {
                break;
            }
            if !self.answer(waiting) {
                return self.read_rest();
            }
            self.poll_sockets(Some(Duration::ZERO))?;
            self.note_poll(self.fanout.now, EVENTS_PER_ANSWER);
            self.read_polled(self.ready.len());
        }
        Ok(())
    }

    /// Reads all other sockets that are ready by now.
    fn read_rest(&mut self) -> std::io::Result<()> {
        std::mem::swap(&mut self.events, &mut self.other_events);
        let polled = self.poll_sockets(Some(Duration::ZERO));
        self.note_poll(self.fanout.now, EVENTS_PER_TURN - EVENTS_PER_ANSWER);
        self.read_polled(self.ready.len());
        std::mem::swap(&mut self.events, &mut self.other_events);
        polled
    }

    /// Reads the sockets that the last poll reported. The first `left` of those with something left to read
    /// have had their share of this turn.
    fn read_polled(&mut self, left: usize) {
        self.note_events();
        let mut slots = std::mem::take(&mut self.scratch.ready);
        slots.extend(self.ready.drain(left..));
        // A slot may be listed twice, once for a connection that has ended.
        slots.retain(|slot| {
            let connection = self.fanout.connections.get_mut(*slot);
            connection.is_some_and(Connection::take_ready)
        });
        self.rotate(&mut slots);
        for (index, slots) in slots.chunks(EVENTS_PER_ANSWER).enumerate() {
            if index > 0 {
                self.prefetch(slots.iter().copied());
            }
            self.read(slots);
        }
        slots.clear();
        self.scratch.ready = slots;
    }

    fn note_events(&mut self) {
        let events = std::mem::replace(&mut self.events, Events::with_capacity(0));
        let tokens = events.iter().map(Event::token).filter(|token| *token != WAKE_TOKEN);
        self.prefetch(tokens.take(EVENTS_PER_ANSWER).map(|token| Slot::new(token.0)));
        for event in &events {
            if event.token() == WAKE_TOKEN {
                self.fanout.metrics.wakes += 1;
                continue;
            }
            let slot = Slot::new(event.token().0);
            let Some(connection) = self.fanout.connections.get_mut(slot) else { continue };
            if event.is_writable() {
                let is_bridged = connection.is_bridged();
                if connection.becomes_writable() {
                    self.fanout.refused -= 1;
                    self.fanout.mark_dirty(slot);
                }
                if is_bridged {
                    self.drop_socket_if_over(slot); // this may have been the last that was on its way
                }
            }
            if event.is_readable() || event.is_read_closed() || event.is_error() {
                let Some(connection) = self.fanout.connections.get_mut(slot) else { continue };
                connection.becomes_readable(event.is_read_closed() || event.is_error());
                if connection.is_reading() {
                    self.mark_ready(slot);
                } else {
                    connection.heard(self.fanout.now, 0);
                    // Nothing is read now, but a socket that has failed need not be waited for. One that was
                    // closed must be: the messages before the close are still to be read.
                    if event.is_error() {
                        if connection.drains() || (connection.is_bridged() && connection.is_lingering()) {
                            self.drop_socket(slot);
                        } else {
                            self.end(slot, CloseReason::Transport(ErrorKind::ConnectionReset));
                        }
                    }
                }
            }
        }
        self.events = events;
    }

    fn prefetch(&self, slots: impl Iterator<Item = Slot>) {
        slots.filter_map(|slot| self.fanout.connections.get(slot)).for_each(Connection::prefetch);
    }

    pub(super) fn mark_ready(&mut self, slot: Slot) {
        if let Some(connection) = self.fanout.connections.get_mut(slot)
            && connection.mark_ready()
        {
            self.ready.push(slot);
        }
    }

    /// Reads each socket a few times; what remains is read in the next turn.
    fn read(&mut self, slots: &[Slot]) {
        for _ in 0..READS_PER_SOCKET {
            if !self.read_once(slots) {
                return;
            }
        }
        for slot in slots {
            if self.fanout.connections.get(*slot).is_some_and(Connection::is_reading) {
                self.mark_ready(*slot);
            }
        }
    }

    /// Reads each socket once and then processes what they brought, because kernel and user code would evict
    /// each other from the caches. True if there may be more.
    fn read_once(&mut self, slots: &[Slot]) -> bool {
        let mut buffer = std::mem::take(&mut self.scratch.read);
        let mut arrivals = std::mem::take(&mut self.scratch.arrivals);
        let (mut free, mut has_more) = (0, false);
        for slot in slots {
            if buffer.len() - free < buffer.len() / 4 {
                self.hand_over(&mut arrivals, &mut buffer);
                free = 0;
            }
            let Some(connection) = self.fanout.connections.get_mut(*slot) else { continue };
            if !connection.is_reading() {
                continue;
            }
            match connection.read(&mut buffer[free..]) {
                Read::Bytes(_) if !connection.is_receiving() => {} // sent after the end: ignored
                Read::Bytes(count) => {
                    connection.heard(self.fanout.now, count);
                    arrivals.push((*slot, free..free + count));
                    free += count;
                }
                Read::Nothing => {}
                Read::End => {
                    connection.end_input();
                    self.hand_over(&mut arrivals, &mut buffer); // the messages before the end
                    free = 0;
                    self.end_of_input(*slot);
                    continue;
                }
                Read::Failed(kind) => {
                    self.abort(*slot, CloseReason::Transport(kind));
                    continue;
                }
            }
            has_more |= connection.is_reading();
            if connection.has_refused() {
                self.fanout.mark_dirty(*slot);
            }
        }
        self.hand_over(&mut arrivals, &mut buffer);
        self.scratch.read = buffer;
        self.scratch.arrivals = arrivals;
        has_more
    }

    fn hand_over(&mut self, arrivals: &mut Vec<(Slot, Range<usize>)>, buffer: &mut [u8]) {
        let slots = arrivals.iter().map(|(slot, _)| *slot);
        slots.filter_map(|slot| self.fanout.connections.get(slot)).for_each(Connection::prefetch_handler);
        for (slot, bytes) in arrivals.drain(..) {
            self.receive(slot, &mut buffer[bytes]);
        }
    }

    /// The client sends no more. It may still read, so what is queued for it is written first.
    fn end_of_input(&mut self, slot: Slot) {
        let Some(connection) = self.fanout.connections.get_mut(slot) else { return };
        if connection.is_lingering() && connection.is_bridged() {
            self.drop_socket_if_over(slot);
            self.arm_ending(slot);
        } else if connection.is_lingering() {
            self.drop_socket(slot);
        } else if connection.drains() && connection.is_caught_up() {
            self.finish_draining(slot);
        } else if connection.is_open() && connection.is_caught_up() {
            // Before that a busy handler may still answer, and so may messages that are held for it.
            self.end_in_order(slot, CloseReason::Disconnected);
        } else if connection.is_delayed() {
            self.hand_held(slot); // for how long they may wait is known now
        }
    }

    /// Bytes that arrived together with the handshake are the first input.
    pub(super) fn receive_early(&mut self, slot: Slot, received: Bytes) {
        let mut received = received.to_vec();
        self.receive(slot, &mut received);
    }

    /// Handles what `input` contains: control frames at once, messages as soon as the handler is idle.
    fn receive(&mut self, slot: Slot, input: &mut [u8]) {
        let Some(connection) = self.fanout.connections.get(slot) else { return };
        let before = connection.unfinished_bytes();
        self.decode(slot, input);
        let Some(connection) = self.fanout.connections.get_mut(slot) else { return };
        connection.note_pause();
        let exceeds_rate = connection.exceeds_rate();
        self.count_unfinished(slot, before);
        if exceeds_rate {
            let _ = self.notify_rate_limited(slot, false); // if it is pending, it continues when its handler resumes
        }
    }

    /// Updates the sum of unfinished bytes for a connection that had `before`.
    pub(super) fn count_unfinished(&mut self, slot: Slot, before: usize) {
        let Some(connection) = self.fanout.connections.get(slot) else { return };
        self.fanout.unfinished_bytes = self.fanout.unfinished_bytes + connection.unfinished_bytes() - before;
    }

    fn decode(&mut self, slot: Slot, input: &mut [u8]) {
        let mut consumed = 0;
        while consumed < input.len() {
            let Some(connection) = self.fanout.connections.get_mut(slot) else { return };
            if connection.is_over() {
                return; // sent after the end: ignored
            }
            let from = consumed;
            let site = CallSite {
                position: self.core.position(self.reader.position()),
                resume_queue: &self.resume_queue,
            };
            let at = Arrival { now: self.fanout.now, arrived: self.fanout.arrived };
            let shown = self.core.beacons.call(self.index, connection.directory().key());
            let received = connection.receive(&mut input[from..], &mut consumed, at, &site);
            drop(shown);
            self.fanout.metrics.tally.received += u64::from(received.is_handled);
            self.fanout.metrics.tally.rate_delayed += u64::from(received.limit == Arrived::Waits);
            self.fanout.metrics.tally.rate_dropped += u64::from(received.limit == Arrived::IsDropped);
            let is_opened = received.is_handled && connection.is_opened_by_message();
            if is_opened {
                self.enter_in_order(slot);
            }
            if received.is_answered {
                self.fanout.mark_dirty(slot);
            }
            if let Some(reason) = received.end {
                self.end_in_order(slot, reason);
            }
        }
    }

    /// Passes held messages to the handler until it is busy or the next one exceeds a rate limit. Returns whether
    /// neither is the case.
    pub(super) fn hand_held(&mut self, slot: Slot) -> bool {
        loop {
            let Some(connection) = self.fanout.connections.get_mut(slot) else { return false };
            let before = connection.unfinished_bytes();
            let mut held = match connection.take_held(self.fanout.now) {
                NextHeld::None => return connection.is_idle(),
                NextHeld::Messages(held) => held,
                NextHeld::Later { due, is_new } => {
                    connection.remind_of_rate(due, &mut self.wheel);
                    self.fanout.metrics.tally.rate_delayed += u64::from(is_new);
                    return false;
                }
                NextHeld::Dropped(messages) => {
                    self.fanout.metrics.tally.rate_dropped += messages;
                    self.count_unfinished(slot, before);
                    continue;
                }
            };
            let input = held.pop();
            if input.is_some_and(|input| input.is_message()) {
                connection.count_received();
                self.fanout.metrics.tally.received += 1;
            }
            let mut end = None;
            if let Some(input) = input {
                (_, end) = self.run_handler(slot, |handler, context| input.pass_to(handler, context));
            }
            if let Some(connection) = self.fanout.connections.get_mut(slot) {
                connection.give_back_held(held);
            }
            self.count_unfinished(slot, before);
            if let Some(reason) = end {
                self.end_by_handler(slot, reason);
            }
        }
    }

    pub(super) fn resume_handlers(&mut self) {
        let mut resumes = std::mem::take(&mut self.scratch.resumes);
        resumes.extend(std::iter::from_fn(|| self.mailbox().pop_resume()).take(RESUMES_PER_TURN));
        self.rotate(&mut resumes);
        for id in resumes.drain(..) {
            let Some(connection) = self.find(id) else { continue };
            connection.take_resume();
            if connection.is_idle() {
                continue;
            }
            let flow = self.call(id.slot(), |handler, context| handler.on_resume(context));
            if flow == Poll::Ready(()) {
                self.proceed(id.slot());
            }
        }
        self.scratch.resumes = resumes;
    }

    /// Puts another one first in each turn, because the first may take all the room in the log.
    fn rotate<T>(&self, who: &mut [T]) {
        if who.len() > 1 {
            who.rotate_left((self.fanout.metrics.turns % who.len() as u64) as usize);
        }
    }

    /// The handler has finished the call that kept it busy.
    fn proceed(&mut self, slot: Slot) {
        let Some(connection) = self.fanout.connections.get_mut(slot) else { return };
        if connection.finish_work() {
            self.release_handler(slot);
            return;
        }
        if connection.opening().is_some_and(|opening| !opening.is_done) {
            self.enter_in_order(slot);
        }
        self.go_on(slot);
    }

    /// Continues with an idle handler: unreported drops, held messages, new ones.
    pub(super) fn go_on(&mut self, slot: Slot) {
        let Some(connection) = self.fanout.connections.get_mut(slot) else { return };
        if !connection.is_receiving() || !connection.has_socket() {
            self.notify_closed(slot);
            return;
        }
        let is_idle = self.notify_drops(slot) == Poll::Ready(())
            && self.notify_expired(slot) == Poll::Ready(())
            && self.notify_rate_limited(slot, false) == Poll::Ready(())
            && self.hand_held(slot);
        let Some(connection) = self.fanout.connections.get_mut(slot) else { return };
        if is_idle && connection.is_input_over() {
            self.end_of_input(slot);
        } else if connection.is_reading() {
            self.mark_ready(slot); // in the next turn: other connections come first
        }
    }

    /// Calls the handler; a panic ends the connection.
    pub(super) fn call(
        &mut self,
        slot: Slot,
        call: impl FnOnce(&mut dyn Handler, &mut Context<'_>) -> Poll<()>,
    ) -> Poll<()> {
        let (flow, end) = self.run_handler(slot, call);
        if let Some(reason) = end {
            self.end_by_handler(slot, reason);
        }
        flow
    }

    /// Calls the handler. Also returns the reason if the connection must end now.
    pub(super) fn run_handler(
        &mut self,
        slot: Slot,
        call: impl FnOnce(&mut dyn Handler, &mut Context<'_>) -> Poll<()>,
    ) -> (Poll<()>, Option<CloseReason>) {
        let Some(connection) = self.fanout.connections.get_mut(slot) else { return (Poll::Ready(()), None) };
        let _shown = self.core.beacons.call(self.index, connection.directory().key());
        let site = CallSite {
            position: self.core.position(self.reader.position()),
            resume_queue: &self.resume_queue,
        };
        connection.call(&site, call)
    }

    /// The handler has panicked or closes the connection: it gets no more messages, not even those that
    /// arrived before the end. One that has panicked is not notified of drops either.
    pub(super) fn end_by_handler(&mut self, slot: Slot, reason: CloseReason) {
        // Now, although the end follows later: until then another end may be decided, after which held messages are
        // handled.
        self.forget_held(slot);
        self.end_in_order(slot, reason);
    }

    /// Drops the messages that wait for a handler.
    pub(super) fn forget_held(&mut self, slot: Slot) {
        let Some(connection) = self.fanout.connections.get_mut(slot) else { return };
        let before = connection.unfinished_bytes();
        connection.forget_held();
        self.count_unfinished(slot, before);
    }
}
