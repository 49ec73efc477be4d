//! A hub on a server of its own: for tests that need neither routes nor authentication.
//!
//! Its one route serves whoever connects, as the user that the test's client names in a header. Knows hubs and servers.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::response::IntoResponse as _;
use axum::routing::any;
use http::{HeaderMap, HeaderName};
use serde::Serialize;
use shardcast_engine::{ConnectionConfig, ShutdownReport};

use super::client::TestClient;
use super::server::{ClientBuilder, TestServer, TestServerBuilder};
use crate::engine::Engine;
use crate::hub::{Hub, WsHub};
use crate::upgrade::WebSocketUpgrade;

const PATH: &str = "/";
const USER: HeaderName = HeaderName::from_static("x-test-user");
const METADATA: HeaderName = HeaderName::from_static("x-test-metadata");

/// The client of a [`TestHub`].
pub type HubTestClient<H> =
    TestClient<<H as WsHub>::InMessage, <H as WsHub>::OutMessage, <H as WsHub>::Codec>;

/// A hub on a [`TestServer`] of its own. Its clients have the hub's message types; where those do not implement what the
/// other side of the codec needs, use `send_json`, `expect_json` and their kin.
///
/// ```
/// use std::time::Duration;
/// use shardcast::{CloseCode, HubContext, JsonCodec, WsHub, WsHubConfig};
/// use shardcast::testing::TestHub;
///
/// struct Chat;
///
/// impl WsHub for Chat {
///     type Codec = JsonCodec;
///     type InMessage = String;
///     type OutMessage = String;
///
///     async fn on_message(&self, text: String, ctx: HubContext<Self>) {
///         let name = ctx.user().map_or("somebody", |user| user);
///         ctx.broadcast(format!("{name}: {text}")).await
///     }
/// }
///
/// # /*
/// #[tokio::test]
/// # */
/// # #[tokio::main(flavor = "current_thread")] async fn main() { a_silent_client_is_given_up().await }
/// async fn a_silent_client_is_given_up() {
///     let chat = TestHub::<Chat>::in_memory(WsHubConfig::default(), || Chat).await;
///     let mut ada = chat.connect_as("ada").await;
///     let mut bob = chat.connect().await;
///     bob.send("hello");
///     ada.expect("somebody: hello").await;
///
///     bob.vanish().await;
///     chat.advance(Duration::from_secs(3600)).await; // in milliseconds
///     assert_eq!(chat.hub().len(), 1, "ada has answered 240 pings, bob none");
/// }
/// ```
pub struct TestHub<H: WsHub> {
    server: TestServer,
    hub: Hub<H>,
}

impl<H: WsHub> fmt::Debug for TestHub<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestHub").field("server", &self.server).field("hub", &self.hub).finish()
    }
}

impl<H: WsHub> TestHub<H> {
    /// A hub on a free port of 127.0.0.1, with an engine of one shard. `make` makes the hub's value for each connection.
    ///
    /// # Panics
    /// A setting out of range; a system that gives no port, threads or descriptors.
    pub async fn start<T, M>(config: impl Into<Arc<ConnectionConfig>>, make: M) -> Self
    where
        T: Into<H>,
        M: Fn() -> T + Clone + Send + Sync + 'static,
    {
        Self::start_on(TestServer::builder(), config, make).await
    }

    /// The same on a server with other settings.
    ///
    /// # Panics
    /// As [`start`](Self::start).
    pub async fn start_on<T, M>(
        server: TestServerBuilder,
        config: impl Into<Arc<ConnectionConfig>>,
        make: M,
    ) -> Self
    where
        T: Into<H>,
        M: Fn() -> T + Clone + Send + Sync + 'static,
    {
        let mut made = None;
        let server = server.start(|engine| route(engine, config.into(), make, &mut made)).await;
        Self { server, hub: made.expect("the server has asked for its router") }
    }

    /// A hub in memory, with a paused clock: see [`TestServer::in_memory`].
    ///
    /// # Panics
    /// Outside of a current-thread runtime; a setting out of range; a system that gives no descriptors.
    pub async fn in_memory<T, M>(config: impl Into<Arc<ConnectionConfig>>, make: M) -> Self
    where
        T: Into<H>,
        M: Fn() -> T + Clone + Send + Sync + 'static,
    {
        Self::in_memory_on(TestServer::builder(), config, make).await
    }

    /// The same with other settings.
    ///
    /// # Panics
    /// As [`in_memory`](Self::in_memory).
    pub async fn in_memory_on<T, M>(
        server: TestServerBuilder,
        config: impl Into<Arc<ConnectionConfig>>,
        make: M,
    ) -> Self
    where
        T: Into<H>,
        M: Fn() -> T + Clone + Send + Sync + 'static,
    {
        let mut made = None;
        let server = server.in_memory(|engine| route(engine, config.into(), make, &mut made)).await;
        Self { server, hub: made.expect("the server has asked for its router") }
    }

    /// The hub: its clients, groups, users, and what can be sent to them.
    pub fn hub(&self) -> &Hub<H> {
        &self.hub
    }

    /// The server: HTTP requests, URLs, the engine.
    pub fn server(&self) -> &TestServer {
        &self.server
    }

    /// Connects a client without a user. See [`TestServer::connect`].
    ///
    /// # Panics
    /// If the upgrade is refused.
    #[track_caller]
    pub fn connect(&self) -> impl Future<Output = HubTestClient<H>> + use<H> {
        self.client().connect()
    }

    /// Connects a client of this [user](crate::Serve::user).
    ///
    /// # Panics
    /// If the upgrade is refused, for instance for the length of the name; if the name contains control characters.
    #[track_caller]
    pub fn connect_as(&self, user: &str) -> impl Future<Output = HubTestClient<H>> + use<H> {
        self.client().raw_header(USER, user.as_bytes()).connect()
    }

    /// Connects a client of this user with this [metadata](crate::Serve::metadata).
    ///
    /// # Panics
    /// As [`connect_as`](Self::connect_as); metadata that cannot be encoded as JSON.
    #[track_caller]
    pub fn connect_with<T: Serialize + ?Sized>(
        &self,
        user: &str,
        metadata: &T,
    ) -> impl Future<Output = HubTestClient<H>> + use<H, T> {
        let metadata = serde_json::to_vec(metadata).expect("metadata can be encoded as JSON");
        self.client().raw_header(USER, user.as_bytes()).raw_header(METADATA, &metadata).connect()
    }

    /// A client that is not connected yet.
    pub fn client(&self) -> ClientBuilder<H::InMessage, H::OutMessage, H::Codec> {
        ClientBuilder::new(self.server.inner().clone(), PATH)
    }

    /// See [`TestServer::settle`].
    ///
    /// # Panics
    /// As there.
    pub async fn settle(&self) {
        self.server.settle().await;
    }

    /// See [`TestServer::advance`].
    ///
    /// # Panics
    /// As there.
    pub async fn advance(&self, time: Duration) {
        self.server.advance(time).await;
    }

    /// See [`TestServer::until`].
    ///
    /// # Panics
    /// As there.
    #[track_caller]
    pub fn until<F: FnMut() -> bool>(
        &self,
        what: &str,
        is_met: F,
    ) -> impl Future<Output = ()> + use<'_, F, H> {
        self.server.until(what, is_met)
    }

    /// See [`TestServer::shutdown`].
    pub async fn shutdown(&self, within: Duration) -> ShutdownReport {
        self.server.shutdown(within).await
    }
}

fn route<H, T, M>(
    engine: &Engine,
    config: Arc<ConnectionConfig>,
    make: M,
    made: &mut Option<Hub<H>>,
) -> Router
where
    H: WsHub,
    T: Into<H>,
    M: Fn() -> T + Clone + Send + Sync + 'static,
{
    let hub = engine.hub::<H>(config).expect("the hub's config is in range");
    *made = Some(hub.clone());
    let serve = async move |upgrade: WebSocketUpgrade, headers: HeaderMap| {
        let mut serve = upgrade.serve(&hub, make());
        let bytes = |name: &HeaderName| headers.get(name).map(|value| value.as_bytes().to_vec());
        if let Some(user) = bytes(&USER).and_then(|user| String::from_utf8(user).ok()) {
            serve = serve.user(user);
        }
        if let Some(metadata) = bytes(&METADATA) {
            let metadata: Option<serde_json::Value> = serde_json::from_slice(&metadata).ok();
            serve = serve.metadata(&metadata);
        }
        serve.into_response()
    };
    Router::new().route(PATH, any(serve))
}
