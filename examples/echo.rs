//! The smallest server: each message is sent back to its client.
//!
//! `cargo run --release --example echo`, then open the address that it prints, or in any browser's console:
//!
//! ```js
//! const socket = new WebSocket("ws://127.0.0.1:3000/ws");
//! socket.onmessage = ({ data }) => console.log(data);
//! socket.onopen = () => socket.send("hello");
//! ```
//!
//! `--port P` changes the port. The same on the engine alone, without Axum: `engine_echo`.

#![allow(clippy::print_stdout)]

mod serve_until_signal;

use std::error::Error;

use axum::Router;
use axum::extract::State;
use axum::response::Html;
use axum::routing::{any, get};
use serve_until_signal::{port_or, serve_until_signal};
use shardcast::{
    Engine, EngineConfig, Hub, HubContext, RawCodec, RawMessage, Serve, WebSocketUpgrade, WsHub, WsHubConfig,
};

/// One value for each connection.
struct Echo;

impl WsHub for Echo {
    type Codec = RawCodec; // messages as they are, text and binary; `JsonCodec` makes them values
    type InMessage = RawMessage;
    type OutMessage = RawMessage;

    async fn on_message(&self, message: RawMessage, ctx: HubContext<Self>) {
        ctx.unicast(message).await;
    }
}

async fn connect(ws: WebSocketUpgrade, State(hub): State<Hub<Echo>>) -> Serve<Echo> {
    ws.serve(&hub, Echo)
}

const PAGE: &str = r#"<!doctype html><meta charset="utf-8"><title>echo</title>
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; connect-src 'self'">
<form><input name="text" placeholder="say something" autofocus></form><pre></pre>
<script>
  const socket = new WebSocket(`${location.protocol.replace("http", "ws")}//${location.host}/ws`);
  const show = (line) => document.querySelector("pre").append(line + "\n");
  socket.onmessage = ({ data }) => show(data);
  socket.onclose = ({ code }) => show(`disconnected (${code})`);
  document.querySelector("form").onsubmit = ({ target }) => {
    socket.send(target.text.value);
    target.reset();
    return false;
  };
</script>"#;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let engine = Engine::start(EngineConfig::default())?;
    let hub = engine.hub::<Echo>(WsHubConfig::default())?;
    let app = Router::new().route("/", get(async || Html(PAGE))).route("/ws", any(connect)).with_state(hub);
    serve_until_signal(engine, app, port_or(3000)?).await
}
