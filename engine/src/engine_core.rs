//! The engine's core: the state that all its threads share, and what any thread may do with the shards.
//!
//! Shared by handles, handlers and shards. Each function is short and never blocks: if the log or a mailbox
//! is full, the caller gets the value back. Knows the log, the mailboxes and the directory. Does not know
//! sockets or connections, nor how publishers wait.

use std::cell::{Cell, RefCell};
use std::hash::{BuildHasher, RandomState};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::admission::Admission;
use crate::beacon::Beacons;
use crate::close_code::CloseCode;
use crate::command::Command;
use crate::config::EngineConfig;
use crate::directory::{Directory, Group};
use crate::entry::{Entry, Target};
use crate::handler::ResumeQueue;
use crate::id::ConnectionId;
use crate::local_queue::LocalQueue;
use crate::log::Log;
use crate::mailbox::{Mailbox, Stamped};
use crate::metrics::PublishedMetrics;
use crate::position::Position;
use crate::rendition::Encodings;
use crate::shard_set::ShardSet;
use crate::shutdown::{Shutdown, ShutdownState};
use crate::sync::plain::{AtomicU64, AtomicUsize};
use crate::wait_list::Refused;

/// Number of publications after which a shard that has no members for them is woken all the same, to pass them.
const LAG_MAX: u64 = 256;

thread_local! {
    /// The number of publications and commands that this thread has tried to send, to any engine. A shard
    /// compares it before and after a handler's call to see whether the handler sent something; what other
    /// threads send meanwhile does not count.
    static SENT: Cell<u64> = const { Cell::new(0) };

    /// The shard whose turn this thread is running.
    static RUNNING: RefCell<Option<Running>> = const { RefCell::new(None) };
}

#[derive(Debug)]
struct Running {
    /// Only compared.
    core: *const EngineCore,
    shard: usize,
    queue: Rc<LocalQueue<Command>>,
}

/// A turn of a shard, until this is dropped: commands that its thread sends to it go into its local queue.
#[must_use]
#[derive(Debug)]
pub(crate) struct Turn {
    /// That of a turn in which this one takes place, as a handler may drive another engine.
    outer: Option<Running>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        RUNNING.set(self.outer.take());
    }
}

/// Grows by one with each publication or command that the calling thread tries to send.
pub(crate) fn sent_by_this_thread() -> u64 {
    SENT.get()
}

#[derive(Debug)]
pub(crate) struct EngineCore {
    pub(crate) config: EngineConfig,
    clock: fn() -> Instant,
    /// Identifies this run of the engine; random.
    epoch: u64,
    pub(crate) log: Arc<Log<Entry>>,
    pub(crate) mailboxes: Box<[Mailbox<Command, mio::Waker>]>,
    pub(crate) metrics: Box<[PublishedMetrics]>,
    pub(crate) admission: Arc<Admission>,
    pub(crate) next_group: Arc<AtomicU64>,
    pub(crate) encodings: Encodings,
    /// Bytes that all outboxes keep in memory, and bytes of unfinished messages, as of the shards' last turns.
    pub(crate) retained_bytes: AtomicUsize,
    pub(crate) unfinished_bytes: AtomicUsize,
    pub(crate) shutdown: ShutdownState,
    pub(crate) beacons: Beacons,
}

impl EngineCore {
    pub(crate) fn new(
        config: EngineConfig,
        log: Arc<Log<Entry>>,
        mailboxes: Box<[Mailbox<Command, mio::Waker>]>,
        beacons: Beacons,
        clock: fn() -> Instant,
    ) -> Self {
        let shards = mailboxes.len();
        Self {
            epoch: RandomState::new().hash_one(0),
            log,
            metrics: (0..shards).map(|_| PublishedMetrics::default()).collect(),
            admission: Admission::new(
                config.max_connections,
                config.max_connections_per_address,
                config.max_upgrades_per_address,
                shards,
            ),
            next_group: Arc::new(AtomicU64::new(0)),
            encodings: Encodings::default(),
            retained_bytes: AtomicUsize::new(0),
            unfinished_bytes: AtomicUsize::new(0),
            shutdown: ShutdownState::new(shards),
            beacons,
            mailboxes,
            config,
            clock,
        }
    }

    /// The time, for what is not told by a shard.
    pub(crate) fn now(&self) -> Instant {
        (self.clock)()
    }

    /// The position after this number of publications.
    pub(crate) fn position(&self, sequence: u64) -> Position {
        Position { epoch: self.epoch, sequence }
    }

    /// The position after everything that has been published so far.
    pub(crate) fn tail(&self) -> Position {
        self.position(self.log.tail())
    }

    /// Puts a publication into the log and wakes the shards that may have members for it; returns the
    /// position after it. The caller has reserved its bytes. A refused entry is boxed, because refusal is
    /// rare and the value is large.
    pub(crate) fn try_publish(&self, entry: Entry) -> Result<Position, Refused<Box<Entry>>> {
        SENT.set(SENT.get() + 1);
        let target = entry.target.clone();
        let waited_for = entry.tickets.as_ref().map(|tickets| tickets.shards().clone());
        let position = self.log.try_push(entry).map_err(|refused| refused.map(Box::new))?;
        target.for_each_group(|group| self.wake_members(group));
        if let Some(shards) = waited_for {
            // Such a shard may have lost its last member meanwhile, but it has the ticket.
            shards.iter().for_each(|shard| self.mailboxes[shard].wake());
        }
        self.wake_before_full(position);
        Ok(self.position(position + 1))
    }

    /// Puts an entry into the log that concerns the calling shard only. It has no payload.
    pub(crate) fn try_announce(&self, entry: Entry) -> Result<(), Refused<()>> {
        let position = self.log.try_push(entry).map_err(|refused| refused.map(drop))?;
        self.wake_before_full(position);
        Ok(())
    }

    /// A shard that sleeps because no publication concerns it holds back the log's gate: wakes it before the log
    /// is full.
    fn wake_before_full(&self, position: u64) {
        let distance = (self.log.capacity() / 4).clamp(1, LAG_MAX);
        if position.is_multiple_of(distance) {
            self.wake_laggards(distance);
        }
    }

    /// Tells the shard that watches presence to look at a user in a group.
    pub(crate) fn watch(&self, directory: &Arc<Directory>, group: Arc<Group>, user: Arc<str>) {
        let Some(observation) = directory.observation() else { return };
        let watcher = &self.mailboxes[directory.watcher()];
        if observation.add_news() {
            watcher.push_internal(Command::Watch { group, user });
        } else {
            group.unwatch(&user);
            if observation.overflows() {
                watcher.push_internal(Command::WatchAll(directory.clone()));
            }
        }
    }

    /// Wakes the shards that may have members now. Sees every join that returned before the log position was claimed.
    fn wake_members(&self, group: &Group) {
        if group.is_closed() {
            // Members that have joined since are in a new entry, which the shards look up.
            self.wake_all();
        } else {
            group.interested(|shard| self.mailboxes[shard].wake());
        }
    }

    /// The shards that may have members of the target, including each whose join has returned before the call.
    pub(crate) fn shards_of(&self, target: &Target) -> ShardSet {
        let mut shards = ShardSet::default();
        target.for_each_group(|group| {
            if group.is_closed() || group.has_arriving() {
                // The shard of a join that has not been executed may have cleared its interest.
                (0..self.mailboxes.len()).for_each(|shard| shards.insert(shard));
            } else {
                group.interested(|shard| shards.insert(shard));
            }
        });
        shards
    }

    /// Wakes the shards that lag by at least `distance` publications.
    pub(crate) fn wake_laggards(&self, distance: u64) {
        for shard in self.log.laggards(distance) {
            self.mailboxes[shard].wake();
        }
    }

    /// A turn of this shard begins on this thread.
    pub(crate) fn begin_turn(&self, shard: usize, queue: &Rc<LocalQueue<Command>>) -> Turn {
        Turn { outer: RUNNING.replace(Some(Running { core: self, shard, queue: queue.clone() })) }
    }

    /// The shard's local queue, if this thread is running the shard's turn.
    fn local_queue(&self, shard: usize) -> Option<Rc<LocalQueue<Command>>> {
        let queue = |running: &RefCell<Option<Running>>| {
            let running = running.borrow();
            let here =
                running.as_ref().filter(|here| here.shard == shard && std::ptr::eq(here.core, self))?;
            Some(here.queue.clone())
        };
        // An application may send while its thread ends, after the thread-local values have been dropped.
        RUNNING.try_with(queue).ok().flatten()
    }

    /// Puts a command into a shard's mailbox, or into its local queue. It is executed after everything that was
    /// published before this call. Returns a position that the command precedes.
    pub(crate) fn try_command(&self, shard: usize, command: Command) -> Result<Position, Refused<Command>> {
        SENT.set(SENT.get() + 1);
        let Some(mailbox) = self.mailboxes.get(shard) else { return Err(Refused::Closed(command)) };
        let after = self.log.tail(); // before the command gets its place, see `local_queue.rs`
        match self.local_queue(shard).filter(|queue| !queue.is_full()) {
            Some(queue) => {
                queue.push(Stamped { after, command }, mailbox.len());
                mailbox.tell_local(queue.len());
            }
            None => mailbox.push(after, command)?,
        }
        // Read again: a shard may run some of what was published meanwhile before it takes the command.
        Ok(self.tail())
    }

    /// The same for a command that may wait until the caller wakes the shard.
    pub(crate) fn try_command_without_wake(
        &self,
        shard: usize,
        command: Command,
    ) -> Result<(), Refused<Command>> {
        SENT.set(SENT.get() + 1);
        let Some(mailbox) = self.mailboxes.get(shard) else { return Err(Refused::Closed(command)) };
        mailbox.push_without_wake(self.log.tail(), command)
    }

    /// Asks all shards to shut down gracefully.
    pub(crate) fn shut_down(&self, shutdown: Shutdown, now: Instant) {
        self.shutdown.ask(shutdown, now);
        self.wake_all();
    }

    /// Asks all shards to end now: they flush what is queued for at most `within` and wait for nothing else.
    pub(crate) fn stop(&self, within: Duration, now: Instant) {
        let shutdown = Shutdown { within, close_window: Duration::ZERO, code: CloseCode::GOING_AWAY };
        self.shutdown.ask(shutdown, now);
        self.close();
    }

    /// Refuses publications from now on, and wakes the shards so that they notice.
    pub(crate) fn close(&self) {
        self.log.close(); // first: a thread that sees the engine closed sees the log's final tail
        self.shutdown.close();
        self.wake_all();
    }

    fn wake_all(&self) {
        self.mailboxes.iter().for_each(Mailbox::wake);
    }
}

impl ResumeQueue for EngineCore {
    fn resume(&self, id: ConnectionId) {
        self.mailboxes[id.shard()].resume(id);
    }
}
