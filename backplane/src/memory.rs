//! A log in memory, for tests: several nodes in one process.
//!
//! Injects the faults of a broker on request ([`Faults`], [`MemoryLog::set_outage`], [`MemoryLog::truncate`],
//! [`MemoryLog::lose`]): late and reordered acknowledgements, appends with an unknown outcome, outages, retention, lost
//! records. Random, but the same for the same seed. Uses tokio's time, so a test can pause it. Stores nothing elsewhere.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{sleep, timeout};

use crate::{APPEND_TIMEOUT, Backplane, Connection, Error, Gap, GapCause, NodeId, Position, Record, Start};

/// The longest record, as NATS has it by default.
const RECORD_BYTES_MAX: usize = 1 << 20;

/// Messages that wait for one node; further ones are lost.
const INBOX_MAX: usize = 1024;

/// Faults that occur at random. None by default.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Faults {
    /// Determines everything that is random.
    pub seed: u64,
    /// An append is acknowledged after at most so long, each after its own time: acknowledgements change their order.
    pub acknowledged_within: Duration,
    /// A reader gets a record after at most so long.
    pub read_within: Duration,
    /// The part of appends that fail although the record has been appended, from 0 to 1.
    pub unknown: f64,
    /// The part of appends that fail before the record is appended, from 0 to 1.
    pub failed: f64,
}

/// A log in memory. A clone is another handle to the same log.
#[derive(Debug, Clone)]
pub struct MemoryLog {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// The state or the connection has changed. Wakes in the order of waiting, which a `watch` does not.
    changed: Notify,
    connection: watch::Sender<Connection>,
}

#[derive(Debug)]
struct State {
    faults: Faults,
    /// Random numbers drawn so far.
    drawn: u64,
    records: VecDeque<Record>,
    /// The position of the last record that was appended.
    tail: Position,
    /// Everything up to here has been dropped by retention.
    dropped: Position,
    inboxes: HashMap<NodeId, Vec<mpsc::Sender<Bytes>>>,
}

impl Default for MemoryLog {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryLog {
    /// An empty log without faults.
    pub fn new() -> Self {
        Self::with_faults(Faults::default())
    }

    /// An empty log with faults.
    pub fn with_faults(faults: Faults) -> Self {
        let tail = Position { epoch: 1, sequence: 0 };
        let state = State {
            faults,
            drawn: 0,
            records: VecDeque::new(),
            tail,
            dropped: tail,
            inboxes: HashMap::new(),
        };
        Self {
            shared: Arc::new(Shared {
                state: Mutex::new(state),
                changed: Notify::new(),
                connection: watch::Sender::new(Connection::Connected),
            }),
        }
    }

    /// A node's access to it.
    pub fn backplane(&self) -> MemoryBackplane {
        MemoryBackplane { shared: self.shared.clone() }
    }

    /// Sets the faults from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.shared.lock().faults = faults;
    }

    /// Begins or ends an outage: meanwhile appends fail and readers wait.
    pub fn set_outage(&self, is_out: bool) {
        self.shared.connection.send_replace(if is_out {
            Connection::Disconnected
        } else {
            Connection::Connected
        });
        self.shared.changed.notify_waiters();
    }

    /// Drops all but the last `keep` records, as retention does.
    pub fn truncate(&self, keep: usize) {
        let mut state = self.shared.lock();
        while state.records.len() > keep {
            if let Some(record) = state.records.pop_front() {
                state.dropped = record.position;
            }
        }
        drop(state);
        self.shared.changed.notify_waiters();
    }

    /// Loses the last `count` records, as a broker without storage does when it crashes, and begins a new epoch.
    pub fn lose(&self, count: usize) {
        let mut state = self.shared.lock();
        let left = state.records.len().saturating_sub(count);
        state.records.truncate(left);
        let sequence = state.records.back().map_or(state.dropped.sequence, |last| last.position.sequence);
        state.tail = Position { epoch: state.tail.epoch + 1, sequence };
        drop(state);
        self.shared.changed.notify_waiters();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_out(&self) -> bool {
        *self.connection.borrow() == Connection::Disconnected
    }

    /// Waits until there is no outage.
    async fn is_up(&self) {
        loop {
            let changed = self.changed.notified(); // also what changes from now on
            if !self.is_out() {
                return;
            }
            changed.await;
        }
    }
}

impl State {
    /// A number below 1.
    fn draw(&mut self) -> f64 {
        self.drawn += 1;
        let hashed = BuildHasherDefault::<DefaultHasher>::new().hash_one((self.faults.seed, self.drawn));
        hashed as f64 / u64::MAX as f64
    }

    fn draw_below(&mut self, max: Duration) -> Duration {
        if max.is_zero() { max } else { max.mul_f64(self.draw()) }
    }

    fn append(&mut self, payload: Bytes) {
        self.tail = self.tail.next();
        self.records.push_back(Record { position: self.tail, payload });
    }
}

/// A node's access to a [`MemoryLog`].
#[derive(Debug, Clone)]
pub struct MemoryBackplane {
    shared: Arc<Shared>,
}

impl Backplane for MemoryBackplane {
    type Reader = Reader;
    type Inbox = Inbox;

    async fn append(&self, record: Bytes) -> Result<(), Error> {
        Error::check_length(record.len(), RECORD_BYTES_MAX)?;
        if self.shared.is_out() && timeout(APPEND_TIMEOUT, self.shared.is_up()).await.is_err() {
            return Err(Error::unavailable("an outage"));
        }
        let (is_told, delay) = {
            let mut state = self.shared.lock();
            let faults = state.faults;
            if state.draw() < faults.failed {
                return Err(Error::unavailable("it was not appended"));
            }
            state.append(record);
            (state.draw() >= faults.unknown, state.draw_below(faults.acknowledged_within))
        };
        self.shared.changed.notify_waiters();
        if !delay.is_zero() {
            sleep(delay).await;
        }
        if is_told { Ok(()) } else { Err(Error::unavailable("the acknowledgement was lost")) }
    }

    async fn read(&self, start: Start) -> Result<Reader, Error> {
        if self.shared.is_out() {
            return Err(Error::unavailable("an outage"));
        }
        let state = self.shared.lock();
        let next = match start {
            Start::After(position) => position,
            Start::Tail => state.tail,
            Start::Oldest => state.records.front().map_or(state.tail, |first| Position {
                sequence: first.position.sequence - 1,
                ..first.position
            }),
        };
        drop(state);
        Ok(Reader { shared: self.shared.clone(), after: next })
    }

    async fn tail(&self) -> Result<Position, Error> {
        if self.shared.is_out() {
            return Err(Error::unavailable("an outage"));
        }
        Ok(self.shared.lock().tail)
    }

    async fn tell(&self, node: NodeId, message: Bytes) -> Result<(), Error> {
        if self.shared.is_out() {
            return Err(Error::unavailable("an outage"));
        }
        let mut state = self.shared.lock();
        if let Some(inboxes) = state.inboxes.get_mut(&node) {
            inboxes.retain(|inbox| !inbox.is_closed());
            inboxes.iter().for_each(|inbox| drop(inbox.try_send(message.clone())));
        }
        Ok(())
    }

    async fn listen(&self, node: NodeId) -> Result<Inbox, Error> {
        if self.shared.is_out() {
            return Err(Error::unavailable("an outage"));
        }
        let (sender, messages) = mpsc::channel(INBOX_MAX);
        self.shared.lock().inboxes.entry(node).or_default().push(sender);
        Ok(Inbox(messages))
    }

    fn connection(&self) -> watch::Receiver<Connection> {
        self.shared.connection.subscribe()
    }

    fn record_bytes_max(&self) -> usize {
        RECORD_BYTES_MAX
    }
}

/// Reads a [`MemoryLog`].
#[derive(Debug)]
pub struct Reader {
    shared: Arc<Shared>,
    /// The last position that was read.
    after: Position,
}

impl Reader {
    /// The next record or gap, if there is one.
    fn take(&mut self) -> Option<Result<Record, Gap>> {
        let state = self.shared.lock();
        let next = state.records.partition_point(|record| record.position <= self.after);
        let next = state.records.get(next);
        let gap = |before, cause| Some(Err(Gap { after: self.after, before, cause }));
        let taken = match next {
            // The lost records may include some that this reader has read, so a new epoch is reported even if no record follows.
            _ if self.after.epoch < state.tail.epoch => match next {
                Some(next)
                    if next.position.epoch == self.after.epoch && next.position == self.after.next() =>
                {
                    Some(Ok(next.clone()))
                }
                Some(next) => {
                    gap(Position { sequence: next.position.sequence - 1, ..next.position }, GapCause::Epoch)
                }
                None => gap(state.tail, GapCause::Epoch),
            },
            Some(next) if next.position != self.after.next() => {
                gap(Position { sequence: next.position.sequence - 1, ..next.position }, GapCause::Retention)
            }
            Some(next) => Some(Ok(next.clone())),
            None if state.dropped > self.after => gap(state.dropped, GapCause::Retention),
            None => None,
        };
        drop(state);
        match &taken {
            Some(Ok(record)) => self.after = record.position,
            Some(Err(gap)) => self.after = gap.before,
            None => {}
        }
        taken
    }
}

impl crate::Reader for Reader {
    async fn next(&mut self) -> Result<Result<Record, Gap>, Error> {
        loop {
            let delay = {
                let mut state = self.shared.lock();
                let within = state.faults.read_within;
                state.draw_below(within)
            };
            if !delay.is_zero() {
                sleep(delay).await;
            }
            let shared = self.shared.clone();
            let changed = shared.changed.notified(); // also what changes from now on
            if !shared.is_out()
                && let Some(taken) = self.take()
            {
                return Ok(taken);
            }
            changed.await;
        }
    }
}

/// Receives what is told to a node.
#[derive(Debug)]
pub struct Inbox(mpsc::Receiver<Bytes>);

impl crate::Inbox for Inbox {
    async fn next(&mut self) -> Option<Bytes> {
        self.0.recv().await
    }
}
