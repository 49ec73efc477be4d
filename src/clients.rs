//! The clients of a hub, and ways to reach some or all of them.
//!
//! Cloneable, usable from any thread or task. Encodes a message once, writes the frame header in
//! front of it and passes it to the engine; a target says who gets it, and every short form
//! (`broadcast`, `unicast`, …) is a name for a target. The codec is a function pointer here and not
//! a type parameter, because a codec has no state and a publisher need not name it. Knows
//! codecs and namespaces. Does not know hubs, handlers or sockets.

mod counts;

use std::any::TypeId;
use std::borrow::Cow;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock, Weak};
use std::task::{Context, Poll};
use std::time::SystemTime;

use axum::response::{IntoResponse, Response};
use http::StatusCode;
use shardcast_backplane::NodeId;
use shardcast_engine::{
    Address, CloseCode, ConfigError, ConnectionMetrics, Delivery, GROUP_NAME_BYTES_MAX, GroupMetrics,
    InvalidCloseCode, MessageKind, Namespace, Payload, Policy as BroadcastPolicy, Position, Publication,
    PublishError as EngineError, TryPublishError as TryEngineError,
};
use tokio::sync::mpsc;

use crate::address::{To, on_or_nobody, those_on};
use crate::backplane::{
    BackplaneError, Cluster, ClusterError, Command, Content, Hooks, HubLink, MissedMessages, Outgoing,
    Published, TrySent,
};
use crate::clock::instant_of;
use crate::codec::{CodecError, Encode};
use crate::connection_id::ConnectionId;
use crate::presence::{
    self, Metadata, MetadataError, Observer, PresenceChange, PresenceChanges, Present, Streams,
};
use crate::receipt::Receipt;

pub use counts::ThisNode;

/// The clients of one hub, which receive messages `M` in the hub's codec. Cloneable, and usable from any thread or
/// task.
///
/// With a [backplane](crate::Engine::backplane) these are the clients of all nodes: targets, ids, presence, counts. Metrics
/// are of this node ([the guide](crate::guide::nodes) has the list).
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
    /// The way to the clients of other nodes, with a backplane, and what the engine announces of presence on this one.
    link: Option<(HubLink, mpsc::Sender<PresenceChange>)>,
    /// Whether changes of presence are passed on: from when the first client with a user is served.
    is_observed: OnceLock<()>,
}

impl<M> Inner<M> {
    fn new<C: Encode<M>>(
        namespace: Namespace,
        link: Option<(HubLink, mpsc::Sender<PresenceChange>)>,
    ) -> Self {
        Self {
            namespace,
            encode: C::encode,
            codec: TypeId::of::<C>(),
            encode_failures: AtomicU64::new(0),
            streams: Streams::default(),
            link,
            is_observed: OnceLock::new(),
        }
    }
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
        f.debug_struct("Clients").field("connections", &self.namespace().len()).finish_non_exhaustive()
    }
}

impl<M> Clients<M> {
    pub(crate) fn new<C: Encode<M>>(namespace: Namespace) -> Self {
        Self { inner: Arc::new(Inner::new::<C>(namespace, None)) }
    }

    /// With the clients of the hub of this name on other nodes. `on_gap` is called when messages of others were missed.
    pub(crate) fn of_all_nodes<C: Encode<M>>(
        namespace: Namespace,
        cluster: &Cluster,
        name: &str,
        on_gap: impl Fn(&Self, MissedMessages) + Send + Sync + 'static,
        start: impl FnOnce(WeakClients<M>, mpsc::Receiver<PresenceChange>),
    ) -> Self
    where
        M: 'static,
    {
        let (hook, told) = presence::all_changes();
        let (changes, announced) = presence::changes();
        let link = cluster.link(name);
        namespace.track_changes();
        let inner = Arc::new(Inner::new::<C>(namespace, Some((link.clone(), changes))));
        let weak = || WeakClients(Arc::downgrade(&inner));
        start(weak(), told);
        let (clients, missing) = (weak(), weak());
        let hooks = Hooks {
            namespace: Arc::new(move || Some(clients.upgrade()?.inner.namespace.clone())),
            on_gap: Box::new(move |missed| {
                if let Some(clients) = missing.upgrade() {
                    on_gap(&clients, missed);
                }
            }),
            on_presence: presence::pass_on(hook, inner.streams.clone()),
        };
        link.begin(hooks, announced);
        Self { inner }
    }

    /// This node, if there are others.
    pub(crate) fn node(&self) -> Option<NodeId> {
        self.link().map(HubLink::node)
    }

    /// The id of a connection of this node as all nodes know it.
    pub(crate) fn id_of(&self, local: shardcast_engine::ConnectionId) -> ConnectionId {
        ConnectionId::new(self.node(), local)
    }

    /// What the engine of this node calls a connection; nobody if it has no such connection.
    fn local(&self, id: ConnectionId) -> shardcast_engine::ConnectionId {
        on_or_nobody(id, self.node())
    }

    /// The way to a connection of another node; none if it is of this one, or if there are no others.
    fn link_to(&self, id: ConnectionId) -> Option<&HubLink> {
        self.link().filter(|link| id.node() != Some(link.node()))
    }

    fn link(&self) -> Option<&HubLink> {
        self.inner.link.as_ref().map(|(link, _)| link)
    }

    /// Passes changes of presence on from now on, if they are not yet. `start` begins the task that gets them.
    pub(crate) fn observe_presence(
        &self,
        start: impl FnOnce(WeakClients<M>, mpsc::Receiver<PresenceChange>),
    ) {
        self.inner.is_observed.get_or_init(|| {
            let observer = match &self.inner.link {
                // Streams and the hook are for the changes of all nodes, which the log has.
                Some((_, changes)) => Observer::new(changes.clone(), Streams::default()),
                None => {
                    let (hook, changes) = presence::changes();
                    start(WeakClients(Arc::downgrade(&self.inner)), changes);
                    Observer::new(hook, self.inner.streams.clone())
                }
            };
            self.inner.namespace.observe_presence(observer);
        });
    }

    pub(crate) fn namespace(&self) -> &Namespace {
        &self.inner.namespace
    }

    /// Every client whose [`on_connected`](crate::WsHub::on_connected) has returned.
    pub fn to_all(&self) -> Target<'_, M> {
        self.to_many(Address::Everyone)
    }

    /// The members of a group. A group without members is no error: nobody gets the message.
    pub fn to_group(&self, group: &str) -> Target<'_, M> {
        self.to_many(Address::group(group))
    }

    /// The members of several groups, each client once.
    pub fn to_groups(&self, groups: &[&str]) -> Target<'_, M> {
        self.to_many(Address::groups(groups.iter().copied()))
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
        self.to_many(Address::user(user))
    }

    /// All clients of several users, each client once.
    pub fn to_users(&self, users: &[&str]) -> Target<'_, M> {
        self.to_many(Address::users(users.iter().copied()))
    }

    /// One client. If it has disconnected, nobody gets the message.
    pub fn to(&self, id: ConnectionId) -> Target<'_, M> {
        self.target(To::One(id))
    }

    fn to_many(&self, address: Address) -> Target<'_, M> {
        self.target(To::Many(address))
    }

    fn target(&self, to: To) -> Target<'_, M> {
        Target { clients: self, to, except: &[], delivery: Delivery::default(), is_local: false }
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
        self.join_all(id, &[group]).await
    }

    /// Makes a client a member of a group at a place in the order of all nodes' messages: no message that was published
    /// before this call, on whichever node, reaches the client by the group. [`join`](Self::join) promises that only for
    /// messages of this node, but takes no round trip to the broker. Without a [backplane](crate::Engine::backplane) both
    /// are the same.
    ///
    /// # Errors
    /// As for [`join`](Self::join), and [`PublishError::Backplane`] if the broker cannot be reached, whatever the
    /// [`OutagePolicy`](crate::backplane::OutagePolicy); the client may become a member later.
    pub async fn join_exactly(&self, id: ConnectionId, group: &str) -> Result<Position, PublishError> {
        match self.link() {
            None => self.join(id, group).await,
            Some(_) if group.len() > GROUP_NAME_BYTES_MAX => Err(PublishError::GroupNameTooLong),
            Some(link) => {
                link.command(id, Command::Join(vec![group])).await?;
                Ok(self.inner.namespace.position())
            }
        }
    }

    /// Ends a membership: messages that are published to the group from now on do not reach the client, earlier ones
    /// do.
    ///
    /// # Errors
    /// An engine that has ended, too many publishers that wait for a shard.
    pub async fn leave(&self, id: ConnectionId, group: &str) -> Result<(), PublishError> {
        self.leave_all(id, &[group]).await
    }

    /// Joins several groups in one step: no message comes between them.
    ///
    /// # Errors
    /// As for [`join`](Self::join); then none of them has been joined.
    pub async fn join_all(&self, id: ConnectionId, groups: &[&str]) -> Result<Position, PublishError> {
        if let Some(link) = self.link_to(id) {
            if groups.iter().any(|group| group.len() > GROUP_NAME_BYTES_MAX) {
                return Err(PublishError::GroupNameTooLong);
            }
            link.command(id, Command::Join(groups.to_vec())).await?;
            return Ok(self.inner.namespace.position());
        }
        Ok(self.inner.namespace.join_all(self.local(id), groups).await?)
    }

    /// Leaves several groups in one step: no message comes between them.
    ///
    /// # Errors
    /// An engine that has ended, too many publishers that wait for a shard.
    pub async fn leave_all(&self, id: ConnectionId, groups: &[&str]) -> Result<(), PublishError> {
        match self.link_to(id) {
            Some(link) => Ok(link.command(id, Command::Leave(groups.to_vec())).await?),
            None => Ok(self.inner.namespace.leave_all(self.local(id), groups).await?),
        }
    }

    /// The groups that a client is in, after everything that was sent before, in no particular order. None when it has
    /// disconnected; no groups while it is closing.
    ///
    /// # Errors
    /// An engine that has ended, too many publishers that wait for a shard.
    pub async fn groups_of(&self, id: ConnectionId) -> Result<Option<Vec<Arc<str>>>, PublishError> {
        if let Some(link) = self.link_to(id) {
            return Ok(link.groups_of(id).await?);
        }
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let answer = |groups| {
            let _ = sender.send(groups); // fails when nobody waits for the answer any more
        };
        self.inner.namespace.groups_of(self.local(id), answer).await?;
        Ok(receiver.await.ok())
    }

    /// Sets when a client's connection expires, instead of what was set before: see
    /// [`WsHub::on_expired`](crate::WsHub::on_expired). None takes it back. A time that has passed counts at once; later
    /// changes of the system's clock do not count. No effect for a client that has disconnected.
    ///
    /// # Errors
    /// An engine that has ended, too many publishers that wait for the client's shard.
    pub async fn expire_at(&self, id: ConnectionId, at: Option<SystemTime>) -> Result<(), PublishError> {
        if let Some(link) = self.link_to(id) {
            return Ok(link.command(id, Command::ExpireAt(at)).await?);
        }
        let namespace = &self.inner.namespace;
        let at = at.map(|at| instant_of(at, namespace.now()));
        Ok(namespace.expire_at(self.local(id), at).await?)
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
        self.inner.namespace.connection_metrics(self.local(id), answer).await?;
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
        let (sender, mut answer) = mpsc::unbounded_channel();
        let on_presence = move |present| {
            let _ = sender.send(present); // fails when nobody waits for the answer any more
        };
        self.inner.namespace.collect_presence(group, on_presence).await?;
        let present = answer.recv().await.ok_or(PublishError::Closed)?;
        let mut present = present.into_iter().map(Present::from).collect();
        if let Some(link) = self.link() {
            link.complete_state().await.add_others(link.node(), group, &mut present);
        }
        Ok(present)
    }

    /// How many users are present in a group: the length of the list that [`presence`](Self::presence) returns. Takes the
    /// same short time for any number.
    pub fn presence_len(&self, group: &str) -> usize {
        self.presence_len_in(Some(group))
    }

    /// How many users are present in the hub.
    pub fn presence_len_of_all(&self) -> usize {
        self.presence_len_in(None)
    }

    fn presence_len_in(&self, group: Option<&str>) -> usize {
        match self.link() {
            Some(link) => link.state().present_len(group),
            None => self.inner.namespace.presence_len(group),
        }
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
        async move {
            let metadata = metadata?.into_bytes();
            match self.link_to(id) {
                Some(link) => Ok(link.command(id, Command::SetMetadata(&metadata)).await?),
                None => Ok(self.inner.namespace.set_metadata(self.local(id), metadata).await?),
            }
        }
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
    to: To,
    except: &'a [ConnectionId],
    delivery: Delivery,
    /// Only the clients of this node.
    is_local: bool,
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

    /// Only the clients of this node, past the log that nodes share ([`Engine::backplane`](crate::Engine::backplane)):
    /// at once, and in an order that other nodes do not have. Without a backplane all clients are of this node.
    pub fn on_this_node(self) -> Self {
        Self { is_local: true, ..self }
    }

    /// The way to other nodes, if the target has clients there.
    fn link(&self) -> Option<&HubLink> {
        let link = self.clients.link()?;
        (!self.is_local && !self.to.is_only_on(Some(link.node()))).then_some(link)
    }

    /// What the engine of this node publishes.
    fn here(&self) -> Address {
        self.to.on(self.clients.node())
    }

    fn namespace(&self) -> &'a Namespace {
        &self.clients.inner.namespace
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
        let reason = reason.into();
        let close = Publication::close(self.here(), code, reason.clone())?;
        let close = close.except(&those_on(self.except, self.clients.node()));
        match self.link() {
            None => Ok(self.namespace().publish(close).await?),
            Some(link) => {
                let published = self.published(link, Content::Close { code, reason }, None);
                let outgoing = Outgoing::new(published, close);
                Ok(link.clone().publish(self.namespace().clone(), outgoing).await?)
            }
        }
    }

    /// The sums of the counters of the target's clients, taken after everything that was sent before: of a group's
    /// present members, and for [`to_all`](Clients::to_all) of clients that have disconnected, too. Every shard
    /// visits each of these connections, so ask every few seconds and not for every message.
    ///
    /// # Errors
    /// An engine that has ended, too many publishers that wait already.
    pub async fn metrics(&self) -> Result<GroupMetrics, PublishError> {
        let (sender, mut parts) = mpsc::unbounded_channel();
        let on_metrics = move |part| {
            let _ = sender.send(part); // fails when nobody waits for the answer any more
        };
        let except = those_on(self.except, self.clients.node());
        self.namespace().collect_metrics(&self.here(), &except, on_metrics).await?;
        let mut sum = GroupMetrics::default();
        while let Some(part) = parts.recv().await {
            sum += part;
        }
        Ok(sum)
    }

    /// The ids of the target's clients, on all nodes, after everything that was sent before, in no particular order. Every
    /// shard visits each of these connections.
    ///
    /// # Errors
    /// An engine that has ended, too many publishers that wait already; [`BackplaneError::Unavailable`] if not all nodes
    /// have answered in time.
    pub async fn members(&self) -> Result<Vec<ConnectionId>, PublishError> {
        let (sender, mut parts) = mpsc::unbounded_channel();
        let on_members = move |part| {
            let _ = sender.send(part); // fails when nobody waits for the answer any more
        };
        let mut members = match self.link() {
            Some(link) => link.members(&self.to).await?,
            None => Vec::new(),
        };
        self.namespace().collect_members(&self.here(), on_members).await?;
        while let Some(part) = parts.recv().await {
            members.extend(part.into_iter().map(|id| self.clients.id_of(id)));
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
        let publication = match self.link() {
            None => self.publication(payload),
            Some(link) => match link.try_publish(self.outgoing(link, payload, None)) {
                Ok(()) => return Ok(()),
                Err(TrySent::Full) => return Err(TryPublishError::Full(message.clone())),
                Err(TrySent::Failed(error)) => return Err(TryPublishError::Backplane(error)),
                Err(TrySent::Alone(alone)) => alone,
            },
        };
        self.namespace().try_publish(publication).map_err(|error| match error {
            TryEngineError::Full(_) => TryPublishError::Full(message.clone()),
            TryEngineError::TooLong(_) => TryPublishError::TooLong(message.clone()),
            _ => TryPublishError::Closed(message.clone()),
        })
    }

    fn publish_encoded(
        &self,
        payload: Result<Payload, CodecError>,
    ) -> impl Future<Output = Result<(), PublishError>> + Send + use<'a, M> {
        Publishing::new(payload.map(|payload| match self.link() {
            None => Submitted::Here(self.namespace().publish(self.publication(payload))),
            Some(link) => {
                let outgoing = self.outgoing(link, payload, None);
                Submitted::Everywhere(Box::pin(link.clone().publish(self.namespace().clone(), outgoing)))
            }
        }))
    }

    fn deliver_encoded(
        &self,
        payload: Result<Payload, CodecError>,
    ) -> impl Future<Output = Result<Receipt, PublishError>> + Send + use<'a, M> {
        Publishing::new(payload.map(|payload| match self.link() {
            None => Submitted::Here(self.namespace().deliver(self.publication(payload))),
            Some(link) => {
                let (receipt, expected) = link.expect_receipts();
                let outgoing = self.outgoing(link, payload, Some(receipt));
                let namespace = self.namespace().clone();
                Submitted::Everywhere(Box::pin(link.clone().deliver(namespace, outgoing, expected)))
            }
        }))
    }

    fn publication(&self, payload: Payload) -> Publication {
        let except = those_on(self.except, self.clients.node());
        Publication::message(self.here(), payload).except(&except).with_delivery(self.delivery)
    }

    fn outgoing(&self, link: &HubLink, payload: Payload, receipt: Option<u64>) -> Outgoing {
        let published = self.published(link, Content::of(&payload), receipt);
        Outgoing::new(published, self.publication(payload.clone()))
    }

    /// The same for all nodes.
    fn published<'b>(
        &'b self,
        link: &'b HubLink,
        content: Content<'b>,
        receipt: Option<u64>,
    ) -> Published<'b> {
        let (to, except, delivery) = (self.to.clone(), self.except.into(), self.delivery);
        Published { hub: link.name(), to, except, content, delivery, receipt }
    }
}

/// The future of a message, or the error of its codec. Written by hand, because a hub's method is as large as the futures
/// that it awaits.
enum Publishing<F, T> {
    Failed(Option<CodecError>),
    Submitted(Submitted<F, T>),
}

/// A message on its way.
enum Submitted<F, T> {
    /// To the clients of this node.
    Here(F),
    Everywhere(Pin<Box<dyn Future<Output = Result<T, ClusterError>> + Send>>),
}

impl<F, T> Publishing<F, T> {
    fn new(submitted: Result<Submitted<F, T>, CodecError>) -> Self {
        submitted.map_or_else(|error| Self::Failed(Some(error)), Self::Submitted)
    }
}

impl<U: Into<T>, T, F: Future<Output = Result<U, EngineError>> + Unpin> Future for Publishing<F, T> {
    type Output = Result<T, PublishError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut *self {
            Self::Submitted(Submitted::Here(submitted)) => {
                Pin::new(submitted).poll(context).map(|result| Ok(result?.into()))
            }
            Self::Submitted(Submitted::Everywhere(submitted)) => {
                submitted.as_mut().poll(context).map_err(PublishError::from)
            }
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
    /// The clients of other nodes could not be reached.
    #[error(transparent)]
    Backplane(#[from] BackplaneError),
}

/// With the error's text: 503 where the engine has ended or has no room, 400 for the name of a group that is too long, 500
/// for what else is wrong with the message.
impl IntoResponse for PublishError {
    fn into_response(self) -> Response {
        let status = match self {
            Self::Closed | Self::Overloaded | Self::Backplane(_) => StatusCode::SERVICE_UNAVAILABLE,
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

impl From<ClusterError> for PublishError {
    fn from(error: ClusterError) -> Self {
        match error {
            ClusterError::Engine(error) => error.into(),
            ClusterError::Backplane(error) => error.into(),
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
    /// The clients of other nodes cannot be reached.
    #[error(transparent)]
    Backplane(BackplaneError),
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

    /// The message that was not sent; none if it could not be encoded, or the backplane has failed.
    pub fn into_inner(self) -> Option<T> {
        match self {
            Self::Full(message) | Self::Closed(message) | Self::TooLong(message) => Some(message),
            Self::Encode(_) | Self::Backplane(_) => None,
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
            Self::Backplane(error) => f.debug_tuple("Backplane").field(error).finish(),
        }
    }
}
