//! Whom a hub does not get: handshakes that a middleware refuses, and clients without a place after their 101.
//!
//! RawClient clients over real sockets, which end, stay and lie as they like. Does not know how a handshake is checked, whose
//! tests are those of the upgrade.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.

use std::net::SocketAddr;

use axum::Router;
use axum::body::{Body, HttpBody};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn, map_response};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use shardcast::{
    Engine, EngineConfig, Hub, HubContext, RawCodec, Refusal, Serve, ServeError, TrustedProxies,
    WebSocketUpgrade, WsHub, WsHubConfig, serve_hub,
};
use testkit_hub::{
    Client, CommandHub, Server, Stream, Transport, command_app, connect, engine, eventually, logged,
    on_each_transport, within_timeout,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::{mpsc, watch};

/// Tells everybody when it comes, and its id to who it is.
struct Announcer;

impl WsHub for Announcer {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;

    async fn on_connected(&self, ctx: HubContext<Self>) -> Result<(), Refusal> {
        ctx.broadcast("somebody has come".to_owned()).await;
        Ok(())
    }

    async fn on_message(&self, message: String, ctx: HubContext<Self>) {
        ctx.unicast(message).await;
    }
}

async fn announce(ws: WebSocketUpgrade, State(hub): State<Hub<Announcer>>) -> Serve<Announcer> {
    ws.serve(&hub, Announcer)
}

fn limited(config: EngineConfig) -> Engine {
    Engine::start(EngineConfig { shards: Some(1), pin: false, ..config }).unwrap()
}

fn handshake(path: &str, connection: &str, more: &str) -> Vec<u8> {
    let request = format!(
        "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: {connection}\r\nupgrade: websocket\r\n\
         sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n{more}\r\n"
    );
    request.into_bytes()
}

/// Gives back the head of the response.
async fn shake_hands(stream: &mut Stream, path: &str, more: &str) -> String {
    within_timeout(stream.write_all(&handshake(path, "Upgrade", more))).await.unwrap();
    within_timeout(stream.flush()).await.unwrap();
    head(stream).await
}

async fn head(stream: &mut Stream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(within_timeout(stream.read_u8()).await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

async fn replaced(_: Response) -> impl IntoResponse {
    StatusCode::FORBIDDEN
}

/// By a middleware that looks at the body first.
async fn replaced_after_a_question(response: Response) -> impl IntoResponse {
    assert!(!response.body().is_end_stream());
    StatusCode::FORBIDDEN
}

async fn replaced_and_closed(_: Response) -> impl IntoResponse {
    (StatusCode::FORBIDDEN, [(header::CONNECTION, "close")])
}

async fn changed(mut response: Response) -> Response {
    *response.status_mut() = StatusCode::FORBIDDEN;
    response
}

async fn changed_and_closed(mut response: Response) -> Response {
    *response.status_mut() = StatusCode::FORBIDDEN;
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

/// As a middleware does that logs bodies.
async fn buffered(response: Response) -> Response {
    let (head, body) = response.into_parts();
    let body = axum::body::to_bytes(body, 1024).await.unwrap();
    Response::from_parts(head, Body::from(body))
}

/// Announcers behind every way to refuse them, and one that lets them in.
fn announcers(hub: Hub<Announcer>) -> Router {
    let route = || any(announce);
    Router::new()
        .route("/replaced", route().layer(map_response(replaced)))
        .route("/replaced-after-a-question", route().layer(map_response(replaced_after_a_question)))
        .route("/replaced-and-closed", route().layer(map_response(replaced_and_closed)))
        .route("/changed", route().layer(map_response(changed)))
        .route("/changed-and-closed", route().layer(map_response(changed_and_closed)))
        .route("/changed-behind-a-buffer", route().layer(map_response(buffered)).layer(map_response(changed)))
        .route("/ws", route())
        .with_state(hub)
}

const REFUSING: [&str; 6] = [
    "/replaced",
    "/replaced-after-a-question",
    "/replaced-and-closed",
    "/changed",
    "/changed-and-closed",
    "/changed-behind-a-buffer",
];

on_each_transport!(a_client_refused_by_a_middleware_never_enters_the_hub);
async fn a_client_refused_by_a_middleware_never_enters_the_hub(transport: Transport) {
    let engine = limited(EngineConfig::default());
    let server = Server::start_over(transport, announcers(engine.hub(WsHubConfig::default()).unwrap())).await;
    let mut neighbour = Client::connect(server.url("/ws")).await;
    neighbour.send_text("there").await;
    neighbour.recv_texts(&["there"]).await;
    for path in REFUSING {
        for connection in ["Upgrade", "close, Upgrade"] {
            for ends_at_once in [false, true] {
                let mut client = transport.connect(server.address).await.unwrap();
                if ends_at_once {
                    // Together with the handshake, so that the server sees both at once.
                    socket2::SockRef::from(client.tcp()).set_tcp_cork(true).unwrap();
                }
                client.write_all(&handshake(path, connection, "")).await.unwrap();
                client.flush().await.unwrap();
                if ends_at_once {
                    client.shutdown().await.unwrap();
                }
                if transport == Transport::Plain || !ends_at_once {
                    // Over TLS hyper reads such an end together with the request, and answers no more.
                    let head = head(&mut client).await;
                    assert!(head.starts_with("HTTP/1.1 403 "), "{path}: {head}");
                }
                let _ = client.shutdown().await; // the server may have been first
                let _ = within_timeout(client.read_to_end(&mut Vec::new())).await;
            }
        }
    }
    eventually(1, || engine.connection_count()).await;
    neighbour.send_text("nobody").await;
    neighbour.recv_texts(&["nobody"]).await;
}

on_each_transport!(a_refused_client_gives_its_place_back_at_once_however_long_it_stays);
async fn a_refused_client_gives_its_place_back_at_once_however_long_it_stays(transport: Transport) {
    let engine = limited(EngineConfig { max_connections: 1, ..EngineConfig::default() });
    let server = Server::start_over(transport, announcers(engine.hub(WsHubConfig::default()).unwrap())).await;
    let mut staying = Vec::new();
    for path in ["/replaced", "/changed", "/replaced-and-closed", "/changed-and-closed"] {
        let mut client = transport.connect(server.address).await.unwrap();
        // Each needs the one place that there is.
        let head = shake_hands(&mut client, path, "").await;
        assert!(head.starts_with("HTTP/1.1 403 "), "{path}: {head}");
        staying.push(client);
        eventually(0, || engine.connection_count()).await;
    }
    let mut good = Client::connect(server.url("/ws")).await;
    good.send_text("there").await;
    good.recv_texts(&["there"]).await;
}

on_each_transport!(a_connection_goes_on_with_requests_and_handshakes_after_a_refused_one);
async fn a_connection_goes_on_with_requests_and_handshakes_after_a_refused_one(transport: Transport) {
    let engine = limited(EngineConfig { max_connections: 1, ..EngineConfig::default() });
    let hub = engine.hub(WsHubConfig::default()).unwrap();
    let app = announcers(hub).route("/page", any(async || "page"));
    let server = Server::start_over(transport, app).await;
    let mut client = transport.connect(server.address).await.unwrap();
    for _ in 0..3 {
        assert!(shake_hands(&mut client, "/replaced", "").await.starts_with("HTTP/1.1 403 "));
        eventually(0, || engine.connection_count()).await;
        client.write_all(b"GET /page HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        client.flush().await.unwrap();
        assert!(head(&mut client).await.starts_with("HTTP/1.1 200 "));
        client.read_exact(&mut [0; 4]).await.unwrap();
    }
    assert!(shake_hands(&mut client, "/ws", "").await.starts_with("HTTP/1.1 101 "));
    eventually(1, || engine.connection_count()).await;
    drop(client);
    eventually(0, || engine.connection_count()).await;
}

on_each_transport!(an_answer_that_nobody_waits_for_any_more_holds_no_place);
async fn an_answer_that_nobody_waits_for_any_more_holds_no_place(transport: Transport) {
    let engine = limited(EngineConfig { max_connections: 1, ..EngineConfig::default() });
    let (waiting, mut waits) = mpsc::unbounded_channel();
    let hold = from_fn(move |request: Request, next: Next| {
        let waiting = waiting.clone();
        async move {
            let response = next.run(request).await;
            waiting.send(()).unwrap();
            std::future::pending::<()>().await;
            response
        }
    });
    let app = announcers(engine.hub(WsHubConfig::default()).unwrap());
    let server = Server::start_over(transport, app.layer(hold)).await;
    let mut client = transport.connect(server.address).await.unwrap();
    client.write_all(&handshake("/ws", "Upgrade", "")).await.unwrap();
    client.flush().await.unwrap();
    within_timeout(waits.recv()).await.unwrap();
    assert_eq!(engine.connection_count(), 1);
    drop(client);
    eventually(0, || engine.connection_count()).await;
}

/// A body in another that says nothing of itself, as a compressing middleware makes it.
struct Mute(Body);

impl HttpBody for Mute {
    type Data = axum::body::Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<hyper::body::Frame<Self::Data>, Self::Error>>> {
        std::pin::Pin::new(&mut self.0).poll_frame(context)
    }
}

/// What tower-http's `CompressionLayer` does to a response for a client that takes gzip.
async fn compressed(response: Response) -> Response {
    let is_small = response.body().size_hint().exact().is_some_and(|bytes| bytes < 32);
    if is_small || response.headers().contains_key(header::CONTENT_ENCODING) {
        return response;
    }
    let mut response = response.map(|body| Body::new(Mute(body)));
    response.headers_mut().insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    response
}

on_each_transport!(a_middleware_that_touches_head_or_body_of_a_101_does_not_cost_the_connection);
async fn a_middleware_that_touches_head_or_body_of_a_101_does_not_cost_the_connection(transport: Transport) {
    let hub = engine(1).hub::<CommandHub>(WsHubConfig::default()).unwrap();
    let plain = || command_app(hub.clone());
    let apps = [
        ("wrapped", plain().layer(map_response(async |response: Response| response.map(Body::new)))),
        ("buffered", plain().layer(map_response(buffered))),
        ("emptied", plain().layer(map_response(async |response: Response| response.map(|_| Body::empty())))),
        ("compressed", plain().layer(map_response(compressed))),
        (
            "another header",
            plain().layer(map_response(async |response: Response| ([("x-served-by", "me")], response))),
        ),
        (
            "rebuilt",
            plain().layer(map_response(async |response: Response| {
                let (head, body) = response.into_parts();
                (head.status, head.headers, body)
            })),
        ),
        (
            "kept",
            plain().layer(map_response(async |response: Response| {
                let copy = response.extensions().clone();
                tokio::task::yield_now().await;
                drop(copy);
                response
            })),
        ),
    ];
    for (name, app) in apps {
        let server = Server::start_over(transport, app).await;
        let headers = [("accept-encoding", "gzip, br")];
        let (mut peer, response) =
            within_timeout(Client::try_connect(server.url("/ws"), &headers)).await.unwrap();
        assert_ne!(
            response.headers().get(header::CONTENT_ENCODING),
            Some(&HeaderValue::from_static("gzip")),
            "{name}"
        );
        assert!(!response.headers().contains_key(header::CONTENT_LENGTH), "{name}");
        assert!(!response.headers().contains_key(header::TRANSFER_ENCODING), "{name}");
        peer.recv_text().await; // its id
        peer.send_text("hello").await;
        peer.recv_texts(&["hello"]).await;
        peer.leave().await;
    }
    eventually(0, || hub.len()).await;
}

/// A route that hands over what the handshake has left, and tells what became of that.
fn by_hand(
    hub: Hub<CommandHub>,
    may_go_on: watch::Receiver<bool>,
) -> (Router, mpsc::UnboundedReceiver<Outcome>) {
    let (outcomes, outcome) = mpsc::unbounded_channel();
    let serve = async move |ws: WebSocketUpgrade| {
        ws.on_upgrade(async move |socket| {
            may_go_on.clone().wait_for(|may| *may).await.unwrap();
            outcomes.send(hub.serve(socket, CommandHub).await).unwrap();
        })
    };
    (Router::new().route("/ws", any(serve)), outcome)
}

type Outcome = Result<(), ServeError>;

on_each_transport!(a_client_without_a_place_after_its_handshake_is_told_to_come_back_later);
async fn a_client_without_a_place_after_its_handshake_is_told_to_come_back_later(transport: Transport) {
    let engine = limited(EngineConfig { max_connections: 1, ..EngineConfig::default() });
    let (_go, may_go_on) = watch::channel(true);
    let (app, mut outcome) = by_hand(engine.hub(WsHubConfig::default()).unwrap(), may_go_on);
    let server = Server::start_over(transport, app).await;
    let (_first, _) = connect(&server.url("/ws")).await;
    within_timeout(outcome.recv()).await.unwrap().unwrap();
    let mut second = Client::connect(server.url("/ws")).await;
    second.send_text("what it says does not destroy what it is told").await;
    assert_eq!(second.closed().await.0, 1013);
    assert!(matches!(within_timeout(outcome.recv()).await, Some(Err(ServeError::Full))));
    assert_eq!(engine.connection_count(), 1);
}

on_each_transport!(a_client_whose_handshake_ends_in_a_shutdown_is_told_that_the_server_goes);
async fn a_client_whose_handshake_ends_in_a_shutdown_is_told_that_the_server_goes(transport: Transport) {
    let engine = limited(EngineConfig::default());
    let hub = engine.hub::<CommandHub>(WsHubConfig::default()).unwrap();
    let (go, may_go_on) = watch::channel(false);
    let (app, mut outcome) = by_hand(hub.clone(), may_go_on.clone());
    // And one that has its place, but whose answer comes late.
    let (held, mut is_held) = mpsc::unbounded_channel();
    let hold = map_response(move |response: Response| {
        let (mut may_go_on, held) = (may_go_on.clone(), held.clone());
        async move {
            held.send(()).unwrap();
            may_go_on.wait_for(|may| *may).await.unwrap();
            response
        }
    });
    let server = Server::start_over(transport, app.nest("/late", command_app(hub).layer(hold))).await;
    let by_hand = Client::connect(server.url("/ws")).await;
    let late = tokio::spawn(Client::connect(server.url("/late/ws")));
    within_timeout(is_held.recv()).await.unwrap();
    let shutdown = tokio::spawn({
        let engine = engine.clone();
        async move { engine.shutdown(std::time::Duration::from_millis(100)).await }
    });
    within_timeout(shutdown).await.unwrap();
    go.send(true).unwrap();
    assert_eq!(by_hand.closed().await.0, 1001);
    assert_eq!(within_timeout(late).await.unwrap().closed().await.0, 1001);
    assert!(matches!(within_timeout(outcome.recv()).await, Some(Err(ServeError::Stopping))));
}

on_each_transport!(a_websocket_that_an_application_drops_or_cannot_serve_ends_with_a_close_frame);
async fn a_websocket_that_an_application_drops_or_cannot_serve_ends_with_a_close_frame(transport: Transport) {
    let bad = WsHubConfig { outbox_frames: 0, ..WsHubConfig::default() };
    let app = Router::new()
        .route("/dropped", any(async |ws: WebSocketUpgrade| ws.on_upgrade(async |_| {})))
        .route(
            "/panicked",
            any(async |ws: WebSocketUpgrade| {
                ws.on_upgrade(async |_socket| panic!("this is a test of panics in callbacks"))
            }),
        )
        .route(
            "/bad-config",
            any(async move |ws: WebSocketUpgrade| {
                ws.on_upgrade(async move |socket| serve_hub(socket, CommandHub, &bad).await)
            }),
        );
    let server = Server::start_over(transport, app).await;
    for path in ["/dropped", "/panicked", "/bad-config"] {
        let peer = Client::connect(server.url(path)).await;
        assert_eq!(peer.closed().await.0, 1011, "{path}");
    }
}

// ---- limits by address

fn by_address(max: usize) -> Engine {
    limited(EngineConfig { max_connections_per_address: Some(max), ..EngineConfig::default() })
}

#[tokio::test]
async fn a_limit_by_address_that_sees_no_address_says_so_once_and_holds_all_the_same() {
    let (_guard, logged) = logged();
    let engine = by_address(1);
    // As the README's shortest program does it, without connect info.
    let server = Server::start(command_app(engine.hub(WsHubConfig::default()).unwrap())).await;
    let (first, _) = connect(&server.url("/ws")).await;
    for _ in 0..3 {
        assert_eq!(Client::connect(server.url("/ws")).await.closed().await.0, 1013);
    }
    assert_eq!(logged("into_make_service_with_connect_info"), 1, "once, with what to write instead");
    first.leave().await;
    eventually(0, || engine.connection_count()).await;
    connect(&server.url("/ws")).await;
}

#[tokio::test]
async fn a_limit_by_address_sees_through_trusted_proxies_and_through_nobody_else() {
    for (trusted, header, is_seen) in [
        ("127.0.0.0/8", "x-forwarded-for", true),
        ("192.0.2.0/24", "x-forwarded-for", false),
        ("127.0.0.0/8", "forwarded", false), // not what these proxies write
    ] {
        let engine = by_address(1);
        let hub = engine.hub::<CommandHub>(WsHubConfig::default()).unwrap();
        let proxies = TrustedProxies::x_forwarded_for([trusted]).unwrap();
        let serve = async move |ws: WebSocketUpgrade| {
            ws.trusted_proxies(&proxies).serve(&hub, CommandHub).into_response()
        };
        let server = Server::start_with_addresses(Router::new().route("/ws", any(serve))).await;
        let connect = async |client: &str| {
            let value = if header == "forwarded" { format!("for={client}") } else { client.to_owned() };
            within_timeout(Client::try_connect(server.url("/ws"), &[(header, &value)])).await
        };
        let _first = connect("198.51.100.1").await.unwrap();
        assert!(connect("198.51.100.1").await.is_err(), "{trusted} {header}");
        let second = connect("198.51.100.2").await;
        assert_eq!(second.is_ok(), is_seen, "{trusted} {header}");
    }
}

#[tokio::test]
async fn an_application_learns_the_client_s_address_before_and_after_the_handshake() {
    let (seen, mut was_seen) = mpsc::unbounded_channel();
    let handler = async move |mut ws: WebSocketUpgrade, headers: HeaderMap| {
        let proxies = TrustedProxies::forwarded(["127.0.0.1"]).unwrap();
        if let Some(address) = headers.get("cdn-client") {
            ws.set_peer_address(address.to_str().unwrap().parse().unwrap());
        }
        let ws = ws.trusted_proxies(&proxies);
        let before = ws.peer_address();
        ws.on_upgrade(async move |socket| seen.send((before, socket.peer_address())).unwrap())
    };
    let app = Router::new().route("/ws", any(handler));
    let (blind, sighted) = (Server::start(app.clone()).await, Server::start_with_addresses(app).await);
    let ip = |text: &str| Some(text.parse::<std::net::IpAddr>().unwrap());
    let behind = ("forwarded", r#"for="[2001:db8::1]:4711""#);
    let told = ("cdn-client", "::ffff:203.0.113.5");
    for (server, headers, before, after) in [
        (&sighted, &[][..], ip("127.0.0.1"), ip("127.0.0.1")),
        (&blind, &[], None, ip("127.0.0.1")),
        (&sighted, &[behind], ip("2001:db8::1"), ip("2001:db8::1")),
        (&blind, &[behind], None, ip("2001:db8::1")),
        (&blind, &[behind, told], ip("203.0.113.5"), ip("203.0.113.5")),
    ] {
        let _peer = within_timeout(Client::try_connect(server.url("/ws"), headers)).await.unwrap();
        assert_eq!(within_timeout(was_seen.recv()).await.unwrap(), (before, after), "{headers:?}");
    }
}

// ---- what the log says

/// Shakes hands until the log has the line: there is one in a second for all tests of this process.
async fn logs(address: SocketAddr, path: &str, more: &str, logged: impl Fn(&str) -> usize, line: &str) {
    within_timeout(async {
        while logged(line) == 0 {
            let mut client = Transport::Plain.connect(address).await.unwrap();
            shake_hands(&mut client, path, more).await;
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_refused_origin_is_logged_with_what_it_was_compared_with() {
    let (_guard, logged) = logged();
    let app = Router::new()
        .route(
            "/ws",
            any(async |ws: WebSocketUpgrade| {
                ws.allowed_origins(["https://a.test/", "http://b.test:80"]).on_upgrade(async |_| {})
            }),
        )
        .route(
            "/wrong",
            any(async |ws: WebSocketUpgrade| {
                ws.allowed_origins(["https://a.test", "https://*.c.test"]).on_upgrade(async |_| {})
            }),
        );
    let server = Server::start(app).await;
    let line = r#"origin="https://c.test" allowed=https://a.test, http://b.test"#;
    logs(server.address, "/ws", "origin: https://c.test\r\n", &logged, line).await;
    let line = "`https://*.c.test` can never be the origin of a page";
    logs(server.address, "/wrong", "origin: https://a.test\r\n", &logged, line).await;
}

#[tokio::test]
async fn a_client_that_offers_subprotocols_and_gets_none_leaves_a_line_in_the_log() {
    let (_guard, logged) = logged();
    let app = Router::new()
        .route("/ws", any(async |ws: WebSocketUpgrade| ws.protocols(["chat.v2"]).on_upgrade(async |_| {})));
    let server = Server::start(app).await;
    let more = "sec-websocket-protocol: chat.v1\r\n";
    logs(server.address, "/ws", more, &logged, r#"no subprotocol was selected"#).await;
    assert!(logged(r#"offered="chat.v1""#) > 0);
}
