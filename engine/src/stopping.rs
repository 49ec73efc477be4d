//! How an engine ends: asked, drained, closed, over.
//!
//! Shared by all threads. *Running* → *draining*: no new connections, no new messages;
//! handlers finish what they are at, and what they publish still goes out. When no shard
//! has a busy handler (or half of the time is over) → *closed*: nothing more can be
//! published, and each shard closes its connections, spread over a window. When the last
//! shard has ended the report is complete. Only goes forward. Does not know connections.

use std::sync::atomic::Ordering::{AcqRel, Acquire};
use std::sync::atomic::{AtomicU8, AtomicUsize};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use crate::close_code::CloseCode;

const RUNNING: u8 = 0;
const DRAINING: u8 = 1;
const CLOSED: u8 = 2;

const WITHIN_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// How to end an engine; see [`Engine::shutdown`](crate::Engine::shutdown).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shutdown {
    /// Time for all of it, a day at most. After it sockets are dropped and handlers abandoned.
    pub within: Duration,
    /// The part of it over which the connections are closed, at even distances in no particular order, so that
    /// clients do not come back all at once. At most a half of `within` is used.
    pub spread: Duration,
    /// What the Close frames say: 1001 (going away) or 1012 (service restart).
    pub code: CloseCode,
}

impl Shutdown {
    /// Closes with 1001 within this time, connections spread over a quarter of it.
    pub fn within(within: Duration) -> Self {
        Self { within, spread: within / 4, code: CloseCode::GOING_AWAY }
    }
}

/// How the connections of an engine that was shut down have ended.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ShutdownReport {
    /// Connections that were given everything that was theirs.
    pub flushed: u64,
    /// Connections that were cut off: the time was over and they had not taken what was theirs.
    pub cut_off: u64,
    /// Handlers that had not finished when the time was over. They were dropped without `on_close`.
    pub left_over: u64,
}

#[derive(Debug)]
pub(crate) struct Stopping {
    state: AtomicU8,
    plan: OnceLock<Plan>,
    /// Shards without a busy handler.
    quiet: AtomicUsize,
    shards: usize,
    end: Mutex<End>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) by: Instant,
    pub(crate) within: Duration,
    pub(crate) spread: Duration,
    pub(crate) code: CloseCode,
}

#[derive(Debug, Default)]
struct End {
    shards: usize,
    report: ShutdownReport,
    wakers: Vec<Waker>,
}

impl Stopping {
    pub(crate) fn new(shards: usize) -> Self {
        let (state, quiet) = (AtomicU8::new(RUNNING), AtomicUsize::new(0));
        Self { state, plan: OnceLock::new(), quiet, shards, end: Mutex::new(End::default()) }
    }

    /// Begins to drain; the first plan counts. The caller wakes the shards.
    pub(crate) fn ask(&self, shutdown: Shutdown, now: Instant) {
        let Shutdown { within, spread, code } = shutdown;
        let within = within.min(WITHIN_MAX);
        self.plan.get_or_init(|| Plan { by: now + within, within, spread: spread.min(within / 2), code });
        self.raise(DRAINING);
    }

    /// Nothing more can be published. The caller wakes the shards.
    pub(crate) fn close(&self) {
        self.raise(CLOSED);
    }

    fn raise(&self, state: u8) {
        self.state.fetch_max(state, AcqRel); // pairs with the loads below: the plan is seen
    }

    pub(crate) fn is_asked(&self) -> bool {
        self.state.load(Acquire) >= DRAINING
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.state.load(Acquire) == CLOSED
    }

    pub(crate) fn plan(&self) -> Option<Plan> {
        self.plan.get().copied()
    }

    /// A shard has no busy handler any more, and will have none. True for the last one.
    pub(crate) fn tell_quiet(&self) -> bool {
        self.quiet.fetch_add(1, AcqRel) + 1 == self.shards
    }

    /// A shard has ended.
    pub(crate) fn tell_end(&self, report: ShutdownReport) {
        let wakers = {
            let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
            end.shards += 1;
            end.report.flushed += report.flushed;
            end.report.cut_off += report.cut_off;
            end.report.left_over += report.left_over;
            if end.shards < self.shards {
                return;
            }
            std::mem::take(&mut end.wakers)
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    /// The report, once all shards have ended.
    pub(crate) fn poll(&self, waker: &Waker) -> Poll<ShutdownReport> {
        let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        if end.shards == self.shards {
            return Poll::Ready(end.report);
        }
        if !end.wakers.iter().any(|known| known.will_wake(waker)) {
            end.wakers.push(waker.clone());
        }
        Poll::Pending
    }
}
