//! Axum's WebSocket with a broadcast channel of tokio, as in most tutorials.
//!
//! The socket is split, one task sends and one receives, and when either ends the other is aborted. The channel holds
//! 100 messages, as in axum's own chat example. On `Lagged` some tutorials end the loop and others continue; this one
//! continues, so a client that lags by more than the channel's capacity silently loses messages. Typed JSON in and out,
//! encoded once for each message and not for each receiver.

use std::io;

use axum::{
    Router,
    extract::{
        State,
        ws::{Message as Frame, WebSocket, WebSocketUpgrade},
    },
    response::Response,
    routing::any,
};
use futures_util::{SinkExt, StreamExt};
use tokio::sync::broadcast::{self, error::RecvError};

use super::{listener::Listener, runtime::Message};

const CHANNEL_MESSAGES: usize = 100;

/// Serves until it is killed.
pub(crate) async fn serve(listener: Listener) -> io::Result<()> {
    let (channel, _) = broadcast::channel(CHANNEL_MESSAGES);
    let router = Router::new().route("/ws", any(fan_out)).route("/echo", any(echo)).with_state(channel);
    axum::serve(listener, router).await
}

async fn fan_out(upgrade: WebSocketUpgrade, State(channel): State<broadcast::Sender<String>>) -> Response {
    upgrade.on_upgrade(|socket| join(socket, channel))
}

async fn echo(upgrade: WebSocketUpgrade) -> Response {
    upgrade.on_upgrade(repeat)
}

async fn join(socket: WebSocket, channel: broadcast::Sender<String>) {
    let (mut sink, mut stream) = socket.split();
    let mut messages = channel.subscribe();
    let mut sending = tokio::spawn(async move {
        loop {
            match messages.recv().await {
                Ok(text) => {
                    if sink.send(Frame::text(text)).await.is_err() {
                        return;
                    }
                }
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return,
            }
        }
    });
    let mut receiving = tokio::spawn(async move {
        while let Some(Ok(Frame::Text(text))) = stream.next().await {
            let Some(text) = Message::relay(text.as_bytes()) else { return };
            // Fails only without receivers, and this connection is one.
            let _ = channel.send(text);
        }
    });
    tokio::select! {
        _ = &mut sending => receiving.abort(),
        _ = &mut receiving => sending.abort(),
    }
}

async fn repeat(mut socket: WebSocket) {
    while let Some(Ok(Frame::Text(text))) = socket.recv().await {
        let Some(text) = Message::relay(text.as_bytes()) else { return };
        if socket.send(Frame::text(text)).await.is_err() {
            return;
        }
    }
}
