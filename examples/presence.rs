//! Who is in a room: joins, leaves, several tabs of one user, and reloads that nobody sees.
//!
//! `cargo run --release --example presence`, then open the address that it prints in several tabs, with `?user=ada` and
//! `?user=bob`. A second tab of the same user is the same user; a reload within 5 s is neither a leave nor a join.
//! `--port P` changes the port.

#![allow(clippy::print_stdout)]

use std::error::Error;

use axum::Router;
use axum::extract::{Query, State};
use axum::response::Html;
use axum::routing::{any, get};
use serde::{Deserialize, Serialize};
use shardcast::{
    Clients, Engine, EngineConfig, Hub, HubContext, JsonCodec, PresenceChange, PresenceKind, Refusal, Serve,
    WebSocketUpgrade, WsHub, WsHubConfig,
};

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum ToClient {
    /// Who is here, for a client that enters.
    Here {
        users: Vec<String>,
    },
    Joined {
        user: String,
    },
    Left {
        user: String,
    },
    Said {
        user: String,
        text: String,
    },
}

#[derive(Deserialize)]
struct Say {
    text: String,
}

struct Room {
    user: String,
}

impl WsHub for Room {
    type Codec = JsonCodec;
    type InMessage = Say;
    type OutMessage = ToClient;

    async fn on_connected(&self, ctx: HubContext<Self>) -> Result<(), Refusal> {
        // First the join, then the list: so no change is missed. A change may arrive before the list; the page applies
        // it after the list, and takes both as a set.
        ctx.add_to_group("room").await;
        if let Ok(present) = ctx.clients().presence("room").await {
            let users = present.iter().map(|present| present.user.to_string()).collect();
            ctx.unicast(ToClient::Here { users }).await;
        }
        Ok(())
    }

    async fn on_message(&self, say: Say, ctx: HubContext<Self>) {
        ctx.broadcast_group("room", ToClient::Said { user: self.user.clone(), text: say.text }).await;
    }

    /// Once for each user, not for each connection, and in the order of the hub's messages.
    async fn on_presence(clients: &Clients<ToClient>, change: PresenceChange) {
        if change.group.as_deref() != Some("room") {
            return;
        }
        let user = change.user.to_string();
        let message = match change.kind {
            PresenceKind::Joined => ToClient::Joined { user },
            PresenceKind::Left => ToClient::Left { user },
        };
        if let Err(error) = clients.to_group("room").publish(&message).await {
            println!("nobody was told of a change: {error}");
        }
    }
}

#[derive(Deserialize)]
struct Who {
    user: String,
}

async fn connect(ws: WebSocketUpgrade, Query(who): Query<Who>, State(room): State<Hub<Room>>) -> Serve<Room> {
    // An example: a service takes the user from a token or a session, see `auth_jwt`.
    ws.serve(&room, Room { user: who.user.clone() }).user(who.user)
}

const PAGE: &str = r#"<!doctype html><meta charset="utf-8"><title>presence</title>
<p></p><form><input name="text" placeholder="say something" autofocus></form><pre></pre>
<script>
  const user = new URLSearchParams(location.search).get("user") ?? "guest";
  const socket = new WebSocket(`ws://${location.host}/ws?user=${encodeURIComponent(user)}`);
  let here = null; // unknown before the list
  const early = []; // changes that came before the list: they are applied after it
  const show = (line) => document.querySelector("pre").append(line + "\n");
  const apply = ({ type, user }) => {
    if (type === "joined" && !here.has(user)) show(`${user} joined`);
    if (type === "left" && here.has(user)) show(`${user} left`);
    if (type === "joined") here.add(user); else here.delete(user);
  };
  socket.onmessage = ({ data }) => {
    const message = JSON.parse(data);
    if (message.type === "said") return show(`${message.user}: ${message.text}`);
    if (message.type === "here") {
      here = new Set(message.users);
      early.forEach(apply);
    } else if (here) apply(message);
    else return early.push(message);
    document.querySelector("p").textContent = "here: " + [...here].sort().join(", ");
  };
  document.querySelector("form").onsubmit = ({ target }) => {
    socket.send(JSON.stringify({ text: target.text.value }));
    target.reset();
    return false;
  };
</script>"#;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let port = std::env::args().skip_while(|argument| argument != "--port").nth(1);
    let port: u16 = port.map_or(Ok(3000), |port| port.parse())?;
    let engine = Engine::start(EngineConfig::default())?;
    let room = engine.hub::<Room>(WsHubConfig::default())?;
    let app =
        Router::new().route("/", get(|| async { Html(PAGE) })).route("/ws", any(connect)).with_state(room);
    let listener = shardcast::listen(("127.0.0.1", port)).await?;
    println!("listening on http://{}", listener.local_addr()?);
    axum::serve(listener, app).await?;
    Ok(())
}
