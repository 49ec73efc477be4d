//! A game at 30 ticks a second: players who collect a coin, an owner who may kick, and spectators who see but may not act.
//!
//! `cargo run --release --example game`, then open http://127.0.0.1:3000 in several tabs. `--port P` changes the port.
//!
//! One task owns the state of the game. It asks the hub in each tick who plays, so nothing here keeps a list of players,
//! and it gets what they do by a channel from the hub's methods, so there is no lock. Players are the users in a group;
//! who has been there for longest is the owner. A spectator is a connection without a user.

#![allow(clippy::print_stdout)]

#[path = "../serve_until_signal.rs"]
mod serve_until_signal;

use std::collections::HashMap;
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
    BroadcastPolicy, Clients, CloseCode, Engine, EngineConfig, Hub, HubContext, JsonCodec, Present,
    PublishError, Rate, RateLimit, Refusal, Serve, Stateful, StatefulHub, UserLimit, WebSocketUpgrade,
    WsHubConfig,
};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

/// The group of the players.
const PLAYERS: &str = "players";
const PLAYERS_MAX: usize = 16;
const TICK: Duration = Duration::from_nanos(1_000_000_000 / 30);
/// The side of the square that is played on, how far a player gets in a tick, and from how far it reaches the coin.
const SIDE: i16 = 1000;
const STEP: i16 = 12;
const REACH: i16 = 40;
/// The page does not reconnect after codes from 4000 to 4999.
const KICKED: CloseCode = CloseCode(4003);

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
    /// All that there is, in each tick. The first player is the owner.
    State {
        players: Vec<(Arc<str>, Player)>,
        coin: (i16, i16),
        spectators: usize,
    },
    Refused {
        why: &'static str,
    },
}

#[derive(Clone, Copy, Default, Serialize)]
struct Player {
    x: i16,
    y: i16,
    score: u32,
    #[serde(skip)]
    steering: (i16, i16),
}

/// What a player does: the name, and the direction.
type Act = (Arc<str>, (i16, i16));

/// One connection.
struct Seat {
    acts: mpsc::Sender<Act>,
    refused: u32,
}

impl StatefulHub for Seat {
    type Codec = JsonCodec;
    type InMessage = FromClient;
    type OutMessage = ToClient;

    async fn on_connected(&mut self, ctx: HubContext<Stateful<Self>>) -> Result<(), Refusal> {
        let Some(name) = ctx.user() else { return Ok(()) }; // a spectator
        if !(1..=16).contains(&name.chars().count()) {
            return Err(Refusal::new(CloseCode::POLICY_VIOLATION, "a name has 1 to 16 characters"));
        }
        if ctx.clients().presence_len(PLAYERS) >= PLAYERS_MAX {
            return Err(Refusal::new(CloseCode::POLICY_VIOLATION, "there are enough players: watch"));
        }
        ctx.add_to_group(PLAYERS).await;
        Ok(())
    }

    async fn on_message(&mut self, message: FromClient, ctx: HubContext<Stateful<Self>>) {
        let why = match (message, ctx.user()) {
            (_, None) => "spectators may only watch",
            (FromClient::Steer { dx, dy }, Some(name)) => {
                // While the channel is full this waits, and the client is not read.
                let _ = self.acts.send((name.clone(), (dx.signum(), dy.signum()))).await;
                return;
            }
            (FromClient::Kick { name }, Some(by)) => match players(ctx.clients()).await {
                Ok(players) if players.first().is_some_and(|owner| owner.user == *by) => {
                    let _ = ctx.clients().to_user(&name).disconnect(KICKED, "kicked by the owner").await;
                    return;
                }
                _ => "only the owner may kick",
            },
        };
        self.refused += 1;
        match self.refused {
            ..=20 => ctx.unicast(ToClient::Refused { why }).await,
            _ => ctx.disconnect(CloseCode::POLICY_VIOLATION, why).await,
        }
    }
}

/// The players, the owner first. One who reloads the page stays for 5 s (`presence_grace`), without a connection.
async fn players(clients: &Clients<ToClient>) -> Result<Vec<Present>, PublishError> {
    let mut players = clients.presence(PLAYERS).await?;
    players.sort_by_key(|player| (player.connections == 0, player.since));
    Ok(players)
}

/// The game, until the engine ends. It waits for no client: the hub's policy drops a state for a client whose outbox is
/// full.
async fn play(clients: Clients<ToClient>, mut acts: mpsc::Receiver<Act>) {
    let mut all: HashMap<Arc<str>, Player> = HashMap::new();
    let mut coins = 0_u32;
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            Some((name, steering)) = acts.recv() => {
                all.entry(name).or_default().steering = steering;
                continue;
            }
            _ = ticks.tick() => {}
        }
        let present = match players(&clients).await {
            Ok(present) => present,
            Err(PublishError::Closed) => return,
            Err(_) => continue, // the engine is overloaded: this tick is left out
        };
        all.retain(|name, _| present.iter().any(|player| player.user == *name));
        let coin = ((500 + coins * 373) as i16 % SIDE, (300 + coins * 617) as i16 % SIDE);
        let mut playing = Vec::new();
        for name in present.into_iter().filter(|player| player.connections > 0).map(|player| player.user) {
            let player = all.entry(name.clone()).or_default();
            player.x = (player.x + STEP * player.steering.0).clamp(0, SIDE);
            player.y = (player.y + STEP * player.steering.1).clamp(0, SIDE);
            if (player.x - coin.0).abs() < REACH && (player.y - coin.1).abs() < REACH {
                player.score += 1;
                coins = (coins + 1) % 50;
            }
            playing.push((name, *player));
        }
        let spectators = clients.len().saturating_sub(playing.len());
        // After an error the next state follows all the same.
        let _ = clients.to_all().publish(&ToClient::State { players: playing, coin, spectators }).await;
    }
}

type Game = (Hub<Stateful<Seat>>, mpsc::Sender<Act>);

async fn connect(
    ws: WebSocketUpgrade,
    State((hub, acts)): State<Game>,
    Query(mut query): Query<HashMap<String, String>>,
) -> Serve<Stateful<Seat>> {
    let serve = ws.serve(&hub, Seat { acts, refused: 0 });
    match query.remove("name") {
        Some(name) => serve.user(name), // an example: a service takes it from a token, see `auth_jwt`
        None => serve,                  // a spectator
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let config = WsHubConfig {
        // By default (`Block`) the slowest client would stop the game for all. A state that is late is worth nothing,
        // because the next one follows: so it is dropped, and few wait.
        policy: BroadcastPolicy::DropMessage { timeout: Duration::ZERO },
        outbox_frames: 8,
        // Twice as fast as the game; what is above it waits unread.
        rate_limit: RateLimit { messages: Some(Rate::per_second(60)), ..RateLimit::default() },
        // A second tab takes the player over.
        max_connections_per_user: Some(UserLimit::NewestWins(1)),
        ..WsHubConfig::default()
    };
    let engine = Engine::start(EngineConfig::default())?;
    let hub = engine.hub::<Stateful<Seat>>(config)?;
    let (acts, acts_of_players) = mpsc::channel(256);
    tokio::spawn(play(hub.clients().clone(), acts_of_players));
    let app = Router::new()
        .route("/", get(async || Html(include_str!("page.html"))))
        .route("/ws", any(connect))
        .with_state((hub, acts));
    serve_until_signal(engine, app, port_or(3000)?).await
}
