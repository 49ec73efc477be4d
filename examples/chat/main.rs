//! A chat: rooms, members, history, names that change, and users who reconnect without anybody seeing it.
//!
//! `cargo run --release --example chat`, then open http://127.0.0.1:3000 in two tabs. `--port P` selects another port
//! (0: any). SIGTERM and Ctrl-C shut it down gracefully. [`member`] is the hub, [`room`] keeps what was said; the page
//! is `page.html`. This file has the routes.

#![allow(clippy::print_stdout)]

mod member;
mod room;
#[path = "../serve_until_signal.rs"]
mod serve_until_signal;

use std::error::Error;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use axum::Router;
use axum::extract::{Query, State};
use axum::response::Html;
use axum::routing::{any, get};
use serde::Deserialize;
use shardcast::{Engine, EngineConfig, Hub, Serve, Stateful, WebSocketUpgrade};

use member::{Member, Profile};
use room::Rooms;
use serve_until_signal::{port_or, serve_until_signal};

#[derive(Clone)]
struct Chat {
    hub: Hub<Stateful<Member>>,
    rooms: Arc<Rooms>,
    user_ids: RandomState,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Enter {
    room: String,
    name: String,
    /// A secret of the browser's tab. Whoever has the same one is the same user. Empty: a user without a second tab.
    token: String,
}

async fn enter(
    ws: WebSocketUpgrade,
    State(chat): State<Chat>,
    Query(enter): Query<Enter>,
) -> Serve<Stateful<Member>> {
    // Everybody sees a user's id, and nobody can tell the token from it. A service has accounts instead: `auth_jwt`.
    let user: Arc<str> = match enter.token.as_str() {
        "" => format!("{:016x}", RandomState::new().hash_one(())),
        token => format!("{:016x}", chat.user_ids.hash_one(token)),
    }
    .into();
    let (room, name) = (chat.rooms.room(enter.room.trim()), Arc::<str>::from(enter.name.trim()));
    let profile = Profile { name: name.clone() };
    ws.serve(&chat.hub, Member { room, user: user.clone(), name }).user(user).metadata(&profile)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    tracing_subscriber::fmt::init();
    let engine = Engine::start(EngineConfig::default())?;
    let chat =
        Chat { hub: engine.hub(member::config())?, rooms: Arc::default(), user_ids: RandomState::new() };
    let app = Router::new()
        .route("/", get(async || Html(include_str!("page.html"))))
        .route("/ws", any(enter))
        .with_state(chat);
    serve_until_signal(engine, app, port_or(3000)?).await
}
