//! A log in which every node's entries appear exactly once, although appends are repeated.
//!
//! On top of a [`Backplane`], which may append a record twice when the outcome of an attempt is not known. A node
//! appends its entries in numbered batches and retries each batch until the broker has acknowledged it. Readers skip the
//! duplicates; all nodes read the same records, so all of them skip the same ones. Only one batch is in flight at a time
//! (stop-and-wait), which keeps the order whatever fails. It costs little throughput, because the next batch takes all
//! entries that were queued meanwhile.
//!
//! A batch is kept until this node has read it back. After a [gap](Event::Gap) the node appends again every batch that it
//! has not read back, beginning with the oldest. So an entry whose append has returned was read once by its own node,
//! even if the broker has lost records that it had acknowledged.
//!
//! Owned by the publishers ([`ClusterLog`], any number of handles) and by one reader ([`Entries`]). With an entry a publisher
//! may give an *origin*, which stays on this node: its reader gets it with the entry. Does not know what entries contain,
//! nor which nodes exist.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::sleep;

use crate::batch::{self, Batch};
use crate::{Backplane, Error, Gap, NodeId, Position, Reader, Start};

/// Entries that wait to be appended, besides the limit on their bytes.
const QUEUE_MAX: usize = 65_536;

/// After a failed attempt to append.
const RETRY: Duration = Duration::from_millis(50);

/// How much a node keeps and sends at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterLogConfig {
    /// Bytes of entries in one record; a longer entry has a record of its own. Default: 64 KiB.
    pub batch_bytes_max: usize,
    /// Bytes of entries that wait to be appended or read back. Above it [`ClusterLog::append`] waits. Default: 16 MiB.
    pub queue_bytes_max: usize,
}

impl Default for ClusterLogConfig {
    fn default() -> Self {
        Self { batch_bytes_max: 64 << 10, queue_bytes_max: 16 << 20 }
    }
}

/// The position of an entry in the order of all entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EntryPosition {
    /// The record that contains it.
    pub record: Position,
    /// Its number in the record, from 0.
    pub index: u32,
}

/// What a reader gets. `O` is the type of this node's origins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<O = ()> {
    /// An entry, once.
    Entry {
        /// Its position.
        position: EntryPosition,
        /// The node that has appended it.
        node: NodeId,
        /// Its bytes.
        payload: Bytes,
        /// What this node's publisher gave with it; none if another node has appended it.
        origin: Option<O>,
    },
    /// This reader has missed entries. It has read none of the entries that follow.
    Gap(Gap),
    /// Batches of a node are missing although there was no gap: the broker does not keep its promises.
    Missing {
        /// The node whose batches they are.
        node: NodeId,
        /// How many.
        batches: u64,
    },
}

/// An entry was not appended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EntryError {
    /// The entry is longer than what the broker takes.
    #[error(
        "an entry of {len} bytes is longer than {max}, which is what the broker takes: publish it in parts, or raise its limit"
    )]
    TooLong {
        /// Its length in bytes.
        len: usize,
        /// The longest entry, in bytes.
        max: usize,
    },
    /// The broker refuses it.
    #[error(transparent)]
    Refused(Arc<Error>),
    /// [`Entries`] has been dropped: this node reads no more.
    #[error("this node has left the log")]
    Closed,
}

/// An entry was not appended, because it would have to wait or is impossible; the origin is given back.
#[derive(Debug, thiserror::Error)]
pub enum TryAppendError<O> {
    /// As many bytes or entries as are allowed wait to be appended or read back.
    #[error("too much waits to be appended: try again later")]
    Full(O),
    /// It will never be appended.
    #[error(transparent)]
    Entry(EntryError),
}

/// Appends entries to a log. A clone is another handle. `O` is the type of the origins.
#[derive(Debug)]
pub struct ClusterLog<O = ()> {
    node: NodeId,
    queue: mpsc::Sender<Queued<O>>,
    room: Arc<Semaphore>,
    entry_bytes_max: usize,
    queue_bytes_max: usize,
}

impl<O> Clone for ClusterLog<O> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone(), room: self.room.clone(), ..*self }
    }
}

/// An entry that is on its way: completes when this node has read it back.
#[derive(Debug)]
#[must_use = "it says whether the entry was appended"]
pub struct Appending(oneshot::Receiver<Result<EntryPosition, EntryError>>);

impl Future for Appending {
    type Output = Result<EntryPosition, EntryError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context).map(|told| told.unwrap_or(Err(EntryError::Closed)))
    }
}

/// An entry that waits to be appended.
#[derive(Debug)]
struct Queued<O> {
    payload: Bytes,
    waiter: Waiter<O>,
}

/// The publisher that waits for an entry, its origin, and the entry's share of the queue's bytes.
#[derive(Debug)]
struct Waiter<O> {
    told: oneshot::Sender<Result<EntryPosition, EntryError>>,
    origin: Option<O>,
    _room: OwnedSemaphorePermit,
}

/// Batches of this node that it has not read back, the oldest first.
#[derive(Debug)]
struct Outstanding<O> {
    batches: Mutex<Batches<O>>,
    /// There is something to append again.
    changed: Notify,
}

#[derive(Debug)]
struct Batches<O> {
    sent: VecDeque<Sent<O>>,
    /// How often that has happened. An acknowledgement of an append that began before the last time proves nothing.
    doubts: u64,
}

#[derive(Debug)]
struct Sent<O> {
    number: u64,
    record: Bytes,
    is_stored: bool,
    waiters: Vec<Waiter<O>>,
}

impl<O> Outstanding<O> {
    fn new() -> Self {
        let batches = Batches { sent: VecDeque::new(), doubts: 0 };
        Self { batches: Mutex::new(batches), changed: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Batches<O>> {
        self.batches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The oldest batch that is not known to be stored, and the number of doubts.
    fn next(&self) -> Option<(u64, Bytes, u64)> {
        let batches = self.lock();
        let next = batches.sent.iter().find(|sent| !sent.is_stored);
        next.map(|sent| (sent.number, sent.record.clone(), batches.doubts))
    }

    fn stored(&self, number: u64, doubts: u64) {
        let mut batches = self.lock();
        if batches.doubts == doubts
            && let Some(sent) = batches.sent.iter_mut().find(|sent| sent.number == number)
        {
            sent.is_stored = true;
        }
    }

    /// Removes the batch if it is the oldest, because it has been read back. Returns the waiters of its entries.
    fn read_back(&self, number: u64) -> Option<Vec<Waiter<O>>> {
        let mut batches = self.lock();
        let is_next = batches.sent.front().is_some_and(|sent| sent.number == number);
        is_next.then(|| batches.sent.pop_front()).flatten().map(|sent| sent.waiters)
    }

    /// Removes a batch that cannot be appended.
    fn refuse(&self, number: u64) -> Vec<Waiter<O>> {
        let mut batches = self.lock();
        let at = batches.sent.iter().position(|sent| sent.number == number);
        at.and_then(|at| batches.sent.remove(at)).map_or_else(Vec::new, |sent| sent.waiters)
    }

    /// It is no longer known which batches are stored.
    fn doubt(&self) {
        let mut batches = self.lock();
        batches.doubts += 1;
        batches.sent.iter_mut().for_each(|sent| sent.is_stored = false);
        drop(batches);
        self.changed.notify_one();
    }
}

impl<O: Send + 'static> ClusterLog<O> {
    /// Joins a log as the node `node`, and reads it from `start` on. Appends on the runtime from which it is called,
    /// until the last handle and [`Entries`] have been dropped.
    ///
    /// # Errors
    /// As for [`Backplane::read`].
    pub async fn join<B: Backplane>(
        backplane: B,
        node: NodeId,
        start: Start,
        config: ClusterLogConfig,
    ) -> Result<(Self, Entries<B::Reader, O>), Error> {
        let reader = backplane.read(start).await?;
        let (queue, queued) = mpsc::channel(QUEUE_MAX);
        let queue_bytes_max = config.queue_bytes_max.clamp(1, Semaphore::MAX_PERMITS.min(u32::MAX as usize));
        let outstanding = Arc::new(Outstanding::new());
        let log = Self {
            node,
            queue,
            room: Arc::new(Semaphore::new(queue_bytes_max)),
            entry_bytes_max: backplane.record_bytes_max().saturating_sub(batch::bytes_of(std::iter::once(0))),
            queue_bytes_max,
        };
        let (closed, is_closed) = oneshot::channel();
        let appender = Appender {
            backplane,
            node,
            batch_bytes_max: config.batch_bytes_max,
            queued,
            outstanding: outstanding.clone(),
            next_number: 1,
            left_over: None,
        };
        tokio::spawn(async move {
            tokio::select! {
                biased;
                _ = is_closed => {}
                () = appender.run() => {}
            }
        });
        let entries = Entries {
            node,
            reader,
            outstanding,
            last: HashMap::new(),
            has_gap: false,
            ready: VecDeque::new(),
            taken: None,
            _closed: closed,
        };
        Ok((log, entries))
    }

    /// This node's name.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// The longest entry, in bytes.
    pub fn entry_bytes_max(&self) -> usize {
        self.entry_bytes_max
    }

    /// Bytes of entries that wait to be appended or read back.
    pub fn queued_bytes(&self) -> usize {
        self.queue_bytes_max.saturating_sub(self.room.available_permits())
    }

    /// Appends an entry. Returns its position as soon as this node's [`Entries`] has returned the entry and is asked for
    /// the next event. Waits while the broker cannot be reached. If the call is dropped, the entry may or may not be
    /// appended.
    ///
    /// # Errors
    /// [`EntryError`].
    pub async fn append_from(&self, payload: Bytes, origin: O) -> Result<EntryPosition, EntryError> {
        self.enqueue_from(payload, origin).await?.await
    }

    /// Appends an entry, but waits only for room. It is on its way when this has returned; what is returned need not be
    /// awaited.
    ///
    /// # Errors
    /// As for [`append_from`](Self::append_from).
    pub async fn enqueue_from(&self, payload: Bytes, origin: O) -> Result<Appending, EntryError> {
        let bytes = self.bytes_of(&payload)?;
        let room = self.room.clone().acquire_many_owned(bytes).await.map_err(|_| EntryError::Closed)?;
        let (queued, appending) = Queued::new(payload, origin, room);
        self.queue.send(queued).await.map_err(|_| EntryError::Closed)?;
        Ok(appending)
    }

    /// Appends an entry without waiting for room. It is on its way when this has returned; what is returned need not be
    /// awaited.
    ///
    /// # Errors
    /// [`TryAppendError::Full`] while [`queue_bytes_max`](ClusterLogConfig::queue_bytes_max) bytes or 65,536 entries wait;
    /// otherwise as for [`append_from`](Self::append_from).
    pub fn try_append_from(&self, payload: Bytes, origin: O) -> Result<Appending, TryAppendError<O>> {
        let bytes = self.bytes_of(&payload).map_err(TryAppendError::Entry)?;
        let Ok(room) = self.room.clone().try_acquire_many_owned(bytes) else {
            return Err(TryAppendError::Full(origin));
        };
        let (queued, appending) = Queued::new(payload, origin, room);
        self.queue.try_send(queued).map_err(|refused| match refused {
            mpsc::error::TrySendError::Full(queued) => match queued.waiter.origin {
                Some(origin) => TryAppendError::Full(origin),
                None => TryAppendError::Entry(EntryError::Closed),
            },
            mpsc::error::TrySendError::Closed(_) => TryAppendError::Entry(EntryError::Closed),
        })?;
        Ok(appending)
    }

    /// How much of the queue's room an entry takes.
    fn bytes_of(&self, payload: &Bytes) -> Result<u32, EntryError> {
        let (len, max) = (payload.len(), self.entry_bytes_max);
        if len > max {
            return Err(EntryError::TooLong { len, max });
        }
        Ok(batch::entry_bytes(len).min(self.queue_bytes_max) as u32) // at most `u32::MAX`, see `join`
    }
}

impl ClusterLog {
    /// [`append_from`](Self::append_from) without an origin.
    ///
    /// # Errors
    /// [`EntryError`].
    pub async fn append(&self, payload: Bytes) -> Result<EntryPosition, EntryError> {
        self.append_from(payload, ()).await
    }
}

impl<O> Queued<O> {
    fn new(payload: Bytes, origin: O, room: OwnedSemaphorePermit) -> (Self, Appending) {
        let (told, outcome) = oneshot::channel();
        (Self { payload, waiter: Waiter { told, origin: Some(origin), _room: room } }, Appending(outcome))
    }
}

/// Appends what is queued, one batch after the other.
struct Appender<B, O> {
    backplane: B,
    node: NodeId,
    batch_bytes_max: usize,
    queued: mpsc::Receiver<Queued<O>>,
    outstanding: Arc<Outstanding<O>>,
    next_number: u64,
    /// An entry that no longer fitted into a batch.
    left_over: Option<Queued<O>>,
}

impl<B: Backplane, O> Appender<B, O> {
    /// Is ended with [`Entries`].
    async fn run(mut self) {
        let outstanding = self.outstanding.clone();
        loop {
            if let Some((number, record, doubts)) = outstanding.next() {
                self.append(number, record, doubts).await;
                continue;
            }
            tokio::select! {
                biased;
                () = outstanding.changed.notified() => {}
                has_more = self.gather() => if !has_more {
                    outstanding.changed.notified().await; // what has been appended may have to be again
                },
            }
        }
    }

    /// Makes a batch of what is queued; false if nothing will be queued any more. Loses nothing if it is dropped.
    async fn gather(&mut self) -> bool {
        if self.left_over.is_none() {
            self.left_over = self.queued.recv().await;
        }
        let Some(first) = self.left_over.take() else { return false };
        let mut bytes = batch::bytes_of(std::iter::once(first.payload.len()));
        let mut entries = vec![first];
        while let Ok(next) = self.queued.try_recv() {
            let more = batch::entry_bytes(next.payload.len());
            if bytes + more > self.batch_bytes_max {
                self.left_over = Some(next);
                break;
            }
            bytes += more;
            entries.push(next);
        }
        let number = self.next_number;
        self.next_number += 1;
        let record = Batch::encode(self.node, number, entries.iter().map(|queued| &queued.payload));
        let waiters = entries.into_iter().map(|queued| queued.waiter).collect();
        self.outstanding.lock().sent.push_back(Sent { number, record, is_stored: false, waiters });
        true
    }

    async fn append(&mut self, number: u64, record: Bytes, doubts: u64) {
        match self.backplane.append(record).await {
            Ok(()) => self.outstanding.stored(number, doubts),
            Err(failure) if failure.is_retryable() => {
                tracing::debug!(%failure, number, "a batch was not appended: trying again");
                sleep(RETRY).await;
            }
            Err(failure) => {
                tracing::error!(%failure, "the broker refuses a batch: its entries are not published");
                let failure = Arc::new(failure);
                for waiter in self.outstanding.refuse(number) {
                    let _ = waiter.told.send(Err(EntryError::Refused(failure.clone()))); // nobody may wait any more
                }
            }
        }
    }
}

/// Reads a log: every entry of every node, once.
#[derive(Debug)]
pub struct Entries<R, O = ()> {
    node: NodeId,
    reader: R,
    outstanding: Arc<Outstanding<O>>,
    /// The last batch of each other node.
    last: HashMap<NodeId, u64>,
    has_gap: bool,
    ready: VecDeque<(Event<O>, Option<Waiter<O>>)>,
    /// Who waits for the entry that was handed out last.
    taken: Option<(EntryPosition, Waiter<O>)>,
    /// Ends the appender.
    _closed: oneshot::Sender<()>,
}

impl<R: Reader, O> Entries<R, O> {
    /// The next event, as soon as there is one. With this call the one before it counts as ingested. May be dropped
    /// before it has completed, without losing an event.
    ///
    /// # Errors
    /// As for [`Reader::next`].
    pub async fn next(&mut self) -> Result<Event<O>, Error> {
        if let Some((position, waiter)) = self.taken.take() {
            let _ = waiter.told.send(Ok(position)); // nobody may wait any more
        }
        loop {
            if let Some((event, waiter)) = self.ready.pop_front() {
                if let (Event::Entry { position, .. }, Some(waiter)) = (&event, waiter) {
                    self.taken = Some((*position, waiter));
                }
                return Ok(event);
            }
            match self.reader.next().await? {
                Ok(record) => match Batch::decode(record.payload) {
                    Ok(batch) => self.take(record.position, batch),
                    Err(failure) => {
                        tracing::error!(position = %record.position, %failure, "a record of the log cannot be read: it is left out");
                    }
                },
                Err(gap) => {
                    self.has_gap = true;
                    self.outstanding.doubt();
                    return Ok(Event::Gap(gap));
                }
            }
        }
    }

    fn take(&mut self, position: Position, batch: Batch) {
        let Batch { node, number, entries } = batch;
        if node == self.node {
            // A batch that is not the oldest follows a gap; it is appended again, after the batches before it.
            if let Some(waiters) = self.outstanding.read_back(number) {
                self.hand_out(position, node, entries, waiters);
            }
            return;
        }
        if let Some(last) = self.last.get(&node).copied() {
            if number <= last {
                return; // a duplicate
            }
            // After a gap, missing batches are expected at any time: a duplicate may precede a batch that was lost.
            let missing = if self.has_gap { 0 } else { number - last - 1 };
            if missing > 0 {
                self.ready.push_back((Event::Missing { node, batches: missing }, None));
            }
        }
        self.last.insert(node, number);
        self.hand_out(position, node, entries, Vec::new());
    }

    fn hand_out(&mut self, position: Position, node: NodeId, entries: Vec<Bytes>, waiters: Vec<Waiter<O>>) {
        let waiters = waiters.into_iter().map(Some).chain(std::iter::repeat_with(|| None));
        for ((index, payload), mut waiter) in (0..).zip(entries).zip(waiters) {
            let position = EntryPosition { record: position, index };
            let origin = waiter.as_mut().and_then(|waiter| waiter.origin.take());
            self.ready.push_back((Event::Entry { position, node, payload, origin }, waiter));
        }
    }
}
