//! A program written for `axum::extract::ws`: one import was changed. Then the same with its tasks and channel deleted.
//!
//! `cargo run --release --example coming_from_axum_ws`, then `new WebSocket("ws://127.0.0.1:3000/before")` and
//! `…/after` in a browser's console: both broadcast what any client of theirs sends. `--port P` changes the port.

#![allow(clippy::print_stdout)]

use std::error::Error;

use axum::Router;
use axum::extract::State;
use axum::response::Response;
use axum::routing::any;
use futures_util::{SinkExt, StreamExt};
use shardcast::ws::{Message, WebSocket, WebSocketUpgrade}; // was: axum::extract::ws::{…}
use shardcast::{Engine, EngineConfig, Hub, HubContext, RawCodec, Serve, WsHub, WsHubConfig};
use tokio::sync::broadcast;

#[derive(Clone)]
struct App {
    sender: broadcast::Sender<String>,
    hub: Hub<Chat>,
}

// ---- Before: two tasks for each client, and a channel that loses messages of clients that lag.

async fn before(ws: WebSocketUpgrade, State(app): State<App>) -> Response {
    ws.on_upgrade(move |socket| forward(socket, app.sender))
}

async fn forward(socket: WebSocket, sender: broadcast::Sender<String>) {
    let mut messages = sender.subscribe();
    let (mut sink, mut stream) = socket.split();
    let mut sending = tokio::spawn(async move {
        while let Ok(text) = messages.recv().await {
            if sink.send(Message::text(text)).await.is_err() {
                break;
            }
        }
    });
    let mut receiving = tokio::spawn(async move {
        while let Some(Ok(message)) = stream.next().await {
            if let Message::Text(text) = message {
                let _ = sender.send(text.to_string());
            }
        }
    });
    tokio::select! {
        _ = &mut sending => receiving.abort(),
        _ = &mut receiving => sending.abort(),
    }
}

// ---- After: no task, no channel, no loss that is not counted.

struct Chat;

impl WsHub for Chat {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;

    async fn on_message(&self, text: String, ctx: HubContext<Self>) {
        ctx.broadcast(text).await;
    }
}

async fn after(ws: shardcast::WebSocketUpgrade, State(app): State<App>) -> Serve<Chat> {
    ws.serve(&app.hub, Chat)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let port = std::env::args().skip_while(|argument| argument != "--port").nth(1);
    let port: u16 = port.map_or(Ok(3000), |port| port.parse())?;
    let engine = Engine::start(EngineConfig::default())?;
    let app = App { sender: broadcast::channel(1000).0, hub: engine.hub(WsHubConfig::default())? };
    let app = Router::new().route("/before", any(before)).route("/after", any(after)).with_state(app);
    let listener = shardcast::listen(("127.0.0.1", port)).await?;
    println!("listening on ws://{}", listener.local_addr()?);
    axum::serve(listener, app).await?;
    Ok(())
}
