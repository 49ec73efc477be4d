//! One route that serves a page to a browser and a WebSocket to its script.
//!
//! `cargo run --release --example flexible_route`, then open the address that it prints. `--port P` changes the port.

#![allow(clippy::print_stdout)]

use std::error::Error;

use axum::Router;
use axum::extract::State;
use axum::response::{Html, IntoResponse, Response};
use axum::routing::any;
use shardcast::{Engine, EngineConfig, Hub, HubContext, RawCodec, WebSocketUpgrade, WsHub, WsHubConfig};

struct Echo;

impl WsHub for Echo {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;

    async fn on_message(&self, text: String, ctx: HubContext<Self>) {
        ctx.unicast(format!("you said {text}")).await;
    }
}

async fn page_or_socket(ws: Option<WebSocketUpgrade>, State(hub): State<Hub<Echo>>) -> Response {
    match ws {
        Some(ws) => ws.serve(&hub, Echo).into_response(),
        None => Html(PAGE).into_response(),
    }
}

const PAGE: &str = r#"<!doctype html><meta charset="utf-8"><title>flexible_route</title>
<form><input name="text" placeholder="say something" autofocus></form><pre></pre>
<script>
  const socket = new WebSocket(`ws://${location.host}/`);
  socket.onmessage = ({ data }) => document.querySelector("pre").append(data + "\n");
  document.querySelector("form").onsubmit = ({ target }) => {
    socket.send(target.text.value);
    target.reset();
    return false;
  };
</script>"#;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let port = std::env::args().skip_while(|argument| argument != "--port").nth(1);
    let port: u16 = port.map_or(Ok(3000), |port| port.parse())?;
    let engine = Engine::start(EngineConfig::default())?;
    let hub = engine.hub::<Echo>(WsHubConfig::default())?;
    let app = Router::new().route("/", any(page_or_socket)).with_state(hub);
    let listener = shardcast::listen(("127.0.0.1", port)).await?;
    println!("listening on http://{}", listener.local_addr()?);
    axum::serve(listener, app).await?;
    Ok(())
}
