//! Every program of a page of notes on WebSockets in Axum (seed 003), compiled and run on shardcast's sockets.
//!
//! The programs are verbatim but for the imports, which the page leaves out: `axum::extract::ws` is `shardcast::ws`.
//! What stands around them is marked `added`; the layout is rustfmt's.

#![allow(clippy::unwrap_used, reason = "a test")]
#![allow(clippy::collapsible_match, clippy::uninlined_format_args, reason = "the programs are verbatim")]

use axum::Router;
use axum::routing::any;
use testkit::frames::{CLOSE, FIN, client_frame, client_text};
use testkit_hub::{RawClient, Server};

/// "Upgrade handshake" and "Basic echo loop".
mod echo {
    use axum::response::Response; // added
    use shardcast::ws::{Message, WebSocket, WebSocketUpgrade}; // added

    pub(crate) async fn ws_handler(ws: WebSocketUpgrade) -> Response {
        ws.on_upgrade(handle_socket)
    }

    async fn handle_socket(mut socket: WebSocket) {
        while let Some(Ok(msg)) = socket.recv().await {
            match msg {
                Message::Text(t) => {
                    socket.send(Message::Text(t)).await.ok();
                }
                Message::Close(_) => break,
                _ => {}
            }
        }
    }
}

/// "Message enum": every variant, with the types that the page gives.
fn the_message_enum(message: shardcast::ws::Message) -> String {
    use bytes::Bytes; // added
    use shardcast::ws::{CloseFrame, Message, Utf8Bytes}; // added
    match message {
        Message::Text(text) => {
            let text: Utf8Bytes = text; // NOT String
            text.to_string()
        }
        Message::Binary(bytes) | Message::Ping(bytes) | Message::Pong(bytes) => {
            let bytes: Bytes = bytes;
            format!("{bytes:?}")
        }
        Message::Close(close) => {
            let close: Option<CloseFrame> = close;
            close.map_or_else(String::new, |close| close.reason.as_str().to_owned())
        }
    }
}

/// "Splitting for concurrent access", "Broadcast channel pattern" and "Concurrent send/receive with `tokio::select!`".
mod broadcasting {
    use futures_util::{SinkExt, StreamExt};
    use shardcast::ws::{Message, WebSocket}; // added
    use std::sync::Arc; // added
    use tokio::sync::broadcast;

    pub(crate) struct AppState {
        tx: broadcast::Sender<String>,
    }

    pub(crate) fn state() -> Arc<AppState> {
        // At startup — create the channel with buffer capacity 100
        let (tx, _rx) = broadcast::channel(100);
        // _rx is dropped immediately; each client creates its own receiver via tx.subscribe()
        Arc::new(AppState { tx }) // `let state = …`
    }

    pub(crate) async fn handle_socket(socket: WebSocket, state: Arc<AppState>) {
        let (mut sender, mut receiver) = socket.split();
        let mut rx = state.tx.subscribe();
        // rx is this client's personal receiver — it will get every message
        // sent to state.tx by any other client

        // Task A: broadcast → this client
        let mut send_task = tokio::spawn(async move {
            // `rx` and `sender` are moved into this task — it owns them
            while let Ok(text) = rx.recv().await {
                if sender.send(Message::Text(text.into())).await.is_err() {
                    break; // client disconnected, stop
                }
            }
        });
        // Task B: this client → broadcast
        let mut recv_task = tokio::spawn(async move {
            // `receiver` and `state` are moved into this task
            while let Some(Ok(msg)) = receiver.next().await {
                if let Message::Text(t) = msg {
                    let _ = state.tx.send(t.to_string());
                }
            }
        });
        tokio::select! {
            _ = &mut send_task => recv_task.abort(),
            _ = &mut recv_task => send_task.abort(),
        }
    }
}

#[tokio::test]
async fn the_echo_loop_echoes() {
    let server = Server::start(Router::new().route("/ws", any(echo::ws_handler))).await;
    let mut client = RawClient::connect(server.address).await;
    client.send(&client_text("hello")).await;
    assert_eq!(client.recv_text().await, "hello");
    client.send(&client_frame(FIN | CLOSE, &1000_u16.to_be_bytes())).await;
    assert_eq!(client.close_code().await, Some(1000));
}

#[test]
fn the_message_enum_has_its_five_variants() {
    use shardcast::ws::Message;
    assert_eq!(the_message_enum(Message::Text("a".into())), "a");
    assert_eq!(the_message_enum(Message::Ping(vec![b'b'].into())), "b\"b\"");
    assert_eq!(the_message_enum(Message::Close(None)), "");
}

#[tokio::test]
async fn two_tasks_and_a_broadcast_channel_reach_everyone() {
    let state = broadcasting::state();
    let connect = move |ws: shardcast::ws::WebSocketUpgrade| async move {
        ws.on_upgrade(move |socket| broadcasting::handle_socket(socket, state))
    };
    let server = Server::start(Router::new().route("/ws", any(connect))).await;
    let mut ada = RawClient::connect(server.address).await;
    ada.send(&client_text("alone")).await;
    assert_eq!(ada.recv_text().await, "alone", "its task has subscribed");
    let mut bob = RawClient::connect(server.address).await;
    bob.send(&client_text("hello")).await;
    assert_eq!((ada.recv_text().await, bob.recv_text().await), ("hello".into(), "hello".into()));
}
