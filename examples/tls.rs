//! `wss://` and HTTP/2 in the same process, without a proxy.
//!
//! `cargo run --release --example tls --features tls`, then open the address that it prints. `--cert FILE --key FILE`
//! take a certificate chain and its key (PEM); without them a certificate for `localhost` is made that signs itself, and
//! printed, so that a client can be told to trust it: `curl --cacert`. `--port P` changes the port.
//!
//! A shard owns plain sockets; what comes by TLS or HTTP/2 reaches it by a task and a socket pair for each connection.
//! The guide says what that costs, and when a proxy that terminates TLS is the better place.

#![allow(clippy::print_stdout)]

use std::error::Error;
use std::future::{Ready, ready};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::Version;
use axum::response::Html;
use axum::routing::{any, get};
use axum_server::accept::Accept;
use axum_server::tls_rustls::{RustlsAcceptor, RustlsConfig};
use shardcast::{
    Engine, EngineConfig, Hub, HubContext, RawCodec, Refusal, Serve, WebSocketUpgrade, WsHub, WsHubConfig,
};
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};

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

/// The options of a socket that TLS is put on: the engine cannot set them, since it never sees this socket. Without them
/// the kernel takes up to 4 MB for a client that has stopped reading, before any policy notices.
#[derive(Clone)]
struct PrepareTcp;

impl<S> Accept<TcpStream, S> for PrepareTcp {
    type Stream = TcpStream;
    type Service = S;
    type Future = Ready<io::Result<(TcpStream, S)>>;

    fn accept(&self, socket: TcpStream, service: S) -> Self::Future {
        ready(shardcast::prepare_tcp(&socket).map(|()| (socket, service)))
    }
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

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let port = argument("--port").map_or(Ok(3443), |port| port.parse::<u16>())?;
    // Other crates of a program may have brought a second one, so that rustls could not choose.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (certificate, key) = certificate()?;
    let config = RustlsConfig::from_pem(certificate, key).await?; // offers h2 and http/1.1
    let engine = Engine::start(EngineConfig::default())?;
    let hub = engine.hub(WsHubConfig::default())?;
    // `any`, because the handshake of HTTP/2 is a CONNECT.
    let app = Router::new().route("/", get(async || Html(PAGE))).route("/ws", any(connect)).with_state(hub);

    let listener = TcpListener::bind(("127.0.0.1", port))?;
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    println!("listening on https://localhost:{}", listener.local_addr()?.port());
    let handle = axum_server::Handle::new();
    let mut server = axum_server::from_tcp(listener)?
        .acceptor(RustlsAcceptor::new(config).acceptor(PrepareTcp))
        .handle(handle.clone());
    // Without it browsers open a second connection, by HTTP/1.1, for each WebSocket (RFC 8441).
    server.http_builder().http2().enable_connect_protocol();
    // With connect info, so that the limits for each address hold behind TLS, too.
    let app = app.into_make_service_with_connect_info::<SocketAddr>();
    let mut serving = tokio::spawn(server.serve(app));
    tokio::select! {
        served = &mut serving => return Ok(served??),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    // First the engine, because the HTTP server does not know upgraded connections; then the server, within a bound.
    let report = engine.shutdown(Duration::from_secs(5)).await;
    println!("flushed {}, cut off {}, left over {}", report.flushed, report.cut_off, report.left_over);
    handle.graceful_shutdown(Some(Duration::from_secs(1)));
    Ok(serving.await??)
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
