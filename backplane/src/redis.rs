//! A log in a Redis stream; also on Valkey.
//!
//! One key. An entry's id is its [`Position`]: the epoch takes the place of the milliseconds, and Redis increments the
//! number, so Redis itself keeps ids ordered and consecutive. A new epoch begins with an entry without a record, the
//! *mark*. A node that detects a loss appends it with a script, which does nothing if another node was first. Needs Redis
//! 7.0 or any Valkey. Does not know what records contain.
//!
//! A crash of Redis loses what it has not stored (`appendonly`, `appendfsync`). If it loses everything, the log restarts
//! in a new epoch.

use std::num::NonZeroUsize;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use redis::aio::{ConnectionManager, ConnectionManagerConfig, MultiplexedConnection, PubSubStream};
use redis::streams::{StreamId, StreamRangeReply, StreamReadReply};
use redis::{AsyncConnectionConfig, Client, ErrorKind, RedisError, RetryMethod, Script, ServerErrorKind};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::position::new_epoch;
use crate::{APPEND_TIMEOUT, Backplane, Connection, Error, Gap, GapCause, NodeId, Position, Record, Start};

/// Records that a reader fetches at once.
const FETCH: usize = 256;

/// How long a reader waits at Redis for a record before it asks again.
const BLOCK: Duration = Duration::from_secs(5);

/// Between two checks whether Redis can be reached.
const PING: Duration = Duration::from_secs(1);

/// Between two attempts to reconnect.
const RETRY: Duration = Duration::from_millis(100);

/// The field of an entry that has a record.
const RECORD: &str = "r";

/// Redis accepts up to 512 MB, but a long record delays all others.
const RECORD_BYTES_MAX: usize = 1 << 20;

/// Appends the mark of a first epoch if there is no log. Returns the id of the last entry.
const OPEN: &str = r"
if redis.call('EXISTS', KEYS[1]) == 0 then
    redis.call('XADD', KEYS[1], ARGV[1] .. '-0', 'm', '')
end
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
return last[1][1]
";

/// Appends the mark of a new epoch unless another node has done so. Returns the id of the last entry.
const BEGIN_EPOCH: &str = r"
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
if string.match(last[1][1], '^(%d+)-') ~= ARGV[1] then
    return last[1][1]
end
return redis.call('XADD', KEYS[1], ARGV[2] .. '-0', 'm', '')
";

/// Where the log is, and how much of it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RedisConfig {
    /// The key of the stream. Nodes that share it share the log. Default: `shardcast`.
    pub key: String,
    /// How many records are kept at least; Redis drops older ones in blocks. A node that is away for longer has a
    /// [gap](Gap). Default: 100,000.
    pub records_max: NonZeroUsize,
}

impl Default for RedisConfig {
    fn default() -> Self {
        Self {
            key: "shardcast".to_owned(),
            records_max: NonZeroUsize::new(100_000).unwrap_or(NonZeroUsize::MIN),
        }
    }
}

/// A log in a Redis stream.
#[derive(Clone)]
pub struct RedisBackplane {
    inner: Arc<Inner>,
}

struct Inner {
    client: Client,
    config: RedisConfig,
    open: Script,
    begin_epoch: Script,
    /// For everything but reading, which blocks its connection.
    commands: ConnectionManager,
    connection: watch::Sender<Connection>,
    /// The epoch in which this node appends.
    epoch: AtomicU64,
}

impl std::fmt::Debug for RedisBackplane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RedisBackplane").field("config", &self.inner.config).finish_non_exhaustive()
    }
}

impl RedisBackplane {
    /// Connects to `redis://host:port` (or what else the crate `redis` understands), and makes the log if there is none.
    ///
    /// # Errors
    /// If the address is no address, or Redis cannot be reached.
    pub async fn connect(url: &str, config: RedisConfig) -> Result<Self, Error> {
        let client =
            Client::open(url).map_err(|error| Error::Config(format!("not an address of Redis: {error}")))?;
        let settings = ConnectionManagerConfig::new()
            .set_response_timeout(Some(APPEND_TIMEOUT))
            .set_connection_timeout(Some(APPEND_TIMEOUT))
            .set_max_delay(Duration::from_secs(1));
        let commands = client.get_connection_manager_lazy(settings).map_err(error)?;
        let inner = Arc::new(Inner {
            client,
            config,
            open: Script::new(OPEN),
            begin_epoch: Script::new(BEGIN_EPOCH),
            commands,
            connection: watch::Sender::new(Connection::Disconnected),
            epoch: AtomicU64::new(0),
        });
        match timeout(APPEND_TIMEOUT, inner.open(0)).await {
            Ok(opened) => opened?,
            Err(elapsed) => return Err(Error::unavailable(elapsed)),
        };
        tokio::spawn(watch_connection(Arc::downgrade(&inner)));
        Ok(Self { inner })
    }
}

/// Notes whether Redis can be reached, also while the node sends nothing. Ends with the backplane.
async fn watch_connection(inner: Weak<Inner>) {
    loop {
        sleep(PING).await;
        let Some(inner) = inner.upgrade() else { return };
        let mut commands = inner.commands.clone();
        let _ = inner.check(redis::cmd("PING").query_async::<String>(&mut commands).await);
    }
}

impl Inner {
    /// The last position, in a log that is made if there is none.
    async fn open(&self, former: u64) -> Result<Position, Error> {
        let epoch = new_epoch(former.max(self.epoch()));
        let mut call = self.open.key(&self.config.key);
        let last = call.arg(epoch).invoke_async(&mut self.commands.clone()).await;
        let last: String = self.check(last)?;
        self.adopt(&last)
    }

    /// The last position after a loss in this epoch: in another epoch.
    async fn begin_epoch(&self, former: u64) -> Result<Position, Error> {
        let mut call = self.begin_epoch.key(&self.config.key);
        call.arg(former).arg(new_epoch(former));
        let last: String = self.check(call.invoke_async(&mut self.commands.clone()).await)?;
        self.adopt(&last)
    }

    /// Notes the epoch of the last position.
    fn adopt(&self, last: &str) -> Result<Position, Error> {
        let last = position(last)?;
        self.epoch.fetch_max(last.epoch, Relaxed); // Relaxed: an epoch that has ended is refused by Redis
        Ok(last)
    }

    fn epoch(&self) -> u64 {
        self.epoch.load(Relaxed) // Relaxed: as above
    }

    /// Notes whether Redis can be reached.
    fn check<T>(&self, result: Result<T, RedisError>) -> Result<T, Error> {
        let result = result.map_err(error);
        self.note(match &result {
            Err(Error::Unavailable(_)) => Connection::Disconnected,
            _ => Connection::Connected,
        });
        result
    }

    fn note(&self, now: Connection) {
        self.connection.send_if_modified(|connection| std::mem::replace(connection, now) != now);
    }

    fn channel(&self, node: NodeId) -> String {
        format!("{}:node:{node}", self.config.key)
    }

    /// A connection of a reader's own.
    async fn connect_reader(&self) -> Result<MultiplexedConnection, Error> {
        let settings = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(APPEND_TIMEOUT))
            .set_response_timeout(Some(BLOCK + APPEND_TIMEOUT));
        self.check(self.client.get_multiplexed_async_connection_with_config(&settings).await)
    }
}

impl Backplane for RedisBackplane {
    type Reader = Reader;
    type Inbox = Inbox;

    async fn append(&self, record: Bytes) -> Result<(), Error> {
        Error::check_length(record.len(), RECORD_BYTES_MAX)?;
        let inner = &self.inner;
        // Two retries: the stream may have been deleted, and then another epoch may have begun.
        for _ in 0..3 {
            let epoch = inner.epoch();
            let mut add = redis::cmd("XADD");
            add.arg(&inner.config.key)
                .arg("NOMKSTREAM")
                .arg("MAXLEN")
                .arg("~")
                .arg(inner.config.records_max.get());
            add.arg(format!("{epoch}-*")).arg(RECORD).arg(&record[..]);
            let added: Result<Option<String>, _> = add.query_async(&mut inner.commands.clone()).await;
            match added {
                Ok(Some(_)) => {
                    inner.note(Connection::Connected);
                    return Ok(());
                }
                Ok(None) => {}
                Err(failure) if is_stale_epoch(&failure) => {}
                failed => inner.check(failed.map(drop))?,
            }
            inner.open(epoch).await?;
        }
        Err(Error::unavailable("the log changes all the time"))
    }

    async fn read(&self, start: Start) -> Result<Reader, Error> {
        let after = match start {
            Start::After(position) => position,
            Start::Tail => self.tail().await?,
            Start::Oldest => {
                let last = self.inner.open(0).await?;
                let mut oldest = redis::cmd("XRANGE");
                oldest.arg(&self.inner.config.key).arg("-").arg("+").arg("COUNT").arg(1);
                let oldest = oldest.query_async(&mut self.inner.commands.clone()).await;
                let oldest: StreamRangeReply = self.inner.check(oldest)?;
                oldest.ids.first().map_or(Ok(last), entry_before)?
            }
        };
        Ok(Reader { inner: self.inner.clone(), after, connection: None, fetched: Vec::new().into_iter() })
    }

    async fn tail(&self) -> Result<Position, Error> {
        self.inner.open(0).await
    }

    async fn tell(&self, node: NodeId, message: Bytes) -> Result<(), Error> {
        let mut publish = redis::cmd("PUBLISH");
        publish.arg(self.inner.channel(node)).arg(&message[..]);
        self.inner.check(publish.query_async(&mut self.inner.commands.clone()).await)
    }

    async fn listen(&self, node: NodeId) -> Result<Inbox, Error> {
        let mut inbox =
            Inbox { inner: self.inner.clone(), channel: self.inner.channel(node), messages: None };
        inbox.messages = Some(inbox.subscribe().await?);
        Ok(inbox)
    }

    fn connection(&self) -> watch::Receiver<Connection> {
        self.inner.connection.subscribe()
    }

    fn record_bytes_max(&self) -> usize {
        RECORD_BYTES_MAX
    }
}

/// Reads a [`RedisBackplane`].
pub struct Reader {
    inner: Arc<Inner>,
    /// The last position that was read.
    after: Position,
    connection: Option<MultiplexedConnection>,
    fetched: std::vec::IntoIter<StreamId>,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("after", &self.after).finish_non_exhaustive()
    }
}

impl Reader {
    /// The record or gap that an entry means; none for a mark without a gap.
    fn take(&mut self, entry: &StreamId) -> Result<Option<Result<Record, Gap>>, Error> {
        let position = position(&entry.id)?;
        self.inner.adopt(&entry.id)?;
        let Some(redis::Value::BulkString(payload)) = entry.map.get(RECORD) else {
            return Ok(self.pass(position)); // a mark
        };
        let before = Position { sequence: position.sequence.saturating_sub(1), ..position };
        if let Some(gap) = self.pass(before) {
            // The entry is fetched again.
            self.fetched = Vec::new().into_iter();
            return Ok(Some(gap));
        }
        self.after = position;
        Ok(Some(Ok(Record { position, payload: Bytes::copy_from_slice(payload) })))
    }

    /// Continues after a position. Returns a gap if that skips records.
    fn pass(&mut self, before: Position) -> Option<Result<Record, Gap>> {
        let after = std::mem::replace(&mut self.after, before);
        let cause = if before.epoch == after.epoch { GapCause::Retention } else { GapCause::Epoch };
        (before != after).then_some(Err(Gap { after, before, cause }))
    }

    /// Connects, and finds out whether what was read is still there.
    async fn connect(&mut self) -> Result<Option<Result<Record, Gap>>, Error> {
        let connection = self.inner.connect_reader().await?;
        let last = self.inner.open(self.after.epoch).await?;
        let gap = if last < self.after {
            let last = self.inner.begin_epoch(self.after.epoch).await?;
            self.pass(last)
        } else {
            None
        };
        self.connection = Some(connection);
        Ok(gap)
    }

    async fn fetch(&self, connection: &mut MultiplexedConnection) -> Result<Vec<StreamId>, Error> {
        let mut read = redis::cmd("XREAD");
        read.arg("COUNT").arg(FETCH).arg("BLOCK").arg(BLOCK.as_millis() as u64);
        read.arg("STREAMS").arg(&self.inner.config.key).arg(self.after.to_string());
        let reply: Option<StreamReadReply> = self.inner.check(read.query_async(connection).await)?;
        Ok(reply.into_iter().flat_map(|reply| reply.keys).flat_map(|key| key.ids).collect())
    }
}

impl crate::Reader for Reader {
    async fn next(&mut self) -> Result<Result<Record, Gap>, Error> {
        loop {
            while let Some(entry) = self.fetched.next() {
                if let Some(taken) = self.take(&entry)? {
                    return Ok(taken);
                }
            }
            let Some(mut connection) = self.connection.clone() else {
                match self.connect().await {
                    Ok(Some(gap)) => return Ok(gap),
                    Ok(None) => continue,
                    Err(failure) if failure.is_retryable() => sleep(RETRY).await,
                    Err(failure) => return Err(failure),
                }
                continue;
            };
            match self.fetch(&mut connection).await {
                Ok(fetched) => self.fetched = fetched.into_iter(),
                Err(failure) if failure.is_retryable() => {
                    tracing::debug!(%failure, after = %self.after, "the log cannot be read: reconnecting");
                    self.connection = None;
                }
                Err(failure) => return Err(failure),
            }
        }
    }
}

/// Receives what is told to a node.
pub struct Inbox {
    inner: Arc<Inner>,
    channel: String,
    messages: Option<PubSubStream>,
}

impl std::fmt::Debug for Inbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inbox").field("channel", &self.channel).finish_non_exhaustive()
    }
}

impl Inbox {
    async fn subscribe(&self) -> Result<PubSubStream, Error> {
        let connected = async {
            let mut subscription = self.inner.client.get_async_pubsub().await?;
            subscription.subscribe(&self.channel).await?;
            Ok(subscription.into_on_message())
        };
        match timeout(APPEND_TIMEOUT, connected).await {
            Ok(result) => self.inner.check(result),
            Err(elapsed) => Err(Error::unavailable(elapsed)),
        }
    }
}

impl crate::Inbox for Inbox {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            match &mut self.messages {
                Some(messages) => match messages.next().await {
                    Some(message) => return Some(Bytes::copy_from_slice(message.get_payload_bytes())),
                    None => self.messages = None,
                },
                None => match self.subscribe().await {
                    Ok(messages) => self.messages = Some(messages),
                    Err(_) => sleep(RETRY).await,
                },
            }
        }
    }
}

/// The position that an id means.
fn position(id: &str) -> Result<Position, Error> {
    let parts = id.split_once('-').and_then(|(epoch, sequence)| {
        Some(Position { epoch: epoch.parse().ok()?, sequence: sequence.parse().ok()? })
    });
    parts.ok_or_else(|| Error::refused(format!("`{id}` is not the id of an entry")))
}

/// The position from which an entry is the next one.
fn entry_before(entry: &StreamId) -> Result<Position, Error> {
    let position = position(&entry.id)?;
    let is_mark = !entry.map.contains_key(RECORD);
    Ok(Position { sequence: position.sequence - u64::from(!is_mark && position.sequence > 0), ..position })
}

/// Redis has refused an id because the last entry's is greater.
fn is_stale_epoch(failure: &RedisError) -> bool {
    failure.kind() == ErrorKind::Server(ServerErrorKind::ResponseError)
        && failure.detail().is_some_and(|detail| detail.contains("equal or smaller"))
}

fn error(failure: RedisError) -> Error {
    let is_transient = match failure.kind() {
        ErrorKind::Io | ErrorKind::Parse | ErrorKind::ClusterConnectionNotFound => true,
        // Without a code of its own in the crate.
        _ if matches!(
            failure.code(),
            Some("LOADING" | "BUSY" | "MASTERDOWN" | "READONLY" | "OOM" | "NOREPLICAS")
        ) =>
        {
            true
        }
        _ => !matches!(failure.retry_method(), RetryMethod::NoRetry | RetryMethod::Reconnect),
    };
    if is_transient { Error::unavailable(failure) } else { Error::refused(failure) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_a_position() {
        let at = Position { epoch: 1_700_000_000_000, sequence: 7 };
        assert_eq!(position("1700000000000-7").ok(), Some(at));
        assert_eq!(position(&at.to_string()).ok(), Some(at));
        for wrong in ["", "1", "1-", "-1", "a-1", "1-b", "1-2-3"] {
            assert!(matches!(position(wrong), Err(Error::Refused(_))), "{wrong}");
        }
    }
}
