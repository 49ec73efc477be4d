//! Hubs over what is not a plain socket: TLS and HTTP/2, which reach a shard by the bridge.
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
use shardcast::{CloseCode, Hub, Shutdown, WsHubConfig};
use testkit_hub::http_2::http_2;
use testkit_hub::tls::{TlsListener, TlsPair};
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
        let tls = TlsPair::new(&["http/1.1"]);
        // Needed without the feature `tls`: without it the kernel takes some 4 MB for a client that does not read.
        let listener = TlsListener::bind(&tls, |socket| shardcast::prepare_tcp(socket)).await.unwrap();
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

// ---- the end of an engine

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tls_client_that_has_got_everything_and_its_close_is_reported_as_flushed() {
    let engine = engine(2);
    let hub = engine.hub::<CommandHub>(WsHubConfig::default()).unwrap();
    let server = TlsServer::by_axum(command_app(hub.clone())).await;
    let mut readers = Vec::new();
    for _ in 0..3 {
        readers.push(tokio::spawn(server.connect().await.0.rest()));
    }
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
