//! A hub's context for calling one method of a hub in a unit test.
//!
//! The context is a real one: an engine in memory has a connection for it, whose other end the test holds. Only the
//! connection's handler is not the hub, so that nothing but the test calls its methods. Knows hubs and the engine. Does
//! not know HTTP.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use http::{Response, StatusCode};
use serde::Serialize;
use shardcast_engine::{
    ConnectionConfig, ConnectionId, Context, Encoding, Handler, Message, NewConnection, Position, User,
};
use socket2::SockRef;
use tokio::net::UnixStream;
use tokio::sync::oneshot;

use super::client::TestClient;
use super::driver::{self, Driver, Driving};
use super::hub::HubTestClient;
use super::server::TestServerBuilder;
use super::transcript::Transcript;
use super::waiting::{TIMEOUT, Waiting};
use super::wire::{Socket, Wire};
use crate::context::{Caller, MessageContext};
use crate::engine::Engine;
use crate::hub::{Hub, HubContext, WsHub};
use crate::presence::Metadata;

/// A [`HubContext`] for calling a hub's methods in a unit test, and the client that it is for.
///
/// The test makes the hub's value and calls its methods; nothing else does. What they send with the context is received
/// by [`caller`](Self::caller) and by [members](Self::member_of), as in a server. It needs a current-thread runtime, which
/// `#[tokio::test]` is. Time passes as in the test around it.
///
/// ```
/// use shardcast::{HubContext, JsonCodec, WsHub};
/// use shardcast::testing::TestContext;
///
/// struct Rooms;
///
/// impl WsHub for Rooms {
///     type Codec = JsonCodec;
///     type InMessage = String;
///     type OutMessage = String;
///
///     async fn on_message(&self, room: String, ctx: HubContext<Self>) {
///         ctx.broadcast_group(&room, "somebody joins".to_owned()).await;
///         ctx.add_to_group(&room).await;
///         ctx.unicast(format!("you are in {room}")).await;
///     }
/// }
///
/// # /*
/// #[tokio::test]
/// # */
/// # #[tokio::main(flavor = "current_thread")] async fn main() { who_joins_is_announced_to_the_room().await }
/// async fn who_joins_is_announced_to_the_room() {
///     let mut test = TestContext::<Rooms>::new().await;
///     let mut member = test.member_of(&["garden"]).await;
///     let mut stranger = test.member_of(&["cellar"]).await;
///
///     Rooms.on_message("garden".to_owned(), test.context()).await;
///
///     test.caller.expect("you are in garden").await;
///     member.client.expect("somebody joins").await;
///     stranger.client.expect_nothing().await;
///     assert_eq!(test.groups().await, ["garden"]);
/// }
/// ```
pub struct TestContext<H: WsHub> {
    /// The client that the context is for. It was not greeted: [`on_connected`](WsHub::on_connected) runs only if the
    /// test calls it. What it sends is discarded. When a method disconnects it,
    /// [`closed`](TestClient::closed) has the code and the reason.
    pub caller: HubTestClient<H>,
    context: HubContext<H>,
    hub: Hub<H>,
    _engine: Engine,
    waiting: Waiting,
    driver: Driver,
    _driving: Driving,
}

impl<H: WsHub> fmt::Debug for TestContext<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestContext").field("context", &self.context).finish_non_exhaustive()
    }
}

/// Another client of the hub in a [`TestContext`].
#[derive(Debug)]
#[non_exhaustive]
pub struct TestMember<H: WsHub> {
    /// The client, which receives what is sent to it, to its groups and to all. What it sends is discarded.
    pub client: HubTestClient<H>,
    /// The id of its connection.
    pub id: crate::ConnectionId,
}

/// Settings of a [`TestContext`].
#[derive(Debug)]
#[must_use = "nothing is made before `build`"]
pub struct TestContextBuilder<H> {
    config: Arc<ConnectionConfig>,
    user: Option<User>,
    timeout: Duration,
    hub: PhantomData<fn() -> H>,
}

impl<H: WsHub> TestContextBuilder<H> {
    /// The user of the caller; none without this.
    pub fn user(self, name: &str) -> Self {
        Self { user: Some(User::new(name)), ..self }
    }

    /// The user of the caller, with metadata as presence shows it.
    ///
    /// # Panics
    /// Metadata that cannot be encoded as JSON or is too long.
    pub fn user_with<T: Serialize + ?Sized>(self, name: &str, metadata: &T) -> Self {
        let metadata = Metadata::new(metadata).expect("metadata can be kept");
        Self { user: Some(User::new(name).with_metadata(metadata.into_bytes())), ..self }
    }

    /// The hub's config. Default: [`WsHubConfig::default`](crate::WsHubConfig).
    pub fn config(self, config: impl Into<Arc<ConnectionConfig>>) -> Self {
        Self { config: config.into(), ..self }
    }

    /// How long assertions wait. Default: 10 s.
    pub fn timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Makes the context.
    ///
    /// # Panics
    /// Outside of a current-thread runtime; a setting out of range; a system that gives no descriptors.
    pub async fn build(self) -> TestContext<H> {
        let (engine, driver, _driving) =
            driver::start(TestServerBuilder::default().engine, false).expect("the engine starts");
        let hub = engine.hub::<H>(self.config).expect("the hub's config is in range");
        let waiting = Waiting { timeout: self.timeout, driver: Some(driver.clone()) };
        let name = self.user.as_ref().map(|user| user.name().clone());
        let (caller, id, position) = connect(&hub, &waiting, "the caller", self.user).await;
        let caller_of = Caller::new(hub.clients().clone(), id, name);
        let context = MessageContext::new(Arc::new(caller_of), position);
        TestContext { caller, context, hub, _engine: engine, waiting, driver, _driving }
    }
}

impl<H: WsHub> TestContext<H> {
    /// A context for a client without a user.
    ///
    /// # Panics
    /// Outside of a current-thread runtime; if the system gives no descriptors.
    pub async fn new() -> Self {
        Self::builder().build().await
    }

    /// Other settings than the defaults.
    pub fn builder() -> TestContextBuilder<H> {
        TestContextBuilder { config: Arc::default(), user: None, timeout: TIMEOUT, hub: PhantomData }
    }

    /// The context, as a method gets it.
    pub fn context(&self) -> HubContext<H> {
        self.context.clone()
    }

    /// The hub that the clients belong to: who is in which group, who is present, what can be sent.
    pub fn hub(&self) -> &Hub<H> {
        &self.hub
    }

    /// The groups that the caller is in, sorted; none when it was disconnected.
    pub async fn groups(&self) -> Vec<String> {
        let groups = self.hub.groups_of(self.context.id()).await.expect("the engine runs");
        let mut groups: Vec<String> = groups.into_iter().flatten().map(|group| group.to_string()).collect();
        groups.sort_unstable();
        groups
    }

    /// Connects another client, which is a member of these groups.
    pub async fn member_of(&self, groups: &[&str]) -> TestMember<H> {
        self.connect(groups, None).await
    }

    /// Connects another client of this user, which is a member of these groups.
    pub async fn user_in(&self, user: &str, groups: &[&str]) -> TestMember<H> {
        self.connect(groups, Some(User::new(user))).await
    }

    async fn connect(&self, groups: &[&str], user: Option<User>) -> TestMember<H> {
        let name = match &user {
            Some(user) => format!("{} in {groups:?}", user.name()),
            None => format!("a member of {groups:?}"),
        };
        let (client, id, _) = connect(&self.hub, &self.waiting, &name, user).await;
        let id = self.hub.id_of(id);
        self.hub.join_all(id, groups).await.expect("the groups can be joined");
        self.driver.settle().await;
        TestMember { client, id }
    }

    /// Returns when everything that was sent has arrived. The assertions of clients do this themselves.
    pub async fn settle(&self) {
        self.driver.settle().await;
    }
}

/// Handles a connection by doing nothing, but tells its id and position when it is open.
struct Silent(Option<oneshot::Sender<(ConnectionId, Position)>>);

impl Handler for Silent {
    fn on_open(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if let Some(opened) = self.0.take() {
            let _ = opened.send((context.id(), context.position())); // the test may be over
        }
        Poll::Ready(())
    }

    fn on_message(&mut self, _: Message<'_>, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }
}

/// A connection to the hub that nothing handles, and its client.
async fn connect<H: WsHub>(
    hub: &Hub<H>,
    waiting: &Waiting,
    name: &str,
    user: Option<User>,
) -> (HubTestClient<H>, ConnectionId, Position) {
    let (socket, theirs) = std::os::unix::net::UnixStream::pair().expect("a pair of sockets");
    SockRef::from(&theirs).set_nonblocking(true).expect("a socket");
    let theirs = UnixStream::from_std(theirs).expect("a socket");
    if user.is_some() {
        hub.observe_presence();
    }
    let (opened, is_open) = oneshot::channel();
    let connection = NewConnection {
        socket: socket.into(),
        received: bytes::Bytes::new(),
        handler: Box::new(|_| Box::new(Silent(Some(opened)))),
        config: hub.config().clone(),
        encoding: Encoding::PLAIN,
        permit: hub.engine().admit(None).expect("the engine admits connections"),
        rate_limit: None,
        user,
        first_message: None,
        expires_at: None,
    };
    hub.clients().namespace().adopt(connection).await.expect("the engine adopts the connection");
    let (id, position) = is_open.await.expect("the connection opens");
    let (mut response, ()) = Response::new(()).into_parts();
    response.status = StatusCode::SWITCHING_PROTOCOLS;
    let wire = Wire::new(Socket::Unix(theirs), waiting.driver.clone());
    let transcript = Arc::new(Transcript::new(name.to_owned()));
    let client = TestClient::open(wire, Vec::new(), response, transcript, waiting.clone()).await;
    if let Some(driver) = &waiting.driver {
        driver.settle().await; // it is a member of everyone then
    }
    (client.typed_as(), id, position)
}
