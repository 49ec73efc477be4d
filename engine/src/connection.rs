//! Our side of one WebSocket: its socket, what it has sent half, what it has not taken yet.
//!
//! Owned by one shard. Moves bytes between the socket, the decoder and the outbox, and
//! keeps the state of the closing handshake. Does not know other connections, groups or
//! the log: what concerns them is told to the shard as a verdict.
//!
//! Its life, in `Phase`: *Open*; *Closing*, from the moment that its end is decided until
//! the Close frame is with the kernel (no message is handled, nothing is offered any
//! more); *Lingering*, until the peer's end of the stream comes, so that closing the
//! socket does not destroy the Close frame on its way; then the socket is dropped. The
//! handler may outlive the socket: it is let finish what it is doing, then told the end.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use crate::admission::Place;
use crate::close_reason::CloseReason;
use crate::config::ConnectionConfig;
use crate::decoder::{Decoder, Limits};
use crate::directory::Directory;
use crate::frame::ControlFrame;
use crate::handler::{Handler, Resume};
use crate::heartbeat::Heartbeat;
use crate::id::ConnectionId;
use crate::metrics::{ConnectionMetrics, Counts, Metrics};
use crate::outbox::{Bounds, Gather, Next, Outbox};
use crate::receipt::Ticket;
use crate::socket::Socket;

/// Bytes that are gathered into one write, and given to one connection before the next one's turn.
pub(crate) const WRITE_BYTES_MAX: usize = 64 << 10;
const WRITES_PER_FLUSH: usize = 16;
/// Unread bytes from which on a socket may be taking no more. Kernels start with room for some 64 KiB.
const UNREAD_BYTES_FULL: usize = 32 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Open,
    Closing,
    Lingering,
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
    /// Read, but not decoded: the handler was busy.
    pub(crate) unread: Option<Box<Unread>>,
    /// How it ends, once that is decided.
    pub(crate) ending: Option<Box<Ending>>,
    pub(crate) heartbeat: Heartbeat,
    /// The tick of the wheel that counts; earlier reminders are stale.
    pub(crate) armed: u64,
    pub(crate) counts: Counts,
    /// Frames dropped since one was last taken.
    pub(crate) drops_in_a_row: u32,
    /// Frames dropped that the handler has not been told of.
    pub(crate) drops_untold: u32,
    pub(crate) control_rate: ControlRate,
    pub(crate) phase: Phase,
    pub(crate) work: Work,
    /// Nothing more is listened to: the end is on its way through the mailbox.
    pub(crate) is_deaf: bool,
    /// The engine is ending: no more messages are read.
    pub(crate) is_paused: bool,
    /// The Close frame is still to be queued, behind all data.
    pub(crate) owes_close: bool,
    /// The kernel may have bytes for us.
    pub(crate) is_readable: bool,
    /// The kernel's end of the stream was announced, so a short read does not mean that it is empty.
    pub(crate) is_read_closed: bool,
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

/// How a connection ends.
#[derive(Debug)]
pub(crate) struct Ending {
    pub(crate) reason: CloseReason,
    /// When the closing handshake must be over.
    pub(crate) by: Duration,
}

/// Bytes that were read while the handler was busy; `bytes[from..]` is to be decoded.
#[derive(Debug)]
pub(crate) struct Unread {
    pub(crate) bytes: Vec<u8>,
    pub(crate) from: usize,
}

/// Control frames of the peer in the current second.
#[derive(Debug, Default)]
pub(crate) struct ControlRate {
    second: u32,
    frames: u16,
}

impl ControlRate {
    /// Counts one; false if that is too many.
    pub(crate) fn admits(&mut self, now: Duration, max: u16) -> bool {
        let second = now.as_secs() as u32; // only compared: may wrap
        if self.second != second {
            (self.second, self.frames) = (second, 0);
        }
        self.frames = self.frames.saturating_add(1);
        self.frames <= max
    }
}

/// How a flush ended.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flushed {
    /// Nothing is left, or the kernel takes no more for now.
    Rests,
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
    pub(crate) fn bounds(&self) -> Bounds {
        Bounds {
            frames: self.config.outbox_frames,
            bytes: self.config.outbox_bytes,
            waiting: self.config.waiting_frames,
            waiting_bytes: self.config.waiting_bytes,
        }
    }

    /// If it is counted as congested: whether as one that publishers wait for.
    pub(crate) fn congestion(&self) -> Option<bool> {
        self.is_congested.then(|| self.config.policy.blocks())
    }

    /// Whether the next message may be handed over.
    pub(crate) fn is_listening(&self) -> bool {
        self.phase == Phase::Open && self.work == Work::Idle && !self.is_deaf && !self.is_paused
    }

    /// Whether the socket is to be read: for messages, or after the end for what is left in the kernel.
    pub(crate) fn is_reading(&self) -> bool {
        self.socket.is_some() && self.is_readable && (self.is_listening() || self.phase != Phase::Open)
    }

    /// Whether an answer of the peer may be stuck because nobody reads: the handler is busy, and the peer has sent
    /// so much meanwhile that the kernel may take no more.
    pub(crate) fn may_be_stuck(&self) -> bool {
        self.work != Work::Idle
            && self.socket.as_ref().is_some_and(|socket| socket.has_unread(UNREAD_BYTES_FULL))
    }

    pub(crate) fn limits(&self) -> Limits {
        Limits { max_message_bytes: self.config.max_message_bytes, max_fragments: self.config.max_fragments }
    }

    pub(crate) fn metrics(&self) -> ConnectionMetrics {
        let Counts { offered, written, dropped_timeout, dropped_overflow, discarded, received } = self.counts;
        ConnectionMetrics {
            offered,
            written,
            dropped_timeout: dropped_timeout.into(),
            dropped_overflow: dropped_overflow.into(),
            discarded,
            pending: self.outbox.pending(),
            pending_bytes: self.outbox.backlog_bytes() as u64,
            received,
            rtt: self.heartbeat.rtt(),
        }
    }

    /// Reads once.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> Read {
        let Some(socket) = &self.socket else { return Read::Nothing };
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
    pub(crate) fn flush(&mut self, gather: &mut Gather, totals: &mut Metrics) -> Flushed {
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
                    if is_control {
                        self.outbox.wrote_control(count);
                    } else {
                        let (waiting, bounds) = (self.outbox.waiting(), self.bounds());
                        let frames = u64::from(self.outbox.wrote(count, &bounds));
                        if self.outbox.waiting() < waiting {
                            self.drops_in_a_row = 0; // something that had waited was taken
                        }
                        self.counts.written += frames;
                        totals.written += frames;
                    }
                }
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => {}
                    ErrorKind::WouldBlock => {
                        self.is_writable = false;
                        return Flushed::Rests;
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
        match self.ending.as_deref().map(|ending| &ending.reason) {
            Some(CloseReason::Peer { code: None }) | None => ControlFrame::close_empty(),
            Some(reason) => match reason.close_frame() {
                Some((code, text)) => ControlFrame::close(code, text),
                None => ControlFrame::close_empty(),
            },
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
