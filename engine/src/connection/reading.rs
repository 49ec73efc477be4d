//! Input: from the socket to the decoder, and the reactions to control frames.
//!
//! Control frames are answered here; a message is passed to the handler if it is idle, and is held for it
//! otherwise. Does not know when it is this connection's turn.

use std::io::ErrorKind;
use std::time::Duration;

use crate::close_reason::CloseReason;
use crate::config::ConnectionConfig;
use crate::decoder::{Event, Limits};
use crate::frame::ControlFrame;
use crate::handler::{Control, Input, Message};
use crate::held::Held;
use crate::limiter::Arrived;
use crate::socket::Socket;

use super::{CallSite, Connection, Intake, Phase};

/// Bytes of messages that are held for a busy handler or for a rate limit. At this limit nothing more is read until
/// some of them were handled: no pings and no Close either (backpressure).
const HELD_BYTES_MAX: usize = 16 << 10;

/// The result of a read.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Read {
    Bytes(usize),
    Nothing,
    End,
    Failed(ErrorKind),
}

/// The effect of one decoded piece of input.
#[derive(Debug, Default)]
pub(crate) struct Received {
    /// A message was passed to the handler.
    pub(crate) is_handled: bool,
    /// An answer was queued.
    pub(crate) is_answered: bool,
    /// The connection must end.
    pub(crate) end: Option<CloseReason>,
    /// Whether it was a message that exceeds a rate limit.
    pub(crate) limit: Arrived,
}

/// A pong, and the reason if the connection must end.
enum Pong {
    OfOurPing { end: Option<CloseReason> },
    Other { end: Option<CloseReason> },
}

/// The time at which input is handled.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrival {
    pub(crate) now: Duration,
    /// The earliest time at which it may have arrived.
    pub(crate) arrived: Duration,
}

/// The client's control frames in the current second.
#[derive(Debug, Default)]
pub(super) struct ControlRate {
    second: u32,
    frames: u32,
}

impl ControlRate {
    /// Counts one; false if that exceeds the limit.
    fn admits(&mut self, now: Duration, max: u16) -> bool {
        let second = now.as_secs() as u32; // only compared: may wrap
        if self.second != second {
            (self.second, self.frames) = (second, 0);
        }
        self.frames = self.frames.saturating_add(1);
        self.frames <= max.into()
    }
}

impl Connection {
    /// Whether the next message may be passed to the handler.
    pub(crate) fn is_listening(&self) -> bool {
        self.is_taking() && !self.is_delayed()
    }

    /// Whether the next message may be passed to the handler, as far as its rate allows it.
    fn is_taking(&self) -> bool {
        let takes_input = matches!(self.intake, Intake::Open | Intake::Draining);
        self.is_receiving()
            && takes_input
            && self.is_idle()
            && self.opening().is_none_or(|opening| opening.awaits.is_some())
    }

    /// Whether held messages may be passed to the handler, as far as their rate allows it. That is possible after
    /// the end, too.
    pub(crate) fn takes_held(&self) -> bool {
        let hands_held = !matches!(self.intake, Intake::Paused | Intake::Over { hands_held: false });
        let is_after_end = self.phase != Phase::Open && self.handler.is_some() && hands_held;
        self.is_taking() || (is_after_end && self.is_idle())
    }

    /// How many bytes may be read now. While the handler is busy or a message waits for its rate, that depends on
    /// what is held; after the end, what is left in the kernel is read and discarded.
    pub(crate) fn read_limit(&self) -> usize {
        if !self.is_receiving() || self.is_listening() {
            return usize::MAX;
        }
        let held = self.held.as_ref().map_or(0, |held| held.len());
        if self.is_over() { 0 } else { HELD_BYTES_MAX.saturating_sub(held) }
    }

    /// Whether the shard should read the socket.
    pub(crate) fn is_reading(&self) -> bool {
        self.socket.is_some() && self.is_readable && !self.is_input_over && self.read_limit() > 0
    }

    /// Whether input has arrived that is not read as long as messages are held.
    pub(crate) fn has_unread(&self) -> bool {
        self.is_readable && self.read_limit() == 0
    }

    /// Bytes of memory for messages that are incomplete or wait for the handler.
    pub(crate) fn unfinished_bytes(&self) -> usize {
        self.decoder.heap_bytes() + self.held.as_ref().map_or(0, |held| held.heap_bytes())
    }

    fn limits(&self) -> Limits {
        let ConnectionConfig { max_message_bytes, max_fragments, max_frame_bytes, .. } = *self.config;
        let accept_unmasked = self.config.accept_unmasked_frames;
        let max_message_bytes =
            self.awaits().map_or(max_message_bytes, |awaited| awaited.max_bytes.min(max_message_bytes));
        Limits { max_message_bytes, max_fragments, max_frame_bytes, accept_unmasked }
    }

    /// Reads once, at most what may be read.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> Read {
        let max = self.read_limit().min(buffer.len());
        let (Some(socket), buffer) = (&mut self.socket, &mut buffer[..max]) else { return Read::Nothing };
        loop {
            match socket.read(buffer) {
                Ok(0) => return Read::End,
                Ok(count) => {
                    self.is_readable = socket.has_more(count, buffer.len()) || self.is_read_closed;
                    return Read::Bytes(count);
                }
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => {}
                    ErrorKind::WouldBlock => {
                        self.is_readable = socket.has_more(0, buffer.len());
                        return Read::Nothing;
                    }
                    kind => return Read::Failed(kind),
                },
            }
        }
    }

    /// Whether bytes that were written wait for the kernel, such as a TLS session's answer to what was read.
    pub(crate) fn has_refused(&self) -> bool {
        self.socket.as_ref().is_some_and(Socket::has_refused)
    }

    /// The kernel may have bytes to read, and announces the end of the stream if `is_closed`.
    pub(crate) fn becomes_readable(&mut self, is_closed: bool) {
        self.is_readable = true;
        self.is_read_closed |= is_closed;
        self.socket.iter_mut().for_each(Socket::becomes_readable);
    }

    /// Whether the kernel may have bytes to read.
    pub(crate) fn is_readable(&self) -> bool {
        self.is_readable
    }

    /// Whether the client has ended its side, and everything before that was read.
    pub(crate) fn is_input_over(&self) -> bool {
        self.is_input_over
    }

    pub(crate) fn end_input(&mut self) {
        self.is_input_over = true;
        self.heartbeat.input_is_over();
    }

    /// Input has arrived: this many bytes, or some that is not read now.
    pub(crate) fn heard(&mut self, now: Duration, bytes: usize) {
        self.heartbeat.heard(now, bytes);
    }

    /// The time during which input was left unread is not the client's silence.
    pub(crate) fn restart_silence(&mut self, now: Duration) {
        self.heartbeat.restart_silence(now);
    }

    /// Notes that reading pauses, if nothing more may be read.
    pub(crate) fn note_pause(&mut self) {
        if self.read_limit() == 0 {
            self.heartbeat.paused();
        }
    }

    /// Whether it is in the shard's list of connections to read.
    pub(crate) fn is_ready(&self) -> bool {
        self.is_ready
    }

    /// Adds it to that list; false if it was there.
    pub(crate) fn mark_ready(&mut self) -> bool {
        !std::mem::replace(&mut self.is_ready, true)
    }

    /// Removes it from that list; false if it was not there.
    pub(crate) fn take_ready(&mut self) -> bool {
        std::mem::take(&mut self.is_ready)
    }

    /// Whether no message is held, and the handler can be called with the next one.
    pub(crate) fn is_caught_up(&self) -> bool {
        self.is_listening() && self.held.is_none()
    }

    pub(crate) fn give_back_held(&mut self, held: Box<Held>) {
        self.held = Some(held).filter(|held| !held.is_empty());
    }

    pub(crate) fn forget_held(&mut self) {
        self.held = None;
        self.limiter.iter_mut().for_each(|limiter| limiter.forget_held());
    }

    /// Counts a message that was passed to the handler.
    pub(crate) fn count_received(&mut self) {
        self.counts.received += 1;
    }

    /// Decodes the next piece of `input` and acts on it. Moves `consumed` to the end of that piece.
    pub(crate) fn receive(
        &mut self,
        input: &mut [u8],
        consumed: &mut usize,
        at: Arrival,
        site: &CallSite<'_>,
    ) -> Received {
        let (limits, is_caught_up) = (self.limits(), self.is_caught_up());
        let mut decoder = std::mem::take(&mut self.decoder);
        let received = match decoder.decode(input, consumed, &limits) {
            Ok(None) => Received::default(),
            Ok(Some(Event::Message { kind, payload })) => {
                self.heartbeat.answered();
                self.heartbeat.heard_message(at.now);
                self.receive_message(Message { kind, payload }, is_caught_up, at.now, site)
            }
            Ok(Some(Event::Ping(payload))) => {
                let answered = self.receive_ping(payload, at.now);
                self.pass_control(answered, Control::Ping(payload), is_caught_up, site)
            }
            Ok(Some(Event::Pong(payload))) => match self.receive_pong(payload, at) {
                Pong::OfOurPing { end } => Received { end, ..Received::default() },
                Pong::Other { end } => {
                    let received = Received { end, ..Received::default() };
                    self.pass_control(received, Control::Pong(payload), is_caught_up, site)
                }
            },
            Ok(Some(Event::Close(close))) => {
                if self.drains() {
                    let received = Received::default();
                    let passed = self.pass_control(received, Control::Close(close), is_caught_up, site);
                    drop(passed); // the connection has ended already
                }
                let (code, text) = close.unzip();
                let text = text.unwrap_or_default().into();
                Received { end: Some(CloseReason::Peer { code, text }), ..Received::default() }
            }
            Err(error) => Received { end: Some(CloseReason::Protocol(error)), ..Received::default() },
        };
        decoder.release();
        self.decoder = decoder;
        received
    }

    /// Passes a message to the handler, or holds or drops it, as the rate limit says.
    fn receive_message(
        &mut self,
        message: Message<'_>,
        is_caught_up: bool,
        now: Duration,
        site: &CallSite<'_>,
    ) -> Received {
        let limit = match self.awaits() {
            None => self.limit_rate(message.payload.len(), is_caught_up, now),
            Some(_) => Arrived::Passes, // what opens a connection has limits of its own
        };
        match limit {
            Arrived::Passes => self.pass(Input::Message(message), is_caught_up, site),
            Arrived::Waits => {
                self.held.get_or_insert_default().push(Input::Message(message));
                Received { limit, ..Received::default() }
            }
            Arrived::IsDropped => Received { limit, ..Received::default() },
            Arrived::EndsConnection => {
                Received { end: Some(CloseReason::RateLimited), limit, ..Received::default() }
            }
        }
    }

    /// Passes the input to the handler, or holds it while the handler is busy.
    fn pass(&mut self, input: Input<'_>, is_caught_up: bool, site: &CallSite<'_>) -> Received {
        if !is_caught_up {
            self.held.get_or_insert_default().push(input);
            return Received::default();
        }
        let is_handled = input.is_message();
        if is_handled {
            self.count_received();
            if let Some(opening) = self.opening_mut() {
                opening.awaits = None;
            }
        }
        let (_, end) = self.call(site, |handler, context| input.pass_to(handler, context));
        Received { is_handled, end, ..Received::default() }
    }

    /// Passes a control frame to a handler that wants it; `received` is the engine's own reaction.
    fn pass_control(
        &mut self,
        received: Received,
        frame: Control<'_>,
        is_caught_up: bool,
        site: &CallSite<'_>,
    ) -> Received {
        let wants = self.handler.as_ref().is_some_and(|handler| handler.wants_control_frames());
        if received.end.is_some() || !wants {
            return received;
        }
        let Received { end, .. } = self.pass(Input::Control(frame), is_caught_up, site);
        Received { end, ..received }
    }

    fn receive_ping(&mut self, payload: &[u8], now: Duration) -> Received {
        self.heartbeat.answered();
        if !self.control_rate.admits(now, self.config.control_frames_per_second) {
            return Received { end: Some(CloseReason::ControlFlood), ..Received::default() };
        }
        if self.is_lingering() {
            return Received::default(); // nothing follows a Close frame
        }
        self.outbox.push_control(ControlFrame::pong(payload).as_bytes());
        Received { is_answered: true, ..Received::default() }
    }

    fn receive_pong(&mut self, payload: &[u8], Arrival { now, arrived }: Arrival) -> Pong {
        let is_ours = self.heartbeat.pong(arrived, payload);
        if is_ours {
            self.heartbeat.answered();
        } else {
            self.heartbeat.ignored();
        }
        let limit = self.config.policy.rtt_limit().filter(|_| is_ours);
        let end = if limit.is_some_and(|(max, samples)| self.heartbeat.is_rtt_above(max, samples)) {
            Some(CloseReason::HighRtt)
        } else if is_ours || self.control_rate.admits(now, self.config.control_frames_per_second) {
            None // pongs that answer our pings are not limited
        } else {
            Some(CloseReason::ControlFlood)
        };
        if is_ours { Pong::OfOurPing { end } } else { Pong::Other { end } }
    }

    /// Whether the average of the last round trips is above `max`.
    pub(crate) fn is_rtt_above(&mut self, max: Duration, samples: usize) -> bool {
        self.heartbeat.is_rtt_above(max, samples)
    }
}
