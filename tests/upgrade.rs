//! The handshake as a client sees it: what is refused with which status and reason, and what is a page view.
//! Raw requests over real sockets, because an HTTP client would not send most of them.
//! Over TCP alone, because what is refused is read in a request that HTTP has taken apart; that a handshake is refused over
//! TLS, too, is in `bad_input.rs` and `refusals.rs`.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.

use std::net::SocketAddr;

use axum::{
    Router,
    extract::Request,
    http::StatusCode,
    middleware::{self, Next},
    response::{Html, IntoResponse, Response},
    routing::any,
};
use shardcast::{AllowedOrigins, UpgradeRejection, WebSocketUpgrade};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};

/// Accepts WebSockets, serves a page, or lets through certain origins only, by the route.
fn app() -> Router {
    Router::new()
        .route("/ws", any(async |ws: WebSocketUpgrade| ws.on_upgrade(async |_| {})))
        .route("/both", any(page_or_socket))
        .route(
            "/ours",
            any(async |ws: WebSocketUpgrade| {
                ws.allowed_origins(["https://example.org"]).on_upgrade(async |_| {})
            }),
        )
}

async fn page_or_socket(ws: Option<WebSocketUpgrade>) -> Response {
    match ws {
        Some(ws) => ws.on_upgrade(async |_| {}),
        None => Html("<h1>hello</h1>").into_response(),
    }
}

async fn serve(app: Router) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    address
}

/// A handshake to be spoiled.
#[derive(Clone)]
struct Handshake {
    start: String,
    headers: Vec<(&'static str, &'static str)>,
    body: &'static [u8],
}

impl Handshake {
    fn to(path: &str) -> Self {
        Self {
            start: format!("GET {path} HTTP/1.1"),
            headers: vec![
                ("host", "localhost"),
                ("connection", "keep-alive, Upgrade"),
                ("upgrade", "websocket"),
                ("sec-websocket-version", "13"),
                ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ],
            body: b"",
        }
    }

    fn start(mut self, start: &str) -> Self {
        self.start = start.to_owned();
        self
    }

    fn without(mut self, name: &str) -> Self {
        self.headers.retain(|header| header.0 != name);
        self
    }

    fn with(self, name: &'static str, value: &'static str) -> Self {
        let mut handshake = self.without(name);
        handshake.headers.push((name, value));
        handshake
    }

    /// Sends it on a connection of its own, ends that, and reads the whole response.
    async fn send(self, address: SocketAddr) -> Answer {
        let mut socket = self.start_sending(address).await;
        socket.shutdown().await.unwrap();
        Answer::read(socket).await
    }

    /// The same, but the connection stays open, and the server may go on waiting.
    async fn send_and_stay(self, address: SocketAddr) -> Answer {
        let mut socket = self.start_sending(address).await;
        let mut response = Vec::new();
        loop {
            response.push(socket.read_u8().await.unwrap());
            if let Some(answer) = Answer::parse(&response)
                && answer.has(&format!("content-length: {}", answer.body.len()))
            {
                return answer;
            }
        }
    }

    async fn start_sending(self, address: SocketAddr) -> TcpStream {
        let mut request = self.start + "\r\n";
        for (name, value) in self.headers {
            request += &format!("{name}: {value}\r\n");
        }
        request += "\r\n";
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.write_all(&[request.as_bytes(), self.body].concat()).await.unwrap();
        socket
    }
}

#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    async fn read(mut socket: TcpStream) -> Self {
        let mut response = Vec::new();
        socket.read_to_end(&mut response).await.unwrap();
        Self::parse(&response).unwrap()
    }

    fn parse(response: &[u8]) -> Option<Self> {
        let response = String::from_utf8_lossy(response); // behind a 101 there are frames
        let (head, body) = response.split_once("\r\n\r\n")?;
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some(Self { status, head: head.to_owned(), body: body.to_owned() })
    }

    #[track_caller]
    fn is(&self, rejection: UpgradeRejection) {
        assert_eq!(self.status, rejection.status(), "{self:?}");
        assert_eq!(self.body, rejection.to_string(), "{self:?}");
        assert!(self.has("content-type: text/plain; charset=utf-8"), "{self:?}");
    }

    fn has(&self, header: &str) -> bool {
        self.head.lines().any(|line| line == header)
    }
}

#[tokio::test]
async fn a_good_handshake_is_answered_with_101_and_the_accept_key() {
    let answer = Handshake::to("/ws").send(serve(app()).await).await;
    assert_eq!(answer.status, 101);
    for header in
        ["connection: upgrade", "upgrade: websocket", "sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo="]
    {
        assert!(answer.has(header), "{answer:?}");
    }
    assert!(!answer.head.contains("sec-websocket-protocol"), "{answer:?}");
}

#[tokio::test]
async fn a_handshake_that_is_no_get_is_refused_with_400() {
    let address = serve(app()).await;
    let answer =
        Handshake::to("/ws").start("POST /ws HTTP/1.1").with("content-length", "0").send(address).await;
    answer.is(UpgradeRejection::NotGet);
    assert_eq!(answer.status, 400);
}

#[tokio::test]
async fn a_handshake_without_the_hop_by_hop_headers_is_refused_with_400() {
    let address = serve(app()).await;
    for handshake in
        [Handshake::to("/ws").without("connection"), Handshake::to("/ws").with("connection", "keep-alive")]
    {
        let answer = handshake.send(address).await;
        answer.is(UpgradeRejection::NoConnectionUpgrade);
        assert_eq!(answer.status, 400);
    }
    for handshake in [Handshake::to("/ws").without("upgrade"), Handshake::to("/ws").with("upgrade", "h2c")] {
        let answer = handshake.send(address).await;
        answer.is(UpgradeRejection::NoUpgradeWebSocket);
        assert_eq!(answer.status, 400);
    }
}

#[tokio::test]
async fn a_handshake_with_a_bad_key_is_refused_with_400() {
    let address = serve(app()).await;
    let good = Handshake::to("/ws");
    let mut twice = good.clone();
    twice.headers.push(("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="));
    for handshake in [
        good.clone().without("sec-websocket-key"),
        good.clone().with("sec-websocket-key", ""),
        good.clone().with("sec-websocket-key", "c2hvcnQ="),
        good.clone().with("sec-websocket-key", "not base64 at all!!!!!=="),
        twice,
    ] {
        let answer = handshake.send(address).await;
        answer.is(UpgradeRejection::BadKey);
        assert_eq!(answer.status, 400);
    }
}

#[tokio::test]
async fn a_handshake_of_another_version_is_refused_with_426_and_told_the_right_one() {
    let address = serve(app()).await;
    let good = Handshake::to("/ws");
    for handshake in [
        good.clone().without("sec-websocket-version"),
        good.clone().with("sec-websocket-version", "8"),
        good.clone().with("sec-websocket-version", "13, 8"),
    ] {
        let answer = handshake.send(address).await;
        answer.is(UpgradeRejection::WrongVersion);
        assert_eq!(answer.status, 426);
        for header in ["sec-websocket-version: 13", "upgrade: websocket", "connection: upgrade"] {
            assert!(answer.has(header), "{answer:?}");
        }
    }
}

#[tokio::test]
async fn a_handshake_without_one_valid_host_is_refused_with_400() {
    let address = serve(app()).await;
    let good = Handshake::to("/ws");
    let with_another = |host| {
        let mut handshake = good.clone();
        handshake.headers.push(("host", host));
        handshake
    };
    for handshake in [
        good.clone().without("host"),
        with_another("localhost"),
        with_another("other.test"),
        good.clone().with("host", ""),
        good.clone().with("host", "a b"),
    ] {
        let answer = handshake.send(address).await;
        answer.is(UpgradeRejection::BadHost);
        assert_eq!(answer.status, 400);
    }
}

#[tokio::test]
async fn a_handshake_that_announces_a_body_is_refused_with_400_before_it_comes() {
    let address = serve(app()).await;
    for (name, value) in
        [("content-length", "5"), ("transfer-encoding", "chunked"), ("expect", "100-continue")]
    {
        let answer = Handshake::to("/ws").with(name, value).send_and_stay(address).await;
        answer.is(UpgradeRejection::HasBody);
        assert_eq!(answer.status, 400);
    }
    // One that comes along, and is a frame by its looks.
    let mut both = Handshake::to("/ws").with("content-length", "7");
    both.body = b"\x81\x81\0\0\0\0x";
    both.send(address).await.is(UpgradeRejection::HasBody);
    let nothing = Handshake::to("/ws").with("content-length", "0");
    assert_eq!(nothing.send(address).await.status, 101, "a body of no bytes is none");
}

#[tokio::test]
async fn http_1_0_is_refused_with_426_and_told_to_upgrade() {
    let answer = Handshake::to("/ws").start("GET /ws HTTP/1.0").send(serve(app()).await).await;
    answer.is(UpgradeRejection::NotUpgradable);
    assert_eq!(answer.status, 426);
    assert!(answer.has("upgrade: websocket") && answer.has("connection: upgrade, keep-alive"), "{answer:?}");
}

#[tokio::test]
async fn one_route_serves_a_page_to_browsers_and_a_websocket_to_scripts() {
    let address = serve(app()).await;
    let page = Handshake::to("/both")
        .without("upgrade")
        .with("connection", "close")
        .without("sec-websocket-key")
        .without("sec-websocket-version");
    for start in ["GET /both HTTP/1.1", "GET /both HTTP/1.0"] {
        let answer = page.clone().start(start).send(address).await;
        assert_eq!((answer.status, &*answer.body), (200, "<h1>hello</h1>"));
    }
    assert_eq!(Handshake::to("/both").send(address).await.status, 101);
    // What is meant as a handshake gets no page, or nobody would find out what a proxy does to it.
    Handshake::to("/both")
        .without("connection")
        .send(address)
        .await
        .is(UpgradeRejection::NoConnectionUpgrade);
    Handshake::to("/both")
        .with("sec-websocket-version", "7")
        .send(address)
        .await
        .is(UpgradeRejection::WrongVersion);
}

#[tokio::test]
async fn a_foreign_origin_is_refused_with_403_and_no_origin_is_not() {
    let address = serve(app()).await;
    let handshake = Handshake::to("/ours");
    let answer = handshake.clone().with("origin", "https://evil.test").send(address).await;
    answer.is(UpgradeRejection::ForbiddenOrigin);
    assert_eq!(answer.status, 403);
    assert_eq!(handshake.clone().with("origin", "https://example.org").send(address).await.status, 101);
    assert_eq!(handshake.clone().send(address).await.status, 101);

    let mut two = handshake.clone().with("origin", "https://example.org");
    two.headers.push(("origin", "https://evil.test"));
    two.send(address).await.is(UpgradeRejection::ForbiddenOrigin);
}

#[tokio::test]
async fn origins_that_are_one_to_a_browser_are_one_to_the_server() {
    for (listed, sent) in [
        ("https://a.test/", "https://a.test"),
        ("https://b.test:443", "https://b.test"),
        ("http://d.test:80", "http://d.test"),
        ("https://E.test", "https://e.test"),
    ] {
        let checked = AllowedOrigins::new([listed]).unwrap();
        let app = Router::new()
            .route(
                "/listed",
                any(async move |ws: WebSocketUpgrade| ws.allowed_origins([listed]).on_upgrade(async |_| {})),
            )
            .route(
                "/checked",
                any(async move |ws: WebSocketUpgrade| ws.allowed_origins(&checked).on_upgrade(async |_| {})),
            );
        let address = serve(app).await;
        for path in ["/listed", "/checked"] {
            let handshake = Handshake::to(path);
            assert_eq!(handshake.clone().with("origin", sent).send(address).await.status, 101, "{listed}");
            let foreign = handshake.with("origin", "https://evil.test").send(address).await;
            assert_eq!(foreign.status, 403, "{listed}");
        }
    }
}

#[tokio::test]
async fn a_list_with_an_origin_that_can_never_match_lets_no_page_in() {
    for entry in ["*", "https://*.c.test", "c.test", "https://c.test/chat", "wss://c.test"] {
        let handler = async move |ws: WebSocketUpgrade| {
            ws.allowed_origins(["https://a.test", entry]).on_upgrade(async |_| {})
        };
        let address = serve(Router::new().route("/ws", any(handler))).await;
        let answer = Handshake::to("/ws").with("origin", "https://a.test").send(address).await;
        answer.is(UpgradeRejection::ForbiddenOrigin);
        assert_eq!(Handshake::to("/ws").send(address).await.status, 101, "no page at all");
    }
}

#[tokio::test]
async fn subprotocols_are_offered_selected_and_overridden() {
    let (seen, mut was_seen) = mpsc::unbounded_channel();
    let handler = async move |ws: WebSocketUpgrade| {
        let requested: Vec<_> = ws.requested_protocols().cloned().collect();
        let mut ws = ws.protocols(["v3", "v2", "v1"]);
        seen.send((requested, ws.selected_protocol().cloned())).unwrap();
        if ws.selected_protocol().is_none() {
            ws.set_selected_protocol("fallback".parse().unwrap());
        }
        ws.on_upgrade(async |_| {})
    };
    let address = serve(Router::new().route("/ws", any(handler))).await;
    for (offered, requested, selected, answered) in [
        ("v1,v2", vec!["v1", "v2"], Some("v2"), "v2"),
        ("V3", vec!["V3"], None, "fallback"),
        ("v", vec!["v"], None, "fallback"),
    ] {
        let answer = Handshake::to("/ws").with("sec-websocket-protocol", offered).send(address).await;
        assert!(answer.has(&format!("sec-websocket-protocol: {answered}")), "{answer:?}");
        let (seen_requested, seen_selected) = was_seen.recv().await.unwrap();
        assert_eq!(seen_requested, requested);
        assert_eq!(seen_selected.as_ref().map(|protocol| protocol.to_str().unwrap()), selected);
    }
}

#[tokio::test]
async fn a_middleware_can_count_what_was_refused() {
    let (refusals, mut counted) = mpsc::unbounded_channel();
    let app = app().layer(middleware::from_fn(move |request: Request, next: Next| {
        let refusals = refusals.clone();
        async move {
            let response = next.run(request).await;
            refusals.send(response.extensions().get::<UpgradeRejection>().copied()).unwrap();
            response
        }
    }));
    let address = serve(app).await;
    let answer = Handshake::to("/ws").without("sec-websocket-key").send(address).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    assert_eq!(counted.recv().await, Some(Some(UpgradeRejection::BadKey)));
    assert_eq!(UpgradeRejection::BadKey.label(), "bad_key");

    Handshake::to("/ws").send(address).await;
    assert_eq!(counted.recv().await, Some(None));
}
