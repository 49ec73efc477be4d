//! Our side of one WebSocket: its socket, what it has sent half, what it has not taken yet.
//!
//! Owned by one shard. Moves bytes between the socket, the decoder and the outbox, and
//! keeps the state of the closing handshake. Does not know other connections, groups or
//! the log: what concerns them is told to the shard as a verdict.
//!
//! Its life, in `Phase`: *Open*; *Closing*, from the moment that its end is decided until
//! the Close frame is with the kernel (nothing is offered any more; messages that came
//! before the end are still handled); *Lingering*, until the peer's end of the stream
//! comes, so that closing the socket does not destroy the Close frame on its way; then the
//! socket is dropped. The handler may outlive the socket: it may finish what it is
//! doing, and is told the end after that.
//!
//! An open connection is first *opening*, until its handler's `on_open` is done. Until then
//! it gets only what is sent to it alone or to groups that the handler has joined.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use crate::admission::Place;
use crate::close_code::CloseCode;
use crate::close_reason::CloseReason;
use crate::config::ConnectionConfig;
use crate::decoder::{Decoder, Limits};
use crate::directory::{Directory, Entrance, Group};
use crate::frame::ControlFrame;
use crate::handler::{Handler, Resume};
use crate::heartbeat::Heartbeat;
use crate::held::Held;
use crate::id::ConnectionId;
use crate::metrics::{ConnectionMetrics, Counts, Metrics};
use crate::outbox::{Bounds, Gather, Next, Outbox};
use crate::receipt::Ticket;
use crate::socket::Socket;
use crate::wheel::UNARMED;

/// Bytes that are gathered into one write, and given to one connection before the next one's turn.
pub(crate) const WRITE_BYTES_MAX: usize = 64 << 10;
const WRITES_PER_FLUSH: usize = 16;
/// How often a peer that takes nothing is looked at before it is given up. It is given up so much too late at most, as a
/// part of the timeout.
const STALL_LOOKS: u32 = 4;
/// Bytes of messages that are held for a busy handler. With so many nothing more is read before the handler is done:
/// no pings and no Close.
const HELD_BYTES_MAX: usize = 16 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Open,
    Closing,
    Lingering,
}

/// Whether messages are handed to the handler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Intake {
    Open,
    /// The engine is ending: no more messages are handed over. Control frames are still answered.
    Paused,
    /// The end is decided and on its way, behind what was sent before: nothing more is listened to. What was read before
    /// is still handed over, unless the engine is ending as well.
    Over {
        hands_held: bool,
    },
}

/// What the handler is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    Idle,
    /// It answered `Pending` to something.
    Busy,
    /// It was told the end, and answered `Pending`.
    Parting,
}

pub(crate) struct Connection {
    pub(crate) id: ConnectionId,
    /// None when it has been dropped and only the handler is left.
    pub(crate) socket: Option<Socket>,
    pub(crate) config: Arc<ConnectionConfig>,
    pub(crate) directory: Arc<Directory>,
    pub(crate) decoder: Decoder,
    pub(crate) outbox: Outbox<Ticket>,
    /// None when it has parted.
    pub(crate) handler: Option<Box<dyn Handler>>,
    pub(crate) resume: Option<Arc<Resume>>,
    /// What came while the handler was busy.
    pub(crate) held: Option<Box<Held>>,
    pub(crate) passage: Option<Box<Passage>>,
    pub(crate) heartbeat: Heartbeat,
    /// The tick of the wheel at which it is to be looked at next; other reminders are stale.
    pub(crate) armed: u64,
    /// Since when the kernel refuses to take more for the peer, in microseconds; 0 while it takes more.
    pub(crate) refused_since: u64,
    /// Bytes given to the kernel. Wraps, and is only compared.
    pub(crate) written: u32,
    /// How many of them the peer had taken when this was last asked.
    pub(crate) taken: u32,
    /// How many of them had been given when the last ping was.
    pub(crate) ping_end: u32,
    pub(crate) counts: Counts,
    pub(crate) control_rate: ControlRate,
    pub(crate) phase: Phase,
    pub(crate) work: Work,
    pub(crate) intake: Intake,
    /// The Close frame is still to be queued, behind all data.
    pub(crate) owes_close: bool,
    /// The kernel may have bytes for us.
    pub(crate) is_readable: bool,
    /// The kernel's end of the stream was announced, so a short read does not mean that it is empty.
    pub(crate) is_read_closed: bool,
    /// The end of the stream was read.
    pub(crate) is_input_over: bool,
    /// The kernel has not refused a write since it last announced room.
    pub(crate) is_writable: bool,
    /// Is in the shard's list of connections to be flushed.
    pub(crate) is_dirty: bool,
    /// Is in the shard's list of connections to be read.
    pub(crate) is_ready: bool,
    /// Is counted as congested in its groups.
    pub(crate) is_congested: bool,
    pub(crate) _place: Place,
}

/// State that a connection has only at its beginning or only at its end.
#[derive(Debug)]
pub(crate) enum Passage {
    Opening(Opening),
    Ending(Ending),
}

/// How a connection ends.
#[derive(Debug)]
pub(crate) struct Ending {
    pub(crate) reason: CloseReason,
    /// When the closing handshake must be over.
    pub(crate) by: Duration,
    /// When frames that still wait are discarded, so that the Close frame gets through; none once that is done.
    pub(crate) flush_by: Option<Duration>,
    /// Something was discarded.
    pub(crate) is_cut: bool,
}

/// A connection whose handler is not done with `on_open`. It is not a member of everyone yet.
#[derive(Debug)]
pub(crate) struct Opening {
    pub(crate) everyone: Entrance,
    /// `on_open` is done, and the joining of everyone is in the shard's list, behind what the handler has sent.
    pub(crate) is_done: bool,
}

/// Control frames of the peer in the current second.
#[derive(Debug, Default)]
pub(crate) struct ControlRate {
    second: u32,
    frames: u32,
}

impl ControlRate {
    /// Counts one; false if that is too many.
    pub(crate) fn admits(&mut self, now: Duration, max: u16) -> bool {
        let second = now.as_secs() as u32; // only compared: may wrap
        if self.second != second {
            (self.second, self.frames) = (second, 0);
        }
        self.frames = self.frames.saturating_add(1);
        self.frames <= max.into()
    }
}

/// How a flush ended.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flushed {
    /// Nothing is left, or nothing can be written.
    Rests,
    /// The kernel takes no more for now.
    Refused,
    /// More could be written, but others come first.
    HasMore,
    /// The Close frame is with the kernel, and our end of the stream is finished.
    Finished,
    Failed(ErrorKind),
}

/// What a read brought.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Read {
    Bytes(usize),
    Nothing,
    End,
    Failed(ErrorKind),
}

impl Connection {
    /// A connection that has begun at `now`.
    pub(crate) fn open(
        id: ConnectionId,
        socket: Socket,
        config: Arc<ConnectionConfig>,
        directory: Arc<Directory>,
        handler: Box<dyn Handler>,
        place: Place,
        now: Duration,
    ) -> Self {
        Self {
            id,
            socket: Some(socket),
            heartbeat: Heartbeat::new(now, id.slot().spread() as f32, &config),
            config,
            directory,
            decoder: Decoder::default(),
            outbox: Outbox::new(),
            handler: Some(handler),
            resume: None,
            held: None,
            passage: None,
            armed: UNARMED,
            refused_since: 0,
            written: 0,
            taken: 0,
            ping_end: 0,
            counts: Counts::default(),
            control_rate: ControlRate::default(),
            phase: Phase::Open,
            work: Work::Idle,
            intake: Intake::Open,
            owes_close: false,
            is_readable: false,
            is_read_closed: false,
            is_input_over: false,
            is_writable: true,
            is_dirty: false,
            is_ready: false,
            is_congested: false,
            _place: place,
        }
    }

    /// The engine is ending.
    pub(crate) fn pause(&mut self) {
        self.intake = match self.intake {
            Intake::Open | Intake::Paused => Intake::Paused,
            Intake::Over { .. } => Intake::Over { hands_held: false },
        };
    }

    /// The connection is to end; false if that was known.
    pub(crate) fn stop_listening(&mut self) -> bool {
        let before = self.intake;
        if before != (Intake::Over { hands_held: false }) {
            self.intake = Intake::Over { hands_held: before != Intake::Paused };
        }
        !matches!(before, Intake::Over { .. })
    }

    /// Whether its end is decided, though it may not have come yet.
    pub(crate) fn is_over(&self) -> bool {
        self.phase != Phase::Open || matches!(self.intake, Intake::Over { .. })
    }

    pub(crate) fn bounds(&self) -> Bounds {
        Bounds {
            frames: self.config.outbox_frames,
            bytes: self.config.outbox_bytes,
            waiting: self.config.waiting_frames,
            waiting_bytes: self.config.waiting_bytes,
        }
    }

    /// Everyone, while it is opening. It is no member yet but may be sent to, so if it is congested it is counted there,
    /// where publishers look.
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

    /// None once it has opened.
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

    pub(crate) fn begin_ending(&mut self, ending: Ending) {
        self.passage = Some(Box::new(Passage::Ending(ending)));
    }

    /// If it is counted as congested: whether as one that publishers wait for.
    pub(crate) fn congestion(&self) -> Option<bool> {
        self.is_congested.then(|| self.config.policy.blocks())
    }

    /// Whether the next message may be handed over.
    pub(crate) fn is_listening(&self) -> bool {
        self.phase == Phase::Open
            && self.work == Work::Idle
            && self.opening().is_none()
            && self.intake == Intake::Open
    }

    /// Whether the handler may be given what was held for it, as it is also after the end.
    pub(crate) fn takes_held(&self) -> bool {
        let hands_held = !matches!(self.intake, Intake::Paused | Intake::Over { hands_held: false });
        let is_after_end = self.phase != Phase::Open && self.handler.is_some() && hands_held;
        self.is_listening() || (is_after_end && self.work == Work::Idle)
    }

    /// How many bytes may be read now. While the handler is busy, that depends on what is held for it; after the end,
    /// what is left in the kernel is read and discarded.
    pub(crate) fn read_limit(&self) -> usize {
        if self.phase != Phase::Open || self.is_listening() {
            return usize::MAX;
        }
        let held = self.held.as_ref().map_or(0, |held| held.len());
        if self.is_over() { 0 } else { HELD_BYTES_MAX.saturating_sub(held) }
    }

    /// Whether the socket is to be read.
    pub(crate) fn is_reading(&self) -> bool {
        self.socket.is_some() && self.is_readable && !self.is_input_over && self.read_limit() > 0
    }

    /// Whether something has arrived that is not read as long as the handler is busy.
    pub(crate) fn has_unread(&self) -> bool {
        self.is_readable && self.read_limit() == 0
    }

    /// Bytes of memory that are held for what has not arrived whole, or waits for the handler.
    pub(crate) fn unfinished_bytes(&self) -> usize {
        self.decoder.heap_bytes() + self.held.as_ref().map_or(0, |held| held.heap_bytes())
    }

    /// Bytes that the peer has taken of what the kernel was given; none where the system does not say.
    fn taken(&self) -> Option<u32> {
        Some(self.written.wrapping_sub(self.socket.as_ref()?.unacknowledged()?))
    }

    /// Whether the peer has taken something since this was last asked. If our ping was among it, its time begins now.
    pub(crate) fn makes_progress(&mut self, now: Duration) -> bool {
        let Some(taken) = self.taken() else { return false };
        let had_ping = self.has_ping(self.taken);
        let before = std::mem::replace(&mut self.taken, taken);
        if self.heartbeat.awaits_answer() && !had_ping && self.has_ping(taken) {
            self.heartbeat.restart(now);
        }
        self.heartbeat.has_moved |= before != taken;
        before != taken
    }

    fn has_ping(&self, taken: u32) -> bool {
        taken.wrapping_sub(self.ping_end) as i32 >= 0
    }

    /// When to look next whether the peer has taken something. None while the kernel takes more for it.
    pub(crate) fn look_at_stall(&self, now: Duration) -> Option<Duration> {
        let end = self.stalled_at()?;
        let timeout = self
            .config
            .stall_timeout
            .map_or(self.config.pong_timeout, |timeout| timeout.min(self.config.pong_timeout));
        Some(end.min(now + timeout / STALL_LOOKS))
    }

    /// When the connection is to end if the peer takes nothing until then. None while the kernel takes more for it.
    fn stalled_at(&self) -> Option<Duration> {
        if self.is_writable || self.refused_since == 0 {
            return None;
        }
        let since = Duration::from_micros(self.refused_since);
        let stalled = self.config.stall_timeout.map(|timeout| since + timeout);
        // A ping that cannot be written cannot be answered.
        let is_queued = self.heartbeat.has_queued_ping();
        let unanswered =
            is_queued.then(|| since.max(self.heartbeat.queued_since()) + self.config.pong_timeout);
        stalled.into_iter().chain(unanswered).min()
    }

    /// Whether the connection is to end because the peer has taken nothing for too long, and for which reason.
    pub(crate) fn judge_stall(&mut self, now: Duration, listened: Duration) -> Option<CloseReason> {
        let end = self.stalled_at()?;
        let since = Duration::from_micros(self.refused_since);
        if self.makes_progress(now) {
            self.refused_since = now.as_micros() as u64;
            return None;
        }
        // The kernel may have announced room, and the event has not been read.
        if now < end || listened < end {
            return None;
        }
        let is_stalled = self.config.stall_timeout.is_some_and(|timeout| now >= since + timeout);
        Some(if is_stalled { CloseReason::SlowConsumer } else { CloseReason::PongTimeout })
    }

    /// Whether a ping that is written now is behind something that the peer has not taken.
    pub(crate) fn has_unacknowledged(&self) -> bool {
        let socket = self.socket.as_ref();
        self.outbox.is_in_frame() || socket.and_then(Socket::unacknowledged).is_some_and(|bytes| bytes > 0)
    }

    /// The ping is with the kernel. `is_ahead`: it is behind something that the peer has not taken.
    pub(crate) fn ping_sent(&mut self, now: Duration, is_ahead: bool) {
        self.heartbeat.sent(now);
        if self.read_limit() == 0 {
            self.heartbeat.paused();
        }
        self.ping_end = self.written;
        if !is_ahead {
            self.taken = self.ping_end;
        } else {
            let _ = self.makes_progress(now);
        }
        self.heartbeat.has_moved = false;
    }

    /// Whether an alive peer may have left our ping unanswered: the ping has not reached it yet, or the answer has not
    /// reached us.
    pub(crate) fn excuses_silence(&mut self, now: Duration) -> bool {
        if self.heartbeat.takes_input() {
            return true;
        }
        if self.taken().is_none() {
            return false;
        }
        let had_ping = self.has_ping(self.taken);
        let progress = self.makes_progress(now) | self.heartbeat.has_moved;
        self.heartbeat.has_moved = false;
        // While we do not read, the answer may be behind bytes that we have not taken.
        if had_ping { self.has_unread() } else { progress }
    }

    /// Whether the peer has everything that was sent to it, its Close frame included, as far as this is known.
    pub(crate) fn is_delivered(&self) -> bool {
        let is_told = self.ending().is_none_or(|ending| ending.reason.close_frame().is_some());
        match &self.socket {
            _ if self.ending().is_some_and(|ending| ending.is_cut) => false,
            Some(socket) if socket.is_direct() => socket.unacknowledged().is_none_or(|bytes| bytes == 0),
            Some(_) => !is_told || self.is_input_over,
            None => true,
        }
    }

    pub(crate) fn limits(&self) -> Limits {
        Limits { max_message_bytes: self.config.max_message_bytes, max_fragments: self.config.max_fragments }
    }

    pub(crate) fn metrics(&self) -> ConnectionMetrics {
        ConnectionMetrics {
            tally: self.counts.tally(),
            pending_bytes: self.outbox.backlog_bytes() as u64,
            rtt: self.heartbeat.rtt(),
        }
    }

    /// Reads once, at most what may be read.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> Read {
        let max = self.read_limit().min(buffer.len());
        let (Some(socket), buffer) = (&self.socket, &mut buffer[..max]) else { return Read::Nothing };
        loop {
            match socket.read(buffer) {
                Ok(0) => return Read::End,
                Ok(count) => {
                    // Edge-triggered: a short read has emptied the kernel's buffer.
                    self.is_readable = count == buffer.len() || self.is_read_closed;
                    return Read::Bytes(count);
                }
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => {}
                    ErrorKind::WouldBlock => {
                        self.is_readable = false;
                        return Read::Nothing;
                    }
                    kind => return Read::Failed(kind),
                },
            }
        }
    }

    /// Writes what is queued, one system call for as much as can be gathered.
    /// `now` is the time of the turn: refusals are counted from it.
    pub(crate) fn flush(&mut self, gather: &mut Gather, totals: &mut Metrics, now: Duration) -> Flushed {
        for _ in 0..WRITES_PER_FLUSH {
            if !self.is_writable || self.phase == Phase::Lingering {
                return Flushed::Rests;
            }
            let Some(socket) = &self.socket else { return Flushed::Rests };
            let (bytes, is_control) = match self.outbox.next() {
                Next::Data(bytes) => (bytes, false),
                Next::Pieces => (gather.gather(&self.outbox, WRITE_BYTES_MAX), false),
                Next::Control(bytes) => (bytes, true),
                Next::Nothing if self.owes_close => {
                    self.owes_close = false;
                    let close = self.close_frame();
                    self.outbox.push_control(close.as_bytes());
                    continue;
                }
                Next::Nothing if self.phase == Phase::Closing => {
                    socket.finish();
                    self.phase = Phase::Lingering;
                    return Flushed::Finished;
                }
                Next::Nothing => return Flushed::Rests,
            };
            match socket.write(bytes) {
                Ok(count) => {
                    totals.writes += 1;
                    totals.bytes_written += count as u64;
                    self.written = self.written.wrapping_add(count as u32); // only compared
                    if is_control {
                        self.outbox.wrote_control(count);
                    } else {
                        let (waiting, bounds) = (self.outbox.waiting(), self.bounds());
                        let frames = u64::from(self.outbox.wrote(count, &bounds));
                        if self.outbox.waiting() < waiting {
                            self.counts.took(); // something that had waited was taken
                        }
                        self.counts.written += frames;
                        totals.tally.written += frames;
                    }
                }
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => {}
                    ErrorKind::WouldBlock => {
                        self.is_writable = false;
                        self.refused_since = (now.as_micros() as u64).max(1);
                        let _ = self.makes_progress(now);
                        return Flushed::Refused;
                    }
                    kind => return Flushed::Failed(kind),
                },
            }
            // The usual case costs no further look.
            if self.phase == Phase::Open && self.outbox.is_empty() {
                return Flushed::Rests;
            }
        }
        Flushed::HasMore
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
    #[allow(clippy::print_stdout, reason = "`cargo test -- --nocapture` tells the number")]
    fn a_connection_costs_a_known_amount_of_memory() {
        println!("the state of a connection: {} bytes", size_of::<Connection>());
        assert!(size_of::<Connection>() <= 304, "{} bytes", size_of::<Connection>());
    }
}
