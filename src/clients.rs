//! The clients of a hub, and ways to reach some or all of them.
//!
//! Cloneable, usable from any thread or task. Encodes a message once, writes the frame header in
//! front of it and passes it to the engine; a target says who gets it, and every short form
//! (`broadcast`, `unicast`, …) is a name for a target. The codec is a function pointer here and not
//! a type parameter, because a codec has no state and a publisher need not name it. Knows
//! codecs and namespaces. Does not know hubs, handlers or sockets.

use std::any::TypeId;
use std::borrow::Cow;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

use axum::response::{IntoResponse, Response};
use http::StatusCode;
use shardcast_engine::{
    Address, CloseCode, ConfigError, ConnectionId, ConnectionMetrics, Delivery, GroupCount, GroupMetrics,
    InvalidCloseCode, MessageKind, Namespace, Payload, Policy as BroadcastPolicy, Position, Publication,
    PublishError as EngineError, Receipt, TryPublishError as TryEngineError,
};

use crate::codec::{CodecError, Encode};
use crate::presence::{Metadata, MetadataError, Observer, PresenceChange, PresenceChanges, Present, Streams};

/// The clients of one hub, which receive messages `M` in the hub's codec. Cloneable, and usable from any thread or
/// task.
///
/// ```no_run
/// # use shardcast::{Clients, ConnectionId};
/// # async fn example(clients: Clients<String>, id: ConnectionId) -> Result<(), shardcast::PublishError> {
/// clients.to_all().publish(&"to everyone".to_owned()).await?;
/// clients.to(id).publish(&"to one".to_owned()).await?;
/// let receipt = clients.to_group("lobby").except(&[id]).deliver(&"to the others".to_owned()).await?;
/// println!("{} clients, of which {} had to be waited for", receipt.recipients, receipt.delayed);
/// # Ok(()) }
/// ```
pub struct Clients<M> {
    inner: Arc<Inner<M>>,
}

struct Inner<M> {
    namespace: Namespace,
    /// The hub's codec. Here and not in each handle, because every connection has one.
    encode: fn(&M, &mut Vec<u8>) -> Result<MessageKind, CodecError>,
    /// Its type, by which messages that were prepared for another one are refused.
    codec: TypeId,
    encode_failures: AtomicU64,
    streams: Streams,
    /// Whether changes of presence are passed on: from when the first client with a user is served.
    is_observed: OnceLock<()>,
}

/// The clients of a hub, as the task that calls its `on_presence` keeps them: it must not keep them alive.
pub(crate) struct WeakClients<M>(Weak<Inner<M>>);

impl<M> WeakClients<M> {
    pub(crate) fn upgrade(&self) -> Option<Clients<M>> {
        Some(Clients { inner: self.0.upgrade()? })
    }
}

impl<M> Clone for Clients<M> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

impl<M> std::fmt::Debug for Clients<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Clients").field("connections", &self.len()).finish_non_exhaustive()
    }
}

impl<M> Clients<M> {
    pub(crate) fn new<C: Encode<M>>(namespace: Namespace) -> Self {
        let (encode, codec) = (C::encode, TypeId::of::<C>());
        let inner = Inner {
            namespace,
            encode,
            codec,
            encode_failures: AtomicU64::new(0),
            streams: Streams::default(),
            is_observed: OnceLock::new(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Passes changes of presence on from now on, if they are not yet. `start` begins the task that gets them.
    pub(crate) fn observe_presence(
        &self,
        start: impl FnOnce(WeakClients<M>, tokio::sync::mpsc::Receiver<PresenceChange>),
    ) {
        self.inner.is_observed.get_or_init(|| {
            let (observer, changes) = Observer::new(self.inner.streams.clone());
            self.inner.namespace.observe_presence(observer);
            start(WeakClients(Arc::downgrade(&self.inner)), changes);
        });
    }

    pub(crate) fn namespace(&self) -> &Namespace {
        &self.inner.namespace
    }

    /// Every client whose [`on_connected`](crate::WsHub::on_connected) has returned.
    pub fn to_all(&self) -> Target<'_, M> {
        self.target(Address::Everyone)
    }

    /// The members of a group. A group without members is no error: nobody gets the message.
    pub fn to_group(&self, group: &str) -> Target<'_, M> {
        self.target(Address::group(group))
    }

    /// The members of several groups, each client once.
    pub fn to_groups(&self, groups: &[&str]) -> Target<'_, M> {
        self.target(Address::groups(groups.iter().copied()))
    }

    /// All clients of a user: the clients that were [served](crate::Serve::user) with this name, on all devices and in
    /// all tabs, from when their [`on_connected`](crate::WsHub::on_connected) has returned. A user without clients is no
    /// error: nobody gets the message. A user and a group of the same name have nothing to do with each other.
    ///
    /// ```
    /// # use shardcast::{Clients, CloseCode, PublishError};
    /// # async fn example(clients: Clients<String>) -> Result<(), PublishError> {
    /// clients.to_user("ada").publish(&"your order was shipped".to_owned()).await?;
    /// clients.to_user("mallory").disconnect(CloseCode(4403), "banned").await?;
    /// # Ok(()) }
    /// ```
    pub fn to_user(&self, user: &str) -> Target<'_, M> {
        self.target(Address::user(user))
    }

    /// All clients of several users, each client once.
    pub fn to_users(&self, users: &[&str]) -> Target<'_, M> {
        self.target(Address::users(users.iter().copied()))
    }

    /// One client. If it has disconnected, nobody gets the message.
    pub fn to(&self, id: ConnectionId) -> Target<'_, M> {
        self.target(Address::Connection(id))
    }

    fn target(&self, to: Address) -> Target<'_, M> {
        Target { clients: self, to, except: &[], delivery: Delivery::default() }
    }

    /// Encodes a message once, to be sent to several targets: [`Target::publish_prepared`],
    /// [`deliver_prepared`](Target::deliver_prepared), [`try_publish_prepared`](Target::try_publish_prepared). It may
    /// be sent by every hub that has this codec.
    ///
    /// ```
    /// # use shardcast::{Clients, PublishError};
    /// # async fn example(clients: Clients<String>) -> Result<(), PublishError> {
    /// let goal = clients.prepare(&"2:1".to_owned())?;
    /// clients.to_group("match-7").publish_prepared(&goal).await?;
    /// clients.to_group("all-matches").publish_prepared(&goal).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// A message that cannot be encoded.
    pub fn prepare(&self, message: &M) -> Result<Prepared<M>, CodecError> {
        let payload = self.encode(message)?;
        Ok(Prepared { payload, codec: self.inner.codec, message: PhantomData })
    }

    fn encode(&self, message: &M) -> Result<Payload, CodecError> {
        const PAYLOAD_BYTES_HINT: usize = 118; // with a header of up to 10 bytes: two cache lines
        let encoded = Payload::build(PAYLOAD_BYTES_HINT, |payload| {
            let header = payload.len();
            let kind = (self.inner.encode)(message, payload)?;
            // Clients close on text that is not UTF-8, so a codec that says text is checked.
            if kind == MessageKind::Text && simdutf8::basic::from_utf8(&payload[header..]).is_err() {
                std::str::from_utf8(&payload[header..]).map_err(CodecError::encode)?; // says where
            }
            Ok(kind)
        });
        encoded.inspect_err(|_| {
            self.inner.encode_failures.fetch_add(1, Relaxed);
        })
    }

    /// The message's payload, unless these clients could not read it.
    fn payload_of(&self, message: &Prepared<M>) -> Result<Payload, CodecError> {
        if message.codec == self.inner.codec {
            return Ok(message.payload.clone());
        }
        self.inner.encode_failures.fetch_add(1, Relaxed);
        Err(CodecError::encode(
            "the message was prepared for another codec: prepare it with this hub's clients",
        ))
    }

    /// Makes a client a member of a group. When this has returned, the next message to the group by anyone reaches
    /// it; earlier ones do not. Joining twice has no further effect, and joining a client that has disconnected has
    /// none. A client that is in [`max_groups`](crate::WsHubConfig::max_groups) groups already is disconnected
    /// (1008).
    ///
    /// Returns a position in the order of all published messages: every message to the group after it reaches the
    /// client; of those before it, only messages that were published during this call may.
    ///
    /// # Errors
    /// An engine that has ended, too many publishers that wait for the client's shard, a group's name that is too long.
    pub async fn join(&self, id: ConnectionId, group: &str) -> Result<Position, PublishError> {
        Ok(self.inner.namespace.join(id, group).await?)
    }

    /// Ends a membership: messages that are published to the group from now on do not reach the client, earlier ones
    /// do.
    ///
    /// # Errors
    /// An engine that has ended, too many publishers that wait for a shard.
    pub async fn leave(&self, id: ConnectionId, group: &str) -> Result<(), PublishError> {
        Ok(self.inner.namespace.leave(id, group).await?)
    }

    /// Joins several groups in one step: no message comes between them.
    ///
    /// # Errors
    /// As for [`join`](Self::join); then none of them has been joined.
    pub async fn join_all(&self, id: ConnectionId, groups: &[&str]) -> Result<Position, PublishError> {
        Ok(self.inner.namespace.join_all(id, groups).await?)
    }

    /// Leaves several groups in one step: no message comes between them.
    ///
    /// # Errors
    /// An engine that has ended, too many publishers that wait for a shard.
    pub async fn leave_all(&self, id: ConnectionId, groups: &[&str]) -> Result<(), PublishError> {
        Ok(self.inner.namespace.leave_all(id, groups).await?)
    }

    /// The groups that a client is in, after everything that was sent before, in no particular order. None when it has
    /// disconnected; no groups while it is closing.
    ///
    /// # Errors
    /// An engine that has ended, too many publishers that wait for a shard.
    pub async fn groups_of(&self, id: ConnectionId) -> Result<Option<Vec<Arc<str>>>, PublishError> {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let answer = |groups| {
            let _ = sender.send(groups); // fails when nobody waits for the answer any more
        };
        self.inner.namespace.groups_of(id, answer).await?;
        Ok(receiver.await.ok())
    }

    /// Sets when a client's connection expires, instead of what was set before: see
    /// [`WsHub::on_expired`](crate::WsHub::on_expired). None takes it back. A time that has passed counts at once; later
    /// changes of the system's clock do not count. No effect for a client that has disconnected.
    ///
    /// # Errors
    /// An engine that has ended, too many publishers that wait for the client's shard.
    pub async fn expire_at(&self, id: ConnectionId, at: Option<SystemTime>) -> Result<(), PublishError> {
        let namespace = &self.inner.namespace;
        let at = at.map(|at| instant_of(at, namespace.now()));
        Ok(namespace.expire_at(id, at).await?)
    }

    /// Ends a connection, after what was sent to it before, with a Close frame that carries `code` and at most
    /// 123 bytes of `reason`.
    ///
    /// # Errors
    /// A close code that may not be sent, an engine that has ended, too many publishers that wait for the client's
    /// shard.
    pub async fn disconnect(
        &self,
        id: ConnectionId,
        code: CloseCode,
        reason: impl Into<Cow<'static, str>>,
    ) -> Result<(), PublishError> {
        self.to(id).disconnect(code, reason).await
    }

    /// The counters of a connection, taken after everything that was sent before. None when it has ended, its closing
    /// handshake included.
    ///
    /// # Errors
    /// An engine that has ended, too many publishers that wait for a shard.
    pub async fn connection_metrics(
        &self,
        id: ConnectionId,
    ) -> Result<Option<ConnectionMetrics>, PublishError> {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let answer = |metrics| {
            let _ = sender.send(metrics); // fails when nobody waits for the answer any more
        };
        self.inner.namespace.connection_metrics(id, answer).await?;
        Ok(receiver.await.ok())
    }

    /// The sums of the counters of all clients since the hub was made, those that have disconnected included, taken
    /// after everything that was sent before. For some of the clients: [`Target::metrics`].
    ///
    /// # Errors
    /// An engine that has ended, too many publishers that wait for a shard.
    pub async fn metrics(&self) -> Result<GroupMetrics, PublishError> {
        self.to_all().metrics().await
    }

    /// How many clients are connected, those on their way to their shard included.
    pub fn len(&self) -> usize {
        self.inner.namespace.len()
    }

    /// Whether no client is connected.
    pub fn is_empty(&self) -> bool {
        self.inner.namespace.is_empty()
    }

    /// How many members a group has.
    pub fn group_len(&self, group: &str) -> usize {
        self.inner.namespace.group_len(group)
    }

    /// The groups that have members, each with the number of connections and of users, in no particular order. Groups
    /// that appear or disappear during the call may be missing.
    pub fn groups(&self) -> Vec<GroupCount> {
        self.inner.namespace.groups()
    }

    /// How many groups have members.
    pub fn group_count(&self) -> usize {
        self.inner.namespace.group_count()
    }

    /// The users who are present in a group, each once, in no particular order: at one moment, after everything that was
    /// sent and every join and leave that was awaited before this call.
    ///
    /// A user is in the list from when the first of its clients has joined the group until
    /// [`Left`](crate::PresenceKind::Left) is announced. So a client that gets this list and every change that
    /// [`on_presence`](crate::WsHub::on_presence) sends to the group is up to date, if it joins before it asks for the
    /// list, applies changes that arrive before the list after it, and ignores a `Joined` of a user whom it knows
    /// already and a `Left` of one whom it does not know. The list of all users takes about 50 ns for each, and joins of
    /// the group wait meanwhile; for the number alone, use [`presence_len`](Self::presence_len).
    ///
    /// ```
    /// # use shardcast::{Clients, PublishError};
    /// # async fn example(clients: Clients<String>) -> Result<(), PublishError> {
    /// for present in clients.presence("room").await? {
    ///     println!("{} on {} devices", present.user, present.connections);
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// An engine that has ended, too many publishers that wait for a shard.
    pub async fn presence(&self, group: &str) -> Result<Vec<Present>, PublishError> {
        self.presence_in(Some(group)).await
    }

    /// The users who are present in the hub, as [`presence`](Self::presence) lists those in a group.
    ///
    /// # Errors
    /// As for [`presence`](Self::presence).
    pub async fn presence_of_all(&self) -> Result<Vec<Present>, PublishError> {
        self.presence_in(None).await
    }

    async fn presence_in(&self, group: Option<&str>) -> Result<Vec<Present>, PublishError> {
        let (sender, mut answer) = tokio::sync::mpsc::unbounded_channel();
        let on_presence = move |present| {
            let _ = sender.send(present); // fails when nobody waits for the answer any more
        };
        self.inner.namespace.collect_presence(group, on_presence).await?;
        let present = answer.recv().await.ok_or(PublishError::Closed)?;
        Ok(present.into_iter().map(Present::from).collect())
    }

    /// How many users are present in a group: the length of the list that [`presence`](Self::presence) returns. Takes the
    /// same short time for any number.
    pub fn presence_len(&self, group: &str) -> usize {
        self.inner.namespace.presence_len(Some(group))
    }

    /// How many users are present in the hub.
    pub fn presence_len_of_all(&self) -> usize {
        self.inner.namespace.presence_len(None)
    }

    /// How many clients a user has, those on their way to their shard included.
    pub fn user_len(&self, user: &str) -> usize {
        self.inner.namespace.user_len(user)
    }

    /// The users who have clients, each with how many, in no particular order. Users who appear or disappear during the
    /// call may be missing.
    pub fn users(&self) -> Vec<(Arc<str>, usize)> {
        self.inner.namespace.users()
    }

    /// How many users have clients.
    pub fn user_count(&self) -> usize {
        self.inner.namespace.user_count()
    }

    /// The changes of presence in all groups of the hub and in the hub itself, from now on, in their order. Any number of
    /// tasks may have a stream. A task that takes changes too slowly loses the oldest beyond 1,024, and its stream says
    /// how many. To begin with a complete state: take the stream first, then [`presence`](Self::presence), then apply the
    /// changes.
    pub fn presence_changes(&self) -> PresenceChanges {
        self.inner.streams.subscribe()
    }

    /// Changes the metadata of a client: the groups that it is in, and those that it joins later, show it for the client's
    /// user from now on. It replaces what other clients of the user have set there. No effect for a client without a user
    /// and for one that has disconnected.
    ///
    /// # Errors
    /// Metadata that is no JSON or longer than [`METADATA_BYTES_MAX`](crate::METADATA_BYTES_MAX), an engine that has
    /// ended, too many publishers that wait for the client's shard.
    pub fn set_metadata<'a, T: serde::Serialize + ?Sized>(
        &'a self,
        id: ConnectionId,
        metadata: &T,
    ) -> impl Future<Output = Result<(), PublishError>> + Send + use<'a, T, M> {
        let metadata = Metadata::new(metadata);
        let namespace = &self.inner.namespace;
        async move { Ok(namespace.set_metadata(id, metadata?.into_bytes()).await?) }
    }

    /// How many messages could not be encoded, and reached nobody, since the hub was made.
    pub fn encode_failures(&self) -> u64 {
        self.inner.encode_failures.load(Relaxed)
    }
}

/// The clients that a message is for; see [`Clients`].
#[must_use = "nothing is sent before `publish`, `deliver` or `try_publish`"]
pub struct Target<'a, M> {
    clients: &'a Clients<M>,
    to: Address,
    except: &'a [ConnectionId],
    delivery: Delivery,
}

impl<M> Clone for Target<'_, M> {
    fn clone(&self) -> Self {
        Self { to: self.to.clone(), ..*self }
    }
}

impl<M> std::fmt::Debug for Target<'_, M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target").field("to", &self.to).field("except", &self.except).finish_non_exhaustive()
    }
}

impl<'a, M> Target<'a, M> {
    /// The same target without these clients.
    pub fn except(self, except: &'a [ConnectionId]) -> Self {
        Self { except, ..self }
    }

    /// Ends the connections of the target, each after what was sent to it before, with a Close frame that carries
    /// `code` and at most 123 bytes of `reason`.
    ///
    /// # Errors
    /// A close code that may not be sent, an engine that has ended, too many publishers that wait already.
    pub async fn disconnect(
        &self,
        code: CloseCode,
        reason: impl Into<Cow<'static, str>>,
    ) -> Result<(), PublishError> {
        let publication = Publication::close(&self.to, code, reason)?.except(self.except);
        Ok(self.clients.inner.namespace.publish(publication).await?)
    }

    /// The sums of the counters of the target's clients, taken after everything that was sent before: of a group's
    /// present members, and for [`to_all`](Clients::to_all) of clients that have disconnected, too. Every shard
    /// visits each of these connections, so ask every few seconds and not for every message.
    ///
    /// # Errors
    /// An engine that has ended, too many publishers that wait already.
    pub async fn metrics(&self) -> Result<GroupMetrics, PublishError> {
        let (sender, mut parts) = tokio::sync::mpsc::unbounded_channel();
        let on_metrics = move |part| {
            let _ = sender.send(part); // fails when nobody waits for the answer any more
        };
        self.clients.inner.namespace.collect_metrics(&self.to, self.except, on_metrics).await?;
        let mut sum = GroupMetrics::default();
        while let Some(part) = parts.recv().await {
            sum += part;
        }
        Ok(sum)
    }

    /// The ids of the target's clients, after everything that was sent before, in no particular order. Every shard
    /// visits each of these connections.
    ///
    /// # Errors
    /// An engine that has ended, too many publishers that wait already.
    pub async fn members(&self) -> Result<Vec<ConnectionId>, PublishError> {
        let (sender, mut parts) = tokio::sync::mpsc::unbounded_channel();
        let on_members = move |part| {
            let _ = sender.send(part); // fails when nobody waits for the answer any more
        };
        self.clients.inner.namespace.collect_members(&self.to, on_members).await?;
        let mut members = Vec::new();
        while let Some(part) = parts.recv().await {
            members.extend(part);
        }
        members.retain(|id| !self.except.contains(id));
        Ok(members)
    }

    /// Sends under this policy instead of each connection's own. Without it a message to one client waits for room
    /// ([`Block`](BroadcastPolicy::Block)), whatever the hub's policy is.
    ///
    /// # Errors
    /// A setting of the policy that is out of range, by name.
    pub fn policy(self, policy: BroadcastPolicy) -> Result<Self, ConfigError> {
        Ok(Self { delivery: Delivery::with_policy(policy)?, ..self })
    }

    /// Sends the message. The future completes when every client of the target has accepted the message or has
    /// disconnected; while none of them is slow, and under every policy but [`Block`](BroadcastPolicy::Block), that
    /// is as soon as the engine has accepted it.
    ///
    /// The message is encoded by the call, and sent when the future is first polled: a future that is never polled
    /// sends nothing. What one task awaits in sequence, every client receives in that sequence.
    ///
    /// Dropping the future after it was polled, as `tokio::time::timeout` around it does, does not take the message
    /// back: the engine may have accepted it, and sending it again may send it twice. To limit the time for slow
    /// clients, use a policy with a timeout.
    ///
    /// # Errors
    /// A message that cannot be encoded or is too long, an engine that has ended, too many publishers that wait
    /// already.
    pub fn publish(&self, message: &M) -> impl Future<Output = Result<(), PublishError>> + Send + use<'a, M> {
        self.publish_encoded(self.clients.encode(message))
    }

    /// [`publish`](Self::publish) for a message that was encoded before.
    ///
    /// # Errors
    /// As for [`publish`](Self::publish); a message that was prepared for another codec is one that cannot be encoded.
    pub fn publish_prepared(
        &self,
        message: &Prepared<M>,
    ) -> impl Future<Output = Result<(), PublishError>> + Send + use<'a, M> {
        self.publish_encoded(self.clients.payload_of(message))
    }

    /// Sends the message as [`publish`](Self::publish) does, but the future completes only when every client of the
    /// target has accepted the message, has disconnected or had it dropped, under every policy. The receipt has the
    /// counts.
    ///
    /// # Errors
    /// As for [`publish`](Self::publish).
    pub fn deliver(
        &self,
        message: &M,
    ) -> impl Future<Output = Result<Receipt, PublishError>> + Send + use<'a, M> {
        self.deliver_encoded(self.clients.encode(message))
    }

    /// [`deliver`](Self::deliver) for a message that was encoded before.
    ///
    /// # Errors
    /// As for [`publish_prepared`](Self::publish_prepared).
    pub fn deliver_prepared(
        &self,
        message: &Prepared<M>,
    ) -> impl Future<Output = Result<Receipt, PublishError>> + Send + use<'a, M> {
        self.deliver_encoded(self.clients.payload_of(message))
    }

    /// Sends the message as [`publish`](Self::publish) does, but never waits: for code that is not async. A slow client
    /// gets the message when it has room.
    ///
    /// # Errors
    /// [`TryPublishError::Full`] if `publish` would have waited for a shard; no client gets the message then. The
    /// error has the encoded message, so that [`try_publish_prepared`](Self::try_publish_prepared) need not encode it
    /// again.
    pub fn try_publish(&self, message: &M) -> Result<(), TryPublishError<Prepared<M>>> {
        self.try_publish_prepared(&self.clients.prepare(message)?)
    }

    /// [`try_publish`](Self::try_publish) for a message that was encoded before.
    ///
    /// # Errors
    /// As for [`try_publish`](Self::try_publish), and [`TryPublishError::Encode`] for a message that was prepared for
    /// another codec.
    pub fn try_publish_prepared(&self, message: &Prepared<M>) -> Result<(), TryPublishError<Prepared<M>>> {
        let payload = self.clients.payload_of(message)?;
        let sent = self.clients.inner.namespace.try_publish(self.publication(payload));
        sent.map_err(|error| match error {
            TryEngineError::Full(_) => TryPublishError::Full(message.clone()),
            TryEngineError::TooLong(_) => TryPublishError::TooLong(message.clone()),
            _ => TryPublishError::Closed(message.clone()),
        })
    }

    fn publish_encoded(
        &self,
        payload: Result<Payload, CodecError>,
    ) -> impl Future<Output = Result<(), PublishError>> + Send + use<'a, M> {
        let namespace = &self.clients.inner.namespace;
        Publishing::new(payload.map(|payload| namespace.publish(self.publication(payload))))
    }

    fn deliver_encoded(
        &self,
        payload: Result<Payload, CodecError>,
    ) -> impl Future<Output = Result<Receipt, PublishError>> + Send + use<'a, M> {
        let namespace = &self.clients.inner.namespace;
        Publishing::new(payload.map(|payload| namespace.deliver(self.publication(payload))))
    }

    fn publication(&self, payload: Payload) -> Publication {
        Publication::message(&self.to, payload).except(self.except).with_delivery(self.delivery)
    }
}

/// A time of the system's clock on the engine's clock, by which it is `now`.
pub(crate) fn instant_of(time: SystemTime, now: Instant) -> Instant {
    /// For a time that no clock can say.
    const YEARS: Duration = Duration::from_secs(30 * 366 * 24 * 60 * 60);
    let left = time.duration_since(SystemTime::now()).unwrap_or_default().min(YEARS);
    now + left
}

/// The future of a message, or the error of its codec. Written by hand, because a hub's method is as large as the futures
/// that it awaits.
enum Publishing<F> {
    Failed(Option<CodecError>),
    Submitted(F),
}

impl<F> Publishing<F> {
    fn new(submitted: Result<F, CodecError>) -> Self {
        submitted.map_or_else(|error| Self::Failed(Some(error)), Self::Submitted)
    }
}

impl<T, F: Future<Output = Result<T, EngineError>> + Unpin> Future for Publishing<F> {
    type Output = Result<T, PublishError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut *self {
            Self::Submitted(submitted) => Pin::new(submitted).poll(context).map_err(PublishError::from),
            Self::Failed(error) => {
                Poll::Ready(Err(error.take().expect("it is not polled after it was ready").into()))
            }
        }
    }
}

/// A message that was encoded once, to be sent to several targets: see [`Clients::prepare`]. Cloneable; clones share
/// the bytes.
pub struct Prepared<M> {
    payload: Payload,
    codec: TypeId,
    message: PhantomData<fn(&M)>,
}

impl<M> Clone for Prepared<M> {
    fn clone(&self) -> Self {
        Self { payload: self.payload.clone(), ..*self }
    }
}

impl<M> std::fmt::Debug for Prepared<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prepared").field("payload", &self.payload).finish_non_exhaustive()
    }
}

/// A message was not sent, or a command (join, leave, disconnect, a question for metrics) was not carried out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PublishError {
    /// The codec could not encode the message.
    #[error(transparent)]
    Encode(#[from] CodecError),
    /// The engine has ended.
    #[error("the engine has ended: start another one")]
    Closed,
    /// [`publishers_waiting_max`](crate::EngineConfig::publishers_waiting_max) publishers wait already.
    #[error("too many publishers wait for room already: try again later, or raise `publishers_waiting_max`")]
    Overloaded,
    /// Encoded, the message is longer than 4 GiB less a frame header.
    #[error("the message is longer than 4 GiB: send it in parts")]
    TooLong,
    /// The name of the group is longer than [`GROUP_NAME_BYTES_MAX`](crate::GROUP_NAME_BYTES_MAX).
    #[error(
        "the group's name is longer than {} bytes: choose a shorter one",
        shardcast_engine::GROUP_NAME_BYTES_MAX
    )]
    GroupNameTooLong,
    /// The metadata cannot be written as JSON, or is too long.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// The close code may not be in a Close frame. Nobody was disconnected.
    #[error(transparent)]
    InvalidCloseCode(#[from] InvalidCloseCode),
}

/// With the error's text: 503 where the engine has ended or has no room, 400 for the name of a group that is too long, 500
/// for what else is wrong with the message.
impl IntoResponse for PublishError {
    fn into_response(self) -> Response {
        let status = match self {
            Self::Closed | Self::Overloaded => StatusCode::SERVICE_UNAVAILABLE,
            Self::GroupNameTooLong => StatusCode::BAD_REQUEST,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, self.to_string()).into_response()
    }
}

impl From<EngineError> for PublishError {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Overloaded => Self::Overloaded,
            EngineError::TooLong => Self::TooLong,
            EngineError::GroupNameTooLong => Self::GroupNameTooLong,
            EngineError::MetadataTooLong => Self::Metadata(MetadataError::TooLong),
            _ => Self::Closed,
        }
    }
}

/// A message was not sent, and nobody waited. `T` is the message, encoded: [`Prepared`].
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum TryPublishError<T> {
    /// The publication log (for one client: its shard's mailbox) is full. Nobody got the message.
    #[error("the publication log or a shard's mailbox is full: try again later")]
    Full(T),
    /// The engine has ended.
    #[error("the engine has ended: start another one")]
    Closed(T),
    /// Encoded, the message is longer than 4 GiB less a frame header.
    #[error("the message is longer than 4 GiB: send it in parts")]
    TooLong(T),
    /// The codec could not encode the message.
    #[error(transparent)]
    Encode(#[from] CodecError),
}

impl<T> TryPublishError<T> {
    /// Whether the same message may be accepted later.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Full(_))
    }

    /// Whether the engine has ended, so that no message will be accepted any more.
    pub fn is_closed(&self) -> bool {
        matches!(self, Self::Closed(_))
    }

    /// The message that was not sent; none if it could not be encoded.
    pub fn into_inner(self) -> Option<T> {
        match self {
            Self::Full(message) | Self::Closed(message) | Self::TooLong(message) => Some(message),
            Self::Encode(_) => None,
        }
    }
}

/// Without the message, which need not be `Debug`.
impl<T> std::fmt::Debug for TryPublishError<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Full(_) => f.write_str("Full(..)"),
            Self::Closed(_) => f.write_str("Closed(..)"),
            Self::TooLong(_) => f.write_str("TooLong(..)"),
            Self::Encode(error) => f.debug_tuple("Encode").field(error).finish(),
        }
    }
}
