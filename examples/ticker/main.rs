//! A price ticker: some 5,000 binary updates a second, of which each client gets those of the symbols that it wants.
//!
//! `cargo run --release --example ticker`, then open http://127.0.0.1:3000. `--port P` changes the port. Each symbol is a
//! group; one task publishes, and there is no list of subscribers, no lock and no timer for a connection. Messages are
//! postcard, which the page reads with a few lines.

#![allow(clippy::print_stdout)]

#[path = "../serve_until_signal.rs"]
mod serve_until_signal;

use std::error::Error;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::response::Html;
use axum::routing::{any, get};
use serde::Serialize;
use serve_until_signal::{port_or, serve_until_signal};
use shardcast::{
    BinaryCodec, BroadcastPolicy, Clients, CloseCode, Dropped, Engine, EngineConfig, Hub, HubContext,
    PublishError, Refusal, Serve, Stateful, StatefulHub, WebSocketUpgrade, WsHubConfig,
};
use tokio::time::{MissedTickBehavior, interval};

const TICK: Duration = Duration::from_millis(1);
const UPDATES_IN_A_TICK: usize = 5;
/// Symbols of a client that has not said which it wants.
const DEFAULT_SYMBOLS: u16 = 20;
/// The names of the symbols, which are numbered from 0.
static NAMES: LazyLock<Vec<String>> = LazyLock::new(|| {
    let letter = |number: u32| char::from_digit(10 + number % 26, 36).unwrap_or('?').to_ascii_uppercase();
    let name = |symbol: u32| [symbol * 7, symbol / 26 + symbol, symbol / 26].map(letter).iter().collect();
    (0..500).map(name).collect()
});

#[derive(Serialize)]
enum ToClient {
    Symbols(&'static [String]),
    /// Prices of these symbols follow, and of no others.
    Subscribed(Vec<u16>),
    /// `update` counts the updates of the symbol, so that a client can see what it has missed.
    Price {
        symbol: u16,
        cents: u32,
        update: u32,
    },
    /// So many prices of a symbol were dropped, because this client was too slow. Of which symbol is not kept for more
    /// than 16 symbols at a time.
    Lost(Option<Arc<str>>, u64),
}

#[derive(Default)]
struct Subscriber {
    symbols: Vec<u16>,
}

type Prices = Stateful<Subscriber>;
type Context = HubContext<Prices>;

impl Subscriber {
    /// What one task does in sequence, each client sees in this sequence: so after `Subscribed` there comes no price of a
    /// symbol that it has left.
    async fn subscribe(&mut self, mut symbols: Vec<u16>, ctx: &Context) -> Result<(), PublishError> {
        symbols.retain(|&symbol| usize::from(symbol) < NAMES.len());
        let groups = |symbols: &[u16]| symbols.iter().map(|&n| &*NAMES[usize::from(n)]).collect::<Vec<_>>();
        ctx.clients().leave_all(ctx.id(), &groups(&self.symbols)).await?;
        ctx.clients().join_all(ctx.id(), &groups(&symbols)).await?;
        self.symbols.clone_from(&symbols);
        ctx.clients().to(ctx.id()).publish(&ToClient::Subscribed(symbols)).await
    }
}

impl StatefulHub for Subscriber {
    type Codec = BinaryCodec;
    type InMessage = Vec<u16>; // the symbols that the client wants, instead of those so far
    type OutMessage = ToClient;

    async fn on_connected(&mut self, ctx: Context) -> Result<(), Refusal> {
        ctx.unicast(ToClient::Symbols(&NAMES)).await;
        self.on_message((0..DEFAULT_SYMBOLS).collect(), ctx).await;
        Ok(())
    }

    async fn on_message(&mut self, symbols: Vec<u16>, ctx: Context) {
        if let Err(error) = self.subscribe(symbols, &ctx).await {
            ctx.disconnect(CloseCode::TRY_AGAIN_LATER, error.to_string()).await;
        }
    }

    /// Waits for room in the client's outbox, and further losses are added up meanwhile: a client that reads slowly gets
    /// few of these; one that reads nothing gets none, and is disconnected after 10 s (1013).
    async fn on_dropped(&mut self, ctx: Context, dropped: Dropped) {
        ctx.unicast(ToClient::Lost(dropped.group, dropped.messages)).await;
    }
}

async fn publish_prices(clients: Clients<ToClient>) {
    let mut prices = vec![(5_000_u32, 0_u32); NAMES.len()]; // in cents, and the number of updates
    let mut random = 1_u64;
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip); // nobody wants the prices of ticks that were missed
    for symbol in (0..NAMES.len()).cycle() {
        if symbol % UPDATES_IN_A_TICK == 0 {
            ticks.tick().await;
        }
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1); // Knuth's MMIX
        let (cents, update) = &mut prices[symbol];
        *cents = (*cents + (random >> 33) as u32 % 41).saturating_sub(20).clamp(100, 1_000_000);
        *update = update.wrapping_add(1);
        let price = ToClient::Price { symbol: symbol as u16, cents: *cents, update: *update };
        if let Err(PublishError::Closed) = clients.to_group(&NAMES[symbol]).publish(&price).await {
            return; // the engine has ended
        }
    }
}

async fn connect(ws: WebSocketUpgrade, State(hub): State<Hub<Prices>>) -> Serve<Prices> {
    ws.serve(&hub, Subscriber::default())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let config = WsHubConfig {
        // By default (`Block`) the publisher waits for its slowest subscriber, and all the others get old prices. Here
        // it waits for nobody: a price that finds a client's outbox full is dropped for this client, who is told.
        policy: BroadcastPolicy::DropMessage { timeout: Duration::ZERO },
        // What waits in the outbox is old when it is read, so little may wait: 64 prices are 0.3 s of 20 symbols, and
        // 13 ms of all 500.
        outbox_frames: 64,
        ..WsHubConfig::default()
    };
    let engine = Engine::start(EngineConfig::default())?;
    let hub = engine.hub::<Prices>(config)?;
    tokio::spawn(publish_prices(hub.clients().clone()));
    let app = Router::new()
        .route("/", get(async || Html(include_str!("page.html"))))
        .route("/ws", any(connect))
        .with_state(hub);
    serve_until_signal(engine, app, port_or(3000)?).await
}
