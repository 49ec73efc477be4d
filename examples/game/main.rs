//! A game: rooms at 30 ticks a second, players who collect a coin, an owner who may kick, and spectators.
//!
//! `cargo run --release --example game`, then open http://127.0.0.1:3000 in several tabs. `--port P` changes the port.
//!
//! One task owns the state of all rooms. It hears of players by presence, so that nothing here keeps a list of
//! connections, and of what they do by a channel from the hub's methods; so no lock is needed. A room is a group. A player
//! is a user of it (`room/name`), a spectator has no user. Who has been in a room for longest is its owner.

#![allow(clippy::print_stdout)]

#[path = "../serve_until_signal.rs"]
mod serve_until_signal;

use std::collections::{BTreeSet, HashMap};
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Query, State};
use axum::response::Html;
use axum::routing::{any, get};
use serde::{Deserialize, Serialize};
use serve_until_signal::{port_or, serve_until_signal};
use shardcast::{
    BroadcastPolicy, Clients, CloseCode, ConnectionId, Engine, EngineConfig, GroupCount, Hub, HubContext,
    JsonCodec, PresenceChange, PresenceChanges, PresenceEvent, PresenceKind, PublishError, Rate, RateLimit,
    Refusal, Serve, Stateful, StatefulHub, UserLimit, WebSocketUpgrade, WsHubConfig,
};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

const TICK: Duration = Duration::from_nanos(1_000_000_000 / 30);
/// The side of the square that is played on, and how far a player gets in a tick.
const SIDE: i16 = 1000;
const STEP: i16 = 12;
/// Who is nearer than this to the coin, along both axes, gets it.
const REACH: i16 = 40;
const PLAYERS_MAX: usize = 16;
/// Acts of one connection that may be refused before it is closed.
const REFUSED_MAX: u32 = 20;
/// Pages do not reconnect after codes from 4000 to 4999.
const KICKED: CloseCode = CloseCode(4003);
const ROOM_IS_FULL: CloseCode = CloseCode(4004);

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum FromClient {
    /// The direction of the player from now on: -1, 0 or 1 along each axis.
    Steer { dx: i16, dy: i16 },
    /// For the owner.
    Kick { name: String },
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum ToClient {
    /// All that there is in the room; each tick. The first player is the owner.
    State {
        players: Vec<Player>,
        coin: (i16, i16),
        spectators: usize,
    },
    Refused {
        why: &'static str,
    },
}

#[derive(Clone, Serialize)]
struct Player {
    name: Arc<str>,
    x: i16,
    y: i16,
    score: u32,
    #[serde(skip)]
    steering: (i16, i16),
}

/// What a player did, for the task.
struct Act {
    room: Arc<str>,
    name: Arc<str>,
    id: ConnectionId,
    what: FromClient,
}

/// One connection.
struct Seat {
    room: Arc<str>,
    /// None for a spectator.
    name: Option<Arc<str>>,
    acts: mpsc::Sender<Act>,
    refused: u32,
}

type Context = HubContext<Stateful<Seat>>;

impl StatefulHub for Seat {
    type Codec = JsonCodec;
    type InMessage = FromClient;
    type OutMessage = ToClient;

    async fn on_connected(&mut self, ctx: Context) -> Result<(), Refusal> {
        let is_name = |name: &str| (1..=16).contains(&name.chars().count()) && !name.contains('/');
        if !is_name(&self.room) || !self.name.as_deref().is_none_or(is_name) {
            return Err(Refusal::new(CloseCode::POLICY_VIOLATION, "names have 1 to 16 characters, and no /"));
        }
        if self.name.is_none() {
            ctx.add_to_group(&spectators_of(&self.room)).await; // only to be counted
        } else if ctx.clients().presence_len(&self.room) >= PLAYERS_MAX {
            return Err(Refusal::new(ROOM_IS_FULL, "the room is full: watch, or come back later"));
        }
        ctx.add_to_group(&self.room).await;
        Ok(())
    }

    async fn on_message(&mut self, what: FromClient, ctx: Context) {
        let Some(name) = self.name.clone() else {
            self.refused += 1;
            if self.refused > REFUSED_MAX {
                return ctx.disconnect(CloseCode::POLICY_VIOLATION, "spectators may only watch").await;
            }
            return ctx.unicast(ToClient::Refused { why: "spectators may only watch" }).await;
        };
        // While the channel is full this waits, and the client is not read. It is closed only when the game has ended.
        let _ = self.acts.send(Act { room: self.room.clone(), name, id: ctx.id(), what }).await;
    }
}

fn spectators_of(room: &str) -> String {
    format!("{room}/spectators")
}

/// A player's user: one of the room, so that the same name in another room is somebody else.
fn user_of(room: &str, name: &str) -> String {
    format!("{room}/{name}")
}

fn name_in(user: &str) -> &str {
    user.split_once('/').map_or(user, |(_, name)| name)
}

#[derive(Default)]
struct Room {
    /// In the order in which they came: the first is the owner.
    players: Vec<Player>,
    /// They stay out until the room is empty.
    kicked: BTreeSet<Arc<str>>,
    /// Collected by all together.
    coins: u32,
}

impl Room {
    /// Somewhere else after each that was collected, and never at the edge.
    fn coin(&self) -> (i16, i16) {
        let nth = 1 + (self.coins % 29) as i16;
        (50 + nth * 373 % 900, 50 + nth * 617 % 900)
    }

    fn step(&mut self) {
        for player in &mut self.players {
            player.x = (player.x + STEP * player.steering.0).clamp(0, SIDE);
            player.y = (player.y + STEP * player.steering.1).clamp(0, SIDE);
        }
        let (x, y) = self.coin();
        let is_there = |player: &&mut Player| (player.x - x).abs() < REACH && (player.y - y).abs() < REACH;
        if let Some(player) = self.players.iter_mut().find(is_there) {
            player.score += 1;
            self.coins += 1;
        }
    }
}

/// All rooms, and the one task that changes them. It waits for no client: under the hub's policy a state that finds an
/// outbox full is dropped.
struct Game {
    clients: Clients<ToClient>,
    rooms: HashMap<Arc<str>, Room>,
}

impl Game {
    async fn run(mut self, mut acts: mpsc::Receiver<Act>, mut changes: PresenceChanges) {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            let done = tokio::select! {
                change = changes.next() => match change {
                    Some(PresenceEvent::Change(change)) => self.on_presence(change).await,
                    Some(PresenceEvent::Gap { .. }) => self.on_gap().await,
                    None => return, // the engine has ended
                },
                Some(act) = acts.recv() => self.on_act(act).await,
                _ = ticks.tick() => self.on_tick().await,
            };
            if let Err(error) = done {
                println!("{error}");
            }
        }
    }

    async fn on_presence(&mut self, change: PresenceChange) -> Result<(), PublishError> {
        let Some(group) = change.group else { return Ok(()) }; // of the hub, not of a room
        let name = name_in(&change.user);
        match change.kind {
            PresenceKind::Joined => self.enter(group, name).await,
            PresenceKind::Left => self.leave(&group, name).await,
        }
    }

    async fn enter(&mut self, group: Arc<str>, name: &str) -> Result<(), PublishError> {
        let room = self.rooms.entry(group.clone()).or_default();
        if room.kicked.contains(name) {
            return self.disconnect(&group, name).await;
        }
        if !room.players.iter().any(|player| *player.name == *name) {
            let x = 100 + 250 * (room.players.len() % 4) as i16;
            room.players.push(Player { name: name.into(), x, y: SIDE / 2, score: 0, steering: (0, 0) });
        }
        Ok(())
    }

    async fn leave(&mut self, group: &Arc<str>, name: &str) -> Result<(), PublishError> {
        let Some(room) = self.rooms.get_mut(group) else { return Ok(()) };
        room.players.retain(|player| *player.name != *name);
        if room.players.is_empty() {
            self.send_state(group).await?; // the last one, for spectators
            self.rooms.remove(group);
        }
        Ok(())
    }

    /// Changes were missed, because more than 1,024 waited for this task: asks who is there.
    async fn on_gap(&mut self) -> Result<(), PublishError> {
        let mut present = HashMap::new();
        for GroupCount { name: group, .. } in self.clients.groups() {
            let users = self.clients.presence(&group).await?;
            present.insert(
                group,
                users.iter().map(|one| name_in(&one.user).to_owned()).collect::<BTreeSet<_>>(),
            );
        }
        self.rooms.retain(|group, room| {
            let names = present.get(group);
            room.players.retain(|player| names.is_some_and(|names| names.contains(&*player.name)));
            !room.players.is_empty()
        });
        for (group, names) in present {
            for name in names {
                self.enter(group.clone(), &name).await?;
            }
        }
        Ok(())
    }

    async fn on_act(&mut self, Act { room: group, name, id, what }: Act) -> Result<(), PublishError> {
        let Some(room) = self.rooms.get_mut(&group) else { return Ok(()) };
        if room.kicked.contains(&name) {
            return self.disconnect(&group, &name).await;
        }
        let is_owner = room.players.first().is_some_and(|owner| owner.name == name);
        match what {
            FromClient::Steer { dx, dy } => {
                if let Some(player) = room.players.iter_mut().find(|player| player.name == name) {
                    player.steering = (dx.signum(), dy.signum());
                }
            }
            FromClient::Kick { name: kicked } if is_owner && *kicked != *name => {
                room.players.retain(|player| *player.name != *kicked);
                room.kicked.insert(kicked.as_str().into());
                return self.disconnect(&group, &kicked).await;
            }
            FromClient::Kick { .. } => {
                let why = "only the owner of the room may kick, and only others";
                // `publish` to one client would wait until it has room, and the game with it.
                let _ = self.clients.to(id).try_publish(&ToClient::Refused { why });
            }
        }
        Ok(())
    }

    async fn disconnect(&self, group: &str, name: &str) -> Result<(), PublishError> {
        self.clients
            .to_user(&user_of(group, name))
            .disconnect(KICKED, "kicked by the owner of the room")
            .await
    }

    async fn on_tick(&mut self) -> Result<(), PublishError> {
        self.rooms.values_mut().for_each(Room::step);
        for group in self.rooms.keys() {
            self.send_state(group).await?;
        }
        Ok(())
    }

    async fn send_state(&self, group: &str) -> Result<(), PublishError> {
        let Some(room) = self.rooms.get(group) else { return Ok(()) };
        let spectators = self.clients.group_len(&spectators_of(group));
        let state = ToClient::State { players: room.players.clone(), coin: room.coin(), spectators };
        self.clients.to_group(group).publish(&state).await
    }
}

#[derive(Deserialize)]
struct Entry {
    room: Arc<str>,
    /// A spectator has none.
    name: Option<Arc<str>>,
}

#[derive(Clone)]
struct App {
    hub: Hub<Stateful<Seat>>,
    acts: mpsc::Sender<Act>,
}

async fn connect(
    ws: WebSocketUpgrade,
    State(App { hub, acts }): State<App>,
    Query(Entry { room, name }): Query<Entry>,
) -> Serve<Stateful<Seat>> {
    let user = name.as_deref().map(|name| user_of(&room, name));
    let serve = ws.serve(&hub, Seat { room, name, acts, refused: 0 });
    // An example: a service takes the name from a token or a session, see `auth_jwt`.
    match user {
        Some(user) => serve.user(user),
        None => serve,
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let config = WsHubConfig {
        // By default (`Block`) the slowest client would stop the game for all. A state that is late is worth nothing,
        // because the next one follows: so it is dropped, and few wait.
        policy: BroadcastPolicy::DropMessage { timeout: Duration::ZERO },
        outbox_frames: 8,
        // Twice as fast as the game; more waits unread.
        rate_limit: RateLimit { messages: Some(Rate::per_second(60)), ..RateLimit::default() },
        // A second tab takes the player over.
        max_connections_per_user: Some(UserLimit::NewestWins(1)),
        ..WsHubConfig::default()
    };
    let engine = Engine::start(EngineConfig::default())?;
    let hub = engine.hub::<Stateful<Seat>>(config)?;
    let (acts, to_do) = mpsc::channel(256);
    let game = Game { clients: hub.clients().clone(), rooms: HashMap::new() };
    let changes = hub.presence_changes(); // before the first client
    tokio::spawn(game.run(to_do, changes));
    let app = Router::new()
        .route("/", get(async || Html(include_str!("page.html"))))
        .route("/ws", any(connect))
        .with_state(App { hub, acts });
    serve_until_signal(engine, app, port_or(3000)?).await
}
