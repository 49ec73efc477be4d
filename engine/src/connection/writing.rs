//! Output: from the outbox to the socket, and how much the client has taken of it.
//!
//! Detects a client that takes nothing, by what its kernel has acknowledged. Does not know when it is this
//! connection's turn.

use std::io::{self, ErrorKind};
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crate::close_reason::CloseReason;
use crate::frame::ControlFrame;
use crate::metrics::Metrics;
#[cfg(all(feature = "io-uring", target_os = "linux"))]
use crate::outbox::SharedBytes;
use crate::outbox::{Chunk, Dropped, Enqueued, Expiry, Gather, Next};
use crate::receipt::Origin;
#[cfg(all(feature = "io-uring", target_os = "linux"))]
use crate::socket::SharedSocket;
use crate::socket::{InTransit, Reached, Socket, Written};
use crate::tally::DropCause;

use super::{Connection, Phase};

/// Bytes that are gathered into one write, and written to one connection before the next one's turn.
pub(crate) const WRITE_BYTES_MAX: usize = 64 << 10;
const WRITES_PER_FLUSH: usize = 16;
/// The number of looks within the timeout at a client that takes nothing. The connection ends late by one
/// look's interval at most.
const STALL_LOOKS: u32 = 4;

/// How a flush ended.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flushed {
    /// Nothing is left, or nothing can be written.
    Rests,
    /// The kernel accepts no more for now.
    Refused,
    /// More could be written, but other connections come first.
    HasMore,
    /// The Close frame has been passed to the kernel, and our end of the stream is finished.
    Finished,
    Failed(ErrorKind),
}

/// The effect of dropping the frames that waited for too long.
#[derive(Debug)]
pub(crate) struct Expired {
    pub(crate) bytes: usize,
    /// Frames that waited after them were accepted.
    pub(crate) has_taken: bool,
    /// When the next frame expires.
    pub(crate) next: Option<Duration>,
}

/// Frames that were discarded when a connection ended.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Discarded {
    pub(crate) frames: u64,
    pub(crate) bytes: usize,
}

/// What a drop means for a connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Loss {
    /// All earlier drops have been reported to the handler.
    pub(crate) is_news: bool,
    /// Consecutive drops: frames dropped since one was last accepted.
    pub(crate) in_a_row: u32,
}

impl Connection {
    // ---- The outbox ----

    /// Bytes that wait in the outbox or are in transit on a bridge.
    pub(crate) fn backlog_bytes(&self) -> usize {
        self.outbox.backlog_bytes() + self.in_transit().bytes
    }

    /// What was written to a bridge and has not left it, as of the last [`settle`](Self::settle).
    #[inline]
    pub(crate) fn in_transit(&self) -> InTransit {
        self.socket.as_ref().map(Socket::in_transit).unwrap_or_default()
    }

    /// Counts as written what has left its bridge since it was written there.
    pub(crate) fn settle(&mut self, totals: &mut Metrics) {
        let Some(socket) = &mut self.socket else { return };
        let reached = socket.take_reached();
        self.count_reached(reached, totals);
    }

    fn count_reached(&mut self, Reached { frames, bytes }: Reached, totals: &mut Metrics) {
        totals.bytes_written += bytes;
        totals.tally.written += frames;
        self.counts.written += frames;
    }

    /// Whether its socket is a bridge.
    pub(crate) fn is_bridged(&self) -> bool {
        self.socket.as_ref().is_some_and(|socket| !socket.is_direct())
    }

    /// Whether its client has ended its side and nothing is left on the way to it in a bridge, once the Close frame is
    /// written.
    pub(crate) fn is_at_end(&self) -> bool {
        self.is_input_over && self.in_transit() == InTransit::default()
    }

    /// Bytes of memory that wait because the socket accepts no more for now.
    pub(crate) fn refused_bytes(&self) -> usize {
        if self.is_writable { 0 } else { self.outbox.held_bytes() }
    }

    /// Frames that can be written; none while the socket accepts no more.
    pub(crate) fn frames_to_write(&self) -> Option<u64> {
        self.is_writable.then(|| self.outbox.queued().into())
    }

    pub(crate) fn has_backlog(&self) -> bool {
        !self.outbox.is_empty() || self.in_transit() != InTransit::default()
    }

    /// Whether frames wait for room.
    pub(crate) fn has_waiting(&self) -> bool {
        self.outbox.waiting() > 0
    }

    /// Accepts the chunk if nothing is queued and it fits; false otherwise.
    #[inline]
    pub(crate) fn take_first(&mut self, chunk: &Rc<Chunk>) -> bool {
        let is_taken = self.outbox.push_if_empty(chunk, &self.bounds());
        if is_taken {
            self.counts.took();
        }
        is_taken
    }

    /// Queues these frames of the chunk after what is queued; those that must wait keep what `origin_of` gives (see the
    /// outbox). Also returns by how many bytes the backlog has grown.
    pub(crate) fn enqueue(
        &mut self,
        chunk: &Rc<Chunk>,
        frames: Range<u32>,
        now: Duration,
        expiry: Expiry,
        origin_of: impl FnMut(Range<u32>) -> (Option<Origin>, u32),
    ) -> (Enqueued, usize) {
        let (bytes, queued) = (self.outbox.backlog_bytes(), self.outbox.queued());
        let enqueued = self.outbox.enqueue(chunk, frames, &self.bounds(), now, expiry, origin_of);
        if self.outbox.queued() > queued {
            self.counts.took(); // some of it was accepted, whatever happens to the rest
        }
        (enqueued, self.outbox.backlog_bytes() - bytes)
    }

    /// Drops the frames whose time has expired.
    pub(crate) fn expire(&mut self, now: Duration, on_drop: impl FnMut(Dropped, Option<&Origin>)) -> Expired {
        let (bytes, queued) = (self.outbox.backlog_bytes(), self.outbox.queued());
        let next = self.outbox.expire(now, &self.bounds(), on_drop);
        let (bytes, has_taken) = (bytes - self.outbox.backlog_bytes(), self.outbox.queued() > queued);
        Expired { bytes, has_taken, next }
    }

    /// A frame was accepted, which ends the row of consecutive drops.
    pub(crate) fn end_row_of_drops(&mut self) {
        self.counts.took();
    }

    pub(crate) fn count_drop(&mut self, cause: DropCause, frames: u32, group: Option<&Arc<str>>) -> Loss {
        let losses = self.counts.lose();
        losses.dropped[cause] += u64::from(frames);
        let is_news = losses.notices.is_empty();
        losses.notices.add(frames.into(), cause, group);
        losses.in_a_row = losses.in_a_row.saturating_add(frames);
        Loss { is_news, in_a_row: losses.in_a_row }
    }

    /// Discards what is queued, except the frame that is being written.
    pub(crate) fn discard(&mut self) -> Discarded {
        let before = self.outbox.backlog_bytes();
        let frames = self.outbox.discard(Origin::count_disconnected);
        self.counts.discard(frames);
        Discarded { frames, bytes: before - self.outbox.backlog_bytes() }
    }

    /// Discards even the frame that is being written, and gives up what is in transit.
    pub(crate) fn discard_all(&mut self) -> Discarded {
        let bytes = self.outbox.backlog_bytes();
        let in_transit = self.socket.as_mut().map(Socket::give_up_in_transit).unwrap_or_default();
        let frames = self.outbox.discard_all(Origin::count_disconnected) + in_transit.frames;
        self.counts.discard(frames);
        Discarded { frames, bytes: bytes + in_transit.bytes }
    }

    /// Marks it as congested if it has just become so. If so, returns whether publishers wait for it, for the
    /// counters of its groups.
    pub(crate) fn becomes_congested(&mut self) -> Option<bool> {
        let becomes = !self.is_congested && self.outbox.is_congested(&self.bounds());
        self.is_congested |= becomes;
        becomes.then(|| self.config.policy.blocks())
    }

    /// Removes that mark if it has recovered; returns the same.
    pub(crate) fn becomes_relieved(&mut self) -> Option<bool> {
        let becomes = self.is_congested && self.outbox.is_relieved(&self.bounds());
        self.is_congested &= !becomes;
        becomes.then(|| self.config.policy.blocks())
    }

    /// Removes that mark in any case; returns how it was counted until now.
    pub(crate) fn take_congestion(&mut self) -> Option<bool> {
        let congestion = self.congestion();
        self.is_congested = false;
        congestion
    }

    /// If it is counted as congested: whether publishers wait for it.
    pub(crate) fn congestion(&self) -> Option<bool> {
        self.is_congested.then(|| self.config.policy.blocks())
    }

    // ---- The list of connections to flush ----

    /// Marks it as having something to write; true if the shard must add it to the list of connections to flush.
    #[inline]
    pub(crate) fn mark_dirty(&mut self) -> bool {
        self.is_writable && !std::mem::replace(&mut self.is_dirty, true)
    }

    /// Notes that it was removed from that list.
    pub(crate) fn clear_dirty(&mut self) {
        self.is_dirty = false;
    }

    /// The kernel has announced room; true if it had refused a write before.
    pub(crate) fn becomes_writable(&mut self) -> bool {
        self.refused_since = 0;
        !std::mem::replace(&mut self.is_writable, true)
    }

    // ---- The socket ----

    /// Drops the socket; true if it had refused a write.
    pub(crate) fn drop_socket(&mut self) -> bool {
        if let Some(socket) = self.socket.take() {
            socket.close();
        }
        !std::mem::replace(&mut self.is_writable, true)
    }

    /// Queues a ping.
    pub(crate) fn push_ping(&mut self, payload: &[u8]) {
        self.outbox.push_control(ControlFrame::ping(payload).as_bytes());
    }

    /// Queues a control frame of the application; false if too many are queued already.
    pub(crate) fn push_control(&mut self, frame: &ControlFrame) -> bool {
        self.outbox.push_control_if_room(frame.as_bytes())
    }

    /// Whether the next flush that gets through writes a ping; if so, whether bytes precede it that the
    /// client has not taken.
    pub(crate) fn ping_to_write(&self) -> Option<bool> {
        let has_ping = self.heartbeat.has_queued_ping() && self.is_writable;
        has_ping.then(|| self.has_unacknowledged())
    }

    /// Whether no control frame is left to be written.
    pub(crate) fn has_no_control(&self) -> bool {
        self.outbox.has_no_control()
    }

    /// Waits another timeout for an answer to our ping, if the client may be alive.
    pub(crate) fn prolongs_wait(&mut self, now: Duration) -> bool {
        self.excuses_silence(now) && self.heartbeat.prolong(now)
    }

    /// Whether the client has ended its side, so that no event will announce that it has taken what is left for it.
    pub(crate) fn awaits_acknowledgement(&self) -> bool {
        self.is_input_over && self.is_lingering()
    }

    /// Bytes that the client has taken of those passed to the kernel; none where the system does not report it.
    fn taken(&self) -> Option<u32> {
        Some(self.written.wrapping_sub(self.socket.as_ref()?.unacknowledged()?))
    }

    /// Whether the client has taken something since the last look. If that included our ping, the ping's time
    /// begins now.
    fn makes_progress(&mut self, now: Duration) -> bool {
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

    /// When to look next whether the client has taken something. None while the kernel accepts writes.
    pub(crate) fn look_at_stall(&self, now: Duration) -> Option<Duration> {
        let end = self.stalled_at()?;
        let timeout = self
            .config
            .stall_timeout
            .map_or(self.config.pong_timeout, |timeout| timeout.min(self.config.pong_timeout));
        Some(end.min(now + timeout / STALL_LOOKS))
    }

    /// When the connection must end if the client takes nothing until then. None while the kernel accepts writes.
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

    /// Whether the connection must end because the client has taken nothing for too long, and for which reason.
    pub(crate) fn judge_stall(&mut self, now: Duration, listened: Duration) -> Option<CloseReason> {
        let end = self.stalled_at()?;
        let since = Duration::from_micros(self.refused_since);
        if self.makes_progress(now) {
            self.refused_since = now.as_micros() as u64;
            return None;
        }
        // The kernel may have announced room in an event that has not been read yet.
        if now < end || listened < end {
            return None;
        }
        let is_stalled = self.config.stall_timeout.is_some_and(|timeout| now >= since + timeout);
        Some(if is_stalled { CloseReason::SlowConsumer } else { CloseReason::PongTimeout })
    }

    /// Whether bytes that the client has not taken precede a ping that is written now.
    fn has_unacknowledged(&self) -> bool {
        let socket = self.socket.as_ref();
        self.outbox.is_in_frame() || socket.and_then(Socket::unacknowledged).is_some_and(|bytes| bytes > 0)
    }

    /// The ping was passed to the kernel. `is_ahead`: bytes precede it that the client has not taken.
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

    /// Whether a client that is alive may have left our ping unanswered: the ping has not reached it yet, or
    /// the answer has not reached us.
    fn excuses_silence(&mut self, now: Duration) -> bool {
        if self.heartbeat.takes_input() {
            return true;
        }
        if self.taken().is_none() {
            return false;
        }
        let had_ping = self.has_ping(self.taken);
        let progress = self.makes_progress(now) | self.heartbeat.has_moved;
        self.heartbeat.has_moved = false;
        // While this side does not read, the answer may be preceded by bytes that are still unread.
        if had_ping { self.has_unread() } else { progress }
    }

    /// Whether the client has everything that was sent to it, its Close frame included, as far as this is known.
    pub(crate) fn is_delivered(&self) -> bool {
        let reason = self.ending().map(|ending| &ending.reason);
        let is_told = reason.is_none_or(|reason| reason.close_frame().is_some());
        match &self.socket {
            _ if self.ending().is_some_and(|ending| ending.is_cut) => false,
            // A failed socket does not report what the client had taken before.
            _ if matches!(reason, Some(CloseReason::Transport(_))) => false,
            Some(_) if is_told && !self.is_lingering() => false, // its Close frame has not been written
            // A bridge does not know what the client's kernel has: only that it has ended the stream.
            Some(socket) if !socket.is_direct() && is_told && !self.is_input_over => false,
            Some(socket) => socket.unacknowledged().is_none_or(|bytes| bytes == 0),
            None => true,
        }
    }

    /// What a flush would send first, if it can be sent together with what other connections send: its result is for
    /// [`flush`](Self::flush) then.
    #[cfg(all(feature = "io-uring", target_os = "linux"))]
    pub(crate) fn next_send(&self, gather: &mut Gather) -> Option<(SharedSocket, SharedBytes)> {
        if !self.is_writable || self.phase != Phase::Open {
            return None;
        }
        let socket = self.socket.as_ref()?.share()?;
        Some((socket, self.outbox.next_shared(gather, WRITE_BYTES_MAX)?))
    }

    /// Writes what is queued, one system call for as much as can be gathered. `sent` is the result of the first
    /// write if it was made already. `now` is the time of the turn: refusals are timed from it.
    pub(crate) fn flush(
        &mut self,
        mut sent: Option<io::Result<usize>>,
        gather: &mut Gather,
        totals: &mut Metrics,
        now: Duration,
    ) -> Flushed {
        for _ in 0..WRITES_PER_FLUSH {
            if !self.is_writable || self.phase == Phase::Lingering {
                return Flushed::Rests;
            }
            let Some(socket) = &mut self.socket else { return Flushed::Rests };
            if socket.has_refused()
                && let Err(error) = socket.send_refused()
            {
                return self.write_failed(error.kind(), now);
            }
            let Some(socket) = &mut self.socket else { return Flushed::Rests };
            let (bytes, is_control) = match self.outbox.next() {
                _ if sent.is_some() => (&[][..], false),
                Next::Data(bytes) => (bytes, false),
                Next::Pieces => (gather.gather(&self.outbox, WRITE_BYTES_MAX), false),
                Next::Control(bytes) => (bytes, true),
                Next::Nothing if self.close_frame_pending => {
                    self.close_frame_pending = false;
                    let close = self.close_frame();
                    self.outbox.push_control(close.as_bytes());
                    continue;
                }
                Next::Nothing if self.phase == Phase::Closing => {
                    if !socket.finish() {
                        return self.write_failed(ErrorKind::WouldBlock, now);
                    }
                    self.phase = Phase::Lingering;
                    return Flushed::Finished;
                }
                Next::Nothing => return Flushed::Rests,
            };
            let result = sent.take().map_or_else(|| socket.write(bytes), |result| result.map(Written::plain));
            match result {
                Ok(written) => {
                    totals.writes += 1;
                    self.written = self.written.wrapping_add(written.sent as u32); // only compared
                    let mut frames = 0;
                    if is_control {
                        self.outbox.wrote_control(written.taken);
                    } else {
                        let (waiting, bounds) = (self.outbox.waiting(), self.bounds());
                        frames = u64::from(self.outbox.wrote(written.taken, &bounds, &mut gather.spares));
                        if self.outbox.waiting() < waiting {
                            self.counts.took(); // a frame that had waited was accepted
                        }
                    }
                    if let Some(socket) = &mut self.socket {
                        let reached = socket.note_write(written, frames, is_control);
                        self.count_reached(reached, totals);
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return self.write_failed(error.kind(), now),
            }
            if self.has_refused() {
                return self.write_failed(ErrorKind::WouldBlock, now);
            }
            // The usual case needs no further check.
            if self.phase == Phase::Open && self.outbox.is_empty() {
                return Flushed::Rests;
            }
        }
        Flushed::HasMore
    }

    /// The kernel has refused a write, or the socket has failed.
    fn write_failed(&mut self, kind: ErrorKind, now: Duration) -> Flushed {
        if kind != ErrorKind::WouldBlock {
            return Flushed::Failed(kind);
        }
        self.is_writable = false;
        self.refused_since = (now.as_micros() as u64).max(1);
        let _ = self.makes_progress(now);
        Flushed::Refused
    }
}
