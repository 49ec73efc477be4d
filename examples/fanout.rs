//! The server that every measurement runs: four hubs on one engine, nothing else.
//!
//! `fanout --port P --shards N --no-pin --policy block`, all optional (port 9001, one
//! shard for each CPU, pinned). Prints `ready` when it listens and logs nothing.
//!
//! - `/ws`: `{"t":u64,"p":string}`, decoded, encoded again and broadcast to all, the sender included
//! - `/echo`: the same, to the sender only
//! - `/group/{name}`: joins the group on connect; what it sends goes to the group
//! - `/raw`: any message back as it came, text as text and binary as binary

#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::error::Error;
use std::process::ExitCode;

use axum::Router;
use axum::extract::{Path, State};
use axum::response::Response;
use axum::routing::any;
use serde::{Deserialize, Serialize};
use shardcast::{
    BroadcastPolicy, Engine, EngineConfig, Hub, JsonCodec, MessageContext, RawCodec, RawMessage,
    WebSocketUpgrade, WsHub, WsHubConfig,
};

#[derive(Serialize, Deserialize)]
struct Tick {
    t: u64,
    p: String,
}

type Context = MessageContext<Tick, JsonCodec>;

struct All;

impl WsHub for All {
    type Codec = JsonCodec;
    type InMessage = Tick;
    type OutMessage = Tick;

    async fn on_message(&self, tick: Tick, ctx: Context) {
        ctx.broadcast(tick).await;
    }
}

struct Echo;

impl WsHub for Echo {
    type Codec = JsonCodec;
    type InMessage = Tick;
    type OutMessage = Tick;

    async fn on_message(&self, tick: Tick, ctx: Context) {
        ctx.unicast(tick).await;
    }
}

struct Group {
    name: String,
}

impl WsHub for Group {
    type Codec = JsonCodec;
    type InMessage = Tick;
    type OutMessage = Tick;

    async fn on_open(&self, ctx: Context) {
        ctx.add_to_group(&self.name).await;
    }

    async fn on_message(&self, tick: Tick, ctx: Context) {
        ctx.broadcast_group(&self.name, tick).await;
    }
}

struct Raw;

impl WsHub for Raw {
    type Codec = RawCodec;
    type InMessage = RawMessage;
    type OutMessage = RawMessage;

    async fn on_message(&self, message: RawMessage, ctx: MessageContext<RawMessage, RawCodec>) {
        ctx.unicast(message).await;
    }
}

#[derive(Clone)]
struct Hubs {
    all: Hub<All>,
    echo: Hub<Echo>,
    group: Hub<Group>,
    raw: Hub<Raw>,
}

struct Options {
    port: u16,
    engine: EngineConfig,
    hub: WsHubConfig,
}

const USAGE: &str = "usage: fanout [--port P] [--shards N] [--no-pin] [--policy block]";

fn options() -> Result<Options, Box<dyn Error>> {
    let mut options = Options { port: 9001, engine: EngineConfig::default(), hub: WsHubConfig::default() };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(USAGE);
        match argument.as_str() {
            "--port" => options.port = value()?.parse().map_err(|_| USAGE)?,
            "--shards" => options.engine.shards = Some(value()?.parse().map_err(|_| USAGE)?),
            "--no-pin" => options.engine.pin = false,
            "--policy" => options.hub.policy = policy(&value()?)?,
            _ => return Err(USAGE.into()),
        }
    }
    Ok(options)
}

fn policy(name: &str) -> Result<BroadcastPolicy, Box<dyn Error>> {
    match name {
        "block" => Ok(BroadcastPolicy::Block),
        other => Err(format!("`{other}` is no policy of this version; {USAGE}").into()),
    }
}

// One thread is enough: it only answers handshakes.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match serve().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fanout: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve() -> Result<(), Box<dyn Error>> {
    let Options { port, engine, hub } = options()?;
    let engine = Engine::start(engine)?;
    let hubs = Hubs {
        all: engine.hub(hub.clone())?,
        echo: engine.hub(hub.clone())?,
        group: engine.hub(hub.clone())?,
        raw: engine.hub(WsHubConfig { max_message_bytes: 16 << 20, max_fragments: 1 << 20, ..hub })?,
    };
    let all = async |ws: WebSocketUpgrade, State(hubs): State<Hubs>| -> Response { ws.serve(&hubs.all, All) };
    let echo =
        async |ws: WebSocketUpgrade, State(hubs): State<Hubs>| -> Response { ws.serve(&hubs.echo, Echo) };
    let raw = async |ws: WebSocketUpgrade, State(hubs): State<Hubs>| -> Response { ws.serve(&hubs.raw, Raw) };
    let group = async |ws: WebSocketUpgrade,
                       Path(name): Path<String>,
                       State(hubs): State<Hubs>|
           -> Response { ws.serve(&hubs.group, Group { name }) };
    let app = Router::new()
        .route("/ws", any(all))
        .route("/echo", any(echo))
        .route("/group/{name}", any(group))
        .route("/raw", any(raw))
        .with_state(hubs);
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await?;
    println!("ready");
    axum::serve(listener, app).await?;
    Ok(())
}
