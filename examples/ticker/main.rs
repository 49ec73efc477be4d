//! A price ticker: thousands of binary updates a second, of which each client gets those of the symbols that it wants.
//!
//! `cargo run --release --example ticker`, then open http://127.0.0.1:3000. `--port P` changes the port, `--rate N` the
//! updates a second of all 500 symbols together (default 5,000). Each symbol is a group; one task publishes, and there is
//! no list of subscribers, no lock and no timer for a connection. `GET /counters` has what the server counts.

#![allow(clippy::print_stdout)]

#[path = "../serve_until_signal.rs"]
mod serve_until_signal;

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Html;
use axum::routing::{any, get};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use serve_until_signal::{port_or, serve_until_signal};
use shardcast::{
    BroadcastPolicy, Clients, CloseCode, CodecError, Decode, Dropped, Encode, Engine, EngineConfig,
    GroupMetrics, Hub, HubContext, JsonCodec, MessageKind, PublishError, Refusal, Serve, Stateful,
    StatefulHub, WebSocketUpgrade, WsHubConfig,
};
use tokio::time::{MissedTickBehavior, interval};

const SYMBOLS: u16 = 500;
/// Symbols of a client that has not said which it wants.
const DEFAULT_SYMBOLS: u16 = 20;
const TICK: Duration = Duration::from_millis(1);

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum FromClient {
    /// Instead of the symbols so far.
    Subscribe { symbols: Vec<u16> },
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum ToClient {
    /// The names of all symbols; a symbol's number is its index.
    Symbols {
        names: Names,
    },
    /// Prices of these symbols follow, and of no others.
    Subscribed {
        symbols: Vec<u16>,
    },
    Refused {
        why: String,
    },
    /// Prices that were dropped, because the client was too slow.
    Lost {
        symbol: Option<Arc<str>>,
        messages: u64,
    },
    #[serde(skip)]
    Price(Price),
}

/// The newest price of a symbol. `update` counts the updates of the symbol, so that a client can see what it has missed.
struct Price {
    symbol: u16,
    cents: u32,
    update: u32,
}

type Names = Arc<[Arc<str>]>;

/// Prices are 10 bytes, little-endian, for a `DataView`; everything else is rare, and JSON.
struct TickerCodec;

impl Encode<ToClient> for TickerCodec {
    fn encode(message: &ToClient, payload: &mut Vec<u8>) -> Result<MessageKind, CodecError> {
        let ToClient::Price(price) = message else { return JsonCodec::encode(message, payload) };
        payload.extend_from_slice(&price.symbol.to_le_bytes());
        payload.extend_from_slice(&price.cents.to_le_bytes());
        payload.extend_from_slice(&price.update.to_le_bytes());
        Ok(MessageKind::Binary)
    }
}

impl Decode<FromClient> for TickerCodec {
    fn decode(kind: MessageKind, payload: &[u8]) -> Result<FromClient, CodecError> {
        JsonCodec::decode(kind, payload)
    }
}

struct Subscriber {
    names: Names,
    symbols: Vec<u16>,
}

type Context = HubContext<Stateful<Subscriber>>;

impl Subscriber {
    /// The client gets no price of a symbol that it has left after `Subscribed`, because one task does all of this in
    /// sequence (causal order).
    async fn subscribe(&mut self, mut symbols: Vec<u16>, ctx: &Context) -> Result<(), PublishError> {
        symbols.sort_unstable();
        symbols.dedup();
        let left = self.symbols.iter().filter(|symbol| !symbols.contains(symbol));
        let left: Vec<&str> = left.map(|&symbol| &*self.names[usize::from(symbol)]).collect();
        let joined: Vec<&str> = symbols.iter().map(|&symbol| &*self.names[usize::from(symbol)]).collect();
        ctx.clients().leave_all(ctx.id(), &left).await?;
        ctx.clients().join_all(ctx.id(), &joined).await?; // one step; no effect where it is a member already
        self.symbols.clone_from(&symbols);
        ctx.unicast(ToClient::Subscribed { symbols }).await;
        Ok(())
    }
}

impl StatefulHub for Subscriber {
    type Codec = TickerCodec;
    type InMessage = FromClient;
    type OutMessage = ToClient;

    async fn on_connected(&mut self, ctx: Context) -> Result<(), Refusal> {
        ctx.unicast(ToClient::Symbols { names: self.names.clone() }).await;
        let subscribed = self.subscribe((0..DEFAULT_SYMBOLS).collect(), &ctx).await;
        subscribed.map_err(|error| Refusal::new(CloseCode::TRY_AGAIN_LATER, error.to_string()))
    }

    async fn on_message(&mut self, FromClient::Subscribe { symbols }: FromClient, ctx: Context) {
        if let Some(unknown) = symbols.iter().find(|&&symbol| symbol >= SYMBOLS) {
            let why = format!("there is no symbol {unknown}: they are numbered from 0 to {}", SYMBOLS - 1);
            return ctx.unicast(ToClient::Refused { why }).await;
        }
        if let Err(error) = self.subscribe(symbols, &ctx).await {
            ctx.disconnect(CloseCode::TRY_AGAIN_LATER, error.to_string()).await;
        }
    }

    /// Waits for room in the client's outbox, and further losses are added up meanwhile: a client that reads slowly gets
    /// few of these, and one that reads nothing gets none, and is disconnected after 10 s (1013).
    async fn on_dropped(&mut self, ctx: Context, dropped: Dropped) {
        ctx.unicast(ToClient::Lost { symbol: dropped.group, messages: dropped.messages }).await;
    }
}

/// Publishes `rate` updates a second until the engine ends.
async fn publish_prices(clients: Clients<ToClient>, names: Names, rate: u64) {
    let symbols = u64::from(SYMBOLS);
    let mut prices: Vec<Price> = (0..SYMBOLS)
        .map(|symbol| Price { symbol, cents: 2_000 + u32::from(symbol) * 37, update: 0 })
        .collect();
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let (start, mut published) = (Instant::now(), 0);
    loop {
        ticks.tick().await;
        let due = start.elapsed().as_micros() as u64 * rate / 1_000_000;
        // At most one price of each symbol in a tick: a newer one replaces those that were not yet published.
        for update in due.saturating_sub(symbols).max(published)..due {
            let price = &mut prices[(update % symbols) as usize];
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let step =
                i64::from(price.cents) * (random % 401) as i64 / 100_000 - i64::from(price.cents) / 500;
            price.cents = price.cents.saturating_add_signed(step as i32).clamp(100, 10_000_000);
            price.update += 1;
            let (symbol, cents, update) = (price.symbol, price.cents, price.update);
            let name = &names[usize::from(symbol)];
            let price = ToClient::Price(Price { symbol, cents, update });
            if let Err(PublishError::Closed) = clients.to_group(name).publish(&price).await {
                return;
            }
        }
        published = due;
    }
}

/// Distinct names of three letters.
fn name_of(symbol: u16) -> Arc<str> {
    let number = (u32::from(symbol) * 7_919 + 4_711) % 17_576; // a permutation: 7,919 and 26³ have no common factor
    let letters = [number / 676, number / 26 % 26, number % 26];
    letters.into_iter().map(|letter| char::from(b'A' + letter as u8)).collect::<String>().into()
}

#[derive(Clone)]
struct Ticker {
    hub: Hub<Stateful<Subscriber>>,
    names: Names,
}

async fn connect(ws: WebSocketUpgrade, State(ticker): State<Ticker>) -> Serve<Stateful<Subscriber>> {
    ws.serve(&ticker.hub, Subscriber { names: ticker.names, symbols: Vec::new() })
}

async fn counters(State(ticker): State<Ticker>) -> Result<Json<GroupMetrics>, (StatusCode, String)> {
    let metrics = ticker.hub.metrics().await;
    metrics.map(Json).map_err(|error| (StatusCode::SERVICE_UNAVAILABLE, error.to_string()))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let rate = std::env::args().skip_while(|argument| argument != "--rate").nth(1);
    let rate: u64 = rate.map_or(Ok(5_000), |rate| rate.parse())?;
    if !(1..=1_000_000).contains(&rate) {
        return Err("--rate takes 1 to 1,000,000 updates a second".into());
    }
    let config = WsHubConfig {
        // By default (`Block`) the publisher waits for its slowest subscriber, and all the others get old prices. Here
        // it waits for nobody: a price that finds a client's outbox full is dropped for this client, who is told.
        policy: BroadcastPolicy::DropMessage { timeout: Duration::ZERO },
        // What is in the outbox is old when it is read, so little of it: 64 prices are 0.3 s of 20 symbols, and 13 ms
        // of all 500, which a client that keeps up never has waiting.
        outbox_frames: 64,
        ..WsHubConfig::default()
    };
    let engine = Engine::start(EngineConfig::default())?;
    let ticker = Ticker { hub: engine.hub(config)?, names: (0..SYMBOLS).map(name_of).collect() };
    tokio::spawn(publish_prices(ticker.hub.clients().clone(), ticker.names.clone(), rate));
    let app = Router::new()
        .route("/", get(async || Html(include_str!("page.html"))))
        .route("/ws", any(connect))
        .route("/counters", get(counters))
        .with_state(ticker);
    serve_until_signal(engine, app, port_or(3000)?).await
}
