//! What a hub's method can do: short forms over the hub's clients, for the connection that it is called for.
//!
//! One for each call, sharing what belongs to the connection. The short forms are those of the `axum-signal` crate, so
//! ids are text in them, and they return nothing: what fails is logged and counted. For results, use the clients.
//! Does not know handlers or the engine's shards.

use std::marker::PhantomData;
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use once_cell::race::OnceBox;
use shardcast_engine::{CloseCode, Position};

use crate::clients::{Clients, PublishError, Target};
use crate::connection_id::ConnectionId;
use crate::log_limit::{NO_ID, SHORT_FORM};

/// The connection that a hub's method is called for, and through it all clients of the hub.
/// [`HubContext<Self>`](crate::HubContext) is the shorter way to write this type in a hub.
///
/// `M` is what the hub's clients receive and `C` the hub's codec. Cloneable; may be kept and used after the call, from
/// any task.
pub struct MessageContext<M, C> {
    caller: Arc<Caller<M>>,
    position: Position,
    codec: PhantomData<fn() -> C>,
}

/// What belongs to one connection. Not its hub: a hub may keep its context, and must end all the same.
pub(crate) struct Caller<M> {
    clients: Clients<M>,
    /// What the engine of this node calls it.
    id: shardcast_engine::ConnectionId,
    /// Made when it is first needed: many hubs never do. One word and not two, because there is a caller for each
    /// connection.
    names: OnceBox<Names>,
}

/// What a connection is called.
#[derive(Default)]
struct Names {
    user: Option<Arc<str>>,
    connection_id: OnceLock<Arc<str>>,
}

impl<M> Caller<M> {
    pub(crate) fn new(
        clients: Clients<M>,
        id: shardcast_engine::ConnectionId,
        user: Option<Arc<str>>,
    ) -> Self {
        let names = user.map(|user| Box::new(Names { user: Some(user), ..Names::default() }));
        Self { clients, id, names: names.map_or_else(OnceBox::new, OnceBox::with_value) }
    }

    /// The same caller, now that its user is known.
    pub(crate) fn with_user(&self, user: Option<Arc<str>>) -> Self {
        Self::new(self.clients.clone(), self.id, user)
    }

    pub(crate) fn clients(&self) -> &Clients<M> {
        &self.clients
    }

    pub(crate) fn id(&self) -> ConnectionId {
        self.clients.id_of(self.id)
    }

    /// What the engine of this node calls the connection.
    pub(crate) fn local_id(&self) -> shardcast_engine::ConnectionId {
        self.id
    }

    pub(crate) fn connection_id(&self) -> &Arc<str> {
        let names = self.names.get_or_init(Box::default);
        names.connection_id.get_or_init(|| self.id().to_string().into())
    }
}

impl<M, C> Clone for MessageContext<M, C> {
    fn clone(&self) -> Self {
        Self { caller: self.caller.clone(), position: self.position, codec: PhantomData }
    }
}

impl<M, C> std::fmt::Debug for MessageContext<M, C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MessageContext").field("id", &self.id()).finish_non_exhaustive()
    }
}

impl<M, C> MessageContext<M, C> {
    pub(crate) fn new(caller: Arc<Caller<M>>, position: Position) -> Self {
        Self { caller, position, codec: PhantomData }
    }

    /// The id of this connection.
    pub fn id(&self) -> ConnectionId {
        self.caller.id()
    }

    /// The client's position in the order of all published messages when this method was called: messages before it
    /// had been queued for the client, were dropped, or were not for it.
    pub fn position(&self) -> Position {
        self.position
    }

    /// The id of this connection as text: what [`broadcast_except`](Self::broadcast_except) takes.
    pub fn connection_id(&self) -> &Arc<str> {
        self.caller.connection_id()
    }

    /// The user of this connection, if it was [served](crate::Serve::user) with one.
    pub fn user(&self) -> Option<&Arc<str>> {
        self.caller.names.get()?.user.as_ref()
    }

    /// All clients of the hub, for everything that has no short form here.
    pub fn clients(&self) -> &Clients<M> {
        &self.caller.clients
    }

    /// Makes this connection a member of a group. The next message to the group reaches it.
    pub async fn add_to_group(&self, group: &str) {
        report(self.clients().join(self.id(), group).await.map(drop));
    }

    /// Ends this connection's membership of a group. The next message to the group does not reach it.
    pub async fn remove_from_group(&self, group: &str) {
        report(self.clients().leave(self.id(), group).await);
    }

    /// Changes the metadata that presence shows of this connection's user: see [`Clients::set_metadata`].
    pub fn set_metadata<'a, T: serde::Serialize + ?Sized>(
        &'a self,
        metadata: &T,
    ) -> impl Future<Output = ()> + Send + use<'a, T, M, C> {
        let set = self.clients().set_metadata(self.id(), metadata);
        async move { report(set.await) }
    }

    /// Sets when this connection expires, for instance when its token does: see
    /// [`WsHub::on_expired`](crate::WsHub::on_expired) and [`Clients::expire_at`].
    pub async fn expires_at(&self, at: SystemTime) {
        report(self.clients().expire_at(self.id(), Some(at)).await);
    }

    /// Ends this connection, after what was sent to it before.
    pub async fn disconnect(&self, code: CloseCode, reason: impl Into<std::borrow::Cow<'static, str>>) {
        report(self.clients().disconnect(self.id(), code, reason).await);
    }
}

impl<M: Send, C> MessageContext<M, C> {
    /// Sends to this client only.
    pub async fn unicast(&self, message: M) {
        self.short(self.clients().to(self.id()), &[], message).await;
    }

    /// Sends to all clients, this one included.
    pub async fn broadcast(&self, message: M) {
        self.short(self.clients().to_all(), &[], message).await;
    }

    /// Sends to all clients but those with these ids ([`connection_id`](Self::connection_id)). An id of a connection
    /// that has ended excludes no client. Neither does a text that is not an id; that is a mistake, and is logged: as
    /// an error in debug builds, as a warning in release builds, at most once in a second. With typed ids:
    /// `ctx.clients().to_all().except(&[id])`.
    pub async fn broadcast_except(&self, except: &[&str], message: M) {
        self.short(self.clients().to_all(), except, message).await;
    }

    /// Sends to the members of a group.
    pub async fn broadcast_group(&self, group: &str, message: M) {
        self.short(self.clients().to_group(group), &[], message).await;
    }

    /// Sends to the members of a group but those with these ids; see [`broadcast_except`](Self::broadcast_except).
    pub async fn broadcast_group_except(&self, group: &str, except: &[&str], message: M) {
        self.short(self.clients().to_group(group), except, message).await;
    }

    /// Sends to the members of several groups, each client once.
    pub async fn broadcast_groups(&self, groups: &[&str], message: M) {
        self.short(self.clients().to_groups(groups), &[], message).await;
    }

    async fn short(&self, target: Target<'_, M>, except: &[&str], message: M) {
        let except: Vec<ConnectionId> = except.iter().filter_map(|text| parse_id(text)).collect();
        report(target.except(&except).publish(&message).await);
    }
}

fn parse_id(text: &str) -> Option<ConnectionId> {
    const SHOWN_CHARS: usize = 64;
    /// The message reaches a client that it should not, so a test should show it.
    const LEVEL: tracing::Level =
        if cfg!(debug_assertions) { tracing::Level::ERROR } else { tracing::Level::WARN };
    let id = text.parse().ok();
    if id.is_none()
        && let Some(left_out) = NO_ID.allows()
    {
        let text: String = text.chars().take(SHOWN_CHARS).collect();
        tracing::event!(
            LEVEL,
            text,
            left_out,
            "a client was to be excluded by a text that is no connection id: it excludes nobody"
        );
    }
    id
}

/// Logs what the short forms do not return.
fn report(result: Result<(), PublishError>) {
    match result {
        Ok(()) => {}
        Err(PublishError::Closed) => tracing::debug!("nothing was sent: the engine has ended"),
        Err(error) => {
            if let Some(left_out) = SHORT_FORM.allows() {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(
                    error,
                    left_out,
                    "a hub's message, join, leave or disconnect was not carried out"
                );
            }
        }
    }
}
