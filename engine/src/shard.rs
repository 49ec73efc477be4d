//! A shard: one thread, its loop, its connections.
//!
//! Owns its sockets, its group index and its outboxes outright; nothing in here is
//! locked or shared. One turn: poll the sockets, read and hand over what came, carry out
//! the mailbox, run the log into the outboxes, flush, remind. Every step is bounded, so
//! that a fan-out to many does not starve reading, and what is left over comes first in
//! the next turn. Can be driven turn by turn with a given `now`. Does not know what
//! payloads mean, nor how a connection came here.
//!
//! Order (promises 1 to 3). Publications are run in the order of the log. A command
//! carries the log position that it must come after, and the log is run up to there
//! first. A publication may come after a command that its publisher sent before: so the
//! log's tail is read first, then the mailbox is emptied, then the log is run up to that
//! tail. If the mailbox was not emptied, the log goes no further in this turn.

use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use bytes::Bytes;
use mio::{Events, Poll, Token};

use crate::close_reason::CloseReason;
use crate::command::{Action, Adoption, Command, Payload, Publication, Target};
use crate::connection::{
    Connection, ControlRate, Ending, Flushed, Phase, Read, Unread, WRITE_BYTES_MAX, Work,
};
use crate::crowd::Crowd;
use crate::decoder::{Decoder, Event};
use crate::directory::{Directory, Entrance, Group};
use crate::frame::{ControlFrame, Frame};
use crate::group::Left;
use crate::handler::{Context, Flow, Message, Post};
use crate::heartbeat::{Beat, Heartbeat};
use crate::id::{ConnectionId, SLOTS_MAX};
use crate::log::Reader;
use crate::mailbox::Entry;
use crate::metrics::{Counts, Metrics};
use crate::outbox::{Chunk, Gather, Outbox};
use crate::policy::Policy;
use crate::publisher::Shared;
use crate::receipt::Ticket;
use crate::stopping::ShutdownReport;
use crate::wheel::Wheel;

pub(crate) const BELL: Token = Token(usize::MAX);

const EVENTS_PER_TURN: usize = 1024;
const READS_PER_SOCKET: usize = 4;
const COMMANDS_PER_TURN: usize = 4096;
const RESUMES_PER_TURN: usize = 4096;
/// Frames put into outboxes in one turn (some 5 ns each).
const OFFERS_PER_TURN: u64 = 200_000;
/// Publications run before everybody was flushed; less where outboxes are small.
const BURST_MAX: u64 = 256;
/// Connections flushed in one turn (some 4 µs each).
const FLUSHES_PER_TURN: usize = 512;

/// One thread's worth of connections; see [`Engine::driven`](crate::Engine::driven) for how to drive it by hand.
pub struct Shard {
    index: usize,
    shared: Arc<Shared>,
    /// The same, as handlers' wakers see it.
    post: Arc<dyn Post>,
    poll: Poll,
    events: Events,
    reader: Reader<Publication>,
    crowd: Crowd,
    wheel: Wheel<ConnectionId>,
    gather: Gather,
    started: Instant,
    /// Adoptions so far; tells apart the tenants of a slot.
    tenants: u64,
    nonces: u64,
    /// A command whose stamp the log has not reached.
    held: Option<Entry<Command>>,
    /// Slots with something left to read.
    ready: Vec<u32>,
    offers_left: u64,
    /// Publications run since everybody who is to be flushed has had a turn, and how many may be: else a peer that
    /// keeps up would find its outbox full because the shard has not come round to it.
    burst: u64,
    burst_max: u64,
    /// How many of the first in the list of those to be flushed have had no turn since.
    round_left: usize,
    /// What all threads have been told of the bytes in this shard's outboxes.
    backlog_told: usize,
    stop: Option<Stop>,
    scratch: Scratch,
}

/// What a shard is made of, on its own thread: it shares frames there by `Rc`.
pub(crate) struct Parts {
    pub(crate) index: usize,
    pub(crate) shared: Arc<Shared>,
    pub(crate) poll: Poll,
    pub(crate) reader: Reader<Publication>,
}

/// How far this shard has got with ending.
#[derive(Debug)]
struct Stop {
    /// When everything must be over.
    by: Duration,
    /// When handlers that are still busy are no longer waited for.
    closing_by: Duration,
    is_quiet: bool,
    /// Whom to close when, the last first; none while the engine drains.
    closings: Option<Vec<(Duration, ConnectionId)>>,
    report: ShutdownReport,
}

impl Stop {
    fn next_due(&self) -> Duration {
        match &self.closings {
            None => self.closing_by,
            Some(closings) => closings.last().map_or(self.by, |(due, _)| (*due).min(self.by)),
        }
    }
}

/// Buffers that keep their memory between turns.
#[derive(Default)]
struct Scratch {
    read: Vec<u8>,
    slots: Vec<u32>,
    due: Vec<(ConnectionId, u64)>,
    late: Vec<ConnectionId>,
}

impl std::fmt::Debug for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let connections = self.crowd.connections.len();
        f.debug_struct("Shard")
            .field("index", &self.index)
            .field("connections", &connections)
            .finish_non_exhaustive()
    }
}

impl Shard {
    pub(crate) fn new(parts: Parts, now: Instant) -> Self {
        let Parts { index, shared, poll, reader } = parts;
        let read = vec![0; shared.config.read_buffer_bytes];
        let seed = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), index);
        Self {
            index,
            post: shared.clone(),
            shared,
            poll,
            events: Events::with_capacity(EVENTS_PER_TURN),
            reader,
            crowd: Crowd::new(),
            wheel: Wheel::new(),
            backlog_told: 0,
            gather: Gather::default(),
            started: now,
            tenants: 0,
            nonces: seed,
            held: None,
            ready: Vec::new(),
            offers_left: 0,
            burst: 0,
            burst_max: BURST_MAX,
            round_left: 0,
            stop: None,
            scratch: Scratch { read, ..Scratch::default() },
        }
    }

    /// One turn at the time `now`, without blocking. `now` must not go back.
    ///
    /// # Errors
    /// The poll failed, which does not happen while the process has its file descriptors.
    pub fn turn(&mut self, now: Instant) -> std::io::Result<()> {
        self.poll_sockets(Some(Duration::ZERO))?;
        self.work(now);
        Ok(())
    }

    /// Whether another turn has something to do without anything new coming.
    pub fn has_work(&self) -> bool {
        !self.crowd.dirty.is_empty()
            || !self.ready.is_empty()
            || self.held.is_some()
            || !self.shared.mailboxes[self.index].is_empty()
            || !self.reader.is_at_tail()
    }

    /// When the next timer is due, if one is set.
    pub fn next_due(&self) -> Option<Instant> {
        let due = self.wheel.next().into_iter().chain(self.crowd.deadlines.next()).min();
        due.map(|due| self.started + due)
    }

    /// Turns until the engine stops and the connections have ended.
    pub(crate) fn run(mut self) {
        tracing::debug!(shard = self.index, "shard started");
        loop {
            let wait = self.sleep_bound(Instant::now());
            if let Err(error) = self.poll_sockets(wait) {
                tracing::error!(shard = self.index, %error, "polling failed; the shard ends");
                break;
            }
            let spins = wait == Some(Duration::ZERO) && self.events.is_empty() && !self.reader.is_at_tail();
            let began = Instant::now();
            self.work(began);
            self.measure_lag(began.elapsed());
            if spins && !self.reader.is_at_tail() && self.reader.get(0).is_none() {
                std::thread::yield_now(); // a publisher was stopped between claim and release: let it run
            }
            if self.has_stopped() {
                break;
            }
        }
        tracing::debug!(shard = self.index, "shard ended");
    }

    /// How long the poll may block: not at all while there is work, else until the next timer or the bell.
    fn sleep_bound(&self, now: Instant) -> Option<Duration> {
        let mailbox = &self.shared.mailboxes[self.index];
        let is_idle = || !self.has_work() && !self.has_news_of_stopping();
        if self.has_work() || !mailbox.fall_asleep(is_idle) {
            return Some(Duration::ZERO);
        }
        let stop = self.stop.as_ref().map(|stop| self.started + stop.next_due());
        let due = self.next_due().into_iter().chain(stop).min();
        due.map(|due| due.saturating_duration_since(now))
    }

    /// The longest turn of late: what a socket that has something had to wait at most.
    fn measure_lag(&mut self, turn: Duration) {
        let lag = self.crowd.metrics.lag_micros;
        self.crowd.metrics.lag_micros = (turn.as_micros() as u64).max(lag - lag.div_ceil(8));
    }

    fn poll_sockets(&mut self, wait: Option<Duration>) -> std::io::Result<()> {
        let polled = self.poll.poll(&mut self.events, wait);
        self.shared.mailboxes[self.index].wake_up();
        match polled {
            Err(error) if error.kind() != ErrorKind::Interrupted => Err(error),
            _ => Ok(()),
        }
    }

    fn work(&mut self, now: Instant) {
        self.crowd.now = self.crowd.now.max(now.saturating_duration_since(self.started));
        self.offers_left = OFFERS_PER_TURN;
        self.read_sockets();
        self.resume_handlers();
        let tail = self.shared.log.tail();
        if self.drain_mailbox() {
            self.run_log(tail);
        }
        self.carry_out_ends();
        self.flush_dirty();
        self.drop_late();
        self.remind();
        self.keep_within_budget();
        self.follow_stop();
        self.crowd.metrics.turns += 1;
        self.crowd.metrics.connections = self.crowd.connections.len() as u64;
        let Metrics { offered, written, dropped_timeout, dropped_overflow, discarded, .. } =
            self.crowd.metrics;
        self.crowd.metrics.pending = offered - written - dropped_timeout - dropped_overflow - discarded;
        self.crowd.metrics.pending_bytes = self.crowd.backlog_bytes as u64;
        self.shared.metrics[self.index].publish(&self.crowd.metrics);
    }

    // ---- sockets → handlers

    fn read_sockets(&mut self) {
        let events = std::mem::replace(&mut self.events, Events::with_capacity(0));
        for event in &events {
            if event.token() == BELL {
                continue;
            }
            let slot = event.token().0;
            let Some(connection) = self.crowd.connections.get_mut(slot) else { continue };
            if event.is_writable() && !connection.is_writable {
                connection.is_writable = true;
                connection.heartbeat.stirred(self.crowd.now);
                self.crowd.mark_dirty(slot as u32);
            }
            if event.is_readable() || event.is_read_closed() || event.is_error() {
                let Some(connection) = self.crowd.connections.get_mut(slot) else { continue };
                connection.is_readable = true;
                connection.is_read_closed |= event.is_read_closed() || event.is_error();
                if connection.is_reading() {
                    self.mark_ready(slot as u32);
                } else {
                    connection.heartbeat.heard_unread(self.crowd.now);
                    // Nobody reads now, but a socket that has failed need not be waited for. One that was
                    // closed may: what was said before is still to be read.
                    if event.is_error() {
                        self.end(slot as u32, CloseReason::Transport(ErrorKind::ConnectionReset));
                    }
                }
            }
        }
        self.events = events;
        for slot in std::mem::take(&mut self.ready) {
            if let Some(connection) = self.crowd.connections.get_mut(slot as usize) {
                connection.is_ready = false;
            }
            self.read(slot);
        }
    }

    fn mark_ready(&mut self, slot: u32) {
        if let Some(connection) = self.crowd.connections.get_mut(slot as usize)
            && !std::mem::replace(&mut connection.is_ready, true)
        {
            self.ready.push(slot);
        }
    }

    /// Reads a few times; what remains is read in the next turn.
    fn read(&mut self, slot: u32) {
        let mut buffer = std::mem::take(&mut self.scratch.read);
        for _ in 0..READS_PER_SOCKET {
            let Some(connection) = self.crowd.connections.get_mut(slot as usize) else { break };
            if !connection.is_reading() {
                break;
            }
            match connection.read(&mut buffer) {
                Read::Bytes(_) if connection.phase != Phase::Open => {} // said after the end: not listened to
                Read::Bytes(count) => {
                    connection.heartbeat.heard(self.crowd.now);
                    self.receive(slot, &mut buffer[..count]);
                }
                Read::Nothing => {}
                Read::End => self.hang_up(slot, CloseReason::Vanished),
                Read::Failed(kind) => self.hang_up(slot, CloseReason::Transport(kind)),
            }
        }
        self.scratch.read = buffer;
        if self.crowd.connections.get(slot as usize).is_some_and(Connection::is_reading) {
            self.mark_ready(slot);
        }
    }

    /// Hands over what `input` contains, and keeps what a busy handler leaves of it.
    fn receive(&mut self, slot: u32, input: &mut [u8]) {
        let consumed = self.decode(slot, input);
        if consumed < input.len()
            && let Some(connection) = self.crowd.connections.get_mut(slot as usize)
        {
            connection.unread = Some(Box::new(Unread { bytes: input[consumed..].to_vec(), from: 0 }));
        }
    }

    /// Hands over what `input` contains, as long as the handler keeps up; returns how much it took.
    fn decode(&mut self, slot: u32, input: &mut [u8]) -> usize {
        let mut consumed = 0;
        while consumed < input.len() {
            let Some(connection) = self.crowd.connections.get_mut(slot as usize) else { return input.len() };
            if connection.phase != Phase::Open || connection.is_deaf {
                return input.len(); // said after the end: not listened to
            }
            if !connection.is_listening() {
                return consumed;
            }
            let limits = connection.limits();
            let from = consumed;
            let end = match connection.decoder.decode(&mut input[from..], &mut consumed, &limits) {
                Ok(None) => None,
                Ok(Some(Event::Message { kind, payload })) => {
                    connection.counts.received += 1;
                    self.crowd.metrics.received += 1;
                    let mut context = Context::new(connection.id, &self.post, &mut connection.resume);
                    let message = Message { kind, payload };
                    let handler = &mut connection.handler;
                    let call = || handler.as_mut().map(|handler| handler.on_message(message, &mut context));
                    match catch_unwind(AssertUnwindSafe(call)) {
                        Ok(flow) => {
                            if flow == Some(Flow::Pending) {
                                connection.work = Work::Busy;
                            }
                            context.into_close()
                        }
                        Err(_) => Some(CloseReason::HandlerPanicked),
                    }
                }
                Ok(Some(Event::Ping(_) | Event::Pong(_)))
                    if !connection
                        .control_rate
                        .admits(self.crowd.now, connection.config.control_frames_per_second) =>
                {
                    Some(CloseReason::ControlFlood)
                }
                Ok(Some(Event::Ping(payload))) => {
                    connection.outbox.push_control(ControlFrame::pong(payload).as_bytes());
                    self.crowd.mark_dirty(slot);
                    None
                }
                Ok(Some(Event::Pong(payload))) => {
                    connection.heartbeat.pong(self.crowd.now, payload);
                    let max_rtt = connection.config.policy.max_rtt();
                    max_rtt
                        .filter(|max| connection.heartbeat.is_rtt_above(*max))
                        .map(|_| CloseReason::HighRtt)
                }
                Ok(Some(Event::Close(close))) => {
                    Some(CloseReason::Peer { code: close.map(|(code, _)| code) })
                }
                Err(error) => Some(CloseReason::Protocol(error)),
            };
            if let Some(connection) = self.crowd.connections.get_mut(slot as usize) {
                connection.decoder.release();
            }
            if let Some(reason) = end {
                self.end_in_order(slot, reason);
            }
        }
        consumed
    }

    fn resume_handlers(&mut self) {
        for _ in 0..RESUMES_PER_TURN {
            let Some(id) = self.shared.mailboxes[self.index].pop_resume() else { return };
            let Some(connection) = self.find(id) else { continue };
            if let Some(resume) = &connection.resume {
                resume.taken();
            }
            if connection.work == Work::Idle {
                continue;
            }
            let flow = self.call(id.slot() as u32, |handler, context| handler.on_resume(context));
            if flow == Flow::Ready {
                self.proceed(id.slot() as u32);
            }
        }
    }

    /// The handler is done with what kept it busy.
    fn proceed(&mut self, slot: u32) {
        let Some(connection) = self.crowd.connections.get_mut(slot as usize) else { return };
        let was = std::mem::replace(&mut connection.work, Work::Idle);
        if was == Work::Parting {
            self.part(slot);
            return;
        }
        if connection.phase != Phase::Open || connection.socket.is_none() {
            self.tell_end(slot);
            return;
        }
        if self.tell_drops(slot) == Flow::Pending {
            return;
        }
        let Some(connection) = self.crowd.connections.get_mut(slot as usize) else { return };
        if let Some(mut unread) = connection.unread.take() {
            unread.from += self.decode(slot, &mut unread.bytes[unread.from..]);
            if unread.from < unread.bytes.len()
                && let Some(connection) = self.crowd.connections.get_mut(slot as usize)
            {
                connection.unread = Some(unread); // kept as it is: copying the rest each time would cost its square
            }
        }
        self.read(slot);
    }

    /// Calls the handler; a panic ends the connection.
    fn call(
        &mut self,
        slot: u32,
        call: impl FnOnce(&mut dyn crate::handler::Handler, &mut Context<'_>) -> Flow,
    ) -> Flow {
        let Some(connection) = self.crowd.connections.get_mut(slot as usize) else { return Flow::Ready };
        let Some(handler) = connection.handler.as_deref_mut() else { return Flow::Ready };
        let mut context = Context::new(connection.id, &self.post, &mut connection.resume);
        let (flow, end) = match catch_unwind(AssertUnwindSafe(|| call(handler, &mut context))) {
            Ok(flow) => (flow, context.into_close()),
            Err(_) => (Flow::Ready, Some(CloseReason::HandlerPanicked)),
        };
        if flow == Flow::Pending && connection.work == Work::Idle {
            connection.work = Work::Busy;
        }
        if let Some(reason) = end {
            self.end_in_order(slot, reason);
        }
        flow
    }

    // ---- mailbox and log → outboxes

    /// Carries out what lay in the mailbox when it began; false if something of that is left.
    fn drain_mailbox(&mut self) -> bool {
        let shared = self.shared.clone();
        let mailbox = &shared.mailboxes[self.index];
        let lying = mailbox.len();
        let mut left = lying.min(COMMANDS_PER_TURN);
        let mut made_room = false;
        loop {
            let entry = match self.held.take() {
                Some(entry) => entry,
                None if left == 0 => break,
                None => match mailbox.pop() {
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
            mailbox.waiting.wake_all();
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
        let handler = match catch_unwind(AssertUnwindSafe(|| handler(id))) {
            Ok(handler) => handler,
            Err(_) => {
                tracing::error!(%id, "making a handler panicked; the connection was dropped");
                return;
            }
        };
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

    /// What came together with the handshake is the first that the peer said.
    fn receive_early(&mut self, slot: u32, received: Bytes) {
        let mut received = received.to_vec();
        self.receive(slot, &mut received);
    }

    /// Runs the log into the outboxes, up to `limit`; false if it did not get there.
    fn run_log(&mut self, limit: u64) -> bool {
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
    fn carry_out_ends(&mut self) {
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

    // ---- outboxes → sockets

    /// Everything has been written: what is left is the peer's to do, and it has the usual time for it.
    fn linger(&mut self, slot: u32) {
        let Some(connection) = self.crowd.connections.get_mut(slot as usize) else { return };
        let by = self.crowd.now + connection.config.close_timeout;
        if let Some(ending) = connection.ending.as_mut().filter(|ending| ending.by > by) {
            ending.by = by;
            connection.armed = self.wheel.arm(connection.id, by);
        }
    }

    /// One write for each connection with something queued; some are left for the next turn if there are many.
    fn flush_dirty(&mut self) {
        let mut dirty = std::mem::take(&mut self.crowd.dirty);
        let count = dirty.len().min(FLUSHES_PER_TURN);
        for slot in &dirty[..count] {
            self.flush(*slot);
        }
        self.gather.clear();
        self.round_left = self.round_left.saturating_sub(count);
        if self.round_left == 0 {
            self.burst = 0;
            self.round_left = dirty.len() - count;
        }
        // Who has waited longest comes first; who was marked meanwhile comes behind.
        dirty.drain(..count);
        dirty.append(&mut self.crowd.dirty);
        self.crowd.dirty = dirty;
    }

    fn flush(&mut self, slot: u32) {
        let Some(connection) = self.crowd.connections.get_mut(slot as usize) else { return };
        connection.is_dirty = false;
        let before = connection.outbox.backlog_bytes();
        let flushed = connection.flush(&mut self.gather, &mut self.crowd.metrics);
        self.crowd.backlog_bytes -= before - connection.outbox.backlog_bytes();
        if connection.is_congested && connection.outbox.is_relieved(&connection.bounds()) {
            connection.is_congested = false;
            let blocks = connection.config.policy.blocks();
            self.crowd.groups.groups_of(slot).for_each(|group| group.remove_congested(blocks));
        }
        match flushed {
            Flushed::Rests => {}
            Flushed::HasMore => self.crowd.mark_dirty(slot),
            Flushed::Finished if connection.is_read_closed => self.drop_socket(slot),
            Flushed::Finished => self.linger(slot),
            Flushed::Failed(kind) => self.hang_up(slot, CloseReason::Transport(kind)),
        }
    }

    /// Drops frames that have waited as long as they may.
    fn drop_late(&mut self) {
        let mut late = std::mem::take(&mut self.scratch.late);
        self.crowd.deadlines.expire(self.crowd.now, &mut late);
        for id in late.drain(..) {
            self.crowd.drop_late(id);
        }
        self.scratch.late = late;
        self.carry_out_ends();
    }

    /// Tells all threads how much waits here; while it is too much in all, sheds the largest backlogs first,
    /// as many as are this shard's part of the excess.
    fn keep_within_budget(&mut self) {
        let (shared, told) = (&self.shared, self.backlog_told);
        if self.crowd.backlog_bytes >= told {
            shared.backlog_bytes.fetch_add(self.crowd.backlog_bytes - told, Relaxed); // Relaxed: a sum, nothing hangs on it
        } else {
            shared.backlog_bytes.fetch_sub(told - self.crowd.backlog_bytes, Relaxed);
        }
        self.backlog_told = self.crowd.backlog_bytes;
        let (all, max) = (shared.backlog_bytes.load(Relaxed), shared.config.backlog_bytes_max);
        if all <= max || self.crowd.backlog_bytes == 0 {
            return;
        }
        let share = (all - max) as u128 * self.crowd.backlog_bytes as u128 / all as u128;
        let target = self.crowd.backlog_bytes - share as usize;
        for id in self.crowd.largest_backlogs(target) {
            if self.find(id).is_some_and(|connection| connection.phase != Phase::Open) {
                self.discard(id.slot() as u32); // it has its reason already
            } else {
                self.end(id.slot() as u32, CloseReason::Shed);
            }
        }
    }

    // ---- timers

    fn remind(&mut self) {
        let mut due = std::mem::take(&mut self.scratch.due);
        self.wheel.expire(self.crowd.now, &mut due);
        for (id, tick) in due.drain(..) {
            if self.find(id).is_some_and(|connection| connection.armed == tick) {
                self.beat(id.slot() as u32);
            }
        }
        self.scratch.due = due;
    }

    /// Does what is due for a connection and arms its next reminder.
    fn beat(&mut self, slot: u32) {
        let Some(connection) = self.crowd.connections.get_mut(slot as usize) else { return };
        let id = connection.id;
        if let Some(by) = connection.ending.as_ref().map(|ending| ending.by) {
            if connection.socket.is_none() {
                return; // only the handler is left, and it has the time it needs
            }
            if self.crowd.now >= by {
                self.drop_socket(slot);
            } else {
                connection.armed = self.wheel.arm(id, by);
            }
            return;
        }
        let config = connection.config.clone();
        let nonces = &mut self.nonces;
        loop {
            let end = match connection.heartbeat.beat(self.crowd.now, &config, || next_nonce(nonces)) {
                Beat::Wait(due) => {
                    connection.armed = self.wheel.arm(id, due);
                    return;
                }
                Beat::Ping(payload) => {
                    connection.outbox.push_control(ControlFrame::ping(&payload).as_bytes());
                    if connection.is_writable && !std::mem::replace(&mut connection.is_dirty, true) {
                        self.crowd.dirty.push(slot);
                    }
                    continue;
                }
                Beat::NoPong if connection.may_be_stuck() => {
                    connection.heartbeat.stirred(self.crowd.now);
                    continue;
                }
                Beat::NoPong => CloseReason::PongTimeout,
                Beat::Idle => CloseReason::IdleTimeout,
                Beat::TooOld => CloseReason::MaxDuration,
            };
            return self.end(slot, end);
        }
    }

    // ---- ends

    /// The stream is over: without a closing handshake if none has begun.
    fn hang_up(&mut self, slot: u32, reason: CloseReason) {
        self.end(slot, reason);
        self.drop_socket(slot);
    }

    /// Gives up what is queued for a connection, but for the frame that is being written.
    fn discard(&mut self, slot: u32) {
        let Some(connection) = self.crowd.connections.get_mut(slot as usize) else { return };
        let before = connection.outbox.backlog_bytes();
        let discarded = connection.outbox.discard(|ticket| ticket.count_disconnected());
        self.crowd.backlog_bytes -= before - connection.outbox.backlog_bytes();
        connection.counts.discarded += discarded;
        self.crowd.metrics.discarded += discarded;
    }

    /// Ends a connection behind everything that its handler has sent before.
    fn end_in_order(&mut self, slot: u32, reason: CloseReason) {
        let Some(connection) = self.crowd.connections.get_mut(slot as usize) else { return };
        if connection.phase != Phase::Open || std::mem::replace(&mut connection.is_deaf, true) {
            return;
        }
        let (id, namespace) = (connection.id, connection.directory.key());
        let command = Command::For { id, namespace, action: Action::Close(reason.clone()) };
        if self.shared.try_command(self.index, command).is_err() {
            self.crowd.ends.push((id, reason)); // the mailbox is full: not in order, but not lost
        }
    }

    /// Decides the end of an open connection: it leaves every index at once, its peer is told, its handler too.
    fn end(&mut self, slot: u32, reason: CloseReason) {
        let Some(connection) = self.crowd.connections.get_mut(slot as usize) else { return };
        if connection.phase != Phase::Open {
            return;
        }
        tracing::debug!(id = %connection.id, %reason, "connection ended");
        connection.phase = Phase::Closing;
        connection.unread = None;
        let is_readable = connection.is_readable;
        let directory = connection.directory.clone();
        let congestion = connection.congestion();
        connection.is_congested = false;
        self.crowd.metrics.ended += 1;
        match reason {
            CloseReason::Protocol(_) | CloseReason::ControlFlood => self.crowd.metrics.ended_protocol += 1,
            CloseReason::Undecodable | CloseReason::WrongKind => self.crowd.metrics.ended_undecodable += 1,
            CloseReason::PongTimeout | CloseReason::IdleTimeout | CloseReason::MaxDuration => {
                self.crowd.metrics.ended_timeout += 1;
            }
            CloseReason::SlowConsumer
            | CloseReason::TooManyDrops
            | CloseReason::HighRtt
            | CloseReason::Shed => {
                self.crowd.metrics.ended_slow += 1;
            }
            CloseReason::HandlerPanicked => self.crowd.metrics.ended_panic += 1,
            _ => {}
        }
        let is_told = reason.close_frame().is_some();
        if !reason.flushes_first() {
            self.discard(slot);
        }
        let Some(connection) = self.crowd.connections.get_mut(slot as usize) else { return };
        let by = match (&reason, &self.stop) {
            (CloseReason::Shutdown { .. }, Some(stop)) => stop.by,
            _ => self.crowd.now + connection.config.close_timeout,
        };
        connection.ending = Some(Box::new(Ending { reason, by }));
        if is_told {
            connection.owes_close = true;
            connection.armed = self.wheel.arm(connection.id, by);
        }
        if is_readable {
            self.mark_ready(slot);
        }
        while let Some((group, left)) = self.crowd.groups.leave_any(slot) {
            self.has_left(&directory, &group, left, congestion);
        }
        if is_told {
            self.crowd.mark_dirty(slot);
        } else {
            self.drop_socket(slot);
        }
        self.tell_end(slot);
    }

    /// A member is no longer in this shard's index: so the directory must not count it either.
    fn has_left(&self, directory: &Directory, group: &Arc<Group>, left: Left, congestion: Option<bool>) {
        if left == Left::WasNoMember {
            return;
        }
        if left == Left::WasLast {
            group.remove_interest(self.index);
        }
        if let Some(blocks) = congestion {
            group.remove_congested(blocks);
        }
        directory.exit(group);
    }

    /// Tells the handler of drops, if there were any; whether it is done with that.
    fn tell_drops(&mut self, slot: u32) -> Flow {
        let Some(connection) = self.crowd.connections.get_mut(slot as usize) else { return Flow::Ready };
        match std::mem::take(&mut connection.drops_untold) {
            0 => Flow::Ready,
            frames => self.call(slot, |handler, context| handler.on_drop(frames, context)),
        }
    }

    /// Tells the handler the end, unless it is busy: then when it is done.
    fn tell_end(&mut self, slot: u32) {
        let Some(connection) = self.crowd.connections.get_mut(slot as usize) else { return };
        if connection.work != Work::Idle || connection.handler.is_none() {
            return;
        }
        if self.tell_drops(slot) == Flow::Pending {
            return; // and again when it is done
        }
        let Some(connection) = self.crowd.connections.get_mut(slot as usize) else { return };
        let Some(reason) = connection.ending.as_ref().map(|ending| ending.reason.clone()) else { return };
        match self.call(slot, |handler, context| handler.on_close(&reason, context)) {
            Flow::Pending => {
                if let Some(connection) = self.crowd.connections.get_mut(slot as usize) {
                    connection.work = Work::Parting;
                }
            }
            Flow::Ready => self.part(slot),
        }
    }

    /// Lets go of a handler that has been told the end.
    fn part(&mut self, slot: u32) {
        let Some(connection) = self.crowd.connections.get_mut(slot as usize) else { return };
        let handler = connection.handler.take();
        if catch_unwind(AssertUnwindSafe(|| drop(handler))).is_err() {
            tracing::error!(id = %connection.id, "dropping a handler panicked");
        }
        self.remove_if_over(slot);
    }

    fn drop_socket(&mut self, slot: u32) {
        let Some(connection) = self.crowd.connections.get_mut(slot as usize) else { return };
        connection.socket = None;
        self.crowd.backlog_bytes -= connection.outbox.backlog_bytes();
        let discarded = connection.outbox.discard_all(|ticket| ticket.count_disconnected());
        connection.counts.discarded += discarded;
        self.crowd.metrics.discarded += discarded;
        if let Some(stop) = &mut self.stop {
            match discarded {
                0 => stop.report.flushed += 1,
                _ => stop.report.cut_off += 1,
            }
        }
        self.remove_if_over(slot);
    }

    fn remove_if_over(&mut self, slot: u32) {
        let is_over = self.crowd.connections.get(slot as usize).is_some_and(|connection| {
            connection.phase != Phase::Open && connection.socket.is_none() && connection.handler.is_none()
        });
        if is_over {
            self.crowd.connections.remove(slot as usize);
        }
    }

    /// Whether the engine's ending has come further than this shard has followed.
    fn has_news_of_stopping(&self) -> bool {
        match &self.stop {
            None => self.shared.stopping.is_asked(),
            Some(stop) => stop.closings.is_none() && self.shared.stopping.is_closed(),
        }
    }

    /// Takes part in the engine's ending, as far as it has come.
    fn follow_stop(&mut self) {
        let Some(plan) = self.shared.stopping.plan() else { return };
        let now = self.crowd.now;
        if self.stop.is_none() {
            let by = plan.by.saturating_duration_since(self.started);
            let closing_by = by.saturating_sub(plan.within / 2);
            let report = ShutdownReport::default();
            self.stop = Some(Stop { by, closing_by, is_quiet: false, closings: None, report });
            for (_, connection) in &mut self.crowd.connections {
                connection.is_paused = true;
            }
        }
        let Some(stop) = &mut self.stop else { return };
        if stop.closings.is_none() {
            let is_busy = |(_, connection): (usize, &Connection)| connection.work == Work::Busy;
            if !stop.is_quiet && !self.crowd.connections.iter().any(is_busy) {
                stop.is_quiet = true;
                if self.shared.stopping.tell_quiet() {
                    self.shared.close();
                }
            }
            if now >= stop.closing_by {
                self.shared.close();
            }
            if !self.shared.stopping.is_closed() || !self.reader.is_at_tail() {
                return; // what was published before goes out first
            }
            let open =
                self.crowd.connections.iter().filter(|(_, connection)| connection.phase == Phase::Open);
            // The golden ratio spreads neighbours over the window.
            let closing = |(slot, connection): (usize, &Connection)| {
                (now + plan.spread.mul_f64(golden(slot)), connection.id)
            };
            let mut closings: Vec<_> = open.map(closing).collect();
            closings.sort_unstable_by(|a, b| b.cmp(a));
            stop.closings = Some(closings);
        }
        while let Some(stop) = &mut self.stop
            && let Some(closings) = &mut stop.closings
            && let Some((_, id)) = closings.pop_if(|(due, _)| *due <= now)
        {
            if self.find(id).is_some() {
                self.end(id.slot() as u32, CloseReason::Shutdown { code: plan.code });
            }
        }
    }

    fn has_stopped(&self) -> bool {
        self.stop.as_ref().is_some_and(|stop| {
            let is_over = stop.closings.is_some() && self.crowd.connections.is_empty();
            is_over || self.crowd.now >= stop.by
        })
    }

    fn find(&self, id: ConnectionId) -> Option<&Connection> {
        self.crowd.connections.get(id.slot()).filter(|connection| connection.id == id)
    }
}

impl Drop for Shard {
    /// Nobody waits for a shard that has ended.
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Promises cannot be kept with a part of the connections gone: the whole engine stops.
            tracing::error!(shard = self.index, "a shard panicked; the engine stops");
            self.shared.stop(Duration::ZERO, Instant::now());
        }
        self.shared.mailboxes[self.index].close();
        let mut report = self.stop.take().map_or_else(ShutdownReport::default, |stop| stop.report);
        for (_, connection) in &self.crowd.connections {
            report.left_over += u64::from(connection.handler.is_some());
            match connection.outbox.pending() {
                _ if connection.socket.is_none() => {}
                0 => report.flushed += 1,
                _ => report.cut_off += 1,
            }
        }
        self.shared.stopping.tell_end(report);
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

/// A number in [0, 1) for each slot, such that neighbours lie far apart.
fn golden(slot: usize) -> f64 {
    (slot as f64 * 0.618_033_988_749_895).fract()
}

/// SplitMix64: unpredictable enough that a peer cannot answer a ping that it has not seen.
fn next_nonce(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}
