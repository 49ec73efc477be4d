//! The peer: the crate axum-signal 0.1.3, used the way its README shows.
//!
//! Its default configuration, typed JSON in and out, one hub type per route because its registry has one list of
//! clients per type. The only help it gets is TCP_NODELAY, without which it would measure Nagle's algorithm.

use std::{io, net::Ipv4Addr};

use axum::{
    Router,
    extract::ws::{WebSocket, WebSocketUpgrade},
    response::Response,
    routing::any,
    serve::ListenerExt,
};
use axum_signal::{
    ConnectionRequest, DisconnectRequest, JsonCodec, MessageContext, WsHub, WsHubConfig, serve_hub,
};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;

use crate::cpu::{self, PinError};

/// What the peer is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[arg(long)]
    port: u16,
    /// Worker threads of the tokio runtime.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// The core to run on, for all threads.
    #[arg(long)]
    cpu: Option<usize>,
}

/// Why the peer did not serve.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PeerError {
    #[error(transparent)]
    Pin(#[from] PinError),
    #[error("axum-signal could not serve")]
    Io(#[from] io::Error),
    #[error("the accepting task failed")]
    Join(#[from] tokio::task::JoinError),
}

#[derive(Debug, Deserialize, Serialize)]
struct Message {
    t: u64,
    p: String,
}

struct FanOut;
struct Echo;

impl WsHub for FanOut {
    type Codec = JsonCodec;
    type InMessage = Message;
    type OutMessage = Message;

    async fn on_connect(&self, _: ConnectionRequest) {}
    async fn on_disconnect(&self, _: DisconnectRequest) {}

    async fn on_message(&self, message: Message, context: MessageContext<Message, JsonCodec>) {
        context.broadcast(message).await;
    }
}

impl WsHub for Echo {
    type Codec = JsonCodec;
    type InMessage = Message;
    type OutMessage = Message;

    async fn on_connect(&self, _: ConnectionRequest) {}
    async fn on_disconnect(&self, _: DisconnectRequest) {}

    async fn on_message(&self, message: Message, context: MessageContext<Message, JsonCodec>) {
        context.unicast(message).await;
    }
}

/// Serves until it is killed.
pub(crate) fn run(options: &Options) -> Result<(), PeerError> {
    cpu::pin(options.cpu)?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(options.threads).enable_all().build()?;
    let port = options.port;
    // Spawned, because block_on would run the accept loop on one more thread than was asked for.
    runtime.block_on(async move { tokio::spawn(serve(port)).await })??;
    Ok(())
}

async fn serve(port: u16) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await?.tap_io(|stream| {
        // A socket that refuses is about to fail anyway, and its own task will see it.
        let _ = stream.set_nodelay(true);
    });
    let router = Router::new().route("/ws", any(fan_out)).route("/echo", any(echo));
    println!("{}", super::READY);
    axum::serve(listener, router).await
}

async fn fan_out(upgrade: WebSocketUpgrade) -> Response {
    upgrade.on_upgrade(|socket| drive(socket, FanOut))
}

async fn echo(upgrade: WebSocketUpgrade) -> Response {
    upgrade.on_upgrade(|socket| drive(socket, Echo))
}

async fn drive<H: WsHub>(socket: WebSocket, hub: H) {
    serve_hub(socket, hub, &WsHubConfig::default()).await;
}
