//! The crate socketioxide on axum, with its own broadcast, and its Redis adapter if wanted.
//!
//! Its defaults, but without long polling, which is not used here. A message is an event named `message` with typed
//! JSON; `emit` on the whole namespace includes the sender. `/group/NAME` joins the room of that path, and a message goes
//! to that room. One service for each route. Its buffer holds 128 packets for each connection, and an event for a full
//! one is lost: `emit` returns an error to the handler, which ignores it.
//!
//! Several nodes meet by the crate socketioxide-redis with the driver for the crate `redis`, as its documentation shows
//! it: PUB/SUB, in which the adapter publishes what another node must send and then sends it to its own clients.

use std::io;

use axum::Router;
use socketioxide::{
    SocketIo, TransportType,
    adapter::{Adapter, Emitter},
    extract::{Data, SocketRef},
    layer::SocketIoLayer,
};
use socketioxide_redis::{
    RedisAdapter, RedisAdapterConfig, RedisAdapterCtr, drivers::redis::redis_client::Client,
};

use super::{
    listener::Listener,
    runtime::{self, Message, ServeError},
};

const EVENT: &str = "message";

const FAN_OUT: &str = "/ws";
const ECHO: &str = "/echo";
const GROUP: &str = "/group";

type OnRedis = RedisAdapter<Emitter>;

/// The command line of this server.
#[derive(Debug, clap::Args)]
#[group(id = "socketioxide")]
pub(crate) struct Options {
    #[command(flatten)]
    runtime: runtime::Options,
    /// The Redis server at which several nodes meet: `redis://HOST:PORT`.
    #[arg(long)]
    backplane: Option<String>,
}

/// Serves until it is killed.
pub(crate) fn run(options: &Options) -> Result<(), ServeError> {
    let backplane = options.backplane.clone();
    runtime::run(&options.runtime, |listener| serve(listener, backplane))
}

async fn serve(listener: Listener, backplane: Option<String>) -> io::Result<()> {
    let (echo, one) = service(ECHO);
    one.ns("/", async |socket: SocketRef| {
        socket.on(EVENT, async |socket: SocketRef, Data::<Message>(message)| {
            let _ = socket.emit(EVENT, &message);
        });
    });
    let router = Router::new().layer(echo);
    let router = match backplane {
        None => {
            let [(fan_out, all), (group, rooms)] = [FAN_OUT, GROUP].map(service);
            all.ns("/", publish_to_all);
            rooms.ns("/", publish_to_room);
            router.layer(fan_out).layer(group)
        }
        Some(url) => {
            // The adapter needs RESP3, which is not the client's default.
            let client = Client::open(format!("{url}?protocol=resp3")).map_err(io::Error::other)?;
            let (fan_out, all) = service_on_redis(FAN_OUT, &client).await?;
            all.ns("/", publish_to_all).await.map_err(io::Error::other)?;
            let (group, rooms) = service_on_redis(GROUP, &client).await?;
            rooms.ns("/", publish_to_room).await.map_err(io::Error::other)?;
            router.layer(fan_out).layer(group)
        }
    };
    axum::serve(listener, router).await
}

async fn publish_to_all<A: Adapter>(socket: SocketRef<A>) {
    socket.on(EVENT, async |namespace: SocketIo<A>, Data::<Message>(message)| {
        let _ = namespace.emit(EVENT, &message).await;
    });
}

async fn publish_to_room<A: Adapter>(socket: SocketRef<A>) {
    let room = socket.req_parts().uri.path().to_owned();
    socket.join(room);
    socket.on(EVENT, async |socket: SocketRef<A>, Data::<Message>(message)| {
        let _ = socket.within(socket.rooms()).emit(EVENT, &message).await;
    });
}

fn service(path: &'static str) -> (SocketIoLayer, SocketIo) {
    SocketIo::builder().req_path(path).transports([TransportType::Websocket]).build_layer()
}

/// Each has a connection to Redis.
async fn service_on_redis(
    path: &'static str,
    client: &Client,
) -> io::Result<(SocketIoLayer<OnRedis>, SocketIo<OnRedis>)> {
    // Services with one prefix would receive each other's messages.
    let config = RedisAdapterConfig::new().with_prefix(path);
    let adapter = RedisAdapterCtr::new_with_redis_config(client, config).await.map_err(io::Error::other)?;
    let builder = SocketIo::builder().req_path(path).transports([TransportType::Websocket]);
    Ok(builder.with_adapter::<OnRedis>(adapter).build_layer())
}
