//! Hubs over what is not a plain socket: TLS, and HTTP/2 and other streams, which reach a shard by the bridge.
//!
//! One hub, and clients that come every way there is. Does not know the bridge itself, whose tests stand with it.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::serve::Listener;
use hyper::client::conn::http2;
use hyper::upgrade::Upgraded;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use shardcast::{BroadcastPolicy, CloseCode, Hub, Metrics, Shutdown, Tally, WsHubConfig};
use testkit_hub::http_2::http_2;
use testkit_hub::tls::{Buffered, TlsListener, TlsPair};
use testkit_hub::{Client, CommandHub, Server, command_app, engine, eventually, within_timeout};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::client;

/// One application behind TLS.
struct TlsServer {
    address: SocketAddr,
    tls: TlsPair,
    task: JoinHandle<()>,
}

impl Drop for TlsServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl TlsServer {
    async fn by_axum(app: Router) -> Self {
        Self::on(app, |listener| listener).await
    }

    /// With streams that no shard can own, so that they are bridged.
    async fn bridged(app: Router) -> Self {
        Self::on(app, Buffered).await
    }

    async fn on<L>(app: Router, wrap: impl FnOnce(TlsListener) -> L) -> Self
    where
        L: Listener<Addr = SocketAddr>,
    {
        let tls = TlsPair::new(&["http/1.1"]);
        // Needed without the feature `tls`: without it the kernel takes some 4 MB for a client that does not read.
        let listener = TlsListener::bind(&tls, |socket| shardcast::prepare_tcp(socket)).await.unwrap();
        let listener = wrap(listener);
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { address, tls, task }
    }

    /// As an application would without `axum::serve`, for HTTP/2 over TLS.
    async fn by_hyper(app: Router) -> Self {
        let tls = TlsPair::new(&["h2"]);
        let acceptor = tls.acceptor();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(async move {
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                let (acceptor, service) = (acceptor.clone(), TowerToHyperService::new(app.clone()));
                tokio::spawn(async move {
                    let stream = TokioIo::new(acceptor.accept(socket).await.unwrap());
                    let mut builder = auto::Builder::new(TokioExecutor::new());
                    builder.http2().enable_connect_protocol();
                    let _ = builder.serve_connection_with_upgrades(stream, service).await;
                });
            }
        });
        Self { address, tls, task }
    }

    async fn stream(&self) -> client::TlsStream<TcpStream> {
        let socket = TcpStream::connect(self.address).await.unwrap();
        within_timeout(self.tls.connect(socket)).await.unwrap()
    }

    /// A client behind TLS, and its id.
    async fn connect(&self) -> (Client<client::TlsStream<TcpStream>>, shardcast::ConnectionId) {
        let stream = self.stream().await;
        let (socket, _) =
            within_timeout(tokio_tungstenite::client_async("wss://localhost/ws", stream)).await.unwrap();
        let mut peer = Client { socket };
        let id = peer.recv_text().await.parse().unwrap();
        (peer, id)
    }
}

/// A client on a stream of an HTTP/2 connection, and its id.
async fn connect_by_http_2(
    connection: &mut http2::SendRequest<Body>,
) -> (Client<TokioIo<Upgraded>>, shardcast::ConnectionId) {
    let mut peer = testkit_hub::http_2::connect_by_http_2(connection).await;
    let id = peer.recv_text().await.parse().unwrap();
    (peer, id)
}

fn command_hub(config: WsHubConfig) -> Hub<CommandHub> {
    engine(2).hub::<CommandHub>(config).unwrap()
}

#[tokio::test]
async fn a_hub_talks_over_tls_and_both_sides_can_end_it() {
    let hub = command_hub(WsHubConfig::default());
    let server = TlsServer::by_axum(command_app(hub.clone())).await;
    let (mut ada, _) = server.connect().await;
    let (mut bob, bob_id) = server.connect().await;
    for text in ["hello", "žluťoučký"] {
        ada.send_text(format!("all {text}")).await;
        ada.recv_texts(&[text]).await;
        bob.recv_texts(&[text]).await;
    }
    hub.disconnect(bob_id, CloseCode(4321), "enough").await.unwrap();
    assert_eq!(bob.closed().await, (4321, "enough".to_owned()));
    assert_eq!(ada.leave().await, Vec::<String>::new());
    eventually(0, || hub.len()).await;
}

#[tokio::test]
async fn a_hub_talks_over_http_2_on_several_streams_of_one_connection() {
    let hub = command_hub(WsHubConfig::default());
    let server = Server::start(command_app(hub.clone())).await;
    let mut connection = http_2(TcpStream::connect(server.address).await.unwrap()).await;
    let (mut ada, ada_id) = connect_by_http_2(&mut connection).await;
    let (mut bob, bob_id) = connect_by_http_2(&mut connection).await;
    assert_ne!(ada_id, bob_id);
    ada.send_text("all hello").await;
    ada.recv_texts(&["hello"]).await;
    bob.recv_texts(&["hello"]).await;
    bob.send_text("end 4000 I leave").await;
    assert_eq!(bob.closed().await, (4000, "I leave".to_owned()));
    // The other stream goes on.
    eventually(1, || hub.len()).await;
    ada.send_text("all alone").await;
    ada.recv_texts(&["alone"]).await;
    ada.leave().await;
    eventually(0, || hub.len()).await;
}

#[tokio::test]
async fn a_hub_talks_over_http_2_within_tls() {
    let hub = command_hub(WsHubConfig::default());
    let server = TlsServer::by_hyper(command_app(hub.clone())).await;
    let stream = server.stream().await;
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(b"h2".as_slice()));
    let mut connection = http_2(stream).await;
    let (mut peer, _) = connect_by_http_2(&mut connection).await;
    peer.send_text("all hello").await;
    peer.recv_texts(&["hello"]).await;
    peer.leave().await;
    eventually(0, || hub.len()).await;
}

#[tokio::test]
async fn one_broadcast_reaches_clients_that_came_every_way_in_one_order() {
    let hub = command_hub(WsHubConfig::default());
    let (plain, secure) =
        (Server::start(command_app(hub.clone())).await, TlsServer::by_axum(command_app(hub.clone())).await);
    let mut connection = http_2(TcpStream::connect(plain.address).await.unwrap()).await;
    let (mut ada, _) = testkit_hub::connect(&plain.url("/ws")).await;
    let (mut bob, _) = secure.connect().await;
    let (mut cyd, cyd_id) = connect_by_http_2(&mut connection).await;
    for round in 0..30 {
        ada.send_text(format!("all plain {round}")).await;
        bob.send_text(format!("all TLS {round}")).await;
        cyd.send_text(format!("all HTTP/2 {round}")).await;
        let receipt = within_timeout(hub.to_all().deliver(&format!("task {round}"))).await.unwrap();
        assert_eq!(receipt.recipients, 3);
        let mut orders = Vec::new();
        for _ in 0..4 {
            orders.push([ada.recv_text().await, bob.recv_text().await, cyd.recv_text().await]);
        }
        assert!(orders.iter().all(|[first, second, third]| first == second && second == third), "{orders:?}");
    }
    ada.send_text(format!("except {cyd_id} not over HTTP/2")).await;
    ada.send_text("all last").await;
    ada.recv_texts(&["not over HTTP/2", "last"]).await;
    bob.recv_texts(&["not over HTTP/2", "last"]).await;
    cyd.recv_texts(&["last"]).await;
}

#[tokio::test]
async fn messages_of_a_megabyte_go_both_ways_every_way() {
    const BYTES: usize = 1 << 20;
    let hub = command_hub(WsHubConfig { max_message_bytes: 2 * BYTES, ..WsHubConfig::default() });
    let (plain, secure) =
        (Server::start(command_app(hub.clone())).await, TlsServer::by_axum(command_app(hub.clone())).await);
    let mut connection = http_2(TcpStream::connect(plain.address).await.unwrap()).await;
    let (mut ada, _) = testkit_hub::connect(&plain.url("/ws")).await;
    let (mut bob, _) = secure.connect().await;
    let (mut cyd, _) = connect_by_http_2(&mut connection).await;
    // Read by all at the same time: a megabyte is more than what may be on its way to one who does not.
    for sender in 0..3 {
        let text = ["a", "b", "c"][sender].repeat(BYTES);
        let message = format!("all {text}");
        match sender {
            0 => ada.send_text(message).await,
            1 => bob.send_text(message).await,
            _ => cyd.send_text(message).await,
        }
        let (first, second, third) = tokio::join!(ada.recv_text(), bob.recv_text(), cyd.recv_text());
        assert!(first == text && second == text && third == text, "sent by {sender}");
    }
}

#[tokio::test]
async fn a_stalled_tls_client_stalls_nobody_else() {
    const MESSAGES: usize = 60;
    let hub = command_hub(WsHubConfig { outbox_frames: 8, ..WsHubConfig::default() });
    let (plain, secure) =
        (Server::start(command_app(hub.clone())).await, TlsServer::by_axum(command_app(hub.clone())).await);
    let (stalled, stalled_id) = secure.connect().await;
    let (mut ada, _) = testkit_hub::connect(&plain.url("/ws")).await;
    let (mut bob, _) = secure.connect().await;
    let big = "x".repeat(64 << 10);
    for round in 0..MESSAGES {
        // Who does not wait, does not wait: what the stalled client cannot take is kept for it.
        hub.to_all().try_publish(&format!("{round} {big}")).unwrap();
        let (ada_heard, bob_heard) = tokio::join!(ada.recv_text(), bob.recv_text());
        for heard in [ada_heard, bob_heard] {
            assert!(heard.starts_with(&format!("{round} ")) && heard.ends_with(&big));
        }
    }
    let metrics = within_timeout(hub.connection_metrics(stalled_id)).await.unwrap().unwrap();
    assert_eq!(metrics.tally.offered, 1 + MESSAGES as u64);
    assert!(
        metrics.tally.pending() > MESSAGES as u64 / 2,
        "the policy sees the backlog, not the bridge: {metrics:?}"
    );
    // Who awaits it, waits for it, and is let go when it has gone.
    let waiting = {
        let hub = hub.clone();
        tokio::spawn(async move { hub.to_all().deliver(&"awaited".to_owned()).await.unwrap() })
    };
    ada.recv_texts(&["awaited"]).await;
    bob.recv_texts(&["awaited"]).await;
    assert!(!waiting.is_finished());
    drop(stalled);
    let receipt = within_timeout(waiting).await.unwrap();
    assert_eq!((receipt.recipients, receipt.delayed), (3, 1));
    eventually(2, || hub.len()).await;
    ada.send_text("all on we go").await;
    ada.recv_texts(&["on we go"]).await;
    bob.recv_texts(&["on we go"]).await;
}

// ---- what is in a bridge

const MESSAGE_BYTES: usize = 2000;

/// Publishes until nothing more leaves the bridge of the only client, which does not read; returns its counters.
async fn publish_until_stalled(
    hub: &Hub<CommandHub>,
    client: shardcast::ConnectionId,
    bytes: usize,
) -> Tally {
    let message = "x".repeat(bytes);
    let (mut before, mut quiet) = (0, 0);
    while quiet < 100 {
        let tally = within_timeout(hub.connection_metrics(client)).await.unwrap().unwrap().tally;
        quiet = if tally.written == before && tally.pending() > 20 { quiet + 1 } else { 0 };
        before = tally.written;
        if tally.pending() <= 20 {
            hub.to_all().try_publish(&message).unwrap();
        }
        tokio::time::sleep(Duration::from_millis(1)).await; // for the bridge
    }
    within_timeout(hub.connection_metrics(client)).await.unwrap().unwrap().tally
}

/// Nobody is asked whether he lives.
fn quiet() -> WsHubConfig {
    WsHubConfig { heartbeat_interval: None, ..WsHubConfig::default() }
}

#[tokio::test]
async fn what_counts_as_written_over_a_bridge_arrives_although_the_bridge_breaks() {
    let hub = command_hub(quiet());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let app = command_app(hub.clone());
    let server = within_timeout(runtime.spawn(TlsServer::bridged(app))).await.unwrap();
    let (client, id) = server.connect().await;
    let tally = publish_until_stalled(&hub, id, MESSAGE_BYTES).await;
    // The bridge ends with its runtime, with all that is in it. What it has passed on is with the kernel.
    tokio::task::spawn_blocking(move || runtime.shutdown_timeout(testkit_hub::TEST_TIMEOUT)).await.unwrap();
    let (heard, _) = within_timeout(client.rest()).await;
    let (arrived, written) = (1 + heard.len() as u64, tally.written);
    assert!(arrived < tally.offered, "a test of something: {tally:?}");
    assert!(written <= arrived, "{written} messages count as written, and {arrived} have arrived");
}

#[tokio::test]
async fn over_http_2_no_more_counts_as_written_than_the_client_lets_pass() {
    /// The most that the bridge passes on at once.
    const PIECE_BYTES: usize = 8 << 10;
    const WINDOW_BYTES: usize = PIECE_BYTES;
    /// hyper takes three pieces more.
    const PASSED_BYTES: usize = WINDOW_BYTES + 3 * PIECE_BYTES;
    let hub = command_hub(quiet());
    let server = Server::start(command_app(hub.clone())).await;
    let mut client = http2::Builder::new(TokioExecutor::new());
    client.initial_stream_window_size(WINDOW_BYTES as u32);
    let socket = TcpStream::connect(server.address).await.unwrap();
    let mut connection = testkit_hub::http_2::http_2_by(&client, socket).await;
    let (stalled, id) = connect_by_http_2(&mut connection).await;
    let tally = publish_until_stalled(&hub, id, PIECE_BYTES).await;
    assert!(tally.written as usize * PIECE_BYTES <= PASSED_BYTES, "{tally:?}");
    drop(stalled);
}

#[tokio::test]
async fn a_client_behind_a_bridge_that_stops_reading_is_treated_as_its_policy_says() {
    let drops = BroadcastPolicy::DropMessage { timeout: Duration::from_millis(2) };
    let stalls = Duration::from_millis(200);
    for (policy, stall_timeout) in [(drops, None), (BroadcastPolicy::Block, Some(stalls))] {
        let engine = engine(2);
        let config = WsHubConfig { policy, stall_timeout, outbox_frames: 8, ..quiet() };
        let hub = engine.hub::<CommandHub>(config).unwrap();
        let (plain, secure) = (
            Server::start(command_app(hub.clone())).await,
            TlsServer::bridged(command_app(hub.clone())).await,
        );
        let mut connection = http_2(TcpStream::connect(plain.address).await.unwrap()).await;
        let (over_http_2, over_http_2_id) = connect_by_http_2(&mut connection).await;
        let (over_tls, over_tls_id) = secure.connect().await;
        let message = "x".repeat(MESSAGE_BYTES);
        within_timeout(async {
            for id in [over_http_2_id, over_tls_id] {
                loop {
                    let metrics = hub.connection_metrics(id).await.unwrap();
                    let is_noticed = match stall_timeout {
                        Some(_) => metrics.is_none_or(|metrics| metrics.tally.pending() > 100),
                        None => metrics.expect("it stays connected").tally.dropped.timeout > 10,
                    };
                    if is_noticed {
                        break;
                    }
                    hub.to_all().try_publish(&message).unwrap();
                    tokio::time::sleep(Duration::from_millis(1)).await; // time must pass for a client to be too slow
                }
            }
        })
        .await;
        if stall_timeout.is_some() {
            eventually(2, || engine.metrics().ended_slow).await;
            assert_eq!(engine.metrics().tally.dropped.total(), 0);
        } else {
            assert_eq!((hub.len(), engine.metrics().ended_slow), (2, 0));
        }
        drop((over_http_2, over_tls));
        // A shard publishes its counters behind its turn, one after the other: they add up once it rests.
        eventually((0, 0), || {
            let Metrics { connections, tally, .. } = engine.metrics();
            let known = tally.written + tally.dropped.total() + tally.discarded;
            (connections, tally.offered.abs_diff(known))
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_is_not_reported_as_flushed_for_what_is_in_its_bridge() {
    for bytes in [1000, 1 << 20] {
        let engine = engine(2);
        let hub = engine.hub::<CommandHub>(WsHubConfig::default()).unwrap();
        let (plain, secure) = (
            Server::start(command_app(hub.clone())).await,
            TlsServer::bridged(command_app(hub.clone())).await,
        );
        let mut connection = http_2(TcpStream::connect(plain.address).await.unwrap()).await;
        let stalled = (connect_by_http_2(&mut connection).await, secure.connect().await);
        hub.to_all().try_publish(&"x".repeat(bytes)).unwrap();
        let report = within_timeout(engine.shutdown(Duration::from_millis(500))).await;
        assert_eq!((report.flushed, report.cut_off), (0, 2), "{bytes} bytes");
        drop(stalled);
    }
}

// ---- the end of an engine

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_has_got_everything_and_its_close_is_reported_as_flushed() {
    let engine = engine(2);
    let hub = engine.hub::<CommandHub>(WsHubConfig::default()).unwrap();
    let (plain, secure, bridged) = (
        Server::start(command_app(hub.clone())).await,
        TlsServer::by_axum(command_app(hub.clone())).await,
        TlsServer::bridged(command_app(hub.clone())).await,
    );
    let mut connection = http_2(TcpStream::connect(plain.address).await.unwrap()).await;
    let readers = [
        tokio::spawn(connect_by_http_2(&mut connection).await.0.rest()),
        tokio::spawn(secure.connect().await.0.rest()),
        tokio::spawn(bridged.connect().await.0.rest()),
    ];
    hub.to_all().publish(&"last words".to_owned()).await.unwrap();
    let shutdown = Shutdown { close_window: Duration::ZERO, ..Shutdown::within(testkit_hub::TEST_TIMEOUT) };
    let report = within_timeout(engine.shutdown_with(shutdown)).await.unwrap();
    assert_eq!((report.flushed, report.cut_off), (3, 0));
    for reader in readers {
        let heard = within_timeout(reader).await.unwrap();
        assert_eq!(heard, (vec!["last words".to_owned()], Some((1001, String::new()))));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tls_client_is_not_reported_as_flushed_for_what_it_has_not_taken() {
    // Over HTTP/1.1 the shard knows what the client's kernel has acknowledged, and so with the feature `tls` over TLS. A
    // bridge does not know it: so little that all of it is out of the shard's hands at once is not flushed either.
    let is_in_shard = cfg!(feature = "tls");
    for (bytes, is_taken) in [(1000, is_in_shard), (8 << 20, false)] {
        let engine = engine(2);
        let hub = engine.hub::<CommandHub>(WsHubConfig::default()).unwrap();
        let server = TlsServer::by_axum(command_app(hub.clone())).await;
        let mut stalled = Vec::new();
        for _ in 0..3 {
            stalled.push(server.connect().await.0);
        }
        hub.to_all().try_publish(&"x".repeat(bytes)).unwrap();
        // Nobody reads, and so nobody answers a Close.
        let report = within_timeout(engine.shutdown(Duration::from_millis(500))).await;
        let expected = if is_taken { (3, 0) } else { (0, 3) };
        assert_eq!((report.flushed, report.cut_off), expected, "{bytes} bytes");
    }
}
