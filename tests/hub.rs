//! The explicit form over real sockets: engines from configs, hubs side by side, publishing from outside, ends.
//!
//! Does not know how the engine does it; what several shards promise together stands in `promises.rs`.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, State};
use axum::response::{Html, IntoResponse as _, Response};
use axum::routing::{any, get};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use shardcast::{
    BinaryCodec, CloseCode, CloseReason, ConnectionId, DisconnectRequest, Engine, EngineConfig, Hub,
    HubContext, JsonCodec, PublishError, RawCodec, RawMessage, Refusal, RunOn, WebSocketUpgrade, WsHub,
    WsHubConfig, serve_hub,
};
use testkit_hub::{
    Client, CommandHub, OnRuntime, Server, command_app, connect, engine, eventually, within_timeout,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio_tungstenite::tungstenite::{self, Message};

// ---- engines

#[tokio::test]
async fn an_engine_is_built_from_json_and_runs() {
    let config: EngineConfig = serde_json::from_str(r#"{"shards": 3, "pin": false}"#).unwrap();
    assert_eq!(config, EngineConfig { shards: Some(3), pin: false, ..EngineConfig::default() });
    let engine = Engine::start(config).unwrap();
    assert_eq!(engine.shard_count(), 3);
    let server = Server::start(command_app(engine.hub(WsHubConfig::default()).unwrap())).await;
    let mut shards = Vec::new();
    let mut peers = Vec::new();
    for _ in 0..3 {
        let (peer, id) = connect(&server.url("/ws")).await;
        peers.push(peer);
        shards.push(id.shard());
    }
    shards.sort_unstable();
    assert_eq!(shards, [0, 1, 2], "each goes to the least loaded shard");
    assert_eq!(engine.connection_count(), 3);
    eventually(3, || engine.metrics().adopted).await;
    assert_eq!(engine.shard_metrics().iter().map(|shard| shard.adopted).collect::<Vec<_>>(), [1, 1, 1]);
}

#[test]
fn a_config_with_a_mistake_says_which_field_and_what_it_may_be() {
    let unknown = serde_json::from_str::<EngineConfig>(r#"{"shard": 3}"#).unwrap_err().to_string();
    assert!(unknown.contains("`shard`") && unknown.contains("`shards`"), "{unknown}");
    let of_no_number = serde_json::from_str::<EngineConfig>(r#"{"log_capacity": "many"}"#).unwrap_err();
    assert!(of_no_number.to_string().contains("many"), "{of_no_number}");
    for (json, message) in [
        (r#"{"shards": 0}"#, "`shards` is 0, but must be from 1 to 4096"),
        (r#"{"shards": 4097}"#, "`shards` is 4097, but must be from 1 to 4096"),
        (r#"{"log_capacity": 1}"#, "`log_capacity` is 1, but must be from 2 to 1048576"),
        (r#"{"mailbox_capacity": 0}"#, "`mailbox_capacity` is 0, but must be from 1 to 1048576"),
        (r#"{"publishers_waiting_max": 0}"#, "`publishers_waiting_max` is 0, but must be from 1 to 16777216"),
        (r#"{"read_buffer_bytes": 10}"#, "`read_buffer_bytes` is 10, but must be from 1024 to 16777216"),
        (r#"{"max_connections": 0}"#, "`max_connections` is 0, but must be from 1 to 1073741824"),
    ] {
        let config: EngineConfig = serde_json::from_str(json).unwrap();
        assert_eq!(Engine::start(config).unwrap_err().to_string(), message);
    }
}

#[tokio::test]
async fn dropping_the_last_handle_ends_the_engine_and_clients_see_1001() {
    let engine = engine(2);
    let hub = engine.hub::<CommandHub>(WsHubConfig::default()).unwrap();
    let clients = hub.clients().clone();
    let server = Server::start(command_app(hub)).await;
    let mut peers = Vec::new();
    for _ in 0..4 {
        peers.push(connect(&server.url("/ws")).await.0);
    }
    // What was published before the end is still delivered.
    clients.to_all().publish(&"last words".to_owned()).await.unwrap();
    server.stop().await;
    let ends: Vec<_> = peers.into_iter().map(|peer| tokio::spawn(peer.rest())).collect();
    // The drop waits for the shards, and they for their peers.
    within_timeout(tokio::task::spawn_blocking(move || drop(engine))).await.unwrap();
    for end in ends {
        let (texts, close) = within_timeout(end).await.unwrap();
        assert_eq!(texts, ["last words"]);
        assert_eq!(close, Some((1001, String::new())));
    }
    let refused = clients.to_all().deliver(&"too late".to_owned()).await;
    assert!(matches!(refused, Err(PublishError::Closed)) || clients.is_empty(), "{refused:?}");
}

// ---- hubs side by side

#[tokio::test]
async fn hubs_on_one_engine_do_not_hear_each_other() {
    let engine = engine(2);
    let [red, blue] = [(); 2].map(|()| engine.hub::<CommandHub>(WsHubConfig::default()).unwrap());
    let (at_red, at_blue) =
        (Server::start(command_app(red.clone())).await, Server::start(command_app(blue.clone())).await);
    let (mut ada, ada_id) = connect(&at_red.url("/ws")).await;
    let (mut bob, bob_id) = connect(&at_blue.url("/ws")).await;
    let (mut cyd, cyd_id) = connect(&at_blue.url("/ws")).await;

    // The groups have one name and nothing else in common.
    ada.send_text("join room").await;
    bob.send_text("join room").await;
    bob.send_text("me joined").await;
    bob.recv_texts(&["joined"]).await;
    ada.send_text("all from Ada").await;
    ada.send_text("group room to Ada's room").await;
    ada.recv_texts(&["from Ada", "to Ada's room"]).await;

    // An id of one hub is nobody's in the other, whatever is done with it.
    assert_eq!(red.to(bob_id).deliver(&"unicast".to_owned()).await.unwrap().recipients, 0);
    red.join(cyd_id, "room").await.unwrap();
    red.leave(bob_id, "room").await.unwrap();
    red.disconnect(bob_id, CloseCode::NORMAL, "").await.unwrap();
    assert_eq!(red.connection_metrics(bob_id).await.unwrap(), None);
    assert!(red.connection_metrics(ada_id).await.unwrap().is_some());
    assert_eq!(red.to_group("room").deliver(&"the room".to_owned()).await.unwrap().recipients, 1);
    assert_eq!(
        red.to_all().except(&[bob_id, cyd_id]).deliver(&"all".to_owned()).await.unwrap().recipients,
        1
    );
    ada.recv_texts(&["the room", "all"]).await;

    assert_eq!((red.len(), blue.len(), engine.connection_count()), (1, 2, 3));
    assert_eq!((red.group_len("room"), blue.group_len("room")), (1, 1));
    blue.to_group("room").publish(&"still a member".to_owned()).await.unwrap();
    blue.to_all().publish(&"done".to_owned()).await.unwrap();
    bob.recv_texts(&["still a member", "done"]).await;
    cyd.recv_texts(&["done"]).await;
}

#[tokio::test]
async fn an_id_that_nobody_ever_had_reaches_nobody() {
    let hub = engine(2).hub::<CommandHub>(WsHubConfig::default()).unwrap();
    let server = Server::start(command_app(hub.clone())).await;
    let (peer, id) = connect(&server.url("/ws")).await;
    peer.leave().await;
    eventually(0, || hub.len()).await;
    // One that has gone, and one of a slot that was never taken.
    for id in [id, "0000000001ffffff".parse().unwrap()] {
        assert_eq!(hub.to(id).deliver(&"hello?".to_owned()).await.unwrap().recipients, 0);
        hub.join(id, "room").await.unwrap();
        hub.leave(id, "room").await.unwrap();
        hub.disconnect(id, CloseCode::NORMAL, "").await.unwrap();
        assert_eq!(hub.connection_metrics(id).await.unwrap(), None);
    }
    assert_eq!(hub.group_count(), 0);
}

// ---- publishing from outside

#[tokio::test]
async fn who_has_a_handle_publishes_from_outside_and_is_told_how_many_got_it() {
    let hub = engine(2).hub::<CommandHub>(WsHubConfig::default()).unwrap();
    let server = Server::start(command_app(hub.clone())).await;
    assert_eq!(hub.to_all().deliver(&"nobody is here".to_owned()).await.unwrap().recipients, 0);
    let (mut ada, ada_id) = connect(&server.url("/ws")).await;
    let (mut bob, bob_id) = connect(&server.url("/ws")).await;
    let (mut cyd, cyd_id) = connect(&server.url("/ws")).await;
    hub.join(ada_id, "red").await.unwrap();
    hub.join(bob_id, "red").await.unwrap();
    hub.join(bob_id, "blue").await.unwrap();
    assert_eq!((hub.len(), hub.group_count(), hub.group_len("red")), (3, 2, 2));

    let text = |text: &str| text.to_owned();
    hub.to_all().publish(&text("published")).await.unwrap();
    hub.to_all().try_publish(&text("tried")).unwrap();
    let all = hub.to_all().deliver(&text("sent")).await.unwrap();
    let but_one = hub.to_all().except(&[ada_id]).deliver(&text("but Ada")).await.unwrap();
    let red = hub.to_group("red").deliver(&text("red")).await.unwrap();
    let both = hub.to_groups(&["red", "blue", "none"]).deliver(&text("both")).await.unwrap();
    let both_but =
        hub.to_groups(&["red", "blue"]).except(&[bob_id]).deliver(&text("both but Bob")).await.unwrap();
    let none = hub.to_group("none").deliver(&text("none")).await.unwrap();
    let one = hub.to(cyd_id).deliver(&text("one")).await.unwrap();
    let left_out = hub.to(cyd_id).except(&[cyd_id]).deliver(&text("left out")).await.unwrap();
    // From a thread without a runtime.
    let from_a_thread = hub.clone();
    std::thread::spawn(move || from_a_thread.to_all().try_publish(&"from a thread".to_owned()).unwrap())
        .join()
        .unwrap();

    ada.recv_texts(&["published", "tried", "sent", "red", "both", "both but Bob", "from a thread"]).await;
    bob.recv_texts(&["published", "tried", "sent", "but Ada", "red", "both", "from a thread"]).await;
    cyd.recv_texts(&["published", "tried", "sent", "but Ada", "one", "from a thread"]).await;
    let recipients =
        [all, but_one, red, both, both_but, none, one, left_out].map(|receipt| receipt.recipients);
    assert_eq!(recipients, [3, 2, 2, 2, 1, 0, 1, 0]);
    assert_eq!(all.delayed, 0, "nobody was behind");
}

#[tokio::test]
async fn a_message_that_cannot_be_encoded_reaches_nobody_and_is_counted() {
    struct Maps;
    impl WsHub for Maps {
        type Codec = JsonCodec;
        type InMessage = u32;
        type OutMessage = HashMap<Option<u32>, u32>;
        async fn on_message(&self, key: u32, ctx: HubContext<Self>) {
            // JSON has no key for `Some(7)` nested once more.
            ctx.broadcast(HashMap::from([((key != 0).then_some(key), 1)])).await;
        }
    }
    let hub = engine(1).hub::<Maps>(WsHubConfig::default()).unwrap();
    let app = async |ws: WebSocketUpgrade, State(hub): State<Hub<Maps>>| ws.serve(&hub, Maps);
    let server = Server::start(Router::new().route("/ws", any(app)).with_state(hub.clone())).await;
    let mut peer = Client::connect(server.url("/ws")).await;
    peer.send_text("0").await;
    peer.send_text("7").await;
    peer.recv_texts(&[r#"{"7":1}"#]).await;
    assert_eq!(hub.encode_failures(), 1);
    let refused = hub.to_all().deliver(&HashMap::from([(None, 1)])).await;
    assert!(matches!(refused, Err(PublishError::Encode(_))), "{refused:?}");
    assert_eq!(hub.encode_failures(), 2);
}

#[tokio::test]
async fn a_hub_greets_and_joins_groups_before_the_first_message_is_read() {
    struct Greeter {
        room: String,
    }
    impl WsHub for Greeter {
        type Codec = RawCodec;
        type InMessage = String;
        type OutMessage = String;
        async fn on_connected(&self, ctx: HubContext<Self>) -> Result<(), Refusal> {
            ctx.unicast(format!("welcome to {}", self.room)).await;
            ctx.add_to_group(&self.room).await;
            // What comes meanwhile must wait.
            tokio::time::sleep(Duration::from_millis(5)).await;
            let members = ctx.clients().to_group(&self.room).deliver(&"one more".to_owned()).await.unwrap();
            ctx.unicast(format!("{} here", members.recipients)).await;
            Ok(())
        }
        async fn on_message(&self, text: String, ctx: HubContext<Self>) {
            ctx.broadcast_group(&self.room, text).await;
        }
    }
    let hub = engine(2).hub::<Greeter>(WsHubConfig::default()).unwrap();
    let app = async |ws: WebSocketUpgrade, Path(room): Path<String>, State(hub): State<Hub<Greeter>>| {
        ws.serve(&hub, Greeter { room })
    };
    let server = Server::start(Router::new().route("/{room}", any(app)).with_state(hub)).await;
    let mut ada = Client::connect(server.url("/garden")).await;
    ada.send_text("first").await;
    ada.recv_texts(&["welcome to garden", "one more", "1 here", "first"]).await;
    let mut bob = Client::connect(server.url("/garden")).await;
    bob.send_text("second").await;
    bob.recv_texts(&["welcome to garden", "one more", "2 here", "second"]).await;
    ada.recv_texts(&["one more", "second"]).await;
}

// ---- the door

#[tokio::test]
async fn a_full_house_answers_503_with_retry_after_and_admits_again_after_a_leave() {
    let config = EngineConfig { shards: Some(2), pin: false, max_connections: 2, ..EngineConfig::default() };
    let engine = Engine::start(config).unwrap();
    let server = Server::start(command_app(engine.hub(WsHubConfig::default()).unwrap())).await;
    let first = connect(&server.url("/ws")).await.0;
    let (mut second, _) = connect(&server.url("/ws")).await;
    for _ in 0..3 {
        let refused = within_timeout(Client::try_connect(server.url("/ws"), &[])).await.err().unwrap();
        let tungstenite::Error::Http(response) = refused else { panic!("{refused:?}") };
        assert_eq!(response.status(), 503);
        let retry_after: u64 = response.headers()["retry-after"].to_str().unwrap().parse().unwrap();
        assert!((2..=8).contains(&retry_after), "{retry_after}");
    }
    second.send_text("me undisturbed").await;
    second.recv_texts(&["undisturbed"]).await;
    first.leave().await;
    eventually(1, || engine.connection_count()).await;
    let (mut third, _) = connect(&server.url("/ws")).await;
    third.send_text("all hello").await;
    second.recv_texts(&["hello"]).await;
    // A handshake that is refused for another reason takes no place.
    third.leave().await;
    eventually(1, || engine.connection_count()).await;
    for _ in 0..3 {
        let refused =
            within_timeout(Client::try_connect(server.url("/ws"), &[("sec-websocket-version", "8")])).await;
        assert!(refused.is_err());
    }
    assert_eq!(engine.connection_count(), 1);
}

#[tokio::test]
async fn the_subprotocol_is_the_servers_choice_among_the_clients() {
    let hub = engine(1).hub::<CommandHub>(WsHubConfig::default()).unwrap();
    let app = async |ws: WebSocketUpgrade, State(hub): State<Hub<CommandHub>>| {
        ws.protocols(["chat.v2", "chat.v1"]).serve(&hub, CommandHub)
    };
    let server = Server::start(Router::new().route("/ws", any(app)).with_state(hub)).await;
    let offer = [("sec-websocket-protocol", "soap, chat.v1, chat.v2")];
    let (mut peer, response) = within_timeout(Client::try_connect(server.url("/ws"), &offer)).await.unwrap();
    assert_eq!(response.headers()["sec-websocket-protocol"], "chat.v2");
    assert_eq!(peer.recv_text().await.len(), 16, "and the hub serves it");
    let (_, response) = within_timeout(Client::try_connect(server.url("/ws"), &[])).await.unwrap();
    assert!(!response.headers().contains_key("sec-websocket-protocol"));
}

#[tokio::test]
async fn one_route_serves_a_page_and_a_hub() {
    let hub = engine(1).hub::<CommandHub>(WsHubConfig::default()).unwrap();
    let app = async |ws: Option<WebSocketUpgrade>, State(hub): State<Hub<CommandHub>>| -> Response {
        match ws {
            Some(ws) => ws.serve(&hub, CommandHub).into_response(),
            None => Html("<h1>a page</h1>").into_response(),
        }
    };
    let server = Server::start(Router::new().route("/", any(app)).with_state(hub)).await;
    let mut page = String::new();
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    within_timeout(stream.read_to_string(&mut page)).await.unwrap();
    assert!(page.starts_with("HTTP/1.1 200 ") && page.ends_with("<h1>a page</h1>"), "{page}");
    let (mut peer, _) = connect(&server.url("/")).await;
    peer.send_text("me and a hub").await;
    peer.recv_texts(&["and a hub"]).await;
}

// ---- where methods run

/// Uses all of tokio in its methods, and says so.
struct Busy {
    ends: UnboundedSender<DisconnectRequest>,
}

impl WsHub for Busy {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;

    async fn on_connected(&self, ctx: HubContext<Self>) -> Result<(), Refusal> {
        tokio::time::sleep(Duration::from_millis(1)).await;
        ctx.unicast("open".to_owned()).await;
        Ok(())
    }

    async fn on_message(&self, message: String, ctx: HubContext<Self>) {
        let answer = match message.split_once(' ') {
            Some(("sleep", millis)) => {
                tokio::time::sleep(Duration::from_millis(millis.parse().unwrap())).await;
                message
            }
            Some(("timeout", _)) => {
                let never = std::future::pending::<()>();
                tokio::time::timeout(Duration::from_millis(1), never).await.unwrap_err().to_string()
            }
            Some(("spawn", text)) => {
                let text = text.to_owned();
                tokio::spawn(async move { format!("spawned {text}") }).await.unwrap()
            }
            Some(("block", text)) => {
                let text = text.to_owned();
                tokio::task::spawn_blocking(move || format!("blocked {text}")).await.unwrap()
            }
            Some(("tcp", address)) => {
                let mut stream = TcpStream::connect(address).await.unwrap();
                let mut text = String::new();
                stream.read_to_string(&mut text).await.unwrap();
                text
            }
            Some(("thread", _)) => std::thread::current().name().unwrap_or_default().to_owned(),
            _ => message,
        };
        ctx.unicast(answer).await;
    }

    async fn on_disconnect(&self, request: DisconnectRequest) {
        tokio::time::sleep(Duration::from_millis(1)).await;
        self.ends.send(request).unwrap();
    }
}

async fn methods_use_all_of_tokio_in_order<H>()
where
    H: WsHub<Codec = RawCodec, InMessage = String, OutMessage = String> + From<Busy>,
{
    let (ends, mut ended) = unbounded_channel();
    let hub = engine(2).hub::<H>(WsHubConfig::default()).unwrap();
    let serve = {
        let hub = hub.clone();
        async move |ws: WebSocketUpgrade| ws.serve(&hub, Busy { ends })
    };
    let server = Server::start(Router::new().route("/ws", any(serve))).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            stream.write_all(b"by TCP").await.unwrap();
        }
    });

    let mut peers = Vec::new();
    for _ in 0..3 {
        peers.push(Client::connect(server.url("/ws")).await);
    }
    // All at once: an answer overtaken by a faster one would be out of order.
    for peer in &mut peers {
        for message in [
            "sleep 5",
            "at once",
            "timeout x",
            "spawn it",
            "sleep 2",
            "block it",
            &format!("tcp {address}"),
            "end",
        ] {
            peer.send_text(message).await;
        }
    }
    for peer in &mut peers {
        let elapsed = "deadline has elapsed";
        peer.recv_texts(&["open", "sleep 5", "at once", elapsed, "spawned it", "sleep 2", "blocked it"])
            .await;
        peer.recv_texts(&["by TCP", "end"]).await;
        peer.send_text("thread x").await;
        let thread = peer.recv_text().await;
        assert_eq!(thread.starts_with("shard-"), H::RUN_ON == RunOn::Shard, "{thread}");
    }
    for peer in peers {
        peer.leave().await;
        let end = within_timeout(ended.recv()).await.unwrap();
        assert_eq!(end.reason, CloseReason::Peer { code: Some(CloseCode::NORMAL), text: "".into() });
    }
    eventually(0, || hub.len()).await;
}

#[tokio::test]
async fn methods_on_the_shard_use_all_of_tokio_and_answer_in_order() {
    methods_use_all_of_tokio_in_order::<Busy>().await;
}

#[tokio::test]
async fn methods_on_the_runtime_use_all_of_tokio_and_answer_in_order() {
    methods_use_all_of_tokio_in_order::<OnRuntime<Busy>>().await;
}

// ---- the short form

struct Short {
    ends: UnboundedSender<CloseReason>,
}

impl WsHub for Short {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;
    async fn on_message(&self, text: String, ctx: HubContext<Self>) {
        ctx.unicast(format!("{} bytes", text.len())).await;
    }
    async fn on_disconnect(&self, request: DisconnectRequest) {
        // Later than the socket's end by far, but before that of `serve_hub`.
        tokio::time::sleep(Duration::from_millis(5)).await;
        self.ends.send(request.reason).unwrap();
    }
}

#[tokio::test]
async fn serve_hub_ends_when_its_connection_has_ended_and_holds_to_its_own_config() {
    let (ends, mut ended) = unbounded_channel();
    let (returns, mut returned) = unbounded_channel();
    let serve = async move |ws: WebSocketUpgrade, Path(max_message_bytes): Path<usize>| {
        ws.on_upgrade(async move |socket| {
            let config = WsHubConfig { max_message_bytes, ..WsHubConfig::default() };
            serve_hub(socket, Short { ends: ends.clone() }, &config).await;
            // The hub was told the end before.
            returns.send((max_message_bytes, ended_count(&ends))).unwrap();
        })
    };
    fn ended_count(ends: &UnboundedSender<CloseReason>) -> bool {
        !ends.is_closed()
    }
    let server = Server::start(Router::new().route("/{max}", get(serve))).await;
    // Two settings of one hub type at the same time, the first one again as the third.
    let mut small = Client::connect(server.url("/10")).await;
    let mut large = Client::connect(server.url("/1000")).await;
    let mut small_again = Client::connect(server.url("/10")).await;
    let text = "x".repeat(500);
    large.send_text(text.as_str()).await;
    large.recv_texts(&["500 bytes"]).await;
    small.send_text("0123456789").await;
    small.recv_texts(&["10 bytes"]).await;
    assert!(returned.try_recv().is_err(), "nobody has left");

    small.send_text(text.as_str()).await;
    assert_eq!(small.closed().await.0, 1009);
    assert_eq!(within_timeout(returned.recv()).await.unwrap().0, 10);
    assert!(matches!(ended.try_recv(), Ok(CloseReason::Protocol(_))), "on_disconnect comes first");

    large.send_text(text.as_str()).await;
    large.recv_texts(&["500 bytes"]).await;
    small_again.send_text(text.as_str()).await;
    assert_eq!(small_again.closed().await.0, 1009);
    assert_eq!(within_timeout(returned.recv()).await.unwrap().0, 10);
    assert!(ended.try_recv().is_ok());

    drop(large);
    assert_eq!(within_timeout(returned.recv()).await.unwrap().0, 1000);
    assert_eq!(ended.try_recv(), Ok(CloseReason::Disconnected));
}

#[tokio::test]
async fn serve_hub_with_an_impossible_config_closes_the_connection_and_returns() {
    let (returns, mut returned) = unbounded_channel();
    let serve = async move |ws: WebSocketUpgrade| {
        ws.on_upgrade(async move |socket| {
            let config = WsHubConfig { outbox_frames: 0, ..WsHubConfig::default() };
            serve_hub(socket, CommandHub, &config).await;
            returns.send(()).unwrap();
        })
    };
    let server = Server::start(Router::new().route("/ws", get(serve))).await;
    let peer = Client::connect(server.url("/ws")).await;
    assert_eq!(peer.closed().await.0, 1011);
    within_timeout(returned.recv()).await.unwrap();
}

// ---- codecs

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Reading {
    sensor: u32,
    celsius: f32,
}

#[tokio::test]
async fn a_binary_hub_speaks_postcard() {
    struct Sensors;
    impl WsHub for Sensors {
        type Codec = BinaryCodec;
        type InMessage = Reading;
        type OutMessage = Reading;
        async fn on_message(&self, reading: Reading, ctx: HubContext<Self>) {
            ctx.broadcast(Reading { celsius: reading.celsius + 1.0, ..reading }).await;
        }
    }
    let hub = engine(2).hub::<Sensors>(WsHubConfig::default()).unwrap();
    let app = async |ws: WebSocketUpgrade, State(hub): State<Hub<Sensors>>| ws.serve(&hub, Sensors);
    let server = Server::start(Router::new().route("/ws", any(app)).with_state(hub)).await;
    let mut peers = [Client::connect(server.url("/ws")).await, Client::connect(server.url("/ws")).await];
    // Until both have been adopted, which each one's own echo proves.
    for sensor in 0..2 {
        let reading = postcard::to_stdvec(&Reading { sensor, celsius: 20.0 }).unwrap();
        peers[sensor as usize].send(Message::Binary(reading.into())).await;
        loop {
            let Some(Message::Binary(answer)) = peers[sensor as usize].recv().await else {
                panic!("no answer")
            };
            let answer: Reading = postcard::from_bytes(&answer).unwrap();
            assert_eq!(answer.celsius, 21.0);
            if answer.sensor == sensor {
                break;
            }
        }
    }
    let [mut first, _] = peers;
    let Some(Message::Binary(answer)) = first.recv().await else { panic!("no answer") };
    assert_eq!(postcard::from_bytes::<Reading>(&answer).unwrap(), Reading { sensor: 1, celsius: 21.0 });
}

#[tokio::test]
async fn a_raw_hub_passes_text_as_text_and_binary_as_binary() {
    struct RawClient;
    impl WsHub for RawClient {
        type Codec = RawCodec;
        type InMessage = RawMessage;
        type OutMessage = RawMessage;
        async fn on_message(&self, message: RawMessage, ctx: HubContext<Self>) {
            ctx.unicast(message).await;
        }
    }
    let hub = engine(1).hub::<RawClient>(WsHubConfig::default()).unwrap();
    let app = async |ws: WebSocketUpgrade, State(hub): State<Hub<RawClient>>| ws.serve(&hub, RawClient);
    let server = Server::start(Router::new().route("/ws", any(app)).with_state(hub)).await;
    let mut peer = Client::connect(server.url("/ws")).await;
    for message in [
        Message::text("žluťoučký"),
        Message::text(""),
        Message::binary(vec![0xff, 0, 0xfe]),
        Message::binary(Bytes::new()),
        Message::text("x".repeat(60_000)),
    ] {
        peer.send(message.clone()).await;
        assert_eq!(peer.recv().await, Some(message));
    }
}

// ---- ends

#[tokio::test]
async fn disconnect_tells_the_client_its_code_and_reason_after_what_was_sent_before() {
    let hub = engine(2).hub::<CommandHub>(WsHubConfig::default()).unwrap();
    let server = Server::start(command_app(hub.clone())).await;
    let (ada, ada_id) = connect(&server.url("/ws")).await;
    let (mut bob, bob_id) = connect(&server.url("/ws")).await;
    let (mut cyd, _) = connect(&server.url("/ws")).await;
    hub.to(ada_id).publish(&"first".to_owned()).await.unwrap();
    hub.to_all().publish(&"second".to_owned()).await.unwrap();
    hub.disconnect(ada_id, CloseCode(4321), "you know why").await.unwrap();
    hub.to_all().publish(&"third".to_owned()).await.unwrap();
    let (texts, close) = ada.rest().await;
    assert_eq!(texts, ["first", "second"]);
    assert_eq!(close, Some((4321, "you know why".to_owned())));

    bob.recv_texts(&["second", "third"]).await;
    // From within, and a reason that is too long for a frame.
    let (reason, cut) = ("ž".repeat(100), "ž".repeat(61));
    bob.send_text(format!("end 1008 {reason}")).await;
    assert_eq!(bob.closed().await, (1008, cut));
    eventually(1, || hub.len()).await;
    assert_eq!(hub.to(bob_id).deliver(&"gone".to_owned()).await.unwrap().recipients, 0);
    cyd.recv_texts(&["second", "third"]).await;
}

/// Panics where it is told to, and tells its ends.
struct Fragile {
    at: &'static str,
    ends: UnboundedSender<CloseReason>,
}

impl WsHub for Fragile {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;

    async fn on_connected(&self, _: HubContext<Self>) -> Result<(), Refusal> {
        assert_ne!(self.at, "open", "told to");
        Ok(())
    }

    async fn on_message(&self, text: String, ctx: HubContext<Self>) {
        if self.at == "later" {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(!matches!(self.at, "message" | "later"), "told to");
        ctx.unicast(text).await;
    }

    async fn on_disconnect(&self, request: DisconnectRequest) {
        self.ends.send(request.reason).unwrap();
        assert_ne!(self.at, "disconnect", "told to");
    }
}

async fn a_panic_ends_only_its_own_connection<H>()
where
    H: WsHub<Codec = RawCodec, InMessage = String, OutMessage = String> + From<Fragile>,
{
    let engine = engine(1);
    let (ends, mut ended) = unbounded_channel();
    let hub = engine.hub::<H>(WsHubConfig::default()).unwrap();
    let routes = ["open", "message", "later", "disconnect", "never"].map(|at| (at, ends.clone()));
    let app = routes.into_iter().fold(Router::new(), |app, (at, ends)| {
        let hub = hub.clone();
        let serve = async move |ws: WebSocketUpgrade| ws.serve(&hub, Fragile { at, ends });
        app.route(&format!("/{at}"), any(serve))
    });
    let server = Server::start(app).await;
    let mut bystander = Client::connect(server.url("/never")).await;

    let at_open = Client::connect(server.url("/open")).await;
    assert_eq!(at_open.closed().await.0, 1011);
    for at in ["message", "later"] {
        let mut peer = Client::connect(server.url(&format!("/{at}"))).await;
        peer.send_text("now").await;
        peer.send_text("not handled any more").await;
        assert_eq!(peer.closed().await.0, 1011);
    }
    for _ in 0..3 {
        assert_eq!(within_timeout(ended.recv()).await, Some(CloseReason::HandlerPanicked));
    }
    let at_end = Client::connect(server.url("/disconnect")).await;
    at_end.leave().await;
    assert!(matches!(within_timeout(ended.recv()).await, Some(CloseReason::Peer { .. })));
    eventually(1, || engine.connection_count()).await;
    bystander.send_text("still here").await;
    bystander.recv_texts(&["still here"]).await;
    assert!(ended.try_recv().is_err(), "each is told its end once");
    eventually(3, || engine.metrics().ended_panic).await;
    assert_eq!(hub.len(), 1);
}

#[tokio::test]
async fn a_panic_on_the_shard_ends_only_its_own_connection_with_1011() {
    a_panic_ends_only_its_own_connection::<Fragile>().await;
}

#[tokio::test]
async fn a_panic_on_the_runtime_ends_only_its_own_connection_with_1011() {
    a_panic_ends_only_its_own_connection::<OnRuntime<Fragile>>().await;
}

/// Cleans up in its `Drop`, by a task of its runtime, and fails at it if told so.
struct Tidy {
    fails: bool,
    dropped: UnboundedSender<bool>,
}

impl Drop for Tidy {
    fn drop(&mut self) {
        let (dropped, fails) = (self.dropped.clone(), self.fails);
        tokio::spawn(async move { dropped.send(fails).unwrap() });
        assert!(!self.fails, "told to");
    }
}

impl WsHub for Tidy {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;
    async fn on_message(&self, text: String, ctx: HubContext<Self>) {
        ctx.unicast(text).await;
    }
}

#[tokio::test]
async fn a_hub_cleans_up_within_its_runtime_and_its_panic_there_harms_no_other() {
    let engine = engine(1);
    let hub = engine.hub::<Tidy>(WsHubConfig::default()).unwrap();
    let (dropped, mut was_dropped) = unbounded_channel();
    let serve = {
        let hub = hub.clone();
        async move |ws: WebSocketUpgrade, Path(fails): Path<bool>| ws.serve(&hub, Tidy { fails, dropped })
    };
    let server = Server::start(Router::new().route("/{fails}", any(serve))).await;
    let mut bystander = Client::connect(server.url("/false")).await;
    for fails in [false, true] {
        let mut peer = Client::connect(server.url(&format!("/{fails}"))).await;
        peer.send_text("here").await;
        peer.recv_texts(&["here"]).await;
        peer.leave().await;
        assert_eq!(within_timeout(was_dropped.recv()).await, Some(fails));
    }
    bystander.send_text("still here").await;
    bystander.recv_texts(&["still here"]).await;
    eventually(1, || engine.connection_count()).await;
}

/// Keeps the context, to have it in `on_disconnect`.
struct Keeper {
    context: Mutex<Option<HubContext<Self>>>,
    dropped: UnboundedSender<()>,
}

impl WsHub for Keeper {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;
    async fn on_connected(&self, ctx: HubContext<Self>) -> Result<(), Refusal> {
        ctx.unicast("open".to_owned()).await;
        *self.context.lock().unwrap() = Some(ctx);
        Ok(())
    }
    async fn on_message(&self, _: String, _: HubContext<Self>) {}
    async fn on_disconnect(&self, _: DisconnectRequest) {
        let context = self.context.lock().unwrap().clone().unwrap();
        context.broadcast("one has left".to_owned()).await;
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.dropped.send(()).unwrap();
    }
}

#[tokio::test]
async fn a_hub_that_keeps_its_context_is_dropped_with_its_connection_all_the_same() {
    let hub = engine(1).hub::<Keeper>(WsHubConfig::default()).unwrap();
    let (dropped, mut was_dropped) = unbounded_channel();
    let serve =
        async move |ws: WebSocketUpgrade| ws.serve(&hub, Keeper { context: Mutex::default(), dropped });
    let server = Server::start(Router::new().route("/ws", any(serve))).await;
    let mut ada = Client::connect(server.url("/ws")).await;
    let mut bob = Client::connect(server.url("/ws")).await;
    ada.recv_texts(&["open"]).await;
    bob.recv_texts(&["open"]).await;
    bob.leave().await;
    ada.recv_texts(&["one has left"]).await;
    within_timeout(was_dropped.recv()).await.unwrap();
    assert!(was_dropped.try_recv().is_err(), "Ada's hub is in use");
}

#[tokio::test]
async fn what_a_connection_has_counted_can_be_asked_for() {
    let hub = engine(1).hub::<CommandHub>(WsHubConfig::default()).unwrap();
    let server = Server::start(command_app(hub.clone())).await;
    let (mut peer, id): (_, ConnectionId) = connect(&server.url("/ws")).await;
    for _ in 0..5 {
        peer.send_text("me x").await;
        peer.recv_texts(&["x"]).await;
    }
    let metrics = within_timeout(hub.connection_metrics(id)).await.unwrap().unwrap();
    assert_eq!((metrics.tally.received, metrics.tally.offered, metrics.tally.written), (5, 6, 6));
    assert_eq!((metrics.tally.discarded, metrics.tally.pending()), (0, 0));
}

#[tokio::test]
async fn every_connection_of_a_route_may_have_a_hub_value_of_its_own() {
    struct Counter {
        seen: AtomicU64,
        all: Arc<AtomicU64>,
    }
    impl WsHub for Counter {
        type Codec = RawCodec;
        type InMessage = String;
        type OutMessage = String;
        async fn on_message(&self, _: String, ctx: HubContext<Self>) {
            let seen = self.seen.fetch_add(1, Relaxed) + 1;
            let all = self.all.fetch_add(1, Relaxed) + 1;
            ctx.unicast(format!("{seen} of {all}")).await;
        }
    }
    let hub = engine(2).hub::<Counter>(WsHubConfig::default()).unwrap();
    let all = Arc::new(AtomicU64::new(0));
    let serve = async move |ws: WebSocketUpgrade| ws.serve(&hub, Counter { seen: AtomicU64::new(0), all });
    let server = Server::start(Router::new().route("/ws", any(serve))).await;
    let (mut ada, mut bob) =
        (Client::connect(server.url("/ws")).await, Client::connect(server.url("/ws")).await);
    for (ada_hears, bob_hears) in [("1 of 1", "1 of 2"), ("2 of 3", "2 of 4")] {
        ada.send_text("x").await;
        ada.recv_texts(&[ada_hears]).await;
        bob.send_text("x").await;
        bob.recv_texts(&[bob_hears]).await;
    }
}

#[tokio::test]
async fn one_connection_of_a_hub_may_have_settings_of_its_own() {
    let hub = engine(1).hub::<CommandHub>(WsHubConfig::default()).unwrap();
    let short: Arc<WsHubConfig> = Arc::new(WsHubConfig { max_message_bytes: 10, ..WsHubConfig::default() });
    let app =
        async move |ws: WebSocketUpgrade, Path(length): Path<String>, State(hub): State<Hub<CommandHub>>| {
            match length.as_str() {
                "short" => ws.serve(&hub, CommandHub).config(short.clone()),
                _ => ws.serve(&hub, CommandHub),
            }
        };
    let server = Server::start(Router::new().route("/{length}", any(app)).with_state(hub.clone())).await;
    let (mut limited, _) = connect(&server.url("/short")).await;
    let (mut other, _) = connect(&server.url("/long")).await;
    for text in ["0123456789", "0123456789-"] {
        other.send_text(text).await;
        other.recv_texts(&[text]).await;
    }
    limited.send_text("0123456789").await;
    limited.recv_texts(&["0123456789"]).await;
    limited.send_text("0123456789-").await;
    assert_eq!(limited.closed().await.0, 1009);
    // They are clients of the same hub.
    eventually(1, || hub.len()).await;
}

#[tokio::test]
async fn a_connection_s_setting_out_of_range_is_a_500_that_names_it() {
    let engine = engine(1);
    let hub = engine.hub::<CommandHub>(WsHubConfig::default()).unwrap();
    let app = async |ws: WebSocketUpgrade, State(hub): State<Hub<CommandHub>>| {
        ws.serve(&hub, CommandHub).config(WsHubConfig { outbox_frames: 0, ..WsHubConfig::default() })
    };
    let server = Server::start(Router::new().route("/ws", any(app)).with_state(hub)).await;
    let refused = within_timeout(Client::try_connect(server.url("/ws"), &[])).await;
    let Err(tungstenite::Error::Http(response)) = refused.map(drop) else { panic!("it was upgraded") };
    assert_eq!(response.status(), 500);
    let text = String::from_utf8(response.into_body().unwrap()).unwrap();
    assert_eq!(text, "`outbox_frames` is 0, but must be from 1 to 16777216");
    assert_eq!(engine.connection_count(), 0);
}
