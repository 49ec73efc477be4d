//! The smallest hub and a client of it: the README's program in one file.
//!
//! `cargo run --release --example hello --features client`

#![allow(clippy::print_stdout)]

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use serde::{Deserialize, Serialize};
use shardcast::{HubClient, HubContext, JsonCodec, WebSocketUpgrade, WsHub, WsHubConfig, serve_hub};

#[derive(Serialize, Deserialize)]
struct HelloMessage {
    text: String,
}

#[derive(Serialize, Deserialize, Debug)]
enum HelloReply {
    Ok(String),
    Err(String),
}

#[derive(Clone)]
struct AppState {
    greeting: &'static str,
}

struct HelloHub {
    state: AppState,
}

impl HelloHub {
    fn new(state: AppState) -> Self {
        Self { state }
    }
}

impl WsHub for HelloHub {
    type Codec = JsonCodec;
    type InMessage = HelloMessage;
    type OutMessage = HelloReply;

    async fn on_message(&self, msg: Self::InMessage, ctx: HubContext<Self>) {
        let reply = match msg.text.is_empty() {
            true => HelloReply::Err("say something".into()),
            false => HelloReply::Ok(format!("{} {}", self.state.greeting, msg.text)),
        };
        ctx.broadcast(reply).await
    }
}

fn hello_router() -> Router<AppState> {
    Router::new().route(
        "/ws",
        get(|ws: WebSocketUpgrade, State(state): State<AppState>| async move {
            let config = WsHubConfig::default();
            ws.on_upgrade(move |socket| async move { serve_hub(socket, HelloHub::new(state), &config).await })
        }),
    )
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let listener = shardcast::listen("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let app = hello_router().with_state(AppState { greeting: "hello" });
    tokio::spawn(async move { axum::serve(listener, app).await });

    let mut client = HubClient::builder(format!("ws://{address}/ws"))
        .with_in_message::<HelloMessage>()
        .with_out_message::<HelloReply>()
        .with_codec::<JsonCodec>()
        .build();
    client.connect().await?;
    client.send(HelloMessage { text: "world".into() })?;
    if let Some(reply) = client.recv().await {
        println!("{:?}", reply?);
    }
    // Sends a Close frame and waits for the server's.
    client.disconnect().await;
    Ok(())
}
