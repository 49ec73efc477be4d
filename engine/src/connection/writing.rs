//! What goes out: from the outbox to the socket, and what the peer has taken of it.
//!
//! A peer that takes nothing is judged here, by what its kernel has acknowledged. Does not know when it is this
//! connection's turn.

use std::io::ErrorKind;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crate::close_reason::CloseReason;
use crate::frame::ControlFrame;
use crate::metrics::Metrics;
use crate::outbox::{Chunk, Dropped, Enqueued, Expiry, Gather, Next};
use crate::receipt::Origin;
use crate::socket::Socket;
use crate::tally::DropCause;

use super::{Connection, Phase};

/// Bytes that are gathered into one write, and given to one connection before the next one's turn.
pub(crate) const WRITE_BYTES_MAX: usize = 64 << 10;
const WRITES_PER_FLUSH: usize = 16;
/// How often a peer that takes nothing is looked at before it is given up. It is given up so much too late at most, as a
/// part of the timeout.
const STALL_LOOKS: u32 = 4;

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

/// What the expiry of frames that waited has changed.
#[derive(Debug)]
pub(crate) struct Expired {
    pub(crate) bytes: usize,
    /// Something that waited behind them was taken.
    pub(crate) has_taken: bool,
    /// When the next one expires.
    pub(crate) next: Option<Duration>,
}

/// Frames that were discarded at an end.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Discarded {
    pub(crate) frames: u64,
    pub(crate) bytes: usize,
}

/// What a drop means for a connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Loss {
    /// The handler has been told of all drops before.
    pub(crate) is_news: bool,
    /// Frames dropped since one was last taken.
    pub(crate) in_a_row: u32,
}

impl Connection {
    // ---- The outbox ----

    pub(crate) fn backlog_bytes(&self) -> usize {
        self.outbox.backlog_bytes()
    }

    /// Bytes of memory that wait because its socket takes no more for now.
    pub(crate) fn refused_bytes(&self) -> usize {
        if self.is_writable { 0 } else { self.outbox.held_bytes() }
    }

    pub(crate) fn has_backlog(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Whether frames wait for room.
    pub(crate) fn has_waiting(&self) -> bool {
        self.outbox.waiting() > 0
    }

    /// Takes the chunk if nothing is queued and it fits; false if not.
    #[inline]
    pub(crate) fn take_first(&mut self, chunk: &Rc<Chunk>) -> bool {
        let is_taken = self.outbox.push_if_empty(chunk, &self.bounds());
        if is_taken {
            self.counts.took();
        }
        is_taken
    }

    /// Puts the chunk behind what is queued; returns also by how many bytes the backlog has grown.
    pub(crate) fn offer(
        &mut self,
        chunk: &Rc<Chunk>,
        now: Duration,
        expiry: Expiry,
        origin: impl FnOnce() -> Option<Origin>,
    ) -> (Enqueued, usize) {
        let (bytes, queued) = (self.outbox.backlog_bytes(), self.outbox.queued());
        let offer = self.outbox.offer(chunk, &self.bounds(), now, expiry, origin);
        if self.outbox.queued() > queued {
            self.counts.took(); // some of it was taken, whatever becomes of the rest
        }
        (offer, self.outbox.backlog_bytes() - bytes)
    }

    /// Drops what has waited as long as it may.
    pub(crate) fn expire(&mut self, now: Duration, on_drop: impl FnMut(Dropped, Option<&Origin>)) -> Expired {
        let (bytes, queued) = (self.outbox.backlog_bytes(), self.outbox.queued());
        let next = self.outbox.expire(now, &self.bounds(), on_drop);
        let (bytes, has_taken) = (bytes - self.outbox.backlog_bytes(), self.outbox.queued() > queued);
        Expired { bytes, has_taken, next }
    }

    /// A frame was taken: later drops are a new row.
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

    /// Discards even the frame that is being written.
    pub(crate) fn discard_all(&mut self) -> Discarded {
        let bytes = self.outbox.backlog_bytes();
        let frames = self.outbox.discard_all(Origin::count_disconnected);
        self.counts.discard(frames);
        Discarded { frames, bytes }
    }

    /// Marks it as congested if it has just become so. Then returns whether publishers wait for it, for the counts of its
    /// groups.
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

    /// It is counted as congested nowhere any more; how it was counted until now.
    pub(crate) fn take_congestion(&mut self) -> Option<bool> {
        let congestion = self.congestion();
        self.is_congested = false;
        congestion
    }

    /// If it is counted as congested: whether as one that publishers wait for.
    pub(crate) fn congestion(&self) -> Option<bool> {
        self.is_congested.then(|| self.config.policy.blocks())
    }

    // ---- The list of connections to flush ----

    /// Marks it as having something to write; true if the shard must add it to the list of connections to flush.
    #[inline]
    pub(crate) fn mark_dirty(&mut self) -> bool {
        self.is_writable && !std::mem::replace(&mut self.is_dirty, true)
    }

    /// Notes that it was taken out of that list.
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
        self.socket = None;
        !std::mem::replace(&mut self.is_writable, true)
    }

    /// Queues a ping.
    pub(crate) fn push_ping(&mut self, payload: &[u8]) {
        self.outbox.push_control(ControlFrame::ping(payload).as_bytes());
    }

    /// Whether a ping is written by the next flush that gets through; and if so, whether it is behind something that the
    /// peer has not taken.
    pub(crate) fn ping_to_write(&self) -> Option<bool> {
        let has_ping = self.heartbeat.has_queued_ping() && self.is_writable;
        has_ping.then(|| self.has_unacknowledged())
    }

    /// Whether no control frame is left to be written.
    pub(crate) fn has_no_control(&self) -> bool {
        self.outbox.has_no_control()
    }

    /// Waits for an answer to our ping for another timeout, if the peer may be alive.
    pub(crate) fn prolongs_wait(&mut self, now: Duration) -> bool {
        self.excuses_silence(now) && self.heartbeat.prolong(now)
    }

    /// Whether the peer has ended its side, and nothing will announce when it has taken what is left for it.
    pub(crate) fn awaits_acknowledgement(&self) -> bool {
        self.is_input_over && self.is_lingering()
    }

    /// Bytes that the peer has taken of what the kernel was given; none where the system does not say.
    fn taken(&self) -> Option<u32> {
        Some(self.written.wrapping_sub(self.socket.as_ref()?.unacknowledged()?))
    }

    /// Whether the peer has taken something since this was last asked. If our ping was among it, its time begins now.
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
    fn has_unacknowledged(&self) -> bool {
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
        // While we do not read, the answer may be behind bytes that we have not taken.
        if had_ping { self.has_unread() } else { progress }
    }

    /// Whether the peer has everything that was sent to it, its Close frame included, as far as this is known.
    pub(crate) fn is_delivered(&self) -> bool {
        let reason = self.ending().map(|ending| &ending.reason);
        let is_told = reason.is_none_or(|reason| reason.close_frame().is_some());
        match &self.socket {
            _ if self.ending().is_some_and(|ending| ending.is_cut) => false,
            // A failed socket does not say what the peer had taken before.
            _ if matches!(reason, Some(CloseReason::Transport(_))) => false,
            Some(_) if is_told && !self.is_lingering() => false, // its Close frame has not been written
            Some(socket) if socket.is_direct() => socket.unacknowledged().is_none_or(|bytes| bytes == 0),
            Some(_) => !is_told || self.is_input_over,
            None => true,
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
                Next::Nothing if self.close_frame_pending => {
                    self.close_frame_pending = false;
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
}
