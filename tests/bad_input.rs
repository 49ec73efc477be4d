//! Peers that break the rules: each gets the right close code, is counted, and disturbs nobody.
//!
//! Frames are made by hand, as no client would send them. A bystander shares the shard with the wrongdoer.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.

use axum::Router;
use axum::extract::State;
use axum::routing::any;
use serde::{Deserialize, Serialize};
use shardcast::{
    BinaryCodec, CloseReason, Decode, DisconnectRequest, Encode, Engine, EngineConfig, Hub, HubContext,
    JsonCodec, Metrics, WebSocketUpgrade, WsHub, WsHubConfig,
};
use testkit::frames::{BINARY, CLOSE, FIN, PING, TEXT, client_frame};
use testkit_hub::{
    Client, RawClient, Server, Transport, engine, eventually, on_each_transport, within_timeout,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

#[derive(Serialize, Deserialize)]
struct Note {
    text: String,
}

struct Notes<C> {
    ends: UnboundedSender<CloseReason>,
    codec: std::marker::PhantomData<fn() -> C>,
}

impl<C: Encode<Note> + Decode<Note>> WsHub for Notes<C> {
    type Codec = C;
    type InMessage = Note;
    type OutMessage = Note;
    async fn on_message(&self, note: Note, ctx: HubContext<Self>) {
        ctx.unicast(note).await;
    }
    async fn on_disconnect(&self, request: DisconnectRequest) {
        self.ends.send(request.reason).unwrap();
    }
}

/// A hub on one shard, with a bystander who shares it.
struct Scene {
    engine: Engine,
    server: Server,
    bystander: Client,
    ended: UnboundedReceiver<CloseReason>,
}

impl Scene {
    async fn set<C: Encode<Note> + Decode<Note>>(transport: Transport, config: WsHubConfig) -> Self {
        let engine = engine(1);
        let notes = engine.hub::<Notes<C>>(config.clone()).unwrap();
        let json = engine.hub::<Notes<JsonCodec>>(config).unwrap();
        let (ends, ended) = unbounded_channel();
        let (bystanders, _) = unbounded_channel();
        let serve = async move |ws: WebSocketUpgrade, State(hub): State<Hub<Notes<C>>>| {
            ws.serve(&hub, Notes { ends, codec: std::marker::PhantomData })
        };
        let stand_by = async move |ws: WebSocketUpgrade| {
            let hub = Notes { ends: bystanders, codec: std::marker::PhantomData };
            ws.serve(&json, hub)
        };
        let app = Router::new().route("/ws", any(serve)).route("/by", any(stand_by)).with_state(notes);
        let server = Server::start_over(transport, app).await;
        let mut scene = Self { bystander: Client::connect(server.url("/by")).await, engine, server, ended };
        scene.bystander_goes_on().await;
        scene
    }

    async fn json(transport: Transport) -> Self {
        Self::set::<JsonCodec>(transport, WsHubConfig::default()).await
    }

    async fn wrongdoer(&self) -> RawClient {
        RawClient::connect(&self.server).await
    }

    async fn bystander_goes_on(&mut self) {
        let note = r#"{"text":"I am still here"}"#;
        self.bystander.send_text(note).await;
        self.bystander.recv_texts(&[note]).await;
    }

    /// Sends `frames` and expects this end.
    async fn ends_with(&mut self, what: &str, frames: &[u8], code: u16, count: fn(&Metrics) -> u64) {
        let before = count(&self.engine.metrics());
        let mut wrongdoer = self.wrongdoer().await;
        // A good message first: it is the frame that ends the connection, nothing else.
        wrongdoer.send(&client_frame(FIN | BINARY, b"{\"text\":\"fine\"}")).await;
        assert_eq!(wrongdoer.recv().await, (TEXT, b"{\"text\":\"fine\"}".to_vec()), "{what}");
        wrongdoer.send(frames).await;
        assert_eq!(wrongdoer.close_code().await, Some(code), "{what}");
        let reason = within_timeout(self.ended.recv()).await.unwrap();
        assert_eq!(reason.close_frame().map(|(code, _)| code.0), Some(code), "{what}: {reason:?}");
        eventually(before + 1, || count(&self.engine.metrics())).await;
        self.bystander_goes_on().await;
    }
}

on_each_transport!(frames_that_break_the_protocol_end_with_1002);
async fn frames_that_break_the_protocol_end_with_1002(transport: Transport) {
    let mut scene = Scene::json(transport).await;
    let broken: [(&str, Vec<u8>); 10] = [
        ("an unmasked frame", b"\x81\x02hi".to_vec()),
        ("a reserved bit", client_frame(FIN | 0x40 | TEXT, b"{}")),
        ("another reserved bit", client_frame(FIN | 0x10 | BINARY, b"{}")),
        ("a reserved opcode", client_frame(FIN | 0x3, b"")),
        ("a reserved control opcode", client_frame(FIN | 0xb, b"")),
        ("a continuation of nothing", client_frame(FIN, b"x")),
        ("a message within a message", [client_frame(TEXT, b"x"), client_frame(FIN | TEXT, b"y")].concat()),
        ("a fragmented ping", client_frame(PING, b"x")),
        ("a ping that is too long", client_frame(FIN | PING, &[0; 126])),
        ("a close code of no use", client_frame(FIN | CLOSE, &1005u16.to_be_bytes())),
    ];
    for (what, frames) in broken {
        scene.ends_with(what, &frames, 1002, |metrics| metrics.ended_protocol).await;
    }
}

on_each_transport!(text_that_is_not_utf_8_ends_with_1007_wherever_it_is_cut);
async fn text_that_is_not_utf_8_ends_with_1007_wherever_it_is_cut(transport: Transport) {
    let mut scene = Scene::json(transport).await;
    let cut = [client_frame(TEXT, b"\"\xc5"), client_frame(FIN, b"\x20\"")].concat();
    for (what, frames) in [
        ("a text", client_frame(FIN | TEXT, b"\xff\xfe")),
        ("a character cut by fragments", cut),
        // Known before its last byte has come.
        ("the first half of a text", client_frame(FIN | TEXT, &[b'x', 0xff, b'x', b'x'])[..9].to_vec()),
        ("the reason of a close", client_frame(FIN | CLOSE, b"\x03\xe8\xff")),
    ] {
        scene.ends_with(what, &frames, 1007, |metrics| metrics.ended_protocol).await;
    }
}

on_each_transport!(a_message_that_is_too_long_ends_with_1009_as_soon_as_it_claims_to_be);
async fn a_message_that_is_too_long_ends_with_1009_as_soon_as_it_claims_to_be(transport: Transport) {
    let config = WsHubConfig { max_message_bytes: 100, ..WsHubConfig::default() };
    let mut scene = Scene::set::<JsonCodec>(transport, config).await;
    let long = [b"{\"text\":\"".as_slice(), &[b'x'; 89], b"\"}"].concat();
    let (fits, too_long) =
        (client_frame(FIN | TEXT, &[&long[..98], b"\"}"].concat()), client_frame(FIN | TEXT, &[b'x'; 101]));
    let mut at_the_limit = scene.wrongdoer().await;
    at_the_limit.send(&fits).await;
    assert_eq!(at_the_limit.recv().await.1.len(), 100);

    let in_pieces = [client_frame(TEXT, &[b'x'; 60]), client_frame(FIN, &[b'x'; 41])].concat();
    let a_claim = [FIN | BINARY, 0x80 | 127, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 2, 3, 4];
    for (what, frames) in
        [("one frame", too_long), ("two fragments", in_pieces), ("terabytes, announced", a_claim.to_vec())]
    {
        scene.ends_with(what, &frames, 1009, |metrics| metrics.ended_protocol).await;
    }
}

on_each_transport!(a_flood_of_fragments_ends_with_1008);
async fn a_flood_of_fragments_ends_with_1008(transport: Transport) {
    let config = WsHubConfig { max_fragments: 16, ..WsHubConfig::default() };
    let mut scene = Scene::set::<JsonCodec>(transport, config).await;
    let sixteen: Vec<u8> = [client_frame(TEXT, b"{\"text\""), client_frame(0, b":"), client_frame(0, b"\"x")]
        .into_iter()
        .chain((0..12).map(|_| client_frame(0, b"")))
        .chain([client_frame(FIN, b"\"}")])
        .flatten()
        .collect();
    let mut at_the_limit = scene.wrongdoer().await;
    at_the_limit.send(&sixteen).await;
    assert_eq!(at_the_limit.recv().await, (TEXT, b"{\"text\":\"x\"}".to_vec()));

    let flood: Vec<u8> = std::iter::once(client_frame(TEXT, b""))
        .chain((0..16).map(|_| client_frame(0, b"")))
        .flatten()
        .collect();
    scene.ends_with("seventeen fragments", &flood, 1008, |metrics| metrics.ended_protocol).await;
}

on_each_transport!(a_message_that_the_codec_cannot_decode_ends_with_1007);
async fn a_message_that_the_codec_cannot_decode_ends_with_1007(transport: Transport) {
    let mut scene = Scene::json(transport).await;
    for (what, text) in [
        ("no JSON", "not JSON at all".as_bytes()),
        ("nothing", b""),
        ("JSON of another shape", b"{\"texts\":1}"),
        ("too much JSON", b"{\"text\":\"x\"} {}"),
        ("nesting without end", "[".repeat(10_000).as_bytes()),
    ] {
        let count = |metrics: &Metrics| metrics.ended_undecodable;
        scene.ends_with(what, &client_frame(FIN | TEXT, text), 1007, count).await;
    }
    assert_eq!(scene.engine.metrics().ended_protocol, 0);
}

on_each_transport!(a_text_for_a_binary_hub_ends_with_1003_and_postcard_that_is_none_with_1007);
async fn a_text_for_a_binary_hub_ends_with_1003_and_postcard_that_is_none_with_1007(transport: Transport) {
    let mut scene = Scene::set::<BinaryCodec>(transport, WsHubConfig::default()).await;
    for (what, frames, code) in [
        ("text", client_frame(FIN | TEXT, b"\x01x"), 1003),
        ("a length that lies", client_frame(FIN | BINARY, b"\xff\xff\xff\xff\x0fx"), 1007),
        ("a byte too many", client_frame(FIN | BINARY, b"\x01xx"), 1007),
        ("a string that is none", client_frame(FIN | BINARY, b"\x01\xff"), 1007),
    ] {
        let before = scene.engine.metrics().ended_undecodable;
        let mut wrongdoer = scene.wrongdoer().await;
        wrongdoer.send(&client_frame(FIN | BINARY, b"\x04fine")).await;
        assert_eq!(wrongdoer.recv().await, (BINARY, b"\x04fine".to_vec()));
        wrongdoer.send(&frames).await;
        assert_eq!(wrongdoer.close_code().await, Some(code), "{what}");
        let expected = if code == 1003 { CloseReason::WrongKind } else { CloseReason::Undecodable };
        assert_eq!(within_timeout(scene.ended.recv()).await, Some(expected), "{what}");
        eventually(before + 1, || scene.engine.metrics().ended_undecodable).await;
        scene.bystander_goes_on().await;
    }
}

on_each_transport!(what_comes_behind_the_offence_is_not_handled);
async fn what_comes_behind_the_offence_is_not_handled(transport: Transport) {
    let mut scene = Scene::json(transport).await;
    let mut wrongdoer = scene.wrongdoer().await;
    let good = client_frame(FIN | TEXT, b"{\"text\":\"x\"}");
    wrongdoer.send(&[good.clone(), client_frame(FIN | TEXT, b"bad"), good.clone(), good].concat()).await;
    assert_eq!(wrongdoer.recv().await.0, TEXT, "what came before is answered");
    assert_eq!(wrongdoer.close_code().await, Some(1007));
    assert_eq!(within_timeout(scene.ended.recv()).await, Some(CloseReason::Undecodable));
    scene.bystander_goes_on().await;
    // The bystander's two, the good one and the bad one.
    eventually(4, || scene.engine.metrics().tally.received).await;
}

on_each_transport!(a_stream_that_ends_within_a_frame_is_a_peer_that_disconnected);
async fn a_stream_that_ends_within_a_frame_is_a_peer_that_disconnected(transport: Transport) {
    let mut scene = Scene::json(transport).await;
    for cut in [1, 3, 7] {
        let mut wrongdoer = scene.wrongdoer().await;
        wrongdoer.send(&client_frame(FIN | TEXT, b"{\"text\":\"x\"}")[..cut]).await;
        wrongdoer.stream.shutdown().await.unwrap();
        let mut rest = Vec::new();
        within_timeout(wrongdoer.stream.read_to_end(&mut rest)).await.unwrap();
        assert_eq!(within_timeout(scene.ended.recv()).await, Some(CloseReason::Disconnected));
        assert_eq!(rest, b"", "nobody is left to read a Close");
    }
    scene.bystander_goes_on().await;
    assert_eq!(scene.engine.metrics().ended_protocol, 0);
}

on_each_transport!(a_handshake_that_is_none_says_why_and_takes_no_connection);
async fn a_handshake_that_is_none_says_why_and_takes_no_connection(transport: Transport) {
    let mut scene = Scene::json(transport).await;
    let key = "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    let (upgrade, version) =
        ("connection: Upgrade\r\nupgrade: websocket\r\n", "sec-websocket-version: 13\r\n");
    let cases = [
        ("GET", format!("{version}{key}"), 400, "Connection"),
        ("GET", format!("connection: Upgrade\r\n{version}{key}"), 400, "Upgrade"),
        ("GET", format!("{upgrade}{version}"), 400, "Sec-WebSocket-Key"),
        ("GET", format!("{upgrade}{version}sec-websocket-key: short\r\n"), 400, "Sec-WebSocket-Key"),
        ("GET", format!("{upgrade}{key}"), 426, "Sec-WebSocket-Version"),
        ("GET", format!("{upgrade}{key}sec-websocket-version: 8\r\n"), 426, "Sec-WebSocket-Version"),
        ("POST", format!("{upgrade}{version}{key}"), 400, "GET"),
    ];
    for (method, headers, status, reason) in cases {
        let mut stream = transport.connect(scene.server.address).await.unwrap();
        let request = format!("{method} /ws HTTP/1.1\r\nhost: x\r\n{headers}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        // The client ends its stream after the answer: hyper does not answer once it has read the end, and over TLS it
        // reads that together with the request.
        let mut answer = String::new();
        while !is_whole(&answer) {
            answer.push(within_timeout(stream.read_u8()).await.unwrap().into());
        }
        stream.shutdown().await.unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{headers}: {answer}");
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(body.contains(reason), "{headers}: {answer}");
        assert_eq!(answer.contains("sec-websocket-version: 13\r\n"), status == 426, "{answer}");
    }
    scene.bystander_goes_on().await;
    eventually(1, || scene.engine.metrics().adopted).await;
    assert_eq!(scene.engine.connection_count(), 1);
}

/// Whether an answer has as many bytes behind its head as that says.
fn is_whole(answer: &str) -> bool {
    let Some((head, body)) = answer.split_once("\r\n\r\n") else { return false };
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
    body.len() == length.parse::<usize>().unwrap()
}

#[test]
fn an_impossible_config_is_refused_with_the_fields_name_and_range() {
    use std::time::Duration;
    let default = WsHubConfig::default;
    let day = Duration::from_secs(24 * 60 * 60);
    for (config, field, range) in [
        (WsHubConfig { outbox_frames: 0, ..default() }, "outbox_frames", "1 to 16777216"),
        (WsHubConfig { outbox_bytes: 10, ..default() }, "outbox_bytes", "1024 to 1073741824"),
        (WsHubConfig { overflow_frames: usize::MAX, ..default() }, "overflow_frames", "0 to 16777216"),
        (WsHubConfig { max_message_bytes: 0, ..default() }, "max_message_bytes", "1 to 1073741824"),
        (WsHubConfig { max_fragments: 0, ..default() }, "max_fragments", "1 to 16777216"),
        (
            WsHubConfig { heartbeat_interval: Some(day * 2), ..default() },
            "heartbeat_interval",
            "10ms to 86400s",
        ),
        (WsHubConfig { pong_timeout: Duration::ZERO, ..default() }, "pong_timeout", "10ms to 86400s"),
        (
            WsHubConfig { idle_timeout: Some(Duration::ZERO), ..default() },
            "idle_timeout",
            "10ms to 31622400s",
        ),
        (
            WsHubConfig { max_connection_duration: Some(day * 400), ..default() },
            "max_connection_duration",
            "10ms to 31622400s",
        ),
        (WsHubConfig { close_timeout: day, ..default() }, "close_timeout", "10ms to 3600s"),
    ] {
        let error = engine(1).hub::<Notes<JsonCodec>>(config.clone()).unwrap_err();
        assert_eq!(config.validate(), Err(error.clone()));
        let text = error.to_string();
        assert!(
            text.starts_with(&format!("`{field}` is ")) && text.ends_with(&format!("from {range}")),
            "{text}"
        );
    }
}

#[test]
fn a_message_longer_than_the_engine_keeps_is_refused_where_the_hub_is_made() {
    let config = EngineConfig { unfinished_bytes_max: 1 << 20, shards: Some(1), ..EngineConfig::default() };
    let engine = Engine::start(config).unwrap();
    let longer = WsHubConfig { max_message_bytes: (1 << 20) + 1, ..WsHubConfig::default() };
    let error = engine.hub::<Notes<JsonCodec>>(longer).unwrap_err();
    assert_eq!(error.to_string(), "`max_message_bytes` is 1048577, but must be from 1 to 1048576");
    let longest = WsHubConfig { max_message_bytes: 1 << 20, ..WsHubConfig::default() };
    assert!(engine.hub::<Notes<JsonCodec>>(longest).is_ok());
}
