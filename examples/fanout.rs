//! The server for all measurements: four hubs and a socket on one engine.
//!
//! `fanout --port P --shards N --no-pin --io-uring --coalesce MILLISECONDS --policy block`, all optional (port 9001, one shard for
//! each CPU, pinned). Prints `ready` when it listens and logs nothing. On SIGTERM it shuts down gracefully: every
//! accepted message is delivered, clients get a Close frame (1001), and it prints a report.
//! `--rate-limit N` limits each client to N messages a second, and delays what exceeds that; `--over-limit drop` or
//! `close` does that instead.
//! `--trim` returns free memory to the system after many handshakes (`EngineConfig::trim_heap`).
//! `--outbox N` sets how many messages each client's outbox holds.
//! `--tls FILE`, with the feature `tls`, serves over TLS, with the certificate and the private key in this PEM file; `--bridge`
//! hides the TLS streams from the shards, so that they are bridged.
//! `--backplane URL`, with the feature `backplane`, makes it one of several nodes: a broadcast reaches the clients of all that
//! have the same broker, `nats://host:port` or `redis://host:port`, with `?storage=file` if a restart of the broker must lose
//! nothing.
//! Policies: `block`, `drop-message:100ms`, `drop-connection:100ms:5`, `drop-on-high-rtt:300ms:8`.
//!
//! - `/ws`: `{"t":u64,"p":string}`, decoded, encoded again and broadcast to all, including the sender
//! - `/echo`: the same, to the sender only
//! - `/group/{name}`: joins the group on connect; each message is broadcast to the group
//! - `/raw`: each message is returned unchanged, text as text and binary as binary
//! - `/socket`: the same, by a task with a socket of its own (`shardcast::ws`)

#![allow(clippy::print_stdout, clippy::print_stderr)]

mod nodes;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, State};
use axum::routing::any;
use axum::serve::Listener;
use serde::{Deserialize, Serialize};
use shardcast::{
    BroadcastPolicy, Engine, EngineConfig, Hub, HubContext, JsonCodec, OverLimit, Rate, RawCodec, RawMessage,
    Refusal, WebSocketUpgrade, WsHub, WsHubConfig, ws,
};
use tokio::signal::unix::{SignalKind, signal};

#[derive(Serialize, Deserialize)]
struct Tick {
    t: u64,
    p: String,
}

struct All;

impl WsHub for All {
    type Codec = JsonCodec;
    type InMessage = Tick;
    type OutMessage = Tick;

    async fn on_message(&self, tick: Tick, ctx: HubContext<Self>) {
        ctx.broadcast(tick).await;
    }
}

struct Echo;

impl WsHub for Echo {
    type Codec = JsonCodec;
    type InMessage = Tick;
    type OutMessage = Tick;

    async fn on_message(&self, tick: Tick, ctx: HubContext<Self>) {
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

    async fn on_connected(&self, ctx: HubContext<Self>) -> Result<(), Refusal> {
        ctx.add_to_group(&self.name).await;
        Ok(())
    }

    async fn on_message(&self, tick: Tick, ctx: HubContext<Self>) {
        ctx.broadcast_group(&self.name, tick).await;
    }
}

struct Raw;

impl WsHub for Raw {
    type Codec = RawCodec;
    type InMessage = RawMessage;
    type OutMessage = RawMessage;

    async fn on_message(&self, message: RawMessage, ctx: HubContext<Self>) {
        ctx.unicast(message).await;
    }
}

async fn return_all(mut socket: ws::WebSocket) {
    while let Some(Ok(message)) = socket.recv().await {
        let is_message = matches!(message, ws::Message::Text(_) | ws::Message::Binary(_));
        if is_message && socket.send(message).await.is_err() {
            return;
        }
    }
}

#[derive(Clone)]
struct Hubs {
    engine: Engine,
    all: Hub<All>,
    echo: Hub<Echo>,
    group: Hub<Group>,
    raw: Hub<Raw>,
}

struct Options {
    port: u16,
    /// The certificate and its key.
    tls: Option<PathBuf>,
    bridge: bool,
    backplane: Option<String>,
    engine: EngineConfig,
    hub: WsHubConfig,
}

const USAGE: &str = "usage: fanout [--port P] [--shards N] [--no-pin] [--trim] [--io-uring] [--coalesce MILLISECONDS] [--policy POLICY] \
     [--outbox N] [--rate-limit N] [--over-limit delay|drop|close] [--tls FILE [--bridge]] [--backplane URL], where POLICY is block, drop-message:100ms, drop-connection:100ms:5 or drop-on-high-rtt:300ms:8";

/// The server's task.
type Serving = tokio::task::JoinHandle<std::io::Result<()>>;

/// Time after SIGTERM to deliver all accepted messages.
const SHUTDOWN_WITHIN: Duration = Duration::from_secs(20);
/// Time for HTTP responses after that.
const LAST_RESPONSES_WITHIN: Duration = Duration::from_secs(1);

fn options() -> Result<Options, Box<dyn Error>> {
    let mut options = Options {
        port: 9001,
        tls: None,
        bridge: false,
        backplane: None,
        engine: EngineConfig::default(),
        hub: WsHubConfig::default(),
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(USAGE);
        match argument.as_str() {
            "--port" => options.port = value()?.parse().map_err(|_| USAGE)?,
            "--shards" => options.engine.shards = Some(value()?.parse().map_err(|_| USAGE)?),
            "--no-pin" => options.engine.pin = false,
            "--trim" => options.engine.trim_heap = true,
            "--io-uring" => options.engine.io_uring = true,
            "--coalesce" => {
                options.engine.coalesce = Duration::from_millis(value()?.parse().map_err(|_| USAGE)?);
            }
            "--policy" => options.hub.policy = policy(&value()?)?,
            "--outbox" => options.hub.outbox_frames = value()?.parse().map_err(|_| USAGE)?,
            "--rate-limit" => {
                options.hub.rate_limit.messages =
                    Some(Rate::per_second(value()?.parse().map_err(|_| USAGE)?));
            }
            "--over-limit" => {
                options.hub.rate_limit.over_limit = match value()?.as_str() {
                    "delay" => OverLimit::Delay,
                    "drop" => OverLimit::Drop,
                    "close" => OverLimit::Close,
                    _ => return Err(USAGE.into()),
                };
            }
            "--tls" => options.tls = Some(value()?.into()),
            "--bridge" => options.bridge = true,
            "--backplane" => options.backplane = Some(value()?),
            _ => return Err(USAGE.into()),
        }
    }
    if options.bridge && options.tls.is_none() {
        return Err(USAGE.into());
    }
    Ok(options)
}

/// `block`, `drop-message:100ms`, `drop-connection:100ms:5`, `drop-on-high-rtt:300ms:8`.
fn policy(text: &str) -> Result<BroadcastPolicy, Box<dyn Error>> {
    let parts: Vec<&str> = text.split(':').collect();
    let millis = |part: &str| -> Result<Duration, Box<dyn Error>> {
        let malformed = || format!("`{part}` is not a time such as 100ms");
        let number = part.strip_suffix("ms").ok_or_else(malformed)?;
        Ok(Duration::from_millis(number.parse().map_err(|_| malformed())?))
    };
    Ok(match parts[..] {
        ["block"] => BroadcastPolicy::Block,
        ["drop-message", timeout] => BroadcastPolicy::DropMessage { timeout: millis(timeout)? },
        ["drop-connection", timeout, drops] => BroadcastPolicy::DropConnection {
            timeout: millis(timeout)?,
            max_drops: drops.parse().map_err(|_| format!("`{drops}` is not a number of drops"))?,
        },
        ["drop-on-high-rtt", max_rtt, samples] => BroadcastPolicy::DropOnHighRtt {
            max_rtt: millis(max_rtt)?,
            rtt_samples: samples.parse().map_err(|_| format!("`{samples}` is not a number of samples"))?,
        },
        _ => return Err(format!("`{text}` is not a policy; {USAGE}").into()),
    })
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
    let Options { port, tls, bridge, backplane, engine, hub } = options()?;
    let engine = Engine::start(engine)?;
    if let Some(url) = backplane {
        nodes::join(&engine, &url)?;
    }
    let hubs = Hubs {
        engine: engine.clone(),
        all: engine.hub(hub.clone())?,
        echo: engine.hub(hub.clone())?,
        group: engine.hub(hub.clone())?,
        raw: engine.hub(WsHubConfig { max_message_bytes: 16 << 20, max_fragments: 1 << 20, ..hub })?,
    };
    let all = async |ws: WebSocketUpgrade, State(hubs): State<Hubs>| ws.serve(&hubs.all, All);
    let echo = async |ws: WebSocketUpgrade, State(hubs): State<Hubs>| ws.serve(&hubs.echo, Echo);
    let raw = async |ws: WebSocketUpgrade, State(hubs): State<Hubs>| ws.serve(&hubs.raw, Raw);
    let group = async |ws: WebSocketUpgrade, Path(name): Path<String>, State(hubs): State<Hubs>| {
        ws.serve(&hubs.group, Group { name })
    };
    let socket = async |ws: ws::WebSocketUpgrade, State(hubs): State<Hubs>| {
        ws.engine(&hubs.engine).on_upgrade(return_all)
    };
    let app = Router::new()
        .route("/ws", any(all))
        .route("/echo", any(echo))
        .route("/group/{name}", any(group))
        .route("/raw", any(raw))
        .route("/socket", any(socket))
        .with_state(hubs);
    let listener = shardcast::listen(("127.0.0.1", port)).await?;
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let ended = async {
        let _ = ended.await; // never sent, only dropped
    };
    let mut serving = match tls {
        None => start(listener, app, ended),
        Some(file) => start_tls(listener, &file, bridge, app, ended)?,
    };
    println!("ready");
    let mut terminated = signal(SignalKind::terminate())?;
    tokio::select! {
        served = &mut serving => return Ok(served??),
        _ = terminated.recv() => {}
    }
    let report = engine.shutdown(SHUTDOWN_WITHIN).await;
    println!("flushed {}, cut off {}, left over {}", report.flushed, report.cut_off, report.left_over);
    // Requests refused during the shutdown get their response. A request that was sent only in part is not waited for.
    drop(end);
    let _ = tokio::time::timeout(LAST_RESPONSES_WITHIN, serving).await;
    Ok(())
}

/// Serves until `ended`.
fn start<L>(listener: L, app: Router, ended: impl Future<Output = ()> + Send + 'static) -> Serving
where
    L: Listener<Addr: std::fmt::Debug>,
{
    tokio::spawn(axum::serve(listener, app).with_graceful_shutdown(ended).into_future())
}

#[cfg(not(feature = "tls"))]
fn start_tls(
    _: tokio::net::TcpListener,
    _: &std::path::Path,
    _: bool,
    _: Router,
    _: impl Future<Output = ()> + Send + 'static,
) -> Result<Serving, Box<dyn Error>> {
    Err("--tls needs a build with the feature tls: cargo build --release -p examples --example fanout --features tls".into())
}

#[cfg(feature = "tls")]
fn start_tls(
    listener: tokio::net::TcpListener,
    file: &std::path::Path,
    bridge: bool,
    app: Router,
    ended: impl Future<Output = ()> + Send + 'static,
) -> Result<Serving, Box<dyn Error>> {
    let pem = std::fs::read(file)?;
    let config = shardcast::tls::TlsConfig::from_pem(&pem, &pem)?;
    let listener = shardcast::tls::TlsListener::new(listener, config);
    Ok(if bridge { start(bridged::Bridged(listener), app, ended) } else { start(listener, app, ended) })
}

/// TLS streams of a type that no shard can own.
#[cfg(feature = "tls")]
mod bridged {
    use axum::serve::Listener;
    use shardcast::tls::TlsListener;
    use tokio::io::{Join, ReadHalf, WriteHalf, join, split};

    pub(super) struct Bridged(pub(super) TlsListener);

    type Stream = <TlsListener as Listener>::Io;

    impl Listener for Bridged {
        type Io = Join<ReadHalf<Stream>, WriteHalf<Stream>>;
        type Addr = <TlsListener as Listener>::Addr;

        async fn accept(&mut self) -> (Self::Io, Self::Addr) {
            let (stream, address) = self.0.accept().await;
            let (reader, writer) = split(stream);
            (join(reader, writer), address)
        }

        fn local_addr(&self) -> std::io::Result<Self::Addr> {
            self.0.local_addr()
        }
    }
}
