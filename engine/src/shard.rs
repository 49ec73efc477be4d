//! A shard: one thread, its loop, its connections.
//!
//! Owns its sockets, its group index and its outboxes outright; nothing in here is locked or shared. One turn: poll
//! the sockets, read them and pass messages to handlers (answering in between while there is nothing else to do),
//! execute the mailbox's commands, run the log into the outboxes, flush, fire timers. The steps that carry traffic
//! are bounded, so that a large fan-out does not starve reading, and what is left over comes first in the next turn.
//! Can be driven turn by turn with a given `now`. Does not know what payloads mean, nor how connections are accepted.
//!
//! Order (total order, causal order, exact membership). Publications are run in the order of the log. A
//! command carries the log position that it must come after, and the log is run up to there first. A
//! publication may come after a command that its publisher sent before: so the log's tail is read first, then
//! the mailbox is emptied, then the log is run up to that tail. If the mailbox was not emptied, the log goes
//! no further in this turn. What the shard itself must do after everything that a handler has sent (end its
//! connection, let it join everyone) waits in a list of its own, with the position in the log and the number
//! of commands that it comes after, so that it keeps its order even when a queue is full.
//!
//! Time. A client is judged by what had arrived when everything was last read (`listened`), not by the clock,
//! since a blocked shard has read nothing. A poll that did not fill its buffer has reported everything that
//! had arrived when it began. While more sockets are ready than one poll can report, it takes several polls
//! (a *sweep*): the kernel reports sockets in the order in which they became ready, so everything that was
//! ready when a sweep began has been reported after as many events as there are sockets.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::{Events, Poll, Token};

use crate::close_reason::CloseReason;
use crate::command::Command;
use crate::connection::Connection;
use crate::engine_core::EngineCore;
use crate::entry::Entry;
use crate::fanout::Fanout;
use crate::handler::ResumeQueue;
use crate::id::{ConnectionId, Slot};
use crate::local_queue::LocalQueue;
use crate::log::Reader;
use crate::mailbox::{Mailbox, Stamped};
use crate::outbox::Gather;
use crate::pinning::Pin;
#[cfg(all(feature = "io-uring", target_os = "linux"))]
use crate::send_batch::SendBatch;
use crate::wheel::Wheel;

#[cfg(feature = "audit")]
pub(crate) mod audit;
mod closing;
mod commands;
mod inbound;
mod outbound;
mod presence;
mod publications;
mod shutdown;
mod timer;

use self::outbound::Shedding;
use self::presence::Watch;
use self::shutdown::ShardShutdown;

pub(crate) const WAKE_TOKEN: Token = Token(usize::MAX);

const EVENTS_PER_TURN: usize = 1024;
/// Sockets read before their messages are answered: as many as still have their kernel and user state in the
/// CPU's cache when they are written to. An echo takes 2 to 3 % less CPU with 64 than with 32, 5 % more with 128.
const EVENTS_PER_ANSWER: usize = 64;
/// Commands that may be executed for that.
const COMMANDS_PER_ANSWER: usize = 128;
/// Frames put into outboxes in one turn (some 5 ns each).
const OFFERS_PER_TURN: u64 = 200_000;
/// A poll that was allowed to block and took longer than this has blocked.
const SLEPT: Duration = Duration::from_micros(20);

/// A part of an engine's connections, with the loop that serves them on one thread. See
/// [`Engine::driven`](crate::Engine::driven) for how to drive it by hand.
pub struct Shard {
    index: usize,
    core: Arc<EngineCore>,
    /// The same, in the form that handlers' wakers use.
    resume_queue: Arc<dyn ResumeQueue>,
    poll: Poll,
    /// The first events of a poll.
    events: Events,
    /// Further events, for turns in which it is better to read all sockets first.
    other_events: Events,
    reader: Reader<Entry>,
    fanout: Fanout,
    wheel: Wheel<Slot>,
    gather: Gather,
    /// None where io_uring is not wanted or not possible.
    #[cfg(all(feature = "io-uring", target_os = "linux"))]
    send_batch: Option<SendBatch>,
    started: Instant,
    /// Adoptions so far; distinguishes the generations of a slot.
    generations: u64,
    nonces: timer::Nonces,
    /// A command whose log position has not been reached yet.
    blocked_command: Option<Stamped<Command>>,
    /// Commands that this shard's thread has sent to it.
    local: Rc<LocalQueue<Command>>,
    /// Commands taken out of the mailbox and the local queue so far.
    commands: u64,
    /// Steps that must follow everything that handlers have sent.
    later: VecDeque<Later>,
    /// Slots with something left to read.
    ready: Vec<Slot>,
    offers_left: u64,
    /// The values last added to the shared sums: bytes that outboxes keep here, and bytes of unfinished messages.
    retained_told: usize,
    unfinished_told: usize,
    /// Refused writes since the last check of the memory budget, and the progress of shedding.
    refusals: u64,
    shedding: Shedding,
    /// Ends that have not been logged for operators.
    untold: Untold,
    rate_told: RateTold,
    /// When the last poll began, and the sweep that it is a part of.
    polled: Duration,
    sweep: Sweep,
    /// When the last turn began, and whether the caller supplies the time.
    before: Duration,
    is_driven: bool,
    shutdown: Option<ShardShutdown>,
    /// Users whose presence it watches.
    watch: Watch,
    scratch: Scratch,
}

/// A step to take when the log has been run up to `after` and this many commands have been executed.
struct Later {
    after: u64,
    commands: u64,
    id: ConnectionId,
    step: Step,
}

enum Step {
    /// Its `on_open` is done: it joins everyone.
    Enter,
    End(CloseReason),
}

/// Polls that together report all sockets that were ready when the first of them began.
#[derive(Debug, Default)]
struct Sweep {
    began: Duration,
    /// Events that are still expected.
    left: usize,
}

/// Connections that were ended because of their clients' behaviour, since the last log line.
#[derive(Debug, Default)]
struct Untold {
    since: Duration,
    slow: u64,
    flooding: u64,
    /// Of those, for their rate limit.
    over_rate: u64,
    undecodable: u64,
}

/// Messages that exceeded a rate limit, as of the last log line about them.
#[derive(Debug, Default)]
struct RateTold {
    at: Duration,
    delayed: u64,
    dropped: u64,
}

/// The parts from which a shard is made on its own thread: it shares frames there by `Rc`.
pub(crate) struct Parts {
    pub(crate) index: usize,
    pub(crate) core: Arc<EngineCore>,
    pub(crate) poll: Poll,
    pub(crate) reader: Reader<Entry>,
}

/// Buffers that keep their memory between turns.
#[derive(Default)]
struct Scratch {
    read: Vec<u8>,
    /// Which slot received what, as ranges of `read`.
    arrivals: Vec<(Slot, Range<usize>)>,
    ready: Vec<Slot>,
    resumes: Vec<ConnectionId>,
    slots: Vec<Slot>,
    #[cfg(all(feature = "io-uring", target_os = "linux"))]
    unsent: Vec<Slot>,
    due: Vec<(Slot, u64)>,
    late: Vec<ConnectionId>,
}

impl std::fmt::Debug for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let connections = self.fanout.connections.len();
        f.debug_struct("Shard")
            .field("index", &self.index)
            .field("connections", &connections)
            .finish_non_exhaustive()
    }
}

impl Shard {
    pub(crate) fn new(parts: Parts, now: Instant) -> Self {
        let Parts { index, core, poll, reader } = parts;
        let coalesce = core.config.coalesce;
        let read = vec![0; core.config.read_buffer_bytes];
        Self {
            index,
            resume_queue: core.clone(),
            #[cfg(all(feature = "io-uring", target_os = "linux"))]
            send_batch: outbound::open_send_batch(&core.config, index),
            core,
            poll,
            events: Events::with_capacity(EVENTS_PER_ANSWER),
            other_events: Events::with_capacity(EVENTS_PER_TURN - EVENTS_PER_ANSWER),
            reader,
            fanout: Fanout::new(coalesce),
            wheel: Wheel::new(),
            retained_told: 0,
            unfinished_told: 0,
            refusals: 0,
            shedding: Shedding::default(),
            untold: Untold::default(),
            rate_told: RateTold::default(),
            polled: Duration::ZERO,
            sweep: Sweep::default(),
            before: Duration::ZERO,
            is_driven: true,
            gather: Gather::default(),
            started: now,
            generations: 0,
            nonces: timer::Nonces::default(),
            blocked_command: None,
            local: Rc::new(LocalQueue::new()),
            commands: 0,
            later: VecDeque::new(),
            ready: Vec::new(),
            offers_left: 0,
            shutdown: None,
            watch: Watch::default(),
            scratch: Scratch { read, ..Scratch::default() },
        }
    }

    /// Runs one turn at the time `now`, without blocking. `now` must not go back.
    ///
    /// # Errors
    /// The poll failed, which does not happen while the process has its file descriptors. The shard cannot
    /// continue then.
    pub fn turn(&mut self, now: Instant) -> std::io::Result<()> {
        self.poll_sockets(Some(Duration::ZERO))?;
        self.polled = now.saturating_duration_since(self.started);
        self.fanout.arrived = self.polled;
        self.work(now)
    }

    /// Whether another turn has something to do without new input.
    pub fn has_work(&self) -> bool {
        self.fanout.flushes.has_work()
            || !self.ready.is_empty()
            || self.blocked_command.is_some()
            || !self.later.is_empty()
            || self.watch.has_work()
            || !self.local.is_empty()
            || !self.mailbox().is_empty()
            || !self.reader.is_at_tail()
    }

    /// When the next timer is due, if one is set.
    pub fn next_due(&self) -> Option<Instant> {
        let timers = self.wheel.next().into_iter().chain(self.fanout.deadlines.next());
        let due = timers.chain(self.fanout.flushes.due()).chain(self.watch.next_due()).min();
        due.map(|due| self.started + due)
    }

    /// Falls asleep, as a shard's own thread does before it polls, until the next turn: whatever gives the shard
    /// something to do makes [`poll_fd`](Self::poll_fd) readable from now on. Returns for how long at most the
    /// caller may wait for that: zero means not at all, none without a limit.
    pub fn doze(&self, now: Instant) -> Option<Duration> {
        self.sleep_bound(now)
    }

    /// The descriptor of the shard's poll, for the event loop of the caller that drives the shard. It becomes
    /// readable when a socket has something to read or, [asleep](Self::doze), when a publisher wakes the shard.
    /// Open as long as the shard.
    pub fn poll_fd(&self) -> RawFd {
        self.poll.as_raw_fd()
    }

    /// Runs turns until the engine stops and the connections have ended.
    pub(crate) fn run(mut self, mut pin: Option<Pin>) {
        tracing::debug!(shard = self.index, "shard started");
        self.is_driven = false;
        let mut ended = Instant::now();
        loop {
            let wait = self.sleep_bound(ended);
            self.before_poll(wait, ended, &mut pin);
            // When the poll begins, not when it returns: its events lack what arrives between its return and
            // a look at the clock.
            self.polled = ended.saturating_duration_since(self.started);
            let polled = self.poll_sockets(wait);
            pin.iter_mut().for_each(Pin::after_poll);
            let spins = wait == Some(Duration::ZERO) && self.events.is_empty() && !self.reader.is_at_tail();
            let began = Instant::now();
            // Input that woke a sleeping poll has just arrived. Otherwise it may have arrived at any time
            // since the last turn began, and the client must not be blamed for the difference. A poll that
            // may not sleep takes long only if this thread had to wait for its CPU.
            let slept = wait != Some(Duration::ZERO) && began - ended > SLEPT;
            let arrived = began.saturating_duration_since(self.started);
            self.fanout.arrived = if slept { arrived } else { self.before };
            self.before = arrived;
            self.core.beacons.turn(self.index, began);
            if let Err(error) = polled.and_then(|()| self.work(began)) {
                tracing::error!(shard = self.index, %error, "polling failed: the engine stops; start another");
                self.core.shutdown.fail();
                self.core.stop(Duration::ZERO, Instant::now());
                break;
            }
            ended = Instant::now();
            self.measure_lag(ended - began);
            if spins && !self.reader.is_at_tail() && self.reader.get(0).is_none() {
                std::thread::yield_now(); // a publisher was suspended between claim and release: let it run
            }
            if self.has_stopped() {
                break;
            }
        }
        tracing::debug!(shard = self.index, "shard ended");
    }

    /// How long the poll may block: not at all while there is work, otherwise until the next timer or a wake.
    fn sleep_bound(&self, now: Instant) -> Option<Duration> {
        let is_idle = || !self.has_work() && !self.has_news_of_stopping();
        if self.has_work() || !self.mailbox().fall_asleep(is_idle) {
            return Some(Duration::ZERO);
        }
        let stop = self.next_stop_due();
        let due = self.next_due().into_iter().chain(stop).min();
        due.map(|due| due.saturating_duration_since(now))
    }

    /// Before the thread may block: publishes that it sleeps, and binds it to its CPU meanwhile.
    fn before_poll(&self, wait: Option<Duration>, now: Instant, pin: &mut Option<Pin>) {
        let may_block = wait != Some(Duration::ZERO);
        if may_block {
            self.core.beacons.sleep(self.index);
        }
        pin.iter_mut().for_each(|pin| pin.before_poll(may_block, now));
    }

    /// Updates the lag: the duration of the longest recent turn, which is how long a ready socket had to wait
    /// at most.
    fn measure_lag(&mut self, turn: Duration) {
        let lag = self.fanout.metrics.lag_micros;
        self.fanout.metrics.lag_micros = (turn.as_micros() as u64).max(lag - lag.div_ceil(8));
    }

    fn poll_sockets(&mut self, wait: Option<Duration>) -> std::io::Result<()> {
        let polled = self.poll.poll(&mut self.events, wait);
        self.mailbox().wake_up();
        match polled {
            Err(error) if error.kind() != ErrorKind::Interrupted => Err(error),
            _ => Ok(()),
        }
    }

    /// Notes up to which time everything has been read, after a poll that began at `began` with room for
    /// `capacity` events.
    fn note_poll(&mut self, began: Duration, capacity: usize) {
        let events = self.events.iter().count();
        let is_full = events >= capacity;
        self.sweep.left = self.sweep.left.saturating_sub(events);
        if !is_full || self.sweep.left == 0 {
            self.fanout.listened = if is_full { self.sweep.began } else { began };
            self.sweep = Sweep { began, left: self.fanout.connections.len() + 1 }; // and the waker
        }
    }

    fn work(&mut self, now: Instant) -> std::io::Result<()> {
        let _turn = self.core.begin_turn(self.index, &self.local);
        self.fanout.now = self.fanout.now.max(now.saturating_duration_since(self.started));
        self.offers_left = OFFERS_PER_TURN;
        self.read_sockets()?;
        self.resume_handlers();
        let tail = self.core.log.tail();
        if self.drain_mailbox() {
            self.run_log(tail);
        }
        self.advance_presence();
        self.apply_verdicts();
        self.flush_dirty();
        self.expire_waiting();
        self.fire_timers();
        self.keep_within_budgets();
        self.advance_shutdown();
        self.fanout.metrics.turns += 1;
        self.publish_metrics();
        Ok(())
    }

    /// Executes and writes the answers to what has just been read, before other sockets are read. Only if all
    /// of it goes to single connections and no coalescing was configured: otherwise a larger batch per write is
    /// worth more. `waiting` is the number of connections that were to be flushed before; they keep their turn.
    fn answer(&mut self, waiting: usize) -> bool {
        let is_little = self.mailbox().len() + self.local.len() <= COMMANDS_PER_ANSWER;
        let is_alone = self.core.config.coalesce.is_zero() && self.reader.is_at_tail();
        let answers = is_little && is_alone && self.drain_mailbox();
        if answers {
            self.flush_since(waiting);
        }
        answers
    }

    /// The current time, for measurements that must not include the length of the turn. The turn's time where
    /// the caller drives the shard.
    fn clock(&self) -> Duration {
        if self.is_driven { self.fanout.now } else { self.started.elapsed().max(self.fanout.now) }
    }

    fn publish_metrics(&mut self) {
        self.fanout.metrics.connections = self.fanout.connections.len() as u64;
        self.fanout.metrics.pending_bytes = self.fanout.backlog_bytes as u64;
        self.fanout.metrics.retained_bytes = self.fanout.retained.bytes() as u64;
        self.fanout.metrics.unfinished_bytes = self.fanout.unfinished_bytes as u64;
        self.core.metrics[self.index].publish(&self.fanout.metrics);
    }

    fn mailbox(&self) -> &Mailbox<Command, mio::Waker> {
        &self.core.mailboxes[self.index]
    }

    fn find(&self, id: ConnectionId) -> Option<&Connection> {
        self.fanout.connections.find(id)
    }
}
