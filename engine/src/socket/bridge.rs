//! The near end of a bridge: a Unix socket whose other end forwards the bytes to a stream that no shard can own.
//!
//! Owned by one connection. What was written here is *in transit* until the other end has passed it on, which it
//! counts in a [`BridgeProgress`]. The count precedes the removal of the bytes from the Unix
//! socket, so it is visible when the kernel reports room and wakes the shard. The number of writes that are in transit is
//! bounded by the Unix socket's buffer. Knows bytes and how many frames they complete. Does not know the stream.

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Release};

use super::{Reached, Written};

/// How many of the bytes that an engine has written to a [bridge](super::Socket::bridge) were passed on. Shared by both
/// ends of the bridge.
#[derive(Debug, Clone, Default)]
pub struct BridgeProgress(Arc<AtomicU64>);

impl BridgeProgress {
    /// So many more bytes were passed on: the client's stream has taken them, and nothing on this side holds them any
    /// more. To be called before they are taken out of the bridge's socket, where they are peeked at until then.
    pub fn passed_on(&self, bytes: usize) {
        self.0.fetch_add(bytes as u64, Release); // pairs with the load below
    }

    /// Bytes that were passed on so far.
    pub fn bytes(&self) -> u64 {
        self.0.load(Acquire) // pairs with the count above
    }
}

/// What was written to a bridge and was not passed on yet, as far as this is known.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct InTransit {
    /// Frames that it completes.
    pub(crate) frames: u64,
    /// Bytes of frames; control frames do not count.
    pub(crate) bytes: usize,
}

#[derive(Debug)]
pub(super) struct Bridge {
    pub(super) stream: mio::net::UnixStream,
    progress: BridgeProgress,
    written: u64,
    /// The number of them that were passed on, as of the last look.
    passed: u64,
    writes: VecDeque<Write>,
    in_transit: InTransit,
}

/// A write that is in transit.
#[derive(Debug)]
struct Write {
    /// The number of bytes written up to its end.
    end: u64,
    frames: u32,
    bytes: u32,
}

impl Bridge {
    pub(super) fn new(stream: UnixStream, progress: BridgeProgress) -> Self {
        Self {
            stream: mio::net::UnixStream::from_std(stream),
            progress,
            written: 0,
            passed: 0,
            writes: VecDeque::new(),
            in_transit: InTransit::default(),
        }
    }

    /// Notes a write that has completed so many frames.
    pub(super) fn note(&mut self, written: Written, frames: u64, is_control: bool) {
        self.written += written.taken as u64;
        let bytes = if is_control { 0 } else { written.taken };
        self.writes.push_back(Write { end: self.written, frames: frames as u32, bytes: bytes as u32 });
        self.in_transit.frames += frames;
        self.in_transit.bytes += bytes;
    }

    /// What was passed on since the last call.
    pub(super) fn take_reached(&mut self) -> Reached {
        let passed = self.progress.bytes().min(self.written);
        let bytes = passed - self.passed;
        self.passed = passed;
        let mut frames = 0;
        while let Some(write) = self.writes.front().filter(|write| write.end <= passed) {
            frames += u64::from(write.frames);
            self.in_transit.bytes -= write.bytes as usize;
            self.writes.pop_front();
        }
        self.in_transit.frames -= frames;
        if self.writes.is_empty() {
            self.writes = VecDeque::new(); // most connections are idle
        }
        Reached { frames, bytes }
    }

    pub(super) fn give_up_in_transit(&mut self) -> InTransit {
        self.writes = VecDeque::new();
        std::mem::take(&mut self.in_transit)
    }

    pub(super) fn in_transit(&self) -> InTransit {
        self.in_transit
    }

    /// Bytes that were not passed on by now.
    pub(super) fn unacknowledged(&self) -> u32 {
        self.written.saturating_sub(self.progress.bytes()) as u32
    }
}
