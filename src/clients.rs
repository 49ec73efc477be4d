//! The clients of a hub, and ways to reach some or all of them.
//!
//! Cloneable, usable from any thread or task. Encodes a message once, writes the frame header in
//! front of it and passes it to the engine; a target says who gets it, and every short form
//! (`broadcast`, `unicast`, …) is a name for a target. The codec is a function pointer here and not
//! a type parameter, because a codec has no state and whoever publishes need not name it. Knows
//! codecs and namespaces. Does not know hubs, handlers or sockets.

use std::borrow::{Borrow, Cow};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use shardcast_engine::{
    CloseCode, ConnectionId, ConnectionMetrics, Frame, GroupMetrics, InvalidCloseCode, MessageKind,
    Namespace, Position, Receipt, SendError as EngineError, To, TrySendError as TryEngineError,
};

use crate::codec::{CodecError, Encode};
use crate::config::{BroadcastPolicy, ConfigError};

/// The clients of one hub, which receive messages `M` in the hub's codec. Cloneable, and usable from any thread or task.
///
/// ```no_run
/// # use shardcast::{Clients, ConnectionId};
/// # async fn example(clients: Clients<String>, id: ConnectionId) -> Result<(), shardcast::SendError> {
/// clients.to_all().publish("to everyone".to_owned()).await?;
/// clients.to(id).publish("to one".to_owned()).await?;
/// let receipt = clients.to_group("lobby").except(&[id]).send("to the others".to_owned()).await?;
/// println!("{} had to be waited for", receipt.waited);
/// # Ok(()) }
/// ```
pub struct Clients<M> {
    inner: Arc<Inner<M>>,
}

struct Inner<M> {
    namespace: Namespace,
    /// The hub's codec. Here and not in each handle, because every connection has one.
    encode: fn(&M, &mut Vec<u8>) -> Result<MessageKind, CodecError>,
    unencodable: AtomicU64,
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
        Self { inner: Arc::new(Inner { namespace, encode: C::encode, unencodable: AtomicU64::new(0) }) }
    }

    pub(crate) fn namespace(&self) -> &Namespace {
        &self.inner.namespace
    }

    /// Every client whose [`on_open`](crate::WsHub::on_open) has returned.
    pub fn to_all(&self) -> Target<'_, M> {
        self.target(To::Everyone)
    }

    /// The members of a group. A group without members is no error: nobody gets the message.
    pub fn to_group<'a>(&'a self, group: &'a str) -> Target<'a, M> {
        self.target(To::Group(group))
    }

    /// The members of several groups, each client once.
    pub fn to_groups<'a>(&'a self, groups: &'a [&'a str]) -> Target<'a, M> {
        self.target(To::Groups(groups))
    }

    /// One client. If it has gone, nobody gets the message.
    pub fn to(&self, id: ConnectionId) -> Target<'_, M> {
        self.target(To::Connection(id))
    }

    fn target<'a>(&'a self, to: To<'a>) -> Target<'a, M> {
        Target { clients: self, to, except: &[], policy: None }
    }

    /// Makes a client a member of a group. When this has returned, the next message to the group by anyone reaches
    /// it; earlier ones do not. Joining twice is joining once; a client that has gone joins nothing. One that is in
    /// [`max_groups`](crate::WsHubConfig::max_groups) groups already is ended (1008).
    ///
    /// Returns a place in the order of all messages that were published: each one behind it reaches the client; of those
    /// before, only some that were published during this call may.
    ///
    /// # Errors
    /// The engine has ended, too many wait for the client's shard, or the group's name is too long.
    pub async fn join(&self, id: ConnectionId, group: &str) -> Result<Position, SendError> {
        Ok(self.inner.namespace.join(id, group).await?)
    }

    /// Ends a membership: messages to the group after this do not reach the client, earlier ones do.
    ///
    /// # Errors
    /// As for [`join`](Self::join).
    pub async fn leave(&self, id: ConnectionId, group: &str) -> Result<(), SendError> {
        Ok(self.inner.namespace.leave(id, group).await?)
    }

    /// Ends a connection, after what was sent to it before, with a Close frame that carries `code` and at most
    /// 123 bytes of `reason`.
    ///
    /// # Errors
    /// A close code that cannot be sent, an engine that has ended, too many who wait for the client's shard.
    pub async fn disconnect(
        &self,
        id: ConnectionId,
        code: CloseCode,
        reason: impl Into<Cow<'static, str>>,
    ) -> Result<(), SendError> {
        self.to(id).disconnect(code, reason).await
    }

    /// What a connection has counted, after everything that was sent before; none if it has
    /// gone, its closing handshake included.
    ///
    /// # Errors
    /// As for [`join`](Self::join).
    pub async fn inspect(&self, id: ConnectionId) -> Result<Option<ConnectionMetrics>, SendError> {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let answer = |metrics| {
            let _ = sender.send(metrics); // who has stopped waiting does not want to know
        };
        self.inner.namespace.inspect(id, answer).await?;
        Ok(receiver.await.ok())
    }

    /// What all clients of the hub have counted together since the start, those that have gone included, after
    /// everything that was sent before. For a part of them: [`Target::metrics`].
    ///
    /// # Errors
    /// As for [`join`](Self::join).
    pub async fn metrics(&self) -> Result<GroupMetrics, SendError> {
        self.to_all().metrics().await
    }

    /// Clients connected now, those on their way to their shard included.
    pub fn len(&self) -> usize {
        self.inner.namespace.len()
    }

    /// Whether nobody is connected.
    pub fn is_empty(&self) -> bool {
        self.inner.namespace.is_empty()
    }

    /// Members of a group.
    pub fn group_len(&self, group: &str) -> usize {
        self.inner.namespace.group_len(group)
    }

    /// Groups that have members.
    pub fn groups(&self) -> usize {
        self.inner.namespace.groups()
    }

    /// Messages that could not be encoded, and reached nobody, since the start.
    pub fn unencodable(&self) -> u64 {
        self.inner.unencodable.load(Relaxed)
    }
}

/// Whom a message is for; see [`Clients`].
#[must_use = "nothing is sent before `publish`, `send` or `try_publish`"]
pub struct Target<'a, M> {
    clients: &'a Clients<M>,
    to: To<'a>,
    except: &'a [ConnectionId],
    policy: Option<BroadcastPolicy>,
}

impl<M> Clone for Target<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M> Copy for Target<'_, M> {}

impl<M> std::fmt::Debug for Target<'_, M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target").field("to", &self.to).field("except", &self.except).finish_non_exhaustive()
    }
}

impl<'a, M> Target<'a, M> {
    /// Leaves out these clients.
    pub fn except(self, except: &'a [ConnectionId]) -> Self {
        Self { except, ..self }
    }

    /// Ends the connections of the target, each after what was sent to it before, with a Close frame that carries
    /// `code` and at most 123 bytes of `reason`.
    ///
    /// # Errors
    /// A close code that cannot be sent, an engine that has ended, too many who wait already.
    pub async fn disconnect(
        &self,
        code: CloseCode,
        reason: impl Into<Cow<'static, str>>,
    ) -> Result<(), SendError> {
        Ok(self.clients.inner.namespace.close(self.to, self.except, code, reason).await?)
    }

    /// What the target's clients have counted together, after everything that was sent before: for groups their
    /// present members, for [`to_all`](Clients::to_all) also those that have gone. Costs each shard a look at each
    /// of them: for every few seconds, not for every message.
    ///
    /// # Errors
    /// An engine that has ended, too many who wait already.
    pub async fn metrics(&self) -> Result<GroupMetrics, SendError> {
        let (sender, mut parts) = tokio::sync::mpsc::unbounded_channel();
        let on_metrics = move |part| {
            let _ = sender.send(part); // who has stopped waiting does not want to know
        };
        self.clients.inner.namespace.survey(self.to, self.except, on_metrics).await?;
        let mut sum = GroupMetrics::default();
        while let Some(part) = parts.recv().await {
            sum += part;
        }
        Ok(sum)
    }

    /// Follows this policy instead of the hub's. A message to one client waits for room unless told otherwise here.
    pub fn policy(self, policy: BroadcastPolicy) -> Self {
        Self { policy: Some(policy), ..self }
    }
}

impl<M> Target<'_, M> {
    /// Sends the message. Ends when every client of the target has taken it or has gone; while none is behind,
    /// and under every policy but `Block`, that is as soon as the engine has it. What one task sends one after the
    /// other, every client gets in that order.
    ///
    /// Dropping this future, as `tokio::time::timeout` around it does, does not take the message back: once the engine
    /// has it, it is delivered, and sending it again sends it twice. To wait no longer than a certain time for slow
    /// clients, use a policy with a timeout.
    ///
    /// # Errors
    /// A message that cannot be encoded, an engine that has ended, too many who wait already.
    pub async fn publish(&self, message: impl Borrow<M> + Send) -> Result<(), SendError> {
        let frame = self.encode(message.borrow())?;
        drop(message);
        Ok(self.namespace()?.publish(self.to, self.except, frame).await?)
    }

    /// Like [`publish`](Self::publish), but always ends only when every client of the target has taken the message
    /// or has gone, and tells how many there were.
    ///
    /// # Errors
    /// As for `publish`.
    pub async fn send(&self, message: impl Borrow<M> + Send) -> Result<Receipt, SendError> {
        let frame = self.encode(message.borrow())?;
        drop(message);
        Ok(self.namespace()?.send(self.to, self.except, frame).await?)
    }

    /// Like [`publish`](Self::publish), but never waits: for code that is not async. A client that is behind gets the
    /// message when it has room.
    ///
    /// # Errors
    /// [`TrySendError::Full`] where `publish` would have waited for a shard; nobody has got the message then.
    pub fn try_publish(&self, message: impl Borrow<M>) -> Result<(), TrySendError> {
        let frame = self.encode(message.borrow())?;
        let sent = self.namespace()?.try_publish(self.to, self.except, frame);
        sent.map_err(|error| match error {
            TryEngineError::Full(_) => TrySendError::Full,
            TryEngineError::TooLong(_) => TrySendError::TooLong,
            _ => TrySendError::Closed,
        })
    }

    fn namespace(&self) -> Result<Cow<'_, Namespace>, ConfigError> {
        let namespace = &self.clients.inner.namespace;
        match self.policy {
            None => Ok(Cow::Borrowed(namespace)),
            Some(policy) => namespace.with_policy(policy).map(Cow::Owned),
        }
    }

    fn encode(&self, message: &M) -> Result<Frame, CodecError> {
        const PAYLOAD_BYTES_HINT: usize = 118; // with a header of up to 10 bytes: two cache lines
        let encoded = Frame::build(PAYLOAD_BYTES_HINT, |payload| {
            let header = payload.len();
            let kind = (self.clients.inner.encode)(message, payload)?;
            // Peers close on text that is not UTF-8; a codec that says text must mean it.
            if kind == MessageKind::Text {
                std::str::from_utf8(&payload[header..]).map_err(CodecError::encode)?;
            }
            Ok(kind)
        });
        encoded.inspect_err(|_| {
            self.clients.inner.unencodable.fetch_add(1, Relaxed);
        })
    }
}

/// A message was not sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// The codec could not encode it.
    #[error(transparent)]
    Encode(#[from] CodecError),
    /// The policy that was asked for is out of range.
    #[error(transparent)]
    Policy(#[from] ConfigError),
    /// The engine has ended.
    #[error("the engine has ended")]
    Closed,
    /// `publishers_waiting_max` others wait already.
    #[error("too many publishers wait for room already")]
    Overloaded,
    /// Encoded, it is longer than a frame can be (4 GiB − 1 B).
    #[error("the message is longer than 4 GiB: send it in parts")]
    TooLong,
    /// The name of the group to be joined is longer than [`GROUP_NAME_BYTES_MAX`](crate::GROUP_NAME_BYTES_MAX).
    #[error("the group's name is longer than {} bytes", shardcast_engine::GROUP_NAME_BYTES_MAX)]
    GroupNameTooLong,
    /// The close code may not stand in a Close frame. Nobody was disconnected.
    #[error(transparent)]
    InvalidCloseCode(#[from] InvalidCloseCode),
}

impl From<EngineError> for SendError {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Overloaded => Self::Overloaded,
            EngineError::TooLong => Self::TooLong,
            EngineError::GroupNameTooLong => Self::GroupNameTooLong,
            EngineError::InvalidCloseCode(error) => Self::InvalidCloseCode(error),
            _ => Self::Closed,
        }
    }
}

/// A message was not sent, and nobody waited.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrySendError {
    /// The codec could not encode it.
    #[error(transparent)]
    Encode(#[from] CodecError),
    /// The policy that was asked for is out of range.
    #[error(transparent)]
    Policy(#[from] ConfigError),
    /// The log (for one client: its shard's mailbox) is full.
    #[error("the log or the mailbox is full")]
    Full,
    /// The engine has ended.
    #[error("the engine has ended")]
    Closed,
    /// Encoded, it is longer than a frame can be (4 GiB − 1 B).
    #[error("the message is longer than 4 GiB: send it in parts")]
    TooLong,
}
