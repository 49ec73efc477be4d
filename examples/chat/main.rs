//! A chat: rooms, members, history, names that change, and users who reconnect without anybody seeing it.
//!
//! `cargo run --release --example chat`, then open http://127.0.0.1:3000 in two tabs. `--port P` selects another port
//! (0: any). SIGTERM and Ctrl-C shut it down gracefully. [`member`] is the hub, [`room`] keeps what was said; the page
//! is `page.html`. This file has the routes.
//!
//! `--backplane URL`, with the feature `backplane`, makes it one of several nodes; see `nodes.rs` for the URLs. The
//! example `cluster` runs two of them behind a load balancer, and is built from this file, too.

#![allow(clippy::print_stdout)]

mod member;
#[path = "../nodes.rs"]
mod nodes;
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
use serve_until_signal::{argument, port_or, serve_until_signal};
use sha2::{Digest, Sha256};

#[derive(Clone)]
struct Chat {
    hub: Hub<Stateful<Member>>,
    rooms: Arc<Rooms>,
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
    // Everybody sees a user's id, which is the same on every node, and nobody can tell the page's token from it, which
    // has 128 random bits. A service has accounts instead: `auth_jwt`.
    let user = match enter.token.as_str() {
        "" => RandomState::new().hash_one(()),
        token => Sha256::digest(token).iter().take(8).fold(0, |id, byte| id << 8 | u64::from(*byte)),
    };
    let user: Arc<str> = format!("{user:016x}").into();
    let (room, name) = (chat.rooms.room(enter.room.trim()), Arc::<str>::from(enter.name.trim()));
    let profile = Profile { name: name.clone() };
    ws.serve(&chat.hub, Member { room, user: user.clone(), name }).user(user).metadata(&profile)
}

#[tokio::main]
pub(crate) async fn main() -> Result<(), Box<dyn Error>> {
    tracing_subscriber::fmt::init();
    let engine = Engine::start(EngineConfig::default())?;
    if let Some(url) = argument("--backplane")? {
        nodes::join(&engine, &url)?;
    }
    if let Some(node) = engine.node() {
        println!("node {node}");
    }
    let chat = Chat { hub: engine.hub(member::config())?, rooms: Arc::default() };
    let app = Router::new()
        .route("/", get(async || Html(include_str!("page.html"))))
        .route("/ws", any(enter))
        .with_state(chat);
    serve_until_signal(engine, app, port_or(3000)?).await
}
