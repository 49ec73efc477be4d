//! Every program of the README of a handler framework (seed 001), compiled and run.
//!
//! The programs are verbatim but for the names of crates: `websocket_builder` is `shardcast::handler`, and
//! `axum::extract::ws` is `shardcast::ws`. What the README leaves out stands around them, marked `added`; the listeners
//! are on free ports so that the programs can be run, and the layout is rustfmt's.

#![allow(clippy::unwrap_used, reason = "a test")]
#![allow(clippy::collapsible_match, clippy::uninlined_format_args, reason = "the programs are verbatim")]
#![allow(clippy::print_stdout, reason = "the seed's program prints")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use axum::Router;
use shardcast::handler::{DisconnectReason, HandlerFactory, Utf8Bytes, WebSocketHandler};
use shardcast::ws::{CloseFrame, Message, WebSocket};
use testkit::frames::{BINARY, CLOSE, FIN, PING, client_frame, client_text};
use testkit_hub::{RawClient, Server, eventually, within_timeout};
use tokio::sync::mpsc;

/// "Quick start": the whole program but its `main`.
mod readme {
    use anyhow::Result;
    use futures_util::{SinkExt, stream::SplitSink};
    use shardcast::handler::{
        DisconnectReason, HandlerFactory, Utf8Bytes, WebSocketHandler, websocket_route,
    };
    use shardcast::ws::{Message, WebSocket};
    use std::net::SocketAddr;

    // Define your connection handler
    pub(crate) struct MyHandler {
        addr: SocketAddr,
        sink: Option<SplitSink<WebSocket, Message>>,
    }

    impl WebSocketHandler for MyHandler {
        async fn on_connect(&mut self, addr: SocketAddr, sink: SplitSink<WebSocket, Message>) -> Result<()> {
            self.addr = addr;
            self.sink = Some(sink);
            // Send welcome message
            if let Some(sink) = &mut self.sink {
                sink.send(Message::Text("Welcome!".into())).await?;
            }
            Ok(())
        }

        async fn on_message(&mut self, text: Utf8Bytes) -> Result<()> {
            // Echo the message back
            if let Some(sink) = &mut self.sink {
                sink.send(Message::Text(format!("Echo: {}", text).into())).await?;
            }
            Ok(())
        }

        async fn on_disconnect(&mut self, reason: DisconnectReason) {
            println!("Client {} disconnected: {:?}", self.addr, reason);
        }
    }

    // Factory to create handler instances
    pub(crate) struct MyHandlerFactory;

    impl HandlerFactory for MyHandlerFactory {
        type Handler = MyHandler;

        fn create(&self, _headers: &axum::http::HeaderMap) -> Self::Handler {
            MyHandler { addr: "0.0.0.0:0".parse().unwrap(), sink: None }
        }
    }

    // Create your Axum app
    pub(crate) async fn main(listener: tokio::net::TcpListener) {
        let app = websocket_route("/ws", MyHandlerFactory);
        axum::serve(listener, app).await.unwrap();
    }
}

/// "You can configure connection limits and timeouts".
fn configured(max_connections: usize) -> Router {
    use readme::MyHandlerFactory; // added
    use shardcast::handler::{ConnectionConfig, websocket_route_with_config};
    use std::time::Duration;

    let config = ConnectionConfig {
        max_connections: Some(max_connections), // Maximum concurrent connections
        max_connection_duration: Some(Duration::from_secs(300)), // 5 minute max duration
        idle_timeout: Some(Duration::from_secs(60)), // 1 minute idle timeout
    };
    websocket_route_with_config("/ws", MyHandlerFactory, config)
}

/// "You can create routes that handle both regular HTTP and WebSocket requests".
mod flexible {
    use super::readme::MyHandlerFactory; // added
    use axum::{
        extract::ConnectInfo,
        response::{Html, IntoResponse, Response},
    };
    use shardcast::handler::HandlerFactory; // added
    use shardcast::handler::{WebSocketUpgrade, handle_upgrade};
    use std::net::SocketAddr; // added

    pub(crate) async fn flexible_handler(
        ConnectInfo(addr): ConnectInfo<SocketAddr>,
        headers: axum::http::HeaderMap,
        ws: Option<WebSocketUpgrade>,
    ) -> Response {
        match ws {
            Some(ws) => {
                // Handle WebSocket upgrade
                let handler = MyHandlerFactory.create(&headers);
                handle_upgrade(ws, addr, handler).await
            }
            None => {
                // Handle regular HTTP request
                Html("<h1>Hello from HTTP!</h1>").into_response()
            }
        }
    }
}

/// "For even more control, you can use `handle_socket` directly".
mod direct {
    use super::readme::MyHandlerFactory; // added
    use axum::extract::{ConnectInfo, State}; // added
    use axum::response::Response;
    use shardcast::handler::{ConnectionConfig, HandlerFactory}; // added
    use shardcast::ws::WebSocketUpgrade;
    use std::net::SocketAddr; // added

    pub(crate) async fn ws_handler(
        ws: WebSocketUpgrade,
        ConnectInfo(addr): ConnectInfo<SocketAddr>,
        State(config): State<ConnectionConfig>, // added
        headers: axum::http::HeaderMap,         // added
    ) -> Response {
        let handler = MyHandlerFactory.create(&headers);
        ws.on_upgrade(move |socket| async move {
            shardcast::handler::handle_socket(socket, addr, handler, config).await
        })
    }
}

async fn welcomes_and_echoes(address: SocketAddr) -> RawClient {
    let mut client = RawClient::connect(address).await;
    assert_eq!(client.recv_text().await, "Welcome!");
    for number in 0..3 {
        client.send(&client_text(&number.to_string())).await;
        assert_eq!(client.recv_text().await, format!("Echo: {number}"));
    }
    client
}

#[tokio::test]
async fn the_quick_start_welcomes_and_echoes() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(readme::main(listener));
    let mut client = welcomes_and_echoes(address).await;
    client.send(&client_frame(FIN | CLOSE, &1000_u16.to_be_bytes())).await;
    assert_eq!(client.close_code().await, Some(1000));
}

#[tokio::test]
async fn a_route_with_a_config_serves_as_many_as_it_says() {
    let server = Server::start(configured(1)).await;
    let first = welcomes_and_echoes(server.address).await;
    let refused = tokio_tungstenite::connect_async(server.url("/ws")).await.unwrap_err();
    let tokio_tungstenite::tungstenite::Error::Http(response) = refused else { panic!("{refused}") };
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    drop(first);
    let mut is_served = false;
    while !is_served {
        is_served = within_timeout(tokio_tungstenite::connect_async(server.url("/ws"))).await.is_ok();
    }
}

#[tokio::test]
async fn a_flexible_route_serves_a_page_and_a_socket() {
    let app = Router::new().route("/ws", axum::routing::get(flexible::flexible_handler));
    let server = Server::start_with_addresses(app).await;
    let _client = welcomes_and_echoes(server.address).await;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(server.address).await.unwrap();
    stream.write_all(b"GET /ws HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut page = String::new();
    within_timeout(stream.read_to_string(&mut page)).await.unwrap();
    assert!(page.ends_with("<h1>Hello from HTTP!</h1>"), "{page}");
}

#[tokio::test]
async fn handle_socket_keeps_its_own_timeouts() {
    use shardcast::handler::ConnectionConfig;
    let short = Some(Duration::from_millis(300));
    for (config, code) in [
        (ConnectionConfig { idle_timeout: short, ..ConnectionConfig::default() }, 1001),
        (ConnectionConfig { max_connection_duration: short, ..ConnectionConfig::default() }, 1012),
    ] {
        let app = Router::new().route("/ws", axum::routing::get(direct::ws_handler)).with_state(config);
        let server = Server::start_with_addresses(app).await;
        let mut client = RawClient::connect(server.address).await;
        assert_eq!(client.recv_text().await, "Welcome!");
        assert_eq!(client.close_code().await, Some(code));
    }
}

// ---- What the README says in prose ------------------------------------------------------------------------------

/// Records its calls. A message `fail` is an error, `close` closes.
struct Recorder {
    calls: mpsc::UnboundedSender<String>,
    sink: Arc<Mutex<Option<Sink>>>,
    /// Its own state: handlers run with `&mut self`.
    count: usize,
}

type Sink = futures_util::stream::SplitSink<WebSocket, Message>;

impl WebSocketHandler for Recorder {
    async fn on_connect(&mut self, addr: SocketAddr, sink: Sink) -> anyhow::Result<()> {
        *self.sink.lock().unwrap() = Some(sink);
        self.calls.send(format!("connect {}", addr.ip())).unwrap();
        Ok(())
    }

    async fn on_message(&mut self, text: Utf8Bytes) -> anyhow::Result<()> {
        use futures_util::SinkExt as _;
        self.count += 1;
        self.calls.send(format!("text {} {text}", self.count)).unwrap();
        if text == "close" {
            let sink = self.sink.lock().unwrap().take();
            sink.unwrap().send(Message::Close(Some(CloseFrame { code: 4000, reason: "".into() }))).await?;
        }
        anyhow::ensure!(text != "fail", "it was told to fail");
        Ok(())
    }

    async fn on_binary(&mut self, bytes: bytes::Bytes) -> anyhow::Result<()> {
        self.calls.send(format!("binary {bytes:?}")).unwrap();
        Ok(())
    }

    async fn on_disconnect(&mut self, reason: DisconnectReason) {
        self.calls.send(format!("{reason:?}")).unwrap();
    }
}

struct RecorderFactory(mpsc::UnboundedSender<String>);

impl HandlerFactory for RecorderFactory {
    type Handler = Recorder;

    fn create(&self, headers: &axum::http::HeaderMap) -> Recorder {
        assert_eq!(headers["upgrade"], "websocket");
        Recorder { calls: self.0.clone(), sink: Arc::default(), count: 0 }
    }
}

async fn recorder(config: shardcast::handler::ConnectionConfig) -> (Server, mpsc::UnboundedReceiver<String>) {
    let (sender, calls) = mpsc::unbounded_channel();
    let app = shardcast::handler::websocket_route_with_config("/ws", RecorderFactory(sender), config);
    (Server::start(app).await, calls)
}

async fn next(calls: &mut mpsc::UnboundedReceiver<String>) -> String {
    within_timeout(calls.recv()).await.unwrap()
}

#[tokio::test]
async fn a_handler_has_its_address_its_own_state_and_one_end() {
    let (server, mut calls) = recorder(Default::default()).await;
    let mut client = RawClient::connect(server.address).await;
    client.send(&client_text("a")).await;
    client.send(&client_frame(FIN | BINARY, b"b")).await;
    client.send(&client_frame(FIN | PING, b"p")).await;
    client.send(&client_text("c")).await;
    client.send(&client_frame(FIN | CLOSE, &4321_u16.to_be_bytes())).await;
    let closed = "ClientClosed(Some(CloseFrame { code: 4321, reason: \"\" }))";
    for expected in ["connect 127.0.0.1", "text 1 a", "binary b\"b\"", "text 2 c", closed] {
        assert_eq!(next(&mut calls).await, expected);
    }
}

#[tokio::test]
async fn a_handler_that_fails_closes_with_1011_and_is_told_why() {
    let (server, mut calls) = recorder(Default::default()).await;
    let mut client = RawClient::connect(server.address).await;
    client.send(&client_text("fail")).await;
    client.send(&client_text("never handled")).await;
    assert_eq!(client.close_code().await, Some(1011));
    for expected in ["connect 127.0.0.1", "text 1 fail", "HandlerFailed(\"it was told to fail\")"] {
        assert_eq!(next(&mut calls).await, expected);
    }
}

#[tokio::test]
async fn every_end_has_its_reason() {
    let (server, mut calls) = recorder(Default::default()).await;
    // Vanished, broke the protocol, was closed and answered.
    drop(RawClient::connect(server.address).await);
    let mut client = RawClient::connect(server.address).await;
    client.send(b"\x83\x80\0\0\0\0").await;
    let mut client = RawClient::connect(server.address).await;
    client.send(&client_text("close")).await;
    assert_eq!(client.close_code().await, Some(4000));
    client.send(&client_frame(FIN | CLOSE, &4000_u16.to_be_bytes())).await;
    let mut ends = Vec::new();
    while ends.len() < 3 {
        let call = next(&mut calls).await;
        if !call.starts_with("connect") && !call.starts_with("text") {
            ends.push(call);
        }
    }
    ends.sort();
    let all = [
        "ClientClosed(Some(CloseFrame { code: 4000",
        "Error(\"the client broke the protocol",
        "Error(\"the client ended",
    ];
    assert!(ends.iter().zip(all).all(|(end, start)| end.starts_with(start)), "{ends:?}");
}

#[tokio::test]
async fn the_idle_timeout_starts_again_at_every_frame_and_no_ping_is_sent() {
    let idle = Duration::from_millis(600);
    let config = shardcast::handler::ConnectionConfig { idle_timeout: Some(idle), ..Default::default() };
    let (server, mut calls) = recorder(config).await;
    let mut client = RawClient::connect(server.address).await;
    let began = std::time::Instant::now();
    client.send(&client_frame(FIN | PING, b"p")).await;
    assert_eq!(client.recv().await.1, b"p");
    assert_eq!(client.close_code().await, Some(1001), "it was not pinged meanwhile");
    assert!(began.elapsed() >= idle);
    assert_eq!(next(&mut calls).await, "connect 127.0.0.1");
    assert_eq!(next(&mut calls).await, "Timeout(\"nothing arrived within the idle timeout\")");
}

#[tokio::test]
async fn a_connection_ends_at_its_maximum_duration_whatever_it_sends() {
    let duration = Some(Duration::from_millis(300));
    let config =
        shardcast::handler::ConnectionConfig { max_connection_duration: duration, ..Default::default() };
    let (server, mut calls) = recorder(config).await;
    let client = RawClient::connect(server.address).await;
    let (mut reader, mut writer) = client.stream.into_tcp().into_split();
    let writing = tokio::spawn(async move {
        use tokio::io::AsyncWriteExt as _;
        while writer.write_all(&client_text("more")).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let mut bytes = Vec::new();
    within_timeout(tokio::io::AsyncReadExt::read_to_end(&mut reader, &mut bytes)).await.ok();
    drop(reader);
    let mut last = String::new();
    while !last.starts_with("Timeout") {
        last = next(&mut calls).await;
    }
    assert_eq!(last, "Timeout(\"the maximum duration was reached\")");
    within_timeout(writing).await.unwrap();
    eventually(true, || calls.is_empty()).await;
}
