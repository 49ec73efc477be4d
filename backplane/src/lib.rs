//! One ordered, replayable log for several nodes of [shardcast](https://docs.rs/shardcast).
//!
//! A *node* is a process with an engine. Nodes that share a [`Backplane`] append *records* to one log and read it back,
//! each its own records too, so that all of them see the same records in the same order. The log is kept by a broker
//! that exists already: [NATS JetStream](nats) (feature `nats`), [Redis Streams](redis) (feature `redis`, also Valkey),
//! or [memory] for tests, which can delay, duplicate and lose as a broker does.
//!
//! What a backplane promises, and what `tests/conformance.rs` checks for each of them:
//!
//! - **One order.** All readers see the same records at the same, consecutive [`Position`]s. A record follows every record
//!   whose append had returned before its own was called.
//! - **At least once.** A record whose [`append`](Backplane::append) has returned is in the log. If it has failed with an
//!   error that [is retryable](Error::is_retryable), the record may be in the log nevertheless, so a retry may append it
//!   twice: records must carry what is needed to recognise that.
//! - **Losses are reported.** A reader that cannot continue, because the broker has dropped or lost records, gets a
//!   [`Gap`] and then the records that are left. After the broker has lost records, no position is used a second time: the
//!   [epoch](Position::epoch) changes.
//! - **Readers survive outages.** A reader reconnects by itself, without a limit, and continues. An append fails within
//!   [`APPEND_TIMEOUT`].
//!
//! [`cluster_log`] adds *exactly once*: numbered batches of entries, retried until they are read back.
//!
//! It is a live bus with a short history, not a database: how much survives a crash of the broker depends on its storage.
//!
//! ```
//! use shardcast_backplane::{Backplane, Reader, Start, memory::MemoryLog};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), shardcast_backplane::Error> {
//! let log = MemoryLog::new();
//! let (here, there) = (log.backplane(), log.backplane()); // two nodes
//! let mut reader = there.read(Start::Tail).await?;
//! here.append("hello".into()).await?;
//! let record = reader.next().await?.expect("nothing was lost");
//! assert_eq!((record.position, &record.payload[..]), (there.tail().await?, &b"hello"[..]));
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

mod batch;
pub mod cluster_log;
mod error;
pub mod memory;
#[cfg(feature = "nats")]
pub mod nats;
mod node;
mod position;
#[cfg(feature = "redis")]
pub mod redis;

use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;

pub use cluster_log::{
    Appending, ClusterLog, ClusterLogConfig, Entries, EntryError, EntryPosition, Event, TryAppendError,
};
pub use error::Error;
pub use node::{InvalidNodeId, NodeId};
pub use position::Position;

/// The longest time until an [`append`](Backplane::append) that the broker does not answer fails.
pub const APPEND_TIMEOUT: Duration = Duration::from_secs(5);

/// A log that several nodes share. A clone is another handle to the same connection.
pub trait Backplane: Clone + Send + Sync + 'static {
    /// Reads the log.
    type Reader: Reader;
    /// Receives what other nodes [tell](Self::tell) this one.
    type Inbox: Inbox;

    /// Appends a record, and returns once the broker has stored it. Readers learn its position.
    ///
    /// Records whose calls are in progress at the same time may be appended in any order.
    ///
    /// # Errors
    /// A retryable error if the broker cannot be reached or does not answer within [`APPEND_TIMEOUT`]; the record may
    /// have been appended then. Others if the broker refuses the record: one longer than
    /// [`record_bytes_max`](Self::record_bytes_max), a missing permission, a log that has been configured otherwise.
    fn append(&self, record: Bytes) -> impl Future<Output = Result<(), Error>> + Send;

    /// A reader from there on.
    ///
    /// # Errors
    /// If the broker cannot be reached, or refuses. The reader waits for the end of later outages.
    fn read(&self, start: Start) -> impl Future<Output = Result<Self::Reader, Error>> + Send;

    /// The position of the last record; before the first record, one that precedes it.
    ///
    /// # Errors
    /// If the broker cannot be reached, or refuses.
    fn tail(&self) -> impl Future<Output = Result<Position, Error>> + Send;

    /// Sends a message to one node, outside of the log: without order, and lost if the node does not listen or the broker
    /// cannot be reached.
    ///
    /// # Errors
    /// If it is known that the message was not sent.
    fn tell(&self, node: NodeId, message: Bytes) -> impl Future<Output = Result<(), Error>> + Send;

    /// Receives what is told to this node from now on.
    ///
    /// # Errors
    /// If the broker cannot be reached, or refuses.
    fn listen(&self, node: NodeId) -> impl Future<Output = Result<Self::Inbox, Error>> + Send;

    /// Whether the broker can be reached, for readiness probes.
    fn connection(&self) -> watch::Receiver<Connection>;

    /// The longest record, in bytes.
    fn record_bytes_max(&self) -> usize;
}

/// Reads a log, record by record.
pub trait Reader: Send + 'static {
    /// The next record, as soon as it is appended, or the [`Gap`] before it. Reading continues after a gap.
    ///
    /// May be dropped before it has completed, without losing a record.
    ///
    /// # Errors
    /// One that is not retryable: reading again does not help. The reader waits while the broker cannot be reached.
    fn next(&mut self) -> impl Future<Output = Result<Result<Record, Gap>, Error>> + Send;
}

/// Receives what other nodes tell this one.
pub trait Inbox: Send + 'static {
    /// The next message. None if the backplane has been dropped. May be dropped before it has completed.
    fn next(&mut self) -> impl Future<Output = Option<Bytes>> + Send;
}

/// Where to begin to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// With the oldest record that the broker still has.
    Oldest,
    /// After this position. If records after it have been lost, a [`Gap`] comes first.
    After(Position),
    /// With the next record that is appended.
    Tail,
}

/// A record, as it was appended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Where it is in the log.
    pub position: Position,
    /// Its bytes.
    pub payload: Bytes,
}

/// Records that a reader has missed, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// The last position that it has read.
    pub after: Position,
    /// The next record has a position after this one.
    pub before: Position,
    /// Why.
    pub cause: GapCause,
}

/// Why records were lost for a reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GapCause {
    /// The broker has dropped them, because they were too old or too many: the reader was too slow or too long away.
    Retention,
    /// The broker has lost records, perhaps ones that this or another reader has read, and begun a new
    /// [epoch](Position::epoch). Positions of the former one mean nothing any more.
    Epoch,
}

/// Whether the broker can be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Connection {
    /// It answered last.
    Connected,
    /// The connection is lost, and being made again.
    Disconnected,
}
