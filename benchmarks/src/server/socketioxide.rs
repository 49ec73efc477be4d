//! The crate socketioxide on axum, with its own broadcast.
//!
//! Its defaults, but without long polling, which is not used here. A message is an event named `message` with typed
//! JSON; `emit` on the whole namespace includes the sender. One service for each route. Its buffer holds 128 packets
//! for each connection, and an event for a full one is lost: `emit` returns an error to the handler, which ignores it.

use std::io;

use axum::Router;
use socketioxide::{
    SocketIo, TransportType,
    extract::{Data, SocketRef},
    layer::SocketIoLayer,
};

use super::{listener::Listener, runtime::Message};

const EVENT: &str = "message";

/// Serves until it is killed.
pub(crate) async fn serve(listener: Listener) -> io::Result<()> {
    let (fan_out, namespace) = service("/ws");
    namespace.ns("/", async |socket: SocketRef| {
        socket.on(EVENT, async |namespace: SocketIo, Data::<Message>(message)| {
            let _ = namespace.emit(EVENT, &message).await;
        });
    });
    let (echo, one) = service("/echo");
    one.ns("/", async |socket: SocketRef| {
        socket.on(EVENT, async |socket: SocketRef, Data::<Message>(message)| {
            let _ = socket.emit(EVENT, &message);
        });
    });
    let router = Router::new().layer(fan_out).layer(echo);
    axum::serve(listener, router).await
}

fn service(path: &'static str) -> (SocketIoLayer, SocketIo) {
    SocketIo::builder().req_path(path).transports([TransportType::Websocket]).build_layer()
}
