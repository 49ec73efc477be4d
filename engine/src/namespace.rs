//! A namespace: connections that can be addressed together, and their groups.
//!
//! The handle through which everything is published. Cloneable, usable from any thread and any task. Does not
//! know how publications reach the shards (`publisher.rs`), sockets, or what payloads mean.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use smallvec::SmallVec;

use crate::admission::ConnectionPermit;
use crate::changes::NamespaceChange;
use crate::close_code::CloseCode;
use crate::close_reason::CloseReason;
use crate::command::{Action, Adoption, Answer, Command, FirstMessage, Query};
use crate::config::{ConfigError, ConnectionConfig, UserLimit};
use crate::directory::{Kind, PendingJoin};
use crate::engine_core::EngineCore;
use crate::entry::Named;
use crate::frame::ControlFrame;
use crate::handler::{Control, MakeHandler};
use crate::id::ConnectionId;
use crate::metrics::{ConnectionMetrics, GroupMetrics};
use crate::position::Position;
use crate::presence::{PresenceObserver, Present, User};
use crate::publication::{Address, Publication};
use crate::publisher::{
    Enqueued, GROUP_NAME_BYTES_MAX, METADATA_BYTES_MAX, PublishError, Publisher, Submission, TryPublishError,
    USER_NAME_BYTES_MAX, Wants,
};
use crate::rate::SharedRateLimit;
use crate::receipt::Receipt;
use crate::rendition::Encoding;
use crate::socket::Socket;
use crate::wait_list::Refused;

/// A set of connections that can be addressed together. See the [crate] documentation for an example.
#[derive(Debug, Clone)]
pub struct Namespace {
    publisher: Publisher,
}

impl Namespace {
    pub(crate) fn new(core: Arc<EngineCore>, name: &str) -> Self {
        Self { publisher: Publisher::new(core, name) }
    }

    /// Publishes. Returns when every connection that is addressed has accepted the message or has disconnected.
    /// While no connection with the policy `Block` is slow, that is as soon as the log has accepted it.
    ///
    /// Publications that one task publishes one after the other reach every connection in that order (causal
    /// order). Dropping this future, as a timeout around it does, does not withdraw the publication: once
    /// accepted it is delivered, and publishing it again may deliver it twice.
    ///
    /// # Errors
    /// [`PublishError::Closed`] if the engine has ended, [`PublishError::Overloaded`] if too many publishers
    /// wait, [`PublishError::TooLong`] for a payload that no outbox can hold.
    #[inline]
    pub fn publish(
        &self,
        publication: Publication,
    ) -> impl Future<Output = Result<(), PublishError>> + Send + Unpin + use<'_> {
        WithoutReceipt(self.publisher.submit(publication, Wants::Room))
    }

    /// Publishes, and always waits until every connection that is addressed has accepted the message or has
    /// disconnected. Returns the counts of both.
    ///
    /// # Errors
    /// As for [`publish`](Self::publish).
    #[inline]
    pub fn deliver(
        &self,
        publication: Publication,
    ) -> impl Future<Output = Result<Receipt, PublishError>> + Send + Unpin + use<'_> {
        self.publisher.submit(publication, Wants::Outcome)
    }

    /// Publishes in two steps: returns as soon as the log (for one connection: its shard's mailbox) has accepted the
    /// publication, whatever its connections do. What the publisher `wants` to wait for is left to
    /// [`Enqueued::outcome`], which another task may await.
    ///
    /// # Errors
    /// As for [`publish`](Self::publish).
    pub async fn enqueue(&self, publication: Publication, wants: Wants) -> Result<Enqueued, PublishError> {
        self.publisher.enqueue(publication, wants).await
    }

    /// Publishes without waiting, for code that is not async. A slow consumer gets the message when its
    /// outbox has room.
    ///
    /// # Errors
    /// [`TryPublishError::Full`] if the log (for one connection: its shard's mailbox) is full; otherwise as for
    /// [`publish`](Self::publish).
    pub fn try_publish(&self, publication: Publication) -> Result<(), TryPublishError<Publication>> {
        if publication.is_too_long() {
            return Err(TryPublishError::TooLong(publication));
        }
        let submitted = self.publisher.try_submit(publication.into(), Wants::Nothing);
        submitted.map(drop).map_err(|refused| match refused {
            Refused::Full(draft) => {
                self.publisher.core().wake_laggards(1);
                TryPublishError::Full(draft.publication)
            }
            Refused::Closed(draft) => TryPublishError::Closed(draft.publication),
        })
    }

    /// Makes the connection a member of the group. When this has returned, the next publication by anyone
    /// includes the connection; earlier ones do not. Joining a group again has no effect; nor has joining for
    /// a connection that has disconnected. A connection that is already in
    /// [`max_groups`](ConnectionConfig::max_groups) groups is closed (1008).
    ///
    /// Returns a position: every publication after it includes the connection; of those before it, only some
    /// that were published during this call may. A connection is a member of `Everyone` only when its
    /// [`on_open`](crate::Handler::on_open) is done, but of groups at once.
    ///
    /// # Errors
    /// As for [`publish`](Self::publish), and [`PublishError::GroupNameTooLong`].
    pub async fn join(&self, id: ConnectionId, group: &str) -> Result<Position, PublishError> {
        self.join_all(id, &[group]).await
    }

    /// Joins several groups in one step: no publication comes between them.
    ///
    /// # Errors
    /// As for [`join`](Self::join); the connection then joins none of the groups.
    pub async fn join_all(&self, id: ConnectionId, groups: &[&str]) -> Result<Position, PublishError> {
        if groups.iter().any(|group| group.len() > GROUP_NAME_BYTES_MAX) {
            return Err(PublishError::GroupNameTooLong);
        }
        if id.shard() >= self.publisher.shards() {
            return Ok(self.publisher.core().tail()); // an id of another engine: no connection here has it
        }
        let enter = |group: &&str| self.publisher.directory().enter(group, id.shard());
        self.publisher.command(id, Action::Join(groups.iter().map(enter).collect())).await
    }

    /// Ends the connection's membership of the group: publications after this do not reach the connection,
    /// earlier ones do.
    ///
    /// # Errors
    /// As for [`publish`](Self::publish).
    pub async fn leave(&self, id: ConnectionId, group: &str) -> Result<(), PublishError> {
        self.leave_all(id, &[group]).await
    }

    /// Leaves several groups in one step: no publication comes between them.
    ///
    /// # Errors
    /// As for [`publish`](Self::publish).
    pub async fn leave_all(&self, id: ConnectionId, groups: &[&str]) -> Result<(), PublishError> {
        let find = |group: &&str| self.publisher.directory().find(Kind::Group, group);
        let groups: SmallVec<_> = groups.iter().filter_map(find).collect();
        if groups.is_empty() {
            return Ok(());
        }
        self.publisher.command(id, Action::Leave(groups)).await.map(drop)
    }

    /// Sends a ping or a pong to one connection, ahead of the messages that wait for it. While more than 2 KiB of such
    /// frames wait, because the client accepts nothing, further ones are left out: they would tell it nothing new.
    ///
    /// # Errors
    /// As for [`publish`](Self::publish).
    pub async fn send_control(&self, id: ConnectionId, frame: Control<'_>) -> Result<(), PublishError> {
        let frame = match frame {
            Control::Ping(payload) => ControlFrame::ping(payload),
            Control::Pong(payload) => ControlFrame::pong(payload),
            Control::Close(close) => return self.close_and_listen(id, close).await,
        };
        self.publisher.command(id, Action::Control(Box::new(frame))).await.map(drop)
    }

    /// Ends the connection with a Close frame, after everything that was sent to it before, and goes on passing the
    /// client's messages to its handler until the client's own Close frame arrives, for
    /// [`close_timeout`](ConnectionConfig::close_timeout) at most. The handler is told of the end after that. To end it
    /// without listening, publish a [close](Publication::close).
    ///
    /// # Errors
    /// As for [`publish`](Self::publish). A code that may not be sent is replaced by a Close frame without a code.
    pub async fn close_and_listen(
        &self,
        id: ConnectionId,
        close: Option<(CloseCode, &str)>,
    ) -> Result<(), PublishError> {
        let (code, text) =
            close.filter(|(code, _)| code.is_valid_on_wire()).unwrap_or((CloseCode::NO_STATUS, ""));
        let reason = CloseReason::Application { code, text: text.to_owned().into() };
        self.publisher.command(id, Action::CloseAndListen { reason }).await.map(drop)
    }

    /// Passes the connection's counters, as they are after everything that was published before, to `on_metrics`,
    /// which is called on the connection's shard, or dropped without a call if the connection has disconnected.
    ///
    /// # Errors
    /// As for [`publish`](Self::publish).
    pub async fn connection_metrics(
        &self,
        id: ConnectionId,
        on_metrics: impl FnOnce(ConnectionMetrics) + Send + 'static,
    ) -> Result<(), PublishError> {
        self.publisher.command(id, Action::Inspect(Box::new(on_metrics))).await.map(drop)
    }

    /// Passes the groups that a connection is in, after everything that was published before, to `on_groups`,
    /// in no particular order. `on_groups` is called on the connection's shard, or dropped without a call if
    /// the connection has disconnected. A connection in its closing handshake is in no group.
    ///
    /// # Errors
    /// As for [`publish`](Self::publish).
    pub async fn groups_of(
        &self,
        id: ConnectionId,
        on_groups: impl FnOnce(Vec<Arc<str>>) + Send + 'static,
    ) -> Result<(), PublishError> {
        self.publisher.command(id, Action::ListGroups(Box::new(on_groups))).await.map(drop)
    }

    /// Collects the counters of all connections of `to` except those in `except`, as they are after everything
    /// that was published before. `on_metrics` is called once on each shard, with that shard's part; when it is
    /// dropped, all parts have been passed. Each shard visits each of its connections (for groups: each member).
    ///
    /// # Errors
    /// As for [`publish`](Self::publish).
    pub async fn collect_metrics(
        &self,
        to: &Address,
        except: &[ConnectionId],
        on_metrics: impl Fn(GroupMetrics) + Send + Sync + 'static,
    ) -> Result<(), PublishError> {
        if let Address::Connection(id) = to {
            if except.contains(id) {
                return Ok(());
            }
            return self.connection_metrics(*id, move |metrics| on_metrics(metrics.into())).await;
        }
        self.ask(self.groups_in(to), except, Answer::Metrics(Arc::new(on_metrics))).await
    }

    /// Collects the ids of all open connections of `to`, after everything that was published before. `on_members`
    /// is called once on each shard, with that shard's part; when it is dropped, all parts have been passed.
    ///
    /// # Errors
    /// As for [`publish`](Self::publish).
    pub async fn collect_members(
        &self,
        to: &Address,
        on_members: impl Fn(Vec<ConnectionId>) + Send + Sync + 'static,
    ) -> Result<(), PublishError> {
        if let Address::Connection(id) = *to {
            return self
                .publisher
                .command(id, Action::IfMember(Box::new(move || on_members(vec![id]))))
                .await
                .map(drop);
        }
        self.ask(self.groups_in(to), &[], Answer::Members(Arc::new(on_members))).await
    }

    /// The groups of an address; none if it means everyone. A single connection is not asked for by groups.
    fn groups_in(&self, to: &Address) -> Option<Arc<[Named]>> {
        match to {
            Address::Everyone => None,
            Address::Group(name) => Some(self.publisher.named(Kind::Group, std::slice::from_ref(name))),
            Address::Groups(names) => Some(self.publisher.named(Kind::Group, names)),
            Address::User(name) => Some(self.publisher.named(Kind::User, std::slice::from_ref(name))),
            Address::Users(names) => Some(self.publisher.named(Kind::User, names)),
            Address::Connection(_) => Some(Arc::default()),
        }
    }

    /// Sends a query to all shards, about the members of these groups or about everyone.
    async fn ask(
        &self,
        groups: Option<Arc<[Named]>>,
        except: &[ConnectionId],
        answer: Answer,
    ) -> Result<(), PublishError> {
        for shard in 0..self.publisher.shards() {
            let query = Query {
                directory: self.publisher.directory().clone(),
                groups: groups.clone(),
                except: SmallVec::from_slice(except),
                answer: answer.clone(),
            };
            self.publisher.submit_command(shard, Command::Ask(Box::new(query))).await?;
        }
        Ok(())
    }

    /// The position after everything that has been published so far.
    pub fn position(&self) -> Position {
        self.publisher.core().tail()
    }

    /// The time by the engine's clock, to which [`expire_at`](Self::expire_at) and
    /// [`NewConnection::expires_at`] refer: the system's, except for an engine that is
    /// [driven by another](crate::Engine::driven_by).
    pub fn now(&self) -> Instant {
        self.publisher.core().now()
    }

    /// The number of connections.
    pub fn len(&self) -> usize {
        self.publisher.directory().everyone().len()
    }

    /// Whether there are no connections.
    pub fn is_empty(&self) -> bool {
        self.publisher.directory().everyone().is_empty()
    }

    /// The number of a group's members.
    pub fn group_len(&self, group: &str) -> usize {
        self.publisher.directory().find(Kind::Group, group).map_or(0, |group| group.len())
    }

    /// The number of users who are present in a group, or among everyone: those whom
    /// [`collect_presence`](Self::collect_presence) would list now.
    pub fn presence_len(&self, group: Option<&str>) -> usize {
        let directory = self.publisher.directory();
        match group {
            None => directory.everyone().users(),
            Some(group) => directory.find(Kind::Group, group).map_or(0, |group| group.users()),
        }
    }

    /// The number of a user's connections, including those whose `on_open` is not done.
    pub fn user_len(&self, user: &str) -> usize {
        self.publisher.directory().find(Kind::User, user).map_or(0, |user| user.len())
    }

    /// The number of users who have connections.
    pub fn user_count(&self) -> usize {
        self.publisher.directory().user_count()
    }

    /// The names of all users who have connections, with the number of connections, in no particular order. Not a
    /// snapshot, as for [`groups`](Self::groups).
    pub fn users(&self) -> Vec<(Arc<str>, usize)> {
        let all = self.publisher.directory().list(Kind::User).into_iter();
        all.map(|(name, connections, _)| (name, connections)).collect()
    }

    /// The number of groups that have members.
    pub fn group_count(&self) -> usize {
        self.publisher.directory().len()
    }

    /// All groups that have members, in no particular order. Not a snapshot: a group that is created or emptied
    /// meanwhile may be included or not.
    pub fn groups(&self) -> Vec<GroupCount> {
        let all = self.publisher.directory().list(Kind::Group).into_iter();
        all.map(|(name, connections, users)| GroupCount { name, connections, users }).collect()
    }

    /// Passes the users who are present in a group, or among everyone, to `on_presence`: at one moment after everything
    /// that was published and every join and leave that was awaited before this call. Called once, on one of the shards,
    /// or dropped without a call if the engine ends. Joins and leaves of the group wait while the list is made (some 50
    /// ns for each user).
    ///
    /// The list and the changes that are announced agree: a user is in the list from before `Joined` is announced until
    /// `Left` is. Applying the changes whose position is after that of this call to the list results in the current
    /// state.
    ///
    /// # Errors
    /// As for [`publish`](Self::publish).
    pub async fn collect_presence(
        &self,
        group: Option<&str>,
        on_presence: impl Fn(Vec<Present>) + Send + Sync + 'static,
    ) -> Result<(), PublishError> {
        let answer = Answer::Presence {
            group: group.map(Into::into),
            shards_left: Arc::new(self.publisher.shards().into()),
            on_presence: Arc::new(on_presence),
        };
        self.ask(None, &[], answer).await
    }

    /// Changes the metadata of a connection, which must have a user: from now on the groups that it is in, and those that it
    /// joins, show it for the user. No effect for a connection that has none or has disconnected.
    ///
    /// # Errors
    /// As for [`publish`](Self::publish), and [`PublishError::MetadataTooLong`].
    pub async fn set_metadata(
        &self,
        id: ConnectionId,
        metadata: impl Into<Arc<[u8]>>,
    ) -> Result<(), PublishError> {
        let metadata = metadata.into();
        if metadata.len() > METADATA_BYTES_MAX {
            return Err(PublishError::MetadataTooLong);
        }
        self.publisher.command(id, Action::SetMetadata(metadata)).await.map(drop)
    }

    /// The metadata of a user who is present in a group, or among everyone.
    pub fn metadata_in(&self, group: Option<&str>, user: &str) -> Option<Arc<[u8]>> {
        self.publisher.directory().metadata_in(group, user)
    }

    /// From now on, changes of the numbers of groups' members and of users' connections, and of users' metadata, are kept
    /// until [`take_changes`](Self::take_changes) takes them: up to 16,384, some 500 KB. Without effect if they are kept
    /// already.
    pub fn track_changes(&self) {
        self.publisher.directory().track_changes();
    }

    /// What has changed since the last call, in no particular order; a change may be told twice, and what changes during
    /// the call is told now or by the next one. None if more has changed than is kept, or
    /// [`track_changes`](Self::track_changes) was not called: ask for [`groups`](Self::groups), [`users`](Self::users)
    /// and presence then.
    pub fn take_changes(&self) -> Option<Vec<NamespaceChange>> {
        self.publisher.directory().take_changes()
    }

    /// Sets who is told when users join and leave groups; false if it was set before. To be set before the first
    /// connection with a user is adopted: users who are present earlier are not announced.
    pub fn observe_presence(&self, observer: impl PresenceObserver + 'static) -> bool {
        self.publisher.directory().observe(Box::new(observer))
    }

    /// Passes a connection to the least loaded shard, which owns it from then on. The handshake must be
    /// complete; `received` is what the client has sent after it.
    ///
    /// # Errors
    /// [`AdoptError`]: a setting out of range, an encoding of another engine, a socket that cannot be
    /// prepared, a user with too many connections or too long a name, an engine that has ended, or too many publishers
    /// that wait for room in the shard's mailbox. The socket is closed then, without a Close frame: an application that
    /// wants to send one keeps a second descriptor of the socket. A TLS session cannot be kept, so its client is sent
    /// the Close frame that [`AdoptError::farewell`] names.
    pub async fn adopt(&self, connection: NewConnection) -> Result<(), AdoptError> {
        self.adopt_without_wake(connection).await.map(drop)
    }

    /// Like [`adopt`](Self::adopt), but a shard that sleeps is woken only when the result is dropped. A task that lets
    /// other tasks run in between saves wakes when many connections arrive at once: waking a thread is a system call,
    /// and one for all of them is enough.
    ///
    /// # Errors
    /// As for `adopt`.
    pub async fn adopt_without_wake(&self, connection: NewConnection) -> Result<PendingWake<'_>, AdoptError> {
        let NewConnection {
            mut socket,
            received,
            handler,
            config,
            encoding,
            mut permit,
            rate_limit,
            user,
            first_message,
            expires_at,
        } = connection;
        let core = self.publisher.core();
        let entered = core.config.validate_with(&config).map_err(AdoptError::from).and_then(|()| {
            if !core.encodings.has(encoding) {
                return Err(AdoptError::UnknownEncoding);
            }
            user.as_ref().map_or(Ok(()), check_user)?;
            socket.prepare()?;
            self.publisher.expect(&config);
            let shard = permit.choose_shard();
            Ok((shard, user.map(|user| self.enter_user(user, shard, &config)).transpose()?))
        });
        let (shard, user) = entered.inspect_err(|error| {
            let (code, reason) = error.farewell();
            socket.refuse(code, reason);
        })?;
        let directory = self.publisher.directory().clone();
        let join = directory.enter_everyone(shard);
        let adoption = Adoption {
            socket,
            received,
            handler,
            config,
            encoding,
            directory,
            permit,
            join,
            rate_limit,
            user,
            first_message,
            expires_at,
        };
        // Before the push, so that the shard is woken even if this future is dropped while it waits for room.
        let wake = PendingWake { core, shard };
        self.publisher.submit_without_wake(shard, Command::Adopt(Box::new(adoption))).await?;
        Ok(wake)
    }

    /// Gives a user to a connection that has none and whose opening is not done: one that is
    /// [opened by its first message](NewConnection::first_message), and whose user is known only by that. No effect for
    /// any other. `config` is the connection's.
    ///
    /// # Errors
    /// [`AdoptError`]: a user with too many connections or too long a name, and as for [`publish`](Self::publish).
    pub async fn identify(
        &self,
        id: ConnectionId,
        user: User,
        config: &ConnectionConfig,
    ) -> Result<(), AdoptError> {
        check_user(&user)?;
        if id.shard() < self.publisher.shards() {
            let (user, join) = self.enter_user(user, id.shard(), config)?;
            self.publisher.command(id, Action::Identify(Box::new((user, join)))).await?;
        }
        Ok(())
    }

    /// Sets when the connection expires: its handler is asked then ([`Handler::on_expired`](crate::Handler::on_expired)).
    /// Replaces what was set before; none takes it back.
    ///
    /// # Errors
    /// As for [`publish`](Self::publish).
    pub async fn expire_at(&self, id: ConnectionId, at: Option<Instant>) -> Result<(), PublishError> {
        self.publisher.command(id, Action::ExpireAt(at)).await.map(drop)
    }

    fn enter_user(
        &self,
        user: User,
        shard: usize,
        config: &ConnectionConfig,
    ) -> Result<(User, PendingJoin), AdoptError> {
        let max = match config.max_connections_per_user {
            Some(UserLimit::OldestStays(max)) => max.into(),
            _ => u64::MAX,
        };
        match self.publisher.directory().enter_user(&user.name, shard, max) {
            Some(join) => Ok((user, join)),
            None => Err(AdoptError::TooManyConnectionsOfUser),
        }
    }
}

impl AdoptError {
    /// The close code and the reason that a client should get.
    #[must_use]
    pub fn farewell(&self) -> (CloseCode, &'static str) {
        match self {
            Self::Refused(PublishError::Overloaded) => {
                (CloseCode::TRY_AGAIN_LATER, "the server is overloaded")
            }
            Self::Refused(PublishError::Closed) => (CloseCode::GOING_AWAY, "the server is stopping"),
            Self::TooManyConnectionsOfUser => {
                (CloseCode::POLICY_VIOLATION, "too many connections of this user")
            }
            Self::UserNameTooLong => (CloseCode::POLICY_VIOLATION, "the user's name is too long"),
            _ => (CloseCode::INTERNAL_ERROR, "the connection could not be taken over"),
        }
    }
}

fn check_user(user: &User) -> Result<(), AdoptError> {
    if user.name.len() > USER_NAME_BYTES_MAX {
        return Err(AdoptError::UserNameTooLong);
    }
    if user.metadata.as_ref().is_some_and(|metadata| metadata.len() > METADATA_BYTES_MAX) {
        return Err(AdoptError::MetadataTooLong);
    }
    Ok(())
}

/// A group, and how many are in it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct GroupCount {
    /// The group's name.
    pub name: Arc<str>,
    /// Its members: connections, with or without a user.
    pub connections: usize,
    /// The users who are present in it. A user without connections counts while it may still come back
    /// ([`presence_grace`](ConnectionConfig::presence_grace)).
    pub users: usize,
}

impl GroupCount {
    /// As an application counts that has several engines.
    pub fn new(name: impl Into<Arc<str>>, connections: usize, users: usize) -> Self {
        Self { name: name.into(), connections, users }
    }
}

/// A submission without a receipt.
struct WithoutReceipt<'a>(Submission<'a>);

impl Future for WithoutReceipt<'_> {
    type Output = Result<(), PublishError>;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context).map_ok(drop)
    }
}

/// A connection whose handshake is complete, and what an engine needs to own it.
pub struct NewConnection {
    /// The socket. Nothing else may read or write it from now on.
    pub socket: Socket,
    /// The bytes that the client has sent after its handshake.
    pub received: Bytes,
    /// Makes the connection's handler, on the shard that owns it, so that its long-lived state is allocated there.
    pub handler: MakeHandler,
    /// The connection's settings; connections with the same settings share one value.
    pub config: Arc<ConnectionConfig>,
    /// How payloads become frames for this connection; [`Encoding::PLAIN`] for most.
    pub encoding: Encoding,
    /// The connection's permit, taken before the handshake was answered.
    pub permit: ConnectionPermit,
    /// A limit that the connection shares with others, in addition to its own; none for most. See
    /// [`SharedRateLimit`].
    pub rate_limit: Option<SharedRateLimit>,
    /// The connection's user, if it has one.
    pub user: Option<User>,
    /// If set, the connection is opened by its first message instead of [`Handler::on_open`](crate::Handler::on_open),
    /// which is not called: until the handler has handled that message the connection is not in everyone, as while
    /// `on_open` is pending. For clients that say who they are by a message.
    pub first_message: Option<FirstMessage>,
    /// When it expires, as [`Namespace::expire_at`] sets it; none for never.
    pub expires_at: Option<Instant>,
}

impl std::fmt::Debug for NewConnection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NewConnection").field("socket", &self.socket).finish_non_exhaustive()
    }
}

/// Wakes the shard that has been given a connection, when it is dropped.
#[must_use = "dropping it at once is what `adopt` does"]
pub struct PendingWake<'a> {
    core: &'a EngineCore,
    shard: usize,
}

impl std::fmt::Debug for PendingWake<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PendingWake").field("shard", &self.shard).finish_non_exhaustive()
    }
}

impl Drop for PendingWake<'_> {
    fn drop(&mut self) {
        self.core.mailboxes[self.shard].wake();
    }
}

/// A connection could not be adopted; its socket has been closed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdoptError {
    /// A setting is out of range.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The encoding was not registered with this engine.
    #[error("the encoding was not registered with this engine: call `register_encoding` on it first")]
    UnknownEncoding,
    /// The user's name is longer than [`USER_NAME_BYTES_MAX`](crate::USER_NAME_BYTES_MAX).
    #[error("the user's name is longer than {USER_NAME_BYTES_MAX} bytes: shorten it")]
    UserNameTooLong,
    /// The metadata is longer than [`METADATA_BYTES_MAX`](crate::METADATA_BYTES_MAX).
    #[error("the metadata is longer than {METADATA_BYTES_MAX} bytes: keep less of it here")]
    MetadataTooLong,
    /// The user has as many connections as [`UserLimit::OldestStays`] allows.
    #[error("the user has too many connections: close one, or raise `max_connections_per_user`")]
    TooManyConnectionsOfUser,
    /// The socket could not be prepared.
    #[error("the socket could not be prepared")]
    Socket(#[from] std::io::Error),
    /// The engine has ended, or too many publishers wait for room in the shard's mailbox.
    #[error(transparent)]
    Refused(#[from] PublishError),
}
