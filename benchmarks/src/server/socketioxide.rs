//! The peer: the crate socketioxide on axum, with its own broadcast.
//!
//! Its defaults, but without long polling, which nobody here uses. A message is an event named `message` with typed
//! JSON; `emit` on the whole namespace includes the sender. One service per route. Its buffer holds 128 packets per
//! connection, and an event that finds it full is lost: `emit` says so to the handler, which has nobody to tell.

use std::io;

use axum::Router;
use socketioxide::{
    SocketIo, TransportType,
    extract::{Data, SocketRef},
    layer::SocketIoLayer,
};
use tokio::net::TcpListener;

use super::peer::{self, Message};

const EVENT: &str = "message";

/// Serves until it is killed.
pub(crate) async fn serve(listener: TcpListener) -> io::Result<()> {
    let (fan_out, everybody) = service("/ws");
    everybody.ns("/", async |socket: SocketRef| {
        socket.on(EVENT, async |everybody: SocketIo, Data::<Message>(message)| {
            let _ = everybody.emit(EVENT, &message).await;
        });
    });
    let (echo, one) = service("/echo");
    one.ns("/", async |socket: SocketRef| {
        socket.on(EVENT, async |socket: SocketRef, Data::<Message>(message)| {
            let _ = socket.emit(EVENT, &message);
        });
    });
    let router = Router::new().layer(fan_out).layer(echo);
    axum::serve(peer::without_delay(listener), router).await
}

fn service(path: &'static str) -> (SocketIoLayer, SocketIo) {
    SocketIo::builder().req_path(path).transports([TransportType::Websocket]).build_layer()
}
