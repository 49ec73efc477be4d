//! How the examples serve, say whether they are ready, and end: first the engine, then Axum, each within a bound.
//!
//! A module that the examples share, and what a program copies from. Does not know hubs. `graceful_shutdown` shows a
//! rolling restart alone. `--port P` and `--host H` (127.0.0.1) say where to listen.
//!
//! SIGTERM, which supervisors send, is a restart: `/ready` answers 503 at once, for `--pause SECONDS` (0) everything
//! else goes on, and then the clients are disconnected with 1012, spread over `--spread SECONDS` (1). Ctrl-C ends
//! without this, with 1001; after SIGTERM it ends the pause.

use std::error::Error;
use std::future::IntoFuture;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use shardcast::backplane::BackplaneState;
use shardcast::{CloseCode, Engine, EngineState, Shutdown};
use tokio::signal::unix::{SignalKind, signal};

/// The value after an argument, if it is given.
pub(crate) fn argument(name: &str) -> Result<Option<String>, Box<dyn Error>> {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    match (arguments.next(), arguments.next()) {
        (None, _) => Ok(None),
        (Some(_), Some(value)) => Ok(Some(value)),
        (Some(_), None) => Err(format!("{name} needs a value").into()),
    }
}

/// The port after `--port`, or `default`. 0 takes any free port.
pub(crate) fn port_or(default: u16) -> Result<u16, Box<dyn Error>> {
    number_or("--port", default)
}

fn number_or(name: &str, default: u16) -> Result<u16, Box<dyn Error>> {
    let Some(value) = argument(name)? else { return Ok(default) };
    Ok(value.parse().map_err(|error| format!("{name} {value}: {error}"))?)
}

/// For a load balancer: may new clients be sent here?
fn ready(engine: &Engine, is_leaving: &AtomicBool) -> StatusCode {
    let is_connected =
        engine.backplane_state().is_none_or(|state| *state.borrow() == BackplaneState::Connected);
    if is_connected && engine.state() == EngineState::Running && !is_leaving.load(Relaxed) {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    }
}

/// Serves until a signal arrives; then ends the engine within 5 s and twice the spread, and Axum within 1 s.
pub(crate) async fn serve_until_signal(engine: Engine, app: Router, port: u16) -> Result<(), Box<dyn Error>> {
    let host = argument("--host")?.unwrap_or_else(|| "127.0.0.1".to_owned());
    let pause = Duration::from_secs(number_or("--pause", 0)?.into());
    let spread = Duration::from_secs(number_or("--spread", 1)?.into());
    let is_leaving = Arc::new(AtomicBool::new(false));
    let app = app.route("/ready", {
        let (engine, is_leaving) = (engine.clone(), is_leaving.clone());
        get(async move || ready(&engine, &is_leaving))
    });

    let listener = shardcast::listen((host, port)).await?;
    // Before the line that says that the server is ready: a signal after it must not end the process at once.
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    println!("listening on http://{}", listener.local_addr()?);
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let serving = axum::serve(listener, app).with_graceful_shutdown(async {
        let _ = ended.await; // never sent, only dropped
    });
    let mut serving = tokio::spawn(serving.into_future());
    let within = Duration::from_secs(5);
    let shutdown = tokio::select! {
        served = &mut serving => return Ok(served??),
        _ = interrupt.recv() => Shutdown::within(within),
        _ = terminate.recv() => {
            is_leaving.store(true, Relaxed);
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = interrupt.recv() => {}
            }
            // The closes use at most half of the time.
            Shutdown { within: within + 2 * spread, close_window: spread, code: CloseCode::SERVICE_RESTART }
        }
    };
    // First the engine, because Axum does not know upgraded connections: clients get what was published and a Close
    // frame, new clients a 503. Then Axum, which would wait forever for a request that was sent only in part.
    let report = engine.shutdown_with(shutdown).await?;
    println!("flushed {}, cut off {}, left over {}", report.flushed, report.cut_off, report.left_over);
    drop(end);
    let _ = tokio::time::timeout(Duration::from_secs(1), serving).await;
    Ok(())
}
