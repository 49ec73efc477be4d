//! A chat: named rooms, who is in them, join and leave notices, timestamps.
//!
//! `cargo run --release --example chat`, then open http://127.0.0.1:3000 in two tabs.
//! `--port P` takes another port (0: any). One hub value for each guest; a room is a
//! group. Who is in a room is kept beside the groups, because names are the application's.

#![allow(clippy::print_stdout)]

use std::collections::HashMap;
use std::error::Error;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::{Query, State};
use axum::response::{Html, Response};
use axum::routing::{any, get};
use serde::{Deserialize, Serialize};
use shardcast::{
    Clients, CloseCode, DisconnectRequest, Engine, EngineConfig, Hub, JsonCodec, MessageContext,
    WebSocketUpgrade, WsHub, WsHubConfig,
};

/// Characters in a name or the name of a room.
const NAME_MAX: usize = 32;
/// Characters in a message.
const TEXT_MAX: usize = 2000;

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum FromGuest {
    Say { text: String },
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum ToGuest {
    Welcome { you: Arc<str>, room: Arc<str>, members: Vec<Arc<str>>, at: u64 },
    Joined { name: Arc<str>, members: Vec<Arc<str>>, at: u64 },
    Left { name: Arc<str>, members: Vec<Arc<str>>, at: u64 },
    Said { name: Arc<str>, text: String, at: u64 },
    Refused { why: String },
}

type Context = MessageContext<ToGuest, JsonCodec>;

/// Who is in which room, in the order of their coming.
#[derive(Default)]
struct Rooms(Mutex<HashMap<Arc<str>, Vec<Arc<str>>>>);

impl Rooms {
    /// Lets a guest in, under the wished name or the next free one like it.
    fn enter(&self, room: &Arc<str>, wished: &str) -> (Arc<str>, Vec<Arc<str>>) {
        let mut rooms = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let members = rooms.entry(room.clone()).or_default();
        let mut candidates =
            std::iter::once(wished.to_owned()).chain((2..).map(|n| format!("{wished} ({n})")));
        let is_free = |name: &String| !members.iter().any(|member| **member == **name);
        let name: Arc<str> = candidates.find(is_free).unwrap_or_default().into();
        members.push(name.clone());
        (name, members.clone())
    }

    fn leave(&self, room: &Arc<str>, name: &str) -> Vec<Arc<str>> {
        let mut rooms = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(members) = rooms.get_mut(room) else { return Vec::new() };
        members.retain(|member| **member != *name);
        let left = members.clone();
        if left.is_empty() {
            rooms.remove(room);
        }
        left
    }
}

/// One guest.
struct Guest {
    rooms: Arc<Rooms>,
    room: Arc<str>,
    wished: String,
    /// Set when the guest has been let in.
    entered: Mutex<Option<Entered>>,
}

#[derive(Clone)]
struct Entered {
    name: Arc<str>,
    others: Clients<ToGuest, JsonCodec>,
}

impl Guest {
    fn entered(&self) -> MutexGuard<'_, Option<Entered>> {
        self.entered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WsHub for Guest {
    type Codec = JsonCodec;
    type InMessage = FromGuest;
    type OutMessage = ToGuest;

    async fn on_open(&self, ctx: Context) {
        let is_name = |name: &str| !name.trim().is_empty() && name.chars().count() <= NAME_MAX;
        if !is_name(&self.wished) || !is_name(&self.room) {
            let reason = "name and room have 1 to 32 characters";
            ctx.disconnect(CloseCode::POLICY_VIOLATION, reason).await;
            return;
        }
        let (name, members) = self.rooms.enter(&self.room, self.wished.trim());
        *self.entered() = Some(Entered { name: name.clone(), others: ctx.clients().clone() });
        let (you, room) = (name.clone(), self.room.clone());
        // One after the other by one task: every guest sees them in this order.
        ctx.unicast(ToGuest::Welcome { you, room, members: members.clone(), at: now() }).await;
        ctx.broadcast_group(&self.room, ToGuest::Joined { name, members, at: now() }).await;
        ctx.add_to_group(&self.room).await;
    }

    async fn on_message(&self, message: FromGuest, ctx: Context) {
        let FromGuest::Say { text } = message;
        let Some(Entered { name, .. }) = self.entered().clone() else { return };
        if text.trim().is_empty() || text.chars().count() > TEXT_MAX {
            let why = format!("a message has 1 to {TEXT_MAX} characters");
            return ctx.unicast(ToGuest::Refused { why }).await;
        }
        ctx.broadcast_group(&self.room, ToGuest::Said { name, text, at: now() }).await;
    }

    async fn on_disconnect(&self, _: DisconnectRequest) {
        let Some(Entered { name, others }) = self.entered().take() else { return };
        let members = self.rooms.leave(&self.room, &name);
        let left = ToGuest::Left { name, members, at: now() };
        // Fails only while the server is shutting down.
        others.to_group(&self.room).publish(left).await.ok();
    }
}

/// Milliseconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_millis() as u64)
}

#[derive(Clone)]
struct Chat {
    hub: Hub<Guest>,
    rooms: Arc<Rooms>,
}

#[derive(Deserialize)]
struct Wish {
    #[serde(default)]
    room: String,
    #[serde(default)]
    name: String,
}

async fn enter(ws: WebSocketUpgrade, State(chat): State<Chat>, Query(wish): Query<Wish>) -> Response {
    let Wish { room, name } = wish;
    let guest = Guest { rooms: chat.rooms, room: room.into(), wished: name, entered: Mutex::new(None) };
    ws.serve(&chat.hub, guest)
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
    println!("listening on http://{}", listener.local_addr()?);
    axum::serve(listener, app).await?;
    Ok(())
}
