//! An HTTP API over a hub: who is there, send to a user's devices, disconnect a user.
//!
//! `cargo run --release --example admin`, then connect with `new WebSocket("ws://127.0.0.1:3000/ws?user=ada&room=red")` in
//! a browser's console, and from a shell:
//!
//! ```text
//! curl http://127.0.0.1:3000/rooms                             # the rooms, with their numbers of clients and users
//! curl http://127.0.0.1:3000/rooms/red                         # who is in a room, since when
//! curl http://127.0.0.1:3000/users                             # the users, with their numbers of connections
//! curl -d 'your order has shipped' http://127.0.0.1:3000/users/ada          # to all devices of a user
//! curl -X DELETE http://127.0.0.1:3000/users/ada               # disconnects them (4001)
//! ```
//!
//! No registry, no lock: the hub knows. A real service protects these routes. `--port P` changes the port.

#![allow(clippy::print_stdout)]

use std::error::Error;

use axum::extract::{Path, Query, State};
use axum::routing::{any, get, post};
use axum::{Json, Router};
use serde::Deserialize;
use shardcast::{
    CloseCode, Engine, EngineConfig, GroupCount, Hub, HubContext, Present, PublishError, RawCodec, Refusal,
    Serve, WebSocketUpgrade, WsHub, WsHubConfig,
};

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

async fn connect(
    ws: WebSocketUpgrade,
    Query(who): Query<Who>,
    State(hub): State<Hub<Device>>,
) -> Serve<Device> {
    ws.serve(&hub, Device { room: who.room }).user(who.user)
}

async fn rooms(State(hub): State<Hub<Device>>) -> Json<Vec<GroupCount>> {
    Json(hub.groups())
}

async fn room(
    Path(name): Path<String>,
    State(hub): State<Hub<Device>>,
) -> Result<Json<Vec<Present>>, PublishError> {
    hub.presence(&name).await.map(Json)
}

async fn users(State(hub): State<Hub<Device>>) -> Json<Vec<(String, usize)>> {
    Json(hub.users().into_iter().map(|(name, connections)| (name.to_string(), connections)).collect())
}

async fn send(
    Path(user): Path<String>,
    State(hub): State<Hub<Device>>,
    text: String,
) -> Result<String, PublishError> {
    let receipt = hub.to_user(&user).deliver(&text).await?;
    Ok(format!("accepted by {} of {} devices\n", receipt.accepted(), receipt.recipients))
}

async fn disconnect(
    Path(user): Path<String>,
    State(hub): State<Hub<Device>>,
) -> Result<String, PublishError> {
    let devices = hub.user_len(&user);
    hub.to_user(&user).disconnect(CloseCode(4001), "by an administrator").await?;
    Ok(format!("{devices} devices are disconnected\n"))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let port = std::env::args().skip_while(|argument| argument != "--port").nth(1);
    let port: u16 = port.map_or(Ok(3000), |port| port.parse())?;
    let engine = Engine::start(EngineConfig::default())?;
    let hub = engine.hub::<Device>(WsHubConfig::default())?;
    let app = Router::new()
        .route("/ws", any(connect))
        .route("/rooms", get(rooms))
        .route("/rooms/{name}", get(room))
        .route("/users", get(users))
        .route("/users/{name}", post(send).delete(disconnect))
        .with_state(hub);
    let listener = shardcast::listen(("127.0.0.1", port)).await?;
    println!("listening on http://{}", listener.local_addr()?);
    axum::serve(listener, app).await?;
    Ok(())
}
