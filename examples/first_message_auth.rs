//! Authentication by the first message: for clients that can send nothing with the handshake.
//!
//! `cargo run --release --example first_message_auth`, then in a browser's console:
//!
//! ```js
//! const socket = new WebSocket("ws://127.0.0.1:3000/ws");
//! socket.onmessage = ({ data }) => console.log(data);
//! socket.onopen = () => socket.send("token-of-ada");
//! ```
//!
//! The hub is made from the first message. Before that the connection is in no group and gets nothing; without a message
//! it is closed after 5 s (1008), with one of more than 1 KiB at once (1009), with a wrong token too (1008). `--port P`
//! changes the port.

#![allow(clippy::print_stdout)]

use std::error::Error;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::routing::any;
use shardcast::{
    Accepted, CloseCode, Engine, EngineConfig, Hub, HubContext, RawCodec, RawMessage, Refusal, Serve,
    WebSocketUpgrade, WsHub, WsHubConfig,
};

struct Chat {
    user: String,
}

impl WsHub for Chat {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;

    async fn on_connected(&self, ctx: HubContext<Self>) -> Result<(), Refusal> {
        ctx.unicast(format!("authenticated as {}", self.user)).await;
        Ok(())
    }

    async fn on_message(&self, text: String, ctx: HubContext<Self>) {
        ctx.broadcast(format!("{}: {text}", self.user)).await;
    }
}

/// Stands for a database or an identity provider.
async fn verify(token: &str) -> Option<String> {
    token.strip_prefix("token-of-").map(str::to_owned)
}

async fn connect(ws: WebSocketUpgrade, State(chat): State<Hub<Chat>>) -> Serve<Chat> {
    ws.serve_first_message(&chat, async |first| {
        let refused = |why| Refusal::new(CloseCode::POLICY_VIOLATION, why);
        let RawMessage::Text(token) = first else { return Err(refused("the first message must be a token")) };
        let user = verify(&token).await.ok_or(refused("the token is not valid"))?;
        Ok(Accepted::new(Chat { user: user.clone() }).user(user))
    })
    .first_message_within(Duration::from_secs(5))
    .first_message_bytes(1024)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let port = std::env::args().skip_while(|argument| argument != "--port").nth(1);
    let port: u16 = port.map_or(Ok(3000), |port| port.parse())?;
    let engine = Engine::start(EngineConfig::default())?;
    let chat = engine.hub::<Chat>(WsHubConfig::default())?;
    let app = Router::new().route("/ws", any(connect)).with_state(chat);
    let listener = shardcast::listen(("127.0.0.1", port)).await?;
    println!("listening on ws://{}/ws", listener.local_addr()?);
    axum::serve(listener, app).await?;
    Ok(())
}
