//! How the examples serve and end: on SIGTERM and Ctrl-C first the engine, then Axum, each within a bound.
//!
//! A module that the examples share, and what a program copies from. Does not know hubs. `graceful_shutdown` shows the
//! same with what a load balancer needs.

use std::error::Error;
use std::future::IntoFuture;
use std::time::Duration;

use axum::Router;
use shardcast::Engine;
use tokio::signal::unix::{SignalKind, signal};

/// The port after `--port`, or `default`. 0 takes any free port.
pub(crate) fn port_or(default: u16) -> Result<u16, Box<dyn Error>> {
    let port = std::env::args().skip_while(|argument| argument != "--port").nth(1);
    Ok(port.map_or(Ok(default), |port| port.parse())?)
}

/// Serves on 127.0.0.1 until a signal arrives; then ends the engine within 5 s and Axum within 1 s.
pub(crate) async fn serve_until_signal(engine: Engine, app: Router, port: u16) -> Result<(), Box<dyn Error>> {
    let listener = shardcast::listen(("127.0.0.1", port)).await?;
    // Before the line that says that the server is ready: a signal after it must not end the process at once.
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    println!("listening on http://{}", listener.local_addr()?);
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let serving = axum::serve(listener, app).with_graceful_shutdown(async {
        let _ = ended.await; // never sent, only dropped
    });
    let mut serving = tokio::spawn(serving.into_future());
    tokio::select! {
        served = &mut serving => return Ok(served??),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    // First the engine, because Axum does not know upgraded connections: clients get what was published and a Close
    // frame (1001), new clients a 503. Then Axum, which would wait forever for a request that was sent only in part.
    let report = engine.shutdown(Duration::from_secs(5)).await;
    println!("flushed {}, cut off {}, left over {}", report.flushed, report.cut_off, report.left_over);
    drop(end);
    let _ = tokio::time::timeout(Duration::from_secs(1), serving).await;
    Ok(())
}
