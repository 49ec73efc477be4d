//! How an engine ends: draining, closed, over.
//!
//! Shared by all threads. *Running* → *draining*: no new connections, no new messages; handlers finish their
//! current calls, and what they publish is still written. When no shard has a busy handler (or half of the time has
//! passed) → *closed*: nothing more can be published, and each shard closes its connections, spread over a window.
//! → *over*: the report is complete, because the last shard has ended, or because the watchdog no longer waits for
//! stuck shards; an engine without a watchdog is over with its last shard. The state never goes back. An engine
//! that fails takes the same steps and reports that it failed. Does not know connections, and reads no clock.

use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Poll, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use crate::close_code::CloseCode;
use crate::sync::plain::{AtomicBool, AtomicU8, AtomicUsize};
use crate::wait_list::{Registration, WaitList};

const RUNNING: u8 = 0;
const DRAINING: u8 = 1;
const CLOSED: u8 = 2;
const OVER: u8 = 3;

const WITHIN_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// How to end an engine; see [`Engine::shutdown`](crate::Engine::shutdown).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shutdown {
    /// Time for the whole shutdown, at most a day. After it sockets are dropped and handlers abandoned. A
    /// shard that a handler blocks at that time, by computing or by waiting, is abandoned some 200 ms later.
    pub within: Duration,
    /// The part of `within` over which the connections are closed, evenly spread and in no particular order,
    /// so that clients do not reconnect all at once. At most half of `within` is used.
    pub close_window: Duration,
    /// The code of the Close frames: 1001 (going away) or 1012 (service restart). A code that may not be sent
    /// ([`CloseCode::is_valid_on_wire`]) is refused.
    pub code: CloseCode,
}

impl Shutdown {
    /// A shutdown with code 1001 that completes within this time and spreads its closes over a quarter of it.
    pub fn within(within: Duration) -> Self {
        Self { within, close_window: within / 4, code: CloseCode::GOING_AWAY }
    }
}

/// How the connections of an engine ended when it was shut down.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct ShutdownReport {
    /// Connections whose client has everything that was sent to it: its kernel has acknowledged it, or, on a
    /// [bridge](crate::Socket::bridge), all of it was passed on and the client has ended the stream.
    pub flushed: u64,
    /// Connections that were cut off: the time was over before they had taken what was sent to them. Includes
    /// all connections of a stuck shard, as many as it had at its last turn.
    pub cut_off: u64,
    /// Handlers that had not finished when the time was over. They were dropped without `on_close`.
    pub left_over: u64,
    /// Shards that had not ended when the time was over, because a handler blocked them. Their threads were
    /// abandoned: a thread whose handler returns drops its connections and ends; otherwise it ends with the process.
    pub stuck: Vec<usize>,
}

/// The state of an engine; see [`Engine::state`](crate::Engine::state).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum EngineState {
    /// It admits connections and accepts publications.
    Running,
    /// It is shutting down: it admits no more connections.
    Stopping,
    /// It has ended by a shutdown.
    Ended,
    /// A shard panicked or could not poll its sockets. The engine no longer works; its other shards close
    /// their connections with 1001 and end. Start another engine, or end the process.
    Failed,
}

#[derive(Debug)]
pub(crate) struct ShutdownState {
    state: AtomicU8,
    has_failed: AtomicBool,
    plan: OnceLock<Plan>,
    /// It is over, and a shard was abandoned: what that shard holds will never be processed.
    has_left_behind: AtomicBool,
    /// Shards without a busy handler.
    quiet: AtomicUsize,
    shards: usize,
    end: Mutex<End>,
    /// Tasks that wait until it is over. Several lists, because every publisher that awaits a receipt is in
    /// one of them.
    waiting: Box<[WaitList]>,
    watchdog: OnceLock<Thread>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) by: Instant,
    pub(crate) within: Duration,
    pub(crate) close_window: Duration,
    pub(crate) code: CloseCode,
}

#[derive(Debug)]
struct End {
    has_ended: Box<[bool]>,
    report: ShutdownReport,
}

impl ShutdownState {
    pub(crate) fn new(shards: usize) -> Self {
        let has_ended = vec![false; shards].into();
        Self {
            state: AtomicU8::new(RUNNING),
            has_failed: AtomicBool::new(false),
            plan: OnceLock::new(),
            has_left_behind: AtomicBool::new(false),
            quiet: AtomicUsize::new(0),
            shards,
            end: Mutex::new(End { has_ended, report: ShutdownReport::default() }),
            waiting: (0..shards).map(|_| WaitList::new(usize::MAX)).collect(),
            watchdog: OnceLock::new(),
        }
    }

    /// The thread that completes the report; must be set before a shard runs.
    pub(crate) fn set_watchdog(&self, thread: Thread) {
        let _ = self.watchdog.set(thread);
    }

    /// Begins to drain; the first plan counts. The caller wakes the shards.
    pub(crate) fn ask(&self, shutdown: Shutdown, now: Instant) {
        let Shutdown { within, close_window, code } = shutdown;
        let within = within.min(WITHIN_MAX);
        self.plan.get_or_init(|| Plan {
            by: now + within,
            within,
            close_window: close_window.min(within / 2),
            code,
        });
        self.raise(DRAINING);
        self.wake_watchdog();
    }

    /// Refuses publications from now on. The caller wakes the shards.
    pub(crate) fn close(&self) {
        self.raise(CLOSED);
    }

    /// A shard has failed. The caller ends the others.
    pub(crate) fn fail(&self) {
        self.has_failed.store(true, Release); // pairs with the load in `state`; no other data depends on it
    }

    fn raise(&self, state: u8) {
        self.state.fetch_max(state, AcqRel); // pairs with the loads below: the plan is seen
    }

    fn wake_watchdog(&self) {
        if let Some(watchdog) = self.watchdog.get() {
            watchdog.unpark();
        }
    }

    pub(crate) fn state(&self) -> EngineState {
        match self.state.load(Acquire) {
            _ if self.has_failed.load(Acquire) => EngineState::Failed,
            OVER => EngineState::Ended,
            RUNNING => EngineState::Running,
            _ => EngineState::Stopping,
        }
    }

    pub(crate) fn is_asked(&self) -> bool {
        self.state.load(Acquire) >= DRAINING
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.state.load(Acquire) >= CLOSED
    }

    pub(crate) fn plan(&self) -> Option<Plan> {
        self.plan.get().copied()
    }

    /// A shard has no busy handler any more, and will have none. Returns true for the last shard.
    pub(crate) fn tell_quiet(&self) -> bool {
        self.quiet.fetch_add(1, AcqRel) + 1 == self.shards
    }

    /// A shard has ended.
    pub(crate) fn shard_has_ended(&self, shard: usize, report: &ShutdownReport) {
        let all_have = {
            let mut end = self.lock();
            end.has_ended[shard] = true;
            if self.is_over() {
                return; // it has been reported as stuck
            }
            end.report.flushed += report.flushed;
            end.report.cut_off += report.cut_off;
            end.report.left_over += report.left_over;
            end.has_ended.iter().all(|has| *has)
        };
        if all_have {
            match self.watchdog.get() {
                Some(watchdog) => watchdog.unpark(),
                None => drop(self.conclude(|_| 0)),
            }
        }
    }

    /// Shards that have not ended yet.
    pub(crate) fn remaining(&self) -> Vec<usize> {
        Self::remaining_of(&self.lock())
    }

    fn remaining_of(end: &End) -> Vec<usize> {
        (0..end.has_ended.len()).filter(|shard| !end.has_ended[*shard]).collect()
    }

    /// Completes the report. Shards that have not ended are stuck; `connections` gives the number of
    /// connections of each. Returns the stuck shards.
    pub(crate) fn conclude(&self, connections: impl Fn(usize) -> u64) -> Vec<usize> {
        let stuck = {
            let mut end = self.lock();
            let stuck = Self::remaining_of(&end);
            end.report.cut_off += stuck.iter().map(|shard| connections(*shard)).sum::<u64>();
            end.report.stuck.clone_from(&stuck);
            self.has_left_behind.store(!stuck.is_empty(), Release); // before `OVER`: read after it
            self.raise(OVER);
            stuck
        };
        self.waiting.iter().for_each(WaitList::wake_all);
        stuck
    }

    fn is_over(&self) -> bool {
        self.state.load(Acquire) == OVER
    }

    /// The report, once it is complete.
    pub(crate) fn poll<'a>(
        &'a self,
        registration: &mut Registration<'a>,
        waker: &Waker,
    ) -> Poll<ShutdownReport> {
        if !self.is_over_or_wakes(0, registration, waker) {
            return Poll::Pending;
        }
        Poll::Ready(self.lock().report.clone())
    }

    /// Whether the result of a command or publication will never come, because a shard was abandoned. If the
    /// engine is not over yet, `waker` is woken when it is; `hint` spreads the waiting tasks over the lists.
    pub(crate) fn has_left_behind<'a>(
        &'a self,
        hint: usize,
        registration: &mut Registration<'a>,
        waker: &Waker,
    ) -> bool {
        self.is_over_or_wakes(hint, registration, waker) && self.has_left_behind.load(Acquire)
    }

    fn is_over_or_wakes<'a>(
        &'a self,
        hint: usize,
        registration: &mut Registration<'a>,
        waker: &Waker,
    ) -> bool {
        // Registered before the second look: an end in between is seen, or wakes the task.
        self.is_over() || {
            self.waiting[hint % self.waiting.len()].register(registration, waker);
            self.is_over()
        }
    }

    fn lock(&self) -> MutexGuard<'_, End> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
