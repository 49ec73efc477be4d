//! A server for a test: an application's router on a free port, or in memory, and the connections to it.
//!
//! In memory there is no listener: a connection is a socket pair, of which hyper serves one end with the application's
//! router, as it would serve an accepted one. So routes, extractors and middlewares are the application's own in both
//! forms. Knows HTTP. Does not know hubs.

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::panic::Location;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::Body;
use axum::extract::ConnectInfo;
use axum::{Extension, Router};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use shardcast_engine::{EngineConfig, ShutdownReport, accept_key};
use socket2::SockRef;
use tokio::net::{TcpListener, TcpSocket, UnixStream};
use tokio::task::AbortHandle;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;

use super::client::TestClient;
use super::driver::{self, Driver, Driving};
use super::transcript::Transcript;
use super::waiting::{TIMEOUT, Waiting};
use super::wire::{Socket, Wire};
use crate::codec::{RawCodec, RawMessage};
use crate::engine::Engine;

/// How many bytes the kernel keeps for a client that does not read; Linux doubles it.
const KERNEL_BUFFER_BYTES: usize = 8 * 1024;
/// What is read of the body of a response.
const BODY_BYTES_MAX: usize = 16 << 20;

/// A server for a test, until it is dropped: over sockets, with a real engine, or in memory, with a paused clock.
///
/// | | [`start`](Self::start) | [`in_memory`](Self::in_memory) |
/// |---|---|---|
/// | clients connect | by TCP, to a free port of 127.0.0.1 | by a socket pair, through the same router |
/// | engine | one shard on a thread, not pinned | one shard, driven on the test's own thread |
/// | time | passes | passes by [`advance`](Self::advance) only |
/// | runtime | any | `#[tokio::test]` (current-thread) |
///
/// Tests may run in parallel: servers share nothing. The methods panic where a test must fail.
///
/// ```
/// use axum::{Router, extract::State, routing::any};
/// use shardcast::{Engine, Hub, HubContext, RawCodec, Serve, WebSocketUpgrade, WsHub, WsHubConfig};
/// use shardcast::testing::TestServer;
///
/// struct Echo;
///
/// impl WsHub for Echo {
///     type Codec = RawCodec;
///     type InMessage = String;
///     type OutMessage = String;
///
///     async fn on_message(&self, text: String, ctx: HubContext<Self>) {
///         ctx.unicast(text).await
///     }
/// }
///
/// async fn connect(ws: WebSocketUpgrade, State(hub): State<Hub<Echo>>) -> Serve<Echo> {
///     ws.serve(&hub, Echo)
/// }
///
/// /// What `main` serves, too.
/// fn app(engine: &Engine) -> Router {
///     let hub = engine.hub::<Echo>(WsHubConfig::default()).expect("the defaults are valid");
///     Router::new().route("/ws", any(connect)).with_state(hub)
/// }
///
/// # /*
/// #[tokio::test]
/// # */
/// # #[tokio::main(flavor = "current_thread")] async fn main() { what_is_said_comes_back().await }
/// async fn what_is_said_comes_back() {
///     let server = TestServer::start(app).await;
///     let mut client = server.connect("/ws").await;
///     client.send("hello");
///     client.expect("hello").await;
/// }
/// ```
pub struct TestServer {
    inner: Arc<Inner>,
    /// None if the application brought its own.
    engine: Option<Engine>,
    _tasks: Tasks,
}

/// What ends with the server.
enum Tasks {
    Listener(AbortHandle),
    Driver { _driving: Driving },
}

impl Drop for Tasks {
    fn drop(&mut self) {
        if let Self::Listener(task) = self {
            task.abort();
        }
    }
}

impl fmt::Debug for TestServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestServer").field("address", &self.address()).finish_non_exhaustive()
    }
}

/// What a server's clients need of it.
pub(super) struct Inner {
    place: Place,
    pub(super) waiting: Waiting,
    /// Of all clients so far, for assertions of the server.
    transcripts: Mutex<Vec<Arc<Transcript>>>,
    clients: AtomicUsize,
}

enum Place {
    Port(SocketAddr),
    Memory { app: Router, ports: AtomicU16 },
}

/// Settings of a [`TestServer`].
///
/// ```no_run
/// # use std::time::Duration;
/// # use shardcast::EngineConfig;
/// # use shardcast::testing::TestServer;
/// # async fn example(app: fn(&shardcast::Engine) -> axum::Router) {
/// let server = TestServer::builder()
///     .engine(EngineConfig { shards: Some(2), pin: false, max_connections: 10, ..EngineConfig::default() })
///     .timeout(Duration::from_secs(60))
///     .start(app)
///     .await;
/// # }
/// ```
#[derive(Debug, Clone)]
#[must_use = "nothing is started before `start` or `in_memory`"]
pub struct TestServerBuilder {
    pub(super) engine: EngineConfig,
    pub(super) timeout: Duration,
}

impl Default for TestServerBuilder {
    fn default() -> Self {
        let engine = EngineConfig { shards: Some(1), pin: false, ..EngineConfig::default() };
        Self { engine, timeout: TIMEOUT }
    }
}

impl TestServerBuilder {
    /// The settings of the engine. Default: one shard, not pinned. In memory a shard takes 64 KiB and is driven by the
    /// test's thread; without a number there is one for each CPU.
    pub fn engine(self, engine: EngineConfig) -> Self {
        Self { engine, ..self }
    }

    /// How long assertions wait, by the system's clock. Default: 10 s.
    pub fn timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// As [`TestServer::start`].
    pub async fn start(self, app: impl FnOnce(&Engine) -> Router) -> TestServer {
        let engine = Engine::start(self.engine.clone()).expect("the engine starts");
        let app = app(&engine);
        self.listen(app, Some(engine)).await
    }

    /// As [`TestServer::start_router`]. The settings of the engine have no effect.
    pub async fn start_router(self, app: Router) -> TestServer {
        self.listen(app, None).await
    }

    async fn listen(self, app: Router, engine: Option<Engine>) -> TestServer {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port");
        let address = listener.local_addr().expect("a listener has an address");
        let app = app.into_make_service_with_connect_info::<SocketAddr>();
        let task = tokio::spawn(async move {
            let _ = axum::serve(listener, app).await; // goes on until it is aborted
        });
        let waiting = Waiting { timeout: self.timeout, driver: None };
        let inner = Inner::new(Place::Port(address), waiting);
        TestServer { inner: Arc::new(inner), engine, _tasks: Tasks::Listener(task.abort_handle()) }
    }

    /// As [`TestServer::in_memory`].
    pub async fn in_memory(self, app: impl FnOnce(&Engine) -> Router) -> TestServer {
        let (engine, driver, driving) = driver::start(self.engine, true).expect("the engine starts");
        let app = app(&engine);
        let waiting = Waiting { timeout: self.timeout, driver: Some(driver) };
        let inner = Inner::new(Place::Memory { app, ports: AtomicU16::new(40_000) }, waiting);
        TestServer {
            inner: Arc::new(inner),
            engine: Some(engine),
            _tasks: Tasks::Driver { _driving: driving },
        }
    }
}

impl TestServer {
    /// An application on a free port of 127.0.0.1, with an engine of one shard that is not pinned. `app` is the function
    /// that makes the application's router from an engine, as `main` does.
    ///
    /// # Panics
    /// If the system gives no port, threads or descriptors.
    pub async fn start(app: impl FnOnce(&Engine) -> Router) -> Self {
        Self::builder().start(app).await
    }

    /// A router on a free port of 127.0.0.1 that has everything it needs, engines included.
    ///
    /// # Panics
    /// If the system gives no port.
    pub async fn start_router(app: Router) -> Self {
        Self::builder().start_router(app).await
    }

    /// An application in memory, without a port and without threads of the engine, and with a paused clock: time passes by
    /// [`advance`](Self::advance) only, for the engine, for tokio's timers in the application, and for
    /// [`throttle`](TestClient::throttle). An hour of heartbeats takes milliseconds.
    ///
    /// Pauses tokio's clock (as `#[tokio::test(start_paused = true)]` does) if it is not paused yet. The system's clock
    /// goes on: `SystemTime::now()` in the application is not moved. What the application does on threads of its own,
    /// `spawn_blocking` included, is not waited for by [`settle`](Self::settle); assertions wait for it.
    ///
    /// The test may await methods of the application's hubs, which takes a millisecond. It should not await tokio's timers
    /// itself: that returns a quarter of a second later, and lets time pass by one timer after the other, where `advance`
    /// returns at once.
    ///
    /// # Panics
    /// Outside of a current-thread runtime, which `#[tokio::test]` is; if the system gives no descriptors.
    pub async fn in_memory(app: impl FnOnce(&Engine) -> Router) -> Self {
        Self::builder().in_memory(app).await
    }

    /// Other settings than the defaults.
    pub fn builder() -> TestServerBuilder {
        TestServerBuilder::default()
    }

    /// The engine that was made for the application.
    ///
    /// # Panics
    /// If the application has brought its own ([`start_router`](Self::start_router)).
    pub fn engine(&self) -> &Engine {
        self.engine.as_ref().expect("the router was made with engines of its own: ask those")
    }

    /// Where it listens; none in memory.
    pub fn address(&self) -> Option<SocketAddr> {
        match self.inner.place {
            Place::Port(address) => Some(address),
            Place::Memory { .. } => None,
        }
    }

    /// The URL of a WebSocket at this path, such as `ws://127.0.0.1:4711/ws`, for other clients than those of the test
    /// kit.
    ///
    /// # Panics
    /// In memory.
    pub fn url(&self, path: &str) -> String {
        let address = self.address().expect("a server in memory has no address");
        format!("ws://{address}{path}")
    }

    /// Connects to the WebSocket at this path, which may have a query. In memory everything is at
    /// [rest](Self::settle) then: `on_connected` has returned, unless it waits for something.
    ///
    /// # Panics
    /// If the upgrade is refused: with the status and the body. To inspect a refusal, use
    /// [`client`](Self::client) and [`try_connect`](ClientBuilder::try_connect).
    #[track_caller]
    pub fn connect(&self, path: &str) -> impl Future<Output = TestClient> + use<> {
        self.client(path).connect()
    }

    /// A client with headers, a query or subprotocols, which is not connected yet.
    pub fn client(&self, path: &str) -> ClientBuilder {
        ClientBuilder::new(self.inner.clone(), path)
    }

    /// Sends an HTTP request to the application and returns the whole response, of at most 16 MiB. The request's URI is a
    /// path, with or without a query.
    ///
    /// ```
    /// # use shardcast::testing::TestServer;
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() {
    /// # let app = |_: &shardcast::Engine| axum::Router::new().route("/notice", axum::routing::post(|text: String| async { text }));
    /// # let server = TestServer::in_memory(app).await;
    /// let response = server.request(http::Request::post("/notice").body("restart at noon".into()).unwrap()).await;
    /// assert_eq!(response.status(), 200);
    /// # assert_eq!(response.body(), "restart at noon");
    /// # }
    /// ```
    ///
    /// # Panics
    /// If no response arrives in time.
    #[track_caller]
    pub fn request(&self, request: Request<Body>) -> impl Future<Output = Response<Bytes>> + use<> {
        let (caller, inner) = (Location::caller(), self.inner.clone());
        async move {
            let exchange = async {
                let (response, _) = exchange(&inner, None, request).await?;
                let (parts, body) = response.into_parts();
                let body = axum::body::to_bytes(Body::new(body), BODY_BYTES_MAX).await;
                Ok(Response::from_parts(parts, body.map_err(io::Error::other)?))
            };
            match inner.waiting.within::<_>(exchange).await {
                Some(Ok(response)) => response,
                Some(Err::<_, io::Error>(error)) => panic!("at {caller}: no response: {error}"),
                None => panic!("at {caller}: no response within {:?}", inner.waiting.timeout),
            }
        }
    }

    /// In memory: returns when everything is at rest, which means that nothing more happens until time passes or the test
    /// does something. Most methods of clients do this themselves.
    ///
    /// # Panics
    /// Over sockets, where there is no such moment: wait for a message or for a [condition](Self::until). If two parties
    /// answer each other for ever.
    pub async fn settle(&self) {
        self.driver("settle").settle().await;
    }

    /// In memory: lets so much time pass, and everything happen that is due meanwhile, in order: heartbeats, timeouts,
    /// expiry, presence, rates, and tokio's timers, to the millisecond. At rest before and afterwards.
    ///
    /// # Panics
    /// Over sockets, where time passes by itself.
    pub async fn advance(&self, time: Duration) {
        let driver = self.driver("advance");
        driver.settle().await;
        driver.advance(time).await;
    }

    fn driver(&self, method: &str) -> &Driver {
        let driver = self.inner.waiting.driver.as_ref();
        driver.unwrap_or_else(|| panic!("`{method}` is for servers in memory: start it with `in_memory`"))
    }

    /// Waits until a condition is met that sends no message, such as a number of clients or members. It is called again
    /// whenever something may have changed.
    ///
    /// # Panics
    /// If it is not met in time: with `what`, and with everything that all clients have received.
    ///
    /// ```no_run
    /// # async fn example(server: shardcast::testing::TestServer) {
    /// server.until("both are connected", || server.engine().connection_count() == 2).await;
    /// # }
    /// ```
    #[track_caller]
    pub fn until<F: FnMut() -> bool>(&self, what: &str, is_met: F) -> impl Future<Output = ()> + use<'_, F> {
        let (caller, what) = (Location::caller(), what.to_owned());
        async move {
            if !self.inner.waiting.until(is_met).await {
                let timeout = self.inner.waiting.timeout;
                panic!("at {caller}: not within {timeout:?}: {what}{}", self.inner.transcripts());
            }
        }
    }

    /// Ends the engine in order, as [`Engine::shutdown`] does, and returns its report. In memory time passes until it has
    /// ended; a test that calls `Engine::shutdown` itself must spawn that and [advance](Self::advance).
    pub async fn shutdown(&self, within: Duration) -> ShutdownReport {
        let engine = self.engine().clone();
        let Some(driver) = &self.inner.waiting.driver else { return engine.shutdown(within).await };
        let ended = tokio::spawn(async move { engine.shutdown(within).await });
        driver.settle().await;
        let step = (within / 100).max(Duration::from_millis(1));
        while !ended.is_finished() {
            driver.advance(step).await;
        }
        ended.await.expect("the engine ends")
    }

    pub(super) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }
}

impl Inner {
    fn new(place: Place, waiting: Waiting) -> Self {
        Self { place, waiting, transcripts: Mutex::default(), clients: AtomicUsize::new(0) }
    }

    /// Opens a stream to the application.
    async fn dial(&self, from: Option<IpAddr>) -> io::Result<Wire> {
        let socket = match &self.place {
            Place::Port(address) => {
                let socket = TcpSocket::new_v4()?;
                socket.set_recv_buffer_size(KERNEL_BUFFER_BYTES as u32)?;
                if let Some(from) = from {
                    socket.bind((from, 0).into())?;
                }
                let stream = socket.connect(*address).await?;
                stream.set_nodelay(true)?;
                Socket::Tcp(stream)
            }
            Place::Memory { app, ports } => {
                let (client, server) = UnixStream::pair()?;
                SockRef::from(&server).set_send_buffer_size(KERNEL_BUFFER_BYTES)?;
                let from = from.unwrap_or(Ipv4Addr::LOCALHOST.into());
                let address = SocketAddr::from((from, ports.fetch_add(1, Relaxed))); // Relaxed: any order
                let service = TowerToHyperService::new(app.clone().layer(Extension(ConnectInfo(address))));
                tokio::spawn(async move {
                    let http = auto::Builder::new(TokioExecutor::new());
                    // It fails if the client ends the stream, which the client's side shows.
                    let _ = http.serve_connection_with_upgrades(TokioIo::new(server), service).await;
                });
                Socket::Unix(client)
            }
        };
        Ok(Wire::new(socket, self.waiting.driver.clone()))
    }

    fn host(&self) -> String {
        match self.place {
            Place::Port(address) => address.to_string(),
            Place::Memory { .. } => "memory.test".to_owned(),
        }
    }

    /// Of a new client.
    pub(super) fn transcript(&self, place: &str) -> Arc<Transcript> {
        let number = self.clients.fetch_add(1, Relaxed) + 1;
        let transcript = Arc::new(Transcript::new(format!("client {number} ({place})")));
        self.transcripts.lock().unwrap_or_else(PoisonError::into_inner).push(transcript.clone());
        transcript
    }

    /// Everything that all clients have received, for a failed assertion.
    fn transcripts(&self) -> String {
        let transcripts = self.transcripts.lock().unwrap_or_else(PoisonError::into_inner);
        transcripts.iter().map(|transcript| format!("\n  {}", transcript.text(usize::MAX))).collect()
    }
}

/// The future of what hyper gives after an upgrade, and the response before it.
type Exchanged = (Response<hyper::body::Incoming>, hyper::upgrade::OnUpgrade);

async fn exchange(inner: &Inner, from: Option<IpAddr>, mut request: Request<Body>) -> io::Result<Exchanged> {
    let wire = inner.dial(from).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(wire)).await.map_err(io::Error::other)?;
    tokio::spawn(async move {
        let _ = connection.with_upgrades().await; // its error is that of the request, too
    });
    let host = HeaderValue::try_from(inner.host()).map_err(io::Error::other)?;
    request.headers_mut().entry(header::HOST).or_insert(host);
    let mut response = sender.send_request(request).await.map_err(io::Error::other)?;
    let upgrade = hyper::upgrade::on(&mut response);
    Ok((response, upgrade))
}

/// A client that is not connected yet. Made by [`TestServer::client`] and [`TestHub::client`](super::TestHub::client).
#[must_use = "nothing is sent before `connect` or `try_connect`"]
pub struct ClientBuilder<S = RawMessage, R = RawMessage, C = RawCodec> {
    server: Arc<Inner>,
    path: String,
    headers: HeaderMap,
    protocols: Vec<String>,
    from: Option<IpAddr>,
    types: PhantomData<fn(S, C) -> R>,
}

impl<S, R, C> fmt::Debug for ClientBuilder<S, R, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientBuilder").field("path", &self.path).finish_non_exhaustive()
    }
}

impl<S, R, C> ClientBuilder<S, R, C> {
    pub(super) fn new(server: Arc<Inner>, path: &str) -> Self {
        let (path, headers, protocols) = (path.to_owned(), HeaderMap::new(), Vec::new());
        Self { server, path, headers, protocols, from: None, types: PhantomData }
    }

    /// Sends this header with the upgrade, too.
    ///
    /// # Panics
    /// If it is not a valid header.
    pub fn header(
        mut self,
        name: impl TryInto<HeaderName, Error: fmt::Debug>,
        value: impl TryInto<HeaderValue, Error: fmt::Debug>,
    ) -> Self {
        let name = name.try_into().expect("a valid name of a header");
        self.headers.append(name, value.try_into().expect("a valid value of a header"));
        self
    }

    /// Sends this header, whatever bytes it has.
    pub(super) fn raw_header(mut self, name: HeaderName, value: &[u8]) -> Self {
        let value = HeaderValue::from_bytes(value).expect("a name or metadata without control characters");
        self.headers.insert(name, value);
        self
    }

    /// Adds a parameter to the query. It is percent-encoded.
    pub fn query(mut self, name: &str, value: &str) -> Self {
        let pair = form_urlencoded::Serializer::new(String::new()).append_pair(name, value).finish();
        self.path.push(if self.path.contains('?') { '&' } else { '?' });
        self.path.push_str(&pair);
        self
    }

    /// Offers a subprotocol, after those before.
    pub fn protocol(mut self, protocol: &str) -> Self {
        self.protocols.push(protocol.to_owned());
        self
    }

    /// Connects from this address of the machine, such as 127.0.0.2; in memory from any address.
    pub fn from_address(self, address: IpAddr) -> Self {
        Self { from: Some(address), ..self }
    }

    /// Connects.
    ///
    /// # Panics
    /// If the upgrade is refused: with the status and the body.
    #[track_caller]
    pub fn connect(self) -> impl Future<Output = TestClient<S, R, C>> {
        let (caller, path) = (Location::caller(), self.path.clone());
        async move {
            match self.upgrade(caller).await {
                Ok(client) => client,
                Err(refused) => panic!("at {caller}: {path}: {refused}"),
            }
        }
    }

    /// Connects, or returns how the upgrade was refused.
    ///
    /// # Errors
    /// A response that is not 101.
    ///
    /// # Panics
    /// If no response arrives in time.
    #[track_caller]
    pub fn try_connect(self) -> impl Future<Output = Result<TestClient<S, R, C>, Refused>> {
        self.upgrade(Location::caller())
    }

    async fn upgrade(self, caller: &Location<'_>) -> Result<TestClient<S, R, C>, Refused> {
        let Self { server, path, headers, protocols, from, types: _ } = self;
        let key = generate_key();
        let mut request = Request::get(&path)
            .header(header::CONNECTION, "Upgrade")
            .header(header::UPGRADE, "websocket")
            .header(header::SEC_WEBSOCKET_VERSION, "13")
            .header(header::SEC_WEBSOCKET_KEY, &key);
        if !protocols.is_empty() {
            request = request.header(header::SEC_WEBSOCKET_PROTOCOL, protocols.join(", "));
        }
        let mut request = request.body(Body::empty()).expect("a valid path and valid subprotocols");
        request.headers_mut().extend(headers);
        let upgrading = async {
            let (response, upgrade) = exchange(&server, from, request).await?;
            let (parts, body) = response.into_parts();
            if parts.status != StatusCode::SWITCHING_PROTOCOLS {
                let body = axum::body::to_bytes(Body::new(body), BODY_BYTES_MAX).await;
                let body = String::from_utf8_lossy(&body.map_err(io::Error::other)?).into_owned();
                return Ok(Err(Refused { status: parts.status, headers: parts.headers, body }));
            }
            let upgraded = upgrade.await.map_err(io::Error::other)?;
            let stream = upgraded.downcast::<TokioIo<Wire>>();
            let stream = stream.map_err(|_| io::Error::other("the stream is another one"))?;
            Ok::<_, io::Error>(Ok((parts, stream.io.into_inner(), stream.read_buf)))
        };
        let (response, wire, received) = match server.waiting.within(upgrading).await {
            Some(Ok(upgraded)) => upgraded?,
            Some(Err(error)) => panic!("at {caller}: {path}: no response: {error}"),
            None => panic!("at {caller}: {path}: no response within {:?}", server.waiting.timeout),
        };
        let accept = response.headers.get(header::SEC_WEBSOCKET_ACCEPT).map(HeaderValue::as_bytes);
        assert_eq!(accept, Some(accept_key(key.as_bytes()).as_bytes()), "the answer to another key");
        let (transcript, waiting) = (server.transcript(&path), server.waiting.clone());
        let client = TestClient::open(wire, received.into(), response, transcript, waiting).await;
        if let Some(driver) = &server.waiting.driver {
            driver.settle().await;
        }
        Ok(client.typed_as())
    }
}

/// An upgrade that was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the upgrade was refused with {status}: {body:?}")]
#[non_exhaustive]
pub struct Refused {
    /// The status, such as 401 or 503.
    pub status: StatusCode,
    /// The headers, such as `Retry-After`.
    pub headers: HeaderMap,
    /// The body as text; what is not UTF-8 is replaced.
    pub body: String,
}
