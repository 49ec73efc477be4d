//! A log in a NATS JetStream stream.
//!
//! One stream per log, read whole by an ordered push consumer of each node. A message's subject ends with the epoch in
//! which its node appended it; the epoch of a [`Position`] is the greatest seen so far. A new epoch begins with a message
//! without a record, the *mark*. The node that creates the stream appends it, and so does a node that detects a loss, on
//! condition that nothing else was appended meanwhile. Does not know what records contain.
//!
//! A crash of the server loses what it has not stored: with [`Storage::Memory`] everything, and the log restarts in a new
//! epoch; with [`Storage::File`] what was not synchronised (`sync_interval` in the server's
//! configuration, by default every two minutes against a loss of power).

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use async_nats::jetstream::consumer::DeliverPolicy;
use async_nats::jetstream::consumer::push::{Ordered, OrderedConfig};
use async_nats::jetstream::context::{CreateStreamErrorKind, GetStreamErrorKind, PublishErrorKind};
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::stream::{
    Config as StreamConfig, DiscardPolicy, Info, LastRawMessageErrorKind, StorageType,
};
use async_nats::jetstream::{Context, ErrorCode, Message};
use async_nats::{Client, ConnectOptions, Event, Subscriber};
use bytes::Bytes;
use futures_util::StreamExt;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::position::new_epoch;
use crate::{APPEND_TIMEOUT, Backplane, Connection, Error, Gap, GapCause, NodeId, Position, Record, Start};

/// Between two checks whether the server answers. The connection counts as lost after three without an answer: a server
/// that is frozen or cut off does not close it.
const PING: Duration = Duration::from_secs(1);

/// Between two attempts to make a consumer.
const RETRY: Duration = Duration::from_millis(100);

/// Of the server's limit on a message, the part that its headers and subject may take.
const OVERHEAD_BYTES: usize = 1024;

/// A message with this header is a mark.
const MARK: &str = "Shardcast-Mark";

/// How often a new epoch is attempted while others append.
const ATTEMPTS: usize = 100;

/// Where the log is, and how much of it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NatsConfig {
    /// The name of the stream. Nodes that share it share the log. Letters, digits, `-` and `_`. Default: `shardcast`.
    pub stream: String,
    /// Where the server keeps it. Default: in memory.
    pub storage: Storage,
    /// The number of servers that keep it, 1 to 5: 1 for a single server, 3 for a cluster. Default: 1.
    pub replicas: usize,
    /// For how long records are kept. A node that is away for longer has a [gap](Gap). Default: 5 minutes.
    pub max_age: Duration,
    /// How many bytes of records are kept. Default: 256 MiB.
    pub max_bytes: u64,
}

/// Where the server keeps the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Storage {
    /// Gone when the server, or a majority of its cluster, is restarted.
    #[default]
    Memory,
    /// Kept over restarts.
    File,
}

impl Default for NatsConfig {
    fn default() -> Self {
        Self {
            stream: "shardcast".to_owned(),
            storage: Storage::Memory,
            replicas: 1,
            max_age: Duration::from_secs(5 * 60),
            max_bytes: 256 << 20,
        }
    }
}

/// A log in a NATS JetStream stream.
#[derive(Clone)]
pub struct NatsBackplane {
    inner: Arc<Inner>,
}

struct Inner {
    client: Client,
    context: Context,
    config: NatsConfig,
    connection: watch::Sender<Connection>,
    /// How often the connection was made.
    connects: watch::Receiver<u64>,
    /// The epoch in which this node appends.
    epoch: AtomicU64,
}

impl std::fmt::Debug for NatsBackplane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NatsBackplane").field("config", &self.inner.config).finish_non_exhaustive()
    }
}

impl NatsBackplane {
    /// Connects to `nats://host:port` (several, separated by commas, for a cluster), and makes the log if there is none.
    ///
    /// # Errors
    /// If the address is no address, the server cannot be reached or has no JetStream, or the stream exists with
    /// settings that a log cannot have.
    pub async fn connect(url: &str, config: NatsConfig) -> Result<Self, Error> {
        Self::connect_with(url, ConnectOptions::new(), config).await
    }

    /// The same with credentials, TLS and other options of the connection. Its callback for events, its timeouts and its
    /// ping interval are replaced.
    ///
    /// # Errors
    /// As for [`connect`](Self::connect).
    pub async fn connect_with(url: &str, options: ConnectOptions, config: NatsConfig) -> Result<Self, Error> {
        let (connection, connects) = (watch::Sender::new(Connection::Disconnected), watch::Sender::new(0));
        let (told, told_connects, made) = (connection.clone(), connects.clone(), connects.subscribe());
        let options = options.event_callback(move |event| {
            match event {
                Event::Connected => {
                    told_connects.send_modify(|connects| *connects += 1);
                    told.send_replace(Connection::Connected);
                }
                Event::Disconnected | Event::Closed => drop(told.send_replace(Connection::Disconnected)),
                _ => {}
            }
            std::future::ready(())
        });
        let options = options.connection_timeout(APPEND_TIMEOUT).request_timeout(Some(APPEND_TIMEOUT));
        let options = options.ping_interval(PING);
        let addresses: Vec<&str> = url.split(',').map(str::trim).collect();
        let client = options.connect(addresses).await.map_err(Error::unavailable)?;
        connection.send_replace(Connection::Connected);
        let mut context = async_nats::jetstream::new(client.clone());
        context.set_timeout(APPEND_TIMEOUT);
        let inner =
            Arc::new(Inner { client, context, config, connection, connects: made, epoch: AtomicU64::new(0) });
        inner.tail().await?;
        Ok(Self { inner })
    }
}

impl Inner {
    fn subjects(&self) -> String {
        format!("{}.log.*", self.config.stream)
    }

    fn subject(&self, epoch: u64) -> String {
        format!("{}.log.{epoch}", self.config.stream)
    }

    fn inbox(&self, node: NodeId) -> String {
        format!("{}.node.{node}", self.config.stream)
    }

    /// The stream's state; it is made if there is none.
    async fn open(&self) -> Result<Info, Error> {
        for _ in 0..ATTEMPTS {
            match self.context.get_stream(&self.config.stream).await {
                Ok(stream) => {
                    let info = stream.cached_info().clone();
                    self.check(&info.config)?;
                    return Ok(info);
                }
                Err(failure) => match failure.kind() {
                    GetStreamErrorKind::JetStream(cause)
                        if cause.error_code() == ErrorCode::STREAM_NOT_FOUND => {}
                    GetStreamErrorKind::EmptyName | GetStreamErrorKind::InvalidStreamName => {
                        let name = &self.config.stream;
                        return Err(Error::Config(format!("`{name}` cannot be the name of a stream")));
                    }
                    _ => return Err(Error::unavailable(failure)),
                },
            }
            match self.create().await? {
                Some(info) => return Ok(info),
                None => sleep(RETRY).await,
            }
        }
        Err(Error::unavailable("the stream changes all the time"))
    }

    /// Makes the stream. None if another node has made it at the same time, perhaps with other settings.
    async fn create(&self) -> Result<Option<Info>, Error> {
        let config = StreamConfig {
            name: self.config.stream.clone(),
            subjects: vec![self.subjects()],
            storage: match self.config.storage {
                Storage::Memory => StorageType::Memory,
                Storage::File => StorageType::File,
            },
            num_replicas: self.config.replicas,
            max_age: self.config.max_age,
            max_bytes: i64::try_from(self.config.max_bytes).unwrap_or(i64::MAX),
            discard: DiscardPolicy::Old,
            allow_direct: true,
            // Records say by themselves whether they were appended before.
            duplicate_window: self.config.max_age.min(Duration::from_secs(1)),
            ..StreamConfig::default()
        };
        match self.context.create_stream(config).await {
            Ok(stream) => Ok(Some(stream.cached_info().clone())),
            Err(failure) => Err(match failure.kind() {
                CreateStreamErrorKind::JetStream(cause)
                    if cause.error_code() == ErrorCode::STREAM_NAME_EXIST
                        || cause.error_code() == ErrorCode::STREAM_SUBJECT_OVERLAP
                            && self.context.get_stream(&self.config.stream).await.is_ok() =>
                {
                    return Ok(None);
                }
                CreateStreamErrorKind::TimedOut | CreateStreamErrorKind::JetStreamUnavailable => {
                    Error::unavailable(failure)
                }
                CreateStreamErrorKind::JetStream(cause) if cause.code() >= 500 => Error::unavailable(failure),
                _ => Error::refused(failure),
            }),
        }
    }

    /// Whether a stream that exists can carry a log.
    fn check(&self, found: &StreamConfig) -> Result<(), Error> {
        let wrong = |what: &str| {
            let name = &self.config.stream;
            Err(Error::Config(format!(
                "the stream `{name}` exists, but {what}: choose another name, or delete it"
            )))
        };
        if found.subjects != [self.subjects()] {
            return wrong(&format!(
                "its subjects are {:?} and not [\"{}\"]",
                found.subjects,
                self.subjects()
            ));
        }
        if found.discard != DiscardPolicy::Old {
            return wrong("it refuses messages when it is full");
        }
        if found.max_messages_per_subject > 0 {
            return wrong("it limits the messages of a subject");
        }
        Ok(())
    }

    /// The epoch of the last message; none if the stream has no message.
    async fn last_epoch(&self) -> Result<Option<Position>, Error> {
        let stream =
            self.context.get_stream_no_info(&self.config.stream).await.map_err(Error::unavailable)?;
        match stream.get_last_raw_message_by_subject(&self.subjects()).await {
            Ok(last) => {
                let at = Position { epoch: epoch_of(&last.subject)?, sequence: last.sequence };
                self.adopt(at.epoch);
                Ok(Some(at))
            }
            Err(failure) => match failure.kind() {
                LastRawMessageErrorKind::NoMessageFound => Ok(None),
                LastRawMessageErrorKind::JetStream(cause)
                    if cause.error_code() == ErrorCode::STREAM_NOT_FOUND =>
                {
                    Ok(None)
                }
                _ => Err(Error::unavailable(failure)),
            },
        }
    }

    fn adopt(&self, epoch: u64) {
        self.epoch.fetch_max(epoch, Relaxed); // Relaxed: readers take the greatest they have seen
    }

    fn epoch(&self) -> u64 {
        self.epoch.load(Relaxed) // Relaxed: as above
    }

    /// The last position, in a log that is made if there is none.
    async fn tail(&self) -> Result<Position, Error> {
        for _ in 0..ATTEMPTS {
            let info = self.open().await?;
            if info.state.messages == 0 {
                // Asked for a message of a stream that another node is just making, nats-server 2.9.10 crashes.
                self.begin_epoch(self.epoch(), info.state.last_sequence).await?;
            } else if let Some(last) = self.last_epoch().await? {
                return Ok(Position { epoch: last.epoch.max(self.epoch()), ..last });
            }
        }
        Err(Error::unavailable("the stream changes all the time"))
    }

    /// Appends the mark of a new epoch, unless something else has been appended after `last`. Whether it was, the next look
    /// at the stream says.
    async fn begin_epoch(&self, former: u64, last: u64) -> Result<(), Error> {
        let epoch = new_epoch(former);
        let mark = PublishMessage::build().header(MARK, "1").expected_last_sequence(last);
        let appended = match self.context.send_publish(self.subject(epoch), mark).await {
            Ok(acknowledgement) => acknowledgement.await.map(drop),
            Err(failure) => Err(failure),
        };
        match appended {
            Ok(()) => {
                self.adopt(epoch);
                Ok(())
            }
            Err(failure) => match failure.kind() {
                PublishErrorKind::WrongLastSequence => Ok(()),
                // Another node is just making it: nothing listens to its subjects yet.
                PublishErrorKind::StreamNotFound => {
                    sleep(RETRY).await;
                    Ok(())
                }
                _ => Err(Error::unavailable(failure)),
            },
        }
    }

    /// The last position after a loss in this epoch: in another epoch.
    async fn epoch_after(&self, former: u64) -> Result<Position, Error> {
        for _ in 0..ATTEMPTS {
            let last = self.tail().await?;
            if last.epoch > former {
                return Ok(last);
            }
            self.begin_epoch(former, last.sequence).await?;
        }
        Err(Error::unavailable("others append all the time"))
    }
}

impl Backplane for NatsBackplane {
    type Reader = Reader;
    type Inbox = Inbox;

    async fn append(&self, record: Bytes) -> Result<(), Error> {
        Error::check_length(record.len(), self.record_bytes_max())?;
        let inner = &self.inner;
        for is_first in [true, false] {
            let subject = inner.subject(inner.epoch());
            let appended = async {
                let message = PublishMessage::build().payload(record.clone());
                inner.context.send_publish(subject, message).await?.await
            };
            match appended.await {
                Ok(_) => return Ok(()),
                Err(failure) => match failure.kind() {
                    PublishErrorKind::StreamNotFound if is_first => drop(inner.tail().await?),
                    PublishErrorKind::MaxPayloadExceeded => {
                        return Err(Error::TooLong { len: record.len(), max: self.record_bytes_max() });
                    }
                    _ => return Err(Error::unavailable(failure)),
                },
            }
        }
        Err(Error::unavailable("the stream does not exist"))
    }

    async fn read(&self, start: Start) -> Result<Reader, Error> {
        let inner = &self.inner;
        let after = match start {
            Start::After(position) => position,
            Start::Tail => inner.tail().await?,
            Start::Oldest => {
                let last = inner.tail().await?;
                let first = inner.open().await?.state.first_sequence;
                Position { sequence: first.saturating_sub(1), epoch: last.epoch }
            }
        };
        let connects = inner.connects.clone();
        Ok(Reader { inner: inner.clone(), after, created: None, consumer: None, pending: None, connects })
    }

    async fn tail(&self) -> Result<Position, Error> {
        self.inner.tail().await
    }

    async fn tell(&self, node: NodeId, message: Bytes) -> Result<(), Error> {
        let sent = self.inner.client.publish(self.inner.inbox(node), message);
        match timeout(APPEND_TIMEOUT, sent).await {
            Ok(sent) => sent.map_err(Error::unavailable),
            Err(elapsed) => Err(Error::unavailable(elapsed)),
        }
    }

    async fn listen(&self, node: NodeId) -> Result<Inbox, Error> {
        let subscribed = self.inner.client.subscribe(self.inner.inbox(node)).await;
        let subscription = subscribed.map_err(Error::unavailable)?;
        // The server answers after it has noted the subscription.
        self.inner.tail().await?;
        Ok(Inbox(subscription))
    }

    fn connection(&self) -> watch::Receiver<Connection> {
        self.inner.connection.subscribe()
    }

    fn record_bytes_max(&self) -> usize {
        self.inner.client.server_info().max_payload.saturating_sub(OVERHEAD_BYTES)
    }
}

/// Reads a [`NatsBackplane`].
pub struct Reader {
    inner: Arc<Inner>,
    /// The last position that was read.
    after: Position,
    /// When the stream that is read was made, in nanoseconds since 1970.
    created: Option<i128>,
    consumer: Option<Ordered>,
    /// Comes after a gap that was told.
    pending: Option<Message>,
    connects: watch::Receiver<u64>,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("after", &self.after).finish_non_exhaustive()
    }
}

impl Reader {
    /// Makes a consumer, and finds out whether what was read is still there.
    async fn connect(&mut self) -> Result<Option<Result<Record, Gap>>, Error> {
        self.connects.mark_unchanged();
        let info = self.inner.open().await?;
        let created = info.created.unix_timestamp_nanos();
        let is_another = self.created.is_some_and(|known| known != created);
        if is_another || info.state.last_sequence < self.after.sequence {
            let last = self.inner.epoch_after(self.after.epoch).await?;
            // A new stream is read from its beginning; one that has lost its end, from what was appended since.
            let sequence =
                if is_another { info.state.first_sequence.saturating_sub(1) } else { last.sequence };
            self.created = Some(created);
            return Ok(self.pass(Position { epoch: last.epoch, sequence }));
        }
        self.created = Some(created);
        if let Some(dropped) =
            info.state.first_sequence.checked_sub(1).filter(|last| *last > self.after.sequence)
        {
            return Ok(self.pass(Position { sequence: dropped, ..self.after }));
        }
        let config = OrderedConfig {
            deliver_subject: self.inner.client.new_inbox(),
            deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: self.after.sequence + 1 },
            ..OrderedConfig::default()
        };
        let stream = self
            .inner
            .context
            .get_stream_no_info(&self.inner.config.stream)
            .await
            .map_err(Error::unavailable)?;
        let consumer = stream.create_consumer(config).await.map_err(Error::unavailable)?;
        self.consumer = Some(consumer.messages().await.map_err(Error::unavailable)?);
        Ok(None)
    }

    /// Continues after a position. Returns a gap if that skips records.
    fn pass(&mut self, before: Position) -> Option<Result<Record, Gap>> {
        let after = std::mem::replace(&mut self.after, before);
        let cause = if before.epoch == after.epoch { GapCause::Retention } else { GapCause::Epoch };
        (before != after).then_some(Err(Gap { after, before, cause }))
    }

    fn take(&mut self, message: Message) -> Result<Option<Result<Record, Gap>>, Error> {
        let sequence = message.info().map_err(Error::refused)?.stream_sequence;
        let epoch = epoch_of(&message.subject)?;
        self.inner.adopt(epoch);
        // A node that has not seen the mark yet appends in the former epoch.
        let position = Position { epoch: epoch.max(self.after.epoch), sequence };
        if message.headers.as_ref().is_some_and(|headers| headers.get(MARK).is_some()) {
            if position == self.after.next() {
                self.after = position; // reading began before the mark: nothing is lost
                return Ok(None);
            }
            return Ok(self.pass(position));
        }
        if let Some(gap) = self.pass(Position { sequence: sequence - 1, ..position }) {
            self.pending = Some(message);
            return Ok(Some(gap));
        }
        self.after = position;
        Ok(Some(Ok(Record { position, payload: message.message.payload })))
    }
}

impl crate::Reader for Reader {
    async fn next(&mut self) -> Result<Result<Record, Gap>, Error> {
        loop {
            if let Some(pending) = self.pending.take()
                && let Some(taken) = self.take(pending)?
            {
                return Ok(taken);
            }
            let Some(consumer) = &mut self.consumer else {
                match self.connect().await {
                    Ok(Some(gap)) => return Ok(gap),
                    Ok(None) => continue,
                    Err(failure) if failure.is_retryable() => sleep(RETRY).await,
                    Err(failure) => return Err(failure),
                }
                continue;
            };
            let received = tokio::select! {
                biased;
                // First, because the server may have lost records that were read.
                _ = self.connects.changed() => None,
                received = consumer.next() => received,
            };
            match received {
                Some(Ok(message)) => {
                    if let Some(taken) = self.take(message)? {
                        return Ok(taken);
                    }
                }
                Some(Err(failure)) => {
                    tracing::debug!(%failure, after = %self.after, "the log cannot be read: making another consumer");
                    self.consumer = None;
                }
                None => self.consumer = None,
            }
        }
    }
}

/// Receives what is told to a node.
#[derive(Debug)]
pub struct Inbox(Subscriber);

impl crate::Inbox for Inbox {
    async fn next(&mut self) -> Option<Bytes> {
        self.0.next().await.map(|message| message.payload)
    }
}

fn epoch_of(subject: &str) -> Result<u64, Error> {
    let epoch = subject.rsplit('.').next().and_then(|epoch| epoch.parse().ok());
    epoch.ok_or_else(|| Error::refused(format!("`{subject}` is not the subject of a record")))
}
