//! A chat: named rooms, member lists, join and leave notices, timestamps, and users who reconnect.
//!
//! `cargo run --release --example chat`, then open http://127.0.0.1:3000 in two tabs. `--port P` selects another port
//! (0: any). SIGTERM and Ctrl-C shut it down gracefully. Each connection has its own hub value; a room is a group.
//! The member lists are stored beside the groups, because names belong to the application.
//!
//! A user may send a token, which only the server sees. A user who reconnects with the token of a connection that is
//! still in the room, for instance because the network failed silently, replaces that connection: the name stays, there
//! are no notices, and the old connection is closed with 4001.

#![allow(clippy::print_stdout)]

use std::collections::HashMap;
use std::error::Error;
use std::future::IntoFuture;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::{Query, State};
use axum::response::Html;
use axum::routing::{any, get};
use serde::{Deserialize, Serialize};
use shardcast::{
    CloseCode, CloseReason, ConnectionId, Engine, EngineConfig, Hub, HubContext, JsonCodec, Refusal, Serve,
    Stateful, StatefulHub, WebSocketUpgrade, WsHubConfig,
};
use tokio::signal::unix::{SignalKind, signal};

/// Most characters in the name of a user or a room.
const NAME_MAX: usize = 32;
/// Most bytes in a token.
const TOKEN_MAX: usize = 64;
/// Most characters in a message.
const TEXT_MAX: usize = 2000;
/// The user continues on another connection. The page does not reconnect after a code from 4000 to 4999.
const TAKEN_OVER: CloseCode = CloseCode(4001);
/// Time at shutdown to deliver the published messages and the Close frames.
const SHUTDOWN_WITHIN: Duration = Duration::from_secs(5);
/// Time for HTTP responses after that.
const LAST_RESPONSES_WITHIN: Duration = Duration::from_secs(1);

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum FromGuest {
    Say {
        text: String,
    },
    /// Requests the member list. The page sends it once after the welcome, because it has missed the notice of a user
    /// who joined after the welcome and before the connection joined the group.
    Who,
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum ToGuest {
    Welcome {
        you: Arc<str>,
        room: Arc<str>,
        #[serde(flatten)]
        members: Members,
        at: u64,
    },
    Joined {
        name: Arc<str>,
        #[serde(flatten)]
        members: Members,
        at: u64,
    },
    Left {
        name: Arc<str>,
        #[serde(flatten)]
        members: Members,
        at: u64,
    },
    Members(Members),
    Said {
        name: Arc<str>,
        text: String,
        at: u64,
    },
    Refused {
        why: String,
    },
}

/// The member list of a room, in the order in which they joined.
#[derive(Clone, Serialize)]
struct Members {
    members: Vec<Arc<str>>,
    /// Grows with every change. Concurrent changes may be announced in either order; the list with the larger number is
    /// the newer one.
    change: u64,
}

/// The members of all rooms. The lock is held briefly and never across an await.
#[derive(Default)]
struct Rooms(Mutex<Registry>);

#[derive(Default)]
struct Registry {
    rooms: HashMap<Arc<str>, Vec<Member>>,
    changes: u64,
}

struct Member {
    name: Arc<str>,
    token: Arc<str>,
    id: ConnectionId,
}

struct Entered {
    name: Arc<str>,
    members: Members,
    /// The user's earlier connection, which this one replaces.
    former: Option<ConnectionId>,
}

impl Registry {
    fn members(&self, room: &str) -> Members {
        let names = self.rooms.get(room).into_iter().flatten().map(|member| member.name.clone());
        Members { members: names.collect(), change: self.changes }
    }
}

impl Rooms {
    fn registry(&self) -> std::sync::MutexGuard<'_, Registry> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a member: under the name that the token has in this room, or else under the requested name, with a number
    /// if it is taken.
    fn enter(&self, room: &Arc<str>, wished: &str, token: &Arc<str>, id: ConnectionId) -> Entered {
        let mut registry = self.registry();
        let members = registry.rooms.entry(room.clone()).or_default();
        let own = members.iter_mut().find(|member| !token.is_empty() && member.token == *token);
        if let Some(member) = own {
            let (name, former) = (member.name.clone(), std::mem::replace(&mut member.id, id));
            return Entered { name, members: registry.members(room), former: Some(former) };
        }
        let is_free = |name: &String| !members.iter().any(|member| *member.name == **name);
        let name: Arc<str> = names_like(wished).find(is_free).unwrap_or_default().into();
        members.push(Member { name: name.clone(), token: token.clone(), id });
        registry.changes += 1;
        Entered { name, members: registry.members(room), former: None }
    }

    /// Removes a connection's member; `None` if another connection has replaced it.
    fn leave(&self, room: &Arc<str>, id: ConnectionId) -> Option<(Arc<str>, Members)> {
        let mut registry = self.registry();
        let members = registry.rooms.get_mut(room)?;
        let index = members.iter().position(|member| member.id == id)?;
        let name = members.remove(index).name;
        if members.is_empty() {
            registry.rooms.remove(room);
        }
        registry.changes += 1;
        Some((name, registry.members(room)))
    }
}

/// `Ada`, `Ada (2)`, `Ada (3)` and so on, all within [`NAME_MAX`], because a user requests the same name on
/// reconnecting.
fn names_like(wished: &str) -> impl Iterator<Item = String> {
    let numbered = |n: u64| {
        let number = format!(" ({n})");
        let most = NAME_MAX.saturating_sub(number.len());
        wished.chars().take(most).collect::<String>().trim_end().to_owned() + &number
    };
    std::iter::once(wished.to_owned()).chain((2..).map(numbered))
}

/// One user's connection.
struct Guest {
    rooms: Arc<Rooms>,
    room: Arc<str>,
    wished: String,
    token: Arc<str>,
    /// The user's name in the room. `None` until the user has joined.
    name: Option<Arc<str>>,
}

impl StatefulHub for Guest {
    type Codec = JsonCodec;
    type InMessage = FromGuest;
    type OutMessage = ToGuest;

    async fn on_connected(&mut self, ctx: HubContext<Stateful<Self>>) -> Result<(), Refusal> {
        let is_name = |name: &str| !name.trim().is_empty() && name.chars().count() <= NAME_MAX;
        if !is_name(&self.wished) || !is_name(&self.room) {
            return Err(Refusal::new(
                CloseCode::POLICY_VIOLATION,
                "the names of user and room must have 1 to 32 characters",
            ));
        }
        if self.token.len() > TOKEN_MAX {
            return Err(Refusal::new(CloseCode::POLICY_VIOLATION, "a token must have at most 64 bytes"));
        }
        let Entered { name, members, former } =
            self.rooms.enter(&self.room, self.wished.trim(), &self.token, ctx.id());
        self.name = Some(name.clone());
        // One task publishes these in sequence, so every client sees them in this order (causal order).
        let (you, room) = (name.clone(), self.room.clone());
        ctx.unicast(ToGuest::Welcome { you, room, members: members.clone(), at: now() }).await;
        if former.is_none() {
            ctx.broadcast_group(&self.room, ToGuest::Joined { name, members, at: now() }).await;
        }
        ctx.add_to_group(&self.room).await;
        if let Some(former) = former {
            let reason = "you have connected again on another connection";
            // Fails while the server is shutting down or overloaded: then the former one stays until it ends by itself.
            ctx.clients().disconnect(former, TAKEN_OVER, reason).await.ok();
        }
        Ok(())
    }

    async fn on_message(&mut self, message: FromGuest, ctx: HubContext<Stateful<Self>>) {
        let Some(name) = &self.name else { return };
        let text = match message {
            FromGuest::Say { text } => text,
            FromGuest::Who => {
                let members = self.rooms.registry().members(&self.room);
                return ctx.unicast(ToGuest::Members(members)).await;
            }
        };
        if text.trim().is_empty() || text.chars().count() > TEXT_MAX {
            let why = format!("a message must have 1 to {TEXT_MAX} characters");
            return ctx.unicast(ToGuest::Refused { why }).await;
        }
        ctx.broadcast_group(&self.room, ToGuest::Said { name: name.clone(), text, at: now() }).await;
    }

    async fn on_disconnected(&mut self, ctx: HubContext<Stateful<Self>>, _: CloseReason) {
        let Some((name, members)) = self.rooms.leave(&self.room, ctx.id()) else { return };
        ctx.broadcast_group(&self.room, ToGuest::Left { name, members, at: now() }).await;
    }
}

/// Milliseconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_millis() as u64)
}

#[derive(Clone)]
struct Chat {
    hub: Hub<Stateful<Guest>>,
    rooms: Arc<Rooms>,
}

#[derive(Deserialize)]
struct Wish {
    #[serde(default)]
    room: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    token: String,
}

async fn enter(
    ws: WebSocketUpgrade,
    State(chat): State<Chat>,
    Query(wish): Query<Wish>,
) -> Serve<Stateful<Guest>> {
    let Wish { room, name: wished, token } = wish;
    let (room, token) = (room.into(), token.into());
    ws.serve(&chat.hub, Guest { rooms: chat.rooms, room, wished, token, name: None })
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
    let chat = Chat { hub: engine.hub(WsHubConfig::default())?, rooms: Arc::default() };
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
