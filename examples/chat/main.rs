//! A chat: rooms, members, history, names that change, and users who reconnect without anybody seeing it.
//!
//! `cargo run --release --example chat`, then open http://127.0.0.1:3000 in two tabs. `--port P` selects another port
//! (0: any). SIGTERM and Ctrl-C shut it down gracefully. [`member`] is the hub, [`room`] keeps what was said; the page
//! is `page.html`. This file has the routes and the shutdown.

#![allow(clippy::print_stdout)]

mod member;
mod room;

use std::error::Error;
use std::future::IntoFuture;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Query, State};
use axum::response::Html;
use axum::routing::{any, get};
use serde::Deserialize;
use shardcast::{Engine, EngineConfig, Hub, Serve, Stateful, WebSocketUpgrade};
use tokio::signal::unix::{SignalKind, signal};

use member::{Member, Profile};
use room::Rooms;

/// Time at shutdown to deliver the published messages and the Close frames.
const SHUTDOWN_WITHIN: Duration = Duration::from_secs(5);
/// Time for HTTP responses after that.
const LAST_RESPONSES_WITHIN: Duration = Duration::from_secs(1);

#[derive(Clone)]
struct Chat {
    hub: Hub<Stateful<Member>>,
    rooms: Arc<Rooms>,
    user_ids: RandomState,
}

#[derive(Deserialize)]
#[serde(default)]
#[derive(Default)]
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
    let mut arguments = std::env::args().skip(1);
    let port = match (arguments.next().as_deref(), arguments.next()) {
        (None, _) => 3000,
        (Some("--port"), Some(port)) => port.parse()?,
        _ => return Err("usage: chat [--port P]".into()),
    };
    let engine = Engine::start(EngineConfig::default())?;
    let chat =
        Chat { hub: engine.hub(member::config())?, rooms: Arc::default(), user_ids: RandomState::new() };
    let app = Router::new()
        .route("/", get(async || Html(include_str!("page.html"))))
        .route("/ws", any(enter))
        .with_state(chat);
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await?;
    // Before the line that says that the server is ready: a signal after it must not end the process at once.
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    println!("listening on http://{}", listener.local_addr()?);

    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let serving = axum::serve(listener, app).with_graceful_shutdown(async {
        let _ = ended.await; // never sent, only dropped
    });
    let mut serving = tokio::spawn(serving.into_future());
    tokio::select! {
        served = &mut serving => return Ok(served??),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    // First the engine, because axum does not know upgraded connections. Clients get all published messages and a Close
    // frame (1001); new clients get a 503.
    let report = engine.shutdown(SHUTDOWN_WITHIN).await;
    println!("flushed {}, cut off {}, left over {}", report.flushed, report.cut_off, report.left_over);
    // Then axum. It would wait for ever for a request that was sent only in part, so its time is limited.
    drop(end);
    let _ = tokio::time::timeout(LAST_RESPONSES_WITHIN, serving).await;
    Ok(())
}
