//! Every program of a tutorial on WebSockets in Axum (seed 002), compiled and run on shardcast's sockets.
//!
//! The programs are verbatim but for `axum::extract::ws`, which is `shardcast::ws`, and for what Axum itself has changed
//! since: `{room}` for `:room`, and `.into()` for a text. What the tutorial leaves out stands around them, marked
//! `added`: imports, the state of a snippet, its token check. `chrono`'s timestamp is a constant, the listeners are on
//! free ports so that the programs can be run, and the layout is rustfmt's.

#![allow(clippy::unwrap_used, reason = "a test")]
#![allow(clippy::collapsible_match, clippy::uninlined_format_args, reason = "the programs are verbatim")]

use axum::Router;
use axum::routing::get;
use testkit::frames::{CLOSE, FIN, PONG, client_frame, client_text};
use testkit_hub::{RawClient, Server, within_timeout};

/// "The simplest possible WebSocket handler".
mod echo {
    use axum::{Router, response::Response, routing::get};
    use futures_util::{SinkExt, StreamExt};
    use shardcast::ws::{Message, WebSocket, WebSocketUpgrade};

    async fn ws_handler(ws: WebSocketUpgrade) -> Response {
        ws.on_upgrade(handle_socket)
    }

    async fn handle_socket(mut socket: WebSocket) {
        while let Some(Ok(msg)) = socket.next().await {
            match msg {
                Message::Text(text) => {
                    // Echo the message back
                    if socket.send(Message::Text(format!("Echo: {}", text).into())).await.is_err() {
                        break; // Client disconnected
                    }
                }
                Message::Close(_) => break,
                _ => {} // Ignore binary, ping, pong
            }
        }
    }

    #[allow(unused_imports, reason = "`send` is the socket's own; the tutorial imports the trait")]
    use SinkExt as _;

    pub(crate) async fn main(listener: tokio::net::TcpListener) {
        let app = Router::new().route("/ws", get(ws_handler));
        axum::serve(listener, app).await.unwrap();
    }
}

/// "Splitting the Socket".
mod split {
    use futures_util::{SinkExt, StreamExt};
    use shardcast::ws::{Message, WebSocket}; // added
    use tokio::sync::mpsc;

    pub(crate) async fn handle_socket(socket: WebSocket) {
        let (mut sender, mut receiver) = socket.split();
        // Channel for sending messages to this client
        let (tx, mut rx) = mpsc::channel::<String>(32);
        // Task: forward messages from the channel to the WebSocket
        let mut send_task = tokio::spawn(async move {
            while let Some(msg) = rx.recv().await {
                if sender.send(Message::Text(msg.into())).await.is_err() {
                    break;
                }
            }
        });
        // Task: read messages from the WebSocket
        let tx_clone = tx.clone();
        let mut recv_task = tokio::spawn(async move {
            while let Some(Ok(msg)) = receiver.next().await {
                match msg {
                    Message::Text(text) => {
                        // Process the message — here we just echo
                        let _ = tx_clone.send(format!("Echo: {}", text)).await;
                    }
                    Message::Close(_) => break,
                    _ => {}
                }
            }
        });
        // If either task finishes, abort the other
        tokio::select! {
            _ = &mut send_task => recv_task.abort(),
            _ = &mut recv_task => send_task.abort(),
        }
    }
}

/// "Building a Chat Room".
mod chat {
    use axum::{Router, extract::State, response::Response, routing::get};
    use futures_util::{SinkExt, StreamExt};
    use serde::{Deserialize, Serialize};
    use shardcast::ws::{Message, WebSocket, WebSocketUpgrade};
    use tokio::sync::broadcast;

    #[derive(Clone, Serialize, Deserialize)]
    #[allow(dead_code, reason = "the tutorial does not use it either")]
    struct ChatMessage {
        username: String,
        content: String,
        timestamp: String,
    }

    #[derive(Clone)]
    pub(crate) struct AppState {
        pub(crate) tx: broadcast::Sender<String>,
    }

    async fn ws_handler(ws: WebSocketUpgrade, State(state): State<AppState>) -> Response {
        ws.on_upgrade(move |socket| handle_socket(socket, state))
    }

    async fn handle_socket(socket: WebSocket, state: AppState) {
        let (mut sender, mut receiver) = socket.split();
        // Subscribe to broadcast channel
        let mut rx = state.tx.subscribe();
        // Task: forward broadcast messages to this client
        let mut send_task = tokio::spawn(async move {
            while let Ok(msg) = rx.recv().await {
                if sender.send(Message::Text(msg.into())).await.is_err() {
                    break;
                }
            }
        });
        // Task: read messages from this client and broadcast them
        let tx = state.tx.clone();
        let mut recv_task = tokio::spawn(async move {
            while let Some(Ok(msg)) = receiver.next().await {
                match msg {
                    Message::Text(text) => {
                        // Parse or just broadcast raw
                        let _ = tx.send(text.to_string());
                    }
                    Message::Close(_) => break,
                    _ => {}
                }
            }
        });
        tokio::select! {
            _ = &mut send_task => recv_task.abort(),
            _ = &mut recv_task => send_task.abort(),
        }
    }

    pub(crate) async fn main(listener: tokio::net::TcpListener) {
        let (tx, _rx) = broadcast::channel(1000);
        let state = AppState { tx };
        let app = Router::new().route("/ws", get(ws_handler)).with_state(state);
        axum::serve(listener, app).await.unwrap();
    }
}

/// "Named Rooms and User Management".
mod rooms {
    use axum::extract::Path;
    use axum::{Router, extract::State, response::Response, routing::get}; // added
    use futures_util::{SinkExt, StreamExt}; // added
    use shardcast::ws::{Message, WebSocket, WebSocketUpgrade}; // added
    use std::collections::{HashMap, HashSet};
    use std::sync::Arc;
    use tokio::sync::{RwLock, broadcast};

    const NOW: &str = "2026-01-01T00:00:00+00:00"; // added

    #[derive(Clone)]
    struct Room {
        tx: broadcast::Sender<String>,
        users: Arc<RwLock<HashSet<String>>>,
    }

    impl Room {
        fn new() -> Self {
            let (tx, _) = broadcast::channel(1000);
            Self { tx, users: Arc::new(RwLock::new(HashSet::new())) }
        }
    }

    #[derive(Clone)]
    struct ChatState {
        rooms: Arc<RwLock<HashMap<String, Room>>>,
    }

    impl ChatState {
        fn new() -> Self {
            Self { rooms: Arc::new(RwLock::new(HashMap::new())) }
        }

        async fn get_or_create_room(&self, name: &str) -> Room {
            // Try read lock first
            {
                let rooms = self.rooms.read().await;
                if let Some(room) = rooms.get(name) {
                    return room.clone();
                }
            }
            // Need write lock to create
            let mut rooms = self.rooms.write().await;
            rooms.entry(name.to_string()).or_insert_with(Room::new).clone()
        }

        async fn join_room(&self, room_name: &str, username: &str) -> Room {
            let room = self.get_or_create_room(room_name).await;
            room.users.write().await.insert(username.to_string());
            let join_msg = serde_json::json!({
                "type": "system",
                "content": format!("{} joined the room", username),
                "timestamp": NOW,
            });
            let _ = room.tx.send(join_msg.to_string());
            room
        }

        async fn leave_room(&self, room_name: &str, username: &str) {
            let rooms = self.rooms.read().await;
            if let Some(room) = rooms.get(room_name) {
                room.users.write().await.remove(username);
                let leave_msg = serde_json::json!({
                    "type": "system",
                    "content": format!("{} left the room", username),
                    "timestamp": NOW,
                });
                let _ = room.tx.send(leave_msg.to_string());
            }
        }
    }

    async fn ws_handler(
        ws: WebSocketUpgrade,
        Path((room_name, username)): Path<(String, String)>,
        State(state): State<ChatState>,
    ) -> Response {
        ws.on_upgrade(move |socket| handle_chat_socket(socket, state, room_name, username))
    }

    async fn handle_chat_socket(socket: WebSocket, state: ChatState, room_name: String, username: String) {
        let room = state.join_room(&room_name, &username).await;
        let (mut sender, mut receiver) = socket.split();
        let mut rx = room.tx.subscribe();
        let mut send_task = tokio::spawn(async move {
            while let Ok(msg) = rx.recv().await {
                if sender.send(Message::Text(msg.into())).await.is_err() {
                    break;
                }
            }
        });
        let tx = room.tx.clone();
        let username_clone = username.clone();
        let mut recv_task = tokio::spawn(async move {
            while let Some(Ok(msg)) = receiver.next().await {
                match msg {
                    Message::Text(text) => {
                        let chat_msg = serde_json::json!({
                            "type": "message",
                            "username": username_clone,
                            "content": text.as_str(),
                            "timestamp": NOW,
                        });
                        let _ = tx.send(chat_msg.to_string());
                    }
                    Message::Close(_) => break,
                    _ => {}
                }
            }
        });
        tokio::select! {
            _ = &mut send_task => recv_task.abort(),
            _ = &mut recv_task => send_task.abort(),
        }
        // Cleanup when socket closes
        state.leave_room(&room_name, &username).await;
    }

    pub(crate) fn app() -> Router {
        Router::new().route("/ws/{room}/{username}", get(ws_handler)).with_state(ChatState::new())
    }
}

/// "Heartbeats and Connection Health".
mod heartbeat {
    use super::chat::AppState; // added
    use futures_util::{SinkExt, StreamExt}; // added
    use shardcast::ws::{Message, WebSocket}; // added
    use std::time::Duration;
    use tokio::time;

    /// `every` is the tutorial's 30 s.
    pub(crate) async fn handle_socket_with_heartbeat(socket: WebSocket, state: AppState, every: Duration) {
        let (mut sender, mut receiver) = socket.split();
        let mut rx = state.tx.subscribe();
        let mut heartbeat_interval = time::interval(every);
        loop {
            tokio::select! {
                // Incoming message from client
                msg = receiver.next() => {
                    match msg {
                        Some(Ok(Message::Text(text))) => {
                            let _ = state.tx.send(text.to_string());
                        }
                        Some(Ok(Message::Pong(_))) => {
                            // Client is alive — reset any dead-client timer
                            let _ = state.tx.send("pong".to_owned()); // added
                        }
                        Some(Ok(Message::Close(_))) | None => break,
                        _ => {}
                    }
                }
                // Broadcast message to send to this client
                msg = rx.recv() => {
                    if let Ok(msg) = msg
                        && sender.send(Message::Text(msg.into())).await.is_err()
                    {
                        break;
                    }
                }
                // Heartbeat tick
                _ = heartbeat_interval.tick() => {
                    if sender.send(Message::Ping(vec![1, 2, 3].into())).await.is_err() {
                        break; // Client is gone
                    }
                }
            }
        }
    }
}

/// "Authenticated WebSockets": "Query parameter token" and "First-message authentication".
mod authenticated {
    use axum::extract::{Query, State};
    use axum::response::{IntoResponse, Response};
    use futures_util::{SinkExt, StreamExt};
    use serde::Deserialize;
    use shardcast::ws::{Message, WebSocket, WebSocketUpgrade};

    // added: the tutorial's check is not shown
    #[derive(Clone)]
    pub(crate) struct AppState {
        pub(crate) jwt: Jwt,
    }

    // added
    #[derive(Clone)]
    pub(crate) struct Jwt;

    // added
    pub(crate) struct Claims {
        sub: String,
    }

    // added
    impl Jwt {
        fn validate_token(&self, token: &str) -> Result<Claims, ()> {
            token.strip_prefix("token of ").map(|sub| Claims { sub: sub.to_owned() }).ok_or(())
        }
    }

    // added
    pub(crate) struct AppError(&'static str);

    // added
    impl AppError {
        fn unauthorized(why: &'static str) -> Self {
            Self(why)
        }
    }

    // added
    impl IntoResponse for AppError {
        fn into_response(self) -> Response {
            (axum::http::StatusCode::UNAUTHORIZED, self.0).into_response()
        }
    }

    #[derive(Deserialize)]
    pub(crate) struct WsAuth {
        token: String,
    }

    pub(crate) async fn ws_handler(
        ws: WebSocketUpgrade,
        Query(auth): Query<WsAuth>,
        State(state): State<AppState>,
    ) -> Result<Response, AppError> {
        let claims =
            state.jwt.validate_token(&auth.token).map_err(|_| AppError::unauthorized("Invalid token"))?;
        Ok(ws.on_upgrade(move |socket| handle_socket(socket, state, claims.sub)))
    }

    // added
    async fn handle_socket(mut socket: WebSocket, _: AppState, user_id: String) {
        let _ = socket.send(Message::Text(user_id.into())).await;
    }

    pub(crate) async fn first_message(mut socket: WebSocket, state: AppState) {
        // First message must be the auth token
        let user_id = match socket.next().await {
            Some(Ok(Message::Text(token))) => match state.jwt.validate_token(&token) {
                Ok(claims) => claims.sub,
                Err(_) => {
                    let _ = socket.send(Message::Close(None)).await;
                    return;
                }
            },
            _ => return,
        };
        // Now the socket is authenticated — proceed with normal handling
        let _ = socket
            .send(Message::Text(
                serde_json::json!({"type": "authenticated", "user_id": user_id}).to_string().into(),
            ))
            .await;
        // ... rest of handler
    }

    #[allow(unused_imports, reason = "`send` is the socket's own; the tutorial imports the trait")]
    use SinkExt as _;
}

// ---- They run ---------------------------------------------------------------------------------------------------

/// "Testing WebSockets": the tutorial's own test.
mod tests {
    use futures_util::{SinkExt, StreamExt};
    use tokio_tungstenite::tungstenite;

    #[tokio::test]
    async fn test_echo_websocket() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        tokio::spawn(super::echo::main(listener));
        let (mut ws_stream, _) =
            tokio_tungstenite::connect_async(format!("ws://{}/ws", addr)).await.expect("Failed to connect");
        // Send a message
        ws_stream.send(tungstenite::Message::Text("hello".into())).await.unwrap();
        // Read the echoed response
        let Some(Ok(msg)) = ws_stream.next().await else { panic!("nothing was echoed") };
        assert_eq!(msg.to_text().unwrap(), "Echo: hello");
    }
}

#[tokio::test]
async fn a_split_socket_echoes() {
    let connect = async |ws: shardcast::ws::WebSocketUpgrade| ws.on_upgrade(split::handle_socket);
    let server = Server::start(Router::new().route("/ws", get(connect))).await;
    let mut client = RawClient::connect(server.address).await;
    for number in 0..10 {
        client.send(&client_text(&number.to_string())).await;
        assert_eq!(client.recv_text().await, format!("Echo: {number}"));
    }
    client.send(&client_frame(FIN | CLOSE, &1000_u16.to_be_bytes())).await;
    assert_eq!(client.close_code().await, Some(1000));
}

#[tokio::test]
async fn a_chat_reaches_everyone() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(chat::main(listener));
    let mut ada = RawClient::connect(address).await;
    ada.send(&client_text("alone")).await;
    assert_eq!(ada.recv_text().await, "alone", "its task has subscribed");
    let mut bob = RawClient::connect(address).await;
    bob.send(&client_text("hello")).await;
    assert_eq!((ada.recv_text().await, bob.recv_text().await), ("hello".into(), "hello".into()));
}

#[tokio::test]
async fn rooms_have_users() {
    use futures_util::{SinkExt as _, StreamExt as _};
    let server = Server::start(rooms::app()).await;
    let connect = async |path: &str| tokio_tungstenite::connect_async(server.url(path)).await.unwrap().0;
    let mut ada = connect("/ws/red/ada").await;
    // The tutorial subscribes after it has joined, so a client does not see itself join; an answer shows that it has.
    ada.send("hello".into()).await.unwrap();
    let mut next =
        async || within_timeout(ada.next()).await.unwrap().unwrap().into_text().unwrap().to_string();
    let said = next().await;
    assert!(said.contains("\"username\":\"ada\"") && said.contains("\"content\":\"hello\""), "{said}");
    let bob = connect("/ws/red/bob").await;
    let _cyd = connect("/ws/blue/cyd").await;
    let joined = next().await;
    assert!(joined.contains("bob joined the room"), "{joined}");
    drop(bob);
    let left = next().await;
    assert!(left.contains("bob left the room"), "{left}");
}

#[tokio::test]
async fn pings_of_the_application_are_answered_to_it() {
    let state = chat::AppState { tx: tokio::sync::broadcast::channel(100).0 };
    let mut seen = state.tx.subscribe();
    let connect = move |ws: shardcast::ws::WebSocketUpgrade| async move {
        let every = std::time::Duration::from_secs(30);
        ws.on_upgrade(move |socket| heartbeat::handle_socket_with_heartbeat(socket, state, every))
    };
    let server = Server::start(Router::new().route("/ws", get(connect))).await;
    let mut client = RawClient::connect(server.address).await;
    assert_eq!(client.is_pinged().await, [1, 2, 3], "the first tick of an interval is at once");
    client.send(&client_frame(FIN | PONG, &[1, 2, 3])).await;
    assert_eq!(within_timeout(seen.recv()).await.unwrap(), "pong");
    assert_eq!(client.recv_text().await, "pong");
}

#[tokio::test]
async fn tokens_are_checked_in_the_query_and_in_the_first_message() {
    let state = authenticated::AppState { jwt: authenticated::Jwt };
    let for_first = state.clone();
    let first = move |ws: shardcast::ws::WebSocketUpgrade| async move {
        ws.on_upgrade(move |socket| authenticated::first_message(socket, for_first))
    };
    let app = Router::new()
        .route("/query", get(authenticated::ws_handler).with_state(state))
        .route("/ws", get(first));
    let server = Server::start(app).await;
    let refused = tokio_tungstenite::connect_async(server.url("/query?token=forged")).await.unwrap_err();
    let tokio_tungstenite::tungstenite::Error::Http(response) = refused else { panic!("{refused}") };
    assert_eq!((response.status().as_u16(), response.body().as_deref()), (401, Some(&b"Invalid token"[..])));
    use futures_util::StreamExt as _;
    let (mut client, _) =
        tokio_tungstenite::connect_async(server.url("/query?token=token%20of%20ada")).await.unwrap();
    assert_eq!(within_timeout(client.next()).await.unwrap().unwrap().into_text().unwrap(), "ada");

    let mut client = RawClient::connect(server.address).await;
    client.send(&client_text("forged")).await;
    assert_eq!(client.close_code().await, None);
    let mut client = RawClient::connect(server.address).await;
    client.send(&client_text("token of bob")).await;
    assert_eq!(client.recv_text().await, r#"{"type":"authenticated","user_id":"bob"}"#);
}
