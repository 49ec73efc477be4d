//! The engine's core: what all its threads share, and what any of them may do with the shards.
//!
//! Shared by handles, handlers and shards. Everything here is short and never blocks; who
//! finds the log or a mailbox full gets the value back. Knows the log, the mailboxes and
//! the directory. Does not know sockets or connections, nor how publishers wait.

use std::cell::Cell;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::time::{Duration, Instant};

use crate::admission::Admission;
use crate::beacon::Beacons;
use crate::close_code::CloseCode;
use crate::command::Command;
use crate::config::EngineConfig;
use crate::directory::Group;
use crate::entry::{Entry, Named, Target};
use crate::handler::ResumeQueue;
use crate::id::ConnectionId;
use crate::log::Log;
use crate::mailbox::Mailbox;
use crate::metrics::PublishedMetrics;
use crate::position::Position;
use crate::rendition::Encodings;
use crate::shutdown::{Shutdown, ShutdownState};
use crate::wait_list::Refused;

/// Publications after which even a shard that they do not concern is woken to pass them.
const LAG_MAX: u64 = 256;

thread_local! {
    /// What this thread has tried to send so far, to any engine. Only looked at before and after a call, so that a shard
    /// knows whether a handler has sent something in between: what other threads send meanwhile is not its doing.
    static SENT: Cell<u64> = const { Cell::new(0) };
}

/// Grows with each publication or command that the calling thread tries to send.
pub(crate) fn sent_by_this_thread() -> u64 {
    SENT.get()
}

#[derive(Debug)]
pub(crate) struct EngineCore {
    pub(crate) config: EngineConfig,
    /// Names this run of the engine.
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
    ) -> Self {
        let shards = mailboxes.len();
        Self {
            epoch: RandomState::new().hash_one(0),
            log,
            metrics: (0..shards).map(|_| PublishedMetrics::default()).collect(),
            admission: Admission::new(config.max_connections, config.max_connections_per_address, shards),
            next_group: Arc::new(AtomicU64::new(0)),
            encodings: Encodings::default(),
            retained_bytes: AtomicUsize::new(0),
            unfinished_bytes: AtomicUsize::new(0),
            shutdown: ShutdownState::new(shards),
            beacons,
            mailboxes,
            config,
        }
    }

    /// The place in the order behind so many publications.
    pub(crate) fn position(&self, sequence: u64) -> Position {
        Position { epoch: self.epoch, sequence }
    }

    /// The place in the order behind everything that was published until now.
    pub(crate) fn tail(&self) -> Position {
        self.position(self.log.tail())
    }

    /// Puts a publication into the log and wakes the shards that it concerns; returns the place behind it. Its bytes have
    /// been reserved. What is refused is boxed: that is rare, and the value is large.
    pub(crate) fn try_publish(&self, entry: Entry) -> Result<Position, Refused<Box<Entry>>> {
        SENT.set(SENT.get() + 1);
        let waited_for = entry.ticket.is_some();
        let concerned = entry.target.clone();
        let position = self.log.try_push(entry).map_err(|refused| refused.map(Box::new))?;
        if waited_for {
            // The ticket comes back when every shard has passed, also those without members.
            self.mailboxes.iter().for_each(Mailbox::wake);
            self.log.reclaim(); // for the case that all shards have just ended
        } else {
            match &concerned {
                Target::One(group) => self.wake_members(group),
                Target::Several(groups) => {
                    groups.iter().filter_map(Named::find).for_each(|group| self.wake_members(&group));
                }
            }
        }
        // Shards that sleep because nothing concerns them hold back the gate: wake them in good time.
        let distance = (self.log.capacity() / 4).clamp(1, LAG_MAX);
        if position % distance == 0 {
            self.wake_laggards(distance);
        }
        Ok(self.position(position + 1))
    }

    /// Wakes the shards that may have members now. Joins that returned before the log's position was claimed are seen.
    fn wake_members(&self, group: &Group) {
        if group.is_closed() {
            // Members that have joined since are in another entry, which the shards find.
            self.mailboxes.iter().for_each(Mailbox::wake);
        } else {
            group.interested(|shard| self.mailboxes[shard].wake());
        }
    }

    pub(crate) fn wake_laggards(&self, distance: u64) {
        for shard in self.log.laggards(distance) {
            self.mailboxes[shard].wake();
        }
    }

    /// Puts a command into a shard's mailbox, to be carried out after all that was published before; returns a place
    /// in the order that it comes before.
    pub(crate) fn try_command(&self, shard: usize, command: Command) -> Result<Position, Refused<Command>> {
        SENT.set(SENT.get() + 1);
        let Some(mailbox) = self.mailboxes.get(shard) else { return Err(Refused::Closed(command)) };
        mailbox.push(self.log.tail(), command)?;
        // Looked at again: of what was published meanwhile, a shard may have run some before it takes the command.
        Ok(self.tail())
    }

    /// Asks all shards to end in order.
    pub(crate) fn shut_down(&self, shutdown: Shutdown, now: Instant) {
        self.shutdown.ask(shutdown, now);
        self.wake_all();
    }

    /// Asks all shards to end now: what is queued is flushed for as long as `within`, nothing else is waited for.
    pub(crate) fn stop(&self, within: Duration, now: Instant) {
        let shutdown = Shutdown { within, close_window: Duration::ZERO, code: CloseCode::GOING_AWAY };
        self.shutdown.ask(shutdown, now);
        self.close();
    }

    /// Refuses publications from now on, and tells the shards.
    pub(crate) fn close(&self) {
        self.log.close(); // first: who sees the engine closed sees the log's last tail
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
