//! Every program of the README that started this library (seed 000), compiled and run.
//!
//! The programs are verbatim but for the name of the crate (`axum_signal` is `shardcast`) and the origin of
//! `WebSocketUpgrade` (ours instead of axum's). What the README leaves out stands around them, marked `added`: imports,
//! `AppState`, `WsQueryParams`, `new`, and the enclosing item where it shows only a method or a statement. Its
//! `metrics` crate is a counter of one's own here, the client's address a parameter, so that it can be run, and the
//! layout rustfmt's.
//!
//! The short form has one set of clients for each hub type in the process, so each test has a type of its own.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use shardcast::{WsHub, WsHubConfig};
use testkit_hub::{Client, CommandHub, Server, command_app, connect, engine, within_timeout};
use tokio::sync::mpsc;

/// "Define your messages and implement WsHub", "Wire it up in your Axum router".
#[allow(dead_code, unreachable_pub)]
mod hello {
    use serde::{Deserialize, Serialize};
    use shardcast::{JsonCodec, MessageContext, WsHub};
    // added
    use axum::{Router, extract::State, routing::get};
    use shardcast::{WebSocketUpgrade, WsHubConfig, serve_hub};

    #[derive(Deserialize)]
    pub struct HelloMessage {
        pub text: String,
    }

    #[derive(Serialize)]
    pub enum HelloReply {
        Ok(String),
        Err(String),
    }

    pub struct HelloHub;

    impl WsHub for HelloHub {
        type Codec = JsonCodec;
        type InMessage = HelloMessage;
        type OutMessage = HelloReply;

        async fn on_message(&self, msg: Self::InMessage, ctx: MessageContext<Self::OutMessage, Self::Codec>) {
            ctx.broadcast(HelloReply::Ok(msg.text)).await
        }
    }

    // added
    #[derive(Clone)]
    pub struct AppState;

    // added
    impl HelloHub {
        pub fn new(_: AppState) -> Self {
            Self
        }
    }

    pub fn hello_router() -> Router<AppState> {
        Router::new().route(
            "/ws",
            get(|ws: WebSocketUpgrade, State(state): State<AppState>| async move {
                let config = WsHubConfig::default();
                ws.on_upgrade(
                    move |socket| async move { serve_hub(socket, HelloHub::new(state), &config).await },
                )
            }),
        )
    }
}

#[tokio::test]
async fn the_hello_hub_broadcasts_to_every_client() {
    let server = Server::start(hello::hello_router().with_state(hello::AppState)).await;
    let mut peers = Vec::new();
    for _ in 0..3 {
        peers.push(Client::connect(server.url("/ws")).await);
    }
    // A connection counts from its adoption, which its own echo proves; the others may see it, too.
    for (index, peer) in peers.iter_mut().enumerate() {
        peer.send_text(format!(r#"{{"text":"I am {index}"}}"#)).await;
        while peer.recv_text().await != format!(r#"{{"Ok":"I am {index}"}}"#) {}
    }
    peers[1].send_text(r#"{"text":"hello, \"world\""}"#).await;
    for peer in &mut peers {
        while peer.recv_text().await != r#"{"Ok":"hello, \"world\""}"# {}
    }
}

/// "To pass data from Axum extractors into your hub".
#[allow(dead_code, unreachable_pub)]
mod hello_with_query {
    // added
    use axum::{
        Router,
        extract::{Query, State},
        routing::get,
    };
    use serde::Deserialize;
    use shardcast::{JsonCodec, MessageContext, WebSocketUpgrade, WsHub, WsHubConfig, serve_hub};

    // added
    #[derive(Clone)]
    pub struct AppState {
        pub greeting: &'static str,
    }

    // added
    #[derive(Deserialize)]
    pub struct WsQueryParams {
        name: String,
    }

    // added
    pub struct HelloHub {
        state: AppState,
        params: WsQueryParams,
    }

    // added
    impl HelloHub {
        pub fn new(state: AppState, params: WsQueryParams) -> Self {
            Self { state, params }
        }
    }

    // added
    impl WsHub for HelloHub {
        type Codec = JsonCodec;
        type InMessage = String;
        type OutMessage = String;

        async fn on_message(&self, msg: Self::InMessage, ctx: MessageContext<Self::OutMessage, Self::Codec>) {
            ctx.unicast(format!("{} {}: {msg}", self.state.greeting, self.params.name)).await
        }
    }

    pub fn hello_router() -> Router<AppState> {
        Router::new().route(
            "/ws",
            get(
                |ws: WebSocketUpgrade,
                 State(state): State<AppState>,
                 Query(params): Query<WsQueryParams>| async move {
                    // Extractors are resolved here, before the upgrade.
                    // Pass the extracted data into the hub constructor.
                    let config = WsHubConfig::default();
                    ws.on_upgrade(move |socket| async move {
                        serve_hub(socket, HelloHub::new(state, params), &config).await
                    })
                },
            ),
        )
    }
}

#[tokio::test]
async fn what_the_extractors_found_reaches_the_hub_of_its_own_connection() {
    use hello_with_query::{AppState, hello_router};
    let server = Server::start(hello_router().with_state(AppState { greeting: "dear" })).await;
    let mut ada = Client::connect(server.url("/ws?name=Ada")).await;
    let mut bob = Client::connect(server.url("/ws?name=Bob")).await;
    ada.send_text(r#""one""#).await;
    bob.send_text(r#""two""#).await;
    ada.recv_texts(&[r#""dear Ada: one""#]).await;
    bob.recv_texts(&[r#""dear Bob: two""#]).await;
    // What axum's extractors refuse never becomes a socket.
    let refused = within_timeout(Client::try_connect(server.url("/ws"), &[])).await.err().unwrap();
    assert!(refused.to_string().contains("400"), "{refused}");
}

/// "Pluggable codecs": `type Codec = BinaryCodec` in the README's first hub.
#[allow(dead_code, unreachable_pub)]
mod hello_in_binary {
    use super::hello::AppState;
    use axum::{Router, extract::State, routing::get};
    use serde::{Deserialize, Serialize};
    use shardcast::{BinaryCodec, MessageContext, WebSocketUpgrade, WsHub, WsHubConfig, serve_hub};

    #[derive(Serialize, Deserialize)]
    pub struct HelloMessage {
        pub text: String,
    }

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    pub enum HelloReply {
        Ok(String),
        Err(String),
    }

    pub struct HelloHub;

    impl WsHub for HelloHub {
        // Binary via postcard
        type Codec = BinaryCodec;
        type InMessage = HelloMessage;
        type OutMessage = HelloReply;

        async fn on_message(&self, msg: Self::InMessage, ctx: MessageContext<Self::OutMessage, Self::Codec>) {
            ctx.broadcast(HelloReply::Ok(msg.text)).await
        }
    }

    pub fn hello_router() -> Router<AppState> {
        Router::new().route(
            "/ws",
            get(|ws: WebSocketUpgrade, State(AppState): State<AppState>| async move {
                let config = WsHubConfig::default();
                ws.on_upgrade(move |socket| async move { serve_hub(socket, HelloHub, &config).await })
            }),
        )
    }
}

#[cfg(feature = "client")]
#[tokio::test]
async fn hub_and_client_talk_in_postcard_after_a_change_of_one_type() {
    use hello_in_binary::{HelloMessage, HelloReply, hello_router};
    use shardcast::{BinaryCodec, HubClient};
    let server = Server::start(hello_router().with_state(hello::AppState)).await;
    let mut client = HubClient::builder(server.url("/ws"))
        .with_in_message::<HelloMessage>()
        .with_out_message::<HelloReply>()
        .with_codec::<BinaryCodec>()
        .build();
    let (sender, mut replies) = mpsc::unbounded_channel();
    client.on_message(move |reply: HelloReply| sender.send(reply).unwrap());
    within_timeout(client.connect()).await.unwrap();
    client.send(HelloMessage { text: "hello".into() }).unwrap();
    assert_eq!(within_timeout(replies.recv()).await, Some(HelloReply::Ok("hello".into())));
    within_timeout(client.disconnect()).await;
}

/// "Broadcast, unicast, groups - flexible targeting".
#[allow(dead_code, unreachable_pub)]
mod targeting {
    // added
    use axum::{Router, extract::Query, routing::get};
    use serde::{Deserialize, Serialize};
    use shardcast::{JsonCodec, MessageContext, Refusal, WebSocketUpgrade, WsHub, WsHubConfig, serve_hub};

    // added
    #[derive(Deserialize)]
    pub struct MyMessage {
        text: String,
    }

    // added
    #[derive(Serialize)]
    pub enum MyReply {
        Ok(String),
        Here,
    }

    // added
    #[derive(Deserialize)]
    pub struct MyHub {
        rooms: String,
    }

    // added
    impl WsHub for MyHub {
        type Codec = JsonCodec;
        type InMessage = MyMessage;
        type OutMessage = MyReply;

        // added: members for the groups that the method below sends to
        async fn on_connected(
            &self,
            ctx: MessageContext<Self::OutMessage, Self::Codec>,
        ) -> Result<(), Refusal> {
            for room in self.rooms.split(',') {
                ctx.add_to_group(room).await;
            }
            ctx.unicast(MyReply::Here).await;
            Ok(())
        }

        async fn on_message(&self, msg: Self::InMessage, ctx: MessageContext<Self::OutMessage, Self::Codec>) {
            // to all clients
            ctx.broadcast(MyReply::Ok(msg.text.clone())).await;

            // to sender only
            ctx.unicast(MyReply::Ok(msg.text.clone())).await;

            // to all except specific connections
            ctx.broadcast_except(&["conn-id-1", "conn-id-2"], MyReply::Ok(msg.text.clone())).await;

            // group management
            ctx.add_to_group("room-1").await;
            ctx.remove_from_group("room-1").await;

            // to all in a group
            ctx.broadcast_group("room-1", MyReply::Ok(msg.text.clone())).await;

            // to a group except specific connections
            ctx.broadcast_group_except("room-1", &["conn-id-1"], MyReply::Ok(msg.text.clone())).await;

            // to all in multiple groups (each connection receives at most once)
            ctx.broadcast_groups(&["room-1", "room-2"], MyReply::Ok(msg.text)).await;
        }
    }

    // added
    pub fn router() -> Router {
        Router::new().route(
            "/ws",
            get(|ws: WebSocketUpgrade, Query(hub): Query<MyHub>| async move {
                ws.on_upgrade(async move |socket| serve_hub(socket, hub, &WsHubConfig::default()).await)
            }),
        )
    }
}

#[tokio::test]
async fn every_call_of_the_context_reaches_whom_it_names_and_nobody_twice() {
    let server = Server::start(targeting::router()).await;
    let here = r#""Here""#;
    let mut sender = Client::connect(server.url("/ws?rooms=room-1,room-3")).await;
    sender.recv_texts(&[here]).await;
    let mut in_both = Client::connect(server.url("/ws?rooms=room-1,room-2")).await;
    in_both.recv_texts(&[here]).await;
    let mut in_none = Client::connect(server.url("/ws?rooms=room-3")).await;
    in_none.recv_texts(&[here]).await;
    for text in ["one", "two"] {
        sender.send_text(format!(r#"{{"text":"{text}"}}"#)).await;
    }
    let (one, two) = (r#"{"Ok":"one"}"#, r#"{"Ok":"two"}"#);
    // All, the sender, all but two ids that nobody has; out of room-1 by then, though a member before.
    sender.recv_texts(&[one, one, one, two, two, two]).await;
    // All, all, room-1, room-1, and both rooms once.
    in_both.recv_texts(&[one, one, one, one, one, two, two, two, two, two]).await;
    in_none.recv_texts(&[one, one, two, two]).await;
    for peer in [sender, in_both, in_none] {
        assert_eq!(peer.leave().await, Vec::<String>::new(), "no more than that");
    }
}

#[tokio::test]
async fn ids_leave_out_those_who_bear_them_and_groups_reach_their_members_once() {
    let hub = engine(2).hub::<CommandHub>(WsHubConfig::default()).unwrap();
    let server = Server::start(command_app(hub)).await;
    let url = server.url("/ws");
    let ((mut ada, ada_id), (mut bob, bob_id), (mut cyd, _)) =
        (connect(&url).await, connect(&url).await, connect(&url).await);

    ada.send_text(format!("except {ada_id} but Ada")).await;
    ada.send_text(format!("except {ada_id},{bob_id} but two")).await;
    ada.send_text(format!("except {ada_id},nobody,{ada_id} but Ada again")).await;
    ada.send_text("all all").await;
    ada.recv_texts(&["all"]).await;
    bob.recv_texts(&["but Ada", "but Ada again", "all"]).await;
    cyd.recv_texts(&["but Ada", "but two", "but Ada again", "all"]).await;

    for peer in [&mut bob, &mut cyd] {
        peer.send_text("join red").await;
        peer.send_text("join red").await;
        peer.send_text("me joined").await;
        peer.recv_texts(&["joined"]).await;
    }
    cyd.send_text("join blue").await;
    cyd.send_text("me joined").await;
    cyd.recv_texts(&["joined"]).await;

    ada.send_text("group red to red").await;
    ada.send_text(format!("group-except red {bob_id} to red but Bob")).await;
    ada.send_text("groups red,blue,nowhere,red to both").await;
    ada.send_text("group nowhere to nobody").await;
    ada.send_text("all done").await;
    ada.recv_texts(&["done"]).await;
    bob.recv_texts(&["to red", "to both", "done"]).await;
    cyd.recv_texts(&["to red", "to red but Bob", "to both", "done"]).await;

    cyd.send_text("leave red").await;
    cyd.send_text("group red without Cyd").await;
    cyd.send_text("groups red,blue still blue").await;
    cyd.recv_texts(&["still blue"]).await;
    bob.recv_texts(&["without Cyd", "still blue"]).await;
}

/// "Broadcast delivery policies".
mod policies {
    use shardcast::{BroadcastPolicy, WsHubConfig};
    use std::time::Duration;

    // added: the function, and `vec.push` behind each of the README's statements
    pub(super) fn configs() -> Vec<WsHubConfig> {
        let mut configs = Vec::new();

        // Wait indefinitely — guarantees delivery, one slow client blocks the rest (default)
        let config = WsHubConfig { policy: BroadcastPolicy::Block, ..WsHubConfig::default() };
        configs.push(config);

        // Drop message after timeout, keep connection alive
        let config = WsHubConfig {
            policy: BroadcastPolicy::DropMessage { timeout: Duration::from_millis(100) },
            ..WsHubConfig::default()
        };
        configs.push(config);

        // Drop message after timeout, disconnect after N consecutive drops
        let config = WsHubConfig {
            policy: BroadcastPolicy::DropConnection { timeout: Duration::from_millis(100), max_drops: 5 },
            ..WsHubConfig::default()
        };
        configs.push(config);

        // Disconnect if the rolling-average RTT over the last `window` heartbeats exceeds `max_rtt`.
        // Until the first pong arrives the connection is treated as healthy.
        let config = WsHubConfig {
            policy: BroadcastPolicy::DropOnHighRtt { max_rtt: Duration::from_millis(300), rtt_samples: 8 },
            ..WsHubConfig::default()
        };
        configs.push(config);
        configs
    }
}

#[test]
fn every_policy_of_the_readme_makes_a_hub() {
    for config in policies::configs() {
        assert_eq!(config.validate(), Ok(()));
        assert!(engine(1).hub::<CommandHub>(config).is_ok());
    }
}

/// "Default lifecycle hooks - override only what you need", `on_message_drop` among them.
#[allow(unreachable_pub, dead_code)]
mod hooks {
    // added
    use super::hello::{AppState, HelloMessage, HelloReply};
    use axum::{Router, extract::State, routing::get};
    use shardcast::{
        ConnectionRequest, DisconnectRequest, JsonCodec, MessageContext, WebSocketUpgrade, WsHub,
        WsHubConfig, serve_hub,
    };
    use std::sync::Arc;

    // added: what this program uses of the crate `metrics`
    pub mod metrics {
        pub static DROPPED_MESSAGES: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        pub struct Counter;
        impl Counter {
            pub fn increment(&self, by: u64) {
                DROPPED_MESSAGES.fetch_add(by, std::sync::atomic::Ordering::Relaxed);
            }
        }
        macro_rules! counter {
            ("ws.dropped_messages") => {
                metrics::Counter
            };
        }
        pub(crate) use counter;
    }

    // added
    pub struct HelloHub;

    impl WsHub for HelloHub {
        type Codec = JsonCodec;
        type InMessage = HelloMessage;
        type OutMessage = HelloReply;

        // optional - default logs connection id
        async fn on_connect(&self, req: ConnectionRequest) {
            tracing::info!("new connection: {}", req.connection_id);
        }

        // optional - default logs connection id
        async fn on_disconnect(&self, req: DisconnectRequest) {
            tracing::info!("disconnected: {}", req.connection_id);
        }

        // optional - default logs a warning
        async fn on_message_drop(&self, connection_id: Arc<str>) {
            // added: the README does not use the id here
            let _ = connection_id;
            metrics::counter!("ws.dropped_messages").increment(1);
        }

        async fn on_message(&self, msg: Self::InMessage, ctx: MessageContext<Self::OutMessage, Self::Codec>) {
            ctx.unicast(HelloReply::Ok(msg.text)).await;
        }
    }

    // added
    pub fn hello_router() -> Router<AppState> {
        Router::new().route(
            "/ws",
            get(|ws: WebSocketUpgrade, State(AppState): State<AppState>| async move {
                ws.on_upgrade(async |socket| serve_hub(socket, HelloHub, &WsHubConfig::default()).await)
            }),
        )
    }
}

/// Gives what is logged to a test.
struct Log(mpsc::UnboundedSender<String>);

impl std::io::Write for Log {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        let _ = self.0.send(String::from_utf8_lossy(line).into_owned());
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn the_hooks_are_called_once_each_and_name_the_same_connection() {
    let (sender, mut lines) = mpsc::unbounded_channel();
    // For all threads, as the hooks run on shards.
    tracing_subscriber::fmt().with_ansi(false).with_writer(move || Log(sender.clone())).init();
    let mut line_with = async |prefix: &str| loop {
        let line = within_timeout(lines.recv()).await.unwrap();
        if let Some((_, id)) = line.split_once(prefix) {
            return id.trim().to_owned();
        }
        assert!(!line.contains("connection: ") && !line.contains("disconnected: "), "{line}");
    };
    let server = Server::start(hooks::hello_router().with_state(hello::AppState)).await;
    for text in ["first", "second"] {
        let mut peer = Client::connect(server.url("/ws")).await;
        let id = line_with("new connection: ").await;
        assert!(id.parse::<shardcast::ConnectionId>().is_ok(), "{id}");
        peer.send_text(format!(r#"{{"text":"{text}"}}"#)).await;
        peer.recv_texts(&[&format!(r#"{{"Ok":"{text}"}}"#)]).await;
        peer.leave().await;
        assert_eq!(line_with("disconnected: ").await, id);
    }
}

#[tokio::test]
async fn an_overridden_on_message_drop_can_count() {
    let before = hooks::metrics::DROPPED_MESSAGES.load(Relaxed);
    hooks::HelloHub.on_message_drop(Arc::from("0010000020000003")).await;
    assert_eq!(hooks::metrics::DROPPED_MESSAGES.load(Relaxed), before + 1);
}

#[cfg(feature = "client")]
mod client {
    use super::*;
    use std::sync::OnceLock;

    /// "HubClient mirrors the hub's type parameters": the whole program, but for the address.
    macro_rules! client_program {
        ($url:expr) => {
            use serde::{Deserialize, Serialize};
            use shardcast::{HubClient, JsonCodec};

            #[derive(Serialize)]
            pub struct HelloMessage {
                pub text: String,
            }

            #[derive(Deserialize, Debug)]
            pub enum HelloReply {
                Ok(String),
                Err(String),
            }

            #[tokio::main]
            pub async fn main() -> Result<(), Box<dyn std::error::Error>> {
                let mut client = HubClient::builder($url)
                    .with_in_message::<HelloMessage>()
                    .with_out_message::<HelloReply>()
                    .with_codec::<JsonCodec>()
                    .build();

                client.on_message(|reply: HelloReply| println!("{reply:?}"));

                client.connect().await?;

                client.send(HelloMessage { text: "hello".into() })?;

                // sends a Close frame and waits for the server to echo it back
                client.disconnect().await;

                Ok(())
            }
        };
    }

    /// As it stands in the README. Not run: port 3000 may belong to somebody.
    #[allow(dead_code, unreachable_pub, clippy::print_stdout)]
    mod as_it_stands {
        client_program!("ws://localhost:3000/ws");
    }

    #[allow(dead_code, unreachable_pub, clippy::print_stdout)]
    mod to_the_test {
        client_program!(super::URL.get().unwrap());
    }

    static URL: OnceLock<String> = OnceLock::new();

    /// A hub of the same program, with clients of its own.
    mod hub {
        use crate::hello::{HelloMessage, HelloReply};
        use shardcast::{CloseReason, DisconnectRequest, JsonCodec, MessageContext, WsHub};
        use tokio::sync::mpsc::UnboundedSender;

        pub(super) struct HelloHub {
            pub(super) ends: UnboundedSender<CloseReason>,
        }

        impl WsHub for HelloHub {
            type Codec = JsonCodec;
            type InMessage = HelloMessage;
            type OutMessage = HelloReply;

            async fn on_message(&self, msg: HelloMessage, ctx: MessageContext<HelloReply, JsonCodec>) {
                ctx.broadcast(HelloReply::Ok(msg.text)).await
            }

            async fn on_disconnect(&self, req: DisconnectRequest) {
                self.ends.send(req.reason).unwrap();
            }
        }
    }

    #[tokio::test]
    async fn the_client_program_says_hello_to_all_and_closes_with_a_handshake() {
        use axum::routing::get;
        use shardcast::{CloseCode, CloseReason, WebSocketUpgrade, serve_hub};
        let (ends, mut ended) = mpsc::unbounded_channel();
        let route = get(async move |ws: WebSocketUpgrade| {
            let hub = hub::HelloHub { ends };
            ws.on_upgrade(async move |socket| serve_hub(socket, hub, &WsHubConfig::default()).await)
        });
        let server = Server::start(axum::Router::new().route("/ws", route)).await;
        let mut listener = Client::connect(server.url("/ws")).await;
        listener.send_text(r#"{"text":"listening"}"#).await;
        listener.recv_texts(&[r#"{"Ok":"listening"}"#]).await;

        URL.set(server.url("/ws")).unwrap();
        let run = || to_the_test::main().map_err(|error| error.to_string());
        within_timeout(tokio::task::spawn_blocking(run)).await.unwrap().unwrap();
        listener.recv_texts(&[r#"{"Ok":"hello"}"#]).await;
        let polite = CloseReason::Peer { code: Some(CloseCode::NORMAL), text: "".into() };
        assert_eq!(within_timeout(ended.recv()).await, Some(polite));
    }
}
