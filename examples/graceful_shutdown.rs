//! A rolling restart that no client notices as an error: readiness first, then the clients, then HTTP.
//!
//! `cargo run --release --example graceful_shutdown`, then open some connections to `ws://127.0.0.1:3000/ws` and send
//! the process a SIGTERM (Ctrl-C does the same). In this order:
//!
//! 1. `/readyz` answers 503, so that the load balancer sends no more clients. Everything else goes on.
//! 2. `--pause SECONDS` (default 5): as long as the load balancer takes to notice, its interval of checks times their
//!    number. New clients are still served.
//! 3. The engine ends: upgrades get a 503, messages that were published are delivered, and the clients are closed with
//!    1012 (service restart), spread over `--spread SECONDS` (default 5), so that they do not all reconnect at once.
//! 4. Axum ends, within a second. The report is printed, and the process ends with 0.
//!
//! A second signal ends the process at once, with 1. Give it the time before it is killed: pause + 2 × spread + 6 s
//! (`terminationGracePeriodSeconds`, `TimeoutStopSec`). `/healthz` answers 200 as long as the engine works, also while
//! it ends. `--port P` changes the port.

#![allow(clippy::print_stdout)]

use std::error::Error;
use std::future::IntoFuture;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{any, get};
use shardcast::{
    CloseCode, Engine, EngineConfig, EngineState, Hub, HubContext, RawCodec, Serve, Shutdown,
    WebSocketUpgrade, WsHub, WsHubConfig,
};
use tokio::signal::unix::{Signal, SignalKind, signal};

struct Echo;

impl WsHub for Echo {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;

    async fn on_message(&self, text: String, ctx: HubContext<Self>) {
        ctx.unicast(text).await;
    }
}

#[derive(Clone)]
struct App {
    engine: Engine,
    hub: Hub<Echo>,
    /// Set by the first signal: the engine itself is still running during the pause.
    is_leaving: Arc<AtomicBool>,
}

async fn connect(ws: WebSocketUpgrade, State(app): State<App>) -> Serve<Echo> {
    ws.serve(&app.hub, Echo)
}

/// For the load balancer: may new clients be sent here?
async fn ready(State(app): State<App>) -> StatusCode {
    match app.engine.state() {
        EngineState::Running if !app.is_leaving.load(Relaxed) => StatusCode::OK,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}

/// For the supervisor: must the process be restarted? Not because it ends as it should.
async fn healthy(State(app): State<App>) -> StatusCode {
    match app.engine.state() {
        EngineState::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        _ => StatusCode::OK,
    }
}

/// SIGTERM, which supervisors send, or SIGINT (Ctrl-C).
struct Signals(Signal, Signal);

impl Signals {
    async fn next(&mut self) {
        tokio::select! {
            _ = self.0.recv() => {}
            _ = self.1.recv() => {}
        }
    }
}

/// The seconds after an argument, or `default`.
fn seconds(name: &str, default: u16) -> Result<Duration, Box<dyn Error>> {
    let value = std::env::args().skip_while(|argument| argument != name).nth(1);
    let seconds = value.map_or(Ok(default), |value| value.parse());
    let seconds = seconds.map_err(|error| format!("{name} takes whole seconds: {error}"))?;
    Ok(Duration::from_secs(seconds.into()))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let port = std::env::args().skip_while(|argument| argument != "--port").nth(1);
    let port: u16 = port.map_or(Ok(3000), |port| port.parse())?;
    let (pause, spread) = (seconds("--pause", 5)?, seconds("--spread", 5)?);
    let engine = Engine::start(EngineConfig::default())?;
    let hub = engine.hub(WsHubConfig::default())?;
    let app = App { engine: engine.clone(), hub, is_leaving: Arc::default() };
    let is_leaving = app.is_leaving.clone();
    let app = Router::new()
        .route("/ws", any(connect))
        .route("/readyz", get(ready))
        .route("/healthz", get(healthy))
        .with_state(app);
    let listener = shardcast::listen(("127.0.0.1", port)).await?;
    let mut signals = Signals(signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    println!("listening on http://{}", listener.local_addr()?);

    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let serving = axum::serve(listener, app).with_graceful_shutdown(async {
        let _ = ended.await; // never sent, only dropped
    });
    let mut serving = tokio::spawn(serving.into_future());
    tokio::select! {
        served = &mut serving => return Ok(served??),
        _ = signals.next() => {}
    }
    let leave = async {
        is_leaving.store(true, Relaxed);
        println!("not ready any more; the clients are disconnected in {} s", pause.as_secs());
        tokio::time::sleep(pause).await;
        // The closes use at most half of the time, so that what the last ones have to say fits in, too.
        let within = 2 * spread + Duration::from_secs(5);
        let shutdown = Shutdown { within, close_window: spread, code: CloseCode::SERVICE_RESTART };
        let report = engine.shutdown_with(shutdown).await?;
        println!("flushed {}, cut off {}, left over {}", report.flushed, report.cut_off, report.left_over);
        drop(end);
        // It would wait forever for a request that was sent only in part.
        let _ = tokio::time::timeout(Duration::from_secs(1), serving).await;
        Ok(())
    };
    tokio::select! {
        left = leave => left,
        _ = signals.next() => {
            println!("a second signal: ended at once");
            std::process::exit(1) // without the engine's drop, which would wait for its clients
        }
    }
}
