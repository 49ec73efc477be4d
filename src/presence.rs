//! Presence as a hub sees it: users, their metadata, who is in a group, and the changes of that.
//!
//! The engine's values with times of the calendar and metadata as JSON. Also the observer that passes changes on: to
//! the one task that calls a hub's `on_presence`, and to the streams of an application. Does not know hubs or clients.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use futures_util::stream::{self, Stream};
use serde::de::DeserializeOwned;
use serde::{Serialize, Serializer};
use shardcast_engine::{METADATA_BYTES_MAX, Position, PresenceKind, PresenceObserver};
use tokio::sync::{broadcast, mpsc};

use crate::clock::time_of;

/// Changes that wait for `on_presence`. Beyond it they wait in the engine, which merges them.
const HOOK_CHANGES_MAX: usize = 1024;
/// Changes that a stream keeps for a task that does not take them. Beyond it the oldest are lost.
const STREAM_CHANGES_MAX: usize = 1024;

/// What presence shows of a user besides the name: any value that serde can serialize, kept as JSON. Cloneable; clones
/// share the bytes. Serializes as the value.
#[derive(Clone, PartialEq, Eq)]
pub struct Metadata(Arc<[u8]>);

impl Metadata {
    pub(crate) fn new<T: Serialize + ?Sized>(value: &T) -> Result<Self, MetadataError> {
        let bytes = serde_json::to_vec(value).map_err(|error| MetadataError::Encode(error.into()))?;
        if bytes.len() > METADATA_BYTES_MAX {
            return Err(MetadataError::TooLong);
        }
        Ok(Self(bytes.into()))
    }

    /// What another node has told; none if that is no JSON, or too long.
    pub(crate) fn from_json(bytes: &[u8]) -> Option<Self> {
        let is_json = serde_json::from_slice::<serde::de::IgnoredAny>(bytes).is_ok();
        (is_json && bytes.len() <= METADATA_BYTES_MAX).then(|| Self(bytes.into()))
    }

    pub(crate) fn into_bytes(self) -> Arc<[u8]> {
        self.0
    }

    /// The value, as the type that it was made from or another that its JSON fits.
    ///
    /// # Errors
    /// [`MetadataError::Decode`] if it does not fit.
    pub fn get<T: DeserializeOwned>(&self) -> Result<T, MetadataError> {
        serde_json::from_slice(&self.0).map_err(|error| MetadataError::Decode(error.into()))
    }

    /// The value as JSON.
    pub fn as_json(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or("null") // written by `new`, as JSON
    }
}

impl fmt::Debug for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Metadata").field(&self.as_json()).finish()
    }
}

impl Serialize for Metadata {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let value: serde_json::Value = serde_json::from_slice(&self.0).map_err(serde::ser::Error::custom)?;
        value.serialize(serializer)
    }
}

/// A user's metadata was not accepted, or does not fit a type.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MetadataError {
    /// The value cannot be written as JSON, such as a map whose keys are not text.
    #[error("the metadata cannot be written as JSON")]
    Encode(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The metadata does not fit the type.
    #[error("the metadata does not fit the type")]
    Decode(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// As JSON it is longer than [`METADATA_BYTES_MAX`] (16 KiB).
    #[error("the metadata is longer than {METADATA_BYTES_MAX} bytes: keep less of it here")]
    TooLong,
}

/// A user who is in a group, or in a hub: see [`Clients::presence`](crate::Clients::presence).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Present {
    /// The user's name.
    pub user: Arc<str>,
    /// The user's connections that are members of the group. 0 when the last one has left and the user may still come
    /// back ([`presence_grace`](crate::WsHubConfig::presence_grace)).
    pub connections: usize,
    /// Since when the user has been in the group. Serialized as milliseconds since 1970, as JavaScript's `Date` takes.
    #[serde(serialize_with = "as_milliseconds")]
    pub since: SystemTime,
    /// The metadata that a connection of the user brought last, by joining the group or by
    /// [`set_metadata`](crate::MessageContext::set_metadata).
    pub metadata: Option<Metadata>,
}

impl From<shardcast_engine::Present> for Present {
    fn from(present: shardcast_engine::Present) -> Self {
        Self {
            user: present.user,
            connections: present.connections,
            since: time_of(present.since),
            metadata: present.metadata.map(Metadata),
        }
    }
}

/// A user has joined or left a group, or the hub: see [`WsHub::on_presence`](crate::WsHub::on_presence).
///
/// For one user and group, [`Joined`](PresenceKind::Joined) and [`Left`](PresenceKind::Left) alternate, beginning with
/// `Joined`, however the user's connections join and leave.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PresenceChange {
    /// The group. None for the hub: the user's first client has connected, or the last one has disconnected.
    pub group: Option<Arc<str>>,
    /// The user's name.
    pub user: Arc<str>,
    /// Whether the user has joined or left.
    pub kind: PresenceKind,
    /// Since when the user has been, or had been, present. Serialized as milliseconds since 1970.
    #[serde(serialize_with = "as_milliseconds")]
    pub since: SystemTime,
    /// The metadata that a connection of the user brought last.
    pub metadata: Option<Metadata>,
    /// Its position in the order of all published messages: after the join or the leave, and before everything that is
    /// published by anyone who has received it.
    pub position: Position,
}

impl From<shardcast_engine::PresenceChange> for PresenceChange {
    fn from(change: shardcast_engine::PresenceChange) -> Self {
        Self {
            group: change.group,
            user: change.user,
            kind: change.kind,
            since: time_of(change.since),
            metadata: change.metadata.map(Metadata),
            position: change.position,
        }
    }
}

fn as_milliseconds<S: Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    serializer.serialize_u64(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// What a stream of changes yields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PresenceEvent {
    /// A user has joined or left.
    Change(PresenceChange),
    /// The task took changes too slowly, and so many were lost: at most 1,024 are kept. What is known by the stream is
    /// out of date; ask for [`presence`](crate::Clients::presence) again.
    Gap {
        /// The number of lost changes.
        missed: u64,
    },
}

/// The changes of presence in a hub, in their order: see
/// [`Clients::presence_changes`](crate::Clients::presence_changes).
pub struct PresenceChanges(broadcast::Receiver<PresenceChange>);

impl PresenceChanges {
    /// The next change, or the number of those that were lost. None when the hub has ended. Cancel safe.
    pub async fn next(&mut self) -> Option<PresenceEvent> {
        match self.0.recv().await {
            Ok(change) => Some(PresenceEvent::Change(change)),
            Err(broadcast::error::RecvError::Lagged(missed)) => Some(PresenceEvent::Gap { missed }),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }

    /// The same as a stream, which ends with the hub.
    pub fn into_stream(self) -> impl Stream<Item = PresenceEvent> + Send + Unpin {
        Box::pin(stream::unfold(self, async |mut changes| Some((changes.next().await?, changes))))
    }
}

impl fmt::Debug for PresenceChanges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PresenceChanges").field("waiting", &self.0.len()).finish_non_exhaustive()
    }
}

/// The streams of one hub, made when the first is asked for.
#[derive(Debug, Clone, Default)]
pub(crate) struct Streams(Arc<OnceLock<broadcast::Sender<PresenceChange>>>);

impl Streams {
    pub(crate) fn subscribe(&self) -> PresenceChanges {
        let sender = self.0.get_or_init(|| broadcast::channel(STREAM_CHANGES_MAX).0);
        PresenceChanges(sender.subscribe())
    }
}

/// Passes the changes of one hub on, from a shard to tasks.
pub(crate) struct Observer {
    hook: mpsc::Sender<PresenceChange>,
    streams: Streams,
}

/// For the changes that wait for a task: at most 1,024.
pub(crate) fn changes() -> (mpsc::Sender<PresenceChange>, mpsc::Receiver<PresenceChange>) {
    mpsc::channel(HOOK_CHANGES_MAX)
}

/// The same for the changes of all nodes, which cannot wait elsewhere: a million. Beyond it they are lost.
pub(crate) fn all_changes() -> (mpsc::Sender<PresenceChange>, mpsc::Receiver<PresenceChange>) {
    mpsc::channel(1 << 20)
}

/// Passes the changes of all nodes on: each to streams, and to the task that calls the hook if this node has to.
pub(crate) fn pass_on(
    hook: mpsc::Sender<PresenceChange>,
    streams: Streams,
) -> Box<dyn Fn(PresenceChange, bool) + Send + Sync> {
    Box::new(move |change, is_ours| {
        streams.send(&change);
        if is_ours && let Err(mpsc::error::TrySendError::Full(_)) = hook.try_send(change) {
            tracing::error!("changes of presence are lost: `on_presence` is much too slow");
        }
    })
}

impl Observer {
    /// An observer that passes changes to the task that calls the hook, and to streams.
    pub(crate) fn new(hook: mpsc::Sender<PresenceChange>, streams: Streams) -> Self {
        Self { hook, streams }
    }
}

impl Streams {
    /// Passes a change to every stream.
    pub(crate) fn send(&self, change: &PresenceChange) {
        if let Some(streams) = self.0.get() {
            let _ = streams.send(change.clone()); // fails while nobody has a stream
        }
    }
}

impl PresenceObserver for Observer {
    fn room(&self) -> usize {
        // The task has ended with its runtime.
        if self.hook.is_closed() { usize::MAX } else { self.hook.capacity() }
    }

    fn on_change(&self, change: shardcast_engine::PresenceChange) {
        let change = PresenceChange::from(change);
        self.streams.send(&change);
        let _ = self.hook.try_send(change); // there is room, or the task has ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_is_any_value_and_serializes_as_that_value() {
        let metadata = Metadata::new(&("ada", 1.5, [true])).expect("JSON");
        assert_eq!(metadata.get::<(String, f64, [bool; 1])>().expect("fits"), ("ada".into(), 1.5, [true]));
        assert_eq!(serde_json::to_string(&metadata).expect("JSON"), metadata.as_json());
        assert!(matches!(metadata.get::<u8>(), Err(MetadataError::Decode(_))));
        let too_long = "a".repeat(METADATA_BYTES_MAX);
        assert!(matches!(Metadata::new(&too_long), Err(MetadataError::TooLong)));
        let no_json = std::collections::BTreeMap::from([((1, 2), 3)]);
        assert!(matches!(Metadata::new(&no_json), Err(MetadataError::Encode(_))));
    }
}
