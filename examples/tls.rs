//! `wss://` and HTTP/2 in the same process, without a proxy.
//!
//! `cargo run --release --example tls --features tls`, then open the address that it prints. `--cert FILE --key FILE`
//! take a certificate chain and its key (PEM); SIGHUP reads the files again, for certificates that are renewed. Without
//! them a certificate for `localhost` is made that signs itself, and printed, so that a client can be told to trust it:
//! `curl --cacert`. `--port P` changes the port.

#![allow(clippy::print_stdout)]

use std::error::Error;
use std::future::IntoFuture;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::Version;
use axum::response::Html;
use axum::routing::{any, get};
use axum::serve::Listener as _;
use shardcast::tls::{PeerAddr, TlsConfig, TlsListener};
use shardcast::{
    Engine, EngineConfig, Hub, HubContext, RawCodec, Refusal, Serve, WebSocketUpgrade, WsHub, WsHubConfig,
};
use tokio::signal::unix::{Signal, SignalKind, signal};

struct Echo {
    version: Version,
}

impl WsHub for Echo {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;

    async fn on_connected(&self, ctx: HubContext<Self>) -> Result<(), Refusal> {
        ctx.unicast(format!("connected by {:?}", self.version)).await;
        Ok(())
    }

    async fn on_message(&self, text: String, ctx: HubContext<Self>) {
        ctx.unicast(text).await;
    }
}

async fn connect(version: Version, ws: WebSocketUpgrade, State(hub): State<Hub<Echo>>) -> Serve<Echo> {
    ws.serve(&hub, Echo { version })
}

fn argument(name: &str) -> Option<String> {
    std::env::args().skip_while(|argument| argument != name).nth(1)
}

/// The certificate chain and its key, as PEM.
fn certificate() -> Result<(Vec<u8>, Vec<u8>), Box<dyn Error>> {
    let read = |path: String| std::fs::read(&path).map_err(|error| format!("{path}: {error}"));
    match (argument("--cert"), argument("--key")) {
        (Some(certificate), Some(key)) => Ok((read(certificate)?, read(key)?)),
        (None, None) => {
            let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
            let made = rcgen::generate_simple_self_signed(names)?;
            println!("{}", made.cert.pem());
            Ok((made.cert.pem().into(), made.signing_key.serialize_pem().into()))
        }
        _ => Err("--cert and --key belong together: give both, or none".into()),
    }
}

/// Reads the files again whenever SIGHUP arrives. Open connections go on.
async fn renew(config: TlsConfig, mut hang_up: Signal) {
    while hang_up.recv().await.is_some() {
        let renewed = certificate().and_then(|(chain, key)| Ok(config.replace_pem(&chain, &key)?));
        match renewed {
            Ok(()) => println!("new certificates are in use"),
            Err(error) => println!("the old certificates remain in use: {error}"),
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let port = argument("--port").map_or(Ok(3443), |port| port.parse::<u16>())?;
    let (chain, key) = certificate()?;
    let config = TlsConfig::from_pem(&chain, &key)?; // offers h2 and http/1.1
    let engine = Engine::start(EngineConfig::default())?;
    let hub = engine.hub(WsHubConfig::default())?;
    // `any`, because the handshake of HTTP/2 is a CONNECT.
    let app = Router::new().route("/", get(async || Html(PAGE))).route("/ws", any(connect)).with_state(hub);

    let listener = TlsListener::bind(("127.0.0.1", port), config.clone()).await?;
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    println!("listening on https://localhost:{}", listener.local_addr()?.port());
    tokio::spawn(renew(config, signal(SignalKind::hangup())?));
    // With connect info, so that limits for each address hold before the upgrade.
    let app = app.into_make_service_with_connect_info::<PeerAddr>();
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
    // First the engine, because Axum does not know upgraded connections; then Axum, within a bound.
    let report = engine.shutdown(Duration::from_secs(5)).await;
    println!("flushed {}, cut off {}, left over {}", report.flushed, report.cut_off, report.left_over);
    drop(end);
    let _ = tokio::time::timeout(Duration::from_secs(1), serving).await;
    Ok(())
}

const PAGE: &str = r#"<!doctype html><meta charset="utf-8"><title>tls</title>
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; connect-src 'self'">
<form><input name="text" placeholder="say something" autofocus></form><pre></pre>
<script>
  const socket = new WebSocket(`wss://${location.host}/ws`);
  const show = (line) => document.querySelector("pre").append(line + "\n");
  socket.onmessage = ({ data }) => show(data);
  socket.onclose = ({ code }) => show(`disconnected (${code})`);
  document.querySelector("form").onsubmit = ({ target }) => {
    socket.send(target.text.value);
    target.reset();
    return false;
  };
</script>"#;
