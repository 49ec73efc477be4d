//! `shardcast::ws`: a socket that the application's own task reads and writes, as Axum documents it.
//!
//! Over real sockets. Where Axum says how something behaves (pings, the closing handshake, splitting), that is what is
//! tested; and what it does not have: bounds in both directions, ids, membership of a hub.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::Path;
use axum::response::Response;
use axum::routing::any;
use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use http::HeaderValue;
use shardcast::ws::{CloseFrame, Message, OnFailedUpgrade, WebSocket, WebSocketUpgrade, close_code};
use shardcast::{
    BroadcastPolicy, CloseReason, Engine, EngineConfig, Hub, HubContext, PresenceEvent, PresenceKind,
    RawCodec, WsHub, WsHubConfig,
};
use testkit::frames::{BINARY, CLOSE, FIN, PING, PONG, TEXT, client_frame, client_text};
use testkit_hub::{Client, RawClient, Server, engine, eventually, within_timeout};
use tokio::sync::{mpsc, oneshot};
use tokio_tungstenite::tungstenite::Error;

/// Serves each connection by `serve`, on an engine of its own.
async fn serve<F, Fut>(serve: F) -> (Server, Engine)
where
    F: Fn(WebSocket) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    serve_with(|ws| ws, serve).await
}

async fn serve_with<F, Fut>(
    prepare: impl Fn(WebSocketUpgrade) -> WebSocketUpgrade + Clone + Send + Sync + 'static,
    serve: F,
) -> (Server, Engine)
where
    F: Fn(WebSocket) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let engine = engine(2);
    let for_route = engine.clone();
    let connect = move |ws: WebSocketUpgrade| async move {
        let ws = prepare(ws.engine(&for_route));
        ws.on_upgrade(serve)
    };
    (Server::start(Router::new().route("/ws", any(connect))).await, engine)
}

/// A server that passes its socket to the test.
async fn socket_with(
    prepare: impl Fn(WebSocketUpgrade) -> WebSocketUpgrade + Clone + Send + Sync + 'static,
    connect: impl AsyncFnOnce(std::net::SocketAddr) -> RawClient,
) -> (WebSocket, RawClient, Server, Engine) {
    let (sender, mut sockets) = mpsc::unbounded_channel();
    let (server, engine) = serve_with(prepare, move |socket| {
        let sender = sender.clone();
        async move { sender.send(socket).unwrap() }
    })
    .await;
    let client = connect(server.address).await;
    let socket = within_timeout(sockets.recv()).await.unwrap();
    (socket, client, server, engine)
}

async fn socket() -> (WebSocket, RawClient, Server, Engine) {
    socket_with(|ws| ws, RawClient::connect).await
}

fn close(code: u16, reason: &str) -> Message {
    Message::Close(Some(CloseFrame { code, reason: reason.into() }))
}

fn close_bytes(code: u16) -> Vec<u8> {
    client_frame(FIN | CLOSE, &code.to_be_bytes())
}

async fn recv(socket: &mut WebSocket) -> Option<Result<Message, String>> {
    within_timeout(socket.recv()).await.map(|received| received.map_err(|error| error.to_string()))
}

#[tokio::test]
async fn every_kind_of_message_arrives_in_order_and_can_be_sent() {
    let (mut socket, mut client, _server, _engine) = socket().await;
    for (opcode, payload) in [(TEXT, "a"), (BINARY, "b"), (PING, "c"), (PONG, "d")] {
        client.send(&client_frame(FIN | opcode, payload.as_bytes())).await;
    }
    let bytes = Bytes::from_static;
    let all = [
        Message::text("a"),
        Message::Binary(bytes(b"b")),
        Message::Ping(bytes(b"c")),
        Message::Pong(bytes(b"d")),
    ];
    for message in all {
        assert_eq!(recv(&mut socket).await, Some(Ok(message)));
    }
    assert_eq!(client.frame().await, Some((PONG, b"c".to_vec())), "the ping was answered by the engine");
    socket.send(Message::text("e")).await.unwrap();
    socket.send(Message::binary(vec![b'f'])).await.unwrap();
    assert_eq!(client.frame().await, Some((TEXT, b"e".to_vec())));
    assert_eq!(client.frame().await, Some((BINARY, b"f".to_vec())));
    socket.send(Message::Ping(bytes(b"g"))).await.unwrap();
    assert_eq!(client.frame().await, Some((PING, b"g".to_vec())));
    socket.send(Message::Pong(bytes(b"h"))).await.unwrap();
    assert_eq!(client.frame().await, Some((PONG, b"h".to_vec())));
}

#[tokio::test]
async fn a_client_that_closes_is_answered_and_is_the_last_message() {
    let (mut socket, mut client, _server, _engine) = socket().await;
    client.send(&client_text("last words")).await;
    let mut payload = 4321_u16.to_be_bytes().to_vec();
    payload.extend(b"bye");
    client.send(&client_frame(FIN | CLOSE, &payload)).await;
    assert_eq!(client.close_code().await, Some(4321));
    assert_eq!(recv(&mut socket).await, Some(Ok(Message::text("last words"))));
    assert_eq!(recv(&mut socket).await, Some(Ok(close(4321, "bye"))));
    assert_eq!((recv(&mut socket).await, recv(&mut socket).await), (None, None));
    assert!(matches!(socket.close_reason(), Some(CloseReason::Peer { .. })));
    assert!(socket.send(Message::text("too late")).await.is_err());
}

#[tokio::test]
async fn after_sending_a_close_frame_messages_are_read_until_the_client_answers() {
    let (mut socket, mut client, _server, _engine) = socket().await;
    socket.send(Message::text("first")).await.unwrap();
    socket.send(close(close_code::AWAY, "restart")).await.unwrap();
    assert!(socket.send(Message::text("too late")).await.is_err(), "nothing follows a Close frame");
    assert!(futures_util::SinkExt::send(&mut socket, Message::text("too late")).await.is_err());
    assert_eq!(client.recv_text().await, "first");
    assert_eq!(client.close_code().await, Some(1001));
    client.send(&client_text("one")).await;
    client.send(&client_text("two")).await;
    assert_eq!(recv(&mut socket).await, Some(Ok(Message::text("one"))));
    assert_eq!(recv(&mut socket).await, Some(Ok(Message::text("two"))));
    client.send(&close_bytes(1001)).await;
    assert_eq!(recv(&mut socket).await, Some(Ok(close(1001, ""))));
    assert_eq!(recv(&mut socket).await, None);
}

#[tokio::test]
async fn a_close_frame_without_a_code_and_one_with_a_code_that_must_not_be_sent() {
    for frame in [None, Some(CloseFrame { code: 1006, reason: "never sent".into() })] {
        let (mut socket, mut client, _server, _engine) = socket().await;
        socket.send(Message::Close(frame)).await.unwrap();
        assert_eq!(client.close_code().await, None);
        client.send(&client_frame(FIN | CLOSE, b"")).await;
        assert_eq!(recv(&mut socket).await, Some(Ok(Message::Close(None))));
        assert_eq!(recv(&mut socket).await, None);
    }
}

#[tokio::test]
async fn an_end_that_nobody_asked_for_is_one_error_and_then_the_end() {
    type Act = fn(RawClient) -> std::pin::Pin<Box<dyn Future<Output = ()>>>;
    let acts: [(Act, &str); 3] = [
        (|client| Box::pin(async move { drop(client) }), "without a Close frame"),
        (|client| Box::pin(async move { client.reset() }), "socket failed"),
        (|mut client| Box::pin(async move { client.send(b"\x83\x80\0\0\0\0").await }), "broke the protocol"),
    ];
    for (act, expected) in acts {
        let (mut socket, mut client, _server, _engine) = socket().await;
        client.send(&client_text("before")).await;
        assert_eq!(recv(&mut socket).await, Some(Ok(Message::text("before"))));
        act(client).await;
        let error = recv(&mut socket).await.unwrap().unwrap_err();
        assert!(error.contains(expected), "{error}");
        assert_eq!((recv(&mut socket).await, recv(&mut socket).await), (None, None));
    }
}

#[tokio::test]
async fn a_shutdown_of_the_engine_closes_sockets_with_1001() {
    let (mut socket, mut client, _server, engine) = socket().await;
    let shutdown = tokio::spawn(async move { engine.shutdown(Duration::from_secs(20)).await });
    assert_eq!(client.close_code().await, Some(1001));
    drop(client);
    assert!(recv(&mut socket).await.unwrap().is_err());
    assert_eq!(recv(&mut socket).await, None);
    assert_eq!(within_timeout(shutdown).await.unwrap().left_over, 0);
}

#[tokio::test]
async fn a_socket_that_is_dropped_says_goodbye_after_what_it_has_sent() {
    let (server, engine) = serve(|mut socket: WebSocket| async move {
        for number in 0..100 {
            socket.send(Message::text(number.to_string())).await.unwrap();
        }
    })
    .await;
    let mut client = RawClient::connect(server.address).await;
    let texts: Vec<_> = (0..100).map(|number: u32| number.to_string()).collect();
    assert_eq!(client.rest().await, (texts, Some(1000)));
    drop(client);
    eventually(0, || engine.connection_count()).await;
}

#[tokio::test]
async fn a_task_that_panics_closes_its_socket_with_1011() {
    let (server, _engine) = serve(|mut socket: WebSocket| async move {
        let received = socket.recv().await;
        panic!("on purpose, after {received:?}");
    })
    .await;
    let mut client = RawClient::connect(server.address).await;
    client.send(&client_text("now")).await;
    assert_eq!(client.close_code().await, Some(1011));
}

#[tokio::test]
async fn a_sink_that_is_dropped_while_it_waits_still_sends_and_closes() {
    let (mut socket, mut client, _server, _engine) = socket().await;
    socket.feed(Message::text("fed, not flushed")).await.unwrap();
    drop(socket);
    assert_eq!(client.rest().await, (vec!["fed, not flushed".to_owned()], Some(1000)));
}

#[tokio::test]
async fn a_split_socket_reads_and_writes_in_two_tasks() {
    let (server, _engine) = serve(|socket: WebSocket| async move {
        let (mut sender, mut receiver) = socket.split();
        let (texts, mut forwarded) = mpsc::channel::<Message>(8);
        let forward = tokio::spawn(async move {
            while let Some(message) = forwarded.recv().await {
                sender.send(message).await.unwrap();
            }
            sender.close().await.unwrap();
        });
        while let Some(Ok(message)) = receiver.next().await {
            if let Message::Text(text) = message {
                texts.send(Message::text(format!("echo: {text}"))).await.unwrap();
            }
        }
        drop(texts);
        forward.await.unwrap();
    })
    .await;
    let mut client = RawClient::connect(server.address).await;
    for number in 0..1000 {
        client.send(&client_text(&number.to_string())).await;
        assert_eq!(client.recv_text().await, format!("echo: {number}"));
    }
    client.send(&close_bytes(1000)).await;
    assert_eq!(client.close_code().await, Some(1000));
}

#[tokio::test]
async fn a_task_that_reads_nothing_makes_its_client_wait() {
    let (mut socket, client, _server, _engine) = socket().await;
    let (reader, mut writer) = client.stream.into_tcp().into_split();
    let sent = Arc::new(Mutex::new(0_usize));
    let counted = sent.clone();
    let writing = tokio::spawn(async move {
        use tokio::io::AsyncWriteExt as _;
        for number in 0..20_000_u32 {
            let mut payload = vec![0; 1000];
            payload[..4].copy_from_slice(&number.to_be_bytes());
            writer.write_all(&client_frame(FIN | BINARY, &payload)).await.unwrap();
            *counted.lock().unwrap() += 1000;
        }
        writer
    });
    // The kernel's buffers fill up, and then no byte moves any more.
    let mut before = usize::MAX;
    while before != *sent.lock().unwrap() {
        before = *sent.lock().unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(before < 20_000_000 && !writing.is_finished(), "{before} bytes were accepted and none was read");
    for number in 0..20_000_u32 {
        let Some(Ok(Message::Binary(payload))) = recv(&mut socket).await else { panic!("message {number}") };
        assert_eq!(payload[..4], number.to_be_bytes());
    }
    let _writer = within_timeout(writing).await.unwrap();
    assert!(reader.try_read(&mut [0]).is_err(), "nothing was sent");
}

#[tokio::test]
async fn a_client_that_reads_nothing_makes_its_task_wait() {
    let narrow = |ws: WebSocketUpgrade| ws.max_write_buffer_size(4096);
    let (mut socket, mut client, _server, _engine) = socket_with(narrow, RawClient::connect_narrow).await;
    let sent = Arc::new(Mutex::new(0_usize));
    let counted = sent.clone();
    let writing = tokio::spawn(async move {
        for number in 0..2000 {
            socket.send(Message::text(format!("{number:01000}"))).await.unwrap();
            *counted.lock().unwrap() += 1;
        }
    });
    let mut before = usize::MAX;
    while before != *sent.lock().unwrap() {
        before = *sent.lock().unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(before < 2000 && !writing.is_finished(), "{before} messages of 1 KB, and nobody read one");
    for number in 0..2000 {
        assert_eq!(client.recv_text().await, format!("{number:01000}"));
    }
    within_timeout(writing).await.unwrap();
    assert_eq!(client.close_code().await, Some(1000));
}

#[tokio::test]
async fn limits_on_messages_and_frames_hold() {
    let prepare =
        |ws: WebSocketUpgrade| ws.max_message_size(20).max_frame_size(10).accept_unmasked_frames(true);
    for (bytes, code) in [
        (client_frame(FIN | TEXT, &[b'a'; 11]), 1009),
        (
            [client_frame(TEXT, &[b'a'; 10]), client_frame(0, &[b'a'; 10]), client_frame(FIN, b"a")].concat(),
            1009,
        ),
        (b"\x83\x00".to_vec(), 1002),
    ] {
        let (mut socket, mut client, _server, _engine) = socket_with(prepare, RawClient::connect).await;
        client.send(b"\x81\x05hello").await;
        assert_eq!(recv(&mut socket).await, Some(Ok(Message::text("hello"))), "it is not masked");
        client.send(&bytes).await;
        assert_eq!(client.close_code().await, Some(code));
        assert!(recv(&mut socket).await.unwrap().is_err());
    }
}

struct Chat;

impl WsHub for Chat {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;

    async fn on_message(&self, text: String, ctx: HubContext<Self>) {
        ctx.broadcast(text).await;
    }
}

#[tokio::test]
async fn a_socket_can_be_a_client_of_a_hub() {
    let engine = engine(2);
    let hub: Hub<Chat> =
        engine.hub(WsHubConfig { heartbeat_interval: None, ..WsHubConfig::default() }).unwrap();
    let (sender, mut sockets) = mpsc::unbounded_channel();
    let for_route = hub.clone();
    let connect = move |ws: WebSocketUpgrade| async move {
        ws.client_of(&for_route).on_upgrade(move |socket| async move { sender.send(socket).unwrap() })
    };
    let server = Server::start(Router::new().route("/ws", any(connect))).await;
    let mut ada = RawClient::connect(server.address).await;
    let mut socket_of_ada = within_timeout(sockets.recv()).await.unwrap();
    let mut bob = RawClient::connect(server.address).await;
    let socket_of_bob = within_timeout(sockets.recv()).await.unwrap();
    assert_eq!((hub.len(), engine.connection_count()), (2, 2));
    hub.join(socket_of_ada.id(), "room").await.unwrap();
    assert_eq!(hub.to_group("room").deliver(&"to the room".to_owned()).await.unwrap().recipients, 1);
    let to_others =
        hub.to_all().except(&[socket_of_ada.id()]).deliver(&"to the others".to_owned()).await.unwrap();
    assert_eq!(to_others.recipients, 1);
    // One order: what the task sends and what the hub sends.
    socket_of_ada.send(Message::text("from the task")).await.unwrap();
    hub.to_all().publish(&"to all".to_owned()).await.unwrap();
    for text in ["to the room", "from the task", "to all"] {
        assert_eq!(ada.recv_text().await, text);
    }
    for text in ["to the others", "to all"] {
        assert_eq!(bob.recv_text().await, text);
    }
    ada.send(&client_text("to the task")).await;
    assert_eq!(recv(&mut socket_of_ada).await, Some(Ok(Message::text("to the task"))), "and not to the hub");
    drop((socket_of_ada, socket_of_bob));
    assert_eq!((ada.close_code().await, bob.close_code().await), (Some(1000), Some(1000)));
}

#[tokio::test]
async fn a_socket_of_a_user_is_reached_and_shown_as_the_hubs_other_clients_are() {
    let engine = engine(2);
    let hub: Hub<Chat> = engine.hub(WsHubConfig::default()).unwrap();
    let (sender, mut sockets) = mpsc::unbounded_channel();
    let for_route = hub.clone();
    let connect = move |ws: WebSocketUpgrade, Path(user): Path<String>| async move {
        ws.user(user)
            .client_of(&for_route)
            .on_upgrade(move |socket| async move { sender.send(socket).unwrap() })
    };
    let server = Server::start(Router::new().route("/ws/{user}", any(connect))).await;
    let mut changes = hub.presence_changes().into_stream();
    let mut ada = Client::connect(server.url("/ws/ada")).await;
    let socket = within_timeout(sockets.recv()).await.unwrap();
    let Some(PresenceEvent::Change(change)) = within_timeout(changes.next()).await else {
        panic!("no change")
    };
    assert_eq!((&*change.user, change.kind, change.group), ("ada", PresenceKind::Joined, None));
    assert_eq!(hub.to_user("ada").members().await.unwrap(), [socket.id()]);
    hub.to_user("ada").publish(&"to Ada".to_owned()).await.unwrap();
    assert_eq!(ada.recv_text().await, "to Ada");
    let long = server.url(&format!("/ws/{}", "x".repeat(1025)));
    let refused = within_timeout(Client::try_connect(long, &[])).await.unwrap_err();
    assert!(matches!(&refused, Error::Http(response) if response.status() == 400), "{refused}");
}

#[tokio::test]
async fn a_slow_client_of_a_hub_is_treated_by_the_hubs_policy() {
    let engine = engine(1);
    let policy = BroadcastPolicy::DropMessage { timeout: Duration::ZERO };
    let config =
        WsHubConfig { policy, outbox_bytes: 1024, heartbeat_interval: None, ..WsHubConfig::default() };
    let hub: Hub<Chat> = engine.hub(config).unwrap();
    let for_route = hub.clone();
    let connect = move |ws: WebSocketUpgrade| async move {
        ws.client_of(&for_route)
            .on_upgrade(|mut socket| async move { while socket.recv().await.is_some() {} })
    };
    let server = Server::start(Router::new().route("/ws", any(connect))).await;
    let _client = RawClient::connect_narrow(server.address).await;
    eventually(1, || hub.len()).await;
    let mut dropped = 0;
    while dropped == 0 {
        dropped = hub.to_all().deliver(&"x".repeat(10_000)).await.unwrap().dropped.total();
    }
}

#[tokio::test]
async fn what_cannot_be_served_is_told_before_the_upgrade() {
    let full = Engine::start(EngineConfig {
        max_connections: 1,
        shards: Some(1),
        pin: false,
        ..EngineConfig::default()
    });
    let engine = full.unwrap();
    let for_route = engine.clone();
    let connect = move |ws: WebSocketUpgrade| async move {
        ws.engine(&for_route).on_upgrade(|mut socket| async move { while socket.recv().await.is_some() {} })
    };
    let invalid = |ws: WebSocketUpgrade| async move {
        ws.config(WsHubConfig { outbox_frames: 0, ..WsHubConfig::default() }).on_upgrade(|_| async {})
    };
    let app = Router::new().route("/ws", any(connect)).route("/invalid", any(invalid));
    let server = Server::start(app).await;
    let _client = RawClient::connect(server.address).await;
    for (path, status, expected) in [("/ws", 503, "connection limit"), ("/invalid", 500, "outbox_frames")] {
        let error = tokio_tungstenite::connect_async(server.url(path)).await.unwrap_err();
        let tokio_tungstenite::tungstenite::Error::Http(response) = error else { panic!("{error}") };
        let body = String::from_utf8_lossy(response.body().as_deref().unwrap_or_default()).into_owned();
        assert_eq!(response.status(), status);
        assert!(body.contains(expected), "{body}");
    }
}

#[tokio::test]
async fn an_engine_with_little_memory_serves_sockets_too() {
    let config = EngineConfig {
        unfinished_bytes_max: 1 << 20,
        shards: Some(1),
        pin: false,
        ..EngineConfig::default()
    };
    let engine = Engine::start(config).unwrap();
    let for_route = engine.clone();
    let connect = move |ws: WebSocketUpgrade| async move {
        ws.engine(&for_route).on_upgrade(|mut socket| async move { while socket.recv().await.is_some() {} })
    };
    let server = Server::start(Router::new().route("/ws", any(connect))).await;
    let mut client = RawClient::connect(server.address).await;
    // The header of a message of 1 MiB and a byte.
    client.send(&[&[0x82, 0xFF][..], &((1_u64 << 20) + 1).to_be_bytes(), &[0; 4]].concat()).await;
    assert_eq!(client.close_code().await, Some(1009));
}

#[tokio::test]
async fn subprotocols_and_the_optional_extractor() {
    async fn connect(ws: Option<WebSocketUpgrade>) -> Response {
        use axum::response::IntoResponse as _;
        let Some(mut ws) = ws else { return "a page".into_response() };
        assert_eq!(ws.requested_protocols().collect::<Vec<_>>(), ["v1", "v2"]);
        ws = ws.protocols(["v3", "v2"]);
        assert_eq!(ws.selected_protocol(), Some(&HeaderValue::from_static("v2")));
        ws.set_selected_protocol(HeaderValue::from_static("v1"));
        ws.on_upgrade(|mut socket| async move {
            let protocol = socket.protocol().unwrap().to_str().unwrap().to_owned();
            socket.send(Message::from(protocol)).await.unwrap();
        })
    }
    use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
    let server = Server::start(Router::new().route("/", any(connect))).await;
    let mut request = server.url("/").into_client_request().unwrap();
    request.headers_mut().insert("sec-websocket-protocol", HeaderValue::from_static("v1, v2"));
    let (mut client, response) = tokio_tungstenite::connect_async(request).await.unwrap();
    assert_eq!(response.headers()["sec-websocket-protocol"], "v1");
    assert_eq!(within_timeout(client.next()).await.unwrap().unwrap().into_text().unwrap(), "v1");
}

#[tokio::test]
async fn a_handshake_that_yields_no_socket_is_reported() {
    struct Report(oneshot::Sender<String>);
    impl OnFailedUpgrade for Report {
        fn call(self, error: axum::Error) {
            self.0.send(error.to_string()).unwrap();
        }
    }
    let (report, failed) = oneshot::channel();
    let report = Arc::new(Mutex::new(Some(report)));
    // A middleware that replaces the response.
    let connect = move |ws: WebSocketUpgrade| {
        let report = report.lock().unwrap().take().unwrap();
        let response =
            ws.on_failed_upgrade(Report(report)).on_upgrade(|_| async { panic!("it is not called") });
        drop(response);
        async { "another response" }
    };
    let server = Server::start(Router::new().route("/ws", any(connect))).await;
    assert!(tokio_tungstenite::connect_async(server.url("/ws")).await.is_err());
    let error = within_timeout(failed).await.unwrap();
    assert!(error.contains("was not sent"), "{error}");
}
