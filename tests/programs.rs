//! Five programs that users wrote by hand before the library had what they need, written with it, and used.
//!
//! Each is between two markers, as complete as its `main` would be; only what a real program takes from its
//! configuration (listener, settings, key) is passed in. The users' versions had a registry of users, locks around the
//! state of a connection, and a timer for each token; the last test holds that these have none, and are shorter. (The
//! game has a clock, because it is one.)

#![allow(clippy::unwrap_used, reason = "a test")]

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use jsonwebtoken::{EncodingKey, Header};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use shardcast::{BinaryCodec, Decode as _, Encode as _, EngineConfig, MessageKind, WsHubConfig};
use testkit::frames::{BINARY, FIN, client_frame};
use testkit_hub::{Client, RawClient, within_timeout};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::{Error, Message};

/// A chat with JSON Web Tokens, in the query or as a subprotocol, and with presence.
mod chat {
    // begin: chat
    use std::error::Error;
    use std::ops::ControlFlow;
    use std::time::{Duration, UNIX_EPOCH};

    use axum::extract::{Path, State};
    use axum::{Router, routing::any};
    use jsonwebtoken::{Algorithm, DecodingKey, Validation};
    use serde::{Deserialize, Serialize};
    use shardcast::auth::{Denied, Token};
    use shardcast::{
        Clients, CloseCode, Engine, EngineConfig, Hub, HubContext, JsonCodec, PresenceChange, PresenceKind,
        Present, Refusal, Serve, Stateful, StatefulHub, WebSocketUpgrade, WsHubConfig,
    };
    use tokio::net::TcpListener;

    #[derive(Deserialize)]
    struct Claims {
        sub: String,
        exp: u64,
    }

    #[derive(Deserialize)]
    #[serde(tag = "type", rename_all = "lowercase")]
    enum FromClient {
        Say { text: String },
        Who,
    }

    #[derive(Serialize)]
    #[serde(tag = "type", rename_all = "lowercase")]
    enum ToClient {
        Here { users: Vec<Present> },
        Presence { user: String, kind: PresenceKind, users: usize },
        Said { by: String, number: u64, text: String },
    }

    struct Member {
        room: String,
        user: String,
        said: u64,
    }

    impl StatefulHub for Member {
        type Codec = JsonCodec;
        type InMessage = FromClient;
        type OutMessage = ToClient;

        async fn on_connected(&mut self, ctx: HubContext<Stateful<Self>>) -> Result<(), Refusal> {
            ctx.add_to_group(&self.room).await;
            self.on_message(FromClient::Who, ctx).await;
            Ok(())
        }

        async fn on_message(&mut self, message: FromClient, ctx: HubContext<Stateful<Self>>) {
            match message {
                FromClient::Say { text } => {
                    self.said += 1;
                    let said = ToClient::Said { by: self.user.clone(), number: self.said, text };
                    ctx.broadcast_group(&self.room, said).await;
                }
                FromClient::Who => {
                    let users = ctx.clients().presence(&self.room).await.unwrap_or_default();
                    ctx.unicast(ToClient::Here { users }).await;
                }
            }
        }

        async fn on_presence(clients: &Clients<ToClient>, change: PresenceChange) {
            let Some(room) = &change.group else { return };
            let (user, users) = (change.user.to_string(), clients.presence_len(room));
            let told = ToClient::Presence { user, kind: change.kind, users };
            let _ = clients.to_group(room).publish(&told).await; // fails when the engine has ended
        }

        async fn on_expired(&mut self, ctx: HubContext<Stateful<Self>>) -> ControlFlow<()> {
            ctx.disconnect(CloseCode(4401), "the token has expired").await;
            ControlFlow::Continue(())
        }
    }

    type App = (Hub<Stateful<Member>>, DecodingKey);

    async fn connect(
        ws: WebSocketUpgrade,
        token: Token,
        Path(room): Path<String>,
        State((hub, key)): State<App>,
    ) -> Result<Serve<Stateful<Member>>, Denied> {
        let mut validation = Validation::new(Algorithm::HS256);
        validation.leeway = 0;
        let token = jsonwebtoken::decode::<Claims>(token.as_str(), &key, &validation);
        let Claims { sub: user, exp } = token.map_err(Denied::unauthorized)?.claims;
        let member = Member { room, user: user.clone(), said: 0 };
        let serve = ws.protocols(["chat.v1"]).serve(&hub, member).user(user);
        Ok(serve.expires_at(UNIX_EPOCH + Duration::from_secs(exp)))
    }

    pub(crate) async fn main(
        listener: TcpListener,
        engine: EngineConfig,
        config: WsHubConfig,
        key: &[u8],
    ) -> Result<(), Box<dyn Error>> {
        let hub = Engine::start(engine)?.hub(config)?;
        let state: App = (hub, DecodingKey::from_secret(key));
        let app = Router::new().route("/rooms/{room}", any(connect)).with_state(state);
        Ok(axum::serve(listener, app).await?)
    }
    // end: chat
}

/// Rooms, and an HTTP API beside them: lists, messages to a user's devices, disconnecting a user, Prometheus.
mod admin {
    // begin: admin
    use std::error::Error;
    use std::fmt::Write as _;
    use std::net::SocketAddr;
    use std::sync::Arc;

    use axum::extract::{Path, Query, State};
    use axum::routing::{any, get, post};
    use axum::{Json, Router};
    use serde::Deserialize;
    use serde_json::Value;
    use shardcast::{
        CloseCode, ConnectionId, ConnectionMetrics, Engine, EngineConfig, GroupCount, Hub, HubContext,
        Present, PublishError, RawCodec, Refusal, Serve, WebSocketUpgrade, WsHub, WsHubConfig,
    };
    use tokio::net::TcpListener;

    struct Device {
        room: String,
    }

    impl WsHub for Device {
        type Codec = RawCodec;
        type InMessage = String;
        type OutMessage = String;

        async fn on_connected(&self, ctx: HubContext<Self>) -> Result<(), Refusal> {
            ctx.add_to_group(&self.room).await;
            Ok(())
        }

        async fn on_message(&self, text: String, ctx: HubContext<Self>) {
            ctx.broadcast_group(&self.room, text).await;
        }
    }

    #[derive(Deserialize)]
    struct Who {
        user: String,
        room: String,
    }

    type App = State<(Engine, Hub<Device>)>;

    async fn connect(ws: WebSocketUpgrade, Query(who): Query<Who>, State((_, hub)): App) -> Serve<Device> {
        let address = ws.peer_address();
        ws.serve(&hub, Device { room: who.room }).user(who.user).metadata(&address)
    }

    type Reply<T> = Result<T, PublishError>;

    async fn rooms(State((_, hub)): App) -> Json<Vec<GroupCount>> {
        Json(hub.groups())
    }

    async fn room(Path(name): Path<String>, State((_, hub)): App) -> Reply<Json<Vec<Present>>> {
        hub.presence(&name).await.map(Json)
    }

    type Connection = (ConnectionId, Option<Vec<Arc<str>>>, Option<ConnectionMetrics>);

    async fn user(Path(user): Path<String>, State((_, hub)): App) -> Reply<Json<Vec<Connection>>> {
        let mut connections = Vec::new();
        for id in hub.to_user(&user).members().await? {
            let rooms = hub.groups_of(id).await?;
            let metrics = hub.connection_metrics(id).await?;
            connections.push((id, rooms, metrics));
        }
        Ok(Json(connections))
    }

    async fn send(Path(user): Path<String>, State((_, hub)): App, text: String) -> Reply<String> {
        let receipt = hub.to_user(&user).deliver(&text).await?;
        Ok(format!("accepted by {} of {} devices", receipt.accepted(), receipt.recipients))
    }

    async fn disconnect(Path(user): Path<String>, State((_, hub)): App) -> Reply<()> {
        let user = hub.to_user(&user);
        user.disconnect(CloseCode(4001), "by an administrator").await
    }

    async fn metrics(State((engine, _)): App) -> String {
        let mut text = String::new();
        write_metrics(&mut text, "shardcast", serde_json::to_value(engine.metrics()).unwrap_or_default());
        text
    }

    fn write_metrics(text: &mut String, name: &str, value: Value) {
        if let Value::Object(parts) = value {
            parts.into_iter().for_each(|(part, value)| write_metrics(text, &format!("{name}_{part}"), value));
        } else {
            let _ = writeln!(text, "{name} {value}"); // writing to a `String` does not fail
        }
    }

    pub(crate) async fn main(
        listener: TcpListener,
        engine: EngineConfig,
        config: WsHubConfig,
    ) -> Result<(), Box<dyn Error>> {
        let engine = Engine::start(engine)?;
        let hub = engine.hub::<Device>(config)?;
        let app = Router::new()
            .route("/ws", any(connect))
            .route("/rooms", get(rooms))
            .route("/rooms/{name}", get(room))
            .route("/users/{name}", post(send).get(user).delete(disconnect))
            .route("/metrics", get(metrics))
            .with_state((engine, hub));
        let app = app.into_make_service_with_connect_info::<SocketAddr>();
        Ok(axum::serve(listener, app).await?)
    }
    // end: admin
}

/// Prices, as a feed brings them, each for the clients that have subscribed to its symbol. Nobody waits for a slow one.
mod ticker {
    // begin: ticker
    use std::error::Error;
    use std::time::Duration;

    use axum::{Router, extract::State, routing::any};
    use serde::{Deserialize, Serialize};
    use shardcast::{BinaryCodec, BroadcastPolicy, Engine, EngineConfig, Hub, HubContext, PublishError};
    use shardcast::{Serve, WebSocketUpgrade, WsHub, WsHubConfig};
    use tokio::{net::TcpListener, sync::mpsc::Receiver};

    #[derive(Serialize, Deserialize)]
    pub(crate) struct Update {
        pub(crate) symbol: String,
        pub(crate) price: u64,
    }

    struct Watcher;

    impl WsHub for Watcher {
        type Codec = BinaryCodec;
        type InMessage = Vec<String>;
        type OutMessage = Update;

        async fn on_message(&self, symbols: Vec<String>, ctx: HubContext<Self>) {
            let symbols: Vec<&str> = symbols.iter().map(String::as_str).collect();
            let _ = ctx.clients().join_all(ctx.id(), &symbols).await; // fails for a name that is too long
        }
    }

    async fn connect(ws: WebSocketUpgrade, State(hub): State<Hub<Watcher>>) -> Serve<Watcher> {
        ws.serve(&hub, Watcher)
    }

    async fn publish(hub: Hub<Watcher>, mut feed: Receiver<Update>) -> Result<(), PublishError> {
        while let Some(update) = feed.recv().await {
            hub.to_group(&update.symbol).publish(&update).await?;
        }
        Ok(())
    }

    pub(crate) async fn main(
        listener: TcpListener,
        engine: EngineConfig,
        config: WsHubConfig,
        feed: Receiver<Update>,
    ) -> Result<(), Box<dyn Error>> {
        let policy = BroadcastPolicy::DropMessage { timeout: Duration::ZERO };
        let hub = Engine::start(engine)?.hub(WsHubConfig { policy, ..config })?;
        let app = Router::new().route("/ws", any(connect)).with_state(hub.clone());
        tokio::select! {
            served = axum::serve(listener, app) => Ok(served?),
            published = publish(hub, feed) => Ok(published?),
        }
    }
    // end: ticker
}

/// A game: 30 boards a second for players and spectators. The first player is the owner, who may kick.
mod game {
    // begin: game
    use std::error::Error;
    use std::time::Duration;

    use axum::extract::{Query, State};
    use axum::{Router, routing::any};
    use serde::{Deserialize, Serialize};
    use shardcast::{BinaryCodec, BroadcastPolicy, CloseCode, CloseReason, Engine, EngineConfig, Hub};
    use shardcast::{
        HubContext, PublishError, Refusal, Serve, UserLimit, WebSocketUpgrade, WsHub, WsHubConfig,
    };
    use tokio::{net::TcpListener, sync::mpsc, time::interval};

    const TICK: Duration = Duration::from_nanos(1_000_000_000 / 30);

    #[derive(Serialize, Deserialize)]
    pub(crate) enum FromClient {
        Move(i8, i8),
        Kick(String),
    }

    #[derive(Serialize, Deserialize, Default)]
    pub(crate) struct Board {
        pub(crate) tick: u64,
        pub(crate) players: Vec<(String, i32, i32)>,
    }

    enum Act {
        Enter,
        Leave,
        Message(FromClient),
    }

    type Acts = mpsc::Sender<(String, Act)>;

    struct Seat {
        name: String,
        acts: Option<Acts>, // spectators have none
    }

    impl Seat {
        async fn act(&self, act: Act) {
            if let Some(acts) = &self.acts {
                let _ = acts.send((self.name.clone(), act)).await; // fails when the game has ended
            }
        }
    }

    impl WsHub for Seat {
        type Codec = BinaryCodec;
        type InMessage = FromClient;
        type OutMessage = Board;

        async fn on_connected(&self, _: HubContext<Self>) -> Result<(), Refusal> {
            self.act(Act::Enter).await;
            Ok(())
        }

        async fn on_message(&self, message: FromClient, _: HubContext<Self>) {
            self.act(Act::Message(message)).await;
        }

        async fn on_disconnected(&self, _: HubContext<Self>, _: CloseReason) {
            self.act(Act::Leave).await;
        }
    }

    async fn play(hub: Hub<Seat>, mut acts: mpsc::Receiver<(String, Act)>) -> Result<(), PublishError> {
        let (mut board, mut ticks) = (Board::default(), interval(TICK));
        loop {
            ticks.tick().await;
            while let Ok((name, act)) = acts.try_recv() {
                let seat = board.players.iter().position(|player| player.0 == name);
                match (act, seat) {
                    (Act::Enter, None) => board.players.push((name, 0, 0)),
                    (Act::Leave, Some(seat)) => drop(board.players.remove(seat)),
                    (Act::Message(FromClient::Move(x, y)), Some(seat)) => {
                        board.players[seat].1 += i32::from(x);
                        board.players[seat].2 += i32::from(y);
                    }
                    (Act::Message(FromClient::Kick(player)), Some(0)) => {
                        hub.to_user(&player).disconnect(CloseCode(4003), "kicked").await?;
                    }
                    _ => {}
                }
            }
            board.tick += 1;
            hub.to_all().publish(&board).await?;
        }
    }

    #[derive(Deserialize)]
    struct Who {
        player: Option<String>,
    }

    type App = State<(Hub<Seat>, Acts)>;

    async fn connect(ws: WebSocketUpgrade, Query(who): Query<Who>, State((hub, acts)): App) -> Serve<Seat> {
        match who.player {
            Some(name) => ws.serve(&hub, Seat { name: name.clone(), acts: Some(acts) }).user(name),
            None => ws.serve(&hub, Seat { name: String::new(), acts: None }),
        }
    }

    pub(crate) async fn main(listener: TcpListener, engine: EngineConfig) -> Result<(), Box<dyn Error>> {
        let policy = BroadcastPolicy::DropMessage { timeout: Duration::ZERO };
        let max_connections_per_user = Some(UserLimit::OldestStays(1));
        let config = WsHubConfig { policy, max_connections_per_user, ..WsHubConfig::default() };
        let (hub, (sender, acts)) = (Engine::start(engine)?.hub(config)?, mpsc::channel(1024));
        let app = Router::new().route("/ws", any(connect)).with_state((hub.clone(), sender));
        tokio::select! {
            served = axum::serve(listener, app) => Ok(served?),
            played = play(hub, acts) => Ok(played?),
        }
    }
    // end: game
}

/// The handler of seed 001 as a hub: state of its own, headers and address of its client, an end with a reason.
mod handler {
    // begin: handler
    use std::error::Error;
    use std::net::{IpAddr, SocketAddr};

    use axum::extract::State;
    use axum::{Router, http::HeaderMap, routing::any};
    use shardcast::{CloseReason, Engine, EngineConfig, Hub, HubContext, RawCodec, Refusal};
    use shardcast::{Serve, Stateful, StatefulHub, WebSocketUpgrade, WsHubConfig};
    use tokio::{net::TcpListener, sync::mpsc::UnboundedSender};

    struct Echo {
        address: Option<IpAddr>,
        agent: String,
        echoes: u64,
        log: UnboundedSender<String>,
    }

    impl StatefulHub for Echo {
        type Codec = RawCodec;
        type InMessage = String;
        type OutMessage = String;

        async fn on_connected(&mut self, ctx: HubContext<Stateful<Self>>) -> Result<(), Refusal> {
            ctx.unicast(format!("Welcome, {}!", self.agent)).await;
            Ok(())
        }

        async fn on_message(&mut self, text: String, ctx: HubContext<Stateful<Self>>) {
            self.echoes += 1;
            ctx.unicast(format!("Echo {}: {text}", self.echoes)).await;
        }

        async fn on_disconnected(&mut self, _: HubContext<Stateful<Self>>, reason: CloseReason) {
            let _ = self.log.send(format!("{:?}, {} echoes, {reason}", self.address, self.echoes));
        }
    }

    type App = (Hub<Stateful<Echo>>, UnboundedSender<String>);

    async fn connect(ws: WebSocketUpgrade, headers: HeaderMap, app: State<App>) -> Serve<Stateful<Echo>> {
        let State((hub, log)) = app;
        let agent = headers.get("user-agent").and_then(|agent| agent.to_str().ok()).unwrap_or("stranger");
        let (address, agent) = (ws.peer_address(), agent.to_owned());
        ws.serve(&hub, Echo { address, agent, echoes: 0, log })
    }

    pub(crate) async fn main(
        listener: TcpListener,
        engine: EngineConfig,
        log: UnboundedSender<String>,
    ) -> Result<(), Box<dyn Error>> {
        let hub = Engine::start(engine)?.hub(WsHubConfig::default())?;
        let app = Router::new().route("/ws", any(connect)).with_state((hub, log));
        Ok(axum::serve(listener, app.into_make_service_with_connect_info::<SocketAddr>()).await?)
    }
    // end: handler
}

const KEY: &[u8] = b"the key of this test";

/// Shards that are not pinned, because other tests run on the same machine.
fn two_shards() -> EngineConfig {
    EngineConfig { shards: Some(2), pin: false, ..EngineConfig::default() }
}

/// Users who disconnect have left at once.
fn without_grace() -> WsHubConfig {
    WsHubConfig { presence_grace: Duration::ZERO, ..WsHubConfig::default() }
}

async fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

/// A token that expires in so many seconds.
fn token(user: &str, seconds: i64, key: &[u8]) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let claims = json!({ "sub": user, "exp": now.saturating_add_signed(seconds) });
    jsonwebtoken::encode(&Header::default(), &claims, &EncodingKey::from_secret(key)).unwrap()
}

async fn recv(client: &mut Client) -> Value {
    serde_json::from_str(&client.recv_text().await).unwrap()
}

/// The users of a message `here`, each with the number of connections.
fn here(message: &Value) -> Vec<(&str, u64)> {
    assert_eq!(message["type"], "here");
    let users = message["users"].as_array().unwrap().iter();
    let mut users: Vec<_> = users
        .map(|user| {
            assert!(user["since"].as_u64().unwrap() > 1_600_000_000_000, "{user}");
            (user["user"].as_str().unwrap(), user["connections"].as_u64().unwrap())
        })
        .collect();
    users.sort_unstable();
    users
}

fn presence(user: &str, kind: &str, users: u64) -> Value {
    json!({ "type": "presence", "user": user, "kind": kind, "users": users })
}

async fn chat() -> String {
    let (listener, address) = listen().await;
    tokio::spawn(async { chat::main(listener, two_shards(), without_grace(), KEY).await.unwrap() });
    format!("ws://{address}/rooms/red")
}

#[tokio::test]
async fn the_chat_refuses_a_client_without_a_valid_token_before_the_upgrade() {
    let url = chat().await;
    for query in [
        String::new(),
        format!("?token={}", token("ada", 60, b"another key")),
        format!("?token={}", token("ada", -10, KEY)),
        "?token=nonsense".to_owned(),
    ] {
        match within_timeout(Client::try_connect(format!("{url}{query}"), &[])).await {
            Err(Error::Http(response)) => assert_eq!(response.status(), 401, "{query}"),
            other => panic!("{query}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn the_chat_knows_who_is_present_on_how_many_connections_and_tells_changes_once_for_each_user() {
    let url = chat().await;
    let mut ada = Client::connect(format!("{url}?token={}", token("ada", 60, KEY))).await;
    // Her own join is announced to her: before the list or after it, since she has joined before she asks.
    let mut first = [recv(&mut ada).await, recv(&mut ada).await];
    first.sort_by_key(|message| message["type"].to_string());
    assert_eq!((here(&first[0]), &first[1]), (vec![("ada", 1)], &presence("ada", "joined", 1)));

    let protocols = format!("chat.v1, bearer, {}", token("bob", 60, KEY));
    let headers = [("sec-websocket-protocol", protocols.as_str())];
    let (mut bob, response) = within_timeout(Client::try_connect(url.clone(), &headers)).await.unwrap();
    assert_eq!(response.headers()["sec-websocket-protocol"], "chat.v1");
    assert_eq!(recv(&mut ada).await, presence("bob", "joined", 2));
    for _ in 0..2 {
        let message = recv(&mut bob).await;
        if message["type"] == "here" {
            assert_eq!(here(&message), [("ada", 1), ("bob", 1)]);
        }
    }

    // A second connection of hers is no second user: nobody is told, and the list has the number.
    let mut tab = Client::connect(format!("{url}?token={}", token("ada", 60, KEY))).await;
    assert_eq!(here(&recv(&mut tab).await), [("ada", 2), ("bob", 1)]);
    bob.send_text(r#"{"type":"who"}"#).await;
    assert_eq!(here(&recv(&mut bob).await), [("ada", 2), ("bob", 1)]);

    // What a connection knows of itself: how often it has said something.
    let say = r#"{"type":"say","text":"hello"}"#;
    for number in 1..=2 {
        tab.send_text(say).await;
        for client in [&mut ada, &mut bob, &mut tab] {
            let said = json!({ "type": "said", "by": "ada", "number": number, "text": "hello" });
            assert_eq!(recv(client).await, said);
        }
    }
    ada.send_text(say).await;
    assert_eq!(recv(&mut bob).await["number"], 1);

    // She has left when her last connection has.
    tab.leave().await;
    bob.send_text(r#"{"type":"who"}"#).await;
    assert_eq!(here(&recv(&mut bob).await), [("ada", 1), ("bob", 1)]);
    ada.leave().await;
    assert_eq!(recv(&mut bob).await, presence("ada", "left", 1));
}

#[tokio::test]
async fn the_chat_ends_a_connection_with_4401_when_its_token_expires() {
    let url = chat().await;
    // Tokens count whole seconds: on a busy machine, a short one has expired before it arrives.
    for seconds in [2, 4, 8, 16] {
        let client = Client::try_connect(format!("{url}?token={}", token("ada", seconds, KEY)), &[]);
        if let Ok((ada, _)) = within_timeout(client).await {
            let (_, close) = ada.rest().await;
            return assert_eq!(close, Some((4401, "the token has expired".into())));
        }
    }
    panic!("no token lives long enough");
}

/// A message of a client in the binary codec.
fn binary<T: Serialize>(value: &T) -> Vec<u8> {
    let mut payload = Vec::new();
    BinaryCodec::encode(value, &mut payload).unwrap();
    payload
}

fn from_binary<T: DeserializeOwned>(payload: &[u8]) -> T {
    BinaryCodec::decode(MessageKind::Binary, payload).unwrap()
}

/// The next message, which must be a binary one.
async fn recv_binary<T: DeserializeOwned>(client: &mut Client) -> T {
    match client.recv().await {
        Some(Message::Binary(payload)) => from_binary(&payload),
        other => panic!("no binary message but {other:?}"),
    }
}

/// Whether something is ready soon. When it is not, it is asked again, so that a busy machine changes nothing.
async fn soon<T>(ready: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(Duration::from_millis(10), ready).await.ok()
}

#[tokio::test]
async fn the_ticker_sends_each_client_its_symbols_in_one_order_and_waits_for_nobody() {
    const UPDATES: u64 = 8192;
    const ROUND: u64 = 64;
    let (listener, address) = listen().await;
    let (feed, updates) = mpsc::channel(1);
    // A publisher that waited for a client that reads nothing would wait forever.
    let config = WsHubConfig { stall_timeout: None, ..WsHubConfig::default() };
    tokio::spawn(async { ticker::main(listener, two_shards(), config, updates).await.unwrap() });
    // A long name, so that few updates fill the buffers of a client that reads nothing.
    let (long, short) = ("l".repeat(1000), "s".to_owned());
    let update = async |symbol: &str, price| {
        let update = ticker::Update { symbol: symbol.to_owned(), price };
        assert!(within_timeout(feed.send(update)).await.is_ok());
    };
    let mut one = Client::connect(format!("ws://{address}/ws")).await;
    let mut both = Client::connect(format!("ws://{address}/ws")).await;
    let mut stalled = RawClient::connect_narrow(address.parse::<std::net::SocketAddr>().unwrap()).await;
    one.send(Message::binary(binary(&vec![&short]))).await;
    both.send(Message::binary(binary(&vec![&long, &short]))).await;
    stalled.send(&client_frame(FIN | BINARY, &binary(&vec![&long]))).await;
    // Until each has its first price: its subscription has arrived.
    within_timeout(async {
        while soon(one.recv()).await.is_none() {
            update(&short, 0).await;
        }
        while soon(both.recv()).await.is_none() {
            update(&short, 0).await;
        }
        while soon(stalled.frame()).await.is_none() {
            update(&long, 0).await;
        }
    })
    .await;

    for first in (1..=UPDATES).step_by(ROUND as usize) {
        for price in first..first + ROUND {
            update(&long, price).await;
            update(&short, price).await;
        }
        for price in first..first + ROUND {
            for symbol in [&long, &short] {
                let mut seen: ticker::Update = recv_binary(&mut both).await;
                while seen.price == 0 {
                    seen = recv_binary(&mut both).await;
                }
                assert_eq!((&seen.symbol, seen.price), (symbol, price));
            }
            let mut seen: ticker::Update = recv_binary(&mut one).await;
            while seen.price == 0 {
                seen = recv_binary(&mut one).await;
            }
            assert_eq!((&seen.symbol, seen.price), (&short, price));
        }
    }

    // The client that has read nothing has lost some, and when it reads again it gets the new ones, in order.
    let mut prices = Vec::new();
    within_timeout(async {
        for price in UPDATES + 1.. {
            update(&long, price).await;
            while let Some(Some((_, payload))) = soon(stalled.frame()).await {
                prices.push(from_binary::<ticker::Update>(&payload).price);
            }
            if prices.last() > Some(&UPDATES) {
                return;
            }
        }
    })
    .await;
    prices.retain(|price| (1..=UPDATES).contains(price));
    assert!(prices.is_sorted_by(|earlier, later| earlier < later));
    assert!((prices.len() as u64) < UPDATES, "its buffers hold everything");
}

/// The next board that is as wanted; none in between is lost.
async fn board(client: &mut Client, mut is_wanted: impl FnMut(&game::Board) -> bool) -> game::Board {
    let mut board: game::Board = recv_binary(client).await;
    while !is_wanted(&board) {
        let next: game::Board = recv_binary(client).await;
        assert_eq!(next.tick, board.tick + 1);
        board = next;
    }
    board
}

#[tokio::test]
async fn the_game_moves_players_shows_spectators_ignores_them_and_lets_only_the_owner_kick() {
    let (listener, address) = listen().await;
    let begin = Instant::now();
    tokio::spawn(async { game::main(listener, two_shards()).await.unwrap() });
    let player = |name: &str| Client::connect(format!("ws://{address}/ws?player={name}"));
    let act = |message: &game::FromClient| Message::binary(binary(message));
    let names = |board: &game::Board| -> Vec<String> {
        board.players.iter().map(|player| player.0.clone()).collect()
    };
    let mut ada = player("ada").await;
    board(&mut ada, |board| names(board) == ["ada"]).await;
    let mut bob = player("bob").await;
    board(&mut bob, |board| names(board) == ["ada", "bob"]).await;
    let mut eve = Client::connect(format!("ws://{address}/ws")).await;
    let (code, why) = player("ada").await.rest().await.1.unwrap();
    assert_eq!((code, why.as_str()), (1008, "too many connections of this user"));

    eve.send(act(&game::FromClient::Move(100, 100))).await;
    eve.send(act(&game::FromClient::Kick("ada".into()))).await;
    bob.send(act(&game::FromClient::Kick("ada".into()))).await;
    bob.send(act(&game::FromClient::Move(3, -2))).await;
    let moved = board(&mut eve, |board| board.players[1].1 == 3).await;
    assert_eq!(moved.players, [("ada".to_owned(), 0, 0), ("bob".to_owned(), 3, -2)]);

    ada.send(act(&game::FromClient::Kick("bob".into()))).await;
    assert_eq!(bob.rest().await.1, Some((4003, "kicked".into())));
    let last = board(&mut eve, |board| names(board) == ["ada"]).await;
    let ticks = begin.elapsed().as_secs_f64() * 30.0;
    assert!(last.tick as f64 <= ticks + 1.0, "{} boards in the time of {ticks}", last.tick);
}

/// A request over a connection of its own: the status, and the body.
async fn http(address: &str, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut stream = within_timeout(TcpStream::connect(address)).await.unwrap();
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n"
    );
    stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    let mut response = String::new();
    within_timeout(stream.read_to_string(&mut response)).await.unwrap();
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

async fn json_of(address: &str, path: &str) -> Value {
    let (status, body) = http(address, "GET", path, "").await;
    assert_eq!(status, 200, "{path}: {body}");
    serde_json::from_str(&body).unwrap()
}

#[tokio::test]
async fn the_admin_lists_rooms_users_and_connections_sends_to_devices_and_disconnects_a_user() {
    let (listener, address) = listen().await;
    tokio::spawn(async { admin::main(listener, two_shards(), without_grace()).await.unwrap() });
    let connect = async |user: &str, room: &str| {
        let mut client = Client::connect(format!("ws://{address}/ws?user={user}&room={room}")).await;
        client.send_text(format!("{user} in {room}")).await; // answered when it has joined
        client.recv_texts(&[&format!("{user} in {room}")]).await;
        client
    };
    let mut phone = connect("ada", "red").await;
    let mut laptop = connect("ada", "blue").await;
    let mut bob = connect("bob", "green").await;

    let mut rooms = json_of(&address, "/rooms").await.as_array().unwrap().clone();
    rooms.sort_by_key(|room| room["name"].to_string());
    let room = |name: &str| json!({ "name": name, "connections": 1, "users": 1 });
    assert_eq!(rooms, [room("blue"), room("green"), room("red")]);

    let users = json_of(&address, "/rooms/red").await;
    assert_eq!((&users[0]["user"], &users[0]["connections"]), (&json!("ada"), &json!(1)));
    assert_eq!(users[0]["metadata"], "127.0.0.1");
    assert!(users[0]["since"].is_u64() && users[1].is_null());

    let connections = json_of(&address, "/users/ada").await;
    let mut rooms: Vec<_> = (0..2).map(|index| connections[index][1][0].as_str().unwrap()).collect();
    rooms.sort_unstable();
    assert_eq!(rooms, ["blue", "red"]);
    assert!(connections[0][0] != connections[1][0] && connections[2].is_null());
    assert_eq!(connections[0][2]["tally"]["written"], 1, "{connections}");

    let sent = http(&address, "POST", "/users/ada", "your order has shipped").await;
    assert_eq!(sent, (200, "accepted by 2 of 2 devices".into()));
    phone.recv_texts(&["your order has shipped"]).await;
    laptop.recv_texts(&["your order has shipped"]).await;
    let sent = http(&address, "POST", "/users/eve", "hello?").await;
    assert_eq!(sent, (200, "accepted by 0 of 0 devices".into()));

    assert_eq!(http(&address, "DELETE", "/users/ada", "").await.0, 200);
    for device in [phone, laptop] {
        assert_eq!(device.closed().await, (4001, "by an administrator".into()));
    }
    bob.send_text("still connected").await;
    bob.recv_texts(&["still connected"]).await;
    assert_eq!(json_of(&address, "/rooms").await, json!([room("green")]));

    // Counters appear after the turn in which they changed.
    let is_counted = || {
        let address = address.clone();
        async move {
            let (_, text) = http(&address, "GET", "/metrics", "").await;
            ["shardcast_adopted 3", "shardcast_ended 2", "shardcast_tally_written 6"]
                .iter()
                .all(|line| text.lines().any(|other| other == *line))
        }
    };
    within_timeout(async { while !is_counted().await {} }).await;
}

#[tokio::test]
async fn the_handler_greets_counts_its_own_echoes_and_is_told_once_how_its_client_ended() {
    let (log, mut lines) = mpsc::unbounded_channel();
    let (listener, address) = listen().await;
    let server = tokio::spawn(async { handler::main(listener, two_shards(), log).await.unwrap() });
    let url = format!("ws://{address}/ws");
    let headers = [("user-agent", "curl")];
    let (mut one, _) = within_timeout(Client::try_connect(url.clone(), &headers)).await.unwrap();
    let mut other = Client::connect(url).await;
    one.recv_texts(&["Welcome, curl!"]).await;
    other.recv_texts(&["Welcome, stranger!"]).await;
    for text in ["a", "b", "c"] {
        one.send_text(text).await;
    }
    one.recv_texts(&["Echo 1: a", "Echo 2: b", "Echo 3: c"]).await;
    other.send_text("a").await;
    other.recv_texts(&["Echo 1: a"]).await;

    one.send_close(4000).await;
    let line = within_timeout(lines.recv()).await.unwrap();
    assert_eq!(line, r#"Some(127.0.0.1), 3 echoes, the client closed the connection with 4000: """#);
    drop(other);
    let line = within_timeout(lines.recv()).await.unwrap();
    assert!(line.starts_with("Some(127.0.0.1), 1 echoes, the client ended the stream"), "{line}");
    server.abort(); // drops the hub
    assert_eq!(within_timeout(lines.recv()).await, None, "each is told once, and no handler is left");
}

/// The lines of a program that are not empty.
fn lines_of(program: &str) -> Vec<&'static str> {
    let source = include_str!("programs.rs");
    let (begin, end) = (format!("// begin: {program}\n"), format!("// end: {program}\n"));
    let program = source.split_once(&begin).unwrap().1.split_once(&end).unwrap().0;
    program.lines().map(str::trim).filter(|line| !line.is_empty()).collect()
}

#[test]
fn the_programs_are_shorter_than_by_hand_and_have_no_registry_no_lock_and_no_timer() {
    const BY_HAND: [&str; 8] =
        ["Mutex", "RwLock", "DashMap", "HashMap", "BTreeMap", "OnceLock", "sleep(", "spawn("];
    for (program, lines_by_hand) in
        [("chat", 141), ("ticker", 87), ("game", 122), ("admin", 101), ("handler", 47)]
    {
        let lines = lines_of(program);
        assert!(lines.len() < lines_by_hand, "{program} has {} lines", lines.len());
        for line in lines {
            let is_clock = line.contains("interval(") && program != "game";
            assert!(!is_clock && !BY_HAND.iter().any(|word| line.contains(word)), "{program}: {line}");
        }
    }
}
