//! Our side of one WebSocket: its socket, its unfinished input, its queued output.
//!
//! Owned by one shard. Moves bytes between the socket, the decoder and the outbox (`connection/`), and keeps
//! the state of the closing handshake. Other modules use its fields through methods only. Does not know other
//! connections, groups or the log: what affects them is returned to the shard as a verdict.
//!
//! Its life, in `Phase`: *Open*; *Closing*, from the decision to end it until the Close frame has been passed
//! to the kernel (nothing more is offered to it; messages that arrived before the end are still handled);
//! *Lingering*, until the client ends its stream, because closing the socket earlier could destroy a Close
//! frame in flight; then the socket is dropped. A connection that *drains* is closing or lingering, and its
//! client's messages are still passed to the handler, until the client's Close frame arrives. The handler may outlive the socket: it may finish its current
//! call, and is notified of the end after that.
//!
//! An open connection is first *opening*, until its handler's `on_open` is done. Until then it gets only what
//! is sent to it alone or to groups that the handler has joined.

use std::hint::black_box;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use crate::admission::{ConnectionPermit, Seat};
use crate::close_code::CloseCode;
use crate::close_reason::CloseReason;
use crate::config::ConnectionConfig;
use crate::decoder::Decoder;
use crate::directory::{Directory, Group, PendingJoin};
use crate::drop_notice::DropNotice;
use crate::frame::ControlFrame;
use crate::handler::{Context, Handler, Resume, ResumeQueue};
use crate::heartbeat::{Beat, Heartbeat};
use crate::held::Held;
use crate::id::{ConnectionId, Slot};
use crate::limiter::Limiter;
use crate::metrics::{ConnectionMetrics, Counts};
use crate::outbox::{Bounds, Outbox};
use crate::position::Position;
use crate::presence::User;
use crate::receipt::Origin;
use crate::rendition::Encoding;
use crate::socket::Socket;
use crate::tally::Tally;
use crate::wheel::{NO_TICK, Wheel};

#[cfg(feature = "audit")]
mod audit;
mod limiting;
mod reading;
mod writing;

pub(crate) use self::limiting::NextHeld;
pub(crate) use self::reading::{Arrival, Read};
pub(crate) use self::writing::{Discarded, Flushed, WRITE_BYTES_MAX};

use self::reading::ControlRate;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    Closing,
    Lingering,
}

/// Whether messages are passed to the handler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Intake {
    Open,
    /// The engine is shutting down: no more messages are passed to the handler. Control frames are still answered.
    Paused,
    /// The end is decided, and the client's messages are still passed to the handler until its Close frame arrives.
    Draining,
    /// The end is decided and queued, after what was sent before: no more input is read. Messages that were
    /// read before are still passed to the handler, unless the engine is shutting down as well.
    Over {
        hands_held: bool,
    },
}

/// What the handler is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    Idle,
    /// It answered `Pending` to a call.
    Busy,
    /// It was notified of the end, and answered `Pending`.
    InOnClose,
}

pub(crate) struct Connection {
    id: ConnectionId,
    /// None when it has been dropped and only the handler is left.
    socket: Option<Socket>,
    config: Arc<ConnectionConfig>,
    directory: Arc<Directory>,
    decoder: Decoder,
    outbox: Outbox<Origin>,
    /// None when it has been released.
    handler: Option<Box<dyn Handler>>,
    resume: Option<Arc<Resume>>,
    /// Messages that arrived while the handler was busy, or that exceed the rate limit.
    held: Option<Box<Held>>,
    /// None where no rate is limited.
    limiter: Option<Box<Limiter>>,
    passage: Option<Box<Passage>>,
    heartbeat: Heartbeat,
    /// The wheel's tick at which its timer fires; other entries in the wheel are stale.
    timer_tick: u64,
    /// Since when the kernel has refused further writes, in microseconds; 0 while it accepts them.
    refused_since: u64,
    /// Bytes passed to the kernel. Wraps, and is only compared.
    written: u32,
    /// The number of them that the client had taken at the last look.
    taken: u32,
    /// The number of them at the time of the last ping.
    ping_end: u32,
    counts: Counts,
    control_rate: ControlRate,
    phase: Phase,
    work: Work,
    intake: Intake,
    /// The Close frame is still to be queued, after all data.
    close_frame_pending: bool,
    /// The kernel may have bytes to read.
    is_readable: bool,
    /// The kernel announced the end of the stream, so a short read does not mean that its buffer is empty.
    is_read_closed: bool,
    /// The end of the stream was read.
    is_input_over: bool,
    /// The kernel has not refused a write since it last announced room.
    is_writable: bool,
    /// Is in the shard's list of connections to flush.
    is_dirty: bool,
    /// Is in the shard's list of connections to read.
    is_ready: bool,
    /// Is counted as congested in its groups.
    is_congested: bool,
    encoding: Encoding,
    /// None for most connections.
    user: Option<Box<ConnectionUser>>,
    seat: Seat,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.seat.leave(self.id.shard());
    }
}

/// The user of a connection.
#[derive(Debug)]
pub(crate) struct ConnectionUser {
    pub(crate) user: User,
    /// Lists it with the user's others, where the oldest of them is replaced at a limit.
    pub(crate) listed: Option<Listed>,
}

/// Held by a connection until its end is decided.
#[derive(Debug)]
pub(crate) struct Listed {
    pub(crate) id: ConnectionId,
    pub(crate) group: Arc<Group>,
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.group.forget_connection(self.id);
    }
}

/// The context in which a shard calls a handler.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CallSite<'a> {
    pub(crate) position: Position,
    pub(crate) resume_queue: &'a Arc<dyn ResumeQueue>,
}

/// State that a connection has only at its beginning or only at its end.
#[derive(Debug)]
enum Passage {
    Opening(Opening),
    Ending(Ending),
}

/// How a connection ends.
#[derive(Debug)]
pub(crate) struct Ending {
    pub(crate) reason: CloseReason,
    /// The deadline of the closing handshake.
    pub(crate) by: Duration,
    /// When frames that still wait are discarded, so that the Close frame gets through; none once that is done.
    pub(crate) flush_by: Option<Duration>,
    /// Frames were discarded.
    pub(crate) is_cut: bool,
}

/// A connection whose handler has not finished `on_open`. It is not a member of everyone yet.
#[derive(Debug)]
pub(crate) struct Opening {
    pub(crate) everyone: PendingJoin,
    /// Its user, if it has one.
    pub(crate) user: Option<PendingJoin>,
    /// `on_open` is done, and joining everyone is in the shard's list, after what the handler has sent.
    pub(crate) is_done: bool,
    /// The first message has not arrived that opens the connection instead of `on_open`.
    pub(crate) awaits: Option<Awaited>,
}

/// A first message that has not arrived.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Awaited {
    pub(crate) by: Duration,
    pub(crate) max_bytes: usize,
}

impl Connection {
    /// A connection that opened at `now`.
    #[expect(clippy::too_many_arguments, reason = "it is built in one place, from the parts of an adoption")]
    pub(crate) fn open(
        id: ConnectionId,
        socket: Socket,
        config: Arc<ConnectionConfig>,
        encoding: Encoding,
        directory: Arc<Directory>,
        handler: Box<dyn Handler>,
        permit: ConnectionPermit,
        now: Duration,
    ) -> Self {
        Self {
            id,
            socket: Some(socket),
            heartbeat: Heartbeat::new(now, id.slot().spread() as f32, &config),
            directory,
            decoder: Decoder::default(),
            outbox: Outbox::new(),
            handler: Some(handler),
            resume: None,
            held: None,
            limiter: Limiter::new(&config.rate_limit),
            passage: None,
            timer_tick: NO_TICK,
            refused_since: 0,
            written: 0,
            taken: 0,
            ping_end: 0,
            counts: Counts::default(),
            control_rate: ControlRate::default(),
            phase: Phase::Open,
            work: Work::Idle,
            intake: Intake::Open,
            close_frame_pending: false,
            is_readable: false,
            is_read_closed: false,
            is_input_over: false,
            is_writable: true,
            is_dirty: false,
            is_ready: false,
            is_congested: false,
            config,
            encoding,
            user: None,
            seat: permit.into_seat(),
        }
    }

    pub(crate) fn id(&self) -> ConnectionId {
        self.id
    }

    pub(crate) fn slot(&self) -> Slot {
        self.id.slot()
    }

    pub(crate) fn config(&self) -> &ConnectionConfig {
        &self.config
    }

    pub(crate) fn directory(&self) -> &Arc<Directory> {
        &self.directory
    }

    pub(crate) fn encoding(&self) -> Encoding {
        self.encoding
    }

    pub(crate) fn user(&self) -> Option<&User> {
        self.user.as_deref().map(|user| &user.user)
    }

    /// What its groups must know when it leaves them.
    pub(crate) fn presence(&self) -> Option<(Arc<str>, Duration)> {
        self.user().map(|user| (user.name.clone(), self.config.presence_grace))
    }

    /// Sets its user, once, at its adoption.
    pub(crate) fn set_user(&mut self, user: ConnectionUser) {
        self.user = Some(Box::new(user));
    }

    pub(crate) fn set_metadata(&mut self, metadata: Arc<[u8]>) {
        if let Some(user) = &mut self.user {
            user.user.metadata = Some(metadata);
        }
    }

    pub(crate) fn has_socket(&self) -> bool {
        self.socket.is_some()
    }

    pub(crate) fn has_handler(&self) -> bool {
        self.handler.is_some()
    }

    pub(crate) fn is_open(&self) -> bool {
        self.phase == Phase::Open
    }

    /// Whether what the client sends is decoded.
    pub(crate) fn is_receiving(&self) -> bool {
        self.phase == Phase::Open || self.drains()
    }

    pub(crate) fn drains(&self) -> bool {
        self.intake == Intake::Draining
    }

    pub(crate) fn is_lingering(&self) -> bool {
        self.phase == Phase::Lingering
    }

    /// Whether nothing is left for which its slot must be kept.
    pub(crate) fn is_gone(&self) -> bool {
        !self.is_open() && self.socket.is_none() && self.handler.is_none()
    }

    /// Sets its timer to `due`, unless it fires earlier already.
    pub(crate) fn remind_at(&mut self, due: Duration, wheel: &mut Wheel<Slot>) {
        wheel.arm_earlier(self.slot(), due, &mut self.timer_tick);
    }

    /// A timer has fired; false if it was replaced by another one.
    pub(crate) fn is_reminded(&mut self, tick: u64) -> bool {
        let is_current = self.timer_tick == tick;
        if is_current {
            // Another one may be in the wheel already, see `remind_of_rate`.
            self.timer_tick =
                self.limiter.as_mut().and_then(|limiter| limiter.take_later_tick(tick)).unwrap_or(NO_TICK);
        }
        is_current
    }

    /// What its heartbeat requires now.
    pub(crate) fn beat(&mut self, now: Duration, listened: Duration, nonce: impl FnOnce() -> u64) -> Beat {
        self.heartbeat.beat(now, listened, &self.config, nonce)
    }

    /// Reads a little of what a message needs here, see [`Handler::prefetch`].
    pub(crate) fn prefetch(&self) {
        black_box((
            self.socket.is_some(),
            self.heartbeat.awaits_answer(),
            self.decoder.heap_bytes(),
            self.id,
        ));
        black_box((self.outbox.queued(), self.held.is_some(), self.counts.received, self.phase));
    }

    /// Does the same for its handler.
    pub(crate) fn prefetch_handler(&self) {
        if let Some(handler) = &self.handler {
            handler.prefetch();
        }
    }

    /// Its counters so far.
    pub(crate) fn tally(&self) -> Tally {
        let (rate_delayed, rate_dropped) = self.limiter.as_ref().map_or((0, 0), |limiter| limiter.counts());
        Tally { rate_delayed, rate_dropped, ..self.counts.tally() }
    }

    /// Counts frames that address it.
    #[inline]
    pub(crate) fn count_offered(&mut self, frames: u64) {
        self.counts.offered += frames;
    }

    /// Whether its handler has finished its current call.
    pub(crate) fn is_idle(&self) -> bool {
        self.work == Work::Idle
    }

    /// Whether its handler is busy with anything but the connection's end.
    pub(crate) fn is_busy(&self) -> bool {
        self.work == Work::Busy
    }

    /// Its handler answered `Pending` to the end.
    pub(crate) fn wait_for_on_close(&mut self) {
        self.work = Work::InOnClose;
    }

    /// Its handler has finished its call; true if that was the end's.
    pub(crate) fn finish_work(&mut self) -> bool {
        std::mem::replace(&mut self.work, Work::Idle) == Work::InOnClose
    }

    /// A resume of it was taken out of the mailbox.
    pub(crate) fn take_resume(&self) {
        if let Some(resume) = &self.resume {
            resume.taken();
        }
    }

    /// Calls the handler. Also returns the reason if the connection must end now: by the handler's wish or its panic.
    pub(crate) fn call(
        &mut self,
        site: &CallSite<'_>,
        call: impl FnOnce(&mut dyn Handler, &mut Context<'_>) -> Poll<()>,
    ) -> (Poll<()>, Option<CloseReason>) {
        let Some(handler) = self.handler.as_deref_mut() else { return (Poll::Ready(()), None) };
        let mut context = Context::new(self.id, site.position, site.resume_queue, &mut self.resume);
        let (flow, end) = match catch_unwind(AssertUnwindSafe(|| call(handler, &mut context))) {
            Ok(flow) => (flow, context.into_close()),
            Err(_) => (Poll::Ready(()), Some(CloseReason::HandlerPanicked)),
        };
        if flow == Poll::Pending && self.is_idle() {
            self.work = Work::Busy;
        }
        (flow, end)
    }

    /// Releases the handler.
    pub(crate) fn take_handler(&mut self) -> Option<Box<dyn Handler>> {
        self.handler.take()
    }

    /// Takes the oldest drops that were not yet reported to the handler.
    pub(crate) fn take_drop_notice(&mut self) -> Option<DropNotice> {
        self.counts.take_drop_notice()
    }

    /// So many of those frames could not be given to its outbox, and it ends.
    pub(crate) fn count_discarded(&mut self, frames: u64) {
        self.counts.discard(frames);
    }

    /// Its handler is not notified of drops any more.
    pub(crate) fn stop_drop_notices(&mut self) {
        self.counts.lose().notices.stop();
        self.limiter.iter_mut().for_each(|limiter| limiter.stop_notices());
    }

    /// Its end is decided. Nothing more is decoded unless it `drains`; messages that were read before are still
    /// passed to the handler if it `drains` or `keeps_held`.
    pub(crate) fn begin_closing(&mut self, keeps_held: bool, drains: bool) {
        self.phase = Phase::Closing;
        drop(self.take_opening());
        if let Some(user) = &mut self.user {
            user.listed = None;
        }
        if drains && self.intake == Intake::Open && !self.is_input_over {
            self.intake = Intake::Draining;
        } else {
            self.decoder = Decoder::default();
            if !keeps_held {
                self.forget_held();
            }
        }
    }

    /// Nothing more is decoded. Messages that were read before are still passed to the handler.
    pub(crate) fn stop_draining(&mut self) {
        self.decoder = Decoder::default();
        self.stop_listening();
    }

    /// The engine is shutting down.
    pub(crate) fn pause(&mut self) {
        self.intake = match self.intake {
            Intake::Open | Intake::Paused => Intake::Paused,
            Intake::Draining | Intake::Over { .. } => Intake::Over { hands_held: false },
        };
    }

    /// The connection will end; false if that was known.
    pub(crate) fn stop_listening(&mut self) -> bool {
        let before = self.intake;
        if before != (Intake::Over { hands_held: false }) {
            self.intake = Intake::Over { hands_held: before != Intake::Paused };
        }
        !matches!(before, Intake::Over { .. })
    }

    /// Whether nothing more is decoded: the connection is closing and does not drain, or will close as soon as what was
    /// sent before has been handled.
    pub(crate) fn is_over(&self) -> bool {
        !self.is_receiving() || matches!(self.intake, Intake::Over { .. })
    }

    pub(crate) fn bounds(&self) -> Bounds {
        Bounds {
            frames: self.config.outbox_frames,
            bytes: self.config.outbox_bytes,
            overflow_frames: self.config.overflow_frames,
            overflow_bytes: self.config.overflow_bytes,
        }
    }

    /// Everyone, while it is opening. It is not a member yet but can be addressed, so if it is congested it
    /// is counted there, where publishers look.
    pub(crate) fn provisional_group(&self) -> Option<&Group> {
        self.opening().map(|_| &**self.directory.everyone())
    }

    /// Ends its opening: if it is congested, it is no longer counted in everyone. Joining counts it again.
    pub(crate) fn take_opening(&mut self) -> Option<Opening> {
        if let (Some(group), Some(blocks)) = (self.provisional_group(), self.congestion()) {
            group.remove_congested(blocks);
        }
        match self.passage.take_if(|passage| matches!(**passage, Passage::Opening(_))).map(|passage| *passage)
        {
            Some(Passage::Opening(opening)) => Some(opening),
            _ => None,
        }
    }

    /// None once it is fully open.
    pub(crate) fn opening(&self) -> Option<&Opening> {
        match self.passage.as_deref() {
            Some(Passage::Opening(opening)) => Some(opening),
            _ => None,
        }
    }

    pub(crate) fn opening_mut(&mut self) -> Option<&mut Opening> {
        match self.passage.as_deref_mut() {
            Some(Passage::Opening(opening)) => Some(opening),
            _ => None,
        }
    }

    /// The first message that it waits for.
    pub(crate) fn awaits(&self) -> Option<Awaited> {
        self.opening().and_then(|opening| opening.awaits)
    }

    /// Whether its handler has handled the first message, so that its opening is done.
    pub(crate) fn is_opened_by_message(&self) -> bool {
        self.is_idle() && self.opening().is_some_and(|opening| !opening.is_done && opening.awaits.is_none())
    }

    /// Whether it is opening and has no user.
    pub(crate) fn is_anonymous_and_opening(&self) -> bool {
        self.user.is_none() && self.opening().is_some()
    }

    /// Sets when it expires.
    pub(crate) fn expire_at(&mut self, at: Option<Duration>) {
        self.heartbeat.expire_at(at);
    }

    /// Whether it has expired and its handler was not asked yet.
    pub(crate) fn take_expired(&mut self) -> bool {
        self.heartbeat.take_expired()
    }

    pub(crate) fn begin_opening(&mut self, opening: Opening) {
        self.passage = Some(Box::new(Passage::Opening(opening)));
    }

    /// How it ends, once that is decided.
    pub(crate) fn ending(&self) -> Option<&Ending> {
        match self.passage.as_deref() {
            Some(Passage::Ending(ending)) => Some(ending),
            _ => None,
        }
    }

    pub(crate) fn ending_mut(&mut self) -> Option<&mut Ending> {
        match self.passage.as_deref_mut() {
            Some(Passage::Ending(ending)) => Some(ending),
            _ => None,
        }
    }

    /// `is_told`: a Close frame is sent, after all data.
    pub(crate) fn begin_ending(&mut self, ending: Ending, is_told: bool) {
        self.close_frame_pending = is_told;
        self.passage = Some(Box::new(Passage::Ending(ending)));
    }

    pub(crate) fn metrics(&self) -> ConnectionMetrics {
        ConnectionMetrics {
            tally: self.tally(),
            pending_bytes: self.backlog_bytes() as u64,
            rtt: self.heartbeat.rtt(),
        }
    }

    fn close_frame(&self) -> ControlFrame {
        match self.ending().and_then(|ending| ending.reason.close_frame()) {
            Some((code, text)) if code != CloseCode::NO_STATUS => ControlFrame::close(code, &text),
            _ => ControlFrame::close_empty(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::print_stdout, reason = "`cargo test -- --nocapture` prints the number")]
    fn a_connection_costs_a_known_amount_of_memory() {
        println!("the state of a connection: {} bytes", size_of::<Connection>());
        let selector_id = if cfg!(debug_assertions) { size_of::<usize>() } else { 0 }; // in mio's sockets
        assert!(size_of::<Connection>() <= 296 + selector_id, "{} bytes", size_of::<Connection>());
    }
}
